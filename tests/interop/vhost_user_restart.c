/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What must survive: the daemon is killed with requests in flight and started again on the same
 * image, rings and inflight region; and the dirty log that live migration copies memory by.
 *
 * After a kill every request completes exactly once (none is lost, none comes twice), every write
 * that had completed reads back, and the rings go on.
 */
#include "vhost_user.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DISK (64 * MIB)

struct kill_case {
	const char *name;
	bool packed, no_indirect, event_idx;
	unsigned queues, kills;
	const char *cache, *aio;
};

static void serve(struct daemon *daemon, const struct kill_case *c)
{
	vu_serve(daemon, "-f", "raw", "--iothreads", "2", "--cache", c->cache ? c->cache : "none",
	         "--aio", c->aio ? c->aio : "auto", NULL);
}

/* Fills the queues and takes some completions; requests are left in flight. */
static void steps(struct model *m, uint64_t count)
{
	uint64_t until = m->completed + count;

	for (unsigned i = 0; m->completed < until; i++) {
		int rc = model_step(m);

		if (rc < 0)
			fail_msg("%s", m->error);
		if (rc == 0)
			usleep(50);
		assert_true(i < 2000000);
	}
}

static unsigned in_flight(struct fe *fe)
{
	unsigned total = 0;

	for (unsigned q = 0; q < fe->options.queues; q++)
		total += fe->vq[q].in_flight;
	return total;
}

static void test_kill(void **state)
{
	const struct kill_case *c = *state;
	unsigned caught = 0;
	struct fe_options o;
	struct daemon daemon;
	struct model m;
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	serve(&daemon, c);
	fe_options_init(&o, VU_SOCK);
	o.queues = c->queues;
	o.queue_size = 64;
	o.memory = 65536ull * o.queue_size * o.queues;
	if (c->packed)
		o.features |= FE_F_PACKED;
	if (c->no_indirect)
		o.features &= ~FE_F_INDIRECT;
	if (!c->event_idx)
		o.features &= ~FE_F_EVENT_IDX;
	fe = vu_front_end(&o);
	assert_true(fe->inflight_fd >= 0);
	model_init(&m, fe, DISK, 77);
	m.qd = c->no_indirect ? 6 : 32;
	for (unsigned kill = 0; kill < c->kills; kill++) {
		steps(&m, 50 + model_random(&m, 400));
		/* Give it something to be in the middle of. */
		model_step(&m);
		if (kill % 3)
			usleep((unsigned)model_random(&m, 300));
		assert_int_equal(daemon_stop(&daemon, SIGKILL), SIGKILL);
		caught += in_flight(fe) > 0;
		serve(&daemon, c);
		vu_check(fe, fe_restart(fe));
		/* Once more, before it has done them all. */
		if (kill % 4 == 3) {
			daemon_stop(&daemon, SIGKILL);
			serve(&daemon, c);
			vu_check(fe, fe_restart(fe));
		}
		if (kill % 2)
			model_drain(&m);
	}
	model_run(&m, 500);
	for (unsigned q = 0; q < o.queues; q++) {
		assert_int_equal(fe->vq[q].bogus, 0);
		/* Nothing more comes. */
		assert_int_equal(fe_vq_pop(&fe->vq[q], NULL, NULL), -EAGAIN);
	}
	assert_int_equal(m.submitted, m.completed);
	assert_true(caught > c->kills / 2);
	model_verify(&m);
	vu_check(fe, fe_stop(fe));
	fe_free(fe);
	vu_end(&daemon);
	model_free(&m);
}

/* The front end hangs up and comes back (QEMU's chardev does that), the daemon lives on. */
static void test_reconnect(void **state)
{
	const struct kill_case *c = *state;
	struct fe_options o;
	struct daemon daemon;
	struct model m;
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	serve(&daemon, c);
	fe_options_init(&o, VU_SOCK);
	o.queues = c->queues;
	o.memory = 65536ull * o.queue_size * o.queues;
	if (c->packed)
		o.features |= FE_F_PACKED;
	fe = vu_front_end(&o);
	model_init(&m, fe, DISK, 78);
	for (unsigned i = 0; i < 20; i++) {
		steps(&m, 300);
		model_step(&m);
		vu_check(fe, fe_restart(fe));
	}
	model_drain(&m);
	model_verify(&m);
	for (unsigned q = 0; q < o.queues; q++)
		assert_int_equal(fe->vq[q].bogus, 0);
	fe_free(fe);
	vu_end(&daemon);
	model_free(&m);
}

/* SIGTERM with requests in flight: they end, the status is 0, and nothing is lost. */
static void test_terminate(void **state)
{
	const struct kill_case *c = *state;
	struct fe_options o;
	struct daemon daemon;
	struct model m;
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	serve(&daemon, c);
	fe_options_init(&o, VU_SOCK);
	o.memory = 65536ull * o.queue_size;
	if (c->packed)
		o.features |= FE_F_PACKED;
	fe = vu_front_end(&o);
	model_init(&m, fe, DISK, 79);
	for (unsigned i = 0; i < 5; i++) {
		steps(&m, 300);
		model_step(&m);
		vu_end(&daemon);
		serve(&daemon, c);
		vu_check(fe, fe_restart(fe));
	}
	model_drain(&m);
	model_verify(&m);
	assert_int_equal(fe->vq[0].bogus, 0);
	fe_free(fe);
	vu_end(&daemon);
	model_free(&m);
}

/* --- dirty log ---------------------------------------------------------------------------------
 */

static bool logged(struct fe *fe, uint64_t gpa)
{
	return __atomic_load_n(&fe->log[gpa / 4096 / 8], __ATOMIC_ACQUIRE) >> (gpa / 4096 % 8) & 1;
}

static void clear_log(struct fe *fe)
{
	memset(fe->log, 0, fe->log_size);
}

static bool in_range(uint64_t page, uint64_t gpa, uint64_t bytes)
{
	return page + 4096 > gpa && page < gpa + bytes;
}

/* Only these pages may be marked: `gpa`, and what the device writes of the rings. */
static void expect_only(struct fe *fe, const struct fe_buf *bufs, unsigned count)
{
	struct fe_vq *vq = &fe->vq[0];

	for (uint64_t byte = 0; byte < fe->log_size; byte++) {
		if (!fe->log[byte])
			continue;
		for (unsigned bit = 0; bit < 8; bit++) {
			uint64_t page = (byte * 8 + bit) * 4096;
			bool fine = false;

			if (!(fe->log[byte] >> bit & 1))
				continue;
			for (unsigned i = 0; i < count; i++)
				fine |= in_range(page, bufs[i].gpa, bufs[i].len);
			/* Status bytes, used ring or descriptor ring, device events. */
			fine |= in_range(page, vq->header_gpa,
			                 (uint64_t)vq->size * FE_HEADER_STRIDE);
			fine |= in_range(page, vq->device_gpa, 6 + 8ull * vq->size);
			if (vq->packed)
				fine |= in_range(page, vq->desc_gpa, 16ull * vq->size);
			if (!fine)
				fail_msg("page %#llx is marked and was not written",
				         (unsigned long long)page);
		}
	}
}

static void log_some_io(struct fe *fe)
{
	struct fe_vq *vq = &fe->vq[0];
	/* 3 pages and a bit, from the middle of one. */
	struct fe_buf in[2] = {{fe->data_gpa + 0x10800, 0x3000}, {fe->data_gpa + 0x40000, 512}};
	uint64_t status;
	int id;

	clear_log(fe);
	id = fe_vq_next_id(vq);
	status = fe_blk_status_gpa(vq, (unsigned)id);
	assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_IN, 0, in, 2), 0);
	for (uint64_t gpa = 0x10000; gpa < 0x14000; gpa += 0x1000)
		assert_true(logged(fe, fe->data_gpa + gpa));
	assert_true(logged(fe, fe->data_gpa + 0x40000));
	assert_true(logged(fe, status));
	assert_true(logged(fe, vq->packed ? vq->desc_gpa : vq->device_gpa));
	expect_only(fe, in, 2);

	/* A write marks the status and the ring only. */
	clear_log(fe);
	assert_int_equal(fe_blk_write(vq, 0, fe->data_gpa + 0x80000, 65536), 0);
	assert_true(logged(fe, status));
	assert_true(logged(fe, vq->packed ? vq->desc_gpa : vq->device_gpa));
	expect_only(fe, NULL, 0);

	/* get-id, and a read that fails: whatever it wrote is marked, nothing else. */
	clear_log(fe);
	in[0] = (struct fe_buf){fe->data_gpa + 0x100000, 20};
	assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_GET_ID, 0, in, 1), 0);
	assert_true(logged(fe, fe->data_gpa + 0x100000));
	expect_only(fe, in, 1);
	clear_log(fe);
	assert_int_not_equal(fe_blk_read(vq, DISK, fe->data_gpa + 0x100000, 4096), 0);
	assert_true(logged(fe, status));
	in[0].len = 4096;
	expect_only(fe, in, 1);
}

static void dirty_log(bool packed)
{
	struct fe_options o;
	struct daemon daemon;
	struct kill_case c = {0};
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	serve(&daemon, &c);
	/* From the start. */
	fe_options_init(&o, VU_SOCK);
	o.features |= FE_F_LOG_ALL | (packed ? FE_F_PACKED : 0);
	o.regions = 2;
	fe = fe_new(&o);
	vu_check(fe, fe_connect(fe));
	vu_check(fe, fe_negotiate(fe));
	vu_check(fe, fe_send_memory(fe));
	vu_check(fe, fe_set_log(fe));
	vu_check(fe, fe_queue_start(fe, 0, fe->vq[0].start_base));
	vu_check(fe, fe_queue_enable(fe, 0, true));
	log_some_io(fe);
	fe_free(fe);
	/* Turned on while the ring runs, off and on again, as a migration does that is
	 * cancelled and tried anew. */
	o.features &= ~FE_F_LOG_ALL;
	fe = vu_front_end(&o);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	for (unsigned i = 0; i < 5; i++) {
		uint64_t features = fe->features & ~FE_F_LOG_ALL;

		vu_check(fe, fe_set_log(fe));
		vu_check(fe, fe_set_features(fe, features | FE_F_LOG_ALL));
		vu_check(fe, fe_set_vring_addr(fe, 0, true));
		log_some_io(fe);
		vu_check(fe, fe_set_features(fe, features));
		vu_check(fe, fe_set_vring_addr(fe, 0, false));
		clear_log(fe);
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
		assert_false(logged(fe, fe->data_gpa));
	}
	fe_free(fe);
	vu_end(&daemon);
}

static void test_dirty_log(void **state)
{
	dirty_log(false);
}

static void test_dirty_log_packed(void **state)
{
	dirty_log(true);
}

/* Logging is turned on and off under load; every completed read is marked. */
static void test_dirty_log_under_load(void **state)
{
	struct fe_options o;
	struct daemon daemon;
	struct kill_case c = {0};

	for (unsigned packed = 0; packed < 2; packed++) {
		struct model m;
		struct fe *fe;

		vu_make_image(VU_IMAGE, DISK);
		serve(&daemon, &c);
		fe_options_init(&o, VU_SOCK);
		o.queues = 2;
		o.memory = 65536ull * o.queue_size * o.queues;
		o.features |= packed ? FE_F_PACKED : 0;
		fe = vu_front_end(&o);
		model_init(&m, fe, DISK, 80);
		for (unsigned i = 0; i < 10; i++) {
			uint64_t features = fe->features & ~FE_F_LOG_ALL;

			steps(&m, 200);
			vu_check(fe, fe_set_log(fe));
			vu_check(fe, fe_set_features(fe, features | FE_F_LOG_ALL));
			for (unsigned q = 0; q < 2; q++)
				vu_check(fe, fe_set_vring_addr(fe, q, true));
			clear_log(fe);
			model_drain(&m);
			steps(&m, 200);
			model_drain(&m);
			vu_check(fe, fe_set_features(fe, features));
			for (unsigned q = 0; q < 2; q++)
				vu_check(fe, fe_set_vring_addr(fe, q, false));
		}
		model_verify(&m);
		model_free(&m);
		fe_free(fe);
		vu_end(&daemon);
	}
}

static const struct kill_case cases[] = {
        {.name = "split", .queues = 1, .kills = 20, .event_idx = true},
        {.name = "split, 4 queues", .queues = 4, .kills = 10},
        {.name = "split, no indirect", .queues = 2, .kills = 10, .no_indirect = true},
        {.name = "split, page cache", .queues = 2, .kills = 10, .cache = "writeback"},
        {.name = "split, worker threads", .queues = 2, .kills = 10, .aio = "threads"},
        {.name = "packed", .packed = true, .queues = 1, .kills = 20, .event_idx = true},
        {.name = "packed, 4 queues", .packed = true, .queues = 4, .kills = 10},
        {.name = "packed, no indirect",
         .packed = true,
         .queues = 2,
         .kills = 10,
         .no_indirect = true},
};

int main(void)
{
	enum { CASES = sizeof(cases) / sizeof(cases[0]) };
	struct CMUnitTest tests[CASES + 8];
	static char names[CASES][96];
	unsigned n = 0;

	for (unsigned i = 0; i < CASES; i++) {
		snprintf(names[i], sizeof(names[i]), "killed in mid-I/O: %s", cases[i].name);
		tests[n++] = (struct CMUnitTest){names[i], test_kill, NULL, vu_kill_strays,
		                                 (void *)(uintptr_t)&cases[i]};
	}
#define MORE(title, f, c) \
	tests[n++] =      \
	        (struct CMUnitTest){title, f, NULL, vu_kill_strays, (void *)(uintptr_t)&cases[c]}
	MORE("reconnected in mid-I/O, split", test_reconnect, 1);
	MORE("reconnected in mid-I/O, packed", test_reconnect, 6);
	MORE("terminated in mid-I/O, split", test_terminate, 0);
	MORE("terminated in mid-I/O, packed", test_terminate, 5);
	MORE("dirty log, split", test_dirty_log, 0);
	MORE("dirty log, packed", test_dirty_log_packed, 0);
	MORE("dirty log under load", test_dirty_log_under_load, 0);
	return _cmocka_run_group_tests("vhost-user restart", tests, n, vu_enter_directory,
	                               vu_leave_directory);
}
