/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * -o for new qcow2 images: QEMU's words, QEMU's defaults, and what does not go together.
 *
 * One default is Oxbow's own: extended L2 entries are on exactly when there is a backing file (and
 * version and cluster size allow it), because then a small write need not copy a whole cluster.
 *
 * Pure: no file is touched.
 */
#include "image/qcow2/create.h"
#include "base/text.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define CLUSTER_DEFAULT  (64u << 10)
#define EXTENDED_CLUSTER (16u << 10) /* the least with extended L2 entries */

const struct ox_create_word qcow2_create_words[] = {
        {"backing_file", "File name of a base image", NULL},
        {"backing_fmt", "Image format of the base image", NULL},
        {"cluster_size", "qcow2 cluster size", "size"},
        {"compat", "Compatibility level (v2 [0.10] or v3 [1.1])", NULL},
        {"compression_type", "Compression method used for image cluster compression", NULL},
        {"data_file", "File name of an external data file", NULL},
        {"data_file_raw", "The external data file must stay valid as a raw image", "bool (on/off)"},
        {"encrypt.cipher-alg", "Name of encryption cipher algorithm", NULL},
        {"encrypt.cipher-mode", "Name of encryption cipher mode", NULL},
        {"encrypt.format", "Encrypt the image, format choices: 'luks'", NULL},
        {"encrypt.hash-alg", "Name of encryption hash algorithm", NULL},
        {"encrypt.iter-time", "Time to spend in PBKDF in milliseconds", "num"},
        {"encrypt.ivgen-alg", "Name of IV generator algorithm", NULL},
        {"encrypt.ivgen-hash-alg", "Name of IV generator hash algorithm", NULL},
        {"encrypt.key-secret", "ID of secret providing the LUKS passphrase", NULL},
        {"encryption", "Refused if on: use encrypt.format=luks", "bool (on/off)"},
        {"extended_l2",
         "Extended L2 tables (default: on with a backing file, else off; off for programs older "
         "than QEMU 5.2)",
         "bool (on/off)"},
        {"lazy_refcounts", "Postpone refcount updates", "bool (on/off)"},
        {"nocow", "Turn off copy-on-write (valid only on btrfs)", "bool (on/off)"},
        {"preallocation", "Preallocation mode (allowed values: off, metadata, falloc, full)", NULL},
        {"refcount_bits", "Width of a reference count entry in bits", "num"},
        {"size", "Virtual disk size", "size"},
        {NULL, NULL, NULL},
};

/* --- words -> values ----------------------------------------------------------------------------
 */

/* The index of the option's word in `words` (which ends with NULL). */
static int choose(const struct ox_image_create_options *options, const char *name,
                  const char *const *words, unsigned otherwise, unsigned *out, struct ox_error *err)
{
	const char *value = ox_create_option(options, name), *near;
	char list[96] = "";
	size_t at = 0;

	*out = otherwise;
	if (!value)
		return 0;
	for (unsigned i = 0; words[i]; i++) {
		if (strcmp(words[i], value) == 0) {
			*out = i;
			return 0;
		}
		if (at < sizeof(list))
			at += (size_t)snprintf(list + at, sizeof(list) - at, "%s%s", i ? ", " : "",
			                       words[i]);
	}
	near = ox_nearest_word(value, words);
	return ox_error_set(err, EINVAL, "%s: %s is one of %s, not '%s'%s%s%s", options->path, name,
	                    list, value, near ? "; did you mean " : "", near ? near : "",
	                    near ? "?" : "");
}

static int choose_bool(const struct ox_image_create_options *options, const char *name,
                       bool otherwise, bool *out, struct ox_error *err)
{
	/* QEMU's words for no and yes, by turns. */
	static const char *const words[] = {"off",  "on", "no", "yes", "false",
	                                    "true", "n",  "y",  NULL};
	unsigned value;
	int rc = choose(options, name, words, otherwise, &value, err);

	*out = value & 1;
	return rc;
}

static int parse_cluster(const struct ox_image_create_options *options, struct qcow2_create *c,
                         struct ox_error *err)
{
	const char *text = ox_create_option(options, "cluster_size");
	uint64_t bytes = CLUSTER_DEFAULT;

	if (text && (!ox_parse_size(text, 1, &bytes) || !ox_is_power_of_2(bytes) || bytes < 512 ||
	             bytes > 2 << 20))
		return ox_error_set(err, EINVAL,
		                    "%s: a cluster size is a power of two from 512 to 2M, not '%s'",
		                    options->path, text);
	c->cluster_bits = (uint32_t)__builtin_ctzll(bytes);
	return 0;
}

static int parse_refcount_bits(const struct ox_image_create_options *options,
                               struct qcow2_create *c, struct ox_error *err)
{
	const char *text = ox_create_option(options, "refcount_bits");
	uint64_t bits = 16;

	if (text && (!ox_parse_uint(text, 1, 64, &bits) || !ox_is_power_of_2(bits)))
		return ox_error_set(err, EINVAL,
		                    "%s: refcount_bits is a power of two from 1 to 64, not '%s'",
		                    options->path, text);
	c->refcount_order = (uint32_t)__builtin_ctzll(bits);
	return 0;
}

static int parse_simple(const struct ox_image_create_options *options, struct qcow2_create *c,
                        struct ox_error *err)
{
	static const char *const compat[] = {"0.10", "1.1", "v2", "v3", NULL};
	static const char *const compression[] = {"zlib", "zstd", NULL};
	static const char *const prealloc[] = {"off", "metadata", "falloc", "full", NULL};
	bool legacy = false;
	unsigned value;
	int rc = choose(options, "compat", compat, 1, &value, err);

	c->version = value & 1 ? 3 : 2;
	if (rc == 0)
		rc = parse_cluster(options, c, err);
	if (rc == 0)
		rc = parse_refcount_bits(options, c, err);
	if (rc == 0)
		rc = choose(options, "compression_type", compression, 0, &value, err);
	c->compression = (uint8_t)value;
	if (rc == 0)
		rc = choose(options, "preallocation", prealloc, QCOW2_PREALLOC_OFF, &value, err);
	c->prealloc = (enum qcow2_preallocation)value;
	if (rc == 0)
		rc = choose_bool(options, "lazy_refcounts", false, &c->lazy, err);
	if (rc == 0)
		rc = choose_bool(options, "data_file_raw", false, &c->data_raw, err);
	if (rc == 0)
		rc = choose_bool(options, "nocow", false, &c->nocow, err);
	if (rc == 0)
		rc = choose_bool(options, "encryption", false, &legacy, err);
	if (rc == 0 && legacy)
		rc = ox_error_set(
		        err, ENOTSUP,
		        "%s: encryption=on means the legacy AES method, which is not safe "
		        "and not created any more; use encrypt.format=luks",
		        options->path);
	return rc;
}

/* --- what goes together ---------------------------------------------------------------------- */

static int needs_v3(const struct ox_image_create_options *options, const char *what,
                    struct ox_error *err)
{
	return ox_error_set(err, EINVAL, "%s: %s needs compat=1.1", options->path, what);
}

static int check_version(const struct ox_image_create_options *options,
                         const struct qcow2_create *c, struct ox_error *err)
{
	if (c->version >= 3)
		return 0;
	if (c->refcount_order != 4)
		return needs_v3(options, "a refcount width other than 16 bits", err);
	if (c->lazy)
		return needs_v3(options, "lazy_refcounts=on", err);
	if (c->compression != QCOW2_COMPRESSION_DEFLATE)
		return needs_v3(options, "a compression type other than zlib", err);
	if (c->data_file)
		return needs_v3(options, "an external data file", err);
	if (c->extended)
		return needs_v3(options, "extended_l2=on", err);
	return 0;
}

static int check_combination(const struct ox_image_create_options *options,
                             const struct qcow2_create *c, struct ox_error *err)
{
	const char *what = options->path;

	if (c->extended && c->cluster_bits < 14)
		return ox_error_set(err, EINVAL,
		                    "%s: extended_l2=on needs clusters of at least 16k", what);
	if (c->data_raw && !c->data_file)
		return ox_error_set(err, EINVAL, "%s: data_file_raw=on needs a data_file", what);
	if (c->data_raw && c->backing)
		return ox_error_set(err, EINVAL,
		                    "%s: a raw external data file and a backing file cannot go "
		                    "together",
		                    what);
	if (c->data_raw && c->encrypted)
		return ox_error_set(err, EINVAL,
		                    "%s: an encrypted data file cannot be valid as a raw image; "
		                    "leave data_file_raw or encrypt.* away",
		                    what);
	if (c->backing && c->prealloc != QCOW2_PREALLOC_OFF && !c->extended)
		return ox_error_set(err, EINVAL,
		                    "%s: a backing file and preallocation go together with "
		                    "extended_l2=on only",
		                    what);
	if (c->backing && strlen(options->backing_file) > 1023)
		return ox_error_set(err, EINVAL,
		                    "%s: the backing file's name is longer than 1023 bytes", what);
	if (c->backing && !*options->backing_file)
		return ox_error_set(err, EINVAL, "%s: the backing file's name is empty", what);
	if (c->data_file && strlen(c->data_file) > 4095)
		return ox_error_set(err, EINVAL,
		                    "%s: the data file's name is longer than 4095 bytes", what);
	return 0;
}

static bool is_encrypted(const struct ox_image_create_options *options)
{
	for (unsigned i = 0; i < options->option_count; i++) {
		if (strncmp(options->options[i].name, "encrypt.", 8) == 0)
			return true;
	}
	return false;
}

int qcow2_create_parse(const struct ox_image_create_options *options, struct qcow2_create *c,
                       struct ox_error *err)
{
	int rc;

	*c = (struct qcow2_create){
	        .size = ox_align_up(options->size, 512),
	        .backing = options->backing_file != NULL,
	        .data_file = ox_create_option(options, "data_file"),
	        .encrypted = is_encrypted(options),
	};
	rc = parse_simple(options, c, err);
	if (rc == 0)
		rc = choose_bool(options, "extended_l2",
		                 c->backing && c->version >= 3 &&
		                         c->cluster_bits >= __builtin_ctz(EXTENDED_CLUSTER),
		                 &c->extended, err);
	if (rc == 0)
		rc = check_version(options, c, err);
	if (rc == 0)
		rc = check_combination(options, c, err);
	if (rc == 0 && c->encrypted)
		rc = ox_luks_create_options(options, "encrypt.", &c->luks, &c->key_secret, err);
	if (rc < 0)
		return rc;
	/* Both ways of reading the data file, with the tables and without, must give the same. */
	if (c->data_raw && c->prealloc == QCOW2_PREALLOC_OFF)
		c->prealloc = QCOW2_PREALLOC_METADATA;
	c->luks.alignment = 4096;
	return 0;
}

/* --- what qemu-img prints -------------------------------------------------------------------- */

static void add_given(struct ox_image_create_options *options, const char *name)
{
	const char *value = ox_create_option(options, name);

	if (value)
		ox_create_resolve_add(options, name, value);
}

static void add_number(struct ox_image_create_options *options, const char *name, uint64_t value)
{
	char text[24];

	snprintf(text, sizeof(text), "%llu", (unsigned long long)value);
	ox_create_resolve_add(options, name, text);
}

static void add_all(struct ox_image_create_options *options, const struct qcow2_create *c)
{
	static const char *const encrypt[] = {
	        "encrypt.format",      "encrypt.key-secret", "encrypt.cipher-alg",
	        "encrypt.cipher-mode", "encrypt.ivgen-alg",  "encrypt.ivgen-hash-alg",
	        "encrypt.hash-alg",    "encrypt.iter-time",  "encryption",
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(encrypt); i++)
		add_given(options, encrypt[i]);
	add_number(options, "cluster_size", UINT64_C(1) << c->cluster_bits);
	ox_create_resolve_add(options, "extended_l2", c->extended ? "on" : "off");
	add_given(options, "preallocation");
	ox_create_resolve_add(options, "compression_type", c->compression ? "zstd" : "zlib");
	add_number(options, "size", options->size);
	add_given(options, "compat");
	add_given(options, "data_file");
	add_given(options, "data_file_raw");
	if (options->backing_file)
		ox_create_resolve_add(options, "backing_file", options->backing_file);
	if (options->backing_format)
		ox_create_resolve_add(options, "backing_fmt", options->backing_format);
	ox_create_resolve_add(options, "lazy_refcounts", c->lazy ? "on" : "off");
	add_number(options, "refcount_bits", UINT64_C(1) << c->refcount_order);
	add_given(options, "nocow");
}

int qcow2_create_resolve(struct ox_image_create_options *options, struct ox_error *err)
{
	struct qcow2_header header;
	struct qcow2_create create;
	struct qcow2_plan plan;
	int rc = qcow2_create_parse(options, &create, err);

	if (rc < 0)
		return rc;
	rc = qcow2_create_plan(options, &create, &plan, &header, err);
	qcow2_header_free(&header);
	if (rc == 0)
		add_all(options, &create);
	return rc;
}
