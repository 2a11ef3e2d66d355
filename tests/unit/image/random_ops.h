/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The random-operation test's parts: what a scenario is, and how its image is made.
 */
#ifndef RANDOM_OPS_H
#define RANDOM_OPS_H

#include "tests/lib/image_kit.h"

enum base {
	BASE_NONE,
	BASE_RAW,
	BASE_RAW_SHORT, /* ends before the overlay, and not at a cluster */
	BASE_RAW_LONG,  /* goes on behind it */
	BASE_QCOW2,
	BASE_QCOW2_DEFLATE, /* compressed by qemu-img */
	BASE_QCOW2_ZSTD,
	BASE_QED,
};

/* How the image itself comes about. */
enum maker {
	MAKE_EMPTY,
	MAKE_DEFLATE,  /* qemu-img convert -c: every cluster compressed */
	MAKE_ZSTD,     /* the same, zstd */
	MAKE_SNAPSHOT, /* written to, then an internal snapshot is taken by qemu-img */
};

struct scenario {
	const char *name;
	const char *format;
	const char *options; /* -o */
	enum base base;
	enum maker maker;
	bool memory;    /* on a memory store, else a file */
	bool secret;    /* the image is encrypted */
	bool data_file; /* an external data file */
	bool no_unref;  /* discard_no_unref */
	bool no_shrink; /* the format cannot */
	uint64_t cache; /* metadata; 0: the default */
};

/* Files of a scenario are in a folder of their own, made and removed by the caller. */
struct made {
	char path[128], raw[128], base[128];
	const char *why_not; /* skipped, because ... */
};

/* Makes the image; `model` (size bytes) is what it shall hold.  *made->why_not is set if this
 * cannot be had here.  False with *err if it failed. */
bool scenario_make(const struct scenario *scenario, const char *dir, const uint8_t *model,
                   uint64_t size, uint64_t base_size, struct made *made,
                   const struct ox_secrets *secrets, struct ox_error *err);

bool have_qemu(void);
bool write_raw(const char *path, const uint8_t *bytes, uint64_t size);

#endif
