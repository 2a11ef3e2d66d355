/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: an inflight region of any content, for both ring kinds; see ring.h.
 */
#include "ring.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	fuzz_ring(data, size, RING_INFLIGHT_GIVEN, 0);
	return 0;
}
