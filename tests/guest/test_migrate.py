#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# check: timeout=900
"""A running guest moves between two QEMU processes and two Oxbow daemons on one image while it
writes, verifies and reads: the lock and every byte move with it."""

import libguest
from libguest import (Guest, OxbowServer, VhostDisk, Workspace, fio_verified, fio_verify,
                      lock_holders, main, wait_for)


# With a thread for each CPU, QEMU 7.2 loses guest memory in migration now and then, without any disk
# of ours: pages that change while they are sent.
libguest.TCG = 'tcg,thread=single'


def hop(tap, label, image, servers, source, target, way):
    """Moves the guest from servers[0] to servers[1], and looks at the lock on the way."""
    pids = [server.pid for server in servers]
    before = lock_holders(image, pids)
    tap.ok(before == {pids[0]}, f'{label}: {way}: the source holds the lock', before)
    target.launch()
    early = lock_holders(image, pids)
    tap.ok(early == {pids[0]}, f'{label}: {way}: a connected target holds none', early)
    for name, value in (('max-bandwidth', 1 << 30), ('downtime-limit', 1000)):
        source.monitor.send({'execute': 'migrate-set-parameters', 'arguments': {name: value}})
    status = source.migrate(target)
    tap.note(f"{label}: {way}: {status.get('total-time')} ms, of which "
             f"{status.get('downtime')} ms down")
    wait_for(lambda: lock_holders(image, pids) == {pids[1]}, 'the lock moving with the guest', 15)
    tap.ok(True, f'{label}: {way}: the lock moved with the guest')
    source.kill()


def move(tap, label, packed, queues, hops):
    with Workspace('migrate-' + label) as work:
        image = work.image('disk.raw', '512M')
        servers = [work.add(OxbowServer(work, image, label=name, queues=queues)).start()
                   for name in ('here', 'there')]
        guest = work.add(Guest(work, [VhostDisk(servers[0], queues, packed)], label='guest0'))
        guest.boot()
        # Reads that land in the page cache: pages that the disk wrote and did not log would stay
        # behind.
        guest.check('dd if=/dev/urandom of=/tmp/seed bs=1M count=4 2>/dev/null; for i in 0 1 2 3 '
                    '4 5 6 7; do cat /tmp/seed; done | dd of=/dev/vda bs=1M seek=448 conv=fsync '
                    '2>/dev/null; cat /tmp/seed | md5sum >/tmp/sum')
        reader = guest.start('''
            rounds=0
            while [ ! -e /tmp/stop ]; do
                echo 1 >/proc/sys/vm/drop_caches
                skip=$((448 + rounds % 8 * 4))
                dd if=/dev/vda bs=1M skip=$skip count=4 2>/dev/null | md5sum | cmp - /tmp/sum || {
                    echo "differs at $skip MiB in round $rounds"
                    exit 1
                }
                rounds=$((rounds + 1))
            done
            echo $rounds''')
        writer = guest.start(fio_verify('/dev/vda', bs='4k', size='64m', depth=16,
                                        rate_iops=',3000'))
        guest.wait_writes(1500, writer)
        for number in range(hops):
            target = work.add(Guest(work, [VhostDisk(servers[1], queues, packed)],
                                    label=f'guest{number + 1}', incoming=True))
            hop(tap, label, image, servers, guest, target,
                'there' if number == 0 else 'and back')
            guest = target
            servers.reverse()
            if number + 1 < hops:
                guest.wait_writes(500, writer)
        guest.wait_writes(10, writer)
        fio_verified(guest.check_job(writer), '64m')
        tap.ok(True, f'{label}: every write reads back at the new place')
        guest.check('touch /tmp/stop')
        rounds = int(guest.check_job(reader))
        tap.ok(rounds > 0, f'{label}: every read on the way was right ({rounds} rounds)')
        guest.verify('/dev/vda', size='8m', bssplit='512/50:64k/50')
        tap.ok(True, f'{label}: new writes and reads')
        errors = guest.io_errors()
        tap.ok(not errors, f'{label}: no error in the guest', errors)
        guest.power_off()
        wait_for(lambda: not lock_holders(image, [server.pid for server in servers]),
                 'the lock being given up when the guest is gone', 15)
        tap.ok(True, f'{label}: nobody holds the lock when the guest is gone')
        statuses = [server.stop() for server in servers]
        tap.ok(statuses == [0, 0], f'{label}: both servers end with status 0', statuses)


main(('split', lambda tap: move(tap, 'split', False, 1, 2)),
     ('packed', lambda tap: move(tap, 'packed', True, 2, 1)))
