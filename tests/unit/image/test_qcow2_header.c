/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The qcow2 header: what is read comes out as it was, and what cannot be is refused in a sentence.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define CLUSTER 65536u

struct bytes {
	uint8_t data[2 << 20];
	size_t count;
};

static struct bytes image;

static void put_extension(size_t *at, uint32_t type, const void *data, uint32_t bytes)
{
	ox_put_be32(image.data + *at, type);
	ox_put_be32(image.data + *at + 4, bytes);
	memcpy(image.data + *at + 8, data, bytes);
	*at += 8 + ((bytes + 7) & ~7u);
}

/* A disk of 1 GiB with 64 KiB clusters; no extensions. */
static void make(unsigned version)
{
	memset(image.data, 0, CLUSTER);
	image.count = CLUSTER;
	ox_put_be32(image.data, QCOW2_MAGIC);
	ox_put_be32(image.data + 4, version);
	ox_put_be32(image.data + 20, 16);
	ox_put_be64(image.data + 24, UINT64_C(1) << 30);
	ox_put_be32(image.data + 36, 2);
	ox_put_be64(image.data + 40, 3 * CLUSTER);
	ox_put_be64(image.data + 48, CLUSTER);
	ox_put_be32(image.data + 56, 1);
	if (version < 3)
		return;
	ox_put_be32(image.data + 96, 4);
	ox_put_be32(image.data + 100, 112);
}

static int parse(struct qcow2_header *header, struct ox_error *err)
{
	*err = (struct ox_error){0};
	/* A block of its own, so that a read beyond it is seen. */
	uint8_t *data = malloc(image.count ? image.count : 1);
	int rc;

	memcpy(data, image.data, image.count);
	rc = qcow2_header_parse(data, image.count, "d.qcow2", header, err);
	free(data);
	return rc;
}

static void parse_well(struct qcow2_header *header)
{
	struct ox_error err;

	if (parse(header, &err) < 0)
		fail_msg("%s", err.text);
}

static void parse_badly(const char *sentence)
{
	struct qcow2_header header, empty = {0};
	struct ox_error err;

	assert_true(parse(&header, &err) < 0);
	if (!strstr(err.text, sentence))
		fail_msg("'%s' is not in '%s'", sentence, err.text);
	assert_non_null(strstr(err.text, "d.qcow2: "));
	assert_memory_equal(&header, &empty, sizeof(header));
}

static void encode_same(const struct qcow2_header *header, size_t cluster)
{
	uint8_t *out = malloc(cluster);

	assert_int_equal(qcow2_header_encode(header, out, cluster), 0);
	assert_memory_equal(out, image.data, cluster);
	free(out);
}

static void test_fields(void **state)
{
	struct qcow2_header h;

	for (unsigned version = 2; version <= 3; version++) {
		make(version);
		parse_well(&h);
		assert_int_equal(h.version, version);
		assert_int_equal(h.cluster_bits, 16);
		assert_int_equal(h.size, UINT64_C(1) << 30);
		assert_int_equal(h.l1_entries, 2);
		assert_int_equal(h.l1_offset, 3 * CLUSTER);
		assert_int_equal(h.refcount_table_offset, CLUSTER);
		assert_int_equal(h.refcount_table_clusters, 1);
		assert_int_equal(h.refcount_order, 4);
		assert_int_equal(h.header_bytes, version == 2 ? 72 : 112);
		encode_same(&h, CLUSTER);
		qcow2_header_free(&h);
	}
}

static void test_all_kept(void **state)
{
	static const char name[] = "base.img";
	struct qcow2_header h;
	uint8_t luks[16], bitmaps[24] = {0};
	size_t at = 144;

	make(3);
	/* Header bytes of a future version, within the padding and behind it. */
	ox_put_be32(image.data + 100, 144);
	for (unsigned i = 106; i < 144; i++)
		image.data[i] = (uint8_t)i;
	ox_put_be64(image.data + 80, UINT64_C(0xf1)); /* compatible bits that we do not know */
	ox_put_be64(image.data + 88, UINT64_C(0x701));
	ox_put_be32(image.data + 32, QCOW2_CRYPT_LUKS);
	ox_put_be64(luks, 10 * CLUSTER);
	ox_put_be64(luks + 8, 2068480);
	ox_put_be32(bitmaps, 2);
	ox_put_be64(bitmaps + 8, 96);
	ox_put_be64(bitmaps + 16, 50 * CLUSTER);
	put_extension(&at, QCOW2_EXT_BACKING_FORMAT, "raw", 3);
	put_extension(&at, QCOW2_EXT_LUKS, luks, 16);
	put_extension(&at, 0x12345678, "unknown", 7);
	put_extension(&at, QCOW2_EXT_BITMAPS, bitmaps, 24);
	put_extension(&at, 0x12345679, "", 0);
	put_extension(&at, QCOW2_EXT_SESSION, "0123456789abcdef", 16);
	/* The end, then the name, not right behind it. */
	at += 8 + 100;
	memcpy(image.data + at, name, 8);
	ox_put_be64(image.data + 8, at);
	ox_put_be32(image.data + 16, 8);
	parse_well(&h);
	assert_string_equal(h.backing_file, name);
	assert_string_equal(h.backing_format, "raw");
	assert_int_equal(h.extension_count, 5);
	assert_int_equal(h.luks_offset, 10 * CLUSTER);
	assert_int_equal(h.luks_bytes, 2068480);
	assert_int_equal(h.bitmap_count, 2);
	assert_int_equal(h.bitmap_directory_offset, 50 * CLUSTER);
	assert_int_equal(h.bitmap_directory_bytes, 96);
	assert_true(h.has_session);
	assert_memory_equal(h.session, "0123456789abcdef", 16);
	encode_same(&h, CLUSTER);
	/* Taken away, put back: as before. */
	qcow2_header_set_extension(&h, QCOW2_EXT_SESSION, NULL, 0);
	assert_false(h.has_session);
	assert_int_equal(h.extension_count, 4);
	qcow2_header_set_extension(&h, QCOW2_EXT_SESSION, "0123456789abcdef", 16);
	assert_true(h.has_session);
	encode_same(&h, CLUSTER);
	qcow2_header_free(&h);
}

/* What moves in a header while it is written may be lost in a power cut. */
static void test_name_stays(void **state)
{
	struct qcow2_header h;
	uint8_t *out = malloc(CLUSTER);
	uint64_t where;

	make(3);
	parse_well(&h);
	h.backing_file = strdup("base.img");
	qcow2_header_add_feature_names(&h);
	assert_int_equal(qcow2_header_encode(&h, out, CLUSTER), 0);
	where = ox_get_be64(out + 8);
	h.backing_offset = where;
	qcow2_header_set_extension(&h, QCOW2_EXT_SESSION, "0123456789abcdef", 16);
	assert_int_equal(qcow2_header_encode(&h, out, CLUSTER), 0);
	assert_int_equal(ox_get_be64(out + 8), where);
	/* One more, and there is no room: it moves, and not over its old place. */
	qcow2_header_set_extension(&h, 0x4711, "12345678", 8);
	assert_int_equal(qcow2_header_encode(&h, out, CLUSTER), 0);
	assert_true(ox_get_be64(out + 8) >= where + strlen("base.img"));
	assert_memory_equal(out + ox_get_be64(out + 8), "base.img", 8);
	free(out);
	qcow2_header_free(&h);
}

static void test_no_room(void **state)
{
	struct qcow2_header h;
	uint8_t out[512], big[400] = {1};

	make(3);
	ox_put_be32(image.data + 20, 9);
	ox_put_be32(image.data + 36, 32768);
	image.count = 512;
	parse_well(&h);
	assert_int_equal(qcow2_header_encode(&h, out, sizeof(out)), 0);
	qcow2_header_set_extension(&h, 0x4711, big, sizeof(big));
	assert_int_equal(qcow2_header_encode(&h, out, sizeof(out)), -ENOSPC);
	qcow2_header_set_extension(&h, 0x4711, big, 384);
	assert_int_equal(qcow2_header_encode(&h, out, sizeof(out)), 0);
	qcow2_header_set_extension(&h, 0x4711, big, 385);
	assert_int_equal(qcow2_header_encode(&h, out, sizeof(out)), -ENOSPC);
	qcow2_header_set_extension(&h, 0x4711, NULL, 0);
	h.backing_file = malloc(500);
	memset(h.backing_file, 'x', 499);
	h.backing_file[499] = '\0';
	assert_int_equal(qcow2_header_encode(&h, out, sizeof(out)), -ENOSPC);
	h.backing_file[392] = '\0';
	assert_int_equal(qcow2_header_encode(&h, out, sizeof(out)), 0);
	assert_int_equal(ox_get_be64(out + 8), 120);
	qcow2_header_free(&h);
}

static void test_feature_names(void **state)
{
	uint8_t table[3 * 48] = {0};
	struct qcow2_header h;
	uint8_t *out = malloc(CLUSTER);
	size_t at = 112;

	/* Our own table: incompatible bit 0 first, the session's bit last. */
	make(3);
	parse_well(&h);
	qcow2_header_add_feature_names(&h);
	assert_int_equal(qcow2_header_encode(&h, out, CLUSTER), 0);
	assert_int_equal(ox_get_be32(out + 112), QCOW2_EXT_FEATURE_NAMES);
	assert_int_equal(ox_get_be32(out + 116), 9 * 48);
	assert_memory_equal(out + 120, "\0\0dirty bit\0", 12);
	assert_memory_equal(out + 120 + 8 * 48, "\2\76Oxbow session\0", 16);
	qcow2_header_free(&h);
	free(out);

	make(3);
	ox_put_be64(image.data + 72, UINT64_C(1) << 9 | UINT64_C(1) << 40 | UINT64_C(1) << 63);
	table[1] = 9;
	memcpy(table + 2, "new\033[2J thing", 13);
	table[48] = 1; /* a compatible one of the same number */
	table[49] = 40;
	memcpy(table + 50, "wrong", 5);
	table[97] = 63;
	memset(table + 98, 'y', 46);
	put_extension(&at, QCOW2_EXT_FEATURE_NAMES, table, sizeof(table));
	parse_badly("'new?[2J thing' (bit 9), bit 40, "
	            "'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy' (bit 63)");
	ox_put_be64(image.data + 72, ~UINT64_C(0));
	parse_badly("does not know: bit 5, bit 6");
}

static void test_bitmaps_need_their_bit(void **state)
{
	uint8_t bitmaps[24] = {0};
	struct qcow2_header h;
	size_t at = 112;

	make(3);
	/* It would be refused if it meant anything. */
	put_extension(&at, QCOW2_EXT_BITMAPS, bitmaps, 24);
	parse_well(&h);
	assert_int_equal(h.bitmap_count, 0);
	encode_same(&h, CLUSTER);
	qcow2_header_free(&h);
	ox_put_be64(image.data + 88, 1);
	parse_badly("0 bitmaps");
}

/* A field of `bytes` at `offset`, and what is said when it has this value. */
static const struct refusal {
	unsigned version, offset, bytes;
	uint64_t value;
	const char *sentence;
} refusals[] = {
        {3, 0, 4, 0x514649fa, "is not a qcow2 image"},
        {3, 4, 4, 1, "version 1 is not supported"},
        {3, 4, 4, 4, "version 4 is not supported"},
        {3, 20, 4, 8, "cluster size 2^8; allowed are 2^9 to 2^21"},
        {3, 20, 4, 22, "cluster size 2^22; allowed are 2^9 to 2^21"},
        {3, 20, 4, UINT32_MAX, "cluster size 2^4294967295; allowed"},
        {2, 20, 4, 40, "cluster size 2^40; allowed are 2^9 to 2^21"},
        {3, 100, 4, 103, "103 bytes long"},
        {3, 100, 4, 105, "105 bytes long"},
        {3, 100, 4, 96, "96 bytes long"},
        {3, 100, 4, 65544, "65544 bytes long"},
        {3, 100, 4, UINT32_MAX - 7, "bytes long"},
        {3, 96, 4, 7, "refcounts of 2^7 bits"},
        {3, 32, 4, 3, "encryption method 3 is not known"},
        {3, 32, 4, 2, "LUKS header is is missing"},
        {3, 24, 8, UINT64_C(1) << 63, "9223372036854775808 bytes"},
        {3, 24, 8, UINT64_C(2) << 30, "L1 table of 2 entries is too small"},
        {3, 24, 8, (UINT64_C(1) << 30) + 512, "3 are needed"},
        {3, 24, 8, INT64_MAX, "too large for clusters of 65536 bytes"},
        {3, 36, 4, 1, "too small"},
        {3, 36, 4, (4u << 20) + 1, "the L1 table takes 33554440 bytes"},
        {3, 36, 4, UINT32_MAX, "the L1 table takes"},
        {3, 40, 8, 0, "the L1 table is at offset 0"},
        {3, 40, 8, 3 * CLUSTER + 512, "the L1 table is at offset 197120"},
        {3, 40, 8, UINT64_C(0xffffffffffff0000), "the L1 table is at offset"},
        {3, 48, 8, 0, "the refcount table is at offset 0"},
        {3, 48, 8, 1000, "the refcount table is at offset 1000"},
        {3, 56, 4, 129, "the refcount table takes 8454144 bytes"},
        {3, 56, 4, UINT32_MAX, "the refcount table takes"},
        {3, 60, 4, 65537, "65537 snapshots"},
        {3, 60, 4, 1, "the snapshot table is at offset 0"},
        {3, 72, 8, QCOW2_INCOMPAT_COMPRESSION, "compression type 0"},
        {3, 104, 1, 1, "compression type 1"},
        {3, 88, 8, QCOW2_AUTOCLEAR_DATA_RAW, "there is no external data file"},
        {3, 8, 8, 65536, "is not between the header and the end"},
        {3, 8, 8, 100, "is not between the header and the end"},
        {3, 8, 8, UINT64_MAX, "is not between the header and the end"},
};

static void test_refusals(void **state)
{
	for (size_t i = 0; i < OX_ARRAY_SIZE(refusals); i++) {
		const struct refusal *r = &refusals[i];

		make(r->version);
		if (r->offset == 8)
			ox_put_be32(image.data + 16, 1);
		if (r->bytes == 8)
			ox_put_be64(image.data + r->offset, r->value);
		else if (r->bytes == 4)
			ox_put_be32(image.data + r->offset, (uint32_t)r->value);
		else
			image.data[r->offset] = (uint8_t)r->value;
		parse_badly(r->sentence);
	}
}

static void test_more_refusals(void **state)
{
	uint8_t luks[16];
	size_t at;

	make(3); /* extended L2, and clusters of 8 KiB */
	ox_put_be32(image.data + 20, 13);
	ox_put_be32(image.data + 36, 512);
	ox_put_be64(image.data + 72, QCOW2_INCOMPAT_EXTENDED_L2);
	parse_badly("at least 16 KiB");
	make(3);
	ox_put_be64(image.data + 72, QCOW2_INCOMPAT_COMPRESSION);
	image.data[104] = 2;
	parse_badly("compression type 2 is not known");
	make(3); /* an external data file and snapshots */
	ox_put_be64(image.data + 72, QCOW2_INCOMPAT_DATA_FILE);
	ox_put_be32(image.data + 60, 1);
	ox_put_be64(image.data + 64, 5 * CLUSTER);
	parse_badly("cannot have internal snapshots");
	make(3); /* a raw one and a backing file */
	ox_put_be64(image.data + 72, QCOW2_INCOMPAT_DATA_FILE);
	ox_put_be64(image.data + 88, QCOW2_AUTOCLEAR_DATA_RAW);
	ox_put_be64(image.data + 8, 1000);
	ox_put_be32(image.data + 16, 1);
	image.data[1000] = 'x';
	parse_badly("cannot have a backing file");
	make(2);
	ox_put_be64(image.data + 8, 1000);
	ox_put_be32(image.data + 16, 1024);
	parse_badly("1024 bytes long; at most 1023");
	make(3);
	at = 112;
	ox_put_be32(image.data + at, 0x4711);
	ox_put_be32(image.data + at + 4, CLUSTER);
	parse_badly("more than there is room for");
	ox_put_be32(image.data + at + 4, UINT32_MAX);
	parse_badly("more than there is room for");
	make(3);
	at = 112;
	put_extension(&at, QCOW2_EXT_DATA_FILE, "a", 1);
	put_extension(&at, QCOW2_EXT_DATA_FILE, "b", 1);
	parse_badly("is there twice");
	make(3);
	at = 112;
	put_extension(&at, QCOW2_EXT_BACKING_FORMAT, "0123456789abcdef", 16);
	parse_badly("'backing format' is 16 bytes long");
	make(3);
	at = 112;
	ox_put_be64(luks, 2 * CLUSTER);
	ox_put_be64(luks + 8, 1000);
	put_extension(&at, QCOW2_EXT_LUKS, luks, 16);
	parse_badly("not encrypted with LUKS");
	ox_put_be32(image.data + 32, QCOW2_CRYPT_LUKS);
	ox_put_be64(image.data + 120, 1000);
	parse_badly("1000 bytes at offset 1000");
	ox_put_be64(image.data + 120, UINT64_C(0xffffffffffff0000));
	parse_badly("which cannot be");
	ox_put_be64(image.data + 120, CLUSTER);
	ox_put_be64(image.data + 128, UINT64_MAX);
	parse_badly("which cannot be");
}

/* Wherever the file ends, nothing behind it is looked at. */
static void test_cut_off(void **state)
{
	struct qcow2_header h;
	struct ox_error err;
	size_t at = 112;

	make(3);
	put_extension(&at, QCOW2_EXT_DATA_FILE, "data.raw", 8);
	put_extension(&at, 0x4711, "12345", 5);
	ox_put_be64(image.data + 8, 200);
	ox_put_be32(image.data + 16, 20);
	memset(image.data + 200, 'n', 20);
	for (size_t count = 0; count < 300; count++) {
		image.count = count;
		if (parse(&h, &err) == 0) {
			assert_true(count >= 220);
			assert_int_equal(h.extension_count, 1);
			qcow2_header_free(&h);
		}
	}
}

/* A cluster full of the smallest extensions there are. */
static void test_many_extensions(void **state)
{
	struct qcow2_header h;

	make(3);
	ox_put_be32(image.data + 20, 21);
	ox_put_be64(image.data + 40, 6 << 20);
	ox_put_be64(image.data + 48, 2 << 20);
	image.count = 2 << 20;
	for (size_t at = 112; at + 8 <= image.count; at += 8)
		ox_put_be32(image.data + at, 0x4711);
	parse_well(&h);
	assert_int_equal(h.extension_count, (image.count - 112) / 8);
	qcow2_header_free(&h);
	memset(image.data, 0, sizeof(image.data));
}

/* Random bytes in a sane header: whatever comes out, encoding and parsing it again gives the same.
 */
static void test_random(void **state)
{
	uint64_t seed = 88172645463325252u;
	unsigned good = 0;

	for (unsigned round = 0; round < 10000; round++) {
		struct qcow2_header h, again;
		struct ox_error err = {0};
		uint8_t *out;

		make(round & 1 ? 3 : 2);
		for (unsigned i = 0; i < 3; i++) {
			seed ^= seed << 13;
			seed ^= seed >> 7;
			seed ^= seed << 17;
			image.data[8 + seed % 200] = (uint8_t)(seed >> 32);
		}
		if (parse(&h, &err) < 0) {
			assert_true(err.text[0]);
			continue;
		}
		good++;
		out = calloc(1, UINT64_C(1) << h.cluster_bits);
		if (qcow2_header_encode(&h, out, UINT64_C(1) << h.cluster_bits) == 0) {
			assert_int_equal(qcow2_header_parse(out, UINT64_C(1) << h.cluster_bits,
			                                    "again", &again, &err),
			                 0);
			assert_int_equal(again.extension_count, h.extension_count);
			assert_int_equal(again.size, h.size);
			qcow2_header_free(&again);
		}
		free(out);
		qcow2_header_free(&h);
	}
	assert_true(good > 100);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_fields),        cmocka_unit_test(test_all_kept),
	        cmocka_unit_test(test_name_stays),    cmocka_unit_test(test_no_room),
	        cmocka_unit_test(test_feature_names), cmocka_unit_test(test_bitmaps_need_their_bit),
	        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_more_refusals),
	        cmocka_unit_test(test_cut_off),       cmocka_unit_test(test_many_extensions),
	        cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
