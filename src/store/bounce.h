/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Aligned buffers that stand in for a caller's when its own cannot be used.  A channel has a
 * bounded number; whoever finds none waits.  One thread.
 */
#ifndef OX_STORE_BOUNCE_H
#define OX_STORE_BOUNCE_H

#include "engine/loop.h"
#include <sys/queue.h>

#define OX_BOUNCE_SIZE (128u * 1024u) /* bytes of a buffer; at least two alignment units */
#define OX_BOUNCE_MAX  16u            /* buffers of a channel */

struct ox_bounce_waiter;

struct ox_bounce {
	struct ox_loop *loop;
	unsigned taken; /* buffers that somebody holds */
	unsigned kept;  /* free buffers in spare[] */
	void *spare[2]; /* kept for the next one; the others go back to the system */
	TAILQ_HEAD(, ox_bounce_waiter) waiting;
};

void ox_bounce_init(struct ox_bounce *bounce, struct ox_loop *loop);
/* Nothing is taken. */
void ox_bounce_destroy(struct ox_bounce *bounce);

/* A buffer of OX_BOUNCE_SIZE bytes, 64 KiB aligned; suspends while all are taken.  NULL: no
 * memory.  The holder waits for nothing but I/O until it gives the buffer back. */
void *ox_bounce_get_co(struct ox_bounce *bounce);
void ox_bounce_put(struct ox_bounce *bounce, void *buf);

#endif
