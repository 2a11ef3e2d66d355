/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Refcounts of every width, refcount tables that make no sense, and what memory knows of metadata.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "qcow2_world.h"
#include "store/memory.h"
#include <errno.h>
#include <string.h>

/* --- entries -------------------------------------------------------------------------------- */

#define ENTRIES 256u

static void test_widths(void **state)
{
	for (unsigned order = 0; order <= 6; order++) {
		unsigned bits = 1u << order, seed = order;
		uint64_t model[ENTRIES] = {0}, most = UINT64_MAX >> (64 - bits);
		uint8_t block[ENTRIES * 8] = {0};

		for (unsigned i = 0; i < 5000; i++) {
			unsigned at = (seed = seed * 1103515245u + 12345u) >> 8 & (ENTRIES - 1);
			uint64_t value = ((uint64_t)seed << 32 | (seed ^ 0x9e3779b9u)) & most;

			model[at] = value;
			qcow2_refcount_set(block, bits, at, value);
			for (unsigned k = 0; i % 50 == 0 && k < ENTRIES; k++)
				must(qcow2_refcount_get(block, bits, k) == model[k]);
			must(qcow2_refcount_get(block, bits, at) == value);
		}
		/* Nothing behind the last entry. */
		for (unsigned k = ENTRIES * bits / 8; k < sizeof(block); k++)
			must_be(block[k], 0);
	}
}

/* The specification's picture: within a byte the first entry is the lowest bits; else big endian.
 */
static void test_layout(void **state)
{
	uint8_t block[16] = {0};

	qcow2_refcount_set(block, 1, 0, 1);
	qcow2_refcount_set(block, 1, 9, 1);
	must_be(block[0], 0x01);
	must_be(block[1], 0x02);
	memset(block, 0, sizeof(block));
	qcow2_refcount_set(block, 2, 1, 2);
	qcow2_refcount_set(block, 2, 7, 3);
	must_be(block[0], 0x08);
	must_be(block[1], 0xc0);
	memset(block, 0, sizeof(block));
	qcow2_refcount_set(block, 4, 1, 10);
	must_be(block[0], 0xa0);
	memset(block, 0, sizeof(block));
	qcow2_refcount_set(block, 16, 1, 0x1234);
	must_be(block[2], 0x12);
	must_be(block[3], 0x34);
	memset(block, 0, sizeof(block));
	qcow2_refcount_set(block, 64, 1, 0x0102030405060708);
	must_be(block[8], 1);
	must_be(block[15], 8);
}

/* --- counting -----------------------------------------------------------------------------------
 */

struct freed {
	uint64_t first, count;
	unsigned calls;
};

static void note_freed(void *arg, uint64_t first, uint64_t count)
{
	struct freed *freed = arg;

	if (freed->calls++ == 0)
		freed->first = first;
	freed->count += count;
}

static void count_co(void *arg)
{
	struct world *w = arg;
	struct qcow2 *q = &w->q;
	struct ox_image_channel *channel = &w->channel;
	uint64_t host, first, most = UINT64_MAX >> (64 - q->refcount_bits), count;
	struct freed freed = {.calls = 0};
	struct ox_range range;

	must_be(qcow2_alloc_metadata_co(channel, 600, &host), 0);
	first = host >> q->cluster_bits;
	qcow2_gate_enter_co(q->alloc, &range, channel);
	if (most > 1) {
		must_be(qcow2_count_co(channel, first + 100, 300, QCOW2_COUNT_UP, NULL, NULL), 0);
		must_be(qcow2_count_co(channel, first, 600, QCOW2_COUNT_DOWN, note_freed, &freed),
		        0);
		must_be(freed.first, first);
		must_be(freed.count, 300);
		must_be(qcow2_count_co(channel, first + 100, 300, QCOW2_COUNT_DOWN, note_freed,
		                       &freed),
		        0);
		must_be(freed.count, 600);
	} else {
		must_be(qcow2_count_co(channel, first, 600, QCOW2_COUNT_DOWN, note_freed, &freed),
		        0);
		must_be(freed.count, 600);
	}
	/* Below 0 is damage; above the width's maximum is refused; neither changes the count. */
	must_be(qcow2_count_co(channel, first + 5, 1, QCOW2_COUNT_DOWN, note_freed, &freed),
	        -EUCLEAN);
	must_be(freed.count, 600);
	if (most <= UINT16_MAX) {
		for (uint64_t i = 0; i < most; i++)
			must_be(qcow2_count_co(channel, first + 7, 1, QCOW2_COUNT_UP, NULL, NULL),
			        0);
		must_be(qcow2_count_co(channel, first + 7, 1, QCOW2_COUNT_UP, NULL, NULL), -ERANGE);
	}
	qcow2_gate_leave(q->alloc, &range);
	must_be(qcow2_refcount_co(channel, first + 7, &count), 0);
	must(count == (most <= UINT16_MAX ? most : 0));
	must_be(qcow2_refcount_co(channel, first + 5, &count), 0);
	must_be(count, 0);
	/* Far behind everything. */
	must_be(qcow2_refcount_co(channel, UINT64_C(1) << 46, &count), 0);
	must_be(count, 0);
}

static void test_count(void **state)
{
	for (unsigned order = 0; order <= 6; order++) {
		struct shape shape = {order % 2 ? 9 : 12, order, 4u << 20};
		struct world w;

		world_make("memory:count:0", &shape);
		world_open(&w, "memory:count:0", NULL);
		world_run(&w, count_co, &w);
		world_close(&w);
		ox_memory_forget("count");
	}
}

/* --- tables that make no sense -------------------------------------------------------------------
 */

struct poke {
	struct world *w;
	uint64_t offset;
	uint8_t bytes[8];
};

static void poke_co(void *arg)
{
	struct poke *poke = arg;

	must_be(ox_store_write_co(poke->w->channel.store, poke->offset, poke->bytes, 8, 0), 0);
}

static void poke_word(uint64_t offset, uint64_t word)
{
	struct world w;
	struct poke poke = {.w = &w, .offset = offset};

	world_open(&w, "memory:bad:0", NULL);
	ox_put_be64(poke.bytes, word);
	world_run(&w, poke_co, &poke);
	world_close(&w);
}

static void nothing_co(void *arg)
{
	struct world *w = arg;
	uint64_t count, host;

	must(qcow2_refcount_co(&w->channel, 1, &count) <= 0);
	must(qcow2_refcount_co(&w->channel, 1000000, &count) <= 0);
	must(qcow2_alloc_more_co(&w->channel) < 0);
	must(qcow2_alloc_metadata_co(&w->channel, 1, &host) < 0);
}

static void is_refused(uint64_t offset, uint64_t word)
{
	static const struct shape shape = {12, 4, 8u << 20};
	struct ox_image_options options = {.store = {.aio = OX_AIO_SYNC}};
	struct ox_error err = {0};
	struct world w;

	world_make("memory:bad:0", &shape);
	poke_word(offset, word);
	must(world_open(&w, "memory:bad:0", &err) < 0);
	must(strstr(err.text, "refcount table") != NULL);
	/* Reading goes on without it; a check is told nothing. */
	options.store.read_only = true;
	must_be(world_open_options(&w, "memory:bad:0", &options, NULL), 0);
	must(w.q.alloc->damaged);
	world_close(&w);
	options.store.read_only = false;
	options.for_check = true;
	must_be(world_open_options(&w, "memory:bad:0", &options, NULL), 0);
	must(w.q.alloc->damaged);
	world_run(&w, nothing_co, &w);
	world_close(&w);
	ox_memory_forget("bad");
}

static void test_bad_tables(void **state)
{
	/* The table is cluster 1, the block cluster 2, L1 cluster 3. */
	is_refused(4096 + 8, 0x2200);                   /* not aligned */
	is_refused(4096 + 8, 1);                        /* reserved bits */
	is_refused(4096 + 8, UINT64_C(1) << 40);        /* behind the end */
	is_refused(4096 + 8, UINT64_MAX << 12);         /* far behind it */
	is_refused(4096 + 8, 0x2000);                   /* twice */
	is_refused(4096, UINT64_C(0x8000000000000000)); /* alone */
	/* The header: where the table is. */
	is_refused(48, 0);
	is_refused(48, 0x1200);
	is_refused(48, UINT64_C(1) << 50);
	is_refused(48, UINT64_MAX);
	is_refused(56, 0);
	is_refused(56, UINT64_C(0xffffffff00000000));
}

/* --- metadata in memory --------------------------------------------------------------------------
 */

#define CLUSTERS 5000u

static void test_ranges(void **state)
{
	static const struct shape shape = {12, 4, 16u << 20};
	bool model[CLUSTERS] = {0};
	unsigned seed = 3;
	struct world w;
	struct qcow2 *q = &w.q;

	world_make("memory:ranges:20480000", &shape);
	world_open(&w, "memory:ranges:20480000", NULL);
	pthread_mutex_lock(&q->lock);
	for (unsigned i = 0; i < CLUSTERS; i++)
		model[i] = qcow2_is_metadata(q->alloc, i);
	must(model[0] && model[1] && model[2] && model[3] && !model[4]);
	for (unsigned i = 0; i < 20000; i++) {
		uint64_t first = (seed = seed * 1103515245u + 12345u) >> 8 & 8191, count, bytes;
		bool expect = true;

		count = 1 + ((seed = seed * 1103515245u + 12345u) >> 8) % (i % 100 ? 8 : 300);
		bytes = (count << 12) - (seed >> 28 << 8);
		if (i % 3 == 0) {
			expect = first + count <= CLUSTERS;
			for (uint64_t k = first; expect && k < first + count; k++)
				expect = !model[k];
			must_be(qcow2_is_data_range(q, (first << 12) + 17, bytes - 17), expect);
			continue;
		}
		if (first + count > CLUSTERS)
			continue;
		for (uint64_t k = first; k < first + count; k++)
			model[k] = i % 3 == 1;
		if (i % 3 == 1)
			qcow2_add_metadata_range(q, first << 12, bytes);
		else
			qcow2_remove_metadata_range(q, first << 12, bytes);
	}
	/* What no file has. */
	must(!qcow2_is_data_range(q, UINT64_MAX - 4095, 4096));
	must(!qcow2_is_data_range(q, UINT64_C(1) << 62, 4096));
	must(!qcow2_is_data_range(q, 1u << 20, UINT64_MAX));
	must(!qcow2_is_data_range(q, 1u << 20, 0));
	qcow2_add_metadata_range(q, UINT64_MAX - 4095, 4096);
	qcow2_add_metadata_range(q, 4096, 0);
	pthread_mutex_unlock(&q->lock);
	world_close(&w);
	ox_memory_forget("ranges");
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_widths), cmocka_unit_test(test_layout),
	        cmocka_unit_test(test_count),  cmocka_unit_test(test_bad_tables),
	        cmocka_unit_test(test_ranges),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
