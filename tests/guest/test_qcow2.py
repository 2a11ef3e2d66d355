#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# check: timeout=900
"""Guests on images that have a map: qcow2 that grows and shrinks, overlays, images with internal
snapshots, qed, an encrypted one; and on qcow2 whose servers are killed.  After each clean stop
neither QEMU nor Oxbow finds an error or a leaked cluster, and QEMU reads what the guest wrote."""

import os
import random
import time

from libguest import (OXBOW, Guest, OxbowServer, VhostDisk, Workspace, check_image, digest_of_file,
                      fio_verified, fio_verify, host, main, sbin, size_on_host, wait_for)

MIB = 1 << 20


def serve(work, image, fmt='qcow2', queues=1, options=()):
    return work.add(OxbowServer(work, image, queues=queues, options=options, fmt=fmt)).start()


def digest_in_guest(guest, device):
    return guest.check(f'echo 3 >/proc/sys/vm/drop_caches; md5sum /dev/{device}').split()[0]


def stop(tap, label, guest, servers):
    errors = guest.io_errors()
    tap.ok(not errors, f'{label}: no error in the guest', errors)
    guest.power_off()
    status = [server.stop() for server in servers]
    tap.ok(not any(status), f'{label}: SIGTERM ends the servers with status 0', status)


def clean(tap, work, label, image, digest=None, fmt='qcow2', secret=None):
    """What the host finds after a clean stop: `digest` is the whole disk's as the guest read it,
    `secret` what qemu-img needs in place of a format."""
    check_image(image, fmt, secret)
    tap.ok(True, f'{label}: neither checker finds errors or leaks')
    if digest is None:
        return
    raw = work.raw(image, fmt, secret)
    found = digest_of_file(raw)
    tap.ok(found == digest, f'{label}: QEMU reads what the guest read', found)
    os.unlink(raw)


# --- growing, qed and encrypted images, in one guest ------------------------------------------

TREE = '''
    mkdir -p /mnt/tree/a && cd /mnt/tree && cp /bin/busybox a/ &&
    for i in 1 2 3 4 5 6 7 8 9; do
        dd if=/dev/urandom of=a/file$i bs=100000 count=$i 2>/dev/null
    done && find . -type f | sort | xargs sha256sum >/mnt/sums && cd / && sync'''
TREE_HOLDS = 'cd /mnt/tree && sha256sum -c /mnt/sums >/tmp/checked && cd / && wc -l </tmp/checked'


def grow(tap):
    with Workspace('qcow2-grow') as work:
        secret = os.path.join(work.folder, 'secret')
        with open(secret, 'w', encoding='ascii') as file:
            file.write('open, sesame')
        key = f'secret,id=key,file={secret}'
        image = work.create('grow.qcow2', '1G')
        qed = work.create('small.qed', '80M', fmt='qed')
        luks = work.create('secret.qcow2', '40M', options=[
            '--object', key, '-o', 'encrypt.format=luks,encrypt.key-secret=key,'
            'encrypt.iter-time=10'])
        servers = [serve(work, image), serve(work, qed, 'qed'),
                   serve(work, luks, options=['--object', key, '--key-secret', 'key'])]
        new = size_on_host(image)
        guest = work.add(Guest(work, [VhostDisk(server, 1) for server in servers])).boot()

        tap.ok(new < MIB, 'grow: a new image takes little', new)
        guest.check('mkfs.ext4 -q -b 4096 /dev/vda && mount /dev/vda /mnt &&' + TREE)
        guest.verify('/mnt/data', bs='4k', size='16m', depth=32)
        guest.verify('/mnt/mixed', bssplit='512/30:4k/30:20k/20:256k/20', size='32m', depth=8,
                     fsync=64)
        tap.ok(True, 'grow: fio verifies what it wrote to new space')
        guest.check('dd if=/dev/zero of=/mnt/big bs=1M count=128 2>/dev/null && sync')
        grown = size_on_host(image)
        tap.ok(new + 160 * MIB < grown < 400 * MIB, 'grow: the image grew as the guest wrote',
               f'{new} to {grown}')
        # A flush makes the discards durable; only then the space is free.
        guest.check('rm /mnt/big /mnt/data /mnt/mixed && sync && fstrim /mnt && echo >/mnt/x && '
                    'sync')
        wait_for(lambda: size_on_host(image) < grown - 150 * MIB, 'trimmed space going back')
        tap.ok(True, 'grow: what the guest trims goes back to the host')
        guest.verify('/mnt/again', bs='8k', size='12m', depth=32)
        tap.ok(True, 'grow: freed space is used again, and verifies')

        guest.verify('/dev/vdb', bssplit='512/20:4k/40:64k/40', size='16m', depth=16)
        guest.verify('/dev/vdb', bs='1m', size='32m', offset='40m', depth=4)
        tap.ok(True, 'qed: fio verifies what it wrote')
        guest.verify('/dev/vdc', bssplit='512/20:4k/40:64k/40', size='16m', depth=16)
        tap.ok(True, 'luks: fio verifies what it wrote')

        guest.check('rm -f /mnt/again && umount /mnt')
        guest.start('reboot -f')
        guest.wait_hello()
        output = guest.check('mount /dev/vda /mnt && ' + TREE_HOLDS)
        tap.ok(output.split()[-1:] == ['10'], 'grow: the files are there after a reboot', output)
        guest.check('umount /mnt')
        qed_digest, luks_digest = (digest_in_guest(guest, name) for name in ('vdb', 'vdc'))
        stop(tap, 'grow', guest, servers)

        clean(tap, work, 'grow', image)
        raw = work.raw(image)
        host(sbin('e2fsck'), '-fn', raw)
        tap.ok(True, 'grow: the file system is clean on the host')
        os.unlink(raw)
        clean(tap, work, 'qed', qed, qed_digest, 'qed')
        clean(tap, work, 'luks', luks, luks_digest, secret=[
            '--object', key, '--image-opts',
            f'driver=qcow2,file.filename={luks},encrypt.key-secret=key'])
        with open(luks, 'rb') as file:
            head = file.read(4 * MIB)
        tap.ok(b'LUKS\xba\xbe' in head, 'luks: there is a LUKS header in the image')


# --- overlays and snapshots, in one guest -----------------------------------------------------

def qemu_io(image, fmt, *commands):
    words = [word for command in commands for word in ('-c', command)]
    host('qemu-io', '-f', fmt, *words, image)


def pattern(image, fmt, seed):
    """Content that differs from place to place, with holes."""
    dice = random.Random(seed)
    qemu_io(image, fmt, *(f'write -P {dice.randrange(1, 256)} {dice.randrange(56 * 2048) * 512} '
                          f'{dice.choice([512, 4096, 70000 // 512 * 512, MIB, 5 * MIB])}'
                          for _ in range(24)))


def touch(guest, device):
    """Overwrites some of the disk, in pieces that hardly fit; verifies it while it is in use."""
    guest.verify('/dev/' + device, bssplit='512/25:3k/25:4k/25:40k/25', size='12m', offset='5m',
                 depth=16)
    guest.verify('/dev/' + device, bs='4k', size='4m', offset='32m', depth=16, fsync=128)
    guest.check(f'blkdiscard -o {25 * MIB + 512} -l {3 * MIB} /dev/{device}')


def shared(tap):
    with Workspace('qcow2-shared') as work:
        bases = [('raw', work.image('base.raw', '62M')),
                 ('qcow2', work.create('base.qcow2', '64M'))]
        overlays, digests = [], []
        for number, (fmt, base) in enumerate(bases):
            pattern(base, fmt, number)
            digests.append(digest_of_file(base))
            overlays.append(work.create(f'over-{fmt}.qcow2', '72M',
                                        options=['-b', base, '-F', fmt]))
            if 'extended l2: true' not in host(OXBOW, 'info', overlays[-1]):
                tap.ok(False, f'overlay on {fmt}: has subclusters')
        snapshots = os.path.join(work.folder, 'snapshots.qcow2')
        host('qemu-img', 'create', '-q', '-f', 'qcow2', snapshots, '64M')
        old = []
        for number in range(2):
            pattern(snapshots, 'qcow2', 10 + number)
            host('qemu-img', 'snapshot', '-c', f's{number}', snapshots)
            raw = work.raw(snapshots)
            old.append(digest_of_file(raw))
            os.unlink(raw)

        images = overlays + [snapshots]
        before = []
        for image in images:
            raw = work.raw(image)
            before.append(digest_of_file(raw))
            os.unlink(raw)
        servers = [serve(work, image) for image in images]
        guest = work.add(Guest(work, [VhostDisk(server, 1) for server in servers])).boot()
        names = ['vda', 'vdb', 'vdc']
        labels = ['overlay on raw', 'overlay on qcow2', 'snapshots']
        seen = [digest_in_guest(guest, device) for device in names]
        tap.ok(seen == before, 'shared: the guest reads what is below', f'{seen} {before}')
        for label, device in zip(labels, names):
            touch(guest, device)
            tap.ok(True, f'{label}: fio verifies what it wrote')
        after = [digest_in_guest(guest, device) for device in names]
        stop(tap, 'shared', guest, servers)

        for (fmt, base), digest in zip(bases, digests):
            tap.ok(digest_of_file(base) == digest, f'overlay on {fmt}: the base is unchanged')
        for label, image, digest in zip(labels, images, after):
            clean(tap, work, label, image, digest)
        for number in range(2):
            host('qemu-img', 'snapshot', '-a', f's{number}', snapshots)
            clean(tap, work, f'snapshots: gone back to snapshot {number}', snapshots, old[number])


# --- killed servers ---------------------------------------------------------------------------

def killed(tap):
    """A growing image on split rings and an overlay on packed ones; both servers are killed."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    tap.note(f'killed: seed {seed}')
    with Workspace('qcow2-killed') as work:
        base = work.create('base.qcow2', '160M')
        pattern(base, 'qcow2', seed)
        base_digest = digest_of_file(base)
        images = [work.create('grow.qcow2', '1G'),
                  work.create('over.qcow2', options=['-b', base, '-F', 'qcow2'])]
        servers = [serve(work, images[0]),
                   serve(work, images[1], queues=2,
                         options=['--iothreads', '2', '--cache', 'writeback'])]
        guest = work.add(Guest(work, [VhostDisk(servers[0], 1),
                                      VhostDisk(servers[1], 2, packed=True)])).boot()
        jobs = [(guest.start(fio_verify('/dev/vda', bs='4k', size='64m', depth=24, name='small',
                                        offset='512m', rate_iops=',3000')), '64m'),
                (guest.start(fio_verify('/dev/vda', bssplit='512/20:8k/40:128k/20:1m/20',
                                        size='128m', depth=8, offset='768m', rate=',16m',
                                        fsync=40, name='mixed')), '128m'),
                (guest.start(fio_verify('/dev/vdb', bssplit='512/10:4k/60:20k/20:200k/10',
                                        size='96m', depth=16, offset='16m', rate=',12m',
                                        name='over')), '96m')]
        # With a file system, whose journal flushes.
        guest.check('mkfs.ext4 -q /dev/vda 512M && mount /dev/vda /mnt')
        files = guest.start('''
            i=0
            while [ $i -lt 150 ]; do
                i=$((i + 1))
                dd if=/dev/urandom of=/mnt/f$i bs=$((i * 317)) count=1 2>/dev/null || exit 1
                sha256sum /mnt/f$i >>/tmp/sums || exit 1
                [ $((i % 10)) -ne 0 ] || sync
            done''')
        kills = 0
        while kills < 4 and not jobs[0][0].done() and not jobs[2][0].done():
            guest.wait_writes(dice.choice([1, 20, 1000]), jobs[0][0])
            for server in servers:
                time.sleep(dice.random() * 0.05)
                server.kill()
            kills += 1
            time.sleep(dice.random() * 0.3)
            for server in servers:
                server.start()
            if kills == 2:
                # In the middle of what a fresh process does with what it inherited.
                time.sleep(dice.random() * 1.2)
                for server in servers:
                    server.kill()
                    server.start()
        tap.ok(kills == 4, 'killed: 5 times while the guest wrote', kills)
        for label, server in zip(('growing', 'overlay'), servers):
            took = server.taken_over()
            tap.ok(took, f'killed: {label}: new processes took over changes of the map')
            tap.note(f'killed: {label}: took over {took}')
        for job, size in jobs:
            fio_verified(guest.check_job(job), size)
        tap.ok(True, 'killed: every write reads back')
        guest.check_job(files)
        guest.check('umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount /dev/vda /mnt && '
                    'sha256sum -c /tmp/sums >/dev/null && umount /mnt')
        tap.ok(True, 'killed: the file system reads back')
        # While nothing is going on, and once more with what is then to be written.
        for server in servers:
            server.kill()
            server.start()
        for device in ('vda', 'vdb'):
            guest.verify('/dev/' + device, size='8m')
        tap.ok(True, 'killed: while idle')
        digest = digest_in_guest(guest, 'vdb')
        stop(tap, 'killed', guest, servers)
        clean(tap, work, 'killed: growing', images[0])
        clean(tap, work, 'killed: overlay', images[1], digest)
        tap.ok(digest_of_file(base) == base_digest, 'killed: the base is unchanged')


main(('grow', grow), ('shared', shared), ('killed', killed))
