/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: which format do these first bytes belong to?  Input: the bytes.
 *
 * What is checked: a first sector that is not called dangerous does not turn a raw image into
 * another format, whatever stands behind it.
 */
#include "image/image.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *exact = malloc(size ? size : 1);
	const char *name;

	if (!exact)
		abort();
	if (size)
		memcpy(exact, data, size);
	name = ox_image_guess_format(exact, size, "disk.img");
	if (!name)
		abort();
	if (size >= 512 && !ox_image_first_sector_is_dangerous(exact, 512)) {
		/* Only the sector differs between a disk of zeroes and one that a guest wrote. */
		memset(exact + 512, 0, size - 512);
		if (strcmp(ox_image_guess_format(exact, size, "disk.img"), "raw"))
			abort();
	}
	free(exact);
	return 0;
}
