/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * qcow2 images made, looked at, resized, left by a killed process, and taken over.
 *
 *     test_qcow2_image                   the tests
 *     test_qcow2_image die PATH          writes, and is killed
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "image/qcow2/create.h"
#include "tests/lib/image_kit.h"
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)

static char dir[] = "/tmp/oxbow-qcow2-XXXXXX";
static char image_path[64], data_path[64];
static const char *self;

/* --- making ------------------------------------------------------------------------------------
 */

struct make {
	struct ox_image_create_options options;
	struct ox_create_option list[16];
	char text[512];
};

/* "name=value name=value" */
static void set_options(struct make *m, uint64_t size, const char *text)
{
	memset(m, 0, sizeof(*m));
	snprintf(m->text, sizeof(m->text), "%s", text);
	m->options.path = image_path;
	m->options.format = "qcow2";
	m->options.size = size;
	m->options.has_size = true;
	m->options.options = m->list;
	for (char *save, *word = strtok_r(m->text, " ", &save); word;
	     word = strtok_r(NULL, " ", &save)) {
		char *value = strchr(word, '=');

		*value++ = '\0';
		/* QEMU takes a relative name to be relative to where it runs. */
		if (!strcmp(value, "data.raw"))
			value = data_path;
		if (!strcmp(word, "backing"))
			m->options.backing_file = value;
		else
			m->list[m->options.option_count++] =
			        (struct ox_create_option){.name = word, .value = value};
	}
	if (m->options.backing_file) {
		m->options.backing_format = "raw";
		m->options.unsafe_backing = true;
	}
}

static void make_image(uint64_t size, const char *text)
{
	struct ox_error err = {0};
	struct make m;

	unlink(image_path);
	unlink(data_path);
	set_options(&m, size, text);
	if (ox_image_create(&m.options, &err) < 0)
		fail_msg("%s: %s", text, err.text);
	ox_image_create_options_free(&m.options);
}

/* What qemu-img thinks of it, if there is one. */
static void check_image(const char *what)
{
	const char *const argv[] = {"qemu-img", "check", "-q", image_path, NULL};
	char output[4096] = "";
	int status = kit_spawn(argv, output, sizeof(output));

	if (status == -1 || status == 127)
		return;
	if (status != 0)
		fail_msg("%s: qemu-img check: %d: %s", what, status, output);
}

static void test_options(void **state)
{
	static const struct {
		const char *given, *resolved;
	} cases[] = {
	        {"", "cluster_size=65536 extended_l2=off compression_type=zlib size=1000 "
	             "lazy_refcounts=off refcount_bits=16"},
	        {"backing=b.raw",
	         "cluster_size=65536 extended_l2=on compression_type=zlib size=1000 "
	         "backing_file=b.raw backing_fmt=raw lazy_refcounts=off refcount_bits=16"},
	        {"backing=b.raw extended_l2=off",
	         "cluster_size=65536 extended_l2=off compression_type=zlib size=1000 "
	         "backing_file=b.raw backing_fmt=raw lazy_refcounts=off refcount_bits=16"},
	        {"backing=b.raw cluster_size=8k",
	         "cluster_size=8192 extended_l2=off compression_type=zlib size=1000 "
	         "backing_file=b.raw backing_fmt=raw lazy_refcounts=off refcount_bits=16"},
	        {"backing=b.raw compat=v2",
	         "cluster_size=65536 extended_l2=off compression_type=zlib size=1000 compat=v2 "
	         "backing_file=b.raw backing_fmt=raw lazy_refcounts=off refcount_bits=16"},
	        {"refcount_bits=1 lazy_refcounts=yes preallocation=falloc compression_type=zstd "
	         "compat=1.1 cluster_size=2M extended_l2=true",
	         "cluster_size=2097152 extended_l2=on preallocation=falloc compression_type=zstd "
	         "size=1000 compat=1.1 lazy_refcounts=on refcount_bits=1"},
	        {"data_file_raw=on data_file=d.raw",
	         "cluster_size=65536 extended_l2=off compression_type=zlib size=1000 "
	         "data_file=d.raw data_file_raw=on lazy_refcounts=off refcount_bits=16"},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_error err = {0};
		char text[1024] = "";
		struct make m;

		set_options(&m, 1000, cases[i].given);
		if (ox_image_create_resolve(&m.options, &err) < 0)
			fail_msg("%s: %s", cases[i].given, err.text);
		for (unsigned k = 0; k < m.options.resolved_count; k++)
			snprintf(text + strlen(text), sizeof(text) - strlen(text), "%s%s=%s",
			         k ? " " : "", m.options.resolved[k].name,
			         m.options.resolved[k].value);
		assert_string_equal(text, cases[i].resolved);
		ox_image_create_options_free(&m.options);
	}
}

static void test_refused_options(void **state)
{
	static const struct {
		const char *given, *sentence;
	} cases[] = {
	        {"cluster_size=1000", "power of two from 512 to 2M"},
	        {"cluster_size=256", "power of two from 512 to 2M"},
	        {"cluster_size=4M", "power of two from 512 to 2M"},
	        {"cluster_size=x", "power of two from 512 to 2M"},
	        {"refcount_bits=3", "power of two from 1 to 64"},
	        {"refcount_bits=128", "power of two from 1 to 64"},
	        {"refcount_bits=0", "power of two from 1 to 64"},
	        {"compat=0.10 refcount_bits=8", "needs compat=1.1"},
	        {"compat=v2 lazy_refcounts=on", "needs compat=1.1"},
	        {"compat=v2 compression_type=zstd", "needs compat=1.1"},
	        {"compat=v2 extended_l2=on", "needs compat=1.1"},
	        {"compat=v2 data_file=x", "needs compat=1.1"},
	        {"compat=0.1", "compat is one of"},
	        {"compression_type=lzo", "compression_type is one of"},
	        {"preallocation=fallocate", "did you mean falloc?"},
	        {"lazy_refcounts=maybe", "lazy_refcounts is one of"},
	        {"extended_l2=on cluster_size=8k", "at least 16k"},
	        {"data_file_raw=on", "needs a data_file"},
	        {"data_file_raw=on data_file=x backing=b.raw", "cannot go together"},
	        {"backing=b.raw preallocation=metadata extended_l2=off", "extended_l2=on only"},
	        {"encryption=on", "use encrypt.format=luks"},
	        {"encrypt.format=aes encrypt.key-secret=s", "not safe"},
	        {"encrypt.key-secret=s", "encrypt.format=luks is missing"},
	        {"encrypt.format=luks", "key-secret"},
	        {"cluster_sise=4k", "did you mean cluster_size?"},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_error err = {0};
		struct make m;

		set_options(&m, 1 << 20, cases[i].given);
		assert_true(ox_image_create_resolve(&m.options, &err) < 0);
		if (!strstr(err.text, cases[i].sentence))
			fail_msg("%s: '%s' is not in '%s'", cases[i].given, cases[i].sentence,
			         err.text);
		ox_image_create_options_free(&m.options);
	}
}

/* Every cluster is somebody's, and counted. */
static void test_layout(void **state)
{
	static const uint64_t sizes[] = {
	        0,
	        1,
	        512,
	        65536,
	        65537,
	        10 * MIB,
	        GIB,
	        100 * GIB,
	        1024 * GIB,
	        1024 * 1024 * GIB,
	        INT64_MAX - 511,
	};
	static const char *const preallocs[] = {"off", "metadata"};

	for (unsigned n = 0; n < OX_ARRAY_SIZE(sizes) * 13 * 7 * 4; n++) {
		uint64_t size = sizes[n % 11], end;
		unsigned bits = 9 + n / 11 % 13, order = n / 143 % 7;
		struct qcow2_header header;
		struct qcow2_create c;
		struct qcow2_plan p;
		struct ox_error err = {0};
		struct make m;
		char text[128];
		int rc;

		snprintf(text, sizeof(text),
		         "cluster_size=%u refcount_bits=%u preallocation=%s extended_l2=%s",
		         1u << bits, 1u << order, preallocs[n / 1001 % 2],
		         n / 2002 && bits >= 14 ? "on" : "off");
		set_options(&m, size, text);
		assert_int_equal(qcow2_create_parse(&m.options, &c, &err), 0);
		rc = qcow2_create_plan(&m.options, &c, &p, &header, &err);
		qcow2_header_free(&header);
		if (rc < 0) {
			assert_int_equal(err.code, EFBIG);
			assert_true(size > GIB);
			continue;
		}
		end = p.data + p.data_count;
		assert_true(p.l1_entries <= QCOW2_MAX_L1_BYTES / 8);
		assert_true(p.l1_count * p.cluster >= p.l1_entries * UINT64_C(8));
		assert_true(p.block_count * p.refcounts_per_block >= end);
		assert_true((p.block_count - 1) * p.refcounts_per_block < end);
		assert_true(p.reftable_count * p.cluster >= p.block_count * 8);
		assert_true(p.reftable_count * p.cluster <= QCOW2_MAX_REFTABLE_BYTES);
		assert_int_equal(p.blocks, 1 + p.reftable_count);
		assert_int_equal(p.l1, p.blocks + p.block_count);
		assert_int_equal(p.tables, p.l1 + p.l1_count);
		assert_int_equal(p.data, p.tables + p.table_count);
	}
}

/* --- using -------------------------------------------------------------------------------------
 */

static const struct ox_image_options open_options = {
        .format = "qcow2",
        .store = {.aio = OX_AIO_THREADS,
                  .lock = OX_LOCK_WRITE,
                  .lock_timeout_ns = UINT64_C(5000000000)},
        .allow = {.anything = true},
};

struct job {
	enum { FILL, EXPECT, RESIZE, FLUSH } what;
	uint64_t offset, length;
	uint8_t byte;
	int result;
	struct ox_error err;
};

static int move_co(struct ox_image_channel *channel, const struct job *job, uint8_t *buffer)
{
	for (uint64_t at = 0; at < job->length; at += MIB) {
		uint64_t n = ox_min(job->length - at, MIB);
		int rc;

		memset(buffer, job->what == FILL ? job->byte : ~job->byte, MIB);
		if (job->what == FILL)
			rc = ox_image_write_co(channel, job->offset + at, buffer, n, 0);
		else
			rc = ox_image_read_co(channel, job->offset + at, buffer, n);
		if (rc < 0)
			return rc;
		for (uint64_t i = 0; job->what == EXPECT && i < n; i++) {
			if (buffer[i] != job->byte) {
				uint64_t where = job->offset + at + i;

				printf("# 0x%02x at %llu\n", buffer[i], (unsigned long long)where);
				return -EILSEQ;
			}
		}
	}
	return 0;
}

static void job_co(struct ox_image_channel *channel, void *arg)
{
	struct job *job = arg;
	uint8_t *buffer;

	if (job->what == RESIZE) {
		job->result = ox_image_resize_co(channel, job->length,
		                                 (enum ox_preallocation)job->byte, &job->err);
		return;
	}
	if (job->what == FLUSH) {
		job->result = ox_image_request_co(channel, OX_IO_FLUSH, 0, 0, 0);
		return;
	}
	buffer = malloc(MIB);
	job->result = move_co(channel, job, buffer);
	free(buffer);
}

static int run_job(struct kit *kit, struct job *job)
{
	const struct kit_work work = {.fn_co = job_co, .arg = job};

	kit_run(kit, &work, 1);
	return job->result;
}

static void open_image(struct kit *kit)
{
	struct ox_error err = {0};

	kit_start(kit, 1);
	if (kit_open(kit, image_path, &open_options, &err) < 0)
		fail_msg("%s", err.text);
}

static void close_image(struct kit *kit)
{
	assert_int_equal(kit_close(kit, true), 0);
	kit_stop(kit);
}

static void must(struct kit *kit, struct job job)
{
	if (run_job(kit, &job) < 0)
		fail_msg("job %d at %llu: %s %s", job.what, (unsigned long long)job.offset,
		         strerror(-job.result), job.err.text);
}

static void test_made(void **state)
{
	static const char *const texts[] = {
	        "",
	        "compat=v2",
	        "cluster_size=512",
	        "cluster_size=2M",
	        "refcount_bits=1",
	        "refcount_bits=64",
	        "lazy_refcounts=on compression_type=zstd",
	        "extended_l2=on",
	        "preallocation=metadata",
	        "preallocation=metadata compat=v2",
	        "preallocation=metadata extended_l2=on",
	        "preallocation=metadata cluster_size=512 refcount_bits=64",
	        "preallocation=falloc",
	        "preallocation=full refcount_bits=2",
	        "data_file=data.raw",
	        "data_file=data.raw data_file_raw=on",
	        "data_file=data.raw preallocation=full",
	};
	struct kit kit;

	for (size_t i = 0; i < OX_ARRAY_SIZE(texts); i++) {
		uint64_t size = 8 * MIB + 512;

		make_image(size, texts[i]);
		check_image(texts[i]);
		open_image(&kit);
		assert_int_equal(kit.image->size, size);
		must(&kit, (struct job){EXPECT, 0, size, 0});
		must(&kit, (struct job){FILL, 3 * MIB + 1024, MIB, 0x5a});
		must(&kit, (struct job){FILL, size - 4096, 4096, 0x77});
		close_image(&kit);
		check_image(texts[i]);
		open_image(&kit);
		must(&kit, (struct job){EXPECT, 3 * MIB + 1024, MIB, 0x5a});
		must(&kit, (struct job){EXPECT, 0, 3 * MIB + 1024, 0});
		must(&kit, (struct job){EXPECT, size - 4096, 4096, 0x77});
		close_image(&kit);
	}
}

static void test_resized(void **state)
{
	static const char *const texts[] = {
	        "",
	        "compat=v2",
	        "cluster_size=512",
	        "extended_l2=on",
	        "preallocation=metadata",
	        "data_file=data.raw",
	        "data_file=data.raw data_file_raw=on",
	};
	struct kit kit;

	for (size_t i = 0; i < OX_ARRAY_SIZE(texts); i++) {
		make_image(MIB + 512, texts[i]);
		open_image(&kit);
		must(&kit, (struct job){FILL, 0, MIB + 512, 0x11});
		/* With 512-byte clusters the L1 table moves; else it grows where it is. */
		must(&kit, (struct job){RESIZE, 0, 40 * MIB, OX_PREALLOC_OFF});
		assert_int_equal(kit.image->size, 40 * MIB);
		must(&kit, (struct job){EXPECT, 0, MIB + 512, 0x11});
		must(&kit, (struct job){EXPECT, MIB + 512, 39 * MIB - 512, 0});
		must(&kit, (struct job){FILL, 39 * MIB, MIB, 0x22});
		must(&kit, (struct job){RESIZE, 0, 500 * 512, OX_PREALLOC_OFF});
		must(&kit, (struct job){RESIZE, 0, 40 * MIB, OX_PREALLOC_OFF});
		must(&kit, (struct job){EXPECT, 0, 500 * 512, 0x11});
		must(&kit, (struct job){EXPECT, 500 * 512, 40 * MIB - 500 * 512, 0});
		must(&kit, (struct job){FILL, 30 * MIB, MIB, 0x33});
		must(&kit, (struct job){RESIZE, 0, 42 * MIB, OX_PREALLOC_FULL});
		must(&kit, (struct job){EXPECT, 40 * MIB, 2 * MIB, 0});
		close_image(&kit);
		check_image(texts[i]);
		open_image(&kit);
		assert_int_equal(kit.image->size, 42 * MIB);
		must(&kit, (struct job){EXPECT, 0, 500 * 512, 0x11});
		must(&kit, (struct job){EXPECT, 500 * 512, MIB, 0});
		must(&kit, (struct job){EXPECT, 30 * MIB, MIB, 0x33});
		close_image(&kit);
	}
}

static void test_resize_refused(void **state)
{
	struct job job = {RESIZE, 0, 200 * GIB, OX_PREALLOC_OFF};
	struct kit kit;

	make_image(MIB, "cluster_size=512");
	open_image(&kit);
	assert_true(run_job(&kit, &job) < 0);
	assert_non_null(strstr(job.err.text, "too many for clusters of 512 bytes"));
	job = (struct job){RESIZE, 0, 512, OX_PREALLOC_FULL};
	assert_true(run_job(&kit, &job) < 0);
	assert_non_null(strstr(job.err.text, "shrinks"));
	assert_int_equal(kit.image->size, MIB);
	close_image(&kit);
}

/* --- info --------------------------------------------------------------------------------------
 */

static json_t *info_of(struct ox_image_info *info)
{
	struct ox_image_options options = open_options;
	struct ox_error err = {0};
	struct ox_image *image;

	options.store.read_only = true;
	options.store.lock = OX_LOCK_NONE;
	options.allow = (struct ox_allow){.nothing = true};
	if (ox_image_open(image_path, &options, &image, &err) < 0 ||
	    ox_image_get_info(image, info, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_close(image);
	assert_string_equal(json_string_value(json_object_get(info->format_specific, "type")),
	                    "qcow2");
	return json_object_get(info->format_specific, "data");
}

static void expect_info(const char *text)
{
	struct ox_image_info info;
	json_t *data = info_of(&info);
	char *got;

	if (json_object_get(data, "data-file"))
		json_object_set_new(
		        data, "data-file",
		        json_string(strrchr(json_string_value(json_object_get(data, "data-file")),
		                            '/')));
	got = json_dumps(data, JSON_PRESERVE_ORDER | JSON_COMPACT);

	assert_string_equal(got, text);
	free(got);
	assert_null(info.snapshots);
	ox_image_info_free(&info);
}

static void test_info(void **state)
{
	make_image(MIB, "");
	expect_info("{\"compat\":\"1.1\",\"compression-type\":\"zlib\",\"lazy-refcounts\":false,"
	            "\"refcount-bits\":16,\"corrupt\":false,\"extended-l2\":false}");
	make_image(MIB, "compat=0.10");
	expect_info("{\"compat\":\"0.10\",\"compression-type\":\"zlib\",\"refcount-bits\":16}");
	make_image(MIB, "data_file=data.raw data_file_raw=on refcount_bits=8 extended_l2=on "
	                "lazy_refcounts=on compression_type=zstd");
	expect_info("{\"compat\":\"1.1\",\"compression-type\":\"zstd\",\"lazy-refcounts\":true,"
	            "\"refcount-bits\":8,\"data-file\":\"/data.raw\",\"data-file-raw\":true,"
	            "\"corrupt\":false,\"extended-l2\":true}");
}

/* --- opening -----------------------------------------------------------------------------------
 */

static void patch(uint64_t offset, uint64_t value, unsigned bytes)
{
	int fd = open(image_path, O_RDWR);
	uint8_t data[8];

	ox_put_be64(data, value);
	assert_true(fd >= 0);
	assert_int_equal(pwrite(fd, data + 8 - bytes, bytes, (off_t)offset), bytes);
	close(fd);
}

static void refuse_open(const struct ox_image_options *options, const char *sentence)
{
	struct ox_error err = {0};
	struct ox_image *image;

	assert_true(ox_image_open(image_path, options, &image, &err) < 0);
	if (!strstr(err.text, sentence))
		fail_msg("'%s' is not in '%s'", sentence, err.text);
}

static void open_well(const struct ox_image_options *options)
{
	struct ox_error err = {0};
	struct ox_image *image;

	if (ox_image_open(image_path, options, &image, &err) < 0)
		fail_msg("%s", err.text);
	ox_image_close(image);
}

static void test_opening(void **state)
{
	struct ox_image_options writer = open_options, reader = open_options, checker;

	reader.store.read_only = true;
	reader.store.lock = OX_LOCK_READ;
	checker = reader;
	checker.for_check = true;

	make_image(MIB, "");
	writer.store.lock = OX_LOCK_SHARED_WRITE;
	refuse_open(&writer, "cannot be shared between writers");
	writer.store.lock = OX_LOCK_WRITE;
	patch(72, QCOW2_INCOMPAT_CORRUPT, 8);
	refuse_open(&writer, "oxbow check -r all");
	open_well(&reader);
	patch(72, 0, 8);
	open_well(&writer);

	patch(40, UINT64_C(1) << 30, 8);
	refuse_open(&reader, "the L1 table (8 bytes at offset 1073741824) lies behind the end");
	make_image(MIB, "");
	patch(48, UINT64_C(1) << 30, 8);
	refuse_open(&reader, "the refcount table");
	open_well(&checker);
	make_image(MIB, "");
	patch(56, 0, 4);
	refuse_open(&reader, "there is no refcount table");
	make_image(MIB, "");
	patch(60, 1, 4);
	patch(64, UINT64_C(1) << 30, 8);
	refuse_open(&reader, "the snapshot table is at offset 1073741824, behind the end");
	open_well(&checker);
	make_image(MIB, "");
	patch(72, QCOW2_INCOMPAT_DATA_FILE, 8);
	refuse_open(&reader, "the header does not say which");
	make_image(MIB, "");
	patch(32, QCOW2_CRYPT_AES, 4);
	refuse_open(&writer, "legacy AES");
	refuse_open(&reader, "give its pass phrase");
	assert_int_equal(truncate(image_path, 50), 0);
	refuse_open(&reader, "too few");
	assert_int_equal(truncate(image_path, 0), 0);
	refuse_open(&reader, "too few");
}

/* An image that is only looked at stays as it is, byte for byte, whatever it holds. */
static void test_looking_writes_nothing(void **state)
{
	struct ox_image_options probing = open_options;
	uint8_t before[4096], after[4096];
	struct job job = {FILL, 0, 4096, 1};
	struct ox_error err = {0};
	struct kit kit;
	int fd;

	make_image(MIB, "");
	patch(88, UINT64_C(1) << 40, 8); /* an autoclear bit that nobody knows */
	fd = open(image_path, O_RDONLY);
	assert_int_equal(pread(fd, before, sizeof(before), 0), sizeof(before));
	probing.store.lock = OX_LOCK_NONE;
	kit_start(&kit, 1);
	assert_int_equal(kit_open(&kit, image_path, &probing, &err), 0);
	assert_int_equal(run_job(&kit, &job), -EROFS);
	assert_int_equal(kit_close(&kit, true), 0);
	kit_stop(&kit);
	assert_int_equal(pread(fd, after, sizeof(after), 0), sizeof(after));
	assert_memory_equal(before, after, sizeof(before));
	/* A writer clears it, before anything else. */
	open_image(&kit);
	must(&kit, (struct job){FILL, 0, 4096, 1});
	assert_int_equal(pread(fd, after, sizeof(after), 0), sizeof(after));
	assert_int_equal(ox_get_be64(after + 88), QCOW2_AUTOCLEAR_SESSION);
	close_image(&kit);
	assert_int_equal(pread(fd, after, sizeof(after), 0), sizeof(after));
	assert_int_equal(ox_get_be64(after + 88), 0);
	close(fd);
}

/* --- a killed process ----------------------------------------------------------------------------
 */

static int die(const char *path)
{
	struct ox_error err = {0};
	struct kit kit;
	struct job jobs[] = {{FILL, 0, 3 * MIB, 0x44},
	                     {FLUSH, 0, 0, 0},
	                     {FILL, MIB, MIB, 0x55},
	                     {FILL, 700 * MIB, 64 << 10, 0x66}};

	kit_start(&kit, 1);
	if (kit_open(&kit, path, &open_options, &err) < 0) {
		fprintf(stderr, "%s\n", err.text);
		return 1;
	}
	for (size_t i = 0; i < OX_ARRAY_SIZE(jobs); i++) {
		if (run_job(&kit, &jobs[i]) < 0)
			return 1;
	}
	raise(SIGKILL);
	return 1;
}

static void run_and_kill(void)
{
	const char *const argv[] = {self, "die", image_path, NULL};
	char output[1024] = "";

	if (kit_spawn(argv, output, sizeof(output)) != -1 && output[0])
		fail_msg("%s", output);
}

static void test_killed(void **state)
{
	static const char *const texts[] = {
	        "",
	        "compat=v2",
	        "cluster_size=4k",
	        "extended_l2=on",
	        "data_file=data.raw",
	        "preallocation=metadata",
	};
	struct kit kit;

	for (size_t i = 0; i < OX_ARRAY_SIZE(texts); i++) {
		make_image(GIB, texts[i]);
		run_and_kill();
		open_image(&kit);
		must(&kit, (struct job){EXPECT, 0, MIB, 0x44});
		must(&kit, (struct job){EXPECT, MIB, MIB, 0x55});
		must(&kit, (struct job){EXPECT, 2 * MIB, MIB, 0x44});
		must(&kit, (struct job){EXPECT, 3 * MIB, MIB, 0});
		must(&kit, (struct job){EXPECT, 700 * MIB, 64 << 10, 0x66});
		/* Also when nothing was written. */
		close_image(&kit);
		check_image(texts[i]);
		run_and_kill();
		run_and_kill();
		open_image(&kit);
		must(&kit, (struct job){FILL, 2 * MIB, MIB, 0x77});
		close_image(&kit);
		check_image(texts[i]);
		open_image(&kit);
		must(&kit, (struct job){EXPECT, MIB, MIB, 0x55});
		must(&kit, (struct job){EXPECT, 2 * MIB, MIB, 0x77});
		close_image(&kit);
	}
}

static int set_up(void **state)
{
	OX_FREE char *run = NULL;

	if (!mkdtemp(dir))
		return -1;
	run = ox_xasprintf("%s/run", dir);
	setenv("OXBOW_RUN_DIR", run, 1);
	snprintf(image_path, sizeof(image_path), "%s/image.qcow2", dir);
	snprintf(data_path, sizeof(data_path), "%s/data.raw", dir);
	return 0;
}

static int tear_down(void **state)
{
	OX_FREE char *command = ox_xasprintf("rm -r %s", dir);

	return system(command);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_options),
	        cmocka_unit_test(test_refused_options),
	        cmocka_unit_test(test_layout),
	        cmocka_unit_test(test_made),
	        cmocka_unit_test(test_resized),
	        cmocka_unit_test(test_resize_refused),
	        cmocka_unit_test(test_info),
	        cmocka_unit_test(test_opening),
	        cmocka_unit_test(test_looking_writes_nothing),
	        cmocka_unit_test(test_killed),
	};

	if (argc == 3 && strcmp(argv[1], "die") == 0)
		return die(argv[2]);
	self = argv[0];
	return cmocka_run_group_tests(tests, set_up, tear_down);
}
