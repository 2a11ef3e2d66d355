/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What each vhost-user message does.
 *
 * A handler checks what the parser could not (does it fit this device, this state), writes it
 * down, and lets the queues follow.  It answers 0 or says why it refuses; then nothing has
 * changed, unless what it wrote down was right and only the queue could not start with it.
 * Descriptors that a handler keeps it takes out of s->fds; the others are closed by the
 * caller.
 */
#include "export/vhost_user_private.h"

#include "base/byteorder.h"
#include "virtio/inflight.h"

#include <oxbow/log.h>

#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <string.h>

#define PROTOCOL_FEATURES                                                                        \
	(1ull << OX_VU_P_MQ | 1ull << OX_VU_P_LOG_SHMFD | 1ull << OX_VU_P_REPLY_ACK |            \
	 1ull << OX_VU_P_BACKEND_REQ | 1ull << OX_VU_P_CONFIG | 1ull << OX_VU_P_INFLIGHT_SHMFD | \
	 1ull << OX_VU_P_RESET_DEVICE | 1ull << OX_VU_P_CONFIGURE_MEM_SLOTS |                    \
	 1ull << OX_VU_P_STATUS)

#define TRANSPORT_FEATURES                                                       \
	(1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_RING_PACKED |             \
	 1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_RING_F_INDIRECT_DESC | \
	 1ull << OX_VHOST_USER_F_PROTOCOL_FEATURES | 1ull << OX_VHOST_F_LOG_ALL)

/* SET_CONFIG: "vhost front-end messages used for live migration". */
#define CONFIG_FLAG_MIGRATION 1u

static void reply_bytes(struct ox_vu_session *s, const void *bytes, uint32_t count)
{
	memcpy(s->reply, bytes, count);
	s->reply_bytes = count;
	s->has_reply = true;
}

static void reply_u64(struct ox_vu_session *s, uint64_t value)
{
	reply_bytes(s, &value, sizeof(value));
}

static void replace_fd(int *fd, int value)
{
	if (*fd >= 0)
		close(*fd);
	*fd = value;
}

/* NULL: the front end means a queue that there is not. */
static struct ox_vu_queue *find_queue(struct ox_vu_session *s, uint32_t index, struct ox_error *err)
{
	if (index < s->device->queues)
		return &s->queue[index];
	ox_error_set(err, EINVAL, "there is no queue %u, only %u", index, s->device->queues);
	return NULL;
}

/* Something about the queue changed: it may be tried again. */
static int update_queue_co(struct ox_vu_session *s, struct ox_vu_queue *queue, struct ox_error *err)
{
	queue->failed = false;
	return ox_vu_queues_update_co(s, err);
}

static int update_all_co(struct ox_vu_session *s, struct ox_error *err)
{
	for (unsigned i = 0; i < s->device->queues; i++)
		s->queue[i].failed = false;
	return ox_vu_queues_update_co(s, err);
}

/* --- features ---------------------------------------------------------------------------- */

static uint64_t offered_features(const struct ox_vu_session *s)
{
	struct ox_disk_info info;

	ox_disk_get_info(s->device->disk, &info);
	return TRANSPORT_FEATURES | ox_blk_features(&info);
}

static int get_features(struct ox_vu_session *s, struct ox_error *err)
{
	reply_u64(s, offered_features(s));
	return 0;
}

static int set_features_co(struct ox_vu_session *s, struct ox_error *err)
{
	uint64_t features = s->message.u64;
	uint64_t changed = s->features ^ features;
	uint64_t unknown = features & ~offered_features(s);

	if (unknown)
		return ox_error_set(err, EINVAL, "features %#llx were not offered",
		                    (unsigned long long)unknown);
	if (ox_vu_queues_busy(s)) {
		if (changed & ~(1ull << OX_VHOST_F_LOG_ALL))
			return ox_error_set(err, EBUSY, "features cannot change while queues run");
		if (changed)
			ox_vu_queues_pause_co(s);
	}
	s->features = features;
	s->features_set = true;
	return update_all_co(s, err);
}

static int get_protocol_features(struct ox_vu_session *s, struct ox_error *err)
{
	reply_u64(s, PROTOCOL_FEATURES);
	return 0;
}

static int set_protocol_features(struct ox_vu_session *s, struct ox_error *err)
{
	uint64_t unknown = s->message.u64 & ~PROTOCOL_FEATURES;

	if (unknown)
		return ox_error_set(err, EINVAL, "protocol features %#llx were not offered",
		                    (unsigned long long)unknown);
	s->protocol_features = s->message.u64;
	return 0;
}

static int get_queue_num(struct ox_vu_session *s, struct ox_error *err)
{
	reply_u64(s, s->device->queues);
	return 0;
}

/* --- memory ------------------------------------------------------------------------------ */

static void replace_memory(struct ox_vu_session *s, struct ox_memory *memory)
{
	struct ox_memory *old = s->memory;

	s->memory = memory;
	ox_memory_put(old);
}

static int set_mem_table_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_memory *memory = ox_memory_new();

	for (unsigned i = 0; i < s->message.memory.count; i++) {
		const struct ox_vu_region *wire = &s->message.memory.region[i];
		struct ox_memory *old = memory;
		struct ox_region *region;
		int rc;

		rc = ox_region_map(wire->guest_addr, wire->size, wire->user_addr, wire->mmap_offset,
		                   ox_steal_fd(&s->fds[i]), &region, err);
		if (rc == 0)
			rc = ox_memory_with(old, region, &memory, err);
		if (rc < 0) {
			ox_memory_put(old);
			return rc;
		}
		ox_memory_put(old);
	}
	ox_vu_queues_pause_co(s);
	replace_memory(s, memory);
	return update_all_co(s, err);
}

static int get_max_mem_slots(struct ox_vu_session *s, struct ox_error *err)
{
	reply_u64(s, OX_MEMORY_MAX_REGIONS);
	return 0;
}

/* Nothing that a running request uses goes away: the queues take the larger table up as they
 * run. */
static int add_mem_reg_co(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_region *wire = &s->message.region;
	struct ox_memory *memory;
	struct ox_region *region;
	struct ox_memory *old;
	int rc;

	rc = ox_region_map(wire->guest_addr, wire->size, wire->user_addr, wire->mmap_offset,
	                   ox_steal_fd(&s->fds[0]), &region, err);
	if (rc < 0)
		return rc;
	rc = ox_memory_with(s->memory, region, &memory, err);
	if (rc < 0)
		return rc;
	old = s->memory;
	s->memory = memory;
	ox_vu_queues_set_memory_co(s);
	ox_memory_put(old);
	return update_all_co(s, err);
}

static int rem_mem_reg_co(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_region *wire = &s->message.region;
	struct ox_memory *memory;
	int rc;

	rc = ox_memory_without(s->memory, wire->guest_addr, wire->size, wire->user_addr, &memory,
	                       err);
	if (rc < 0)
		return rc;
	ox_vu_queues_pause_co(s);
	replace_memory(s, memory);
	return update_all_co(s, err);
}

/* --- the dirty log ----------------------------------------------------------------------- */

static int set_log_base_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_dirty_log *log;
	int rc;

	if (!s->message.log.has_fd)
		return ox_error_set(err, ENOTSUP, "a log without a descriptor cannot be used");
	rc = ox_dirty_log_map(s->fds[0], s->message.log.size, s->message.log.offset, &log, err);
	/* With LOG_SHMFD the message has an answer of its own, whatever it says. */
	if (ox_vu_has_protocol(s, OX_VU_P_LOG_SHMFD))
		reply_u64(s, rc < 0);
	if (rc < 0)
		return rc;
	ox_vu_queues_pause_co(s);
	ox_dirty_log_put(s->log);
	s->log = log;
	return update_all_co(s, err);
}

/* --- queues ------------------------------------------------------------------------------ */

static int set_vring_num_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.state.index, err);
	uint32_t num = s->message.state.num;

	if (!queue)
		return -EINVAL;
	if (!num || num > s->device->queue_size_max)
		return ox_error_set(err, EINVAL, "a queue has 1 to %u entries, not %u",
		                    s->device->queue_size_max, num);
	if (num == queue->num)
		return 0;
	if (s->features_set && !ox_vu_has(s, VIRTIO_F_RING_PACKED) && !ox_is_power_of_2(num))
		return ox_error_set(err, EINVAL, "a split ring of %u entries: no power of two",
		                    num);
	if (queue->ring || queue->paused)
		return ox_error_set(err, EBUSY, "the queue runs");
	queue->num = (uint16_t)num;
	return update_queue_co(s, queue, err);
}

static int set_vring_base_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.state.index, err);

	if (!queue)
		return -EINVAL;
	if (queue->ring || queue->paused)
		return ox_error_set(err, EBUSY, "the queue runs");
	queue->base = s->message.state.num;
	queue->base_set = true;
	return update_queue_co(s, queue, err);
}

static int set_vring_addr_co(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_message *m = &s->message;
	struct ox_vu_queue *queue = find_queue(s, m->addr.index, err);

	if (!queue)
		return -EINVAL;
	if (m->addr.flags & ~OX_VU_VRING_F_LOG)
		return ox_error_set(err, EINVAL, "unknown vring flags %#x", m->addr.flags);
	if (queue->addr_set && queue->desc == m->addr.desc && queue->used == m->addr.used &&
	    queue->avail == m->addr.avail && queue->addr_flags == m->addr.flags &&
	    queue->log_addr == m->addr.log)
		return update_queue_co(s, queue, err);
	/* While the queue runs, this is how the log of its ring is switched on and off. */
	ox_vu_queue_pause_co(s, queue);
	queue->desc = m->addr.desc;
	queue->used = m->addr.used;
	queue->avail = m->addr.avail;
	queue->log_addr = m->addr.log;
	queue->addr_flags = m->addr.flags;
	queue->addr_set = true;
	return update_queue_co(s, queue, err);
}

static int get_vring_base_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.state.index, err);
	uint32_t state[2];
	int rc;

	if (!queue)
		return -EINVAL;
	ox_vu_queue_stop_co(s, queue);
	/* It starts again with the next kick descriptor. */
	replace_fd(&queue->kick_fd, -1);
	queue->kick_set = false;
	state[0] = s->message.state.index;
	state[1] = queue->base;
	/* The last queue's stop flushes and unlocks the disk: before the answer, because another
	 * back end may start as soon as the front end has it. */
	rc = update_queue_co(s, queue, err);
	reply_bytes(s, state, sizeof(state));
	return rc;
}

static int take_event_fd(struct ox_vu_session *s, bool reading, int *fd, struct ox_error *err)
{
	*fd = -1;
	if (!s->message.vring_fd.has_fd)
		return 0;
	if (ox_vu_ring_check_fd(s->fds[0], reading, err) < 0)
		return -EINVAL;
	*fd = ox_steal_fd(&s->fds[0]);
	return 0;
}

static int set_vring_fd_co(struct ox_vu_session *s, struct ox_vu_queue *queue, int *slot,
                           enum ox_vu_ring_fd which, struct ox_error *err)
{
	int old, fd;
	int rc = take_event_fd(s, which == OX_VU_RING_KICK, &fd, err);

	if (rc < 0)
		return rc;
	old = *slot;
	*slot = fd;
	if (queue->ring)
		rc = ox_vu_ring_set_fd_co(queue->ring, which, fd, err);
	if (old >= 0)
		close(old);
	return rc;
}

static int set_vring_kick_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.vring_fd.index, err);
	int rc;

	if (!queue)
		return -EINVAL;
	rc = set_vring_fd_co(s, queue, &queue->kick_fd, OX_VU_RING_KICK, err);
	if (rc < 0)
		return rc;
	queue->kick_set = true;
	return update_queue_co(s, queue, err);
}

static int set_vring_call_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.vring_fd.index, err);

	if (!queue)
		return -EINVAL;
	return set_vring_fd_co(s, queue, &queue->call_fd, OX_VU_RING_CALL, err);
}

static int set_vring_err_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.vring_fd.index, err);

	if (!queue)
		return -EINVAL;
	return set_vring_fd_co(s, queue, &queue->err_fd, OX_VU_RING_ERR, err);
}

static int set_vring_enable_co(struct ox_vu_session *s, struct ox_error *err)
{
	struct ox_vu_queue *queue = find_queue(s, s->message.state.index, err);

	if (!queue)
		return -EINVAL;
	if (s->message.state.num > 1)
		return ox_error_set(err, EINVAL, "a queue is enabled with 1 or disabled with 0");
	queue->enabled = s->message.state.num;
	if (!queue->enabled && ox_vu_has(s, OX_VHOST_USER_F_PROTOCOL_FEATURES))
		ox_vu_queue_stop_co(s, queue);
	return update_queue_co(s, queue, err);
}

/* --- configuration space ----------------------------------------------------------------- */

static int get_config(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_message *m = &s->message;
	uint8_t config[OX_BLK_CONFIG_BYTES];
	struct ox_disk_info info;

	ox_vu_cache_seen(s);
	ox_disk_get_info(s->device->disk, &info);
	ox_blk_config_fill(&info, (uint16_t)s->device->queues, ox_vu_cache_shown(s), config);
	memcpy(s->reply, &m->config.offset, 4);
	memcpy(s->reply + 4, &m->config.size, 4);
	memcpy(s->reply + 8, &m->config.flags, 4);
	ox_blk_config_read(config, m->config.offset, m->config.size, s->reply + 12);
	s->reply_bytes = 12 + m->config.size;
	s->has_reply = true;
	return 0;
}

static int set_config(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_message *m = &s->message;
	uint32_t offset = ox_blk_config_offset(m->config.offset);
	bool migration = m->config.flags == CONFIG_FLAG_MIGRATION;
	bool covers = offset <= OX_BLK_CONFIG_WCE_OFFSET &&
	              m->config.size > OX_BLK_CONFIG_WCE_OFFSET - offset;
	uint8_t value;

	if (m->config.flags > CONFIG_FLAG_MIGRATION)
		return ox_error_set(err, EINVAL, "unknown configuration flags %#x",
		                    m->config.flags);
	/* A migrated device brings its whole space; of that, only the switch is not the disk's. */
	if (!covers && migration)
		return 0;
	if (!migration && (offset != OX_BLK_CONFIG_WCE_OFFSET || m->config.size != 1))
		return ox_error_set(err, EPERM,
		                    "only the write-cache byte can be written, not %u bytes at %u",
		                    m->config.size, m->config.offset);
	value = m->config.bytes[OX_BLK_CONFIG_WCE_OFFSET - offset];
	if (value > 1)
		return ox_error_set(err, EINVAL, "the write cache is off (0) or on (1), not %u",
		                    value);
	ox_vu_cache_choose(s, value);
	return 0;
}

/* --- inflight tracking ------------------------------------------------------------------- */

static void reply_inflight(struct ox_vu_session *s, uint64_t bytes)
{
	uint8_t out[24] = {0};

	memcpy(out, &bytes, 8); /* offset 0 follows */
	memcpy(out + 16, &s->message.inflight.queues, 2);
	memcpy(out + 18, &s->message.inflight.queue_size, 2);
	reply_bytes(s, out, s->message.payload_bytes);
}

/* QEMU asks for a region by its queue-size property (128), but Debian's 10.0.13 then lets the guest
 * have rings of 1024 whatever that says.  So the regions that we make have room for the largest
 * rings, and we know them again by their size: the front end gives that back unchanged. */
static int get_inflight_fd(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_message *m = &s->message;
	uint64_t bytes;
	int rc;

	/* A size of 0 means that there is none. */
	reply_inflight(s, 0);
	if (m->inflight.queues > s->device->queues ||
	    m->inflight.queue_size > s->device->queue_size_max)
		return ox_error_set(err, EINVAL,
		                    "an inflight region for %u queues of %u entries; there are at "
		                    "most %u of %u",
		                    m->inflight.queues, m->inflight.queue_size, s->device->queues,
		                    s->device->queue_size_max);
	rc = ox_inflight_create(m->inflight.queues, ox_vu_has(s, VIRTIO_F_RING_PACKED),
	                        m->inflight.queue_size ? s->device->queue_size_max : 0,
	                        &s->reply_fd, &bytes, err);
	if (rc < 0)
		return rc;
	reply_inflight(s, bytes);
	return 0;
}

static int set_inflight_fd(struct ox_vu_session *s, struct ox_error *err)
{
	const struct ox_vu_message *m = &s->message;
	struct ox_mapping mapping;
	int rc;

	if (ox_vu_queues_busy(s))
		return ox_error_set(err, EBUSY, "queues run on the present inflight region");
	if (m->inflight.mmap_offset % 8)
		return ox_error_set(err, EINVAL, "an inflight region at %#llx is not aligned",
		                    (unsigned long long)m->inflight.mmap_offset);
	rc = ox_mapping_map(s->fds[0], m->inflight.mmap_size, m->inflight.mmap_offset, &mapping,
	                    err);
	if (rc < 0)
		return rc;
	ox_mapping_unmap(&s->inflight);
	s->inflight = mapping;
	s->inflight_queues = m->inflight.queues;
	s->inflight_queue_size = m->inflight.queue_size;
	if (m->inflight.queue_size < s->device->queue_size_max &&
	    m->inflight.mmap_size ==
	            m->inflight.queues * ox_inflight_queue_bytes(ox_vu_has(s, VIRTIO_F_RING_PACKED),
	                                                         s->device->queue_size_max))
		s->inflight_queue_size = s->device->queue_size_max;
	for (unsigned i = 0; i < s->device->queues; i++)
		s->queue[i].failed = false;
	return 0;
}

/* --- the rest ---------------------------------------------------------------------------- */

static int set_backend_req_fd(struct ox_vu_session *s, struct ox_error *err)
{
	replace_fd(&s->backend_fd, ox_steal_fd(&s->fds[0]));
	return 0;
}

static int reset_device_co(struct ox_vu_session *s, struct ox_error *err)
{
	ox_vu_queues_reset_co(s);
	return 0;
}

static int set_status_co(struct ox_vu_session *s, struct ox_error *err)
{
	if (s->message.u64 > UINT8_MAX)
		return ox_error_set(err, EINVAL, "a device status has 8 bits");
	if (!s->message.u64)
		ox_vu_queues_reset_co(s);
	s->status = (uint8_t)s->message.u64;
	return 0;
}

static int get_status(struct ox_vu_session *s, struct ox_error *err)
{
	reply_u64(s, s->status);
	return 0;
}

/* SET_OWNER starts a session, which the connection did.  RESET_OWNER: "it is recommended that
 * back-ends either ignore this message".  SET_LOG_FD: nobody waits for the log to change. */
static int do_nothing(struct ox_vu_session *s, struct ox_error *err)
{
	return 0;
}

static int (*const handlers[])(struct ox_vu_session *s, struct ox_error *err) = {
        [OX_VU_GET_FEATURES] = get_features,
        [OX_VU_SET_FEATURES] = set_features_co,
        [OX_VU_SET_OWNER] = do_nothing,
        [OX_VU_RESET_OWNER] = do_nothing,
        [OX_VU_SET_MEM_TABLE] = set_mem_table_co,
        [OX_VU_SET_LOG_BASE] = set_log_base_co,
        [OX_VU_SET_LOG_FD] = do_nothing,
        [OX_VU_SET_VRING_NUM] = set_vring_num_co,
        [OX_VU_SET_VRING_ADDR] = set_vring_addr_co,
        [OX_VU_SET_VRING_BASE] = set_vring_base_co,
        [OX_VU_GET_VRING_BASE] = get_vring_base_co,
        [OX_VU_SET_VRING_KICK] = set_vring_kick_co,
        [OX_VU_SET_VRING_CALL] = set_vring_call_co,
        [OX_VU_SET_VRING_ERR] = set_vring_err_co,
        [OX_VU_GET_PROTOCOL_FEATURES] = get_protocol_features,
        [OX_VU_SET_PROTOCOL_FEATURES] = set_protocol_features,
        [OX_VU_GET_QUEUE_NUM] = get_queue_num,
        [OX_VU_SET_VRING_ENABLE] = set_vring_enable_co,
        [OX_VU_SET_BACKEND_REQ_FD] = set_backend_req_fd,
        [OX_VU_GET_CONFIG] = get_config,
        [OX_VU_SET_CONFIG] = set_config,
        [OX_VU_GET_INFLIGHT_FD] = get_inflight_fd,
        [OX_VU_SET_INFLIGHT_FD] = set_inflight_fd,
        [OX_VU_RESET_DEVICE] = reset_device_co,
        [OX_VU_GET_MAX_MEM_SLOTS] = get_max_mem_slots,
        [OX_VU_ADD_MEM_REG] = add_mem_reg_co,
        [OX_VU_REM_MEM_REG] = rem_mem_reg_co,
        [OX_VU_SET_STATUS] = set_status_co,
        [OX_VU_GET_STATUS] = get_status,
};

int ox_vu_handle_co(struct ox_vu_session *s, struct ox_error *err)
{
	return handlers[s->message.request](s, err);
}
