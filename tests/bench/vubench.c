/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * vubench: measures one vhost-user-blk back end, as a guest's driver would use it.
 *
 *     vubench --socket PATH [--op randread|randwrite|read|write] [--bs BYTES] [--qd N]
 *             [--queues N] [--seconds S | --requests N] [--sleep] [--packed] [--no-event-idx]
 *             [--no-indirect] [--span BYTES] [--flush] [--warmup S] [--pid PID] [--json]
 *
 * One thread drives all queues with --qd requests in flight on each.  Requests are published in
 * batches: what one look at the used ring freed.  Polling (default) never sleeps and asks for no
 * notification; --sleep waits on the queues' eventfds, as a guest's interrupt would.
 *
 * --flush follows every write by a flush, once it has completed (depth 1): what a database's commit
 * is.  Both count as requests.
 *
 * Latency is the time from publication to the look at the used ring that found the completion; a
 * clock is read once for each look that found anything.  With --pid the back end's CPU time is
 * read before and after: seconds for each million requests, user and system apart, of all its
 * threads.
 */
#include "base/base.h"
#include "base/histogram.h"
#include "tests/lib/daemon.h"
#include "tests/lib/frontend.h"

#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_QUEUES 64

struct bench {
	const char *socket, *op;
	uint32_t bs;
	unsigned qd, queues;
	double seconds, warmup;
	uint64_t requests, span;
	bool sleep, packed, event_idx, indirect, flush, json;
	pid_t pid;

	struct fe *fe;
	bool write, sequential;
	uint64_t blocks, next, seed;
	uint64_t submitted, completed, failed;
	uint64_t *start[MAX_QUEUES]; /* publication times by id */
	struct ox_histogram latency;
};

static uint64_t next_block(struct bench *b)
{
	if (b->sequential)
		return b->next++ % b->blocks;
	/* xorshift64*; the high half times the range */
	b->seed ^= b->seed >> 12;
	b->seed ^= b->seed << 25;
	b->seed ^= b->seed >> 27;
	return (uint64_t)(((unsigned __int128)(b->seed * 0x2545f4914f6cdd1dull) * b->blocks) >> 64);
}

/* Keeps qd requests in flight on a queue. */
static void fill(struct bench *b, unsigned queue, uint64_t now)
{
	struct fe_vq *vq = &b->fe->vq[queue];
	unsigned added = 0;

	while (vq->in_flight < b->qd) {
		int id = fe_vq_next_id(vq);
		struct fe_buf buf = {b->fe->data_gpa + ((uint64_t)queue * vq->size + id) * b->bs,
		                     b->bs};

		if (id < 0)
			break;
		if (b->flush && b->submitted % 2 == 1)
			id = fe_blk_add(vq, VIRTIO_BLK_T_FLUSH, 0, NULL, 0, NULL);
		else
			id = fe_blk_add(vq, b->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
			                next_block(b) * (b->bs / 512), &buf, 1, NULL);
		if (id < 0)
			break;
		b->start[queue][id] = now;
		added++;
	}
	if (added) {
		b->submitted += added;
		fe_vq_submit(vq);
	}
}

/* Takes what completed; true if anything did. */
static bool reap(struct bench *b, unsigned queue, uint64_t *now)
{
	struct fe_vq *vq = &b->fe->vq[queue];
	bool any = false;
	int id;

	while ((id = fe_vq_pop(vq, NULL, NULL)) != -EAGAIN) {
		if (!any)
			*now = ox_clock_ns();
		any = true;
		if (id < 0 || *fe_blk_status(vq, (unsigned)id) != VIRTIO_BLK_S_OK)
			b->failed++;
		if (id >= 0)
			ox_histogram_add(&b->latency, *now - b->start[queue][id]);
		b->completed++;
	}
	return any;
}

static int sleep_for_calls(struct bench *b)
{
	struct pollfd pfd[MAX_QUEUES];
	bool ready = false;

	for (unsigned q = 0; q < b->queues; q++) {
		pfd[q] = (struct pollfd){.fd = b->fe->vq[q].call_fd, .events = POLLIN};
		if (fe_vq_enable_call(&b->fe->vq[q]))
			ready = true;
	}
	if (!ready && poll(pfd, b->queues, 10000) == 0)
		return -ETIMEDOUT;
	for (unsigned q = 0; q < b->queues; q++) {
		uint64_t count;
		ssize_t n = read(pfd[q].fd, &count, sizeof(count));

		(void)n;
		fe_vq_disable_call(&b->fe->vq[q]);
	}
	return 0;
}

/* Runs until `seconds` or `requests` are over; 0 or -errno. */
static int drive(struct bench *b, double seconds, uint64_t requests, double *took)
{
	uint64_t begin = ox_clock_ns(), now = begin, last = begin;
	uint64_t end = begin + (uint64_t)(seconds * 1e9);
	unsigned idle = 0;

	b->submitted = b->completed = b->failed = 0;
	memset(&b->latency, 0, sizeof(b->latency));
	for (unsigned q = 0; q < b->queues; q++) {
		fe_vq_disable_call(&b->fe->vq[q]);
		fill(b, q, now);
	}
	while (requests ? b->completed < requests : now < end) {
		bool any = false;

		for (unsigned q = 0; q < b->queues; q++) {
			if (reap(b, q, &now)) {
				any = true;
				fill(b, q, now);
			}
		}
		if (any) {
			last = now;
			idle = 0;
		} else if (b->sleep) {
			if (sleep_for_calls(b) < 0)
				return -ETIMEDOUT;
		} else {
			ox_cpu_relax();
			if (++idle % 1024 == 0) {
				now = ox_clock_ns();
				if (now - last > 10000000000ull)
					return -ETIMEDOUT;
			}
		}
	}
	*took = (double)(ox_clock_ns() - begin) / 1e9;
	for (unsigned q = 0; q < b->queues; q++) {
		last = ox_clock_ns();
		while (b->fe->vq[q].in_flight) {
			uint64_t ignored;

			if (!reap(b, q, &ignored) && ox_clock_ns() - last > 10000000000ull)
				return -ETIMEDOUT;
		}
	}
	return b->failed ? -EIO : 0;
}

static void report(struct bench *b, double took, const struct daemon_usage *before,
                   const struct daemon_usage *after)
{
	double million = (double)b->completed / 1e6;
	double tick = 1.0 / (double)sysconf(_SC_CLK_TCK);
	double user = (double)(after->user_ticks - before->user_ticks) * tick / million;
	double system = (double)(after->system_ticks - before->system_ticks) * tick / million;
	double cpu = (double)(after->runtime_ns - before->runtime_ns) / 1e9 / million;
	double p50 = (double)ox_histogram_percentile(&b->latency, 50) / 1e3;
	double p99 = (double)ox_histogram_percentile(&b->latency, 99) / 1e3;
	double iops = (double)b->completed / took;

	if (b->json) {
		printf("{\"requests\": %llu, \"seconds\": %.6f, \"iops\": %.1f, \"p50_us\": %.3f, "
		       "\"p99_us\": %.3f, \"cpu_user\": %.4f, \"cpu_system\": %.4f, "
		       "\"cpu\": %.4f}\n",
		       (unsigned long long)b->completed, took, iops, p50, p99, user, system, cpu);
		return;
	}
	printf("%.0f IOPS, %.1f MiB/s, latency %.2f us median, %.2f us p99\n", iops,
	       iops * b->bs / 1048576, p50, p99);
	if (b->pid)
		printf("back end: %.3f s CPU for a million requests (%.3f user, %.3f system)\n",
		       cpu, user, system);
}

static int run(struct bench *b)
{
	struct daemon_usage before = {0}, after = {0};
	struct fe_options options;
	double took = 0, ignored;
	int rc;

	fe_options_init(&options, b->socket);
	options.queues = b->queues;
	options.queue_size = 128;
	while (options.queue_size < b->qd)
		options.queue_size = (uint16_t)(options.queue_size * 2);
	options.memory = (uint64_t)b->bs * options.queue_size * b->queues;
	if (b->packed)
		options.features |= FE_F_PACKED;
	if (!b->event_idx)
		options.features &= ~FE_F_EVENT_IDX;
	if (!b->indirect)
		options.features &= ~FE_F_INDIRECT;
	/* Recovery costs a back end stores of its own: measured as a virtual machine would have
	 * it, which is with INFLIGHT where it is offered. */
	b->fe = fe_new(&options);
	rc = fe_start(b->fe);
	if (rc) {
		fprintf(stderr, "vubench: %s: %s\n", b->fe->error, strerror(-rc));
		return 1;
	}
	if (b->packed && !(b->fe->features & FE_F_PACKED)) {
		fprintf(stderr, "vubench: the back end has no packed rings\n");
		return 1;
	}
	b->blocks = ox_min(b->fe->capacity, b->span) / b->bs;
	if (b->blocks == 0) {
		fprintf(stderr, "vubench: the disk is smaller than a block\n");
		return 1;
	}
	for (unsigned q = 0; q < b->queues; q++)
		b->start[q] = ox_xcalloc(options.queue_size, sizeof(uint64_t));
	/* Touch the buffers, so that no run pays for their first use. */
	for (unsigned i = 0; i < b->fe->region_count; i++)
		if (b->fe->region[i].gpa >= FE_DATA_GPA)
			memset(b->fe->region[i].host, 0x5a, b->fe->region[i].size);
	rc = b->warmup > 0 ? drive(b, b->warmup, 0, &ignored) : 0;
	if (rc == 0) {
		if (b->pid)
			daemon_usage(b->pid, &before);
		rc = drive(b, b->seconds, b->requests, &took);
		if (b->pid)
			daemon_usage(b->pid, &after);
	}
	if (rc) {
		fprintf(stderr, "vubench: %s after %llu requests, %llu failed\n", strerror(-rc),
		        (unsigned long long)b->completed, (unsigned long long)b->failed);
		return 1;
	}
	report(b, took, &before, &after);
	fe_stop(b->fe);
	fe_free(b->fe);
	for (unsigned q = 0; q < b->queues; q++)
		free(b->start[q]);
	return 0;
}

int main(int argc, char **argv)
{
	static const struct option longopts[] = {
	        {"socket", required_argument, NULL, 's'},
	        {"op", required_argument, NULL, 'o'},
	        {"bs", required_argument, NULL, 'b'},
	        {"qd", required_argument, NULL, 'q'},
	        {"queues", required_argument, NULL, 'n'},
	        {"seconds", required_argument, NULL, 't'},
	        {"warmup", required_argument, NULL, 'w'},
	        {"requests", required_argument, NULL, 'r'},
	        {"span", required_argument, NULL, 'S'},
	        {"flush", no_argument, NULL, 'f'},
	        {"pid", required_argument, NULL, 'p'},
	        {"sleep", no_argument, NULL, 'z'},
	        {"packed", no_argument, NULL, 'P'},
	        {"no-event-idx", no_argument, NULL, 'E'},
	        {"no-indirect", no_argument, NULL, 'I'},
	        {"json", no_argument, NULL, 'j'},
	        {NULL, 0, NULL, 0},
	};
	struct bench b = {.op = "randread",
	                  .bs = 4096,
	                  .qd = 32,
	                  .queues = 1,
	                  .seconds = 5,
	                  .warmup = 0.2,
	                  .span = UINT64_MAX,
	                  .event_idx = true,
	                  .indirect = true,
	                  .seed = 0x2a2a2a2a1234567ull};
	int opt;

	while ((opt = getopt_long(argc, argv, "", longopts, NULL)) != -1) {
		switch (opt) {
		case 's':
			b.socket = optarg;
			break;
		case 'o':
			b.op = optarg;
			break;
		case 'b':
			b.bs = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'q':
			b.qd = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 'n':
			b.queues = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 't':
			b.seconds = strtod(optarg, NULL);
			break;
		case 'w':
			b.warmup = strtod(optarg, NULL);
			break;
		case 'r':
			b.requests = strtoull(optarg, NULL, 10);
			break;
		case 'S':
			b.span = strtoull(optarg, NULL, 10);
			break;
		case 'p':
			b.pid = (pid_t)strtol(optarg, NULL, 10);
			break;
		case 'z':
			b.sleep = true;
			break;
		case 'f':
			b.flush = true;
			break;
		case 'P':
			b.packed = true;
			break;
		case 'E':
			b.event_idx = false;
			break;
		case 'I':
			b.indirect = false;
			break;
		case 'j':
			b.json = true;
			break;
		default:
			return 2;
		}
	}
	b.write = strstr(b.op, "write");
	b.sequential = strncmp(b.op, "rand", 4) != 0;
	if (b.flush && (b.qd != 1 || b.queues != 1)) {
		fprintf(stderr, "vubench: --flush is for one queue at depth 1\n");
		return 2;
	}
	if (!b.socket || (!b.write && !strstr(b.op, "read")) || b.bs % 512 || b.bs == 0 ||
	    b.qd == 0 || b.qd > 1024 || b.queues == 0 || b.queues > MAX_QUEUES) {
		fprintf(stderr, "usage: vubench --socket PATH [--op randread|randwrite|read|write]"
		                " [--bs BYTES] [--qd N] [--queues N] [--seconds S | --requests N]"
		                " [--sleep] [--packed] [--no-event-idx] [--no-indirect]"
		                " [--span BYTES] [--flush] [--warmup S] [--pid PID] [--json]\n");
		return 2;
	}
	return run(&b);
}
