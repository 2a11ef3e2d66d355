/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Where bytes are, down the chain, and the slow path's reads.
 *
 * A read takes no lock.  It may see the map as it was when it looked: what the map let go of since
 * is used again only after a grace period, which waits for this request, so the bytes are still
 * those that were there.
 *
 * The last unit that was unpacked is kept with the channel, since guests read a unit in pieces.  It
 * is used only while nothing at all was taken out of the map since it was read: a unit that was
 * freed, and whose space holds something else, is never mistaken for the old one.
 */
#include "image/generic.h"
#include "base/iov.h"
#include "image/crypto.h"
#include <errno.h>
#include <string.h>

/* Decrypted at a time. */
#define CRYPTO_PIECE (256u << 10)
/* Units up to here are unpacked where they are, larger ones on a worker. */
#define UNPACK_INLINE (16u << 10)
#define BUFFER_ALIGN  4096u

void *ox_image_buffer(size_t bytes)
{
	return aligned_alloc(BUFFER_ALIGN, ox_align_up(ox_max(bytes, (size_t)1), BUFFER_ALIGN));
}

uint64_t ox_image_crypto_offset(const struct ox_image *image, uint64_t offset,
                                uint64_t store_offset)
{
	return image->crypto_guest_offset ? offset : store_offset - image->crypto_bias;
}

/* --- where ----------------------------------------------------------------------------------- */

int ox_image_extent_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                       struct ox_extent *extent)
{
	struct ox_image *image = channel->image;
	int rc = image->ops->lookup(image, offset, length, extent);

	/* Also for damage: a format may have more to say about it where it can suspend. */
	if (rc < 0 && image->ops->map_co)
		rc = image->ops->map_co(channel, offset, length, extent);
	if (rc < 0)
		return rc == -EAGAIN ? -EIO : rc;
	if (extent->length == 0)
		return -EIO;
	extent->length = ox_min(extent->length, length);
	return 0;
}

int ox_image_find_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                     struct ox_image_channel **at, struct ox_extent *extent, unsigned *depth)
{
	unsigned level = 0;

	for (;;) {
		uint64_t size = ox_image_size_now(channel->image);
		int rc;

		*at = channel;
		if (depth)
			*depth = level;
		if (offset >= size) {
			*extent = (struct ox_extent){.kind = OX_EXTENT_ZERO, .length = length};
			return 0;
		}
		length = ox_min(length, size - offset);
		rc = ox_image_extent_co(channel, offset, length, extent);
		if (rc < 0 || extent->kind != OX_EXTENT_BACKING)
			return rc;
		if (!channel->backing) {
			/* Named and not opened: nobody may take it for zeroes. */
			if (channel->image->backing_file)
				return -EIO;
			extent->kind = OX_EXTENT_ZERO;
			return 0;
		}
		length = extent->length;
		channel = channel->backing;
		level++;
	}
}

/* --- data --------------------------------------------------------------------------------------
 */

static int read_plain_co(struct ox_image_channel *channel, uint64_t store_offset, uint64_t length,
                         const struct ox_list *list, uint64_t at)
{
	struct ox_io io = {
	        .op = OX_IO_READ,
	        .offset = store_offset,
	        .length = length,
	        .iov = list->part,
	        .iovcnt = ox_iov_slice(list->iov, list->count, at, length, list->part),
	};

	return ox_store_submit_co(channel->data, &io);
}

/* By way of a buffer, so that the guest never sees ciphertext in its memory; whole sectors. */
static int read_encrypted_co(struct ox_image_channel *channel, uint64_t offset,
                             uint64_t store_offset, uint64_t length, const struct ox_list *list,
                             uint64_t at)
{
	struct ox_image *image = channel->image;
	uint64_t size = __atomic_load_n(&image->data->size, __ATOMIC_RELAXED);
	OX_FREE uint8_t *buf = ox_image_buffer(
	        ox_min(length + 2 * OX_CRYPTO_SECTOR, (uint64_t)CRYPTO_PIECE + OX_CRYPTO_SECTOR));

	if (!buf)
		return -ENOMEM;
	while (length > 0) {
		uint64_t skip = store_offset & (OX_CRYPTO_SECTOR - 1);
		uint64_t piece = ox_min(length, CRYPTO_PIECE - skip);
		uint64_t whole = ox_align_up(skip + piece, OX_CRYPTO_SECTOR);
		uint64_t start = store_offset - skip;
		uint64_t inside = start < size ? ox_min(whole, size - start) : 0;
		int rc = 0;

		if (inside > 0)
			rc = ox_store_read_co(channel->data, start, buf, inside);
		memset(buf + inside, 0, whole - inside);
		if (rc == 0)
			rc = ox_crypto_decrypt(image->crypto,
			                       ox_image_crypto_offset(image, offset - skip, start),
			                       buf, buf, whole);
		if (rc < 0)
			return rc;
		ox_iov_from_buf(list->iov, list->count, at, buf + skip, piece);
		offset += piece;
		store_offset += piece;
		at += piece;
		length -= piece;
	}
	return 0;
}

static int read_data_co(struct ox_image_channel *channel, uint64_t offset,
                        const struct ox_extent *extent, const struct ox_list *list, uint64_t at)
{
	struct ox_image *image = channel->image;
	uint64_t size = __atomic_load_n(&image->data->size, __ATOMIC_RELAXED);
	uint64_t inside = 0;
	int rc = 0;

	if (image->generic->no_data)
		return -EIO;
	if (image->crypto)
		return read_encrypted_co(channel, offset, extent->store_offset, extent->length,
		                         list, at);
	/* A file may end within its last cluster: what is missing is zero. */
	if (extent->store_offset < size)
		inside = ox_min(extent->length, size - extent->store_offset);
	if (inside > 0)
		rc = read_plain_co(channel, extent->store_offset, inside, list, at);
	if (rc == 0 && inside < extent->length)
		ox_iov_memset(list->iov, list->count, at + inside, 0, extent->length - inside);
	return rc;
}

/* --- compressed units
 * ------------------------------------------------------------------------------
 */

/* channel->unpacked */
struct unpacked {
	uint64_t store_offset, generation;
	uint32_t store_bytes, bytes;
	uint8_t data[];
};

struct unpack_call {
	struct ox_image *image;
	const void *in;
	size_t in_bytes;
	void *out;
	size_t out_bytes;
};

static int unpack_in_worker(void *arg)
{
	struct unpack_call *call = arg;

	return call->image->ops->decompress(call->image, call->in, call->in_bytes, call->out,
	                                    call->out_bytes);
}

static int unpack_co(struct ox_image_channel *channel, const struct ox_extent *extent,
                     struct unpacked *to)
{
	struct ox_image *image = channel->image;
	uint64_t size = __atomic_load_n(&image->data->size, __ATOMIC_RELAXED);
	struct unpack_call call = {
	        .image = image, .out = to->data, .out_bytes = extent->unit_bytes};
	OX_FREE void *in = NULL;
	int rc;

	if (image->generic->no_data || !image->ops->decompress || extent->store_offset >= size)
		return -EIO;
	/* The last sector that it touches may be cut off by the file's end. */
	call.in_bytes = ox_min((uint64_t)extent->store_bytes, size - extent->store_offset);
	call.in = in = ox_image_buffer(call.in_bytes);
	if (!in)
		return -ENOMEM;
	rc = ox_store_read_co(channel->data, extent->store_offset, in, call.in_bytes);
	if (rc < 0)
		return rc;
	if (extent->unit_bytes <= UNPACK_INLINE)
		return unpack_in_worker(&call);
	return ox_worker_call_co(unpack_in_worker, &call);
}

static bool is_kept(const struct unpacked *unit, const struct ox_extent *extent,
                    uint64_t generation)
{
	return unit && unit->generation == generation &&
	       unit->store_offset == extent->store_offset &&
	       unit->store_bytes == extent->store_bytes && unit->bytes == extent->unit_bytes;
}

static int read_compressed_co(struct ox_image_channel *channel, uint64_t offset,
                              uint64_t generation, const struct ox_extent *extent,
                              const struct ox_list *list, uint64_t at)
{
	struct unpacked *unit = channel->unpacked;
	int rc;

	if (offset < extent->unit_offset ||
	    !ox_range_within(offset - extent->unit_offset, extent->length, extent->unit_bytes))
		return -EIO;
	if (!is_kept(unit, extent, generation)) {
		unit = malloc(sizeof(*unit) + extent->unit_bytes);
		if (!unit)
			return -ENOMEM;
		*unit = (struct unpacked){.store_offset = extent->store_offset,
		                          .generation = generation,
		                          .store_bytes = extent->store_bytes,
		                          .bytes = extent->unit_bytes};
		rc = unpack_co(channel, extent, unit);
		if (rc < 0) {
			free(unit);
			return rc;
		}
		free(channel->unpacked);
		channel->unpacked = unit;
	}
	ox_iov_from_buf(list->iov, list->count, at, unit->data + (offset - extent->unit_offset),
	                extent->length);
	return 0;
}

/* --- the whole
 * -------------------------------------------------------------------------------------
 */

int ox_image_read_list_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                          const struct ox_list *list, uint64_t at)
{
	while (length > 0) {
		struct ox_image_channel *where;
		struct ox_extent extent;
		/* As before the look: what is let go of later makes it another one.  The map of a
		 * backing image stays as it is. */
		uint64_t generation =
		        __atomic_load_n(&channel->image->generic->generation, __ATOMIC_ACQUIRE);
		int rc = ox_image_find_co(channel, offset, length, &where, &extent, NULL);

		if (rc < 0)
			return rc;
		if (where != channel)
			generation = 0;
		if (extent.kind == OX_EXTENT_DATA)
			rc = read_data_co(where, offset, &extent, list, at);
		else if (extent.kind == OX_EXTENT_COMPRESSED)
			rc = read_compressed_co(where, offset, generation, &extent, list, at);
		else
			ox_iov_memset(list->iov, list->count, at, 0, extent.length);
		if (rc < 0)
			return rc;
		offset += extent.length;
		at += extent.length;
		length -= extent.length;
	}
	return 0;
}

int ox_image_read_old_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes)
{
	struct iovec iov = {.iov_base = buf, .iov_len = bytes};
	struct iovec part[3];
	struct ox_list list = {.iov = &iov, .count = 1, .part = part};

	return ox_image_read_list_co(channel, offset, bytes, &list, 0);
}
