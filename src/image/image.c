/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The generic image layer: moves a guest's bytes to where the format says they are.
 *
 * A request ends on one of two ways:
 *   hit   one extent of data covers it, here or in a backing image: the store request inside it is
 *         filled in and submitted; its completion is the request's.  No lock, no allocation, no
 *         fiber.  A write to what is not there yet is a hit too, if the format has clean space at
 *         hand (ops->allocate); so is a read of what is zero.
 *   slow  everything else, in a fiber of the submitting thread: several extents, metadata to load,
 *         copies, compressed or encrypted data, the first change, the guarded first sector.
 *
 * Invariants:
 *   - a request is in exactly one place: with the caller, in the store (request->io), or in a
 *     fiber. image_done is called once, on the channel's thread.
 *   - it is counted on one side of its channel from submission to image_done (channel.c: grace
 *     periods).
 *   - nothing is changed before ops->begin_co succeeded (image->begun).
 *   - bytes that are checked are the bytes that are written: what the guard looks at is a copy,
 *     since a guest may rewrite its buffer between the check and the write.
 *
 * Locking: none here. A channel belongs to its loop's thread; what changes in an image while
 * channels exist is atomic or the format's.
 */
#include "image/generic.h"
#include "base/iov.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

/* What is looked at to guess a format, here and in QEMU and libvirt. */
#define FIRST_SECTOR 512u
/* How much of a guarded write is copied: a multiple of FIRST_SECTOR that keeps the rest of the
 * guest's list aligned for the host's O_DIRECT. */
#define GUARD_COPY 4096u
/* A list of up to so many entries needs no allocation on the slow path. */
#define FEW_ENTRIES 16u

static void image_finish(struct ox_request *request, int result)
{
	struct ox_image_channel *channel = request->channel;
	unsigned side = request->image_phase;

	request->result = result;
	if (ox_unlikely(side != channel->phase)) {
		/* A grace period may wait for it, and its channel is there as long as that does. */
		ox_image_leave(channel, side);
		request->image_done(request);
		return;
	}
	channel->in_flight[side]--;
	request->image_done(request);
}

/* --- the guarded sector ------------------------------------------------------------------- */

/* Logged once for an image: a guest can ask for it as often as it likes. */
static void say_refused(struct ox_image *image, const void *sector)
{
	if (__atomic_exchange_n(&image->guard_said, true, __ATOMIC_RELAXED))
		return;
	ox_log(OX_LOG_WARNING,
	       "%s: refused a write that would give its first sector the header of a %s image; the "
	       "format raw was only guessed, give it with -f raw to allow such writes",
	       image->store->path, ox_image_guess_format(sector, FIRST_SECTOR, NULL));
}

/* A write that touches the first sector of an image whose format was guessed.  A write of a part
 * of the sector (users of the image only: a disk's requests are whole sectors) is judged by what
 * the sector would hold afterwards.  `guarded`: room for the list with the copy in front; *copy is
 * the caller's to free. */
static int guard_co(struct ox_request *request, struct ox_list *list, struct iovec *guarded,
                    void **copy)
{
	uint64_t bytes = ox_min(request->length, GUARD_COPY - request->offset);
	uint8_t sector[FIRST_SECTOR] = {0};
	int rc;

	*copy = ox_image_buffer(GUARD_COPY);
	if (!*copy)
		return -ENOMEM;
	ox_iov_to_buf(list->iov, list->count, 0, *copy, bytes);
	if (request->offset > 0 || bytes < FIRST_SECTOR) {
		rc = ox_image_read_old_co(request->channel, 0, sector, FIRST_SECTOR);
		if (rc < 0)
			return rc;
	}
	memcpy(sector + request->offset, *copy, ox_min(bytes, FIRST_SECTOR - request->offset));
	if (ox_image_first_sector_is_dangerous(sector, sizeof(sector))) {
		say_refused(request->channel->image, sector);
		return -EPERM;
	}
	/* The copied part from our memory, the rest from the guest's. */
	guarded[0] = (struct iovec){.iov_base = *copy, .iov_len = bytes};
	if (request->length > bytes)
		list->count = 1 + ox_iov_slice(list->iov, list->count, bytes,
		                               request->length - bytes, guarded + 1);
	else
		list->count = 1;
	list->iov = guarded;
	return 0;
}

static bool is_guarded(const struct ox_image *image, const struct ox_request *request)
{
	return image->guard_first_sector && request->op == OX_IO_WRITE &&
	       request->offset < FIRST_SECTOR && request->length > 0;
}

/* --- the slow path ------------------------------------------------------------------------- */

static int write_co(struct ox_request *request, struct ox_list *list, struct iovec *room)
{
	bool durable = request->flags & OX_IO_DSYNC;
	OX_FREE void *copy = NULL;
	bool commit = false;
	int rc = 0;

	if (is_guarded(request->channel->image, request))
		rc = guard_co(request, list, room, &copy);
	if (rc == 0)
		rc = ox_image_write_list_co(request->channel, request->offset, request->length,
		                            list, 0, durable, &commit);
	if (rc == 0 && commit && (durable || request->channel->image->eager))
		rc = ox_image_commit_co(request->channel);
	return rc;
}

static int move_co(struct ox_request *request)
{
	/* The guest's list with the guard's copy in front, and a part of it with two more. */
	struct iovec few[2 * FEW_ENTRIES + 4];
	size_t entries = (size_t)request->iovcnt + 1;
	OX_FREE struct iovec *many = NULL;
	struct iovec *room = few;
	struct ox_list list = {.iov = request->iov, .count = request->iovcnt};

	if (request->iovcnt > FEW_ENTRIES) {
		many = room = calloc(2 * entries + 2, sizeof(*many));
		if (!many)
			return -ENOMEM;
	}
	list.part = room + entries;
	if (request->op == OX_IO_WRITE)
		return write_co(request, &list, room);
	return ox_image_read_list_co(request->channel, request->offset, request->length, &list, 0);
}

static int change_co(struct ox_request *request)
{
	struct ox_image_channel *channel = request->channel;
	int rc;

	if (channel->image->generic->no_data)
		return -EIO;
	rc = ox_image_begin_co(channel);
	if (rc < 0)
		return rc;
	if (request->op == OX_IO_WRITE)
		return move_co(request);
	return ox_image_clear_co(channel, request->op, request->offset, request->length,
	                         request->flags);
}

static void slow_co(void *arg)
{
	struct ox_request *request = arg;
	int rc;

	if (request->op == OX_IO_READ)
		rc = move_co(request);
	else if (request->op == OX_IO_FLUSH)
		rc = ox_image_commit_co(request->channel);
	else
		rc = change_co(request);
	/* A format that cannot say where the bytes are has failed, not merely not looked. */
	image_finish(request, rc == -EAGAIN ? -EIO : rc);
}

static void submit_slow(struct ox_request *request)
{
	int rc = ox_fiber_start(slow_co, request);

	if (rc < 0)
		image_finish(request, rc);
}

/* --- the hit path ---------------------------------------------------------------------------- */

static void hit_done(struct ox_io *io)
{
	image_finish(ox_container_of(io, struct ox_request, io), io->result);
}

static inline void submit_hit(struct ox_request *request, struct ox_channel *data,
                              uint64_t store_offset)
{
	struct ox_io *io = &request->io;

	io->op = request->op;
	io->flags = request->flags;
	io->offset = store_offset;
	io->length = request->length;
	io->iov = request->iov;
	io->iovcnt = request->iovcnt;
	io->done = hit_done;
	ox_store_submit(data, io);
}

/* One extent of plain data, which the store has, covers the request. */
static inline bool covers(const struct ox_image *image, const struct ox_extent *extent,
                          uint64_t length)
{
	return extent->kind == OX_EXTENT_DATA && extent->length >= length && !image->crypto &&
	       ox_range_within(extent->store_offset, length,
	                       __atomic_load_n(&image->data->size, __ATOMIC_RELAXED));
}

/* Nothing has to happen to metadata before or after data in place is changed. */
static inline bool may_change(const struct ox_image *image, const struct ox_request *request,
                              const struct ox_extent *extent)
{
	return (extent->flags & OX_EXTENT_IN_PLACE) &&
	       __atomic_load_n(&image->begun, __ATOMIC_ACQUIRE) &&
	       (!((request->flags & OX_IO_DSYNC) || image->eager) ||
	        ox_image_map_is_durable(image));
}

/* A read that the image's own map did not answer with data: goes down the chain. */
static void read_below(struct ox_request *request, struct ox_extent *extent)
{
	struct ox_image_channel *channel = request->channel;
	uint64_t length = request->length;

	while (extent->kind == OX_EXTENT_BACKING && extent->length >= length && channel->backing) {
		channel = channel->backing;
		if (!ox_range_within(request->offset, length, ox_image_size_now(channel->image)) ||
		    channel->image->ops->lookup(channel->image, request->offset, length, extent) <
		            0) {
			submit_slow(request);
			return;
		}
	}
	if (covers(channel->image, extent, length)) {
		submit_hit(request, channel->data, extent->store_offset);
	} else if (extent->kind == OX_EXTENT_ZERO && extent->length >= length) {
		ox_iov_memset(request->iov, request->iovcnt, 0, 0, length);
		image_finish(request, 0);
	} else {
		submit_slow(request);
	}
}

/* A write to what is not data in place: perhaps it can be at once.  Each turn must get further. */
static void write_new(struct ox_request *request, struct ox_extent *extent)
{
	struct ox_image_channel *channel = request->channel;
	struct ox_image *image = channel->image;
	uint64_t had = UINT64_MAX;

	while (image->ops->allocate && !image->crypto && !image->generic->no_data &&
	       __atomic_load_n(&image->begun, __ATOMIC_ACQUIRE)) {
		uint64_t have = 0;

		if (extent->kind == OX_EXTENT_DATA && (extent->flags & OX_EXTENT_IN_PLACE))
			have = extent->length;
		if (have >= request->length || (had != UINT64_MAX && have <= had) ||
		    image->ops->allocate(channel, request->offset + have, request->length - have) <
		            0 ||
		    image->ops->lookup(image, request->offset, request->length, extent) < 0)
			break;
		if (covers(image, extent, request->length) && may_change(image, request, extent)) {
			submit_hit(request, channel->data, extent->store_offset);
			return;
		}
		had = have;
	}
	submit_slow(request);
}

static void submit_flush(struct ox_image_channel *channel, struct ox_request *request)
{
	struct ox_image *image = channel->image;

	__atomic_fetch_add(&image->flushes, 1, __ATOMIC_RELAXED);
	if (image->data == image->store &&
	    (!image->ops->commit_co || !__atomic_load_n(&image->metadata_dirty, __ATOMIC_ACQUIRE)))
		submit_hit(request, channel->store, 0);
	else
		submit_slow(request);
}

/* ZERO, DISCARD, SECURE_ERASE: straight to the store where the map has no say in it. */
static inline bool may_clear(const struct ox_image *image)
{
	return !image->ops->zero_co && !image->ops->discard_co;
}

void ox_image_submit(struct ox_image_channel *channel, struct ox_request *request)
{
	struct ox_image *image = channel->image;
	struct ox_extent extent;

	request->channel = channel;
	request->image_phase = (uint8_t)channel->phase;
	channel->in_flight[channel->phase]++;
	if (request->op == OX_IO_FLUSH) {
		submit_flush(channel, request);
		return;
	}
	if (ox_unlikely(
	            !ox_range_within(request->offset, request->length, ox_image_size_now(image)))) {
		image_finish(request, -EIO);
		return;
	}
	if (ox_unlikely(image->read_only && request->op != OX_IO_READ)) {
		image_finish(request, -EROFS);
		return;
	}
	if (ox_unlikely(request->length == 0)) {
		image_finish(request, 0);
		return;
	}
	if (ox_unlikely(is_guarded(image, request)) ||
	    ox_unlikely(image->ops->lookup(image, request->offset, request->length, &extent) < 0))
		submit_slow(request);
	else if (request->op == OX_IO_READ && !covers(image, &extent, request->length))
		read_below(request, &extent);
	else if (request->op == OX_IO_READ ||
	         (covers(image, &extent, request->length) && may_change(image, request, &extent) &&
	          (request->op == OX_IO_WRITE || may_clear(image))))
		submit_hit(request, channel->data, extent.store_offset);
	else if (request->op == OX_IO_WRITE)
		write_new(request, &extent);
	else
		submit_slow(request);
}
