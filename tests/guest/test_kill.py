#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# check: timeout=900
"""The server is killed with SIGKILL in the middle of I/O and started again, several times: the
guest goes on without an error, and reads back every write that had completed, flushed or not."""

import random
import time

from libguest import (Guest, OxbowServer, VhostDisk, Workspace, fio_verified, fio_verify, main)


def kill_under(tap, label, packed, queues, options):
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    tap.note(f'{label}: seed {seed}')
    with Workspace('kill-' + label) as work:
        image = work.image('disk.raw', '512M')
        server = work.add(OxbowServer(work, image, queues=queues, options=options)).start()
        guest = work.add(Guest(work, [VhostDisk(server, queues, packed)])).boot()
        small = guest.start(fio_verify('/dev/vda', bs='4k', size='96m', depth=24,
                                       rate_iops=',4000', name='small'))
        mixed = guest.start(fio_verify('/dev/vda', bssplit='512/20:8k/40:128k/20:1m/20',
                                       size='128m', depth=8, offset='256m', rate=',16m',
                                       name='mixed'))
        kills = 0
        while kills < 4 and not small.done():
            guest.wait_writes(dice.choice([1, 20, 1500]), small)
            time.sleep(dice.random() * 0.05)
            server.kill()
            kills += 1
            time.sleep(dice.random() * 0.3)
            server.start()
            if kills == 2:
                # In the middle of what a fresh process does with requests it inherited.
                time.sleep(dice.random() * 1.2)
                server.kill()
                server.start()
        tap.ok(kills == 4, f'{label}: killed 5 times while fio wrote', kills)
        fio_verified(guest.check_job(small), '96m')
        tap.ok(True, f'{label}: 4 KiB writes read back')
        fio_verified(guest.check_job(mixed), '128m')
        tap.ok(True, f'{label}: writes of 512 bytes to 1 MiB read back')

        # With a file system, whose journal flushes.
        guest.check('mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt')
        files = guest.start('''
            i=0
            while [ $i -lt 150 ]; do
                i=$((i + 1))
                dd if=/dev/urandom of=/mnt/f$i bs=$((i * 317)) count=1 2>/dev/null || exit 1
                sha256sum /mnt/f$i >>/tmp/sums || exit 1
                [ $((i % 10)) -ne 0 ] || sync
            done''')
        for _ in range(2):
            guest.wait_writes(20, files)
            server.kill()
            time.sleep(dice.random() * 0.2)
            server.start()
        guest.check_job(files)
        guest.check('umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount /dev/vda /mnt && '
                    'sha256sum -c /tmp/sums >/dev/null && umount /mnt')
        tap.ok(True, f'{label}: a file system survives two kills')

        # While nothing is going on.
        server.kill()
        server.start()
        guest.verify('/dev/vda', size='8m')
        tap.ok(True, f'{label}: killed while idle')
        errors = guest.io_errors()
        tap.ok(not errors, f'{label}: no error in the guest', errors)
        guest.power_off()
        tap.ok(server.stop() == 0, f'{label}: SIGTERM ends the server with status 0')


main(('split', lambda tap: kill_under(tap, 'split', False, 1, [])),
     ('packed', lambda tap: kill_under(tap, 'packed', True, 2,
                                       ['--iothreads', '2', '--cache', 'writeback'])))
