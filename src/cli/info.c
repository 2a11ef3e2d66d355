/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * `oxbow info`: what an image is, with qemu-img info's text and JSON.
 *
 * Never opens what a header names: an image from a stranger can name any file of the host.  With
 * --backing-chain the names are followed, one image after the other, as far as the user's
 * directories go.
 *
 * An image with metadata is locked while it is read, since a program that writes to it could show
 * half of a change.  Of a raw image only the size is told, which a running guest's writes do not
 * make wrong: it is not locked, so that it can be shown while a guest runs, as by qemu-img.
 */
#include "cli/cli.h"
#include "cli/tool.h"
#include "base/text.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* --- JSON ------------------------------------------------------------------------------------- */

static void set(json_t *object, const char *key, json_t *value)
{
	/* Fails for want of memory only. */
	if (json_object_set_new(object, key, value) < 0)
		abort();
}

static json_t *info_object(const char *path, const struct ox_image_info *info)
{
	json_t *object = json_object();

	set(object, "virtual-size", json_integer((json_int_t)info->virtual_size));
	set(object, "filename", ox_json_file_name(path));
	set(object, "format", json_string(info->format));
	set(object, "actual-size", json_integer((json_int_t)info->actual_size));
	set(object, "dirty-flag", json_boolean(info->dirty));
	if (info->cluster_size)
		set(object, "cluster-size", json_integer(info->cluster_size));
	if (info->encrypted)
		set(object, "encrypted", json_true());
	if (info->backing_file)
		set(object, "backing-filename", ox_json_file_name(info->backing_file));
	if (info->full_backing_file)
		set(object, "full-backing-filename", ox_json_file_name(info->full_backing_file));
	if (info->backing_format)
		set(object, "backing-filename-format", json_string(info->backing_format));
	if (info->snapshots && json_array_size(info->snapshots))
		set(object, "snapshots", json_incref(info->snapshots));
	if (info->format_specific)
		set(object, "format-specific", json_incref(info->format_specific));
	return object;
}

/* --- text ------------------------------------------------------------------------------------- */

static int64_t member(const json_t *object, const char *key)
{
	return json_integer_value(json_object_get(object, key));
}

static void print_snapshots(const json_t *snapshots)
{
	const json_t *one;
	size_t i;

	printf("Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE",
	       "VM CLOCK", "ICOUNT");
	json_array_foreach(snapshots, i, one)
	{
		const char *id = json_string_value(json_object_get(one, "id"));
		const char *name = json_string_value(json_object_get(one, "name"));
		time_t date = (time_t)member(one, "date-sec");
		int64_t clock = member(one, "vm-clock-sec");
		char size[32], day[32] = "", at[40], icount[24] = "";
		struct tm local;

		if (localtime_r(&date, &local))
			strftime(day, sizeof(day), "%Y-%m-%d %H:%M:%S", &local);
		snprintf(at, sizeof(at), "%02d:%02d:%02d.%03d", (int)(clock / 3600),
		         (int)(clock / 60 % 60), (int)(clock % 60),
		         (int)(member(one, "vm-clock-nsec") / 1000000));
		if (json_object_get(one, "icount"))
			snprintf(icount, sizeof(icount), "%lld", (long long)member(one, "icount"));
		printf("%-9s %-16s %8s%20s%13s%11s\n", id ? id : "", name ? name : "",
		       ox_format_size((uint64_t)member(one, "vm-state-size"), size, sizeof(size)),
		       day, at, icount);
	}
}

static void print_members(json_t *object, unsigned depth);

/* What follows "key:" in the format's own part. */
static void print_specific(json_t *value, unsigned depth)
{
	json_t *one;
	size_t i;

	switch (json_typeof(value)) {
	case JSON_OBJECT:
		putchar('\n');
		print_members(value, depth + 1);
		break;
	case JSON_ARRAY:
		putchar('\n');
		json_array_foreach(value, i, one)
		{
			printf("%*s[%zu]:", (int)(4 * depth + 4), "", i);
			print_specific(one, depth + 1);
		}
		break;
	case JSON_STRING:
		printf(" %s\n", json_string_value(value));
		break;
	case JSON_INTEGER:
		printf(" %lld\n", (long long)json_integer_value(value));
		break;
	default:
		printf(" %s\n", json_is_true(value) ? "true" : "false");
	}
}

static void print_members(json_t *object, unsigned depth)
{
	size_t count;
	OX_FREE const char **keys = ox_qemu_order(object, &count);

	for (size_t i = 0; i < count; i++) {
		printf("%*s", (int)(4 * depth), "");
		for (const char *c = keys[i]; *c; c++)
			putchar(*c == '-' ? ' ' : *c);
		putchar(':');
		print_specific(json_object_get(object, keys[i]), depth);
	}
}

static void print_backing(const struct ox_image_info *info)
{
	printf("backing file: %s", info->backing_file);
	if (!info->full_backing_file)
		fputs(" (cannot determine actual path)", stdout);
	else if (strcmp(info->backing_file, info->full_backing_file) != 0)
		printf(" (actual path: %s)", info->full_backing_file);
	putchar('\n');
	if (info->backing_format)
		printf("backing file format: %s\n", info->backing_format);
}

static void print_human(const char *path, const struct ox_image_info *info)
{
	char virtual_size[32], disk_size[32];
	json_t *data = json_object_get(info->format_specific, "data");

	printf("image: %s\n"
	       "file format: %s\n"
	       "virtual size: %s (%llu bytes)\n"
	       "disk size: %s\n",
	       path, info->format,
	       ox_format_size(info->virtual_size, virtual_size, sizeof(virtual_size)),
	       (unsigned long long)info->virtual_size,
	       ox_format_size(info->actual_size, disk_size, sizeof(disk_size)));
	if (info->encrypted)
		puts("encrypted: yes");
	if (info->cluster_size)
		printf("cluster_size: %u\n", info->cluster_size);
	if (info->dirty)
		puts("cleanly shut down: no");
	if (info->backing_file)
		print_backing(info);
	if (info->snapshots && json_array_size(info->snapshots))
		print_snapshots(info->snapshots);
	if (data) {
		puts("Format specific information:");
		print_members(data, 1);
	}
}

/* --- one image, and the next one of its chain ------------------------------------------------- */

static int ask(const struct ox_tool *tool, const char *path, const char *given,
               struct ox_image_info *info, struct ox_error *err)
{
	struct ox_image_options options;
	struct ox_image *image;
	int ret;

	ox_tool_image_options(tool, &options);
	ret = ox_tool_find_format(tool, path, given, &options.format, err);
	if (ret < 0)
		return ret;
	/* A guess that no driver fits is told better where it was made. */
	if (!given && !ox_format_find(options.format))
		options.format = NULL;
	if (!tool->force_share && options.format && strcmp(options.format, "raw") != 0)
		options.store.lock = OX_LOCK_READ;
	options.allow = (struct ox_allow){.nothing = true};
	options.for_check = true;
	ret = ox_image_open(path, &options, &image, err);
	if (ret < 0)
		return ret;
	ret = ox_image_get_info(image, info, err);
	ox_image_close(image);
	return ret;
}

/* The images of a chain, top first. */
struct chain {
	char **paths;
	struct ox_image_info *infos;
	unsigned count;
};

static void free_chain(struct chain *chain)
{
	for (unsigned i = 0; i < chain->count; i++) {
		free(chain->paths[i]);
		ox_image_info_free(&chain->infos[i]);
	}
	free(chain->paths);
	free(chain->infos);
}

static int ask_chain(const struct ox_tool *tool, bool all, struct chain *chain,
                     struct ox_error *err)
{
	unsigned room = all ? OX_CHAIN_MAX : 1;
	const struct ox_allow allow = {.dirs = tool->allow_dirs};
	const char *format = tool->format;
	char *path = ox_xstrdup(tool->path);
	int ret;

	chain->paths = ox_xcalloc(room, sizeof(*chain->paths));
	chain->infos = ox_xcalloc(room, sizeof(*chain->infos));
	for (;;) {
		struct ox_image_info *info = &chain->infos[chain->count];
		char *next = NULL;

		chain->paths[chain->count] = path;
		ret = ask(tool, path, format, info, err);
		if (ret < 0) {
			free(path);
			return ret;
		}
		chain->count++;
		if (!all || !info->backing_file)
			return 0;
		if (chain->count == room)
			return ox_error_set(err, ELOOP,
			                    "%s: the chain of backing files has more than %u "
			                    "images, or leads back to itself",
			                    tool->path, room);
		ret = ox_image_allowed_name(&allow, path, info->backing_file, &next, err);
		if (ret < 0)
			return ret;
		path = next;
		format = info->backing_format;
	}
}

static int show(const struct ox_tool *tool, bool all)
{
	struct chain chain = {0};
	struct ox_error err = {0};
	json_t *list;

	if (ask_chain(tool, all, &chain, &err) < 0) {
		free_chain(&chain);
		return ox_cli_fail(&err);
	}
	if (!tool->json) {
		for (unsigned i = 0; i < chain.count; i++) {
			if (i)
				putchar('\n');
			print_human(chain.paths[i], &chain.infos[i]);
		}
	} else {
		list = json_array();
		for (unsigned i = 0; i < chain.count; i++)
			json_array_append_new(list, info_object(chain.paths[i], &chain.infos[i]));
		ox_qemu_print_json(all ? list : json_array_get(list, 0));
		json_decref(list);
	}
	free_chain(&chain);
	return 0;
}

static int parse(struct ox_tool *tool, bool *all, int argc, char **argv)
{
	static const struct option longopts[] = {
	        OX_TOOL_OPTION_FORMAT,    OX_TOOL_OPTION_SHARE,
	        OX_TOOL_OPTION_OUTPUT,    OX_TOOL_OPTION_OBJECT,
	        OX_TOOL_OPTION_ALLOW_DIR, {"backing-chain", no_argument, NULL, OX_TOOL_OTHER},
	        {NULL, 0, NULL, 0},
	};
	struct ox_error err = {0};
	int opt, ret;

	optind = 0;
	while ((opt = getopt_long(argc, argv, ":f:U", longopts, NULL)) != -1) {
		if (opt == OX_TOOL_OTHER) {
			*all = true;
			continue;
		}
		ret = ox_tool_option(tool, opt, optarg, &err);
		if (ret < 0)
			return ox_cli_fail(&err);
		if (ret == 0)
			return ox_cli_bad_option("info", argv, longopts);
	}
	return ox_tool_take_path(tool, "info", argc, argv) ? 0 : 1;
}

static int run(int argc, char **argv)
{
	struct ox_tool tool = {0};
	bool all = false;
	int status = parse(&tool, &all, argc, argv);

	if (status == 0)
		status = show(&tool, all);
	ox_tool_free(&tool);
	return status;
}

static const char help[] =
        "Usage: oxbow info [-f FMT] [-U] [--backing-chain] [--output=human|json] FILE\n"
        "Says what format an image has, how large the disk is, what space it takes, and what is\n"
        "in it. Other files that the image names are not opened.\n"
        "\n"
        "  -f, --format FMT      the image format; default: seen from its first bytes\n"
        "  -U, --force-share     take no lock: the image may be in use, and what is shown then\n"
        "                        may be half of a change\n"
        "      --backing-chain   the image, its backing file, and so on\n"
        "      --allow-dir DIR   with it: files below DIR may be opened too, besides those\n"
        "                        below the directory of the image that names them (may be\n"
        "                        given several times)\n"
        "      --output=human    text (default)\n"
        "      --output=json     an object (of a chain: an array) with the keys of qemu-img info\n"
        "      --object secret,id=ID,file=PATH\n"
        "                        accepted as by qemu-img; no key is needed to tell this\n";

const struct ox_command ox_command_info = {
        .name = "info",
        .summary = "say what an image is",
        .help = help,
        .run = run,
};
