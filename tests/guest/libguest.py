# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests, their disks' servers and TAP, for the tests of this folder and for ./demo.

    with Workspace('basic') as work:
        image = work.image('a.raw', '256M')
        server = work.add(OxbowServer(work, image, queues=2))
        guest = work.add(Guest(work, [VhostDisk(server)]))
        guest.boot()
        print(guest.check('fdisk -l /dev/vda'))

A guest is a Linux kernel with a busybox initramfs (kit.py) under QEMU, with KVM where a guest
proves to start under it and TCG elsewhere.  Commands run in it through a virtio-serial port
(init.sh tells the protocol).  All processes die with the workspace, and with this process.
"""

import base64
import ctypes
import functools
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import kit

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BUILD = os.path.abspath(os.environ.get('OXBOW_BUILD', os.path.join(ROOT, 'build')))
OXBOW = os.path.abspath(os.environ.get('OXBOW', os.path.join(BUILD, 'oxbow')))

# Generous: a loaded machine is slow, not wrong.
PATIENCE = float(os.environ.get('OXBOW_PATIENCE', 120))

# An emulated CPU on a busy host gets its time in lumps: the kernel must not measure with it.
CALM = 'no_timer_check lpj=4000000 nowatchdog rcupdate.rcu_cpu_stall_suppress=1'


class GuestError(Exception):
    """What went wrong, in one sentence, and where to read more."""


# --- processes ------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent():
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # ^C ends the test, and the test ends its children.
    os.setpgid(0, 0)


def spawn(argv, **more):
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent, **more)


def tail(path, lines=15):
    try:
        with open(path, 'rb') as file:
            text = file.read()[-8000:].decode('utf-8', 'replace').replace('\r', '')
    except OSError:
        return ''
    return '\n'.join(text.splitlines()[-lines:])


def wait_for(condition, what, timeout=PATIENCE, step=0.02):
    """Polls until condition() is true; its value.  GuestError naming `what` when it takes more
    than `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise GuestError(f'{what}: not within {timeout} s')
        time.sleep(step)


def host(*argv):
    """Runs a program on the host; what it said.  GuestError when it fails."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors='replace', check=False)
    if done.returncode:
        raise GuestError(f"`{' '.join(argv)}` ended with status {done.returncode}:\n"
                         f'{done.stdout[-2000:]}')
    return done.stdout


def sbin(name):
    """A program for administrators, wherever it is."""
    return shutil.which(name, path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin') or name


class Workspace:
    """A folder for one test: images below the build folder (O_DIRECT must work there), sockets
    in a short path.  Everything add()ed is stopped at the end, last first."""

    def __init__(self, name, keep_logs=None):
        self.logs = keep_logs or os.path.join(BUILD, 'guest', 'logs', name)
        shutil.rmtree(self.logs, ignore_errors=True)
        os.makedirs(self.logs)
        parent = os.path.join(BUILD, 'guest', 'tmp')
        os.makedirs(parent, exist_ok=True)
        # What a killed test left: images are big.
        for old in os.listdir(parent):
            pid = old.split('.')[1] if old.count('.') >= 2 else ''
            if pid.isdigit() and not os.path.exists(f'/proc/{pid}'):
                shutil.rmtree(os.path.join(parent, old), ignore_errors=True)
        self.folder = tempfile.mkdtemp(prefix=f'{name}.{os.getpid()}.', dir=parent)
        self.sockets = tempfile.mkdtemp(prefix='oxbow.')
        # Where servers and `oxbow resize` meet.
        os.environ['OXBOW_RUN_DIR'] = os.path.join(self.sockets, 'run')
        os.mkdir(os.environ['OXBOW_RUN_DIR'], 0o700)
        self.things = []
        self.undo = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for thing in reversed(self.things):
            thing.kill()
        self.things = []
        for step in reversed(self.undo):
            try:
                step()
            except (OSError, subprocess.SubprocessError):
                pass
        self.undo = []
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)

    def add(self, thing):
        self.things.append(thing)
        return thing

    def socket(self, name):
        return os.path.join(self.sockets, name)

    def log(self, name):
        return os.path.join(self.logs, name)

    def image(self, name, size):
        """A sparse raw file."""
        path = os.path.join(self.folder, name)
        with open(path, 'wb') as file:
            file.truncate(parse_size(size))
        return path

    def create(self, name, size=None, fmt='qcow2', options=()):
        """An image as `oxbow create` makes it."""
        path = os.path.join(self.folder, name)
        host(OXBOW, 'create', '-q', '-f', fmt, *options, path, *([size] if size else []))
        return path

    def raw(self, image, fmt='qcow2', secret=None):
        """What QEMU reads from an image, as a raw file: for looking into it, then remove it.
        `secret`: what QEMU needs in place of a format to open an encrypted one."""
        path = image + '.content'
        host('qemu-img', 'convert', '-O', 'raw', *(secret or ['-f', fmt, image]), path)
        return path


def parse_size(text):
    match = re.fullmatch(r'(\d+)([KMG]?)', str(text))
    return int(match.group(1)) << {'': 0, 'K': 10, 'M': 20, 'G': 30}[match.group(2)]


# --- images on the host -----------------------------------------------------------------------

def check_image(path, fmt='qcow2', secret=None):
    """After a clean stop neither QEMU nor Oxbow finds errors or leaked clusters; GuestError with
    what they found.  `secret`: as for Workspace.raw()."""
    host('qemu-img', 'check', *(secret or ['-f', fmt, path]))
    host(OXBOW, 'check', '-f', fmt, path)


def size_on_host(path):
    """What a file takes of its file system, in bytes."""
    return os.stat(path).st_blocks * 512


def digest_of_file(path):
    """As md5sum has it: an emulated guest is quickest at that."""
    digest = hashlib.md5()
    with open(path, 'rb') as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


# --- QMP ------------------------------------------------------------------------------------

class Qmp:
    """A connection to QEMU's (or Oxbow's) control socket."""

    def __init__(self, path, timeout=PATIENCE, process=None):
        self.path = path
        self.events = []
        self.buffer = b''

        def connect():
            if process and process.poll() is not None:
                raise GuestError(f'nobody listens on {path} any more')
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(path)
            except OSError:
                sock.close()
                return None
            return sock
        self.sock = wait_for(connect, f'connecting to {path}', 10)
        self.sock.settimeout(timeout)
        if 'QMP' not in self._receive():
            raise GuestError(f'{path} does not greet as QMP')
        self.execute('qmp_capabilities')

    def _receive(self):
        while b'\n' not in self.buffer:
            try:
                data = self.sock.recv(65536)
            except socket.timeout:
                raise GuestError(f'{self.path} does not answer') from None
            if not data:
                raise GuestError(f'{self.path} was closed')
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b'\n')
        return json.loads(line)

    def execute(self, command, **arguments):
        message = {'execute': command}
        if arguments:
            message['arguments'] = {key.replace('_', '-'): value
                                    for key, value in arguments.items()}
        return self.send(message)

    def send(self, message):
        self.sock.sendall(json.dumps(message).encode() + b'\n')
        while True:
            answer = self._receive()
            if 'event' in answer:
                self.events.append(answer)
            elif 'error' in answer:
                raise GuestError(f"{message['execute']}: {answer['error'].get('desc')}")
            elif 'return' in answer:
                return answer['return']

    def wait_event(self, name, timeout=PATIENCE):
        """The next event of that name (also one that came before)."""
        end = time.monotonic() + timeout
        while True:
            for event in self.events:
                if event['event'] == name:
                    self.events.remove(event)
                    return event
            left = end - time.monotonic()
            if left <= 0:
                raise GuestError(f'no {name} event within {timeout} s')
            self.sock.settimeout(left)
            try:
                answer = self._receive()
            finally:
                self.sock.settimeout(PATIENCE)
            if 'event' in answer:
                self.events.append(answer)

    def close(self):
        self.sock.close()


# --- disks' servers -------------------------------------------------------------------------

class Server:
    """A process that serves one image on a vhost-user-blk socket."""

    name = 'server'

    def __init__(self, work, image, label=None, queues=None):
        self.work, self.image, self.queues = work, image, queues
        self.label = label or os.path.basename(image)
        self.path = work.socket(self.label + '.sock')
        self.log = work.log(f'{self.name}-{self.label}.log')
        self.process = None

    def argv(self):
        raise NotImplementedError

    def start(self):
        self.launch()
        self.wait_ready()
        return self

    def launch(self):
        with open(self.log, 'ab') as log:
            self.process = spawn(self.argv(), stdout=log, stderr=log,
                                 env={**os.environ, 'OXBOW_LOG': 'info'})

    def is_ready(self):
        raise NotImplementedError

    def wait_ready(self):
        def ready():
            if self.process.poll() is not None:
                raise GuestError(f'{self.name} ended with status {self.process.returncode}; '
                                 f'it said:\n{tail(self.log)}')
            return self.is_ready()
        wait_for(ready, f'{self.name} being ready (see {self.log})', 30)

    @property
    def pid(self):
        return self.process.pid

    def kill(self):
        """SIGKILL, as a crash would."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self):
        """SIGTERM; the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            raise GuestError(f'{self.name} does not end on SIGTERM (see {self.log})') from None


class OxbowServer(Server):
    name = 'oxbow'

    def __init__(self, work, image, label=None, queues=None, options=(), fmt='raw'):
        super().__init__(work, image, label, queues)
        self.options, self.fmt = list(options), fmt
        self.control = work.socket(self.label + '.qmp')
        self.read_from = 0

    def argv(self):
        argv = [OXBOW, 'serve']
        if self.fmt:
            argv += ['-f', self.fmt]
        if self.queues:
            argv += ['--queues', str(self.queues)]
        return argv + ['--control', self.control, *self.options,
                       '--vhost-user-blk', self.path, self.image]

    def launch(self):
        self.read_from = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        super().launch()

    def ready_line(self):
        with open(self.log, 'rb') as log:
            log.seek(self.read_from)
            for line in log.read().decode('utf-8', 'replace').splitlines():
                if line.startswith('ready '):
                    return line
        return None

    def is_ready(self):
        return self.ready_line()

    def qmp(self):
        return Qmp(self.control)

    def taken_over(self):
        """Of every start that found what a killed process had not written to the image: how many
        changes of the map it took over."""
        with open(self.log, encoding='utf-8', errors='replace') as log:
            return [int(number) for number in re.findall(r'took over (\d+) changes', log.read())]


class StorageDaemon(Server):
    """QEMU's own back end: the tests' oracle, where it can do what is tested."""

    name = 'qemu-storage-daemon'

    def argv(self):
        return ['qemu-storage-daemon',
                '--blockdev', f'driver=file,filename={self.image},node-name=file,'
                'cache.direct=on,aio=io_uring,discard=unmap',
                '--blockdev', 'driver=raw,file=file,node-name=disk,discard=unmap',
                '--export', 'type=vhost-user-blk,id=export,node-name=disk,writable=on,'
                f'addr.type=unix,addr.path={self.path},num-queues={self.queues or 4}']

    def launch(self):
        if os.path.exists(self.path):
            os.unlink(self.path)
        super().launch()

    def is_ready(self):
        return os.path.exists(self.path)


def make_server(work, image, **more):
    """Oxbow; with OXBOW_GUEST_BACKEND=qsd QEMU's storage daemon, to try the tests themselves."""
    if os.environ.get('OXBOW_GUEST_BACKEND') == 'qsd':
        return StorageDaemon(work, image, label=more.get('label'), queues=more.get('queues'))
    return OxbowServer(work, image, **more)


def lock_holders(path, pids):
    """Which of these processes hold an OFD lock on the file."""
    ino = os.stat(path).st_ino
    holders = set()
    for pid in pids:
        folder = f'/proc/{pid}/fdinfo'
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(folder, name), encoding='ascii') as file:
                    text = file.read()
            except OSError:
                continue
            for line in text.splitlines():
                if line.startswith('lock:') and f':{ino} ' in line:
                    holders.add(pid)
    return holders


# --- the guest ------------------------------------------------------------------------------

@functools.lru_cache(None)
def reconnect():
    """QEMU tries again each second; since 9.2 that is told in milliseconds."""
    said = subprocess.run([qemu_program(), '--version'], stdout=subprocess.PIPE, text=True,
                          check=True).stdout
    version = re.search(r'version (\d+)\.(\d+)', said)
    new = version and (int(version.group(1)), int(version.group(2))) >= (9, 2)
    return 'reconnect-ms=1000' if new else 'reconnect=1'


class VhostDisk:
    """A disk on a vhost-user-blk server."""

    def __init__(self, server, queues=None, packed=False, **properties):
        self.server, self.queues, self.packed = server, queues, packed
        self.properties = properties

    def arguments(self, number):
        device = f'vhost-user-blk-pci,id=disk{number},chardev=vhost{number}'
        if self.queues:
            device += f',num-queues={self.queues}'
        if self.packed:
            device += ',packed=on'
        for key, value in self.properties.items():
            device += f",{key.replace('_', '-')}={value}"
        return ['-chardev', f'socket,id=vhost{number},path={self.server.path},{reconnect()}',
                '-device', device]


class QemuDisk:
    """An image on QEMU's own virtio-blk, as its documentation advises for speed."""

    def __init__(self, path, aio='io_uring', queues=None, fmt='raw'):
        self.path, self.aio, self.queues, self.fmt = path, aio, queues, fmt

    def arguments(self, number):
        device = f'virtio-blk-pci,id=disk{number},drive=node{number},iothread=thread{number}'
        if self.queues:
            device += f',num-queues={self.queues}'
        return ['-object', f'iothread,id=thread{number}',
                '-blockdev', f'driver=file,filename={self.path},node-name=file{number},'
                f'cache.direct=on,aio={self.aio},discard=unmap',
                '-blockdev', f'driver={self.fmt},file=file{number},node-name=node{number},discard=unmap',
                '-device', device]


def qemu_program():
    machine = platform.machine()
    name = {'x86_64': 'qemu-system-x86_64', 'aarch64': 'qemu-system-aarch64'}.get(machine)
    if not name:
        raise GuestError(f'guests run on x86-64 and arm64 hosts; this is {machine}')
    if not shutil.which(name):
        raise GuestError(f'{name} is missing')
    return name


# How CPUs are emulated where there is no KVM.
TCG = 'tcg,thread=multi'


def machine_arguments(accel):
    """Machine, CPU and console for an accelerator."""
    if platform.machine() == 'x86_64':
        machine, console = 'q35', 'ttyS0'
    else:
        machine, console = 'virt', 'ttyAMA0'
    if accel == 'kvm':
        return ['-accel', 'kvm', '-cpu', 'host'], machine, console
    return ['-accel', TCG, '-cpu', 'max'], machine, console


def accelerator(made, folder):
    """'kvm' if our guest starts under it within seconds (that /dev/kvm opens proves little),
    else 'tcg'; and why.  Asked once for each boot of the host and version of the kit."""
    asked = os.environ.get('OXBOW_ACCEL')
    if asked:
        return asked, 'asked for by OXBOW_ACCEL'
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        return 'tcg', '/dev/kvm cannot be opened'
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
        boot = file.read().strip()
    key = [boot, made['inputs'], made['release']]
    state = os.path.join(folder, 'accelerator.json')
    try:
        with open(state, encoding='ascii') as file:
            saved = json.load(file)
        if saved['key'] == key:
            return saved['accel'], saved['why']
    except (OSError, ValueError, KeyError):
        pass
    arguments, machine, console = machine_arguments('kvm')
    log = os.path.join(folder, 'kvm-probe.log')
    with open(log, 'wb') as file:
        process = spawn([qemu_program(), *arguments, '-machine', machine, '-m', '256',
                         '-nodefaults', '-display', 'none', '-no-reboot', '-serial', 'stdio',
                         '-kernel', made['kernel'], '-initrd', made['initramfs'], '-append',
                         f'console={console} panic=-1 quiet oxbow.probe {CALM}'],
                        stdout=file, stderr=file)
    accel, why = 'tcg', 'a guest does not start under KVM here'
    end = time.monotonic() + 8
    while time.monotonic() < end:
        ended = process.poll() is not None
        if 'oxbow-guest: up' in tail(log, 100):
            accel, why = 'kvm', 'a guest starts under KVM'
            break
        if ended:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    with open(state, 'w', encoding='ascii') as file:
        json.dump({'key': key, 'accel': accel, 'why': why}, file)
    return accel, why


class Job:
    """A command that runs in a guest."""

    def __init__(self, command):
        self.command, self.status, self.output = command, None, ''

    def done(self):
        return self.status is not None


class Guest:
    """A virtual machine.  boot() starts it; run(), check() and start() work in it."""

    def __init__(self, work, disks, label='guest', cpus=2, memory=512, more=(), incoming=False,
                 max_memory=None):
        self.work, self.disks, self.label = work, disks, label
        self.cpus, self.memory, self.max_memory = cpus, memory, max_memory
        self.more, self.incoming = list(more), incoming
        self.console = work.log(label + '-console.log')
        self.qemu_log = work.log(label + '-qemu.log')
        self.monitor = None
        self.process = self.port = None
        self.jobs, self.next_id = {}, 1
        self.hellos = queue.Queue()
        self.accel = None

    def argv(self):
        folder = os.path.join(BUILD, 'guest', 'kit')
        made = kit.make(folder)
        self.accel, _ = accelerator(made, folder)
        arguments, machine, console = machine_arguments(self.accel)
        memory = str(self.memory)
        if self.max_memory:
            memory += f',slots=4,maxmem={self.max_memory}M'
        argv = [qemu_program(), *arguments, '-machine', f'{machine},memory-backend=ram',
                '-name', self.label, '-m', memory, '-smp', str(self.cpus),
                '-object', f'memory-backend-memfd,id=ram,size={self.memory}M,share=on',
                '-nodefaults', '-display', 'none', '-action', 'panic=exit-failure',
                '-serial', 'file:' + self.console,
                '-qmp', f'unix:{self.work.socket(self.label + ".monitor")},server=on,wait=off',
                '-kernel', made['kernel'], '-initrd', made['initramfs'],
                '-append', f'console={console} panic=-1 quiet loglevel=4 {CALM}',
                '-device', 'virtio-rng-pci', '-device', 'virtio-serial-pci',
                '-chardev', f'socket,id=port,path={self.work.socket(self.label + ".port")},'
                'server=on,wait=off',
                '-device', 'virtserialport,chardev=port,name=oxbow']
        for number, disk in enumerate(self.disks):
            argv += disk.arguments(number)
        if self.incoming:
            argv += ['-incoming', 'defer']
        return argv + self.more

    def launch(self):
        """Starts QEMU; does not wait for what runs in it."""
        with open(self.qemu_log, 'ab') as log:
            argv = self.argv()
            log.write((' '.join(argv) + '\n').encode())
            log.flush()
            self.process = spawn(argv, stdout=log, stderr=log)
        try:
            self.monitor = Qmp(self.work.socket(self.label + '.monitor'), process=self.process)
            self.port = socket.socket(socket.AF_UNIX)
            self.port.connect(self.work.socket(self.label + '.port'))
        except (GuestError, OSError):
            self.kill()
            raise GuestError(f'QEMU did not start; it said:\n{tail(self.qemu_log)}') from None
        threading.Thread(target=self._listen, daemon=True).start()

    def boot(self):
        """Starts the guest and waits until commands can run in it.  An emulated guest on a host
        that is overloaded may lose its timer while it boots, and stand still for good: that is
        said, and it gets a second try."""
        self.launch()
        if self.accel == 'tcg':
            try:
                self.wait_hello(PATIENCE / 2)
                return self
            except GuestError as error:
                if self.process.poll() is not None:
                    raise
                print(f'# {error}'.replace('\n', '\n# '), flush=True)
                print(f'# the host\'s load is {os.getloadavg()[0]:.0f}; trying again', flush=True)
                self.kill()
                self.launch()
        self.wait_hello()
        return self

    def wait_hello(self, timeout=PATIENCE):
        """The guest has (re)started and takes commands.  Jobs from before are gone."""
        end = time.monotonic() + timeout
        while True:
            try:
                return self.hellos.get(timeout=0.2)
            except queue.Empty:
                pass
            if self.process.poll() is not None:
                raise GuestError(f'QEMU ended with status {self.process.returncode}:\n'
                                 f'{tail(self.qemu_log, 5)}\n{tail(self.console)}')
            if time.monotonic() > end:
                raise GuestError(f'the guest did not start within {timeout:.0f} s (see '
                                 f'{self.console}):\n{tail(self.console)}')

    def _listen(self):
        buffer = b''
        while True:
            try:
                data = self.port.recv(65536)
            except OSError:
                return
            if not data:
                return
            buffer += data
            while b'\n' in buffer:
                line, _, buffer = buffer.partition(b'\n')
                words = line.decode('ascii', 'replace').split()
                if words and words[0] == 'hello':
                    self.hellos.put(words[1])
                elif len(words) >= 2 and words[0].isdigit() and words[0] in self.jobs:
                    job = self.jobs.pop(words[0])
                    if len(words) > 2:
                        job.output = base64.b64decode(words[2]).decode('utf-8', 'replace')
                    job.status = int(words[1])

    def start(self, script):
        """Starts a shell script in the guest; a Job."""
        job = Job(script)
        number = str(self.next_id)
        self.next_id += 1
        self.jobs[number] = job
        self.port.sendall(f'{number} '.encode() + base64.b64encode(script.encode()) + b'\n')
        return job

    def wait(self, job, timeout=PATIENCE):
        """Waits for a job's end; (status, output)."""
        def ended():
            if not job.done() and self.process.poll() is not None:
                raise GuestError(f'QEMU ended while `{job.command.strip()[:60]}` ran:\n'
                                 f'{tail(self.qemu_log, 5)}\n{tail(self.console)}')
            return job.done()
        try:
            wait_for(ended, f'`{job.command.strip()[:80]}` in the guest (see {self.console})',
                     timeout, 0.01)
        except GuestError as error:
            raise GuestError(f'{error}\n{tail(self.console, 8)}') from None
        return job.status, job.output

    def run(self, script, timeout=PATIENCE):
        return self.wait(self.start(script), timeout)

    def check(self, script, timeout=PATIENCE):
        """run(), but a status other than 0 is a GuestError; the output."""
        return self.check_job(self.start(script), timeout)

    def check_job(self, job, timeout=PATIENCE):
        status, output = self.wait(job, timeout)
        if status:
            raise GuestError(f'`{job.command.strip()[:200]}` ended with status {status} in the '
                             f'guest:\n{output[-1500:]}')
        return output

    def verify(self, device, size='64m', **more):
        """fio writes in random order and verifies; GuestError unless all of it did."""
        fio_verified(self.check(fio_verify(device, size=size, **more)), size)

    def writes_done(self, device='vda'):
        return int(self.check(f'cat /sys/block/{device}/stat').split()[4])

    def wait_writes(self, count, job=None, device='vda'):
        """Waits until `count` more writes have completed, while a job runs.  GuestError when
        the job ends before."""
        before = self.writes_done(device)

        def reached():
            if job and job.done():
                self.check_job(job)
                raise GuestError('the writes ended too early for this test')
            return self.writes_done(device) >= before + count
        wait_for(reached, f'{count} writes in the guest')

    def io_errors(self):
        """What the guest's kernel says about failed I/O: '' is good."""
        return self.run(r"dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|critical .* error"
                        r"|JBD2.*(error|abort)|hung_task|blocked for more|kernel BUG|Oops:'")[1]

    def power_off(self, timeout=60):
        """Asks the guest to power off and waits for QEMU's end."""
        try:
            self.start('sync; poweroff -f')
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f'the guest did not power off:\n{tail(self.console)}') from None
        if status:
            raise GuestError(f'QEMU ended with status {status}:\n{tail(self.qemu_log, 5)}')

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for thing in (self.port, self.monitor and self.monitor.sock):
            if thing:
                thing.close()

    def migrate(self, other):
        """Moves the running guest into another Guest made with incoming=True and launched."""
        path = self.work.socket(other.label + '.migrate')
        other.monitor.send({'execute': 'migrate-incoming', 'arguments': {'uri': 'unix:' + path}})
        # Jobs go with the guest: the other end of the port will hear their ends.
        other.jobs, other.next_id = self.jobs, self.next_id
        self.monitor.send({'execute': 'migrate', 'arguments': {'uri': 'unix:' + path}})

        def ended():
            status = self.monitor.execute('query-migrate')
            if status.get('status') in ('failed', 'cancelled'):
                raise GuestError(f"migration failed: {status.get('error-desc', '')}\n"
                                 f'{tail(self.qemu_log, 5)}\n{tail(other.qemu_log, 5)}')
            return status.get('status') == 'completed' and status
        status = wait_for(ended, 'migration', PATIENCE, 0.05)
        wait_for(lambda: other.monitor.execute('query-status')['status'] == 'running',
                 'the guest running at its new place')
        return status


# --- fio in the guest -----------------------------------------------------------------------

def fio(device, rw='randwrite', bs='4k', size='64m', depth=16, name='io', **more):
    """A fio command line for a guest."""
    words = ['fio', f'--name={name}', f'--filename={device}', '--ioengine=libaio', '--direct=1',
             f'--rw={rw}', f'--bs={bs}', f'--size={size}', f'--iodepth={depth}', '--thread',
             '--randrepeat=0', '--group_reporting', '--allow_mounted_write=1']
    words += [f'--{key}' if value is True else f'--{key}={value}' for key, value in more.items()]
    return ' '.join(words)


def fio_verify(device, **more):
    """Writes every block once in random order, and reads it all back at the end.  Its output is
    for fio_verified()."""
    return fio(device, verify='crc32c', do_verify=1, verify_fatal=1, **more) \
        + ' --output-format=json'


def fio_result(output):
    """The first job of fio's --output-format=json (lines around it are fio's remarks)."""
    start = output.find('{')
    if start < 0:
        raise GuestError(f'fio gave no result:\n{output[-1500:]}')
    return json.loads(output[start:output.rindex('}') + 1])['jobs'][0]


def fio_verified(output, size):
    """fio's exit status can be 0 though it did nothing: it must have written (nearly; mixed
    block sizes leave a rest) `size` and read as much back."""
    job = fio_result(output)
    written, read = job['write']['io_bytes'], job['read']['io_bytes']
    if job['error'] or written < parse_size(size.upper()) * 0.95 or read < written:
        raise GuestError(f"fio wrote {written} of {size} and verified {read} bytes, "
                         f"error {job['error']}:\n{output[:output.index('{')][-1500:]}")


# --- TAP ------------------------------------------------------------------------------------

class Skip(Exception):
    """A check cannot run here; the reason."""


class Tap:
    """Checks in order.  Each prints one TAP line; done() prints the plan, answers the exit
    status."""

    def __init__(self):
        self.count, self.failed = 0, 0

    def ok(self, condition, name, detail=''):
        self.count += 1
        if not condition:
            self.failed += 1
        print(f"{'ok' if condition else 'not ok'} {self.count} - {name}", flush=True)
        if not condition and detail:
            for line in str(detail).strip().splitlines():
                print('# ' + line, flush=True)
        return condition

    def skip(self, name, why):
        self.count += 1
        print(f'ok {self.count} - {name} # SKIP {why}', flush=True)

    def note(self, text):
        for line in str(text).strip().splitlines():
            print('# ' + line, flush=True)

    def case(self, name, function, *arguments):
        """Runs a function that makes its own checks; what it raises is a failed check."""
        began = time.monotonic()
        try:
            function(self, *arguments)
        except Skip as why:
            self.skip(name, str(why))
        except (GuestError, kit.KitError, OSError, subprocess.SubprocessError, ValueError,
                KeyError, IndexError) as error:
            self.ok(False, f'{name}: runs to its end', f'{type(error).__name__}: {error}')
        self.note(f'{name}: {time.monotonic() - began:.1f} s')

    def done(self):
        print(f'1..{self.count}', flush=True)
        return 1 if self.failed else 0


def main(*cases):
    """Runs (name, function) cases; those named on the command line if any."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tap = Tap()
    for name, function in cases:
        if len(sys.argv) < 2 or name in sys.argv[1:]:
            tap.case(name, function)
    sys.exit(tap.done())
