/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What split and packed rings have in common: set-up, breaking, and the buffer list.
 *
 * A queue that broke stays broken: every pop answers -EPROTO until it is destroyed.  Pushes still
 * work, so that what was in flight can be returned.
 */
#include "virtio/vring.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int ox_vq_break(struct ox_vq *vq, const char *fmt, ...)
{
	va_list args;

	if (vq->broken)
		return -EPROTO;
	va_start(args, fmt);
	/* A text that does not fit is cut.  (The analyzer loses va_start() when it inlines.) */
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized) */
	if (vsnprintf(vq->error, sizeof(vq->error), fmt, args) < 0)
		vq->error[0] = '\0';
	va_end(args);
	vq->broken = true;
	return -EPROTO;
}

/* Did a client take away memory that this queue uses?  What was just read may be zeroes then. */
static bool vq_memory_gone(const struct ox_vq *vq)
{
	const struct ox_inflight *inflight = vq->config.inflight;
	const struct ox_dirty_log *log = vq->config.log;

	return ox_memory_is_broken(vq->config.memory) ||
	       (inflight && inflight->broken &&
	        __atomic_load_n(inflight->broken, __ATOMIC_ACQUIRE)) ||
	       (log && log->mapping.broken &&
	        __atomic_load_n(log->mapping.broken, __ATOMIC_ACQUIRE));
}

static __attribute__((cold)) int vq_check_memory(struct ox_vq *vq, int rc)
{
	if (!vq_memory_gone(vq))
		return rc;
	/* The first cause is the one to tell. */
	vq->broken = false;
	return ox_vq_break(vq, "the client truncated memory that it shares");
}

int ox_vq_add_buffer_slow(struct ox_vq *vq, struct ox_vq_chain *chain, uint64_t addr, uint32_t len,
                          bool in)
{
	uint64_t left = len;

	if (!in && chain->in_count)
		return ox_vq_break(vq, "device-readable buffer behind a device-writable one");
	if (len && addr + (len - 1) < addr)
		return ox_vq_break(vq, "buffer %#llx+%#x wraps around", (unsigned long long)addr,
		                   len);
	while (left) {
		unsigned at = chain->out_count + chain->in_count;
		uint64_t part;
		void *host = ox_memory_translate(vq->config.memory, addr, left, &part, &vq->hint);

		if (!host)
			return ox_vq_break(vq, "buffer %#llx+%#llx is outside memory",
			                   (unsigned long long)addr, (unsigned long long)left);
		if (at >= chain->capacity) {
			if (chain->capacity < OX_VQ_MAX_CHAIN)
				return -ENOBUFS;
			return ox_vq_break(vq, "chain of more than %u buffers", chain->capacity);
		}
		chain->iov[at].iov_base = host;
		chain->iov[at].iov_len = part;
		if (chain->guest_addr)
			chain->guest_addr[at] = addr;
		if (in) {
			chain->in_count++;
			chain->in_bytes += part;
		} else {
			chain->out_count++;
			chain->out_bytes += part;
		}
		addr += part;
		left -= part;
	}
	return 0;
}

int ox_vq_copy_indirect(struct ox_vq *vq, uint64_t addr, void *out)
{
	char *to = out;
	size_t left = OX_DESC_BYTES;

	while (left) {
		uint64_t part;
		const void *from =
		        ox_memory_translate(vq->config.memory, addr, left, &part, &vq->hint);

		if (!from)
			return ox_vq_break(vq, "indirect table at %#llx is outside memory",
			                   (unsigned long long)addr);
		memcpy(to, from, part);
		to += part;
		addr += part;
		left -= part;
	}
	/* What was copied is what is checked: no second look at the guest's bytes. */
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	return 0;
}

static int vq_check_config(const struct ox_vq_config *config, struct ox_error *err)
{
	uintptr_t ring_align = config->packed ? 4 : 2;

	if (!config->size || config->size > OX_VQ_MAX_SIZE ||
	    (!config->packed && !ox_is_power_of_2(config->size)))
		return ox_error_set(err, EINVAL, "virtqueue: size %u is impossible", config->size);
	if (!config->desc || !config->driver || !config->device)
		return ox_error_set(err, EINVAL, "virtqueue: a ring address is missing");
	/* 2.7 and 2.8.10; atomics need it too. */
	if (!ox_is_aligned((uintptr_t)config->desc, 16) ||
	    !ox_is_aligned((uintptr_t)config->driver, ring_align) ||
	    !ox_is_aligned((uintptr_t)config->device, 4))
		return ox_error_set(err, EINVAL, "virtqueue: a ring address is not aligned");
	if (config->inflight &&
	    (config->inflight->packed != config->packed || config->inflight->size < config->size))
		return ox_error_set(
		        err, EINVAL,
		        "virtqueue: inflight region of %u %s entries for a %s ring of %u",
		        config->inflight->size, config->inflight->packed ? "packed" : "split",
		        config->packed ? "packed" : "split", config->size);
	return 0;
}

int ox_vq_init(struct ox_vq *vq, const struct ox_vq_config *config, struct ox_error *err)
{
	int rc = vq_check_config(config, err);

	memset(vq, 0, sizeof(*vq));
	if (rc < 0)
		return rc;
	vq->config = *config;
	vq->notify_on = true;
	vq->pending = calloc(config->size, sizeof(*vq->pending));
	vq->busy = calloc(config->size, 1);
	if (!vq->pending || !vq->busy)
		rc = ox_error_set(err, ENOMEM, "virtqueue: out of memory");
	else
		rc = config->packed ? ox_packed_init(vq, err) : ox_split_init(vq, err);
	if (!rc && ox_sigbus_broken_count() && vq_memory_gone(vq))
		rc = ox_error_set(err, EINVAL, "virtqueue: the client truncated its memory");
	if (rc < 0) {
		free(vq->pending);
		free(vq->busy);
		memset(vq, 0, sizeof(*vq));
		return rc;
	}
	ox_memory_get(vq->config.memory);
	ox_dirty_log_get(vq->config.log);
	return 0;
}

void ox_vq_destroy(struct ox_vq *vq)
{
	ox_memory_put(vq->config.memory);
	ox_dirty_log_put(vq->config.log);
	free(vq->pending);
	free(vq->busy);
	memset(vq, 0, sizeof(*vq));
}

void ox_vq_set_memory(struct ox_vq *vq, struct ox_memory *memory, void *desc, void *driver,
                      void *device)
{
	struct ox_memory *old = vq->config.memory;

	vq->config.memory = ox_memory_get(memory);
	vq->config.desc = desc;
	vq->config.driver = driver;
	vq->config.device = device;
	vq->hint = NULL;
	ox_memory_put(old);
}

void ox_vq_set_log(struct ox_vq *vq, struct ox_dirty_log *log, uint64_t device_guest_addr,
                   uint64_t device_event_guest_addr)
{
	struct ox_dirty_log *old = vq->config.log;

	vq->config.log = ox_dirty_log_get(log);
	vq->config.device_guest_addr = device_guest_addr;
	vq->config.device_event_guest_addr = device_event_guest_addr;
	ox_dirty_log_put(old);
}

int ox_vq_pop(struct ox_vq *vq, struct ox_vq_chain *chain)
{
	int rc;

	if (ox_unlikely(vq->broken))
		return -EPROTO;
	rc = ox_unlikely(vq->config.packed) ? ox_packed_pop(vq, chain) : ox_split_pop(vq, chain);
	if (ox_unlikely(ox_sigbus_broken_count()))
		return vq_check_memory(vq, rc);
	return rc;
}

unsigned ox_vq_resume(struct ox_vq *vq, uint16_t *index)
{
	unsigned count;

	if (!vq->config.inflight)
		return 0;
	count = ox_inflight_pending(vq->config.inflight, index, vq->config.size);
	/* A driver that offers them again meanwhile is caught at once. */
	for (unsigned i = 0; i < count; i++)
		if (index[i] < vq->config.size)
			vq->busy[index[i]] = 1;
	return count;
}

int ox_vq_pop_inflight(struct ox_vq *vq, uint16_t index, struct ox_vq_chain *chain)
{
	int rc;

	if (vq->broken)
		return -EPROTO;
	rc = vq->config.packed ? ox_packed_pop_inflight(vq, index, chain)
	                       : ox_split_pop_inflight(vq, index, chain);
	if (ox_unlikely(ox_sigbus_broken_count()))
		return vq_check_memory(vq, rc);
	return rc;
}

void ox_vq_push(struct ox_vq *vq, const struct ox_vq_chain *chain, uint32_t written)
{
	if (ox_unlikely(vq->config.packed))
		ox_packed_push(vq, chain, written);
	else
		ox_split_push(vq, chain, written);
}

void ox_vq_flush(struct ox_vq *vq)
{
	if (ox_unlikely(vq->config.packed))
		ox_packed_flush(vq);
	else
		ox_split_flush(vq);
}

bool ox_vq_should_notify(struct ox_vq *vq)
{
	uint32_t since;
	bool first = !vq->asked;

	ox_vq_flush(vq);
	since = vq->unsignalled;
	vq->unsignalled = 0;
	vq->asked = true;
	if (ox_unlikely(first))
		return true;
	if (!since)
		return false;
	/* Our elements must be out before the driver's wish is read; the driver publishes its
	 * wish and looks at our elements in that order (2.7.10.1, 2.8.21.2). */
	ox_ring_fence();
	return ox_unlikely(vq->config.packed) ? ox_packed_wants_notify(vq, since)
	                                      : ox_split_wants_notify(vq, since);
}

bool ox_vq_enable_notify(struct ox_vq *vq)
{
	if (ox_unlikely(vq->config.packed))
		ox_packed_set_notify(vq, true);
	else
		ox_split_set_notify(vq, true);
	vq->notify_on = true;
	/* Our wish must be out before the driver's ring is read. */
	ox_ring_fence();
	return ox_vq_has_work(vq);
}

void ox_vq_disable_notify(struct ox_vq *vq)
{
	if (!vq->notify_on)
		return;
	if (ox_unlikely(vq->config.packed))
		ox_packed_set_notify(vq, false);
	else
		ox_split_set_notify(vq, false);
	vq->notify_on = false;
}

bool ox_vq_has_work(struct ox_vq *vq)
{
	return ox_unlikely(vq->config.packed) ? ox_packed_has_work(vq) : ox_split_has_work(vq);
}

uint32_t ox_vq_base(const struct ox_vq *vq)
{
	if (!vq->config.packed)
		return vq->last_avail;
	return (uint32_t)vq->last_avail | (uint32_t)vq->avail_wrap << 15 |
	       (uint32_t)vq->last_used << 16 | (uint32_t)vq->used_wrap << 31;
}

uint32_t ox_vq_stop(struct ox_vq *vq)
{
	ox_vq_flush(vq);
	return ox_vq_base(vq);
}
