/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Latency histograms.
 *
 * Buckets 0 to 15 hold one value each.  From there on each power of two is cut into 16 steps:
 * the exponent and the four bits below the leading one make the index.
 *
 * One thread writes a histogram, so adding needs no atomic read-modify-write; a plain store of
 * each counter is enough for readers to see old or new, never a torn value.
 */
#include "base/histogram.h"
#include "base/base.h"

#define STEP_BITS 4u
#define STEPS     (1u << STEP_BITS)

static uint64_t peek(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static void poke(uint64_t *counter, uint64_t value)
{
	__atomic_store_n(counter, value, __ATOMIC_RELAXED);
}

unsigned ox_histogram_index(uint64_t ns)
{
	unsigned exponent, index;

	if (ns < STEPS)
		return (unsigned)ns;
	exponent = 63u - (unsigned)__builtin_clzll(ns);
	index = (exponent - STEP_BITS + 1) * STEPS +
	        (unsigned)((ns >> (exponent - STEP_BITS)) & (STEPS - 1));
	return ox_min(index, OX_HISTOGRAM_BUCKETS - 1u);
}

uint64_t ox_histogram_floor(unsigned index)
{
	if (index < STEPS)
		return index;
	return (uint64_t)(STEPS + index % STEPS) << (index / STEPS - 1);
}

void ox_histogram_add(struct ox_histogram *h, uint64_t ns)
{
	uint64_t *bucket = &h->bucket[ox_histogram_index(ns)];

	poke(bucket, *bucket + 1);
	poke(&h->count, h->count + 1);
	poke(&h->sum, h->sum + ns);
	if (ns > h->max)
		poke(&h->max, ns);
}

void ox_histogram_merge(struct ox_histogram *to, const struct ox_histogram *from)
{
	for (unsigned i = 0; i < OX_HISTOGRAM_BUCKETS; i++)
		poke(&to->bucket[i], to->bucket[i] + peek(&from->bucket[i]));
	poke(&to->count, to->count + peek(&from->count));
	poke(&to->sum, to->sum + peek(&from->sum));
	poke(&to->max, ox_max(to->max, peek(&from->max)));
}

uint64_t ox_histogram_percentile(const struct ox_histogram *h, double percent)
{
	uint64_t total = 0, seen = 0, max = peek(&h->max);
	double wanted;

	/* Not h->count: it may be a sample ahead of the buckets or behind them. */
	for (unsigned i = 0; i < OX_HISTOGRAM_BUCKETS; i++)
		total += peek(&h->bucket[i]);
	if (!total)
		return 0;
	wanted = (double)total * percent / 100.0;
	for (unsigned i = 0; i < OX_HISTOGRAM_BUCKETS; i++) {
		uint64_t floor = ox_histogram_floor(i), middle;

		seen += peek(&h->bucket[i]);
		if ((double)seen < wanted || !seen)
			continue;
		/* The last bucket has no end; its best guess is the largest value seen. */
		if (i == OX_HISTOGRAM_BUCKETS - 1)
			return ox_max(max, floor);
		middle = floor + (ox_histogram_floor(i + 1) - floor) / 2;
		/* Never more than was ever measured. */
		return max >= floor ? ox_min(middle, max) : middle;
	}
	return max;
}
