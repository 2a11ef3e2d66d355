/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Where a guest's bytes are: from L1 and L2 entries to extents (specification, "L2 table entry" and
 * "Extended L2 Entries").
 *
 * lookup runs on any thread, without a lock, between whatever the others do: it reads one pointer
 * and then entries, each atomically.  What it answers was true at one moment during the call; that
 * is all that a request in flight beside a change may ask for.
 */
#include "image/qcow2/unit.h"
#include <errno.h>

#define CHANGING_TRIES 64

/* What one cluster (without subclusters) or a run of equal subclusters is. */
struct piece {
	uint8_t kind, flags;
	uint64_t host;  /* of the first byte asked for */
	uint64_t bytes; /* from there */
};

static void classify_host(const struct qcow2 *q, uint64_t entry, uint64_t offset,
                          struct piece *piece)
{
	uint64_t host = entry & QCOW2_OFFSET_MASK;

	if (host)
		piece->host = host + (offset & (q->cluster_size - 1));
	if (host && piece->kind != OX_EXTENT_DATA)
		piece->flags |= OX_EXTENT_RESERVED;
	if (piece->kind == OX_EXTENT_DATA && (entry & QCOW2_ENTRY_COPIED))
		piece->flags |= OX_EXTENT_IN_PLACE;
	if (q->data_file && !host)
		piece->host = offset & (q->cluster_size - 1);
}

/* How many subclusters from `first` on have the same two bits, and which. */
static unsigned same_subclusters(uint64_t bitmap, unsigned first, bool *allocated, bool *zero)
{
	uint32_t alloc = (uint32_t)bitmap >> first, zeroes = (uint32_t)(bitmap >> 32) >> first;
	uint32_t differ;

	*allocated = alloc & 1;
	*zero = zeroes & 1;
	differ = (*allocated ? ~alloc : alloc) | (*zero ? ~zeroes : zeroes);
	return differ ? ox_min((unsigned)__builtin_ctz(differ), 32 - first) : 32 - first;
}

static void classify(const struct qcow2 *q, uint64_t entry, uint64_t bitmap, uint64_t offset,
                     struct piece *piece)
{
	uint32_t in_cluster = offset & (q->cluster_size - 1);
	bool allocated, zero;
	unsigned first, count;

	*piece = (struct piece){.bytes = q->cluster_size - in_cluster};
	if (q->subclusters > 1) {
		first = in_cluster / q->subcluster_size;
		count = same_subclusters(bitmap, first, &allocated, &zero);
		piece->bytes = (uint64_t)(first + count) * q->subcluster_size - in_cluster;
		piece->kind = zero        ? OX_EXTENT_ZERO
		              : allocated ? OX_EXTENT_DATA
		                          : OX_EXTENT_BACKING;
	} else if (q->header.version >= 3 && (entry & QCOW2_ENTRY_ZERO)) {
		piece->kind = OX_EXTENT_ZERO;
	} else if ((entry & QCOW2_OFFSET_MASK) || (q->data_file && (entry & QCOW2_ENTRY_COPIED))) {
		/* The data file's first cluster is at offset 0: there the flag tells. */
		piece->kind = OX_EXTENT_DATA;
	} else {
		piece->kind = OX_EXTENT_BACKING;
	}
	classify_host(q, entry, offset, piece);
}

/* "Compressed Clusters Descriptor". */
void qcow2_compressed_range(const struct qcow2 *q, uint64_t entry, uint64_t *host, uint32_t *bytes)
{
	uint32_t bits = 62 - (q->cluster_bits - 8);
	uint64_t sectors = (entry & ~(QCOW2_ENTRY_COPIED | QCOW2_ENTRY_COMPRESSED)) >> bits;

	*host = entry & (((uint64_t)1 << bits) - 1);
	*bytes = (uint32_t)((sectors + 1) * 512 - (*host & 511));
}

static void compressed_extent(const struct qcow2 *q, uint64_t entry, uint64_t offset,
                              uint64_t length, struct ox_extent *extent)
{
	extent->kind = OX_EXTENT_COMPRESSED;
	extent->flags = 0;
	qcow2_compressed_range(q, entry, &extent->store_offset, &extent->store_bytes);
	extent->unit_offset = ox_align_down(offset, q->cluster_size);
	extent->unit_bytes = q->cluster_size;
	extent->length = ox_min(length, extent->unit_offset + q->cluster_size - offset);
}

/* What a file that ends early does not hold reads as zero. */
static void clip_to_file(const struct ox_image *image, struct ox_extent *extent)
{
	uint64_t size = __atomic_load_n(&image->data->size, __ATOMIC_RELAXED);

	if (ox_likely(ox_range_within(extent->store_offset, extent->length, size)))
		return;
	if (extent->store_offset >= size) {
		extent->kind = OX_EXTENT_ZERO;
		extent->flags = OX_EXTENT_RESERVED;
	} else {
		extent->length = size - extent->store_offset;
	}
}

static bool get_entry(const struct qcow2 *q, struct qcow2_unit *unit, uint32_t i, uint64_t *entry,
                      uint64_t *bitmap)
{
	for (int tries = 0; tries < CHANGING_TRIES; tries++) {
		if (ox_likely(qcow2_unit_get(q, unit, i, entry, bitmap)))
			return true;
		ox_cpu_relax();
	}
	return false;
}

static int lookup_in_unit(const struct ox_image *image, struct qcow2_unit *unit, uint64_t offset,
                          uint64_t length, struct ox_extent *extent)
{
	const struct qcow2 *q = image->priv;
	uint32_t n = qcow2_unit_entries(q);
	uint32_t i = (offset >> q->cluster_bits) & (n - 1);
	uint64_t entry, bitmap, at;
	struct piece piece;

	if (!get_entry(q, unit, i, &entry, &bitmap))
		return -EAGAIN;
	if (ox_unlikely(entry & QCOW2_ENTRY_COMPRESSED)) {
		compressed_extent(q, entry, offset, length, extent);
		return 0;
	}
	classify(q, entry, bitmap, offset, &piece);
	extent->kind = piece.kind;
	extent->flags = piece.flags;
	extent->store_offset = piece.host;
	at = piece.bytes;
	/* And what goes on in the same way behind it. */
	while (at < length) {
		i = ((offset + at) >> q->cluster_bits) & (n - 1);
		if (((offset + at) >> q->unit_shift) != (offset >> q->unit_shift) ||
		    !get_entry(q, unit, i, &entry, &bitmap) || (entry & QCOW2_ENTRY_COMPRESSED))
			break;
		classify(q, entry, bitmap, offset + at, &piece);
		if (piece.kind != extent->kind || piece.flags != extent->flags ||
		    ((piece.kind == OX_EXTENT_DATA || (piece.flags & OX_EXTENT_RESERVED)) &&
		     piece.host != extent->store_offset + at))
			break;
		at += piece.bytes;
	}
	extent->length = ox_min(at, length);
	if (extent->kind == OX_EXTENT_DATA)
		clip_to_file(image, extent);
	return 0;
}

int qcow2_lookup(struct ox_image *image, uint64_t offset, uint64_t length, struct ox_extent *extent)
{
	const struct qcow2 *q = image->priv;
	uint64_t index = offset >> q->unit_shift;
	struct qcow2_unit **units = __atomic_load_n(&q->units, __ATOMIC_ACQUIRE);
	struct qcow2_unit *unit = __atomic_load_n(&units[index], __ATOMIC_ACQUIRE);

	if (ox_likely(unit != NULL)) {
		if (!__atomic_load_n(&unit->used, __ATOMIC_RELAXED))
			__atomic_store_n(&unit->used, true, __ATOMIC_RELAXED);
		return lookup_in_unit(image, unit, offset, length, extent);
	}
	if (qcow2_l1_get(q, index >> q->units_per_table_shift) & QCOW2_OFFSET_MASK)
		return -EAGAIN;
	*extent = (struct ox_extent){
	        .kind = OX_EXTENT_BACKING,
	        .length = ox_min(length, ((index + 1) << q->unit_shift) - offset),
	};
	return 0;
}

int qcow2_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                 struct ox_extent *extent)
{
	struct qcow2 *q = channel->image->priv;
	int rc;

	for (;;) {
		rc = qcow2_lookup(channel->image, offset, length, extent);
		if (rc != -EAGAIN)
			return rc;
		rc = qcow2_unit_load_co(channel, offset >> q->unit_shift);
		if (rc < 0)
			return rc;
	}
}

int qcow2_apply_co(struct ox_image_channel *channel, unsigned level, uint64_t index, uint64_t entry,
                   uint64_t bitmap)
{
	struct qcow2 *q = channel->image->priv;
	uint32_t n = qcow2_unit_entries(q);
	struct qcow2_unit *unit;
	int rc = 0;

	if (level == 1) {
		uint64_t table = entry & QCOW2_OFFSET_MASK;

		if (index >= q->l1_entries || !table || !ox_is_aligned(table, q->cluster_size))
			return -EINVAL;
		pthread_mutex_lock(&q->lock);
		if ((qcow2_l1_get(q, index) & QCOW2_OFFSET_MASK) != table) {
			if (qcow2_is_data_range(q, table, q->cluster_size))
				qcow2_add_metadata_range(q, table, q->cluster_size);
			else
				rc = -EINVAL;
		}
		if (rc == 0)
			qcow2_l1_set(q, (uint32_t)index, entry, true);
		pthread_mutex_unlock(&q->lock);
		return rc;
	}
	if (level != 2 || index / n >= q->unit_count ||
	    !(qcow2_l1_get(q, (index / n) >> q->units_per_table_shift) & QCOW2_OFFSET_MASK))
		return -EINVAL;
	for (;;) {
		rc = qcow2_unit_load_co(channel, index / n);
		if (rc < 0)
			return rc;
		pthread_mutex_lock(&q->lock);
		unit = qcow2_unit_array(channel, index / n);
		if (unit) {
			if (qcow2_entry_is_sane(q, index, entry, bitmap))
				qcow2_unit_set(q, unit, index % n, entry, bitmap, true);
			else
				rc = -EINVAL;
		}
		pthread_mutex_unlock(&q->lock);
		if (unit)
			return rc;
	}
}
