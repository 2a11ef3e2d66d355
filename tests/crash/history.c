/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * See history.h.
 */
#include "tests/crash/history.h"
#include "base/byteorder.h"
#include <stdio.h>

static void choose_churn(struct action *action, unsigned sectors, uint64_t *seed)
{
	uint64_t dice = kit_random(seed, 100);

	action->flags = action->first = action->count = 0;
	action->op = dice < 45   ? OX_IO_WRITE
	             : dice < 60 ? OX_IO_ZERO
	             : dice < 92 ? OX_IO_DISCARD
	                         : OX_IO_FLUSH;
	if (action->op == OX_IO_FLUSH)
		return;
	action->flags = action->op == OX_IO_ZERO ? OX_IO_MAY_UNMAP : 0;
	action->first = (unsigned)kit_random(seed, sectors / 8) * 8;
	action->count = 8 + (unsigned)kit_random(seed, HISTORY_MOST / 8 - 1) * 8;
	action->count = ox_min(action->count, sectors - action->first);
}

void history_choose(struct action *action, unsigned sectors, bool churn, uint64_t *seed)
{
	uint64_t dice = kit_random(seed, 100);
	/* Sizes from a sector to several clusters. */
	unsigned most = kit_random(seed, 3) ? 16 : HISTORY_MOST;

	if (churn) {
		choose_churn(action, sectors, seed);
		return;
	}
	action->flags = action->first = action->count = 0;
	action->op = dice < 68   ? OX_IO_WRITE
	             : dice < 78 ? OX_IO_ZERO
	             : dice < 86 ? OX_IO_DISCARD
	                         : OX_IO_FLUSH;
	if (action->op == OX_IO_FLUSH)
		return;
	/* A few hot places, so that requests meet. */
	action->first = (unsigned)kit_random(seed, kit_random(seed, 2) ? 160 : sectors);
	if (kit_random(seed, 3) == 0)
		action->first = action->first / 128 * 128;
	action->count = 1 + (unsigned)kit_random(seed, most);
	action->count = ox_min(action->count, sectors - action->first);
	if (action->op == OX_IO_ZERO && dice % 2)
		action->flags = OX_IO_MAY_UNMAP;
	if (kit_random(seed, 20) == 0)
		action->flags |= OX_IO_DSYNC;
}

void history_stamp(uint8_t *at, unsigned first, unsigned count, uint32_t id)
{
	for (unsigned s = first; s < first + count; s++) {
		for (unsigned i = 0; i < 512; i += 8, at += 8) {
			ox_put_le32(at, id);
			ox_put_le32(at + 4, s);
		}
	}
}

uint32_t history_identify(const uint8_t *at, unsigned sector)
{
	uint32_t id = ox_get_le32(at);

	for (unsigned i = 0; i < 512; i += 8) {
		if (ox_get_le32(at + i) != id || ox_get_le32(at + i + 4) != (id ? sector : 0))
			return HISTORY_BAD_ID;
	}
	return id;
}

bool history_covers(const struct action *action, unsigned sector)
{
	return action->op != OX_IO_FLUSH && sector >= action->first &&
	       sector < action->first + action->count;
}

/* May the sector show `id` by this action (NULL: from before)? */
static bool leaves(const struct history *history, const struct action *action, unsigned sector,
                   uint32_t id, uint64_t clock)
{
	if (!action)
		return id == history->first_id[sector];
	if (!history_covers(action, sector) || action->clock_began > clock)
		return false;
	if (action->op == OX_IO_WRITE)
		return id == action->number;
	return id == 0 || (action->op == OX_IO_DISCARD && id == history->below_id[sector]);
}

enum verdict history_judge(const struct history *history, unsigned sector, uint32_t id,
                           uint64_t clock)
{
	enum verdict verdict = VERDICT_STALE;
	uint64_t newest = 0; /* what ended before this began has been overtaken */

	for (unsigned i = 0; i < history->count; i++) {
		const struct action *action = &history->action[i];

		if (action->promised && action->began > newest && history_covers(action, sector))
			newest = action->began;
	}
	for (unsigned i = 0; i < history->count + 1; i++) {
		const struct action *writer = i < history->count ? &history->action[i] : NULL;

		if (!leaves(history, writer, sector, id, clock))
			continue;
		if (newest <= (writer ? writer->ended : 0))
			return VERDICT_FINE;
		verdict = VERDICT_LOST;
	}
	return verdict;
}

void history_explain(const struct history *history, unsigned sector, uint32_t id, uint64_t clock,
                     enum verdict verdict)
{
	static const char *const ops[] = {"read", "write", "flush", "zero", "discard", "erase"};

	printf("# sector %u: %s %#x; before: %#x, below: %#x\n", sector,
	       verdict == VERDICT_LOST ? "the older" : "the foreign", id, history->first_id[sector],
	       history->below_id[sector]);
	for (unsigned k = 0; k < history->count; k++) {
		const struct action *a = &history->action[k];

		if (history_covers(a, sector) && a->clock_began <= clock)
			printf("#   %#x %s%s %u+%u from %llu to %lld%s\n", a->number, ops[a->op],
			       a->flags & OX_IO_DSYNC ? " dsync" : "", a->first, a->count,
			       (unsigned long long)a->clock_began, (long long)a->clock_ended,
			       a->promised ? " promised" : "");
	}
}
