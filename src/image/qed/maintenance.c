/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * qed images: creation, growing, info.
 *
 * A new image is a header and an L1 table of zeroes, which the file need not hold.  The header is
 * written last: what is broken off before is not a qed image.
 */
#include "image/qed/qed.h"
#include "base/text.h"
#include <errno.h>
#include <oxbow/log.h>
#include <stdio.h>
#include <string.h>

#define DEFAULT_CLUSTER 65536u
#define DEFAULT_TABLE   4u

static const struct ox_create_word qed_create_words[] = {
        {"backing_file", "File name of a base image", NULL},
        {"backing_fmt", "Image format of the base image", NULL},
        {"cluster_size", "Cluster size (in bytes)", "size"},
        {"size", "Virtual disk size", "size"},
        {"table_size", "L1/L2 table size (in clusters)", "size"},
        {NULL, NULL, NULL},
};

/* --- create ----------------------------------------------------------------------------------- */

static int parse_geometry(const struct ox_image_create_options *options, uint32_t *cluster,
                          uint32_t *table, struct ox_error *err)
{
	const char *cluster_word = ox_create_option(options, "cluster_size");
	const char *table_word = ox_create_option(options, "table_size");
	uint64_t value = DEFAULT_CLUSTER;

	if (cluster_word && (!ox_parse_size(cluster_word, 1, &value) || !ox_is_power_of_2(value) ||
	                     value < QED_MIN_CLUSTER || value > QED_MAX_CLUSTER))
		return ox_error_set(err, EINVAL,
		                    "cluster_size of a qed image is a power of two from 4k to 64M, "
		                    "not '%s'",
		                    cluster_word);
	*cluster = (uint32_t)value;
	value = DEFAULT_TABLE;
	if (table_word && (!ox_parse_size(table_word, 1, &value) || !ox_is_power_of_2(value) ||
	                   value > QED_MAX_TABLE))
		return ox_error_set(err, EINVAL,
		                    "table_size of a qed image is 1, 2, 4, 8 or 16 clusters, not "
		                    "'%s'",
		                    table_word);
	*table = (uint32_t)value;
	return 0;
}

/* The size in whole sectors, unless there can be no such disk. */
static int fit_size(const char *path, uint64_t asked, uint32_t cluster, uint32_t table,
                    uint64_t *size, struct ox_error *err)
{
	uint64_t max = ox_align_down(qed_max_size(cluster, table), 512);
	char text[32];

	if (asked > max)
		return ox_error_set(err, EFBIG,
		                    "%s: a qed image with clusters of %u bytes and tables of %u "
		                    "clusters has at most %s; larger ones allow more",
		                    path, cluster, table, ox_format_size(max, text, sizeof(text)));
	*size = ox_align_up(asked, 512);
	return 0;
}

static int qed_create_resolve(struct ox_image_create_options *options, struct ox_error *err)
{
	uint32_t cluster, table;
	uint64_t size;
	char text[24];
	int rc = parse_geometry(options, &cluster, &table, err);

	if (rc == 0)
		rc = fit_size(options->path, options->size, cluster, table, &size, err);
	if (rc < 0)
		return rc;
	if (options->backing_file && strlen(options->backing_file) > QED_MAX_NAME)
		return ox_error_set(err, ENAMETOOLONG,
		                    "%s: the backing file's name is longer than %u bytes, which is "
		                    "all that a qed header may say",
		                    options->path, QED_MAX_NAME);
	if (options->backing_file && options->backing_file[0] == '\0')
		return ox_error_set(err, EINVAL, "%s: the backing file's name is empty",
		                    options->path);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)size);
	ox_create_resolve_add(options, "size", text);
	if (options->backing_file)
		ox_create_resolve_add(options, "backing_file", options->backing_file);
	if (options->backing_format)
		ox_create_resolve_add(options, "backing_fmt", options->backing_format);
	snprintf(text, sizeof(text), "%u", cluster);
	ox_create_resolve_add(options, "cluster_size", text);
	if (ox_create_option(options, "table_size")) {
		snprintf(text, sizeof(text), "%u", table);
		ox_create_resolve_add(options, "table_size", text);
	}
	return 0;
}

static int fill_co(struct ox_channel *store, const struct qed_header *header, const char *backing)
{
	size_t bytes = QED_HEADER_BYTES + header->backing_bytes;
	OX_FREE uint8_t *head = calloc(1, bytes);
	int rc;

	if (!head)
		return -ENOMEM;
	rc = ox_store_truncate_co(store->store, header->l1_offset + qed_table_bytes(header),
	                          OX_PREALLOC_OFF, NULL);
	if (rc < 0)
		return rc;
	qed_header_encode(header, head);
	if (backing)
		memcpy(head + QED_HEADER_BYTES, backing, header->backing_bytes);
	rc = ox_store_flush_co(store);
	if (rc == 0)
		rc = ox_store_write_co(store, 0, head, bytes, 0);
	return rc < 0 ? rc : ox_store_flush_co(store);
}

static int qed_create_co(struct ox_channel *store, const struct ox_image_create_options *options,
                         struct ox_error *err)
{
	struct qed_header header = {.header_size = 1};
	int rc = parse_geometry(options, &header.cluster_size, &header.table_size, err);

	if (rc == 0)
		rc = fit_size(options->path, options->size, header.cluster_size, header.table_size,
		              &header.image_size, err);
	if (rc < 0)
		return rc;
	if (options->keep_content)
		return ox_error_set(err, EINVAL,
		                    "%s: a qed image grows at its file's end and must be a regular "
		                    "file; on a device use qcow2",
		                    options->path);
	header.l1_offset = header.cluster_size;
	if (options->backing_file) {
		header.features = QED_F_BACKING_FILE;
		if (options->backing_format && strcmp(options->backing_format, "raw") == 0)
			header.features |= QED_F_NO_PROBE;
		header.backing_offset = QED_HEADER_BYTES;
		header.backing_bytes = (uint32_t)strlen(options->backing_file);
	}
	if (header.table_size == 1)
		ox_log(OX_LOG_WARNING,
		       "%s: QEMU (seen with 7.2) does not open qed images whose tables have "
		       "one cluster; with table_size=2 or more it does",
		       options->path);
	rc = fill_co(store, &header, options->backing_file);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot write the new image: %s", options->path,
		                    strerror(-rc));
	return 0;
}

/* --- resize ----------------------------------------------------------------------------------- */

static int qed_resize_co(struct ox_image_channel *channel, uint64_t size,
                         enum ox_preallocation prealloc, struct ox_error *err)
{
	struct qed *q = qed_of(channel);
	const char *path = channel->image->store->path;
	uint64_t former = q->header.image_size;
	int rc;

	if (prealloc != OX_PREALLOC_OFF)
		return ox_error_set(err, ENOTSUP, "%s: a qed image cannot be preallocated", path);
	if (size < former)
		return ox_error_set(err, ENOTSUP,
		                    "%s: a qed image can grow but not shrink; it has %llu bytes",
		                    path, (unsigned long long)former);
	rc = fit_size(path, size, q->cluster_size, q->header.table_size, &size, err);
	if (rc < 0 || size == former)
		return rc;
	rc = qed_map_grow_co(channel, size);
	if (rc == 0) {
		__atomic_store_n(&q->header.image_size, size, __ATOMIC_RELEASE);
		__atomic_store_n(&channel->image->size, size, __ATOMIC_RELEASE);
		rc = ox_image_hide_backing_co(channel, former, size);
	}
	if (rc == 0)
		rc = qed_write_header_co(channel);
	if (rc == 0)
		return 0;
	__atomic_store_n(&channel->image->size, former, __ATOMIC_RELEASE);
	__atomic_store_n(&q->header.image_size, former, __ATOMIC_RELEASE);
	return ox_error_set(err, -rc, "%s: cannot write the new size: %s", path, strerror(-rc));
}

static int qed_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err)
{
	const struct qed *q = image->priv;

	info->cluster_size = q->cluster_size;
	info->dirty = (q->header.features & QED_F_NEED_CHECK) != 0;
	return 0;
}

const struct ox_format_maintenance qed_maintenance = {
        .info = qed_info,
        .check_co = qed_check_co,
        .resize_co = qed_resize_co,
        .create_words = qed_create_words,
        .create_resolve = qed_create_resolve,
        .create_co = qed_create_co,
};
