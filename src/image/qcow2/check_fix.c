/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Entries of L1 and L2 tables that cannot be right: put right where there is one way to do so, else
 * dropped.
 *
 *   - Flags and reserved bits are cleared; the address stays.
 *   - An address that is not aligned, or behind the file's end, refers to nothing.  If exactly one
 *     of the addresses that differ from it in one bit is counted in the file and used by nobody, it
 *     was that.
 *   - Data does not lie in metadata.  Where an L2 entry and an L1 entry claim the same cluster, its
 *     content decides: a table whose entries are valid is one.
 *   - What is dropped reads as zeroes afterwards (not as an older state from a backing image), as
 *     far as the format can say so.
 *
 * First the L1 tables, with all windows of clusters, then the L2 tables: what is not a table must
 * not be written to as if it was one.  Each step works on a careful count (see check.h).
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define LOW_HALF    0xffffffffull
#define L1_RESERVED 0x7f000000000001ffull
#define L2_RESERVED 0x3f000000000001feull
#define ZERO_BITMAP (LOW_HALF << 32)

struct fix {
	struct qcow2_check *c;
	uint64_t lost; /* entries */
	bool single;   /* there is one window: the maps say everything */
};

/* --- an address with a wrong bit
 * -------------------------------------------------------------------- */

static bool is_orphan(const struct qcow2_check *c, uint64_t offset)
{
	uint64_t cluster = check_cluster(c, offset);

	return offset && check_is_aligned(c, offset) && check_in_file(c, offset) &&
	       check_map_get(&c->stored, cluster) && !check_map_get(&c->counted, cluster);
}

/* The one address that it could have been; 0: none, or several. */
static uint64_t find_orphan(const struct fix *f, uint64_t offset)
{
	uint64_t found = 0;

	for (unsigned bit = 9; f->single && bit < 56; bit++) {
		uint64_t other = offset ^ (1ull << bit);

		if (!is_orphan(f->c, other))
			continue;
		if (found)
			return 0;
		found = other;
	}
	return found;
}

/* --- L1
 * ---------------------------------------------------------------------------------------------- */

/* Does the cluster look like an L2 table?  An empty one does not count: nothing is lost with it. */
static int is_table_co(const struct fix *f, uint64_t offset, uint32_t most_wrong, bool *is)
{
	struct qcow2_check *c = f->c;
	OX_FREE uint8_t *table = malloc(c->cluster_size);
	uint32_t entries = 0, wrong = 0;
	int rc;

	if (!table)
		return -ENOMEM;
	rc = check_read_co(c, offset, table, c->cluster_size);
	for (uint32_t i = 0; rc == 0 && i < c->table_entries; i++) {
		const uint8_t *at = table + (size_t)i * c->entry_bytes;
		struct check_entry e;

		check_parse_entry(c, ox_get_be64(at), c->extended ? ox_get_be64(at + 8) : 0, &e);
		entries += e.raw || e.bitmap;
		wrong +=
		        e.reserved_bits || e.unaligned || e.bad_bitmap || e.impossible || e.outside;
	}
	*is = entries && wrong <= ox_min(most_wrong, entries / 4);
	return rc;
}

static int fix_l1_entry_co(struct fix *f, uint64_t *entry, const char *which, uint32_t index)
{
	struct qcow2_check *c = f->c;
	uint64_t raw = *entry, offset = raw & QCOW2_OFFSET_MASK;
	bool drop, is;
	int rc;

	*entry &= ~L1_RESERVED;
	drop = !check_l1_entry_valid(c, raw);
	if (drop) {
		offset = find_orphan(f, offset);
		rc = offset ? is_table_co(f, offset, UINT32_MAX, &is) : 0;
		if (rc < 0)
			return rc;
		if (offset && is) {
			check_say(c, "Repairing %sL1 entry %u: %llx is %llx", which, index,
			          (unsigned long long)raw, (unsigned long long)offset);
			*entry = offset;
			return check_map_add(&c->counted, check_cluster(c, offset), 1, 1);
		}
	} else {
		switch (check_map_get(&c->kinds, check_cluster(c, offset))) {
		case CHECK_KIND_METADATA:
			drop = true;
			break;
		case CHECK_KIND_DOUBTFUL:
			rc = is_table_co(f, offset, UINT32_MAX, &is);
			if (rc < 0)
				return rc;
			drop = !is;
			break;
		default:
			break;
		}
	}
	if (drop) {
		check_say(c,
		          "Repairing %sL1 entry %u: %llx cannot be an L2 table; what it mapped "
		          "is lost",
		          which, index, (unsigned long long)raw);
		*entry = 0;
		f->lost++;
	}
	return 0;
}

/* An L1 table most of whose entries are wrong is not one: the header points somewhere else, and
 * dropping its entries would lose everything. */
static bool l1_is_wrong(const struct qcow2_check *c)
{
	uint32_t used = 0, wrong = 0;

	for (uint32_t i = 0; i < c->l1_entries; i++) {
		uint64_t raw = c->l1[i];

		used += raw != 0;
		wrong += raw &&
		         (!check_is_plausible(c, raw & QCOW2_OFFSET_MASK) || (raw & L1_RESERVED));
	}
	return check_table_is_doubtful(used, wrong);
}

/* `offset`: of the table in the file. */
static int fix_l1_co(struct fix *f, uint64_t *l1, uint32_t entries, uint64_t offset,
                     const char *which)
{
	uint32_t first = UINT32_MAX, last = 0;
	int rc = 0;

	for (uint32_t i = 0; i < entries && rc == 0; i++) {
		uint64_t before = l1[i];

		if (!before)
			continue;
		rc = fix_l1_entry_co(f, &l1[i], which, i);
		if (l1[i] != before) {
			first = ox_min(first, i);
			last = i;
		}
	}
	if (rc == 0 && first <= last) {
		size_t count = last - first + 1;
		OX_FREE uint64_t *out = malloc(count * 8);

		if (!out)
			return -ENOMEM;
		for (size_t i = 0; i < count; i++)
			out[i] = htobe64(l1[first + i]);
		rc = check_write_co(f->c, offset + (uint64_t)first * 8, out, count * 8);
	}
	return rc;
}

/* The snapshot table says that there is an L1 table, and something else uses the clusters too.  If
 * it does not lead to L2 tables, the snapshot goes; what else is there stays in any case. */
static int judge_snapshot_co(struct fix *f, struct check_snapshot *s, const uint64_t *l1)
{
	struct qcow2_check *c = f->c;
	bool is = false;
	int rc = 0;

	for (uint32_t i = 0; i < s->l1_entries && rc == 0; i++) {
		if (!l1[i])
			continue;
		is = false;
		if (check_l1_entry_valid(c, l1[i]) && !(l1[i] & L1_RESERVED))
			rc = is_table_co(f, l1[i] & QCOW2_OFFSET_MASK, UINT32_MAX, &is);
		if (!is)
			break;
	}
	if (rc == 0 && !is) {
		s->usable = false;
		c->snapshots_damaged = true;
	}
	return rc;
}

static bool is_shared(const struct qcow2_check *c, const struct check_snapshot *s)
{
	uint64_t first = check_cluster(c, s->l1_offset);
	uint64_t count = ((uint64_t)s->l1_entries * 8 + c->cluster_size - 1) >> c->cluster_bits;

	for (uint64_t i = first; i < first + count; i++) {
		if (check_map_get(&c->counted, i) > 1)
			return true;
	}
	return false;
}

static int fix_all_l1_co(struct fix *f)
{
	struct qcow2_check *c = f->c;
	char which[32];
	int rc = fix_l1_co(f, c->l1, c->l1_entries, c->q->header.l1_offset, "");

	for (uint32_t i = 0; i < c->snapshot_count && rc == 0; i++) {
		struct check_snapshot *s = &c->snapshots[i];
		OX_FREE uint64_t *l1 = NULL;

		if (!s->usable)
			continue;
		rc = check_read_table_co(c, s->l1_offset, s->l1_entries, &l1);
		snprintf(which, sizeof(which), "snapshot %u's ", i + 1);
		if (rc == 0 && is_shared(c, s))
			rc = judge_snapshot_co(f, s, l1);
		else if (rc == 0)
			rc = fix_l1_co(f, l1, s->l1_entries, s->l1_offset, which);
	}
	return rc;
}

/* --- L2
 * ---------------------------------------------------------------------------------------------- */

/* What an entry becomes that refers to nothing: zeroes, if that can be said and if nothing would
 * read as something older. */
static void drop_entry(const struct fix *f, uint64_t *raw, uint64_t *bitmap)
{
	const struct qcow2_check *c = f->c;
	bool backing = c->q->header.backing_file;

	*raw = backing && c->has_zero_flag ? QCOW2_ENTRY_ZERO : 0;
	*bitmap = backing && c->extended ? ZERO_BITMAP : 0;
}

/* Does [offset, offset + bytes) touch metadata? */
static bool in_metadata(const struct qcow2_check *c, uint64_t offset, uint64_t bytes)
{
	uint64_t first = check_cluster(c, offset), last = check_cluster(c, offset + bytes - 1);

	return !check_map_all(&c->kinds, first, last - first + 1, CHECK_KIND_NONE);
}

static bool holds_data(const struct qcow2_check *c, const struct check_entry *e)
{
	if (e->kind == CHECK_ENTRY_COMPRESSED)
		return true;
	if (c->extended)
		return e->bitmap & LOW_HALF;
	return !(c->has_zero_flag && (e->raw & QCOW2_ENTRY_ZERO));
}

/* A data cluster is referred to more often than a refcount can say: this entry gets its own. */
static int split_co(struct fix *f, uint64_t *raw)
{
	struct qcow2_check *c = f->c;
	uint64_t offset = *raw & QCOW2_OFFSET_MASK, copy, cluster = check_cluster(c, offset);
	OX_FREE uint8_t *data = malloc(c->cluster_size);
	int rc;

	if (!data)
		return -ENOMEM;
	rc = check_read_co(c, offset, data, c->cluster_size);
	if (rc == 0)
		rc = check_append_co(c, data, c->cluster_size, &copy);
	if (rc < 0)
		return rc;
	check_say(c,
	          "Repairing L2 entry %llx: its data is copied, the cluster has more than %llu "
	          "references",
	          (unsigned long long)*raw, (unsigned long long)c->refcount_max);
	*raw = (*raw & ~(QCOW2_OFFSET_MASK | QCOW2_ENTRY_COPIED)) | copy;
	check_map_drop(&c->counted, cluster);
	return 0;
}

static int fix_data_co(struct fix *f, const struct check_entry *e, uint64_t guest_cluster,
                       uint64_t *raw, uint64_t *bitmap)
{
	struct qcow2_check *c = f->c;
	uint64_t found;

	if (c->data_file) {
		/* Guest and host offsets are the same there. */
		if (e->unaligned)
			*raw = (*raw & ~QCOW2_OFFSET_MASK) |
			       ((guest_cluster << c->cluster_bits) & QCOW2_OFFSET_MASK);
		return 0;
	}
	if (!e->unaligned && !e->outside) {
		if (in_metadata(c, e->offset, e->bytes)) {
			drop_entry(f, raw, bitmap);
			if (holds_data(c, e))
				goto lost;
		} else if (check_map_get(&c->counted, check_cluster(c, e->offset)) >
		           c->refcount_max) {
			return split_co(f, raw);
		}
		return 0;
	}
	found = find_orphan(f, e->offset);
	if (found) {
		check_say(c, "Repairing L2 entry %llx: its cluster is at %llx",
		          (unsigned long long)e->raw, (unsigned long long)found);
		*raw = (*raw & ~QCOW2_OFFSET_MASK) | found;
		return check_map_add(&c->counted, check_cluster(c, found), 1, 1);
	}
	if (!holds_data(c, e)) {
		/* Zeroes under which space was reserved. */
		*raw &= QCOW2_ENTRY_ZERO;
		return 0;
	}
	drop_entry(f, raw, bitmap);
lost:
	check_say(c,
	          "Repairing L2 entry %llx of guest cluster %llu: it cannot refer to data; its "
	          "content is lost",
	          (unsigned long long)e->raw, (unsigned long long)guest_cluster);
	f->lost++;
	return 0;
}

/* An entry is marked as compressed and as in force, which exclude each other: what there is tells
 * which of the flags is wrong. */
static int choose_flag_co(struct fix *f, const struct check_entry *e, uint64_t *raw)
{
	struct qcow2_check *c = f->c;
	unsigned type = c->q->header.compression_type;
	OX_FREE uint8_t *in = NULL, *out = NULL;
	struct check_entry other;
	int rc;

	check_parse_entry(c, e->raw & ~QCOW2_ENTRY_COMPRESSED, 0, &other);
	if (other.kind != CHECK_ENTRY_DATA || other.unaligned || other.outside ||
	    other.reserved_bits)
		return 0;
	if (!e->impossible && !e->outside) {
		in = malloc(e->bytes);
		out = malloc(c->cluster_size);
		if (!in || !out)
			return -ENOMEM;
		rc = check_read_co(c, e->offset, in, e->bytes);
		if (rc < 0)
			return rc;
		if (qcow2_decompress(type, in, e->bytes, out, c->cluster_size) == 0)
			return 0;
	}
	*raw = other.raw;
	return 0;
}

static int fix_entry_co(struct fix *f, uint64_t guest_cluster, uint64_t *raw, uint64_t *bitmap)
{
	struct qcow2_check *c = f->c;
	struct check_entry e;

	check_parse_entry(c, *raw, *bitmap, &e);
	if (e.copied_compressed) {
		int rc = choose_flag_co(f, &e, raw);

		if (rc < 0)
			return rc;
		check_parse_entry(c, *raw, *bitmap, &e);
	}
	if (e.kind == CHECK_ENTRY_COMPRESSED) {
		if (e.impossible || e.outside || in_metadata(c, e.offset, e.bytes)) {
			check_say(c,
			          "Repairing L2 entry %llx of guest cluster %llu: it cannot "
			          "refer to compressed data; its content is lost",
			          (unsigned long long)e.raw, (unsigned long long)guest_cluster);
			drop_entry(f, raw, bitmap);
			f->lost++;
		} else {
			*raw &= ~QCOW2_ENTRY_COPIED;
			*bitmap = 0;
		}
		return 0;
	}
	if (e.reserved_bits)
		*raw &= ~(c->has_zero_flag ? L2_RESERVED : L2_RESERVED | 1);
	if (e.kind == CHECK_ENTRY_NONE) {
		if (e.bad_bitmap)
			*bitmap &= ~LOW_HALF;
		return 0;
	}
	/* A subcluster that is data and zero is data. */
	if (e.bad_bitmap)
		*bitmap &= ~(*bitmap << 32);
	return fix_data_co(f, &e, guest_cluster, raw, bitmap);
}

static int fix_table_co(struct check_walk *w, uint32_t index, uint8_t *table, bool *changed)
{
	struct fix *f = w->arg;
	const struct qcow2_check *c = f->c;
	int rc = 0;

	for (uint32_t i = 0; i < c->table_entries && rc == 0; i++) {
		uint8_t *at = table + (size_t)i * c->entry_bytes;
		uint64_t raw = ox_get_be64(at), bitmap = c->extended ? ox_get_be64(at + 8) : 0;
		uint64_t new_raw = raw, new_bitmap = bitmap;

		if (!raw && !bitmap)
			continue;
		rc = fix_entry_co(f, (uint64_t)index * c->table_entries + i, &new_raw, &new_bitmap);
		if (new_raw == raw && new_bitmap == bitmap)
			continue;
		*changed = true;
		ox_put_be64(at, new_raw);
		if (c->extended)
			ox_put_be64(at + 8, new_bitmap);
	}
	return rc;
}

static int fix_all_l2_co(struct fix *f)
{
	struct qcow2_check *c = f->c;
	struct check_walk walk = {.c = c,
	                          .l1 = c->l1,
	                          .entries = c->l1_entries,
	                          .active = true,
	                          .visit_co = fix_table_co,
	                          .arg = f};
	int rc;

	c->one_by_one = true;
	rc = check_walk_co(&walk);
	for (uint32_t i = 0; i < c->snapshot_count && rc == 0; i++) {
		const struct check_snapshot *s = &c->snapshots[i];
		OX_FREE uint64_t *l1 = NULL;

		if (!s->usable)
			continue;
		rc = check_read_table_co(c, s->l1_offset, s->l1_entries, &l1);
		walk.l1 = l1;
		walk.entries = s->l1_entries;
		walk.active = false;
		if (rc == 0)
			rc = check_walk_co(&walk);
	}
	c->one_by_one = false;
	return rc;
}

/* --- both
 * ---------------------------------------------------------------------------------------------- */

/* One step for each window, each upon a careful count. */
static int each_window_co(struct fix *f, int (*step_co)(struct fix *f))
{
	struct qcow2_check *c = f->c;
	uint64_t first = 0;
	int rc;

	check_unload(c);
	c->quiet = c->careful = true;
	rc = check_load_co(c);
	if (rc < 0)
		return rc;
	if (l1_is_wrong(c)) {
		c->quiet = false;
		check_failed(c,
		             "ERROR what the header says is the active L1 table (at 0x%llx) is "
		             "something else: nothing is repaired",
		             (unsigned long long)c->q->header.l1_offset);
		return -EUCLEAN;
	}
	f->single = c->window >= c->clusters;
	do {
		c->quiet = true;
		rc = check_open_window(c, first);
		if (rc == 0)
			rc = check_fill_window_co(c);
		c->quiet = false;
		if (rc == 0)
			rc = step_co(f);
		if (rc < 0)
			return rc;
	} while (check_next_window(c, &first));
	return check_flush_co(c);
}

static int fix_l2_step_co(struct fix *f)
{
	int rc = fix_all_l2_co(f);

	return rc == 0 ? check_fix_bitmaps_co(f->c) : rc;
}

int check_fix_entries_co(struct qcow2_check *c)
{
	struct fix f = {.c = c};
	int rc = each_window_co(&f, fix_all_l1_co);

	if (rc == 0 && c->snapshots_damaged)
		rc = check_fix_snapshot_table_co(c);
	/* Refcount structures that will go are nothing that data could be in the way of. */
	c->without_refcounts = c->rebuild;
	if (rc == 0)
		rc = each_window_co(&f, fix_l2_step_co);
	if (rc == 0 && c->bitmaps_damaged)
		rc = check_fix_bitmap_directory_co(c);
	c->without_refcounts = c->careful = c->quiet = false;
	return rc;
}
