/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Children, directories and the model disk: see vhost_user.h.
 *
 * The model: a sector is covered by at most one request in flight (state MODEL_BUSY), so that
 * what a read must find is known when it completes, whatever the order of execution.
 */
#include "vhost_user.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char start_directory[PATH_MAX];

static const char *program(void)
{
	static char path[PATH_MAX];
	const char *given = getenv("OXBOW");

	if (!path[0] && (!given || !realpath(given, path)))
		path[0] = '\0';
	return path;
}

int vu_enter_directory(void **state)
{
	char name[] = "vhost-user-XXXXXX";

	if (!program()[0] || access(program(), X_OK)) {
		print_error("OXBOW must name the program to test\n");
		return -1;
	}
	signal(SIGPIPE, SIG_IGN);
	if (!getcwd(start_directory, sizeof(start_directory)) || !mkdtemp(name))
		return -1;
	if (chdir(name))
		return -1;
	/* Records of running servers go here too, not to the host's /run. */
	return mkdir("run", 0700) || setenv("OXBOW_RUN_DIR", "run", 1);
}

int vu_leave_directory(void **state)
{
	char here[PATH_MAX], command[PATH_MAX + 16];

	if (!getcwd(here, sizeof(here)) || chdir(start_directory))
		return -1;
	if (getenv("VU_KEEP"))
		return 0;
	snprintf(command, sizeof(command), "rm -rf '%s'", here);
	return system(command);
}

void vu_make_image(const char *name, uint64_t bytes)
{
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
	close(fd);
}

void vu_read_image(const char *name, uint64_t offset, void *buf, size_t bytes)
{
	int fd = open(name, O_RDONLY | O_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(pread(fd, buf, bytes, (off_t)offset), bytes);
	close(fd);
}

bool vu_have_program(const char *name)
{
	char command[128];

	snprintf(command, sizeof(command), "command -v %s >/dev/null 2>&1", name);
	return system(command) == 0;
}

/* VU_ONLY=PATTERN runs the tests that match; VU_KEEP=1 leaves the directory. */
__attribute__((constructor)) static void choose_tests(void)
{
	if (getenv("VU_ONLY"))
		cmocka_set_test_filter(getenv("VU_ONLY"));
}

static pid_t children[64];
static unsigned child_count;

int vu_kill_strays(void **state)
{
	for (unsigned i = 0; i < child_count; i++)
		if (waitpid(children[i], NULL, WNOHANG) == 0) {
			kill(children[i], SIGKILL);
			waitpid(children[i], NULL, 0);
		}
	child_count = 0;
	return 0;
}

static void start(struct daemon *daemon, const char *const *argv, const char *socket)
{
	int rc = daemon_start(daemon, argv, socket, VU_LOG);

	if (rc) {
		char *text = daemon_stderr(daemon);

		print_error("%s: %s\n%s\n", argv[0], strerror(-rc), text);
		free(text);
	}
	assert_int_equal(rc, 0);
	if (child_count < sizeof(children) / sizeof(children[0]))
		children[child_count++] = daemon->pid;
}

void vu_serve(struct daemon *daemon, ...)
{
	const char *argv[40], *image = VU_IMAGE, *word;
	unsigned n = 0;
	bool control = true;
	va_list ap;

	argv[n++] = program();
	argv[n++] = "serve";
	va_start(ap, daemon);
	while ((word = va_arg(ap, const char *))) {
		assert_true(n < 32);
		if (!strncmp(word, "image=", 6))
			image = word + 6;
		else if (!strcmp(word, "-"))
			control = false;
		else
			argv[n++] = word;
	}
	va_end(ap);
	if (control) {
		argv[n++] = "--control";
		argv[n++] = VU_CONTROL;
	}
	if (image[0]) {
		argv[n++] = "--vhost-user-blk";
		argv[n++] = VU_SOCK;
		argv[n++] = image;
	}
	argv[n] = NULL;
	start(daemon, argv, NULL);
}

void vu_serve_qemu(struct daemon *daemon, unsigned queues)
{
	char export[256];
	const char *argv[] = {"qemu-storage-daemon",
	                      "--blockdev",
	                      "driver=file,filename=" VU_IMAGE ",node-name=disk,discard=unmap",
	                      "--export",
	                      export,
	                      NULL};

	unlink(VU_SOCK);
	snprintf(export, sizeof(export),
	         "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=" VU_SOCK
	         ",writable=on,num-queues=%u",
	         queues);
	start(daemon, argv, VU_SOCK);
}

void vu_end(struct daemon *daemon)
{
	int status = daemon_stop(daemon, SIGTERM);

	if (status) {
		char *text = daemon_stderr(daemon);

		print_error("exit status %#x\n%s\n", status, text);
		free(text);
	}
	assert_int_equal(status, 0);
}

struct fe *vu_front_end(const struct fe_options *options)
{
	struct fe *fe = fe_new(options);

	vu_check(fe, fe_start(fe));
	return fe;
}

/* --- the model -------------------------------------------------------------------------------- */

uint64_t model_random(struct model *m, uint64_t below)
{
	m->rng ^= m->rng >> 12;
	m->rng ^= m->rng << 25;
	m->rng ^= m->rng >> 27;
	return (m->rng * 0x2545f4914f6cdd1dull >> 16) % below;
}

void model_init(struct model *m, struct fe *fe, uint64_t size, uint64_t seed)
{
	struct virtio_blk_config config;

	memset(m, 0, sizeof(*m));
	m->fe = fe;
	m->size = size;
	m->max_io = 65536;
	m->qd = fe->options.queue_size < 16 ? fe->options.queue_size : 16;
	m->rng = seed * 2 + 1;
	m->bytes = calloc(1, size);
	m->state = calloc(1, size / 512);
	m->op = calloc((size_t)fe->options.queues * fe->options.queue_size, sizeof(*m->op));
	assert_true(m->bytes && m->state && m->op);
	/* From the beginning: qemu-storage-daemon 7.2 takes no notice of the offset. */
	vu_check(fe, fe_get_config(fe, 0, 32, &config));
	m->unit = config.blk_size < 512 ? 512 : config.blk_size;
	m->ranges = (fe->features & FE_F_BLK(DISCARD)) && (fe->features & FE_F_BLK(WRITE_ZEROES));
}

void model_free(struct model *m)
{
	free(m->bytes);
	free(m->state);
	free(m->op);
}

static bool claim(struct model *m, uint64_t offset, uint64_t length)
{
	for (uint64_t s = offset / 512; s < (offset + length) / 512; s++)
		if (m->state[s] & MODEL_BUSY)
			return false;
	for (uint64_t s = offset / 512; s < (offset + length) / 512; s++)
		m->state[s] |= MODEL_BUSY;
	return true;
}

static void mark(struct model *m, const struct model_op *op, uint8_t clear, uint8_t set)
{
	for (uint64_t s = op->offset / 512; s < (op->offset + op->length) / 512; s++)
		m->state[s] = (uint8_t)((m->state[s] & ~clear) | set);
}

/* Cuts the slot's buffer into up to eight pieces, some of odd lengths. */
static void cut(struct model *m, struct model_op *op, uint64_t gpa)
{
	uint64_t left = op->length;
	unsigned want = 1 + (unsigned)model_random(m, 8);

	op->segs = 0;
	while (op->segs + 1 < want && left > 1024) {
		uint64_t n = 1 + model_random(m, left - 1);

		if (model_random(m, 4))
			n = (n + 511) & ~511ull;
		if (n >= left)
			break;
		op->seg[op->segs++] = (struct fe_buf){gpa, (uint32_t)n};
		gpa += n;
		left -= n;
	}
	op->seg[op->segs++] = (struct fe_buf){gpa, (uint32_t)left};
}

static int submit_one(struct model *m, struct fe_vq *vq, struct model_op *op, uint64_t gpa)
{
	uint64_t kind = model_random(m, 100), units = m->max_io / m->unit;
	struct virtio_blk_discard_write_zeroes range;
	uint8_t *at;

	if (kind < 4) {
		op->type = VIRTIO_BLK_T_FLUSH;
		op->offset = op->length = 0;
		return fe_blk_add(vq, op->type, 0, NULL, 0, op);
	}
	op->length = (1 + model_random(m, units)) * m->unit;
	if (model_random(m, 3) == 0)
		op->length = m->unit * 8 > op->length ? op->length : m->unit * 8;
	op->offset = model_random(m, (m->size - op->length) / m->unit + 1) * m->unit;
	if (!claim(m, op->offset, op->length))
		return -EBUSY;
	at = m->bytes + op->offset;
	if (m->ranges && kind < 12) {
		op->type = kind < 6 ? VIRTIO_BLK_T_DISCARD : VIRTIO_BLK_T_WRITE_ZEROES;
		range = (struct virtio_blk_discard_write_zeroes){
		        .sector = op->offset / 512,
		        .num_sectors = (uint32_t)(op->length / 512),
		        .flags = kind < 8 ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP};
		fe_mem_write(m->fe, gpa, &range, sizeof(range));
		op->segs = 1;
		op->seg[0] = (struct fe_buf){gpa, sizeof(range)};
		mark(m, op, MODEL_UNKNOWN, op->type == VIRTIO_BLK_T_DISCARD ? MODEL_UNKNOWN : 0);
		memset(at, 0, op->length);
		return fe_blk_add(vq, op->type, 0, op->seg, 1, op);
	}
	cut(m, op, gpa);
	if (kind < 56) {
		op->type = VIRTIO_BLK_T_OUT;
		fe_pattern(at, op->length, m->rng);
		fe_mem_write(m->fe, gpa, at, op->length);
		mark(m, op, MODEL_UNKNOWN, 0);
	} else {
		op->type = VIRTIO_BLK_T_IN;
	}
	return fe_blk_add(vq, op->type, op->offset / 512, op->seg, op->segs, op);
}

static int compare(struct model *m, const struct model_op *op)
{
	uint8_t sector[512];

	for (uint64_t at = 0; at < op->length; at += 512) {
		uint64_t disk = op->offset + at;

		if (m->state[disk / 512] & MODEL_UNKNOWN)
			continue;
		fe_mem_read(m->fe, op->seg[0].gpa + at, sector, 512);
		if (memcmp(sector, m->bytes + disk, 512)) {
			snprintf(m->error, sizeof(m->error),
			         "read of %llu bytes at %llu: byte range at %llu differs",
			         (unsigned long long)op->length, (unsigned long long)op->offset,
			         (unsigned long long)disk);
			return -EIO;
		}
	}
	return 0;
}

static int finish(struct model *m, struct fe_vq *vq, unsigned id, struct model_op *op, uint32_t len)
{
	uint8_t status = *fe_blk_status(vq, id);
	uint32_t expect = op->type == VIRTIO_BLK_T_IN ? (uint32_t)op->length + 1 : 1;

	m->completed++;
	op->busy = false;
	mark(m, op, MODEL_BUSY, 0);
	if (status != VIRTIO_BLK_S_OK || (len && len < expect)) {
		snprintf(m->error, sizeof(m->error),
		         "request %u, %llu bytes at %llu: status %u, %u bytes written", op->type,
		         (unsigned long long)op->length, (unsigned long long)op->offset, status,
		         len);
		return -EIO;
	}
	return op->type == VIRTIO_BLK_T_IN ? compare(m, op) : 0;
}

static void fill(struct model *m, unsigned queue)
{
	struct fe_vq *vq = &m->fe->vq[queue];
	bool any = false;

	while (vq->in_flight < m->qd) {
		struct model_op *op = &m->op[(size_t)queue * vq->size];
		uint64_t gpa;
		unsigned slot = 0;
		int rc;

		while (op->busy) {
			op++;
			slot++;
		}
		gpa = m->fe->data_gpa + ((uint64_t)queue * vq->size + slot) * m->max_io;
		rc = submit_one(m, vq, op, gpa);
		if (rc == -ENOSPC) { /* the ring is full: forget what was chosen */
			mark(m, op, MODEL_BUSY, MODEL_UNKNOWN);
			break;
		}
		if (rc < 0)
			break;
		op->busy = true;
		m->submitted++;
		any = true;
	}
	if (any)
		fe_vq_submit(vq);
}

static int reap(struct model *m, unsigned queue)
{
	struct fe_vq *vq = &m->fe->vq[queue];
	int count = 0;

	for (;;) {
		struct model_op *op;
		uint32_t len;
		int id = fe_vq_pop(vq, (void **)&op, &len);
		int rc;

		if (id == -EAGAIN)
			return count;
		if (id < 0) {
			snprintf(m->error, sizeof(m->error),
			         "queue %u completed what is not in flight", queue);
			return -EIO;
		}
		rc = finish(m, vq, (unsigned)id, op, len);
		if (rc < 0)
			return rc;
		count++;
	}
}

static int reap_all(struct model *m)
{
	int total = 0;

	for (unsigned q = 0; q < m->fe->options.queues; q++) {
		int rc = reap(m, q);

		if (rc < 0)
			return rc;
		total += rc;
	}
	return total;
}

int model_step(struct model *m)
{
	for (unsigned q = 0; q < m->fe->options.queues; q++)
		fill(m, q);
	return reap_all(m);
}

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static unsigned in_flight(const struct model *m)
{
	unsigned total = 0;

	for (unsigned q = 0; q < m->fe->options.queues; q++)
		total += m->fe->vq[q].in_flight;
	return total;
}

/* Calls fn until `done` says so; a back end that does nothing for 30 s fails the test. */
static void pump(struct model *m, int (*fn)(struct model *m), uint64_t until)
{
	uint64_t last = now_ms();

	while (until ? m->completed < until : in_flight(m) > 0) {
		int rc = fn(m);

		if (rc < 0)
			fail_msg("%s", m->error);
		if (rc > 0)
			last = now_ms();
		else if (now_ms() - last > 30000)
			fail_msg("%u requests in flight and none completes", in_flight(m));
		else
			sched_yield();
	}
}

void model_drain(struct model *m)
{
	pump(m, reap_all, 0);
}

void model_run(struct model *m, uint64_t count)
{
	pump(m, model_step, m->completed + count);
	model_drain(m);
}

void model_verify(struct model *m)
{
	struct fe_vq *vq = &m->fe->vq[0];

	for (uint64_t at = 0; at < m->size; at += m->max_io) {
		struct model_op op = {.offset = at,
		                      .length = m->size - at < m->max_io ? m->size - at : m->max_io,
		                      .seg[0].gpa = m->fe->data_gpa};

		assert_int_equal(fe_blk_read(vq, op.offset, op.seg[0].gpa, (uint32_t)op.length), 0);
		if (compare(m, &op))
			fail_msg("%s", m->error);
	}
}
