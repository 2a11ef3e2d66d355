/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a qcow2 bitmap directory.  Input: the number of bitmaps (two bytes), the directory.
 */
#include "image/qcow2/qcow2.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ox_error err = {0};
	struct qcow2 q = {0};
	uint8_t *exact;

	if (size < 2)
		return 0;
	q.header.bitmap_count = (uint32_t)data[0] | (uint32_t)data[1] << 8;
	exact = malloc(size - 2 + !(size - 2));
	if (!exact)
		abort();
	memcpy(exact, data + 2, size - 2);
	if (qcow2_bitmaps_parse(exact, size - 2, q.header.bitmap_count, "disk.qcow2", &q.bitmaps,
	                        &err) == 0) {
		for (uint32_t i = 0; i < q.header.bitmap_count; i++) {
			if (!q.bitmaps[i].name || q.bitmaps[i].entry_offset > size - 2)
				abort();
		}
		qcow2_free_bitmaps(&q);
	} else if (err.code <= 0) {
		abort();
	}
	free(exact);
	return 0;
}
