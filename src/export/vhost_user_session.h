/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * One client's connection to a vhost-user block device.
 */
#ifndef OX_EXPORT_VHOST_USER_SESSION_H
#define OX_EXPORT_VHOST_USER_SESSION_H

#include "disk/disk.h"

/* The device that an export offers, one client after the other. */
struct ox_vu_device {
	struct ox_disk *disk;
	const char *name; /* the disk's, for messages */
	unsigned queues;  /* offered; at most 256, the protocol's index is a byte */
	uint16_t queue_size_max;
	struct ox_loop *main;
	struct ox_loop **loops;
	unsigned loop_count;
	/* The guest switched the write cache off.  Outlives a connection: vhost_user_queues.c. */
	bool cache_off;
};

struct ox_vu_session;

/* Starts serving a connected socket (taken over).  ended(arg) is called on the main loop when
 * the client has gone and nothing of the session is left; it may start another one.  -ENOMEM
 * (the socket is closed). */
int ox_vu_session_start(struct ox_vu_device *device, int fd, void (*ended)(void *arg), void *arg,
                        struct ox_vu_session **session) OX_MUST_CHECK;
/* Hangs up; the session ends as if the client had. */
void ox_vu_session_hang_up(struct ox_vu_session *session);
/* Has the client hung up, although its requests may not have ended yet? */
bool ox_vu_session_is_ending(const struct ox_vu_session *session);
unsigned ox_vu_session_queues_running(const struct ox_vu_session *session);
/* The configuration space changed: tells the client, if it wants to know.  Never blocks. */
void ox_vu_session_config_changed(struct ox_vu_session *session);

#endif
