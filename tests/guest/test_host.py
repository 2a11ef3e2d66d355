#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# check: timeout=900
"""Hosts that are hard to serve from: a device with 4096-byte sectors under a guest with 512, and a
file system that runs full."""

import os
import subprocess

from libguest import (Guest, OxbowServer, Skip, VhostDisk, Workspace, fio_verified, fio_verify,
                      main, wait_for)


def host(*argv):
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False)
    return done.returncode, done.stdout.strip()


def loop_device(work, path, *options):
    if os.geteuid() != 0:
        raise Skip('loop devices need root')
    status, output = host('losetup', '--show', '-f', *options, path)
    if status:
        raise Skip(f'no loop device: {output}')
    work.undo.append(lambda: host('losetup', '-d', output))
    return output


def sectors(tap):
    with Workspace('host-sectors') as work:
        device = loop_device(work, work.image('backing', '256M'), '--sector-size', '4096')
        server = work.add(OxbowServer(work, device, label='disk',
                                      options=['--logical-block-size', '512'])).start()
        guest = work.add(Guest(work, [VhostDisk(server, 1)])).boot()
        size = guest.check('cat /sys/block/vda/queue/logical_block_size').strip()
        tap.ok(size == '512', 'sectors: the guest sees 512-byte sectors', size)
        guest.verify('/dev/vda', bs='512', size='2m', depth=32)
        tap.ok(True, 'sectors: neighbours in one host sector do not hurt each other')
        guest.verify('/dev/vda', bssplit='512/30:1536/20:4k/20:10k/15:65k/15', size='24m', depth=16,
                     offset='8704k')
        tap.ok(True, 'sectors: writes of any length read back')
        guest.check('mkfs.ext4 -q -b 1024 /dev/vda && mount /dev/vda /mnt && '
                    'cp /bin/busybox /mnt/ && umount /mnt && mount /dev/vda /mnt && '
                    'cmp /bin/busybox /mnt/busybox && umount /mnt')
        errors = guest.io_errors()
        tap.ok(not errors, 'sectors: a file system with 1 KiB blocks; no error', errors)
        guest.power_off()
        tap.ok(server.stop() == 0, 'sectors: SIGTERM ends the server with status 0')
        status, output = host('/sbin/e2fsck', '-fn', device)
        tap.ok(status == 0, 'sectors: the file system is clean on the host', output)


def full(tap):
    with Workspace('host-full') as work:
        small = loop_device(work, work.image('small', '160M'))
        mount = os.path.join(work.folder, 'mount')
        os.mkdir(mount)
        status, output = host('/sbin/mkfs.ext4', '-q', '-m', '0', '-O', '^has_journal', small)
        if status == 0:
            status, output = host('mount', small, mount)
        if status:
            raise Skip(f'no file system of our own: {output}')
        work.undo.append(lambda: host('umount', mount))
        image = os.path.join(mount, 'disk.raw')
        with open(image, 'wb') as file:
            file.truncate(256 << 20)
        free = os.statvfs(mount)
        spare = free.f_bavail * free.f_bsize
        filler = [os.path.join(mount, f'filler{number}') for number in range(3)]
        for path in filler:
            with open(path, 'wb') as file:
                os.posix_fallocate(file.fileno(), 0, (spare - (8 << 20)) // 3)
        server = work.add(OxbowServer(work, image, label='disk')).start()
        control = server.qmp()
        guest = work.add(Guest(work, [VhostDisk(server, 1)])).boot()

        def stopped():
            return control.execute('query-block')[0].get('io-status') == 'nospace'

        def going_on():
            return control.execute('query-block')[0].get('io-status') == 'ok'

        job = guest.start(fio_verify('/dev/vda', bs='64k', size='120m', depth=16))
        wait_for(stopped, 'the disk to stop for want of space')
        tap.ok(not job.done(), 'full: the guest waits when the host is out of space')
        os.unlink(filler[0])
        control.execute('cont')
        wait_for(lambda: going_on() or job.done(), 'going on after cont', 20)
        tap.ok(True, 'full: cont after space was freed')

        wait_for(stopped, 'the disk to stop again')
        tap.ok(not job.done(), 'full: and waits again')
        # QEMU waits for the rings to stop: held requests must not keep it.
        guest.monitor.execute('stop')
        guest.monitor.execute('cont')
        wait_for(stopped, 'the disk to stop again after a pause')
        tap.ok(not job.done(), 'full: the guest can be paused meanwhile')
        os.unlink(filler[1])
        # Nobody says cont: a timer does.
        wait_for(lambda: going_on() or job.done(), 'going on by itself', 60)
        tap.ok(True, 'full: goes on by itself when there is space')

        wait_for(stopped, 'the disk to stop a third time')
        control.close()
        # Held requests outlive the process.
        server.kill()
        os.unlink(filler[2])
        server.start()
        fio_verified(guest.check_job(job), '120m')
        tap.ok(True, 'full: killed while it waits, started with space: every write reads back')
        errors = guest.io_errors()
        tap.ok(not errors, 'full: no error in the guest', errors)
        guest.power_off()
        tap.ok(server.stop() == 0, 'full: SIGTERM ends the server with status 0')


main(('sectors', sectors), ('full', full))
