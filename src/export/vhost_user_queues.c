/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A session's queues: when they run, on what memory, and what that means for the disk.
 *
 * The front end describes a queue message by message, in an order of its own.  Handlers only
 * write down what they are told; ox_vu_queues_update_co() then makes the rings follow.  A ring
 * starts once the features, memory, size, addresses and a kick descriptor (or its refusal) are
 * known and the queue is enabled, without waiting for the first kick: QEMU's own back end and
 * SPDK do so too, and after a reconnect there may be no further kick.
 *
 * The disk becomes active before the first ring starts and inactive after the last one has
 * stopped; a paused queue counts as running.  If activating fails, the connection ends, so that
 * a front end that reconnects tries again.
 *
 * The guest's write cache.  A guest that negotiated neither FLUSH nor CONFIG_WCE cannot flush, so
 * its writes are made durable.  A guest that switched the cache off (CONFIG_WCE) relies on it,
 * and QEMU neither repeats the switch after a reconnect nor reads it again after a reset: so the
 * switch is kept until a front end that has just connected, or has reset the device, reads the
 * configuration; only then can its guest learn that the default is back.
 */
#include "export/vhost_user_private.h"

#include "virtio/inflight.h"

#include <oxbow/log.h>

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <string.h>

/* Both indices 0, both wrap counters 1. */
#define PACKED_BASE_INITIAL 0x80008000u

static void queue_init(struct ox_vu_queue *queue)
{
	queue->kick_fd = queue->call_fd = queue->err_fd = -1;
}

void ox_vu_queues_init(struct ox_vu_session *s)
{
	s->queue = ox_xcalloc(s->device->queues, sizeof(*s->queue));
	for (unsigned i = 0; i < s->device->queues; i++)
		queue_init(&s->queue[i]);
}

bool ox_vu_queues_busy(const struct ox_vu_session *s)
{
	for (unsigned i = 0; i < s->device->queues; i++)
		if (s->queue[i].ring || s->queue[i].paused)
			return true;
	return false;
}

unsigned ox_vu_session_queues_running(const struct ox_vu_session *s)
{
	unsigned running = 0;

	for (unsigned i = 0; i < s->device->queues; i++)
		running += s->queue[i].ring != NULL;
	return running;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* --- the write cache --------------------------------------------------------------------- */

static bool guest_can_flush(const struct ox_vu_session *s)
{
	return ox_vu_has(s, VIRTIO_BLK_F_FLUSH) || ox_vu_has(s, VIRTIO_BLK_F_CONFIG_WCE);
}

static void apply_cache(struct ox_vu_session *s)
{
	struct ox_vu_device *device = s->device;

	if (s->features_set && !guest_can_flush(s))
		ox_disk_set_writeback(device->disk, false);
	else if (device->cache_off)
		ox_disk_set_writeback(device->disk, false);
	else
		ox_disk_reset_writeback(device->disk);
}

bool ox_vu_cache_shown(const struct ox_vu_session *s)
{
	struct ox_disk_info info;

	ox_disk_get_info(s->device->disk, &info);
	return !s->device->cache_off && !ox_cache_is_writethrough(info.cache);
}

void ox_vu_cache_choose(struct ox_vu_session *s, bool on)
{
	s->device->cache_off = !on;
	s->cache_unseen = false;
	apply_cache(s);
}

void ox_vu_cache_seen(struct ox_vu_session *s)
{
	if (!s->cache_unseen || ox_vu_queues_busy(s))
		return;
	s->cache_unseen = false;
	s->device->cache_off = false;
	apply_cache(s);
}

/* --- stopping ---------------------------------------------------------------------------- */

static void stop_ring_co(struct ox_vu_queue *queue)
{
	struct ox_vu_ring *ring = queue->ring;

	if (!ring)
		return;
	queue->base = ox_vu_ring_stop_co(ring);
	queue->base_set = true;
	queue->ring = NULL;
}

void ox_vu_queue_stop_co(struct ox_vu_session *s, struct ox_vu_queue *queue)
{
	stop_ring_co(queue);
	queue->paused = false;
}

void ox_vu_queue_pause_co(struct ox_vu_session *s, struct ox_vu_queue *queue)
{
	if (!queue->ring)
		return;
	queue->paused = true;
	stop_ring_co(queue);
}

void ox_vu_queues_pause_co(struct ox_vu_session *s)
{
	/* All at once, then wait for each. */
	for (unsigned i = 0; i < s->device->queues; i++)
		if (s->queue[i].ring)
			ox_vu_ring_quiesce_co(s->queue[i].ring);
	for (unsigned i = 0; i < s->device->queues; i++)
		ox_vu_queue_pause_co(s, &s->queue[i]);
}

static void deactivate_co(struct ox_vu_session *s)
{
	if (!s->active)
		return;
	s->active = false;
	ox_disk_deactivate_co(s->device->disk);
}

static void stop_all_co(struct ox_vu_session *s)
{
	ox_vu_queues_pause_co(s);
	for (unsigned i = 0; i < s->device->queues; i++)
		s->queue[i].paused = false;
	deactivate_co(s);
}

void ox_vu_queues_close_co(struct ox_vu_session *s)
{
	stop_all_co(s);
	for (unsigned i = 0; i < s->device->queues; i++) {
		close_fd(&s->queue[i].kick_fd);
		close_fd(&s->queue[i].call_fd);
		close_fd(&s->queue[i].err_fd);
	}
	free(s->queue);
	s->queue = NULL;
}

void ox_vu_queues_reset_co(struct ox_vu_session *s)
{
	stop_all_co(s);
	for (unsigned i = 0; i < s->device->queues; i++) {
		struct ox_vu_queue *queue = &s->queue[i];
		int call_fd = queue->call_fd, err_fd = queue->err_fd;
		uint32_t base = queue->base;

		close_fd(&queue->kick_fd);
		*queue = (struct ox_vu_queue){0};
		queue_init(queue);
		/* QEMU 7.2 stops a device with SET_STATUS 0 and asks for the base only then (later
		 * ones the other way round): without an answer a guest that pauses or migrates
		 * loses its place.  Not base_set: a start without SET_VRING_BASE is a fresh one. */
		queue->base = base;
		/* A front end tells these once, before it resets the device. */
		queue->call_fd = call_fd;
		queue->err_fd = err_fd;
	}
	ox_mapping_unmap(&s->inflight);
	memset(&s->inflight, 0, sizeof(s->inflight));
	s->features = 0;
	s->features_set = false;
	s->status = 0;
	s->cache_unseen = true;
	apply_cache(s);
}

/* --- starting ---------------------------------------------------------------------------- */

struct areas {
	void *desc, *driver, *device;
	uint64_t device_guest_addr, device_event_guest_addr;
};

static void *translate(const struct ox_vu_session *s, uint64_t user_addr, uint64_t bytes,
                       unsigned align, uint64_t *guest_addr)
{
	void *host = ox_memory_translate_user(s->memory, user_addr, bytes, guest_addr);

	return (uintptr_t)host % align ? NULL : host;
}

/* Where the front end's addresses are here; sizes and alignments of virtio 1.3, 2.7 and 2.8. */
static int find_areas(const struct ox_vu_session *s, const struct ox_vu_queue *queue,
                      struct areas *areas)
{
	uint64_t num = queue->num, desc_guest_addr;
	bool event_idx = ox_vu_has(s, VIRTIO_RING_F_EVENT_IDX);

	if (ox_vu_has(s, VIRTIO_F_RING_PACKED)) {
		areas->desc = translate(s, queue->desc, 16 * num, 16, &desc_guest_addr);
		areas->driver = translate(s, queue->avail, 4, 4, NULL);
		areas->device = translate(s, queue->used, 4, 4, &areas->device_event_guest_addr);
		areas->device_guest_addr = desc_guest_addr;
	} else {
		areas->desc = translate(s, queue->desc, 16 * num, 16, NULL);
		areas->driver =
		        translate(s, queue->avail, 4 + 2 * num + (event_idx ? 2 : 0), 2, NULL);
		areas->device = translate(s, queue->used, 4 + 8 * num + (event_idx ? 2 : 0), 4,
		                          &desc_guest_addr);
		/* "log_guest_addr should be used to calculate the log offset" */
		areas->device_guest_addr = queue->log_addr;
		areas->device_event_guest_addr = 0;
	}
	return areas->desc && areas->driver && areas->device ? 0 : -EFAULT;
}

static int find_inflight(struct ox_vu_session *s, unsigned index, struct ox_vu_ring_setup *setup,
                         struct ox_error *err)
{
	uint64_t bytes;

	if (!s->inflight.host)
		return 0;
	/* A guest that has larger rings than its front end knows of loses requests if we are
	 * killed; without a disk it would lose more. */
	if (index < s->inflight_queues && setup->config.size > s->inflight_queue_size) {
		ox_log(OX_LOG_WARNING,
		       "%s: queue %u has %u entries and its inflight region %u: requests in flight "
		       "are lost if this process is killed",
		       s->device->name, index, setup->config.size, s->inflight_queue_size);
		return 0;
	}
	bytes = ox_inflight_queue_bytes(setup->config.packed, s->inflight_queue_size);
	bytes = ox_align_up(bytes, 64);
	if (index >= s->inflight_queues || setup->config.size > s->inflight_queue_size ||
	    !ox_range_within(index * bytes, bytes, s->inflight.size))
		return ox_error_set(err, EINVAL,
		                    "queue %u of %u entries has no place in an inflight region of "
		                    "%u queues of %u entries and %llu bytes",
		                    index, setup->config.size, s->inflight_queues,
		                    s->inflight_queue_size, (unsigned long long)s->inflight.size);
	setup->inflight_area = s->inflight.host + index * bytes;
	setup->inflight_size = s->inflight_queue_size;
	setup->inflight_broken = s->inflight.broken;
	return 0;
}

static void set_base(const struct ox_vu_session *s, const struct ox_vu_queue *queue,
                     struct ox_vq_config *config)
{
	uint32_t base = queue->base;

	if (!queue->base_set)
		base = config->packed ? PACKED_BASE_INITIAL : 0;
	config->avail_index = (uint16_t)base;
	/* A queue stops with nothing in flight, so used stands where avail does; what is in flight
	 * all the same is in the inflight region, and that says where used stands.  Some front
	 * ends do not fill the upper half in. */
	config->used_index = config->avail_index;
}

static int activate_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_error why = {0};
	int rc;

	if (s->active)
		return 0;
	rc = ox_disk_activate_co(s->device->disk, &why);
	if (rc < 0) {
		ox_error_set(err, -rc, "%s", why.text);
		return -ECONNABORTED;
	}
	s->active = true;
	return 0;
}

static int start_queue_co(struct ox_vu_session *s, unsigned index, struct ox_error *err)
{
	struct ox_vu_device *device = s->device;
	struct ox_vu_queue *queue = &s->queue[index];
	struct ox_vu_ring_setup setup = {
	        .index = index,
	        .name = device->name,
	        .loop = device->loops[index % device->loop_count],
	        .kick_fd = queue->kick_fd,
	        .call_fd = queue->call_fd,
	        .err_fd = queue->err_fd,
	};
	struct ox_disk_info info;
	struct areas areas;
	int rc;

	if (find_areas(s, queue, &areas) < 0) {
		/* Front ends take regions away and bring them back around a running queue. */
		if (queue->paused)
			return 0;
		return ox_error_set(err, EFAULT,
		                    "queue %u of %u entries at %#llx, %#llx, %#llx is not in the "
		                    "memory that was given",
		                    index, queue->num, (unsigned long long)queue->desc,
		                    (unsigned long long)queue->avail,
		                    (unsigned long long)queue->used);
	}
	rc = activate_co(s, err);
	if (rc < 0)
		return rc;
	setup.config = (struct ox_vq_config){
	        .packed = ox_vu_has(s, VIRTIO_F_RING_PACKED),
	        .event_idx = ox_vu_has(s, VIRTIO_RING_F_EVENT_IDX),
	        .indirect = ox_vu_has(s, VIRTIO_RING_F_INDIRECT_DESC),
	        .size = queue->num,
	        .memory = s->memory,
	        .desc = areas.desc,
	        .driver = areas.driver,
	        .device = areas.device,
	        .device_guest_addr = areas.device_guest_addr,
	        .device_event_guest_addr = areas.device_event_guest_addr,
	};
	if (ox_vu_has(s, OX_VHOST_F_LOG_ALL))
		setup.log = s->log;
	if (queue->addr_flags & OX_VU_VRING_F_LOG)
		setup.config.log = s->log;
	set_base(s, queue, &setup.config);
	rc = find_inflight(s, index, &setup, err);
	if (rc < 0)
		return rc;
	ox_disk_get_info(device->disk, &info);
	ox_blk_limits_init(&setup.limits, &info);
	setup.queue = ox_disk_get_queue(device->disk, setup.loop);
	if (!setup.queue)
		return ox_error_set(err, EINVAL, "queue %u: the disk has no I/O thread for it",
		                    index);
	rc = ox_vu_ring_start_co(&setup, &queue->ring, err);
	if (rc < 0)
		return rc;
	queue->paused = false;
	return 0;
}

static bool may_run(const struct ox_vu_session *s, const struct ox_vu_queue *queue)
{
	if (!s->features_set || !s->memory->count || !queue->num || !queue->addr_set ||
	    !queue->kick_set)
		return false;
	return queue->enabled || !ox_vu_has(s, OX_VHOST_USER_F_PROTOCOL_FEATURES);
}

int ox_vu_queues_update_co(struct ox_vu_session *s, struct ox_error *err)
{
	int result = 0;

	for (unsigned i = 0; i < s->device->queues; i++) {
		struct ox_vu_queue *queue = &s->queue[i];
		int rc;

		if (!may_run(s, queue)) {
			/* Memory that is gone for a moment does not end a queue. */
			if (s->memory->count)
				ox_vu_queue_stop_co(s, queue);
			continue;
		}
		if (queue->ring || queue->failed)
			continue;
		if (!ox_vu_queues_busy(s))
			apply_cache(s);
		rc = start_queue_co(s, i, err);
		if (rc == -ECONNABORTED)
			return rc;
		if (rc < 0) {
			queue->failed = true;
			queue->paused = false;
			result = rc;
		}
	}
	if (!ox_vu_queues_busy(s))
		deactivate_co(s);
	return result;
}

void ox_vu_queues_set_memory_co(struct ox_vu_session *s)
{
	for (unsigned i = 0; i < s->device->queues; i++) {
		struct ox_vu_queue *queue = &s->queue[i];
		struct areas areas;

		if (!queue->ring)
			continue;
		if (find_areas(s, queue, &areas) == 0)
			ox_vu_ring_set_memory_co(queue->ring, s->memory, areas.desc, areas.driver,
			                         areas.device);
		else
			ox_vu_queue_pause_co(s, queue);
	}
}
