/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a LUKS header.  Input: the room that it may take (four bytes, sectors), the header.
 */
#include "base/byteorder.h"
#include "image/crypto.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ox_error err = {0};
	struct ox_luks luks;
	uint64_t area;
	uint8_t *exact;

	if (size < 4)
		return 0;
	area = (uint64_t)ox_get_le32(data) * 512;
	exact = malloc(size - 4 + !(size - 4));
	if (!exact)
		abort();
	memcpy(exact, data + 4, size - 4);
	if (ox_luks_parse(exact, size - 4, area, "disk.luks", &luks, &err) == 0) {
		for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
			const struct ox_luks_slot *slot = &luks.slots[i];

			/* Whoever reads the key material relies on this. */
			if (slot->active &&
			    (uint64_t)slot->key_offset * 512 +
			                    (uint64_t)slot->stripes * luks.key_bytes >
			            area)
				abort();
		}
	} else if (err.code <= 0) {
		abort();
	}
	free(exact);
	return 0;
}
