/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Images: a format is a map.
 *
 * The generic layer (this header's functions) moves all the data: reads, copy-on-write fills,
 * zeroes, decompression, encryption, reads of backing images.  A format (format.h) only answers
 * where a guest's bytes are.  A request whose range one extent covers goes from ox_image_submit()
 * to the store without a lock, an allocation or a fiber (the hit path); everything else runs in a
 * fiber of the submitting thread.
 */
#ifndef OX_IMAGE_IMAGE_H
#define OX_IMAGE_IMAGE_H

#include "image/secret.h"
#include "store/store.h"

struct ox_image;
struct ox_image_channel;
struct ox_disk_queue;
struct ox_crypto;
struct ox_format_ops;

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

	/* The image's: who is told (the disk), which side of a grace period it is counted on, and
	 * the store request of the hit path. */
	void (*image_done)(struct ox_request *request);
	struct ox_image_channel *channel;
	uint8_t image_phase;
	struct ox_io io;
};

enum ox_extent_kind {
	OX_EXTENT_DATA,       /* stored at store_offset */
	OX_EXTENT_ZERO,       /* reads as zero, no data is stored */
	OX_EXTENT_BACKING,    /* not in this image: the backing image's bytes; zero without one and
	                       * past its end */
	OX_EXTENT_COMPRESSED, /* part of a compressed unit; format->decompress unpacks it */
};

/* DATA: may be overwritten where it is (it is this image's alone, and in force). */
#define OX_EXTENT_IN_PLACE (1u << 0)
/* ZERO or BACKING: space is reserved at store_offset all the same (for map and check). */
#define OX_EXTENT_RESERVED (1u << 1)

struct ox_extent {
	uint8_t kind; /* enum ox_extent_kind */
	uint8_t flags;
	uint32_t store_bytes;  /* COMPRESSED: at most this many bytes of the store are the unit */
	uint64_t length;       /* bytes from the offset asked for, > 0 */
	uint64_t store_offset; /* DATA (of the offset asked for), RESERVED, COMPRESSED (of the unit)
	                        */
	uint64_t unit_offset;  /* COMPRESSED: the guest's offset of the unit's first byte */
	uint32_t unit_bytes;   /* COMPRESSED: unpacked */
};

struct json_t;

/* What an image is.  Owned by the caller: ox_image_info_free(). */
struct ox_image_info {
	const char *format;
	uint64_t virtual_size; /* bytes */
	uint64_t actual_size;  /* bytes allocated on the host (st_blocks) */
	uint32_t cluster_size; /* 0: the format has none */
	bool dirty, encrypted;
	char *backing_file;      /* as the header says it; NULL: none */
	char *full_backing_file; /* resolved against the image's directory */
	char *backing_format;    /* NULL: not said */
	/* "snapshots" (array) and "format-specific" ({"type":..., "data":{...}}) as qemu-img info
	 * --output=json prints them; NULL: nothing to say. */
	struct json_t *snapshots, *format_specific;
};

/* One piece of a chain's map, as qemu-img map shows it. */
struct ox_map_entry {
	uint64_t offset, length; /* guest's, bytes */
	unsigned depth;          /* 0: the image itself, 1: its backing image, ... */
	bool present;            /* some image of the chain says what is here */
	bool zero, data, compressed;
	bool has_offset;
	uint64_t store_offset;
	const char *file; /* that store_offset is in; lives as long as the image */
};

struct ox_image_check {
	/* What to do. */
	bool fix_leaks, fix_errors; /* -r leaks: the first; -r all: both */
	void (*progress)(void *arg, uint64_t done, uint64_t total);
	void (*say)(void *arg, const char *line); /* one finding, as qemu-img check words it */
	void *arg;
	/* What was found (after the repair: what is left). */
	uint64_t corruptions, leaks;
	uint64_t corruptions_fixed, leaks_fixed;
	uint64_t check_errors; /* could not be checked */
	uint64_t image_end_offset;
	uint64_t total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters;
};

/* NAME=VALUE, from -o. */
struct ox_create_option {
	char *name, *value;
};

struct ox_image_create_options {
	const char *path;
	const char *format;
	uint64_t size; /* bytes */
	bool has_size; /* else the backing image's is taken */
	const char *backing_file,
	        *backing_format;          /* NULL: none; as they shall stand in the header */
	bool unsafe_backing;              /* -u: the backing file need not be there */
	struct ox_create_option *options; /* what the user gave with -o, but the above */
	unsigned option_count;
	const struct ox_secrets *secrets;
	struct ox_opener *opener;
	bool keep_content; /* a device or a file that keeps its size: nothing is truncated */
	/* Called from time to time while preallocating; may be NULL. */
	void (*progress)(void *arg, uint64_t done, uint64_t total);
	void *progress_arg;
	/* Filled by ox_image_create_resolve(): all options of the format with their values, in the
	 * order in which qemu-img prints them after "fmt=". */
	struct ox_create_option *resolved;
	unsigned resolved_count;
};

/* What files a header may name are opened. */
struct ox_allow {
	bool nothing;  /* backing and data files stay closed: info, probing */
	bool anything; /* the user said so */
	const char *const
	        *dirs; /* directories besides the image's own; NULL-terminated, may be NULL */
};

struct ox_image_options {
	const char *format; /* NULL: guess by the first bytes */
	struct ox_store_options store;
	struct ox_allow allow;
	/* bytes of metadata kept in memory; 0: OX_METADATA_CACHE */
	uint64_t metadata_cache;
	/* A discarded cluster keeps its place in the file (qcow2's discard-no-unref). */
	bool discard_no_unref;
	/* Where keys come from; key_secret names the one of this image and, unless they have their
	 * own, its backing images.  Without a secret an encrypted image opens for info only
	 * (allow.nothing), else it is refused. */
	const struct ox_secrets *secrets;
	const char *key_secret;
	/* Damage that would make open fail or turn the image read-only is left to the caller: check
	 * and info. */
	bool for_check;
};
#define OX_METADATA_CACHE (32u << 20)

/* How many images a chain may have. */
#define OX_CHAIN_MAX 200u

struct ox_image {
	const struct ox_format_ops *ops;
	struct ox_store *store;   /* metadata and, without a data file, data */
	struct ox_store *data;    /* what DATA extents' store_offset is an offset of; = store, or an
	                           * external data file */
	struct ox_image *backing; /* NULL: none, or not opened (allow.nothing) */
	struct ox_image_options options;
	uint64_t size; /* virtual, bytes (atomic: a resize changes it under the I/O threads) */
	bool read_only;
	/* Writes may take the hit path: nothing has to be done to the header first.  False until
	 * ops->begin_co succeeded (atomic). */
	bool begun;
	/* Metadata in memory differs from the store's: a flush needs ops->commit_co, and a durable
	 * write must not take the hit path (atomic; the format's). */
	bool metadata_dirty;
	/* A killed process leaves nothing but the file: whatever relies on metadata that is still
	 * dirty is committed before its request ends, durable or not (the format's; constant from
	 * begin on). */
	bool eager;
	/* Metadata is in the file, and a flush of the store is all that makes it durable: a durable
	 * write must not take the hit path either (atomic; the format's). */
	bool metadata_unsynced;
	uint64_t flushes; /* asked for so far (atomic, relaxed) */
	/* The format raw was guessed: a guest must not be able to turn the image into another
	 * format by writing its first sector (CVE-2007-1320's class). */
	bool guard_first_sector;
	bool guard_said; /* the refusal was logged (atomic) */

	/* Set by ops->open_co, freed by the generic layer. */
	char *backing_file, *backing_format; /* as the header says; NULL: none */
	char *data_file;                     /* as the header says; NULL: none */
	bool data_file_raw;
	/* Bytes: what is allocated as one (range locks cover whole ones), and the alignment and
	 * multiple of what zero_co, discard_co and allocate take.  Powers of two; 1 for raw. */
	uint64_t cluster_size, zero_unit;
	struct ox_crypto *crypto; /* data is encrypted; NULL: not */
	bool crypto_guest_offset; /* the IV counts the guest's sectors, else the store's */
	uint64_t crypto_bias;     /* bytes to subtract from the store's offset for the IV */

	struct ox_image_generic *generic; /* the generic layer's: channels, range locks */
	void *priv;                       /* the format's */
};

/* May block; not on a thread whose loop runs.  Opens the chain as options.allow says.  An image
 * that a format knows but Oxbow has no driver for is refused with its name, unless `format` was
 * given. */
int ox_image_open(const char *path, const struct ox_image_options *options, struct ox_image **image,
                  struct ox_error *err) OX_MUST_CHECK;
/* NULL is allowed.  All channels are gone; ox_image_finish_co() came before, if anything was
 * written.  May block. */
void ox_image_close(struct ox_image *image);

/* For tools: opens, runs fn_co in a fiber of a private loop with a channel, finishes (unless
 * read-only) and closes.  Blocks; not on a thread whose loop runs.  fn_co's value, or what failed
 * before or after. */
int ox_image_with(const char *path, const struct ox_image_options *options,
                  int (*fn_co)(struct ox_image_channel *channel, void *arg, struct ox_error *err),
                  void *arg, struct ox_error *err) OX_MUST_CHECK;

int ox_image_get_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err)
        OX_MUST_CHECK;
void ox_image_info_free(struct ox_image_info *info);
/* The path that a name in the header of the image at `path` means. malloc'd. */
char *ox_image_resolve_name(const char *path, const char *name);

/* The path of a file that the header of the image at image_path names, if it may be opened;
 * otherwise an error that says what to do.  May block. */
int ox_image_allowed_name(const struct ox_allow *allow, const char *image_path, const char *name,
                          char **path, struct ox_error *err) OX_MUST_CHECK;

/* Suspends.  No requests beyond a smaller size are in flight. `size`: a multiple of 512. */
int ox_image_resize_co(struct ox_image_channel *channel, uint64_t size,
                       enum ox_preallocation prealloc, struct ox_error *err) OX_MUST_CHECK;
/* One entry from `offset`, at most `length` bytes long; goes down the chain.  Suspends. */
int ox_image_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                    struct ox_map_entry *entry) OX_MUST_CHECK;
/* 0: the check ran; findings are in *check.  Suspends. */
int ox_image_check_co(struct ox_image_channel *channel, struct ox_image_check *check,
                      struct ox_error *err) OX_MUST_CHECK;

/* Checks the options and fills `resolved`; ox_image_create() calls it if nobody has. */
int ox_image_create_resolve(struct ox_image_create_options *options, struct ox_error *err)
        OX_MUST_CHECK;
/* May block; not on a thread whose loop runs. */
int ox_image_create(struct ox_image_create_options *options, struct ox_error *err) OX_MUST_CHECK;
void ox_image_create_options_free(struct ox_image_create_options *options); /* `resolved` */

/* The name of the format that these first bytes belong to ("qcow2", "qed", "vmdk", "luks", ...;
 * "raw" if none): also for formats without a driver, because guarding needs their magics. */
const char *ox_image_guess_format(const void *head, size_t bytes, const char *path);
/* Would a first sector with this content be taken for another format than raw? */
bool ox_image_first_sector_is_dangerous(const void *sector, size_t bytes);
const struct ox_format_ops *ox_format_find(const char *name);
/* "raw qcow2 ..." for messages; the array ends with NULL. */
const char *const *ox_format_names(void);

/* "raw", "qcow2", ... */
const char *ox_image_format_name(const struct ox_image *image);
/* What a disk on this image can do: the store's limits, as the format changes them. */
void ox_image_get_limits(const struct ox_image *image, struct ox_store_limits *limits);

int ox_image_attach(struct ox_image *image, struct ox_loop *loop, struct ox_image_channel **channel,
                    struct ox_error *err) OX_MUST_CHECK;
struct ox_image *ox_image_of(const struct ox_image_channel *channel);
/* No requests are in flight.  Suspends until the format's work in the background has ended;
 * channel's loop. */
void ox_image_detach_co(struct ox_image_channel *channel);

/* The caller set op, flags, offset, length, iov, iovcnt and image_done. */
void ox_image_submit(struct ox_image_channel *channel, struct ox_request *request);
/* Shorthands that suspend; 0 or -errno.  flags: OX_IO_*. */
int ox_image_read_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes);
int ox_image_write_co(struct ox_image_channel *channel, uint64_t offset, const void *buf,
                      size_t bytes, unsigned flags);
int ox_image_request_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset,
                        uint64_t length, unsigned flags);

/* Leaves the image clean: metadata written, reservations returned, marks cleared, durable.  No
 * requests are in flight on any channel.  May be called without anything to do. */
int ox_image_finish_co(struct ox_image_channel *channel);

#endif
