/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the generic layer's files share; nobody else includes it.
 *
 *   open.c     opening and closing images and their chains, guessing, info
 *   chain.c    the files that a header names: which of them may be opened
 *   channel.c  channels, grace periods, fibers in the background, the first change
 *   run.c      shorthands, and fibers for threads without a loop
 *   image.c    submission: the hit path, and the slow path's fiber
 *   read.c     where bytes are, down the chain, and the slow path's reads
 *   write.c    the slow path's writes;  clear.c: zeroes and discards
 *   map.c      what a chain's map says, for people and tools
 *   create.c   new images;  resize.c: other sizes;  probe.c: whose bytes are these
 */
#ifndef OX_IMAGE_GENERIC_H
#define OX_IMAGE_GENERIC_H

#include "image/format.h"
#include "base/fiber.h"
#include <pthread.h>

/* Lets one fiber through at a time, in order of arrival; fibers of any thread. */
struct ox_image_gate_waiter {
	struct ox_post post;
	struct ox_loop *loop;
	struct ox_fiber *fiber;
	TAILQ_ENTRY(ox_image_gate_waiter) link;
};
struct ox_image_gate {
	pthread_mutex_t lock;
	bool busy;
	TAILQ_HEAD(, ox_image_gate_waiter) waiters;
};
void ox_image_gate_init(struct ox_image_gate *gate);
void ox_image_gate_destroy(struct ox_image_gate *gate);
void ox_image_gate_enter_co(struct ox_image_gate *gate);
void ox_image_gate_leave(struct ox_image_gate *gate);

struct ox_image_generic {
	struct ox_ranges ranges; /* of the guest's disk; whole clusters */
	struct ox_image_gate begin_gate, grace_gate;
	pthread_mutex_t lock; /* channels; held for a step along the list */
	TAILQ_HEAD(, ox_image_channel) channels;
	/* Raised whenever the map lets go of something: what was unpacked before may not be what
	 * the map means now (atomic). */
	uint64_t generation;
	/* DATA lies in a data file that was not opened: it cannot be read or written. */
	bool no_data;
	struct ox_store_ops closed; /* that file's */
	/* Copies that image->options points to. */
	char *format, *key_secret;
	char **dirs;
};

static inline uint64_t ox_image_size_now(const struct ox_image *image)
{
	return __atomic_load_n(&image->size, __ATOMIC_ACQUIRE);
}

/* The map that shows data in place is durable: so is a write there that is durable itself. */
static inline bool ox_image_map_is_durable(const struct ox_image *image)
{
	return !__atomic_load_n(&image->metadata_dirty, __ATOMIC_ACQUIRE) &&
	       !__atomic_load_n(&image->metadata_unsynced, __ATOMIC_ACQUIRE);
}

/* A list in memory, and room for a part of it with two entries more. */
struct ox_list {
	const struct iovec *iov;
	unsigned count;
	struct iovec *part; /* count + 2 entries; in use while a store request is under way */
};

/* channel.c */
struct ox_image_generic *ox_image_generic_new(void);
void ox_image_generic_free(struct ox_image_generic *generic);
/* ops->begin_co, unless it has been; 0: image->begun is true. */
int ox_image_begin_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* What completed before the call, data and map, becomes durable. */
int ox_image_commit_co(struct ox_image_channel *channel) OX_MUST_CHECK;
void ox_image_wait_background_co(struct ox_image_channel *channel);

/* Counts something on a side of the channel's grace periods (channel->phase when it began), and
 * takes it off; ox_image_leave() may resume a fiber. */
static inline void ox_image_enter(struct ox_image_channel *channel, unsigned side)
{
	channel->in_flight[side]++;
}
void ox_image_leave(struct ox_image_channel *channel, unsigned side);

/* open.c: what the file takes on its file system, bytes; 0 for a device, or without a file. */
uint64_t ox_image_allocated_bytes(const struct ox_store *store);

/* chain.c: opens what the header names, as image->options.allow says.  Blocks. */
struct ox_image_link {
	const struct ox_image_link *above; /* who named it; NULL: the top */
	const struct ox_image *image;
	unsigned depth;
};
int ox_image_open_named(struct ox_image *image, const struct ox_image_link *above,
                        struct ox_error *err) OX_MUST_CHECK;
/* open.c */
int ox_image_open_link(const char *path, const struct ox_image_options *options,
                       const struct ox_image_link *above, struct ox_image **image,
                       struct ox_error *err) OX_MUST_CHECK;

/* run.c: runs fn_co in a fiber of a private loop that is gone afterwards.  Blocks. */
int ox_image_run_private(void (*fn_co)(struct ox_loop *loop, void *arg), void *arg,
                         struct ox_error *err) OX_MUST_CHECK;

/* read.c.  Offsets beyond an image's end read as zero. */
/* The image's own map, loaded if need be; extent->length is from 1 to `length`. */
int ox_image_extent_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                       struct ox_extent *extent) OX_MUST_CHECK;
/* The same down the chain: never BACKING.  *at: the channel of the image that said so; *depth (may
 * be NULL): how far down it is. */
int ox_image_find_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                     struct ox_image_channel **at, struct ox_extent *extent, unsigned *depth)
        OX_MUST_CHECK;
/* Reads [offset, offset + length) to the list's bytes from `at` on. */
int ox_image_read_list_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                          const struct ox_list *list, uint64_t at) OX_MUST_CHECK;
int ox_image_read_old_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes)
        OX_MUST_CHECK;
/* The offset that decides the IV of what is at these two. */
uint64_t ox_image_crypto_offset(const struct ox_image *image, uint64_t offset,
                                uint64_t store_offset);
/* An aligned buffer, or NULL. */
void *ox_image_buffer(size_t bytes);

/* write.c.  The image is begun.  Both leave durability to the caller: *commit is set if what was
 * done needs ox_image_commit_co() to be durable; `durable` writes that need no commit are durable
 * when this returns. */
int ox_image_write_list_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                           const struct ox_list *list, uint64_t at, bool durable, bool *commit)
        OX_MUST_CHECK;
int ox_image_write_zeroes_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                             bool durable, bool *commit) OX_MUST_CHECK;
void ox_image_lock_clusters_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                               struct ox_range *range);

/* clear.c: ZERO, DISCARD, SECURE_ERASE.  The image is begun. */
int ox_image_clear_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset,
                      uint64_t length, unsigned flags) OX_MUST_CHECK;

#endif
