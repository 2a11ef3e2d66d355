#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares `oxbow serve` with qemu-storage-daemon, in one run, with one client.

    tests/bench/run.py [--build DIR] [--dir DIR] [--rounds N] [--seconds S] [--size MIB]
                       [--only PATTERN] [--json FILE]

Each cell runs on both back ends in turn (A B, B A, A B, ...), with the same client (vubench, one
queue, one I/O thread on either side), and its median counts; the spread is (max - min) / median.
The raw file is made new, written to its end, and opened with O_DIRECT and io_uring by both.
`--dir` is where it lies (default: the build folder).  Writes of the raw cells go to the same file.

The table's last columns are the ratios to qemu-storage-daemon, against the goals; then fio's
io_uring engine on the file itself, the scaling of the request path inside the process, and what an
idle disk costs.  Exit status: 0, or 1 if something could not be measured.
"""

import argparse
import fnmatch
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# name, store, vubench's arguments
CELLS = [
    ('null randread 4k qd1', 'null', ['--op', 'randread', '--bs', '4096', '--qd', '1']),
    ('null randread 4k qd32', 'null', ['--op', 'randread', '--bs', '4096', '--qd', '32']),
    ('null randwrite 4k qd32', 'null', ['--op', 'randwrite', '--bs', '4096', '--qd', '32']),
    ('null read 1m qd32', 'null', ['--op', 'read', '--bs', '1048576', '--qd', '32']),
    ('raw randread 4k qd1', 'raw', ['--op', 'randread', '--bs', '4096', '--qd', '1']),
    ('raw randread 4k qd32', 'raw', ['--op', 'randread', '--bs', '4096', '--qd', '32']),
    ('raw randwrite 4k qd1', 'raw', ['--op', 'randwrite', '--bs', '4096', '--qd', '1']),
    ('raw randwrite 4k qd32', 'raw', ['--op', 'randwrite', '--bs', '4096', '--qd', '32']),
    ('raw read 1m qd1', 'raw', ['--op', 'read', '--bs', '1048576', '--qd', '1']),
    ('raw read 1m qd32', 'raw', ['--op', 'read', '--bs', '1048576', '--qd', '32']),
    ('raw write 1m qd1', 'raw', ['--op', 'write', '--bs', '1048576', '--qd', '1']),
    ('raw write 1m qd32', 'raw', ['--op', 'write', '--bs', '1048576', '--qd', '32']),
]

# Which goals a cell has: (what, better than, ratio).
def goals_of(name, store):
    if name == 'null randread 4k qd32':
        return [('iops', '>=', 2.0)]
    if store == 'null':
        return []
    goals = [('iops', '>=', 1.0), ('cpu', '<=', 0.8), ('cpu_user', '<=', 0.5)]
    if name.endswith('qd1'):
        goals.append(('p50_us', '<=', 1.0))
    return goals


class Failure(Exception):
    pass


class BackEnd:
    """A server process on a socket, for as long as the `with` lasts."""

    def __init__(self, kind, store, image, folder, build, queues=1):
        self.kind = kind
        self.socket = os.path.join(folder, kind + '.sock')
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        if kind == 'oxbow':
            target = 'null:10G' if store == 'null' else image
            self.argv = [os.environ.get('OXBOW', os.path.join(build, 'oxbow')), 'serve', '-f',
                         'raw', '--cache', 'none', '--vhost-user-blk', self.socket, target]
            if store == 'raw':
                self.argv[4:4] = ['--aio', 'io_uring']
        else:
            if store == 'null':
                node = 'driver=null-co,node-name=d,size=%d,read-zeroes=off' % (10 << 30)
            else:
                node = ('driver=file,node-name=d,filename=%s,aio=io_uring,cache.direct=on' % image)
            self.argv = ['qemu-storage-daemon', '--object', 'iothread,id=io', '--blockdev', node,
                         '--export', 'type=vhost-user-blk,id=e,node-name=d,writable=on,iothread=io,'
                         'num-queues=%d,addr.type=unix,addr.path=%s' % (queues, self.socket)]

    def __enter__(self):
        self.log = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(self.argv, stdout=subprocess.DEVNULL, stderr=self.log)
        for _ in range(1000):
            with socket.socket(socket.AF_UNIX) as probe:
                if self.process.poll() is None and os.path.exists(self.socket):
                    try:
                        probe.connect(self.socket)
                        break
                    except OSError:
                        pass
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        else:
            self.process.kill()
        if self.process.poll() is not None:
            self.log.seek(0)
            raise Failure('%s does not start: %s' % (self.kind, self.log.read().strip()))
        # The connection above ends before the measurement begins.
        time.sleep(0.2)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def measure(build, back_end, arguments, seconds):
    argv = [os.path.join(build, 'tests/bench/vubench'), '--socket', back_end.socket, '--pid',
            str(back_end.process.pid), '--seconds', str(seconds), '--json'] + arguments
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=120 + 3 * seconds)
    if done.returncode:
        raise Failure('%s: %s' % (back_end.kind, done.stderr.strip()))
    return json.loads(done.stdout)


def make_file(path, mib):
    """A file that is written to its end: no holes, no unwritten extents."""
    block = os.urandom(1 << 20)
    with open(path, 'wb', buffering=0) as file:
        for _ in range(mib):
            file.write(block)
        os.fsync(file.fileno())


def summary(runs):
    keys = runs[0].keys()
    middle = {key: statistics.median(run[key] for run in runs) for key in keys}
    iops = [run['iops'] for run in runs]
    middle['spread'] = (max(iops) - min(iops)) / middle['iops']
    return middle


def run_cell(cell, options, image, folder):
    _, store, arguments = cell
    runs = {'oxbow': [], 'qemu': []}
    for number in range(options.rounds):
        order = ['oxbow', 'qemu'] if number % 2 == 0 else ['qemu', 'oxbow']
        for kind in order:
            with BackEnd(kind, store, image, folder, options.build) as back_end:
                runs[kind].append(measure(options.build, back_end, arguments, options.seconds))
    return {kind: summary(values) for kind, values in runs.items()}


def fio(options, image):
    """4 KiB random reads at depth 32 by fio's io_uring engine on the file itself."""
    if not shutil.which('fio'):
        return None
    done = subprocess.run(
        ['fio', '--name=x', '--filename=' + image, '--direct=1', '--ioengine=io_uring',
         '--rw=randread', '--bs=4k', '--iodepth=32', '--time_based',
         '--runtime=%d' % max(1, round(options.seconds)), '--output-format=json', '--readonly'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failure('fio: ' + done.stderr.strip())
    return json.loads(done.stdout[done.stdout.index('{'):])['jobs'][0]['read']['iops']


def scaling(options):
    runs = {1: [], 2: []}
    for _ in range(options.rounds):
        for threads in runs:
            done = subprocess.run([os.path.join(options.build, 'tests/bench/inproc'), '--threads',
                                   str(threads), '--seconds', str(options.seconds), '--json'],
                                  stdout=subprocess.PIPE, text=True, check=True, timeout=120)
            runs[threads].append(json.loads(done.stdout))
    return {threads: {key: statistics.median(run[key] for run in values)
                      for key in ('iops', 'cpu')} for threads, values in runs.items()}


def verdict(goal, ratio):
    what, relation, limit = goal
    good = ratio >= limit if relation == '>=' else ratio <= limit
    return '%s %.2f (%s %.2f)%s' % (what, ratio, relation, limit, '' if good else ' MISSED')


def ratio_of(results, key):
    theirs = results['qemu'][key]
    return results['oxbow'][key] / theirs if theirs else float('nan')


def print_cell(name, results, goals):
    for kind in ('oxbow', 'qemu'):
        r = results[kind]
        print('%-24s %-6s %9.0f IOPS +-%2.0f%%  p50 %8.1f us  p99 %8.1f us  CPU/M %7.3f s '
              '(user %6.3f, system %6.3f)' % (name, kind, r['iops'], 50 * r['spread'], r['p50_us'],
                                              r['p99_us'], r['cpu'], r['cpu_user'],
                                              r['cpu_system']))
    rest = ['IOPS %.2f' % ratio_of(results, 'iops'), 'CPU %.2f' % ratio_of(results, 'cpu'),
            'user %.2f' % ratio_of(results, 'cpu_user'), 'p50 %.2f' % ratio_of(results, 'p50_us')]
    print('%-24s ratio  %s' % (name, ', '.join(rest)))
    for goal in goals:
        print('%-24s goal   %s' % (name, verdict(goal, ratio_of(results, goal[0]))))
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--build', default=os.environ.get('OXBOW_BUILD',
                                                          os.path.join(SOURCE, 'build')))
    parser.add_argument('--dir', help='where the raw file is made (default: the build folder)')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=3)
    parser.add_argument('--size', type=int, default=2048, help='of the raw file, MiB')
    parser.add_argument('--only', default='*', help="cells to run, e.g. 'raw*qd32'")
    parser.add_argument('--json', help='also write the results there')
    options = parser.parse_args()
    options.build = os.path.abspath(options.build)
    all_results = {'cells': {}, 'rounds': options.rounds, 'seconds': options.seconds,
                   'kernel': os.uname().release, 'cpus': os.cpu_count()}
    failed = False

    with tempfile.TemporaryDirectory(dir=options.dir or options.build, prefix='bench-') as folder:
        image = os.path.join(folder, 'disk.raw')
        if any(fnmatch.fnmatch(cell[0], options.only) and cell[1] == 'raw' for cell in CELLS):
            make_file(image, options.size)
        # Sockets have short names only.
        with tempfile.TemporaryDirectory(prefix='oxbow-bench-') as sockets:
            for cell in CELLS:
                if not fnmatch.fnmatch(cell[0], options.only):
                    continue
                try:
                    results = run_cell(cell, options, image, sockets)
                except (Failure, subprocess.TimeoutExpired) as failure:
                    print('%-24s FAILED %s' % (cell[0], failure))
                    failed = True
                    continue
                all_results['cells'][cell[0]] = results
                print_cell(cell[0], results, goals_of(cell[0], cell[1]))
        reference = all_results['cells'].get('raw randread 4k qd32')
        if reference:
            try:
                alone = [fio(options, image) for _ in range(options.rounds)]
            except Failure as failure:
                alone = [None]
                failed = True
                print(failure)
            if alone[0]:
                all_results['fio_iops'] = statistics.median(alone)
                ratio = reference['oxbow']['iops'] / all_results['fio_iops']
                print('%-24s fio    %9.0f IOPS; oxbow/fio %s' % (
                    'raw randread 4k qd32', all_results['fio_iops'],
                    verdict(('iops', '>=', 0.95), ratio)))
    if options.only == '*' or fnmatch.fnmatch('scaling', options.only):
        lanes = scaling(options)
        all_results['scaling'] = lanes
        for threads, r in lanes.items():
            print('inside, %d thread%s        %9.0f IOPS, CPU/M %.3f s' % (
                threads, 's' if threads > 1 else ' ', r['iops'], r['cpu']))
        print('scaling                  goal   %s, %s' % (
            verdict(('iops', '>=', 1.8), lanes[2]['iops'] / lanes[1]['iops']),
            verdict(('cpu', '<=', 1.15), lanes[2]['cpu'] / lanes[1]['cpu'])))
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(all_results, file, indent=1)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
