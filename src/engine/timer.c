/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Timers: a binary heap by deadline; each timer knows its place, so that cancelling is
 * O(log n).
 */
#include "engine/loop_private.h"

static void place(struct ox_loop *loop, unsigned index, struct ox_timer *timer)
{
	loop->timers[index] = timer;
	timer->index = index;
}

static void sift_up(struct ox_loop *loop, unsigned index)
{
	struct ox_timer *timer = loop->timers[index];

	while (index) {
		unsigned parent = (index - 1) / 2;

		if (loop->timers[parent]->deadline <= timer->deadline)
			break;
		place(loop, index, loop->timers[parent]);
		index = parent;
	}
	place(loop, index, timer);
}

static void sift_down(struct ox_loop *loop, unsigned index)
{
	struct ox_timer *timer = loop->timers[index];

	for (;;) {
		unsigned child = 2 * index + 1;

		if (child >= loop->timer_count)
			break;
		if (child + 1 < loop->timer_count &&
		    loop->timers[child + 1]->deadline < loop->timers[child]->deadline)
			child++;
		if (timer->deadline <= loop->timers[child]->deadline)
			break;
		place(loop, index, loop->timers[child]);
		index = child;
	}
	place(loop, index, timer);
}

void ox_timer_arm(struct ox_loop *loop, struct ox_timer *timer, uint64_t delay_ns)
{
	ox_timer_cancel(timer);
	timer->deadline = ox_clock_ns() + delay_ns;
	timer->loop = loop;
	if (loop->timer_count == loop->timer_room) {
		unsigned room = loop->timer_room ? 2 * loop->timer_room : 16;
		struct ox_timer **timers = ox_xcalloc(room, sizeof(struct ox_timer *));

		for (unsigned i = 0; i < loop->timer_count; i++)
			timers[i] = loop->timers[i];
		free(loop->timers);
		loop->timers = timers;
		loop->timer_room = room;
	}
	place(loop, loop->timer_count++, timer);
	sift_up(loop, timer->index);
}

void ox_timer_cancel(struct ox_timer *timer)
{
	struct ox_loop *loop = timer->loop;
	struct ox_timer *last;
	unsigned index = timer->index;

	if (!loop)
		return;
	timer->loop = NULL;
	last = loop->timers[--loop->timer_count];
	if (last == timer)
		return;
	place(loop, index, last);
	sift_up(loop, index);
	sift_down(loop, last->index);
}

bool ox_timers_run(struct ox_loop *loop)
{
	bool progress = false;

	while (loop->timer_count && loop->timers[0]->deadline <= loop->now) {
		struct ox_timer *timer = loop->timers[0];

		ox_timer_cancel(timer);
		timer->fn(timer);
		progress = true;
	}
	return progress;
}

uint64_t ox_timers_next(const struct ox_loop *loop)
{
	return loop->timer_count ? loop->timers[0]->deadline : UINT64_MAX;
}
