/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What fibers wait for: calls on other loops and on workers, descriptors, time.  And the threads
 * that run loops.
 */
#include "base/fiber.h"
#include "engine/loop_private.h"
#include <errno.h>
#include <pthread.h>
#include <string.h>

/* --- calls on another loop ------------------------------------------------------------------ */

struct remote_call {
	struct ox_post post;
	struct ox_loop *origin, *target;
	struct ox_fiber *fiber;
	void (*fn)(void *arg);
	void *arg;
	bool done;
};

static void call_returned(struct ox_post *post)
{
	struct remote_call *call = ox_container_of(post, struct remote_call, post);

	call->done = true;
	ox_fiber_resume(call->fiber);
}

static void call_arrived(struct ox_post *post)
{
	struct remote_call *call = ox_container_of(post, struct remote_call, post);

	call->fn(call->arg);
	call->post.fn = call_returned;
	ox_loop_post(call->origin, &call->post);
}

static void fiber_arrived(void *arg)
{
	struct remote_call *call = arg;

	call->fn(call->arg);
	call->post.fn = call_returned;
	ox_loop_post(call->origin, &call->post);
}

static void fiber_call_arrived(struct ox_post *post)
{
	struct remote_call *call = ox_container_of(post, struct remote_call, post);

	/* No stack to be had: wait for one to come back. */
	if (ox_fiber_start(fiber_arrived, call) < 0)
		ox_loop_post(call->target, &call->post);
}

static void remote_call_co(struct ox_loop *target, void (*arrived)(struct ox_post *post),
                           void (*fn)(void *arg), void *arg)
{
	struct remote_call call = {
	        .post.fn = arrived,
	        .origin = ox_loop_current(),
	        .target = target,
	        .fiber = ox_fiber_self(),
	        .fn = fn,
	        .arg = arg,
	};

	if (call.origin == target) {
		fn(arg);
		return;
	}
	ox_loop_post(target, &call.post);
	while (!call.done)
		ox_fiber_suspend();
}

void ox_loop_call_co(struct ox_loop *target, void (*fn)(void *arg), void *arg)
{
	remote_call_co(target, call_arrived, fn, arg);
}

void ox_loop_call_fiber_co(struct ox_loop *target, void (*fn_co)(void *arg), void *arg)
{
	remote_call_co(target, fiber_call_arrived, fn_co, arg);
}

struct worker_call {
	struct ox_engine_op op;
	int (*fn)(void *arg);
	void *arg;
};

static int64_t run_worker_call(struct ox_engine_op *op)
{
	struct worker_call *call = ox_container_of(op, struct worker_call, op);

	return call->fn(call->arg);
}

int ox_worker_call_co(int (*fn)(void *arg), void *arg)
{
	struct worker_call call = {
	        .op = {.opcode = OX_ENGINE_CALL, .fd = -1, .file = -1, .call = run_worker_call},
	        .fn = fn,
	        .arg = arg,
	};

	return (int)ox_engine_run_co(ox_loop_engine(ox_loop_current(), OX_AIO_THREADS), &call.op);
}

/* --- a fiber for a thread without a loop -------------------------------------------------------
 */

struct run_fiber {
	void (*fn_co)(void *arg);
	void *arg;
	bool done;
};

static void run_fiber_body(void *arg)
{
	struct run_fiber *run = arg;

	run->fn_co(run->arg);
	run->done = true;
}

void ox_loop_run_fiber(struct ox_loop *loop, void (*fn_co)(void *arg), void *arg)
{
	struct run_fiber run = {.fn_co = fn_co, .arg = arg};
	struct ox_loop *before = ox_loop_enter(loop);
	int rc = ox_fiber_start(run_fiber_body, &run);

	ox_loop_leave(before);
	if (rc < 0)
		abort(); /* no memory for a single stack at start-up or exit */
	if (!run.done)
		ox_loop_run_until(loop, &run.done);
}

/* --- descriptors and time ------------------------------------------------------------------------
 */

struct fd_wait {
	struct ox_watch watch;
	struct ox_timer timer;
	struct ox_fiber *fiber;
	int result;
	bool done;
};

static void fd_wait_end(struct fd_wait *wait, int result)
{
	ox_watch_remove(&wait->watch);
	ox_timer_cancel(&wait->timer);
	wait->result = result;
	wait->done = true;
	ox_fiber_resume(wait->fiber);
}

static void fd_wait_ready(struct ox_watch *watch, uint32_t revents)
{
	fd_wait_end(ox_container_of(watch, struct fd_wait, watch), 0);
}

static void fd_wait_expired(struct ox_timer *timer)
{
	fd_wait_end(ox_container_of(timer, struct fd_wait, timer), -ETIMEDOUT);
}

int ox_wait_fd_co(int fd, uint32_t events, int64_t timeout_ns)
{
	struct ox_loop *loop = ox_loop_current();
	struct fd_wait wait = {
	        .watch = {.fd = fd, .events = events, .fn = fd_wait_ready},
	        .timer = {.fn = fd_wait_expired},
	        .fiber = ox_fiber_self(),
	};
	int rc = ox_watch_add(loop, &wait.watch);

	if (rc < 0)
		return rc;
	if (timeout_ns >= 0)
		ox_timer_arm(loop, &wait.timer, (uint64_t)timeout_ns);
	while (!wait.done)
		ox_fiber_suspend();
	return wait.result;
}

struct sleeper {
	struct ox_timer timer;
	struct ox_fiber *fiber;
	bool done;
};

static void sleep_over(struct ox_timer *timer)
{
	struct sleeper *sleeper = ox_container_of(timer, struct sleeper, timer);

	sleeper->done = true;
	ox_fiber_resume(sleeper->fiber);
}

void ox_sleep_co(uint64_t ns)
{
	struct sleeper sleeper = {.timer = {.fn = sleep_over}, .fiber = ox_fiber_self()};

	ox_timer_arm(ox_loop_current(), &sleeper.timer, ns);
	while (!sleeper.done)
		ox_fiber_suspend();
}

/* --- threads
 * ------------------------------------------------------------------------------------------ */

struct ox_iothread {
	pthread_t thread;
	struct ox_loop *loop;
};

static void *iothread_main(void *arg)
{
	struct ox_iothread *thread = arg;

	pthread_setname_np(pthread_self(), thread->loop->name);
	ox_loop_run(thread->loop);
	/* Engines end on the thread that used them. */
	ox_engines_close(thread->loop);
	ox_fiber_pool_free();
	return NULL;
}

struct ox_iothread *ox_iothread_start(const struct ox_loop_options *options, struct ox_error *err)
{
	struct ox_iothread *thread = ox_xcalloc(1, sizeof(*thread));
	int rc;

	thread->loop = ox_loop_new(options, err);
	if (!thread->loop) {
		free(thread);
		return NULL;
	}
	rc = ox_thread_create(&thread->thread, NULL, iothread_main, thread);
	if (rc) {
		ox_error_set(err, rc, "cannot start an I/O thread: %s", strerror(rc));
		ox_loop_free(thread->loop);
		free(thread);
		return NULL;
	}
	return thread;
}

struct ox_loop *ox_iothread_loop(struct ox_iothread *thread)
{
	return thread->loop;
}

void ox_iothread_stop(struct ox_iothread *thread)
{
	if (!thread)
		return;
	ox_loop_stop(thread->loop);
	pthread_join(thread->thread, NULL);
	ox_loop_free(thread->loop);
	free(thread);
}
