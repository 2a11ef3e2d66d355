/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * raw: the disk's bytes are the file's bytes.
 *
 * The map is the identity, known without looking, so all I/O takes the hit path, and zeroes,
 * discards and flushes go straight to the store.
 *
 * Guests count in sectors of 512 bytes.  A file whose length is no multiple of that has a last
 * sector of which the store holds only a part: the rest is a ZERO extent, and the first write
 * there lets the file grow to the sector's end (QEMU does the same).
 *
 * Locking: `growing` keeps that growth and a resize apart, or one could undo the other.
 */
#include "image/image.h"
#include <errno.h>
#include <pthread.h>
#include <string.h>

#define RAW_SECTOR 512u

struct raw {
	pthread_mutex_t growing;
};

static uint64_t store_size(const struct ox_image *image)
{
	return __atomic_load_n(&image->store->size, __ATOMIC_RELAXED);
}

static int raw_probe(const void *head, size_t bytes, const char *path)
{
	/* Anything can be raw; nothing proves it. */
	return 1;
}

static int raw_open(struct ox_image *image, struct ox_error *err)
{
	uint64_t bytes = store_size(image);
	struct raw *raw;

	if (bytes > INT64_MAX - RAW_SECTOR)
		return ox_error_set(err, EFBIG, "%s: too large for a disk", image->store->path);
	__atomic_store_n(&image->size, ox_align_up(bytes, RAW_SECTOR), __ATOMIC_RELAXED);
	raw = ox_xcalloc(1, sizeof(*raw));
	pthread_mutex_init(&raw->growing, NULL);
	image->priv = raw;
	return 0;
}

static void raw_close(struct ox_image *image)
{
	struct raw *raw = image->priv;

	pthread_mutex_destroy(&raw->growing);
	free(raw);
}

static int raw_lookup(struct ox_image *image, uint64_t offset, uint64_t length,
                      struct ox_extent *extent)
{
	uint64_t bytes = store_size(image);

	extent->kind = OX_EXTENT_DATA;
	extent->length = length;
	extent->store_offset = offset;
	if (ox_unlikely(offset + length > bytes)) {
		if (offset < bytes)
			extent->length = bytes - offset;
		else
			extent->kind = OX_EXTENT_ZERO;
	}
	return 0;
}

/* Lets the file have its whole last sector. */
static int raw_prepare(struct ox_image *image, uint64_t offset, uint64_t length)
{
	struct raw *raw = image->priv;
	uint64_t bytes;
	int rc;

	pthread_mutex_lock(&raw->growing);
	rc = ox_store_refresh_size(image->store, &bytes);
	if (rc == 0 && bytes < offset + length)
		rc = ox_store_truncate(image->store, ox_align_up(offset + length, RAW_SECTOR),
		                       OX_PREALLOC_OFF, NULL, NULL, NULL);
	pthread_mutex_unlock(&raw->growing);
	return rc;
}

static int raw_extents(struct ox_image *image, uint64_t offset, uint64_t *length,
                       enum ox_block_status *status)
{
	uint64_t bytes = store_size(image);

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
	struct raw *raw = image->priv;
	uint64_t now;
	int rc;

	pthread_mutex_lock(&raw->growing);
	rc = ox_store_refresh_size(image->store, &now);
	if (rc < 0)
		ox_error_set(err, -rc, "%s: cannot ask for its size: %s", image->store->path,
		             strerror(-rc));
	else if (now != size)
		rc = ox_store_truncate(image->store, size, prealloc, NULL, NULL, err);
	pthread_mutex_unlock(&raw->growing);
	return rc;
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
        .prepare = raw_prepare,
        .extents = raw_extents,
        .resize = raw_resize,
        .create = raw_create,
};
