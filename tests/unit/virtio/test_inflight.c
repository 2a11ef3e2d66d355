/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The inflight region when the process is killed.
 *
 * The virtio sources are compiled in with a hook behind every store to shared memory.  The hook
 * "kills" the device there (a jump out, its private state is thrown away), and lets the driver
 * run there, as it may on another CPU.  However often that happens, every chain that was offered
 * must come back exactly once, and what is resumed must be whole and in order.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* The jump out of a repair loses an allocation of its own. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
	return "leak:packed_open\n";
}
const char *__lsan_default_options(void);
const char *__lsan_default_options(void)
{
	return "print_suppressions=0";
}

#define MAX_HELD 512

struct sim {
	struct model model;
	struct ox_vq vq;
	struct ox_inflight inflight;
	void *area;
	uint16_t area_size;
	struct ox_vq_chain held[MAX_HELD];
	unsigned held_count;
	uint64_t taken[MAX_HELD];  /* by head: order of being taken, of the chain with serial */
	uint64_t serial[MAX_HELD]; /* this + 1 */
	uint64_t sequence;
	uint32_t base; /* what the front end would say */
	uint64_t kills, kills_in_start, resumed, stops;
};

static struct sim sim;
static bool armed, starting;
static unsigned countdown;
static jmp_buf killed;

void test_store_point(void)
{
	if (!armed)
		return;
	switch (model_random(&sim.model, 4)) {
	case 0:
		model_reap(&sim.model);
		break;
	case 1:
		model_reap(&sim.model);
		(void)model_offer(&sim.model, NULL);
		break;
	default:
		break;
	}
	if (countdown && !--countdown) {
		armed = false;
		longjmp(killed, 1);
	}
}

static struct ox_vq_chain room(void)
{
	static struct iovec iov[MODEL_BUFFERS * 2];
	static uint64_t guest_addr[MODEL_BUFFERS * 2];

	return (struct ox_vq_chain){.iov = iov, .guest_addr = guest_addr, .capacity = 32};
}

static void sim_hold(const struct ox_vq_chain *chain, bool again)
{
	uint64_t *taken = &sim.taken[chain->head];

	model_check_chain(&sim.model, chain);
	for (unsigned i = 0; i < sim.held_count; i++)
		assert_int_not_equal(sim.held[i].head, chain->head);
	sim.model.chain[chain->head].taken = true;
	/* A kill behind the last store of a pop: the region knows, we do not. */
	if (!again || sim.serial[chain->head] != sim.model.chain[chain->head].serial + 1)
		*taken = ++sim.sequence;
	sim.serial[chain->head] = sim.model.chain[chain->head].serial + 1;
	assert_true(sim.held_count < MAX_HELD);
	sim.held[sim.held_count++] = *chain;
}

/* As a new process does: everything private is new. */
static void sim_start(void)
{
	struct ox_vq_config config = model_config(&sim.model);
	struct ox_error err = {0};
	uint16_t index[MAX_HELD];
	uint64_t last = 0;
	unsigned count;

	sim.held_count = 0;
	ox_inflight_attach(&sim.inflight, sim.area, sim.model.packed, sim.area_size, NULL);
	config.inflight = &sim.inflight;
	config.avail_index = (uint16_t)sim.base;
	config.used_index = (uint16_t)(sim.base >> 16);
	starting = true;
	if (ox_vq_init(&sim.vq, &config, &err) < 0)
		fail_msg("%s", err.text);
	starting = false;
	count = ox_vq_resume(&sim.vq, index);
	for (unsigned i = 0; i < count; i++) {
		struct ox_vq_chain chain = room();

		if (ox_vq_pop_inflight(&sim.vq, index[i], &chain) != 1)
			fail_msg("%s", sim.vq.error);
		sim_hold(&chain, true);
		assert_true(sim.taken[chain.head] > last);
		last = sim.taken[chain.head];
	}
	sim.resumed += count;
	assert_int_equal(sim.vq.in_flight, count);
}

static void sim_kill(void)
{
	if (starting) {
		/* The references were not taken yet. */
		free(sim.vq.pending);
		free(sim.vq.busy);
		memset(&sim.vq, 0, sizeof(sim.vq));
		sim.kills_in_start++;
	} else {
		ox_vq_destroy(&sim.vq);
	}
	starting = false;
	sim.kills++;
}

static void sim_return(void)
{
	unsigned which = (unsigned)model_random(&sim.model, sim.held_count);
	struct ox_vq_chain chain = sim.held[which];

	sim.held[which] = sim.held[--sim.held_count];
	ox_vq_push(&sim.vq, &chain, model_written(&sim.model.chain[chain.head]));
}

static void sim_take(void)
{
	struct ox_vq_chain chain = room();
	int rc = ox_vq_pop(&sim.vq, &chain);

	if (rc < 0)
		fail_msg("%s", sim.vq.error);
	if (rc)
		sim_hold(&chain, false);
}

static void sim_step(void)
{
	switch (model_random(&sim.model, 8)) {
	case 0:
		model_reap(&sim.model);
		(void)model_offer(&sim.model, NULL);
		break;
	case 1:
	case 2:
	case 3:
		sim_take();
		break;
	case 4:
	case 5:
		if (sim.held_count)
			sim_return();
		break;
	case 6:
		ox_vq_flush(&sim.vq);
		break;
	case 7:
		/* An orderly stop, with or without something in flight. */
		if (model_random(&sim.model, 20))
			break;
		armed = false;
		sim.base = ox_vq_stop(&sim.vq);
		ox_vq_destroy(&sim.vq);
		sim.stops++;
		sim_start();
		break;
	}
}

static void run(bool packed, uint16_t size, uint16_t area_size, unsigned rounds, uint64_t seed)
{
	volatile unsigned round;

	memset(&sim, 0, sizeof(sim));
	model_init(&sim.model, packed, size, true, seed);
	sim.area_size = area_size;
	sim.area = aligned_alloc(64, ox_inflight_queue_bytes(packed, area_size));
	memset(sim.area, 0, ox_inflight_queue_bytes(packed, area_size));
	sim.base = packed ? 1u << 15 | 1u << 31 : 0;
	sim_start();
	for (round = 0; round < rounds; round++) {
		if (setjmp(killed)) {
			bool again = model_random(&sim.model, 3) == 0;

			sim_kill();
			/* Sometimes once more while repairing. */
			countdown = again ? 1 + (unsigned)model_random(&sim.model, 12) : 0;
			armed = again;
			sim_start();
			countdown = 0;
		}
		if (!countdown)
			countdown = 1 + (unsigned)model_random(&sim.model, 60);
		armed = true;
		sim_step();
		armed = false;
	}
	countdown = 0;
	/* Everything must come back now. */
	do {
		unsigned before = sim.held_count;

		sim_take();
		if (sim.held_count == before)
			break;
	} while (true);
	while (sim.held_count)
		sim_return();
	ox_vq_flush(&sim.vq);
	model_reap(&sim.model);
	assert_int_equal(sim.model.offered, sim.model.reaped);
	assert_int_equal(sim.vq.slots, 0);
	assert_int_equal(ox_inflight_pending(&sim.inflight, (uint16_t[1]){0}, 1), 0);
	assert_true(sim.kills > rounds / 100);
	assert_true(sim.kills_in_start > 0);
	assert_true(sim.resumed > 0);
	assert_true(sim.stops > 0);
	assert_true(sim.model.reaped > rounds / 100);
	ox_vq_destroy(&sim.vq);
	model_free(&sim.model);
	free(sim.area);
}

static void test_kill_split(void **state)
{
	run(false, 1, 1, 20000, 1);
	run(false, 4, 4, 200000, 2);
	run(false, 16, 64, 200000, 3);
	run(false, 256, 256, 200000, 4);
}

static void test_kill_packed(void **state)
{
	run(true, 1, 1, 20000, 5);
	run(true, 4, 4, 200000, 6);
	run(true, 5, 5, 200000, 7);
	run(true, 16, 64, 200000, 8);
	run(true, 100, 100, 200000, 9);
}

/* --- states made by hand --------------------------------------------------------------- */

static struct ox_inflight_split *split_region(uint16_t size)
{
	struct ox_inflight_split *region = aligned_alloc(64, ox_inflight_queue_bytes(false, size));

	memset(region, 0, ox_inflight_queue_bytes(false, size));
	region->version = 1;
	region->desc_num = size;
	return region;
}

static int open_region(void *region, bool packed, uint16_t size,
                       struct ox_inflight_position *position, void *ring)
{
	struct ox_inflight inflight;
	struct ox_error err = {0};
	int rc;

	ox_inflight_attach(&inflight, region, packed, size, NULL);
	rc = ox_inflight_open(&inflight, position, ring, size, &err);
	if (rc < 0)
		assert_true(err.text[0]);
	return rc;
}

static void test_sizes(void **state)
{
	assert_int_equal(ox_inflight_queue_bytes(false, 128), 2112);
	assert_int_equal(ox_inflight_queue_bytes(true, 128), 4160);
	assert_int_equal(ox_inflight_queue_bytes(false, 1), 64);
	assert_int_equal(ox_inflight_queue_bytes(true, 32768), 32 + 32768 * 32 + 32);
	assert_int_equal(offsetof(struct ox_inflight_packed, desc), 32);
	assert_int_equal(offsetof(struct ox_inflight_packed, old_used_wrap_counter), 21);
	assert_int_equal(offsetof(struct ox_inflight_packed_entry, addr), 24);
	assert_int_equal(offsetof(struct ox_inflight_split_entry, next), 6);
}

static void test_create(void **state)
{
	struct ox_error err = {0};
	uint64_t bytes = 0;
	struct stat st;
	int fd = -1;

	assert_int_equal(ox_inflight_create(4, true, 128, &fd, &bytes, &err), 0);
	assert_int_equal(bytes, 4 * 4160);
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_size, bytes);
	close(fd);
	assert_int_equal(ox_inflight_create(0, true, 128, &fd, &bytes, &err), -EINVAL);
	assert_int_equal(ox_inflight_create(1, false, 0, &fd, &bytes, &err), -EINVAL);
}

static void test_split_fresh(void **state)
{
	struct ox_inflight_split *region = split_region(8);
	struct ox_inflight_position position = {.avail = 77, .used = 70};

	region->version = 0;
	region->desc[3].inflight = 9;
	assert_int_equal(open_region(region, false, 8, &position, NULL), 0);
	assert_int_equal(region->version, 1);
	assert_int_equal(region->desc_num, 8);
	assert_int_equal(region->used_idx, 70);
	assert_int_equal(region->desc[3].inflight, 0);
	assert_int_equal(position.avail, 77);
	free(region);
}

/* Published, and killed before the marks of the batch {5, 2} were cleared; 6 is in flight. */
static void test_split_last_batch(void **state)
{
	struct ox_inflight_split *region = split_region(8);
	struct ox_inflight inflight;
	uint16_t index[8];

	for (unsigned twice = 0; twice < 2; twice++) {
		struct ox_inflight_position position = {.used = 1};

		region->used_idx = twice ? 1 : 65535;
		region->last_batch_head = 5;
		region->desc[5].next = 2;
		region->desc[5].inflight = region->desc[2].inflight = !twice;
		region->desc[6] = (struct ox_inflight_split_entry){.inflight = 1, .counter = 40};
		region->desc[0] = (struct ox_inflight_split_entry){.inflight = 1, .counter = 41};
		ox_inflight_attach(&inflight, region, false, 8, NULL);
		assert_int_equal(ox_inflight_open(&inflight, &position, NULL, 8, NULL), 0);
		assert_int_equal(region->desc[5].inflight, 0);
		assert_int_equal(region->desc[2].inflight, 0);
		assert_int_equal(region->used_idx, 1);
		assert_int_equal(position.avail, 3);
		assert_int_equal(inflight.counter, 42);
		assert_int_equal(ox_inflight_pending(&inflight, index, 1), 1);
		assert_int_equal(ox_inflight_pending(&inflight, index, 8), 2);
		assert_int_equal(index[0], 6);
		assert_int_equal(index[1], 0);
	}
	free(region);
}

static void test_split_impossible(void **state)
{
	struct ox_inflight_split *region = split_region(8);
	struct ox_inflight_position position = {.used = 0};

	region->version = 2;
	assert_int_equal(open_region(region, false, 8, &position, NULL), -EINVAL);
	region->version = 1;
	region->desc_num = 16;
	assert_int_equal(open_region(region, false, 8, &position, NULL), -EINVAL);
	region->desc_num = 8;
	region->desc[1].inflight = 1;
	region->used_idx = 100;
	assert_int_equal(open_region(region, false, 8, &position, NULL), -EINVAL);
	/* The same with nothing in flight: a ring that began anew. */
	region->desc[1].inflight = 0;
	assert_int_equal(open_region(region, false, 8, &position, NULL), 0);
	assert_int_equal(region->used_idx, 0);
	assert_int_equal(position.avail, 0);
	/* The region is for eight entries, the ring has four. */
	struct ox_inflight inflight;
	ox_inflight_attach(&inflight, region, false, 8, NULL);
	region->desc[4].inflight = 1;
	assert_int_equal(ox_inflight_open(&inflight, &position, NULL, 4, NULL), -EINVAL);
	region->desc[4].inflight = 0;
	assert_int_equal(ox_inflight_open(&inflight, &position, NULL, 4, NULL), 0);
	region->used_idx = 65534;
	region->last_batch_head = 8;
	region->desc[1].inflight = 1;
	assert_int_equal(open_region(region, false, 8, &position, NULL), -EINVAL);
	free(region);
}

static struct ox_inflight_packed *packed_region(uint16_t size)
{
	struct ox_inflight_packed *region = aligned_alloc(64, ox_inflight_queue_bytes(true, size));
	struct ox_inflight_position position = {.used_wrap = true, .avail_wrap = true};

	memset(region, 0, ox_inflight_queue_bytes(true, size));
	assert_int_equal(open_region(region, true, size, &position, NULL), 0);
	return region;
}

static void test_packed_impossible(void **state)
{
	_Alignas(16) struct ox_packed_desc ring[8] = {0};

	for (unsigned i = 0; i < 12; i++) {
		struct ox_inflight_packed *region = packed_region(8);
		struct ox_inflight_position position = {0};

		switch (i) {
		case 0:
			region->version = 3;
			break;
		case 1:
			region->desc_num = 9;
			break;
		case 2:
			region->used_idx = 8;
			break;
		case 3:
			region->old_used_idx = 0xffff;
			break;
		case 4:
			region->used_wrap_counter = 2;
			break;
		case 5: /* free list runs in a circle */
			region->desc[7].next = 3;
			break;
		case 6: /* a chain that runs into the free list */
			region->old_free_head = 1;
			region->desc[0] = (struct ox_inflight_packed_entry){
			        .inflight = 1, .num = 2, .last = 1, .next = 1};
			break;
		case 7: /* a chain that leaves the array */
			region->old_free_head = 2;
			region->desc[0] = (struct ox_inflight_packed_entry){
			        .inflight = 1, .num = 2, .last = 1, .next = 8};
			break;
		case 8: /* another end than it says */
			region->old_free_head = 2;
			region->desc[0] = (struct ox_inflight_packed_entry){
			        .inflight = 1, .num = 2, .last = 7, .next = 1};
			break;
		case 9:
			region->old_free_head = 2;
			region->desc[0] = (struct ox_inflight_packed_entry){
			        .inflight = 1, .num = 0, .last = 0, .next = 1};
			break;
		case 10: /* in a circle */
			region->old_free_head = 2;
			region->desc[0] = (struct ox_inflight_packed_entry){
			        .inflight = 1, .num = 3, .last = 0, .next = 1};
			region->desc[1].next = 0;
			break;
		case 11: /* and one that is good */
			region->old_free_head = 2;
			region->desc[0] = (struct ox_inflight_packed_entry){
			        .inflight = 1, .num = 2, .last = 1, .next = 1, .counter = 7};
			assert_int_equal(open_region(region, true, 8, &position, ring), 0);
			assert_int_equal(position.avail, 2);
			assert_int_equal(position.slots, 2);
			assert_int_equal(position.used, 0);
			free(region);
			continue;
		}
		if (open_region(region, true, 8, &position, ring) != -EINVAL)
			fail_msg("case %u was taken", i);
		free(region);
	}
}

/* Killed before the first flags: the second element, which looks used, must not. */
static void test_packed_rollback(void **state)
{
	_Alignas(16) struct ox_packed_desc ring[4] = {0};
	struct ox_inflight_packed *region = packed_region(4);
	struct ox_inflight_position position = {0};

	for (unsigned i = 0; i < 3; i++) {
		region->desc[i].inflight = 1;
		region->desc[i].num = 1;
		region->desc[i].last = (uint16_t)i;
		region->desc[i].counter = i;
		ring[i].flags = htole16(OX_DESC_AVAIL);
	}
	region->old_free_head = 3;
	region->desc[1].next = 3; /* the batch {1, 0} was linked */
	region->desc[0].next = 1;
	region->free_head = 0;
	region->used_idx = 2;
	ring[1].flags = htole16(OX_DESC_AVAIL | OX_DESC_USED);
	assert_int_equal(open_region(region, true, 4, &position, ring), 0);
	assert_int_equal(position.used, 0);
	assert_int_equal(position.avail, 3);
	assert_int_equal(position.slots, 3);
	assert_int_equal(region->free_head, 3);
	assert_int_equal(region->used_idx, 0);
	assert_int_equal(le16toh(ring[1].flags), OX_DESC_AVAIL);

	/* The same, but published. */
	region->free_head = 0;
	region->used_idx = 2;
	ring[0].flags = ring[1].flags = htole16(OX_DESC_AVAIL | OX_DESC_USED);
	assert_int_equal(open_region(region, true, 4, &position, ring), 0);
	assert_int_equal(position.used, 2);
	assert_int_equal(position.avail, 3);
	assert_int_equal(position.slots, 1);
	assert_int_equal(region->desc[0].inflight, 0);
	assert_int_equal(region->desc[1].inflight, 0);
	assert_int_equal(region->desc[2].inflight, 1);
	assert_int_equal(region->old_used_idx, 2);
	free(region);
}

/* A client that writes anything into the region, before the start and while the queue runs:
 * nothing but that queue may suffer (the sanitizers watch). */
static void test_hostile(void **state)
{
	unsigned started = 0, broke = 0;

	for (unsigned round = 0; round < 6000; round++) {
		bool packed = round & 1;
		uint16_t size = 8, index[8];
		uint64_t bytes = ox_inflight_queue_bytes(packed, size);
		uint8_t *area = aligned_alloc(64, bytes);
		struct ox_vq_config config;
		struct ox_inflight inflight;
		struct ox_vq_chain held[8];
		struct model model;
		struct ox_vq vq;
		unsigned count = 0, pending;

		memset(area, 0, bytes);
		model_init(&model, packed, size, true, round + 1);
		ox_inflight_attach(&inflight, area, packed, size, NULL);
		config = model_config(&model);
		config.inflight = &inflight;
		if (round % 3 == 0) {
			struct ox_inflight_position position = {.used_wrap = true};

			assert_int_equal(ox_inflight_open(&inflight, &position, NULL, size, NULL),
			                 0);
			for (unsigned i = 0; i < 1 + round % 5; i++)
				area[16 + model_random(&model, bytes - 16)] =
				        (uint8_t)model_random(&model, 10);
		}
		if (ox_vq_init(&vq, &config, NULL) < 0)
			goto next;
		started++;
		pending = ox_vq_resume(&vq, index);
		for (unsigned i = 0; i < pending; i++) {
			struct ox_vq_chain chain = room();

			(void)!ox_vq_pop_inflight(&vq, index[i], &chain);
		}
		while (model_offer(&model, NULL))
			;
		for (unsigned i = 0; i < 40; i++) {
			struct ox_vq_chain chain = room();

			area[12 + model_random(&model, bytes - 12)] =
			        (uint8_t)model_random(&model, 256);
			if (count < 8 && ox_vq_pop(&vq, &chain) == 1)
				held[count++] = chain;
			if (count && model_random(&model, 2))
				ox_vq_push(&vq, &held[--count], 0);
			if (model_random(&model, 2))
				ox_vq_flush(&vq);
		}
		broke += vq.broken;
		ox_vq_destroy(&vq);
	next:
		model_free(&model);
		free(area);
	}
	assert_true(started > 2000);
	assert_true(broke > 100);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_kill_split),
	        cmocka_unit_test(test_kill_packed),
	        cmocka_unit_test(test_sizes),
	        cmocka_unit_test(test_create),
	        cmocka_unit_test(test_split_fresh),
	        cmocka_unit_test(test_split_last_batch),
	        cmocka_unit_test(test_split_impossible),
	        cmocka_unit_test(test_packed_impossible),
	        cmocka_unit_test(test_packed_rollback),
	        cmocka_unit_test(test_hostile),
	};

	return cmocka_run_group_tests_name("inflight", tests, NULL, NULL);
}
