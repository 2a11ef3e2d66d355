#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUKS volumes both ways with QEMU, and cryptsetup as a witness: who makes, who writes, who reads.

Usage: luks.py OXBOW IMGIO

QEMU takes seconds to make a volume, whatever iter-time says: it makes few, unless OXBOW_LONG is
set.
"""
import json
import os
import shutil
import sys
import time

from create_info import OXBOW, QEMU_IMG, QEMU_IO, Skip, expect, fails, main, run, same, succeeds

IMGIO = os.path.abspath(sys.argv[2])
CRYPTSETUP = shutil.which("cryptsetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
MIB = 1 << 20
PHRASE = b"correct horse"
QUICK = "key-secret=sec0,iter-time=10"
# cipher-alg, cipher-mode, ivgen-alg, ivgen-hash-alg, hash-alg; "": the default
CIPHERS = [
    ("", "", "", "", ""),
    ("aes-128", "xts", "plain64", "", "sha1"),
    ("aes-256", "xts", "plain", "", "sha512"),
    ("aes-256", "xts", "plain64", "sha1", "sha384"),
    ("aes-128", "xts", "essiv", "sha256", "sha256"),
    ("aes-256", "cbc", "essiv", "sha256", "sha256"),
    ("aes-128", "cbc", "essiv", "", "sha224"),
    ("aes-128", "cbc", "plain64", "", "sha1"),
    ("aes-256", "cbc", "plain", "", "sha256"),
]

# Of them, what QEMU makes too.
QEMU_MAKES = CIPHERS if "OXBOW_LONG" in os.environ else [CIPHERS[1], CIPHERS[5]]
# cryptsetup cannot measure for less than seconds, but can be told.
FORMAT = "luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", \
    "phrase"

tests = []


def test(function):
    tests.append(function)
    return function


def words(cipher):
    names = "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg"
    return ",".join([QUICK] + [f"{n}={v}" for n, v in zip(names, cipher) if v])


def secret(name="phrase", content=PHRASE, more=""):
    with open(name, "wb") as file:
        file.write(content)
    return "--object", f"secret,id=sec0,file={name}{more}"


def create(program, options, name, size, *more):
    """QEMU measures the processor's time, which on some machines fails now and then."""
    for _ in range(20):
        result = run(program, "create", "-q", "-f", "luks", *secret(), "-o", options, *more, name,
                     size)
        if result.returncode == 0 or b"CPU usage" not in result.stderr or program == OXBOW:
            break
        time.sleep(0.05)
    expect(result.returncode == 0, program, options, result.stderr)


def opts(name):
    return f"driver=luks,file.filename={name},key-secret=sec0"


def qemu_io(name, *commands):
    args = [x for command in commands for x in ("-c", command)]
    result = run(QEMU_IO, *secret(), "--image-opts", opts(name), *args)
    text = result.stdout + result.stderr
    expect(result.returncode == 0 and b"failed" not in text and b"error" not in text.lower(),
           "qemu-io", commands, text)


def imgio(name, *commands):
    secret()
    return succeeds(run(IMGIO, "--secret", "phrase", "-f", "luks", name, *commands)).decode()


def qemu_content(name, out):
    succeeds(run(QEMU_IMG, "convert", *secret(), "--image-opts", opts(name), "-O", "raw", out))


def cryptsetup(*args, status=0):
    if not CRYPTSETUP:
        raise Skip("cryptsetup is not installed")
    result = run(CRYPTSETUP, *args)
    expect(result.returncode == status, "cryptsetup", args, result.returncode, result.stderr)
    return result.stdout.decode()


def same_info(name):
    ours, theirs = (json.loads(succeeds(run(p, "info", "--output=json", name)))
                    for p in (OXBOW, QEMU_IMG))
    same(ours, theirs, f"info of {name}")
    ours, theirs = (succeeds(run(p, "info", name)).decode() for p in (OXBOW, QEMU_IMG))
    same(ours, theirs, f"info of {name} as text")
    return json.loads(succeeds(run(OXBOW, "info", "--output=json", name)))


def exchange(name):
    """QEMU writes, we read and write, QEMU reads and writes, and the whole disk is compared."""
    qemu_io(name, "write -P 0x11 0 1M", "write -P 0x22 1M 512", "write -P 0x33 3M 1M")
    imgio(name, "read -P 0x11 0 1M", "read -P 0x22 1M 512", "read -P 0x33 3M 1M",
          "write -P 0x44 512 512", "write -P 0x55 2M 300000", "write -P 0x66 3145729 77")
    qemu_io(name, "read -P 0x11 0 512", "read -P 0x44 512 512", "read -P 0x11 1k 1023k",
            "read -P 0x55 2M 300000", "read -P 0x33 3M 1", "read -P 0x66 3145729 77",
            "write -P 0x77 1000 5000")
    qemu_content(name, "content")
    imgio(name, "compare-raw content")


@test
def what_qemu_makes_both_read_and_write():
    for cipher in QEMU_MAKES:
        create(QEMU_IMG, words(cipher), "q.luks", "4M")
        exchange("q.luks")
        info = same_info("q.luks")
        expect(info["encrypted"], info)
        os.unlink("q.luks")


@test
def what_we_make_both_read_and_write():
    for cipher in CIPHERS:
        create(OXBOW, words(cipher), "o.luks", "4M")
        same(os.stat("o.luks").st_size % MIB, 0, "aligned")
        exchange("o.luks")
        same_info("o.luks")
        os.unlink("o.luks")


@test
def cryptsetup_opens_what_we_make():
    for cipher in CIPHERS:
        create(OXBOW, words(cipher), "o.luks", "1M")
        cryptsetup("isLuks", "--type", "luks1", "o.luks")
        text = cryptsetup("luksDump", "o.luks")
        expect("Cipher name:   \taes" in text and "Key Slot 0: ENABLED" in text, text)
        # Not what it leaves to the kernel, or a hash that means nothing.
        if cipher[:3] != ("aes-256", "xts", "plain64"):
            cryptsetup("open", "--test-passphrase", "--key-file", "phrase", "o.luks")
        os.unlink("o.luks")


@test
def we_open_what_cryptsetup_makes():
    for args in ([], ["-c", "aes-cbc-essiv:sha256", "-s", "256", "-h", "sha1"],
                 ["-c", "aes-cbc-plain64", "-s", "192"], ["-c", "aes-xts-plain64", "-s", "256"],
                 ["--align-payload", "8"]):
        secret()
        with open("c.luks", "wb") as file:
            file.truncate(6 * MIB)
        cryptsetup(*FORMAT, *args, "c.luks")
        imgio("c.luks", "write -P 9 0 1M", "read -P 9 0 1M")
        if "192" not in args:  # QEMU ends on such a volume
            qemu_io("c.luks", "read -P 9 0 1M")
            same_info("c.luks")


@test
def the_phrase_may_be_in_another_slot():
    create(OXBOW, QUICK, "o.luks", "1M")
    imgio("o.luks", "write -P 5 0 1M")
    with open("second", "wb") as file:
        file.write(b"battery staple")
    cryptsetup("luksAddKey", "-q", "--pbkdf-force-iterations", "1000", "--key-slot", "6",
               "--key-file", "phrase", "o.luks", "second")
    imgio("o.luks", "read -P 5 0 1M")
    succeeds(run(IMGIO, "--secret", "second", "o.luks", "read -P 5 0 1M"))
    same(same_info("o.luks")["format-specific"]["data"]["slots"][6]["active"], True, "slot 6")
    cryptsetup("luksKillSlot", "-q", "--key-file", "second", "o.luks", "0")
    succeeds(run(IMGIO, "--secret", "second", "o.luks", "read -P 5 0 1M"))
    refused("o.luks", "phrase", "wrong pass phrase")


def refused(name, phrase, *says):
    args = ["--secret", phrase] if phrase else []
    result = run(IMGIO, *args, name, "read 0 512")
    expect(result.returncode == 1, name, "was read", result.stderr)
    for text in says:
        expect(text in result.stderr.decode(), text, "is missing in", result.stderr)


@test
def what_cannot_be_opened_is_said():
    create(OXBOW, QUICK, "o.luks", "1M")
    with open("wrong", "wb") as file:
        file.write(PHRASE + b"\n")
    refused("o.luks", "wrong", "wrong pass phrase")
    refused("o.luks", None, "it is encrypted", "--object secret,id=sec0,file=PATH")
    fails(run(OXBOW, "map", "o.luks"), "it is encrypted")
    fails(run(OXBOW, "map", "--object", "secret,id=sec0,data=x", "--key-secret", "sec0", "o.luks"),
          "read by everybody")
    with open("o.luks", "r+b") as file:
        file.truncate(MIB)
    refused("o.luks", "phrase", "LUKS header")


@test
def what_is_not_supported_is_said_and_described():
    secret()
    for args, says in ((["-h", "ripemd160"], "hash ripemd160 is not supported"),
                       (["-h", "whirlpool"], "hash whirlpool is not supported"),
                       (["-c", "serpent-xts-plain64"], "cipher serpent is not supported"),
                       (["-c", "aes-lrw-benbi", "-s", "384"], "does not fit")):
        with open("c.luks", "wb") as file:
            file.truncate(6 * MIB)
        # What the kernel or the build of cryptsetup lacks, another host's has.
        if run(CRYPTSETUP or "false", *FORMAT, *args, "c.luks").returncode == 0:
            refused("c.luks", "phrase", says)
            if "ripemd160" in args:
                same_info("c.luks")
            elif "384" not in args:  # QEMU does not tell what it cannot read
                expect("luks" in succeeds(run(OXBOW, "info", "c.luks")).decode(), args)
    with open("two.luks", "wb") as file:
        file.truncate(20 * MIB)
    cryptsetup("luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2",
               "--pbkdf-force-iterations", "1000", "--key-file", "phrase", "two.luks")
    refused("two.luks", "phrase", "LUKS version 2 is not supported")


@test
def zeroes_are_encrypted_and_discards_keep():
    create(OXBOW, QUICK, "o.luks", "4M")
    imgio("o.luks", "write -P 1 0 4M", "zero 1M 1M", "zero -u 2M 512", "zero 1000 100",
          "discard 3M 1M")
    qemu_io("o.luks", "read -P 1 0 1000", "read -P 0 1000 100", "read -P 1 1100 1047476",
            "read -P 0 1M 1M", "read -P 0 2M 512", "read -P 1 3M 1M")
    with open("o.luks", "rb") as file:
        payload = file.read()[2 * MIB:]
    expect(not any(payload[at:at + 512] == bytes(512) for at in range(0, len(payload), 512)),
           "a sector of zeroes lies in the volume")
    qemu_io("o.luks", "write -z 0 1M", "discard 2M 1M")
    imgio("o.luks", "read -P 0 0 1M")


@test
def sizes_change():
    create(OXBOW, QUICK, "o.luks", "1M")
    imgio("o.luks", "write -P 3 0 1M", "resize 2M", "write -P 4 1M 1M")
    same(same_info("o.luks")["virtual-size"], 2 * MIB, "size")
    qemu_io("o.luks", "read -P 3 0 1M", "read -P 4 1M 1M")
    succeeds(run(QEMU_IMG, "resize", "-q", *secret(), "--image-opts", opts("o.luks"), "3M"))
    imgio("o.luks", "read -P 3 0 1M", "read -P 4 1M 1M", "write -P 5 2M 1M")
    qemu_io("o.luks", "read -P 5 2M 1M")


@test
def creation_takes_the_same_words():
    for more in "", ",preallocation=falloc", ",preallocation=full", ",cipher-alg=aes-128":
        args = ["create", "-f", "luks", *secret(), "-o", QUICK + more, "x.luks", "1000000"]
        ours = run(OXBOW, *args)
        stat = os.stat("x.luks")
        same(stat.st_size, 2 * MIB + 1000448, "size")
        if "prealloc" in more:
            expect(stat.st_blocks * 512 >= stat.st_size, more, "has too little space")
        # It prints its line before it fails.
        args[-2] = "no/x.luks"
        theirs = run(QEMU_IMG, *args)
        same(succeeds(ours), theirs.stdout.replace(b"no/x.luks", b"x.luks"), args)
    args = ["create", "-f", "luks", *secret()]
    fails(run(OXBOW, *args, "y.luks", "1M"), "key-secret=sec0")
    fails(run(OXBOW, *args, "-o", "key-secret=sec1", "y.luks", "1M"), "no secret 'sec1'")
    fails(run(OXBOW, *args, "-o", QUICK + ",cipher-alg=aes-192", "y.luks", "1M"), "aes-192")
    fails(run(OXBOW, *args, "-o", QUICK + ",cipher-mode=ecb", "y.luks", "1M"), "'ecb'")
    fails(run(OXBOW, *args, "-o", QUICK, "-b", "x.luks", "-F", "luks", "y.luks", "1M"), "backing")
    expect(not os.path.exists("y.luks"), "y.luks was made")


@test
def a_secret_comes_from_where_it_is_kept():
    def make(*more, **kwargs):
        succeeds(run(OXBOW, "create", "-q", "-f", "luks", *more, "-o", QUICK, "o.luks", "1M",
                     **kwargs))
        refused_by = run(QEMU_IO, *secret(), "--image-opts", opts("o.luks"), "-c", "read 0 512")
        expect(refused_by.returncode == 0, "another pass phrase was used", refused_by.stderr)
        os.unlink("o.luks")

    make("--object", "secret,id=sec0,fd=0", input=PHRASE)
    secret("encoded", b"Y29ycmVjdCBob3JzZQ==\n")
    make("--object", "secret,id=sec0,file=encoded,format=base64")
    os.mkdir("credentials")
    secret("credentials/disk")
    make("--object", "secret,id=sec0,credential=disk",
         env=dict(os.environ, CREDENTIALS_DIRECTORY=os.path.abspath("credentials")))


@test
def a_guest_may_not_turn_a_guessed_raw_image_into_a_volume():
    create(OXBOW, QUICK, "o.luks", "1M")
    with open("disk.raw", "wb") as file:
        file.truncate(4 * MIB)
    result = run(IMGIO, "disk.raw", "import o.luks 0 512")
    expect(result.returncode == 1 and b"not permitted" in result.stderr, result)
    succeeds(run(IMGIO, "-f", "raw", "disk.raw", "import o.luks 0 512"))


if __name__ == "__main__":
    if not QEMU_IO:
        print("1..0 # SKIP qemu-io is not installed")
        sys.exit(0)
    sys.exit(main(tests))
