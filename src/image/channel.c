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
	free(generic->format);
	free(generic->key_secret);
	for (char **dir = generic->dirs; dir && *dir; dir++)
		free(*dir);
	free(generic->dirs);
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

void ox_image_leave(struct ox_image_channel *channel, unsigned side)
{
	struct ox_fiber *waiter = channel->grace_waiter;

	if (--channel->in_flight[side] > 0 || side == channel->phase || !waiter)
		return;
	channel->grace_waiter = NULL;
	ox_fiber_resume(waiter);
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

int ox_image_commit_co(struct ox_image_channel *channel)
{
	int rc;

	if (channel->image->ops->commit_co)
		return channel->image->ops->commit_co(channel);
	rc = ox_store_flush_co(channel->data);
	if (rc == 0 && channel->data != channel->store)
		rc = ox_store_flush_co(channel->store);
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
