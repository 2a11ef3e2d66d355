/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the disk's files share.
 *
 * Threads: `main` is the control path's; every queue belongs to its loop's thread.  A member is
 * for one of them, or atomic (relaxed unless it says more); the comments below say which.
 */
#ifndef OX_DISK_PRIVATE_H
#define OX_DISK_PRIVATE_H

#include "base/fiber.h"
#include "disk/disk.h"

TAILQ_HEAD(ox_request_list, ox_request);

/* Where a request stands (request->disk_step). */
enum {
	OX_STEP_OPERATION, /* what the guest asked for, or what it was turned into */
	OX_STEP_SYNC,      /* the flush that a completed write needs before the guest hears of it */
};

/* One loop's part of a disk. */
struct ox_disk_queue {
	struct ox_disk *disk;
	struct ox_loop *loop;
	struct ox_image_channel *channel; /* NULL while the disk is inactive */
	struct ox_request_list held;      /* by the error policy, oldest first */

	/* Drain: requests are counted on side `phase`; a drain turns it over and waits until the
	 * other side is empty, so that later requests do not hold it up.  One drain at a time
	 * (disk->drain_gate). */
	uint64_t in_flight[2]; /* this thread's to write, any's to read (relaxed) */
	unsigned phase;
	struct ox_fiber *drainer;

	/* A round of retries: how many of the held requests are under way, and whether one of
	 * them was held again.  See disk_hold.c. */
	unsigned retrying;
	bool retry_failed;
	struct ox_post retry_post, release_post, answer_post; /* posted by main, main, queue */

	/* Written by the queue's thread, read by any (relaxed). */
	struct ox_disk_op_stats op[OX_DISK_STATS_OPS];
	uint64_t stat_held, stat_invalid;
} __attribute__((aligned(OX_CACHELINE)));

/* Lets one fiber of main through at a time, in order of arrival. */
struct ox_gate_waiter {
	struct ox_fiber *fiber;
	TAILQ_ENTRY(ox_gate_waiter) link;
};
struct ox_gate {
	bool busy;
	TAILQ_HEAD(, ox_gate_waiter) waiters;
};

struct ox_disk {
	/* Constant after ox_disk_open(). */
	struct ox_disk_options options;
	char *name, *path, *format;
	uint32_t logical_block_size, physical_block_size;
	bool direct;      /* O_DIRECT */
	bool unsafe;      /* flush is ignored, nothing is made durable for its own sake */
	bool may_discard; /* discard=unmap */
	bool wce_default; /* the cache mode's own */

	/* Read on the hit path (atomic). */
	uint64_t size;    /* bytes, a multiple of the logical block size */
	bool writeback;   /* the guest's write cache is on */
	bool stopped;     /* error policy: what changes data is held */
	int stop_error;   /* errno of the request that stopped the disk */
	uint8_t stop_op;  /* and what it was (enum ox_io_op) */
	uint64_t dirtied; /* generation of the last switch to write-through (release/acquire) */
	uint64_t cleaned; /* the newest generation that a flush has made durable */

	/* main's. */
	struct ox_image *image; /* NULL: inactive (constant while queues have channels) */
	unsigned users;
	bool closing;                  /* the last user leaves: nothing is tried again */
	struct ox_gate change_gate;    /* activation, deactivation, resize */
	struct ox_gate drain_gate;     /* innermost */
	struct ox_store_limits limits; /* of the last open */
	enum ox_aio aio;
	char aio_reason[128];
	uint64_t dev, ino;
	struct ox_disk_layer *layers; /* disk_layers.c */
	unsigned layer_count;
	TAILQ_HEAD(, ox_disk_listener) listeners;
	struct ox_disk_listener *notify_next;
	struct ox_timer retry_timer;
	uint64_t retry_delay_ns;
	unsigned retry_pending; /* queues that have not answered this round yet */
	bool retry_failed, retry_again;
	bool stop_announced;
	struct ox_fiber *round_waiter; /* a deactivation, until the round has ended */

	/* Events from the queues to main: posted once until main has looked. */
	struct ox_post event_post;
	bool event_posted;       /* atomic */
	unsigned events;         /* atomic, OX_EVENT_* */
	uint64_t last_report_ns; /* atomic: when an error was last logged and announced */

	/* The flush behind ox_disk_set_writeback(false), on the first queue. */
	struct ox_post sync_post;
	bool sync_posted; /* atomic */
	struct ox_request sync_request;
	bool sync_busy, sync_again; /* the first queue's */

	unsigned queue_count;
	struct ox_disk_queue *queues;
};

#define OX_EVENT_STOPPED  1u
#define OX_EVENT_IO_ERROR 2u

/* A counter with one writer. */
static inline void ox_count(uint64_t *counter, uint64_t by)
{
	__atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + by,
	                 __ATOMIC_RELAXED);
}

/* request->disk_phase: the side it is counted on, and whether it belongs to a retry round. */
#define OX_PHASE_SIDE  1u
#define OX_PHASE_RETRY 2u

/* disk.c */
void ox_gate_enter_co(struct ox_gate *gate);
void ox_gate_leave(struct ox_gate *gate);
/* Opens and locks the image, and closes it, in a worker. main's thread. */
int ox_disk_open_image_co(struct ox_disk *disk, struct ox_image **image, struct ox_error *err);
void ox_disk_close_image_co(struct ox_image *image);
/* The image has another size: the guest and the listeners shall know. main's thread. */
void ox_disk_publish_size(struct ox_disk *disk, const struct ox_image *image);

/* disk_queue.c: the request path. Queue's thread. */
/* Starts what was held from the beginning; `retry`: 0 or OX_PHASE_RETRY. */
void ox_disk_restart_request(struct ox_disk_queue *queue, struct ox_request *request,
                             unsigned retry);
/* It left the flight with this disk_phase; it was done, or is held (again). */
void ox_disk_end_flight(struct ox_disk_queue *queue, unsigned phase, bool held);
/* Waits until what was in flight at the call has left the flight. */
void ox_disk_drain_queue_co(struct ox_disk_queue *queue);
/* Flushes whatever the cache mode says; 0 or -errno. */
int ox_disk_flush_queue_co(struct ox_disk_queue *queue);
void ox_disk_sync_posted(struct ox_post *post);

/* disk_hold.c: the error policy. */
/* The host failed the request: true if it is held now, else *result is what the guest gets.
 * Queue's thread. */
bool ox_disk_fail_request(struct ox_disk_queue *queue, struct ox_request *request, int *result);
/* It arrived while the disk is stopped. Queue's thread. */
void ox_disk_hold_request(struct ox_disk_queue *queue, struct ox_request *request);
/* One of the retry round's requests left the flight. Queue's thread. */
void ox_disk_retry_ended(struct ox_disk_queue *queue, bool failed);
void ox_disk_hold_init(struct ox_disk *disk);
/* No retries any more: waits for the round that is under way.  disk->closing is set; main's
 * thread. */
void ox_disk_end_rounds_co(struct ox_disk *disk);
/* Fails what an export left behind. Queue's thread. */
void ox_disk_fail_held(struct ox_disk_queue *queue);
/* Nothing is held or in flight any more. main's thread. */
void ox_disk_hold_reset(struct ox_disk *disk);

/* disk_layers.c. main's thread. */
void ox_disk_learn_layers(struct ox_disk *disk, const struct ox_image *image);
void ox_disk_forget_layers(struct ox_disk *disk);

/* disk_events.c */
void ox_disk_events_init(struct ox_disk *disk);
/* Any of the disk's threads. */
void ox_disk_post_event(struct ox_disk *disk, unsigned event);
/* main's thread. */
void ox_disk_notify(struct ox_disk *disk, enum ox_disk_event event);
/* main's thread: a queue stopped the disk. */
void ox_disk_was_stopped(struct ox_disk *disk);

#endif
