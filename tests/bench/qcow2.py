#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What qcow2 costs: growing images against sparse raw files, allocated ones against raw.

    tests/bench/qcow2.py [--build DIR] [--dir DIR] [--rounds N] [--scale X] [--only PATTERN]
                         [--json FILE] [--report]

Each cell runs several lanes by turns (A B C, C B A, ...), each lane on images made new for it, with
the same client (vubench, one queue, one I/O thread, O_DIRECT, io_uring) and the same number of
requests, so that every lane does the same work.  Medians of the rounds' ratios count.  Then the request
path inside the process, on a memory store, with one and two I/O threads.

Images are 8 GiB and sparse; --dir is where they lie (default: the build folder), and needs about 4 GiB.
--scale multiplies the numbers of requests.  --report writes the results into docs/performance.md.
Exit status: 0, or 1 if something could not be measured.
"""

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import run  # noqa: E402 (beside this file)

RANDOM = ['--op', 'randwrite', '--bs', '4096', '--qd', '32']
FLUSH = ['--op', 'randwrite', '--bs', '4096', '--qd', '1', '--flush']
SEQUENTIAL = ['--op', 'write', '--bs', '1048576', '--qd', '8']
SPAN = 1 << 30

# name; vubench's arguments; requests; lanes, each (kind of server, image); goals, each (lane, to lane,
# figure, relation, ratio).
CELLS = [
    ('fresh, 4k random writes, depth 32', RANDOM, 60000,
     {'raw': ('oxbow', 'raw'), 'qcow2': ('oxbow', 'qcow2'), 'overlay': ('oxbow', 'overlay'),
      'qemu raw': ('qemu', 'raw'), 'qemu qcow2': ('qemu', 'qcow2')},
     [('qcow2', 'raw', 'iops', '>=', 0.90), ('overlay', 'raw', 'iops', '>=', 0.85),
      ('qcow2', 'qemu qcow2', 'iops', '>=', 2.5)]),
    ('fresh, 1m sequential writes, depth 8', SEQUENTIAL, 1024,
     {'raw': ('oxbow', 'raw'), 'qcow2': ('oxbow', 'qcow2'), 'qemu qcow2': ('qemu', 'qcow2')},
     [('qcow2', 'raw', 'iops', '>=', 0.95)]),
    ('fresh, 4k write and flush, depth 1', FLUSH, 3000,
     {'raw': ('oxbow', 'raw'), 'qcow2': ('oxbow', 'qcow2'), 'overlay': ('oxbow', 'overlay'),
      'qemu qcow2': ('qemu', 'qcow2')},
     [('qcow2', 'raw', 'iops', '>=', 0.90), ('overlay', 'raw', 'iops', '>=', 0.50)]),
    ('allocated, 4k random reads, depth 32', ['--op', 'randread', '--bs', '4096', '--qd', '32'],
     150000, {'raw': ('oxbow', 'raw filled'), 'qcow2': ('oxbow', 'qcow2 filled'),
              'qemu qcow2': ('qemu', 'qcow2 filled')},
     [('qcow2', 'raw', 'iops', '>=', 0.97), ('qcow2', 'raw', 'cpu', '<=', 1.1)]),
    ('allocated, 4k random writes, depth 32', RANDOM, 150000,
     {'raw': ('oxbow', 'raw filled'), 'qcow2': ('oxbow', 'qcow2 filled'),
      'qemu qcow2': ('qemu', 'qcow2 filled')},
     [('qcow2', 'raw', 'iops', '>=', 0.97), ('qcow2', 'raw', 'cpu', '<=', 1.1)]),
]

# name; inproc's arguments with one thread and with two; goals for IOPS and CPU.
SCALING = [
    ('random reads', ['--image', 'qcow2', '--fill', '--seconds', '2'], None, 1.8, 1.15),
    ('random allocating writes', ['--image', 'qcow2', '--write'], 60000, 1.5, 1.15),
]


def oxbow(options, *arguments):
    subprocess.run([os.path.join(options.build, 'oxbow')] + list(arguments), check=True,
                   stdout=subprocess.DEVNULL)


class Images:
    """Makes images; filled ones are kept."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.base = os.path.join(folder, 'base.raw')

    def path(self, kind):
        return os.path.join(self.folder, kind.replace(' ', '-') + '.img')

    def make(self, kind, sockets):
        path, form = self.path(kind), 'qcow2' if kind == 'overlay' else kind.split()[0]
        if kind.endswith('filled'):
            if not os.path.exists(path):
                oxbow(self.options, 'create', '-q', '-f', form, path, '8G')
                with run.BackEnd('oxbow', form, path, sockets, self.options.build) as back_end:
                    vubench(self.options, back_end, ['--op', 'write', '--bs', '1048576', '--qd',
                                                     '8', '--span', str(SPAN)], SPAN >> 20)
            return path, form
        if os.path.exists(path):
            os.unlink(path)
        if kind == 'overlay':
            if not os.path.exists(self.base):
                run.make_file(self.base, 1024)
                os.truncate(self.base, 8 << 30)
            oxbow(self.options, 'create', '-q', '-f', form, '-b', self.base, '-F', 'raw', path)
        else:
            oxbow(self.options, 'create', '-q', '-f', form, path, '8G')
        os.sync()
        return path, form

    def drop(self, kind):
        if not kind.endswith('filled'):
            os.unlink(self.path(kind))


def vubench(options, back_end, arguments, requests):
    argv = [os.path.join(options.build, 'tests/bench/vubench'), '--socket', back_end.socket,
            '--pid', str(back_end.process.pid), '--requests', str(requests), '--warmup', '0',
            '--json'] + arguments
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=600)
    if done.returncode:
        raise run.Failure('%s: %s' % (back_end.kind, done.stderr.strip()))
    return json.loads(done.stdout)


def run_cell(cell, options, images, sockets):
    name, arguments, requests, lanes, goals = cell
    runs = {lane: [] for lane in lanes}
    for number in range(options.rounds):
        order = list(lanes)
        for lane in order if number % 2 == 0 else reversed(order):
            kind, image = lanes[lane]
            path, form = images.make(image, sockets)
            # Nothing comes to be in those: the first write, which marks the header, is not the point.
            span = ['--span', str(SPAN), '--warmup', '0.3'] if image.endswith('filled') else []
            with run.BackEnd(kind, form, path, sockets, options.build) as back_end:
                runs[lane].append(vubench(options, back_end, arguments + span,
                                          max(1, int(requests * options.scale))))
            images.drop(image)
    results = {'lanes': {lane: run.summary(values) for lane, values in runs.items()}, 'goals': []}
    for lane, other, figure, relation, limit in goals:
        ratio = run.median_ratio([r[figure] for r in runs[lane]], [r[figure] for r in runs[other]])
        results['goals'].append({'lane': lane, 'to': other, 'figure': figure, 'limit': limit,
                                 'relation': relation, 'ratio': ratio,
                                 'met': ratio >= limit if relation == '>=' else ratio <= limit})
    return results


def run_scaling(options, lane):
    name, arguments, requests, more, cpu = lane
    runs = {1: [], 2: []}
    for _ in range(options.rounds):
        for threads in runs:
            argv = [os.path.join(options.build, 'tests/bench/inproc'), '--json', '--threads',
                    str(threads)] + arguments
            if requests:
                argv += ['--requests', str(max(1, int(requests * options.scale)))]
            done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
            runs[threads].append(json.loads(done.stdout))
    ratio = {key: run.median_ratio([r[key] for r in runs[2]], [r[key] for r in runs[1]])
             for key in ('iops', 'cpu')}
    return {'iops': {n: statistics.median(r['iops'] for r in runs[n]) for n in runs},
            'ratio': ratio, 'limits': {'iops': more, 'cpu': cpu}}


def lines_of(results):
    lines = ['| | lane | IOPS | median latency | CPU s / million |', '|---|---|---|---|---|']
    for name, cell in results['cells'].items():
        for lane, r in cell['lanes'].items():
            lines.append('| %s | %s | %s | %.0f µs | %.1f |' % (
                name, lane, format(round(r['iops']), ','), r['p50_us'], r['cpu']))
    lines += ['', '| ratio | of | goal | |', '|---|---|---|---|']
    for name, cell in results['cells'].items():
        for goal in cell['goals']:
            lines.append('| **%.2f** | %s: %s of %s to %s | %s %.2f | %s |' % (
                goal['ratio'], name, 'IOPS' if goal['figure'] == 'iops' else 'CPU per request',
                goal['lane'], goal['to'], '≥' if goal['relation'] == '>=' else '≤', goal['limit'],
                'met' if goal['met'] else 'missed'))
    for name, lane in results['scaling'].items():
        for figure, relation in (('iops', '≥'), ('cpu', '≤')):
            ratio, limit = lane['ratio'][figure], lane['limits'][figure]
            lines.append('| **%.2f** | memory store, %s: %s of two I/O threads to one | %s %.2f | '
                         '%s |' % (ratio, name, 'IOPS' if figure == 'iops' else 'CPU per request',
                                   relation, limit, 'met' if (ratio >= limit) == (figure == 'iops')
                                   else 'missed'))
    return lines


def report(results):
    page = os.path.join(run.SOURCE, 'docs/performance.md')
    head = ('%s, %d CPUs, Linux %s, %s; medians of %d rounds. `tests/bench/qcow2.py --rounds %d '
            '--report` made this.' % (results['date'], results['cpus'], results['kernel'],
                                      results['peer'], results['rounds'], results['rounds']))
    with open(page) as file:
        text = file.read()
    begin, rest = text.split('<!-- qcow2 -->', 1)
    end = rest.split('<!-- end of qcow2 -->', 1)[1]
    with open(page, 'w') as file:
        file.write(begin + '<!-- qcow2 -->\n' + '\n'.join([head, ''] + lines_of(results)) +
                   '\n<!-- end of qcow2 -->' + end)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--build', default=os.environ.get('OXBOW_BUILD',
                                                          os.path.join(run.SOURCE, 'build')))
    parser.add_argument('--dir', help='where the images are made (default: the build folder)')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--scale', type=float, default=1)
    parser.add_argument('--only', default='*', help="cells to run, e.g. 'fresh*'")
    parser.add_argument('--json', help='also write the results there')
    parser.add_argument('--report', action='store_true',
                        help='write the results into docs/performance.md')
    options = parser.parse_args()
    options.build = os.path.abspath(options.build)
    results = {'cells': {}, 'scaling': {}, 'rounds': options.rounds, 'cpus': os.cpu_count(),
               'kernel': os.uname().release.split('-')[0], 'date': time.strftime('%Y-%m-%d'),
               'peer': subprocess.run(['qemu-storage-daemon', '--version'], text=True, check=True,
                                      stdout=subprocess.PIPE).stdout.splitlines()[0].split(' (')[0]}
    failed = False
    with tempfile.TemporaryDirectory(dir=options.dir or options.build, prefix='bench-') as folder, \
            tempfile.TemporaryDirectory(prefix='oxbow-bench-') as sockets:
        images = Images(options, folder)
        for cell in CELLS:
            if fnmatch.fnmatch(cell[0], options.only):
                try:
                    results['cells'][cell[0]] = run_cell(cell, options, images, sockets)
                except (run.Failure, subprocess.SubprocessError) as failure:
                    print('%s: %s' % (cell[0], failure), file=sys.stderr)
                    failed = True
        for lane in SCALING:
            if fnmatch.fnmatch('scaling ' + lane[0], options.only):
                results['scaling'][lane[0]] = run_scaling(options, lane)
    print('\n'.join(lines_of(results)))
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(results, file, indent=1)
    if options.report and not failed:
        report(results)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
