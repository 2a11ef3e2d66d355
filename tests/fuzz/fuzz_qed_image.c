/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a whole qed image.  Input: the file.
 */
#include "image.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	fuzz_image("qed", data, size);
	return 0;
}
