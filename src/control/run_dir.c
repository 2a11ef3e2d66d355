/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Where running servers are found: a directory with a control socket PID.qmp for each.
 */
#include "base/text.h"
#include "control/qmp_internal.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <oxbow/log.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

const char *ox_run_dir(void)
{
	static char dir[PATH_MAX];
	const char *given = getenv("OXBOW_RUN_DIR");
	const char *base = getenv("XDG_RUNTIME_DIR");
	struct stat st;

	if (given && *given)
		snprintf(dir, sizeof(dir), "%s", given);
	else if (geteuid() == 0)
		snprintf(dir, sizeof(dir), "/run/oxbow");
	else if (base && *base)
		snprintf(dir, sizeof(dir), "%s/oxbow", base);
	else
		return NULL;
	if (mkdir(dir, 0700) < 0 && errno != EEXIST)
		return NULL;
	/* Somebody else's directory could hold somebody else's sockets. */
	if (stat(dir, &st) < 0 || !S_ISDIR(st.st_mode) || st.st_uid != geteuid() ||
	    (st.st_mode & S_IWOTH))
		return NULL;
	return dir;
}

/* The pid in "4711.qmp"; 0: another file. */
static long pid_of_file(const char *name)
{
	char digits[24];
	const char *dot = strstr(name, ".qmp");
	uint64_t pid;

	if (!dot || strcmp(dot, ".qmp") != 0 || (size_t)(dot - name) >= sizeof(digits))
		return 0;
	memcpy(digits, name, (size_t)(dot - name));
	digits[dot - name] = '\0';
	if (!ox_parse_uint(digits, 1, INT_MAX, &pid))
		return 0;
	return (long)pid;
}

void ox_run_dir_clean(void)
{
	const char *path = ox_run_dir();
	const struct dirent *entry;
	DIR *dir = path ? opendir(path) : NULL;

	if (!dir)
		return;
	while ((entry = readdir(dir))) {
		long pid = pid_of_file(entry->d_name);
		OX_FREE char *file = NULL;
		int fd = -1;

		/* The pid alone does not tell: in a container it may be another process's, or
		 * nobody's.  Refused alone does not either: the server may be starting. */
		if (!pid || kill((pid_t)pid, 0) == 0 || errno != ESRCH)
			continue;
		file = ox_xasprintf("%s/%s", path, entry->d_name);
		if (ox_unix_connect(file, &fd, NULL) == -ECONNREFUSED)
			unlink(file);
		if (fd >= 0)
			close(fd);
	}
	closedir(dir);
}

/* Does the server have the image open?  Fills server->device and size. */
static bool serves_image(struct ox_run_server *server, uint64_t dev, uint64_t ino)
{
	OX_FREE char *text = NULL;
	json_t *blocks, *block;
	size_t i;
	bool found = false;

	if (ox_qmp_execute(server->client, "query-block", NULL, &text, NULL) < 0)
		return false;
	blocks = json_loads(text, 0, NULL);
	json_array_foreach(blocks, i, block)
	{
		const char *device = json_string_value(json_object_get(block, "device"));
		const json_t *own = json_object_get(block, "oxbow");
		const json_t *image = json_object_get(json_object_get(block, "inserted"), "image");

		if (!device || !json_is_true(json_object_get(own, "active")) ||
		    (uint64_t)json_integer_value(json_object_get(own, "dev")) != dev ||
		    (uint64_t)json_integer_value(json_object_get(own, "ino")) != ino)
			continue;
		server->device = ox_xstrdup(device);
		server->size = (uint64_t)json_integer_value(json_object_get(image, "virtual-size"));
		found = true;
		break;
	}
	json_decref(blocks);
	return found;
}

int ox_run_dir_find_image(uint64_t dev, uint64_t ino, struct ox_run_server *server)
{
	const char *path = ox_run_dir();
	const struct dirent *entry;
	DIR *dir = path ? opendir(path) : NULL;
	bool found = false;

	if (!dir)
		return -ENOENT;
	while (!found && (entry = readdir(dir))) {
		OX_FREE char *file = NULL;

		*server = (struct ox_run_server){.pid = pid_of_file(entry->d_name)};
		if (!server->pid)
			continue;
		file = ox_xasprintf("%s/%s", path, entry->d_name);
		if (ox_qmp_connect(file, &server->client, NULL) < 0)
			continue;
		found = serves_image(server, dev, ino);
		if (!found)
			ox_qmp_disconnect(server->client);
	}
	closedir(dir);
	return found ? 0 : -ENOENT;
}
