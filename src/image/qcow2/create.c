/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Making qcow2 images: the layout, and writing it.
 *
 * The layout follows from the options by arithmetic alone: metadata first, everything of a kind in
 * one run, then (if preallocated) the data in one run in the guest's order, so that an extent of
 * the map is as long as it can be.  Tables are made cluster by cluster in a buffer and written in
 * large pieces.  The refcount table has entries to spare for the whole disk, within reason, so that
 * it seldom has to move.
 *
 * Preallocated clusters show what the file has there.  Where that may be anything (a device's old
 * content, or what decryption makes of zeroes) they are entered as "reads as zero", which version 3
 * can say; else zeroes are written.
 *
 * Crash ordering: the header is written last, when all that it refers to is durable; until then the
 * file is no image.
 */
#include "image/qcow2/create.h"
#include "base/byteorder.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <oxbow/log.h>
#include <string.h>
#include <sys/ioctl.h>

#define WRITE_BYTES    (4u << 20) /* at least the largest cluster */
#define ZERO_BYTES     (256u << 20)
#define SPARE_REFTABLE (1u << 20) /* at most so many bytes of it are spare */

/* --- the layout ------------------------------------------------------------------------------ */

static uint64_t divide_up(uint64_t value, uint64_t by)
{
	return value / by + (value % by != 0);
}

/* Refcount blocks and table clusters for `others` other clusters and for themselves. */
static void count_refcounts(const struct qcow2_plan *plan, uint64_t others, uint64_t least_table,
                            uint64_t *blocks, uint64_t *table)
{
	uint64_t b = 0, t = least_table, before;

	/* Each round can only ask for more, and asks for ever less more. */
	do {
		before = b + t;
		b = divide_up(others + b + t, plan->refcounts_per_block);
		t = ox_max(divide_up(b * 8, plan->cluster), least_table);
	} while (b + t != before);
	*blocks = b;
	*table = t;
}

static int count_clusters(const struct ox_image_create_options *options,
                          const struct qcow2_create *c, struct qcow2_plan *p, struct ox_error *err)
{
	uint64_t l2_entries, l1_entries, all, blocks, spare;
	bool prealloc = c->prealloc != QCOW2_PREALLOC_OFF;

	p->cluster = 1u << c->cluster_bits;
	p->entry_bytes = c->extended ? 16 : 8;
	p->refcounts_per_block = ((uint64_t)p->cluster * 8) >> c->refcount_order;
	l2_entries = p->cluster / p->entry_bytes;
	p->guest_clusters = divide_up(c->size, p->cluster);
	l1_entries = ox_max(divide_up(p->guest_clusters, l2_entries), UINT64_C(1));
	if (l1_entries > QCOW2_MAX_L1_BYTES / 8)
		return ox_error_set(err, EFBIG,
		                    "%s: %llu bytes are too many for clusters of %u bytes; use a "
		                    "larger cluster_size",
		                    options->path, (unsigned long long)c->size, p->cluster);
	p->l1_entries = (uint32_t)l1_entries;
	p->l1_count = divide_up(l1_entries * 8, p->cluster);
	p->luks_count = divide_up(p->luks_bytes, p->cluster);
	p->table_count = prealloc ? divide_up(p->guest_clusters, l2_entries) : 0;
	p->data_count = prealloc && !c->data_file ? p->guest_clusters : 0;
	/* What a full image would need. */
	all = 1 + p->luks_count + p->l1_count + l1_entries + (c->data_file ? 0 : p->guest_clusters);
	count_refcounts(p, all, 1, &blocks, &spare);
	spare = ox_min(spare, ox_max(SPARE_REFTABLE / (uint64_t)p->cluster, UINT64_C(1)));
	all = 1 + p->luks_count + p->l1_count + p->table_count + p->data_count;
	count_refcounts(p, all, spare, &p->block_count, &p->reftable_count);
	if (p->reftable_count > QCOW2_MAX_REFTABLE_BYTES / p->cluster)
		return ox_error_set(
		        err, EFBIG,
		        "%s: %llu bytes are too many to preallocate with clusters of %u "
		        "bytes; use a larger cluster_size",
		        options->path, (unsigned long long)c->size, p->cluster);
	return 0;
}

static void place_clusters(struct qcow2_plan *p)
{
	p->reftable = 1;
	p->blocks = p->reftable + p->reftable_count;
	p->luks = p->blocks + p->block_count;
	p->l1 = p->luks + p->luks_count;
	p->tables = p->l1 + p->l1_count;
	p->data = p->tables + p->table_count;
}

static void make_header(const struct ox_image_create_options *options, const struct qcow2_create *c,
                        const struct qcow2_plan *p, struct qcow2_header *h)
{
	uint8_t luks[16];

	h->version = c->version;
	h->cluster_bits = c->cluster_bits;
	h->size = c->size;
	h->l1_entries = p->l1_entries;
	h->l1_offset = p->l1 * p->cluster;
	h->refcount_table_offset = p->reftable * p->cluster;
	h->refcount_table_clusters = (uint32_t)p->reftable_count;
	h->refcount_order = c->refcount_order;
	h->compression_type = c->compression;
	h->header_bytes = c->version >= 3 ? 112 : 72;
	if (c->compression)
		h->incompatible |= QCOW2_INCOMPAT_COMPRESSION;
	if (c->extended)
		h->incompatible |= QCOW2_INCOMPAT_EXTENDED_L2;
	if (c->lazy)
		h->compatible |= QCOW2_COMPAT_LAZY_REFCOUNTS;
	if (c->data_raw)
		h->autoclear |= QCOW2_AUTOCLEAR_DATA_RAW;
	if (c->backing) {
		h->backing_file = ox_xstrdup(options->backing_file);
		h->backing_format =
		        options->backing_format ? ox_xstrdup(options->backing_format) : NULL;
	}
	if (c->data_file) {
		h->incompatible |= QCOW2_INCOMPAT_DATA_FILE;
		h->data_file = ox_xstrdup(c->data_file);
	}
	if (c->encrypted) {
		h->crypt_method = QCOW2_CRYPT_LUKS;
		ox_put_be64(luks, p->luks * p->cluster);
		ox_put_be64(luks + 8, p->luks_bytes);
		qcow2_header_set_extension(h, QCOW2_EXT_LUKS, luks, sizeof(luks));
	}
	if (c->version >= 3 && p->cluster >= 4096)
		qcow2_header_add_feature_names(h);
}

int qcow2_create_plan(const struct ox_image_create_options *options, const struct qcow2_create *c,
                      struct qcow2_plan *p, struct qcow2_header *header, struct ox_error *err)
{
	OX_FREE uint8_t *out = NULL;
	int rc = 0;

	*p = (struct qcow2_plan){0};
	*header = (struct qcow2_header){0};
	if (c->encrypted)
		rc = ox_luks_area(&c->luks, &p->luks_bytes, err);
	if (rc == 0)
		rc = count_clusters(options, c, p, err);
	if (rc < 0)
		return rc;
	place_clusters(p);
	make_header(options, c, p, header);
	out = ox_xcalloc(1, p->cluster);
	if (qcow2_header_encode(header, out, p->cluster) < 0)
		return ox_error_set(err, EINVAL,
		                    "%s: the names of its backing or data file do not fit into the "
		                    "first cluster of %u bytes; use a larger cluster_size",
		                    options->path, p->cluster);
	return 0;
}

/* --- writing --------------------------------------------------------------------------------- */

struct maker {
	struct ox_channel *store;
	const struct ox_image_create_options *options;
	const struct qcow2_create *create;
	const struct qcow2_plan *plan;
	struct ox_error *err;
	bool reads_as_zero;  /* preallocated clusters are entered so */
	uint8_t *buffer;     /* WRITE_BYTES */
	uint8_t *full_block; /* a refcount block of ones */
	uint8_t *luks;
};

static void fill_reftable(const struct maker *m, uint64_t index, uint8_t *out)
{
	const struct qcow2_plan *p = m->plan;
	uint64_t entries = p->cluster / 8;

	for (uint64_t i = 0; i < entries; i++) {
		uint64_t block = index * entries + i;

		ox_put_be64(out + i * 8,
		            block < p->block_count ? (p->blocks + block) * p->cluster : 0);
	}
}

static void fill_block(const struct maker *m, uint64_t index, uint8_t *out)
{
	const struct qcow2_plan *p = m->plan;
	uint64_t first = index * p->refcounts_per_block, used = p->data + p->data_count;
	unsigned bits = 1u << m->create->refcount_order;

	if (used >= first + p->refcounts_per_block) {
		memcpy(out, m->full_block, p->cluster);
		return;
	}
	memset(out, 0, p->cluster);
	for (uint64_t i = 0; first + i < used; i++)
		qcow2_refcount_set(out, bits, i, 1);
}

static void fill_luks(const struct maker *m, uint64_t index, uint8_t *out)
{
	const struct qcow2_plan *p = m->plan;
	uint64_t at = index * p->cluster;
	uint64_t bytes = ox_min(p->luks_bytes - at, (uint64_t)p->cluster);

	if (m->luks)
		memcpy(out, m->luks + at, bytes);
	memset(out + bytes, 0, p->cluster - bytes);
}

static void fill_l1(const struct maker *m, uint64_t index, uint8_t *out)
{
	const struct qcow2_plan *p = m->plan;
	uint64_t entries = p->cluster / 8;

	for (uint64_t i = 0; i < entries; i++) {
		uint64_t table = index * entries + i;

		ox_put_be64(out + i * 8,
		            table < p->table_count
		                    ? ((p->tables + table) * p->cluster) | QCOW2_ENTRY_COPIED
		                    : 0);
	}
}

static void fill_table(const struct maker *m, uint64_t index, uint8_t *out)
{
	const struct qcow2_plan *p = m->plan;
	const struct qcow2_create *c = m->create;
	uint64_t entries = p->cluster / p->entry_bytes, first = index * entries;
	/* With a backing file only the space is there; what is read still comes from below. */
	uint64_t bitmap = c->backing         ? 0
	                  : m->reads_as_zero ? UINT64_C(0xffffffff00000000)
	                                     : UINT64_C(0xffffffff);
	uint64_t flags = QCOW2_ENTRY_COPIED;

	if (!c->extended && m->reads_as_zero)
		flags |= QCOW2_ENTRY_ZERO;
	memset(out, 0, p->cluster);
	for (uint64_t i = 0; i < entries && first + i < p->guest_clusters; i++) {
		uint64_t host = (first + i + (c->data_file ? 0 : p->data)) * p->cluster;

		ox_put_be64(out + i * p->entry_bytes, host | flags);
		if (c->extended)
			ox_put_be64(out + i * p->entry_bytes + 8, bitmap);
	}
}

static int write_failed(const struct maker *m, int rc)
{
	return ox_error_set(m->err, -rc, "%s: cannot write to it: %s", m->options->path,
	                    strerror(-rc));
}

/* `count` clusters from cluster `at` on, as `fill` makes them. */
static int write_run_co(struct maker *m, uint64_t at, uint64_t count,
                        void (*fill)(const struct maker *m, uint64_t index, uint8_t *out))
{
	const struct qcow2_plan *p = m->plan;
	uint64_t batch = WRITE_BYTES / p->cluster;

	for (uint64_t i = 0; i < count; i += batch) {
		uint64_t n = ox_min(batch, count - i);
		int rc;

		for (uint64_t k = 0; k < n; k++)
			fill(m, i + k, m->buffer + k * p->cluster);
		rc = ox_store_write_co(m->store, (at + i) * p->cluster, m->buffer, n * p->cluster,
		                       0);
		if (rc < 0)
			return write_failed(m, rc);
		if (m->options->progress && m->create->prealloc == QCOW2_PREALLOC_METADATA &&
		    fill == fill_table)
			m->options->progress(m->options->progress_arg, i + n, count);
	}
	return 0;
}

static int write_tables_co(struct maker *m)
{
	const struct qcow2_plan *p = m->plan;
	int rc = write_run_co(m, p->reftable, p->reftable_count, fill_reftable);

	if (rc == 0)
		rc = write_run_co(m, p->blocks, p->block_count, fill_block);
	if (rc == 0 && m->luks)
		rc = write_run_co(m, p->luks, p->luks_count, fill_luks);
	/* A file that is new is zero there. */
	if (rc == 0 && (p->table_count || m->options->keep_content))
		rc = write_run_co(m, p->l1, p->l1_count, fill_l1);
	if (rc == 0)
		rc = write_run_co(m, p->tables, p->table_count, fill_table);
	return rc;
}

static int write_header_co(struct maker *m, const struct qcow2_header *header)
{
	const struct qcow2_plan *p = m->plan;
	int rc = ox_store_flush_co(m->store);

	if (rc == 0)
		rc = qcow2_header_encode(header, m->buffer, p->cluster);
	if (rc == 0)
		rc = ox_store_write_co(m->store, 0, m->buffer, p->cluster, 0);
	if (rc == 0)
		rc = ox_store_flush_co(m->store);
	return rc < 0 ? write_failed(m, rc) : 0;
}

/* A device's old content goes. */
static int zero_range_co(struct ox_channel *store, uint64_t offset, uint64_t bytes)
{
	int rc = 0;

	while (bytes > 0 && rc == 0) {
		struct ox_io io = {.op = OX_IO_ZERO,
		                   .flags = OX_IO_MAY_UNMAP,
		                   .offset = offset,
		                   .length = ox_min(bytes, (uint64_t)ZERO_BYTES)};

		rc = ox_store_submit_co(store, &io);
		offset += io.length;
		bytes -= io.length;
	}
	return rc;
}

static enum ox_preallocation store_prealloc(const struct qcow2_create *c)
{
	return c->prealloc == QCOW2_PREALLOC_FULL     ? OX_PREALLOC_FULL
	       : c->prealloc == QCOW2_PREALLOC_FALLOC ? OX_PREALLOC_FALLOC
	                                              : OX_PREALLOC_OFF;
}

/* --- encryption, attributes ------------------------------------------------------------------ */

struct format_call {
	struct maker *m;
	const uint8_t *phrase;
	size_t phrase_bytes;
};

static int format_in_worker(void *arg)
{
	struct format_call *call = arg;
	struct maker *m = call->m;

	return ox_luks_format(&m->create->luks, call->phrase, call->phrase_bytes, m->luks,
	                      m->plan->luks_bytes, NULL, m->err);
}

static int make_luks_co(struct maker *m)
{
	struct format_call call = {.m = m};
	int rc;

	if (!m->create->encrypted)
		return 0;
	rc = ox_secrets_find(m->options->secrets, m->create->key_secret, &call.phrase,
	                     &call.phrase_bytes, m->err);
	if (rc < 0)
		return rc;
	m->luks = ox_xcalloc(1, m->plan->luks_bytes);
	return ox_worker_call_co(format_in_worker, &call);
}

/* Only an empty file takes the attribute; only some file systems have it. */
static void set_nocow(const struct ox_image_create_options *options)
{
	struct ox_opener *opener = options->opener ? options->opener : &ox_opener_direct;
	const char *path = options->path;
	OX_CLOSE int fd = -1;
	int flags = 0;

	if (strncmp(path, "file:", 5) == 0)
		path += 5;
	fd = ox_open(opener, path, O_RDONLY | O_NOCTTY, 0);
	if (fd >= 0 && ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0) {
		flags |= FS_NOCOW_FL;
		if (ioctl(fd, FS_IOC_SETFLAGS, &flags) == 0)
			return;
	}
	ox_log(OX_LOG_WARNING, "%s: nocow=on has no effect on this file system", options->path);
}

/* --- the external data file ------------------------------------------------------------------ */

/* With some of the file's old bytes left after truncation it is a device. */
static int fill_data_store(struct maker *m, struct ox_store *store)
{
	const struct qcow2_create *c = m->create;
	int rc = ox_store_truncate(store, 0, OX_PREALLOC_OFF, NULL, NULL, m->err);
	bool device = store->size > 0;
	struct ox_channel *channel;

	if (rc == 0)
		rc = ox_store_truncate(store, c->size, store_prealloc(c), m->options->progress,
		                       m->options->progress_arg, m->err);
	if (rc < 0 || !device || c->prealloc == QCOW2_PREALLOC_OFF)
		return rc;
	rc = ox_store_attach(store, m->store->loop, &channel, m->err);
	if (rc < 0)
		return rc;
	rc = zero_range_co(channel, 0, c->size);
	ox_store_detach(channel);
	return rc < 0 ? write_failed(m, rc) : 0;
}

/* It is made where the image will look for it. */
static int make_data_file(struct maker *m)
{
	struct ox_opener *opener = m->options->opener ? m->options->opener : &ox_opener_direct;
	struct ox_store_options store_options = {.aio = OX_AIO_SYNC,
	                                         .lock = OX_LOCK_WRITE,
	                                         .write_granularity = 1,
	                                         .opener = opener};
	OX_FREE char *path = NULL;
	struct ox_store *store;
	bool made;
	int fd, rc;

	if (!m->create->data_file)
		return 0;
	path = ox_image_resolve_name(m->options->path, m->create->data_file);
	fd = ox_open(opener, path, O_RDWR | O_CREAT | O_EXCL | O_NOCTTY, 0644);
	made = fd >= 0;
	if (made)
		close(fd);
	else if (fd != -EEXIST)
		return ox_error_set(m->err, -fd, "%s: cannot create the data file: %s", path,
		                    strerror(-fd));
	rc = ox_store_open(path, &store_options, &store, m->err);
	if (rc == 0) {
		rc = fill_data_store(m, store);
		ox_store_close(store);
	}
	if (rc < 0 && made)
		unlink(path);
	return rc;
}

/* --- all of it ------------------------------------------------------------------------------- */

static int fill_image_co(struct maker *m, const struct qcow2_header *header)
{
	const struct ox_image_create_options *options = m->options;
	const struct qcow2_create *c = m->create;
	const struct qcow2_plan *p = m->plan;
	uint64_t data = p->data * p->cluster, end = (p->data + p->data_count) * p->cluster;
	/* What the preallocated clusters would show is not zeroes. */
	bool unknown = options->keep_content && p->data_count && !c->backing;
	int rc;

	if (c->nocow && !options->keep_content)
		set_nocow(options);
	m->reads_as_zero = c->version >= 3 && !c->backing && !c->data_raw &&
	                   (c->encrypted || (unknown && c->prealloc == QCOW2_PREALLOC_METADATA));
	rc = make_luks_co(m);
	/* A device tells here if it is too small. */
	if (rc == 0)
		rc = ox_store_truncate(m->store->store, options->keep_content ? end : data,
		                       OX_PREALLOC_OFF, NULL, NULL, m->err);
	if (rc == 0)
		rc = make_data_file(m);
	if (rc == 0)
		rc = write_tables_co(m);
	if (rc < 0)
		return rc;
	if (end > data && !options->keep_content)
		rc = ox_store_truncate(m->store->store, end, store_prealloc(c), options->progress,
		                       options->progress_arg, m->err);
	if (rc == 0 && unknown && !m->reads_as_zero) {
		rc = zero_range_co(m->store, data, end - data);
		if (rc < 0)
			write_failed(m, rc);
	}
	return rc < 0 ? rc : write_header_co(m, header);
}

int qcow2_create_co(struct ox_channel *store, const struct ox_image_create_options *options,
                    struct ox_error *err)
{
	struct maker m = {.store = store, .options = options, .err = err};
	struct qcow2_header header;
	struct qcow2_create create;
	struct qcow2_plan plan;
	int rc = qcow2_create_parse(options, &create, err);

	if (rc < 0)
		return rc;
	m.create = &create;
	m.plan = &plan;
	rc = qcow2_create_plan(options, &create, &plan, &header, err);
	if (rc == 0) {
		m.buffer = aligned_alloc(4096, WRITE_BYTES);
		m.full_block = ox_xcalloc(1, plan.cluster);
		for (uint64_t i = 0; i < plan.refcounts_per_block; i++)
			qcow2_refcount_set(m.full_block, 1u << create.refcount_order, i, 1);
		rc = m.buffer ? fill_image_co(&m, &header)
		              : ox_error_set(err, ENOMEM, "%s: no memory", options->path);
	}
	if (m.luks)
		explicit_bzero(m.luks, plan.luks_bytes);
	free(m.luks);
	free(m.full_block);
	free(m.buffer);
	qcow2_header_free(&header);
	return rc;
}
