#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""create, info, map, check and resize of images with metadata, against qemu-img: what one makes
the other describes in the same words, byte for byte.

Usage: map_check_cli.py [OXBOW]   (default: $OXBOW, else build/oxbow)
"""
import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time

from create_info import OXBOW, QEMU_IMG, QEMU_IO, Skip, both, expect, fails, main, run, same, succeeds

MIB = 1 << 20
tests = []


def test(function):
    tests.append(function)
    return function


def qemu_img(*args, **kwargs):
    """qemu-img, which has to succeed.  With a pass phrase it measures the processor, and on a busy
    machine fails at times."""
    for _ in range(4):
        result = run(QEMU_IMG, *args, **kwargs)
        if result.returncode == 0 or b"CPU" not in result.stderr:
            break
        time.sleep(0.2)
    if result.returncode != 0 and b"CPU" in result.stderr:
        raise Skip("qemu-img cannot measure the processor now")
    expect(result.returncode == 0, "qemu-img", args, result.stderr)
    return result.stdout


def qemu_io(fmt, name, *commands):
    args = [x for command in commands for x in ("-c", command)]
    result = run(QEMU_IO, "-f", fmt, *args, name)
    expect(result.returncode == 0 and b"failed" not in result.stdout, "qemu-io", commands,
           result.stdout, result.stderr)


def secret(name="key", text="a pass phrase"):
    with open(name, "w", encoding="ascii") as f:
        f.write(text)
    return "--object", f"secret,id=s,file={os.path.abspath(name)}"


def same_output(*args, status=0):
    """The same command by both: standard output and exit status."""
    ours, theirs = run(OXBOW, *args), run(QEMU_IMG, *args)
    same(ours.stdout.decode(), theirs.stdout.decode(),
         f"{args} (qemu-img is the second; {ours.stderr} {theirs.stderr})")
    same((ours.returncode, theirs.returncode), (status, status), f"status of {args}")
    return ours


def same_info(name, *args):
    for output in "human", "json":
        same_output("info", f"--output={output}", *args, name)


# --- create ----------------------------------------------------------------------------------

# Words in, and what the format is.
CREATED = [
    ("qcow2", []), ("qcow2", ["-o", "compat=0.10"]), ("qcow2", ["-o", "compat=v3"]),
    ("qcow2", ["-o", "cluster_size=512"]), ("qcow2", ["-o", "cluster_size=2M"]),
    ("qcow2", ["-o", "lazy_refcounts=on"]), ("qcow2", ["-o", "refcount_bits=1"]),
    ("qcow2", ["-o", "refcount_bits=64,cluster_size=4k"]),
    ("qcow2", ["-o", "extended_l2=on"]), ("qcow2", ["-o", "extended_l2=on,cluster_size=16k"]),
    ("qcow2", ["-o", "compression_type=zstd"]),
    ("qcow2", ["-o", "preallocation=metadata"]), ("qcow2", ["-o", "preallocation=falloc"]),
    ("qcow2", ["-o", "preallocation=full"]),
    ("qcow2", ["-o", "data_file=data.raw"]),
    ("qcow2", ["-o", "data_file=data.raw,data_file_raw=on"]),
    ("qcow2", ["-b", "base.raw", "-F", "raw", "-o", "extended_l2=off"]),
    ("qcow2", ["-b", "base.raw", "-F", "raw", "-o", "extended_l2=on"]),
    ("qcow2", ["-b", "ba,se.qcow2", "-F", "qcow2", "-o", "extended_l2=off"]),
    ("qcow2", ["-o", "backing_file=ba,,se.qcow2,backing_fmt=qcow2,extended_l2=off"]),
    ("qcow2", ["-u", "-b", "not there", "-F", "qcow2", "-o", "extended_l2=off"]),
    ("qed", []), ("qed", ["-o", "cluster_size=4k,table_size=2"]),
    ("qed", ["-o", "cluster_size=1M"]), ("qed", ["-b", "base.raw", "-F", "raw"]),
]


def make_bases():
    with open("base.raw", "wb") as f:
        f.truncate(7 * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "ba,se.qcow2", "6M")


def created(name):
    """What qemu-img says of a new image, without what may differ.  It looks for a data file in the
    working directory."""
    directory, name = os.path.split(name)
    info = json.loads(qemu_img("info", "-U", "--output=json", name, cwd=directory or "."))
    for key in "actual-size", "filename":
        del info[key]
    return info


@test
def create_prints_and_makes_what_qemu_img_does():
    for directory in "oxbow", "qemu":
        os.mkdir(directory)
        os.chdir(directory)
        make_bases()
        os.chdir("..")
    for fmt, options in CREATED:
        args = ["create", "-f", fmt, *options, "new,disk", "10M"]
        for name in "oxbow/data.raw", "qemu/data.raw":
            if os.path.exists(name):
                os.unlink(name)
        ours, theirs = both(*args)
        expect(theirs.returncode == 0, args, theirs.stderr)
        same(succeeds(ours).decode(), theirs.stdout.decode(), args)
        same(created("oxbow/new,disk"), created("qemu/new,disk"), args)
        if "not there" not in options:
            check = run(QEMU_IMG, "check", "-f", fmt, "new,disk", cwd="oxbow")
            same((check.returncode, check.stderr), (0, b""), f"check after {args}")
            read = run(QEMU_IO, "-f", fmt, "-c", "read -P 0 0 10M", "new,disk", cwd="oxbow")
            expect(b"read 10485760/10485760" in read.stdout, args, read.stdout, read.stderr)
        os.unlink("oxbow/new,disk")
        os.unlink("qemu/new,disk")


@test
def create_takes_the_backing_images_size():
    make_bases()
    for backing, fmt, size in ("base.raw", "raw", 7 * MIB), ("ba,se.qcow2", "qcow2", 6 * MIB):
        for own in "qcow2", "qed":
            text = succeeds(run(OXBOW, "create", "-f", own, "-b", backing, "-F", fmt, "over"))
            expect(f" size={size} ".encode() in text, text)
            same(created("over")["virtual-size"], size, (backing, own))
    # In another directory: relative to the new image, not to the working directory.
    os.mkdir("sub")
    succeeds(run(OXBOW, "create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "sub/x"))
    same(created("sub/x")["backing-filename"], "../base.raw", "name")
    same_info("sub/x")


@test
def create_chooses_subclusters_for_overlays():
    make_bases()
    overlay = ["-b", "base.raw", "-F", "raw"]
    for options, extended in (([], False), (overlay, True), (overlay + ["-o", "extended_l2=off"],
                                                             False),
                              (overlay + ["-o", "compat=0.10"], False)):
        result = run(OXBOW, "create", "-q", "-f", "qcow2", *options, "x", "10M")
        succeeds(result)
        data = created("x")["format-specific"]["data"]
        same(data.get("extended-l2", False), extended, options)
    expect(b"extended_l2=off" in run(OXBOW, "create", "--help").stdout, "help is silent")


@test
def create_encrypted():
    key = secret()
    for fmt, options, word in (
            ("luks", "key-secret=s,iter-time=10,cipher-alg=aes-128,cipher-mode=cbc,"
                     "ivgen-alg=plain64,hash-alg=sha1", ""),
            ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
             "encrypt.")):
        args = ["create", *key, "-f", fmt, "-o", options, "x", "4M"]
        ours, theirs = run(OXBOW, *args), None
        text = succeeds(ours)
        info = created("x")
        same_info("x")
        image = (f"driver={fmt},{word}key-secret=s,file.filename=x" if not word else
                 f"driver={fmt},{word}format=luks,{word}key-secret=s,file.filename=x")
        read = run(QEMU_IO, *key, "--image-opts", "-c", "write -P 5 0 64k", "-c",
                   "read -P 5 0 64k", image)
        expect(read.returncode == 0 and b"failed" not in read.stdout, "qemu-io:", read.stdout,
               read.stderr)
        os.unlink("x")
        theirs = qemu_img(*args)
        same(text, theirs, args)
        wanted = created("x")
        for each in info, wanted:
            data = each["format-specific"]["data"]
            data = data.get("encrypt", data)
            del data["uuid"], data["master-key-iters"], data["slots"][0]["iters"]
            # Of a plain container we align the data to 1 MiB, for today's disks.
            del data["payload-offset"]
        same(info, wanted, args)


@test
def create_lists_each_formats_options():
    for fmt in "qcow2", "qed", "luks":
        # Without the file system's own, and without AES, which is not for new images.
        theirs = qemu_img("create", "-f", fmt, "-o", "help", "x").decode()
        ours = succeeds(run(OXBOW, "create", "-f", fmt, "-o", "help", "x")).decode()
        own = "encryption", "nocow", "extent_size_hint"
        if fmt == "qed":
            own += ("preallocation",)  # the file's, and nothing to a file that grows by itself
        layout = lambda text: [line.split(" - ")[0] for line in text.splitlines()
                               if line.split("=")[0].strip() not in own]
        same(layout(ours), layout(theirs), fmt)
        for line in ours.splitlines()[1:]:
            expect(len(line.split(" - ")[1]) > 8, line, "says nothing")
        again = succeeds(run(OXBOW, "create", "-f", fmt, "-o", "help")).decode()
        same(again.splitlines(), [f"Supported {fmt} options:"] + ours.splitlines()[1:], fmt)
    expect(not os.path.exists("x"), "help made a file")


@test
def create_says_what_is_wrong_with_an_option():
    make_bases()
    create = lambda *args: run(OXBOW, "create", "-q", *args, "x", "1M")
    qcow2 = lambda *options: create("-f", "qcow2", *[a for o in options for a in ("-o", o)])
    fails(qcow2("clustersize=64k"), "cluster_size")
    fails(qcow2("cluster_size=65537"), "x", "cluster")
    fails(qcow2("cluster_size=4M"), "cluster")
    fails(qcow2("refcount_bits=3"), "refcount")
    fails(qcow2("compat=0.11"), "compat")
    fails(qcow2("lazy_refcounts=maybe"), "lazy_refcounts")
    fails(qcow2("preallocation=metdata"), "metadata")
    fails(qcow2("compression_type=lzo"), "compression_type")
    fails(qcow2("extended_l2=on,cluster_size=4k"), "extended_l2")
    fails(qcow2("data_file_raw=on"), "data_file")
    fails(qcow2("encrypt.format=luks"), "key-secret")
    fails(qcow2("encrypt.format=luks,encrypt.key-secret=s"), "there is no secret 's'")
    fails(qcow2("encrypt.format=aes,encrypt.key-secret=s"), "aes")
    fails(qcow2("lazy_refcounts"), "needs a value")
    fails(create("-f", "qed", "-o", "table_size=3"), "table_size")
    fails(create("-f", "luks"), "key-secret")
    fails(create("-f", "luks", "--object", "secret,id=s,data=secret", "-o", "key-secret=s"),
          "file=")
    fails(create("-f", "qcow2", "-b", "base.raw"), "backing format must be specified", "-F raw")
    fails(create("-f", "qcow2", "-b", "ba,se.qcow2"), "looks like qcow2", "-F qcow2")
    fails(create("-f", "qcow2", "-u", "-b", "nothing"), "backing format must be specified")
    fails(create("-f", "qcow2", "-b", "base.raw", "-F", "rwa"), "'rwa'", "did you mean raw")
    fails(create("-f", "qcow2", "-b", "nothing", "-F", "raw"), "nothing", "No such file")
    fails(create("-f", "qcow2", "-F", "raw"), "no backing file")
    fails(create("-b", "base.raw", "-F", "raw"), "raw images have no backing file")
    fails(create("-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", "backing_file=other"),
          "two backing files")
    fails(run(OXBOW, "create", "-f", "qcow2", "-u", "-b", "nothing", "-F", "raw", "x"), "SIZE is missing")
    expect(not os.path.exists("x"), "an image was made")
    fails(run(OXBOW, "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "base.raw"),
          "its own backing file")
    fails(run(OXBOW, "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "./base.raw"),
          "its own backing file")
    same(os.stat("base.raw").st_size, 7 * MIB, "base.raw")


# --- info ------------------------------------------------------------------------------------

@test
def info_of_what_qemu_img_made():
    make_bases()
    for fmt, options in CREATED:
        qemu_img("create", "-q", "-f", fmt, *options, "new,disk", "10M")
        same_info("new,disk")
        same_info("new,disk", "-f", fmt, "-U")
        if os.path.exists("data.raw"):
            os.unlink("data.raw")
    os.mkdir("sub")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "sub/x.qcow2")
    same_info("sub/x.qcow2")
    same_info(os.path.abspath("sub/x.qcow2"))


@test
def info_of_snapshots_bitmaps_and_marks():
    qemu_img("create", "-q", "-f", "qcow2", "s.qcow2", "10M")
    qemu_img("snapshot", "-c", "one", "s.qcow2")
    qemu_io("qcow2", "s.qcow2", "write 0 64k")
    qemu_img("snapshot", "-c", "a snapshot with a name that is longer than its column", "s.qcow2")
    qemu_img("snapshot", "-c", "größer", "s.qcow2")
    same_info("s.qcow2")
    qemu_img("bitmap", "--add", "s.qcow2", "b0")
    qemu_img("bitmap", "--add", "--disable", "-g", "4096", "s.qcow2", "b1")
    same_info("s.qcow2")
    # A snapshot of a running machine, as its table describes it: version 3's extra data.
    with open("s.qcow2", "r+b") as f:
        f.seek(60)
        count, offset = struct.unpack(">IQ", f.read(12))
        expect(count == 3, "snapshots")
        f.seek(offset + 24)
        f.write(struct.pack(">QI", 123456 * 10 ** 9 + 789 * 10 ** 6, 5 * MIB))
    same_info("s.qcow2")
    for feature, bit in ("dirty", 1), ("corrupt", 2):
        qemu_img("create", "-q", "-f", "qcow2", "m.qcow2", "1M")
        with open("m.qcow2", "r+b") as f:
            f.seek(72)
            f.write(struct.pack(">Q", bit))
        # qemu-img needs -U: it would repair what is dirty.
        expect(feature != "corrupt" or b"corrupt: true" in run(OXBOW, "info", "m.qcow2").stdout,
               "no mark")
        same_info("m.qcow2", "-U")
    qemu_img("create", "-q", "-f", "qed", "m.qed", "1M")
    with open("m.qed", "r+b") as f:
        f.seek(16)
        f.write(struct.pack("<Q", 2))
    # qemu-img 7.2 has the flag and does not show it.
    expect(b"cleanly shut down: no" in succeeds(run(OXBOW, "info", "m.qed")), "need-check")


def make_encrypted():
    """x.luks and x.qcow2, by us: qemu-img takes seconds."""
    key = secret()
    for fmt, options in (("luks", "key-secret=s,iter-time=10"),
                         ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,"
                                   "encrypt.iter-time=10")):
        succeeds(run(OXBOW, "create", "-q", *key, "-f", fmt, "-o", options, "x." + fmt, "1M"))
    return key


@test
def info_of_encrypted_images_needs_no_key():
    key = make_encrypted()
    for name in "x.luks", "x.qcow2":
        same_info(name)
        succeeds(run(OXBOW, "info", *key, name))


def make_chain():
    """three.qcow2 -> sub/two.qed -> sub/one.raw"""
    os.mkdir("sub")
    with open("sub/one.raw", "wb") as f:
        f.truncate(4 * MIB)
        f.write(b"x" * 70000)
    qemu_img("create", "-q", "-f", "qed", "-b", "one.raw", "-F", "raw", "sub/two.qed")
    qemu_io("qed", "sub/two.qed", "write -P 7 128k 8k", "write -z 1M 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "sub/two.qed", "-F", "qed", "three.qcow2", "6M")
    qemu_io("qcow2", "three.qcow2", "write -P 9 200k 90k", "write -z 2M 128k")


@test
def info_of_a_chain():
    make_chain()
    for output in "human", "json":
        same_output("info", f"--output={output}", "--backing-chain", "three.qcow2")
        same_output("info", f"--output={output}", "--backing-chain", "sub/one.raw")
        same_output("info", f"--output={output}", "three.qcow2")


# A header may name any file of the host.
@test
def names_in_headers_are_not_followed():
    os.mkdir("mine")
    os.mkdir("secret")
    with open("secret/file.raw", "wb") as f:
        f.truncate(MIB)
    for name in os.path.abspath("secret/file.raw"), "../secret/file.raw":
        qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "mine/x.qcow2")
        expect(name.encode() in succeeds(run(OXBOW, "info", "mine/x.qcow2")), "info")
        for args in ("info", "--backing-chain"), ("map",):
            fails(run(OXBOW, *args, "mine/x.qcow2"), "outside", "--allow-dir",
                  os.path.realpath("secret"))
            succeeds(run(OXBOW, *args, "--allow-dir", "secret", "mine/x.qcow2"))
            fails(run(OXBOW, *args, "--allow-dir", "mine", "mine/x.qcow2"), "--allow-dir")
    # Through a link, too.
    os.symlink(os.path.abspath("secret/file.raw"), "mine/link.raw")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "link.raw", "-F", "raw", "mine/x.qcow2")
    fails(run(OXBOW, "map", "mine/x.qcow2"), "--allow-dir")
    for name in ('json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}',
                 "nbd:localhost:1", "http://localhost/x"):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "mine/y.qcow2",
                 "1M")
        succeeds(run(OXBOW, "info", "mine/y.qcow2"))
        for args in ("info", "--backing-chain"), ("map",):
            fails(run(OXBOW, *args, "mine/y.qcow2"), "mine/y.qcow2", "refused")
    # Whatever it says, the message is one line.
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "nbd:\x1b[31m\nred", "-F", "raw", "y", "1M")
    fails(run(OXBOW, "map", "y"), "nbd:?[31m?red", "refused")
    # In circles.
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "1M")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "1M")
    fails(run(OXBOW, "info", "--backing-chain", "a.qcow2"), "chain")
    fails(run(OXBOW, "map", "a.qcow2"), "leads back to a.qcow2")
    # The data file as well.
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=" + os.path.abspath("secret/d.raw"),
             "mine/d.qcow2", "1M")
    succeeds(run(OXBOW, "info", "mine/d.qcow2"))
    succeeds(run(OXBOW, "check", "-q", "mine/d.qcow2"))
    fails(run(OXBOW, "map", "mine/d.qcow2"), "--allow-dir")
    succeeds(run(OXBOW, "map", "--allow-dir", "secret", "mine/d.qcow2"))


# --- locks -----------------------------------------------------------------------------------

@contextlib.contextmanager
def writer(fmt, name):
    """qemu-io with an image open for writing."""
    process = subprocess.Popen([QEMU_IO, "-f", fmt, name], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdin.write(b"read 0 512\n")
    process.stdin.flush()
    line = process.stdout.readline()
    while line and b"read 512/512" not in line:
        line = process.stdout.readline()
    expect(line, "qemu-io did not open", name)
    try:
        yield process.pid
    finally:
        process.stdin.close()
        process.stdout.read()
        process.wait()


@test
def an_image_in_use_needs_force_share():
    for fmt in "qcow2", "qed":
        name = "x." + fmt
        qemu_img("create", "-q", "-f", fmt, name, "1M")
        before = open(name, "rb").read()
        with writer(fmt, name) as pid:
            for args in ("info",), ("map",), ("check",), ("info", "-f", fmt):
                fails(run(OXBOW, *args, name), name, "in use", f"pid {pid}", "-U")
                same_output(*args, "-U", name)
            for args in (["check", "-r", "all", name], ["resize", name, "2M"],
                         ["create", "-q", "-f", fmt, name, "1M"]):
                fails(run(OXBOW, *args), name, "in use", f"pid {pid}")
            if fmt == "qcow2":
                same(open(name, "rb").read(), before, "content")
        fails(run(OXBOW, "check", "-r", "all", "-U", name), "-U")


# --- map -------------------------------------------------------------------------------------

def same_map(name, *args):
    for output in "human", "json":
        same_output("map", f"--output={output}", *args, name)


@test
def map_of_raw():
    with open("x.raw", "wb") as f:
        f.truncate(3 * MIB + 512)
        f.write(b"x" * 5000)
        f.seek(MIB)
        f.write(b"y" * 4096)
    same_map("x.raw")
    same_map("x.raw", "-f", "raw", "-s", "1M", "-l", "4k")
    open("empty.raw", "wb").close()
    same_map("empty.raw")


@test
def map_of_each_kind_of_cluster():
    for options in ("cluster_size=64k", "cluster_size=512", "cluster_size=2M", "compat=0.10",
                    "extended_l2=on,cluster_size=16k", "extended_l2=on", "data_file=d.raw",
                    "data_file=d.raw,data_file_raw=on", "preallocation=metadata",
                    "preallocation=falloc", "compression_type=zstd"):
        if os.path.exists("d.raw"):
            os.unlink("d.raw")
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "8M")
        same_map("x.qcow2")
        qemu_io("qcow2", "x.qcow2", "write -P 1 0 128k", "write -P 2 1M 3k", "write -P 3 1100k 1k",
                "write -z 256k 64k", "write -z 1030k 4k", "write -P 4 512k 64k", "discard 64k 64k",
                "write -P 4 8190k 2k", "discard 512k 16k")
        same_map("x.qcow2")
        for part in () if options != "cluster_size=64k" else (
                     ["-s", "64k"], ["-l", "1M"], ["-s", "100k", "-l", "1000k"], ["-s", "9M"],
                     ["--start-offset=8M"], ["--max-length=0"]):
            same_map("x.qcow2", *part)
        if "data_file" not in options and "preallocation" not in options:
            qemu_io("qcow2", "x.qcow2",
                    "write -c -P 5 4M " + ("2M" if "2M" in options else "128k"))
            same_output("map", "--output=json", "x.qcow2")
            fails_after_output(run(OXBOW, "map", "x.qcow2"), "compressed")


def fails_after_output(result, *words):
    same(result.returncode, 1, result.args)
    text = result.stderr.decode()
    expect(text.startswith("oxbow: ") and text.count("\n") == 1, text)
    for word in words:
        expect(word in text, word, "is missing in", text)


@test
def map_of_chains():
    make_chain()
    same_map("three.qcow2")
    same_map("sub/two.qed")
    # An overlay that is longer, and one that is shorter, with and without subclusters.
    for size in "5M", "9M":
        for extended in "off", "on":
            qemu_img("create", "-q", "-f", "qcow2", "-b", "three.qcow2", "-F", "qcow2", "-o",
                     f"extended_l2={extended}", "top.qcow2", size)
            qemu_io("qcow2", "top.qcow2", "write -P 1 66k 3k", "write -z 2100k 64k",
                    "discard 0 64k")
            same_map("top.qcow2")


@test
def map_of_qed():
    for options in "cluster_size=64k", "cluster_size=4k,table_size=2":
        qemu_img("create", "-q", "-f", "qed", "-o", options, "x.qed", "8M")
        same_map("x.qed")
        qemu_io("qed", "x.qed", "write -P 1 64k 1k", "write -z 256k 64k", "write 3M 300k")
        same_map("x.qed")


@test
def map_of_encrypted_images():
    key = make_encrypted()
    for name, image in (("x.luks", "driver=luks,key-secret=s,file.filename=x.luks"),
                        ("x.qcow2", "driver=qcow2,encrypt.key-secret=s,encrypt.format=luks,"
                                    "file.filename=x.qcow2")):
        written = run(QEMU_IO, *key, "--image-opts", "-c", "write 64k 64k", image)
        expect(written.returncode == 0, written.stdout)
        theirs = json.loads(qemu_img("map", *key, "--output=json", "--image-opts", image))
        ours = json.loads(succeeds(run(OXBOW, "map", *key, "--key-secret", "s", "--output=json",
                                       name)))
        same(ours, theirs, name)
        fails(run(OXBOW, "map", "--output=json", name), name, "key-secret")
        fails(run(OXBOW, "map", *key, "--key-secret", "t", name), "there is no secret 't'")
        fails(run(OXBOW, "map", *secret("wrong", "not it"), "--key-secret", "s", name), name)


@test
def map_says_what_is_wrong():
    fails(run(OXBOW, "map", "nothing"), "nothing", "No such file")
    fails(run(OXBOW, "map"), "FILE")
    fails(run(OXBOW, "map", "a", "b"), "'b'")
    fails(run(OXBOW, "map", "-s", "x", "a"), "--start-offset", "'x'")
    fails(run(OXBOW, "map", "-l", "-1", "a"), "--max-length", "'-1'")
    fails(run(OXBOW, "map", "--output=xml", "a"), "'xml'")
    fails(run(OXBOW, "map", "--max-lenth", "1", "a"), "--max-length")


# --- check -----------------------------------------------------------------------------------

def refcounts(name):
    """Where the refcounts of a new 64 KiB image's first clusters are."""
    with open(name, "rb") as f:
        f.seek(48)
        f.seek(struct.unpack(">Q", f.read(8))[0])
        return struct.unpack(">Q", f.read(8))[0]


def set_refcount(name, cluster, value):
    at = refcounts(name) + 2 * cluster
    with open(name, "r+b") as f:
        f.seek(at)
        f.write(struct.pack(">H", value))


def same_check(name, status, *args):
    for output in "human", "json":
        # Each on a copy, because a repair changes it.
        shutil.copy(name, "ours.img")
        shutil.copy(name, "theirs.img")
        ours = run(OXBOW, "check", f"--output={output}", *args, "ours.img")
        theirs = run(QEMU_IMG, "check", f"--output={output}", *args, "theirs.img")
        same((ours.returncode, theirs.returncode), (status, status),
             f"status of check {args} {name} {ours.stderr}")
        same(ours.stdout.decode(), theirs.stdout.decode().replace("theirs.img", "ours.img"),
             f"check {args} {name}")
        if not args:
            same(sorted(ours.stderr.decode().splitlines()),
                 sorted(theirs.stderr.decode().splitlines()), f"findings in {name}")


@test
def check_of_sound_images():
    make_bases()
    for fmt, options in CREATED:
        qemu_img("create", "-q", "-f", fmt, *options, "new", "10M")
        if "not there" not in options:
            qemu_io(fmt, "new", "write 0 100k", "write 3M 1k", "write -z 5M 64k")
        if "not there" in options:
            # The backing file is of no interest to a check; qemu-img opens it all the same.
            expect(b"No errors" in succeeds(run(OXBOW, "check", "new")), options)
            os.unlink("new")
            continue
        if os.path.exists("data.raw"):
            same_output("check", "new")
            os.unlink("new")
            os.unlink("data.raw")
            continue
        same_check("new", 0)
        os.unlink("new")


@test
def check_finds_leaks_and_damage():
    qemu_img("create", "-q", "-f", "qcow2", "x.qcow2", "4M")
    qemu_io("qcow2", "x.qcow2", "write 0 200k", "write 1M 64k", "write 2M 64k")
    shutil.copy("x.qcow2", "leak.qcow2")
    with open("leak.qcow2", "ab") as f:
        f.truncate(40 * 65536)
    set_refcount("leak.qcow2", 30, 1)
    same_check("leak.qcow2", 3)
    for what in "leaks", "all":
        same_check("leak.qcow2", 0, "-r", what)
    shutil.copy("x.qcow2", "bad.qcow2")
    set_refcount("bad.qcow2", 6, 0)
    same_check("bad.qcow2", 2)
    result = run(OXBOW, "check", "-r", "all", "bad.qcow2")
    same(result.returncode, 0, result.stdout + result.stderr)
    expect(b"The following inconsistencies were found and repaired:" in result.stdout,
           result.stdout)
    same_check("bad.qcow2", 0)
    # -q: the status and the findings alone.
    set_refcount("x.qcow2", 5, 3)
    quiet = run(OXBOW, "check", "-q", "x.qcow2")
    same((quiet.returncode, quiet.stdout), (2, b""), "quiet")
    expect(quiet.stderr, "no finding")


@test
def check_of_what_has_nothing_to_check():
    with open("x.raw", "wb") as f:
        f.truncate(MIB)
    result = run(OXBOW, "check", "x.raw")
    same((result.returncode, run(QEMU_IMG, "check", "x.raw").returncode), (63, 63), "status")
    expect(result.stderr.startswith(b"oxbow: ") and result.stderr.count(b"\n") == 1, result.stderr)
    # Names it, and does not open what it names.
    fails(run(OXBOW, "check", "nothing"), "nothing", "No such file")
    fails(run(OXBOW, "check", "-r", "some", "x.raw"), "'some'")
    fails(run(OXBOW, "check", "--output=xml", "x.raw"), "'xml'")


@test
def check_shows_progress():
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=512",
             "x.qcow2", "8M")
    out = succeeds(run(OXBOW, "check", "-p", "x.qcow2"))
    bar = out.split(b"\n")[0]
    steps = [s for s in bar.split(b"\r") if s]
    same((steps[0], steps[-1]), (b"    (0.00/100%)", b"    (100.00/100%)"), "ends")
    same(out.split(b"\n", 1)[1].decode(), succeeds(run(OXBOW, "check", "x.qcow2")).decode(), "rest")


# --- resize ----------------------------------------------------------------------------------

@test
def resize_of_formats():
    for fmt, options in (("qcow2", []), ("qcow2", ["-o", "extended_l2=on"]),
                         ("qcow2", ["-o", "cluster_size=4k"]), ("qed", [])):
        name = "x." + fmt
        qemu_img("create", "-q", "-f", fmt, *options, name, "8M")
        qemu_io(fmt, name, "write -P 5 7M 1M")
        for step in "+1M", "1G", "+512":
            same(succeeds(run(OXBOW, "resize", name, step)), b"Image resized.\n", step)
        same(created(name)["virtual-size"], (1 << 30) + 512, name)
        qemu_io(fmt, name, "read -P 5 7M 1M", "read -P 0 8M 1M", "write -P 6 1023M 1M")
        expect(run(QEMU_IMG, "check", name).returncode == 0, fmt, options)
        fails(run(OXBOW, "resize", name, "8M"), "--shrink")
        if fmt == "qcow2":
            succeeds(run(OXBOW, "resize", "--shrink", name, "7M"))
            same(created(name)["virtual-size"], 7 * MIB, name)
            expect(run(QEMU_IMG, "check", name).returncode == 0, fmt, options)
            # What was cut off is gone.
            succeeds(run(OXBOW, "resize", name, "8M"))
            qemu_io(fmt, name, "read -P 0 7M 1M")


@test
def resize_over_a_longer_backing_file():
    with open("base.raw", "wb") as f:
        f.write(b"x" * (2 * MIB))
    for fmt in "qcow2", "qed":
        name = "x." + fmt
        qemu_img("create", "-q", "-f", fmt, "-b", "base.raw", "-F", "raw", name, "1M")
        result = run(OXBOW, "resize", name, "3M")
        if fmt == "qed" and result.returncode == 1:
            continue
        succeeds(result)
        qemu_io(fmt, name, "read -P 120 0 1M", "read -P 0 1M 2M")


if __name__ == "__main__":
    if not QEMU_IO:
        def main(chosen):  # pylint: disable=function-redefined
            print("1..0 # SKIP qemu-io is not installed")
            return 0
    sys.exit(main(tests))
