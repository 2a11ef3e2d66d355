/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Unpacking of qcow2's compressed clusters: what every kind of stream gives, and that damaged ones
 * give -EIO and nothing behind the buffer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#define CLUSTER 65536u
#define ROOM    (2 * CLUSTER)

static uint8_t plain[CLUSTER], packed[ROOM];
/* Exactly as large as a cluster, so that a sanitizer sees a byte too many. */
static uint8_t *out;

static int set_up(void **state)
{
	uint32_t seed = 1;

	/* Text-like: it has repetitions near and far, and needs literals too. */
	for (size_t i = 0; i < CLUSTER; i++) {
		seed = seed * 1103515245u + 12345u;
		plain[i] = i % 7 == 0 ? (uint8_t)(seed >> 24) : (uint8_t)(i % 40000 / 13);
	}
	out = malloc(CLUSTER);
	return out ? 0 : -1;
}

static int tear_down(void **state)
{
	free(out);
	return 0;
}

static size_t deflate_to(uint8_t *to, size_t room, const void *from, size_t bytes, int window,
                         int flush)
{
	z_stream stream = {.next_in = (Bytef *)(uintptr_t)from,
	                   .avail_in = (uInt)bytes,
	                   .next_out = to,
	                   .avail_out = (uInt)room};

	assert_int_equal(deflateInit2(&stream, 9, Z_DEFLATED, window, 9, Z_DEFAULT_STRATEGY), Z_OK);
	assert_int_not_equal(deflate(&stream, flush), Z_STREAM_ERROR);
	deflateEnd(&stream);
	return room - stream.avail_out;
}

static int unpack(unsigned type, size_t bytes, size_t out_bytes)
{
	/* The input at the end of its own memory. */
	uint8_t *in = malloc(bytes ? bytes : 1);
	int rc;

	assert_non_null(in);
	memcpy(in, packed, bytes);
	memset(out, 0x5a, out_bytes);
	rc = qcow2_decompress(type, in, bytes, out, out_bytes);
	free(in);
	return rc;
}

static void test_deflate(void **state)
{
	static const int windows[] = {-9, -12, -15};

	for (size_t i = 0; i < OX_ARRAY_SIZE(windows); i++) {
		size_t bytes = deflate_to(packed, ROOM, plain, CLUSTER, windows[i], Z_FINISH);

		assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes, CLUSTER), 0);
		assert_memory_equal(out, plain, CLUSTER);
		/* What follows belongs to the next cluster. */
		memset(packed + bytes, 0xff, 511);
		assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes + 511, CLUSTER), 0);
		assert_memory_equal(out, plain, CLUSTER);
		/* The end is missing. */
		assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes / 2, CLUSTER), -EIO);
		assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, 0, CLUSTER), -EIO);
	}
}

static void test_deflate_lengths(void **state)
{
	size_t bytes = deflate_to(packed, ROOM, plain, CLUSTER - 512, -12, Z_FINISH);

	/* Less than a cluster comes out of it. */
	assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes, CLUSTER), -EIO);
	/* More than asked for: the cluster is whole, as QEMU has it. */
	bytes = deflate_to(packed, ROOM, plain, CLUSTER, -12, Z_FINISH);
	assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes, 4096), 0);
	assert_memory_equal(out, plain, 4096);
	/* A stream without its end mark, but with all bytes. */
	bytes = deflate_to(packed, ROOM, plain, CLUSTER, -12, Z_SYNC_FLUSH);
	memset(packed + bytes, 0xff, 100);
	assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes, CLUSTER), 0);
	assert_int_equal(unpack(QCOW2_COMPRESSION_DEFLATE, bytes + 100, CLUSTER), 0);
	assert_memory_equal(out, plain, CLUSTER);
}

static size_t zstd_at(size_t at, const uint8_t *from, size_t bytes)
{
	size_t n = ZSTD_compress(packed + at, ROOM - at, from, bytes, 19);

	assert_false(ZSTD_isError(n));
	return at + n;
}

static void test_zstd(void **state)
{
	size_t bytes = zstd_at(0, plain, CLUSTER);

	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, bytes, CLUSTER), 0);
	assert_memory_equal(out, plain, CLUSTER);
	memset(packed + bytes, 0xff, 511);
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, bytes + 511, CLUSTER), 0);
	assert_memory_equal(out, plain, CLUSTER);
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, bytes - 1, CLUSTER), -EIO);
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, 0, CLUSTER), -EIO);
}

static void test_zstd_frames(void **state)
{
	static const uint8_t skipped[] = {0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'};
	size_t bytes = zstd_at(0, plain, 1000);

	bytes = zstd_at(bytes, plain, 0); /* an empty one */
	memcpy(packed + bytes, skipped, sizeof(skipped));
	bytes = zstd_at(bytes + sizeof(skipped), plain + 1000, CLUSTER - 1000);
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, bytes, CLUSTER), 0);
	assert_memory_equal(out, plain, CLUSTER);
	/* Together too short, together too long. */
	bytes = zstd_at(0, plain, 1000);
	bytes = zstd_at(bytes, plain + 1000, CLUSTER - 2000);
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, bytes, CLUSTER), -EIO);
	bytes = zstd_at(0, plain, CLUSTER);
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, bytes, CLUSTER - 1), -EIO);
}

/* A frame whose header asks for a window of 2 GiB, which a decoder that streams would allocate or
 * refuse. */
static void test_zstd_large_window(void **state)
{
	/* Magic, descriptor without size or checksum, window 2^31; a last block: RLE of 4096 bytes.
	 */
	static const uint8_t frame[] = {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x03, 0x80, 0x00, 'x'};

	memcpy(packed, frame, sizeof(frame));
	assert_int_equal(unpack(QCOW2_COMPRESSION_ZSTD, sizeof(frame), 4096), 0);
	assert_int_equal(out[0], 'x');
	assert_int_equal(out[4095], 'x');
}

/* Whatever is flipped: an answer, and not a byte out of place. */
static void test_damage(void **state)
{
	for (unsigned type = 0; type < 2; type++) {
		size_t bytes = type == QCOW2_COMPRESSION_ZSTD
		                       ? zstd_at(0, plain, CLUSTER)
		                       : deflate_to(packed, ROOM, plain, CLUSTER, -12, Z_FINISH);

		for (size_t bit = 0; bit < 8 * bytes; bit += bytes / 20) {
			int rc;

			packed[bit / 8] ^= 1 << (bit % 8);
			rc = unpack(type, bytes, CLUSTER);
			assert_true(rc == 0 || rc == -EIO);
			packed[bit / 8] ^= 1 << (bit % 8);
		}
		assert_int_equal(unpack(type, bytes, CLUSTER), 0);
		assert_memory_equal(out, plain, CLUSTER);
	}
	assert_int_equal(unpack(2, 100, CLUSTER), -EIO);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_deflate),
	        cmocka_unit_test(test_deflate_lengths),
	        cmocka_unit_test(test_zstd),
	        cmocka_unit_test(test_zstd_frames),
	        cmocka_unit_test(test_zstd_large_window),
	        cmocka_unit_test(test_damage),
	};

	return cmocka_run_group_tests(tests, set_up, tear_down);
}
