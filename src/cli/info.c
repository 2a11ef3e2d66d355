/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * `oxbow info`: what an image is, with qemu-img info's text and JSON keys.
 *
 * Takes no lock: of a raw image only the size is told, which a running guest's writes do not
 * make wrong.  qemu-img shows it too while a guest runs.
 */
#include "cli/cli.h"
#include "base/text.h"
#include "image/image.h"
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

/* File names are bytes, JSON is UTF-8: what is not is shown as U+FFFD. */
static json_t *json_file_name(const char *name)
{
	json_t *value = json_string(name);
	char *copy, *to;

	if (value)
		return value;
	to = copy = ox_xcalloc(strlen(name) + 1, 3);
	for (const char *from = name; *from; from++) {
		if ((unsigned char)*from < 0x80)
			*to++ = *from;
		else
			to = stpcpy(to, "\xef\xbf\xbd");
	}
	value = json_string(copy);
	free(copy);
	return value;
}

static int print_json(const char *path, const struct ox_image_info *info)
{
	json_t *object = json_object();
	int bad = 0;

	bad |= json_object_set_new(object, "virtual-size",
	                           json_integer((json_int_t)info->virtual_size));
	bad |= json_object_set_new(object, "filename", json_file_name(path));
	if (info->cluster_size)
		bad |= json_object_set_new(object, "cluster-size",
		                           json_integer(info->cluster_size));
	bad |= json_object_set_new(object, "format", json_string(info->format));
	bad |= json_object_set_new(object, "actual-size",
	                           json_integer((json_int_t)info->actual_size));
	bad |= json_object_set_new(object, "dirty-flag", json_false());
	bad |= json_dumpf(object, stdout, JSON_INDENT(4) | JSON_ENSURE_ASCII);
	json_decref(object);
	putchar('\n');
	return bad ? ox_cli_failf("%s: cannot print it as JSON", path) : 0;
}

static void print_human(const char *path, const struct ox_image_info *info)
{
	char virtual_size[32], disk_size[32];

	printf("image: %s\n"
	       "file format: %s\n"
	       "virtual size: %s (%llu bytes)\n"
	       "disk size: %s\n",
	       path, info->format,
	       ox_format_size(info->virtual_size, virtual_size, sizeof(virtual_size)),
	       (unsigned long long)info->virtual_size,
	       ox_format_size(info->actual_size, disk_size, sizeof(disk_size)));
	if (info->cluster_size)
		printf("cluster_size: %u\n", info->cluster_size);
}

static int show(const char *path, const char *format, bool json)
{
	struct ox_image_options options = {
	        .format = format,
	        .store =
	                {
	                        .read_only = true,
	                        .aio = OX_AIO_SYNC,
	                        .lock = OX_LOCK_NONE,
	                        .write_granularity = 1,
	                },
	};
	struct ox_error err = {0};
	struct ox_image_info info;
	struct ox_image *image;
	int rc;

	if (ox_image_open(path, &options, &image, &err) < 0)
		return ox_cli_fail(&err);
	rc = ox_image_get_info(image, &info, &err);
	ox_image_close(image);
	if (rc < 0)
		return ox_cli_fail(&err);
	if (json)
		return print_json(path, &info);
	print_human(path, &info);
	return 0;
}

static int run(int argc, char **argv)
{
	static const struct option longopts[] = {
	        {"format", required_argument, NULL, 'f'},
	        {"force-share", no_argument, NULL, 'U'},
	        {"output", required_argument, NULL, 'O'},
	        {NULL, 0, NULL, 0},
	};
	const char *format = NULL;
	bool json = false;
	int opt;

	optind = 0;
	while ((opt = getopt_long(argc, argv, ":f:U", longopts, NULL)) != -1) {
		switch (opt) {
		case 'f':
			format = optarg;
			break;
		case 'U':
			/* No lock is taken anyway; scripts that give it are not wrong. */
			break;
		case 'O':
			json = strcmp(optarg, "json") == 0;
			if (!json && strcmp(optarg, "human") != 0)
				return ox_cli_failf("--output is human or json, not '%s'", optarg);
			break;
		default:
			return ox_cli_bad_option("info", argv, longopts);
		}
	}
	if (optind == argc)
		return ox_cli_failf("the FILE is missing; see 'oxbow info --help'");
	if (argc - optind > 1)
		return ox_cli_failf("info takes one FILE, '%s' is too much", argv[optind + 1]);
	return show(argv[optind], format, json);
}

static const char help[] =
        "Usage: oxbow info [-f FMT] [-U] [--output=human|json] FILE\n"
        "Says what format an image has, how large the disk is and what space it takes.\n"
        "\n"
        "  -f, --format FMT      the image format; default: seen from its first bytes\n"
        "  -U, --force-share     accepted as by qemu-img; a raw image needs no lock\n"
        "      --output=human    text (default)\n"
        "      --output=json     an object with the keys of qemu-img info\n";

const struct ox_command ox_command_info = {
        .name = "info",
        .summary = "say what an image is",
        .help = help,
        .run = run,
};
