/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * `oxbow create`: makes a disk image, with qemu-img create's words and output.
 *
 * What is destroyed, and when, is src/image/create.c's: nothing before the write lock is held.
 * What the options of a format are, and what they mean, is the format's.
 */
#include "cli/cli.h"
#include "cli/tool.h"
#include "base/text.h"
#include "image/format.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

struct create_args {
	struct ox_image_create_options options;
	struct ox_tool tool; /* secrets */
	bool quiet, help;
	struct ox_progress bar;
	char *backing_file, *backing_format; /* those of -o */
};

/* --- the words of -o -------------------------------------------------------------------------- */

static int set_size(struct create_args *args, const char *text, struct ox_error *err)
{
	uint64_t size;

	if (!ox_parse_size(text, 1, &size))
		return ox_error_set(
		        err, EINVAL,
		        "'%s' is not a size: a number of bytes, or one with k, M, G, T, P "
		        "or E behind it",
		        text);
	if (args->options.has_size && args->options.size != size)
		return ox_error_set(err, EINVAL, "two sizes are given: %llu and %llu bytes",
		                    (unsigned long long)args->options.size,
		                    (unsigned long long)size);
	args->options.has_size = true;
	args->options.size = size;
	return 0;
}

/* The backing file and its format can be given in two ways. */
static int set_backing(const char **to, char **owner, char *value, const char *what,
                       struct ox_error *err)
{
	if (*to && strcmp(*to, value) != 0) {
		ox_error_set(err, EINVAL, "two backing %ss are given: '%s' and '%s'", what, *to,
		             value);
		free(value);
		return -EINVAL;
	}
	free(*owner);
	*to = *owner = value;
	return 0;
}

/* A later value replaces an earlier one, as in QEMU. Takes both strings over. */
static void keep_option(struct ox_image_create_options *options, char *name, char *value)
{
	struct ox_create_option *list;

	for (unsigned i = 0; i < options->option_count; i++) {
		if (strcmp(options->options[i].name, name) != 0)
			continue;
		free(name);
		free(options->options[i].value);
		options->options[i].value = value;
		return;
	}
	list = ox_xcalloc(options->option_count + 1, sizeof(*list));
	if (options->option_count)
		memcpy(list, options->options, options->option_count * sizeof(*list));
	list[options->option_count++] = (struct ox_create_option){name, value};
	free(options->options);
	options->options = list;
}

/* One "name=value" of -o; `item` has its doubled commas resolved. */
static int set_option(struct create_args *args, const char *item, struct ox_error *err)
{
	const char *value = strchr(item, '=');
	OX_FREE char *name = ox_xstrdup(item);

	if (!strcmp(item, "help") || !strcmp(item, "?")) {
		args->help = true;
		return 0;
	}
	if (!*item)
		return 0;
	if (!value)
		return ox_error_set(err, EINVAL, "option %s needs a value: -o %s=VALUE", name,
		                    name);
	name[value++ - item] = '\0';
	if (!strcmp(name, "size"))
		return set_size(args, value, err);
	if (!strcmp(name, "backing_file"))
		return set_backing(&args->options.backing_file, &args->backing_file,
		                   ox_xstrdup(value), "file", err);
	if (!strcmp(name, "backing_fmt"))
		return set_backing(&args->options.backing_format, &args->backing_format,
		                   ox_xstrdup(value), "format", err);
	keep_option(&args->options, ox_steal_ptr(name), ox_xstrdup(value));
	return 0;
}

/* A list with commas between its items; a comma in an item is doubled. */
static int set_options(struct create_args *args, const char *list, struct ox_error *err)
{
	OX_FREE char *item = ox_xcalloc(1, strlen(list) + 1);
	size_t length = 0;
	int ret = 0;

	for (const char *c = list;; c++) {
		if (*c == ',' && c[1] == ',') {
			item[length++] = *c++;
			continue;
		}
		if (*c && *c != ',') {
			item[length++] = *c;
			continue;
		}
		item[length] = '\0';
		length = 0;
		ret = set_option(args, item, err);
		if (ret < 0 || !*c)
			return ret;
	}
}

/* --- what can be created ---------------------------------------------------------------------- */

static const struct ox_create_word *create_words(const char *format)
{
	const struct ox_format_ops *ops = ox_format_find(format);

	return ops && ops->maintenance ? ops->maintenance->create_words : NULL;
}

static bool has_word(const char *format, const char *name)
{
	const struct ox_create_word *word = create_words(format);

	for (; word && word->name; word++) {
		if (!strcmp(word->name, name))
			return true;
	}
	return false;
}

static int check_format(const char *format)
{
	const char *nearest;

	if (ox_format_find(format))
		return 0;
	nearest = ox_nearest_word(format, ox_format_names());
	if (nearest && strcmp(nearest, format) == 0)
		return ox_cli_failf("format %s is recognised and not supported by this version",
		                    format);
	if (nearest && ox_format_find(nearest))
		return ox_cli_failf("there is no format '%s'; did you mean %s?", format, nearest);
	return ox_cli_failf("there is no format '%s'; this version creates raw, qcow2, qed and "
	                    "luks images",
	                    format);
}

/* Are they one file?  Making the image would destroy what it is to stand on. */
static bool is_same_file(const char *a, const char *b)
{
	struct stat st_a, st_b;

	return stat(a, &st_a) == 0 && stat(b, &st_b) == 0 && st_a.st_dev == st_b.st_dev &&
	       st_a.st_ino == st_b.st_ino;
}

/* A format that was not given would be guessed whenever the image is opened, and whoever can write
 * to the backing file could choose it. */
static int refuse_unknown_format(const struct create_args *args, const char *path,
                                 struct ox_error *err)
{
	const struct ox_image_create_options *options = &args->options;
	const char *format = NULL;

	if (options->unsafe_backing)
		return ox_error_set(err, EINVAL,
		                    "%s: the backing format must be specified: add -F FMT",
		                    options->path);
	if (ox_tool_find_format(&args->tool, path, NULL, &format, err) < 0)
		return -EINVAL;
	return ox_error_set(err, EINVAL,
	                    "%s: the backing format must be specified: %s looks like %s, so add "
	                    "-F %s",
	                    options->path, options->backing_file, format, format);
}

static int check_backing(const struct create_args *args, struct ox_error *err)
{
	const struct ox_image_create_options *options = &args->options;
	const char *const *names = ox_format_names();
	OX_FREE char *path = NULL;
	const char *nearest;

	if (!options->backing_file && !options->backing_format)
		return 0;
	if (!has_word(options->format, "backing_file"))
		return ox_error_set(err, EINVAL, "%s images have no backing file", options->format);
	if (!options->backing_file)
		return ox_error_set(err, EINVAL,
		                    "%s: a backing format is given and no backing file",
		                    options->path);
	path = ox_image_resolve_name(options->path, options->backing_file);
	if (is_same_file(path, options->path))
		return ox_error_set(err, EINVAL, "%s: it cannot be its own backing file",
		                    options->path);
	if (!options->backing_format)
		return refuse_unknown_format(args, path, err);
	nearest = ox_nearest_word(options->backing_format, names);
	for (; *names; names++) {
		if (!strcmp(*names, options->backing_format))
			return 0;
	}
	return ox_error_set(err, EINVAL, "%s: there is no backing format '%s'%s%s%s", options->path,
	                    options->backing_format, nearest ? "; did you mean " : "",
	                    nearest ? nearest : "", nearest ? "?" : "");
}

/* --- output ----------------------------------------------------------------------------------- */

static int compare_words(const void *a, const void *b)
{
	return strcmp((*(const struct ox_create_word *const *)a)->name,
	              (*(const struct ox_create_word *const *)b)->name);
}

static void print_option_help(const struct ox_image_create_options *options)
{
	const struct ox_create_word *words = create_words(options->format);
	OX_FREE const struct ox_create_word **sorted = NULL;
	size_t count = 0;

	while (words && words[count].name)
		count++;
	sorted = ox_xcalloc(count + 1, sizeof(const struct ox_create_word *));
	for (size_t i = 0; i < count; i++)
		sorted[i] = &words[i];
	qsort(sorted, count, sizeof(*sorted), compare_words);
	if (options->path)
		puts("Supported options:");
	else
		printf("Supported %s options:\n", options->format);
	for (size_t i = 0; i < count; i++) {
		int used = printf("  %s=<%s>", sorted[i]->name,
		                  sorted[i]->type ? sorted[i]->type : "str");

		printf("%*s - %s\n", used < 24 ? 24 - used : 0, "", sorted[i]->help);
	}
}

static void print_formatting(const struct ox_image_create_options *options)
{
	printf("Formatting '%s', fmt=%s", options->path, options->format);
	for (unsigned i = 0; i < options->resolved_count; i++) {
		printf(" %s=", options->resolved[i].name);
		for (const char *c = options->resolved[i].value; *c; c++)
			fputs(*c == ',' ? ",," : (const char[]){*c, '\0'}, stdout);
	}
	putchar('\n');
	fflush(stdout);
}

static void on_progress(void *arg, uint64_t done, uint64_t total)
{
	ox_progress_update(arg, done, total);
}

static int create(struct create_args *args)
{
	struct ox_image_create_options *options = &args->options;
	struct ox_error err = {0};
	int ret;

	args->bar.on &= !args->quiet;
	options->progress = on_progress;
	options->progress_arg = &args->bar;
	options->secrets = args->tool.secrets;
	ret = check_backing(args, &err);
	if (ret == 0 && !options->has_size && !options->backing_file)
		ret = ox_error_set(&err, EINVAL,
		                   "%s: the SIZE is missing; see 'oxbow create --help'",
		                   options->path);
	if (ret == 0)
		ret = ox_image_create_resolve(options, &err);
	if (ret < 0)
		return ox_cli_fail(&err);
	if (!args->quiet)
		print_formatting(options);
	ox_progress_begin(&args->bar);
	ret = ox_image_create(options, &err);
	ox_progress_end(&args->bar, ret == 0);
	return ret < 0 ? ox_cli_fail(&err) : 0;
}

/* --- arguments -------------------------------------------------------------------------------- */

static int take_option(struct create_args *args, int opt, struct ox_error *err)
{
	struct ox_image_create_options *options = &args->options;

	switch (opt) {
	case 'f':
		options->format = optarg;
		return 1;
	case 'o':
		return set_options(args, optarg, err) < 0 ? -EINVAL : 1;
	case 'b':
		return set_backing(&options->backing_file, &args->backing_file, ox_xstrdup(optarg),
		                   "file", err) < 0
		               ? -EINVAL
		               : 1;
	case 'F':
		return set_backing(&options->backing_format, &args->backing_format,
		                   ox_xstrdup(optarg), "format", err) < 0
		               ? -EINVAL
		               : 1;
	case 'u':
		options->unsafe_backing = true;
		return 1;
	case 'p':
		args->bar.on = true;
		return 1;
	case 'q':
		args->quiet = true;
		return 1;
	default:
		return ox_tool_option(&args->tool, opt, optarg, err);
	}
}

static int parse(struct create_args *args, int argc, char **argv)
{
	static const struct option longopts[] = {
	        OX_TOOL_OPTION_FORMAT,
	        OX_TOOL_OPTION_OBJECT,
	        {"options", required_argument, NULL, 'o'},
	        {"backing", required_argument, NULL, 'b'},
	        {"backing-format", required_argument, NULL, 'F'},
	        {"unsafe", no_argument, NULL, 'u'},
	        {"progress", no_argument, NULL, 'p'},
	        {"quiet", no_argument, NULL, 'q'},
	        {NULL, 0, NULL, 0},
	};
	struct ox_error err = {0};
	int opt, ret;

	optind = 0;
	while ((opt = getopt_long(argc, argv, ":f:o:b:F:upq", longopts, NULL)) != -1) {
		ret = take_option(args, opt, &err);
		if (ret < 0)
			return ox_cli_fail(&err);
		if (ret == 0)
			return ox_cli_bad_option("create", argv, longopts);
	}
	if (check_format(args->options.format) != 0)
		return 1;
	if (argc - optind > 2)
		return ox_cli_failf("create takes a FILE and a SIZE, '%s' is too much",
		                    argv[optind + 2]);
	args->options.path = optind < argc ? argv[optind] : NULL;
	if (args->help)
		return 0;
	if (!args->options.path)
		return ox_cli_failf("the FILE to create is missing; see 'oxbow create --help'");
	if (argc - optind == 2 && set_size(args, argv[optind + 1], &err) < 0)
		return ox_cli_fail(&err);
	return 0;
}

static void free_args(struct create_args *args)
{
	ox_image_create_options_free(&args->options);
	for (unsigned i = 0; i < args->options.option_count; i++) {
		free(args->options.options[i].name);
		free(args->options.options[i].value);
	}
	free(args->options.options);
	free(args->backing_file);
	free(args->backing_format);
	ox_tool_free(&args->tool);
}

static int run(int argc, char **argv)
{
	struct create_args args = {.options = {.format = "raw", .opener = &ox_opener_direct}};
	int status = parse(&args, argc, argv);

	if (status == 0 && args.help)
		print_option_help(&args.options);
	else if (status == 0)
		status = create(&args);
	free_args(&args);
	return status;
}

static const char help[] =
        "Usage: oxbow create [-f FMT] [-o OPT=VALUE[,...]] [-b FILE -F FMT] FILE [SIZE]\n"
        "Makes a disk image of SIZE bytes (k, M, G, T, P and E may follow the number). With a\n"
        "backing file the SIZE may be left out: it is the backing image's then.\n"
        "\n"
        "  -f, --format FMT      the image format: raw (default), qcow2, qed or luks\n"
        "  -o, --options LIST    options of the format, OPT=VALUE with commas between them (a\n"
        "                        comma in a value is doubled); -o help lists them\n"
        "  -b, --backing FILE    what is not written yet is read from FILE, which must not be\n"
        "                        changed any more; relative to the new image's directory\n"
        "  -F, --backing-format FMT\n"
        "                        the backing file's format; it must be said\n"
        "  -u, --unsafe          the backing file need not be there; then SIZE must be given\n"
        "      --object secret,id=ID,file=PATH\n"
        "                        a pass phrase that an option (encrypt.key-secret=ID) names;\n"
        "                        also fd=N, credential=NAME instead of file=PATH\n"
        "  -p, --progress        show how far preallocation is\n"
        "  -q, --quiet           say nothing unless it fails\n"
        "\n"
        "Defaults of qcow2: compat=1.1, clusters of 64 KiB, and extended_l2=on exactly when there\n"
        "is a backing file: a small write then copies 2 KiB of it instead of 64. Programs older\n"
        "than QEMU 5.2 cannot read such images: for them add -o extended_l2=off.\n"
        "\n"
        "An existing file is replaced, unless a guest or another program uses it as a disk. A\n"
        "block device keeps its size; it must be large enough.\n";

const struct ox_command ox_command_create = {
        .name = "create",
        .summary = "make a disk image",
        .help = help,
        .run = run,
};
