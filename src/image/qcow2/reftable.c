/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The refcount table, and new space at the file's end.
 *
 * The frontier is the first cluster that nothing ever used: behind the last one that is counted
 * and, where the file can grow, behind its end.  Metadata is only placed there.  A move of the
 * frontier is one batch:
 *
 *     [ larger refcount table, if needed | new refcount blocks, if needed | what was asked for ]
 *
 * All of it is counted in old and new blocks alike; a new block may count itself.
 *
 * Crash ordering (qcow2_settle_co): refcounts, in new blocks too, and a moved table are written and
 * flushed; only then entries of the table that show new blocks, or the header that shows the new
 * table, are written and flushed.  Without new blocks, one flush does.
 *
 * Memory is ahead of the file and never goes back: when a step of settling fails, nobody knows what
 * the file shows, so the new blocks stay where they are, and the next batch carries out the
 * rest before it gives anything out.
 *
 * Locking: the gate, and q->lock for changes.
 */
#include "image/qcow2/alloc.h"
#include "base/byteorder.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

#define BLOCK_MASK 0xfffffffffffffe00ull

/* --- reading it ------------------------------------------------------------------------------ */

static int compare_offsets(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static bool may_write(const struct qcow2 *q)
{
	return !q->image->read_only && !q->image->store->options.read_only;
}

/* Damage in the table: reading goes on without it, writing does not begin. */
static int table_is_bad(struct qcow2 *q, struct ox_error *err, const char *why, uint64_t offset)
{
	q->alloc->damaged = true;
	if (q->image->options.for_check)
		return 0;
	if (may_write(q))
		return ox_error_set(err, EIO,
		                    "%s: the refcount table %s (at offset %llu); repair the image "
		                    "with oxbow check -r all, or open it read-only",
		                    q->image->store->path, why, (unsigned long long)offset);
	ox_log(OX_LOG_WARNING, "%s: the refcount table %s (at offset %llu)", q->image->store->path,
	       why, (unsigned long long)offset);
	return 0;
}

static bool block_is_good(const struct qcow2 *q, uint64_t entry)
{
	uint64_t file = qcow2_file_clusters(q, q->image->store->size) << q->cluster_bits;

	return ox_is_aligned(entry, q->cluster_size) && entry < UINT64_C(1) << 56 &&
	       ox_range_within(entry, q->cluster_size, file);
}

/* Checks the entries and registers the blocks; bad entries count nothing from here on. */
static int check_entries(struct qcow2 *q, struct ox_error *err)
{
	struct qcow2_allocator *a = q->alloc;
	OX_FREE uint64_t *sorted = malloc(a->table_entries * sizeof(*sorted));
	size_t count = 0;
	int rc = 0;

	if (!sorted)
		return ox_error_set(err, ENOMEM, "%s: no memory for the refcount table",
		                    q->image->store->path);
	for (uint32_t i = 0; i < a->table_entries; i++) {
		if (a->table[i] == 0)
			continue;
		if (block_is_good(q, a->table[i])) {
			sorted[count++] = a->table[i];
			continue;
		}
		if (!a->damaged)
			rc = table_is_bad(q, err, "names a block that cannot be one", a->table[i]);
		a->table[i] = 0;
	}
	qsort(sorted, count, sizeof(*sorted), compare_offsets);
	pthread_mutex_lock(&q->lock);
	for (size_t i = 0; i < count; i++)
		qcow2_add_metadata_range(q, sorted[i], q->cluster_size);
	pthread_mutex_unlock(&q->lock);
	for (size_t i = 1; i < count && rc == 0 && !a->damaged; i++) {
		if (sorted[i] == sorted[i - 1])
			rc = table_is_bad(q, err, "names a block twice", sorted[i]);
	}
	return rc;
}

int qcow2_reftable_init_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t offset = q->header.refcount_table_offset, size = q->image->store->size;
	uint64_t bytes = (uint64_t)q->header.refcount_table_clusters << q->cluster_bits;
	OX_FREE uint8_t *data = NULL;
	uint64_t there;
	int rc;

	pthread_mutex_lock(&q->lock);
	qcow2_add_metadata_range(q, 0, q->cluster_size);
	pthread_mutex_unlock(&q->lock);
	a->table_offset = offset;
	a->table_clusters = q->header.refcount_table_clusters;
	if (bytes == 0 || bytes > QCOW2_MAX_REFTABLE_BYTES || offset == 0 || offset >= size ||
	    !ox_is_aligned(offset, q->cluster_size))
		return table_is_bad(q, err, "cannot be where the header says", offset);
	pthread_mutex_lock(&q->lock);
	qcow2_add_metadata_range(q, offset, bytes);
	pthread_mutex_unlock(&q->lock);
	data = calloc(1, bytes);
	a->table = calloc(bytes / 8, sizeof(*a->table));
	if (!data || !a->table)
		return ox_error_set(err, ENOMEM, "%s: no memory for the refcount table",
		                    q->image->store->path);
	/* A file may end within the table's last cluster: the rest reads as zero. */
	there = ox_min(bytes, size - offset);
	rc = ox_store_read_co(channel->store, offset, data, there);
	if (rc < 0 && q->image->options.for_check)
		return table_is_bad(q, err, "cannot be read", offset);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read the refcount table: %s",
		                    q->image->store->path, strerror(-rc));
	a->table_entries = (uint32_t)(bytes / 8);
	for (uint32_t i = 0; i < a->table_entries; i++)
		a->table[i] = ox_get_be64(data + i * 8u);
	return check_entries(q, err);
}

/* --- finding the frontier ----------------------------------------------------------------------
 */

/* The last counted cluster of one block, + 1; 0: none. */
static int last_counted_co(struct ox_image_channel *channel, uint64_t block, uint64_t *end)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t parts = UINT64_C(1) << (a->block_shift - a->part_shift);

	*end = 0;
	for (uint64_t index = (block + 1) * parts; index > block * parts; index--) {
		uint64_t first = (index - 1) << a->part_shift;
		uint64_t last = first + (UINT64_C(1) << a->part_shift);
		struct qcow2_part *part;
		int rc = qcow2_part_get_co(channel, index - 1, &part);

		if (rc < 0)
			return rc;
		for (; part && last > first; last--) {
			if (qcow2_part_count(q, part, last - 1) == 0)
				continue;
			*end = last;
			return 0;
		}
	}
	return 0;
}

int qcow2_frontier_begin_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t size = __atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED);
	uint64_t file = qcow2_file_clusters(q, size), end = 0;
	int rc = 0;

	if (a->begun)
		return 0;
	if (a->damaged)
		return -EIO;
	/* Blocks that count only what lies within a file that can grow need no look: its end
	 * decides. */
	for (uint64_t block = a->table_entries; block > 0 && end == 0; block--) {
		if (!a->fixed && block << a->block_shift <= file)
			break;
		if (a->table[block - 1] == 0)
			continue;
		rc = last_counted_co(channel, block - 1, &end);
		if (rc < 0)
			return rc;
	}
	if (!a->fixed)
		end = ox_max(end, file);
	/* What an earlier, unclean program left uncounted of its structures. */
	pthread_mutex_lock(&q->lock);
	for (uint32_t i = 0; i < a->table_entries; i++) {
		if (a->table[i])
			end = ox_max(end, (a->table[i] >> q->cluster_bits) + 1);
	}
	end = ox_max(end, (a->table_offset >> q->cluster_bits) + a->table_clusters);
	pthread_mutex_unlock(&q->lock);
	/* The last cluster may lack its end; from now on all of the file is there to be written. */
	if (!a->fixed && end << q->cluster_bits > size)
		rc = ox_store_truncate_co(q->image->store, end << q->cluster_bits, OX_PREALLOC_OFF,
		                          NULL);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	a->frontier = end;
	a->first_frontier = end;
	a->scan_cursor = 0;
	a->scan_end = end;
	a->free_count = 0;
	a->begun = true;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

/* --- moving it ----------------------------------------------------------------------------------
 */

struct plan {
	uint64_t first, clusters; /* what was asked for */
	uint64_t table_clusters;  /* of a larger table; 0: it is large enough */
	uint64_t blocks;          /* new ones */
	uint64_t end;
};

static uint64_t missing_blocks(const struct qcow2_allocator *a, uint64_t first, uint64_t end)
{
	uint64_t missing = 0;

	for (uint64_t i = first >> a->block_shift; i <= (end - 1) >> a->block_shift; i++)
		missing += i >= a->table_entries || a->table[i] == 0;
	return missing;
}

/* For so many entries, with half as many again: a move is rare. */
static uint64_t table_clusters_for(const struct qcow2 *q, uint64_t entries)
{
	uint64_t bytes = (entries + entries / 2 + 1) * 8;

	bytes = ox_min(bytes, (uint64_t)QCOW2_MAX_REFTABLE_BYTES);
	return (bytes + q->cluster_size - 1) >> q->cluster_bits;
}

static int make_plan(const struct qcow2 *q, uint64_t clusters, struct plan *plan)
{
	const struct qcow2_allocator *a = q->alloc;
	uint64_t limit = UINT64_C(1) << (56 - q->cluster_bits), end;

	*plan = (struct plan){.first = a->frontier, .clusters = clusters};
	if (a->fixed)
		limit = __atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED) >>
		        q->cluster_bits;
	if (clusters > limit || a->frontier > limit)
		return -ENOSPC;
	end = a->frontier + clusters;
	do {
		uint64_t entries;

		plan->end = end;
		if (plan->end > limit)
			return -ENOSPC;
		entries = ((plan->end - 1) >> a->block_shift) + 1;
		if (entries * 8 > QCOW2_MAX_REFTABLE_BYTES)
			return -ENOSPC;
		plan->blocks = missing_blocks(a, a->frontier, plan->end);
		plan->table_clusters =
		        entries > a->table_entries ? table_clusters_for(q, entries) : 0;
		end = a->frontier + plan->table_clusters + plan->blocks + clusters;
		/* `end` never falls from one turn to the next, and a cluster more needs at most a
		 * fraction of a cluster: this ends. */
	} while (end != plan->end);
	plan->first = a->frontier + plan->table_clusters + plan->blocks;
	return 0;
}

/* The file covers the plan; *zeroed: what is new of it reads as zero. */
static int make_room_co(struct ox_image_channel *channel, const struct plan *plan, bool *zeroed)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct ox_store *store = q->image->store;
	uint64_t from = a->frontier << q->cluster_bits, to = plan->end << q->cluster_bits;
	uint64_t structures = (plan->table_clusters + plan->blocks) << q->cluster_bits;
	struct ox_io zero = {
	        .op = OX_IO_ZERO,
	        .flags = OX_IO_MAY_UNMAP | OX_IO_NO_FALLBACK,
	        .offset = from,
	        .length = to - from,
	};

	*zeroed = true;
	if (!a->fixed) {
		uint64_t size = __atomic_load_n(&store->size, __ATOMIC_RELAXED);

		/* The frontier is behind the end of the file as it was; what a batch that came to
		 * nothing left there was never written to. */
		return to <= size ? 0 : ox_store_truncate_co(store, to, OX_PREALLOC_OFF, NULL);
	}
	*zeroed = store->limits.zero_is_fast && ox_store_submit_co(channel->store, &zero) == 0;
	if (*zeroed || structures == 0)
		return 0;
	zero.flags = 0;
	zero.length = structures;
	return ox_store_submit_co(channel->store, &zero);
}

/* The table in memory gets room; the file's moves with the next settling. */
static int enlarge_table(struct qcow2 *q, const struct plan *plan)
{
	struct qcow2_allocator *a = q->alloc;
	uint32_t entries = (uint32_t)((plan->table_clusters << q->cluster_bits) / 8);
	uint64_t *table = calloc(entries, sizeof(*table));

	if (!table)
		return -ENOMEM;
	if (a->table_entries)
		memcpy(table, a->table, a->table_entries * sizeof(*table));
	free(a->table);
	a->table = table;
	a->table_entries = entries;
	a->old_table_offset = a->table_offset;
	a->old_table_clusters = a->table_clusters;
	a->table_offset = a->frontier << q->cluster_bits;
	a->table_clusters = (uint32_t)plan->table_clusters;
	qcow2_add_metadata_range(q, a->table_offset, plan->table_clusters << q->cluster_bits);
	return 0;
}

/* Lock held. */
static void add_blocks(struct qcow2 *q, const struct plan *plan)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t host = a->frontier + plan->table_clusters;

	for (uint64_t i = a->frontier >> a->block_shift; i <= (plan->end - 1) >> a->block_shift;
	     i++) {
		if (a->table[i])
			continue;
		a->table[i] = host++ << q->cluster_bits;
		qcow2_add_metadata_range(q, a->table[i], q->cluster_size);
		if (a->table_first == a->table_end)
			a->table_first = (uint32_t)i;
		a->table_first = ox_min(a->table_first, (uint32_t)i);
		a->table_end = ox_max(a->table_end, (uint32_t)i + 1);
	}
}

int qcow2_frontier_take_co(struct ox_image_channel *channel, uint64_t clusters, uint64_t *first,
                           bool *zeroed)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t from = a->frontier;
	struct plan plan;
	int rc = make_plan(q, clusters, &plan);

	if (rc == 0 && plan.table_clusters && a->old_table_clusters)
		rc = qcow2_settle_co(channel); /* one move at a time */
	if (rc == 0)
		rc = make_room_co(channel, &plan, zeroed);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	if (plan.table_clusters)
		rc = enlarge_table(q, &plan);
	if (rc == 0)
		add_blocks(q, &plan);
	pthread_mutex_unlock(&q->lock);
	if (rc < 0)
		return rc;
	/* Parts behind the frontier are made without a read: it moves last. */
	rc = qcow2_count_co(channel, from, plan.end - from, QCOW2_COUNT_UP, NULL, NULL);
	pthread_mutex_lock(&q->lock);
	a->frontier = plan.end;
	pthread_mutex_unlock(&q->lock);
	if (rc < 0) {
		/* Its structures stay; the rest is free space again. */
		if (qcow2_count_co(channel, plan.first, clusters, QCOW2_COUNT_CLEAR, NULL, NULL) ==
		    0)
			qcow2_free_run_add(a, plan.first, clusters);
		return rc;
	}
	*first = plan.first;
	return 0;
}

/* --- making it durable
 * ---------------------------------------------------------------------------- */

/* Entries [first, end) of the table to the file. */
static int write_table_co(struct ox_image_channel *channel, uint32_t first, uint32_t end)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint32_t piece = ox_min(q->cluster_size, QCOW2_PIECE) / 8;
	OX_FREE uint8_t *data = NULL;
	size_t bytes;

	first = (uint32_t)ox_align_down(first, piece);
	end = (uint32_t)ox_align_up(end, piece);
	bytes = (end - first) * sizeof(uint64_t);
	data = aligned_alloc(QCOW2_PIECE, ox_align_up(bytes, QCOW2_PIECE));
	if (!data)
		return -ENOMEM;
	for (uint32_t i = first; i < end; i++)
		ox_put_be64(data + (i - first) * sizeof(uint64_t), a->table[i]);
	return ox_store_write_co(channel->store, a->table_offset + first * sizeof(uint64_t), data,
	                         bytes, 0);
}

/* The header shows the table that was moved; the old one's clusters are free. */
static int switch_table_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t offset = a->old_table_offset, first = offset >> q->cluster_bits;
	uint32_t clusters = a->old_table_clusters;
	int rc;

	pthread_mutex_lock(&q->lock);
	q->header.refcount_table_offset = a->table_offset;
	q->header.refcount_table_clusters = a->table_clusters;
	pthread_mutex_unlock(&q->lock);
	a->table_uncertain = true;
	rc = qcow2_write_header_co(channel);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	if (rc < 0)
		return rc;
	a->table_uncertain = false;
	pthread_mutex_lock(&q->lock);
	a->old_table_clusters = 0;
	qcow2_remove_metadata_range(q, offset, (uint64_t)clusters << q->cluster_bits);
	pthread_mutex_unlock(&q->lock);
	/* An old table that was not counted as it should is simply not used again. */
	if (qcow2_count_co(channel, first, clusters, QCOW2_COUNT_DOWN, NULL, NULL) == 0)
		qcow2_free_run_add(a, first, clusters);
	return 0;
}

int qcow2_settle_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	bool moved = a->old_table_clusters > 0;
	int rc = qcow2_parts_write_co(channel);

	if (rc == 0 && moved && a->table_uncertain)
		rc = ox_store_flush_co(channel->store);
	if (rc == 0 && moved)
		rc = write_table_co(channel, 0, a->table_entries);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	if (rc == 0 && moved)
		rc = switch_table_co(channel);
	if (rc == 0 && !moved && a->table_first < a->table_end) {
		rc = write_table_co(channel, a->table_first, a->table_end);
		if (rc == 0)
			rc = ox_store_flush_co(channel->store);
	}
	if (rc < 0)
		return rc;
	a->table_first = 0;
	a->table_end = 0;
	return 0;
}
