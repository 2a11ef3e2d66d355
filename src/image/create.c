/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Making a new image.
 *
 * Order, so that nobody's data is lost by a slip: the file is opened without truncation, the
 * write lock is taken (a running guest's disk is refused here), and only then is the old content
 * dropped.  A file that this call made is removed when a later step fails; one that was there
 * before stays, whatever it holds by then.  A block device keeps its size: it must be large
 * enough, and its content stays as it is.
 */
#include "image/image.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

/* The path behind "file:"; NULL for a store that has no file ("memory:1G"). */
static const char *file_path(const char *name)
{
	const char *colon = strchr(name, ':');
	const char *slash = strchr(name, '/');
	struct stat st;

	if (strncmp(name, "file:", 5) == 0)
		return name + 5;
	if (!colon || (slash && slash < colon) || stat(name, &st) == 0)
		return name;
	for (const char *const *scheme = (const char *const[]){"null:", "memory:", "faulty:", NULL};
	     *scheme; scheme++) {
		if (strncmp(name, *scheme, strlen(*scheme)) == 0)
			return NULL;
	}
	return name;
}

/* Makes the file unless it is there; *made says which.  The store opens it then. */
static int make_file(struct ox_opener *opener, const char *path, bool *made, struct ox_error *err)
{
	struct stat st;
	int fd = ox_open(opener, path, O_RDWR | O_CREAT | O_EXCL | O_NOCTTY, 0644);

	*made = fd >= 0;
	if (fd >= 0) {
		close(fd);
		return 0;
	}
	if (fd != -EEXIST)
		return ox_error_set(err, -fd, "%s: cannot create it: %s", path, strerror(-fd));
	if (stat(path, &st) < 0)
		return ox_error_set(err, errno, "%s: a link that leads nowhere: %s", path,
		                    strerror(errno));
	if (S_ISDIR(st.st_mode))
		return ox_error_set(err, EISDIR, "%s: is a directory", path);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return ox_error_set(err, EINVAL, "%s: is neither a file nor a block device", path);
	return 0;
}

static int fill_store(struct ox_store *store, const struct ox_format_ops *ops,
                      const struct ox_image_create_options *options, bool device,
                      struct ox_error *err)
{
	int rc;

	if (device) {
		if (options->size > store->size)
			return ox_error_set(err, ENOSPC,
			                    "%s: the device has %llu bytes, %llu are asked for",
			                    options->path, (unsigned long long)store->size,
			                    (unsigned long long)options->size);
		return 0;
	}
	if (store->size > 0) {
		rc = ox_store_truncate(store, 0, OX_PREALLOC_OFF, NULL, NULL, err);
		if (rc < 0)
			return rc;
	}
	return ops->create(store, options, err);
}

int ox_image_create(const struct ox_image_create_options *options, struct ox_error *err)
{
	const struct ox_format_ops *ops = ox_format_find(options->format ? options->format : "raw");
	struct ox_opener *opener = options->opener ? options->opener : &ox_opener_direct;
	const char *path = file_path(options->path);
	struct ox_store_options store_options = {
	        .aio = OX_AIO_SYNC,
	        .lock = OX_LOCK_WRITE,
	        .write_granularity = 1,
	        .opener = opener,
	};
	struct ox_store *store = NULL;
	struct stat st;
	bool made = false, device = false;
	int rc;

	if (!ops || !ops->create)
		return ox_error_set(err, ENOTSUP, "%s: this version cannot create %s images",
		                    options->path, options->format);
	if (options->size > INT64_MAX - 511)
		return ox_error_set(err, EFBIG, "%s: the size is too large", options->path);
	if (path) {
		rc = make_file(opener, path, &made, err);
		if (rc < 0)
			return rc;
		device = stat(path, &st) == 0 && S_ISBLK(st.st_mode);
	}
	rc = ox_store_open(options->path, &store_options, &store, err);
	if (rc == 0)
		rc = fill_store(store, ops, options, device, err);
	/* Removed while the lock is held, so that it is still ours. */
	if (rc < 0 && made)
		unlink(path);
	ox_store_close(store);
	return rc;
}
