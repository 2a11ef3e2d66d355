/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The files that an image's header names: backing files and data files.
 *
 * An image may come from a stranger, and its header can name any file of the host: a guest that
 * then reads its disk reads that file.  So a named file is opened only if it lies, all links
 * followed, below the directory of the image that names it or below one that the user allowed;
 * names that QEMU would take for a protocol or for JSON are refused, and so are our own test
 * stores.  What the user said himself (allow.anything) is not questioned.
 *
 * The check and the opening are two steps: whoever can replace directories between them can write
 * to an allowed directory already, and could put the file's content there.
 */
#include "image/generic.h"
#include <assert.h>
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

/* Where the directory part of a path ends: behind its last slash, or behind the stores that wrap
 * another ("faulty:RULES:"). */
static size_t directory_length(const char *path)
{
	const char *start = path;
	const char *slash;

	while (strncmp(start, "faulty:", 7) == 0 && strchr(start + 7, ':'))
		start = strchr(start + 7, ':') + 1;
	if (strncmp(start, "file:", 5) == 0)
		start += 5;
	slash = strrchr(start, '/');
	return (size_t)(slash ? slash + 1 - path : start - path);
}

/* The path alone, without the stores that wrap it. */
static const char *bare_path(const char *path)
{
	const char *colon;

	while (strncmp(path, "faulty:", 7) == 0 && (colon = strchr(path + 7, ':')))
		path = colon + 1;
	return strncmp(path, "file:", 5) == 0 ? path + 5 : path;
}

/* A colon before the first slash, as QEMU sees it. */
static bool has_scheme(const char *name)
{
	size_t length = strcspn(name, ":/");

	return name[length] == ':';
}

static bool is_test_store(const char *name)
{
	return strncmp(name, "faulty:", 7) == 0 || strncmp(name, "memory:", 7) == 0;
}

char *ox_image_resolve_name(const char *path, const char *name)
{
	if (is_test_store(name))
		return ox_xstrdup(name);
	if (strncmp(name, "file:", 5) == 0)
		name += 5;
	if (name[0] == '/')
		return ox_xstrdup(name);
	return ox_xasprintf("%.*s%s", (int)directory_length(path), path, name);
}

/* Does `path` lie below `dir`?  Both are results of realpath(). */
static bool is_below(const char *path, const char *dir)
{
	size_t length = strlen(dir);

	while (length > 0 && dir[length - 1] == '/')
		length--;
	return strncmp(path, dir, length) == 0 && path[length] == '/';
}

/* The directory of the image itself.  A device has none: all of a host's devices are its
 * neighbours. */
static char *own_directory(const char *image_path)
{
	OX_FREE char *dir = NULL;
	struct stat st;

	if (stat(bare_path(image_path), &st) < 0 || !S_ISREG(st.st_mode))
		return NULL;
	dir = ox_xasprintf("%s", bare_path(image_path));
	return realpath(dirname(dir), NULL);
}

static bool is_allowed(const struct ox_allow *allow, const char *image_path, const char *real)
{
	OX_FREE char *own = own_directory(image_path);

	if (own && is_below(real, own))
		return true;
	for (const char *const *dir = allow->dirs; dir && *dir; dir++) {
		OX_FREE char *real_dir = realpath(*dir, NULL);

		if (real_dir && is_below(real, real_dir))
			return true;
	}
	return false;
}

static int check_name(const char *image_path, const char *name, struct ox_error *err)
{
	const char *plain = strncmp(name, "file:", 5) == 0 ? name + 5 : name;

	if (strncmp(name, "json:", 5) == 0)
		return ox_error_set(err, EACCES,
		                    "%s: its header names a file by a \"json:\" text, which is "
		                    "refused; give it a plain file name (qemu-img rebase -u -b "
		                    "FILE -F FORMAT)",
		                    image_path);
	if (plain == name && has_scheme(name))
		return ox_error_set(err, EACCES,
		                    "%s: its header names '%s', which is not a file but an "
		                    "address or a device of another kind; that is refused",
		                    image_path, name);
	if (!*plain)
		return ox_error_set(err, EINVAL, "%s: its header names a file without a name",
		                    image_path);
	return 0;
}

int ox_image_allowed_name(const struct ox_allow *allow, const char *image_path, const char *name,
                          char **path, struct ox_error *err)
{
	OX_FREE char *resolved = NULL;
	OX_FREE char *real = NULL;
	int rc;

	*path = NULL;
	if (!(allow->anything && is_test_store(name))) {
		rc = check_name(image_path, name, err);
		if (rc < 0)
			return rc;
	}
	resolved = ox_image_resolve_name(image_path, name);
	if (!allow->anything) {
		real = realpath(bare_path(resolved), NULL);
		if (!real)
			return ox_error_set(err, errno, "%s: its header names %s: %s", image_path,
			                    resolved, strerror(errno));
		if (!is_allowed(allow, image_path, real))
			return ox_error_set(err, EACCES,
			                    "%s: its header names %s, which lies outside the "
			                    "directories that may be used; if that is right, add "
			                    "--allow-dir %s",
			                    image_path, resolved, dirname(real));
	}
	*path = ox_steal_ptr(resolved);
	return 0;
}

/* --- opening ------------------------------------------------------------------------------------
 */

static bool is_same(const struct ox_store *store, uint64_t dev, uint64_t ino)
{
	return (store->dev || store->ino) && store->dev == dev && store->ino == ino;
}

/* Is it one of the files that led to it?  Asked before it is opened, since the lock that it would
 * wait for would be our own. */
static int check_loop(const struct ox_image_link *above, const char *path, struct ox_error *err)
{
	struct stat st;
	uint64_t dev, ino;

	if (above->depth + 1 >= OX_CHAIN_MAX)
		return ox_error_set(err, ELOOP, "%s: the chain of images is longer than %u",
		                    above->image->store->path, OX_CHAIN_MAX);
	if (stat(bare_path(path), &st) < 0)
		return 0; /* opening it will say */
	/* As the stores name files and devices. */
	dev = S_ISBLK(st.st_mode) ? st.st_rdev : st.st_dev;
	ino = S_ISBLK(st.st_mode) ? 0 : st.st_ino;
	for (const struct ox_image_link *link = above; link; link = link->above) {
		if (is_same(link->image->store, dev, ino) ||
		    (link->image->data != link->image->store &&
		     is_same(link->image->data, dev, ino)))
			return ox_error_set(
			        err, ELOOP, "%s: its header names %s, which leads back to %s",
			        above->image->store->path, path, link->image->store->path);
	}
	return 0;
}

static int named_path(const struct ox_image_link *self, const char *name, char **path,
                      struct ox_error *err)
{
	const struct ox_image *image = self->image;
	int rc;

	rc = ox_image_allowed_name(&image->options.allow, image->store->path, name, path, err);
	if (rc < 0)
		return rc;
	assert(*path);
	return check_loop(self, *path, err);
}

static int open_data_file(struct ox_image *image, const struct ox_image_link *self,
                          struct ox_error *err)
{
	OX_FREE char *path = NULL;
	struct ox_store *data;
	int rc = named_path(self, image->data_file, &path, err);

	if (rc == 0)
		rc = ox_store_open(path, &image->options.store, &data, err);
	if (rc == 0)
		image->data = data;
	return rc;
}

static void fail_io(struct ox_channel *channel, struct ox_io *io)
{
	ox_io_finish(io, -EIO);
}

/* A data file that stays closed is as large as can be, so that the map is what it is, and whatever
 * is asked of it fails: it reads neither as zeroes nor as what stands in the image. */
static int do_without_data_file(struct ox_image *image, struct ox_error *err)
{
	const struct ox_store_options options = {.read_only = true, .aio = OX_AIO_SYNC};
	struct ox_store_ops *closed = &image->generic->closed;
	struct ox_store *none;
	int rc = ox_store_open("null:4E", &options, &none, err);

	if (rc < 0)
		return rc;
	*closed = *none->ops;
	closed->read = closed->write = closed->zero = closed->discard = fail_io;
	none->ops = closed;
	image->generic->no_data = true;
	image->data = none;
	return 0;
}

static int open_backing_file(struct ox_image *image, const struct ox_image_link *self,
                             struct ox_error *err)
{
	struct ox_image_options options = image->options;
	OX_FREE char *path = NULL;
	int rc = named_path(self, image->backing_file, &path, err);

	if (rc < 0)
		return rc;
	options.format = image->backing_format;
	options.store.read_only = true;
	if (options.store.lock != OX_LOCK_NONE)
		options.store.lock = OX_LOCK_READ;
	return ox_image_open_link(path, &options, self, &image->backing, err);
}

int ox_image_open_named(struct ox_image *image, const struct ox_image_link *above,
                        struct ox_error *err)
{
	const struct ox_image_link self = {
	        .above = above, .image = image, .depth = above ? above->depth + 1 : 0};
	bool closed = image->options.allow.nothing || image->options.for_check;
	int rc = 0;

	if (image->data_file)
		rc = closed ? do_without_data_file(image, err) : open_data_file(image, &self, err);
	if (rc == 0 && image->backing_file && !closed)
		rc = open_backing_file(image, &self, err);
	return rc;
}
