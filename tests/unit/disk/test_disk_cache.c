/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The five cache modes and the guest's write-cache switch: which requests reach the store, and
 * with which promises.
 */
#include "util.h"

static uint8_t block[4096];

/* --- the modes -------------------------------------------------------------------------------- */

static void writes(struct fixture *f, bool durable)
{
	uint8_t flag = durable ? OX_IO_DSYNC : 0;

	memset(block, 7, sizeof(block));
	assert_int_equal(run_co(f, OX_IO_WRITE, 4096, block, 4096), 0);
	assert_int_equal(run_co(f, OX_IO_ZERO, 8192, NULL, 4096), 0);
	assert_int_equal(run_co(f, OX_IO_DISCARD, 12288, NULL, 4096), 0);
	assert_int_equal(run_co(f, OX_IO_READ, 4096, block, 4096), 0);
	assert_int_equal(block[100], 7);
	assert_int_equal(spy.count, 4);
	assert_int_equal(spy.log[0].op, OX_IO_WRITE);
	assert_int_equal(spy.log[1].op, OX_IO_ZERO);
	assert_int_equal(spy.log[2].op, OX_IO_DISCARD);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(spy.log[i].flags, flag);
	assert_int_equal(spy.log[3].flags, 0);
}

static void volatile_co(struct fixture *f)
{
	struct ox_disk_info info;

	writes(f, false);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(spy_count(OX_IO_FLUSH), 1);
	ox_disk_get_info(f->disk, &info);
	assert_true(info.writeback);
	spy_clear();
	fixture_deactivate_co(f);
	assert_int_equal(spy_count(OX_IO_FLUSH), 1);
}

static void durable_co(struct fixture *f)
{
	struct ox_disk_info info;

	writes(f, true);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(spy_count(OX_IO_FLUSH), 0);
	/* The guest may ask for a volatile cache and does not get one. */
	ox_disk_set_writeback(f->disk, true);
	ox_disk_get_info(f->disk, &info);
	assert_false(info.writeback);
	spy_clear();
	writes(f, true);
}

static void unsafe_co(struct fixture *f)
{
	writes(f, false);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	/* The user said that nothing need be durable; the guest's switch does not change that. */
	ox_disk_set_writeback(f->disk, false);
	spy_clear();
	writes(f, false);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	fixture_deactivate_co(f);
	assert_int_equal(spy_count(OX_IO_FLUSH), 0);
}

static void with_none(struct ox_disk_options *options)
{
	options->cache = OX_CACHE_NONE;
}
static void with_writethrough(struct ox_disk_options *options)
{
	options->cache = OX_CACHE_WRITETHROUGH;
}
static void with_directsync(struct ox_disk_options *options)
{
	options->cache = OX_CACHE_DIRECTSYNC;
}
static void with_unsafe(struct ox_disk_options *options)
{
	options->cache = OX_CACHE_UNSAFE;
}

static void test_none(void **state)
{
	fixture_run(volatile_co, with_none);
}
static void test_writeback(void **state)
{
	fixture_run(volatile_co, NULL);
}
static void test_writethrough(void **state)
{
	fixture_run(durable_co, with_writethrough);
}
static void test_directsync(void **state)
{
	fixture_run(durable_co, with_directsync);
}
static void test_unsafe(void **state)
{
	fixture_run(unsafe_co, with_unsafe);
}

/* --- the switch ---------------------------------------------------------------------------------
 */

static void switch_co(struct fixture *f)
{
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
	ox_disk_set_writeback(f->disk, false);
	/* What completed before becomes durable without the guest's doing. */
	ox_sleep_co(1000000);
	assert_int_equal(spy.count, 2);
	assert_int_equal(spy.log[1].op, OX_IO_FLUSH);
	spy_clear();
	/* From then on as in writethrough. */
	writes(f, true);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(spy_count(OX_IO_FLUSH), 0);
	/* And back. */
	ox_disk_reset_writeback(f->disk);
	spy_clear();
	writes(f, false);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(spy_count(OX_IO_FLUSH), 1);
}

static void test_switch(void **state)
{
	fixture_run(switch_co, NULL);
}

/* A write that began under the volatile cache and ends after the switch is made durable before
 * the guest hears of it. */
static void switch_in_flight_co(struct fixture *f)
{
	struct call write;

	spy.park = true;
	call_start(f, &write, OX_IO_WRITE, 0, block, 4096);
	assert_int_equal(spy.log[0].flags, 0);
	spy.park = false;
	ox_disk_set_writeback(f->disk, false);
	ox_sleep_co(1000000);
	assert_int_equal(spy_count(OX_IO_FLUSH), 1); /* the switch's own, too early for it */
	spy_clear();
	spy.count = 1;
	spy_release();
	assert_int_equal(call_wait_co(&write), 0);
	assert_int_equal(spy.log[spy.count - 1].op, OX_IO_FLUSH);
}

static void test_switch_in_flight(void **state)
{
	fixture_run(switch_in_flight_co, NULL);
}

/* While the flush behind the switch fails, a durable write does not complete before one has
 * succeeded, and flushes reach the store. */
static void switch_flush_fails_co(struct fixture *f)
{
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
	spy.fail[OX_IO_FLUSH] = EIO;
	spy.fail_times[OX_IO_FLUSH] = 3;
	ox_disk_set_writeback(f->disk, false);
	ox_sleep_co(1000000);
	assert_int_equal(spy.fail_times[OX_IO_FLUSH], 2);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), -EIO);
	assert_int_equal(run_co(f, OX_IO_WRITE, 4096, block, 4096), -EIO);
	spy_clear();
	assert_int_equal(run_co(f, OX_IO_WRITE, 4096, block, 4096), 0);
	assert_int_equal(spy.count, 2);
	assert_int_equal(spy.log[0].flags, OX_IO_DSYNC);
	assert_int_equal(spy.log[1].op, OX_IO_FLUSH);
	spy_clear();
	assert_int_equal(run_co(f, OX_IO_WRITE, 4096, block, 4096), 0);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(spy.count, 1);
}

static void test_switch_flush_fails(void **state)
{
	fixture_run(switch_flush_fails_co, NULL);
}

/* A flush that began before the switch covers nothing that the switch owes. */
static void early_flush_co(struct fixture *f)
{
	struct call flush;

	spy.park = true;
	call_start(f, &flush, OX_IO_FLUSH, 0, NULL, 0);
	spy.park = false;
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
	spy.fail[OX_IO_FLUSH] = EIO;
	spy.fail_times[OX_IO_FLUSH] = 1;
	ox_disk_set_writeback(f->disk, false);
	ox_sleep_co(1000000);
	spy_release();
	assert_int_equal(call_wait_co(&flush), 0);
	spy_clear();
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(spy_count(OX_IO_FLUSH), 1);
}

static void test_early_flush(void **state)
{
	fixture_run(early_flush_co, NULL);
}

/* --- flags and zeroes ---------------------------------------------------------------------------
 */

static void fua_co(struct fixture *f)
{
	struct call call;

	call_start_flags(f, &call, OX_IO_WRITE, OX_IO_DSYNC, 0, block, 512);
	assert_int_equal(call_wait_co(&call), 0);
	assert_int_equal(spy.log[0].flags, OX_IO_DSYNC);
	/* A flag that an operation does not have is not passed on. */
	call_start_flags(f, &call, OX_IO_READ, OX_IO_DSYNC | OX_IO_MAY_UNMAP, 0, block, 512);
	assert_int_equal(call_wait_co(&call), 0);
	assert_int_equal(spy.log[1].flags, 0);
	call_start_flags(f, &call, OX_IO_ZERO, OX_IO_MAY_UNMAP, 0, NULL, 512);
	assert_int_equal(call_wait_co(&call), 0);
	assert_int_equal(spy.log[2].flags, OX_IO_MAY_UNMAP);
}

static void test_fua(void **state)
{
	fixture_run(fua_co, NULL);
}

static void ignore_discard_co(struct fixture *f)
{
	struct ox_disk_info info;
	struct call call;

	assert_int_equal(run_co(f, OX_IO_DISCARD, 0, NULL, 4096), 0);
	assert_int_equal(spy.count, 0);
	call_start_flags(f, &call, OX_IO_ZERO, OX_IO_MAY_UNMAP, 0, NULL, 512);
	assert_int_equal(call_wait_co(&call), 0);
	assert_int_equal(spy.log[0].flags, 0);
	ox_disk_get_info(f->disk, &info);
	assert_false(info.discard);
	assert_false(info.zero_unmaps);
}

static void with_ignore_discard(struct ox_disk_options *options)
{
	options->discard = OX_DISCARD_IGNORE;
}

static void test_ignore_discard(void **state)
{
	fixture_run(ignore_discard_co, with_ignore_discard);
}

static void detect(struct fixture *f, uint8_t flags)
{
	memset(block, 0, sizeof(block));
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
	assert_int_equal(spy.log[0].op, OX_IO_ZERO);
	assert_int_equal(spy.log[0].flags, flags);
	block[4095] = 1;
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
	assert_int_equal(spy.log[1].op, OX_IO_WRITE);
}

static void detect_on_co(struct fixture *f)
{
	struct ox_disk_stats *stats = calloc(1, sizeof(*stats));

	detect(f, 0);
	/* What the guest sees counted is what it asked for. */
	ox_disk_get_stats(f->disk, stats);
	assert_int_equal(stats->op[OX_IO_WRITE].operations, 2);
	assert_int_equal(stats->op[OX_IO_WRITE].bytes, 8192);
	assert_int_equal(stats->op[OX_IO_WRITE].latency.count, 2);
	assert_int_equal(stats->op[OX_IO_ZERO].operations, 0);
	free(stats);
}

static void detect_unmap_co(struct fixture *f)
{
	detect(f, OX_IO_MAY_UNMAP);
}

static void with_detect_on(struct ox_disk_options *options)
{
	options->detect_zeroes = OX_DETECT_ZEROES_ON;
}
static void with_detect_unmap(struct ox_disk_options *options)
{
	options->detect_zeroes = OX_DETECT_ZEROES_UNMAP;
}
static void with_detect_unmap_ignore(struct ox_disk_options *options)
{
	with_detect_unmap(options);
	options->discard = OX_DISCARD_IGNORE;
}

static void test_detect_zeroes(void **state)
{
	fixture_run(detect_on_co, with_detect_on);
	fixture_run(detect_unmap_co, with_detect_unmap);
	fixture_run(detect_on_co, with_detect_unmap_ignore);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_none),
	        cmocka_unit_test(test_writeback),
	        cmocka_unit_test(test_writethrough),
	        cmocka_unit_test(test_directsync),
	        cmocka_unit_test(test_unsafe),
	        cmocka_unit_test(test_switch),
	        cmocka_unit_test(test_switch_in_flight),
	        cmocka_unit_test(test_switch_flush_fails),
	        cmocka_unit_test(test_early_flush),
	        cmocka_unit_test(test_fua),
	        cmocka_unit_test(test_ignore_discard),
	        cmocka_unit_test(test_detect_zeroes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
