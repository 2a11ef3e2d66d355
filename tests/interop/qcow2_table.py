#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""qcow2 (and qed) both ways with QEMU: feature x cluster size x operation.

Usage: qcow2_table.py IMGIO [OXBOW]

Each case makes an image, lets QEMU write and Oxbow read, then Oxbow write and QEMU read and
check, and QEMU write once more on top of that.  What the disk must hold is kept as plain bytes.
The positions of the operations are random, from a seed that the case's name and OXBOW_SEED give.
OXBOW_LONG=1: every feature with every cluster size, and more operations.  OXBOW_ONLY=TEXT: only
the cases whose names have it; OXBOW_KEEP=1 keeps the folder of a case that failed.
"""
import concurrent.futures
import copy
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

IMGIO = os.path.abspath(sys.argv[1])
OXBOW = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else os.environ.get("OXBOW", "build/oxbow"))
LONG = "OXBOW_LONG" in os.environ
SEED = os.environ.get("OXBOW_SEED", "1")
ONLY = os.environ.get("OXBOW_ONLY", "")
K, M = 1024, 1024 * 1024
# Syncs in memory take no time; the long run is on a real file system.
WORK = os.environ.get("OXBOW_TEST_DIR",
                      "/dev/shm" if not LONG and os.access("/dev/shm", os.W_OK) else None)
SIZES = {512: 3 * M, 4 * K: 6 * M, 16 * K: 8 * M, 64 * K: 12 * M, 2 * M: 20 * M}
TAIL = 3 * 512  # the disk's end is not a cluster's


class Failed(Exception):
    pass


class Skip(Exception):
    pass


def expect(ok, *what):
    if not ok:
        raise Failed(" ".join(str(w) for w in what))


# --- what the disk must hold ---------------------------------------------------------------------

class Disk:
    """Bytes; where a discard was, three contents are allowed until somebody has looked."""

    def __init__(self, size, base=b""):
        self.data = bytearray(base[:size]).ljust(size, b"\0")
        self.base = bytes(self.data)
        self.free = []

    def write(self, byte, offset, length):
        self.data[offset:offset + length] = bytes([byte]) * length
        self.free = [part for piece in self.free for part in cut(piece, offset, length)]

    def discard(self, offset, length):
        self.free.append((offset, length))

    def resize(self, size):
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))
        self.base = self.base[:size]

    def look(self, found):
        """found: the whole disk as it was read. Takes over what a discard left."""
        expect(len(found) == len(self.data), "the disk has", len(found), "bytes, should have",
               len(self.data))
        for start, length in self.free:
            for at in range(start, min(start + length, len(found)), 512):
                sector = found[at:at + 512]
                if sector != self.data[at:at + 512]:
                    expect(sector == self.base[at:at + 512].ljust(len(sector), b"\0") or
                           not any(sector), "after a discard, something foreign at", at)
                    self.data[at:at + 512] = sector
        self.free = []
        if found != self.data:
            for at in range(0, len(found), 512):
                expect(found[at:at + 512] == self.data[at:at + 512], "at", at, "is",
                       found[at:at + 8].hex(), "and should be", self.data[at:at + 8].hex())


# --- a case ---------------------------------------------------------------------------------------

class Case:
    def __init__(self, name, feature, cluster, size):
        self.name, self.feature, self.cluster, self.size = name, feature, cluster, size
        self.random = random.Random(f"{SEED} {name}")
        self.dir = tempfile.mkdtemp(prefix="ox-qcow2-table-", dir=WORK)
        self.image = "disk." + feature.format
        self.disk = Disk(size)
        self.secret = feature.secret
        with open(self.path("phrase"), "wb") as file:
            file.write(b"open sesame")

    def path(self, name):
        return os.path.join(self.dir, name)

    def run(self, *args, status=0):
        result = subprocess.run(args, cwd=self.dir, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=120,
                                check=False)
        expect(result.returncode == status, "status", result.returncode, "of",
               " ".join(args)[-1500:], "\n", result.stdout.decode(errors="replace")[-2000:])
        return result.stdout.decode(errors="replace")

    def qemu(self, *args, name=None):
        """The image as QEMU's programs are told of it."""
        name = name or self.image
        if not self.secret:
            return ["-f", self.feature.format, *args, name]
        return ["--object", "secret,id=sec0,file=phrase", "--image-opts", *args,
                f"driver={self.feature.format},encrypt.key-secret=sec0,file.filename={name}"]

    def imgio(self, *commands, options=(), status=0):
        secret = ["--secret", "phrase"] if self.secret else []
        return self.run(IMGIO, "-f", self.feature.format, *secret, *options, self.image, *commands,
                        status=status)

    def model(self):
        with open(self.path("model"), "wb") as file:
            file.write(self.disk.data)
        return "model"

    # --- making it

    def options(self):
        options = list(self.feature.options)
        if self.feature.clusters:
            options.append(f"cluster_size={self.cluster}")
        return options

    def make(self, by_oxbow):
        base = self.feature.base and self.feature.base(self)
        options = self.options()
        program = [OXBOW] if by_oxbow else ["qemu-img"]
        secret = ["--object", "secret,id=sec0,file=phrase"] if self.secret else []
        backing = ["-b", base[0], "-F", base[1]] if base else []
        command = [*program, "create", "-q", *secret, "-f", self.feature.format, *backing,
                   *(["-o", ",".join(options)] if options else []), self.image, str(self.size)]
        if self.secret and not by_oxbow:
            # It measures the processor for the key, and gives up on a busy machine.
            for _ in range(5):
                try:
                    self.run(*command)
                    break
                except Failed as why:
                    reason = why
            else:
                raise Skip(f"qemu-img cannot make it here: {str(reason)[-100:]}")
        else:
            self.run(*command)

    # --- operations, by either program

    def operations(self, count, discards=True):
        """Random ones that all kinds come up in: (kind, byte, offset, length)."""
        c, size, rnd = self.cluster, len(self.disk.data), self.random
        kinds = ["full", "partial", "across", "zero", "zero-part", "zero-unmap", "tail"]
        if discards:
            kinds += ["discard", "discard-part"]
        todo = kinds * (count // len(kinds) + 1)
        rnd.shuffle(todo)
        for kind in todo[:max(count, len(kinds))]:
            at = rnd.randrange(0, max(size // c - 4, 1)) * c
            length = rnd.randrange(1, 4) * c
            if kind in ("partial", "zero-part"):
                at += rnd.randrange(0, max(c // 512, 1)) * 512
                length = rnd.randrange(1, max(c // 512, 2)) * 512
            elif kind in ("across", "discard-part"):
                at += rnd.randrange(0, max(c // 512, 1)) * 512
                length = rnd.randrange(1, 3 * max(c // 512, 1) + 1) * 512
            elif kind == "tail":
                length = rnd.randrange(1, 2 * max(c // 512, 2)) * 512
                length = min(length, size)
                at = size - length
            length = min(length, size - at)
            yield kind, rnd.randrange(1, 255), at, length

    def commands(self, count, qemu, discards=True):
        """The same operations as commands, and done to self.disk."""
        out = []
        for kind, byte, at, length in self.operations(count, discards):
            if kind.startswith("discard"):
                out.append(f"discard {at} {length}")
                self.disk.discard(at, length)
                continue
            if kind.startswith("zero"):
                byte = 0
                unmap = "-u " if kind == "zero-unmap" else ""
                out.append(f"{'write -z' if qemu else 'zero'} {unmap}{at} {length}")
            else:
                out.append(f"write -P {byte} {at} {length}")
            out.append(f"read -P {byte} {at} {length}")
            self.disk.write(byte, at, length)
        return out

    def qemu_writes(self, count, discards=True):
        args = []
        for command in self.commands(count, True, discards):
            args += ["-c", command]
        said = self.run("qemu-io", *self.qemu("-d", "unmap", *args))
        expect("failed" not in said and "error" not in said.lower(), said[-1500:])

    def we_write(self, count, options=()):
        self.imgio(*self.commands(count, False, self.feature.discards), options=options)

    # --- looking

    def we_agree(self, *options):
        self.imgio("export out", options=["-r", *options])
        with open(self.path("out"), "rb") as file:
            self.disk.look(file.read())

    def qemu_agrees(self, check=True):
        if check:
            self.run("qemu-img", "check", *self.qemu())
        model = self.model()
        if self.secret:
            self.run("qemu-img", "compare", "--object", "secret,id=sec0,file=phrase",
                     "--image-opts", f"driver=raw,file.filename={model}", self.qemu()[-1])
        else:
            self.run("qemu-img", "compare", "-f", "raw", "-F", self.feature.format, model,
                     self.image)

    def resize(self, size):
        self.disk.resize(size)
        return f"resize {size}"

    # --- the header, by hand (version 3)

    def header(self):
        with open(self.path(self.image), "rb") as file:
            return bytearray(file.read(max(self.cluster, 4096)))

    def patch(self, offset, data):
        with open(self.path(self.image), "r+b") as file:
            file.seek(offset)
            file.write(data)

    def bits(self, which):
        return struct.unpack_from(">Q", self.header(), {"incompatible": 72, "compatible": 80,
                                                        "autoclear": 88}[which])[0]

    def set_bits(self, which, value):
        self.patch({"incompatible": 72, "compatible": 80, "autoclear": 88}[which],
                   struct.pack(">Q", value))

    def extensions(self):
        head = self.header()
        at, found = struct.unpack_from(">I", head, 100)[0], []
        while True:
            kind, length = struct.unpack_from(">II", head, at)
            if kind == 0:
                return found, at
            found.append((kind, bytes(head[at + 8:at + 8 + length])))
            at += 8 + (length + 7) // 8 * 8


def cut(piece, at, length):
    """piece without [at, at + length)."""
    start, size = piece
    parts = []
    if start < at:
        parts.append((start, min(size, at - start)))
    if start + size > at + length:
        first = max(start, at + length)
        parts.append((first, start + size - first))
    return parts


# --- backing images --------------------------------------------------------------------------------

def base_content(case, size):
    rnd = random.Random(f"base {case.name}")
    data = bytearray(size)
    for at in range(0, size, 32 * K):
        if rnd.randrange(4):
            end = min(at + 32 * K, size)
            data[at:end] = bytes([rnd.randrange(1, 255)]) * (end - at)
    return data


def base_raw(case, size=None, name="base.raw"):
    data = base_content(case, size or case.size)
    with open(case.path(name), "wb") as file:
        file.write(data)
    case.disk = Disk(case.size, data)
    return name, "raw"


def base_short(case):
    return base_raw(case, case.size * 5 // 8 // 512 * 512 + 512)


def base_odd(case):
    """Not even whole sectors."""
    return base_raw(case, case.size // 2 + 100)


def base_long(case):
    return base_raw(case, case.size + 3 * M)


def base_format(case, fmt, *options):
    base_raw(case)
    case.run("qemu-img", "convert", "-f", "raw", "-O", fmt, *options, "base.raw", "base." + fmt)
    return "base." + fmt, fmt


def base_qcow2(case):
    return base_format(case, "qcow2")


def base_qed(case):
    return base_format(case, "qed")


def base_compressed(case):
    return base_format(case, "qcow2", "-c", "-o", "cluster_size=4k")


def base_chain(case):
    """raw <- qcow2, shorter <- qcow2 with subclusters."""
    base_raw(case)
    short = case.size // 2 // 512 * 512
    case.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2",
             str(short))
    case.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "mid.qcow2",
             "-F", "qcow2", "top.qcow2", str(case.size))
    case.run("qemu-io", "-f", "qcow2", "-c", "write -P 77 100k 20k", "top.qcow2")
    case.disk.data[short:] = bytes(case.size - short)
    case.disk.write(77, 100 * K, 20 * K)
    case.disk.base = bytes(case.disk.data)
    return "top.qcow2", "qcow2"


# --- features ---------------------------------------------------------------------------------------

class Feature:
    format = "qcow2"
    clusters = (512, 4 * K, 64 * K, 2 * M)
    short = None  # the cluster sizes without OXBOW_LONG; None: all
    options = ()
    base = None
    secret = False
    discards = True
    makers = ("qemu", "oxbow")
    count = 14

    def __init__(self, name, **members):
        self.name = name
        for member, value in members.items():
            setattr(self, member, value)

    def run(self, case, by_oxbow):
        self.prepare(case, by_oxbow)
        self.read(case)
        self.write(case)
        self.after(case)

    def prepare(self, case, by_oxbow):
        case.make(by_oxbow)
        if by_oxbow:
            case.qemu_agrees()
        case.qemu_writes(self.count, self.discards)

    def read(self, case):
        case.we_agree()
        case.qemu_agrees()
        case.we_agree("-n", "3", "-p", str(24 * K))

    def write(self, case):
        commands = case.commands(self.count, False, self.discards)
        commands += ["flush", "reopen", *case.commands(self.count, False, self.discards)]
        case.imgio(*commands)
        case.we_agree()
        case.qemu_agrees()
        case.qemu_writes(9, self.discards)
        case.we_write(self.count, options=["-n", "2", "-p", "1536"])
        case.we_agree()
        case.qemu_agrees()

    def after(self, case):
        """Growing."""
        grown = case.resize(len(case.disk.data) + 2 * case.cluster + 5 * 512)
        case.imgio(grown, *case.commands(self.count, False))
        case.we_agree()
        case.qemu_agrees()


class Compressed(Feature):
    makers = ("qemu",)
    kind = "zlib"

    def prepare(self, case, by_oxbow):
        cluster = case.cluster
        data = base_content(case, case.size)
        data[:3 * cluster] = bytes(3 * cluster)
        case.disk = Disk(case.size, data)
        case.disk.base = bytes(case.size)
        case.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o",
                 f"compression_type={self.kind},cluster_size={cluster}", case.model(), case.image)
        for n in 0, 2:
            case.run("qemu-io", "-f", "qcow2", "-c", f"write -c -P {n + 9} {n * cluster} {cluster}",
                     case.image)
            case.disk.write(n + 9, n * cluster, cluster)


class Snapshot(Feature):
    def prepare(self, case, by_oxbow):
        super().prepare(case, by_oxbow)
        case.run("qemu-img", "snapshot", "-c", "before", case.image)
        case.we_agree()
        self.saved = bytes(case.disk.data)

    def after(self, case):
        case.run("qemu-img", "convert", "-l", "before", "-f", "qcow2", "-O", "raw", case.image,
                 "snap.raw")
        with open(case.path("snap.raw"), "rb") as file:
            expect(file.read() == self.saved, "the snapshot changed")
        case.run("qemu-img", "snapshot", "-d", "before", case.image)
        case.qemu_agrees()
        case.we_write(self.count)
        case.we_agree()
        case.qemu_agrees()


class Bitmaps(Feature):
    def prepare(self, case, by_oxbow):
        super().prepare(case, by_oxbow)
        case.run("qemu-img", "bitmap", "--add", "-g", "65536", case.image, "b0")
        case.run("qemu-img", "bitmap", "--add", "--disable", case.image, "b1")

    def flags(self, case):
        info = json.loads(case.run("qemu-img", "info", "--output=json", case.image))
        bitmaps = info["format-specific"]["data"]["bitmaps"]
        return {b["name"]: b["flags"] for b in bitmaps}

    def read(self, case):
        super().read(case)
        expect("in-use" not in self.flags(case)["b0"], "reading marks bitmaps")

    def write(self, case):
        # QEMU does not write to an image with such bitmaps any more, so neither here.
        case.we_write(self.count)
        case.we_agree()
        case.qemu_agrees()
        flags = self.flags(case)
        expect("in-use" in flags["b0"], "b0 is not marked inconsistent", flags)


class DataFile(Feature):
    raw = False

    def prepare(self, case, by_oxbow):
        self.options = ("data_file=data.raw",) + (("data_file_raw=on",) if self.raw else ())
        super().prepare(case, by_oxbow)

    def after(self, case):
        super().after(case)
        if self.raw:
            with open(case.path("data.raw"), "rb") as file:
                found = file.read(len(case.disk.data)).ljust(len(case.disk.data), b"\0")
            expect(found == case.disk.data, "the data file is not the disk")


class Preallocated(Feature):
    def after(self, case):
        pass


class ReadOnly(Feature):
    """Legacy AES."""
    makers = ("qemu",)

    def write(self, case):
        case.imgio("write 0 512", status=1)
        case.qemu_agrees()

    def after(self, case):
        pass


class Header(Feature):
    """Things in the header that we do not know are kept, or refused."""
    makers = ("qemu", "oxbow")

    def write(self, case):
        found, end = case.extensions()
        strange = struct.pack(">II", 0x12345678, 5) + b"hello\0\0\0"
        case.patch(end, strange + bytes(8))
        before = case.bits("compatible")
        case.set_bits("autoclear", 1 << 40)
        case.set_bits("compatible", before | 1 << 50)
        case.imgio("read 0 512", options=["-r"])
        expect(case.bits("autoclear") == 1 << 40, "reading clears autoclear bits")
        case.we_write(self.count)
        expect((0x12345678, b"hello") in case.extensions()[0], "an unknown extension is lost")
        expect(case.bits("autoclear") == 0, "unknown autoclear bits stay:", case.bits("autoclear"))
        expect(case.bits("compatible") == before | 1 << 50, "compatible bits changed")
        case.we_agree()
        case.qemu_agrees()
        case.set_bits("incompatible", case.bits("incompatible") | 1 << 20)
        case.imgio("read 0 512", options=["-r"], status=1)
        case.imgio("write 0 512", status=1)
        case.set_bits("incompatible", case.bits("incompatible") & ~(1 << 20))
        case.qemu_agrees()


class Dirty(Feature):
    """Unclean: refcounts are wrong, the dirty bit says so."""
    options = ("lazy_refcounts=on",)

    def write(self, case):
        for _ in range(2):
            # QEMU leaves it so when it is killed.
            commands = case.commands(10, True, False)
            args = [word for command in commands for word in ("-c", command)]
            case.run("qemu-io", *case.qemu(*args, "-c", "flush", "-c", "abort"), status=-6)
            expect(case.bits("incompatible") & 1, "the image is not dirty")
            case.we_agree()
            case.we_write(self.count)
            expect(not case.bits("incompatible") & 1, "the image is still dirty")
            case.we_agree()
            case.qemu_agrees()


class Corrupt(Feature):
    def write(self, case):
        case.set_bits("incompatible", case.bits("incompatible") | 2)
        case.imgio("write 0 512", status=1)
        case.we_agree()
        case.set_bits("incompatible", case.bits("incompatible") & ~2)
        case.qemu_agrees()

    def after(self, case):
        pass


class Qed(Feature):
    format = "qed"
    clusters = (4 * K, 64 * K, 2 * M)


class Luks(Feature):
    secret = True
    options = ("encrypt.format=luks", "encrypt.key-secret=sec0", "encrypt.iter-time=10")
    count = 9


EXTENDED = (16 * K, 64 * K, 2 * M)
FEATURES = [
    Feature("version 3", options=("compat=1.1",)),
    Feature("version 2", options=("compat=0.10",)),
    Feature("lazy refcounts", options=("lazy_refcounts=on",), short=(4 * K, 64 * K)),
    *[Feature(f"refcounts of {bits} bits", options=(f"refcount_bits={bits}",),
              short=(512, 64 * K) if bits in (1, 64) else (4 * K,)) for bits in (1, 2, 4, 8, 32, 64)],
    Feature("subclusters", options=("extended_l2=on",), clusters=EXTENDED),
    Compressed("deflate"),
    Compressed("zstd", kind="zstd"),
    DataFile("data file", short=(512, 64 * K)),
    DataFile("raw data file", raw=True, short=(4 * K, 64 * K)),
    DataFile("data file with subclusters", clusters=EXTENDED, short=(64 * K,)),
    Luks("luks", short=(4 * K, 64 * K)),
    Luks("luks with subclusters", clusters=EXTENDED, short=(64 * K,),
         options=(*Luks.options, "extended_l2=on")),
    Luks("luks overlay", base=base_raw, short=(64 * K,),
         options=(*Luks.options, "extended_l2=off")),
    ReadOnly("legacy aes", secret=True, short=(4 * K, 64 * K),
             options=("encrypt.format=aes", "encrypt.key-secret=sec0")),
    *[Feature(f"over {name}", base=base, options=("extended_l2=off",), short=short)
      for name, base, short in (("raw", base_raw, (4 * K, 64 * K)),
                                ("shorter raw", base_short, (512, 64 * K)),
                                ("raw of odd size", base_odd, (64 * K,)),
                                ("longer raw", base_long, (4 * K, 2 * M)),
                                ("qcow2", base_qcow2, (64 * K,)),
                                ("qed", base_qed, (64 * K,)),
                                ("compressed", base_compressed, (64 * K,)),
                                ("a chain", base_chain, (4 * K, 64 * K)))],
    *[Feature(f"subclusters over {name}", base=base, options=("extended_l2=on",),
              clusters=EXTENDED, short=short)
      for name, base, short in (("raw", base_raw, None), ("shorter raw", base_short, (64 * K,)),
                                ("raw of odd size", base_odd, (16 * K,)),
                                ("longer raw", base_long, (64 * K,)),
                                ("compressed", base_compressed, (16 * K,)),
                                ("a chain", base_chain, (64 * K,)))],
    Feature("version 2 over raw", base=base_raw, options=("compat=0.10",), short=(64 * K,)),
    Snapshot("snapshot"),
    Snapshot("snapshot of version 2", options=("compat=0.10",), short=(4 * K,)),
    Snapshot("snapshot over raw", base=base_raw, options=("extended_l2=off",), short=(64 * K,)),
    Snapshot("snapshot with subclusters", base=base_raw, options=("extended_l2=on",),
             clusters=EXTENDED, short=(64 * K,)),
    Bitmaps("bitmaps", short=(4 * K, 64 * K)),
    *[Preallocated(f"preallocation {mode}", options=(f"preallocation={mode}",),
                   short=(4 * K, 2 * M) if mode == "metadata" else (64 * K,))
      for mode in ("metadata", "falloc", "full")],
    Preallocated("preallocation with subclusters", clusters=EXTENDED, short=(64 * K,),
                 options=("preallocation=metadata", "extended_l2=on")),
    Header("unknown things in the header", clusters=(4 * K, 64 * K, 2 * M), short=(4 * K, 64 * K)),
    Dirty("dirty", short=(512, 64 * K)),
    Corrupt("corrupt", short=(64 * K,)),
    Qed("qed"),
    Qed("qed tables of 16 clusters", options=("table_size=16",), short=(4 * K,)),
    Qed("qed over raw", base=base_raw, short=(4 * K, 64 * K)),
    Qed("qed over shorter raw", base=base_short, short=(64 * K,)),
]


def run_case(feature, cluster, maker):
    name = f"{feature.name}, clusters of {cluster}, made by {maker}"
    feature = copy.copy(feature)  # cases of one feature run at once
    case = Case(name, feature, cluster, SIZES[cluster] + TAIL)
    failed = True
    try:
        for _ in range(3 if LONG else 1):
            case.disk = Disk(case.size)
            feature.run(case, maker == "oxbow")
        failed = False
    except Skip as why:
        failed = False
        return name, "skip", str(why)
    except (Failed, subprocess.TimeoutExpired, OSError, KeyError, struct.error) as why:
        return name, "failed", f"{type(why).__name__}: {why}\nin {case.dir}"
    finally:
        if not failed or "OXBOW_KEEP" not in os.environ:
            shutil.rmtree(case.dir)
    return name, "ok", ""


def main():
    cases = []
    for feature in FEATURES:
        for cluster in feature.clusters:
            if not LONG and feature.short is not None and cluster not in feature.short:
                continue
            for maker in feature.makers:
                if ONLY in f"{feature.name}, clusters of {cluster}, made by {maker}":
                    cases.append((feature, cluster, maker))
    print(f"1..{len(cases)}")
    if not shutil.which("qemu-img") or not shutil.which("qemu-io"):
        for number, (feature, cluster, maker) in enumerate(cases, 1):
            print(f"ok {number} - {feature.name}, {cluster} # SKIP QEMU's tools are not installed")
        return 0
    status = 0
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        runs = [pool.submit(run_case, *case) for case in cases]
        for number, run in enumerate(runs, 1):
            name, result, why = run.result()
            if result == "failed":
                status = 1
            print(f"{'not ' if result == 'failed' else ''}ok {number} - {name}"
                  f"{' # SKIP ' + why if result == 'skip' else ''}", flush=True)
            if result == "failed":
                for line in why.splitlines():
                    print(f"# {line}", flush=True)
    return status


sys.exit(main())
