/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The event loop's turn, its sleep, and calls from other threads.
 *
 * Invariants:
 *  1. A loop that sleeps has nothing to do that it could know of: after `sleeping` was set it
 *     looked once more at the posted calls, the engines and the pollers.
 *  2. Only the loop's thread touches anything but `posted`, `sleeping`, `stop` and wake_fd.
 *  3. epoll is asked before a sleep whenever the last answer was not "nothing": an epoll
 *     descriptor that is watched by io_uring tells only of what is new.
 */
#include "engine/loop_private.h"
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

/* How stale the descriptors may get while the loop is busy and never sleeps (and no engine watches
 * them for it). */
#define FD_CHECK_NS 50000u
/* What a spin is made longer than the usual wait. */
#define SPIN_SLACK_NS 2000u
/* How many waits lie between two tries of spinning while it is not worth it. */
#define PROBE_EVERY_MIN 8u
#define PROBE_EVERY_MAX 512u

static _Thread_local struct ox_loop *current_loop;

struct ox_loop *ox_loop_current(void)
{
	return current_loop;
}

struct ox_loop *ox_loop_enter(struct ox_loop *loop)
{
	struct ox_loop *before = current_loop;

	current_loop = loop;
	return before;
}

void ox_loop_leave(struct ox_loop *before)
{
	current_loop = before;
}

uint64_t ox_loop_now(const struct ox_loop *loop)
{
	return loop->now;
}

static void wake_ready(struct ox_watch *watch, uint32_t revents)
{
	uint64_t count;

	/* Only resets the counter; the work is found by looking. */
	if (read(watch->fd, &count, sizeof(count)) < 0)
		return;
	ox_loop_count(&watch->loop->stats.wakeups_posted, 1);
}

struct ox_loop *ox_loop_new(const struct ox_loop_options *options, struct ox_error *err)
{
	struct ox_loop *loop = ox_xcalloc(1, sizeof(*loop));

	snprintf(loop->name, sizeof(loop->name), "%s", options->name ? options->name : "loop");
	loop->poll_max_ns = options->poll_max_ns;
	loop->wait[0].probe_every = loop->wait[1].probe_every = PROBE_EVERY_MIN;
	TAILQ_INIT(&loop->pollers);
	STAILQ_INIT(&loop->deferred);
	loop->now = ox_clock_ns();
	loop->wake_fd = -1;
	loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (loop->epoll_fd < 0) {
		ox_error_set(err, errno, "event loop: epoll_create1: %s", strerror(errno));
		goto fail;
	}
	loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (loop->wake_fd < 0) {
		ox_error_set(err, errno, "event loop: eventfd: %s", strerror(errno));
		goto fail;
	}
	loop->wake_watch.fd = loop->wake_fd;
	loop->wake_watch.events = EPOLLIN;
	loop->wake_watch.fn = wake_ready;
	if (ox_watch_add(loop, &loop->wake_watch) < 0) {
		ox_error_set(err, ENOMEM, "event loop: cannot watch its eventfd");
		goto fail;
	}
	return loop;
fail:
	if (loop->wake_fd >= 0)
		close(loop->wake_fd);
	if (loop->epoll_fd >= 0)
		close(loop->epoll_fd);
	free(loop);
	return NULL;
}

void ox_loop_free(struct ox_loop *loop)
{
	if (!loop)
		return;
	while (__atomic_load_n(&loop->makers, __ATOMIC_ACQUIRE))
		sched_yield(); /* a few instructions away from done */
	ox_engines_close(loop);
	close(loop->wake_fd);
	close(loop->epoll_fd);
	free(loop->timers);
	free(loop);
}

/* --- posted calls ------------------------------------------------------------------------ */

void ox_loop_wake(struct ox_loop *loop)
{
	uint64_t one = 1;

	if (!__atomic_load_n(&loop->sleeping, __ATOMIC_SEQ_CST))
		return;
	if (!__atomic_exchange_n(&loop->sleeping, 0, __ATOMIC_SEQ_CST))
		return; /* somebody else wakes it */
	/* A full counter (EAGAIN) wakes it as well. */
	if (write(loop->wake_fd, &one, sizeof(one)) < 0)
		return;
}

void ox_loop_post(struct ox_loop *loop, struct ox_post *post)
{
	struct ox_post *head = __atomic_load_n(&loop->posted, __ATOMIC_RELAXED);

	ox_loop_maker_enter(loop);
	do {
		post->next = head;
	} while (!__atomic_compare_exchange_n(&loop->posted, &head, post, true, __ATOMIC_SEQ_CST,
	                                      __ATOMIC_RELAXED));
	ox_loop_maker_leave(loop);
}

static bool run_posted(struct ox_loop *loop)
{
	struct ox_post *post, *next, *ordered = NULL;

	if (!__atomic_load_n(&loop->posted, __ATOMIC_RELAXED))
		return false;
	post = __atomic_exchange_n(&loop->posted, NULL, __ATOMIC_SEQ_CST);
	for (; post; post = next) {
		next = post->next;
		post->next = ordered;
		ordered = post;
	}
	for (post = ordered; post; post = next) {
		next = post->next; /* fn may free or post it again */
		post->fn(post);
	}
	return true;
}

/* --- pollers and deferred work ------------------------------------------------------------ */

void ox_poller_add(struct ox_loop *loop, struct ox_poller *poller)
{
	poller->loop = loop;
	TAILQ_INSERT_TAIL(&loop->pollers, poller, link);
}

void ox_poller_remove(struct ox_poller *poller)
{
	struct ox_loop *loop = poller->loop;

	if (!loop)
		return;
	if (loop->next_poller == poller)
		loop->next_poller = TAILQ_NEXT(poller, link);
	TAILQ_REMOVE(&loop->pollers, poller, link);
	poller->loop = NULL;
}

static bool run_pollers(struct ox_loop *loop)
{
	struct ox_poller *poller;
	bool progress = false;

	for (poller = TAILQ_FIRST(&loop->pollers); poller; poller = loop->next_poller) {
		loop->next_poller = TAILQ_NEXT(poller, link);
		progress |= poller->poll(poller);
	}
	return progress;
}

void ox_loop_defer(struct ox_loop *loop, struct ox_deferred *deferred)
{
	if (deferred->scheduled)
		return;
	deferred->scheduled = true;
	STAILQ_INSERT_TAIL(&loop->deferred, deferred, link);
}

void ox_deferred_cancel(struct ox_loop *loop, struct ox_deferred *deferred)
{
	if (!deferred->scheduled)
		return;
	deferred->scheduled = false;
	STAILQ_REMOVE(&loop->deferred, deferred, ox_deferred, link);
}

static void run_deferred(struct ox_loop *loop)
{
	struct ox_deferred *deferred;

	while ((deferred = STAILQ_FIRST(&loop->deferred))) {
		STAILQ_REMOVE_HEAD(&loop->deferred, link);
		deferred->scheduled = false;
		deferred->fn(deferred);
	}
}

/* --- descriptors --------------------------------------------------------------------------- */

int ox_watch_add(struct ox_loop *loop, struct ox_watch *watch)
{
	struct epoll_event event = {.events = watch->events, .data.ptr = watch};

	if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, watch->fd, &event) < 0)
		return -errno;
	watch->loop = loop;
	loop->fds_unsure = true; /* it may be ready already */
	return 0;
}

void ox_watch_modify(struct ox_watch *watch, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.ptr = watch};

	watch->events = events;
	if (!watch->loop)
		return;
	/* Cannot fail for a descriptor that is in the set. */
	(void)epoll_ctl(watch->loop->epoll_fd, EPOLL_CTL_MOD, watch->fd, &event);
	watch->loop->fds_unsure = true;
}

void ox_watch_remove(struct ox_watch *watch)
{
	struct ox_loop *loop = watch->loop;

	if (!loop)
		return;
	/* The descriptor may have been closed: then it left the set by itself. */
	(void)epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
	for (int i = loop->event_index; i < loop->event_count; i++)
		if (loop->events[i].data.ptr == watch)
			loop->events[i].data.ptr = NULL;
	watch->loop = NULL;
}

static bool handle_fds(struct ox_loop *loop, int timeout_ms)
{
	int n = epoll_wait(loop->epoll_fd, loop->events, OX_LOOP_EVENTS, timeout_ms);

	/* Whatever ended a sleep: from here on nobody needs to wake this loop, and what runs
	 * below must not write to its own eventfd. */
	__atomic_store_n(&loop->sleeping, 0, __ATOMIC_RELAXED);
	loop->fds_unsure = n > 0;
	if (n <= 0)
		return false;
	loop->now = ox_clock_ns();
	loop->event_count = n;
	for (loop->event_index = 0; loop->event_index < loop->event_count;) {
		const struct epoll_event *event = &loop->events[loop->event_index++];
		struct ox_watch *watch = event->data.ptr;

		if (watch)
			watch->fn(watch, event->events);
	}
	loop->event_index = loop->event_count = 0;
	return true;
}

/* --- the turn -------------------------------------------------------------------------------- */

/* --- adaptive polling ---------------------------------------------------------------------------
 *
 * How long to spin before sleeping, decided by how long the last waits were (a moving average,
 * each wait counted as two longest spins at most, so that a few short ones bring polling back).
 * Waiting for the guest (0: after completions, or with nothing in flight) and for the disk (1) are
 * two things.  Spinning is worth it when the usual wait is shorter than what a sleep costs in
 * latency; a disk whose next completion usually takes longer than half of the longest spin is not
 * waited for, because it would burn more than it saves.
 *
 * A wait that was slept through looks longer than it was, by the time that waking up took, which
 * in a virtual machine is more than a fast guest needs to answer.  So a loop that does not spin
 * tries it now and then: every eighth wait, and half as often each time that it was in vain. */

/* Would the loop spin, probing aside? */
static uint64_t spin_ns(const struct ox_loop *loop, unsigned kind)
{
	uint64_t usual = loop->wait[kind].usual_ns;
	uint64_t limit = kind ? loop->poll_max_ns / 2 : loop->poll_max_ns * 3 / 4;

	if (usual > limit)
		return 0;
	return ox_min(loop->poll_max_ns, 2 * usual + SPIN_SLACK_NS);
}

/* A wait begins: how long to spin. */
static uint64_t begin_wait(struct ox_loop *loop, unsigned kind)
{
	struct ox_loop_wait *wait = &loop->wait[kind];
	uint64_t spin = spin_ns(loop, kind);

	wait->probing = false;
	if (spin)
		return spin;
	if (++wait->since_probe < wait->probe_every)
		return 0;
	wait->since_probe = 0;
	wait->probing = true;
	return loop->poll_max_ns;
}

/* It ended after waited_ns; `found`: by what it waited for, while it spun.  A completion that comes
 * while the loop waits for the guest says nothing of the guest: with many operations in flight
 * there is always one, and spinning from each to the next would burn a core. */
static void end_wait(struct ox_loop *loop, unsigned kind, uint64_t waited_ns, bool found)
{
	struct ox_loop_wait *wait = &loop->wait[kind];

	waited_ns = ox_min(waited_ns, 2 * loop->poll_max_ns);
	if (wait->probing && !found) {
		wait->probe_every = ox_min(2 * wait->probe_every, PROBE_EVERY_MAX);
	} else if (wait->probing) {
		wait->usual_ns = waited_ns;
		wait->probe_every = PROBE_EVERY_MIN;
	} else {
		if (!found)
			waited_ns = ox_max(waited_ns, loop->poll_max_ns);
		wait->usual_ns = (wait->usual_ns * 7 + waited_ns) / 8;
	}
}

/* Runs what is there without sleeping; true if there was anything.
 *
 * Operations collect until a batch is full or a turn brings nothing new; an engine that can
 * sleep for the loop then keeps them back once more if the loop is not going to spin, because
 * submitting and sleeping are one system call. */
static bool turn(struct ox_loop *loop)
{
	bool fresh, progress;

	ox_loop_count(&loop->stats.turns, 1);
	fresh = run_posted(loop);
	fresh |= run_pollers(loop);
	loop->submit_with_sleep = !fresh && !spin_ns(loop, 1);
	progress = ox_engines_flush(loop, !fresh);
	progress |= ox_engines_reap(loop);
	if (fresh || progress)
		loop->guest_is_next = progress;
	loop->guest_came = fresh;
	progress |= fresh;
	run_deferred(loop);
	progress |= ox_timers_run(loop);
	if (!loop->fds_watched && loop->now - loop->fd_check_ns > FD_CHECK_NS) {
		loop->fd_check_ns = loop->now;
		progress |= handle_fds(loop, 0);
		run_deferred(loop);
	}
	return progress;
}

static int64_t sleep_limit(const struct ox_loop *loop)
{
	uint64_t next = ox_timers_next(loop);
	uint64_t now;

	if (next == UINT64_MAX)
		return -1;
	now = ox_clock_ns();
	return next > now ? (int64_t)(next - now) : 0;
}

/* Tells the pollers to turn their notifications on; true if one has work after all. */
static bool pollers_sleep(struct ox_loop *loop)
{
	struct ox_poller *poller;
	bool work = false;

	for (poller = TAILQ_FIRST(&loop->pollers); poller; poller = loop->next_poller) {
		loop->next_poller = TAILQ_NEXT(poller, link);
		work |= poller->sleep(poller);
	}
	return work;
}

static void pollers_wake(struct ox_loop *loop)
{
	struct ox_poller *poller;

	for (poller = TAILQ_FIRST(&loop->pollers); poller; poller = loop->next_poller) {
		loop->next_poller = TAILQ_NEXT(poller, link);
		poller->wake(poller);
	}
}

static void sleep_until_work(struct ox_loop *loop)
{
	int64_t limit;
	bool work;

	/* What deferred work or a lost engine left behind. */
	work = ox_engines_flush(loop, true);
	work |= pollers_sleep(loop);
	__atomic_store_n(&loop->sleeping, 1, __ATOMIC_SEQ_CST);
	work |= __atomic_load_n(&loop->posted, __ATOMIC_SEQ_CST) != NULL;
	work |= __atomic_load_n(&loop->stop, __ATOMIC_SEQ_CST) != 0;
	for (unsigned kind = 0; kind < OX_ARRAY_SIZE(loop->engines) && !work; kind++) {
		struct ox_engine *engine = loop->engines[kind];

		/* The one that sleeps looks by itself. */
		if (engine && engine != loop->waiter && engine->ops->reap)
			work |= engine->ops->reap(engine) > 0;
	}
	if (!work && loop->fds_unsure)
		handle_fds(loop, 0);
	else if (!work) {
		limit = sleep_limit(loop);
		ox_loop_count(&loop->stats.sleeps, 1);
		if (loop->waiter) {
			loop->waiter->ops->wait(loop->waiter, limit);
			__atomic_store_n(&loop->sleeping, 0, __ATOMIC_RELAXED);
			loop->now = ox_clock_ns();
		} else {
			/* Rounded up: a timer never finds itself early in a busy loop. */
			handle_fds(loop, limit < 0 ? -1
			                           : (int)ox_min((limit + 999999) / 1000000,
			                                         (int64_t)INT32_MAX));
			loop->now = loop->fd_check_ns = ox_clock_ns();
		}
	}
	__atomic_store_n(&loop->sleeping, 0, __ATOMIC_SEQ_CST);
	pollers_wake(loop);
}

static void run(struct ox_loop *loop, const bool *condition)
{
	struct ox_loop *before = ox_loop_enter(loop);
	uint64_t idle_since = 0; /* 0: the last turn found work */
	uint64_t spin = 0;
	unsigned kind = 0;
	bool progress;

	loop->now = ox_clock_ns();
	while (!__atomic_load_n(&loop->stop, __ATOMIC_RELAXED) && !(condition && *condition)) {
		progress = turn(loop);
		loop->now = ox_clock_ns();
		if (progress) {
			if (idle_since)
				end_wait(loop, kind, loop->now - idle_since,
				         kind || loop->guest_came);
			idle_since = 0;
			continue;
		}
		if (!idle_since) {
			idle_since = loop->now;
			kind = ox_engines_in_flight(loop) && !loop->guest_is_next;
			spin = begin_wait(loop, kind);
		}
		if (loop->now - idle_since < spin) {
			ox_cpu_relax();
			continue;
		}
		loop->guest_is_next = false; /* it had its time */
		sleep_until_work(loop);
		end_wait(loop, kind, loop->now - idle_since, false);
		idle_since = 0;
	}
	run_deferred(loop);
	ox_loop_leave(before);
}

void ox_loop_run(struct ox_loop *loop)
{
	run(loop, NULL);
	__atomic_store_n(&loop->stop, 0, __ATOMIC_RELAXED);
}

void ox_loop_run_until(struct ox_loop *loop, const bool *condition)
{
	run(loop, condition);
}

void ox_loop_stop(struct ox_loop *loop)
{
	__atomic_store_n(&loop->stop, 1, __ATOMIC_SEQ_CST);
	ox_loop_wake(loop);
}

void ox_loop_get_stats(const struct ox_loop *loop, struct ox_loop_stats *stats)
{
	stats->turns = __atomic_load_n(&loop->stats.turns, __ATOMIC_RELAXED);
	stats->sleeps = __atomic_load_n(&loop->stats.sleeps, __ATOMIC_RELAXED);
	stats->wakeups_posted = __atomic_load_n(&loop->stats.wakeups_posted, __ATOMIC_RELAXED);
	stats->submits = __atomic_load_n(&loop->stats.submits, __ATOMIC_RELAXED);
	stats->submitted = __atomic_load_n(&loop->stats.submitted, __ATOMIC_RELAXED);
}
