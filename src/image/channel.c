/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Channels: an image as one loop uses it, and what several of them do together.
 *
 * A grace period (ox_image_grace_co) ends when every request that was in flight at its start has
 * ended, on every channel.  Each channel counts its requests on one of two sides; the period turns
 * the channels over one after the other, each on its own thread, and waits for the side that was
 * left.  Requests to a backing image are part of the top image's and counted there.
 *
 * Invariants:
 *   - periods do not overlap (grace_gate), so the side that is turned to is empty.
 *   - a channel leaves the list inside the same gate: a period never meets one that is going.
 *   - a request never waits for a period: it would wait for itself.
 *
 * Locking: counters are the channel's thread's; the list of channels has a mutex.
 */
#include "image/generic.h"
#include <assert.h>
#include <errno.h>
#include <string.h>

/* --- gates --------------------------------------------------------------------------------- */

void ox_image_gate_init(struct ox_image_gate *gate)
{
	pthread_mutex_init(&gate->lock, NULL);
	gate->busy = false;
	TAILQ_INIT(&gate->waiters);
}

void ox_image_gate_destroy(struct ox_image_gate *gate)
{
	assert(!gate->busy);
	pthread_mutex_destroy(&gate->lock);
}

static void gate_opened(struct ox_post *post)
{
	ox_fiber_resume(ox_container_of(post, struct ox_image_gate_waiter, post)->fiber);
}

void ox_image_gate_enter_co(struct ox_image_gate *gate)
{
	struct ox_image_gate_waiter waiter = {
	        .post.fn = gate_opened, .loop = ox_loop_current(), .fiber = ox_fiber_self()};
	bool wait;

	pthread_mutex_lock(&gate->lock);
	wait = gate->busy;
	gate->busy = true;
	if (wait)
		TAILQ_INSERT_TAIL(&gate->waiters, &waiter, link);
	pthread_mutex_unlock(&gate->lock);
	/* Whoever leaves hands the gate over: it stays busy meanwhile. */
	if (wait)
		ox_fiber_suspend();
}

void ox_image_gate_leave(struct ox_image_gate *gate)
{
	struct ox_image_gate_waiter *waiter;

	pthread_mutex_lock(&gate->lock);
	waiter = TAILQ_FIRST(&gate->waiters);
	if (waiter) {
		TAILQ_REMOVE(&gate->waiters, waiter, link);
		ox_loop_post(waiter->loop, &waiter->post);
	} else {
		gate->busy = false;
	}
	pthread_mutex_unlock(&gate->lock);
}

/* --- the image's part ------------------------------------------------------------------------ */

struct ox_image_generic *ox_image_generic_new(void)
{
	struct ox_image_generic *generic = ox_xcalloc(1, sizeof(*generic));

	ox_ranges_init(&generic->ranges);
	ox_image_gate_init(&generic->begin_gate);
	ox_image_gate_init(&generic->grace_gate);
	pthread_mutex_init(&generic->lock, NULL);
	TAILQ_INIT(&generic->channels);
	return generic;
}

void ox_image_generic_free(struct ox_image_generic *generic)
{
	if (!generic)
		return;
	assert(TAILQ_EMPTY(&generic->channels));
	ox_ranges_destroy(&generic->ranges);
	ox_image_gate_destroy(&generic->begin_gate);
	ox_image_gate_destroy(&generic->grace_gate);
	pthread_mutex_destroy(&generic->lock);
	free(generic);
}

/* --- attaching ------------------------------------------------------------------------------- */

static void free_channel(struct ox_image_channel *channel)
{
	if (channel->data != channel->store)
		ox_store_detach(channel->data);
	ox_store_detach(channel->store);
	free(channel->unpacked);
	free(channel);
}

static void unlink_channel_co(struct ox_image_channel *channel)
{
	struct ox_image_generic *generic = channel->image->generic;

	ox_image_gate_enter_co(&generic->grace_gate);
	pthread_mutex_lock(&generic->lock);
	TAILQ_REMOVE(&generic->channels, channel, link);
	pthread_mutex_unlock(&generic->lock);
	ox_image_gate_leave(&generic->grace_gate);
}

void ox_image_detach_co(struct ox_image_channel *channel)
{
	if (!channel)
		return;
	ox_image_wait_background_co(channel);
	assert(channel->in_flight[0] == 0 && channel->in_flight[1] == 0);
	unlink_channel_co(channel);
	if (channel->image->ops->detach)
		channel->image->ops->detach(channel);
	ox_image_detach_co(channel->backing);
	free_channel(channel);
}

struct ox_image *ox_image_of(const struct ox_image_channel *channel)
{
	return channel->image;
}

static int attach_stores(struct ox_image_channel *channel, struct ox_error *err)
{
	struct ox_image *image = channel->image;
	int rc = ox_store_attach(image->store, channel->loop, &channel->store, err);

	if (rc < 0)
		return rc;
	channel->data = channel->store;
	if (image->data != image->store)
		rc = ox_store_attach(image->data, channel->loop, &channel->data, err);
	return rc;
}

/* Attaches the image alone; on failure what was made is gone. */
static int attach_one(struct ox_image *image, struct ox_loop *loop, struct ox_image_channel **out,
                      struct ox_error *err)
{
	struct ox_image_channel *channel = ox_xcalloc(1, sizeof(*channel));
	int rc;

	channel->image = image;
	channel->loop = loop;
	rc = attach_stores(channel, err);
	if (rc == 0 && image->ops->attach)
		rc = image->ops->attach(channel, err);
	if (rc < 0) {
		free_channel(channel);
		return rc;
	}
	*out = channel;
	return 0;
}

int ox_image_attach(struct ox_image *image, struct ox_loop *loop, struct ox_image_channel **out,
                    struct ox_error *err)
{
	struct ox_image_channel *channel, *backing = NULL;
	int rc;

	*out = NULL;
	/* The bottom first: what is made is only linked when nothing can fail any more, and only
	 * what is linked must be waited for to be taken down. */
	rc = attach_one(image, loop, &channel, err);
	if (rc < 0)
		return rc;
	if (image->backing)
		rc = ox_image_attach(image->backing, loop, &backing, err);
	if (rc < 0) {
		if (image->ops->detach)
			image->ops->detach(channel);
		free_channel(channel);
		return rc;
	}
	channel->backing = backing;
	pthread_mutex_lock(&image->generic->lock);
	TAILQ_INSERT_TAIL(&image->generic->channels, channel, link);
	pthread_mutex_unlock(&image->generic->lock);
	*out = channel;
	return 0;
}

/* --- grace periods -----------------------------------------------------------------------------
 */

static void turn_over_co(void *arg)
{
	struct ox_image_channel *channel = arg;
	unsigned side = channel->phase;

	channel->phase = !side;
	if (channel->in_flight[side] > 0) {
		channel->grace_waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	assert(channel->in_flight[side] == 0);
}

void ox_image_grace_co(struct ox_image_channel *channel)
{
	struct ox_image_generic *generic = channel->image->generic;
	struct ox_image_channel *other;

	ox_image_gate_enter_co(&generic->grace_gate);
	pthread_mutex_lock(&generic->lock);
	other = TAILQ_FIRST(&generic->channels);
	pthread_mutex_unlock(&generic->lock);
	while (other) {
		ox_loop_call_fiber_co(other->loop, turn_over_co, other);
		/* One that was attached meanwhile has no old requests; it does no harm. */
		pthread_mutex_lock(&generic->lock);
		other = TAILQ_NEXT(other, link);
		pthread_mutex_unlock(&generic->lock);
	}
	ox_image_gate_leave(&generic->grace_gate);
}

/* --- work in the background --------------------------------------------------------------------
 */

struct background {
	struct ox_image_channel *channel;
	void (*fn_co)(struct ox_image_channel *channel, void *arg);
	void *arg;
};

static void background_co(void *arg)
{
	struct background work = *(struct background *)arg;
	struct ox_image_channel *channel = work.channel;
	struct ox_fiber *waiter;

	work.fn_co(channel, work.arg);
	if (--channel->background == 0 && channel->background_waiter) {
		waiter = channel->background_waiter;
		channel->background_waiter = NULL;
		ox_fiber_resume(waiter);
	}
}

int ox_image_background(struct ox_image_channel *channel,
                        void (*fn_co)(struct ox_image_channel *channel, void *arg), void *arg)
{
	struct background work = {.channel = channel, .fn_co = fn_co, .arg = arg};
	int rc;

	channel->background++;
	rc = ox_fiber_start(background_co, &work);
	if (rc < 0)
		channel->background--;
	return rc;
}

void ox_image_wait_background_co(struct ox_image_channel *channel)
{
	while (channel->background > 0) {
		channel->background_waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
}

/* --- the first change, and the last word ---------------------------------------------------------
 */

int ox_image_begin_co(struct ox_image_channel *channel)
{
	struct ox_image *image = channel->image;
	int rc = 0;

	if (__atomic_load_n(&image->begun, __ATOMIC_ACQUIRE))
		return 0;
	ox_image_gate_enter_co(&image->generic->begin_gate);
	if (!__atomic_load_n(&image->begun, __ATOMIC_ACQUIRE)) {
		rc = image->ops->begin_co(channel);
		if (rc == 0)
			__atomic_store_n(&image->begun, true, __ATOMIC_RELEASE);
	}
	ox_image_gate_leave(&image->generic->begin_gate);
	return rc;
}

int ox_image_finish_co(struct ox_image_channel *channel)
{
	struct ox_image *image = channel->image;

	/* Backing images are open read-only: there is nothing to finish. */
	if (image->read_only || !image->ops->finish_co)
		return 0;
	return image->ops->finish_co(channel);
}

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
