/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Opening qcow2 images, and the table of what the driver does.
 *
 * Opening reads; it writes only where the image must be repaired before use (the dirty bit of lazy
 * refcounts) and the store is locked for writing.  What an image says about where its tables are is
 * checked against the file's size here, once; what the tables themselves say is checked by those
 * who read them.
 *
 * The header in the file is written by qcow2_write_header_co() only, one write at a time.  A power
 * cut may leave a part of such a write behind, sector by sector.  That is harmless because nothing
 * in the header moves: extensions come and go at the end of their list, and what does not fit
 * before the backing file's name moves that name first, in steps that each are one sector.
 */
#include "image/qcow2/qcow2.h"
#include "base/byteorder.h"
#include "base/fiber.h"
#include "image/crypto.h"
#include <errno.h>
#include <oxbow/log.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define FIRST_READ  (64u << 10)
#define HEADER_TAIL (64u << 10) /* the header is written at least up to here */

static int qcow2_probe(const void *head, size_t bytes, const char *path)
{
	const uint8_t *data = head;

	/* Versions to come are qcow2's too: opening says which there are. */
	return bytes >= 8 && ox_get_be32(data) == QCOW2_MAGIC && ox_get_be32(data + 4) >= 2 ? 100
	                                                                                    : 0;
}

int qcow2_read_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes)
{
	uint64_t size = __atomic_load_n(&channel->store->store->size, __ATOMIC_RELAXED);
	size_t inside = offset < size ? (size_t)ox_min((uint64_t)bytes, size - offset) : 0;

	memset((uint8_t *)buf + inside, 0, bytes - inside);
	return inside ? ox_store_read_co(channel->store, offset, buf, inside) : 0;
}

/* --- the header ------------------------------------------------------------------------------ */

static int read_header_co(struct ox_image_channel *channel, struct qcow2_header *header,
                          struct ox_error *err)
{
	const char *what = channel->image->store->path;
	uint64_t file = channel->store->store->size;
	size_t bytes = (size_t)ox_min(file, (uint64_t)FIRST_READ);
	OX_FREE uint8_t *data = ox_xcalloc(1, ox_max(bytes, (size_t)1));
	uint32_t bits = 0;
	int rc = qcow2_read_co(channel, 0, data, bytes);

	if (rc == 0 && bytes >= 24)
		bits = ox_get_be32(data + 20);
	if (rc == 0 && bits > 16 && bits <= QCOW2_MAX_CLUSTER_BITS && file > bytes) {
		bytes = (size_t)ox_min(file, UINT64_C(1) << bits);
		free(data);
		data = ox_xcalloc(1, bytes);
		rc = qcow2_read_co(channel, 0, data, bytes);
	}
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read its header: %s", what,
		                    strerror(-rc));
	return qcow2_header_parse(data, bytes, what, header, err);
}

/* The backing file's name must make room for an extension: first a copy of it where it will be,
 * then the one sector that says where it is. */
static int move_name_co(struct ox_image_channel *channel, uint64_t offset)
{
	struct qcow2 *q = channel->image->priv;
	const char *name = q->header.backing_file;
	uint8_t where[8];
	int rc = ox_store_write_co(channel->store, offset, name, strlen(name), OX_IO_DSYNC);

	ox_put_be64(where, offset);
	if (rc == 0)
		rc = ox_store_write_co(channel->store, 8, where, sizeof(where), OX_IO_DSYNC);
	return rc;
}

static int write_header_locked_co(struct ox_image_channel *channel, uint8_t *out)
{
	struct qcow2 *q = channel->image->priv;
	size_t bytes = q->cluster_size;
	uint64_t old_offset, new_offset;
	int rc;

	pthread_mutex_lock(&q->lock);
	rc = qcow2_header_encode(&q->header, out, bytes);
	old_offset = q->header.backing_offset;
	new_offset = ox_get_be64(out + 8);
	pthread_mutex_unlock(&q->lock);
	if (rc == 0 && old_offset && new_offset != old_offset)
		rc = move_name_co(channel, new_offset);
	if (rc < 0)
		return rc;
	/* A large cluster is nearly empty, and was when it was made. */
	while (bytes > HEADER_TAIL && out[bytes - 1] == 0)
		bytes--;
	bytes = (size_t)ox_min(ox_align_up(bytes, 4096), (uint64_t)q->cluster_size);
	rc = ox_store_write_co(channel->store, 0, out, bytes, 0);
	if (rc == 0) {
		pthread_mutex_lock(&q->lock);
		q->header.backing_offset = new_offset;
		pthread_mutex_unlock(&q->lock);
	}
	return rc;
}

int qcow2_write_header_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	struct ox_range turn = {.end = 1, .exclusive = true, .loop = channel->loop};
	uint8_t *out = aligned_alloc(4096, ox_align_up(q->cluster_size, 4096));
	int rc;

	if (!out)
		return -ENOMEM;
	ox_range_acquire_co(&q->header_turn, &turn);
	rc = write_header_locked_co(channel, out);
	ox_range_release(&q->header_turn, &turn);
	free(out);
	return rc;
}

int qcow2_corrupt_co(struct ox_image_channel *channel, const char *fmt, ...)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = image->priv;
	char text[512];
	va_list args;
	bool mark;
	int rc;

	if (__atomic_exchange_n(&q->corrupt, true, __ATOMIC_ACQ_REL))
		return -EIO;
	va_start(args, fmt);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized) */
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	mark = q->header.version >= 3 && !image->read_only &&
	       image->store->options.lock == OX_LOCK_WRITE;
	ox_log(OX_LOG_ERROR, "%s: the image is damaged: %s; %s, try 'oxbow check -r all'",
	       image->store->path, text,
	       image->read_only ? "what is damaged reads as errors"
	                        : "nothing is written any more");
	if (!mark)
		return -EIO;
	pthread_mutex_lock(&q->lock);
	q->header.incompatible |= QCOW2_INCOMPAT_CORRUPT;
	pthread_mutex_unlock(&q->lock);
	rc = qcow2_write_header_co(channel);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	if (rc < 0)
		ox_log(OX_LOG_ERROR, "%s: cannot mark it as damaged: %s", image->store->path,
		       strerror(-rc));
	return -EIO;
}

/* --- opening --------------------------------------------------------------------------------- */

static unsigned log2_of(uint64_t power)
{
	return (unsigned)__builtin_ctzll(power);
}

static void set_shape(struct qcow2 *q)
{
	const struct qcow2_header *h = &q->header;
	bool extended = h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2;

	q->cluster_bits = h->cluster_bits;
	q->cluster_size = 1u << h->cluster_bits;
	q->entry_bytes = extended ? 16 : 8;
	q->subclusters = extended ? 32 : 1;
	q->subcluster_size = q->cluster_size / q->subclusters;
	q->refcount_bits = 1u << h->refcount_order;
	q->block_bytes = ox_min(q->cluster_size, QCOW2_BLOCK_MAX);
	q->unit_shift = log2_of(q->block_bytes / q->entry_bytes) + h->cluster_bits;
	q->units_per_table_shift = log2_of(q->cluster_size / q->block_bytes);
	q->data_file = h->incompatible & QCOW2_INCOMPAT_DATA_FILE;
}

static void describe_image(struct ox_image *image, const struct qcow2 *q)
{
	const struct qcow2_header *h = &q->header;

	/* Guests count in sectors; QEMU rounds down too. */
	__atomic_store_n(&image->size, ox_align_down(h->size, 512), __ATOMIC_RELAXED);
	image->cluster_size = q->cluster_size;
	image->zero_unit = q->subcluster_size;
	image->backing_file = h->backing_file ? ox_xstrdup(h->backing_file) : NULL;
	image->backing_format = h->backing_format ? ox_xstrdup(h->backing_format) : NULL;
	if (q->data_file) {
		image->data_file = h->data_file ? ox_xstrdup(h->data_file) : NULL;
		image->data_file_raw = h->autoclear & QCOW2_AUTOCLEAR_DATA_RAW;
	}
}

static int check_range(const struct ox_image *image, const char *table, uint64_t offset,
                       uint64_t bytes, uint64_t limit, struct ox_error *err)
{
	if (bytes == 0 || ox_range_within(offset, bytes, limit))
		return 0;
	return ox_error_set(
	        err, EINVAL,
	        "%s: the %s (%llu bytes at offset %llu) lies behind the end of the file "
	        "(%llu bytes); the file was cut off",
	        image->store->path, table, (unsigned long long)bytes, (unsigned long long)offset,
	        (unsigned long long)image->store->size);
}

static int check_places(const struct ox_image *image, const struct qcow2 *q, bool for_check,
                        struct ox_error *err)
{
	const struct qcow2_header *h = &q->header;
	uint64_t file = image->store->size, clusters = ox_align_up(file, q->cluster_size);
	int rc = check_range(image, "L1 table", h->l1_offset, (uint64_t)h->l1_entries * 8, file,
	                     err);

	if (rc == 0)
		rc = check_range(image, "LUKS header", h->luks_offset, h->luks_bytes, clusters,
		                 err);
	/* A check rebuilds it. */
	if (rc < 0 || for_check)
		return rc;
	if (h->refcount_table_clusters == 0)
		return ox_error_set(err, EINVAL,
		                    "%s: there is no refcount table; try 'oxbow check -r all'",
		                    image->store->path);
	return check_range(image, "refcount table", h->refcount_table_offset,
	                   (uint64_t)h->refcount_table_clusters << h->cluster_bits, clusters, err);
}

/* May this image be opened in this way at all? */
static int check_access(const struct ox_image *image, const struct qcow2 *q,
                        const struct ox_image_options *options, struct ox_error *err)
{
	const char *what = image->store->path;

	if (q->data_file && !q->header.data_file && !options->for_check)
		return ox_error_set(err, EINVAL,
		                    "%s: its data is in an external file, and the header does not "
		                    "say which",
		                    what);
	if (image->read_only)
		return 0;
	if (image->store->options.lock == OX_LOCK_SHARED_WRITE)
		return ox_error_set(
		        err, ENOTSUP,
		        "%s: a qcow2 image cannot be shared between writers: each keeps a "
		        "map of its own; share a raw image instead",
		        what);
	if ((q->header.incompatible & QCOW2_INCOMPAT_CORRUPT) && !options->for_check)
		return ox_error_set(
		        err, EACCES,
		        "%s: the image is marked as damaged and can only be read; repair "
		        "it with 'oxbow check -r all'",
		        what);
	if (q->header.crypt_method == QCOW2_CRYPT_AES && !options->for_check)
		return ox_error_set(
		        err, ENOTSUP,
		        "%s: legacy AES encryption is broken, such an image can only be "
		        "read: convert it to one with encrypt.format=luks",
		        what);
	return 0;
}

/* --- encryption ------------------------------------------------------------------------------ */

struct unlock {
	struct ox_image *image;
	uint64_t offset, bytes; /* of the LUKS header in the file */
	const uint8_t *phrase;
	size_t phrase_bytes;
	struct ox_error *err;
};

static int read_luks(void *arg, uint64_t offset, void *buf, size_t bytes)
{
	struct unlock *unlock = arg;

	if (!ox_range_within(offset, bytes, unlock->bytes))
		return -EIO;
	return ox_store_pread(unlock->image->store, unlock->offset + offset, buf, bytes);
}

static int unlock_in_worker(void *arg)
{
	struct unlock *unlock = arg;
	struct ox_image *image = unlock->image;
	const struct qcow2 *q = image->priv;
	uint8_t head[OX_LUKS_HEADER_BYTES];
	struct ox_luks luks;
	int rc;

	if (q->header.crypt_method == QCOW2_CRYPT_AES)
		return ox_crypto_open_aes(unlock->phrase, unlock->phrase_bytes, &image->crypto,
		                          unlock->err);
	rc = read_luks(unlock, 0, head, sizeof(head));
	if (rc < 0)
		return ox_error_set(unlock->err, -rc, "%s: cannot read its LUKS header: %s",
		                    image->store->path, strerror(-rc));
	rc = ox_luks_parse(head, sizeof(head), unlock->bytes, image->store->path, &luks,
	                   unlock->err);
	if (rc < 0)
		return rc;
	return ox_luks_unlock(&luks, unlock->phrase, unlock->phrase_bytes, read_luks, unlock,
	                      image->store->path, &image->crypto, unlock->err);
}

static int unlock_co(struct ox_image *image, const struct ox_image_options *options,
                     struct ox_error *err)
{
	const struct qcow2 *q = image->priv;
	struct unlock unlock = {.image = image,
	                        .offset = q->header.luks_offset,
	                        .bytes = q->header.luks_bytes,
	                        .err = err};
	int rc;

	if (q->header.crypt_method == QCOW2_CRYPT_NONE)
		return 0;
	if (!options->key_secret) {
		if (options->allow.nothing || options->for_check)
			return 0;
		return ox_error_set(
		        err, EACCES,
		        "%s: the image is encrypted: give its pass phrase with --object "
		        "secret,id=ID,file=PATH and name it with key-secret=ID",
		        image->store->path);
	}
	rc = ox_secrets_find(options->secrets, options->key_secret, &unlock.phrase,
	                     &unlock.phrase_bytes, err);
	if (rc < 0)
		return rc;
	if (q->header.crypt_method == QCOW2_CRYPT_AES) {
		image->crypto_guest_offset = true;
		ox_log_once(
		        OX_LOG_WARNING,
		        "%s: is encrypted with the legacy AES method, which is broken by design; "
		        "convert it to LUKS",
		        image->store->path);
	}
	return ox_worker_call_co(unlock_in_worker, &unlock);
}

/* --- what the header refers to --------------------------------------------------------------- */

/* A check reports what is wrong with the tables itself. */
static int read_tables_co(struct ox_image_channel *channel, const struct ox_image_options *options,
                          struct ox_error *err)
{
	struct ox_error found = {0};
	bool lenient = options->for_check;
	int rc = qcow2_read_snapshots_co(channel, lenient ? &found : err);

	if (rc < 0 && !lenient)
		return rc;
	if (rc < 0)
		ox_log(OX_LOG_WARNING, "%s", found.text);
	/* Who only reads needs no bitmaps. */
	lenient |= channel->image->read_only;
	ox_error_clear(&found);
	rc = qcow2_read_bitmaps_co(channel, lenient ? &found : err);
	if (rc < 0 && !lenient)
		return rc;
	if (rc < 0)
		ox_log(OX_LOG_WARNING, "%s", found.text);
	return 0;
}

/* What guest data must never lie on (the allocator knows refcount blocks, unit.c the L2 tables). */
static void register_metadata(struct qcow2 *q)
{
	const struct qcow2_header *h = &q->header;
	uint64_t snapshots = 0;

	pthread_mutex_lock(&q->lock);
	qcow2_add_metadata_range(q, 0, q->cluster_size);
	qcow2_add_metadata_range(q, h->l1_offset, (uint64_t)h->l1_entries * 8);
	qcow2_add_metadata_range(q, h->refcount_table_offset,
	                         (uint64_t)h->refcount_table_clusters << h->cluster_bits);
	if (h->luks_bytes)
		qcow2_add_metadata_range(q, h->luks_offset, h->luks_bytes);
	for (uint32_t i = 0; q->snapshots && i < h->snapshot_count; i++) {
		const struct qcow2_snapshot *s = &q->snapshots[i];

		qcow2_add_metadata_range(q, s->l1_offset, (uint64_t)s->l1_entries * 8);
		snapshots = s->entry_offset + 40 + s->extra_bytes + strlen(s->id) + strlen(s->name);
	}
	if (snapshots)
		qcow2_add_metadata_range(q, h->snapshots_offset, snapshots);
	if (h->bitmap_count)
		qcow2_add_metadata_range(q, h->bitmap_directory_offset, h->bitmap_directory_bytes);
	for (uint32_t i = 0; q->bitmaps && i < h->bitmap_count; i++)
		qcow2_add_metadata_range(q, q->bitmaps[i].table_offset,
		                         (uint64_t)q->bitmaps[i].table_entries * 8);
	pthread_mutex_unlock(&q->lock);
}

/* Refcounts, then what metadata takes, then the map, whose entries are checked against that.  A
 * check looks after the refcounts itself. */
static int open_map_co(struct ox_image_channel *channel, const struct ox_image_options *options,
                       struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = image->priv;
	int rc = 0;

	if ((q->header.incompatible & QCOW2_INCOMPAT_DIRTY) && !image->read_only &&
	    !options->for_check && image->store->options.lock == OX_LOCK_WRITE)
		rc = qcow2_repair_dirty_co(channel, err);
	if (rc == 0)
		rc = qcow2_alloc_init_co(channel, err);
	if (rc < 0)
		return rc;
	register_metadata(q);
	rc = qcow2_units_init_co(channel, options->metadata_cache, err);
	return rc < 0 ? rc : qcow2_record_adopt_co(channel, err);
}

static struct qcow2 *new_state(struct ox_image *image)
{
	struct qcow2 *q = ox_xcalloc(1, sizeof(*q));
	pthread_mutexattr_t attr;

	q->image = image;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
	pthread_mutex_init(&q->lock, &attr);
	pthread_mutexattr_destroy(&attr);
	ox_ranges_init(&q->header_turn);
	TAILQ_INIT(&q->dirty_blocks);
	qcow2_commit_init(q);
	return q;
}

static int qcow2_open_co(struct ox_image_channel *channel, const struct ox_image_options *options,
                         struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = new_state(image);
	int rc;

	image->priv = q;
	rc = read_header_co(channel, &q->header, err);
	if (rc < 0)
		return rc;
	set_shape(q);
	rc = check_places(image, q, options->for_check, err);
	if (rc == 0)
		rc = check_access(image, q, options, err);
	if (rc < 0)
		return rc;
	describe_image(image, q);
	q->corrupt = q->header.incompatible & QCOW2_INCOMPAT_CORRUPT;
	rc = unlock_co(image, options, err);
	if (rc == 0)
		rc = read_tables_co(channel, options, err);
	return rc < 0 ? rc : open_map_co(channel, options, err);
}

static void qcow2_close(struct ox_image *image)
{
	struct qcow2 *q = image->priv;

	if (!q)
		return;
	qcow2_record_free(q);
	if (q->alloc)
		qcow2_alloc_free(q);
	qcow2_units_free(q);
	qcow2_commit_free(q);
	qcow2_free_bitmaps(q);
	qcow2_free_snapshots(q);
	qcow2_header_free(&q->header);
	ox_ranges_destroy(&q->header_turn);
	pthread_mutex_destroy(&q->lock);
	free(q);
	image->priv = NULL;
}

static int qcow2_attach(struct ox_image_channel *channel, struct ox_error *err)
{
	return qcow2_alloc_attach(channel, err);
}

static void qcow2_detach(struct ox_image_channel *channel)
{
	qcow2_units_detach(channel);
	qcow2_alloc_detach(channel);
}

static int qcow2_unpack(struct ox_image *image, const void *in, size_t in_bytes, void *out,
                        size_t out_bytes)
{
	const struct qcow2 *q = image->priv;

	return qcow2_decompress(q->header.compression_type, in, in_bytes, out, out_bytes);
}

static const struct ox_format_maintenance maintenance = {
        .info = qcow2_info,
        .check_co = qcow2_check_co,
        .resize_co = qcow2_resize_co,
        .create_words = qcow2_create_words,
        .create_resolve = qcow2_create_resolve,
        .create_co = qcow2_create_co,
};

const struct ox_format_ops ox_format_qcow2 = {
        .name = "qcow2",
        .probe = qcow2_probe,
        .open_co = qcow2_open_co,
        .close = qcow2_close,
        .attach = qcow2_attach,
        .detach = qcow2_detach,
        .lookup = qcow2_lookup,
        .map_co = qcow2_map_co,
        .begin_co = qcow2_begin_co,
        .allocate = qcow2_allocate,
        .prepare_co = qcow2_prepare_co,
        .publish_co = qcow2_publish_co,
        .abort = qcow2_abort,
        .zero_co = qcow2_zero_co,
        .discard_co = qcow2_discard_co,
        .commit_co = qcow2_commit_co,
        .finish_co = qcow2_finish_co,
        .decompress = qcow2_unpack,
        .maintenance = &maintenance,
};
