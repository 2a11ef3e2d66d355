/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "targets.h"
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[200];
static unsigned serial;

void targets_begin(void)
{
	const char *base = getenv("OXBOW_TEST_DIR");

	snprintf(dir, sizeof(dir), "%s/oxbow-store-XXXXXX", base ? base : "/var/tmp");
	if (!mkdtemp(dir)) {
		perror(dir);
		exit(1);
	}
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

void targets_end(void)
{
	/* With what failed tests left behind. */
	if (nftw(dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS | FTW_MOUNT) < 0)
		perror(dir);
}

const char *targets_dir(void)
{
	return dir;
}

static int attach_loop(struct target *target, uint32_t sector, const char **why)
{
	struct loop_config config = {.block_size = sector};
	int control, number, backing, fd;
	char path[64];

	*why = "no loop devices here (root and /dev/loop-control are needed)";
	control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	if (control < 0)
		return 1;
	backing = open(target->file, O_RDWR | O_CLOEXEC);
	/* Another test may take the free device first. */
	for (int attempt = 0; attempt < 50; attempt++) {
		number = ioctl(control, LOOP_CTL_GET_FREE);
		if (number < 0)
			break;
		snprintf(path, sizeof(path), "/dev/loop%d", number);
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			break;
		config.fd = (uint32_t)backing;
		config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
		if (ioctl(fd, LOOP_CONFIGURE, &config) == 0) {
			target->loop_fd = fd;
			strcpy(target->path, path);
			close(backing);
			close(control);
			return 0;
		}
		close(fd);
		if (errno != EBUSY) {
			*why = "LOOP_CONFIGURE is refused here";
			break;
		}
	}
	close(backing);
	close(control);
	return 1;
}

int target_loop_over(struct target *target, const char *file, uint32_t sector)
{
	const char *why;

	memset(target, 0, sizeof(*target));
	target->loop_fd = -1;
	snprintf(target->file, sizeof(target->file), "%s", file);
	return attach_loop(target, sector, &why);
}

int target_make(struct target *target, enum target_kind kind, uint64_t size, const char **why)
{
	int fd;

	memset(target, 0, sizeof(*target));
	target->loop_fd = -1;
	snprintf(target->file, sizeof(target->file), "%s/image-%u", dir, serial++);
	strcpy(target->path, target->file);
	fd = open(target->file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)size) < 0) {
		perror(target->file);
		exit(1);
	}
	close(fd);
	if (kind == TARGET_FILE)
		return 0;
	if (attach_loop(target, kind == TARGET_LOOP_512 ? 512 : 4096, why) == 0)
		return 0;
	target_drop(target);
	return 1;
}

void target_drop(struct target *target)
{
	if (target->loop_fd >= 0)
		close(target->loop_fd);
	target->loop_fd = -1;
	unlink(target->file);
}
