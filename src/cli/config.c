/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The configuration file of `oxbow serve --config`: [global], and one section for each disk.
 *
 * The parser is inih.  It tells its handler neither the line nor the beginning of a section, cuts
 * lines at 199 bytes and section names and keys at 49, and gives continued lines as the same key
 * again.  So lines reach it through a reader of ours, which counts them, sees the sections begin,
 * and keeps the whole line for the handler to take a long value from.
 */
#include "cli/options.h"
#include "base/text.h"
#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <stdio.h>
#include <string.h>

#define MAX_WORD 49 /* bytes of a section's name or a key that inih keeps */

struct reader {
	struct ox_serve_config *config;
	const char *path;
	FILE *file;
	uint64_t skip;
	char *line; /* the whole one */
	size_t line_size;
	unsigned number;
	bool cut;     /* inih got a part of the line only */
	bool handled; /* the handler was called for this line, or there is nothing in it */
	char section[MAX_WORD + 1];
	bool global;
	uint64_t global_given;
	int status;
	struct ox_error *err;
};

static int fail(struct reader *r, const char *section, const char *key, const char *text)
{
	if (r->status == 0)
		r->status = ox_error_set(r->err, EINVAL, "%s:%u: %s%s%s%s%s%s", r->path, r->number,
		                         *section ? "[" : "", section, *section ? "] " : "",
		                         key ? key : "", key ? ": " : "", text);
	return 0;
}

/* Cuts white space off both ends. */
static char *strip(char *text)
{
	size_t length;

	while (isspace((unsigned char)*text))
		text++;
	length = strlen(text);
	while (length && isspace((unsigned char)text[length - 1]))
		text[--length] = '\0';
	return text;
}

/* The value in a line that was too long for inih, by inih's rules: behind the first = or :, up to
 * a semicolon that follows white space. */
static char *value_of_line(char *line)
{
	char *value = line + strcspn(line, "=:");

	if (*value)
		value++;
	for (char *p = value; *p; p++) {
		if (*p == ';' && p > value && isspace((unsigned char)p[-1])) {
			*p = '\0';
			break;
		}
	}
	return strip(value);
}

static const struct ox_serve_key *find_key(const char *name, unsigned *index)
{
	for (unsigned i = 0; i < ox_serve_key_count; i++) {
		if (!(ox_serve_keys[i].flags & OX_SERVE_CLI_ONLY) &&
		    !strcmp(ox_serve_keys[i].name, name)) {
			*index = i;
			return &ox_serve_keys[i];
		}
	}
	return NULL;
}

static int unknown_key(struct reader *r, const char *key)
{
	enum ox_serve_scope scope = r->global ? OX_SERVE_GLOBAL : OX_SERVE_DISK;
	const char *names[64 + 1];
	unsigned count = 0;
	const char *nearest;
	char text[160];

	for (unsigned i = 0; i < ox_serve_key_count; i++) {
		if (!(ox_serve_keys[i].flags & OX_SERVE_CLI_ONLY) &&
		    ox_serve_keys[i].scope == scope)
			names[count++] = ox_serve_keys[i].name;
	}
	names[count] = NULL;
	nearest = ox_nearest_word(key, names);
	if (nearest)
		snprintf(text, sizeof(text), "there is no such key; did you mean '%s'?", nearest);
	else
		snprintf(text, sizeof(text),
		         "there is no such key; 'oxbow serve --help' lists them");
	return fail(r, r->section, key, text);
}

/* inih's handler: 1 to go on, 0 on an error. */
static int handle(void *user, const char *section, const char *name, const char *value)
{
	struct reader *r = user;
	const struct ox_serve_key *key;
	struct ox_serve_disk *disk = NULL;
	struct ox_error err = {0};
	uint64_t *given;
	unsigned index;

	r->handled = true;
	if (r->status < 0)
		return 0;
	if (!*r->section)
		return fail(r, "", name, "this stands before the first section, e.g. [global]");
	if (!*name)
		return fail(r, r->section, NULL, "there is no key in front of '='");
	if (r->cut)
		value = value_of_line(r->line);
	key = find_key(name, &index);
	if (!key)
		return unknown_key(r, name);
	if (r->global && key->scope != OX_SERVE_GLOBAL)
		return fail(r, r->section, name, "this belongs into the section of a disk");
	if (!r->global && key->scope != OX_SERVE_DISK)
		return fail(r, r->section, name, "this belongs into [global]");
	if (key->scope == OX_SERVE_DISK) {
		disk = &r->config->disks[r->config->count - 1];
		given = &disk->given;
	} else {
		given = &r->global_given;
	}
	if ((*given & (1ull << index)) && !(key->flags & OX_SERVE_MANY))
		return fail(r, r->section, name,
		            "this is given twice (an indented line continues the one above it)");
	*given |= 1ull << index;
	if (key->scope == OX_SERVE_GLOBAL && (r->skip & (1ull << index)) &&
	    !(key->flags & OX_SERVE_MANY))
		return 1;
	if (key->set(r->config, disk, value, &err) < 0)
		return fail(r, r->section, name, err.text);
	return 1;
}

/* A line "[name]": the disk begins. */
static void begin_section(struct reader *r, const char *start)
{
	size_t length = strcspn(start + 1, "]");
	char *where;

	if (start[1 + length] != ']') {
		fail(r, "", NULL, "']' is missing at the end of the section's name");
		return;
	}
	if (length == 0 || length > MAX_WORD) {
		fail(r, "", NULL, "a section's name has 1 to 49 characters");
		return;
	}
	memcpy(r->section, start + 1, length);
	r->section[length] = '\0';
	r->global = !strcmp(r->section, "global");
	if (r->global)
		return;
	for (unsigned i = 0; i < r->config->count; i++) {
		if (!strcmp(r->config->disks[i].name, r->section)) {
			fail(r, r->section, NULL, "there is a section of this name already");
			return;
		}
	}
	where = ox_xasprintf("%s:%u: [%s] ", r->path, r->number, r->section);
	ox_serve_config_add(r->config, where)->name = ox_xstrdup(r->section);
}

/* A line that inih neither gave to the handler nor understood? */
static void check_previous_line(struct reader *r)
{
	if (!r->handled)
		fail(r, r->section, NULL, "this line is neither [section] nor key = value");
}

/* inih's reader: fgets() for it. */
static char *read_line(char *to, int size, void *stream)
{
	struct reader *r = stream;
	ssize_t length;
	char *start;

	check_previous_line(r);
	if (r->status < 0)
		return NULL;
	length = getline(&r->line, &r->line_size, r->file);
	if (length < 0) {
		if (ferror(r->file) && r->status == 0)
			r->status =
			        ox_error_set(r->err, EIO, "%s: cannot read the configuration: %s",
			                     r->path, strerror(errno));
		r->handled = true;
		return NULL;
	}
	r->number++;
	if (strlen(r->line) != (size_t)length) {
		fail(r, "", NULL, "there is a zero byte in this line");
		return NULL;
	}
	start = r->line;
	if (r->number == 1 && !strncmp(start, "\xef\xbb\xbf", 3))
		start += 3;
	while (isspace((unsigned char)*start))
		start++;
	/* An indented '[' continues the value above it, as inih sees it. */
	r->handled = !*start || *start == '#' || *start == ';' || *start == '[';
	if (*start == '[') {
		begin_section(r, start);
		if (r->status < 0)
			return NULL;
	} else if (*start && *start != '#' && *start != ';' && strcspn(start, "=: \t") > MAX_WORD) {
		fail(r, r->section, NULL, "a key has at most 49 characters");
		return NULL;
	}
	/* inih discards what follows a full buffer: give it what fits, with the line's end. */
	r->cut = length > size - 1;
	if (r->cut && (size < 3 || *start == '['))
		fail(r, r->section, NULL, "this line is too long");
	snprintf(to, (size_t)size, "%.*s%s", r->cut ? size - 2 : size - 1,
	         *start == '[' ? start : r->line, r->cut ? "\n" : "");
	return r->status < 0 ? NULL : to;
}

int ox_serve_config_read(struct ox_serve_config *config, const char *path, uint64_t skip,
                         struct ox_error *err)
{
	struct reader r = {
	        .config = config, .path = path, .skip = skip, .handled = true, .err = err};

	r.file = fopen(path, "re");
	if (!r.file)
		return ox_error_set(err, errno, "%s: cannot read the configuration: %s", path,
		                    strerror(errno));
	if (ini_parse_stream(read_line, &r, handle, &r) != 0 && r.status == 0)
		fail(&r, r.section, NULL, "this line is neither [section] nor key = value");
	check_previous_line(&r);
	fclose(r.file);
	free(r.line);
	if (r.status == 0 && config->count == 0)
		return ox_error_set(err, EINVAL,
		                    "%s: there is no disk: a section for each is needed, e.g. "
		                    "[web01] with image and vhost-user-blk",
		                    path);
	return r.status;
}
