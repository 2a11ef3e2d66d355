/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The driver's side of both rings, simple and slow: see model.h.
 */
#include "model.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

uint64_t model_random(struct model *model, uint64_t below)
{
	/* xorshift64* */
	model->rng ^= model->rng >> 12;
	model->rng ^= model->rng << 25;
	model->rng ^= model->rng >> 27;
	return (model->rng * 0x2545f4914f6cdd1dull >> 16) % below;
}

static void model_add_region(struct model *model, uint64_t guest, uint64_t size, uint64_t offset)
{
	struct ox_memory *next;
	struct ox_region *region;
	struct ox_error err = {0};

	assert_int_equal(ox_region_map(guest, size, MODEL_USER_BASE + guest, offset, dup(model->fd),
	                               &region, &err),
	                 0);
	assert_int_equal(ox_memory_with(model->memory, region, &next, &err), 0);
	ox_memory_put(model->memory);
	model->memory = next;
}

void model_init(struct model *model, bool packed, uint16_t size, bool event_idx, uint64_t seed)
{
	memset(model, 0, sizeof(*model));
	model->rng = seed * 0x9e3779b97f4a7c15ull + 1;
	model->packed = packed;
	model->event_idx = event_idx;
	model->size = size;
	model->avail_wrap = model->used_wrap = true;
	model->free_slots = size;
	model->free_count = size;
	for (unsigned i = 0; i < size; i++)
		model->free_id[i] = (uint16_t)(size - 1 - i);
	model->chain = calloc(size + 1u, sizeof(*model->chain));
	assert_non_null(model->chain);
	model->fd = memfd_create("model", MFD_CLOEXEC);
	assert_true(model->fd >= 0);
	assert_int_equal(ftruncate(model->fd, 5 * MODEL_MIB), 0);
	model->memory = ox_memory_new();
	model_add_region(model, 0, MODEL_MIB, 0);
	model_add_region(model, MODEL_MIB, MODEL_MIB, 3 * MODEL_MIB);
	model_add_region(model, MODEL_FAR, MODEL_MIB, MODEL_MIB + 4096);
}

void model_free(struct model *model)
{
	ox_memory_put(model->memory);
	close(model->fd);
	free(model->chain);
}

void *model_host(struct model *model, uint64_t addr)
{
	for (unsigned i = 0; i < model->memory->count; i++) {
		const struct ox_region *region = model->memory->region[i];

		if (addr >= region->guest_addr && addr - region->guest_addr < region->size)
			return region->host + (addr - region->guest_addr);
	}
	fail_msg("test bug: address %#llx", (unsigned long long)addr);
	return NULL;
}

void model_write(struct model *model, uint64_t addr, const void *bytes, size_t count)
{
	for (size_t i = 0; i < count; i++)
		memcpy(model_host(model, addr + i), (const char *)bytes + i, 1);
}

struct ox_vq_config model_config(struct model *model)
{
	return (struct ox_vq_config){
	        .packed = model->packed,
	        .event_idx = model->event_idx,
	        .indirect = true,
	        .size = model->size,
	        .memory = model->memory,
	        .desc = model_host(model, MODEL_RINGS),
	        .driver = model_host(model, MODEL_DRIVER),
	        .device = model_host(model, MODEL_DEVICE),
	        .device_guest_addr = model->packed ? MODEL_RINGS : MODEL_DEVICE,
	        .device_event_guest_addr = MODEL_DEVICE,
	        .avail_index = model->packed ? 1u << 15 : 0,
	        .used_index = model->packed ? 1u << 15 : 0,
	};
}

void model_split_desc(struct model *model, uint64_t table, uint16_t i, uint64_t addr, uint32_t len,
                      uint16_t flags, uint16_t next)
{
	struct ox_split_desc d = {htole64(addr), htole32(len), htole16(flags), htole16(next)};

	model_write(model, table + i * sizeof(d), &d, sizeof(d));
}

void model_packed_desc(struct model *model, uint64_t table, uint16_t i, uint64_t addr, uint32_t len,
                       uint16_t id, uint16_t flags)
{
	struct ox_packed_desc d = {htole64(addr), htole32(len), htole16(id), htole16(flags)};

	model_write(model, table + i * sizeof(d), &d, sizeof(d));
}

static struct ox_split_avail *split_avail(struct model *model)
{
	return model_host(model, MODEL_DRIVER);
}
static struct ox_split_used *split_used(struct model *model)
{
	return model_host(model, MODEL_DEVICE);
}

void model_split_avail(struct model *model, uint16_t head)
{
	struct ox_split_avail *avail = split_avail(model);

	ox_ring_put16(&avail->ring[model->next_avail % model->size], head);
	model->next_avail++;
	__atomic_store_n(&avail->idx, htole16(model->next_avail), __ATOMIC_RELEASE);
}

uint32_t model_written(const struct model_chain *chain)
{
	return (uint32_t)(chain->serial * 2654435761u) & 0xfffff;
}

/* Random buffers: `in` ones behind the others. */
static void model_fill(struct model *model, struct model_chain *chain, unsigned max)
{
	unsigned count = 1 + (unsigned)model_random(model, max);
	unsigned out = (unsigned)model_random(model, count + 1);

	memset(chain, 0, sizeof(*chain));
	chain->count = count;
	chain->serial = model->serial++;
	for (unsigned i = 0; i < count; i++) {
		struct model_buffer *buffer = &chain->buffer[i];

		buffer->in = i >= out;
		buffer->len = 1 + (uint32_t)model_random(model, 9000);
		buffer->addr = 0x30000 + model_random(model, 0x80000);
		if (model->plain)
			continue;
		switch (model_random(model, 8)) {
		case 0: /* over the border */
			buffer->addr = MODEL_MIB - model_random(model, buffer->len + 1);
			break;
		case 1:
			buffer->addr = MODEL_FAR + model_random(model, MODEL_MIB - buffer->len);
			break;
		case 2:
			buffer->len = 0;
			break;
		case 3: /* the last byte of memory */
			buffer->addr = 2 * MODEL_MIB - buffer->len;
			break;
		default:
			break;
		}
	}
}

static uint16_t split_flags(const struct model_buffer *buffer)
{
	return buffer->in ? OX_DESC_WRITE : 0;
}

/* Where this chain's indirect table goes: any alignment, over the border for some. */
static uint64_t model_table(struct model *model, uint16_t id)
{
	uint64_t stride = MODEL_BUFFERS * sizeof(struct ox_split_desc) + 16;
	uint64_t slots = 0x20000 / stride;

	return MODEL_TABLES + id % slots * stride + (model->plain ? 0 : model_random(model, 16));
}

static bool split_offer(struct model *model)
{
	struct model_chain made;
	unsigned direct, max = model->size < 8 ? model->size : 8;
	bool indirect = model_random(model, 2);
	uint16_t slot[MODEL_BUFFERS] = {0};
	uint64_t table = 0;

	model_fill(model, &made, max);
	/* How many stand in the ring's table; the others in an indirect one behind them. */
	direct = indirect ? (unsigned)model_random(model, made.count) : made.count;
	if (model->free_count < direct + indirect)
		return false;
	for (unsigned i = 0; i < direct + indirect; i++)
		slot[i] = model->free_id[--model->free_count];
	if (indirect)
		table = model_table(model, slot[0]);
	for (unsigned i = 0; i < made.count; i++) {
		const struct model_buffer *buffer = &made.buffer[i];
		bool last = i + 1 == made.count;
		uint16_t flags = split_flags(buffer) | (last ? 0 : OX_DESC_NEXT);

		if (i < direct)
			model_split_desc(model, MODEL_RINGS, slot[i], buffer->addr, buffer->len,
			                 flags, last ? 0 : slot[i + 1]);
		else
			model_split_desc(model, table, (uint16_t)(i - direct), buffer->addr,
			                 buffer->len, flags, (uint16_t)(i - direct + 1));
	}
	if (indirect)
		model_split_desc(model, MODEL_RINGS, slot[direct], table,
		                 (uint32_t)((made.count - direct) * sizeof(struct ox_split_desc)),
		                 OX_DESC_INDIRECT, 0);
	made.slots = (uint16_t)(direct + indirect);
	made.outstanding = true;
	assert_false(model->chain[slot[0]].outstanding);
	model->chain[slot[0]] = made;
	model_split_avail(model, slot[0]);
	return true;
}

static bool packed_offer(struct model *model)
{
	struct model_chain made;
	unsigned max = model->size < 8 ? model->size : 8;
	bool indirect = model_random(model, 2);
	bool wrap = model->avail_wrap;
	uint16_t at = model->next_avail, id, first_flags = 0, first = at;

	model_fill(model, &made, max);
	made.slots = indirect ? 1 : (uint16_t)made.count;
	if (model->free_slots < made.slots || !model->free_count)
		return false;
	id = model->free_id[--model->free_count];
	if (indirect) {
		uint64_t table = model_table(model, id);
		struct ox_packed_desc *d = model_host(model, MODEL_RINGS + at * 16);

		for (unsigned i = 0; i < made.count; i++)
			model_packed_desc(model, table, (uint16_t)i, made.buffer[i].addr,
			                  made.buffer[i].len, 0xdead, split_flags(&made.buffer[i]));
		d->addr = htole64(table);
		d->len = htole32(made.count * 16);
		d->id = htole16(id);
		first_flags = OX_DESC_INDIRECT | (wrap ? OX_DESC_AVAIL : OX_DESC_USED);
		at++;
	}
	for (unsigned i = 0; !indirect && i < made.count; i++) {
		bool last = i + 1 == made.count;
		uint16_t flags = split_flags(&made.buffer[i]) | (last ? 0 : OX_DESC_NEXT) |
		                 (wrap ? OX_DESC_AVAIL : OX_DESC_USED);
		/* The first one's flags are written last: before, they keep the old lap's. */
		struct ox_packed_desc *d = model_host(model, MODEL_RINGS + at * 16);

		d->addr = htole64(made.buffer[i].addr);
		d->len = htole32(made.buffer[i].len);
		d->id = htole16(last ? id : 0xbeef);
		if (i)
			d->flags = htole16(flags);
		else
			first_flags = flags;
		if (++at == model->size) {
			at = 0;
			wrap = !wrap;
		}
	}
	if (at == model->size) {
		at = 0;
		wrap = !wrap;
	}
	made.outstanding = true;
	assert_false(model->chain[id].outstanding);
	model->chain[id] = made;
	model->free_slots -= made.slots;
	model->next_avail = at;
	model->avail_wrap = wrap;
	__atomic_store_n(&((struct ox_packed_desc *)model_host(model, MODEL_RINGS))[first].flags,
	                 htole16(first_flags), __ATOMIC_RELEASE);
	return true;
}

/* Would a driver that follows 2.7.10 or 2.8.21 notify after adding `slots`? */
static bool model_wants_kick(struct model *model, uint16_t slots)
{
	ox_ring_fence();
	if (model->packed) {
		const struct ox_packed_event *event = model_host(model, MODEL_DEVICE);
		uint16_t flags = ox_ring_get16_acquire(&event->flags);
		uint16_t off_wrap = ox_ring_get16(&event->off_wrap), off = off_wrap & 0x7fff;

		if (flags != OX_EVENT_DESC)
			return flags == OX_EVENT_ENABLE;
		assert_true(model->event_idx);
		assert_true(off < model->size);
		if (off_wrap >> 15 != model->avail_wrap)
			off = (uint16_t)(off - model->size);
		return (uint16_t)(model->next_avail - off - 1) < slots;
	}
	if (model->event_idx) {
		uint16_t event = ox_ring_get16((uint16_t *)&split_used(model)->ring[model->size]);

		return (uint16_t)(model->next_avail - event - 1) < 1;
	}
	return !(ox_ring_get16(&split_used(model)->flags) & OX_USED_NO_NOTIFY);
}

bool model_offer(struct model *model, bool *kick)
{
	uint16_t before = model->free_slots;

	if (!(model->packed ? packed_offer(model) : split_offer(model)))
		return false;
	model->offered++;
	if (kick)
		*kick = model_wants_kick(model, (uint16_t)(before - model->free_slots));
	return true;
}

static void model_return(struct model *model, struct model_chain *chain, uint32_t len)
{
	assert_true(chain->outstanding);
	assert_true(chain->taken);
	assert_int_equal(len, model_written(chain));
	chain->outstanding = chain->taken = false;
	model->reaped++;
}

bool model_has_used(struct model *model)
{
	uint16_t flags;

	if (!model->packed)
		return le16toh(__atomic_load_n(&split_used(model)->idx, __ATOMIC_ACQUIRE)) !=
		       model->next_used;
	flags = le16toh(__atomic_load_n(
	        &((struct ox_packed_desc *)model_host(model, MODEL_RINGS))[model->next_used].flags,
	        __ATOMIC_ACQUIRE));
	return !!(flags & OX_DESC_AVAIL) == model->used_wrap &&
	       !!(flags & OX_DESC_USED) == model->used_wrap;
}

unsigned model_reap(struct model *model)
{
	unsigned count = 0;

	while (model_has_used(model)) {
		struct model_chain *chain;
		uint32_t id;

		if (model->packed) {
			struct ox_packed_desc *d =
			        model_host(model, MODEL_RINGS + model->next_used * 16);

			id = le16toh(d->id);
			assert_true(id < model->size);
			chain = &model->chain[id];
			model_return(model, chain, le32toh(d->len));
			assert_int_equal(!!(le16toh(d->flags) & OX_DESC_WRITE),
			                 model_written(chain) != 0);
			model->free_id[model->free_count++] = (uint16_t)id;
			model->free_slots += chain->slots;
			model->next_used += chain->slots;
			if (model->next_used >= model->size) {
				model->next_used -= model->size;
				model->used_wrap = !model->used_wrap;
			}
		} else {
			const struct ox_split_used_elem *elem =
			        &split_used(model)->ring[model->next_used % model->size];

			id = le32toh(elem->id);
			assert_true(id < model->size);
			chain = &model->chain[id];
			model_return(model, chain, le32toh(elem->len));
			/* Give the descriptors back by walking the table, as it is ours. */
			for (unsigned n = 0; n < chain->slots; n++) {
				struct ox_split_desc *d =
				        model_host(model, MODEL_RINGS + id * sizeof(*d));

				model->free_id[model->free_count++] = (uint16_t)id;
				id = le16toh(d->next);
			}
			model->next_used++;
		}
		count++;
	}
	return count;
}

void model_sleep(struct model *model)
{
	if (model->packed) {
		struct ox_packed_event *event = model_host(model, MODEL_DRIVER);

		ox_ring_put16(&event->off_wrap,
		              (uint16_t)(model->next_used | model->used_wrap << 15));
		__atomic_store_n(&event->flags,
		                 htole16(model->event_idx ? OX_EVENT_DESC : OX_EVENT_ENABLE),
		                 __ATOMIC_RELEASE);
	} else if (model->event_idx) {
		ox_ring_put16(&split_avail(model)->ring[model->size], model->next_used);
	} else {
		ox_ring_put16(&split_avail(model)->flags, 0);
	}
	ox_ring_fence();
	model->asleep = !model_has_used(model);
}

void model_wake(struct model *model)
{
	model->asleep = false;
	if (model->packed)
		ox_ring_put16(&((struct ox_packed_event *)model_host(model, MODEL_DRIVER))->flags,
		              OX_EVENT_DISABLE);
	else if (!model->event_idx)
		ox_ring_put16(&split_avail(model)->flags, OX_AVAIL_NO_INTERRUPT);
}

void model_check_chain(struct model *model, const struct ox_vq_chain *chain)
{
	const struct model_chain *expected;
	uint64_t bytes[2] = {0, 0};
	unsigned at = 0, counts[2] = {0, 0};

	assert_true(chain->head < model->size);
	expected = &model->chain[chain->head];
	assert_true(expected->outstanding);
	if (model->packed)
		assert_int_equal(chain->ring_slots, expected->slots);
	for (unsigned i = 0; i < expected->count; i++) {
		const struct model_buffer *buffer = &expected->buffer[i];
		uint64_t done = 0;

		while (done < buffer->len) {
			const struct iovec *iov = &chain->iov[at];
			uint64_t addr = buffer->addr + done;

			assert_true(at < chain->out_count + chain->in_count);
			assert_int_equal(at >= chain->out_count, buffer->in);
			assert_true(iov->iov_len > 0 && iov->iov_len <= buffer->len - done);
			assert_ptr_equal(iov->iov_base, model_host(model, addr));
			assert_ptr_equal((char *)iov->iov_base + iov->iov_len - 1,
			                 model_host(model, addr + iov->iov_len - 1));
			if (chain->guest_addr)
				assert_int_equal(chain->guest_addr[at], addr);
			bytes[buffer->in] += iov->iov_len;
			counts[buffer->in]++;
			done += iov->iov_len;
			at++;
		}
	}
	assert_int_equal(counts[0], chain->out_count);
	assert_int_equal(counts[1], chain->in_count);
	assert_int_equal(bytes[0], chain->out_bytes);
	assert_int_equal(bytes[1], chain->in_bytes);
}
