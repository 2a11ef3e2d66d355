/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Units: parts of L2 tables in memory, for unit.c, map.c and write.c only.
 *
 * A unit has one of two forms.  As an array it has every entry, may be changed (under the lock)
 * and dirty.  As runs it says "from here on, so many entries that follow from the first": a
 * metadata-preallocated table of 64 KiB takes about 150 bytes that way.  Runs never change: who
 * wants to change an entry puts an array in the unit's place.
 */
#ifndef OX_IMAGE_QCOW2_UNIT_H
#define OX_IMAGE_QCOW2_UNIT_H

#include "engine/loop.h"
#include "image/qcow2/qcow2.h"

#define QCOW2_MAX_RUNS 8u

struct qcow2_unit_run {
	uint32_t first; /* entry's number in the unit */
	uint32_t step;  /* 1: each entry's host offset is a cluster behind the one before */
	uint64_t entry, bitmap;
};

struct qcow2_unit {
	struct qcow2_block block; /* only an array is ever dirty */
	uint64_t index;
	uint32_t seq;  /* 16-byte entries: odd while one is being changed (atomic) */
	uint32_t runs; /* 0: an array */
	bool used;     /* looked at since the last round of dropping (atomic, relaxed) */
	size_t memory; /* bytes */
	TAILQ_ENTRY(qcow2_unit) link;
	uint64_t words[] __attribute__((aligned(8))); /* entries in host order, atomic; or runs */
};

struct qcow2_units {
	TAILQ_HEAD(qcow2_unit_list, qcow2_unit) all;
	struct ox_ranges loading; /* by index: one fiber loads a unit */
	uint64_t budget;          /* bytes */
	bool trimming;            /* a fiber in the background drops units; lock */
	struct ox_timer idle_timer;
	struct ox_image_channel *idle_channel; /* whose loop the timer is on; lock */
	void **old_arrays;                     /* replaced by larger ones; freed at close */
	unsigned old_array_count;
	struct qcow2_unit_list retired; /* out of use, until everybody has left lookup; lock */
};

static inline uint32_t qcow2_unit_entries(const struct qcow2 *q)
{
	return q->block_bytes / q->entry_bytes;
}

static inline struct qcow2_unit_run *qcow2_unit_runs(struct qcow2_unit *unit)
{
	return (struct qcow2_unit_run *)(void *)unit->words;
}

/* One entry as it is now.  False: it is being changed at this moment (only without the lock). */
bool qcow2_unit_get(const struct qcow2 *q, struct qcow2_unit *unit, uint32_t i, uint64_t *entry,
                    uint64_t *bitmap);
/* The unit as an array, in memory and in its place; NULL: not in memory.  Lock held. */
struct qcow2_unit *qcow2_unit_array(struct ox_image_channel *channel, uint64_t index);
/* Changes one entry of an array and dirties it.  Lock held. */
void qcow2_unit_set(struct qcow2 *q, struct qcow2_unit *unit, uint32_t i, uint64_t entry,
                    uint64_t bitmap, bool after_data);
/* A new array of unallocated entries, in its place.  Lock held. */
struct qcow2_unit *qcow2_unit_new(struct ox_image_channel *channel, uint64_t index,
                                  uint64_t store_offset);
/* Loads a unit of an existing table, if it is not in memory.  0 or -errno. */
int qcow2_unit_load_co(struct ox_image_channel *channel, uint64_t index) OX_MUST_CHECK;

/* Drops what is too much, in the background.  Lock not held. */
void qcow2_units_trim(struct ox_image_channel *channel);
/* May the entry stand in the file, as far as memory knows?  Lock held. */
bool qcow2_entry_is_sane(struct qcow2 *q, uint64_t guest_cluster, uint64_t entry, uint64_t bitmap);
/* map.c: the bytes of the file that a compressed cluster's entry names. */
void qcow2_compressed_range(const struct qcow2 *q, uint64_t entry, uint64_t *host, uint32_t *bytes);

#endif
