/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * L1 and L2 tables: what they refer to, and what is wrong with their entries.
 *
 * Counting takes each run of neighbouring clusters at once, which is how tables of sequentially
 * written and of preallocated images look.  A table that snapshots share with the active L1 table
 * at the same index is read once and counted as often as it is shared.
 *
 * In a plain look everything that an entry says is counted, also what cannot be right, so that the
 * findings are those of `qemu-img check`.  A careful count (before a repair) leaves out what cannot
 * be right, and notes in `kinds` which clusters are metadata.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define L1_RESERVED 0x7f000000000001ffull
#define L2_RESERVED 0x3f000000000001feull
#define LOW_HALF    0xffffffffull

void check_parse_entry(const struct qcow2_check *c, uint64_t raw, uint64_t bitmap,
                       struct check_entry *e)
{
	bool zero = c->has_zero_flag && (raw & QCOW2_ENTRY_ZERO);

	*e = (struct check_entry){.raw = raw, .bitmap = bitmap, .copied = raw & QCOW2_ENTRY_COPIED};
	if (raw & QCOW2_ENTRY_COMPRESSED) {
		e->kind = CHECK_ENTRY_COMPRESSED;
		e->offset = raw & c->coffset_mask;
		e->bytes = ((raw >> c->csize_shift & c->csize_mask) + 1) * 512 - (e->offset & 511);
		e->copied_compressed = e->copied;
		e->impossible = c->data_file;
		e->bad_bitmap = bitmap != 0;
		/* The bytes that matter end in the last cluster that the file has. */
		e->outside = check_cluster(c, e->offset + e->bytes - 1) >= c->clusters;
		return;
	}
	e->reserved_bits = raw & (c->has_zero_flag ? L2_RESERVED : L2_RESERVED | 1);
	e->offset = raw & QCOW2_OFFSET_MASK;
	if (!e->offset && (zero || !c->data_file || !e->copied)) {
		e->bad_bitmap = bitmap & LOW_HALF;
		return;
	}
	e->kind = CHECK_ENTRY_DATA;
	e->bytes = c->cluster_size;
	e->bad_bitmap = bitmap >> 32 & bitmap;
	e->unaligned = !check_is_aligned(c, e->offset);
	e->outside = !c->data_file && !check_region_in_file(c, e->offset, e->bytes);
}

bool check_entry_is_wrong(const struct qcow2_check *c, const struct check_entry *e)
{
	if (e->reserved_bits || e->bad_bitmap || e->impossible || e->unaligned)
		return true;
	if (e->kind == CHECK_ENTRY_COMPRESSED)
		return !check_is_plausible(c, e->offset & ~(uint64_t)(c->cluster_size - 1));
	return e->kind == CHECK_ENTRY_DATA && e->outside && !check_is_plausible(c, e->offset);
}

bool check_l1_entry_valid(const struct qcow2_check *c, uint64_t raw)
{
	uint64_t offset = raw & QCOW2_OFFSET_MASK;

	return offset && check_is_aligned(c, offset) && check_in_file(c, offset);
}

/* --- counting ------------------------------------------------------------------------------- */

struct tally {
	struct qcow2_check *c;
	uint32_t times; /* how many L1 entries lead here */
	bool active;
	uint64_t next_offset;    /* where the next cluster would be if nothing was fragmented */
	uint32_t entries, wrong; /* of the table: not 0; cannot be right */
};

/* A reference to bytes that the file does not have. */
static void say_outside(const struct tally *t, uint64_t offset, uint64_t bytes)
{
	check_corrupt(t->c, t->times,
	              "ERROR: counting reference for region exceeding the end of the file by one "
	              "cluster or more: offset 0x%llx size 0x%llx",
	              (unsigned long long)offset, (unsigned long long)bytes);
}

/* Bytes that an entry refers to, in the file or not. */
static int count_bytes(const struct tally *t, uint64_t offset, uint64_t bytes)
{
	struct qcow2_check *c = t->c;
	uint64_t first = check_cluster(c, offset), end;

	if (!check_region_in_file(c, offset, bytes)) {
		if (c->first)
			say_outside(t, offset, bytes);
		return 0;
	}
	end = check_cluster(c, offset + bytes - 1) + 1;
	c->far_end = ox_max(c->far_end, end);
	return check_map_add(&c->counted, first, end - first, t->times);
}

/* Data where an L2 table is said to be, too: one of the two is wrong. */
static int note_conflicts(struct qcow2_check *c, uint64_t first, uint64_t count)
{
	int rc = 0;

	if (!c->careful || check_map_none(&c->kinds, first, count, CHECK_KIND_TABLE))
		return 0;
	for (uint64_t i = first; i < first + count && rc == 0; i++) {
		if (check_map_get(&c->kinds, i) == CHECK_KIND_TABLE)
			rc = check_map_set(&c->kinds, i, 1, CHECK_KIND_DOUBTFUL);
	}
	return rc;
}

/* The COPIED flag of neighbouring entries against the refcounts in the file.  raw: the first. */
static int check_copied_co(struct qcow2_check *c, uint64_t raw, uint64_t count)
{
	bool copied = raw & QCOW2_ENTRY_COPIED;
	uint64_t first = check_cluster(c, raw & QCOW2_OFFSET_MASK), refcount;
	int rc;

	if (c->quiet)
		return 0;
	if (c->data_file) {
		for (uint64_t i = 0; !copied && c->first && i < count; i++) {
			uint64_t entry = raw + (i << c->cluster_bits);

			check_corrupt(c, 1,
			              "ERROR OFLAG_COPIED data cluster: l2_entry=%llx refcount=1",
			              (unsigned long long)entry);
		}
		return 0;
	}
	if (ox_likely(first + count <= c->clusters) &&
	    (copied ? check_map_all(&c->stored, first, count, 1)
	            : check_map_none(&c->stored, first, count, 1)))
		return 0;
	for (uint64_t i = first; i < first + count; i++, raw += c->cluster_size) {
		bool here = i - c->stored.first < c->stored.count;

		if (i >= c->clusters ? !c->first : !here)
			continue;
		if (here && i < c->clusters && (check_map_get(&c->stored, i) == 1) == copied)
			continue;
		rc = check_stored_co(c, i, &refcount);
		if (rc == 0 && (refcount == 1) != copied)
			check_corrupt(
			        c, 1,
			        "ERROR OFLAG_COPIED data cluster: l2_entry=%llx refcount=%llu",
			        (unsigned long long)raw, (unsigned long long)refcount);
	}
	return 0;
}

static void count_statistics(struct tally *t, uint64_t offset, uint64_t count)
{
	struct ox_image_check *out = t->c->out;

	if (!t->active || t->c->quiet || !t->c->first)
		return;
	out->allocated_clusters += count;
	if (t->next_offset && offset != t->next_offset)
		out->fragmented_clusters++;
	t->next_offset = offset + (count << t->c->cluster_bits);
}

/* Neighbouring clusters of data; raw is the first one's entry, nothing is wrong with its bits. */
static int count_run_co(struct tally *t, uint64_t raw, uint64_t count)
{
	struct qcow2_check *c = t->c;
	uint64_t offset = raw & QCOW2_OFFSET_MASK, first = check_cluster(c, offset);
	uint64_t inside = first >= c->clusters ? 0 : ox_min(count, c->clusters - first);
	int rc;

	count_statistics(t, offset, count);
	if (!c->data_file) {
		for (uint64_t i = inside; c->careful && i < count; i++)
			t->wrong += !check_is_plausible(c, offset + (i << c->cluster_bits));
		for (uint64_t i = inside; c->first && !c->quiet && i < count; i++)
			say_outside(t, offset + (i << c->cluster_bits), c->cluster_size);
		c->far_end = ox_max(c->far_end, inside ? first + inside : 0);
		rc = check_map_add(&c->counted, first, inside, t->times);
		if (rc < 0)
			return rc;
		rc = note_conflicts(c, first, inside);
		if (rc < 0)
			return rc;
	}
	return t->active ? check_copied_co(c, raw, count) : 0;
}

static int count_compressed(struct tally *t, const struct check_entry *e)
{
	struct qcow2_check *c = t->c;
	uint64_t first = check_cluster(c, e->offset);
	int rc;

	if (e->copied_compressed && c->first)
		check_corrupt(c, t->times,
		              "ERROR: coffset=0x%llx: copied flag must never be set for compressed "
		              "clusters",
		              (unsigned long long)e->offset);
	if ((e->impossible || e->bad_bitmap) && c->first)
		check_corrupt(c, t->times, "ERROR compressed cluster with %s, entry=0x%llx",
		              e->impossible ? "data file" : "non-zero subcluster allocation bitmap",
		              (unsigned long long)e->raw);
	if (e->impossible || (c->careful ? e->outside : e->bad_bitmap))
		return 0;
	rc = count_bytes(t, e->offset, e->bytes);
	if (rc == 0 && !e->outside)
		rc = note_conflicts(c, first,
		                    check_cluster(c, e->offset + e->bytes - 1) - first + 1);
	if (t->active && c->first && !c->quiet) {
		c->out->allocated_clusters++;
		c->out->compressed_clusters++;
		c->out->fragmented_clusters++;
	}
	return rc;
}

/* An entry that is not quite ordinary. */
static int count_entry_co(struct tally *t, uint64_t raw, uint64_t bitmap)
{
	struct qcow2_check *c = t->c;
	struct check_entry e;
	int rc;

	check_parse_entry(c, raw, bitmap, &e);
	/* (count_run_co() looks at what is outside.) */
	if (e.kind != CHECK_ENTRY_DATA || !e.outside || e.unaligned)
		t->wrong += check_entry_is_wrong(c, &e);
	if (e.reserved_bits && c->first)
		check_corrupt(c, t->times, "ERROR found l2 entry with reserved bits set: %llx",
		              (unsigned long long)raw);
	if (e.kind == CHECK_ENTRY_COMPRESSED)
		return count_compressed(t, &e);
	if (e.kind == CHECK_ENTRY_NONE) {
		if (e.bad_bitmap && c->first)
			check_corrupt(c, t->times,
			              "ERROR: Unallocated cluster has non-zero subcluster "
			              "allocation map");
		return 0;
	}
	if (e.bad_bitmap && c->first)
		check_corrupt(c, t->times,
		              "ERROR offset=%llx: Allocated cluster has corrupted subcluster "
		              "allocation bitmap",
		              (unsigned long long)e.offset);
	if (e.unaligned && c->first)
		check_corrupt(c, t->times,
		              "ERROR offset=%llx: %s cluster is not properly aligned; L2 entry "
		              "corrupted.",
		              (unsigned long long)e.offset,
		              (c->extended ? !(bitmap & LOW_HALF)
		                           : c->has_zero_flag && (raw & QCOW2_ENTRY_ZERO))
		                      ? "Preallocated"
		                      : "Data");
	if (!e.unaligned)
		return count_run_co(t, raw, 1);
	if (c->careful)
		return 0;
	count_statistics(t, e.offset, 1);
	rc = c->data_file ? 0 : count_bytes(t, e.offset, e.bytes);
	return rc == 0 && t->active ? check_copied_co(c, raw, 1) : rc;
}

/* All that an L2 table (as it stands in the file) refers to. */
static int count_table_co(struct tally *t, const uint8_t *table)
{
	const struct qcow2_check *c = t->c;
	const uint64_t plain = QCOW2_OFFSET_MASK & ~(uint64_t)(c->cluster_size - 1);
	const uint32_t step = c->entry_bytes;
	int rc = 0;

	for (uint32_t i = 0; i < c->table_entries && rc == 0;) {
		const uint8_t *at = table + (size_t)i * step;
		uint64_t raw = ox_get_be64(at), bitmap = c->extended ? ox_get_be64(at + 8) : 0;
		uint32_t run = 1;

		if (!raw && !bitmap) {
			i++;
			continue;
		}
		if ((raw & ~(plain | QCOW2_ENTRY_COPIED)) || !(raw & plain) ||
		    (bitmap >> 32 & bitmap)) {
			t->entries++;
			rc = count_entry_co(t, raw, bitmap);
			i++;
			continue;
		}
		while (i + run < c->table_entries) {
			at += step;
			if (ox_get_be64(at) != raw + (uint64_t)run * c->cluster_size)
				break;
			if (c->extended) {
				bitmap = ox_get_be64(at + 8);
				if (bitmap >> 32 & bitmap)
					break;
			}
			run++;
		}
		t->entries += run;
		rc = count_run_co(t, raw, run);
		i += run;
	}
	return rc;
}

/* --- L1 tables ------------------------------------------------------------------------------ */

static int count_l1_entry_co(struct tally *t, uint32_t index, uint64_t raw)
{
	struct qcow2_check *c = t->c;
	uint64_t offset = raw & QCOW2_OFFSET_MASK, cluster = check_cluster(c, offset), refcount;
	bool copied = raw & QCOW2_ENTRY_COPIED;
	int rc;

	if ((raw & L1_RESERVED) && c->first)
		check_corrupt(c, t->times, "ERROR found L1 entry with reserved bits set: %llx",
		              (unsigned long long)raw);
	if (!offset) {
		if (c->first && !(raw & L1_RESERVED))
			check_corrupt(c, t->times, "ERROR L1 entry %u has no table: %llx", index,
			              (unsigned long long)raw);
		return 0;
	}
	if (c->careful && !check_l1_entry_valid(c, raw))
		return 0;
	rc = count_bytes(t, offset, c->cluster_size);
	if (rc < 0)
		return rc;
	if (!check_is_aligned(c, offset) && c->first)
		check_corrupt(c, t->times,
		              "ERROR l2_offset=%llx: Table is not cluster aligned; L1 entry "
		              "corrupted",
		              (unsigned long long)offset);
	if (c->careful && check_map_get(&c->kinds, cluster) == CHECK_KIND_NONE)
		return check_map_set(&c->kinds, cluster, 1, CHECK_KIND_TABLE);
	if (c->quiet || !t->active)
		return 0;
	if (cluster < c->clusters ? cluster - c->stored.first >= c->stored.count : !c->first)
		return 0;
	rc = check_stored_co(c, cluster, &refcount);
	if (rc == 0 && (refcount == 1) != copied)
		check_corrupt(c, 1,
		              "ERROR OFLAG_COPIED L2 cluster: l1_index=%u l1_entry=%llx "
		              "refcount=%llu",
		              index, (unsigned long long)raw, (unsigned long long)refcount);
	return 0;
}

static uint32_t times_shared(const struct qcow2_check *c, uint32_t index)
{
	return index < c->shared_entries ? c->shared[index] : 0;
}

static int count_l1_co(struct qcow2_check *c, const uint64_t *l1, uint32_t entries, bool active)
{
	int rc = 0;

	for (uint32_t i = 0; i < entries && rc == 0; i++) {
		struct tally t = {.c = c, .times = 1, .active = active};

		if (!l1[i])
			continue;
		if (active)
			t.times += times_shared(c, i);
		rc = count_l1_entry_co(&t, i, l1[i]);
	}
	return rc;
}

/* Is there a table to be read? */
static bool has_table(const struct check_walk *w, uint32_t index)
{
	const struct qcow2_check *c = w->c;
	uint64_t offset = w->l1[index] & QCOW2_OFFSET_MASK;

	if (!offset || offset >= c->file_bytes)
		return false;
	return !c->careful ||
	       (check_l1_entry_valid(c, w->l1[index]) &&
	        check_map_get(&c->kinds, check_cluster(c, offset)) != CHECK_KIND_METADATA);
}

static bool next_tables(void *arg, struct check_piece *piece)
{
	struct check_walk *w = arg;
	const struct qcow2_check *c = w->c;
	uint32_t most = ox_max(CHECK_PIECE / c->cluster_size, 1u), count = 1;
	uint64_t offset;

	while (w->at < w->entries && !has_table(w, w->at))
		w->at++;
	if (w->at >= w->entries)
		return false;
	offset = w->l1[w->at] & QCOW2_OFFSET_MASK;
	while (count < most && w->at + count < w->entries && has_table(w, w->at + count) &&
	       (w->l1[w->at + count] & QCOW2_OFFSET_MASK) ==
	               offset + (uint64_t)count * c->cluster_size)
		count++;
	*piece = (struct check_piece){
	        .offset = offset, .bytes = count * c->cluster_size, .tag = {w->at, count}};
	w->at += count;
	return true;
}

/* A table most of whose entries are wrong is something else, which an L1 entry points to. */
static int count_this_table_co(struct check_walk *w, uint32_t index, const uint8_t *table)
{
	struct qcow2_check *c = w->c;
	struct tally t = {.c = c, .times = 1, .active = w->active};
	int rc;

	if (w->active)
		t.times += times_shared(c, index);
	rc = count_table_co(&t, table);
	if (rc == 0 && c->careful && check_table_is_doubtful(t.entries, t.wrong))
		rc = check_map_set(&c->kinds, check_cluster(c, w->l1[index] & QCOW2_OFFSET_MASK), 1,
		                   CHECK_KIND_DOUBTFUL);
	return rc;
}

/* Shows one table to the visitor, and writes it if it was changed. */
static int visit_table_co(struct check_walk *w, uint32_t index, uint64_t offset, uint8_t *table)
{
	bool changed = false;
	int rc = w->visit_co(w, index, table, &changed);

	if (rc == 0 && changed)
		rc = check_write_co(w->c, offset, table, w->c->cluster_size);
	return rc;
}

static int use_tables_co(void *arg, const struct check_piece *piece, uint8_t *data, int rc)
{
	struct check_walk *w = arg;
	struct qcow2_check *c = w->c;

	if (rc < 0) {
		if (c->first || c->careful)
			check_failed(c, "ERROR: cannot read the L2 tables at 0x%llx: %s",
			             (unsigned long long)piece->offset, strerror(-rc));
		c->incomplete = true;
		return 0;
	}
	rc = 0;
	for (uint32_t i = 0; i < piece->tag[1] && rc == 0; i++) {
		uint32_t index = (uint32_t)piece->tag[0] + i;
		uint8_t *table = data + (size_t)i * c->cluster_size;

		if (w->visit_co) {
			rc = visit_table_co(w, index, piece->offset + (uint64_t)i * c->cluster_size,
			                    table);
		} else {
			rc = count_this_table_co(w, index, table);
		}
	}
	return rc;
}

int check_walk_co(struct check_walk *walk)
{
	walk->at = 0;
	return check_read_all_co(walk->c, next_tables, use_tables_co, walk);
}

/* A snapshot's L1 table, without the entries that are counted with the active one's. */
static int load_snapshot_l1_co(struct qcow2_check *c, const struct check_snapshot *s, uint64_t **l1)
{
	int rc = check_read_table_co(c, s->l1_offset, s->l1_entries, l1);

	for (uint32_t i = 0; rc == 0 && i < ox_min(s->l1_entries, c->shared_entries); i++) {
		if (((*l1)[i] & ~QCOW2_ENTRY_COPIED) == (c->l1[i] & ~QCOW2_ENTRY_COPIED))
			(*l1)[i] = 0;
	}
	return rc;
}

static int count_snapshots_co(struct qcow2_check *c, bool tables)
{
	int rc = 0;

	for (uint32_t i = 0; i < c->snapshot_count && rc == 0; i++) {
		const struct check_snapshot *s = &c->snapshots[i];
		OX_FREE uint64_t *l1 = NULL;

		if (!s->usable)
			continue;
		rc = load_snapshot_l1_co(c, s, &l1);
		if (rc < 0 && rc != -ENOMEM) {
			if (!tables)
				check_failed(c,
				             "ERROR: cannot read the L1 table of snapshot %u: %s",
				             i + 1, strerror(-rc));
			c->incomplete = true;
			rc = 0;
			continue;
		}
		if (rc == 0 && !tables)
			rc = count_l1_co(c, l1, s->l1_entries, false);
		if (rc == 0 && tables) {
			struct check_walk walk = {.c = c, .l1 = l1, .entries = s->l1_entries};

			rc = check_walk_co(&walk);
		}
	}
	return rc;
}

int check_count_tables_co(struct qcow2_check *c)
{
	struct check_walk walk = {.c = c, .l1 = c->l1, .entries = c->l1_entries, .active = true};
	int rc = 0;

	if (c->l1_usable)
		rc = check_count_region(c, c->q->header.l1_offset, (uint64_t)c->l1_entries * 8,
		                        true);
	for (uint32_t i = 0; i < c->snapshot_count && rc == 0; i++)
		rc = check_count_region(c, c->snapshots[i].l1_offset,
		                        (uint64_t)c->snapshots[i].l1_entries * 8, false);
	/* All L1 entries come before all L2 tables: what is a table must be known when data are
	 * looked at. */
	if (rc == 0)
		rc = count_l1_co(c, c->l1, c->l1_entries, true);
	if (rc == 0)
		rc = count_snapshots_co(c, false);
	if (rc == 0)
		rc = check_walk_co(&walk);
	if (rc == 0)
		rc = count_snapshots_co(c, true);
	return rc;
}

/* How many tables are to be read. */
static uint64_t tables_in(const struct qcow2_check *c, const uint64_t *l1, uint32_t entries)
{
	uint64_t tables = 0;

	for (uint32_t i = 0; i < entries; i++) {
		uint64_t offset = l1[i] & QCOW2_OFFSET_MASK;

		tables += offset && offset < c->file_bytes;
	}
	return tables;
}

int check_load_l1_co(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	uint64_t tables;
	int rc;

	c->l1_usable = (uint64_t)h->l1_entries * 8 <= QCOW2_MAX_L1_BYTES &&
	               check_is_aligned(c, h->l1_offset) &&
	               (h->l1_entries == 0 || h->l1_offset < c->file_bytes);
	if (!c->l1_usable) {
		check_corrupt(c, 1,
		              "ERROR the active L1 table (offset 0x%llx, %u entries) is not in "
		              "the file",
		              (unsigned long long)h->l1_offset, h->l1_entries);
		c->incomplete = true;
		return 0;
	}
	rc = check_read_table_co(c, h->l1_offset, h->l1_entries, &c->l1);
	if (rc == -ENOMEM)
		return rc;
	if (rc < 0) {
		check_failed(c, "ERROR: cannot read the active L1 table: %s", strerror(-rc));
		c->l1_usable = false;
		c->incomplete = true;
		return 0;
	}
	c->l1_entries = h->l1_entries;
	/* Reading the same few tables millions of times would take days. */
	if (tables_in(c, c->l1, c->l1_entries) > c->clusters) {
		check_corrupt(c, 1,
		              "ERROR the active L1 table has more entries than the file has "
		              "clusters");
		c->l1_entries = 0;
		c->l1_usable = false;
		c->incomplete = true;
		return 0;
	}
	tables = tables_in(c, c->l1, c->l1_entries);
	if (c->snapshot_count && c->l1_entries) {
		c->shared = calloc(c->l1_entries, sizeof(*c->shared));
		if (!c->shared)
			return -ENOMEM;
	}
	for (uint32_t i = 0; i < c->snapshot_count; i++) {
		struct check_snapshot *s = &c->snapshots[i];
		OX_FREE uint64_t *l1 = NULL;

		if (!s->usable)
			continue;
		rc = check_read_table_co(c, s->l1_offset, s->l1_entries, &l1);
		if (rc == -ENOMEM)
			return rc;
		if (rc < 0)
			continue; /* said when it is counted */
		if (tables_in(c, l1, s->l1_entries) > c->clusters) {
			check_corrupt(c, 1,
			              "ERROR snapshot %u: its L1 table has more entries than the "
			              "file has clusters",
			              i + 1);
			s->usable = false;
			c->snapshots_damaged = true;
			continue;
		}
		for (uint32_t k = 0; k < s->l1_entries; k++) {
			if (k >= c->l1_entries ||
			    (l1[k] & ~QCOW2_ENTRY_COPIED) != (c->l1[k] & ~QCOW2_ENTRY_COPIED))
				tables += (l1[k] & QCOW2_OFFSET_MASK) != 0;
			else if (l1[k])
				c->shared[k]++;
		}
	}
	c->shared_entries = c->shared ? c->l1_entries : 0;
	c->progress_total += tables * c->cluster_size;
	return 0;
}
