/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The inflight region: the protocol, and its repair after a kill.
 *
 * A kill may fall between any two stores.  Every store that matters goes through ox_persist(),
 * which keeps program order; a store is whole or not there.  "Published" below means that the
 * driver may see a batch: the used ring's index moved (split), or the first used descriptor's
 * flags were written (packed: the flags of the others come before, the first one's last).
 *
 * Split.  Invariants, at every point between two stores:
 *   S1  a head that was taken and whose completion is not published has inflight = 1, or was not
 *       taken (the queue's next position is computed, not stored: used index + entries with
 *       inflight = 1, so a head without the mark is simply taken again);
 *   S2  used_idx here == the ring's used index, or the ring's is ahead by exactly the entries of
 *       the list of that length from last_batch_head.
 *   take:   counter, inflight = 1
 *   push:   desc[i].next = last_batch_head, last_batch_head = i   (harmless while S2 is equal)
 *   flush:  the ring's idx (published); inflight = 0 of the batch; used_idx
 * Repair: if the indices differ, clear the batch's marks, then used_idx.  Repeatable.
 *
 * Packed.  Descriptors are copied into entries, because used elements overwrite ring slots.
 * Entries are on the free list (from old_free_head) or belong to a chain in flight.
 *   P1  old_free_head, old_used_idx and old_used_wrap_counter describe the state before the batch
 *       that is being published; the fields without "old" the state after it;
 *   P2  if they differ, the flags of the ring slot at old_used_idx tell which holds: still
 *       available in old_used_wrap_counter's sense: not published, the old one;
 *   P3  the marks of entries on the free list mean nothing.
 *   take:   the entries from free_head on; the head's num, last, counter, inflight = 1;
 *           free_head; old_free_head (from here on it is taken)
 *   flush:  each chain of the batch is linked in front of the free list (desc[last].next,
 * free_head); {used_idx, used_wrap_counter}; the ring's slots; the first slot's flags (published);
 *           inflight = 0 of the batch; old_free_head; {old_used_idx, old_used_wrap_counter}
 * The braces: index and wrap counter change in one 8-byte store, because a pair of half old and
 * half new would be a valid but wrong position.  (They share an aligned word in the layout.)
 * Nothing is taken between the first and the last store of a flush.
 * Repair: commit or roll back by P2.  A rolled back batch may have left slots behind the first that
 * look used; they are made to look available again, else the driver would walk into them after
 * the next batch.  Free entries' marks are cleared.  Repeatable.
 *
 * What the client did to the region is not trusted: indices are checked before use, at repair and
 * while running.
 */
#include "virtio/vring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define VERSION 1

uint64_t ox_inflight_queue_bytes(bool packed, uint16_t size)
{
	uint64_t bytes = packed ? sizeof(struct ox_inflight_packed) +
	                                  size * sizeof(struct ox_inflight_packed_entry)
	                        : sizeof(struct ox_inflight_split) +
	                                  size * sizeof(struct ox_inflight_split_entry);

	return ox_align_up(bytes, 64);
}

int ox_inflight_create(unsigned queues, bool packed, uint16_t size, int *fd, uint64_t *bytes,
                       struct ox_error *err)
{
	OX_CLOSE int file = -1;

	*bytes = queues * ox_inflight_queue_bytes(packed, size);
	if (!queues || !size)
		return ox_error_set(err, EINVAL, "inflight region for %u queues of %u entries",
		                    queues, size);
	file = memfd_create("oxbow-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (file < 0)
		return ox_error_set(err, errno, "cannot make an inflight region: %s",
		                    strerror(errno));
	if (ftruncate(file, (off_t)*bytes) < 0)
		return ox_error_set(err, errno, "cannot make an inflight region of %llu bytes: %s",
		                    (unsigned long long)*bytes, strerror(errno));
	*fd = ox_steal_fd(&file);
	return 0;
}

void ox_inflight_attach(struct ox_inflight *inflight, void *area, bool packed, uint16_t size,
                        bool *broken)
{
	*inflight = (struct ox_inflight){
	        .area = area,
	        .packed = packed,
	        .size = size,
	        .broken = broken,
	};
}

/* Reads the client's bytes once: what is checked is what is used. */
#define region_load(where) __atomic_load_n((where), __ATOMIC_RELAXED)

static int inflight_bad(struct ox_error *err, const char *what, unsigned value)
{
	return ox_error_set(err, EINVAL,
	                    "inflight region: %s (%u); it does not belong to this ring", what,
	                    value);
}

static int split_open(struct ox_inflight *inflight, struct ox_inflight_position *position,
                      uint16_t ring_size, struct ox_error *err)
{
	struct ox_inflight_split *region = inflight->area;
	uint16_t batch, count = 0;

	if (!region->version) {
		for (unsigned i = 0; i < inflight->size; i++)
			memset(&region->desc[i], 0, sizeof(region->desc[i]));
		region->features = 0;
		region->desc_num = inflight->size;
		region->last_batch_head = 0;
		region->used_idx = position->used;
		inflight->counter = 0;
		ox_persist(&region->version, VERSION);
		return 0;
	}
	if (region->version != VERSION)
		return inflight_bad(err, "unknown version", region->version);
	if (region->desc_num != inflight->size)
		return inflight_bad(err, "another queue size", region->desc_num);

	for (unsigned i = 0; i < inflight->size; i++)
		count += region->desc[i].inflight != 0;
	batch = (uint16_t)(position->used - region->used_idx);
	/* A list longer than the ring is of another ring; without anything in flight that is an
	 * end that nobody told us of. */
	if (batch > inflight->size && count)
		return inflight_bad(err, "used index moved too far", batch);
	if (batch && batch <= inflight->size) {
		uint16_t at = region_load(&region->last_batch_head);

		for (unsigned i = 0; i < batch; i++) {
			if (at >= inflight->size)
				return inflight_bad(err, "impossible entry in the last batch", at);
			ox_persist(&region->desc[at].inflight, 0);
			at = region_load(&region->desc[at].next);
		}
	}
	ox_persist(&region->used_idx, position->used);

	count = 0;
	inflight->counter = 0;
	for (unsigned i = 0; i < inflight->size; i++) {
		if (!region->desc[i].inflight)
			continue;
		if (i >= ring_size)
			return inflight_bad(err, "a head behind the ring's end", i);
		count++;
		if (region->desc[i].counter >= inflight->counter)
			inflight->counter = region->desc[i].counter + 1;
	}
	position->avail = (uint16_t)(position->used + count);
	return 0;
}

/* used_idx, old_used_idx, used_wrap_counter and old_used_wrap_counter in one store. */
struct packed_used {
	uint16_t used, old_used;
	uint8_t wrap, old_wrap;
	uint8_t padding[2];
};
_Static_assert(offsetof(struct ox_inflight_packed, used_idx) % 8 == 0 &&
                       offsetof(struct ox_inflight_packed, old_used_wrap_counter) ==
                               offsetof(struct ox_inflight_packed, used_idx) + 5,
               "index and wrap counters share an aligned word");

static inline void packed_store_used(struct ox_inflight_packed *region, struct packed_used used)
{
	uint64_t word;

	memcpy(&word, &used, sizeof(word));
	ox_persist((uint64_t *)(void *)&region->used_idx, word);
}

void ox_inflight_packed_take(struct ox_inflight *inflight, uint16_t head, uint16_t last,
                             uint16_t next, uint16_t num)
{
	struct ox_inflight_packed *region = inflight->area;
	struct ox_inflight_packed_entry *entry = &region->desc[head];

	ox_persist(&entry->num, num);
	ox_persist(&entry->last, last);
	ox_persist(&entry->counter, inflight->counter++);
	ox_persist(&entry->inflight, 1);
	ox_persist(&region->free_head, next);
	ox_persist(&region->old_free_head, next);
}

void ox_inflight_packed_prepare(struct ox_inflight *inflight, const struct ox_vq_pending *batch,
                                uint32_t count, uint16_t used_idx, bool used_wrap)
{
	struct ox_inflight_packed *region = inflight->area;
	struct packed_used used = {
	        .used = used_idx,
	        .wrap = used_wrap,
	        .old_used = region->old_used_idx,
	        .old_wrap = region->old_used_wrap_counter,
	};

	for (uint32_t i = 0; i < count; i++) {
		uint16_t last = region_load(&region->desc[batch[i].inflight_index].last);

		if (last >= inflight->size)
			last = batch[i].inflight_index; /* the client wrote there */
		ox_persist(&region->desc[last].next, region->free_head);
		ox_persist(&region->free_head, batch[i].inflight_index);
	}
	packed_store_used(region, used);
}

void ox_inflight_packed_commit(struct ox_inflight *inflight, const struct ox_vq_pending *batch,
                               uint32_t count)
{
	struct ox_inflight_packed *region = inflight->area;

	for (uint32_t i = 0; i < count; i++)
		ox_persist(&region->desc[batch[i].inflight_index].inflight, 0);
	ox_persist(&region->old_free_head, region->free_head);
	packed_store_used(region, (struct packed_used){
	                                  .used = region->used_idx,
	                                  .old_used = region->used_idx,
	                                  .wrap = region->used_wrap_counter,
	                                  .old_wrap = region->used_wrap_counter,
	                          });
}

static void packed_fresh(struct ox_inflight *inflight, const struct ox_inflight_position *position)
{
	struct ox_inflight_packed *region = inflight->area;

	for (unsigned i = 0; i < inflight->size; i++) {
		memset(&region->desc[i], 0, sizeof(region->desc[i]));
		/* The last one points behind the array: the list's end. */
		region->desc[i].next = (uint16_t)(i + 1);
	}
	region->features = 0;
	region->desc_num = inflight->size;
	region->free_head = region->old_free_head = 0;
	packed_store_used(region, (struct packed_used){
	                                  .used = position->used,
	                                  .old_used = position->used,
	                                  .wrap = position->used_wrap,
	                                  .old_wrap = position->used_wrap,
	                          });
	inflight->counter = 0;
	ox_persist(&region->version, VERSION);
}

/* Available or used in the sense of a wrap counter (virtio 1.3, 2.8.1). */
static bool slot_is_available(uint16_t flags, bool wrap)
{
	return !!(flags & OX_DESC_AVAIL) == wrap && !!(flags & OX_DESC_USED) != wrap;
}
static bool slot_is_used(uint16_t flags, bool wrap)
{
	return !!(flags & OX_DESC_AVAIL) == wrap && !!(flags & OX_DESC_USED) == wrap;
}

/* Clears the marks of the free list, then checks and adds up the chains in flight.  `seen`: a
 * byte for each entry. */
static int packed_audit(struct ox_inflight *inflight, uint16_t free_head, uint32_t *slots,
                        uint8_t *seen, struct ox_error *err)
{
	struct ox_inflight_packed *region = inflight->area;
	uint16_t at = free_head;

	while (at < inflight->size) {
		if (seen[at])
			return inflight_bad(err, "a loop in the free list", at);
		seen[at] = 1;
		ox_persist(&region->desc[at].inflight, 0);
		at = region_load(&region->desc[at].next);
	}
	*slots = 0;
	inflight->counter = 0;
	for (unsigned i = 0; i < inflight->size; i++) {
		const struct ox_inflight_packed_entry *head = &region->desc[i];
		uint16_t num = region_load(&head->num), last = region_load(&head->last);

		if (!head->inflight)
			continue;
		if (!num || num > inflight->size)
			return inflight_bad(err, "impossible length of a chain", num);
		at = (uint16_t)i;
		for (unsigned n = 0; n < num; n++) {
			if (at >= inflight->size || seen[at])
				return inflight_bad(err, "impossible chain", at);
			seen[at] = 1;
			if (n + 1 == num && at != last)
				return inflight_bad(err, "impossible end of a chain", at);
			at = region_load(&region->desc[at].next);
		}
		*slots += num;
		if (head->counter >= inflight->counter)
			inflight->counter = head->counter + 1;
	}
	return 0;
}

/* `seen`: a byte for each entry. */
static int packed_repair(struct ox_inflight *inflight, struct ox_inflight_position *position,
                         struct ox_packed_desc *ring, uint16_t ring_size, uint8_t *seen,
                         struct ox_error *err)
{
	struct ox_inflight_packed *region = inflight->area;
	struct packed_used used;
	bool rollback = false, wrap;
	uint16_t free_head;
	uint32_t at;
	int rc;

	memcpy(&used, &region->used_idx, sizeof(used));
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if (used.used >= ring_size || used.old_used >= ring_size || used.wrap > 1 ||
	    used.old_wrap > 1)
		return inflight_bad(err, "impossible used index", used.used);
	free_head = region_load(&region->old_free_head);
	if (used.used != used.old_used || used.wrap != used.old_wrap) {
		rollback = slot_is_available(ox_ring_get16_acquire(&ring[used.old_used].flags),
		                             used.old_wrap);
		if (!rollback) {
			free_head = region_load(&region->free_head);
			ox_persist(&region->old_free_head, free_head);
			used.old_used = used.used;
			used.old_wrap = used.wrap;
			packed_store_used(region, used);
		}
	}
	rc = packed_audit(inflight, free_head, &position->slots, seen, err);
	if (rc < 0)
		return rc;
	if (position->slots > ring_size)
		return inflight_bad(err, "more descriptors than the ring", position->slots);
	ox_persist(&region->free_head, free_head);
	at = used.old_used;
	wrap = used.old_wrap;
	for (uint32_t i = 0; i < position->slots; i++) {
		if (rollback && slot_is_used(ox_ring_get16(&ring[at].flags), wrap)) {
			ox_ring_put16_release(&ring[at].flags, wrap ? OX_DESC_AVAIL : OX_DESC_USED);
			OX_STORE_POINT();
		}
		if (++at == ring_size) {
			at = 0;
			wrap = !wrap;
		}
	}
	/* Only now: had we been killed above, the next one must find the rollback to do. */
	used.used = used.old_used;
	used.wrap = used.old_wrap;
	packed_store_used(region, used);
	position->used = used.used;
	position->used_wrap = used.wrap;
	position->avail = (uint16_t)at;
	position->avail_wrap = wrap;
	return 0;
}

static int packed_open(struct ox_inflight *inflight, struct ox_inflight_position *position,
                       struct ox_packed_desc *ring, uint16_t ring_size, struct ox_error *err)
{
	const struct ox_inflight_packed *region = inflight->area;
	uint8_t *seen;
	int rc;

	position->slots = 0;
	if (!region->version) {
		packed_fresh(inflight, position);
		return 0;
	}
	if (region->version != VERSION)
		return inflight_bad(err, "unknown version", region->version);
	if (region->desc_num != inflight->size)
		return inflight_bad(err, "another queue size", region->desc_num);
	seen = calloc(inflight->size, 1);
	if (!seen)
		return ox_error_set(err, ENOMEM, "inflight region: out of memory");
	rc = packed_repair(inflight, position, ring, ring_size, seen, err);
	free(seen);
	return rc;
}

int ox_inflight_open(struct ox_inflight *inflight, struct ox_inflight_position *position,
                     void *ring, uint16_t ring_size, struct ox_error *err)
{
	if (inflight->packed)
		return packed_open(inflight, position, ring, ring_size, err);
	return split_open(inflight, position, ring_size, err);
}

struct pending {
	uint64_t counter;
	uint16_t index;
};

static int compare_pending(const void *a, const void *b)
{
	const struct pending *first = a, *second = b;

	if (first->counter != second->counter)
		return first->counter < second->counter ? -1 : 1;
	return (int)first->index - second->index;
}

unsigned ox_inflight_pending(const struct ox_inflight *inflight, uint16_t *index, unsigned room)
{
	const struct ox_inflight_split *split = inflight->area;
	const struct ox_inflight_packed *packed = inflight->area;
	/* Copies: the client may go on writing while we sort. */
	OX_FREE struct pending *list = ox_xcalloc(room + 1, sizeof(*list));
	unsigned count = 0;

	for (unsigned i = 0; i < inflight->size && count < room; i++) {
		if (inflight->packed ? !packed->desc[i].inflight : !split->desc[i].inflight)
			continue;
		list[count].counter =
		        inflight->packed ? packed->desc[i].counter : split->desc[i].counter;
		list[count++].index = (uint16_t)i;
	}
	qsort(list, count, sizeof(*list), compare_pending);
	for (unsigned i = 0; i < count; i++)
		index[i] = list[i].index;
	return count;
}
