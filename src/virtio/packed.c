/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The packed ring (virtio 1.3, 2.8), the device's side.
 *
 * Used elements are collected and written at the flush, the first one's flags last (release): the
 * driver reads in order, so one store shows the whole batch.
 *
 * A ring slot belongs to the device from the driver's release of the chain's first flags until
 * the flush that returns it; vq->slots counts them, and a driver that offers more than the ring
 * has is broken.
 *
 * Crash ordering with an inflight region: inflight.c.
 */
#include "virtio/vring.h"

#include <errno.h>
#include <string.h>

static inline struct ox_packed_desc *packed_ring(const struct ox_vq *vq)
{
	return vq->config.desc;
}

int ox_packed_init(struct ox_vq *vq, struct ox_error *err)
{
	struct ox_inflight_position position = {
	        .avail = vq->config.avail_index & 0x7fff,
	        .avail_wrap = vq->config.avail_index >> 15,
	        .used = vq->config.used_index & 0x7fff,
	        .used_wrap = vq->config.used_index >> 15,
	};

	if (position.avail >= vq->config.size || position.used >= vq->config.size)
		return ox_error_set(err, EINVAL, "virtqueue: base %u, %u in a packed ring of %u",
		                    position.avail, position.used, vq->config.size);
	if (vq->config.inflight) {
		int rc = ox_inflight_open(vq->config.inflight, &position, packed_ring(vq),
		                          vq->config.size, err);

		if (rc < 0)
			return rc;
	}
	vq->last_avail = position.avail;
	vq->avail_wrap = position.avail_wrap;
	vq->last_used = position.used;
	vq->used_wrap = position.used_wrap;
	vq->slots = position.slots;
	return 0;
}

/* All entries in order; of their flags only WRITE counts (2.8.7). */
static int packed_walk_indirect(struct ox_vq *vq, struct ox_vq_chain *chain, uint64_t addr,
                                uint32_t bytes)
{
	const struct ox_packed_desc *entry;
	const void *table;
	uint32_t count;
	int rc = ox_vq_find_indirect(vq, addr, bytes, &count, &table);

	for (uint32_t i = 0; i < count && rc == 0; i++) {
		struct ox_packed_desc copy, d;

		if (ox_likely(table)) {
			entry = (const struct ox_packed_desc *)table + i;
		} else {
			rc = ox_vq_copy_indirect(vq, addr + i * sizeof(copy), &copy);
			if (rc < 0)
				break;
			entry = &copy;
		}
		d = ox_packed_desc_load(entry, ox_ring_get16(&entry->flags));
		if (ox_unlikely(d.flags & OX_DESC_INDIRECT))
			return ox_vq_break(vq, "indirect descriptor in an indirect table");
		rc = ox_vq_add_buffer(vq, chain, d.addr, d.len, d.flags & OX_DESC_WRITE);
	}
	return rc;
}

/* One descriptor of the ring (or of the inflight region): 1 if another follows, 0 at the end. */
static inline int packed_take_desc(struct ox_vq *vq, struct ox_vq_chain *chain,
                                   struct ox_packed_desc d)
{
	int rc;

	if (d.flags & OX_DESC_INDIRECT) {
		if (ox_unlikely(d.flags & OX_DESC_NEXT))
			return ox_vq_break(vq, "indirect descriptor with a next one");
		if (ox_unlikely(!vq->config.indirect))
			return ox_vq_break(vq, "indirect descriptor was not negotiated");
		return packed_walk_indirect(vq, chain, d.addr, d.len);
	}
	rc = ox_vq_add_buffer(vq, chain, d.addr, d.len, d.flags & OX_DESC_WRITE);
	if (ox_unlikely(rc < 0))
		return rc;
	return !!(d.flags & OX_DESC_NEXT);
}

static inline bool packed_is_available(const struct ox_vq *vq, uint16_t flags)
{
	return !!(flags & OX_DESC_AVAIL) == vq->avail_wrap &&
	       !!(flags & OX_DESC_USED) != vq->avail_wrap;
}

int ox_packed_pop(struct ox_vq *vq, struct ox_vq_chain *chain)
{
	struct ox_packed_desc *ring = packed_ring(vq);
	struct ox_inflight *inflight = vq->config.inflight;
	struct ox_inflight_packed *region = inflight ? inflight->area : NULL;
	uint32_t size = vq->config.size;
	uint32_t at = vq->last_avail;
	uint16_t flags = ox_ring_get16_acquire(&ring[at].flags);
	uint16_t entry = 0, first_entry = 0, last_entry = 0;
	uint32_t num = 0;
	struct ox_packed_desc d;
	int rc;

	if (!packed_is_available(vq, flags))
		return 0;
	ox_vq_chain_clear(chain);
	if (region)
		entry = first_entry = __atomic_load_n(&region->free_head, __ATOMIC_RELAXED);
	for (;;) {
		num++;
		if (ox_unlikely(vq->slots + num > size))
			return ox_vq_break(vq, "more descriptors in flight than the ring's %u",
			                   size);
		d = ox_packed_desc_load(&ring[at], flags);
		if (region) {
			struct ox_inflight_packed_entry *copy = &region->desc[entry];

			if (ox_unlikely(entry >= inflight->size))
				return ox_vq_break(vq, "inflight region: no free entry (%u)",
				                   entry);
			copy->addr = d.addr;
			copy->len = d.len;
			copy->id = d.id;
			copy->flags = d.flags;
			last_entry = entry;
			entry = __atomic_load_n(&copy->next, __ATOMIC_RELAXED);
		}
		rc = packed_take_desc(vq, chain, d);
		if (ox_unlikely(rc < 0))
			return rc;
		if (++at == size)
			at = 0;
		if (!rc)
			break;
		flags = ox_ring_get16(&ring[at].flags);
	}
	chain->head = d.id; /* the last one's counts (2.8.6) */
	chain->ring_slots = (uint16_t)num;
	if (region) {
		ox_inflight_packed_take(inflight, first_entry, last_entry, entry, (uint16_t)num);
		chain->inflight_index = first_entry;
	}
	if (at <= vq->last_avail)
		vq->avail_wrap = !vq->avail_wrap;
	vq->last_avail = (uint16_t)at;
	vq->slots += num;
	vq->in_flight++;
	__builtin_prefetch(&ring[at]);
	return 1;
}

int ox_packed_pop_inflight(struct ox_vq *vq, uint16_t index, struct ox_vq_chain *chain)
{
	struct ox_inflight *inflight = vq->config.inflight;
	const struct ox_inflight_packed *region = inflight->area;
	uint16_t at = index;
	uint32_t num = 0, expected;
	struct ox_packed_desc d;
	int rc;

	if (index >= inflight->size)
		return ox_vq_break(vq, "inflight region: no entry %u", index);
	ox_vq_chain_clear(chain);
	expected = __atomic_load_n(&region->desc[index].num, __ATOMIC_RELAXED);
	for (;;) {
		const struct ox_inflight_packed_entry *entry = &region->desc[at];

		/* Bounds the walk too. */
		if (at >= inflight->size || num == expected)
			return ox_vq_break(vq, "inflight region: impossible chain at %u", index);
		d = (struct ox_packed_desc){
		        .addr = __atomic_load_n(&entry->addr, __ATOMIC_RELAXED),
		        .len = __atomic_load_n(&entry->len, __ATOMIC_RELAXED),
		        .id = __atomic_load_n(&entry->id, __ATOMIC_RELAXED),
		        .flags = __atomic_load_n(&entry->flags, __ATOMIC_RELAXED),
		};
		num++;
		rc = packed_take_desc(vq, chain, d);
		if (rc < 0)
			return rc;
		if (!rc)
			break;
		at = __atomic_load_n(&entry->next, __ATOMIC_RELAXED);
	}
	if (num != expected)
		return ox_vq_break(vq, "inflight region: chain at %u ends early", index);
	chain->head = d.id;
	chain->ring_slots = (uint16_t)num;
	chain->inflight_index = index;
	vq->in_flight++;
	return 1;
}

void ox_packed_push(struct ox_vq *vq, const struct ox_vq_chain *chain, uint32_t written)
{
	/* Each chain has a slot at least, and there are no more slots than room here. */
	vq->pending[vq->pending_count++] = (struct ox_vq_pending){
	        .len = written,
	        .id = chain->head,
	        .slots = chain->ring_slots,
	        .inflight_index = chain->inflight_index,
	};
	vq->pending_slots += chain->ring_slots;
	vq->in_flight--;
}

void ox_packed_flush(struct ox_vq *vq)
{
	struct ox_packed_desc *ring = packed_ring(vq);
	uint32_t size = vq->config.size, count = vq->pending_count;
	uint32_t at = vq->last_used, end;
	bool wrap = vq->used_wrap, end_wrap = wrap;
	uint16_t first_flags = 0;

	if (!count)
		return;
	end = at + vq->pending_slots;
	if (end >= size) {
		end -= size;
		end_wrap = !wrap;
	}
	if (vq->config.inflight)
		ox_inflight_packed_prepare(vq->config.inflight, vq->pending, count, (uint16_t)end,
		                           end_wrap);
	for (uint32_t i = 0; i < count; i++) {
		const struct ox_vq_pending *element = &vq->pending[i];
		/* WRITE: bytes were written (2.8.5). */
		uint16_t flags = (wrap ? OX_DESC_AVAIL | OX_DESC_USED : 0) |
		                 (element->len ? OX_DESC_WRITE : 0);

		ox_ring_put16(&ring[at].id, element->id);
		OX_STORE_POINT();
		__atomic_store_n(&ring[at].len, htole32(element->len), __ATOMIC_RELAXED);
		OX_STORE_POINT();
		if (i) {
			ox_ring_put16_release(&ring[at].flags, flags);
			OX_STORE_POINT();
		} else {
			first_flags = flags;
		}
		at += element->slots;
		if (at >= size) {
			at -= size;
			wrap = !wrap;
		}
	}
	ox_ring_put16_release(&ring[vq->last_used].flags, first_flags);
	OX_STORE_POINT();
	if (ox_unlikely(vq->config.log)) {
		at = vq->last_used;
		for (uint32_t i = 0; i < count; i++) {
			ox_vq_log_ring(vq, at * sizeof(*ring), sizeof(*ring));
			at += vq->pending[i].slots;
			if (at >= size)
				at -= size;
		}
	}
	vq->last_used = (uint16_t)end;
	vq->used_wrap = end_wrap;
	vq->slots -= vq->pending_slots;
	vq->unsignalled += vq->pending_slots;
	vq->pending_count = 0;
	vq->pending_slots = 0;
	if (vq->config.inflight)
		ox_inflight_packed_commit(vq->config.inflight, vq->pending, count);
}

bool ox_packed_wants_notify(struct ox_vq *vq, uint32_t since)
{
	const struct ox_packed_event *event = vq->config.driver;
	uint16_t flags = ox_ring_get16(&event->flags) & 3;
	uint16_t off_wrap, off;

	if (flags == OX_EVENT_DISABLE)
		return false;
	if (flags != OX_EVENT_DESC || !vq->config.event_idx)
		return true;
	off_wrap = ox_ring_get16(&event->off_wrap);
	off = off_wrap & 0x7fff;
	/* A position of the lap before. */
	if (off_wrap >> 15 != vq->used_wrap)
		off = (uint16_t)(off - vq->config.size);
	return (uint16_t)(vq->last_used - off - 1) < since;
}

bool ox_packed_has_work(struct ox_vq *vq)
{
	return packed_is_available(vq,
	                           ox_ring_get16_acquire(&packed_ring(vq)[vq->last_avail].flags));
}

void ox_packed_set_notify(struct ox_vq *vq, bool on)
{
	struct ox_packed_event *event = vq->config.device;
	uint16_t flags = on ? OX_EVENT_ENABLE : OX_EVENT_DISABLE;

	if (on && vq->config.event_idx) {
		ox_ring_put16(&event->off_wrap, vq->last_avail | (uint16_t)(vq->avail_wrap << 15));
		flags = OX_EVENT_DESC;
	}
	/* The position before the flags that make it count. */
	ox_ring_put16_release(&event->flags, flags);
	if (ox_unlikely(vq->config.log))
		ox_dirty_log_mark(vq->config.log, vq->config.device_event_guest_addr,
		                  sizeof(*event));
}
