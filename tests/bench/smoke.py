#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does every kind of benchmark cell work?  A fraction of a second of each; no time is judged.

TAP.  $OXBOW names the program, $OXBOW_BUILD the build folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import run  # noqa: E402 (beside this file)


def main():
    build = os.path.abspath(os.environ.get('OXBOW_BUILD', os.path.join(run.SOURCE, 'build')))
    have_qemu = shutil.which('qemu-storage-daemon')
    tests = []

    def cell(kind, store, arguments, folder, image):
        with run.BackEnd(kind, store, image, folder, build) as back_end:
            result = run.measure(build, back_end, arguments, 0.2)
        assert result['requests'] > 0 and result['iops'] > 0, result
        assert result['p99_us'] >= result['p50_us'] > 0, result

    def inside(threads):
        done = subprocess.run([os.path.join(build, 'tests/bench/inproc'), '--threads',
                               str(threads), '--seconds', '0.2', '--json'],
                              stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)['iops'] > 0

    with tempfile.TemporaryDirectory(dir=build, prefix='smoke-') as folder, \
            tempfile.TemporaryDirectory(prefix='oxbow-bench-') as sockets:
        image = os.path.join(folder, 'disk.raw')
        run.make_file(image, 64)
        for kind in ('oxbow', 'qemu'):
            for name, store, arguments in run.CELLS:
                tests.append(('%s, %s' % (kind, name),
                              (lambda k=kind, s=store, a=arguments: cell(k, s, a, sockets, image)),
                              kind == 'qemu' and not have_qemu))
        for extra in (['--packed'], ['--sleep'], ['--packed', '--sleep'], ['--no-indirect'],
                      ['--no-event-idx', '--sleep']):
            tests.append(('oxbow, null %s' % ' '.join(extra),
                          (lambda e=extra: cell('oxbow', 'null', e, sockets, image)), False))
        for threads in (1, 2):
            tests.append(('inside, %d threads' % threads, (lambda t=threads: inside(t)), False))
        failed = 0
        print('1..%d' % len(tests))
        for number, (name, function, skip) in enumerate(tests, 1):
            if skip:
                print('ok %d - %s # SKIP qemu-storage-daemon is not installed' % (number, name))
                continue
            try:
                function()
                print('ok %d - %s' % (number, name))
            except Exception as failure:  # every one is a failed test
                failed += 1
                print('not ok %d - %s' % (number, name))
                for line in str(failure).splitlines():
                    print('# ' + line)
            sys.stdout.flush()
    return 1 if failed else 0


sys.exit(main())
