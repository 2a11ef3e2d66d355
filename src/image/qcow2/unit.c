/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * L1 and the parts of L2 tables that are in memory: see unit.h.
 *
 * Life of a unit: loaded (or made, for a new table) -> in its place, found by lookup without a lock
 * -> taken out of its place (to be replaced by its other form, or to save memory) -> freed after a
 * grace period.  A unit that is dirty or being written stays.
 *
 * Memory: every image has a budget, and the process's images share one pool of their sum: an image
 * may have more than its own budget while others use less.  Beyond, units that nobody looked at
 * since the last round are dropped in the background; what nobody looked at for half a minute is
 * dropped anyhow.
 *
 * What is loaded is checked before anybody sees it: every entry of a unit in memory points to a
 * place where data may be.
 */
#include "image/qcow2/unit.h"
#include "base/byteorder.h"
#include "base/fiber.h"
#include <errno.h>
#include <string.h>

#define IDLE_NS 30000000000ull

/* Bytes that all images' units take, and may take. */
static uint64_t pool_used, pool_limit;

/* --- entries ---------------------------------------------------------------------------------- */

static void run_entry(const struct qcow2 *q, const struct qcow2_unit *unit, uint32_t i,
                      uint64_t *entry, uint64_t *bitmap)
{
	const struct qcow2_unit_run *runs = (const void *)unit->words;
	uint32_t r = unit->runs - 1;

	while (runs[r].first > i)
		r--;
	*entry = runs[r].entry;
	*bitmap = runs[r].bitmap;
	if (runs[r].step)
		*entry += (uint64_t)(i - runs[r].first) << q->cluster_bits;
}

bool qcow2_unit_get(const struct qcow2 *q, struct qcow2_unit *unit, uint32_t i, uint64_t *entry,
                    uint64_t *bitmap)
{
	uint32_t seq;

	if (unit->runs) {
		run_entry(q, unit, i, entry, bitmap);
		return true;
	}
	if (q->entry_bytes == 8) {
		*entry = __atomic_load_n(&unit->words[i], __ATOMIC_ACQUIRE);
		*bitmap = 0;
		return true;
	}
	seq = __atomic_load_n(&unit->seq, __ATOMIC_ACQUIRE);
	*entry = __atomic_load_n(&unit->words[2 * i], __ATOMIC_ACQUIRE);
	*bitmap = __atomic_load_n(&unit->words[2 * i + 1], __ATOMIC_ACQUIRE);
	return !(seq & 1) && __atomic_load_n(&unit->seq, __ATOMIC_RELAXED) == seq;
}

static void encode_unit(const struct qcow2_block *block, uint32_t offset, uint32_t bytes,
                        uint8_t *out)
{
	const struct qcow2_unit *unit = ox_container_of(block, const struct qcow2_unit, block);

	for (uint32_t at = 0; at < bytes; at += 8)
		ox_put_be64(out + at,
		            __atomic_load_n(&unit->words[(offset + at) / 8], __ATOMIC_RELAXED));
}

void qcow2_unit_set(struct qcow2 *q, struct qcow2_unit *unit, uint32_t i, uint64_t entry,
                    uint64_t bitmap, bool after_data)
{
	if (q->entry_bytes == 8) {
		__atomic_store_n(&unit->words[i], entry, __ATOMIC_RELEASE);
	} else {
		/* Release stores: whoever sees one of them sees the odd number before it. */
		__atomic_store_n(&unit->seq, unit->seq + 1, __ATOMIC_RELAXED);
		__atomic_store_n(&unit->words[2 * i], entry, __ATOMIC_RELEASE);
		__atomic_store_n(&unit->words[2 * i + 1], bitmap, __ATOMIC_RELEASE);
		__atomic_store_n(&unit->seq, unit->seq + 1, __ATOMIC_RELEASE);
	}
	qcow2_dirty(q, &unit->block, i * q->entry_bytes, q->entry_bytes, after_data);
}

/* --- memory --------------------------------------------------------------------------------- */

static struct qcow2_unit *alloc_unit(const struct qcow2 *q, uint64_t index, uint64_t store_offset,
                                     uint32_t runs)
{
	size_t memory = sizeof(struct qcow2_unit) +
	                (runs ? runs * sizeof(struct qcow2_unit_run) : q->block_bytes);
	struct qcow2_unit *unit = calloc(1, memory);

	if (!unit)
		return NULL;
	unit->index = index;
	unit->runs = runs;
	unit->memory = memory;
	unit->used = true;
	unit->block.store_offset = store_offset;
	unit->block.bytes = q->block_bytes;
	unit->block.encode = encode_unit;
	return unit;
}

static void count_memory(struct qcow2 *q, int64_t bytes)
{
	__atomic_store_n(&q->unit_bytes, q->unit_bytes + (uint64_t)bytes, __ATOMIC_RELAXED);
	__atomic_fetch_add(&pool_used, (uint64_t)bytes, __ATOMIC_RELAXED);
}

static bool over_budget(const struct qcow2 *q)
{
	return __atomic_load_n(&q->unit_bytes, __ATOMIC_RELAXED) > q->cache->budget &&
	       __atomic_load_n(&pool_used, __ATOMIC_RELAXED) >
	               __atomic_load_n(&pool_limit, __ATOMIC_RELAXED);
}

static void free_retired_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit_list list = TAILQ_HEAD_INITIALIZER(list);
	struct qcow2_unit *unit;

	pthread_mutex_lock(&q->lock);
	TAILQ_CONCAT(&list, &q->cache->retired, link);
	pthread_mutex_unlock(&q->lock);
	if (TAILQ_EMPTY(&list))
		return;
	ox_image_grace_co(channel);
	while ((unit = TAILQ_FIRST(&list))) {
		TAILQ_REMOVE(&list, unit, link);
		free(unit);
	}
}

static bool is_busy(const struct qcow2_unit *unit)
{
	return unit->block.dirty || unit->block.writing;
}

/* Takes the unit out of its place.  Lock held. */
static void retire(struct qcow2 *q, struct qcow2_unit *unit)
{
	TAILQ_REMOVE(&q->cache->all, unit, link);
	TAILQ_INSERT_TAIL(&q->cache->retired, unit, link);
	count_memory(q, -(int64_t)unit->memory);
}

/* Drops units that were not looked at since the last call, at most down to the budget if
 * `only_over`.  True: some were looked at, or were busy.  Lock held. */
static bool drop_unused(struct qcow2 *q, bool only_over)
{
	struct qcow2_unit *unit, *next;
	bool left = false;

	for (unit = TAILQ_FIRST(&q->cache->all); unit; unit = next) {
		next = TAILQ_NEXT(unit, link);
		if (only_over && q->unit_bytes <= q->cache->budget)
			return true;
		if (__atomic_exchange_n(&unit->used, false, __ATOMIC_RELAXED) || is_busy(unit)) {
			left = true;
			continue;
		}
		__atomic_store_n(&q->units[unit->index], NULL, __ATOMIC_RELEASE);
		retire(q, unit);
	}
	return left;
}

static void arm_idle_timer(struct ox_image_channel *channel);

static void trim_co(struct ox_image_channel *channel, void *arg)
{
	struct qcow2 *q = channel->image->priv;
	bool idle = arg != NULL, left;

	pthread_mutex_lock(&q->lock);
	if (!idle) {
		drop_unused(q, true);
		if (over_budget(q))
			drop_unused(q, true);
		if (over_budget(q) && !TAILQ_EMPTY(&q->dirty_blocks)) {
			/* What is left is dirty. A failure is told to whoever flushes. */
			pthread_mutex_unlock(&q->lock);
			(void)!qcow2_commit_co(channel);
			pthread_mutex_lock(&q->lock);
			drop_unused(q, true);
		}
	} else {
		left = drop_unused(q, false);
		if (left)
			arm_idle_timer(channel);
	}
	pthread_mutex_unlock(&q->lock);
	free_retired_co(channel);
	pthread_mutex_lock(&q->lock);
	q->cache->trimming = false;
	pthread_mutex_unlock(&q->lock);
}

/* Lock held. */
static void start_trim(struct ox_image_channel *channel, bool idle)
{
	struct qcow2 *q = channel->image->priv;

	if (q->cache->trimming)
		return;
	q->cache->trimming = true;
	/* A fiber runs at once, and takes the lock itself. */
	pthread_mutex_unlock(&q->lock);
	if (ox_image_background(channel, trim_co, idle ? q : NULL) < 0) {
		pthread_mutex_lock(&q->lock);
		q->cache->trimming = false;
		return;
	}
	pthread_mutex_lock(&q->lock);
}

void qcow2_units_trim(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;

	if (ox_likely(!over_budget(q)))
		return;
	pthread_mutex_lock(&q->lock);
	start_trim(channel, false);
	pthread_mutex_unlock(&q->lock);
}

static void on_idle(struct ox_timer *timer)
{
	struct qcow2_units *cache = ox_container_of(timer, struct qcow2_units, idle_timer);
	struct ox_image_channel *channel = cache->idle_channel;
	struct qcow2 *q = channel->image->priv;

	pthread_mutex_lock(&q->lock);
	cache->idle_channel = NULL;
	start_trim(channel, true);
	pthread_mutex_unlock(&q->lock);
}

/* Lock held. */
static void arm_idle_timer(struct ox_image_channel *channel)
{
	struct qcow2_units *cache = ((struct qcow2 *)channel->image->priv)->cache;

	/* A channel without the format's own state is open_co's: its loop does not last. */
	if (cache->idle_channel || !channel->priv)
		return;
	cache->idle_channel = channel;
	ox_timer_arm(channel->loop, &cache->idle_timer, IDLE_NS);
}

void qcow2_units_detach(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;

	pthread_mutex_lock(&q->lock);
	if (q->cache->idle_channel == channel) {
		ox_timer_cancel(&q->cache->idle_timer);
		q->cache->idle_channel = NULL;
	}
	pthread_mutex_unlock(&q->lock);
}

/* Puts the unit in its place, and what was there out of use.  Lock held. */
static void install(struct ox_image_channel *channel, struct qcow2_unit *unit)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *old = q->units[unit->index];

	TAILQ_INSERT_TAIL(&q->cache->all, unit, link);
	count_memory(q, (int64_t)unit->memory);
	__atomic_store_n(&q->units[unit->index], unit, __ATOMIC_RELEASE);
	if (old)
		retire(q, old);
	arm_idle_timer(channel);
}

struct qcow2_unit *qcow2_unit_new(struct ox_image_channel *channel, uint64_t index,
                                  uint64_t store_offset)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *unit = alloc_unit(q, index, store_offset, 0);

	if (!unit)
		return NULL;
	install(channel, unit);
	return unit;
}

struct qcow2_unit *qcow2_unit_array(struct ox_image_channel *channel, uint64_t index)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *runs = q->units[index], *unit;
	uint64_t entry, bitmap;

	if (!runs || !runs->runs)
		return runs;
	unit = alloc_unit(q, index, runs->block.store_offset, 0);
	if (!unit)
		return NULL;
	for (uint32_t i = 0; i < qcow2_unit_entries(q); i++) {
		run_entry(q, runs, i, &entry, &bitmap);
		if (q->entry_bytes == 8) {
			unit->words[i] = entry;
		} else {
			unit->words[2 * i] = entry;
			unit->words[2 * i + 1] = bitmap;
		}
	}
	install(channel, unit);
	return unit;
}

/* --- loading ---------------------------------------------------------------------------------- */

/* Is b the entry behind a, in a run? */
static bool follows(const struct qcow2 *q, uint64_t a, uint64_t b, uint32_t *step)
{
	if (a == b && !(a & QCOW2_OFFSET_MASK)) {
		*step = 0;
		return true;
	}
	if (!(a & QCOW2_ENTRY_COMPRESSED) && (a & QCOW2_OFFSET_MASK) &&
	    b == a + ((uint64_t)1 << q->cluster_bits)) {
		*step = 1;
		return true;
	}
	return false;
}

/* The entries as runs: how many, at most `max` + 1.  words: host order. */
static uint32_t find_runs(const struct qcow2 *q, const uint64_t *words, struct qcow2_unit_run *runs,
                          uint32_t max)
{
	uint32_t width = q->entry_bytes / 8, n = qcow2_unit_entries(q), count = 0, step = 0, next;
	uint64_t entry, bitmap = 0;

	for (uint32_t i = 0; i < n; i++) {
		entry = words[(size_t)i * width];
		if (width == 2)
			bitmap = words[(size_t)i * 2 + 1];
		if (count > 0 && bitmap == runs[count - 1].bitmap &&
		    follows(q, words[(size_t)(i - 1) * width], entry, &next) &&
		    (runs[count - 1].first == i - 1 || next == step)) {
			step = next;
			runs[count - 1].step = step;
			continue;
		}
		if (count == max)
			return max + 1;
		runs[count++] =
		        (struct qcow2_unit_run){.first = i, .entry = entry, .bitmap = bitmap};
	}
	return count;
}

/* What is wrong with an entry, or NULL.  `count`: it and the ones behind it in its run.  Lock
 * held. */
static const char *bad_entry(struct qcow2 *q, uint64_t guest_cluster, uint64_t entry,
                             uint64_t bitmap, uint64_t count)
{
	uint64_t host = entry & QCOW2_OFFSET_MASK;
	uint32_t sector_bits;

	if (entry & QCOW2_ENTRY_COMPRESSED) {
		if (q->data_file)
			return "is compressed, in an image with a data file";
		if (bitmap)
			return "is compressed and has subclusters";
		/* "Compressed Clusters Descriptor": the offset has 62 - (cluster_bits - 8) bits. */
		sector_bits = 62 - (q->cluster_bits - 8);
		host = entry & (((uint64_t)1 << sector_bits) - 1);
		return qcow2_is_data_range(q, host, 1)
		               ? NULL
		               : "points to compressed data where there is none";
	}
	if (q->subclusters > 1) {
		if ((uint32_t)bitmap & (uint32_t)(bitmap >> 32))
			return "has a subcluster that is both allocated and zero";
		if ((uint32_t)bitmap && !host && !(q->data_file && guest_cluster == 0))
			return "has subclusters but no cluster";
	}
	if (!host)
		return NULL;
	if (host & (q->cluster_size - 1))
		return "points to an offset that is not a cluster's";
	if (q->data_file)
		return host <= INT64_MAX - (count << q->cluster_bits) ? NULL
		                                                      : "points beyond any file";
	if (!qcow2_is_data_range(q, host, count << q->cluster_bits))
		return "points to metadata or beyond the file";
	return NULL;
}

bool qcow2_entry_is_sane(struct qcow2 *q, uint64_t guest_cluster, uint64_t entry, uint64_t bitmap)
{
	return !bad_entry(q, guest_cluster, entry, bitmap, 1);
}

/* Checks all entries.  Lock held.  NULL, or what is wrong and with which. */
static const char *check_words(struct qcow2 *q, uint64_t index, const uint64_t *words,
                               uint32_t *which)
{
	uint32_t width = q->entry_bytes / 8, n = qcow2_unit_entries(q), i = 0, count, step, ahead;
	uint64_t first = index * n;
	const char *what;

	while (i < n) {
		uint64_t entry = words[(size_t)i * width];
		uint64_t bitmap = width == 2 ? words[(size_t)i * 2 + 1] : 0;

		count = 1;
		ahead = 1;
		while (i + count < n &&
		       (width == 1 || words[(size_t)(i + count) * 2 + 1] == bitmap) &&
		       follows(q, words[(size_t)(i + count - 1) * width],
		               words[(size_t)(i + count) * width], &step) &&
		       (count == 1 || step == ahead)) {
			ahead = step;
			count++;
		}
		what = bad_entry(q, first + i, entry, bitmap, ahead ? count : 1);
		if (what) {
			*which = i;
			return what;
		}
		i += count;
	}
	return NULL;
}

/* An array or runs of these words (file order on entry, host order afterwards). */
static struct qcow2_unit *build_unit(const struct qcow2 *q, uint64_t index, uint64_t store_offset,
                                     const uint64_t *words)
{
	struct qcow2_unit_run runs[QCOW2_MAX_RUNS];
	uint32_t count = find_runs(q, words, runs, QCOW2_MAX_RUNS);
	struct qcow2_unit *unit;

	/* Runs must save something: tables of tiny clusters are smaller than their runs. */
	if (count > QCOW2_MAX_RUNS || count * sizeof(*runs) * 2 > q->block_bytes)
		count = 0;
	unit = alloc_unit(q, index, store_offset, count);
	if (!unit)
		return NULL;
	memcpy(unit->words, count ? (const void *)runs : words,
	       count ? count * sizeof(*runs) : q->block_bytes);
	return unit;
}

static struct qcow2_unit *get_unit(const struct qcow2 *q, uint64_t index)
{
	struct qcow2_unit **units = __atomic_load_n(&q->units, __ATOMIC_ACQUIRE);

	return __atomic_load_n(&units[index], __ATOMIC_ACQUIRE);
}

static uint64_t unit_store_offset(const struct qcow2 *q, uint64_t index)
{
	uint64_t table = qcow2_l1_get(q, index >> q->units_per_table_shift) & QCOW2_OFFSET_MASK;
	uint64_t part = index & (((uint64_t)1 << q->units_per_table_shift) - 1);

	return table ? table + part * q->block_bytes : 0;
}

/* Reads a unit's words, in host order. */
static int read_words_co(struct ox_image_channel *channel, uint64_t store_offset, uint64_t *words)
{
	const struct qcow2 *q = channel->image->priv;
	int rc = ox_store_read_co(channel->store, store_offset, words, q->block_bytes);

	for (uint32_t i = 0; rc == 0 && i < q->block_bytes / 8; i++)
		words[i] = be64toh(words[i]);
	return rc;
}

static int load_locked_out_co(struct ox_image_channel *channel, uint64_t index, uint64_t *words)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *unit;
	uint64_t store_offset, cluster;
	const char *bad;
	uint32_t which = 0;
	int rc;

	for (;;) {
		uint64_t table = index >> q->units_per_table_shift;

		if (q->l1_bad[table / 64] >> (table % 64) & 1)
			return qcow2_corrupt_co(channel,
			                        "entry %llu of its L1 table refers to no L2 table",
			                        (unsigned long long)table);
		store_offset = unit_store_offset(q, index);
		if (!store_offset || get_unit(q, index))
			return 0;
		rc = read_words_co(channel, store_offset, words);
		if (rc < 0)
			return rc;
		unit = build_unit(q, index, store_offset, words);
		if (!unit)
			return -ENOMEM;
		pthread_mutex_lock(&q->lock);
		/* While we read, the table may have moved, or been made in memory. */
		if (unit_store_offset(q, index) != store_offset || q->units[index]) {
			pthread_mutex_unlock(&q->lock);
			free(unit);
			continue;
		}
		bad = check_words(q, index, words, &which);
		if (!bad) {
			install(channel, unit);
			if (over_budget(q))
				start_trim(channel, false);
		}
		pthread_mutex_unlock(&q->lock);
		if (!bad)
			return 0;
		free(unit);
		cluster = index * qcow2_unit_entries(q) + which;
		return qcow2_corrupt_co(channel, "the entry of guest cluster %llu %s",
		                        (unsigned long long)cluster, bad);
	}
}

int qcow2_unit_load_co(struct ox_image_channel *channel, uint64_t index)
{
	struct qcow2 *q = channel->image->priv;
	struct ox_range range = {
	        .start = index, .end = index + 1, .exclusive = true, .loop = channel->loop};
	OX_FREE uint64_t *words = aligned_alloc(4096, ox_max(q->block_bytes, 4096u));
	int rc;

	if (!words)
		return -ENOMEM;
	ox_range_acquire_co(&q->cache->loading, &range);
	rc = load_locked_out_co(channel, index, words);
	ox_range_release(&q->cache->loading, &range);
	return rc;
}

int qcow2_walk_co(struct ox_image_channel *channel,
                  void (*fn)(void *arg, uint64_t cluster, uint64_t entry, uint64_t bitmap),
                  void *arg)
{
	struct qcow2 *q = channel->image->priv;
	uint32_t n = qcow2_unit_entries(q), width = q->entry_bytes / 8;
	OX_FREE uint64_t *words = aligned_alloc(4096, ox_max(q->block_bytes, 4096u));
	struct qcow2_unit *unit;
	uint64_t store_offset;
	int rc;

	if (!words)
		return -ENOMEM;
	for (uint64_t index = 0; index < q->unit_count; index++) {
		store_offset = unit_store_offset(q, index);
		if (!store_offset)
			continue;
		/* Memory knows better, also if it came to know it while we read. */
		pthread_mutex_lock(&q->lock);
		unit = q->units[index];
		if (!unit) {
			pthread_mutex_unlock(&q->lock);
			rc = read_words_co(channel, store_offset, words);
			if (rc < 0)
				return rc;
			pthread_mutex_lock(&q->lock);
			unit = q->units[index];
		}
		for (uint32_t i = 0; unit && i < n; i++) {
			uint64_t bitmap = 0;

			(void)!qcow2_unit_get(q, unit, i, &words[(size_t)i * width], &bitmap);
			if (width == 2)
				words[(size_t)i * 2 + 1] = bitmap;
		}
		pthread_mutex_unlock(&q->lock);
		for (uint32_t i = 0; i < n; i++) {
			uint64_t bitmap = width == 2 ? words[(size_t)i * 2 + 1] : 0;

			if (words[(size_t)i * width] || bitmap)
				fn(arg, index * n + i, words[(size_t)i * width], bitmap);
		}
	}
	return 0;
}

/* --- L1 -----------------------------------------------------------------------------------------
 */

struct qcow2_l1_block {
	struct qcow2_block block;
	struct qcow2 *q;
	uint32_t first; /* entry */
};

static void encode_l1(const struct qcow2_block *block, uint32_t offset, uint32_t bytes,
                      uint8_t *out)
{
	const struct qcow2_l1_block *part =
	        ox_container_of(block, const struct qcow2_l1_block, block);
	uint32_t i = part->first + offset / 8;

	/* Behind the table's end its last cluster holds nothing. */
	for (uint32_t at = 0; at < bytes; at += 8, i++)
		ox_put_be64(out + at, i < part->q->l1_entries ? part->q->l1[i] : 0);
}

void qcow2_l1_set(struct qcow2 *q, uint32_t i, uint64_t entry, bool after_data)
{
	uint32_t per_block = q->block_bytes / 8;

	__atomic_store_n(&q->l1[i], entry, __ATOMIC_RELEASE);
	qcow2_dirty(q, &q->l1_blocks[i / per_block].block, i % per_block * 8, 8, after_data);
}

static struct qcow2_l1_block *new_l1_blocks(struct qcow2 *q, uint32_t entries)
{
	uint32_t per_block = q->block_bytes / 8, count = entries / per_block + 1;
	struct qcow2_l1_block *blocks = ox_xcalloc(count, sizeof(*blocks));

	for (uint32_t i = 0; i < count; i++) {
		blocks[i].q = q;
		blocks[i].first = i * per_block;
		blocks[i].block.bytes = q->block_bytes;
		blocks[i].block.store_offset = q->header.l1_offset + (uint64_t)i * q->block_bytes;
		blocks[i].block.encode = encode_l1;
	}
	return blocks;
}

static void keep_old_array(struct qcow2_units *cache, void *array)
{
	cache->old_arrays =
	        realloc(cache->old_arrays, (cache->old_array_count + 1) * sizeof(void *));
	if (!cache->old_arrays)
		abort();
	cache->old_arrays[cache->old_array_count++] = array;
}

static uint64_t units_of(const struct qcow2 *q, uint32_t l1_entries)
{
	return (uint64_t)l1_entries << q->units_per_table_shift;
}

int qcow2_units_grow(struct qcow2 *q, uint32_t entries)
{
	uint64_t *l1 = ox_xcalloc(ox_max(entries, 1u), 8);
	uint64_t *bad = ox_xcalloc(entries / 64 + 1, 8);
	struct qcow2_unit **units = ox_xcalloc(units_of(q, ox_max(entries, 1u)), sizeof(*units));

	for (uint32_t i = 0; i * (uint64_t)(q->block_bytes / 8) < q->l1_entries; i++) {
		if (q->l1_blocks[i].block.dirty || q->l1_blocks[i].block.writing) {
			free(l1);
			free(bad);
			free(units);
			return -EAGAIN;
		}
	}
	memcpy(l1, q->l1, (size_t)q->l1_entries * 8);
	memcpy(bad, q->l1_bad, (q->l1_entries / 64 + 1) * 8);
	memcpy(units, q->units, q->unit_count * sizeof(*units));
	keep_old_array(q->cache, q->l1);
	keep_old_array(q->cache, q->l1_bad);
	keep_old_array(q->cache, q->units);
	__atomic_store_n(&q->l1, l1, __ATOMIC_RELEASE);
	__atomic_store_n(&q->l1_bad, bad, __ATOMIC_RELEASE);
	__atomic_store_n(&q->units, units, __ATOMIC_RELEASE);
	free(q->l1_blocks);
	q->l1_entries = entries;
	q->unit_count = units_of(q, entries);
	q->l1_blocks = new_l1_blocks(q, entries);
	return 0;
}

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Finds the entries that cannot be a table's, and registers the others.  In ascending order, so
 * that registering is cheap. */
static void check_l1(struct qcow2 *q)
{
	uint32_t n = q->l1_entries, count = 0;
	OX_FREE uint64_t *sorted = ox_xcalloc(ox_max(n, 1u), 8);
	OX_FREE uint64_t *good = ox_xcalloc(ox_max(n, 1u), 8);
	uint32_t good_count = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (q->l1[i] & QCOW2_OFFSET_MASK)
			sorted[count++] = q->l1[i] & QCOW2_OFFSET_MASK;
	}
	qsort(sorted, count, 8, compare_u64);
	pthread_mutex_lock(&q->lock);
	for (uint32_t i = 0; i < count; i++) {
		bool twice = (i > 0 && sorted[i - 1] == sorted[i]) ||
		             (i + 1 < count && sorted[i + 1] == sorted[i]);

		if (!twice && ox_is_aligned(sorted[i], q->cluster_size) &&
		    qcow2_is_data_range(q, sorted[i], q->cluster_size))
			good[good_count++] = sorted[i];
	}
	for (uint32_t i = 0; i < good_count; i++)
		qcow2_add_metadata_range(q, good[i], q->cluster_size);
	for (uint32_t i = 0; i < n; i++) {
		uint64_t table = q->l1[i] & QCOW2_OFFSET_MASK;

		if (table && !bsearch(&table, good, good_count, 8, compare_u64))
			q->l1_bad[i / 64] |= (uint64_t)1 << (i % 64);
	}
	pthread_mutex_unlock(&q->lock);
}

int qcow2_units_init_co(struct ox_image_channel *channel, uint64_t budget, struct ox_error *err)
{
	struct qcow2 *q = channel->image->priv;
	uint32_t n = q->header.l1_entries;
	int rc;

	q->cache = ox_xcalloc(1, sizeof(*q->cache));
	TAILQ_INIT(&q->cache->all);
	TAILQ_INIT(&q->cache->retired);
	ox_ranges_init(&q->cache->loading);
	q->cache->idle_timer.fn = on_idle;
	q->cache->budget = budget ? budget : OX_METADATA_CACHE;
	__atomic_fetch_add(&pool_limit, q->cache->budget, __ATOMIC_RELAXED);
	q->l1_entries = n;
	q->l1 = ox_xcalloc(ox_max(n, 1u), 8);
	q->l1_bad = ox_xcalloc(n / 64 + 1, 8);
	q->unit_count = units_of(q, n);
	q->units = ox_xcalloc(ox_max(q->unit_count, 1u), sizeof(*q->units));
	q->l1_blocks = new_l1_blocks(q, n);
	if (n > 0) {
		rc = ox_store_read_co(channel->store, q->header.l1_offset, q->l1, (size_t)n * 8);
		if (rc < 0)
			return ox_error_set(err, -rc, "%s: cannot read its L1 table: %s",
			                    channel->image->store->path, strerror(-rc));
	}
	for (uint32_t i = 0; i < n; i++)
		q->l1[i] = be64toh(q->l1[i]);
	check_l1(q);
	return 0;
}

void qcow2_units_free(struct qcow2 *q)
{
	struct qcow2_units *cache = q->cache;
	struct qcow2_unit *unit;

	if (!cache)
		return;
	TAILQ_CONCAT(&cache->all, &cache->retired, link);
	while ((unit = TAILQ_FIRST(&cache->all))) {
		TAILQ_REMOVE(&cache->all, unit, link);
		free(unit);
	}
	count_memory(q, -(int64_t)q->unit_bytes);
	__atomic_fetch_sub(&pool_limit, cache->budget, __ATOMIC_RELAXED);
	for (unsigned i = 0; i < cache->old_array_count; i++)
		free(cache->old_arrays[i]);
	free(cache->old_arrays);
	ox_ranges_destroy(&cache->loading);
	free(cache);
	q->cache = NULL;
	free(q->l1);
	free(q->l1_bad);
	free(q->l1_blocks);
	free(q->units);
}
