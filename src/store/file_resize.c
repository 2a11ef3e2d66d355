/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store's size: truncate with preallocation; and what of it is stored.
 *
 * Control path: everything here blocks.  A resize that fails leaves the size as it was.
 */
#include "store/file.h"
#include "base/text.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#define FULL_CHUNK (UINT64_C(1) << 20)

typedef void progress_fn(void *arg, uint64_t done, uint64_t total);

/* Writes zeroes over [from, to) and makes them durable, through a descriptor that takes any
 * offset. */
static int write_zeroes(int fd, uint64_t from, uint64_t to, progress_fn *progress, void *arg)
{
	uint64_t at = from;

	while (at < to) {
		uint64_t chunk = ox_min(to - at, FULL_CHUNK);
		struct iovec iov[FULL_CHUNK / OX_ZEROES_SIZE];
		int count = 0;
		ssize_t put;

		for (uint64_t done = 0; done < chunk; count++) {
			uint64_t piece = ox_min(chunk - done, (uint64_t)OX_ZEROES_SIZE);

			iov[count].iov_base = (void *)(uintptr_t)ox_zeroes;
			iov[count].iov_len = piece;
			done += piece;
		}
		put = pwritev(fd, iov, count, (off_t)at);
		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return put < 0 ? -errno : -ENOSPC;
		at += (uint64_t)put;
		if (progress)
			progress(arg, at - from, to - from);
	}
	return fsync(fd) < 0 ? -errno : 0;
}

/* Gives [from, to) space. */
static int preallocate(struct ox_file *file, uint64_t from, uint64_t to,
                       enum ox_preallocation prealloc, progress_fn *progress, void *arg)
{
	OX_CLOSE int buffered = -1;
	int fd = file->fd;
	int ret;

	if (prealloc == OX_PREALLOC_FALLOC) {
		do
			ret = fallocate(fd, 0, (off_t)from, (off_t)(to - from));
		while (ret < 0 && errno == EINTR);
		if (ret == 0 && progress)
			progress(arg, to - from, to - from);
		if (ret == 0)
			return 0;
		if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
			return -errno;
	}
	if (file->direct) {
		buffered = ox_file_reopen_buffered(file);
		if (buffered < 0)
			return buffered;
		fd = buffered;
	}
	ret = write_zeroes(fd, from, to, progress, arg);
	if (ret == 0 && file->direct)
		posix_fadvise(fd, (off_t)from, (off_t)(to - from), POSIX_FADV_DONTNEED);
	return ret;
}

static int set_size(int fd, uint64_t size)
{
	int ret;

	do
		ret = ftruncate(fd, (off_t)size);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : 0;
}

static int check_device(struct ox_store *store, uint64_t now, uint64_t size, struct ox_error *err)
{
	char have[32], want[32];

	if (size <= now)
		return 0;
	return ox_error_set(err, ENOSPC,
	                    "%s: the device has %s, and %s are needed; enlarge the device first",
	                    store->path, ox_format_size(now, have, sizeof(have)),
	                    ox_format_size(size, want, sizeof(want)));
}

int ox_file_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                     progress_fn *progress, void *arg, struct ox_error *err)
{
	struct ox_file *file = store->priv;
	uint64_t old;
	int ret = ox_file_ask_size(file, &old);

	if (ret == 0 && file->block)
		return check_device(store, old, size, err);
	if (ret == 0)
		ret = set_size(file->fd, size);
	if (ret == 0 && size > old && prealloc != OX_PREALLOC_OFF) {
		ret = preallocate(file, old, size, prealloc, progress, arg);
		if (ret < 0 && set_size(file->fd, old) < 0)
			ox_error_set(
			        err, -ret,
			        "%s: preallocation failed (%s), and the file's size could not be "
			        "restored to %llu bytes",
			        store->path, strerror(-ret), (unsigned long long)old);
	}
	if (ret < 0)
		return ox_error_set(err, -ret, "%s: cannot be resized to %llu bytes: %s",
		                    store->path, (unsigned long long)size, strerror(-ret));
	return 0;
}

int ox_file_status(struct ox_store *store, uint64_t offset, uint64_t *length,
                   enum ox_block_status *status)
{
	const struct ox_file *file = store->priv;
	off_t data, hole;

	*status = OX_STATUS_DATA;
	if (file->block)
		return 0;
	data = lseek(file->fd, (off_t)offset, SEEK_DATA);
	if (data < 0) {
		/* ENXIO: nothing but a hole up to the end. Anything else: not known. */
		if (errno == ENXIO)
			*status = OX_STATUS_ZERO;
		return 0;
	}
	if (data > (off_t)offset) {
		*status = OX_STATUS_ZERO;
		*length = ox_min(*length, (uint64_t)data - offset);
		return 0;
	}
	hole = lseek(file->fd, (off_t)offset, SEEK_HOLE);
	if (hole > (off_t)offset)
		*length = ox_min(*length, (uint64_t)hole - offset);
	return 0;
}
