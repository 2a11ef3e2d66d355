/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The file store against a model in memory: every engine, with and without O_DIRECT, over files
 * and over loop devices with sectors of 512 and 4096 bytes; any offset, length, list and
 * buffer; from one loop and from two at a time.
 *
 * A target is divided into stripes with odd borders.  A fiber a stripe does random operations in
 * it and compares with its own part of the model, while its neighbours write the other halves of
 * the blocks at its borders.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/fiber.h"
#include "base/iov.h"
#include "store/file.h"
#include "targets.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define STRIPES    6u
#define OPERATIONS 100u
#define MAX_BYTES  (96u * 1024u)

struct setup {
	char name[96];
	enum ox_aio aio;
	bool direct;
	enum target_kind kind;
	uint64_t size;
	bool two_loops;
	uint32_t granularity;
	/* A file on a file system that asks for 4096 bytes, as if this one did. */
	bool force_4096;
};

struct stripe {
	struct ox_channel *channel;
	uint64_t start, end; /* bytes of the store */
	uint8_t *model;      /* the whole store's */
	uint32_t granularity;
	uint64_t rng;
	unsigned *left; /* stripes of this loop that still run */
	struct ox_fiber *starter;
	char failed[200];
};

static uint64_t next_random(struct stripe *s, uint64_t below)
{
	s->rng ^= s->rng << 13;
	s->rng ^= s->rng >> 7;
	s->rng ^= s->rng << 17;
	return below ? s->rng % below : 0;
}

#define FAIL(s, ...)                                                             \
	do {                                                                     \
		if (!(s)->failed[0])                                             \
			snprintf((s)->failed, sizeof((s)->failed), __VA_ARGS__); \
	} while (0)

/* A list of odd pieces, mostly over misaligned memory; *base is what to free. */
static uint32_t make_list(struct stripe *s, struct iovec *iov, uint32_t room, uint8_t **base,
                          uint8_t **data, size_t length)
{
	size_t skew = next_random(s, 3) ? next_random(s, 600) : 0;
	bool whole = next_random(s, 3) == 0;
	uint32_t count = 0;
	size_t done = 0;
	void *mem = NULL;

	assert_int_equal(posix_memalign(&mem, 4096, length + 1024), 0);
	*base = mem;
	*data = *base + skew;
	while (done < length) {
		size_t piece = length - done;

		if (!whole && count + 1 < room)
			piece = ox_min(piece, 1 + (size_t)next_random(s, length / 2 + 1));
		if (!whole && piece > 512 && next_random(s, 2))
			piece = ox_align_down(piece, 512);
		iov[count].iov_base = *data + done;
		iov[count++].iov_len = piece;
		done += piece;
	}
	return count;
}

static void do_write(struct stripe *s, uint64_t offset, size_t length)
{
	struct iovec iov[24];
	uint8_t *base, *data;
	struct ox_io io = {.op = OX_IO_WRITE,
	                   .flags = next_random(s, 4) == 0 ? OX_IO_DSYNC : 0,
	                   .offset = offset,
	                   .length = length,
	                   .iov = iov};
	int ret;

	io.iovcnt = make_list(s, iov, OX_ARRAY_SIZE(iov), &base, &data, length);
	for (size_t i = 0; i < length; i++)
		data[i] = (uint8_t)(next_random(s, 0), s->rng >> 24);
	memcpy(s->model + offset, data, length);
	ret = ox_store_submit_co(s->channel, &io);
	if (ret < 0)
		FAIL(s, "write at %llu of %zu: %s", (unsigned long long)offset, length,
		     strerror(-ret));
	free(base);
}

static void do_read(struct stripe *s, uint64_t offset, size_t length)
{
	struct iovec iov[24];
	uint8_t *base, *data;
	struct ox_io io = {.op = OX_IO_READ, .offset = offset, .length = length, .iov = iov};
	int ret;

	io.iovcnt = make_list(s, iov, OX_ARRAY_SIZE(iov), &base, &data, length);
	memset(data, 0xee, length);
	data[length] = 0x5a;
	ret = ox_store_submit_co(s->channel, &io);
	if (ret < 0)
		FAIL(s, "read at %llu of %zu: %s", (unsigned long long)offset, length,
		     strerror(-ret));
	else if (memcmp(data, s->model + offset, length) != 0)
		FAIL(s, "read at %llu of %zu: other content", (unsigned long long)offset, length);
	if (data[length] != 0x5a)
		FAIL(s, "read at %llu of %zu wrote behind its buffer", (unsigned long long)offset,
		     length);
	free(base);
}

static void do_zero(struct stripe *s, uint64_t offset, size_t length)
{
	struct ox_io io = {.op = OX_IO_ZERO,
	                   .flags = (uint8_t)(next_random(s, 2) ? OX_IO_MAY_UNMAP : 0),
	                   .offset = offset,
	                   .length = length};
	int ret;

	if (next_random(s, 4) == 0)
		io.flags |= OX_IO_DSYNC;
	if (next_random(s, 4) == 0)
		io.flags |= OX_IO_NO_FALLBACK;
	ret = ox_store_submit_co(s->channel, &io);
	if (ret == 0)
		memset(s->model + offset, 0, length);
	else if (ret != -ENOTSUP || !(io.flags & OX_IO_NO_FALLBACK))
		FAIL(s, "zero at %llu of %zu: %s", (unsigned long long)offset, length,
		     strerror(-ret));
}

/* Afterwards every byte is the old one or zero: the model takes what it is. */
static void do_discard(struct stripe *s, uint64_t offset, size_t length)
{
	struct ox_io io = {.op = OX_IO_DISCARD, .offset = offset, .length = length};
	uint8_t *now = malloc(length);
	int ret;

	ret = ox_store_submit_co(s->channel, &io);
	if (ret < 0)
		FAIL(s, "discard: %s", strerror(-ret));
	ret = ox_store_read_co(s->channel, offset, now, length);
	if (ret < 0)
		FAIL(s, "read after discard: %s", strerror(-ret));
	for (size_t i = 0; ret == 0 && i < length; i++) {
		if (now[i] != s->model[offset + i] && now[i] != 0) {
			FAIL(s, "discard at %llu of %zu: byte %zu is neither old nor zero",
			     (unsigned long long)offset, length, i);
			break;
		}
	}
	memcpy(s->model + offset, now, length);
	free(now);
}

static void stripe_fiber(void *arg)
{
	struct stripe *s = arg;
	uint64_t room = s->end - s->start;

	for (unsigned i = 0; i < OPERATIONS && !s->failed[0]; i++) {
		uint64_t a = next_random(s, room), b;
		uint64_t unit = next_random(s, 2) ? 4096 : s->granularity;

		b = a + 1 + next_random(s, ox_min(room - a, (uint64_t)MAX_BYTES));
		/* Whole blocks where the stripe has one there. */
		if (ox_align_down(s->start + a, unit) >= s->start)
			a = ox_align_down(s->start + a, unit) - s->start;
		if (ox_align_up(s->start + b, unit) <= s->end)
			b = ox_align_up(s->start + b, unit) - s->start;
		b = ox_min(b, room);
		/* Often right at a border, where the neighbour is at work as well. */
		switch (next_random(s, 4)) {
		case 0:
			a = 0;
			b = 1 + next_random(s, 3000);
			break;
		case 1:
			a = room - 1 - next_random(s, 3000);
			b = room;
			break;
		}
		if (s->granularity > 1) {
			a = ox_align_down(s->start + a, s->granularity) - s->start;
			if (s->start + b != s->end)
				b = ox_align_down(s->start + b, s->granularity) - s->start;
		}
		if (a >= b)
			continue;
		switch (next_random(s, 10)) {
		case 0:
			do_zero(s, s->start + a, b - a);
			break;
		case 1:
			do_discard(s, s->start + a, b - a);
			break;
		case 2:
			if (ox_store_flush_co(s->channel) < 0)
				FAIL(s, "flush failed");
			break;
		case 3:
		case 4:
		case 5:
			do_read(s, s->start + a, b - a);
			break;
		default:
			do_write(s, s->start + a, b - a);
		}
	}
	do_read(s, s->start, room);
	if (--*s->left == 0 && s->starter)
		ox_fiber_resume(s->starter);
}

struct side {
	struct ox_store *store;
	struct ox_loop *loop;
	struct stripe *stripes;
	unsigned count;
};

static void side_fiber(void *arg)
{
	struct side *side = arg;
	struct ox_channel *channel;
	struct ox_error err = {0};
	unsigned left = side->count;

	if (ox_store_attach(side->store, side->loop, &channel, &err) < 0) {
		FAIL(&side->stripes[0], "attach: %.150s", err.text);
		return;
	}
	for (unsigned i = 0; i < side->count; i++) {
		side->stripes[i].channel = channel;
		side->stripes[i].left = &left;
		if (ox_fiber_start(stripe_fiber, &side->stripes[i]) < 0)
			FAIL(&side->stripes[i], "no fiber");
	}
	if (left) {
		for (unsigned i = 0; i < side->count; i++)
			side->stripes[i].starter = ox_fiber_self();
		ox_fiber_suspend();
	}
	ox_store_detach(channel);
}

static void *side_thread(void *arg)
{
	struct side *side = arg;

	ox_loop_run_fiber(side->loop, side_fiber, side);
	ox_fiber_pool_free();
	return NULL;
}

static void run_on_one_loop(struct ox_store *store, struct stripe *stripes)
{
	struct ox_loop_options options = {.name = "test"};
	struct side side = {.store = store, .stripes = stripes, .count = STRIPES};

	side.loop = ox_loop_new(&options, NULL);
	assert_non_null(side.loop);
	ox_loop_run_fiber(side.loop, side_fiber, &side);
	ox_loop_free(side.loop);
}

/* Odd stripes on one loop, even ones on the other: every border has both sides. */
static void run_on_two_loops(struct ox_store *store, struct stripe *stripes)
{
	struct ox_loop_options options = {.name = "test"};
	struct stripe parts[2][STRIPES];
	struct side side[2];
	pthread_t thread[2];

	for (unsigned t = 0; t < 2; t++) {
		unsigned count = 0;

		for (unsigned i = t; i < STRIPES; i += 2)
			parts[t][count++] = stripes[i];
		side[t] = (struct side){.store = store,
		                        .loop = ox_loop_new(&options, NULL),
		                        .stripes = parts[t],
		                        .count = count};
		assert_non_null(side[t].loop);
	}
	for (unsigned t = 0; t < 2; t++)
		assert_int_equal(pthread_create(&thread[t], NULL, side_thread, &side[t]), 0);
	for (unsigned t = 0; t < 2; t++) {
		pthread_join(thread[t], NULL);
		ox_loop_free(side[t].loop);
		for (unsigned i = 0; i < side[t].count; i++)
			stripes[2 * i + t] = parts[t][i];
	}
}

static void check_behind(const struct setup *setup, const struct target *target,
                         const uint8_t *model)
{
	uint8_t *now = malloc(setup->size + 1);
	struct stat st;
	int fd;

	/* Through the page cache: direct writes must show there. */
	fd = open(target->path, O_RDONLY | O_CLOEXEC);
	assert_true(fd >= 0);
	assert_int_equal(pread(fd, now, setup->size + 1, 0), setup->size);
	close(fd);
	assert_int_equal(stat(target->file, &st), 0);
	assert_int_equal(st.st_size, setup->size);
	assert_memory_equal(now, model, setup->size);
	free(now);
}

static void test_random(void **state)
{
	const struct setup *setup = *state;
	struct ox_store_options options = {
	        .direct = setup->direct,
	        .aio = setup->aio,
	        .lock = OX_LOCK_WRITE,
	        .write_granularity = setup->granularity,
	};
	struct stripe stripes[STRIPES];
	struct ox_error err = {0};
	struct ox_store *store;
	struct target target;
	const char *why;
	uint8_t *model;

	if (ox_aio_available(setup->aio, &err) < 0) {
		print_message("# %s\n", err.text);
		skip();
	}
	if (target_make(&target, setup->kind, setup->size, &why)) {
		print_message("# %s\n", why);
		skip();
	}
	if (ox_store_open(target.path, &options, &store, &err) < 0) {
		target_drop(&target);
		fail_msg("%s", err.text);
	}
	assert_int_equal(store->size, setup->size);
	if (setup->force_4096) {
		struct ox_file *file = store->priv;

		file->align_mask = 4095;
		file->tracked = true;
		assert_int_equal(ox_file_set_tail(file, setup->size), 0);
	}
	assert_int_equal(store->aio, setup->aio);
	model = calloc(1, setup->size);
	for (unsigned i = 0; i < STRIPES; i++) {
		uint64_t step = setup->size / STRIPES;

		memset(&stripes[i], 0, sizeof(stripes[i]));
		stripes[i].start = ox_align_down(i * step, setup->granularity);
		stripes[i].end = i + 1 == STRIPES
		                         ? setup->size
		                         : ox_align_down((i + 1) * step, setup->granularity);
		stripes[i].model = model;
		stripes[i].granularity = setup->granularity;
		stripes[i].rng = 0x9e3779b97f4a7c15u + i * 7919u + setup->size;
	}
	if (setup->two_loops)
		run_on_two_loops(store, stripes);
	else
		run_on_one_loop(store, stripes);
	for (unsigned i = 0; i < STRIPES; i++) {
		if (stripes[i].failed[0])
			print_error("# stripe %u: %s\n", i, stripes[i].failed);
		assert_string_equal(stripes[i].failed, "");
	}
	ox_store_close(store);
	check_behind(setup, &target, model);
	free(model);
	target_drop(&target);
}

int main(void)
{
	static const struct {
		const char *name;
		enum target_kind kind;
		uint64_t size;
		bool force_4096;
	} shapes[] = {
	        {"file", TARGET_FILE, 512 * 1024},
	        {"file of odd size", TARGET_FILE, 512 * 1024 + 1234},
	        {"file of odd size, 4096", TARGET_FILE, 512 * 1024 + 512, true},
	        {"loop device, 512", TARGET_LOOP_512, 512 * 1024},
	        {"loop device, 4096", TARGET_LOOP_4096, 512 * 1024},
	};
	static const enum ox_aio engines[] = {OX_AIO_SYNC, OX_AIO_THREADS, OX_AIO_NATIVE,
	                                      OX_AIO_IO_URING};
	static struct setup setups[128];
	static struct CMUnitTest tests[128];
	size_t count = 0;
	int failed;

	for (size_t s = 0; s < OX_ARRAY_SIZE(shapes); s++) {
		for (size_t e = 0; e < OX_ARRAY_SIZE(engines); e++) {
			for (unsigned v = 0; v < 4; v++) {
				struct setup *setup = &setups[count];

				if (shapes[s].force_4096 && !(v & 1))
					continue;

				*setup = (struct setup){
				        .aio = engines[e],
				        .direct = v & 1,
				        .two_loops = v & 2,
				        .kind = shapes[s].kind,
				        .size = shapes[s].size,
				        .granularity = s == 0 ? 512 : 1,
				        .force_4096 = shapes[s].force_4096,
				};
				snprintf(setup->name, sizeof(setup->name), "%s, %s, %s, %s",
				         shapes[s].name, ox_aio_name(setup->aio),
				         setup->direct ? "direct" : "buffered",
				         setup->two_loops ? "two loops" : "one loop");
				tests[count].name = setup->name;
				tests[count].test_func = test_random;
				tests[count].initial_state = setup;
				count++;
			}
		}
	}
	targets_begin();
	failed = _cmocka_run_group_tests("file_io", tests, count, NULL, NULL);
	targets_end();
	return failed;
}
