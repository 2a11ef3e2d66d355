/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Image locks on open file descriptions (fcntl(2), F_OFD_SETLK), one byte each.
 *
 * For each permission that a holder uses it has a shared lock on byte 100 + bit, for each that
 * it does not let others use on byte 200 + bit.  All take their locks first and look for those
 * of others second (F_OFD_GETLK sees other descriptions only), so of two that come at the same
 * time at least one sees the other.  The locks are shared ones, so taking them only fails
 * against a program that locks the file as a whole (Cloud Hypervisor).
 *
 * Closing the descriptor, also by the death of the process, drops everything.
 */
#include "store/lock.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define BIT_CONSISTENT_READ 0
#define BIT_WRITE           1
#define BIT_WRITE_UNCHANGED 2
#define BIT_RESIZE          3
#define BITS                4

#define USED_BASE      100
#define UNSHARED_BASE  200
#define RETRY_INTERVAL 50000000u /* ns */

struct bytes {
	uint8_t used;     /* permissions that the holder uses */
	uint8_t unshared; /* and those it denies to others */
};

static struct bytes bytes_of(enum ox_lock_mode mode)
{
	const uint8_t writes = 1u << BIT_CONSISTENT_READ | 1u << BIT_WRITE | 1u << BIT_RESIZE;

	switch (mode) {
	case OX_LOCK_READ:
		return (struct bytes){1u << BIT_CONSISTENT_READ,
		                      1u << BIT_WRITE | 1u << BIT_RESIZE};
	case OX_LOCK_WRITE:
		return (struct bytes){writes, 1u << BIT_WRITE | 1u << BIT_RESIZE};
	case OX_LOCK_SHARED_WRITE:
		return (struct bytes){writes, 0};
	case OX_LOCK_NONE:
		break;
	}
	return (struct bytes){0, 0};
}

static int set_byte(int fd, short type, off_t byte)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
	int ret;

	do
		ret = fcntl(fd, F_OFD_SETLK, &lock);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : 0;
}

/* -EAGAIN when another description has any lock on the byte. */
static int test_byte(int fd, off_t byte)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};

	if (fcntl(fd, F_OFD_GETLK, &lock) < 0)
		return -errno;
	return lock.l_type == F_UNLCK ? 0 : -EAGAIN;
}

static int lock_bits(int fd, uint8_t bits, off_t base, off_t *conflict)
{
	for (unsigned i = 0; i < BITS; i++) {
		int ret = bits >> i & 1 ? set_byte(fd, F_RDLCK, base + i) : 0;

		if (ret < 0) {
			*conflict = base + i;
			return ret == -EACCES ? -EAGAIN : ret;
		}
	}
	return 0;
}

static int test_bits(int fd, uint8_t bits, off_t base, off_t *conflict)
{
	for (unsigned i = 0; i < BITS; i++) {
		int ret = bits >> i & 1 ? test_byte(fd, base + i) : 0;

		if (ret < 0) {
			*conflict = base + i;
			return ret;
		}
	}
	return 0;
}

static void unlock_bits(int fd, uint8_t bits, off_t base)
{
	for (unsigned i = 0; i < BITS; i++) {
		if (bits >> i & 1)
			(void)!set_byte(fd, F_UNLCK, base + i);
	}
}

static int try_change(int fd, struct bytes held, struct bytes want, off_t *conflict)
{
	uint8_t more_used = want.used & (uint8_t)~held.used;
	uint8_t more_unshared = want.unshared & (uint8_t)~held.unshared;
	int ret;

	ret = lock_bits(fd, more_used, USED_BASE, conflict);
	if (ret == 0)
		ret = lock_bits(fd, more_unshared, UNSHARED_BASE, conflict);
	if (ret == 0)
		ret = test_bits(fd, want.used, UNSHARED_BASE, conflict);
	if (ret == 0)
		ret = test_bits(fd, want.unshared, USED_BASE, conflict);
	if (ret < 0) {
		unlock_bits(fd, more_used, USED_BASE);
		unlock_bits(fd, more_unshared, UNSHARED_BASE);
		return ret;
	}
	unlock_bits(fd, held.used & (uint8_t)~want.used, USED_BASE);
	unlock_bits(fd, held.unshared & (uint8_t)~want.unshared, UNSHARED_BASE);
	return 0;
}

/* --- who? ------------------------------------------------------------------------------- */

/* Does this fdinfo show a lock (on `byte`, if that is not negative)? */
static bool fdinfo_has_lock(int proc, const char *pid, const char *fd, long long byte)
{
	char path[300], line[256];
	bool found = false;
	FILE *file;
	int info;

	snprintf(path, sizeof(path), "%s/fdinfo/%s", pid, fd);
	info = openat(proc, path, O_RDONLY | O_CLOEXEC);
	if (info < 0)
		return false;
	file = fdopen(info, "r");
	if (!file) {
		close(info);
		return false;
	}
	/* lock:   1: OFDLCK  ADVISORY  READ -1 fe:00:9437211 100 100 */
	while (!found && fgets(line, sizeof(line), file)) {
		long long first, last;
		char end[32];

		if (strncmp(line, "lock:", 5) != 0)
			continue;
		if (byte < 0) {
			found = true;
		} else if (sscanf(line, "lock: %*s %*s %*s %*s %*s %*s %lld %31s", &first, end) ==
		           2) {
			last = strcmp(end, "EOF") == 0 ? INT64_MAX : strtoll(end, NULL, 10);
			found = first <= byte && byte <= last;
		}
	}
	fclose(file);
	return found;
}

static bool is_the_file(int proc, const char *pid, const char *fd, uint64_t dev, uint64_t ino)
{
	char path[300];
	struct stat st;

	snprintf(path, sizeof(path), "%s/fd/%s", pid, fd);
	if (fstatat(proc, path, &st, 0) < 0)
		return false;
	if (S_ISBLK(st.st_mode))
		return ino == 0 && st.st_rdev == dev;
	return ino != 0 && st.st_dev == dev && st.st_ino == ino;
}

static bool process_holds(int proc, const char *pid, uint64_t dev, uint64_t ino, long long byte)
{
	struct dirent *entry;
	char path[280];
	bool found = false;
	DIR *dir;
	int fd;

	snprintf(path, sizeof(path), "%s/fd", pid);
	fd = openat(proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return false;
	dir = fdopendir(fd);
	if (!dir) {
		close(fd);
		return false;
	}
	while (!found && (entry = readdir(dir)))
		found = entry->d_name[0] != '.' &&
		        is_the_file(proc, pid, entry->d_name, dev, ino) &&
		        fdinfo_has_lock(proc, pid, entry->d_name, byte);
	closedir(dir);
	return found;
}

static void describe_process(int proc, const char *pid, char *text, size_t size)
{
	char path[280], comm[64] = "a process";
	int fd;

	snprintf(path, sizeof(path), "%s/comm", pid);
	fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		ssize_t got = read(fd, comm, sizeof(comm) - 1);

		if (got > 0) {
			comm[got] = '\0';
			comm[strcspn(comm, "\n")] = '\0';
		}
		close(fd);
	}
	snprintf(text, size, "%s (pid %s)", comm, pid);
}

/* byte: of the lock that stood in the way, or -1 for any. */
static int find_holder(uint64_t dev, uint64_t ino, long long byte, char *text, size_t size)
{
	struct dirent *entry;
	int found = 0;
	DIR *dir = opendir("/proc");

	if (size)
		text[0] = '\0';
	if (!dir)
		return 0;
	while (!found && (entry = readdir(dir))) {
		if (entry->d_name[0] < '1' || entry->d_name[0] > '9')
			continue;
		if (process_holds(dirfd(dir), entry->d_name, dev, ino, byte)) {
			found = atoi(entry->d_name);
			describe_process(dirfd(dir), entry->d_name, text, size);
		}
	}
	closedir(dir);
	return found;
}

int ox_lock_find_holder(uint64_t dev, uint64_t ino, char *text, size_t size)
{
	return find_holder(dev, ino, -1, text, size);
}

/* --- with patience ------------------------------------------------------------------------ */

static int say_conflict(int fd, enum ox_lock_mode mode, off_t conflict, const char *name,
                        struct ox_error *err)
{
	char holder[128];
	struct stat st;
	int pid = 0;
	const char *advice = mode == OX_LOCK_READ ? "stop it, or read what it is writing with -U"
	                                          : "stop it, or open with --read-only -U";

	if (fstat(fd, &st) == 0)
		pid = S_ISBLK(st.st_mode)
		              ? find_holder(st.st_rdev, 0, conflict, holder, sizeof(holder))
		              : find_holder(st.st_dev, st.st_ino, conflict, holder, sizeof(holder));
	if (pid == (int)getpid())
		return ox_error_set(err, EAGAIN, "%s: in use by this process (pid %d) already",
		                    name, pid);
	if (pid > 0)
		return ox_error_set(err, EAGAIN, "%s: in use by %s; %s", name, holder, advice);
	return ox_error_set(err, EAGAIN,
	                    "%s: in use by another program (which one is not visible from here); "
	                    "%s",
	                    name, advice);
}

int ox_lock_change(int fd, enum ox_lock_mode held, enum ox_lock_mode mode, uint64_t timeout_ns,
                   const char *name, struct ox_error *err)
{
	uint64_t now = ox_clock_ns();
	uint64_t deadline = timeout_ns < UINT64_MAX - now ? now + timeout_ns : UINT64_MAX;
	off_t conflict = -1;
	int ret;

	for (;;) {
		struct timespec nap = {.tv_nsec = RETRY_INTERVAL};

		ret = try_change(fd, bytes_of(held), bytes_of(mode), &conflict);
		if (ret != -EAGAIN || ox_clock_ns() >= deadline)
			break;
		nanosleep(&nap, NULL);
	}
	if (ret == -EAGAIN)
		return say_conflict(fd, mode, conflict, name, err);
	if (ret < 0)
		return ox_error_set(err, -ret,
		                    "%s: its file system does not lock files (%s); open with "
		                    "--read-only -U",
		                    name, strerror(-ret));
	return 0;
}
