/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: whole qed images, opened, mapped, read, written, checked and repaired.
 *
 * Input: 2 bytes: the file's size in units of 512 (below 4 MiB); 80 bytes: what it begins with;
 * then records of 11 bytes: 3 bytes: where, in units of 8 bytes, modulo the file's size, and the 8
 * bytes there.  Shorter input reads as zeroes.  That reaches every part of a file with few bytes.
 *
 * What is checked, besides that nothing ends or hangs the process: what was written is read back; a
 * second check agrees with the first; after a whole repair there is nothing left to repair.
 */
#include "base/fiber.h"
#include "base/byteorder.h"
#include "image/format.h"
#include "store/memory.h"
#include <oxbow/log.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME     "memory:fuzz:0"
#define FILE_MAX (4u << 20)
#define HEAD     80u
#define RECORD   11u
#define EXTENTS  64
#define IO_BYTES 3000u
#define DISK_MAX (UINT64_C(1) << 40)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct file {
	struct ox_store *store;
	struct ox_loop *loop;
	const uint8_t *bytes;
};

static void require(bool ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "fuzz_qed: %s\n", what);
	abort();
}

static void fill_co(void *arg)
{
	struct file *file = arg;
	struct ox_channel *channel;

	require(ox_store_attach(file->store, file->loop, &channel, NULL) == 0, "attach");
	require(ox_store_write_co(channel, 0, file->bytes, file->store->size, 0) == 0, "fill");
	ox_store_detach(channel);
}

static void put_file(const uint8_t *bytes, size_t size)
{
	struct ox_store_options options = {.lock = OX_LOCK_NONE};
	struct ox_loop_options loop_options = {.name = "fuzz"};
	struct file file = {.bytes = bytes, .loop = ox_loop_new(&loop_options, NULL)};

	ox_memory_forget("fuzz");
	require(file.loop && ox_store_open(NAME, &options, &file.store, NULL) == 0, "store");
	require(ox_store_truncate(file.store, size, OX_PREALLOC_OFF, NULL, NULL, NULL) == 0,
	        "truncate");
	if (size > 0)
		ox_loop_run_fiber(file.loop, fill_co, &file);
	ox_store_close(file.store);
	ox_loop_free(file.loop);
}

/* Some places all over the disk, both ends among them. */
static uint64_t place(uint64_t size, unsigned i)
{
	uint64_t at = i == 0 ? 0 : i == 1 ? size - ox_min(size, (uint64_t)IO_BYTES) : size / 7 * i;

	return at % (size - ox_min(size, (uint64_t)IO_BYTES) + 1);
}

static int read_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	uint64_t size = channel->image->size;
	struct ox_map_entry entry;
	uint8_t buf[IO_BYTES];
	uint64_t at = 0;

	for (int i = 0; i < EXTENTS && at < size; i++) {
		if (ox_image_map_co(channel, at, size - at, &entry) < 0)
			break;
		require(entry.length > 0 && entry.length <= size - at, "a map entry's length");
		at += entry.length;
	}
	for (unsigned i = 0; i < 7 && size > 0; i++)
		(void)!ox_image_read_co(channel, place(size, i), buf,
		                        ox_min(size, (uint64_t)IO_BYTES));
	return 0;
}

static int write_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	uint64_t size = channel->image->size;
	size_t bytes = ox_min(size, (uint64_t)IO_BYTES);
	uint8_t buf[IO_BYTES], back[IO_BYTES];

	for (unsigned i = 0; i < 7 && size > 0; i++) {
		memset(buf, 0x41 + i, bytes);
		if (ox_image_write_co(channel, place(size, i), buf, bytes, 0) < 0)
			continue;
		require(ox_image_read_co(channel, place(size, i), back, bytes) == 0 &&
		                memcmp(buf, back, bytes) == 0,
		        "what was written is not there");
	}
	if (size > 0 && size <= DISK_MAX &&
	    ox_image_request_co(channel, OX_IO_ZERO, size / 3, ox_min(size - size / 3, 1u << 26),
	                        0) == 0 &&
	    ox_image_read_co(channel, size / 3, back, ox_min(size - size / 3, IO_BYTES)) == 0)
		require(back[0] == 0, "what was zeroed is not zero");
	return 0;
}

static int check_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	return ox_image_check_co(channel, arg, err);
}

static int with(struct ox_image_options *options,
                int (*fn_co)(struct ox_image_channel *channel, void *arg, struct ox_error *err),
                void *arg)
{
	struct ox_error err = {0};
	int rc = ox_image_with(NAME, options, fn_co, arg, &err);

	require(rc >= 0 || err.code != 0, "an error without a sentence");
	return rc;
}

static void try_image(void)
{
	struct ox_image_options options = {.format = "qed",
	                                   .store = {.read_only = true, .lock = OX_LOCK_NONE},
	                                   .allow = {.nothing = true},
	                                   .for_check = true,
	                                   .metadata_cache = 1};
	struct ox_image_check first = {0}, second = {0},
	                      repair = {.fix_leaks = true, .fix_errors = true};
	struct ox_image_check after = {0};

	if (with(&options, read_co, NULL) < 0)
		return;
	if (with(&options, check_co, &first) == 0) {
		require(with(&options, check_co, &second) == 0, "the second check fails");
		require(first.corruptions == second.corruptions && first.leaks == second.leaks &&
		                first.allocated_clusters == second.allocated_clusters,
		        "two checks differ");
	}
	options.store = (struct ox_store_options){.lock = OX_LOCK_WRITE};
	options.for_check = false;
	(void)!with(&options, write_co, NULL);
	options.for_check = true;
	if (with(&options, check_co, &repair) < 0)
		return;
	/* There is a limit to what it copies. */
	if (repair.corruptions > 0)
		return;
	require(with(&options, check_co, &after) == 0, "the check after the repair fails");
	require(after.corruptions == 0, "the repair was not one");
	options.for_check = false;
	require(with(&options, write_co, NULL) == 0, "a repaired image cannot be opened");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t bytes = size < 2 ? 0 : ((size_t)ox_get_le16(data) * 512) % FILE_MAX;
	size_t head = size < 2 ? 0 : ox_min(size - 2, (size_t)HEAD);
	uint8_t *file = calloc(1, bytes + 8);

	if (!file)
		abort();
	ox_log_set_level((enum ox_log_level)0);
	if (head > 0)
		memcpy(file, data + 2, ox_min(head, bytes));
	for (size_t at = 2 + HEAD; at + RECORD <= size && bytes >= 8; at += RECORD) {
		uint64_t where = (data[at] | data[at + 1] << 8 | data[at + 2] << 16) % (bytes / 8);

		if (where * 8 >= HEAD)
			memcpy(file + where * 8, data + at + 3, 8);
	}
	put_file(file, bytes);
	free(file);
	try_image();
	ox_memory_forget("fuzz");
	return 0;
}
