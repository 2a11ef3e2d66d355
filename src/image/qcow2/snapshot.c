/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The table of internal snapshots (specification, "Snapshots"), read once at open.
 *
 * Parsing is pure and bounded: at most 65,536 entries, at most 64 MiB of them, and no more memory
 * than the bytes that were really there.  A snapshot's L1 table is the image's own metadata; its
 * tables and clusters are shared with the active ones by refcounts above 1, which is all that the
 * serving parts have to know.
 */
#include "image/qcow2/qcow2.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define ENTRY_BYTES 40u
#define EXTRA_MAX   1024u
#define TABLE_MAX   (64u << 20)

/* How long the entry at the front is; 0: it is not all there. */
static size_t entry_length(const uint8_t *data, size_t bytes)
{
	size_t length;

	if (bytes < ENTRY_BYTES)
		return 0;
	length = (size_t)ENTRY_BYTES + ox_get_be16(data + 12) + ox_get_be16(data + 14);
	/* Longer extra data is refused by who parses it; here it only must not overflow. */
	length += ox_min(ox_get_be32(data + 36), TABLE_MAX);
	return length <= bytes ? ox_min((size_t)ox_align_up(length, 8), bytes) : 0;
}

/* Are `count` entries complete in these bytes? */
static bool table_is_complete(const uint8_t *data, size_t bytes, uint32_t count)
{
	size_t at = 0;

	for (uint32_t i = 0; i < count; i++) {
		size_t length = entry_length(data + at, bytes - at);

		if (length == 0)
			return false;
		at += length;
	}
	return true;
}

static char *copy_text(const uint8_t *data, size_t bytes)
{
	char *text = ox_xcalloc(1, bytes + 1);

	memcpy(text, data, bytes);
	return text;
}

static void free_all(struct qcow2_snapshot *snapshots, uint32_t count)
{
	for (uint32_t i = 0; snapshots && i < count; i++) {
		free(snapshots[i].id);
		free(snapshots[i].name);
		free(snapshots[i].extra);
	}
	free(snapshots);
}

static int parse_one(const uint8_t *data, uint32_t cluster_size, const char *what, uint32_t number,
                     struct qcow2_snapshot *s, struct ox_error *err)
{
	uint32_t id_bytes = ox_get_be16(data + 12), name_bytes = ox_get_be16(data + 14);
	const uint8_t *extra = data + ENTRY_BYTES;

	s->l1_offset = ox_get_be64(data);
	s->l1_entries = ox_get_be32(data + 8);
	s->date_seconds = ox_get_be32(data + 16);
	s->date_ns = ox_get_be32(data + 20);
	s->vm_clock_ns = ox_get_be64(data + 24);
	s->vm_state_bytes = ox_get_be32(data + 32);
	s->extra_bytes = ox_get_be32(data + 36);
	s->disk_size = UINT64_MAX;
	s->icount = UINT64_MAX;
	if (s->extra_bytes > EXTRA_MAX)
		return ox_error_set(err, EFBIG,
		                    "%s: snapshot %u has %u bytes of extra data; at most %u are "
		                    "allowed",
		                    what, number, s->extra_bytes, EXTRA_MAX);
	if (s->l1_entries > QCOW2_MAX_L1_BYTES / 8)
		return ox_error_set(
		        err, EFBIG,
		        "%s: the L1 table of snapshot %u has %u entries; at most %u are "
		        "allowed",
		        what, number, s->l1_entries, QCOW2_MAX_L1_BYTES / 8);
	if (s->l1_entries > 0 && (s->l1_offset == 0 || !ox_is_aligned(s->l1_offset, cluster_size) ||
	                          s->l1_offset > INT64_MAX - QCOW2_MAX_L1_BYTES))
		return ox_error_set(err, EINVAL,
		                    "%s: the L1 table of snapshot %u is at offset %llu, which is "
		                    "not where a cluster of %u bytes can begin",
		                    what, number, (unsigned long long)s->l1_offset, cluster_size);
	if (s->extra_bytes >= 8)
		s->vm_state_bytes = ox_get_be64(extra);
	if (s->extra_bytes >= 16)
		s->disk_size = ox_get_be64(extra + 8);
	if (s->extra_bytes >= 24)
		s->icount = ox_get_be64(extra + 16);
	s->extra = ox_xcalloc(1, s->extra_bytes + 1);
	memcpy(s->extra, extra, s->extra_bytes);
	s->id = copy_text(extra + s->extra_bytes, id_bytes);
	s->name = copy_text(extra + s->extra_bytes + id_bytes, name_bytes);
	return 0;
}

int qcow2_snapshots_parse(const uint8_t *data, size_t bytes, uint32_t count, uint32_t cluster_size,
                          const char *what, struct qcow2_snapshot **out, size_t *used,
                          struct ox_error *err)
{
	struct qcow2_snapshot *snapshots;
	size_t at = 0;

	*out = NULL;
	*used = 0;
	if (count == 0)
		return 0;
	if (count > QCOW2_MAX_SNAPSHOTS)
		return ox_error_set(err, EFBIG, "%s: %u snapshots; at most %u are allowed", what,
		                    count, QCOW2_MAX_SNAPSHOTS);
	if (count > bytes / ENTRY_BYTES)
		return ox_error_set(err, EINVAL, "%s: the snapshot table of %u entries is cut off",
		                    what, count);
	snapshots = ox_xcalloc(count, sizeof(*snapshots));
	for (uint32_t i = 0; i < count; i++) {
		size_t length = entry_length(data + at, bytes - at);
		int rc;

		if (length == 0)
			rc = ox_error_set(err, EINVAL,
			                  "%s: the snapshot table is cut off in entry %u of %u",
			                  what, i + 1, count);
		else
			rc = parse_one(data + at, cluster_size, what, i + 1, &snapshots[i], err);
		if (rc < 0) {
			free_all(snapshots, count);
			return rc;
		}
		snapshots[i].entry_offset = at;
		at += length;
	}
	*out = snapshots;
	*used = at;
	return 0;
}

void qcow2_free_snapshots(struct qcow2 *q)
{
	free_all(q->snapshots, q->header.snapshot_count);
	q->snapshots = NULL;
}

/* The table does not say how long it is: read more of it until it is all there. */
static int read_table_co(struct ox_image_channel *channel, uint8_t **table, size_t *bytes,
                         struct ox_error *err)
{
	const struct qcow2 *q = channel->image->priv;
	const struct qcow2_header *h = &q->header;
	const char *what = channel->image->store->path;
	uint64_t file = channel->store->store->size, left;
	int rc;

	if (h->snapshots_offset >= file)
		return ox_error_set(
		        err, EINVAL,
		        "%s: the snapshot table is at offset %llu, behind the end of the "
		        "file (%llu bytes)",
		        what, (unsigned long long)h->snapshots_offset, (unsigned long long)file);
	left = ox_min(file - h->snapshots_offset, (uint64_t)TABLE_MAX);
	*bytes = (size_t)ox_min(left, ox_max((uint64_t)h->snapshot_count * 128, UINT64_C(4096)));
	for (;;) {
		*table = malloc(*bytes);
		if (!*table)
			return ox_error_set(err, ENOMEM, "%s: no memory for its snapshot table",
			                    what);
		rc = qcow2_read_co(channel, h->snapshots_offset, *table, *bytes);
		if (rc < 0) {
			ox_error_set(err, -rc, "%s: cannot read its snapshot table: %s", what,
			             strerror(-rc));
			break;
		}
		if (*bytes == left || table_is_complete(*table, *bytes, h->snapshot_count))
			return 0;
		free(*table);
		*bytes = (size_t)ox_min(left, (uint64_t)*bytes * 4);
	}
	free(*table);
	*table = NULL;
	return rc;
}

int qcow2_read_snapshots_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct qcow2 *q = channel->image->priv;
	const char *what = channel->image->store->path;
	uint64_t file = ox_align_up(channel->store->store->size, q->cluster_size);
	uint8_t *table = NULL;
	size_t bytes = 0, used;
	int rc;

	if (q->header.snapshot_count == 0)
		return 0;
	rc = read_table_co(channel, &table, &bytes, err);
	if (rc < 0)
		return rc;
	rc = qcow2_snapshots_parse(table, bytes, q->header.snapshot_count, q->cluster_size, what,
	                           &q->snapshots, &used, err);
	free(table);
	for (uint32_t i = 0; rc == 0 && q->snapshots && i < q->header.snapshot_count; i++) {
		struct qcow2_snapshot *s = &q->snapshots[i];

		if (s->disk_size == UINT64_MAX)
			s->disk_size = q->header.size;
		if (!ox_range_within(s->l1_offset, (uint64_t)s->l1_entries * 8, file) &&
		    s->l1_entries > 0)
			rc = ox_error_set(
			        err, EINVAL,
			        "%s: the L1 table of snapshot %u lies behind the end of the "
			        "file",
			        what, i + 1);
	}
	if (rc < 0)
		qcow2_free_snapshots(q);
	return rc;
}
