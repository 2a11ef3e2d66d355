#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""`oxbow create` and `oxbow info` against qemu-img: same words in, same text and bytes out.

Usage: create_info.py [OXBOW]   (default: $OXBOW, else build/oxbow)
"""
import fcntl
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile

OXBOW = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OXBOW", "build/oxbow"))
QEMU_IMG = shutil.which("qemu-img")
QEMU_IO = shutil.which("qemu-io")

tests = []


class Skip(Exception):
    pass


def test(function):
    tests.append(function)
    return function


def run(program, *args, **kwargs):
    return subprocess.run([program, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=120, check=False, **kwargs)


def expect(ok, *what):
    if not ok:
        raise AssertionError(" ".join(str(w) for w in what))


def same(a, b, what):
    expect(a == b, f"{what}:\n  {a!r}\n  {b!r}")


def succeeds(result):
    expect(result.returncode == 0, "failed:", result.args, result.stderr)
    expect(result.stderr == b"", "complains:", result.args, result.stderr)
    return result.stdout


def fails(result, *words):
    """Exit status 1, and one sentence on standard error that has these words."""
    expect(result.returncode == 1, "status", result.returncode, result.args, result.stderr)
    text = result.stderr.decode(errors="replace")
    expect(text.startswith("oxbow: ") and text.count("\n") == 1 and text.endswith("\n"), repr(text))
    for word in words:
        expect(word in text, repr(word), "is missing in", repr(text))


def both(*args):
    """The same command by both programs, each in a directory of its own; (oxbow, qemu-img)."""
    for directory in "oxbow", "qemu":
        os.makedirs(directory, exist_ok=True)
    return run(OXBOW, *args, cwd="oxbow"), run(QEMU_IMG, *args, cwd="qemu")


@test
def create_prints_what_qemu_img_prints():
    for args in (["disk.raw", "1G"], ["disk.raw", "1000"], ["disk.raw", "1.5M"], ["disk.raw", "0"],
                 ["-f", "raw", "with space.raw", "10T"], ["-o", "size=3M", "disk.raw"],
                 ["-o", "preallocation=off", "disk.raw", "1M"],
                 ["-o", "preallocation=falloc", "disk.raw", "1M"],
                 ["-o", "preallocation=full", "disk.raw", "1M"],
                 ["-o", "preallocation=full,size=1M", "disk.raw"],
                 ["-q", "disk.raw", "1M"]):
        ours, theirs = both("create", *args)
        same(succeeds(ours), theirs.stdout, args)


@test
def create_makes_what_qemu_img_makes():
    for args in (["disk.raw", "1G"], ["disk.raw", "1000"], ["disk.raw", "0"],
                 ["-o", "preallocation=falloc", "disk.raw", "3M"],
                 ["-o", "preallocation=full", "disk.raw", "3M"]):
        succeeds(both("create", *args)[0])
        ours, theirs = os.stat("oxbow/disk.raw"), os.stat("qemu/disk.raw")
        same(ours.st_size, theirs.st_size, args)
        same(ours.st_mode, theirs.st_mode, args)
        if "-o" in args:
            expect(ours.st_blocks * 512 >= 3 << 20, args, "has too little space", ours.st_blocks)
        expect(run(QEMU_IMG, "compare", "-f", "raw", "-F", "raw", "oxbow/disk.raw",
                   "qemu/disk.raw").returncode == 0, args, "differs")
        os.unlink("oxbow/disk.raw")
        os.unlink("qemu/disk.raw")


@test
def create_replaces_what_was_there():
    with open("old.raw", "wb") as f:
        f.write(b"secret" * 1000)
    succeeds(run(OXBOW, "create", "-q", "old.raw", "1M"))
    with open("old.raw", "rb") as f:
        same(f.read(), bytes(1 << 20), "content")


@test
def create_shows_progress():
    out = succeeds(run(OXBOW, "create", "-p", "-o", "preallocation=full", "p.raw", "64M"))
    lines = out.split(b"\n")
    same(len(lines), 3, "lines")
    steps = [s for s in lines[1].split(b"\r") if s]
    same(steps[0], b"    (0.00/100%)", "first")
    same(steps[-1], b"    (100.00/100%)", "last")
    expect(len(steps) > 2, "no step between", steps)
    percent = [float(s.split(b"(")[1].split(b"/")[0]) for s in steps]
    same(percent, sorted(percent), "order")
    same(succeeds(run(OXBOW, "create", "-p", "-q", "p.raw", "1M")), b"", "quiet")


@test
def create_lists_its_options():
    ours = succeeds(run(OXBOW, "create", "-o", "help", "disk.raw")).decode()
    theirs = run(QEMU_IMG, "create", "-f", "raw", "-o", "help", "disk.raw").stdout.decode()
    for line in ours.splitlines():
        expect(line in theirs.splitlines(), repr(line), "is not qemu-img's")
    expect("preallocation=" in ours and "size=" in ours, ours)
    expect(not os.path.exists("disk.raw"), "help made the file")


@test
def create_says_what_is_wrong():
    create = lambda *args: run(OXBOW, "create", *args)
    fails(create("-f", "rwa", "x", "1M"), "'rwa'", "did you mean raw")
    fails(create("-f", "vmdk", "x", "1M"), "vmdk is recognised and not supported")
    fails(create("-o", "prealocation=full", "x", "1M"), "did you mean preallocation")
    fails(create("-o", "preallocation=fall", "x", "1M"), "'fall'", "full")
    fails(create("-o", "preallocation", "x", "1M"), "needs a value")
    fails(create("x"), "SIZE is missing")
    fails(create(), "FILE", "missing")
    fails(create("x", "1M", "y"), "'y'")
    fails(create("x", "1Q"), "'1Q'")
    fails(create("x", "-1"), "")
    fails(create("x", "99999999999999999999"), "size")
    fails(create("-o", "size=1M", "x", "2M"), "two sizes")
    fails(create("--optoins", "x", "1M"), "--options")
    for name in "x", "y":
        expect(not os.path.exists(name), name, "was made")
    os.mkdir("dir")
    fails(create("-q", "dir", "1M"), "dir", "directory")
    fails(create("-q", "no/such/x", "1M"), "no/such/x", "No such file")


@test
def create_leaves_nothing_half_made():
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    for prealloc in "off", "falloc", "full":
        result = run(OXBOW, "create", "-q", "-o", f"preallocation={prealloc}", "half.raw", "8M",
                     preexec_fn=limit)
        fails(result, "half.raw")
        expect(not os.path.exists("half.raw"), prealloc, "left a file")


@test
def info_prints_what_qemu_img_prints():
    names = ["plain.raw", "with space.raw", "grüße.raw", 'quo"te\\.raw', "tab\t.raw"]
    sizes = [0, 1, 511, 512, 513, 1000, 1023 * 512, 1536, 1 << 20, 999999999, 123456789 * 512,
             (1 << 30) + 512, 10 << 40]
    for i, size in enumerate(sizes):
        name = names[i % len(names)]
        with open(name, "wb") as f:
            f.truncate(size)
            if size > 8192:
                f.write(b"x" * (5000 * (i + 1)))
        for args in ([], ["-f", "raw"], ["-U"], ["--output=human"], ["--output=json"]):
            same(succeeds(run(OXBOW, "info", *args, name)).decode(),
                 run(QEMU_IMG, "info", *args, name).stdout.decode(), f"{args} {name} {size}")
        os.unlink(name)


@test
def info_of_preallocated_images():
    for prealloc in "off", "falloc", "full":
        succeeds(run(OXBOW, "create", "-q", "-o", f"preallocation={prealloc}", "pre.raw", "5M"))
        same(succeeds(run(OXBOW, "info", "--output=json", "pre.raw")),
             run(QEMU_IMG, "info", "--output=json", "pre.raw").stdout, prealloc)


@test
def info_is_json_for_any_name():
    name = b"bytes\xff\xfe.raw"
    with open(name, "wb") as f:
        f.truncate(4096)
    answer = json.loads(succeeds(run(OXBOW, "info", "--output=json", name)))
    same(answer["filename"], "bytes\ufffd\ufffd.raw", "name")
    same(answer["virtual-size"], 4096, "size")


@test
def info_knows_the_other_formats():
    made = {"qcow": [], "vmdk": [], "vdi": [], "vpc": [], "vhdx": [], "parallels": []}
    for fmt, options in made.items():
        result = run(QEMU_IMG, "create", "-q", "-f", fmt, *options, "x." + fmt, "1M")
        expect(result.returncode == 0, fmt, result.stderr)
        same(json.loads(run(QEMU_IMG, "info", "--output=json", "x." + fmt).stdout)["format"], fmt,
             "qemu-img")
        fails(run(OXBOW, "info", "x." + fmt), f"format {fmt} is recognised and not supported")
        fails(run(OXBOW, "info", "-f", fmt, "x." + fmt), f"format {fmt} is recognised")
        expect(b"file format: raw" in succeeds(run(OXBOW, "info", "-f", "raw", "x." + fmt)), fmt)
    for subformat in ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse",
                      "twoGbMaxExtentFlat", "streamOptimized"):
        expect(run(QEMU_IMG, "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}",
                   "x.vmdk", "1M").returncode == 0, subformat)
        fails(run(OXBOW, "info", "x.vmdk"), "format vmdk is recognised")
        for name in os.listdir("."):
            if name.startswith("x-"):
                os.unlink(name)
        os.unlink("x.vmdk")


@test
def info_says_what_is_wrong():
    fails(run(OXBOW, "info", "nothing.raw"), "nothing.raw", "No such file")
    fails(run(OXBOW, "info"), "FILE")
    fails(run(OXBOW, "info", "a", "b"), "'b'")
    fails(run(OXBOW, "info", "--output=xml", "a"), "'xml'")
    fails(run(OXBOW, "info", "-f", "qcow3", "a"), "qcow2")
    fails(run(OXBOW, "info", "."), "directory")


class Holder:
    """qemu-io with an image open."""

    def __init__(self, name, *options):
        self.process = subprocess.Popen([QEMU_IO, "-f", "raw", *options, name],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)
        # Its answer proves that the image is open.
        self.process.stdin.write(b"read 0 512\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and b"read 512/512" not in line:
            line = self.process.stdout.readline()
        expect(line, "qemu-io did not open", name)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        self.process.wait()


@test
def a_writer_keeps_its_image():
    if not QEMU_IO:
        raise Skip("qemu-io is not installed")
    with open("held.raw", "wb") as f:
        f.write(b"precious" * 512)
    with Holder("held.raw"):
        # A raw image's size is told while a guest runs.
        same(succeeds(run(OXBOW, "info", "held.raw")),
             run(QEMU_IMG, "info", "held.raw").stdout, "without -U")
        same(succeeds(run(OXBOW, "info", "-U", "held.raw")),
             run(QEMU_IMG, "info", "-U", "held.raw").stdout, "-U")
        fails(run(OXBOW, "create", "-q", "held.raw", "1M"), "held.raw", "in use")
        with open("held.raw", "rb") as f:
            same(f.read(), b"precious" * 512, "content")
    succeeds(run(OXBOW, "info", "held.raw"))


@test
def a_reader_shares_with_readers_only():
    with open("held.raw", "wb+") as f:
        f.write(b"precious" * 512)
        f.flush()
        # As a guest's read-only disk: reads (100), shares neither writing (201) nor resizing (203).
        for byte in 100, 201, 203:
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(f, 37, lock)  # F_OFD_SETLK
        succeeds(run(OXBOW, "info", "held.raw"))
        fails(run(OXBOW, "create", "-q", "held.raw", "1M"), "held.raw", "in use")
        same(os.stat("held.raw").st_size, 4096, "size")


@test
def a_block_device_keeps_its_size():
    with open("backing", "wb") as f:
        f.truncate(4 << 20)
    setup = run("losetup", "-f", "--show", "backing")
    if setup.returncode != 0:
        raise Skip("no loop device: " + setup.stderr.decode().strip())
    device = setup.stdout.decode().strip()
    try:
        same(succeeds(run(OXBOW, "info", "--output=json", device)),
             run(QEMU_IMG, "info", "--output=json", device).stdout, "info")
        succeeds(run(OXBOW, "create", "-q", device, "4M"))
        succeeds(run(OXBOW, "create", "-q", device, "1M"))
        fails(run(OXBOW, "create", "-q", device, "5M"), device)
        same(json.loads(succeeds(run(OXBOW, "info", "--output=json", device)))["virtual-size"],
             4 << 20, "size")
    finally:
        run("losetup", "-d", device)


def main(chosen=None):
    """Runs the tests of this file, or those of another that uses its helpers."""
    chosen = tests if chosen is None else chosen
    print(f"1..{len(chosen)}")
    failed = 0
    for number, function in enumerate(chosen, 1):
        name = function.__name__.replace("_", " ")
        work = tempfile.mkdtemp(prefix="ox-create-info-")
        os.chdir(work)
        os.environ["OXBOW_RUN_DIR"] = os.path.join(work, "run")
        try:
            if not QEMU_IMG:
                raise Skip("qemu-img is not installed")
            function()
            print(f"ok {number} - {name}", flush=True)
        except Skip as why:
            print(f"ok {number} - {name} # SKIP {why}", flush=True)
        except Exception as why:  # pylint: disable=broad-except
            failed += 1
            print(f"not ok {number} - {name}", flush=True)
            for line in f"{type(why).__name__}: {why}".splitlines():
                print(f"# {line}", flush=True)
        finally:
            os.chdir("/")
            shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
