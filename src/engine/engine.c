/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What all engines share: collecting operations, handing them over in batches, telling their
 * owners, and falling back to threads.
 */
#include "base/fiber.h"
#include "engine/loop_private.h"
#include <errno.h>
#include <fcntl.h>
#include <oxbow/log.h>
#include <string.h>
#include <sys/uio.h>

/* A batch this long is handed over although more may come. */
#define BATCH 16

static const struct ox_engine_ops *const engine_table[] = {
        [OX_AIO_SYNC] = &ox_engine_sync,
        [OX_AIO_THREADS] = &ox_engine_threads,
        [OX_AIO_NATIVE] = &ox_engine_native,
        [OX_AIO_IO_URING] = &ox_engine_io_uring,
};

struct ox_engine *ox_loop_engine(struct ox_loop *loop, enum ox_aio kind)
{
	struct ox_engine *engine = loop->engines[kind];
	struct ox_error err = {0};

	if (engine)
		return engine->fallback ? engine->fallback : engine;
	engine = ox_xcalloc(1, sizeof(*engine));
	engine->ops = engine_table[kind];
	engine->loop = loop;
	engine->pending_last = &engine->pending_first;
	engine->done_last = &engine->done_first;
	if (engine->ops->open(engine, &err) < 0) {
		static bool said[OX_ARRAY_SIZE(engine_table)];

		free(engine);
		if (!__atomic_exchange_n(&said[kind], true, __ATOMIC_RELAXED))
			ox_log(OX_LOG_WARNING, "%s; using threads instead", err.text);
		return ox_loop_engine(loop, OX_AIO_THREADS);
	}
	loop->engines[kind] = engine;
	if (engine->ops->wait)
		loop->waiter = engine;
	return engine;
}

void ox_engines_close(struct ox_loop *loop)
{
	loop->waiter = NULL;
	for (unsigned kind = 0; kind < OX_ARRAY_SIZE(loop->engines); kind++) {
		struct ox_engine *engine = loop->engines[kind];

		if (!engine)
			continue;
		engine->ops->close(engine);
		free(engine);
		loop->engines[kind] = NULL;
	}
}

void ox_engine_lose(struct ox_engine *engine, const char *why)
{
	struct ox_loop *loop = engine->loop;

	if (engine->fallback)
		return;
	ox_log_once(OX_LOG_WARNING, "%s was taken away at run time (%s); using threads instead",
	            engine->ops->name, why);
	if (loop->waiter == engine)
		loop->waiter = NULL;
	engine->fallback = ox_loop_engine(loop, OX_AIO_THREADS);
}

void ox_engine_submit(struct ox_engine *engine, struct ox_engine_op *op)
{
	if (ox_unlikely(engine->fallback != NULL))
		engine = engine->fallback;
	if (ox_unlikely(!(engine->ops->opcodes & 1u << op->opcode)))
		engine = ox_loop_engine(engine->loop, OX_AIO_THREADS);
	/* A file's index belongs to the engine that it was registered with. */
	op->engine = engine;
	op->next = NULL;
	*engine->pending_last = op;
	engine->pending_last = &op->next;
	engine->pending++;
}

void ox_engine_complete(struct ox_engine *engine, struct ox_engine_op *op)
{
	engine->in_flight--;
	op->next = NULL;
	*engine->done_last = op;
	engine->done_last = &op->next;
}

static bool call_done(struct ox_engine *engine)
{
	struct ox_engine_op *op = engine->done_first, *next;

	if (!op)
		return false;
	engine->done_first = NULL;
	engine->done_last = &engine->done_first;
	engine->loop->now = ox_clock_ns();
	for (; op; op = next) {
		next = op->next; /* done() may free or submit it again */
		op->done(op);
	}
	return true;
}

static void flush(struct ox_engine *engine);

/* Moves what waits for a lost engine over to its fallback, and on. */
static void move_pending(struct ox_engine *engine)
{
	struct ox_engine_op *op = engine->pending_first, *next;

	engine->pending_first = NULL;
	engine->pending_last = &engine->pending_first;
	engine->pending = 0;
	for (; op; op = next) {
		next = op->next;
		ox_engine_submit(engine->fallback, op);
	}
	if (engine->fallback->pending)
		flush(engine->fallback);
}

static void flush(struct ox_engine *engine)
{
	unsigned count = engine->pending, taken;

	/* Counted first, for what completes at once is counted down.  done() is called later:
	 * nothing joins the list meanwhile. */
	engine->in_flight += count;
	taken = engine->ops->submit(engine, &engine->pending_first, count);
	engine->in_flight -= count - taken;
	engine->pending = count - taken;
	if (!engine->pending) {
		engine->pending_first = NULL;
		engine->pending_last = &engine->pending_first;
	}
	ox_loop_count(&engine->loop->stats.submits, 1);
	ox_loop_count(&engine->loop->stats.submitted, taken);
	if (engine->fallback)
		move_pending(engine);
}

bool ox_engines_flush(struct ox_loop *loop, bool all)
{
	bool progress = false;

	for (unsigned kind = 0; kind < OX_ARRAY_SIZE(loop->engines); kind++) {
		struct ox_engine *engine = loop->engines[kind];

		if (!engine || !engine->pending || (!all && engine->pending < BATCH))
			continue;
		flush(engine);
		progress |= call_done(engine);
	}
	return progress;
}

bool ox_engines_reap(struct ox_loop *loop)
{
	bool progress = false;

	for (unsigned kind = 0; kind < OX_ARRAY_SIZE(loop->engines); kind++) {
		struct ox_engine *engine = loop->engines[kind];

		/* What was reaped before a sleep that did not happen is no longer in flight and
		 * waits to be called.  An idle engine that sleeps for the loop still has to tell of
		 * the descriptors. */
		if (!engine ||
		    (!engine->in_flight && !engine->done_first && engine != loop->waiter))
			continue;
		if (engine->ops->reap)
			engine->ops->reap(engine);
		progress |= call_done(engine);
	}
	return progress;
}

unsigned ox_engines_in_flight(const struct ox_loop *loop)
{
	unsigned sum = 0;

	for (unsigned kind = 0; kind < OX_ARRAY_SIZE(loop->engines); kind++)
		if (loop->engines[kind])
			sum += loop->engines[kind]->in_flight + loop->engines[kind]->pending;
	return sum;
}

int ox_engine_register_file(struct ox_engine *engine, int fd)
{
	if (!engine->ops->register_file || engine->fallback)
		return -1;
	return ox_max(engine->ops->register_file(engine, fd), -1);
}

void ox_engine_unregister_file(struct ox_engine *engine, int file)
{
	if (file >= 0 && engine->ops->unregister_file)
		engine->ops->unregister_file(engine, file);
}

/* --- one operation at a time ----------------------------------------------------------------- */

struct run {
	struct ox_fiber *fiber;
	bool done;
};

static void run_done(struct ox_engine_op *op)
{
	struct run *run = op->waiter;

	run->done = true;
	ox_fiber_resume(run->fiber);
}

int64_t ox_engine_run_co(struct ox_engine *engine, struct ox_engine_op *op)
{
	struct run run = {.fiber = ox_fiber_self()};

	op->waiter = &run;
	op->done = run_done;
	ox_engine_submit(engine, op);
	while (!run.done)
		ox_fiber_suspend();
	return op->result;
}

int64_t ox_engine_op_perform(struct ox_engine_op *op)
{
	ssize_t n;

	do {
		switch ((enum ox_engine_opcode)op->opcode) {
		case OX_ENGINE_READ:
			n = preadv2(op->fd, op->iov, (int)op->iovcnt, (off_t)op->offset, 0);
			break;
		case OX_ENGINE_WRITE:
			n = pwritev2(op->fd, op->iov, (int)op->iovcnt, (off_t)op->offset,
			             op->flags & OX_ENGINE_DSYNC ? RWF_DSYNC : 0);
			break;
		case OX_ENGINE_FDATASYNC:
			n = fdatasync(op->fd);
			break;
		case OX_ENGINE_FALLOCATE:
			n = fallocate(op->fd, op->mode, (off_t)op->offset, (off_t)op->length);
			break;
		case OX_ENGINE_CALL:
			return op->call(op);
		default:
			return -EINVAL;
		}
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}
