/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A disk's life: opening, activation by several users, drains, sizes, and two I/O threads.
 */
#include "util.h"
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

static uint8_t block[4096];

static unsigned resized;

static void hear_resized(struct ox_disk_listener *listener, enum ox_disk_event event)
{
	resized += event == OX_DISK_RESIZED;
}

/* --- requests that are refused ---------------------------------------------------------------- */

static void refused_co(struct fixture *f)
{
	struct ox_disk_stats *stats = calloc(1, sizeof(*stats));

	assert_int_equal(run_co(f, OX_IO_READ, 1, block, 512), -EINVAL);
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 100), -EINVAL);
	assert_int_equal(run_co(f, OX_IO_READ, MIB, block, 512), -EIO);
	assert_int_equal(run_co(f, OX_IO_WRITE, MIB - 512, block, 1024), -EIO);
	assert_int_equal(run_co(f, OX_IO_ZERO, UINT64_MAX - 511, NULL, 512), -EIO);
	assert_int_equal(run_co(f, 77, 0, NULL, 0), -ENOTSUP);
	assert_int_equal(run_co(f, OX_IO_READ, MIB, block, 0), 0);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 0), 0);
	assert_int_equal(run_co(f, OX_IO_DISCARD, 0, block, 0), 0);
	assert_int_equal(spy_count(OX_IO_WRITE), 0);
	ox_disk_get_stats(f->disk, stats);
	assert_int_equal(stats->invalid, 6);
	free(stats);
}

static void test_refused(void **state)
{
	fixture_run(refused_co, NULL);
}

static void read_only_co(struct fixture *f)
{
	struct ox_error err = {0};

	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), 0);
	assert_int_equal(run_co(f, OX_IO_WRITE, 0, block, 512), -EROFS);
	assert_int_equal(run_co(f, OX_IO_ZERO, 0, NULL, 512), -EROFS);
	assert_int_equal(run_co(f, OX_IO_DISCARD, 0, NULL, 512), -EROFS);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	assert_int_equal(ox_disk_resize_co(f->disk, 2 * MIB, false, &err), -EROFS);
}

static void with_read_only(struct ox_disk_options *options)
{
	options->read_only = true;
}

static void test_read_only(void **state)
{
	fixture_run(read_only_co, with_read_only);
}

/* --- activation ---------------------------------------------------------------------------------
 */

struct activation {
	struct fixture *f;
	int result;
	bool done;
};

static void activate_fiber(void *arg)
{
	struct activation *activation = arg;
	struct ox_error err = {0};

	activation->result = ox_disk_activate_co(activation->f->disk, &err);
	activation->done = true;
}

static void activation_co(struct fixture *f)
{
	struct activation users[3] = {{.f = f}, {.f = f}, {.f = f}};
	struct ox_disk_info info;

	/* A second user of an active disk does not open it again. */
	activate_fiber(&users[0]);
	assert_int_equal(users[0].result, 0);
	assert_ptr_equal(f->disk->image->store, spy.store);
	ox_disk_deactivate_co(f->disk);
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), 0);
	ox_disk_deactivate_co(f->disk);
	ox_disk_get_info(f->disk, &info);
	assert_false(info.active);
	assert_int_equal(info.size, MIB);
	assert_string_equal(info.format, "raw");
	/* Without its image it takes nothing. */
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), -ENXIO);

	/* Three at the same time wait for each other and all have it. */
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(ox_fiber_start(activate_fiber, &users[i]), 0);
	while (!users[2].done)
		ox_sleep_co(1000000);
	assert_int_equal(f->disk->users, 3);
	ox_disk_deactivate_co(f->disk);
	ox_disk_deactivate_co(f->disk);
	assert_int_equal(run_co(f, OX_IO_READ, 0, block, 512), 0);
}

static void test_activation(void **state)
{
	fixture_run(activation_co, NULL);
}

static void reread_co(struct fixture *f)
{
	struct ox_disk_listener listener = {.fn = hear_resized};
	struct ox_error err = {0};
	struct ox_disk_info info;

	/* It grew while it was another's: seen at the next activation. */
	resized = 0;
	ox_disk_add_listener(f->disk, &listener);
	assert_int_equal(ox_store_truncate(spy.store, 2 * MIB, OX_PREALLOC_OFF, NULL, NULL, &err),
	                 0);
	fixture_deactivate_co(f);
	ox_disk_get_info(f->disk, &info);
	assert_int_equal(info.size, MIB);
	fixture_activate_co(f);
	ox_disk_get_info(f->disk, &info);
	assert_int_equal(info.size, 2 * MIB);
	assert_int_equal(resized, 1);
	assert_int_equal(run_co(f, OX_IO_WRITE, 2 * MIB - 4096, block, 4096), 0);
	ox_disk_remove_listener(f->disk, &listener);
}

static void test_reread(void **state)
{
	fixture_run(reread_co, NULL);
}

/* --- drain
 * ---------------------------------------------------------------------------------------- */

struct drain {
	struct fixture *f;
	bool done;
};

static void drain_fiber(void *arg)
{
	struct drain *drain = arg;

	ox_disk_drain_co(drain->f->disk);
	drain->done = true;
}

static void drain_co(struct fixture *f)
{
	struct drain first = {.f = f}, second = {.f = f};
	struct call before, after;
	struct ox_io *early;

	/* Nothing in flight: at once. */
	ox_disk_drain_co(f->disk);

	spy.park = true;
	call_start(f, &before, OX_IO_READ, 0, block, 512);
	assert_int_equal(ox_fiber_start(drain_fiber, &first), 0);
	call_start(f, &after, OX_IO_READ, 0, block, 512);
	assert_int_equal(ox_fiber_start(drain_fiber, &second), 0);
	ox_sleep_co(1000000);
	assert_false(first.done);
	/* The later request does not hold the first drain up. */
	early = spy.parked[0];
	spy.parked[0] = spy.parked[1];
	spy.parked_count = 1;
	spy.real->read(early->channel, early);
	assert_int_equal(call_wait_co(&before), 0);
	ox_sleep_co(1000000);
	assert_true(first.done);
	assert_false(second.done);
	spy_release();
	assert_int_equal(call_wait_co(&after), 0);
	while (!second.done)
		ox_sleep_co(1000000);
}

static void test_drain(void **state)
{
	fixture_run(drain_co, NULL);
}

/* --- size
 * ------------------------------------------------------------------------------------------ */

static void resize_co(struct fixture *f)
{
	struct ox_disk_listener listener = {.fn = hear_resized};
	struct ox_error err = {0};
	struct ox_disk_info info;

	resized = 0;
	ox_disk_add_listener(f->disk, &listener);
	assert_int_equal(ox_disk_resize_co(f->disk, 2 * MIB, false, &err), 0);
	ox_disk_get_info(f->disk, &info);
	assert_int_equal(info.size, 2 * MIB);
	assert_int_equal(resized, 1);
	assert_int_equal(run_co(f, OX_IO_WRITE, 2 * MIB - 4096, block, 4096), 0);
	/* The same size is no news. */
	assert_int_equal(ox_disk_resize_co(f->disk, 2 * MIB, false, &err), 0);
	assert_int_equal(resized, 1);
	/* Less only when it is meant. */
	assert_int_equal(ox_disk_resize_co(f->disk, MIB, false, &err), -EINVAL);
	assert_non_null(strstr(err.text, "--shrink"));
	ox_error_clear(&err);
	assert_int_equal(ox_disk_resize_co(f->disk, MIB, true, &err), 0);
	assert_int_equal(resized, 2);
	assert_int_equal(run_co(f, OX_IO_READ, MIB, block, 512), -EIO);
	assert_int_equal(ox_disk_resize_co(f->disk, MIB + 100, false, &err), -EINVAL);
	ox_error_clear(&err);
	/* Inactive, it is opened for the purpose. */
	fixture_deactivate_co(f);
	assert_int_equal(ox_disk_resize_co(f->disk, 3 * MIB, false, &err), 0);
	ox_disk_get_info(f->disk, &info);
	assert_int_equal(info.size, 3 * MIB);
	assert_false(info.active);
	assert_int_equal(resized, 3);
	fixture_activate_co(f);
	assert_int_equal(run_co(f, OX_IO_READ, 3 * MIB - 512, block, 512), 0);
	ox_disk_remove_listener(f->disk, &listener);
}

static void test_resize(void **state)
{
	fixture_run(resize_co, NULL);
}

/* A shrink waits for what is in flight beyond the new end. */
struct shrink {
	struct fixture *f;
	int result;
	bool done;
};

static void shrink_fiber(void *arg)
{
	struct shrink *shrink = arg;
	struct ox_error err = {0};

	shrink->result = ox_disk_resize_co(shrink->f->disk, MIB / 2, true, &err);
	shrink->done = true;
}

static void shrink_waits_co(struct fixture *f)
{
	struct shrink shrink = {.f = f};
	struct call write;

	spy.park = true;
	call_start(f, &write, OX_IO_WRITE, MIB - 4096, block, 4096);
	assert_int_equal(ox_fiber_start(shrink_fiber, &shrink), 0);
	ox_sleep_co(2000000);
	assert_false(shrink.done);
	assert_int_equal(spy.store->size, MIB);
	assert_int_equal(run_co(f, OX_IO_READ, MIB / 2, block, 512), -EIO);
	spy_release();
	assert_int_equal(call_wait_co(&write), 0);
	while (!shrink.done)
		ox_sleep_co(1000000);
	assert_int_equal(shrink.result, 0);
	assert_int_equal(spy.store->size, MIB / 2);
}

static void test_shrink_waits(void **state)
{
	fixture_run(shrink_waits_co, NULL);
}

/* --- options
 * ---------------------------------------------------------------------------------------- */

static int try_open(struct ox_disk_options *options, struct ox_disk_info *info, char *serial)
{
	struct ox_loop_options loop_options = {.name = "test"};
	struct ox_error err = {0};
	struct ox_disk *disk;
	int rc;

	options->main = ox_loop_new(&loop_options, &err);
	options->loops = &options->main;
	options->loop_count = 1;
	rc = ox_disk_open(options, &disk, &err);
	if (rc == 0) {
		ox_disk_get_info(disk, info);
		snprintf(serial, OX_DISK_SERIAL + 1, "%s", info->serial);
		ox_disk_close(disk);
	} else {
		assert_int_equal(err.code, -rc);
		assert_true(err.text[0] != 0);
	}
	ox_loop_free(options->main);
	return rc;
}

static void test_options(void **state)
{
	char serial[OX_DISK_SERIAL + 1];
	struct ox_disk_options options;
	struct ox_disk_info info;

	ox_disk_options_init(&options);
	options.path = "null:1M";
	assert_int_equal(try_open(&options, &info, serial), 0);
	assert_int_equal(info.logical_block_size, 512);
	assert_string_equal(serial, "null:1M");
	options.name = "a-name-that-is-longer-than-a-serial";
	assert_int_equal(try_open(&options, &info, serial), 0);
	assert_int_equal(strlen(serial), OX_DISK_SERIAL);
	options.logical_block_size = 4096;
	assert_int_equal(try_open(&options, &info, serial), 0);
	assert_int_equal(info.physical_block_size, 4096);
	options.physical_block_size = 512;
	assert_int_equal(try_open(&options, &info, serial), -EINVAL);
	options.physical_block_size = 0;
	options.logical_block_size = 1000;
	assert_int_equal(try_open(&options, &info, serial), -EINVAL);
	options.logical_block_size = 65536;
	assert_int_equal(try_open(&options, &info, serial), -EINVAL);
	/* A rest that is no whole block is not shown. */
	options.path = "null:1049088";
	options.logical_block_size = 4096;
	assert_int_equal(try_open(&options, &info, serial), 0);
	assert_int_equal(info.size, MIB);
	options.logical_block_size = 0;
	options.no_lock = true;
	assert_int_equal(try_open(&options, &info, serial), -EINVAL);
	options.read_only = true;
	assert_int_equal(try_open(&options, &info, serial), 0);
	options.format = "rwa";
	assert_int_equal(try_open(&options, &info, serial), -EINVAL);
	options.format = NULL;
	options.path = "/nonexistent/disk.raw";
	assert_int_equal(try_open(&options, &info, serial), -ENOENT);
}

/* --- two I/O threads
 * ------------------------------------------------------------------------------------ */

enum { THREADS = 2, WORKERS = 8, ROUNDS = 200 };

struct stream {
	struct ox_disk_queue *queue;
	struct ox_request request;
	struct iovec iov;
	uint64_t base;
	unsigned rounds, failed;
	unsigned *running; /* atomic */
	uint8_t buffer[4096];
};

static void stream_next(struct stream *stream)
{
	struct ox_request *request = &stream->request;
	unsigned round = stream->rounds++;

	if (round == ROUNDS) {
		__atomic_fetch_sub(stream->running, 1, __ATOMIC_RELEASE);
		return;
	}
	request->op = round % 8 == 7 ? OX_IO_FLUSH : round % 2 ? OX_IO_READ : OX_IO_WRITE;
	request->flags = 0;
	request->offset = request->op == OX_IO_FLUSH ? 0 : stream->base + round / 2 % 8 * 4096;
	request->length = request->op == OX_IO_FLUSH ? 0 : 4096;
	stream->iov = (struct iovec){.iov_base = stream->buffer, .iov_len = 4096};
	request->iov = &stream->iov;
	request->iovcnt = request->op != OX_IO_FLUSH;
	if (request->op == OX_IO_WRITE)
		memset(stream->buffer, (int)round | 1, sizeof(stream->buffer));
	ox_disk_submit(stream->queue, request);
}

static void stream_done(struct ox_request *request)
{
	struct stream *stream = ox_container_of(request, struct stream, request);
	unsigned round = stream->rounds - 1;

	stream->failed += request->result != 0;
	/* It was written the round before. */
	if (request->op == OX_IO_READ && stream->buffer[17] != (uint8_t)((round - 1) | 1))
		stream->failed++;
	stream_next(stream);
}

static void stream_start(void *arg)
{
	struct stream *stream = arg;

	stream_next(stream);
}

struct threads {
	struct ox_disk_options options;
	struct ox_loop *loop, *loops[THREADS];
	struct stream streams[THREADS * WORKERS];
	unsigned running;
};

static void threads_co(void *arg)
{
	struct threads *t = arg;
	struct ox_disk_stats *stats = calloc(1, sizeof(*stats));
	struct ox_error err = {0};
	struct ox_disk *disk;
	uint64_t size = 16 * MIB;
	unsigned failed = 0;

	assert_int_equal(ox_disk_open(&t->options, &disk, &err), 0);
	assert_int_equal(ox_disk_activate_co(disk, &err), 0);
	assert_null(ox_disk_get_queue(disk, t->loop));
	t->running = OX_ARRAY_SIZE(t->streams);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(t->streams); i++) {
		struct stream *stream = &t->streams[i];

		stream->queue = ox_disk_get_queue(disk, t->loops[i % THREADS]);
		stream->request.done = stream_done;
		stream->base = i * 64 * 1024;
		stream->running = &t->running;
		ox_loop_call_co(t->loops[i % THREADS], stream_start, stream);
	}
	/* Control and statistics while I/O runs. */
	while (__atomic_load_n(&t->running, __ATOMIC_ACQUIRE) > 0) {
		ox_disk_set_writeback(disk, false);
		ox_disk_drain_co(disk);
		ox_disk_set_writeback(disk, true);
		size += 4096;
		assert_int_equal(ox_disk_resize_co(disk, size, false, &err), 0);
		ox_disk_get_stats(disk, stats);
	}
	ox_disk_drain_co(disk);
	ox_disk_get_stats(disk, stats);
	assert_int_equal(stats->in_flight, 0);
	assert_int_equal(stats->op[OX_IO_WRITE].operations, OX_ARRAY_SIZE(t->streams) * ROUNDS / 2);
	assert_int_equal(stats->op[OX_IO_FLUSH].operations, OX_ARRAY_SIZE(t->streams) * ROUNDS / 8);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(t->streams); i++)
		failed += t->streams[i].failed;
	assert_int_equal(failed, 0);
	ox_disk_deactivate_co(disk);
	ox_disk_close(disk);
	free(stats);
}

static void test_threads(void **state)
{
	struct ox_loop_options loop_options = {.name = "main"};
	struct ox_iothread *threads[THREADS];
	struct ox_error err = {0};
	static struct threads t;

	t.loop = ox_loop_new(&loop_options, &err);
	loop_options.name = "io";
	for (unsigned i = 0; i < THREADS; i++) {
		threads[i] = ox_iothread_start(&loop_options, &err);
		assert_non_null(threads[i]);
		t.loops[i] = ox_iothread_loop(threads[i]);
	}
	ox_disk_options_init(&t.options);
	t.options.path = "memory:disk-test:16M";
	t.options.format = "raw";
	t.options.main = t.loop;
	t.options.loops = t.loops;
	t.options.loop_count = THREADS;
	ox_loop_run_fiber(t.loop, threads_co, &t);
	for (unsigned i = 0; i < THREADS; i++)
		ox_iothread_stop(threads[i]);
	ox_loop_free(t.loop);
	ox_fiber_pool_free();
	ox_memory_forget("disk-test");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_refused),      cmocka_unit_test(test_read_only),
	        cmocka_unit_test(test_activation),   cmocka_unit_test(test_reread),
	        cmocka_unit_test(test_drain),        cmocka_unit_test(test_resize),
	        cmocka_unit_test(test_shrink_waits), cmocka_unit_test(test_options),
	        cmocka_unit_test(test_threads),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
