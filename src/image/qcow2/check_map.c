/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Counters for a check, one a cluster, compact: two bits each in chunks of 16,384, until one of a
 * chunk needs more.  Tables refer to clusters in long runs, so that everything works on words of 32
 * counters.
 *
 * Memory that is not there is an error, never an end: what an image says decides how much is asked
 * for.
 */
#include "image/qcow2/check.h"
#include <errno.h>
#include <string.h>

#define LOW_BITS 0x5555555555555555ull

/* Every counter of a word. */
static const uint64_t pattern[4] = {0, LOW_BITS, LOW_BITS << 1, ~0ull};

int check_map_init(struct check_map *map, uint64_t first, uint64_t count)
{
	uint64_t chunks = (count + CHECK_CHUNK - 1) >> CHECK_CHUNK_SHIFT;

	*map = (struct check_map){.first = first, .count = count};
	if (chunks > CHECK_MAP_LIMIT / sizeof(*map->chunks))
		return -ENOMEM;
	map->chunks = calloc(chunks ? chunks : 1, sizeof(*map->chunks));
	return map->chunks ? 0 : -ENOMEM;
}

void check_map_free(struct check_map *map)
{
	uint64_t chunks = (map->count + CHECK_CHUNK - 1) >> CHECK_CHUNK_SHIFT;

	if (!map->chunks)
		return;
	for (uint64_t i = 0; i < chunks; i++)
		free(map->chunks[i].data);
	free(map->chunks);
	*map = (struct check_map){.first = 0};
}

/* The part of [*first, *first + *count) that the map has, counted from its first cluster. */
static bool clip(const struct check_map *map, uint64_t *first, uint64_t *count)
{
	uint64_t end;

	if (*count == 0 || *first >= map->first + map->count)
		return false;
	end = *count > UINT64_MAX - *first ? UINT64_MAX : *first + *count;
	if (end <= map->first)
		return false;
	*first = ox_max(*first, map->first) - map->first;
	*count = ox_min(end - map->first, map->count) - *first;
	return true;
}

static size_t chunk_bytes(unsigned bits)
{
	return (size_t)CHECK_CHUNK * bits / 8;
}

static int chunk_make(struct check_map *map, struct check_chunk *chunk, unsigned bits)
{
	if (map->bytes + chunk_bytes(bits) > CHECK_MAP_LIMIT)
		return -ENOMEM;
	chunk->data = calloc(1, chunk_bytes(bits));
	if (!chunk->data)
		return -ENOMEM;
	chunk->bits = bits;
	map->bytes += chunk_bytes(bits);
	return 0;
}

static uint32_t chunk_get(const struct check_chunk *chunk, unsigned at)
{
	if (!chunk->data)
		return 0;
	switch (chunk->bits) {
	case 2:
		return ((const uint64_t *)chunk->data)[at / 32] >> (at % 32 * 2) & 3;
	case 8:
		return ((const uint8_t *)chunk->data)[at];
	case 16:
		return ((const uint16_t *)chunk->data)[at];
	default:
		return ((const uint32_t *)chunk->data)[at];
	}
}

static void chunk_put(struct check_chunk *chunk, unsigned at, uint32_t value)
{
	uint64_t *word;

	switch (chunk->bits) {
	case 2:
		word = (uint64_t *)chunk->data + at / 32;
		*word = (*word & ~(3ull << (at % 32 * 2))) | (uint64_t)value << (at % 32 * 2);
		break;
	case 8:
		((uint8_t *)chunk->data)[at] = (uint8_t)value;
		break;
	case 16:
		((uint16_t *)chunk->data)[at] = (uint16_t)value;
		break;
	default:
		((uint32_t *)chunk->data)[at] = value;
	}
}

static int chunk_widen(struct check_map *map, struct check_chunk *chunk)
{
	struct check_chunk wide = {.data = NULL};
	int rc = chunk_make(map, &wide, chunk->bits == 2 ? 8 : chunk->bits * 2);

	if (rc < 0)
		return rc;
	for (unsigned i = 0; i < CHECK_CHUNK; i++)
		chunk_put(&wide, i, chunk_get(chunk, i));
	map->bytes -= chunk_bytes(chunk->bits);
	free(chunk->data);
	*chunk = wide;
	return 0;
}

/* The counters [from, from + count) of a word. */
static uint64_t word_mask(unsigned from, unsigned count)
{
	uint64_t mask = count >= 32 ? ~0ull : (1ull << (count * 2)) - 1;

	return mask << (from * 2);
}

/* Adds to counters of two bits; false: one of them is too small. */
static bool add_to_word(uint64_t *word, uint64_t mask, uint32_t by)
{
	uint64_t low = *word & LOW_BITS & mask, high = (*word >> 1) & LOW_BITS & mask;

	if (by > 3 || (by == 1 && (low & high)) || (by == 2 && high) || (by == 3 && (low | high)))
		return false;
	*word += pattern[by] & mask;
	return true;
}

static int chunk_add(struct check_map *map, struct check_chunk *chunk, unsigned at, unsigned count,
                     uint32_t by)
{
	static const uint32_t most[33] = {
	        [2] = 3, [8] = UINT8_MAX, [16] = UINT16_MAX, [32] = UINT32_MAX};
	int rc;

	if (!chunk->data) {
		rc = chunk_make(map, chunk, 2);
		if (rc < 0)
			return rc;
	}
	while (count > 0 && chunk->bits == 2) {
		unsigned part = ox_min(count, 32 - at % 32);

		if (!add_to_word((uint64_t *)chunk->data + at / 32, word_mask(at % 32, part), by)) {
			rc = chunk_widen(map, chunk);
			if (rc < 0)
				return rc;
			break;
		}
		at += part;
		count -= part;
	}
	for (; count > 0; at++, count--) {
		uint32_t value = chunk_get(chunk, at);

		value = value > UINT32_MAX - by ? UINT32_MAX : value + by;
		while (value > most[chunk->bits]) {
			rc = chunk_widen(map, chunk);
			if (rc < 0)
				return rc;
		}
		chunk_put(chunk, at, value);
	}
	return 0;
}

int check_map_add(struct check_map *map, uint64_t first, uint64_t count, uint32_t by)
{
	if (!clip(map, &first, &count))
		return 0;
	while (count > 0) {
		unsigned at = first % CHECK_CHUNK;
		unsigned part = ox_min(count, (uint64_t)(CHECK_CHUNK - at));
		int rc = chunk_add(map, &map->chunks[first >> CHECK_CHUNK_SHIFT], at, part, by);

		if (rc < 0)
			return rc;
		first += part;
		count -= part;
	}
	return 0;
}

uint32_t check_map_get(const struct check_map *map, uint64_t cluster)
{
	if (cluster < map->first || cluster - map->first >= map->count)
		return 0;
	cluster -= map->first;
	return chunk_get(&map->chunks[cluster >> CHECK_CHUNK_SHIFT], cluster % CHECK_CHUNK);
}

void check_map_drop(struct check_map *map, uint64_t cluster)
{
	uint32_t value = check_map_get(map, cluster);

	if (!value)
		return;
	cluster -= map->first;
	chunk_put(&map->chunks[cluster >> CHECK_CHUNK_SHIFT], cluster % CHECK_CHUNK, value - 1);
}

int check_map_set(struct check_map *map, uint64_t first, uint64_t count, unsigned value)
{
	if (!clip(map, &first, &count))
		return 0;
	while (count > 0) {
		struct check_chunk *chunk = &map->chunks[first >> CHECK_CHUNK_SHIFT];
		unsigned at = first % CHECK_CHUNK % 32;
		unsigned part = ox_min(count, (uint64_t)(32 - at));
		uint64_t mask = word_mask(at, part), *word;

		if (!chunk->data && value) {
			int rc = chunk_make(map, chunk, 2);

			if (rc < 0)
				return rc;
		}
		if (chunk->data) {
			word = (uint64_t *)chunk->data + first % CHECK_CHUNK / 32;
			*word = (*word & ~mask) | (pattern[value] & mask);
		}
		first += part;
		count -= part;
	}
	return 0;
}

/* Is there a counter in the range that equals value (`equal`), or one that does not? */
static bool has(const struct check_map *map, uint64_t first, uint64_t count, unsigned value,
                bool equal)
{
	if (!clip(map, &first, &count))
		return false;
	while (count > 0) {
		const struct check_chunk *chunk = &map->chunks[first >> CHECK_CHUNK_SHIFT];
		unsigned at = first % CHECK_CHUNK % 32;
		unsigned part = ox_min(count, (uint64_t)(32 - at));
		uint64_t word = 0, other;

		if (chunk->data)
			word = ((const uint64_t *)chunk->data)[first % CHECK_CHUNK / 32];
		word ^= pattern[value];
		other = (word | word >> 1) & LOW_BITS; /* a bit for each that is not equal */
		if ((equal ? ~other & LOW_BITS : other) & word_mask(at, part))
			return true;
		first += part;
		count -= part;
	}
	return false;
}

bool check_map_all(const struct check_map *map, uint64_t first, uint64_t count, unsigned value)
{
	return !has(map, first, count, value, false);
}

bool check_map_none(const struct check_map *map, uint64_t first, uint64_t count, unsigned value)
{
	return !has(map, first, count, value, true);
}

bool check_map_same(const struct check_map *a, const struct check_map *b, uint64_t chunk)
{
	const struct check_chunk *ca = &a->chunks[chunk], *cb = &b->chunks[chunk];
	const uint64_t *wa = ca->data, *wb = cb->data;
	uint64_t differ = 0;

	if (!wa && !wb)
		return true;
	if ((wa && ca->bits != 2) || (wb && cb->bits != 2))
		return false;
	for (unsigned i = 0; i < CHECK_CHUNK_WORDS; i++) {
		uint64_t va = wa ? wa[i] : 0, vb = wb ? wb[i] : 0;

		differ |= (va ^ vb) | (va & va >> 1 & LOW_BITS);
	}
	return differ == 0;
}

uint64_t check_map_end(const struct check_map *a, const struct check_map *b)
{
	for (uint64_t chunk = (a->count + CHECK_CHUNK - 1) >> CHECK_CHUNK_SHIFT; chunk-- > 0;) {
		if (!a->chunks[chunk].data && !b->chunks[chunk].data)
			continue;
		for (unsigned at = CHECK_CHUNK; at-- > 0;) {
			if (chunk_get(&a->chunks[chunk], at) || chunk_get(&b->chunks[chunk], at))
				return a->first + (chunk << CHECK_CHUNK_SHIFT) + at + 1;
		}
	}
	return 0;
}
