/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store beside the random tests: limits, sizes, preallocation, zeroes by every way,
 * long lists, shrunken files, failed flushes, and its locks against itself.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "co.h"
#include "store/file.h"
#include "store/lock.h"
#include "store/record.h"
#include "targets.h"
#include <oxbow/log.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

static const struct ox_store_options direct = {
        .direct = true, .aio = OX_AIO_THREADS, .lock = OX_LOCK_WRITE};
static const struct ox_store_options buffered = {.aio = OX_AIO_THREADS, .lock = OX_LOCK_WRITE};

static struct target need_target(enum target_kind kind, uint64_t size)
{
	struct target target;
	const char *why;

	if (target_make(&target, kind, size, &why)) {
		print_message("# %s\n", why);
		skip();
	}
	return target;
}

static uint64_t file_bytes(const char *path, uint64_t *allocated)
{
	struct stat st;

	assert_int_equal(stat(path, &st), 0);
	if (allocated)
		*allocated = (uint64_t)st.st_blocks * 512;
	return (uint64_t)st.st_size;
}

static void test_limits(void **state)
{
	static const uint32_t sectors[] = {512, 4096};

	for (unsigned i = 0; i < 2; i++) {
		struct target t = need_target(i ? TARGET_LOOP_4096 : TARGET_LOOP_512, 1 << 20);
		struct stat st;
		struct user u;

		user_open(&u, t.path, &direct);
		assert_int_equal(u.store->limits.logical_block_size, sectors[i]);
		assert_true(u.store->limits.physical_block_size >= sectors[i]);
		assert_int_equal(u.store->limits.request_alignment, sectors[i]);
		assert_true(u.store->limits.volatile_cache);
		assert_int_equal(stat(t.path, &st), 0);
		assert_int_equal(u.store->dev, st.st_rdev);
		user_close(&u);
		user_open(&u, t.path, &buffered);
		assert_int_equal(u.store->limits.request_alignment, 1);
		assert_int_equal(u.store->limits.logical_block_size, sectors[i]);
		user_close(&u);
		target_drop(&t);
	}
}

static unsigned progress_calls;
static uint64_t progress_last;

static void progress(void *arg, uint64_t done, uint64_t total)
{
	assert_true(done <= total && done >= progress_last);
	progress_last = done;
	progress_calls++;
}

static void test_truncate(void **state)
{
	struct target t = need_target(TARGET_FILE, 1000);
	struct ox_error err = {0};
	enum ox_block_status status;
	uint64_t allocated, length;
	struct user u;
	uint8_t buf[64];

	memset(buf, 3, sizeof(buf));
	user_open(&u, t.path, &direct);
	assert_int_equal(user_write(&u, 936, buf, 64, 0), 0);
	assert_int_equal(ox_store_truncate(u.store, 1 << 20, OX_PREALLOC_OFF, NULL, NULL, &err), 0);
	assert_int_equal(u.store->size, 1 << 20);
	assert_int_equal(file_bytes(t.path, &allocated), 1 << 20);
	assert_true(allocated < 1 << 19);
	assert_int_equal(ox_store_truncate(u.store, 2 << 20, OX_PREALLOC_FALLOC, NULL, NULL, &err),
	                 0);
	file_bytes(t.path, &allocated);
	assert_true(allocated >= 1 << 20);
	progress_calls = 0;
	progress_last = 0;
	assert_int_equal(
	        ox_store_truncate(u.store, 5 << 20, OX_PREALLOC_FULL, progress, NULL, &err), 0);
	assert_int_equal(progress_last, 3 << 20);
	assert_true(progress_calls >= 2);
	length = 3 << 20;
	assert_int_equal(ox_store_status(u.store, 2 << 20, &length, &status), 0);
	assert_int_equal(status, OX_STATUS_DATA);
	assert_int_equal(length, 3 << 20);
	assert_int_equal(user_read(&u, 936, buf, 64), 0);
	assert_int_equal(buf[63], 3);
	assert_int_equal(user_write(&u, (5 << 20) - 64, buf, 64, 0), 0);
	assert_int_equal(ox_store_truncate(u.store, 4096, OX_PREALLOC_OFF, NULL, NULL, &err), 0);
	assert_int_equal(user_read(&u, 4096 - 64, buf, 64), 0);
	assert_int_equal(user_read(&u, 4096, buf, 1), -EIO);
	user_close(&u);
	target_drop(&t);
}

/* A device has the size it has. */
static void test_truncate_device(void **state)
{
	struct target t = need_target(TARGET_LOOP_512, 1 << 20);
	struct ox_error err = {0};
	struct user u;

	user_open(&u, t.path, &direct);
	assert_int_equal(ox_store_truncate(u.store, 1 << 19, OX_PREALLOC_FULL, NULL, NULL, &err),
	                 0);
	assert_int_equal(u.store->size, 1 << 20);
	assert_int_equal(ox_store_truncate(u.store, 2 << 20, OX_PREALLOC_OFF, NULL, NULL, &err),
	                 -ENOSPC);
	assert_non_null(strstr(err.text, "1 MiB"));
	user_close(&u);
	target_drop(&t);
}

/* A file system of 256 KiB; false (with a message) where nothing can be mounted. */
static bool mount_small(char *path, size_t size)
{
	snprintf(path, size, "%s/small", targets_dir());
	assert_int_equal(mkdir(path, 0700), 0);
	if (mount("none", path, "tmpfs", 0, "size=256k") == 0)
		return true;
	rmdir(path);
	print_message("# mounting is not allowed here\n");
	return false;
}

static void unmount_small(const char *path)
{
	while (umount(path) < 0 && errno == EBUSY)
		usleep(10000);
	assert_int_equal(rmdir(path), 0);
}

/* Preallocation that fails leaves the size alone. */
static void test_truncate_undone(void **state)
{
	static const enum ox_preallocation ways[] = {OX_PREALLOC_FALLOC, OX_PREALLOC_FULL};
	char small[300], path[330];
	int fd;

	if (!mount_small(small, sizeof(small)))
		skip();
	snprintf(path, sizeof(path), "%s/image", small);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, 4096), 0);
	close(fd);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(ways); i++) {
		struct ox_error err = {0};
		struct user u;

		user_open(&u, path, &buffered);
		assert_int_equal(ox_store_truncate(u.store, 1 << 20, ways[i], NULL, NULL, &err),
		                 -ENOSPC);
		assert_non_null(strstr(err.text, "cannot be resized"));
		assert_int_equal(file_bytes(path, NULL), 4096);
		assert_int_equal(u.store->size, 4096);
		user_close(&u);
	}
	unmount_small(small);
}

static void fill(struct user *u, uint8_t value, uint64_t bytes)
{
	uint8_t *buf = malloc(bytes);

	memset(buf, value, bytes);
	assert_int_equal(user_write(u, 0, buf, bytes, 0), 0);
	assert_int_equal(user_flush(u), 0);
	free(buf);
}

static void expect_bytes(struct user *u, uint64_t offset, uint64_t bytes, uint8_t value)
{
	uint8_t *buf = malloc(bytes);

	assert_int_equal(user_read(u, offset, buf, bytes), 0);
	for (uint64_t i = 0; i < bytes; i++) {
		if (buf[i] != value)
			fail_msg("byte %llu is %u, not %u", (unsigned long long)(offset + i),
			         buf[i], value);
	}
	free(buf);
}

/* Each way to make zeroes in its turn, as the ones before are taken away. */
static void zero_by(const char *path, const struct ox_store_options *options, bool device)
{
	static const struct {
		unsigned lacks;
		unsigned flags;
		bool written; /* the last way: by writing */
	} ways[] = {
	        {0, OX_IO_MAY_UNMAP, false},
	        {0, 0, false},
	        {OX_FILE_NO_PUNCH, OX_IO_MAY_UNMAP, false},
	        {OX_FILE_NO_ZERO_RANGE, 0, false},
	        {OX_FILE_NO_ZERO_RANGE | OX_FILE_NO_PUNCH | OX_FILE_NO_BLKZEROOUT, 0, true},
	        {OX_FILE_NO_ZERO_RANGE | OX_FILE_NO_PUNCH | OX_FILE_NO_BLKZEROOUT |
	                 OX_FILE_NO_ALLOCATE,
	         OX_IO_MAY_UNMAP | OX_IO_DSYNC, true},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(ways); i++) {
		uint64_t length = 65536;
		enum ox_block_status status;
		struct ox_file *file;
		struct user u;

		user_open(&u, path, options);
		file = u.store->priv;
		fill(&u, 0xaa, 1 << 20);
		file->lacks = ways[i].lacks;
		if (ways[i].written)
			assert_int_equal(user_op(&u, OX_IO_ZERO, 100 * 512, 300 * 512,
			                         ways[i].flags | OX_IO_NO_FALLBACK),
			                 -ENOTSUP);
		expect_bytes(&u, 100 * 512, 300 * 512, 0xaa);
		assert_int_equal(user_op(&u, OX_IO_ZERO, 100 * 512, 300 * 512, ways[i].flags), 0);
		/* Before reading: cached zeroes count as data. */
		assert_int_equal(ox_store_status(u.store, 65536, &length, &status), 0);
		if (!device)
			assert_int_equal(status, ways[i].written ? OX_STATUS_DATA : OX_STATUS_ZERO);
		/* Nothing else was lost on the way. */
		assert_int_equal(file->lacks & ~ways[i].lacks, 0);
		expect_bytes(&u, 0, 100 * 512, 0xaa);
		expect_bytes(&u, 100 * 512, 300 * 512, 0);
		expect_bytes(&u, 400 * 512, (1 << 20) - 400 * 512, 0xaa);
		user_close(&u);
	}
}

static void test_zero_ways_file(void **state)
{
	struct target t = need_target(TARGET_FILE, 1 << 20);

	zero_by(t.path, &direct, false);
	zero_by(t.path, &buffered, false);
	target_drop(&t);
}

static void test_zero_ways_device(void **state)
{
	struct target t = need_target(TARGET_LOOP_4096, 1 << 20);

	zero_by(t.path, &direct, true);
	target_drop(&t);
}

/* A file system without ZERO_RANGE: the answer is remembered, and the next way taken. */
static void test_zero_tmpfs(void **state)
{
	char path[] = "/dev/shm/oxbow-store-XXXXXX";
	int fd = mkstemp(path);
	uint64_t allocated;
	struct ox_file *file;
	struct user u;

	if (fd < 0 || ftruncate(fd, 1 << 20) < 0) {
		print_message("# no /dev/shm here\n");
		skip();
	}
	close(fd);
	user_open(&u, path, &buffered);
	file = u.store->priv;
	fill(&u, 0xaa, 1 << 20);
	assert_int_equal(user_op(&u, OX_IO_ZERO, 0, 1 << 20, 0), 0);
	expect_bytes(&u, 0, 1 << 20, 0);
	if (!(file->lacks & OX_FILE_NO_ZERO_RANGE)) {
		print_message("# this tmpfs knows ZERO_RANGE\n");
	} else {
		file_bytes(path, &allocated);
		assert_int_equal(allocated, 1 << 20);
	}
	user_close(&u);
	unlink(path);
}

/* More list entries than the kernel takes, of a size that makes the cut fall anywhere. */
static void long_list(const struct ox_store_options *options, size_t piece, unsigned count,
                      size_t skew)
{
	struct target t = need_target(TARGET_FILE, 4 << 20);
	struct iovec *iov = calloc(count, sizeof(*iov));
	uint8_t *buf, *back;
	struct ox_io io = {.op = OX_IO_WRITE, .offset = 4096, .length = piece * count, .iov = iov};
	struct user u;
	void *mem = NULL;

	assert_int_equal(posix_memalign(&mem, 4096, piece * count + 4096), 0);
	buf = (uint8_t *)mem + skew;
	back = malloc(piece * count);
	io.iovcnt = count;
	for (unsigned i = 0; i < count; i++) {
		iov[i].iov_base = buf + i * piece;
		iov[i].iov_len = piece;
		memset(iov[i].iov_base, (int)(i % 251), piece);
	}
	user_open(&u, t.path, options);
	assert_int_equal(user_io(&u, &io), 0);
	memcpy(back, buf, piece * count);
	memset(buf, 0, piece * count);
	io.op = OX_IO_READ;
	assert_int_equal(user_io(&u, &io), 0);
	assert_memory_equal(buf, back, piece * count);
	user_close(&u);
	free(back);
	free(mem);
	free(iov);
	target_drop(&t);
}

static void test_long_lists(void **state)
{
	long_list(&direct, 512, 3000, 0);
	long_list(&direct, 512, 3000, 4);
	long_list(&direct, 7, 3000, 1);
	long_list(&buffered, 7, 3000, 1);
	long_list(&buffered, 512, 1025, 0);
}

/* What another program cut off reads as zero. */
static void test_shrunken(void **state)
{
	const struct ox_store_options *options[] = {&direct, &buffered};

	for (unsigned i = 0; i < 2; i++) {
		struct target t = need_target(TARGET_FILE, 1 << 20);
		uint8_t buf[16];
		struct user u;

		user_open(&u, t.path, options[i]);
		fill(&u, 1, 1 << 20);
		assert_int_equal(truncate(t.path, 65536 + 1000), 0);
		expect_bytes(&u, 0, 65536 + 1000, 1);
		expect_bytes(&u, 65536 + 1000, (1 << 20) - 65536 - 1000, 0);
		expect_bytes(&u, 512 * 1024, 4096, 0);
		assert_int_equal(ox_store_pread(u.store, 65536 + 995, buf, 16), 0);
		assert_memory_equal(buf, "\1\1\1\1\1\0\0\0\0\0\0\0\0\0\0\0", 16);
		user_close(&u);
		target_drop(&t);
	}
}

/* --- failed flushes ------------------------------------------------------------------------ */

static void test_flush_sticky(void **state)
{
	struct target t = need_target(TARGET_FILE, 1 << 20);
	char run[300];
	/* Worker threads do not survive a fork. */
	struct ox_store_options writer = {.aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE};
	struct ox_store_options reader = {.aio = OX_AIO_SYNC, .read_only = true};
	struct user u;
	pid_t child;
	int status;

	snprintf(run, sizeof(run), "%s/run", targets_dir());
	setenv("OXBOW_RUN_DIR", run, 1);
	ox_log_set_level((enum ox_log_level)0);

	/* A process sees its flush fail and dies. */
	child = fork();
	if (child == 0) {
		user_open(&u, t.path, &writer);
		if (user_flush(&u) != 0)
			_exit(1);
		ox_store_fail_flushes(u.store);
		if (user_flush(&u) != -EIO || user_flush(&u) != -EIO)
			_exit(2);
		raise(SIGKILL);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);

	/* A look at it without the lock changes nothing. */
	user_open(&u, t.path, &reader);
	assert_int_equal(user_flush(&u), 0);
	user_close(&u);
	/* Whoever writes next is told, */
	user_open(&u, t.path, &writer);
	assert_true(u.store->flush_failed);
	assert_int_equal(user_flush(&u), -EIO);
	user_close(&u);
	/* and has told. */
	user_open(&u, t.path, &writer);
	assert_int_equal(user_flush(&u), 0);
	user_close(&u);
	ox_log_set_level(OX_LOG_INFO);
	assert_int_equal(rmdir(run), 0);
	unsetenv("OXBOW_RUN_DIR");
	target_drop(&t);
}

/* The real thing: a device whose writeback fails.  The kernel tells once; we, every time. */
static void test_flush_writeback_error(void **state)
{
	struct target t;
	char small[300], run[300], file[330];
	uint8_t *data;
	struct user u;
	int fd;

	if (!mount_small(small, sizeof(small)))
		skip();
	snprintf(file, sizeof(file), "%s/backing", small);
	fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, 4 << 20), 0);
	close(fd);
	if (target_loop_over(&t, file, 512)) {
		unmount_small(small);
		print_message("# no loop devices here\n");
		skip();
	}
	snprintf(run, sizeof(run), "%s/run", targets_dir());
	setenv("OXBOW_RUN_DIR", run, 1);
	ox_log_set_level((enum ox_log_level)0);
	data = calloc(1, 1 << 20);
	memset(data, 1, 1 << 20);
	user_open(&u, t.path, &buffered);
	assert_int_equal(user_write(&u, 0, data, 1 << 20, 0), 0);
	assert_int_equal(user_flush(&u), -EIO);
	assert_int_equal(user_flush(&u), -EIO);
	assert_true(u.store->flush_failed);
	user_close(&u);
	free(data);
	ox_log_set_level(OX_LOG_INFO);
	assert_int_equal(rmdir(run), 0);
	unsetenv("OXBOW_RUN_DIR");
	close(t.loop_fd);
	unmount_small(small);
}

/* --- locks --------------------------------------------------------------------------------- */

/* A child that holds a lock until its pipe is closed. */
static pid_t holder(const char *path, enum ox_lock_mode mode, int *release)
{
	struct ox_store_options options = {.aio = OX_AIO_SYNC, .lock = mode};
	struct ox_store *store;
	int ready[2], go[2];
	pid_t child;
	char byte;

	options.read_only = mode == OX_LOCK_READ;
	assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
	assert_int_equal(pipe2(go, O_CLOEXEC), 0);
	child = fork();
	if (child == 0) {
		close(go[1]);
		if (ox_store_open(path, &options, &store, NULL) < 0)
			_exit(1);
		if (write(ready[1], "", 1) != 1 || read(go[0], &byte, 1) != 0)
			_exit(2);
		ox_store_close(store);
		_exit(0);
	}
	close(ready[1]);
	close(go[0]);
	assert_int_equal(read(ready[0], &byte, 1), 1);
	close(ready[0]);
	*release = go[1];
	return child;
}

static void let_go(pid_t child, int release)
{
	int status;

	close(release);
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_lock_modes(void **state)
{
	/* held by one, asked for by another: allowed? */
	static const struct {
		enum ox_lock_mode held, asked;
		bool allowed;
	} cases[] = {
	        {OX_LOCK_READ, OX_LOCK_READ, true},
	        {OX_LOCK_READ, OX_LOCK_WRITE, false},
	        {OX_LOCK_READ, OX_LOCK_SHARED_WRITE, false},
	        {OX_LOCK_READ, OX_LOCK_NONE, true},
	        {OX_LOCK_WRITE, OX_LOCK_READ, false},
	        {OX_LOCK_WRITE, OX_LOCK_WRITE, false},
	        {OX_LOCK_WRITE, OX_LOCK_SHARED_WRITE, false},
	        {OX_LOCK_WRITE, OX_LOCK_NONE, true},
	        {OX_LOCK_SHARED_WRITE, OX_LOCK_SHARED_WRITE, true},
	        {OX_LOCK_SHARED_WRITE, OX_LOCK_WRITE, false},
	        {OX_LOCK_SHARED_WRITE, OX_LOCK_READ, false},
	};
	struct target t = need_target(TARGET_FILE, 1 << 20);

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_store_options options = {.aio = OX_AIO_SYNC, .lock = cases[i].asked};
		struct ox_error err = {0};
		struct ox_store *store;
		char pid_text[32];
		int release, ret;
		pid_t child;

		options.read_only = cases[i].asked <= OX_LOCK_READ;
		child = holder(t.path, cases[i].held, &release);
		ret = ox_store_open(t.path, &options, &store, &err);
		if (cases[i].allowed) {
			assert_int_equal(ret, 0);
			ox_store_close(store);
		} else {
			struct stat st;
			char text[128];

			assert_int_equal(ret, -EAGAIN);
			snprintf(pid_text, sizeof(pid_text), "(pid %d)", (int)child);
			if (!strstr(err.text, "in use by test_store_file") ||
			    !strstr(err.text, pid_text))
				fail_msg("'%s' does not name the holder", err.text);
			assert_int_equal(stat(t.path, &st), 0);
			assert_int_equal(
			        ox_lock_find_holder(st.st_dev, st.st_ino, text, sizeof(text)),
			        child);
			assert_non_null(strstr(text, pid_text));
		}
		let_go(child, release);
	}
	target_drop(&t);
}

static void test_lock_device(void **state)
{
	struct target t = need_target(TARGET_LOOP_512, 1 << 20);
	struct ox_store_options options = {.aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE};
	struct ox_error err = {0};
	struct ox_store *store;
	char pid_text[32];
	int release;
	pid_t child = holder(t.path, OX_LOCK_WRITE, &release);

	assert_int_equal(ox_store_open(t.path, &options, &store, &err), -EAGAIN);
	snprintf(pid_text, sizeof(pid_text), "(pid %d)", (int)child);
	assert_non_null(strstr(err.text, pid_text));
	let_go(child, release);
	ox_error_clear(&err);
	assert_int_equal(ox_store_open(t.path, &options, &store, &err), 0);
	ox_store_close(store);
	target_drop(&t);
}

/* A lock that goes away while we wait is ours. */
static void test_lock_wait(void **state)
{
	struct target t = need_target(TARGET_FILE, 1 << 20);
	struct ox_store_options options = {
	        .aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE, .lock_timeout_ns = 60000000000u};
	struct ox_error err = {0};
	struct ox_store *store;
	int release, status;
	pid_t child = holder(t.path, OX_LOCK_WRITE, &release);
	pid_t killer;

	killer = fork();
	if (killer == 0) {
		close(release);
		usleep(150000);
		kill(child, SIGKILL);
		_exit(0);
	}
	if (ox_store_open(t.path, &options, &store, &err) < 0)
		fail_msg("%s", err.text);
	waitpid(killer, &status, 0);
	waitpid(child, &status, 0);
	close(release);
	ox_store_close(store);
	target_drop(&t);
}

static void test_lock_change(void **state)
{
	struct target t = need_target(TARGET_FILE, 1 << 20);
	struct ox_store_options options = {.aio = OX_AIO_SYNC};
	struct ox_error err = {0};
	struct ox_store *a, *b;

	assert_int_equal(ox_store_open(t.path, &options, &a, &err), 0);
	assert_int_equal(ox_store_open(t.path, &options, &b, &err), 0);
	assert_int_equal(ox_store_lock(a, OX_LOCK_READ, &err), 0);
	assert_int_equal(ox_store_lock(b, OX_LOCK_READ, &err), 0);
	assert_int_equal(ox_store_lock(a, OX_LOCK_WRITE, &err), -EAGAIN);
	assert_non_null(strstr(err.text, "this process"));
	/* What it had, it still has. */
	assert_int_equal(a->options.lock, OX_LOCK_READ);
	ox_error_clear(&err);
	assert_int_equal(ox_store_lock(b, OX_LOCK_WRITE, &err), -EAGAIN);
	assert_int_equal(ox_store_lock(b, OX_LOCK_NONE, &err), 0);
	assert_int_equal(ox_store_lock(a, OX_LOCK_WRITE, &err), 0);
	assert_int_equal(ox_store_lock(b, OX_LOCK_READ, &err), -EAGAIN);
	assert_int_equal(ox_store_lock(a, OX_LOCK_READ, &err), 0);
	assert_int_equal(ox_store_lock(b, OX_LOCK_READ, &err), 0);
	ox_store_close(a);
	ox_store_close(b);
	target_drop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_limits),
	        cmocka_unit_test(test_truncate),
	        cmocka_unit_test(test_truncate_device),
	        cmocka_unit_test(test_truncate_undone),
	        cmocka_unit_test(test_zero_ways_file),
	        cmocka_unit_test(test_zero_ways_device),
	        cmocka_unit_test(test_zero_tmpfs),
	        cmocka_unit_test(test_long_lists),
	        cmocka_unit_test(test_shrunken),
	        cmocka_unit_test(test_flush_sticky),
	        cmocka_unit_test(test_flush_writeback_error),
	        cmocka_unit_test(test_lock_modes),
	        cmocka_unit_test(test_lock_device),
	        cmocka_unit_test(test_lock_wait),
	        cmocka_unit_test(test_lock_change),
	};
	int failed;

	targets_begin();
	failed = cmocka_run_group_tests_name("file", tests, NULL, NULL);
	targets_end();
	return failed;
}
