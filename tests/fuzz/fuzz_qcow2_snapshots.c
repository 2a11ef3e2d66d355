/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a qcow2 snapshot table.  Input: log2 of the cluster size, the number of snapshots
 * (two bytes), the table.
 */
#include "image/qcow2/qcow2.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ox_error err = {0};
	struct qcow2 q = {0};
	size_t used = 0;
	uint8_t *exact;

	if (size < 3)
		return 0;
	q.header.snapshot_count = (uint32_t)data[1] | (uint32_t)data[2] << 8;
	exact = malloc(size - 3 + !(size - 3));
	if (!exact)
		abort();
	memcpy(exact, data + 3, size - 3);
	if (qcow2_snapshots_parse(exact, size - 3, q.header.snapshot_count,
	                          1u << (9 + data[0] % 13), "disk.qcow2", &q.snapshots, &used,
	                          &err) == 0) {
		if (used > size - 3)
			abort();
		for (uint32_t i = 0; i < q.header.snapshot_count; i++) {
			if (!q.snapshots[i].id || !q.snapshots[i].name ||
			    q.snapshots[i].entry_offset > size - 3)
				abort();
		}
		qcow2_free_snapshots(&q);
	} else if (err.code <= 0) {
		abort();
	}
	free(exact);
	return 0;
}
