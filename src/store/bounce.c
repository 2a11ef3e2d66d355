/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Bounce buffers: see bounce.h.  A buffer that comes back goes to the first waiter, so there
 * are waiters only while every buffer is taken.
 */
#include "store/bounce.h"
#include "base/fiber.h"
#include <assert.h>

#define ALIGNMENT (64u * 1024u)

struct ox_bounce_waiter {
	TAILQ_ENTRY(ox_bounce_waiter) link;
	struct ox_post post;
	struct ox_fiber *fiber;
	void *buf;
};

void ox_bounce_init(struct ox_bounce *bounce, struct ox_loop *loop)
{
	*bounce = (struct ox_bounce){.loop = loop};
	TAILQ_INIT(&bounce->waiting);
}

void ox_bounce_destroy(struct ox_bounce *bounce)
{
	assert(bounce->taken == 0 && TAILQ_EMPTY(&bounce->waiting));
	while (bounce->kept)
		free(bounce->spare[--bounce->kept]);
}

static void resume_waiter(struct ox_post *post)
{
	struct ox_bounce_waiter *waiter = ox_container_of(post, struct ox_bounce_waiter, post);

	ox_fiber_resume(waiter->fiber);
}

void *ox_bounce_get_co(struct ox_bounce *bounce)
{
	struct ox_bounce_waiter waiter = {.fiber = ox_fiber_self(), .post.fn = resume_waiter};
	void *buf = NULL;

	if (bounce->kept) {
		bounce->taken++;
		return bounce->spare[--bounce->kept];
	}
	if (bounce->taken < OX_BOUNCE_MAX) {
		if (posix_memalign(&buf, ALIGNMENT, OX_BOUNCE_SIZE) == 0) {
			bounce->taken++;
			return buf;
		}
		if (bounce->taken == 0)
			return NULL;
	}
	TAILQ_INSERT_TAIL(&bounce->waiting, &waiter, link);
	ox_fiber_suspend();
	return waiter.buf;
}

void ox_bounce_put(struct ox_bounce *bounce, void *buf)
{
	struct ox_bounce_waiter *waiter = TAILQ_FIRST(&bounce->waiting);

	if (waiter) {
		TAILQ_REMOVE(&bounce->waiting, waiter, link);
		waiter->buf = buf;
		/* Not from within the giver's fiber: completions would nest without bound. */
		ox_loop_post(bounce->loop, &waiter->post);
		return;
	}
	bounce->taken--;
	if (bounce->kept < OX_ARRAY_SIZE(bounce->spare))
		bounce->spare[bounce->kept++] = buf;
	else
		free(buf);
}
