/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The vhost-user protocol on the wire (QEMU docs/interop/vhost-user.rst): numbers, and a parser
 * that turns bytes into a message whose every member was checked for shape.
 *
 * The parser is a pure function: it looks at no state, so what depends on state (does that queue
 * exist, is it running) is checked by whoever handles the message.
 */
#ifndef OX_EXPORT_VHOST_USER_H
#define OX_EXPORT_VHOST_USER_H

#include "base/base.h"

enum ox_vu_request {
	OX_VU_GET_FEATURES = 1,
	OX_VU_SET_FEATURES = 2,
	OX_VU_SET_OWNER = 3,
	OX_VU_RESET_OWNER = 4,
	OX_VU_SET_MEM_TABLE = 5,
	OX_VU_SET_LOG_BASE = 6,
	OX_VU_SET_LOG_FD = 7,
	OX_VU_SET_VRING_NUM = 8,
	OX_VU_SET_VRING_ADDR = 9,
	OX_VU_SET_VRING_BASE = 10,
	OX_VU_GET_VRING_BASE = 11,
	OX_VU_SET_VRING_KICK = 12,
	OX_VU_SET_VRING_CALL = 13,
	OX_VU_SET_VRING_ERR = 14,
	OX_VU_GET_PROTOCOL_FEATURES = 15,
	OX_VU_SET_PROTOCOL_FEATURES = 16,
	OX_VU_GET_QUEUE_NUM = 17,
	OX_VU_SET_VRING_ENABLE = 18,
	OX_VU_SET_BACKEND_REQ_FD = 21,
	OX_VU_GET_CONFIG = 24,
	OX_VU_SET_CONFIG = 25,
	OX_VU_GET_INFLIGHT_FD = 31,
	OX_VU_SET_INFLIGHT_FD = 32,
	OX_VU_RESET_DEVICE = 34,
	OX_VU_GET_MAX_MEM_SLOTS = 36,
	OX_VU_ADD_MEM_REG = 37,
	OX_VU_REM_MEM_REG = 38,
	OX_VU_SET_STATUS = 39,
	OX_VU_GET_STATUS = 40,
};

/* On the backend channel. */
#define OX_VU_BACKEND_CONFIG_CHANGE_MSG 2u

/* Header flags. */
#define OX_VU_VERSION      1u
#define OX_VU_VERSION_MASK 3u
#define OX_VU_REPLY        (1u << 2)
#define OX_VU_NEED_REPLY   (1u << 3)

/* Protocol features (bit numbers). */
enum ox_vu_protocol_feature {
	OX_VU_P_MQ = 0,
	OX_VU_P_LOG_SHMFD = 1,
	OX_VU_P_REPLY_ACK = 3,
	OX_VU_P_BACKEND_REQ = 5,
	OX_VU_P_CONFIG = 9,
	OX_VU_P_INFLIGHT_SHMFD = 12,
	OX_VU_P_RESET_DEVICE = 13,
	OX_VU_P_CONFIGURE_MEM_SLOTS = 15,
	OX_VU_P_STATUS = 16,
};

/* Feature bits that vhost adds to virtio's. */
#define OX_VHOST_F_LOG_ALL                26
#define OX_VHOST_USER_F_PROTOCOL_FEATURES 30

/* SET_VRING_ADDR: the used ring's writes are logged. */
#define OX_VU_VRING_F_LOG 1u

/* SET_VRING_KICK, _CALL, _ERR: no descriptor comes along. */
#define OX_VU_VRING_NOFD (1u << 8)

#define OX_VU_HEADER_BYTES 12u
/* The largest payload that is read: a configuration access of 4096 bytes. */
#define OX_VU_PAYLOAD_MAX (4096u + 64u)
/* Most descriptors of one message: a memory table's.  The specification's own limit is 8. */
#define OX_VU_FDS_MAX 32u

struct ox_vu_region {
	uint64_t guest_addr, size, user_addr, mmap_offset;
};

/* A message that has the right shape.  Which member of the union holds is told by `request`. */
struct ox_vu_message {
	uint32_t request; /* enum ox_vu_request */
	bool need_reply;
	uint32_t payload_bytes;
	union {
		uint64_t u64; /* SET_FEATURES, SET_PROTOCOL_FEATURES, SET_STATUS */
		struct {
			uint32_t index, num;
		} state; /* SET_VRING_NUM, _BASE, _ENABLE, GET_VRING_BASE */
		struct {
			uint32_t index, flags;
			uint64_t desc, used, avail, log;
		} addr; /* SET_VRING_ADDR */
		struct {
			uint32_t index; /* 0 to 255 */
			bool has_fd;
		} vring_fd; /* SET_VRING_KICK, _CALL, _ERR */
		struct {
			unsigned count;
			struct ox_vu_region region[OX_VU_FDS_MAX];
		} memory;                   /* SET_MEM_TABLE */
		struct ox_vu_region region; /* ADD_MEM_REG, REM_MEM_REG */
		struct {
			bool has_fd;
			uint64_t size, offset;
		} log; /* SET_LOG_BASE */
		struct {
			uint32_t offset, size, flags;
			const uint8_t *bytes; /* SET: `size` bytes within the parsed ones */
		} config;                     /* GET_CONFIG, SET_CONFIG */
		struct {
			uint64_t mmap_size, mmap_offset;
			uint16_t queues, queue_size;
		} inflight; /* GET_INFLIGHT_FD, SET_INFLIGHT_FD */
	};
};

/* How long is the payload that follows these OX_VU_HEADER_BYTES?  -EPROTO: not a request of
 * this protocol, or longer than OX_VU_PAYLOAD_MAX: the stream cannot be followed any further. */
int ox_vhost_user_parse_header(const void *bytes, uint32_t *payload_bytes) OX_MUST_CHECK;

/* Header and payload, exactly; `nfds` descriptors came along.  0, or
 * -EPROTO   the framing is broken, the connection cannot go on;
 * -ENOTSUP  a request that Oxbow does not know (request, need_reply are set);
 * -EBADMSG  a known request of the wrong size, with the wrong number of descriptors or with
 *           members that no state could make right (request, need_reply are set). */
int ox_vhost_user_parse(const void *bytes, size_t n, unsigned nfds, struct ox_vu_message *out)
        OX_MUST_CHECK;

/* "SET_MEM_TABLE"; "request 77" has no name: NULL. */
const char *ox_vhost_user_request_name(uint32_t request);

#endif
