/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Failed flushes that outlive the process that saw them.
 *
 * When the kernel fails to write back buffered data it says so once and forgets.  A process that
 * was told must not be able to die and come back with flushes that succeed, so it leaves a file
 * RUNDIR/flush-failed-DEV-INO-BOOTID (RUNDIR: $OXBOW_RUN_DIR, else /run/oxbow for root, else
 * $XDG_RUNTIME_DIR/oxbow).  After a reboot the page cache is empty and the record means nothing.
 */
#ifndef OX_STORE_RECORD_H
#define OX_STORE_RECORD_H

#include "base/base.h"

/* RUNDIR/KIND-DEV-INO-BOOTID: where a process leaves what the next one on the same file must know.
 * make_dir: the directory is made if it is missing. 0 or -errno (-ENOENT: there is no run
 * directory). */
int ox_record_path(const char *kind, uint64_t dev, uint64_t ino, char *path, size_t size,
                   bool make_dir) OX_MUST_CHECK;

/* Any thread; each answers 0 or -errno (-ENOENT: there is no run directory). */
int ox_record_failed_flush(uint64_t dev, uint64_t ino) OX_MUST_CHECK;
bool ox_record_has_failed_flush(uint64_t dev, uint64_t ino);
void ox_record_forget_failed_flush(uint64_t dev, uint64_t ino);

#endif
