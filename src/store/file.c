/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store: regular files and block devices.  This file opens, locks and closes them;
 * file.h lists the other parts.
 *
 * Order at open: the descriptor, the lock, and only then anything that reads the file's state.
 * Nothing is created or truncated here.  The lock lives on the descriptor that does the I/O and
 * goes with it.
 *
 * A failed flush of buffered data is final for this opening (store->flush_failed) and, by a
 * record outside the process, for those that follow a crash; a clean close of a writer forgets
 * it (store/record.h).
 */
#include "store/file.h"
#include "store/lock.h"
#include "store/record.h"
#include <oxbow/log.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

/* --- failed flushes ---------------------------------------------------------------------- */

void ox_store_fail_flushes(struct ox_store *store)
{
	struct ox_file *file = store->priv;

	if (__atomic_exchange_n(&store->flush_failed, true, __ATOMIC_ACQ_REL))
		return;
	ox_log(OX_LOG_ERROR,
	       "%s: writing cached data to the host failed; data may be lost, and every flush fails "
	       "until the image is opened anew",
	       store->path);
	if (ox_record_failed_flush(store->dev, store->ino) < 0)
		ox_log(OX_LOG_WARNING, "%s: the failed flush could not be recorded for a restart",
		       store->path);
	__atomic_store_n(&file->record, true, __ATOMIC_RELEASE);
}

static bool is_writer(enum ox_lock_mode mode)
{
	return mode == OX_LOCK_WRITE || mode == OX_LOCK_SHARED_WRITE;
}

/* The lock has become a writer's: did one before us lose data? */
static void adopt_record(struct ox_file *file)
{
	struct ox_store *store = file->store;

	if (file->record || !ox_record_has_failed_flush(store->dev, store->ino))
		return;
	file->record = true;
	__atomic_store_n(&store->flush_failed, true, __ATOMIC_RELEASE);
	ox_log(OX_LOG_ERROR,
	       "%s: a flush failed before the last server of this image ended, so data may be lost; "
	       "every flush fails until the image is closed and opened anew",
	       store->path);
}

/* --- open ------------------------------------------------------------------------------- */

static int say_open_failed(struct ox_store *store, const char *path, int flags, int code,
                           struct ox_error *err)
{
	struct ox_opener *opener = store->options.opener;

	if (code == EINVAL && (flags & O_DIRECT)) {
		int fd = ox_open(opener, path, flags & ~O_DIRECT, 0);

		if (fd >= 0) {
			close(fd);
			return ox_error_set(
			        err, EINVAL,
			        "%s: its file system cannot bypass the page cache (O_DIRECT, "
			        "cache modes none and directsync); use --cache=writeback",
			        store->path);
		}
	}
	if ((code == EACCES || code == EROFS || code == EPERM) && (flags & O_ACCMODE) == O_RDWR)
		return ox_error_set(err, code, "%s: cannot be opened to write: %s", store->path,
		                    strerror(code));
	return ox_error_set(err, code, "%s: %s", store->path, strerror(code));
}

/* Opens the path and makes sure that it is something that can hold an image. */
static int open_path(struct ox_file *file, const char *path, struct stat *st, struct ox_error *err)
{
	struct ox_store *store = file->store;
	/* O_NONBLOCK: a FIFO does not hang us. */
	int flags = O_NONBLOCK | O_CLOEXEC;
	int status;

	flags |= store->options.read_only ? O_RDONLY : O_RDWR;
	flags |= store->options.direct ? O_DIRECT : 0;
	file->fd = ox_open(store->options.opener, path, flags, 0);
	if (file->fd < 0)
		return say_open_failed(store, path, flags, -file->fd, err);
	if (fstat(file->fd, st) < 0)
		return ox_error_set(err, errno, "%s: %s", store->path, strerror(errno));
	if (S_ISDIR(st->st_mode))
		return ox_error_set(err, EISDIR, "%s: is a directory", store->path);
	if (!S_ISREG(st->st_mode) && !S_ISBLK(st->st_mode))
		return ox_error_set(err, EINVAL, "%s: neither a regular file nor a block device",
		                    store->path);
	/* io_uring would take O_NONBLOCK to mean that requests may fail with EAGAIN. */
	status = fcntl(file->fd, F_GETFL);
	if (status < 0 || fcntl(file->fd, F_SETFL, status & ~O_NONBLOCK) < 0)
		return ox_error_set(err, errno, "%s: %s", store->path, strerror(errno));
	return 0;
}

static int file_lock(struct ox_store *store, enum ox_lock_mode mode, struct ox_error *err)
{
	struct ox_file *file = store->priv;
	int ret;

	if (mode == file->locked)
		return 0;
	ret = ox_lock_change(file->fd, file->locked, mode, store->options.lock_timeout_ns,
	                     store->path, err);
	if (ret < 0)
		return ret;
	file->locked = mode;
	if (is_writer(mode))
		adopt_record(file);
	return 0;
}

static void file_close(struct ox_store *store)
{
	struct ox_file *file = store->priv;

	/* The lock is still held, so that the record is nobody else's. */
	if (file->record && is_writer(file->locked))
		ox_record_forget_failed_flush(store->dev, store->ino);
	if (file->tail_fd >= 0)
		close(file->tail_fd);
	if (file->fd >= 0)
		close(file->fd);
	ox_ranges_destroy(&file->ranges);
	free(file);
	store->priv = NULL;
}

static int file_open(struct ox_store *store, const char *path, struct ox_error *err)
{
	struct ox_file *file = ox_xcalloc(1, sizeof(*file));
	struct ox_aio_facts facts;
	enum ox_lock_mode mode = store->options.lock;
	struct stat st;
	uint64_t size;
	int ret;

	store->priv = file;
	file->store = store;
	file->fd = -1;
	file->tail_fd = -1;
	file->tail_start = UINT64_MAX;
	file->direct = store->options.direct;
	ox_ranges_init(&file->ranges);

	ret = open_path(file, path, &st, err);
	if (ret < 0)
		goto out;
	file->block = S_ISBLK(st.st_mode);
	store->dev = file->block ? st.st_rdev : st.st_dev;
	store->ino = file->block ? 0 : st.st_ino;
	ret = file_lock(store, mode, err);
	if (ret < 0)
		goto out;
	ret = ox_file_find_limits(file, err);
	if (ret < 0)
		goto out;
	ret = ox_file_ask_size(file, &size);
	if (ret == 0)
		ret = ox_file_set_tail(file, size);
	if (ret < 0) {
		ox_error_set(err, -ret, "%s: %s", store->path, strerror(-ret));
		goto out;
	}
	facts = (struct ox_aio_facts){
	        .direct = file->direct,
	        .block_device = file->block,
	        .fully_allocated = !file->block && ox_file_is_fully_allocated(file->fd, size),
	};
	store->aio = ox_aio_choose(store->options.aio, &facts, store->aio_reason,
	                           sizeof(store->aio_reason));
	return 0;
out:
	file_close(store);
	return ret;
}

/* --- size ------------------------------------------------------------------------------- */

int ox_file_ask_size(const struct ox_file *file, uint64_t *size)
{
	struct stat st;

	if (file->block)
		return ioctl(file->fd, BLKGETSIZE64, size) < 0 ? -errno : 0;
	if (fstat(file->fd, &st) < 0)
		return -errno;
	*size = (uint64_t)st.st_size;
	return 0;
}

int ox_file_reopen_buffered(const struct ox_file *file)
{
	struct ox_store *store = file->store;
	int flags = (store->options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC;
	const char *path = store->path;
	struct stat now, then;
	char link[64];
	int fd;

	/* The same inode whatever has become of the path. */
	snprintf(link, sizeof(link), "/proc/self/fd/%d", file->fd);
	fd = open(link, flags);
	if (fd >= 0)
		return fd;
	/* No /proc in this sandbox: by the path, if it still means the same file. */
	if (!strncmp(path, "file:", 5))
		path += 5;
	fd = ox_open(store->options.opener, path, flags, 0);
	if (fd < 0)
		return fd;
	if (fstat(fd, &now) < 0 || fstat(file->fd, &then) < 0 || now.st_dev != then.st_dev ||
	    now.st_ino != then.st_ino) {
		close(fd);
		return -ESTALE;
	}
	return fd;
}

int ox_file_set_tail(struct ox_file *file, uint64_t size)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t unit = ox_max(page, file->align_mask + 1);

	if (file->block || ox_is_aligned(size, file->align_mask + 1)) {
		__atomic_store_n(&file->tail_start, UINT64_MAX, __ATOMIC_RELAXED);
		return 0;
	}
	if (file->tail_fd < 0 && !file->store->options.read_only) {
		int fd = ox_file_reopen_buffered(file);

		if (fd < 0)
			return fd;
		__atomic_store_n(&file->tail_fd, fd, __ATOMIC_RELEASE);
	}
	__atomic_store_n(&file->tail_start, ox_align_down(size, unit), __ATOMIC_RELEASE);
	return 0;
}

static int file_size(struct ox_store *store, uint64_t *size)
{
	struct ox_file *file = store->priv;
	int ret = ox_file_ask_size(file, size);

	return ret < 0 ? ret : ox_file_set_tail(file, *size);
}

static void file_limits(struct ox_store *store, struct ox_store_limits *limits)
{
	const struct ox_file *file = store->priv;

	*limits = file->limits;
}

/* --- channels --------------------------------------------------------------------------- */

static int file_attach(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
                       struct ox_error *err)
{
	struct ox_file_channel *ch = ox_xcalloc(1, sizeof(*ch));

	ch->file = store->priv;
	ch->engine = ox_loop_engine(loop, store->aio);
	ch->index = ox_engine_register_file(ch->engine, ch->file->fd);
	ox_bounce_init(&ch->bounce, loop);
	*channel = &ch->base;
	return 0;
}

static void file_detach(struct ox_channel *channel)
{
	struct ox_file_channel *ch = ox_file_channel(channel);

	if (ch->index >= 0)
		ox_engine_unregister_file(ch->engine, ch->index);
	while (ch->spare_ranges) {
		struct ox_file_range *fr = ch->spare_ranges;

		ch->spare_ranges = fr->next;
		free(fr);
	}
	ox_bounce_destroy(&ch->bounce);
	free(ch);
}

const struct ox_store_ops ox_store_file = {
        .name = "file",
        .open = file_open,
        .close = file_close,
        .size = file_size,
        .limits = file_limits,
        .attach = file_attach,
        .detach = file_detach,
        .read = ox_file_read,
        .write = ox_file_write,
        .flush = ox_file_flush,
        .zero = ox_file_zero,
        .discard = ox_file_discard,
        .pread = ox_file_pread,
        .status = ox_file_status,
        .truncate = ox_file_truncate,
        .lock = file_lock,
};
