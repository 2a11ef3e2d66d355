/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Another virtual size.
 *
 * Growing: the L1 table gets its entries first.  If its clusters have no room for them, a longer
 * copy of it is written and made durable, and then one sector of the header names it; while that
 * happens no commit runs, so that none can make an entry durable in the table that is on its way
 * out.  The old table's clusters are given back after the next commit.  Then the data file, then
 * the size in the header.  The new range reads as zero: what the last cluster has behind the old
 * end is overwritten, what a longer backing image has there the generic layer hides.
 *
 * Shrinking: the part of the last cluster behind the new end is zeroed, what lies behind is
 * discarded, then the header, then the data file.
 *
 * Requests within the smaller of both sizes may be in flight; nothing else is.
 */
#include "image/qcow2/qcow2.h"
#include "base/byteorder.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>

#define ZERO_BYTES (1u << 20)
/* Another table was entered in L1 while it was being copied: next try. */
#define TRIES 1000u

struct resize {
	struct ox_image_channel *channel;
	struct qcow2 *q;
	uint64_t old_size, size;
	enum ox_preallocation prealloc;
	struct ox_error *err;
};

static int failed(const struct resize *r, const char *what, int rc)
{
	return ox_error_set(r->err, -rc, "%s: cannot be resized: %s: %s",
	                    r->channel->image->store->path, what, strerror(-rc));
}

static uint64_t l1_entries_for(const struct qcow2 *q, uint64_t size)
{
	uint64_t per_table = q->cluster_size / q->entry_bytes;
	uint64_t clusters = qcow2_file_clusters(q, size);

	return (clusters + per_table - 1) / per_table;
}

/* --- L1 -----------------------------------------------------------------------------------------
 */

/* What is in L1 now, in the file's order; `bytes` long, zeroes behind. */
static uint8_t *copy_l1(struct qcow2 *q, uint64_t bytes)
{
	uint8_t *copy = aligned_alloc(4096, ox_align_up(bytes, 4096));

	if (!copy)
		return NULL;
	memset(copy, 0, ox_align_up(bytes, 4096));
	pthread_mutex_lock(&q->lock);
	for (uint32_t i = 0; i < q->l1_entries; i++)
		ox_put_be64(copy + (size_t)i * 8, qcow2_l1_get(q, i));
	pthread_mutex_unlock(&q->lock);
	return copy;
}

/* The table in the file, as long as it will be.  In its old place only what is new is written. */
static int write_l1_co(struct ox_image_channel *channel, uint64_t offset, uint64_t bytes)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t skip = offset == q->header.l1_offset ? (uint64_t)q->l1_entries * 8 : 0;
	uint8_t *copy = copy_l1(q, bytes);
	int rc;

	if (!copy)
		return -ENOMEM;
	rc = ox_store_write_co(channel->store, offset + skip, copy + skip, bytes - skip, 0);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	free(copy);
	return rc;
}

/* Commits are paused.  -EAGAIN: L1 has changed meanwhile. */
static int switch_l1_co(struct ox_image_channel *channel, uint64_t offset, uint32_t entries)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_header *h = &q->header;
	uint64_t old_offset = h->l1_offset;
	uint32_t old_entries = h->l1_entries;
	int rc = write_l1_co(channel, offset, (uint64_t)entries * 8);

	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	h->l1_offset = offset;
	h->l1_entries = entries;
	/* It refuses while L1 is dirty.  If it is clean, it has not changed since it was copied:
	 * nobody could have cleaned it. */
	rc = qcow2_units_grow(q, entries);
	if (rc < 0) {
		h->l1_offset = old_offset;
		h->l1_entries = old_entries;
	}
	pthread_mutex_unlock(&q->lock);
	if (rc < 0)
		return rc;
	rc = qcow2_write_header_co(channel);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	/* Which of both tables the file names is not known: neither may be changed any more. */
	if (rc < 0 && !__atomic_exchange_n(&q->corrupt, true, __ATOMIC_ACQ_REL))
		ox_log(OX_LOG_ERROR,
		       "%s: its header could not be written (%s); nothing is written any more "
		       "before it is opened anew",
		       channel->image->store->path, strerror(-rc));
	return rc;
}

static int move_l1_co(struct ox_image_channel *channel, uint64_t offset, uint32_t entries)
{
	struct qcow2 *q = channel->image->priv;
	int rc = -EAGAIN;

	for (unsigned i = 0; i < TRIES && rc == -EAGAIN; i++) {
		rc = qcow2_commit_co(channel);
		if (rc < 0)
			break;
		qcow2_commit_pause_co(channel);
		rc = switch_l1_co(channel, offset, entries);
		qcow2_commit_resume(q);
	}
	return rc == -EAGAIN ? -EBUSY : rc;
}

static int grow_l1_co(struct resize *r)
{
	struct ox_image_channel *channel = r->channel;
	struct qcow2 *q = r->q;
	uint64_t entries = l1_entries_for(q, r->size), old_offset = q->header.l1_offset, offset;
	uint64_t old_bytes = qcow2_file_clusters(q, (uint64_t)q->header.l1_entries * 8)
	                     << q->cluster_bits;
	uint64_t clusters = qcow2_file_clusters(q, entries * 8);
	int rc;

	if (entries <= q->header.l1_entries)
		return 0;
	if (entries * 8 <= old_bytes)
		return move_l1_co(channel, old_offset, (uint32_t)entries);
	rc = qcow2_alloc_metadata_co(channel, clusters, &offset);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	qcow2_add_metadata_range(q, offset, clusters << q->cluster_bits);
	pthread_mutex_unlock(&q->lock);
	rc = move_l1_co(channel, offset, (uint32_t)entries);
	pthread_mutex_lock(&q->lock);
	if (rc == 0 && old_bytes) {
		qcow2_remove_metadata_range(q, old_offset, old_bytes);
		qcow2_free_later(channel, old_offset, old_bytes);
	} else if (rc < 0 && q->header.l1_offset != offset) {
		qcow2_remove_metadata_range(q, offset, clusters << q->cluster_bits);
		qcow2_free_later(channel, offset, clusters << q->cluster_bits);
	}
	pthread_mutex_unlock(&q->lock);
	return rc;
}

/* --- the rest
 * ------------------------------------------------------------------------------------- */

static int write_size_co(struct ox_image_channel *channel, uint64_t size)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t old = q->header.size;
	int rc;

	pthread_mutex_lock(&q->lock);
	q->header.size = size;
	pthread_mutex_unlock(&q->lock);
	rc = qcow2_write_header_co(channel);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	if (rc < 0) {
		pthread_mutex_lock(&q->lock);
		q->header.size = old;
		pthread_mutex_unlock(&q->lock);
	}
	return rc;
}

/* A device has a number and no inode, and what is behind its end now may be anything. */
static bool is_device(const struct ox_store *store)
{
	return store->dev != 0 && store->ino == 0;
}

static int write_zeroes_co(struct resize *r, uint64_t from)
{
	uint8_t *zeroes = aligned_alloc(4096, ZERO_BYTES);
	int rc = 0;

	if (!zeroes)
		return -ENOMEM;
	memset(zeroes, 0, ZERO_BYTES);
	for (uint64_t at = from; at < r->size && rc == 0; at += ZERO_BYTES)
		rc = ox_image_write_co(r->channel, at, zeroes,
		                       (size_t)ox_min(r->size - at, (uint64_t)ZERO_BYTES), 0);
	free(zeroes);
	return rc;
}

/* The tables of a raw data file say for every cluster what is in the file without them: data.  The
 * new part of the file is zero. */
static int map_data_file_co(struct resize *r, uint64_t from)
{
	while (from < r->size) {
		struct ox_allocation a = {.offset = from, .length = r->size - from};
		int rc = qcow2_prepare_co(r->channel, &a);

		if (rc == 0)
			rc = qcow2_publish_co(r->channel, &a);
		if (rc < 0)
			return rc;
		from = a.offset + a.length;
	}
	return 0;
}

/* The image has its new size, which nobody else knows yet. */
static int fill_new_part_co(struct resize *r)
{
	struct ox_image *image = r->channel->image;
	uint64_t edge = ox_min(ox_align_up(r->old_size, r->q->cluster_size), r->size);
	int rc = 0;

	/* A full cluster of file space, also for falloc: the map leads all over the file. */
	if (r->prealloc != OX_PREALLOC_OFF)
		return write_zeroes_co(r, r->old_size);
	if (edge > r->old_size)
		rc = ox_image_request_co(r->channel, OX_IO_ZERO, r->old_size, edge - r->old_size,
		                         0);
	if (rc == 0 && image->data_file_raw)
		rc = is_device(image->data) ? write_zeroes_co(r, edge) : map_data_file_co(r, edge);
	return rc;
}

static int grow_co(struct resize *r)
{
	struct ox_image *image = r->channel->image;
	int rc = grow_l1_co(r);

	if (rc < 0)
		return failed(r, "its L1 table cannot grow", rc);
	if (r->q->data_file) {
		rc = ox_store_truncate_co(image->data, r->size, OX_PREALLOC_OFF, r->err);
		if (rc < 0)
			return rc;
	}
	__atomic_store_n(&image->size, r->size, __ATOMIC_RELEASE);
	rc = fill_new_part_co(r);
	if (rc == 0)
		rc = ox_image_hide_backing_co(r->channel, r->old_size, r->size);
	/* Entries of the new part may be in the file before the size is, not behind it. */
	if (rc == 0)
		rc = qcow2_commit_co(r->channel);
	if (rc == 0)
		rc = write_size_co(r->channel, r->size);
	if (rc < 0) {
		__atomic_store_n(&image->size, r->old_size, __ATOMIC_RELEASE);
		return failed(r, "the new part cannot be prepared", rc);
	}
	return 0;
}

static int shrink_co(struct resize *r)
{
	struct ox_image *image = r->channel->image;
	uint64_t edge = ox_min(ox_align_up(r->size, r->q->cluster_size), r->old_size);
	int rc = 0;

	if (edge > r->size)
		rc = ox_image_request_co(r->channel, OX_IO_ZERO, r->size, edge - r->size, 0);
	if (rc == 0 && edge < r->old_size)
		rc = ox_image_request_co(r->channel, OX_IO_DISCARD, edge, r->old_size - edge, 0);
	if (rc == 0)
		rc = qcow2_commit_co(r->channel);
	if (rc == 0)
		rc = write_size_co(r->channel, r->size);
	if (rc < 0)
		return failed(r, "what lies behind the new end cannot be dropped", rc);
	if (r->q->data_file && !is_device(image->data)) {
		struct ox_error err = {0};

		if (ox_store_truncate_co(image->data, r->size, OX_PREALLOC_OFF, &err) < 0)
			ox_log(OX_LOG_WARNING, "%s", err.text);
	}
	return 0;
}

static int check_snapshots(const struct resize *r)
{
	const struct qcow2 *q = r->q;

	/* Only the extra data of version 3 says how large the disk was. */
	for (uint32_t i = 0; q->snapshots && i < q->header.snapshot_count; i++) {
		if (q->header.version < 3 || q->snapshots[i].extra_bytes < 16)
			return ox_error_set(
			        r->err, ENOTSUP,
			        "%s: its internal snapshots do not say how large the disk "
			        "was; delete them, then resize it",
			        r->channel->image->store->path);
	}
	return 0;
}

int qcow2_resize_co(struct ox_image_channel *channel, uint64_t size, enum ox_preallocation prealloc,
                    struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = image->priv;
	struct resize r = {.channel = channel,
	                   .q = q,
	                   .old_size = __atomic_load_n(&image->size, __ATOMIC_ACQUIRE),
	                   .size = size,
	                   .prealloc = prealloc,
	                   .err = err};
	int rc;

	if (size == r.old_size)
		return 0;
	if (__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
		return failed(&r, "it is damaged", -EIO);
	if (size > INT64_MAX || l1_entries_for(q, size) > QCOW2_MAX_L1_BYTES / 8)
		return ox_error_set(err, EFBIG,
		                    "%s: %llu bytes are too many for clusters of %u bytes",
		                    image->store->path, (unsigned long long)size, q->cluster_size);
	rc = check_snapshots(&r);
	if (rc < 0)
		return rc;
	if (size < r.old_size && prealloc != OX_PREALLOC_OFF)
		return ox_error_set(err, EINVAL, "%s: a disk that shrinks cannot be preallocated",
		                    image->store->path);
	/* Bitmaps are as long as the disk. */
	rc = qcow2_mark_bitmaps_co(channel, true);
	if (rc < 0)
		return failed(&r, "its bitmaps cannot be marked", rc);
	return size > r.old_size ? grow_co(&r) : shrink_co(&r);
}
