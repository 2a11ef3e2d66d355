#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# check: timeout=900
"""A Linux guest makes a file system, writes, verifies and shuts down: split and packed rings, one
queue and several, one I/O thread and two."""

import os
import subprocess

from libguest import (Guest, OxbowServer, VhostDisk, Workspace, main, make_server)


def work_on(tap, label, packed, queues, options, cpus):
    with Workspace('basic-' + label) as work:
        image = work.image('disk.raw', '512M')
        server = work.add(make_server(work, image, queues=queues, options=options))
        server.start()
        guest = work.add(Guest(work, [VhostDisk(server, queues, packed)], cpus=cpus))
        guest.boot()
        features = guest.check('cat /sys/block/vda/device/features').strip()
        tap.ok((features[34] == '1') == packed,
               f"{label}: the guest drives {'packed' if packed else 'split'} rings", features)
        count = guest.check('ls /sys/block/vda/mq | wc -l').strip()
        tap.ok(count == str(queues), f'{label}: {queues} queue(s)', count)
        size = guest.check('cat /sys/block/vda/size').strip()
        tap.ok(size == '1048576', f'{label}: the disk has its size', size)
        output = guest.check('''
            mkfs.ext4 -q -b 4096 /dev/vda && mount /dev/vda /mnt &&
            mkdir -p /mnt/tree/a/b && cd /mnt/tree &&
            for i in 1 2 3 4 5 6 7 8 9; do
                dd if=/dev/urandom of=a/file$i bs=100000 count=$i 2>/dev/null
            done &&
            cp /bin/busybox a/b/ && find . -type f | sort | xargs sha256sum >/tmp/sums &&
            cd / && umount /mnt && echo 3 >/proc/sys/vm/drop_caches &&
            mount /dev/vda /mnt && cd /mnt/tree && sha256sum -c /tmp/sums >/tmp/checked &&
            cd / && wc -l </tmp/checked''')
        tap.ok(output.strip().splitlines()[-1] == '10', f'{label}: files read back', output)
        guest.check('mkdir -p /mnt/fio')
        guest.verify('/mnt/fio/data', bs='4k', size='24m', depth=32)
        guest.verify('/mnt/fio/mixed', bssplit='512/30:4k/30:20k/20:256k/20', size='32m', depth=8,
                     fsync=64)
        tap.ok(True, f'{label}: fio verifies what it wrote')
        status, output = guest.run('rm -rf /mnt/fio && fstrim -v /mnt && umount /mnt')
        tap.ok(status == 0, f'{label}: trim and unmount', output)
        errors = guest.io_errors()
        tap.ok(not errors, f'{label}: no I/O error in the guest', errors)
        guest.power_off()
        tap.ok(server.process.poll() is None, f'{label}: the server outlives the guest')
        if isinstance(server, OxbowServer):
            tap.ok(server.stop() == 0, f'{label}: SIGTERM ends the server with status 0')
        check = subprocess.run(['/sbin/e2fsck', '-fn', image], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, check=False)
        tap.ok(check.returncode == 0, f'{label}: the file system is clean on the host',
               check.stdout)
        blocks = os.stat(image).st_blocks * 512
        tap.ok(blocks < 200 << 20, f'{label}: trimmed space went back to the host', blocks)


main(('split', lambda tap: work_on(tap, 'split', False, 1, [], 2)),
     ('packed', lambda tap: work_on(tap, 'packed', True, 4, ['--iothreads', '2'], 4)))
