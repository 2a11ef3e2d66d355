/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * oxbow resize: a new size for an image, as qemu-img resize; through the server when one has the
 * image open.
 *
 * The image is opened with the lock of a writer first.  If somebody holds it, and that is an
 * `oxbow serve` (found among the control sockets of the run directory by the image's device and
 * inode number), the server resizes its disk and tells the guest.  A server whose disk is inactive
 * holds no lock and has nothing cached: then the image is resized here, and the server sees the
 * new size when its disk becomes active.
 */
#include "cli/cli.h"
#include "cli/tool.h"
#include "base/text.h"
#include "control/qmp.h"
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

static const char help[] =
        "Usage: oxbow resize [OPTION]... IMAGE [+|-]SIZE\n"
        "Gives the disk in IMAGE a new size: SIZE, or SIZE more (+) or less (-) than now.\n"
        "SIZE is in bytes, or has a suffix: k, M, G, T, P, E (1024 based; 1.5G works).\n"
        "\n"
        "If an 'oxbow serve' has the image open, it is asked to resize it, and the guest learns\n"
        "of the new size at once.\n"
        "\n"
        "Options:\n"
        "  -f, --format FMT       the image's format; default: found out by looking at it\n"
        "      --shrink           allow a smaller size: what lies beyond it is lost, so shrink\n"
        "                         partitions and file systems first\n"
        "      --preallocation=off|falloc|full\n"
        "                         off: new space is allocated when it is written\n"
        "                         falloc: reserve it now\n"
        "                         full: reserve it and write it\n"
        "      --allow-dir DIR    backing and data files below DIR may be opened too, besides\n"
        "                         those below the directory of the image that names them (may be\n"
        "                         given several times)\n"
        "      --object secret,id=ID,file=PATH\n"
        "      --key-secret ID    the key of an encrypted image\n"
        "  -q, --quiet            print nothing when all went well\n";

enum size_kind { SIZE_ABSOLUTE, SIZE_MORE, SIZE_LESS };

struct resize {
	const char *path;
	struct ox_tool tool; /* how to open it */
	enum size_kind kind;
	uint64_t size;
	bool shrink, quiet, opened;
	enum ox_preallocation preallocation;
};

static int parse_new_size(const char *text, struct resize *resize, struct ox_error *err)
{
	const char *digits = text;

	resize->kind = SIZE_ABSOLUTE;
	if (*text == '+' || *text == '-') {
		resize->kind = *text == '+' ? SIZE_MORE : SIZE_LESS;
		digits++;
	}
	if (!isdigit((unsigned char)*digits) || !ox_parse_size(digits, 1, &resize->size))
		return ox_error_set(
		        err, EINVAL,
		        "'%s' is not a size: digits and a suffix (k, M, G, T) are, with + "
		        "or - in front to add or take away",
		        text);
	return 0;
}

/* The size that is wanted of a disk that has `now` bytes. */
static int new_size(const struct resize *resize, uint64_t now, uint64_t *size, struct ox_error *err)
{
	char buf[32];

	if (resize->kind == SIZE_MORE && resize->size > INT64_MAX - now)
		return ox_error_set(err, EFBIG, "%s: the new size is larger than any file",
		                    resize->path);
	if (resize->kind == SIZE_LESS && resize->size >= now)
		return ox_error_set(err, EINVAL, "%s has %s only, less than is to be taken away",
		                    resize->path, ox_format_size(now, buf, sizeof(buf)));
	*size = resize->kind == SIZE_MORE   ? now + resize->size
	        : resize->kind == SIZE_LESS ? now - resize->size
	                                    : resize->size;
	if (*size < now && !resize->shrink)
		return ox_error_set(err, EINVAL,
		                    "%s has %s now: what lies beyond the new size would be lost; "
		                    "use --shrink to allow that",
		                    resize->path, ox_format_size(now, buf, sizeof(buf)));
	if (*size < now && resize->preallocation != OX_PREALLOC_OFF)
		return ox_error_set(err, EINVAL,
		                    "%s would become smaller: there is nothing to preallocate",
		                    resize->path);
	return 0;
}

static int resize_image_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct resize *resize = arg;
	uint64_t size;
	int ret;

	resize->opened = true;
	ret = new_size(resize, ox_image_of(channel)->size, &size, err);
	return ret < 0 ? ret : ox_image_resize_co(channel, size, resize->preallocation, err);
}

static int resize_offline(struct resize *resize, struct ox_error *err)
{
	struct ox_image_options options;
	int ret;

	ox_tool_image_options(&resize->tool, &options);
	options.store.read_only = false;
	options.store.lock = OX_LOCK_WRITE;
	ret = ox_image_with(resize->path, &options, resize_image_co, resize, err);
	/* Only the lock's error leads on to a server. */
	return ret == -EAGAIN && resize->opened ? -EIO : ret;
}

/* As the stores name files and devices. */
static int identify(const char *path, uint64_t *dev, uint64_t *ino)
{
	struct stat st;

	if (!strncmp(path, "file:", 5))
		path += 5;
	if (stat(path, &st) < 0)
		return -errno;
	*dev = S_ISBLK(st.st_mode) ? st.st_rdev : st.st_dev;
	*ino = S_ISBLK(st.st_mode) ? 0 : st.st_ino;
	return 0;
}

static int resize_through(const struct resize *resize, const struct ox_run_server *server,
                          struct ox_error *err)
{
	OX_FREE char *arguments = NULL;
	uint64_t size = 0;
	int ret;

	if (resize->preallocation != OX_PREALLOC_OFF)
		return ox_error_set(err, ENOTSUP,
		                    "%s is served by oxbow serve (pid %ld), which does not "
		                    "preallocate; do without --preallocation, or stop it first",
		                    resize->path, server->pid);
	ret = new_size(resize, server->size, &size, err);
	if (ret < 0)
		return ret;
	arguments = ox_qmp_resize_arguments(server->device, size, resize->shrink);
	return ox_qmp_execute(server->client, "block_resize", arguments, NULL, err);
}

/* 1: there is no server to ask. */
static int resize_online(const struct resize *resize, long *pid, struct ox_error *err)
{
	struct ox_run_server server;
	uint64_t dev = 0, ino = 0;
	int ret;

	if (identify(resize->path, &dev, &ino) < 0 || ox_run_dir_find_image(dev, ino, &server) < 0)
		return 1;
	*pid = server.pid;
	ret = resize_through(resize, &server, err);
	ox_qmp_disconnect(server.client);
	free(server.device);
	return ret;
}

static int resize_image(struct resize *resize, struct ox_error *err)
{
	struct ox_error locked = {0};
	long pid = 0;
	int ret = resize_offline(resize, &locked);

	if (ret == -EAGAIN) {
		ret = resize_online(resize, &pid, err);
		if (ret > 0)
			ret = -EAGAIN;
	}
	if (ret < 0) {
		if (!err->code)
			*err = locked;
		return ret;
	}
	if (!resize->quiet && pid)
		printf("Image resized online (by oxbow serve, pid %ld).\n", pid);
	else if (!resize->quiet)
		puts("Image resized.");
	return 0;
}

static int parse_preallocation(const char *word, enum ox_preallocation *out, struct ox_error *err)
{
	if (ox_preallocation_parse(word, out))
		return 0;
	return ox_error_set(err, EINVAL, "--preallocation: '%s' is none of off, falloc, full",
	                    word);
}

static int take_option(struct resize *resize, int option, struct ox_error *err)
{
	switch (option) {
	case 's':
		resize->shrink = true;
		return 1;
	case 'p':
		return parse_preallocation(optarg, &resize->preallocation, err) < 0 ? -EINVAL : 1;
	case 'q':
		resize->quiet = true;
		return 1;
	default:
		return ox_tool_option(&resize->tool, option, optarg, err);
	}
}

static int parse(struct resize *resize, int argc, char **argv)
{
	static const struct option options[] = {
	        OX_TOOL_OPTION_FORMAT,
	        OX_TOOL_OPTION_OBJECT,
	        OX_TOOL_OPTION_KEY_SECRET,
	        OX_TOOL_OPTION_ALLOW_DIR,
	        {"shrink", no_argument, NULL, 's'},
	        {"preallocation", required_argument, NULL, 'p'},
	        {"quiet", no_argument, NULL, 'q'},
	        {NULL, 0, NULL, 0},
	};
	struct ox_error err = {0}, bad_size = {0};
	const char *size;
	int value, ret;

	/* The size comes last, and "-1G" is no option. */
	size = argc > 1 ? argv[--argc] : NULL;
	if (!size || parse_new_size(size, resize, &bad_size) < 0) {
		/* A mistaken option may be what stands there: that one is said first. */
		argc += !!size;
		resize->kind = SIZE_ABSOLUTE;
		size = NULL;
	}
	opterr = 0;
	optind = 0;
	while ((value = getopt_long(argc, argv, ":f:q", options, NULL)) != -1) {
		ret = take_option(resize, value, &err);
		if (ret < 0)
			return ox_cli_fail(&err);
		if (ret == 0)
			return ox_cli_bad_option("resize", argv, options);
	}
	if (!size && argc - optind >= 2)
		return ox_cli_fail(&bad_size);
	if (!size || optind >= argc)
		return ox_cli_failf("resize needs an image and a size; see 'oxbow resize --help'");
	if (argc - optind > 1)
		return ox_cli_failf("'%s' is one word too many; see 'oxbow resize --help'",
		                    argv[optind + 1]);
	resize->path = argv[optind];
	return 0;
}

static int run(int argc, char **argv)
{
	struct resize resize = {.preallocation = OX_PREALLOC_OFF};
	struct ox_error err = {0};
	int status = parse(&resize, argc, argv);

	if (status == 0 && resize_image(&resize, &err) < 0)
		status = ox_cli_fail(&err);
	ox_tool_free(&resize.tool);
	return status;
}

const struct ox_command ox_command_resize = {
        .name = "resize",
        .summary = "change the size of an image, also while it is served",
        .help = help,
        .run = run,
};
