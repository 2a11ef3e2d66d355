/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * After an unclean end: what is counted in the file more often than it is referred to.
 *
 * One pass over everything that may refer to a cluster (the header's own pointers, the refcount
 * structures, bitmaps, the tables of snapshots, the active tables as memory has them) counts the
 * references; what the file counts beyond them is noted to be given back, like any cluster that the
 * map lost (free.c).  So it is used again only after a commit: a table in the file that memory has
 * already changed may still show it until then.
 *
 * It runs beside the guest's writes:
 *   - It looks only at clusters that were below the frontier when writing began, and until it ends
 * no free space there is given out: nothing new can come to refer to them.
 *   - What the map loses is in the queue of notes, which is not worked off until it ends.  A note
 * made before the pass stands for a reference that the pass does not find, and counts like one. For
 *     a note made during the pass nobody knows whether the pass found the reference: such a
 *     cluster is left alone unless its count is right in any case, and another pass looks at it.
 *     The last one is made when the image is finished, and nothing changes any more.
 *   - If anything cannot be read or makes no sense, nothing is given back at all: that is a check's
 *     work.  So are clusters that are counted too rarely.
 *
 * Memory: 68 MiB at the most, 2.1 bytes a cluster; a file of more than 2^25 clusters (2 TiB with 64
 * KiB clusters) is looked at in several passes.  It reads one block at a time, with pauses.
 */
#include "image/qcow2/alloc.h"
#include "base/byteorder.h"
#include "base/fiber.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

#define WINDOW      (UINT64_C(1) << 25) /* clusters of one pass */
#define COUNT_MAX   UINT16_MAX          /* so many or more: left alone */
#define TABLES_MAX  (4u << 20)          /* L2 tables of all snapshots */
#define EXCESS_MAX  4096u               /* given back of one cluster; more is a check's work */
#define PASSES      3u
#define PAUSE_BYTES (4u << 20) /* read between pauses */
#define PAUSE_NS    UINT64_C(1000000)

struct scan {
	struct ox_image_channel *channel;
	struct qcow2 *q;
	uint64_t frontier;
	uint64_t first, end; /* clusters of this pass */
	uint16_t *counts;    /* of references, from `first` on */
	uint64_t *late;      /* a bit a cluster: may have been counted once too often */
	/* L2 tables of all snapshots, sorted; as often as they are referred to. */
	uint64_t *tables;
	size_t table_count, table_room;
	uint8_t *buffer; /* block_bytes */
	size_t since_pause;
	uint64_t leaks; /* clusters */
	bool unsure;    /* some were left alone because of `late` */
};

/* --- counting ------------------------------------------------------------------------------- */

/* The clusters of this pass that the bytes touch: [*first, *end). */
static void clip(const struct scan *s, uint64_t host, uint64_t bytes, uint64_t *first,
                 uint64_t *end)
{
	*first = *end = 0;
	if (bytes == 0 || !ox_range_within(host, bytes, INT64_MAX))
		return;
	*first = ox_max(host >> s->q->cluster_bits, s->first);
	*end = ox_min(((host + bytes - 1) >> s->q->cluster_bits) + 1, s->end);
}

static void count(struct scan *s, uint64_t host, uint64_t bytes, size_t weight)
{
	uint64_t first, end;

	clip(s, host, bytes, &first, &end);
	for (uint64_t i = first; i < end; i++) {
		uint16_t *counter = &s->counts[i - s->first];

		*counter = (uint16_t)ox_min(*counter + weight, (size_t)COUNT_MAX);
	}
}

/* An L2 entry of whatever table. */
static void count_entry(struct scan *s, uint64_t entry, size_t weight)
{
	const struct qcow2 *q = s->q;
	unsigned shift = 62 - (q->cluster_bits - 8);

	if (entry & QCOW2_ENTRY_COMPRESSED) {
		uint64_t host = entry & ((UINT64_C(1) << shift) - 1);
		uint64_t sectors = (entry & (QCOW2_ENTRY_COMPRESSED - 1)) >> shift;

		count(s, host, (sectors + 1) * 512 - host % 512, weight);
	} else if (!q->data_file && (entry & QCOW2_OFFSET_MASK)) {
		count(s, entry & QCOW2_OFFSET_MASK, q->cluster_size, weight);
	}
}

static void count_walked(void *arg, uint64_t cluster, uint64_t entry, uint64_t bitmap)
{
	count_entry(arg, entry, 1);
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

/* Calls fn for the `words` 8-byte words at the offset that are not 0. */
static int each_word_co(struct scan *s, uint64_t offset, uint64_t words,
                        int (*fn)(struct scan *s, uint64_t word))
{
	uint64_t file = __atomic_load_n(&s->q->image->store->size, __ATOMIC_RELAXED);

	if (!ox_range_within(offset, words * 8, ox_align_up(file, s->q->cluster_size)))
		return -EUCLEAN;
	while (words > 0) {
		size_t here = (size_t)ox_min(words, (uint64_t)s->q->block_bytes / 8);
		int rc = read_block_co(s, offset, here * 8);

		for (size_t i = 0; i < here && rc == 0; i++) {
			uint64_t word = ox_get_be64(s->buffer + i * 8);

			rc = word ? fn(s, word) : 0;
		}
		if (rc < 0)
			return rc;
		offset += here * 8;
		words -= here;
	}
	return 0;
}

static int count_bitmap_word(struct scan *s, uint64_t word)
{
	if (word & QCOW2_OFFSET_MASK)
		count(s, word & QCOW2_OFFSET_MASK, s->q->cluster_size, 1);
	return 0;
}

static int count_bitmaps_co(struct scan *s)
{
	const struct qcow2 *q = s->q;
	int rc = 0;

	count(s, q->header.bitmap_directory_offset, q->header.bitmap_directory_bytes, 1);
	if (q->header.bitmap_count > 0 && !q->bitmaps)
		return -EUCLEAN;
	for (uint32_t i = 0; i < q->header.bitmap_count && rc == 0; i++) {
		const struct qcow2_bitmap *bitmap = &q->bitmaps[i];

		count(s, bitmap->table_offset, (uint64_t)bitmap->table_entries * 8, 1);
		rc = each_word_co(s, bitmap->table_offset, bitmap->table_entries,
		                  count_bitmap_word);
	}
	return rc;
}

/* The header's pointers, the refcount structures, L1 and the tables it names. */
static int count_structures(struct scan *s)
{
	struct qcow2 *q = s->q;
	const struct qcow2_allocator *a = q->alloc;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	count(s, 0, q->cluster_size, 1);
	count(s, q->header.l1_offset, (uint64_t)q->header.l1_entries * 8, 1);
	count(s, q->header.luks_offset, q->header.luks_bytes, 1);
	count(s, q->header.refcount_table_offset,
	      (uint64_t)q->header.refcount_table_clusters << q->cluster_bits, 1);
	for (uint32_t i = 0; i < a->table_entries; i++)
		count(s, a->table[i], a->table[i] ? q->cluster_size : 0, 1);
	for (uint32_t i = 0; i < q->l1_entries; i++) {
		uint64_t table = qcow2_l1_get(q, i) & QCOW2_OFFSET_MASK;

		if (q->l1_bad && q->l1_bad[i / 64] >> i % 64 & 1)
			rc = -EUCLEAN;
		count(s, table, table ? q->cluster_size : 0, 1);
	}
	pthread_mutex_unlock(&q->lock);
	return rc;
}

/* --- snapshots ------------------------------------------------------------------------------ */

/* An entry of a snapshot's L1. */
static int collect_table(struct scan *s, uint64_t word)
{
	const struct qcow2 *q = s->q;
	uint64_t table = word & QCOW2_OFFSET_MASK;
	uint64_t file = __atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED);

	if (table == 0)
		return 0;
	if (!ox_is_aligned(table, q->cluster_size) || table >= file)
		return -EUCLEAN;
	if (s->table_count == s->table_room) {
		size_t room = ox_max(s->table_room * 2, (size_t)1024);
		uint64_t *more;

		if (s->table_count == TABLES_MAX)
			return -E2BIG;
		more = realloc(s->tables, room * sizeof(*more));
		if (!more)
			return -ENOMEM;
		s->tables = more;
		s->table_room = room;
	}
	s->tables[s->table_count++] = table;
	return 0;
}

static int compare_words(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Snapshots share most of their tables: each is read once, and counts as often as it is named. */
static int collect_tables_co(struct scan *s)
{
	const struct qcow2 *q = s->q;
	int rc = 0;

	if (q->header.snapshot_count > 0 && !q->snapshots)
		return -EUCLEAN;
	for (uint32_t i = 0; i < q->header.snapshot_count && rc == 0; i++) {
		const struct qcow2_snapshot *snapshot = &q->snapshots[i];

		if (snapshot->l1_entries)
			rc = each_word_co(s, snapshot->l1_offset, snapshot->l1_entries,
			                  collect_table);
	}
	if (s->table_count)
		qsort(s->tables, s->table_count, sizeof(*s->tables), compare_words);
	return rc;
}

static int count_table_co(struct scan *s, uint64_t table, size_t weight)
{
	const struct qcow2 *q = s->q;

	count(s, table, q->cluster_size, weight);
	for (uint64_t at = 0; at < q->cluster_size; at += q->block_bytes) {
		int rc = read_block_co(s, table + at, q->block_bytes);

		if (rc < 0)
			return rc;
		for (uint32_t i = 0; i < q->block_bytes; i += q->entry_bytes)
			count_entry(s, ox_get_be64(s->buffer + i), weight);
	}
	return 0;
}

static int count_snapshots_co(struct scan *s)
{
	const struct qcow2 *q = s->q;
	uint64_t bytes = 0;
	size_t same;
	int rc = 0;

	for (uint32_t i = 0; i < q->header.snapshot_count; i++) {
		const struct qcow2_snapshot *snapshot = &q->snapshots[i];

		count(s, snapshot->l1_offset, (uint64_t)snapshot->l1_entries * 8, 1);
		bytes = snapshot->entry_offset + 40 + snapshot->extra_bytes + strlen(snapshot->id) +
		        strlen(snapshot->name);
	}
	count(s, q->header.snapshots_offset, bytes, 1);
	for (size_t i = 0; i < s->table_count && rc == 0; i += same) {
		same = 1;
		while (i + same < s->table_count && s->tables[i + same] == s->tables[i])
			same++;
		rc = count_table_co(s, s->tables[i], same);
	}
	return rc;
}

/* --- notes ---------------------------------------------------------------------------------- */

static const struct qcow2_note *note_at(const struct qcow2_allocator *a, uint64_t number)
{
	return &a->notes[number & (a->notes_room - 1)];
}

/* References that the map has lost already; the number of notes.  Lock held. */
static uint64_t count_notes(struct scan *s)
{
	const struct qcow2_allocator *a = s->q->alloc;

	for (uint64_t i = a->notes_head; i < a->notes_tail; i++) {
		const struct qcow2_note *note = note_at(a, i);

		count(s, note->host, note->bytes, 1);
	}
	return a->notes_tail;
}

/* Those that it lost while it was walked.  Lock held. */
static void mark_late(struct scan *s, uint64_t from)
{
	const struct qcow2_allocator *a = s->q->alloc;

	for (uint64_t i = from; i < a->notes_tail; i++) {
		const struct qcow2_note *note = note_at(a, i);
		uint64_t first, end;

		clip(s, note->host, note->bytes, &first, &end);
		for (; first < end; first++)
			s->late[(first - s->first) / 64] |= UINT64_C(1) << (first - s->first) % 64;
	}
}

/* --- finding ------------------------------------------------------------------------------- */

/* How often the cluster is counted too much.  Lock held. */
static uint64_t excess(struct scan *s, const struct qcow2_part *part, uint64_t cluster)
{
	uint64_t stored = qcow2_part_count(s->q, part, cluster), i = cluster - s->first;

	if (stored <= s->counts[i] || s->counts[i] == COUNT_MAX)
		return 0;
	if (s->late[i / 64] >> i % 64 & 1) {
		s->unsure = true;
		return 0;
	}
	/* What somebody registered as metadata and this scan does not know. */
	if (s->counts[i] == 0 && qcow2_is_metadata(s->q->alloc, cluster))
		return 0;
	return ox_min(stored - s->counts[i], (uint64_t)EXCESS_MAX);
}

/* [first, end) is within one part.  Gate held. */
static int note_leaks_co(struct scan *s, uint64_t first, uint64_t end)
{
	struct qcow2 *q = s->q;
	struct qcow2_part *part;
	int rc = qcow2_part_get_co(s->channel, first >> q->alloc->part_shift, &part);

	if (rc < 0 || !part)
		return rc;
	pthread_mutex_lock(&q->lock);
	for (uint64_t i = first; i < end; i++) {
		uint64_t times = excess(s, part, i);

		s->leaks += times > 0;
		for (; times > 0; times--)
			qcow2_note_free(q, i << q->cluster_bits, q->cluster_size);
	}
	pthread_mutex_unlock(&q->lock);
	return 0;
}

/* A note that is made meanwhile is not late: the walk is over, and found the reference. */
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

static int scan_window_co(struct scan *s)
{
	struct qcow2 *q = s->q;
	size_t clusters = (size_t)(s->end - s->first);
	uint64_t noted;
	int rc;

	memset(s->counts, 0, clusters * sizeof(*s->counts));
	memset(s->late, 0, (clusters + 63) / 64 * sizeof(*s->late));
	pthread_mutex_lock(&q->lock);
	noted = count_notes(s);
	pthread_mutex_unlock(&q->lock);
	rc = count_structures(s);
	if (rc == 0)
		rc = count_bitmaps_co(s);
	if (rc == 0)
		rc = count_snapshots_co(s);
	if (rc == 0)
		rc = qcow2_walk_co(s->channel, count_walked, s);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	mark_late(s, noted);
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
	size_t clusters;
	int rc = frontier_co(s->channel, &s->frontier);

	if (rc < 0)
		return rc;
	clusters = (size_t)ox_min(s->frontier, WINDOW);
	s->counts = malloc((clusters + 1) * sizeof(*s->counts));
	s->late = malloc((clusters / 64 + 1) * sizeof(*s->late));
	s->buffer = aligned_alloc(4096, ox_max(s->q->block_bytes, 4096u));
	if (!s->counts || !s->late || !s->buffer)
		return -ENOMEM;
	rc = collect_tables_co(s);
	for (s->first = 0; s->first < s->frontier && rc == 0; s->first = s->end) {
		s->end = ox_min(s->frontier, s->first + WINDOW);
		rc = scan_window_co(s);
	}
	return rc;
}

/* True: something was left alone because the map changed. */
static bool scan_once_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct scan s = {.channel = channel, .q = q};
	int rc = scan_co(&s);

	free(s.counts);
	free(s.late);
	free(s.tables);
	free(s.buffer);
	if (rc < 0)
		ox_log(OX_LOG_WARNING,
		       "%s: what its last writer left allocated cannot be found: %s; oxbow check "
		       "-r leaks can",
		       q->image->store->path, strerror(-rc));
	else if (s.leaks)
		ox_log(OX_LOG_INFO,
		       "%s: %llu clusters that its last writer left allocated are freed",
		       q->image->store->path, (unsigned long long)s.leaks);
	return rc == 0 && s.unsure;
}

static void scan_fiber_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_range background = {.end = 1, .loop = channel->loop};
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	bool unsure = true, release;
	uint64_t ready;

	ox_range_acquire_co(&a->background, &background);
	for (unsigned pass = 0; pass < PASSES && unsure; pass++)
		unsure = scan_once_co(channel);
	pthread_mutex_lock(&q->lock);
	a->leak_scan = false;
	a->leak_unsure = unsure;
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

void qcow2_leak_finish_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	bool unsure;

	pthread_mutex_lock(&q->lock);
	unsure = a->leak_unsure;
	a->leak_unsure = false;
	pthread_mutex_unlock(&q->lock);
	if (unsure)
		(void)scan_once_co(channel);
}
