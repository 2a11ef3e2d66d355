/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Making a new image.
 *
 * Order, so that nobody's data is lost by a slip: the file is opened without truncation, the
 * write lock is taken (a running guest's disk is refused here), and only then is the old content
 * dropped.  A file that this call made is removed when a later step fails; one that was there
 * before stays, whatever it holds by then.  A block device keeps its size: it must be large
 * enough, and the format says what becomes of its content.
 */
#include "image/generic.h"
#include "base/text.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

/* The path behind "file:"; NULL for a store that has no file ("memory:1G"). */
static const char *file_path(const char *name)
{
	const char *colon = strchr(name, ':');
	const char *slash = strchr(name, '/');
	struct stat st;

	if (strncmp(name, "file:", 5) == 0)
		return name + 5;
	if (!colon || (slash && slash < colon) || stat(name, &st) == 0)
		return name;
	for (const char *const *scheme = (const char *const[]){"null:", "memory:", "faulty:", NULL};
	     *scheme; scheme++) {
		if (strncmp(name, *scheme, strlen(*scheme)) == 0)
			return NULL;
	}
	return name;
}

/* Makes the file unless it is there; *made says which.  The store opens it then. */
static int make_file(struct ox_opener *opener, const char *path, bool *made, struct ox_error *err)
{
	struct stat st;
	int fd = ox_open(opener, path, O_RDWR | O_CREAT | O_EXCL | O_NOCTTY, 0644);

	*made = fd >= 0;
	if (fd >= 0) {
		close(fd);
		return 0;
	}
	if (fd != -EEXIST)
		return ox_error_set(err, -fd, "%s: cannot create it: %s", path, strerror(-fd));
	if (stat(path, &st) < 0)
		return ox_error_set(err, errno, "%s: a link that leads nowhere: %s", path,
		                    strerror(errno));
	if (S_ISDIR(st.st_mode))
		return ox_error_set(err, EISDIR, "%s: is a directory", path);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return ox_error_set(err, EINVAL, "%s: is neither a file nor a block device", path);
	return 0;
}

/* --- options ------------------------------------------------------------------------------- */

static const char *find_value(const struct ox_create_option *options, unsigned count,
                              const char *name)
{
	for (unsigned i = 0; i < count; i++) {
		if (strcmp(options[i].name, name) == 0)
			return options[i].value;
	}
	return NULL;
}

const char *ox_create_option(const struct ox_image_create_options *options, const char *name)
{
	return find_value(options->options, options->option_count, name);
}

const char *ox_create_resolved(const struct ox_image_create_options *options, const char *name)
{
	return find_value(options->resolved, options->resolved_count, name);
}

void ox_create_resolve_add(struct ox_image_create_options *options, const char *name,
                           const char *value)
{
	unsigned count = options->resolved_count;
	struct ox_create_option *grown = ox_xcalloc(count + 1, sizeof(*grown));

	if (count > 0)
		memcpy(grown, options->resolved, count * sizeof(*grown));
	grown[count].name = ox_xstrdup(name);
	grown[count].value = ox_xstrdup(value);
	free(options->resolved);
	options->resolved = grown;
	options->resolved_count = count + 1;
}

void ox_image_create_options_free(struct ox_image_create_options *options)
{
	for (unsigned i = 0; i < options->resolved_count; i++) {
		free(options->resolved[i].name);
		free(options->resolved[i].value);
	}
	free(options->resolved);
	options->resolved = NULL;
	options->resolved_count = 0;
}

static const char *format_name(const struct ox_image_create_options *options)
{
	return options->format ? options->format : "raw";
}

/* "a, b and c" */
static char *list_words(const struct ox_create_word *words)
{
	char *list = ox_xstrdup("");

	for (const struct ox_create_word *word = words; word->name; word++) {
		const char *between = word == words ? "" : word[1].name ? ", " : " and ";
		char *longer = ox_xasprintf("%s%s%s", list, between, word->name);

		free(list);
		list = longer;
	}
	return list;
}

static int unknown_word(const struct ox_image_create_options *options, const char *name,
                        const struct ox_create_word *words, struct ox_error *err)
{
	OX_FREE char *list = list_words(words);
	OX_FREE const char **names = NULL;
	const char *near;
	size_t count = 0;

	while (words[count].name)
		count++;
	names = ox_xcalloc(count + 1, sizeof(*names));
	for (size_t i = 0; i < count; i++)
		names[i] = words[i].name;
	near = ox_nearest_word(name, names);
	if (near)
		return ox_error_set(err, EINVAL, "%s images have no option '%s'; did you mean %s?",
		                    format_name(options), name, near);
	if (count == 0)
		return ox_error_set(err, EINVAL, "%s images have no option '%s'",
		                    format_name(options), name);
	return ox_error_set(err, EINVAL, "%s images have no option '%s'; their options are %s",
	                    format_name(options), name, list);
}

int ox_create_check_words(const struct ox_image_create_options *options,
                          const struct ox_create_word *words, struct ox_error *err)
{
	for (unsigned i = 0; i < options->option_count; i++) {
		const struct ox_create_option *option = &options->options[i];
		const struct ox_create_word *word = words;

		while (word->name && strcmp(word->name, option->name) != 0)
			word++;
		if (!word->name)
			return unknown_word(options, option->name, words, err);
		if (!option->value)
			return ox_error_set(err, EINVAL, "option %s needs a value: -o %s=VALUE",
			                    option->name, option->name);
	}
	return 0;
}

/* The backing file must be there and be an image of its format; if no size was given, its own is
 * taken.  Its own backing files are not looked at. */
static int look_at_backing(struct ox_image_create_options *options, struct ox_error *err)
{
	OX_FREE char *path = ox_image_resolve_name(options->path, options->backing_file);
	struct ox_image_options open_options = {
	        .format = options->backing_format,
	        .store = {.read_only = true,
	                  .aio = OX_AIO_SYNC,
	                  .lock = OX_LOCK_NONE,
	                  .opener = options->opener},
	        .allow = {.nothing = true},
	};
	struct ox_image *backing;
	int rc = ox_image_open(path, &open_options, &backing, err);

	if (rc < 0)
		return rc;
	if (!options->has_size)
		options->size = ox_image_size_now(backing);
	options->has_size = true;
	ox_image_close(backing);
	return 0;
}

static int resolve_backing(struct ox_image_create_options *options, struct ox_error *err)
{
	if (!options->backing_file) {
		if (options->backing_format)
			return ox_error_set(err, EINVAL,
			                    "%s: a backing format is given (-F), but no backing "
			                    "file (-b)",
			                    options->path);
		return 0;
	}
	if (!options->backing_format)
		return ox_error_set(err, EINVAL,
		                    "%s: a backing file without a given format is refused, "
		                    "because a guest could make it look like another: say -F "
		                    "raw, -F qcow2, ...",
		                    options->path);
	if (!ox_format_find(options->backing_format)) {
		const char *near = ox_nearest_word(options->backing_format, ox_format_names());

		if (near && ox_format_find(near))
			return ox_error_set(err, EINVAL,
			                    "there is no backing format '%s'; did you mean %s?",
			                    options->backing_format, near);
		return ox_error_set(err, EINVAL, "this version has no backing format '%s'",
		                    options->backing_format);
	}
	return options->unsafe_backing ? 0 : look_at_backing(options, err);
}

int ox_image_create_resolve(struct ox_image_create_options *options, struct ox_error *err)
{
	const struct ox_format_ops *ops = ox_format_find(format_name(options));
	const struct ox_format_maintenance *m = ops ? ops->maintenance : NULL;
	int rc;

	if (!m || !m->create_co)
		return ox_error_set(err, ENOTSUP, "%s: this version cannot create %s images",
		                    options->path, format_name(options));
	ox_image_create_options_free(options);
	if (m->create_words) {
		rc = ox_create_check_words(options, m->create_words, err);
		if (rc < 0)
			return rc;
	}
	rc = resolve_backing(options, err);
	if (rc < 0)
		return rc;
	if (!options->has_size)
		return ox_error_set(err, EINVAL,
		                    "%s: the SIZE is missing%s; see 'oxbow create --help'",
		                    options->path,
		                    options->backing_file ? " (with -u the backing file is not "
		                                            "asked for its own)"
		                                          : "");
	if (options->size > INT64_MAX - 511)
		return ox_error_set(err, EFBIG, "%s: the size is too large", options->path);
	return m->create_resolve ? m->create_resolve(options, err) : 0;
}

/* --- creation ------------------------------------------------------------------------------ */

struct fill {
	struct ox_store *store;
	const struct ox_format_ops *ops;
	const struct ox_image_create_options *options;
	struct ox_error *err;
	int result;
};

static void fill_co(struct ox_loop *loop, void *arg)
{
	struct fill *fill = arg;
	struct ox_channel *channel;

	fill->result = ox_store_attach(fill->store, loop, &channel, fill->err);
	if (fill->result < 0)
		return;
	fill->result = fill->ops->maintenance->create_co(channel, fill->options, fill->err);
	ox_store_detach(channel);
}

static int fill_store(struct ox_store *store, const struct ox_format_ops *ops,
                      const struct ox_image_create_options *options, struct ox_error *err)
{
	struct fill fill = {.store = store, .ops = ops, .options = options, .err = err};
	int rc;

	if (!options->keep_content && store->size > 0) {
		rc = ox_store_truncate(store, 0, OX_PREALLOC_OFF, NULL, NULL, err);
		if (rc < 0)
			return rc;
	}
	rc = ox_image_run_private(fill_co, &fill, err);
	return rc < 0 ? rc : fill.result;
}

int ox_image_create(struct ox_image_create_options *options, struct ox_error *err)
{
	struct ox_opener *opener = options->opener ? options->opener : &ox_opener_direct;
	const char *path = file_path(options->path);
	struct ox_store_options store_options = {
	        .aio = OX_AIO_SYNC,
	        .lock = OX_LOCK_WRITE,
	        .write_granularity = 1,
	        .opener = opener,
	};
	struct ox_store *store = NULL;
	bool made = false;
	struct stat st;
	int rc = 0;

	if (options->resolved_count == 0)
		rc = ox_image_create_resolve(options, err);
	if (rc < 0)
		return rc;
	if (path) {
		rc = make_file(opener, path, &made, err);
		if (rc < 0)
			return rc;
		if (stat(path, &st) == 0 && S_ISBLK(st.st_mode))
			options->keep_content = true;
	}
	rc = ox_store_open(options->path, &store_options, &store, err);
	if (rc == 0)
		rc = fill_store(store, ox_format_find(format_name(options)), options, err);
	/* Removed while the lock is held, so that it is still ours. */
	if (rc < 0 && made)
		unlink(path);
	ox_store_close(store);
	return rc;
}
