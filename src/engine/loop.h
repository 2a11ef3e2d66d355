/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The event loop: one a thread.
 *
 * A turn of the loop: run posted calls, ask the pollers, reap the engines, call what completed,
 * run due timers, look at descriptors, submit what the turn collected.  When a turn found
 * nothing, the loop spins for an adaptive time (0 to poll_max_ns), then lets the pollers turn
 * their notifications on and sleeps: in io_uring_enter if it has an io_uring engine (which
 * watches the epoll descriptor), else in epoll_wait.  Without timers, work or I/O it sleeps for
 * ever: an idle loop costs nothing.
 *
 * All functions are for the loop's thread (or before ox_loop_run, its maker's), except those
 * that say "any thread".
 */
#ifndef OX_ENGINE_LOOP_H
#define OX_ENGINE_LOOP_H

#include "base/base.h"
#include <oxbow/error.h>
#include <sys/epoll.h>
#include <sys/queue.h>

struct ox_loop;

struct ox_loop_options {
	const char *name;     /* thread name, at most 15 bytes */
	uint64_t poll_max_ns; /* the longest spin; 0: never spins */
};
#define OX_LOOP_POLL_MAX_NS 32768u

struct ox_loop *ox_loop_new(const struct ox_loop_options *options, struct ox_error *err);
/* The loop is not running and nothing uses it any more. */
void ox_loop_free(struct ox_loop *loop);

/* Runs on this thread until ox_loop_stop(). */
void ox_loop_run(struct ox_loop *loop);
/* Runs turns until *condition is true: for tests and tools without a thread of their own.
 * Sleeps like ox_loop_run.  The condition is set by something that runs on this loop. */
void ox_loop_run_until(struct ox_loop *loop, const bool *condition);
/* Any thread. */
void ox_loop_stop(struct ox_loop *loop);

/* The loop that runs on this thread, or NULL. */
struct ox_loop *ox_loop_current(void);
/* CLOCK_MONOTONIC ns as read once in this turn; refreshed after reaping. */
uint64_t ox_loop_now(const struct ox_loop *loop);

/* --- calls from other threads --------------------------------------------------------- */

struct ox_post {
	struct ox_post *next;
	void (*fn)(struct ox_post *post);
};
/* Runs post->fn(post) on the loop's thread, in order of posting for one poster.  Any thread,
 * also one without a loop; lock-free; wakes the loop only if it sleeps. */
void ox_loop_post(struct ox_loop *loop, struct ox_post *post);

/* Runs fn(arg) on another loop's thread and suspends the running fiber until it has returned.
 * fn must not suspend.  On the own loop it is called at once. */
void ox_loop_call_co(struct ox_loop *target, void (*fn)(void *arg), void *arg);
/* The same for a function that may suspend: it runs in a fiber of the target's thread. */
void ox_loop_call_fiber_co(struct ox_loop *target, void (*fn_co)(void *arg), void *arg);
/* Runs a function that may block on a worker thread, and suspends the running fiber until it
 * has returned; its value. */
int ox_worker_call_co(int (*fn)(void *arg), void *arg);

/* Runs fn_co(arg) in a fiber of `loop` and returns when it has ended: for a thread that does
 * not run a loop (main() before and after the loop, tests).  The loop, which does not run
 * elsewhere, is turned here until fn_co has ended. */
void ox_loop_run_fiber(struct ox_loop *loop, void (*fn_co)(void *arg), void *arg);

/* --- descriptors ----------------------------------------------------------------------- */

struct ox_watch {
	int fd;
	uint32_t events; /* EPOLLIN | EPOLLOUT, level triggered */
	void (*fn)(struct ox_watch *watch, uint32_t revents);
	struct ox_loop *loop;
};
int ox_watch_add(struct ox_loop *loop, struct ox_watch *watch) OX_MUST_CHECK;
void ox_watch_modify(struct ox_watch *watch, uint32_t events);
/* After this returns fn is not called again, also not for events already fetched.  Harmless if
 * the watch is not added (loop NULL). */
void ox_watch_remove(struct ox_watch *watch);
/* Suspends the running fiber until fd shows one of events; 0, or -ETIMEDOUT after timeout_ns
 * (-1: no limit). */
int ox_wait_fd_co(int fd, uint32_t events, int64_t timeout_ns);

/* --- timers ---------------------------------------------------------------------------- */

struct ox_timer {
	uint64_t deadline; /* CLOCK_MONOTONIC ns */
	void (*fn)(struct ox_timer *timer);
	struct ox_loop *loop; /* NULL: not armed */
	unsigned index;       /* in the loop's heap */
};
/* Once, delay_ns from now; arming an armed timer moves it. */
void ox_timer_arm(struct ox_loop *loop, struct ox_timer *timer, uint64_t delay_ns);
void ox_timer_cancel(struct ox_timer *timer);
void ox_sleep_co(uint64_t ns);

/* --- pollers: sources that are asked instead of signalling (virtqueues) ------------------ */

struct ox_poller {
	/* Required, all three. */
	/* Does what there is to do; true if there was anything. */
	bool (*poll)(struct ox_poller *poller);
	/* The loop is about to sleep: turn notifications on, then look once more; true if there
	 * is work after all (the loop does not sleep).  Otherwise the source's descriptor, in a
	 * watch, wakes the loop. */
	bool (*sleep)(struct ox_poller *poller);
	/* The loop woke or goes on: notifications may be turned off. */
	void (*wake)(struct ox_poller *poller);
	TAILQ_ENTRY(ox_poller) link;
	struct ox_loop *loop;
};
void ox_poller_add(struct ox_loop *loop, struct ox_poller *poller);
void ox_poller_remove(struct ox_poller *poller);

/* Work to be done at the end of this turn, before submitting and sleeping (coalesced
 * notifications to a guest).  Runs once; may be scheduled again. */
struct ox_deferred {
	void (*fn)(struct ox_deferred *deferred);
	STAILQ_ENTRY(ox_deferred) link;
	bool scheduled;
};
void ox_loop_defer(struct ox_loop *loop, struct ox_deferred *deferred);
void ox_deferred_cancel(struct ox_loop *loop, struct ox_deferred *deferred);

/* --- threads ----------------------------------------------------------------------------- */

struct ox_iothread;
/* A thread that runs a loop of its own. */
struct ox_iothread *ox_iothread_start(const struct ox_loop_options *options, struct ox_error *err);
struct ox_loop *ox_iothread_loop(struct ox_iothread *thread);
/* Stops the loop, joins the thread and frees the loop. */
void ox_iothread_stop(struct ox_iothread *thread);

/* What the loop did: for tests and query-block.  Any thread (relaxed). */
struct ox_loop_stats {
	uint64_t turns, sleeps, wakeups_posted, submits, submitted;
};
void ox_loop_get_stats(const struct ox_loop *loop, struct ox_loop_stats *stats);

#endif
