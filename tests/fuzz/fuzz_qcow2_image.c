/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a whole qcow2 image.  Input: the file.
 *
 * Most random changes of a file hit data, so the mutator knows where the metadata is: it follows
 * the header to a structure, and puts something into one of its entries that is nearly right.
 */
#include "image.h"
#include "base/base.h"
#include "base/byteorder.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	fuzz_image("qcow2", data, size);
	return 0;
}

static uint64_t random_number(uint64_t *seed, uint64_t below)
{
	*seed = *seed * 6364136223846793005u + 1442695040888963407u;
	return (*seed >> 33) % below;
}

/* The header's fields: offset, bytes. */
static const uint8_t fields[][2] = {
        {4, 4},   {8, 8},   {16, 4},  {20, 4},  {24, 8},  {32, 4},  {36, 4},  {40, 8},
        {48, 8},  {56, 4},  {60, 4},  {64, 8},  {72, 8},  {80, 8},  {88, 8},  {96, 4},
        {100, 4}, {104, 1}, {112, 8}, {120, 8}, {128, 8}, {136, 8}, {144, 8},
};

struct image {
	uint8_t *data;
	size_t size;
	uint64_t cluster;
	uint64_t *seed;
};

static uint64_t load(const struct image *image, uint64_t at)
{
	return at + 8 <= image->size ? ox_get_be64(image->data + at) : 0;
}

/* A value that could stand there. */
static uint64_t value(const struct image *image, uint64_t old)
{
	uint64_t clusters = image->size / image->cluster + 2;
	uint64_t offset = random_number(image->seed, clusters) * image->cluster;

	switch (random_number(image->seed, 11)) {
	case 0:
		return 0;
	case 1:
		return old ^ 1ull << random_number(image->seed, 64);
	case 2:
		return offset;
	case 3:
		return offset | 1ull << 63;
	case 4:
		return offset | 1ull << 63 | 1;
	case 5: /* compressed */
		return offset + random_number(image->seed, image->cluster) | 1ull << 62 |
		       random_number(image->seed, 16) << 54;
	case 6:
		return old + image->cluster;
	case 7:
		return old - 1 + 2 * random_number(image->seed, 2);
	case 8: /* a bitmap of subclusters */
		return random_number(image->seed, UINT32_MAX) << 32 |
		       random_number(image->seed, UINT32_MAX);
	case 9:
		return UINT64_MAX >> random_number(image->seed, 64);
	default: /* somebody else's */
		return load(image, random_number(image->seed, image->size / 8 + 1) * 8);
	}
}

static void put(const struct image *image, uint64_t at, unsigned bytes)
{
	uint8_t raw[8];
	uint64_t old = 0;

	if (at > image->size || bytes > image->size - at)
		return;
	for (unsigned i = 0; i < bytes; i++)
		old = old << 8 | image->data[at + i];
	ox_put_be64(raw, value(image, old));
	memcpy(image->data + at, raw + 8 - bytes, bytes);
}

static uint64_t pick(const struct image *image, uint64_t table, uint64_t entries)
{
	return table + random_number(image->seed, entries ? entries : 1) * 8;
}

/* An entry of a table that is found by following the header. */
static uint64_t find_entry(const struct image *image)
{
	uint64_t l1 = load(image, 40), table = load(image, 48);
	uint64_t l1_entries = ox_get_be32(image->data + 36) % 4096;
	uint64_t l2, block;

	switch (random_number(image->seed, 8)) {
	case 0:
		return pick(image, l1, l1_entries);
	case 1:
	case 2:
	case 3: /* L2; small disks: mostly the first entries */
		l2 = load(image, pick(image, l1, l1_entries)) & 0x00fffffffffffe00ull;
		return pick(image, l2, image->cluster / 8);
	case 4:
		return pick(image, table, 8);
	case 5:
		block = load(image, table) & ~511ull;
		return pick(image, block, ox_min(image->cluster / 8, (uint64_t)32));
	case 6: /* snapshots */
		return pick(image, load(image, 64), 16);
	default: /* the bitmap directory: where an extension of the header says */
		for (uint64_t at = 104; at + 32 <= ox_min(image->cluster, image->size); at += 8) {
			if (ox_get_be32(image->data + at) == 0x23852875)
				return pick(image, load(image, at + 24), 8);
		}
		return pick(image, 0, 64);
	}
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
	uint64_t state = seed | 1ull << 40;
	struct image image = {data, size, 512, &state};

	if (size < 512 || random_number(&state, 8) == 0)
		return LLVMFuzzerMutate(data, size, max_size);
	image.cluster = 1ull << ox_min(ox_get_be32(data + 20), 16u);
	image.cluster = ox_max(image.cluster, (uint64_t)512);
	for (unsigned n = 1 + (unsigned)random_number(&state, 4); n > 0; n--) {
		if (random_number(&state, 5) == 0) {
			const uint8_t *field = fields[random_number(&state, OX_ARRAY_SIZE(fields))];

			put(&image, field[0], field[1]);
		} else {
			uint64_t at = find_entry(&image);

			put(&image, at, 8);
			if (random_number(&state, 4) == 0)
				put(&image, at + 8, 8);
		}
	}
	return size;
}
