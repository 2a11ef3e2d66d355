/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The split ring (virtio 1.3, 2.7), the device's side.
 *
 * The driver's index is read (acquire) only when everything up to the last value seen is taken,
 * and ours is stored (release) once per batch: two cache lines that travel between two cores
 * travel once per batch and not once per request.
 *
 * Crash ordering with an inflight region: inflight.c.
 */
#include "virtio/vring.h"

#include <errno.h>
#include <string.h>

static inline const struct ox_split_avail *split_avail(const struct ox_vq *vq)
{
	return vq->config.driver;
}
static inline struct ox_split_used *split_used(const struct ox_vq *vq)
{
	return vq->config.device;
}
/* Behind the rings: the other side's event index. */
static inline const uint16_t *split_used_event(const struct ox_vq *vq)
{
	return &split_avail(vq)->ring[vq->config.size];
}
static inline uint16_t *split_avail_event(const struct ox_vq *vq)
{
	return (uint16_t *)(void *)&split_used(vq)->ring[vq->config.size];
}

int ox_split_init(struct ox_vq *vq, struct ox_error *err)
{
	vq->mask = (uint16_t)(vq->config.size - 1);
	vq->last_used = ox_ring_get16(&split_used(vq)->idx);
	vq->last_avail = vq->config.avail_index;
	if (vq->config.inflight) {
		struct ox_inflight_position position = {.avail = vq->last_avail,
		                                        .used = vq->last_used};
		int rc = ox_inflight_open(vq->config.inflight, &position, NULL, vq->config.size,
		                          err);

		if (rc < 0)
			return rc;
		vq->last_avail = position.avail;
	}
	vq->avail_seen = vq->last_avail;
	return 0;
}

static int split_walk_indirect(struct ox_vq *vq, struct ox_vq_chain *chain, uint64_t addr,
                               uint32_t bytes)
{
	const void *table;
	uint32_t count, i = 0;
	int rc = ox_vq_find_indirect(vq, addr, bytes, &count, &table);

	if (ox_unlikely(rc < 0))
		return rc;
	/* Each round takes one entry, so a loop ends after `count` rounds. */
	for (uint32_t rounds = count; rounds; rounds--) {
		struct ox_split_desc copy, d;

		if (ox_likely(table)) {
			d = ox_split_desc_load((const struct ox_split_desc *)table + i);
		} else {
			rc = ox_vq_copy_indirect(vq, addr + i * sizeof(copy), &copy);
			if (rc < 0)
				return rc;
			d = ox_split_desc_load(&copy);
		}
		if (ox_unlikely(d.flags & OX_DESC_INDIRECT))
			return ox_vq_break(vq, "indirect descriptor in an indirect table");
		rc = ox_vq_add_buffer(vq, chain, d.addr, d.len, d.flags & OX_DESC_WRITE);
		if (ox_unlikely(rc < 0))
			return rc;
		if (!(d.flags & OX_DESC_NEXT))
			return 0;
		i = d.next;
		if (ox_unlikely(i >= count))
			return ox_vq_break(vq, "next descriptor %u in an indirect table of %u", i,
			                   count);
	}
	return ox_vq_break(vq, "descriptor loop in an indirect table");
}

static inline int split_walk(struct ox_vq *vq, struct ox_vq_chain *chain, uint16_t head)
{
	const struct ox_split_desc *table = vq->config.desc;
	uint32_t size = vq->config.size;
	uint32_t i = head;

	for (uint32_t rounds = size; rounds; rounds--) {
		struct ox_split_desc d = ox_split_desc_load(&table[i]);
		int rc;

		if (d.flags & OX_DESC_INDIRECT) {
			if (ox_unlikely(d.flags & OX_DESC_NEXT))
				return ox_vq_break(vq, "indirect descriptor with a next one");
			if (ox_unlikely(!vq->config.indirect))
				return ox_vq_break(vq, "indirect descriptor was not negotiated");
			return split_walk_indirect(vq, chain, d.addr, d.len);
		}
		rc = ox_vq_add_buffer(vq, chain, d.addr, d.len, d.flags & OX_DESC_WRITE);
		if (ox_unlikely(rc < 0))
			return rc;
		if (!(d.flags & OX_DESC_NEXT))
			return 0;
		i = d.next;
		if (ox_unlikely(i >= size))
			return ox_vq_break(vq, "next descriptor %u in a ring of %u", i, size);
	}
	return ox_vq_break(vq, "descriptor loop from head %u", head);
}

/* Reads the driver's index; how many chains it makes available. -EPROTO. */
static inline int split_look(struct ox_vq *vq)
{
	uint16_t idx = ox_ring_get16_acquire(&split_avail(vq)->idx);
	uint16_t ready = (uint16_t)(idx - vq->last_avail);

	if (ox_unlikely(ready > vq->config.size))
		return ox_vq_break(vq, "avail index jumped from %u to %u in a ring of %u",
		                   vq->last_avail, idx, vq->config.size);
	vq->avail_seen = idx;
	return ready;
}

/* What the next chains need was written by another core: three misses, one behind the other
 * (descriptor, indirect table, the request's header).  Each pop starts the next step for one of
 * the three chains ahead, so that they overlap with the work on this one.  Only hints: whatever
 * the driver wrote, nothing is checked here and nothing is kept. */
static inline void split_prefetch(const struct ox_vq *vq, uint16_t at)
{
	const struct ox_split_desc *table = vq->config.desc;
	const uint16_t *ring = split_avail(vq)->ring;
	const struct ox_region *region = vq->hint;
	uint16_t ahead = (uint16_t)(vq->avail_seen - at);
	struct ox_split_desc d;

	if (!ahead || !region)
		return;
	d = ox_split_desc_load(&table[ox_ring_get16(&ring[at & vq->mask]) & vq->mask]);
	if (ox_region_holds(region, d.addr, 64)) {
		const char *host = region->host + (d.addr - region->guest_addr);

		if (d.flags & OX_DESC_INDIRECT) {
			if (ox_is_aligned((uintptr_t)host, 8)) {
				uint64_t header = ox_split_desc_load((const void *)host).addr;

				if (ox_region_holds(region, header, 16))
					__builtin_prefetch(region->host +
					                   (header - region->guest_addr));
			}
		} else {
			__builtin_prefetch(host);
		}
	}
	if (ahead < 2)
		return;
	at++;
	d = ox_split_desc_load(&table[ox_ring_get16(&ring[at & vq->mask]) & vq->mask]);
	if (d.flags & OX_DESC_INDIRECT && ox_region_holds(region, d.addr, 64))
		__builtin_prefetch(region->host + (d.addr - region->guest_addr));
	if (ahead < 3)
		return;
	at++;
	__builtin_prefetch(&table[ox_ring_get16(&ring[at & vq->mask]) & vq->mask]);
}

int ox_split_pop(struct ox_vq *vq, struct ox_vq_chain *chain)
{
	const struct ox_split_avail *avail = split_avail(vq);
	uint16_t at = vq->last_avail;
	uint16_t head;
	int rc;

	if (at == vq->avail_seen) {
		rc = split_look(vq);
		if (rc <= 0)
			return rc;
	}
	head = ox_ring_get16(&avail->ring[at & vq->mask]);
	if (ox_unlikely(head >= vq->config.size))
		return ox_vq_break(vq, "head %u in a ring of %u", head, vq->config.size);
	if (ox_unlikely(vq->busy[head]))
		return ox_vq_break(vq, "head %u is made available while in flight", head);
	ox_vq_chain_clear(chain);
	rc = split_walk(vq, chain, head);
	if (ox_unlikely(rc < 0))
		return rc;
	at++;
	split_prefetch(vq, at);
	chain->head = head;
	chain->inflight_index = head;
	vq->busy[head] = 1;
	if (vq->config.inflight)
		ox_inflight_split_take(vq->config.inflight, head);
	vq->last_avail = at;
	vq->in_flight++;
	return 1;
}

int ox_split_pop_inflight(struct ox_vq *vq, uint16_t head, struct ox_vq_chain *chain)
{
	int rc;

	if (head >= vq->config.size)
		return ox_vq_break(vq, "inflight region: head %u in a ring of %u", head,
		                   vq->config.size);
	ox_vq_chain_clear(chain);
	rc = split_walk(vq, chain, head);
	if (rc < 0)
		return rc;
	chain->head = head;
	chain->inflight_index = head;
	vq->busy[head] = 1;
	vq->in_flight++;
	return 1;
}

void ox_split_push(struct ox_vq *vq, const struct ox_vq_chain *chain, uint32_t written)
{
	struct ox_split_used_elem *elem;

	/* A driver that makes heads available again before it saw them used could otherwise let
	 * a batch outgrow the ring. */
	if (ox_unlikely(vq->pending_count == vq->config.size))
		ox_split_flush(vq);
	elem = &split_used(vq)->ring[(vq->last_used + vq->pending_count) & vq->mask];
	__atomic_store_n(&elem->id, htole32(chain->head), __ATOMIC_RELAXED);
	__atomic_store_n(&elem->len, htole32(written), __ATOMIC_RELAXED);
	vq->busy[chain->head] = 0;
	if (vq->config.inflight) {
		vq->pending[vq->pending_count].id = chain->head;
		ox_inflight_split_batch(vq->config.inflight, chain->head);
	}
	vq->pending_count++;
	vq->in_flight--;
}

static void split_log_elements(struct ox_vq *vq, uint32_t count)
{
	uint32_t first = vq->last_used & vq->mask;
	uint32_t here = ox_min(count, vq->config.size - first);

	ox_vq_log_ring(vq, offsetof(struct ox_split_used, ring[first]),
	               here * sizeof(struct ox_split_used_elem));
	if (here < count)
		ox_vq_log_ring(vq, offsetof(struct ox_split_used, ring),
		               (count - here) * sizeof(struct ox_split_used_elem));
}

void ox_split_flush(struct ox_vq *vq)
{
	uint32_t count = vq->pending_count;
	uint16_t idx = (uint16_t)(vq->last_used + count);

	if (!count)
		return;
	ox_ring_put16_release(&split_used(vq)->idx, idx);
	OX_STORE_POINT();
	if (ox_unlikely(vq->config.log)) {
		split_log_elements(vq, count);
		ox_vq_log_ring(vq, offsetof(struct ox_split_used, idx), sizeof(uint16_t));
	}
	vq->last_used = idx;
	vq->unsignalled += count;
	vq->pending_count = 0;
	if (vq->config.inflight)
		ox_inflight_split_clear(vq->config.inflight, vq->pending, count, idx);
}

bool ox_split_wants_notify(struct ox_vq *vq, uint32_t since)
{
	if (vq->config.event_idx) {
		uint16_t event = ox_ring_get16(split_used_event(vq));

		return (uint16_t)(vq->last_used - event - 1) < since;
	}
	return !(ox_ring_get16(&split_avail(vq)->flags) & OX_AVAIL_NO_INTERRUPT);
}

bool ox_split_has_work(struct ox_vq *vq)
{
	return vq->avail_seen != vq->last_avail ||
	       ox_ring_get16_acquire(&split_avail(vq)->idx) != vq->last_avail;
}

void ox_split_set_notify(struct ox_vq *vq, bool on)
{
	if (!vq->config.event_idx) {
		ox_ring_put16(&split_used(vq)->flags, on ? 0 : OX_USED_NO_NOTIFY);
		ox_vq_log_ring(vq, offsetof(struct ox_split_used, flags), sizeof(uint16_t));
	} else {
		/* Off: an index that the driver is half a turn of the counter away from.  Left
		 * where it was, the next chain would pass it and kick a device that is awake. */
		uint16_t event = (uint16_t)(vq->last_avail + (on ? 0 : 0x8000));

		ox_ring_put16(split_avail_event(vq), event);
		ox_vq_log_ring(vq, offsetof(struct ox_split_used, ring[vq->config.size]),
		               sizeof(uint16_t));
	}
}
