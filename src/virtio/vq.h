/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The device's side of a virtqueue, split or packed (virtio 1.3, 2.7 and 2.8).
 *
 * Guest memory is hostile: every descriptor is copied before it is checked, every address is
 * translated with a bound, chains are limited to the queue's size (indirect tables too), and
 * what is malformed makes ox_vq_pop() answer -EPROTO with `error` telling why; the queue is
 * broken from then on.
 *
 * One thread uses a queue.  Everything here is free of system calls and allocation, but for
 * ox_vq_init() and ox_vq_destroy().
 *
 * Completions are published in batches: ox_vq_push() writes a used element that the driver
 * cannot see yet, ox_vq_flush() shows it all that was pushed since the last flush, and
 * ox_vq_should_notify() flushes first.  So the usual round is
 *     while (ox_vq_pop() == 1) submit;   for each completion: ox_vq_push();
 *     if (ox_vq_should_notify()) signal the call descriptor;
 * and nothing stays hidden.  A push that is never flushed was not a completion: after a restart
 * the inflight region still has the chain.
 */
#ifndef OX_VIRTIO_VQ_H
#define OX_VIRTIO_VQ_H

#include "virtio/memory.h"

#define OX_VQ_MAX_SIZE 32768u /* entries */

struct ox_inflight;

struct ox_vq_config {
	bool packed, event_idx, indirect;
	uint16_t size;            /* entries; split: a power of two */
	struct ox_memory *memory; /* a reference is taken */
	/* Host pointers: descriptor area, driver area (avail ring / driver event suppression),
	 * device area (used ring / device event suppression), translated and checked by the caller.
	 */
	void *desc, *driver, *device;
	uint64_t device_guest_addr; /* for the dirty log: guest-physical (or log) address of the
	                             * used ring (split) or descriptor ring (packed) */
	uint64_t device_event_guest_addr; /* packed: of the device event suppression area */
	/* Where to go on: split: last_avail in avail_index, used index read from memory; packed:
	 * as VHOST_USER_GET_VRING_BASE packs them (bit 15 wrap counter). */
	uint16_t avail_index, used_index;
	struct ox_dirty_log *log; /* a reference is taken; NULL: none */
	/* After ox_inflight_attach(); outlives the queue.  NULL: not tracked.  ox_vq_init() repairs
	 * what a killed process left in it, and the region then says where the rings go on:
	 * avail_index and used_index above count only for a fresh region. */
	struct ox_inflight *inflight;
};

struct ox_vq_pending; /* pushed and not flushed: private */

struct ox_vq {
	struct ox_vq_config config;
	const struct ox_region *hint;
	uint16_t last_avail; /* split: free running; packed: 0..size-1 */
	uint16_t last_used;  /* likewise; what was pushed is not counted before the flush */
	uint16_t avail_seen; /* split: the avail index when last read: up to there without a look */
	uint16_t mask;       /* split: size - 1 */
	bool avail_wrap, used_wrap; /* packed */
	bool notify_on;
	bool broken;
	bool asked;             /* ox_vq_should_notify() was called since ox_vq_init() */
	uint32_t unsignalled;   /* flushed since then: elements (split), slots (packed) */
	uint32_t in_flight;     /* popped and not pushed */
	uint32_t slots;         /* packed: ring slots that the chains in flight took */
	uint32_t pending_count; /* pushed and not flushed */
	uint32_t pending_slots; /* packed */
	struct ox_vq_pending *pending;
	uint8_t *busy; /* split: by head; this head is in flight */
	char error[160];
};

/* One request's buffers.  The caller gives room for the list; `out` entries (device reads) come
 * first. */
struct ox_vq_chain {
	uint16_t head;           /* split: descriptor index; packed: buffer id */
	uint16_t ring_slots;     /* packed: descriptors in the ring that the chain took */
	uint16_t inflight_index; /* where the inflight region records it */
	unsigned out_count, in_count;
	uint64_t out_bytes, in_bytes;
	struct iovec *iov; /* out_count + in_count entries, host addresses */
	/* Guest-physical address of each iov entry: for the dirty log; NULL when there is no log
	 * and the caller gave no room. */
	uint64_t *guest_addr;
	unsigned capacity; /* entries of iov and guest_addr, set by the caller */
};

/* -EINVAL: impossible configuration, or an inflight region that cannot belong to this ring. */
int ox_vq_init(struct ox_vq *vq, const struct ox_vq_config *config, struct ox_error *err)
        OX_MUST_CHECK;
/* Drops the references; what was not flushed is not published.  Chains in flight may be given up:
 * an inflight region keeps them. */
void ox_vq_destroy(struct ox_vq *vq);
/* A new memory table (a reference is taken) and where the rings are now.  Chains in flight keep
 * pointers into the old table: hold a reference to it until they are pushed. */
void ox_vq_set_memory(struct ox_vq *vq, struct ox_memory *memory, void *desc, void *driver,
                      void *device);
/* Dirty logging on or off (NULL) while the queue runs; a reference is taken. */
void ox_vq_set_log(struct ox_vq *vq, struct ox_dirty_log *log, uint64_t device_guest_addr,
                   uint64_t device_event_guest_addr);

/* Takes the next available chain: 1; 0: none; -EPROTO: broken; -ENOBUFS: the chain needs more
 * than chain->capacity entries (nothing was taken; try again with room for OX_VQ_MAX_CHAIN). */
#define OX_VQ_MAX_CHAIN 1026u
int ox_vq_pop(struct ox_vq *vq, struct ox_vq_chain *chain) OX_MUST_CHECK;
/* After ox_vq_init() and before the first pop: what a killed process or a stop left in flight,
 * oldest first, into index[config.size]; answers how many (0 without an inflight region).  Each is
 * then taken once with ox_vq_pop_inflight(). */
unsigned ox_vq_resume(struct ox_vq *vq, uint16_t *index);
/* The chain that was in flight with this head (split) or these descriptors (packed, from the
 * inflight region), to be processed again.  1, -EPROTO or -ENOBUFS as ox_vq_pop(). */
int ox_vq_pop_inflight(struct ox_vq *vq, uint16_t index, struct ox_vq_chain *chain) OX_MUST_CHECK;
/* Returns a chain to the driver; `written` bytes were put into its `in` buffers.  The driver sees
 * it at the next ox_vq_flush().  Needs head, ring_slots and inflight_index of the chain only.
 * A dirty log: the caller has marked what it wrote into the buffers, entry by entry of iov, with
 * ox_dirty_log_mark(log, chain->guest_addr[i], bytes); the rings are marked here. */
void ox_vq_push(struct ox_vq *vq, const struct ox_vq_chain *chain, uint32_t written);
/* Makes visible what was pushed (no notification). */
void ox_vq_flush(struct ox_vq *vq);
/* After pushes: flushes; must the driver be notified? (A full barrier is inside.)  False when
 * nothing was flushed since it was asked last, but for the first time after ox_vq_init(): a killed
 * process may have published and not notified, so ask once when a ring starts. */
bool ox_vq_should_notify(struct ox_vq *vq);
/* Driver-to-device notifications.  Turning them on answers whether chains are available that
 * may have been added without a notification. */
bool ox_vq_enable_notify(struct ox_vq *vq);
void ox_vq_disable_notify(struct ox_vq *vq);
/* Anything available? */
bool ox_vq_has_work(struct ox_vq *vq);
/* The value for GET_VRING_BASE (packed: 32 bits with both counters). */
uint32_t ox_vq_base(const struct ox_vq *vq);
/* When no more pushes will come: flushes and answers ox_vq_base().  An inflight region goes on to
 * say where the ring stands: a front end that makes the ring anew (a reset of the guest) gives a
 * new region with it, as QEMU does. */
uint32_t ox_vq_stop(struct ox_vq *vq);

#endif
