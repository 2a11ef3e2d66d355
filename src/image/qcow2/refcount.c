/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Refcounts: how often the image refers to each cluster of its file.
 *
 * Refcount blocks are kept in parts of block_bytes, in the file's byte order, loaded when somebody
 * asks and dropped, when clean, the longest unused first.  A part that lies wholly behind the
 * frontier counts nothing and is made without a read.
 *
 * Locking: the gate and q->lock, see alloc.h.  Parts are made and dropped with the gate held, so
 * its holder's pointers stay good until it lets a part go; commit.c's stay good because dirty parts
 * and those that it writes are not dropped.
 *
 * Crash ordering: a change here only marks pieces dirty.  Counting up is made durable by
 * qcow2_settle_co() before anybody has the cluster (R1); counting down happens only after the
 * removal of what referred to the cluster is durable (R3).  So pieces may reach the file at any
 * time, in any order.
 */
#include "image/qcow2/alloc.h"
#include "base/byteorder.h"
#include <assert.h>
#include <errno.h>
#include <string.h>

/* --- entries ------------------------------------------------------------------------------- */

uint64_t qcow2_refcount_get(const uint8_t *block, unsigned bits, uint64_t index)
{
	switch (bits) {
	case 8:
		return block[index];
	case 16:
		return ox_get_be16(block + index * 2);
	case 32:
		return ox_get_be32(block + index * 4);
	case 64:
		return ox_get_be64(block + index * 8);
	default: /* 1, 2, 4: the first entry is in a byte's lowest bits */
		return block[index * bits / 8] >> index * bits % 8 & ((1u << bits) - 1);
	}
}

void qcow2_refcount_set(uint8_t *block, unsigned bits, uint64_t index, uint64_t value)
{
	unsigned shift, mask;

	switch (bits) {
	case 8:
		block[index] = (uint8_t)value;
		return;
	case 16:
		ox_put_be16(block + index * 2, (uint16_t)value);
		return;
	case 32:
		ox_put_be32(block + index * 4, (uint32_t)value);
		return;
	case 64:
		ox_put_be64(block + index * 8, value);
		return;
	default:
		shift = (unsigned)(index * bits % 8);
		mask = ((1u << bits) - 1) << shift;
		block += index * bits / 8;
		*block = (uint8_t)((*block & ~mask) | ((unsigned)value << shift & mask));
	}
}

static uint64_t max_refcount(const struct qcow2 *q)
{
	return UINT64_MAX >> (64 - q->refcount_bits);
}

/* --- parts ----------------------------------------------------------------------------------- */

void qcow2_parts_init(struct qcow2_allocator *a)
{
	for (unsigned i = 0; i < QCOW2_PART_BUCKETS; i++)
		LIST_INIT(&a->parts[i]);
	TAILQ_INIT(&a->ages);
}

static void drop_part(struct qcow2_allocator *a, struct qcow2_part *part)
{
	LIST_REMOVE(part, hash);
	TAILQ_REMOVE(&a->ages, part, age);
	a->part_memory -= part->block.bytes;
	free(part->bytes);
	free(part);
}

void qcow2_parts_free(struct qcow2_allocator *a)
{
	struct qcow2_part *part;

	while ((part = TAILQ_FIRST(&a->ages)))
		drop_part(a, part);
}

static struct qcow2_part_bucket *bucket_of(struct qcow2_allocator *a, uint64_t index)
{
	return &a->parts[(index ^ index >> 10) % QCOW2_PART_BUCKETS];
}

static struct qcow2_part *find_part(struct qcow2_allocator *a, uint64_t index)
{
	struct qcow2_part *part;

	LIST_FOREACH (part, bucket_of(a, index), hash) {
		if (part->index == index)
			return part;
	}
	return NULL;
}

static void encode_part(const struct qcow2_block *block, uint32_t offset, uint32_t bytes,
                        uint8_t *out)
{
	const struct qcow2_part *part = ox_container_of(block, const struct qcow2_part, block);

	memcpy(out, part->bytes + offset, bytes);
}

/* Busy: a commit or a batch knows the block. */
static bool is_busy(const struct qcow2_part *part)
{
	return part->block.dirty || part->block.writing || part->block.listed;
}

/* Drops clean parts until the rest and `more` bytes fit.  Lock held. */
static void drop_clean(struct qcow2_allocator *a, size_t more)
{
	struct qcow2_part *part, *next;

	for (part = TAILQ_FIRST(&a->ages); part && a->part_memory + more > QCOW2_PARTS_MAX;
	     part = next) {
		next = TAILQ_NEXT(part, age);
		if (!is_busy(part))
			drop_part(a, part);
	}
}

/* The memory for a part, read or empty; not yet among the others. */
static int make_part_co(struct ox_image_channel *channel, uint64_t index, uint64_t block,
                        struct qcow2_part **out)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t in_block = index & ((UINT64_C(1) << (a->block_shift - a->part_shift)) - 1);
	struct qcow2_part *part = calloc(1, sizeof(*part));
	int rc = 0;

	if (part)
		part->bytes = aligned_alloc(ox_min(q->block_bytes, 4096u), q->block_bytes);
	if (!part || !part->bytes) {
		free(part);
		return -ENOMEM;
	}
	part->index = index;
	part->block.store_offset = block + in_block * q->block_bytes;
	part->block.bytes = q->block_bytes;
	part->block.encode = encode_part;
	if (a->begun && index << a->part_shift >= a->frontier)
		memset(part->bytes, 0, q->block_bytes);
	else
		rc = ox_store_read_co(channel->store, part->block.store_offset, part->bytes,
		                      q->block_bytes);
	if (rc < 0) {
		free(part->bytes);
		free(part);
		return rc;
	}
	*out = part;
	return 0;
}

int qcow2_part_get_co(struct ox_image_channel *channel, uint64_t index, struct qcow2_part **out)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t block_index = index >> (a->block_shift - a->part_shift), block;
	struct qcow2_part *part;
	int rc;

	*out = NULL;
	pthread_mutex_lock(&q->lock);
	part = find_part(a, index);
	if (part) {
		TAILQ_REMOVE(&a->ages, part, age);
		TAILQ_INSERT_TAIL(&a->ages, part, age);
	}
	pthread_mutex_unlock(&q->lock);
	if (part) {
		*out = part;
		return 0;
	}
	block = block_index < a->table_entries ? a->table[block_index] : 0;
	if (block == 0)
		return 0;
	if (a->damaged && !ox_is_aligned(block, q->cluster_size))
		return -EIO;
	rc = make_part_co(channel, index, block, &part);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	drop_clean(a, q->block_bytes);
	LIST_INSERT_HEAD(bucket_of(a, index), part, hash);
	TAILQ_INSERT_TAIL(&a->ages, part, age);
	a->part_memory += q->block_bytes;
	pthread_mutex_unlock(&q->lock);
	*out = part;
	return 0;
}

uint64_t qcow2_part_count(const struct qcow2 *q, const struct qcow2_part *part, uint64_t cluster)
{
	return qcow2_refcount_get(part->bytes, q->refcount_bits,
	                          cluster & ((UINT64_C(1) << q->alloc->part_shift) - 1));
}

int qcow2_parts_write_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;

	for (;;) {
		OX_FREE struct qcow2_block **blocks = NULL;
		struct qcow2_part *part;
		unsigned busy = 0, count = 0;
		int rc;

		pthread_mutex_lock(&q->lock);
		TAILQ_FOREACH (part, &a->ages, age)
			busy += part->block.dirty || part->block.writing;
		blocks = busy ? calloc(busy, sizeof(struct qcow2_block *)) : NULL;
		if (blocks) {
			TAILQ_FOREACH (part, &a->ages, age) {
				if (part->block.dirty || part->block.writing)
					blocks[count++] = &part->block;
			}
		}
		pthread_mutex_unlock(&q->lock);
		if (busy == 0)
			return 0;
		if (!blocks)
			return -ENOMEM;
		/* Nobody else changes refcounts: a second turn happens only when a commit that
		 * was writing a piece failed, and this fiber's own write then says so. */
		rc = qcow2_write_blocks_co(channel, blocks, count);
		if (rc < 0)
			return rc;
	}
}

int qcow2_parts_trim_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	bool many;

	pthread_mutex_lock(&q->lock);
	drop_clean(a, 0);
	many = a->part_memory > QCOW2_PARTS_MAX;
	pthread_mutex_unlock(&q->lock);
	return many ? qcow2_parts_write_co(channel) : 0;
}

/* --- changes -------------------------------------------------------------------------------- */

static int change_one(const struct qcow2 *q, struct qcow2_part *part, uint64_t index,
                      enum qcow2_count how, uint64_t *value)
{
	uint64_t now = qcow2_refcount_get(part->bytes, q->refcount_bits, index);

	*value = now;
	if (how == QCOW2_COUNT_UP && now == max_refcount(q))
		return -ERANGE;
	if (how == QCOW2_COUNT_DOWN && now == 0)
		return -EUCLEAN;
	*value = how == QCOW2_COUNT_UP ? now + 1 : how == QCOW2_COUNT_DOWN ? now - 1 : 0;
	qcow2_refcount_set(part->bytes, q->refcount_bits, index, *value);
	return 0;
}

/* Marks what holds the entries [index, index + count) dirty. */
static void dirty_entries(struct qcow2 *q, struct qcow2_part *part, uint64_t index, uint64_t count)
{
	uint32_t from = (uint32_t)(index * q->refcount_bits / 8);
	uint32_t to = (uint32_t)(((index + count) * q->refcount_bits + 7) / 8);

	qcow2_dirty(q, &part->block, from, to - from, false);
}

/* Within one part.  Lock held. */
static int change_part(struct qcow2 *q, struct qcow2_part *part, uint64_t index, uint64_t count,
                       enum qcow2_count how)
{
	int rc = 0;

	for (uint64_t i = index; i < index + count; i++) {
		uint64_t value;
		int one = change_one(q, part, i, how, &value);

		rc = rc < 0 ? rc : one;
	}
	dirty_entries(q, part, index, count);
	return rc;
}

/* Tells of what is 0 among the part's entries. */
static void tell_freed(const struct qcow2 *q, const struct qcow2_part *part, uint64_t first,
                       uint64_t count, void (*freed)(void *arg, uint64_t first, uint64_t count),
                       void *arg)
{
	uint64_t at = first, end = first + count, start;

	while (at < end) {
		while (at < end && qcow2_part_count(q, part, at) != 0)
			at++;
		start = at;
		while (at < end && qcow2_part_count(q, part, at) == 0)
			at++;
		if (at > start)
			freed(arg, start, at - start);
	}
}

int qcow2_count_co(struct ox_image_channel *channel, uint64_t first, uint64_t count,
                   enum qcow2_count how, void (*freed)(void *arg, uint64_t first, uint64_t count),
                   void *arg)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t mask = (UINT64_C(1) << a->part_shift) - 1;
	int result = 0;

	while (count > 0) {
		uint64_t here = ox_min(count, mask + 1 - (first & mask));
		struct qcow2_part *part;
		int rc = qcow2_part_get_co(channel, first >> a->part_shift, &part);

		if (rc == 0 && part) {
			pthread_mutex_lock(&q->lock);
			rc = change_part(q, part, first & mask, here, how);
			pthread_mutex_unlock(&q->lock);
			/* An underflow leaves entries at 0 that were not this call's to free. */
			if (freed && rc == 0)
				tell_freed(q, part, first, here, freed, arg);
		} else if (rc == 0 && how != QCOW2_COUNT_CLEAR) {
			rc = how == QCOW2_COUNT_UP ? -EIO : -EUCLEAN;
		}
		result = result < 0 ? result : rc;
		first += here;
		count -= here;
	}
	return result;
}

int qcow2_refcount_co(struct ox_image_channel *channel, uint64_t cluster, uint64_t *refcount)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_part *part;
	struct ox_range range;
	int rc;

	*refcount = 0;
	pthread_mutex_lock(&q->lock);
	part = find_part(a, cluster >> a->part_shift);
	if (part)
		*refcount = qcow2_part_count(q, part, cluster);
	pthread_mutex_unlock(&q->lock);
	if (part)
		return 0;
	qcow2_gate_enter_co(a, &range, channel);
	rc = qcow2_part_get_co(channel, cluster >> a->part_shift, &part);
	if (rc == 0 && part)
		*refcount = qcow2_part_count(q, part, cluster);
	qcow2_gate_leave(a, &range);
	return rc;
}
