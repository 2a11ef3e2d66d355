/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What happens to a request that the host failed: the error policy.
 *
 * A request whose policy is STOP is held: it waits on its queue, the disk is `stopped`, and from
 * then on everything but reads is held too.  The listeners hear of it on main, which tries again
 * after 1 s, 2 s, ... 10 s, and when ox_disk_continue() says so:
 *
 *   RUNNING ──a request is held──> STOPPED ──timer or continue──> ROUND: every queue starts
 *      ^                              ^                             what it holds
 *      │                              └──one of them failed────────── │
 *      └───────────────── all succeeded: release what came meanwhile ─┘
 *
 * Invariants:
 *   1. rounds do not overlap: main starts one when every queue has answered the last one
 *   2. request->held is true exactly while the request is on its queue's list
 *   3. a held request is not in flight: a drain does not wait for it
 *
 * Locking: lists and counters are the queue's, rounds and the timer main's; they talk by posts,
 * each of which is in one place at a time because of 1.
 */
#include "disk/disk_private.h"
#include "base/iov.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

#define RETRY_FIRST_NS   1000000000u
#define RETRY_LONGEST_NS 10000000000u
#define REPORT_EVERY_NS  1000000000u

static const char *const op_words[OX_DISK_STATS_OPS] = {
        "read", "write", "flush", "write-zeroes", "discard", "secure-erase",
};

/* --- the queue's side ------------------------------------------------------------------------ */

/* Once a second for a disk: a broken host device fails thousands of requests. */
static void report(struct ox_disk *disk, const struct ox_request *request, int error,
                   const char *fate)
{
	uint64_t now = ox_loop_now(request->queue->loop);
	uint64_t last = __atomic_load_n(&disk->last_report_ns, __ATOMIC_RELAXED);

	if (last && now - last < REPORT_EVERY_NS)
		return;
	if (!__atomic_compare_exchange_n(&disk->last_report_ns, &last, now, false, __ATOMIC_RELAXED,
	                                 __ATOMIC_RELAXED))
		return;
	if (request->disk_op == OX_IO_FLUSH)
		ox_log(OX_LOG_ERROR, "%s: flush failed: %s; %s", disk->name, strerror(error), fate);
	else
		ox_log(OX_LOG_ERROR, "%s: %s of %llu bytes at %llu failed: %s; %s", disk->name,
		       op_words[request->disk_op], (unsigned long long)request->length,
		       (unsigned long long)request->offset, strerror(error), fate);
	ox_disk_post_event(disk, OX_EVENT_IO_ERROR);
}

/* Refusals that no second try changes: of a guarded sector, of an operation that the store does
 * not have.  Holding them would stop the guest for ever. */
static bool is_final(int error)
{
	return error == EPERM || error == ENOTSUP || error == EINVAL;
}

static void put_on_hold(struct ox_disk_queue *queue, struct ox_request *request)
{
	request->held = true;
	TAILQ_INSERT_TAIL(&queue->held, request, link);
	ox_count(&queue->stat_held, 1);
}

static void take_off_hold(struct ox_disk_queue *queue, struct ox_request *request)
{
	TAILQ_REMOVE(&queue->held, request, link);
	request->held = false;
	ox_count(&queue->stat_held, -1);
}

bool ox_disk_fail_request(struct ox_disk_queue *queue, struct ox_request *request, int *result)
{
	struct ox_disk *disk = queue->disk;
	struct ox_disk_op_stats *stats = &queue->op[request->disk_op];
	int error = -*result;
	enum ox_on_error policy =
	        request->disk_op == OX_IO_READ ? disk->options.rerror : disk->options.werror;

	if (policy == OX_ON_ERROR_ENOSPC)
		policy = error == ENOSPC ? OX_ON_ERROR_STOP : OX_ON_ERROR_REPORT;
	if (policy == OX_ON_ERROR_STOP && is_final(error))
		policy = OX_ON_ERROR_REPORT;
	if (policy != OX_ON_ERROR_STOP)
		ox_count(&stats->failed, 1);
	switch (policy) {
	case OX_ON_ERROR_IGNORE:
		report(disk, request, error, "ignored, the guest is told that it succeeded");
		/* Whatever the host left in the buffer is not the guest's to see. */
		if (request->disk_op == OX_IO_READ)
			ox_iov_memset(request->iov, request->iovcnt, 0, 0, request->length);
		*result = 0;
		return false;
	case OX_ON_ERROR_STOP:
		/* A second try that fails is no news. */
		if (!(request->disk_phase & OX_PHASE_RETRY))
			report(disk, request, error, "held and tried again until it succeeds");
		put_on_hold(queue, request);
		if (!__atomic_exchange_n(&disk->stopped, true, __ATOMIC_RELAXED)) {
			__atomic_store_n(&disk->stop_error, error, __ATOMIC_RELAXED);
			__atomic_store_n(&disk->stop_op, request->disk_op, __ATOMIC_RELAXED);
		}
		ox_disk_post_event(disk, OX_EVENT_STOPPED);
		ox_disk_end_flight(queue, request->disk_phase, true);
		return true;
	default:
		report(disk, request, error, "the guest is told");
		return false;
	}
}

void ox_disk_hold_request(struct ox_disk_queue *queue, struct ox_request *request)
{
	put_on_hold(queue, request);
}

bool ox_disk_take_held(struct ox_disk_queue *queue, struct ox_request *request)
{
	if (!request->held)
		return false;
	take_off_hold(queue, request);
	return true;
}

/* Starts as many as are held now: those that fail again go to the list's end. */
static void start_held(struct ox_disk_queue *queue, unsigned phase)
{
	struct ox_request *request;

	for (uint64_t left = queue->stat_held; left > 0; left--) {
		request = TAILQ_FIRST(&queue->held);
		if (!request)
			break;
		take_off_hold(queue, request);
		if (phase & OX_PHASE_RETRY)
			queue->retrying++;
		ox_disk_restart_request(queue, request, phase);
	}
}

void ox_disk_retry_ended(struct ox_disk_queue *queue, bool failed)
{
	queue->retry_failed |= failed;
	if (--queue->retrying == 0)
		ox_loop_post(queue->disk->options.main, &queue->answer_post);
}

static void retry_posted(struct ox_post *post)
{
	struct ox_disk_queue *queue = ox_container_of(post, struct ox_disk_queue, retry_post);

	/* One for this function, so that the answer comes after the last start. */
	queue->retrying = 1;
	queue->retry_failed = false;
	start_held(queue, OX_PHASE_RETRY);
	ox_disk_retry_ended(queue, false);
}

static void release_posted(struct ox_post *post)
{
	start_held(ox_container_of(post, struct ox_disk_queue, release_post), 0);
}

void ox_disk_fail_held(struct ox_disk_queue *queue)
{
	struct ox_request *request;

	while ((request = TAILQ_FIRST(&queue->held))) {
		take_off_hold(queue, request);
		request->result = -EIO;
		request->done(request);
	}
}

/* --- main's side ----------------------------------------------------------------------------- */

static void start_round(struct ox_disk *disk)
{
	if (!disk->image || disk->closing || !__atomic_load_n(&disk->stopped, __ATOMIC_RELAXED))
		return;
	if (disk->retry_pending > 0) {
		disk->retry_again = true;
		return;
	}
	ox_timer_cancel(&disk->retry_timer);
	disk->retry_again = false;
	disk->retry_failed = false;
	disk->retry_pending = disk->queue_count;
	for (unsigned i = 0; i < disk->queue_count; i++)
		ox_loop_post(disk->queues[i].loop, &disk->queues[i].retry_post);
}

static void round_failed(struct ox_disk *disk)
{
	if (disk->retry_again) {
		start_round(disk);
		return;
	}
	ox_timer_arm(disk->options.main, &disk->retry_timer, disk->retry_delay_ns);
	disk->retry_delay_ns = ox_min(disk->retry_delay_ns * 2, (uint64_t)RETRY_LONGEST_NS);
}

static void forget_stop(struct ox_disk *disk)
{
	__atomic_store_n(&disk->stop_error, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&disk->stopped, false, __ATOMIC_RELAXED);
	disk->stop_announced = false;
	disk->retry_again = false;
	disk->retry_delay_ns = RETRY_FIRST_NS;
	ox_timer_cancel(&disk->retry_timer);
}

static void answer_posted(struct ox_post *post)
{
	struct ox_disk_queue *queue = ox_container_of(post, struct ox_disk_queue, answer_post);
	struct ox_disk *disk = queue->disk;

	disk->retry_failed |= queue->retry_failed;
	if (--disk->retry_pending > 0)
		return;
	if (disk->round_waiter) {
		ox_fiber_resume(ox_steal_ptr(disk->round_waiter));
		return;
	}
	if (disk->retry_failed) {
		round_failed(disk);
		return;
	}
	forget_stop(disk);
	ox_log(OX_LOG_INFO, "%s: goes on, nothing fails any more", disk->name);
	for (unsigned i = 0; i < disk->queue_count; i++)
		ox_loop_post(disk->queues[i].loop, &disk->queues[i].release_post);
	ox_disk_notify(disk, OX_DISK_CONTINUED);
}

static void retry_due(struct ox_timer *timer)
{
	start_round(ox_container_of(timer, struct ox_disk, retry_timer));
}

void ox_disk_was_stopped(struct ox_disk *disk)
{
	/* The round that ended meanwhile may have mended it. */
	if (disk->closing || !__atomic_load_n(&disk->stopped, __ATOMIC_RELAXED))
		return;
	if (disk->stop_announced)
		return;
	disk->stop_announced = true;
	if (disk->retry_pending == 0)
		round_failed(disk);
	ox_disk_notify(disk, OX_DISK_STOPPED);
}

void ox_disk_continue(struct ox_disk *disk)
{
	disk->retry_delay_ns = RETRY_FIRST_NS;
	start_round(disk);
}

void ox_disk_hold_init(struct ox_disk *disk)
{
	disk->retry_timer.fn = retry_due;
	disk->retry_delay_ns = RETRY_FIRST_NS;
	for (unsigned i = 0; i < disk->queue_count; i++) {
		struct ox_disk_queue *queue = &disk->queues[i];

		TAILQ_INIT(&queue->held);
		queue->retry_post.fn = retry_posted;
		queue->release_post.fn = release_posted;
		queue->answer_post.fn = answer_posted;
	}
}

void ox_disk_end_rounds_co(struct ox_disk *disk)
{
	ox_timer_cancel(&disk->retry_timer);
	while (disk->retry_pending > 0) {
		disk->round_waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
}

void ox_disk_hold_reset(struct ox_disk *disk)
{
	forget_stop(disk);
}
