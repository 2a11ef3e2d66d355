/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzzing of whole images: see image.c.
 */
#ifndef FUZZ_IMAGE_H
#define FUZZ_IMAGE_H

#include <stddef.h>
#include <stdint.h>

/* Input: the file. */
void fuzz_image(const char *format, const uint8_t *data, size_t size);

#endif
