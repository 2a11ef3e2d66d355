/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Checking and repairing qcow2 images: what the check_*.c files share.
 *
 *   check.c          the order of things: a look, a repair, a second look
 *   check_map.c      small counters, one a cluster
 *   check_read.c     metadata from the store, with several reads in flight
 *   check_walk.c     L1 and L2 tables: what they refer to
 *   check_tables.c   header, snapshot table, bitmaps: what else refers to clusters
 *   check_refs.c     refcounts as the file has them, and the comparison
 *   check_fix.c      entries that cannot be right
 *   check_repair.c   refcounts and COPIED flags set right
 *   check_rebuild.c  new refcount structures
 *
 * Nothing here trusts what other parts hold in memory: of struct qcow2 only the header is used,
 * everything else is read from the store.  Nothing else uses the image meanwhile.
 *
 * Memory.  A cluster takes 2 bits for the references that were counted and 2 for what the file
 * says (8 MiB for 1 TiB of 64 KiB clusters); a repair takes 2 more.  Where 16,384 neighbours have a
 * cluster with more than 3 references, theirs take 8 bits each (then 16, 32).  Images whose maps
 * would exceed CHECK_MAP_BYTES are done in passes, a window of clusters each.  Besides: the active
 * L1 table twice (at most 48 MiB), a snapshot's L1 table, the refcount table, 4 to 8 MiB of read
 * buffers.
 */
#ifndef OX_IMAGE_QCOW2_CHECK_H
#define OX_IMAGE_QCOW2_CHECK_H

#include "image/qcow2/qcow2.h"

#define CHECK_MAP_BYTES (256u << 20)
extern uint64_t check_map_budget; /* CHECK_MAP_BYTES, but for tests */
/* Damaged or hostile tables can make counters wide: beyond this the check gives up. */
#define CHECK_MAP_LIMIT ((size_t)768 << 20)

/* --- check_map.c ----------------------------------------------------------------------------- */

#define CHECK_CHUNK_SHIFT 14 /* clusters of a chunk */
#define CHECK_CHUNK       (1u << CHECK_CHUNK_SHIFT)
#define CHECK_CHUNK_WORDS (CHECK_CHUNK / 32) /* with 2 bits each */

struct check_chunk {
	void *data;    /* NULL: all zero */
	uint32_t bits; /* of a counter: 2, 8, 16 or 32 */
};
/* Counters for the clusters [first, first + count).  What lies outside is left alone, and is 0. */
struct check_map {
	struct check_chunk *chunks;
	uint64_t first, count;
	size_t bytes;
};

int check_map_init(struct check_map *map, uint64_t first, uint64_t count) OX_MUST_CHECK;
void check_map_free(struct check_map *map);
/* Adds `by` to each; they become wider as needed and stop at 2^32 - 1. */
int check_map_add(struct check_map *map, uint64_t first, uint64_t count, uint32_t by) OX_MUST_CHECK;
/* One less for a cluster that is counted. */
void check_map_drop(struct check_map *map, uint64_t cluster);
uint32_t check_map_get(const struct check_map *map, uint64_t cluster);
/* For maps that are never added to; value 0 to 3. */
int check_map_set(struct check_map *map, uint64_t first, uint64_t count, unsigned value)
        OX_MUST_CHECK;
bool check_map_all(const struct check_map *map, uint64_t first, uint64_t count, unsigned value);
bool check_map_none(const struct check_map *map, uint64_t first, uint64_t count, unsigned value);
/* Do the clusters of a chunk (index in the map) have the same values below 3 in both? */
bool check_map_same(const struct check_map *a, const struct check_map *b, uint64_t chunk);
/* The last cluster that is not 0 in one of them, plus 1; 0: none. */
uint64_t check_map_end(const struct check_map *a, const struct check_map *b);

/* --- the check -----------------------------------------------------------------------------------
 */

/* What the map `kinds` says of a cluster (repair only). */
enum check_kind {
	CHECK_KIND_NONE,     /* data, or nothing */
	CHECK_KIND_TABLE,    /* an L2 table */
	CHECK_KIND_METADATA, /* other metadata */
	CHECK_KIND_DOUBTFUL, /* an L1 entry says it is an L2 table; something speaks against it */
};

struct check_snapshot {
	uint64_t l1_offset;
	uint32_t l1_entries;
	uint32_t at, bytes; /* of its entry in the table */
	uint32_t extra_bytes;
	bool usable; /* its L1 table may be read */
};

struct check_bitmap {
	uint64_t table_offset;
	uint32_t table_entries;
	uint32_t at, bytes; /* of its entry in the directory */
	bool usable;
};

struct qcow2_check {
	struct ox_image_channel *channel;
	struct qcow2 *q;
	struct ox_image_check *out;
	const char *what;

	/* From the header. */
	unsigned cluster_bits, refcount_bits;
	uint32_t cluster_size, entry_bytes, table_entries;
	uint64_t refcount_max, per_block; /* clusters of a refcount block */
	bool extended, data_file, has_zero_flag;
	unsigned csize_shift; /* compressed entries */
	uint64_t csize_mask, coffset_mask;

	uint64_t file_bytes, clusters; /* of the file; the last may be in part */

	/* What is counted and said. */
	bool first;   /* first window: findings that belong to no cluster are counted now */
	bool quiet;   /* nothing is counted as a finding nor said */
	bool careful; /* references that cannot be right are not counted; kinds is filled */
	bool without_refcounts; /* the refcount structures are about to go: they do not count */
	bool one_by_one;        /* tables are changed: nothing is read ahead */

	bool leaks_only; /* repair: errors stay, and it is known that there are some */

	struct check_map counted, stored, kinds;
	uint64_t window;    /* clusters */
	uint64_t end;       /* behind the last cluster in use */
	uint64_t free_from; /* for new clusters where the file cannot grow */
	uint64_t far_end;   /* behind the last cluster that a window must cover */

	uint64_t *reftable; /* host order */
	uint32_t reftable_entries;
	/* Behind the last cluster that the table has a block for: in a file that was cut off,
	 * tables refer to clusters up to here. */
	uint64_t reach;
	bool reftable_usable; /* it lies in the file, aligned */
	bool rebuild;         /* the refcount structures cannot be mended in place */

	uint64_t *l1; /* active, host order */
	uint32_t l1_entries;
	uint32_t *shared; /* how many snapshots have the same table at the same index */
	uint32_t shared_entries;
	bool l1_usable;

	uint8_t *snapshot_table;
	uint64_t snapshot_bytes;
	struct check_snapshot *snapshots;
	uint32_t snapshot_count;
	bool snapshots_damaged; /* entries are to be dropped or completed */

	uint8_t *bitmap_directory;
	uint64_t bitmap_bytes;
	struct check_bitmap *bitmaps;
	uint32_t bitmap_count;
	bool bitmaps_damaged;
	bool luks_sure;     /* there is a LUKS header where the header says so */
	bool bitmaps_stale; /* the directory is there, its autoclear bit is not */

	bool incomplete; /* something could not be read: what looks unused may be in use */

	uint8_t *block;       /* the refcount block that was read last */
	uint64_t block_index; /* UINT64_MAX: none */

	uint64_t progress_done, progress_total, progress_said;
};

/* The words for an error while checking; never counted twice for one call. */
void check_say(struct qcow2_check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* A finding: says it and counts `times` corruptions. */
void check_corrupt(struct qcow2_check *c, uint64_t times, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));
/* Something could not be checked. */
void check_failed(struct qcow2_check *c, const char *fmt, ...)
        __attribute__((format(printf, 2, 3)));
void check_progress(struct qcow2_check *c, uint64_t bytes);
static inline uint64_t check_cluster(const struct qcow2_check *c, uint64_t offset)
{
	return offset >> c->cluster_bits;
}
static inline bool check_is_aligned(const struct qcow2_check *c, uint64_t offset)
{
	return !(offset & (c->cluster_size - 1));
}
/* Does a cluster-aligned offset lie in the file (its last cluster may be cut off)? */
static inline bool check_in_file(const struct qcow2_check *c, uint64_t offset)
{
	return check_cluster(c, offset) < c->clusters;
}
/* May [offset, offset + bytes) be referred to?  The file's last cluster may be missing in part. */
bool check_region_in_file(const struct qcow2_check *c, uint64_t offset, uint64_t bytes);

/* --- check_read.c
 * --------------------------------------------------------------------------------- */

struct check_piece {
	uint64_t offset;
	uint32_t bytes;  /* at most CHECK_PIECE or a cluster, whichever is more */
	uint64_t tag[2]; /* the caller's */
};
#define CHECK_PIECE (256u << 10)

/* Reads; what lies behind the file's end is zero. */
int check_read_co(struct qcow2_check *c, uint64_t offset, void *buf, size_t bytes) OX_MUST_CHECK;
/* Calls next() for pieces, reads several ahead, and calls use_co() for each in order, with its
 * bytes and how the read ended.  Either's error ends it. */
int check_read_all_co(struct qcow2_check *c, bool (*next)(void *arg, struct check_piece *piece),
                      int (*use_co)(void *arg, const struct check_piece *piece, uint8_t *data,
                                    int rc),
                      void *arg) OX_MUST_CHECK;
/* A table of big-endian numbers, host order, malloc'd (NULL with 0 entries). */
int check_read_table_co(struct qcow2_check *c, uint64_t offset, uint32_t entries, uint64_t **table)
        OX_MUST_CHECK;

/* --- check_walk.c
 * --------------------------------------------------------------------------------- */

/* What an L2 entry is. */
enum check_entry_kind {
	CHECK_ENTRY_NONE, /* unallocated or plain zero */
	CHECK_ENTRY_DATA, /* a cluster at `offset`, also one that is reserved under zeroes */
	CHECK_ENTRY_COMPRESSED,
};
struct check_entry {
	enum check_entry_kind kind;
	uint64_t raw, bitmap;
	uint64_t offset, bytes; /* DATA, COMPRESSED: in the store */
	bool copied;
	/* What is wrong with it. */
	bool reserved_bits, bad_bitmap, unaligned, outside, copied_compressed, impossible;
};
void check_parse_entry(const struct qcow2_check *c, uint64_t raw, uint64_t bitmap,
                       struct check_entry *e);
/* It never was an L2 entry. */
bool check_entry_is_wrong(const struct qcow2_check *c, const struct check_entry *e);
/* As an L1 entry: may its table be used?  (Not looking at what else is there.) */
bool check_l1_entry_valid(const struct qcow2_check *c, uint64_t raw);

/* An address that was right once, before the file was cut off? */
static inline bool check_is_plausible(const struct qcow2_check *c, uint64_t offset)
{
	return check_is_aligned(c, offset) &&
	       check_cluster(c, offset) < ox_max(c->clusters, c->reach);
}
/* Of so many entries that are not 0, so many never were right. */
static inline bool check_table_is_doubtful(uint32_t entries, uint32_t wrong)
{
	return wrong >= 4 && wrong > entries / 2;
}

/* An L1 table and those below it. */
struct check_walk {
	struct qcow2_check *c;
	const uint64_t *l1;
	uint32_t entries;
	bool active;
	/* Called for each table instead of counting; may change `table` (in the file's order) and
	 * says so: then it is written back. */
	int (*visit_co)(struct check_walk *walk, uint32_t index, uint8_t *table, bool *changed);
	void *arg;
	uint32_t at; /* the next index to be read */
};
/* Counts everything that the L1 tables refer to, themselves included. */
int check_count_tables_co(struct qcow2_check *c) OX_MUST_CHECK;
/* Reads the tables of one L1 and calls visit_co. */
int check_walk_co(struct check_walk *walk) OX_MUST_CHECK;
/* What the active L1 shares with the snapshots' is counted with it. */
int check_load_l1_co(struct qcow2_check *c) OX_MUST_CHECK;

/* --- check_tables.c
 * ------------------------------------------------------------------------------- */

int check_load_snapshots_co(struct qcow2_check *c) OX_MUST_CHECK;
int check_load_bitmaps_co(struct qcow2_check *c) OX_MUST_CHECK;
/* Counts a piece of metadata; `metadata`: it is what it is said to be, whatever else may refer to
 * it. */
int check_count_region(struct qcow2_check *c, uint64_t offset, uint64_t bytes, bool metadata)
        OX_MUST_CHECK;
/* Header, snapshot table, LUKS area, bitmaps. */
int check_count_others_co(struct qcow2_check *c) OX_MUST_CHECK;
/* The entries of a bitmap's table that cannot be right become "everything is dirty". */
int check_fix_bitmaps_co(struct qcow2_check *c) OX_MUST_CHECK;
static inline bool check_bitmap_entry_valid(const struct qcow2_check *c, uint64_t entry)
{
	uint64_t offset = entry & QCOW2_OFFSET_MASK;

	if (entry & ~(QCOW2_OFFSET_MASK | 1))
		return false;
	return !offset || (!(entry & 1) && check_is_aligned(c, offset) && check_in_file(c, offset));
}

/* --- check_refs.c
 * --------------------------------------------------------------------------------- */

int check_load_reftable_co(struct qcow2_check *c) OX_MUST_CHECK;
/* Does a refcount table entry name a block that can be read? */
bool check_block_usable(const struct qcow2_check *c, uint64_t index);
/* Fills `stored`. */
int check_load_stored_co(struct qcow2_check *c) OX_MUST_CHECK;
/* Counts the refcount table and blocks; they come last: a block that is anything else too, is
 * unusable. */
int check_count_refcounts(struct qcow2_check *c) OX_MUST_CHECK;
/* A refcount, exactly, as the file has it. */
int check_stored_co(struct qcow2_check *c, uint64_t cluster, uint64_t *refcount) OX_MUST_CHECK;
int check_compare_co(struct qcow2_check *c) OX_MUST_CHECK;

/* --- check.c
 * -------------------------------------------------------------------------------------- */

/* The maps for clusters [first, first + c->window), empty. */
int check_open_window(struct qcow2_check *c, uint64_t first) OX_MUST_CHECK;
/* `stored` and `counted` for the window. */
int check_fill_window_co(struct qcow2_check *c) OX_MUST_CHECK;
/* Moves *first to the next window; false: that was the last. */
bool check_next_window(struct qcow2_check *c, uint64_t *first);
void check_unload(struct qcow2_check *c);
int check_load_co(struct qcow2_check *c) OX_MUST_CHECK;

/* --- repair
 * ---------------------------------------------------------------------------------------- */

int check_write_co(struct qcow2_check *c, uint64_t offset, const void *buf, size_t bytes)
        OX_MUST_CHECK;
int check_flush_co(struct qcow2_check *c) OX_MUST_CHECK;
/* Writes the header's feature bits, with these incompatible ones, durably (version 3). */
int check_mark_co(struct qcow2_check *c, uint64_t incompatible) OX_MUST_CHECK;
/* Clusters that nothing refers to nor counts. */
int check_new_space_co(struct qcow2_check *c, uint64_t clusters, uint64_t *first) OX_MUST_CHECK;
/* New clusters at the file's end for metadata; their refcounts come with the recount. */
int check_append_co(struct qcow2_check *c, const void *buf, size_t bytes, uint64_t *offset)
        OX_MUST_CHECK;
int check_fix_entries_co(struct qcow2_check *c) OX_MUST_CHECK;
/* New tables with what is usable; the header points to them when they are durable. */
int check_fix_snapshot_table_co(struct qcow2_check *c) OX_MUST_CHECK;
int check_fix_bitmap_directory_co(struct qcow2_check *c) OX_MUST_CHECK;
int check_rebuild_co(struct qcow2_check *c) OX_MUST_CHECK;
/* -EUCLEAN: nothing can be done; why was said. */
int check_repair_co(struct qcow2_check *c) OX_MUST_CHECK;

#endif
