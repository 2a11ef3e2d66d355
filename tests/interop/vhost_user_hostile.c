/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Clients and guests that mean harm, or are merely broken: messages in any order, connections
 * that end anywhere, rings with impossible content, memory that goes away.  Always the same
 * question: is only the culprit hurt?
 *
 * One daemon serves two disks; `witness` is a front end of the second one and must work after
 * each attack, and so must a new connection to the first.
 */
#include "vhost_user.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define DISK (16 * MIB)

static struct daemon daemon_;
static struct fe *witness;

static int begin(void **state)
{
	static const char config[] = "[first]\nimage = " VU_IMAGE "\nformat = raw\n"
	                             "vhost-user-blk = " VU_SOCK "\n"
	                             "[second]\nimage = " VU_IMAGE2 "\nformat = raw\n"
	                             "vhost-user-blk = " VU_SOCK2 "\n";
	struct fe_options o;
	FILE *file;

	if (vu_enter_directory(state))
		return -1;
	vu_make_image(VU_IMAGE, DISK);
	vu_make_image(VU_IMAGE2, DISK);
	file = fopen("two.ini", "we");
	if (!file || fputs(config, file) < 0 || fclose(file))
		return -1;
	vu_serve(&daemon_, "--config", "two.ini", "--iothreads", "2", "image=", NULL);
	fe_options_init(&o, VU_SOCK2);
	witness = fe_new(&o);
	return fe_start(witness);
}

static int end(void **state)
{
	fe_free(witness);
	if (daemon_stop(&daemon_, SIGTERM) != 0)
		print_error("the daemon did not end well\n");
	return vu_leave_directory(state);
}

/* The daemon serves the second disk, and a new client of the first. */
static void expect_health(void)
{
	struct fe_options o;
	struct fe *fe;

	assert_true(daemon_alive(&daemon_));
	assert_int_equal(fe_blk_write(&witness->vq[0], 4096, witness->data_gpa, 4096), 0);
	assert_int_equal(fe_blk_read(&witness->vq[0], 4096, witness->data_gpa, 4096), 0);
	fe_options_init(&o, VU_SOCK);
	fe = vu_front_end(&o);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	fe_free(fe);
}

/* Front ends that a failed test leaves connected would keep the next one out. */
static struct fe *living[4];

static void release(struct fe *fe)
{
	for (unsigned i = 0; i < 4; i++)
		if (living[i] == fe)
			living[i] = NULL;
	fe_free(fe);
}

static int release_all(void **state)
{
	for (unsigned i = 0; i < 4; i++)
		if (living[i])
			release(living[i]);
	return 0;
}

static struct fe *attacker(bool packed, unsigned queues)
{
	struct fe_options o;
	unsigned i = 0;

	fe_options_init(&o, VU_SOCK);
	o.queues = queues;
	if (packed)
		o.features |= FE_F_PACKED;
	while (i < 3 && living[i])
		i++;
	living[i] = fe_new(&o);
	return living[i];
}

/* --- messages -----------------------------------------------------------------------------------
 */

/* After any message the back end either hangs up or answers GET_FEATURES. */
static void expect_answer_or_end(struct fe *fe)
{
	struct fe_msg msg;
	int rc = fe_send(fe, FE_GET_FEATURES, 0, NULL, 0, NULL, 0);

	while (rc == 0) {
		rc = fe_recv(fe, &msg, NULL);
		if (rc == 0 && msg.request == FE_GET_FEATURES)
			return;
	}
	assert_int_not_equal(rc, -ETIMEDOUT);
}

static void test_lone_messages(void **state)
{
	static const uint32_t sizes[] = {0, 4, 8, 12, 20, 24, 40, 44, 272, 4096};
	uint8_t payload[4096];

	for (uint32_t request = 0; request < FE_REQUEST_MAX + 4; request++) {
		for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
			struct fe *fe = attacker(false, 1);
			int fd = eventfd(0, EFD_CLOEXEC);

			vu_check(fe, fe_connect(fe));
			/* Zeroes, ones, and something else. */
			if (i % 3 == 2)
				fe_pattern(payload, sizeof(payload), request * 16 + i);
			else
				memset(payload, i % 3 ? 0xff : 0, sizeof(payload));
			vu_check(fe, fe_send(fe, request, i & 1 ? FE_NEED_REPLY : 0, payload,
			                     sizes[i], &fd, i & 2 ? 1 : 0));
			if (!(request == FE_GET_FEATURES && i == 0))
				expect_answer_or_end(fe);
			close(fd);
			release(fe);
		}
	}
	expect_health();
}

/* The same messages after a complete start: the rings run. */
static void test_messages_while_running(void **state)
{
	for (uint32_t request = 0; request < FE_REQUEST_MAX + 4; request++) {
		for (unsigned i = 0; i < 3; i++) {
			struct fe *fe = attacker(i == 1, 2);
			uint8_t payload[64];

			vu_check(fe, fe_start(fe));
			fe_blk_add(&fe->vq[1], VIRTIO_BLK_T_IN, 0,
			           &(struct fe_buf){fe->data_gpa, 4096}, 1, NULL);
			fe_vq_submit(&fe->vq[1]);
			memset(payload, i == 2 ? 0xff : 0, sizeof(payload));
			vu_check(fe, fe_send(fe, request, FE_NEED_REPLY, payload,
			                     request == FE_SET_VRING_ADDR ? 40 : 8, NULL, 0));
			expect_answer_or_end(fe);
			release(fe);
		}
	}
	expect_health();
}

static void test_bad_framing(void **state)
{
	static const struct {
		uint32_t header[3];
	} cases[] = {
	        {{FE_GET_FEATURES, FE_VERSION, 0x7fffffff}}, /* a payload of 2 GiB */
	        {{FE_GET_FEATURES, FE_VERSION, 0xffffffff}},
	        {{FE_GET_FEATURES, 0, 0}}, /* no version */
	        {{FE_GET_FEATURES, 2, 0}},
	        {{FE_GET_FEATURES, FE_VERSION | FE_REPLY, 0}}, /* a reply to nothing */
	        {{FE_GET_FEATURES, 0xfffffff1, 0}},
	        {{0xffffffff, FE_VERSION, 8}},
	        {{FE_SET_MEM_TABLE, FE_VERSION, 1}},
	};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct fe *fe = attacker(false, 1);
		uint64_t zero = 0;

		vu_check(fe, fe_connect(fe));
		fe_send_raw(fe, &cases[i], 12, NULL, 0);
		fe_send_raw(fe, &zero, 8, NULL, 0);
		shutdown(fe->sock, SHUT_WR);
		/* It sees the end and hangs up; a reply may come first. */
		assert_true(fe_hung_up(fe, 20000));
		release(fe);
	}
	expect_health();
}

static void test_noise(void **state)
{
	for (unsigned i = 0; i < 100; i++) {
		struct fe *fe = attacker(false, 1);
		uint8_t noise[600];
		uint64_t features;

		vu_check(fe, fe_connect(fe));
		if (i & 1)
			fe_get_u64(fe, FE_GET_FEATURES, &features);
		fe_pattern(noise, sizeof(noise), i);
		for (unsigned at = 0; at < sizeof(noise); at += 50) {
			/* Half of it with headers that look right. */
			if (i % 4 > 1) {
				uint32_t header[3] = {noise[at] % FE_REQUEST_MAX,
				                      FE_VERSION | FE_NEED_REPLY, 38};

				memcpy(noise + at, header, 12);
			}
			if (fe_send_raw(fe, noise + at, 50, NULL, 0))
				break;
		}
		release(fe);
	}
	expect_health();
}

static void test_hang_up_anywhere(void **state)
{
	unsigned messages[2] = {0, 0};

	for (unsigned packed = 0; packed < 2; packed++) {
		for (unsigned bytes = 0; bytes < 18; bytes += 5) {
			for (int fuse = 0;; fuse++) {
				struct fe *fe = attacker(packed, 3);
				int rc;

				fe->fuse = fuse;
				fe->fuse_bytes = bytes;
				rc = fe_start(fe);
				if (rc == 0) /* the whole start took fewer messages */
					messages[packed] = (unsigned)fuse;
				release(fe);
				if (rc == 0)
					break;
				assert_int_equal(rc, -ECANCELED);
				assert_true(fuse < 200);
			}
		}
	}
	assert_true(messages[0] > 25 && messages[1] > 25);
	expect_health();
}

/* Hangs up with requests in flight. */
static void test_hang_up_in_flight(void **state)
{
	for (unsigned i = 0; i < 40; i++) {
		struct fe *fe = attacker(i & 1, 4);

		vu_check(fe, fe_start(fe));
		for (unsigned q = 0; q < 4; q++) {
			for (unsigned n = 0; n < 60; n++)
				fe_blk_add(&fe->vq[q], n & 1 ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT,
				           n * 128, &(struct fe_buf){fe->data_gpa, 65536}, 1, NULL);
			fe_vq_submit(&fe->vq[q]);
		}
		release(fe); /* and the memory goes too */
	}
	expect_health();
}

static void test_impossible_values(void **state)
{
	static const struct {
		uint32_t request, index, num;
	} states[] = {
	        {FE_SET_VRING_NUM, 0, 0},          {FE_SET_VRING_NUM, 0, 3},
	        {FE_SET_VRING_NUM, 0, 65536},      {FE_SET_VRING_NUM, 64, 128},
	        {FE_SET_VRING_NUM, 0xffffffff, 1}, {FE_SET_VRING_BASE, 0, 0xffffffff},
	        {FE_SET_VRING_ENABLE, 77777, 1},   {FE_SET_VRING_ENABLE, 0, 2},
	        {FE_GET_VRING_BASE, 0xffff, 0},
	};
	static const uint64_t addresses[][3] = {
	        {0, 0, 0},
	        {1, 2, 3},
	        {UINT64_MAX, UINT64_MAX, UINT64_MAX},
	        {~15ull, ~15ull, ~15ull},
	};

	for (unsigned i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
		struct fe *fe = attacker(false, 1);
		uint32_t payload[2] = {states[i].index, states[i].num};

		vu_check(fe, fe_start(fe));
		fe_send(fe, states[i].request, 0, payload, 8, NULL, 0);
		fe_vq_kick(&fe->vq[0]);
		expect_answer_or_end(fe);
		release(fe);
	}
	for (unsigned i = 0; i < 2 * sizeof(addresses) / sizeof(addresses[0]); i++) {
		struct fe *fe = attacker(i & 1, 1);
		const uint64_t *a = addresses[i / 2];
		struct {
			uint32_t index, flags;
			uint64_t desc, used, avail, log;
		} addr = {0, 1, a[0], a[1], a[2], a[0]};

		vu_check(fe, fe_start(fe));
		fe_send(fe, FE_SET_VRING_ADDR, 0, &addr, sizeof(addr), NULL, 0);
		fe_vq_kick(&fe->vq[0]);
		expect_answer_or_end(fe);
		release(fe);
	}
	expect_health();
}

static void test_wrong_descriptors(void **state)
{
	static const uint32_t with_fd[] = {FE_SET_VRING_KICK, FE_SET_VRING_CALL, FE_SET_VRING_ERR,
	                                   FE_SET_BACKEND_REQ_FD};

	for (unsigned kind = 0; kind < 5; kind++) {
		for (unsigned i = 0; i < 4; i++) {
			struct fe *fe = attacker(false, 1);
			uint64_t index = 0;
			int pipe_fds[2], fd;

			assert_int_equal(pipe2(pipe_fds, O_CLOEXEC), 0);
			fd = kind == 0   ? open("/dev/null", O_RDWR | O_CLOEXEC)
			     : kind == 1 ? open(VU_IMAGE, O_RDONLY | O_CLOEXEC)
			     : kind == 2 ? open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
			     : kind == 3 ? open("/dev/zero", O_RDWR | O_CLOEXEC)
			                 : pipe_fds[0];
			vu_check(fe, fe_start(fe));
			fe_send(fe, with_fd[i], 0, &index,
			        with_fd[i] == FE_SET_BACKEND_REQ_FD ? 0 : 8, &fd, 1);
			fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_IN, 0,
			           &(struct fe_buf){fe->data_gpa, 4096}, 1, NULL);
			fe_vq_submit(&fe->vq[0]);
			expect_answer_or_end(fe);
			release(fe);
			close(pipe_fds[1]);
			if (fd != pipe_fds[0])
				close(pipe_fds[0]);
			close(fd);
		}
	}
	/* Memory, inflight and log in things that cannot be mapped, or are too small. */
	for (unsigned i = 0; i < 6; i++) {
		struct fe *fe = attacker(false, 1);
		int event = eventfd(0, EFD_CLOEXEC), small = fe->region[0].fd;
		struct {
			uint64_t size, offset;
			uint16_t queues, queue_size;
			uint32_t pad;
		} inflight = {1ull << 40, 0, 1, 128, 0};
		struct {
			uint64_t padding, gpa, size, uva, offset;
		} region = {0, 1ull << 40, 1ull << 50, 4096, 0};

		vu_check(fe, fe_connect(fe));
		vu_check(fe, fe_negotiate(fe));
		if (i < 2)
			fe_send(fe, FE_SET_INFLIGHT_FD, 0, &inflight, 20, i ? &event : &small, 1);
		else if (i < 4)
			fe_send(fe, FE_SET_LOG_BASE, 0, &inflight, 16, i & 1 ? &event : &small, 1);
		else
			fe_send(fe, FE_ADD_MEM_REG, 0, &region, 40, i & 1 ? &event : &small, 1);
		expect_answer_or_end(fe);
		close(event);
		release(fe);
	}
	expect_health();
}

/* A call descriptor that is a full pipe in blocking mode: whoever writes to it without care
 * hangs, and all disks of the thread with him. */
static void test_full_call_descriptor(void **state)
{
	struct fe *fe = attacker(false, 1);
	char block[4096] = {0};
	uint64_t index = 0;
	int pipe_fds[2], event;

	vu_check(fe, fe_start(fe));
	assert_int_equal(pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK), 0);
	while (write(pipe_fds[1], block, sizeof(block)) > 0)
		;
	while (write(pipe_fds[1], block, 1) > 0)
		;
	fcntl(pipe_fds[1], F_SETFL, 0);
	fe_send(fe, FE_SET_VRING_CALL, 0, &index, 8, &pipe_fds[1], 1);
	for (unsigned i = 0; i < 100; i++) {
		fe_vq_enable_call(&fe->vq[0]);
		fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_IN, 0, &(struct fe_buf){fe->data_gpa, 4096}, 1,
		           NULL);
		fe_vq_submit(&fe->vq[0]);
		usleep(100);
	}
	expect_answer_or_end(fe);
	release(fe);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	expect_health();
	/* The same with an eventfd that is at its limit. */
	fe = attacker(false, 1);
	vu_check(fe, fe_start(fe));
	event = eventfd(0, EFD_CLOEXEC);
	assert_int_equal(write(event, &(uint64_t){UINT64_MAX - 1}, 8), 8);
	fe_send(fe, FE_SET_VRING_CALL, 0, &index, 8, &event, 1);
	for (unsigned i = 0; i < 20; i++) {
		fe_vq_enable_call(&fe->vq[0]);
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	}
	expect_answer_or_end(fe);
	release(fe);
	close(event);
	expect_health();
}

static void test_second_client(void **state)
{
	struct fe *first = attacker(false, 1), *second = attacker(false, 1);
	uint64_t features;
	int rc;

	vu_check(first, fe_start(first));
	rc = fe_connect(second);
	if (rc == 0) {
		/* It waits, or it is told off; it gets no answer while the first is served. */
		second->options.timeout_ms = 300;
		rc = fe_get_u64(second, FE_GET_FEATURES, &features);
		assert_int_not_equal(rc, 0);
	}
	assert_int_equal(fe_blk_write(&first->vq[0], 0, first->data_gpa, 4096), 0);
	assert_int_equal(fe_blk_read(&first->vq[0], 0, first->data_gpa, 4096), 0);
	release(first);
	if (rc == -ETIMEDOUT) {
		struct fe_msg reply;

		second->options.timeout_ms = 20000;
		vu_check(second, fe_recv(second, &reply, NULL));
		assert_int_equal(reply.request, FE_GET_FEATURES);
	}
	release(second);
	expect_health();
}

/* --- rings -------------------------------------------------------------------------------------
 */

/* A descriptor as both kinds have it; flags without the packed ring's wrap bits. */
struct d {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};
#define N             VRING_DESC_F_NEXT
#define W             VRING_DESC_F_WRITE
#define I             VRING_DESC_F_INDIRECT
#define H             (FE_DATA_GPA)         /* a good read request's header, */
#define B             (FE_DATA_GPA + 4096)  /* its buffer */
#define S             (FE_DATA_GPA + 8192)  /* and status */
#define T             (FE_DATA_GPA + 65536) /* an indirect table */
#define OUT_OF_MEMORY 0x7000000000ull       /* no region is there */

struct ring_case {
	const char *name;
	struct d desc[8], table[8];
	uint16_t head, jump; /* split: what is put into the avail ring, and added to its index */
	bool id_bad;         /* packed */
	bool may_work;       /* odd, but a device may carry it out */
};

/* Writes the case as the ring's next chain and publishes it. */
static void put_split(struct fe_vq *vq, const struct ring_case *c)
{
	for (unsigned i = 0; i < 8; i++)
		vq->desc[i] = (struct vring_desc){c->desc[i].addr, c->desc[i].len, c->desc[i].flags,
		                                  c->desc[i].next};
	for (unsigned i = 0; i < 8; i++) {
		struct vring_desc d = {c->table[i].addr, c->table[i].len, c->table[i].flags,
		                       c->table[i].next};

		fe_mem_write(vq->fe, T + 16 * i, &d, 16);
	}
	vq->avail->ring[vq->avail->idx % vq->size] = c->head;
	__atomic_store_n(&vq->avail->idx, (uint16_t)(vq->avail->idx + 1 + c->jump),
	                 __ATOMIC_SEQ_CST);
	fe_vq_kick(vq);
}

static void put_packed(struct fe_vq *vq, const struct ring_case *c)
{
	unsigned n = 0;

	for (unsigned i = 0; i < 8; i++) {
		struct vring_packed_desc d = {c->table[i].addr, c->table[i].len, 0,
		                              c->table[i].flags};

		fe_mem_write(vq->fe, T + 16 * i, &d, 16);
	}
	while (c->desc[n].flags & N)
		n++;
	for (unsigned i = n + 1; i-- > 0;) {
		vq->pdesc[i].addr = c->desc[i].addr;
		vq->pdesc[i].len = c->desc[i].len;
		vq->pdesc[i].id = c->id_bad ? 0xffff : 0;
		__atomic_store_n(&vq->pdesc[i].flags,
		                 (uint16_t)(c->desc[i].flags | 1u << VRING_PACKED_DESC_F_AVAIL),
		                 __ATOMIC_SEQ_CST);
	}
	fe_vq_kick(vq);
}

static bool completed(const struct fe_vq *vq)
{
	if (vq->packed)
		return __atomic_load_n(&vq->pdesc[0].flags, __ATOMIC_ACQUIRE) &
		       1u << VRING_PACKED_DESC_F_USED;
	return __atomic_load_n(&vq->used->idx, __ATOMIC_ACQUIRE) != 0;
}

static void ring_case(struct fe *fe, const struct ring_case *c)
{
	struct virtio_blk_outhdr header = {.type = VIRTIO_BLK_T_IN};
	struct fe_vq *vq = &fe->vq[0];
	struct pollfd pfd = {.fd = vq->err_fd, .events = POLLIN};

	vu_check(fe, fe_start(fe));
	fe_mem_write(fe, H, &header, sizeof(header));
	if (vq->packed)
		put_packed(vq, c);
	else
		put_split(vq, c);
	/* Broken: told by the error descriptor. */
	for (unsigned i = 0;; i++) {
		if (poll(&pfd, 1, 10) == 1)
			break;
		if (completed(vq)) {
			if (!c->may_work)
				fail_msg("%s: completed", c->name);
			break;
		}
		if (i > 2000)
			fail_msg("%s: neither broken nor completed", c->name);
	}
	/* The other queue goes on, and the broken one can be stopped and used again. */
	if (fe_blk_read(&fe->vq[1], 0, fe->data_gpa + MIB, 4096) != 0)
		fail_msg("%s: the other queue stopped too", c->name);
	assert_int_equal(fe_blk_read(&witness->vq[0], 0, witness->data_gpa, 4096), 0);
	vu_check(fe, fe_queue_stop(fe, 0, NULL));
	/* The guest resets its device: fresh rings, and nothing in flight any more. */
	vu_check(fe, fe_queue_stop(fe, 1, &fe->vq[1].start_base));
	fe_vq_reset(vq);
	vu_check(fe, fe_get_inflight(fe, 2, fe->options.queue_size));
	vu_check(fe, fe_set_inflight(fe));
	vu_check(fe, fe_queue_start(fe, 0, vq->start_base));
	vu_check(fe, fe_queue_enable(fe, 0, true));
	if (fe_blk_read(vq, 0, fe->data_gpa, 4096) != 0)
		fail_msg("%s: the queue does not work after its restart", c->name);
}

static const struct ring_case split_cases[] = {
        {"a good request", {{H, 16, N, 1}, {B, 512, N | W, 2}, {S, 1, W, 0}}, .may_work = true},
        {"head beyond the table", .head = 128},
        {"head far beyond", .head = 0xffff},
        {"a loop of one", {{H, 16, N, 0}}},
        {"a loop of three", {{H, 16, N, 1}, {B, 512, N | W, 2}, {S, 1, N | W, 1}}},
        {"next beyond the table", {{H, 16, N, 500}}},
        {"header outside memory", {{OUT_OF_MEMORY, 16, N, 1}, {S, 1, W, 0}}},
        {"buffer outside memory", {{H, 16, N, 1}, {OUT_OF_MEMORY, 512, N | W, 2}, {S, 1, W, 0}}},
        {"buffer runs out of memory",
         {{H, 16, N, 1}, {FE_DATA_GPA + 16 * MIB - 256, 512, N | W, 2}, {S, 1, W, 0}}},
        {"address and length overflow",
         {{H, 16, N, 1}, {~0xffull, 0x1000, N | W, 2}, {S, 1, W, 0}}},
        {"4 GiB long", {{H, 16, N, 1}, {B, 0xffffffff, N | W, 2}, {S, 1, W, 0}}},
        {"in before out", {{S, 1, W | N, 1}, {H, 16, 0, 0}}},
        {"out behind in", {{H, 16, N, 1}, {S, 1, W | N, 2}, {B, 512, 0, 0}}},
        {"indirect table outside memory", {{OUT_OF_MEMORY, 48, I, 0}}},
        {"indirect table of odd size",
         {{T, 47, I, 0}},
         {{H, 16, N, 1}, {B, 512, N | W, 2}, {S, 1, W, 0}}},
        {"indirect table of nothing", {{T, 0, I, 0}}},
        {"indirect table of 4 GiB", {{T, 0xfffffff0, I, 0}}, {{H, 16, N, 1}, {B, 1, N, 0}}},
        {"indirect within indirect", {{T, 32, I, 0}}, {{H, 16, N, 1}, {T, 32, I, 0}}},
        {"indirect and next", {{T, 16, I | N, 1}, {S, 1, W, 0}}, {{H, 16, 0, 0}}},
        {"indirect that loops", {{T, 48, I, 0}}, {{H, 16, N, 1}, {B, 512, N | W, 1}}},
        {"indirect next beyond its table", {{T, 32, I, 0}}, {{H, 16, N, 7}}},
        {"avail index jumps", {{H, 16, N, 1}, {B, 512, N | W, 2}, {S, 1, W, 0}}, .jump = 5000},
        {"no header", {{S, 1, W, 0}}, .may_work = true},
        {"half a header", {{H, 8, N, 1}, {S, 1, W, 0}}, .may_work = true},
        {"no status", {{H, 16, 0, 0}}, .may_work = true},
        {"nothing", {{H, 0, 0, 0}}, .may_work = true},
        {"empty buffer",
         {{H, 16, N, 1}, {B, 0, N | W, 2}, {B, 512, N | W, 3}, {S, 1, W, 0}},
         .may_work = true},
};

static const struct ring_case packed_cases[] = {
        {"a good request", {{H, 16, N, 0}, {B, 512, N | W, 0}, {S, 1, W, 0}}, .may_work = true},
        {"an id beyond the ring",
         {{H, 16, N, 0}, {B, 512, N | W, 0}, {S, 1, W, 0}},
         .id_bad = true,
         .may_work = true}, /* it is opaque to the device */
        {"header outside memory", {{OUT_OF_MEMORY, 16, N, 0}, {S, 1, W, 0}}},
        {"buffer outside memory", {{H, 16, N, 0}, {OUT_OF_MEMORY, 512, N | W, 0}, {S, 1, W, 0}}},
        {"address and length overflow",
         {{H, 16, N, 0}, {~0xffull, 0x1000, N | W, 0}, {S, 1, W, 0}}},
        {"4 GiB long", {{H, 16, N, 0}, {B, 0xffffffff, N | W, 0}, {S, 1, W, 0}}},
        {"in before out", {{S, 1, W | N, 0}, {H, 16, 0, 0}}},
        {"out behind in", {{H, 16, N, 0}, {S, 1, W | N, 0}, {B, 512, 0, 0}}},
        {"indirect table outside memory", {{OUT_OF_MEMORY, 48, I, 0}}},
        {"indirect table of odd size",
         {{T, 47, I, 0}},
         {{H, 16, 0, 0}, {B, 512, W, 0}, {S, 1, W, 0}}},
        {"indirect table of nothing", {{T, 0, I, 0}}},
        {"indirect table of 4 GiB", {{T, 0xfffffff0, I, 0}}, {{H, 16, 0, 0}, {B, 1, W, 0}}},
        {"indirect within indirect", {{T, 32, I, 0}}, {{H, 16, 0, 0}, {T, 32, I, 0}}},
        {"indirect and next", {{T, 16, I | N, 0}, {S, 1, W, 0}}, {{H, 16, 0, 0}}},
        {"no header", {{S, 1, W, 0}}, .may_work = true},
        {"half a header", {{H, 8, N, 0}, {S, 1, W, 0}}, .may_work = true},
        {"no status", {{H, 16, 0, 0}}, .may_work = true},
};

static void test_split_rings(void **state)
{
	for (unsigned i = 0; i < sizeof(split_cases) / sizeof(split_cases[0]); i++) {
		struct fe *fe = attacker(false, 2);

		ring_case(fe, &split_cases[i]);
		release(fe);
	}
	expect_health();
}

static void test_packed_rings(void **state)
{
	for (unsigned i = 0; i < sizeof(packed_cases) / sizeof(packed_cases[0]); i++) {
		struct fe *fe = attacker(true, 2);

		ring_case(fe, &packed_cases[i]);
		release(fe);
	}
	expect_health();
}

/* Every descriptor of the ring says "and one more". */
static void test_endless_packed_chain(void **state)
{
	struct fe *fe = attacker(true, 1);
	struct fe_vq *vq = &fe->vq[0];
	struct pollfd pfd = {.fd = vq->err_fd, .events = POLLIN};

	vu_check(fe, fe_start(fe));
	for (unsigned i = vq->size; i-- > 0;) {
		vq->pdesc[i] = (struct vring_packed_desc){H, 16, 0, 0};
		__atomic_store_n(&vq->pdesc[i].flags,
		                 (uint16_t)(N | 1u << VRING_PACKED_DESC_F_AVAIL), __ATOMIC_SEQ_CST);
	}
	fe_vq_kick(vq);
	assert_int_equal(poll(&pfd, 1, 20000), 1);
	release(fe);
	expect_health();
}

/* Ring memory that changes all the time under the device's eyes. */
static void test_ring_noise(void **state)
{
	for (unsigned i = 0; i < 40; i++) {
		struct fe *fe = attacker(i & 1, 2);
		struct fe_vq *vq = &fe->vq[0];

		vu_check(fe, fe_start(fe));
		for (unsigned round = 0; round < 50; round++) {
			/* Plausible noise: small lengths, addresses near the good ones. */
			for (unsigned n = 0; n < 64; n++) {
				uint64_t r[2];

				fe_pattern(r, sizeof(r), ((uint64_t)i << 32) + round * 64 + n);
				vq->desc[r[0] % vq->size] = (struct vring_desc){
				        FE_DATA_GPA + (r[1] & 0xfffff),
				        (uint32_t)(r[0] >> 32) % (n & 1 ? 1024 : 0x20000),
				        (uint16_t)(r[1] >> 32 & (i & 1 ? 0x8087 : 7)),
				        (uint16_t)(r[1] >> 48) % 130};
			}
			if (!(i & 1)) {
				vq->avail->ring[round % vq->size] = (uint16_t)(round * 7 % 130);
				__atomic_store_n(&vq->avail->idx, (uint16_t)(round + 1),
				                 __ATOMIC_SEQ_CST);
			}
			fe_vq_kick(vq);
		}
		assert_int_equal(fe_blk_read(&fe->vq[1], 0, fe->data_gpa, 4096), 0);
		release(fe);
	}
	expect_health();
}

/* --- memory that goes away -----------------------------------------------------------------------
 */

static void truncate_region(unsigned region, bool packed)
{
	struct fe *fe = attacker(packed, 2);
	struct fe_vq *vq = &fe->vq[0];

	vu_check(fe, fe_start(fe));
	assert_int_equal(fe_blk_read(vq, 0, fe->data_gpa, 4096), 0);
	for (unsigned i = 0; i < 60; i++)
		fe_blk_add(vq, i & 1 ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT, 0,
		           &(struct fe_buf){fe->data_gpa + i * 65536, 65536}, 1, NULL);
	fe_vq_publish(vq);
	assert_int_equal(ftruncate(fe->region[region].fd, 0), 0);
	fe_vq_kick(vq);
	/* Kick the other one as well: its rings may be gone too. */
	fe_vq_kick(&fe->vq[1]);
	expect_answer_or_end(fe);
	release(fe);
	expect_health();
}

static void test_truncated_memory(void **state)
{
	for (unsigned i = 0; i < 6; i++) {
		truncate_region(1, i & 1);
		truncate_region(0, i & 1);
	}
}

static void test_truncated_inflight(void **state)
{
	for (unsigned packed = 0; packed < 2; packed++) {
		struct fe *fe = attacker(packed, 1);

		vu_check(fe, fe_start(fe));
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
		/* It may be sealed against that; then there is nothing to fear. */
		if (ftruncate(fe->inflight_fd, 0) == 0) {
			fe_blk_add(&fe->vq[0], VIRTIO_BLK_T_IN, 0,
			           &(struct fe_buf){fe->data_gpa, 4096}, 1, NULL);
			fe_vq_submit(&fe->vq[0]);
			expect_answer_or_end(fe);
		}
		release(fe);
		expect_health();
	}
}

/* An inflight region full of noise, given back at a reconnect. */
static void test_inflight_noise(void **state)
{
	for (unsigned i = 0; i < 30; i++) {
		struct fe *fe = attacker(i & 1, 1);
		uint8_t *noise = malloc(65536);
		size_t bytes;

		vu_check(fe, fe_start(fe));
		assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
		bytes = fe->inflight_size < 65536 ? fe->inflight_size : 65536;
		fe_pattern(noise, bytes, i);
		if (i % 3) { /* a plausible head, and small numbers behind it */
			for (size_t n = 0; n < bytes; n++)
				noise[n] &= i % 3 == 1 ? 0x01 : 0x7f;
			assert_int_equal(pread(fe->inflight_fd, noise, 16, 0), 16);
		}
		assert_int_equal(pwrite(fe->inflight_fd, noise, bytes, 0), bytes);
		fe->options.timeout_ms = 5000;
		if (fe_restart(fe) == 0)
			expect_answer_or_end(fe);
		release(fe);
		free(noise);
	}
	expect_health();
}

int main(void)
{
#define TEST(f) cmocka_unit_test_teardown(f, release_all)
	const struct CMUnitTest tests[] = {
	        TEST(test_lone_messages),        TEST(test_messages_while_running),
	        TEST(test_bad_framing),          TEST(test_noise),
	        TEST(test_hang_up_anywhere),     TEST(test_hang_up_in_flight),
	        TEST(test_impossible_values),    TEST(test_wrong_descriptors),
	        TEST(test_full_call_descriptor), TEST(test_second_client),
	        TEST(test_split_rings),          TEST(test_packed_rings),
	        TEST(test_endless_packed_chain), TEST(test_ring_noise),
	        TEST(test_truncated_memory),     TEST(test_truncated_inflight),
	        TEST(test_inflight_noise),
	};

	return cmocka_run_group_tests(tests, begin, end);
}
