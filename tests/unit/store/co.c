/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/fiber.h"
#include "co.h"

static void attach_fiber(void *arg)
{
	struct user *user = arg;

	assert_int_equal(ox_store_attach(user->store, user->loop, &user->channel, NULL), 0);
}

void user_open(struct user *user, const char *name, const struct ox_store_options *options)
{
	static const struct ox_loop_options loop_options = {.name = "test"};
	static const struct ox_store_options plain = {.aio = OX_AIO_SYNC};
	struct ox_error err = {0};

	if (ox_store_open(name, options ? options : &plain, &user->store, &err) < 0)
		fail_msg("%s", err.text);
	user->loop = ox_loop_new(&loop_options, NULL);
	assert_non_null(user->loop);
	ox_loop_run_fiber(user->loop, attach_fiber, user);
}

static void detach_fiber(void *arg)
{
	struct user *user = arg;

	ox_store_detach(user->channel);
}

void user_close(struct user *user)
{
	ox_loop_run_fiber(user->loop, detach_fiber, user);
	ox_loop_free(user->loop);
	ox_store_close(user->store);
	ox_fiber_pool_free();
}

struct one {
	struct user *user;
	struct ox_io *io;
};

static void io_fiber(void *arg)
{
	struct one *one = arg;

	(void)!ox_store_submit_co(one->user->channel, one->io);
}

int user_io(struct user *user, struct ox_io *io)
{
	struct one one = {user, io};

	ox_loop_run_fiber(user->loop, io_fiber, &one);
	return io->result;
}

int user_read(struct user *user, uint64_t offset, void *buf, size_t bytes)
{
	struct iovec iov = {buf, bytes};
	struct ox_io io = {
	        .op = OX_IO_READ, .offset = offset, .length = bytes, .iov = &iov, .iovcnt = 1};

	return user_io(user, &io);
}

int user_write(struct user *user, uint64_t offset, const void *buf, size_t bytes, unsigned flags)
{
	struct iovec iov = {(void *)(uintptr_t)buf, bytes};
	struct ox_io io = {.op = OX_IO_WRITE,
	                   .flags = (uint8_t)flags,
	                   .offset = offset,
	                   .length = bytes,
	                   .iov = &iov,
	                   .iovcnt = 1};

	return user_io(user, &io);
}

int user_op(struct user *user, enum ox_io_op op, uint64_t offset, uint64_t bytes, unsigned flags)
{
	struct ox_io io = {
	        .op = (uint8_t)op, .flags = (uint8_t)flags, .offset = offset, .length = bytes};

	return user_io(user, &io);
}

int user_flush(struct user *user)
{
	return user_op(user, OX_IO_FLUSH, 0, 0, 0);
}
