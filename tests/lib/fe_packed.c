/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The driver's side of packed rings (virtio 1.3, 2.8).
 *
 * A chain takes descriptors at the ring's next positions; its id is in the last of them.  Only
 * the flags of the batch's first head are held back until fe_packed_publish(): the device reads
 * in order, so it sees nothing of the batch before.
 */
#include "frontend.h"

#include <errno.h>
#include <string.h>

#define F_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define F_USED  (1u << VRING_PACKED_DESC_F_USED)
#define WRAP    (1u << VRING_PACKED_EVENT_F_WRAP_CTR)

void fe_packed_reset(struct fe_vq *vq)
{
	memset(vq->pdesc, 0, 16ull * vq->size);
	memset(vq->driver_event, 0, sizeof(*vq->driver_event));
	memset(vq->device_event, 0, sizeof(*vq->device_event));
	vq->avail_wrap = vq->used_wrap = vq->kicked_wrap = true;
	vq->deferred = NULL;
	vq->start_base = 0x8000u | 0x80000000u;
}

static uint16_t avail_flags(const struct fe_vq *vq)
{
	return vq->avail_wrap ? F_AVAIL : F_USED;
}

/* Writes a descriptor at the next position and moves on. */
static void put(struct fe_vq *vq, uint64_t addr, uint32_t len, uint16_t id, uint16_t flags)
{
	struct vring_packed_desc *d = &vq->pdesc[vq->next_avail];

	d->addr = addr;
	d->len = len;
	d->id = id;
	flags |= avail_flags(vq);
	if (!vq->deferred) {
		vq->deferred = d;
		vq->deferred_flags = flags;
	} else {
		d->flags = flags;
	}
	if (++vq->next_avail == vq->size) {
		vq->next_avail = 0;
		vq->avail_wrap = !vq->avail_wrap;
	}
}

int fe_packed_add(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in, void *c)
{
	unsigned count = out + in;
	bool indirect = vq->indirect && count > 1;
	uint16_t id = vq->free_head;
	struct fe_slot *slot;

	if (count == 0 || (indirect && count > FE_MAX_CHAIN))
		return -EINVAL;
	if ((indirect ? 1 : count) > vq->free_count)
		return -ENOSPC;
	slot = &vq->slot[id];
	if (indirect) {
		uint64_t at = (uint64_t)id * FE_MAX_CHAIN * 16;
		struct vring_packed_desc *table =
		        (struct vring_packed_desc *)(void *)(vq->table + at);

		for (unsigned i = 0; i < count; i++)
			table[i] = (struct vring_packed_desc){bufs[i].gpa, bufs[i].len, 0,
			                                      i >= out ? VRING_DESC_F_WRITE : 0};
		put(vq, vq->table_gpa + at, count * 16, id, VRING_DESC_F_INDIRECT);
		slot->descs = 1;
	} else {
		for (unsigned i = 0; i < count; i++)
			put(vq, bufs[i].gpa, bufs[i].len, id,
			    (uint16_t)((i >= out ? VRING_DESC_F_WRITE : 0) |
			               (i + 1 < count ? VRING_DESC_F_NEXT : 0)));
		slot->descs = (uint16_t)count;
	}
	vq->free_head = slot->next;
	slot->cookie = c;
	vq->free_count = (uint16_t)(vq->free_count - slot->descs);
	vq->in_flight++;
	return id;
}

bool fe_packed_publish(struct fe_vq *vq)
{
	uint16_t old = vq->published, new = vq->next_avail, event, flags, off_wrap;

	if (!vq->deferred)
		return false;
	__atomic_store_n(&vq->deferred->flags, vq->deferred_flags, __ATOMIC_RELEASE);
	vq->deferred = NULL;
	vq->published = new;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	flags = __atomic_load_n(&vq->device_event->flags, __ATOMIC_ACQUIRE);
	if (flags != VRING_PACKED_EVENT_FLAG_DESC)
		return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
	off_wrap = __atomic_load_n(&vq->device_event->off_wrap, __ATOMIC_RELAXED);
	event = off_wrap & (uint16_t)~WRAP;
	/* Positions of this batch and the event's, as free-running numbers around `new`. */
	if (!!(off_wrap & WRAP) != vq->avail_wrap)
		event = (uint16_t)(event - vq->size);
	if (old >= new)
		old = (uint16_t)(old - vq->size);
	return vring_need_event(event, new, old);
}

static bool used_ready(const struct fe_vq *vq)
{
	uint16_t flags = __atomic_load_n(&vq->pdesc[vq->last_used].flags, __ATOMIC_ACQUIRE);

	return !!(flags & F_AVAIL) == vq->used_wrap && !!(flags & F_USED) == vq->used_wrap;
}

int fe_packed_pop(struct fe_vq *vq, void **cookie, uint32_t *len)
{
	const volatile struct vring_packed_desc *d = &vq->pdesc[vq->last_used];
	struct fe_slot *slot;
	uint16_t id;

	if (vq->in_flight == 0 || !used_ready(vq))
		return -EAGAIN;
	id = d->id;
	if (len)
		*len = d->len;
	if (id >= vq->size || vq->slot[id].descs == 0) {
		vq->bogus++;
		return -EPROTO;
	}
	slot = &vq->slot[id];
	vq->last_used = (uint16_t)(vq->last_used + slot->descs);
	if (vq->last_used >= vq->size) {
		vq->last_used = (uint16_t)(vq->last_used - vq->size);
		vq->used_wrap = !vq->used_wrap;
	}
	vq->free_count = (uint16_t)(vq->free_count + slot->descs);
	slot->descs = 0;
	slot->next = vq->free_head;
	vq->free_head = id;
	vq->in_flight--;
	if (cookie)
		*cookie = slot->cookie;
	return id;
}

bool fe_packed_enable_call(struct fe_vq *vq)
{
	if (vq->event_idx) {
		uint16_t off = (uint16_t)(vq->last_used | (vq->used_wrap ? WRAP : 0));

		__atomic_store_n(&vq->driver_event->off_wrap, off, __ATOMIC_RELAXED);
		__atomic_store_n(&vq->driver_event->flags, VRING_PACKED_EVENT_FLAG_DESC,
		                 __ATOMIC_RELEASE);
	} else {
		__atomic_store_n(&vq->driver_event->flags, VRING_PACKED_EVENT_FLAG_ENABLE,
		                 __ATOMIC_RELEASE);
	}
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return vq->in_flight && used_ready(vq);
}

void fe_packed_disable_call(struct fe_vq *vq)
{
	__atomic_store_n(&vq->driver_event->flags, VRING_PACKED_EVENT_FLAG_DISABLE,
	                 __ATOMIC_RELEASE);
}
