/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A format for tests of the generic layer: its map is an array, and a test sets what it answers,
 * delays and fails.  The space that it gives out holds garbage, and so does what it frees, after a
 * grace period: a byte that was not filled, or was read too late, shows.
 */
#ifndef MAP_FORMAT_H
#define MAP_FORMAT_H

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/fiber.h"
#include "base/iov.h"
#include "image/generic.h"

#define UNIT        1024u /* what an entry of the map is for, and zero_unit */
#define GARBAGE     0xaa
#define SCRIBBLE    0xdd
#define MAP_THREADS 3u
#define ZERO_SPACE  (8u << 20) /* where the store's zeroes begin */

/* One entry, atomic: kind, flags, and where. */
#define ENTRY(kind, flags, offset) ((uint64_t)(offset) << 8 | (uint64_t)(flags) << 4 | (kind))
#define ENTRY_KIND(entry)          ((uint8_t)((entry)&0xf))
#define ENTRY_FLAGS(entry)         ((uint8_t)((entry) >> 4 & 0xf))
#define ENTRY_OFFSET(entry)        ((entry) >> 8)

#define LOG_BYTES 4096u

struct map_format {
	struct ox_image *image;
	struct ox_format_ops ops;
	struct ox_store_ops store_ops;
	const struct ox_store_ops *real_store;
	pthread_mutex_t lock;
	uint64_t cluster, units;
	uint64_t *entry;          /* by unit */
	bool *missing;            /* lookup does not know; map_co does */
	uint64_t next, next_zero; /* space not given out yet: garbage below, zeroes above */
	uint32_t unpacked_bytes;  /* of a compressed unit */

	/* What a test wants. */
	bool zeroed;       /* space that is given out reads as zero */
	bool can_allocate; /* ops->allocate works */
	bool scribble;     /* freed space is overwritten after a grace period */
	int prepare_rc, publish_rc, begin_rc, commit_rc, write_rc; /* once, then 0 again */
	uint64_t begin_ns;                                         /* begin_co takes that long */

	/* What happened. */
	char log[LOG_BYTES]; /* a word for each event, while `logging` */
	bool logging;
	unsigned begins, commits, maps, reads, writes, flushes, unpacks;
	uint64_t write_bytes;
	uint8_t write_flags;
	struct ox_fiber *write_fiber; /* of the last write to the store */
};

struct map_test {
	const char *store; /* default: memory:16M; of 16 MiB in any case */
	uint64_t size;     /* of the disk; default 256 KiB */
	uint64_t cluster;  /* default 4096 */
	uint64_t backing;  /* bytes of a backing image of the same format; 0: none */
	bool read_only;
	unsigned threads; /* besides the main one */
	void (*fn_co)(void);
};

/* What a test works with. */
struct map_fixture {
	struct ox_loop *loop;
	struct map_format top, below;
	struct ox_image_channel *channel[1 + MAP_THREADS]; /* [0]: the main loop's */
	struct ox_loop *loops[1 + MAP_THREADS];
	struct ox_iothread *thread[1 + MAP_THREADS];
	unsigned channels;
	const struct map_test *test;
};
extern struct map_fixture fixture;

/* Opens, attaches, runs fn_co in a fiber of the main loop, and takes all down. */
void map_run(const struct map_test *test);
/* Puts `value` into the map from `offset` on: DATA, in place unless `shared`. */
void map_set_data(struct map_format *map, uint64_t offset, uint64_t length, uint8_t value,
                  bool shared);
void map_set(struct map_format *map, uint64_t offset, uint64_t length, uint8_t kind);
/* A unit of `bytes` that unpacks to value, value + 1, ... by 512 bytes. */
void map_set_compressed(struct map_format *map, uint64_t offset, uint32_t bytes, uint8_t value);

void map_log_start(struct map_format *map);
void assert_log(const struct map_format *map, const char *events);
/* Every byte is `value`. */
void assert_bytes(const uint8_t *buf, size_t bytes, uint8_t value);

/* A request on a channel; suspends. */
int submit_co(unsigned channel, uint8_t op, uint64_t offset, const struct iovec *iov,
              unsigned count, uint64_t length, unsigned flags);
int op_co(uint8_t op, uint64_t offset, void *buf, uint64_t length, unsigned flags);

#endif
