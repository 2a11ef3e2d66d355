/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The header of a qed image: bytes to numbers and back (qed_spec, "Header").  Pure.
 *
 * What passes here is within the format's limits, and neither the header's clusters nor L1 reach
 * behind the file's end; all of the driver's arithmetic relies on that.
 */
#include "image/qed/qed.h"
#include "base/byteorder.h"
#include <errno.h>

uint64_t qed_max_size(uint32_t cluster_size, uint32_t table_size)
{
	uint64_t entries = (uint64_t)cluster_size * table_size / sizeof(uint64_t);
	uint64_t of_table = entries * cluster_size;

	return of_table > INT64_MAX / entries ? INT64_MAX : of_table * entries;
}

static int check_layout(const struct qed_header *h, uint64_t file_bytes, const char *what,
                        struct ox_error *err)
{
	uint64_t cluster = h->cluster_size;
	uint64_t whole;

	if (!ox_is_power_of_2(cluster) || cluster < QED_MIN_CLUSTER || cluster > QED_MAX_CLUSTER)
		return ox_error_set(err, EINVAL,
		                    "%s: the qed header says cluster size %u; allowed are powers "
		                    "of two from 4096 to 67108864",
		                    what, h->cluster_size);
	if (!ox_is_power_of_2(h->table_size) || h->table_size > QED_MAX_TABLE)
		return ox_error_set(err, EINVAL,
		                    "%s: the qed header says that a table has %u clusters; "
		                    "allowed are 1, 2, 4, 8 and 16",
		                    what, h->table_size);
	whole = ox_align_down(file_bytes, cluster);
	if (h->header_size == 0 || h->header_size * cluster > whole)
		return ox_error_set(err, EINVAL,
		                    "%s: the qed header says that it takes %u clusters; the file "
		                    "has %llu",
		                    what, h->header_size, (unsigned long long)(whole / cluster));
	if (!ox_is_aligned(h->l1_offset, cluster) || h->l1_offset < h->header_size * cluster ||
	    !ox_range_within(h->l1_offset, qed_table_bytes(h), whole))
		return ox_error_set(err, EINVAL,
		                    "%s: the qed header says that the L1 table is at %#llx, which "
		                    "is not a place for it in a file of %llu bytes",
		                    what, (unsigned long long)h->l1_offset,
		                    (unsigned long long)file_bytes);
	if (h->image_size % 512 != 0 ||
	    h->image_size > qed_max_size(h->cluster_size, h->table_size))
		return ox_error_set(
		        err, EINVAL,
		        "%s: the qed header says that the disk has %llu bytes; it must "
		        "be a multiple of 512 and at most %llu",
		        what, (unsigned long long)h->image_size,
		        (unsigned long long)qed_max_size(h->cluster_size, h->table_size));
	return 0;
}

int qed_header_parse(const uint8_t *data, size_t bytes, uint64_t file_bytes, const char *what,
                     struct qed_header *h, struct ox_error *err)
{
	int rc;

	if (bytes < QED_HEADER_BYTES || ox_get_le32(data) != QED_MAGIC)
		return ox_error_set(err, EINVAL, "%s: is not a qed image", what);
	*h = (struct qed_header){
	        .cluster_size = ox_get_le32(data + 4),
	        .table_size = ox_get_le32(data + 8),
	        .header_size = ox_get_le32(data + 12),
	        .features = ox_get_le64(data + 16),
	        .compat_features = ox_get_le64(data + 24),
	        .autoclear_features = ox_get_le64(data + 32),
	        .l1_offset = ox_get_le64(data + 40),
	        .image_size = ox_get_le64(data + 48),
	        .backing_offset = ox_get_le32(data + 56),
	        .backing_bytes = ox_get_le32(data + 60),
	};
	if (h->features & ~(uint64_t)QED_F_KNOWN)
		return ox_error_set(err, ENOTSUP,
		                    "%s: uses qed features that this version does not know "
		                    "(bits %#llx)",
		                    what,
		                    (unsigned long long)(h->features & ~(uint64_t)QED_F_KNOWN));
	rc = check_layout(h, file_bytes, what, err);
	if (rc < 0 || !(h->features & QED_F_BACKING_FILE))
		return rc;
	if (h->backing_bytes == 0 || h->backing_bytes > QED_MAX_NAME ||
	    !ox_range_within(h->backing_offset, h->backing_bytes,
	                     (uint64_t)h->header_size * h->cluster_size))
		return ox_error_set(err, EINVAL,
		                    "%s: the qed header says that the backing file's name has %u "
		                    "bytes and is at %u; it must be within the header's clusters "
		                    "and have 1 to %u bytes",
		                    what, h->backing_bytes, h->backing_offset, QED_MAX_NAME);
	return 0;
}

void qed_header_encode(const struct qed_header *h, uint8_t out[QED_HEADER_BYTES])
{
	ox_put_le32(out, QED_MAGIC);
	ox_put_le32(out + 4, h->cluster_size);
	ox_put_le32(out + 8, h->table_size);
	ox_put_le32(out + 12, h->header_size);
	ox_put_le64(out + 16, h->features);
	ox_put_le64(out + 24, h->compat_features);
	ox_put_le64(out + 32, h->autoclear_features);
	ox_put_le64(out + 40, h->l1_offset);
	ox_put_le64(out + 48, h->image_size);
	ox_put_le32(out + 56, h->backing_offset);
	ox_put_le32(out + 60, h->backing_bytes);
}
