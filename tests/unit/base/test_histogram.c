/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Histograms: the error that a bucket may have, percentiles against the sorted samples.
 */
#include "base/histogram.h"
#include "base/base.h"
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

static uint64_t random_state = 88172645463325252ull;

static uint64_t next_random(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static void check_value(uint64_t ns)
{
	unsigned index = ox_histogram_index(ns);
	uint64_t floor = ox_histogram_floor(index), end;

	assert_true(index < OX_HISTOGRAM_BUCKETS);
	assert_true(floor <= ns);
	assert_int_equal(ox_histogram_index(floor), index);
	if (index == OX_HISTOGRAM_BUCKETS - 1)
		return;
	end = ox_histogram_floor(index + 1);
	assert_true(ns < end);
	/* At most 1/16 wide, exact below 16. */
	assert_true((end - floor) * 16 <= ox_max(floor, (uint64_t)16));
}

static void test_buckets(void **state)
{
	unsigned last = 0;

	for (uint64_t ns = 0; ns < 100000; ns++) {
		unsigned index = ox_histogram_index(ns);

		assert_true(index == last || index == last + 1);
		last = index;
		check_value(ns);
	}
	for (unsigned bit = 0; bit < 64; bit++) {
		uint64_t power = (uint64_t)1 << bit;

		check_value(power - 1);
		check_value(power);
		check_value(power + 1);
		check_value(power | (next_random() & (power - 1)));
	}
	check_value(UINT64_MAX);
	/* Everything up to 2^40 ns has a bucket of its own; the rest shares the last. */
	assert_true(ox_histogram_index((uint64_t)1 << 40) < OX_HISTOGRAM_BUCKETS - 1);
	assert_int_equal(ox_histogram_index(UINT64_MAX), OX_HISTOGRAM_BUCKETS - 1);
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void test_percentiles(void **state)
{
	enum { COUNT = 20000 };
	static uint64_t sample[COUNT];
	static struct ox_histogram h;
	uint64_t sum = 0;

	memset(&h, 0, sizeof(h));
	assert_int_equal(ox_histogram_percentile(&h, 50), 0);
	for (unsigned i = 0; i < COUNT; i++) {
		/* From 1 us to 16 ms, log-uniform. */
		sample[i] = (1000 + next_random() % 1000) << (next_random() % 14);
		sum += sample[i];
		ox_histogram_add(&h, sample[i]);
	}
	qsort(sample, COUNT, sizeof(sample[0]), compare);
	assert_int_equal(h.count, COUNT);
	assert_int_equal(h.sum, sum);
	assert_int_equal(h.max, sample[COUNT - 1]);
	for (unsigned p = 1; p <= 1000; p++) {
		double percent = p / 10.0;
		uint64_t exact = sample[(uint64_t)p * COUNT / 1000 - 1];
		uint64_t found = ox_histogram_percentile(&h, percent);
		uint64_t error = found > exact ? found - exact : exact - found;

		/* Half a bucket; a whole one for the luck of rounding the rank. */
		if (error * 16 > exact)
			fail_msg("p%.1f: %llu for %llu", percent, (unsigned long long)found,
			         (unsigned long long)exact);
	}
}

static void test_single_value(void **state)
{
	static struct ox_histogram h;

	memset(&h, 0, sizeof(h));
	ox_histogram_add(&h, 1000);
	/* Never beyond what was measured. */
	assert_true(ox_histogram_percentile(&h, 99.9) <= 1000);
	assert_true(ox_histogram_percentile(&h, 99.9) >= 1000 - 1000 / 16);
	assert_int_equal(ox_histogram_percentile(&h, 0.001), ox_histogram_percentile(&h, 100));
	memset(&h, 0, sizeof(h));
	ox_histogram_add(&h, UINT64_MAX / 2);
	assert_true(ox_histogram_percentile(&h, 50) == UINT64_MAX / 2);
}

static void test_merge(void **state)
{
	static struct ox_histogram a, b, both;

	memset(&a, 0, sizeof(a));
	memset(&b, 0, sizeof(b));
	memset(&both, 0, sizeof(both));
	for (unsigned i = 0; i < 1000; i++) {
		uint64_t ns = next_random() >> (next_random() % 60);

		ox_histogram_add(i % 3 ? &a : &b, ns);
		ox_histogram_add(&both, ns);
	}
	ox_histogram_merge(&a, &b);
	assert_memory_equal(&a, &both, sizeof(a));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_buckets),
	        cmocka_unit_test(test_percentiles),
	        cmocka_unit_test(test_single_value),
	        cmocka_unit_test(test_merge),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
