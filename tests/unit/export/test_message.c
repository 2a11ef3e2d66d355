/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The vhost-user message parser: what it takes, what it refuses, and that it never reads beyond
 * the bytes it was given (the address sanitizer watches: messages lie at the end of a heap block).
 */
#include "export/vhost_user.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

static struct ox_vu_message message;

static int parse(uint32_t request, uint32_t flags, const void *payload, uint32_t size,
                 unsigned nfds)
{
	uint8_t *bytes = malloc(12 + size);
	uint32_t header[3] = {request, flags, size};
	int rc;

	assert_non_null(bytes);
	memcpy(bytes, header, 12);
	if (size)
		memcpy(bytes + 12, payload, size);
	rc = ox_vhost_user_parse(bytes, 12 + size, nfds, &message);
	free(bytes);
	return rc;
}

static void test_framing(void **state)
{
	uint32_t header[3] = {OX_VU_GET_FEATURES, 1, 0};
	uint32_t size;

	assert_int_equal(ox_vhost_user_parse(header, 12, 0, &message), 0);
	assert_int_equal(message.request, OX_VU_GET_FEATURES);
	assert_false(message.need_reply);
	header[1] = 1 | OX_VU_NEED_REPLY;
	assert_int_equal(ox_vhost_user_parse(header, 12, 0, &message), 0);
	assert_true(message.need_reply);

	header[1] = 0;
	assert_int_equal(ox_vhost_user_parse(header, 12, 0, &message), -EPROTO);
	header[1] = 2;
	assert_int_equal(ox_vhost_user_parse(header, 12, 0, &message), -EPROTO);
	header[1] = 1 | OX_VU_REPLY;
	assert_int_equal(ox_vhost_user_parse(header, 12, 0, &message), -EPROTO);
	header[1] = 1;
	assert_int_equal(ox_vhost_user_parse(header, 11, 0, &message), -EPROTO);
	assert_int_equal(ox_vhost_user_parse(header, 0, 0, &message), -EPROTO);
	header[2] = 1; /* a byte that is not there */
	assert_int_equal(ox_vhost_user_parse(header, 12, 0, &message), -EPROTO);
	header[2] = OX_VU_PAYLOAD_MAX + 1;
	assert_int_equal(ox_vhost_user_parse_header(header, &size), -EPROTO);
	header[2] = OX_VU_PAYLOAD_MAX;
	assert_int_equal(ox_vhost_user_parse_header(header, &size), 0);
	assert_int_equal(size, OX_VU_PAYLOAD_MAX);
}

static void test_unknown(void **state)
{
	static const uint32_t unknown[] = {0, 19, 20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 41, ~0u};

	for (unsigned i = 0; i < OX_ARRAY_SIZE(unknown); i++) {
		assert_int_equal(parse(unknown[i], 1 | OX_VU_NEED_REPLY, NULL, 0, 0), -ENOTSUP);
		assert_int_equal(message.request, unknown[i]);
		assert_true(message.need_reply);
		assert_null(ox_vhost_user_request_name(unknown[i]));
	}
	assert_string_equal(ox_vhost_user_request_name(OX_VU_GET_STATUS), "GET_STATUS");
}

/* Each request with each size from 0 to 64 and 0 to 2 descriptors: taken or refused, as here. */
static bool fits(uint32_t request, uint32_t size, unsigned nfds)
{
	switch (request) {
	case OX_VU_SET_FEATURES:
	case OX_VU_SET_PROTOCOL_FEATURES:
	case OX_VU_SET_STATUS:
	case OX_VU_SET_VRING_NUM:
	case OX_VU_SET_VRING_BASE:
	case OX_VU_GET_VRING_BASE:
	case OX_VU_SET_VRING_ENABLE:
		return size == 8 && nfds == 0;
	case OX_VU_SET_VRING_KICK:
	case OX_VU_SET_VRING_CALL:
	case OX_VU_SET_VRING_ERR:
		return size == 8 && nfds == 1; /* bit 8 is clear in what is sent */
	case OX_VU_SET_VRING_ADDR:
		return size == 40 && nfds == 0;
	case OX_VU_SET_MEM_TABLE:
		return size >= 8 && nfds == 0; /* no regions */
	case OX_VU_ADD_MEM_REG:
		return size == 40 && nfds == 1;
	case OX_VU_REM_MEM_REG:
		return size == 40 && nfds <= 1;
	case OX_VU_SET_LOG_BASE:
		return (size == 16 && nfds == 1) || (size == 8 && nfds == 0);
	case OX_VU_SET_LOG_FD:
	case OX_VU_SET_BACKEND_REQ_FD:
		return size <= 8 && nfds == 1;
	case OX_VU_GET_CONFIG:
	case OX_VU_SET_CONFIG:
		return size >= 12 && nfds == 0;
	case OX_VU_GET_INFLIGHT_FD:
	case OX_VU_SET_INFLIGHT_FD:
		return false; /* no queues */
	default:
		return size <= 8 && nfds == 0;
	}
}

static void test_shapes(void **state)
{
	static const uint8_t zeroes[64];

	for (uint32_t request = 1; request <= OX_VU_GET_STATUS; request++) {
		if (!ox_vhost_user_request_name(request))
			continue;
		for (uint32_t size = 0; size <= 64; size++)
			for (unsigned nfds = 0; nfds <= 2; nfds++)
				assert_int_equal(parse(request, 1, zeroes, size, nfds),
				                 fits(request, size, nfds) ? 0 : -EBADMSG);
	}
}

static void test_memory(void **state)
{
	uint64_t payload[1 + 4 * (OX_VU_FDS_MAX + 1)];

	for (unsigned i = 0; i < OX_ARRAY_SIZE(payload); i++)
		payload[i] = i * 0x1000;
	payload[0] = 2;
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, 8 + 64, 2), 0);
	assert_int_equal(message.memory.count, 2);
	assert_int_equal(message.memory.region[1].guest_addr, 0x5000);
	assert_int_equal(message.memory.region[1].size, 0x6000);
	assert_int_equal(message.memory.region[1].user_addr, 0x7000);
	assert_int_equal(message.memory.region[1].mmap_offset, 0x8000);
	/* The whole array of eight, of which two count. */
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, 8 + 256, 2), 0);
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, 8 + 63, 2), -EBADMSG);
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, 8 + 64, 1), -EBADMSG);
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, 8 + 64, 3), -EBADMSG);
	payload[0] = OX_VU_FDS_MAX;
	assert_int_equal(
	        parse(OX_VU_SET_MEM_TABLE, 1, payload, 8 + 32 * OX_VU_FDS_MAX, OX_VU_FDS_MAX), 0);
	payload[0] = OX_VU_FDS_MAX + 1;
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, sizeof(payload), OX_VU_FDS_MAX),
	                 -EBADMSG);
	payload[0] = 0xffffffff;
	assert_int_equal(parse(OX_VU_SET_MEM_TABLE, 1, payload, sizeof(payload), 0), -EBADMSG);
}

static void test_vring_fd(void **state)
{
	uint64_t value = 7;

	assert_int_equal(parse(OX_VU_SET_VRING_KICK, 1, &value, 8, 1), 0);
	assert_int_equal(message.vring_fd.index, 7);
	assert_true(message.vring_fd.has_fd);
	assert_int_equal(parse(OX_VU_SET_VRING_KICK, 1, &value, 8, 0), -EBADMSG);
	value = 255 | OX_VU_VRING_NOFD;
	assert_int_equal(parse(OX_VU_SET_VRING_CALL, 1, &value, 8, 0), 0);
	assert_int_equal(message.vring_fd.index, 255);
	assert_false(message.vring_fd.has_fd);
	assert_int_equal(parse(OX_VU_SET_VRING_ERR, 1, &value, 8, 1), -EBADMSG);
}

static void test_config(void **state)
{
	struct {
		uint32_t offset, size, flags;
		uint8_t bytes[1];
	} __attribute__((packed)) payload = {32, 1, 0, {1}};

	assert_int_equal(parse(OX_VU_SET_CONFIG, 1, &payload, 13, 0), 0);
	assert_int_equal(message.config.offset, 32);
	assert_int_equal(message.config.size, 1);
	assert_int_equal(parse(OX_VU_SET_CONFIG, 1, &payload, 12, 0), -EBADMSG);
	/* A reader need not send the room for the answer. */
	payload.size = 4096;
	assert_int_equal(parse(OX_VU_GET_CONFIG, 1, &payload, 12, 0), 0);
	payload.size = OX_VU_PAYLOAD_MAX - 12;
	assert_int_equal(parse(OX_VU_GET_CONFIG, 1, &payload, 12, 0), 0);
	payload.size++;
	assert_int_equal(parse(OX_VU_GET_CONFIG, 1, &payload, 12, 0), -EBADMSG);
	payload.size = 0xffffffff;
	assert_int_equal(parse(OX_VU_GET_CONFIG, 1, &payload, 12, 0), -EBADMSG);
}

static void test_inflight(void **state)
{
	struct {
		uint64_t size, offset;
		uint16_t queues, queue_size;
		uint32_t padding;
	} payload = {4096, 64, 4, 128, 0};

	assert_int_equal(parse(OX_VU_GET_INFLIGHT_FD, 1, &payload, 20, 0), 0);
	assert_int_equal(parse(OX_VU_GET_INFLIGHT_FD, 1, &payload, 24, 0), 0);
	assert_int_equal(message.payload_bytes, 24);
	assert_int_equal(parse(OX_VU_GET_INFLIGHT_FD, 1, &payload, 24, 1), -EBADMSG);
	assert_int_equal(parse(OX_VU_GET_INFLIGHT_FD, 1, &payload, 22, 0), -EBADMSG);
	assert_int_equal(parse(OX_VU_SET_INFLIGHT_FD, 1, &payload, 20, 0), -EBADMSG);
	assert_int_equal(parse(OX_VU_SET_INFLIGHT_FD, 1, &payload, 20, 1), 0);
	assert_int_equal(message.inflight.mmap_size, 4096);
	assert_int_equal(message.inflight.mmap_offset, 64);
	assert_int_equal(message.inflight.queues, 4);
	assert_int_equal(message.inflight.queue_size, 128);
	payload.queue_size = 0;
	assert_int_equal(parse(OX_VU_SET_INFLIGHT_FD, 1, &payload, 20, 1), -EBADMSG);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_framing),  cmocka_unit_test(test_unknown),
	        cmocka_unit_test(test_shapes),   cmocka_unit_test(test_memory),
	        cmocka_unit_test(test_vring_fd), cmocka_unit_test(test_config),
	        cmocka_unit_test(test_inflight),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
