/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The map in memory: L1 whole, L2 in blocks that are read when they are asked for and dropped when
 * there are too many.
 *
 * Every offset is judged once, when it comes from the file: what is not valid is QED_INVALID from
 * then on and answers -EIO.  In an image with the mark "need check" it is unallocated: a power cut
 * leaves such entries, and the repair, which comes before the first change, will remove them.  An
 * offset that is valid stays so, because the file's end only moves up and new tables are placed
 * behind everything.
 *
 * Locking: lookup takes none.  It finds a block by atomic pointers, trusts its entries when `ready`
 * is set (release after they are filled), and is gone from it before a grace period ends.  All
 * changes are made under q->lock.  A block is dropped when no fiber holds it (users): its entries
 * are what the file has.
 */
#include "image/qed/qed.h"
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <string.h>

#define BUCKETS_MIN 64u
#define BUCKETS_MAX 65536u
/* How many empty L1 entries one lookup runs over. */
#define L1_RUN_MAX 1024u

static size_t block_size(const struct qed *q)
{
	return sizeof(struct qed_block) + q->block_bytes;
}

static struct qed_block *block_new(const struct qed *q, uint64_t key, uint64_t store_offset)
{
	struct qed_block *block = calloc(1, block_size(q));

	if (!block)
		return NULL;
	block->key = key;
	block->store_offset = store_offset;
	TAILQ_INIT(&block->changes);
	qed_rounds_init(&block->writes);
	qed_rounds_init(&block->loads);
	return block;
}

/* --- where things may be ---------------------------------------------------------------------- */

static bool overlaps(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
	return a < b + b_bytes && b < a + a_bytes;
}

static bool is_place(const struct qed *q, uint64_t offset, uint64_t bytes)
{
	return ox_is_aligned(offset, q->cluster_size) &&
	       offset >= (uint64_t)q->header.header_size << q->cluster_shift &&
	       ox_range_within(offset, bytes, q->end) &&
	       !overlaps(offset, bytes, q->header.l1_offset, q->table_bytes);
}

bool qed_table_offset_is_valid(const struct qed *q, uint64_t offset)
{
	return is_place(q, offset, q->table_bytes);
}

/* How many tables begin below `offset`. */
static size_t tables_below(const struct qed *q, uint64_t offset)
{
	size_t low = 0, high = q->table_count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (q->tables[middle] < offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

bool qed_touches_table(const struct qed *q, uint64_t offset, uint64_t bytes)
{
	/* The last one that begins before the range ends is the only one that can reach into it,
	 * unless tables overlap; then the image is damaged anyway. */
	size_t below = tables_below(q, offset + bytes);

	return below > 0 && q->tables[below - 1] + q->table_bytes > offset;
}

bool qed_cluster_offset_is_valid(const struct qed *q, uint64_t offset)
{
	return is_place(q, offset, q->cluster_size) &&
	       !qed_touches_table(q, offset, q->cluster_size);
}

bool qed_add_table(struct qed *q, uint64_t offset)
{
	size_t at = tables_below(q, offset);

	if (q->table_count == q->table_room) {
		size_t room = ox_max(2 * q->table_room, (size_t)64);
		uint64_t *grown = realloc(q->tables, room * sizeof(*grown));

		if (!grown)
			return false;
		q->tables = grown;
		q->table_room = room;
	}
	memmove(q->tables + at + 1, q->tables + at, (q->table_count - at) * sizeof(*q->tables));
	q->tables[at] = offset;
	q->table_count++;
	return true;
}

/* --- L1 --------------------------------------------------------------------------------------- */

static struct qed_l1 *l1_now(const struct qed *q)
{
	return __atomic_load_n(&q->l1, __ATOMIC_ACQUIRE);
}

static uint64_t l1_entry(const struct qed *q, const struct qed_l1 *l1, uint64_t index)
{
	return qed_entry(l1->blocks[index >> q->block_shift], index & (q->block_entries - 1));
}

uint64_t qed_l1_entry(const struct qed *q, uint64_t index)
{
	const struct qed_l1 *l1 = l1_now(q);

	return index < l1->count ? l1_entry(q, l1, index) : QED_INVALID;
}

struct qed_block *qed_l1_block(const struct qed *q, uint64_t index)
{
	return l1_now(q)->blocks[index >> q->block_shift];
}

static int compare_offsets(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* What becomes of an entry that is not valid. */
static uint64_t invalid_entry(const struct qed *q)
{
	return qed_is_unchecked(q) ? QED_UNALLOCATED : QED_INVALID;
}

/* What was read of L1 becomes offsets.  How many of them are not valid, or -ENOMEM. */
static int64_t judge_l1_block(struct qed *q, struct qed_block *block)
{
	uint64_t invalid = invalid_entry(q);
	int64_t bad = 0;

	for (uint32_t i = 0; i < q->block_entries; i++) {
		uint64_t offset = le64toh(block->entries[i]);

		block->entries[i] = offset;
		if (offset == QED_UNALLOCATED)
			continue;
		if (!qed_table_offset_is_valid(q, offset)) {
			block->entries[i] = invalid;
			bad++;
			continue;
		}
		/* In any order now, sorted when all are there: inserting them one by one would
		 * take a time that grows with the square of their number. */
		if (q->table_count == q->table_room) {
			size_t room = ox_max(2 * q->table_room, (size_t)64);
			uint64_t *grown = realloc(q->tables, room * sizeof(*grown));

			if (!grown)
				return -ENOMEM;
			q->tables = grown;
			q->table_room = room;
		}
		q->tables[q->table_count++] = offset;
	}
	return bad;
}

/* Reads the blocks that `l1` lacks.  Counts what is wrong with it. */
static int load_l1_co(struct ox_image_channel *channel, struct qed_l1 *l1, unsigned from,
                      uint64_t *bad)
{
	struct qed *q = qed_of(channel);

	for (unsigned i = from; i < l1->block_count; i++) {
		uint64_t at = q->header.l1_offset + (uint64_t)i * q->block_bytes;
		struct qed_block *block = block_new(q, i, at);
		int64_t found;
		int rc;

		if (!block)
			return -ENOMEM;
		l1->blocks[i] = block;
		rc = ox_store_read_co(channel->store, at, block->entries, q->block_bytes);
		if (rc < 0)
			return rc;
		pthread_mutex_lock(&q->lock);
		found = judge_l1_block(q, block);
		pthread_mutex_unlock(&q->lock);
		if (found < 0)
			return (int)found;
		*bad += (uint64_t)found;
		__atomic_store_n(&block->ready, true, __ATOMIC_RELEASE);
	}
	pthread_mutex_lock(&q->lock);
	if (q->table_count > 0)
		qsort(q->tables, q->table_count, sizeof(*q->tables), compare_offsets);
	for (size_t i = 1; i < q->table_count; i++)
		*bad += q->tables[i] - q->tables[i - 1] < q->table_bytes;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

static void free_l1(struct qed_l1 *l1, unsigned from)
{
	for (unsigned i = from; i < l1->block_count; i++)
		free(l1->blocks[i]);
	free(l1);
}

int qed_map_grow_co(struct ox_image_channel *channel, uint64_t size)
{
	struct qed *q = qed_of(channel);
	struct qed_l1 *former = q->l1, *l1;
	unsigned shift = q->cluster_shift + q->table_shift;
	uint64_t count = (size >> shift) + ((size & ((UINT64_C(1) << shift) - 1)) != 0);
	unsigned have = former ? former->block_count : 0;
	unsigned blocks;
	uint64_t bad = 0;
	int rc;

	count = ox_max(count, (uint64_t)1);
	blocks = (unsigned)((count + q->block_entries - 1) >> q->block_shift);
	blocks = ox_max(blocks, have);
	l1 = calloc(1, sizeof(*l1) + blocks * sizeof(l1->blocks[0]));
	if (!l1)
		return -ENOMEM;
	l1->count = count;
	l1->block_count = blocks;
	if (have > 0)
		memcpy(l1->blocks, former->blocks, have * sizeof(l1->blocks[0]));
	rc = load_l1_co(channel, l1, have, &bad);
	if (rc < 0) {
		free_l1(l1, have);
		return rc;
	}
	l1->former = former;
	__atomic_store_n(&q->l1, l1, __ATOMIC_RELEASE);
	if (bad > 0 && !qed_is_unchecked(q))
		qed_damaged(q, "its L1 table has entries that are not valid (%llu)",
		            (unsigned long long)bad);
	return 0;
}

int qed_map_init_co(struct ox_image_channel *channel, uint64_t budget, struct ox_error *err)
{
	struct qed *q = qed_of(channel);
	int rc;

	q->budget = ox_max(budget, 4 * (uint64_t)block_size(q));
	q->bucket_count = BUCKETS_MIN;
	while (q->bucket_count < BUCKETS_MAX && q->bucket_count < q->budget / block_size(q))
		q->bucket_count *= 2;
	q->buckets = ox_xcalloc(q->bucket_count, sizeof(struct qed_block *));
	rc = qed_map_grow_co(channel, q->header.image_size);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read the L1 table: %s",
		                    channel->image->store->path, strerror(-rc));
	return 0;
}

void qed_map_free(struct qed *q)
{
	struct qed_new_table *table;
	struct qed_l1 *l1 = q->l1;

	while (q->buckets && q->bucket_count > 0) {
		struct qed_block *block = q->buckets[--q->bucket_count];

		while (block) {
			struct qed_block *next = block->next;

			free(block);
			block = next;
		}
	}
	free(q->buckets);
	if (l1) {
		struct qed_l1 *former = l1->former;

		free_l1(l1, 0);
		while ((l1 = former)) {
			former = l1->former;
			free(l1);
		}
	}
	while ((table = LIST_FIRST(&q->new_tables))) {
		LIST_REMOVE(table, link);
		free(table);
	}
	free(q->tables);
}

/* --- L2: finding ------------------------------------------------------------------------------ */

static struct qed_block **bucket_of(const struct qed *q, uint64_t key)
{
	return &q->buckets[(key * UINT64_C(0x9e3779b97f4a7c15) >> 32) & (q->bucket_count - 1)];
}

static struct qed_block *find_block(const struct qed *q, uint64_t key)
{
	struct qed_block *block = __atomic_load_n(bucket_of(q, key), __ATOMIC_ACQUIRE);

	while (block && block->key != key)
		block = __atomic_load_n(&block->next, __ATOMIC_ACQUIRE);
	return block;
}

/* Nothing is allocated below this L1 entry, and maybe below some more. */
static uint64_t hole_length(const struct qed *q, const struct qed_l1 *l1, uint64_t index,
                            uint64_t offset, uint64_t length)
{
	unsigned shift = q->cluster_shift + q->table_shift;
	uint64_t end = (index + 1) << shift;

	for (unsigned i = 0; i < L1_RUN_MAX && end - offset < length; i++) {
		if (++index >= l1->count || l1_entry(q, l1, index) != QED_UNALLOCATED)
			break;
		end += UINT64_C(1) << shift;
	}
	return end - offset;
}

int qed_lookup(struct ox_image *image, uint64_t offset, uint64_t length, struct ox_extent *extent)
{
	const struct qed *q = image->priv;
	const struct qed_l1 *l1 = l1_now(q);
	uint64_t cluster = offset >> q->cluster_shift;
	uint64_t within = offset & (q->cluster_size - 1);
	uint64_t index = cluster >> q->table_shift;
	struct qed_block *block;
	uint64_t entry, step, covered;
	uint32_t i;

	if (ox_unlikely(index >= l1->count))
		return -EIO;
	*extent = (struct ox_extent){.kind = OX_EXTENT_BACKING};
	entry = l1_entry(q, l1, index);
	if (entry == QED_UNALLOCATED) {
		extent->length = ox_min(hole_length(q, l1, index, offset, length), length);
		return 0;
	}
	if (ox_unlikely(entry == QED_INVALID))
		return -EIO;
	block = find_block(q, cluster >> q->block_shift);
	if (!block || !__atomic_load_n(&block->ready, __ATOMIC_ACQUIRE))
		return -EAGAIN;
	if (!__atomic_load_n(&block->referenced, __ATOMIC_RELAXED))
		__atomic_store_n(&block->referenced, true, __ATOMIC_RELAXED);

	i = (uint32_t)cluster & (q->block_entries - 1);
	entry = qed_entry(block, i);
	if (ox_unlikely(entry == QED_INVALID))
		return -EIO;
	step = 0;
	if (entry == QED_ZERO) {
		extent->kind = OX_EXTENT_ZERO;
	} else if (entry != QED_UNALLOCATED) {
		extent->kind = OX_EXTENT_DATA;
		extent->flags = qed_is_damaged(q) ? 0 : OX_EXTENT_IN_PLACE;
		extent->store_offset = entry + within;
		step = q->cluster_size;
	}
	covered = q->cluster_size - within;
	while (covered < length && ++i < q->block_entries) {
		entry += step;
		if (qed_entry(block, i) != entry)
			break;
		covered += q->cluster_size;
	}
	extent->length = ox_min(covered, length);
	return 0;
}

int qed_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
               struct ox_extent *extent)
{
	struct qed *q = qed_of(channel);
	uint64_t cluster = offset >> q->cluster_shift;
	struct qed_block *block;
	uint64_t table;
	int rc = qed_lookup(channel->image, offset, length, extent);

	if (rc != -EAGAIN)
		return rc;
	table = qed_l1_entry(q, cluster >> q->table_shift);
	rc = qed_get_block_co(channel, cluster, table, &block);
	if (rc < 0)
		return rc;
	rc = qed_lookup(channel->image, offset, length, extent);
	qed_put_block(q, block);
	assert(rc != -EAGAIN);
	return rc;
}

/* --- L2: loading and dropping ----------------------------------------------------------------- */

/* What was read of an L2 table becomes offsets; how many are not valid.  Lock held. */
static uint32_t judge_l2_block(const struct qed *q, struct qed_block *block)
{
	uint64_t invalid = invalid_entry(q);
	uint32_t bad = 0;

	for (uint32_t i = 0; i < q->block_entries; i++) {
		uint64_t entry = le64toh(block->entries[i]);

		if (entry > QED_ZERO && !qed_cluster_offset_is_valid(q, entry)) {
			entry = invalid;
			bad++;
		}
		block->entries[i] = entry;
	}
	return bad;
}

static int load_block_co(struct ox_image_channel *channel, void *arg)
{
	struct qed *q = qed_of(channel);
	struct qed_block *block = arg;
	uint32_t bad;
	int rc;

	if (__atomic_load_n(&block->ready, __ATOMIC_ACQUIRE))
		return 0;
	rc = ox_store_read_co(channel->store, block->store_offset, block->entries, q->block_bytes);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	bad = judge_l2_block(q, block);
	pthread_mutex_unlock(&q->lock);
	if (bad > 0 && !qed_is_unchecked(q))
		qed_damaged(q, "the L2 table at %#llx has entries that are not valid (%u)",
		            (unsigned long long)block->store_offset, bad);
	__atomic_store_n(&block->ready, true, __ATOMIC_RELEASE);
	return 0;
}

/* Takes blocks out of the chains that nobody holds and nobody looked at lately.  Lock held. */
static struct qed_block *unlink_some(struct qed *q)
{
	uint64_t target = q->budget - q->budget / 8;
	struct qed_block *dead = NULL;

	/* Twice around: the first time takes the marks off. */
	for (size_t i = 0; i < 2 * q->bucket_count && q->cached > target; i++) {
		struct qed_block **from = &q->buckets[q->hand++ & (q->bucket_count - 1)];
		struct qed_block *block;

		while ((block = *from)) {
			bool keep = block->users > 0;

			if (!keep && __atomic_load_n(&block->referenced, __ATOMIC_RELAXED)) {
				__atomic_store_n(&block->referenced, false, __ATOMIC_RELAXED);
				keep = true;
			}
			if (keep || q->cached <= target) {
				from = &block->next;
				continue;
			}
			/* Its own `next` stays: a lookup may be standing on it. */
			__atomic_store_n(from, block->next, __ATOMIC_RELEASE);
			block->dead = dead;
			dead = block;
			q->cached -= block_size(q);
		}
	}
	return dead;
}

static void drop_co(struct ox_image_channel *channel, void *arg)
{
	struct qed *q = qed_of(channel);
	struct qed_block *dead;

	for (;;) {
		pthread_mutex_lock(&q->lock);
		dead = unlink_some(q);
		if (!dead)
			q->dropping = false;
		pthread_mutex_unlock(&q->lock);
		if (!dead)
			return;
		ox_image_grace_co(channel);
		while (dead) {
			struct qed_block *next = dead->dead;

			free(dead);
			dead = next;
		}
	}
}

/* Lock held.  NULL: no memory. */
static struct qed_block *add_block(struct qed *q, uint64_t cluster, uint64_t table)
{
	uint64_t key = cluster >> q->block_shift;
	uint64_t part = (cluster & ((UINT64_C(1) << q->table_shift) - 1)) >> q->block_shift;
	struct qed_block *block = block_new(q, key, table + part * q->block_bytes);
	struct qed_block **bucket = bucket_of(q, key);

	if (!block)
		return NULL;
	block->next = *bucket;
	__atomic_store_n(bucket, block, __ATOMIC_RELEASE);
	q->cached += block_size(q);
	return block;
}

int qed_get_block_co(struct ox_image_channel *channel, uint64_t cluster, uint64_t table,
                     struct qed_block **out)
{
	struct qed *q = qed_of(channel);
	struct qed_block *block;
	bool drop = false;
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	block = find_block(q, cluster >> q->block_shift);
	if (!block)
		block = add_block(q, cluster, table);
	if (block) {
		block->users++;
		__atomic_store_n(&block->referenced, true, __ATOMIC_RELAXED);
		drop = q->cached > q->budget && !q->dropping;
		q->dropping |= drop;
	}
	pthread_mutex_unlock(&q->lock);
	if (!block)
		return -ENOMEM;
	if (drop && ox_image_background(channel, drop_co, NULL) < 0) {
		pthread_mutex_lock(&q->lock);
		q->dropping = false;
		pthread_mutex_unlock(&q->lock);
	}
	if (!__atomic_load_n(&block->ready, __ATOMIC_ACQUIRE))
		rc = qed_round_co(channel, &block->loads, load_block_co, block);
	if (rc < 0) {
		qed_put_block(q, block);
		return rc;
	}
	*out = block;
	return 0;
}

void qed_put_block(struct qed *q, struct qed_block *block)
{
	pthread_mutex_lock(&q->lock);
	assert(block->users > 0);
	block->users--;
	pthread_mutex_unlock(&q->lock);
}

/* --- after a repair --------------------------------------------------------------------------- */

void qed_patch_l1(struct qed *q, uint64_t index, uint64_t value)
{
	struct qed_l1 *l1 = q->l1;

	if (index >> q->block_shift >= l1->block_count)
		return;
	pthread_mutex_lock(&q->lock);
	__atomic_store_n(
	        &l1->blocks[index >> q->block_shift]->entries[index & (q->block_entries - 1)],
	        value, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&q->lock);
}

void qed_patch_l2(struct qed *q, uint64_t cluster, uint64_t value)
{
	struct qed_block *block;

	pthread_mutex_lock(&q->lock);
	block = find_block(q, cluster >> q->block_shift);
	if (block && __atomic_load_n(&block->ready, __ATOMIC_ACQUIRE))
		__atomic_store_n(&block->entries[cluster & (q->block_entries - 1)], value,
		                 __ATOMIC_RELEASE);
	pthread_mutex_unlock(&q->lock);
}
