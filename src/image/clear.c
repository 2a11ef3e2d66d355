/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Zeroes and discards.
 *
 * A format that can say "zero" or "nothing" in its map (zero_co, discard_co) is asked for what
 * covers whole units of it, in portions, so that a request for the whole disk keeps no lock for
 * long; the ragged ends are written as zeroes, or of a discard left alone.  For other formats what
 * is data in place is passed to the store.
 *
 * Nothing is passed to the store for data that is not in place: somebody else refers to it too.
 */
#include "image/generic.h"
#include "image/crypto.h"
#include <errno.h>

/* What is zeroed or discarded under one lock, bytes. */
#define PORTION (64ull << 20)

struct clear {
	struct ox_image_channel *channel;
	enum ox_io_op op;
	unsigned flags;
	bool commit; /* it takes one to be durable */
};

/* --- by extents --------------------------------------------------------------------------------
 */

static int pass_to_store_co(struct clear *clear, uint64_t store_offset, uint64_t length)
{
	struct ox_image_channel *channel = clear->channel;
	bool dirty = !ox_image_map_is_durable(channel->image);
	struct ox_io io = {.op = (uint8_t)clear->op,
	                   .flags = (uint8_t)clear->flags,
	                   .offset = store_offset,
	                   .length = length};

	if (channel->image->generic->no_data)
		return -EIO;
	if (dirty) {
		io.flags &= (uint8_t)~OX_IO_DSYNC;
		clear->commit = true;
	}
	return ox_store_submit_co(channel->data, &io);
}

/* *length: of what reads as zero from offset on, down the chain; 0: it does not. */
static int zero_length_co(struct ox_image_channel *channel, uint64_t offset, uint64_t *length)
{
	struct ox_image_channel *where;
	struct ox_extent extent;
	int rc = ox_image_find_co(channel, offset, *length, &where, &extent, NULL);

	if (rc < 0)
		return rc;
	*length = extent.kind == OX_EXTENT_ZERO ? extent.length : 0;
	return 0;
}

/* Writes zeroes unless there are some; what says so may not be durable yet. */
static int zero_extent_co(struct clear *clear, uint64_t offset, struct ox_extent *extent)
{
	uint64_t zero = extent->length;
	int rc = 0;

	if (extent->kind != OX_EXTENT_ZERO)
		rc = zero_length_co(clear->channel, offset, &zero);
	if (rc < 0)
		return rc;
	if (zero > 0) {
		extent->length = zero;
		clear->commit |= !ox_image_map_is_durable(clear->channel->image);
		return 0;
	}
	return ox_image_write_zeroes_co(clear->channel, offset, extent->length,
	                                clear->flags & OX_IO_DSYNC, &clear->commit);
}

static int clear_extents_co(struct clear *clear, uint64_t offset, uint64_t length)
{
	const struct ox_image *image = clear->channel->image;
	struct ox_extent extent;
	int rc;

	for (; length > 0; offset += extent.length, length -= extent.length) {
		rc = ox_image_extent_co(clear->channel, offset, length, &extent);
		if (rc < 0)
			return rc;
		if (extent.kind == OX_EXTENT_DATA && (extent.flags & OX_EXTENT_IN_PLACE) &&
		    !(image->crypto && clear->op != OX_IO_SECURE_ERASE))
			rc = pass_to_store_co(clear, extent.store_offset, extent.length);
		else if (clear->op == OX_IO_ZERO)
			rc = zero_extent_co(clear, offset, &extent);
		/* Else there is nothing to give back, or it cannot be: a discard is a hint. */
		if (rc < 0)
			return rc;
	}
	return 0;
}

/* --- by the map
 * ------------------------------------------------------------------------------------ */

/* One portion under its lock. */
static int clear_portion_co(struct clear *clear, uint64_t offset, uint64_t length)
{
	struct ox_image_channel *channel = clear->channel;
	struct ox_image *image = channel->image;
	struct ox_range range;
	int rc;

	ox_image_lock_clusters_co(channel, offset, length, &range);
	if (clear->op == OX_IO_ZERO)
		rc = image->ops->zero_co(channel, offset, length, clear->flags & OX_IO_MAY_UNMAP);
	else
		rc = image->ops->discard_co(channel, offset, length);
	__atomic_fetch_add(&image->generic->generation, 1, __ATOMIC_RELEASE);
	ox_range_release(&image->generic->ranges, &range);
	if (rc != -ENOTSUP) {
		clear->commit = true;
		return rc;
	}
	if (clear->op != OX_IO_ZERO)
		return 0;
	return clear->flags & OX_IO_NO_FALLBACK ? -ENOTSUP
	                                        : clear_extents_co(clear, offset, length);
}

static int clear_map_co(struct clear *clear, uint64_t offset, uint64_t length)
{
	const struct ox_image *image = clear->channel->image;
	uint64_t end = offset + length;
	uint64_t first = ox_min(ox_align_up(offset, image->zero_unit), end);
	uint64_t last =
	        end == ox_image_size_now(image) ? end : ox_align_down(end, image->zero_unit);
	bool edges = clear->op == OX_IO_ZERO;
	int rc = 0;

	last = ox_max(last, first);
	if (edges && offset < first)
		rc = clear_extents_co(clear, offset, first - offset);
	while (rc == 0 && first < last) {
		uint64_t next = ox_min(last, ox_align_down(first, PORTION) + PORTION);

		rc = clear_portion_co(clear, first, next - first);
		first = next;
	}
	if (rc == 0 && edges && last < end)
		rc = clear_extents_co(clear, last, end - last);
	return rc;
}

int ox_image_clear_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset,
                      uint64_t length, unsigned flags)
{
	const struct ox_format_ops *ops = channel->image->ops;
	struct clear clear = {.channel = channel, .op = op, .flags = flags};
	int rc;

	if (op == OX_IO_SECURE_ERASE && ops->zero_co)
		return -ENOTSUP;
	if ((op == OX_IO_ZERO && ops->zero_co) || (op == OX_IO_DISCARD && ops->discard_co))
		rc = clear_map_co(&clear, offset, length);
	else
		rc = clear_extents_co(&clear, offset, length);
	if (rc == 0 && clear.commit && ((flags & OX_IO_DSYNC) || channel->image->eager))
		rc = ox_image_commit_co(channel);
	return rc;
}
