/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A vhost-user-blk export in this process: the main loop and two I/O loops on threads of their
 * own, the front end library on the test's.  A spy between image and store can park requests or
 * fail them.
 */
#ifndef OX_TESTS_EXPORT_DEVICE_H
#define OX_TESTS_EXPORT_DEVICE_H

#include "export/export.h"
#include "tests/lib/frontend.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define DEVICE_SIZE (16u << 20)

struct device {
	struct ox_iothread *main, *io[2];
	struct ox_loop *loops[2];
	struct ox_disk *disk;
	struct ox_export *export;
	char directory[64], socket[96];
	bool ended;
};

/* Everything; options beyond the defaults may be set by `adjust` (may be NULL). */
void device_up(struct device *d, void (*adjust)(struct ox_disk_options *options));
void device_down(struct device *d);
/* Runs fn(arg) in a fiber of the main loop. */
void device_call(struct device *d, void (*fn_co)(void *arg), void *arg);
struct ox_export_info device_info(struct device *d);
struct ox_disk_info device_disk_info(struct device *d);
/* Waits until the export has no client. */
void device_wait_idle(struct device *d);

/* A front end that has started; `adjust` may change its options. */
struct fe *device_front_end(struct device *d, void (*adjust)(struct fe_options *options));
void fe_ok(struct fe *fe, int rc);

/* --- the spy (the disk is active, nothing is in flight) --- */

void spy_install(struct device *d);
/* From now on, requests of this kind stay in the store. */
void spy_park(bool on);
/* Waits until so many are parked. */
void spy_wait_parked(unsigned count);
/* Lets them go on, each on its own loop. */
void spy_release(void);
/* Writes fail with this errno; 0: they do not. */
void spy_fail_writes(int code);
unsigned spy_writes(void);

#endif
