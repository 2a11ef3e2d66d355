/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Refcounts as the file has them, and their comparison with what was counted.
 *
 * The map `stored` has 2 bits a cluster: 0, 1, 2, and 3 for everything above.  Where that is not
 * exact enough the block is read again.  Blocks of any width are taken apart in words of 64 bits:
 * nearly all words are all ones ("1" in each entry) or all zeroes.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

int check_load_reftable_co(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	uint64_t bytes = (uint64_t)h->refcount_table_clusters << c->cluster_bits, blocks = 0;
	int rc;

	c->reftable_usable =
	        bytes && h->refcount_table_offset &&
	        check_is_aligned(c, h->refcount_table_offset) &&
	        bytes <= ox_max((uint64_t)QCOW2_MAX_REFTABLE_BYTES, (uint64_t)c->cluster_size) &&
	        h->refcount_table_offset < c->file_bytes;
	if (!c->reftable_usable) {
		check_corrupt(c, 1,
		              "ERROR the refcount table (offset 0x%llx, %u clusters) is not in the "
		              "file",
		              (unsigned long long)h->refcount_table_offset,
		              h->refcount_table_clusters);
		c->rebuild = true;
		return 0;
	}
	rc = check_read_table_co(c, h->refcount_table_offset, (uint32_t)(bytes / 8), &c->reftable);
	if (rc == -ENOMEM)
		return rc;
	if (rc < 0) {
		check_failed(c, "ERROR: cannot read the refcount table: %s", strerror(-rc));
		c->reftable_usable = false;
		c->rebuild = true;
		return 0;
	}
	c->reftable_entries = (uint32_t)(bytes / 8);
	for (uint32_t i = 0; i < c->reftable_entries; i++)
		blocks += check_block_usable(c, i);
	for (uint32_t i = 0; i < c->reftable_entries; i++) {
		if (c->reftable[i])
			c->reach = (i + 1) * c->per_block;
	}
	c->progress_total += blocks * c->cluster_size;
	return 0;
}

bool check_block_usable(const struct qcow2_check *c, uint64_t index)
{
	uint64_t entry = index < c->reftable_entries ? c->reftable[index] : 0;

	return entry && !(entry & (c->cluster_size - 1)) && check_in_file(c, entry);
}

/* --- the map -------------------------------------------------------------------------------- */

struct stored_walk {
	struct qcow2_check *c;
	uint64_t at, end; /* entries of the refcount table */
	uint64_t ones;    /* a word of refcounts that are 1, as it stands in memory */
};

static bool next_blocks(void *arg, struct check_piece *piece)
{
	struct stored_walk *w = arg;
	const struct qcow2_check *c = w->c;
	uint32_t most = ox_max(CHECK_PIECE / c->cluster_size, 1u), count = 1;

	while (w->at < w->end && !check_block_usable(c, w->at))
		w->at++;
	if (w->at >= w->end)
		return false;
	while (count < most && w->at + count < w->end && check_block_usable(c, w->at + count) &&
	       c->reftable[w->at + count] == c->reftable[w->at] + (uint64_t)count * c->cluster_size)
		count++;
	*piece = (struct check_piece){.offset = c->reftable[w->at],
	                              .bytes = count * c->cluster_size,
	                              .tag = {w->at, count}};
	w->at += count;
	return true;
}

/* One refcount block into the map.  Runs of words that are all ones are one call. */
static int take_block(const struct stored_walk *w, uint64_t first, const uint8_t *block)
{
	struct qcow2_check *c = w->c;
	const unsigned per_word = 64 / c->refcount_bits;
	const uint32_t words = c->cluster_size / 8;
	int rc = 0;

	for (uint32_t i = 0; i < words && rc == 0;) {
		uint64_t word;
		uint32_t run = 1;

		memcpy(&word, block + (size_t)i * 8, 8);
		if (word == 0) {
			i++;
			continue;
		}
		if (word == w->ones) {
			for (; i + run < words; run++) {
				memcpy(&word, block + (size_t)(i + run) * 8, 8);
				if (word != w->ones)
					break;
			}
			rc = check_map_set(&c->stored, first + (uint64_t)i * per_word,
			                   (uint64_t)run * per_word, 1);
		} else {
			for (unsigned k = 0; k < per_word && rc == 0; k++) {
				uint64_t index = (uint64_t)i * per_word + k;
				uint64_t value = qcow2_refcount_get(block, c->refcount_bits, index);

				rc = check_map_set(&c->stored, first + index, 1,
				                   (unsigned)ox_min(value, 3));
			}
		}
		i += run;
	}
	return rc;
}

static int use_blocks_co(void *arg, const struct check_piece *piece, uint8_t *data, int rc)
{
	struct stored_walk *w = arg;
	struct qcow2_check *c = w->c;

	if (rc < 0) {
		check_failed(c, "ERROR: cannot read the refcount blocks at 0x%llx: %s",
		             (unsigned long long)piece->offset, strerror(-rc));
		c->rebuild = true;
		return 0;
	}
	rc = 0;
	for (uint64_t i = 0; i < piece->tag[1] && rc == 0; i++)
		rc = take_block(w, (piece->tag[0] + i) * c->per_block, data + i * c->cluster_size);
	return rc;
}

int check_load_stored_co(struct qcow2_check *c)
{
	uint64_t end = c->stored.first + c->stored.count;
	struct stored_walk walk = {.c = c,
	                           .at = c->stored.first / c->per_block,
	                           .end = (end + c->per_block - 1) / c->per_block};
	uint8_t ones[8] = {0};

	walk.end = ox_min(walk.end, (uint64_t)c->reftable_entries);
	for (unsigned i = 0; i < 64 / c->refcount_bits; i++)
		qcow2_refcount_set(ones, c->refcount_bits, i, 1);
	memcpy(&walk.ones, ones, 8);
	return check_read_all_co(c, next_blocks, use_blocks_co, &walk);
}

int check_stored_co(struct qcow2_check *c, uint64_t cluster, uint64_t *refcount)
{
	uint64_t index = cluster / c->per_block;
	uint32_t value = check_map_get(&c->stored, cluster);
	int rc;

	if (cluster < c->clusters && cluster - c->stored.first < c->stored.count && value < 3) {
		*refcount = value;
		return 0;
	}
	*refcount = 0;
	if (!check_block_usable(c, index))
		return 0;
	if (index != c->block_index || !c->block) {
		if (!c->block &&
		    posix_memalign((void **)&c->block, 4096, ox_max(c->cluster_size, 4096u))) {
			c->block = NULL;
			return -ENOMEM;
		}
		c->block_index = UINT64_MAX;
		rc = check_read_co(c, c->reftable[index], c->block, c->cluster_size);
		if (rc < 0)
			return rc;
		c->block_index = index;
	}
	*refcount = qcow2_refcount_get(c->block, c->refcount_bits, cluster % c->per_block);
	return 0;
}

/* --- references of the structures themselves ------------------------------------------------- */

/* Something else refers to the block's cluster as well.  If what it says is what was counted, it is
 * the refcount block, and the other is wrong. */
static bool block_is_sane(const struct qcow2_check *c, uint64_t index)
{
	uint64_t first = index * c->per_block, used = 0, wrong = 0;
	uint64_t last = ox_min(first + c->per_block, c->clusters);

	for (uint64_t i = first; i < last; i++) {
		uint32_t counted = check_map_get(&c->counted, i);
		uint32_t stored = check_map_get(&c->stored, i);

		used += counted || stored;
		wrong += ox_min(counted, 3u) != stored;
	}
	return used && wrong <= 2 + used / 8;
}

static bool table_is_sane(const struct qcow2_check *c)
{
	uint32_t usable = 0, used = 0;

	for (uint32_t i = 0; i < c->reftable_entries; i++) {
		used += c->reftable[i] != 0;
		usable += check_block_usable(c, i);
	}
	return usable && usable == used;
}

static int count_block(struct qcow2_check *c, uint32_t index, uint64_t entry)
{
	uint64_t cluster = check_cluster(c, entry);
	uint32_t count;
	int rc;

	if (entry & 511) {
		if (c->first)
			check_corrupt(c, 1, "ERROR refcount table entry %u has reserved bits set",
			              index);
	} else if (!check_is_aligned(c, entry)) {
		if (c->first)
			check_corrupt(c, 1,
			              "ERROR refcount block %u is not cluster aligned; refcount "
			              "table entry corrupted",
			              index);
	} else if (!check_in_file(c, entry)) {
		if (c->first)
			check_corrupt(c, 1, "%s refcount block %u is outside image",
			              c->out->fix_errors ? "Repairing" : "ERROR", index);
	} else {
		c->far_end = ox_max(c->far_end, cluster + 1);
		if (cluster - c->counted.first >= c->counted.count)
			return 0;
		rc = check_map_add(&c->counted, cluster, 1, 1);
		count = check_map_get(&c->counted, cluster);
		if (rc < 0 || count == 1)
			return rc;
		/* What does not fit into a refcount is said by the comparison. */
		if (c->refcount_max > 1)
			check_corrupt(c, 1, "ERROR refcount block %u refcount=%llu", index,
			              (unsigned long long)ox_min((uint64_t)count, c->refcount_max));
		if (c->careful && block_is_sane(c, index))
			return 0;
	}
	c->rebuild = true;
	return 0;
}

/* They are what they are said to be: nothing else may be there. */
static int mark_refcounts(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	int rc = check_map_set(&c->kinds, check_cluster(c, h->refcount_table_offset),
	                       h->refcount_table_clusters, CHECK_KIND_METADATA);

	for (uint32_t i = 0; i < c->reftable_entries && rc == 0; i++) {
		if (c->reftable[i])
			rc = check_map_set(&c->kinds, check_cluster(c, c->reftable[i]), 1,
			                   CHECK_KIND_METADATA);
	}
	return rc;
}

int check_count_refcounts(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	uint64_t first = check_cluster(c, h->refcount_table_offset);
	bool shared = false;
	int rc;

	if (!c->reftable_usable || c->without_refcounts)
		return 0;
	rc = check_count_region(c, h->refcount_table_offset, (uint64_t)c->reftable_entries * 8,
	                        false);
	for (uint32_t i = 0; i < h->refcount_table_clusters; i++)
		shared |= check_map_get(&c->counted, first + i) > 1;
	if (shared && (!c->careful || !table_is_sane(c)))
		c->rebuild = true;
	for (uint32_t i = 0; i < c->reftable_entries && rc == 0; i++) {
		if (c->reftable[i])
			rc = count_block(c, i, c->reftable[i]);
	}
	return rc == 0 && c->careful && !c->rebuild ? mark_refcounts(c) : rc;
}

/* --- the comparison ------------------------------------------------------------------------- */

static int compare_cluster_co(struct qcow2_check *c, uint64_t cluster)
{
	uint64_t counted = check_map_get(&c->counted, cluster), stored;
	bool repairing;
	int rc;

	if (cluster >= c->clusters && !counted)
		return 0;
	rc = check_stored_co(c, cluster, &stored);
	if (rc < 0) {
		check_failed(c, "Can't get refcount for cluster %llu: %s",
		             (unsigned long long)cluster, strerror(-rc));
		return rc == -ENOMEM ? rc : 0;
	}
	if (counted > c->refcount_max) {
		check_corrupt(c, counted - c->refcount_max, "ERROR: overflow cluster offset=0x%llx",
		              (unsigned long long)cluster << c->cluster_bits);
		counted = c->refcount_max;
	}
	if (counted == stored)
		return 0;
	repairing = stored < counted ? c->out->fix_errors : c->out->fix_leaks;
	check_say(c, "%s cluster %llu refcount=%llu reference=%llu",
	          repairing          ? "Repairing"
	          : stored < counted ? "ERROR"
	                             : "Leaked",
	          (unsigned long long)cluster, (unsigned long long)stored,
	          (unsigned long long)counted);
	if (stored < counted) {
		c->out->corruptions++;
		/* A block that is missing or cannot be used takes new structures. */
		if (!check_block_usable(c, cluster / c->per_block))
			c->rebuild = true;
	} else {
		c->out->leaks++;
	}
	return 0;
}

int check_compare_co(struct qcow2_check *c)
{
	uint64_t chunks = (c->counted.count + CHECK_CHUNK - 1) >> CHECK_CHUNK_SHIFT;
	uint64_t end = check_map_end(&c->counted, &c->stored);
	int rc = 0;

	c->end = ox_max(c->end, end);
	for (uint64_t chunk = 0; chunk < chunks && rc == 0; chunk++) {
		uint64_t first = c->counted.first + (chunk << CHECK_CHUNK_SHIFT);
		uint64_t last = ox_min(first + CHECK_CHUNK, c->counted.first + c->counted.count);

		if (check_map_same(&c->counted, &c->stored, chunk))
			continue;
		for (; first < last && rc == 0; first++)
			rc = compare_cluster_co(c, first);
	}
	return rc;
}
