/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Scatter-gather lists, against the same thing done on one flat buffer.
 */
#include "base/iov.h"
#include "base/base.h"
#include "base/byteorder.h"
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

#define SIZE 64

/* Pieces of a buffer that together are the buffer in order, empty ones among them. */
static unsigned cut(char *buf, struct iovec *iov, unsigned seed)
{
	unsigned count = 0, at = 0;

	while (at < SIZE) {
		unsigned length = (seed * 7 + count * 5) % 13; /* 0 too */

		length = ox_min(length, SIZE - at);
		iov[count].iov_base = buf + at;
		iov[count].iov_len = length;
		count++;
		at += length;
	}
	return count;
}

static void test_copies(void **state)
{
	char buf[SIZE], flat[SIZE], copy[SIZE + 8];
	struct iovec iov[SIZE * 2], part[SIZE * 2];

	for (unsigned seed = 0; seed < 13; seed++) {
		unsigned count = cut(buf, iov, seed);

		assert_int_equal(ox_iov_size(iov, count), SIZE);
		for (unsigned offset = 0; offset <= SIZE + 2; offset++) {
			for (unsigned bytes = 0; bytes <= SIZE + 2; bytes += 3) {
				unsigned real = offset >= SIZE ? 0 : ox_min(bytes, SIZE - offset);
				unsigned slices;

				for (unsigned i = 0; i < SIZE; i++)
					flat[i] = buf[i] = (char)(i + seed);
				memset(copy, 0x55, sizeof(copy));
				assert_int_equal(ox_iov_to_buf(iov, count, offset, copy, bytes),
				                 real);
				if (real)
					assert_memory_equal(copy, flat + offset, real);
				assert_int_equal(copy[real], 0x55);

				slices = ox_iov_slice(iov, count, offset, bytes, part);
				assert_true(slices <= count);
				assert_int_equal(ox_iov_size(part, slices), real);
				if (slices)
					assert_ptr_equal(part[0].iov_base, buf + offset);
				for (unsigned i = 0; i < slices; i++)
					assert_true(part[i].iov_len > 0);

				assert_int_equal(ox_iov_memset(iov, count, offset, 0x77, bytes),
				                 real);
				if (real)
					memset(flat + offset, 0x77, real);
				assert_memory_equal(buf, flat, SIZE);

				memset(copy, 0x11, sizeof(copy));
				assert_int_equal(ox_iov_from_buf(iov, count, offset, copy, bytes),
				                 real);
				if (real)
					memset(flat + offset, 0x11, real);
				assert_memory_equal(buf, flat, SIZE);
			}
		}
	}
	assert_int_equal(ox_iov_size(NULL, 0), 0);
	assert_int_equal(ox_iov_to_buf(NULL, 0, 0, copy, 1), 0);
}

static void test_aligned(void **state)
{
	char *base = (char *)0x10000;
	struct iovec iov[2] = {{base, 4096}, {base + 8192, 512}};

	assert_true(ox_iov_is_aligned(iov, 2, 512));
	assert_true(ox_iov_is_aligned(iov, 2, 1));
	assert_false(ox_iov_is_aligned(iov, 2, 4096)); /* a length */
	assert_true(ox_iov_is_aligned(iov, 1, 4096));
	iov[0].iov_base = base + 512; /* a base */
	assert_false(ox_iov_is_aligned(iov, 1, 4096));
	assert_true(ox_iov_is_aligned(iov, 0, 4096));
}

static void test_is_zero(void **state)
{
	static unsigned char buf[1024];
	struct iovec iov[3];

	/* Every length and start up to a few vectors, and a set byte at every place. */
	for (unsigned start = 0; start < 33; start += 3) {
		for (unsigned length = 1; length < 300; length++) {
			assert_true(ox_buffer_is_zero(buf + start, length));
			for (unsigned i = 0; i < length; i++) {
				buf[start + i] = (unsigned char)(1u << (i & 7));
				if (ox_buffer_is_zero(buf + start, length))
					fail_msg("start %u, length %u, byte %u", start, length, i);
				buf[start + i] = 0;
			}
			/* The neighbours do not count. */
			buf[start + length] = 1;
			if (start)
				buf[start - 1] = 1;
			assert_true(ox_buffer_is_zero(buf + start, length));
			buf[start + length] = 0;
			if (start)
				buf[start - 1] = 0;
		}
	}
	assert_true(ox_buffer_is_zero(buf, 0));
	iov[0] = (struct iovec){buf, 100};
	iov[1] = (struct iovec){buf, 0};
	iov[2] = (struct iovec){buf + 100, 100};
	assert_true(ox_iov_is_zero(iov, 3));
	buf[199] = 1;
	assert_false(ox_iov_is_zero(iov, 3));
	buf[199] = 0;
}

static void test_byte_order(void **state)
{
	unsigned char bytes[9] = {0xff, 1, 2, 3, 4, 5, 6, 7, 8};
	unsigned char out[9] = {0};

	assert_int_equal(ox_get_le16(bytes + 1), 0x0201);
	assert_int_equal(ox_get_be16(bytes + 1), 0x0102);
	assert_int_equal(ox_get_le32(bytes + 1), 0x04030201);
	assert_int_equal(ox_get_be32(bytes + 1), 0x01020304);
	assert_true(ox_get_le64(bytes + 1) == 0x0807060504030201ull);
	assert_true(ox_get_be64(bytes + 1) == 0x0102030405060708ull);
	out[0] = 0xff;
	ox_put_be64(out + 1, 0x0102030405060708ull);
	assert_memory_equal(out, bytes, 9);
	ox_put_le64(out + 1, 0x0807060504030201ull);
	assert_memory_equal(out, bytes, 9);
	ox_put_le32(out + 1, 0x04030201);
	ox_put_be16(out + 5, 0x0506);
	ox_put_le16(out + 7, 0x0807);
	assert_memory_equal(out, bytes, 9);
}

static void test_arithmetic(void **state)
{
	assert_int_equal(ox_align_up(1, 512), 512);
	assert_int_equal(ox_align_up(512, 512), 512);
	assert_int_equal(ox_align_down(1023, 512), 512);
	assert_true(ox_is_aligned(0, 4096));
	assert_false(ox_is_aligned(2048, 4096));
	assert_true(ox_is_power_of_2(1));
	assert_false(ox_is_power_of_2(0));
	assert_false(ox_is_power_of_2(3));
	assert_true(ox_range_within(0, 10, 10));
	assert_true(ox_range_within(10, 0, 10));
	assert_false(ox_range_within(11, 0, 10));
	assert_false(ox_range_within(1, 10, 10));
	assert_false(ox_range_within(UINT64_MAX, 2, 10));
	assert_false(ox_range_within(2, UINT64_MAX, 10));
	assert_true(ox_range_within(0, UINT64_MAX, UINT64_MAX));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_copies),     cmocka_unit_test(test_aligned),
	        cmocka_unit_test(test_is_zero),    cmocka_unit_test(test_byte_order),
	        cmocka_unit_test(test_arithmetic),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
