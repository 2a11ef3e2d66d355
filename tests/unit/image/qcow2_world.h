/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The allocator of qcow2 without the rest of the driver: an image made of bytes, a map in an array,
 * and doubles of what the allocator calls above it.  Commits are the real ones.
 */
#ifndef OX_TESTS_QCOW2_WORLD_H
#define OX_TESTS_QCOW2_WORLD_H

#include "image/qcow2/alloc.h"
#include "store/faulty.h"
#include <stdio.h>

/* What a fiber finds wrong ends the program: cmocka's way out is a jump to another stack. */
#define must(condition)                                                                  \
	((condition) ? (void)0                                                           \
	             : (printf("Bail out! %s:%d: %s\n", __FILE__, __LINE__, #condition), \
	                fflush(stdout), abort()))
#define must_be(a, b)                                                                             \
	do {                                                                                      \
		long long a_ = (long long)(a), b_ = (long long)(b);                               \
		if (a_ != b_) {                                                                   \
			printf("Bail out! %s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #a, \
			       a_, b_);                                                           \
			fflush(stdout);                                                           \
			abort();                                                                  \
		}                                                                                 \
	} while (0)

struct world {
	struct ox_store *store;
	struct ox_image image;
	struct qcow2 q;
	struct ox_loop *loop;
	struct ox_image_channel channel;
	/* The guest's map: host offsets, 0: none. */
	uint64_t *map, map_clusters;
	uint64_t *tables; /* of L1 */
	/* What the doubles do. */
	bool hold_grace;  /* grace periods do not end (atomic) */
	unsigned graces;  /* that began (atomic) */
	unsigned corrupt; /* calls of qcow2_corrupt_co() (atomic) */
};

struct shape {
	unsigned cluster_bits, refcount_order;
	uint64_t disk; /* bytes */
};

/* Writes a new, empty image into the store named; it exists and is large enough, or can grow. */
void world_make(const char *name, const struct shape *shape);
/* Opens it; `err` NULL: fails the test if that fails. */
int world_open(struct world *w, const char *name, struct ox_error *err);
int world_open_options(struct world *w, const char *name, const struct ox_image_options *options,
                       struct ox_error *err);
/* Without finishing. */
void world_close(struct world *w);

void world_attach(struct world *w, struct ox_image_channel *channel, struct ox_loop *loop);
void world_detach_co(struct ox_image_channel *channel);

/* For fibers: a cluster (one of up to `want`), or -errno; more_co as often as it takes. */
int world_take_co(struct ox_image_channel *channel, unsigned want, uint64_t *host, unsigned *got,
                  bool *zeroed);
int world_take_table_co(struct ox_image_channel *channel, uint64_t *host);
/* Guest cluster `index` gets a new place, the old one is freed. */
int world_map_co(struct ox_image_channel *channel, uint64_t index);
/* It loses its place. */
void world_unmap(struct ox_image_channel *channel, uint64_t index);
/* The map to the file, as L1 and L2 tables; durable. */
int world_write_map_co(struct world *w);
/* Commits, finishes, commits, cuts the file. */
int world_finish_co(struct world *w);

/* The refcount of a cluster by the bytes of an image in memory; structures that make no sense: -1.
 */
int64_t world_count(const uint8_t *image, size_t bytes, uint64_t cluster);

/* Runs fn_co(w) in a fiber of w->loop. */
void world_run(struct world *w, void (*fn_co)(void *arg), void *arg);

/* "qemu-img check" of a file: 0 clean; -1 there is no qemu-img; else what it exits with. */
int world_check(const char *path);
/* A name for a file in a directory of the test's own, which goes at exit. */
const char *world_path(const char *name);

#endif
