/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Image locks as QEMU takes them (its block/file-posix.c), so that neither program opens an
 * image the other writes.
 */
#ifndef OX_STORE_LOCK_H
#define OX_STORE_LOCK_H

#include "store/store.h"

/* Takes, on an open descriptor, what `mode` needs beyond `held`, checks that nobody else's lock
 * is against it, then drops what `held` had beyond `mode`.  Retries a conflict for timeout_ns
 * (sleeps).  When it fails, `held` is what stays.  `name` is for the message. */
int ox_lock_change(int fd, enum ox_lock_mode held, enum ox_lock_mode mode, uint64_t timeout_ns,
                   const char *name, struct ox_error *err) OX_MUST_CHECK;

/* Who holds a lock on a file (st_dev, st_ino) or a device (st_rdev, 0)?  The process's number,
 * and in text "qemu-system-x86 (pid 4711)"; 0 if nobody does or /proc does not tell. */
int ox_lock_find_holder(uint64_t dev, uint64_t ino, char *text, size_t size);

#endif
