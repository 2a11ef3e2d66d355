/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What refers to clusters besides L1 and L2 tables: the header itself, the snapshot table, the
 * LUKS area, and bitmaps with their directory and tables.
 *
 * Snapshots and bitmaps are taken apart here entry by entry, not with the parsers that opening an
 * image uses: those refuse a damaged table, and a check wants what is left of it.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define SNAPSHOT_FIXED     40u
#define SNAPSHOT_EXTRA_V3  16u /* VM state size and disk size must be there */
#define SNAPSHOT_EXTRA_MAX 1024u
#define SNAPSHOT_TABLE_MAX (64u << 20)
#define BITMAP_FIXED       24u
#define BITMAP_DIR_MAX     (64u << 20)
#define BITMAP_TABLE_MAX   (1u << 27) /* entries */

/* --- snapshots ------------------------------------------------------------------------------ */

/* The entry at `at` of the table; false: it does not fit into the bytes that there are. */
static bool parse_snapshot(const struct qcow2_check *c, uint64_t at, struct check_snapshot *s)
{
	const uint8_t *p = c->snapshot_table + at;
	uint64_t bytes;

	if (!ox_range_within(at, SNAPSHOT_FIXED, c->snapshot_bytes))
		return false;
	s->l1_offset = ox_get_be64(p);
	s->l1_entries = ox_get_be32(p + 8);
	s->extra_bytes = ox_get_be32(p + 36);
	bytes = (uint64_t)SNAPSHOT_FIXED + s->extra_bytes + ox_get_be16(p + 12) +
	        ox_get_be16(p + 14);
	/* The last entry's padding may be behind the file's end. */
	if (s->extra_bytes > SNAPSHOT_EXTRA_MAX || !ox_range_within(at, bytes, c->snapshot_bytes))
		return false;
	s->at = (uint32_t)at;
	s->bytes = (uint32_t)ox_align_up(bytes, 8);
	return true;
}

static void check_snapshot(struct qcow2_check *c, uint32_t index, struct check_snapshot *s)
{
	s->usable = check_is_aligned(c, s->l1_offset) &&
	            (uint64_t)s->l1_entries * 8 <= QCOW2_MAX_L1_BYTES &&
	            (!s->l1_entries ||
	             (s->l1_offset &&
	              check_region_in_file(c, s->l1_offset, (uint64_t)s->l1_entries * 8)));
	if (!s->usable) {
		check_corrupt(c, 1,
		              "ERROR snapshot %u: its L1 table (offset 0x%llx, %u entries) is not "
		              "in the file",
		              index + 1, (unsigned long long)s->l1_offset, s->l1_entries);
		c->snapshots_damaged = true;
	} else if (c->q->header.version >= 3 && s->extra_bytes < SNAPSHOT_EXTRA_V3) {
		check_corrupt(c, 1, "%s snapshot table entry %u is incomplete",
		              c->out->fix_errors ? "Repairing" : "ERROR", index);
		c->snapshots_damaged = true;
	}
}

int check_load_snapshots_co(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	uint64_t there, at = 0;
	int rc;

	if (!h->snapshot_count)
		return 0;
	if (!check_is_aligned(c, h->snapshots_offset) || h->snapshots_offset >= c->file_bytes ||
	    h->snapshot_count > QCOW2_MAX_SNAPSHOTS) {
		check_corrupt(c, 1,
		              "ERROR the snapshot table (offset 0x%llx, %u snapshots) is not "
		              "in the file",
		              (unsigned long long)h->snapshots_offset, h->snapshot_count);
		c->snapshots_damaged = true;
		return 0;
	}
	c->snapshots = calloc(h->snapshot_count, sizeof(*c->snapshots));
	if (!c->snapshots)
		return -ENOMEM;
	/* How long the table is follows from its entries: more is read until they are all there. */
	there = ox_min(c->file_bytes - h->snapshots_offset, (uint64_t)SNAPSHOT_TABLE_MAX);
	for (uint64_t bytes = ox_min(there, (uint64_t)CHECK_PIECE);;
	     bytes = ox_min(there, bytes * 8)) {
		free(c->snapshot_table);
		c->snapshot_table = malloc(bytes);
		c->snapshot_bytes = bytes;
		if (!c->snapshot_table)
			return -ENOMEM;
		rc = check_read_co(c, h->snapshots_offset, c->snapshot_table, bytes);
		if (rc < 0) {
			check_failed(c, "ERROR: cannot read the snapshot table: %s", strerror(-rc));
			c->incomplete = true;
			return 0;
		}
		for (; c->snapshot_count < h->snapshot_count &&
		       parse_snapshot(c, at, &c->snapshots[c->snapshot_count]);
		     c->snapshot_count++)
			at += c->snapshots[c->snapshot_count].bytes;
		if (c->snapshot_count == h->snapshot_count || bytes == there)
			break;
	}
	c->snapshot_bytes = ox_min(at, there); /* of what could be understood */
	for (uint32_t i = 0; i < c->snapshot_count; i++)
		check_snapshot(c, i, &c->snapshots[i]);
	if (c->snapshot_count < h->snapshot_count) {
		check_corrupt(c, h->snapshot_count - c->snapshot_count,
		              "ERROR snapshot table entry %u is damaged; the last %u snapshots are "
		              "lost",
		              c->snapshot_count, h->snapshot_count - c->snapshot_count);
		c->snapshots_damaged = true;
	}
	return 0;
}

/* --- bitmaps -------------------------------------------------------------------------------- */

static bool parse_bitmap(const struct qcow2_check *c, uint64_t at, struct check_bitmap *b)
{
	const uint8_t *p = c->bitmap_directory + at;
	uint64_t bytes;

	if (!ox_range_within(at, BITMAP_FIXED, c->bitmap_bytes))
		return false;
	b->table_offset = ox_get_be64(p);
	b->table_entries = ox_get_be32(p + 8);
	bytes = (uint64_t)BITMAP_FIXED + ox_get_be16(p + 18) + ox_get_be32(p + 20);
	bytes = ox_align_up(bytes, 8);
	if (!ox_range_within(at, bytes, c->bitmap_bytes))
		return false;
	b->at = (uint32_t)at;
	b->bytes = (uint32_t)bytes;
	return true;
}

static bool bitmap_sane(const struct qcow2_check *c, const struct check_bitmap *b)
{
	const uint8_t *p = c->bitmap_directory + b->at;
	uint32_t flags = ox_get_be32(p + 12);
	unsigned granularity_bits = p[17], name_bytes = ox_get_be16(p + 18);
	uint64_t bytes = (uint64_t)b->table_entries * 8, needed;

	if (p[16] != 1 || (flags & ~7u) || granularity_bits < 9 || granularity_bits > 31 ||
	    name_bytes == 0 || name_bytes > 1023 || memchr(p + BITMAP_FIXED, 0, name_bytes))
		return false;
	if (!b->table_entries || b->table_entries > BITMAP_TABLE_MAX || !b->table_offset ||
	    !check_is_aligned(c, b->table_offset) ||
	    !check_region_in_file(c, b->table_offset, bytes))
		return false;
	/* A bit for each piece of the disk; one in use may still have another size. */
	needed = c->q->header.size >> granularity_bits >> (c->cluster_bits + 3);
	return (flags & 1) || b->table_entries >= needed;
}

int check_load_bitmaps_co(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	uint64_t at = 0;
	int rc;

	if (!h->bitmap_count)
		return 0;
	/* A program that does not know bitmaps changed the image: they mean nothing any more, and
	 * readers act as if they were not there. */
	c->bitmaps_stale = !(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS);
	if (c->bitmaps_stale)
		return 0;
	if (!check_is_aligned(c, h->bitmap_directory_offset) || !h->bitmap_directory_offset ||
	    h->bitmap_directory_bytes > BITMAP_DIR_MAX || h->bitmap_count > QCOW2_MAX_BITMAPS ||
	    !check_region_in_file(c, h->bitmap_directory_offset, h->bitmap_directory_bytes)) {
		check_corrupt(c, 1,
		              "ERROR the bitmap directory (offset 0x%llx, 0x%llx bytes) is "
		              "not in the file",
		              (unsigned long long)h->bitmap_directory_offset,
		              (unsigned long long)h->bitmap_directory_bytes);
		c->bitmaps_damaged = true;
		return 0;
	}
	c->bitmaps = calloc(h->bitmap_count, sizeof(*c->bitmaps));
	c->bitmap_directory = malloc(h->bitmap_directory_bytes + 1);
	if (!c->bitmaps || !c->bitmap_directory)
		return -ENOMEM;
	c->bitmap_bytes = h->bitmap_directory_bytes;
	rc = check_read_co(c, h->bitmap_directory_offset, c->bitmap_directory, c->bitmap_bytes);
	if (rc < 0) {
		check_failed(c, "ERROR: cannot read the bitmap directory: %s", strerror(-rc));
		c->incomplete = true;
		return 0;
	}
	while (c->bitmap_count < h->bitmap_count &&
	       parse_bitmap(c, at, &c->bitmaps[c->bitmap_count])) {
		struct check_bitmap *b = &c->bitmaps[c->bitmap_count++];

		at += b->bytes;
		b->usable = bitmap_sane(c, b);
		if (!b->usable) {
			check_corrupt(c, 1, "ERROR bitmap directory entry %u is damaged",
			              c->bitmap_count - 1);
			c->bitmaps_damaged = true;
		}
	}
	if (c->bitmap_count < h->bitmap_count) {
		check_corrupt(c, 1,
		              "ERROR bitmap directory entry %u is damaged; the last %u "
		              "bitmaps are lost",
		              c->bitmap_count, h->bitmap_count - c->bitmap_count);
		c->bitmaps_damaged = true;
	}
	return 0;
}

/* The pieces of a bitmap's table: they can be large. */
struct bitmap_walk {
	struct qcow2_check *c;
	const struct check_bitmap *bitmap;
	uint64_t at; /* bytes */
	bool fix;
};

static bool next_bitmap_piece(void *arg, struct check_piece *piece)
{
	struct bitmap_walk *w = arg;
	uint64_t bytes = (uint64_t)w->bitmap->table_entries * 8;

	if (w->at >= bytes)
		return false;
	*piece = (struct check_piece){
	        .offset = w->bitmap->table_offset + w->at,
	        .bytes = (uint32_t)ox_min(bytes - w->at, (uint64_t)CHECK_PIECE)};
	w->at += piece->bytes;
	return true;
}

/* In a careful count: is there something else, too?  A bitmap is the cheaper loss then. */
static bool is_used_twice(const struct qcow2_check *c, uint64_t offset, uint64_t bytes)
{
	uint64_t first = check_cluster(c, offset), last = check_cluster(c, offset + bytes - 1);

	for (uint64_t i = first; i <= last; i++) {
		if (check_map_get(&c->counted, i) > 1)
			return true;
	}
	return false;
}

static int use_bitmap_piece_co(void *arg, const struct check_piece *piece, uint8_t *data, int rc)
{
	struct bitmap_walk *w = arg;
	struct qcow2_check *c = w->c;
	bool changed = false;

	if (rc < 0) {
		check_failed(c, "ERROR: cannot read the bitmap table at 0x%llx: %s",
		             (unsigned long long)piece->offset, strerror(-rc));
		c->incomplete = true;
		return 0;
	}
	rc = 0;
	for (uint32_t i = 0; i < piece->bytes && rc == 0; i += 8) {
		uint64_t entry = ox_get_be64(data + i), offset = entry & QCOW2_OFFSET_MASK;
		bool valid = check_bitmap_entry_valid(c, entry);

		if (!valid && c->first)
			check_corrupt(c, 1, "ERROR bitmap table entry %llx is damaged",
			              (unsigned long long)entry);
		if (w->fix && (!valid || (offset && is_used_twice(c, offset, c->cluster_size)))) {
			ox_put_be64(data + i, 1);
			changed = true;
		} else if (valid && offset && !w->fix) {
			rc = check_count_region(c, offset, c->cluster_size, false);
		}
	}
	if (rc == 0 && changed)
		rc = check_write_co(c, piece->offset, data, piece->bytes);
	return rc;
}

static int walk_bitmaps_co(struct qcow2_check *c, bool fix)
{
	int rc = 0;

	for (uint32_t i = 0; i < c->bitmap_count && rc == 0; i++) {
		struct check_bitmap *b = &c->bitmaps[i];
		struct bitmap_walk walk = {.c = c, .bitmap = b, .fix = fix};

		if (fix && b->usable &&
		    is_used_twice(c, b->table_offset, (uint64_t)b->table_entries * 8)) {
			b->usable = false;
			c->bitmaps_damaged = true;
		}
		if (!b->usable)
			continue;
		if (!fix)
			rc = check_count_region(c, b->table_offset, (uint64_t)b->table_entries * 8,
			                        false);
		if (rc == 0)
			rc = check_read_all_co(c, next_bitmap_piece, use_bitmap_piece_co, &walk);
	}
	return rc;
}

/* A bit that says "changed" too often costs a backup some time, one that says it too seldom costs
 * the backup: what is lost counts as changed. */
int check_fix_bitmaps_co(struct qcow2_check *c)
{
	int rc;

	c->one_by_one = true;
	rc = walk_bitmaps_co(c, true);
	c->one_by_one = false;
	return rc;
}

/* --- counting ------------------------------------------------------------------------------- */

bool check_region_in_file(const struct qcow2_check *c, uint64_t offset, uint64_t bytes)
{
	return bytes <= UINT64_MAX - offset && (offset + bytes <= c->file_bytes ||
	                                        offset + bytes - c->file_bytes < c->cluster_size);
}

int check_count_region(struct qcow2_check *c, uint64_t offset, uint64_t bytes, bool metadata)
{
	uint64_t first = check_cluster(c, offset), count;
	int rc;

	if (!bytes)
		return 0;
	if (!check_region_in_file(c, offset, bytes)) {
		if (c->first)
			check_corrupt(c, 1,
			              "ERROR: counting reference for region exceeding the end of "
			              "the file by one cluster or more: offset 0x%llx size 0x%llx",
			              (unsigned long long)offset, (unsigned long long)bytes);
		return 0;
	}
	count = check_cluster(c, offset + bytes - 1) - first + 1;
	c->far_end = ox_max(c->far_end, first + count);
	rc = check_map_add(&c->counted, first, count, 1);
	if (rc == 0 && c->careful && metadata)
		rc = check_map_set(&c->kinds, first, count, CHECK_KIND_METADATA);
	return rc;
}

int check_count_others_co(struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;
	int rc = check_count_region(c, 0, c->cluster_size, true);

	if (rc == 0 && c->snapshot_bytes)
		rc = check_count_region(c, h->snapshots_offset, c->snapshot_bytes,
		                        !c->snapshots_damaged);
	if (rc == 0 && h->luks_bytes)
		rc = check_count_region(c, h->luks_offset, h->luks_bytes, c->luks_sure);
	if (rc == 0 && c->bitmap_bytes)
		rc = check_count_region(c, h->bitmap_directory_offset, c->bitmap_bytes, false);
	return rc == 0 ? walk_bitmaps_co(c, false) : rc;
}
