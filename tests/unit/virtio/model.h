/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A driver for tests: it owns a piece of guest memory, fills a split or packed ring with random
 * chains, reaps used elements, and remembers what it offered.  It checks all that a driver can
 * see with cmocka's asserts.
 */
#ifndef TESTS_VIRTIO_MODEL_H
#define TESTS_VIRTIO_MODEL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "virtio/inflight.h"
#include "virtio/vq.h"
#include "virtio/vring.h"

#define MODEL_USER_BASE 0x7f0000000000ull
#define MODEL_MIB       0x100000ull
/* Guest-physical layout: two regions that touch, apart in our address space, and one far away. */
#define MODEL_FAR     0x100000000ull
#define MODEL_RINGS   0x0ull /* descriptors, driver area, device area, a third of 64 KiB each */
#define MODEL_DRIVER  0x10000ull
#define MODEL_DEVICE  0x20000ull
#define MODEL_TABLES  0xf0000ull /* indirect tables, over the border of the two regions */
#define MODEL_BUFFERS 16

struct model_buffer {
	uint64_t addr;
	uint32_t len;
	bool in;
};

struct model_chain {
	bool outstanding; /* offered and not reaped */
	bool taken;       /* the device has it (the test's device sets it) */
	uint16_t slots;
	unsigned count;
	uint64_t serial; /* order of being offered */
	struct model_buffer buffer[MODEL_BUFFERS];
};

struct model {
	struct ox_memory *memory;
	int fd;
	bool packed, event_idx, plain; /* plain: aligned buffers in one region only */
	uint16_t size;
	uint64_t rng, serial;
	uint16_t next_avail, next_used; /* split: free running; packed: slots */
	bool avail_wrap, used_wrap;
	uint16_t free_slots;
	uint16_t free_id[OX_VQ_MAX_SIZE]; /* stack: split descriptors, packed ids */
	uint16_t free_count;
	struct model_chain *chain; /* by head or id */
	uint64_t offered, reaped;
	uint16_t kick_event_seen; /* avail index when it last looked whether to kick (split) */
	bool asleep;              /* wants a notification */
};

void model_init(struct model *model, bool packed, uint16_t size, bool event_idx, uint64_t seed);
void model_free(struct model *model);
uint64_t model_random(struct model *model, uint64_t below);
void *model_host(struct model *model, uint64_t addr);
void model_write(struct model *model, uint64_t addr, const void *bytes, size_t count);
struct ox_vq_config model_config(struct model *model);

/* Offers a random chain; false: no room.  *kick: the driver would notify the device. */
bool model_offer(struct model *model, bool *kick);
/* Takes what is used; checks ids and lengths.  How many. */
unsigned model_reap(struct model *model);
bool model_has_used(struct model *model);
/* Asks for a notification / for none. */
void model_sleep(struct model *model);
void model_wake(struct model *model);
/* What the device must say it wrote into a chain. */
uint32_t model_written(const struct model_chain *chain);
/* Compares what the device got with what was offered. */
void model_check_chain(struct model *model, const struct ox_vq_chain *chain);

/* For hand-made cases: a raw descriptor, and making a head available. */
void model_split_desc(struct model *model, uint64_t table, uint16_t i, uint64_t addr, uint32_t len,
                      uint16_t flags, uint16_t next);
void model_split_avail(struct model *model, uint16_t head);
void model_packed_desc(struct model *model, uint64_t table, uint16_t i, uint64_t addr, uint32_t len,
                       uint16_t id, uint16_t flags);

#endif
