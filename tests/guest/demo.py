#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of ./demo that comes after the build: the guest, what it does, and what came of it."""

import argparse
import hashlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import kit
from libguest import (BUILD, OXBOW, Guest, GuestError, OxbowServer, QemuDisk, VhostDisk, Workspace,
                      accelerator, check_image, fio, fio_result, fio_verified, fio_verify, host,
                      sbin, size_on_host, wait_for)

MIB = 1 << 20
GIB = 1 << 30
# The file system takes the first GiB of each disk.  Behind it fio has places of its own: what it
# measures on was written before, what is killed under and `new` writes to was never written.
SIZE = '4G'
KNOWN = {'offset': '1g'}
KILLED = {'offset': '1792m'}
NEW = 2304  # MiB
ROUNDS = 3
# name, fio's arguments, what is counted, per second
WORKLOADS = [
    ('4 KiB random writes, new space', {'rw': 'randwrite', 'bs': '4k', 'depth': 32, 'new': 512,
                                        'io_size': '24m'}, 'iops', 'IOPS'),
    ('4 KiB random reads', {'rw': 'randread', 'bs': '4k', 'depth': 32}, 'iops', 'IOPS'),
    ('4 KiB random writes', {'rw': 'randwrite', 'bs': '4k', 'depth': 32}, 'iops', 'IOPS'),
    ('1 MiB sequential reads', {'rw': 'read', 'bs': '1m', 'depth': 8}, 'bw', 'MiB/s'),
    ('1 MiB sequential writes', {'rw': 'write', 'bs': '1m', 'depth': 8}, 'bw', 'MiB/s'),
]


def say(step, text):
    print(f'{step:<10} {text}', flush=True)


def peer_aio(path):
    """What QEMU's own disk can use here."""
    for aio in ('io_uring', 'native'):
        tried = subprocess.run(['qemu-io', '-c', 'read 0 4k', '--image-opts',
                                f'driver=file,filename={path},aio={aio},cache.direct=on'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        if not tried.returncode:
            return aio
    return 'threads'


def prepare():
    """The kit, and how guests run here."""
    folder = os.path.join(BUILD, 'guest', 'kit')
    made = kit.make(folder, lambda line: say('kernel', line))
    say('kernel', f"{made['package']} (in build/guest, not installed), with a busybox initramfs")
    accel, why = accelerator(made, folder)
    say('machine', f"{'KVM' if accel == 'kvm' else 'emulated CPU (TCG)'}: {why}")
    return accel


# --- the demo with disks of its own ---------------------------------------------------------

def make_tree(guest):
    """Writes a tree on /mnt; {path: sha256}."""
    output = guest.check('''
        mkdir -p /mnt/tree/copies && cd /mnt/tree && cp -a /modules /bin/busybox copies/ &&
        i=0
        while [ $i -lt 120 ]; do
            i=$((i + 1))
            mkdir -p d$((i % 7))/e$((i % 11))
            dd if=/dev/urandom of=d$((i % 7))/e$((i % 11))/f$i bs=$((i * 997)) count=1 2>/dev/null
        done
        ln -s d1 link && : >empty && sync
        find . -type f | sort | xargs sha256sum''')
    return dict(reversed(line.split(None, 1)) for line in output.splitlines())


def read_tree(guest):
    """Unmounts, forgets, mounts, reads again."""
    output = guest.check('''umount /mnt && echo 3 >/proc/sys/vm/drop_caches &&
        mount /dev/vda /mnt && cd /mnt/tree && find . -type f | sort | xargs sha256sum''')
    return dict(reversed(line.split(None, 1)) for line in output.splitlines())


def kill_under_load(guest, server, kills):
    """Verified writes to new space while the server is killed and started again."""
    job = guest.start(fio_verify('/dev/vda', size='512m', bs='32k', depth=32, rate_iops=',4000',
                                 **KILLED))
    for number in range(kills):
        guest.wait_writes(2000, job)
        server.kill()
        time.sleep(0.2 * number)
        server.start()
    fio_verified(guest.check_job(job), '512m')


def workload(guest, device, number, arguments):
    """One run of fio; its result for the side that it used."""
    arguments = dict(arguments)
    new = arguments.pop('new', 0)
    if new:
        arguments.update(offset=f'{NEW + number * new}m', size=f'{new}m')
    else:
        arguments.update(KNOWN, size='768m', runtime=1, ramp_time='0.2', time_based=True)
    result = fio_result(guest.check(fio('/dev/' + device, **arguments) + ' --output-format=json'))
    return result['read' if 'read' in arguments['rw'] else 'write']


def measure(guest):
    """{workload: {'vda': [...], 'vdb': [...]}}, by turns."""
    found = {}
    for device in ('vda', 'vdb'):
        guest.check(fio('/dev/' + device, rw='write', bs='1m', size='768m', depth=8, **KNOWN))
    for number in range(ROUNDS):
        for name, job, key, _ in WORKLOADS:
            for device in ('vda', 'vdb') if number % 2 == 0 else ('vdb', 'vda'):
                side = workload(guest, device, number, job)
                value = side['iops'] if key == 'iops' else side['bw'] / 1024
                found.setdefault(name, {'vda': [], 'vdb': []})[device].append(value)
    return found


def print_table(found, accel, aio):
    print(f"\n{'':32}{'Oxbow':>14}{'QEMU':>16}{'ratio':>8}")
    for name, _, _, unit in WORKLOADS:
        ours, theirs = (statistics.median(found[name][device]) for device in ('vda', 'vdb'))
        ratio = statistics.median(a / b for a, b in zip(found[name]['vda'], found[name]['vdb']))
        print(f'{name:32}{ours:>8,.0f} {unit:5}{theirs:>10,.0f} {unit:5}{ratio:>8.2f}')
    print(f'Medians of {ROUNDS} rounds by turns in one guest; both disks are qcow2 images that grew '
          f'from\nnothing. QEMU: its own virtio-blk, cache=none, aio={aio}, an iothread.')
    if accel != 'kvm':
        print('The guest\'s CPU is emulated here and takes most of the time, so the disks look '
              'more alike\nand slower than under KVM; docs/performance.md measures without a '
              'guest.')
    print()


def human(size):
    return f'{size / GIB:.1f} GiB' if size >= GIB else f'{size / MIB:.1f} MiB'


def trim(guest, image, files):
    """The guest gives up what lies behind its file system, which takes about `files` bytes; (size
    on the host before, after)."""
    before = size_on_host(image)
    # What the image refers to no more is free once that is durable: after a flush.
    guest.check(f'blkdiscard -o {GIB} -l $(($(cat /sys/block/vda/size) * 512 - {GIB})) /dev/vda && '
                f'dd if=/dev/zero of=/dev/vda bs=4k seek={GIB >> 12} count=1 conv=fsync')
    wait_for(lambda: size_on_host(image) < files + 64 * MIB, 'the image shrinking on the host')
    return before, size_on_host(image)


def check_on_host(image, sums, work):
    """The image, the file system in it, and the tree, without mounting it."""
    check_image(image)
    raw = work.raw(image)
    host(sbin('e2fsck'), '-fn', raw)
    target = os.path.join(work.folder, 'tree')
    os.makedirs(target)
    host(sbin('debugfs'), '-R', f'rdump /tree {target}', raw)
    for name, digest in sums.items():
        with open(os.path.join(target, 'tree', name), 'rb') as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != digest:
            raise GuestError(f'{name} reads differently on the host')
    os.unlink(raw)


def demo(work):
    accel = prepare()
    image = work.create('oxbow.qcow2', SIZE)
    info = host(OXBOW, 'info', image)
    if 'virtual size: 4 GiB' not in info or 'file format: qcow2' not in info:
        raise GuestError(f'oxbow info does not tell of a qcow2 image with 4 GiB:\n{info}')
    small = size_on_host(image)
    if small > MIB:
        raise GuestError(f'the new image takes {small} bytes')
    say('create', f'oxbow.qcow2: {SIZE[:-1]} GiB for the guest, {small >> 10} KiB on the host; '
        'it grows as the guest writes')
    peer = os.path.join(work.folder, 'qemu.qcow2')
    host('qemu-img', 'create', '-f', 'qcow2', peer, SIZE)
    server = work.add(OxbowServer(work, image, label='disk', fmt='qcow2'))
    server.start()
    say('serve', server.ready_line())
    aio = peer_aio(peer)
    guest = work.add(Guest(work, [VhostDisk(server, 2), QemuDisk(peer, aio, 2, 'qcow2')],
                           memory=768))
    began = time.monotonic()
    guest.boot()
    release = guest.check('uname -r').strip()
    say('boot', f'Linux {release} is up after {time.monotonic() - began:.1f} s: '
        'vda is Oxbow\'s disk, vdb QEMU\'s')

    guest.check('mkfs.ext4 -q -F /dev/vda 1G && mount /dev/vda /mnt')
    sums = make_tree(guest)
    if read_tree(guest) != sums or len(sums) < 100:
        raise GuestError('the tree reads differently after it was mounted anew')
    say('files', f'ext4 made and mounted; {len(sums)} files written, and read back after '
        'mounting anew: all checksums match')
    files = size_on_host(image)
    for device in ('/dev/vda', '/dev/vdb'):
        guest.verify(device, bssplit='512/20:4k/40:64k/40', size='64m', depth=16, **KNOWN)
    say('verify', 'fio wrote and verified 64 MiB on either disk')
    kills = 3
    grown = size_on_host(image)
    kill_under_load(guest, server, kills)
    errors = guest.io_errors()
    if errors:
        raise GuestError(f"the guest's kernel saw errors:\n{errors}")
    changes = server.taken_over()
    if not changes:
        raise GuestError('no start took anything over from a killed process')
    grown = size_on_host(image) - grown
    if grown < 500 * MIB:
        raise GuestError(f'the image grew by {grown} bytes only while fio wrote 512 MiB to new '
                         'space')
    say('kill -9', f'Oxbow was killed {kills} times while fio wrote, and started again; meanwhile '
        f'the image grew\n{"":11}by {human(grown)}. New processes took over what the killed ones '
        f'had yet to write into it\n{"":11}({", ".join(map(str, changes))} changes of its map): '
        'the guest saw no error, and every block reads back')
    say('speed', f'{ROUNDS} rounds of {len(WORKLOADS)} workloads on either disk ...')
    found = measure(guest)
    if read_tree(guest) != sums:
        raise GuestError('the tree reads differently at the end')
    guest.check('cd / && umount /mnt')
    before, after = trim(guest, image, files)
    say('trim', f'the image had grown to {human(before)}; the guest discarded all but its file '
        f'system: {human(after)}')
    errors = guest.io_errors()
    if errors:
        raise GuestError(f"the guest's kernel saw errors:\n{errors}")
    guest.power_off()
    status = server.stop()
    if status:
        raise GuestError(f'oxbow ended with status {status} on SIGTERM')
    say('shutdown', 'unmounted and powered off; Oxbow flushed and ended')
    check_on_host(image, sums, work)
    say('check', 'oxbow check and qemu-img check find no errors and no leaked clusters in the image')
    say('host', f'as QEMU reads the image, e2fsck finds nothing to mend, and all {len(sums)} files '
        'are the same')
    print_table(found, accel, aio)


# --- a disk of the user's -------------------------------------------------------------------

def fingerprint(path):
    """Something that changes when the content does: all of it up to 4 GiB, else both ends."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        whole = size <= 4 * GIB
        parts = [(0, size)] if whole else [(0, GIB // 4), (size - GIB // 4, GIB // 4)]
        for start, length in parts:
            file.seek(start)
            while length:
                data = file.read(min(length, 1 << 20))
                if not data:
                    break
                digest.update(data)
                length -= len(data)
    status = os.stat(path)
    return digest.hexdigest(), status.st_mtime_ns, size, whole


def demo_disk(work, path, write):
    prepare()
    before = None if write else fingerprint(path)
    options = [] if write else ['--read-only']
    server = work.add(OxbowServer(work, path, label='disk', options=options, fmt=None))
    server.start()
    say('serve', server.ready_line())
    guest = work.add(Guest(work, [VhostDisk(server, 2)]))
    guest.boot()
    size = int(guest.check('cat /sys/block/vda/size')) * 512
    read_only = guest.check('cat /sys/block/vda/ro').strip() == '1'
    if read_only == write:
        raise GuestError(f"the guest's disk is {'read-only' if read_only else 'writable'}")
    say('boot', f'the guest sees {size / GIB:.2f} GiB on vda'
        f"{', read-only' if read_only else ', writable'}")
    parts = re.findall(r'\b(\d+) (vda\d+)', guest.check('cat /proc/partitions'))
    for blocks, name in parts:
        say('partition', f'{name}: {int(blocks) / (1 << 20):.2f} GiB')
    if not parts:
        say('partition', 'none')
    there = guest.check('dd if=/dev/vda bs=1M count=1 2>/dev/null | sha256sum').split()[0]
    if not write:
        output = guest.run('echo x | dd of=/dev/vda bs=512 count=1 conv=fsync')
        if output[0] == 0:
            raise GuestError('the guest could write to a read-only disk')
    else:
        block = size // 4096 - 1
        guest.check(f'dd if=/dev/vda of=/tmp/block bs=4096 skip={block} count=1 && '
                    f'dd if=/tmp/block of=/dev/vda bs=4096 seek={block} count=1 conv=fsync && '
                    f'echo 3 >/proc/sys/vm/drop_caches && '
                    f'dd if=/dev/vda bs=4096 skip={block} count=1 | cmp - /tmp/block')
        say('write', 'the last 4 KiB were read, written back as they were, flushed, read again')
    length = min(size, GIB) >> 20 << 20 or size
    output = guest.check(fio('/dev/vda', rw='read', bs='1m', size=length, depth=8, readonly=True)
                         + ' --output-format=json')
    result = fio_result(output)['read']
    say('read', f"{result['io_bytes'] >> 20} MiB in order at {result['bw'] / 1024:,.0f} MiB/s")
    errors = guest.io_errors() if write else ''
    guest.power_off()
    if server.stop():
        raise GuestError('oxbow did not end well on SIGTERM')
    if errors:
        raise GuestError(f"the guest's kernel saw errors:\n{errors}")
    fmt = server.ready_line().split(' cache=')[0].split()[-1]
    if fmt in ('raw', 'qcow2', 'qed'):
        start = os.path.join(work.folder, 'start')
        host('qemu-img', 'dd', '-f', fmt, '-O', 'raw', 'bs=1M', 'count=1', f'if={path}',
             f'of={start}')
        with open(start, 'rb') as file:
            here = hashlib.sha256(file.read()).hexdigest()
        if here != there:
            raise GuestError('the first MiB reads differently in the guest and on the host')
        say('host', 'the first MiB is the same in the guest and here')
    if before:
        if fingerprint(path) != before:
            raise GuestError(f'{path} changed')
        what = 'checksum of all of it' if before[3] else 'checksums of both ends'
        say('host', f'{path} is unchanged ({what} and time of last change)')


def main():
    parser = argparse.ArgumentParser(prog='demo')
    parser.add_argument('--disk')
    parser.add_argument('--write', action='store_true')
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    logs = os.path.join(BUILD, 'demo')
    work = Workspace('demo', keep_logs=os.path.join(logs, 'guest'))
    try:
        if arguments.disk:
            demo_disk(work, os.path.abspath(arguments.disk), arguments.write)
        else:
            demo(work)
        print(f'All of it held ({time.monotonic() - began:.0f} s).')
        return 0
    except KeyboardInterrupt:
        print('\ndemo: interrupted', file=sys.stderr)
        return 130
    except (GuestError, kit.KitError, OSError) as error:
        print(f'\ndemo: FAILED: {error}\ndemo: logs are in {logs}', file=sys.stderr)
        return 1
    finally:
        work.close()


if __name__ == '__main__':
    sys.exit(main())
