/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * I/O through vhost-user-blk: random requests against a model in both ring kinds, many queues,
 * every command, buffer layouts that a driver may choose, notifications both ways.
 *
 * The model tests also run against qemu-storage-daemon where it is installed: a fault of the
 * front end shows there.
 */
#include "vhost_user.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DISK (64 * MIB)

struct io_case {
	const char *name;
	bool packed, no_indirect, no_event_idx, qemu, table;
	unsigned queues, regions;
	uint16_t queue_size;
	const char *iothreads, *aio, *cache;
};

static void case_options(struct fe_options *o, const struct io_case *c)
{
	fe_options_init(o, VU_SOCK);
	o->queues = c->queues ? c->queues : 1;
	if (c->queue_size)
		o->queue_size = c->queue_size;
	o->memory = 65536ull * o->queue_size * o->queues;
	if (c->regions)
		o->regions = c->regions;
	o->keep_table_mode = c->table;
	if (c->packed)
		o->features |= FE_F_PACKED;
	if (c->no_indirect)
		o->features &= ~FE_F_INDIRECT;
	if (c->no_event_idx)
		o->features &= ~FE_F_EVENT_IDX;
}

static void serve(struct daemon *daemon, const struct io_case *c)
{
	vu_make_image(VU_IMAGE, DISK);
	if (c->qemu)
		vu_serve_qemu(daemon, c->queues ? c->queues : 1);
	else
		vu_serve(daemon, "--iothreads", c->iothreads ? c->iothreads : "1", "--aio",
		         c->aio ? c->aio : "auto", "--cache", c->cache ? c->cache : "none", "-f",
		         "raw", NULL);
}

static void test_model(void **state)
{
	const struct io_case *c = *state;
	struct fe_options o;
	struct daemon daemon;
	struct model m;
	struct fe *fe;

	if (c->qemu && !vu_have_program("qemu-storage-daemon")) {
		print_message("# qemu-storage-daemon is not installed\n");
		skip();
	}
	case_options(&o, c);
	serve(&daemon, c);
	fe = vu_front_end(&o);
	assert_int_equal(!!(fe->features & FE_F_PACKED), c->packed);
	model_init(&m, fe, DISK, 42);
	model_run(&m, 6000);
	model_verify(&m);
	/* Stopped and started again: nothing is lost, rings go on where they were. */
	vu_check(fe, fe_stop(fe));
	for (unsigned i = 0; i < o.queues; i++)
		vu_check(fe, fe_queue_start(fe, i, fe->vq[i].start_base));
	for (unsigned i = 0; i < o.queues; i++)
		vu_check(fe, fe_queue_enable(fe, i, true));
	model_run(&m, 500);
	for (unsigned i = 0; i < o.queues; i++)
		assert_int_equal(fe->vq[i].bogus, 0);
	vu_check(fe, fe_stop(fe));
	fe_free(fe);
	if (c->qemu)
		daemon_stop(&daemon, SIGTERM);
	else
		vu_end(&daemon);
	/* What the model holds is in the file. */
	for (uint64_t at = 0; at < DISK; at += MIB) {
		uint8_t *piece = malloc(MIB);

		vu_read_image(VU_IMAGE, at, piece, MIB);
		for (unsigned i = 0; i < MIB; i += 512)
			if (!(m.state[(at + i) / 512] & MODEL_UNKNOWN))
				assert_memory_equal(piece + i, m.bytes + at + i, 512);
		free(piece);
	}
	model_free(&m);
}

/* --- one daemon for the tests below: *state is a session -------------------------------------- */

struct session {
	struct daemon daemon;
	struct fe *fe;
};

static int open_session(void **state, bool packed)
{
	static struct session session;
	struct io_case c = {.packed = packed, .queues = 2, .regions = 4};
	struct fe_options o;

	case_options(&o, &c);
	o.memory = 16 * MIB;
	serve(&session.daemon, &c);
	session.fe = vu_front_end(&o);
	*state = &session;
	return 0;
}

static int open_split(void **state)
{
	return open_session(state, false);
}

static int open_packed(void **state)
{
	return open_session(state, true);
}

static int close_session(void **state)
{
	struct session *s = *state;

	fe_free(s->fe);
	return daemon_stop(&s->daemon, SIGTERM);
}

static void expect_disk(struct fe *fe, uint64_t offset, const void *bytes, size_t count)
{
	char *got = malloc(count);

	assert_int_equal(fe_blk_read(&fe->vq[0], offset, fe->data_gpa + 8 * MIB, (uint32_t)count),
	                 0);
	fe_mem_read(fe, fe->data_gpa + 8 * MIB, got, count);
	assert_memory_equal(got, bytes, count);
	free(got);
}

static void test_large(void **state)
{
	struct fe *fe = ((struct session *)*state)->fe;
	struct fe_vq *vq = &fe->vq[0];
	struct fe_buf seg[126];
	uint8_t *bytes = malloc(MIB);
	uint32_t seg_max;

	vu_check(fe, fe_get_config(fe, 12, 4, &seg_max));
	assert_true(seg_max >= 126);
	fe_pattern(bytes, MIB, 7);
	/* 1 MiB in one piece that begins in one region and ends in the next. */
	uint64_t gpa = fe->data_gpa + 4 * MIB - 12288;

	fe_mem_write(fe, gpa, bytes, MIB);
	assert_int_equal(fe_blk_write(vq, 5 * MIB, gpa, MIB), 0);
	expect_disk(fe, 5 * MIB, bytes, MIB);
	/* 126 pieces of 4608 bytes, in falling order, over all regions. */
	uint32_t total = 126 * 4608;

	for (unsigned i = 0; i < 126; i++) {
		seg[i] = (struct fe_buf){fe->data_gpa + (125 - i) * 100352ull, 4608};
		fe_mem_write(fe, seg[i].gpa, bytes + i * 4608, 4608);
	}
	assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_OUT, 20 * MIB / 512, seg, 126), 0);
	expect_disk(fe, 20 * MIB, bytes, total);
	for (unsigned i = 0; i < 126; i++)
		memset(fe_host(fe, seg[i].gpa, 1), 0xee, 1);
	assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_IN, 20 * MIB / 512, seg, 126), 0);
	for (unsigned i = 0; i < 126; i++) {
		uint8_t piece[4608];

		fe_mem_read(fe, seg[i].gpa, piece, sizeof(piece));
		assert_memory_equal(piece, bytes + i * 4608, 4608);
	}
	free(bytes);
}

/* Runs a chain given buffer by buffer to its end; the number of bytes that the device says it
 * wrote. */
static uint32_t run_chain(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in)
{
	uint32_t len = 0;
	int id;

	assert_true(fe_vq_add(vq, bufs, out, in, NULL) >= 0);
	fe_vq_submit(vq);
	for (unsigned i = 0; (id = fe_vq_pop(vq, NULL, &len)) == -EAGAIN; i++) {
		assert_true(i < 20000);
		usleep(500);
	}
	assert_true(id >= 0);
	return len;
}

static void put_header(struct fe *fe, uint64_t gpa, uint32_t type, uint64_t sector)
{
	struct virtio_blk_outhdr header = {.type = type, .sector = sector};

	fe_mem_write(fe, gpa, &header, sizeof(header));
}

static void test_layouts(void **state)
{
	struct fe *fe = ((struct session *)*state)->fe;
	struct fe_vq *vq = &fe->vq[1];
	uint64_t a = fe->data_gpa + 256, b = fe->data_gpa + MIB + 3;
	uint8_t bytes[8192], got[8193], status = 0xff;

	fe_pattern(bytes, sizeof(bytes), 11);
	/* Write: header and data in one buffer. */
	put_header(fe, a, VIRTIO_BLK_T_OUT, 100);
	fe_mem_write(fe, a + 16, bytes, 4096);
	fe_mem_write(fe, b, &status, 1);
	run_chain(vq, (struct fe_buf[]){{a, 16 + 4096}, {b, 1}}, 1, 1);
	fe_mem_read(fe, b, &status, 1);
	assert_int_equal(status, 0);
	expect_disk(fe, 51200, bytes, 4096);

	/* Read: data and status in one buffer, header cut in three. */
	put_header(fe, a, VIRTIO_BLK_T_IN, 100);
	uint32_t len = run_chain(
	        vq, (struct fe_buf[]){{a, 4}, {a + 4, 4}, {a + 8, 8}, {b, 4096 + 1}}, 3, 1);

	assert_true(len == 4097);
	fe_mem_read(fe, b, got, 4097);
	assert_memory_equal(got, bytes, 4096);
	assert_int_equal(got[4096], 0);

	/* Write: header's end together with the first data, then odd pieces. */
	put_header(fe, a, VIRTIO_BLK_T_OUT, 200);
	fe_mem_write(fe, a + 16, bytes, 8192);
	status = 0xff;
	fe_mem_write(fe, b, &status, 1);
	run_chain(vq,
	          (struct fe_buf[]){{a, 9}, {a + 9, 8}, {a + 17, 1022}, {a + 1039, 7169}, {b, 1}},
	          4, 1);
	fe_mem_read(fe, b, &status, 1);
	assert_int_equal(status, 0);
	expect_disk(fe, 102400, bytes, 8192);

	/* Read: pieces of one byte and the rest, status inside the last one. */
	put_header(fe, a, VIRTIO_BLK_T_IN, 200);
	memset(got, 0, sizeof(got));
	run_chain(vq, (struct fe_buf[]){{a, 16}, {b, 1}, {b + 1, 1}, {b + 2, 8191}}, 1, 3);
	fe_mem_read(fe, b, got, 8193);
	assert_memory_equal(got, bytes, 8192);
	assert_int_equal(got[8192], 0);
}

static void test_commands(void **state)
{
	struct fe *fe = ((struct session *)*state)->fe;
	struct fe_vq *vq = &fe->vq[1];
	uint64_t gpa = fe->data_gpa;
	uint8_t bytes[65536], zero[65536] = {0};
	char id[21] = "xxxxxxxxxxxxxxxxxxxx";

	fe_pattern(bytes, sizeof(bytes), 13);
	fe_mem_write(fe, gpa, bytes, sizeof(bytes));
	assert_int_equal(fe_blk_write(vq, MIB, gpa, 65536), 0);
	assert_int_equal(fe_blk_flush(vq), 0);
	/* Zeroes over a part, with and without giving space back; the rest stays. */
	for (uint32_t flags = 0; flags < 2; flags++) {
		assert_int_equal(fe_blk_write(vq, MIB, gpa, 65536), 0);
		assert_int_equal(
		        fe_blk_range(vq, VIRTIO_BLK_T_WRITE_ZEROES, MIB + 512, 32768, flags), 0);
		expect_disk(fe, MIB, bytes, 512);
		expect_disk(fe, MIB + 512, zero, 32768);
		expect_disk(fe, MIB + 33280, bytes + 33280, 65536 - 33280);
	}
	assert_int_equal(fe_blk_range(vq, VIRTIO_BLK_T_DISCARD, MIB, 65536, 0), 0);
	/* Two ranges in one request. */
	assert_int_equal(fe_blk_write(vq, MIB, gpa, 65536), 0);
	struct virtio_blk_discard_write_zeroes two[2] = {
	        {.sector = MIB / 512, .num_sectors = 8},
	        {.sector = MIB / 512 + 16, .num_sectors = 8},
	};
	uint32_t max_seg;

	vu_check(fe, fe_get_config(fe, 52, 4, &max_seg));
	if (max_seg >= 2) {
		fe_mem_write(fe, gpa + MIB, two, sizeof(two));
		assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_WRITE_ZEROES, 0,
		                           &(struct fe_buf){gpa + MIB, sizeof(two)}, 1),
		                 0);
		expect_disk(fe, MIB, zero, 4096);
		expect_disk(fe, MIB + 4096, bytes + 4096, 4096);
		expect_disk(fe, MIB + 8192, zero, 4096);
		expect_disk(fe, MIB + 12288, bytes + 12288, 4096);
	}
	/* The serial number: 20 bytes. */
	fe_mem_write(fe, gpa, id, 20);
	assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_GET_ID, 0, &(struct fe_buf){gpa, 20}, 1), 0);
	fe_mem_read(fe, gpa, id, 20);
	assert_string_not_equal(id, "xxxxxxxxxxxxxxxxxxxx");
	assert_true(id[0] != '\0');
	/* What does not exist. */
	assert_int_equal(fe_blk_do(vq, 0x77, 0, NULL, 0), VIRTIO_BLK_S_UNSUPP);
	assert_int_equal(fe_blk_range(vq, VIRTIO_BLK_T_DISCARD, 0, 4096, 1), VIRTIO_BLK_S_UNSUPP);
	assert_int_equal(fe_blk_range(vq, VIRTIO_BLK_T_WRITE_ZEROES, 0, 4096, 2),
	                 VIRTIO_BLK_S_UNSUPP);
	/* Out of the disk, or not in sectors. */
	assert_int_equal(fe_blk_read(vq, DISK - 512, gpa, 1024), VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_read(vq, DISK, gpa, 512), VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_write(vq, DISK, gpa, 512), VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_write(vq, 0, gpa, 513), VIRTIO_BLK_S_IOERR);
	assert_int_equal(
	        fe_blk_do(vq, VIRTIO_BLK_T_IN, UINT64_MAX / 512, &(struct fe_buf){gpa, 512}, 1),
	        VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_do(vq, VIRTIO_BLK_T_OUT, UINT64_MAX, &(struct fe_buf){gpa, 512}, 1),
	                 VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_range(vq, VIRTIO_BLK_T_WRITE_ZEROES, DISK - 512, 1024, 0),
	                 VIRTIO_BLK_S_IOERR);
	/* The last sector is there, and the queue still works after all that. */
	assert_int_equal(fe_blk_write(vq, DISK - 512, gpa, 512), 0);
	assert_int_equal(fe_blk_read(vq, DISK - 512, gpa, 512), 0);
}

static bool called(struct fe_vq *vq, int timeout_ms)
{
	return fe_vq_wait(vq, timeout_ms) == 0;
}

static void test_notifications(void **state)
{
	struct fe *fe = ((struct session *)*state)->fe;
	struct fe_vq *vq = &fe->vq[0];
	bool silent = false;

	/* Not wanted: completions come without a call.  A device may call once too often (it does
	 * when a ring starts, and it may be late), so one silent round of a few is enough. */
	fe_vq_disable_call(vq);
	for (unsigned round = 0; !silent; round++) {
		assert_true(round < 10);
		assert_int_equal(fe_blk_flush(vq), 0);
		called(vq, 0);
		for (unsigned i = 0; i < 50; i++)
			assert_int_equal(fe_blk_read(vq, 0, fe->data_gpa, 4096), 0);
		silent = !called(vq, 0);
	}
	/* Wanted: each one calls. A driver that sleeps never waits in vain. */
	for (unsigned i = 0; i < 5000; i++) {
		assert_true(fe_blk_add(vq, VIRTIO_BLK_T_IN, 0, &(struct fe_buf){fe->data_gpa, 512},
		                       1, NULL) >= 0);
		if (!fe_vq_enable_call(vq)) {
			fe_vq_submit(vq);
			while (!fe_vq_enable_call(vq) && fe_vq_pop(vq, NULL, NULL) == -EAGAIN)
				assert_true(called(vq, 20000));
		}
		while (fe_vq_pop(vq, NULL, NULL) >= 0)
			;
		/* Now and then long enough for the back end to go to sleep. */
		if (i % 500 == 0)
			usleep(50000);
	}
	assert_int_equal(vq->in_flight, 0);
	assert_int_equal(vq->bogus, 0);
	/* An idle back end must want a kick. */
	usleep(200000);
	assert_true(fe_blk_add(vq, VIRTIO_BLK_T_IN, 0, &(struct fe_buf){fe->data_gpa, 512}, 1,
	                       NULL) >= 0);
	assert_true(fe_vq_publish(vq));
	fe_vq_kick(vq);
	assert_int_equal(fe_blk_drain(vq, 20000), 1);
}

static void test_no_event_idx(void **state)
{
	const struct io_case *c = *state;
	struct session s;
	void *session = &s;
	struct fe_options o;

	case_options(&o, c);
	serve(&s.daemon, c);
	s.fe = vu_front_end(&o);
	test_notifications(&session);
	fe_free(s.fe);
	vu_end(&s.daemon);
}

/* A queue that was made but not enabled does nothing; a disabled one stops taking. */
static void test_enable(void **state)
{
	struct fe *fe = ((struct session *)*state)->fe;
	struct fe_vq *vq = &fe->vq[1];

	assert_int_equal(fe_blk_read(vq, 0, fe->data_gpa, 4096), 0);
	vu_check(fe, fe_queue_enable(fe, 1, false));
	assert_true(fe_blk_add(vq, VIRTIO_BLK_T_IN, 0, &(struct fe_buf){fe->data_gpa, 512}, 1,
	                       NULL) >= 0);
	fe_vq_publish(vq);
	fe_vq_kick(vq);
	usleep(100000);
	assert_int_equal(fe_vq_pop(vq, NULL, NULL), -EAGAIN);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa + 4096, 4096), 0);
	vu_check(fe, fe_queue_enable(fe, 1, true));
	assert_int_equal(fe_blk_drain(vq, 20000), 1);
}

static const struct io_case cases[] = {
        {.name = "split"},
        {.name = "split, no indirect", .no_indirect = true, .queue_size = 256},
        {.name = "split, no event index", .no_event_idx = true},
        {.name = "split, neither", .no_event_idx = true, .no_indirect = true},
        {.name = "packed", .packed = true},
        {.name = "packed, no indirect", .packed = true, .no_indirect = true, .queue_size = 250},
        {.name = "packed, no event index", .packed = true, .no_event_idx = true},
        {.name = "packed, neither",
         .packed = true,
         .no_event_idx = true,
         .no_indirect = true,
         .queue_size = 100},
        {.name = "split, memory table of 5", .table = true, .regions = 4},
        {.name = "split, 30 memory slots", .regions = 30},
        {.name = "packed, 30 memory slots", .packed = true, .regions = 30},
        {.name = "split, 4 queues on 2 threads", .queues = 4, .iothreads = "2"},
        {.name = "packed, 4 queues on 2 threads", .packed = true, .queues = 4, .iothreads = "2"},
        {.name = "split, 16 queues on 3 threads", .queues = 16, .queue_size = 32, .iothreads = "3"},
        {.name = "packed, 16 queues on 3 threads",
         .packed = true,
         .queues = 16,
         .queue_size = 32,
         .iothreads = "3"},
        {.name = "split, queue of 2", .queue_size = 2},
        {.name = "split, queue of 1024", .queue_size = 1024},
        {.name = "qemu-storage-daemon, split", .qemu = true},
        {.name = "qemu-storage-daemon, 4 queues, no indirect",
         .qemu = true,
         .queues = 4,
         .no_indirect = true},
};

static const struct io_case bare_split = {.name = "split", .no_event_idx = true};
static const struct io_case bare_packed = {.name = "packed", .no_event_idx = true, .packed = true};

#define OX_CASES (sizeof(cases) / sizeof(cases[0]))

int main(void)
{
	struct CMUnitTest tests[OX_CASES + 16];
	static char names[OX_CASES][96];
	unsigned n = 0;
	/* One group fixture for all: the directory. */
	for (unsigned i = 0; i < OX_CASES; i++) {
		snprintf(names[i], sizeof(names[i]), "random I/O: %s", cases[i].name);
		tests[n++] = (struct CMUnitTest){names[i], test_model, NULL, vu_kill_strays,
		                                 (void *)(uintptr_t)&cases[i]};
	}
#define BOTH(f, title)                                                                         \
	tests[n++] = (struct CMUnitTest){title ", split", f, open_split, close_session, NULL}; \
	tests[n++] = (struct CMUnitTest){title ", packed", f, open_packed, close_session, NULL}
	BOTH(test_large, "1 MiB over two regions, 126 segments");
	BOTH(test_layouts, "buffer layouts");
	BOTH(test_commands, "every command");
	BOTH(test_notifications, "notifications by event index");
	BOTH(test_enable, "a disabled queue waits");
	tests[n++] = (struct CMUnitTest){"notifications by flags, split", test_no_event_idx, NULL,
	                                 vu_kill_strays, (void *)(uintptr_t)&bare_split};
	tests[n++] = (struct CMUnitTest){"notifications by flags, packed", test_no_event_idx, NULL,
	                                 vu_kill_strays, (void *)(uintptr_t)&bare_packed};
	return _cmocka_run_group_tests("vhost-user I/O", tests, n, vu_enter_directory,
	                               vu_leave_directory);
}
