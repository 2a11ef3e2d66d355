/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * For tests of images: an image on several I/O threads, and fibers on them.
 *
 * The functions are for a thread that runs no loop (a test's main()); they block.
 */
#ifndef IMAGE_KIT_H
#define IMAGE_KIT_H

#include "image/image.h"

#define KIT_THREADS 16u

struct kit {
	unsigned threads;
	struct ox_iothread *thread[KIT_THREADS];
	struct ox_image *image; /* NULL: none is open */
	struct ox_image_channel *channel[KIT_THREADS];
};

/* Ends the process when a thread cannot be had. */
void kit_start(struct kit *kit, unsigned threads);
void kit_stop(struct kit *kit); /* no image is open */

/* Opens and attaches to every thread. */
int kit_open(struct kit *kit, const char *path, const struct ox_image_options *options,
             struct ox_error *err) OX_MUST_CHECK;
/* `finish`: leaves it clean (ox_image_finish_co), else as it is; what finishing answered. */
int kit_close(struct kit *kit, bool finish) OX_MUST_CHECK;

/* One piece of work: fn_co runs in a fiber of `thread`. */
struct kit_work {
	unsigned thread;
	void (*fn_co)(struct ox_image_channel *channel, void *arg);
	void *arg;
};
/* Starts all at once, as far as the threads go, and returns when all have ended. */
void kit_run(struct kit *kit, const struct kit_work *work, unsigned count);

/* A request with a list of several entries, cut at `cut` bytes if that is inside. Suspends. */
int kit_request_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset, void *buf,
                   size_t bytes, size_t cut, unsigned flags);

/* xorshift; *seed is not 0.  [0, below). */
uint64_t kit_random(uint64_t *seed, uint64_t below);

/* Makes a new folder for a test's files, in memory where that is possible: what is tested does not
 * depend on a device, and its syncs take no time.  OXBOW_TEST_DIR says where else. */
bool kit_make_dir(char *path, size_t size, const char *name);

/* Runs a program with stdout and stderr to a file; its exit status, or -1.  argv ends with NULL.
 * What it said is left in `output` (at most size - 1 bytes), which may be NULL. */
int kit_spawn(const char *const *argv, char *output, size_t size);

#endif
