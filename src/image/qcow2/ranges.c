/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Which clusters of the file are metadata: so that a damaged or hostile map can never lead a
 * guest's writes there.
 *
 * A hash table of words, a bit a cluster, 64 clusters a word, open addressing.  It takes about 32
 * bytes for an isolated L2 table, any order of registering costs the same, and removal is simple;
 * the multiplier is the process's own, so that an image cannot choose offsets that collide.
 *
 * Locking: q->lock.
 */
#include "image/qcow2/alloc.h"
#include <errno.h>
#include <string.h>
#include <sys/random.h>

struct qcow2_word {
	uint64_t key; /* cluster / 64 + 1; 0: nothing here */
	uint64_t bits;
};

#define FIRST_ROOM 64u
/* No piece of metadata is larger (L1 is the largest); what an image says beyond that is not
 * believed, and costs no memory. */
#define MOST_BYTES (UINT64_C(64) << 20)

void qcow2_metadata_init(struct qcow2_allocator *a)
{
	if (getrandom(&a->word_seed, sizeof(a->word_seed), GRND_NONBLOCK) !=
	    (ssize_t)sizeof(a->word_seed))
		a->word_seed = ox_clock_ns() * UINT64_C(0x9e3779b97f4a7c15);
	a->word_room = FIRST_ROOM;
	a->words = ox_xcalloc(a->word_room, sizeof(*a->words));
}

void qcow2_metadata_free(struct qcow2_allocator *a)
{
	free(a->words);
	a->words = NULL;
}

static size_t slot_of(const struct qcow2_allocator *a, uint64_t key)
{
	uint64_t h = key ^ a->word_seed;

	h = (h ^ h >> 32) * UINT64_C(0xd6e8feb86659fd93);
	h = (h ^ h >> 32) * (a->word_seed | 1);
	return (size_t)(h ^ h >> 29) & (a->word_room - 1);
}

/* The key's word, or the empty one where it belongs. */
static struct qcow2_word *find(const struct qcow2_allocator *a, uint64_t key)
{
	size_t slot = slot_of(a, key);

	while (a->words[slot].key && a->words[slot].key != key)
		slot = (slot + 1) & (a->word_room - 1);
	return &a->words[slot];
}

static uint64_t word_of(const struct qcow2_allocator *a, uint64_t cluster)
{
	return find(a, cluster / 64 + 1)->bits;
}

bool qcow2_is_metadata(const struct qcow2_allocator *a, uint64_t cluster)
{
	return word_of(a, cluster) >> cluster % 64 & 1;
}

static void grow(struct qcow2_allocator *a)
{
	struct qcow2_word *old = a->words;
	size_t old_room = a->word_room;

	/* Every word stands for metadata that the image really has, whose number is bounded: by
	 * the sizes of L1 and the refcount table. */
	a->word_room *= 2;
	a->words = ox_xcalloc(a->word_room, sizeof(*a->words));
	a->word_count = 0;
	for (size_t i = 0; i < old_room; i++) {
		/* A word that was emptied goes now. */
		if (!old[i].key || !old[i].bits)
			continue;
		*find(a, old[i].key) = old[i];
		a->word_count++;
	}
	free(old);
}

/* The bits of the word with `key` that [first, last] has. */
static uint64_t mask_of(uint64_t key, uint64_t first, uint64_t last)
{
	uint64_t mask = UINT64_MAX;

	if (first / 64 == key)
		mask &= UINT64_MAX << first % 64;
	if (last / 64 == key)
		mask &= UINT64_MAX >> (63 - last % 64);
	return mask;
}

/* The clusters that the bytes touch; false: none, or beyond what an offset can say. */
static bool touched(const struct qcow2 *q, uint64_t host, uint64_t bytes, uint64_t *first,
                    uint64_t *last)
{
	if (bytes == 0 || !ox_range_within(host, bytes, INT64_MAX))
		return false;
	*first = host >> q->cluster_bits;
	*last = (host + bytes - 1) >> q->cluster_bits;
	return true;
}

void qcow2_add_metadata_range(struct qcow2 *q, uint64_t host, uint64_t bytes)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t first, last;

	if (!touched(q, host, ox_min(bytes, MOST_BYTES), &first, &last))
		return;
	for (uint64_t key = first / 64; key <= last / 64; key++) {
		struct qcow2_word *word;

		if ((a->word_count + 1) * 4 > a->word_room * 3)
			grow(a);
		word = find(a, key + 1);
		if (!word->key) {
			word->key = key + 1;
			a->word_count++;
		}
		word->bits |= mask_of(key, first, last);
	}
}

void qcow2_remove_metadata_range(struct qcow2 *q, uint64_t host, uint64_t bytes)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t first, last;

	if (!touched(q, host, ox_min(bytes, MOST_BYTES), &first, &last))
		return;
	for (uint64_t key = first / 64; key <= last / 64; key++) {
		struct qcow2_word *word = find(a, key + 1);

		if (word->key)
			word->bits &= ~mask_of(key, first, last);
	}
}

bool qcow2_is_data_range(struct qcow2 *q, uint64_t host, uint64_t bytes)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t size = __atomic_load_n(&q->image->store->size, __ATOMIC_RELAXED);
	uint64_t first, last, limit = qcow2_file_clusters(q, ox_min(size, (uint64_t)INT64_MAX));

	if (a->begun)
		limit = ox_max(limit, a->frontier);
	if (!touched(q, host, bytes, &first, &last) || last >= limit)
		return false;
	for (uint64_t key = first / 64; key <= last / 64; key++) {
		if (find(a, key + 1)->bits & mask_of(key, first, last))
			return false;
	}
	return true;
}
