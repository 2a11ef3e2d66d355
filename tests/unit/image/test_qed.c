/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The qed driver over memory stores: what its files say at which moment, and what it makes of
 * damaged ones.  Content under random operations and on several threads is test_random_ops.c's.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/byteorder.h"
#include "image/qed/qed.h"
#include "store/faulty.h"
#include "store/memory.h"
#include "tests/lib/image_kit.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define K         UINT64_C(1024)
#define M         (1024 * K)
#define CLUSTER   (4 * K) /* of most images here, with tables of one cluster: 512 entries */
#define DISK      (8 * M)
#define NAME      "memory:qed:0"
#define BASE      "memory:base:0"
#define L1_OFFSET CLUSTER

static struct kit kit;
static struct ox_image_options options;

/* --- what all need ---------------------------------------------------------------------------- */

static void make(const char *name, const char *cluster, const char *table, uint64_t size,
                 const char *base)
{
	struct ox_create_option words[2] = {{(char *)"cluster_size", (char *)(uintptr_t)cluster},
	                                    {(char *)"table_size", (char *)(uintptr_t)table}};
	struct ox_image_create_options create = {.path = name,
	                                         .format = "qed",
	                                         .size = size,
	                                         .has_size = true,
	                                         .options = words,
	                                         .option_count = 2,
	                                         .backing_file = base,
	                                         .backing_format = base ? "raw" : NULL,
	                                         .unsafe_backing = true};
	struct ox_error err = {0};

	if (ox_image_create(&create, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_create_options_free(&create);
}

static void make_small(void)
{
	make(NAME, "4k", "1", DISK, NULL);
}

static int set_up(void **state)
{
	options = (struct ox_image_options){
	        .format = "qed", .store = {.lock = OX_LOCK_WRITE}, .allow = {.anything = true}};
	kit_start(&kit, 2);
	return 0;
}

static int tear_down(void **state)
{
	if (kit.image)
		assert_true(kit_close(&kit, false) <= 0);
	kit_stop(&kit);
	ox_memory_forget("qed");
	ox_memory_forget("base");
	return 0;
}

static void open_image(const char *name)
{
	struct ox_error err = {0};

	if (kit_open(&kit, name, &options, &err) < 0)
		fail_msg("%s", err.text);
}

static void close_image(bool finish)
{
	assert_int_equal(kit_close(&kit, finish), 0);
}

static struct qed *the_qed(void)
{
	return kit.image->priv;
}

/* The file's bytes, past the image that may have it open. */
static void peek(uint64_t offset, void *buf, size_t bytes)
{
	struct ox_store_options plain = {.read_only = true};
	struct ox_store *store;

	assert_int_equal(ox_store_open(NAME, &plain, &store, NULL), 0);
	assert_int_equal(ox_store_pread(store, offset, buf, bytes), 0);
	ox_store_close(store);
}

static uint64_t peek64(uint64_t offset)
{
	uint8_t bytes[8];

	peek(offset, bytes, sizeof(bytes));
	return ox_get_le64(bytes);
}

static uint64_t file_size(void)
{
	struct ox_store_options plain = {.read_only = true};
	struct ox_store *store;
	uint64_t size;

	assert_int_equal(ox_store_open(NAME, &plain, &store, NULL), 0);
	size = store->size;
	ox_store_close(store);
	return size;
}

struct poke {
	struct ox_store *store;
	struct ox_loop *loop;
	uint64_t offset;
	const void *bytes;
	size_t count;
};

static void poke_co(void *arg)
{
	struct poke *poke = arg;
	struct ox_channel *channel;

	assert_int_equal(ox_store_attach(poke->store, poke->loop, &channel, NULL), 0);
	assert_int_equal(ox_store_write_co(channel, poke->offset, poke->bytes, poke->count, 0), 0);
	ox_store_detach(channel);
}

static void poke(const char *name, uint64_t offset, const void *bytes, size_t count)
{
	struct ox_loop_options loop_options = {.name = "poke"};
	struct ox_store_options plain = {.lock = OX_LOCK_NONE};
	struct poke call = {.offset = offset, .bytes = bytes, .count = count};

	call.loop = ox_loop_new(&loop_options, NULL);
	assert_int_equal(ox_store_open(name, &plain, &call.store, NULL), 0);
	if (call.store->size < offset + count)
		assert_int_equal(ox_store_truncate(call.store, offset + count, OX_PREALLOC_OFF,
		                                   NULL, NULL, NULL),
		                 0);
	ox_loop_run_fiber(call.loop, poke_co, &call);
	ox_store_close(call.store);
	ox_loop_free(call.loop);
}

static void poke64(uint64_t offset, uint64_t value)
{
	uint8_t bytes[8];

	ox_put_le64(bytes, value);
	poke(NAME, offset, bytes, sizeof(bytes));
}

static void cut_file(uint64_t size)
{
	struct ox_store_options plain = {.lock = OX_LOCK_NONE};
	struct ox_store *store;

	assert_int_equal(ox_store_open(NAME, &plain, &store, NULL), 0);
	assert_int_equal(ox_store_truncate(store, size, OX_PREALLOC_OFF, NULL, NULL, NULL), 0);
	ox_store_close(store);
}

struct call {
	enum ox_io_op op;
	uint64_t offset, bytes;
	uint8_t fill;
	int result;
	bool differs;
	unsigned flags;
};

static void call_co(struct ox_image_channel *channel, void *arg)
{
	struct call *call = arg;
	uint8_t *buf = NULL;

	if (call->op == OX_IO_READ || call->op == OX_IO_WRITE) {
		buf = malloc(call->bytes);
		assert_non_null(buf);
		memset(buf, call->fill, call->bytes);
	}
	call->result =
	        kit_request_co(channel, call->op, call->offset, buf, call->bytes, 0, call->flags);
	for (uint64_t i = 0; call->op == OX_IO_READ && call->result == 0 && i < call->bytes; i++)
		call->differs |= buf[i] != call->fill;
	free(buf);
}

static int request(enum ox_io_op op, uint64_t offset, uint64_t bytes, uint8_t fill, unsigned flags)
{
	struct call call = {
	        .op = op, .offset = offset, .bytes = bytes, .fill = fill, .flags = flags};
	struct kit_work work = {.fn_co = call_co, .arg = &call};

	kit_run(&kit, &work, 1);
	assert_false(call.differs);
	return call.result;
}

static void put(uint64_t offset, uint64_t bytes, uint8_t fill)
{
	assert_int_equal(request(OX_IO_WRITE, offset, bytes, fill, 0), 0);
}

static void expect(uint64_t offset, uint64_t bytes, uint8_t fill)
{
	assert_int_equal(request(OX_IO_READ, offset, bytes, fill, 0), 0);
}

static uint64_t features(void)
{
	return peek64(16);
}

/* Where the entry of a guest cluster stands, in an image of make_small()'s kind. */
static uint64_t l2_entry(uint64_t cluster)
{
	return peek64(L1_OFFSET + cluster / 512 * 8) + cluster % 512 * 8;
}

struct check_call {
	struct ox_image_check check;
	int result;
};

static void check_co(struct ox_image_channel *channel, void *arg)
{
	struct check_call *call = arg;
	struct ox_error err = {0};

	call->result = ox_image_check_co(channel, &call->check, &err);
}

static struct ox_image_check check_image(bool fix_leaks, bool fix_errors)
{
	struct check_call call = {.check = {.fix_leaks = fix_leaks, .fix_errors = fix_errors}};
	struct kit_work work = {.fn_co = check_co, .arg = &call};

	options.for_check = true;
	open_image(NAME);
	options.for_check = false;
	kit_run(&kit, &work, 1);
	assert_int_equal(call.result, 0);
	close_image(true);
	return call.check;
}

static void expect_clean(void)
{
	struct ox_image_check check = check_image(false, false);

	assert_int_equal(check.corruptions, 0);
	assert_int_equal(check.leaks, 0);
	assert_int_equal(features() & QED_F_NEED_CHECK, 0);
}

/* --- the header ------------------------------------------------------------------------------- */

static struct qed_header good_header(void)
{
	return (struct qed_header){.cluster_size = 65536,
	                           .table_size = 4,
	                           .header_size = 1,
	                           .features = QED_F_BACKING_FILE,
	                           .l1_offset = 65536,
	                           .image_size = 10 * M,
	                           .backing_offset = 64,
	                           .backing_bytes = 5};
}

static int parse(const struct qed_header *header, uint64_t file_bytes)
{
	uint8_t bytes[QED_HEADER_BYTES], again[QED_HEADER_BYTES];
	struct qed_header out;
	struct ox_error err = {0};
	int rc;

	qed_header_encode(header, bytes);
	rc = qed_header_parse(bytes, sizeof(bytes), file_bytes, "x.qed", &out, &err);
	if (rc < 0) {
		assert_true(strncmp(err.text, "x.qed: ", 7) == 0);
		return rc;
	}
	qed_header_encode(&out, again);
	assert_memory_equal(bytes, again, sizeof(bytes));
	return 0;
}

static void test_header(void **state)
{
	struct qed_header h = good_header();
	uint64_t file = 5 * 65536;
	uint8_t bytes[QED_HEADER_BYTES] = {'Q', 'E', 'D', 1};

	assert_int_equal(parse(&h, file), 0);
	assert_int_equal(parse(&h, file - 1), -EINVAL); /* L1 is cut off */
	assert_int_equal(qed_header_parse(bytes, sizeof(bytes), file, "x", &h, NULL), -EINVAL);
	h = good_header();
#define REFUSED(member, value)                    \
	do {                                      \
		h = good_header();                \
		h.member = value;                 \
		assert_true(parse(&h, file) < 0); \
	} while (0)
	REFUSED(cluster_size, 2048);
	REFUSED(cluster_size, 65535);
	REFUSED(cluster_size, 1u << 27);
	REFUSED(cluster_size, 0);
	REFUSED(table_size, 0);
	REFUSED(table_size, 3);
	REFUSED(table_size, 32);
	REFUSED(header_size, 0);
	REFUSED(header_size, 2);
	REFUSED(header_size, UINT32_MAX);
	REFUSED(features, 8);
	REFUSED(features, UINT64_C(1) << 63);
	REFUSED(l1_offset, 0);
	REFUSED(l1_offset, 65537);
	REFUSED(l1_offset, 2 * 65536);
	REFUSED(l1_offset, ~UINT64_C(65535));
	REFUSED(image_size, 10 * M + 1);
	REFUSED(image_size, UINT64_C(1) << 51);
	REFUSED(image_size, ~UINT64_C(511));
	REFUSED(backing_bytes, 0);
	REFUSED(backing_bytes, 1024);
	REFUSED(backing_offset, 65532);
	REFUSED(backing_offset, UINT32_MAX);
#undef REFUSED
	h = good_header();
	h.compat_features = UINT64_MAX;
	h.autoclear_features = UINT64_MAX;
	assert_int_equal(parse(&h, file), 0);
	assert_int_equal(qed_max_size(4096, 1), UINT64_C(1) << 30);
	assert_int_equal(qed_max_size(65536, 4), UINT64_C(1) << 46);
	assert_int_equal(qed_max_size(1u << 26, 16), INT64_MAX);
}

static void test_features(void **state)
{
	make_small();
	poke64(24, 0x55); /* compat */
	poke64(32, 0xaa); /* autoclear */
	open_image(NAME);
	expect(0, 4096, 0);
	close_image(true);
	/* Reading changes nothing. */
	assert_int_equal(peek64(24), 0x55);
	assert_int_equal(peek64(32), 0xaa);
	open_image(NAME);
	put(0, 4096, 1);
	close_image(true);
	assert_int_equal(peek64(24), 0x55);
	assert_int_equal(peek64(32), 0);
}

/* --- writing ---------------------------------------------------------------------------------- */

static void test_shapes(void **state)
{
	static const char *const clusters[] = {"4k", "64k", "1M", "64M"};
	static const char *const tables[] = {"1", "4", "16"};

	for (size_t c = 0; c < OX_ARRAY_SIZE(clusters); c++) {
		for (size_t t = 0; t < OX_ARRAY_SIZE(tables); t++) {
			/* Not a whole number of clusters. */
			uint64_t size = 300 * M + 512;

			make(NAME, clusters[c], tables[t], size, NULL);
			open_image(NAME);
			assert_int_equal(kit.image->size, size);
			put(4095, 2, 1);
			put(130 * M - 70000, 140001, 2);
			put(size - 512, 512, 3);
			expect(0, 4095, 0);
			close_image(true);
			expect_clean();
			open_image(NAME);
			expect(4095, 2, 1);
			expect(4097, 10000, 0);
			expect(130 * M - 70000, 140001, 2);
			expect(130 * M + 70001, 100000, 0);
			expect(size - 512, 512, 3);
			expect(size - 1024, 512, 0);
			close_image(true);
			ox_memory_forget("qed");
		}
	}
}

/* The second block of L1, and behind. */
static void test_large_disk(void **state)
{
	uint64_t size = UINT64_C(40) << 40;
	struct ox_extent extent;

	make(NAME, "64k", "4", size, NULL);
	open_image(NAME);
	assert_true(the_qed()->l1->block_count > 1);
	put(size - 65536, 65536, 1);
	put(20 * (UINT64_C(1) << 40), 100, 2);
	close_image(true);
	expect_clean();
	open_image(NAME);
	expect(size - 65536, 65536, 1);
	expect(20 * (UINT64_C(1) << 40), 100, 2);
	expect(UINT64_C(1) << 40, 100, 0);
	/* The map is told in few pieces. */
	assert_int_equal(ox_format_qed.lookup(kit.image, 0, size, &extent), 0);
	assert_int_equal(extent.kind, OX_EXTENT_BACKING);
	assert_true(extent.length >= UINT64_C(1) << 40);
}

/* A killed process: what was answered is in the file, and the mark says that there was somebody. */
static void test_kill(void **state)
{
	make_small();
	open_image(NAME);
	assert_int_equal(features() & QED_F_NEED_CHECK, 0);
	put(0, 100, 1);
	assert_int_equal(features() & QED_F_NEED_CHECK, QED_F_NEED_CHECK);
	put(3 * M, 3 * CLUSTER, 2);
	put(3 * M, CLUSTER, 3);
	close_image(false); /* the file stays as a killed process leaves it */
	assert_int_equal(features() & QED_F_NEED_CHECK, QED_F_NEED_CHECK);
	/* Read-only, nothing is done about it. */
	options.store.read_only = true;
	options.store.lock = OX_LOCK_READ;
	open_image(NAME);
	expect(0, 100, 1);
	expect(3 * M, CLUSTER, 3);
	expect(3 * M + CLUSTER, 2 * CLUSTER, 2);
	close_image(true);
	assert_int_equal(features() & QED_F_NEED_CHECK, QED_F_NEED_CHECK);
	options.store.read_only = false;
	options.store.lock = OX_LOCK_WRITE;
	open_image(NAME);
	assert_int_equal(features() & QED_F_NEED_CHECK, 0);
	/* Header, L1, two L2 tables, four clusters. */
	assert_int_equal(file_size(), 8 * CLUSTER);
	expect(0, 100, 1);
	expect(3 * M + CLUSTER, 2 * CLUSTER, 2);
	close_image(true);
	expect_clean();
}

/* A power cut that took the end of the file: entries that point there are gone, others stay. */
static void test_lost_tail(void **state)
{
	uint64_t table;

	make_small();
	open_image(NAME);
	put(0, CLUSTER, 1);
	put(CLUSTER, CLUSTER, 2);
	put(4 * M, CLUSTER, 3);
	close_image(false);
	table = peek64(L1_OFFSET);
	assert_int_equal(peek64(table + 8), 4 * CLUSTER);
	assert_int_equal(peek64(L1_OFFSET + 2 * 8), 5 * CLUSTER);
	cut_file(4 * CLUSTER + 100);
	/* Who may not repair it sees the same. */
	options.store.read_only = true;
	options.store.lock = OX_LOCK_READ;
	open_image(NAME);
	expect(0, CLUSTER, 1);
	expect(CLUSTER, CLUSTER, 0);
	expect(4 * M, CLUSTER, 0);
	close_image(true);
	assert_int_equal(peek64(table + 8), 4 * CLUSTER);
	options.store.read_only = false;
	options.store.lock = OX_LOCK_WRITE;
	open_image(NAME);
	assert_int_equal(peek64(table), 3 * CLUSTER);
	assert_int_equal(peek64(table + 8), 0);
	assert_int_equal(peek64(L1_OFFSET + 2 * 8), 0);
	expect(0, CLUSTER, 1);
	expect(CLUSTER, CLUSTER, 0);
	expect(4 * M, CLUSTER, 0);
	/* The rest of a cluster is no place for the next one, and is not seen in it. */
	put(8 * CLUSTER, 1, 4);
	expect(8 * CLUSTER + 1, CLUSTER - 1, 0);
	close_image(true);
	expect_clean();
}

/* Opened without a lock, as for a look: the repair comes with the first write. */
static void test_late_repair(void **state)
{
	make_small();
	open_image(NAME);
	put(0, 2 * CLUSTER, 1);
	close_image(false);
	cut_file(4 * CLUSTER);
	options.store.lock = OX_LOCK_NONE;
	open_image(NAME);
	assert_int_equal(features() & QED_F_NEED_CHECK, QED_F_NEED_CHECK);
	expect(0, CLUSTER, 1);
	expect(CLUSTER, CLUSTER, 0);
	put(10 * CLUSTER, CLUSTER, 2);
	expect(CLUSTER, CLUSTER, 0);
	close_image(true);
	expect_clean();
}

static void test_zeroes(void **state)
{
	uint64_t table;
	uint8_t *base = malloc(DISK);

	assert_non_null(base);
	memset(base, 9, DISK);
	poke(BASE, 0, base, DISK - M);
	free(base);
	make(NAME, "4k", "1", DISK, BASE);
	assert_int_equal(features(), QED_F_BACKING_FILE | QED_F_NO_PROBE);
	open_image(NAME);
	put(0, CLUSTER, 1);
	table = peek64(L1_OFFSET);
	assert_int_equal(request(OX_IO_ZERO, 0, 3 * CLUSTER, 0, OX_IO_MAY_UNMAP), 0);
	/* What has a place keeps it; what would show the backing file says zero. */
	assert_int_equal(peek64(table), 3 * CLUSTER);
	assert_int_equal(peek64(table + 8), QED_ZERO);
	assert_int_equal(peek64(table + 16), QED_ZERO);
	assert_int_equal(peek64(table + 24), QED_UNALLOCATED);
	expect(0, 3 * CLUSTER, 0);
	expect(3 * CLUSTER, CLUSTER, 9);
	/* Parts of clusters are copied. */
	assert_int_equal(request(OX_IO_ZERO, 10 * CLUSTER + 100, 2 * CLUSTER, 0, 0), 0);
	expect(10 * CLUSTER, 100, 9);
	expect(10 * CLUSTER + 100, 2 * CLUSTER, 0);
	expect(12 * CLUSTER + 100, CLUSTER - 100, 9);
	/* Behind the backing file's end there is nothing to hide. */
	assert_int_equal(request(OX_IO_ZERO, DISK - M, M, 0, 0), 0);
	assert_int_equal(peek64(L1_OFFSET + 3 * 8), QED_UNALLOCATED);
	assert_int_equal(request(OX_IO_DISCARD, 0, 4 * CLUSTER, 0, 0), 0);
	expect(CLUSTER, 2 * CLUSTER, 0);
	expect(3 * CLUSTER, CLUSTER, 9);
	/* A write to a zero cluster fills it with zeroes, not with the backing file. */
	put(CLUSTER + 5, 5, 2);
	expect(CLUSTER, 5, 0);
	expect(CLUSTER + 10, CLUSTER - 10, 0);
	/* The whole disk, in one go. */
	assert_int_equal(request(OX_IO_ZERO, 0, DISK, 0, OX_IO_MAY_UNMAP), 0);
	close_image(true);
	expect_clean();
	open_image(NAME);
	expect(0, DISK, 0);
}

static void resize_co(struct ox_image_channel *channel, void *arg)
{
	struct check_call *call = arg;
	struct ox_error err = {0};

	call->result =
	        ox_image_resize_co(channel, call->check.total_clusters, OX_PREALLOC_OFF, &err);
}

static int resize(uint64_t size)
{
	struct check_call call = {.check.total_clusters = size};
	struct kit_work work = {.fn_co = resize_co, .arg = &call};

	kit_run(&kit, &work, 1);
	return call.result;
}

static void test_resize(void **state)
{
	uint8_t base[8 * CLUSTER];

	memset(base, 9, sizeof(base));
	poke(BASE, 0, base, sizeof(base));
	make(NAME, "4k", "1", CLUSTER + 512, BASE);
	open_image(NAME);
	expect(0, CLUSTER + 512, 9);
	assert_true(resize(CLUSTER) < 0);
	assert_true(resize((UINT64_C(1) << 30) + 512) < 0);
	assert_int_equal(resize(UINT64_C(1) << 30), 0);
	expect(0, CLUSTER + 512, 9);
	expect(CLUSTER + 512, M, 0);
	put((UINT64_C(1) << 30) - 512, 512, 1);
	close_image(true);
	expect_clean();
	open_image(NAME);
	assert_int_equal(kit.image->size, UINT64_C(1) << 30);
	expect(0, CLUSTER + 512, 9);
	expect(CLUSTER + 512, M, 0);
	expect((UINT64_C(1) << 30) - 512, 512, 1);
}

/* L1 gets more blocks while it is in use. */
static void test_resize_large(void **state)
{
	make(NAME, "64k", "4", M, NULL);
	open_image(NAME);
	put(0, 100, 1);
	assert_int_equal(resize(UINT64_C(30) << 40), 0);
	put(UINT64_C(29) << 40, 100, 2);
	expect(0, 100, 1);
	close_image(true);
	expect_clean();
	open_image(NAME);
	expect(UINT64_C(29) << 40, 100, 2);
}

/* --- memory ----------------------------------------------------------------------------------- */

static void test_budget(void **state)
{
	uint64_t block;

	make(NAME, "4k", "1", UINT64_C(1) << 30, NULL);
	options.metadata_cache = 1;
	open_image(NAME);
	block = sizeof(struct qed_block) + 4096;
	assert_int_equal(the_qed()->budget, 4 * block);
	for (unsigned round = 0; round < 2; round++) {
		for (uint64_t i = 0; i < 200; i++)
			put(i * 2 * M + round * CLUSTER, 100, (uint8_t)(i + round));
	}
	for (unsigned round = 0; round < 2; round++) {
		for (uint64_t i = 0; i < 200; i++)
			expect(i * 2 * M + round * CLUSTER, 100, (uint8_t)(i + round));
	}
	assert_true(the_qed()->cached <= 8 * block);
	close_image(true);
	options.metadata_cache = 0;
	expect_clean();
}

/* Many writers below one table, on two threads; then what is in memory is what is in the file. */
static void test_together(void **state)
{
	enum { COUNT = 128 };
	struct call calls[COUNT];
	struct kit_work work[COUNT];

	make_small();
	open_image(NAME);
	for (unsigned i = 0; i < COUNT; i++) {
		calls[i] = (struct call){.op = OX_IO_WRITE,
		                         .offset = i * 2 * CLUSTER,
		                         .bytes = CLUSTER,
		                         .fill = (uint8_t)(i + 1)};
		work[i] = (struct kit_work){.thread = i % 2, .fn_co = call_co, .arg = &calls[i]};
	}
	kit_run(&kit, work, COUNT);
	for (unsigned i = 0; i < COUNT; i++) {
		struct ox_extent extent;

		assert_int_equal(calls[i].result, 0);
		assert_int_equal(ox_format_qed.lookup(kit.image, i * 2 * CLUSTER, CLUSTER, &extent),
		                 0);
		assert_int_equal(extent.kind, OX_EXTENT_DATA);
		assert_int_equal(extent.flags, OX_EXTENT_IN_PLACE);
		assert_int_equal(peek64(l2_entry(i * 2)), extent.store_offset);
	}
	close_image(true);
	expect_clean();
}

/* --- damage ----------------------------------------------------------------------------------- */

static void make_used(void)
{
	make_small();
	open_image(NAME);
	for (unsigned i = 0; i < 8; i++)
		put(i * CLUSTER, CLUSTER, (uint8_t)(i + 1));
	put(2 * M, CLUSTER, 20);
	close_image(true);
	expect_clean();
}

/* Entries that are not valid: that range fails, the rest is read, and nothing is written. */
static void test_invalid_entries(void **state)
{
	const uint64_t bad[] = {2,          CLUSTER + 1,     L1_OFFSET,        UINT64_C(1) << 40,
	                        UINT64_MAX, ~UINT64_C(4095), UINT64_C(1) << 63};

	for (size_t i = 0; i < OX_ARRAY_SIZE(bad); i++) {
		struct ox_image_check check;

		make_used();
		poke64(l2_entry(3), bad[i]);
		open_image(NAME);
		expect(0, CLUSTER, 1);
		expect(4 * CLUSTER, CLUSTER, 5);
		assert_int_equal(request(OX_IO_READ, 3 * CLUSTER, CLUSTER, 0, 0), -EIO);
		assert_int_equal(request(OX_IO_WRITE, 3 * CLUSTER, CLUSTER, 1, 0), -EIO);
		assert_int_equal(request(OX_IO_WRITE, M, CLUSTER, 1, 0), -EIO);
		assert_int_equal(request(OX_IO_WRITE, 0, CLUSTER, 1, 0), -EIO);
		assert_int_equal(request(OX_IO_ZERO, 0, CLUSTER, 0, 0), -EIO);
		close_image(true);
		assert_int_equal(peek64(l2_entry(3)), bad[i]);
		check = check_image(false, false);
		assert_int_equal(check.corruptions, 1);
		assert_int_equal(check.leaks, 1);
		assert_int_equal(check.allocated_clusters, 9);
		assert_int_equal(check.total_clusters, DISK / CLUSTER);
		check = check_image(true, true);
		assert_int_equal(check.corruptions, 0);
		assert_int_equal(check.corruptions_fixed, 1);
		/* The cluster in the middle of the file stays lost. */
		assert_int_equal(check.leaks, 1);
		open_image(NAME);
		expect(3 * CLUSTER, CLUSTER, 0);
		expect(4 * CLUSTER, CLUSTER, 5);
		put(3 * CLUSTER, CLUSTER, 7);
		close_image(true);
		ox_memory_forget("qed");
	}
}

/* The same one level up; found when the image is opened. */
static void test_invalid_l1(void **state)
{
	struct ox_image_check check;

	make_used();
	poke64(L1_OFFSET, 0x12345);
	open_image(NAME);
	expect(2 * M, CLUSTER, 20);
	assert_int_equal(request(OX_IO_READ, 0, CLUSTER, 0, 0), -EIO);
	assert_int_equal(request(OX_IO_WRITE, 2 * M, CLUSTER, 1, 0), -EIO);
	close_image(true);
	check = check_image(false, true);
	assert_int_equal(check.corruptions_fixed, 1);
	assert_int_equal(check.leaks, 9);
	open_image(NAME);
	expect(0, 8 * CLUSTER, 0);
	expect(2 * M, CLUSTER, 20);
	put(0, CLUSTER, 1);
}

/* A guest's cluster lies on a table: it could write its own map. */
static void test_data_on_table(void **state)
{
	make_used();
	poke64(l2_entry(3), peek64(L1_OFFSET + 8));
	open_image(NAME);
	assert_int_equal(request(OX_IO_WRITE, 3 * CLUSTER, CLUSTER, 1, 0), -EIO);
	assert_int_equal(request(OX_IO_READ, 3 * CLUSTER, CLUSTER, 1, 0), -EIO);
	expect(2 * M, CLUSTER, 20);
	close_image(true);
	assert_int_equal(check_image(false, true).corruptions_fixed, 1);
	open_image(NAME);
	expect(3 * CLUSTER, CLUSTER, 0);
	expect(2 * M, CLUSTER, 20);
}

/* Two owners of one cluster, of one table: each gets its own. */
static void test_used_twice(void **state)
{
	struct ox_image_check check;

	make_used();
	poke64(l2_entry(3), peek64(l2_entry(5)));
	poke64(L1_OFFSET + 3 * 8, peek64(L1_OFFSET));
	check = check_image(false, false);
	assert_int_equal(check.corruptions, 2);
	assert_int_equal(check.leaks, 1);
	/* Tables that two entries have are seen at once. */
	open_image(NAME);
	expect(6 * M + CLUSTER, CLUSTER, 2);
	assert_int_equal(request(OX_IO_WRITE, M, CLUSTER, 1, 0), -EIO);
	close_image(true);
	check = check_image(true, true);
	assert_int_equal(check.corruptions, 0);
	/* The table, its eight clusters, and the one that it had twice. */
	assert_int_equal(check.corruptions_fixed, 10);
	assert_int_equal(check_image(false, false).corruptions, 0);
	open_image(NAME);
	for (unsigned table = 0; table < 2; table++) {
		uint64_t at = table * 6 * M;

		expect(at, CLUSTER, 1);
		expect(at + 3 * CLUSTER, CLUSTER, 6);
		expect(at + 5 * CLUSTER, CLUSTER, 6);
		expect(at + 7 * CLUSTER, CLUSTER, 8);
	}
	put(3 * CLUSTER, CLUSTER, 30);
	expect(5 * CLUSTER, CLUSTER, 6);
	expect(6 * M + 3 * CLUSTER, CLUSTER, 6);
}

/* With the mark, an open repairs what a power cut explains, and nothing else. */
static void test_marked_and_damaged(void **state)
{
	make_used();
	poke64(l2_entry(3), peek64(l2_entry(5)));
	poke64(l2_entry(6), UINT64_C(1) << 40);
	poke64(16, QED_F_NEED_CHECK);
	open_image(NAME);
	expect(3 * CLUSTER, CLUSTER, 6);
	expect(6 * CLUSTER, CLUSTER, 0);
	assert_int_equal(request(OX_IO_WRITE, 0, CLUSTER, 1, 0), -EIO);
	close_image(true);
	assert_int_equal(features() & QED_F_NEED_CHECK, QED_F_NEED_CHECK);
	assert_int_equal(check_image(true, true).corruptions_fixed, 1);
	assert_int_equal(features() & QED_F_NEED_CHECK, 0);
}

static void test_leaks(void **state)
{
	struct ox_image_check check;

	make_used();
	poke64(l2_entry(2), 0);
	cut_file(file_size() + 10 * CLUSTER);
	check = check_image(false, false);
	assert_int_equal(check.corruptions, 0);
	assert_int_equal(check.leaks, 11);
	check = check_image(true, false);
	assert_int_equal(check.leaks, 1);
	assert_int_equal(check.leaks_fixed, 10);
	assert_int_equal(file_size(), 13 * CLUSTER);
}

/* --- errors and order ------------------------------------------------------------------------- */

#define FAULTY "faulty::" NAME

static void fault(enum ox_io_op op, uint64_t offset, uint64_t length)
{
	struct ox_fault_rule rule = {.op = (uint8_t)op,
	                             .kind = OX_FAULT_ERROR,
	                             .error = EIO,
	                             .offset = offset,
	                             .length = length};

	ox_faulty_add_rule(kit.image->store, &rule);
}

/* A table that cannot be written: the write fails, the map stays, and a later one succeeds. */
static void test_table_fails(void **state)
{
	uint64_t table;

	make_small();
	open_image(FAULTY);
	put(0, CLUSTER, 1);
	table = peek64(L1_OFFSET);
	fault(OX_IO_WRITE, table, CLUSTER);
	assert_int_equal(request(OX_IO_WRITE, CLUSTER, CLUSTER, 2, 0), -EIO);
	expect(CLUSTER, CLUSTER, 0);
	put(CLUSTER, CLUSTER, 3);
	expect(CLUSTER, CLUSTER, 3);
	/* L1 fails: so does the first write below the new table, and the second is well. */
	fault(OX_IO_WRITE, L1_OFFSET, CLUSTER);
	assert_int_equal(request(OX_IO_WRITE, 2 * M, CLUSTER, 4, 0), -EIO);
	expect(2 * M, CLUSTER, 0);
	put(2 * M + CLUSTER, CLUSTER, 5);
	put(2 * M, CLUSTER, 6);
	expect(2 * M, CLUSTER, 6);
	expect(2 * M + CLUSTER, CLUSTER, 5);
	/* What a failed write left there is for the next open to look at. */
	close_image(true);
	assert_int_equal(features() & QED_F_NEED_CHECK, QED_F_NEED_CHECK);
	open_image(NAME);
	assert_int_equal(features() & QED_F_NEED_CHECK, 0);
	expect(0, CLUSTER, 1);
	expect(CLUSTER, CLUSTER, 3);
	expect(2 * M, CLUSTER, 6);
	expect(2 * M + CLUSTER, CLUSTER, 5);
}

/* Data that cannot be written: its place is used again, and nothing leaks. */
static void test_data_fails(void **state)
{
	uint64_t size;

	make_small();
	open_image(FAULTY);
	put(0, CLUSTER, 1);
	size = the_qed()->end;
	for (unsigned i = 0; i < 10; i++) {
		fault(OX_IO_WRITE, size, CLUSTER);
		assert_int_equal(request(OX_IO_WRITE, CLUSTER, 100, 2, 0), -EIO);
	}
	assert_int_equal(the_qed()->end, size + CLUSTER);
	put(CLUSTER + 100, 100, 3);
	/* What is in that place from before does not show. */
	expect(CLUSTER, 100, 0);
	expect(CLUSTER + 100, 100, 3);
	expect(CLUSTER + 200, CLUSTER - 200, 0);
	close_image(true);
	expect_clean();
}

/* Nothing is changed before the mark is durable. */
static void test_mark_first(void **state)
{
	struct ox_faulty_log log;
	size_t flush = SIZE_MAX;

	make_small();
	open_image(FAULTY);
	fault(OX_IO_FLUSH, 0, 0);
	assert_true(request(OX_IO_WRITE, 0, CLUSTER, 1, 0) < 0);
	expect(0, CLUSTER, 0);
	ox_faulty_record(kit.image->store, true);
	put(0, CLUSTER, 1);
	ox_faulty_take_log(kit.image->store, &log);
	for (size_t i = 0; i < log.count; i++) {
		const struct ox_faulty_record *r = &log.records[i];

		if (r->op == OX_IO_FLUSH && !r->truncate && flush == SIZE_MAX)
			flush = i;
		/* The header is the only thing that is written before. */
		if (r->op == OX_IO_WRITE && r->offset + r->length > QED_HEADER_BYTES) {
			assert_true(flush != SIZE_MAX);
			assert_true(log.records[flush].completed < r->submitted);
		}
	}
	ox_faulty_free_log(&log);
	close_image(true);
	expect_clean();
}

/* Is there a flush that began after `from` had ended, and ended before `to` began? */
static bool flush_between(const struct ox_faulty_log *log, size_t from, size_t to)
{
	for (size_t i = 0; i < log->count; i++) {
		const struct ox_faulty_record *r = &log->records[i];

		if (r->op == OX_IO_FLUSH && r->submitted > log->records[from].completed &&
		    r->completed && r->completed < log->records[to].submitted)
			return true;
	}
	return false;
}

/* The number of the last write that begins at `offset`. */
static size_t last_write(const struct ox_faulty_log *log, uint64_t offset)
{
	size_t last = SIZE_MAX;

	for (size_t i = 0; i < log->count; i++) {
		if (log->records[i].op == OX_IO_WRITE && log->records[i].offset == offset)
			last = i;
	}
	assert_true(last != SIZE_MAX);
	return last;
}

/* One allocating write in a begun image; is its data durable before the table is written? */
static bool is_data_first(uint64_t guest)
{
	struct ox_faulty_log log;
	size_t data, table;
	bool between;

	put(DISK - CLUSTER, CLUSTER, 1);
	put(0, CLUSTER, 1); /* the table is there */
	ox_faulty_record(kit.image->store, true);
	put(guest, CLUSTER, 2);
	ox_faulty_record(kit.image->store, false);
	ox_faulty_take_log(kit.image->store, &log);
	data = last_write(&log, peek64(l2_entry(guest / CLUSTER)));
	table = last_write(&log, ox_align_down(l2_entry(guest / CLUSTER), QED_PIECE));
	assert_true(log.records[data].completed < log.records[table].submitted);
	between = flush_between(&log, data, table);
	ox_faulty_free_log(&log);
	return between;
}

static void test_order(void **state)
{
	uint8_t base[4 * CLUSTER];

	/* Fresh space over zeroes costs no flush. */
	make_small();
	open_image(FAULTY);
	assert_false(is_data_first(CLUSTER));
	close_image(true);
	ox_memory_forget("qed");
	/* The backing file's content shows until the data is durable; behind its end it is zero. */
	memset(base, 9, sizeof(base));
	poke(BASE, 0, base, sizeof(base));
	make(NAME, "4k", "1", DISK, BASE);
	open_image(FAULTY);
	assert_true(is_data_first(CLUSTER));
	assert_false(is_data_first(5 * CLUSTER));
	/* A zero cluster shows nothing. */
	assert_int_equal(request(OX_IO_ZERO, 2 * CLUSTER, CLUSTER, 0, 0), 0);
	assert_false(is_data_first(2 * CLUSTER));
	/* A place that was used before does not read as zero. */
	fault(OX_IO_WRITE, the_qed()->end, CLUSTER);
	assert_int_equal(request(OX_IO_WRITE, 8 * CLUSTER, CLUSTER, 2, 0), -EIO);
	assert_true(is_data_first(8 * CLUSTER));
	close_image(true);
	expect_clean();
}

/* A durable write in a cluster whose entry is not durable yet takes a flush with it. */
static void test_durable(void **state)
{
	struct ox_faulty_log log;
	size_t data;
	bool flushed = false;

	make_small();
	open_image(FAULTY);
	put(0, CLUSTER, 1);
	ox_faulty_record(kit.image->store, true);
	assert_int_equal(request(OX_IO_WRITE, 0, CLUSTER, 2, OX_IO_DSYNC), 0);
	ox_faulty_take_log(kit.image->store, &log);
	data = last_write(&log, 3 * CLUSTER);
	for (size_t i = 0; i < log.count; i++)
		flushed |= log.records[i].op == OX_IO_FLUSH &&
		           log.records[i].submitted > log.records[data].completed;
	ox_faulty_free_log(&log);
	assert_true(flushed);
	/* Now everything is: the next one is durable by itself. */
	assert_false(kit.image->metadata_dirty);
	assert_int_equal(request(OX_IO_WRITE, 0, CLUSTER, 3, OX_IO_DSYNC), 0);
	ox_faulty_take_log(kit.image->store, &log);
	assert_int_equal(log.count, 1);
	assert_int_equal(log.records[0].flags & OX_IO_DSYNC, OX_IO_DSYNC);
	ox_faulty_free_log(&log);
}

/* --- creation --------------------------------------------------------------------------------- */

static int create(const char *cluster, const char *table, uint64_t size, const char *base)
{
	struct ox_create_option words[2] = {{(char *)"cluster_size", (char *)(uintptr_t)cluster},
	                                    {(char *)"table_size", (char *)(uintptr_t)table}};
	struct ox_image_create_options options_ = {.path = NAME,
	                                           .format = "qed",
	                                           .size = size,
	                                           .has_size = true,
	                                           .options = words,
	                                           .option_count = 2,
	                                           .backing_file = base,
	                                           .backing_format = base ? "qed" : NULL,
	                                           .unsafe_backing = true};
	struct ox_error err = {0};
	int rc = ox_image_create(&options_, &err);

	assert_true(rc == 0 || err.code != 0);
	ox_image_create_options_free(&options_);
	return rc;
}

static void test_create(void **state)
{
	char name[1100];

	assert_true(create("2k", "4", M, NULL) < 0);
	assert_true(create("5000", "4", M, NULL) < 0);
	assert_true(create("128M", "4", M, NULL) < 0);
	assert_true(create("many", "4", M, NULL) < 0);
	assert_true(create("64k", "3", M, NULL) < 0);
	assert_true(create("64k", "32", M, NULL) < 0);
	assert_true(create("4k", "1", (UINT64_C(1) << 30) + 1, NULL) < 0);
	assert_int_equal(create("4k", "1", UINT64_C(1) << 30, NULL), 0);
	assert_int_equal(file_size(), 2 * CLUSTER);
	/* A disk of no bytes is one. */
	assert_int_equal(create("4k", "1", 0, NULL), 0);
	expect_clean();
	/* Whole sectors. */
	assert_int_equal(create("64k", "4", 1000, NULL), 0);
	assert_int_equal(peek64(48), 1024);
	memset(name, 'x', sizeof(name));
	name[1023] = '\0';
	assert_int_equal(create("64k", "4", M, name), 0);
	assert_int_equal(features(), QED_F_BACKING_FILE);
	options.allow = (struct ox_allow){.nothing = true};
	open_image(NAME);
	assert_string_equal(kit.image->backing_file, name);
	assert_null(kit.image->backing_format);
	close_image(true);
	name[1023] = 'x';
	name[1024] = '\0';
	assert_true(create("64k", "4", M, name) < 0);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_header),
	        TEST(test_features),
	        TEST(test_shapes),
	        TEST(test_large_disk),
	        TEST(test_kill),
	        TEST(test_lost_tail),
	        TEST(test_late_repair),
	        TEST(test_zeroes),
	        TEST(test_resize),
	        TEST(test_resize_large),
	        TEST(test_budget),
	        TEST(test_together),
	        TEST(test_invalid_entries),
	        TEST(test_invalid_l1),
	        TEST(test_data_on_table),
	        TEST(test_used_twice),
	        TEST(test_marked_and_damaged),
	        TEST(test_leaks),
	        TEST(test_table_fails),
	        TEST(test_data_fails),
	        TEST(test_mark_first),
	        TEST(test_order),
	        TEST(test_durable),
	        TEST(test_create),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
