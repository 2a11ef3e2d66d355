/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the map of a chain says, as qemu-img map shows it.
 *
 * An entry belongs to the first image from the top that says something about it; what no image
 * knows is not present and reads as zero, and counts to the last image that was asked: behind the
 * end of a shorter backing image that is the one above it.
 */
#include "image/generic.h"
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

struct status_call {
	const struct ox_image *image;
	uint64_t offset, length; /* in: what to look at; out: how far the answer goes */
	enum ox_block_status status;
	bool sparse; /* in: only if the file has far fewer blocks than bytes */
};

/* Most of the file was never written: with metadata preallocated, clusters are in the map that hold
 * nothing.  The bounds are QEMU's. */
static bool is_sparse(const struct ox_image *image)
{
	const struct ox_store *store = image->store;
	uint64_t blocks = ox_image_allocated_bytes(store) / image->cluster_size;
	uint64_t bytes = __atomic_load_n(&store->size, __ATOMIC_RELAXED);
	uint64_t clusters = ox_align_up(bytes, image->cluster_size) / image->cluster_size;

	return clusters >= ox_max(blocks * 10 / 9, blocks + 2);
}

static int status_in_worker(void *arg)
{
	struct status_call *call = arg;

	call->status = OX_STATUS_DATA;
	if (call->sparse && (call->image->data != call->image->store || !is_sparse(call->image)))
		return 0;
	return ox_store_status(call->image->data, call->offset, &call->length, &call->status);
}

/* What the file system knows of stored data. */
static int refine_co(struct ox_image *image, const struct ox_extent *extent,
                     struct ox_map_entry *entry)
{
	bool raw = image->ops == &ox_format_raw;
	struct status_call call = {.image = image,
	                           .offset = extent->store_offset,
	                           .length = entry->length,
	                           .sparse = !raw};
	int rc;

	/* Behind the file's end it reads as zero. */
	if (extent->store_offset >= __atomic_load_n(&image->data->size, __ATOMIC_RELAXED)) {
		entry->zero = true;
		return 0;
	}
	rc = ox_worker_call_co(status_in_worker, &call);
	if (rc < 0)
		return rc;
	if (call.length > 0)
		entry->length = ox_min(entry->length, call.length);
	if (call.status != OX_STATUS_DATA) {
		entry->zero = true;
		entry->data = !raw || call.status == OX_STATUS_ZERO_ALLOCATED;
	}
	return 0;
}

static int describe_co(struct ox_image *image, const struct ox_extent *extent,
                       struct ox_map_entry *entry)
{
	bool reserved = extent->flags & OX_EXTENT_RESERVED;

	entry->present = extent->kind != OX_EXTENT_BACKING;
	entry->compressed = extent->kind == OX_EXTENT_COMPRESSED;
	entry->data = extent->kind == OX_EXTENT_DATA || entry->compressed;
	entry->zero = !entry->data;
	/* Ciphertext at an offset is of no use to anybody who reads a map. */
	if (!image->crypto &&
	    (extent->kind == OX_EXTENT_DATA || (reserved && !entry->compressed))) {
		entry->has_offset = true;
		entry->store_offset = extent->store_offset;
		entry->file = image->data->path;
	}
	if (extent->kind == OX_EXTENT_DATA && !image->crypto && !image->generic->no_data)
		return refine_co(image, extent, entry);
	return 0;
}

static int map_chain_co(struct ox_image_channel *channel, struct ox_map_entry *entry)
{
	for (;; entry->depth++, channel = channel->backing) {
		struct ox_extent extent;
		uint64_t size;
		int rc = ox_image_extent_co(channel, entry->offset, entry->length, &extent);

		if (rc < 0)
			return rc;
		entry->length = extent.length;
		if (extent.kind != OX_EXTENT_BACKING)
			return describe_co(channel->image, &extent, entry);
		if (!channel->backing)
			return channel->image->backing_file
			               ? -EIO /* named and not opened */
			               : describe_co(channel->image, &extent, entry);
		size = ox_image_size_now(channel->backing->image);
		if (entry->offset >= size)
			return describe_co(channel->image, &extent, entry);
		entry->length = ox_min(entry->length, size - entry->offset);
	}
}

int ox_image_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                    struct ox_map_entry *entry)
{
	uint64_t size = ox_image_size_now(channel->image);
	unsigned side = channel->phase;
	int rc;

	if (offset >= size || length == 0)
		return -EINVAL;
	*entry = (struct ox_map_entry){.offset = offset, .length = ox_min(length, size - offset)};
	/* Counted like a request: a grace period waits for the look at the map. */
	ox_image_enter(channel, side);
	rc = map_chain_co(channel, entry);
	ox_image_leave(channel, side);
	return rc;
}
