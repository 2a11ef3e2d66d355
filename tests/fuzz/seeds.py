#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the valid inputs that the fuzz targets' corpora begin with.

    tests/fuzz/seeds.py DIRECTORY     writes DIRECTORY/TARGET/seed-NAME

The kept corpora hold these and what fuzzing found; to make one anew:

    tests/fuzz/seeds.py /tmp/seeds
    build-fuzz/tests/fuzz/fuzz_TARGET -max_total_time=600 /tmp/work /tmp/seeds/TARGET
    build-fuzz/tests/fuzz/fuzz_TARGET -merge=1 tests/fuzz/corpus/TARGET /tmp/work /tmp/seeds/TARGET
"""

import os
import struct
import subprocess
import sys
import zlib

N, W, I = 1, 2, 4  # descriptor flags: next, write, indirect
PACKED, EVENT_IDX, INDIRECT, LOG, INFLIGHT, GIVEN = 1, 2, 4, 8, 16, 32


def put(out, target, name, data):
    folder = os.path.join(out, target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'seed-' + name), 'wb') as file:
        file.write(data)


def message(request, payload=b'', fds=0, flags=1):
    return bytes([fds]) + struct.pack('<III', request, flags, len(payload)) + payload


def messages(out):
    region = struct.pack('<QQQQ', 0x40000000, 0x100000, 0x7F0000000000, 0)
    put(out, 'vhost_user_message', 'get-features', message(1))
    put(out, 'vhost_user_message', 'set-features', message(2, struct.pack('<Q', 1 << 32), 0, 9))
    put(out, 'vhost_user_message', 'owner', message(3))
    put(out, 'vhost_user_message', 'mem-table',
        message(5, struct.pack('<II', 2, 0) + region * 2, 2))
    put(out, 'vhost_user_message', 'log-base', message(6, struct.pack('<QQ', 4096, 0), 1))
    for number in (8, 10, 11, 18):
        put(out, 'vhost_user_message', 'state-%d' % number,
            message(number, struct.pack('<II', 0, 128)))
    put(out, 'vhost_user_message', 'vring-addr',
        message(9, struct.pack('<IIQQQQ', 0, 1, 0x1000, 0x3000, 0x2000, 0x3000)))
    for number in (12, 13, 14):
        put(out, 'vhost_user_message', 'fd-%d' % number, message(number, struct.pack('<Q', 0), 1))
        put(out, 'vhost_user_message', 'nofd-%d' % number,
            message(number, struct.pack('<Q', 256)))
    for number in (15, 17, 34, 36, 40):
        put(out, 'vhost_user_message', 'empty-%d' % number, message(number))
    put(out, 'vhost_user_message', 'backend-fd', message(21, b'', 1))
    put(out, 'vhost_user_message', 'get-config',
        message(24, struct.pack('<III', 0, 60, 0) + bytes(60)))
    put(out, 'vhost_user_message', 'set-config', message(25, struct.pack('<III', 32, 1, 0) + b'\1'))
    for number in (31, 32):
        put(out, 'vhost_user_message', 'inflight-%d' % number,
            message(number, struct.pack('<QQHH', 8192, 0, 1, 128), number & 1 ^ 1))
    for number in (37, 38):
        put(out, 'vhost_user_message', 'slot-%d' % number,
            message(number, bytes(8) + region, 1 if number == 37 else 0))
    put(out, 'vhost_user_message', 'status', message(39, struct.pack('<Q', 15)))


def ring(flags, size, memory, steps, inflight=b''):
    setup = struct.pack('<BBHHHHHHH', flags, size, 0 if not flags & PACKED else 0x8000,
                        0 if not flags & PACKED else 0x8000, 0, 0x40, 0x60, len(inflight), 0)
    data = bytes([len(steps)]) + b''.join(bytes(step) for step in steps)
    return setup.ljust(16, b'\0') + data + inflight + memory


STEPS = [(0, 1), (0, 1), (6, 0), (0, 1), (3, 0), (3, 1), (5, 0), (6, 0), (7, 1), (7, 0), (8, 0),
         (9, 3), (0, 1), (3, 0)]


def split_memory(indirect):
    """Two chains of header, buffer, status; descriptors at 0, avail at 0x400, used at 0x600."""
    memory = bytearray(4096)
    chains = [(0x800, 16, N, 1), (0xA00, 512, N | W, 2), (0xF00, 1, W, 0)]
    if indirect:
        struct.pack_into('<QIHH', memory, 0, 0x900, 48, I, 0)
        struct.pack_into('<QIHH', memory, 16, 0x900, 48, I, 0)
        for i, desc in enumerate(chains):
            struct.pack_into('<QIHH', memory, 0x900 + 16 * i, *desc)
        heads = (0, 1)
    else:
        for i, desc in enumerate(chains):
            struct.pack_into('<QIHH', memory, 16 * i, *desc)
            struct.pack_into('<QIHH', memory, 16 * (i + 3), desc[0], desc[1], desc[2],
                             desc[3] + 3 if desc[2] & N else 0)
        heads = (0, 3)
    struct.pack_into('<HHHH', memory, 0x400, 0, 2, *heads)
    return bytes(memory)


def packed_memory(indirect):
    memory = bytearray(4096)
    avail = 1 << 7
    chain = [(0x800, 16, N), (0xA00, 512, N | W), (0xF00, 1, W)]
    if indirect:
        for i in range(2):
            struct.pack_into('<QIHH', memory, 16 * i, 0x900, 48, i, I | avail)
        for i, desc in enumerate(chain):
            struct.pack_into('<QIHH', memory, 0x900 + 16 * i, desc[0], desc[1], 0, desc[2] & W)
    else:
        for i in range(6):
            desc = chain[i % 3]
            struct.pack_into('<QIHH', memory, 16 * i, desc[0], desc[1], i // 3, desc[2] | avail)
    return bytes(memory)


def rings(out):
    for extra in (0, EVENT_IDX, LOG, INFLIGHT, EVENT_IDX | LOG | INFLIGHT):
        for indirect in (0, INDIRECT):
            name = '%d-%d' % (extra, indirect)
            put(out, 'ring_split', name,
                ring(extra | indirect, 4, split_memory(indirect), STEPS))
            put(out, 'ring_packed', name,
                ring(extra | indirect | PACKED, 15, packed_memory(indirect), STEPS))
    # Two in flight, an older one first (split: features, version, desc_num, last_batch_head,
    # used_idx, then {inflight, padding, next, counter}).
    split = struct.pack('<QHHHH', 0, 1, 16, 0, 0)
    for i in range(16):
        split += struct.pack('<B5xHQ', i in (0, 3), 0, 2 if i == 0 else 1)
    put(out, 'inflight', 'split', ring(0, 4, split_memory(0), STEPS, split))
    # features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, wrap
    # counters, padding, then {inflight, padding, next, last, num, counter, id, flags, len, addr}
    packed = struct.pack('<QHHHHHHBB7x', 0, 1, 16, 1, 1, 0, 0, 1, 1)
    packed = packed.ljust(32, b'\0')
    for i in range(16):
        packed += struct.pack('<BxHHHQHHIQ', i == 0, i + 1, 2 if i == 0 else 0, 3 if i == 0 else 0,
                              1, 0, 0x80, 16, 0x800)
    put(out, 'inflight', 'packed', ring(PACKED, 15, packed_memory(0), STEPS, packed))


def requests(out):
    def request(name, kind, flags, out_lengths, in_lengths, extra=b''):
        header = struct.pack('<IIQ', kind, 0, 8)
        lengths = b''.join(struct.pack('<H', n) for n in out_lengths + in_lengths)
        put(out, 'blk_request', name,
            bytes([flags, len(out_lengths), len(in_lengths)]) + lengths + header + extra)

    ranges = struct.pack('<QII', 8, 16, 0)
    request('read', 0, 6, [16], [4096, 1])
    request('read-joined', 0, 6, [16], [4097])
    request('write', 1, 6, [16, 512, 512], [1])
    request('write-joined', 1, 6, [16 + 512], [1])
    request('flush', 4, 6, [16], [1])
    request('get-id', 8, 6, [16], [20, 1])
    request('discard', 11, 6, [16, 16], [1], ranges)
    request('zeroes', 13, 6, [16, 32], [1], ranges + struct.pack('<QII', 64, 16, 1))
    request('erase', 14, 14, [16, 16], [1], ranges)
    request('read-only', 1, 7, [16, 512], [1])


def probes(out):
    heads = {
        'zeroes': b'',
        'mbr': bytes(510) + b'\x55\xaa',
        'qcow2': b'QFI\xfb' + struct.pack('>IQIIQ', 3, 0, 0, 16, 1 << 30),
        'qcow': b'QFI\xfb' + struct.pack('>I', 1),
        'qed': b'QED\0',
        'vmdk': b'KDMV' + struct.pack('<I', 1),
        'vmdk-text': b'# Disk DescriptorFile\nversion=1\n',
        'luks': b'LUKS\xba\xbe\0\1',
        'vdi': b'<<< Oracle VM VirtualBox Disk Image >>>\n'.ljust(64, b'\0') + b'\x7f\x10\xda\xbe',
        'vpc': b'conectix',
        'vhdx': b'vhdxfile',
        'parallels': b'WithoutFreeSpace',
        'bochs': b'Bochs Virtual HD Image',
        'cloop': b'#!/bin/sh\n#V2.0 Format\n',
    }
    for name, head in heads.items():
        put(out, 'image_probe', name, head.ljust(1024, b'\0'))
    put(out, 'image_probe', 'short', b'QFI')


def luks(out):
    def header(name, cipher='aes', mode='xts-plain64', digest='sha256', key=64, area=4040,
               payload=4040, first=8, step=504, stripes=4000, active=(0,), version=1, tail=0):
        data = struct.pack('>6sH32s32s32sII20s32sI40s', b'LUKS\xba\xbe', version,
                           cipher.encode(), mode.encode(), digest.encode(), payload, key,
                           bytes(range(20)), bytes(range(32)), 1000,
                           b'6e6c82bd-be68-42d2-a4ab-01f084b4c326')
        for i in range(8):
            data += struct.pack('>II32sII', 0x00AC71F3 if i in active else 0xDEAD, 1000,
                                bytes(32), first + i * step, stripes)
        put(out, 'luks_header', name, struct.pack('<I', area) + data + bytes(tail))

    header('xts-256')
    header('xts-128', key=32, step=256, payload=2056, area=1 << 20)
    header('cbc-essiv', mode='cbc-essiv:sha256', digest='sha1', key=16, step=128, payload=1032)
    header('cbc-plain', mode='cbc-plain', digest='sha512', key=24, step=192, payload=2048)
    header('slots', active=(1, 5, 7), tail=4096)
    header('no-slot', active=())
    header('foreign', cipher='serpent', digest='whirlpool')
    header('mode', mode='lrw-benbi')
    header('stripes', stripes=1, step=1, first=2, payload=16)
    header('overlap', step=500)
    header('short', area=4000)
    header('version-2', version=2)


def configs(out):
    put(out, 'serve_config', 'two', b'''# two disks
[global]
iothreads = 2
control = /run/oxbow/control.sock

[web01]
image = /srv/web01.raw
format = raw
vhost-user-blk = /run/web01.sock
cache = none

[db01]
image = /srv/db01.raw ; its data
vhost-user-blk = /run/db01.sock
queues = 4
read-only = yes
''')
    put(out, 'serve_config', 'bad', b'[a]\nimage\n[b\nx = y\n[a]\n')
    put(out, 'serve_config', 'continued', b'[a]\nimage = a\n  b\nvhost-user-blk: c\n')
    put(out, 'serve_config', 'long', b'[a]\nimage = ' + b'x' * 300 + b'\nvhost-user-blk = s\n')
    put(out, 'qmp_splitter', 'commands',
        b'{"execute": "qmp_capabilities"}\r\n{"execute":"query-block","id":[1,{"a":"}\\""}]}\n')
    put(out, 'qmp_splitter', 'garbage', b'hello\n{"a": 1}]{"b\n{"c": 2}\xff{"d": 3}')
    put(out, 'qmp_splitter', 'deep', b'[' * 200 + b']' * 200 + b'{"a": 1}')


def qeds(out):
    def image(name, clusters, cluster=4096, tables=1, size=8 << 20, features=0, entries=(), cut=0):
        head = b'QED\0' + struct.pack('<IIIQQQQQII', cluster, tables, 1, features, 0, 0, cluster,
                                      size, 64, 5) + b'b.raw'
        records = b''.join(struct.pack('<I', at // 8)[:3] + struct.pack('<Q', value)
                           for at, value in entries)
        put(out, 'qed', name, struct.pack('<H', (clusters * cluster - cut) // 512) +
            head.ljust(80, b'\0') + records)

    K = 4096
    table = [(K, 2 * K), (K + 16, 3 * K)]  # two L2 tables
    data = [(2 * K, 4 * K), (2 * K + 8, 5 * K), (2 * K + 16, 1), (3 * K, 6 * K)]
    image('empty', 2)
    image('used', 7, entries=table + data)
    image('marked', 7, features=2, entries=table + data)
    image('marked-short', 6, features=2, entries=table + data, cut=512)
    image('backing', 7, features=5, entries=table + data)
    image('twice', 7, entries=table + data + [(2 * K + 80, 4 * K), (K + 8, 2 * K)])
    image('invalid', 7, entries=table + data + [(2 * K + 80, 4), (2 * K + 88, 1 << 60), (K + 8, 5)])
    image('on-table', 7, entries=table + data + [(2 * K + 80, 3 * K), (2 * K + 88, K)])
    image('leaks', 20, entries=table + data)
    image('large-tables', 5, cluster=64 << 10, tables=4, size=1 << 46)
    image('large-clusters', 3, cluster=1 << 20, size=1 << 50, entries=[(1 << 20, 1 << 21)])


def clusters(out):
    def raw_deflate(data, window=-12, flush=zlib.Z_FINISH):
        packer = zlib.compressobj(9, zlib.DEFLATED, window)
        return packer.compress(data) + packer.flush(flush)

    def seed(name, packed, size, zstd=0):
        put(out, 'decompress', name, bytes([zstd | (size // 512).bit_length() - 1 << 1]) + packed)

    text = b'the quick brown fox jumps over the lazy dog ' * 100
    seed('zeroes', raw_deflate(bytes(4096)), 4096)
    seed('text', raw_deflate(text[:4096]), 4096)
    seed('window', raw_deflate(text[:512] + bytes(range(256)) * 14, -15), 4096)
    seed('no-end', raw_deflate(text[:512], flush=zlib.Z_SYNC_FLUSH), 512)
    seed('behind', raw_deflate(text[:512]) + b'more', 512)
    magic = struct.pack('<I', 0xfd2fb528)
    raw = magic + b'\x20\x04' + struct.pack('<I', 4 << 3 | 1)[:3] + b'abcd'
    run = magic + b'\x00\x58' + struct.pack('<I', 508 << 3 | 3)[:3] + b'x'
    skipped = struct.pack('<II', 0x184d2a50, 3) + b'abc'
    seed('zstd', raw + run, 512, 1)
    seed('zstd-skip', skipped + raw + run + b'more', 512, 1)
    seed('zstd-run', magic + b'\x00\xa8' + struct.pack('<I', 512 << 3 | 3)[:3] + b'y', 512, 1)
    # text[:512] by zstd -19; Python's own library has no zstd.
    seed('zstd-text', bytes.fromhex(
        '28b52ffd0468ad0100c40274686520717569636b2062726f776e20666f78206a756d70'
        '73206f76657220746865206c617a7920646f672001008c7eaa2a0383e34c71'), 512, 1)


def qcow2s(out):
    """Whole images by qemu-img, as small as they can be; their headers and tables by themselves."""
    def qemu(*command):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def image(name, options, *commands, size='24k', snapshot=False, bitmap=False):
        path = os.path.join(out, 'image.qcow2')
        qemu('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, path, size)
        qemu('qemu-io', '-f', 'qcow2', *[part for c in commands for part in ('-c', c)], path)
        if bitmap:
            qemu('qemu-img', 'bitmap', '--add', '-g', '512', path, 'b0')
            qemu('qemu-io', '-f', 'qcow2', '-c', 'write -P 5 1k 4k', path)
        if snapshot:
            qemu('qemu-img', 'snapshot', '-c', 'first', path)
            qemu('qemu-io', '-f', 'qcow2', '-c', 'write -P 6 2k 3k', path)
            qemu('qemu-img', 'snapshot', '-c', 'second', path)
        with open(path, 'rb') as file:
            data = file.read()
        os.unlink(path)
        put(out, 'qcow2_image', name, data)
        cluster = 1 << struct.unpack_from('>I', data, 20)[0]
        put(out, 'qcow2_header', name, data[:min(cluster, 1024)])
        count, at = struct.unpack_from('>IQ', data, 60)
        if count:
            put(out, 'qcow2_snapshots', name,
                struct.pack('<BH', cluster.bit_length() - 10, count) + data[at:at + 256])
        where = data.find(struct.pack('>I', 0x23852875))
        if bitmap:
            count, _, length, at = struct.unpack_from('>IIQQ', data, where + 8)
            put(out, 'qcow2_bitmaps', name, struct.pack('<H', count) + data[at:at + length])

    small = 'cluster_size=512'
    writes = ['write -P 1 0 1k', 'write -P 2 8k 512', 'write -z 12k 1k', 'write -P 3 23k 1k']
    image('plain', small, *writes)
    image('v2', small + ',compat=0.10', *writes)
    image('one-bit', small + ',refcount_bits=1', *writes)
    image('wide', small + ',refcount_bits=64,lazy_refcounts=on', *writes)
    image('snapshots', small, *writes, snapshot=True)
    image('bitmap', small, *writes, bitmap=True)
    image('deflate', 'cluster_size=2k', 'write -c -P 4 4k 2k', 'write -c -P 5 8k 2k', *writes[2:])
    image('zstd', 'cluster_size=2k,compression_type=zstd', 'write -c -P 4 4k 2k', *writes[2:])
    image('subclusters', 'cluster_size=16k,extended_l2=on', 'write -P 1 512 1k',
          'write -z -u 16k 2k', size='48k')
    image('preallocated', small + ',preallocation=metadata', 'write -P 1 0 1k', size='8k')
    image('tables', small, 'write -P 1 0 512', 'write -P 2 64k 512', 'write -P 3 192k 512',
          size='200k')


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for make in (messages, rings, requests, probes, luks, configs, qeds, clusters, qcow2s):
        make(sys.argv[1])


main()
