/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/byteorder.h"
#include "base/fiber.h"
#include "qcow2_world.h"
#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* --- doubles ---------------------------------------------------------------------------------- */

static struct world *world_of(struct ox_image_channel *channel)
{
	return ox_container_of(channel->image, struct world, image);
}

struct background {
	struct ox_image_channel *channel;
	void (*fn_co)(struct ox_image_channel *channel, void *arg);
	void *arg;
};

static void background_co(void *arg)
{
	struct background work = *(struct background *)arg;

	work.fn_co(work.channel, work.arg);
	work.channel->background--;
	if (work.channel->background == 0 && work.channel->background_waiter)
		ox_fiber_resume(ox_steal_ptr(work.channel->background_waiter));
}

int ox_image_background(struct ox_image_channel *channel,
                        void (*fn_co)(struct ox_image_channel *channel, void *arg), void *arg)
{
	struct background work = {channel, fn_co, arg};
	int rc;

	channel->background++;
	rc = ox_fiber_start(background_co, &work);
	if (rc < 0)
		channel->background--;
	return rc;
}

void ox_image_grace_co(struct ox_image_channel *channel)
{
	struct world *w = world_of(channel);

	__atomic_fetch_add(&w->graces, 1, __ATOMIC_RELAXED);
	do
		ox_sleep_co(100000);
	while (__atomic_load_n(&w->hold_grace, __ATOMIC_RELAXED));
}

int ox_store_truncate_co(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                         struct ox_error *err)
{
	ox_sleep_co(1000);
	return ox_store_truncate(store, size, prealloc, NULL, NULL, err);
}

int qcow2_read_co(struct ox_image_channel *channel, uint64_t offset, void *buf, size_t bytes)
{
	uint64_t size = __atomic_load_n(&channel->store->store->size, __ATOMIC_RELAXED);
	size_t inside = offset < size ? (size_t)ox_min((uint64_t)bytes, size - offset) : 0;

	memset((uint8_t *)buf + inside, 0, bytes - inside);
	return inside ? ox_store_read_co(channel->store, offset, buf, inside) : 0;
}

int qcow2_write_header_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	uint8_t bytes[12];

	ox_put_be64(bytes, q->header.refcount_table_offset);
	ox_put_be32(bytes + 8, q->header.refcount_table_clusters);
	return ox_store_write_co(channel->store, 48, bytes, sizeof(bytes), 0);
}

int qcow2_corrupt_co(struct ox_image_channel *channel, const char *fmt, ...)
{
	struct world *w = world_of(channel);

	__atomic_fetch_add(&w->corrupt, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&w->q.corrupt, true, __ATOMIC_RELAXED);
	return -EIO;
}

int qcow2_walk_co(struct ox_image_channel *channel,
                  void (*fn)(void *arg, uint64_t cluster, uint64_t entry, uint64_t bitmap),
                  void *arg)
{
	struct world *w = world_of(channel);

	for (uint64_t i = 0; i < w->map_clusters; i++) {
		uint64_t host;

		pthread_mutex_lock(&w->q.lock);
		host = w->map[i];
		pthread_mutex_unlock(&w->q.lock);
		if (host)
			fn(arg, i, host | QCOW2_ENTRY_COPIED, 0);
	}
	return 0;
}

void qcow2_record_seal(struct qcow2 *q)
{
}

void qcow2_record_sealed(struct qcow2 *q, bool ok)
{
}

bool qcow2_record_has_room(const struct qcow2 *q, unsigned count)
{
	return true;
}

/* --- files -------------------------------------------------------------------------------------
 */

static char directory[200];

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static void remove_directory(void)
{
	nftw(directory, remove_entry, 8, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

const char *world_path(const char *name)
{
	static char path[300];

	if (!directory[0]) {
		const char *base = getenv("OXBOW_TEST_DIR");

		snprintf(directory, sizeof(directory), "%s/oxbow-alloc-XXXXXX",
		         base ? base : "/var/tmp");
		if (!mkdtemp(directory))
			fail_msg("%s: %s", directory, strerror(errno));
		atexit(remove_directory);
	}
	snprintf(path, sizeof(path), "%s/%s", directory, name);
	return path;
}

int world_check(const char *path)
{
	char command[600];
	int status;

	snprintf(command, sizeof(command), "qemu-img check -f qcow2 '%s' >'%s.log' 2>&1", path,
	         path);
	status = system(command);
	if (!WIFEXITED(status) || WEXITSTATUS(status) == 127)
		return -1;
	if (WEXITSTATUS(status) != 0) {
		snprintf(command, sizeof(command), "head -5 '%s.log' | sed 's/^/# /'", path);
		if (system(command) != 0)
			printf("# qemu-img check failed\n");
	}
	return WEXITSTATUS(status);
}

/* --- an image -----------------------------------------------------------------------------------
 */

void world_run(struct world *w, void (*fn_co)(void *arg), void *arg)
{
	ox_loop_run_fiber(w->loop, fn_co, arg);
}

struct writing {
	struct ox_store *store;
	struct ox_loop *loop;
	const uint8_t *bytes;
	size_t count;
	int rc;
};

static void write_bytes_co(void *arg)
{
	struct writing *writing = arg;
	struct ox_channel *channel;

	writing->rc = ox_store_attach(writing->store, writing->loop, &channel, NULL);
	if (writing->rc < 0)
		return;
	writing->rc = ox_store_write_co(channel, 0, writing->bytes, writing->count, 0);
	ox_store_detach(channel);
}

static struct ox_loop *new_loop(void)
{
	static const struct ox_loop_options options = {.name = "test"};
	struct ox_loop *loop = ox_loop_new(&options, NULL);

	must(loop);
	return loop;
}

void world_make(const char *name, const struct shape *shape)
{
	static const struct ox_store_options options = {.aio = OX_AIO_SYNC};
	uint64_t cluster = UINT64_C(1) << shape->cluster_bits;
	uint64_t per_table = cluster / 8 * cluster;
	uint64_t l1 = (shape->disk + per_table - 1) / per_table;
	uint64_t l1_clusters = (l1 * 8 + cluster - 1) / cluster, clusters = 3 + l1_clusters;
	uint8_t *bytes = ox_xcalloc(clusters, cluster);
	struct writing writing = {.bytes = bytes, .count = clusters * cluster};
	struct ox_error err = {0};

	ox_put_be32(bytes, QCOW2_MAGIC);
	ox_put_be32(bytes + 4, 3);
	ox_put_be32(bytes + 20, shape->cluster_bits);
	ox_put_be64(bytes + 24, shape->disk);
	ox_put_be32(bytes + 36, (uint32_t)l1);
	ox_put_be64(bytes + 40, 3 * cluster);
	ox_put_be64(bytes + 48, cluster);
	ox_put_be32(bytes + 56, 1);
	ox_put_be32(bytes + 96, shape->refcount_order);
	ox_put_be32(bytes + 100, 112);
	ox_put_be64(bytes + cluster, 2 * cluster);
	/* The first block counts everything there is. */
	must(clusters <= cluster * 8 >> shape->refcount_order);
	for (uint64_t i = 0; i < clusters; i++)
		qcow2_refcount_set(bytes + 2 * cluster, 1u << shape->refcount_order, i, 1);
	if (ox_store_open(name, &options, &writing.store, &err) < 0)
		fail_msg("%s", err.text);
	if (writing.store->size < writing.count)
		must_be(ox_store_truncate(writing.store, writing.count, OX_PREALLOC_OFF, NULL, NULL,
		                          NULL),
		        0);
	writing.loop = new_loop();
	ox_loop_run_fiber(writing.loop, write_bytes_co, &writing);
	must_be(writing.rc, 0);
	ox_loop_free(writing.loop);
	ox_store_close(writing.store);
	ox_fiber_pool_free();
	free(bytes);
}

static void read_header(struct world *w)
{
	struct qcow2_header *h = &w->q.header;
	uint8_t bytes[112];

	must_be(ox_store_pread(w->store, 0, bytes, sizeof(bytes)), 0);
	h->version = ox_get_be32(bytes + 4);
	h->cluster_bits = ox_get_be32(bytes + 20);
	h->size = ox_get_be64(bytes + 24);
	h->l1_entries = ox_get_be32(bytes + 36);
	h->l1_offset = ox_get_be64(bytes + 40);
	h->refcount_table_offset = ox_get_be64(bytes + 48);
	h->refcount_table_clusters = ox_get_be32(bytes + 56);
	h->refcount_order = ox_get_be32(bytes + 96);
	h->snapshot_count = ox_get_be32(bytes + 60);
	h->snapshots_offset = ox_get_be64(bytes + 64);
}

static void read_map(struct world *w)
{
	struct qcow2 *q = &w->q;
	uint64_t per_table = q->cluster_size / 8;
	uint8_t *words = ox_xcalloc(1, q->cluster_size);

	w->map_clusters = qcow2_file_clusters(q, q->header.size);
	w->map = ox_xcalloc(w->map_clusters, sizeof(*w->map));
	w->tables = ox_xcalloc(q->l1_entries, sizeof(*w->tables));
	for (uint32_t i = 0; i < q->l1_entries; i++) {
		uint8_t entry[8];

		must_be(ox_store_pread(w->store, q->header.l1_offset + i * 8u, entry, 8), 0);
		w->tables[i] = ox_get_be64(entry) & QCOW2_OFFSET_MASK;
		q->l1[i] = ox_get_be64(entry);
		if (!w->tables[i])
			continue;
		qcow2_add_metadata_range(q, w->tables[i], q->cluster_size);
		must_be(ox_store_pread(w->store, w->tables[i], words, q->cluster_size), 0);
		for (uint64_t k = 0; k < per_table && i * per_table + k < w->map_clusters; k++)
			w->map[i * per_table + k] = ox_get_be64(words + k * 8) & QCOW2_OFFSET_MASK;
	}
	free(words);
}

struct opening {
	struct world *w;
	struct ox_error *err;
	int rc;
};

static void open_co(void *arg)
{
	struct opening *opening = arg;
	struct world *w = opening->w;
	struct qcow2 *q = &w->q;

	must_be(ox_store_attach(w->store, w->loop, &w->channel.store, NULL), 0);
	w->channel.data = w->channel.store;
	opening->rc = qcow2_alloc_init_co(&w->channel, opening->err);
	if (opening->rc < 0) {
		ox_store_detach(w->channel.store);
		return;
	}
	pthread_mutex_lock(&q->lock);
	qcow2_add_metadata_range(q, q->header.l1_offset, (uint64_t)q->l1_entries * 8);
	read_map(w);
	pthread_mutex_unlock(&q->lock);
	must_be(qcow2_alloc_attach(&w->channel, NULL), 0);
}

int world_open_options(struct world *w, const char *name, const struct ox_image_options *options,
                       struct ox_error *err)
{
	struct ox_error own = {0};
	struct opening opening = {.w = w, .err = err ? err : &own};
	struct qcow2 *q = &w->q;

	memset(w, 0, sizeof(*w));
	if (ox_store_open(name, &options->store, &w->store, &own) < 0)
		fail_msg("%s", own.text);
	w->image.store = w->image.data = w->store;
	w->image.options = *options;
	w->image.read_only = options->store.read_only;
	w->image.priv = q;
	q->image = &w->image;
	pthread_mutex_init(&q->lock, NULL);
	read_header(w);
	q->cluster_bits = q->header.cluster_bits;
	q->cluster_size = 1u << q->cluster_bits;
	q->entry_bytes = 8;
	q->subclusters = 1;
	q->subcluster_size = q->cluster_size;
	q->refcount_bits = 1u << q->header.refcount_order;
	q->block_bytes = ox_min(q->cluster_size, QCOW2_BLOCK_MAX);
	q->l1_entries = q->header.l1_entries;
	q->l1 = ox_xcalloc(q->l1_entries, sizeof(*q->l1));
	w->image.size = q->header.size;
	qcow2_commit_init(q);
	w->loop = new_loop();
	w->channel.image = &w->image;
	w->channel.loop = w->loop;
	world_run(w, open_co, &opening);
	if (opening.rc == 0)
		return 0;
	if (!err)
		fail_msg("%s", own.text);
	qcow2_commit_free(q);
	free(q->l1);
	pthread_mutex_destroy(&q->lock);
	ox_loop_free(w->loop);
	ox_store_close(w->store);
	ox_fiber_pool_free();
	return opening.rc;
}

int world_open(struct world *w, const char *name, struct ox_error *err)
{
	static const struct ox_image_options options = {.store = {.aio = OX_AIO_SYNC}};

	return world_open_options(w, name, &options, err);
}

void world_attach(struct world *w, struct ox_image_channel *channel, struct ox_loop *loop)
{
	*channel = (struct ox_image_channel){.image = &w->image, .loop = loop};
	must_be(ox_store_attach(w->store, loop, &channel->store, NULL), 0);
	channel->data = channel->store;
	must_be(qcow2_alloc_attach(channel, NULL), 0);
}

void world_detach_co(struct ox_image_channel *channel)
{
	if (channel->background > 0) {
		channel->background_waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	qcow2_alloc_detach(channel);
	ox_store_detach(channel->store);
}

static void close_co(void *arg)
{
	struct world *w = arg;

	__atomic_store_n(&w->hold_grace, false, __ATOMIC_RELAXED);
	world_detach_co(&w->channel);
}

void world_close(struct world *w)
{
	world_run(w, close_co, w);
	qcow2_alloc_free(&w->q);
	qcow2_commit_free(&w->q);
	pthread_mutex_destroy(&w->q.lock);
	free(w->q.l1);
	free(w->map);
	free(w->tables);
	ox_loop_free(w->loop);
	ox_store_close(w->store);
	ox_fiber_pool_free();
}

/* --- what write.c does --------------------------------------------------------------------------
 */

int world_take_co(struct ox_image_channel *channel, unsigned want, uint64_t *host, unsigned *got,
                  bool *zeroed)
{
	struct qcow2 *q = qcow2_of(channel);
	int rc;

	for (;;) {
		pthread_mutex_lock(&q->lock);
		rc = qcow2_alloc_take(channel, want, host, got, zeroed);
		pthread_mutex_unlock(&q->lock);
		if (rc != -EAGAIN)
			return rc;
		rc = qcow2_alloc_more_co(channel);
		if (rc < 0)
			return rc;
	}
}

int world_take_table_co(struct ox_image_channel *channel, uint64_t *host)
{
	struct qcow2 *q = qcow2_of(channel);
	bool zeroed;
	int rc;

	for (;;) {
		pthread_mutex_lock(&q->lock);
		rc = qcow2_alloc_take_table(channel, host, &zeroed);
		pthread_mutex_unlock(&q->lock);
		if (rc != -EAGAIN)
			return rc;
		rc = qcow2_alloc_more_co(channel);
		if (rc < 0)
			return rc;
	}
}

int world_map_co(struct ox_image_channel *channel, uint64_t index)
{
	struct world *w = world_of(channel);
	struct qcow2 *q = &w->q;
	uint64_t table = index / (q->cluster_size / 8), host;
	unsigned got;
	bool zeroed;
	int rc;

	if (!w->tables[table]) {
		rc = world_take_table_co(channel, &host);
		if (rc < 0)
			return rc;
		pthread_mutex_lock(&q->lock);
		w->tables[table] = host;
		q->l1[table] = host | QCOW2_ENTRY_COPIED;
		qcow2_add_metadata_range(q, host, q->cluster_size);
		pthread_mutex_unlock(&q->lock);
	}
	rc = world_take_co(channel, 1, &host, &got, &zeroed);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	must(qcow2_is_data_range(q, host, q->cluster_size));
	if (w->map[index])
		qcow2_free_later(channel, w->map[index], q->cluster_size);
	w->map[index] = host;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

void world_unmap(struct ox_image_channel *channel, uint64_t index)
{
	struct world *w = world_of(channel);

	pthread_mutex_lock(&w->q.lock);
	if (w->map[index])
		qcow2_free_later(channel, w->map[index], w->q.cluster_size);
	w->map[index] = 0;
	pthread_mutex_unlock(&w->q.lock);
}

int world_write_map_co(struct world *w)
{
	struct qcow2 *q = &w->q;
	uint64_t per_table = q->cluster_size / 8;
	OX_FREE uint8_t *words = ox_xcalloc(1, q->cluster_size);
	int rc = 0;

	for (uint32_t i = 0; i < q->l1_entries && rc == 0; i++) {
		uint8_t entry[8];

		if (!w->tables[i])
			continue;
		for (uint64_t k = 0; k < per_table; k++) {
			uint64_t index = i * per_table + k;
			uint64_t host = index < w->map_clusters ? w->map[index] : 0;

			ox_put_be64(words + k * 8, host ? host | QCOW2_ENTRY_COPIED : 0);
		}
		rc = ox_store_write_co(w->channel.store, w->tables[i], words, q->cluster_size, 0);
		ox_put_be64(entry, w->tables[i] | QCOW2_ENTRY_COPIED);
		if (rc == 0)
			rc = ox_store_write_co(w->channel.store, q->header.l1_offset + i * 8u,
			                       entry, 8, 0);
	}
	return rc < 0 ? rc : ox_store_flush_co(w->channel.store);
}

int world_finish_co(struct world *w)
{
	uint64_t end;
	int rc = world_write_map_co(w);

	if (rc == 0)
		rc = qcow2_commit_co(&w->channel);
	if (rc == 0)
		rc = qcow2_alloc_finish_co(&w->channel, &end);
	if (rc == 0)
		rc = qcow2_commit_co(&w->channel);
	if (rc == 0 && w->store->ops->truncate)
		rc = ox_store_truncate(w->store, end, OX_PREALLOC_OFF, NULL, NULL, NULL);
	return rc;
}

int64_t world_count(const uint8_t *image, size_t bytes, uint64_t cluster)
{
	unsigned bits = ox_get_be32(image + 20), order = ox_get_be32(image + 96);
	uint64_t per_block = (UINT64_C(8) << bits) >> order, table, block, entries;

	table = ox_get_be64(image + 48);
	entries = ((uint64_t)ox_get_be32(image + 56) << bits) / 8;
	if (cluster / per_block >= entries)
		return 0;
	if (!ox_range_within(table, entries * 8, bytes))
		return -1;
	block = ox_get_be64(image + table + cluster / per_block * 8);
	if (block == 0)
		return 0;
	if (!ox_range_within(block, UINT64_C(1) << bits, bytes))
		return -1;
	return (int64_t)qcow2_refcount_get(image + block, 1u << order, cluster % per_block);
}
