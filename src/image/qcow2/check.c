/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Checking a qcow2 image: the order of things.
 *
 * A look reads all metadata once for each window of clusters (there is one unless the image is
 * huge, see check.h): the refcounts as the file has them, then everything that refers to clusters,
 * then it compares.  A repair follows if it was asked for and there is something to repair, and
 * then a second look, whose findings are what is left.
 *
 * The counters and the words are qemu-img check's, so that scripts which read those work.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* However large the file: so many passes over its metadata, and no more. */
#define MAX_WINDOWS 1024u

uint64_t check_map_budget = CHECK_MAP_BYTES;

/* --- findings --------------------------------------------------------------------------------- */

__attribute__((format(printf, 2, 0))) static void say(struct qcow2_check *c, const char *fmt,
                                                      va_list args)
{
	char line[512];

	if (c->quiet || !c->out->say)
		return;
	vsnprintf(line, sizeof(line), fmt, args);
	c->out->say(c->out->arg, line);
}

void check_say(struct qcow2_check *c, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	say(c, fmt, args);
	va_end(args);
}

void check_corrupt(struct qcow2_check *c, uint64_t times, const char *fmt, ...)
{
	va_list args;

	if (c->quiet)
		return;
	c->out->corruptions += times;
	va_start(args, fmt);
	say(c, fmt, args);
	va_end(args);
}

void check_failed(struct qcow2_check *c, const char *fmt, ...)
{
	va_list args;

	if (c->quiet)
		return;
	c->out->check_errors++;
	va_start(args, fmt);
	say(c, fmt, args);
	va_end(args);
}

void check_progress(struct qcow2_check *c, uint64_t bytes)
{
	c->progress_done += bytes;
	if (!c->out->progress || c->progress_done < c->progress_said + c->progress_total / 256)
		return;
	c->progress_said = c->progress_done;
	c->out->progress(c->out->arg, ox_min(c->progress_done, c->progress_total),
	                 ox_max(c->progress_total, (uint64_t)1));
}

/* --- what is checked ----------------------------------------------------------------------------
 */

static void init(struct qcow2_check *c, struct ox_image_channel *channel,
                 struct ox_image_check *out)
{
	struct qcow2 *q = channel->image->priv;
	const struct qcow2_header *h = &q->header;

	*c = (struct qcow2_check){
	        .channel = channel,
	        .q = q,
	        .out = out,
	        .what = channel->image->store->path,
	        .cluster_bits = h->cluster_bits,
	        .cluster_size = 1u << h->cluster_bits,
	        .refcount_bits = 1u << h->refcount_order,
	        .extended = h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2,
	        .data_file = h->incompatible & QCOW2_INCOMPAT_DATA_FILE,
	        .block_index = UINT64_MAX,
	};
	c->entry_bytes = c->extended ? 16 : 8;
	c->table_entries = c->cluster_size / c->entry_bytes;
	c->has_zero_flag = h->version >= 3 && !c->extended;
	c->refcount_max = c->refcount_bits == 64 ? UINT64_MAX : (1ull << c->refcount_bits) - 1;
	c->per_block = (uint64_t)c->cluster_size * 8 / c->refcount_bits;
	c->csize_shift = 62 - (c->cluster_bits - 8);
	c->csize_mask = (1ull << (c->cluster_bits - 8)) - 1;
	c->coffset_mask = (1ull << c->csize_shift) - 1;
}

void check_unload(struct qcow2_check *c)
{
	check_map_free(&c->counted);
	check_map_free(&c->stored);
	check_map_free(&c->kinds);
	free(ox_steal_ptr(c->reftable));
	free(ox_steal_ptr(c->l1));
	free(ox_steal_ptr(c->shared));
	free(ox_steal_ptr(c->snapshot_table));
	free(ox_steal_ptr(c->snapshots));
	free(ox_steal_ptr(c->bitmap_directory));
	free(ox_steal_ptr(c->bitmaps));
	free(ox_steal_ptr(c->block));
	c->block_index = UINT64_MAX;
	c->reftable_entries = c->l1_entries = c->shared_entries = 0;
	c->snapshot_count = c->bitmap_count = 0;
	c->snapshot_bytes = c->bitmap_bytes = 0;
	c->snapshots_damaged = c->bitmaps_damaged = c->bitmaps_stale = false;
	c->reftable_usable = c->l1_usable = false;
	c->rebuild = c->incomplete = false;
	c->end = c->far_end = c->reach = 0;
}

/* How many clusters are looked at in one pass. */
static void choose_window(struct qcow2_check *c)
{
	unsigned bits = c->snapshot_count <= 1 ? 2 : c->snapshot_count <= 250 ? 8 : 16;
	uint64_t clusters = check_map_budget * 8 / (bits + 4);

	c->window = ox_max(c->per_block, (uint64_t)CHECK_CHUNK);
	while (c->window * 2 <= clusters)
		c->window *= 2;
}

/* Is there a LUKS header where the qcow2 header says so? */
static int look_for_luks_co(struct qcow2_check *c)
{
	static const uint8_t magic[6] = {'L', 'U', 'K', 'S', 0xba, 0xbe};
	uint8_t head[6];
	int rc;

	c->luks_sure = false;
	if (!c->q->header.luks_bytes)
		return 0;
	rc = check_read_co(c, c->q->header.luks_offset, head, sizeof(head));
	c->luks_sure = rc == 0 && memcmp(head, magic, sizeof(magic)) == 0;
	if (rc < 0)
		check_failed(c, "ERROR: cannot read the LUKS header: %s", strerror(-rc));
	return 0;
}

int check_load_co(struct qcow2_check *c)
{
	int rc;

	c->file_bytes = __atomic_load_n(&c->channel->store->store->size, __ATOMIC_RELAXED);
	c->clusters =
	        (c->file_bytes >> c->cluster_bits) + ((c->file_bytes & (c->cluster_size - 1)) != 0);
	c->progress_done = c->progress_said = c->progress_total = 0;
	rc = look_for_luks_co(c);
	if (rc == 0)
		rc = check_load_snapshots_co(c);
	if (rc == 0)
		rc = check_load_bitmaps_co(c);
	if (rc == 0)
		rc = check_load_reftable_co(c);
	if (rc == 0)
		rc = check_load_l1_co(c);
	choose_window(c);
	return rc;
}

int check_open_window(struct qcow2_check *c, uint64_t first)
{
	/* One more than the file has: what is not aligned may reach into it. */
	uint64_t left = first <= c->clusters ? c->clusters + 1 - first : 0;
	uint64_t count = ox_min(c->window, left);
	int rc;

	check_map_free(&c->counted);
	check_map_free(&c->stored);
	check_map_free(&c->kinds);
	c->first = first == 0;
	rc = check_map_init(&c->counted, first, count);
	if (rc == 0)
		rc = check_map_init(&c->stored, first, count);
	if (rc == 0)
		rc = check_map_init(&c->kinds, first, c->careful ? count : 0);
	return rc;
}

int check_fill_window_co(struct qcow2_check *c)
{
	int rc = check_load_stored_co(c);

	if (rc == 0)
		rc = check_count_others_co(c);
	if (rc == 0)
		rc = check_count_tables_co(c);
	if (rc == 0)
		rc = check_count_refcounts(c);
	/* A refcount behind the end means nothing as long as nothing refers to it. */
	if (rc == 0 && !check_map_get(&c->counted, c->clusters))
		rc = check_map_set(&c->stored, c->clusters, 1, 0);
	return rc;
}

bool check_next_window(struct qcow2_check *c, uint64_t *first)
{
	uint64_t stored_end = (uint64_t)c->reftable_entries * c->per_block;

	*first += c->window;
	if (*first >= ox_min(c->clusters + 1, ox_max(c->far_end, stored_end)))
		return false;
	if (*first / c->window < MAX_WINDOWS)
		return true;
	check_failed(c, "ERROR: clusters from %llu on are too many to be checked",
	             (unsigned long long)*first);
	c->incomplete = true;
	return false;
}

/* Everything once, with findings. */
static int look_co(struct qcow2_check *c)
{
	struct ox_image_check *out = c->out;
	uint64_t first = 0;
	int rc;

	out->corruptions = out->leaks = out->check_errors = 0;
	out->allocated_clusters = out->fragmented_clusters = out->compressed_clusters = 0;
	out->total_clusters = (c->q->header.size >> c->cluster_bits) +
	                      ((c->q->header.size & (c->cluster_size - 1)) != 0);
	check_unload(c);
	c->quiet = c->careful = c->without_refcounts = false;
	rc = check_load_co(c);
	if (rc < 0)
		return rc;
	do {
		rc = check_open_window(c, first);
		if (rc == 0)
			rc = check_fill_window_co(c);
		if (rc == 0)
			rc = check_compare_co(c);
		if (rc < 0)
			return rc;
	} while (check_next_window(c, &first));
	out->image_end_offset = ox_max(c->end, (uint64_t)1) << c->cluster_bits;
	return 0;
}

/* --- what is left in the header
 * ------------------------------------------------------------------- */

static bool has_marks(const struct qcow2_check *c)
{
	const struct qcow2_header *h = &c->q->header;

	return (h->incompatible & (QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT)) ||
	       h->has_session || (h->autoclear & QCOW2_AUTOCLEAR_SESSION);
}

/* Nothing is wrong any more: the header need not warn of anything. */
static int clear_marks_co(struct qcow2_check *c)
{
	struct qcow2_header *h = &c->q->header;
	bool session = h->has_session || (h->autoclear & QCOW2_AUTOCLEAR_SESSION);
	int rc;

	if (!has_marks(c))
		return 0;
	rc = check_mark_co(c, h->incompatible & ~(QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT));
	/* The extension says that there may be leaks. */
	if (rc == 0 && session && !c->out->leaks) {
		qcow2_header_set_extension(h, QCOW2_EXT_SESSION, NULL, 0);
		h->autoclear &= ~QCOW2_AUTOCLEAR_SESSION;
		rc = qcow2_write_header_co(c->channel);
		if (rc == 0)
			rc = ox_store_flush_co(c->channel->store);
		if (rc == 0)
			qcow2_record_end(c->q);
	}
	if (rc == 0)
		__atomic_store_n(&c->q->corrupt, false, __ATOMIC_RELAXED);
	return rc;
}

/* --- the whole
 * ------------------------------------------------------------------------------------ */

static bool wants_repair(const struct qcow2_check *c)
{
	const struct ox_image_check *out = c->out;

	if (c->incomplete)
		return false;
	return (out->fix_leaks && out->leaks) ||
	       (out->fix_errors && (out->corruptions || out->check_errors));
}

static int repair_co(struct qcow2_check *c)
{
	struct ox_image_check *out = c->out;
	uint64_t corruptions = out->corruptions, leaks = out->leaks;
	uint64_t marks = c->q->header.incompatible;
	int rc;

	if (c->incomplete)
		check_say(c,
		          "Not everything could be read: nothing is repaired, because what looks "
		          "unused may be in use");
	if (wants_repair(c)) {
		rc = check_repair_co(c);
		/* The findings stand; why nothing could be done was said. */
		if (rc == -EUCLEAN)
			return check_mark_co(c, marks);
		if (rc < 0)
			return rc;
		rc = look_co(c);
		if (rc < 0)
			return rc;
		out->corruptions_fixed = corruptions - ox_min(corruptions, out->corruptions);
		out->leaks_fixed = leaks - ox_min(leaks, out->leaks);
	}
	return out->corruptions || out->check_errors ? check_mark_co(c, marks) : clear_marks_co(c);
}

static int check_co(struct qcow2_check *c)
{
	const struct ox_image_check *out = c->out;
	struct ox_image *image = c->channel->image;
	bool fix = out->fix_leaks || out->fix_errors;
	int rc = 0;

	/* What a killed process left in its record is looked at together with the file. */
	if (fix && __atomic_load_n(&image->metadata_dirty, __ATOMIC_ACQUIRE)) {
		rc = qcow2_commit_co(c->channel);
		/* It must not be applied again to what is repaired. */
		if (rc == 0)
			qcow2_record_end(c->q);
	}
	if (rc == 0)
		rc = look_co(c);
	if (rc == 0 && fix)
		rc = repair_co(c);
	check_unload(c);
	if (rc == 0 && out->progress)
		out->progress(out->arg, 1, 1);
	return rc;
}

int qcow2_check_co(struct ox_image_channel *channel, struct ox_image_check *out,
                   struct ox_error *err)
{
	const struct ox_image *image = channel->image;
	struct qcow2_check *c;
	int rc;

	out->corruptions_fixed = out->leaks_fixed = 0;
	if ((out->fix_leaks || out->fix_errors) && image->read_only)
		return ox_error_set(err, EROFS, "%s: opened read-only, it cannot be repaired",
		                    image->store->path);
	c = ox_xcalloc(1, sizeof(*c));
	init(c, channel, out);
	rc = check_co(c);
	free(c);
	if (rc == -ENOMEM)
		return ox_error_set(err, ENOMEM,
		                    "%s: checking it takes more memory than there is or may be "
		                    "used (its tables refer to clusters unusually often)",
		                    image->store->path);
	return rc < 0 ? ox_error_set(err, -rc, "%s: the check ended early: %s", image->store->path,
	                             strerror(-rc))
	              : 0;
}

int qcow2_repair_dirty_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct ox_image_check out = {.fix_leaks = true, .fix_errors = true};
	int rc = qcow2_check_co(channel, &out, err);

	if (rc == 0 && (out.corruptions || out.check_errors))
		rc = ox_error_set(
		        err, EIO,
		        "%s: it was not closed cleanly, and its refcounts could not be "
		        "rebuilt; look at it with 'oxbow check', then 'oxbow check -r all'",
		        channel->image->store->path);
	return rc;
}
