/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A vhost-user connection: one fiber that reads a message, has it handled, and answers.
 *
 * The socket is a stream, so a message may come in pieces; the fiber waits for the rest.  What a
 * client sends can at worst cost it its own connection:
 *   - a stream that cannot be followed (wrong version, oversize, truncated descriptors) ends it;
 *   - a message that is refused is answered if an answer is due (REPLY_ACK), else logged;
 *     a client that goes on like that, or asks a question that cannot be answered, loses it;
 *   - every descriptor that came along is closed here unless a handler kept it.
 *
 * The session ends in one place, end_co(): the rings stop, what is in flight comes back, the
 * disk is deactivated, and only then memory, log and inflight region are unmapped.  To end it from
 * outside, the socket is shut down, which the fiber sees as the client's hanging up.
 */
#include "export/vhost_user_private.h"

#include "base/fiber.h"

#include <oxbow/log.h>

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

/* Refused messages that a connection may have before one without an acknowledgement ends it, and
 * that are logged. */
#define ERRORS_MAX 16u

/* --- reading ----------------------------------------------------------------------------- */

static void close_fds(struct ox_vu_session *s)
{
	for (unsigned i = 0; i < s->nfds; i++)
		if (s->fds[i] >= 0)
			close(s->fds[i]);
	s->nfds = 0;
	s->fds_lost = false;
}

static void take_fds(struct ox_vu_session *s, struct msghdr *msg)
{
	if (msg->msg_flags & MSG_CTRUNC)
		s->fds_lost = true;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		size_t count;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
			if (s->nfds < OX_VU_FDS_MAX) {
				s->fds[s->nfds++] = fd;
			} else {
				close(fd);
				s->fds_lost = true;
			}
		}
	}
}

/* 0, -ENODATA: the client hung up before the first byte, -ECONNRESET: later, or -errno. */
static int read_exactly_co(struct ox_vu_session *s, uint8_t *buf, size_t bytes)
{
	size_t done = 0;

	while (done < bytes) {
		union {
			char space[CMSG_SPACE(OX_VU_FDS_MAX * sizeof(int))];
			struct cmsghdr align;
		} control;
		struct iovec iov = {buf + done, bytes - done};
		struct msghdr msg = {.msg_iov = &iov,
		                     .msg_iovlen = 1,
		                     .msg_control = control.space,
		                     .msg_controllen = sizeof(control.space)};
		ssize_t n = recvmsg(s->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

		if (n > 0) {
			take_fds(s, &msg);
			done += (size_t)n;
			continue;
		}
		if (n == 0)
			return done ? -ECONNRESET : -ENODATA;
		if (errno == EAGAIN)
			ox_wait_fd_co(s->fd, EPOLLIN, -1);
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

/* The message's whole length, or < 0. */
static int read_message_co(struct ox_vu_session *s, struct ox_error *err)
{
	uint32_t payload;
	int rc = read_exactly_co(s, s->bytes, OX_VU_HEADER_BYTES);

	if (rc < 0)
		return rc;
	rc = ox_vhost_user_parse_header(s->bytes, &payload);
	if (rc < 0)
		return ox_error_set(err, EPROTO, "it does not speak vhost-user");
	rc = read_exactly_co(s, s->bytes + OX_VU_HEADER_BYTES, payload);
	if (rc < 0)
		return rc == -ENODATA ? -ECONNRESET : rc;
	if (s->fds_lost)
		return ox_error_set(err, EPROTO,
		                    "more than %u descriptors came with a message, or this process "
		                    "may not open so many files",
		                    OX_VU_FDS_MAX);
	return (int)(OX_VU_HEADER_BYTES + payload);
}

/* --- answering --------------------------------------------------------------------------- */

static int send_reply_co(struct ox_vu_session *s)
{
	uint32_t header[3] = {s->message.request, OX_VU_VERSION | OX_VU_REPLY, s->reply_bytes};
	struct iovec iov[2] = {{header, sizeof(header)}, {s->reply, s->reply_bytes}};
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	size_t left = sizeof(header) + s->reply_bytes;
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};

	if (s->reply_fd >= 0) {
		memset(&control, 0, sizeof(control));
		msg.msg_control = control.space;
		msg.msg_controllen = sizeof(control.space);
		CMSG_FIRSTHDR(&msg)->cmsg_level = SOL_SOCKET;
		CMSG_FIRSTHDR(&msg)->cmsg_type = SCM_RIGHTS;
		CMSG_FIRSTHDR(&msg)->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&msg)), &s->reply_fd, sizeof(int));
	}
	while (left) {
		ssize_t n = sendmsg(s->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN) {
			ox_wait_fd_co(s->fd, EPOLLOUT, -1);
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		left -= (size_t)n;
		msg.msg_control = NULL; /* the descriptor went with the first byte */
		msg.msg_controllen = 0;
		for (unsigned i = 0; i < 2; i++) {
			size_t part = ox_min((size_t)n, iov[i].iov_len);

			iov[i].iov_base = (char *)iov[i].iov_base + part;
			iov[i].iov_len -= part;
			n -= (ssize_t)part;
		}
	}
	return 0;
}

void ox_vu_session_config_changed(struct ox_vu_session *s)
{
	uint32_t header[3] = {OX_VU_BACKEND_CONFIG_CHANGE_MSG, OX_VU_VERSION, 0};

	/* Its next look at the space is for the size, not for a guest that starts anew. */
	s->cache_unseen = false;
	if (s->ending || s->backend_fd < 0 || !ox_vu_has_protocol(s, OX_VU_P_CONFIG))
		return;
	/* A full channel is full of these messages: the client will look after this change too. */
	if (send(s->backend_fd, header, sizeof(header), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 &&
	    errno != EAGAIN)
		ox_log(OX_LOG_WARNING, "%s: cannot tell the client about the new size: %s",
		       s->device->name, strerror(errno));
}

/* --- the session ------------------------------------------------------------------------- */

static const char *request_name(uint32_t request, char buf[32])
{
	const char *name = ox_vhost_user_request_name(request);

	if (name)
		return name;
	snprintf(buf, 32, "request %u", request);
	return buf;
}

/* Does the client wait for an answer that is not an acknowledgement? */
static bool is_question(const struct ox_vu_session *s)
{
	switch (s->message.request) {
	case OX_VU_GET_FEATURES:
	case OX_VU_GET_PROTOCOL_FEATURES:
	case OX_VU_GET_QUEUE_NUM:
	case OX_VU_GET_VRING_BASE:
	case OX_VU_GET_CONFIG:
	case OX_VU_GET_INFLIGHT_FD:
	case OX_VU_GET_MAX_MEM_SLOTS:
	case OX_VU_GET_STATUS:
		return true;
	case OX_VU_SET_LOG_BASE:
		return ox_vu_has_protocol(s, OX_VU_P_LOG_SHMFD);
	default:
		return false;
	}
}

/* Handles the message of n bytes that was read; false: the connection must end. */
static bool serve_message_co(struct ox_vu_session *s, size_t n)
{
	struct ox_error err = {0};
	char buf[32];
	bool wants_ack;
	int rc;

	s->has_reply = false;
	s->reply_bytes = 0;
	s->reply_fd = -1;
	rc = ox_vhost_user_parse(s->bytes, n, s->nfds, &s->message);
	wants_ack = s->message.need_reply && ox_vu_has_protocol(s, OX_VU_P_REPLY_ACK);
	if (rc == -ENOTSUP) {
		ox_log(OX_LOG_DEBUG, "%s: %s is unknown", s->device->name,
		       request_name(s->message.request, buf));
	} else if (rc < 0) {
		ox_error_set(&err, -rc, "it is malformed: %u bytes, %u descriptors",
		             s->message.payload_bytes, s->nfds);
	} else {
		ox_log(OX_LOG_DEBUG, "%s: %s", s->device->name,
		       request_name(s->message.request, buf));
		rc = ox_vu_handle_co(s, &err);
	}
	/* SET_PROTOCOL_FEATURES itself may have negotiated it. */
	wants_ack |= s->message.need_reply && ox_vu_has_protocol(s, OX_VU_P_REPLY_ACK);

	if (err.code) {
		bool told = wants_ack || s->has_reply;
		bool fatal = rc == -ECONNABORTED || (is_question(s) && !s->has_reply) ||
		             (!told && (rc == -EBADMSG || s->errors >= ERRORS_MAX));

		/* A client must not be able to fill the log. */
		ox_log(fatal || s->errors < ERRORS_MAX ? OX_LOG_WARNING : OX_LOG_DEBUG,
		       "%s: the client's %s failed: %s%s", s->device->name,
		       request_name(s->message.request, buf), err.text,
		       fatal ? "; disconnecting it" : "");
		s->errors++;
		if (fatal)
			return false;
	}
	if (!s->has_reply && wants_ack) {
		uint64_t failed = rc < 0;

		memcpy(s->reply, &failed, sizeof(failed));
		s->reply_bytes = sizeof(failed);
		s->has_reply = true;
	}
	if (s->has_reply) {
		rc = send_reply_co(s);
		if (s->reply_fd >= 0)
			close(s->reply_fd);
		return rc == 0;
	}
	return true;
}

static void end_co(struct ox_vu_session *s)
{
	s->ending = true;
	ox_vu_queues_close_co(s);
	ox_memory_put(s->memory);
	ox_dirty_log_put(s->log);
	ox_mapping_unmap(&s->inflight);
	if (s->backend_fd >= 0)
		close(s->backend_fd);
	close(s->fd);
	ox_log(OX_LOG_DEBUG, "%s: the client has gone", s->device->name);
}

static void session_co(void *arg)
{
	struct ox_vu_session *s = arg;
	void (*ended)(void *arg) = s->ended;
	void *ended_arg = s->arg;

	for (;;) {
		struct ox_error err = {0};
		int n = read_message_co(s, &err);
		bool go_on;

		if (n < 0) {
			if (err.code)
				ox_log(OX_LOG_WARNING, "%s: disconnecting the client: %s",
				       s->device->name, err.text);
			else if (n != -ENODATA && n != -ECONNRESET)
				ox_log(OX_LOG_WARNING, "%s: the client's socket failed: %s",
				       s->device->name, strerror(-n));
			break;
		}
		go_on = serve_message_co(s, (size_t)n);
		close_fds(s);
		if (!go_on)
			break;
	}
	close_fds(s);
	end_co(s);
	free(s);
	ended(ended_arg);
}

int ox_vu_session_start(struct ox_vu_device *device, int fd, void (*ended)(void *arg), void *arg,
                        struct ox_vu_session **session)
{
	struct ox_vu_session *s = ox_xcalloc(1, sizeof(*s));
	int rc;

	s->device = device;
	s->fd = fd;
	s->ended = ended;
	s->arg = arg;
	s->memory = ox_memory_new();
	s->backend_fd = -1;
	s->reply_fd = -1;
	s->cache_unseen = true;
	ox_vu_queues_init(s);
	*session = s;
	rc = ox_fiber_start(session_co, s);
	if (rc < 0) {
		*session = NULL;
		ox_memory_put(s->memory);
		free(s->queue);
		free(s);
		close(fd);
	}
	return rc;
}

void ox_vu_session_hang_up(struct ox_vu_session *s)
{
	if (!s->ending)
		shutdown(s->fd, SHUT_RDWR);
}

bool ox_vu_session_is_ending(const struct ox_vu_session *s)
{
	struct pollfd fd = {.fd = s->fd, .events = POLLRDHUP};

	return s->ending || (poll(&fd, 1, 0) == 1 && fd.revents & (POLLRDHUP | POLLHUP | POLLERR));
}
