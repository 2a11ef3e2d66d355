/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Clusters given back, and free space inside the file.
 *
 *     noted (qcow2_free_later)
 *       -> ready     the commit that removed every entry is durable (qcow2_freed_durable)
 *       -> released  after a grace period: refcounts fall; what is at 0 is discarded, and then is
 *                    free space for later batches
 *
 * Notes are a queue: they become ready, and are released, in the order in which they were made.
 * While the leak scan runs they wait, so that it finds in the queue whatever the map lost
 * meanwhile.
 *
 * Free space is known from releases (free_runs) and from a cursor that goes once over the refcounts
 * of the file as it was when writing began, and again over what free_runs had no room for.  Both
 * are hints: a cluster is taken only if its refcount is 0 then and it is no metadata that memory
 * knows of; so the two may name the same.
 *
 * Locking: the queue is under q->lock; free_runs and the cursor are the gate's.
 */
#include "image/qcow2/alloc.h"
#include "base/fiber.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

#define FIRST_NOTES 64u
#define CHUNK_NOTES 64u  /* released at a time, before others may have the gate */
#define CHUNK_RUNS  256u /* of them discarded */
#define BATCH_RUNS  256u /* pieces of free space in one batch */
#define BATCH_PARTS 32u  /* parts that one batch looks into */

void qcow2_free_init(struct qcow2_allocator *a)
{
	a->free_runs = ox_xcalloc(QCOW2_FREE_RUNS_MAX, sizeof(*a->free_runs));
}

void qcow2_free_end(struct qcow2_allocator *a)
{
	free(a->free_runs);
	free(a->notes);
}

/* --- notes -------------------------------------------------------------------------------------
 */

static struct qcow2_note *note_at(const struct qcow2_allocator *a, uint64_t number)
{
	return &a->notes[number & (a->notes_room - 1)];
}

static bool grow_notes(struct qcow2_allocator *a)
{
	uint64_t room = a->notes_room ? a->notes_room * 2 : FIRST_NOTES;
	struct qcow2_note *more = calloc(room, sizeof(*more));

	if (!more)
		return false;
	for (uint64_t i = a->notes_head; i < a->notes_tail; i++)
		more[i & (room - 1)] = *note_at(a, i);
	free(a->notes);
	a->notes = more;
	a->notes_room = room;
	return true;
}

/* The note before goes on here, at a cluster's border: no cluster would be counted twice. */
static bool extend_note(const struct qcow2 *q, uint64_t host, uint64_t bytes)
{
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_note *last;

	if (a->notes_tail == a->notes_ready)
		return false;
	last = note_at(a, a->notes_tail - 1);
	if (last->host + last->bytes != host || !ox_is_aligned(host, q->cluster_size) ||
	    last->number != qcow2_commit_number(q))
		return false;
	last->bytes += bytes;
	return true;
}

void qcow2_note_free(struct qcow2 *q, uint64_t host, uint64_t bytes)
{
	struct qcow2_allocator *a = q->alloc;

	if (bytes == 0 || extend_note(q, host, bytes))
		return;
	/* Without memory the clusters stay counted, for the next check to find. */
	if (a->notes_tail - a->notes_head == a->notes_room && !grow_notes(a))
		return;
	*note_at(a, a->notes_tail++) =
	        (struct qcow2_note){.host = host, .bytes = bytes, .number = qcow2_commit_number(q)};
}

bool qcow2_frees_wait(const struct qcow2 *q)
{
	return q->alloc->notes_ready != q->alloc->notes_tail;
}

void qcow2_free_later(struct ox_image_channel *channel, uint64_t host, uint64_t bytes)
{
	qcow2_note_free(qcow2_of(channel), host, bytes);
}

void qcow2_freed_durable(struct ox_image_channel *channel, uint64_t number)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_slice *slice = channel->priv;

	while (a->notes_ready < a->notes_tail && note_at(a, a->notes_ready)->number < number)
		a->notes_ready++;
	if (!slice || a->notes_ready == a->notes_head || a->releasing || a->finishing ||
	    a->leak_scan)
		return;
	a->releasing = true;
	slice->start_release = true;
	qcow2_slice_kick(slice);
}

/* --- releasing ---------------------------------------------------------------------------------
 */

struct release {
	struct qcow2_note notes[CHUNK_NOTES];
	unsigned note_count;
	struct qcow2_run runs[CHUNK_RUNS];
	unsigned run_count;
	struct qcow2_allocator *a;
	uint64_t underflow; /* offset + 1 of a note whose cluster was at 0 already */
	int failed;         /* refcounts that cannot be read */
};

static void note_freed(void *arg, uint64_t first, uint64_t count)
{
	struct release *r = arg;
	struct qcow2_run *last = r->run_count ? &r->runs[r->run_count - 1] : NULL;

	if (last && last->first + last->count == first) {
		last->count += count;
		return;
	}
	/* Too many to remember: free, but not discarded. */
	if (r->run_count == CHUNK_RUNS)
		qcow2_free_run_add(r->a, first, count);
	else
		r->runs[r->run_count++] = (struct qcow2_run){first, count};
}

static int compare_notes(const void *a, const void *b)
{
	uint64_t x = ((const struct qcow2_note *)a)->host;
	uint64_t y = ((const struct qcow2_note *)b)->host;

	return x < y ? -1 : x > y;
}

/* A hint: whatever comes of it. */
static void discard_co(struct ox_image_channel *channel, const struct qcow2_run *run)
{
	struct qcow2 *q = qcow2_of(channel);
	struct ox_store *store = q->image->store;
	uint64_t size = __atomic_load_n(&store->size, __ATOMIC_RELAXED);
	struct ox_io io = {
	        .op = OX_IO_DISCARD,
	        .offset = run->first << q->cluster_bits,
	        .length = run->count << q->cluster_bits,
	};

	if (!store->limits.can_discard || q->image->options.discard_no_unref || io.offset >= size)
		return;
	io.length = ox_min(io.length, size - io.offset);
	(void)!ox_store_submit_co(channel->store, &io);
}

/* Up to CHUNK_NOTES of those below `upto`.  Lock held. */
static void take_notes(struct qcow2_allocator *a, struct release *r, uint64_t upto)
{
	upto = ox_min(upto, a->notes_ready);
	r->note_count = 0;
	while (r->note_count < CHUNK_NOTES && a->notes_head < upto && !a->leak_scan)
		r->notes[r->note_count++] = *note_at(a, a->notes_head++);
}

/* Gate held. */
static void release_chunk_co(struct ox_image_channel *channel, struct release *r)
{
	struct qcow2 *q = qcow2_of(channel);
	int rc;

	r->run_count = 0;
	/* In the file's order each part of the refcounts is loaded once. */
	qsort(r->notes, r->note_count, sizeof(r->notes[0]), compare_notes);
	for (unsigned i = 0; i < r->note_count; i++) {
		const struct qcow2_note *note = &r->notes[i];
		uint64_t first = note->host >> q->cluster_bits;
		uint64_t last = (note->host + note->bytes - 1) >> q->cluster_bits;

		rc = qcow2_count_co(channel, first, last - first + 1, QCOW2_COUNT_DOWN, note_freed,
		                    r);
		if (rc == -EUCLEAN)
			r->underflow = note->host + 1;
		else if (rc < 0)
			r->failed = rc;
	}
	/* Nobody can take them before: that needs the gate. */
	for (unsigned i = 0; i < r->run_count; i++) {
		discard_co(channel, &r->runs[i]);
		qcow2_free_run_add(q->alloc, r->runs[i].first, r->runs[i].count);
	}
	rc = qcow2_parts_trim_co(channel);
	if (rc < 0)
		r->failed = rc;
}

int qcow2_release_co(struct ox_image_channel *channel, uint64_t upto)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	OX_FREE struct release *r = calloc(1, sizeof(*r));
	struct ox_range range;

	if (!r)
		return -ENOMEM;
	r->a = a;
	do {
		qcow2_gate_enter_co(a, &range, channel);
		pthread_mutex_lock(&q->lock);
		take_notes(a, r, upto);
		pthread_mutex_unlock(&q->lock);
		release_chunk_co(channel, r);
		pthread_mutex_lock(&q->lock);
		/* There may be something to take again. */
		if (r->run_count > 0)
			a->failed = 0;
		pthread_mutex_unlock(&q->lock);
		qcow2_gate_leave(a, &range);
	} while (r->note_count > 0);
	if (r->underflow)
		(void)qcow2_corrupt_co(channel,
		                       "the cluster at offset %llu was in use with refcount 0",
		                       (unsigned long long)(r->underflow - 1));
	/* Counted for ever, which harms nobody; a check finds them. */
	if (r->failed)
		ox_log(OX_LOG_WARNING, "%s: freed clusters stay allocated: %s",
		       q->image->store->path, strerror(-r->failed));
	return 0;
}

void qcow2_release_fiber_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_range background = {.end = 1, .loop = channel->loop};
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;

	ox_range_acquire_co(&a->background, &background);
	for (;;) {
		uint64_t upto;
		bool go;

		pthread_mutex_lock(&q->lock);
		upto = a->notes_ready;
		go = a->notes_head < upto && !a->leak_scan && !a->finishing;
		if (!go)
			a->releasing = false;
		pthread_mutex_unlock(&q->lock);
		if (!go)
			break;
		ox_image_grace_co(channel);
		if (qcow2_release_co(channel, upto) < 0)
			ox_sleep_co(UINT64_C(100000000)); /* no memory */
	}
	ox_range_release(&a->background, &background);
}

/* --- free space ----------------------------------------------------------------------------------
 */

/* The first run that ends at or behind the cluster. */
static unsigned find_run(const struct qcow2_allocator *a, uint64_t cluster)
{
	unsigned low = 0, high = a->free_count;

	while (low < high) {
		unsigned middle = (low + high) / 2;

		if (a->free_runs[middle].first + a->free_runs[middle].count < cluster)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void remove_runs(struct qcow2_allocator *a, unsigned at, unsigned count)
{
	memmove(&a->free_runs[at], &a->free_runs[at + count],
	        (a->free_count - at - count) * sizeof(a->free_runs[0]));
	a->free_count -= count;
}

void qcow2_free_run_add(struct qcow2_allocator *a, uint64_t first, uint64_t count)
{
	uint64_t end = first + count;
	unsigned at = find_run(a, first), last = at;

	if (count == 0)
		return;
	/* What it touches becomes one with it. */
	while (last < a->free_count && a->free_runs[last].first <= end) {
		first = ox_min(first, a->free_runs[last].first);
		end = ox_max(end, a->free_runs[last].first + a->free_runs[last].count);
		last++;
	}
	if (last > at) {
		a->free_runs[at] = (struct qcow2_run){first, end - first};
		remove_runs(a, at + 1, last - at - 1);
		return;
	}
	if (a->free_count == QCOW2_FREE_RUNS_MAX) {
		/* The cursor will come by again. */
		a->scan_cursor = ox_min(a->scan_cursor, first);
		a->scan_end = ox_max(a->scan_end, end);
		return;
	}
	memmove(&a->free_runs[at + 1], &a->free_runs[at],
	        (a->free_count - at) * sizeof(a->free_runs[0]));
	a->free_runs[at] = (struct qcow2_run){first, end - first};
	a->free_count++;
}

struct claim {
	struct ox_image_channel *channel;
	struct qcow2_space_list *list;
	uint64_t want, got;
	unsigned runs, parts; /* that may still be taken, looked into */
};

static bool is_satisfied(const struct claim *c)
{
	return c->got >= c->want || c->runs == 0 || c->parts == 0;
}

/* Reads as zero from now on, if that is cheap. */
static bool make_zero_co(struct ox_image_channel *channel, uint64_t first, uint64_t count)
{
	struct qcow2 *q = qcow2_of(channel);
	struct ox_io io = {
	        .op = OX_IO_ZERO,
	        .flags = OX_IO_MAY_UNMAP | OX_IO_NO_FALLBACK,
	        .offset = first << q->cluster_bits,
	        .length = count << q->cluster_bits,
	};

	return q->image->store->limits.zero_is_fast && ox_store_submit_co(channel->store, &io) == 0;
}

/* Finds free clusters from *first on within one part. */
static uint64_t find_free(struct qcow2 *q, const struct qcow2_part *part, uint64_t *first,
                          uint64_t end, uint64_t want)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t at = *first, count = 0;

	pthread_mutex_lock(&q->lock);
	while (at < end && (qcow2_part_count(q, part, at) != 0 || qcow2_is_metadata(a, at)))
		at++;
	*first = at;
	while (at < end && count < want && qcow2_part_count(q, part, at) == 0 &&
	       !qcow2_is_metadata(a, at)) {
		at++;
		count++;
	}
	pthread_mutex_unlock(&q->lock);
	return count;
}

static int claim_run_co(struct claim *c, uint64_t first, uint64_t count)
{
	struct qcow2 *q = qcow2_of(c->channel);
	int rc = qcow2_count_co(c->channel, first, count, QCOW2_COUNT_UP, NULL, NULL);
	bool zeroed, noted;

	if (rc == 0) {
		zeroed = make_zero_co(c->channel, first, count);
		pthread_mutex_lock(&q->lock);
		noted = qcow2_space_add(q->alloc, c->list, first, count, zeroed);
		pthread_mutex_unlock(&q->lock);
		if (noted) {
			c->got += count;
			c->runs--;
			return 0;
		}
		rc = -ENOMEM;
	}
	(void)!qcow2_count_co(c->channel, first, count, QCOW2_COUNT_CLEAR, NULL, NULL);
	return rc;
}

/* Takes what is free from *at to `end` at the most, within *at's part; *at: where it left off. */
static int claim_part_co(struct claim *c, uint64_t *at, uint64_t end)
{
	struct qcow2 *q = qcow2_of(c->channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t in_part = UINT64_C(1) << a->part_shift, in_block = UINT64_C(1) << a->block_shift;
	struct qcow2_part *part;
	int rc = qcow2_part_get_co(c->channel, *at >> a->part_shift, &part);

	if (rc < 0)
		return rc;
	if (!part) {
		/* Nothing counts these clusters; to use them would take a new block. */
		*at = ox_min(end, ox_align_down(*at, in_block) + in_block);
		return 0;
	}
	c->parts--;
	end = ox_min(end, ox_align_down(*at, in_part) + in_part);
	while (*at < end && c->got < c->want && c->runs > 0) {
		uint64_t first = *at;
		uint64_t count = find_free(q, part, &first, end, c->want - c->got);

		*at = first + count;
		if (count > 0)
			rc = claim_run_co(c, first, count);
		if (rc < 0)
			return rc;
	}
	return 0;
}

static int claim_known_co(struct claim *c)
{
	struct qcow2_allocator *a = qcow2_of(c->channel)->alloc;

	while (a->free_count > 0 && !is_satisfied(c)) {
		struct qcow2_run *run = &a->free_runs[0];
		uint64_t at = run->first, end = run->first + run->count;
		int rc = claim_part_co(c, &at, end);

		/* Also after an error: those that cannot be read must not be tried for ever. */
		a->free_runs[0] = (struct qcow2_run){at, end - at};
		if (at == end || rc < 0)
			remove_runs(a, 0, 1);
		if (rc < 0)
			return rc;
	}
	return 0;
}

int qcow2_free_take_co(struct ox_image_channel *channel, uint64_t want,
                       struct qcow2_space_list *list, uint64_t *got)
{
	struct qcow2_allocator *a = qcow2_of(channel)->alloc;
	struct claim c = {
	        .channel = channel,
	        .list = list,
	        .want = want,
	        .runs = BATCH_RUNS,
	        .parts = BATCH_PARTS,
	};
	int rc = claim_known_co(&c);

	while (rc == 0 && a->scan_cursor < a->scan_end && !is_satisfied(&c)) {
		rc = claim_part_co(&c, &a->scan_cursor, a->scan_end);
		/* The part cannot be read: on to the next, another time. */
		if (rc < 0)
			a->scan_cursor =
			        ox_align_up(a->scan_cursor + 1, UINT64_C(1) << a->part_shift);
	}
	*got = c.got;
	return rc;
}
