/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * raw: the disk's bytes are the file's bytes.
 *
 * The map is the identity, known without looking: lookup answers one extent for every range, so
 * all I/O takes the hit path and zeroes, discards and flushes go straight to the store.
 *
 * Guests count in sectors of 512 bytes.  A file whose length is no multiple of that has a last
 * sector of which the store holds only a part: it reads as zero behind the file's end, and the
 * first write to it lets the file grow to the sector's end (QEMU does the same).
 */
#include "image/image.h"
#include <errno.h>
#include <string.h>

#define RAW_SECTOR 512u

static int raw_probe(const void *head, size_t bytes, const char *path)
{
	/* Anything can be raw; nothing proves it. */
	return 1;
}

static int raw_open(struct ox_image *image, struct ox_error *err)
{
	uint64_t bytes = image->store->size;

	if (bytes > INT64_MAX - RAW_SECTOR)
		return ox_error_set(err, EFBIG, "%s: too large for a disk", image->store->path);
	__atomic_store_n(&image->size, ox_align_up(bytes, RAW_SECTOR), __ATOMIC_RELAXED);
	return 0;
}

static void raw_close(struct ox_image *image)
{
}

static int raw_lookup(struct ox_image *image, uint64_t offset, uint64_t length,
                      struct ox_extent *extent)
{
	extent->kind = OX_EXTENT_DATA;
	extent->length = length;
	extent->store_offset = offset;
	return 0;
}

static int raw_extents(struct ox_image *image, uint64_t offset, uint64_t *length,
                       enum ox_block_status *status)
{
	uint64_t bytes = image->store->size;

	if (offset >= bytes) {
		/* The part of the last sector that the file does not have. */
		*status = OX_STATUS_ZERO;
		return 0;
	}
	*length = ox_min(*length, bytes - offset);
	return ox_store_status(image->store, offset, length, status);
}

/* A device has the size it has: it was resized outside (an LV, a SAN's LUN) and is asked anew.
 * Only what it does not have yet is an error, and the store words it. */
static int raw_resize(struct ox_image *image, uint64_t size, enum ox_preallocation prealloc,
                      struct ox_error *err)
{
	uint64_t now;
	int rc = ox_store_refresh_size(image->store, &now);

	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot ask for its size: %s", image->store->path,
		                    strerror(-rc));
	if (now == size)
		return 0;
	return ox_store_truncate(image->store, size, prealloc, NULL, NULL, err);
}

static int raw_create(struct ox_store *store, const struct ox_image_create_options *options,
                      struct ox_error *err)
{
	return ox_store_truncate(store, ox_align_up(options->size, RAW_SECTOR),
	                         options->preallocation, options->progress, options->progress_arg,
	                         err);
}

const struct ox_format_ops ox_format_raw = {
        .name = "raw",
        .probe = raw_probe,
        .open = raw_open,
        .close = raw_close,
        .lookup = raw_lookup,
        .extents = raw_extents,
        .resize = raw_resize,
        .create = raw_create,
};
