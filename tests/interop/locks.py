#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Image locks between Oxbow and QEMU: each must refuse what the other's lock forbids, and nothing
# else.  locks.py LOCK_STORE, the program that takes the locks as `oxbow serve` does.

import os
import shutil
import subprocess
import sys
import tempfile
import time

LOCK_STORE = os.path.abspath(sys.argv[1])
QEMU = 'qemu-system-' + os.uname().machine
number = 0
failed = 0


def report(good, name, detail=''):
    global number, failed
    number += 1
    print(('ok' if good else 'not ok') + f' {number} - {name}', flush=True)
    if not good:
        failed += 1
        for line in str(detail).splitlines():
            print('# ' + line)


class Ours:
    """A store that is open with a lock, or was refused."""

    def __init__(self, mode, image):
        self.process = subprocess.Popen([LOCK_STORE, mode, image], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.said = self.process.stdout.readline().strip()
        self.locked = self.said == 'locked'

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Guest:
    """A QEMU that has the image as a virtio disk, stopped before its first instruction."""

    def __init__(self, image, drive='', device=''):
        self.process = subprocess.Popen(
            [QEMU, '-machine', 'q35,accel=tcg', '-nodefaults', '-S', '-display', 'none',
             '-drive', f'if=none,id=d,format=raw,file={image}{drive}',
             '-device', f'virtio-blk-pci,drive=d{device}', '-qmp', 'stdio'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # It greets at once; it answers when all devices are there.
        try:
            self.process.stdin.write('{"execute": "qmp_capabilities"}\n')
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        self.running = any('"return"' in line for line in iter(self.process.stdout.readline, ''))
        self.said = '' if self.running else self.process.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        self.process.wait()


class QemuIo:
    """qemu-io that has the image open."""

    def __init__(self, image, *options):
        self.process = subprocess.Popen(['qemu-io', *options, '-f', 'raw', image],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.process.stdin.write('length\n')
        self.process.stdin.flush()
        self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          check=False)
    return done.returncode == 0, done.stdout + done.stderr


def storage_daemon(image, folder):
    """Does qemu-storage-daemon get to export the image writable?"""
    socket = os.path.join(folder, 'nbd.sock')
    pidfile = os.path.join(folder, 'qsd.pid')
    process = subprocess.Popen(
        ['qemu-storage-daemon', '--blockdev', f'file,node-name=f,filename={image}',
         '--nbd-server', f'addr.type=unix,addr.path={socket}',
         '--export', 'nbd,id=e,node-name=f,writable=on', '--pidfile', pidfile],
        stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not os.path.exists(pidfile):
        time.sleep(0.02)
    up = process.poll() is None
    if up:
        process.terminate()
    text = process.stderr.read()
    process.stderr.close()
    process.wait()
    for path in (socket, pidfile):
        if os.path.exists(path):
            os.unlink(path)
    return up, text


def ours_first(image, folder):
    with Ours('write', image) as ours:
        report(ours.locked, 'a lock to write', ours.said)
        for name, command in (
                ('qemu-io', ('qemu-io', '-f', 'raw', '-c', 'read 0 512', image)),
                ('qemu-img convert', ('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', image,
                                      image + '.copy')),
                ('qemu-img resize', ('qemu-img', 'resize', '-f', 'raw', image, '8M'))):
            good, text = run(*command)
            report(not good and 'lock' in text, f'written by us: {name} is refused', text)
        good, text = run('qemu-img', 'info', '-U', image)
        report(good, 'written by us: qemu-img info -U works', text)
        good, text = storage_daemon(image, folder)
        report(not good and 'lock' in text, 'written by us: qemu-storage-daemon is refused', text)
        for name, drive, device in (('a guest', '', ''), ('a reading guest', ',readonly=on', ''),
                                    ('a sharing guest', '', ',share-rw=on')):
            with Guest(image, drive, device) as guest:
                report(not guest.running and 'lock' in guest.said,
                       f'written by us: {name} is refused', guest.said)
    with Ours('read', image) as ours:
        report(ours.locked, 'a lock to read', ours.said)
        good, text = run('qemu-img', 'info', image)
        report(good, 'read by us: qemu-img info works', text)
        good, text = run('qemu-io', '-f', 'raw', '-c', 'write 0 512', image)
        report(not good and 'lock' in text, 'read by us: qemu-io to write is refused', text)
        with Guest(image, ',readonly=on') as guest:
            report(guest.running, 'read by us: a reading guest works', guest.said)
        with Guest(image) as guest:
            report(not guest.running and 'lock' in guest.said, 'read by us: a guest is refused',
                   guest.said)
    with Ours('shared-write', image) as ours:
        report(ours.locked, 'a lock to write with others', ours.said)
        with Guest(image, '', ',share-rw=on') as guest:
            report(guest.running, 'shared by us: a sharing guest works', guest.said)
        with Guest(image) as guest:
            report(not guest.running and 'lock' in guest.said, 'shared by us: a guest is refused',
                   guest.said)
    good, text = run('qemu-io', '-f', 'raw', '-c', 'write 0 512', image)
    report(good, 'closed by us: qemu-io writes', text)


def theirs_first(image):
    def expect(what, allowed, pid):
        for mode in ('none', 'read', 'write', 'shared-write'):
            with Ours(mode, image) as ours:
                good = ours.locked == (mode in allowed)
                if not ours.locked:
                    good = good and f'(pid {pid})' in ours.said and 'in use by qemu' in ours.said
                verb = 'works' if mode in allowed else 'is refused, naming the holder'
                report(good, f'{what}: {mode} {verb}', ours.said)

    with Guest(image) as guest:
        report(guest.running, 'a guest', guest.said)
        expect('a guest', ('none',), guest.process.pid)
    with Guest(image, ',readonly=on') as guest:
        expect('a reading guest', ('none', 'read'), guest.process.pid)
    with Guest(image, '', ',share-rw=on') as guest:
        expect('a sharing guest', ('none', 'shared-write'), guest.process.pid)
    with QemuIo(image) as other:
        expect('qemu-io', ('none', 'shared-write'), other.process.pid)
    with QemuIo(image, '-r') as other:
        expect('qemu-io -r', ('none', 'read', 'write', 'shared-write'), other.process.pid)


def main():
    for program in (QEMU, 'qemu-io', 'qemu-img', 'qemu-storage-daemon'):
        if not shutil.which(program):
            print(f'1..0 # SKIP there is no {program} here')
            return 0
    folder = tempfile.mkdtemp(prefix='oxbow-locks-', dir='/var/tmp')
    try:
        image = os.path.join(folder, 'disk.raw')
        with open(image, 'wb') as file:
            file.truncate(4 << 20)
        ours_first(image, folder)
        theirs_first(image)
    finally:
        shutil.rmtree(folder)
    print(f'1..{number}')
    return 1 if failed else 0


sys.exit(main())
