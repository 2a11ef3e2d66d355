/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Opening a path in this process.
 */
#include "base/opener.h"
#include "base/base.h"
#include <errno.h>
#include <fcntl.h>

static int open_direct(struct ox_opener *opener, const char *path, int flags, mode_t mode)
{
	int fd;

	/* A slow open (FUSE, NFS) may be interrupted by a signal that has a handler. */
	do {
		fd = open(path, flags | O_CLOEXEC, mode);
	} while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : fd;
}

struct ox_opener ox_opener_direct = {.open = open_direct};
