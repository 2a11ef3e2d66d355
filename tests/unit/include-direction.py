#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Includes point down only (docs/architecture.md, section 2), and every header stands alone.

A file of src/A may include headers of A and of the folders that A may use, of include/oxbow,
and of the system.  Public headers include each other and the system only.  Prints TAP.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Which folders a folder may use besides itself.
BELOW = {
    "base": [],
    "engine": ["base"],
    "store": ["base", "engine"],
    "image": ["base", "engine", "store"],
    "disk": ["base", "engine", "store", "image"],
    "virtio": ["base"],
    "export": ["base", "engine", "store", "image", "disk", "virtio"],
    "control": ["base", "engine", "store", "image", "disk", "virtio", "export"],
    "cli": ["base", "engine", "store", "image", "disk", "virtio", "export", "control"],
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)


def includes(path):
    text = path.read_text(encoding="utf-8")
    for found in INCLUDE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield line, found.group(1), found.group(2)


def sources(folder):
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".c", ".h", ".S"))


def wrong_includes(folder):
    allowed = [folder] + BELOW[folder]
    wrong = []
    for path in sources(f"src/{folder}"):
        for line, quote, name in includes(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            part = name.split("/")[0]
            if quote == "<":
                if (ROOT / "src" / name).is_file():
                    wrong.append(f"{where}: our own <{name}> in angle brackets")
            elif name == "oxbow-config.h":
                pass
            elif not (ROOT / "src" / name).is_file():
                wrong.append(f'{where}: "{name}" is not a path below src/')
            elif part not in allowed:
                wrong.append(f'{where}: {folder} may not use {part} ("{name}")')
    return wrong


def wrong_public():
    wrong = []
    for path in sources("include"):
        for line, quote, name in includes(path):
            if quote == '"' or (ROOT / "src" / name).is_file():
                where = f"{path.relative_to(ROOT)}:{line}"
                wrong.append(f"{where}: a public header may not use {name}")
    return wrong


def unlisted_folders():
    return [
        f"src/{p.name} is not in the list of {pathlib.Path(__file__).name}"
        for p in sorted((ROOT / "src").iterdir())
        if p.name not in BELOW and sources(f"src/{p.name}")
    ]


def stands_alone(path):
    """Compiles a header as if it were a source."""
    command = [os.environ.get("CC", "cc"), "-std=gnu17", "-D_GNU_SOURCE", "-D_FILE_OFFSET_BITS=64"]
    command += ["-fsyntax-only", "-I", str(ROOT / "include"), "-I", str(ROOT / "src")]
    done = subprocess.run(command + ["-x", "c", str(path)], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return lines[:3] or ["does not compile"] if done.returncode else []


def headers_alone():
    headers = [p for p in sources("include") + sources("src") if p.suffix == ".h"]
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [line for lines in pool.map(stands_alone, headers) for line in lines]


def self_test():
    """The rule can fail: an upward include is seen."""
    assert "disk" not in BELOW["engine"] and "engine" in BELOW["disk"]
    assert [m.group(2) for m in INCLUDE.finditer('\n # include "disk/disk.h"\n')] == ["disk/disk.h"]


def main():
    self_test()
    tests = [(f"src/{name} includes downwards only", wrong_includes(name)) for name in BELOW]
    tests.append(("public headers use public headers only", wrong_public()))
    tests.append(("every folder of src has its place", unlisted_folders()))
    tests.append(("every header compiles alone", headers_alone()))
    print(f"1..{len(tests)}")
    failed = False
    for number, (name, wrong) in enumerate(tests, 1):
        print(f"{'not ok' if wrong else 'ok'} {number} - {name}")
        for line in wrong:
            print(f"# {line}")
        failed |= bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
