/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The allocator's files among themselves; nobody else includes it.
 *
 *   ranges.c    which clusters of the file are metadata
 *   reftable.c  the refcount table; new space at the file's end (the frontier)
 *   refcount.c  refcount blocks in memory, changes to them, writing them out
 *   alloc.c     the reserve: clusters that are counted and not yet given out
 *   batch.c     filling it, and giving it back
 *   free.c      clusters given back, and free space inside the file
 *   leak.c      clusters that nothing refers to after an unclean end
 *
 * Locking.  The gate lets one fiber (of any thread) at a time load or change refcounts, the
 * refcount table and the frontier; it is held across suspensions.  What it protects in memory is
 * changed under q->lock too, so it may be read with either.  Everything else here is under q->lock.
 * Order: `background`, the gate, q->lock.
 */
#ifndef OX_IMAGE_QCOW2_ALLOC_H
#define OX_IMAGE_QCOW2_ALLOC_H

#include "image/qcow2/qcow2.h"

/* A part of a refcount block: block_bytes of it, as they stand in the file. */
struct qcow2_part {
	struct qcow2_block block;
	uint64_t index; /* of the part: first cluster >> part_shift */
	uint8_t *bytes;
	LIST_ENTRY(qcow2_part) hash;
	TAILQ_ENTRY(qcow2_part) age;
};
LIST_HEAD(qcow2_part_bucket, qcow2_part);
TAILQ_HEAD(qcow2_part_list, qcow2_part);
#define QCOW2_PART_BUCKETS 1024u
/* Memory for parts; more only while they are dirty. */
#define QCOW2_PARTS_MAX (1u << 20)

/* Clusters in a row; numbers, not bytes. */
struct qcow2_run {
	uint64_t first, count;
};
/* Of the reserve: counted, durable, and nobody's. */
struct qcow2_space {
	uint64_t first, count;
	bool zeroed;
	TAILQ_ENTRY(qcow2_space) link;
};
TAILQ_HEAD(qcow2_space_list, qcow2_space);

/* Bytes that the map no longer refers to. */
struct qcow2_note {
	uint64_t host, bytes;
	uint64_t number; /* of commits that had begun */
};

/* A channel's own slice of the reserve: channel->priv. */
struct qcow2_slice {
	struct ox_image_channel *channel;
	uint64_t first, count; /* clusters */
	bool zeroed;
	/* Starts what take and freed_durable ask for, when the lock is not held any more. */
	struct ox_deferred deferred;
	bool start_refill, start_release;
	TAILQ_ENTRY(qcow2_slice) link;
};

struct qcow2_word; /* ranges.c */

struct qcow2_allocator {
	/* Constant after init. */
	uint32_t part_shift, block_shift; /* a part, a block counts 1 << shift clusters */
	bool fixed;                       /* a device: cannot grow */
	bool damaged;                     /* the refcount table is: nothing can be allocated */
	struct ox_ranges gate;            /* one range: [0, 1) */
	/* Shared: a fiber in the background; exclusive: finishing, which waits for them. */
	struct ox_ranges background;

	/* The refcount table, host order.  With the gate. */
	uint64_t *table;
	uint32_t table_entries;          /* room in the clusters that it takes */
	uint32_t table_first, table_end; /* entries that differ from the file's */
	uint64_t table_offset;           /* where it stands */
	uint32_t table_clusters;
	uint64_t old_table_offset;   /* it moved: the header still says this one */
	uint32_t old_table_clusters; /* 0: it did not */
	bool table_uncertain;        /* the header may say either: a write of it failed */

	/* Parts in memory.  With the gate; looked up with either. */
	struct qcow2_part_bucket parts[QCOW2_PART_BUCKETS];
	struct qcow2_part_list ages; /* the longest unused first */
	size_t part_memory;

	/* The frontier.  With the gate. */
	bool begun;              /* it is known */
	uint64_t frontier;       /* cluster */
	uint64_t first_frontier; /* as it was when writing began */

	/* Metadata's clusters (ranges.c). */
	struct qcow2_word *words;
	size_t word_room, word_count;
	uint64_t word_seed;

	/* The reserve. */
	struct qcow2_space_list data, tables, spare;
	uint64_t data_left, tables_left;   /* clusters; data with the slices */
	uint64_t data_batch, tables_batch; /* clusters of a batch */
	uint64_t last_refill_ns;
	bool refilling; /* in the background */
	int failed;     /* how the last refill failed; 0: it did not */
	bool finishing;
	TAILQ_HEAD(, qcow2_slice) slices;

	/* Given back: a ring of notes; numbers count from the start of time. */
	struct qcow2_note *notes;
	uint64_t notes_room; /* a power of two */
	uint64_t notes_head, notes_ready, notes_tail;
	bool releasing; /* in the background */

	/* Free space below first_frontier or given back; with the gate.  Sorted. */
	struct qcow2_run *free_runs;
	unsigned free_count;
	uint64_t scan_cursor, scan_end; /* clusters still to be looked at for free ones */

	/* The leak scan runs: free space stays untouched, notes stay where they are. */
	bool leak_scan;
	bool leak_unsure; /* another pass is needed when nothing changes any more */
};

#define QCOW2_FREE_RUNS_MAX 4096u

static inline struct qcow2 *qcow2_of(struct ox_image_channel *channel)
{
	return channel->image->priv;
}

static inline void qcow2_gate_enter_co(struct qcow2_allocator *a, struct ox_range *range,
                                       struct ox_image_channel *channel)
{
	*range = (struct ox_range){.start = 0, .end = 1, .exclusive = true, .loop = channel->loop};
	ox_range_acquire_co(&a->gate, range);
}
static inline void qcow2_gate_leave(struct qcow2_allocator *a, struct ox_range *range)
{
	ox_range_release(&a->gate, range);
}

/* ranges.c.  Lock held. */
void qcow2_metadata_init(struct qcow2_allocator *a);
void qcow2_metadata_free(struct qcow2_allocator *a);
bool qcow2_is_metadata(const struct qcow2_allocator *a, uint64_t cluster);

/* refcount.c */
void qcow2_parts_init(struct qcow2_allocator *a);
void qcow2_parts_free(struct qcow2_allocator *a);
/* Gate held.  *part: NULL if no block counts these clusters (all are 0). */
int qcow2_part_get_co(struct ox_image_channel *channel, uint64_t index, struct qcow2_part **part)
        OX_MUST_CHECK;
enum qcow2_count { QCOW2_COUNT_UP, QCOW2_COUNT_DOWN, QCOW2_COUNT_CLEAR };
/* Gate held.  Changes [first, first + count) by one each, or to 0; dirty.  What becomes 0 is told.
 * Underflow: -EUCLEAN, and the rest is done all the same.  Overflow: -ERANGE. */
int qcow2_count_co(struct ox_image_channel *channel, uint64_t first, uint64_t count,
                   enum qcow2_count how, void (*freed)(void *arg, uint64_t first, uint64_t count),
                   void *arg) OX_MUST_CHECK;
/* Gate held.  All dirty parts to the file, also those that a commit is writing; not flushed. */
int qcow2_parts_write_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* Gate held, no part in use. Writes dirty parts out if they are too many, and drops what is clean.
 */
int qcow2_parts_trim_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* Of a part in memory.  Lock or gate held. */
uint64_t qcow2_part_count(const struct qcow2 *q, const struct qcow2_part *part, uint64_t cluster);

/* reftable.c */
int qcow2_reftable_init_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;
/* Gate held.  Finds the frontier if it is not known. */
int qcow2_frontier_begin_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* Gate held.  Moves the frontier: `clusters` in a row from *first are counted, in memory, and so is
 * what refcount structures that takes.  Nobody may have them before qcow2_settle_co(). -ENOSPC: not
 * so many. */
int qcow2_frontier_take_co(struct ox_image_channel *channel, uint64_t clusters, uint64_t *first,
                           bool *zeroed) OX_MUST_CHECK;
/* Gate held.  All refcounts, and what leads to them, are durable. */
int qcow2_settle_co(struct ox_image_channel *channel) OX_MUST_CHECK;

/* free.c */
void qcow2_free_init(struct qcow2_allocator *a);
void qcow2_free_end(struct qcow2_allocator *a);
/* Gate held.  These have refcount 0 and are nobody's. */
void qcow2_free_run_add(struct qcow2_allocator *a, uint64_t first, uint64_t count);
/* Gate held.  Counts up to `want` clusters of free space, in memory; they are appended to `list`.
 * Nobody may have them before qcow2_settle_co(). */
int qcow2_free_take_co(struct ox_image_channel *channel, uint64_t want,
                       struct qcow2_space_list *list, uint64_t *got) OX_MUST_CHECK;
/* Gives back what is noted and durable, up to note `upto`.  Gate not held. */
int qcow2_release_co(struct ox_image_channel *channel, uint64_t upto) OX_MUST_CHECK;
/* As qcow2_free_later().  Lock held. */
void qcow2_note_free(struct qcow2 *q, uint64_t host, uint64_t bytes);
/* The background's fiber. */
void qcow2_release_fiber_co(struct ox_image_channel *channel, void *arg);

/* leak.c: what the scan could not tell beside the guest's writes.  The reserve is given back,
 * nothing is in flight. */
void qcow2_leak_finish_co(struct ox_image_channel *channel);

/* alloc.c: to a list, from a->spare or new; false: no memory.  Lock held. */
bool qcow2_space_add(struct qcow2_allocator *a, struct qcow2_space_list *list, uint64_t first,
                     uint64_t count, bool zeroed);
/* Up to `want` clusters from the list's head; 0: it is empty.  Lock held. */
uint64_t qcow2_space_take(struct qcow2_allocator *a, struct qcow2_space_list *list, uint64_t want,
                          uint64_t *first, bool *zeroed);
/* The slice has at least one cluster, `want` if that is possible.  Lock held. */
bool qcow2_slice_fill(struct qcow2 *q, struct qcow2_slice *slice, uint64_t want);
/* Half of the last batch is used.  Lock held. */
bool qcow2_wants_refill(const struct qcow2 *q);
#define QCOW2_FIRST_TABLES 8u /* of the first batch */

/* batch.c: starts what a slice's flags say.  Lock not held. */
void qcow2_slice_run_deferred(struct ox_deferred *deferred);

/* alloc.c: has the channel's loop start what the slice's flags say.  Lock held; channel's thread.
 */
void qcow2_slice_kick(struct qcow2_slice *slice);

#endif
