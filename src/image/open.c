/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Opening, closing and asking images: the control path of the image layer.
 *
 * Everything here may block and is called without requests in flight on what it changes: in a
 * worker, or before the loops run.
 */
#include "image/generic.h"
#include "base/text.h"
#include "image/crypto.h"
#include <errno.h>
#include <jansson.h>
#include <string.h>
#include <sys/stat.h>

#define PROBE_BYTES 512u

static const struct ox_format_ops *const drivers[] = {
        &ox_format_raw,
        &ox_format_luks,
        &ox_format_qed,
        &ox_format_qcow2,
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
	return ox_error_set(
	        err, EINVAL,
	        "%s: there is no format '%s'; this version has raw, qcow2, qed and luks", path,
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

struct load {
	struct ox_image *image;
	struct ox_error *err;
	int result;
};

static void load_co(struct ox_loop *loop, void *arg)
{
	struct load *load = arg;
	struct ox_image *image = load->image;
	struct ox_image_channel channel = {.image = image, .loop = loop};

	load->result = ox_store_attach(image->store, loop, &channel.store, load->err);
	if (load->result < 0)
		return;
	load->result = image->ops->open_co(&channel, &image->options, load->err);
	ox_image_wait_background_co(&channel);
	ox_store_detach(channel.store);
}

/* Lets the format read what it needs to know, on a loop that is only there for that. */
static int load(struct ox_image *image, struct ox_error *err)
{
	struct load load = {.image = image, .err = err};
	int rc;

	image->data = image->store;
	rc = ox_image_run_private(load_co, &load, err);
	if (rc == 0)
		rc = load.result;
	if (rc < 0)
		return rc;
	if (!ox_is_power_of_2(image->cluster_size) || !ox_is_power_of_2(image->zero_unit))
		return ox_error_set(err, EINVAL, "%s: its clusters are of no power of two bytes",
		                    image->store->path);
	image->begun = !image->ops->begin_co;
	return 0;
}

static void free_image(struct ox_image *image)
{
	ox_image_close(image->backing);
	if (image->ops)
		image->ops->close(image);
	if (image->data != image->store)
		ox_store_close(image->data);
	ox_store_close(image->store);
	ox_crypto_free(image->crypto);
	ox_image_generic_free(image->generic);
	free(image->backing_file);
	free(image->backing_format);
	free(image->data_file);
	free(image);
}

/* The caller's strings may go once the image is open. */
static void keep_options(struct ox_image *image, const struct ox_image_options *options)
{
	struct ox_image_generic *generic = image->generic;
	struct ox_image_options *kept = &image->options;
	size_t count = 0;

	*kept = *options;
	kept->format = generic->format = options->format ? ox_xstrdup(options->format) : NULL;
	kept->key_secret = generic->key_secret =
	        options->key_secret ? ox_xstrdup(options->key_secret) : NULL;
	while (options->allow.dirs && options->allow.dirs[count])
		count++;
	generic->dirs = ox_xcalloc(count + 1, sizeof(*generic->dirs));
	for (size_t i = 0; i < count; i++)
		generic->dirs[i] = ox_xstrdup(options->allow.dirs[i]);
	kept->allow.dirs = (const char *const *)generic->dirs;
}

int ox_image_open_link(const char *path, const struct ox_image_options *options,
                       const struct ox_image_link *above, struct ox_image **out,
                       struct ox_error *err)
{
	struct ox_image *image;
	int rc;

	*out = NULL;
	/* A wrong word needs no look at the file. */
	if (options->format && !ox_format_find(options->format))
		return no_driver(path, options->format, err);
	image = ox_xcalloc(1, sizeof(*image));
	image->generic = ox_image_generic_new();
	image->read_only = options->store.read_only;
	keep_options(image, options);
	rc = ox_store_open(path, &options->store, &image->store, err);
	image->data = image->store;
	if (rc == 0)
		rc = choose_format(image, path, options, err);
	if (rc == 0)
		rc = load(image, err);
	if (rc == 0)
		rc = ox_image_open_named(image, above, err);
	if (rc < 0) {
		free_image(image);
		return rc;
	}
	*out = image;
	return 0;
}

int ox_image_open(const char *path, const struct ox_image_options *options, struct ox_image **image,
                  struct ox_error *err)
{
	return ox_image_open_link(path, options, NULL, image, err);
}

void ox_image_close(struct ox_image *image)
{
	if (!image)
		return;
	free_image(image);
}

const char *ox_image_format_name(const struct ox_image *image)
{
	return image->ops->name;
}

void ox_image_get_limits(const struct ox_image *image, struct ox_store_limits *limits)
{
	*limits = image->data->limits;
	if (image->ops->zero_co || image->ops->discard_co) {
		/* The map does it, whatever the store can: by clusters, of any number. */
		limits->can_discard = !image->read_only && image->ops->discard_co;
		limits->can_secure_erase = false;
		limits->discard_granularity = (uint32_t)image->cluster_size;
		limits->max_discard = limits->max_zero = 0;
		/* An image is moved from host to host, with sectors that stay the same. */
		limits->logical_block_size = 512;
	} else if (image->crypto) {
		/* What a discard leaves would be deciphered to noise. */
		limits->can_discard = false;
	}
}

/* What the file takes on its file system; a device, or a store without a file, takes nothing. */
uint64_t ox_image_allocated_bytes(const struct ox_store *store)
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
	const struct ox_format_maintenance *m = image->ops->maintenance;
	int rc;

	*info = (struct ox_image_info){
	        .format = image->ops->name,
	        .virtual_size = ox_image_size_now(image),
	        .actual_size = ox_image_allocated_bytes(image->store),
	        .cluster_size = image->cluster_size > 1 ? (uint32_t)image->cluster_size : 0,
	        .encrypted = image->crypto != NULL,
	};
	if (image->backing_file) {
		info->backing_file = ox_xstrdup(image->backing_file);
		info->full_backing_file =
		        ox_image_resolve_name(image->store->path, image->backing_file);
	}
	if (image->backing_format)
		info->backing_format = ox_xstrdup(image->backing_format);
	rc = m && m->info ? m->info(image, info, err) : 0;
	if (rc < 0)
		ox_image_info_free(info);
	return rc;
}

void ox_image_info_free(struct ox_image_info *info)
{
	free(info->backing_file);
	free(info->full_backing_file);
	free(info->backing_format);
	json_decref(info->snapshots);
	json_decref(info->format_specific);
	*info = (struct ox_image_info){.format = NULL};
}
