/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The vhost-user device beside its I/O: what is offered, the configuration space, the write
 * cache switch, resizing, memory slots, acknowledgements, reset and status, read-only disks; and
 * when the disk is active: no lock before the first ring starts, none after the last one stops.
 */
#include "vhost_user.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DISK (64 * MIB)

static struct daemon daemon_;

static int serve(void **state)
{
	vu_make_image(VU_IMAGE, DISK);
	vu_serve(&daemon_, "-f", "raw", "--iothreads", "2", NULL);
	return 0;
}

static int finish(void **state)
{
	int status = daemon_stop(&daemon_, SIGTERM);

	vu_kill_strays(state);
	return status;
}

static struct fe *new_front_end(bool packed, unsigned queues)
{
	struct fe_options o;

	fe_options_init(&o, VU_SOCK);
	o.queues = queues;
	if (packed)
		o.features |= FE_F_PACKED;
	return fe_new(&o);
}

static struct fe *started(bool packed, unsigned queues)
{
	struct fe *fe = new_front_end(packed, queues);

	vu_check(fe, fe_start(fe));
	return fe;
}

static void test_offer(void **state)
{
	struct fe *fe = new_front_end(false, 1);
	const uint64_t features = FE_F_LOG_ALL | FE_F_INDIRECT | FE_F_EVENT_IDX |
	                          FE_F_PROTOCOL_FEATURES | FE_F_VERSION_1 | FE_F_PACKED |
	                          FE_F_BLK(SEG_MAX) | FE_F_BLK(BLK_SIZE) | FE_F_BLK(TOPOLOGY) |
	                          FE_F_BLK(FLUSH) | FE_F_BLK(CONFIG_WCE) | FE_F_BLK(MQ) |
	                          FE_F_BLK(DISCARD) | FE_F_BLK(WRITE_ZEROES);
	const uint64_t protocol = FE_P_MQ | FE_P_LOG_SHMFD | FE_P_REPLY_ACK | FE_P_BACKEND_REQ |
	                          FE_P_CONFIG | FE_P_INFLIGHT_SHMFD | FE_P_RESET_DEVICE |
	                          FE_P_CONFIGURE_MEM_SLOTS;

	vu_check(fe, fe_connect(fe));
	vu_check(fe, fe_negotiate(fe));
	assert_int_equal(fe->offered & features, features);
	assert_int_equal(fe->offered_protocol & protocol, protocol);
	assert_false(fe->offered & FE_F_BLK(RO));
	assert_true(fe->queue_num >= 64);
	assert_true(fe->mem_slots >= 256);
	fe_free(fe);
}

static void test_config(void **state)
{
	static const uint32_t sizes[] = {1, 8, 32, 36, 48, 57, 60, 72, 96, 256};
	struct fe *fe = new_front_end(false, 1);
	uint8_t whole[256], part[512];
	struct virtio_blk_config config;

	vu_check(fe, fe_connect(fe));
	vu_check(fe, fe_negotiate(fe));
	vu_check(fe, fe_get_config(fe, 0, 256, whole));
	memcpy(&config, whole, sizeof(config));
	assert_int_equal(config.capacity, DISK / 512);
	assert_true(config.seg_max >= 126);
	assert_true(config.blk_size >= 512);
	assert_int_equal(config.wce, 1);
	assert_true(config.num_queues >= 1);
	assert_true(config.max_discard_sectors > 0 && config.max_discard_seg > 0);
	assert_true(config.max_write_zeroes_sectors > 0 && config.max_write_zeroes_seg > 0);
	for (unsigned i = 96; i < 256; i++)
		assert_int_equal(whole[i], 0);
	/* Any size and offset gives that part of the whole. */
	for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		vu_check(fe, fe_get_config(fe, 0, sizes[i], part));
		assert_memory_equal(part, whole, sizes[i]);
	}
	for (uint32_t offset = 0; offset < 256; offset += 7)
		for (uint32_t size = 1; offset + size <= 256; size += 31) {
			vu_check(fe, fe_get_config(fe, offset, size, part));
			assert_memory_equal(part, whole + offset, size);
		}
	/* Cloud Hypervisor has the beginning at 0x100. */
	vu_check(fe, fe_get_config(fe, 0x100, 60, part));
	assert_memory_equal(part, whole, 60);
	/* Beyond everything: zeroes of the size asked for. */
	vu_check(fe, fe_get_config(fe, 0x1000, 16, part));
	for (unsigned i = 0; i < 16; i++)
		assert_int_equal(part[i], 0);
	fe_free(fe);
}

static uint8_t write_cache(struct fe *fe)
{
	uint8_t wce;

	vu_check(fe, fe_get_config(fe, 32, 1, &wce));
	return wce;
}

static void test_write_cache(void **state)
{
	struct fe *fe = started(false, 1);
	uint64_t capacity = 1;

	for (unsigned round = 0; round < 2; round++) {
		uint8_t off = 0, on = 1;

		assert_int_equal(write_cache(fe), 1);
		vu_check(fe, fe_set_config(fe, 32, 1, &off));
		assert_int_equal(write_cache(fe), 0);
		assert_int_equal(fe_blk_write(&fe->vq[0], 8192, fe->data_gpa, 4096), 0);
		assert_int_equal(fe_blk_flush(&fe->vq[0]), 0);
		vu_check(fe, fe_set_config(fe, 32, 1, &on));
	}
	/* Nothing else can be written. */
	fe_set_config(fe, 0, 8, &capacity);
	vu_check(fe, fe_get_config(fe, 0, 8, &capacity));
	assert_int_equal(capacity, DISK / 512);
	fe_free(fe);
}

static void test_writethrough(void **state)
{
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	vu_serve(&daemon_, "-f", "raw", "--cache", "writethrough", NULL);
	fe = started(true, 1);
	assert_int_equal(write_cache(fe), 0);
	assert_int_equal(fe_blk_write(&fe->vq[0], 0, fe->data_gpa, 65536), 0);
	assert_int_equal(fe_blk_flush(&fe->vq[0]), 0);
	fe_free(fe);
	vu_end(&daemon_);
}

static void qmp_ok(int fd, const char *command)
{
	char *reply = qmp_run(fd, command);

	assert_non_null(reply);
	if (!strstr(reply, "\"return\""))
		fail_msg("%s: %s", command, reply);
	free(reply);
}

static void resize(uint64_t bytes)
{
	char command[200];
	int fd = qmp_open(VU_CONTROL);

	assert_true(fd >= 0);
	snprintf(command, sizeof(command),
	         "{\"execute\": \"block_resize\", \"arguments\": {\"node-name\": \"" VU_IMAGE
	         "\", \"size\": %llu}}",
	         (unsigned long long)bytes);
	qmp_ok(fd, command);
	close(fd);
}

static void test_resize(void **state)
{
	struct fe *fe = started(false, 1);
	uint32_t request;
	uint64_t sectors;

	assert_int_equal(fe_blk_read(&fe->vq[0], DISK, fe->data_gpa, 4096), VIRTIO_BLK_S_IOERR);
	resize(DISK + 16 * MIB);
	vu_check(fe, fe_backend_message(fe, 20000, &request));
	assert_int_equal(request, FE_BACKEND_CONFIG_CHANGE);
	vu_check(fe, fe_get_config(fe, 0, 8, &sectors));
	assert_int_equal(sectors, (DISK + 16 * MIB) / 512);
	assert_int_equal(fe_blk_write(&fe->vq[0], DISK, fe->data_gpa, 4096), 0);
	assert_int_equal(fe_blk_read(&fe->vq[0], DISK, fe->data_gpa, 4096), 0);
	/* While requests are in flight. */
	for (unsigned i = 1; i < 10; i++) {
		for (unsigned n = 0; n < 60; n++)
			fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_OUT, n * 128,
			           &(struct fe_buf){fe->data_gpa, 65536}, 1, NULL);
		fe_vq_submit(&fe->vq[0]);
		resize(DISK + (16 + i) * MIB);
		assert_int_equal(fe_blk_drain(&fe->vq[0], 20000), 60);
	}
	vu_check(fe, fe_stop(fe));
	fe_free(fe);
}

/* --- memory ---------------------------------------------------------------------------------- */

static void slots_during_io(bool packed)
{
	struct fe *fe = new_front_end(packed, 2);
	unsigned first, count = 0;
	struct model m;

	/* Room for the model's buffers on both queues. */
	fe_free(fe);
	struct fe_options o;

	fe_options_init(&o, VU_SOCK);
	o.queues = 2;
	o.memory = 2 * 128 * 65536;
	if (packed)
		o.features |= FE_F_PACKED;
	fe = vu_front_end(&o);
	model_init(&m, fe, DISK / 2, 5);
	first = fe->region_count;
	assert_true(fe->mem_slots >= 256);
	for (unsigned round = 0; round < 2; round++) {
		while (fe->region_count < 256) {
			int r = fe_region_new(fe, 0x100000000ull + count++ * 0x100000ull, 65536, -1,
			                      0);

			assert_true(r > 0);
			assert_true(model_step(&m) >= 0);
			vu_check(fe, fe_add_slot(fe, (unsigned)r));
			assert_true(model_step(&m) >= 0);
		}
		model_run(&m, 200);
		/* I/O to the new slots works. */
		for (unsigned r = first; r < 256; r += 23) {
			uint8_t bytes[4096];

			fe_pattern(bytes, sizeof(bytes), r);
			fe_mem_write(fe, fe->region[r].gpa, bytes, sizeof(bytes));
			assert_int_equal(
			        fe_blk_write(&fe->vq[1], 48 * MIB, fe->region[r].gpa, 4096), 0);
			assert_int_equal(fe_blk_read(&fe->vq[0], 48 * MIB, fe->data_gpa, 4096), 0);
			assert_memory_equal(fe_host(fe, fe->data_gpa, 4096), bytes, 4096);
		}
		/* And goes away again, under I/O that does not use it. */
		while (fe->region_count > first) {
			assert_true(model_step(&m) >= 0);
			vu_check(fe, fe_remove_slot(fe, first + (fe->region_count - first) / 2));
			assert_true(model_step(&m) >= 0);
		}
		model_run(&m, 200);
	}
	model_verify(&m);
	model_free(&m);
	fe_free(fe);
}

static void test_slots(void **state)
{
	slots_during_io(false);
}

static void test_slots_packed(void **state)
{
	slots_during_io(true);
}

/* Memory that a request in flight uses is removed: the request ends before the answer. */
static void test_slot_in_use(void **state)
{
	struct fe *fe = started(false, 1);

	for (unsigned i = 0; i < 30; i++) {
		int r = fe_region_new(fe, 0x200000000ull, 4 * MIB, -1, 0);
		uint64_t gpa = 0x200000000ull;

		assert_true(r > 0);
		vu_check(fe, fe_add_slot(fe, (unsigned)r));
		for (unsigned n = 0; n < 60; n++)
			fe_blk_add(&fe->vq[0], n & 1 ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT, n * 128,
			           &(struct fe_buf){gpa + n * 65536, 65536}, 1, NULL);
		fe_vq_submit(&fe->vq[0]);
		usleep(200 * (i % 5));
		vu_check(fe, fe_remove_slot(fe, (unsigned)r));
		/* Requests that were not taken yet now point nowhere: the queue may break, which
		 * is the guest's fault.  The connection stays. */
		fe_blk_drain(&fe->vq[0], 200);
		vu_check(fe, fe_stop(fe));
		fe_vq_reset(&fe->vq[0]);
		vu_check(fe, fe_get_inflight(fe, 1, fe->options.queue_size));
		vu_check(fe, fe_set_inflight(fe));
		vu_check(fe, fe_queue_start(fe, 0, 0));
		vu_check(fe, fe_queue_enable(fe, 0, true));
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	}
	fe_free(fe);
}

/* The table is told anew while the rings run, as QEMU does for hot-plugged memory. */
static void test_table_again(void **state)
{
	struct fe_options o;
	struct model m;
	struct fe *fe;

	fe_options_init(&o, VU_SOCK);
	o.keep_table_mode = true;
	o.protocol_features &= ~FE_P_CONFIGURE_MEM_SLOTS;
	o.memory = 128 * 65536;
	fe = vu_front_end(&o);
	model_init(&m, fe, DISK / 2, 9);
	for (unsigned i = 0; i < 40; i++) {
		if (fe->region_count < 8)
			assert_true(fe_region_new(fe, 0x100000000ull + i * MIB, 65536, -1, 0) > 0);
		else
			while (fe->region_count > 2) {
				/* Forgotten here; the next table leaves it out. */
				struct fe_region *r = &fe->region[--fe->region_count];

				close(r->fd);
			}
		for (unsigned n = 0; n < 20; n++)
			assert_true(model_step(&m) >= 0);
		vu_check(fe, fe_send_memory(fe));
		for (unsigned n = 0; n < 20; n++)
			assert_true(model_step(&m) >= 0);
	}
	model_drain(&m);
	model_verify(&m);
	model_free(&m);
	fe_free(fe);
}

/* Regions that begin in the middle of their file. */
static void test_mmap_offset(void **state)
{
	struct fe *fe = started(false, 1);
	uint8_t bytes[8192];
	int a, b;

	a = fe_region_new(fe, 0x300000000ull, 65536, -1, 131072);
	assert_true(a > 0);
	assert_int_equal(ftruncate(fe->region[a].fd, 131072 + 2 * 65536), 0);
	b = fe_region_new(fe, 0x300010000ull, 65536, fe->region[a].fd, 131072 + 65536);
	assert_true(b > 0);
	vu_check(fe, fe_add_slot(fe, (unsigned)b));
	vu_check(fe, fe_add_slot(fe, (unsigned)a));
	fe_pattern(bytes, sizeof(bytes), 3);
	fe_mem_write(fe, 0x300010000ull - 4096, bytes, sizeof(bytes));
	assert_int_equal(fe_blk_write(&fe->vq[0], 0, 0x300010000ull - 4096, 8192), 0);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 8192), 0);
	assert_memory_equal(fe_host(fe, fe->data_gpa, 8192), bytes, 8192);
	fe_free(fe);
}

/* --- acknowledgement, reset, status ------------------------------------------------------------
 */

static void test_reply_ack(void **state)
{
	struct fe *fe = started(false, 1);
	uint32_t bad[2] = {0, 5};
	struct {
		uint64_t padding, gpa, size, uva, offset;
	} gone = {0, 1ull << 50, 4096, 1ull << 50, 0};

	/* Refused, and the connection goes on. */
	vu_check(fe, fe_queue_stop(fe, 0, NULL));
	assert_int_equal(fe_send_ack(fe, FE_SET_VRING_NUM, bad, 8, NULL, 0), -EIO);
	assert_int_equal(fe_send_ack(fe, FE_REM_MEM_REG, &gone, sizeof(gone), NULL, 0), -EIO);
	vu_check(fe, fe_queue_start(fe, 0, fe->vq[0].next_avail));
	vu_check(fe, fe_queue_enable(fe, 0, true));
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	fe_free(fe);
}

static void test_no_reply_ack(void **state)
{
	struct fe_options o;
	struct fe *fe;

	for (unsigned i = 0; i < 2; i++) {
		fe_options_init(&o, VU_SOCK);
		if (i)
			o.no_reply_ack = true;
		else
			o.protocol_features &= ~FE_P_REPLY_ACK;
		fe = vu_front_end(&o);
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
		fe_free(fe);
	}
}

/* A front end that has no protocol features at all: rings are enabled from the start. */
static void test_plain_protocol(void **state)
{
	struct fe_options o;
	struct fe *fe;

	fe_options_init(&o, VU_SOCK);
	o.features &= ~FE_F_PROTOCOL_FEATURES;
	fe = fe_new(&o);
	vu_check(fe, fe_connect(fe));
	vu_check(fe, fe_negotiate(fe));
	vu_check(fe, fe_send_memory(fe));
	vu_check(fe, fe_queue_start(fe, 0, 0));
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	fe_free(fe);
}

static void test_vring_base(void **state)
{
	for (unsigned packed = 0; packed < 2; packed++) {
		struct fe *fe = started(packed, 1);
		struct fe_vq *vq = &fe->vq[0];
		uint32_t base, again;

		for (unsigned i = 0; i < 200; i++)
			assert_int_equal(fe_blk_flush(vq), 0);
		vu_check(fe, fe_queue_stop(fe, 0, &base));
		if (packed) {
			uint32_t half = vq->next_avail | (vq->avail_wrap ? 0x8000u : 0);

			assert_int_equal(base, half | half << 16);
		} else {
			assert_int_equal(base, 200);
		}
		/* Started and stopped without a request: the same. */
		vu_check(fe, fe_queue_start(fe, 0, base));
		vu_check(fe, fe_queue_enable(fe, 0, true));
		vu_check(fe, fe_queue_stop(fe, 0, &again));
		assert_int_equal(again, base);
		/* What was published while stopped is found at the next start, without a kick. */
		fe_blk_add(vq, VIRTIO_BLK_T_FLUSH, 0, NULL, 0, NULL);
		fe_vq_publish(vq);
		vu_check(fe, fe_queue_start(fe, 0, base));
		vu_check(fe, fe_queue_enable(fe, 0, true));
		assert_int_equal(fe_blk_drain(vq, 20000), 1);
		fe_free(fe);
	}
}

static void test_reset_device(void **state)
{
	for (unsigned packed = 0; packed < 2; packed++) {
		struct fe *fe = started(packed, 2);

		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
		vu_check(fe, fe_send_ack(fe, FE_RESET_DEVICE, NULL, 0, NULL, 0));
		/* Nothing runs. */
		fe_vq_reset(&fe->vq[0]);
		fe_vq_reset(&fe->vq[1]);
		fe_blk_add(&fe->vq[1], VIRTIO_BLK_T_FLUSH, 0, NULL, 0, NULL);
		fe_vq_publish(&fe->vq[1]);
		fe_vq_kick(&fe->vq[1]);
		usleep(50000);
		assert_int_equal(fe_vq_pop(&fe->vq[1], NULL, NULL), -EAGAIN);
		/* The driver begins anew. */
		fe_vq_reset(&fe->vq[1]);
		vu_check(fe, fe_set_features(fe, fe->features));
		for (unsigned i = 0; i < 2; i++)
			vu_check(fe, fe_queue_start(fe, i, fe->vq[i].start_base));
		for (unsigned i = 0; i < 2; i++)
			vu_check(fe, fe_queue_enable(fe, i, true));
		for (unsigned i = 0; i < 2; i++)
			assert_int_equal(fe_blk_read(&fe->vq[i], 0, fe->data_gpa, 4096), 0);
		fe_free(fe);
	}
}

static void test_status(void **state)
{
	struct fe_options o;
	uint64_t status;
	struct fe *fe;

	fe_options_init(&o, VU_SOCK);
	o.protocol_features |= FE_P_STATUS;
	fe = vu_front_end(&o);
	if (!(fe->protocol_features & FE_P_STATUS)) {
		fe_free(fe);
		print_message("# STATUS is not offered\n");
		skip();
	}
	vu_check(fe, fe_set_status(fe, 1 | 2));
	vu_check(fe, fe_get_status(fe, &status));
	assert_int_equal(status & 7, 3);
	vu_check(fe, fe_set_status(fe, 1 | 2 | 8 | 4));
	vu_check(fe, fe_get_status(fe, &status));
	assert_int_equal(status & 0xcf, 15);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	fe_free(fe);
}

/* The guest unbinds and rebinds its driver: queues stop, features come again, other ones. */
static void test_rebind(void **state)
{
	struct fe *fe = started(false, 4);
	uint64_t all = fe->features;

	for (unsigned i = 0; i < 20; i++) {
		unsigned queues = 1 + i % 4;

		for (unsigned q = 0; q < 4; q++)
			vu_check(fe, fe_queue_stop(fe, q, NULL));
		for (unsigned q = 0; q < 4; q++)
			fe_vq_reset(&fe->vq[q]);
		vu_check(fe, fe_set_features(
		                     fe, (i & 1 ? all & ~(FE_F_EVENT_IDX | FE_F_INDIRECT) : all) |
		                                 (i & 2 ? FE_F_PACKED : 0)));
		for (unsigned q = 0; q < 4; q++)
			fe_vq_reset(&fe->vq[q]);
		vu_check(fe, fe_get_inflight(fe, 4, fe->options.queue_size));
		vu_check(fe, fe_set_inflight(fe));
		for (unsigned q = 0; q < queues; q++)
			vu_check(fe, fe_queue_start(fe, q, fe->vq[q].start_base));
		for (unsigned q = 0; q < queues; q++)
			vu_check(fe, fe_queue_enable(fe, q, true));
		for (unsigned q = 0; q < queues; q++)
			assert_int_equal(fe_blk_write(&fe->vq[q], 0, fe->data_gpa, 4096), 0);
	}
	fe_free(fe);
}

static void test_read_only(void **state)
{
	struct fe *fe;
	uint8_t bytes[4096], zero[4096] = {0};

	vu_make_image(VU_IMAGE, DISK);
	vu_serve(&daemon_, "-f", "raw", "--read-only", NULL);
	fe = started(false, 1);
	assert_true(fe->offered & FE_F_BLK(RO));
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	memset(fe_host(fe, fe->data_gpa, 4096), 0x77, 4096);
	assert_int_equal(fe_blk_write(&fe->vq[0], 0, fe->data_gpa, 4096), VIRTIO_BLK_S_IOERR);
	assert_int_not_equal(fe_blk_range(&fe->vq[0], VIRTIO_BLK_T_WRITE_ZEROES, 0, 4096, 0), 0);
	assert_int_not_equal(fe_blk_range(&fe->vq[0], VIRTIO_BLK_T_DISCARD, 0, 4096, 0), 0);
	assert_int_equal(fe_blk_flush(&fe->vq[0]), 0);
	fe_free(fe);
	vu_end(&daemon_);
	vu_read_image(VU_IMAGE, 0, bytes, 4096);
	assert_memory_equal(bytes, zero, 4096);
}

static void test_queue_count(void **state)
{
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	vu_serve(&daemon_, "-f", "raw", "--queues", "3", NULL);
	fe = new_front_end(false, 3);
	vu_check(fe, fe_start(fe));
	assert_int_equal(fe->queue_num, 3);
	assert_int_equal(fe_blk_read(&fe->vq[2], 0, fe->data_gpa, 4096), 0);
	fe_free(fe);
	vu_end(&daemon_);
}

/* --- activation ------------------------------------------------------------------------------- */

/* Does anybody hold one of the image's lock bytes? */
static bool locked(void)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 100, .l_len = 200};
	int fd = open(VU_IMAGE, O_RDWR | O_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(fcntl(fd, F_OFD_GETLK, &lock), 0);
	close(fd);
	return lock.l_type != F_UNLCK;
}

static void expect_qemu_can_write(bool can)
{
	if (!vu_have_program("qemu-io"))
		return;
	int status = system("qemu-io -f raw -c 'write -P 0x33 0 512' " VU_IMAGE " >/dev/null 2>&1");

	assert_int_equal(status == 0, can);
}

static void test_activation(void **state)
{
	struct fe *fe = new_front_end(false, 2);
	uint8_t *bytes;
	int fd;

	assert_false(locked());
	expect_qemu_can_write(true);
	vu_check(fe, fe_connect(fe));
	vu_check(fe, fe_negotiate(fe));
	vu_check(fe, fe_send_memory(fe));
	assert_false(locked());
	/* Another program's turn between two connections of a guest. */
	expect_qemu_can_write(true);
	vu_check(fe, fe_queue_start(fe, 0, 0));
	vu_check(fe, fe_queue_enable(fe, 0, true));
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	bytes = fe_host(fe, fe->data_gpa, 4096);
	if (vu_have_program("qemu-io"))
		assert_int_equal(bytes[0], 0x33);
	assert_true(locked());
	expect_qemu_can_write(false);
	/* A second ring starts and stops: still ours. */
	vu_check(fe, fe_queue_start(fe, 1, 0));
	vu_check(fe, fe_queue_enable(fe, 1, true));
	vu_check(fe, fe_queue_stop(fe, 0, NULL));
	assert_true(locked());
	assert_int_equal(fe_blk_write(&fe->vq[1], 4096, fe->data_gpa, 4096), 0);
	vu_check(fe, fe_queue_stop(fe, 1, NULL));
	assert_false(locked());
	expect_qemu_can_write(true);
	/* What another wrote meanwhile is what the next start sees, also a new size. */
	fd = open(VU_IMAGE, O_RDWR | O_CLOEXEC);
	assert_true(fd >= 0);
	assert_int_equal(pwrite(fd, "another's", 9, 4096), 9);
	assert_int_equal(ftruncate(fd, DISK + 4 * MIB), 0);
	close(fd);
	fe_vq_reset(&fe->vq[0]);
	vu_check(fe, fe_queue_start(fe, 0, 0));
	vu_check(fe, fe_queue_enable(fe, 0, true));
	assert_int_equal(fe_blk_read(&fe->vq[0], 4096, fe->data_gpa, 4096), 0);
	assert_memory_equal(fe_host(fe, fe->data_gpa, 4096), "another's", 9);
	assert_int_equal(fe_blk_read(&fe->vq[0], DISK, fe->data_gpa, 4096), 0);
	assert_true(locked());
	/* Hanging up stops the rings too. */
	fe_disconnect(fe);
	for (unsigned i = 0; locked(); i++) {
		assert_true(i < 1000);
		usleep(20000);
	}
	fe_free(fe);
}

int main(void)
{
#define TEST(f)       cmocka_unit_test_setup_teardown(f, serve, finish)
#define TEST_ALONE(f) cmocka_unit_test_teardown(f, vu_kill_strays)
	const struct CMUnitTest tests[] = {
	        TEST(test_offer),
	        TEST(test_config),
	        TEST(test_write_cache),
	        TEST_ALONE(test_writethrough),
	        TEST(test_resize),
	        TEST(test_slots),
	        TEST(test_slots_packed),
	        TEST(test_slot_in_use),
	        TEST(test_table_again),
	        TEST(test_mmap_offset),
	        TEST(test_reply_ack),
	        TEST(test_no_reply_ack),
	        TEST(test_plain_protocol),
	        TEST(test_vring_base),
	        TEST(test_reset_device),
	        TEST(test_status),
	        TEST(test_rebind),
	        TEST_ALONE(test_read_only),
	        TEST_ALONE(test_queue_count),
	        TEST(test_activation),
	};

	return cmocka_run_group_tests(tests, vu_enter_directory, vu_leave_directory);
}
