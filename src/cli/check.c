/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * `oxbow check`: is the metadata of an image sound, with qemu-img check's words, JSON and exit
 * status.
 *
 * Only the image itself is opened, not what its header names.  A repair holds the lock of a
 * writer; afterwards the image is checked once more without changing it, and that is what is
 * reported.
 */
#include "cli/cli.h"
#include "cli/tool.h"
#include "image/format.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* qemu-img's exit status. */
enum {
	CHECK_SOUND = 0,
	CHECK_FAILED = 1,
	CHECK_CORRUPT = 2,
	CHECK_LEAKS = 3,
	CHECK_NOT_SUPPORTED = 63,
};

struct check {
	struct ox_tool tool;
	bool quiet, progress;
	bool fix_leaks, fix_errors;
	struct ox_progress bar;
	struct ox_image_check result;
	bool supported;
	const char *format;
};

static void on_progress(void *arg, uint64_t done, uint64_t total)
{
	struct check *check = arg;

	ox_progress_update(&check->bar, done, total);
}

/* Findings are news also for who wants no summary, as by qemu-img. */
static void on_finding(void *arg, const char *line)
{
	fflush(stdout);
	fprintf(stderr, "%s\n", line);
}

static int check_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	const struct ox_format_ops *ops = channel->image->ops;
	struct check *check = arg;

	check->format = ops->name;
	check->supported = ops->maintenance && ops->maintenance->check_co;
	if (!check->supported)
		return 0;
	return ox_image_check_co(channel, &check->result, err);
}

/* One run over the image; `fix`: with the repairs that were asked for. */
static int run_check(struct check *check, bool fix, struct ox_error *err)
{
	struct ox_image_options options;
	const char *format = NULL;
	int ret;

	ox_tool_image_options(&check->tool, &options);
	ret = ox_tool_find_format(&check->tool, check->tool.path, check->tool.format, &format, err);
	if (ret < 0)
		return ret;
	options.allow = (struct ox_allow){.nothing = true};
	options.for_check = true;
	options.store.read_only = !fix;
	if (fix)
		options.store.lock = OX_LOCK_WRITE;
	else if (!check->tool.force_share && strcmp(format, "raw") != 0)
		options.store.lock = OX_LOCK_READ;
	check->result = (struct ox_image_check){
	        .fix_leaks = fix && check->fix_leaks,
	        .fix_errors = fix && check->fix_errors,
	        .progress = on_progress,
	        .say = on_finding,
	        .arg = check,
	};
	check->bar.on = check->progress && !check->quiet && !check->tool.json;
	ox_progress_begin(&check->bar);
	ret = ox_image_with(check->tool.path, &options, check_co, check, err);
	ox_progress_end(&check->bar, ret == 0);
	return ret;
}

/* --- what was found --------------------------------------------------------------------------- */

static void print_repairs(uint64_t leaks, uint64_t corruptions)
{
	printf("The following inconsistencies were found and repaired:\n\n"
	       "    %" PRIu64 " leaked clusters\n"
	       "    %" PRIu64 " corruptions\n"
	       "\n"
	       "Double checking the fixed image now...\n",
	       leaks, corruptions);
}

static double per_cent(uint64_t part, uint64_t whole)
{
	return (double)part * 100.0 / (double)whole;
}

static void print_human(const struct ox_image_check *r)
{
	if (!r->corruptions && !r->leaks && !r->check_errors)
		puts("No errors were found on the image.");
	if (r->corruptions)
		printf("\n%" PRIu64 " errors were found on the image.\n"
		       "Data may be corrupted, or further writes to the image may corrupt it.\n",
		       r->corruptions);
	if (r->leaks)
		printf("\n%" PRIu64 " leaked clusters were found on the image.\n"
		       "This means waste of disk space, but no harm to data.\n",
		       r->leaks);
	if (r->check_errors)
		printf("\n%" PRIu64 " internal errors have occurred during the check.\n",
		       r->check_errors);
	if (r->total_clusters && r->allocated_clusters)
		printf("%" PRIu64 "/%" PRIu64 " = %0.2f%% allocated, %0.2f%% fragmented, %0.2f%% "
		       "compressed clusters\n",
		       r->allocated_clusters, r->total_clusters,
		       per_cent(r->allocated_clusters, r->total_clusters),
		       per_cent(r->fragmented_clusters, r->allocated_clusters),
		       per_cent(r->compressed_clusters, r->allocated_clusters));
	if (r->image_end_offset)
		printf("Image end offset: %" PRIu64 "\n", r->image_end_offset);
}

static void print_json(const struct check *check)
{
	const struct ox_image_check *r = &check->result;
	const struct {
		const char *key;
		uint64_t value;
	} members[] = {
	        {"image-end-offset", r->image_end_offset},
	        {"corruptions", r->corruptions},
	        {"leaks", r->leaks},
	        {"corruptions-fixed", r->corruptions_fixed},
	        {"leaks-fixed", r->leaks_fixed},
	        {"total-clusters", r->total_clusters},
	        {"allocated-clusters", r->allocated_clusters},
	        {"fragmented-clusters", r->fragmented_clusters},
	        {"compressed-clusters", r->compressed_clusters},
	};
	json_t *object = json_object();

	json_object_set_new(object, "filename", ox_json_file_name(check->tool.path));
	json_object_set_new(object, "format", json_string(check->format));
	json_object_set_new(object, "check-errors", json_integer((json_int_t)r->check_errors));
	for (unsigned i = 0; i < OX_ARRAY_SIZE(members); i++) {
		/* What is 0 is not mentioned. */
		if (members[i].value)
			json_object_set_new(object, members[i].key,
			                    json_integer((json_int_t)members[i].value));
	}
	ox_qemu_print_json(object);
	json_decref(object);
}

static int tell(struct check *check)
{
	const struct ox_image_check *r = &check->result;

	if (!check->quiet && check->tool.json)
		print_json(check);
	else if (!check->quiet)
		print_human(r);
	if (r->check_errors) {
		ox_cli_failf("%s: %" PRIu64 " parts of the image could not be checked",
		             check->tool.path, r->check_errors);
		return CHECK_FAILED;
	}
	if (r->corruptions)
		return CHECK_CORRUPT;
	return r->leaks ? CHECK_LEAKS : CHECK_SOUND;
}

static int check_image(struct check *check)
{
	bool fix = check->fix_leaks || check->fix_errors;
	struct ox_error err = {0};
	uint64_t leaks, corruptions;

	if (run_check(check, fix, &err) < 0)
		return ox_cli_fail(&err);
	if (!check->supported) {
		ox_cli_failf("%s: %s images have nothing that could be checked", check->tool.path,
		             check->format);
		return CHECK_NOT_SUPPORTED;
	}
	leaks = check->result.leaks_fixed;
	corruptions = check->result.corruptions_fixed;
	if (leaks || corruptions) {
		if (!check->quiet && !check->tool.json)
			print_repairs(leaks, corruptions);
		if (run_check(check, false, &err) < 0)
			return ox_cli_fail(&err);
		check->result.leaks_fixed = leaks;
		check->result.corruptions_fixed = corruptions;
	}
	return tell(check);
}

/* --- options ---------------------------------------------------------------------------------- */

static int parse_repair(struct check *check, const char *what)
{
	check->fix_leaks = true;
	check->fix_errors = !strcmp(what, "all");
	if (check->fix_errors || !strcmp(what, "leaks"))
		return 0;
	return ox_cli_failf("-r repairs 'leaks' or 'all', not '%s'", what);
}

static int parse(struct check *check, int argc, char **argv)
{
	static const struct option longopts[] = {
	        OX_TOOL_OPTION_FORMAT,
	        OX_TOOL_OPTION_SHARE,
	        OX_TOOL_OPTION_OUTPUT,
	        OX_TOOL_OPTION_OBJECT,
	        {"repair", required_argument, NULL, 'r'},
	        {"quiet", no_argument, NULL, 'q'},
	        {"progress", no_argument, NULL, 'p'},
	        {NULL, 0, NULL, 0},
	};
	struct ox_error err = {0};
	int opt, ret;

	optind = 0;
	while ((opt = getopt_long(argc, argv, ":f:Ur:qp", longopts, NULL)) != -1) {
		ret = ox_tool_option(&check->tool, opt, optarg, &err);
		if (ret < 0)
			return ox_cli_fail(&err);
		if (ret > 0)
			continue;
		if (opt == 'q')
			check->quiet = true;
		else if (opt == 'p')
			check->progress = true;
		else if (opt != 'r')
			return ox_cli_bad_option("check", argv, longopts);
		else if (parse_repair(check, optarg) != 0)
			return 1;
	}
	if (check->fix_leaks && check->tool.force_share)
		return ox_cli_failf("-r changes the image, which -U must not");
	return ox_tool_take_path(&check->tool, "check", argc, argv) ? 0 : 1;
}

static int run(int argc, char **argv)
{
	struct check check = {0};
	int status = parse(&check, argc, argv);

	if (status == 0)
		status = check_image(&check);
	ox_tool_free(&check.tool);
	return status;
}

static const char help[] =
        "Usage: oxbow check [-f FMT] [-r leaks|all] [-U] [-p] [-q] [--output=human|json] FILE\n"
        "Looks whether the metadata of an image is sound. The image must not be in use.\n"
        "\n"
        "  -f, --format FMT      the image format; default: seen from its first bytes\n"
        "  -r, --repair leaks    free the clusters that nothing refers to\n"
        "  -r, --repair all      and mend everything else: what can be reached is kept\n"
        "  -U, --force-share     take no lock: the image may be in use, and be called damaged\n"
        "                        where it only changes\n"
        "  -p, --progress        show how far it is\n"
        "  -q, --quiet           print findings only\n"
        "      --output=human    text (default)\n"
        "      --output=json     an object with the keys of qemu-img check\n"
        "      --object secret,id=ID,file=PATH\n"
        "                        accepted as by qemu-img; no key is needed to check\n"
        "\n"
        "The exit status is 0: sound (or repaired); 1: it could not be checked; 2: damaged;\n"
        "3: sound, and some clusters are leaked; 63: the format has nothing to check.\n";

const struct ox_command ox_command_check = {
        .name = "check",
        .summary = "look whether an image is sound, and repair it",
        .help = help,
        .run = run,
};
