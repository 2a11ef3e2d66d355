/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Latency histograms: log-linear, 16 steps per power of two (at most 6.25 % wide), from 0 to
 * 2^41 ns (36 minutes; longer counts in the last bucket).  One writer, any reader: counters are
 * read relaxed, a reader may see a sum and buckets that are one sample apart.
 */
#ifndef OX_BASE_HISTOGRAM_H
#define OX_BASE_HISTOGRAM_H

#include <stdint.h>

#define OX_HISTOGRAM_BUCKETS 608

struct ox_histogram {
	uint64_t count;
	uint64_t sum; /* ns */
	uint64_t max; /* ns */
	uint64_t bucket[OX_HISTOGRAM_BUCKETS];
};

/* Which bucket ns falls into, and the smallest value that falls into a bucket. */
unsigned ox_histogram_index(uint64_t ns);
uint64_t ox_histogram_floor(unsigned index);

void ox_histogram_add(struct ox_histogram *h, uint64_t ns);
/* *to += *from. */
void ox_histogram_merge(struct ox_histogram *to, const struct ox_histogram *from);
/* The value (ns, middle of its bucket) below which `percent` of the samples lie; 0 if empty.
 * 0 < percent <= 100. */
uint64_t ox_histogram_percentile(const struct ox_histogram *h, double percent);

#endif
