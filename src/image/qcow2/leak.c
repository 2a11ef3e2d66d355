/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * After an unclean end: what is counted in the file and referred to by nothing.
 *
 * One pass over everything that may refer to a cluster (the active tables as memory has them, those
 * of snapshots, bitmaps, the refcount structures, the header's own pointers) marks it in a bitmap;
 * then what is counted and not marked is noted to be given back, like any cluster that the map lost
 * (free.c).  So it is used again only after a commit: a table in the file that memory has already
 * changed may still show it until then.
 *
 * It runs beside the guest's writes because the set it looks at does not change under it:
 *   - it looks only at clusters that were below the frontier when writing began, and until it ends
 * no free space there is given out: nothing new can come to refer to them;
 *   - what the map loses meanwhile is in the queue of notes, which is not worked off until it ends,
 *     and whose clusters are marked after everything else.
 * If anything cannot be read or makes no sense, nothing is given back at all: that is a check's
 * work.
 *
 * Memory: two bits a cluster of the file, 64 MiB at the most; a larger file is looked at in several
 * passes.  It reads one block at a time.
 */
#include "image/qcow2/alloc.h"
#include "base/byteorder.h"
#include "base/fiber.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

#define WINDOW      (UINT64_C(1) << 28) /* clusters of one pass */
#define PAUSE_BYTES (4u << 20)          /* read between pauses */
#define PAUSE_NS    UINT64_C(1000000)

struct scan {
	struct ox_image_channel *channel;
	struct qcow2 *q;
	uint64_t first, end; /* clusters of this pass */
	uint64_t *marked;    /* a bit a cluster from `first` on */
	uint64_t *tables;    /* the same: an L2 table of a snapshot that was read */
	uint8_t *buffer;     /* block_bytes */
	size_t since_pause;
	uint64_t leaks; /* clusters */
};

/* --- marking ------------------------------------------------------------------------------- */

static void mark(struct scan *s, uint64_t host, uint64_t bytes)
{
	const struct qcow2 *q = s->q;
	uint64_t first, last;

	if (bytes == 0 || !ox_range_within(host, bytes, INT64_MAX))
		return;
	first = ox_max(host >> q->cluster_bits, s->first);
	last = (host + bytes - 1) >> q->cluster_bits;
	for (uint64_t i = first; i <= last && i < s->end; i++)
		s->marked[(i - s->first) / 64] |= UINT64_C(1) << (i - s->first) % 64;
}

static bool is_marked(const struct scan *s, const uint64_t *bits, uint64_t cluster)
{
	return bits[(cluster - s->first) / 64] >> (cluster - s->first) % 64 & 1;
}

/* An L2 entry of whatever table. */
static void mark_entry(void *arg, uint64_t cluster, uint64_t entry, uint64_t bitmap)
{
	struct scan *s = arg;
	const struct qcow2 *q = s->q;
	unsigned shift = 62 - (q->cluster_bits - 8);

	if (entry & QCOW2_ENTRY_COMPRESSED) {
		uint64_t host = entry & ((UINT64_C(1) << shift) - 1);
		uint64_t sectors = (entry & (QCOW2_ENTRY_COMPRESSED - 1)) >> shift;

		mark(s, host, (sectors + 1) * 512 - host % 512);
	} else if (!q->data_file && (entry & QCOW2_OFFSET_MASK)) {
		mark(s, entry & QCOW2_OFFSET_MASK, q->cluster_size);
	}
}

static int read_block_co(struct scan *s, uint64_t offset, size_t bytes)
{
	s->since_pause += bytes;
	if (s->since_pause > PAUSE_BYTES) {
		s->since_pause = 0;
		ox_sleep_co(PAUSE_NS);
	}
	return qcow2_read_co(s->channel, offset, s->buffer, bytes);
}

/* Calls fn for the `count` 8-byte words at the offset. */
static int each_word_co(struct scan *s, uint64_t offset, uint64_t count,
                        int (*fn_co)(struct scan *s, uint64_t word))
{
	OX_FREE uint64_t *words = malloc(s->q->block_bytes);
	uint64_t file = __atomic_load_n(&s->q->image->store->size, __ATOMIC_RELAXED);

	if (!words)
		return -ENOMEM;
	if (!ox_range_within(offset, count * 8, ox_align_up(file, s->q->cluster_size)))
		return -EUCLEAN;
	while (count > 0) {
		size_t here = (size_t)ox_min(count, (uint64_t)s->q->block_bytes / 8);
		int rc = read_block_co(s, offset, here * 8);

		if (rc < 0)
			return rc;
		/* fn_co may read too. */
		for (size_t i = 0; i < here; i++)
			words[i] = ox_get_be64(s->buffer + i * 8);
		for (size_t i = 0; i < here; i++) {
			rc = words[i] ? fn_co(s, words[i]) : 0;
			if (rc < 0)
				return rc;
		}
		offset += here * 8;
		count -= here;
	}
	return 0;
}

static int mark_bitmap_word_co(struct scan *s, uint64_t word)
{
	if (word & QCOW2_OFFSET_MASK)
		mark(s, word & QCOW2_OFFSET_MASK, s->q->cluster_size);
	return 0;
}

static int read_table_co(struct scan *s, uint64_t table)
{
	const struct qcow2 *q = s->q;

	for (uint64_t at = 0; at < q->cluster_size; at += q->block_bytes) {
		int rc = read_block_co(s, table + at, q->block_bytes);

		if (rc < 0)
			return rc;
		for (uint32_t i = 0; i < q->block_bytes; i += q->entry_bytes)
			mark_entry(s, 0, ox_get_be64(s->buffer + i), 0);
	}
	return 0;
}

/* An entry of a snapshot's L1. */
static int mark_table_co(struct scan *s, uint64_t word)
{
	const struct qcow2 *q = s->q;
	uint64_t table = word & QCOW2_OFFSET_MASK, cluster = table >> q->cluster_bits;
	uint64_t file = __atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED);

	if (table == 0)
		return 0;
	if (!ox_is_aligned(table, q->cluster_size) || table >= file)
		return -EUCLEAN;
	mark(s, table, q->cluster_size);
	/* Snapshots share most of their tables: each is read once, but for those outside of this
	 * pass. */
	if (cluster >= s->first && cluster < s->end) {
		if (is_marked(s, s->tables, cluster))
			return 0;
		s->tables[(cluster - s->first) / 64] |= UINT64_C(1) << (cluster - s->first) % 64;
	}
	return read_table_co(s, table);
}

static int mark_snapshots_co(struct scan *s)
{
	const struct qcow2 *q = s->q;
	int rc = 0;

	if (q->header.snapshot_count > 0 && !q->snapshots)
		return -EUCLEAN;
	for (uint32_t i = 0; i < q->header.snapshot_count && rc == 0; i++) {
		const struct qcow2_snapshot *snapshot = &q->snapshots[i];

		mark(s, snapshot->l1_offset, (uint64_t)snapshot->l1_entries * 8);
		mark(s, q->header.snapshots_offset,
		     snapshot->entry_offset + 40 + snapshot->extra_bytes + strlen(snapshot->id) +
		             strlen(snapshot->name));
		if (snapshot->l1_entries)
			rc = each_word_co(s, snapshot->l1_offset, snapshot->l1_entries,
			                  mark_table_co);
	}
	return rc;
}

static int mark_bitmaps_co(struct scan *s)
{
	const struct qcow2 *q = s->q;
	int rc = 0;

	mark(s, q->header.bitmap_directory_offset, q->header.bitmap_directory_bytes);
	if (q->header.bitmap_count > 0 && !q->bitmaps)
		return -EUCLEAN;
	for (uint32_t i = 0; i < q->header.bitmap_count && rc == 0; i++) {
		const struct qcow2_bitmap *bitmap = &q->bitmaps[i];

		mark(s, bitmap->table_offset, (uint64_t)bitmap->table_entries * 8);
		rc = each_word_co(s, bitmap->table_offset, bitmap->table_entries,
		                  mark_bitmap_word_co);
	}
	return rc;
}

/* The header's pointers, the refcount structures, L1 and the tables it names. */
static int mark_structures(struct scan *s)
{
	struct qcow2 *q = s->q;
	const struct qcow2_allocator *a = q->alloc;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	mark(s, 0, q->cluster_size);
	mark(s, q->header.l1_offset, (uint64_t)q->header.l1_entries * 8);
	mark(s, q->header.luks_offset, q->header.luks_bytes);
	mark(s, q->header.snapshots_offset, q->header.snapshot_count ? 1 : 0);
	mark(s, q->header.refcount_table_offset,
	     (uint64_t)q->header.refcount_table_clusters << q->cluster_bits);
	for (uint32_t i = 0; i < a->table_entries; i++)
		mark(s, a->table[i], a->table[i] ? q->cluster_size : 0);
	for (uint32_t i = 0; i < q->l1_entries; i++) {
		uint64_t table = qcow2_l1_get(q, i) & QCOW2_OFFSET_MASK;

		if (q->l1_bad && q->l1_bad[i / 64] >> i % 64 & 1)
			rc = -EUCLEAN;
		mark(s, table, table ? q->cluster_size : 0);
	}
	pthread_mutex_unlock(&q->lock);
	return rc;
}

/* What the map lost since it was walked, or before, and nobody has counted down yet.  Lock held. */
static void mark_notes(struct scan *s)
{
	const struct qcow2_allocator *a = s->q->alloc;

	for (uint64_t i = a->notes_head; i < a->notes_tail; i++) {
		const struct qcow2_note *note = &a->notes[i & (a->notes_room - 1)];

		mark(s, note->host, note->bytes);
	}
}

/* --- finding ------------------------------------------------------------------------------- */

/* Notes what is counted and not marked of [first, end), within one part.  Gate held. */
static int note_leaks_co(struct scan *s, uint64_t first, uint64_t end)
{
	struct qcow2 *q = s->q;
	struct qcow2_part *part;
	int rc = qcow2_part_get_co(s->channel, first >> q->alloc->part_shift, &part);

	if (rc < 0 || !part)
		return rc;
	pthread_mutex_lock(&q->lock);
	for (uint64_t i = first; i < end; i++) {
		if (is_marked(s, s->marked, i) || qcow2_part_count(q, part, i) == 0)
			continue;
		/* What memory knows to be metadata stays, whoever registered it. */
		if (qcow2_is_metadata(q->alloc, i))
			continue;
		qcow2_note_free(q, i << q->cluster_bits, q->cluster_size, true);
		s->leaks++;
	}
	pthread_mutex_unlock(&q->lock);
	return 0;
}

static int find_leaks_co(struct scan *s)
{
	struct qcow2_allocator *a = s->q->alloc;
	uint64_t in_part = UINT64_C(1) << a->part_shift;
	int rc = 0;

	for (uint64_t at = s->first; at < s->end && rc == 0;) {
		uint64_t end = ox_min(s->end, ox_align_down(at, in_part) + in_part);
		struct ox_range range;

		qcow2_gate_enter_co(a, &range, s->channel);
		rc = note_leaks_co(s, at, end);
		qcow2_gate_leave(a, &range);
		at = end;
	}
	return rc;
}

/* One pass. */
static int scan_window_co(struct scan *s)
{
	struct qcow2 *q = s->q;
	size_t words = (size_t)((s->end - s->first + 63) / 64);
	int rc;

	memset(s->marked, 0, words * sizeof(*s->marked));
	memset(s->tables, 0, words * sizeof(*s->tables));
	rc = mark_structures(s);
	if (rc == 0)
		rc = mark_snapshots_co(s);
	if (rc == 0)
		rc = mark_bitmaps_co(s);
	if (rc == 0)
		rc = qcow2_walk_co(s->channel, mark_entry, s);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	mark_notes(s);
	pthread_mutex_unlock(&q->lock);
	return find_leaks_co(s);
}

/* --- the scan ------------------------------------------------------------------------------- */

static int frontier_co(struct ox_image_channel *channel, uint64_t *frontier)
{
	struct qcow2_allocator *a = qcow2_of(channel)->alloc;
	struct ox_range range;
	int rc;

	qcow2_gate_enter_co(a, &range, channel);
	rc = qcow2_frontier_begin_co(channel);
	*frontier = a->first_frontier;
	qcow2_gate_leave(a, &range);
	return rc;
}

static int scan_co(struct scan *s)
{
	struct qcow2 *q = s->q;
	uint64_t frontier;
	size_t words;
	int rc = frontier_co(s->channel, &frontier);

	if (rc < 0)
		return rc;
	words = (size_t)(ox_min(frontier, WINDOW) / 64 + 1);
	s->marked = malloc(words * sizeof(*s->marked));
	s->tables = malloc(words * sizeof(*s->tables));
	s->buffer = aligned_alloc(4096, ox_max(q->block_bytes, 4096u));
	if (!s->marked || !s->tables || !s->buffer)
		return -ENOMEM;
	for (s->first = 0; s->first < frontier && rc == 0; s->first = s->end) {
		s->end = ox_min(frontier, s->first + WINDOW);
		rc = scan_window_co(s);
	}
	return rc;
}

static void scan_fiber_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_range background = {.end = 1, .loop = channel->loop};
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct scan s = {.channel = channel, .q = q};
	uint64_t ready;
	bool release;
	int rc;

	ox_range_acquire_co(&a->background, &background);
	rc = scan_co(&s);
	free(s.marked);
	free(s.tables);
	free(s.buffer);
	if (rc < 0)
		ox_log(OX_LOG_WARNING,
		       "%s: what its last writer left allocated cannot be found: %s; oxbow check -r "
		       "leaks can",
		       q->image->store->path, strerror(-rc));
	else if (s.leaks)
		ox_log(OX_LOG_INFO,
		       "%s: %llu clusters that its last writer left allocated are freed",
		       q->image->store->path, (unsigned long long)s.leaks);
	pthread_mutex_lock(&q->lock);
	a->leak_scan = false;
	ready = a->notes_ready;
	release = ready > a->notes_head && !a->finishing && !a->releasing;
	pthread_mutex_unlock(&q->lock);
	if (release) {
		ox_image_grace_co(channel);
		(void)!qcow2_release_co(channel, ready);
	}
	ox_range_release(&a->background, &background);
}

void qcow2_start_leak_scan(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	bool start;

	/* Before anything is given out: from here on free space stays untouched. */
	pthread_mutex_lock(&q->lock);
	start = !q->alloc->leak_scan;
	q->alloc->leak_scan = true;
	pthread_mutex_unlock(&q->lock);
	if (!start || ox_image_background(channel, scan_fiber_co, NULL) == 0)
		return;
	pthread_mutex_lock(&q->lock);
	q->alloc->leak_scan = false;
	pthread_mutex_unlock(&q->lock);
}
