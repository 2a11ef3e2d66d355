/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzzing of whole images: the input is a file in a memory store.
 *
 * It is opened read-only: read, mapped, checked.  Then it is repaired, opened for writing, written
 * to, closed and checked again.  What is checked: no crash, no abort, no endless loop, bounded
 * memory; whatever a read answers, it answers; and an image that a repair left without corruption
 * stays without when it is written to.
 *
 * No backing or data file is opened: the input must not name files of this machine.
 */
#include "image.h"
#include "image/format.h"
#include "store/memory.h"
#include "tests/lib/image_kit.h"
#include <oxbow/log.h>
#include <stdio.h>
#include <string.h>

#define MOST   (1u << 20) /* bytes of a file */
#define CHUNK  (96u << 10)
#define PLACES 6u

#define CHECK(x)                 \
	do {                     \
		if (!(x))        \
			abort(); \
	} while (0)

static struct kit kit;
static uint8_t buffer[CHUNK];
static const char *format_name;

struct visit {
	const uint8_t *data;
	size_t size;
	bool write, check, fix;
	struct ox_image_check found;
	int check_result;
	uint64_t seed;
	struct ox_store *store;
};

/* Two guest clusters in one, which a repair leaves as it is: when one of them is rewritten, the
 * other is not marked as its cluster's only one, and that counts as an error. */
static void count_copied(void *arg, const char *line)
{
	if (strstr(line, "OFLAG_COPIED"))
		++*(uint64_t *)arg;
}

static void load_co(struct ox_image_channel *none, void *arg)
{
	struct visit *visit = arg;
	struct ox_channel *channel;
	struct ox_error err = {0};

	CHECK(ox_store_attach(visit->store, ox_iothread_loop(kit.thread[0]), &channel, &err) == 0);
	CHECK(ox_store_write_co(channel, 0, visit->data, visit->size, 0) == 0);
	ox_store_detach(channel);
}

static void load(const uint8_t *data, size_t size, const char *path)
{
	struct ox_store_options options = {.lock = OX_LOCK_NONE};
	struct visit visit = {.data = data, .size = size};
	struct kit_work work = {0, load_co, &visit};
	struct ox_error err = {0};

	CHECK(ox_store_open(path, &options, &visit.store, &err) == 0);
	kit_run(&kit, &work, 1);
	ox_store_close(visit.store);
}

/* A place of the disk that is likely to be of interest. */
static uint64_t place(struct ox_image *image, unsigned n, uint64_t *seed)
{
	uint64_t last = image->size > CHUNK ? image->size - CHUNK : 0;

	if (n == 0 || last == 0)
		return 0;
	if (n == 1)
		return ox_align_down(last, 512);
	return ox_align_down(kit_random(seed, ox_min(last, n & 1 ? UINT64_MAX : MOST)), 512);
}

static void read_co(struct ox_image_channel *channel, struct visit *visit)
{
	struct ox_image *image = channel->image;
	uint64_t seed = visit->seed, offset = 0;

	for (unsigned n = 0; n < PLACES; n++) {
		uint64_t at = place(image, n, &seed);
		size_t bytes = ox_min((uint64_t)CHUNK, image->size - at);

		(void)!ox_image_read_co(channel, at, buffer, bytes);
	}
	for (unsigned n = 0; n < 64 && offset < image->size; n++) {
		struct ox_map_entry entry = {0};

		if (ox_image_map_co(channel, offset, image->size - offset, &entry) < 0)
			break;
		CHECK(entry.offset == offset && entry.length > 0 &&
		      entry.length <= image->size - offset);
		offset += entry.length;
	}
}

static void write_co(struct ox_image_channel *channel, struct visit *visit)
{
	struct ox_image *image = channel->image;
	uint64_t seed = visit->seed;

	for (unsigned n = 0; n < 2 * PLACES; n++) {
		uint64_t at = place(image, n % PLACES, &seed) + kit_random(&seed, 8) * 512;
		uint64_t bytes = 512 + kit_random(&seed, 1 + kit_random(&seed, 32)) * 512;
		static const enum ox_io_op ops[] = {OX_IO_WRITE, OX_IO_ZERO, OX_IO_WRITE,
		                                    OX_IO_DISCARD};
		int ret;

		if (at >= image->size)
			continue;
		bytes = ox_min(bytes, image->size - at);
		memset(buffer, (int)n + 1, bytes);
		ret = kit_request_co(channel, ops[n % 4], at, buffer, bytes, 0,
		                     n % 8 == 1 ? OX_IO_MAY_UNMAP : 0);
		if (ret == 0 && n % 2 == 0) {
			memset(buffer, 0xee, bytes);
			CHECK(ox_image_read_co(channel, at, buffer, bytes) == 0);
			for (uint64_t i = 0; i < bytes; i++)
				CHECK(buffer[i] == n + 1);
		}
	}
	(void)!ox_image_request_co(channel, OX_IO_FLUSH, 0, 0, 0);
}

static void visit_co(struct ox_image_channel *channel, void *arg)
{
	struct visit *visit = arg;
	struct ox_error err = {0};

	if (!channel->image->data_file && !visit->fix)
		read_co(channel, visit);
	if (visit->write && !channel->image->data_file)
		write_co(channel, visit);
	if (visit->write)
		(void)!ox_image_finish_co(channel);
	visit->found.fix_errors = visit->found.fix_leaks = visit->fix;
	if (visit->check)
		visit->check_result = ox_image_check_co(channel, &visit->found, &err);
	CHECK(visit->check_result == 0 || err.code > 0);
	if (visit->fix)
		(void)!ox_image_finish_co(channel);
}

/* False: it does not open so. */
static bool go(const char *path, struct visit *visit, bool read_only)
{
	struct ox_image_options options = {
	        .format = format_name,
	        .store = {.read_only = read_only, .lock = read_only ? OX_LOCK_NONE : OX_LOCK_WRITE},
	        .allow.nothing = true,
	        .metadata_cache = 65536,
	        .for_check = visit->fix};
	struct kit_work work = {0, visit_co, visit};
	struct ox_error err = {0};

	if (kit_open(&kit, path, &options, &err) < 0) {
		CHECK(err.code > 0 && err.text[0]);
		return false;
	}
	kit_run(&kit, &work, 1);
	(void)!kit_close(&kit, false);
	return true;
}

void fuzz_image(const char *format, const uint8_t *data, size_t size)
{
	struct visit visit = {.check = true, .seed = 88172645463325252u};
	uint64_t copied = 0;
	char path[64];
	bool sound;

	if (size > MOST)
		return;
	if (kit.threads == 0) {
		ox_log_set_level((enum ox_log_level)0);
		setenv("OXBOW_RUN_DIR", "/nonexistent/oxbow", 1);
		kit_start(&kit, 1);
	}
	for (size_t i = 0; i < size; i += 1 + size / 64)
		visit.seed = (visit.seed ^ data[i]) * 1099511628211u | 1;
	format_name = format;
	snprintf(path, sizeof(path), "memory:fuzz:%zu", size);
	ox_memory_forget("fuzz");
	load(data, size, path);
	go(path, &visit, true);

	/* Whatever it is, it can be written to, or refuses to. */
	visit.write = true;
	go(path, &visit, false);

	/* From the beginning: repair, then write. */
	ox_memory_forget("fuzz");
	load(data, size, path);
	visit = (struct visit){.check = true, .fix = true, .seed = visit.seed};
	sound = go(path, &visit, false) && visit.check_result == 0 &&
	        visit.found.corruptions == 0 && visit.found.check_errors == 0;
	visit = (struct visit){.check = true, .write = true, .seed = visit.seed};
	visit.found.say = count_copied;
	visit.found.arg = &copied;
	if (go(path, &visit, false) && sound && visit.check_result == 0)
		CHECK(visit.found.corruptions <= copied);
	ox_memory_forget("fuzz");
}
