/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Rings: random traffic against a model of the driver, every malformed case, notifications, and
 * the dirty log.
 */
#include "model.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ROOM 64

struct device {
	struct ox_vq vq;
	struct ox_vq_chain held[512];
	unsigned held_count;
	struct iovec iov[OX_VQ_MAX_CHAIN];
	uint64_t guest_addr[OX_VQ_MAX_CHAIN];
	bool asleep;
};

static void device_start(struct device *device, struct model *model)
{
	struct ox_vq_config config = model_config(model);
	struct ox_error err = {0};

	memset(device, 0, sizeof(*device));
	if (ox_vq_init(&device->vq, &config, &err) < 0)
		fail_msg("%s", err.text);
}

static struct ox_vq_chain device_room(struct device *device, unsigned capacity)
{
	return (struct ox_vq_chain){
	        .iov = device->iov, .guest_addr = device->guest_addr, .capacity = capacity};
}

/* Takes one chain and checks it; false: none. */
static bool device_take(struct device *device, struct model *model)
{
	struct ox_vq_chain chain = device_room(device, ROOM);
	int rc = ox_vq_pop(&device->vq, &chain);

	if (rc < 0)
		fail_msg("%s", device->vq.error);
	if (!rc)
		return false;
	model_check_chain(model, &chain);
	assert_false(model->chain[chain.head].taken);
	model->chain[chain.head].taken = true;
	device->held[device->held_count++] = chain;
	return true;
}

static void device_return(struct device *device, struct model *model, unsigned which)
{
	struct ox_vq_chain *chain = &device->held[which];

	ox_vq_push(&device->vq, chain, model_written(&model->chain[chain->head]));
	*chain = device->held[--device->held_count];
}

static void run_random(bool packed, bool event_idx, uint16_t size, unsigned rounds, uint64_t seed)
{
	static struct device device;
	struct model model;
	unsigned notified = 0, kicked = 0;

	model_init(&model, packed, size, event_idx, seed);
	device_start(&device, &model);
	for (unsigned i = 0; i < rounds; i++) {
		switch (model_random(&model, 6)) {
		case 0:
		case 1:
			for (uint64_t n = model_random(&model, 5); n; n--) {
				bool kick = false;

				if (!model_offer(&model, &kick))
					break;
				kicked += kick;
				/* A device that sleeps must be told. */
				if (device.asleep)
					assert_true(kick);
				if (kick)
					device.asleep = false;
			}
			break;
		case 2:
			ox_vq_disable_notify(&device.vq);
			device.asleep = false;
			for (uint64_t n = model_random(&model, 8); n; n--)
				if (!device_take(&device, &model))
					break;
			if (model_random(&model, 2))
				device.asleep = !ox_vq_enable_notify(&device.vq);
			break;
		case 3:
		case 4: {
			bool notify;

			for (uint64_t n = model_random(&model, 6); n && device.held_count; n--)
				device_return(&device, &model,
				              (unsigned)model_random(&model, device.held_count));
			if (model_random(&model, 4) == 0)
				break; /* stays hidden */
			notify = ox_vq_should_notify(&device.vq);
			notified += notify;
			if (model.asleep && model_has_used(&model))
				assert_true(notify);
			if (notify)
				model_wake(&model);
			break;
		}
		case 5:
			model_reap(&model);
			if (model_random(&model, 2))
				model_sleep(&model);
			else
				model_wake(&model);
			break;
		}
	}
	while (device_take(&device, &model))
		;
	while (device.held_count)
		device_return(&device, &model, 0);
	ox_vq_flush(&device.vq);
	model_reap(&model);
	assert_int_equal(model.offered, model.reaped);
	assert_true(model.offered > rounds / 100);
	assert_true(notified > 0 && kicked > 0);
	assert_int_equal(device.vq.in_flight, 0);
	assert_int_equal(device.vq.slots, 0);
	ox_vq_destroy(&device.vq);
	model_free(&model);
}

static void test_random_split(void **state)
{
	run_random(false, false, 1, 20000, 1);
	run_random(false, false, 8, 60000, 2);
	run_random(false, true, 16, 100000, 3);
	run_random(false, true, 256, 200000, 4);
	run_random(false, false, 128, 200000, 5);
}

static void test_random_packed(void **state)
{
	run_random(true, false, 1, 20000, 6);
	run_random(true, true, 7, 100000, 7); /* no power of two */
	run_random(true, true, 16, 100000, 8);
	run_random(true, true, 256, 200000, 9);
	run_random(true, false, 100, 200000, 10);
}

/* Both index widths run over: with one chain a round it takes 65536 rounds. */
static void test_index_wrap(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;

		model_init(&model, packed, 2, true, 11);
		model.plain = true;
		device_start(&device, &model);
		for (unsigned i = 0; i < 140000; i++) {
			assert_true(model_offer(&model, NULL));
			assert_true(device_take(&device, &model));
			device_return(&device, &model, 0);
			assert_false(model_has_used(&model));
			ox_vq_flush(&device.vq);
			assert_int_equal(model_reap(&model), 1);
		}
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* Nothing is visible before the flush; then all is at once. */
static void test_batch(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;
		unsigned count = 0;

		model_init(&model, packed, 64, false, 12);
		device_start(&device, &model);
		while (model_offer(&model, NULL))
			count++;
		while (device_take(&device, &model))
			;
		assert_int_equal(device.held_count, count);
		assert_int_equal(device.vq.in_flight, count);
		while (device.held_count) {
			device_return(&device, &model, device.held_count / 2);
			assert_false(model_has_used(&model));
		}
		assert_int_equal(device.vq.in_flight, 0);
		assert_true(ox_vq_should_notify(&device.vq));
		assert_false(ox_vq_should_notify(&device.vq));
		assert_int_equal(model_reap(&model), count);
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* A stop hands over the position; a queue that starts there goes on. */
static void test_base(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;

		model_init(&model, packed, 16, false, 13);
		device_start(&device, &model);
		for (unsigned i = 0; i < 500; i++) {
			struct ox_vq_config config = model_config(&model);
			uint32_t base;

			while (model_offer(&model, NULL))
				;
			for (unsigned n = 0; n < i % 5; n++)
				if (device_take(&device, &model))
					device_return(&device, &model, 0);
			base = ox_vq_stop(&device.vq);
			model_reap(&model);
			ox_vq_destroy(&device.vq);
			config.avail_index = (uint16_t)base;
			config.used_index = (uint16_t)(base >> 16);
			assert_int_equal(ox_vq_init(&device.vq, &config, NULL), 0);
			assert_int_equal(ox_vq_base(&device.vq), base);
		}
		assert_true(model.reaped > 500);
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* Too little room takes nothing; with more room the same chain comes. */
static void test_no_room(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;
		unsigned refused = 0;

		model_init(&model, packed, 64, false, 14);
		device_start(&device, &model);
		for (unsigned i = 0; i < 2000; i++) {
			struct ox_vq_chain chain = device_room(&device, 2);
			int rc;

			while (model_offer(&model, NULL))
				;
			rc = ox_vq_pop(&device.vq, &chain);
			if (rc == -ENOBUFS) {
				refused++;
				chain = device_room(&device, OX_VQ_MAX_CHAIN);
				rc = ox_vq_pop(&device.vq, &chain);
			}
			assert_int_equal(rc, 1);
			model_check_chain(&model, &chain);
			model.chain[chain.head].taken = true;
			ox_vq_push(&device.vq, &chain, model_written(&model.chain[chain.head]));
			ox_vq_flush(&device.vq);
			model_reap(&model);
		}
		assert_true(refused > 100);
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* --- malformed rings ------------------------------------------------------------------- */

#define SIZE 16

struct bad {
	struct model model;
	struct device device;
};
static struct bad bad;

static void bad_start(bool packed)
{
	model_init(&bad.model, packed, SIZE, false, 99);
	device_start(&bad.device, &bad.model);
}

/* The next pop breaks the queue, tells why, and so does every later one. */
static void bad_expect(const char *words)
{
	struct ox_vq_chain chain = device_room(&bad.device, OX_VQ_MAX_CHAIN);
	int rc = ox_vq_pop(&bad.device.vq, &chain);

	if (rc != -EPROTO)
		fail_msg("expected \"%s\", got %d", words, rc);
	if (!strstr(bad.device.vq.error, words))
		fail_msg("expected \"%s\", got \"%s\"", words, bad.device.vq.error);
	assert_true(bad.device.vq.broken);
	assert_int_equal(ox_vq_pop(&bad.device.vq, &chain), -EPROTO);
	ox_vq_destroy(&bad.device.vq);
	model_free(&bad.model);
}

static void bad_expect_good(unsigned out, unsigned in)
{
	struct ox_vq_chain chain = device_room(&bad.device, OX_VQ_MAX_CHAIN);
	int rc = ox_vq_pop(&bad.device.vq, &chain);

	if (rc != 1)
		fail_msg("%d %s", rc, bad.device.vq.error);
	assert_int_equal(chain.out_count, out);
	assert_int_equal(chain.in_count, in);
	ox_vq_destroy(&bad.device.vq);
	model_free(&bad.model);
}

static void split_one(uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	bad_start(false);
	model_split_desc(&bad.model, MODEL_RINGS, 0, addr, len, flags, next);
	model_split_avail(&bad.model, 0);
}

static void table_desc(uint16_t i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	model_split_desc(&bad.model, MODEL_TABLES, i, addr, len, flags, next);
}

static void test_split_malformed(void **state)
{
	struct ox_split_avail *avail;

	bad_start(false);
	avail = model_host(&bad.model, MODEL_DRIVER);
	avail->idx = htole16(SIZE + 1);
	bad_expect("avail index jumped");

	bad_start(false);
	model_split_avail(&bad.model, SIZE);
	bad_expect("head 16 in a ring of 16");

	split_one(0x30000, 16, OX_DESC_NEXT, SIZE);
	bad_expect("next descriptor 16");

	split_one(0x30000, 16, OX_DESC_NEXT, 0);
	bad_expect("loop");

	bad_start(false); /* a loop of the whole ring */
	for (uint16_t i = 0; i < SIZE; i++)
		model_split_desc(&bad.model, MODEL_RINGS, i, 0x30000, 16, OX_DESC_NEXT,
		                 (i + 1) % SIZE);
	model_split_avail(&bad.model, 3);
	bad_expect("loop");

	split_one(0x30000, 16, OX_DESC_WRITE | OX_DESC_NEXT, 1);
	model_split_desc(&bad.model, MODEL_RINGS, 1, 0x30000, 16, 0, 0);
	bad_expect("behind a device-writable one");

	split_one(2 * MODEL_MIB, 1, 0, 0);
	bad_expect("outside memory");
	split_one(2 * MODEL_MIB - 1, 2, 0, 0);
	bad_expect("outside memory");
	split_one(MODEL_FAR - 1, 2, 0, 0);
	bad_expect("outside memory");
	split_one(MODEL_FAR + MODEL_MIB - 8, 9, OX_DESC_WRITE, 0);
	bad_expect("outside memory");
	split_one(0x30000, UINT32_MAX, 0, 0);
	bad_expect("outside memory");
	split_one(UINT64_MAX, 2, 0, 0);
	bad_expect("wraps around");
	split_one(UINT64_MAX - 15, 16, 0, 0);
	bad_expect("outside memory");

	/* The edges of what is allowed. */
	split_one(2 * MODEL_MIB - 1, 1, OX_DESC_WRITE, 0);
	bad_expect_good(0, 1);
	split_one(MODEL_MIB - 1, 2, 0, 0);
	bad_expect_good(2, 0);
	split_one(0, 2 * MODEL_MIB, 0, 0);
	bad_expect_good(2, 0);
	split_one(UINT64_MAX, 0, 0, 0);
	bad_expect_good(0, 0);

	/* The same head twice. */
	split_one(0x30000, 16, 0, 0);
	model_split_avail(&bad.model, 0);
	assert_true(device_take(&bad.device, &(struct model){.size = 1,
	                                                     .memory = bad.model.memory,
	                                                     .chain = &(struct model_chain){
	                                                             .outstanding = true,
	                                                             .count = 1,
	                                                             .buffer = {{0x30000, 16}},
	                                                     }}));
	bad_expect("while in flight");
}

static void test_split_indirect_malformed(void **state)
{
	split_one(MODEL_TABLES, 16, OX_DESC_INDIRECT | OX_DESC_NEXT, 1);
	bad_expect("indirect descriptor with a next");
	split_one(MODEL_TABLES, 0, OX_DESC_INDIRECT, 0);
	bad_expect("indirect table of 0 bytes");
	split_one(MODEL_TABLES, 24, OX_DESC_INDIRECT, 0);
	bad_expect("indirect table of 24 bytes");
	split_one(MODEL_TABLES, 16 * (OX_VQ_MAX_CHAIN + 1), OX_DESC_INDIRECT, 0);
	bad_expect("limit 1026");
	split_one(MODEL_FAR + MODEL_MIB - 16, 32, OX_DESC_INDIRECT, 0);
	model_split_desc(&bad.model, MODEL_FAR + MODEL_MIB - 16, 0, 0x30000, 1, OX_DESC_NEXT, 1);
	bad_expect("is outside memory");
	split_one(UINT64_MAX - 15, 32, OX_DESC_INDIRECT, 0);
	bad_expect("wraps around");

	split_one(MODEL_TABLES, 16, OX_DESC_INDIRECT, 0);
	table_desc(0, MODEL_TABLES, 16, OX_DESC_INDIRECT, 0);
	bad_expect("in an indirect table");
	split_one(MODEL_TABLES, 32, OX_DESC_INDIRECT, 0);
	table_desc(0, 0x30000, 16, OX_DESC_NEXT, 2);
	bad_expect("next descriptor 2 in an indirect table of 2");
	split_one(MODEL_TABLES, 32, OX_DESC_INDIRECT, 0);
	table_desc(0, 0x30000, 16, OX_DESC_NEXT, 1);
	table_desc(1, 0x30000, 16, OX_DESC_NEXT, 0);
	bad_expect("loop in an indirect table");
	split_one(MODEL_TABLES, 32, OX_DESC_INDIRECT, 0);
	table_desc(0, 0x30000, 16, OX_DESC_NEXT | OX_DESC_WRITE, 1);
	table_desc(1, 0x30000, 16, 0, 0);
	bad_expect("behind a device-writable one");
	split_one(MODEL_TABLES, 16, OX_DESC_INDIRECT, 0);
	table_desc(0, 3 * MODEL_MIB, 16, 0, 0);
	bad_expect("outside memory");

	/* Not negotiated. */
	split_one(MODEL_TABLES, 16, OX_DESC_INDIRECT, 0);
	bad.device.vq.config.indirect = false;
	bad_expect("not negotiated");

	/* Longer than the ring, up to the limit, is served. */
	split_one(MODEL_TABLES - 0x8000, 16 * OX_VQ_MAX_CHAIN, OX_DESC_INDIRECT, 0);
	for (uint16_t i = 0; i < OX_VQ_MAX_CHAIN; i++)
		model_split_desc(&bad.model, MODEL_TABLES - 0x8000, i, 0x30000 + i * 64u, 64,
		                 (i ? OX_DESC_WRITE : 0) |
		                         (i + 1 < OX_VQ_MAX_CHAIN ? OX_DESC_NEXT : 0),
		                 i + 1);
	bad_expect_good(1, OX_VQ_MAX_CHAIN - 1);
	/* One entry too many once a buffer was split in two. */
	split_one(MODEL_TABLES - 0x8000, 16 * OX_VQ_MAX_CHAIN, OX_DESC_INDIRECT, 0);
	for (uint16_t i = 0; i < OX_VQ_MAX_CHAIN; i++)
		model_split_desc(&bad.model, MODEL_TABLES - 0x8000, i, MODEL_MIB - 1, i ? 1 : 2,
		                 i + 1 < OX_VQ_MAX_CHAIN ? OX_DESC_NEXT : 0, i + 1);
	bad_expect("chain of more than 1026");
}

static void packed_one(uint64_t addr, uint32_t len, uint16_t flags)
{
	bad_start(true);
	model_packed_desc(&bad.model, MODEL_RINGS, 0, addr, len, 5, flags | OX_DESC_AVAIL);
}

static void packed_table(uint16_t i, uint64_t addr, uint32_t len, uint16_t flags)
{
	model_packed_desc(&bad.model, MODEL_TABLES, i, addr, len, 0, flags);
}

static void test_packed_malformed(void **state)
{
	packed_one(2 * MODEL_MIB, 1, 0);
	bad_expect("outside memory");
	packed_one(UINT64_MAX, 2, 0);
	bad_expect("wraps around");
	packed_one(MODEL_MIB - 1, 2, 0);
	bad_expect_good(2, 0);

	/* A chain without an end. */
	bad_start(true);
	for (uint16_t i = 0; i < SIZE; i++)
		model_packed_desc(&bad.model, MODEL_RINGS, i, 0x30000, 16, i,
		                  OX_DESC_NEXT | OX_DESC_AVAIL);
	bad_expect("more descriptors in flight");

	/* A second lap over slots that are still the device's. */
	bad_start(true);
	for (uint16_t i = 0; i < SIZE; i++)
		model_packed_desc(&bad.model, MODEL_RINGS, i, 0x30000, 16, i, OX_DESC_AVAIL);
	for (uint16_t i = 0; i < SIZE; i++) {
		struct ox_vq_chain chain = device_room(&bad.device, ROOM);

		assert_int_equal(ox_vq_pop(&bad.device.vq, &chain), 1);
		assert_int_equal(chain.head, i);
	}
	model_packed_desc(&bad.model, MODEL_RINGS, 0, 0x30000, 16, 0, OX_DESC_USED);
	bad_expect("more descriptors in flight");

	packed_one(0x30000, 16, OX_DESC_WRITE | OX_DESC_NEXT);
	model_packed_desc(&bad.model, MODEL_RINGS, 1, 0x30000, 16, 5, OX_DESC_AVAIL);
	bad_expect("behind a device-writable one");

	packed_one(MODEL_TABLES, 16, OX_DESC_INDIRECT | OX_DESC_NEXT);
	bad_expect("indirect descriptor with a next");
	packed_one(MODEL_TABLES, 0, OX_DESC_INDIRECT);
	bad_expect("indirect table of 0 bytes");
	packed_one(MODEL_TABLES, 40, OX_DESC_INDIRECT);
	bad_expect("indirect table of 40 bytes");
	packed_one(MODEL_TABLES, 16 * (OX_VQ_MAX_CHAIN + 1), OX_DESC_INDIRECT);
	bad_expect("limit 1026");
	packed_one(MODEL_FAR + MODEL_MIB - 16, 32, OX_DESC_INDIRECT);
	bad_expect("is outside memory");
	packed_one(UINT64_MAX - 15, 32, OX_DESC_INDIRECT);
	bad_expect("wraps around");
	packed_one(MODEL_TABLES, 16, OX_DESC_INDIRECT);
	packed_table(0, MODEL_TABLES, 16, OX_DESC_INDIRECT);
	bad_expect("in an indirect table");
	packed_one(MODEL_TABLES, 16, OX_DESC_INDIRECT);
	bad.device.vq.config.indirect = false;
	bad_expect("not negotiated");
	/* NEXT in a packed table means nothing. */
	packed_one(MODEL_TABLES, 32, OX_DESC_INDIRECT);
	packed_table(0, 0x30000, 16, 0);
	packed_table(1, 0x30000, 16, OX_DESC_NEXT | OX_DESC_WRITE);
	bad_expect_good(1, 1);
}

static void test_bad_config(void **state)
{
	struct model model;
	struct ox_vq vq;
	struct ox_inflight inflight;
	static _Alignas(64) char area[4096];
	static const struct {
		uint16_t size;
		bool packed;
		uint16_t avail;
	} bad_sizes[] = {{0}, {3}, {65535}, {0, true}, {32769, true}, {16, true, 16}};

	model_init(&model, false, 16, false, 1);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(bad_sizes); i++) {
		struct ox_vq_config config = model_config(&model);
		struct ox_error err = {0};

		config.size = bad_sizes[i].size;
		config.packed = bad_sizes[i].packed;
		config.avail_index = bad_sizes[i].avail;
		assert_int_equal(ox_vq_init(&vq, &config, &err), -EINVAL);
		assert_true(err.text[0]);
	}
	for (unsigned i = 0; i < 6; i++) {
		struct ox_vq_config config = model_config(&model);
		struct ox_error err = {0};
		void **pointer = i % 3 == 0   ? &config.desc
		                 : i % 3 == 1 ? &config.driver
		                              : &config.device;

		*pointer = i < 3 ? NULL : (char *)*pointer + 1;
		assert_int_equal(ox_vq_init(&vq, &config, &err), -EINVAL);
	}
	/* An inflight region of another kind, or for a smaller ring. */
	for (unsigned i = 0; i < 2; i++) {
		struct ox_vq_config config = model_config(&model);

		ox_inflight_attach(&inflight, area, i, i ? 16 : 8, NULL);
		config.inflight = &inflight;
		assert_int_equal(ox_vq_init(&vq, &config, NULL), -EINVAL);
	}
	assert_int_equal(model.memory->references, 1);
	model_free(&model);
}

/* --- notifications --------------------------------------------------------------------- */

static void test_first_notification(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;

		model_init(&model, packed, 16, packed, 21);
		device_start(&device, &model);
		model_wake(&model);
		/* Once, whatever the driver says: an earlier process may have died in between. */
		assert_true(ox_vq_should_notify(&device.vq));
		assert_false(ox_vq_should_notify(&device.vq));
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* Without event_idx the flags are obeyed, both ways. */
static void test_flags(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;
		bool kick = true;

		model_init(&model, packed, 16, false, 22);
		device_start(&device, &model);
		assert_true(ox_vq_should_notify(&device.vq));
		ox_vq_disable_notify(&device.vq);
		assert_true(model_offer(&model, &kick));
		assert_false(kick);
		assert_true(ox_vq_enable_notify(&device.vq));
		assert_true(model_offer(&model, &kick));
		assert_true(kick);
		assert_true(device_take(&device, &model));
		assert_true(ox_vq_has_work(&device.vq));
		assert_true(device_take(&device, &model));
		assert_false(ox_vq_has_work(&device.vq));
		assert_false(ox_vq_enable_notify(&device.vq));
		model_wake(&model);
		device_return(&device, &model, 0);
		assert_false(ox_vq_should_notify(&device.vq));
		assert_true(model_has_used(&model));
		model_reap(&model);
		model_sleep(&model);
		device_return(&device, &model, 0);
		assert_true(ox_vq_should_notify(&device.vq));
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* With event_idx a device that went to sleep once and is awake again is not kicked: the event index
 * does not stay where the next chain passes it. */
static void test_awake_after_sleep(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;
		bool kick;

		model_init(&model, packed, 16, true, 23);
		device_start(&device, &model);
		for (unsigned round = 0; round < 40; round++) {
			assert_false(ox_vq_enable_notify(&device.vq));
			if (round % 3 == 0) {
				assert_true(model_offer(&model, &kick));
				assert_true(kick);
				assert_true(device_take(&device, &model));
				device_return(&device, &model, 0);
				ox_vq_flush(&device.vq);
				model_reap(&model);
			}
			ox_vq_disable_notify(&device.vq);
			assert_true(model_offer(&model, &kick));
			assert_false(kick);
			assert_true(device_take(&device, &model));
			device_return(&device, &model, 0);
			ox_vq_flush(&device.vq);
			model_reap(&model);
		}
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

/* --- dirty log ------------------------------------------------------------------------- */

static bool log_has(const struct ox_dirty_log *log, uint64_t addr)
{
	return log->bits[addr >> 12 >> 3] & 1 << (addr >> 12 & 7);
}

static void test_dirty_log(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;
		struct ox_dirty_log *log;
		struct ox_error err = {0};
		uint64_t used = packed ? MODEL_RINGS : MODEL_DEVICE;
		uint64_t event = MODEL_DEVICE;
		int fd = memfd_create("log", MFD_CLOEXEC);

		assert_int_equal(ftruncate(fd, 4096), 0);
		assert_int_equal(ox_dirty_log_map(fd, 4096, 0, &log, &err), 0);
		close(fd);
		model_init(&model, packed, 1024, false, 31);
		device_start(&device, &model);
		ox_vq_set_log(&device.vq, log, used, event);
		assert_int_equal(log->references, 2);
		for (unsigned i = 0; i < 3000; i++) {
			uint16_t at = device.vq.last_used;
			uint64_t element =
			        packed ? used + at * 16ull : used + 4 + (at % 1024) * 8ull;

			memset(log->bits, 0, log->size);
			assert_true(model_offer(&model, NULL));
			assert_true(device_take(&device, &model));
			device_return(&device, &model, 0);
			for (unsigned n = 0; n < log->size; n++)
				assert_int_equal(log->bits[n], 0);
			ox_vq_flush(&device.vq);
			assert_true(log_has(log, element));
			if (!packed) {
				assert_true(log_has(log, element + 7));
				assert_true(log_has(log, used + 2));
			} else if (element >> 12 != used >> 12) {
				assert_false(log_has(log, used));
			}
			assert_int_equal(model_reap(&model), 1);
		}
		memset(log->bits, 0, log->size);
		ox_vq_disable_notify(&device.vq);
		assert_true(log_has(log, event));
		memset(log->bits, 0, log->size);
		assert_false(ox_vq_enable_notify(&device.vq));
		assert_true(log_has(log, event));
		ox_vq_set_log(&device.vq, NULL, 0, 0);
		memset(log->bits, 0, log->size);
		ox_vq_disable_notify(&device.vq);
		assert_false(log_has(log, event));
		assert_int_equal(log->references, 1);
		ox_vq_destroy(&device.vq);
		ox_dirty_log_put(log);
		model_free(&model);
	}
}

/* A batch that goes over the used ring's end marks both parts. */
static void test_dirty_log_wrap(void **state)
{
	static struct device device;
	struct model model;
	struct ox_dirty_log *log;
	int fd = memfd_create("log", MFD_CLOEXEC);

	assert_int_equal(ftruncate(fd, 4096), 0);
	assert_int_equal(ox_dirty_log_map(fd, 4096, 0, &log, NULL), 0);
	close(fd);
	model_init(&model, false, 2048, true, 32);
	device_start(&device, &model);
	for (unsigned i = 0; i < 2044; i++) {
		assert_true(model_offer(&model, NULL));
		assert_true(device_take(&device, &model));
		device_return(&device, &model, 0);
		ox_vq_flush(&device.vq);
		model_reap(&model);
	}
	ox_vq_set_log(&device.vq, log, MODEL_DEVICE, 0);
	for (unsigned i = 0; i < 8; i++) {
		assert_true(model_offer(&model, NULL));
		assert_true(device_take(&device, &model));
		device_return(&device, &model, 0);
	}
	ox_vq_flush(&device.vq);
	assert_int_equal(log->bits[MODEL_DEVICE >> 15], 0x19);
	/* The event index behind the ring. */
	memset(log->bits, 0, log->size);
	ox_vq_enable_notify(&device.vq);
	assert_true(log_has(log, MODEL_DEVICE + 4 + 8 * 2048));
	model_reap(&model);
	ox_vq_destroy(&device.vq);
	ox_dirty_log_put(log);
	model_free(&model);
}

/* New memory under a running queue: chains taken before keep the old table. */
static void test_new_memory(void **state)
{
	static struct device device;
	struct model model;
	struct ox_memory *old, *next;
	struct ox_region *region;
	struct ox_error err = {0};
	struct ox_vq_config config;

	model_init(&model, false, 16, false, 41);
	device_start(&device, &model);
	assert_true(model_offer(&model, NULL));
	assert_true(device_take(&device, &model));
	old = model.memory;
	assert_int_equal(ox_memory_without(old, MODEL_FAR, MODEL_MIB, MODEL_USER_BASE + MODEL_FAR,
	                                   &next, &err),
	                 0);
	model.memory = next;
	config = model_config(&model);
	ox_vq_set_memory(&device.vq, next, config.desc, config.driver, config.device);
	assert_int_equal(old->references, 1);
	assert_int_equal(next->references, 2);
	model_split_desc(&model, MODEL_RINGS, 15, MODEL_FAR, 16, 0, 0);
	model_split_avail(&model, 15);
	device_return(&device, &model, 0);
	ox_memory_put(old);
	ox_vq_flush(&device.vq);
	assert_int_equal(model_reap(&model), 1);
	struct ox_vq_chain chain = device_room(&device, ROOM);
	assert_int_equal(ox_vq_pop(&device.vq, &chain), -EPROTO);
	ox_vq_destroy(&device.vq);
	/* And back in another place: a queue that starts finds it. */
	assert_int_equal(ox_region_map(MODEL_FAR, MODEL_MIB, MODEL_USER_BASE + MODEL_FAR, 0,
	                               dup(model.fd), &region, &err),
	                 0);
	assert_int_equal(ox_memory_with(model.memory, region, &next, &err), 0);
	ox_memory_put(model.memory);
	model.memory = next;
	config = model_config(&model);
	config.avail_index = 1;
	assert_int_equal(ox_vq_init(&device.vq, &config, &err), 0);
	assert_int_equal(ox_vq_pop(&device.vq, &chain), 1);
	assert_ptr_equal(chain.iov[0].iov_base, region->host);
	ox_vq_destroy(&device.vq);
	model_free(&model);
}

/* The client truncates the file that holds the rings and buffers. */
static void test_truncated(void **state)
{
	for (int packed = 0; packed < 2; packed++) {
		static struct device device;
		struct model model;
		struct ox_vq_chain chain;

		ox_memory_install_sigbus();
		model_init(&model, packed, 16, false, 51);
		device_start(&device, &model);
		assert_true(model_offer(&model, NULL));
		assert_true(device_take(&device, &model));
		assert_int_equal(ftruncate(model.fd, 0), 0);
		chain = device_room(&device, ROOM);
		assert_int_equal(ox_vq_pop(&device.vq, &chain), -EPROTO);
		assert_non_null(strstr(device.vq.error, "truncated"));
		/* What was in flight can still be given back. */
		ox_vq_push(&device.vq, &device.held[0], 0);
		ox_vq_flush(&device.vq);
		assert_int_equal(ox_vq_pop(&device.vq, &chain), -EPROTO);
		ox_vq_destroy(&device.vq);
		model_free(&model);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_random_split),
	        cmocka_unit_test(test_random_packed),
	        cmocka_unit_test(test_index_wrap),
	        cmocka_unit_test(test_batch),
	        cmocka_unit_test(test_base),
	        cmocka_unit_test(test_no_room),
	        cmocka_unit_test(test_split_malformed),
	        cmocka_unit_test(test_split_indirect_malformed),
	        cmocka_unit_test(test_packed_malformed),
	        cmocka_unit_test(test_bad_config),
	        cmocka_unit_test(test_first_notification),
	        cmocka_unit_test(test_flags),
	        cmocka_unit_test(test_awake_after_sleep),
	        cmocka_unit_test(test_dirty_log),
	        cmocka_unit_test(test_dirty_log_wrap),
	        cmocka_unit_test(test_new_memory),
	        cmocka_unit_test(test_truncated),
	};

	return cmocka_run_group_tests_name("vq", tests, NULL, NULL);
}
