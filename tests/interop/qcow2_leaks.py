#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""After an unclean end: what qemu-img finds are leaks and nothing else, and when the next writer has
closed the image there are none; what snapshots, compressed clusters and bitmaps refer to is whole.

Usage: qcow2_leaks.py IMGIO"""

import os
import shutil
import subprocess
import sys
import tempfile

IMGIO = os.path.abspath(sys.argv[1])
SHAPES = [
    ("64 KiB clusters", []),
    ("4 KiB clusters", ["cluster_size=4k"]),
    ("512 B clusters, 64-bit refcounts", ["cluster_size=512", "refcount_bits=64"]),
    ("1-bit refcounts", ["cluster_size=4k", "refcount_bits=1"]),
    ("2 MiB clusters", ["cluster_size=2M"]),
    ("subclusters, zstd", ["extended_l2=on", "compression_type=zstd"]),
    ("version 2", ["compat=0.10", "cluster_size=4k"]),
]


def run(args, env=None, ok=(0,)):
    done = subprocess.run(args, capture_output=True, text=True, env=env, check=False)
    if ok is not None and done.returncode not in ok:
        raise AssertionError(
            f"{' '.join(args)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def qemu_io(image, *commands):
    run(["qemu-io", "-f", "qcow2", image] + [a for c in commands for a in ("-c", c)])


def contents(image, name, directory):
    """The bytes of a snapshot, or of the disk."""
    out = os.path.join(directory, "out.raw")
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw"]
        + (["-l", name] if name else []) + [image, out])
    with open(out, "rb") as file:
        data = file.read()
    os.unlink(out)
    return data


def one(options, keep_run_dir, directory):
    image = os.path.join(directory, "disk.qcow2")
    run_dir = os.path.join(directory, "run")
    os.makedirs(run_dir, exist_ok=True)
    env = dict(os.environ, OXBOW_RUN_DIR=run_dir)
    snapshots = "refcount_bits=1" not in options
    run(["qemu-img", "create", "-f", "qcow2"] + (["-o", ",".join(options)] if options else [])
        + [image, "8M"])
    qemu_io(image, "write -P 1 0 3M", "write -c -P 2 4M 2M", "write -z 7M 64k")
    if snapshots:
        run(["qemu-img", "snapshot", "-c", "one", image])
        qemu_io(image, "write -P 3 1M 1M", "write -P 4 4M 1M", "discard 2M 512k")
        run(["qemu-img", "snapshot", "-c", "two", image])
    if "compat=0.10" not in options:
        run(["qemu-img", "bitmap", "--add", image, "marks"])
        qemu_io(image, "write -P 5 6M 128k")
    before = {name: contents(image, name, directory) for name in ("one", "two")} \
        if snapshots else {}
    # Writes and discards, a flush, and more that no table in the file shows yet.
    run([IMGIO, image, "write -P 6 0 1M", "discard 1M 128k", "flush", "write -P 7 5M 512k",
         "write -P 8 3M 64k", "kill"], env=env, ok=None)
    found = run(["qemu-img", "check", "-f", "qcow2", image], ok=(0, 3))
    if found.returncode == 3 and "ERROR" in found.stdout + found.stderr:
        raise AssertionError(found.stdout)
    if not keep_run_dir:
        shutil.rmtree(run_dir)
        os.makedirs(run_dir)
    # The next writer works on while the last one's leaks are looked for.
    run([IMGIO, image, "write -P 9 3M 512k", "flush", "discard 0 64k", "write -P 10 2M 256k"],
        env=env)
    if "compat=0.10" in options:
        # It has no place for the mark that the last writer did not close.
        run(["qemu-img", "check", "-f", "qcow2", image], ok=(0, 3))
    else:
        run(["qemu-img", "check", "-f", "qcow2", image])
    for name, data in before.items():
        if contents(image, name, directory) != data:
            raise AssertionError(f"snapshot {name} is not what it was")
    run([IMGIO, "-r", image, "read -P 6 256k 768k", "read -P 10 2M 256k", "read -P 9 3M 512k"],
        env=env)
    os.unlink(image)
    return found.returncode == 3


def main():
    if not shutil.which("qemu-img") or not shutil.which("qemu-io"):
        print("1..0 # SKIP qemu-img and qemu-io are not installed")
        return 0
    print(f"1..{len(SHAPES) * 2}")
    failed, number, leaky = 0, 0, 0
    for name, options in SHAPES:
        for keep in (True, False):
            number += 1
            directory = tempfile.mkdtemp(prefix="oxbow-leaks-",
                                         dir=os.environ.get("OXBOW_TEST_DIR", "/var/tmp"))
            how = "killed" if keep else "power cut"
            try:
                leaky += one(options, keep, directory)
                print(f"ok {number} - {name}, {how}")
            except AssertionError as error:
                failed += 1
                for line in str(error).splitlines():
                    print(f"# {line}")
                print(f"not ok {number} - {name}, {how}")
            finally:
                shutil.rmtree(directory)
            sys.stdout.flush()
    # Without leaks to find this test says nothing.
    if not failed and not leaky:
        print("Bail out! no image had leaks")
        return 1
    return 1 if failed else 0


sys.exit(main())
