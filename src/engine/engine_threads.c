/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The threads engine: blocking system calls on worker threads.  And the sync engine: the same
 * calls on the loop's own thread, the fallback of fallbacks and the tests' oracle.
 *
 * A worker hands an operation back by pushing it on engine->finished (a stack, compare-and-swap)
 * and waking the loop; the loop takes the whole stack with one exchange.
 */
#include "engine/loop_private.h"

#define ALL_OPCODES                                                                 \
	(1u << OX_ENGINE_READ | 1u << OX_ENGINE_WRITE | 1u << OX_ENGINE_FDATASYNC | \
	 1u << OX_ENGINE_FALLOCATE | 1u << OX_ENGINE_CALL)

static int nothing_to_open(struct ox_engine *engine, struct ox_error *err)
{
	return 0;
}

static void nothing_to_close(struct ox_engine *engine)
{
}

static void worker_finished(struct ox_engine_op *op)
{
	/* Once pushed, the operation is its owner's and may be gone, and the engine with it. */
	struct ox_engine *engine = op->engine;
	struct ox_loop *loop = engine->loop;
	struct ox_engine_op *head = __atomic_load_n(&engine->finished, __ATOMIC_RELAXED);

	ox_loop_maker_enter(loop);
	do {
		op->next = head;
	} while (!__atomic_compare_exchange_n(&engine->finished, &head, op, true, __ATOMIC_SEQ_CST,
	                                      __ATOMIC_RELAXED));
	ox_loop_maker_leave(loop);
}

static unsigned threads_submit(struct ox_engine *engine, struct ox_engine_op **first,
                               unsigned count)
{
	struct ox_engine_op *list = *first;

	*first = NULL;
	ox_worker_submit(list, count, worker_finished);
	return count;
}

static unsigned threads_reap(struct ox_engine *engine)
{
	struct ox_engine_op *op, *next, *ordered = NULL;
	unsigned count = 0;

	if (!__atomic_load_n(&engine->finished, __ATOMIC_SEQ_CST))
		return 0;
	op = __atomic_exchange_n(&engine->finished, NULL, __ATOMIC_SEQ_CST);
	for (; op; op = next) {
		next = op->next;
		op->next = ordered;
		ordered = op;
	}
	for (op = ordered; op; op = next, count++) {
		next = op->next;
		ox_engine_complete(engine, op);
	}
	return count;
}

const struct ox_engine_ops ox_engine_threads = {
        .kind = OX_AIO_THREADS,
        .name = "threads",
        .opcodes = ALL_OPCODES,
        .open = nothing_to_open,
        .close = nothing_to_close,
        .submit = threads_submit,
        .reap = threads_reap,
};

static unsigned sync_submit(struct ox_engine *engine, struct ox_engine_op **first, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		struct ox_engine_op *op = *first;

		*first = op->next;
		op->result = ox_engine_op_perform(op);
		ox_engine_complete(engine, op);
	}
	return count;
}

const struct ox_engine_ops ox_engine_sync = {
        .kind = OX_AIO_SYNC,
        .name = "sync",
        .opcodes = ALL_OPCODES,
        .open = nothing_to_open,
        .close = nothing_to_close,
        .submit = sync_submit,
};
