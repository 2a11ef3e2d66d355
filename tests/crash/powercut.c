/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Power cuts on raw images: does each cache mode keep what it promised?
 *
 * A disk runs over the faulty store, which writes down every write, zero and flush with its data
 * and order, and delays them so that many overlap.  The guest's side is a workload of random
 * writes, zeroes and flushes, eight at a time, in which each sector carries the number of the
 * request that wrote it.  Then, for cuts after each event of the record, states are built that a
 * disk may be in: what a completed flush or a durable write covers is there; of the rest any
 * subset of sectors, in any order where requests overlapped in time.  In each state each
 * sector must hold what the guest may see:
 *
 *   lost   an older content than the newest that was promised
 *   stale  a content that the guest never wrote to this sector before the cut
 *
 * The promise of a cache mode is written down here once more, from docs/architecture.md section 5,
 * and not taken from the code.  A run whose promise is stronger than its cache mode must show
 * losses: that proves that the checker can see them.
 */
#include "base/byteorder.h"
#include "base/fiber.h"
#include "disk/disk_private.h"
#include "store/faulty.h"
#include "store/memory.h"
#include <stdio.h>
#include <string.h>

#define SECTORS  128u
#define REQUESTS 400u
#define DEPTH    8u
#define NONE     UINT64_MAX

enum promise {
	PROMISE_FLUSHED,   /* what completed before a flush that completed */
	PROMISE_COMPLETED, /* what completed */
	PROMISE_SWITCHED,  /* FLUSHED, and COMPLETED after the write cache was switched off */
	PROMISE_NOTHING,
};

struct scenario {
	const char *name;
	enum ox_cache cache;
	enum promise promise;
	bool must_lose; /* the promise is too strong on purpose */
};

static const struct scenario scenarios[] = {
        {"none", OX_CACHE_NONE, PROMISE_FLUSHED, false},
        {"writeback", OX_CACHE_WRITEBACK, PROMISE_FLUSHED, false},
        {"writethrough", OX_CACHE_WRITETHROUGH, PROMISE_COMPLETED, false},
        {"directsync", OX_CACHE_DIRECTSYNC, PROMISE_COMPLETED, false},
        {"unsafe", OX_CACHE_UNSAFE, PROMISE_NOTHING, false},
        {"none, write cache switched off midway", OX_CACHE_NONE, PROMISE_SWITCHED, false},
        {"control: unsafe does not keep what none promises", OX_CACHE_UNSAFE, PROMISE_FLUSHED,
         true},
        {"control: none does not keep what writethrough promises", OX_CACHE_NONE, PROMISE_COMPLETED,
         true},
};

/* One request of the guest.  Its number, from 1, is what its sectors carry; a zero's sectors
 * carry 0. */
struct action {
	struct ox_request request;
	struct iovec iov;
	struct guest *guest;
	uint32_t number;
	uint8_t op;
	unsigned first, count; /* sectors */
	uint8_t *buf;
	/* The guest's own order, and the record's clock at the same moments. */
	uint64_t began, ended, clock_began, clock_ended;
	bool after_switch;
};

struct guest {
	const struct scenario *scenario;
	struct ox_disk *disk;
	struct ox_disk_queue *queue;
	struct ox_store *store;
	struct ox_fiber *fiber;
	uint64_t sequence;
	uint64_t seed;
	unsigned in_flight;
	bool waiting;
	unsigned count;
	struct action action[REQUESTS];
	struct ox_faulty_log log;
	struct ox_loop *loop;
};

static uint64_t random_number(uint64_t *seed, uint64_t below)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed % below;
}

/* --- the workload ---------------------------------------------------------------------------- */

static void action_done(struct ox_request *request)
{
	struct action *action = ox_container_of(request, struct action, request);
	struct guest *guest = action->guest;

	if (request->result) {
		printf("Bail out! request %u failed: %s\n", action->number,
		       strerror(-request->result));
		exit(1);
	}
	action->ended = ++guest->sequence;
	action->clock_ended = ox_faulty_clock(guest->store);
	guest->in_flight--;
	if (guest->waiting) {
		guest->waiting = false;
		ox_fiber_resume(guest->fiber);
	}
}

static void wait_for_room_co(struct guest *guest, unsigned most)
{
	while (guest->in_flight > most) {
		guest->waiting = true;
		ox_fiber_suspend();
	}
}

static void start_action(struct guest *guest, bool after_switch)
{
	struct action *action = &guest->action[guest->count++];
	uint64_t dice = random_number(&guest->seed, 100);

	action->guest = guest;
	action->number = guest->count;
	action->after_switch = after_switch;
	action->op = dice < 70 ? OX_IO_WRITE : dice < 80 ? OX_IO_ZERO : OX_IO_FLUSH;
	if (action->op != OX_IO_FLUSH) {
		/* A few hot sectors, so that requests meet. */
		action->first = (unsigned)random_number(&guest->seed, dice % 2 ? 16 : SECTORS);
		action->count = 1 + (unsigned)random_number(&guest->seed, 8);
		action->count = ox_min(action->count, SECTORS - action->first);
	}
	if (action->op == OX_IO_WRITE) {
		action->buf = aligned_alloc(4096, ox_align_up(action->count * 512, 4096));
		for (unsigned i = 0; i < action->count * 128; i++)
			ox_put_le32(action->buf + i * 4, action->number);
		action->iov = (struct iovec){action->buf, (size_t)action->count * 512};
		action->request.iov = &action->iov;
		action->request.iovcnt = 1;
	}
	action->request.op = action->op;
	action->request.offset = (uint64_t)action->first * 512;
	action->request.length = (uint64_t)action->count * 512;
	action->request.done = action_done;
	action->began = ++guest->sequence;
	action->clock_began = ox_faulty_clock(guest->store);
	action->ended = action->clock_ended = NONE;
	guest->in_flight++;
	ox_disk_submit(guest->queue, &action->request);
}

static void workload_co(void *arg)
{
	struct guest *guest = arg;
	struct ox_error err = {0};
	/* Two speeds and the rest at once: requests overtake each other. */
	struct ox_fault_rule slow = {.op = OX_FAULT_ANY_OP,
	                             .kind = OX_FAULT_DELAY,
	                             .always = true,
	                             .offset = 0,
	                             .length = 8 * 512,
	                             .delay_ns = 400000};
	struct ox_fault_rule slower = slow, flushes = slow;
	bool switched = false;

	if (ox_disk_activate_co(guest->disk, &err) < 0) {
		printf("Bail out! %s\n", err.text);
		exit(1);
	}
	guest->fiber = ox_fiber_self();
	guest->queue = ox_disk_get_queue(guest->disk, guest->loop);
	guest->store = guest->disk->image->store;
	slower.offset = 24 * 512;
	slower.length = 40 * 512;
	slower.delay_ns = 1500000;
	flushes.op = OX_IO_FLUSH;
	flushes.offset = flushes.length = 0;
	flushes.delay_ns = 700000;
	ox_faulty_add_rule(guest->store, &slow);
	ox_faulty_add_rule(guest->store, &slower);
	ox_faulty_add_rule(guest->store, &flushes);
	ox_faulty_record(guest->store, true);
	while (guest->count < REQUESTS) {
		wait_for_room_co(guest, DEPTH - 1);
		if (guest->scenario->promise == PROMISE_SWITCHED && !switched &&
		    guest->count == REQUESTS / 2) {
			ox_disk_set_writeback(guest->disk, false);
			switched = true;
		}
		start_action(guest, switched);
	}
	wait_for_room_co(guest, 0);
	ox_faulty_record(guest->store, false);
	ox_faulty_take_log(guest->store, &guest->log);
	ox_disk_deactivate_co(guest->disk);
}

/* --- the states of the disk --------------------------------------------------------------------
 */

/* Is the record's effect durable when power fails after event `cut`? */
static bool is_durable(const struct ox_faulty_log *log, const struct ox_faulty_record *record,
                       uint64_t cut)
{
	if (!record->completed || record->completed > cut)
		return false;
	if (record->flags & OX_IO_DSYNC)
		return true;
	for (size_t i = 0; i < log->count; i++) {
		const struct ox_faulty_record *flush = &log->records[i];

		if (flush->op == OX_IO_FLUSH && !flush->result && flush->completed &&
		    flush->completed <= cut && record->completed < flush->submitted)
			return true;
	}
	return false;
}

enum pick { PICK_NONE, PICK_ALL, PICK_LAST, PICK_RANDOM, PICKS };

/* Builds one state: disk[sector] is the number found there. */
static void build_state(const struct ox_faulty_log *log, uint64_t cut, enum pick pick,
                        uint64_t *seed, uint32_t *disk)
{
	memset(disk, 0, SECTORS * sizeof(*disk));
	for (size_t i = 0; i < log->count; i++) {
		const struct ox_faulty_record *record = &log->records[i];
		bool durable;

		if (record->op == OX_IO_FLUSH || record->submitted > cut)
			continue;
		durable = is_durable(log, record, cut);
		for (uint64_t at = 0; at < record->length; at += 512) {
			bool take = durable || pick == PICK_ALL ||
			            (pick == PICK_LAST && i + 1 == log->count) ||
			            (pick == PICK_RANDOM && random_number(seed, 2));

			if (take)
				disk[(record->offset + at) / 512] =
				        record->data ? ox_get_le32(record->data + at) : 0;
		}
	}
}

/* --- what the guest may see
 * ------------------------------------------------------------------------ */

static bool covers(const struct action *action, unsigned sector)
{
	return action->op != OX_IO_FLUSH && sector >= action->first &&
	       sector < action->first + action->count;
}

/* Did a flush, or after the switch any completed write, that the guest saw complete before the
 * cut begin after this write's end? */
static bool is_promised(const struct guest *guest, const struct action *action, uint64_t cut)
{
	enum promise promise = guest->scenario->promise;

	if (action->clock_ended == NONE || action->clock_ended > cut || promise == PROMISE_NOTHING)
		return false;
	if (promise == PROMISE_COMPLETED || (promise == PROMISE_SWITCHED && action->after_switch))
		return true;
	for (unsigned i = 0; i < guest->count; i++) {
		const struct action *other = &guest->action[i];

		if (other->clock_ended == NONE || other->clock_ended > cut ||
		    other->began < action->ended)
			continue;
		if (other->op == OX_IO_FLUSH ||
		    (promise == PROMISE_SWITCHED && other->after_switch))
			return true;
	}
	return false;
}

struct tally {
	unsigned long states, lost, stale;
};

/* For each sector and each content, allowed[] says whether the guest may find it: bit 0. */
static void judge(const struct guest *guest, uint64_t cut, const uint32_t *disk,
                  const bool *promised, struct tally *tally)
{
	tally->states++;
	for (unsigned sector = 0; sector < SECTORS; sector++) {
		const struct action *found = NULL;
		bool known = disk[sector] == 0, allowed = false, any = false;

		if (disk[sector]) {
			found = &guest->action[disk[sector] - 1];
			known = covers(found, sector) && found->op == OX_IO_WRITE &&
			        found->clock_began <= cut;
		}
		if (!known) {
			tally->stale++;
			continue;
		}
		/* Some writer of this content must not be overtaken by a promise. A zero may come
		 * from several requests, or from the beginning. */
		for (unsigned i = 0; i < guest->count + 1u && !allowed; i++) {
			const struct action *writer = i < guest->count ? &guest->action[i] : NULL;
			uint64_t ended = writer ? writer->ended : 0;
			bool overtaken = false;

			if (writer && (!covers(writer, sector) || writer->clock_began > cut))
				continue;
			if (found ? writer != found : writer && writer->op != OX_IO_ZERO)
				continue;
			for (unsigned k = 0; k < guest->count && !overtaken; k++)
				overtaken = promised[k] && covers(&guest->action[k], sector) &&
				            guest->action[k].began > ended;
			allowed = !overtaken;
			any = true;
		}
		if (!any || !allowed)
			tally->lost++;
	}
}

static void check_cuts(struct guest *guest, unsigned samples, struct tally *tally)
{
	uint32_t disk[SECTORS];
	bool promised[REQUESTS];
	uint64_t last = 0;

	for (size_t i = 0; i < guest->log.count; i++) {
		last = ox_max(last, guest->log.records[i].submitted);
		last = ox_max(last, guest->log.records[i].completed);
	}
	for (uint64_t cut = 1; cut <= last; cut++) {
		for (unsigned i = 0; i < guest->count; i++)
			promised[i] = guest->action[i].op != OX_IO_FLUSH &&
			              is_promised(guest, &guest->action[i], cut);
		for (unsigned s = 0; s < PICK_RANDOM + samples; s++) {
			build_state(&guest->log, cut, ox_min(s, (unsigned)PICK_RANDOM),
			            &guest->seed, disk);
			judge(guest, cut, disk, promised, tally);
		}
	}
}

static void run_scenario(const struct scenario *scenario, uint64_t seed, unsigned samples,
                         struct tally *tally)
{
	struct ox_loop_options loop_options = {.name = "powercut", .poll_max_ns = 0};
	struct guest *guest = ox_xcalloc(1, sizeof(*guest));
	struct ox_disk_options options;
	struct ox_error err = {0};
	struct ox_loop *loop = ox_loop_new(&loop_options, &err);

	guest->scenario = scenario;
	guest->seed = seed;
	guest->loop = loop;
	ox_disk_options_init(&options);
	options.path = "faulty::memory:powercut:64k";
	options.format = "raw";
	options.cache = scenario->cache;
	options.main = loop;
	options.loops = &loop;
	options.loop_count = 1;
	if (!loop || ox_disk_open(&options, &guest->disk, &err) < 0) {
		printf("Bail out! %s\n", err.text);
		exit(1);
	}
	ox_loop_run_fiber(loop, workload_co, guest);
	check_cuts(guest, samples, tally);
	ox_faulty_free_log(&guest->log);
	for (unsigned i = 0; i < guest->count; i++)
		free(guest->action[i].buf);
	ox_disk_close(guest->disk);
	ox_memory_forget("powercut");
	ox_loop_free(loop);
	free(guest);
}

int main(int argc, char **argv)
{
	bool is_long = getenv("OXBOW_LONG") != NULL;
	unsigned rounds = is_long ? 12 : 4, samples = is_long ? 12 : 6;
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : ox_clock_ns() | 1;
	struct tally total = {0};
	int failed = 0;

	printf("1..%zu\n# seed %#llx (give it as the argument to repeat)\n",
	       OX_ARRAY_SIZE(scenarios), (unsigned long long)seed);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(scenarios); i++) {
		const struct scenario *scenario = &scenarios[i];
		struct tally tally = {0};
		bool ok;

		for (unsigned round = 0; round < rounds; round++)
			run_scenario(scenario, seed + round * 2654435761u, samples, &tally);
		ok = tally.stale == 0 && (tally.lost > 0) == scenario->must_lose;
		failed += !ok;
		printf("%sok %u - power cut, %s\n# %lu states, %lu lost, %lu stale\n",
		       ok ? "" : "not ", i + 1, scenario->name, tally.states, tally.lost,
		       tally.stale);
		if (!scenario->must_lose) {
			total.states += tally.states;
			total.lost += tally.lost;
			total.stale += tally.stale;
		}
	}
	printf("# %lu states, %lu lost, %lu stale\n", total.states, total.lost, total.stale);
	return failed > 0;
}
