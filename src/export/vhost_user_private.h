/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A session from the inside: what its connection (vhost_user_session.c), its messages
 * (vhost_user_handlers.c) and its queues (vhost_user_queues.c) share.
 *
 * Everything here is the main loop's, and changed by the session's one fiber only; so between two
 * suspensions nothing needs a lock, and across one only the rings' own threads go on.
 */
#ifndef OX_EXPORT_VHOST_USER_PRIVATE_H
#define OX_EXPORT_VHOST_USER_PRIVATE_H

#include "export/vhost_user.h"
#include "export/vhost_user_ring.h"
#include "export/vhost_user_session.h"

/* A queue as the front end described it, and the ring that runs by that description.
 *
 *            all set, enabled                 memory or log changes
 *   stopped ─────────────────> running (ring) ─────────────────────> paused
 *      ^                          │   ^                                │ │
 *      │ GET_VRING_BASE, disabled │   └────────── afterwards ──────────┘ │
 *      └──────────────────────────┴──────────────────────────────────────┘
 *
 * The disk is active while any queue is running or paused. */
struct ox_vu_queue {
	uint16_t num; /* entries; 0: not told */
	bool addr_set, base_set, kick_set, enabled;
	bool paused;
	bool failed; /* it could not be started: not tried again before something changes */
	uint32_t addr_flags;
	uint64_t desc, used, avail, log_addr;
	uint32_t base; /* as the protocol packs it */
	int kick_fd, call_fd, err_fd;
	struct ox_vu_ring *ring;
};

struct ox_vu_session {
	struct ox_vu_device *device;
	int fd;
	void (*ended)(void *arg);
	void *arg;
	bool ending;

	uint64_t features, protocol_features;
	bool features_set;
	uint8_t status; /* the virtio device status */
	/* Nothing of this client's guest has seen the write-cache byte since the device was reset:
	 * the next look at it may put it back to its default. */
	bool cache_unseen;

	struct ox_memory *memory; /* never NULL */
	struct ox_dirty_log *log;
	int backend_fd;
	struct ox_mapping inflight; /* host NULL: none */
	uint16_t inflight_queues, inflight_queue_size;

	bool active; /* the disk is, for us */
	unsigned errors;
	struct ox_vu_queue *queue; /* device->queues of them */

	/* The message being handled. */
	int fds[OX_VU_FDS_MAX];
	unsigned nfds;
	bool fds_lost;
	uint8_t bytes[OX_VU_HEADER_BYTES + OX_VU_PAYLOAD_MAX];
	struct ox_vu_message message;
	/* The answer: its payload, and a descriptor (-1: none).  `has_reply`: the message has an
	 * answer of its own, not just an acknowledgement. */
	bool has_reply;
	uint32_t reply_bytes;
	int reply_fd;
	uint8_t reply[OX_VU_PAYLOAD_MAX];
};

static inline bool ox_vu_has(const struct ox_vu_session *s, unsigned feature)
{
	return s->features >> feature & 1;
}
static inline bool ox_vu_has_protocol(const struct ox_vu_session *s, unsigned feature)
{
	return s->protocol_features >> feature & 1;
}

/* --- vhost_user_handlers.c --- */

/* Handles s->message and fills the answer in.  0; -ECONNABORTED: the connection must end;
 * another error: the message was refused, and *err says why. */
int ox_vu_handle_co(struct ox_vu_session *s, struct ox_error *err) OX_MUST_CHECK;

/* --- vhost_user_queues.c --- */

void ox_vu_queues_init(struct ox_vu_session *s);
/* Starts what can run now, stops what may not, and activates or deactivates the disk.
 * -ECONNABORTED: the disk cannot be used. */
int ox_vu_queues_update_co(struct ox_vu_session *s, struct ox_error *err) OX_MUST_CHECK;
/* Stops the running queues, to go on with other memory, log or addresses at the next update. */
void ox_vu_queues_pause_co(struct ox_vu_session *s);
void ox_vu_queue_pause_co(struct ox_vu_session *s, struct ox_vu_queue *queue);
/* Stops a queue for good; its base is then in queue->base. */
void ox_vu_queue_stop_co(struct ox_vu_session *s, struct ox_vu_queue *queue);
/* All queues, at the end of the session: the disk is inactive afterwards. */
void ox_vu_queues_close_co(struct ox_vu_session *s);
/* A device reset: no queue runs, and what the front end told is forgotten but for the memory
 * and the call descriptors. */
void ox_vu_queues_reset_co(struct ox_vu_session *s);
/* Running queues take up a larger memory table. */
void ox_vu_queues_set_memory_co(struct ox_vu_session *s);
/* Does any queue run, or wait to go on? */
bool ox_vu_queues_busy(const struct ox_vu_session *s);

/* The write-cache byte as the guest shall see it, and the guest's write to it. */
bool ox_vu_cache_shown(const struct ox_vu_session *s);
void ox_vu_cache_choose(struct ox_vu_session *s, bool on);
/* A front end reads the byte. */
void ox_vu_cache_seen(struct ox_vu_session *s);

#endif
