/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the store's tests run on: files and loop devices in a directory of their own, on a file
 * system that knows O_DIRECT ($OXBOW_TEST_DIR, else /var/tmp).
 */
#ifndef OX_TESTS_STORE_TARGETS_H
#define OX_TESTS_STORE_TARGETS_H

#include <stdint.h>

enum target_kind { TARGET_FILE, TARGET_LOOP_512, TARGET_LOOP_4096 };

struct target {
	char path[256]; /* what to open */
	char file[256]; /* the file behind it */
	int loop_fd;    /* keeps the loop device while >= 0 */
};

/* Makes the directory; ends the process if that is not possible. */
void targets_begin(void);
void targets_end(void);
const char *targets_dir(void);
/* 0; or 1 with the reason why this kind cannot be had here. */
int target_make(struct target *target, enum target_kind kind, uint64_t size, const char **why);
/* A loop device over a file that is there; 0, or 1 if there are no loop devices. */
int target_loop_over(struct target *target, const char *file, uint32_t sector);
void target_drop(struct target *target);

#endif
