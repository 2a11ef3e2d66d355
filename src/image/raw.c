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
#include "image/format.h"
#include "base/text.h"
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

static int raw_open_co(struct ox_image_channel *channel, const struct ox_image_options *options,
                       struct ox_error *err)
{
	struct ox_image *image = channel->image;
	uint64_t bytes = store_size(image);
	struct raw *raw;

	if (bytes > INT64_MAX - RAW_SECTOR)
		return ox_error_set(err, EFBIG, "%s: too large for a disk", image->store->path);
	__atomic_store_n(&image->size, ox_align_up(bytes, RAW_SECTOR), __ATOMIC_RELAXED);
	image->cluster_size = image->zero_unit = 1;
	raw = ox_xcalloc(1, sizeof(*raw));
	pthread_mutex_init(&raw->growing, NULL);
	image->priv = raw;
	return 0;
}

static void raw_close(struct ox_image *image)
{
	struct raw *raw = image->priv;

	if (!raw)
		return;
	pthread_mutex_destroy(&raw->growing);
	free(raw);
}

static int raw_lookup(struct ox_image *image, uint64_t offset, uint64_t length,
                      struct ox_extent *extent)
{
	uint64_t bytes = store_size(image);

	extent->kind = OX_EXTENT_DATA;
	extent->flags = OX_EXTENT_IN_PLACE;
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

struct raw_call {
	struct ox_image *image;
	uint64_t end; /* prepare; resize: the new size */
	enum ox_preallocation prealloc;
	struct ox_error *err;
};

static int grow_in_worker(void *arg)
{
	struct raw_call *call = arg;
	struct raw *raw = call->image->priv;
	uint64_t bytes;
	int rc;

	pthread_mutex_lock(&raw->growing);
	rc = ox_store_refresh_size(call->image->store, &bytes);
	if (rc == 0 && bytes < call->end)
		rc = ox_store_truncate(call->image->store, ox_align_up(call->end, RAW_SECTOR),
		                       OX_PREALLOC_OFF, NULL, NULL, NULL);
	pthread_mutex_unlock(&raw->growing);
	return rc;
}

/* Lets the file have its whole last sector: then it is data in place. */
static int raw_prepare_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct raw_call call = {.image = channel->image, .end = a->offset + a->length};
	int rc = ox_worker_call_co(grow_in_worker, &call);

	return rc < 0 ? rc : -EAGAIN;
}

/* A device has the size it has: it was resized outside (an LV, a SAN's LUN) and is asked anew.
 * Only what it does not have yet is an error, and the store words it. */
static int resize_in_worker(void *arg)
{
	struct raw_call *call = arg;
	struct ox_image *image = call->image;
	struct raw *raw = image->priv;
	uint64_t now;
	int rc;

	pthread_mutex_lock(&raw->growing);
	rc = ox_store_refresh_size(image->store, &now);
	if (rc < 0)
		ox_error_set(call->err, -rc, "%s: cannot ask for its size: %s", image->store->path,
		             strerror(-rc));
	else if (now != call->end)
		rc = ox_store_truncate(image->store, call->end, call->prealloc, NULL, NULL,
		                       call->err);
	pthread_mutex_unlock(&raw->growing);
	return rc;
}

static int raw_resize_co(struct ox_image_channel *channel, uint64_t size,
                         enum ox_preallocation prealloc, struct ox_error *err)
{
	struct raw_call call = {
	        .image = channel->image, .end = size, .prealloc = prealloc, .err = err};

	return ox_worker_call_co(resize_in_worker, &call);
}

/* --- creation ---------------------------------------------------------------------------- */

static const struct ox_create_word raw_create_words[] = {
        {"preallocation", "Preallocation mode (allowed values: off, falloc, full)"},
        {"size", "Virtual disk size", "size"},
        {NULL, NULL},
};

static int parse_prealloc(const char *word, enum ox_preallocation *prealloc, struct ox_error *err)
{
	static const char *const words[] = {"off", "falloc", "full", NULL};
	const char *nearest;

	if (!word) {
		*prealloc = OX_PREALLOC_OFF;
		return 0;
	}
	if (ox_preallocation_parse(word, prealloc))
		return 0;
	nearest = ox_nearest_word(word, words);
	if (nearest)
		return ox_error_set(err, EINVAL, "preallocation cannot be '%s'; did you mean %s?",
		                    word, nearest);
	return ox_error_set(err, EINVAL, "preallocation is off, falloc or full, not '%s'", word);
}

static int raw_create_resolve(struct ox_image_create_options *options, struct ox_error *err)
{
	const char *word = ox_create_option(options, "preallocation");
	OX_FREE char *size = ox_xasprintf("%llu", (unsigned long long)options->size);
	enum ox_preallocation prealloc;
	int rc = parse_prealloc(word, &prealloc, err);

	if (rc < 0)
		return rc;
	if (options->backing_file)
		return ox_error_set(err, EINVAL,
		                    "%s: a raw image has no backing file; qcow2 and qed have",
		                    options->path);
	ox_create_resolve_add(options, "size", size);
	if (word)
		ox_create_resolve_add(options, "preallocation", word);
	return 0;
}

struct create_call {
	struct ox_store *store;
	const struct ox_image_create_options *options;
	struct ox_error *err;
};

static int create_in_worker(void *arg)
{
	struct create_call *call = arg;
	const struct ox_image_create_options *options = call->options;
	enum ox_preallocation prealloc;
	int rc = parse_prealloc(ox_create_option(options, "preallocation"), &prealloc, call->err);

	if (rc < 0)
		return rc;
	return ox_store_truncate(call->store, ox_align_up(options->size, RAW_SECTOR), prealloc,
	                         options->progress, options->progress_arg, call->err);
}

/* A device has its size, and what it holds stays. */
static int raw_create_co(struct ox_channel *channel, const struct ox_image_create_options *options,
                         struct ox_error *err)
{
	struct create_call call = {.store = channel->store, .options = options, .err = err};

	if (!options->keep_content)
		return ox_worker_call_co(create_in_worker, &call);
	if (options->size > channel->store->size)
		return ox_error_set(err, ENOSPC,
		                    "%s: the device has %llu bytes, %llu are asked for",
		                    options->path, (unsigned long long)channel->store->size,
		                    (unsigned long long)options->size);
	return 0;
}

static const struct ox_format_maintenance raw_maintenance = {
        .resize_co = raw_resize_co,
        .create_words = raw_create_words,
        .create_resolve = raw_create_resolve,
        .create_co = raw_create_co,
};

const struct ox_format_ops ox_format_raw = {
        .name = "raw",
        .probe = raw_probe,
        .open_co = raw_open_co,
        .close = raw_close,
        .lookup = raw_lookup,
        .prepare_co = raw_prepare_co,
        .maintenance = &raw_maintenance,
};
