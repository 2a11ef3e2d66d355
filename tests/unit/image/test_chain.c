/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Chains: which named files are opened, maps and resizes that go down, creation with a backing
 * file.  The images are qcow2 and raw ones that this library makes.
 */
#include "map_format.h"
#include <fcntl.h>
#include <sys/stat.h>

static char dir[] = "/tmp/ox-chain-XXXXXX";
static char *made[64];
static unsigned made_count;

/* A path in the directory, which is removed at the end. */
static char *in_dir(const char *name)
{
	char *path = ox_xasprintf("%s/%s", dir, name);

	for (unsigned i = 0; i < made_count; i++) {
		if (strcmp(made[i], path) == 0) {
			free(path);
			return made[i];
		}
	}
	assert_true(made_count < OX_ARRAY_SIZE(made));
	made[made_count++] = path;
	return path;
}

static int make_dir(void **state)
{
	return mkdtemp(dir) && mkdir(in_dir("a"), 0700) == 0 && mkdir(in_dir("b"), 0700) == 0 ? 0
	                                                                                      : -1;
}

static int remove_dir(void **state)
{
	/* The last made first: files before the directories that they are in. */
	while (made_count > 0) {
		remove(made[--made_count]);
		free(made[made_count]);
	}
	return rmdir(dir);
}

static void create(const char *path, const char *format, uint64_t size, const char *backing,
                   const char *backing_format)
{
	struct ox_image_create_options options = {.path = path,
	                                          .format = format,
	                                          .size = size,
	                                          .has_size = size > 0,
	                                          .backing_file = backing,
	                                          .backing_format = backing_format,
	                                          .unsafe_backing = size > 0};
	struct ox_error err = {0};

	if (ox_image_create(&options, &err) < 0)
		fail_msg("create: %s", err.text);
	ox_image_create_options_free(&options);
}

static struct ox_image_options reading(void)
{
	return (struct ox_image_options){
	        .store = {.read_only = true, .aio = OX_AIO_SYNC, .lock = OX_LOCK_READ}};
}

static struct ox_image_options writing(void)
{
	return (struct ox_image_options){.store = {.aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE}};
}

static void assert_opens(const char *path, const struct ox_image_options *options)
{
	struct ox_error err = {0};
	struct ox_image *image;

	if (ox_image_open(path, options, &image, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_close(image);
}

static void assert_refused(const char *path, const struct ox_image_options *options, int code,
                           const char *says)
{
	struct ox_error err = {0};
	struct ox_image *image;

	assert_int_equal(ox_image_open(path, options, &image, &err), -code);
	if (!strstr(err.text, says))
		fail_msg("'%s' is not in: %s", says, err.text);
}

/* --- names --------------------------------------------------------------------------------------
 */

static void assert_resolves(const char *path, const char *name, const char *to)
{
	OX_FREE char *resolved = ox_image_resolve_name(path, name);

	assert_string_equal(resolved, to);
}

static void test_resolve(void **state)
{
	assert_resolves("disk", "base", "base");
	assert_resolves("a/disk", "base", "a/base");
	assert_resolves("/a/b/disk", "../base", "/a/b/../base");
	assert_resolves("/a/b/disk", "/base", "/base");
	assert_resolves("/a/b/disk", "file:base", "/a/b/base");
	assert_resolves("file:a/disk", "base", "file:a/base");
	assert_resolves("faulty:/r/rules:a/disk", "base", "faulty:/r/rules:a/base");
	assert_resolves("faulty::disk", "/base", "/base");
	assert_resolves("/a/disk", "memory:x:1M", "memory:x:1M");
}

static void assert_name(const struct ox_allow *allow, const char *image, const char *name, int code,
                        const char *says)
{
	struct ox_error err = {0};
	char *path = NULL;

	assert_int_equal(ox_image_allowed_name(allow, image, name, &path, &err), -code);
	if (code && !strstr(err.text, says))
		fail_msg("'%s' is not in: %s", says, err.text);
	if (!code)
		assert_string_equal(path, says);
	free(path);
}

static void test_names(void **state)
{
	const char *const dirs[] = {"/nonexistent", in_dir("b"), NULL};
	const struct ox_allow own = {0}, more = {.dirs = dirs}, all = {.anything = true};
	const char *disk = in_dir("a/disk"), *near = in_dir("a/near"), *far = in_dir("b/far");
	const char *link = in_dir("a/link");

	create(disk, "raw", 512, NULL, NULL);
	create(near, "raw", 512, NULL, NULL);
	create(far, "raw", 512, NULL, NULL);
	assert_int_equal(symlink("../b/far", link), 0);
	assert_name(&own, disk, "near", 0, near);
	assert_name(&own, disk, "file:near", 0, near);
	assert_name(&own, disk, near, 0, near);
	assert_name(&own, disk, far, EACCES, "--allow-dir");
	assert_name(&own, disk, far, EACCES, in_dir("b"));
	assert_name(&own, disk, "../b/far", EACCES, "--allow-dir");
	/* A link is where it leads to. */
	assert_name(&own, disk, "link", EACCES, "--allow-dir");
	assert_name(&more, disk, "link", 0, link);
	assert_name(&more, disk, far, 0, far);
	assert_name(&all, disk, far, 0, far);
	assert_name(&own, disk, "missing", ENOENT, "missing");
	/* "b" allows nothing below "bc". */
	assert_int_equal(mkdir(in_dir("bc"), 0700), 0);
	create(in_dir("bc/far"), "raw", 512, NULL, NULL);
	assert_name(&more, disk, in_dir("bc/far"), EACCES, "bc");
	/* Never, whatever is allowed: what is not a file. */
	assert_name(&all, disk, "json:{\"file\":\"x\"}", EACCES, "json:");
	assert_name(&all, disk, "nbd:localhost:10809", EACCES, "nbd:");
	assert_name(&all, disk, "nbd://localhost", EACCES, "nbd:");
	assert_name(&all, disk, "https://example.com/x", EACCES, "https:");
	assert_name(&all, disk, "null:1M", EACCES, "null:");
	assert_name(&all, disk, "", EINVAL, "without a name");
	assert_name(&own, disk, "memory:x:1M", EACCES, "memory:");
	assert_name(&own, disk, "faulty::near", EACCES, "faulty:");
	assert_name(&all, disk, "memory:x:1M", 0, "memory:x:1M");
	/* A device's neighbours are all the host's devices. */
	assert_name(&own, "/dev/null", "/dev/zero", EACCES, "--allow-dir /dev");
}

/* --- opening -------------------------------------------------------------------------------------
 */

static int depth_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	unsigned depth = 0;

	while (channel->backing) {
		channel = channel->backing;
		assert_true(channel->image->read_only);
		assert_int_equal(channel->image->store->options.lock, *(enum ox_lock_mode *)arg);
		depth++;
	}
	return (int)depth;
}

static void test_open(void **state)
{
	struct ox_image_options options = writing();
	enum ox_lock_mode lock = OX_LOCK_READ;
	struct ox_error err = {0};
	struct ox_store *store;
	struct ox_image *image;

	create(in_dir("a/base"), "raw", 1 << 20, NULL, NULL);
	create(in_dir("a/mid"), "qcow2", 2 << 20, "base", "raw");
	create(in_dir("a/top"), "qcow2", 3 << 20, "mid", "qcow2");
	assert_int_equal(ox_image_with(in_dir("a/top"), &options, depth_co, &lock, &err), 2);
	/* The base is locked against writers while it is open. */
	assert_int_equal(ox_image_open(in_dir("a/top"), &options, &image, &err), 0);
	assert_true(ox_store_open(in_dir("a/base"), &options.store, &store, &err) < 0);
	ox_image_close(image);
	ox_error_clear(&err);
	options.store.lock = lock = OX_LOCK_NONE;
	options.store.read_only = true;
	assert_int_equal(ox_image_with(in_dir("a/top"), &options, depth_co, &lock, &err), 2);
	/* Not for info, not for check. */
	options.allow.nothing = true;
	assert_int_equal(ox_image_with(in_dir("a/top"), &options, depth_co, &lock, &err), 0);
	options.allow.nothing = false;
	options.for_check = true;
	assert_int_equal(ox_image_with(in_dir("a/top"), &options, depth_co, &lock, &err), 0);
	/* A missing one is an error then, and only then. */
	remove(in_dir("a/base"));
	assert_opens(in_dir("a/top"), &options);
	options.for_check = false;
	assert_refused(in_dir("a/top"), &options, ENOENT, "base");
}

static void test_loops(void **state)
{
	const struct ox_image_options options = reading();

	create(in_dir("a/self"), "qcow2", 1 << 20, "self", "qcow2");
	assert_refused(in_dir("a/self"), &options, ELOOP, "leads back");
	create(in_dir("a/one"), "qcow2", 1 << 20, "two", "qcow2");
	create(in_dir("a/two"), "qcow2", 1 << 20, "one", "qcow2");
	assert_refused(in_dir("a/one"), &options, ELOOP, "leads back");
	/* Another name of the same file. */
	create(in_dir("a/linked"), "qcow2", 1 << 20, "other", "qcow2");
	assert_int_equal(link(in_dir("a/linked"), in_dir("a/other")), 0);
	assert_refused(in_dir("a/linked"), &options, ELOOP, "leads back");
}

/* A chain of itself cannot be told from a long one where there are no inodes. */
static void test_depth(void **state)
{
	struct ox_image_options options = reading();
	struct ox_image_create_options create_options = {.path = "memory:long:0",
	                                                 .format = "qcow2",
	                                                 .size = 1 << 20,
	                                                 .has_size = true,
	                                                 .backing_file = "memory:long:0",
	                                                 .backing_format = "qcow2",
	                                                 .unsafe_backing = true};
	struct ox_error err = {0};

	if (ox_image_create(&create_options, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_create_options_free(&create_options);
	options.allow.anything = true;
	assert_refused("memory:long:0", &options, ELOOP, "longer than");
	options.allow.anything = false;
	assert_refused("memory:long:0", &options, EACCES, "memory:");
}

/* --- a data file
 * ----------------------------------------------------------------------------------- */

static int write_and_read_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	uint8_t buf[4096];

	memset(buf, 7, sizeof(buf));
	assert_int_equal(ox_image_write_co(channel, 8192, buf, sizeof(buf), 0), 0);
	memset(buf, 0, sizeof(buf));
	assert_int_equal(ox_image_read_co(channel, 8192, buf, sizeof(buf)), 0);
	assert_bytes(buf, sizeof(buf), 7);
	return 0;
}

static int read_nothing_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	uint8_t buf[4096];

	assert_int_equal(ox_image_read_co(channel, 8192, buf, sizeof(buf)), -EIO);
	return 0;
}

static void test_data_file(void **state)
{
	struct ox_create_option data = {.name = (char *)"data_file", .value = (char *)"data"};
	struct ox_image_create_options options = {.path = in_dir("a/with-data"),
	                                          .format = "qcow2",
	                                          .size = 1 << 20,
	                                          .has_size = true,
	                                          .options = &data,
	                                          .option_count = 1};
	struct ox_image_options open_options = writing();
	struct ox_error err = {0};
	uint8_t byte = 0;
	int fd;

	in_dir("a/data");
	if (ox_image_create(&options, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_create_options_free(&options);
	if (ox_image_with(options.path, &open_options, write_and_read_co, NULL, &err) < 0)
		fail_msg("%s", err.text);
	fd = open(in_dir("a/data"), O_RDONLY);
	assert_int_equal(pread(fd, &byte, 1, 8192), 1);
	assert_int_equal(byte, 7);
	close(fd);
	/* Closed: its data is not there, and nothing else is taken for it. */
	open_options = reading();
	open_options.allow.nothing = true;
	assert_int_equal(ox_image_with(options.path, &open_options, read_nothing_co, NULL, &err),
	                 0);
}

/* --- maps and sizes
 * ---------------------------------------------------------------------------------- */

static void assert_entry(uint64_t offset, uint64_t length, unsigned depth, bool present, bool data,
                         bool zero)
{
	struct ox_map_entry entry;

	assert_int_equal(ox_image_map_co(fixture.channel[0], offset, 1 << 20, &entry), 0);
	assert_int_equal(entry.offset, offset);
	assert_int_equal(entry.length, length);
	assert_int_equal(entry.depth, depth);
	assert_int_equal(entry.present, present);
	assert_int_equal(entry.data, data);
	assert_int_equal(entry.zero, zero);
	assert_int_equal(entry.has_offset, data && !entry.compressed);
	assert_true(!entry.compressed || offset == 8192);
}

static void map_co(void)
{
	struct ox_image_channel *channel = fixture.channel[0], *backing = channel->backing;
	struct ox_map_entry entry;

	map_set_data(&fixture.top, 0, 4096, 1, false);
	map_set(&fixture.top, 4096, 4096, OX_EXTENT_ZERO);
	map_set_compressed(&fixture.top, 8192, 4096, 1);
	map_set_data(&fixture.below, 12288, 4096, 1, false);
	assert_entry(0, 4096, 0, true, true, false);
	assert_entry(4096, 4096, 0, true, false, true);
	assert_entry(8192, 4096, 0, true, true, false);
	assert_entry(12288, 4096, 1, true, true, false);
	assert_entry(16384, 16384, 1, true, false, true);
	/* Behind the backing image nobody says anything. */
	assert_entry(32768, (256 << 10) - 32768, 0, false, false, true);
	assert_int_equal(ox_image_map_co(channel, 100, 50, &entry), 0);
	assert_int_equal(entry.length, 50);
	assert_int_equal(entry.store_offset, ENTRY_OFFSET(fixture.top.entry[0]) + 100);
	assert_string_equal(entry.file, "memory:16M");
	assert_int_equal(ox_image_map_co(channel, 256 << 10, 1, &entry), -EINVAL);
	/* One that is named and not open cannot be told of. */
	fixture.top.image->backing_file = ox_xstrdup("base");
	channel->backing = NULL;
	assert_int_equal(ox_image_map_co(channel, 12288, 1, &entry), -EIO);
	channel->backing = backing;
}

static void test_map(void **state)
{
	map_run(&(struct map_test){.backing = 32768, .fn_co = map_co});
}

static int map_raw_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct ox_map_entry entry;

	assert_int_equal(ox_image_map_co(channel, 0, UINT64_MAX, &entry), 0);
	assert_true(entry.present && entry.data && !entry.zero && entry.has_offset);
	assert_true(entry.length >= 4096 && entry.length < 1 << 20);
	assert_int_equal(ox_image_map_co(channel, 512 << 10, UINT64_MAX, &entry), 0);
	assert_true(entry.present && !entry.data && entry.zero && entry.has_offset);
	assert_int_equal(entry.store_offset, 512 << 10);
	assert_int_equal(entry.length, 512 << 10);
	return 0;
}

static void test_map_raw(void **state)
{
	struct ox_image_options options = reading();
	struct ox_error err = {0};
	int fd;

	create(in_dir("a/holes"), "raw", 1 << 20, NULL, NULL);
	fd = open(in_dir("a/holes"), O_WRONLY);
	assert_int_equal(pwrite(fd, dir, sizeof(dir), 0), sizeof(dir));
	close(fd);
	options.format = "raw";
	assert_int_equal(ox_image_with(in_dir("a/holes"), &options, map_raw_co, NULL, &err), 0);
}

/* What a longer backing image has behind the old end stays hidden. */
static void grow_co(void)
{
	static uint8_t buf[32768];
	struct ox_error err = {0};

	map_set_data(&fixture.below, 0, 65536, 9, false);
	assert_int_equal(ox_image_resize_co(fixture.channel[0], 65536, OX_PREALLOC_OFF, &err), 0);
	assert_int_equal(fixture.top.image->size, 65536);
	assert_int_equal(op_co(OX_IO_READ, 0, buf, 16384 + 512, 0), 0);
	assert_bytes(buf, 16384 + 512, 9);
	assert_int_equal(op_co(OX_IO_READ, 16384 + 512, buf, 32768, 0), 0);
	assert_bytes(buf, 32768, 0);
	assert_int_equal(op_co(OX_IO_READ, 49152 + 512, buf, 16384 - 512, 0), 0);
	assert_bytes(buf, 16384 - 512, 0);
	assert_int_equal(ox_image_resize_co(fixture.channel[0], 1000, OX_PREALLOC_OFF, &err),
	                 -EINVAL);
	/* If it cannot be hidden the size stays. */
	ox_error_clear(&err);
	map_set_data(&fixture.below, 65536, 32768, 9, false);
	fixture.top.prepare_rc = -ENOSPC;
	fixture.top.ops.zero_co = NULL;
	assert_int_equal(ox_image_resize_co(fixture.channel[0], 98304, OX_PREALLOC_OFF, &err),
	                 -ENOSPC);
	assert_int_equal(fixture.top.image->size, 65536);
	assert_non_null(strstr(err.text, "cannot be changed"));
}

static void test_grow(void **state)
{
	map_run(&(struct map_test){.size = 16896, .backing = 128 << 10, .fn_co = grow_co});
}

/* --- creation with a backing file
 * ----------------------------------------------------------------------- */

static void assert_not_created(struct ox_image_create_options *options, int code, const char *says)
{
	struct ox_error err = {0};
	struct stat st;

	assert_int_equal(ox_image_create(options, &err), -code);
	if (!strstr(err.text, says))
		fail_msg("'%s' is not in: %s", says, err.text);
	ox_image_create_options_free(options);
	assert_int_equal(stat(options->path, &st), -1);
}

static void test_create(void **state)
{
	struct ox_image_create_options options = {.path = in_dir("a/new"), .format = "qcow2"};
	struct ox_create_option wrong = {.name = (char *)"cluster_sise", .value = (char *)"64k"};
	struct ox_image_options open_options = reading();
	struct ox_error err = {0};
	struct ox_image *image;

	create(in_dir("a/odd"), "raw", 777 * 512, NULL, NULL);
	assert_not_created(&options, EINVAL, "SIZE is missing");
	options.backing_file = "odd";
	assert_not_created(&options, EINVAL, "-F");
	options.backing_format = "rwa";
	assert_not_created(&options, EINVAL, "did you mean raw");
	options.backing_format = "qcow2";
	assert_not_created(&options, EINVAL, "odd");
	options.backing_format = "raw";
	options.option_count = 1;
	options.options = &wrong;
	assert_not_created(&options, EINVAL, "did you mean cluster_size");
	options.option_count = 0;
	options.unsafe_backing = true;
	assert_not_created(&options, EINVAL, "SIZE is missing");
	options.unsafe_backing = false;
	if (ox_image_create(&options, &err) < 0)
		fail_msg("%s", err.text);
	assert_int_equal(options.size, 777 * 512);
	ox_image_create_options_free(&options);
	assert_int_equal(ox_image_open(options.path, &open_options, &image, &err), 0);
	assert_int_equal(image->size, 777 * 512);
	assert_string_equal(image->backing->ops->name, "raw");
	ox_image_close(image);
	/* Only with -u for one that is not there. */
	options.path = in_dir("a/newer");
	options.backing_file = "nowhere";
	options.has_size = true;
	assert_not_created(&options, ENOENT, "nowhere");
	options.format = "raw";
	options.unsafe_backing = true;
	assert_not_created(&options, EINVAL, "no backing file");
	options.format = "qcow2";
	assert_int_equal(ox_image_create(&options, &err), 0);
	ox_image_create_options_free(&options);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_resolve), cmocka_unit_test(test_names),
	        cmocka_unit_test(test_open),    cmocka_unit_test(test_loops),
	        cmocka_unit_test(test_depth),   cmocka_unit_test(test_data_file),
	        cmocka_unit_test(test_map),     cmocka_unit_test(test_map_raw),
	        cmocka_unit_test(test_grow),    cmocka_unit_test(test_create),
	};

	return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
