/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The front end's connection: sending and receiving messages.
 *
 * Every receive has a time limit, so that a back end that forgets a reply fails a test instead of
 * hanging it.  Descriptors that arrive and were not asked for are closed.
 */
#include "frontend.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define FE_MAX_FDS 16

static int fail(struct fe *fe, int code, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));
static int fail(struct fe *fe, int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(fe->error, sizeof(fe->error), fmt, ap);
	va_end(ap);
	return -code;
}

int fe_send_raw(struct fe *fe, const void *bytes, size_t count, const int *fds, unsigned nfds)
{
	char control[CMSG_SPACE(sizeof(int) * FE_MAX_FDS)] __attribute__((aligned(8)));
	struct iovec iov = {(void *)(uintptr_t)bytes, count};
	struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1};

	if (nfds > FE_MAX_FDS)
		return -EINVAL;
	if (fe->fuse == 0) {
		if (fe->fuse_bytes == 0 || fe->fuse_bytes >= count) {
			fe_disconnect(fe);
			return -ECANCELED;
		}
		iov.iov_len = fe->fuse_bytes;
	}
	if (nfds) {
		struct cmsghdr *c;

		memset(control, 0, sizeof(control));
		hdr.msg_control = control;
		hdr.msg_controllen = CMSG_SPACE(sizeof(int) * nfds);
		c = CMSG_FIRSTHDR(&hdr);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * nfds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * nfds);
	}
	while (iov.iov_len) {
		ssize_t n = sendmsg(fe->sock, &hdr, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return fail(fe, errno, "sending: %s", strerror(errno));
		iov.iov_base = (char *)iov.iov_base + n;
		iov.iov_len -= (size_t)n;
		hdr.msg_control = NULL;
		hdr.msg_controllen = 0;
	}
	if (fe->fuse == 0) {
		fe_disconnect(fe);
		return -ECANCELED;
	}
	if (fe->fuse > 0)
		fe->fuse--;
	return 0;
}

int fe_send(struct fe *fe, uint32_t request, uint32_t flags, const void *payload, uint32_t size,
            const int *fds, unsigned nfds)
{
	struct fe_msg msg;

	if (size > sizeof(msg.u))
		return -EINVAL;
	msg.request = request;
	msg.flags = FE_VERSION | flags;
	msg.size = size;
	if (size)
		memcpy(msg.u.raw, payload, size);
	return fe_send_raw(fe, &msg, FE_HEADER + size, fds, nfds);
}

/* All `count` bytes from a socket within the limit; the first descriptor goes to *fd. */
static int receive(struct fe *fe, int sock, int timeout_ms, void *bytes, size_t count, int *fd)
{
	size_t have = 0;

	while (have < count) {
		char control[CMSG_SPACE(sizeof(int) * FE_MAX_FDS)] __attribute__((aligned(8)));
		struct iovec iov = {(char *)bytes + have, count - have};
		struct msghdr hdr = {.msg_iov = &iov,
		                     .msg_iovlen = 1,
		                     .msg_control = control,
		                     .msg_controllen = sizeof(control)};
		struct pollfd pfd = {.fd = sock, .events = POLLIN};
		int ready = poll(&pfd, 1, timeout_ms);
		ssize_t n;

		if (ready < 0 && errno == EINTR)
			continue;
		if (ready == 0)
			return fail(fe, ETIMEDOUT, "no message within %d ms", timeout_ms);
		n = recvmsg(sock, &hdr, MSG_CMSG_CLOEXEC);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return fail(fe, errno, "receiving: %s", strerror(errno));
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&hdr); c; c = CMSG_NXTHDR(&hdr, c)) {
			size_t fds;

			if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
				continue;
			fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			for (size_t i = 0; i < fds; i++) {
				int got;

				memcpy(&got, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
				if (fd && *fd < 0)
					*fd = got;
				else
					close(got);
			}
		}
		if (n == 0)
			return fail(fe, ECONNRESET, "the back end closed the connection");
		have += (size_t)n;
	}
	return 0;
}

static int receive_message(struct fe *fe, int sock, int timeout_ms, struct fe_msg *msg, int *fd)
{
	int rc;

	if (fd)
		*fd = -1;
	rc = receive(fe, sock, timeout_ms, msg, FE_HEADER, fd);
	if (rc)
		return rc;
	if (msg->size > sizeof(msg->u))
		return fail(fe, EPROTO, "message %u of %u bytes", msg->request, msg->size);
	memset(&msg->u, 0, sizeof(msg->u));
	return receive(fe, sock, timeout_ms, msg->u.raw, msg->size, fd);
}

int fe_recv(struct fe *fe, struct fe_msg *msg, int *fd)
{
	return receive_message(fe, fe->sock, fe->options.timeout_ms, msg, fd);
}

int fe_call(struct fe *fe, uint32_t request, const void *payload, uint32_t size, const int *fds,
            unsigned nfds, struct fe_msg *reply, int *reply_fd)
{
	int rc = fe_send(fe, request, 0, payload, size, fds, nfds);

	if (rc)
		return rc;
	rc = fe_recv(fe, reply, reply_fd);
	if (rc)
		return rc;
	if (reply->request != request || reply->flags != (FE_VERSION | FE_REPLY))
		return fail(fe, EPROTO, "to message %u came message %u with flags %#x", request,
		            reply->request, reply->flags);
	return 0;
}

int fe_get_u64(struct fe *fe, uint32_t request, uint64_t *value)
{
	struct fe_msg reply;
	int rc = fe_call(fe, request, NULL, 0, NULL, 0, &reply, NULL);

	if (rc)
		return rc;
	if (reply.size != 8)
		return fail(fe, EPROTO, "reply %u has %u bytes, not 8", request, reply.size);
	*value = reply.u.u64;
	return 0;
}

int fe_send_ack(struct fe *fe, uint32_t request, const void *payload, uint32_t size, const int *fds,
                unsigned nfds)
{
	bool ack = (fe->protocol_features & FE_P_REPLY_ACK) && !fe->options.no_reply_ack;
	struct fe_msg reply;
	int rc = fe_send(fe, request, ack ? FE_NEED_REPLY : 0, payload, size, fds, nfds);

	if (rc || !ack)
		return rc;
	rc = fe_recv(fe, &reply, NULL);
	if (rc)
		return rc;
	if (reply.request != request || reply.size != 8)
		return fail(fe, EPROTO, "acknowledgement of message %u: message %u, %u bytes",
		            request, reply.request, reply.size);
	if (reply.u.u64)
		return fail(fe, EIO, "message %u was refused (%llu)", request,
		            (unsigned long long)reply.u.u64);
	return 0;
}

bool fe_hung_up(struct fe *fe, int timeout_ms)
{
	char byte;

	for (;;) {
		struct pollfd pfd = {.fd = fe->sock, .events = POLLIN};
		int ready = poll(&pfd, 1, timeout_ms);
		ssize_t n;

		if (ready < 0 && errno == EINTR)
			continue;
		if (ready <= 0)
			return false;
		n = recv(fe->sock, &byte, 1, MSG_DONTWAIT);
		if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
			return true;
	}
}

int fe_backend_message(struct fe *fe, int timeout_ms, uint32_t *request)
{
	struct fe_msg msg;
	uint64_t zero = 0;
	int rc;

	if (fe->backend_fd < 0)
		return -ENOTCONN;
	rc = receive_message(fe, fe->backend_fd, timeout_ms, &msg, NULL);
	if (rc)
		return rc;
	*request = msg.request;
	if (msg.flags & FE_NEED_REPLY) {
		struct fe_msg ack = {msg.request, FE_VERSION | FE_REPLY, 8, {.u64 = zero}};

		if (send(fe->backend_fd, &ack, FE_HEADER + 8, MSG_NOSIGNAL) != FE_HEADER + 8)
			return -EPIPE;
	}
	return 0;
}
