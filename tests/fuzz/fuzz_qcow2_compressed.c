/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a compressed cluster.  Input: the method, log2 of the cluster size, the bytes.
 */
#include "image/qcow2/qcow2.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *exact, *out;
	size_t bytes;

	if (size < 2)
		return 0;
	bytes = (size_t)1 << (9 + data[1] % 8);
	exact = malloc(size - 2 + !(size - 2));
	out = malloc(bytes); /* in a block of its own: every access beyond it is seen */
	if (!exact || !out)
		abort();
	memcpy(exact, data + 2, size - 2);
	(void)!qcow2_decompress(data[0] % 3, exact, size - 2, out, bytes);
	free(exact);
	free(out);
	return 0;
}
