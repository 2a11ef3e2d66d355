/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The settings that users name, and their words.
 */
#ifndef OXBOW_TYPES_H
#define OXBOW_TYPES_H

#include <stdbool.h>
#include <stdint.h>

/* What the guest may rely on: docs/architecture.md, section 5. */
enum ox_cache {
	OX_CACHE_NONE,         /* O_DIRECT; volatile write cache; flush makes durable */
	OX_CACHE_WRITEBACK,    /* page cache; volatile write cache; flush makes durable */
	OX_CACHE_WRITETHROUGH, /* page cache for reads; a completed write is durable */
	OX_CACHE_DIRECTSYNC,   /* O_DIRECT; a completed write is durable */
	OX_CACHE_UNSAFE,       /* page cache; flush is ignored */
};

/* How requests reach the kernel. */
enum ox_aio {
	OX_AIO_AUTO,
	OX_AIO_SYNC,
	OX_AIO_THREADS,
	OX_AIO_NATIVE, /* libaio */
	OX_AIO_IO_URING,
};

enum ox_discard { OX_DISCARD_UNMAP, OX_DISCARD_IGNORE };
enum ox_detect_zeroes { OX_DETECT_ZEROES_OFF, OX_DETECT_ZEROES_ON, OX_DETECT_ZEROES_UNMAP };

/* What happens to a guest's request that the host failed.  ENOSPC: stop on ENOSPC, report
 * everything else (QEMU's default for writes; its default for reads is REPORT). */
enum ox_on_error {
	OX_ON_ERROR_REPORT,
	OX_ON_ERROR_IGNORE,
	OX_ON_ERROR_STOP,
	OX_ON_ERROR_ENOSPC,
};

enum ox_preallocation { OX_PREALLOC_OFF, OX_PREALLOC_FALLOC, OX_PREALLOC_FULL };

/* The word for a value, as the command line spells it; never NULL for a valid value. */
const char *ox_cache_name(enum ox_cache cache);
const char *ox_aio_name(enum ox_aio aio);
const char *ox_on_error_name(enum ox_on_error policy);
const char *ox_discard_name(enum ox_discard discard);
const char *ox_detect_zeroes_name(enum ox_detect_zeroes detect);
const char *ox_preallocation_name(enum ox_preallocation prealloc);

/* The value of a word; false if there is no such word (*out is left alone). */
bool ox_cache_parse(const char *word, enum ox_cache *out);
bool ox_aio_parse(const char *word, enum ox_aio *out);
bool ox_on_error_parse(const char *word, enum ox_on_error *out);
bool ox_discard_parse(const char *word, enum ox_discard *out);
bool ox_detect_zeroes_parse(const char *word, enum ox_detect_zeroes *out);
bool ox_preallocation_parse(const char *word, enum ox_preallocation *out);

/* O_DIRECT?  A flush does something?  A completed write must be durable? */
static inline bool ox_cache_is_direct(enum ox_cache cache)
{
	return cache == OX_CACHE_NONE || cache == OX_CACHE_DIRECTSYNC;
}
static inline bool ox_cache_is_writethrough(enum ox_cache cache)
{
	return cache == OX_CACHE_WRITETHROUGH || cache == OX_CACHE_DIRECTSYNC;
}

#endif
