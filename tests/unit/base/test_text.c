/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Sizes, numbers and words.  The table of sizes is what qemu-img 7.2 takes, tried one by one;
 * where a comment says so we take what newer versions do or round better.
 */
#include "base/text.h"
#include "base/base.h"
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

#define KIB 1024ull
#define EIB (1ull << 60)

static void test_sizes(void **state)
{
	static const struct {
		const char *text;
		uint64_t bytes;
	} good[] = {
	        {"0", 0},
	        {"00", 0},
	        {"1", 1},
	        {"1b", 1},
	        {"1B", 1},
	        {"010", 10}, /* not octal */
	        {"1k", KIB},
	        {"1K", KIB},
	        {" 1k", KIB},
	        {"+1k", KIB},
	        {"1m", KIB * KIB},
	        {"10G", 10 * KIB * KIB * KIB},
	        {"1t", 1ull << 40},
	        {"1p", 1ull << 50},
	        {"1e", EIB},
	        {"1E", EIB},
	        {"7E", 7 * EIB},
	        {"9223372036854775807", INT64_MAX},
	        {"0x10", 16},
	        {"0X1f", 31},
	        {"0xe", 14}, /* a digit, not exbi */
	        {"0x10k", 16 * KIB},
	        {"1.5k", 1536},
	        {"1.1k", 1126},
	        {"0.1k", 102},
	        {"1.9999k", 2048},
	        {"0.0001k", 0},
	        {"1.4990234375k", 1535},
	        {"1.0", 1},
	        {"1.00000b", 1},
	        {"5.", 5},
	        {"5.k", 5 * KIB},
	        {"1.k", KIB},
	        {".5k", 512},                          /* since QEMU 8.1 */
	        {"3.999999999999999999999k", 4 * KIB}, /* QEMU 7.2 loses the carry: 3072 */
	        {"1.99999999999999E", 2 * EIB - 11529},
	};
	static const char *const bad[] = {
	        "",
	        " ",
	        "k",
	        ".",
	        ".k",
	        "1.5",
	        "0.5",
	        "1.5b",
	        "1k ",
	        "1kk",
	        "1ki",
	        "1KiB",
	        "1 k",
	        "1,5k",
	        "1e3",
	        "1e3k",
	        "1z",
	        "inf",
	        "nan",
	        "-1",
	        "-1k",
	        "--1",
	        "0x",
	        "0x1.8k",
	        "0xg",
	        "8E",
	        "9223372036854775808",
	        "1e-1",
	        "1_0",
	        "++1",
	        "1..k",
	        "1.5.k",

	        "18446744073709551615",
	        "18446744073709551616",
	        "99999999999999999999999k",
	};
	uint64_t value;

	for (size_t i = 0; i < OX_ARRAY_SIZE(good); i++) {
		value = 12345;
		if (!ox_parse_size(good[i].text, 1, &value) || value != good[i].bytes)
			fail_msg("\"%s\": %llu", good[i].text, (unsigned long long)value);
	}
	for (size_t i = 0; i < OX_ARRAY_SIZE(bad); i++) {
		value = 12345;
		if (ox_parse_size(bad[i], 1, &value))
			fail_msg("\"%s\" was taken as %llu", bad[i], (unsigned long long)value);
		assert_int_equal(value, 12345);
	}
}

static void test_size_unit(void **state)
{
	uint64_t value;

	/* The unit is for a number without a suffix only, and makes a fraction legal. */
	assert_true(ox_parse_size("3", KIB * KIB, &value));
	assert_int_equal(value, 3 * KIB * KIB);
	assert_true(ox_parse_size("1.5", KIB, &value));
	assert_int_equal(value, 1536);
	assert_true(ox_parse_size("3k", KIB * KIB, &value));
	assert_int_equal(value, 3 * KIB);
	assert_true(ox_parse_size("3b", KIB, &value));
	assert_int_equal(value, 3);
}

static void test_uint(void **state)
{
	uint64_t value = 77;

	assert_true(ox_parse_uint("1", 1, 64, &value));
	assert_int_equal(value, 1);
	assert_true(ox_parse_uint("64", 1, 64, &value));
	assert_int_equal(value, 64);
	assert_true(ox_parse_uint("18446744073709551615", 0, UINT64_MAX, &value));
	assert_true(value == UINT64_MAX);
	value = 77;
	assert_false(ox_parse_uint("0", 1, 64, &value));
	assert_false(ox_parse_uint("65", 1, 64, &value));
	assert_false(ox_parse_uint("18446744073709551616", 0, UINT64_MAX, &value));
	assert_false(ox_parse_uint("", 0, 64, &value));
	assert_false(ox_parse_uint("-1", 0, 64, &value));
	assert_false(ox_parse_uint("+1", 0, 64, &value));
	assert_false(ox_parse_uint(" 1", 0, 64, &value));
	assert_false(ox_parse_uint("1 ", 0, 64, &value));
	assert_false(ox_parse_uint("1k", 0, 64, &value));
	assert_false(ox_parse_uint("0x1", 0, 64, &value));
	assert_int_equal(value, 77);
}

static void test_format(void **state)
{
	static const struct {
		uint64_t bytes;
		const char *text;
	} table[] = {
	        {0, "0 B"},
	        {512, "512 B"},
	        {999, "999 B"},
	        {1000, "0.977 KiB"},
	        {1023, "0.999 KiB"},
	        {1024, "1 KiB"},
	        {1536, "1.5 KiB"},
	        {1047527424, "999 MiB"},
	        {1048471142, "0.976 GiB"}, /* 999.9 MiB */
	        {10737418240, "10 GiB"},
	        {1000000000000, "931 GiB"},
	        {1234568192, "1.15 GiB"},
	        {1099511627776, "1 TiB"},
	        {INT64_MAX, "8 EiB"},
	        {UINT64_MAX, "16 EiB"},
	};
	char buf[32];

	for (size_t i = 0; i < OX_ARRAY_SIZE(table); i++) {
		assert_ptr_equal(ox_format_size(table[i].bytes, buf, sizeof(buf)), buf);
		assert_string_equal(buf, table[i].text);
	}
	/* A small buffer is not overrun. */
	memset(buf, 'x', sizeof(buf));
	ox_format_size(1536, buf, 4);
	assert_string_equal(buf, "1.5");
	assert_int_equal(buf[4], 'x');
}

static void test_nearest_word(void **state)
{
	static const char *const words[] = {"none",   "writeback", "writethrough", "directsync",
	                                    "unsafe", "cache",     "io",           NULL};
	static const char *const nothing[] = {NULL};
	char giant[300];

	assert_string_equal(ox_nearest_word("writback", words), "writeback");
	assert_string_equal(ox_nearest_word("write-through", words), "writethrough");
	assert_string_equal(ox_nearest_word("cahce", words), "cache"); /* swapped letters */
	assert_string_equal(ox_nearest_word("NONE", words), "none");
	assert_string_equal(ox_nearest_word("nome", words), "none");
	assert_string_equal(ox_nearest_word("oi", words), "io");
	assert_string_equal(ox_nearest_word("direktsink", words), "directsync");
	assert_null(ox_nearest_word("zebra", words));
	assert_null(ox_nearest_word("", words));
	assert_null(ox_nearest_word("xy", words));
	assert_null(ox_nearest_word("none", nothing));
	memset(giant, 'w', sizeof(giant) - 1);
	giant[sizeof(giant) - 1] = '\0';
	assert_null(ox_nearest_word(giant, words));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_sizes),        cmocka_unit_test(test_size_unit),
	        cmocka_unit_test(test_uint),         cmocka_unit_test(test_format),
	        cmocka_unit_test(test_nearest_word),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
