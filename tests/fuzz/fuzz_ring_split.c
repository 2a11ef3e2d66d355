/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: the device's side of a split ring; see ring.h.
 */
#include "ring.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	fuzz_ring(data, size, 0, RING_PACKED | RING_INFLIGHT_GIVEN);
	return 0;
}
