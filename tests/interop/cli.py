#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program as a user meets it: subcommands, serve's life, resize, the control socket.

Prints TAP.  $OXBOW is the program (default: build/oxbow).
check: timeout=300
"""
import contextlib
import json
import mmap
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OXBOW = os.path.abspath(os.environ.get('OXBOW', os.path.join(ROOT, 'build', 'oxbow')))
MIB = 1 << 20
WAIT = 30  # seconds: a limit for what happens at once, not a measure

tests = []


class Skip(Exception):
    pass


def test(function):
    tests.append(function)
    return function


def run(*args, program=OXBOW, stdout=subprocess.PIPE, **more):
    return subprocess.run([program, *args], stdout=stdout, stderr=subprocess.PIPE, text=True,
                          timeout=WAIT, **more)


def equal(got, wanted, what=''):
    assert got == wanted, f'{what}: got {got!r}, wanted {wanted!r}'


def refused(*args, says, **more):
    """The arguments end in exit status 1 and one line on stderr that contains `says`."""
    done = run(*args, **more)
    equal(done.returncode, 1, f'status of {args} ({done.stderr.strip()})')
    lines = done.stderr.splitlines()
    assert len(lines) == 1, f'{args}: not one line: {done.stderr!r}'
    assert lines[0].startswith('oxbow: '), lines[0]
    assert says in lines[0], f'{args}: {lines[0]!r} does not say {says!r}'
    assert not done.stdout, f'{args}: printed {done.stdout!r}'


def raw_image(name, size=64 * MIB):
    with open(name, 'wb') as f:
        f.truncate(size)
    return os.path.abspath(name)


class Serve:
    """A running `oxbow serve`; entered when it has said `ready`."""

    def __init__(self, *args, ready=1, program=OXBOW, subcommand=('serve',), **more):
        self.process = subprocess.Popen([program, *subcommand, *args], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, **more)
        out = self.process.stdout.fileno()
        text = b''
        deadline = time.monotonic() + WAIT
        while text.count(b'\n') < ready:
            if not select.select([out], [], [], max(0, deadline - time.monotonic()))[0]:
                self.kill()
                raise AssertionError('serve does not get ready')
            data = os.read(out, 65536)
            if not data:
                status = self.process.wait(WAIT)
                raise AssertionError(f'serve ended with {status}: '
                                     f'{self.process.stderr.read().strip()}')
            text += data
        self.ready = text.decode().splitlines(keepends=True)

    def send(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def end(self):
        """Waits for the end: status, stderr."""
        out, err = self.process.communicate(timeout=WAIT)
        equal(out, '', 'more output')
        return self.process.returncode, err

    def stop(self, number=signal.SIGTERM):
        self.send(number)
        status, err = self.end()
        equal(status, 0, f'exit status after a signal ({err.strip()})')
        return err

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class Qmp:
    def __init__(self, path, negotiate=True):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)  # blocks while the backlog is full, with a timeout it would not
        self.socket.settimeout(WAIT)
        self.buffer = b''
        self.events = []
        self.greeting = self.receive()
        if negotiate:
            equal(self.command('qmp_capabilities'), {'return': {}}, 'negotiation')

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else data.encode())

    def receive(self):
        while b'\n' not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                return None
            self.buffer += data
        line, self.buffer = self.buffer.split(b'\n', 1)
        return json.loads(line)

    def answer(self):
        while True:
            message = self.receive()
            if message is None or 'event' not in message:
                return message
            self.events.append(message)

    def command(self, name, **arguments):
        self.send(json.dumps({'execute': name, **({'arguments': arguments} if arguments else {})}))
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


class Ring:
    """The least of a vhost-user front end: starts one ring, which activates the disk, and makes
    requests of 4096 bytes one after the other."""

    def __init__(self, path):
        self.socket = path if isinstance(path, socket.socket) else socket.socket(socket.AF_UNIX)
        if not isinstance(path, socket.socket):
            self.socket.connect(path)
        self.socket.settimeout(WAIT)
        self.memory = os.memfd_create('ring')
        os.ftruncate(self.memory, MIB)
        self.map = mmap.mmap(self.memory, MIB)
        self.kick, self.call = os.eventfd(0), os.eventfd(0)

    def message(self, request, payload=b'', fds=(), reply=False):
        header = struct.pack('<III', request, 1, len(payload))
        socket.send_fds(self.socket, [header + payload], list(fds))
        if not reply:
            return None
        head = self.socket.recv(12, socket.MSG_WAITALL)
        return self.socket.recv(struct.unpack('<III', head)[2], socket.MSG_WAITALL)

    def start(self):
        features = struct.unpack('<Q', self.message(1, reply=True))[0]
        assert features & (1 << 32), 'VERSION_1 is not offered'
        self.message(3)
        self.message(2, struct.pack('<Q', 1 << 32))
        self.message(5, struct.pack('<IIQQQQ', 1, 0, 0, MIB, 0x100000000, 0), [self.memory])
        self.message(8, struct.pack('<II', 0, 16))
        self.message(10, struct.pack('<II', 0, 0))
        self.message(9, struct.pack('<IIQQQQ', 0, 0, 0x100000000, 0x100002000, 0x100001000, 0))
        self.message(13, struct.pack('<Q', 0), [self.call])
        self.message(12, struct.pack('<Q', 0), [self.kick])

    def stop(self):
        self.message(11, struct.pack('<II', 0, 0), reply=True)

    def submit(self, write, sector=8, data=b'x' * 4096):
        """Makes a request available; requests in flight: one."""
        header, status, buffer = 0x10000, 0x10100, 0x11000  # guest addresses begin at 0
        self.map[header:header + 16] = struct.pack('<IIQ', int(write), 0, sector)
        self.map[status] = 0xff
        if write:
            self.map[buffer:buffer + 4096] = data
        chain = ((header, 16, 1, 1), (buffer, 4096, 1 if write else 3, 2), (status, 1, 2, 0))
        for index, (offset, length, flags, following) in enumerate(chain):
            self.map[16 * index:16 * index + 16] = struct.pack('<QIHH', offset, length,
                                                               flags, following)
        available, = struct.unpack('<H', self.map[0x1002:0x1004])
        at = 0x1004 + 2 * (available % 16)
        self.map[at:at + 2] = struct.pack('<H', 0)
        self.map[0x1002:0x1004] = struct.pack('<H', (available + 1) & 0xffff)
        os.eventfd_write(self.kick, 1)

    def done(self):
        """The status of the request (0: well), None: not complete."""
        if self.map[0x2002:0x2004] != self.map[0x1002:0x1004]:
            return None
        return self.map[0x10100]

    def request(self, write, **more):
        self.submit(write, **more)
        wait_until(lambda: self.done() is not None, 'the end of a request')
        return self.done()

    def close(self):
        self.socket.close()
        self.map.close()
        for fd in (self.memory, self.kick, self.call):
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def wait_until(condition, what):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f'{what} did not come true'
        time.sleep(0.02)


def disk(qmp, index=0):
    return qmp.command('query-block')['return'][index]


# --- the program ---------------------------------------------------------------------------

@test
def help_and_version():
    overview = run('help')
    equal(overview.returncode, 0)
    equal(run('--help').stdout, overview.stdout)
    equal(run('-h').stdout, overview.stdout)
    commands = re.findall(r'^  (\w+)  ', overview.stdout, re.M)
    for name in ('check', 'create', 'info', 'map', 'resize', 'serve', 'help'):
        assert name in commands, f'help does not list {name}'
    for name in commands:
        if name == 'help':
            continue
        one = run('help', name)
        equal(one.returncode, 0)
        assert one.stdout.startswith(f'Usage: oxbow {name} '), one.stdout[:60]
        equal(run(name, '--help').stdout, one.stdout)
        equal(run(name, '--no-such', '--help').stdout, one.stdout)
    assert re.fullmatch(r'oxbow \d+\.\d+\.\d+\n', run('--version').stdout)
    equal(run('serve', '--version').stdout, run('--version').stdout)


@test
def help_names_every_option():
    """An option that exists and is not in the help, or the other way round, is a mistake."""
    text = run('help', 'serve').stdout
    for option in re.findall(r'--([a-z-]+)', text):
        if option in ('help', 'version', 'print-capabilities'):
            continue
        # A wrong or missing value is complained about: the option itself is known.
        said = run('serve', f'--{option}').stderr
        assert 'has no option' not in said, said


@test
def unknown_subcommands():
    refused('serv', says="did you mean 'serve'?")
    refused('zzzzzzzz', says="'oxbow help' lists them")
    refused('help', 'resise', says="did you mean 'resize'?")
    refused('help', 'a', 'b', says='one subcommand')
    refused(says='a subcommand is missing')
    refused('--cache', 'none', says='must follow a subcommand')


@test
def full_disk_and_closed_pipe():
    with open('/dev/full', 'w') as full:
        for args in (('help',), ('--version',), ('serve', '--help'),
                     ('serve', '--print-capabilities')):
            done = run(*args, stdout=full)
            equal(done.returncode, 1, args)
            assert 'standard output: No space left' in done.stderr, done.stderr
        image = raw_image('full.raw')
        done = run('serve', '--vhost-user-blk', 'full.sock', image, stdout=full)
        equal(done.returncode, 1)
        assert done.stderr.count('standard output') == 1, done.stderr
    done = run('help', preexec_fn=lambda: os.close(1))
    equal(done.returncode, 1)
    assert 'standard output: Bad file descriptor' in done.stderr, done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = run('help', stdout=writer)
    os.close(writer)
    equal(done.returncode, 1)
    assert 'Broken pipe' in done.stderr, done.stderr


# --- serve ---------------------------------------------------------------------------------

@test
def ready_line():
    image = raw_image('web01.raw', 10 * MIB)
    for options, expected in (
            (['-f', 'raw'], r'10 MiB raw cache=none aio=\w+ iothreads=1 \(aio: [^)]+\)'),
            (['-f', 'raw', '--cache', 'writeback', '--aio', 'threads', '--iothreads', '2'],
             r'10 MiB raw cache=writeback aio=threads iothreads=2 \(aio: [^)]+\)'),
            (['--read-only', '--name', 'web', '--aio=sync', '--queues', '3'],
             r'10 MiB raw cache=none aio=sync iothreads=1 queues=3 read-only name=web \(.*\)'),
            ([], r'10 MiB raw cache=none .* \(aio: .*; format guessed: .* give -f raw .*\)')):
        with Serve(*options, '--vhost-user-blk', 'web01.sock', image) as serve:
            assert re.fullmatch('ready vhost-user-blk web01.sock ' + expected + '\n',
                                serve.ready[0]), serve.ready[0]
            client = socket.socket(socket.AF_UNIX)
            client.connect('web01.sock')
            client.close()
            serve.stop()
        assert not os.path.exists('web01.sock'), 'the socket file stays behind'


@test
def options_in_any_order():
    image = raw_image('order.raw')
    with Serve(image, '--cache=none', '--vhost-user-blk=order.sock', '-f', 'raw') as serve:
        serve.stop()
    with Serve('-U', '--read-only', '--vhost-user-blk', 'order.sock', '--', image) as serve:
        serve.stop()


@test
def signals():
    image = raw_image('signals.raw')
    for number in (signal.SIGTERM, signal.SIGINT):
        with Serve('--vhost-user-blk', 'signals.sock', image) as serve:
            serve.send(signal.SIGHUP)
            assert 'stopping' in serve.stop(number)
    # Also with a client that stays connected and a ring that runs.
    with Serve('--vhost-user-blk', 'signals.sock', image) as serve, Ring('signals.sock') as ring:
        ring.start()
        serve.stop()
    # Before anything else happened.
    with Serve('--vhost-user-blk', 'signals.sock', image) as serve:
        serve.stop()


@test
def second_signal_ends_at_once():
    """A read that the host never completes keeps the first signal waiting, not the second."""
    raw_image('second.raw')
    with open('rules', 'w') as f:
        f.write('read nth=1 range=4096+4096 never\n')
    with Serve('--vhost-user-blk', 'second.sock', '--name', 'x',
               f'faulty:{os.path.abspath("rules")}:second.raw') as serve, \
            Ring('second.sock') as ring:
        ring.start()
        ring.submit(write=False)
        run_dir = os.environ['OXBOW_RUN_DIR']
        with Qmp(os.path.join(run_dir, f'{serve.process.pid}.qmp')) as qmp:
            wait_until(lambda: disk(qmp)['oxbow']['stats']['in-flight'] == 1, 'a request')
            serve.send()
            while qmp.receive() is not None:
                pass
        time.sleep(0.2)
        equal(serve.process.poll(), None, 'the first signal waits')
        serve.send()
        status, err = serve.end()
        equal(status, 1)
        assert 'second signal' in err, err


@test
def signal_while_requests_are_held():
    """The error policy holds a write for ever: the end does not wait for it."""
    raw_image('held.raw')
    with open('rules', 'w') as f:
        f.write('write always error=EIO\n')
    with Serve('--vhost-user-blk', 'h.sock', '--control', 'h.qmp', '--werror', 'stop',
               f'faulty:{os.path.abspath("rules")}:held.raw') as serve, \
            Qmp('h.qmp') as qmp, Ring('h.sock') as ring:
        ring.start()
        ring.submit(write=True)
        wait_until(lambda: disk(qmp)['io-status'] == 'failed', 'a held request')
        serve.stop()


@test
def bad_options():
    image = raw_image('bad.raw')
    path = ['--vhost-user-blk', 'bad.sock']
    refused('serve', *path, '--cahce', 'none', image, says="did you mean '--cache'?")
    refused('serve', *path, '--cache', 'nnoe', image, says="--cache: there is no cache mode 'nnoe'")
    refused('serve', *path, '--cache', says="option '--cache' needs a value")
    refused('serve', *path, '--read-only=yes', image, says="'--read-only' takes no value")
    refused('serve', *path, '-x', image, says="no option '-x'")
    refused('serve', *path, '-f', says="option '-f' needs a value")
    refused('serve', *path, '--detect-zero=n', image, says='--detect-zeroes: there is no way')
    refused('serve', *path, '--d', says="'--d' is not clear")
    refused('serve', *path, '--iothreads', '0', image, says='--iothreads')
    refused('serve', *path, '--iothreads', '1x', image, says='--iothreads')
    refused('serve', *path, '--queues', '65', image, says='--queues')
    refused('serve', *path, '--poll-max-us', '-1', image, says='--poll-max-us')
    refused('serve', *path, '--serial', 'x' * 21, image, says='1 to 20 characters')
    refused('serve', *path, '--logical-block-size', '600', image, says='power of two')
    refused('serve', *path, '--logical-block-size', '4k', '--physical-block-size', '512', image,
            says='smaller')
    refused('serve', *path, '--aio', 'uring', image, says='--aio')
    refused('serve', *path, '--rerror', 'panic', image, says='--rerror')
    refused('serve', *path, '--fd', '77', image, says='not given a file descriptor 77')
    refused('serve', *path, '--fd', '0', image, says='not a socket', stdin=subprocess.DEVNULL)
    refused('serve', *path, '-U', image, says='--force-share')
    refused('serve', *path, '--share-rw', '--read-only', image, says='exclude each other')
    refused('serve', *path, says='the image is missing')
    refused('serve', image, says='--vhost-user-blk')
    refused('serve', *path, image, image, says='second image')
    refused('serve', *path, *path, image, says='given twice')
    refused('serve', *path, '--socket-path', 'x', image, says='give one')
    refused('serve', *path, 'nowhere.raw', says='nowhere.raw')
    refused('serve', *path, '-f', 'qcow2', image, says='qcow2')
    refused('serve', '--vhost-user-blk', 'nowhere/x.sock', image, says='nowhere/x.sock')
    refused('serve', '--vhost-user-blk', 'x' * 200, image, says='xxx')
    refused('serve', *path, '--control', 'nowhere/x.qmp', image, says='nowhere/x.qmp')
    refused('serve', *path, '--control', 'bad.sock', image, says='control socket too')
    assert not os.path.exists('bad.sock'), 'a start that failed leaves its socket behind'


@test
def stale_and_busy_sockets():
    image = raw_image('stale.raw')
    args = ('--read-only', '--vhost-user-blk', 'stale.sock', '--control', 'stale.qmp', image)
    with Serve(*args) as serve:
        serve.kill()
    assert os.path.exists('stale.sock') and os.path.exists('stale.qmp')
    with Serve(*args) as serve:
        refused('serve', '--read-only', '--vhost-user-blk', 'stale.sock', image, says='stale.sock')
        refused('serve', '--read-only', '--vhost-user-blk', 'other.sock', '--control', 'stale.qmp',
                image, says='stale.qmp')
        equal(disk(Qmp('stale.qmp'))['device'], 'stale.raw')
        serve.stop()
    assert not os.path.exists('stale.qmp'), 'the control socket stays behind'
    with open('file.sock', 'w') as f:
        f.write('precious')
    refused('serve', '--vhost-user-blk', 'file.sock', image, says='file.sock')
    refused('serve', '--vhost-user-blk', 'other.sock', '--control', 'file.sock', image,
            says='not a socket')
    equal(open('file.sock').read(), 'precious')


@test
def back_end_program():
    image = raw_image('backend.raw')
    os.symlink(OXBOW, 'oxbow-vhost-user-blk')
    program = os.path.abspath('oxbow-vhost-user-blk')
    for done in (run('serve', '--print-capabilities', '--nonsense', 'x'),
                 run('--print-capabilities', program=program)):
        equal(done.returncode, 0)
        equal(json.loads(done.stdout), {'type': 'block', 'features': ['read-only', 'blk-file']})
    with Serve('--socket-path=backend.sock', f'--blk-file={image}', '--read-only',
               program=program, subcommand=()) as serve:
        assert 'read-only' in serve.ready[0]
        serve.stop()
    equal(run('--version', program=program).stdout, run('--version').stdout)
    refused('--socket-path=x', program=program, says='the image is missing')
    with open(os.path.join(ROOT, 'data', '50-oxbow-vhost-user-blk.json.in')) as f:
        about = json.load(f)
    equal(about['type'], 'block')
    equal(os.path.basename(about['binary']), 'oxbow-vhost-user-blk')


@test
def connected_descriptor():
    """--fd: a connected socket; the program ends when its client goes."""
    image = raw_image('fd.raw')
    ours, theirs = socket.socketpair()
    with Serve('--fd', str(theirs.fileno()), '--blk-file', image,
               pass_fds=[theirs.fileno()]) as serve:
        theirs.close()
        assert serve.ready[0].startswith('ready vhost-user-blk fd:'), serve.ready[0]
        with Ring(ours) as ring:
            ring.start()
            assert ring.message(1, reply=True), 'no answer'
        equal(serve.end()[0], 0, 'status after the client went')


@test
def listening_descriptor():
    image = raw_image('listen.raw')
    listener = socket.socket(socket.AF_UNIX)
    listener.bind('listen.sock')
    listener.listen()
    with Serve('--fd', str(listener.fileno()), image, pass_fds=[listener.fileno()]) as serve:
        listener.close()
        for _ in range(2):
            with Ring('listen.sock') as ring:
                ring.start()
                assert ring.message(1, reply=True), 'no answer'
        serve.stop()


@test
def service_manager():
    image = raw_image('notify.raw')
    for name, address in ((os.path.abspath('notify.sock'),) * 2,
                          (f'@oxbow-test-{os.getpid()}', f'\0oxbow-test-{os.getpid()}')):
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        manager.settimeout(WAIT)
        manager.bind(address)
        with manager, Serve('--vhost-user-blk', 'n.sock', image,
                            env={**os.environ, 'NOTIFY_SOCKET': name}) as serve:
            equal(manager.recv(100), b'READY=1')
            serve.stop()
            equal(manager.recv(100), b'STOPPING=1')


# --- several disks -------------------------------------------------------------------------

@test
def several_disks():
    for name in ('a', 'b', 'c'):
        raw_image(f'{name}.raw')
    with open('disks.ini', 'w') as f:
        f.write('[global]\ncontrol = disks.qmp\niothreads = 2\n')
        for name in ('a', 'b', 'c'):
            f.write(f'[{name}]\nimage = {name}.raw\nformat = raw\n'
                    f'vhost-user-blk = {name}.sock\n')
    with Serve('--config', 'disks.ini', '--iothreads', '3', ready=3) as serve:
        for name, line in zip('abc', serve.ready):
            assert line.startswith(f'ready vhost-user-blk {name}.sock 64 MiB raw '), line
            assert f' iothreads=3 name={name} ' in line, line
        with Qmp('disks.qmp') as qmp:
            equal([b['device'] for b in qmp.command('query-block')['return']], ['a', 'b', 'c'])
            with Ring('b.sock') as ring:
                ring.start()
                wait_until(lambda: disk(qmp, 1)['oxbow']['active'], 'an active disk')
                equal([b['oxbow']['active'] for b in qmp.command('query-block')['return']],
                      [False, True, False])
                # Each asks worker threads for the files' sizes: no wake-up may be lost.
                for _ in range(200):
                    equal(len(qmp.command('query-block')['return']), 3)
                serve.stop()


@test
def bad_configurations():
    raw_image('c1.raw')
    raw_image('c2.raw')
    os.link('c1.raw', 'c1-too.raw')

    def config(text):
        with open('bad.ini', 'w') as f:
            f.write(text)

    good = '[one]\nimage = c1.raw\nvhost-user-blk = c1.sock\n'
    config(good + 'cahce = none\n')
    refused('serve', '--config', 'bad.ini',
            says="bad.ini:4: [one] cahce: there is no such key; did you mean 'cache'?")
    config(good + '[two]\nimage = nowhere.raw\nvhost-user-blk = c2.sock\n')
    refused('serve', '--config', 'bad.ini', says='bad.ini:4: [two] nowhere.raw')
    config(good + '[two]\nimage = c1-too.raw\nvhost-user-blk = c2.sock\n')
    refused('serve', '--config', 'bad.ini', says="bad.ini:4: [two] image: c1-too.raw is the image")
    config(good + '[two]\nimage = c2.raw\nvhost-user-blk = ./c1.sock\n')
    refused('serve', '--config', 'bad.ini', says="is the socket of disk 'one' too")
    config(good + '[two]\nimage = c2.raw\nvhost-user-blk = nowhere/c.sock\n')
    refused('serve', '--config', 'bad.ini', says='bad.ini:4: [two] ')
    assert not os.path.exists('c1.sock'), 'a start that failed leaves a socket behind'
    config(good)
    refused('serve', '--config', 'bad.ini', '--cache', 'none', says='--cache describes a disk')
    refused('serve', '--config', 'bad.ini', 'c1.raw', says='on the command line')
    refused('serve', '--config', 'nowhere.ini', says='nowhere.ini')
    shared = 'read-only = yes\n'
    config(good + shared + '[two]\nimage = c1-too.raw\nvhost-user-blk = c2.sock\n' + shared)
    with Serve('--config', 'bad.ini', ready=2) as serve:
        serve.stop()


# --- the control socket --------------------------------------------------------------------

@test
def qmp_handshake():
    image = raw_image('qmp.raw')
    with Serve('--vhost-user-blk', 'q.sock', '--control', 'q.qmp', image) as serve:
        equal(os.stat('q.qmp').st_mode & 0o777, 0o600)
        with Qmp('q.qmp', negotiate=False) as qmp:
            version = qmp.greeting['QMP']['version']
            assert set(version['qemu']) == {'major', 'minor', 'micro'}, version
            assert version['package'].startswith('oxbow '), version
            equal(qmp.greeting['QMP']['capabilities'], [])
            equal(qmp.command('query-block')['error']['class'], 'CommandNotFound')
            qmp.send('{"execute":"qmp_capabilities","id":{"a":[1]}}')
            equal(qmp.answer(), {'return': {}, 'id': {'a': [1]}})
            equal(qmp.command('qmp_capabilities')['error']['class'], 'CommandNotFound')
            equal(qmp.command('no-such')['error']['class'], 'CommandNotFound')
            names = [c['name'] for c in qmp.command('query-commands')['return']]
            for name in ('query-block', 'block_resize', 'cont', 'quit', 'query-status',
                         'query-version', 'query-name'):
                assert name in names, f'{name} is not among {names}'
            equal(qmp.command('query-status')['return']['status'], 'running')
            equal(qmp.command('query-version')['return'], version)
            equal(qmp.command('query-name'), {'return': {'name': 'qmp.raw'}})
            equal(qmp.command('cont'), {'return': {}})
        serve.stop()


@test
def qmp_query_block():
    image = raw_image('block.raw', 3 * MIB)
    with Serve('--vhost-user-blk', 'q.sock', '--control', 'q.qmp', '--serial', 'S123', '--name',
               'web', '--cache', 'writethrough', '-f', 'raw', image) as serve, Qmp('q.qmp') as qmp:
        info = disk(qmp)
        equal(info['device'], 'web')
        equal(info['io-status'], 'ok')
        inserted = info['inserted']
        equal((inserted['file'], inserted['drv'], inserted['ro'], inserted['node-name']),
              (image, 'raw', False, 'web'))
        equal(inserted['cache'], {'writeback': False, 'direct': False, 'no-flush': False})
        equal((inserted['image']['virtual-size'], inserted['image']['format']), (3 * MIB, 'raw'))
        own, st = info['oxbow'], os.stat(image)
        equal((own['active'], own['serial'], own['cache'], own['dev'], own['ino']),
              (False, 'S123', 'writethrough', st.st_dev, st.st_ino))
        equal((own['export']['connected'], own['export']['queues-running']), (False, 0))
        assert own['aio'] and own['aio-reason'], own
        for operation in ('read', 'write', 'flush', 'write-zeroes', 'discard'):
            equal(own['stats'][operation]['operations'], 0, operation)
        with Ring('q.sock') as ring:
            ring.start()
            wait_until(lambda: disk(qmp)['oxbow']['active'], 'an active disk')
            equal(disk(qmp)['oxbow']['export']['queues-running'], 1)
            equal(disk(qmp)['oxbow']['export']['connected'], True)
            ring.stop()
            wait_until(lambda: not disk(qmp)['oxbow']['active'], 'an inactive disk')
        serve.stop()


@test
def qmp_mistakes():
    """Whatever a client sends, it is told, and the connection goes on."""
    image = raw_image('mistakes.raw')
    with Serve('--vhost-user-blk', 'q.sock', '--control', 'q.qmp', image) as serve, \
            Qmp('q.qmp') as qmp:
        for sent, said in (
                ('nonsense\n', 'JSON parse error'),
                ('{"execute": }', 'JSON parse error'),
                ('{"execute": "query-st\n', 'JSON parse error'),
                (b'{"execute": "\xc3\x28"}', 'JSON parse error'),
                ('{"a": 1, "a": 2}', 'JSON parse error'),
                ('[1, 2]', 'must be a JSON object'),
                ('{}', "lacks member 'execute'"),
                ('{"execute": 1}', 'must be a string'),
                ('{"execute": "cont", "arguments": []}', 'must be an object'),
                ('{"execute": "cont", "extra": 1}', "'extra' is unexpected"),
                ('{"execute": "cont", "arguments": {"x": 1}}', "'x' is unexpected"),
                ('{"execute": "block_resize", "arguments": {"device": "mistakes.raw"}}',
                 "'size' is missing"),
                ('{"execute": "block_resize", "arguments": {"size": 4096}}', "'device'"),
                ('{"execute": "block_resize", "arguments": {"device": "x", "node-name": "x", '
                 '"size": 4096}}', "'device'"),
                ('{"execute": "block_resize", "arguments": {"device": 1, "size": 4096}}',
                 "expected: string"),
                ('{"execute": "block_resize", "arguments": {"device": "no", "size": 4096}}',
                 "'no' not found"),
                ('{"execute": "block_resize", "arguments": {"device": "mistakes.raw", '
                 '"size": -1}}', "'size'"),
                ('{"execute": "block_resize", "arguments": {"device": "mistakes.raw", '
                 '"size": 1048576}}', ''),
                ('[' * 200 + ']' * 200, 'too deeply'),
                ('{"a": "' + 'x' * (2 * MIB) + '"}', 'too long')):
            qmp.send(sent)
            answer = qmp.answer()
            assert said in answer['error']['desc'], f'{sent[:70]!r}: {answer}'
            equal(qmp.command('query-status')['return']['running'], True, sent[:70])
        equal(os.stat(image).st_size, 64 * MIB)
        # A message that was broken off is forgotten at a byte that JSON does not have.
        qmp.send(b'{"execute": [\xff')
        assert 'error' in qmp.answer()
        # Byte by byte, without line ends, and several at once.
        for byte in b'{"execute":"cont","id":"slow"}':
            qmp.send(bytes([byte]))
        equal(qmp.answer(), {'return': {}, 'id': 'slow'})
        qmp.send('{"execute":"cont","id":1}{"execute":"x","id":2}{"execute":"query-block","id":3}')
        equal([qmp.answer()['id'] for _ in range(3)], [1, 2, 3])
        serve.stop()


@test
def qmp_clients():
    """Many clients, ones that go away, and ones that do not read."""
    image = raw_image('clients.raw')
    with Serve('--vhost-user-blk', 'q.sock', '--control', 'q.qmp', image) as serve:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Qmp('q.qmp')) for _ in range(40)]
            for client in clients:
                client.send('{"execute":"query-block","id":7}')
            for client in clients:
                equal(client.answer()['id'], 7)
        for _ in range(100):
            client = socket.socket(socket.AF_UNIX)
            client.connect('q.qmp')
            client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-block"}')
            client.close()
        deaf = socket.socket(socket.AF_UNIX)
        deaf.connect('q.qmp')
        deaf.setblocking(False)
        deaf.sendall(b'{"execute":"qmp_capabilities"}')
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(20000):
                deaf.send(b'{"execute":"query-block"}')
        with Qmp('q.qmp') as qmp:
            equal(qmp.command('query-status')['return']['running'], True)
        # Half-closed: the answers still come.
        half = Qmp('q.qmp')
        half.send('{"execute":"query-block"}{"execute":"cont"}')
        half.socket.shutdown(socket.SHUT_WR)
        assert 'return' in half.answer() and 'return' in half.answer()
        equal(half.receive(), None)
        with open(f'/proc/{serve.process.pid}/status') as f:
            resident = int(re.search(r'VmRSS:\s+(\d+) kB', f.read()).group(1))
        assert resident < 200 * 1024, f'{resident} kB resident'
        serve.stop()
        deaf.close()
        half.socket.close()


@test
def qmp_errors():
    """What the error policy does is seen: held requests, events, cont."""
    raw_image('errors.raw')
    rules = os.path.abspath('rules')

    def set_rules(text):
        with open('rules.new', 'w') as f:
            f.write(text)
        os.rename('rules.new', 'rules')

    set_rules('write always error=ENOSPC\nread nth=1 range=4096+4096 error=EIO\n')
    with Serve('--vhost-user-blk', 'q.sock', '--control', 'q.qmp', '--name', 'e', '-f', 'raw',
               f'faulty:{rules}:errors.raw') as serve, \
            Qmp('q.qmp') as qmp, Ring('q.sock') as ring:
        ring.start()
        equal(ring.request(write=False), 1, 'a read that fails')
        equal(disk(qmp)['oxbow']['stats']['read']['failed'], 1)
        ring.submit(write=True)
        wait_until(lambda: disk(qmp)['oxbow']['stopped'], 'a held request')
        info = disk(qmp)
        equal((info['io-status'], info['oxbow']['stats']['held']), ('nospace', 1))
        equal(qmp.command('query-status')['return'],
              {'running': False, 'singlestep': False, 'status': 'io-error'})
        equal([(e['event'], e['data'].get('operation'), e['data']['action'], e['data']['nospace'])
               for e in qmp.events],
              [('BLOCK_IO_ERROR', 'read', 'report', False),
               ('BLOCK_IO_ERROR', 'write', 'stop', True)])
        equal(ring.done(), None, 'the guest has not heard')
        set_rules('')
        equal(qmp.command('cont'), {'return': {}})
        wait_until(lambda: ring.done() is not None, 'the end of the held request')
        equal(ring.done(), 0)
        wait_until(lambda: disk(qmp)['io-status'] == 'ok', 'ok')
        wait_until(lambda: disk(qmp) and qmp.events[-1]['event'] == 'RESUME', 'RESUME')
        equal(qmp.events[-1]['data'], {'device': 'e'})
        stats = disk(qmp)['oxbow']['stats']
        equal((stats['write']['operations'], stats['write']['bytes'], stats['held']), (1, 4096, 0))
        assert stats['write']['latency-ns']['max'] > 0
        serve.stop()
    equal(open('errors.raw', 'rb').read()[4096:8192], b'x' * 4096)


@test
def qmp_quit():
    image = raw_image('quit.raw')
    with Serve('--vhost-user-blk', 'q.sock', '--control', 'q.qmp', image) as serve:
        with Qmp('q.qmp') as qmp, Qmp('q.qmp') as other:
            equal(qmp.command('quit'), {'return': {}})
            for client in (qmp, other):
                event = client.receive()
                equal((event['event'], event['data']['reason']), ('SHUTDOWN', 'host-qmp-quit'))
                assert set(event['timestamp']) == {'seconds', 'microseconds'}
                equal(client.receive(), None, 'the connection ends')
        equal(serve.end()[0], 0)


@test
def run_directory():
    """A server is found at RUN_DIR/PID.qmp; what dead ones left is removed."""
    image = raw_image('run.raw')
    run_dir = os.environ['OXBOW_RUN_DIR']
    with Serve('--read-only', '--vhost-user-blk', 'q.sock', image) as serve:
        path = os.path.join(run_dir, f'{serve.process.pid}.qmp')
        equal(disk(Qmp(path))['device'], 'run.raw')
        serve.kill()
    assert os.path.exists(path)
    with Serve('--read-only', '--vhost-user-blk', 'q.sock', image) as serve:
        assert not os.path.exists(path), 'a dead server is still listed'
        path = os.path.join(run_dir, f'{serve.process.pid}.qmp')
        assert os.path.exists(path)
        serve.stop()
    assert not os.path.exists(path), 'a server that ended is still listed'


# --- images with a map, and their chains -----------------------------------------------------

def make(*args):
    done = run('create', '-q', *args)
    equal((done.returncode, done.stderr), (0, ''), args)


def read_back(name, fmt, *commands):
    """qemu-io reads what was written, and the image is sound."""
    if not shutil.which('qemu-io'):
        return
    done = run('-f', fmt, *[x for c in commands for x in ('-c', c)], name, program='qemu-io')
    assert done.returncode == 0 and 'failed' not in done.stdout, done.stdout + done.stderr
    equal(run('check', '-f', fmt, name, program='qemu-img').returncode, 0, f'check of {name}')


@test
def serve_formats():
    """A guest's write to each format arrives, and the image is left clean."""
    raw_image('base.raw', 8 * MIB)
    for fmt, options in (('qcow2', ['8M']), ('qcow2', ['-b', 'base.raw', '-F', 'raw']),
                         ('qcow2', ['-o', 'compat=0.10', '8M']), ('qed', ['8M']),
                         ('qed', ['-b', 'base.raw', '-F', 'raw'])):
        name = 'disk.' + fmt
        make('-f', fmt, *options[:-1], *([name, options[-1]] if options[-1] == '8M'
                                         else [options[-1], name]))
        for write in (True, False):
            with Serve('-f', fmt, '--vhost-user-blk', 'f.sock', name) as serve:
                assert f' 8 MiB {fmt} ' in serve.ready[0], serve.ready[0]
                with Ring('f.sock') as ring:
                    ring.start()
                    equal(ring.request(write), 0, f'{fmt} {options}')
                    if not write:
                        equal(ring.map[0x11000:0x12000], b'x' * 4096, 'content')
                    serve.stop()
        read_back(name, fmt, 'read -P 120 4k 4k', 'read -P 0 8k 1M', 'read -P 0 0 4k')
        equal(json.loads(run('info', '--output=json', name).stdout)['dirty-flag'], False, name)


@test
def serve_encrypted():
    with open('key', 'w') as f:
        f.write('a pass phrase')
    key = ['--object', 'secret,id=k,file=key']
    make(*key, '-f', 'luks', '-o', 'key-secret=k,iter-time=10', 'disk.luks', '4M')
    make(*key, '-f', 'qcow2', '-o',
         'encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10', 'disk.qcow2', '4M')
    for fmt in ('luks', 'qcow2'):
        name = 'disk.' + fmt
        args = ['-f', fmt, '--vhost-user-blk', 'e.sock', name]
        refused('serve', *args, says='key-secret')
        refused('serve', *key, *args, says='key-secret')
        refused('serve', '--key-secret', 'k', *args, says="--key-secret: there is no secret 'k'")
        refused('serve', '--object', 'secret,id=k,file=/etc/hostname', '--key-secret', 'k', *args,
                says=name)
        refused('serve', '--object', 'secret,id=k,data=phrase', *args, says='file=')
        with open('e.ini', 'w') as f:
            f.write('[global]\nobject = secret,id=k,file=key\n'
                    f'[e]\nimage = {name}\nformat = {fmt}\nvhost-user-blk = e.sock\n'
                    'key-secret = k\n')
        for options in ([*key, '--key-secret', 'k', *args], ['--config', 'e.ini']):
            with Serve(*options, '--control', 'e.qmp') as serve, Ring('e.sock') as ring, \
                    Qmp('e.qmp') as qmp:
                ring.start()
                equal(ring.request(write=True), 0, 'a write')
                equal(ring.request(write=False), 0, 'a read')
                equal(ring.map[0x11000:0x12000], b'x' * 4096, 'content')
                equal(disk(qmp)['inserted']['encrypted'], True)
                serve.stop()
        assert b'x' * 512 not in open(name, 'rb').read(), 'the guest\'s data is there in clear'


@test
def serve_follows_names_where_allowed():
    os.mkdir('mine')
    os.mkdir('golden')
    raw_image('golden/base.raw', 4 * MIB)
    make('-f', 'qcow2', '-b', '../golden/base.raw', '-F', 'raw', 'mine/web.qcow2')
    args = ['-f', 'qcow2', '--vhost-user-blk', 'n.sock', 'mine/web.qcow2']
    golden = os.path.realpath('golden')
    refused('serve', *args, says=f'add --allow-dir {golden}')
    refused('serve', '--allow-dir', 'mine', *args, says=f'add --allow-dir {golden}')
    refused('serve', '--allow-dir', 'nowhere', *args, says='--allow-dir: nowhere: No such file')
    with open('n.ini', 'w') as f:
        f.write('[web]\nimage = mine/web.qcow2\nvhost-user-blk = n.sock\nallow-dir = mine\n'
                'allow-dir = golden\nmetadata-cache = 1M\ndiscard-no-unref = on\n')
    for options in (['--allow-dir', 'mine', '--allow-dir', 'golden', *args],
                    ['--config', 'n.ini']):
        with Serve(*options) as serve:
            serve.stop()
    if shutil.which('qemu-img'):
        run('create', '-u', '-f', 'qcow2', '-b', 'nbd:localhost:1', '-F', 'raw', 'x.qcow2', '1M',
            program='qemu-img')
        refused('serve', '--vhost-user-blk', 'n.sock', 'x.qcow2', says='refused')


@test
def qmp_tells_the_chain():
    raw_image('base.raw', 4 * MIB)
    make('-f', 'qed', '-b', 'base.raw', '-F', 'raw', 'middle.qed')
    make('-f', 'qcow2', '-b', 'middle.qed', '-F', 'qed', 'top.qcow2', '6M')
    with Serve('--vhost-user-blk', 'c.sock', '--control', 'c.qmp', '--detect-zeroes', 'unmap',
               '-f', 'qcow2', 'top.qcow2') as serve, Qmp('c.qmp') as qmp:
        inserted = disk(qmp)['inserted']
        equal((inserted['drv'], inserted['backing_file'], inserted['backing_file_depth'],
               inserted['detect_zeroes'], inserted['encrypted']),
              ('qcow2', 'middle.qed', 2, 'unmap', False))
        image = inserted['image']
        equal((image['filename'], image['format'], image['virtual-size'], image['cluster-size'],
               image['backing-filename'], image['full-backing-filename'],
               image['backing-filename-format']),
              ('top.qcow2', 'qcow2', 6 * MIB, 65536, 'middle.qed', 'middle.qed', 'qed'))
        middle = image['backing-image']
        equal((middle['filename'], middle['format'], middle['virtual-size'],
               middle['backing-filename']), ('middle.qed', 'qed', 4 * MIB, 'base.raw'))
        bottom = middle['backing-image']
        equal((bottom['filename'], bottom['format'], 'backing-image' in bottom,
               'cluster-size' in bottom), ('base.raw', 'raw', False, False))
        with Ring('c.sock') as ring:
            ring.start()
            wait_until(lambda: disk(qmp)['oxbow']['active'], 'an active disk')
            active = disk(qmp)['inserted']['image']
            equal({**active, 'actual-size': 0}, {**image, 'actual-size': 0}, 'the active image')
            # It grows under the guest, and what is new reads as zero.
            equal(run('resize', 'top.qcow2', '+2M').stdout,
                  f'Image resized online (by oxbow serve, pid {serve.process.pid}).\n')
            equal(disk(qmp)['inserted']['image']['virtual-size'], 8 * MIB)
            equal(ring.request(write=True, sector=7 * MIB // 512), 0, 'a write behind the old end')
        serve.stop()
    read_back('top.qcow2', 'qcow2', 'read -P 120 7M 4k', 'read -P 0 6M 1M')


# --- resize --------------------------------------------------------------------------------

@test
def resize_offline():
    image = raw_image('resize.raw', 10 * MIB)

    def resize(*args, size, says='Image resized.\n'):
        done = run('resize', *args)
        equal(done.returncode, 0, done.stderr)
        equal(done.stdout, says)
        equal(os.stat(image).st_size, size)

    resize(image, '20M', size=20 * MIB)
    resize('-f', 'raw', image, '+1.5M', size=20 * MIB + 3 * MIB // 2)
    resize('--shrink', image, '-1.5M', size=20 * MIB)
    resize(image, '--shrink', '8388608', size=8 * MIB)
    resize('-q', image, '9M', size=9 * MIB, says='')
    resize('--preallocation=falloc', image, '+1M', size=10 * MIB)
    assert os.stat(image).st_blocks * 512 >= MIB
    with open(image, 'r+b') as f:
        f.write(b'data')
    resize('--preallocation', 'full', image, '+1M', size=11 * MIB)
    equal(open(image, 'rb').read(5), b'data\0')
    for args, says in (
            ((image, '1M'), 'use --shrink'),
            ((image, '-1M'), 'use --shrink'),
            ((image, '--shrink', '-11M'), 'less than'),
            ((image, '12Q'), "'12Q' is not a size"),
            ((image, '+'), "'+' is not a size"),
            ((image, '--', '-'), "'-' is not a size"),
            ((image,), 'needs an image and a size'),
            ((), 'needs an image and a size'),
            (('12M',), 'needs an image and a size'),
            ((image, image, '12M'), 'one word too many'),
            ((image, '8E'), ''),
            ((image, '+8E'), ''),
            (('nowhere.raw', '12M'), 'nowhere.raw'),
            (('--shrik', image, '12M'), "did you mean '--shrink'?"),
            (('--preallocation=some', image, '12M'), '--preallocation'),
            (('--preallocation=metadata', image, '12M'), '--preallocation'),
            (('--preallocation=full', '--shrink', image, '1M'), 'preallocate'),
            (('-f', 'qcow3', image, '12M'), 'qcow3')):
        refused('resize', *args, says=says)
        equal(os.stat(image).st_size, 11 * MIB, args)


@test
def resize_locked_by_another():
    """Somebody who is no Oxbow holds the image: the lock's message, and nothing happens."""
    if not shutil.which('qemu-io'):
        raise Skip('qemu-io is not installed')
    image = raw_image('locked.raw', MIB)
    holder = subprocess.Popen(['qemu-io', '-f', 'raw', image], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        holder.stdin.write(b'length\n')
        holder.stdin.flush()
        assert b'1 MiB' in holder.stdout.readline()
        refused('resize', image, '2M', says=f'pid {holder.pid}')
    finally:
        holder.communicate(timeout=WAIT)
    equal(os.stat(image).st_size, MIB)


@test
def resize_online():
    image = raw_image('online.raw', 16 * MIB)
    with Serve('--vhost-user-blk', 'o.sock', '--control', 'o.qmp', image) as serve, \
            Qmp('o.qmp') as qmp:
        pid = serve.process.pid
        # Inactive: nothing is locked; the server sees the size at its next start.
        done = run('resize', image, '+1M')
        equal((done.stdout, done.stderr), ('Image resized.\n', ''))
        with Ring('o.sock') as ring:
            ring.start()
            wait_until(lambda: disk(qmp)['oxbow']['active'], 'an active disk')
            equal(disk(qmp)['oxbow']['size'], 17 * MIB)
            done = run('resize', image, '+3M')
            equal((done.stdout, done.stderr),
                  (f'Image resized online (by oxbow serve, pid {pid}).\n', ''))
            equal((disk(qmp)['oxbow']['size'], os.stat(image).st_size), (20 * MIB, 20 * MIB))
            os.link(image, 'online-too.raw')
            equal(run('resize', '-q', 'online-too.raw', '24M').stdout, '')
            equal(disk(qmp)['inserted']['image']['virtual-size'], 24 * MIB)
            refused('resize', image, '10M', says='use --shrink')
            refused('resize', image, '--preallocation=full', '30M', says='does not preallocate')
            equal(run('resize', image, '--shrink', '10M').returncode, 0)
            equal(os.stat(image).st_size, 10 * MIB)
            # Without the run directory the server is not found: the lock's message.
            refused('resize', image, '30M', says=f'pid {pid}',
                    env={**os.environ, 'OXBOW_RUN_DIR': os.path.abspath('elsewhere')})
            equal(qmp.command('block_resize', device='online.raw', size=12 * MIB), {'return': {}})
            equal(os.stat(image).st_size, 12 * MIB)
            assert any(e['event'] == 'OXBOW_DISK_RESIZED' for e in qmp.events), qmp.events
        serve.stop()
    equal(os.stat(image).st_size, 12 * MIB)


def main():
    failed = 0
    wanted = sys.argv[1:]
    chosen = [t for t in tests if not wanted or t.__name__ in wanted]
    os.environ.pop('NOTIFY_SOCKET', None)
    os.environ.pop('OXBOW_LOG', None)
    print(f'1..{len(chosen)}', flush=True)
    home = os.getcwd()
    for number, function in enumerate(chosen, 1):
        name = function.__name__.replace('_', ' ')
        with tempfile.TemporaryDirectory(prefix='oxbow-cli.') as directory:
            os.chdir(directory)
            os.environ['OXBOW_RUN_DIR'] = os.path.join(directory, 'run')
            try:
                function()
                print(f'ok {number} - {name}', flush=True)
            except Skip as why:
                print(f'ok {number} - {name} # SKIP {why}', flush=True)
            except Exception:
                failed += 1
                print(f'not ok {number} - {name}')
                for line in traceback.format_exc().splitlines():
                    print(f'# {line}', flush=True)
            os.chdir(home)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
