/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Images: a format is a map.
 *
 * The generic layer (image.c) moves all the data; a format only answers where a guest's bytes
 * are.  A request whose range one extent covers goes from ox_image_submit() to the store without
 * a lock, an allocation or a fiber (the hit path); everything else runs in a fiber.
 */
#ifndef OX_IMAGE_IMAGE_H
#define OX_IMAGE_IMAGE_H

#include "store/store.h"

struct ox_image;
struct ox_image_channel;
struct ox_disk_queue;

/* A guest's request.  It goes down once (disk, image, store) and its completion comes up once;
 * each layer has its own members, and none allocates for it. */
struct ox_request {
	uint8_t op;    /* enum ox_io_op */
	uint8_t flags; /* OX_IO_* */
	uint32_t iovcnt;
	uint64_t offset;         /* bytes in the guest's disk */
	uint64_t length;         /* bytes */
	const struct iovec *iov; /* may point to guest memory: it can change at any time */
	int result;              /* 0 or -errno */
	/* The submitter's; called once, on the submitting thread, possibly before the submitting
	 * call returns. */
	void (*done)(struct ox_request *request);

	/* The disk's. */
	struct ox_disk_queue *queue;
	uint64_t start_ns;
	uint64_t disk_generation;    /* a flush: what it makes durable (disk_private.h) */
	uint8_t disk_op, disk_flags; /* as the guest sent them */
	uint8_t disk_phase;          /* which of a drain's two sides it is counted on */
	uint8_t disk_step;           /* the operation itself, or the flush behind it */
	bool held;
	TAILQ_ENTRY(ox_request) link;

	/* The image's: who is told (the disk), and the store request of the hit path. */
	void (*image_done)(struct ox_request *request);
	struct ox_image_channel *channel;
	struct ox_io io;
};

enum ox_extent_kind {
	OX_EXTENT_DATA, /* at store_offset, may be read and overwritten in place */
	OX_EXTENT_ZERO, /* reads as zero, nothing is stored */
};

struct ox_extent {
	enum ox_extent_kind kind;
	uint64_t length;       /* bytes from the offset asked for, > 0 */
	uint64_t store_offset; /* DATA */
};

struct ox_image_info {
	const char *format;
	uint64_t virtual_size; /* bytes */
	uint64_t actual_size;  /* bytes allocated on the host (st_blocks) */
	uint32_t cluster_size; /* 0: the format has none */
};

struct ox_image_create_options {
	const char *path;
	const char *format;
	uint64_t size; /* bytes */
	enum ox_preallocation preallocation;
	struct ox_opener *opener;
	/* Called from time to time while preallocating; may be NULL. */
	void (*progress)(void *arg, uint64_t done, uint64_t total);
	void *progress_arg;
};

/* The table of a format. */
struct ox_format_ops {
	const char *name;
	/* Required.  Pure: how sure is the format, 0 (not mine) to 100, that an image beginning
	 * with these bytes (`bytes` of at least 512 unless the file is shorter) is its own? raw
	 * says 1. */
	int (*probe)(const void *head, size_t bytes, const char *path);
	/* Required.  The store is open.  May block. */
	int (*open)(struct ox_image *image, struct ox_error *err);
	void (*close)(struct ox_image *image);
	/* Required.  Never suspends, takes no lock, allocates nothing.  0 and *extent, or -EAGAIN:
	 * not in memory, ask map.  Any I/O thread. */
	int (*lookup)(struct ox_image *image, uint64_t offset, uint64_t length,
	              struct ox_extent *extent);
	/* Optional: without it, what lookup calls ZERO cannot be written.  Makes a range of that
	 * kind data that reads as zero; the caller looks again.  May block; any thread. */
	int (*prepare)(struct ox_image *image, uint64_t offset, uint64_t length);
	/* Required.  What is stored, for map and convert: as ox_store_status().  May block. */
	int (*extents)(struct ox_image *image, uint64_t offset, uint64_t *length,
	               enum ox_block_status *status);
	/* Optional.  New virtual size.  May block. No requests beyond the smaller size are in
	 * flight. */
	int (*resize)(struct ox_image *image, uint64_t size, enum ox_preallocation prealloc,
	              struct ox_error *err);
	/* Optional.  Makes a new image on an open, empty store. */
	int (*create)(struct ox_store *store, const struct ox_image_create_options *options,
	              struct ox_error *err);
};

extern const struct ox_format_ops ox_format_raw;

struct ox_image_options {
	const char *format; /* NULL: guess by the first bytes */
	struct ox_store_options store;
};

struct ox_image {
	const struct ox_format_ops *ops;
	struct ox_store *store;
	uint64_t size; /* virtual, bytes (atomic: a resize changes it under the I/O threads) */
	bool read_only;
	/* The format raw was guessed: a guest must not be able to turn the image into another
	 * format by writing its first sector (CVE-2007-1320's class). */
	bool guard_first_sector;
	bool guard_said; /* the refusal was logged (atomic) */
	void *priv;
};

/* May block.  An image that a format knows but Oxbow has no driver for (qcow2, ...) is refused
 * with its name, unless `format` was given. */
int ox_image_open(const char *path, const struct ox_image_options *options, struct ox_image **image,
                  struct ox_error *err) OX_MUST_CHECK;
void ox_image_close(struct ox_image *image);
int ox_image_get_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err);
int ox_image_resize(struct ox_image *image, uint64_t size, enum ox_preallocation prealloc,
                    struct ox_error *err) OX_MUST_CHECK;
int ox_image_create(const struct ox_image_create_options *options, struct ox_error *err)
        OX_MUST_CHECK;

/* The name of the format that these first bytes belong to ("qcow2", "qed", "vmdk", "luks", ...;
 * "raw" if none): also for formats without a driver, because guarding needs their magics. */
const char *ox_image_guess_format(const void *head, size_t bytes, const char *path);
/* Would a first sector with this content be taken for another format than raw? */
bool ox_image_first_sector_is_dangerous(const void *sector, size_t bytes);
const struct ox_format_ops *ox_format_find(const char *name);
/* "raw qcow2 ..." for messages; the array ends with NULL. */
const char *const *ox_format_names(void);

int ox_image_attach(struct ox_image *image, struct ox_loop *loop, struct ox_image_channel **channel,
                    struct ox_error *err) OX_MUST_CHECK;
void ox_image_detach(struct ox_image_channel *channel);

/* The caller set op, flags, offset, length, iov, iovcnt and image_done. */
void ox_image_submit(struct ox_image_channel *channel, struct ox_request *request);

#endif
