/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Range locks: see range.h.
 *
 * Invariants: two ranges on the lists `shared` and `exclusive` overlap only if both are shared;
 * a range waits only while it overlaps a taken one it cannot share with, or an earlier waiter
 * of that kind.
 */
#include "store/range.h"
#include "base/fiber.h"

void ox_ranges_init(struct ox_ranges *ranges)
{
	pthread_mutex_init(&ranges->lock, NULL);
	TAILQ_INIT(&ranges->shared);
	TAILQ_INIT(&ranges->exclusive);
	TAILQ_INIT(&ranges->waiting);
}

void ox_ranges_destroy(struct ox_ranges *ranges)
{
	pthread_mutex_destroy(&ranges->lock);
}

static bool conflict(const struct ox_range *a, const struct ox_range *b)
{
	return a->start < b->end && b->start < a->end && (a->exclusive || b->exclusive);
}

/* Does `range` meet one of the list, up to but not including `until` (NULL: the whole list)? */
static bool conflicts(const struct ox_range_list *list, const struct ox_range *range,
                      const struct ox_range *until)
{
	const struct ox_range *other;

	TAILQ_FOREACH (other, list, link) {
		if (other == until)
			return false;
		if (conflict(other, range))
			return true;
	}
	return false;
}

/* lock is held; `until`: the range itself if it is on the waiting list already. */
static bool try_take(struct ox_ranges *ranges, struct ox_range *range, const struct ox_range *until)
{
	if (conflicts(&ranges->exclusive, range, NULL))
		return false;
	if (range->exclusive && conflicts(&ranges->shared, range, NULL))
		return false;
	return !conflicts(&ranges->waiting, range, until);
}

static void take(struct ox_ranges *ranges, struct ox_range *range)
{
	struct ox_range_list *list = range->exclusive ? &ranges->exclusive : &ranges->shared;

	TAILQ_INSERT_TAIL(list, range, link);
}

bool ox_range_acquire(struct ox_ranges *ranges, struct ox_range *range)
{
	bool taken;

	pthread_mutex_lock(&ranges->lock);
	taken = try_take(ranges, range, NULL);
	if (taken)
		take(ranges, range);
	else
		TAILQ_INSERT_TAIL(&ranges->waiting, range, link);
	pthread_mutex_unlock(&ranges->lock);
	return taken;
}

static void run_granted(struct ox_post *post)
{
	struct ox_range *range = ox_container_of(post, struct ox_range, post);

	range->granted(range);
}

void ox_range_release(struct ox_ranges *ranges, struct ox_range *range)
{
	struct ox_range *waiter, *next;

	pthread_mutex_lock(&ranges->lock);
	TAILQ_REMOVE(range->exclusive ? &ranges->exclusive : &ranges->shared, range, link);
	for (waiter = TAILQ_FIRST(&ranges->waiting); waiter; waiter = next) {
		next = TAILQ_NEXT(waiter, link);
		if (!try_take(ranges, waiter, waiter))
			continue;
		TAILQ_REMOVE(&ranges->waiting, waiter, link);
		take(ranges, waiter);
		/* Always by a post, also to this thread: the releaser is in the middle of its own
		 * completion.  Posted under the lock: after it, the waiter may be gone. */
		waiter->post.fn = run_granted;
		ox_loop_post(waiter->loop, &waiter->post);
	}
	pthread_mutex_unlock(&ranges->lock);
}

static void resume_owner(struct ox_range *range)
{
	ox_fiber_resume(range->owner);
}

void ox_range_acquire_co(struct ox_ranges *ranges, struct ox_range *range)
{
	range->owner = ox_fiber_self();
	range->granted = resume_owner;
	if (!ox_range_acquire(ranges, range))
		ox_fiber_suspend();
}
