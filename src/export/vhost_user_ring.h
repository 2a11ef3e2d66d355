/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A ring that runs: a virtqueue of block requests bound to an I/O loop.
 *
 * A ring exists from ox_vu_ring_start_co() to ox_vu_ring_stop_co().  Between them it belongs to
 * its loop's thread; the functions here are called by fibers of the main loop and go there.
 * Descriptors that a ring uses stay the caller's: it closes one only after another took its
 * place or the ring has stopped.
 */
#ifndef OX_EXPORT_VHOST_USER_RING_H
#define OX_EXPORT_VHOST_USER_RING_H

#include "export/blk.h"
#include "virtio/inflight.h"

struct ox_vu_ring;

struct ox_vu_ring_setup {
	unsigned index;   /* for messages */
	const char *name; /* the disk's, likewise; lives as long as the ring */
	struct ox_loop *loop;
	struct ox_disk_queue *queue; /* of the disk on that loop */
	struct ox_blk_limits limits;
	struct ox_vq_config config; /* but for config.inflight; it takes its own references */
	struct ox_dirty_log *log;   /* guest buffers are logged there; NULL: they are not */
	/* This queue's part of the inflight region; NULL: none.  Stays mapped until the stop. */
	void *inflight_area;
	uint16_t inflight_size; /* entries */
	bool *inflight_broken;
	int kick_fd; /* -1: the guest does not kick, the ring is polled all the time */
	int call_fd; /* -1: the guest polls */
	int err_fd;  /* or -1 */
};

/* Starts taking requests, those that an earlier run left in the inflight region first. */
int ox_vu_ring_start_co(const struct ox_vu_ring_setup *setup, struct ox_vu_ring **ring,
                        struct ox_error *err) OX_MUST_CHECK;

/* Takes nothing more from the driver; what was taken goes on. */
void ox_vu_ring_quiesce_co(struct ox_vu_ring *ring);

/* Quiesces, waits for what is in flight, and frees the ring.  Requests that the error policy
 * holds are taken back: they stay in the inflight region, or fail if there is none.  The value
 * for GET_VRING_BASE. */
uint32_t ox_vu_ring_stop_co(struct ox_vu_ring *ring);

enum ox_vu_ring_fd { OX_VU_RING_KICK, OX_VU_RING_CALL, OX_VU_RING_ERR };
/* Uses another descriptor (or -1) from now on. */
int ox_vu_ring_set_fd_co(struct ox_vu_ring *ring, enum ox_vu_ring_fd which, int fd,
                         struct ox_error *err) OX_MUST_CHECK;

/* A table that has all the regions of the present one and more; where the rings are now. */
void ox_vu_ring_set_memory_co(struct ox_vu_ring *ring, struct ox_memory *memory, void *desc,
                              void *driver, void *device);

/* May a client's descriptor be used for kicks (`reading`) or for calls?  Eventfds and pipes only,
 * made non-blocking where that cannot surprise the client. */
int ox_vu_ring_check_fd(int fd, bool reading, struct ox_error *err) OX_MUST_CHECK;

#endif
