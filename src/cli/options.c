/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The settings of `oxbow serve`: what each is called, what it may be, and what contradicts what.
 * The command line and the configuration file both go through this table, so that they cannot
 * come to differ.
 */
#include "cli/options.h"
#include "base/text.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define MAX_IOTHREADS     64
#define MAX_QUEUES        64
#define MAX_POLL_US       1000000
#define MIN_BLOCK_SIZE    512
#define MAX_BLOCK_SIZE    32768
#define MAX_WORDS         16
#define DEFAULT_IOTHREADS 1
#define MIN_METADATA      (64u << 10)
#define MAX_METADATA      (UINT64_C(1) << 40)

/* Says that there is no such word, and which one may have been meant. */
static int bad_word(const char *what, const char *value, const char *const *words,
                    struct ox_error *err)
{
	const char *nearest = ox_nearest_word(value, words);
	char list[256];
	size_t used = 0;

	if (nearest)
		return ox_error_set(err, EINVAL, "there is no %s '%s'; did you mean '%s'?", what,
		                    value, nearest);
	list[0] = '\0';
	for (unsigned i = 0; words[i] && used < sizeof(list); i++)
		used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%s", i ? ", " : "",
		                         words[i]);
	return ox_error_set(err, EINVAL, "there is no %s '%s'; choose one of %s", what, value,
	                    list);
}

/* Defines set_NAME() for a setting whose words are those of an enumeration. */
#define DEFINE_WORD_SETTER(member, last, what)                                              \
	static int set_##member(struct ox_serve_config *config, struct ox_serve_disk *disk, \
	                        const char *value, struct ox_error *err)                    \
	{                                                                                   \
		const char *words[(last) + 2] = {NULL};                                     \
                                                                                            \
		if (ox_##member##_parse(value, &disk->disk.member))                         \
			return 0;                                                           \
		for (unsigned i = 0; i <= (last); i++)                                      \
			words[i] = ox_##member##_name(i);                                   \
		return bad_word(what, value, words, err);                                   \
	}
DEFINE_WORD_SETTER(cache, OX_CACHE_UNSAFE, "cache mode")
DEFINE_WORD_SETTER(aio, OX_AIO_IO_URING, "I/O engine")
DEFINE_WORD_SETTER(discard, OX_DISCARD_IGNORE, "way to treat discards")
DEFINE_WORD_SETTER(detect_zeroes, OX_DETECT_ZEROES_UNMAP, "way to detect zeroes")
#undef DEFINE_WORD_SETTER

static int parse_on_error(const char *value, enum ox_on_error *out, struct ox_error *err)
{
	const char *words[OX_ON_ERROR_ENOSPC + 2] = {NULL};

	if (ox_on_error_parse(value, out))
		return 0;
	for (unsigned i = 0; i <= OX_ON_ERROR_ENOSPC; i++)
		words[i] = ox_on_error_name(i);
	return bad_word("error policy", value, words, err);
}

static int set_rerror(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                      struct ox_error *err)
{
	return parse_on_error(value, &disk->disk.rerror, err);
}

static int set_werror(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                      struct ox_error *err)
{
	return parse_on_error(value, &disk->disk.werror, err);
}

bool ox_serve_parse_bool(const char *word, bool *out)
{
	static const char *const yes[] = {"yes", "true", "on", "1"};
	static const char *const no[] = {"no", "false", "off", "0"};

	for (unsigned i = 0; i < OX_ARRAY_SIZE(yes); i++) {
		if (!strcasecmp(word, yes[i])) {
			*out = true;
			return true;
		}
		if (!strcasecmp(word, no[i])) {
			*out = false;
			return true;
		}
	}
	return false;
}

static int parse_bool(const char *value, bool *out, struct ox_error *err)
{
	if (!ox_serve_parse_bool(value, out))
		return ox_error_set(err, EINVAL, "'%s' is neither yes nor no", value);
	return 0;
}

static int set_read_only(struct ox_serve_config *config, struct ox_serve_disk *disk,
                         const char *value, struct ox_error *err)
{
	return parse_bool(value, &disk->disk.read_only, err);
}

static int set_force_share(struct ox_serve_config *config, struct ox_serve_disk *disk,
                           const char *value, struct ox_error *err)
{
	return parse_bool(value, &disk->disk.no_lock, err);
}

static int set_share_rw(struct ox_serve_config *config, struct ox_serve_disk *disk,
                        const char *value, struct ox_error *err)
{
	return parse_bool(value, &disk->disk.share_rw, err);
}

static int set_string(char **to, const char *value, struct ox_error *err)
{
	if (!*value)
		return ox_error_set(err, EINVAL, "the value is empty");
	free(*to);
	*to = ox_xstrdup(value);
	return 0;
}

static int set_format(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                      struct ox_error *err)
{
	if (ox_format_find(value))
		return set_string(&disk->format, value, err);
	for (const char *const *known = ox_format_names(); *known; known++) {
		if (!strcmp(*known, value))
			return ox_error_set(err, ENOTSUP,
			                    "format %s is known and not supported by this version",
			                    value);
	}
	return bad_word("image format", value, ox_format_names(), err);
}

static int set_image(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                     struct ox_error *err)
{
	return set_string(&disk->image, value, err);
}

static int set_name(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                    struct ox_error *err)
{
	return set_string(&disk->name, value, err);
}

static int set_socket_path(struct ox_serve_config *config, struct ox_serve_disk *disk,
                           const char *value, struct ox_error *err)
{
	return set_string(&disk->socket_path, value, err);
}

static int set_fd(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                  struct ox_error *err)
{
	struct stat st;
	uint64_t fd;

	if (!ox_parse_uint(value, 0, INT_MAX, &fd))
		return ox_error_set(err, EINVAL, "'%s' is not a file descriptor's number", value);
	if (fstat((int)fd, &st) < 0)
		return ox_error_set(err, EBADF, "this program was not given a file descriptor %s",
		                    value);
	if (!S_ISSOCK(st.st_mode))
		return ox_error_set(err, ENOTSOCK, "file descriptor %s is not a socket", value);
	disk->fd = (int)fd;
	return 0;
}

static int set_queues(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                      struct ox_error *err)
{
	uint64_t queues = 0;

	if (strcmp(value, "auto") != 0 && !ox_parse_uint(value, 1, MAX_QUEUES, &queues))
		return ox_error_set(err, EINVAL, "'%s' is neither auto nor a number from 1 to %d",
		                    value, MAX_QUEUES);
	disk->queues = (unsigned)queues;
	return 0;
}

static int set_serial(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                      struct ox_error *err)
{
	size_t length = strlen(value);

	if (length == 0 || length > OX_DISK_SERIAL)
		return ox_error_set(err, EINVAL, "a serial number has 1 to %d characters, '%s' %zu",
		                    OX_DISK_SERIAL, value, length);
	for (size_t i = 0; i < length; i++) {
		if (!isascii(value[i]) || !isprint(value[i]))
			return ox_error_set(err, EINVAL,
			                    "a serial number consists of printable ASCII "
			                    "characters");
	}
	snprintf(disk->disk.serial, sizeof(disk->disk.serial), "%s", value);
	return 0;
}

static int parse_block_size(const char *value, uint32_t *out, struct ox_error *err)
{
	uint64_t size = 0;

	if (strcmp(value, "auto") != 0 &&
	    (!ox_parse_size(value, 1, &size) || size < MIN_BLOCK_SIZE || size > MAX_BLOCK_SIZE ||
	     !ox_is_power_of_2(size)))
		return ox_error_set(err, EINVAL,
		                    "'%s' is neither auto nor a power of two from %d to %d", value,
		                    MIN_BLOCK_SIZE, MAX_BLOCK_SIZE);
	*out = (uint32_t)size;
	return 0;
}

static int set_logical_block_size(struct ox_serve_config *config, struct ox_serve_disk *disk,
                                  const char *value, struct ox_error *err)
{
	return parse_block_size(value, &disk->disk.logical_block_size, err);
}

static int set_physical_block_size(struct ox_serve_config *config, struct ox_serve_disk *disk,
                                   const char *value, struct ox_error *err)
{
	return parse_block_size(value, &disk->disk.physical_block_size, err);
}

static int set_allow_dir(struct ox_serve_config *config, struct ox_serve_disk *disk,
                         const char *value, struct ox_error *err)
{
	char **dirs;
	struct stat st;

	if (!*value)
		return ox_error_set(err, EINVAL, "the value is empty");
	if (stat(value, &st) < 0)
		return ox_error_set(err, errno, "%s: %s", value, strerror(errno));
	if (!S_ISDIR(st.st_mode))
		return ox_error_set(err, ENOTDIR, "%s is not a directory", value);
	dirs = ox_xcalloc(disk->allow_count + 2, sizeof(*dirs));
	if (disk->allow_count)
		memcpy(dirs, disk->allow_dirs, disk->allow_count * sizeof(*dirs));
	dirs[disk->allow_count++] = ox_xstrdup(value);
	free(disk->allow_dirs);
	disk->allow_dirs = dirs;
	return 0;
}

static int set_metadata_cache(struct ox_serve_config *config, struct ox_serve_disk *disk,
                              const char *value, struct ox_error *err)
{
	uint64_t bytes;

	if (!ox_parse_size(value, 1, &bytes) || bytes < MIN_METADATA || bytes > MAX_METADATA)
		return ox_error_set(err, EINVAL, "'%s' is not a size from 64k to 1T", value);
	disk->disk.metadata_cache = bytes;
	return 0;
}

static int set_discard_no_unref(struct ox_serve_config *config, struct ox_serve_disk *disk,
                                const char *value, struct ox_error *err)
{
	return parse_bool(value, &disk->disk.discard_no_unref, err);
}

static int set_key_secret(struct ox_serve_config *config, struct ox_serve_disk *disk,
                          const char *value, struct ox_error *err)
{
	return set_string(&disk->key_secret, value, err);
}

static int set_object(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
                      struct ox_error *err)
{
	if (!config->secrets)
		config->secrets = ox_secrets_new();
	return ox_secrets_add(config->secrets, value, err);
}

static int set_control(struct ox_serve_config *config, struct ox_serve_disk *disk,
                       const char *value, struct ox_error *err)
{
	return set_string(&config->control, value, err);
}

static int set_iothreads(struct ox_serve_config *config, struct ox_serve_disk *disk,
                         const char *value, struct ox_error *err)
{
	uint64_t count;

	if (!ox_parse_uint(value, 1, MAX_IOTHREADS, &count))
		return ox_error_set(err, EINVAL, "'%s' is not a number from 1 to %d", value,
		                    MAX_IOTHREADS);
	config->iothreads = (unsigned)count;
	return 0;
}

static int set_poll_max_us(struct ox_serve_config *config, struct ox_serve_disk *disk,
                           const char *value, struct ox_error *err)
{
	uint64_t us;

	if (!ox_parse_uint(value, 0, MAX_POLL_US, &us))
		return ox_error_set(err, EINVAL,
		                    "'%s' is not a number of microseconds from 0 to %d", value,
		                    MAX_POLL_US);
	config->poll_max_ns = us * 1000;
	return 0;
}

const struct ox_serve_key ox_serve_keys[] = {
        {"image", 0, OX_SERVE_DISK, OX_SERVE_FILE_ONLY, set_image},
        {"blk-file", 0, OX_SERVE_DISK, OX_SERVE_CLI_ONLY | OX_SERVE_ONCE, set_image},
        {"format", 'f', OX_SERVE_DISK, 0, set_format},
        {"vhost-user-blk", 0, OX_SERVE_DISK, OX_SERVE_ONCE, set_socket_path},
        {"socket-path", 0, OX_SERVE_DISK, OX_SERVE_CLI_ONLY | OX_SERVE_ONCE, set_socket_path},
        {"fd", 0, OX_SERVE_DISK, OX_SERVE_CLI_ONLY | OX_SERVE_ONCE, set_fd},
        {"name", 0, OX_SERVE_DISK, OX_SERVE_CLI_ONLY, set_name},
        {"cache", 0, OX_SERVE_DISK, 0, set_cache},
        {"aio", 0, OX_SERVE_DISK, 0, set_aio},
        {"queues", 0, OX_SERVE_DISK, 0, set_queues},
        {"read-only", 0, OX_SERVE_DISK, OX_SERVE_FLAG, set_read_only},
        {"force-share", 'U', OX_SERVE_DISK, OX_SERVE_FLAG, set_force_share},
        {"share-rw", 0, OX_SERVE_DISK, OX_SERVE_FLAG, set_share_rw},
        {"allow-dir", 0, OX_SERVE_DISK, OX_SERVE_MANY, set_allow_dir},
        {"metadata-cache", 0, OX_SERVE_DISK, 0, set_metadata_cache},
        {"discard-no-unref", 0, OX_SERVE_DISK, 0, set_discard_no_unref},
        {"key-secret", 0, OX_SERVE_DISK, 0, set_key_secret},
        {"serial", 0, OX_SERVE_DISK, 0, set_serial},
        {"logical-block-size", 0, OX_SERVE_DISK, 0, set_logical_block_size},
        {"physical-block-size", 0, OX_SERVE_DISK, 0, set_physical_block_size},
        {"discard", 0, OX_SERVE_DISK, 0, set_discard},
        {"detect-zeroes", 0, OX_SERVE_DISK, 0, set_detect_zeroes},
        {"rerror", 0, OX_SERVE_DISK, 0, set_rerror},
        {"werror", 0, OX_SERVE_DISK, 0, set_werror},
        {"object", 0, OX_SERVE_GLOBAL, OX_SERVE_MANY, set_object},
        {"control", 0, OX_SERVE_GLOBAL, 0, set_control},
        {"iothreads", 0, OX_SERVE_GLOBAL, 0, set_iothreads},
        {"poll-max-us", 0, OX_SERVE_GLOBAL, 0, set_poll_max_us},
};
const unsigned ox_serve_key_count = OX_ARRAY_SIZE(ox_serve_keys);
_Static_assert(OX_ARRAY_SIZE(ox_serve_keys) <= 64, "a bit for each key");

void ox_serve_config_init(struct ox_serve_config *config)
{
	*config = (struct ox_serve_config){
	        .iothreads = DEFAULT_IOTHREADS,
	        .poll_max_ns = OX_LOOP_POLL_MAX_NS,
	};
}

void ox_serve_config_free(struct ox_serve_config *config)
{
	for (unsigned i = 0; i < config->count; i++) {
		struct ox_serve_disk *disk = &config->disks[i];

		free(disk->name);
		free(disk->image);
		free(disk->format);
		free(disk->key_secret);
		for (unsigned j = 0; j < disk->allow_count; j++)
			free(disk->allow_dirs[j]);
		free(disk->allow_dirs);
		free(disk->socket_path);
		free(disk->where);
	}
	free(config->disks);
	free(config->control);
	ox_secrets_free(config->secrets);
	*config = (struct ox_serve_config){0};
}

struct ox_serve_disk *ox_serve_config_add(struct ox_serve_config *config, char *where)
{
	struct ox_serve_disk *disks = ox_xcalloc(config->count + 1, sizeof(*disks));
	struct ox_serve_disk *disk = &disks[config->count];

	if (config->count)
		memcpy(disks, config->disks, config->count * sizeof(*disks));
	free(config->disks);
	config->disks = disks;
	config->count++;
	ox_disk_options_init(&disk->disk);
	disk->fd = -1;
	disk->where = where;
	return disk;
}

/* A key that is not there is said before anything starts. */
static int check_key(const struct ox_serve_config *config, const struct ox_serve_disk *disk,
                     const char *dashes, struct ox_error *err)
{
	struct ox_error why = {0};
	const uint8_t *bytes;
	size_t count;

	if (!disk->key_secret ||
	    ox_secrets_find(config->secrets, disk->key_secret, &bytes, &count, &why) == 0)
		return 0;
	return ox_error_set(err, why.code, "%s%skey-secret: %s", disk->where, dashes, why.text);
}

static int check_disk(const struct ox_serve_config *config, struct ox_serve_disk *disk,
                      struct ox_error *err)
{
	struct ox_disk_options *options = &disk->disk;
	/* How the reader of the message spells a setting. */
	const char *dashes = *disk->where ? "" : "--";

	if (!disk->image && *disk->where)
		return ox_error_set(err, EINVAL, "%simage is missing", disk->where);
	if (!disk->image)
		return ox_error_set(err, EINVAL, "the image is missing; see 'oxbow serve --help'");
	if (!disk->socket_path && disk->fd < 0)
		return ox_error_set(err, EINVAL, "%s%svhost-user-blk (a socket's path) is missing",
		                    disk->where, dashes);
	if (disk->socket_path && disk->fd >= 0)
		return ox_error_set(err, EINVAL, "--fd and a socket's path exclude each other");
	if (options->no_lock && !options->read_only)
		return ox_error_set(err, EINVAL,
		                    "%s%sforce-share does without locks, which only %sread-only "
		                    "disks may",
		                    disk->where, dashes, dashes);
	if (options->share_rw && options->read_only)
		return ox_error_set(err, EINVAL, "%s%sshare-rw and %sread-only exclude each other",
		                    disk->where, dashes, dashes);
	if (options->physical_block_size &&
	    options->physical_block_size < options->logical_block_size)
		return ox_error_set(err, EINVAL,
		                    "%s%sphysical-block-size %u is smaller than "
		                    "%slogical-block-size %u",
		                    disk->where, dashes, options->physical_block_size, dashes,
		                    options->logical_block_size);
	if (options->detect_zeroes == OX_DETECT_ZEROES_UNMAP &&
	    options->discard == OX_DISCARD_IGNORE)
		return ox_error_set(err, EINVAL, "%s%sdetect-zeroes=unmap needs %sdiscard=unmap",
		                    disk->where, dashes, dashes);
	if (check_key(config, disk, dashes, err) < 0)
		return -EINVAL;
	options->allow_dirs = (const char *const *)disk->allow_dirs;
	options->secrets = config->secrets;
	options->key_secret = disk->key_secret;
	options->path = disk->image;
	options->name = disk->name;
	options->format = disk->format;
	return 0;
}

/* Do two paths name one socket?  The sockets may not exist yet, their directories do. */
static bool is_same_socket(const char *a, const char *b)
{
	struct stat dir_a, dir_b;
	OX_FREE char *copy_a = ox_xstrdup(a), *copy_b = ox_xstrdup(b);
	char *slash_a = strrchr(copy_a, '/'), *slash_b = strrchr(copy_b, '/');

	if (strcmp(slash_a ? slash_a + 1 : copy_a, slash_b ? slash_b + 1 : copy_b) != 0)
		return false;
	if (slash_a)
		slash_a[slash_a == copy_a] = '\0';
	if (slash_b)
		slash_b[slash_b == copy_b] = '\0';
	if (stat(slash_a ? copy_a : ".", &dir_a) < 0 || stat(slash_b ? copy_b : ".", &dir_b) < 0)
		return !strcmp(a, b);
	return dir_a.st_dev == dir_b.st_dev && dir_a.st_ino == dir_b.st_ino;
}

int ox_serve_config_check(struct ox_serve_config *config, struct ox_error *err)
{
	for (unsigned i = 0; i < config->count; i++) {
		struct ox_serve_disk *disk = &config->disks[i];
		int ret = check_disk(config, disk, err);

		if (ret < 0)
			return ret;
		if (!disk->socket_path)
			continue;
		if (config->control && is_same_socket(disk->socket_path, config->control))
			return ox_error_set(err, EINVAL,
			                    "%svhost-user-blk: %s is the control socket too",
			                    disk->where, disk->socket_path);
		for (unsigned j = 0; j < i; j++) {
			const struct ox_serve_disk *other = &config->disks[j];

			if (other->socket_path &&
			    is_same_socket(disk->socket_path, other->socket_path))
				return ox_error_set(err, EINVAL,
				                    "%svhost-user-blk: %s is the socket of disk "
				                    "'%s' too",
				                    disk->where, disk->socket_path, other->name);
		}
	}
	return 0;
}
