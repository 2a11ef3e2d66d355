/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Unix sockets of servers and their clients.
 */
#ifndef OX_BASE_UNIX_SOCKET_H
#define OX_BASE_UNIX_SOCKET_H

#include "base/base.h"
#include <oxbow/error.h>
#include <sys/types.h>

struct ox_unix_listener {
	int fd;
	char *path; /* NULL: the descriptor was given */
	dev_t dev;  /* of the socket file that we made */
	ino_t ino;
};

/* Binds and listens, non-blocking.  A socket file that nobody listens on is replaced; a live one,
 * or a file of another kind, is an error.  The file's mode is `mode`, less the umask. */
int ox_unix_listen(const char *path, mode_t mode, struct ox_unix_listener *listener,
                   struct ox_error *err) OX_MUST_CHECK;
/* A blocking connection; *fd stays as it is on error. */
int ox_unix_connect(const char *path, int *fd, struct ox_error *err) OX_MUST_CHECK;
/* Takes a listening socket over. */
int ox_unix_listen_fd(int fd, struct ox_unix_listener *listener, struct ox_error *err)
        OX_MUST_CHECK;
/* Closes, and removes the socket file if it is still ours. */
void ox_unix_listener_close(struct ox_unix_listener *listener);

/* 1: the descriptor is a listening Unix stream socket, 0: a connected one; else an error. */
int ox_unix_socket_is_listening(int fd, struct ox_error *err);

#endif
