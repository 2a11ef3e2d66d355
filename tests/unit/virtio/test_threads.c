/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Driver and device on two threads, each sleeping whenever it has nothing to do: no chain and no
 * notification gets lost.  A lost one leaves both asleep; the poll's limit only turns that hang
 * into a failure.
 */
#include "model.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define PATIENCE_MS 60000

struct pair {
	struct model model;
	struct ox_vq vq;
	int kick, call;
	uint64_t total;
};

static void signal_fd(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) != sizeof(one))
		abort();
}

static bool wait_fd(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
	uint64_t value;

	return poll(&poll_fd, 1, PATIENCE_MS) == 1 &&
	       read(fd, &value, sizeof(value)) == sizeof(value);
}

/* Answers a text on failure: asserts belong to the main thread. */
static void *device(void *arg)
{
	static char lost[] = "the driver's notification was lost";
	struct pair *pair = arg;
	uint64_t done = 0;

	while (done < pair->total) {
		struct iovec iov[64];
		struct ox_vq_chain chain = {.iov = iov, .capacity = 64};
		unsigned batch = 0;
		int rc;

		while (batch < 16 && (rc = ox_vq_pop(&pair->vq, &chain)) != 0) {
			if (rc < 0)
				return pair->vq.error;
			pair->model.chain[chain.head].taken = true;
			ox_vq_push(&pair->vq, &chain,
			           model_written(&pair->model.chain[chain.head]));
			batch++;
		}
		done += batch;
		if (batch) {
			if (ox_vq_should_notify(&pair->vq))
				signal_fd(pair->call);
			continue;
		}
		if (ox_vq_enable_notify(&pair->vq)) {
			ox_vq_disable_notify(&pair->vq);
			continue;
		}
		if (!wait_fd(pair->kick))
			return lost;
		ox_vq_disable_notify(&pair->vq);
	}
	return NULL;
}

static void run(bool packed, bool event_idx, uint16_t size)
{
	static struct pair pair;
	struct ox_vq_config config;
	pthread_t thread;
	void *failure;

	memset(&pair, 0, sizeof(pair));
	model_init(&pair.model, packed, size, event_idx, 77 + packed * 2 + event_idx);
	config = model_config(&pair.model);
	assert_int_equal(ox_vq_init(&pair.vq, &config, NULL), 0);
	pair.kick = eventfd(0, EFD_CLOEXEC);
	pair.call = eventfd(0, EFD_CLOEXEC);
	pair.total = 60000;
	pthread_create(&thread, NULL, device, &pair);
	while (pair.model.reaped < pair.total) {
		bool kick = false, more = false;
		unsigned wanted = 1 + (unsigned)model_random(&pair.model, 4);

		while (wanted-- && pair.model.offered < pair.total &&
		       model_offer(&pair.model, &kick)) {
			more = true;
			if (kick)
				signal_fd(pair.kick);
		}
		if (model_reap(&pair.model) || (more && model_random(&pair.model, 3)))
			continue;
		model_sleep(&pair.model);
		if (pair.model.asleep && !wait_fd(pair.call))
			break;
		model_wake(&pair.model);
	}
	signal_fd(pair.kick);
	pthread_join(thread, &failure);
	if (failure)
		fail_msg("%s", (char *)failure);
	assert_int_equal(pair.model.reaped, pair.total);
	ox_vq_destroy(&pair.vq);
	close(pair.kick);
	close(pair.call);
	model_free(&pair.model);
}

static void test_split(void **state)
{
	run(false, false, 16);
	run(false, true, 16);
	run(false, true, 256);
}

static void test_packed(void **state)
{
	run(true, false, 16);
	run(true, true, 11);
	run(true, true, 256);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_split),
	        cmocka_unit_test(test_packed),
	};

	return cmocka_run_group_tests_name("threads", tests, NULL, NULL);
}
