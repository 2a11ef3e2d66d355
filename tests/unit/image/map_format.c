/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The format for tests of the generic layer: see map_format.h.
 */
#include "map_format.h"

struct map_fixture fixture;

static struct map_format *map_of(const struct ox_image *image)
{
	return image->priv;
}

static void map_log(struct map_format *map, const char *word)
{
	size_t used;

	pthread_mutex_lock(&map->lock);
	used = strlen(map->log);
	if (map->logging && used + strlen(word) + 2 < LOG_BYTES)
		snprintf(map->log + used, LOG_BYTES - used, "%s%s", used ? " " : "", word);
	pthread_mutex_unlock(&map->lock);
}

void map_log_start(struct map_format *map)
{
	map->log[0] = '\0';
	map->logging = true;
}

void assert_log(const struct map_format *map, const char *events)
{
	assert_string_equal(map->log, events);
}

void assert_bytes(const uint8_t *buf, size_t bytes, uint8_t value)
{
	for (size_t i = 0; i < bytes; i++) {
		if (buf[i] != value)
			fail_msg("byte %zu of %zu is %u, not %u", i, bytes, buf[i], value);
	}
}

static int once(int *rc)
{
	return __atomic_exchange_n(rc, 0, __ATOMIC_RELAXED);
}

/* --- the map -----------------------------------------------------------------------------------
 */

static uint64_t get_entry(const struct map_format *map, uint64_t unit)
{
	return __atomic_load_n(&map->entry[unit], __ATOMIC_ACQUIRE);
}

static void set_entry(struct map_format *map, uint64_t unit, uint64_t entry)
{
	__atomic_store_n(&map->entry[unit], entry, __ATOMIC_RELEASE);
}

/* Does `entry`, `bytes` further on, continue `first`? */
static bool continues(uint64_t first, uint64_t entry, uint64_t bytes)
{
	if (ENTRY_KIND(entry) != ENTRY_KIND(first) || ENTRY_FLAGS(entry) != ENTRY_FLAGS(first))
		return false;
	switch (ENTRY_KIND(entry)) {
	case OX_EXTENT_DATA:
		return ENTRY_OFFSET(entry) == ENTRY_OFFSET(first) + bytes;
	case OX_EXTENT_COMPRESSED:
		return ENTRY_OFFSET(entry) == ENTRY_OFFSET(first);
	default:
		return true;
	}
}

static void find(const struct map_format *map, uint64_t offset, uint64_t length,
                 struct ox_extent *extent)
{
	uint64_t unit = offset / UNIT, into = offset % UNIT;
	uint64_t first = get_entry(map, unit);
	uint64_t bytes = UNIT;

	while (unit + bytes / UNIT < map->units && bytes < into + length &&
	       continues(first, get_entry(map, unit + bytes / UNIT), bytes))
		bytes += UNIT;
	*extent = (struct ox_extent){.kind = ENTRY_KIND(first),
	                             .flags = ENTRY_FLAGS(first),
	                             .length = ox_min(bytes - into, length),
	                             .store_offset = ENTRY_OFFSET(first)};
	if (extent->kind == OX_EXTENT_DATA)
		extent->store_offset += into;
	if (extent->kind == OX_EXTENT_COMPRESSED) {
		extent->store_bytes = 512;
		extent->unit_bytes = map->unpacked_bytes;
		extent->unit_offset = ox_align_down(offset, map->unpacked_bytes);
	}
}

static int map_lookup(struct ox_image *image, uint64_t offset, uint64_t length,
                      struct ox_extent *extent)
{
	struct map_format *map = map_of(image);

	assert_true(offset / UNIT < map->units && length > 0);
	if (__atomic_load_n(&map->missing[offset / UNIT], __ATOMIC_ACQUIRE))
		return -EAGAIN;
	find(map, offset, length, extent);
	return 0;
}

static int map_map_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                      struct ox_extent *extent)
{
	struct map_format *map = map_of(channel->image);

	__atomic_fetch_add(&map->maps, 1, __ATOMIC_RELAXED);
	ox_sleep_co(1000);
	__atomic_store_n(&map->missing[offset / UNIT], false, __ATOMIC_RELEASE);
	find(map, offset, length, extent);
	return 0;
}

/* Lock held, or nobody else is there. */
static uint64_t take_space(struct map_format *map, uint64_t bytes, bool zeroed)
{
	uint64_t *next = zeroed ? &map->next_zero : &map->next;
	uint64_t offset = *next;

	*next += ox_align_up(bytes, map->cluster);
	assert_true(*next <= (zeroed ? 2 * ZERO_SPACE : ZERO_SPACE));
	return offset;
}

static void note_done(struct ox_io *io)
{
	*(bool *)io->priv = true;
}

/* Past the spy, since it is none of the layer's writes; on a store that is done at once. */
static void write_store(struct map_format *map, struct ox_channel *channel, uint64_t offset,
                        const void *buf, size_t bytes)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = bytes};
	struct ox_io io = {.op = OX_IO_WRITE,
	                   .offset = offset,
	                   .length = bytes,
	                   .iov = &iov,
	                   .iovcnt = 1,
	                   .done = note_done,
	                   .channel = channel};
	bool done = false;

	io.priv = &done;
	channel->in_flight++;
	map->real_store->write(channel, &io);
	assert_true(done);
	assert_int_equal(io.result, 0);
}

/* While a test is set up. */
static void put(struct map_format *map, uint64_t offset, const void *buf, size_t bytes)
{
	struct ox_channel *channel;

	assert_int_equal(ox_store_attach(map->image->store, ox_loop_current(), &channel, NULL), 0);
	write_store(map, channel, offset, buf, bytes);
	ox_store_detach(channel);
}

void map_set(struct map_format *map, uint64_t offset, uint64_t length, uint8_t kind)
{
	for (uint64_t at = offset; at < offset + length; at += UNIT)
		set_entry(map, at / UNIT, ENTRY(kind, 0, 0));
}

void map_set_data(struct map_format *map, uint64_t offset, uint64_t length, uint8_t value,
                  bool shared)
{
	uint64_t space = take_space(map, length, false);
	OX_FREE uint8_t *buf = malloc(length);

	memset(buf, value, length);
	put(map, space, buf, length);
	for (uint64_t at = 0; at < length; at += UNIT)
		set_entry(map, (offset + at) / UNIT,
		          ENTRY(OX_EXTENT_DATA, shared ? 0 : OX_EXTENT_IN_PLACE, space + at));
}

void map_set_compressed(struct map_format *map, uint64_t offset, uint32_t bytes, uint8_t value)
{
	/* Anywhere within a sector. */
	uint64_t space = take_space(map, 2 * UNIT, false) + 77;
	uint8_t buf[512];

	memset(buf, value, sizeof(buf));
	put(map, space, buf, sizeof(buf));
	map->unpacked_bytes = bytes;
	for (uint64_t at = 0; at < bytes; at += UNIT)
		set_entry(map, (offset + at) / UNIT, ENTRY(OX_EXTENT_COMPRESSED, 0, space));
}

static int map_decompress(struct ox_image *image, const void *in, size_t in_bytes, void *out,
                          size_t out_bytes)
{
	struct map_format *map = map_of(image);
	const uint8_t *from = in;
	uint8_t *to = out;

	__atomic_fetch_add(&map->unpacks, 1, __ATOMIC_RELAXED);
	assert_int_equal(in_bytes, 512);
	for (size_t i = 0; i < out_bytes; i++)
		to[i] = (uint8_t)(from[i % in_bytes] + i / 512);
	return 0;
}

/* --- changes
 * ---------------------------------------------------------------------------------------- */

static int map_begin_co(struct ox_image_channel *channel)
{
	struct map_format *map = map_of(channel->image);

	map_log(map, "begin");
	map->begins++;
	if (map->begin_ns)
		ox_sleep_co(map->begin_ns);
	return once(&map->begin_rc);
}

static bool is_in_place(uint64_t entry)
{
	return ENTRY_KIND(entry) == OX_EXTENT_DATA && (ENTRY_FLAGS(entry) & OX_EXTENT_IN_PLACE);
}

static void set_dirty(struct map_format *map, bool dirty)
{
	__atomic_store_n(&map->image->metadata_dirty, dirty, __ATOMIC_RELEASE);
}

/* One unit at a time. */
static int map_allocate(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	struct map_format *map = map_of(channel->image);
	uint64_t unit = offset / UNIT;
	int rc = -EAGAIN;

	if (!map->can_allocate)
		return -EAGAIN;
	pthread_mutex_lock(&map->lock);
	if (ENTRY_KIND(get_entry(map, unit)) == OX_EXTENT_ZERO) {
		set_dirty(map, true);
		set_entry(map, unit,
		          ENTRY(OX_EXTENT_DATA, OX_EXTENT_IN_PLACE, take_space(map, UNIT, true)));
		rc = 0;
	}
	pthread_mutex_unlock(&map->lock);
	map_log(map, rc == 0 ? "allocate" : "full");
	return rc;
}

/* What the map let go of: overwritten when nobody can be reading it any more. */
struct freed {
	uint64_t offset[256];
	unsigned count;
};

static void scribble_co(struct ox_image_channel *channel, void *arg)
{
	struct map_format *map = map_of(channel->image);
	struct freed *freed = arg;
	uint8_t buf[UNIT];

	ox_image_grace_co(channel);
	memset(buf, SCRIBBLE, sizeof(buf));
	for (unsigned i = 0; i < freed->count; i++)
		write_store(map, channel->store, freed->offset[i], buf, sizeof(buf));
	free(freed);
}

/* Lock held. */
static void replace(struct map_format *map, struct freed *freed, uint64_t unit, uint64_t entry)
{
	uint64_t old = get_entry(map, unit);

	if (is_in_place(old)) {
		assert_true(freed->count < OX_ARRAY_SIZE(freed->offset));
		freed->offset[freed->count++] = ENTRY_OFFSET(old);
	}
	set_entry(map, unit, entry);
}

static void free_later(struct ox_image_channel *channel, struct freed *freed)
{
	if (freed->count > 0 && map_of(channel->image)->scribble)
		assert_int_equal(ox_image_background(channel, scribble_co, freed), 0);
	else
		free(freed);
}

/* As much of one cluster as is not in place, from the write's first unit on. */
static int map_prepare_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct map_format *map = map_of(channel->image);
	uint64_t start = ox_align_down(a->offset, UNIT),
	         end = ox_align_up(a->offset + a->length, UNIT);
	uint64_t at = start;
	int rc = once(&map->prepare_rc);

	map_log(map, "prepare");
	if (rc < 0)
		return rc;
	end = ox_min(end, ox_align_down(start, map->cluster) + map->cluster);
	pthread_mutex_lock(&map->lock);
	while (at < end && !is_in_place(get_entry(map, at / UNIT)))
		at += UNIT;
	/* Whole clusters where there is nothing yet: the rest is to be filled. */
	if (at == end) {
		uint64_t first = ox_align_down(start, map->cluster);
		uint64_t last = ox_min(first + map->cluster, map->units * UNIT);

		for (at = first; at < last && !is_in_place(get_entry(map, at / UNIT));)
			at += UNIT;
		if (at == last) {
			start = first;
			end = last;
		}
	} else {
		end = at;
	}
	if (end > start) {
		a->offset = start;
		a->length = end - start;
		a->zeroed = map->zeroed;
		a->store_offset = take_space(map, a->length, map->zeroed);
	}
	pthread_mutex_unlock(&map->lock);
	ox_sleep_co(1000);
	return end > start ? 0 : -EAGAIN;
}

static int map_publish_co(struct ox_image_channel *channel, struct ox_allocation *a)
{
	struct map_format *map = map_of(channel->image);
	struct freed *freed = ox_xcalloc(1, sizeof(*freed));
	int rc = once(&map->publish_rc);
	bool changed = false;

	map_log(map, "publish");
	if (rc < 0) {
		free(freed);
		return rc;
	}
	pthread_mutex_lock(&map->lock);
	for (uint64_t at = 0; at < a->length; at += UNIT)
		changed |= is_in_place(get_entry(map, (a->offset + at) / UNIT));
	/* ops->allocate came between: those bytes must not be covered by older ones. */
	for (uint64_t at = 0; at < a->length && !changed; at += UNIT)
		replace(map, freed, (a->offset + at) / UNIT,
		        ENTRY(OX_EXTENT_DATA, OX_EXTENT_IN_PLACE, a->store_offset + at));
	set_dirty(map, true);
	pthread_mutex_unlock(&map->lock);
	free_later(channel, freed);
	return changed ? -EAGAIN : 0;
}

static void map_abort(struct ox_image_channel *channel, struct ox_allocation *a)
{
	map_log(map_of(channel->image), "abort");
}

static int clear(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                 const char *word)
{
	struct map_format *map = map_of(channel->image);
	uint64_t end = offset + length;

	assert_true(ox_is_aligned(offset, UNIT));
	assert_true(ox_is_aligned(end, UNIT) || end == map->image->size);
	map_log(map, word);
	while (offset < end) {
		struct freed *freed = ox_xcalloc(1, sizeof(*freed));

		pthread_mutex_lock(&map->lock);
		for (unsigned i = 0; i < OX_ARRAY_SIZE(freed->offset) && offset < end; i++) {
			replace(map, freed, offset / UNIT, ENTRY(OX_EXTENT_ZERO, 0, 0));
			offset += UNIT;
		}
		set_dirty(map, true);
		pthread_mutex_unlock(&map->lock);
		free_later(channel, freed);
	}
	return 0;
}

static int map_zero_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length,
                       bool unmap)
{
	return clear(channel, offset, length, unmap ? "unmap" : "zero");
}

static int map_discard_co(struct ox_image_channel *channel, uint64_t offset, uint64_t length)
{
	return clear(channel, offset, length, "discard");
}

static int map_commit_co(struct ox_image_channel *channel)
{
	struct map_format *map = map_of(channel->image);

	map_log(map, "commit");
	__atomic_fetch_add(&map->commits, 1, __ATOMIC_RELAXED);
	set_dirty(map, false);
	return once(&map->commit_rc);
}

static int map_resize_co(struct ox_image_channel *channel, uint64_t size,
                         enum ox_preallocation prealloc, struct ox_error *err)
{
	struct map_format *map = map_of(channel->image);
	uint64_t units = size / UNIT, old = channel->image->size;
	uint64_t *entry = ox_xcalloc(units, sizeof(*entry));
	bool *missing = ox_xcalloc(units, sizeof(*missing));

	for (uint64_t i = 0; i < units; i++)
		entry[i] = i < map->units ? map->entry[i] : ENTRY(OX_EXTENT_BACKING, 0, 0);
	free(map->entry);
	free(map->missing);
	map->entry = entry;
	map->missing = missing;
	map->units = units;
	channel->image->size = size;
	return ox_image_hide_backing_co(channel, old, size);
}

static void map_close(struct ox_image *image)
{
	image->priv = NULL;
}

/* --- the spy on the store
 * ------------------------------------------------------------------------------ */

static struct map_format *map_on(const struct ox_store *store)
{
	return fixture.top.image->store == store ? &fixture.top : &fixture.below;
}

static void spy_read(struct ox_channel *channel, struct ox_io *io)
{
	struct map_format *map = map_on(channel->store);

	__atomic_fetch_add(&map->reads, 1, __ATOMIC_RELAXED);
	map_log(map, "read");
	map->real_store->read(channel, io);
}

static void spy_write(struct ox_channel *channel, struct ox_io *io)
{
	struct map_format *map = map_on(channel->store);

	__atomic_fetch_add(&map->writes, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&map->write_bytes, io->length, __ATOMIC_RELAXED);
	__atomic_store_n(&map->write_flags, io->flags, __ATOMIC_RELAXED);
	__atomic_store_n(&map->write_fiber, ox_fiber_self(), __ATOMIC_RELAXED);
	map_log(map, "write");
	if (map->write_rc)
		ox_io_finish(io, once(&map->write_rc));
	else
		map->real_store->write(channel, io);
}

static void spy_flush(struct ox_channel *channel, struct ox_io *io)
{
	struct map_format *map = map_on(channel->store);

	__atomic_fetch_add(&map->flushes, 1, __ATOMIC_RELAXED);
	map_log(map, "flush");
	map->real_store->flush(channel, io);
}

/* --- the fixture
 * -------------------------------------------------------------------------------------- */

static const struct ox_format_maintenance maintenance = {.resize_co = map_resize_co};

static void init_map(struct map_format *map, struct ox_image *image, uint64_t size,
                     uint64_t cluster)
{
	*map = (struct map_format){.image = image,
	                           .cluster = cluster,
	                           .units = ox_align_up(size, UNIT) / UNIT,
	                           .next_zero = ZERO_SPACE,
	                           .lock = PTHREAD_MUTEX_INITIALIZER};
	map->entry = ox_xcalloc(map->units, sizeof(*map->entry));
	map->missing = ox_xcalloc(map->units, sizeof(*map->missing));
	for (uint64_t i = 0; i < map->units; i++)
		map->entry[i] = ENTRY(OX_EXTENT_ZERO, 0, 0);
	map->ops = (struct ox_format_ops){.name = "map",
	                                  .close = map_close,
	                                  .lookup = map_lookup,
	                                  .map_co = map_map_co,
	                                  .begin_co = map_begin_co,
	                                  .allocate = map_allocate,
	                                  .prepare_co = map_prepare_co,
	                                  .publish_co = map_publish_co,
	                                  .abort = map_abort,
	                                  .zero_co = map_zero_co,
	                                  .discard_co = map_discard_co,
	                                  .commit_co = map_commit_co,
	                                  .decompress = map_decompress,
	                                  .maintenance = &maintenance};
	/* It was opened as raw; from here on it is ours. */
	image->ops->close(image);
	image->ops = &map->ops;
	image->priv = map;
	image->size = size;
	image->cluster_size = cluster;
	image->zero_unit = UNIT;
	image->begun = false;
	map->real_store = image->store->ops;
	map->store_ops = *map->real_store;
	map->store_ops.read = spy_read;
	map->store_ops.write = spy_write;
	map->store_ops.flush = spy_flush;
	image->store->ops = &map->store_ops;
}

static void open_map(struct map_format *map, const char *name, uint64_t size, uint64_t cluster,
                     bool read_only)
{
	struct ox_image_options options = {
	        .format = "raw", .store = {.aio = OX_AIO_THREADS, .read_only = read_only}};
	struct ox_error err = {0};
	struct ox_image *image;

	if (ox_image_open(name, &options, &image, &err) < 0)
		fail_msg("open: %s", err.text);
	init_map(map, image, size, cluster);
}

static void close_map(struct map_format *map)
{
	if (!map->image)
		return;
	map->image->store->ops = map->real_store;
	map->image->backing = NULL;
	ox_image_close(map->image);
	free(map->entry);
	free(map->missing);
}

static void attach(void *arg)
{
	unsigned i = *(unsigned *)arg;

	assert_int_equal(
	        ox_image_attach(fixture.top.image, fixture.loops[i], &fixture.channel[i], NULL), 0);
}

static void detach_co(void *arg)
{
	ox_image_detach_co(fixture.channel[*(unsigned *)arg]);
}

static void fixture_co(void *arg)
{
	OX_FREE uint8_t *garbage = malloc(ZERO_SPACE);

	memset(garbage, GARBAGE, ZERO_SPACE);
	put(&fixture.top, 0, garbage, ZERO_SPACE);
	if (fixture.below.image)
		put(&fixture.below, 0, garbage, ZERO_SPACE);
	for (unsigned i = 0; i < fixture.channels; i++)
		ox_loop_call_co(fixture.loops[i], attach, &i);
	fixture.test->fn_co();
	for (unsigned i = 0; i < fixture.channels; i++)
		ox_loop_call_fiber_co(fixture.loops[i], detach_co, &i);
}

void map_run(const struct map_test *test)
{
	struct ox_loop_options options = {.name = "test"};
	const char *store = test->store ? test->store : "memory:16M";
	uint64_t size = test->size ? test->size : 256 << 10;
	uint64_t cluster = test->cluster ? test->cluster : 4096;

	memset(&fixture, 0, sizeof(fixture));
	fixture.test = test;
	fixture.channels = 1 + test->threads;
	fixture.loop = fixture.loops[0] = ox_loop_new(&options, NULL);
	for (unsigned i = 1; i < fixture.channels; i++) {
		fixture.thread[i] = ox_iothread_start(&options, NULL);
		assert_non_null(fixture.thread[i]);
		fixture.loops[i] = ox_iothread_loop(fixture.thread[i]);
	}
	open_map(&fixture.top, store, size, cluster, test->read_only);
	if (test->backing) {
		open_map(&fixture.below, "memory:16M", test->backing, cluster, true);
		fixture.top.image->backing = fixture.below.image;
		map_set(&fixture.top, 0, size, OX_EXTENT_BACKING);
	}
	ox_loop_run_fiber(fixture.loop, fixture_co, NULL);
	for (unsigned i = 1; i < fixture.channels; i++)
		ox_iothread_stop(fixture.thread[i]);
	close_map(&fixture.top);
	close_map(&fixture.below);
	ox_loop_free(fixture.loop);
	ox_fiber_pool_free();
}

/* --- requests
 * -------------------------------------------------------------------------------------------- */

struct call {
	struct ox_request request;
	struct ox_fiber *waiter;
	bool done;
};

static void call_done(struct ox_request *request)
{
	struct call *call = ox_container_of(request, struct call, request);

	assert_false(call->done);
	call->done = true;
	if (call->waiter)
		ox_fiber_resume(call->waiter);
}

int submit_co(unsigned channel, uint8_t op, uint64_t offset, const struct iovec *iov,
              unsigned count, uint64_t length, unsigned flags)
{
	struct call call = {.request = {.op = op,
	                                .flags = (uint8_t)flags,
	                                .offset = offset,
	                                .length = length,
	                                .iov = iov,
	                                .iovcnt = count,
	                                .image_done = call_done}};

	ox_image_submit(fixture.channel[channel], &call.request);
	if (!call.done) {
		call.waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	return call.request.result;
}

int op_co(uint8_t op, uint64_t offset, void *buf, uint64_t length, unsigned flags)
{
	struct iovec iov = {.iov_base = buf, .iov_len = length};

	return submit_co(0, op, offset, &iov, buf ? 1 : 0, length, flags);
}
