/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The driver's side of split rings (virtio 1.3, 2.7).
 *
 * Free descriptors are a list through slot.next; a chain's id is its first descriptor.  The
 * avail index is published for a whole batch with one release store, then a full barrier stands
 * before looking at whether the device wants a kick (2.7.13.4.1).
 */
#include "frontend.h"

#include <errno.h>
#include <string.h>

void fe_split_reset(struct fe_vq *vq)
{
	memset(vq->desc, 0, 16ull * vq->size);
	memset(vq->avail, 0, 6 + 2ull * vq->size);
	memset(vq->used, 0, 6 + 8ull * vq->size);
	vq->start_base = 0;
}

static void fill_table(struct vring_desc *table, const struct fe_buf *bufs, unsigned out,
                       unsigned in)
{
	for (unsigned i = 0; i < out + in; i++) {
		table[i].addr = bufs[i].gpa;
		table[i].len = bufs[i].len;
		table[i].flags = (uint16_t)((i >= out ? VRING_DESC_F_WRITE : 0) |
		                            (i + 1 < out + in ? VRING_DESC_F_NEXT : 0));
		table[i].next = (uint16_t)(i + 1);
	}
}

int fe_split_add(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in, void *c)
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

		fill_table((struct vring_desc *)(void *)(vq->table + at), bufs, out, in);
		vq->desc[id] = (struct vring_desc){vq->table_gpa + at, count * 16,
		                                   VRING_DESC_F_INDIRECT, 0};
		slot->descs = 1;
		vq->free_head = slot->next;
	} else {
		uint16_t at = id;

		for (unsigned i = 0; i < count; i++) {
			struct vring_desc *d = &vq->desc[at];

			d->addr = bufs[i].gpa;
			d->len = bufs[i].len;
			d->flags = (uint16_t)((i >= out ? VRING_DESC_F_WRITE : 0) |
			                      (i + 1 < count ? VRING_DESC_F_NEXT : 0));
			d->next = vq->slot[at].next;
			at = vq->slot[at].next;
		}
		slot->descs = (uint16_t)count;
		vq->free_head = at;
	}
	slot->cookie = c;
	vq->free_count = (uint16_t)(vq->free_count - slot->descs);
	vq->in_flight++;
	vq->avail->ring[vq->next_avail % vq->size] = id;
	vq->next_avail++;
	return id;
}

bool fe_split_publish(struct fe_vq *vq)
{
	uint16_t old = vq->published;

	__atomic_store_n(&vq->avail->idx, vq->next_avail, __ATOMIC_RELEASE);
	vq->published = vq->next_avail;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (vq->event_idx) {
		const uint16_t *event = (const uint16_t *)(const void *)&vq->used->ring[vq->size];

		return vring_need_event(__atomic_load_n(event, __ATOMIC_RELAXED), vq->next_avail,
		                        old);
	}
	return old != vq->next_avail &&
	       !(__atomic_load_n(&vq->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
}

int fe_split_pop(struct fe_vq *vq, void **cookie, uint32_t *len)
{
	const volatile struct vring_used_elem *elem;
	struct fe_slot *slot;
	uint16_t last;
	uint32_t id;

	if (vq->last_used == __atomic_load_n(&vq->used->idx, __ATOMIC_ACQUIRE))
		return -EAGAIN;
	elem = &vq->used->ring[vq->last_used % vq->size];
	id = elem->id;
	if (len)
		*len = elem->len;
	vq->last_used++;
	if (id >= vq->size || vq->slot[id].descs == 0) {
		vq->bogus++;
		return -EPROTO;
	}
	slot = &vq->slot[id];
	/* Give the chain's descriptors back: its last one points to the free list's head. */
	last = (uint16_t)id;
	for (unsigned i = 1; i < slot->descs; i++)
		last = vq->slot[last].next;
	vq->slot[last].next = vq->free_head;
	vq->free_head = (uint16_t)id;
	vq->free_count = (uint16_t)(vq->free_count + slot->descs);
	slot->descs = 0;
	vq->in_flight--;
	if (cookie)
		*cookie = slot->cookie;
	return (int)id;
}

bool fe_split_enable_call(struct fe_vq *vq)
{
	if (vq->event_idx)
		__atomic_store_n(&vq->avail->ring[vq->size], vq->last_used, __ATOMIC_RELAXED);
	else
		__atomic_store_n(&vq->avail->flags, 0, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return vq->last_used != __atomic_load_n(&vq->used->idx, __ATOMIC_ACQUIRE);
}

void fe_split_disable_call(struct fe_vq *vq)
{
	if (vq->event_idx) /* the index just passed: 65,535 completions away */
		__atomic_store_n(&vq->avail->ring[vq->size], (uint16_t)(vq->last_used - 1),
		                 __ATOMIC_RELAXED);
	else
		__atomic_store_n(&vq->avail->flags, VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
}
