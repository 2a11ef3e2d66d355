/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the files of this folder share about a loop.
 */
#ifndef OX_ENGINE_LOOP_PRIVATE_H
#define OX_ENGINE_LOOP_PRIVATE_H

#include "engine/engine.h"
#include "engine/loop.h"
#include <pthread.h>

#define OX_LOOP_EVENTS 32

struct ox_loop {
	char name[16];
	int epoll_fd;
	int wake_fd; /* eventfd: ends a sleep from another thread */
	struct ox_watch wake_watch;

	/* Posted calls: a stack that posters push with compare-and-swap and the loop empties with
	 * one exchange and reverses. */
	struct ox_post *posted;
	/* 1 from before the loop looks for work the last time until it woke: whoever makes work
	 * and then finds 1 here writes to wake_fd.  Both sides use sequentially consistent order
	 * (Dekker): either the loop sees the work or the maker sees the sleeper. */
	int sleeping;
	int stop; /* atomic */
	/* Other threads that are between making work and waking the loop: the work may be the
	 * last that the loop waited for, so ox_loop_free() waits for them. */
	int makers;

	uint64_t now;
	TAILQ_HEAD(, ox_poller) pollers;
	struct ox_poller *next_poller; /* of the walk that is under way: removal moves it on */
	STAILQ_HEAD(, ox_deferred) deferred;
	struct ox_timer **timers; /* binary heap by deadline */
	unsigned timer_count, timer_room;

	struct ox_engine *engines[OX_AIO_IO_URING + 1];
	struct ox_engine *waiter; /* the engine that sleeps for the loop, or NULL */

	/* Events fetched and not yet handled: ox_watch_remove() blanks its own. */
	struct epoll_event events[OX_LOOP_EVENTS];
	int event_index, event_count;
	uint64_t fd_check_ns; /* when epoll was last asked */
	bool fds_watched;     /* an engine will say when epoll has something new */
	bool fds_unsure;      /* epoll answered events: ask again before sleeping */

	uint64_t poll_max_ns; /* the longest spin */
	struct ox_loop_wait {
		uint64_t usual_ns;
		unsigned since_probe, probe_every;
		bool probing;
	} wait[2];              /* for the guest, for the disk: see "adaptive polling" in loop.c */
	bool guest_is_next;     /* the last work was completions: the guest may answer them */
	bool guest_came;        /* this turn's work came from outside */
	bool submit_with_sleep; /* an engine that sleeps for the loop need not submit now */

	struct ox_loop_stats stats;
};

/* Ends the sleep of a loop, if it sleeps.  Any thread; after the work is visible. */
void ox_loop_wake(struct ox_loop *loop);

/* Around making work for a loop on another thread: what happens in between may end the loop's
 * last reason to live. */
static inline void ox_loop_maker_enter(struct ox_loop *loop)
{
	__atomic_fetch_add(&loop->makers, 1, __ATOMIC_ACQUIRE);
}
static inline void ox_loop_maker_leave(struct ox_loop *loop)
{
	ox_loop_wake(loop);
	__atomic_fetch_sub(&loop->makers, 1, __ATOMIC_RELEASE);
}

/* A counter with one writer that other threads read. */
static inline void ox_loop_count(uint64_t *counter, uint64_t by)
{
	__atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}
/* Makes a loop this thread's current one; returns the one before. */
struct ox_loop *ox_loop_enter(struct ox_loop *loop);
void ox_loop_leave(struct ox_loop *before);

/* Timers (timer.c): runs what is due; the nearest deadline or UINT64_MAX. */
bool ox_timers_run(struct ox_loop *loop);
uint64_t ox_timers_next(const struct ox_loop *loop);

/* Engines (engine.c). */
/* Hands what was collected to the engines: all of it, or (unless `all`) full batches only. True
 * if anything was completed meanwhile. */
bool ox_engines_flush(struct ox_loop *loop, bool all);
bool ox_engines_reap(struct ox_loop *loop);
unsigned ox_engines_in_flight(const struct ox_loop *loop);
void ox_engines_close(struct ox_loop *loop);
/* The kernel took an engine away at run time: from now on its operations go to the loop's
 * threads engine.  Says so once. */
void ox_engine_lose(struct ox_engine *engine, const char *why);

/* The process's worker threads (worker.c): runs `count` operations linked by next and calls
 * finished() for each, on the worker's thread. */
void ox_worker_submit(struct ox_engine_op *first, unsigned count,
                      void (*finished)(struct ox_engine_op *op));
/* pthread_create() for a thread that signals pass by: those are the main thread's. */
int ox_thread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *arg),
                     void *arg);
/* The blocking system call of an operation: bytes, 0 or -errno. */
int64_t ox_engine_op_perform(struct ox_engine_op *op);

#endif
