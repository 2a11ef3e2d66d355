/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Space for writes, and zeroes.
 *
 * New clusters and tables are taken behind the file's end, which moves up in large steps (a step
 * is a system call that may block; the surplus is cut off at a clean end).  What is taken there
 * reads as zero, now and after a power cut.  A cluster that was taken and then not used goes to a
 * small list; who gets it from there is told that it holds something.
 *
 * A table is taken before the first write below its L1 entry, written together with that write's
 * entry, and put into L1 after it.  Until then lookup sees nothing of it (new_tables).
 *
 * discard: the format has no free space inside the file, so the generic layer's way is taken: the
 * file below gets the discard, the cluster stays mapped.  Zeroes go the same way where a cluster
 * is allocated; no cluster is ever leaked by a guest.
 *
 * Locking: q->lock for the space and the lists; a write's entries are its own, because its
 * clusters are under an exclusive range lock.
 */
#include "image/qed/qed.h"
#include <assert.h>
#include <errno.h>
#include <string.h>

#define STEP_MIN (UINT64_C(1) << 20)
#define STEP_MAX (UINT64_C(256) << 20)

/* struct ox_allocation's priv[] */
enum { A_BLOCK, A_TABLE, A_FLAGS };
#define A_AFTER_DATA (1u << 0) /* the entry is written after the data is durable */

/* --- space ------------------------------------------------------------------------------------ */

/* Lets the file reach to q->wanted, and some more. */
static int grow_round_co(struct ox_image_channel *channel, void *arg)
{
	struct qed *q = qed_of(channel);
	uint64_t wanted, step, reached;
	int rc;

	pthread_mutex_lock(&q->lock);
	wanted = q->wanted;
	reached = q->grown;
	pthread_mutex_unlock(&q->lock);
	if (wanted <= reached)
		return 0;
	step = ox_align_up(ox_max(STEP_MIN, ox_min(wanted / 8, STEP_MAX)), q->cluster_size);
	reached = wanted + step;
	rc = ox_store_truncate_co(channel->image->store, reached, OX_PREALLOC_OFF, NULL);
	if (rc < 0) {
		reached = wanted;
		rc = ox_store_truncate_co(channel->image->store, reached, OX_PREALLOC_OFF, NULL);
	}
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	q->grown = reached;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

/* Lock held. */
static bool take_at_end(struct qed *q, uint64_t bytes, uint64_t *offset)
{
	if (!ox_range_within(q->end, bytes, q->grown)) {
		q->wanted = ox_max(q->wanted, q->end + bytes);
		return false;
	}
	*offset = q->end;
	q->end += bytes;
	return true;
}

int qed_take_space_co(struct ox_image_channel *channel, uint64_t bytes, uint64_t *offset)
{
	struct qed *q = qed_of(channel);
	bool taken;
	int rc;

	if (bytes > INT64_MAX / 4)
		return -EFBIG;
	for (;;) {
		pthread_mutex_lock(&q->lock);
		if (q->end > INT64_MAX / 2) {
			pthread_mutex_unlock(&q->lock);
			return -EFBIG;
		}
		taken = take_at_end(q, bytes, offset);
		pthread_mutex_unlock(&q->lock);
		if (taken)
			return 0;
		rc = qed_round_co(channel, &q->growing, grow_round_co, NULL);
		if (rc < 0)
			return rc;
	}
}

/* Clusters that nobody was shown.  Lock held. */
static void give_back(struct qed *q, uint64_t offset, uint64_t clusters)
{
	while (clusters-- > 0 && q->spare_count < QED_SPARE_MAX) {
		q->spare[q->spare_count++] = offset;
		offset += q->cluster_size;
	}
}

/* --- tables ----------------------------------------------------------------------------------- */

static struct qed_new_table *find_new_table(const struct qed *q, uint64_t index)
{
	struct qed_new_table *table;

	LIST_FOREACH (table, &q->new_tables, link) {
		if (table->index == index)
			return table;
	}
	return NULL;
}

/* Notes that L1 entry `index` shall have the table that was taken at `offset`; if somebody else was
 * quicker, the space is given back and his table is *table. */
static int note_table(struct qed *q, uint64_t index, uint64_t offset, uint64_t *table)
{
	struct qed_new_table *made = malloc(sizeof(*made)), *other;
	uint64_t linked;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	linked = qed_l1_entry(q, index);
	other = find_new_table(q, index);
	if (linked != QED_UNALLOCATED || other) {
		*table = linked != QED_UNALLOCATED ? linked : other->offset;
		give_back(q, offset, q->header.table_size);
	} else if (!made || !qed_add_table(q, offset)) {
		give_back(q, offset, q->header.table_size);
		rc = -ENOMEM;
	} else {
		made->index = index;
		made->offset = *table = offset;
		LIST_INSERT_HEAD(&q->new_tables, made, link);
		made = NULL;
	}
	pthread_mutex_unlock(&q->lock);
	free(made);
	return rc;
}

/* The table below L1 entry `index`; with `make`, one is made if there is none.  *table 0: none. */
static int find_table_co(struct ox_image_channel *channel, uint64_t index, bool make,
                         uint64_t *table)
{
	struct qed *q = qed_of(channel);
	struct qed_new_table *made;
	uint64_t offset;
	int rc;

	pthread_mutex_lock(&q->lock);
	*table = qed_l1_entry(q, index);
	made = *table == QED_UNALLOCATED ? find_new_table(q, index) : NULL;
	if (made)
		*table = made->offset;
	pthread_mutex_unlock(&q->lock);
	if (*table == QED_INVALID)
		return -EIO;
	if (*table != QED_UNALLOCATED || !make)
		return 0;
	rc = qed_take_space_co(channel, q->table_bytes, &offset);
	if (rc < 0)
		return rc;
	return note_table(q, index, offset, table);
}

/* --- writes ----------------------------------------------------------------------------------- */

bool qed_has_backing_at(const struct qed *q, uint64_t offset)
{
	const struct ox_image *backing = q->image->backing;

	if (!q->image->backing_file)
		return false;
	return !backing || offset < __atomic_load_n(&backing->size, __ATOMIC_ACQUIRE);
}

/* How many clusters from `cluster` on, at most `max`, are not data.  *shows: some of them may read
 * as something else than zero.  Lock held. */
static uint32_t count_free(const struct qed *q, const struct qed_block *block, uint64_t cluster,
                           uint64_t max, bool *shows)
{
	uint32_t first = (uint32_t)cluster & (q->block_entries - 1), n = 0;

	max = ox_min(max, (uint64_t)(q->block_entries - first));
	for (; n < max; n++) {
		uint64_t entry = qed_entry(block, first + n);

		if (entry > QED_ZERO)
			break;
		if (entry == QED_UNALLOCATED)
			*shows |= qed_has_backing_at(q, (cluster + n) << q->cluster_shift);
	}
	return n;
}

/* One spare cluster, if there is one and it will be filled whole: at the disk's end only a part is.
 */
static bool take_spare(struct qed *q, uint64_t cluster, uint64_t *offset)
{
	uint64_t end = (cluster + 1) << q->cluster_shift;
	bool taken = false;

	pthread_mutex_lock(&q->lock);
	if (q->spare_count > 0 && end <= qed_size(q)) {
		*offset = q->spare[--q->spare_count];
		taken = true;
	}
	pthread_mutex_unlock(&q->lock);
	return taken;
}

int qed_prepare_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct qed *q = qed_of(channel);
	uint64_t cluster = a->offset >> q->cluster_shift;
	uint64_t last = (a->offset + a->length - 1) >> q->cluster_shift;
	uint64_t index = cluster >> q->table_shift;
	struct qed_block *block;
	uint64_t table, entry;
	bool after_data = false, fresh = true;
	uint32_t n;
	int rc;

	if (qed_is_damaged(q))
		return -EIO;
	rc = find_table_co(channel, index, true, &table);
	if (rc < 0)
		return rc;
	rc = qed_get_block_co(channel, cluster, table, &block);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	n = count_free(q, block, cluster, last - cluster + 1, &after_data);
	entry = qed_entry(block, cluster & (q->block_entries - 1));
	pthread_mutex_unlock(&q->lock);
	if (n == 0) {
		/* It is data: either somebody was quicker, or an earlier write got no further than
		 * its table. */
		rc = entry == QED_INVALID ? -EIO : qed_link_table_co(channel, index, table);
		qed_put_block(q, block);
		return rc < 0 ? rc : -EAGAIN;
	}
	if (n == 1 && take_spare(q, cluster, &a->store_offset))
		fresh = false;
	else
		rc = qed_take_space_co(channel, (uint64_t)n << q->cluster_shift, &a->store_offset);
	if (rc < 0) {
		qed_put_block(q, block);
		return rc;
	}
	a->offset = cluster << q->cluster_shift;
	a->length = ox_min((uint64_t)n << q->cluster_shift, qed_size(q) - a->offset);
	a->zeroed = fresh;
	a->priv[A_BLOCK] = (uint64_t)(uintptr_t)block;
	a->priv[A_TABLE] = table;
	a->priv[A_FLAGS] = after_data || !fresh ? A_AFTER_DATA : 0;
	return 0;
}

static uint32_t allocated_clusters(const struct qed *q, const struct ox_allocation *a)
{
	return (uint32_t)((a->length + q->cluster_size - 1) >> q->cluster_shift);
}

int qed_publish_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct qed *q = qed_of(channel);
	struct qed_block *block = (struct qed_block *)(uintptr_t)a->priv[A_BLOCK];
	uint64_t cluster = a->offset >> q->cluster_shift;
	struct qed_change change = {.first = (uint32_t)cluster & (q->block_entries - 1),
	                            .count = allocated_clusters(q, a),
	                            .base = a->store_offset,
	                            .step = q->cluster_size};
	int rc = 0;

	if (a->priv[A_FLAGS] & A_AFTER_DATA)
		rc = qed_flush_co(channel);
	if (rc < 0) {
		qed_abort(channel, a);
		return rc;
	}
	/* From here on the space is not given back, even if this fails: the file may name it. */
	rc = qed_update_co(channel, block, &change);
	if (rc == 0)
		rc = qed_link_table_co(channel, cluster >> q->table_shift, a->priv[A_TABLE]);
	a->priv[A_BLOCK] = 0;
	qed_put_block(q, block);
	return rc;
}

void qed_abort(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct qed *q = qed_of(channel);
	struct qed_block *block = (struct qed_block *)(uintptr_t)a->priv[A_BLOCK];

	if (!block)
		return; /* publish_co failed, and has taken care of it */
	a->priv[A_BLOCK] = 0;
	pthread_mutex_lock(&q->lock);
	give_back(q, a->store_offset, allocated_clusters(q, a));
	pthread_mutex_unlock(&q->lock);
	qed_put_block(q, block);
}

/* --- zeroes ----------------------------------------------------------------------------------- */

/* How many clusters from `first` on are of one kind (and, if data, side by side). */
static uint32_t count_alike(const struct qed *q, const struct qed_block *block, uint32_t first,
                            uint64_t max)
{
	uint64_t entry = qed_entry(block, first);
	uint64_t step = qed_is_data(entry) ? q->cluster_size : 0;
	uint32_t n = 1;

	max = ox_min(max, (uint64_t)(q->block_entries - first));
	while (n < max && qed_entry(block, first + n) == entry + n * step)
		n++;
	return n;
}

static int zero_in_place_co(struct ox_image_channel *channel, uint64_t offset, uint64_t bytes,
                            bool unmap)
{
	struct ox_io io = {.op = OX_IO_ZERO,
	                   .flags = unmap ? OX_IO_MAY_UNMAP : 0,
	                   .offset = offset,
	                   .length = bytes};

	return ox_store_submit_co(channel->store, &io);
}

/* Some clusters from `cluster` on, at most `max`, all below one L1 entry; *done of them. */
static int zero_some_co(struct ox_image_channel *channel, uint64_t cluster, uint64_t max,
                        bool unmap, uint64_t *done)
{
	struct qed *q = qed_of(channel);
	uint64_t index = cluster >> q->table_shift;
	bool shows = qed_has_backing_at(q, cluster << q->cluster_shift);
	struct qed_change change = {.base = QED_ZERO};
	struct qed_block *block;
	uint64_t table, entry;
	int rc;

	rc = find_table_co(channel, index, shows, &table);
	if (rc < 0)
		return rc;
	if (table == QED_UNALLOCATED) {
		*done = ox_min(max, ((index + 1) << q->table_shift) - cluster);
		return 0;
	}
	rc = qed_get_block_co(channel, cluster, table, &block);
	if (rc < 0)
		return rc;
	change.first = (uint32_t)cluster & (q->block_entries - 1);
	entry = qed_entry(block, change.first);
	change.count = count_alike(q, block, change.first, max);
	*done = change.count;
	if (entry == QED_INVALID)
		rc = -EIO;
	else if (qed_is_data(entry))
		rc = zero_in_place_co(channel, entry, (uint64_t)change.count << q->cluster_shift,
		                      unmap);
	else if (entry == QED_UNALLOCATED && shows)
		rc = qed_update_co(channel, block, &change);
	if (rc == 0 && (entry != QED_UNALLOCATED || shows))
		rc = qed_link_table_co(channel, index, table);
	qed_put_block(q, block);
	return rc;
}

int qed_zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length, bool unmap)
{
	struct qed *q = qed_of(channel);
	uint64_t cluster = offset >> q->cluster_shift;
	uint64_t end = (offset + length + q->cluster_size - 1) >> q->cluster_shift;
	uint64_t done;
	int rc;

	assert(ox_is_aligned(offset, q->cluster_size));
	for (; cluster < end; cluster += done) {
		if (qed_is_damaged(q))
			return -EIO;
		rc = zero_some_co(channel, cluster, end - cluster, unmap, &done);
		if (rc < 0)
			return rc;
	}
	return 0;
}
