/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store's reads, writes and flushes.
 *
 * Hit path: a request whose offset, length and buffers suit the descriptor goes to the engine as
 * it is: no lock, no allocation, no fiber.  Everything else runs in a fiber:
 *  - what came back short goes on where it stopped;
 *  - long lists and long transfers are split;
 *  - unsuitable buffers are copied through bounce buffers;
 *  - writes of part of a block read the block, change it and write it back, with the block's
 *    range held exclusively; where such writes can be expected (file->tracked), every other
 *    write holds its range shared, so that the two never overlap, on whatever thread they are.
 *
 * The tail: O_DIRECT cannot write a last part that is shorter than the alignment without growing
 * the file.  All writes at or above tail_start (a page boundary) go through a second, buffered
 * descriptor, with RWF_DSYNC; so no page has direct and buffered writers, nothing dirty stays
 * in the page cache, and reads of it through O_DIRECT are coherent.
 *
 * Order: the store orders nothing among requests in flight; flush is fdatasync, which covers
 * every write completed before it was submitted.
 */
#include "store/file.h"
#include "base/fiber.h"
#include "base/iov.h"
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#define RETRY_NS 1000000u /* after EAGAIN: the kernel was out of something */

/* --- pieces ----------------------------------------------------------------------------- */

static int get_spare_range(struct ox_file_channel *ch, struct ox_file_range **out)
{
	struct ox_file_range *fr = ch->spare_ranges;

	if (fr)
		ch->spare_ranges = fr->next;
	else
		fr = malloc(sizeof(*fr));
	*out = fr;
	return fr ? 0 : -ENOMEM;
}

void ox_file_note_sync_error(struct ox_file *file, int error)
{
	/* The kernel marks pages clean that it failed to write: what was buffered may be gone, and
	 * the next sync would not know.  Space and size limits show before anything is buffered. */
	if (!file->direct && error != -ENOSPC && error != -EDQUOT && error != -EFBIG &&
	    error != -EINVAL && error != -ENOMEM)
		ox_store_fail_flushes(file->store);
}

/* The request is done. */
static void finish(struct ox_file_channel *ch, struct ox_io *io, int result)
{
	struct ox_file_range *fr = io->priv;

	if (ox_unlikely(fr != NULL)) {
		ox_range_release(&ch->file->ranges, &fr->range);
		fr->next = ch->spare_ranges;
		ch->spare_ranges = fr;
		io->priv = NULL;
	}
	if (ox_unlikely(result < 0 && (io->flags & OX_IO_DSYNC)))
		ox_file_note_sync_error(ch->file, result);
	ox_io_finish(io, result);
}

/* The part of the request's list that begins `offset` bytes into it: at most `bytes` and at
 * most `room` entries, to `out`; *taken: bytes. */
static unsigned cut_list(const struct ox_io *io, uint64_t offset, uint64_t bytes, struct iovec *out,
                         unsigned room, uint64_t *taken)
{
	unsigned used = 0;

	*taken = 0;
	for (uint32_t i = 0; i < io->iovcnt && used < room && *taken < bytes; i++) {
		const struct iovec *iov = &io->iov[i];
		uint64_t left;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		left = ox_min((uint64_t)iov->iov_len - offset, bytes - *taken);
		out[used].iov_base = (uint8_t *)iov->iov_base + offset;
		out[used++].iov_len = left;
		*taken += left;
		offset = 0;
	}
	return used;
}

/* One engine operation; bytes moved or -errno; EAGAIN is waited out. */
static int64_t transfer_co(struct ox_file_channel *ch, bool write, int fd, unsigned flags,
                           const struct iovec *iov, unsigned count, uint64_t offset,
                           uint64_t length)
{
	for (;;) {
		struct ox_engine_op op = {
		        .opcode = write ? OX_ENGINE_WRITE : OX_ENGINE_READ,
		        .flags = (uint8_t)flags,
		        .iovcnt = count,
		        .fd = fd,
		        .file = fd == ch->file->fd ? ch->index : -1,
		        .offset = offset,
		        .length = length,
		        .iov = iov,
		};
		int64_t moved = ox_engine_run_co(ch->engine, &op);

		if (moved != -EAGAIN && moved != -EINTR)
			return moved;
		ox_sleep_co(RETRY_NS);
	}
}

/* Moves all of an aligned buffer; reads past the end give zeroes. */
static int transfer_buffer_co(struct ox_file_channel *ch, bool write, unsigned flags, uint8_t *buf,
                              uint64_t offset, uint64_t length)
{
	uint64_t align = ch->file->align_mask + 1;
	uint64_t done = 0;

	while (done < length) {
		struct iovec iov = {.iov_base = buf + done, .iov_len = length - done};
		int64_t moved = transfer_co(ch, write, ch->file->fd, flags, &iov, 1, offset + done,
		                            length - done);

		if (moved < 0)
			return (int)moved;
		if (!write && (moved == 0 || !ox_is_aligned(done + (uint64_t)moved, align))) {
			/* The end of the file. */
			memset(buf + done + moved, 0, length - done - (uint64_t)moved);
			return 0;
		}
		if ((uint64_t)moved < align)
			return moved == 0 ? -ENOSPC : -EIO;
		done = ox_align_down(done + (uint64_t)moved, align);
	}
	return 0;
}

/* --- the callers' own buffers ------------------------------------------------------------ */

/* Moves [pos, end) of a request (bytes into it) between fd and the request's own buffers, which
 * suit it. */
static int move_plain_co(struct ox_file_channel *ch, struct ox_io *io, int fd, unsigned flags,
                         uint64_t pos, uint64_t end)
{
	bool write = io->op == OX_IO_WRITE;
	uint64_t align = fd == ch->file->fd ? ch->file->align_mask + 1 : 1;
	struct iovec list[IOV_MAX];

	while (pos < end) {
		uint64_t want = ox_min(end - pos, OX_FILE_MAX_TRANSFER);
		uint64_t length;
		unsigned count = cut_list(io, pos, want, list, IOV_MAX, &length);
		int64_t moved =
		        transfer_co(ch, write, fd, flags, list, count, io->offset + pos, length);
		uint64_t next;

		if (moved < 0)
			return (int)moved;
		next = pos + (uint64_t)moved;
		if (!write && (moved == 0 || !ox_is_aligned(io->offset + next, align))) {
			/* The end of the file, or of what is left of it. */
			ox_iov_memset(io->iov, io->iovcnt, next, 0, end - next);
			return 0;
		}
		if (next < end) {
			/* A block that was written in part is written again. */
			next = ox_align_down(io->offset + next, align) - io->offset;
			if (next == pos)
				return moved == 0 ? -ENOSPC : -EIO;
		}
		pos = next;
	}
	return 0;
}

/* --- bounce ----------------------------------------------------------------------------- */

static int read_bounced_co(struct ox_file_channel *ch, struct ox_io *io)
{
	uint64_t align = ch->file->align_mask + 1;
	uint64_t end = io->offset + io->length;
	uint64_t start = ox_align_down(io->offset, align);
	uint8_t *buf = ox_bounce_get_co(&ch->bounce);
	int ret = 0;

	if (!buf)
		return -ENOMEM;
	while (start < end && ret == 0) {
		uint64_t stop = ox_min(ox_align_up(end, align), start + OX_BOUNCE_SIZE);
		uint64_t from = ox_max(start, io->offset);

		ret = transfer_buffer_co(ch, false, 0, buf, start, stop - start);
		if (ret == 0)
			ox_iov_from_buf(io->iov, io->iovcnt, from - io->offset,
			                buf + (from - start), ox_min(stop, end) - from);
		start = stop;
	}
	ox_bounce_put(&ch->bounce, buf);
	return ret;
}

/* Writes [offset, end) of the request's range through a buffer; blocks that are covered in part
 * are read first.  The caller holds the blocks' range. */
static int write_bounced_co(struct ox_file_channel *ch, struct ox_io *io, unsigned flags,
                            uint64_t end)
{
	uint64_t align = ch->file->align_mask + 1;
	uint64_t start = ox_align_down(io->offset, align);
	uint8_t *buf = ox_bounce_get_co(&ch->bounce);
	int ret = 0;

	if (!buf)
		return -ENOMEM;
	while (start < end) {
		uint64_t stop = ox_min(ox_align_up(end, align), start + OX_BOUNCE_SIZE);
		uint64_t from = ox_max(start, io->offset);
		uint64_t to = ox_min(stop, end);
		uint64_t last = stop - align;

		if (from > start || (last == start && to < stop)) {
			ret = transfer_buffer_co(ch, false, 0, buf, start, align);
			if (ret < 0)
				break;
		}
		if (to < stop && last > start) {
			ret = transfer_buffer_co(ch, false, 0, buf + (last - start), last, align);
			if (ret < 0)
				break;
		}
		ox_iov_to_buf(io->iov, io->iovcnt, from - io->offset, buf + (from - start),
		              to - from);
		ret = transfer_buffer_co(ch, true, flags, buf, start, stop - start);
		if (ret < 0)
			break;
		start = stop;
	}
	ox_bounce_put(&ch->bounce, buf);
	return ret;
}

/* --- the decision ----------------------------------------------------------------------- */

/* Can the kernel use the request's own buffers? */
static inline bool buffers_suit(const struct ox_file *file, const struct ox_io *io)
{
	uint64_t bad = 0;

	if ((file->align_mask | file->memory_mask) == 0)
		return true;
	for (uint32_t i = 0; i < io->iovcnt; i++)
		bad |= ((uintptr_t)io->iov[i].iov_base & file->memory_mask) |
		       (io->iov[i].iov_len & file->align_mask);
	return bad == 0;
}

static inline bool fits_one_transfer(const struct ox_file *file, const struct ox_io *io)
{
	return ((io->offset | io->length) & file->align_mask) == 0 && io->iovcnt <= IOV_MAX &&
	       io->length <= OX_FILE_MAX_TRANSFER && buffers_suit(file, io);
}

static uint64_t tail_start_of(const struct ox_file *file)
{
	/* Acquire: with it comes tail_fd. */
	return __atomic_load_n(&file->tail_start, __ATOMIC_ACQUIRE);
}

static void slow_read_fiber(void *arg)
{
	struct ox_io *io = arg;
	struct ox_file_channel *ch = ox_file_channel(io->channel);
	int ret;

	if (((io->offset | io->length) & ch->file->align_mask) == 0 && buffers_suit(ch->file, io))
		ret = move_plain_co(ch, io, ch->file->fd, 0, 0, io->length);
	else
		ret = read_bounced_co(ch, io);
	finish(ch, io, ret);
}

static void slow_write_fiber(void *arg)
{
	struct ox_io *io = arg;
	struct ox_file_channel *ch = ox_file_channel(io->channel);
	struct ox_file *file = ch->file;
	uint64_t end = io->offset + io->length;
	uint64_t direct_end = ox_min(end, tail_start_of(file));
	unsigned flags = io->flags & OX_IO_DSYNC ? OX_ENGINE_DSYNC : 0;
	int ret = 0;

	if (io->offset < direct_end) {
		bool partial = ((io->offset | direct_end) & file->align_mask) != 0;
		struct ox_range range = {
		        .start = ox_align_down(io->offset, file->align_mask + 1),
		        .end = ox_align_up(direct_end, file->align_mask + 1),
		        .exclusive = partial,
		        .loop = ch->base.loop,
		};

		if (partial || file->tracked)
			ox_range_acquire_co(&file->ranges, &range);
		if (partial || !buffers_suit(file, io))
			ret = write_bounced_co(ch, io, flags, direct_end);
		else
			ret = move_plain_co(ch, io, file->fd, flags, 0, direct_end - io->offset);
		if (partial || file->tracked)
			ox_range_release(&file->ranges, &range);
	}
	if (ret == 0 && direct_end < end) {
		uint64_t pos = ox_max(direct_end, io->offset) - io->offset;

		ret = move_plain_co(ch, io, file->tail_fd, OX_ENGINE_DSYNC, pos, io->length);
		if (ret < 0)
			ox_file_note_sync_error(file, ret);
	}
	finish(ch, io, ret);
}

static void start_slow(struct ox_file_channel *ch, struct ox_io *io, void (*fiber)(void *arg))
{
	int ret;

	io->priv = NULL;
	ret = ox_fiber_start(fiber, io);
	if (ret < 0)
		finish(ch, io, ret);
}

/* --- the hit path ------------------------------------------------------------------------ */

/* The rest of a transfer that the kernel cut short. */
static void rest_fiber(void *arg)
{
	struct ox_io *io = arg;
	struct ox_file_channel *ch = ox_file_channel(io->channel);
	unsigned flags = io->flags & OX_IO_DSYNC ? OX_ENGINE_DSYNC : 0;

	finish(ch, io, move_plain_co(ch, io, ch->file->fd, flags, io->moved, io->length));
}

static void one_short(struct ox_file_channel *ch, struct ox_io *io, int64_t result)
{
	int ret;

	if (result < 0 && result != -EAGAIN && result != -EINTR) {
		finish(ch, io, (int)result);
		return;
	}
	if (io->op == OX_IO_READ && result >= 0 &&
	    !ox_is_aligned((uint64_t)result, ch->file->align_mask + 1)) {
		/* The end of the file. */
		ox_iov_memset(io->iov, io->iovcnt, (size_t)result, 0,
		              io->length - (uint64_t)result);
		finish(ch, io, 0);
		return;
	}
	io->moved = ox_align_down(result > 0 ? (uint64_t)result : 0, ch->file->align_mask + 1);
	ret = ox_fiber_start(rest_fiber, io);
	if (ret < 0)
		finish(ch, io, ret);
}

static void one_done(struct ox_engine_op *op)
{
	struct ox_io *io = ox_container_of(op, struct ox_io, eng);
	struct ox_file_channel *ch = ox_file_channel(io->channel);

	if (ox_likely(op->result == (int64_t)io->length))
		finish(ch, io, 0);
	else
		one_short(ch, io, op->result);
}

static inline void submit_one(struct ox_file_channel *ch, struct ox_io *io, unsigned opcode)
{
	struct ox_engine_op *op = &io->eng;

	op->opcode = (uint8_t)opcode;
	op->flags = io->flags & OX_IO_DSYNC ? OX_ENGINE_DSYNC : 0;
	op->mode = 0;
	op->fd = ch->file->fd;
	op->file = ch->index;
	op->offset = io->offset;
	op->length = io->length;
	op->iov = io->iov;
	op->iovcnt = io->iovcnt;
	op->done = one_done;
	ox_engine_submit(ch->engine, op);
}

void ox_file_read(struct ox_channel *channel, struct ox_io *io)
{
	struct ox_file_channel *ch = ox_file_channel(channel);

	if (ox_likely(fits_one_transfer(ch->file, io))) {
		io->priv = NULL;
		submit_one(ch, io, OX_ENGINE_READ);
	} else {
		start_slow(ch, io, slow_read_fiber);
	}
}

static void tracked_granted(struct ox_range *range)
{
	struct ox_file_range *fr = ox_container_of(range, struct ox_file_range, range);
	struct ox_io *io = fr->io;

	submit_one(ox_file_channel(io->channel), io, OX_ENGINE_WRITE);
}

/* A whole-block write beside which others may write parts of blocks. */
static void tracked_write(struct ox_file_channel *ch, struct ox_io *io)
{
	struct ox_file_range *fr;
	int ret = get_spare_range(ch, &fr);

	if (ret < 0) {
		io->priv = NULL;
		finish(ch, io, ret);
		return;
	}
	fr->io = io;
	fr->range.start = io->offset;
	fr->range.end = io->offset + io->length;
	fr->range.exclusive = false;
	fr->range.loop = ch->base.loop;
	fr->range.granted = tracked_granted;
	io->priv = fr;
	if (ox_range_acquire(&ch->file->ranges, &fr->range))
		submit_one(ch, io, OX_ENGINE_WRITE);
}

void ox_file_write(struct ox_channel *channel, struct ox_io *io)
{
	struct ox_file_channel *ch = ox_file_channel(channel);

	if (ox_likely(fits_one_transfer(ch->file, io) &&
	              io->offset + io->length <= tail_start_of(ch->file))) {
		if (ox_unlikely(ch->file->tracked)) {
			tracked_write(ch, io);
			return;
		}
		io->priv = NULL;
		submit_one(ch, io, OX_ENGINE_WRITE);
	} else {
		start_slow(ch, io, slow_write_fiber);
	}
}

/* --- flush ------------------------------------------------------------------------------ */

static void sync_done(struct ox_engine_op *op)
{
	struct ox_io *io = ox_container_of(op, struct ox_io, eng);
	struct ox_file *file = ox_file_channel(io->channel)->file;

	if (ox_unlikely(op->result < 0)) {
		if (!file->direct)
			ox_store_fail_flushes(file->store);
		ox_io_finish(io, (int)op->result);
		return;
	}
	/* Another sync failed meanwhile: it may have been told of a loss that this one covers. */
	ox_io_finish(io, __atomic_load_n(&file->store->flush_failed, __ATOMIC_ACQUIRE) ? -EIO : 0);
}

void ox_file_flush(struct ox_channel *channel, struct ox_io *io)
{
	struct ox_file_channel *ch = ox_file_channel(channel);

	if (ch->file->store->options.read_only) {
		ox_io_finish(io, 0);
		return;
	}
	io->priv = NULL;
	io->eng = (struct ox_engine_op){
	        .opcode = OX_ENGINE_FDATASYNC,
	        .fd = ch->file->fd,
	        .file = ch->index,
	        .done = sync_done,
	};
	ox_engine_submit(ch->engine, &io->eng);
}

int ox_file_sync_co(struct ox_file_channel *ch)
{
	struct ox_io io = {.op = OX_IO_FLUSH};

	return ox_store_dispatch_co(&ch->base, &io);
}

/* --- without a loop ---------------------------------------------------------------------- */

int ox_file_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes)
{
	struct ox_file *file = store->priv;
	uint64_t align = file->align_mask + 1;
	OX_FREE void *bounce = NULL;
	size_t done = 0;

	if (posix_memalign(&bounce, OX_BOUNCE_SIZE / 2, OX_BOUNCE_SIZE))
		return -ENOMEM;
	while (done < bytes) {
		uint64_t at = offset + done;
		uint64_t start = ox_align_down(at, align);
		size_t want = (size_t)ox_min(ox_align_up(offset + bytes, align) - start,
		                             (uint64_t)OX_BOUNCE_SIZE);
		size_t skip = (size_t)(at - start);
		ssize_t got;
		size_t usable;

		do
			got = pread(file->fd, bounce, want, (off_t)start);
		while (got < 0 && errno == EINTR);
		if (got < 0)
			return -errno;
		if ((size_t)got <= skip) {
			memset((uint8_t *)buf + done, 0, bytes - done);
			return 0;
		}
		usable = ox_min((size_t)got - skip, bytes - done);
		memcpy((uint8_t *)buf + done, (uint8_t *)bounce + skip, usable);
		done += usable;
	}
	return 0;
}
