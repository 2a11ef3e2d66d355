/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Random operations: the same script on an image and on a plain array, and both must agree.
 *
 * A script has rounds.  In a round several workers, each a fiber on one of the I/O threads, work
 * at once.  The disk is divided in granules, granule g is worker g % workers'; a worker touches
 * only its own, so what each byte must be is known at every moment although the workers share
 * clusters and subclusters.  The granule's size changes from round to round, from one sector to
 * the disk.  After a round everything is compared; between rounds the image is closed and opened,
 * grown and cut.  At the end our check, and for files qemu-img's check and compare, must agree.
 *
 * A sector's content says which operation wrote it and where it belongs; a sector that shows up
 * elsewhere is found even where nobody knows what it should be.
 *
 * OXBOW_SEED=N repeats a run (as far as the threads' timing goes), OXBOW_LONG=1 makes it longer,
 * OXBOW_ONLY=TEXT runs the scenarios whose names have it.
 */
#include "random_ops.h"
#include "base/byteorder.h"
#include "image/format.h"
#include "store/memory.h"
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define SECTOR      512u
#define SIZE        (2u << 20)
#define MAX_SIZE    (6u << 20)
#define FIBERS      3u /* of a thread */
#define MAX_WORKERS (4u * FIBERS)
#define HISTORY     200000u
#define BASE_ID     0xb0000000u

static const struct scenario scenarios[] = {
        {"raw", "raw", .memory = true},
        {"raw file", "raw"},
        {"qcow2, 512 B clusters", "qcow2", "cluster_size=512", .memory = true},
        {"qcow2, 512 B clusters, small cache", "qcow2", "cluster_size=512", .memory = true,
         .cache = 16384},
        {"qcow2, 4 KiB clusters", "qcow2", "cluster_size=4k", .memory = true},
        {"qcow2, 4 KiB clusters, file", "qcow2", "cluster_size=4k"},
        {"qcow2, 64 KiB clusters", "qcow2", NULL, .memory = true},
        {"qcow2, 64 KiB clusters, file", "qcow2", NULL},
        {"qcow2, 2 MiB clusters", "qcow2", "cluster_size=2M", .memory = true},
        {"qcow2, version 2", "qcow2", "compat=0.10", .memory = true},
        {"qcow2, version 2, overlay", "qcow2", "compat=0.10,cluster_size=4k", BASE_RAW},
        {"qcow2, lazy refcounts", "qcow2", "lazy_refcounts=on,cluster_size=4k", .memory = true},
        {"qcow2, refcounts of 1 bit", "qcow2", "refcount_bits=1,cluster_size=1k", .memory = true},
        {"qcow2, refcounts of 64 bits", "qcow2", "refcount_bits=64,cluster_size=1k",
         .memory = true},
        {"qcow2, discards keep their place", "qcow2", "cluster_size=4k", .memory = true,
         .no_unref = true},
        {"qcow2, subclusters", "qcow2", "extended_l2=on", .memory = true},
        {"qcow2, subclusters of 512 B, small cache", "qcow2", "extended_l2=on,cluster_size=16k",
         .memory = true, .cache = 32768},
        {"qcow2, subclusters over raw", "qcow2", "extended_l2=on", BASE_RAW},
        {"qcow2, subclusters of 512 B over short raw", "qcow2", "extended_l2=on,cluster_size=16k",
         BASE_RAW_SHORT},
        {"qcow2, subclusters over qcow2", "qcow2", "extended_l2=on", BASE_QCOW2},
        {"qcow2, overlay over long raw", "qcow2", "extended_l2=off,cluster_size=4k", BASE_RAW_LONG},
        {"qcow2, subclusters over long raw", "qcow2", "extended_l2=on", BASE_RAW_LONG},
        {"qcow2, overlay over deflated", "qcow2", "extended_l2=off", BASE_QCOW2_DEFLATE},
        {"qcow2, subclusters over zstd", "qcow2", "extended_l2=on", BASE_QCOW2_ZSTD},
        {"qcow2, overlay over qed", "qcow2", "extended_l2=off", BASE_QED},
        {"qcow2, deflated", "qcow2", NULL, BASE_NONE, MAKE_DEFLATE},
        {"qcow2, zstd", "qcow2", NULL, BASE_NONE, MAKE_ZSTD},
        {"qcow2, with a snapshot", "qcow2", "cluster_size=4k", BASE_NONE, MAKE_SNAPSHOT},
        {"qcow2, subclusters, with a snapshot", "qcow2", "extended_l2=on", BASE_RAW, MAKE_SNAPSHOT},
        {"qcow2, encrypted", "qcow2",
         "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10,cluster_size=4k",
         .secret = true},
        {"qcow2, encrypted, subclusters over raw", "qcow2",
         "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10,extended_l2=on",
         BASE_RAW, .secret = true},
        {"qcow2, data file", "qcow2", "cluster_size=4k", .data_file = true},
        {"qcow2, raw data file", "qcow2", "data_file_raw=on", .data_file = true},
        {"qcow2, data file, subclusters over raw", "qcow2", "extended_l2=on", BASE_RAW,
         .data_file = true},
        {"qed", "qed", NULL, .no_shrink = true},
        {"qed, 4 KiB clusters, memory", "qed", "cluster_size=4k,table_size=1", .memory = true,
         .no_shrink = true},
        {"qed, overlay", "qed", "cluster_size=4k,table_size=2", BASE_RAW_SHORT, .no_shrink = true},
        {"luks", "luks", "key-secret=sec0,iter-time=10", .secret = true, .no_shrink = true},
};

struct past { /* an operation that was begun */
	uint32_t id;
	uint16_t round;
	uint8_t worker, op;
	uint32_t first, count; /* sectors */
	bool zeroes;
};

static struct test {
	const struct scenario *scenario;
	struct kit kit;
	struct made made;
	struct ox_image_options options;
	uint8_t *model, *base; /* MAX_SIZE bytes; base: what is seen where the image has nothing */
	uint64_t size;
	unsigned round, workers;
	uint64_t granule; /* sectors */
	struct past *past;
	uint32_t past_count; /* atomic */
	pthread_mutex_t lock;
	bool failed; /* atomic */
	unsigned long operations;
} test;

struct worker {
	unsigned index, operations;
	uint64_t seed;
};

static const char *const op_names[] = {"read", "write", "flush", "zero", "discard", "erase"};

static __attribute__((format(printf, 1, 2))) void fail_test(const char *fmt, ...)
{
	va_list ap;

	pthread_mutex_lock(&test.lock);
	if (!__atomic_exchange_n(&test.failed, true, __ATOMIC_RELAXED)) {
		printf("# round %u, %u workers, granules of %llu sectors: ", test.round,
		       test.workers, (unsigned long long)test.granule);
		va_start(ap, fmt);
		vprintf(fmt, ap); /* NOLINT: the callers' formats are literals */
		va_end(ap);
		putchar('\n');
	}
	pthread_mutex_unlock(&test.lock);
}

static bool failed(void)
{
	return __atomic_load_n(&test.failed, __ATOMIC_RELAXED);
}

static void stamp(uint8_t *at, uint64_t first, uint64_t count, uint32_t id)
{
	for (uint64_t s = first; s < first + count; s++) {
		for (unsigned i = 0; i < SECTOR; i += 8, at += 8) {
			ox_put_le32(at, id);
			ox_put_le32(at + 4, (uint32_t)s);
		}
	}
}

/* What happened to a sector that is not as it should be. */
static void fail_sector(uint64_t sector, const uint8_t *found, const uint8_t *wanted)
{
	uint32_t count = ox_min(__atomic_load_n(&test.past_count, __ATOMIC_RELAXED), HISTORY);
	unsigned differ = 0, shown = 0;

	if (failed())
		return;
	while (differ < SECTOR && wanted && found[differ] == wanted[differ])
		differ++;
	fail_test("sector %llu (cluster %llu), byte %u: found operation %#x of sector %u, wanted "
	          "%#x of %u",
	          (unsigned long long)sector,
	          (unsigned long long)(sector * SECTOR / test.kit.image->cluster_size), differ,
	          ox_get_le32(found + differ / 8 * 8), ox_get_le32(found + differ / 8 * 8 + 4),
	          wanted ? ox_get_le32(wanted) : 0, wanted ? ox_get_le32(wanted + 4) : 0);
	pthread_mutex_lock(&test.lock);
	for (uint32_t i = count; i-- > 0 && shown < 12;) {
		const struct past *past = &test.past[i];

		if (sector < past->first || sector >= past->first + past->count)
			continue;
		printf("#   %#x: round %u worker %u %s%s %u+%u\n", past->id, past->round,
		       past->worker, op_names[past->op], past->zeroes ? " of zeroes" : "",
		       past->first, past->count);
		shown++;
	}
	pthread_mutex_unlock(&test.lock);
}

static uint32_t note(const struct worker *worker, uint8_t op, uint64_t first, uint64_t count,
                     bool zeroes)
{
	uint32_t index = __atomic_fetch_add(&test.past_count, 1, __ATOMIC_RELAXED);

	if (index < HISTORY)
		test.past[index] = (struct past){.id = index + 1,
		                                 .round = (uint16_t)test.round,
		                                 .worker = (uint8_t)worker->index,
		                                 .op = op,
		                                 .first = (uint32_t)first,
		                                 .count = (uint32_t)count,
		                                 .zeroes = zeroes};
	return index + 1;
}

static bool is_own(const struct worker *worker, uint64_t sector)
{
	return sector / test.granule % test.workers == worker->index;
}

static void check_read(const struct worker *worker, uint64_t first, uint64_t count,
                       const uint8_t *buf)
{
	for (uint64_t i = 0; i < count; i++, buf += SECTOR) {
		uint64_t sector = first + i;
		const uint8_t *wanted = test.model + sector * SECTOR;

		if (is_own(worker, sector)) {
			if (memcmp(buf, wanted, SECTOR) != 0)
				fail_sector(sector, buf, wanted);
		} else if (ox_get_le32(buf) != 0 && ox_get_le32(buf + 4) != sector) {
			fail_sector(sector, buf, NULL);
		}
	}
}

/* After a discard: each sector is what it was, or nothing, or the backing image's; it stays so. */
static void adopt(uint64_t first, uint64_t count, const uint8_t *buf)
{
	static const uint8_t zeroes[SECTOR];

	for (uint64_t i = 0; i < count; i++, buf += SECTOR) {
		uint8_t *model = test.model + (first + i) * SECTOR;

		if (memcmp(buf, model, SECTOR) != 0 && memcmp(buf, zeroes, SECTOR) != 0 &&
		    memcmp(buf, test.base + (first + i) * SECTOR, SECTOR) != 0)
			fail_sector(first + i, buf, model);
		memcpy(model, buf, SECTOR);
	}
}

/* A part of one of the worker's granules. */
static bool pick_range(struct worker *worker, uint64_t *first, uint64_t *count)
{
	uint64_t sectors = test.size / SECTOR;
	uint64_t granules = (sectors + test.granule - 1) / test.granule;
	uint64_t own = (granules + test.workers - 1 - worker->index) / test.workers, start, end;
	uint64_t length;

	if (own == 0)
		return false;
	start = (worker->index + kit_random(&worker->seed, own) * test.workers) * test.granule;
	end = ox_min(start + test.granule, sectors);
	if (start >= end)
		return false;
	*first = start + kit_random(&worker->seed, end - start);
	length = end - *first;
	switch (kit_random(&worker->seed, 4)) {
	case 0:
		length = ox_min(length, (uint64_t)8);
		break;
	case 1:
		length = ox_min(length, (uint64_t)160);
		break;
	case 2: /* aligned to what is often a cluster */
		*first = ox_max(start, ox_align_down(*first, 128));
		length = ox_min(end - *first, 128 + 128 * kit_random(&worker->seed, 3));
		break;
	default:
		length = ox_min(length, (uint64_t)1024);
		break;
	}
	*count = 1 + kit_random(&worker->seed, length);
	if (kit_random(&worker->seed, 3) == 0)
		*count = length;
	return true;
}

static int operate_co(struct ox_image_channel *channel, struct worker *worker, uint64_t first,
                      uint64_t count, uint8_t *buf)
{
	uint64_t offset = first * SECTOR, bytes = count * SECTOR;
	uint64_t dice = kit_random(&worker->seed, 100);
	size_t cut = kit_random(&worker->seed, 3) ? 0 : kit_random(&worker->seed, bytes);
	unsigned flags = kit_random(&worker->seed, 40) ? 0 : OX_IO_DSYNC;
	uint8_t *model = test.model + offset;
	uint32_t id;
	int ret;

	if (dice < 25) {
		memset(buf, 0xee, bytes);
		ret = kit_request_co(channel, OX_IO_READ, offset, buf, bytes, cut, 0);
		if (ret == 0)
			check_read(worker, first, count, buf);
	} else if (dice < 75) {
		bool zeroes = dice < 28;

		id = note(worker, OX_IO_WRITE, first, count, zeroes);
		if (zeroes)
			memset(buf, 0, bytes);
		else
			stamp(buf, first, count, id);
		memcpy(model, buf, bytes);
		ret = kit_request_co(channel, OX_IO_WRITE, offset, buf, bytes, cut, flags);
	} else if (dice < 86) {
		note(worker, OX_IO_ZERO, first, count, false);
		memset(model, 0, bytes);
		ret = kit_request_co(channel, OX_IO_ZERO, offset, NULL, bytes, 0,
		                     flags | (dice % 2 ? OX_IO_MAY_UNMAP : 0));
	} else if (dice < 96) {
		note(worker, OX_IO_DISCARD, first, count, false);
		ret = kit_request_co(channel, OX_IO_DISCARD, offset, NULL, bytes, 0, flags);
		memset(buf, 0xee, bytes);
		if (ret == 0)
			ret = kit_request_co(channel, OX_IO_READ, offset, buf, bytes, 0, 0);
		if (ret == 0)
			adopt(first, count, buf);
	} else {
		ret = kit_request_co(channel, OX_IO_FLUSH, 0, NULL, 0, 0, 0);
	}
	return ret;
}

static void worker_co(struct ox_image_channel *channel, void *arg)
{
	struct worker *worker = arg;
	uint8_t *buf = aligned_alloc(4096, ox_align_up(1024 * SECTOR, 4096));

	for (unsigned i = 0; i < worker->operations && !failed(); i++) {
		uint64_t first, count;
		int ret;

		if (!pick_range(worker, &first, &count))
			break;
		ret = operate_co(channel, worker, first, count, buf);
		if (ret < 0)
			fail_test("a request of sectors %llu+%llu: %s", (unsigned long long)first,
			          (unsigned long long)count, strerror(-ret));
	}
	free(buf);
}

/* --- between rounds ------------------------------------------------------------------------- */

static void verify_co(struct ox_image_channel *channel, void *arg)
{
	uint8_t *buf = aligned_alloc(4096, 1u << 20);

	for (uint64_t at = 0; at < test.size && !failed();) {
		uint64_t bytes = ox_min(test.size - at, UINT64_C(1) << 20);
		int ret;

		memset(buf, 0xee, bytes);
		ret = ox_image_read_co(channel, at, buf, bytes);
		if (ret < 0)
			fail_test("reading all at %llu: %s", (unsigned long long)at,
			          strerror(-ret));
		for (uint64_t s = 0; s < bytes / SECTOR && !failed(); s++) {
			if (memcmp(buf + s * SECTOR, test.model + at + s * SECTOR, SECTOR) != 0)
				fail_sector(at / SECTOR + s, buf + s * SECTOR,
				            test.model + at + s * SECTOR);
		}
		at += bytes;
	}
	free(buf);
}

/* A LUKS volume holds noise where nobody wrote. */
static void wipe_co(struct ox_image_channel *channel, void *arg)
{
	int ret = ox_image_write_co(channel, 0, test.model, test.size, 0);

	if (ret < 0)
		fail_test("the first write: %s", strerror(-ret));
}

static void check_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_image_check check = {0};
	struct ox_error err = {0};
	int ret;

	if (!channel->image->ops->maintenance || !channel->image->ops->maintenance->check_co)
		return;
	ret = ox_image_check_co(channel, &check, &err);
	if (!strcmp(test.scenario->format, "qed"))
		check.leaks = 0; /* space that two threads took and one used */
	if (ret < 0)
		fail_test("check: %s", err.text);
	else if (check.corruptions || check.check_errors || check.leaks)
		fail_test("check found %llu corruptions, %llu leaks, %llu errors",
		          (unsigned long long)check.corruptions, (unsigned long long)check.leaks,
		          (unsigned long long)check.check_errors);
}

struct resize {
	uint64_t size;
	int result;
	struct ox_error err;
};

static void resize_co(struct ox_image_channel *channel, void *arg)
{
	struct resize *resize = arg;

	resize->result = ox_image_resize_co(channel, resize->size, OX_PREALLOC_OFF, &resize->err);
}

static void on_one(void (*fn_co)(struct ox_image_channel *, void *), void *arg, uint64_t *seed)
{
	struct kit_work work = {(unsigned)kit_random(seed, test.kit.threads), fn_co, arg};

	if (!failed())
		kit_run(&test.kit, &work, 1);
}

static void resize(uint64_t *seed)
{
	bool grow = test.scenario->no_shrink || kit_random(seed, 3);
	uint64_t change = (1 + kit_random(seed, 1000)) * SECTOR;
	struct resize resize = {.size = grow ? test.size + change : test.size - change};

	if (resize.size > MAX_SIZE || failed())
		return;
	on_one(resize_co, &resize, seed);
	if (resize.result < 0) {
		fail_test("resize from %llu to %llu: %s", (unsigned long long)test.size,
		          (unsigned long long)resize.size, resize.err.text);
		return;
	}
	/* What was cut off does not come back, neither do a longer backing image's bytes. */
	if (!grow)
		memset(test.model + resize.size, 0, test.size - resize.size);
	memset(test.base + ox_min(test.size, resize.size), 0,
	       MAX_SIZE - ox_min(test.size, resize.size));
	test.size = resize.size;
	if (grow && !strcmp(test.scenario->format, "luks"))
		on_one(wipe_co, NULL, seed);
}

static bool reopen(struct ox_error *err)
{
	int ret = kit_close(&test.kit, true);

	if (ret < 0) {
		ox_error_set(err, -ret, "closing: %s", strerror(-ret));
		return false;
	}
	return kit_open(&test.kit, test.made.path, &test.options, err) == 0;
}

static void play_round(uint64_t *seed, unsigned operations)
{
	static const uint16_t granules[] = {1, 1, 2, 3, 8, 9, 32, 100, 128, 130};
	struct kit_work work[MAX_WORKERS];
	struct worker workers[MAX_WORKERS];
	uint64_t pick = kit_random(seed, OX_ARRAY_SIZE(granules) + 3);

	test.workers = test.kit.threads * FIBERS;
	if (pick < OX_ARRAY_SIZE(granules))
		test.granule = granules[pick];
	else if (pick == OX_ARRAY_SIZE(granules))
		test.granule = test.size / SECTOR / test.workers + 1;
	else /* one worker, the whole disk */
		test.granule = test.size / SECTOR + 1;
	for (unsigned i = 0; i < test.workers; i++) {
		workers[i] = (struct worker){.index = i,
		                             .operations = operations,
		                             .seed = kit_random(seed, INT64_MAX) + 1};
		work[i] = (struct kit_work){i % test.kit.threads, worker_co, &workers[i]};
	}
	kit_run(&test.kit, work, test.workers);
	test.operations += (unsigned long)test.workers * operations;
	on_one(verify_co, NULL, seed);
}

/* --- a scenario ------------------------------------------------------------------------------ */

static char dir[64];

static const char *in_dir(const char *name)
{
	static char path[96];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return path;
}

static void qemu_agrees(void)
{
	const struct scenario *scenario = test.scenario;
	OX_FREE char *secret = ox_xasprintf("secret,id=sec0,file=%s", in_dir("phrase"));
	OX_FREE char *opts = NULL;
	OX_FREE char *model = ox_xstrdup(in_dir("model"));
	char said[700];
	int status;

	if (!have_qemu() || failed())
		return;
	opts = ox_xasprintf("driver=%s,%s=sec0,file.filename=%s", scenario->format,
	                    strcmp(scenario->format, "luks") ? "encrypt.key-secret" : "key-secret",
	                    test.made.path);
	if (!strcmp(scenario->format, "qcow2") || !strcmp(scenario->format, "qed")) {
		status = scenario->secret
		                 ? kit_spawn((const char *const[]){"qemu-img", "check", "--object",
		                                                   secret, "--image-opts", opts,
		                                                   NULL},
		                             said, sizeof(said))
		                 : kit_spawn((const char *const[]){"qemu-img", "check", "-f",
		                                                   scenario->format, test.made.path,
		                                                   NULL},
		                             said, sizeof(said));
		if (status != 0 && (status != 3 || strcmp(scenario->format, "qed")))
			fail_test("qemu-img check (%d): %s", status, said);
	}
	if (!write_raw(model, test.model, test.size)) {
		fail_test("%s: %s", model, strerror(errno));
		return;
	}
	if (scenario->secret) {
		OX_FREE char *raw = ox_xasprintf("driver=raw,file.filename=%s", model);

		status = kit_spawn((const char *const[]){"qemu-img", "compare", "--object", secret,
		                                         "--image-opts", raw, opts, NULL},
		                   said, sizeof(said));
	} else {
		status = kit_spawn((const char *const[]){"qemu-img", "compare", "-f", "raw", "-F",
		                                         scenario->format, model, test.made.path,
		                                         NULL},
		                   said, sizeof(said));
	}
	if (status != 0)
		fail_test("qemu-img compare (%d): %s", status, said);
}

/* The snapshot still holds what it held. */
static void snapshot_agrees(void)
{
	OX_FREE char *out = ox_xstrdup(in_dir("out")), *saved = ox_xstrdup(in_dir("saved"));
	char said[700] = "";
	int status =
	        kit_spawn((const char *const[]){"qemu-img", "convert", "-l", "before", "-f",
	                                        "qcow2", "-O", "raw", test.made.path, out, NULL},
	                  said, sizeof(said));

	if (status == 0)
		status = kit_spawn((const char *const[]){"qemu-img", "compare", "-f", "raw", "-F",
		                                         "raw", saved, out, NULL},
		                   said, sizeof(said));
	if (status != 0)
		fail_test("the snapshot: %s", said);
}

static bool take_snapshot(uint64_t *seed, struct ox_error *err)
{
	int ret;

	play_round(seed, 30);
	ret = kit_close(&test.kit, true);
	if (ret < 0) {
		ox_error_set(err, -ret, "closing: %s", strerror(-ret));
		return false;
	}
	if (!write_raw(in_dir("saved"), test.model, test.size) ||
	    kit_spawn((const char *const[]){"qemu-img", "snapshot", "-c", "before", test.made.path,
	                                    NULL},
	              NULL, 0) != 0) {
		ox_error_set(err, EIO, "qemu-img snapshot failed");
		return false;
	}
	return kit_open(&test.kit, test.made.path, &test.options, err) == 0;
}

static void fill_model(void)
{
	const struct scenario *scenario = test.scenario;
	bool filled = scenario->base != BASE_NONE || scenario->maker == MAKE_DEFLATE ||
	              scenario->maker == MAKE_ZSTD;
	uint64_t end = SIZE;

	test.size = SIZE + 5 * SECTOR;
	memset(test.model, 0, MAX_SIZE);
	memset(test.base, 0, MAX_SIZE);
	if (!filled)
		return;
	if (scenario->base == BASE_RAW_LONG)
		end = MAX_SIZE;
	else if (scenario->base == BASE_RAW_SHORT)
		end = SIZE * 3 / 4 + 3 * SECTOR;
	/* With holes, so that zeroes are below as well. */
	for (uint64_t s = 0; s < end / SECTOR; s++) {
		if (s / 96 % 4 != 3)
			stamp(test.model + s * SECTOR, s, 1, BASE_ID);
	}
	if (scenario->base != BASE_NONE)
		memcpy(test.base, test.model, MAX_SIZE);
}

static uint64_t base_bytes(void)
{
	switch (test.scenario->base) {
	case BASE_RAW_LONG:
		return MAX_SIZE;
	case BASE_RAW_SHORT:
		return SIZE * 3 / 4 + 3 * SECTOR;
	default:
		return SIZE;
	}
}

static void set_options(const struct ox_secrets *secrets)
{
	const struct scenario *scenario = test.scenario;

	test.options = (struct ox_image_options){
	        .format = scenario->format,
	        .store = {.aio = OX_AIO_THREADS,
	                  .lock = OX_LOCK_WRITE,
	                  .lock_timeout_ns = UINT64_C(10) * 1000 * 1000 * 1000},
	        .allow.anything = true,
	        .metadata_cache = scenario->cache,
	        .discard_no_unref = scenario->no_unref,
	        .secrets = scenario->secret ? secrets : NULL,
	        .key_secret = scenario->secret ? "sec0" : NULL};
}

/* Why it was skipped, or NULL. */
static const char *run_scenario(const struct scenario *scenario, unsigned threads, uint64_t seed,
                                const struct ox_secrets *secrets)
{
	unsigned rounds = getenv("OXBOW_LONG") ? 40 : 5, operations = 400 / (threads * FIBERS);
	struct ox_error err = {0};

	test.scenario = scenario;
	test.past_count = 0;
	test.failed = false;
	test.operations = 0;
	test.round = 0;
	fill_model();
	ox_memory_forget("random");
	if (!scenario_make(scenario, dir, test.model, test.size, base_bytes(), &test.made, secrets,
	                   &err)) {
		fail_test("making it: %s", err.text);
		return NULL;
	}
	if (test.made.why_not)
		return test.made.why_not;
	/* What the overlay's end hides is not there. */
	memset(test.model + test.size, 0, MAX_SIZE - test.size);
	set_options(secrets);
	kit_start(&test.kit, threads);
	if (kit_open(&test.kit, test.made.path, &test.options, &err) < 0) {
		fail_test("open: %s", err.text);
		kit_stop(&test.kit);
		return NULL;
	}
	if (!strcmp(scenario->format, "luks"))
		on_one(wipe_co, NULL, &seed);
	on_one(verify_co, NULL, &seed);
	if (scenario->maker == MAKE_SNAPSHOT && !take_snapshot(&seed, &err))
		fail_test("%s", err.text);
	for (test.round = 1; test.round <= rounds && !failed(); test.round++) {
		play_round(&seed, operations);
		if (kit_random(&seed, 3) == 0 && scenario->maker != MAKE_SNAPSHOT)
			resize(&seed);
		if (kit_random(&seed, 2) == 0 && !failed() && !reopen(&err)) {
			fail_test("opening again: %s", err.text);
			break;
		}
		on_one(verify_co, NULL, &seed);
	}
	if (!failed() && !reopen(&err))
		fail_test("opening again: %s", err.text);
	on_one(verify_co, NULL, &seed);
	on_one(check_co, NULL, &seed);
	if (test.kit.image && kit_close(&test.kit, true) < 0)
		fail_test("closing");
	kit_stop(&test.kit);
	if (!scenario->memory)
		qemu_agrees();
	if (scenario->maker == MAKE_SNAPSHOT && !failed())
		snapshot_agrees();
	return NULL;
}

static void clean_up(bool all)
{
	static const char *const names[] = {"disk", "raw", "base", "model", "out", "saved"};

	for (unsigned i = 0; i < OX_ARRAY_SIZE(names); i++)
		unlink(in_dir(names[i]));
	ox_memory_forget("random");
	if (all) {
		unlink(in_dir("phrase"));
		kit_spawn((const char *const[]){"rm", "-rf", dir, NULL}, NULL, 0);
	}
}

int main(void)
{
	static const unsigned thread_counts[] = {1, 2, 4};
	bool is_long = getenv("OXBOW_LONG") != NULL;
	const char *given = getenv("OXBOW_SEED"), *only = getenv("OXBOW_ONLY");
	uint64_t seed = given ? strtoull(given, NULL, 0) : ox_clock_ns() | 1;
	struct ox_secrets *secrets = ox_secrets_new();
	bool keep = getenv("OXBOW_KEEP") != NULL;
	unsigned number = 0, failures = 0;
	struct ox_error err = {0};
	OX_FREE char *secret = NULL;

	setvbuf(stdout, NULL, _IOLBF, 0);
	setenv("OXBOW_LOG", "error", 0);
	if (!kit_make_dir(dir, sizeof(dir), "random") || mkdir(in_dir("run"), 0700) < 0 ||
	    setenv("OXBOW_RUN_DIR", in_dir("run"), 1) < 0 ||
	    !write_raw(in_dir("phrase"), (const uint8_t *)"open sesame", 11)) {
		printf("Bail out! %s: %s\n", dir, strerror(errno));
		return 1;
	}
	secret = ox_xasprintf("secret,id=sec0,file=%s", in_dir("phrase"));
	if (ox_secrets_add(secrets, secret, &err) < 0) {
		printf("Bail out! %s\n", err.text);
		return 1;
	}
	pthread_mutex_init(&test.lock, NULL);
	test.model = ox_xcalloc(1, MAX_SIZE);
	test.base = ox_xcalloc(1, MAX_SIZE);
	test.past = ox_xcalloc(HISTORY, sizeof(*test.past));
	/* By default one thread, and two or four in turn. */
	printf("1..%zu\n# OXBOW_SEED=%#llx repeats this run\n",
	       OX_ARRAY_SIZE(scenarios) * (is_long || only ? OX_ARRAY_SIZE(thread_counts) : 2),
	       (unsigned long long)seed);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(scenarios); i++) {
		for (unsigned t = 0; t < OX_ARRAY_SIZE(thread_counts); t++) {
			const struct scenario *scenario = &scenarios[i];
			const char *skip = NULL;

			if (only && !strstr(scenario->name, only))
				skip = "OXBOW_ONLY";
			else if (!is_long && !only && t == 1 + i % 2)
				continue;
			else
				skip = run_scenario(scenario, thread_counts[t],
				                    seed + i * 7919 + t * 104729, secrets);
			failures += !skip && failed();
			printf("%sok %u - %s, %u thread%s%s%s\n", !skip && failed() ? "not " : "",
			       ++number, scenario->name, thread_counts[t],
			       thread_counts[t] > 1 ? "s" : "", skip ? " # SKIP " : "",
			       skip ? skip : "");
			if (!skip && failed() && keep) {
				printf("# %s is kept\n", dir);
				return 1;
			}
			clean_up(false);
		}
	}
	clean_up(true);
	ox_secrets_free(secrets);
	free(test.model);
	free(test.base);
	free(test.past);
	return failures > 0;
}
