/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the channels of an image do together: grace periods, work in the background, the first
 * change, and several threads at random on one map.
 */
#include "map_format.h"
#include "store/faulty.h"

static uint8_t buffer[64 << 10] __attribute__((aligned(4096)));

/* --- grace periods ------------------------------------------------------------------------------
 */

static bool read_done, grace_done;
static unsigned order;
static unsigned read_order, grace_order;

static void held_read_co(void *arg)
{
	uint8_t *buf = arg;

	assert_int_equal(op_co(OX_IO_READ, 0, buf, 4096, 0), 0);
	read_order = ++order;
	read_done = true;
}

static void grace_co(void *arg)
{
	ox_image_grace_co(arg);
	grace_order = ++order;
	grace_done = true;
}

static void wait_for_co(const bool *condition)
{
	while (!*condition)
		ox_sleep_co(100000);
}

static void hold_reads(void)
{
	const struct ox_fault_rule rule = {
	        .op = OX_IO_READ, .kind = OX_FAULT_NEVER, .always = true};

	ox_faulty_add_rule(fixture.top.image->store, &rule);
}

/* A read that began before is waited for, one that began after is not. */
static void grace_test_co(void)
{
	static uint8_t late[4096];

	map_set_data(&fixture.top, 0, 4096, 5, false);
	hold_reads();
	read_done = grace_done = false;
	order = 0;
	assert_int_equal(ox_fiber_start(held_read_co, buffer), 0);
	assert_int_equal(ox_fiber_start(grace_co, fixture.channel[0]), 0);
	assert_false(read_done);
	for (unsigned i = 0; i < 20; i++)
		ox_sleep_co(100000);
	assert_false(grace_done);
	/* On the other side of the period. */
	assert_int_equal(ox_fiber_start(held_read_co, late), 0);
	ox_faulty_clear_rules(fixture.top.image->store);
	wait_for_co(&grace_done);
	wait_for_co(&read_done);
	assert_bytes(buffer, 4096, 5);
	/* Nothing is in flight: at once, and again. */
	ox_image_grace_co(fixture.channel[0]);
	ox_image_grace_co(fixture.channel[0]);
}

/* Not held up by requests that came after its beginning. */
static void grace_later_co(void)
{
	map_set_data(&fixture.top, 0, 4096, 5, false);
	hold_reads();
	read_done = grace_done = false;
	/* The period's turn of this channel is over when the other thread is asked. */
	assert_int_equal(ox_fiber_start(grace_co, fixture.channel[0]), 0);
	assert_int_equal(ox_fiber_start(held_read_co, buffer), 0);
	wait_for_co(&grace_done);
	assert_false(read_done);
	ox_faulty_clear_rules(fixture.top.image->store);
	wait_for_co(&read_done);
}

static void remote_read_co(void *arg)
{
	static uint8_t buf[4096];
	struct iovec iov = {buf, sizeof(buf)};

	assert_int_equal(submit_co(1, OX_IO_READ, 0, &iov, 1, 4096, 0), 0);
	__atomic_store_n((bool *)arg, true, __ATOMIC_SEQ_CST);
}

struct remote {
	struct ox_post post;
	bool done;
};

static void start_remote(struct ox_post *post)
{
	struct remote *remote = ox_container_of(post, struct remote, post);

	assert_int_equal(ox_fiber_start(remote_read_co, &remote->done), 0);
}

static void nothing(void *arg)
{
}

/* The same for a read on another thread. */
static void grace_threads_co(void)
{
	struct remote remote = {.post.fn = start_remote};

	map_set_data(&fixture.top, 0, 4096, 5, false);
	hold_reads();
	grace_done = false;
	ox_loop_post(fixture.loops[1], &remote.post);
	ox_loop_call_co(fixture.loops[1], nothing, NULL);
	assert_int_equal(ox_fiber_start(grace_co, fixture.channel[0]), 0);
	for (unsigned i = 0; i < 20; i++)
		ox_sleep_co(100000);
	assert_false(grace_done);
	assert_false(__atomic_load_n(&remote.done, __ATOMIC_SEQ_CST));
	ox_faulty_clear_rules(fixture.top.image->store);
	wait_for_co(&grace_done);
	while (!__atomic_load_n(&remote.done, __ATOMIC_SEQ_CST))
		ox_sleep_co(100000);
}

static void many_graces_co(void *arg)
{
	struct ox_image_channel *channel = fixture.channel[*(unsigned *)arg];

	for (unsigned i = 0; i < 200; i++)
		ox_image_grace_co(channel);
}

/* Periods of several threads take turns. */
static void grace_crowd_co(void)
{
	static unsigned one = 1, two = 2;

	for (unsigned i = 0; i < 20; i++) {
		grace_done = false;
		assert_int_equal(ox_fiber_start(grace_co, fixture.channel[0]), 0);
		ox_loop_call_fiber_co(fixture.loops[1 + i % 2], many_graces_co,
		                      i % 2 ? &two : &one);
		wait_for_co(&grace_done);
	}
}

static void test_grace(void **state)
{
	map_run(&(struct map_test){.store = "faulty::memory:16M", .fn_co = grace_test_co});
	map_run(&(struct map_test){
	        .store = "faulty::memory:16M", .threads = 1, .fn_co = grace_later_co});
	map_run(&(struct map_test){
	        .store = "faulty::memory:16M", .threads = 1, .fn_co = grace_threads_co});
	map_run(&(struct map_test){.threads = 2, .fn_co = grace_crowd_co});
}

/* --- work in the background
 * ------------------------------------------------------------------------ */

static bool worked;

static void background_co(struct ox_image_channel *channel, void *arg)
{
	assert_ptr_equal(channel, fixture.channel[0]);
	ox_sleep_co(5000000);
	ox_image_grace_co(channel);
	*(bool *)arg = true;
}

static void start_background_co(void)
{
	worked = false;
	assert_int_equal(ox_image_background(fixture.channel[0], background_co, &worked), 0);
	assert_int_equal(ox_image_background(fixture.channel[0], background_co, &worked), 0);
	assert_false(worked);
}

/* Detaching waits for it. */
static void test_background(void **state)
{
	map_run(&(struct map_test){.threads = 1, .fn_co = start_background_co});
	assert_true(worked);
}

/* --- the first change
 * --------------------------------------------------------------------------------- */

struct first {
	struct ox_post post;
	unsigned channel;
	uint64_t offset;
	int result;
	unsigned *left; /* atomic */
};

static void first_write_co(void *arg)
{
	struct first *first = arg;
	uint8_t buf[1024];
	struct iovec iov = {buf, sizeof(buf)};

	memset(buf, 1, sizeof(buf));
	first->result = submit_co(first->channel, OX_IO_WRITE, first->offset, &iov, 1, 1024, 0);
	__atomic_fetch_sub(first->left, 1, __ATOMIC_SEQ_CST);
}

static void start_first(struct ox_post *post)
{
	assert_int_equal(ox_fiber_start(first_write_co, ox_container_of(post, struct first, post)),
	                 0);
}

static unsigned run_first_writes(unsigned *failed)
{
	struct first first[12];
	unsigned left = 12;

	*failed = 0;
	for (unsigned i = 0; i < 12; i++) {
		first[i] = (struct first){.post.fn = start_first,
		                          .channel = i % fixture.channels,
		                          .offset = 8192 * i,
		                          .left = &left};
		ox_loop_post(fixture.loops[first[i].channel], &first[i].post);
	}
	while (__atomic_load_n(&left, __ATOMIC_SEQ_CST) > 0)
		ox_sleep_co(100000);
	for (unsigned i = 0; i < 12; i++)
		*failed += first[i].result < 0;
	return fixture.top.begins;
}

/* Once, however many threads write at the same time; a failure is those requests' that waited for
 * this try, and the next one tries again. */
static void begin_co(void)
{
	unsigned failed, begins;

	fixture.top.begin_ns = 3000000;
	fixture.top.begin_rc = -EIO;
	begins = run_first_writes(&failed);
	assert_int_equal(begins, 2);
	assert_int_equal(failed, 1);
	assert_true(fixture.top.image->begun);
	assert_int_equal(run_first_writes(&failed), 2);
	assert_int_equal(failed, 0);
}

static void begin_fails_co(void)
{
	uint8_t buf[512] = {0};

	fixture.top.begin_rc = -EACCES;
	assert_int_equal(op_co(OX_IO_READ, 0, buf, 512, 0), 0);
	assert_int_equal(op_co(OX_IO_FLUSH, 0, NULL, 0, 0), 0);
	assert_int_equal(fixture.top.begins, 0);
	assert_int_equal(op_co(OX_IO_DISCARD, 0, NULL, 4096, 0), -EACCES);
	assert_false(fixture.top.image->begun);
	assert_int_equal(op_co(OX_IO_DISCARD, 0, NULL, 4096, 0), 0);
	assert_int_equal(fixture.top.begins, 2);
}

static void test_begin(void **state)
{
	map_run(&(struct map_test){.threads = 2, .fn_co = begin_co});
	map_run(&(struct map_test){.fn_co = begin_fails_co});
}

/* --- at random
 * ----------------------------------------------------------------------------------------- */

#define RANDOM_SIZE  (96u << 10)
#define RANDOM_STEPS 600u

/* Units belong to the threads in turn, so that neighbours within a cluster are changed by several
 * at the same time; what the thread's own hold is known. */
struct walker {
	unsigned self;
	uint64_t seed;
	uint8_t model[RANDOM_SIZE], buf[RANDOM_SIZE];
	unsigned *left; /* atomic */
	struct ox_post post;
};

static uint64_t next_random(uint64_t *seed, uint64_t below)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed % below;
}

/* A range within one of the walker's units. */
static void pick(struct walker *walker, uint64_t *offset, uint64_t *length)
{
	uint64_t units = RANDOM_SIZE / UNIT / fixture.channels;
	uint64_t unit = next_random(&walker->seed, units) * fixture.channels + walker->self;
	uint64_t from = 512 * next_random(&walker->seed, 2);

	*offset = unit * UNIT + from;
	*length = from ? 512 : 512 * (1 + next_random(&walker->seed, 2));
}

static int step_co(struct walker *walker, uint8_t op, uint64_t offset, uint64_t length,
                   uint8_t *buf)
{
	struct iovec iov = {buf, length};
	bool changes = op != OX_IO_READ && op != OX_IO_FLUSH;
	unsigned flags = changes && next_random(&walker->seed, 8) == 0 ? OX_IO_DSYNC : 0;

	return submit_co(walker->self, op, offset, &iov, 1, length, flags);
}

static void walk_co(struct walker *walker)
{
	uint8_t *buf = walker->buf;
	uint64_t offset, length;

	for (unsigned i = 0; i < RANDOM_STEPS; i++) {
		unsigned dice = (unsigned)next_random(&walker->seed, 16);

		pick(walker, &offset, &length);
		if (dice < 7) {
			memset(buf, (int)next_random(&walker->seed, 255) + 1, length);
			assert_int_equal(step_co(walker, OX_IO_WRITE, offset, length, buf), 0);
			memcpy(walker->model + offset, buf, length);
		} else if (dice < 9) {
			/* A discard of this format's reads as zero, where it is whole units. */
			bool discard = dice == 8 && length == UNIT;

			assert_int_equal(step_co(walker, discard ? OX_IO_DISCARD : OX_IO_ZERO,
			                         offset, length, buf),
			                 0);
			memset(walker->model + offset, 0, length);
		} else if (dice == 9) {
			assert_int_equal(step_co(walker, OX_IO_FLUSH, 0, 0, buf), 0);
		} else {
			assert_int_equal(step_co(walker, OX_IO_READ, offset, length, buf), 0);
			assert_memory_equal(buf, walker->model + offset, length);
		}
	}
}

static void walker_fiber_co(void *arg)
{
	struct walker *walker = arg;

	walk_co(walker);
	__atomic_fetch_sub(walker->left, 1, __ATOMIC_SEQ_CST);
}

static void start_walker(struct ox_post *post)
{
	assert_int_equal(
	        ox_fiber_start(walker_fiber_co, ox_container_of(post, struct walker, post)), 0);
}

static void random_co(void)
{
	static struct walker walkers[1 + MAP_THREADS];
	unsigned left = fixture.channels;

	fixture.top.scribble = true;
	fixture.top.can_allocate = true;
	for (unsigned i = 0; i < fixture.channels; i++) {
		walkers[i] = (struct walker){.self = i,
		                             .seed = 0x9e3779b97f4a7c15u + i,
		                             .left = &left,
		                             .post.fn = start_walker};
		if (fixture.below.image)
			memset(walkers[i].model, 0x77, RANDOM_SIZE / 2);
	}
	if (fixture.below.image)
		map_set_data(&fixture.below, 0, RANDOM_SIZE / 2, 0x77, false);
	for (unsigned i = 0; i < fixture.channels; i++)
		ox_loop_post(fixture.loops[i], &walkers[i].post);
	while (__atomic_load_n(&left, __ATOMIC_SEQ_CST) > 0)
		ox_sleep_co(1000000);
	/* Everything in one request. */
	assert_int_equal(step_co(&walkers[0], OX_IO_READ, 0, RANDOM_SIZE, walkers[0].buf), 0);
	for (uint64_t unit = 0; unit < RANDOM_SIZE / UNIT; unit++)
		assert_memory_equal(walkers[0].buf + unit * UNIT,
		                    walkers[unit % fixture.channels].model + unit * UNIT, UNIT);
}

static void test_random(void **state)
{
	map_run(&(struct map_test){.fn_co = random_co, .size = RANDOM_SIZE});
	map_run(&(struct map_test){.fn_co = random_co, .size = RANDOM_SIZE, .threads = 2});
	map_run(&(struct map_test){
	        .fn_co = random_co, .size = RANDOM_SIZE, .threads = 2, .backing = RANDOM_SIZE / 2});
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_grace),
	        cmocka_unit_test(test_background),
	        cmocka_unit_test(test_begin),
	        cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
