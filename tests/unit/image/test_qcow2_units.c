/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * qcow2's map in memory: how much of it there is, when it goes, and when it goes to the file.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "image/qcow2/unit.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)
#define TIB (UINT64_C(1) << 40)

static char path[] = "/tmp/oxbow-units-XXXXXX";

static int make_path(void **state)
{
	int fd = mkstemp(path);

	if (fd < 0)
		return -1;
	close(fd);
	return 0;
}

static int drop_path(void **state)
{
	return unlink(path);
}

static void make(uint64_t size, const char *name, const char *value)
{
	struct ox_create_option option = {(char *)(uintptr_t)name, (char *)(uintptr_t)value};
	struct ox_image_create_options options = {.path = path,
	                                          .format = "qcow2",
	                                          .size = size,
	                                          .has_size = true,
	                                          .options = &option,
	                                          .option_count = 1};
	struct ox_error err = {0};

	if (ox_image_create(&options, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_create_options_free(&options);
}

static void with(uint64_t budget,
                 int (*fn_co)(struct ox_image_channel *channel, void *arg, struct ox_error *err))
{
	struct ox_image_options options = {
	        .format = "qcow2",
	        .metadata_cache = budget,
	        .store = {.aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE, .write_granularity = 512}};
	struct ox_error err = {0};

	if (ox_image_with(path, &options, fn_co, NULL, &err) < 0)
		fail_msg("%s", err.text);
}

/* Has the whole map looked at once; what it takes then. */
static uint64_t look_at_all_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	struct ox_extent extent;

	for (uint64_t at = 0; at < channel->image->size; at += UINT64_C(1) << q->unit_shift)
		assert_int_equal(qcow2_map_co(channel, at, 512, &extent), 0);
	return __atomic_load_n(&q->unit_bytes, __ATOMIC_RELAXED);
}

static int preallocated_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	const struct qcow2 *q = channel->image->priv;
	struct ox_extent extent;
	uint64_t bytes = look_at_all_co(channel);

	print_message("# 1 TiB: %llu bytes in %llu units\n", (unsigned long long)bytes,
	              (unsigned long long)q->unit_count);
	assert_int_equal(q->unit_count, 2048);
	/* All of it is there, and it is well below a mebibyte. */
	for (uint64_t i = 0; i < q->unit_count; i++)
		assert_non_null(q->units[i]);
	assert_true(bytes > 0 && bytes < MIB * 3 / 4);
	/* A run answers as its entries do: the data of a unit is contiguous. */
	assert_int_equal(qcow2_lookup(channel->image, 7 * GIB, 100 * MIB, &extent), 0);
	assert_int_equal(extent.length, 100 * MIB);
	return 0;
}

static void preallocated(void **state)
{
	make(TIB, "preallocation", "metadata");
	with(0, preallocated_co);
}

/* A map of which no part is a run: every second cluster is written. */
static int scatter_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	char sector[512];
	int rc = 0;

	memset(sector, 1, sizeof(sector));
	for (uint64_t at = 0; rc == 0 && at < channel->image->size; at += 8192)
		rc = ox_image_write_co(channel, at, sector, sizeof(sector), 0);
	return rc;
}

static int within_budget_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	const struct qcow2 *q = channel->image->priv;

	look_at_all_co(channel);
	/* Dropping happens in the background: whatever waits for it here has waited for it. */
	while (__atomic_load_n(&q->cache->trimming, __ATOMIC_RELAXED))
		ox_sleep_co(100000);
	assert_true(__atomic_load_n(&q->unit_bytes, __ATOMIC_RELAXED) <= 256 * 1024 + 16 * 1024);
	return 0;
}

static int all_of_it_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_true(look_at_all_co(channel) > MIB);
	return 0;
}

static void budget(void **state)
{
	make(512 * MIB, "cluster_size", "4k");
	with(256 * 1024, scatter_co);
	/* With room for everything, everything stays; with less, that much does. */
	with(0, all_of_it_co);
	with(256 * 1024, within_budget_co);
}

/* As when half a minute has passed. */
static void let_idle_co(struct ox_image_channel *channel)
{
	struct qcow2_units *cache = ((struct qcow2 *)channel->image->priv)->cache;

	assert_ptr_equal(cache->idle_channel, channel);
	ox_timer_cancel(&cache->idle_timer);
	cache->idle_timer.fn(&cache->idle_timer);
	while (__atomic_load_n(&cache->trimming, __ATOMIC_RELAXED))
		ox_sleep_co(100000);
}

static int idle_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	const struct qcow2 *q = channel->image->priv;
	struct ox_extent extent;
	char sector[512];

	assert_true(look_at_all_co(channel) > MIB);
	/* The first time they were just used, the second time nobody looked since. */
	let_idle_co(channel);
	assert_true(q->unit_bytes > MIB);
	assert_int_equal(qcow2_map_co(channel, 0, 512, &extent), 0);
	let_idle_co(channel);
	assert_true(q->unit_bytes > 0 && q->unit_bytes < 16 * 1024);
	assert_non_null(q->units[0]);
	/* What is dirty stays. */
	memset(sector, 2, sizeof(sector));
	assert_int_equal(ox_image_write_co(channel, 100 * MIB + 4096, sector, 512, 0), 0);
	let_idle_co(channel);
	let_idle_co(channel);
	assert_non_null(q->units[(100 * MIB) >> q->unit_shift]);
	assert_null(q->units[0]);
	/* And when it is clean and unused, nothing is left, no timer either. */
	assert_int_equal(qcow2_commit_co(channel), 0);
	while (q->cache->idle_channel)
		let_idle_co(channel);
	assert_int_equal(q->unit_bytes, 0);
	assert_int_equal(ox_image_read_co(channel, 100 * MIB + 4096, sector, 512), 0);
	assert_int_equal(sector[0], 2);
	return 0;
}

static void idle(void **state)
{
	make(512 * MIB, "cluster_size", "4k");
	with(0, scatter_co);
	with(0, idle_co);
}

/* The first change after a flush is written at once; a durable write waits for it to be durable. */
static int ahead_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct ox_image *image = channel->image;
	char sector[512] = {3};

	assert_int_equal(ox_image_write_co(channel, 0, sector, 512, 0), 0);
	assert_true(image->metadata_dirty);
	ox_sleep_co(5000000);
	/* No flush so far: nothing says that there will be one. */
	assert_true(image->metadata_dirty);
	assert_int_equal(ox_image_request_co(channel, OX_IO_FLUSH, 0, 0, 0), 0);
	assert_false(image->metadata_dirty || image->metadata_unsynced);
	assert_int_equal(ox_image_write_co(channel, 10 * MIB, sector, 512, 0), 0);
	while (__atomic_load_n(&image->metadata_dirty, __ATOMIC_ACQUIRE))
		ox_sleep_co(100000);
	assert_true(image->metadata_unsynced);
	/* The second one waits for the flush. */
	assert_int_equal(ox_image_write_co(channel, 20 * MIB, sector, 512, 0), 0);
	ox_sleep_co(5000000);
	assert_true(image->metadata_dirty);
	assert_int_equal(ox_image_request_co(channel, OX_IO_FLUSH, 0, 0, 0), 0);
	/* In place, durable: what maps it must be, too. */
	assert_int_equal(ox_image_write_co(channel, 30 * MIB, sector, 512, 0), 0);
	while (__atomic_load_n(&image->metadata_dirty, __ATOMIC_ACQUIRE))
		ox_sleep_co(100000);
	assert_true(image->metadata_unsynced);
	assert_int_equal(ox_image_write_co(channel, 30 * MIB, sector, 512, OX_IO_DSYNC), 0);
	assert_false(image->metadata_unsynced);
	return 0;
}

static void ahead(void **state)
{
	make(64 * MIB, "cluster_size", "64k");
	with(0, ahead_co);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(preallocated),
	        cmocka_unit_test(budget),
	        cmocka_unit_test(idle),
	        cmocka_unit_test(ahead),
	};

	return cmocka_run_group_tests(tests, make_path, drop_path);
}
