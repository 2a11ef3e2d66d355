/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store's parts among themselves: regular files and block devices.
 *
 *   file.c           open, close, lock, size, channels, the table
 *   file_limits.c    what the file or device needs and can do
 *   file_rw.c        reads, writes, flushes
 *   file_zero.c      write-zeroes, discard, secure erase
 *   file_resize.c    truncate with preallocation; what is stored where
 */
#ifndef OX_STORE_FILE_H
#define OX_STORE_FILE_H

#include "store/bounce.h"
#include "store/internal.h"
#include "store/range.h"
#include <limits.h>

/* One transfer; the kernel moves at most 2 GiB less a page at a time. */
#define OX_FILE_MAX_TRANSFER (UINT64_C(1) << 30)

/* Ways to write zeroes or discard that turned out to be unavailable here. */
#define OX_FILE_NO_PUNCH      (1u << 0) /* FALLOC_FL_PUNCH_HOLE */
#define OX_FILE_NO_ZERO_RANGE (1u << 1) /* FALLOC_FL_ZERO_RANGE */
#define OX_FILE_NO_BLKZEROOUT (1u << 2)
#define OX_FILE_NO_ALLOCATE   (1u << 3) /* fallocate() of space */
#define OX_FILE_NO_DISCARD    (1u << 4) /* BLKDISCARD */
#define OX_FILE_NO_SECDISCARD (1u << 5) /* BLKSECDISCARD */

struct ox_file {
	struct ox_store *store;
	int fd; /* carries the I/O and the lock */
	/* The same file without O_DIRECT, for the last block of a file whose size is not a
	 * multiple of the alignment; -1 until there is need. */
	int tail_fd;
	bool block;   /* a block device */
	bool direct;  /* O_DIRECT */
	bool tracked; /* every write takes a range, see store_options.write_granularity */
	struct ox_store_limits limits;
	uint64_t align_mask;  /* request_alignment - 1 */
	uint64_t memory_mask; /* memory_alignment - 1 */
	uint64_t zero_align;  /* of ranges handed to fallocate and its like; a power of two */
	/* Atomic: writes from here on go through tail_fd; UINT64_MAX: none do. */
	uint64_t tail_start;
	unsigned lacks; /* atomic: OX_FILE_NO_* */
	enum ox_lock_mode locked;
	bool record; /* a failed flush was recorded on disk, or found there */
	struct ox_ranges ranges;
};

/* A range with its request, kept by the channel for the next one. */
struct ox_file_range {
	struct ox_range range;
	struct ox_io *io;
	struct ox_file_range *next;
};

struct ox_file_channel {
	struct ox_channel base;
	struct ox_file *file;
	struct ox_engine *engine;
	int index; /* the engine's for file->fd, or -1 */
	struct ox_bounce bounce;
	struct ox_file_range *spare_ranges;
};

static inline struct ox_file_channel *ox_file_channel(struct ox_channel *channel)
{
	return ox_container_of(channel, struct ox_file_channel, base);
}

/* file_limits.c: fills file->limits and what follows from them; the lock is held. */
int ox_file_find_limits(struct ox_file *file, struct ox_error *err) OX_MUST_CHECK;
/* Is every byte of the regular file backed by written space? */
bool ox_file_is_fully_allocated(int fd, uint64_t size);

/* file.c */
int ox_file_ask_size(const struct ox_file *file, uint64_t *size);
/* The size is now `size`: sets tail_start, opens tail_fd if there is need. */
int ox_file_set_tail(struct ox_file *file, uint64_t size);
/* A descriptor for the same file without O_DIRECT, or -errno. */
int ox_file_reopen_buffered(const struct ox_file *file);

/* file_rw.c */
void ox_file_read(struct ox_channel *channel, struct ox_io *io);
void ox_file_write(struct ox_channel *channel, struct ox_io *io);
void ox_file_flush(struct ox_channel *channel, struct ox_io *io);
int ox_file_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes);
/* fdatasync with its consequences.  Suspends. */
int ox_file_sync_co(struct ox_file_channel *channel);
/* What a failed transfer means for later flushes. */
void ox_file_note_sync_error(struct ox_file *file, int error);

/* file_zero.c */
void ox_file_zero(struct ox_channel *channel, struct ox_io *io);
void ox_file_discard(struct ox_channel *channel, struct ox_io *io);

/* file_resize.c */
int ox_file_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                     void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                     struct ox_error *err);
int ox_file_status(struct ox_store *store, uint64_t offset, uint64_t *length,
                   enum ox_block_status *status);

#endif
