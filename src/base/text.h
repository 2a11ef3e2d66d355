/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Numbers as people write them.
 */
#ifndef OX_BASE_TEXT_H
#define OX_BASE_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* "10G" -> 10 * 2^30.  Suffixes b k K M G T P E (1024 based) as qemu-img takes them, and
 * fractions ("1.5G").  `unit` multiplies a number without a suffix (1 for bytes).
 * False: not a number, negative, something behind it, or more than INT64_MAX. */
bool ox_parse_size(const char *text, uint64_t unit, uint64_t *out);

/* A whole decimal number within [min, max]. */
bool ox_parse_uint(const char *text, uint64_t min, uint64_t max, uint64_t *out);

/* "10 GiB", "1.5 MiB", "512 B", with up to three significant digits as qemu-img prints
 * sizes.  Returns buf. */
char *ox_format_size(uint64_t bytes, char *buf, size_t size);

/* The candidate nearest to `word` by edit distance, NULL when none is near: for "did you
 * mean".  `candidates` ends with NULL. */
const char *ox_nearest_word(const char *word, const char *const *candidates);

#endif
