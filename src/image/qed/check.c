/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The consistency check (qed_spec, "Consistency checking"), and repair.
 *
 * Every offset is aligned, within the file and outside the header; every cluster is referred to
 * once.  Two passes over the tables: the first finds the L2 tables, so that the second knows which
 * clusters are no place for data.  Counted as qemu-img check counts.
 *
 * Repair (fix_errors):
 *   - an entry that is not valid, or that points to a table, becomes "unallocated": nothing that
 *     belongs to it can be reached.
 *   - a table or cluster that is referred to a second time is copied, so that each owner has its
 *     own and both still read what they read before.  At most as much is copied as the file has:
 *     a few damaged entries do not ask for more, a malicious image could ask for any amount.
 *   - (fix_leaks) clusters at the file's end that nobody refers to are cut off.  The format cannot
 *     use those in between again.
 * A copy is durable before the entry that shows it is written.
 *
 * Memory: a bit for each cluster of the file (2 GiB of address space at the most, of which only
 * what is touched takes memory: 2 MiB for 1 TiB in clusters of 64 KiB), 16 bytes for each table.
 * Regions that the file does not hold are not read.
 */
#include "image/qed/qed.h"
#include "base/byteorder.h"
#include "base/iov.h"
#include <errno.h>
#include <inttypes.h>
#include <oxbow/log.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_CLUSTERS (UINT64_C(1) << 34)
#define COPY_BYTES   (UINT64_C(1) << 20)
#define WORD_BITS    64u

struct found_table {
	uint64_t index, offset;
};

struct run {
	struct ox_image_channel *channel;
	struct qed *q;
	struct ox_image_check *check;
	/* What is referred to twice is copied, as long as there is some of this left, bytes. */
	uint64_t copy_left;
	uint64_t clusters;             /* of the file */
	uint64_t *used;                /* a bit each */
	uint64_t used_count, used_end; /* how many; behind the last one */
	struct found_table *tables;
	size_t table_count, table_room;
	uint8_t *bytes; /* block_bytes of a table */
	bool copied;    /* since the last flush */
	bool changed;   /* the file was */
};

static void say(struct run *run, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void say(struct run *run, const char *fmt, ...)
{
	char line[256];
	va_list args;

	if (!run->check->say)
		return;
	va_start(args, fmt);
	vsnprintf(line, sizeof(line), fmt, args);
	va_end(args);
	run->check->say(run->check->arg, line);
}

/* --- which clusters are used ------------------------------------------------------------------ */

static bool is_used(const struct run *run, uint64_t offset, uint64_t bytes)
{
	uint64_t first = offset >> run->q->cluster_shift;
	uint64_t count = bytes >> run->q->cluster_shift;

	for (uint64_t i = first; i < first + count; i++) {
		if (run->used[i / WORD_BITS] >> (i % WORD_BITS) & 1)
			return true;
	}
	return false;
}

static void use(struct run *run, uint64_t offset, uint64_t bytes)
{
	uint64_t first = offset >> run->q->cluster_shift;
	uint64_t count = bytes >> run->q->cluster_shift;

	for (uint64_t i = first; i < first + count; i++) {
		uint64_t bit = UINT64_C(1) << (i % WORD_BITS);

		run->used_count += !(run->used[i / WORD_BITS] & bit);
		run->used[i / WORD_BITS] |= bit;
	}
	run->used_end = ox_max(run->used_end, offset + bytes);
}

/* Entries point to whole clusters of the file, behind the header, and not into L1. */
static bool is_valid(const struct run *run, uint64_t offset, uint64_t bytes)
{
	const struct qed *q = run->q;

	return ox_is_aligned(offset, q->cluster_size) &&
	       offset >= (uint64_t)q->header.header_size << q->cluster_shift &&
	       ox_range_within(offset, bytes, run->clusters << q->cluster_shift) &&
	       (offset >= q->header.l1_offset + q->table_bytes ||
	        offset + bytes <= q->header.l1_offset);
}

/* --- copying ---------------------------------------------------------------------------------- */

/* New space behind the file's end; not from q's own, which is there only while an image is in use.
 */
static int append_co(struct run *run, uint64_t bytes, uint64_t *offset)
{
	struct qed *q = run->q;
	uint64_t end;
	int rc;

	pthread_mutex_lock(&q->lock);
	end = q->end;
	pthread_mutex_unlock(&q->lock);
	if (end > INT64_MAX - bytes)
		return -EFBIG;
	rc = ox_store_truncate_co(run->channel->image->store, end + bytes, OX_PREALLOC_OFF, NULL);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	q->end = q->grown = end + bytes;
	pthread_mutex_unlock(&q->lock);
	run->used_end = ox_max(run->used_end, end + bytes);
	*offset = end;
	return 0;
}

static int copy_co(struct run *run, uint64_t from, uint64_t bytes, uint64_t *to)
{
	struct ox_channel *store = run->channel->store;
	uint64_t step = ox_min(bytes, COPY_BYTES);
	OX_FREE uint8_t *buf = aligned_alloc(4096, step);
	int rc;

	if (!buf)
		return -ENOMEM;
	rc = append_co(run, bytes, to);
	for (uint64_t at = 0; at < bytes && rc == 0; at += step) {
		rc = ox_store_read_co(store, from + at, buf, step);
		if (rc == 0 && !ox_buffer_is_zero(buf, step))
			rc = ox_store_write_co(store, *to + at, buf, step, 0);
	}
	run->copied = true;
	run->copy_left -= bytes;
	return rc;
}

/* A block of a table that was changed; what it shows is durable before. */
static int write_table_co(struct run *run, uint64_t at)
{
	int rc = run->copied ? qed_flush_co(run->channel) : 0;

	if (rc < 0)
		return rc;
	run->copied = false;
	run->changed = true;
	return ox_store_write_co(run->channel->store, at, run->bytes, run->q->block_bytes, 0);
}

/* --- pass 1: tables --------------------------------------------------------------------------- */

static int add_found(struct run *run, uint64_t index, uint64_t offset)
{
	if (run->table_count == run->table_room) {
		size_t room = ox_max(2 * run->table_room, (size_t)64);
		struct found_table *grown = realloc(run->tables, room * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		run->tables = grown;
		run->table_room = room;
	}
	run->tables[run->table_count++] = (struct found_table){.index = index, .offset = offset};
	return 0;
}

/* One L1 entry; *entry may change.  0, or what ends the check. */
static int check_l1_entry_co(struct run *run, uint64_t index, uint64_t *entry)
{
	struct qed *q = run->q;
	struct ox_image_check *check = run->check;
	uint64_t copy;
	int rc;

	if (!is_valid(run, *entry, q->table_bytes)) {
		say(run,
		    "%s: L1 entry %" PRIu64 " points to %#" PRIx64
		    ", which is no place for a table",
		    check->fix_errors ? "Repairing" : "ERROR", index, *entry);
		if (!check->fix_errors) {
			check->corruptions++;
			return 0;
		}
		check->corruptions_fixed++;
		*entry = QED_UNALLOCATED;
		return 0;
	}
	if (is_used(run, *entry, q->table_bytes)) {
		bool repair = run->copy_left >= q->table_bytes;

		say(run, "%s: L1 entry %" PRIu64 " points to %#" PRIx64 ", which is already in use",
		    repair ? "Repairing" : "ERROR", index, *entry);
		if (!repair) {
			/* Its entries are another's: counting them again says nothing. */
			check->corruptions++;
			return 0;
		}
		rc = copy_co(run, *entry, q->table_bytes, &copy);
		if (rc < 0)
			return rc;
		check->corruptions_fixed++;
		*entry = copy;
		return add_found(run, index, copy);
	}
	use(run, *entry, q->table_bytes);
	return add_found(run, index, *entry);
}

/* The entries of L1 that the disk's size needs, and those that share a block with them. */
static int find_tables_co(struct run *run)
{
	struct qed *q = run->q;
	const struct qed_l1 *l1 = __atomic_load_n(&q->l1, __ATOMIC_ACQUIRE);
	int rc;

	for (unsigned b = 0; b < l1->block_count; b++) {
		uint64_t at = q->header.l1_offset + (uint64_t)b * q->block_bytes;
		bool changed = false;

		rc = ox_store_read_co(run->channel->store, at, run->bytes, q->block_bytes);
		if (rc < 0)
			return rc;
		for (uint32_t i = 0; i < q->block_entries; i++) {
			uint64_t index = ((uint64_t)b << q->block_shift) + i;
			uint64_t was = ox_get_le64(run->bytes + i * sizeof(uint64_t));
			uint64_t entry = was;

			if (was == QED_UNALLOCATED)
				continue;
			rc = check_l1_entry_co(run, index, &entry);
			if (rc < 0)
				return rc;
			if (entry == was)
				continue;
			ox_put_le64(run->bytes + i * sizeof(uint64_t), entry);
			qed_patch_l1(q, index, entry);
			changed = true;
		}
		if (!changed)
			continue;
		rc = write_table_co(run, at);
		if (rc < 0)
			return rc;
	}
	return 0;
}

static int compare_tables(const void *a, const void *b)
{
	const struct found_table *x = a, *y = b;

	return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int compare_index(const void *a, const void *b)
{
	const struct found_table *x = a, *y = b;

	return x->index < y->index ? -1 : x->index > y->index;
}

/* From now on the map knows them too: what is in memory is judged by it. */
static int take_over_tables(struct run *run)
{
	struct qed *q = run->q;
	uint64_t *tables = malloc(ox_max(run->table_count, (size_t)1) * sizeof(*tables));

	if (!tables)
		return -ENOMEM;
	if (run->table_count > 0)
		qsort(run->tables, run->table_count, sizeof(*run->tables), compare_tables);
	for (size_t i = 0; i < run->table_count; i++)
		tables[i] = run->tables[i].offset;
	if (run->table_count > 0)
		qsort(run->tables, run->table_count, sizeof(*run->tables), compare_index);
	pthread_mutex_lock(&q->lock);
	free(q->tables);
	q->tables = tables;
	q->table_count = q->table_room = run->table_count;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

/* --- pass 2: clusters ------------------------------------------------------------------------- */

/* One entry for data, valid or not; *entry may change. */
static int check_l2_entry_co(struct run *run, uint64_t cluster, uint64_t *entry)
{
	struct qed *q = run->q;
	struct ox_image_check *check = run->check;
	bool valid, repair;
	uint64_t copy;
	int rc;

	pthread_mutex_lock(&q->lock);
	valid = is_valid(run, *entry, q->cluster_size) &&
	        !qed_touches_table(q, *entry, q->cluster_size);
	pthread_mutex_unlock(&q->lock);
	if (!valid) {
		say(run, "%s: cluster %" PRIu64 " is at %#" PRIx64 ", which is no place for data",
		    check->fix_errors ? "Repairing" : "ERROR", cluster, *entry);
		if (!check->fix_errors) {
			check->corruptions++;
			return 0;
		}
		check->corruptions_fixed++;
		*entry = QED_UNALLOCATED;
		return 0;
	}
	if (!is_used(run, *entry, q->cluster_size)) {
		use(run, *entry, q->cluster_size);
		return 0;
	}
	repair = run->copy_left >= q->cluster_size;
	say(run, "%s: cluster %" PRIu64 " is at %#" PRIx64 ", which is already in use",
	    repair ? "Repairing" : "ERROR", cluster, *entry);
	if (!repair) {
		check->corruptions++;
		return 0;
	}
	rc = copy_co(run, *entry, q->cluster_size, &copy);
	if (rc < 0)
		return rc;
	check->corruptions_fixed++;
	*entry = copy;
	return 0;
}

/* run->bytes: a block of a table that begins at guest cluster `first`. */
static int check_block_co(struct run *run, uint64_t first, uint64_t at, uint64_t *last)
{
	struct qed *q = run->q;
	struct ox_image_check *check = run->check;
	bool changed = false;
	int rc;

	for (uint32_t i = 0; i < q->block_entries; i++) {
		uint64_t was = ox_get_le64(run->bytes + i * sizeof(uint64_t));
		uint64_t entry = was;

		if (was <= QED_ZERO)
			continue;
		check->allocated_clusters++;
		check->fragmented_clusters += *last && *last + q->cluster_size != was;
		*last = was;
		rc = check_l2_entry_co(run, first + i, &entry);
		if (rc < 0)
			return rc;
		if (entry == was)
			continue;
		ox_put_le64(run->bytes + i * sizeof(uint64_t), entry);
		qed_patch_l2(q, first + i, entry);
		changed = true;
	}
	return changed ? write_table_co(run, at) : 0;
}

struct status_call {
	struct ox_store *store;
	uint64_t offset, length;
	enum ox_block_status status;
};

static int status_in_worker(void *arg)
{
	struct status_call *call = arg;

	return ox_store_status(call->store, call->offset, &call->length, &call->status);
}

/* How much of [at, end) the file does not hold, in whole blocks: a table can be 1 GiB of nothing.
 */
static uint64_t skip_hole_co(struct run *run, uint64_t at, uint64_t end)
{
	struct status_call call = {
	        .store = run->channel->image->store, .offset = at, .length = end - at};

	if (ox_worker_call_co(status_in_worker, &call) < 0 || call.status == OX_STATUS_DATA)
		return 0;
	return ox_align_down(call.length, run->q->block_bytes);
}

static int check_table_co(struct run *run, const struct found_table *table)
{
	struct qed *q = run->q;
	uint64_t first = table->index << q->table_shift;
	uint64_t end = table->offset + q->table_bytes, at = table->offset;
	uint64_t last = 0;
	int rc;

	while (at < end) {
		uint64_t hole = q->table_bytes > q->block_bytes ? skip_hole_co(run, at, end) : 0;

		if (hole == 0) {
			rc = ox_store_read_co(run->channel->store, at, run->bytes, q->block_bytes);
			if (rc == 0)
				rc = check_block_co(run, first, at, &last);
			if (rc < 0)
				return rc;
			hole = q->block_bytes;
		}
		at += hole;
		first += hole / sizeof(uint64_t);
	}
	return 0;
}

/* --- the whole -------------------------------------------------------------------------------- */

static int start_run(struct run *run, struct ox_error *err)
{
	struct qed *q = run->q;
	const char *path = run->channel->image->store->path;
	void *map;

	pthread_mutex_lock(&q->lock);
	run->clusters = q->end >> q->cluster_shift;
	pthread_mutex_unlock(&q->lock);
	if (run->clusters > MAX_CLUSTERS) {
		ox_error_set(err, EFBIG, "%s: has too many clusters to be checked (%" PRIu64 ")",
		             path, run->clusters);
		return -EFBIG;
	}
	run->bytes = aligned_alloc(4096, q->block_bytes);
	map = mmap(NULL, run->clusters / 8 + sizeof(uint64_t), PROT_READ | PROT_WRITE,
	           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	run->used = map == MAP_FAILED ? NULL : map;
	if (!run->bytes || !run->used) {
		ox_error_set(err, ENOMEM, "%s: not enough memory to check it", path);
		return -ENOMEM;
	}
	use(run, 0, (uint64_t)q->header.header_size << q->cluster_shift);
	use(run, q->header.l1_offset, q->table_bytes);
	return 0;
}

static void end_run(struct run *run)
{
	if (run->used)
		munmap(run->used, run->clusters / 8 + sizeof(uint64_t));
	free(run->bytes);
	free(run->tables);
}

/* Leaks: counted, and cut off at the file's end. */
static int check_leaks_co(struct run *run)
{
	struct qed *q = run->q;
	struct ox_image_check *check = run->check;
	uint64_t end = run->clusters << q->cluster_shift;
	uint64_t tail = run->used_end < end ? (end - run->used_end) >> q->cluster_shift : 0;
	int rc;

	check->leaks = run->clusters - run->used_count;
	/* While the image is in use its end is not what the file's is. */
	if (!check->fix_leaks || tail == 0 || q->begun)
		return 0;
	rc = ox_store_truncate_co(run->channel->image->store, run->used_end, OX_PREALLOC_OFF, NULL);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	q->end = q->grown = run->used_end;
	pthread_mutex_unlock(&q->lock);
	check->leaks -= tail;
	check->leaks_fixed += tail;
	run->changed = true;
	return 0;
}

static int scan_co(struct run *run)
{
	struct ox_image_check *check = run->check;
	int rc = find_tables_co(run);

	if (rc == 0)
		rc = take_over_tables(run);
	for (size_t i = 0; i < run->table_count && rc == 0; i++) {
		rc = check_table_co(run, &run->tables[i]);
		if (check->progress)
			check->progress(check->arg, i + 1, run->table_count);
	}
	if (rc == 0)
		rc = check_leaks_co(run);
	if (rc == 0 && run->changed)
		rc = qed_flush_co(run->channel);
	return rc;
}

static int run_check_co(struct ox_image_channel *channel, struct ox_image_check *check, bool copy,
                        struct ox_error *err)
{
	struct qed *q = qed_of(channel);
	struct run run = {.channel = channel, .q = q, .check = check};
	int rc = start_run(&run, err);

	if (copy)
		run.copy_left = run.clusters << q->cluster_shift;
	if (rc == 0) {
		check->total_clusters = q->header.image_size >> q->cluster_shift;
		check->total_clusters += !ox_is_aligned(q->header.image_size, q->cluster_size);
		rc = scan_co(&run);
		if (rc < 0) {
			check->check_errors++;
			ox_error_set(err, -rc, "%s: the check was broken off: %s",
			             channel->image->store->path, strerror(-rc));
		}
	}
	end_run(&run);
	return rc;
}

/* Nothing is wrong any more. */
static int take_mark_off_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);

	qed_set_unchecked(q, false);
	__atomic_store_n(&q->damaged, false, __ATOMIC_RELAXED);
	if (!(q->header.features & QED_F_NEED_CHECK) || q->begun)
		return 0;
	q->header.features &= ~(uint64_t)QED_F_NEED_CHECK;
	return qed_write_header_co(channel);
}

int qed_check_co(struct ox_image_channel *channel, struct ox_image_check *check,
                 struct ox_error *err)
{
	const struct ox_image *image = channel->image;
	int rc;

	if ((check->fix_errors || check->fix_leaks) && image->read_only)
		return ox_error_set(err, EROFS, "%s: opened read-only, it cannot be repaired",
		                    image->store->path);
	rc = run_check_co(channel, check, check->fix_errors, err);
	if (rc < 0)
		return rc;
	if (!check->fix_errors || check->corruptions > 0)
		return 0;
	rc = take_mark_off_co(channel);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot write the header: %s", image->store->path,
		                    strerror(-rc));
	return 0;
}

int qed_repair_mark_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct qed *q = qed_of(channel);
	struct ox_image_check check = {.fix_leaks = true, .fix_errors = true};
	const char *path = channel->image->store->path;
	int rc = run_check_co(channel, &check, false, err);

	if (rc < 0)
		return rc;
	if (check.corruptions > 0) {
		qed_set_unchecked(q, false);
		qed_damaged(q, "clusters or tables are in use twice (%" PRIu64 ")",
		            check.corruptions);
		return 0;
	}
	rc = take_mark_off_co(channel);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot write the header: %s", path,
		                    strerror(-rc));
	ox_log(OX_LOG_INFO,
	       "%s: was not closed cleanly; checked: %" PRIu64
	       " entries that were lost and %" PRIu64 " clusters at the file's end removed",
	       path, check.corruptions_fixed, check.leaks_fixed);
	return 0;
}
