/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The error policy: what a guest gets when the host fails, what is held, and how it goes on.
 */
#include "util.h"

static uint8_t block[4096];
static struct ox_disk_info info;

static struct {
	struct ox_disk_listener listener;
	unsigned stopped, continued, io_errors;
} heard;

static void hear(struct ox_disk_listener *listener, enum ox_disk_event event)
{
	heard.stopped += event == OX_DISK_STOPPED;
	heard.continued += event == OX_DISK_CONTINUED;
	heard.io_errors += event == OX_DISK_IO_ERROR;
}

static void listen_to(struct fixture *f)
{
	memset(&heard, 0, sizeof(heard));
	heard.listener.fn = hear;
	ox_disk_add_listener(f->disk, &heard.listener);
}

static void fail_next(uint8_t op, int error, unsigned times)
{
	spy.fail[op] = error;
	spy.fail_times[op] = times;
}

/* Lets posts and their answers go round. */
static void settle_co(void)
{
	ox_sleep_co(2000000);
}

static bool is_stopped(struct fixture *f)
{
	ox_disk_get_info(f->disk, &info);
	return info.stopped;
}

static uint64_t held(struct fixture *f)
{
	struct ox_disk_stats *stats = calloc(1, sizeof(*stats));
	uint64_t value;

	ox_disk_get_stats(f->disk, stats);
	value = stats->held;
	free(stats);
	return value;
}

/* --- report, ignore -----------------------------------------------------------------------------
 */

static void report_co(struct fixture *f)
{
	struct ox_disk_stats *stats = calloc(1, sizeof(*stats));

	listen_to(f);
	fail_next(OX_IO_READ, EIO, 1);
	fail_next(OX_IO_WRITE, EIO, 1);
	fail_next(OX_IO_FLUSH, EIO, 1);
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), -EIO);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 512), -EIO);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), -EIO);
	/* Only a full disk stops the guest, and only its writes. */
	fail_next(OX_IO_READ, ENOSPC, 1);
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), -ENOSPC);
	settle_co();
	assert_false(is_stopped(f));
	assert_int_equal(heard.stopped, 0);
	assert_int_equal(heard.io_errors, 1); /* rate limited */
	ox_disk_get_stats(f->disk, stats);
	assert_int_equal(stats->op[OX_IO_READ].failed, 2);
	assert_int_equal(stats->op[OX_IO_READ].operations, 2);
	assert_int_equal(stats->op[OX_IO_READ].bytes, 0);
	assert_int_equal(stats->op[OX_IO_WRITE].failed, 1);
	assert_int_equal(stats->op[OX_IO_FLUSH].failed, 1);
	assert_int_equal(stats->in_flight, 0);
	free(stats);
	ox_disk_remove_listener(f->disk, &heard.listener);
}

static void test_report(void **state)
{
	fixture_run(report_co, NULL);
}

static void ignore_co(struct fixture *f)
{
	fail_next(OX_IO_READ, EIO, 1);
	fail_next(OX_IO_WRITE, ENOSPC, 1);
	fail_next(OX_IO_FLUSH, EIO, 1);
	memset(block, 0xaa, sizeof(block));
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 512), 0);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	/* Nothing of the host's memory shows. */
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), 0);
	assert_true(ox_buffer_is_zero(block, 512));
	assert_int_equal(block[512], 0xaa);
}

static void with_ignore(struct ox_disk_options *options)
{
	options->rerror = options->werror = OX_ON_ERROR_IGNORE;
}

static void test_ignore(void **state)
{
	fixture_run(ignore_co, with_ignore);
}

/* --- stop
 * ----------------------------------------------------------------------------------------- */

static void enospc_co(struct fixture *f)
{
	struct call write, later, flush, read;

	listen_to(f);
	memset(block, 5, sizeof(block));
	fail_next(OX_IO_WRITE, ENOSPC, 2);
	call_start(f, &write, OX_IO_WRITE, 0, block, 4096);
	settle_co();
	assert_false(write.done);
	assert_true(write.request.held);
	assert_true(is_stopped(f));
	assert_int_equal(info.stop_error, ENOSPC);
	assert_int_equal(heard.stopped, 1);
	/* What comes later waits behind it, reads do not. */
	call_start(f, &later, OX_IO_ZERO, 8192, NULL, 4096);
	call_start(f, &flush, OX_IO_FLUSH, 0, NULL, 0);
	call_start(f, &read, OX_IO_READ, 0, block, 512);
	assert_int_equal(call_wait_co(&read), 0);
	assert_int_equal(held(f), 3);
	/* The first try fails again. */
	ox_disk_continue(f->disk);
	settle_co();
	assert_true(is_stopped(f));
	assert_int_equal(heard.stopped, 1);
	assert_int_equal(heard.continued, 0);
	assert_false(write.done);
	/* The next succeeds. */
	memset(block, 5, sizeof(block));
	ox_disk_continue(f->disk);
	assert_int_equal(call_wait_co(&write), 0);
	assert_int_equal(call_wait_co(&later), 0);
	assert_int_equal(call_wait_co(&flush), 0);
	settle_co();
	assert_false(is_stopped(f));
	assert_int_equal(info.stop_error, 0);
	assert_int_equal(held(f), 0);
	assert_int_equal(heard.continued, 1);
	memset(block, 0, sizeof(block));
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 4096), 0);
	assert_int_equal(block[4095], 5);
	ox_disk_remove_listener(f->disk, &heard.listener);
}

static void test_enospc(void **state)
{
	fixture_run(enospc_co, NULL);
}

/* Without anybody's doing it goes on by itself. */
static void timer_co(struct fixture *f)
{
	fail_next(OX_IO_WRITE, ENOSPC, 2);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
	assert_int_equal(spy_count(OX_IO_WRITE), 3);
	settle_co();
	assert_false(is_stopped(f));
}

static void test_timer(void **state)
{
	fixture_run(timer_co, NULL);
}

static void stop_all_co(struct fixture *f)
{
	struct call read, flush;

	fail_next(OX_IO_READ, EIO, 1);
	fail_next(OX_IO_FLUSH, EIO, 1);
	call_start(f, &read, OX_IO_READ, 0, block, 4096);
	call_start(f, &flush, OX_IO_FLUSH, 0, NULL, 0);
	settle_co();
	assert_true(read.request.held);
	assert_true(flush.request.held);
	ox_disk_continue(f->disk);
	assert_int_equal(call_wait_co(&read), 0);
	/* The flush had never reached the store: it fails at its first try there, and is held. */
	settle_co();
	ox_disk_continue(f->disk);
	assert_int_equal(call_wait_co(&flush), 0);
	/* What no second try changes is reported at once. */
	fail_next(OX_IO_WRITE, EPERM, 1);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), -EPERM);
	settle_co();
	assert_false(is_stopped(f));
}

static void with_stop(struct ox_disk_options *options)
{
	options->rerror = options->werror = OX_ON_ERROR_STOP;
}

static void test_stop_all(void **state)
{
	fixture_run(stop_all_co, with_stop);
}

/* A reset takes its requests back; the disk goes on without them. */
static void take_held_co(struct fixture *f)
{
	struct call first, second, flying;

	fail_next(OX_IO_WRITE, ENOSPC, 1);
	call_start(f, &first, OX_IO_WRITE, 0, block, 4096);
	settle_co();
	call_start(f, &second, OX_IO_WRITE, 4096, block, 4096);
	spy.park = true;
	call_start(f, &flying, OX_IO_READ, 0, block, 4096);
	assert_false(ox_disk_take_held(f->queue, &flying.request));
	assert_true(ox_disk_take_held(f->queue, &first.request));
	assert_false(ox_disk_take_held(f->queue, &first.request));
	assert_true(ox_disk_take_held(f->queue, &second.request));
	spy_release();
	assert_int_equal(call_wait_co(&flying), 0);
	assert_int_equal(held(f), 0);
	ox_disk_continue(f->disk);
	settle_co();
	assert_false(is_stopped(f));
	assert_false(first.done);
	assert_false(second.done);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
}

static void test_take_held(void **state)
{
	fixture_run(take_held_co, NULL);
}

/* A drain does not wait for what is held, and a disk that is stopped can be deactivated. */
static void leave_stopped_co(struct fixture *f)
{
	struct call write, left;

	fail_next(OX_IO_WRITE, ENOSPC, 1000);
	call_start(f, &write, OX_IO_WRITE, 0, block, 4096);
	call_start(f, &left, OX_IO_WRITE, 4096, block, 4096);
	ox_disk_drain_co(f->disk);
	assert_false(write.done);
	ox_disk_continue(f->disk);
	settle_co();
	assert_true(ox_disk_take_held(f->queue, &write.request));
	fixture_deactivate_co(f);
	/* The export forgot this one: it is failed rather than forgotten. */
	assert_true(left.done);
	assert_int_equal(left.request.result, -EIO);
	assert_false(is_stopped(f));
	fixture_activate_co(f);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 4096), 0);
}

static void test_leave_stopped(void **state)
{
	fixture_run(leave_stopped_co, NULL);
}

/* A disk that is left in the middle of a round. */
static void leave_in_round_co(struct fixture *f)
{
	struct call write;

	fail_next(OX_IO_WRITE, ENOSPC, 1000);
	call_start(f, &write, OX_IO_WRITE, 0, block, 4096);
	settle_co();
	ox_disk_continue(f->disk);
	fixture_deactivate_co(f);
	assert_true(write.done);
	assert_int_equal(write.request.result, -EIO);
	assert_int_equal(f->disk->retry_pending, 0);
	assert_false(is_stopped(f));
}

static void test_leave_in_round(void **state)
{
	fixture_run(leave_in_round_co, NULL);
}

/* Continue during a round asks for another one, not for two at a time. */
static void continue_twice_co(struct fixture *f)
{
	struct call write;

	fail_next(OX_IO_WRITE, ENOSPC, 2);
	call_start(f, &write, OX_IO_WRITE, 0, block, 4096);
	settle_co();
	ox_disk_continue(f->disk);
	ox_disk_continue(f->disk);
	ox_disk_continue(f->disk);
	assert_int_equal(call_wait_co(&write), 0);
	settle_co();
	assert_false(is_stopped(f));
}

static void test_continue_twice(void **state)
{
	fixture_run(continue_twice_co, NULL);
}

/* What waits beyond the end of a disk that has shrunk fails, and does not stop it again. */
static void held_beyond_co(struct fixture *f)
{
	struct ox_error err = {0};
	struct call write;

	fail_next(OX_IO_WRITE, ENOSPC, 1);
	call_start(f, &write, OX_IO_WRITE, MIB - 4096, block, 4096);
	settle_co();
	assert_int_equal(ox_disk_resize_co(f->disk, MIB / 2, true, &err), 0);
	ox_disk_continue(f->disk);
	assert_int_equal(call_wait_co(&write), -EIO);
	settle_co();
	assert_false(is_stopped(f));
}

static void test_held_beyond(void **state)
{
	fixture_run(held_beyond_co, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_report),         cmocka_unit_test(test_ignore),
	        cmocka_unit_test(test_enospc),         cmocka_unit_test(test_timer),
	        cmocka_unit_test(test_stop_all),       cmocka_unit_test(test_take_held),
	        cmocka_unit_test(test_leave_stopped),  cmocka_unit_test(test_leave_in_round),
	        cmocka_unit_test(test_continue_twice), cmocka_unit_test(test_held_beyond),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
