/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The one place where a path becomes a descriptor, so that a sandboxed server can later ask
 * another process for it.
 */
#ifndef OX_BASE_OPENER_H
#define OX_BASE_OPENER_H

#include <sys/types.h>

struct ox_opener {
	/* As open(2), with O_CLOEXEC added; a descriptor or -errno.  May block. */
	int (*open)(struct ox_opener *opener, const char *path, int flags, mode_t mode);
};

/* Opens in this process. */
extern struct ox_opener ox_opener_direct;

static inline int ox_open(struct ox_opener *opener, const char *path, int flags, mode_t mode)
{
	return opener->open(opener, path, flags, mode);
}

#endif
