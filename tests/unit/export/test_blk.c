/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The block device without a transport: configuration space, and chains built by hand.
 */
#include "base/byteorder.h"
#include "export/blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

static const struct ox_disk_info disk = {
        .name = "d",
        .serial = "SN-0123456789",
        .size = 10ull << 30,
        .logical_block_size = 512,
        .physical_block_size = 4096,
        .optimal_io_size = 65536,
        .discard_granularity = 4096,
        .cache = OX_CACHE_NONE,
        .discard = true,
        .write_zeroes = true,
        .zero_unmaps = true,
};

/* --- configuration space ----------------------------------------------------------------- */

static void test_config(void **state)
{
	uint8_t config[OX_BLK_CONFIG_BYTES], out[300];

	ox_blk_config_fill(&disk, 4, true, config);
	assert_int_equal(ox_get_le64(config), (10ull << 30) / 512);
	assert_int_equal(ox_get_le32(config + 12), 126);
	assert_int_equal(ox_get_le32(config + 20), 512);
	assert_int_equal(config[24], 3);
	assert_int_equal(ox_get_le16(config + 26), 8);
	assert_int_equal(ox_get_le32(config + 28), 128);
	assert_int_equal(config[32], 1);
	assert_int_equal(ox_get_le16(config + 34), 4);
	assert_int_equal(ox_get_le32(config + 36), 1u << 22);
	assert_int_equal(ox_get_le32(config + 40), OX_BLK_RANGES_MAX);
	assert_int_equal(ox_get_le32(config + 44), 8);
	assert_int_equal(ox_get_le32(config + 48), 1u << 22);
	assert_int_equal(config[56], 1);
	for (unsigned i = 57; i < sizeof(config); i++)
		assert_int_equal(config[i], 0);

	/* Every offset and size: the same bytes, then zeroes. */
	for (uint32_t offset = 0; offset < 0x100; offset += 3) {
		memset(out, 0xee, sizeof(out));
		ox_blk_config_read(config, offset, 200, out);
		for (unsigned i = 0; i < 200; i++)
			assert_int_equal(out[i],
			                 offset + i < OX_BLK_CONFIG_BYTES ? config[offset + i] : 0);
		assert_int_equal(out[200], 0xee);
	}
	ox_blk_config_read(config, 0x100, 60, out);
	assert_memory_equal(out, config, 60);
	ox_blk_config_read(config, UINT32_MAX, 4, out);
	assert_int_equal(ox_get_le32(out), 0);
}

static void test_config_limits(void **state)
{
	struct ox_disk_info info = disk;
	uint8_t config[OX_BLK_CONFIG_BYTES];

	info.max_discard = 1 << 20;
	info.max_zero = 12345; /* not a multiple of a block */
	info.logical_block_size = info.physical_block_size = 4096;
	ox_blk_config_fill(&info, 1, false, config);
	assert_int_equal(ox_get_le32(config + 36), 2048);
	assert_int_equal(ox_get_le32(config + 48), 24);
	assert_int_equal(config[24], 0);
	assert_int_equal(config[32], 0);

	info.read_only = true;
	ox_blk_config_fill(&info, 1, false, config);
	assert_int_equal(ox_get_le32(config + 36), 0);
	assert_int_equal(ox_get_le32(config + 48), 0);
	assert_true(ox_blk_features(&info) & 1ull << VIRTIO_BLK_F_RO);
	assert_false(ox_blk_features(&info) & 1ull << VIRTIO_BLK_F_DISCARD);
	assert_false(ox_blk_features(&disk) & 1ull << VIRTIO_BLK_F_SECURE_ERASE);
	assert_true(ox_blk_features(&disk) & 1ull << VIRTIO_BLK_F_FLUSH);
}

/* --- requests ---------------------------------------------------------------------------- */

struct chain {
	struct ox_vq_chain chain;
	struct iovec iov[64];
	uint8_t header[16];
	uint8_t data[65536];
	uint8_t status;
	struct ox_blk_limits limits;
	struct ox_blk_command command;
};

static void chain_begin(struct chain *c, uint32_t type, uint64_t sector)
{
	memset(&c->chain, 0, sizeof(c->chain));
	c->chain.iov = c->iov;
	ox_put_le32(c->header, type);
	ox_put_le32(c->header + 4, 0);
	ox_put_le64(c->header + 8, sector);
	c->status = 0xaa;
	ox_blk_limits_init(&c->limits, &disk);
}

static void add_out(struct chain *c, void *base, size_t len)
{
	assert_int_equal(c->chain.in_count, 0);
	c->iov[c->chain.out_count++] = (struct iovec){base, len};
	c->chain.out_bytes += len;
}

static void add_in(struct chain *c, void *base, size_t len)
{
	c->iov[c->chain.out_count + c->chain.in_count++] = (struct iovec){base, len};
	c->chain.in_bytes += len;
}

static enum ox_blk_verdict parse(struct chain *c)
{
	return ox_blk_parse(&c->chain, &c->limits, &c->command);
}

static size_t command_bytes(const struct chain *c)
{
	size_t sum = 0;

	for (unsigned i = 0; i < c->command.iovcnt; i++)
		sum += c->command.iov[i].iov_len;
	return sum;
}

static void test_read(void **state)
{
	struct chain c;

	chain_begin(&c, VIRTIO_BLK_T_IN, 100);
	add_out(&c, c.header, 16);
	add_in(&c, c.data, 4096);
	add_in(&c, c.data + 8192, 4096);
	add_in(&c, &c.status, 1);
	assert_int_equal(parse(&c), OX_BLK_SUBMIT);
	assert_int_equal(c.command.op, OX_IO_READ);
	assert_int_equal(c.command.offset, 51200);
	assert_int_equal(c.command.length, 8192);
	assert_int_equal(c.command.iovcnt, 2);
	assert_ptr_equal(c.command.iov, &c.iov[1]); /* nothing was copied */
	assert_ptr_equal(c.command.status, &c.status);
	assert_int_equal(c.command.status_entry, 3);
}

static void test_write(void **state)
{
	struct chain c;

	chain_begin(&c, VIRTIO_BLK_T_OUT, 1);
	add_out(&c, c.header, 16);
	add_out(&c, c.data, 512);
	add_in(&c, &c.status, 1);
	assert_int_equal(parse(&c), OX_BLK_SUBMIT);
	assert_int_equal(c.command.op, OX_IO_WRITE);
	assert_int_equal(c.command.offset, 512);
	assert_int_equal(c.command.length, 512);
	assert_int_equal(c.command.iovcnt, 1);
	assert_ptr_equal(c.command.iov[0].iov_base, c.data);

	c.limits.read_only = true;
	chain_begin(&c, VIRTIO_BLK_T_OUT, 1);
	c.limits.read_only = true;
	add_out(&c, c.header, 16);
	add_out(&c, c.data, 512);
	add_in(&c, &c.status, 1);
	assert_int_equal(parse(&c), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_IOERR);
}

/* A driver may lay a request out as it likes (VIRTIO_F_VERSION_1 implies ANY_LAYOUT). */
static void test_layouts(void **state)
{
	uint8_t all[16 + 1024 + 1];
	struct chain c;

	/* Everything in one buffer each way. */
	chain_begin(&c, VIRTIO_BLK_T_OUT, 3);
	memcpy(all, c.header, 16);
	add_out(&c, all, 16 + 1024);
	add_in(&c, &c.status, 1);
	assert_int_equal(parse(&c), OX_BLK_SUBMIT);
	assert_int_equal(c.command.length, 1024);
	assert_ptr_equal(c.command.iov[0].iov_base, all + 16);
	assert_int_equal(command_bytes(&c), 1024);

	/* The status at the end of the data. */
	chain_begin(&c, VIRTIO_BLK_T_IN, 3);
	add_out(&c, c.header, 16);
	add_in(&c, all, 1025);
	assert_int_equal(parse(&c), OX_BLK_SUBMIT);
	assert_int_equal(c.command.length, 1024);
	assert_int_equal(command_bytes(&c), 1024);
	assert_ptr_equal(c.command.status, all + 1024);
	assert_int_equal(c.command.status_entry, 1);

	/* A header of 16 buffers, with empty ones between, and data in the last. */
	chain_begin(&c, VIRTIO_BLK_T_OUT, 0x1234);
	for (unsigned i = 0; i < 15; i++) {
		add_out(&c, c.header + i, 1);
		add_out(&c, c.data, 0);
	}
	all[0] = c.header[15];
	add_out(&c, all, 513);
	add_in(&c, &c.status, 1);
	add_in(&c, c.data, 0);
	assert_int_equal(parse(&c), OX_BLK_SUBMIT);
	assert_int_equal(c.command.offset, 0x1234ull << 9);
	assert_int_equal(c.command.iovcnt, 1);
	assert_ptr_equal(c.command.iov[0].iov_base, all + 1);
	assert_int_equal(command_bytes(&c), 512);
	assert_ptr_equal(c.command.status, &c.status);
}

static void test_malformed(void **state)
{
	struct chain c;

	/* No room for the status. */
	chain_begin(&c, VIRTIO_BLK_T_OUT, 0);
	add_out(&c, c.header, 16);
	add_out(&c, c.data, 512);
	assert_int_equal(parse(&c), OX_BLK_MALFORMED);
	add_in(&c, c.data, 0);
	assert_int_equal(parse(&c), OX_BLK_MALFORMED);
	/* Half a header. */
	chain_begin(&c, VIRTIO_BLK_T_IN, 0);
	add_out(&c, c.header, 15);
	add_in(&c, c.data, 513);
	assert_int_equal(parse(&c), OX_BLK_MALFORMED);
	/* No header. */
	chain_begin(&c, VIRTIO_BLK_T_IN, 0);
	add_in(&c, c.data, 513);
	assert_int_equal(parse(&c), OX_BLK_MALFORMED);
}

static uint8_t answer_of(struct chain *c)
{
	assert_int_equal(parse(c), OX_BLK_ANSWER);
	assert_ptr_equal(c->command.status, &c->status);
	return c->command.answer;
}

static void test_bad_transfers(void **state)
{
	static const uint64_t sectors[] = {UINT64_MAX, UINT64_MAX / 512 + 1, 1ull << 55,
	                                   1ull << 62};
	struct chain c;

	chain_begin(&c, VIRTIO_BLK_T_IN, 0);
	add_out(&c, c.header, 16);
	add_in(&c, c.data, 511);
	add_in(&c, &c.status, 1);
	assert_int_equal(answer_of(&c), VIRTIO_BLK_S_IOERR);
	chain_begin(&c, VIRTIO_BLK_T_OUT, 0);
	add_out(&c, c.header, 16);
	add_out(&c, c.data, 513);
	add_in(&c, &c.status, 1);
	assert_int_equal(answer_of(&c), VIRTIO_BLK_S_IOERR);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(sectors); i++) {
		chain_begin(&c, VIRTIO_BLK_T_IN, sectors[i]);
		add_out(&c, c.header, 16);
		add_in(&c, c.data, 512);
		add_in(&c, &c.status, 1);
		assert_int_equal(answer_of(&c), VIRTIO_BLK_S_IOERR);
	}
	/* Nothing to do is done at once. */
	chain_begin(&c, VIRTIO_BLK_T_IN, 0);
	add_out(&c, c.header, 16);
	add_in(&c, &c.status, 1);
	assert_int_equal(answer_of(&c), VIRTIO_BLK_S_OK);
	/* Nobody's request. */
	chain_begin(&c, 99, 0);
	add_out(&c, c.header, 16);
	add_in(&c, &c.status, 1);
	assert_int_equal(answer_of(&c), VIRTIO_BLK_S_UNSUPP);
}

static void test_get_id(void **state)
{
	char id[21];
	struct chain c;

	memset(id, 'x', sizeof(id));
	chain_begin(&c, VIRTIO_BLK_T_GET_ID, 0);
	add_out(&c, c.header, 16);
	add_in(&c, id, 7);
	add_in(&c, id + 7, 13);
	add_in(&c, &c.status, 1);
	assert_int_equal(answer_of(&c), VIRTIO_BLK_S_OK);
	assert_memory_equal(id, "SN-0123456789\0\0\0\0\0\0\0x", 21);
	/* A short buffer gets what fits. */
	memset(id, 'x', sizeof(id));
	chain_begin(&c, VIRTIO_BLK_T_GET_ID, 0);
	add_out(&c, c.header, 16);
	add_in(&c, id, 4);
	add_in(&c, &c.status, 1);
	assert_int_equal(answer_of(&c), VIRTIO_BLK_S_OK);
	assert_memory_equal(id, "SN-0x", 5);
}

static void test_flush(void **state)
{
	struct chain c;

	chain_begin(&c, VIRTIO_BLK_T_FLUSH, 0);
	add_out(&c, c.header, 16);
	add_in(&c, &c.status, 1);
	assert_int_equal(parse(&c), OX_BLK_SUBMIT);
	assert_int_equal(c.command.op, OX_IO_FLUSH);
	assert_int_equal(c.command.length, 0);
	assert_int_equal(c.command.ranges, 0);
}

static void put_range(uint8_t *p, uint64_t sector, uint32_t sectors, uint32_t flags)
{
	ox_put_le64(p, sector);
	ox_put_le32(p + 8, sectors);
	ox_put_le32(p + 12, flags);
}

static enum ox_blk_verdict range_request(struct chain *c, uint32_t type, unsigned bytes)
{
	chain_begin(c, type, 0);
	add_out(c, c->header, 16);
	/* In two pieces, not at a range's border. */
	add_out(c, c->data, ox_min(bytes, 5u));
	if (bytes > 5)
		add_out(c, c->data + 5, bytes - 5);
	add_in(c, &c->status, 1);
	return parse(c);
}

static void test_ranges(void **state)
{
	struct chain c;

	put_range(c.data, 8, 16, 0);
	put_range(c.data + 16, 1000, 1, 1);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_WRITE_ZEROES, 32), OX_BLK_SUBMIT);
	assert_int_equal(c.command.op, OX_IO_ZERO);
	assert_int_equal(c.command.ranges, 2);
	/* The first one is ready. */
	assert_int_equal(c.command.offset, 4096);
	assert_int_equal(c.command.length, 8192);
	assert_int_equal(c.command.flags, 0);
	assert_int_equal(ox_blk_range(&c.command, &c.limits, 1), VIRTIO_BLK_S_OK);
	assert_int_equal(c.command.offset, 512000);
	assert_int_equal(c.command.length, 512);
	assert_int_equal(c.command.flags, OX_IO_MAY_UNMAP);
	/* The guest changed its mind: looked at again. */
	put_range(c.data + 16, 1000, 1, 0x80);
	assert_int_equal(ox_blk_range(&c.command, &c.limits, 1), VIRTIO_BLK_S_UNSUPP);

	put_range(c.data, 8, 16, 0);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_DISCARD, 16), OX_BLK_SUBMIT);
	assert_int_equal(c.command.op, OX_IO_DISCARD);
}

static void test_bad_ranges(void **state)
{
	struct chain c;

	memset(c.data, 0, sizeof(c.data));
	/* Sizes: none, not whole ranges, too many. */
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_DISCARD, 0), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_IOERR);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_DISCARD, 15), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_IOERR);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_DISCARD, 16 * (OX_BLK_RANGES_MAX + 1)),
	                 OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_IOERR);
	/* unmap is for write-zeroes only; other flags are nobody's. */
	put_range(c.data, 0, 8, 1);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_DISCARD, 16), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_UNSUPP);
	put_range(c.data, 0, 8, 2);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_WRITE_ZEROES, 16), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_UNSUPP);
	/* Larger than promised; nothing is done of a list with one bad range. */
	put_range(c.data, 0, 8, 0);
	put_range(c.data + 16, 0, (1u << 22) + 1, 0);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_WRITE_ZEROES, 32), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_IOERR);
	put_range(c.data, UINT64_MAX, 1, 0);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_DISCARD, 16), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_IOERR);
	/* What the disk cannot do. */
	put_range(c.data, 0, 8, 0);
	assert_int_equal(range_request(&c, VIRTIO_BLK_T_SECURE_ERASE, 16), OX_BLK_ANSWER);
	assert_int_equal(c.command.answer, VIRTIO_BLK_S_UNSUPP);
}

static void test_status(void **state)
{
	assert_int_equal(ox_blk_status(0), VIRTIO_BLK_S_OK);
	assert_int_equal(ox_blk_status(-EIO), VIRTIO_BLK_S_IOERR);
	assert_int_equal(ox_blk_status(-ENOSPC), VIRTIO_BLK_S_IOERR);
	assert_int_equal(ox_blk_status(-ENOTSUP), VIRTIO_BLK_S_UNSUPP);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_config),        cmocka_unit_test(test_config_limits),
	        cmocka_unit_test(test_read),          cmocka_unit_test(test_write),
	        cmocka_unit_test(test_layouts),       cmocka_unit_test(test_malformed),
	        cmocka_unit_test(test_bad_transfers), cmocka_unit_test(test_get_id),
	        cmocka_unit_test(test_flush),         cmocka_unit_test(test_ranges),
	        cmocka_unit_test(test_bad_ranges),    cmocka_unit_test(test_status),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
