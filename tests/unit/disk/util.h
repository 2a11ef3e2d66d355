/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * For tests of the disk: a disk over a memory store whose table is replaced by one that writes
 * down what reaches it, fails it, or keeps it waiting.
 *
 * Everything runs on one loop, the tests' bodies in a fiber of it, so nothing here is locked.
 */
#ifndef TEST_DISK_UTIL_H
#define TEST_DISK_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <errno.h>
#include <cmocka.h>

#include "base/fiber.h"
#include "base/iov.h"
#include "disk/disk_private.h"
#include "store/memory.h"

#define MIB (UINT64_C(1) << 20)

struct record {
	uint8_t op, flags;
	uint64_t offset, length;
};

struct spy {
	struct ox_store *store;
	const struct ox_store_ops *real;
	struct ox_store_ops ops;
	struct record log[256];
	unsigned count;
	int fail[OX_IO_SECURE_ERASE + 1]; /* errno that the next fail_times of an op get */
	unsigned fail_times[OX_IO_SECURE_ERASE + 1];
	bool park; /* keep what comes */
	struct ox_io *parked[64];
	unsigned parked_count;
};
extern struct spy spy;

struct fixture {
	struct ox_loop *loop;
	struct ox_loop *loops[1];
	struct ox_disk_options options;
	struct ox_disk *disk;
	struct ox_disk_queue *queue;
};

/* A test's body in a fiber on a new loop, with options that it may have changed before. */
void fixture_run(void (*body_co)(struct fixture *f), void (*change)(struct ox_disk_options *o));
void fixture_activate_co(struct fixture *f);
void fixture_deactivate_co(struct fixture *f);

struct call {
	struct ox_request request;
	struct iovec iov;
	struct ox_fiber *waiter;
	bool done;
};
void call_start(struct fixture *f, struct call *call, uint8_t op, uint64_t offset, void *buf,
                uint64_t length);
void call_start_flags(struct fixture *f, struct call *call, uint8_t op, uint8_t flags,
                      uint64_t offset, void *buf, uint64_t length);
/* Suspends until it is done; its result. */
int call_wait_co(struct call *call);
int run_co(struct fixture *f, uint8_t op, uint64_t offset, void *buf, uint64_t length);

/* Puts the spy over a disk's store, while nothing is in flight. */
void spy_install(struct fixture *f);
void spy_clear(void);
/* Lets go what is parked, in order; the spy parks no more. */
void spy_release(void);
unsigned spy_count(uint8_t op);

#endif
