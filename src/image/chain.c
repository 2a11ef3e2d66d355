/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The files that an image's header names: backing files and data files.
 *
 * An image may come from a stranger, and its header can name any file of the host: a guest that
 * then reads its disk reads that file.  So a named file is opened only if it lies, all links
 * followed, below the directory of the image that names it or below one that the user allowed;
 * names that QEMU would take for a protocol or for JSON are refused, and so are our own test
 * stores.  What the user said himself (allow.anything) is not questioned.
 *
 * The check and the opening are two steps: whoever can replace directories between them can write
 * to an allowed directory already, and could put the file's content there.
 */
#include "image/generic.h"
#include <ctype.h>
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <string.h>

/* Where the directory part of a path ends: behind its last slash, or behind the stores that wrap
 * another ("faulty:RULES:"). */
static size_t directory_length(const char *path)
{
	const char *start = path;
	const char *slash;

	while (strncmp(start, "faulty:", 7) == 0 && strchr(start + 7, ':'))
		start = strchr(start + 7, ':') + 1;
	if (strncmp(start, "file:", 5) == 0)
		start += 5;
	slash = strrchr(start, '/');
	return (size_t)(slash ? slash + 1 - path : start - path);
}

/* The path alone, without the stores that wrap it. */
static const char *bare_path(const char *path)
{
	while (strncmp(path, "faulty:", 7) == 0 && strchr(path + 7, ':'))
		path = strchr(path + 7, ':') + 1;
	return strncmp(path, "file:", 5) == 0 ? path + 5 : path;
}

/* A colon before the first slash, as QEMU sees it. */
static bool has_scheme(const char *name)
{
	size_t length = strcspn(name, ":/");

	return name[length] == ':';
}

static bool is_test_store(const char *name)
{
	return strncmp(name, "faulty:", 7) == 0 || strncmp(name, "memory:", 7) == 0;
}

char *ox_image_resolve_name(const char *path, const char *name)
{
	if (is_test_store(name))
		return ox_xstrdup(name);
	if (strncmp(name, "file:", 5) == 0)
		name += 5;
	if (name[0] == '/')
		return ox_xstrdup(name);
	return ox_xasprintf("%.*s%s", (int)directory_length(path), path, name);
}

/* Does `path` lie below `dir`?  Both are results of realpath(). */
static bool is_below(const char *path, const char *dir)
{
	size_t length = strlen(dir);

	while (length > 0 && dir[length - 1] == '/')
		length--;
	return strncmp(path, dir, length) == 0 && path[length] == '/';
}

static bool is_allowed(const struct ox_allow *allow, const char *own_dir, const char *real)
{
	if (own_dir && is_below(real, own_dir))
		return true;
	for (const char *const *dir = allow->dirs; dir && *dir; dir++) {
		OX_FREE char *real_dir = realpath(*dir, NULL);

		if (real_dir && is_below(real, real_dir))
			return true;
	}
	return false;
}

static int check_name(const char *image_path, const char *name, struct ox_error *err)
{
	const char *plain = strncmp(name, "file:", 5) == 0 ? name + 5 : name;

	if (strncmp(name, "json:", 5) == 0)
		return ox_error_set(err, EACCES,
		                    "%s: its header names a file by a \"json:\" text, which is "
		                    "refused; give it a plain file name (qemu-img rebase -u -b "
		                    "FILE -F FORMAT)",
		                    image_path);
	if (plain == name && has_scheme(name))
		return ox_error_set(err, EACCES,
		                    "%s: its header names '%s', which is not a file but an "
		                    "address or a device of another kind; that is refused",
		                    image_path, name);
	if (!*plain)
		return ox_error_set(err, EINVAL, "%s: its header names a file without a name",
		                    image_path);
	return 0;
}

int ox_image_allowed_name(const struct ox_allow *allow, const char *image_path, const char *name,
                          char **path, struct ox_error *err)
{
	OX_FREE char *resolved = NULL;
	OX_FREE char *real = NULL;
	OX_FREE char *own = NULL;
	OX_FREE char *own_dir = NULL;
	int rc;

	*path = NULL;
	if (!(allow->anything && is_test_store(name))) {
		rc = check_name(image_path, name, err);
		if (rc < 0)
			return rc;
	}
	resolved = ox_image_resolve_name(image_path, name);
	if (!allow->anything) {
		real = realpath(bare_path(resolved), NULL);
		if (!real)
			return ox_error_set(err, errno, "%s: its header names %s: %s", image_path,
			                    resolved, strerror(errno));
		own = realpath(bare_path(image_path), NULL);
		own_dir = own ? ox_xasprintf("%.*s", (int)directory_length(own), own) : NULL;
		if (!is_allowed(allow, own_dir, real))
			return ox_error_set(err, EACCES,
			                    "%s: its header names %s, which lies outside the "
			                    "image's directory; if that is right, add "
			                    "--allow-dir %s",
			                    image_path, resolved, dirname(real));
	}
	*path = ox_steal_ptr(resolved);
	return 0;
}
