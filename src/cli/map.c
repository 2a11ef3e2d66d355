/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * `oxbow map`: where the bytes of a disk are stored, with qemu-img map's text and JSON.
 *
 * Neighbours that say the same are joined as qemu-img joins them, so that the output does not
 * depend on how the image was read.
 */
#include "cli/cli.h"
#include "cli/tool.h"
#include "base/text.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct map {
	struct ox_tool tool;
	uint64_t start, max_length;
	bool printed; /* something stands before the next JSON object */
};

static bool is_same_file(const struct ox_map_entry *a, const struct ox_map_entry *b)
{
	if (!a->file || !b->file)
		return a->file == b->file;
	return !strcmp(a->file, b->file);
}

static bool may_join(const struct ox_map_entry *entry, const struct ox_map_entry *next)
{
	return entry->length > 0 && entry->zero == next->zero && entry->data == next->data &&
	       entry->present == next->present && entry->depth == next->depth &&
	       entry->has_offset == next->has_offset &&
	       (!entry->has_offset || (is_same_file(entry, next) &&
	                               entry->store_offset + entry->length == next->store_offset));
}

static const char *word(bool value)
{
	return value ? "true" : "false";
}

static void print_json(struct map *map, const struct ox_map_entry *entry)
{
	printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64
	       ", \"depth\": %u, \"present\": %s, \"zero\": %s, \"data\": %s",
	       map->printed ? ",\n" : "", entry->offset, entry->length, entry->depth,
	       word(entry->present), word(entry->zero), word(entry->data));
	if (entry->has_offset)
		printf(", \"offset\": %" PRIu64, entry->store_offset);
	putchar('}');
	map->printed = true;
}

static int print_line(const struct map *map, const struct ox_map_entry *entry, struct ox_error *err)
{
	if (entry->data && !entry->has_offset)
		return ox_error_set(err, ENOTSUP,
		                    "%s: at %" PRIu64 " there is data that is compressed or "
		                    "encrypted and has no place to show; use --output=json",
		                    map->tool.path, entry->offset);
	if (entry->data && !entry->zero)
		printf("%#-16" PRIx64 "%#-16" PRIx64 "%#-16" PRIx64 "%s\n", entry->offset,
		       entry->length, entry->store_offset, entry->file ? entry->file : "");
	return 0;
}

static int print_entry(struct map *map, const struct ox_map_entry *entry, struct ox_error *err)
{
	if (!map->tool.json)
		return print_line(map, entry, err);
	print_json(map, entry);
	return 0;
}

static int print_map_co(struct ox_image_channel *channel, uint64_t size, struct map *map,
                        struct ox_error *err)
{
	struct ox_map_entry entry = {.offset = map->start}, next;
	uint64_t end = size;
	int ret;

	if (map->start < size && map->max_length < size - map->start)
		end = map->start + map->max_length;
	while (entry.offset + entry.length < end) {
		uint64_t at = entry.offset + entry.length;

		ret = ox_image_map_co(channel, at, end - at, &next);
		if (ret < 0)
			return ox_error_set(err, -ret, "%s: cannot say what is at %" PRIu64 ": %s",
			                    map->tool.path, at, strerror(-ret));
		/* Text says nothing about what holds no data: these are all the same to it. */
		if (!map->tool.json && (!next.data || next.zero)) {
			next.data = false;
			next.zero = true;
		}
		if (may_join(&entry, &next)) {
			entry.length += next.length;
			continue;
		}
		if (entry.length > 0) {
			ret = print_entry(map, &entry, err);
			if (ret < 0)
				return ret;
		}
		entry = next;
	}
	return print_entry(map, &entry, err);
}

static int map_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct map *map = arg;
	int ret;

	if (map->tool.json)
		putchar('[');
	else
		printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
	ret = print_map_co(channel, ox_image_of(channel)->size, map, err);
	if (ret == 0 && map->tool.json)
		puts("]");
	return ret;
}

static int show(struct map *map)
{
	struct ox_image_options options;
	struct ox_error err = {0};
	const char *format = NULL;

	ox_tool_image_options(&map->tool, &options);
	if (ox_tool_find_format(&map->tool, map->tool.path, map->tool.format, &format, &err) < 0)
		return ox_cli_fail(&err);
	/* As for info: a raw image's map is its file's, which changes while a guest writes. */
	if (!map->tool.force_share && strcmp(format, "raw") != 0)
		options.store.lock = OX_LOCK_READ;
	if (ox_image_with(map->tool.path, &options, map_co, map, &err) < 0)
		return ox_cli_fail(&err);
	return 0;
}

static int parse_bytes(const char *option, const char *text, uint64_t *out)
{
	if (ox_parse_size(text, 1, out))
		return 0;
	return ox_cli_failf("%s: '%s' is not a number of bytes (k, M, G, T may follow it)", option,
	                    text);
}

static int parse(struct map *map, int argc, char **argv)
{
	static const struct option longopts[] = {
	        OX_TOOL_OPTION_FORMAT,
	        OX_TOOL_OPTION_SHARE,
	        OX_TOOL_OPTION_OUTPUT,
	        OX_TOOL_OPTION_OBJECT,
	        OX_TOOL_OPTION_KEY_SECRET,
	        OX_TOOL_OPTION_ALLOW_DIR,
	        {"start-offset", required_argument, NULL, 's'},
	        {"max-length", required_argument, NULL, 'l'},
	        {NULL, 0, NULL, 0},
	};
	struct ox_error err = {0};
	int opt, ret;

	optind = 0;
	while ((opt = getopt_long(argc, argv, ":f:Us:l:", longopts, NULL)) != -1) {
		ret = ox_tool_option(&map->tool, opt, optarg, &err);
		if (ret < 0)
			return ox_cli_fail(&err);
		if (ret > 0)
			continue;
		if (opt != 's' && opt != 'l')
			return ox_cli_bad_option("map", argv, longopts);
		if (opt == 's' && parse_bytes("--start-offset", optarg, &map->start) != 0)
			return 1;
		if (opt == 'l' && parse_bytes("--max-length", optarg, &map->max_length) != 0)
			return 1;
	}
	return ox_tool_take_path(&map->tool, "map", argc, argv) ? 0 : 1;
}

static int run(int argc, char **argv)
{
	struct map map = {.max_length = UINT64_MAX};
	int status = parse(&map, argc, argv);

	if (status == 0)
		status = show(&map);
	ox_tool_free(&map.tool);
	return status;
}

static const char help[] =
        "Usage: oxbow map [-f FMT] [-U] [-s OFFSET] [-l LENGTH] [--output=human|json] FILE\n"
        "Says where the bytes of the disk in FILE are stored: in which file of its chain of\n"
        "backing files, and where there.\n"
        "\n"
        "  -f, --format FMT      the image format; default: seen from its first bytes\n"
        "  -U, --force-share     take no lock: the image may be in use, and may change meanwhile\n"
        "  -s, --start-offset OFFSET, -l, --max-length LENGTH\n"
        "                        only this part of the disk\n"
        "      --output=human    a table of what holds data (default)\n"
        "      --output=json     an array that covers the whole disk\n"
        "      --allow-dir DIR   backing and data files below DIR may be opened too, besides\n"
        "                        those below the directory of the image that names them (may be\n"
        "                        given several times)\n"
        "      --object secret,id=ID,file=PATH\n"
        "      --key-secret ID   the key of an encrypted image\n";

const struct ox_command ox_command_map = {
        .name = "map",
        .summary = "say where the bytes of a disk are stored",
        .help = help,
        .run = run,
};
