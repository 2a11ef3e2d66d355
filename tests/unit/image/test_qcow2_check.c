/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Checking and repairing qcow2 images: the counters, passes over windows of clusters, power cuts
 * during a repair, reads that fail, and noise.  What qemu-img says of damaged images is compared in
 * tests/interop/qcow2_check.py.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "image/qcow2/check.h"
#include "store/faulty.h"
#include "tests/lib/image_kit.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define KIB 1024u
#define MIB (1024u * KIB)

static char dir[64];
static char path[128];
static const char *self;

/* --- counters ------------------------------------------------------------------------------- */

#define MAP_FIRST 5000u
#define MAP_COUNT 70000u

static void test_map_adds(void **state)
{
	static const uint32_t amounts[] = {1, 1, 1, 1, 2, 3, 4, 200, 70000, UINT32_MAX};
	OX_FREE uint32_t *model = ox_xcalloc(MAP_COUNT, sizeof(*model));
	struct check_map map;
	uint64_t seed = 1;

	assert_int_equal(check_map_init(&map, MAP_FIRST, MAP_COUNT), 0);
	for (unsigned round = 0; round < 400; round++) {
		uint64_t first = kit_random(&seed, MAP_FIRST * 2 + MAP_COUNT);
		uint64_t count = kit_random(&seed, round % 8 ? 300 : 60000);
		/* Large amounts late: they make the counters wide. */
		uint32_t by = amounts[kit_random(&seed, round < 300 ? 6 : OX_ARRAY_SIZE(amounts))];

		assert_int_equal(check_map_add(&map, first, count, by), 0);
		for (uint64_t i = first; i < first + count; i++) {
			uint32_t *m = model + (i - MAP_FIRST);

			if (i >= MAP_FIRST && i < MAP_FIRST + MAP_COUNT)
				*m = *m > UINT32_MAX - by ? UINT32_MAX : *m + by;
		}
	}
	for (uint64_t i = 0; i < MAP_COUNT; i++)
		assert_int_equal(check_map_get(&map, MAP_FIRST + i), model[i]);
	assert_int_equal(check_map_get(&map, MAP_FIRST - 1), 0);
	assert_int_equal(check_map_get(&map, MAP_FIRST + MAP_COUNT), 0);
	check_map_free(&map);
}

static void test_map_sets(void **state)
{
	OX_FREE uint8_t *model = ox_xcalloc(MAP_COUNT, 1);
	struct check_map map, other;
	uint64_t seed = 2, end = 0;

	assert_int_equal(check_map_init(&map, MAP_FIRST, MAP_COUNT), 0);
	assert_int_equal(check_map_init(&other, MAP_FIRST, MAP_COUNT), 0);
	for (unsigned round = 0; round < 2000; round++) {
		uint64_t first = kit_random(&seed, MAP_COUNT), count = kit_random(&seed, 200);
		unsigned value = (unsigned)kit_random(&seed, 4);
		bool all = true, none = true;

		count = ox_min(count, MAP_COUNT - first);
		for (uint64_t i = first; i < first + count; i++) {
			all &= model[i] == value;
			none &= model[i] != value;
		}
		assert_int_equal(check_map_all(&map, MAP_FIRST + first, count, value), all);
		assert_int_equal(check_map_none(&map, MAP_FIRST + first, count, value), none);
		assert_int_equal(check_map_set(&map, MAP_FIRST + first, count, value), 0);
		memset(model + first, (int)value, count);
		assert_true(check_map_all(&map, MAP_FIRST + first, count, value));
	}
	for (uint64_t i = 0; i < MAP_COUNT; i++) {
		assert_int_equal(check_map_get(&map, MAP_FIRST + i), model[i]);
		if (model[i])
			end = MAP_FIRST + i + 1;
		assert_int_equal(check_map_add(&other, MAP_FIRST + i, model[i] ? 1 : 0, model[i]),
		                 0);
	}
	assert_int_equal(check_map_end(&map, &other), end);
	/* Counters of 3 and more are never taken for the same: they may be anything above. */
	for (uint64_t chunk = 0; chunk * CHECK_CHUNK < MAP_COUNT; chunk++) {
		uint64_t last = ox_min((chunk + 1) * CHECK_CHUNK, (uint64_t)MAP_COUNT);
		bool has_three = false;

		for (uint64_t i = chunk * CHECK_CHUNK; i < last; i++)
			has_three |= model[i] == 3;
		assert_int_equal(check_map_same(&map, &other, chunk), !has_three);
	}
	check_map_free(&map);
	check_map_free(&other);
}

/* --- images --------------------------------------------------------------------------------- */

static uint8_t pattern(uint64_t offset)
{
	return (uint8_t)(offset / 512 * 7 + offset / 65536 + 1);
}

struct fill {
	uint64_t first, step, bytes, end;
};

static int fill_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	const struct fill *f = arg;
	OX_FREE uint8_t *data = ox_xcalloc(1, f->bytes);

	for (uint64_t at = f->first; at + f->bytes <= f->end; at += f->step) {
		int rc;

		for (uint64_t i = 0; i < f->bytes; i++)
			data[i] = pattern(at + i);
		rc = ox_image_write_co(channel, at, data, f->bytes, 0);
		if (rc < 0)
			return ox_error_set(err, -rc, "write at %llu", (unsigned long long)at);
	}
	return 0;
}

/* Makes an image with `text` ("name=value name=value") and writes to it. */
static void make_image(const char *text, uint64_t size, struct fill f)
{
	struct ox_create_option list[8];
	struct ox_image_create_options options = {
	        .path = path, .format = "qcow2", .size = size, .has_size = true, .options = list};
	struct ox_image_options open = {.format = "qcow2", .store.lock = OX_LOCK_WRITE};
	struct ox_error err = {0};
	char words[256];

	snprintf(words, sizeof(words), "%s", text);
	for (char *save, *word = strtok_r(words, " ", &save); word;
	     word = strtok_r(NULL, " ", &save)) {
		char *value = strchr(word, '=');

		*value++ = '\0';
		list[options.option_count++] =
		        (struct ox_create_option){.name = word, .value = value};
	}
	unlink(path);
	f.end = size;
	if (ox_image_create(&options, &err) < 0 ||
	    ox_image_with(path, &open, fill_co, &f, &err) < 0)
		fail_msg("%s: %s", text, err.text);
	ox_image_create_options_free(&options);
}

static int read_back_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	const struct fill *f = arg;
	OX_FREE uint8_t *data = ox_xcalloc(1, f->bytes);

	for (uint64_t at = f->first; at + f->bytes <= f->end; at += f->step) {
		int rc = ox_image_read_co(channel, at, data, f->bytes);

		if (rc < 0)
			return ox_error_set(err, -rc, "read at %llu", (unsigned long long)at);
		for (uint64_t i = 0; i < f->bytes; i++) {
			if (data[i] != pattern(at + i))
				return ox_error_set(err, EILSEQ, "byte %llu of %llu is %u",
				                    (unsigned long long)i, (unsigned long long)at,
				                    data[i]);
		}
	}
	return 0;
}

static void must_read_back(uint64_t size, struct fill f, const char *what)
{
	struct ox_image_options open = {.format = "qcow2", .store.read_only = true};
	struct ox_error err = {0};

	f.end = size;
	if (ox_image_with(path, &open, read_back_co, &f, &err) < 0)
		fail_msg("%s: %s", what, err.text);
}

static uint8_t *load(size_t *bytes)
{
	OX_CLOSE int fd = open(path, O_RDONLY);
	struct stat st;
	uint8_t *data;

	assert_true(fd >= 0 && fstat(fd, &st) == 0);
	data = ox_xcalloc(1, (size_t)st.st_size + 1);
	assert_int_equal(pread(fd, data, (size_t)st.st_size, 0), st.st_size);
	*bytes = (size_t)st.st_size;
	return data;
}

static void save(const uint8_t *data, size_t bytes)
{
	OX_CLOSE int fd = open(path, O_WRONLY | O_TRUNC | O_CREAT, 0600);

	assert_true(fd >= 0);
	assert_int_equal(pwrite(fd, data, bytes, 0), (ssize_t)bytes);
}

/* --- checking ------------------------------------------------------------------------------- */

struct look {
	struct ox_image_check check;
	struct ox_faulty_log *log; /* of a store that records, or NULL */
	unsigned lines, progress;
	uint64_t last_done, last_total;
};

static void count_line(void *arg, const char *line)
{
	struct look *look = arg;

	look->lines++;
	assert_true(strlen(line) > 0);
}

static void count_progress(void *arg, uint64_t done, uint64_t total)
{
	struct look *look = arg;

	look->progress++;
	look->last_done = done;
	look->last_total = total;
	assert_true(done <= total);
}

static int look_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct look *look = arg;
	int rc;

	if (look->log)
		ox_faulty_record(channel->image->store, true);
	rc = ox_image_check_co(channel, &look->check, err);
	if (look->log)
		ox_faulty_take_log(channel->image->store, look->log);
	return rc;
}

static int check(struct look *look, const char *name, const char *repair)
{
	bool fix = repair[0] != '\0';
	struct ox_image_options open = {.format = "qcow2",
	                                .for_check = true,
	                                .allow.nothing = true,
	                                .store.read_only = !fix,
	                                .store.lock = fix ? OX_LOCK_WRITE : OX_LOCK_READ,
	                                /* A killed process may hold it for a moment. */
	                                .store.lock_timeout_ns = 10000000000};
	struct ox_faulty_log *log = look->log;
	struct ox_error err = {0};
	int rc;

	*look = (struct look){.log = log,
	                      .check = {.fix_leaks = fix,
	                                .fix_errors = strcmp(repair, "all") == 0,
	                                .say = count_line,
	                                .progress = count_progress,
	                                .arg = look}};
	rc = ox_image_with(name, &open, look_co, look, &err);
	if (rc < 0)
		print_message("# %s\n", err.text);
	return rc;
}

static void must_be_clean(const char *what)
{
	struct look look = {.log = NULL};

	assert_int_equal(check(&look, path, ""), 0);
	if (look.check.corruptions || look.check.leaks || look.check.check_errors)
		fail_msg("%s: %llu corruptions, %llu leaks", what,
		         (unsigned long long)look.check.corruptions,
		         (unsigned long long)look.check.leaks);
}

/* --- windows ---------------------------------------------------------------------------------- */

static uint64_t l2_table(const uint8_t *data, unsigned index)
{
	return ox_get_be64(data + ox_get_be64(data + 40) + index * 8u) & QCOW2_OFFSET_MASK;
}

/* More clusters than a window has: all passes together find what one pass finds. */
static void test_windows(void **state)
{
	const struct fill f = {.step = 32 * KIB, .bytes = 32 * KIB};
	const uint64_t size = 24 * MIB;
	struct look one = {.log = NULL}, many = {.log = NULL};
	OX_FREE uint8_t *data = NULL;
	uint64_t table, block;
	size_t bytes;

	make_image("cluster_size=512", size, f);
	must_be_clean("a new image");
	data = load(&bytes);
	assert_true(bytes / 512 > 2 * CHECK_CHUNK);
	for (unsigned i = 0; i < 700; i += 70) {
		table = l2_table(data, i);
		ox_put_be64(data + table, ox_get_be64(data + table) & ~QCOW2_ENTRY_COPIED);
		ox_put_be64(data + table + 8, ox_get_be64(data + table + 16));
		ox_put_be64(data + table + 24, ox_get_be64(data + table + 24) | 1ull << 50);
	}
	for (unsigned i = 0; i < 180; i += 20) {
		block = ox_get_be64(data + ox_get_be64(data + 48) + i * 8u);
		ox_put_be16(data + block + 100, 5);
		ox_put_be16(data + block + 200, 0);
	}
	save(data, bytes);
	assert_int_equal(check(&one, path, ""), 0);
	assert_true(one.check.corruptions > 30 && one.check.leaks > 10);
	assert_true(one.progress > 10 && one.last_done == one.last_total);
	check_map_budget = 1;
	assert_int_equal(check(&many, path, ""), 0);
	assert_int_equal(many.check.corruptions, one.check.corruptions);
	assert_int_equal(many.check.leaks, one.check.leaks);
	assert_int_equal(many.check.allocated_clusters, one.check.allocated_clusters);
	assert_int_equal(many.check.fragmented_clusters, one.check.fragmented_clusters);
	assert_int_equal(many.check.image_end_offset, one.check.image_end_offset);
	assert_int_equal(many.lines, one.lines);
	assert_int_equal(check(&many, path, "all"), 0);
	assert_int_equal(many.check.corruptions + many.check.leaks, 0);
	assert_int_equal(many.check.corruptions_fixed, one.check.corruptions);
	check_map_budget = CHECK_MAP_BYTES;
	must_be_clean("repaired window by window");
	/* Once more, with new refcount structures. */
	memset(data + ox_get_be64(data + 48), 0, 512);
	save(data, bytes);
	check_map_budget = 1;
	assert_int_equal(check(&many, path, "all"), 0);
	check_map_budget = CHECK_MAP_BYTES;
	must_be_clean("rebuilt window by window");
}

/* --- power cuts ------------------------------------------------------------------------------- */

static void apply(uint8_t **data, size_t *bytes, const struct ox_faulty_record *r)
{
	size_t end = r->truncate ? r->length : r->offset + r->length;

	if (r->op != OX_IO_WRITE && !r->truncate)
		return;
	if (end > *bytes || r->truncate) {
		*data = realloc(*data, end + 1);
		assert_non_null(*data);
		if (end > *bytes)
			memset(*data + *bytes, 0, end - *bytes);
		*bytes = end;
	}
	if (r->op == OX_IO_WRITE && !r->truncate)
		memcpy(*data + r->offset, r->data, r->length);
}

/* Repairs with a record of what is written, then tries what a power cut would have left: all of the
 * writes before a flush and some of those behind it. */
static void cut_repair(const char *what, uint64_t size, struct fill f, uint64_t *seed)
{
	struct ox_faulty_log log;
	struct look look = {.log = &log};
	OX_FREE uint8_t *before = NULL;
	OX_FREE char *name = ox_xasprintf("faulty::%s", path);
	size_t bytes, flushed = 0;
	unsigned tried = 0;

	before = load(&bytes);
	assert_int_equal(check(&look, name, "all"), 0);
	assert_int_equal(look.check.corruptions + look.check.leaks + look.check.check_errors, 0);
	assert_true(look.check.corruptions_fixed > 0);
	must_be_clean(what);
	must_read_back(size, f, what);
	for (size_t i = 0; i <= log.count; i++) {
		size_t now = bytes;
		uint8_t *data;

		if (i < log.count && log.records[i].op != OX_IO_FLUSH)
			continue;
		for (unsigned attempt = 0; attempt < 3; attempt++, tried++) {
			data = ox_xcalloc(1, bytes + 1);
			memcpy(data, before, bytes);
			now = bytes;
			for (size_t k = 0; k < i; k++) {
				if (k < flushed || attempt == 0 || kit_random(seed, 2))
					apply(&data, &now, &log.records[k]);
			}
			save(data, now);
			free(data);
			look.log = NULL;
			assert_int_equal(check(&look, path, "all"), 0);
			must_be_clean(what);
			must_read_back(size, f, what);
		}
		flushed = i;
	}
	assert_true(tried > 6);
	ox_faulty_free_log(&log);
}

static void test_power_cut(void **state)
{
	const struct fill f = {.step = 64 * KIB, .bytes = 24 * KIB};
	const uint64_t size = 2 * MIB;
	uint64_t seed = 3, block;
	size_t bytes;

	for (unsigned order = 0; order <= 6; order++) {
		OX_FREE char *text =
		        ox_xasprintf("cluster_size=4096 refcount_bits=%u", 1u << order);
		OX_FREE uint8_t *data = NULL;

		/* New structures. */
		make_image(text, size, f);
		data = load(&bytes);
		memset(data + ox_get_be64(data + 48), 0, 4096);
		save(data, bytes);
		cut_repair("a refcount table of zeroes", size, f, &seed);
		/* In place: refcounts too high and too low, flags. */
		make_image(text, size, f);
		free(data);
		data = load(&bytes);
		block = ox_get_be64(data + ox_get_be64(data + 48));
		memset(data + block + 1, 0, 8);
		memset(data + block + 9, 0x55, 8);
		save(data, bytes);
		cut_repair("wrong refcounts", size, f, &seed);
	}
}

/* --- at open ---------------------------------------------------------------------------------- */

static int nothing_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	return 0;
}

/* The last writer left refcounts to be set later, and did not come to it. */
static void test_dirty(void **state)
{
	const struct fill f = {.step = 64 * KIB, .bytes = 24 * KIB};
	struct ox_image_options open = {.format = "qcow2", .store.lock = OX_LOCK_WRITE};
	struct ox_error err = {0};
	OX_FREE uint8_t *data = NULL;
	uint64_t block;
	size_t bytes;

	make_image("cluster_size=4096 lazy_refcounts=on", 2 * MIB, f);
	data = load(&bytes);
	data[79] |= QCOW2_INCOMPAT_DIRTY;
	block = ox_get_be64(data + ox_get_be64(data + 48));
	memset(data + block + 20, 0, 100);
	save(data, bytes);
	if (ox_image_with(path, &open, nothing_co, NULL, &err) < 0)
		fail_msg("%s", err.text);
	free(data);
	data = load(&bytes);
	assert_int_equal(data[79] & QCOW2_INCOMPAT_DIRTY, 0);
	must_be_clean("opened after an unclean end");
	must_read_back(2 * MIB, f, "opened after an unclean end");
}

/* The corrupt bit goes when all is well, and stays when it is not. */
static void test_corrupt_bit(void **state)
{
	const struct fill f = {.step = 64 * KIB, .bytes = 24 * KIB};
	struct look look = {.log = NULL};
	OX_FREE uint8_t *data = NULL;
	size_t bytes;

	make_image("cluster_size=4096", 2 * MIB, f);
	data = load(&bytes);
	data[79] |= QCOW2_INCOMPAT_CORRUPT;
	save(data, bytes);
	assert_int_equal(check(&look, path, ""), 0);
	assert_int_equal(check(&look, path, "all"), 0);
	free(data);
	data = load(&bytes);
	assert_int_equal(data[79] & QCOW2_INCOMPAT_CORRUPT, 0);
	/* The header points to something that is no L1 table: everything would be lost. */
	data[79] |= QCOW2_INCOMPAT_CORRUPT;
	memset(data + ox_get_be64(data + 40), 0x5b, 8);
	for (unsigned i = 1; i < 16; i++)
		memset(data + ox_get_be64(data + 40) + 8 * i, (int)(0x5b + i), 8);
	ox_put_be32(data + 36, 16);
	save(data, bytes);
	assert_int_equal(check(&look, path, "all"), 0);
	assert_true(look.check.corruptions > 0 && look.check.check_errors > 0);
	free(data);
	data = load(&bytes);
	assert_true(data[79] & QCOW2_INCOMPAT_CORRUPT);
	assert_int_equal(data[ox_get_be64(data + 40)], 0x5b);
}

/* --- a killed process ------------------------------------------------------------------------- */

static const struct fill killed_fill = {.step = 64 * KIB, .bytes = 24 * KIB, .end = 4 * MIB};

static int die_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	struct fill f = killed_fill;

	if (fill_co(channel, &f, err) == 0)
		raise(SIGKILL);
	return -EIO;
}

static int die(const char *name)
{
	struct ox_image_options open = {.format = "qcow2", .store.lock = OX_LOCK_WRITE};
	struct ox_error err = {0};

	if (ox_image_with(name, &open, die_co, NULL, &err) < 0)
		fprintf(stderr, "%s\n", err.text);
	return 1;
}

/* What a killed process has completed and not written is in its record: a repair takes that over,
 * and does not free what only the record refers to. */
static void test_killed(void **state)
{
	static const char *const repairs[] = {"leaks", "all"};

	for (size_t i = 0; i < OX_ARRAY_SIZE(repairs); i++) {
		const char *const argv[] = {self, "die", path, NULL};
		struct look look = {.log = NULL};
		OX_FREE uint8_t *data = NULL;
		char output[1024] = "";
		size_t bytes;

		make_image("cluster_size=4096", 4 * MIB, (struct fill){.step = MIB, .bytes = KIB});
		if (kit_spawn(argv, output, sizeof(output)) != -1)
			fail_msg("%s", output);
		assert_int_equal(check(&look, path, repairs[i]), 0);
		assert_int_equal(look.check.corruptions + look.check.leaks, 0);
		data = load(&bytes);
		assert_null(memmem(data, 4096, "\x4f\x78\x62\x77", 4));
		must_be_clean("a killed writer's image");
		must_read_back(4 * MIB, killed_fill, "a killed writer's image");
	}
}

/* --- what cannot be read ------------------------------------------------------------------------
 */

static void test_read_errors(void **state)
{
	const struct fill f = {.step = 64 * KIB, .bytes = 24 * KIB};
	OX_FREE char *rules = ox_xasprintf("%s/rules", dir);
	OX_FREE char *name = ox_xasprintf("faulty:%s:%s", rules, path);
	struct look look = {.log = NULL};
	OX_FREE uint8_t *data = NULL, *after = NULL;
	size_t bytes, after_bytes;
	uint64_t table;
	FILE *file;

	make_image("cluster_size=4096", 8 * MIB, f);
	data = load(&bytes);
	table = l2_table(data, 1);
	file = fopen(rules, "w");
	assert_non_null(file);
	/* The first time it is read together with the header. */
	fprintf(file, "read nth=2 range=%llu+512 always error=EIO\n", (unsigned long long)table);
	fclose(file);
	assert_int_equal(check(&look, name, ""), 0);
	assert_true(look.check.check_errors > 0 && look.check.leaks > 0);
	/* What looks unused may be what could not be read refers to. */
	assert_int_equal(check(&look, name, "leaks"), 0);
	assert_int_equal(check(&look, name, "all"), 0);
	after = load(&after_bytes);
	assert_int_equal(after_bytes, bytes);
	assert_memory_equal(after, data, bytes);
	unlink(rules);
	must_be_clean("after read errors");
}

/* --- noise ------------------------------------------------------------------------------------ */

static void test_noise(void **state)
{
	static const char *const kinds[] = {
	        "cluster_size=512",
	        "cluster_size=4096 refcount_bits=1",
	        "cluster_size=16384 extended_l2=on",
	        "cluster_size=4096 refcount_bits=64",
	};
	const struct fill f = {.step = 48 * KIB, .bytes = 8 * KIB};
	struct look look = {.log = NULL};
	uint64_t seed = 4;

	for (unsigned kind = 0; kind < OX_ARRAY_SIZE(kinds); kind++) {
		OX_FREE uint8_t *sound = NULL, *data = NULL;
		size_t bytes;

		make_image(kinds[kind], MIB, f);
		sound = load(&bytes);
		data = ox_xcalloc(1, bytes);
		for (unsigned round = 0; round < 60; round++) {
			memcpy(data, sound, bytes);
			for (unsigned i = 0; i < 1 + round / 4; i++) {
				/* Behind the header: it would just be refused. */
				size_t at = 512 + kit_random(&seed, bytes - 512 - 64);
				size_t length = 1 + kit_random(&seed, round % 2 ? 64 : 2);

				while (length-- > 0)
					data[at + length] = (uint8_t)kit_random(&seed, 256);
			}
			save(data, bytes);
			if (check(&look, path, "") < 0)
				continue;
			if (check(&look, path, "all") < 0 || look.check.check_errors)
				continue;
			if (look.check.corruptions + look.check.leaks)
				fail_msg("%s, round %u: %llu corruptions and %llu leaks are left",
				         kinds[kind], round,
				         (unsigned long long)look.check.corruptions,
				         (unsigned long long)look.check.leaks);
		}
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_map_adds),    cmocka_unit_test(test_map_sets),
	        cmocka_unit_test(test_windows),     cmocka_unit_test(test_power_cut),
	        cmocka_unit_test(test_dirty),       cmocka_unit_test(test_corrupt_bit),
	        cmocka_unit_test(test_read_errors), cmocka_unit_test(test_noise),
	        cmocka_unit_test(test_killed),
	};
	int failed;

	if (argc == 3 && strcmp(argv[1], "die") == 0)
		return die(argv[2]);
	self = argv[0];
	if (!kit_make_dir(dir, sizeof(dir), "qcow2-check"))
		return 1;
	setenv("OXBOW_RUN_DIR", dir, 1);
	snprintf(path, sizeof(path), "%s/image.qcow2", dir);
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(path);
	rmdir(dir);
	return failed;
}
