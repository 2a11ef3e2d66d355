/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The snapshot table and the bitmap directory of qcow2 images, as bytes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <string.h>

#define CLUSTER 65536u

static uint8_t table[8192];
static size_t table_bytes;

/* --- snapshots ------------------------------------------------------------------------------- */

static size_t add_snapshot(const char *id, const char *name, uint32_t extra)
{
	uint8_t *e = table + table_bytes;
	size_t start = table_bytes;

	memset(e, 0, 40);
	ox_put_be64(e, 7 * CLUSTER);
	ox_put_be32(e + 8, 2);
	ox_put_be16(e + 12, (uint16_t)strlen(id));
	ox_put_be16(e + 14, (uint16_t)strlen(name));
	ox_put_be32(e + 16, 1000);
	ox_put_be32(e + 20, 2000);
	ox_put_be64(e + 24, 3000);
	ox_put_be32(e + 32, 4000);
	ox_put_be32(e + 36, extra);
	for (uint32_t i = 0; i < extra; i++)
		e[40 + i] = (uint8_t)i;
	memcpy(e + 40 + extra, id, strlen(id));
	memcpy(e + 40 + extra + strlen(id), name, strlen(name));
	table_bytes += (40 + extra + strlen(id) + strlen(name) + 7) & ~(size_t)7;
	return start;
}

static int parse_snapshots(uint32_t count, struct qcow2_snapshot **out, size_t *used,
                           struct ox_error *err)
{
	uint8_t *copy = malloc(table_bytes ? table_bytes : 1);
	int rc;

	memcpy(copy, table, table_bytes);
	*err = (struct ox_error){0};
	rc = qcow2_snapshots_parse(copy, table_bytes, count, CLUSTER, "d.qcow2", out, used, err);
	free(copy);
	if (rc < 0) {
		assert_null(*out);
		assert_non_null(strstr(err->text, "d.qcow2: "));
	}
	return rc;
}

static void free_snapshots(struct qcow2_snapshot *snapshots, uint32_t count)
{
	struct qcow2 q = {.snapshots = snapshots, .header = {.snapshot_count = count}};

	qcow2_free_snapshots(&q);
	assert_null(q.snapshots);
}

static void start(void)
{
	memset(table, 0, sizeof(table));
	table_bytes = 0;
}

static void test_snapshots(void **state)
{
	struct qcow2_snapshot *s;
	struct ox_error err;
	size_t used, second;

	start();
	add_snapshot("1", "first", 0);
	second = add_snapshot("id-2", "", 24);
	add_snapshot("", "third with more", 100);
	assert_int_equal(parse_snapshots(3, &s, &used, &err), 0);
	assert_int_equal(used, table_bytes);
	assert_string_equal(s[0].id, "1");
	assert_string_equal(s[0].name, "first");
	assert_int_equal(s[0].l1_offset, 7 * CLUSTER);
	assert_int_equal(s[0].l1_entries, 2);
	assert_int_equal(s[0].date_seconds, 1000);
	assert_int_equal(s[0].date_ns, 2000);
	assert_int_equal(s[0].vm_clock_ns, 3000);
	assert_int_equal(s[0].vm_state_bytes, 4000);
	assert_true(s[0].disk_size == UINT64_MAX && s[0].icount == UINT64_MAX);
	assert_int_equal(s[1].entry_offset, second);
	assert_string_equal(s[1].id, "id-2");
	assert_string_equal(s[1].name, "");
	/* The extra data says it with 64 bits. */
	assert_int_equal(s[1].vm_state_bytes, UINT64_C(0x0001020304050607));
	assert_int_equal(s[1].disk_size, UINT64_C(0x08090a0b0c0d0e0f));
	assert_int_equal(s[1].icount, UINT64_C(0x1011121314151617));
	assert_int_equal(s[2].extra_bytes, 100);
	assert_memory_equal(s[2].extra + 90, "\x5a\x5b\x5c", 3);
	assert_string_equal(s[2].name, "third with more");
	free_snapshots(s, 3);
	assert_int_equal(parse_snapshots(0, &s, &used, &err), 0);
	assert_null(s);
}

static void test_snapshots_refused(void **state)
{
	static const struct {
		unsigned offset, bytes;
		uint64_t value;
		const char *sentence;
	} refusals[] = {
	        {0, 8, 0, "offset 0"},
	        {0, 8, 512, "offset 512"},
	        {0, 8, UINT64_C(0xffffffffffff0000), "cannot"},
	        {8, 4, (4u << 20) + 1, "4194305 entries"},
	        {8, 4, UINT32_MAX, "4294967295 entries"},
	        {36, 4, 1025, "cut off"},
	        {36, 4, UINT32_MAX, "cut off"},
	        {12, 2, 0xffff, "cut off"},
	        {14, 2, 0xffff, "cut off"},
	};
	struct qcow2_snapshot *s;
	struct ox_error err;
	size_t used;

	for (size_t i = 0; i < OX_ARRAY_SIZE(refusals); i++) {
		start();
		add_snapshot("1", "first", 16);
		if (refusals[i].bytes == 8)
			ox_put_be64(table + refusals[i].offset, refusals[i].value);
		else if (refusals[i].bytes == 4)
			ox_put_be32(table + refusals[i].offset, (uint32_t)refusals[i].value);
		else
			ox_put_be16(table + refusals[i].offset, (uint16_t)refusals[i].value);
		assert_true(parse_snapshots(1, &s, &used, &err) < 0);
		if (i != 2 && !strstr(err.text, refusals[i].sentence))
			fail_msg("'%s' is not in '%s'", refusals[i].sentence, err.text);
	}
	start();
	add_snapshot("1", "first", 1032);
	assert_true(parse_snapshots(1, &s, &used, &err) < 0);
	assert_non_null(strstr(err.text, "1032 bytes of extra data"));
	start();
	add_snapshot("1", "first", 0);
	assert_true(parse_snapshots(2, &s, &used, &err) < 0);
	assert_true(parse_snapshots(65537, &s, &used, &err) < 0);
	assert_true(parse_snapshots(UINT32_MAX, &s, &used, &err) < 0);
}

static void test_snapshots_cut_off(void **state)
{
	struct qcow2_snapshot *s;
	struct ox_error err;
	size_t used, whole, text;

	start();
	add_snapshot("1", "first", 16);
	text = table_bytes + 40 + 30 + 5; /* the padding of the last may be missing */
	add_snapshot("two", "2.", 30);
	whole = table_bytes;
	for (table_bytes = 0; table_bytes <= whole; table_bytes++) {
		int rc = parse_snapshots(2, &s, &used, &err);

		assert_int_equal(rc == 0, table_bytes >= text);
		if (rc == 0) {
			assert_true(used <= table_bytes);
			free_snapshots(s, 2);
		}
	}
}

/* --- bitmaps --------------------------------------------------------------------------------- */

static uint8_t *add_bitmap(const char *name, uint32_t flags, uint32_t extra)
{
	uint8_t *e = table + table_bytes;

	memset(e, 0, 24);
	ox_put_be64(e, 9 * CLUSTER);
	ox_put_be32(e + 8, 3);
	ox_put_be32(e + 12, flags);
	e[16] = 1;
	e[17] = 16;
	ox_put_be16(e + 18, (uint16_t)strlen(name));
	ox_put_be32(e + 20, extra);
	memset(e + 24, 0xee, extra);
	memcpy(e + 24 + extra, name, strlen(name));
	table_bytes += (24 + extra + strlen(name) + 7) & ~(size_t)7;
	return e;
}

static int parse_bitmaps(uint32_t count, struct qcow2_bitmap **out, struct ox_error *err)
{
	uint8_t *copy = malloc(table_bytes ? table_bytes : 1);
	int rc;

	memcpy(copy, table, table_bytes);
	*err = (struct ox_error){0};
	rc = qcow2_bitmaps_parse(copy, table_bytes, count, "d.qcow2", out, err);
	free(copy);
	if (rc < 0) {
		assert_null(*out);
		assert_non_null(strstr(err->text, "d.qcow2: "));
	}
	return rc;
}

static void free_bitmaps(struct qcow2_bitmap *bitmaps, uint32_t count)
{
	struct qcow2 q = {.bitmaps = bitmaps, .header = {.bitmap_count = count}};

	qcow2_free_bitmaps(&q);
	assert_null(q.bitmaps);
}

static void test_bitmaps(void **state)
{
	struct qcow2_bitmap *b;
	struct ox_error err;
	uint8_t *second;

	start();
	add_bitmap("daily", 2, 0);
	second = add_bitmap("b", 5, 13);
	assert_int_equal(parse_bitmaps(2, &b, &err), 0);
	assert_string_equal(b[0].name, "daily");
	assert_int_equal(b[0].flags, 2);
	assert_int_equal(b[0].table_offset, 9 * CLUSTER);
	assert_int_equal(b[0].table_entries, 3);
	assert_int_equal(b[0].granularity_bits, 16);
	assert_string_equal(b[1].name, "b");
	assert_int_equal(b[1].flags, 5);
	assert_int_equal(b[1].entry_offset, second - table);
	free_bitmaps(b, 2);
}

static void test_bitmaps_refused(void **state)
{
	static const struct {
		unsigned offset, bytes;
		uint64_t value;
		const char *sentence;
	} refusals[] = {
	        {0, 8, 0, "cannot be there"},
	        {0, 8, 100, "cannot be there"},
	        {0, 8, UINT64_MAX & ~511, "cannot"},
	        {8, 4, 0x8000001, "cannot be there"},
	        {12, 4, 8, "flags 0x8"},
	        {16, 1, 2, "type 2"},
	        {17, 1, 8, "2^8"},
	        {17, 1, 32, "2^32"},
	        {17, 1, 255, "2^255"},
	        {18, 2, 0, "0 bytes long"},
	        {18, 2, 0xffff, "cut off"},
	        {20, 4, 1, "take"},
	        {20, 4, UINT32_MAX, "cut off"},
	};
	struct qcow2_bitmap *b;
	struct ox_error err;

	for (size_t i = 0; i < OX_ARRAY_SIZE(refusals); i++) {
		uint8_t *e;

		start();
		e = add_bitmap("sixteen letters!", 0, 0);
		add_bitmap("more", 0, 0);
		e += refusals[i].offset;
		if (refusals[i].bytes == 8)
			ox_put_be64(e, refusals[i].value);
		else if (refusals[i].bytes == 4)
			ox_put_be32(e, (uint32_t)refusals[i].value);
		else if (refusals[i].bytes == 2)
			ox_put_be16(e, (uint16_t)refusals[i].value);
		else
			*e = (uint8_t)refusals[i].value;
		assert_true(parse_bitmaps(2, &b, &err) < 0);
		/* An extra byte shifts what comes behind; what is said then is its matter. */
		if (refusals[i].value != 1 && !strstr(err.text, refusals[i].sentence))
			fail_msg("'%s' is not in '%s'", refusals[i].sentence, err.text);
	}
	start();
	add_bitmap("a", 0, 0);
	assert_true(parse_bitmaps(2, &b, &err) < 0);
	assert_true(parse_bitmaps(65536, &b, &err) < 0);
	table_bytes += 8;
	assert_true(parse_bitmaps(1, &b, &err) < 0);
	assert_non_null(strstr(err.text, "the header says"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_snapshots),         cmocka_unit_test(test_snapshots_refused),
	        cmocka_unit_test(test_snapshots_cut_off), cmocka_unit_test(test_bitmaps),
	        cmocka_unit_test(test_bitmaps_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
