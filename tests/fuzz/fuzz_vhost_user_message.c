/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: the parser of vhost-user messages.  Input: the number of descriptors that came
 * along (a byte), then header and payload.
 */
#include "export/vhost_user.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(x)                 \
	do {                     \
		if (!(x))        \
			abort(); \
	} while (0)

static uint64_t sum(const uint8_t *bytes, size_t count)
{
	uint64_t total = 0;

	for (size_t i = 0; i < count; i++)
		total += bytes[i];
	return total;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ox_vu_message message;
	volatile uint64_t sink = 0;
	uint32_t payload = 0;
	uint8_t *exact;
	int rc;

	if (size < 1 + OX_VU_HEADER_BYTES)
		return 0;
	rc = ox_vhost_user_parse_header(data + 1, &payload);
	CHECK(rc < 0 || payload <= OX_VU_PAYLOAD_MAX);
	/* In a block of exactly that size: a read beyond it is seen. */
	exact = malloc(size - 1);
	CHECK(exact);
	memcpy(exact, data + 1, size - 1);
	rc = ox_vhost_user_parse(exact, size - 1, data[0] % (OX_VU_FDS_MAX + 2), &message);
	if (rc == 0) {
		CHECK(ox_vhost_user_request_name(message.request));
		CHECK(message.payload_bytes == size - 1 - OX_VU_HEADER_BYTES);
		if (message.request == OX_VU_SET_MEM_TABLE)
			CHECK(message.memory.count <= OX_VU_FDS_MAX);
		/* The bytes that it points to are within. */
		if (message.request == OX_VU_SET_CONFIG)
			sink += sum(message.config.bytes, message.config.size);
		if (message.request == OX_VU_GET_CONFIG)
			CHECK(message.config.size <= OX_VU_PAYLOAD_MAX);
	}
	free(exact);
	(void)sink;
	return 0;
}
