#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""qed both ways with QEMU: shapes of the map, creation, the mark "need check", damage.

Usage: qed.py IMGIO OXBOW

What qcow2_table.py does with every format it does with qed too; here is what only qed has.
"""
import filecmp
import os
import shutil
import struct
import subprocess
import sys
import tempfile

IMGIO, OXBOW = (os.path.abspath(name) for name in sys.argv[1:3])
K, M = 1 << 10, 1 << 20
NEED_CHECK = 2
tests = []


class Failed(Exception):
    pass


def test(function):
    tests.append(function)
    return function


def expect(ok, *what):
    if not ok:
        raise Failed(" ".join(str(w) for w in what))


def run(*args, status=0):
    result = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                            stdin=subprocess.DEVNULL, check=False)
    statuses = status if isinstance(status, tuple) else (status,)
    expect(result.returncode in statuses, "status", result.returncode, "of", " ".join(args), "\n",
           result.stdout.decode(errors="replace"))
    return result.stdout.decode(errors="replace")


def qemu(name, *commands, status=0, options=()):
    out = run("qemu-io", "-f", "qed", *options,
              *(arg for command in commands for arg in ("-c", command)), name, status=status)
    expect("verification failed" not in out, "qemu-io finds something else:", *commands, out)


def ours(name, *commands, status=0, options=()):
    run(IMGIO, "-f", "qed", "-A", *options, name, *commands, status=status)


def clean(name):
    """Nothing to find, for both."""
    run("qemu-img", "check", "-f", "qed", name)
    run(OXBOW, "check", "-f", "qed", name)
    expect(not marked(name), name, "is marked")


def header(name):
    with open(name, "rb") as file:
        return struct.unpack("<4sIIIQQQQQII", file.read(64))


def marked(name):
    return bool(header(name)[4] & NEED_CHECK)


def words(name, offset, count=1):
    with open(name, "rb") as file:
        file.seek(offset)
        return struct.unpack(f"<{count}Q", file.read(8 * count))


def put(name, offset, *values):
    with open(name, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(f"<{len(values)}Q", *values))


def entry(name, cluster):
    """Where the entry of a guest cluster stands."""
    _, size, table, _, _, _, _, l1, _, _, _ = header(name)
    entries = size * table // 8
    return words(name, l1 + cluster // entries * 8)[0] + cluster % entries * 8


def create(name, size, *options):
    run("qemu-img", "create", "-q", "-f", "qed",
        *(arg for option in options for arg in ("-o", option)), name, str(size))


# --- shapes -------------------------------------------------------------------------------------------

def shape(cluster, table):
    """Writes that begin and end inside clusters, tables and blocks of tables, by turns."""
    size = min(3 * cluster * (cluster * table // 8) + 512, 40 * cluster + 70 * M)
    ends = size - 512
    create("a.qed", size, f"cluster_size={cluster}", f"table_size={table}")
    run(OXBOW, "create", "-q", "-f", "qed", "-o", f"cluster_size={cluster}", "-o",
        f"table_size={table}", "b.qed", str(size))
    expect(filecmp.cmp("a.qed", "b.qed", shallow=False), "new images differ")
    spans = [(0, 512), (cluster - 512, 1024), (5 * cluster + 100, 2 * cluster),
             (30 * cluster, 3 * cluster), (ends, 512), (ends - 3 * M, 70000)]
    for name, (first, second) in (("a.qed", (qemu, ours)), ("b.qed", (ours, qemu))):
        first(name, *(f"write -P {i + 1} {at} {length}" for i, (at, length) in enumerate(spans)))
        reads = [f"read -P {i + 1} {at} {length}" for i, (at, length) in enumerate(spans)]
        second(name, *reads, f"read -P 0 512 {cluster - 1024}",
               f"read -P 0 {7 * cluster + 100} {cluster}")
        clean(name)
        second(name, f"write -P 20 {6 * cluster} {cluster}", f"write -P 21 {20 * cluster} 512",
               f"write -P 22 {ends - 1000} 300")
        first(name, f"read -P 3 {5 * cluster + 100} {cluster - 100}",
              f"read -P 20 {6 * cluster} {cluster}", f"read -P 3 {7 * cluster} 100",
              f"read -P 21 {20 * cluster} 512", f"read -P 0 {20 * cluster + 512} 512",
              f"read -P 22 {ends - 1000} 300")
        clean(name)
    run("qemu-img", "compare", "-q", "-f", "qed", "-F", "qed", "a.qed", "b.qed")


# Larger clusters are too much for QEMU's arithmetic, and it opens no image with tables of one cluster
# (its check that a table's offset does not overflow also takes those that need no addition).
for shape_cluster in (4 * K, 16 * K, 64 * K, 1 * M):
    for shape_table in (2, 4, 16):
        def make(cluster=shape_cluster, table=shape_table):
            def one():
                shape(cluster, table)
            one.__name__ = f"clusters of {cluster}, tables of {table}"
            return one
        tests.append(make())


@test
def created_alike():
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "5M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "7M")
    for fmt in "raw", "qcow2":
        for size in (), ("3M",), ("20000512",):
            args = "-f", "qed", "-b", "base." + fmt, "-F", fmt
            run("qemu-img", "create", "-q", *args, "a.qed", *size)
            run(OXBOW, "create", "-q", *args, "b.qed", *size)
            expect(filecmp.cmp("a.qed", "b.qed", shallow=False), fmt, size, "differs")
    for size in "0", "1000", "1T":
        run("qemu-img", "create", "-q", "-f", "qed", "a.qed", size)
        run(OXBOW, "create", "-q", "-f", "qed", "b.qed", size)
        expect(filecmp.cmp("a.qed", "b.qed", shallow=False), size, "differs")


# --- the mark ---------------------------------------------------------------------------------------------

@test
def qemu_was_killed():
    create("a.qed", 20 * M)
    qemu("a.qed", "write -P 1 1M 300k", "write -P 2 7M 64k", "write -z 9M 128k", "sigraise 9",
         status=-9)
    expect(marked("a.qed"), "qemu-io left no mark")
    shutil.copy("a.qed", "b.qed")
    # Who only reads changes nothing.
    ours("a.qed", "read -P 1 1M 300k", options=("-r",))
    expect(filecmp.cmp("a.qed", "b.qed", shallow=False), "reading changed it")
    run(OXBOW, "info", "a.qed")
    run(OXBOW, "check", "a.qed")
    expect(filecmp.cmp("a.qed", "b.qed", shallow=False), "looking changed it")
    ours("a.qed", "read -P 1 1M 300k", "read -P 2 7M 64k", "read -P 0 9M 128k")
    clean("a.qed")
    run(OXBOW, "check", "-q", "-r", "all", "b.qed")
    clean("b.qed")
    qemu("b.qed", "read -P 1 1M 300k")


@test
def we_were_killed():
    create("a.qed", 20 * M)
    ours("a.qed", "write -P 1 1M 300k", "write -P 2 7M 64k", "write -P 3 1M 4k", "zero 9M 128k",
         "kill", status=-9)
    expect(marked("a.qed"), "no mark")
    # What was taken ahead is at the end, as leaks, and nothing else is wrong.
    out = run("qemu-img", "check", "a.qed", status=3)
    expect("errors were found" not in out and "corrupt" not in out, out)
    shutil.copy("a.qed", "b.qed")
    qemu("a.qed", "read -P 3 1M 4k", "read -P 1 1028k 296k", "read -P 2 7M 64k",
         "write -P 4 12M 64k")
    expect(not marked("a.qed"), "qemu-io left the mark")
    run(OXBOW, "check", "a.qed", status=3)
    ours("a.qed", "read -P 2 7M 64k", "read -P 4 12M 64k")
    ours("b.qed", "read -P 3 1M 4k", "read -P 2 7M 64k")
    clean("b.qed")


@test
def the_end_was_lost():
    """What a power cut takes: both find the same image in what is left."""
    create("a.qed", 200 * M, "cluster_size=4k", "table_size=2")
    qemu("a.qed", "write -P 1 0 64k", "write -P 2 10M 64k", "write -P 3 100M 64k")
    length = os.path.getsize("a.qed")
    for cut in 512, 4096, 40448, 65536 + 4096, 100352:
        shutil.copy("a.qed", "b.qed")
        os.truncate("b.qed", length - cut)
        put("b.qed", 16, NEED_CHECK)
        shutil.copy("b.qed", "c.qed")
        ours("b.qed", "read -P 1 0 64k")
        qemu("c.qed", "read -P 1 0 64k")
        run("qemu-img", "compare", "-q", "-f", "qed", "-F", "qed", "b.qed", "c.qed")
        clean("b.qed")
        # And the space is used again.
        ours("b.qed", "write -P 9 50M 200k", "write -P 8 101M 4k")
        qemu("b.qed", "read -P 9 50M 200k", "read -P 8 101M 4k", "read -P 1 0 64k")
        clean("b.qed")


@test
def not_a_whole_cluster():
    """What stands behind the last cluster: the next one takes its place."""
    for writer, reader in (ours, qemu), (qemu, ours):
        create("a.qed", 20 * M)
        qemu("a.qed", "write -P 1 0 64k")
        with open("a.qed", "ab") as file:
            file.write(b"x" * 1000)
        writer("a.qed", "write -P 2 1M 100")
        reader("a.qed", "read -P 2 1M 100", "read -P 0 1048676 65436", "read -P 1 0 64k")
        clean("a.qed")


# --- damage ---------------------------------------------------------------------------------------------------

def damaged():
    create("a.qed", 20 * M, "cluster_size=4k", "table_size=2")
    qemu("a.qed", "write -P 1 0 64k", "write -P 2 10M 64k")
    put("a.qed", entry("a.qed", 3), 1 << 40)
    put("a.qed", entry("a.qed", 5), 4097)
    put("a.qed", 4096 + 8 * 4, 1 << 50)


def counts(out):
    """The numbers of a check, by word."""
    found = {}
    for line in out.splitlines():
        for word in "errors", "leaked clusters":
            if word in line and line.split()[0].isdigit():
                found[word] = int(line.split()[0])
    return found


@test
def damage_is_counted_alike():
    damaged()
    theirs = counts(run("qemu-img", "check", "a.qed", status=2))
    expect(theirs.get("errors") == 3, theirs)
    expect(counts(run(OXBOW, "check", "a.qed", status=2)) == theirs, "ours differs")


@test
def damage_is_repaired_alike():
    damaged()
    shutil.copy("a.qed", "b.qed")
    run("qemu-img", "check", "-q", "-r", "all", "a.qed", status=(0, 3))
    run(OXBOW, "check", "-q", "-r", "all", "b.qed", status=(0, 3))
    run("qemu-img", "compare", "-q", "-f", "qed", "-F", "qed", "a.qed", "b.qed")
    qemu("b.qed", "read -P 1 0 12k", "read -P 0 12k 4k", "read -P 1 16k 4k", "read -P 0 20k 4k",
         "read -P 2 10M 64k")


@test
def used_twice():
    """QEMU leaves such an image as it is; repaired by us it has nothing to say about it."""
    create("a.qed", 20 * M, "cluster_size=4k", "table_size=2")
    qemu("a.qed", "write -P 1 0 64k", "write -P 2 10M 64k")
    put("a.qed", entry("a.qed", 3), words("a.qed", entry("a.qed", 2560))[0])
    put("a.qed", 4096 + 8 * 4, words("a.qed", 4096)[0])
    run("qemu-img", "check", "a.qed", status=2)
    run(OXBOW, "check", "-q", "-r", "all", "a.qed", status=(0, 3))
    out = run("qemu-img", "check", "a.qed", status=3)  # the cluster that was cluster 3's is lost
    expect(counts(out) == {"leaked clusters": 1}, out)
    for tool in ours, qemu:
        tool("a.qed", "read -P 1 0 12k", "read -P 2 12k 4k", "read -P 1 16k 48k",
             "read -P 1 16M 12k", "read -P 2 16396k 4k", "read -P 2 10M 64k")
    ours("a.qed", "write -P 5 12k 4k")
    qemu("a.qed", "read -P 2 10M 64k", "read -P 2 16396k 4k")


@test
def what_others_know():
    """Features: unknown ones are refused, kept or cleared."""
    create("a.qed", 20 * M)
    put("a.qed", 16, 8)
    for tool in ours, qemu:
        tool("a.qed", "read 0 512", status=1)
    put("a.qed", 16, 0, 0x1234, 0x5678)
    ours("a.qed", "read 0 512", options=("-r",))
    expect(header("a.qed")[4:7] == (0, 0x1234, 0x5678), header("a.qed"))
    ours("a.qed", "write 0 512")
    expect(header("a.qed")[4:7] == (0, 0x1234, 0), header("a.qed"))
    clean("a.qed")


# --- chains ---------------------------------------------------------------------------------------------------

@test
def chains():
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "3000320")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 3000320", "base.raw")
    run(OXBOW, "create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", "mid.qed", "6M")
    qemu("mid.qed", "write -P 2 100k 300k", "write -z 1M 256k", "write -P 3 5M 1000")
    run("qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=16k", "-b", "mid.qed", "-F",
        "qed", "top.qed", "8M")
    ours("top.qed", "write -P 4 200k 10k", "zero 2M 64k", "zero 5000k 300k", "write -P 5 7M 10k")
    reads = ("read -P 1 0 100k", "read -P 2 100k 100k", "read -P 4 200k 10k", "read -P 2 210k 190k",
             "read -P 0 1M 256k", "read -P 0 2M 64k", "read -P 1 2112k 10k", "read -P 0 3000320 1M",
             "read -P 0 5000k 300k", "read -P 5 7M 10k")
    for tool in ours, qemu:
        tool("top.qed", *reads)
    clean("top.qed")
    # Over a longer backing file: what was behind the end stays there when it grows.
    run("qemu-img", "create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", "short.qed", "1049088")
    ours("short.qed", "read -P 1 0 1049088", "resize 4M", "read -P 1 0 1049088",
         "read -P 0 1049088 2000000")
    qemu("short.qed", "read -P 1 0 1049088", "read -P 0 1049088 2000000", "write -P 6 2M 1k")
    run("qemu-img", "resize", "-q", "-f", "qed", "short.qed", "5M")
    ours("short.qed", "read -P 0 1049088 1000k", "read -P 6 2M 1k", "write -P 7 5000k 10k")
    qemu("short.qed", "read -P 7 5000k 10k")
    clean("short.qed")
    run(OXBOW, "resize", "-q", "--shrink", "-f", "qed", "short.qed", "1M", status=1)


def main():
    print(f"1..{len(tests)}", flush=True)
    for number, function in enumerate(tests, 1):
        name = function.__name__.replace("_", " ")
        if not shutil.which("qemu-io") or not shutil.which("qemu-img"):
            print(f"ok {number} - {name} # SKIP there is no qemu-io", flush=True)
            continue
        folder = tempfile.mkdtemp(prefix="ox-qed-")
        os.chdir(folder)
        try:
            function()
            print(f"ok {number} - {name}", flush=True)
        except (Failed, subprocess.TimeoutExpired) as why:
            print(f"not ok {number} - {name}", flush=True)
            for line in str(why).splitlines():
                print("#", line, flush=True)
        finally:
            os.chdir("/")
            shutil.rmtree(folder)


main()
