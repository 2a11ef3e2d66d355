/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The generic image layer: moves a guest's bytes to where the format says they are.
 *
 * A request ends on one of two ways:
 *   hit   one extent of data covers it: the store request inside it is filled in and submitted;
 *         its completion is the request's. No lock, no allocation, no fiber.
 *   slow  everything else, in a fiber of the submitting thread: several extents, ranges where
 *         nothing is stored, the guarded first sector.
 *
 * Invariants:
 *   - a request is in exactly one place: with the caller, in the store (request->io), or in a
 *     fiber. image_done is called once, on the channel's thread.
 *   - bytes that are checked are the bytes that are written: what the guard looks at is a copy,
 *     since a guest may rewrite its buffer between the check and the write.
 *
 * Locking: none. A channel belongs to its loop's thread; of the image only `size` and
 * `guard_said` change while channels exist, and both are atomic.
 */
#include "image/generic.h"
#include "base/iov.h"
#include <errno.h>
#include <limits.h>
#include <oxbow/log.h>
#include <string.h>

/* What is looked at to guess a format, here and in QEMU and libvirt. */
#define FIRST_SECTOR 512u
/* How much of a guarded write is copied: a multiple of FIRST_SECTOR that keeps the rest of the
 * guest's list aligned for the host's O_DIRECT. */
#define GUARD_COPY 4096u

static void image_finish(struct ox_request *request, int result)
{
	struct ox_image_channel *channel = request->channel;
	unsigned side = request->image_phase;
	struct ox_fiber *waiter = NULL;

	channel->in_flight[side]--;
	if (ox_unlikely(channel->grace_waiter != NULL) && side != channel->phase &&
	    channel->in_flight[side] == 0) {
		waiter = channel->grace_waiter;
		channel->grace_waiter = NULL;
	}
	request->result = result;
	request->image_done(request);
	if (ox_unlikely(waiter != NULL))
		ox_fiber_resume(waiter);
}

/* --- the slow path ----------------------------------------------------------------------- */

/* A list in memory: the guest's, or one with the guard's copy in front. */
struct list {
	struct iovec *iov;
	unsigned count;
};

/* One store request for a part of the guest's; `part` has room for its list. */
static int move_part_co(struct ox_request *request, const struct list *list, uint64_t at,
                        uint64_t bytes, uint64_t store_offset, struct iovec *part)
{
	struct ox_io *io = &request->io;

	io->op = request->op;
	io->flags = request->flags;
	io->offset = store_offset;
	io->length = bytes;
	io->iov = part;
	io->iovcnt = list ? ox_iov_slice(list->iov, list->count, at, bytes, part) : 0;
	return ox_store_submit_co(request->channel->data, io);
}

static int prepare_co(struct ox_request *request, uint64_t offset, uint64_t length)
{
	struct ox_image_channel *channel = request->channel;
	struct ox_allocation a = {.offset = offset, .length = length};

	if (!channel->image->ops->prepare_co)
		return -ENOTSUP;
	return channel->image->ops->prepare_co(channel, &a);
}

static int read_or_write_co(struct ox_request *request, const struct list *list, struct iovec *part)
{
	struct ox_image *image = request->channel->image;
	struct ox_extent extent;
	uint64_t at = 0;
	int rc;

	while (at < request->length) {
		uint64_t left = request->length - at;

		rc = image->ops->lookup(image, request->offset + at, left, &extent);
		if (rc < 0)
			return rc;
		extent.length = ox_min(extent.length, left);
		if (extent.kind == OX_EXTENT_ZERO && request->op == OX_IO_WRITE) {
			rc = prepare_co(request, request->offset + at, extent.length);
			if (rc < 0 && rc != -EAGAIN)
				return rc;
			continue; /* and look again: it is data now */
		}
		if (extent.kind == OX_EXTENT_ZERO) {
			ox_iov_memset(list->iov, list->count, at, 0, extent.length);
		} else {
			rc = move_part_co(request, list, at, extent.length, extent.store_offset,
			                  part);
			if (rc < 0)
				return rc;
		}
		at += extent.length;
	}
	return 0;
}

/* ZERO, DISCARD, SECURE_ERASE: what is not stored is zero already and holds nothing. */
static int clear_co(struct ox_request *request)
{
	struct ox_image *image = request->channel->image;
	struct ox_extent extent;
	int rc = 0;

	for (uint64_t at = 0; at < request->length && rc == 0; at += extent.length) {
		uint64_t left = request->length - at;

		rc = image->ops->lookup(image, request->offset + at, left, &extent);
		if (rc < 0)
			break;
		extent.length = ox_min(extent.length, left);
		if (extent.kind == OX_EXTENT_DATA)
			rc = move_part_co(request, NULL, at, extent.length, extent.store_offset,
			                  NULL);
	}
	return rc;
}

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

/* What the first sector holds now. */
static int read_sector_co(struct ox_request *request, uint8_t *sector)
{
	struct iovec iov = {.iov_base = sector, .iov_len = FIRST_SECTOR};
	struct list list = {.iov = &iov, .count = 1};
	struct iovec part;
	struct ox_request read = {.op = OX_IO_READ,
	                          .length = ox_min((uint64_t)FIRST_SECTOR,
	                                           ox_image_size_now(request->channel->image)),
	                          .channel = request->channel};

	memset(sector, 0, FIRST_SECTOR);
	return read_or_write_co(&read, &list, &part);
}

/* A write that touches the first sector of an image whose format was guessed.  A write of a part
 * of the sector (users of the image only: a disk's requests are whole sectors) is judged by what
 * the sector would hold afterwards. */
static int guarded_write_co(struct ox_request *request, struct iovec *guarded, struct iovec *part)
{
	uint64_t bytes = ox_min(request->length, GUARD_COPY - request->offset);
	OX_FREE uint8_t *copy = aligned_alloc(GUARD_COPY, GUARD_COPY);
	struct list list = {.iov = guarded, .count = 1};
	uint8_t sector[FIRST_SECTOR];
	int rc;

	if (!copy)
		return -ENOMEM;
	ox_iov_to_buf(request->iov, request->iovcnt, 0, copy, bytes);
	if (request->offset > 0 || bytes < FIRST_SECTOR) {
		rc = read_sector_co(request, sector);
		if (rc < 0)
			return rc;
	}
	memcpy(sector + request->offset, copy, ox_min(bytes, FIRST_SECTOR - request->offset));
	if (ox_image_first_sector_is_dangerous(sector, sizeof(sector))) {
		say_refused(request->channel->image, sector);
		return -EPERM;
	}
	/* The copied part from our memory, the rest from the guest's. */
	guarded[0] = (struct iovec){.iov_base = copy, .iov_len = bytes};
	if (request->length > bytes)
		list.count += ox_iov_slice(request->iov, request->iovcnt, bytes,
		                           request->length - bytes, guarded + 1);
	return read_or_write_co(request, &list, part);
}

static bool is_guarded(const struct ox_image *image, const struct ox_request *request)
{
	return image->guard_first_sector && request->op == OX_IO_WRITE &&
	       request->offset < FIRST_SECTOR && request->length > 0;
}

static int slow_move_co(struct ox_request *request)
{
	/* One more than the guest's: the guard's copy in front. */
	size_t entries = (size_t)request->iovcnt + 1;
	OX_FREE struct iovec *lists = calloc(2 * entries, sizeof(*lists));
	struct list list = {.iov = lists, .count = request->iovcnt};

	if (!lists)
		return -ENOMEM;
	if (is_guarded(request->channel->image, request))
		return guarded_write_co(request, lists, lists + entries);
	memcpy(lists, request->iov, request->iovcnt * sizeof(*lists));
	return read_or_write_co(request, &list, lists + entries);
}

static void slow_co(void *arg)
{
	struct ox_request *request = arg;
	int rc;

	if (request->op == OX_IO_READ || request->op == OX_IO_WRITE)
		rc = slow_move_co(request);
	else
		rc = clear_co(request);
	/* A format that cannot say where the bytes are has failed, not merely not looked. */
	image_finish(request, rc == -EAGAIN ? -EIO : rc);
}

/* --- submission ---------------------------------------------------------------------------- */

static void hit_done(struct ox_io *io)
{
	image_finish(ox_container_of(io, struct ox_request, io), io->result);
}

static void submit_slow(struct ox_request *request)
{
	int rc = ox_fiber_start(slow_co, request);

	if (rc < 0)
		image_finish(request, rc);
}

void ox_image_submit(struct ox_image_channel *channel, struct ox_request *request)
{
	struct ox_image *image = channel->image;
	struct ox_io *io = &request->io;
	struct ox_extent extent = {.store_offset = 0};

	request->channel = channel;
	request->image_phase = (uint8_t)channel->phase;
	channel->in_flight[channel->phase]++;
	if (request->op != OX_IO_FLUSH) {
		if (ox_unlikely(!ox_range_within(request->offset, request->length,
		                                 ox_image_size_now(image)))) {
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
		    image->ops->lookup(image, request->offset, request->length, &extent) < 0 ||
		    extent.kind != OX_EXTENT_DATA || extent.length < request->length) {
			submit_slow(request);
			return;
		}
	}
	io->op = request->op;
	io->flags = request->flags;
	io->offset = extent.store_offset;
	io->length = request->length;
	io->iov = request->iov;
	io->iovcnt = request->iovcnt;
	io->done = hit_done;
	ox_store_submit(channel->data, io);
}
