/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The generic image layer's reads and writes, over a format whose map is an array: every kind of
 * extent, the order of prepare, write and publish, what is filled around a write, durability,
 * compressed and encrypted data.
 */
#include "map_format.h"
#include "image/crypto.h"

static uint8_t buffer[128 << 10] __attribute__((aligned(4096)));

static int read_co(uint64_t offset, uint64_t length)
{
	memset(buffer, 0xee, sizeof(buffer));
	return op_co(OX_IO_READ, offset, buffer, length, 0);
}

static int write_co(uint64_t offset, uint64_t length, uint8_t value, unsigned flags)
{
	memset(buffer, value, length);
	return op_co(OX_IO_WRITE, offset, buffer, length, flags);
}

static void assert_reads(uint64_t offset, uint64_t length, uint8_t value)
{
	assert_int_equal(read_co(offset, length), 0);
	assert_bytes(buffer, length, value);
}

/* The first change is behind us: later ones may take the hit path. */
static void begin_co(void)
{
	assert_int_equal(op_co(OX_IO_ZERO, 255 << 10, NULL, UNIT, 0), 0);
	fixture.top.image->metadata_dirty = false;
	map_log_start(&fixture.top);
	fixture.top.writes = 0;
	fixture.top.write_bytes = 0;
}

/* --- reads ---------------------------------------------------------------------------------------
 */

static void kinds_co(void)
{
	struct iovec iov[4] = {
	        {buffer, 1000}, {buffer + 1000, 1}, {buffer + 1001, 8191}, {buffer + 9192, 7192}};

	map_set_data(&fixture.top, 0, 2048, 1, false);
	map_set_data(&fixture.top, 2048, 1024, 2, true);
	map_set(&fixture.top, 3072, 1024, OX_EXTENT_ZERO);
	map_set_compressed(&fixture.top, 4096, 4096, 10);
	map_set(&fixture.top, 8192, 8192, OX_EXTENT_BACKING);
	map_set_data(&fixture.below, 8192, 4096, 3, false);
	fixture.top.missing[2] = fixture.top.missing[8] = true;
	memset(buffer, 0xee, sizeof(buffer));
	assert_int_equal(submit_co(0, OX_IO_READ, 0, iov, 4, 16384, 0), 0);
	assert_bytes(buffer, 2048, 1);
	assert_bytes(buffer + 2048, 1024, 2);
	assert_bytes(buffer + 3072, 1024, 0);
	for (unsigned i = 0; i < 8; i++)
		assert_bytes(buffer + 4096 + 512 * i, 512, (uint8_t)(10 + i));
	assert_bytes(buffer + 8192, 4096, 3);
	assert_bytes(buffer + 12288, 4096, 0);
	assert_int_equal(buffer[16384], 0xee);
	assert_int_equal(fixture.top.maps, 2);
	/* Not at a unit. */
	assert_int_equal(read_co(2047, 3), 0);
	assert_bytes(buffer, 1, 1);
	assert_bytes(buffer + 1, 2, 2);
	assert_int_equal(read_co((256 << 10) - 1, 2), -EIO);
}

static void test_kinds(void **state)
{
	map_run(&(struct map_test){.backing = 64 << 10, .fn_co = kinds_co});
}

/* A backing image ends before the overlay does, and not at a cluster. */
static void short_backing_co(void)
{
	map_set_data(&fixture.below, 0, 10240, 7, false);
	assert_int_equal(read_co(8192, 4096), 0);
	assert_bytes(buffer, 1500, 7);
	assert_bytes(buffer + 1500, 4096 - 1500, 0);
	assert_reads(12288, 4096, 0);
	assert_reads(100 << 10, 4096, 0);
	/* What is written there is filled with the same. */
	assert_int_equal(write_co(8192, 1024, 9, 0), 0);
	assert_int_equal(read_co(8192, 4096), 0);
	assert_bytes(buffer, 1024, 9);
	assert_bytes(buffer + 1024, 476, 7);
	assert_bytes(buffer + 1500, 4096 - 1500, 0);
}

static void test_short_backing(void **state)
{
	map_run(&(struct map_test){.backing = 9692, .fn_co = short_backing_co});
}

/* A named backing file that is not open must not read as zeroes, nor be covered by them. */
static void closed_backing_co(void)
{
	fixture.top.image->backing_file = ox_xstrdup("base");
	map_set(&fixture.top, 4096, 4096, OX_EXTENT_BACKING);
	assert_int_equal(read_co(4096, 4096), -EIO);
	assert_int_equal(write_co(4096, 1024, 1, 0), -EIO);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[4]), OX_EXTENT_BACKING);
	assert_reads(0, 4096, 0);
}

static void test_closed_backing(void **state)
{
	map_run(&(struct map_test){.fn_co = closed_backing_co});
}

/* --- hits
 * ------------------------------------------------------------------------------------------ */

/* No fiber is made for these: the store is called from this one. */
static void hits_co(void)
{
	begin_co();
	map_set_data(&fixture.top, 0, 8192, 1, false);
	assert_reads(1024, 4096, 1);
	assert_int_equal(write_co(512, 4096, 5, 0), 0);
	assert_ptr_equal(fixture.top.write_fiber, ox_fiber_self());
	assert_log(&fixture.top, "read write");
	/* Durable, while the map is not. */
	assert_int_equal(write_co(512, 512, 5, OX_IO_DSYNC), 0);
	assert_ptr_equal(fixture.top.write_fiber, ox_fiber_self());
	assert_int_equal(fixture.top.write_flags, OX_IO_DSYNC);
	fixture.top.image->metadata_dirty = true;
	assert_int_equal(write_co(512, 512, 5, OX_IO_DSYNC), 0);
	assert_ptr_not_equal(fixture.top.write_fiber, ox_fiber_self());
	assert_int_equal(fixture.top.write_flags, 0);
	assert_log(&fixture.top, "read write write write commit");
}

/* Fresh space at hand: as many as it takes, then one write. */
static void allocate_co(void)
{
	begin_co();
	fixture.top.can_allocate = true;
	assert_int_equal(write_co(4096, 4096, 3, 0), 0);
	assert_ptr_not_equal(fixture.top.write_fiber, NULL);
	assert_reads(4096, 4096, 3);
	map_log_start(&fixture.top);
	assert_int_equal(write_co(16384, 1024, 4, 0), 0);
	assert_ptr_equal(fixture.top.write_fiber, ox_fiber_self());
	assert_log(&fixture.top, "allocate write");
	assert_true(fixture.top.image->metadata_dirty);
	assert_reads(16384, 1024, 4);
	assert_reads(17408, 1024, 0);
	/* Part of it is there. */
	assert_int_equal(write_co(16384, 2048, 5, 0), 0);
	assert_reads(16384, 2048, 5);
	/* Used up half way. */
	map_set_data(&fixture.top, 33 << 10, 1024, 1, true);
	assert_int_equal(write_co(32 << 10, 3072, 6, 0), 0);
	assert_reads(32 << 10, 3072, 6);
	assert_reads(35 << 10, 1024, 0);
}

/* A read that the backing image answers at once, and reads of nothing. */
static void hits_below_co(void)
{
	map_set_data(&fixture.below, 0, 8192, 1, false);
	map_log_start(&fixture.below);
	assert_reads(1024, 4096, 1);
	assert_log(&fixture.below, "read");
	assert_reads(32 << 10, 4096, 0);
	assert_int_equal(read_co(7 << 10, 4096), 0);
	assert_bytes(buffer, 1024, 1);
	assert_bytes(buffer + 1024, 3072, 0);
}

static void test_hits(void **state)
{
	map_run(&(struct map_test){.fn_co = hits_co});
	map_run(&(struct map_test){.fn_co = allocate_co});
	map_run(&(struct map_test){.backing = 64 << 10, .fn_co = hits_below_co});
}

/* --- new space
 * --------------------------------------------------------------------------------------- */

static void order_co(void)
{
	begin_co();
	assert_int_equal(write_co(4096, 4096, 1, 0), 0);
	assert_log(&fixture.top, "prepare write publish");
	assert_reads(4096, 4096, 1);
	/* The space is given back when the data did not get there, or the map does not take it. */
	map_log_start(&fixture.top);
	fixture.top.write_rc = -ENOSPC;
	assert_int_equal(write_co(8192, 4096, 1, 0), -ENOSPC);
	assert_log(&fixture.top, "prepare write abort");
	map_log_start(&fixture.top);
	fixture.top.publish_rc = -EIO;
	assert_int_equal(write_co(8192, 4096, 1, 0), -EIO);
	assert_log(&fixture.top, "prepare write publish abort");
	map_log_start(&fixture.top);
	fixture.top.prepare_rc = -ENOSPC;
	assert_int_equal(write_co(8192, 4096, 1, 0), -ENOSPC);
	assert_log(&fixture.top, "prepare");
	assert_reads(8192, 4096, 0);
	/* The map changed: again. */
	map_log_start(&fixture.top);
	fixture.top.prepare_rc = -EAGAIN;
	assert_int_equal(write_co(8192, 4096, 2, 0), 0);
	assert_log(&fixture.top, "prepare prepare write publish");
	map_log_start(&fixture.top);
	fixture.top.publish_rc = -EAGAIN;
	assert_int_equal(write_co(12288, 4096, 3, 0), 0);
	assert_log(&fixture.top, "prepare write publish abort prepare write publish");
	assert_reads(8192, 4096, 2);
	assert_reads(12288, 4096, 3);
	/* Several clusters, the middle one in place. */
	map_log_start(&fixture.top);
	map_set_data(&fixture.top, 24576, 4096, 4, false);
	assert_int_equal(write_co(20480, 12288, 5, 0), 0);
	assert_log(&fixture.top, "prepare write publish write prepare write publish");
	assert_reads(20480, 12288, 5);
}

/* The store's garbage never shows: what the write leaves of its cluster is what was there. */
static void fill_co(void)
{
	begin_co();
	assert_int_equal(write_co(4096 + 1024, 1024, 1, 0), 0);
	assert_int_equal(fixture.top.writes, 1);
	assert_int_equal(fixture.top.write_bytes, 4096);
	assert_reads(4096, 1024, 0);
	assert_reads(5120, 1024, 1);
	assert_reads(6144, 2048, 0);
	/* Shared data is copied, and stays what it is for the others. */
	map_set_data(&fixture.top, 8192, 4096, 7, true);
	assert_int_equal(write_co(8192 + 3072, 512, 2, 0), 0);
	assert_reads(8192, 3072, 7);
	assert_reads(8192 + 3072, 512, 2);
	assert_reads(8192 + 3584, 512, 7);
	/* Not at a sector, over two clusters. */
	map_set_data(&fixture.top, 16384, 8192, 8, true);
	assert_int_equal(write_co(16384 + 4001, 201, 3, 0), 0);
	assert_reads(16384, 4001, 8);
	assert_reads(16384 + 4001, 201, 3);
	assert_reads(16384 + 4202, 8192 - 4202, 8);
	/* Compressed data is unpacked and written as it is. */
	map_set_compressed(&fixture.top, 32768, 4096, 50);
	assert_int_equal(write_co(32768 + 512, 512, 4, 0), 0);
	assert_reads(32768, 512, 50);
	assert_reads(32768 + 512, 512, 4);
	assert_reads(32768 + 3584, 512, 57);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[32]), OX_EXTENT_DATA);
}

/* Space that reads as zero needs no zeroes. */
static void fill_zeroed_co(void)
{
	begin_co();
	fixture.top.zeroed = true;
	assert_int_equal(write_co(4096 + 1024, 1024, 1, 0), 0);
	assert_int_equal(fixture.top.write_bytes, 1024);
	assert_reads(4096, 1024, 0);
	assert_reads(5120, 1024, 1);
	assert_reads(6144, 2048, 0);
	/* But everything between what is not zero does. */
	fixture.top.write_bytes = 0;
	map_set_data(&fixture.top, 8192 + 1024, 1024, 6, true);
	assert_int_equal(write_co(8192 + 3072, 1024, 2, 0), 0);
	assert_int_equal(fixture.top.write_bytes, 3072);
	assert_reads(8192, 1024, 0);
	assert_reads(8192 + 1024, 1024, 6);
	assert_reads(8192 + 2048, 1024, 0);
	assert_reads(8192 + 3072, 1024, 2);
}

/* Fills on both sides of a long write, from below. */
static void fill_long_co(void)
{
	map_set_data(&fixture.below, 0, 256 << 10, 9, false);
	assert_int_equal(write_co((64 << 10) - 512, (64 << 10) + 1024, 1, 0), 0);
	assert_reads(0, (64 << 10) - 512, 9);
	assert_reads((64 << 10) - 512, (64 << 10) + 1024, 1);
	assert_reads((128 << 10) + 512, (64 << 10) - 512, 9);
}

/* A list of many entries, more than the fiber's own room. */
static void many_entries_co(void)
{
	struct iovec iov[64];

	for (unsigned i = 0; i < 64; i++)
		iov[i] = (struct iovec){buffer + 512 * i, 512};
	memset(buffer, 4, sizeof(buffer));
	assert_int_equal(submit_co(0, OX_IO_WRITE, 512, iov, 64, 32768, 0), 0);
	assert_reads(512, 32768, 4);
	assert_reads(0, 512, 0);
	assert_reads(512 + 32768, 4096 - 512, 0);
	memset(buffer, 0, sizeof(buffer));
	assert_int_equal(submit_co(0, OX_IO_READ, 0, iov, 64, 32768, 0), 0);
	assert_bytes(buffer, 512, 0);
	assert_bytes(buffer + 512, 32768 - 512, 4);
}

static void test_new_space(void **state)
{
	map_run(&(struct map_test){.fn_co = order_co});
	map_run(&(struct map_test){.fn_co = fill_co});
	map_run(&(struct map_test){.fn_co = fill_zeroed_co});
	map_run(&(struct map_test){
	        .backing = 256 << 10, .cluster = 64 << 10, .fn_co = fill_long_co});
	map_run(&(struct map_test){.fn_co = many_entries_co});
}

/* --- durability
 * ------------------------------------------------------------------------------------------ */

static void durable_co(void)
{
	begin_co();
	/* Data first, the map behind it, once for the whole request. */
	assert_int_equal(write_co(4096, 12288, 1, OX_IO_DSYNC), 0);
	assert_log(&fixture.top, "prepare write publish prepare write publish prepare write "
	                         "publish commit");
	assert_int_equal(fixture.top.write_flags, 0);
	/* A failure of it is the write's. */
	fixture.top.commit_rc = -EIO;
	assert_int_equal(write_co(32768, 4096, 1, OX_IO_DSYNC), -EIO);
	/* A flush: the map's if there is something of it to write, else the store's alone. */
	map_log_start(&fixture.top);
	assert_int_equal(op_co(OX_IO_FLUSH, 0, NULL, 0, 0), 0);
	assert_log(&fixture.top, "flush");
	fixture.top.image->metadata_dirty = true;
	assert_int_equal(op_co(OX_IO_FLUSH, 0, NULL, 0, 0), 0);
	assert_log(&fixture.top, "flush commit");
	fixture.top.image->metadata_dirty = true;
	fixture.top.commit_rc = -ENOSPC;
	assert_int_equal(op_co(OX_IO_FLUSH, 0, NULL, 0, 0), -ENOSPC);
	map_log_start(&fixture.top);
	assert_int_equal(op_co(OX_IO_ZERO, 4096, NULL, 4096, OX_IO_DSYNC), 0);
	assert_log(&fixture.top, "zero commit");
}

static void test_durable(void **state)
{
	map_run(&(struct map_test){.fn_co = durable_co});
}

/* --- zeroes and discards
 * ----------------------------------------------------------------------------------- */

static void clear_co(void)
{
	begin_co();
	map_set_data(&fixture.top, 0, 32768, 1, false);
	assert_int_equal(op_co(OX_IO_ZERO, 1000, NULL, 4000, OX_IO_MAY_UNMAP), 0);
	assert_reads(0, 1000, 1);
	assert_reads(1000, 4000, 0);
	assert_reads(5000, 4096, 1);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[1]), OX_EXTENT_ZERO);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[3]), OX_EXTENT_ZERO);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[0]), OX_EXTENT_DATA);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[4]), OX_EXTENT_DATA);
	assert_non_null(strstr(fixture.top.log, "unmap"));
	/* Smaller than a unit; where there are zeroes already, nothing is written. */
	fixture.top.writes = 0;
	assert_int_equal(op_co(OX_IO_ZERO, 1100, NULL, 100, 0), 0);
	assert_int_equal(fixture.top.writes, 0);
	assert_int_equal(op_co(OX_IO_ZERO, 8292, NULL, 100, 0), 0);
	assert_reads(8192, 100, 1);
	assert_reads(8292, 100, 0);
	assert_reads(8392, 100, 1);
	/* Of a discard the ragged ends stay. */
	assert_int_equal(op_co(OX_IO_DISCARD, 16384 - 512, NULL, 2048, 0), 0);
	assert_reads(15360, 1024, 1);
	assert_reads(16384, 1024, 0);
	assert_reads(17408, 1024, 1);
	assert_int_equal(op_co(OX_IO_DISCARD, 20480 + 1, NULL, 1024, 0), 0);
	assert_reads(20480, 2048, 1);
	assert_int_equal(op_co(OX_IO_SECURE_ERASE, 0, NULL, 4096, 0), -ENOTSUP);
}

/* The end of a disk that is no multiple of the unit counts as one. */
static void clear_end_co(void)
{
	map_set_data(&fixture.top, 8192, 2048, 1, false);
	map_log_start(&fixture.top);
	assert_int_equal(op_co(OX_IO_ZERO, 9216, NULL, 512, 0), 0);
	assert_log(&fixture.top, "begin zero");
	assert_int_equal(op_co(OX_IO_DISCARD, 8192, NULL, 1536, 0), 0);
	assert_log(&fixture.top, "begin zero discard");
	assert_reads(8192, 1536, 0);
}

static int not_supported_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                            bool unmap)
{
	return -ENOTSUP;
}

/* A map that cannot say zero, as qcow2's version 2 over a backing file. */
static void clear_fallback_co(void)
{
	map_set_data(&fixture.below, 0, 32768, 3, false);
	fixture.top.ops.zero_co = not_supported_co;
	map_set_data(&fixture.top, 4096, 4096, 1, false);
	assert_int_equal(op_co(OX_IO_ZERO, 2048, NULL, 8192, 0), 0);
	assert_reads(0, 2048, 3);
	assert_reads(2048, 8192, 0);
	assert_reads(10240, 4096, 3);
	assert_int_equal(op_co(OX_IO_ZERO, 16384, NULL, 4096, OX_IO_NO_FALLBACK), -ENOTSUP);
	assert_reads(16384, 4096, 3);
	/* Behind the backing image's end there are zeroes. */
	fixture.top.writes = 0;
	assert_int_equal(op_co(OX_IO_ZERO, 128 << 10, NULL, 65536, 0), 0);
	assert_int_equal(fixture.top.writes, 0);
	assert_int_equal(ENTRY_KIND(fixture.top.entry[128]), OX_EXTENT_BACKING);
	/* Neither can it discard: a hint. */
	fixture.top.ops.discard_co = NULL;
	map_set_data(&fixture.top, 4096, 4096, 1, true);
	assert_int_equal(op_co(OX_IO_DISCARD, 0, NULL, 65536, 0), 0);
	assert_reads(4096, 4096, 1);
	assert_reads(16384, 4096, 3);
}

/* More than one portion. */
static void clear_large_co(void)
{
	map_set_data(&fixture.top, (64ull << 20) - 2048, 4096, 1, false);
	map_log_start(&fixture.top);
	assert_int_equal(op_co(OX_IO_ZERO, 0, NULL, 200ull << 20, 0), 0);
	assert_log(&fixture.top, "begin zero zero zero zero");
	assert_reads((64ull << 20) - 2048, 4096, 0);
}

static void test_clear(void **state)
{
	map_run(&(struct map_test){.fn_co = clear_co});
	map_run(&(struct map_test){.size = 9728, .fn_co = clear_end_co});
	map_run(&(struct map_test){.backing = 64 << 10, .fn_co = clear_fallback_co});
	map_run(&(struct map_test){.size = 200ull << 20, .fn_co = clear_large_co});
}

/* --- compressed units
 * ---------------------------------------------------------------------------------------- */

static void unpacked_co(void)
{
	map_set_compressed(&fixture.top, 0, 65536, 1);
	for (unsigned i = 0; i < 128; i++)
		assert_reads(512 * i, 512, (uint8_t)(1 + i));
	assert_int_equal(fixture.top.unpacks, 1);
	assert_int_equal(fixture.top.reads, 1);
	/* Another one. */
	map_set_compressed(&fixture.top, 65536, 65536, 3);
	assert_reads(65536, 512, 3);
	assert_reads(0, 512, 1);
	assert_int_equal(fixture.top.unpacks, 3);
	/* The map let go of something: what was kept is not trusted. */
	assert_int_equal(write_co(200 << 10, 4096, 1, 0), 0);
	assert_reads(512, 512, 2);
	assert_int_equal(fixture.top.unpacks, 4);
	assert_reads(1024, 512, 3);
	assert_int_equal(fixture.top.unpacks, 4);
	/* Beyond the store's end. */
	for (unsigned i = 0; i < 64; i++)
		fixture.top.entry[i] = ENTRY(OX_EXTENT_COMPRESSED, 0, 16 << 20);
	assert_int_equal(read_co(0, 512), -EIO);
}

static void test_unpacked(void **state)
{
	map_run(&(struct map_test){.cluster = 65536, .fn_co = unpacked_co});
}

/* --- encryption
 * ---------------------------------------------------------------------------------------------- */

static void crypto_co(void)
{
	struct ox_image *image = fixture.top.image;
	uint8_t plain[512], cipher[512];

	assert_int_equal(ox_crypto_open_aes((const uint8_t *)"secret", 6, &image->crypto, NULL), 0);
	image->crypto_guest_offset = true;
	fixture.top.can_allocate = true;
	/* All of the cluster must be written, or what is around would be decrypted garbage. */
	fixture.top.zeroed = true;
	assert_int_equal(write_co(4096 + 1024, 1024, 1, 0), 0);
	assert_reads(4096, 1024, 0);
	assert_reads(5120, 1024, 1);
	assert_reads(6144, 2048, 0);
	/* It is encrypted indeed, by the guest's sector. */
	memset(plain, 1, sizeof(plain));
	assert_int_equal(ox_crypto_encrypt(image->crypto, 5120, plain, cipher, 512), 0);
	assert_int_equal(ox_store_read_co(fixture.channel[0]->data,
	                                  ENTRY_OFFSET(fixture.top.entry[5]), plain, 512),
	                 0);
	assert_memory_equal(plain, cipher, 512);
	/* In place, the guest's memory untouched; then a part of a sector, as tools may write. */
	assert_int_equal(write_co(4096, 4096, 2, 0), 0);
	assert_bytes(buffer, 4096, 2);
	assert_int_equal(write_co(4096 + 600, 500, 3, 0), 0);
	assert_reads(4096, 600, 2);
	assert_reads(4096 + 600, 500, 3);
	assert_reads(4096 + 1100, 4096 - 1100, 2);
	/* Many pieces, and zeroes that are written. */
	assert_int_equal(write_co(65536, 65536, 4, 0), 0);
	assert_reads(65536, 65536, 4);
	assert_int_equal(op_co(OX_IO_ZERO, 65536 + 512, NULL, 256, 0), 0);
	assert_reads(65536, 512, 4);
	assert_reads(65536 + 512, 256, 0);
	assert_reads(65536 + 768, 4096, 4);
	/* By the store's offset. */
	image->crypto_guest_offset = false;
	image->crypto_bias = 1024;
	assert_int_equal(write_co(16384, 1024, 5, 0), 0);
	assert_reads(16384, 1024, 5);
	memset(plain, 5, sizeof(plain));
	assert_int_equal(ox_crypto_encrypt(image->crypto,
	                                   ENTRY_OFFSET(fixture.top.entry[16]) - 1024, plain,
	                                   cipher, 512),
	                 0);
	assert_int_equal(ox_store_read_co(fixture.channel[0]->data,
	                                  ENTRY_OFFSET(fixture.top.entry[16]), plain, 512),
	                 0);
	assert_memory_equal(plain, cipher, 512);
}

static void test_crypto(void **state)
{
	map_run(&(struct map_test){.fn_co = crypto_co});
}

/* --- limits
 * ----------------------------------------------------------------------------------------------------
 */

/* Data in a file that was not opened: neither zeroes nor what stands in the image at that offset.
 */
static void no_data_co(void)
{
	map_set_data(&fixture.top, 0, 4096, 1, false);
	fixture.top.image->generic->no_data = true;
	fixture.top.image->data->size = 0;
	assert_int_equal(read_co(0, 512), -EIO);
	assert_int_equal(write_co(0, 512, 1, 0), -EIO);
	assert_int_equal(op_co(OX_IO_ZERO, 0, NULL, 4096, 0), -EIO);
	assert_reads(65536, 4096, 0);
	fixture.top.image->data->size = 16 << 20;
}

/* A file ends within its last cluster: the rest reads as zero. */
static void cut_off_co(void)
{
	uint64_t size = fixture.top.image->store->size;

	map_set_data(&fixture.top, 0, 4096, 1, false);
	fixture.top.image->store->size = ENTRY_OFFSET(fixture.top.entry[0]) + 1500;
	assert_int_equal(read_co(0, 4096), 0);
	assert_bytes(buffer, 1500, 1);
	assert_bytes(buffer + 1500, 4096 - 1500, 0);
	assert_reads(2048, 512, 0);
	fixture.top.image->store->size = size;
}

static void read_only_co(void)
{
	map_set_data(&fixture.top, 0, 4096, 1, false);
	assert_int_equal(write_co(0, 512, 1, 0), -EROFS);
	assert_int_equal(op_co(OX_IO_ZERO, 0, NULL, 4096, 0), -EROFS);
	assert_int_equal(op_co(OX_IO_FLUSH, 0, NULL, 0, 0), 0);
	assert_reads(0, 4096, 1);
	assert_int_equal(fixture.top.begins, 0);
}

static void test_limits(void **state)
{
	map_run(&(struct map_test){.fn_co = no_data_co});
	map_run(&(struct map_test){.fn_co = cut_off_co});
	map_run(&(struct map_test){.read_only = true, .fn_co = read_only_co});
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_kinds),          cmocka_unit_test(test_short_backing),
	        cmocka_unit_test(test_closed_backing), cmocka_unit_test(test_hits),
	        cmocka_unit_test(test_new_space),      cmocka_unit_test(test_durable),
	        cmocka_unit_test(test_clear),          cmocka_unit_test(test_unpacked),
	        cmocka_unit_test(test_crypto),         cmocka_unit_test(test_limits),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
