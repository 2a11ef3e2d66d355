#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""`oxbow check` against `qemu-img check`, on images that qemu-img made and this script damages.

    qcow2_check.py OXBOW

Every kind of image (cluster size, refcount width, snapshots, ...) times every kind of damage.  Of
each damaged image:
  - a plain check reports the counters that qemu-img's does, where those are well-defined;
  - after `-r leaks` there are no leaks, nothing else has changed;
  - after `-r all` qemu-img finds nothing wrong, and what the damage left reachable is there: every
    guest cluster whose L1 and L2 entries were not touched reads as before.

OXBOW_LONG=1 tries more positions.  Prints TAP.
"""
import concurrent.futures
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

OXBOW = sys.argv[1]
SHARE = 12  # of the kinds of damage one in so many is tried by default, others for each image
LONG = os.environ.get("OXBOW_LONG") == "1"
COUNTERS = ["corruptions", "leaks", "image-end-offset", "total-clusters", "allocated-clusters",
            "fragmented-clusters", "compressed-clusters"]
OFFSET = 0x00fffffffffffe00
COPIED = 1 << 63
COMPRESSED = 1 << 62

tests = failures = 0


def result(ok, name, why=""):
    global tests, failures
    tests += 1
    failures += not ok
    print("%sok %d - %s" % ("" if ok else "not ", tests, name), flush=True)
    for line in str(why).splitlines()[:30] if not ok else []:
        print("# " + line, flush=True)


def run(args, **kw):
    return subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, errors="replace", **kw)


def must(*args):
    done = run(args)
    if done.returncode:
        raise SystemExit("Bail out! %s: %s" % (" ".join(args), done.stderr))
    return done.stdout


class Checked:
    """What a check said."""

    def __init__(self, program, image, path, repair=None):
        args = [program, "check", "--output=json"]
        if repair:
            args += ["-r", repair]
        if image.objects and program == "qemu-img":
            args += image.objects + ["--image-opts", image.target.replace(image.path, path)]
        else:
            args += ["-f", "qcow2", path]
        done = run(args, timeout=120)
        self.status, self.text = done.returncode, done.stderr
        try:
            self.json = json.loads(done.stdout)
        except ValueError:
            self.json = None

    def get(self, key):
        return self.json.get(key, 0) if self.json else None

    def counters(self):
        return {key: self.get(key) for key in COUNTERS}


class Layout:
    """Where the metadata of an image is."""

    def __init__(self, data):
        self.data = data
        (self.version, self.backing, _, self.bits, self.size, self.crypt, self.l1_entries, self.l1,
         self.reftable, self.reftable_clusters, self.snapshots, self.snapshots_at) = \
            struct.unpack_from(">IQIIQIIQQIIQ", data, 4)
        self.cluster = 1 << self.bits
        self.incompatible = self.autoclear = 0
        order, self.header = 4, 72
        if self.version >= 3:
            self.incompatible, _, self.autoclear, order, self.header = \
                struct.unpack_from(">QQQII", data, 72)
        self.refcount_bits = 1 << order
        self.entry = 16 if self.incompatible & 16 else 8
        self.entries = self.cluster // self.entry
        self.data_file = bool(self.incompatible & 4)
        self.bitmap_dir = None
        self.luks_end = 0
        at = self.header
        while at + 8 <= len(data):
            kind, length = struct.unpack_from(">II", data, at)
            if kind == 0:
                break
            if kind == 0x23852875:
                self.bitmap_ext = at + 8
                count, _, size, offset = struct.unpack_from(">IIQQ", data, at + 8)
                self.bitmap_dir = (offset, size, count)
            if kind == 0x0537be77:
                self.luks_end = sum(struct.unpack_from(">QQ", data, at + 8))
            at += 8 + (length + 7) // 8 * 8

    def u64(self, at):
        return struct.unpack_from(">Q", self.data, at)[0] if at + 8 <= len(self.data) else 0

    def tables(self):
        """(address of the L1 entry, offset of the L2 table)"""
        found = []
        for i in range(self.l1_entries):
            offset = self.u64(self.l1 + 8 * i) & OFFSET
            if offset:
                found.append((self.l1 + 8 * i, offset))
        return found

    def used(self, table):
        return [table + i * self.entry for i in range(self.entries)
                if self.u64(table + i * self.entry)]

    def blocks(self):
        count = self.reftable_clusters * self.cluster // 8
        return [(self.reftable + 8 * i, self.u64(self.reftable + 8 * i)) for i in range(count)
                if self.u64(self.reftable + 8 * i)]

    def guest_map(self):
        """guest cluster -> everything that says where it is"""
        found = {}
        for i in range(self.l1_entries):
            l1 = self.u64(self.l1 + 8 * i) & ~COPIED
            table = l1 & OFFSET
            for k in range(self.entries):
                at = table + k * self.entry
                l2 = self.u64(at) if l1 else 0
                bitmap = self.u64(at + 8) if l1 and self.entry == 16 else 0
                if not l2 & COMPRESSED and not self.data_file:
                    l2 &= ~COPIED
                found[i * self.entries + k] = (l1, l2, bitmap)
        return found


class Image:
    """A sound image: its bytes, and what a guest reads from it."""

    def __init__(self, folder, name, size, options="", writes=(), steps=(), backing=None,
                 parity=True, luks=False, from_raw=None):
        self.name, self.parity, self.folder = name, parity, folder
        self.path = os.path.join(folder, name + ".qcow2")
        self.raw = os.path.join(folder, name + ".raw")
        objects = []
        if luks:
            secret = os.path.join(folder, "secret")
            with open(secret, "w") as f:
                f.write("pass phrase")
            objects = ["--object", "secret,id=s,file=" + secret]
            options += ",encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        self.data_file = None
        if "data_file" in options:
            self.data_file = os.path.join(folder, name + ".data")
            options += ",data_file=" + self.data_file
            options = options.replace("data_file,", "")
        self.objects = objects
        self.target = self.path
        if luks:
            self.target = ("driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename="
                           + self.path)
        if from_raw:
            must("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from_raw,
                 self.path)
        else:
            args = ["qemu-img", "create", "-q", "-f", "qcow2"] + objects + ["-o", options]
            if backing:
                args += ["-b", backing, "-F", "raw"]
            # (The time of key derivation cannot always be measured on a busy machine.)
            for _ in range(20 if luks else 0):
                if run(args + [self.path, str(size)]).returncode == 0:
                    break
            else:
                must(*args + [self.path, str(size)])
        self.write(writes)
        for step in steps:
            if callable(step):
                step(self)
            elif step[0] == "write":
                self.write(step[1:])
            else:
                must("qemu-img", *[self.path if word == "IMAGE" else word for word in step])
        with open(self.path, "rb") as f:
            self.bytes = f.read()
        self.layout = Layout(self.bytes)
        self.read_all(self.path, self.raw)
        with open(self.raw, "rb") as f:
            self.content = f.read()
        self.map = self.layout.guest_map()

    def write(self, writes):
        if not writes:
            return
        args = ["qemu-io"] + self.objects
        for offset, length, value in writes:
            args += ["-c", "write -P %d %d %d" % (value, offset, length) if value >= 0
                     else "write -z %d %d" % (offset, length)]
        if self.objects:
            args += ["--image-opts"]
        must(*args + [self.target])

    def read_all(self, path, raw):
        args = ["qemu-img", "convert", "--salvage", "-O", "raw"] + self.objects
        if self.objects:
            args += ["--image-opts", self.target.replace(self.path, path)]
        else:
            args += ["-f", "qcow2", path]
        done = run(args + [raw])
        return done.stderr if done.returncode else None


def flip(at, bit):
    """Bit 0 is the lowest of the big-endian number at `at`."""
    def damage(data):
        if at + 8 <= len(data):
            data[at + 7 - bit // 8] ^= 1 << (bit % 8)
    return damage


def put(at, what):
    def damage(data):
        data[at:at + len(what)] = what
    return damage


def cut(size):
    def damage(data):
        del data[size:]
    return damage


class Damage:
    """parity: qemu-img's counters mean something; repair: -r all must bring the image back."""

    def __init__(self, name, change, parity=True, repair=True):
        self.name, self.change, self.parity, self.repair = name, change, parity, repair


def pick(things, count):
    """Some of them: first, last and between."""
    if len(things) <= count:
        return list(things)
    return [things[i * (len(things) - 1) // (count - 1)] for i in range(count)] if count > 1 \
        else things[:1]


def damages(image, seed):
    l = image.layout
    dice = random.Random(seed)
    many = 6 if LONG else 2
    end = len(image.bytes)
    found = []

    def add(*args, **kw):
        found.append(Damage(*args, **kw))

    def bits(name, at, which, **kw):
        for bit in which:
            add("%s bit %d at %#x" % (name, bit, at), flip(at, bit), **kw)

    low = [9, l.bits - 1] if l.bits > 9 else []
    high = [l.bits, l.bits + 1, l.bits + 3, 40, 55]
    tables = l.tables()
    some = sorted({9, l.bits - 1, l.bits, l.bits + 2, 41}) if not LONG else \
        sorted(set(low + high + [1, 8, 56, 61]))
    for at, table in pick(tables, many):
        # (QEMU takes the header for a table when the offset becomes 0.)
        bits("L1", at, [63] + [b for b in some if b >= l.bits and table != 1 << b])
        # QEMU takes what lies there for a table.
        bits("L1", at, [b for b in some if b < l.bits], parity=False)
        bits("L1 reserved", at, [3, 58])
    for _, table in pick(tables, many):
        used = l.used(table)
        for at in pick(used, many):
            compressed = l.u64(at) & COMPRESSED
            zero = l.u64(at) & 1
            bits("L2", at, [b for b in some if not (l.data_file and b >= l.bits)] +
                 ([] if compressed else [63]),
                 parity=not (compressed or zero or l.data_file))
            bits("L2 reserved", at, [3, 60] if not compressed else [],
                 parity=not l.data_file)
            bits("L2 compressed", at, [62], parity=False)
            if compressed:
                bits("L2 copied", at, [63])
            if l.entry == 16:
                add("L2 bitmap both at %#x" % at, put(at + 8, b"\xff" * 8), parity=True)
                bits("L2 extended zero", at, [0], parity=False)
        if used:
            add("L2 entry to the header at %#x" % used[0],
                put(used[0], struct.pack(">Q", COPIED)), parity=False)
            add("L2 entry to the L1 table", put(used[0], struct.pack(">Q", COPIED | l.l1)),
                repair=not l.data_file, parity=not l.data_file)
            add("L2 entry to an L2 table", put(used[-1], struct.pack(">Q", COPIED | table)),
                repair=not l.data_file, parity=not l.data_file)
            add("L2 entry to a refcount block",
                put(used[0], struct.pack(">Q", COPIED | l.blocks()[0][1])),
                repair=not l.data_file, parity=not l.data_file)
            if len(used) > 1 and l.refcount_bits > 1:
                add("two L2 entries to one cluster", put(used[0], image.bytes[used[1]:used[1] + 8]))
    if len(tables) > 1 and l.refcount_bits > 1:
        add("two L1 entries to one table", put(tables[0][0], struct.pack(">Q", COPIED | tables[1][1])))
    if tables and not l.data_file:
        table = tables[0][1]
        data = [l.u64(at) & OFFSET for at in l.used(table)
                if not l.u64(at) & COMPRESSED and l.u64(at) & OFFSET]
        if data:
            add("L1 entry to data", put(tables[-1][0], struct.pack(">Q", COPIED | data[0])),
                parity=False)
    if tables:
        add("an L2 table of noise", put(tables[0][1], dice.randbytes(l.cluster)), parity=False)
    blocks = l.blocks()
    for at, block in pick(blocks, many):
        bits("refcount table", at, some + [3], parity=False)
        for i in pick(range(min(l.cluster, (end >> l.bits) * l.refcount_bits // 8)), many + 1):
            add("refcount byte %d of %#x" % (i, block),
                put(block + i, bytes([image.bytes[block + i] ^ (1 << dice.randrange(8))])))
        add("refcount block %#x of noise" % block, put(block, dice.randbytes(l.cluster)),
            parity=False)
        add("refcount block %#x zeroed" % block, put(block, bytes(l.cluster)))
        add("refcount block %#x to itself" % block, put(at, struct.pack(">Q", l.reftable)))
        if tables:
            add("refcount table to an L2 table", put(at, struct.pack(">Q", tables[0][1])))
    add("refcount table zeroed", put(l.reftable, bytes(l.reftable_clusters << l.bits)))
    add("refcount table of noise", put(l.reftable, dice.randbytes(l.reftable_clusters << l.bits)),
        parity=False)
    bits("header refcount table offset", 48, [l.bits, l.bits + 1, 50], parity=False)
    if l.snapshots:
        snap = l.snapshots_at
        bits("snapshot L1 offset", snap, [9, l.bits, l.bits + 1, 45], parity=False)
        bits("snapshot L1 entries", snap + 4, [0, 3, 28], parity=False)
        bits("snapshot extra data", snap + 32, [0, 20], parity=False)
        bits("snapshot name length", snap + 8, [4, 12], parity=False)
        add("snapshot table of noise", put(snap, dice.randbytes(64)), parity=False)
        bits("header snapshot offset", 64, [l.bits, 44], parity=False)
        l1 = l.u64(snap) & OFFSET
        bits("snapshot L1 entry", l1, [9, l.bits, 44, 63, 3], parity=False)
    if l.bitmap_dir:
        where = l.bitmap_dir[0]
        bits("bitmap table offset", where, [9, l.bits, 44], parity=False)
        bits("bitmap table entries", where + 4, [0, 27], parity=False)
        bits("bitmap name length", where + 12, [2, 40], parity=False)
        add("bitmap directory of noise", put(where, dice.randbytes(32)), parity=False)
        table = l.u64(where) & OFFSET
        bits("bitmap table entry", table, [9, l.bits, 44, 60, 3], parity=False)
        bits("bitmap directory offset", l.bitmap_ext + 16, [l.bits, 44], parity=False)
    if end > 6 * l.cluster:
        keep = max(l.l1 + l.l1_entries * 8, l.reftable + 8, l.luks_end, (end // 2) >> l.bits << l.bits)
        add("cut off in the middle", cut(keep), parity=False)
        add("last cluster cut off", cut(end - l.cluster), parity=False)
        add("half of the last cluster cut off", cut(end - l.cluster // 2), parity=False)
    for i in range(20 if LONG else 2):
        places = [at for at, _ in tables] + [at for _, t in tables for at in l.used(t)] + \
            [at for at, _ in blocks] + [b + 8 * k for _, b in blocks for k in range(l.cluster // 8)]
        hits = [flip(dice.choice(places), dice.randrange(64)) for _ in range(4)]
        add("four random bits, #%d" % i, lambda data, hits=hits: [hit(data) for hit in hits],
            parity=False)
    return found


def check_content(image, before, path):
    """What the damage did not touch reads as it did in the sound image."""
    raw = path + ".raw"
    error = image.read_all(path, raw)
    if error:
        return "cannot be read any more: " + error
    with open(raw, "rb") as f:
        now = f.read()
    os.unlink(raw)
    cluster = image.layout.cluster
    if len(now) != len(image.content):
        return "has another size"
    if now == image.content:
        return None
    for guest, place in image.map.items():
        start = guest * cluster
        if start >= len(now) or before.get(guest) != place:
            continue
        if now[start:start + cluster] != image.content[start:start + cluster]:
            return "guest cluster %d (entry %#x) has changed" % (guest, place[1])
    return None


def reachable(image, data):
    """Of the damaged image: the map, less what lies behind its end."""
    found = Layout(data).guest_map()
    lost = []
    l = image.layout
    for guest, (l1, l2, _) in found.items():
        end = (l2 & OFFSET) + l.cluster if l2 & OFFSET and not image.data_file else 0
        if l2 & COMPRESSED:
            shift = 62 - (l.bits - 8)
            sectors = (l2 >> shift & ((1 << (l.bits - 8)) - 1)) + 1
            end = (l2 & ((1 << shift) - 1)) // 512 * 512 + sectors * 512
            # (What fills the last sector may be behind the end of a whole file.)
            end = min(end, len(image.bytes))
        if max(end, (l1 & OFFSET) + l.cluster) > len(data):
            lost.append(guest)
    for guest in lost:
        del found[guest]
    return found


def try_damage(image, damage, work):
    data = bytearray(image.bytes)
    damage.change(data)
    if bytes(data) == image.bytes:
        return None
    path = os.path.join(work, "damaged.qcow2")
    with open(path, "wb") as f:
        f.write(data)
    before = reachable(image, bytes(data))
    qemu = Checked("qemu-img", image, path)
    ours = Checked(OXBOW, image, path)
    with open(path, "rb") as f:
        if f.read() != data:
            return "a plain check wrote to the image"
    if ours.json is None and damage.name.startswith("header"):
        return None  # what the header itself says cannot be looked up elsewhere
    if ours.json is None:
        return "check failed: " + ours.text
    if damage.parity and image.parity and qemu.json and not qemu.get("check-errors"):
        if qemu.counters() != ours.counters():
            return "qemu-img %s\nours %s\nqemu-img: %s\nours: %s" % (
                qemu.counters(), ours.counters(), qemu.text[:600], ours.text[:600])
    if qemu.json and qemu.status in (2, 3) and ours.status == 0:
        return "qemu-img finds %s, we find nothing" % qemu.text
    # -r leaks
    if ours.get("leaks") and not ours.get("corruptions"):
        fixed = Checked(OXBOW, image, path, "leaks")
        after = Checked("qemu-img", image, path)
        if fixed.status or after.status:
            return "-r leaks: %d %s\nqemu-img afterwards: %s" % (fixed.status, fixed.text,
                                                               after.text)
        wrong = check_content(image, before, path)
        if wrong:
            return "after -r leaks: " + wrong
        with open(path, "wb") as f:
            f.write(data)
    elif ours.get("leaks"):
        fixed = Checked(OXBOW, image, path, "leaks")
        if (fixed.get("corruptions") or 0) > ours.get("corruptions"):
            return "-r leaks made it worse: %s" % fixed.text
        with open(path, "wb") as f:
            f.write(data)
    # -r all
    fixed = Checked(OXBOW, image, path, "all")
    if not damage.repair and fixed.status:
        return None
    after = Checked("qemu-img", image, path)
    again = Checked(OXBOW, image, path)
    if fixed.status or after.status or again.status:
        return "-r all: %d\n%s\nthen qemu-img: %d %s\nours: %d %s" % (
            fixed.status, fixed.text[:900], after.status, after.text[:500], again.status,
            again.text[:300])
    wrong = check_content(image, before, path)
    if wrong:
        return "after -r all: %s\n%s" % (wrong, fixed.text[:900])
    return None


def try_all(image, todo, work):
    wrong = []
    for damage in todo:
        why = try_damage(image, damage, work)
        if why:
            wrong.append("%s: %s" % (damage.name, why))
    return wrong


def images(folder):
    K, M = 1 << 10, 1 << 20
    rnd = random.Random(7)
    compressible = os.path.join(folder, "compressible")
    with open(compressible, "wb") as f:
        for i in range(64):
            f.write((rnd.randbytes(1000 + 450 * i) + bytes(64 * K))[:64 * K])
    base = os.path.join(folder, "base")
    with open(base, "wb") as f:
        f.write(b"\x77" * (4 * M))

    def lazy(name, *args, **kw):
        return name, lambda: Image(folder, name, *args, **kw)

    def spread(cluster, tables, per_table=6):
        reach = cluster * (cluster // 8)
        return [(t * reach + k * cluster * (1 + t), cluster * (1 + k % 2), 1 + (t * 16 + k) % 250)
                for t in range(tables) for k in range(per_table)]

    def snaps(image):
        must("qemu-img", "snapshot", "-c", "one", image.path)
        image.write([(0, 40 * K, 99)])
        must("qemu-img", "snapshot", "-c", "two", image.path)
        image.write([(20 * K, 60 * K, 98), (M, 8 * K, 97)])

    def bitmaps(image):
        must("qemu-img", "bitmap", "--add", "-g", "64k", image.path, "b0")
        image.write([(M, 300 * K, 55)])
        must("qemu-img", "bitmap", "--add", image.path, "another")
        image.write([(3 * M, 100 * K, 56)])

    yield lazy("64k", 16 * M, "cluster_size=64k", spread(64 * K, 1, 12))
    yield lazy("16k", 40 * M, "cluster_size=16k", spread(16 * K, 2))
    yield lazy("4k", 8 * M, "cluster_size=4k", spread(4 * K, 4))
    yield lazy("512", 800 * K, "cluster_size=512", spread(512, 18, 4))
    yield lazy("2M", 16 * M, "cluster_size=2M", [(0, 2 * M, 1), (6 * M, M, 2)])
    for bits in (1, 2, 4, 8, 32, 64):
        yield lazy("4k-refcount%d" % bits, 8 * M,
                    "cluster_size=4k,refcount_bits=%d" % bits, spread(4 * K, 2))
    yield lazy("v2", 8 * M, "cluster_size=4k,compat=0.10", spread(4 * K, 2))
    yield lazy("extended", 20 * M, "cluster_size=16k,extended_l2=on",
                [(0, 2 * K, 1), (40 * K, 9 * K, 2), (18 * M, 64 * K, 3), (18 * M, 4 * K, -1)])
    yield lazy("snapshots", 8 * M, "cluster_size=4k", spread(4 * K, 3), [snaps])
    yield lazy("bitmaps", 8 * M, "cluster_size=4k", spread(4 * K, 2), [bitmaps])
    yield lazy("compressed", 4 * M, "cluster_size=4k", from_raw=compressible,
                writes=[(M, 8 * K, 9)])
    yield lazy("zstd", 4 * M, "cluster_size=64k,compression_type=zstd",
                from_raw=compressible)
    yield lazy("data-file", 8 * M, "cluster_size=4k,data_file", spread(4 * K, 2))
    yield lazy("luks", 8 * M, "cluster_size=4k", spread(4 * K, 2), luks=True)
    yield lazy("overlay", 4 * M, "cluster_size=4k", spread(4 * K, 2) + [(M, 8 * K, -1)],
                backing=base)


def main():
    only = sys.argv[2:]
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="oxbow-check-", dir=shm) as folder:
        for number, (name, make) in enumerate(images(folder)):
            if only and name not in only:
                continue
            image = make()
            sound = Checked(OXBOW, image, image.path)
            qemu = Checked("qemu-img", image, image.path)
            result(sound.status == 0 and sound.counters() == qemu.counters(),
                   "%s: sound, and counted as qemu-img counts" % image.name,
                   "%s\n%s\n%s" % (sound.text, sound.json, qemu.json))
            todo = damages(image, number)
            if not LONG and not only:
                todo = todo[number % SHARE::SHARE]
            work = [os.path.join(folder, str(i)) for i in range(2)]
            for path in work:
                os.makedirs(path, exist_ok=True)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                halves = [pool.submit(try_all, image, todo[i::2], path)
                          for i, path in enumerate(work)]
                wrong = [why for half in halves for why in half.result()]
            result(not wrong, "%s: %d kinds of damage" % (image.name, len(todo)),
                   "\n".join(wrong))
            if only:
                print("\n\n".join(wrong))
    print("1..%d" % tests)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
