/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Makes the images of the random-operation test: see random_ops.h.
 */
#include "random_ops.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

bool have_qemu(void)
{
	static int known = -1;

	if (known < 0)
		known = kit_spawn((const char *const[]){"qemu-img", "--version", NULL}, NULL, 0) ==
		        0;
	return known;
}

bool write_raw(const char *path, const uint8_t *bytes, uint64_t size)
{
	OX_CLOSE int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	for (uint64_t done = 0; fd >= 0 && done < size;) {
		ssize_t n = pwrite(fd, bytes + done, size - done, (off_t)done);

		if (n <= 0)
			return false;
		done += (uint64_t)n;
	}
	return fd >= 0;
}

static bool qemu_img(struct ox_error *err, const char *const *argv)
{
	char said[600];

	if (kit_spawn(argv, said, sizeof(said)) == 0)
		return true;
	ox_error_set(err, EIO, "%s %s failed: %s", argv[0], argv[1], said);
	return false;
}

static bool make_base(const struct scenario *scenario, const uint8_t *model, uint64_t size,
                      struct made *made, const char **format, struct ox_error *err)
{
	static const char *const formats[] = {NULL,    "raw",   "raw",   "raw",
	                                      "qcow2", "qcow2", "qcow2", "qed"};

	*format = formats[scenario->base];
	if (!*format)
		return true;
	if (!write_raw(strcmp(*format, "raw") ? made->raw : made->base, model, size)) {
		ox_error_set(err, errno, "%s: %s", made->base, strerror(errno));
		return false;
	}
	if (!strcmp(*format, "raw"))
		return true;
	if (scenario->base == BASE_QCOW2_DEFLATE || scenario->base == BASE_QCOW2_ZSTD)
		return qemu_img(err, (const char *const[]){"qemu-img", "convert", "-c", "-f", "raw",
		                                           "-O", *format, "-o",
		                                           scenario->base == BASE_QCOW2_ZSTD
		                                                   ? "compression_type=zstd"
		                                                   : "compression_type=zlib",
		                                           made->raw, made->base, NULL});
	return qemu_img(err, (const char *const[]){"qemu-img", "convert", "-f", "raw", "-O",
	                                           *format, made->raw, made->base, NULL});
}

/* "a=b,c=d" */
static unsigned split_options(char *text, struct ox_create_option *options, unsigned room)
{
	unsigned count = 0;
	char *save = NULL;

	for (char *word = strtok_r(text, ",", &save); word && count < room;
	     word = strtok_r(NULL, ",", &save)) {
		char *equals = strchr(word, '=');

		if (!equals)
			abort();
		*equals = '\0';
		options[count].name = word;
		options[count++].value = equals + 1;
	}
	return count;
}

static bool make_empty(const struct scenario *scenario, uint64_t size, const char *backing_format,
                       const struct made *made, const struct ox_secrets *secrets,
                       struct ox_error *err)
{
	OX_FREE char *text = ox_xasprintf("%s%s%s%s", scenario->options ? scenario->options : "",
	                                  scenario->options && scenario->data_file ? "," : "",
	                                  scenario->data_file ? "data_file=" : "",
	                                  scenario->data_file ? made->raw : "");
	struct ox_create_option words[12];
	struct ox_image_create_options options = {.path = made->path,
	                                          .format = scenario->format,
	                                          .size = size,
	                                          .has_size = true,
	                                          .options = words,
	                                          .secrets = secrets};
	int ret;

	options.option_count = split_options(text, words, OX_ARRAY_SIZE(words));
	if (backing_format) {
		options.backing_file = made->base;
		options.backing_format = backing_format;
	}
	ret = ox_image_create(&options, err);
	ox_image_create_options_free(&options);
	return ret == 0;
}

bool scenario_make(const struct scenario *scenario, const char *dir, const uint8_t *model,
                   uint64_t size, uint64_t base_size, struct made *made,
                   const struct ox_secrets *secrets, struct ox_error *err)
{
	const char *backing_format = NULL;
	bool zstd = scenario->maker == MAKE_ZSTD;

	memset(made, 0, sizeof(*made));
	snprintf(made->path, sizeof(made->path), scenario->memory ? "memory:random:0" : "%s/disk",
	         dir);
	snprintf(made->raw, sizeof(made->raw), "%s/raw", dir);
	snprintf(made->base, sizeof(made->base), "%s/base", dir);
	if (!have_qemu() && (scenario->base >= BASE_QCOW2 || scenario->maker != MAKE_EMPTY)) {
		made->why_not = "qemu-img is not installed";
		return true;
	}
	if (!make_base(scenario, model, base_size, made, &backing_format, err))
		return false;
	if (scenario->maker == MAKE_EMPTY || scenario->maker == MAKE_SNAPSHOT)
		return make_empty(scenario, size, backing_format, made, secrets, err);
	if (!write_raw(made->raw, model, size)) {
		ox_error_set(err, errno, "%s: %s", made->raw, strerror(errno));
		return false;
	}
	return qemu_img(err, (const char *const[]){
	                             "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o",
	                             zstd ? "compression_type=zstd" : "compression_type=zlib",
	                             made->raw, made->path, NULL});
}
