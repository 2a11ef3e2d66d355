/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the subcommands that look into an image share: the options that say which image and how to
 * open it, JSON as qemu-img prints it, and the progress bar.
 */
#ifndef OX_CLI_TOOL_H
#define OX_CLI_TOOL_H

#include "image/image.h"
#include <getopt.h>
#include <jansson.h>

/* Long options without a letter, for the `val` of struct option. */
enum {
	OX_TOOL_OUTPUT = 0x100,
	OX_TOOL_OBJECT,
	OX_TOOL_KEY_SECRET,
	OX_TOOL_ALLOW_DIR,
	OX_TOOL_OTHER, /* from here on: the subcommand's own */
};
#define OX_TOOL_OPTION_FORMAT                          \
	{                                              \
		"format", required_argument, NULL, 'f' \
	}
#define OX_TOOL_OPTION_SHARE                          \
	{                                             \
		"force-share", no_argument, NULL, 'U' \
	}
#define OX_TOOL_OPTION_OUTPUT                                     \
	{                                                         \
		"output", required_argument, NULL, OX_TOOL_OUTPUT \
	}
#define OX_TOOL_OPTION_OBJECT                                     \
	{                                                         \
		"object", required_argument, NULL, OX_TOOL_OBJECT \
	}
#define OX_TOOL_OPTION_KEY_SECRET                                         \
	{                                                                 \
		"key-secret", required_argument, NULL, OX_TOOL_KEY_SECRET \
	}
#define OX_TOOL_OPTION_ALLOW_DIR                                        \
	{                                                               \
		"allow-dir", required_argument, NULL, OX_TOOL_ALLOW_DIR \
	}

struct ox_tool {
	const char *path;
	const char *format; /* NULL: guess */
	bool force_share, json;
	struct ox_secrets *secrets; /* NULL: none were given */
	const char *key_secret;
	const char **allow_dirs; /* NULL-terminated, or NULL */
	unsigned allow_count;
};

/* One of the options above: 1; another one: 0; a wrong value: -errno. */
int ox_tool_option(struct ox_tool *tool, int option, const char *value, struct ox_error *err)
        OX_MUST_CHECK;
/* The one argument behind the options: tool->path. False: it was said what is wrong. */
bool ox_tool_take_path(struct ox_tool *tool, const char *command, int argc, char **argv)
        OX_MUST_CHECK;
void ox_tool_free(struct ox_tool *tool);

/* The format that was given, or that the first bytes belong to. */
int ox_tool_find_format(const struct ox_tool *tool, const char *path, const char *given,
                        const char **format, struct ox_error *err) OX_MUST_CHECK;
/* To open the image read-only and without O_DIRECT; what the caller changes it changes. */
void ox_tool_image_options(const struct ox_tool *tool, struct ox_image_options *options);

/* --- output ----------------------------------------------------------------------------------- */

/* The members of an object in the order in which qemu-img prints them, to free; `count` of them. */
const char **ox_qemu_order(json_t *object, size_t *count);
/* As qemu-img prints JSON, with a newline behind. */
void ox_qemu_print_json(const json_t *value);
/* File names are bytes, JSON is UTF-8: what is not is shown as U+FFFD. */
json_t *ox_json_file_name(const char *name);

/* "    (12.34/100%)" on a line of its own, which is written over and over. */
struct ox_progress {
	bool on;
	double last; /* per cent */
};
void ox_progress_begin(struct ox_progress *progress);
void ox_progress_update(struct ox_progress *progress, uint64_t done, uint64_t total);
void ox_progress_end(const struct ox_progress *progress, bool complete);

#endif
