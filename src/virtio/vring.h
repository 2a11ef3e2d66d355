/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Private to src/virtio: what rings look like in memory (virtio 1.3, 2.7 and 2.8), and what
 * vq.c, split.c and packed.c share.
 *
 * Everything in guest memory is little endian and changes under us: fields are read once, by
 * the ox_ring_ functions, into locals.
 */
#ifndef OX_VIRTIO_VRING_H
#define OX_VIRTIO_VRING_H

#include "virtio/inflight.h"
#include "virtio/vq.h"

#include <endian.h>

enum {
	OX_DESC_NEXT = 1,
	OX_DESC_WRITE = 2,
	OX_DESC_INDIRECT = 4,
	OX_DESC_AVAIL = 1 << 7, /* packed */
	OX_DESC_USED = 1 << 15, /* packed */
};

enum { OX_AVAIL_NO_INTERRUPT = 1, OX_USED_NO_NOTIFY = 1 };

/* Packed: event suppression flags. */
enum { OX_EVENT_ENABLE = 0, OX_EVENT_DISABLE = 1, OX_EVENT_DESC = 2 };

struct ox_split_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

struct ox_split_avail {
	uint16_t flags;
	uint16_t idx;
	uint16_t ring[]; /* behind it: used_event */
};

struct ox_split_used_elem {
	uint32_t id;
	uint32_t len;
};

struct ox_split_used {
	uint16_t flags;
	uint16_t idx;
	struct ox_split_used_elem ring[]; /* behind it: avail_event */
};

struct ox_packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

struct ox_packed_event {
	uint16_t off_wrap;
	uint16_t flags;
};

_Static_assert(sizeof(struct ox_split_desc) == 16, "virtio 1.3, 2.7.5");
_Static_assert(sizeof(struct ox_packed_desc) == 16, "virtio 1.3, 2.8.13");

static inline uint16_t ox_ring_get16(const uint16_t *p)
{
	return le16toh(__atomic_load_n(p, __ATOMIC_RELAXED));
}
static inline uint16_t ox_ring_get16_acquire(const uint16_t *p)
{
	return le16toh(__atomic_load_n(p, __ATOMIC_ACQUIRE));
}
static inline void ox_ring_put16(uint16_t *p, uint16_t value)
{
	__atomic_store_n(p, htole16(value), __ATOMIC_RELAXED);
}
static inline void ox_ring_put16_release(uint16_t *p, uint16_t value)
{
	__atomic_store_n(p, htole16(value), __ATOMIC_RELEASE);
}

/* Our store before, the other side's load behind.  (The older spelling of the full fence, because
 * ThreadSanitizer builds refuse the newer one; no data race depends on it.) */
static inline void ox_ring_fence(void)
{
	__sync_synchronize();
}

static inline struct ox_split_desc ox_split_desc_of(uint64_t first, uint64_t second)
{
	second = le64toh(second);
	return (struct ox_split_desc){
	        .addr = le64toh(first),
	        .len = (uint32_t)second,
	        .flags = (uint16_t)(second >> 32),
	        .next = (uint16_t)(second >> 48),
	};
}
/* Two loads: a descriptor is ours to read whole only after the index that made it available. */
static inline struct ox_split_desc ox_split_desc_load(const struct ox_split_desc *p)
{
	const uint64_t *words = (const uint64_t *)(const void *)p;

	return ox_split_desc_of(__atomic_load_n(&words[0], __ATOMIC_RELAXED),
	                        __atomic_load_n(&words[1], __ATOMIC_RELAXED));
}
/* flags are read by the caller, with acquire where they say that the rest is there. */
static inline struct ox_packed_desc ox_packed_desc_load(const struct ox_packed_desc *p,
                                                        uint16_t flags)
{
	struct ox_packed_desc d = {
	        .addr = le64toh(__atomic_load_n(&p->addr, __ATOMIC_RELAXED)),
	        .len = le32toh(__atomic_load_n(&p->len, __ATOMIC_RELAXED)),
	        .id = le16toh(__atomic_load_n(&p->id, __ATOMIC_RELAXED)),
	        .flags = flags,
	};
	return d;
}

static inline bool ox_region_holds(const struct ox_region *region, uint64_t addr, uint64_t length)
{
	uint64_t offset = addr - region->guest_addr;

	return offset < region->size && length <= region->size - offset;
}

/* How many mappings in the process a client has broken: while 0, no flag needs a look. */
extern unsigned ox_sigbus_broken_mappings;
static inline unsigned ox_sigbus_broken_count(void)
{
	return __atomic_load_n(&ox_sigbus_broken_mappings, __ATOMIC_RELAXED);
}

/* The inflight region (vhost-user, "Inflight I/O tracking"), host byte order. */
struct ox_inflight_split_entry {
	uint8_t inflight;
	uint8_t padding[5];
	uint16_t next; /* of the last batch */
	uint64_t counter;
};
struct ox_inflight_split {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t last_batch_head;
	uint16_t used_idx;
	struct ox_inflight_split_entry desc[];
};

struct ox_inflight_packed_entry {
	uint8_t inflight;
	uint8_t padding;
	uint16_t next; /* free list, or the chain's next */
	uint16_t last; /* of the chain */
	uint16_t num;  /* of the chain */
	uint64_t counter;
	uint16_t id;
	uint16_t flags;
	uint32_t len;
	uint64_t addr;
};
struct ox_inflight_packed {
	uint64_t features;
	uint16_t version;
	uint16_t desc_num;
	uint16_t free_head;
	uint16_t old_free_head;
	uint16_t used_idx;
	uint16_t old_used_idx;
	uint8_t used_wrap_counter;
	uint8_t old_used_wrap_counter;
	uint8_t padding[7];
	struct ox_inflight_packed_entry desc[];
};
_Static_assert(sizeof(struct ox_inflight_split) == 16, "vhost-user layout");
_Static_assert(sizeof(struct ox_inflight_split_entry) == 16, "vhost-user layout");
_Static_assert(sizeof(struct ox_inflight_packed) == 32, "vhost-user layout");
_Static_assert(sizeof(struct ox_inflight_packed_entry) == 32, "vhost-user layout");

/* A store that a later process may find: after those before it in the program, before those
 * behind it.  A test counts and stops at each. */
#ifndef OX_STORE_POINT
#define OX_STORE_POINT() ((void)0)
#endif
#define ox_persist(where, value)                                      \
	do {                                                          \
		__atomic_store_n((where), (value), __ATOMIC_RELEASE); \
		OX_STORE_POINT();                                     \
	} while (0)

struct ox_vq_pending {
	uint32_t len;
	uint16_t id; /* head, or packed: buffer id */
	uint16_t slots;
	uint16_t inflight_index;
};

/* The order of these stores is explained at the head of inflight.c. */
static inline void ox_inflight_split_take(struct ox_inflight *inflight, uint16_t head)
{
	struct ox_inflight_split *region = inflight->area;

	ox_persist(&region->desc[head].counter, inflight->counter++);
	ox_persist(&region->desc[head].inflight, 1);
}
static inline void ox_inflight_split_batch(struct ox_inflight *inflight, uint16_t head)
{
	struct ox_inflight_split *region = inflight->area;

	ox_persist(&region->desc[head].next, region->last_batch_head);
	ox_persist(&region->last_batch_head, head);
}
static inline void ox_inflight_split_clear(struct ox_inflight *inflight,
                                           const struct ox_vq_pending *batch, uint32_t count,
                                           uint16_t used_idx)
{
	struct ox_inflight_split *region = inflight->area;

	for (uint32_t i = 0; i < count; i++)
		ox_persist(&region->desc[batch[i].id].inflight, 0);
	ox_persist(&region->used_idx, used_idx);
}

/* Packed.  take: `num` entries were filled along the free list from `head` to `last`, `next` is
 * behind it. */
void ox_inflight_packed_take(struct ox_inflight *inflight, uint16_t head, uint16_t last,
                             uint16_t next, uint16_t num);
/* Before a batch is written to the ring / after its first flags were. */
void ox_inflight_packed_prepare(struct ox_inflight *inflight, const struct ox_vq_pending *batch,
                                uint32_t count, uint16_t used_idx, bool used_wrap);
void ox_inflight_packed_commit(struct ox_inflight *inflight, const struct ox_vq_pending *batch,
                               uint32_t count);

/* Sets vq->broken and the text; -EPROTO. */
int ox_vq_break(struct ox_vq *vq, const char *fmt, ...) __attribute__((format(printf, 2, 3), cold));

/* Adds a buffer to the chain, split where regions meet.  0, -EPROTO, -ENOBUFS. */
int ox_vq_add_buffer_slow(struct ox_vq *vq, struct ox_vq_chain *chain, uint64_t addr, uint32_t len,
                          bool in);

/* The same, the usual case inline: room in the list, within the last region, in order. */
static inline int ox_vq_add_buffer(struct ox_vq *vq, struct ox_vq_chain *chain, uint64_t addr,
                                   uint32_t len, bool in)
{
	const struct ox_region *region = vq->hint;
	unsigned at = chain->out_count + chain->in_count;

	if (ox_unlikely(!region || !len || !ox_region_holds(region, addr, len) ||
	                at >= chain->capacity || (!in && chain->in_count)))
		return ox_vq_add_buffer_slow(vq, chain, addr, len, in);
	chain->iov[at].iov_base = region->host + (addr - region->guest_addr);
	chain->iov[at].iov_len = len;
	if (chain->guest_addr)
		chain->guest_addr[at] = addr;
	if (in) {
		chain->in_count++;
		chain->in_bytes += len;
	} else {
		chain->out_count++;
		chain->out_bytes += len;
	}
	return 0;
}

/* Both rings' descriptors are this long, also in indirect tables. */
#define OX_DESC_BYTES 16u

/* The indirect table at guest-physical addr: how many entries it has, and its host address, NULL
 * when it lies across regions or is not aligned (then ox_vq_copy_indirect() reads an entry). */
static inline int ox_vq_find_indirect(struct ox_vq *vq, uint64_t addr, uint32_t bytes,
                                      uint32_t *count, const void **table)
{
	const struct ox_region *region;

	*count = bytes / OX_DESC_BYTES;
	*table = NULL;
	if (ox_unlikely(!bytes || bytes % OX_DESC_BYTES))
		return ox_vq_break(vq, "indirect table of %u bytes", bytes);
	if (ox_unlikely(*count > OX_VQ_MAX_CHAIN))
		return ox_vq_break(vq, "indirect table of %u descriptors (limit %u)", *count,
		                   OX_VQ_MAX_CHAIN);
	if (ox_unlikely(addr + bytes < addr))
		return ox_vq_break(vq, "indirect table at %#llx wraps around",
		                   (unsigned long long)addr);
	region = ox_memory_find(vq->config.memory, addr, bytes, &vq->hint);
	if (ox_likely(region)) {
		const char *host = region->host + (addr - region->guest_addr);

		if (ox_likely(ox_is_aligned((uintptr_t)host, 8)))
			*table = host;
	}
	return 0;
}
/* Copies one entry, in pieces if need be. */
int ox_vq_copy_indirect(struct ox_vq *vq, uint64_t addr, void *to);

static inline void ox_vq_chain_clear(struct ox_vq_chain *chain)
{
	chain->out_count = chain->in_count = 0;
	chain->out_bytes = chain->in_bytes = 0;
	chain->ring_slots = 0;
	chain->inflight_index = 0;
}

/* Marks bytes of the used ring (split) or descriptor ring (packed) as written. */
static inline void ox_vq_log_ring(struct ox_vq *vq, uint64_t offset, uint64_t length)
{
	if (ox_unlikely(vq->config.log))
		ox_dirty_log_mark(vq->config.log, vq->config.device_guest_addr + offset, length);
}

int ox_split_init(struct ox_vq *vq, struct ox_error *err);
int ox_split_pop(struct ox_vq *vq, struct ox_vq_chain *chain);
int ox_split_pop_inflight(struct ox_vq *vq, uint16_t head, struct ox_vq_chain *chain);
void ox_split_push(struct ox_vq *vq, const struct ox_vq_chain *chain, uint32_t written);
void ox_split_flush(struct ox_vq *vq);
/* Does the driver want a notification for what was flushed lately (elements or slots)? */
bool ox_split_wants_notify(struct ox_vq *vq, uint32_t since);
void ox_split_set_notify(struct ox_vq *vq, bool on);
bool ox_split_has_work(struct ox_vq *vq);

int ox_packed_init(struct ox_vq *vq, struct ox_error *err);
int ox_packed_pop(struct ox_vq *vq, struct ox_vq_chain *chain);
int ox_packed_pop_inflight(struct ox_vq *vq, uint16_t index, struct ox_vq_chain *chain);
void ox_packed_push(struct ox_vq *vq, const struct ox_vq_chain *chain, uint32_t written);
void ox_packed_flush(struct ox_vq *vq);
/* Does the driver want a notification for what was flushed lately (elements or slots)? */
bool ox_packed_wants_notify(struct ox_vq *vq, uint32_t since);
void ox_packed_set_notify(struct ox_vq *vq, bool on);
bool ox_packed_has_work(struct ox_vq *vq);

#endif
