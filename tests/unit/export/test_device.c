/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The vhost-user-blk export with a front end in the same process: queue states and their order,
 * what waits for what, the write cache, the dirty log, clients that come and go.
 */
#include "device.h"

#include "base/byteorder.h"
#include "store/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int send_state(struct fe *fe, uint32_t request, uint32_t index, uint32_t num)
{
	uint32_t state[2] = {index, num};

	return fe_send_ack(fe, request, state, sizeof(state), NULL, 0);
}

/* Each queue has buffers of its own: they are served by several threads. */
static void check_io(struct fe *fe)
{
	for (unsigned i = 0; i < fe->options.queues; i++) {
		uint64_t gpa = fe->data_gpa + 8192 * i;
		uint8_t *data = fe_host(fe, gpa, 8192);

		fe_pattern(data, 4096, i + 1);
		assert_int_equal(fe_blk_write(&fe->vq[i], 8192 * i, gpa, 4096), 0);
		assert_int_equal(fe_blk_flush(&fe->vq[i]), 0);
		memset(data + 4096, 0, 4096);
		assert_int_equal(fe_blk_read(&fe->vq[i], 8192 * i, gpa + 4096, 4096), 0);
		assert_memory_equal(data, data + 4096, 4096);
	}
}

static void four_queues(struct fe_options *o)
{
	o->queues = 4;
}

static void packed(struct fe_options *o)
{
	o->features |= FE_F_PACKED;
	o->queues = 2;
}

/* The disk is active while a queue runs, and only then. */
static void test_life(void **state)
{
	static void (*const kinds[])(struct fe_options *) = {four_queues, packed};

	for (unsigned k = 0; k < 2; k++) {
		struct device d;
		struct fe *fe;
		uint32_t base;

		device_up(&d, NULL);
		assert_false(device_disk_info(&d).active);
		fe = device_front_end(&d, kinds[k]);
		assert_true(device_disk_info(&d).active);
		assert_true(device_info(&d).connected);
		assert_int_equal(device_info(&d).queues_running, fe->options.queues);
		check_io(fe);
		for (unsigned i = 0; i < fe->options.queues; i++) {
			assert_true(device_disk_info(&d).active);
			fe_ok(fe, fe_queue_stop(fe, i, &base));
			if (!k)
				assert_int_equal(base, 3);
		}
		assert_false(device_disk_info(&d).active);
		assert_int_equal(device_info(&d).queues_running, 0);
		/* Once more on the same connection, from where it stopped. */
		for (unsigned i = 0; i < fe->options.queues; i++)
			fe_ok(fe, fe_queue_start(fe, i, base));
		check_io(fe);
		fe_disconnect(fe);
		device_wait_idle(&d);
		assert_false(device_disk_info(&d).active);
		fe_free(fe);
		device_down(&d);
	}
}

/* Any order will do; what is missing is waited for, what is wrong is refused, nothing crashes. */
static void test_order(void **state)
{
	struct fe_options o;
	struct device d;
	struct fe *fe;
	uint64_t features = 1ull << 63, index = 0;

	device_up(&d, NULL);
	fe_options_init(&o, d.socket);
	fe = fe_new(&o);
	fe_ok(fe, fe_connect(fe));
	fe_ok(fe, fe_negotiate(fe));
	assert_int_equal(fe_send_ack(fe, FE_SET_FEATURES, &features, 8, NULL, 0), -EIO);
	assert_int_equal(fe_send_ack(fe, FE_SET_PROTOCOL_FEATURES, &features, 8, NULL, 0), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_NUM, 0, 0), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_NUM, 0, 100), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_NUM, 0, 32768), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_NUM, 64, 128), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_ENABLE, 0, 2), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_ENABLE, 255, 1), -EIO);
	fe_ok(fe, fe_set_features(fe, fe->features));

	/* Kick first, the size last. */
	fe_ok(fe, send_state(fe, FE_SET_VRING_ENABLE, 0, 1));
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_KICK, &index, 8, &fe->vq[0].kick_fd, 1));
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_CALL, &index, 8, &fe->vq[0].call_fd, 1));
	fe_ok(fe, fe_set_vring_addr(fe, 0, false));
	fe_ok(fe, fe_send_memory(fe));
	assert_false(device_disk_info(&d).active);
	fe_ok(fe, send_state(fe, FE_SET_VRING_NUM, 0, fe->vq[0].size));
	assert_true(device_disk_info(&d).active);
	fe->vq[0].started = true;
	check_io(fe);

	/* Not while it runs. */
	assert_int_equal(send_state(fe, FE_SET_VRING_NUM, 0, 64), -EIO);
	assert_int_equal(send_state(fe, FE_SET_VRING_BASE, 0, 0), -EIO);
	features = fe->features & ~FE_F_EVENT_IDX;
	assert_int_equal(fe_send_ack(fe, FE_SET_FEATURES, &features, 8, NULL, 0), -EIO);
	check_io(fe);
	/* Off and on again. */
	fe_ok(fe, fe_queue_enable(fe, 0, false));
	assert_false(device_disk_info(&d).active);
	fe_ok(fe, fe_queue_enable(fe, 0, true));
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

/* Ring addresses outside memory, and not aligned: that queue does not start, others do. */
static void test_bad_addresses(void **state)
{
	struct fe_options o;
	struct device d;
	struct fe *fe;
	struct {
		uint32_t index, flags;
		uint64_t desc, used, avail, log;
	} addr;

	device_up(&d, NULL);
	fe_options_init(&o, d.socket);
	o.queues = 2;
	fe = fe_new(&o);
	fe_ok(fe, fe_connect(fe));
	fe_ok(fe, fe_negotiate(fe));
	fe_ok(fe, fe_send_memory(fe));
	for (unsigned i = 0; i < 4; i++) {
		addr.index = 0;
		addr.flags = i == 3 ? 0x10 : 0;
		addr.desc = (uintptr_t)fe->vq[0].desc + (i == 0 ? 8 : 0);
		addr.used = (uintptr_t)fe->vq[0].used + (i == 1 ? 1ull << 46 : 0);
		addr.avail = i == 2 ? UINT64_MAX - 16 : (uintptr_t)fe->vq[0].avail;
		addr.log = 0;
		if (i == 3) {
			assert_int_equal(
			        fe_send_ack(fe, FE_SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0),
			        -EIO);
			break;
		}
		fe_ok(fe, fe_queue_start(fe, 0, 0));
		fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0));
		assert_int_equal(fe_queue_enable(fe, 0, true), -EIO);
		assert_int_equal(device_info(&d).queues_running, 0);
		fe_ok(fe, fe_queue_enable(fe, 0, false));
		fe_ok(fe, fe_queue_stop(fe, 0, NULL));
	}
	fe_ok(fe, fe_queue_start(fe, 0, 0));
	fe_ok(fe, fe_queue_enable(fe, 0, true));
	fe_ok(fe, fe_queue_start(fe, 1, 0));
	fe_ok(fe, fe_queue_enable(fe, 1, true));
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

/* --- the configuration space and the write cache ------------------------------------------ */

static uint8_t shown_cache(struct fe *fe)
{
	uint8_t value;

	fe_ok(fe, fe_get_config(fe, 32, 1, &value));
	return value;
}

static void test_config(void **state)
{
	static const struct {
		uint32_t offset, size;
	} reads[] = {{0, 36}, {0, 48},  {0, 57},     {0, 60},     {0, 96},         {0, 1024},
	             {32, 1}, {90, 20}, {0x100, 60}, {0x1000, 8}, {UINT32_MAX, 8}, {0, 0}};
	uint8_t all[1024], part[1024], zero = 0, one = 1;
	struct device d;
	struct fe *fe;

	device_up(&d, NULL);
	fe = device_front_end(&d, NULL);
	fe_ok(fe, fe_get_config(fe, 0, sizeof(all), all));
	assert_int_equal(ox_get_le64(all), DEVICE_SIZE / 512);
	assert_int_equal(ox_get_le16(all + 34), 64);
	for (unsigned i = 0; i < sizeof(reads) / sizeof(reads[0]); i++)
		fe_ok(fe, fe_get_config(fe, reads[i].offset, reads[i].size, part));

	assert_int_equal(shown_cache(fe), 1);
	fe_ok(fe, fe_set_config(fe, 32, 1, &zero));
	assert_int_equal(shown_cache(fe), 0);
	assert_false(device_disk_info(&d).writeback);
	/* Only that byte. */
	assert_int_equal(fe_set_config(fe, 0, 8, all), -EIO);
	assert_int_equal(fe_set_config(fe, 31, 1, &one), -EIO);
	assert_int_equal(fe_set_config(fe, 32, 2, all), -EIO);
	one = 7;
	assert_int_equal(fe_set_config(fe, 32, 1, &one), -EIO);

	/* A front end that comes back without a look (QEMU) keeps its guest's choice... */
	fe_ok(fe, fe_stop(fe));
	assert_false(device_disk_info(&d).writeback);
	fe_ok(fe, fe_queue_start(fe, 0, fe->vq[0].start_base));
	assert_int_equal(shown_cache(fe), 0);
	assert_false(device_disk_info(&d).writeback);
	fe_disconnect(fe);
	device_wait_idle(&d);
	assert_false(device_disk_info(&d).writeback);
	/* ... and one that looks first sees the default. */
	fe_ok(fe, fe_connect(fe));
	fe_ok(fe, fe_negotiate(fe));
	assert_int_equal(shown_cache(fe), 1);
	assert_true(device_disk_info(&d).writeback);
	fe_free(fe);
	device_down(&d);
}

static void cannot_flush(struct fe_options *o)
{
	o->features &= ~(FE_F_BLK(FLUSH) | FE_F_BLK(CONFIG_WCE));
}

/* Firmware: its writes are durable, until another guest driver says that it flushes. */
static void test_guest_without_flush(void **state)
{
	struct device d;
	struct fe *fe;

	device_up(&d, NULL);
	fe = device_front_end(&d, cannot_flush);
	assert_false(device_disk_info(&d).writeback);
	assert_int_equal(shown_cache(fe), 1); /* what the next driver will have */
	fe_ok(fe, fe_stop(fe));
	fe_vq_reset(&fe->vq[0]);
	fe_ok(fe, fe_set_features(fe, fe->offered & FE_FEATURES_DEFAULT));
	fe_ok(fe, fe_queue_start(fe, 0, 0));
	assert_true(device_disk_info(&d).writeback);
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

static void test_reset(void **state)
{
	struct device d;
	struct fe *fe;
	uint64_t status;
	uint8_t zero = 0;

	device_up(&d, NULL);
	fe = device_front_end(&d, four_queues);
	check_io(fe);
	fe_ok(fe, fe_set_config(fe, 32, 1, &zero));
	fe_ok(fe, fe_set_status(fe, 7));
	fe_ok(fe, fe_get_status(fe, &status));
	assert_int_equal(status, 7);
	for (unsigned i = 0; i < 2; i++) {
		/* Both ways, while queues run. */
		if (i)
			fe_ok(fe, fe_send_ack(fe, FE_RESET_DEVICE, NULL, 0, NULL, 0));
		else
			fe_ok(fe, fe_set_status(fe, 0));
		assert_int_equal(device_info(&d).queues_running, 0);
		assert_false(device_disk_info(&d).active);
		assert_int_equal(shown_cache(fe), 1);
		/* Memory is still known: queues start without telling it again. */
		fe_ok(fe, fe_set_features(fe, fe->offered & FE_FEATURES_DEFAULT));
		for (unsigned q = 0; q < 4; q++) {
			fe_vq_reset(&fe->vq[q]);
			fe_ok(fe, fe_queue_start(fe, q, 0));
			fe_ok(fe, fe_queue_enable(fe, q, true));
		}
		check_io(fe);
	}
	fe_free(fe);
	device_down(&d);
}

/* --- notifications ------------------------------------------------------------------------- */

static void test_without_descriptors(void **state)
{
	uint64_t nofd = 1 << 8;
	struct device d;
	struct fe *fe;

	device_up(&d, NULL);
	fe = device_front_end(&d, NULL);
	/* No kicks: the ring is polled.  No calls: we poll. */
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_KICK, &nofd, 8, NULL, 0));
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_CALL, &nofd, 8, NULL, 0));
	for (unsigned i = 0; i < 20; i++) {
		int id = fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_IN, 0,
		                    &(struct fe_buf){fe->data_gpa, 4096}, 1, NULL);

		assert_true(id >= 0);
		fe_vq_publish(&fe->vq[0]);
		while (fe_vq_pop(&fe->vq[0], NULL, NULL) < 0)
			usleep(100);
		assert_int_equal(*fe_blk_status(&fe->vq[0], (unsigned)id), VIRTIO_BLK_S_OK);
	}
	/* And with them again. */
	nofd = 0;
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_KICK, &nofd, 8, &fe->vq[0].kick_fd, 1));
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_CALL, &nofd, 8, &fe->vq[0].call_fd, 1));
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

static void test_event_descriptors(void **state)
{
	uint64_t index = 0;
	int ends[2], file;
	struct device d;
	struct fe *fe;
	char buf[8];

	device_up(&d, NULL);
	fe = device_front_end(&d, NULL);
	/* Pipes are eventfds to the protocol; a file is not. */
	file = open("/dev/null", O_RDWR | O_CLOEXEC);
	assert_int_equal(fe_send_ack(fe, FE_SET_VRING_CALL, &index, 8, &file, 1), -EIO);
	close(file);
	assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
	fe_ok(fe, fe_send_ack(fe, FE_SET_VRING_CALL, &index, 8, &ends[1], 1));
	assert_int_equal(read(ends[0], buf, 8), 8);
	/* A pipe that nobody reads neither blocks nor kills; nor one whose other end is closed. */
	fe_vq_enable_call(&fe->vq[0]);
	for (unsigned i = 0; i < 10000; i++) {
		assert_true(fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_GET_ID, 0,
		                       &(struct fe_buf){fe->data_gpa, 20}, 1, NULL) >= 0);
		fe_vq_submit(&fe->vq[0]);
		while (fe_vq_pop(&fe->vq[0], NULL, NULL) < 0)
			sched_yield();
		fe_vq_enable_call(&fe->vq[0]);
	}
	close(ends[0]);
	assert_true(fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_GET_ID, 0,
	                       &(struct fe_buf){fe->data_gpa, 20}, 1, NULL) >= 0);
	fe_vq_submit(&fe->vq[0]);
	while (fe_vq_pop(&fe->vq[0], NULL, NULL) < 0)
		sched_yield();
	close(ends[1]);
	fe_free(fe);
	device_down(&d);
}

/* --- what waits for requests in flight ---------------------------------------------------- */

static void add_reads(struct fe *fe, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		assert_true(fe_blk_add(&fe->vq[i % fe->options.queues], VIRTIO_BLK_T_IN, 8 * i,
		                       &(struct fe_buf){fe->data_gpa + 4096 * i, 4096}, 1,
		                       NULL) >= 0);
	for (unsigned i = 0; i < fe->options.queues; i++)
		fe_vq_submit(&fe->vq[i]);
}

static bool answered(struct fe *fe, int timeout_ms)
{
	struct pollfd fd = {.fd = fe->sock, .events = POLLIN};

	return poll(&fd, 1, timeout_ms) == 1;
}

static void expect_ack(struct fe *fe, uint32_t request)
{
	struct fe_msg reply;

	fe_ok(fe, fe_recv(fe, &reply, NULL));
	assert_int_equal(reply.request, request);
	assert_int_equal(reply.u.u64, 0);
}

/* Removing memory is acknowledged after the last request that may touch it. */
static void test_memory_waits(void **state)
{
	struct {
		uint64_t padding;
		struct fe_wire_region region;
	} remove = {0};
	struct device d;
	struct fe_region *extra;
	struct fe *fe;
	int region;

	device_up(&d, NULL);
	fe = device_front_end(&d, four_queues);
	spy_install(&d);
	region = fe_region_new(fe, 1ull << 40, 1 << 20, -1, 0);
	assert_true(region >= 0);
	fe_ok(fe, fe_add_slot(fe, (unsigned)region)); /* while queues run */
	extra = &fe->region[region];
	spy_park(true);
	assert_true(fe_blk_add(&fe->vq[1], VIRTIO_BLK_T_IN, 0, &(struct fe_buf){extra->gpa, 4096},
	                       1, NULL) >= 0);
	fe_vq_submit(&fe->vq[1]);
	spy_wait_parked(1);
	remove.region = (struct fe_wire_region){extra->gpa, extra->size, extra->uva, 0};
	fe_ok(fe, fe_send(fe, FE_REM_MEM_REG, FE_NEED_REPLY, &remove, sizeof(remove), NULL, 0));
	assert_false(answered(fe, 100));
	spy_release();
	expect_ack(fe, FE_REM_MEM_REG);
	assert_int_equal(fe_blk_drain(&fe->vq[1], 20000), 1);
	/* The other queues and this one go on. */
	check_io(fe);
	/* Twice is an error. */
	assert_int_equal(fe_send_ack(fe, FE_REM_MEM_REG, &remove, sizeof(remove), NULL, 0), -EIO);
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

/* The regions that hold the rings go and come back: the queues wait for them. */
static void test_rings_without_memory(void **state)
{
	struct device d;
	struct fe *fe;

	device_up(&d, NULL);
	fe = device_front_end(&d, packed);
	check_io(fe);
	for (unsigned i = 0; i < fe->region_count; i++) {
		struct {
			uint64_t padding;
			struct fe_wire_region region;
		} remove = {0};

		remove.region = (struct fe_wire_region){fe->region[i].gpa, fe->region[i].size,
		                                        fe->region[i].uva, 0};
		fe_ok(fe, fe_send_ack(fe, FE_REM_MEM_REG, &remove, sizeof(remove), NULL, 0));
		fe->region[i].known = false;
	}
	assert_int_equal(device_info(&d).queues_running, 0);
	assert_true(device_disk_info(&d).active);
	fe_ok(fe, fe_send_memory(fe));
	assert_int_equal(device_info(&d).queues_running, 2);
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

/* A client that goes while its requests are in the store; the next one waits for them. */
static void test_disconnect_waits(void **state)
{
	struct device d;
	struct fe *fe, *next, *third;
	struct fe_options o;
	uint64_t features;

	device_up(&d, NULL);
	fe = device_front_end(&d, four_queues);
	spy_install(&d);
	spy_park(true);
	add_reads(fe, 40);
	spy_wait_parked(40);

	/* While it is there, others are turned away. */
	fe_options_init(&o, d.socket);
	next = fe_new(&o);
	fe_ok(next, fe_connect(next));
	assert_true(fe_hung_up(next, 20000));
	fe_disconnect(next);

	fe_disconnect(fe);
	fe_ok(next, fe_connect(next));
	fe_ok(next, fe_send(next, FE_GET_FEATURES, 0, NULL, 0, NULL, 0));
	assert_false(answered(next, 100));
	/* And one behind it. */
	third = fe_new(&o);
	fe_ok(third, fe_connect(third));
	assert_false(answered(third, 100));
	spy_release();
	assert_true(answered(next, 20000));
	assert_true(fe_hung_up(third, 20000));
	fe_disconnect(next);
	device_wait_idle(&d);
	fe_ok(next, fe_start(next));
	check_io(next);
	fe_ok(next, fe_get_u64(next, FE_GET_FEATURES, &features));
	fe_free(fe);
	fe_free(next);
	fe_free(third);
	device_down(&d);
}

static void stop_on_error(struct ox_disk_options *options)
{
	options->werror = OX_ON_ERROR_STOP;
}

static void without_inflight(struct fe_options *o)
{
	o->protocol_features &= ~FE_P_INFLIGHT_SHMFD;
}

static void packed_one(struct fe_options *o)
{
	o->features |= FE_F_PACKED;
}

static void continue_co(void *arg)
{
	struct device *d = arg;

	ox_disk_continue(d->disk);
}

/* Held requests do not hold the guest's stop up: with an inflight region they are carried out
 * at the next start, without one they fail. */
static void held_case(void (*adjust)(struct fe_options *), bool inflight)
{
	struct device d;
	struct fe *fe;
	uint8_t *data;

	device_up(&d, stop_on_error);
	fe = device_front_end(&d, adjust);
	data = fe_host(fe, fe->data_gpa, 65536);
	fe_pattern(data, 65536, 99);
	spy_install(&d);
	spy_fail_writes(EIO);
	for (unsigned i = 0; i < 8; i++)
		assert_true(fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_OUT, 8 * i,
		                       &(struct fe_buf){fe->data_gpa + 4096 * i, 4096}, 1,
		                       NULL) >= 0);
	fe_vq_submit(&fe->vq[0]);
	while (!device_disk_info(&d).stopped)
		usleep(1000);
	assert_int_equal(fe_vq_pop(&fe->vq[0], NULL, NULL), -EAGAIN);
	fe_ok(fe, fe_queue_stop(fe, 0, &fe->vq[0].start_base));
	if (!inflight) {
		uint8_t status[8];

		for (unsigned i = 0; i < 8; i++)
			assert_true(fe_vq_pop(&fe->vq[0], NULL, NULL) >= 0);
		for (unsigned i = 0; i < 8; i++)
			status[i] = *fe_blk_status(&fe->vq[0], i);
		for (unsigned i = 0; i < 8; i++)
			assert_int_equal(status[i], VIRTIO_BLK_S_IOERR);
	} else {
		assert_int_equal(fe_vq_pop(&fe->vq[0], NULL, NULL), -EAGAIN);
		/* The store works again: opened anew, it is not spied on. */
		fe_ok(fe, fe_queue_start(fe, 0, fe->vq[0].start_base));
		device_call(&d, continue_co, &d);
		assert_int_equal(fe_blk_drain(&fe->vq[0], 20000), 8);
		for (unsigned i = 0; i < 8; i++)
			assert_int_equal(*fe_blk_status(&fe->vq[0], i), VIRTIO_BLK_S_OK);
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa + 65536, 32768), 0);
		assert_memory_equal(data, data + 65536, 32768);
		check_io(fe);
	}
	fe_free(fe);
	device_down(&d);
}

static void test_held(void **state)
{
	held_case(NULL, true);
	held_case(packed_one, true);
	held_case(without_inflight, false);
}

/* --- the dirty log --------------------------------------------------------------------------- */

static bool is_dirty(struct fe *fe, uint64_t gpa)
{
	return fe->log[gpa / 4096 / 8] >> (gpa / 4096 % 8) & 1;
}

static void log_case(void (*adjust)(struct fe_options *))
{
	struct device d;
	struct fe *fe;
	struct fe_vq *vq;
	struct fe_buf buf;

	device_up(&d, NULL);
	fe = device_front_end(&d, adjust);
	vq = &fe->vq[0];
	buf = (struct fe_buf){fe->data_gpa + 8192, 8192};
	fe_ok(fe, fe_set_log(fe));
	assert_int_equal(fe_blk_read(vq, 0, buf.gpa, buf.len), 0);
	assert_false(is_dirty(fe, buf.gpa));
	/* On while the queue runs. */
	fe_ok(fe, fe_set_features(fe, fe->features | FE_F_LOG_ALL));
	fe_ok(fe, fe_set_vring_addr(fe, 0, true));
	memset(fe->log, 0, fe->log_size);
	assert_int_equal(fe_blk_write(vq, 0, fe->data_gpa, 4096), 0);
	assert_false(is_dirty(fe, fe->data_gpa)); /* was read only */
	assert_true(is_dirty(fe, fe_blk_status_gpa(vq, 0)));
	assert_true(is_dirty(fe, vq->packed ? vq->desc_gpa : vq->device_gpa));
	assert_int_equal(fe_blk_read(vq, 0, buf.gpa, buf.len), 0);
	assert_true(is_dirty(fe, buf.gpa));
	assert_true(is_dirty(fe, buf.gpa + 4096));
	assert_false(is_dirty(fe, buf.gpa + 8192));
	assert_false(is_dirty(fe, buf.gpa - 4096));
	/* Off again. */
	fe_ok(fe, fe_set_features(fe, fe->features & ~FE_F_LOG_ALL));
	fe_ok(fe, fe_set_vring_addr(fe, 0, false));
	memset(fe->log, 0, fe->log_size);
	assert_int_equal(fe_blk_read(vq, 0, buf.gpa, buf.len), 0);
	assert_false(is_dirty(fe, buf.gpa));
	assert_false(is_dirty(fe, vq->packed ? vq->desc_gpa : vq->device_gpa));
	fe_free(fe);
	device_down(&d);
}

static void test_log(void **state)
{
	log_case(NULL);
	log_case(packed_one);
}

/* --- requests that need more than the usual ----------------------------------------------- */

static void test_many_segments(void **state)
{
	struct fe_buf bufs[126];
	struct device d;
	struct fe *fe;
	uint8_t *data;

	device_up(&d, NULL);
	fe = device_front_end(&d, NULL);
	data = fe_host(fe, fe->data_gpa, 4 << 20);
	fe_pattern(data, 126 * 4096, 5);
	for (unsigned i = 0; i < 126; i++) /* backwards, so that nothing can be merged */
		bufs[i] = (struct fe_buf){fe->data_gpa + 4096 * (125 - i), 4096};
	assert_int_equal(fe_blk_do(&fe->vq[0], VIRTIO_BLK_T_OUT, 0, bufs, 126), 0);
	for (unsigned i = 0; i < 126; i++)
		bufs[i].gpa += 2 << 20;
	/* Several in a row use the wide lists again. */
	for (unsigned i = 0; i < 3; i++) {
		memset(data + (2 << 20), 0, 126 * 4096);
		assert_int_equal(fe_blk_do(&fe->vq[0], VIRTIO_BLK_T_IN, 0, bufs, 126), 0);
		assert_memory_equal(data, data + (2 << 20), 126 * 4096);
	}
	check_io(fe);
	fe_free(fe);
	device_down(&d);
}

static void test_several_ranges(void **state)
{
	struct device d;
	struct fe *fe;
	uint8_t *data;

	device_up(&d, NULL);
	fe = device_front_end(&d, NULL);
	data = fe_host(fe, fe->data_gpa, 1 << 20);
	fe_pattern(data, 65536, 6);
	assert_int_equal(fe_blk_write(&fe->vq[0], 0, fe->data_gpa, 65536), 0);
	memset(data + 65536, 0, 16 * 16);
	for (unsigned i = 0; i < 16; i++) {
		ox_put_le64(data + 65536 + 16 * i, 8 * i);
		ox_put_le32(data + 65536 + 16 * i + 8, i % 3 ? 1 : 0); /* some are empty */
	}
	assert_int_equal(fe_blk_do(&fe->vq[0], VIRTIO_BLK_T_WRITE_ZEROES, 0,
	                           &(struct fe_buf){fe->data_gpa + 65536, 256}, 1),
	                 0);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa + 131072, 65536), 0);
	for (unsigned i = 0; i < 16; i++)
		if (i % 3)
			memset(data + 4096 * i, 0, 512);
	assert_memory_equal(data, data + 131072, 65536);
	/* The last one of a list beyond the end: an error. */
	ox_put_le64(data + 65536 + 16 * 15, DEVICE_SIZE / 512);
	ox_put_le32(data + 65536 + 16 * 15 + 8, 8);
	assert_int_equal(fe_blk_do(&fe->vq[0], VIRTIO_BLK_T_WRITE_ZEROES, 0,
	                           &(struct fe_buf){fe->data_gpa + 65536, 256}, 1),
	                 VIRTIO_BLK_S_IOERR);
	fe_free(fe);
	device_down(&d);
}

/* --- size, sockets -----------------------------------------------------------------------------
 */

static void resize_co(void *arg)
{
	struct device *d = arg;
	struct ox_error err = {0};

	if (ox_disk_resize_co(d->disk, DEVICE_SIZE + (1 << 20), false, &err) < 0)
		fail_msg("%s", err.text);
}

static void test_resize(void **state)
{
	struct device d;
	struct fe *fe;
	uint32_t request;
	uint8_t config[8];

	device_up(&d, NULL);
	fe = device_front_end(&d, NULL);
	device_call(&d, resize_co, &d);
	fe_ok(fe, fe_backend_message(fe, 20000, &request));
	assert_int_equal(request, FE_BACKEND_CONFIG_CHANGE);
	fe_ok(fe, fe_get_config(fe, 0, 8, config));
	assert_int_equal(ox_get_le64(config), (DEVICE_SIZE + (1 << 20)) / 512);
	assert_int_equal(fe_blk_read(&fe->vq[0], DEVICE_SIZE, fe->data_gpa, 4096), 0);
	fe_free(fe);
	device_down(&d);
}

struct new_call {
	struct device *d;
	struct ox_vhost_user_blk_options options;
	struct ox_export *export;
	struct ox_error err;
	int rc;
};

static void new_co(void *arg)
{
	struct new_call *call = arg;

	call->options.disk = call->d->disk;
	call->options.main = ox_iothread_loop(call->d->main);
	call->options.loops = call->d->loops;
	call->options.loop_count = 1;
	call->rc = ox_vhost_user_blk_new(&call->options, &call->export, &call->err);
}

static void stop_co(void *arg)
{
	struct new_call *call = arg;

	ox_export_stop_co(call->export);
	ox_export_free(call->export);
}

static int bound_socket(const char *path)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strcpy(addr.sun_path, path);
	assert_int_equal(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
	return fd;
}

static void test_sockets(void **state)
{
	struct new_call call = {.options.fd = -1};
	char path[128], longer[256];
	struct device d;
	struct stat st;
	int fd;

	device_up(&d, NULL);
	call.d = &d;
	assert_int_equal(stat(d.socket, &st), 0);
	assert_int_equal(st.st_mode & 0007, 0);
	/* Its own socket is alive. */
	call.options.socket_path = d.socket;
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, -EADDRINUSE);
	assert_non_null(strstr(call.err.text, d.socket));
	/* A file in the way. */
	snprintf(path, sizeof(path), "%s/file", d.directory);
	fd = open(path, O_CREAT | O_CLOEXEC | O_WRONLY, 0600);
	close(fd);
	call.options.socket_path = path;
	ox_error_clear(&call.err);
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, -EEXIST);
	unlink(path);
	/* A dead socket is replaced, and ours is removed at the end. */
	close(bound_socket(path));
	ox_error_clear(&call.err);
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, 0);
	device_call(&d, stop_co, &call);
	assert_int_equal(stat(path, &st), -1);
	/* But not another process's that took its place. */
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, 0);
	unlink(path);
	fd = bound_socket(path);
	device_call(&d, stop_co, &call);
	assert_int_equal(stat(path, &st), 0);
	close(fd);
	unlink(path);
	memset(longer, 'x', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = 0;
	call.options.socket_path = longer;
	ox_error_clear(&call.err);
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, -ENAMETOOLONG);
	device_down(&d);
}

static void given_ended(void *arg)
{
	bool *ended = arg;

	__atomic_store_n(ended, true, __ATOMIC_RELEASE);
}

/* --fd: a listening socket, or a connected one. */
static void test_given_descriptor(void **state)
{
	bool ended = false;
	struct new_call call = {.options = {.ended = given_ended, .arg = &ended}};
	struct fe_options o;
	struct device d;
	struct fe *fe;
	char path[128];
	int pair[2];

	device_up(&d, NULL);
	call.d = &d;
	snprintf(path, sizeof(path), "%s/given", d.directory);
	call.options.fd = bound_socket(path);
	assert_int_equal(listen(call.options.fd, 1), 0);
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, 0);
	fe_options_init(&o, path);
	fe = fe_new(&o);
	fe_ok(fe, fe_start(fe));
	check_io(fe);
	fe_free(fe);
	device_call(&d, stop_co, &call);
	assert_false(ended);
	unlink(path);

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	call.options.fd = pair[0];
	device_call(&d, new_co, &call);
	assert_int_equal(call.rc, 0);
	close(pair[1]);
	while (!__atomic_load_n(&ended, __ATOMIC_ACQUIRE))
		usleep(1000);
	device_call(&d, stop_co, &call);

	call.options.fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	device_call(&d, new_co, &call);
	assert_true(call.rc < 0);
	close(call.options.fd);
	device_down(&d);
}

/* A message in single bytes, and a client that stops in the middle of one. */
static void test_pieces(void **state)
{
	uint32_t header[3] = {FE_GET_FEATURES, FE_VERSION, 0};
	struct fe_options o;
	struct fe_msg reply;
	struct device d;
	struct fe *fe;

	device_up(&d, NULL);
	fe_options_init(&o, d.socket);
	fe = fe_new(&o);
	fe_ok(fe, fe_connect(fe));
	for (unsigned i = 0; i < 12; i++) {
		fe_ok(fe, fe_send_raw(fe, (char *)header + i, 1, NULL, 0));
		usleep(1000);
	}
	fe_ok(fe, fe_recv(fe, &reply, NULL));
	assert_int_equal(reply.request, FE_GET_FEATURES);
	assert_int_equal(reply.size, 8);
	header[0] = FE_SET_FEATURES;
	header[2] = 8;
	fe_ok(fe, fe_send_raw(fe, header, 14 - 2, NULL, 0));
	fe_disconnect(fe);
	device_wait_idle(&d);
	fe_free(fe);
	device_down(&d);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_life),
	        cmocka_unit_test(test_order),
	        cmocka_unit_test(test_bad_addresses),
	        cmocka_unit_test(test_config),
	        cmocka_unit_test(test_guest_without_flush),
	        cmocka_unit_test(test_reset),
	        cmocka_unit_test(test_without_descriptors),
	        cmocka_unit_test(test_event_descriptors),
	        cmocka_unit_test(test_memory_waits),
	        cmocka_unit_test(test_rings_without_memory),
	        cmocka_unit_test(test_disconnect_waits),
	        cmocka_unit_test(test_held),
	        cmocka_unit_test(test_log),
	        cmocka_unit_test(test_many_segments),
	        cmocka_unit_test(test_several_ranges),
	        cmocka_unit_test(test_resize),
	        cmocka_unit_test(test_sockets),
	        cmocka_unit_test(test_given_descriptor),
	        cmocka_unit_test(test_pieces),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
