/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the vhost-user tests share: a back end as a child in a directory of its own, a front end
 * connected to it, and a model disk that random I/O is compared with.
 *
 * $OXBOW names the program.  The tests run in a fresh directory below the current one (sockets
 * have short relative names) and remove it at the end.
 */
#ifndef OX_TESTS_INTEROP_VHOST_USER_H
#define OX_TESTS_INTEROP_VHOST_USER_H

#include "tests/lib/daemon.h"
#include "tests/lib/frontend.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define MIB 1048576ull

/* The file names in the directory. */
#define VU_SOCK    "disk.sock"
#define VU_SOCK2   "disk2.sock"
#define VU_CONTROL "control.sock"
#define VU_IMAGE   "disk.raw"
#define VU_IMAGE2  "disk2.raw"
#define VU_LOG     "daemon.log"

/* Group fixtures: the directory.  State is not used. */
int vu_enter_directory(void **state);
int vu_leave_directory(void **state);

/* Makes an image of zeroes, replacing what was there. */
void vu_make_image(const char *name, uint64_t bytes);
void vu_read_image(const char *name, uint64_t offset, void *buf, size_t bytes);
bool vu_have_program(const char *name);

/* `oxbow serve --vhost-user-blk VU_SOCK --control VU_CONTROL EXTRA... VU_IMAGE`; EXTRA ends with
 * NULL, and "image=NAME" in it replaces the image, "-" alone drops --control. Fails the test if
 * it does not start. */
void vu_serve(struct daemon *daemon, ...) __attribute__((sentinel));
/* qemu-storage-daemon over the same image and socket, `queues` queues. */
void vu_serve_qemu(struct daemon *daemon, unsigned queues);
/* SIGTERM; the exit status must be 0. */
void vu_end(struct daemon *daemon);

/* Teardown of a test: kills the children that a failed one left. */
int vu_kill_strays(void **state);

/* A started front end, or a failed test. */
struct fe *vu_front_end(const struct fe_options *options);
/* Asserts that a front end's call succeeded and prints its error otherwise. */
#define vu_check(fe, call)                                                        \
	do {                                                                      \
		int vu_rc_ = (call);                                              \
		if (vu_rc_ < 0)                                                   \
			print_error("%s: %d (%s)\n", #call, vu_rc_, (fe)->error); \
		assert_true(vu_rc_ >= 0);                                         \
	} while (0)

/* --- the model ------------------------------------------------------------------------------- */

struct model_op {
	bool busy;
	uint32_t type;
	uint64_t offset, length;
	struct fe_buf seg[8];
	unsigned segs;
};

struct model {
	struct fe *fe;
	uint64_t size; /* bytes of the disk that it uses */
	uint32_t unit; /* requests are multiples of this */
	uint32_t max_io;
	unsigned qd;         /* of each queue */
	bool ranges;         /* discard and write-zeroes too */
	uint8_t *bytes;      /* what the disk should hold */
	uint8_t *state;      /* of each 512-byte sector: MODEL_* */
	struct model_op *op; /* queue * queue_size + slot */
	uint64_t rng;
	uint64_t submitted, completed;
	char error[200];
};
#define MODEL_BUSY    1u /* a request in flight covers it */
#define MODEL_UNKNOWN 2u /* discarded: any content */

/* The disk holds zeroes.  Needs max_io * queue_size * queues bytes of data memory. */
void model_init(struct model *m, struct fe *fe, uint64_t size, uint64_t seed);
void model_free(struct model *m);
/* Fills the queues once and takes what completed; the number taken, or -EIO (m->error). */
int model_step(struct model *m);
/* `count` more completions, then until nothing is in flight.  Fails the test on any error. */
void model_run(struct model *m, uint64_t count);
void model_drain(struct model *m);
/* Reads the whole disk and compares. */
void model_verify(struct model *m);
uint64_t model_random(struct model *m, uint64_t below);

#endif
