/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The same I/O over every engine, cache mode and kind of host: a guest of 512-byte sectors with
 * sixteen requests in flight, checked against a model, also after the disk was opened anew.
 *
 * The hosts are a file and loop devices of 512 and 4096-byte sectors; on the last one most of the
 * guest's requests are unaligned, and neighbours share a block of the host's.  Requests in flight
 * never overlap, so the model knows what each sector must hold.
 */
#include "util.h"
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <sys/ioctl.h>

enum {
	SECTOR = 512,
	SECTORS = 2048,
	DEPTH = 16,
	REQUESTS = 400,
	LONGEST = 48, /* sectors of one request */
	PIECES = 5,
};

/* What a sector holds: a version, from which its bytes follow; 0: zeroes. */
#define UNKNOWN UINT32_MAX

static struct model {
	uint32_t version[SECTORS];
	bool busy[SECTORS];
	uint32_t next_version;
	uint64_t random;
	unsigned started, running, failed;
	struct fixture *f;
	struct ox_fiber *waiter;
} model;

struct slot {
	struct ox_request request;
	struct iovec iov[PIECES];
	uint32_t first, count, version;
	uint8_t *memory; /* with room to start at an odd address */
};
static struct slot slots[DEPTH];

static uint32_t next_random(uint32_t below)
{
	model.random = model.random * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(model.random >> 33) % below;
}

static void fill_sector(uint8_t *bytes, uint32_t sector, uint32_t version)
{
	if (version == 0) {
		memset(bytes, 0, SECTOR);
		return;
	}
	for (unsigned i = 0; i < SECTOR; i += 8) {
		uint64_t word = ((uint64_t)sector << 40) ^ ((uint64_t)version << 8) ^ i;

		memcpy(bytes + i, &word, 8);
	}
}

static bool sector_is(const uint8_t *bytes, uint32_t sector, uint32_t version)
{
	uint8_t want[SECTOR];

	if (version == UNKNOWN)
		return true;
	fill_sector(want, sector, version);
	return memcmp(bytes, want, SECTOR) == 0;
}

/* Cuts the slot's memory into pieces, some at odd addresses. */
static unsigned cut(struct slot *slot)
{
	size_t left = (size_t)slot->count * SECTOR;
	uint8_t *at = slot->memory + (next_random(2) ? 0 : next_random(7));
	unsigned pieces = 0;

	while (left > 0) {
		size_t bytes = left;

		if (pieces + 1 < PIECES && next_random(2))
			bytes = ox_min((size_t)1 + next_random(4096), left);
		slot->iov[pieces++] = (struct iovec){.iov_base = at, .iov_len = bytes};
		at += bytes;
		left -= bytes;
	}
	return pieces;
}

static bool choose_range(struct slot *slot)
{
	slot->count = next_random(3) ? 1 + next_random(8) : 1 + next_random(LONGEST);
	slot->first = next_random(SECTORS - slot->count + 1);
	for (uint32_t i = 0; i < slot->count; i++) {
		if (model.busy[slot->first + i])
			return false;
	}
	memset(model.busy + slot->first, true, slot->count);
	return true;
}

static uint8_t choose_op(void)
{
	static const uint8_t ops[] = {
	        OX_IO_READ,  OX_IO_READ,  OX_IO_READ, OX_IO_WRITE,   OX_IO_WRITE,
	        OX_IO_WRITE, OX_IO_WRITE, OX_IO_ZERO, OX_IO_DISCARD, OX_IO_FLUSH,
	};

	return ops[next_random(OX_ARRAY_SIZE(ops))];
}

static void slot_start(struct slot *slot)
{
	struct ox_request *request = &slot->request;

	if (model.started == REQUESTS)
		return;
	model.started++;
	model.running++;
	request->op = choose_op();
	request->flags = request->op == OX_IO_ZERO && next_random(2) ? OX_IO_MAY_UNMAP : 0;
	request->offset = request->length = request->iovcnt = slot->count = 0;
	if (request->op != OX_IO_FLUSH) {
		while (!choose_range(slot))
			;
		request->offset = (uint64_t)slot->first * SECTOR;
		request->length = (uint64_t)slot->count * SECTOR;
	}
	if (request->op == OX_IO_READ || request->op == OX_IO_WRITE) {
		request->iovcnt = cut(slot);
		request->iov = slot->iov;
	}
	slot->version = ++model.next_version;
	if (request->op == OX_IO_WRITE) {
		for (uint32_t i = 0; i < slot->count; i++)
			fill_sector((uint8_t *)slot->iov[0].iov_base + (size_t)i * SECTOR,
			            slot->first + i, slot->version);
	}
	ox_disk_submit(model.f->queue, request);
}

static void slot_done(struct ox_request *request)
{
	struct slot *slot = ox_container_of(request, struct slot, request);

	model.failed += request->result != 0;
	for (uint32_t i = 0; i < slot->count; i++) {
		uint32_t *version = &model.version[slot->first + i];

		if (request->disk_op == OX_IO_READ)
			model.failed +=
			        !sector_is((uint8_t *)slot->iov[0].iov_base + (size_t)i * SECTOR,
			                   slot->first + i, *version);
		else if (request->disk_op == OX_IO_WRITE)
			*version = slot->version;
		else if (request->disk_op == OX_IO_ZERO)
			*version = 0;
		else
			*version = UNKNOWN;
	}
	if (slot->count)
		memset(model.busy + slot->first, false, slot->count);
	slot_start(slot);
	if (--model.running == 0)
		ox_fiber_resume(model.waiter);
}

static void check_all_co(struct fixture *f)
{
	uint8_t *bytes = aligned_alloc(4096, (size_t)SECTORS * SECTOR);

	assert_int_equal(run_co(f, OX_IO_READ, 0, bytes, (uint64_t)SECTORS * SECTOR), 0);
	for (uint32_t i = 0; i < SECTORS; i++) {
		if (!sector_is(bytes + (size_t)i * SECTOR, i, model.version[i]))
			fail_msg("sector %u does not hold version %u", i, model.version[i]);
	}
	free(bytes);
}

static void matrix_co(void *arg)
{
	struct fixture *f = arg;
	struct ox_error err = {0};

	if (ox_disk_activate_co(f->disk, &err) < 0)
		fail_msg("activate: %s", err.text);
	f->queue = ox_disk_get_queue(f->disk, f->loop);
	model.f = f;
	model.started = model.failed = 0;
	/* One more, so that the count does not reach 0 before this fiber waits. */
	model.running = 1;
	model.waiter = ox_fiber_self();
	for (unsigned i = 0; i < DEPTH; i++) {
		slots[i].request.done = slot_done;
		slot_start(&slots[i]);
	}
	if (--model.running > 0)
		ox_fiber_suspend();
	assert_int_equal(model.failed, 0);
	assert_int_equal(model.started, REQUESTS);
	assert_int_equal(run_co(f, OX_IO_FLUSH, 0, NULL, 0), 0);
	check_all_co(f);
	ox_disk_deactivate_co(f->disk);
	/* Again, from what is really there. */
	if (ox_disk_activate_co(f->disk, &err) < 0)
		fail_msg("activate again: %s", err.text);
	check_all_co(f);
	ox_disk_deactivate_co(f->disk);
}

/* --- hosts
 * ---------------------------------------------------------------------------------------- */

struct host {
	const char *path;
	char reason[128]; /* why there is none */
	uint32_t block;   /* loop device: its sector size; 0: a file */
	int loop_fd;
	char loop_path[32];
};
static struct host hosts[] = {{.block = 0}, {.block = 512}, {.block = 4096}};

static const char backing[] = "ox-matrix-backing.raw";
static const char plain[] = "ox-matrix.raw";

static int make_file(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd >= 0 && ftruncate(fd, (off_t)SECTORS * SECTOR) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int setup(void **state)
{
	struct host *host = *state;
	struct loop_config config = {.block_size = host->block,
	                             .info = {.lo_flags = LO_FLAGS_AUTOCLEAR}};
	int control, number, fd;

	memset(&model, 0, sizeof(model));
	model.random = 1;
	host->loop_fd = -1;
	host->path = plain;
	fd = make_file(host->block ? backing : plain);
	if (fd < 0)
		return -1;
	if (!host->block) {
		close(fd);
		return 0;
	}
	host->path = NULL;
	control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	for (unsigned tries = 0; control >= 0 && tries < 10 && !host->path; tries++) {
		number = ioctl(control, LOOP_CTL_GET_FREE);
		if (number < 0)
			break;
		snprintf(host->loop_path, sizeof(host->loop_path), "/dev/loop%d", number);
		host->loop_fd = open(host->loop_path, O_RDWR | O_CLOEXEC);
		config.fd = (uint32_t)fd;
		if (host->loop_fd >= 0 && ioctl(host->loop_fd, LOOP_CONFIGURE, &config) == 0) {
			host->path = host->loop_path;
		} else if (host->loop_fd >= 0) {
			/* Another program took it between the two calls. */
			close(host->loop_fd);
			host->loop_fd = -1;
		}
	}
	if (!host->path)
		snprintf(host->reason, sizeof(host->reason), "no loop device: %s", strerror(errno));
	if (control >= 0)
		close(control);
	close(fd);
	return 0;
}

static int teardown(void **state)
{
	struct host *host = *state;

	if (host->loop_fd >= 0) {
		ioctl(host->loop_fd, LOOP_CLR_FD);
		close(host->loop_fd);
	}
	unlink(host->block ? backing : plain);
	return 0;
}

/* O_DIRECT needs a file system that has it. */
static bool has_direct(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);

	if (fd < 0)
		return false;
	close(fd);
	return true;
}

static void run_modes(struct host *host, enum ox_aio aio)
{
	static const enum ox_cache modes[] = {OX_CACHE_NONE, OX_CACHE_WRITEBACK,
	                                      OX_CACHE_WRITETHROUGH, OX_CACHE_DIRECTSYNC,
	                                      OX_CACHE_UNSAFE};
	struct ox_loop_options loop_options = {.name = "test"};
	struct ox_error err = {0};

	if (!host->path) {
		print_message("# %s\n", host->reason);
		skip();
	}
	for (size_t i = 0; i < OX_ARRAY_SIZE(modes); i++) {
		struct fixture f = {0};

		if (ox_cache_is_direct(modes[i]) && !has_direct(host->path)) {
			print_message("# cache=%s: no O_DIRECT here\n", ox_cache_name(modes[i]));
			continue;
		}
		f.loop = ox_loop_new(&loop_options, &err);
		assert_non_null(f.loop);
		f.loops[0] = f.loop;
		ox_disk_options_init(&f.options);
		f.options.path = host->path;
		f.options.format = "raw";
		f.options.cache = modes[i];
		f.options.aio = aio;
		f.options.logical_block_size = SECTOR;
		f.options.main = f.loop;
		f.options.loops = f.loops;
		f.options.loop_count = 1;
		if (ox_disk_open(&f.options, &f.disk, &err) < 0)
			fail_msg("open: %s", err.text);
		ox_loop_run_fiber(f.loop, matrix_co, &f);
		ox_disk_close(f.disk);
		ox_loop_free(f.loop);
	}
	ox_fiber_pool_free();
}

static void test_sync(void **state)
{
	run_modes(*state, OX_AIO_SYNC);
}
static void test_threads(void **state)
{
	run_modes(*state, OX_AIO_THREADS);
}
static void test_native(void **state)
{
	run_modes(*state, OX_AIO_NATIVE);
}
static void test_io_uring(void **state)
{
	run_modes(*state, OX_AIO_IO_URING);
}
static void test_auto(void **state)
{
	run_modes(*state, OX_AIO_AUTO);
}

/* The sector sizes that a guest gets unless it is told otherwise. */
static void test_auto_blocks(void **state)
{
	struct ox_loop_options loop_options = {.name = "test"};
	struct host *host = *state;
	struct ox_error err = {0};
	struct ox_disk_info info;
	struct fixture f = {0};

	if (!host->path) {
		print_message("# %s\n", host->reason);
		skip();
	}
	f.loop = ox_loop_new(&loop_options, &err);
	f.loops[0] = f.loop;
	ox_disk_options_init(&f.options);
	f.options.path = host->path;
	f.options.cache = OX_CACHE_WRITEBACK;
	f.options.main = f.loop;
	f.options.loops = f.loops;
	f.options.loop_count = 1;
	assert_int_equal(ox_disk_open(&f.options, &f.disk, &err), 0);
	ox_disk_get_info(f.disk, &info);
	assert_int_equal(info.logical_block_size, host->block ? host->block : 512);
	assert_true(info.physical_block_size >= info.logical_block_size);
	ox_disk_close(f.disk);
	ox_loop_free(f.loop);
}

#define ON_HOSTS(function)                                                        \
	{#function " on a file", function, setup, teardown, &hosts[0]},           \
	        {#function " on loop 512", function, setup, teardown, &hosts[1]}, \
	{                                                                         \
#function " on loop 4096", function, setup, teardown, &hosts[2]   \
	}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        ON_HOSTS(test_sync),     ON_HOSTS(test_threads), ON_HOSTS(test_native),
	        ON_HOSTS(test_io_uring), ON_HOSTS(test_auto),    ON_HOSTS(test_auto_blocks),
	};
	int failed;

	for (unsigned i = 0; i < DEPTH; i++)
		slots[i].memory = aligned_alloc(4096, LONGEST * SECTOR + 4096);
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	for (unsigned i = 0; i < DEPTH; i++)
		free(slots[i].memory);
	return failed;
}
