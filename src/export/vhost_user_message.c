/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Parsing vhost-user messages.
 *
 * Invariant: nothing is read beyond the n bytes given, and every count in *out is within the
 * array it counts.  Numbers are the machine's own byte order, as the protocol says.
 */
#include "export/vhost_user.h"

#include <errno.h>
#include <string.h>

#define REGION_BYTES 32u

static uint16_t get16(const uint8_t *p)
{
	uint16_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static uint32_t get32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static uint64_t get64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static const char *const request_names[] = {
        [OX_VU_GET_FEATURES] = "GET_FEATURES",
        [OX_VU_SET_FEATURES] = "SET_FEATURES",
        [OX_VU_SET_OWNER] = "SET_OWNER",
        [OX_VU_RESET_OWNER] = "RESET_OWNER",
        [OX_VU_SET_MEM_TABLE] = "SET_MEM_TABLE",
        [OX_VU_SET_LOG_BASE] = "SET_LOG_BASE",
        [OX_VU_SET_LOG_FD] = "SET_LOG_FD",
        [OX_VU_SET_VRING_NUM] = "SET_VRING_NUM",
        [OX_VU_SET_VRING_ADDR] = "SET_VRING_ADDR",
        [OX_VU_SET_VRING_BASE] = "SET_VRING_BASE",
        [OX_VU_GET_VRING_BASE] = "GET_VRING_BASE",
        [OX_VU_SET_VRING_KICK] = "SET_VRING_KICK",
        [OX_VU_SET_VRING_CALL] = "SET_VRING_CALL",
        [OX_VU_SET_VRING_ERR] = "SET_VRING_ERR",
        [OX_VU_GET_PROTOCOL_FEATURES] = "GET_PROTOCOL_FEATURES",
        [OX_VU_SET_PROTOCOL_FEATURES] = "SET_PROTOCOL_FEATURES",
        [OX_VU_GET_QUEUE_NUM] = "GET_QUEUE_NUM",
        [OX_VU_SET_VRING_ENABLE] = "SET_VRING_ENABLE",
        [OX_VU_SET_BACKEND_REQ_FD] = "SET_BACKEND_REQ_FD",
        [OX_VU_GET_CONFIG] = "GET_CONFIG",
        [OX_VU_SET_CONFIG] = "SET_CONFIG",
        [OX_VU_GET_INFLIGHT_FD] = "GET_INFLIGHT_FD",
        [OX_VU_SET_INFLIGHT_FD] = "SET_INFLIGHT_FD",
        [OX_VU_RESET_DEVICE] = "RESET_DEVICE",
        [OX_VU_GET_MAX_MEM_SLOTS] = "GET_MAX_MEM_SLOTS",
        [OX_VU_ADD_MEM_REG] = "ADD_MEM_REG",
        [OX_VU_REM_MEM_REG] = "REM_MEM_REG",
        [OX_VU_SET_STATUS] = "SET_STATUS",
        [OX_VU_GET_STATUS] = "GET_STATUS",
};

const char *ox_vhost_user_request_name(uint32_t request)
{
	return request < OX_ARRAY_SIZE(request_names) ? request_names[request] : NULL;
}

int ox_vhost_user_parse_header(const void *bytes, uint32_t *payload_bytes)
{
	const uint8_t *p = bytes;
	uint32_t flags = get32(p + 4);
	uint32_t size = get32(p + 8);

	if ((flags & OX_VU_VERSION_MASK) != OX_VU_VERSION || flags & OX_VU_REPLY)
		return -EPROTO;
	if (size > OX_VU_PAYLOAD_MAX)
		return -EPROTO;
	*payload_bytes = size;
	return 0;
}

static void parse_region(const uint8_t *p, struct ox_vu_region *region)
{
	region->guest_addr = get64(p);
	region->size = get64(p + 8);
	region->user_addr = get64(p + 16);
	region->mmap_offset = get64(p + 24);
}

static int parse_memory(const uint8_t *p, uint32_t size, unsigned nfds, struct ox_vu_message *out)
{
	uint32_t count;

	if (size < 8)
		return -EBADMSG;
	count = get32(p);
	/* QEMU sends the regions that there are; others the whole array of eight. */
	if (count > OX_VU_FDS_MAX || size - 8 < count * REGION_BYTES || nfds != count)
		return -EBADMSG;
	out->memory.count = count;
	for (unsigned i = 0; i < count; i++)
		parse_region(p + 8 + i * REGION_BYTES, &out->memory.region[i]);
	return 0;
}

static int parse_one_region(const uint8_t *p, uint32_t size, unsigned nfds,
                            struct ox_vu_message *out)
{
	if (size != 8 + REGION_BYTES)
		return -EBADMSG;
	/* REM_MEM_REG: "the back-end MAY accept messages with one file descriptor". */
	if (out->request == OX_VU_ADD_MEM_REG ? nfds != 1 : nfds > 1)
		return -EBADMSG;
	parse_region(p + 8, &out->region);
	return 0;
}

static int parse_log_base(const uint8_t *p, uint32_t size, unsigned nfds, struct ox_vu_message *out)
{
	if (size == 8 && nfds == 0) {
		/* Without LOG_SHMFD: an address of the front end's, of no use to us. */
		out->log.has_fd = false;
		return 0;
	}
	if (size != 16 || nfds != 1)
		return -EBADMSG;
	out->log.has_fd = true;
	out->log.size = get64(p);
	out->log.offset = get64(p + 8);
	return 0;
}

static int parse_vring_fd(const uint8_t *p, uint32_t size, unsigned nfds, struct ox_vu_message *out)
{
	uint64_t value;

	if (size != 8)
		return -EBADMSG;
	value = get64(p);
	out->vring_fd.index = value & 0xff;
	out->vring_fd.has_fd = !(value & OX_VU_VRING_NOFD);
	return nfds == (out->vring_fd.has_fd ? 1 : 0) ? 0 : -EBADMSG;
}

static int parse_config(const uint8_t *p, uint32_t size, unsigned nfds, struct ox_vu_message *out)
{
	if (size < 12 || nfds)
		return -EBADMSG;
	out->config.offset = get32(p);
	out->config.size = get32(p + 4);
	out->config.flags = get32(p + 8);
	out->config.bytes = p + 12;
	if (out->config.size > OX_VU_PAYLOAD_MAX - 12)
		return -EBADMSG;
	/* A reader may leave its (empty) buffer out. */
	if (size - 12 < out->config.size && out->request == OX_VU_SET_CONFIG)
		return -EBADMSG;
	return 0;
}

static int parse_inflight(const uint8_t *p, uint32_t size, unsigned nfds, struct ox_vu_message *out)
{
	/* 20 bytes, or 24 where the C structure was sent with its padding (QEMU). */
	if ((size != 20 && size != 24) || nfds != (out->request == OX_VU_SET_INFLIGHT_FD ? 1 : 0))
		return -EBADMSG;
	out->inflight.mmap_size = get64(p);
	out->inflight.mmap_offset = get64(p + 8);
	out->inflight.queues = get16(p + 16);
	out->inflight.queue_size = get16(p + 18);
	if (!out->inflight.queues || !out->inflight.queue_size)
		return -EBADMSG;
	return 0;
}

int ox_vhost_user_parse(const void *bytes, size_t n, unsigned nfds, struct ox_vu_message *out)
{
	const uint8_t *p = bytes;
	uint32_t size;

	memset(out, 0, offsetof(struct ox_vu_message, u64));
	if (n < OX_VU_HEADER_BYTES || nfds > OX_VU_FDS_MAX ||
	    ox_vhost_user_parse_header(bytes, &size) < 0 || n != OX_VU_HEADER_BYTES + size)
		return -EPROTO;
	out->request = get32(p);
	out->need_reply = get32(p + 4) & OX_VU_NEED_REPLY;
	out->payload_bytes = size;
	p += OX_VU_HEADER_BYTES;

	switch (out->request) {
	case OX_VU_GET_FEATURES:
	case OX_VU_SET_OWNER:
	case OX_VU_RESET_OWNER:
	case OX_VU_GET_PROTOCOL_FEATURES:
	case OX_VU_GET_QUEUE_NUM:
	case OX_VU_RESET_DEVICE:
	case OX_VU_GET_MAX_MEM_SLOTS:
	case OX_VU_GET_STATUS:
		/* Some front ends send an unused number along. */
		return size <= 8 && !nfds ? 0 : -EBADMSG;
	case OX_VU_SET_LOG_FD:
	case OX_VU_SET_BACKEND_REQ_FD:
		return size <= 8 && nfds == 1 ? 0 : -EBADMSG;
	case OX_VU_SET_FEATURES:
	case OX_VU_SET_PROTOCOL_FEATURES:
	case OX_VU_SET_STATUS:
		if (size != 8 || nfds)
			return -EBADMSG;
		out->u64 = get64(p);
		return 0;
	case OX_VU_SET_VRING_NUM:
	case OX_VU_SET_VRING_BASE:
	case OX_VU_GET_VRING_BASE:
	case OX_VU_SET_VRING_ENABLE:
		if (size != 8 || nfds)
			return -EBADMSG;
		out->state.index = get32(p);
		out->state.num = get32(p + 4);
		return 0;
	case OX_VU_SET_VRING_ADDR:
		if (size != 40 || nfds)
			return -EBADMSG;
		out->addr.index = get32(p);
		out->addr.flags = get32(p + 4);
		out->addr.desc = get64(p + 8);
		out->addr.used = get64(p + 16);
		out->addr.avail = get64(p + 24);
		out->addr.log = get64(p + 32);
		return 0;
	case OX_VU_SET_VRING_KICK:
	case OX_VU_SET_VRING_CALL:
	case OX_VU_SET_VRING_ERR:
		return parse_vring_fd(p, size, nfds, out);
	case OX_VU_SET_MEM_TABLE:
		return parse_memory(p, size, nfds, out);
	case OX_VU_ADD_MEM_REG:
	case OX_VU_REM_MEM_REG:
		return parse_one_region(p, size, nfds, out);
	case OX_VU_SET_LOG_BASE:
		return parse_log_base(p, size, nfds, out);
	case OX_VU_GET_CONFIG:
	case OX_VU_SET_CONFIG:
		return parse_config(p, size, nfds, out);
	case OX_VU_GET_INFLIGHT_FD:
	case OX_VU_SET_INFLIGHT_FD:
		return parse_inflight(p, size, nfds, out);
	default:
		return -ENOTSUP;
	}
}
