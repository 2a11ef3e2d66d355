/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Using an image from a fiber, and from a thread that has no loop.
 */
#include "image/generic.h"
#include <assert.h>
#include <errno.h>
#include <string.h>

/* --- shorthands
 * ------------------------------------------------------------------------------------ */

struct waiter {
	struct ox_request request;
	struct ox_fiber *fiber;
	bool done;
};

static void waiter_done(struct ox_request *request)
{
	struct waiter *waiter = ox_container_of(request, struct waiter, request);

	waiter->done = true;
	if (waiter->fiber)
		ox_fiber_resume(waiter->fiber);
}

static int submit_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset,
                     uint64_t length, const struct iovec *iov, unsigned flags)
{
	struct waiter waiter = {.request = {.op = (uint8_t)op,
	                                    .flags = (uint8_t)flags,
	                                    .offset = offset,
	                                    .length = length,
	                                    .iov = iov,
	                                    .iovcnt = iov ? 1 : 0,
	                                    .image_done = waiter_done}};

	ox_image_submit(channel, &waiter.request);
	if (!waiter.done) {
		waiter.fiber = ox_fiber_self();
		ox_fiber_suspend();
	}
	assert(waiter.done);
	return waiter.request.result;
}

int ox_image_read_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes)
{
	struct iovec iov = {.iov_base = buf, .iov_len = bytes};

	return submit_co(channel, OX_IO_READ, offset, bytes, &iov, 0);
}

int ox_image_write_co(struct ox_image_channel *channel, uint64_t offset, const void *buf,
                      size_t bytes, unsigned flags)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = bytes};

	return submit_co(channel, OX_IO_WRITE, offset, bytes, &iov, flags);
}

int ox_image_request_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset,
                        uint64_t length, unsigned flags)
{
	return submit_co(channel, op, offset, length, NULL, flags);
}

struct truncate_call {
	struct ox_store *store;
	uint64_t size;
	enum ox_preallocation prealloc;
	struct ox_error *err;
};

static int truncate_in_worker(void *arg)
{
	struct truncate_call *call = arg;

	return ox_store_truncate(call->store, call->size, call->prealloc, NULL, NULL, call->err);
}

int ox_store_truncate_co(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                         struct ox_error *err)
{
	struct truncate_call call = {
	        .store = store, .size = size, .prealloc = prealloc, .err = err};

	return ox_worker_call_co(truncate_in_worker, &call);
}

/* --- without a loop of one's own
 * ---------------------------------------------------------------------- */

struct private_run {
	struct ox_loop *loop;
	void (*fn_co)(struct ox_loop *loop, void *arg);
	void *arg;
};

static void private_co(void *arg)
{
	struct private_run *run = arg;

	run->fn_co(run->loop, run->arg);
}

int ox_image_run_private(void (*fn_co)(struct ox_loop *loop, void *arg), void *arg,
                         struct ox_error *err)
{
	struct ox_loop_options options = {.name = "ox-image"};
	struct private_run run = {.loop = ox_loop_new(&options, err), .fn_co = fn_co, .arg = arg};

	if (!run.loop)
		return err && err->code ? -err->code : -EMFILE;
	ox_loop_run_fiber(run.loop, private_co, &run);
	ox_loop_free(run.loop);
	return 0;
}

struct with {
	struct ox_image *image;
	int (*fn_co)(struct ox_image_channel *channel, void *arg, struct ox_error *err);
	void *arg;
	struct ox_error *err;
	int result;
};

static void with_co(struct ox_loop *loop, void *arg)
{
	struct with *with = arg;
	struct ox_image_channel *channel;
	int rc;

	with->result = ox_image_attach(with->image, loop, &channel, with->err);
	if (with->result < 0)
		return;
	with->result = with->fn_co(channel, with->arg, with->err);
	/* Also after a failure: what was changed must be whole. */
	rc = ox_image_finish_co(channel);
	if (rc < 0 && with->result >= 0)
		with->result = ox_error_set(with->err, -rc, "%s: cannot be closed cleanly: %s",
		                            with->image->store->path, strerror(-rc));
	ox_image_detach_co(channel);
}

int ox_image_with(const char *path, const struct ox_image_options *options,
                  int (*fn_co)(struct ox_image_channel *channel, void *arg, struct ox_error *err),
                  void *arg, struct ox_error *err)
{
	struct with with = {.fn_co = fn_co, .arg = arg, .err = err};
	int rc = ox_image_open(path, options, &with.image, err);

	if (rc < 0)
		return rc;
	rc = ox_image_run_private(with_co, &with, err);
	ox_image_close(with.image);
	return rc < 0 ? rc : with.result;
}
