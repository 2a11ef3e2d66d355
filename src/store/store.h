/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Stores: where bytes persist.
 *
 * A store is opened once (control path, may block) and used through channels, one for each loop.
 * Data operations are asynchronous; everything goes through the ox_store_* wrappers below, which
 * validate range, alignment, flags and state once for every implementation.
 */
#ifndef OX_STORE_STORE_H
#define OX_STORE_STORE_H

#include "base/base.h"
#include "base/opener.h"
#include "engine/engine.h"
#include "engine/loop.h"
#include <oxbow/error.h>
#include <oxbow/types.h>

struct ox_store;
struct ox_channel;

enum ox_io_op {
	OX_IO_READ,
	OX_IO_WRITE,
	OX_IO_FLUSH,
	OX_IO_ZERO,    /* reads as zero afterwards */
	OX_IO_DISCARD, /* content undefined afterwards; a hint */
	OX_IO_SECURE_ERASE,
};

#define OX_IO_DSYNC       (1u << 0) /* WRITE, ZERO, DISCARD: durable when complete */
#define OX_IO_MAY_UNMAP   (1u << 1) /* ZERO: space may be given back */
#define OX_IO_NO_FALLBACK (1u << 2) /* ZERO: -ENOTSUP rather than writing zeroes */

/* One store request, embedded in its owner's structure. */
struct ox_io {
	uint8_t op; /* enum ox_io_op */
	uint8_t flags;
	uint32_t iovcnt;         /* READ, WRITE */
	uint64_t offset;         /* bytes */
	uint64_t length;         /* bytes; READ, WRITE: the list's sum */
	const struct iovec *iov; /* stays valid and unchanged until done() */
	int result;              /* 0 or -errno; a short transfer never shows */
	/* Called once on the channel's thread, possibly before the submitting call returns. */
	void (*done)(struct ox_io *io);
	/* The channel's, from submission to done(). */
	struct ox_channel *channel;
	struct ox_engine_op eng;
	struct ox_io *next;
	void *priv;
	uint64_t moved;
};

struct ox_store_limits {
	uint32_t request_alignment;  /* what needs no read-modify-write, bytes; 1 if any */
	uint32_t memory_alignment;   /* of buffers that need no bounce, bytes; 1 if any */
	uint32_t max_iov;            /* list entries of one request (larger ones are split) */
	uint32_t logical_block_size; /* of the device below, bytes; 512 if unknown */
	uint32_t physical_block_size;
	uint32_t optimal_io_size;     /* bytes, 0: unknown */
	uint32_t discard_granularity; /* bytes, 0: unknown or no discard */
	uint64_t max_discard;         /* bytes of one request, 0: no limit */
	uint64_t max_zero;
	bool can_discard, can_secure_erase;
	bool zero_is_fast; /* ZERO does not write the bytes */
	bool rotational;
	bool volatile_cache; /* flush matters (a memory store: false) */
};

enum ox_lock_mode {
	OX_LOCK_NONE,  /* `-U`, inactive disks, probing */
	OX_LOCK_READ,  /* shared: others may read, nobody may write */
	OX_LOCK_WRITE, /* as QEMU's read-write disk: others may not write or rely on consistency */
	OX_LOCK_SHARED_WRITE, /* writes, and lets others write (share-rw) */
};

struct ox_store_options {
	bool read_only;
	bool direct; /* O_DIRECT; open fails with a clear reason where impossible */
	enum ox_aio aio;
	enum ox_lock_mode lock;
	uint64_t lock_timeout_ns; /* how long to retry a lock that is held; 0: one try */
	/* The smallest unit that the user of the store will write (its logical block size), 1 if
	 * unknown.  Below request_alignment every write is tracked, so that a read-modify-write
	 * never races with a neighbour. */
	uint32_t write_granularity;
	struct ox_opener *opener; /* NULL: ox_opener_direct */
};

enum ox_block_status {
	OX_STATUS_DATA,           /* holds data, or may */
	OX_STATUS_ZERO,           /* a hole: reads as zero, no space taken */
	OX_STATUS_ZERO_ALLOCATED, /* preallocated: reads as zero, space taken */
};

/* A channel: the store as one loop uses it.  Implementations embed it first. */
struct ox_channel {
	struct ox_store *store;
	struct ox_loop *loop;
	unsigned in_flight; /* kept by the wrappers' implementations for asserts */
};

/* The table.  Control members are called without requests in flight on the range concerned,
 * outside the hit path, on a thread that may block; data members on the channel's thread, they
 * do not suspend (what must wait starts a fiber). */
struct ox_store_ops {
	const char *name;
	/* Required. `path` without the scheme. Frees what it took when it fails. May block (lock
	 * retries too: sleeps). */
	int (*open)(struct ox_store *store, const char *path, struct ox_error *err);
	/* Required. All channels are gone. Drops the lock. */
	void (*close)(struct ox_store *store);
	/* Required. Current size in bytes, asked anew (a device may have grown). May block. */
	int (*size)(struct ox_store *store, uint64_t *size);
	/* Required. Constant after open. Any thread. */
	void (*limits)(struct ox_store *store, struct ox_store_limits *limits);
	/* Required. */
	int (*attach)(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
	              struct ox_error *err);
	void (*detach)(struct ox_channel *channel);
	/* Required. Range, flags and iov were checked. */
	void (*read)(struct ox_channel *channel, struct ox_io *io);
	void (*write)(struct ox_channel *channel, struct ox_io *io);
	void (*flush)(struct ox_channel *channel, struct ox_io *io);
	/* Optional: without it the wrapper writes zeroes (unless NO_FALLBACK). */
	void (*zero)(struct ox_channel *channel, struct ox_io *io);
	/* Optional: without it a discard succeeds and does nothing; also SECURE_ERASE, which
	 * without it fails with -ENOTSUP. */
	void (*discard)(struct ox_channel *channel, struct ox_io *io);
	/* Required. Reads without a channel; the range lies within the size. Any thread, blocks. */
	int (*pread)(struct ox_store *store, uint64_t offset, void *buf, size_t bytes);
	/* Optional: without it everything is DATA. May block (SEEK_HOLE reads metadata).
	 * *length: in, how far to look; out, how far *status holds from offset (> 0). */
	int (*status)(struct ox_store *store, uint64_t offset, uint64_t *length,
	              enum ox_block_status *status);
	/* Optional. New size; with prealloc the added part gets space. `progress` may be NULL. */
	int (*truncate)(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
	                void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
	                struct ox_error *err);
	/* Optional. Takes or changes the lock. May block up to options.lock_timeout_ns. */
	int (*lock)(struct ox_store *store, enum ox_lock_mode mode, struct ox_error *err);
};

struct ox_store {
	const struct ox_store_ops *ops;
	char *path;                      /* as the user gave it, for messages */
	struct ox_store_options options; /* as given, with defaults filled in */
	uint64_t size; /* bytes, what the wrappers check against; grows by truncate/refresh */
	struct ox_store_limits limits;
	enum ox_aio aio; /* what was chosen */
	char aio_reason[128];
	uint64_t dev, ino; /* of a file or device node (rdev for devices); else 0 */
	bool flush_failed; /* atomic: see ox_store_flush() */
	unsigned channels;
	void *priv;
};

/* Opens "PATH", "file:PATH", "null:SIZE", "memory:SIZE", "memory:NAME:SIZE" (shared by name
 * within the process until ox_memory_forget()), "faulty:RULEFILE:PATH".  A name with an unknown
 * scheme is a path (as long as it exists); use "file:" or "./" for names with a colon.  May block.
 */
int ox_store_open(const char *name, const struct ox_store_options *options, struct ox_store **store,
                  struct ox_error *err) OX_MUST_CHECK;
/* NULL is allowed. May block. */
void ox_store_close(struct ox_store *store);

int ox_store_attach(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
                    struct ox_error *err) OX_MUST_CHECK;
void ox_store_detach(struct ox_channel *channel);

/* Data operations.  The caller set op, flags, offset, length, iov, iovcnt and done.  Errors come
 * by done(), also those of validation (-EINVAL misuse, -EROFS, -EIO out of range).
 * Unaligned offsets, lengths and buffers are legal: the store bounces them. */
void ox_store_submit(struct ox_channel *channel, struct ox_io *io);
/* Suspends; io->result. */
int ox_store_submit_co(struct ox_channel *channel, struct ox_io *io);
/* Shorthands that suspend; 0 or -errno. */
int ox_store_read_co(struct ox_channel *channel, uint64_t offset, void *buf, size_t bytes);
int ox_store_write_co(struct ox_channel *channel, uint64_t offset, const void *buf, size_t bytes,
                      unsigned flags);
int ox_store_flush_co(struct ox_channel *channel);

/* Reads without a loop: probing and tools.  Blocks. 0 or -errno; past the end reads as zero. */
int ox_store_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes);

/* Control wrappers; see the table. */
int ox_store_refresh_size(struct ox_store *store, uint64_t *size);
int ox_store_status(struct ox_store *store, uint64_t offset, uint64_t *length,
                    enum ox_block_status *status);
int ox_store_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                      void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                      struct ox_error *err) OX_MUST_CHECK;
int ox_store_lock(struct ox_store *store, enum ox_lock_mode mode, struct ox_error *err)
        OX_MUST_CHECK;

/* For implementations. */
static inline void ox_io_finish(struct ox_io *io, int result)
{
	io->channel->in_flight--;
	io->result = result;
	io->done(io);
}

extern const struct ox_store_ops ox_store_file;
extern const struct ox_store_ops ox_store_null;
extern const struct ox_store_ops ox_store_memory;
extern const struct ox_store_ops ox_store_faulty;

#endif
