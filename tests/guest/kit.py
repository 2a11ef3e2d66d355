#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test guest is made of: a distribution's kernel and a busybox initramfs.

    kit.py FOLDER        makes FOLDER/{vmlinuz,initramfs.gz,kit.json}, or finds them made

The kernel package is downloaded with `apt-get download` and unpacked with `dpkg-deb -x` below
FOLDER: nothing is installed, /boot is never touched.  The initramfs holds busybox, the drivers
with their dependencies in load order, fio and mke2fs with their libraries, and init.sh.

fio drags in eighty megabytes of libraries for storage engines that a guest has no use for (ceph,
gluster, RDMA).  Those are replaced by empty ones with the same names, and the result is tried on
the host; when that fails, all the real ones are taken.

Everything is made anew when the package, this file, init.sh, busybox, fio or mke2fs changed.
"""

import gzip
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# What the guest needs beyond what the kernel has built in; the ones that the kernel does not
# know are passed over.
MODULES = ['virtio_pci', 'virtio_blk', 'virtio_scsi', 'sd_mod', 'virtio_console', 'virtio_balloon',
           'virtio_rng', 'crc32c_generic', 'crc32c_intel', 'ext4']

# First hit wins.  %s: dpkg's name of the architecture.
KERNEL_PACKAGES = ['linux-image-cloud-%s', 'linux-image-kvm', 'linux-image-virtual',
                   'linux-image-generic', 'linux-image-%s']

# Libraries that fio really uses in the guest.
KEPT = re.compile(r'^(ld-linux|libc\.|libm\.|libaio\.|libz\.|libpthread|librt\.|libdl\.|libnuma'
                  r'|libgcc_s|liburing)')


class KitError(Exception):
    """One sentence for a person."""


def run(*argv, **more):
    """Runs a command; its output, or KitError with what it said."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              check=False, **more)
    except FileNotFoundError:
        raise KitError(f'{argv[0]} is missing') from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise KitError(f"`{' '.join(argv)}` failed: {said[-1] if said else 'no reason given'}")
    return done.stdout


def which(name):
    path = shutil.which(name, path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin')
    if not path:
        raise KitError(f'{name} is missing')
    return path


def kernel_package():
    """The package that holds this system's kernel for virtual machines, and its companion with
    modules, as apt names them."""
    arch = run('dpkg', '--print-architecture').strip()
    for candidate in KERNEL_PACKAGES:
        meta = candidate % arch if '%s' in candidate else candidate
        try:
            depends = run('apt-cache', 'depends', '--no-recommends', meta)
        except KitError:
            continue
        for line in depends.splitlines():
            found = re.match(r'\s*\|?Depends: (linux-image-(?:unsigned-)?\d\S+)', line)
            if found:
                image = found.group(1)
                version = re.sub(r'^linux-image-(unsigned-)?', '', image)
                modules = f'linux-modules-{version}'
                known = run('apt-cache', 'pkgnames', modules).split()
                return [image] + ([modules] if modules in known else [])
    raise KitError('apt knows no kernel package for virtual machines; run `apt-get update`')


def digest_of(paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


class Cpio:
    """Writes a newc archive.  Everything belongs to root and has no time stamp."""

    def __init__(self, file):
        self.file, self.inode, self.made = file, 0, set()

    def _entry(self, name, mode, data=b'', major=0, minor=0):
        self.inode += 1
        raw = name.encode() + b'\0'
        fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(raw), 0]
        head = b'070701' + b''.join(b'%08X' % field for field in fields) + raw
        self.file.write(head + b'\0' * (-len(head) % 4) + data + b'\0' * (-len(data) % 4))

    def folder(self, name):
        name = name.strip('/')
        if not name or name in self.made:
            return
        self.folder(os.path.dirname(name))
        self.made.add(name)
        self._entry(name, stat.S_IFDIR | 0o755)

    def add(self, name, data, mode=0o644):
        name = name.strip('/')
        if name in self.made:
            return
        self.folder(os.path.dirname(name))
        self.made.add(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name, target):
        name = name.strip('/')
        self.folder(os.path.dirname(name))
        self.made.add(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name, mode, major, minor):
        self.folder(os.path.dirname(name))
        self._entry(name, mode, b'', major, minor)

    def end(self):
        self._entry('TRAILER!!!', 0)


def read_module(path):
    with open(path, 'rb') as file:
        data = file.read()
    if path.endswith('.xz'):
        return lzma.decompress(data)
    if path.endswith('.gz'):
        return gzip.decompress(data)
    if path.endswith('.zst'):
        return subprocess.run([which('zstd'), '-dcq', path], stdout=subprocess.PIPE,
                              check=True).stdout
    return data


def modules_in_order(tree, version):
    """Paths of MODULES and what they depend on, dependencies first."""
    folder = os.path.join(tree, 'lib/modules', version)
    if not os.path.isdir(folder):
        folder = os.path.join(tree, 'usr/lib/modules', version)
        os.makedirs(os.path.join(tree, 'lib'), exist_ok=True)
        os.symlink('../usr/lib/modules', os.path.join(tree, 'lib/modules'))
    run(which('depmod'), '-b', tree, version)

    def name_of(path):
        return re.sub(r'\.ko(\.\w+)?$', '', os.path.basename(path)).replace('-', '_')

    path_of, needs = {}, {}
    with open(os.path.join(folder, 'modules.dep'), encoding='ascii') as file:
        for line in file:
            path, _, rest = line.partition(':')
            path_of[name_of(path)] = os.path.join(folder, path)
            needs[name_of(path)] = [name_of(other) for other in rest.split()]
    order = []

    def want(name):
        if name in order or name not in path_of:
            return
        for other in needs[name]:
            want(other)
        order.append(name)

    # ext4 finds its checksum driver by an alias, not by a symbol.
    for name in MODULES:
        want(name)
    return [path_of[name] for name in order]


def libraries_of(program):
    """{soname: path} of all that the loader would load."""
    found = {}
    for line in run('ldd', program).splitlines():
        hit = re.match(r'\s*(\S+) => (/\S+)', line) or re.match(r'\s*((/\S+)) \(', line)
        if hit:
            found[hit.group(1)] = hit.group(2)
    return found


def symbols_of(path, which_ones):
    """{symbol: version} of a program's or library's dynamic symbols."""
    found = {}
    for line in run('nm', '-D', '--with-symbol-versions', which_ones, path).splitlines():
        symbol, _, version = line.split()[-1].partition('@')
        found[symbol] = version.lstrip('@')
    return found


def slim_libraries(program, work):
    """Libraries for a program with empty ones in place of what KEPT does not name; None when
    that does not run."""
    real = libraries_of(program)
    kept = {name: path for name, path in real.items() if KEPT.match(os.path.basename(name))}
    if len(kept) == len(real):
        return kept
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    try:
        # The program's own DT_NEEDED entries are enough: an empty library needs nothing.
        needed = re.findall(r'NEEDED.*\[(.*)\]', run('readelf', '-d', program))
        wanted = symbols_of(program, '--undefined-only')
        libraries = dict(kept)
        for name in needed:
            if name in kept:
                continue
            offered = symbols_of(real[name], '--defined-only')
            by_version = {}
            for symbol, version in wanted.items():
                if symbol in offered:
                    by_version.setdefault(version, []).append(symbol)
            source, versions = os.path.join(work, 'stub.c'), os.path.join(work, 'stub.map')
            with open(source, 'w', encoding='ascii') as file:
                file.write('extern int oxbow_empty;\n')
                for symbol in sorted(sum(by_version.values(), [])):
                    file.write(f'void {symbol}(void);\n'
                               f'void {symbol}(void) {{ __builtin_trap(); }}\n')
            with open(versions, 'w', encoding='ascii') as file:
                for version, symbols in sorted(by_version.items()):
                    if version:
                        file.write(f"{version} {{ {' '.join(s + ';' for s in symbols)} }};\n")
            script = [f'-Wl,--version-script={versions}'] if any(by_version) else []
            path = os.path.join(work, name)
            run('gcc', '-w', '-fno-builtin', '-shared', '-nostdlib', '-fPIC',
                f'-Wl,-soname,{name}', *script, '-o', path, source)
            libraries[name] = path
        loader = next(path for name, path in kept.items() if 'ld-linux' in name)
        folder = os.path.join(work, 'try')
        os.makedirs(folder)
        for name, path in libraries.items():
            shutil.copy(path, os.path.join(folder, os.path.basename(name)))
        run(loader, '--inhibit-cache', '--library-path', folder, program, '--name=try',
            '--ioengine=libaio', '--rw=randwrite', '--size=64k', '--verify=crc32c',
            f'--filename={work}/try.data', cwd=work)
        return libraries
    except (KitError, StopIteration):
        return None


def make_initramfs(tree, version, work, out):
    busybox = '/usr/lib/initramfs-tools/bin/busybox'
    for path in (shutil.which('busybox') or '', '/bin/busybox', busybox):
        if path and not libraries_of_static(path):
            busybox = path
            break
    else:
        raise KitError('a static busybox is missing (package busybox-static)')
    # Level 1: unpacked in the guest at each boot, and made once.
    with open(out + '.new', 'wb') as raw, gzip.GzipFile('', 'wb', 1, raw, mtime=0) as file:
        archive = Cpio(file)
        for name in ('bin', 'dev', 'proc', 'sys', 'tmp', 'mnt', 'run', 'sbin', 'usr/bin',
                     'usr/sbin', 'root', 'var'):
            archive.folder(name)
        archive.device('dev/console', stat.S_IFCHR | 0o600, 5, 1)
        archive.device('dev/null', stat.S_IFCHR | 0o666, 1, 3)
        archive.link('etc/mtab', '/proc/mounts')
        with open(os.path.join(HERE, 'init.sh'), 'rb') as init:
            archive.add('init', init.read(), 0o755)
        with open(busybox, 'rb') as program:
            archive.add('bin/busybox', program.read(), 0o755)
        names = []
        for path in modules_in_order(tree, version):
            name = re.sub(r'\.ko(\.\w+)?$', '.ko', os.path.basename(path))
            archive.add('modules/' + name, read_module(path))
            names.append(name)
        archive.add('modules/list', ''.join(name + '\n' for name in names).encode())
        for name in ('fio', 'mke2fs'):
            program = which(name)
            with open(program, 'rb') as data:
                archive.add('usr/bin/' + name, data.read(), 0o755)
            libraries = None
            if name == 'fio':
                libraries = slim_libraries(program, os.path.join(work, 'slim'))
            for soname, path in (libraries or libraries_of(program)).items():
                # The loader is named by its whole path, the others are searched for in /lib.
                name_there = soname if soname.startswith('/') else 'lib/' + soname
                with open(path, 'rb') as data:
                    archive.add(name_there, data.read(), 0o755)
        for name in ('mkfs.ext4', 'mkfs.ext3', 'mkfs.ext2'):
            archive.link('usr/sbin/' + name, '/usr/bin/mke2fs')
        config = '/etc/mke2fs.conf'
        if os.path.exists(config):
            with open(config, 'rb') as data:
                archive.add(config, data.read())
        archive.end()
    os.replace(out + '.new', out)


def libraries_of_static(program):
    """Libraries of a program that may be static."""
    try:
        return libraries_of(program)
    except KitError:
        return {}


def make(folder, say=lambda line: None):
    """Makes the kit below a folder unless it is there; {'kernel':, 'initramfs':, 'release':}."""
    os.makedirs(folder, exist_ok=True)
    state_path = os.path.join(folder, 'kit.json')
    inputs = digest_of([os.path.abspath(__file__), os.path.join(HERE, 'init.sh'), which('busybox'),
                        which('fio'), which('mke2fs')])
    kernel = os.path.join(folder, 'vmlinuz')
    initramfs = os.path.join(folder, 'initramfs.gz')
    try:
        with open(state_path, encoding='ascii') as file:
            state = json.load(file)
        if (state['inputs'] == inputs and os.path.exists(kernel) and os.path.exists(initramfs)
                and state['machine'] == platform.machine()):
            # The build folder may have moved.
            return {**state, 'kernel': kernel, 'initramfs': initramfs}
    except (OSError, ValueError, KeyError):
        pass

    tree = os.path.join(folder, 'kernel')
    packages = kernel_package()
    marker = os.path.join(folder, 'unpacked')
    unpacked = ''
    if os.path.exists(marker):
        with open(marker, encoding='ascii') as file:
            unpacked = file.read()
    if unpacked != ' '.join(packages):
        say(f"fetching {' and '.join(packages)} (unpacked below {folder}, not installed)")
        shutil.rmtree(tree, ignore_errors=True)
        downloads = os.path.join(folder, 'packages')
        shutil.rmtree(downloads, ignore_errors=True)
        os.makedirs(downloads)
        options = ['-o', 'APT::Sandbox::User=root'] if os.geteuid() == 0 else []
        run('apt-get', *options, 'download', *packages, cwd=downloads)
        for name in os.listdir(downloads):
            run('dpkg-deb', '-x', os.path.join(downloads, name), tree)
        shutil.rmtree(downloads)
        with open(marker, 'w', encoding='ascii') as file:
            file.write(' '.join(packages))
    images = [name for name in os.listdir(os.path.join(tree, 'boot'))
              if name.startswith('vmlinu')]
    if not images:
        raise KitError(f"{packages[0]} holds no kernel image")
    version = images[0].split('-', 1)[1]
    shutil.copy(os.path.join(tree, 'boot', images[0]), kernel)
    say('packing the initramfs (busybox, drivers, fio)')
    make_initramfs(tree, version, folder, initramfs)
    state = {'inputs': inputs, 'machine': platform.machine(), 'kernel': kernel,
             'initramfs': initramfs, 'release': version, 'package': packages[0]}
    with open(state_path + '.new', 'w', encoding='ascii') as file:
        json.dump(state, file)
    os.replace(state_path + '.new', state_path)
    return state


if __name__ == '__main__':
    try:
        print(json.dumps(make(os.path.abspath(sys.argv[1]), lambda line: print(line)), indent=1))
    except KitError as error:
        sys.exit(f'kit: {error}')
