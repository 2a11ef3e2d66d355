/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The front end: making one, negotiation, and starting and stopping queues in QEMU's order.
 *
 * Guest memory: region 0 at FE_RING_GPA holds for each queue the three ring areas, a header slot
 * and an indirect table for every id; data memory follows at FE_DATA_GPA.
 */
#include "frontend.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

void fe_options_init(struct fe_options *options, const char *path)
{
	*options = (struct fe_options){
	        .path = path,
	        .features = FE_FEATURES_DEFAULT,
	        .protocol_features = FE_PROTOCOL_DEFAULT,
	        .queues = 1,
	        .queue_size = 128,
	        .memory = 16u << 20,
	        .regions = 1,
	        .timeout_ms = 20000,
	};
}

static uint64_t page_up(uint64_t value)
{
	return (value + 4095) & ~4095ull;
}

/* Ring areas, headers and tables of a queue, each on its own page. */
static uint64_t queue_bytes(uint16_t size)
{
	return page_up(16ull * size) + page_up(6 + 2ull * size) + page_up(6 + 8ull * size) +
	       page_up((uint64_t)FE_HEADER_STRIDE * size) + page_up(16ull * FE_MAX_CHAIN * size);
}

static void place_queue(struct fe *fe, struct fe_vq *vq, uint64_t gpa)
{
	vq->desc_gpa = gpa;
	vq->driver_gpa = vq->desc_gpa + page_up(16ull * vq->size);
	vq->device_gpa = vq->driver_gpa + page_up(6 + 2ull * vq->size);
	vq->header_gpa = vq->device_gpa + page_up(6 + 8ull * vq->size);
	vq->table_gpa = vq->header_gpa + page_up((uint64_t)FE_HEADER_STRIDE * vq->size);
	vq->desc = fe_host(fe, vq->desc_gpa, 16);
	vq->avail = fe_host(fe, vq->driver_gpa, 4);
	vq->used = fe_host(fe, vq->device_gpa, 4);
	vq->header = fe_host(fe, vq->header_gpa, FE_HEADER_STRIDE);
	vq->table = fe_host(fe, vq->table_gpa, 16);
}

static void die(const char *what)
{
	perror(what);
	abort();
}

struct fe *fe_new(const struct fe_options *options)
{
	struct fe *fe = calloc(1, sizeof(*fe));
	uint64_t bytes, part;

	if (!fe)
		die("front end");
	fe->options = *options;
	fe->sock = fe->backend_fd = fe->inflight_fd = fe->log_fd = -1;
	fe->fuse = -1;
	bytes = queue_bytes(options->queue_size);
	if (fe_region_new(fe, FE_RING_GPA, bytes * options->queues, -1, 0) < 0)
		die("guest memory");
	fe->data_gpa = FE_DATA_GPA;
	part = page_up(options->memory / (options->regions ? options->regions : 1));
	for (unsigned i = 0; i < options->regions; i++)
		if (fe_region_new(fe, FE_DATA_GPA + i * part, part, -1, 0) < 0)
			die("guest memory");
	fe->vq = calloc(options->queues, sizeof(*fe->vq));
	if (!fe->vq)
		die("front end");
	for (unsigned i = 0; i < options->queues; i++) {
		struct fe_vq *vq = &fe->vq[i];

		vq->fe = fe;
		vq->index = i;
		vq->size = options->queue_size;
		vq->slot = calloc(vq->size, sizeof(*vq->slot));
		vq->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		vq->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		vq->err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (!vq->slot || vq->kick_fd < 0 || vq->call_fd < 0 || vq->err_fd < 0)
			die("queue");
		place_queue(fe, vq, FE_RING_GPA + i * bytes);
		fe_vq_reset(vq);
	}
	return fe;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void fe_free(struct fe *fe)
{
	if (!fe)
		return;
	fe_disconnect(fe);
	close_fd(&fe->inflight_fd);
	close_fd(&fe->log_fd);
	if (fe->log)
		munmap(fe->log, fe->log_size);
	for (unsigned i = 0; i < fe->options.queues; i++) {
		close_fd(&fe->vq[i].kick_fd);
		close_fd(&fe->vq[i].call_fd);
		close_fd(&fe->vq[i].err_fd);
		free(fe->vq[i].slot);
	}
	for (unsigned i = 0; i < fe->region_count; i++) {
		munmap(fe->region[i].host, fe->region[i].size);
		close(fe->region[i].fd);
	}
	free(fe->vq);
	free(fe);
}

int fe_connect(struct fe *fe)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};

	if (strlen(fe->options.path) >= sizeof(addr.sun_path))
		return -ENAMETOOLONG;
	strcpy(addr.sun_path, fe->options.path);
	fe->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fe->sock < 0)
		return -errno;
	if (connect(fe->sock, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
		int code = errno;

		snprintf(fe->error, sizeof(fe->error), "%s: %s", fe->options.path, strerror(code));
		close_fd(&fe->sock);
		return -code;
	}
	return 0;
}

void fe_disconnect(struct fe *fe)
{
	close_fd(&fe->sock);
	close_fd(&fe->backend_fd);
	fe->features = fe->protocol_features = 0;
	for (unsigned i = 0; i < fe->options.queues; i++)
		fe->vq[i].started = false;
	for (unsigned i = 0; i < fe->region_count; i++)
		fe->region[i].known = false;
}

static int open_backend_channel(struct fe *fe)
{
	int pair[2];
	int rc;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	close_fd(&fe->backend_fd);
	fe->backend_fd = pair[0];
	rc = fe_send_ack(fe, FE_SET_BACKEND_REQ_FD, NULL, 0, &pair[1], 1);
	close(pair[1]);
	return rc;
}

int fe_set_features(struct fe *fe, uint64_t features)
{
	fe->features = features;
	for (unsigned i = 0; i < fe->options.queues; i++) {
		struct fe_vq *vq = &fe->vq[i];
		bool packed = features & FE_F_PACKED;

		vq->event_idx = features & FE_F_EVENT_IDX;
		vq->indirect = features & FE_F_INDIRECT;
		if (packed != vq->packed) {
			vq->packed = packed;
			fe_vq_reset(vq);
		}
	}
	return fe_send_ack(fe, FE_SET_FEATURES, &features, 8, NULL, 0);
}

int fe_negotiate(struct fe *fe)
{
	int rc = fe_get_u64(fe, FE_GET_FEATURES, &fe->offered);

	if (rc)
		return rc;
	rc = fe_send(fe, FE_SET_OWNER, 0, NULL, 0, NULL, 0);
	if (rc)
		return rc;
	fe->queue_num = 1;
	fe->mem_slots = 8;
	if (fe->offered & fe->options.features & FE_F_PROTOCOL_FEATURES) {
		uint64_t wanted;

		rc = fe_get_u64(fe, FE_GET_PROTOCOL_FEATURES, &fe->offered_protocol);
		if (rc)
			return rc;
		wanted = fe->offered_protocol & fe->options.protocol_features;
		rc = fe_send(fe, FE_SET_PROTOCOL_FEATURES, 0, &wanted, 8, NULL, 0);
		if (rc)
			return rc;
		fe->protocol_features = wanted;
		if (wanted & FE_P_MQ) {
			rc = fe_get_u64(fe, FE_GET_QUEUE_NUM, &fe->queue_num);
			if (rc)
				return rc;
		}
		if (wanted & FE_P_CONFIGURE_MEM_SLOTS) {
			rc = fe_get_u64(fe, FE_GET_MAX_MEM_SLOTS, &fe->mem_slots);
			if (rc)
				return rc;
		}
		if (wanted & FE_P_BACKEND_REQ) {
			rc = open_backend_channel(fe);
			if (rc)
				return rc;
		}
	}
	if (fe->queue_num < fe->options.queues) {
		snprintf(fe->error, sizeof(fe->error), "the back end has %llu queues, not %u",
		         (unsigned long long)fe->queue_num, fe->options.queues);
		return -ENOSPC;
	}
	return fe_set_features(fe, fe->offered & fe->options.features);
}

int fe_set_vring_addr(struct fe *fe, unsigned index, bool log)
{
	struct fe_vq *vq = &fe->vq[index];
	struct {
		uint32_t index, flags;
		uint64_t desc, used, avail, log;
	} addr = {
	        .index = index,
	        .flags = log ? 1 : 0,
	        .desc = (uintptr_t)vq->desc,
	        .used = (uintptr_t)vq->used,
	        .avail = (uintptr_t)vq->avail,
	        /* What QEMU sends, and only for the used ring of a split queue. */
	        .log = vq->device_gpa,
	};

	return fe_send_ack(fe, FE_SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0);
}

static int send_state(struct fe *fe, uint32_t request, uint32_t index, uint32_t num)
{
	uint32_t state[2] = {index, num};

	return fe_send_ack(fe, request, state, sizeof(state), NULL, 0);
}

static int send_fd(struct fe *fe, uint32_t request, unsigned index, int fd)
{
	uint64_t value = index;

	return fe_send_ack(fe, request, &value, 8, &fd, 1);
}

int fe_queue_start(struct fe *fe, unsigned index, uint32_t base)
{
	struct fe_vq *vq = &fe->vq[index];
	int rc;

	vq->start_base = base;
	if ((rc = send_state(fe, FE_SET_VRING_NUM, index, vq->size)) ||
	    (rc = send_state(fe, FE_SET_VRING_BASE, index, base)) ||
	    (rc = fe_set_vring_addr(fe, index, fe->features & FE_F_LOG_ALL)) ||
	    (rc = send_fd(fe, FE_SET_VRING_ERR, index, vq->err_fd)) ||
	    (rc = send_fd(fe, FE_SET_VRING_CALL, index, vq->call_fd)) ||
	    (rc = send_fd(fe, FE_SET_VRING_KICK, index, vq->kick_fd)))
		return rc;
	vq->started = true;
	return 0;
}

int fe_queue_enable(struct fe *fe, unsigned index, bool on)
{
	return send_state(fe, FE_SET_VRING_ENABLE, index, on);
}

int fe_queue_stop(struct fe *fe, unsigned index, uint32_t *base)
{
	uint32_t state[2] = {index, 0};
	struct fe_msg reply;
	int rc = fe_call(fe, FE_GET_VRING_BASE, state, sizeof(state), NULL, 0, &reply, NULL);

	if (rc)
		return rc;
	if (reply.size != 8 || reply.u.state.index != index)
		return -EPROTO;
	fe->vq[index].started = false;
	if (base)
		*base = reply.u.state.num;
	return 0;
}

static int start(struct fe *fe, bool again)
{
	int rc = fe_connect(fe);

	if (rc || (rc = fe_negotiate(fe)))
		return rc;
	if (fe->protocol_features & FE_P_CONFIG) {
		struct virtio_blk_config config;

		/* Up to the topology, as QEMU without WCE: every back end has that much. */
		rc = fe_get_config(fe, 0, 32, &config);
		if (rc)
			return rc;
		fe->capacity = config.capacity * 512;
	}
	if (fe->protocol_features & FE_P_INFLIGHT_SHMFD) {
		if (fe->inflight_fd < 0) {
			rc = fe_get_inflight(fe, (uint16_t)fe->options.queues,
			                     fe->options.queue_size);
			if (rc)
				return rc;
		}
		rc = fe_set_inflight(fe);
		if (rc)
			return rc;
	}
	rc = fe_send_memory(fe);
	for (unsigned i = 0; rc == 0 && i < fe->options.queues; i++)
		rc = fe_queue_start(fe, i,
		                    again ? fe_vq_restart_base(&fe->vq[i]) : fe->vq[i].start_base);
	for (unsigned i = 0; rc == 0 && i < fe->options.queues; i++)
		rc = fe_queue_enable(fe, i, true);
	return rc;
}

int fe_start(struct fe *fe)
{
	return start(fe, false);
}

int fe_restart(struct fe *fe)
{
	fe_disconnect(fe);
	return start(fe, true);
}

int fe_stop(struct fe *fe)
{
	for (unsigned i = 0; i < fe->options.queues; i++) {
		int rc = fe_queue_stop(fe, i, &fe->vq[i].start_base);

		if (rc)
			return rc;
	}
	return 0;
}

int fe_get_config(struct fe *fe, uint32_t offset, uint32_t size, void *out)
{
	struct {
		uint32_t offset, size, flags;
		uint8_t bytes[1024];
	} payload = {.offset = offset, .size = size};
	struct fe_msg reply;
	int rc;

	if (size > sizeof(payload.bytes))
		return -EINVAL;
	rc = fe_call(fe, FE_GET_CONFIG, &payload, 12 + size, NULL, 0, &reply, NULL);
	if (rc)
		return rc;
	if (reply.size != 12 + size) {
		snprintf(fe->error, sizeof(fe->error),
		         "configuration of %u bytes at %u: %u bytes came", size, offset,
		         reply.size);
		return -EPROTO;
	}
	memcpy(out, reply.u.config.bytes, size);
	return 0;
}

int fe_set_config(struct fe *fe, uint32_t offset, uint32_t size, const void *bytes)
{
	struct {
		uint32_t offset, size, flags;
		uint8_t bytes[256];
	} payload = {.offset = offset, .size = size};

	if (size > sizeof(payload.bytes))
		return -EINVAL;
	memcpy(payload.bytes, bytes, size);
	return fe_send_ack(fe, FE_SET_CONFIG, &payload, 12 + size, NULL, 0);
}

struct fe_inflight {
	uint64_t mmap_size, mmap_offset;
	uint16_t queues, queue_size;
	uint32_t padding;
};
#define FE_INFLIGHT_BYTES 20u

int fe_get_inflight(struct fe *fe, uint16_t queues, uint16_t queue_size)
{
	struct fe_inflight payload = {.queues = queues, .queue_size = queue_size};
	struct fe_msg reply;
	int rc;

	close_fd(&fe->inflight_fd);
	rc = fe_call(fe, FE_GET_INFLIGHT_FD, &payload, FE_INFLIGHT_BYTES, NULL, 0, &reply,
	             &fe->inflight_fd);
	if (rc)
		return rc;
	fe->inflight_size = reply.u.inflight.mmap_size;
	fe->inflight_offset = reply.u.inflight.mmap_offset;
	if (fe->inflight_fd < 0 || fe->inflight_size == 0)
		return -EPROTO;
	return 0;
}

int fe_set_inflight(struct fe *fe)
{
	struct fe_inflight payload = {fe->inflight_size, fe->inflight_offset,
	                              (uint16_t)fe->options.queues, fe->options.queue_size, 0};

	return fe_send_ack(fe, FE_SET_INFLIGHT_FD, &payload, FE_INFLIGHT_BYTES, &fe->inflight_fd,
	                   1);
}

int fe_get_status(struct fe *fe, uint64_t *status)
{
	return fe_get_u64(fe, FE_GET_STATUS, status);
}

int fe_set_status(struct fe *fe, uint64_t status)
{
	return fe_send_ack(fe, FE_SET_STATUS, &status, 8, NULL, 0);
}
