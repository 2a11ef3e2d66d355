/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Filling the reserve, and giving it back.
 *
 * At half use the next batch is made ready in the background; its size grows fourfold from 16 MiB
 * while batches go fast, up to 256 MiB: at 50,000 allocations a second, 64 KiB clusters in batches
 * of 64 MiB would mean one every 20 ms, and what a larger one costs is a few kilobytes of refcounts
 * and, after a power cut, a few more clusters for the leak scan.
 *
 * A batch takes free space inside the file first, so that a file does not outgrow its disk; what is
 * missing, and all clusters for L2 tables, comes from the frontier.  One flush of the host makes it
 * durable, two if there are new refcount blocks.
 *
 * Finishing returns what is left: then the file has neither leaks nor a tail of unused space.
 *
 * Locking: the gate for batches, q->lock for the reserve; take and untake go on meanwhile.
 */
#include "image/qcow2/alloc.h"
#include <errno.h>

#define FIRST_BATCH    (UINT64_C(16) << 20) /* bytes of data */
#define LAST_BATCH     (UINT64_C(256) << 20)
#define BATCH_CLUSTERS 64u /* at least */
#define BATCH_BLOCKS   32u /* at most what so many refcount blocks count */
#define LAST_TABLES    512u
#define SLOW_NS        UINT64_C(5000000000) /* a batch that lasts longer could have been smaller */

/* --- batches ------------------------------------------------------------------------------------
 */

static uint64_t clamp(uint64_t value, uint64_t least, uint64_t most)
{
	return ox_max(ox_min(value, most), least);
}

/* How large the next batch is.  `tables_alone`: they are short and data is not. */
static void size_batch(struct qcow2 *q, bool tables_alone)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t disk = __atomic_load_n(&q->image->size, __ATOMIC_RELAXED) >> q->cluster_bits;
	uint64_t least = ox_max(FIRST_BATCH >> q->cluster_bits, (uint64_t)BATCH_CLUSTERS);
	uint64_t most = ox_max(LAST_BATCH >> q->cluster_bits, (uint64_t)BATCH_CLUSTERS);
	uint64_t now = ox_clock_ns(), tables;

	most = ox_min(most, (uint64_t)BATCH_BLOCKS << a->block_shift);
	/* What is counted ahead of need shall not make a small disk's file much larger than it. */
	most = ox_min(most, ox_max(disk / 16, (uint64_t)BATCH_CLUSTERS));
	if (tables_alone)
		a->tables_batch *= 2;
	else if (a->last_refill_ns == 0)
		a->data_batch = least;
	else if (now - a->last_refill_ns > SLOW_NS)
		a->data_batch /= 2;
	else
		a->data_batch *= 4;
	a->last_refill_ns = now;
	a->data_batch = clamp(a->data_batch, ox_min(least, most), most);
	/* What the batch's data needs, if it is in a row on the guest's disk too. */
	tables = a->data_batch / (q->cluster_size / q->entry_bytes) + 1;
	most = clamp(q->l1_entries, 1, LAST_TABLES);
	a->tables_batch =
	        clamp(ox_max(a->tables_batch, tables), ox_min(most, QCOW2_FIRST_TABLES), most);
}

/* Clusters that were counted and do not become the reserve's.  Gate held. */
static void undo_co(struct ox_image_channel *channel, struct qcow2_space_list *list)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t first, count;
	bool zeroed;

	for (;;) {
		int rc;

		pthread_mutex_lock(&q->lock);
		count = qcow2_space_take(a, list, UINT64_MAX, &first, &zeroed);
		pthread_mutex_unlock(&q->lock);
		if (count == 0)
			return;
		rc = qcow2_count_co(channel, first, count, QCOW2_COUNT_CLEAR, NULL, NULL);
		if (rc < 0)
			continue; /* cannot be read any more: stays counted */
		/* Only what was never used before is the frontier's again. */
		if (first + count == a->frontier && a->frontier > a->first_frontier) {
			uint64_t back = ox_max(first, a->first_frontier);

			pthread_mutex_lock(&q->lock);
			a->frontier = back;
			pthread_mutex_unlock(&q->lock);
			count = back - first;
		}
		qcow2_free_run_add(a, first, count);
	}
}

/* From the frontier: up to `tables` and `data` clusters, fewer if it must be, in one row. */
static int take_new_space_co(struct ox_image_channel *channel, uint64_t tables, uint64_t data,
                             struct qcow2_space_list *table_list,
                             struct qcow2_space_list *data_list)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t first;
	bool zeroed, noted;
	int rc;

	if (tables + data == 0)
		return 0;
	for (;;) {
		rc = qcow2_frontier_take_co(channel, tables + data, &first, &zeroed);
		if ((rc != -ENOSPC && rc != -EFBIG) || tables + data == 1)
			break;
		/* The last clusters of a device: a table more than anything. */
		if (data > 0)
			data /= 2;
		else
			tables /= 2;
		tables = ox_min(tables, ox_max(data, (uint64_t)1));
	}
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	noted = qcow2_space_add(a, table_list, first, tables, zeroed) &&
	        qcow2_space_add(a, data_list, first + tables, data, zeroed);
	pthread_mutex_unlock(&q->lock);
	return noted ? 0 : -ENOMEM;
}

/* The batch is durable: it becomes the reserve's. */
static void give_out(struct qcow2 *q, struct qcow2_space_list *tables,
                     struct qcow2_space_list *data)
{
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_space *space;

	pthread_mutex_lock(&q->lock);
	TAILQ_FOREACH (space, tables, link)
		a->tables_left += space->count;
	TAILQ_FOREACH (space, data, link)
		a->data_left += space->count;
	TAILQ_CONCAT(&a->tables, tables, link);
	TAILQ_CONCAT(&a->data, data, link);
	pthread_mutex_unlock(&q->lock);
}

/* What a batch shall have of either kind. */
static void want_batch(struct qcow2 *q, uint64_t *data, uint64_t *tables, bool *reuse)
{
	struct qcow2_allocator *a = q->alloc;
	bool data_short, tables_short;

	pthread_mutex_lock(&q->lock);
	/* What is left may all be in the slices of channels that do not need it. */
	data_short = !q->data_file && (a->data_left * 2 <= a->data_batch || TAILQ_EMPTY(&a->data));
	tables_short = a->tables_left * 2 <= a->tables_batch;
	if (data_short || tables_short)
		size_batch(q, !data_short);
	*data = data_short ? a->data_batch : 0;
	*tables = tables_short ? a->tables_batch - ox_min(a->tables_left, a->tables_batch) : 0;
	*reuse = !a->leak_scan;
	pthread_mutex_unlock(&q->lock);
}

static bool may_find_free(const struct qcow2_allocator *a)
{
	return a->free_count > 0 || a->scan_cursor < a->scan_end;
}

/* Gate held. */
static int refill_co(struct ox_image_channel *channel)
{
	struct qcow2_space_list data = TAILQ_HEAD_INITIALIZER(data);
	struct qcow2_space_list tables = TAILQ_HEAD_INITIALIZER(tables);
	struct qcow2 *q = qcow2_of(channel);
	uint64_t want_data, want_tables, short_of_data, got = 0;
	bool reuse;
	int rc = qcow2_frontier_begin_co(channel);

	if (rc < 0)
		return rc;
	want_batch(q, &want_data, &want_tables, &reuse);
	short_of_data = want_data;
	if (want_data > 0 && reuse)
		rc = qcow2_free_take_co(channel, want_data, &data, &got);
	/* A batch that is half full is as good, and lasts until the next look for free space. */
	want_data = got * 2 >= want_data ? 0 : want_data - got;
	if (rc == 0)
		rc = take_new_space_co(channel, want_tables, want_data, &tables, &data);
	/* The end of the device is the end for new space only: look on for free space. */
	while ((rc == -ENOSPC || rc == -EFBIG) && got == 0 && short_of_data && reuse &&
	       may_find_free(q->alloc)) {
		int found = qcow2_free_take_co(channel, short_of_data, &data, &got);

		rc = found < 0 ? found : rc;
	}
	if ((rc == -ENOSPC || rc == -EFBIG) && got > 0)
		rc = 0;
	if (rc == 0)
		rc = qcow2_settle_co(channel);
	if (rc == 0) {
		give_out(q, &tables, &data);
	} else {
		undo_co(channel, &tables);
		undo_co(channel, &data);
	}
	/* Whatever is wrong with it, whoever needs it hears of it. */
	(void)!qcow2_parts_trim_co(channel);
	return rc;
}

#define MORE_TRIES  16u
#define LACKS_DATA  1
#define LACKS_TABLE 2

/* What there is nothing of to take: 0, or LACKS_*. */
static int look(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_slice *slice = channel->priv;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	if (!q->data_file && slice->count == 0 && !qcow2_slice_fill(q, slice, 1))
		rc |= LACKS_DATA;
	if (q->alloc->tables_left == 0)
		rc |= LACKS_TABLE;
	if (__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
		rc = -EIO;
	pthread_mutex_unlock(&q->lock);
	return rc;
}

int qcow2_alloc_more_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct ox_range range;
	int rc = look(channel), lacked, lacks;

	if (rc <= 0)
		return rc;
	qcow2_gate_enter_co(a, &range, channel);
	for (unsigned tries = 0; tries < MORE_TRIES; tries++) {
		rc = lacked = look(channel);
		if (lacked <= 0)
			break;
		rc = refill_co(channel);
		pthread_mutex_lock(&q->lock);
		a->failed = rc;
		pthread_mutex_unlock(&q->lock);
		/* Whoever lacked something and has it now tries again, even if there is nothing of
		 * the other kind: which of the two is needed, the caller knows.  Also without new
		 * space there may be something in another channel's slice. */
		lacks = look(channel);
		if (lacks >= 0 && lacks != lacked)
			rc = 0;
		else if (rc == 0)
			rc = lacks < 0 ? lacks : -ENOSPC;
		/* Others may have taken all that was new. */
		if (rc != -ENOSPC || lacks < 0 || a->failed)
			break;
	}
	qcow2_gate_leave(a, &range);
	return rc;
}

static void refill_fiber_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_range range, background = {.end = 1, .loop = channel->loop};
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	int rc = 0;
	bool go;

	ox_range_acquire_co(&a->background, &background);
	qcow2_gate_enter_co(a, &range, channel);
	pthread_mutex_lock(&q->lock);
	/* The image may have been finished meanwhile. */
	go = a->begun && !a->finishing && qcow2_wants_refill(q) &&
	     !__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&q->lock);
	if (go)
		rc = refill_co(channel);
	pthread_mutex_lock(&q->lock);
	a->refilling = false;
	a->failed = rc;
	pthread_mutex_unlock(&q->lock);
	qcow2_gate_leave(a, &range);
	ox_range_release(&a->background, &background);
}

/* The end of the loop's turn, without the lock. */
void qcow2_slice_run_deferred(struct ox_deferred *deferred)
{
	struct qcow2_slice *slice = ox_container_of(deferred, struct qcow2_slice, deferred);
	struct ox_image_channel *channel = slice->channel;
	struct qcow2 *q = qcow2_of(channel);
	bool refill, release;

	pthread_mutex_lock(&q->lock);
	refill = slice->start_refill;
	release = slice->start_release;
	slice->start_refill = false;
	slice->start_release = false;
	pthread_mutex_unlock(&q->lock);
	if (refill && ox_image_background(channel, refill_fiber_co, NULL) < 0) {
		pthread_mutex_lock(&q->lock);
		q->alloc->refilling = false;
		pthread_mutex_unlock(&q->lock);
	}
	if (release && ox_image_background(channel, qcow2_release_fiber_co, NULL) < 0) {
		pthread_mutex_lock(&q->lock);
		q->alloc->releasing = false;
		pthread_mutex_unlock(&q->lock);
	}
}

/* --- metadata in one piece ----------------------------------------------------------------------
 */

static int zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t bytes)
{
	struct ox_io io = {.op = OX_IO_ZERO, .offset = offset, .length = bytes};

	return ox_store_submit_co(channel->store, &io);
}

int qcow2_alloc_metadata_co(struct ox_image_channel *channel, uint64_t clusters, uint64_t *host)
{
	struct qcow2_space_list list = TAILQ_HEAD_INITIALIZER(list);
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct ox_range range;
	uint64_t first = 0;
	bool zeroed, noted;
	int rc;

	if (clusters == 0)
		return -EINVAL;
	if (__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
		return -EIO;
	qcow2_gate_enter_co(a, &range, channel);
	rc = qcow2_frontier_begin_co(channel);
	if (rc == 0)
		rc = qcow2_frontier_take_co(channel, clusters, &first, &zeroed);
	if (rc == 0) {
		pthread_mutex_lock(&q->lock);
		noted = qcow2_space_add(a, &list, first, clusters, zeroed);
		pthread_mutex_unlock(&q->lock);
		if (!zeroed)
			rc = zero_co(channel, first << q->cluster_bits,
			             clusters << q->cluster_bits);
		if (rc == 0)
			rc = noted ? qcow2_settle_co(channel) : -ENOMEM;
	}
	if (rc < 0)
		undo_co(channel, &list);
	else
		*host = first << q->cluster_bits;
	pthread_mutex_lock(&q->lock);
	TAILQ_CONCAT(&a->spare, &list, link);
	pthread_mutex_unlock(&q->lock);
	qcow2_gate_leave(a, &range);
	return rc;
}

/* --- finishing
 * ------------------------------------------------------------------------------------ */

/* All of the reserve; it is in `list` then.  Lock held. */
static void collect_reserve(struct qcow2_allocator *a, struct qcow2_space_list *list)
{
	struct qcow2_slice *slice;

	TAILQ_FOREACH (slice, &a->slices, link) {
		(void)qcow2_space_add(a, list, slice->first, slice->count, slice->zeroed);
		slice->count = 0;
	}
	TAILQ_CONCAT(list, &a->data, link);
	TAILQ_CONCAT(list, &a->tables, link);
	a->data_left = 0;
	a->tables_left = 0;
}

/* The end of the last counted cluster, but nothing that was there before this session is cut: if
 * its refcounts are wrong, it may still be somebody's. */
static int find_end_co(struct ox_image_channel *channel, uint64_t *end)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t at = a->frontier, stop = a->first_frontier;

	while (at > stop) {
		uint64_t first = ox_max(ox_align_down(at - 1, UINT64_C(1) << a->part_shift), stop);
		struct qcow2_part *part;
		int rc = qcow2_part_get_co(channel, (at - 1) >> a->part_shift, &part);

		if (rc < 0)
			return rc;
		while (at > first && (!part || qcow2_part_count(q, part, at - 1) == 0))
			at--;
		if (at > first)
			break;
	}
	*end = ox_min(__atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED),
	              at << q->cluster_bits);
	return 0;
}

/* The reserve is free space again. */
static int give_back_co(struct ox_image_channel *channel)
{
	struct qcow2_space_list list = TAILQ_HEAD_INITIALIZER(list);
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct ox_range range;
	int rc = 0;

	qcow2_gate_enter_co(a, &range, channel);
	/* Structures that a failed batch left half shown. */
	if (a->old_table_clusters || a->table_first < a->table_end)
		rc = qcow2_settle_co(channel);
	pthread_mutex_lock(&q->lock);
	collect_reserve(a, &list);
	pthread_mutex_unlock(&q->lock);
	undo_co(channel, &list);
	qcow2_gate_leave(a, &range);
	return rc;
}

/* All notes are released.  What the leak scan found, or was held up by it, is behind the last
 * commit. */
static int release_rest_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t noted;
	bool wait;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	noted = a->notes_tail;
	wait = a->notes_ready < noted;
	pthread_mutex_unlock(&q->lock);
	if (wait)
		rc = qcow2_commit_co(channel);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	a->notes_ready = ox_max(a->notes_ready, noted);
	pthread_mutex_unlock(&q->lock);
	return qcow2_release_co(channel, noted);
}

/* The next change begins anew, whatever others do to the file meanwhile. */
static int forget_frontier_co(struct ox_image_channel *channel, uint64_t *end)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct ox_range range;
	int rc, trimmed;

	qcow2_gate_enter_co(a, &range, channel);
	rc = find_end_co(channel, end);
	trimmed = qcow2_parts_trim_co(channel);
	pthread_mutex_lock(&q->lock);
	a->begun = false;
	a->last_refill_ns = 0;
	a->data_batch = 0;
	a->tables_batch = QCOW2_FIRST_TABLES;
	a->failed = 0;
	pthread_mutex_unlock(&q->lock);
	qcow2_gate_leave(a, &range);
	return rc < 0 ? rc : trimmed;
}

int qcow2_alloc_finish_co(struct ox_image_channel *channel, uint64_t *end)
{
	struct ox_range background = {.end = 1, .exclusive = true, .loop = channel->loop};
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	a->finishing = true;
	pthread_mutex_unlock(&q->lock);
	ox_range_acquire_co(&a->background, &background);
	/* Not before: the background makes the file longer. */
	*end = __atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED);
	if (a->begun) {
		rc = give_back_co(channel);
		if (rc == 0)
			qcow2_leak_finish_co(channel);
	}
	if (rc == 0)
		rc = release_rest_co(channel);
	if (rc == 0 && a->begun)
		rc = forget_frontier_co(channel, end);
	pthread_mutex_lock(&q->lock);
	a->finishing = false;
	pthread_mutex_unlock(&q->lock);
	ox_range_release(&a->background, &background);
	return rc;
}
