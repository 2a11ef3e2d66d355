/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Another size, and the checks that go with it.
 *
 * Order: the caller publishes a larger size to its users when this has returned, and the added
 * range reads as zero by then; a smaller one it publishes before, and waits for what is in flight
 * beyond it.
 */
#include "image/generic.h"
#include <errno.h>
#include <string.h>

int ox_image_hide_backing_co(struct ox_image_channel *channel, uint64_t old, uint64_t size)
{
	uint64_t end;
	int rc;

	if (!channel->backing)
		return 0;
	end = ox_min(size, ox_image_size_now(channel->backing->image));
	if (end <= old)
		return 0;
	rc = ox_image_clear_co(channel, OX_IO_ZERO, old, end - old, OX_IO_MAY_UNMAP);
	return rc < 0 ? rc : ox_image_commit_co(channel);
}

int ox_image_resize_co(struct ox_image_channel *channel, uint64_t size,
                       enum ox_preallocation prealloc, struct ox_error *err)
{
	struct ox_image *image = channel->image;
	const struct ox_format_maintenance *m = image->ops->maintenance;
	uint64_t old = ox_image_size_now(image);
	int rc;

	if (image->read_only)
		return ox_error_set(err, EROFS, "%s: opened read-only, its size stays",
		                    image->store->path);
	if (!m || !m->resize_co)
		return ox_error_set(err, ENOTSUP, "%s: %s images cannot be resized by this version",
		                    image->store->path, image->ops->name);
	if (!ox_is_aligned(size, 512) || size > INT64_MAX)
		return ox_error_set(err, EINVAL,
		                    "%s: a disk's size is a multiple of 512 bytes, %llu is not",
		                    image->store->path, (unsigned long long)size);
	rc = ox_image_begin_co(channel);
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot be changed: %s", image->store->path,
		                    strerror(-rc));
	if (image->backing_file && !image->backing && size > ox_image_size_now(image))
		return ox_error_set(err, EIO,
		                    "%s: it cannot grow while its backing file is not open",
		                    image->store->path);
	rc = m->resize_co(channel, size, prealloc, err);
	if (rc < 0) {
		__atomic_store_n(&image->size, old, __ATOMIC_RELEASE);
		return ox_error_set(err, -rc, "%s: its size cannot be changed: %s",
		                    image->store->path, strerror(-rc));
	}
	/* The disk above publishes it to the guest only when this has returned. */
	__atomic_store_n(&image->size, size, __ATOMIC_RELEASE);
	return 0;
}

int ox_image_check_co(struct ox_image_channel *channel, struct ox_image_check *check,
                      struct ox_error *err)
{
	struct ox_image *image = channel->image;
	const struct ox_format_maintenance *m = image->ops->maintenance;

	if (!m || !m->check_co)
		return ox_error_set(err, ENOTSUP, "%s: %s images do not support checks",
		                    image->store->path, image->ops->name);
	return m->check_co(channel, check, err);
}
