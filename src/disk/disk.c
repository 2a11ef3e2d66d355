/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A disk's life: opened, activated by its first user, deactivated by its last, closed.
 *
 *   ox_disk_open ──> INACTIVE ──ox_disk_activate_co──> ACTIVE (users > 0)
 *                       ^                                │
 *                       └─────ox_disk_deactivate_co──────┘
 *
 * Inactive, a disk holds no descriptor and no lock and knows only its size and geometry: another
 * host or program may have its turn with the image.  What it knew is read anew at the next
 * activation.
 *
 * Ordering of a deactivation: drain, flush, finish, detach, close (which drops the lock).  The
 * flush comes also where the cache mode made every write durable by itself: it costs little, and a
 * next user on another host reads from the device below.
 *
 * Locking: all on main's thread, where fibers take turns through change_gate (activation,
 * deactivation, resize) and, within it or alone, drain_gate.
 */
#include "disk/disk_private.h"
#include <errno.h>
#include <oxbow/log.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* --- gates ------------------------------------------------------------------------------------ */

void ox_gate_enter_co(struct ox_gate *gate)
{
	struct ox_gate_waiter waiter;

	if (!gate->busy) {
		gate->busy = true;
		return;
	}
	waiter.fiber = ox_fiber_self();
	TAILQ_INSERT_TAIL(&gate->waiters, &waiter, link);
	/* Whoever leaves hands the gate over: it stays busy meanwhile. */
	ox_fiber_suspend();
}

void ox_gate_leave(struct ox_gate *gate)
{
	struct ox_gate_waiter *waiter = TAILQ_FIRST(&gate->waiters);

	if (!waiter) {
		gate->busy = false;
		return;
	}
	TAILQ_REMOVE(&gate->waiters, waiter, link);
	ox_fiber_resume(waiter->fiber);
}

/* --- opening ---------------------------------------------------------------------------------- */

void ox_disk_options_init(struct ox_disk_options *options)
{
	*options = (struct ox_disk_options){
	        .cache = OX_CACHE_NONE,
	        .aio = OX_AIO_AUTO,
	        .discard = OX_DISCARD_UNMAP,
	        .detect_zeroes = OX_DETECT_ZEROES_OFF,
	        .rerror = OX_ON_ERROR_REPORT,
	        .werror = OX_ON_ERROR_ENOSPC,
	        .lock_timeout_ns = 10000000000u,
	};
}

static enum ox_lock_mode lock_mode(const struct ox_disk_options *options)
{
	if (options->no_lock || (options->read_only && options->share_rw))
		return OX_LOCK_NONE;
	if (options->read_only)
		return OX_LOCK_READ;
	return options->share_rw ? OX_LOCK_SHARED_WRITE : OX_LOCK_WRITE;
}

static void image_options(const struct ox_disk *disk, bool locked, struct ox_image_options *out)
{
	const struct ox_disk_options *options = &disk->options;

	*out = (struct ox_image_options){
	        .format = options->format,
	        .store =
	                {
	                        .read_only = options->read_only,
	                        .direct = disk->direct,
	                        .aio = options->aio,
	                        .lock = locked ? lock_mode(options) : OX_LOCK_NONE,
	                        .lock_timeout_ns = locked ? options->lock_timeout_ns : 0,
	                        .write_granularity =
	                                disk->logical_block_size ? disk->logical_block_size : 512,
	                        .opener = options->opener,
	                },
	        .allow = {.dirs = options->allow_dirs},
	        .metadata_cache = options->metadata_cache,
	        .discard_no_unref = options->discard_no_unref,
	        .secrets = options->secrets,
	        .key_secret = options->key_secret,
	};
}

/* The guest sees whole logical blocks; a rest at the end of an odd file is beyond its reach. */
static uint64_t guest_size(const struct ox_disk *disk, const struct ox_image *image)
{
	return ox_align_down(image->size, disk->logical_block_size);
}

/* What an open image tells, for while it is closed. */
static void learn(struct ox_disk *disk, const struct ox_image *image)
{
	ox_image_get_limits(image, &disk->limits);
	disk->aio = image->store->aio;
	snprintf(disk->aio_reason, sizeof(disk->aio_reason), "%s", image->store->aio_reason);
	disk->dev = image->store->dev;
	disk->ino = image->store->ino;
	ox_disk_learn_layers(disk, image);
}

static bool is_block_device(const char *path)
{
	struct stat st;

	if (strncmp(path, "file:", 5) == 0)
		path += 5;
	return stat(path, &st) == 0 && S_ISBLK(st.st_mode);
}

/* A device's sectors are the guest's too.  A file's are not: its partition table counts in
 * sectors, and must mean the same on every file system that the file is moved to. */
static uint32_t auto_logical(const struct ox_disk *disk, const struct ox_image *image)
{
	uint32_t block = disk->limits.logical_block_size;

	if (!is_block_device(disk->path) || !ox_is_power_of_2(block) || block < 512 ||
	    block > 32768 || !ox_is_aligned(image->size, block))
		return 512;
	return block;
}

static int choose_blocks(struct ox_disk *disk, const struct ox_image *image, struct ox_error *err)
{
	uint32_t logical = disk->options.logical_block_size;
	uint32_t physical = disk->options.physical_block_size;

	if (logical == 0)
		logical = auto_logical(disk, image);
	if (!ox_is_power_of_2(logical) || logical < 512 || logical > 32768)
		return ox_error_set(err, EINVAL,
		                    "%s: a logical block size is a power of two from 512 to 32768, "
		                    "%u is not",
		                    disk->name, logical);
	if (physical == 0) {
		physical = ox_max(disk->limits.physical_block_size, logical);
		physical = ox_max(physical, disk->limits.logical_block_size);
	}
	if (!ox_is_power_of_2(physical) || physical < logical)
		return ox_error_set(err, EINVAL,
		                    "%s: a physical block size is a power of two and not smaller "
		                    "than the logical one (%u), %u is not",
		                    disk->name, logical, physical);
	disk->logical_block_size = logical;
	disk->physical_block_size = physical;
	if (!ox_is_aligned(image->size, logical))
		ox_log(OX_LOG_WARNING,
		       "%s: %llu bytes are no multiple of the logical block size %u: the guest does "
		       "not see the last %llu",
		       disk->name, (unsigned long long)image->size, logical,
		       (unsigned long long)(image->size & (logical - 1)));
	return 0;
}

static const char *last_part(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash && slash[1] ? slash + 1 : path;
}

/* A name that fits is the serial; of a longer one the beginning and a hash (FNV-1a) of it all, so
 * that two disks of one guest stay distinguishable. */
static void default_serial(char *serial, const char *name)
{
	uint32_t hash = 2166136261u;

	if (strlen(name) <= OX_DISK_SERIAL) {
		snprintf(serial, OX_DISK_SERIAL + 1, "%s", name);
		return;
	}
	for (const char *c = name; *c; c++)
		hash = (hash ^ (uint8_t)*c) * 16777619u;
	snprintf(serial, OX_DISK_SERIAL + 1, "%.11s-%08x", name, hash);
}

static int check_options(const struct ox_disk_options *options, struct ox_error *err)
{
	if (!options->path || options->loop_count == 0 || !options->main)
		return ox_error_set(err, EINVAL, "a disk needs a path and a loop");
	if (options->no_lock && !options->read_only)
		return ox_error_set(err, EINVAL,
		                    "%s: without the image lock a disk can only be read: add "
		                    "--read-only",
		                    options->path);
	return 0;
}

static void free_disk(struct ox_disk *disk)
{
	ox_disk_forget_layers(disk);
	free(disk->queues);
	free(disk->name);
	free(disk->path);
	free(disk->format);
	free((char *)disk->options.format);
	free(disk);
}

static struct ox_disk *new_disk(const struct ox_disk_options *options)
{
	struct ox_disk *disk = ox_xcalloc(1, sizeof(*disk));

	disk->options = *options;
	disk->path = ox_xstrdup(options->path);
	disk->name = ox_xstrdup(options->name ? options->name : last_part(options->path));
	disk->options.path = disk->path;
	disk->options.name = disk->name;
	disk->options.format = options->format ? ox_xstrdup(options->format) : NULL;
	disk->options.loops = NULL; /* the queues have them */
	if (!disk->options.serial[0])
		default_serial(disk->options.serial, disk->name);
	disk->logical_block_size = options->logical_block_size;
	disk->direct = ox_cache_is_direct(options->cache);
	disk->unsafe = options->cache == OX_CACHE_UNSAFE;
	disk->may_discard = options->discard == OX_DISCARD_UNMAP;
	disk->wce_default = !ox_cache_is_writethrough(options->cache);
	disk->writeback = disk->wce_default;
	disk->sync_post.fn = ox_disk_sync_posted;
	TAILQ_INIT(&disk->change_gate.waiters);
	TAILQ_INIT(&disk->drain_gate.waiters);
	disk->queue_count = options->loop_count;
	disk->queues = aligned_alloc(OX_CACHELINE, disk->queue_count * sizeof(*disk->queues));
	if (!disk->queues)
		abort();
	memset(disk->queues, 0, disk->queue_count * sizeof(*disk->queues));
	for (unsigned i = 0; i < disk->queue_count; i++) {
		disk->queues[i].disk = disk;
		disk->queues[i].loop = options->loops[i];
	}
	ox_disk_events_init(disk);
	ox_disk_hold_init(disk);
	return disk;
}

int ox_disk_open(const struct ox_disk_options *options, struct ox_disk **out, struct ox_error *err)
{
	struct ox_image_options open_options;
	struct ox_image *image = NULL;
	struct ox_disk *disk;
	int rc;

	rc = check_options(options, err);
	if (rc < 0)
		return rc;
	disk = new_disk(options);
	image_options(disk, false, &open_options);
	rc = ox_image_open(disk->path, &open_options, &image, err);
	if (rc < 0)
		goto fail;
	learn(disk, image);
	rc = choose_blocks(disk, image, err);
	if (rc < 0)
		goto fail;
	disk->format = ox_xstrdup(ox_image_format_name(image));
	disk->size = guest_size(disk, image);
	ox_image_close(image);
	*out = disk;
	return 0;
fail:
	ox_image_close(image);
	free_disk(disk);
	return rc;
}

void ox_disk_close(struct ox_disk *disk)
{
	if (disk)
		free_disk(disk);
}

/* --- activation ---------------------------------------------------------------------------------
 */

struct open_call {
	struct ox_disk *disk;
	struct ox_image *image;
	struct ox_error *err;
};

static int open_in_worker(void *arg)
{
	struct open_call *call = arg;
	struct ox_image_options options;

	image_options(call->disk, true, &options);
	return ox_image_open(call->disk->path, &options, &call->image, call->err);
}

static int close_in_worker(void *arg)
{
	ox_image_close(arg);
	return 0;
}

int ox_disk_open_image_co(struct ox_disk *disk, struct ox_image **image, struct ox_error *err)
{
	struct open_call call = {.disk = disk, .err = err};
	int rc = ox_worker_call_co(open_in_worker, &call);

	if (rc < 0)
		return rc;
	*image = call.image;
	return 0;
}

void ox_disk_close_image_co(struct ox_image *image)
{
	/* Closes cannot fail, and the worker answers what close_in_worker does. */
	(void)!ox_worker_call_co(close_in_worker, image);
}

struct queue_call {
	struct ox_disk_queue *queue;
	struct ox_image *image;
	struct ox_error *err;
	int result;
};

static void attach_queue(void *arg)
{
	struct queue_call *call = arg;
	struct ox_image_channel *channel;

	call->result = ox_image_attach(call->image, call->queue->loop, &channel, call->err);
	if (call->result == 0)
		call->queue->channel = channel;
}

static void detach_queue_co(void *arg)
{
	struct ox_disk_queue *queue = ((struct queue_call *)arg)->queue;

	ox_image_detach_co(queue->channel);
	queue->channel = NULL;
}

static void detach_all_co(struct ox_disk *disk)
{
	for (unsigned i = 0; i < disk->queue_count; i++) {
		struct queue_call call = {.queue = &disk->queues[i]};

		ox_loop_call_fiber_co(call.queue->loop, detach_queue_co, &call);
	}
}

void ox_disk_publish_size(struct ox_disk *disk, const struct ox_image *image)
{
	uint64_t size = guest_size(disk, image);

	if (__atomic_exchange_n(&disk->size, size, __ATOMIC_RELAXED) != size)
		ox_disk_notify(disk, OX_DISK_RESIZED);
}

static int activate_first_co(struct ox_disk *disk, struct ox_error *err)
{
	struct ox_image *image;
	int rc = ox_disk_open_image_co(disk, &image, err);

	if (rc < 0)
		return rc;
	for (unsigned i = 0; i < disk->queue_count && rc == 0; i++) {
		struct queue_call call = {.queue = &disk->queues[i], .image = image, .err = err};

		ox_loop_call_co(call.queue->loop, attach_queue, &call);
		rc = call.result;
	}
	if (rc < 0) {
		detach_all_co(disk);
		ox_disk_close_image_co(image);
		return rc;
	}
	disk->image = image;
	learn(disk, image);
	ox_disk_publish_size(disk, image);
	return 0;
}

int ox_disk_activate_co(struct ox_disk *disk, struct ox_error *err)
{
	int rc = 0;

	ox_gate_enter_co(&disk->change_gate);
	if (disk->users == 0)
		rc = activate_first_co(disk, err);
	if (rc == 0)
		disk->users++;
	ox_gate_leave(&disk->change_gate);
	return rc;
}

static void fail_held_queue(void *arg)
{
	ox_disk_fail_held(((struct queue_call *)arg)->queue);
}

static void flush_queue_co(void *arg)
{
	struct queue_call *call = arg;

	call->result = ox_disk_flush_queue_co(call->queue);
}

static void finish_image_co(void *arg)
{
	struct queue_call *call = arg;

	call->result = ox_image_finish_co(call->queue->channel);
}

/* The image as a whole file again: nothing of it is in memory only.  Also where flushes are
 * ignored, since what the guest wrote must be there for the next user. */
static void finish_last_co(struct ox_disk *disk)
{
	struct queue_call flush = {.queue = &disk->queues[0]};
	struct queue_call finish = {.queue = &disk->queues[0]};

	if (!disk->unsafe)
		ox_loop_call_fiber_co(flush.queue->loop, flush_queue_co, &flush);
	if (flush.result < 0)
		ox_log(OX_LOG_ERROR,
		       "%s: the last flush failed: %s; what the guest had not flushed itself "
		       "may be lost",
		       disk->name, strerror(-flush.result));
	ox_loop_call_fiber_co(finish.queue->loop, finish_image_co, &finish);
	if (finish.result < 0)
		ox_log(OX_LOG_ERROR,
		       "%s: the image could not be closed cleanly: %s; what the guest had not "
		       "flushed itself may be lost",
		       disk->name, strerror(-finish.result));
}

static void deactivate_last_co(struct ox_disk *disk)
{
	disk->closing = true;
	ox_disk_end_rounds_co(disk);
	ox_disk_drain_co(disk);
	for (unsigned i = 0; i < disk->queue_count; i++) {
		struct queue_call call = {.queue = &disk->queues[i]};

		ox_loop_call_co(call.queue->loop, fail_held_queue, &call);
	}
	/* What was failed now, and what a release started before the drain's turn. */
	ox_disk_drain_co(disk);
	if (!disk->options.read_only)
		finish_last_co(disk);
	detach_all_co(disk);
	ox_disk_close_image_co(disk->image);
	disk->image = NULL;
	ox_disk_hold_reset(disk);
	disk->closing = false;
}

void ox_disk_deactivate_co(struct ox_disk *disk)
{
	ox_gate_enter_co(&disk->change_gate);
	if (--disk->users == 0)
		deactivate_last_co(disk);
	ox_gate_leave(&disk->change_gate);
}

struct ox_disk_queue *ox_disk_get_queue(struct ox_disk *disk, struct ox_loop *loop)
{
	for (unsigned i = 0; i < disk->queue_count; i++) {
		if (disk->queues[i].loop == loop)
			return &disk->queues[i];
	}
	return NULL;
}

/* --- drain
 * ---------------------------------------------------------------------------------------- */

static void drain_queue_co(void *arg)
{
	ox_disk_drain_queue_co(((struct queue_call *)arg)->queue);
}

void ox_disk_drain_co(struct ox_disk *disk)
{
	ox_gate_enter_co(&disk->drain_gate);
	for (unsigned i = 0; i < disk->queue_count; i++) {
		struct queue_call call = {.queue = &disk->queues[i]};

		ox_loop_call_fiber_co(call.queue->loop, drain_queue_co, &call);
	}
	ox_gate_leave(&disk->drain_gate);
}
