/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the generic layer's files share; nobody else includes it.
 *
 *   open.c     opening and closing an image, guessing, info
 *   chain.c    the files that a header names: which may be opened, and opening them
 *   channel.c  channels, grace periods, fibers in the background, the first change, shorthands
 *   image.c    submission: the hit path, and the slow path's fiber
 *   read.c     the slow path's reads;  write.c: its writes;  clear.c: zeroes and discards
 *   map.c      what a chain's map says, for people and tools
 *   create.c   new images;  resize.c: other sizes;  probe.c: whose bytes are these
 */
#ifndef OX_IMAGE_GENERIC_H
#define OX_IMAGE_GENERIC_H

#include "image/format.h"
#include "base/fiber.h"
#include <pthread.h>

/* Lets one fiber through at a time, in order of arrival; fibers of any thread. */
struct ox_image_gate_waiter {
	struct ox_post post;
	struct ox_loop *loop;
	struct ox_fiber *fiber;
	TAILQ_ENTRY(ox_image_gate_waiter) link;
};
struct ox_image_gate {
	pthread_mutex_t lock;
	bool busy;
	TAILQ_HEAD(, ox_image_gate_waiter) waiters;
};
void ox_image_gate_init(struct ox_image_gate *gate);
void ox_image_gate_destroy(struct ox_image_gate *gate);
void ox_image_gate_enter_co(struct ox_image_gate *gate);
void ox_image_gate_leave(struct ox_image_gate *gate);

struct ox_image_generic {
	struct ox_ranges ranges; /* of the guest's disk; whole clusters */
	struct ox_image_gate begin_gate, grace_gate;
	pthread_mutex_t lock; /* channels; held for a step along the list */
	TAILQ_HEAD(, ox_image_channel) channels;
};

static inline uint64_t ox_image_size_now(const struct ox_image *image)
{
	return __atomic_load_n(&image->size, __ATOMIC_ACQUIRE);
}

/* channel.c */
struct ox_image_generic *ox_image_generic_new(void);
void ox_image_generic_free(struct ox_image_generic *generic);
/* ops->begin_co, unless it has been; 0: image->begun is true. */
int ox_image_begin_co(struct ox_image_channel *channel);
void ox_image_wait_background_co(struct ox_image_channel *channel);

/* Runs fn_co in a fiber of a private loop that is gone afterwards.  Blocks. */
int ox_image_run_private(void (*fn_co)(struct ox_loop *loop, void *arg), void *arg,
                         struct ox_error *err) OX_MUST_CHECK;

#endif
