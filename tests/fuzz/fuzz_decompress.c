/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: compressed clusters of qcow2.  Input: a byte (bit 0: zstd, else deflate; bits 1 to
 * 7: the size of the cluster, 512 << value up to 2 MiB), then the packed bytes.
 *
 * What is checked: no byte beyond the input is read or beyond the cluster written (sanitizer), the
 * answer is 0 or -EIO, and it is the same when other bytes follow in the file.
 */
#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <string.h>

#define BEHIND 64u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	unsigned type = size ? data[0] & 1 : 0;
	size_t cluster = (size_t)512 << (size ? (data[0] >> 1) % 13 : 0);
	size_t bytes = size ? size - 1 : 0;
	uint8_t *in = malloc(bytes ? bytes : 1), *more = malloc(bytes + BEHIND);
	uint8_t *out = calloc(2, cluster);
	uint8_t *exact = malloc(cluster);
	int rc;

	if (!in || !more || !out || !exact)
		abort();
	if (bytes) {
		memcpy(in, data + 1, bytes);
		memcpy(more, data + 1, bytes);
	}
	memset(more + bytes, 0xa5, BEHIND);
	rc = qcow2_decompress(type, in, bytes, exact, cluster);
	if (rc != 0 && rc != -EIO)
		abort();
	if (rc == 0 && (qcow2_decompress(type, more, bytes + BEHIND, out, cluster) != 0 ||
	                memcmp(exact, out, cluster) != 0))
		abort();
	for (size_t i = 0; i < cluster; i++) {
		if (out[cluster + i])
			abort();
	}
	free(exact);
	free(out);
	free(more);
	free(in);
	return 0;
}
