/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Opening, closing and asking images: the control path of the image layer.
 *
 * Everything here may block and is called without requests in flight on what it changes: in a
 * worker, or before the loops run.
 */
#include "image/image.h"
#include "base/text.h"
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#define PROBE_BYTES 512u

static const struct ox_format_ops *const drivers[] = {
        &ox_format_raw,
};

const struct ox_format_ops *ox_format_find(const char *name)
{
	for (size_t i = 0; i < OX_ARRAY_SIZE(drivers); i++) {
		if (strcmp(drivers[i]->name, name) == 0)
			return drivers[i];
	}
	return NULL;
}

/* There is no driver of that name. */
static int no_driver(const char *path, const char *name, struct ox_error *err)
{
	const char *near;

	for (const char *const *known = ox_format_names(); *known; known++) {
		if (strcmp(*known, name) == 0)
			return ox_error_set(err, ENOTSUP,
			                    "%s: format %s is recognised and not supported by this "
			                    "version",
			                    path, name);
	}
	near = ox_nearest_word(name, ox_format_names());
	if (near)
		return ox_error_set(err, EINVAL, "%s: there is no format '%s'; did you mean %s?",
		                    path, name, near);
	return ox_error_set(err, EINVAL, "%s: there is no format '%s'; this version has raw", path,
	                    name);
}

static int choose_format(struct ox_image *image, const char *path,
                         const struct ox_image_options *options, struct ox_error *err)
{
	uint8_t head[PROBE_BYTES] = {0};
	const char *name;
	int rc;

	if (options->format) {
		image->ops = ox_format_find(options->format);
		return image->ops ? 0 : no_driver(path, options->format, err);
	}
	rc = ox_store_pread(image->store, 0, head, sizeof(head));
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read its first sector: %s", path,
		                    strerror(-rc));
	name = ox_image_guess_format(head, sizeof(head), path);
	image->ops = ox_format_find(name);
	if (!image->ops)
		return ox_error_set(
		        err, ENOTSUP,
		        "%s: format %s is recognised and not supported by this "
		        "version (if it is a raw disk all the same, say so with -f raw)",
		        path, name);
	image->guard_first_sector = image->ops == &ox_format_raw && !image->read_only;
	return 0;
}

int ox_image_open(const char *path, const struct ox_image_options *options, struct ox_image **out,
                  struct ox_error *err)
{
	struct ox_image *image;
	int rc;

	/* A wrong word needs no look at the file. */
	if (options->format && !ox_format_find(options->format))
		return no_driver(path, options->format, err);
	image = ox_xcalloc(1, sizeof(*image));
	image->read_only = options->store.read_only;
	rc = ox_store_open(path, &options->store, &image->store, err);
	if (rc < 0)
		goto fail;
	rc = choose_format(image, path, options, err);
	if (rc < 0)
		goto fail;
	rc = image->ops->open(image, err);
	if (rc < 0)
		goto fail;
	*out = image;
	return 0;
fail:
	ox_store_close(image->store);
	free(image);
	return rc;
}

void ox_image_close(struct ox_image *image)
{
	if (!image)
		return;
	image->ops->close(image);
	ox_store_close(image->store);
	free(image);
}

/* What the file takes on its file system; a device, or a store without a file, takes nothing. */
static uint64_t allocated_bytes(const struct ox_store *store)
{
	const char *path = store->path;
	struct stat st;

	if (strncmp(path, "file:", 5) == 0)
		path += 5;
	if (stat(path, &st) < 0 || !S_ISREG(st.st_mode) || st.st_ino != store->ino ||
	    st.st_dev != store->dev)
		return 0;
	return (uint64_t)st.st_blocks * 512;
}

int ox_image_get_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err)
{
	*info = (struct ox_image_info){
	        .format = image->ops->name,
	        .virtual_size = __atomic_load_n(&image->size, __ATOMIC_RELAXED),
	        .actual_size = allocated_bytes(image->store),
	};
	return 0;
}

int ox_image_resize(struct ox_image *image, uint64_t size, enum ox_preallocation prealloc,
                    struct ox_error *err)
{
	int rc;

	if (image->read_only)
		return ox_error_set(err, EROFS, "%s: opened read-only, its size stays",
		                    image->store->path);
	if (!image->ops->resize)
		return ox_error_set(err, ENOTSUP, "%s: %s images cannot be resized by this version",
		                    image->store->path, image->ops->name);
	if (!ox_is_aligned(size, 512) || size > INT64_MAX)
		return ox_error_set(err, EINVAL,
		                    "%s: a disk's size is a multiple of 512 bytes, %llu is not",
		                    image->store->path, (unsigned long long)size);
	rc = image->ops->resize(image, size, prealloc, err);
	if (rc < 0)
		return rc;
	__atomic_store_n(&image->size, size, __ATOMIC_RELAXED);
	return 0;
}
