/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * `oxbow create`: makes a disk image, with qemu-img create's words and output.
 *
 * What is destroyed, and when, is src/image/create.c's: nothing before the write lock is held.
 */
#include "cli/cli.h"
#include "base/text.h"
#include "image/image.h"
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>

struct create_args {
	const char *format;
	const char *path;
	bool quiet, progress, help;
	bool have_size, have_prealloc;
	uint64_t size;
	enum ox_preallocation prealloc;
};

static const char *const option_names[] = {"preallocation", "size", NULL};

static int set_size(struct create_args *args, const char *text, struct ox_error *err)
{
	uint64_t size;

	if (!ox_parse_size(text, 1, &size))
		return ox_error_set(
		        err, EINVAL,
		        "'%s' is not a size: a number of bytes, or one with k, M, G, T, P "
		        "or E behind it",
		        text);
	if (args->have_size && args->size != size)
		return ox_error_set(err, EINVAL, "two sizes are given: %llu and %llu bytes",
		                    (unsigned long long)args->size, (unsigned long long)size);
	args->have_size = true;
	args->size = size;
	return 0;
}

static int set_prealloc(struct create_args *args, const char *word, struct ox_error *err)
{
	static const char *const words[] = {"off", "falloc", "full", NULL};
	const char *nearest;

	if (ox_preallocation_parse(word, &args->prealloc)) {
		args->have_prealloc = true;
		return 0;
	}
	nearest = ox_nearest_word(word, words);
	if (nearest)
		return ox_error_set(err, EINVAL, "preallocation cannot be '%s'; did you mean %s?",
		                    word, nearest);
	return ox_error_set(err, EINVAL, "preallocation is off, falloc or full, not '%s'", word);
}

/* One "name=value" of -o. */
static int set_option(struct create_args *args, const char *item, struct ox_error *err)
{
	const char *value = strchr(item, '=');
	OX_FREE char *name = ox_xasprintf("%.*s", (int)strcspn(item, "="), item);
	const char *nearest;

	if (strcmp(item, "help") == 0 || strcmp(item, "?") == 0) {
		args->help = true;
		return 0;
	}
	if (strcmp(name, "size") == 0 && value)
		return set_size(args, value + 1, err);
	if (strcmp(name, "preallocation") == 0 && value)
		return set_prealloc(args, value + 1, err);
	nearest = ox_nearest_word(name, option_names);
	if (nearest && strcmp(nearest, name) == 0)
		return ox_error_set(err, EINVAL, "option %s needs a value: -o %s=VALUE", name,
		                    name);
	if (nearest)
		return ox_error_set(err, EINVAL, "raw images have no option '%s'; did you mean %s?",
		                    name, nearest);
	return ox_error_set(err, EINVAL,
	                    "raw images have no option '%s'; their options are preallocation and "
	                    "size",
	                    name);
}

static int set_options(struct create_args *args, const char *list, struct ox_error *err)
{
	OX_FREE char *copy = ox_xstrdup(list);
	char *save = NULL;
	int rc = 0;

	for (char *item = strtok_r(copy, ",", &save); item && rc == 0;
	     item = strtok_r(NULL, ",", &save))
		rc = set_option(args, item, err);
	return rc;
}

static int check_format(const struct create_args *args)
{
	const char *nearest;

	if (ox_format_find(args->format))
		return 0;
	nearest = ox_nearest_word(args->format, ox_format_names());
	if (nearest && strcmp(nearest, args->format) == 0)
		return ox_cli_failf("format %s is recognised and not supported by this version",
		                    args->format);
	if (nearest && ox_format_find(nearest))
		return ox_cli_failf("there is no format '%s'; did you mean %s?", args->format,
		                    nearest);
	return ox_cli_failf("there is no format '%s'; this version creates raw images",
	                    args->format);
}

static void print_option_help(const struct create_args *args)
{
	if (args->path)
		printf("Supported options:\n");
	else
		printf("Supported %s options:\n", args->format);
	printf("  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, "
	       "full)\n"
	       "  size=<size>            - Virtual disk size\n");
}

struct progress {
	bool on;
	double last; /* per cent */
};

static void print_progress(double percent)
{
	printf("    (%3.2f/100%%)\r", percent);
	fflush(stdout);
}

static void on_progress(void *arg, uint64_t done, uint64_t total)
{
	struct progress *progress = arg;
	double percent = total ? 100.0 * (double)done / (double)total : 100.0;

	if (!progress->on || percent - progress->last < 1.0)
		return;
	progress->last = percent;
	print_progress(percent);
}

static int create(const struct create_args *args)
{
	struct progress progress = {.on = args->progress && !args->quiet};
	struct ox_create_option prealloc = {
	        .name = (char *)"preallocation",
	        .value = (char *)(uintptr_t)ox_preallocation_name(args->prealloc)};
	struct ox_error err = {0};
	struct ox_image_create_options options = {
	        .path = args->path,
	        .format = args->format,
	        .size = args->size,
	        .has_size = true,
	        .options = &prealloc,
	        .option_count = args->have_prealloc ? 1 : 0,
	        .progress = on_progress,
	        .progress_arg = &progress,
	};
	int rc;

	if (!args->quiet) {
		printf("Formatting '%s', fmt=%s size=%llu", args->path, args->format,
		       (unsigned long long)args->size);
		if (args->have_prealloc)
			printf(" preallocation=%s", ox_preallocation_name(args->prealloc));
		printf("\n");
	}
	if (progress.on)
		print_progress(0);
	rc = ox_image_create(&options, &err);
	if (progress.on) {
		if (rc == 0)
			print_progress(100);
		printf("\n");
	}
	ox_image_create_options_free(&options);
	return rc < 0 ? ox_cli_fail(&err) : 0;
}

static int run(int argc, char **argv)
{
	static const struct option longopts[] = {
	        {"format", required_argument, NULL, 'f'},
	        {"options", required_argument, NULL, 'o'},
	        {"progress", no_argument, NULL, 'p'},
	        {"quiet", no_argument, NULL, 'q'},
	        {NULL, 0, NULL, 0},
	};
	struct create_args args = {.format = "raw"};
	struct ox_error err = {0};
	int opt;

	optind = 0;
	while ((opt = getopt_long(argc, argv, ":f:o:pq", longopts, NULL)) != -1) {
		switch (opt) {
		case 'f':
			args.format = optarg;
			break;
		case 'o':
			if (set_options(&args, optarg, &err) < 0)
				return ox_cli_fail(&err);
			break;
		case 'p':
			args.progress = true;
			break;
		case 'q':
			args.quiet = true;
			break;
		default:
			return ox_cli_bad_option("create", argv, longopts);
		}
	}
	if (check_format(&args) != 0)
		return 1;
	if (argc - optind > 2)
		return ox_cli_failf("create takes a FILE and a SIZE, '%s' is too much",
		                    argv[optind + 2]);
	args.path = optind < argc ? argv[optind] : NULL;
	if (args.help) {
		print_option_help(&args);
		return 0;
	}
	if (!args.path)
		return ox_cli_failf("the FILE to create is missing; see 'oxbow create --help'");
	if (argc - optind == 2 && set_size(&args, argv[optind + 1], &err) < 0)
		return ox_cli_fail(&err);
	if (!args.have_size)
		return ox_cli_failf("%s: the SIZE is missing; see 'oxbow create --help'",
		                    args.path);
	return create(&args);
}

static const char help[] =
        "Usage: oxbow create [-f FMT] [-o OPT=VALUE[,...]] [-q] [-p] FILE SIZE\n"
        "Makes a disk image of SIZE bytes (k, M, G, T, P and E may follow the number).\n"
        "\n"
        "  -f, --format FMT      the image format: raw (default)\n"
        "  -o, --options LIST    options of the format; -o help lists them\n"
        "      preallocation=off     take space when it is written (default)\n"
        "      preallocation=falloc  reserve the space now\n"
        "      preallocation=full    write zeroes to all of it now\n"
        "      size=SIZE             instead of the argument\n"
        "  -p, --progress        show how far preallocation is\n"
        "  -q, --quiet           say nothing unless it fails\n"
        "\n"
        "An existing file is replaced, unless a guest or another program uses it as a disk. A\n"
        "block device keeps its size and content; it must be large enough.\n";

const struct ox_command ox_command_create = {
        .name = "create",
        .summary = "make a disk image",
        .help = help,
        .run = run,
};
