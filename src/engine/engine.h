/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * I/O engines: how an operation on a descriptor reaches the kernel.
 *
 * Each loop has at most one engine of each kind, made when a channel first asks for it.  An
 * engine is used by its loop's thread only.  Operations are collected by ox_engine_submit() and
 * handed to the kernel in batches, at the end of a turn of the loop or when a batch is full.
 */
#ifndef OX_ENGINE_ENGINE_H
#define OX_ENGINE_ENGINE_H

#include "base/base.h"
#include <oxbow/error.h>
#include <oxbow/types.h>
#include <sys/uio.h>

struct ox_loop;
struct ox_engine;

enum ox_engine_opcode {
	OX_ENGINE_READ,      /* preadv2 */
	OX_ENGINE_WRITE,     /* pwritev2, RWF_DSYNC with OX_ENGINE_DSYNC */
	OX_ENGINE_FDATASYNC, /* fdatasync */
	OX_ENGINE_FALLOCATE, /* fallocate(fd, mode, offset, length) */
	OX_ENGINE_CALL,      /* op->call(op) on a thread that may block; its value is the result */
};

#define OX_ENGINE_DSYNC 1u

/* One operation; embedded in a caller's structure, which owns it again when done() is called. */
struct ox_engine_op {
	uint8_t opcode; /* enum ox_engine_opcode */
	uint8_t flags;
	uint16_t mode;   /* FALLOCATE: FALLOC_FL_* */
	uint32_t iovcnt; /* READ, WRITE: 1 to IOV_MAX */
	int fd;
	int file;        /* ox_engine_register_file()'s index for fd, or -1 */
	uint64_t offset; /* bytes */
	uint64_t length; /* bytes; READ, WRITE: the list's sum */
	const struct iovec *iov;
	int64_t (*call)(struct ox_engine_op *op);
	int64_t result; /* bytes moved (may be short), 0, or -errno; never -EINTR */
	/* Called once, on the loop's thread, in a later turn or (sync engine, a full batch) from
	 * within a submit of another operation; never from within this operation's own submit. */
	void (*done)(struct ox_engine_op *op);
	struct ox_engine_op *next; /* the engine's, until done */
	struct ox_engine *engine;  /* the engine's, until done */
	void *waiter;              /* ox_engine_run_co()'s */
};

/* The table.  All members are called on the loop's thread and may not suspend. */
struct ox_engine_ops {
	enum ox_aio kind;
	const char *name;
	unsigned opcodes; /* bit 1 << OX_ENGINE_...: what it takes; the rest goes to threads */
	/* Required.  Makes the engine's private state; an error here means "not available". */
	int (*open)(struct ox_engine *engine, struct ox_error *err);
	/* Required.  Nothing is in flight. */
	void (*close)(struct ox_engine *engine);
	/* Required.  Takes operations from the front of a list of `count` (linked by next), moves
	 * *first past them, and returns how many it took: fewer than `count` means "busy, ask
	 * again after a completion".  What it takes it completes by ox_engine_complete(), at
	 * once or later. */
	unsigned (*submit)(struct ox_engine *engine, struct ox_engine_op **first, unsigned count);
	/* Optional.  Completes what has finished, without a system call where that is possible;
	 * returns how many. */
	unsigned (*reap)(struct ox_engine *engine);
	/* Optional: only an engine that can sleep for the loop (io_uring) has it.  Submits what
	 * is prepared and sleeps until something completes, the loop's epoll descriptor is
	 * readable, or timeout_ns passed (-1: no limit).  The other engines signal through a
	 * descriptor in the loop's epoll set, or ox_loop_post(). */
	void (*wait)(struct ox_engine *engine, int64_t timeout_ns);
	/* Optional.  Registers a descriptor; an index or -errno. */
	int (*register_file)(struct ox_engine *engine, int fd);
	void (*unregister_file)(struct ox_engine *engine, int file);
};

struct ox_engine {
	const struct ox_engine_ops *ops;
	struct ox_loop *loop;
	void *priv;
	struct ox_engine *fallback; /* set when the kernel took the engine away at run time */
	/* Submitted and not yet taken by ops->submit. */
	struct ox_engine_op *pending_first, **pending_last;
	unsigned pending;
	unsigned in_flight;                           /* taken and not completed */
	struct ox_engine_op *done_first, **done_last; /* completed, done() not yet called */
	struct ox_engine_op *finished;                /* threads: a stack that workers push to */
};

/* The loop's engine of a kind, made if needed.  OX_AIO_AUTO is not a kind.  When the kernel or
 * its policy refuses (io_uring: ENOSYS, EPERM, io_uring_disabled; libaio: EAGAIN because of
 * fs.aio-max-nr), answers the threads engine and says so once in a warning.  Never NULL. */
struct ox_engine *ox_loop_engine(struct ox_loop *loop, enum ox_aio kind);

/* Queues an operation.  Loop's thread. */
void ox_engine_submit(struct ox_engine *engine, struct ox_engine_op *op);

/* For engines: the operation is finished with op->result; done() runs soon. */
void ox_engine_complete(struct ox_engine *engine, struct ox_engine_op *op);

/* -1 if the engine does not register files (or is out of slots): then use the descriptor. */
int ox_engine_register_file(struct ox_engine *engine, int fd);
void ox_engine_unregister_file(struct ox_engine *engine, int file);

/* Suspends the running fiber until the operation is done (op->done is set here); returns
 * op->result. */
int64_t ox_engine_run_co(struct ox_engine *engine, struct ox_engine_op *op);

/* May the kind be used here?  0, or -errno with the reason ("io_uring is disabled by
 * kernel.io_uring_disabled=2").  Probed once a process; any thread. */
int ox_aio_available(enum ox_aio kind, struct ox_error *err);

/* What ox_aio_choose() goes by. */
struct ox_aio_facts {
	bool direct; /* the file is open with O_DIRECT */
	bool block_device;
	bool fully_allocated; /* a regular file without holes or unwritten ends at open */
};

/* Turns AUTO into a kind: io_uring if allowed, native only where submission cannot block
 * (O_DIRECT, and fully allocated or a block device), else threads.  A kind that was asked for
 * stays, or falls to threads if it is not available.  `reason` (at least 128 bytes) gets a few
 * words, e.g. "io_uring is allowed here". */
enum ox_aio ox_aio_choose(enum ox_aio asked, const struct ox_aio_facts *facts, char *reason,
                          size_t size);

extern const struct ox_engine_ops ox_engine_sync;
extern const struct ox_engine_ops ox_engine_threads;
extern const struct ox_engine_ops ox_engine_native;
extern const struct ox_engine_ops ox_engine_io_uring;

#endif
