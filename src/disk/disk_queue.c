/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The request path: from the guest's request to the image and back.
 *
 * A request is in exactly one of these places:
 *
 *      ox_disk_submit ──> in flight ──────────> done()
 *            │             │  ^ └─ sync ─┘        ^
 *            │ stopped     │  │ retry, release    │
 *            └──────────> held ── ox_disk_take_held: back with the submitter
 *
 * Durability (docs/architecture.md, section 5):
 *   - the guest's write-cache switch is read once when a request starts; while it is off, what
 *     changes data carries OX_IO_DSYNC, and a flush has nothing to do.
 *   - switching it off raises `dirtied`: writes that completed before may still be volatile. Until
 *     a flush that began later has succeeded (`cleaned`), flushes go through, and a completed
 *     write is followed by one (OX_STEP_SYNC) before the guest hears of it. The same goes for a
 *     write that started before the switch and ends after it. So after the switch no completion
 *     lies about anything before it.
 *     Both sides use seq_cst: a write that still saw the switch on had reached the page cache
 *     before the flush behind the switch began.
 *   - unsafe promises nothing and never waits for the host.
 *
 * Locking: none; a queue is its thread's. The disk's members that are read here are atomic.
 */
#include "disk/disk_private.h"
#include "base/iov.h"
#include <errno.h>
#include <string.h>

/* What a submitter may set; the rest is the disk's to decide. */
static const uint8_t allowed_flags[] = {
        [OX_IO_READ] = 0,
        [OX_IO_WRITE] = OX_IO_DSYNC,
        [OX_IO_FLUSH] = 0,
        [OX_IO_ZERO] = OX_IO_DSYNC | OX_IO_MAY_UNMAP | OX_IO_NO_FALLBACK,
        [OX_IO_DISCARD] = OX_IO_DSYNC,
        [OX_IO_SECURE_ERASE] = OX_IO_DSYNC,
};

static bool is_writeback(const struct ox_disk *disk)
{
	return __atomic_load_n(&disk->writeback, __ATOMIC_SEQ_CST);
}

/* Did writes complete, before the write cache was switched off, that no flush has covered? */
static bool owes_flush(const struct ox_disk *disk)
{
	return __atomic_load_n(&disk->cleaned, __ATOMIC_RELAXED) !=
	       __atomic_load_n(&disk->dirtied, __ATOMIC_ACQUIRE);
}

static void mark_clean(struct ox_disk *disk, uint64_t generation)
{
	uint64_t cleaned = __atomic_load_n(&disk->cleaned, __ATOMIC_RELAXED);

	while (cleaned < generation &&
	       !__atomic_compare_exchange_n(&disk->cleaned, &cleaned, generation, true,
	                                    __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		;
}

/* --- completion ---------------------------------------------------------------------------- */

void ox_disk_end_flight(struct ox_disk_queue *queue, unsigned phase, bool held)
{
	unsigned side = phase & OX_PHASE_SIDE;
	struct ox_fiber *drainer;

	ox_count(&queue->in_flight[side], -1);
	if (ox_unlikely(phase & OX_PHASE_RETRY))
		ox_disk_retry_ended(queue, held);
	/* Last: the drain's end may be the queue's. */
	if (ox_unlikely(queue->drainer && side != queue->phase && queue->in_flight[side] == 0)) {
		drainer = queue->drainer;
		queue->drainer = NULL;
		ox_fiber_resume(drainer);
	}
}

static void finish_request(struct ox_request *request, int result)
{
	struct ox_disk_queue *queue = request->queue;
	struct ox_disk_op_stats *stats = &queue->op[request->disk_op];
	unsigned phase = request->disk_phase;

	ox_count(&stats->operations, 1);
	if (ox_likely(result == 0))
		ox_count(&stats->bytes, request->length);
	ox_histogram_add(&stats->latency, ox_loop_now(queue->loop) - request->start_ns);
	request->result = result;
	request->done(request);
	ox_disk_end_flight(queue, phase, false);
}

static void submit_flush(struct ox_disk_queue *queue, struct ox_request *request)
{
	request->op = OX_IO_FLUSH;
	request->flags = 0;
	request->disk_generation = __atomic_load_n(&queue->disk->dirtied, __ATOMIC_ACQUIRE);
	ox_image_submit(queue->channel, request);
}

static bool needs_sync(const struct ox_disk *disk, const struct ox_request *request)
{
	if (is_writeback(disk) || disk->unsafe)
		return false;
	return !(request->flags & OX_IO_DSYNC) || owes_flush(disk);
}

static void request_done(struct ox_request *request)
{
	struct ox_disk_queue *queue = request->queue;
	int result = request->result;

	if (ox_unlikely(result < 0)) {
		if (!ox_disk_fail_request(queue, request, &result))
			finish_request(request, result);
		return;
	}
	if (request->op == OX_IO_FLUSH) {
		mark_clean(queue->disk, request->disk_generation);
	} else if (request->op != OX_IO_READ && ox_unlikely(needs_sync(queue->disk, request))) {
		request->disk_step = OX_STEP_SYNC;
		submit_flush(queue, request);
		return;
	}
	finish_request(request, 0);
}

/* --- start --------------------------------------------------------------------------------- */

/* Turns what the guest asked for into what the image is asked for; false: nothing to do. */
static bool translate(struct ox_disk *disk, struct ox_request *request)
{
	enum ox_detect_zeroes detect = disk->options.detect_zeroes;

	switch (request->op) {
	case OX_IO_READ:
		return true;
	case OX_IO_FLUSH:
		return !disk->unsafe && (is_writeback(disk) || owes_flush(disk));
	case OX_IO_WRITE:
		/* The guest may change its memory after the look: then what it had is written,
		 * which is one of the contents that this sector ever had during the request. */
		if (ox_unlikely(detect != OX_DETECT_ZEROES_OFF) && request->length > 0 &&
		    ox_iov_is_zero(request->iov, request->iovcnt)) {
			request->op = OX_IO_ZERO;
			if (detect == OX_DETECT_ZEROES_UNMAP && disk->may_discard)
				request->flags |= OX_IO_MAY_UNMAP;
		}
		break;
	case OX_IO_ZERO:
		if (!disk->may_discard)
			request->flags &= ~OX_IO_MAY_UNMAP;
		break;
	case OX_IO_DISCARD:
		if (!disk->may_discard)
			return false;
		break;
	default:
		break;
	}
	if (disk->unsafe)
		request->flags &= ~OX_IO_DSYNC;
	else if (!is_writeback(disk))
		request->flags |= OX_IO_DSYNC;
	return request->length > 0;
}

/* Counts it in flight and submits it, the first time or again. */
static void start_request(struct ox_disk_queue *queue, struct ox_request *request, unsigned retry,
                          int refused)
{
	request->op = request->disk_op;
	request->flags = request->disk_flags & allowed_flags[request->op];
	request->disk_step = OX_STEP_OPERATION;
	request->disk_phase = (uint8_t)(queue->phase | retry);
	ox_count(&queue->in_flight[queue->phase], 1);
	if (ox_unlikely(refused))
		finish_request(request, refused);
	else if (!translate(queue->disk, request))
		finish_request(request, 0);
	else if (request->op == OX_IO_FLUSH)
		submit_flush(queue, request);
	else
		ox_image_submit(queue->channel, request);
}

/* 0, or what is wrong with the request itself. */
static int check_request(const struct ox_disk *disk, const struct ox_request *request)
{
	if (request->op > OX_IO_SECURE_ERASE)
		return -ENOTSUP;
	if (request->op != OX_IO_FLUSH) {
		if (!ox_is_aligned(request->offset | request->length, disk->logical_block_size))
			return -EINVAL;
		if (!ox_range_within(request->offset, request->length,
		                     __atomic_load_n(&disk->size, __ATOMIC_RELAXED)))
			return -EIO;
		if (request->op != OX_IO_READ && disk->options.read_only)
			return -EROFS;
	}
	return 0;
}

void ox_disk_submit(struct ox_disk_queue *queue, struct ox_request *request)
{
	struct ox_disk *disk = queue->disk;
	int rc = check_request(disk, request);

	request->queue = queue;
	request->start_ns = ox_loop_now(queue->loop);
	request->disk_op = request->op;
	request->disk_flags = request->flags;
	request->held = false;
	request->image_done = request_done;
	if (ox_unlikely(!queue->channel))
		rc = -ENXIO;
	if (ox_unlikely(rc < 0)) {
		ox_count(&queue->stat_invalid, 1);
		request->result = rc;
		request->done(request);
		return;
	}
	if (ox_unlikely(__atomic_load_n(&disk->stopped, __ATOMIC_RELAXED)) &&
	    request->op != OX_IO_READ) {
		ox_disk_hold_request(queue, request);
		return;
	}
	start_request(queue, request, 0, 0);
}

void ox_disk_restart_request(struct ox_disk_queue *queue, struct ox_request *request,
                             unsigned retry)
{
	request->op = request->disk_op;
	/* The disk may have shrunk while it was held. */
	start_request(queue, request, retry, check_request(queue->disk, request));
}

/* --- drain, and flushes of the disk's own ---------------------------------------------------- */

void ox_disk_drain_queue_co(struct ox_disk_queue *queue)
{
	unsigned side = queue->phase;

	queue->phase = !side;
	while (queue->in_flight[side] > 0) {
		queue->drainer = ox_fiber_self();
		ox_fiber_suspend();
	}
}

struct own_flush {
	struct ox_request request;
	struct ox_fiber *fiber;
	bool done;
};

static void own_flush_done(struct ox_request *request)
{
	struct own_flush *flush = ox_container_of(request, struct own_flush, request);

	flush->done = true;
	if (flush->fiber)
		ox_fiber_resume(flush->fiber);
}

int ox_disk_flush_queue_co(struct ox_disk_queue *queue)
{
	struct own_flush flush = {.request = {.image_done = own_flush_done, .queue = queue}};

	submit_flush(queue, &flush.request);
	if (!flush.done) {
		flush.fiber = ox_fiber_self();
		ox_fiber_suspend();
	}
	if (flush.request.result == 0)
		mark_clean(queue->disk, flush.request.disk_generation);
	return flush.request.result;
}

/* The flush behind the write cache's switching off.  Nobody waits for it, so a failure is left to
 * the next write or flush, which will try again because `cleaned` stays behind. */
static void start_sync(struct ox_disk_queue *queue);

static void sync_done(struct ox_request *request)
{
	struct ox_disk_queue *queue = request->queue;
	struct ox_disk *disk = queue->disk;

	if (request->result == 0)
		mark_clean(disk, request->disk_generation);
	disk->sync_busy = false;
	if (disk->sync_again)
		start_sync(queue);
	ox_disk_end_flight(queue, request->disk_phase, false);
}

static void start_sync(struct ox_disk_queue *queue)
{
	struct ox_disk *disk = queue->disk;
	struct ox_request *request = &disk->sync_request;

	disk->sync_busy = true;
	disk->sync_again = false;
	*request = (struct ox_request){
	        .queue = queue, .image_done = sync_done, .disk_phase = (uint8_t)queue->phase};
	ox_count(&queue->in_flight[queue->phase], 1);
	submit_flush(queue, request);
}

void ox_disk_sync_posted(struct ox_post *post)
{
	struct ox_disk *disk = ox_container_of(post, struct ox_disk, sync_post);
	struct ox_disk_queue *queue = &disk->queues[0];

	__atomic_store_n(&disk->sync_posted, false, __ATOMIC_SEQ_CST);
	if (!queue->channel)
		return;
	if (disk->sync_busy)
		disk->sync_again = true;
	else
		start_sync(queue);
}
