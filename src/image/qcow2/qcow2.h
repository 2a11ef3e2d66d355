/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * qcow2, versions 2 and 3 (QEMU's docs/interop/qcow2.rst): what the driver's files share.
 *
 *   header.c    bytes of the header and its extensions <-> struct qcow2_header; pure
 *   open.c      the table of ops, opening; begin.c: beginning to write, finishing
 *   snapshot.c  the snapshot table; bitmap.c: the bitmap directory
 *   unit.c      L2 tables in memory: loading, compact form, budget, dropping
 *   map.c       lookup
 *   write.c     allocate, prepare, publish, zero, discard
 *   commit.c    dirty metadata to the file, in order
 *   refcount.c, reftable.c  refcounts; alloc.c, batch.c: clusters to give out; free.c: given back
 *   ranges.c    which clusters of the file are metadata
 *   leak.c      after an unclean end: finds and frees what no table refers to
 *   record.c    what a killed process leaves in the run directory for the next one
 *   compress.c  deflate and zstd
 *   create.c, resize.c, info.c, check*.c: maintenance
 *
 * Locking.  `lock` guards everything mutable below unless it says otherwise.  It is held for work
 * in memory only, never across a suspension.  lookup takes no lock: it reads `units`, `l1` and the
 * entries of a unit with atomics (16-byte entries under the unit's sequence counter).  A unit that
 * is unlinked is freed after ox_image_grace_co().
 *
 * Crash ordering.  What the file shows after a power cut is safe because of three rules:
 *   R1  A cluster is given out (alloc.c) only when its refcount of 1 is durable.  So whatever map
 *       entries land, in whatever order, refer to clusters that are counted.  Clusters counted and
 *       not referred to are leaks, and the header extension "session" says that there may be some.
 *   R2  An entry that points to new space is written after the data it shows is durable: a commit
 *       whose pieces include one that is `after_data` flushes before it writes.  Spared where the
 * old content was zero and the new space reads as zero in any case. R3  A cluster that the map no
 * longer refers to is given back (its refcount falls, it may be used again) only after the commit
 * that made the removal durable, and a grace period. Metadata itself is only ever placed in
 * never-used space at the file's end (the frontier), so a damaged image's stray entries cannot come
 * to point to it.
 */
#ifndef OX_IMAGE_QCOW2_H
#define OX_IMAGE_QCOW2_H

#include "image/format.h"
#include <pthread.h>

/* --- the file format ----------------------------------------------------------------------------
 */

#define QCOW2_MAGIC 0x514649fbu

#define QCOW2_INCOMPAT_DIRTY        (1ull << 0)
#define QCOW2_INCOMPAT_CORRUPT      (1ull << 1)
#define QCOW2_INCOMPAT_DATA_FILE    (1ull << 2)
#define QCOW2_INCOMPAT_COMPRESSION  (1ull << 3)
#define QCOW2_INCOMPAT_EXTENDED_L2  (1ull << 4)
#define QCOW2_INCOMPAT_KNOWN        0x1full
#define QCOW2_COMPAT_LAZY_REFCOUNTS (1ull << 0)
#define QCOW2_AUTOCLEAR_BITMAPS     (1ull << 0)
#define QCOW2_AUTOCLEAR_DATA_RAW    (1ull << 1)
/* Oxbow's own: set while the extension "session" and the record in the run directory describe the
 * image.  Any other program that writes clears it, as the specification demands of bits that it
 * does not know. */
#define QCOW2_AUTOCLEAR_SESSION (1ull << 62)

#define QCOW2_EXT_END            0u
#define QCOW2_EXT_BACKING_FORMAT 0xe2792acau
#define QCOW2_EXT_FEATURE_NAMES  0x6803f857u
#define QCOW2_EXT_BITMAPS        0x23852875u
#define QCOW2_EXT_LUKS           0x0537be77u
#define QCOW2_EXT_DATA_FILE      0x44415441u
/* Oxbow's: 16 bytes, a random session identity; present from the first write to a clean close.
 * Found at open: the last writer did not close; there may be leaks. */
#define QCOW2_EXT_SESSION 0x4f786277u

#define QCOW2_MIN_CLUSTER_BITS   9u
#define QCOW2_MAX_CLUSTER_BITS   21u
#define QCOW2_MAX_L1_BYTES       (32u << 20)
#define QCOW2_MAX_REFTABLE_BYTES (8u << 20)
#define QCOW2_MAX_SNAPSHOTS      65536u
#define QCOW2_MAX_BITMAPS        65535u

#define QCOW2_ENTRY_COPIED     (1ull << 63)
#define QCOW2_ENTRY_COMPRESSED (1ull << 62)
#define QCOW2_ENTRY_ZERO       1ull /* version 3, standard L2 entries */
#define QCOW2_OFFSET_MASK      0x00fffffffffffe00ull

#define QCOW2_CRYPT_NONE 0u
#define QCOW2_CRYPT_AES  1u
#define QCOW2_CRYPT_LUKS 2u

#define QCOW2_COMPRESSION_DEFLATE 0u
#define QCOW2_COMPRESSION_ZSTD    1u

struct qcow2_extension {
	uint32_t type, bytes;
	uint8_t *data; /* malloc'd */
};

/* The header as it stands in the file; offsets are checked against alignment and limits, not yet
 * against the file's size. */
struct qcow2_header {
	uint32_t version, cluster_bits, crypt_method, l1_entries;
	uint64_t size, l1_offset, refcount_table_offset;
	uint32_t refcount_table_clusters, snapshot_count;
	uint64_t snapshots_offset;
	uint64_t incompatible, compatible, autoclear;
	uint32_t refcount_order, header_bytes;
	uint8_t compression_type;
	uint8_t *unknown; /* header bytes behind those we know, kept as they are; malloc'd */
	uint32_t unknown_bytes;
	char *backing_file, *backing_format, *data_file; /* NULL: none; malloc'd */
	uint64_t backing_offset; /* where the file has its name; 0: not yet anywhere */
	/* All extensions but backing format and data file, in the file's order; those that we do
	 * not know among them. */
	struct qcow2_extension *extensions;
	unsigned extension_count;
	/* Parsed from them. */
	uint64_t luks_offset, luks_bytes; /* 0: none */
	uint32_t bitmap_count;
	uint64_t bitmap_directory_offset, bitmap_directory_bytes;
	bool has_session;
	uint8_t session[16];
};

/* Pure.  `bytes`: the file's first ones, up to one cluster (at least 112 or the file's size; 2 MiB
 * is always enough).  `what` names the image in messages.  On failure *header is empty. */
int qcow2_header_parse(const uint8_t *data, size_t bytes, const char *what,
                       struct qcow2_header *header, struct ox_error *err) OX_MUST_CHECK;
/* The first cluster, `cluster` bytes at out (zero-filled behind).  -ENOSPC: does not fit. */
int qcow2_header_encode(const struct qcow2_header *header, uint8_t *out, size_t cluster)
        OX_MUST_CHECK;
void qcow2_header_free(struct qcow2_header *header);
/* Replaces, adds or (data NULL) removes. */
void qcow2_header_set_extension(struct qcow2_header *header, uint32_t type, const void *data,
                                uint32_t bytes);
/* For a new image of version 3. */
void qcow2_header_add_feature_names(struct qcow2_header *header);

/* --- metadata in memory ---------------------------------------------------------------------- */

/* A block of metadata is kept, dirtied and dropped as one, and written in pieces. */
#define QCOW2_BLOCK_MAX (64u << 10) /* bytes; smaller with smaller clusters */
#define QCOW2_PIECE     4096u       /* bytes; blocks smaller than that are one piece */

struct qcow2_block {
	uint64_t store_offset; /* multiple of its size */
	uint32_t bytes;        /* a power of two, 512 to QCOW2_BLOCK_MAX */
	/* A bit a piece.  dirty: differs from the file.  writing: a write of it is under way (dirty
	 * again meanwhile: both).  `dirty` is written under the lock and may be read without. */
	uint16_t dirty, writing;
	bool after_data; /* one of the dirty pieces shows data that must be durable first (R2) */
	bool listed;     /* on qcow2->dirty_blocks */
	TAILQ_ENTRY(qcow2_block) link;
	/* Writes [offset, offset + bytes) of it, as it stands in the file, to out.  Lock held. */
	void (*encode)(const struct qcow2_block *block, uint32_t offset, uint32_t bytes,
	               uint8_t *out);
};
TAILQ_HEAD(qcow2_block_list, qcow2_block);

struct qcow2_unit;      /* unit.c */
struct qcow2_allocator; /* alloc.c */
struct qcow2_commit;    /* commit.c */
struct qcow2_record;    /* record.c */

struct qcow2_snapshot {
	uint64_t l1_offset;
	uint32_t l1_entries;
	char *id, *name; /* UTF-8 as the file says; malloc'd */
	uint32_t date_seconds, date_ns;
	uint64_t vm_clock_ns;
	uint64_t vm_state_bytes, disk_size;
	uint64_t icount; /* UINT64_MAX: not there */
	uint8_t *extra;  /* all extra data as it stands; malloc'd */
	uint32_t extra_bytes;
	uint64_t entry_offset; /* in the table, bytes */
};

struct qcow2_bitmap {
	char *name;
	uint64_t table_offset;
	uint32_t table_entries, flags; /* flags: 1 in use, 2 auto, 4 extra data compatible */
	uint8_t type, granularity_bits;
	uint64_t entry_offset; /* in the directory, bytes */
};

struct qcow2 {
	struct ox_image *image;
	struct qcow2_header header; /* changed under the lock, by one fiber at a time */

	/* Constant after open (resize changes l1_entries and unit_count: see resize.c). */
	uint32_t cluster_bits, cluster_size;
	uint32_t entry_bytes; /* 8, or 16 with extended L2 */
	uint32_t subclusters; /* of a cluster: 1 or 32 */
	uint32_t subcluster_size;
	uint32_t refcount_bits; /* 1 to 64 */
	uint32_t block_bytes;   /* of a unit and a refcount block's part: min(cluster, 64 KiB) */
	uint32_t unit_shift;    /* a unit maps 1 << unit_shift bytes of the guest's disk */
	uint32_t units_per_table_shift; /* an L2 table (one cluster) is 1 << this units */
	bool data_file; /* external: host offset = guest offset, no refcounts for data */

	pthread_mutex_t lock;         /* adaptive */
	struct ox_ranges header_turn; /* one write of the header at a time */
	bool corrupt;                 /* atomic; no more writes */

	/* L1, host order; atomic, written under the lock. */
	uint64_t *l1;
	uint32_t l1_entries;
	struct qcow2_l1_block *l1_blocks; /* unit.c's: of block_bytes each, over L1 in the file */
	uint64_t *l1_bad; /* a bit an entry: refers to nothing that could be a table; set at open */

	/* By index: NULL not in memory, or there is no table (l1 says which).  Atomic. */
	struct qcow2_unit **units;
	uint64_t unit_count;
	uint64_t unit_bytes;       /* memory in units; written under the lock, atomic */
	struct qcow2_units *cache; /* unit.c's */

	struct qcow2_snapshot *snapshots;
	struct qcow2_bitmap *bitmaps;

	struct qcow2_block_list dirty_blocks;
	struct qcow2_commit *commit;
	struct qcow2_allocator *alloc;
	struct qcow2_record *record; /* NULL: none (read-only, v2, no run directory) */
};

static inline uint64_t qcow2_file_clusters(const struct qcow2 *q, uint64_t bytes)
{
	return (bytes + q->cluster_size - 1) >> q->cluster_bits;
}

/* --- open.c ---------------------------------------------------------------------------------- */

/* Damage was found while serving: logs one sentence, sets the corrupt bit in the file (v3, locked
 * for writing), and from now on writes fail with -EIO; reads go on.  Answers -EIO. Suspends. */
int qcow2_corrupt_co(struct ox_image_channel *channel, const char *fmt, ...)
        __attribute__((format(printf, 2, 3)));
/* Writes header.* to the file; the caller flushes. */
int qcow2_write_header_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* Reads from image->store; past the end of the file it reads as zero. */
int qcow2_read_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes)
        OX_MUST_CHECK;

/* begin.c: the ops of those names. */
int qcow2_begin_co(struct ox_image_channel *channel);
int qcow2_finish_co(struct ox_image_channel *channel);

/* snapshot.c, bitmap.c: read the tables that the header names. Suspend.  for_check: what cannot be
 * read leaves `snapshots` or `bitmaps` NULL, though the header counts some. */
int qcow2_read_snapshots_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;
void qcow2_free_snapshots(struct qcow2 *q);
int qcow2_read_bitmaps_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;
void qcow2_free_bitmaps(struct qcow2 *q);
/* The bitmaps that are enabled (or all, when the disk's size changes) will not follow what comes:
 * says so in the directory.  The caller flushes. */
int qcow2_mark_bitmaps_co(struct ox_image_channel *channel, bool all) OX_MUST_CHECK;
/* Pure parsers of the tables, for the above and the fuzzers. */
int qcow2_snapshots_parse(const uint8_t *data, size_t bytes, uint32_t count, uint32_t cluster_size,
                          const char *what, struct qcow2_snapshot **out, size_t *used,
                          struct ox_error *err) OX_MUST_CHECK;
int qcow2_bitmaps_parse(const uint8_t *data, size_t bytes, uint32_t count, const char *what,
                        struct qcow2_bitmap **out, struct ox_error *err) OX_MUST_CHECK;

/* --- unit.c, map.c -------------------------------------------------------------------------------
 */

int qcow2_units_init_co(struct ox_image_channel *channel, uint64_t budget, struct ox_error *err)
        OX_MUST_CHECK; /* reads L1, checks it */
void qcow2_units_free(struct qcow2 *q);
int qcow2_lookup(struct ox_image *image, uint64_t offset, uint64_t length,
                 struct ox_extent *extent);
int qcow2_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                 struct ox_extent *extent);
/* A channel goes: what unit.c has on its loop moves away. Does not suspend. */
void qcow2_units_detach(struct ox_image_channel *channel);
/* For resize: L1 has `entries` (not fewer than before) and stands where header.l1_offset says,
 * which the caller has set.  What is new is 0.  Nothing is dirtied: the caller wrote the table
 * there, and holds the lock from encoding it (qcow2_l1_get()) until this call.  Lock held. */
int qcow2_units_grow(struct qcow2 *q, uint32_t entries) OX_MUST_CHECK;
/* An L1 entry, host order. */
static inline uint64_t qcow2_l1_get(const struct qcow2 *q, uint64_t i)
{
	uint64_t *l1 = __atomic_load_n(&q->l1, __ATOMIC_ACQUIRE);

	return __atomic_load_n(&l1[i], __ATOMIC_ACQUIRE);
}
/* Changes one and dirties it.  Lock held. */
void qcow2_l1_set(struct qcow2 *q, uint32_t i, uint64_t entry, bool after_data);
/* Applies one change to the map in memory, as record.c saved it, and dirties it.  Loads what it
 * needs.  level 1: L1 entry `index`; level 2: L2 entry `index` (guest cluster number). */
int qcow2_apply_co(struct ox_image_channel *channel, unsigned level, uint64_t index, uint64_t entry,
                   uint64_t bitmap) OX_MUST_CHECK;
/* Calls fn for every L2 entry of the active tables that is not 0, as memory has it (for leak.c);
 * reads what is not in memory without keeping it. */
int qcow2_walk_co(struct ox_image_channel *channel,
                  void (*fn)(void *arg, uint64_t cluster, uint64_t entry, uint64_t bitmap),
                  void *arg) OX_MUST_CHECK;

/* --- write.c ------------------------------------------------------------------------------------
 */

int qcow2_allocate(struct ox_image_channel *channel, uint64_t offset, uint64_t length);
int qcow2_prepare_co(struct ox_image_channel *channel, struct ox_allocation *a);
int qcow2_publish_co(struct ox_image_channel *channel, struct ox_allocation *a);
void qcow2_abort(struct ox_image_channel *channel, struct ox_allocation *a);
int qcow2_zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length, bool unmap);
int qcow2_discard_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length);

/* --- commit.c -----------------------------------------------------------------------------------
 */

void qcow2_commit_init(struct qcow2 *q);
void qcow2_commit_free(struct qcow2 *q);
/* [offset, offset + bytes) of the block changed.  Lock held. */
void qcow2_dirty(struct qcow2 *q, struct qcow2_block *block, uint32_t offset, uint32_t bytes,
                 bool after_data);
/* ops->commit_co: one commit runs at a time and serves everybody who came before it began. */
int qcow2_commit_co(struct ox_image_channel *channel);
/* Writes these blocks' dirty pieces now, whatever else is dirty (alloc.c's batches; nothing in them
 * may be after_data).  Not flushed. */
int qcow2_write_blocks_co(struct ox_image_channel *channel, struct qcow2_block *const *blocks,
                          unsigned count) OX_MUST_CHECK;
/* Starts a commit in the background if very much is dirty, or the record of a killed process is
 * half full (QCOW2_RECORD_LOW notes are left).  Lock not held. */
#define QCOW2_RECORD_LOW 16384u
void qcow2_commit_soon(struct ox_image_channel *channel);
/* Starts writing what is dirty, if it is the first change after a flush.  Lock not held. */
void qcow2_write_ahead(struct ox_image_channel *channel);
/* From here on no commit runs, and nothing is being written, until resumed: for resize. */
void qcow2_commit_pause_co(struct ox_image_channel *channel);
void qcow2_commit_resume(struct qcow2 *q);
/* How many commits have begun; what was removed from the map before, under the lock, is durable
 * when qcow2_freed_durable() is called for a higher number.  Lock held. */
uint64_t qcow2_commit_number(const struct qcow2 *q);

/* --- refcount.c, alloc.c -------------------------------------------------------------------------
 */

int qcow2_alloc_init_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;
void qcow2_alloc_free(struct qcow2 *q);
int qcow2_alloc_attach(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;
void qcow2_alloc_detach(struct ox_image_channel *channel);
/* Up to `want` (> 0) contiguous clusters for data, at once.  Lock held, does not suspend.  *zeroed:
 * they read as zero, now and after a power cut.  0, or -EAGAIN: none at hand:
 * qcow2_alloc_more_co(). Starts the next batch in the background at half use. */
int qcow2_alloc_take(struct ox_image_channel *channel, unsigned want, uint64_t *host, unsigned *got,
                     bool *zeroed);
/* One cluster for an L2 table, from the frontier. Lock held. */
int qcow2_alloc_take_table(struct ox_image_channel *channel, uint64_t *host, bool *zeroed);
/* Never published: back to the reserve, as space that may have been written to.  Lock held. */
void qcow2_alloc_untake(struct ox_image_channel *channel, uint64_t host, unsigned count);
/* Waits until there is something to take (for data and for a table). -ENOSPC, -EIO, ... */
int qcow2_alloc_more_co(struct ox_image_channel *channel) OX_MUST_CHECK;
/* The map no longer refers to these bytes of the file (whole clusters, or a compressed unit's
 * bytes): gives one reference to each cluster they touch back, after R3's conditions.  Lock held.
 */
void qcow2_free_later(struct ox_image_channel *channel, uint64_t host, uint64_t bytes);
/* A commit ended well: removals noted while qcow2_commit_number() was below `number` are durable.
 * Lock held; starts the work in the background. */
void qcow2_freed_durable(struct ox_image_channel *channel, uint64_t number);
/* Are there removals that no commit has made durable?  Lock held. */
bool qcow2_frees_wait(const struct qcow2 *q);
/* For finish_co: waits for the background's work, gives the reserve back (refcounts dirty, to be
 * committed), and answers where the file may end. */
int qcow2_alloc_finish_co(struct ox_image_channel *channel, uint64_t *end) OX_MUST_CHECK;
/* Contiguous clusters of metadata with refcount 1, durable, zero-filled; for resize and snapshots.
 */
int qcow2_alloc_metadata_co(struct ox_image_channel *channel, uint64_t clusters, uint64_t *host)
        OX_MUST_CHECK;
/* A refcount, from the file or memory. */
int qcow2_refcount_co(struct ox_image_channel *channel, uint64_t cluster, uint64_t *refcount)
        OX_MUST_CHECK;
/* Pure: entry `index` of a refcount block of this width (1 to 64 bits; spec "Refcounts"). */
uint64_t qcow2_refcount_get(const uint8_t *block, unsigned bits, uint64_t index);
void qcow2_refcount_set(uint8_t *block, unsigned bits, uint64_t index, uint64_t value);

/* Is [host, host + bytes) free of metadata that memory knows of (header, L1, refcount structures,
 * snapshot and bitmap tables, L2 tables), and within the file as allocated?  Data entries are
 * checked with it when they are loaded.  Lock held. */
bool qcow2_is_data_range(struct qcow2 *q, uint64_t host, uint64_t bytes);
/* Registers metadata for that.  Lock held. */
void qcow2_add_metadata_range(struct qcow2 *q, uint64_t host, uint64_t bytes);
void qcow2_remove_metadata_range(struct qcow2 *q, uint64_t host, uint64_t bytes);

/* leak.c: scans all tables in the background and frees the clusters that nothing refers to.
 * Started by begin_co when the last writer did not close. */
void qcow2_start_leak_scan(struct ox_image_channel *channel);

/* --- record.c
 * ---------------------------------------------------------------------------------------- */

/* Opens the run directory's record for (dev, ino, boot).  Called by open_co.  If it belongs to
 * header.session and the session bit is still set, its changes are applied with qcow2_apply_co();
 * if another program has changed the image since, it is refused with a sentence that says so (and
 * how to drop it).  */
int qcow2_record_adopt_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;
/* begin_co: makes a new record for header.session; without a run directory q->record stays NULL and
 * q->image->eager is set. */
int qcow2_record_begin(struct qcow2 *q);
/* A change of the map in memory; must be noted before its request ends.  False: full; commit
 * first.  Lock held; does not suspend. */
bool qcow2_record_note(struct qcow2 *q, unsigned level, uint64_t index, uint64_t entry,
                       uint64_t bitmap);
/* May `count` more notes be made?  Lock held. */
bool qcow2_record_has_room(const struct qcow2 *q, unsigned count);
/* A commit has taken all dirty pieces: notes from here on are the next one's.  It ended: notes
 * before the seal are in the file (ok), or still only in memory.  Lock held. */
void qcow2_record_seal(struct qcow2 *q);
void qcow2_record_sealed(struct qcow2 *q, bool ok);
/* Clean close: removes the record. */
void qcow2_record_end(struct qcow2 *q);
/* Closing: lets go of it; it stays for the next process. */
void qcow2_record_free(struct qcow2 *q);

/* --- compress.c
 * ----------------------------------------------------------------------------------- */

/* Pure.  type: QCOW2_COMPRESSION_*.  Input may be longer than the compressed data. 0 or -EIO. */
int qcow2_decompress(unsigned type, const void *in, size_t in_bytes, void *out, size_t out_bytes);

/* --- maintenance
 * ----------------------------------------------------------------------------------- */

extern const struct ox_create_word qcow2_create_words[];
int qcow2_create_resolve(struct ox_image_create_options *options, struct ox_error *err);
int qcow2_create_co(struct ox_channel *store, const struct ox_image_create_options *options,
                    struct ox_error *err);
int qcow2_resize_co(struct ox_image_channel *channel, uint64_t size, enum ox_preallocation prealloc,
                    struct ox_error *err);
int qcow2_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err);
int qcow2_check_co(struct ox_image_channel *channel, struct ox_image_check *check,
                   struct ox_error *err);
/* The dirty bit was found at open (lazy refcounts): rebuilds the refcounts and clears it. */
int qcow2_repair_dirty_co(struct ox_image_channel *channel, struct ox_error *err) OX_MUST_CHECK;

#endif
