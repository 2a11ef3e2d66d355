/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Listening Unix sockets: whose socket file is it?
 *
 * A process that was killed leaves its socket file behind, and bind() refuses the name then.
 * connect() tells the two cases apart: it is refused if nobody listens.  Two programs that start
 * at the same moment could both find it so, and the one that binds second would remove the
 * other's file: the directory is locked (flock) from the first bind() on.  At the end the file is
 * removed only if it is the very inode that our bind() made: another process may have replaced it
 * meanwhile.
 */
#include "base/unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define BACKLOG 64

static int make_address(const char *path, struct sockaddr_un *address, struct ox_error *err)
{
	size_t length = strlen(path);

	memset(address, 0, sizeof(*address));
	address->sun_family = AF_UNIX;
	if (!length || length >= sizeof(address->sun_path))
		return ox_error_set(err, ENAMETOOLONG,
		                    "%s: a socket's path has 1 to %zu bytes, this one has %zu",
		                    path, sizeof(address->sun_path) - 1, length);
	memcpy(address->sun_path, path, length);
	return 0;
}

/* The path's directory, locked against others who replace a stale socket in it; -1 if that is
 * impossible (then binding will say why). */
static int lock_directory(const char *path)
{
	OX_FREE char *dir = ox_xstrdup(path);
	char *slash = strrchr(dir, '/');
	int fd;

	if (slash)
		slash[slash == dir] = '\0';
	fd = open(slash ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd >= 0 && flock(fd, LOCK_EX) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

int ox_unix_connect(const char *path, int *fd, struct ox_error *err)
{
	struct sockaddr_un address;
	OX_CLOSE int s = -1;
	int rc = make_address(path, &address, err);

	if (rc < 0)
		return rc;
	s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (s < 0 || connect(s, (const struct sockaddr *)&address, sizeof(address)) < 0)
		return ox_error_set(err, errno, "%s: cannot connect: %s", path, strerror(errno));
	*fd = ox_steal_fd(&s);
	return 0;
}

/* Removes a socket file that nobody listens on. */
static int remove_stale(const struct sockaddr_un *address, struct ox_error *err)
{
	OX_CLOSE int fd = -1;
	struct stat st;

	if (lstat(address->sun_path, &st) < 0)
		return errno == ENOENT ? 0
		                       : ox_error_set(err, errno, "%s: %s", address->sun_path,
		                                      strerror(errno));
	if (!S_ISSOCK(st.st_mode))
		return ox_error_set(err, EEXIST,
		                    "%s: exists and is not a socket; choose another path or remove "
		                    "it",
		                    address->sun_path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return ox_error_set(err, errno, "socket: %s", strerror(errno));
	if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ||
	    errno == EAGAIN || errno == EINPROGRESS)
		return ox_error_set(err, EADDRINUSE,
		                    "%s: another process listens there; stop it or choose another "
		                    "path",
		                    address->sun_path);
	if (errno != ECONNREFUSED)
		return ox_error_set(err, errno, "%s: in the way, and connecting to it failed: %s",
		                    address->sun_path, strerror(errno));
	if (unlink(address->sun_path) < 0 && errno != ENOENT)
		return ox_error_set(err, errno, "%s: cannot remove the old socket: %s",
		                    address->sun_path, strerror(errno));
	return 0;
}

int ox_unix_listen(const char *path, mode_t mode, struct ox_unix_listener *listener,
                   struct ox_error *err)
{
	OX_CLOSE int fd = -1, dir = -1;
	struct sockaddr_un address;
	struct stat st;
	int rc = make_address(path, &address, err);

	if (rc < 0)
		return rc;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return ox_error_set(err, errno, "socket: %s", strerror(errno));
	/* The file takes its mode from the socket (less the umask): never open to everybody, not
	 * even between bind() and a chmod(). */
	if (fchmod(fd, mode) < 0)
		return ox_error_set(err, errno, "%s: %s", path, strerror(errno));
	dir = lock_directory(path);
	(void)dir; /* until the end of this function */
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		if (errno != EADDRINUSE)
			return ox_error_set(err, errno, "%s: cannot make the socket: %s", path,
			                    strerror(errno));
		rc = remove_stale(&address, err);
		if (rc < 0)
			return rc;
		if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
			return ox_error_set(err, errno, "%s: cannot make the socket: %s", path,
			                    strerror(errno));
	}
	if (lstat(path, &st) < 0 || listen(fd, BACKLOG) < 0) {
		int code = errno;

		unlink(path);
		return ox_error_set(err, code, "%s: cannot listen: %s", path, strerror(code));
	}
	*listener = (struct ox_unix_listener){.fd = ox_steal_fd(&fd),
	                                      .path = ox_xstrdup(path),
	                                      .dev = st.st_dev,
	                                      .ino = st.st_ino};
	return 0;
}

int ox_unix_socket_is_listening(int fd, struct ox_error *err)
{
	int value = 0, domain = 0, type = 0;
	socklen_t size = sizeof(value);

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0 ||
	    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0 ||
	    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) < 0)
		return ox_error_set(err, errno, "descriptor %d is not a socket: %s", fd,
		                    strerror(errno));
	if (domain != AF_UNIX || type != SOCK_STREAM)
		return ox_error_set(err, EINVAL, "descriptor %d is not a Unix stream socket", fd);
	return value != 0;
}

int ox_unix_listen_fd(int fd, struct ox_unix_listener *listener, struct ox_error *err)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
	    fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
		return ox_error_set(err, errno, "descriptor %d: %s", fd, strerror(errno));
	*listener = (struct ox_unix_listener){.fd = fd};
	return 0;
}

void ox_unix_listener_close(struct ox_unix_listener *listener)
{
	struct stat st;

	if (listener->path) {
		if (lstat(listener->path, &st) == 0 && st.st_dev == listener->dev &&
		    st.st_ino == listener->ino)
			unlink(listener->path);
		free(listener->path);
		listener->path = NULL;
	}
	if (listener->fd >= 0)
		close(listener->fd);
	listener->fd = -1;
}
