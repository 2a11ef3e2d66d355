/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * luks: a LUKS volume, version 1, in a file or on a device.  Header and key material are in front,
 * then the guest's disk, encrypted sector by sector.
 *
 * The map is the identity, moved by the payload's offset and known without looking; the generic
 * layer encrypts, with IVs that count the guest's sectors.  A zero on the store is not a zero to
 * the guest: zeroes are written through the cipher, and discards do nothing, as anything else would
 * show where the disk is empty (QEMU and cryptsetup ignore them too unless told otherwise).
 *
 * Creation: the file gets its size first and its header last, so that an image that opens is whole.
 */
#include "image/crypto_private.h"
#include "base/iov.h"
#include "image/format.h"
#include <assert.h>
#include <errno.h>
#include <jansson.h>
#include <string.h>

#define PAYLOAD_ALIGN (UINT64_C(1) << 20)

struct luks_image {
	struct ox_luks luks;
	uint64_t payload; /* bytes */
};

static int luks_probe(const void *head, size_t bytes, const char *path)
{
	return bytes >= 8 && memcmp(head, "LUKS\xba\xbe", 6) == 0 ? 100 : 0;
}

/* --- opening ---------------------------------------------------------------------------------- */

struct unlock_call {
	struct ox_image *image;
	const uint8_t *phrase;
	size_t phrase_bytes;
	struct ox_error *err;
};

static int read_store(void *arg, uint64_t offset, void *buf, size_t bytes)
{
	return ox_store_pread(arg, offset, buf, bytes);
}

static int unlock_in_worker(void *arg)
{
	struct unlock_call *call = arg;
	struct luks_image *li = call->image->priv;

	return ox_luks_unlock(&li->luks, call->phrase, call->phrase_bytes, read_store,
	                      call->image->store, call->image->store->path, &call->image->crypto,
	                      call->err);
}

/* Without a secret an image opens for info: reading it is refused (luks_lookup). */
static int unlock_co(struct ox_image *image, const struct ox_image_options *options,
                     struct ox_error *err)
{
	struct unlock_call call = {.image = image, .err = err};
	int rc;

	if (!options->key_secret && options->allow.nothing)
		return 0;
	if (!options->key_secret)
		return ox_error_set(err, EACCES,
		                    "%s: it is encrypted; give its pass phrase with --object "
		                    "secret,id=sec0,file=PATH and --key-secret sec0",
		                    image->store->path);
	rc = ox_secrets_find(options->secrets, options->key_secret, &call.phrase,
	                     &call.phrase_bytes, err);
	return rc < 0 ? rc : ox_worker_call_co(unlock_in_worker, &call);
}

static int luks_open_co(struct ox_image_channel *channel, const struct ox_image_options *options,
                        struct ox_error *err)
{
	struct ox_image *image = channel->image;
	const char *path = image->store->path;
	uint64_t bytes = __atomic_load_n(&image->store->size, __ATOMIC_RELAXED);
	uint8_t header[OX_LUKS_HEADER_BYTES] = {0};
	struct luks_image *li;
	int rc = ox_store_read_co(channel->store, 0, header, ox_min(bytes, sizeof(header)));

	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read its header: %s", path,
		                    strerror(-rc));
	li = ox_xcalloc(1, sizeof(*li));
	image->priv = li;
	rc = ox_luks_parse(header, ox_min(bytes, sizeof(header)), bytes, path, &li->luks, err);
	if (rc < 0)
		return rc;
	li->payload = (uint64_t)li->luks.payload_offset * OX_CRYPTO_SECTOR;
	if (bytes < li->payload || bytes > INT64_MAX)
		return ox_error_set(err, EINVAL,
		                    "%s: it has %llu bytes, and its LUKS header says that the data "
		                    "begins at %llu",
		                    path, (unsigned long long)bytes,
		                    (unsigned long long)li->payload);
	image->cluster_size = image->zero_unit = OX_CRYPTO_SECTOR;
	image->crypto_guest_offset = true;
	__atomic_store_n(&image->size, ox_align_down(bytes - li->payload, OX_CRYPTO_SECTOR),
	                 __ATOMIC_RELEASE);
	return unlock_co(image, options, err);
}

static void luks_close(struct ox_image *image)
{
	free(image->priv);
}

/* --- the map ---------------------------------------------------------------------------------- */

static int luks_lookup(struct ox_image *image, uint64_t offset, uint64_t length,
                       struct ox_extent *extent)
{
	const struct luks_image *li = image->priv;

	if (ox_unlikely(!image->crypto))
		return -EACCES;
	extent->kind = OX_EXTENT_DATA;
	extent->flags = OX_EXTENT_IN_PLACE;
	extent->length = length;
	extent->store_offset = li->payload + offset;
	return 0;
}

static int luks_zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                        bool unmap)
{
	return -ENOTSUP;
}

static int luks_discard_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	return 0;
}

/* --- maintenance ------------------------------------------------------------------------------ */

static int luks_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err)
{
	const struct luks_image *li = image->priv;

	info->encrypted = true;
	info->cluster_size = 0;
	info->format_specific =
	        json_pack("{s:s, s:o}", "type", "luks", "data", ox_luks_info(&li->luks));
	return 0;
}

struct resize_call {
	struct ox_image *image;
	uint64_t size; /* of the store */
	enum ox_preallocation prealloc;
	struct ox_error *err;
};

/* A device was resized outside and is asked anew; what it does not have, the store words. */
static int resize_in_worker(void *arg)
{
	struct resize_call *call = arg;
	struct ox_store *store = call->image->store;
	uint64_t now;
	int rc = ox_store_refresh_size(store, &now);

	if (rc < 0)
		return ox_error_set(call->err, -rc, "%s: cannot ask for its size: %s", store->path,
		                    strerror(-rc));
	if (now == call->size)
		return 0;
	return ox_store_truncate(store, call->size, call->prealloc, NULL, NULL, call->err);
}

static int luks_resize_co(struct ox_image_channel *channel, uint64_t size,
                          enum ox_preallocation prealloc, struct ox_error *err)
{
	const struct luks_image *li = channel->image->priv;
	struct resize_call call = {.image = channel->image,
	                           .size = li->payload + size,
	                           .prealloc = prealloc,
	                           .err = err};

	if (size > INT64_MAX - li->payload)
		return ox_error_set(err, EFBIG, "%s: the size is too large",
		                    channel->image->store->path);
	return ox_worker_call_co(resize_in_worker, &call);
}

/* --- creation --------------------------------------------------------------------------------- */

static const struct ox_create_word luks_create_words[] = {
        {"cipher-alg", "Name of encryption cipher algorithm", NULL},
        {"cipher-mode", "Name of encryption cipher mode", NULL},
        {"hash-alg", "Name of encryption hash algorithm", NULL},
        {"iter-time", "Time to spend in PBKDF in milliseconds", "num"},
        {"ivgen-alg", "Name of IV generator algorithm", NULL},
        {"ivgen-hash-alg", "Name of IV generator hash algorithm", NULL},
        {"key-secret", "ID of the secret that provides the keyslot passphrase", NULL},
        {"preallocation", "Preallocation mode (allowed values: off, falloc, full)", NULL},
        {"size", "Virtual disk size", "size"},
        {NULL, NULL, NULL},
};

static int parse_prealloc(const struct ox_image_create_options *options,
                          enum ox_preallocation *prealloc, struct ox_error *err)
{
	const char *word = ox_create_option(options, "preallocation");

	*prealloc = OX_PREALLOC_OFF;
	if (word && !ox_preallocation_parse(word, prealloc))
		return ox_error_set(err, EINVAL, "preallocation is off, falloc or full, not '%s'",
		                    word);
	return 0;
}

/* What creating goes by, from the options. */
struct create {
	const struct ox_image_create_options *options;
	struct ox_luks_create luks;
	const char *key_secret;
	const uint8_t *phrase;
	size_t phrase_bytes;
	enum ox_preallocation prealloc;
	uint64_t payload;
	struct ox_store *store;
	uint8_t *header;  /* `payload` bytes */
	uint64_t written; /* how many of them must be: a new file's are zero already */
	struct ox_error *err;
};

static int read_options(const struct ox_image_create_options *options, struct create *c,
                        struct ox_error *err)
{
	int rc;

	*c = (struct create){.options = options, .err = err};
	if (options->backing_file)
		return ox_error_set(err, EINVAL,
		                    "%s: a luks image has no backing file; a qcow2 image with "
		                    "encrypt.format=luks has",
		                    options->path);
	rc = parse_prealloc(options, &c->prealloc, err);
	if (rc == 0)
		rc = ox_luks_create_options(options, "", &c->luks, &c->key_secret, err);
	if (rc < 0)
		return rc;
	c->luks.alignment = PAYLOAD_ALIGN;
	rc = ox_luks_area(&c->luks, &c->payload, err);
	if (rc < 0)
		return rc;
	if (options->size > INT64_MAX - c->payload - OX_CRYPTO_SECTOR)
		return ox_error_set(err, EFBIG, "%s: the size is too large", options->path);
	return ox_secrets_find(options->secrets, c->key_secret, &c->phrase, &c->phrase_bytes, err);
}

/* qemu-img prints what was given, in this order. */
static int luks_create_resolve(struct ox_image_create_options *options, struct ox_error *err)
{
	static const char *const order[] = {"key-secret", "cipher-alg",     "cipher-mode",
	                                    "ivgen-alg",  "ivgen-hash-alg", "hash-alg",
	                                    "iter-time",  "preallocation"};
	OX_FREE char *size = ox_xasprintf("%llu", (unsigned long long)options->size);
	struct create c;
	int rc = read_options(options, &c, err);

	if (rc < 0)
		return rc;
	ox_create_resolve_add(options, "size", size);
	for (size_t i = 0; i < OX_ARRAY_SIZE(order); i++) {
		const char *value = ox_create_option(options, order[i]);

		if (value)
			ox_create_resolve_add(options, order[i], value);
	}
	return 0;
}

/* On a device the whole area is written: old bytes there are not a key slot's. */
static uint64_t find_written(const struct create *c)
{
	uint64_t bytes = c->payload;

	if (c->options->keep_content)
		return bytes;
	while (bytes > 2 * OX_LUKS_SLOT_ALIGN &&
	       ox_buffer_is_zero(c->header + bytes - OX_LUKS_SLOT_ALIGN, OX_LUKS_SLOT_ALIGN))
		bytes -= OX_LUKS_SLOT_ALIGN;
	return bytes;
}

static int create_in_worker(void *arg)
{
	struct create *c = arg;
	uint64_t size = c->payload + ox_align_up(c->options->size, OX_CRYPTO_SECTOR);
	int rc;

	if (c->options->keep_content && size > c->store->size)
		return ox_error_set(c->err, ENOSPC,
		                    "%s: the device has %llu bytes, %llu are needed (%llu for the "
		                    "header)",
		                    c->options->path, (unsigned long long)c->store->size,
		                    (unsigned long long)size, (unsigned long long)c->payload);
	rc = ox_luks_format(&c->luks, c->phrase, c->phrase_bytes, c->header, c->payload, NULL,
	                    c->err);
	if (rc < 0)
		return rc;
	c->written = find_written(c);
	if (c->options->keep_content)
		return 0;
	return ox_store_truncate(c->store, size, c->prealloc, c->options->progress,
	                         c->options->progress_arg, c->err);
}

static int luks_create_co(struct ox_channel *channel, const struct ox_image_create_options *options,
                          struct ox_error *err)
{
	struct create c;
	int rc = read_options(options, &c, err);

	if (rc < 0)
		return rc;
	c.store = channel->store;
	assert(c.payload > OX_LUKS_SLOT_ALIGN);
	c.header = malloc(c.payload);
	if (!c.header)
		return ox_error_set(err, ENOMEM, "%s: no memory for its header", options->path);
	rc = ox_worker_call_co(create_in_worker, &c);
	if (rc < 0)
		goto out;
	/* Material first, what refers to it behind a flush. */
	rc = ox_store_write_co(channel, OX_LUKS_SLOT_ALIGN, c.header + OX_LUKS_SLOT_ALIGN,
	                       c.written - OX_LUKS_SLOT_ALIGN, 0);
	if (rc == 0)
		rc = ox_store_flush_co(channel);
	if (rc == 0)
		rc = ox_store_write_co(channel, 0, c.header, OX_LUKS_SLOT_ALIGN, 0);
	if (rc == 0)
		rc = ox_store_flush_co(channel);
	if (rc < 0)
		ox_error_set(err, -rc, "%s: cannot write its header: %s", options->path,
		             strerror(-rc));
out:
	free(c.header);
	return rc;
}

static const struct ox_format_maintenance luks_maintenance = {
        .info = luks_info,
        .resize_co = luks_resize_co,
        .create_words = luks_create_words,
        .create_resolve = luks_create_resolve,
        .create_co = luks_create_co,
};

const struct ox_format_ops ox_format_luks = {
        .name = "luks",
        .probe = luks_probe,
        .open_co = luks_open_co,
        .close = luks_close,
        .lookup = luks_lookup,
        .zero_co = luks_zero_co,
        .discard_co = luks_discard_co,
        .maintenance = &luks_maintenance,
};
