/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: messages in a stream of control bytes.  Input: the stream; it arrives whole, and
 * once more byte by byte: the messages must be the same.
 */
#include "control/qmp_splitter.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What was told: a hash of the messages and of what was passed over. */
static uint64_t feed(const uint8_t *data, size_t size, size_t piece)
{
	struct ox_qmp_splitter splitter = {0};
	uint64_t hash = 1;

	while (size) {
		size_t length = piece < size ? piece : size;
		const char *at = (const char *)data;

		data += length;
		size -= length;
		while (length) {
			const char *before = at;
			enum ox_qmp_split told = ox_qmp_splitter_feed(&splitter, &at, &length);

			if (told == OX_QMP_MORE && length)
				abort();
			if (told == OX_QMP_MESSAGE) {
				if (splitter.length > OX_QMP_MAX_MESSAGE || !splitter.length)
					abort();
				for (size_t i = 0; i < splitter.length; i++)
					hash = hash * 31 + (uint8_t)splitter.text[i];
			}
			if (told != OX_QMP_MORE)
				hash = hash * 31 + told + 1;
			else if (at == before)
				abort();
		}
	}
	ox_qmp_splitter_free(&splitter);
	return hash;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (feed(data, size, size) != feed(data, size, 1))
		abort();
	return 0;
}
