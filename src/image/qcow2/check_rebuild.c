/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * New refcount structures, for an image whose old ones cannot be mended in place.
 *
 * Blocks for the whole file and a table are written behind its end, where nothing refers to; when
 * they are durable, twelve bytes of the header's first sector point to them.  A power cut leaves
 * the old ones in force or the new ones.  The old ones' clusters are free in the new ones.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define HEADER_REFTABLE 48u /* offset (8 bytes) and clusters (4) */

struct rebuild {
	struct qcow2_check *c;
	uint64_t first; /* cluster of the first new block */
	uint64_t blocks, table_clusters;
	uint8_t *block;
};

/* How much is needed to count the file and itself. */
static void plan(const struct qcow2_check *c, struct rebuild *r)
{
	r->blocks = 0;
	r->table_clusters = 0;
	for (;;) {
		uint64_t total = c->clusters + r->blocks + r->table_clusters;
		uint64_t blocks = (total + c->per_block - 1) / c->per_block;

		if (blocks <= r->blocks)
			break;
		r->blocks = blocks;
		r->table_clusters = (blocks * 8 + c->cluster_size - 1) >> c->cluster_bits;
	}
}

/* The new structures have a refcount of 1, all else has what was counted. */
static uint64_t refcount_of(const struct rebuild *r, uint64_t cluster)
{
	const struct qcow2_check *c = r->c;

	if (cluster - r->first < r->blocks + r->table_clusters)
		return 1;
	return ox_min((uint64_t)check_map_get(&c->counted, cluster), c->refcount_max);
}

/* The blocks for the clusters from `from` to before `to`. */
static int write_blocks_co(struct rebuild *r, uint64_t from, uint64_t to)
{
	struct qcow2_check *c = r->c;
	int rc = 0;

	for (uint64_t i = from / c->per_block; i < r->blocks && i * c->per_block < to && rc == 0;
	     i++) {
		uint64_t start = i * c->per_block;

		memset(r->block, 0, c->cluster_size);
		for (uint64_t k = 0; k < c->per_block; k++) {
			uint64_t refcount = refcount_of(r, start + k);

			if (refcount)
				qcow2_refcount_set(r->block, c->refcount_bits, k, refcount);
		}
		rc = check_write_co(c, (r->first + i) << c->cluster_bits, r->block,
		                    c->cluster_size);
	}
	return rc;
}

static int write_all_blocks_co(struct rebuild *r)
{
	struct qcow2_check *c = r->c;
	uint64_t first = 0;
	int rc;

	for (;;) {
		bool more;

		rc = check_open_window(c, first);
		if (rc == 0)
			rc = check_fill_window_co(c);
		more = check_next_window(c, &first);
		/* Behind the last window there is nothing but what is new. */
		if (rc == 0)
			rc = write_blocks_co(r, c->counted.first, more ? first : UINT64_MAX);
		if (rc < 0 || !more)
			return rc;
	}
}

static int write_table_co(struct rebuild *r)
{
	struct qcow2_check *c = r->c;
	size_t bytes = (size_t)r->table_clusters << c->cluster_bits;
	OX_FREE uint8_t *table = calloc(1, bytes);

	if (!table)
		return -ENOMEM;
	for (uint64_t i = 0; i < r->blocks; i++)
		ox_put_be64(table + i * 8, (r->first + i) << c->cluster_bits);
	return check_write_co(c, (r->first + r->blocks) << c->cluster_bits, table, bytes);
}

static int switch_header_co(struct rebuild *r)
{
	struct qcow2_check *c = r->c;
	struct qcow2_header *h = &c->q->header;
	uint64_t offset = (r->first + r->blocks) << c->cluster_bits;
	uint8_t fields[12];
	int rc;

	ox_put_be64(fields, offset);
	ox_put_be32(fields + 8, (uint32_t)r->table_clusters);
	rc = check_write_co(c, HEADER_REFTABLE, fields, sizeof(fields));
	if (rc == 0)
		rc = check_flush_co(c);
	if (rc == 0) {
		h->refcount_table_offset = offset;
		h->refcount_table_clusters = (uint32_t)r->table_clusters;
	}
	return rc;
}

int check_rebuild_co(struct qcow2_check *c)
{
	struct rebuild r = {.c = c};
	uint64_t most = ox_max((uint64_t)QCOW2_MAX_REFTABLE_BYTES, (uint64_t)c->cluster_size) / 8;
	int rc;

	check_say(c, "Rebuilding refcount structure");
	plan(c, &r);
	if (r.blocks > most) {
		check_failed(c, "ERROR: the file is too large for a refcount table");
		return -EUCLEAN;
	}
	rc = check_new_space_co(c, r.blocks + r.table_clusters, &r.first);
	if (rc < 0)
		return rc;
	if (posix_memalign((void **)&r.block, 4096, ox_max(c->cluster_size, 4096u)))
		return -ENOMEM;
	check_unload(c);
	c->quiet = c->careful = c->without_refcounts = true;
	rc = check_load_co(c);
	if (rc == 0)
		rc = write_all_blocks_co(&r);
	if (rc == 0)
		rc = write_table_co(&r);
	if (rc == 0)
		rc = check_flush_co(c);
	if (rc == 0)
		rc = switch_header_co(&r);
	c->quiet = c->careful = c->without_refcounts = false;
	free(r.block);
	return rc;
}
