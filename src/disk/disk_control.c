/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What is asked of a disk and changed about it while it runs: facts, statistics, the write
 * cache's switch, the size.
 *
 * Locking: main's thread, except ox_disk_get_stats().  Sizes: a larger one is published after the
 * image has grown, a smaller one before the image shrinks, and then what is in flight is waited
 * for: no request ever lies beyond the image's end.
 */
#include "disk/disk_private.h"
#include <errno.h>
#include <string.h>

void ox_disk_get_info(struct ox_disk *disk, struct ox_disk_info *info)
{
	const struct ox_store_limits *limits = &disk->limits;
	bool writable = !disk->options.read_only;

	*info = (struct ox_disk_info){
	        .name = disk->name,
	        .path = disk->path,
	        .format = disk->format,
	        .serial = disk->options.serial,
	        .size = __atomic_load_n(&disk->size, __ATOMIC_RELAXED),
	        .logical_block_size = disk->logical_block_size,
	        .physical_block_size = disk->physical_block_size,
	        .optimal_io_size = limits->optimal_io_size,
	        .discard_granularity =
	                ox_max(limits->discard_granularity, disk->logical_block_size),
	        .max_discard = limits->max_discard,
	        .max_zero = limits->max_zero,
	        .cache = disk->options.cache,
	        .aio = disk->aio,
	        .aio_reason = disk->aio_reason,
	        .detect_zeroes = disk->options.detect_zeroes,
	        .read_only = disk->options.read_only,
	        .active = disk->image != NULL,
	        .writeback = __atomic_load_n(&disk->writeback, __ATOMIC_RELAXED),
	        .discard = writable && disk->may_discard && limits->can_discard,
	        .write_zeroes = writable,
	        .secure_erase = writable && limits->can_secure_erase,
	        .zero_unmaps = writable && disk->may_discard && limits->can_discard,
	        .rotational = limits->rotational,
	        .stopped = __atomic_load_n(&disk->stopped, __ATOMIC_RELAXED),
	        .stop_error = __atomic_load_n(&disk->stop_error, __ATOMIC_RELAXED),
	        .stop_op = __atomic_load_n(&disk->stop_op, __ATOMIC_RELAXED),
	        .dev = disk->dev,
	        .ino = disk->ino,
	        .layers = disk->layers,
	        .layer_count = disk->layer_count,
	};
}

void ox_disk_get_stats(struct ox_disk *disk, struct ox_disk_stats *stats)
{
	memset(stats, 0, sizeof(*stats));
	for (unsigned i = 0; i < disk->queue_count; i++) {
		struct ox_disk_queue *queue = &disk->queues[i];

		for (unsigned op = 0; op < OX_DISK_STATS_OPS; op++) {
			struct ox_disk_op_stats *to = &stats->op[op];
			const struct ox_disk_op_stats *from = &queue->op[op];

			to->operations += __atomic_load_n(&from->operations, __ATOMIC_RELAXED);
			to->bytes += __atomic_load_n(&from->bytes, __ATOMIC_RELAXED);
			to->failed += __atomic_load_n(&from->failed, __ATOMIC_RELAXED);
			to->merged += __atomic_load_n(&from->merged, __ATOMIC_RELAXED);
			ox_histogram_merge(&to->latency, &from->latency);
		}
		/* The two sides are read one after the other: a sum that is one off for a moment.
		 */
		stats->in_flight += __atomic_load_n(&queue->in_flight[0], __ATOMIC_RELAXED) +
		                    __atomic_load_n(&queue->in_flight[1], __ATOMIC_RELAXED);
		stats->held += __atomic_load_n(&queue->stat_held, __ATOMIC_RELAXED);
		stats->invalid += __atomic_load_n(&queue->stat_invalid, __ATOMIC_RELAXED);
	}
}

/* --- the write cache -------------------------------------------------------------------------- */

/* Off: from here on a completion means durable, and what completed before must become so without
 * the guest's asking (disk_queue.c has the rules).  The flush that is started here is for a guest
 * that does nothing further. */
void ox_disk_set_writeback(struct ox_disk *disk, bool on)
{
	bool effective = on && disk->wce_default;

	if (__atomic_exchange_n(&disk->writeback, effective, __ATOMIC_SEQ_CST) == effective)
		return;
	if (effective || disk->unsafe || !disk->image)
		return;
	__atomic_fetch_add(&disk->dirtied, 1, __ATOMIC_SEQ_CST);
	if (!__atomic_exchange_n(&disk->sync_posted, true, __ATOMIC_SEQ_CST))
		ox_loop_post(disk->queues[0].loop, &disk->sync_post);
}

void ox_disk_reset_writeback(struct ox_disk *disk)
{
	ox_disk_set_writeback(disk, disk->wce_default);
}

/* --- resize ----------------------------------------------------------------------------------- */

struct resize_call {
	struct ox_image_channel *channel;
	uint64_t size;
	struct ox_error *err;
	int result;
};

static void resize_channel_co(void *arg)
{
	struct resize_call *call = arg;

	call->result = ox_image_resize_co(call->channel, call->size, OX_PREALLOC_OFF, call->err);
}

static int resize_image_co(struct ox_disk *disk, struct ox_image *image,
                           struct ox_image_channel *channel, struct ox_loop *loop, uint64_t size,
                           bool shrink, struct ox_error *err)
{
	struct resize_call call = {.channel = channel, .size = size, .err = err};
	uint64_t old = __atomic_load_n(&disk->size, __ATOMIC_RELAXED);
	int rc;

	if (size < old) {
		if (!shrink)
			return ox_error_set(
			        err, EINVAL,
			        "%s: %llu bytes are less than the disk's %llu: shrinking "
			        "loses what lies behind, and needs --shrink",
			        disk->name, (unsigned long long)size, (unsigned long long)old);
		__atomic_store_n(&disk->size, size, __ATOMIC_RELAXED);
		ox_disk_drain_co(disk);
	}
	ox_loop_call_fiber_co(loop, resize_channel_co, &call);
	rc = call.result;
	if (rc < 0)
		__atomic_store_n(&disk->size, old, __ATOMIC_RELAXED);
	else if (size < old)
		ox_disk_notify(disk, OX_DISK_RESIZED); /* published above */
	else
		ox_disk_publish_size(disk, image);
	return rc;
}

/* The disk is inactive: opens the image for the moment. */
static int resize_closed_co(struct ox_disk *disk, uint64_t size, bool shrink, struct ox_error *err)
{
	struct ox_loop *loop = ox_loop_current();
	struct ox_image_channel *channel;
	struct ox_image *image;
	int finished, rc;

	rc = ox_disk_open_image_co(disk, &image, err);
	if (rc < 0)
		return rc;
	rc = ox_image_attach(image, loop, &channel, err);
	if (rc == 0) {
		/* Another program may have changed it since we looked. */
		ox_disk_publish_size(disk, image);
		rc = resize_image_co(disk, image, channel, loop, size, shrink, err);
		finished = ox_image_finish_co(channel);
		if (rc == 0 && finished < 0)
			rc = ox_error_set(err, -finished, "%s: cannot be closed cleanly: %s",
			                  disk->name, strerror(-finished));
		ox_image_detach_co(channel);
	}
	ox_disk_close_image_co(image);
	return rc;
}

int ox_disk_resize_co(struct ox_disk *disk, uint64_t size, bool shrink, struct ox_error *err)
{
	struct ox_disk_queue *first = &disk->queues[0];
	int rc;

	if (!ox_is_aligned(size, disk->logical_block_size))
		return ox_error_set(err, EINVAL,
		                    "%s: %llu bytes are no multiple of the logical block size %u",
		                    disk->name, (unsigned long long)size, disk->logical_block_size);
	if (disk->options.read_only)
		return ox_error_set(err, EROFS, "%s: is read-only, its size stays", disk->name);
	ox_gate_enter_co(&disk->change_gate);
	if (disk->image)
		rc = resize_image_co(disk, disk->image, first->channel, first->loop, size, shrink,
		                     err);
	else
		rc = resize_closed_co(disk, size, shrink, err);
	ox_gate_leave(&disk->change_gate);
	return rc;
}
