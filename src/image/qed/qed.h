/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * qed (QEMU's docs/interop/qed_spec.rst): what the driver's files share.
 *
 *   header.c       bytes of the header <-> struct qed_header; pure
 *   open.c         the table of ops: opening, the first change, finishing
 *   map.c          tables in memory: lookup, loading, budget, dropping
 *   update.c       changed entries to the file; what several fibers wait for together
 *   write.c        space for writes, zeroes
 *   check.c        the consistency check, and repair
 *   maintenance.c  create, resize, info
 *
 * The map: an L1 table of offsets of L2 tables of offsets of clusters; both kinds of table have
 * `table_size` clusters.  Tables are held in blocks of at most 64 KiB, since one table can be as
 * large as 1 GiB.  L1's blocks are all in memory, L2's in a hash table within a budget.
 *
 * Locking.  `lock` guards everything mutable unless it says otherwise; it is held for work in
 * memory only, never across a suspension.  lookup takes no lock: it reads L1, the hash chains and
 * the entries of blocks with atomics; a block that was unlinked is freed after a grace period.
 *
 * A change of the map goes to the file before anybody sees it in memory (update.c), so a process
 * that is killed loses nothing that was answered, and nothing is ever dirty in memory.
 *
 * Crash ordering.  The mark "need check" is durable from before the first change to a clean end.
 * Whoever finds it (here: open_co, or begin_co) removes entries that point behind the file's end:
 * the file's new size was lost together with what they showed.  What stays is safe because
 *   Q1  an entry is written after the data it shows is durable, unless the old content was zero and
 *       the space is fresh: behind the file's former end, where a lost write reads as zero;
 *   Q2  tables and data are only placed behind the file's end (or in space that was taken there by
 *       this process and never shown to anybody), so no entry that got lost or was cleared can
 *       come to point to another's bytes;
 *   Q3  a repair is durable before new space is taken.
 */
#ifndef OX_IMAGE_QED_H
#define OX_IMAGE_QED_H

#include "image/format.h"
#include "base/fiber.h"
#include <pthread.h>

/* --- the file format ----------------------------------------------------------------------------
 */

#define QED_MAGIC        0x00444551u /* "QED\0" */
#define QED_HEADER_BYTES 64u

#define QED_F_BACKING_FILE 0x01u
#define QED_F_NEED_CHECK   0x02u
#define QED_F_NO_PROBE     0x04u /* the backing file is raw */
#define QED_F_KNOWN        0x07u

#define QED_MIN_CLUSTER (1u << 12)
#define QED_MAX_CLUSTER (1u << 26)
#define QED_MAX_TABLE   16u   /* clusters */
#define QED_MAX_NAME    1023u /* bytes of the backing file's name, as QEMU has it */

/* Entries. */
#define QED_UNALLOCATED 0u
#define QED_ZERO        1u
/* Never in a file: an entry there was not valid.  (With "need check" it is unallocated instead, as
 * it will be after the repair that comes before the first change.) */
#define QED_INVALID UINT64_MAX

struct qed_header {
	uint32_t cluster_size, table_size, header_size; /* bytes; clusters; clusters */
	uint64_t features, compat_features, autoclear_features;
	uint64_t l1_offset, image_size;
	uint32_t backing_offset, backing_bytes;
};

/* Pure.  `data`: the file's first bytes, `bytes` of them; `file_bytes`: how many it has.  `what`
 * names the image in messages. */
int qed_header_parse(const uint8_t *data, size_t bytes, uint64_t file_bytes, const char *what,
                     struct qed_header *header, struct ox_error *err) OX_MUST_CHECK;
void qed_header_encode(const struct qed_header *header, uint8_t out[QED_HEADER_BYTES]);
/* The largest disk that tables of this kind can map, bytes; at most INT64_MAX. */
uint64_t qed_max_size(uint32_t cluster_size, uint32_t table_size);

static inline uint64_t qed_table_bytes(const struct qed_header *header)
{
	return (uint64_t)header->cluster_size * header->table_size;
}

/* --- waiting together ------------------------------------------------------------------------- */

/* Work that serves everybody who asked before it began: the first who asks does it, who comes
 * meanwhile waits for the next round, which one of them does for all.  Guarded by qed->lock. */
struct qed_waiter {
	struct ox_post post;
	struct ox_loop *loop;
	struct ox_fiber *fiber;
	uint64_t round;
	int result;
	bool leads;
	TAILQ_ENTRY(qed_waiter) link;
};
struct qed_rounds {
	uint64_t begun;
	bool running;
	TAILQ_HEAD(, qed_waiter) waiters;
};

/* --- in memory -------------------------------------------------------------------------------- */

#define QED_BLOCK_MAX (64u << 10) /* bytes */
#define QED_PIECE     4096u       /* bytes; what is written of a block as one */

/* Entries that shall become base, base + step, ...; on a fiber's stack while they are written. */
struct qed_change {
	uint32_t first, count;
	uint64_t base, step;
	TAILQ_ENTRY(qed_change) link;
};

/* Part of a table. */
struct qed_block {
	struct qed_block *next; /* of the hash chain; atomic */
	struct qed_block *dead; /* the next one that waits for the grace period */
	uint64_t key;           /* L2: guest cluster number >> q->block_shift */
	uint64_t store_offset;
	bool ready;      /* atomic; false: `entries` means nothing yet */
	bool referenced; /* relaxed; looked at since the last round of dropping */
	unsigned users;  /* fibers that hold it; not dropped meanwhile */
	TAILQ_HEAD(, qed_change) changes;
	struct qed_rounds writes, loads;
	uint64_t entries[]; /* host order; atomic, written under the lock */
};

/* The blocks of L1 as lookup sees them; replaced as a whole when the disk grows. */
struct qed_l1 {
	struct qed_l1 *former; /* kept to the end: lookups may still be in it */
	uint64_t count;        /* entries that the disk's size needs */
	unsigned block_count;
	struct qed_block *blocks[];
};

/* An L2 table that was given space and is not in L1 yet. */
struct qed_new_table {
	uint64_t index, offset;
	LIST_ENTRY(qed_new_table) link;
};

#define QED_SPARE_MAX 64u

struct qed {
	struct ox_image *image;
	/* features change, and image_size, by one fiber at a time. */
	struct qed_header header;

	/* Constant. */
	unsigned cluster_shift;
	unsigned table_shift; /* log2 of a table's entries */
	unsigned block_shift; /* log2 of a block's entries */
	uint32_t cluster_size;
	uint32_t block_bytes;
	uint32_t block_entries;
	uint64_t table_bytes;
	uint64_t budget; /* bytes of L2 blocks */

	pthread_mutex_t lock;

	/* Atomic.  The map is not what it must be: reads go on, nothing is written any more, and
	 * the mark stays. */
	bool damaged;
	bool damage_said; /* atomic */
	/* "need check" was found, and no check has come yet (atomic). */
	bool unchecked;
	bool begun;
	/* A write of a table failed: what stands there is old or new. */
	bool table_unsure;

	struct qed_l1 *l1; /* atomic */
	uint64_t *tables;  /* offsets of all L2 tables, ascending */
	size_t table_count, table_room;
	LIST_HEAD(, qed_new_table) new_tables;

	struct qed_block **buckets; /* atomic pointers */
	size_t bucket_count;        /* a power of two */
	size_t hand;                /* the next bucket to drop from */
	uint64_t cached;            /* bytes of L2 blocks */
	bool dropping;

	/* Entries of the file are below `end`: whole clusters, up to the file's end when it was
	 * opened, then up to what was given out.  The file itself reaches to `grown`. */
	uint64_t end, grown;
	uint64_t wanted; /* somebody waits for the file to reach so far */
	struct qed_rounds growing, flushing;
	/* Clusters given out and never shown: they may hold anything. */
	uint64_t spare[QED_SPARE_MAX];
	unsigned spare_count;

	uint64_t published; /* changes of the map so far: for metadata_dirty */
};

/* The disk's, bytes. */
static inline uint64_t qed_size(const struct qed *q)
{
	return __atomic_load_n(&q->image->size, __ATOMIC_ACQUIRE);
}

static inline struct qed *qed_of(const struct ox_image_channel *channel)
{
	return channel->image->priv;
}

/* --- open.c ----------------------------------------------------------------------------------- */

/* The map is damaged: logs why, once; from now on writes fail.  Answers -EIO.  Any thread, the lock
 * may be held. */
int qed_damaged(struct qed *q, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static inline bool qed_is_damaged(const struct qed *q)
{
	return __atomic_load_n(&q->damaged, __ATOMIC_RELAXED);
}
static inline bool qed_is_unchecked(const struct qed *q)
{
	return __atomic_load_n(&q->unchecked, __ATOMIC_RELAXED);
}
static inline void qed_set_unchecked(struct qed *q, bool unchecked)
{
	__atomic_store_n(&q->unchecked, unchecked, __ATOMIC_RELAXED);
}
/* Writes the header as it is in memory and flushes. */
int qed_write_header_co(struct ox_image_channel *channel) OX_MUST_CHECK;

/* --- map.c ------------------------------------------------------------------------------------ */

/* Reads L1 and makes the (empty) cache. */
int qed_map_init_co(struct ox_image_channel *channel, uint64_t budget, struct ox_error *err)
        OX_MUST_CHECK;
void qed_map_free(struct qed *q);
/* Makes L1 in memory large enough for a disk of `size` bytes. */
int qed_map_grow_co(struct ox_image_channel *channel, uint64_t size) OX_MUST_CHECK;
int qed_lookup(struct ox_image *image, uint64_t offset, uint64_t length, struct ox_extent *extent);
int qed_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
               struct ox_extent *extent);

/* The block with the entry of a guest cluster, ready and held (users), its table at `table`. */
int qed_get_block_co(struct ox_image_channel *channel, uint64_t cluster, uint64_t table,
                     struct qed_block **block) OX_MUST_CHECK;
void qed_put_block(struct qed *q, struct qed_block *block);

/* QED_INVALID behind L1's end. */
uint64_t qed_l1_entry(const struct qed *q, uint64_t index);
struct qed_block *qed_l1_block(const struct qed *q, uint64_t index);
static inline uint64_t qed_entry(const struct qed_block *block, uint64_t index)
{
	return __atomic_load_n(&block->entries[index], __ATOMIC_ACQUIRE);
}
static inline bool qed_is_data(uint64_t entry)
{
	return entry > QED_ZERO && entry != QED_INVALID;
}

/* May this stand in L1, in an L2 table?  Lock held.  The second knows of the tables in L1. */
bool qed_table_offset_is_valid(const struct qed *q, uint64_t offset);
bool qed_cluster_offset_is_valid(const struct qed *q, uint64_t offset);
/* Does [offset, offset + bytes) touch an L2 table?  Lock held. */
bool qed_touches_table(const struct qed *q, uint64_t offset, uint64_t bytes);
/* A new table, behind all others.  Lock held; false: no memory. */
bool qed_add_table(struct qed *q, uint64_t offset);
/* After a repair changed the file: memory follows.  L1 entry `index`, or the entry of a cluster. */
void qed_patch_l1(struct qed *q, uint64_t index, uint64_t value);
void qed_patch_l2(struct qed *q, uint64_t cluster, uint64_t value);

/* --- update.c --------------------------------------------------------------------------------- */

void qed_rounds_init(struct qed_rounds *rounds);
/* Suspends until a round of fn_co(channel, arg) that began after this call has ended; its value.
 * All callers of one `rounds` bring the same fn_co. */
int qed_round_co(struct ox_image_channel *channel, struct qed_rounds *rounds,
                 int (*fn_co)(struct ox_image_channel *channel, void *arg), void *arg)
        OX_MUST_CHECK;
/* Everything written before the call is durable; callers share flushes. */
int qed_flush_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* Writes the change to the file and then shows it in memory.  Nobody else changes these entries. */
int qed_update_co(struct ox_image_channel *channel, struct qed_block *block,
                  struct qed_change *change) OX_MUST_CHECK;
/* Puts `table` into L1 unless it is there. */
int qed_link_table_co(struct ox_image_channel *channel, uint64_t index, uint64_t table)
        OX_MUST_CHECK;

/* --- write.c ---------------------------------------------------------------------------------- */

int qed_prepare_co(struct ox_image_channel *channel, struct ox_allocation *a);
int qed_publish_co(struct ox_image_channel *channel, struct ox_allocation *a);
void qed_abort(struct ox_image_channel *channel, struct ox_allocation *a);
int qed_zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length, bool unmap);
/* May what is unallocated at this offset and behind it read as something else than zero? */
bool qed_has_backing_at(const struct qed *q, uint64_t offset);
/* `bytes` (whole clusters) of fresh space behind the file's end. */
int qed_take_space_co(struct ox_image_channel *channel, uint64_t bytes, uint64_t *offset)
        OX_MUST_CHECK;

/* --- check.c ---------------------------------------------------------------------------------- */

int qed_check_co(struct ox_image_channel *channel, struct ox_image_check *check,
                 struct ox_error *err);
/* "need check" was found: removes what a power cut leaves, and clears the mark if nothing else is
 * wrong; else the image is damaged from now on. */
int qed_repair_mark_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;

/* --- maintenance.c ---------------------------------------------------------------------------- */

extern const struct ox_format_maintenance qed_maintenance;

#endif
