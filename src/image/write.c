/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The slow path's writes.
 *
 * A write goes piece by piece.  What is DATA in place is written where it is; everything else gets
 * new space:
 *
 *     lock whole clusters ── look again ── prepare ── fill and write ── publish ── unlock
 *                                             └── abort, if the write fails ──┘
 *
 * Where the new space is larger than the write (a cluster, or a part of one), the rest is filled
 * with the old content: head and tail go down in the same store write as the guest's bytes.
 *
 * Why the old content stays the same while it is copied: it is in a backing image, which nobody
 * writes; or zero; or compressed, or data that is not in place, and neither is ever written where
 * it is.  What could replace it in the map (another write, a zero, a discard) waits for the lock,
 * and ops->allocate, which does not, only makes data of what is zero, and the format's prepare or
 * publish sees that (-EAGAIN).  A write in place never needs the lock, because what is in place is
 * never copied.
 *
 * Old data that was replaced is freed by publish; the format uses it again after a grace period, so
 * a read that is under way still finds it.
 */
#include "image/generic.h"
#include "base/iov.h"
#include "image/crypto.h"
#include <errno.h>
#include <string.h>

/* The longest write that is handed to prepare at once. */
#define PREPARE_MAX (2u << 20)
/* Encrypted at a time; a multiple of a sector. */
#define CRYPTO_PIECE (256u << 10)
/* Fills on both sides of a write up to this size are read as one, with what lies between. */
#define READ_THROUGH (64u << 10)
#define ZERO_PIECE   (64u << 10)
#define ZERO_ENTRIES 16u

/* --- writing where it is ------------------------------------------------------------------------
 */

static int write_plain_co(struct ox_image_channel *channel, uint64_t store_offset, uint64_t length,
                          const struct ox_list *list, uint64_t at, unsigned flags)
{
	struct ox_io io = {
	        .op = OX_IO_WRITE,
	        .flags = (uint8_t)flags,
	        .offset = store_offset,
	        .length = length,
	        .iov = list->part,
	        .iovcnt = ox_iov_slice(list->iov, list->count, at, length, list->part),
	};

	return ox_store_submit_co(channel->data, &io);
}

/* Reads the sector at `start` in clear, before a part of it is replaced. */
static int read_sector_co(struct ox_image_channel *channel, uint64_t offset, uint64_t start,
                          uint8_t *sector)
{
	struct ox_image *image = channel->image;
	int rc = ox_store_read_co(channel->data, start, sector, OX_CRYPTO_SECTOR);

	if (rc < 0)
		return rc;
	return ox_crypto_decrypt(image->crypto, ox_image_crypto_offset(image, offset, start),
	                         sector, sector, OX_CRYPTO_SECTOR);
}

/* One piece of whole sectors around [offset, offset + bytes). */
static int write_sectors_co(struct ox_image_channel *channel, uint64_t offset,
                            uint64_t store_offset, uint64_t bytes, const struct ox_list *list,
                            uint64_t at, uint8_t *buf, unsigned flags)
{
	struct ox_image *image = channel->image;
	uint64_t skip = store_offset & (OX_CRYPTO_SECTOR - 1);
	uint64_t whole = ox_align_up(skip + bytes, OX_CRYPTO_SECTOR);
	uint64_t last = whole - OX_CRYPTO_SECTOR;
	uint64_t first = offset - skip, start = store_offset - skip;
	int rc = 0;

	if (skip > 0)
		rc = read_sector_co(channel, first, start, buf);
	if (rc == 0 && skip + bytes < whole && (skip == 0 || last > 0))
		rc = read_sector_co(channel, first + last, start + last, buf + last);
	if (rc < 0)
		return rc;
	ox_iov_to_buf(list->iov, list->count, at, buf + skip, bytes);
	rc = ox_crypto_encrypt(image->crypto, ox_image_crypto_offset(image, first, start), buf, buf,
	                       whole);
	if (rc < 0)
		return rc;
	return ox_store_write_co(channel->data, start, buf, whole, flags);
}

/* From a copy: the guest's memory must not be changed.  Parts of a sector come only from tools,
 * which write one thing after the other; guests write whole ones. */
static int write_encrypted_co(struct ox_image_channel *channel, uint64_t offset,
                              uint64_t store_offset, uint64_t length, const struct ox_list *list,
                              uint64_t at, unsigned flags)
{
	OX_FREE uint8_t *buf = ox_image_buffer(
	        ox_min(length + 2 * OX_CRYPTO_SECTOR, (uint64_t)CRYPTO_PIECE + OX_CRYPTO_SECTOR));
	struct ox_range range = {.exclusive = true};
	bool aligned = ox_is_aligned(store_offset | length, OX_CRYPTO_SECTOR);
	int rc = 0;

	if (!buf)
		return -ENOMEM;
	if (!aligned)
		ox_image_lock_clusters_co(channel, offset, length, &range);
	while (length > 0 && rc == 0) {
		uint64_t piece = CRYPTO_PIECE - (store_offset & (OX_CRYPTO_SECTOR - 1));

		piece = ox_min(piece, length);
		rc = write_sectors_co(channel, offset, store_offset, piece, list, at, buf, flags);
		offset += piece;
		store_offset += piece;
		at += piece;
		length -= piece;
	}
	if (!aligned)
		ox_range_release(&channel->image->generic->ranges, &range);
	return rc;
}

static int write_data_co(struct ox_image_channel *channel, uint64_t offset, uint64_t store_offset,
                         uint64_t length, const struct ox_list *list, uint64_t at, unsigned flags)
{
	if (channel->image->generic->no_data)
		return -EIO;
	if (channel->image->crypto)
		return write_encrypted_co(channel, offset, store_offset, length, list, at, flags);
	return write_plain_co(channel, store_offset, length, list, at, flags);
}

/* Overwrites data in place.  A durable write is so at once if nothing of the map waits to be
 * written: otherwise the map that shows it may be lost, and a commit follows. */
static int overwrite_co(struct ox_image_channel *channel, uint64_t offset,
                        const struct ox_extent *extent, const struct ox_list *list, uint64_t at,
                        bool durable, bool *commit)
{
	bool dirty = !ox_image_map_is_durable(channel->image);

	if (dirty)
		*commit = true;
	return write_data_co(channel, offset, extent->store_offset, extent->length, list, at,
	                     durable && !dirty ? OX_IO_DSYNC : 0);
}

/* --- new space
 * ------------------------------------------------------------------------------------- */

void ox_image_lock_clusters_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                               struct ox_range *range)
{
	uint64_t cluster = channel->image->cluster_size;

	*range = (struct ox_range){.start = ox_align_down(offset, cluster),
	                           .end = ox_align_up(offset + length, cluster),
	                           .exclusive = true,
	                           .loop = channel->loop};
	ox_range_acquire_co(&channel->image->generic->ranges, range);
}

static bool is_in_place(const struct ox_extent *extent)
{
	return extent->kind == OX_EXTENT_DATA && (extent->flags & OX_EXTENT_IN_PLACE);
}

/* How far from `offset` nothing is in place, at most `length`; 0: it is data in place now. */
static int measure_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                      uint64_t *run)
{
	struct ox_extent extent;

	for (*run = 0; *run < length; *run += extent.length) {
		int rc = ox_image_extent_co(channel, offset + *run, length - *run, &extent);

		if (rc < 0)
			return rc;
		if (is_in_place(&extent))
			break;
	}
	return 0;
}

/* Moves *start up over what reads as zero, towards end. */
static int skip_zeroes_co(struct ox_image_channel *channel, uint64_t *start, uint64_t end)
{
	while (*start < end) {
		struct ox_image_channel *where;
		struct ox_extent extent;
		int rc = ox_image_find_co(channel, *start, end - *start, &where, &extent, NULL);

		if (rc < 0)
			return rc;
		if (extent.kind != OX_EXTENT_ZERO)
			break;
		*start += extent.length;
	}
	return 0;
}

/* Moves *end down to behind the last byte that does not read as zero. */
static int trim_zeroes_co(struct ox_image_channel *channel, uint64_t start, uint64_t *end)
{
	uint64_t last = start;

	while (start < *end) {
		struct ox_image_channel *where;
		struct ox_extent extent;
		int rc = ox_image_find_co(channel, start, *end - start, &where, &extent, NULL);

		if (rc < 0)
			return rc;
		start += extent.length;
		if (extent.kind != OX_EXTENT_ZERO)
			last = start;
	}
	*end = last;
	return 0;
}

/* A write in new space, with what is filled around it: [first, start) [start, end) [end, last). */
struct fill {
	uint64_t first, start, end, last;
	uint8_t *head, *tail; /* within buf[] */
	void *buf[2];
};

static int bound_fill_co(struct ox_image_channel *channel, const struct ox_allocation *a,
                         struct fill *fill)
{
	int rc;

	fill->first = a->offset;
	fill->last = a->offset + a->length;
	/* An external data file has nothing behind the disk's end. */
	if (channel->image->data != channel->image->store)
		fill->last =
		        ox_max(fill->end, ox_min(fill->last, ox_image_size_now(channel->image)));
	/* Zeroes that are there already need no writing; encrypted, they would not read as such. */
	if (!a->zeroed || channel->image->crypto)
		return 0;
	rc = skip_zeroes_co(channel, &fill->first, fill->start);
	return rc < 0 ? rc : trim_zeroes_co(channel, fill->end, &fill->last);
}

static int read_fill_co(struct ox_image_channel *channel, struct fill *fill)
{
	uint64_t head = fill->start - fill->first, tail = fill->last - fill->end;
	uint64_t between = fill->end - fill->start;
	int rc = 0;

	if (head > 0 && tail > 0 && between <= READ_THROUGH) {
		uint64_t span = fill->last - fill->first;

		fill->buf[0] = ox_image_buffer(span);
		if (!fill->buf[0])
			return -ENOMEM;
		fill->head = fill->buf[0];
		fill->tail = fill->head + head + between;
		return ox_image_read_old_co(channel, fill->first, fill->head, span);
	}
	if (head > 0) {
		fill->head = fill->buf[0] = ox_image_buffer(head);
		rc = fill->head ? ox_image_read_old_co(channel, fill->first, fill->head, head)
		                : -ENOMEM;
	}
	if (rc == 0 && tail > 0) {
		fill->tail = fill->buf[1] = ox_image_buffer(tail);
		rc = fill->tail ? ox_image_read_old_co(channel, fill->end, fill->tail, tail)
		                : -ENOMEM;
	}
	return rc;
}

/* Head, the guest's bytes and tail in one write. */
static int write_filled_co(struct ox_image_channel *channel, const struct ox_allocation *a,
                           const struct fill *fill, const struct ox_list *list, uint64_t at)
{
	uint64_t head = fill->start - fill->first, tail = fill->last - fill->end;
	uint64_t bytes = fill->end - fill->start;
	uint64_t store_offset = a->store_offset + (fill->first - a->offset);
	struct ox_list all = {.iov = list->part};
	OX_FREE struct iovec *room = NULL;

	if (head == 0 && tail == 0)
		return write_data_co(channel, fill->first, store_offset, bytes, list, at, 0);
	if (head > 0)
		list->part[all.count++] = (struct iovec){.iov_base = fill->head, .iov_len = head};
	all.count += ox_iov_slice(list->iov, list->count, at, bytes, list->part + all.count);
	if (tail > 0)
		list->part[all.count++] = (struct iovec){.iov_base = fill->tail, .iov_len = tail};
	all.part = room = calloc(all.count + 2, sizeof(*room));
	if (!room)
		return -ENOMEM;
	return write_data_co(channel, fill->first, store_offset, head + bytes + tail, &all, 0, 0);
}

/* Fills and writes what was prepared; *end: up to where the write got. */
static int fill_and_write_co(struct ox_image_channel *channel, const struct ox_allocation *a,
                             uint64_t offset, uint64_t length, const struct ox_list *list,
                             uint64_t at, uint64_t *end)
{
	struct fill fill = {.start = offset, .end = ox_min(offset + length, a->offset + a->length)};
	int rc;

	if (a->offset > offset || a->offset + a->length <= offset)
		return -EIO; /* the format did not keep its word */
	*end = fill.end;
	rc = bound_fill_co(channel, a, &fill);
	if (rc == 0)
		rc = read_fill_co(channel, &fill);
	if (rc == 0)
		rc = write_filled_co(channel, a, &fill, list, at);
	free(fill.buf[0]);
	free(fill.buf[1]);
	return rc;
}

/* Where a write that is too long for once is cut: between clusters, so that no cluster is filled
 * only to be written again. */
static uint64_t cut(const struct ox_image *image, uint64_t offset, uint64_t length)
{
	uint64_t end = ox_align_down(offset + PREPARE_MAX, image->cluster_size);

	return length > PREPARE_MAX && end > offset ? end - offset : length;
}

/* The lock is held.  *done: how much of the write is in the map now; 0: look again. */
static int allocate_locked_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                              const struct ox_list *list, uint64_t at, uint64_t *done)
{
	struct ox_image *image = channel->image;
	struct ox_allocation a = {.offset = offset};
	uint64_t end;
	int rc = measure_co(channel, offset, length, &a.length);

	if (rc < 0 || a.length == 0)
		return rc;
	length = a.length;
	rc = image->ops->prepare_co(channel, &a);
	if (rc < 0)
		return rc == -EAGAIN ? 0 : rc;
	rc = fill_and_write_co(channel, &a, offset, length, list, at, &end);
	if (rc == 0)
		rc = image->ops->publish_co(channel, &a);
	if (rc < 0) {
		image->ops->abort(channel, &a);
		return rc == -EAGAIN ? 0 : rc;
	}
	*done = end - offset;
	return 0;
}

static int allocate_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                       const struct ox_list *list, uint64_t at, uint64_t *done)
{
	struct ox_image_generic *generic = channel->image->generic;
	struct ox_range range;
	int rc;

	*done = 0;
	if (!channel->image->ops->prepare_co)
		return -ENOTSUP;
	length = cut(channel->image, offset, length);
	ox_image_lock_clusters_co(channel, offset, length, &range);
	rc = allocate_locked_co(channel, offset, length, list, at, done);
	if (*done > 0)
		__atomic_fetch_add(&generic->generation, 1, __ATOMIC_RELEASE);
	ox_range_release(&generic->ranges, &range);
	return rc;
}

/* --- the whole
 * --------------------------------------------------------------------------------------- */

/* Can the format make data of it at once?  Not where a sector that nobody wrote would be decrypted.
 */
static bool allocate_now(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	const struct ox_image *image = channel->image;

	return image->ops->allocate && !image->crypto &&
	       image->ops->allocate(channel, offset, length) == 0;
}

int ox_image_write_list_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                           const struct ox_list *list, uint64_t at, bool durable, bool *commit)
{
	bool tried = false; /* to allocate at once, here */

	while (length > 0) {
		struct ox_extent extent;
		uint64_t done = 0;
		int rc = ox_image_extent_co(channel, offset, length, &extent);

		if (rc < 0)
			return rc;
		if (is_in_place(&extent)) {
			rc = overwrite_co(channel, offset, &extent, list, at, durable, commit);
			done = extent.length;
		} else if (!tried && allocate_now(channel, offset, length)) {
			tried = *commit = true;
		} else {
			tried = false;
			*commit = true;
			rc = allocate_co(channel, offset, length, list, at, &done);
		}
		if (rc < 0)
			return rc;
		if (done > 0)
			tried = false;
		offset += done;
		at += done;
		length -= done;
	}
	return 0;
}

int ox_image_write_zeroes_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                             bool durable, bool *commit)
{
	/* Never written to: its pages stay the kernel's zero page. */
	static uint8_t zeroes[ZERO_PIECE] __attribute__((aligned(4096)));
	struct iovec iov[ZERO_ENTRIES], part[ZERO_ENTRIES + 2];
	struct ox_list list = {.iov = iov, .part = part};

	while (length > 0) {
		uint64_t bytes = 0;
		int rc;

		for (list.count = 0; list.count < ZERO_ENTRIES && bytes < length; list.count++) {
			uint64_t piece = ox_min(length - bytes, (uint64_t)ZERO_PIECE);

			iov[list.count] = (struct iovec){.iov_base = zeroes, .iov_len = piece};
			bytes += piece;
		}
		rc = ox_image_write_list_co(channel, offset, bytes, &list, 0, durable, commit);
		if (rc < 0)
			return rc;
		offset += bytes;
		length -= bytes;
	}
	return 0;
}
