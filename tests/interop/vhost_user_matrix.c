/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The same random I/O over every engine, cache mode and kind of host file: a regular file, loop
 * devices of 512 and of 4096-byte sectors, and the latter under a guest's disk of 512-byte
 * sectors (bounced, with read-modify-write).
 */
#include "vhost_user.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define DISK (8 * MIB)

static const char *const engines[] = {"sync", "threads", "native", "io_uring"};
static const char *const caches[] = {"none", "writeback", "writethrough", "directsync", "unsafe"};
enum target { FILE_512, LOOP_512, LOOP_4096, LOOP_4096_AS_512, TARGETS };
static const char *const targets[] = {"file", "loop 512", "loop 4096", "loop 4096 as 512"};

struct matrix_case {
	char name[96];
	const char *aio, *cache;
	enum target target;
};

/* A loop device over the image, which goes with the descriptor; -1: none can be had. */
static int attach_loop(uint32_t sector, char *path, size_t size)
{
	struct loop_config config = {.block_size = sector, .info.lo_flags = LO_FLAGS_AUTOCLEAR};
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	int backing = open(VU_IMAGE, O_RDWR | O_CLOEXEC);
	int fd = -1;

	config.fd = (uint32_t)backing;
	/* Another program may take the free device first. */
	for (unsigned i = 0; control >= 0 && backing >= 0 && i < 50; i++) {
		int number = ioctl(control, LOOP_CTL_GET_FREE);

		if (number < 0)
			break;
		snprintf(path, size, "/dev/loop%d", number);
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0 || ioctl(fd, LOOP_CONFIGURE, &config) == 0)
			break;
		close(fd);
		fd = -1;
		if (errno != EBUSY)
			break;
	}
	if (control >= 0)
		close(control);
	if (backing >= 0)
		close(backing);
	return fd;
}

static void test_case(void **state)
{
	const struct matrix_case *c = *state;
	char device[32], image[48] = "image=" VU_IMAGE;
	struct daemon daemon;
	struct fe_options o;
	struct model m;
	struct fe *fe;
	int loop = -1;

	vu_make_image(VU_IMAGE, DISK);
	if (c->target != FILE_512) {
		loop = attach_loop(c->target == LOOP_512 ? 512 : 4096, device, sizeof(device));
		if (loop < 0) {
			print_message("# no loop devices here\n");
			skip();
		}
		snprintf(image, sizeof(image), "image=%s", device);
	}
	vu_serve(&daemon, image, "-f", "raw", "--iothreads", "2", "--aio", c->aio, "--cache",
	         c->cache, "--logical-block-size", c->target == LOOP_4096_AS_512 ? "512" : "auto",
	         NULL);
	fe_options_init(&o, VU_SOCK);
	o.queues = 2;
	o.queue_size = 32;
	o.memory = 65536ull * o.queue_size * o.queues;
	if (c->cache[0] == 'w')
		o.features |= FE_F_PACKED;
	fe = vu_front_end(&o);
	model_init(&m, fe, DISK, 4711);
	assert_int_equal(m.unit, c->target == LOOP_4096 ? 4096 : 512);
	model_run(&m, 700);
	model_verify(&m);
	vu_check(fe, fe_stop(fe));
	fe_free(fe);
	vu_end(&daemon);
	/* It is in the device, not only in what the daemon would say. */
	for (uint64_t at = 0; at < DISK; at += 4096) {
		uint8_t bytes[4096];

		vu_read_image(image + 6, at, bytes, sizeof(bytes));
		for (unsigned i = 0; i < sizeof(bytes); i += 512)
			if (!(m.state[(at + i) / 512] & MODEL_UNKNOWN))
				assert_memory_equal(bytes + i, m.bytes + at + i, 512);
	}
	model_free(&m);
	if (loop >= 0)
		close(loop);
}

int main(void)
{
	enum {
		ENGINES = sizeof(engines) / sizeof(engines[0]),
		CACHES = sizeof(caches) / sizeof(caches[0]),
		CASES = ENGINES * CACHES * TARGETS,
	};
	static struct matrix_case cases[CASES];
	static struct CMUnitTest tests[CASES];
	unsigned n = 0;

	for (unsigned t = 0; t < TARGETS; t++)
		for (unsigned e = 0; e < ENGINES; e++)
			for (unsigned c = 0; c < CACHES; c++, n++) {
				cases[n] = (struct matrix_case){
				        .aio = engines[e], .cache = caches[c], .target = t};
				snprintf(cases[n].name, sizeof(cases[n].name), "%s, %s, %s",
				         targets[t], engines[e], caches[c]);
				tests[n] = (struct CMUnitTest){cases[n].name, test_case, NULL,
				                               vu_kill_strays, &cases[n]};
			}
	return _cmocka_run_group_tests("vhost-user matrix", tests, n, vu_enter_directory,
	                               vu_leave_directory);
}
