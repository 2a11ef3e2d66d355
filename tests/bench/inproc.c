/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * inproc: the request path without sockets and without another process: how it scales.
 *
 *     inproc [--threads N] [--seconds S | --requests N] [--qd N] [--bs BYTES] [--packed] [--json]
 *            [--image raw|qcow2 [--fill]] [--write]
 *
 * N I/O threads serve one disk, each a ring of its own: a null store, or with --image a new image
 * of 8 GiB on a memory store (--fill: written through once before).  Reads, or with --write writes,
 * are of random blocks; --requests ends after so many in all, so that different runs on a growing
 * image do the same work.  The driver of each ring
 * runs inside its thread, as a poller beside the ring's: a client process would take a core of
 * its own away from what is measured.  The rings are the export's own (vhost_user_ring.c), so a
 * request goes through the virtqueue, the block layer of the export, the disk, the image, the
 * store, and back.
 *
 * CPU time is that of the whole process over the measured time; it contains the driver's.
 */
#include "base/fiber.h"
#include "disk/disk.h"
#include "export/vhost_user_ring.h"
#include "tests/lib/frontend.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define THREADS_MAX 16
/* Blocks that are chosen among, 4 KiB each. */
#define BLOCK_BITS 20
#define DISK_BYTES ((uint64_t)8 << 30)

struct lane {
	struct ox_poller driver;
	struct ox_iothread *thread;
	struct fe *fe;
	struct ox_memory *memory;
	struct ox_vu_ring *ring;
	struct bench *bench;
	uint64_t completed; /* atomic */
	uint64_t failed;
	uint64_t seed;
	bool stop;
};

struct bench {
	struct lane lane[THREADS_MAX];
	unsigned threads, qd;
	uint32_t bs;
	double seconds;
	uint64_t requests;
	const char *image; /* format; NULL: null store */
	bool packed, json, write, fill;
	struct ox_loop *main;
	struct ox_disk *disk;
	struct ox_error err;
	double iops, cpu; /* results: requests and CPU seconds */
};

static void die(const char *what, const struct ox_error *err)
{
	fprintf(stderr, "inproc: %s: %s\n", what, err->text);
	exit(1);
}

static uint64_t next_block(struct lane *lane)
{
	lane->seed ^= lane->seed >> 12;
	lane->seed ^= lane->seed << 25;
	lane->seed ^= lane->seed >> 27;
	return (lane->seed * 0x2545f4914f6cdd1dull) >> (64 - BLOCK_BITS);
}

/* The driver: takes what completed and puts as much in. */
static bool drive(struct ox_poller *poller)
{
	struct lane *lane = ox_container_of(poller, struct lane, driver);
	struct fe_vq *vq = &lane->fe->vq[0];
	uint64_t count = 0;
	bool added = false;
	int id;

	while ((id = fe_vq_pop(vq, NULL, NULL)) >= 0) {
		if (*fe_blk_status(vq, (unsigned)id))
			lane->failed++;
		count++;
	}
	__atomic_store_n(&lane->completed, lane->completed + count, __ATOMIC_RELAXED);
	while (!lane->stop && vq->in_flight < lane->bench->qd) {
		struct fe_buf buf = {lane->fe->data_gpa +
		                             (uint64_t)fe_vq_next_id(vq) * lane->bench->bs,
		                     lane->bench->bs};

		if (fe_blk_add(vq, lane->bench->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
		               next_block(lane) * 8, &buf, 1, NULL) < 0)
			break;
		added = true;
	}
	if (added)
		fe_vq_publish(vq);
	return count || added;
}

/* Nothing wakes the driver: as long as it drives, the loop does not sleep. */
static bool sleep_not(struct ox_poller *poller)
{
	struct lane *lane = ox_container_of(poller, struct lane, driver);

	return !lane->stop;
}

static void wake(struct ox_poller *poller)
{
}

static void map_memory(struct lane *lane, struct ox_error *err)
{
	lane->memory = ox_memory_new();
	for (unsigned i = 0; i < lane->fe->region_count; i++) {
		struct fe_region *r = &lane->fe->region[i];
		struct ox_region *region;
		struct ox_memory *larger = NULL;

		if (ox_region_map(r->gpa, r->size, r->uva, 0, dup(r->fd), &region, err) < 0 ||
		    ox_memory_with(lane->memory, region, &larger, err) < 0)
			die("memory", err);
		ox_memory_put(lane->memory);
		lane->memory = larger;
	}
}

static void add_driver(void *arg)
{
	struct lane *lane = arg;

	lane->driver.poll = drive;
	lane->driver.sleep = sleep_not;
	lane->driver.wake = wake;
	ox_poller_add(ox_iothread_loop(lane->thread), &lane->driver);
}

static void remove_driver(void *arg)
{
	struct lane *lane = arg;

	ox_poller_remove(&lane->driver);
}

static void stop_driving(void *arg)
{
	((struct lane *)arg)->stop = true;
}

static void start_lane_co(struct bench *bench, struct lane *lane)
{
	struct ox_vu_ring_setup setup = {
	        .name = "null", .kick_fd = -1, .call_fd = -1, .err_fd = -1};
	struct ox_disk_info info;
	struct fe_options options;
	struct fe_vq *vq;
	uint64_t ignored;

	fe_options_init(&options, "");
	options.queue_size = 128;
	options.memory = (uint64_t)bench->bs * options.queue_size;
	lane->fe = fe_new(&options);
	vq = &lane->fe->vq[0];
	vq->event_idx = vq->indirect = true;
	if (bench->packed) {
		vq->packed = true;
		fe_vq_reset(vq);
	}
	fe_vq_disable_call(vq);
	map_memory(lane, &bench->err);
	ox_disk_get_info(bench->disk, &info);
	ox_blk_limits_init(&setup.limits, &info);
	setup.loop = ox_iothread_loop(lane->thread);
	setup.queue = ox_disk_get_queue(bench->disk, setup.loop);
	setup.config = (struct ox_vq_config){
	        .packed = bench->packed,
	        .event_idx = true,
	        .indirect = true,
	        .size = vq->size,
	        .memory = lane->memory,
	        .desc = ox_memory_translate_user(lane->memory, (uintptr_t)vq->desc,
	                                         16ull * vq->size, &ignored),
	        .driver = ox_memory_translate_user(lane->memory, (uintptr_t)vq->avail,
	                                           6 + 2ull * vq->size, &ignored),
	        .device = ox_memory_translate_user(lane->memory, (uintptr_t)vq->used,
	                                           6 + 8ull * vq->size, &ignored),
	        .avail_index = (uint16_t)vq->start_base,
	        .used_index = (uint16_t)(vq->start_base >> 16),
	};
	if (ox_vu_ring_start_co(&setup, &lane->ring, &bench->err) < 0)
		die("ring", &bench->err);
	ox_loop_call_co(setup.loop, add_driver, lane);
}

static void sample(struct bench *bench, uint64_t *requests, double *cpu)
{
	struct rusage usage;

	*requests = 0;
	for (unsigned i = 0; i < bench->threads; i++)
		*requests += __atomic_load_n(&bench->lane[i].completed, __ATOMIC_RELAXED);
	getrusage(RUSAGE_SELF, &usage);
	*cpu = (double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec / 1e6 +
	       (double)usage.ru_stime.tv_sec + (double)usage.ru_stime.tv_usec / 1e6;
}

/* Until the time or the requests are over. */
static void wait_co(struct bench *bench, uint64_t first)
{
	uint64_t now;
	double cpu;

	if (!bench->requests) {
		ox_sleep_co((uint64_t)(bench->seconds * 1e9));
		return;
	}
	do {
		ox_sleep_co(1000000);
		sample(bench, &now, &cpu);
	} while (now - first < bench->requests);
}

/* Writes every block that is chosen among, so that nothing is allocated later. */
static int fill_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	size_t bytes = 1 << 20;
	OX_FREE void *buf = malloc(bytes);
	int rc = buf ? 0 : -ENOMEM;

	if (buf)
		memset(buf, 0x5a, bytes);
	for (uint64_t at = 0; rc == 0 && at < (uint64_t)4096 << BLOCK_BITS; at += bytes)
		rc = ox_image_write_co(channel, at, buf, bytes, 0);
	return rc < 0 ? ox_error_set(err, -rc, "filling: %s", strerror(-rc)) : 0;
}

static const char *make_image(struct bench *bench)
{
	const char *path = "memory:bench:8G";
	struct ox_image_create_options create = {
	        .path = path, .format = bench->image, .size = DISK_BYTES, .has_size = true};
	struct ox_image_options open = {
	        .format = bench->image,
	        .store = {.write_granularity = 512, .aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE}};

	if (!bench->image)
		return "null:10G";
	if (ox_image_create(&create, &bench->err) < 0)
		die("create", &bench->err);
	ox_image_create_options_free(&create);
	if (bench->fill && ox_image_with(path, &open, fill_co, NULL, &bench->err) < 0)
		die("fill", &bench->err);
	return path;
}

static void run_co(void *arg)
{
	struct bench *bench = arg;
	uint64_t first, last, begin, end;
	double cpu_first, cpu_last;

	if (ox_disk_activate_co(bench->disk, &bench->err) < 0)
		die("disk", &bench->err);
	for (unsigned i = 0; i < bench->threads; i++)
		start_lane_co(bench, &bench->lane[i]);
	if (!bench->requests)
		ox_sleep_co(200000000);
	sample(bench, &first, &cpu_first);
	begin = ox_clock_ns();
	wait_co(bench, first);
	sample(bench, &last, &cpu_last);
	end = ox_clock_ns();
	bench->iops = (double)(last - first) / ((double)(end - begin) / 1e9);
	bench->cpu = (cpu_last - cpu_first) / ((double)(last - first) / 1e6);
	for (unsigned i = 0; i < bench->threads; i++) {
		struct lane *lane = &bench->lane[i];
		struct ox_loop *loop = ox_iothread_loop(lane->thread);

		ox_loop_call_co(loop, stop_driving, lane);
		ox_vu_ring_stop_co(lane->ring);
		ox_loop_call_co(loop, remove_driver, lane);
	}
	ox_disk_deactivate_co(bench->disk);
}

int main(int argc, char **argv)
{
	static const struct option longopts[] = {
	        {"threads", required_argument, NULL, 't'},
	        {"seconds", required_argument, NULL, 's'},
	        {"qd", required_argument, NULL, 'q'},
	        {"bs", required_argument, NULL, 'b'},
	        {"requests", required_argument, NULL, 'r'},
	        {"image", required_argument, NULL, 'i'},
	        {"fill", no_argument, NULL, 'f'},
	        {"write", no_argument, NULL, 'w'},
	        {"packed", no_argument, NULL, 'p'},
	        {"json", no_argument, NULL, 'j'},
	        {NULL, 0, NULL, 0},
	};
	struct ox_loop_options loop_options = {.name = "main"};
	static struct bench bench = {.threads = 1, .qd = 32, .bs = 4096, .seconds = 2};
	struct ox_loop *loops[THREADS_MAX];
	struct ox_disk_options options;
	uint64_t failed = 0;
	int opt;

	while ((opt = getopt_long(argc, argv, "", longopts, NULL)) != -1) {
		if (opt == 't')
			bench.threads = (unsigned)strtoul(optarg, NULL, 10);
		else if (opt == 's')
			bench.seconds = strtod(optarg, NULL);
		else if (opt == 'q')
			bench.qd = (unsigned)strtoul(optarg, NULL, 10);
		else if (opt == 'b')
			bench.bs = (uint32_t)strtoul(optarg, NULL, 10);
		else if (opt == 'r')
			bench.requests = strtoull(optarg, NULL, 10);
		else if (opt == 'i')
			bench.image = optarg;
		else if (opt == 'f')
			bench.fill = true;
		else if (opt == 'w')
			bench.write = true;
		else if (opt == 'p')
			bench.packed = true;
		else if (opt == 'j')
			bench.json = true;
		else
			return 2;
	}
	if (bench.threads == 0 || bench.threads > THREADS_MAX || bench.qd == 0 || bench.qd > 128 ||
	    bench.bs == 0 || bench.bs > 1u << 20) {
		fprintf(stderr, "usage: inproc [--threads 1..16] [--seconds S | --requests N] "
		                "[--qd 1..128] [--bs BYTES] [--packed] [--json] "
		                "[--image raw|qcow2 [--fill]] [--write]\n");
		return 2;
	}
	bench.main = ox_loop_new(&loop_options, &bench.err);
	if (!bench.main)
		die("loop", &bench.err);
	for (unsigned i = 0; i < bench.threads; i++) {
		struct lane *lane = &bench.lane[i];

		loop_options.name = "io";
		loop_options.poll_max_ns = OX_LOOP_POLL_MAX_NS;
		lane->bench = &bench;
		lane->seed = 0x1234567 + i;
		lane->thread = ox_iothread_start(&loop_options, &bench.err);
		if (!lane->thread)
			die("thread", &bench.err);
		loops[i] = ox_iothread_loop(lane->thread);
	}
	ox_disk_options_init(&options);
	options.path = make_image(&bench);
	options.format = bench.image ? bench.image : "raw";
	options.main = bench.main;
	options.loops = loops;
	options.loop_count = bench.threads;
	if (ox_disk_open(&options, &bench.disk, &bench.err) < 0)
		die("disk", &bench.err);
	ox_memory_install_sigbus();
	ox_loop_run_fiber(bench.main, run_co, &bench);
	for (unsigned i = 0; i < bench.threads; i++) {
		failed += bench.lane[i].failed;
		ox_iothread_stop(bench.lane[i].thread);
		ox_memory_put(bench.lane[i].memory);
		fe_free(bench.lane[i].fe);
	}
	ox_disk_close(bench.disk);
	ox_loop_free(bench.main);
	if (bench.json)
		printf("{\"threads\": %u, \"iops\": %.1f, \"cpu\": %.4f}\n", bench.threads,
		       bench.iops, bench.cpu);
	else
		printf("%u threads: %.0f IOPS, %.3f s CPU for a million requests\n", bench.threads,
		       bench.iops, bench.cpu);
	return failed ? 1 : 0;
}
