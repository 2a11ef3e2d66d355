/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Ranges of a store that writes are working on, so that a read-modify-write never loses what a
 * neighbour writes at the same time.
 *
 * A shared range overlaps other shared ranges (ordinary writes do not see each other); an
 * exclusive one overlaps nothing.  Who must wait is told on its own loop.  First come, first
 * served among those that overlap, so nobody starves.
 */
#ifndef OX_STORE_RANGE_H
#define OX_STORE_RANGE_H

#include "engine/loop.h"
#include <pthread.h>
#include <sys/queue.h>

struct ox_range {
	/* The caller's to set: [start, end) in bytes. */
	uint64_t start, end;
	bool exclusive;
	struct ox_loop *loop;
	/* Called on loop's thread when ox_range_acquire() answered false and the turn came. */
	void (*granted)(struct ox_range *range);
	void *owner;
	/* ox_ranges's. */
	struct ox_post post;
	TAILQ_ENTRY(ox_range) link;
};

TAILQ_HEAD(ox_range_list, ox_range);

struct ox_ranges {
	pthread_mutex_t lock; /* guards the lists; held for a walk over them */
	struct ox_range_list shared, exclusive, waiting;
};

void ox_ranges_init(struct ox_ranges *ranges);
void ox_ranges_destroy(struct ox_ranges *ranges);

/* True: the range is taken.  False: granted() will be called.  Any thread. */
bool ox_range_acquire(struct ox_ranges *ranges, struct ox_range *range);
/* Gives a taken range back.  Any thread. */
void ox_range_release(struct ox_ranges *ranges, struct ox_range *range);
/* Suspends the running fiber until the range is taken; sets granted and owner. */
void ox_range_acquire_co(struct ox_ranges *ranges, struct ox_range *range);

#endif
