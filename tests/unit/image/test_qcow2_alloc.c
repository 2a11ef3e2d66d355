/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The allocator of qcow2: what is given out is counted durably before (R1), what is given back is
 * not used again too early (R3), structures grow, devices fill up, finishing leaves nothing.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "base/fiber.h"
#include "qcow2_world.h"
#include "store/memory.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* --- R1: durable before -------------------------------------------------------------------------
 */

#define TAKES_MAX 60000u

struct taken {
	uint64_t clock, cluster;
};

struct durable_test {
	struct world w;
	struct taken *takes;
	size_t count;
	size_t goal;
};

static void note_take(struct durable_test *t, uint64_t host)
{
	must(t->count < TAKES_MAX);
	t->takes[t->count++] =
	        (struct taken){ox_faulty_clock(t->w.store), host >> t->w.q.cluster_bits};
}

static void take_many_co(void *arg)
{
	struct durable_test *t = arg;
	struct ox_image_channel *channel = &t->w.channel;
	unsigned seed = 1;

	while (t->count < t->goal) {
		uint64_t host;
		unsigned got;
		bool zeroed;

		seed = seed * 1103515245u + 12345u;
		if (seed >> 16 & 31) {
			must_be(world_take_co(channel, 1 + (seed >> 20 & 15), &host, &got, &zeroed),
			        0);
			must(zeroed);
			for (unsigned i = 0; i < got; i++)
				note_take(t, host + ((uint64_t)i << t->w.q.cluster_bits));
		} else {
			must_be(world_take_table_co(channel, &host), 0);
			note_take(t, host);
		}
		/* Background batches get their turn. */
		if ((seed >> 24 & 15) == 0)
			ox_sleep_co(1000);
	}
}

/* What of the log is durable when `flush` has completed, on `disk`. */
static void apply_writes(struct ox_faulty_log *log, const struct ox_faulty_record *flush,
                         bool *applied, uint8_t *disk, size_t bytes)
{
	for (size_t i = 0; i < log->count; i++) {
		const struct ox_faulty_record *r = &log->records[i];

		if (applied[i] || r->completed == 0 || r->completed >= flush->submitted)
			continue;
		applied[i] = true;
		if (r->op == OX_IO_WRITE && !r->truncate) {
			must(ox_range_within(r->offset, r->length, bytes));
			memcpy(disk + r->offset, r->data, r->length);
		} else if (r->op == OX_IO_ZERO) {
			memset(disk + r->offset, 0, r->length);
		}
	}
}

/* With what is durable only, and nothing else, every cluster counts 1 when it is given out. */
static void verify_takes(struct durable_test *t, struct ox_faulty_log *log, uint8_t *disk,
                         size_t bytes)
{
	bool *applied = ox_xcalloc(log->count, sizeof(*applied));
	bool *seen = ox_xcalloc(bytes >> t->w.q.cluster_bits, sizeof(*seen));
	size_t next = 0;

	for (size_t i = 0; i <= log->count && next < t->count; i++) {
		const struct ox_faulty_record *flush = i < log->count ? &log->records[i] : NULL;
		uint64_t until = flush ? flush->completed : UINT64_MAX;

		if (flush && (flush->op != OX_IO_FLUSH || flush->completed == 0))
			continue;
		/* Those before this flush rely on the ones before it. */
		for (; next < t->count && t->takes[next].clock < until; next++) {
			uint64_t cluster = t->takes[next].cluster;

			must_be(world_count(disk, bytes, cluster), 1);
			must(!seen[cluster]);
			seen[cluster] = true;
		}
		if (flush)
			apply_writes(log, flush, applied, disk, bytes);
	}
	must_be(next, t->count);
	free(applied);
	free(seen);
}

static void durable_before(unsigned cluster_bits, unsigned order, size_t goal)
{
	struct shape shape = {cluster_bits, order, UINT64_C(4) << 20};
	struct durable_test t = {.goal = goal};
	size_t bytes;
	struct ox_faulty_log log;
	uint8_t *disk;
	size_t start;

	shape.disk = ox_max(shape.disk, UINT64_C(64) << cluster_bits);
	t.takes = ox_xcalloc(TAKES_MAX, sizeof(*t.takes));
	world_make("memory:durable:0", &shape);
	world_open(&t.w, "faulty::memory:durable:0", NULL);
	start = t.w.store->size;
	disk = ox_xcalloc(1, start);
	must_be(ox_store_pread(t.w.store, 0, disk, start), 0);
	ox_faulty_record(t.w.store, true);
	world_run(&t.w, take_many_co, &t);
	ox_faulty_take_log(t.w.store, &log);
	bytes = t.w.store->size;
	disk = realloc(disk, bytes);
	must(disk);
	memset(disk + start, 0, bytes - start);
	verify_takes(&t, &log, disk, bytes);
	ox_faulty_free_log(&log);
	world_close(&t.w);
	ox_memory_forget("durable");
	free(disk);
	free(t.takes);
}

static void test_durable_before(void **state)
{
	durable_before(16, 4, 3000);
	durable_before(12, 4, 10000);
	durable_before(9, 4, 30000);
	/* Blocks of 64 entries: thousands of blocks, several tables. */
	durable_before(9, 6, 20000);
	durable_before(9, 0, 10000);
	durable_before(10, 1, 5000);
	durable_before(11, 2, 5000);
	durable_before(12, 3, 5000);
	durable_before(14, 5, 5000);
	durable_before(21, 6, 200);
}

/* --- R3: not too early ---------------------------------------------------------------------------
 */

static bool is_free(struct world *w, uint64_t host)
{
	uint64_t count;

	must_be(qcow2_refcount_co(&w->channel, host >> w->q.cluster_bits, &count), 0);
	return count == 0;
}

static void wait_released_co(struct world *w)
{
	for (;;) {
		bool done;

		pthread_mutex_lock(&w->q.lock);
		done = w->q.alloc->notes_head == w->q.alloc->notes_ready && !w->q.alloc->releasing;
		pthread_mutex_unlock(&w->q.lock);
		if (done)
			return;
		ox_sleep_co(100000);
	}
}

static void free_late_co(void *arg)
{
	struct world *w = arg;
	uint64_t old[40], host;
	unsigned got;
	bool zeroed;

	for (uint64_t i = 0; i < 40; i++) {
		must_be(world_map_co(&w->channel, i), 0);
		old[i] = w->map[i];
	}
	for (uint64_t i = 0; i < 40; i++)
		world_unmap(&w->channel, i);
	/* No commit yet: whatever is taken is something else. */
	ox_sleep_co(2000000);
	must_be(w->graces, 0);
	for (unsigned i = 0; i < 40; i++)
		must(!is_free(w, old[i]));
	/* A commit, but no grace. */
	__atomic_store_n(&w->hold_grace, true, __ATOMIC_RELAXED);
	must_be(world_write_map_co(w), 0);
	must_be(qcow2_commit_co(&w->channel), 0);
	ox_sleep_co(2000000);
	must_be(w->graces, 1);
	for (unsigned i = 0; i < 40; i++)
		must(!is_free(w, old[i]));
	/* Freed behind the commit: waits for the next. */
	must_be(world_map_co(&w->channel, 50), 0);
	host = w->map[50];
	world_unmap(&w->channel, 50);
	__atomic_store_n(&w->hold_grace, false, __ATOMIC_RELAXED);
	wait_released_co(w);
	for (unsigned i = 0; i < 40; i++)
		must(is_free(w, old[i]));
	must(!is_free(w, host));
	/* The next batch has all of it. */
	for (unsigned taken = 0; taken < 500; taken++) {
		uint64_t place;

		must_be(world_take_co(&w->channel, 1, &place, &got, &zeroed), 0);
		must(place != host);
		must(zeroed);
		for (unsigned i = 0; i < 40; i++) {
			if (old[i] == place)
				old[i] = 0;
		}
	}
	for (unsigned i = 0; i < 40; i++)
		must(old[i] == 0);
}

static void test_free_late(void **state)
{
	static const struct shape shape = {16, 4, 256u << 20};
	struct ox_faulty_log log;
	unsigned discards = 0;
	struct world w;

	world_make("memory:late:0", &shape);
	world_open(&w, "faulty::memory:late:0", NULL);
	ox_faulty_record(w.store, true);
	world_run(&w, free_late_co, &w);
	ox_faulty_take_log(w.store, &log);
	for (size_t i = 0; i < log.count; i++)
		discards += log.records[i].op == OX_IO_DISCARD;
	must_be(discards, 1);
	ox_faulty_free_log(&log);
	world_close(&w);
	ox_memory_forget("late");
}

/* Two compressed units in one cluster: one reference each. */
static void free_units_co(void *arg)
{
	struct world *w = arg;
	struct qcow2 *q = &w->q;
	struct ox_range range;
	uint64_t host, count;
	unsigned got;
	bool zeroed;

	must_be(world_take_co(&w->channel, 2, &host, &got, &zeroed), 0);
	must_be(got, 2);
	qcow2_gate_enter_co(q->alloc, &range, &w->channel);
	must_be(qcow2_count_co(&w->channel, host >> q->cluster_bits, 1, QCOW2_COUNT_UP, NULL, NULL),
	        0);
	qcow2_gate_leave(q->alloc, &range);
	pthread_mutex_lock(&q->lock);
	/* The second unit crosses into the next cluster. */
	qcow2_free_later(&w->channel, host + 512, 1024);
	qcow2_free_later(&w->channel, host + q->cluster_size - 1000, 1001);
	pthread_mutex_unlock(&q->lock);
	must_be(qcow2_commit_co(&w->channel), 0);
	wait_released_co(w);
	for (unsigned i = 0; i < 2; i++) {
		must_be(qcow2_refcount_co(&w->channel, (host >> q->cluster_bits) + i, &count), 0);
		must_be(count, 0);
	}
	must_be(w->corrupt, 0);
	/* Once more than there are references: damage, and no abort. */
	pthread_mutex_lock(&q->lock);
	qcow2_free_later(&w->channel, host, 512);
	pthread_mutex_unlock(&q->lock);
	must_be(qcow2_commit_co(&w->channel), 0);
	wait_released_co(w);
	must_be(w->corrupt, 1);
	must_be(qcow2_alloc_more_co(&w->channel), -EIO);
}

static void test_free_units(void **state)
{
	static const struct shape shape = {12, 4, 16u << 20};
	struct world w;

	world_make("memory:units:0", &shape);
	world_open(&w, "memory:units:0", NULL);
	world_run(&w, free_units_co, &w);
	world_close(&w);
	ox_memory_forget("units");
}

/* --- a store that cannot grow
 * ---------------------------------------------------------------------- */

struct full_test {
	struct world w;
	bool *taken;
	uint64_t count;
};

static void note_full(struct full_test *t, uint64_t host)
{
	uint64_t cluster = host >> t->w.q.cluster_bits;

	must(host + t->w.q.cluster_size <= t->w.store->size);
	must(!t->taken[cluster]);
	t->taken[cluster] = true;
	t->count++;
}

static void fill_co(void *arg)
{
	struct full_test *t = arg;
	struct world *w = &t->w;
	uint64_t host, total = w->store->size >> w->q.cluster_bits, structures = 0, again = 0;
	unsigned got;
	bool zeroed;
	int rc;

	must_be(world_take_table_co(&w->channel, &host), 0);
	note_full(t, host);
	while ((rc = world_take_co(&w->channel, 3, &host, &got, &zeroed)) == 0) {
		for (unsigned i = 0; i < got; i++)
			note_full(t, host + ((uint64_t)i << w->q.cluster_bits));
	}
	must_be(rc, -ENOSPC);
	for (uint64_t i = 0; i < total; i++)
		structures += qcow2_is_metadata(w->q.alloc, i);
	/* Every single cluster is used. */
	must_be(t->count + structures, total);
	must_be(world_take_table_co(&w->channel, &host), -ENOSPC);
	/* What comes back serves again, for data. */
	pthread_mutex_lock(&w->q.lock);
	for (uint64_t i = 0; i < total; i++) {
		if (t->taken[i] && i % 3 == 0) {
			qcow2_free_later(&w->channel, i << w->q.cluster_bits, w->q.cluster_size);
			t->taken[i] = false;
			again++;
		}
	}
	pthread_mutex_unlock(&w->q.lock);
	must_be(qcow2_commit_co(&w->channel), 0);
	wait_released_co(w);
	t->count = 0;
	while ((rc = world_take_co(&w->channel, 3, &host, &got, &zeroed)) == 0) {
		for (unsigned i = 0; i < got; i++)
			note_full(t, host + ((uint64_t)i << w->q.cluster_bits));
	}
	must_be(rc, -ENOSPC);
	must_be(t->count, again);
}

static void full_device(unsigned cluster_bits, unsigned order, bool fast_zero)
{
	struct shape shape = {cluster_bits, order, UINT64_C(64) << 20};
	struct full_test t = {.count = 0};
	struct ox_store_ops ops;

	world_make("memory:full:13M", &shape);
	world_open(&t.w, "memory:full:13M", NULL);
	ops = *t.w.store->ops;
	ops.truncate = NULL;
	t.w.store->ops = &ops;
	t.w.store->limits.zero_is_fast = fast_zero;
	t.w.q.alloc->fixed = true;
	t.taken = ox_xcalloc(t.w.store->size >> cluster_bits, sizeof(*t.taken));
	world_run(&t.w, fill_co, &t);
	world_close(&t.w);
	ox_memory_forget("full");
	free(t.taken);
}

static void test_full_device(void **state)
{
	full_device(16, 4, true);
	full_device(12, 4, false);
	full_device(9, 6, true);
	full_device(9, 0, false);
}

/* --- finishing
 * -------------------------------------------------------------------------------------- */

struct life {
	struct world w;
	unsigned sessions, clusters;
};

static void live_co(void *arg)
{
	struct life *life = arg;
	struct world *w = &life->w;
	uint64_t disk = w->map_clusters;
	unsigned seed = 7;

	for (unsigned session = 0; session < life->sessions; session++) {
		for (unsigned i = 0; i < life->clusters; i++) {
			seed = seed * 1103515245u + 12345u;
			if ((seed >> 16) % 4 == 0)
				world_unmap(&w->channel, (seed >> 8) % disk);
			else
				must_be(world_map_co(&w->channel, (seed >> 8) % disk), 0);
			if (i % 500 == 499) {
				must_be(world_write_map_co(w), 0);
				must_be(qcow2_commit_co(&w->channel), 0);
			}
			if (i % 64 == 0)
				ox_sleep_co(1000);
		}
		must_be(world_finish_co(w), 0);
		must(!w->image.metadata_dirty);
	}
	must_be(w->corrupt, 0);
}

static void whole_life(unsigned cluster_bits, unsigned order, unsigned clusters)
{
	const char *path = world_path("life.qcow2");
	struct shape shape = {cluster_bits, order, UINT64_C(0)};
	struct life life = {.sessions = 3, .clusters = clusters};
	uint64_t end;
	FILE *file = fopen(path, "w");

	must(file);
	fclose(file);
	shape.disk = ox_min((uint64_t)clusters * 3 << cluster_bits, UINT64_C(4) << 30);
	if (cluster_bits == 9)
		shape.disk = ox_min(shape.disk, order == 6 ? UINT64_C(120) << 10 << 5 : UINT64_MAX);
	world_make(path, &shape);
	world_open(&life.w, path, NULL);
	world_run(&life.w, live_co, &life);
	/* The last cluster of the file is in use. */
	end = life.w.store->size >> cluster_bits;
	must(end > 0);
	world_close(&life.w);
	must(world_check(path) <= 0);
	/* And again, by a new allocator. */
	world_open(&life.w, path, NULL);
	life.sessions = 1;
	world_run(&life.w, live_co, &life);
	world_close(&life.w);
	must(world_check(path) <= 0);
	unlink(path);
}

static void test_finish_clean(void **state)
{
	whole_life(16, 4, 3000);
	whole_life(9, 6, 5000);
	whole_life(9, 4, 8000);
	whole_life(12, 0, 3000);
	whole_life(12, 3, 3000);
	whole_life(14, 5, 2000);
	whole_life(21, 4, 100);
}

/* A file does not outgrow its disk, however often everything is written anew. */
static void churn_co(void *arg)
{
	struct world *w = arg;

	for (unsigned turn = 0; turn < 12; turn++) {
		for (uint64_t i = 0; i < w->map_clusters; i++)
			world_unmap(&w->channel, i);
		must_be(world_write_map_co(w), 0);
		must_be(qcow2_commit_co(&w->channel), 0);
		wait_released_co(w);
		for (uint64_t i = 0; i < w->map_clusters; i++)
			must_be(world_map_co(&w->channel, (i * 37) % w->map_clusters), 0);
	}
	must_be(world_finish_co(w), 0);
	must(w->store->size <= (w->map_clusters + w->map_clusters / 8 + 512) * w->q.cluster_size);
}

static void test_no_outgrowing(void **state)
{
	static const struct shape shape = {12, 4, 10u << 20};
	struct world w;

	world_make("memory:churn:0", &shape);
	world_open(&w, "memory:churn:0", NULL);
	world_run(&w, churn_co, &w);
	world_close(&w);
	/* What an earlier session left free inside the file is found by the cursor. */
	world_open(&w, "memory:churn:0", NULL);
	world_run(&w, churn_co, &w);
	world_close(&w);
	ox_memory_forget("churn");
}

static void untake_co(void *arg)
{
	struct world *w = arg;
	uint64_t host, first, size, data_left;
	unsigned got;
	bool zeroed;

	must_be(qcow2_alloc_more_co(&w->channel), 0);
	data_left = w->q.alloc->data_left;
	size = w->store->size;
	must_be(world_take_co(&w->channel, 8, &first, &got, &zeroed), 0);
	must_be(got, 8);
	must(zeroed);
	pthread_mutex_lock(&w->q.lock);
	qcow2_alloc_untake(&w->channel, first, got);
	pthread_mutex_unlock(&w->q.lock);
	must_be(w->q.alloc->data_left, data_left);
	/* It comes again, and may hold something. */
	for (uint64_t i = 0; i < data_left; i++) {
		must_be(world_take_co(&w->channel, 1, &host, &got, &zeroed), 0);
		if (host >= first && host < first + 8 * (uint64_t)w->q.cluster_size)
			must(!zeroed);
		else
			must(zeroed);
		pthread_mutex_lock(&w->q.lock);
		qcow2_free_later(&w->channel, host, w->q.cluster_size);
		pthread_mutex_unlock(&w->q.lock);
	}
	must(w->store->size >= size);
	must_be(world_finish_co(w), 0);
	/* Nothing is left of it. */
	must(w->store->size < size);
}

static void test_untake(void **state)
{
	static const struct shape shape = {16, 4, 1u << 30};
	const char *path = world_path("untake.qcow2");
	FILE *file = fopen(path, "w");
	struct world w;

	must(file);
	fclose(file);
	world_make(path, &shape);
	world_open(&w, path, NULL);
	world_run(&w, untake_co, &w);
	world_close(&w);
	must(world_check(path) <= 0);
	unlink(path);
}

/* --- metadata in one piece
 * ------------------------------------------------------------------------- */

static void metadata_co(void *arg)
{
	struct world *w = arg;
	uint64_t host, clusters = 700;
	uint8_t *bytes = malloc(w->q.cluster_size);
	size_t image_bytes;
	uint8_t *image;

	must_be(qcow2_alloc_metadata_co(&w->channel, clusters, &host), 0);
	image_bytes = w->store->size;
	image = malloc(image_bytes);
	must_be(ox_store_read_co(w->channel.store, 0, image, image_bytes), 0);
	for (uint64_t i = 0; i < clusters; i++) {
		uint64_t cluster = (host >> w->q.cluster_bits) + i;

		must_be(world_count(image, image_bytes, cluster), 1);
		must_be(ox_store_read_co(w->channel.store, cluster << w->q.cluster_bits, bytes,
		                         w->q.cluster_size),
		        0);
		for (uint32_t k = 0; k < w->q.cluster_size; k++)
			must_be(bytes[k], 0);
		world_unmap(&w->channel, 0);
	}
	pthread_mutex_lock(&w->q.lock);
	qcow2_free_later(&w->channel, host, clusters << w->q.cluster_bits);
	pthread_mutex_unlock(&w->q.lock);
	must_be(world_finish_co(w), 0);
	free(image);
	free(bytes);
}

static void test_metadata(void **state)
{
	static const struct shape shapes[] = {
	        {9, 6, 1u << 20}, {16, 4, 1u << 30}, {12, 0, 1u << 24}};

	for (unsigned i = 0; i < 3; i++) {
		struct world w;

		world_make("memory:metadata:0", &shapes[i]);
		world_open(&w, "memory:metadata:0", NULL);
		world_run(&w, metadata_co, &w);
		world_close(&w);
		ox_memory_forget("metadata");
	}
}

/* --- errors
 * ------------------------------------------------------------------------------------------ */

struct error_test {
	struct world w;
	unsigned failures;
};

static void errors_co(void *arg)
{
	struct error_test *t = arg;
	struct world *w = &t->w;

	for (uint64_t i = 0; i < 4000; i++) {
		int rc = world_map_co(&w->channel, i % w->map_clusters);

		if (rc < 0) {
			must_be(rc, -EIO);
			t->failures++;
		}
		if (i % 64 == 0)
			ox_sleep_co(1000);
		if (i % 512 == 0) {
			(void)!world_write_map_co(w);
			(void)!qcow2_commit_co(&w->channel);
		}
	}
	ox_faulty_clear_rules(w->store);
	for (uint64_t i = 0; i < 500; i++)
		must_be(world_map_co(&w->channel, i % w->map_clusters), 0);
	must_be(world_finish_co(w), 0);
	must_be(w->corrupt, 0);
}

/* Every so many requests one fails: nothing is lost, nothing is given out twice, and when the
 * errors are over everything can be finished. */
static void test_errors(void **state)
{
	static const uint8_t ops[] = {OX_IO_WRITE, OX_IO_FLUSH, OX_IO_READ};
	const char *path = world_path("errors.qcow2");
	char name[400];

	snprintf(name, sizeof(name), "faulty::%s", path);
	for (unsigned turn = 0; turn < 12; turn++) {
		struct shape shape = {turn % 2 ? 9 : 12, turn % 4 ? 6 : 4, 2u << 20};
		struct error_test t = {.failures = 0};
		FILE *file = fopen(path, "w");

		must(file);
		fclose(file);
		world_make(path, &shape);
		world_open(&t.w, name, NULL);
		for (unsigned i = 0; i < 40; i++) {
			struct ox_fault_rule rule = {
			        .op = ops[(turn + i) % 3],
			        .kind = OX_FAULT_ERROR,
			        .nth = 2 + i * 5 + turn,
			        .error = EIO,
			};

			ox_faulty_add_rule(t.w.store, &rule);
		}
		world_run(&t.w, errors_co, &t);
		must(ox_faulty_count(t.w.store) > 0);
		world_close(&t.w);
		must(world_check(path) <= 0);
		unlink(path);
	}
}

/* --- an unclean end
 * ------------------------------------------------------------------------------------ */

static void leave_co(void *arg)
{
	struct world *w = arg;

	for (uint64_t i = 0; i < 300; i++)
		must_be(world_map_co(&w->channel, i * 3 % w->map_clusters), 0);
	must_be(world_write_map_co(w), 0);
	must_be(qcow2_commit_co(&w->channel), 0);
	/* Taken, and never heard of again. */
	for (unsigned i = 0; i < 100; i++) {
		uint64_t host;
		unsigned got;
		bool zeroed;

		must_be(world_take_co(&w->channel, 1, &host, &got, &zeroed), 0);
	}
}

static void recover_co(void *arg)
{
	struct world *w = arg;

	qcow2_start_leak_scan(&w->channel);
	/* The guest goes on meanwhile. */
	for (uint64_t i = 0; i < 500; i++) {
		if (i % 5 == 0)
			world_unmap(&w->channel, i % w->map_clusters);
		else
			must_be(world_map_co(&w->channel, i % w->map_clusters), 0);
		if (i % 100 == 50) {
			must_be(world_write_map_co(w), 0);
			must_be(qcow2_commit_co(&w->channel), 0);
		}
		if (i % 10 == 0)
			ox_sleep_co(1000);
	}
	must_be(world_finish_co(w), 0);
	must_be(w->corrupt, 0);
}

static void test_leaks(void **state)
{
	static const struct shape shapes[] = {
	        {16, 4, 64u << 20}, {9, 6, 1u << 20}, {12, 0, 8u << 20}};
	const char *path = world_path("leaks.qcow2");

	for (unsigned i = 0; i < 3; i++) {
		FILE *file = fopen(path, "w");
		struct world w;
		int rc;

		must(file);
		fclose(file);
		world_make(path, &shapes[i]);
		world_open(&w, path, NULL);
		world_run(&w, leave_co, &w);
		world_close(&w);
		/* Leaks, and nothing worse. */
		rc = world_check(path);
		must(rc == 3 || rc == -1);
		world_open(&w, path, NULL);
		world_run(&w, recover_co, &w);
		world_close(&w);
		must(world_check(path) <= 0);
		unlink(path);
	}
}

/* --- several threads
 * ------------------------------------------------------------------------------------ */

#define THREADS 3u

struct crowd {
	struct world w;
	struct crowd_thread {
		struct crowd *crowd;
		struct ox_iothread *thread;
		struct ox_image_channel channel;
		unsigned index;
	} threads[THREADS];
	unsigned char *owner; /* by cluster: thread + 1, atomic */
	uint64_t owners;
};

static void own(struct crowd *c, uint64_t host, unsigned char from, unsigned char to)
{
	uint64_t cluster = host >> c->w.q.cluster_bits;
	unsigned char was;

	must(cluster < c->owners);
	was = __atomic_exchange_n(&c->owner[cluster], to, __ATOMIC_RELAXED);
	must_be(was, from);
}

static void crowd_attach(void *arg)
{
	struct crowd_thread *t = arg;

	world_attach(&t->crowd->w, &t->channel, ox_loop_current());
}

static void crowd_work_co(void *arg)
{
	struct crowd_thread *t = arg;
	struct crowd *c = t->crowd;
	struct qcow2 *q = &c->w.q;
	unsigned seed = t->index + 1;
	uint64_t held[64] = {0};

	for (unsigned i = 0; i < 4000; i++) {
		unsigned slot = (seed = seed * 1103515245u + 12345u) >> 16 & 63, got;
		bool zeroed;

		if (held[slot]) {
			pthread_mutex_lock(&q->lock);
			own(c, held[slot], (unsigned char)(t->index + 1), 0);
			if (seed >> 24 & 1)
				qcow2_free_later(&t->channel, held[slot], q->cluster_size);
			else
				qcow2_alloc_untake(&t->channel, held[slot], 1);
			pthread_mutex_unlock(&q->lock);
			held[slot] = 0;
		} else {
			must_be(world_take_co(&t->channel, 1, &held[slot], &got, &zeroed), 0);
			own(c, held[slot], 0, (unsigned char)(t->index + 1));
		}
		if (i % 50 == 0)
			ox_sleep_co(1000);
		if (i % 400 == 0)
			must_be(qcow2_commit_co(&t->channel), 0);
	}
	pthread_mutex_lock(&q->lock);
	for (unsigned i = 0; i < 64; i++) {
		if (!held[i])
			continue;
		own(c, held[i], (unsigned char)(t->index + 1), 0);
		qcow2_free_later(&t->channel, held[i], q->cluster_size);
	}
	pthread_mutex_unlock(&q->lock);
	must_be(qcow2_commit_co(&t->channel), 0);
	world_detach_co(&t->channel);
}

struct joining {
	struct crowd_thread *thread;
	bool done;
};

static void one_thread_co(void *arg)
{
	struct joining *joining = arg;
	struct crowd_thread *t = joining->thread;

	ox_loop_call_fiber_co(ox_iothread_loop(t->thread), crowd_work_co, t);
	joining->done = true;
}

static void crowd_co(void *arg)
{
	struct crowd *c = arg;
	struct joining joining[THREADS];

	for (unsigned i = 0; i < THREADS; i++)
		ox_loop_call_co(ox_iothread_loop(c->threads[i].thread), crowd_attach,
		                &c->threads[i]);
	for (unsigned i = 0; i < THREADS; i++) {
		joining[i] = (struct joining){.thread = &c->threads[i]};
		must_be(ox_fiber_start(one_thread_co, &joining[i]), 0);
	}
	for (unsigned i = 0; i < THREADS; i++) {
		while (!joining[i].done)
			ox_sleep_co(1000000);
	}
	must_be(world_finish_co(&c->w), 0);
	must_be(c->w.corrupt, 0);
}

static void test_threads(void **state)
{
	static const struct shape shape = {12, 4, 64u << 20};
	static const struct ox_loop_options options = {.name = "crowd"};
	const char *path = world_path("crowd.qcow2");
	FILE *file = fopen(path, "w");
	struct crowd c = {.owners = 1u << 20};

	must(file);
	fclose(file);
	world_make(path, &shape);
	world_open(&c.w, path, NULL);
	c.owner = ox_xcalloc(c.owners, 1);
	for (unsigned i = 0; i < THREADS; i++) {
		c.threads[i] = (struct crowd_thread){.crowd = &c, .index = i};
		c.threads[i].thread = ox_iothread_start(&options, NULL);
		must(c.threads[i].thread);
	}
	world_run(&c.w, crowd_co, &c);
	for (unsigned i = 0; i < THREADS; i++)
		ox_iothread_stop(c.threads[i].thread);
	world_close(&c.w);
	must(world_check(path) <= 0);
	free(c.owner);
	unlink(path);
}

/* An argument names one test. */
int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_durable_before), cmocka_unit_test(test_free_late),
	        cmocka_unit_test(test_free_units),     cmocka_unit_test(test_full_device),
	        cmocka_unit_test(test_finish_clean),   cmocka_unit_test(test_no_outgrowing),
	        cmocka_unit_test(test_untake),         cmocka_unit_test(test_metadata),
	        cmocka_unit_test(test_errors),         cmocka_unit_test(test_leaks),
	        cmocka_unit_test(test_threads),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
