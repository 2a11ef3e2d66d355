/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What a guest did to a disk, and what it may find there after a crash.
 *
 * Each sector carries the number of the request that wrote it; overlapping requests are allowed.
 */
#ifndef HISTORY_H
#define HISTORY_H

#include "tests/lib/image_kit.h"

#define HISTORY_NONE   UINT64_MAX
#define HISTORY_BAD_ID UINT32_MAX  /* a content that nobody wrote */
#define HISTORY_BASE   0xb0000000u /* the backing image's content */
#define HISTORY_FIRST  0xa0000000u /* what was written before the workload */
#define HISTORY_MOST   300u        /* sectors of a request */

/* One request.  Its number, from 1, is what its sectors carry; a zero's sectors carry 0. */
struct action {
	uint32_t number;
	uint8_t op;
	unsigned flags, first, count; /* sectors */
	/* The guest's own order, and a clock of the caller's at the same moments. */
	uint64_t began, ended, clock_began, clock_ended;
	bool promised; /* its effect must not be lost; the caller's to set */
};

struct history {
	struct action *action;
	unsigned count;
	const uint32_t *first_id; /* by sector: what was there before */
	const uint32_t *below_id; /* what a discard may uncover */
};

/* Fills op, flags, first and count.  `churn`: much is freed, in whole clusters of 4 KiB, and space
 * is used again soon. */
void history_choose(struct action *action, unsigned sectors, bool churn, uint64_t *seed);

void history_stamp(uint8_t *at, unsigned first, unsigned count, uint32_t id);
/* Which request's content is this? */
uint32_t history_identify(const uint8_t *at, unsigned sector);

bool history_covers(const struct action *action, unsigned sector);

enum verdict { VERDICT_FINE, VERDICT_LOST, VERDICT_STALE };
/* May the sector show content `id`, when what began after `clock` did not begin?  LOST: it did
 * once, and something newer was promised; STALE: it never did. */
enum verdict history_judge(const struct history *history, unsigned sector, uint32_t id,
                           uint64_t clock);
/* Prints what happened to a sector. */
void history_explain(const struct history *history, unsigned sector, uint32_t id, uint64_t clock,
                     enum verdict verdict);

#endif
