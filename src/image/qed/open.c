/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * qed images: opening, the first change, and the end.
 *
 *   clean ──begin_co: mark durable──> begun ──finish_co: all durable, mark off──> clean
 *     ^                                 │ the process or the host dies
 *     └──open_co or begin_co: repair────┴──> "need check" is found
 *
 * Invariants:
 *   - the mark is in the file, durably, whenever the file differs from what was durable at the last
 *     clean end.
 *   - a mark that was found goes only after a check that left nothing wrong.
 *   - a damaged map is read, never written: the mark stays for whoever repairs it.
 *   - unknown autoclear features are gone before the first change.
 */
#include "image/qed/qed.h"
#include "base/byteorder.h"
#include <errno.h>
#include <oxbow/log.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int qed_damaged(struct qed *q, const char *fmt, ...)
{
	const struct ox_image *image = q->image;
	char why[256];
	va_list args;

	__atomic_store_n(&q->damaged, true, __ATOMIC_RELAXED);
	if (image->read_only || image->options.for_check ||
	    __atomic_exchange_n(&q->damage_said, true, __ATOMIC_RELAXED))
		return -EIO;
	va_start(args, fmt);
	vsnprintf(why, sizeof(why), fmt, args);
	va_end(args);
	ox_log(OX_LOG_ERROR,
	       "%s: the qed image is damaged: %s; it is read from now on and not written any more; "
	       "'oxbow check -r all' repairs it",
	       image->store->path, why);
	return -EIO;
}

static int qed_probe(const void *head, size_t bytes, const char *path)
{
	return bytes >= QED_HEADER_BYTES && ox_get_le32(head) == QED_MAGIC ? 100 : 0;
}

/* --- the header ------------------------------------------------------------------------------- */

int qed_write_header_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);
	uint8_t bytes[QED_HEADER_BYTES];
	int rc;

	qed_header_encode(&q->header, bytes);
	rc = ox_store_write_co(channel->store, 0, bytes, sizeof(bytes), 0);
	return rc < 0 ? rc : qed_flush_co(channel);
}

static int read_header_co(struct ox_image_channel *channel, struct qed *q, struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qed_header *h = &q->header;
	uint64_t file_bytes = __atomic_load_n(&image->store->size, __ATOMIC_RELAXED);
	const char *path = image->store->path;
	uint8_t head[QED_HEADER_BYTES];
	char *name;
	int rc;

	if (file_bytes < sizeof(head))
		return ox_error_set(err, EINVAL, "%s: is not a qed image", path);
	rc = ox_store_read_co(channel->store, 0, head, sizeof(head));
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read the header: %s", path,
		                    strerror(-rc));
	rc = qed_header_parse(head, sizeof(head), file_bytes, path, h, err);
	if (rc < 0 || !(h->features & QED_F_BACKING_FILE))
		return rc;
	name = ox_xcalloc(1, h->backing_bytes + 1);
	rc = ox_store_read_co(channel->store, h->backing_offset, name, h->backing_bytes);
	if (rc == 0 && strlen(name) == h->backing_bytes) {
		image->backing_file = name;
		if (h->features & QED_F_NO_PROBE)
			image->backing_format = ox_xstrdup("raw");
		return 0;
	}
	free(name);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read the backing file's name: %s", path,
		                    strerror(-rc));
	return ox_error_set(err, EINVAL, "%s: the backing file's name contains a zero byte", path);
}

/* --- opening ---------------------------------------------------------------------------------- */

static void free_qed(struct qed *q)
{
	qed_map_free(q);
	pthread_mutex_destroy(&q->lock);
	free(q);
}

static struct qed *new_qed(struct ox_image *image)
{
	struct qed *q = ox_xcalloc(1, sizeof(*q));

	q->image = image;
	pthread_mutex_init(&q->lock, NULL);
	LIST_INIT(&q->new_tables);
	qed_rounds_init(&q->growing);
	qed_rounds_init(&q->flushing);
	return q;
}

static void set_geometry(struct qed *q)
{
	const struct qed_header *h = &q->header;

	q->cluster_size = h->cluster_size;
	q->cluster_shift = (unsigned)__builtin_ctz(h->cluster_size);
	q->table_bytes = qed_table_bytes(h);
	q->table_shift = (unsigned)__builtin_ctzll(q->table_bytes / sizeof(uint64_t));
	q->block_bytes = (uint32_t)ox_min(q->table_bytes, (uint64_t)QED_BLOCK_MAX);
	q->block_entries = q->block_bytes / sizeof(uint64_t);
	q->block_shift = (unsigned)__builtin_ctz(q->block_entries);
	q->end = q->grown = ox_align_down(__atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED),
	                                  q->cluster_size);
}

static bool is_locked_for_writing(const struct ox_image *image)
{
	enum ox_lock_mode lock = image->store->options.lock;

	return !image->read_only && !image->store->options.read_only &&
	       (lock == OX_LOCK_WRITE || lock == OX_LOCK_SHARED_WRITE);
}

static int qed_open_co(struct ox_image_channel *channel, const struct ox_image_options *options,
                       struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qed *q = new_qed(image);
	int rc;

	/* From here on close() frees it. */
	image->priv = q;
	rc = read_header_co(channel, q, err);
	if (rc < 0)
		return rc;
	set_geometry(q);
	image->size = q->header.image_size;
	image->cluster_size = image->zero_unit = q->cluster_size;
	qed_set_unchecked(q, (q->header.features & QED_F_NEED_CHECK) != 0);
	rc = qed_map_init_co(channel,
	                     options->metadata_cache ? options->metadata_cache : OX_METADATA_CACHE,
	                     err);
	if (rc < 0)
		return rc;
	if (qed_is_unchecked(q) && !options->for_check && is_locked_for_writing(image))
		rc = qed_repair_mark_co(channel, err);
	return rc;
}

static void qed_close(struct ox_image *image)
{
	if (image->priv)
		free_qed(image->priv);
	image->priv = NULL;
}

/* --- writing ---------------------------------------------------------------------------------- */

/* The file ends with a whole cluster from now on (qed_spec: what follows the last one may not be
 * preserved). */
static int find_end_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);
	struct ox_store *store = channel->image->store;
	uint64_t size = __atomic_load_n(&store->size, __ATOMIC_RELAXED);
	uint64_t end = ox_align_down(size, q->cluster_size);
	int rc = 0;

	if (end < size)
		rc = ox_store_truncate_co(store, end, OX_PREALLOC_OFF, NULL);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	q->end = q->grown = end;
	q->spare_count = 0;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

static int qed_begin_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);
	struct ox_error err = {0};
	int rc = 0;

	if (qed_is_unchecked(q))
		rc = qed_repair_mark_co(channel, &err);
	if (rc < 0) {
		ox_log(OX_LOG_ERROR, "%s", err.text);
		return rc;
	}
	if (qed_is_damaged(q))
		return -EIO;
	rc = find_end_co(channel);
	if (rc < 0)
		return rc;
	q->header.features |= QED_F_NEED_CHECK;
	q->header.autoclear_features = 0;
	rc = qed_write_header_co(channel);
	q->begun = rc == 0;
	return rc;
}

/* Cuts off what was taken ahead and never used. */
static int cut_surplus_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);
	uint64_t end;
	bool surplus;
	int rc;

	pthread_mutex_lock(&q->lock);
	for (unsigned i = 0; i < q->spare_count; i++) {
		if (q->spare[i] + q->cluster_size != q->end)
			continue;
		q->end = q->spare[i];
		q->spare[i] = q->spare[--q->spare_count];
		i = UINT32_MAX; /* another one may be the last now */
	}
	end = q->end;
	surplus = q->grown > end;
	pthread_mutex_unlock(&q->lock);
	if (!surplus)
		return 0;
	rc = ox_store_truncate_co(channel->image->store, end, OX_PREALLOC_OFF, NULL);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	q->grown = end;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

static int qed_commit_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);
	uint64_t published;
	int rc;

	pthread_mutex_lock(&q->lock);
	published = q->published;
	pthread_mutex_unlock(&q->lock);
	rc = qed_flush_co(channel);
	pthread_mutex_lock(&q->lock);
	if (rc == 0 && q->published == published)
		__atomic_store_n(&q->image->metadata_dirty, false, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&q->lock);
	return rc;
}

static int qed_finish_co(struct ox_image_channel *channel)
{
	struct qed *q = qed_of(channel);
	int rc;

	if (!q->begun)
		return 0;
	rc = cut_surplus_co(channel);
	if (rc == 0)
		rc = qed_commit_co(channel);
	if (rc < 0)
		return rc;
	/* What is not as it should be is for the next open to look at. */
	if (q->table_unsure || qed_is_damaged(q))
		return 0;
	q->header.features &= ~(uint64_t)QED_F_NEED_CHECK;
	rc = qed_write_header_co(channel);
	if (rc < 0)
		return rc;
	/* Should there be another change, it begins anew. */
	q->begun = false;
	__atomic_store_n(&channel->image->begun, false, __ATOMIC_RELEASE);
	return 0;
}

const struct ox_format_ops ox_format_qed = {
        .name = "qed",
        .probe = qed_probe,
        .open_co = qed_open_co,
        .close = qed_close,
        .lookup = qed_lookup,
        .map_co = qed_map_co,
        .begin_co = qed_begin_co,
        .prepare_co = qed_prepare_co,
        .publish_co = qed_publish_co,
        .abort = qed_abort,
        .zero_co = qed_zero_co,
        .commit_co = qed_commit_co,
        .finish_co = qed_finish_co,
        .maintenance = &qed_maintenance,
};
