/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the header says while an image is being written.
 *
 * Before the first change (begin), durable before anything else is written:
 *   - autoclear bits that we do not know are cleared, as the specification demands;
 *   - enabled bitmaps are marked "in use", because they will not follow;
 *   - the extension "session" gets a new random identity.  As long as it is there, clusters may be
 *     counted and not referred to, and the record in the run directory (record.c) belongs to this
 *     image.  The autoclear bit beside it falls as soon as any other program writes.
 * At the end (finish) the order is the other way round: the map, the refcounts, then the header
 * without its marks, each durable before the next; then the file loses what lies behind its last
 * used cluster.  What fails leaves the marks in place, and the next writer looks for leaks.
 *
 * An image whose first cluster has no room for the extension (512-byte clusters with long names) is
 * written without: every change is committed before its request ends, and what a crash leaves
 * allocated is found by check only.
 */
#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>
#include <sys/random.h>

#define AUTOCLEAR_KNOWN (QCOW2_AUTOCLEAR_BITMAPS | QCOW2_AUTOCLEAR_DATA_RAW)

static int new_session(uint8_t *session, size_t bytes)
{
	ssize_t got;

	do
		got = getrandom(session, bytes, 0);
	while (got < 0 && errno == EINTR);
	return got == (ssize_t)bytes ? 0 : -EIO;
}

/* Does the header with the extension still fit?  Lock held. */
static bool header_fits(const struct qcow2 *q)
{
	OX_FREE uint8_t *out = malloc(q->cluster_size);

	return out && qcow2_header_encode(&q->header, out, q->cluster_size) == 0;
}

/* Lock held. */
static void mark_session(struct qcow2 *q, const uint8_t session[16])
{
	struct qcow2_header *h = &q->header;

	h->autoclear &= AUTOCLEAR_KNOWN;
	/* The specification calls the bit without any bitmaps an error. */
	if (h->bitmap_count == 0)
		h->autoclear &= ~QCOW2_AUTOCLEAR_BITMAPS;
	qcow2_header_set_extension(h, QCOW2_EXT_SESSION, session, 16);
	q->image->eager = !header_fits(q);
	if (q->image->eager) {
		qcow2_header_set_extension(h, QCOW2_EXT_SESSION, NULL, 0);
		return;
	}
	if (h->version >= 3)
		h->autoclear |= QCOW2_AUTOCLEAR_SESSION;
}

/* A file that ends within a cluster gets the rest of it, so that it can be written in place. */
static int complete_last_cluster_co(struct ox_image_channel *channel)
{
	struct ox_store *store = channel->image->store;
	const struct qcow2 *q = channel->image->priv;
	uint64_t size = __atomic_load_n(&store->size, __ATOMIC_RELAXED);
	struct ox_error err = {0};
	int rc;

	if (ox_is_aligned(size, q->cluster_size) || !store->ops->truncate ||
	    (store->dev != 0 && store->ino == 0))
		return 0;
	rc = ox_store_truncate_co(store, ox_align_up(size, q->cluster_size), OX_PREALLOC_OFF, &err);
	if (rc < 0)
		ox_log(OX_LOG_ERROR, "%s", err.text);
	return rc;
}

int qcow2_begin_co(struct ox_image_channel *channel)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = image->priv;
	uint8_t session[16];
	bool unclean;
	int rc;

	if (__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
		return -EIO;
	/* Opened to be looked at: others may have it. */
	if (image->store->options.lock != OX_LOCK_WRITE)
		return -EROFS;
	/* What a killed process left must be in the file before its record goes. */
	if (__atomic_load_n(&image->metadata_dirty, __ATOMIC_ACQUIRE)) {
		rc = qcow2_commit_co(channel);
		if (rc < 0)
			return rc;
	}
	rc = new_session(session, sizeof(session));
	if (rc == 0)
		rc = complete_last_cluster_co(channel);
	if (rc < 0)
		return rc;
	qcow2_record_end(q);
	rc = qcow2_mark_bitmaps_co(channel, false);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	unclean = q->header.has_session;
	mark_session(q, session);
	pthread_mutex_unlock(&q->lock);
	rc = qcow2_write_header_co(channel);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	if (rc < 0)
		return rc;
	if (!q->image->eager) {
		rc = qcow2_record_begin(q);
		if (rc < 0) {
			ox_log(OX_LOG_WARNING,
			       "%s: cannot keep a record of its map in the run directory (%s): every "
			       "change is written at once, which is slower",
			       image->store->path, strerror(-rc));
			q->image->eager = true;
		}
	}
	if (unclean)
		qcow2_start_leak_scan(channel);
	return 0;
}

static int clear_marks_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	int rc;

	pthread_mutex_lock(&q->lock);
	qcow2_header_set_extension(&q->header, QCOW2_EXT_SESSION, NULL, 0);
	q->header.autoclear &= ~QCOW2_AUTOCLEAR_SESSION;
	pthread_mutex_unlock(&q->lock);
	rc = qcow2_write_header_co(channel);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	return rc;
}

/* Nothing was written, but whoever wrote before did not close it: this is the time to. */
static bool is_left_unclean(const struct ox_image *image)
{
	const struct qcow2 *q = image->priv;

	return q->header.has_session && image->store->options.lock == OX_LOCK_WRITE &&
	       !image->read_only && !image->options.for_check &&
	       !__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED);
}

int qcow2_finish_co(struct ox_image_channel *channel)
{
	struct ox_image *image = channel->image;
	struct ox_store *store = image->store;
	struct qcow2 *q = image->priv;
	uint64_t end = 0;
	int rc;

	if (!__atomic_load_n(&image->begun, __ATOMIC_ACQUIRE)) {
		if (!is_left_unclean(image))
			return 0;
		rc = qcow2_begin_co(channel);
		if (rc < 0)
			return rc;
		__atomic_store_n(&image->begun, true, __ATOMIC_RELEASE);
	}
	if (__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
		return -EIO;
	rc = qcow2_commit_co(channel);
	if (rc == 0)
		rc = qcow2_alloc_finish_co(channel, &end);
	/* The refcounts of what was given back. */
	if (rc == 0)
		rc = qcow2_commit_co(channel);
	if (rc == 0)
		rc = clear_marks_co(channel);
	if (rc < 0)
		return rc;
	qcow2_record_end(q);
	__atomic_store_n(&image->begun, false, __ATOMIC_RELEASE);
	/* A device keeps its size.  A tail that stays is nobody's, and does no harm. */
	if (end < __atomic_load_n(&store->size, __ATOMIC_RELAXED) && store->ops->truncate) {
		struct ox_error err = {0};

		if (ox_store_truncate_co(store, end, OX_PREALLOC_OFF, &err) < 0)
			ox_log(OX_LOG_WARNING, "%s", err.text);
	}
	return 0;
}
