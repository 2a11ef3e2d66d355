/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * See ring.h.
 */
#include "ring.h"
#include "virtio/inflight.h"
#include "virtio/vq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CHECK(x)                 \
	do {                     \
		if (!(x))        \
			abort(); \
	} while (0)

/* Two regions that touch in guest addresses and not here, and one far away. */
#define REGION_BYTES 65536u
#define REGIONS      3u
static const uint64_t region_at[REGIONS] = {0, REGION_BYTES, 0x10000000};

static struct ox_memory *memory;
static struct ox_dirty_log *dirty;
static char *host[REGIONS];
static uint64_t inflight_words[(1u << 20) / 8];

#define OUTSTANDING 64u
struct chain {
	struct ox_vq_chain chain;
	struct iovec iov[OX_VQ_MAX_CHAIN];
	uint64_t guest_addr[OX_VQ_MAX_CHAIN];
};
static struct chain chains[OUTSTANDING];
static unsigned outstanding;

static void set_up_once(void)
{
	struct ox_error err = {0};
	int fd;

	if (memory)
		return;
	ox_memory_install_sigbus();
	memory = ox_memory_new();
	for (unsigned i = 0; i < REGIONS; i++) {
		struct ox_region *region;
		struct ox_memory *larger;

		fd = memfd_create("fuzz", MFD_CLOEXEC);
		CHECK(fd >= 0 && ftruncate(fd, REGION_BYTES) == 0);
		CHECK(ox_region_map(region_at[i], REGION_BYTES, region_at[i], 0, fd, &region,
		                    &err) == 0);
		host[i] = region->host;
		CHECK(ox_memory_with(memory, region, &larger, &err) == 0);
		ox_memory_put(memory);
		memory = larger;
	}
	fd = memfd_create("log", MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, 4096) == 0);
	CHECK(ox_dirty_log_map(fd, 4096, 0, &dirty, &err) == 0);
	close(fd);
}

static bool in_guest_memory(const struct iovec *iov)
{
	uintptr_t at = (uintptr_t)iov->iov_base;

	for (unsigned i = 0; i < REGIONS; i++)
		if (at >= (uintptr_t)host[i] &&
		    ox_range_within(at - (uintptr_t)host[i], iov->iov_len, REGION_BYTES))
			return true;
	return false;
}

static void check_chain(const struct ox_vq_chain *chain, bool with_log)
{
	uint64_t out = 0, in = 0;

	CHECK(chain->out_count + chain->in_count <= chain->capacity);
	for (unsigned i = 0; i < chain->out_count + chain->in_count; i++) {
		const struct iovec *iov = &chain->iov[i];

		CHECK(in_guest_memory(iov));
		if (i < chain->out_count)
			out += iov->iov_len;
		else
			in += iov->iov_len;
		if (with_log && i >= chain->out_count)
			ox_dirty_log_mark(dirty, chain->guest_addr[i], iov->iov_len);
	}
	CHECK(out == chain->out_bytes && in == chain->in_bytes);
}

static struct ox_vq_chain *free_chain(uint8_t choice)
{
	struct chain *c = &chains[outstanding];

	c->chain = (struct ox_vq_chain){.iov = c->iov,
	                                .guest_addr = c->guest_addr,
	                                .capacity = choice & 1 ? OX_VQ_MAX_CHAIN : 8};
	return &c->chain;
}

static void push(struct ox_vq *vq, uint8_t which)
{
	unsigned i = which % outstanding;

	ox_vq_push(vq, &chains[i].chain, which);
	/* The lists' addresses stay with their slots; a push needs the numbers only. */
	chains[i].chain = chains[--outstanding].chain;
}

static void step(struct ox_vq *vq, uint8_t what, uint8_t argument, bool with_log)
{
	struct ox_vq_chain *chain;

	switch (what % 10) {
	case 0:
	case 1:
	case 2:
		if (outstanding == OUTSTANDING)
			break;
		chain = free_chain(argument);
		if (ox_vq_pop(vq, chain) == 1) {
			check_chain(chain, with_log);
			outstanding++;
		}
		break;
	case 3:
	case 4:
		if (outstanding)
			push(vq, argument);
		break;
	case 5:
		ox_vq_flush(vq);
		break;
	case 6:
		(void)ox_vq_should_notify(vq);
		break;
	case 7:
		if (argument & 1)
			(void)ox_vq_enable_notify(vq);
		else
			ox_vq_disable_notify(vq);
		break;
	case 8:
		(void)ox_vq_has_work(vq);
		break;
	case 9: /* the driver changes something: a flag, an index, an address */
		host[0][(size_t)argument * 16 % REGION_BYTES + argument % 16] ^= (char)what;
		break;
	}
	CHECK(outstanding <= vq->config.size || vq->config.packed);
}

/* A life of the queue: what an earlier one left in flight, then the steps. */
static void run(const struct ox_vq_config *config, const uint8_t *steps, unsigned count)
{
	static uint16_t index[OX_VQ_MAX_SIZE];
	struct ox_error err = {0};
	struct ox_vq vq;
	unsigned resumed;

	if (ox_vq_init(&vq, config, &err) < 0) {
		CHECK(err.code);
		return;
	}
	outstanding = 0;
	resumed = ox_vq_resume(&vq, index);
	CHECK(resumed <= config->size);
	for (unsigned i = 0; i < resumed && outstanding < OUTSTANDING; i++) {
		struct ox_vq_chain *chain = free_chain(1);

		if (ox_vq_pop_inflight(&vq, index[i], chain) == 1) {
			check_chain(chain, config->log);
			outstanding++;
		}
	}
	for (unsigned i = 0; i < count; i++)
		step(&vq, steps[2 * i], steps[2 * i + 1], config->log);
	(void)ox_vq_stop(&vq);
	ox_vq_destroy(&vq);
}

void fuzz_ring(const uint8_t *data, size_t size, uint8_t set, uint8_t clear)
{
	struct ox_vq_config config = {0};
	struct ox_inflight inflight;
	struct ring_setup setup;
	const uint8_t *steps;
	uint64_t desc_bytes, driver_bytes, device_bytes, area_bytes;
	unsigned count;

	set_up_once();
	if (size < sizeof(setup) + 1)
		return;
	memcpy(&setup, data, sizeof(setup));
	setup.flags = (uint8_t)((setup.flags | set) & ~clear);
	data += sizeof(setup);
	size -= sizeof(setup);
	count = ox_min((unsigned)data[0], (unsigned)((size - 1) / 2));
	steps = data + 1;
	data += 1 + 2 * count;
	size -= 1 + 2 * count;

	config.packed = setup.flags & RING_PACKED;
	config.event_idx = setup.flags & RING_EVENT_IDX;
	config.indirect = setup.flags & RING_INDIRECT;
	config.size =
	        config.packed ? (uint16_t)(1 + setup.size) : (uint16_t)(1u << (setup.size % 9));
	config.memory = memory;
	config.log = setup.flags & RING_LOG ? dirty : NULL;
	config.avail_index = setup.avail_index;
	config.used_index = setup.used_index;
	/* As the export does it: areas within memory, aligned. */
	desc_bytes = 16ull * config.size;
	driver_bytes = config.packed ? 4 : 6 + 2ull * config.size;
	device_bytes = config.packed ? 4 : 6 + 8ull * config.size;
	config.desc = host[0] + setup.desc_at * 16ull % (REGION_BYTES - desc_bytes) / 16 * 16;
	config.driver = host[0] + setup.driver_at * 16ull % (REGION_BYTES - driver_bytes) / 4 * 4;
	config.device = host[0] + setup.device_at * 16ull % (REGION_BYTES - device_bytes) / 4 * 4;
	config.device_guest_addr = (uint64_t)((char *)config.device - host[0]);
	config.device_event_guest_addr = config.device_guest_addr;

	if (setup.flags & (RING_INFLIGHT | RING_INFLIGHT_GIVEN)) {
		area_bytes = ox_inflight_queue_bytes(config.packed, config.size);
		CHECK(area_bytes <= sizeof(inflight_words));
		memset(inflight_words, 0, area_bytes);
		if (setup.flags & RING_INFLIGHT_GIVEN) {
			size_t given = ox_min((size_t)setup.inflight_bytes, size);

			given = ox_min(given, (size_t)area_bytes);
			memcpy(inflight_words, data, given);
			data += given;
			size -= given;
		}
		ox_inflight_attach(&inflight, inflight_words, config.packed, config.size, NULL);
		config.inflight = &inflight;
	}
	for (unsigned i = 0; i < REGIONS; i++) {
		size_t n = ox_min(size, (size_t)REGION_BYTES);

		memcpy(host[i], data, n);
		/* The rest of the first pages is zero; what lies further is left over. */
		if (n < 8192)
			memset(host[i] + n, 0, 8192 - n);
		data += n;
		size -= n;
	}
	run(&config, steps, count);
	if (config.inflight) {
		/* The process died and starts again: the region tells where to go on. */
		ox_inflight_attach(&inflight, inflight_words, config.packed, config.size, NULL);
		run(&config, steps, count);
	}
}
