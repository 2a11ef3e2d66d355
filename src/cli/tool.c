/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the subcommands that look into an image share.
 */
#include "cli/tool.h"
#include "base/text.h"
#include "cli/cli.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

static int set_output(struct ox_tool *tool, const char *word, struct ox_error *err)
{
	tool->json = !strcmp(word, "json");
	if (!tool->json && strcmp(word, "human") != 0)
		return ox_error_set(err, EINVAL, "--output is human or json, not '%s'", word);
	return 1;
}

static int add_dir(struct ox_tool *tool, const char *dir, struct ox_error *err)
{
	const char **dirs;

	if (!*dir)
		return ox_error_set(err, EINVAL, "--allow-dir: the value is empty");
	dirs = ox_xcalloc(tool->allow_count + 2, sizeof(*dirs));
	if (tool->allow_count)
		memcpy(dirs, tool->allow_dirs, tool->allow_count * sizeof(*dirs));
	dirs[tool->allow_count++] = dir;
	free(tool->allow_dirs);
	tool->allow_dirs = dirs;
	return 1;
}

int ox_tool_option(struct ox_tool *tool, int option, const char *value, struct ox_error *err)
{
	int ret;

	switch (option) {
	case 'f':
		tool->format = value;
		return 1;
	case 'U':
		tool->force_share = true;
		return 1;
	case OX_TOOL_OUTPUT:
		return set_output(tool, value, err);
	case OX_TOOL_OBJECT:
		if (!tool->secrets)
			tool->secrets = ox_secrets_new();
		ret = ox_secrets_add(tool->secrets, value, err);
		return ret < 0 ? ret : 1;
	case OX_TOOL_KEY_SECRET:
		tool->key_secret = value;
		return 1;
	case OX_TOOL_ALLOW_DIR:
		return add_dir(tool, value, err);
	default:
		return 0;
	}
}

bool ox_tool_take_path(struct ox_tool *tool, const char *command, int argc, char **argv)
{
	if (optind == argc) {
		ox_cli_failf("the FILE is missing; see 'oxbow %s --help'", command);
		return false;
	}
	if (argc - optind > 1) {
		ox_cli_failf("%s takes one FILE, '%s' is too much", command, argv[optind + 1]);
		return false;
	}
	tool->path = argv[optind];
	return true;
}

void ox_tool_free(struct ox_tool *tool)
{
	ox_secrets_free(tool->secrets);
	free(tool->allow_dirs);
}

int ox_tool_find_format(const struct ox_tool *tool, const char *path, const char *given,
                        const char **format, struct ox_error *err)
{
	struct ox_image_options options;
	struct ox_store *store;
	uint8_t head[512] = {0};
	int ret;

	*format = given;
	if (given)
		return 0;
	ox_tool_image_options(tool, &options);
	ret = ox_store_open(path, &options.store, &store, err);
	if (ret < 0)
		return ret;
	ret = ox_store_pread(store, 0, head, sizeof(head));
	ox_store_close(store);
	if (ret < 0)
		return ox_error_set(err, -ret, "%s: cannot read its first sector: %s", path,
		                    strerror(-ret));
	*format = ox_image_guess_format(head, sizeof(head), path);
	return 0;
}

void ox_tool_image_options(const struct ox_tool *tool, struct ox_image_options *options)
{
	*options = (struct ox_image_options){
	        .format = tool->format,
	        .store =
	                {
	                        .read_only = true,
	                        .aio = OX_AIO_SYNC,
	                        .lock = OX_LOCK_NONE,
	                        .write_granularity = 1,
	                        .opener = &ox_opener_direct,
	                },
	        .allow = {.dirs = tool->allow_dirs},
	        .secrets = tool->secrets,
	        .key_secret = tool->key_secret,
	};
}

/* --- JSON ------------------------------------------------------------------------------------- */

/* QEMU keeps an object's members in a hash table of 512 chains (its qobject/qdict.c) and prints
 * them chain by chain; scripts that cut its output apart with grep and head rely on that order.
 * The hash is the one of tdb, which weighs each byte by its place. */
static unsigned chain_of(const char *key)
{
	uint32_t hash = 0x238f13afu * (uint32_t)strlen(key);

	for (unsigned i = 0; key[i]; i++)
		hash += (uint32_t)(uint8_t)key[i] << (i * 5 % 24);
	return (1103515243u * hash + 12345u) % 512;
}

const char **ox_qemu_order(json_t *object, size_t *count)
{
	const char **keys = ox_xcalloc(json_object_size(object) + 1, sizeof(*keys));
	const char *key;
	const json_t *value;

	*count = 0;
	json_object_foreach(object, key, value)
	{
		size_t at = (*count)++;

		/* A chain's newest member is its first. */
		for (; at > 0 && chain_of(keys[at - 1]) >= chain_of(key); at--)
			keys[at] = keys[at - 1];
		keys[at] = key;
	}
	return keys;
}

static void print_value(const json_t *value, unsigned depth)
{
	OX_FREE const char **keys = NULL;
	size_t count;

	switch (json_typeof(value)) {
	case JSON_OBJECT:
		keys = ox_qemu_order((json_t *)value, &count);
		fputs("{\n", stdout);
		for (size_t i = 0; i < count; i++) {
			printf("%*s\"%s\": ", (int)(4 * depth + 4), "", keys[i]);
			print_value(json_object_get(value, keys[i]), depth + 1);
			fputs(i + 1 < count ? ",\n" : "\n", stdout);
		}
		printf("%*s}", (int)(4 * depth), "");
		break;
	case JSON_ARRAY:
		count = json_array_size(value);
		fputs("[\n", stdout);
		for (size_t i = 0; i < count; i++) {
			printf("%*s", (int)(4 * depth + 4), "");
			print_value(json_array_get(value, i), depth + 1);
			fputs(i + 1 < count ? ",\n" : "\n", stdout);
		}
		printf("%*s]", (int)(4 * depth), "");
		break;
	default:
		/* A failed write is found when standard output is closed. */
		(void)!json_dumpf(value, stdout, JSON_ENCODE_ANY | JSON_ENSURE_ASCII);
	}
}

void ox_qemu_print_json(const json_t *value)
{
	print_value(value, 0);
	putchar('\n');
}

json_t *ox_json_file_name(const char *name)
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

/* --- progress --------------------------------------------------------------------------------- */

static void print_progress(double percent)
{
	printf("    (%3.2f/100%%)\r", percent);
	fflush(stdout);
}

void ox_progress_begin(struct ox_progress *progress)
{
	progress->last = 0;
	if (progress->on)
		print_progress(0);
}

void ox_progress_update(struct ox_progress *progress, uint64_t done, uint64_t total)
{
	double percent = total ? 100.0 * (double)done / (double)total : 100.0;

	if (!progress->on || percent - progress->last < 1.0)
		return;
	progress->last = percent;
	print_progress(percent);
}

void ox_progress_end(const struct ox_progress *progress, bool complete)
{
	if (!progress->on)
		return;
	if (complete)
		print_progress(100);
	putchar('\n');
}
