/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The inflight region: what a queue has taken and not returned, in memory that outlives this
 * process (vhost-user, "Inflight I/O tracking", version 1 layouts for split and packed rings).
 *
 * The region comes from a client: every index read from it is checked.
 */
#ifndef OX_VIRTIO_INFLIGHT_H
#define OX_VIRTIO_INFLIGHT_H

#include "base/base.h"
#include <oxbow/error.h>

/* Bytes that one queue's part takes; parts follow each other, 64-byte aligned. */
uint64_t ox_inflight_queue_bytes(bool packed, uint16_t size);

/* A new zeroed memory file for GET_INFLIGHT_FD, of queues * ox_inflight_queue_bytes() bytes.  The
 * client's file (SET_INFLIGHT_FD) is mapped with ox_mapping_map(). */
int ox_inflight_create(unsigned queues, bool packed, uint16_t size, int *fd, uint64_t *bytes,
                       struct ox_error *err) OX_MUST_CHECK;

/* A view of one queue's part; `area` is mapped and at least ox_inflight_queue_bytes().  `size` is
 * the queue size of the GET_INFLIGHT_FD or SET_INFLIGHT_FD message: the ring's own is that or
 * less. */
struct ox_inflight {
	void *area;
	bool packed;
	uint16_t size;
	uint64_t counter; /* of the next submission */
	bool *broken;     /* the mapping's; may be NULL */
};
/* Fills the view; ox_vq_init() with config.inflight does the rest.  area: 8-byte aligned. */
void ox_inflight_attach(struct ox_inflight *inflight, void *area, bool packed, uint16_t size,
                        bool *broken);

/* The rest is for vq.c. */

struct ox_inflight_position {
	uint16_t avail, used;       /* packed: slots; split: free-running indices */
	bool avail_wrap, used_wrap; /* packed */
	uint32_t slots;             /* packed: taken by what is in flight */
};
/* Looks at what the region holds: a fresh one is initialised from *position, one of an earlier
 * run is repaired as the specification says and tells *position.  split: position->used is the
 * used ring's index now, ring NULL.  packed: `ring` is the descriptor ring, where a batch that was
 * not published is taken back.  ring_size: entries of the ring.  -EINVAL: impossible content. */
int ox_inflight_open(struct ox_inflight *inflight, struct ox_inflight_position *position,
                     void *ring, uint16_t ring_size, struct ox_error *err) OX_MUST_CHECK;
/* The entries to submit again, oldest first, into index[room]; how many. */
unsigned ox_inflight_pending(const struct ox_inflight *inflight, uint16_t *index, unsigned room);

#endif
