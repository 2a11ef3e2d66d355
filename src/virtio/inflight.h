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

/* A view of one queue's part; `area` is mapped and at least ox_inflight_queue_bytes(). */
struct ox_inflight {
	void *area;
	bool packed;
	uint16_t size;
	uint64_t counter; /* of the next submission */
	bool *broken;
};
/* Looks at what a region holds: a fresh one is initialised, one of an earlier run is repaired as
 * the specification says (the used index moved but the entry was not cleared).  `used_index`:
 * the used ring's now (split).  -EINVAL: impossible content. */
int ox_inflight_open(struct ox_inflight *inflight, void *area, bool packed, uint16_t size,
                     uint16_t used_index, struct ox_error *err) OX_MUST_CHECK;
/* The entries to submit again, oldest first, into `index` (room for size); how many. */
unsigned ox_inflight_pending(struct ox_inflight *inflight, uint16_t *index);

#endif
