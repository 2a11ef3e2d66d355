/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Repairing a qcow2 image.
 *
 * Order, with a flush between the steps, so that a power cut leaves an image that is no worse:
 *   1  the header is marked as corrupt (version 3): nobody writes to it before the end
 *   2  entries that cannot be right go (check_fix.c); tables that shrink are written anew behind
 * the file's end, then the header points there 3  refcounts are set to what is counted then, in
 * place or in new structures (check_rebuild.c) 4  COPIED flags follow the refcounts 5  a second
 * look; the header's marks go if nothing is wrong any more (check.c) Repairing leaks only is steps
 * 3, lowering refcounts alone, and 4.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define HEADER_SNAPSHOTS    60u /* count (4 bytes) and offset (8) */
#define HEADER_INCOMPATIBLE 72u /* and compatible, and autoclear; 8 bytes each */
#define AUTOCLEAR_KNOWN \
	(QCOW2_AUTOCLEAR_BITMAPS | QCOW2_AUTOCLEAR_DATA_RAW | QCOW2_AUTOCLEAR_SESSION)
#define SNAPSHOT_FIXED 40u
#define SNAPSHOT_EXTRA 16u

/* --- writing
 * ------------------------------------------------------------------------------------------ */

int check_write_co(struct qcow2_check *c, uint64_t offset, const void *buf, size_t bytes)
{
	uint64_t inside = offset < c->file_bytes ? c->file_bytes - offset : 0;

	/* A file may end within its last cluster; what lies behind is zero, and can stay so. */
	c->block_index = UINT64_MAX;
	return ox_store_write_co(c->channel->store, offset, buf, ox_min((uint64_t)bytes, inside),
	                         0);
}

int check_flush_co(struct qcow2_check *c)
{
	return ox_store_flush_co(c->channel->store);
}

int check_mark_co(struct qcow2_check *c, uint64_t incompatible)
{
	struct qcow2_header *h = &c->q->header;
	uint64_t autoclear = h->autoclear & AUTOCLEAR_KNOWN;
	uint8_t out[24];
	int rc;

	if (h->version < 3 || (h->incompatible == incompatible && h->autoclear == autoclear))
		return 0;
	ox_put_be64(out, incompatible);
	ox_put_be64(out + 8, h->compatible);
	ox_put_be64(out + 16, autoclear);
	rc = check_write_co(c, HEADER_INCOMPATIBLE, out, sizeof(out));
	if (rc == 0)
		rc = check_flush_co(c);
	if (rc == 0) {
		h->incompatible = incompatible;
		h->autoclear = autoclear;
	}
	return rc;
}

/* Space for clusters that nothing refers to nor counts: behind the file's end; on a device, behind
 * the last cluster in use. */
int check_new_space_co(struct qcow2_check *c, uint64_t clusters, uint64_t *first)
{
	struct ox_store *store = c->channel->store->store;
	bool grows = store->ops->truncate && !(store->dev && !store->ino);
	struct ox_error err = {0};
	int rc;

	*first = grows ? c->clusters : c->free_from;
	if (clusters > (INT64_MAX >> c->cluster_bits) - *first)
		return -EFBIG;
	if (!grows) {
		c->free_from += clusters;
		return (*first + clusters) << c->cluster_bits <= c->file_bytes ? 0 : -ENOSPC;
	}
	rc = ox_store_truncate_co(store, (*first + clusters) << c->cluster_bits, OX_PREALLOC_OFF,
	                          &err);
	if (rc < 0)
		return rc;
	c->clusters = *first + clusters;
	c->file_bytes = c->clusters << c->cluster_bits;
	return 0;
}

int check_append_co(struct qcow2_check *c, const void *buf, size_t bytes, uint64_t *offset)
{
	uint64_t clusters = (bytes + c->cluster_size - 1) >> c->cluster_bits, first;
	int rc = check_new_space_co(c, clusters, &first);

	if (rc < 0)
		return rc;
	*offset = first << c->cluster_bits;
	return check_write_co(c, *offset, buf, bytes);
}

/* --- tables that the header points to
 * ---------------------------------------------------------------- */

/* One snapshot's entry, with the extra data that version 3 wants.  Answers its length. */
static size_t put_snapshot(const struct qcow2_check *c, const struct check_snapshot *s,
                           uint8_t *out)
{
	const uint8_t *in = c->snapshot_table + s->at;
	uint32_t extra = s->extra_bytes;
	size_t names = (size_t)ox_get_be16(in + 12) + ox_get_be16(in + 14);

	memcpy(out, in, SNAPSHOT_FIXED + extra);
	if (c->q->header.version >= 3 && extra < SNAPSHOT_EXTRA) {
		memset(out + SNAPSHOT_FIXED + extra, 0, SNAPSHOT_EXTRA - extra);
		if (extra < 8)
			ox_put_be64(out + SNAPSHOT_FIXED, ox_get_be32(in + 32));
		ox_put_be64(out + SNAPSHOT_FIXED + 8, c->q->header.size);
		extra = SNAPSHOT_EXTRA;
		ox_put_be32(out + 36, extra);
	}
	memcpy(out + SNAPSHOT_FIXED + extra, in + SNAPSHOT_FIXED + s->extra_bytes, names);
	return ox_align_up(SNAPSHOT_FIXED + extra + names, 8);
}

int check_fix_snapshot_table_co(struct qcow2_check *c)
{
	size_t room = (size_t)c->snapshot_bytes + c->snapshot_count * (SNAPSHOT_EXTRA + 8u) + 8;
	OX_FREE uint8_t *table = calloc(1, room);
	uint8_t fields[12];
	uint64_t offset = 0;
	uint32_t kept = 0;
	size_t bytes = 0;
	int rc = 0;

	if (!table)
		return -ENOMEM;
	for (uint32_t i = 0; i < c->snapshot_count; i++) {
		if (!c->snapshots[i].usable)
			continue;
		bytes += put_snapshot(c, &c->snapshots[i], table + bytes);
		kept++;
	}
	if (kept)
		rc = check_append_co(c, table, bytes, &offset);
	if (rc == 0)
		rc = check_flush_co(c);
	ox_put_be32(fields, kept);
	ox_put_be64(fields + 4, offset);
	if (rc == 0)
		rc = check_write_co(c, HEADER_SNAPSHOTS, fields, sizeof(fields));
	if (rc == 0)
		rc = check_flush_co(c);
	if (rc < 0)
		return rc;
	check_say(c, "Repairing the snapshot table: %u of %u snapshots are left", kept,
	          c->q->header.snapshot_count);
	qcow2_free_snapshots(c->q);
	c->q->header.snapshot_count = kept;
	c->q->header.snapshots_offset = offset;
	return 0;
}

/* The header's extension: `count` 0 takes the bitmaps out. */
static int set_bitmaps_co(struct qcow2_check *c, uint32_t count, uint64_t offset, uint64_t bytes)
{
	struct qcow2_header *h = &c->q->header;
	uint8_t extension[24] = {0};
	int rc;

	qcow2_free_bitmaps(c->q);
	ox_put_be32(extension, count);
	ox_put_be64(extension + 8, bytes);
	ox_put_be64(extension + 16, offset);
	qcow2_header_set_extension(h, QCOW2_EXT_BITMAPS, count ? extension : NULL,
	                           count ? sizeof(extension) : 0);
	if (!count)
		h->autoclear &= ~QCOW2_AUTOCLEAR_BITMAPS;
	c->block_index = UINT64_MAX;
	rc = qcow2_write_header_co(c->channel);
	return rc == 0 ? check_flush_co(c) : rc;
}

int check_fix_bitmap_directory_co(struct qcow2_check *c)
{
	OX_FREE uint8_t *directory = calloc(1, (size_t)c->bitmap_bytes + 1);
	uint32_t before = c->q->header.bitmap_count, kept = 0;
	uint64_t offset = 0;
	size_t bytes = 0;
	int rc = 0;

	if (!directory)
		return -ENOMEM;
	for (uint32_t i = 0; i < c->bitmap_count; i++) {
		const struct check_bitmap *b = &c->bitmaps[i];

		if (!b->usable)
			continue;
		memcpy(directory + bytes, c->bitmap_directory + b->at, b->bytes);
		bytes += b->bytes;
		kept++;
	}
	if (kept)
		rc = check_append_co(c, directory, bytes, &offset);
	if (rc == 0)
		rc = check_flush_co(c);
	if (rc == 0)
		rc = set_bitmaps_co(c, kept, offset, bytes);
	if (rc == 0)
		check_say(c, "Repairing the bitmap directory: %u of %u bitmaps are left", kept,
		          before);
	return rc;
}

/* --- refcounts in place
 * --------------------------------------------------------------------------------- */

static int set_block_co(struct qcow2_check *c, uint64_t index, uint8_t *block)
{
	uint64_t first = index * c->per_block;
	uint64_t count = ox_min(c->per_block, c->clusters - first);
	bool changed = false;
	int rc = check_read_co(c, c->reftable[index], block, c->cluster_size);

	for (uint64_t i = 0; i < count && rc == 0; i++) {
		uint64_t want =
		        ox_min((uint64_t)check_map_get(&c->counted, first + i), c->refcount_max);
		uint64_t have = qcow2_refcount_get(block, c->refcount_bits, i);

		/* A cluster that is not shared any more must have its flag in the table, which is
		 * not changed as long as refcounts may be wrong. */
		bool lower = c->out->fix_leaks && (want != 1 || !c->leaks_only);

		if (have < want ? c->out->fix_errors : have > want && lower) {
			qcow2_refcount_set(block, c->refcount_bits, i, want);
			changed = true;
		}
	}
	if (rc == 0 && changed)
		rc = check_write_co(c, c->reftable[index], block, c->cluster_size);
	return rc;
}

static bool uses_any(const struct qcow2_check *c, uint64_t index)
{
	uint64_t first = index * c->per_block;
	uint64_t last = ox_min(first + c->per_block, c->clusters);

	for (; first < last; first++) {
		if (check_map_get(&c->counted, first))
			return true;
	}
	return false;
}

/* The blocks of this window. */
static int set_refcounts_co(struct qcow2_check *c)
{
	uint64_t first = c->counted.first / c->per_block;
	uint64_t last = (c->counted.first + c->counted.count + c->per_block - 1) / c->per_block;
	uint8_t *block;
	int rc = 0;

	for (uint64_t i = first; i < last && !c->rebuild; i++)
		c->rebuild = c->out->fix_errors && !check_block_usable(c, i) && uses_any(c, i);
	if (c->rebuild)
		return 0;
	if (posix_memalign((void **)&block, 4096, ox_max(c->cluster_size, 4096u)))
		return -ENOMEM;
	for (uint64_t i = first; i < last && rc == 0; i++) {
		if (check_block_usable(c, i))
			rc = set_block_co(c, i, block);
	}
	free(block);
	return rc;
}

static int fix_refcounts_co(struct qcow2_check *c)
{
	uint64_t first = 0;
	int rc;

	check_unload(c);
	c->quiet = true;
	c->careful = c->out->fix_errors;
	rc = check_load_co(c);
	if (rc < 0)
		return rc;
	do {
		rc = check_open_window(c, first);
		if (rc == 0)
			rc = check_fill_window_co(c);
		if (rc == 0)
			rc = set_refcounts_co(c);
		if (rc < 0)
			return rc;
	} while (!c->rebuild && check_next_window(c, &first));
	c->quiet = false;
	if (c->rebuild && c->out->fix_errors)
		rc = check_rebuild_co(c);
	else if (c->rebuild)
		check_say(c, "ERROR need to rebuild refcount structures (-r all does)");
	c->careful = false;
	return rc == 0 ? check_flush_co(c) : rc;
}

/* --- COPIED flags
 * ------------------------------------------------------------------------------------------ */

/* The flag of an entry that refers to a cluster of this window; else as it is. */
static uint64_t with_flag(const struct qcow2_check *c, uint64_t raw, uint64_t cluster)
{
	if (!c->data_file) {
		if (cluster - c->counted.first >= c->counted.count)
			return raw;
		if (check_map_get(&c->counted, cluster) != 1)
			return raw & ~QCOW2_ENTRY_COPIED;
	}
	return raw | QCOW2_ENTRY_COPIED;
}

static int fix_flags_co(struct check_walk *w, uint32_t index, uint8_t *table, bool *changed)
{
	const struct qcow2_check *c = w->c;

	for (uint32_t i = 0; i < c->table_entries; i++) {
		uint8_t *at = table + (size_t)i * c->entry_bytes;
		uint64_t raw = ox_get_be64(at), fixed;
		struct check_entry e;

		if (!raw)
			continue;
		check_parse_entry(c, raw, c->extended ? ox_get_be64(at + 8) : 0, &e);
		if (e.kind != CHECK_ENTRY_DATA || e.unaligned || e.outside)
			continue;
		fixed = with_flag(c, raw, check_cluster(c, e.offset));
		if (fixed != raw) {
			ox_put_be64(at, fixed);
			*changed = true;
		}
	}
	return 0;
}

static int fix_l1_flags_co(struct qcow2_check *c)
{
	const uint32_t at_once = 64; /* entries: a sector */
	uint8_t out[512];
	int rc = 0;

	for (uint32_t i = 0; i < c->l1_entries && rc == 0; i += at_once) {
		uint32_t count = ox_min(at_once, c->l1_entries - i);
		bool changed = false;

		for (uint32_t k = 0; k < count; k++) {
			uint64_t raw = c->l1[i + k], cluster;

			if (check_l1_entry_valid(c, raw)) {
				cluster = check_cluster(c, raw & QCOW2_OFFSET_MASK);
				if (cluster - c->counted.first < c->counted.count)
					c->l1[i + k] = check_map_get(&c->counted, cluster) == 1
					                       ? raw | QCOW2_ENTRY_COPIED
					                       : raw & ~QCOW2_ENTRY_COPIED;
			}
			changed |= c->l1[i + k] != raw;
			ox_put_be64(out + (size_t)k * 8, c->l1[i + k]);
		}
		if (changed)
			rc = check_write_co(c, c->q->header.l1_offset + (uint64_t)i * 8, out,
			                    (size_t)count * 8);
	}
	return rc;
}

static int fix_copied_co(struct qcow2_check *c)
{
	struct check_walk walk = {.c = c, .active = true, .visit_co = fix_flags_co};
	uint64_t first = 0;
	int rc;

	check_unload(c);
	c->quiet = true;
	c->careful = false;
	rc = check_load_co(c);
	if (rc < 0)
		return rc;
	do {
		rc = check_open_window(c, first);
		if (rc == 0)
			rc = check_fill_window_co(c);
		if (rc == 0)
			rc = fix_l1_flags_co(c);
		walk.l1 = c->l1;
		walk.entries = c->l1_entries;
		c->one_by_one = true;
		if (rc == 0)
			rc = check_walk_co(&walk);
		c->one_by_one = false;
		if (rc < 0)
			return rc;
	} while (check_next_window(c, &first));
	c->quiet = false;
	return check_flush_co(c);
}

/* --- the order
 * --------------------------------------------------------------------------------------------- */

int check_repair_co(struct qcow2_check *c)
{
	const struct ox_image_check *out = c->out;
	uint64_t incompatible = c->q->header.incompatible;
	bool damaged = out->corruptions || out->check_errors;
	bool stale = c->bitmaps_stale && out->fix_leaks;
	int rc;

	c->free_from = c->end;
	c->leaks_only = damaged && !out->fix_errors;
	if (c->leaks_only && (c->snapshots_damaged || c->bitmaps_damaged)) {
		check_say(c, "Leaks stay: they may belong to what is damaged (-r all repairs "
		             "that)");
		return 0;
	}
	if (damaged && out->fix_errors && !(incompatible & QCOW2_INCOMPAT_DIRTY))
		incompatible |= QCOW2_INCOMPAT_CORRUPT;
	rc = check_mark_co(c, incompatible);
	/* Their clusters are about to be free. */
	if (rc == 0 && stale)
		rc = set_bitmaps_co(c, 0, 0, 0);
	if (rc == 0 && damaged && out->fix_errors)
		rc = check_fix_entries_co(c);
	if (rc == 0)
		rc = fix_refcounts_co(c);
	/* A cluster that is not shared any more may be overwritten in place; not as long as the
	 * refcounts may be wrong. */
	if (rc == 0 && (out->fix_errors || !damaged))
		rc = fix_copied_co(c);
	c->quiet = c->careful = c->without_refcounts = c->one_by_one = false;
	return rc;
}
