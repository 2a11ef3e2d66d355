/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Records of failed flushes: see record.h.  The files are empty: their names say it all.  They
 * lie on a file system in memory, so nothing here needs a sync.
 */
#include "store/record.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static bool run_dir(char *dir, size_t size)
{
	const char *given = getenv("OXBOW_RUN_DIR");
	const char *xdg = getenv("XDG_RUNTIME_DIR");
	int length;

	if (given && given[0])
		length = snprintf(dir, size, "%s", given);
	else if (geteuid() == 0)
		length = snprintf(dir, size, "/run/oxbow");
	else if (xdg && xdg[0])
		length = snprintf(dir, size, "%s/oxbow", xdg);
	else
		return false;
	return length > 0 && (size_t)length < size;
}

int ox_record_path(const char *kind, uint64_t dev, uint64_t ino, char *path, size_t size,
                   bool make_dir)
{
	char dir[3072], boot[64] = "";
	OX_CLOSE int fd = -1;
	ssize_t got;
	int length;

	if (!run_dir(dir, sizeof(dir)))
		return -ENOENT;
	if (make_dir && mkdir(dir, 0700) < 0 && errno != EEXIST)
		return -errno;
	fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	got = read(fd, boot, sizeof(boot) - 1);
	if (got <= 0)
		return -EIO;
	boot[got] = '\0';
	boot[strcspn(boot, "\n")] = '\0';
	length =
	        snprintf(path, size, "%s/%s-%" PRIx64 "-%" PRIu64 "-%s", dir, kind, dev, ino, boot);
	return length > 0 && (size_t)length < size ? 0 : -ENAMETOOLONG;
}

static int record_path(uint64_t dev, uint64_t ino, char *path, size_t size, bool make_dir)
{
	return ox_record_path("flush-failed", dev, ino, path, size, make_dir);
}

int ox_record_failed_flush(uint64_t dev, uint64_t ino)
{
	char path[4096];
	int fd, ret;

	ret = record_path(dev, ino, path, sizeof(path), true);
	if (ret < 0)
		return ret;
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

bool ox_record_has_failed_flush(uint64_t dev, uint64_t ino)
{
	char path[4096];

	return record_path(dev, ino, path, sizeof(path), false) == 0 && access(path, F_OK) == 0;
}

void ox_record_forget_failed_flush(uint64_t dev, uint64_t ino)
{
	char path[4096];

	if (record_path(dev, ino, path, sizeof(path), false) == 0)
		unlink(path);
}
