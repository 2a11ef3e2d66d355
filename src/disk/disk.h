/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The virtual disk: what the guest believes in.
 *
 * States: INACTIVE (no lock, no descriptor, nothing cached but size and geometry) -> ACTIVE
 * (image open and locked, a queue on every loop) -> INACTIVE.  Activation belongs to the
 * exports: at their first ring's start, until their last ring's stop.
 */
#ifndef OX_DISK_DISK_H
#define OX_DISK_DISK_H

#include "base/histogram.h"
#include "image/image.h"

struct ox_disk;
struct ox_disk_queue;

#define OX_DISK_SERIAL 20

struct ox_disk_options {
	const char *name; /* for messages and query-block; default: the path's last part */
	const char *path;
	const char *format; /* NULL: guess */
	enum ox_cache cache;
	enum ox_aio aio;
	bool read_only;
	bool no_lock;                    /* -U, --force-share: with read_only only */
	bool share_rw;                   /* others may write too (clustered guests) */
	char serial[OX_DISK_SERIAL + 1]; /* default: derived from the name */
	uint32_t logical_block_size;     /* 0: auto; else 512 to 32768, a power of two */
	uint32_t physical_block_size;    /* 0: auto; >= logical */
	enum ox_discard discard;
	enum ox_detect_zeroes detect_zeroes;
	enum ox_on_error rerror, werror; /* defaults REPORT and ENOSPC: ox_disk_options_init() */
	/* The loops that will submit; the first one owns the image's mutable state.  `main` is
	 * where the control path's fibers run. */
	struct ox_loop *main;
	struct ox_loop **loops;
	unsigned loop_count;
	struct ox_opener *opener;
	uint64_t lock_timeout_ns; /* default 10 s */
	/* The image's chain; what these point to outlives the disk.  `allow_dirs`: where backing
	 * and data files may lie besides the image's own directory; NULL-terminated, may be NULL.
	 */
	const char *const *allow_dirs;
	uint64_t metadata_cache; /* bytes, 0: OX_METADATA_CACHE */
	bool discard_no_unref;   /* a discarded cluster keeps its place in the file */
	const struct ox_secrets *secrets;
	const char *key_secret; /* which of them is this image's; NULL: none */
};
void ox_disk_options_init(struct ox_disk_options *options);

/* Opens the image for a moment, without a lock, to learn format, size and geometry; the disk is
 * INACTIVE afterwards.  May block: before the loops run, or in a worker. */
int ox_disk_open(const struct ox_disk_options *options, struct ox_disk **disk, struct ox_error *err)
        OX_MUST_CHECK;
/* INACTIVE. */
void ox_disk_close(struct ox_disk *disk);

/* INACTIVE -> ACTIVE: opens and locks the image (retrying for lock_timeout_ns) and attaches
 * every loop.  Counted: a second user's activation is cheap.  main's thread. */
int ox_disk_activate_co(struct ox_disk *disk, struct ox_error *err) OX_MUST_CHECK;
/* The last user's: waits for what is in flight (held requests must have been given back),
 * flushes unless unsafe, closes and unlocks.  main's thread. */
void ox_disk_deactivate_co(struct ox_disk *disk);

/* One image of a disk's chain. */
struct ox_disk_layer {
	char *path;
	const char *format;
	uint64_t size;         /* bytes */
	uint64_t cluster_size; /* bytes; 1: the format has none */
	bool encrypted;
	char *backing_file, *backing_format; /* as the header says; NULL: none, not said */
};

struct ox_disk_info {
	const char *name, *path, *format, *serial;
	uint64_t size; /* bytes */
	uint32_t logical_block_size, physical_block_size, optimal_io_size;
	uint32_t discard_granularity; /* bytes */
	uint64_t max_discard, max_zero;
	enum ox_cache cache;
	enum ox_aio aio; /* chosen at the last activation or probe */
	const char *aio_reason;
	enum ox_detect_zeroes detect_zeroes;
	bool read_only, active;
	bool writeback; /* the guest's write cache is on */
	bool discard, write_zeroes, secure_erase, zero_unmaps;
	bool rotational;
	bool stopped;      /* requests are held */
	int stop_error;    /* errno of the first held one */
	uint8_t stop_op;   /* its enum ox_io_op */
	uint64_t dev, ino; /* of the file or device, for finding a server by its image */
	/* The image and its backing images, as last opened; valid until the caller suspends. */
	const struct ox_disk_layer *layers;
	unsigned layer_count;
};
/* main's thread. Strings live as long as the disk. */
void ox_disk_get_info(struct ox_disk *disk, struct ox_disk_info *info);

struct ox_disk_op_stats {
	uint64_t operations, bytes, failed, merged;
	struct ox_histogram latency;
};
enum { OX_DISK_STATS_OPS = OX_IO_SECURE_ERASE + 1 };
struct ox_disk_stats {
	struct ox_disk_op_stats op[OX_DISK_STATS_OPS]; /* by enum ox_io_op */
	uint64_t in_flight, held, invalid;
};
/* Sums over the queues. Any thread (relaxed). */
void ox_disk_get_stats(struct ox_disk *disk, struct ox_disk_stats *stats);

/* The queue of an ACTIVE disk on a loop; NULL if the loop is not one of the disk's. */
struct ox_disk_queue *ox_disk_get_queue(struct ox_disk *disk, struct ox_loop *loop);

/* The caller set op, flags (MAY_UNMAP for zeroes), offset, length, iov, iovcnt and done.
 * Offsets and lengths that are not multiples of the logical block size, or beyond the end, fail
 * with -EINVAL / -EIO; writes to a read-only disk with -EROFS.  Queue's thread. */
void ox_disk_submit(struct ox_disk_queue *queue, struct ox_request *request);

/* Takes a request back that is held by the error policy, in favour of the guest's reset or a
 * stopping ring: true if it was held (its done() will not be called), false if it is in flight.
 * Queue's thread. */
bool ox_disk_take_held(struct ox_disk_queue *queue, struct ox_request *request);

/* Retries what is held.  main's thread. */
void ox_disk_continue(struct ox_disk *disk);

/* Waits until every request submitted before has been completed or is held. main's thread. */
void ox_disk_drain_co(struct ox_disk *disk);

/* The guest's write-cache switch (CONFIG_WCE), or a guest that cannot flush: off means a write
 * is complete when durable.  Back to the cache mode's own by ox_disk_reset_writeback(). */
void ox_disk_set_writeback(struct ox_disk *disk, bool on);
void ox_disk_reset_writeback(struct ox_disk *disk);

/* Grows or shrinks while active (shrinking needs `shrink`); opens the image for the purpose when
 * inactive.  Listeners are told.  main's thread. */
int ox_disk_resize_co(struct ox_disk *disk, uint64_t size, bool shrink, struct ox_error *err)
        OX_MUST_CHECK;

enum ox_disk_event {
	OX_DISK_RESIZED,
	OX_DISK_STOPPED, /* a request is held: error policy */
	OX_DISK_CONTINUED,
	OX_DISK_IO_ERROR, /* a request failed (rate limited) */
};
struct ox_disk_listener {
	void (*fn)(struct ox_disk_listener *listener, enum ox_disk_event event);
	TAILQ_ENTRY(ox_disk_listener) link;
};
/* main's thread; fn is called there. */
void ox_disk_add_listener(struct ox_disk *disk, struct ox_disk_listener *listener);
void ox_disk_remove_listener(struct ox_disk *disk, struct ox_disk_listener *listener);

#endif
