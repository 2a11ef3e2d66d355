/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Space for what is written, and its entries in the map.
 *
 * Two ways:
 *   allocate   where the old content is zero and the new space reads as zero too, an entry may be
 *              in force before its data: a reader sees zeroes or the new data, now and after a
 * power cut.  So the write becomes a hit at once, without a fiber, and everybody else's to the same
 * cluster too. prepare, publish everything else: the entry changes when the data and what is filled
 * around it are written; its block is `after_data` then. The first way takes no range lock.  So
 * that the two never meet on one cluster, whatever can go the first way goes it, also from prepare
 * (which then answers -EAGAIN: look again).
 *
 * What a cluster is decides (enum state): NOTHING: no host cluster, nothing in a backing image:
 * zero. COVERED: no host cluster, and a backing image may have data below.  OWN: a host cluster of
 * this image alone, of which this part (subclusters, or a zero cluster with reserved space) is not
 * in force.  FOREIGN: a host cluster that a snapshot shares, or a compressed one: written somewhere
 * else.
 *
 * An L2 table that a snapshot shares (its L1 entry is not "copied") never changes: before the first
 * change it is copied whole.
 *
 * Every change of the map is noted for the case that the process is killed (record.c) before the
 * request that made it ends.
 */
#include "base/fiber.h"
#include "image/qcow2/unit.h"
#include <errno.h>
#include <string.h>

/* Entries changed with the lock held at most. */
#define CHANGES_AT_ONCE 512u

enum state { IN_PLACE, NOTHING, COVERED, OWN, FOREIGN };

/* ox_allocation's priv. */
enum { PRIV_HOST, PRIV_CLUSTERS, PRIV_STATE, PRIV_TAKEN };

static uint64_t guest_cluster_start(const struct qcow2 *q, uint64_t offset)
{
	return ox_align_down(offset, q->cluster_size);
}

/* May the backing image have anything but zeroes from here on, as far as sizes tell? */
static bool is_covered(const struct ox_image *image, uint64_t offset)
{
	return image->backing_file &&
	       (!image->backing ||
	        offset < __atomic_load_n(&image->backing->size, __ATOMIC_RELAXED));
}

static uint64_t all_subclusters(const struct qcow2 *q)
{
	return q->subclusters > 1 ? 0xffffffffull : 0;
}

/* The subclusters that [offset, offset + bytes) touches, within its first cluster. */
static uint32_t touched_subclusters(const struct qcow2 *q, uint64_t offset, uint64_t bytes)
{
	uint64_t in_cluster = offset & (q->cluster_size - 1);
	uint64_t end = ox_min(in_cluster + bytes, (uint64_t)q->cluster_size);
	unsigned first = (unsigned)(in_cluster / q->subcluster_size);
	unsigned last = (unsigned)((end - 1) / q->subcluster_size);

	return (uint32_t)((2ull << last) - (1ull << first));
}

static bool has_host(const struct qcow2 *q, uint64_t entry)
{
	return (entry & QCOW2_OFFSET_MASK) || (q->data_file && (entry & QCOW2_ENTRY_COPIED));
}

/* The state of the part of a cluster that begins at `offset` (and of the cluster, if it has no host
 * cluster). */
static enum state get_state(const struct ox_image *image, uint64_t offset, uint64_t entry,
                            uint64_t bitmap)
{
	const struct qcow2 *q = image->priv;
	uint64_t start = guest_cluster_start(q, offset);

	if (entry & QCOW2_ENTRY_COMPRESSED)
		return FOREIGN;
	if (!has_host(q, entry)) {
		if (!is_covered(image, start))
			return NOTHING;
		if (q->subclusters > 1)
			return (uint32_t)(bitmap >> 32) == 0xffffffffu ? NOTHING : COVERED;
		return q->header.version >= 3 && (entry & QCOW2_ENTRY_ZERO) ? NOTHING : COVERED;
	}
	if (!(entry & QCOW2_ENTRY_COPIED))
		return FOREIGN;
	if (q->subclusters > 1)
		return bitmap & touched_subclusters(q, offset, 1) ? IN_PLACE : OWN;
	return q->header.version >= 3 && (entry & QCOW2_ENTRY_ZERO) ? OWN : IN_PLACE;
}

/* --- tables ----------------------------------------------------------------------------------- */

/* The unit, ready to be changed; NULL: table_co() first.  Lock held. */
static struct qcow2_unit *writable_unit(struct ox_image_channel *channel, uint64_t index)
{
	const struct qcow2 *q = channel->image->priv;
	uint64_t table = index >> q->units_per_table_shift;

	if (!q->units[index] || !(qcow2_l1_get(q, table) & QCOW2_ENTRY_COPIED))
		return NULL;
	return qcow2_unit_array(channel, index);
}

/* A new, empty table in [host, +cluster).  Lock held. */
static int install_table(struct ox_image_channel *channel, uint64_t index, uint64_t host,
                         bool zeroed)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t part = index & (((uint64_t)1 << q->units_per_table_shift) - 1);

	/* Before L1: a lookup that finds the entry there finds the unit. */
	if (!qcow2_unit_new(channel, index, host + part * q->block_bytes))
		return -ENOMEM;
	qcow2_l1_set(q, (uint32_t)(index >> q->units_per_table_shift), host | QCOW2_ENTRY_COPIED,
	             !zeroed);
	qcow2_add_metadata_range(q, host, q->cluster_size);
	return 0;
}

static int zero_store_co(struct ox_channel *store, uint64_t offset, uint64_t bytes)
{
	struct ox_io io = {.op = OX_IO_ZERO, .offset = offset, .length = bytes};

	return ox_store_submit_co(store, &io);
}

/* Takes a cluster for a table; zeroed on the disk if it must be.  0: *host, and the lock is held.
 */
static int take_table_co(struct ox_image_channel *channel, uint64_t *host, bool *zeroed)
{
	struct qcow2 *q = channel->image->priv;
	int rc;

	for (;;) {
		pthread_mutex_lock(&q->lock);
		rc = qcow2_record_has_room(q, 1) ? qcow2_alloc_take_table(channel, host, zeroed)
		                                 : -ENOBUFS;
		if (rc == 0)
			break;
		pthread_mutex_unlock(&q->lock);
		rc = rc == -ENOBUFS ? qcow2_commit_co(channel) : qcow2_alloc_more_co(channel);
		if (rc < 0)
			return rc;
	}
	if (*zeroed)
		return 0;
	pthread_mutex_unlock(&q->lock);
	rc = zero_store_co(channel->store, *host, q->cluster_size);
	pthread_mutex_lock(&q->lock);
	if (rc == 0)
		return 0;
	qcow2_alloc_untake(channel, *host, 1);
	pthread_mutex_unlock(&q->lock);
	return rc;
}

static void note(struct qcow2 *q, unsigned level, uint64_t index, uint64_t entry, uint64_t bitmap)
{
	/* Room was asked for. */
	if (q->record)
		(void)qcow2_record_note(q, level, index, entry, bitmap);
}

static int new_table_co(struct ox_image_channel *channel, uint64_t index)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t host, table = index >> q->units_per_table_shift;
	bool zeroed;
	int rc = take_table_co(channel, &host, &zeroed);

	if (rc < 0)
		return rc;
	if (qcow2_l1_get(q, table) & QCOW2_OFFSET_MASK) {
		/* Somebody else made it meanwhile. */
		qcow2_alloc_untake(channel, host, 1);
	} else {
		rc = install_table(channel, index, host, zeroed);
		if (rc < 0)
			qcow2_alloc_untake(channel, host, 1);
		else
			note(q, 1, table, host | QCOW2_ENTRY_COPIED, 0);
	}
	pthread_mutex_unlock(&q->lock);
	return rc;
}

/* The table's content, as it is in the file: nobody changes a shared one. */
static int copy_cluster_co(struct ox_image_channel *channel, uint64_t from, uint64_t to)
{
	const struct qcow2 *q = channel->image->priv;
	OX_FREE uint8_t *copy = aligned_alloc(4096, ox_max(q->cluster_size, 4096u));
	int rc;

	if (!copy)
		return -ENOMEM;
	rc = ox_store_read_co(channel->store, from, copy, q->cluster_size);
	return rc < 0 ? rc : ox_store_write_co(channel->store, to, copy, q->cluster_size, 0);
}

static int copy_table_co(struct ox_image_channel *channel, uint64_t index)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t per_table = (uint64_t)1 << q->units_per_table_shift;
	uint64_t table = index >> q->units_per_table_shift, host, old = qcow2_l1_get(q, table);
	bool zeroed;
	int rc = take_table_co(channel, &host, &zeroed);

	if (rc < 0)
		return rc;
	pthread_mutex_unlock(&q->lock);
	rc = copy_cluster_co(channel, old & QCOW2_OFFSET_MASK, host);
	pthread_mutex_lock(&q->lock);
	if (rc < 0 || qcow2_l1_get(q, table) != old) {
		qcow2_alloc_untake(channel, host, 1);
		pthread_mutex_unlock(&q->lock);
		return rc;
	}
	for (uint64_t part = 0; part < per_table; part++) {
		struct qcow2_unit *unit = q->units[(table << q->units_per_table_shift) + part];

		if (unit)
			unit->block.store_offset = host + part * q->block_bytes;
	}
	/* The copy is data to this entry: durable before it. */
	qcow2_l1_set(q, (uint32_t)table, host | QCOW2_ENTRY_COPIED, true);
	qcow2_add_metadata_range(q, host, q->cluster_size);
	note(q, 1, table, host | QCOW2_ENTRY_COPIED, 0);
	qcow2_remove_metadata_range(q, old & QCOW2_OFFSET_MASK, q->cluster_size);
	qcow2_free_later(channel, old & QCOW2_OFFSET_MASK, q->cluster_size);
	pthread_mutex_unlock(&q->lock);
	return 0;
}

/* Brings the unit nearer to being writable. */
static int table_co(struct ox_image_channel *channel, uint64_t index)
{
	const struct qcow2 *q = channel->image->priv;
	uint64_t l1 = qcow2_l1_get(q, index >> q->units_per_table_shift);

	if (!(l1 & QCOW2_OFFSET_MASK))
		return new_table_co(channel, index);
	/* Loading also checks the L1 entry. */
	if (!__atomic_load_n(&q->units[index], __ATOMIC_ACQUIRE))
		return qcow2_unit_load_co(channel, index);
	return l1 & QCOW2_ENTRY_COPIED ? -ENOMEM : copy_table_co(channel, index);
}

/* The unit and room for so many notes; 0: the lock is held. */
static int writable_unit_co(struct ox_image_channel *channel, uint64_t index, unsigned notes,
                            struct qcow2_unit **unit)
{
	struct qcow2 *q = channel->image->priv;
	int rc;

	for (;;) {
		if (__atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
			return -EIO;
		pthread_mutex_lock(&q->lock);
		if (!qcow2_record_has_room(q, notes)) {
			pthread_mutex_unlock(&q->lock);
			rc = qcow2_commit_co(channel);
		} else {
			*unit = writable_unit(channel, index);
			if (*unit)
				return 0;
			pthread_mutex_unlock(&q->lock);
			rc = table_co(channel, index);
		}
		if (rc < 0)
			return rc;
	}
}

/* --- one cluster's entry ------------------------------------------------------------------------
 */

static uint32_t entry_number(const struct qcow2 *q, uint64_t offset)
{
	return (uint32_t)(offset >> q->cluster_bits) & (qcow2_unit_entries(q) - 1);
}

static void get_entry(const struct qcow2 *q, struct qcow2_unit *unit, uint64_t offset,
                      uint64_t *entry, uint64_t *bitmap)
{
	/* Under the lock nobody changes it. */
	(void)qcow2_unit_get(q, unit, entry_number(q, offset), entry, bitmap);
}

static void set_entry(struct qcow2 *q, struct qcow2_unit *unit, uint64_t offset, uint64_t entry,
                      uint64_t bitmap, bool after_data)
{
	qcow2_unit_set(q, unit, entry_number(q, offset), entry, bitmap, after_data);
	note(q, 2, offset >> q->cluster_bits, entry, bitmap);
}

/* The map no longer refers to what the entry says. */
static void free_entry(struct ox_image_channel *channel, uint64_t entry)
{
	const struct qcow2 *q = channel->image->priv;
	uint64_t host;
	uint32_t bytes;

	if (entry & QCOW2_ENTRY_COMPRESSED) {
		qcow2_compressed_range(q, entry, &host, &bytes);
		qcow2_free_later(channel, host, bytes);
	} else if ((entry & QCOW2_OFFSET_MASK) && !q->data_file) {
		qcow2_free_later(channel, entry & QCOW2_OFFSET_MASK, q->cluster_size);
	}
}

/* How many clusters from the one at `offset` on are in this state, up to the one that holds `end` -
 * 1 and within the unit. */
static unsigned count_state(struct ox_image *image, struct qcow2_unit *unit, uint64_t offset,
                            uint64_t end, enum state state)
{
	const struct qcow2 *q = image->priv;
	unsigned count = 0;
	uint64_t entry, bitmap;

	for (uint64_t at = guest_cluster_start(q, offset); at < end; at += q->cluster_size) {
		if ((at >> q->unit_shift) != unit->index || count == CHANGES_AT_ONCE)
			break;
		get_entry(q, unit, at, &entry, &bitmap);
		if (get_state(image, ox_max(at, offset), entry, bitmap) != state)
			break;
		count++;
	}
	return count;
}

/* --- the first way ------------------------------------------------------------------------------
 */

/* Gives clusters without content to [offset, end), as many as there are at once.  Lock held. */
static int allocate_fresh(struct ox_image_channel *channel, struct qcow2_unit *unit,
                          uint64_t offset, uint64_t end, bool *zeroed, uint64_t *host,
                          unsigned *got)
{
	struct qcow2 *q = channel->image->priv;
	unsigned want = count_state(channel->image, unit, offset, end, NOTHING);

	if (want == 0)
		return -EAGAIN;
	if (!qcow2_record_has_room(q, want))
		return -EAGAIN;
	return qcow2_alloc_take(channel, want, host, got, zeroed);
}

static void publish_fresh(struct ox_image_channel *channel, struct qcow2_unit *unit,
                          uint64_t offset, uint64_t host, unsigned count, bool after_data)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t at = guest_cluster_start(q, offset);

	for (unsigned i = 0; i < count; i++) {
		set_entry(q, unit, at, host | QCOW2_ENTRY_COPIED, all_subclusters(q), after_data);
		at += q->cluster_size;
		host += q->cluster_size;
	}
}

/* Encrypted zeroes are not zeroes, and a data file's space is not ours to know. */
static bool fresh_space_is_zero(const struct ox_image *image)
{
	return !image->crypto && !((const struct qcow2 *)image->priv)->data_file;
}

int qcow2_allocate(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *unit;
	uint64_t host;
	unsigned got;
	bool zeroed;
	int rc = -EAGAIN;

	if (!fresh_space_is_zero(channel->image) || __atomic_load_n(&q->corrupt, __ATOMIC_RELAXED))
		return -EAGAIN;
	pthread_mutex_lock(&q->lock);
	unit = writable_unit(channel, offset >> q->unit_shift);
	if (unit)
		rc = allocate_fresh(channel, unit, offset, offset + length, &zeroed, &host, &got);
	if (rc == 0 && !zeroed) {
		qcow2_alloc_untake(channel, host, got);
		rc = -EAGAIN;
	}
	if (rc == 0)
		publish_fresh(channel, unit, offset, host, got, false);
	pthread_mutex_unlock(&q->lock);
	if (rc == 0) {
		qcow2_write_ahead(channel);
		qcow2_commit_soon(channel);
	}
	return rc;
}

/* The same in a fiber: may make space, and zeroes it if it must.  -EAGAIN: look again. */
static int allocate_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *unit;
	uint64_t host;
	unsigned got;
	bool zeroed;
	int rc;

	for (;;) {
		rc = writable_unit_co(channel, offset >> q->unit_shift, CHANGES_AT_ONCE, &unit);
		if (rc < 0)
			return rc;
		rc = allocate_fresh(channel, unit, offset, offset + length, &zeroed, &host, &got);
		if (rc == 0)
			break;
		/* Nothing to take, or nothing to do any more. */
		rc = count_state(channel->image, unit, offset, offset + length, NOTHING) > 0 ? 0
		                                                                             : rc;
		pthread_mutex_unlock(&q->lock);
		if (rc == 0)
			rc = qcow2_alloc_more_co(channel);
		if (rc < 0)
			return rc;
	}
	if (zeroed) {
		publish_fresh(channel, unit, offset, host, got, false);
		pthread_mutex_unlock(&q->lock);
	} else {
		pthread_mutex_unlock(&q->lock);
		rc = zero_store_co(channel->store, host, (uint64_t)got << q->cluster_bits);
		if (rc == 0)
			rc = writable_unit_co(channel, offset >> q->unit_shift, CHANGES_AT_ONCE,
			                      &unit);
		if (rc < 0) {
			pthread_mutex_lock(&q->lock);
			qcow2_alloc_untake(channel, host, got);
			pthread_mutex_unlock(&q->lock);
			return rc;
		}
		if (count_state(channel->image, unit, offset,
		                guest_cluster_start(q, offset) + ((uint64_t)got << q->cluster_bits),
		                NOTHING) < got)
			qcow2_alloc_untake(channel, host, got);
		else
			publish_fresh(channel, unit, offset, host, got, true);
		pthread_mutex_unlock(&q->lock);
	}
	qcow2_units_trim(channel);
	return -EAGAIN;
}

/* --- the second way ------------------------------------------------------------------------------
 */

/* A data file is as long as the disk, which need not end with a cluster. */
static uint64_t clip_to_data_file(const struct ox_image *image, uint64_t end)
{
	const struct qcow2 *q = image->priv;

	return q->data_file ? ox_min(end, __atomic_load_n(&image->data->size, __ATOMIC_RELAXED))
	                    : end;
}

/* Space beside what is there: whole clusters, or (nothing to keep, subclusters) only the touched
 * ones.  Lock held. */
static int take_for(struct ox_image_channel *channel, struct ox_allocation *a, enum state state,
                    unsigned want)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t start = guest_cluster_start(q, a->offset), end = a->offset + a->length;
	uint64_t unit =
	        q->subclusters > 1 && state != FOREIGN ? q->subcluster_size : q->cluster_size;
	uint64_t from = ox_align_down(a->offset, unit), host = start;
	unsigned got = want;
	bool zeroed = false;
	int rc = 0;

	if (!q->data_file)
		rc = qcow2_alloc_take(channel, want, &host, &got, &zeroed);
	if (rc < 0)
		return rc;
	a->offset = from;
	end = ox_min(ox_align_up(end, unit), start + ((uint64_t)got << q->cluster_bits));
	a->length = clip_to_data_file(channel->image, end) - from;
	a->store_offset = host + (from - start);
	a->zeroed = zeroed && !channel->image->crypto;
	a->priv[PRIV_HOST] = host;
	a->priv[PRIV_CLUSTERS] = got;
	a->priv[PRIV_STATE] = state;
	a->priv[PRIV_TAKEN] = !q->data_file;
	return 0;
}

/* Space that is there: the cluster's own, for the subclusters that are not in force, or all of it.
 */
static void use_own(const struct ox_image *image, struct ox_allocation *a, uint64_t entry,
                    uint64_t bitmap)
{
	const struct qcow2 *q = image->priv;
	uint64_t start = guest_cluster_start(q, a->offset);
	uint64_t end = ox_min(a->offset + a->length, start + q->cluster_size);
	uint64_t from = ox_align_down(a->offset, q->subcluster_size), to = from;

	do {
		to += q->subcluster_size;
	} while (to < end && !(bitmap & touched_subclusters(q, to, 1)));
	a->priv[PRIV_HOST] = q->data_file ? start : entry & QCOW2_OFFSET_MASK;
	a->priv[PRIV_CLUSTERS] = 1;
	a->priv[PRIV_STATE] = OWN;
	a->priv[PRIV_TAKEN] = false;
	a->offset = from;
	a->length = clip_to_data_file(image, to) - from;
	a->store_offset = a->priv[PRIV_HOST] + (from - start);
	/* It may hold anything. */
	a->zeroed = false;
}

/* A device may end within a cluster. */
static bool is_in_file(const struct ox_image *image, uint64_t offset, uint64_t entry)
{
	const struct qcow2 *q = image->priv;
	uint64_t host = (entry & QCOW2_OFFSET_MASK) + (offset & (q->cluster_size - 1));

	return host < __atomic_load_n(&image->data->size, __ATOMIC_RELAXED);
}

int qcow2_prepare_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t entry, bitmap, end = a->offset + a->length;
	struct qcow2_unit *unit;
	enum state state;
	int rc;

	for (;;) {
		rc = writable_unit_co(channel, a->offset >> q->unit_shift, 0, &unit);
		if (rc < 0)
			return rc;
		get_entry(q, unit, a->offset, &entry, &bitmap);
		state = get_state(channel->image, a->offset, entry, bitmap);
		if (state == OWN)
			use_own(channel->image, a, entry, bitmap);
		else if (state == COVERED || state == FOREIGN ||
		         (state == NOTHING && !fresh_space_is_zero(channel->image)))
			rc = take_for(channel, a, state,
			              count_state(channel->image, unit, a->offset, end, state));
		pthread_mutex_unlock(&q->lock);
		if (state == IN_PLACE)
			return is_in_file(channel->image, a->offset, entry) ? -EAGAIN : -ENOSPC;
		if (state == NOTHING && fresh_space_is_zero(channel->image))
			return allocate_co(channel, a->offset, a->length);
		if (rc != -EAGAIN)
			return rc;
		rc = qcow2_alloc_more_co(channel);
		if (rc < 0)
			return rc;
	}
}

/* The entry of one cluster of a, which begins at `start`.  Lock held. */
static void publish_cluster(struct ox_image_channel *channel, const struct ox_allocation *a,
                            struct qcow2_unit *unit, uint64_t start, uint64_t host)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t from = ox_max(start, a->offset);
	uint64_t to = ox_min(start + q->cluster_size, a->offset + a->length);
	uint64_t entry, bitmap, old;
	uint32_t written;

	get_entry(q, unit, start, &old, &bitmap);
	entry = host | QCOW2_ENTRY_COPIED;
	if (q->subclusters > 1) {
		written = touched_subclusters(q, from, to - from);
		if (a->priv[PRIV_STATE] == FOREIGN)
			bitmap = 0;
		bitmap = (bitmap & ~((uint64_t)written << 32)) | written;
	}
	set_entry(q, unit, start, entry, bitmap, true);
	if (a->priv[PRIV_STATE] == FOREIGN)
		free_entry(channel, old);
}

int qcow2_publish_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct qcow2 *q = channel->image->priv;
	unsigned count = (unsigned)a->priv[PRIV_CLUSTERS];
	uint64_t start = guest_cluster_start(q, a->offset);
	struct qcow2_unit *unit;
	int rc = writable_unit_co(channel, start >> q->unit_shift, count, &unit);

	if (rc < 0)
		return rc;
	for (unsigned i = 0; i < count; i++)
		publish_cluster(channel, a, unit, start + ((uint64_t)i << q->cluster_bits),
		                a->priv[PRIV_HOST] + ((uint64_t)i << q->cluster_bits));
	pthread_mutex_unlock(&q->lock);
	qcow2_units_trim(channel);
	qcow2_commit_soon(channel);
	return 0;
}

void qcow2_abort(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct qcow2 *q = channel->image->priv;

	if (!a->priv[PRIV_TAKEN])
		return;
	pthread_mutex_lock(&q->lock);
	qcow2_alloc_untake(channel, a->priv[PRIV_HOST], (unsigned)a->priv[PRIV_CLUSTERS]);
	pthread_mutex_unlock(&q->lock);
}

/* --- zeroes and discards
 * -------------------------------------------------------------------------- */

/* Space that stays reserved, and whose content may go. */
struct punch {
	uint64_t host, bytes;
};
#define PUNCHES 16u

struct clearing {
	uint64_t offset, end;
	bool discard, unmap;
	struct punch punches[PUNCHES];
	unsigned punch_count;
};

/* Part of a cluster with subclusters. */
static int clear_subclusters(struct ox_image_channel *channel, struct qcow2_unit *unit, uint64_t at,
                             uint64_t bytes, uint64_t entry, uint64_t bitmap)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t touched = touched_subclusters(q, at, bytes);

	if (entry & QCOW2_ENTRY_COMPRESSED)
		return -ENOTSUP;
	if ((bitmap >> 32 & touched) == touched)
		return 0;
	bitmap = (bitmap & ~touched) | touched << 32;
	set_entry(q, unit, at, entry, bitmap, false);
	return 0;
}

/* A whole cluster.  1: it was cleared by leaving its space where it is. */
static int clear_cluster(struct ox_image_channel *channel, struct qcow2_unit *unit,
                         const struct clearing *clearing, uint64_t at, uint64_t entry,
                         uint64_t bitmap)
{
	struct qcow2 *q = channel->image->priv;
	const struct ox_image *image = channel->image;
	bool covered = is_covered(image, at), zero_flag = q->header.version >= 3;
	bool own = has_host(q, entry) && !(entry & QCOW2_ENTRY_COMPRESSED) &&
	           (entry & QCOW2_ENTRY_COPIED);
	bool keep = own && (!clearing->unmap || image->options.discard_no_unref || q->data_file);
	uint64_t new_entry = 0, new_bitmap = 0;

	if (!has_host(q, entry) && !(entry & QCOW2_ENTRY_COMPRESSED) &&
	    (!covered || get_state(image, at, entry, bitmap) == NOTHING))
		return 0; /* zero as it is */
	if (!zero_flag) {
		/* Version 2 can only say "nothing here". */
		if (covered)
			return clearing->discard ? 0 : -ENOTSUP;
		if (!clearing->unmap)
			return -ENOTSUP;
		keep = false;
	}
	if (keep)
		new_entry = entry & (QCOW2_OFFSET_MASK | QCOW2_ENTRY_COPIED);
	if (zero_flag && (keep || covered || !clearing->discard)) {
		if (q->subclusters > 1)
			new_bitmap = 0xffffffffull << 32;
		else
			new_entry |= QCOW2_ENTRY_ZERO;
	}
	if (new_entry == entry && new_bitmap == bitmap)
		return 0;
	set_entry(q, unit, at, new_entry, new_bitmap, false);
	if (!keep)
		free_entry(channel, entry);
	return keep && clearing->unmap ? 1 : 0;
}

static void note_punch(struct clearing *clearing, uint64_t host, uint64_t bytes)
{
	struct punch *last = clearing->punches + clearing->punch_count;

	if (clearing->punch_count > 0 && last[-1].host + last[-1].bytes == host)
		last[-1].bytes += bytes;
	else
		clearing->punches[clearing->punch_count++] = (struct punch){host, bytes};
}

/* As much of it as one holding of the lock does; clearing->offset goes on.  Lock held. */
static int clear_some(struct ox_image_channel *channel, struct qcow2_unit *unit,
                      struct clearing *clearing)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t size = __atomic_load_n(&channel->image->size, __ATOMIC_RELAXED);
	uint64_t entry, bitmap;
	int rc;

	clearing->punch_count = 0;
	for (unsigned i = 0; i < CHANGES_AT_ONCE && clearing->punch_count < PUNCHES; i++) {
		uint64_t at = clearing->offset, start = guest_cluster_start(q, at);
		uint64_t to = ox_min(clearing->end, start + q->cluster_size);

		if (at == clearing->end || (at >> q->unit_shift) != unit->index)
			break;
		get_entry(q, unit, at, &entry, &bitmap);
		if (at == start && (to == start + q->cluster_size || to >= size)) {
			rc = clear_cluster(channel, unit, clearing, at, entry, bitmap);
		} else if (q->subclusters > 1) {
			rc = clear_subclusters(channel, unit, at, to - at, entry, bitmap);
		} else {
			rc = clearing->discard ? 0 : -ENOTSUP;
		}
		if (rc == -ENOTSUP && clearing->discard)
			rc = 0;
		if (rc < 0)
			return rc;
		clearing->offset = to;
		/* Its content goes without the lock. */
		if (rc == 1)
			note_punch(clearing, q->data_file ? start : entry & QCOW2_OFFSET_MASK,
			           q->cluster_size);
	}
	return 0;
}

/* A hint, on space that the map shows as zero: until that is durable the old content must be there.
 */
static void punch_co(struct ox_image_channel *channel, const struct clearing *clearing)
{
	uint64_t size = __atomic_load_n(&channel->image->data->size, __ATOMIC_RELAXED);

	if (clearing->punch_count == 0 || qcow2_commit_co(channel) < 0)
		return;
	for (unsigned i = 0; i < clearing->punch_count; i++) {
		const struct punch *punch = &clearing->punches[i];
		struct ox_io io = {
		        .op = OX_IO_DISCARD, .offset = punch->host, .length = punch->bytes};

		if (ox_range_within(io.offset, io.length, size))
			(void)!ox_store_submit_co(channel->data, &io);
	}
}

/* A data file that is to be readable as a raw image shows the zeroes too. */
static int zero_raw_data_co(struct ox_image_channel *channel, const struct clearing *clearing)
{
	uint64_t size = __atomic_load_n(&channel->image->data->size, __ATOMIC_RELAXED);
	struct ox_io io = {.op = OX_IO_ZERO,
	                   .flags = clearing->unmap ? OX_IO_MAY_UNMAP : 0,
	                   .offset = clearing->offset};

	io.length = ox_min(clearing->end, size) - io.offset;
	return io.offset < size ? ox_store_submit_co(channel->data, &io) : 0;
}

static int clear_co(struct ox_image_channel *channel, struct clearing *clearing)
{
	struct qcow2 *q = channel->image->priv;
	struct qcow2_unit *unit;
	uint64_t index, l1;
	int rc;

	if (channel->image->data_file_raw) {
		rc = zero_raw_data_co(channel, clearing);
		if (rc < 0)
			return rc;
	}
	while (clearing->offset < clearing->end) {
		index = clearing->offset >> q->unit_shift;
		l1 = qcow2_l1_get(q, index >> q->units_per_table_shift);
		if (!(l1 & QCOW2_OFFSET_MASK) && !is_covered(channel->image, clearing->offset)) {
			/* No table, nothing below: zero as it is. */
			clearing->offset = ox_min(clearing->end, (index + 1) << q->unit_shift);
			continue;
		}
		rc = writable_unit_co(channel, index, CHANGES_AT_ONCE, &unit);
		if (rc < 0)
			return rc;
		rc = clear_some(channel, unit, clearing);
		pthread_mutex_unlock(&q->lock);
		punch_co(channel, clearing);
		qcow2_units_trim(channel);
		qcow2_commit_soon(channel);
		if (rc < 0)
			return rc;
	}
	return 0;
}

int qcow2_zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length, bool unmap)
{
	struct clearing clearing = {.offset = offset, .end = offset + length, .unmap = unmap};

	return clear_co(channel, &clearing);
}

int qcow2_discard_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	struct clearing clearing = {
	        .offset = offset, .end = offset + length, .discard = true, .unmap = true};

	return clear_co(channel, &clearing);
}
