#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares `oxbow serve` with qemu-storage-daemon, in one run, with one client.

    tests/bench/run.py [--build DIR] [--dir DIR] [--rounds N] [--seconds S] [--size MIB]
                       [--only PATTERN] [--json FILE] [--report]

Each cell runs on both back ends in turn (A B, B A, A B, ...), with the same client (vubench, one
queue, one I/O thread on either side).  Medians count: of each figure, and of the rounds' ratios; the
spread is (max - min) / median.
The raw file is made new, written to its end, and opened with O_DIRECT and io_uring by both.
`--dir` is where it lies (default: the build folder).  Writes of the raw cells go to the same file.

The table's last columns are the ratios to qemu-storage-daemon, against the goals; then fio's
io_uring engine on the file itself, by turns with the cell that does the same, and the scaling of the
request path inside the process.  --report writes the results into docs/performance.md and draws
docs/performance.svg.  Exit status: 0, or 1 if something could not be measured.
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

# The cell beside which fio runs on the file itself.
FIO_CELL = 'raw randread 4k qd32'


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
                         'raw' if store == 'null' else store, '--cache', 'none',
                         '--vhost-user-blk', self.socket, target]
            if store != 'null':
                self.argv[4:4] = ['--aio', 'io_uring']
        else:
            if store == 'null':
                node = 'driver=null-co,node-name=d,size=%d,read-zeroes=off' % (10 << 30)
            elif store == 'raw':
                node = ('driver=file,node-name=d,filename=%s,aio=io_uring,cache.direct=on' % image)
            else:
                node = ('driver=%s,node-name=d,discard=unmap,file.driver=file,file.filename=%s,'
                        'file.aio=io_uring,file.cache.direct=on,cache.direct=on' % (store, image))
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


def median_ratio(ours, theirs):
    return statistics.median(a / b for a, b in zip(ours, theirs)) if all(theirs) else float('nan')


def run_cell(cell, options, image, folder):
    name, store, arguments = cell
    runs = {'oxbow': [], 'qemu': []}
    alone = []
    for number in range(options.rounds):
        order = ['oxbow', 'qemu'] if number % 2 == 0 else ['qemu', 'oxbow']
        for kind in order:
            with BackEnd(kind, store, image, folder, options.build) as back_end:
                runs[kind].append(measure(options.build, back_end, arguments, options.seconds))
        if name == FIO_CELL and shutil.which('fio'):
            alone.append(fio(options, image))
    results = {kind: summary(values) for kind, values in runs.items()}
    results['ratio'] = {key: median_ratio([run[key] for run in runs['oxbow']],
                                          [run[key] for run in runs['qemu']])
                        for key in runs['oxbow'][0]}
    if alone:
        results['fio'] = {'iops': statistics.median(alone),
                          'ratio': median_ratio([run['iops'] for run in runs['oxbow']], alone)}
    return results


def fio(options, image):
    """4 KiB random reads at depth 32 by fio's io_uring engine on the file itself."""
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
    lanes = {threads: {key: statistics.median(run[key] for run in values)
                       for key in ('iops', 'cpu')} for threads, values in runs.items()}
    lanes['ratio'] = {key: median_ratio([run[key] for run in runs[2]],
                                        [run[key] for run in runs[1]]) for key in ('iops', 'cpu')}
    return lanes


def verdict(goal, ratio):
    what, relation, limit = goal
    good = ratio >= limit if relation == '>=' else ratio <= limit
    return '%s %.2f (%s %.2f)%s' % (what, ratio, relation, limit, '' if good else ' MISSED')


def print_cell(name, results, goals):
    for kind in ('oxbow', 'qemu'):
        r = results[kind]
        print('%-24s %-6s %9.0f IOPS +-%2.0f%%  p50 %8.1f us  p99 %8.1f us  CPU/M %7.3f s '
              '(user %6.3f, system %6.3f)' % (name, kind, r['iops'], 50 * r['spread'], r['p50_us'],
                                              r['p99_us'], r['cpu'], r['cpu_user'],
                                              r['cpu_system']))
    ratio = results['ratio']
    rest = ['IOPS %.2f' % ratio['iops'], 'CPU %.2f' % ratio['cpu'],
            'user %.2f' % ratio['cpu_user'], 'p50 %.2f' % ratio['p50_us']]
    print('%-24s ratio  %s' % (name, ', '.join(rest)))
    for goal in goals:
        print('%-24s goal   %s' % (name, verdict(goal, ratio[goal[0]])))
    if 'fio' in results:
        print('%-24s fio    %9.0f IOPS; oxbow/fio %s' % (
            name, results['fio']['iops'],
            verdict(('iops', '>=', 0.95), results['fio']['ratio'])))
    sys.stdout.flush()


def table(results):
    """The results as a Markdown table."""
    lines = ['| cell | Oxbow IOPS | QEMU IOPS | IOPS | CPU | of it user | median latency | p99 |',
             '|---|---|---|---|---|---|---|---|']
    for name, cell in results['cells'].items():
        ratio = cell['ratio']
        lines.append('| %s | %s | %s | **%.2f** | %.2f | %.2f | %.2f | %.2f |' % (
            name, format(round(cell['oxbow']['iops']), ','),
            format(round(cell['qemu']['iops']), ','), ratio['iops'], ratio['cpu'],
            ratio['cpu_user'], ratio['p50_us'], ratio['p99_us']))
    return lines


def bars(results):
    """A picture: IOPS and CPU time of Oxbow as ratios to qemu-storage-daemon, QEMU's being 1."""
    row, left, width, most = 34, 190, 470, 4.0
    names = list(results['cells'])
    height = 56 + row * len(names)
    at = lambda ratio: left + min(ratio, most) / most * width
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 %d" font-family="sans-serif" '
           'font-size="13">' % height,
           '<style>text{fill:#333}.i{fill:#2a7ab9}.c{fill:#c98a1b}.l{stroke:#888}'
           '@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>',
           '<rect x="%d" y="8" width="12" height="12" class="i"/>'
           '<text x="%d" y="19">IOPS (more is better)</text>' % (left, left + 18),
           '<rect x="%d" y="8" width="12" height="12" class="c"/>'
           '<text x="%d" y="19">CPU per request (less is better)</text>' % (left + 190, left + 208)]
    for number, name in enumerate(names):
        y, ratio = 34 + row * number, results['cells'][name]['ratio']
        out.append('<text x="%d" y="%d" text-anchor="end">%s</text>' % (left - 8, y + 17, name))
        for kind, value, top in (('i', ratio['iops'], y), ('c', ratio['cpu'], y + 13)):
            out.append('<rect x="%d" y="%d" width="%.1f" height="11" class="%s"/>'
                       '<text x="%.1f" y="%d" font-size="11">%.2f</text>' % (
                           left, top, at(value) - left, kind, at(value) + 4, top + 10, value))
    out.append('<line x1="%.1f" y1="30" x2="%.1f" y2="%d" class="l" stroke-dasharray="4 3"/>'
               '<text x="%.1f" y="%d" text-anchor="middle">qemu-storage-daemon = 1</text></svg>'
               % (at(1), at(1), height - 22, at(1), height - 7))
    return '\n'.join(out) + '\n'


def report(results):
    page = os.path.join(SOURCE, 'docs/performance.md')
    lines = ['%s, %d CPUs, Linux %s, %s; %d rounds of %g s. Ratios are Oxbow to QEMU, medians of '
             'the rounds\'; above 1 is more. `tests/bench/run.py --rounds %d --seconds %g --report` '
             'made this.' % (results['date'], results['cpus'], results['kernel'],
                             results['peer'], results['rounds'], results['seconds'],
                             results['rounds'], results['seconds']), '',
             '![ratios](performance.svg)', ''] + table(results) + ['']
    for name, cell in results['cells'].items():
        if 'fio' in cell:
            lines += ['fio on the file itself, %s: %s IOPS; Oxbow has **%.2f** of it.' % (
                name[4:], format(round(cell['fio']['iops']), ','), cell['fio']['ratio']), '']
    if 'scaling' in results:
        lanes = results['scaling']
        lines += ['Rings and drivers inside the I/O threads, null store: %s IOPS with one thread, '
                  '%s with two: **%.2f** times as many at %.2f times the CPU time a request.' % (
                      format(round(lanes[1]['iops']), ','), format(round(lanes[2]['iops']), ','),
                      lanes['ratio']['iops'], lanes['ratio']['cpu']), '']
    with open(page) as file:
        text = file.read()
    begin, rest = text.split('<!-- results -->', 1)
    end = rest.split('<!-- end of results -->', 1)[1]
    with open(page, 'w') as file:
        file.write(begin + '<!-- results -->\n' + '\n'.join(lines) + '<!-- end of results -->' +
                   end)
    with open(os.path.join(SOURCE, 'docs/performance.svg'), 'w') as file:
        file.write(bars(results))


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
    parser.add_argument('--report', action='store_true',
                        help='write the results into docs/performance.md and draw them')
    options = parser.parse_args()
    options.build = os.path.abspath(options.build)
    all_results = {'cells': {}, 'rounds': options.rounds, 'seconds': options.seconds,
                   'kernel': os.uname().release.split('-')[0], 'cpus': os.cpu_count(),
                   'date': time.strftime('%Y-%m-%d'),
                   'peer': subprocess.run(['qemu-storage-daemon', '--version'], text=True,
                                          stdout=subprocess.PIPE, check=True)
                           .stdout.splitlines()[0].split(' (')[0]}
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
    if options.only == '*' or fnmatch.fnmatch('scaling', options.only):
        lanes = scaling(options)
        all_results['scaling'] = lanes
        for threads in (1, 2):
            r = lanes[threads]
            print('inside, %d thread%s        %9.0f IOPS, CPU/M %.3f s' % (
                threads, 's' if threads > 1 else ' ', r['iops'], r['cpu']))
        print('scaling                  goal   %s, %s' % (
            verdict(('iops', '>=', 1.8), lanes['ratio']['iops']),
            verdict(('cpu', '<=', 1.15), lanes['ratio']['cpu'])))
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(all_results, file, indent=1)
    if options.report:
        report(all_results)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
