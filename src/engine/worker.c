/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The process's worker threads: for the threads engine and for whatever may block.
 *
 * Threads are started on demand, up to WORKERS_MAX, and end after IDLE_SECONDS without work, so
 * that an idle process has none.  Workers block all signals: those belong to the main thread.
 */
#include "engine/loop_private.h"
#include <errno.h>
#include <oxbow/log.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>

#define WORKERS_MAX  64
#define IDLE_SECONDS 10
#define WORKER_STACK (256 * 1024)

struct job {
	struct ox_engine_op *op;
	void (*finished)(struct ox_engine_op *op);
};

static struct {
	pthread_mutex_t lock;
	pthread_cond_t work;
	bool cond_ready;
	/* A ring of jobs that grows: an operation has no room for the function to call. */
	struct job *job;
	unsigned first, count, room;
	unsigned threads, idle;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* This thread is a worker.  What a worker submits while it does something that blocks (an image's
 * opening turns a private loop) it carries out itself: if all workers waited for one another's
 * turn, none would ever come. */
static __thread bool is_worker;

static void push_job(struct job job)
{
	if (pool.count == pool.room) {
		unsigned room = pool.room ? 2 * pool.room : 64;
		struct job *grown = ox_xcalloc(room, sizeof(*grown));

		for (unsigned i = 0; i < pool.count; i++)
			grown[i] = pool.job[(pool.first + i) % pool.room];
		free(pool.job);
		pool.job = grown;
		pool.room = room;
		pool.first = 0;
	}
	pool.job[(pool.first + pool.count++) % pool.room] = job;
}

static void *worker(void *arg)
{
	struct timespec until;

	pthread_setname_np(pthread_self(), "ox-worker");
	is_worker = true;
	pthread_mutex_lock(&pool.lock);
	for (;;) {
		struct job job;

		if (!pool.count) {
			int rc = 0;

			clock_gettime(CLOCK_MONOTONIC, &until);
			until.tv_sec += IDLE_SECONDS;
			pool.idle++;
			while (!pool.count && rc != ETIMEDOUT)
				rc = pthread_cond_timedwait(&pool.work, &pool.lock, &until);
			pool.idle--;
			if (!pool.count)
				break;
		}
		job = pool.job[pool.first];
		pool.first = (pool.first + 1) % pool.room;
		pool.count--;
		pthread_mutex_unlock(&pool.lock);
		job.op->result = ox_engine_op_perform(job.op);
		job.finished(job.op);
		pthread_mutex_lock(&pool.lock);
	}
	pool.threads--;
	pthread_mutex_unlock(&pool.lock);
	return NULL;
}

int ox_thread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *arg),
                     void *arg)
{
	sigset_t all, before;
	int rc;

	/* Faults stay open: one that is blocked ends the process, whatever its handler. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	rc = pthread_create(thread, attr, fn, arg);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return rc;
}

/* The lock is held. */
static void start_worker(void)
{
	pthread_attr_t attr;
	pthread_t thread;
	int rc;

	if (!pool.cond_ready) {
		pthread_condattr_t clock;

		pthread_condattr_init(&clock);
		pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
		pthread_cond_init(&pool.work, &clock);
		pthread_condattr_destroy(&clock);
		pool.cond_ready = true;
	}
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attr, WORKER_STACK);
	rc = ox_thread_create(&thread, &attr, worker, NULL);
	pthread_attr_destroy(&attr);
	if (rc == 0)
		pool.threads++;
	else
		ox_log_once(OX_LOG_WARNING, "cannot start a worker thread: %s", strerror(rc));
}

void ox_worker_submit(struct ox_engine_op *first, unsigned count,
                      void (*finished)(struct ox_engine_op *op))
{
	struct ox_engine_op *op = first;
	bool stranded;

	if (is_worker) {
		for (unsigned i = 0; i < count; i++) {
			struct ox_engine_op *next = op->next;

			op->result = ox_engine_op_perform(op);
			finished(op);
			op = next;
		}
		return;
	}
	pthread_mutex_lock(&pool.lock);
	for (unsigned i = 0; i < count; i++) {
		struct ox_engine_op *next = op->next;

		push_job((struct job){op, finished});
		if (pool.count > pool.idle && pool.threads < WORKERS_MAX)
			start_worker();
		op = next;
	}
	stranded = !pool.threads;
	if (count == 1)
		pthread_cond_signal(&pool.work);
	else if (pool.cond_ready)
		pthread_cond_broadcast(&pool.work);
	pthread_mutex_unlock(&pool.lock);
	/* No thread at all can be had: the caller does the work. */
	while (stranded) {
		struct job job;

		pthread_mutex_lock(&pool.lock);
		stranded = pool.count && !pool.threads;
		if (stranded) {
			job = pool.job[pool.first];
			pool.first = (pool.first + 1) % pool.room;
			pool.count--;
		}
		pthread_mutex_unlock(&pool.lock);
		if (stranded) {
			job.op->result = ox_engine_op_perform(job.op);
			job.finished(job.op);
		}
	}
}
