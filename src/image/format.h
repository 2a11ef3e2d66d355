/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What a format implements: where bytes are.  For the drivers and the generic layer only.
 *
 * Threads: a channel's functions run on its loop's thread.  `lookup` and `allocate` never
 * suspend; functions that end in _co run in a fiber and may.  A format's own mutable state is
 * shared by all threads: it is under the format's mutex, which is held for work in memory only
 * and never across a suspension; what lookup reads is read with atomics.
 */
#ifndef OX_IMAGE_FORMAT_H
#define OX_IMAGE_FORMAT_H

#include "image/image.h"
#include "store/range.h"

struct ox_image_channel {
	struct ox_image *image;
	struct ox_loop *loop;
	struct ox_channel *store;         /* of image->store */
	struct ox_channel *data;          /* of image->data; = store without a data file */
	struct ox_image_channel *backing; /* NULL: none */
	void *priv;                       /* the format's: ops->attach */

	/* The generic layer's.  Requests are counted on side `phase`; a grace period turns it over
	 * and waits until the other side is empty. */
	uint64_t in_flight[2];
	unsigned phase;
	struct ox_fiber *grace_waiter;
	unsigned background; /* fibers of ox_image_background() */
	struct ox_fiber *background_waiter;
	void *unpacked; /* the last decompressed unit (private to the generic layer) */
	TAILQ_ENTRY(ox_image_channel) link;
};

/* New space for a write, between prepare_co and publish_co or abort_co. */
struct ox_allocation {
	/* In: what is to be written.  Out: what the new space covers: it begins at or before the
	 * write's first byte (aligned to the format's unit) and ends at or behind its last byte, or
	 * earlier (the rest of the write is another allocation).  The generic layer fills what the
	 * write does not cover with the old content before it publishes. */
	uint64_t offset, length;
	uint64_t store_offset; /* of `offset` */
	/* The new space reads as zero, now and after a power cut: old content that is zero need
	 * not be written. */
	bool zeroed;
	uint64_t priv[4]; /* the format's */
};

struct ox_format_maintenance;

struct ox_format_ops {
	const char *name;
	/* Required.  Pure: how sure is the format, 0 (not mine) to 100, that an image beginning
	 * with these bytes (`bytes` of at least 512 unless the file is shorter) is its own? raw
	 * says 1. */
	int (*probe)(const void *head, size_t bytes, const char *path);
	/* Required.  image->store is open; channel->data, channel->backing and channel->priv are
	 * not there yet.  Fills image->size, cluster_size, zero_unit, backing_file, data_file,
	 * crypto and priv.  Writes nothing unless the store is locked for writing and the image
	 * must be repaired before use. */
	int (*open_co)(struct ox_image_channel *channel, const struct ox_image_options *options,
	               struct ox_error *err);
	/* Required.  Frees image->priv (which may be NULL after a failed open_co).  May block. */
	void (*close)(struct ox_image *image);
	/* Optional.  A channel's own state: channel->priv.  Do not suspend. */
	int (*attach)(struct ox_image_channel *channel, struct ox_error *err);
	void (*detach)(struct ox_image_channel *channel);

	/* Required.  Any thread with a channel; never suspends, takes no lock, allocates nothing.
	 * 0 and *extent (contiguous and of one kind, as long as is cheaply known, at most
	 * `length`), -EAGAIN: not in memory, ask map_co; -EIO: damaged (map_co is asked too, if
	 * there is one).  DATA behind the store's end reads as zero and cannot be written: begin_co
	 * lets the store be long enough. */
	int (*lookup)(struct ox_image *image, uint64_t offset, uint64_t length,
	              struct ox_extent *extent);
	/* Optional: lookup never answers -EAGAIN.  The same, and loads what is missing. */
	int (*map_co)(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
	              struct ox_extent *extent);

	/* Optional: as if begun at once.  Called once before the first change, by one fiber; after
	 * success image->begun is set.  Does to the header what must be durable before. */
	int (*begin_co)(struct ox_image_channel *channel);
	/* Optional.  Never suspends.  Makes what it can of [offset, length) DATA in place at once,
	 * visible to everybody, where the old content is zero and the new space reads as zero, now
	 * and after a power cut.  0: some of it, from offset on, is DATA now: look again; -EAGAIN:
	 * ask prepare_co. */
	int (*allocate)(struct ox_image_channel *channel, uint64_t offset, uint64_t length);
	/* Optional: without it what is not DATA in place cannot be written.  Under an exclusive
	 * range lock of whole clusters around the write.  0: *a is filled; -EAGAIN: the map has
	 * changed, look again; else it failed. */
	int (*prepare_co)(struct ox_image_channel *channel, struct ox_allocation *a);
	/* The space holds what it shall (its writes completed; they need not be durable): from now
	 * on it is the map's.  Frees what was mapped there before.  The store never shows the new
	 * map without the data (ops orders its own writes so).  -EAGAIN: the map has changed since
	 * prepare_co (ops->allocate does not wait for the range lock).  Whatever it answers but 0,
	 * abort is called; after -EAGAIN the write looks again. */
	int (*publish_co)(struct ox_image_channel *channel, struct ox_allocation *a);
	void (*abort)(struct ox_image_channel *channel, struct ox_allocation *a);

	/* Optional, under the exclusive range lock; offset and length are multiples of zero_unit
	 * (or end at the disk's end).  The range reads as zero; `unmap`: its space may go.
	 * -ENOTSUP: the generic layer writes zeroes. Without it, what is DATA is passed to the
	 * store's own zero and discard. */
	int (*zero_co)(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
	               bool unmap);
	/* Optional, as zero_co; the content is undefined afterwards (but never another's). */
	int (*discard_co)(struct ox_image_channel *channel, uint64_t offset, uint64_t length);

	/* Optional.  Everything that completed before the call, data and map, is durable when this
	 * answers 0.  Any channel. */
	int (*commit_co)(struct ox_image_channel *channel);
	/* Optional.  ox_image_finish_co()'s part: for images that are not read-only, also if
	 * nothing was begun. */
	int (*finish_co)(struct ox_image_channel *channel);

	/* Required for COMPRESSED.  Pure.  `in`: the store's bytes; unpacks exactly `out_bytes`.
	 * 0 or -EIO. */
	int (*decompress)(struct ox_image *image, const void *in, size_t in_bytes, void *out,
	                  size_t out_bytes);
	const struct ox_format_maintenance *maintenance;
};

struct ox_create_word {
	const char *name, *help; /* for -o help, as qemu-img words it where it has the option */
	const char *type; /* as it stands there: "size", "num", "bool (on/off)"; NULL: "str" */
};

/* All optional. */
struct ox_format_maintenance {
	int (*info)(struct ox_image *image, struct ox_image_info *info, struct ox_error *err);
	int (*check_co)(struct ox_image_channel *channel, struct ox_image_check *check,
	                struct ox_error *err);
	int (*resize_co)(struct ox_image_channel *channel, uint64_t size,
	                 enum ox_preallocation prealloc, struct ox_error *err);
	/* The words of -o; ends with a NULL name. */
	const struct ox_create_word *create_words;
	/* Pure: refuses wrong options, fills options->resolved. */
	int (*create_resolve)(struct ox_image_create_options *options, struct ox_error *err);
	/* Makes a new image on an open, empty store (or a device, whose content means nothing). */
	int (*create_co)(struct ox_channel *store, const struct ox_image_create_options *options,
	                 struct ox_error *err);
};

extern const struct ox_format_ops ox_format_raw;
extern const struct ox_format_ops ox_format_qcow2;
extern const struct ox_format_ops ox_format_qed;
extern const struct ox_format_ops ox_format_luks;

/* --- what the generic layer does for formats ------------------------------------------------- */

/* Waits until every request that was in flight at the call, on any channel, has ended, and every
 * thread has left the lookups that it was in.  For fibers of ox_image_background() and for
 * finish_co; a request that waited for it would wait for itself. */
void ox_image_grace_co(struct ox_image_channel *channel);
/* Starts fn_co(channel, arg) in a fiber of this thread that detaching waits for. 0 or -ENOMEM. */
int ox_image_background(struct ox_image_channel *channel,
                        void (*fn_co)(struct ox_image_channel *channel, void *arg), void *arg)
        OX_MUST_CHECK;
/* ox_store_truncate() on a worker; suspends. */
int ox_store_truncate_co(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                         struct ox_error *err) OX_MUST_CHECK;

/* For resize_co, before the header says the new size and when image->size does: what a longer
 * backing image has in the new part would show through there.  It is covered with zeroes, durably.
 */
int ox_image_hide_backing_co(struct ox_image_channel *channel, uint64_t old, uint64_t size)
        OX_MUST_CHECK;

/* Options given with -o, for create_resolve: the value or NULL. */
const char *ox_create_option(const struct ox_image_create_options *options, const char *name);
/* From `resolved`, which has it. */
const char *ox_create_resolved(const struct ox_image_create_options *options, const char *name);
void ox_create_resolve_add(struct ox_image_create_options *options, const char *name,
                           const char *value);
/* Every option that was given is one of the words; else an error that names the nearest. */
int ox_create_check_words(const struct ox_image_create_options *options,
                          const struct ox_create_word *words, struct ox_error *err) OX_MUST_CHECK;

#endif
