/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The native engine: Linux AIO by libaio (io_submit(2)).
 *
 * Completions are counted in an eventfd that only matters while the loop sleeps; while it is
 * awake the completion ring is looked at, which libaio's io_getevents() does without a system
 * call when the ring is empty and the timeout is zero.
 */
#include "engine/loop_private.h"
#include <errno.h>
#include <libaio.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#define DEPTH 256
#define BATCH 64

struct native {
	io_context_t context;
	struct ox_watch watch;
	/* Control blocks that are free: a stack. */
	struct iocb *free[DEPTH];
	unsigned free_count;
	struct iocb iocb[DEPTH];
};

static void events_ready(struct ox_watch *watch, uint32_t revents)
{
	uint64_t count;

	if (read(watch->fd, &count, sizeof(count)) < 0)
		return;
}

static int native_open(struct ox_engine *engine, struct ox_error *err)
{
	struct native *native = ox_xcalloc(1, sizeof(*native));
	int rc = io_setup(DEPTH, &native->context);

	if (rc < 0) {
		free(native);
		if (rc == -EAGAIN)
			return ox_error_set(err, EAGAIN,
			                    "aio=native: the host is out of AIO contexts (raise "
			                    "the sysctl fs.aio-max-nr)");
		return ox_error_set(err, -rc, "aio=native: io_setup: %s", strerror(-rc));
	}
	native->watch.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	native->watch.events = EPOLLIN;
	native->watch.fn = events_ready;
	if (native->watch.fd < 0 || ox_watch_add(engine->loop, &native->watch) < 0) {
		rc = errno;
		if (native->watch.fd >= 0)
			close(native->watch.fd);
		io_destroy(native->context);
		free(native);
		return ox_error_set(err, rc, "aio=native: eventfd: %s", strerror(rc));
	}
	for (unsigned i = 0; i < DEPTH; i++)
		native->free[native->free_count++] = &native->iocb[i];
	engine->priv = native;
	return 0;
}

static void native_close(struct ox_engine *engine)
{
	struct native *native = engine->priv;

	ox_watch_remove(&native->watch);
	close(native->watch.fd);
	io_destroy(native->context);
	free(native);
}

static void prepare(struct native *native, struct iocb *iocb, struct ox_engine_op *op)
{
	memset(iocb, 0, sizeof(*iocb));
	iocb->aio_fildes = op->fd;
	iocb->data = op;
	switch (op->opcode) {
	case OX_ENGINE_READ:
	case OX_ENGINE_WRITE:
		iocb->aio_lio_opcode =
		        op->opcode == OX_ENGINE_READ ? IO_CMD_PREADV : IO_CMD_PWRITEV;
		iocb->u.c.buf = (void *)op->iov;
		iocb->u.c.nbytes = op->iovcnt;
		iocb->u.c.offset = (long long)op->offset;
		if (op->flags & OX_ENGINE_DSYNC)
			iocb->aio_rw_flags = RWF_DSYNC;
		break;
	default:
		iocb->aio_lio_opcode = IO_CMD_FDSYNC;
		break;
	}
	io_set_eventfd(iocb, native->watch.fd);
}

static unsigned native_submit(struct ox_engine *engine, struct ox_engine_op **first, unsigned count)
{
	struct native *native = engine->priv;
	struct iocb *batch[BATCH];
	unsigned taken = 0;

	while (taken < count && native->free_count) {
		unsigned n = 0;
		int rc;

		for (struct ox_engine_op *op = *first;
		     n < ox_min(count - taken, (unsigned)BATCH) && native->free_count;
		     op = op->next) {
			batch[n] = native->free[--native->free_count];
			prepare(native, batch[n++], op);
		}
		do {
			rc = io_submit(native->context, n, batch);
		} while (rc == -EINTR);
		if (rc == 0)
			rc = -EAGAIN;
		for (unsigned i = n; i > (rc > 0 ? (unsigned)rc : 0); i--)
			native->free[native->free_count++] = batch[i - 1];
		if (rc == -EAGAIN && engine->in_flight > count - taken)
			return taken; /* a completion will make room */
		if (rc == -ENOSYS || rc == -EPERM) {
			ox_engine_lose(engine, strerror(-rc));
			return taken;
		}
		if (rc < 0) {
			/* It is the first operation that the kernel refuses. What it may refuse
			 * though it is legal (FDSYNC on an old kernel) blocks here instead. */
			struct ox_engine_op *op = *first;

			*first = op->next;
			op->result = rc == -EINVAL || rc == -EAGAIN ? ox_engine_op_perform(op) : rc;
			ox_engine_complete(engine, op);
			taken++;
			continue;
		}
		for (int i = 0; i < rc; i++)
			*first = (*first)->next;
		taken += (unsigned)rc;
	}
	return taken;
}

static unsigned native_reap(struct ox_engine *engine)
{
	struct native *native = engine->priv;
	struct io_event events[BATCH];
	struct timespec zero = {0};
	unsigned total = 0;
	int n;

	do {
		n = io_getevents(native->context, 0, BATCH, events, &zero);
		for (int i = 0; i < n; i++) {
			struct ox_engine_op *op = events[i].data;

			native->free[native->free_count++] = events[i].obj;
			op->result = (int64_t)events[i].res;
			if (op->result == -EINTR || op->result == -EAGAIN)
				op->result = ox_engine_op_perform(op);
			ox_engine_complete(engine, op);
			total++;
		}
	} while (n == BATCH);
	return total;
}

const struct ox_engine_ops ox_engine_native = {
        .kind = OX_AIO_NATIVE,
        .name = "libaio",
        .opcodes = 1u << OX_ENGINE_READ | 1u << OX_ENGINE_WRITE | 1u << OX_ENGINE_FDATASYNC,
        .open = native_open,
        .close = native_close,
        .submit = native_submit,
        .reap = native_reap,
};
