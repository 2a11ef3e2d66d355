/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Unix sockets of the control path.
 *
 * A socket file outlives a program that was killed.  Whether something still listens is found out
 * by connecting: refused means stale.  Two programs that start at the same moment could both find
 * it so; the one that binds second then removes the other's file.  A lock on a file beside it
 * closes that window: PATH.lock would stay behind for ever, so the directory itself is locked
 * (flock) while a stale file is replaced.
 */
#include "control/qmp_internal.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define BACKLOG 64

static int fill_address(struct sockaddr_un *address, const char *path, struct ox_error *err)
{
	*address = (struct sockaddr_un){.sun_family = AF_UNIX};
	if (!*path)
		return ox_error_set(err, EINVAL, "the socket's path is empty");
	if (strlen(path) >= sizeof(address->sun_path))
		return ox_error_set(err, ENAMETOOLONG,
		                    "%s: a socket's path has at most %zu bytes, this one has %zu",
		                    path, sizeof(address->sun_path) - 1, strlen(path));
	memcpy(address->sun_path, path, strlen(path));
	return 0;
}

int ox_control_connect(const char *path, int *fd, struct ox_error *err)
{
	struct sockaddr_un address;
	OX_CLOSE int s = -1;
	int ret = fill_address(&address, path, err);

	if (ret < 0)
		return ret;
	s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (s < 0 || connect(s, (const struct sockaddr *)&address, sizeof(address)) < 0)
		return ox_error_set(err, errno, "%s: cannot connect: %s", path, strerror(errno));
	*fd = ox_steal_fd(&s);
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

/* Binding failed because the file exists: removes it if it is a socket that nobody listens on. */
static int remove_stale(const char *path, struct ox_error *err)
{
	struct stat st;
	int fd = -1, ret;

	if (lstat(path, &st) < 0)
		return errno == ENOENT ? 0
		                       : ox_error_set(err, errno, "%s: %s", path, strerror(errno));
	if (!S_ISSOCK(st.st_mode))
		return ox_error_set(err, EEXIST, "%s exists and is not a socket", path);
	ret = ox_control_connect(path, &fd, NULL);
	if (fd >= 0)
		close(fd);
	if (ret != -ECONNREFUSED)
		return ox_error_set(err, EADDRINUSE, "%s: another program listens on this socket",
		                    path);
	if (unlink(path) < 0)
		return ox_error_set(err, errno,
		                    "%s: cannot remove the socket of a dead program: %s", path,
		                    strerror(errno));
	return 0;
}

int ox_control_listen(const char *path, int *fd, struct ox_error *err)
{
	struct sockaddr_un address;
	OX_CLOSE int s = -1, dir = -1;
	int ret = fill_address(&address, path, err);

	if (ret < 0)
		return ret;
	s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (s < 0)
		return ox_error_set(err, errno, "%s: cannot make a socket: %s", path,
		                    strerror(errno));
	/* The file takes its mode from the socket: there is no moment in which it is wider. */
	if (fchmod(s, 0600) < 0)
		return ox_error_set(err, errno, "%s: cannot set the mode: %s", path,
		                    strerror(errno));
	dir = lock_directory(path);
	(void)dir; /* until the end of this function */
	ret = bind(s, (const struct sockaddr *)&address, sizeof(address));
	if (ret < 0 && errno == EADDRINUSE) {
		ret = remove_stale(path, err);
		if (ret < 0)
			return ret;
		ret = bind(s, (const struct sockaddr *)&address, sizeof(address));
	}
	if (ret < 0)
		return ox_error_set(err, errno, "%s: cannot make the socket: %s", path,
		                    strerror(errno));
	if (listen(s, BACKLOG) < 0) {
		ret = ox_error_set(err, errno, "%s: cannot listen: %s", path, strerror(errno));
		unlink(path);
		return ret;
	}
	*fd = ox_steal_fd(&s);
	return 0;
}
