/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The io_uring engine (liburing).
 *
 * The loop sleeps here: the ring watches the loop's epoll descriptor with a poll request, so
 * that submitting, reaping and waiting for descriptors is one system call.  That poll is
 * multishot where the kernel has it (5.13), else armed again before each sleep.
 *
 * Features and what stands in for them:
 *  - SINGLE_ISSUER | DEFER_TASKRUN (6.1): completions are worked off when this thread asks, not
 *    by interrupting it.  Then COOP_TASKRUN (5.19), then nothing.
 *  - registered files (5.19 for a sparse table): without them each request looks its file up.
 *  - a registered ring descriptor (5.18): the same for the ring itself.
 * The ring belongs to the thread that first asked for it.
 */
#include "engine/loop_private.h"
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <string.h>

#define SQ_ENTRIES 256
#define CQ_ENTRIES 1024
#define FILES      64

#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

struct uring {
	struct io_uring ring;
	bool poll_armed;
	bool poll_multishot;
	bool deferred_tasks; /* completions appear only when the kernel is entered for them */
	bool files;          /* the file table is registered */
	uint64_t files_used; /* a bit for each slot */
};

/* user_data of the poll on the epoll descriptor; no operation lies there. */
#define POLL_TAG 1u

static int setup_ring(struct io_uring *ring, unsigned entries, bool *deferred)
{
	static const unsigned flag_sets[] = {
	        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
	                IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,
	        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,
	        0,
	};
	int rc = -EINVAL;

	for (unsigned i = 0; i < OX_ARRAY_SIZE(flag_sets) && rc == -EINVAL; i++) {
		struct io_uring_params params = {
		        .flags = flag_sets[i] | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
		        .cq_entries = ox_max(entries * 4, 4u),
		};

		rc = io_uring_queue_init_params(entries, ring, &params);
		*deferred = rc == 0 && (flag_sets[i] & IORING_SETUP_DEFER_TASKRUN);
	}
	return rc;
}

static int uring_open(struct ox_engine *engine, struct ox_error *err)
{
	struct uring *uring;
	int rc = ox_aio_available(OX_AIO_IO_URING, err);

	if (rc < 0)
		return rc;
	uring = ox_xcalloc(1, sizeof(*uring));
	rc = setup_ring(&uring->ring, SQ_ENTRIES, &uring->deferred_tasks);
	if (rc < 0) {
		free(uring);
		return ox_error_set(err, -rc, "aio=io_uring: io_uring_setup: %s", strerror(-rc));
	}
	/* The ring is the thread's own: a forked child must not find it. */
	io_uring_ring_dontfork(&uring->ring);
	uring->files = io_uring_register_files_sparse(&uring->ring, FILES) == 0;
	io_uring_register_ring_fd(&uring->ring);
	uring->poll_multishot = true;
	engine->priv = uring;
	return 0;
}

static void uring_close(struct ox_engine *engine)
{
	struct uring *uring = engine->priv;

	io_uring_queue_exit(&uring->ring);
	free(uring);
}

static void prepare(struct uring *uring, struct io_uring_sqe *sqe, struct ox_engine_op *op)
{
	int fd = op->file >= 0 ? op->file : op->fd;

	switch (op->opcode) {
	case OX_ENGINE_READ:
		if (op->iovcnt == 1)
			io_uring_prep_read(sqe, fd, op->iov->iov_base, (unsigned)op->iov->iov_len,
			                   op->offset);
		else
			io_uring_prep_readv(sqe, fd, op->iov, op->iovcnt, op->offset);
		break;
	case OX_ENGINE_WRITE:
		if (op->iovcnt == 1)
			io_uring_prep_write(sqe, fd, op->iov->iov_base, (unsigned)op->iov->iov_len,
			                    op->offset);
		else
			io_uring_prep_writev(sqe, fd, op->iov, op->iovcnt, op->offset);
		if (op->flags & OX_ENGINE_DSYNC)
			sqe->rw_flags = RWF_DSYNC;
		break;
	case OX_ENGINE_FDATASYNC:
		io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
		break;
	default:
		io_uring_prep_fallocate(sqe, fd, op->mode, (off_t)op->offset, (off_t)op->length);
		break;
	}
	if (op->file >= 0)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, op);
}

/* Entering the kernel is forbidden from now on: what stands in the submission queue and was not
 * consumed is done by threads. */
static void lose(struct ox_engine *engine, int rc)
{
	struct uring *uring = engine->priv;
	struct io_uring_sq *sq = &uring->ring.sq;

	ox_engine_lose(engine, strerror(-rc));
	engine->loop->fds_watched = false;
	for (unsigned i = *sq->khead; i != sq->sqe_tail; i++) {
		struct io_uring_sqe *sqe = &sq->sqes[i & sq->ring_mask];

		if (sqe->user_data == POLL_TAG)
			continue;
		engine->in_flight--;
		ox_engine_submit(engine->fallback, (void *)(uintptr_t)sqe->user_data);
	}
	sq->sqe_head = sq->sqe_tail = *sq->khead;
}

static bool is_lost(int rc)
{
	return rc == -EPERM || rc == -ENOSYS || rc == -EACCES;
}

static void enter(struct ox_engine *engine)
{
	struct uring *uring = engine->priv;
	int rc = uring->deferred_tasks ? io_uring_submit_and_get_events(&uring->ring)
	                               : io_uring_submit(&uring->ring);

	/* EBUSY, EAGAIN: the entries stay and are submitted with the next ones. */
	if (ox_unlikely(is_lost(rc)))
		lose(engine, rc);
}

static unsigned uring_submit(struct ox_engine *engine, struct ox_engine_op **first, unsigned count)
{
	struct uring *uring = engine->priv;
	unsigned taken = 0;

	while (taken < count) {
		struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);
		struct ox_engine_op *op = *first;

		if (ox_unlikely(!sqe)) {
			enter(engine);
			if (engine->fallback)
				break;
			sqe = io_uring_get_sqe(&uring->ring);
			if (!sqe)
				break;
		}
		*first = op->next;
		prepare(uring, sqe, op);
		taken++;
	}
	return taken;
}

static unsigned consume(struct ox_engine *engine)
{
	struct uring *uring = engine->priv;
	struct io_uring_cqe *cqe;
	unsigned head, count = 0, completed = 0;

	io_uring_for_each_cqe(&uring->ring, head, cqe)
	{
		count++;
		if (ox_unlikely(cqe->user_data == POLL_TAG)) {
			uring->poll_armed = cqe->flags & IORING_CQE_F_MORE;
			engine->loop->fds_watched = false; /* look now, and see uring_reap() */
			if (cqe->res == -EINVAL)
				uring->poll_multishot = false; /* before 5.13 */
			engine->loop->fd_check_ns = 0;
			engine->loop->fds_unsure = true;
		} else if (ox_likely(cqe->user_data != LIBURING_UDATA_TIMEOUT)) {
			struct ox_engine_op *op = (void *)(uintptr_t)cqe->user_data;

			op->result = cqe->res;
			if (ox_unlikely(cqe->res == -EINTR || cqe->res == -EAGAIN)) {
				/* Not the caller's business: try again. */
				engine->in_flight--;
				ox_engine_submit(engine, op);
			} else {
				ox_engine_complete(engine, op);
				completed++;
			}
		}
	}
	if (count)
		io_uring_cq_advance(&uring->ring, count);
	return completed;
}

static unsigned uring_reap(struct ox_engine *engine)
{
	struct uring *uring = engine->priv;
	unsigned flags;

	if (io_uring_sq_ready(&uring->ring) && !engine->loop->submit_with_sleep) {
		enter(engine);
	} else {
		flags = __atomic_load_n(uring->ring.sq.kflags, __ATOMIC_RELAXED);
		if (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW))
			io_uring_get_events(&uring->ring);
	}
	engine->loop->fds_watched = uring->poll_armed;
	return consume(engine);
}

static void arm_poll(struct ox_engine *engine)
{
	struct uring *uring = engine->priv;
	struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);

	if (!sqe) {
		enter(engine);
		if (engine->fallback)
			return;
		sqe = io_uring_get_sqe(&uring->ring);
		if (!sqe)
			return;
	}
	if (uring->poll_multishot)
		io_uring_prep_poll_multishot(sqe, engine->loop->epoll_fd, POLLIN);
	else
		io_uring_prep_poll_add(sqe, engine->loop->epoll_fd, POLLIN);
	sqe->user_data = POLL_TAG;
	uring->poll_armed = true;
}

static void uring_wait(struct ox_engine *engine, int64_t timeout_ns)
{
	struct uring *uring = engine->priv;
	struct __kernel_timespec ts;
	struct io_uring_cqe *cqe;
	int rc;

	if (!uring->poll_armed)
		arm_poll(engine);
	/* Without the poll armed (no free entry) only completions would end the sleep. */
	if (engine->fallback || !uring->poll_armed)
		return;
	if (timeout_ns < 0) {
		rc = io_uring_submit_and_wait(&uring->ring, 1);
	} else {
		ts.tv_sec = timeout_ns / 1000000000;
		ts.tv_nsec = timeout_ns % 1000000000;
		rc = io_uring_submit_and_wait_timeout(&uring->ring, &cqe, 1, &ts, NULL);
	}
	if (ox_unlikely(is_lost(rc)))
		lose(engine, rc);
}

static int uring_register_file(struct ox_engine *engine, int fd)
{
	struct uring *uring = engine->priv;
	unsigned slot;
	int rc;

	if (!uring->files || uring->files_used == UINT64_MAX)
		return -1;
	slot = (unsigned)__builtin_ctzll(~uring->files_used);
	rc = io_uring_register_files_update(&uring->ring, slot, &fd, 1);
	if (rc != 1)
		return rc < 0 ? rc : -1;
	uring->files_used |= 1ull << slot;
	return (int)slot;
}

static void uring_unregister_file(struct ox_engine *engine, int file)
{
	struct uring *uring = engine->priv;
	int none = -1;

	io_uring_register_files_update(&uring->ring, (unsigned)file, &none, 1);
	uring->files_used &= ~(1ull << file);
}

const struct ox_engine_ops ox_engine_io_uring = {
        .kind = OX_AIO_IO_URING,
        .name = "io_uring",
        .opcodes = 1u << OX_ENGINE_READ | 1u << OX_ENGINE_WRITE | 1u << OX_ENGINE_FDATASYNC |
                   1u << OX_ENGINE_FALLOCATE,
        .open = uring_open,
        .close = uring_close,
        .submit = uring_submit,
        .reap = uring_reap,
        .wait = uring_wait,
        .register_file = uring_register_file,
        .unregister_file = uring_unregister_file,
};
