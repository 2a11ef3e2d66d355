/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The bitmap directory (specification, "Bitmaps").
 *
 * Oxbow keeps no dirty bitmaps yet, so the first write makes the stored ones that ought to follow
 * it (flag "auto") inconsistent: they get "in use" in the directory before anything else is
 * written, and every program that knows bitmaps then refuses to trust them.  Bitmaps that are not
 * enabled describe a time that has passed, and stay as good as they were.
 */
#include "image/qcow2/qcow2.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define ENTRY_BYTES     24u
#define FLAGS_AT        12u /* in an entry */
#define NAME_MAX_BYTES  1023u
#define TABLE_MAX       0x8000000u /* entries, as QEMU has it */
#define TYPE_DIRTY      1u
#define FLAG_IN_USE     1u
#define FLAG_AUTO       2u
#define FLAGS_KNOWN     7u
#define GRANULARITY_MIN 9u
#define GRANULARITY_MAX 31u

static void free_all(struct qcow2_bitmap *bitmaps, uint32_t count)
{
	for (uint32_t i = 0; bitmaps && i < count; i++)
		free(bitmaps[i].name);
	free(bitmaps);
}

/* *length: of the entry. */
static int parse_one(const uint8_t *data, size_t bytes, const char *what, uint32_t number,
                     struct qcow2_bitmap *b, size_t *length, struct ox_error *err)
{
	uint32_t name_bytes, extra_bytes;
	uint64_t end;

	if (bytes < ENTRY_BYTES)
		goto cut_off;
	b->table_offset = ox_get_be64(data);
	b->table_entries = ox_get_be32(data + 8);
	b->flags = ox_get_be32(data + FLAGS_AT);
	b->type = data[16];
	b->granularity_bits = data[17];
	name_bytes = ox_get_be16(data + 18);
	extra_bytes = ox_get_be32(data + 20);
	end = ENTRY_BYTES + (uint64_t)extra_bytes + name_bytes;
	if (ox_align_up(end, 8) > bytes)
		goto cut_off;
	if (name_bytes == 0 || name_bytes > NAME_MAX_BYTES)
		return ox_error_set(
		        err, EINVAL,
		        "%s: the name of bitmap %u is %u bytes long; allowed are 1 to %u", what,
		        number, name_bytes, NAME_MAX_BYTES);
	if (b->type != TYPE_DIRTY || (b->flags & ~FLAGS_KNOWN))
		return ox_error_set(err, ENOTSUP,
		                    "%s: bitmap %u has type %u and flags 0x%x, which this version "
		                    "does not know",
		                    what, number, b->type, b->flags);
	if (b->granularity_bits < GRANULARITY_MIN || b->granularity_bits > GRANULARITY_MAX)
		return ox_error_set(
		        err, EINVAL,
		        "%s: bitmap %u has a granularity of 2^%u bytes; allowed are 2^%u "
		        "to 2^%u",
		        what, number, b->granularity_bits, GRANULARITY_MIN, GRANULARITY_MAX);
	if (b->table_entries > TABLE_MAX || b->table_offset == 0 ||
	    !ox_is_aligned(b->table_offset, 512) ||
	    !ox_range_within(b->table_offset, (uint64_t)b->table_entries * 8, INT64_MAX))
		return ox_error_set(err, EINVAL,
		                    "%s: the table of bitmap %u (%u entries at offset %llu) cannot "
		                    "be there",
		                    what, number, b->table_entries,
		                    (unsigned long long)b->table_offset);
	b->name = ox_xcalloc(1, name_bytes + 1);
	memcpy(b->name, data + ENTRY_BYTES + extra_bytes, name_bytes);
	*length = (size_t)ox_align_up(end, 8);
	return 0;
cut_off:
	return ox_error_set(err, EINVAL, "%s: the bitmap directory is cut off in entry %u", what,
	                    number);
}

int qcow2_bitmaps_parse(const uint8_t *data, size_t bytes, uint32_t count, const char *what,
                        struct qcow2_bitmap **out, struct ox_error *err)
{
	struct qcow2_bitmap *bitmaps;
	size_t at = 0, length = 0;

	*out = NULL;
	if (count == 0)
		return 0;
	if (count > QCOW2_MAX_BITMAPS || count > bytes / ENTRY_BYTES)
		return ox_error_set(err, EINVAL,
		                    "%s: a bitmap directory of %zu bytes cannot hold %u bitmaps",
		                    what, bytes, count);
	bitmaps = ox_xcalloc(count, sizeof(*bitmaps));
	for (uint32_t i = 0; i < count; i++) {
		int rc = parse_one(data + at, bytes - at, what, i + 1, &bitmaps[i], &length, err);

		if (rc < 0) {
			free_all(bitmaps, count);
			return rc;
		}
		bitmaps[i].entry_offset = at;
		at += length;
	}
	if (at != bytes) {
		free_all(bitmaps, count);
		return ox_error_set(err, EINVAL,
		                    "%s: the bitmap directory's %u entries take %zu bytes; the "
		                    "header says %zu",
		                    what, count, at, bytes);
	}
	*out = bitmaps;
	return 0;
}

void qcow2_free_bitmaps(struct qcow2 *q)
{
	free_all(q->bitmaps, q->header.bitmap_count);
	q->bitmaps = NULL;
}

static int read_directory_co(struct ox_image_channel *channel, uint8_t **out)
{
	const struct qcow2 *q = channel->image->priv;
	uint64_t bytes = q->header.bitmap_directory_bytes;
	uint8_t *data = malloc(bytes);
	int rc;

	if (!data)
		return -ENOMEM;
	rc = qcow2_read_co(channel, q->header.bitmap_directory_offset, data, bytes);
	if (rc < 0) {
		free(data);
		return rc;
	}
	*out = data;
	return 0;
}

int qcow2_read_bitmaps_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct qcow2 *q = channel->image->priv;
	const struct qcow2_header *h = &q->header;
	const char *what = channel->image->store->path;
	uint64_t file = ox_align_up(channel->store->store->size, q->cluster_size);
	OX_FREE uint8_t *data = NULL;
	int rc;

	if (h->bitmap_count == 0)
		return 0;
	if (!ox_range_within(h->bitmap_directory_offset, h->bitmap_directory_bytes, file))
		return ox_error_set(err, EINVAL,
		                    "%s: the bitmap directory lies behind the end of the file",
		                    what);
	rc = read_directory_co(channel, &data);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read its bitmap directory: %s", what,
		                    strerror(-rc));
	rc = qcow2_bitmaps_parse(data, h->bitmap_directory_bytes, h->bitmap_count, what,
	                         &q->bitmaps, err);
	for (uint32_t i = 0; rc == 0 && q->bitmaps && i < h->bitmap_count; i++) {
		const struct qcow2_bitmap *b = &q->bitmaps[i];

		if (!ox_is_aligned(b->table_offset, q->cluster_size) ||
		    !ox_range_within(b->table_offset, (uint64_t)b->table_entries * 8, file))
			rc = ox_error_set(
			        err, EINVAL,
			        "%s: the table of bitmap %u is not where a cluster begins, "
			        "or behind the end of the file",
			        what, i + 1);
	}
	if (rc < 0)
		qcow2_free_bitmaps(q);
	return rc;
}

int qcow2_mark_bitmaps_co(struct ox_image_channel *channel, bool all)
{
	struct qcow2 *q = channel->image->priv;
	const struct qcow2_header *h = &q->header;
	OX_FREE uint8_t *data = NULL;
	unsigned changed = 0;
	int rc;

	for (uint32_t i = 0; q->bitmaps && i < h->bitmap_count; i++)
		changed += !(q->bitmaps[i].flags & FLAG_IN_USE) &&
		           (all || (q->bitmaps[i].flags & FLAG_AUTO));
	if (!changed)
		return 0;
	rc = read_directory_co(channel, &data);
	if (rc < 0)
		return rc;
	for (uint32_t i = 0; i < h->bitmap_count; i++) {
		struct qcow2_bitmap *b = &q->bitmaps[i];

		if (!all && !(b->flags & FLAG_AUTO))
			continue;
		b->flags |= FLAG_IN_USE;
		/* The entry is where it was at open: the image is locked. */
		ox_put_be32(data + b->entry_offset + FLAGS_AT, b->flags);
	}
	return ox_store_write_co(channel->store, h->bitmap_directory_offset, data,
	                         h->bitmap_directory_bytes, 0);
}
