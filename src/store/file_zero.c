/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store's write-zeroes, discard and secure erase.
 *
 * Zeroes are made by the first way that the file system or device has, in this order:
 *   regular file, may unmap:  punch a hole, then as below
 *   regular file:             ZERO_RANGE; punch a hole and allocate it again; write
 *   block device, may unmap:  PUNCH_HOLE (zeroes for certain, or an error), then as below
 *   block device:             ZERO_RANGE; BLKZEROOUT; write
 * A way that turns out not to exist here is not tried again.  Parts of blocks at either end are
 * written, after the middle succeeded.  A discard skips them: it is a hint.
 *
 * All of it runs in fibers; the middle holds its range shared where writes are tracked, as a
 * read-modify-write of its last block would otherwise bring old bytes back.
 */
#include "store/file.h"
#include "base/fiber.h"
#include <oxbow/log.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

/* A device may write the zeroes itself: not so much that nothing can stop it. */
#define DEVICE_CHUNK (UINT64_C(1) << 30)

#define RETRY_NS 1000000u

static bool is_unsupported(int64_t error)
{
	return error == -EOPNOTSUPP || error == -ENOTTY || error == -ENOSYS || error == -EINVAL ||
	       error == -ENODEV;
}

static bool lacks(const struct ox_file *file, unsigned way)
{
	return __atomic_load_n(&file->lacks, __ATOMIC_RELAXED) & way;
}

/* Remembers that a way does not exist; the error that callers know. */
static int without(struct ox_file *file, unsigned way, const char *name)
{
	if (!(__atomic_fetch_or(&file->lacks, way, __ATOMIC_RELAXED) & way))
		ox_log(OX_LOG_DEBUG, "%s: no %s here", file->store->path, name);
	return -EOPNOTSUPP;
}

static int fallocate_co(struct ox_file_channel *ch, unsigned way, unsigned mode, const char *name,
                        uint64_t offset, uint64_t length)
{
	struct ox_file *file = ch->file;
	int64_t ret;

	if (lacks(file, way))
		return -EOPNOTSUPP;
	for (;;) {
		struct ox_engine_op op = {
		        .opcode = OX_ENGINE_FALLOCATE,
		        .mode = (uint16_t)mode,
		        .fd = file->fd,
		        .file = ch->index,
		        .offset = offset,
		        .length = length,
		};

		ret = ox_engine_run_co(ch->engine, &op);
		if (ret != -EAGAIN && ret != -EINTR)
			break;
		ox_sleep_co(RETRY_NS);
	}
	return is_unsupported(ret) ? without(file, way, name) : (int)ret;
}

struct ioctl_call {
	struct ox_engine_op op;
	unsigned long request;
	uint64_t range[2];
};

static int64_t run_ioctl(struct ox_engine_op *op)
{
	struct ioctl_call *call = ox_container_of(op, struct ioctl_call, op);
	int ret;

	do
		ret = ioctl(op->fd, call->request, call->range);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : 0;
}

static int ioctl_co(struct ox_file_channel *ch, unsigned way, unsigned long request,
                    const char *name, uint64_t offset, uint64_t length)
{
	struct ioctl_call call = {
	        .op = {.opcode = OX_ENGINE_CALL, .fd = ch->file->fd, .file = -1, .call = run_ioctl},
	        .request = request,
	        .range = {offset, length},
	};
	int64_t ret;

	if (lacks(ch->file, way))
		return -EOPNOTSUPP;
	ret = ox_engine_run_co(ch->engine, &call.op);
	return is_unsupported(ret) ? without(ch->file, way, name) : (int)ret;
}

static int punch_co(struct ox_file_channel *ch, uint64_t offset, uint64_t length)
{
	return fallocate_co(ch, OX_FILE_NO_PUNCH, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
	                    "FALLOC_FL_PUNCH_HOLE", offset, length);
}

/* --- zeroes ------------------------------------------------------------------------------ */

/* A range that is aligned to zero_align; -EOPNOTSUPP: only writing is left. */
static int zero_chunk_co(struct ox_file_channel *ch, uint64_t offset, uint64_t length,
                         unsigned flags)
{
	struct ox_file *file = ch->file;
	int ret = -EOPNOTSUPP;

	if (flags & OX_IO_MAY_UNMAP)
		ret = punch_co(ch, offset, length);
	/* From here on a device without a command for it writes the zeroes. */
	if (file->block && (flags & OX_IO_NO_FALLBACK) && !file->limits.zero_is_fast)
		return ret;
	if (ret == -EOPNOTSUPP)
		ret = fallocate_co(ch, OX_FILE_NO_ZERO_RANGE,
		                   FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
		                   "FALLOC_FL_ZERO_RANGE", offset, length);
	if (ret == -EOPNOTSUPP && file->block)
		ret = ioctl_co(ch, OX_FILE_NO_BLKZEROOUT, BLKZEROOUT, "BLKZEROOUT", offset, length);
	if (ret == -EOPNOTSUPP && !file->block && !lacks(file, OX_FILE_NO_ALLOCATE)) {
		ret = punch_co(ch, offset, length);
		if (ret == 0)
			ret = fallocate_co(ch, OX_FILE_NO_ALLOCATE, FALLOC_FL_KEEP_SIZE,
			                   "fallocate", offset, length);
	}
	return ret;
}

static int zero_middle_co(struct ox_file_channel *ch, uint64_t offset, uint64_t end, unsigned flags)
{
	struct ox_file *file = ch->file;
	struct ox_range range = {
	        .start = offset,
	        .end = ox_align_up(end, file->align_mask + 1),
	        .loop = ch->base.loop,
	};
	int ret = 0;

	if (file->tracked)
		ox_range_acquire_co(&file->ranges, &range);
	while (offset < end && ret == 0) {
		uint64_t length = end - offset;

		if (file->block)
			length = ox_min(length, DEVICE_CHUNK);
		ret = zero_chunk_co(ch, offset, length, flags);
		if (ret == 0)
			offset += length;
	}
	if (file->tracked)
		ox_range_release(&file->ranges, &range);
	if (ret != -EOPNOTSUPP)
		return ret;
	return flags & OX_IO_NO_FALLBACK
	               ? -ENOTSUP
	               : ox_store_write_zeroes_co(&ch->base, offset, end - offset, 0);
}

static int zero_co(struct ox_file_channel *ch, uint64_t offset, uint64_t length, unsigned flags)
{
	const struct ox_file *file = ch->file;
	uint64_t end = offset + length;
	uint64_t first = ox_align_up(offset, file->zero_align);
	uint64_t last = ox_align_down(end, file->zero_align);
	int ret;

	/* What is behind the end of a file is zero anyway. */
	if (!file->block && end == ox_store_size_now(file->store))
		last = end;
	if (first >= last)
		return flags & OX_IO_NO_FALLBACK
		               ? -ENOTSUP
		               : ox_store_write_zeroes_co(&ch->base, offset, length, 0);
	ret = zero_middle_co(ch, first, last, flags);
	if (ret == 0 && offset < first)
		ret = ox_store_write_zeroes_co(&ch->base, offset, first - offset, 0);
	if (ret == 0 && last < end)
		ret = ox_store_write_zeroes_co(&ch->base, last, end - last, 0);
	return ret;
}

static void zero_fiber(void *arg)
{
	struct ox_io *io = arg;
	struct ox_file_channel *ch = ox_file_channel(io->channel);
	int ret = zero_co(ch, io->offset, io->length, io->flags);

	if (ret == 0 && (io->flags & OX_IO_DSYNC))
		ret = ox_file_sync_co(ch);
	ox_io_finish(io, ret);
}

void ox_file_zero(struct ox_channel *channel, struct ox_io *io)
{
	int ret = ox_fiber_start(zero_fiber, io);

	if (ret < 0)
		ox_io_finish(io, ret);
}

/* --- discard ----------------------------------------------------------------------------- */

static int discard_co(struct ox_file_channel *ch, uint64_t offset, uint64_t end)
{
	struct ox_file *file = ch->file;
	struct ox_range range = {.start = offset, .end = end, .loop = ch->base.loop};
	int ret = 0;

	if (file->tracked)
		ox_range_acquire_co(&file->ranges, &range);
	while (offset < end && ret == 0) {
		uint64_t length = end - offset;

		if (file->block) {
			length = ox_min(length, DEVICE_CHUNK);
			ret = ioctl_co(ch, OX_FILE_NO_DISCARD, BLKDISCARD, "BLKDISCARD", offset,
			               length);
		} else {
			ret = punch_co(ch, offset, length);
		}
		offset += length;
	}
	if (file->tracked)
		ox_range_release(&file->ranges, &range);
	return ret == -EOPNOTSUPP ? 0 : ret;
}

static void discard_fiber(void *arg)
{
	struct ox_io *io = arg;
	struct ox_file_channel *ch = ox_file_channel(io->channel);
	struct ox_file *file = ch->file;
	uint64_t end = io->offset + io->length;
	uint64_t first = ox_align_up(io->offset, file->zero_align);
	uint64_t last = ox_align_down(end, file->zero_align);
	int ret = 0;

	if (!file->block && end == ox_store_size_now(file->store))
		last = end;
	if (io->op == OX_IO_SECURE_ERASE) {
		if (first != io->offset || last != end)
			ret = -EINVAL;
		else
			ret = ioctl_co(ch, OX_FILE_NO_SECDISCARD, BLKSECDISCARD, "BLKSECDISCARD",
			               io->offset, io->length);
	} else if (first < last) {
		ret = discard_co(ch, first, last);
	}
	if (ret == 0 && (io->flags & OX_IO_DSYNC))
		ret = ox_file_sync_co(ch);
	ox_io_finish(io, ret);
}

void ox_file_discard(struct ox_channel *channel, struct ox_io *io)
{
	int ret = ox_fiber_start(discard_fiber, io);

	if (ret < 0)
		ox_io_finish(io, ret);
}
