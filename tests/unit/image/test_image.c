/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The generic image layer over raw files: the guarded first sector, sizes that are no multiple of
 * a sector, and creation.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "base/fiber.h"
#include "base/iov.h"
#include "image/format.h"
#include "store/memory.h"

struct fixture {
	struct ox_loop *loop;
	struct ox_image *image;
	struct ox_image_channel *channel;
	struct ox_store_ops ops;
	const struct ox_store_ops *real;
	/* Called when a write reaches the store, before its bytes are looked at. */
	void (*on_write)(struct fixture *f);
	void *arg;
	unsigned writes;
};
static struct fixture fixture;

struct call {
	struct ox_request request;
	struct ox_fiber *waiter;
	bool done;
};

static void call_done(struct ox_request *request)
{
	struct call *call = ox_container_of(request, struct call, request);

	assert_false(call->done);
	call->done = true;
	if (call->waiter)
		ox_fiber_resume(call->waiter);
}

static int run_iov_co(uint8_t op, uint64_t offset, const struct iovec *iov, unsigned count)
{
	struct call call = {.request = {.op = op,
	                                .offset = offset,
	                                .length = ox_iov_size(iov, count),
	                                .iov = iov,
	                                .iovcnt = count,
	                                .image_done = call_done}};

	ox_image_submit(fixture.channel, &call.request);
	if (!call.done) {
		call.waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	return call.request.result;
}

static int run_co(uint8_t op, uint64_t offset, void *buf, uint64_t length)
{
	struct iovec iov = {.iov_base = buf, .iov_len = length};

	return run_iov_co(op, offset, &iov, 1);
}

static void spy_write(struct ox_channel *channel, struct ox_io *io)
{
	fixture.writes++;
	if (fixture.on_write)
		fixture.on_write(&fixture);
	fixture.real->write(channel, io);
}

static void body_co(void *arg)
{
	void (**fn_co)(void) = arg;
	struct ox_error err = {0};

	assert_int_equal(ox_image_attach(fixture.image, fixture.loop, &fixture.channel, &err), 0);
	(*fn_co)();
	ox_image_detach_co(fixture.channel);
}

static void run(void (*fn_co)(void), const char *name, const char *format, bool read_only)
{
	struct ox_loop_options loop_options = {.name = "test"};
	struct ox_image_options options = {
	        .format = format,
	        .store = {.read_only = read_only,
	                  .aio = OX_AIO_THREADS,
	                  .lock = read_only ? OX_LOCK_READ : OX_LOCK_WRITE}};
	struct ox_error err = {0};

	memset(&fixture, 0, sizeof(fixture));
	fixture.loop = ox_loop_new(&loop_options, NULL);
	if (ox_image_open(name, &options, &fixture.image, &err) < 0)
		fail_msg("open: %s", err.text);
	fixture.real = fixture.image->store->ops;
	fixture.ops = *fixture.real;
	fixture.ops.write = spy_write;
	fixture.image->store->ops = &fixture.ops;
	ox_loop_run_fiber(fixture.loop, body_co, &fn_co);
	fixture.image->store->ops = fixture.real;
	ox_image_close(fixture.image);
	ox_loop_free(fixture.loop);
	ox_fiber_pool_free();
}

static uint8_t buffer[16384] __attribute__((aligned(4096)));

/* --- the guard ------------------------------------------------------------------------------ */

static const uint8_t qcow2[8] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 3};

static void guard_co(void)
{
	struct iovec iov[3];

	assert_true(fixture.image->guard_first_sector);
	memset(buffer, 1, sizeof(buffer));
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), 0);
	memcpy(buffer, qcow2, 8);
	/* Whatever the size of the write and the cut of its list. */
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), -EPERM);
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 16384), -EPERM);
	iov[0] = (struct iovec){.iov_base = buffer, .iov_len = 3};
	iov[1] = (struct iovec){.iov_base = buffer + 3, .iov_len = 2};
	iov[2] = (struct iovec){.iov_base = buffer + 5, .iov_len = 507};
	assert_int_equal(run_iov_co(OX_IO_WRITE, 0, iov, 3), -EPERM);
	assert_int_equal(fixture.writes, 1);
	/* Elsewhere it is data like any other. */
	assert_int_equal(run_co(OX_IO_WRITE, 512, buffer, 512), 0);
	assert_int_equal(run_co(OX_IO_ZERO, 0, NULL, 0), 0);
	memset(buffer, 0, 512);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 1024), 0);
	assert_int_equal(buffer[0], 1);
	assert_memory_equal(buffer + 512, qcow2, 8);
}

/* A write of a part of the sector is judged by the whole. */
static void guard_part_co(void)
{
	uint8_t part[8];

	memset(buffer, 0, 512);
	memcpy(buffer, qcow2, 8);
	buffer[0] = 'x';
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), 0);
	part[0] = 'Q';
	assert_int_equal(run_co(OX_IO_WRITE, 0, part, 1), -EPERM);
	memcpy(part, "ok", 2);
	assert_int_equal(run_co(OX_IO_WRITE, 100, part, 2), 0);
	assert_int_equal(run_co(OX_IO_READ, 96, part, 8), 0);
	assert_memory_equal(part, "\0\0\0\0ok\0\0", 8);
}

/* The rest of a large write comes from the guest's list, at its place. */
static void guard_large_co(void)
{
	struct iovec iov[2] = {{.iov_base = buffer, .iov_len = 5000},
	                       {.iov_base = buffer + 5000, .iov_len = 11384}};

	for (size_t i = 0; i < sizeof(buffer); i++)
		buffer[i] = (uint8_t)(i * 7 + i / 512);
	assert_int_equal(run_iov_co(OX_IO_WRITE, 0, iov, 2), 0);
	assert_int_equal(fixture.writes, 1);
	memset(buffer, 0, sizeof(buffer));
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, sizeof(buffer)), 0);
	for (size_t i = 0; i < sizeof(buffer); i++)
		assert_int_equal(buffer[i], (uint8_t)(i * 7 + i / 512));
}

static void change_buffer(struct fixture *f)
{
	memcpy(buffer, qcow2, 8);
}

/* The guest changes its memory after the look: what was looked at is written. */
static void guard_race_co(void)
{
	memset(buffer, 3, sizeof(buffer));
	fixture.on_write = change_buffer;
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 8192), 0);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 512), 0);
	for (size_t i = 0; i < 512; i++)
		assert_int_equal(buffer[i], 3);
}

static void unguarded_co(void)
{
	assert_false(fixture.image->guard_first_sector);
	memset(buffer, 0, 512);
	memcpy(buffer, qcow2, 8);
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), 0);
}

static void test_guard(void **state)
{
	run(guard_co, "memory:64k", NULL, false);
	run(guard_part_co, "memory:64k", NULL, false);
	run(guard_large_co, "memory:64k", NULL, false);
	run(guard_race_co, "memory:64k", NULL, false);
	run(unguarded_co, "memory:64k", "raw", false);
}

/* --- files ------------------------------------------------------------------------------------ */

static char dir[] = "/tmp/ox-image-XXXXXX";
static char path[64];

static int make_dir(void **state)
{
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/disk.raw", dir);
	return 0;
}

static int remove_dir(void **state)
{
	unlink(path);
	return rmdir(dir);
}

static void write_file(const void *bytes, size_t count, off_t size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, bytes, count), count);
	assert_int_equal(ftruncate(fd, size), 0);
	close(fd);
}

static off_t file_size(void)
{
	struct stat st;

	assert_int_equal(stat(path, &st), 0);
	return st.st_size;
}

static void odd_read_co(void)
{
	assert_int_equal(fixture.image->size, 1024);
	memset(buffer, 0xee, 1024);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 1024), 0);
	assert_memory_equal(buffer, "hello", 5);
	assert_true(ox_buffer_is_zero(buffer + 1000, 24));
	memset(buffer, 0xee, 512);
	assert_int_equal(run_co(OX_IO_READ, 512, buffer, 512), 0);
	assert_true(ox_buffer_is_zero(buffer, 512));
	assert_int_equal(run_co(OX_IO_READ, 1024, buffer, 512), -EIO);
	assert_int_equal(run_co(OX_IO_READ, 1023, buffer, 2), -EIO);
}

static void odd_write_co(void)
{
	memset(buffer, 9, 1024);
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), 0);
	assert_int_equal(file_size(), 1000);
	assert_int_equal(run_co(OX_IO_ZERO, 512, NULL, 0), 0);
	assert_int_equal(run_co(OX_IO_WRITE, 512, buffer, 512), 0);
	assert_int_equal(file_size(), 1024);
	memset(buffer, 0, 1024);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 1024), 0);
	assert_int_equal(buffer[1023], 9);
}

static void odd_zero_co(void)
{
	struct iovec iov = {.iov_base = NULL, .iov_len = 1024};

	assert_int_equal(run_iov_co(OX_IO_ZERO, 0, &iov, 1), 0);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 1024), 0);
	assert_true(ox_buffer_is_zero(buffer, 1024));
}

/* A file of a few bytes has a first sector too, which is guarded. */
static void tiny_co(void)
{
	assert_int_equal(fixture.image->size, 512);
	memset(buffer, 0, 512);
	memcpy(buffer, qcow2, 8);
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), -EPERM);
	assert_int_equal(file_size(), 5);
	buffer[0] = 'q';
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), 0);
	assert_int_equal(file_size(), 512);
}

static void empty_co(void)
{
	assert_int_equal(fixture.image->size, 0);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 512), -EIO);
	assert_int_equal(run_co(OX_IO_READ, 0, buffer, 0), 0);
}

static void test_odd_size(void **state)
{
	write_file("hello", 5, 1000);
	run(odd_read_co, path, "raw", true);
	assert_int_equal(file_size(), 1000);
	run(odd_read_co, path, NULL, false);
	assert_int_equal(file_size(), 1000);
	run(odd_write_co, path, "raw", false);
	write_file("hello", 5, 1000);
	run(odd_zero_co, path, "raw", false);
	write_file("hello", 5, 5);
	run(tiny_co, path, NULL, false);
	write_file("", 0, 0);
	run(empty_co, path, NULL, false);
}

static void read_only_co(void)
{
	assert_int_equal(run_co(OX_IO_WRITE, 0, buffer, 512), -EROFS);
	assert_int_equal(run_co(OX_IO_ZERO, 0, NULL, 0), -EROFS);
}

static void test_known_format(void **state)
{
	struct ox_image_options options = {.store = {.read_only = true}};
	struct ox_error err = {0};
	struct ox_image *image;

	write_file("vhdxfile", 8, 65536);
	assert_int_equal(ox_image_open(path, &options, &image, &err), -ENOTSUP);
	assert_non_null(strstr(err.text, "format vhdx is recognised and not supported"));
	ox_error_clear(&err);
	options.format = "vhdx";
	assert_int_equal(ox_image_open(path, &options, &image, &err), -ENOTSUP);
	ox_error_clear(&err);
	options.format = "rwa";
	assert_int_equal(ox_image_open(path, &options, &image, &err), -EINVAL);
	assert_non_null(strstr(err.text, "did you mean raw"));
	run(read_only_co, path, "raw", true);
}

/* --- creation -----------------------------------------------------------------------------------
 */

static void test_create(void **state)
{
	struct ox_create_option full = {.name = (char *)"preallocation", .value = (char *)"full"};
	struct ox_image_create_options options = {
	        .path = path, .format = "raw", .size = 1000, .has_size = true};
	struct ox_store_options lock = {.lock = OX_LOCK_WRITE};
	struct ox_error err = {0};
	struct ox_store *store;
	struct stat st;

	unlink(path);
	assert_int_equal(ox_image_create(&options, &err), 0);
	assert_int_equal(file_size(), 1024);
	/* What was there is gone. */
	write_file("hello", 5, 1 << 20);
	options.size = 4096;
	options.options = &full;
	options.option_count = 1;
	ox_image_create_options_free(&options);
	assert_int_equal(ox_image_create(&options, &err), 0);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 4096);
	assert_true(st.st_blocks * 512 >= 4096);
	/* In use by another: untouched. */
	write_file("hello", 5, 5);
	assert_int_equal(ox_store_open(path, &lock, &store, &err), 0);
	assert_true(ox_image_create(&options, &err) < 0);
	assert_int_equal(file_size(), 5);
	ox_store_close(store);
	ox_error_clear(&err);
	/* A size that cannot be had leaves no file behind. */
	unlink(path);
	ox_image_create_options_free(&options);
	options.size = INT64_MAX - 1000;
	assert_true(ox_image_create(&options, &err) < 0);
	assert_int_equal(stat(path, &st), -1);
	ox_error_clear(&err);
	options.path = "/nonexistent/disk.raw";
	options.size = 512;
	assert_int_equal(ox_image_create(&options, &err), -ENOENT);
	ox_error_clear(&err);
	options.path = dir;
	assert_int_equal(ox_image_create(&options, &err), -EISDIR);
	ox_error_clear(&err);
	options.format = "vhdx";
	ox_image_create_options_free(&options);
	assert_int_equal(ox_image_create(&options, &err), -ENOTSUP);
	write_file("", 0, 0); /* for the clean-up */
}

static int resize_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct ox_image_info info;

	assert_int_equal(ox_image_resize_co(channel, 1000, OX_PREALLOC_OFF, err), -EINVAL);
	ox_error_clear(err);
	assert_int_equal(ox_image_resize_co(channel, 1 << 20, OX_PREALLOC_FALLOC, err), 0);
	assert_int_equal(ox_image_get_info(channel->image, &info, err), 0);
	assert_int_equal(info.virtual_size, 1 << 20);
	assert_true(info.actual_size >= (1 << 20) - 4096);
	assert_string_equal(info.format, "raw");
	ox_image_info_free(&info);
	assert_int_equal(ox_image_resize_co(channel, 512, OX_PREALLOC_OFF, err), 0);
	assert_int_equal(file_size(), 512);
	return 0;
}

static int resize_read_only_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_int_equal(ox_image_resize_co(channel, 1024, OX_PREALLOC_OFF, err), -EROFS);
	return -EROFS;
}

static void test_resize(void **state)
{
	struct ox_image_options options = {.format = "raw", .store = {.lock = OX_LOCK_WRITE}};
	struct ox_error err = {0};

	write_file("hello", 5, 1000);
	assert_int_equal(ox_image_with(path, &options, resize_co, NULL, &err), 0);
	options.store.read_only = true;
	options.store.lock = OX_LOCK_READ;
	assert_int_equal(ox_image_with(path, &options, resize_read_only_co, NULL, &err), -EROFS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_guard),        cmocka_unit_test(test_odd_size),
	        cmocka_unit_test(test_known_format), cmocka_unit_test(test_create),
	        cmocka_unit_test(test_resize),
	};

	return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
