#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# check: timeout=900
"""What happens to a guest in its life, while I/O runs: memory is plugged and unplugged, the balloon
grows, the driver goes and comes, the disk grows, the machine is reset and reboots."""

import subprocess

from libguest import (OXBOW, Guest, GuestError, OxbowServer, VhostDisk, Workspace, fio_verified,
                      fio_verify, main, make_server, wait_for)

MIB = 1 << 20


def memory_of(guest):
    return int(guest.check("awk '/MemTotal/ {print $2}' /proc/meminfo")) // 1024


def plug_memory(tap, label, guest):
    job = guest.start(fio_verify('/dev/vda', bs='16k', size='64m', depth=16, rate=',24m'))
    guest.wait_writes(200, job)
    before = memory_of(guest)
    guest.monitor.send({'execute': 'object-add', 'arguments': {
        'qom-type': 'memory-backend-memfd', 'id': 'more', 'size': 512 * MIB, 'share': True}})
    guest.monitor.send({'execute': 'device_add', 'arguments': {
        'driver': 'pc-dimm', 'id': 'dimm', 'memdev': 'more'}})
    wait_for(lambda: memory_of(guest) >= before + 400, 'the new memory in use')
    fio_verified(guest.check_job(job), '64m')
    tap.ok(True, f'{label}: memory plugged in during I/O')
    # With the old memory full, buffers come from the new one.
    guest.check('mount -o remount,size=90% /dev/shm && '
                f'dd if=/dev/zero of=/dev/shm/fill bs=1M count={before - 120}')
    guest.verify('/dev/vda', bs='1m', size='128m', depth=64)
    tap.ok(True, f'{label}: I/O on the new memory')
    job = guest.start('rm /dev/shm/fill; '
                      + fio_verify('/dev/vda', bs='16k', size='64m', depth=16, rate=',24m'))
    guest.wait_writes(200, job)
    guest.monitor.send({'execute': 'device_del', 'arguments': {'id': 'dimm'}})
    try:
        guest.monitor.wait_event('DEVICE_DELETED', 20)
        gone = True
    except GuestError:
        gone = False  # The guest's kernel may refuse; that is no fault of the disk's.
    fio_verified(guest.check_job(job), '64m')
    if gone:
        tap.ok(True, f'{label}: memory unplugged during I/O')
    else:
        tap.skip(f'{label}: memory unplugged during I/O', 'the guest did not let it go')


def move_balloon(tap, label, guest):
    start = guest.monitor.execute('query-balloon')['actual']
    job = guest.start(fio_verify('/dev/vda', bssplit='4k/50:256k/50', size='96m', depth=16,
                                 rate=',16m'))
    guest.wait_writes(100, job)
    for target in (start - 200 * MIB, start, start - 128 * MIB, start):
        guest.monitor.execute('balloon', value=target)
        wait_for(lambda target=target:
                 abs(guest.monitor.execute('query-balloon')['actual'] - target) < 8 * MIB,
                 'the balloon')
    fio_verified(guest.check_job(job), '96m')
    tap.ok(True, f'{label}: the balloon grew and shrank during I/O')


def pause(tap, label, guest):
    """QEMU stops the rings of a paused guest, asks where they stand, and starts them there."""
    job = guest.start(fio_verify('/dev/vda', size='24m', depth=32, rate_iops=',3000'))
    for _ in range(4):
        guest.wait_writes(300, job)
        guest.monitor.execute('stop')
        guest.monitor.execute('cont')
    fio_verified(guest.check_job(job), '24m')
    tap.ok(True, f'{label}: paused four times during I/O')


def rebind_driver(tap, label, guest):
    for number in range(2):
        # What is in flight may fail in the guest.
        job = guest.start(fio_verify('/dev/vda', size='128m', depth=32))
        guest.wait_writes(300, job)
        name = guest.check('basename $(readlink /sys/block/vda/device)').strip()
        guest.check(f'echo {name} >/sys/bus/virtio/drivers/virtio_blk/unbind')
        guest.wait(job)
        guest.check(f'echo {name} >/sys/bus/virtio/drivers/virtio_blk/bind')
        guest.check('dmesg -c >/dev/null')
        guest.verify('/dev/vda', size='16m')
        tap.ok(True, f'{label}: the driver went during I/O and came back ({number + 1})')


def resize(tap, label, guest, server, image):
    if not isinstance(server, OxbowServer):
        raise GuestError('only Oxbow resizes')
    job = guest.start(fio_verify('/dev/vda', size='32m', rate_iops=',2500'))
    guest.wait_writes(300, job)
    done = subprocess.run([OXBOW, 'resize', '-f', 'raw', image, '640M'], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)
    tap.ok(done.returncode == 0, f'{label}: oxbow resize asks the server', done.stdout)
    wait_for(lambda: guest.check('cat /sys/block/vda/size').strip() == str(640 * 2048),
             'the guest seeing the new size', 20)
    tap.ok(True, f'{label}: the guest sees the new size at once')
    fio_verified(guest.check_job(job), '32m')
    guest.verify('/dev/vda', offset='520m', size='24m')
    tap.ok(True, f'{label}: the new space works')


def restart(tap, label, guest):
    job = guest.start(fio_verify('/dev/vda', size='256m', depth=32))
    guest.wait_writes(500, job)
    guest.monitor.execute('system_reset')
    guest.wait_hello()
    guest.verify('/dev/vda', size='16m')
    tap.ok(True, f'{label}: reset during I/O')
    job = guest.start(fio_verify('/dev/vda', size='256m', depth=32))
    guest.wait_writes(500, job)
    guest.start('reboot -f')
    guest.wait_hello()
    guest.verify('/dev/vda', size='16m')
    tap.ok(True, f'{label}: reboot during I/O')


def live(tap, label, packed, queues, options):
    with Workspace('lifecycle-' + label) as work:
        image = work.image('disk.raw', '512M')
        server = work.add(make_server(work, image, queues=queues, options=options)).start()
        guest = work.add(Guest(work, [VhostDisk(server, queues, packed)], max_memory=2048,
                               more=['-device', 'virtio-balloon-pci,id=balloon'])).boot()
        pid = server.pid
        tap.case(f'{label}: memory', plug_memory, label, guest)
        tap.case(f'{label}: pause', pause, label, guest)
        # These do not know how a ring looks.
        if not packed:
            tap.case(f'{label}: balloon', move_balloon, label, guest)
            tap.case(f'{label}: resize', resize, label, guest, server, image)
        errors = guest.io_errors()
        tap.ok(not errors, f'{label}: no error in the guest', errors)
        tap.case(f'{label}: driver', rebind_driver, label, guest)
        tap.case(f'{label}: restarts', restart, label, guest)
        errors = guest.io_errors()
        tap.ok(not errors, f'{label}: no error in the guest after its restarts', errors)
        guest.power_off()
        tap.ok(server.process.poll() is None and server.pid == pid,
               f'{label}: one server process all the way')
        if isinstance(server, OxbowServer):
            tap.ok(server.stop() == 0, f'{label}: SIGTERM ends the server with status 0')


main(('split', lambda tap: live(tap, 'split', False, 1, [])),
     ('packed', lambda tap: live(tap, 'packed', True, 2, ['--iothreads', '2'])))
