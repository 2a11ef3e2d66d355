/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The checked wrappers around every store, and the choice of a store by its name.
 *
 * Invariants: a request reaches an implementation only with a range within the size, a list
 * whose sum is its length, flags that its operation knows, and a length above 0; so an
 * implementation repeats none of these checks.  channel->in_flight counts from here to
 * ox_io_finish().
 *
 * Locking: none.  A store's size is read and written atomically: a resize happens on another
 * thread than I/O, and a request sees the old or the new size.
 */
#include "store/store.h"
#include "store/internal.h"
#include "base/fiber.h"
#include "base/iov.h"
#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

static uint8_t zeroes[OX_ZEROES_SIZE] __attribute__((aligned(4096)));
const uint8_t *const ox_zeroes = zeroes;

#define ZERO_PIECES 16u /* entries of the list that writes zeroes: 4 MiB a request */

/* --- names ------------------------------------------------------------------------------ */

static const struct ox_store_ops *const stores[] = {
        &ox_store_file,
        &ox_store_null,
        &ox_store_memory,
        &ox_store_faulty,
};

/* Finds the store for a name; *path is what is left of the name without the scheme. */
static const struct ox_store_ops *find_store(const char *name, const char **path,
                                             struct ox_error *err)
{
	const char *colon = strchr(name, ':');
	struct stat st;
	size_t length;

	*path = name;
	if (!colon || memchr(name, '/', (size_t)(colon - name)))
		return &ox_store_file;
	length = (size_t)(colon - name);
	for (size_t i = 0; i < OX_ARRAY_SIZE(stores); i++) {
		if (strlen(stores[i]->name) == length && !memcmp(stores[i]->name, name, length)) {
			*path = colon + 1;
			return stores[i];
		}
	}
	if (stat(name, &st) == 0)
		return &ox_store_file;
	ox_error_set(err, ENOENT,
	             "%s: there is no such file, and no store is called '%.*s' (stores: file, "
	             "null, memory); write ./%s for a file name with a colon",
	             name, (int)length, name, name);
	return NULL;
}

int ox_store_open(const char *name, const struct ox_store_options *options, struct ox_store **out,
                  struct ox_error *err)
{
	const struct ox_store_ops *ops;
	struct ox_store *store;
	const char *path;
	uint64_t size;
	int ret;

	*out = NULL;
	ops = find_store(name, &path, err);
	if (!ops)
		return -ENOENT;
	store = ox_xcalloc(1, sizeof(*store));
	store->ops = ops;
	store->path = ox_xstrdup(name);
	store->options = *options;
	if (!store->options.opener)
		store->options.opener = &ox_opener_direct;
	if (!store->options.write_granularity)
		store->options.write_granularity = 1;
	/* What the implementation does not overrule. */
	store->aio = store->options.aio == OX_AIO_AUTO ? OX_AIO_SYNC : store->options.aio;
	store->limits.logical_block_size = 512;

	ret = ops->open(store, path, err);
	if (ret < 0)
		goto out_free;
	ops->limits(store, &store->limits);
	ret = ops->size(store, &size);
	if (ret < 0) {
		ox_error_set(err, -ret, "%s: cannot ask for its size: %s", name, strerror(-ret));
		goto out_close;
	}
	store->size = size;
	*out = store;
	return 0;

out_close:
	ops->close(store);
out_free:
	free(store->path);
	free(store);
	return ret;
}

void ox_store_close(struct ox_store *store)
{
	if (!store)
		return;
	assert(__atomic_load_n(&store->channels, __ATOMIC_RELAXED) == 0);
	store->ops->close(store);
	free(store->path);
	free(store);
}

/* --- channels --------------------------------------------------------------------------- */

int ox_store_attach(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
                    struct ox_error *err)
{
	int ret;

	*channel = NULL;
	ret = store->ops->attach(store, loop, channel, err);
	if (ret < 0)
		return ret;
	(*channel)->store = store;
	(*channel)->loop = loop;
	(*channel)->in_flight = 0;
	__atomic_fetch_add(&store->channels, 1, __ATOMIC_RELAXED);
	return 0;
}

void ox_store_detach(struct ox_channel *channel)
{
	struct ox_store *store;

	if (!channel)
		return;
	assert(channel->in_flight == 0);
	store = channel->store;
	store->ops->detach(channel);
	__atomic_fetch_sub(&store->channels, 1, __ATOMIC_RELAXED);
}

/* --- data ------------------------------------------------------------------------------- */

static bool iov_matches(const struct ox_io *io)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < io->iovcnt; i++) {
		if (__builtin_add_overflow(sum, io->iov[i].iov_len, &sum))
			return false;
	}
	return sum == io->length;
}

/* 0: go on; 1: nothing to do; or -errno. */
static int check_io(const struct ox_store *store, const struct ox_io *io)
{
	static const uint8_t allowed[] = {
	        [OX_IO_READ] = 0,
	        [OX_IO_WRITE] = OX_IO_DSYNC,
	        [OX_IO_FLUSH] = 0,
	        [OX_IO_ZERO] = OX_IO_DSYNC | OX_IO_MAY_UNMAP | OX_IO_NO_FALLBACK,
	        [OX_IO_DISCARD] = OX_IO_DSYNC,
	        [OX_IO_SECURE_ERASE] = OX_IO_DSYNC,
	};

	if (ox_unlikely(io->op >= OX_ARRAY_SIZE(allowed) || (io->flags & ~allowed[io->op])))
		return -EINVAL;
	if (io->op == OX_IO_FLUSH)
		return 0;
	if (ox_unlikely(io->op != OX_IO_READ && store->options.read_only))
		return -EROFS;
	if (ox_unlikely(!ox_range_within(io->offset, io->length, ox_store_size_now(store))))
		return -EIO;
	if (io->op <= OX_IO_WRITE && ox_unlikely(!iov_matches(io)))
		return -EINVAL;
	if (io->op == OX_IO_SECURE_ERASE && !store->limits.can_secure_erase)
		return -ENOTSUP;
	return ox_unlikely(io->length == 0) ? 1 : 0;
}

static void zero_fiber(void *arg)
{
	struct ox_io *io = arg;
	int ret = ox_store_write_zeroes_co(io->channel, io->offset, io->length, io->flags);

	ox_io_finish(io, ret);
}

static void zero_fallback(struct ox_io *io)
{
	int ret;

	if (io->flags & OX_IO_NO_FALLBACK) {
		ox_io_finish(io, -ENOTSUP);
		return;
	}
	ret = ox_fiber_start(zero_fiber, io);
	if (ret < 0)
		ox_io_finish(io, ret);
}

void ox_store_dispatch(struct ox_channel *channel, struct ox_io *io)
{
	struct ox_store *store = channel->store;

	io->channel = channel;
	channel->in_flight++;
	switch (io->op) {
	case OX_IO_READ:
		store->ops->read(channel, io);
		break;
	case OX_IO_WRITE:
		store->ops->write(channel, io);
		break;
	case OX_IO_FLUSH:
		if (ox_unlikely(__atomic_load_n(&store->flush_failed, __ATOMIC_ACQUIRE)))
			ox_io_finish(io, -EIO);
		else
			store->ops->flush(channel, io);
		break;
	case OX_IO_ZERO:
		if (store->ops->zero)
			store->ops->zero(channel, io);
		else
			zero_fallback(io);
		break;
	case OX_IO_DISCARD:
	case OX_IO_SECURE_ERASE:
		if (store->ops->discard)
			store->ops->discard(channel, io);
		else
			ox_io_finish(io, io->op == OX_IO_DISCARD ? 0 : -ENOTSUP);
		break;
	}
}

void ox_store_submit(struct ox_channel *channel, struct ox_io *io)
{
	int ret = check_io(channel->store, io);

	if (ox_likely(ret == 0)) {
		ox_store_dispatch(channel, io);
		return;
	}
	io->channel = channel;
	channel->in_flight++;
	ox_io_finish(io, ret < 0 ? ret : 0);
}

struct io_waiter {
	struct ox_io io; /* a copy: the caller's stays as it was */
	struct ox_fiber *fiber;
	bool finished;
};

static void io_wake(struct ox_io *io)
{
	struct io_waiter *waiter = ox_container_of(io, struct io_waiter, io);

	waiter->finished = true;
	if (waiter->fiber)
		ox_fiber_resume(waiter->fiber);
}

static int run_io_co(struct ox_channel *channel, struct ox_io *io,
                     void (*submit)(struct ox_channel *channel, struct ox_io *io))
{
	struct io_waiter waiter = {.io = *io};

	waiter.io.done = io_wake;
	submit(channel, &waiter.io);
	if (!waiter.finished) {
		waiter.fiber = ox_fiber_self();
		ox_fiber_suspend();
	}
	assert(waiter.finished);
	io->result = waiter.io.result;
	return io->result;
}

int ox_store_submit_co(struct ox_channel *channel, struct ox_io *io)
{
	return run_io_co(channel, io, ox_store_submit);
}

int ox_store_dispatch_co(struct ox_channel *channel, struct ox_io *io)
{
	return run_io_co(channel, io, ox_store_dispatch);
}

int ox_store_read_co(struct ox_channel *channel, uint64_t offset, void *buf, size_t bytes)
{
	struct iovec iov = {.iov_base = buf, .iov_len = bytes};
	struct ox_io io = {
	        .op = OX_IO_READ, .offset = offset, .length = bytes, .iov = &iov, .iovcnt = 1};

	return ox_store_submit_co(channel, &io);
}

int ox_store_write_co(struct ox_channel *channel, uint64_t offset, const void *buf, size_t bytes,
                      unsigned flags)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = bytes};
	struct ox_io io = {.op = OX_IO_WRITE,
	                   .flags = (uint8_t)flags,
	                   .offset = offset,
	                   .length = bytes,
	                   .iov = &iov,
	                   .iovcnt = 1};

	return ox_store_submit_co(channel, &io);
}

int ox_store_flush_co(struct ox_channel *channel)
{
	struct ox_io io = {.op = OX_IO_FLUSH};

	return ox_store_submit_co(channel, &io);
}

int ox_store_write_zeroes_co(struct ox_channel *channel, uint64_t offset, uint64_t length,
                             unsigned flags)
{
	struct iovec iov[ZERO_PIECES];

	while (length > 0) {
		struct ox_io io = {.op = OX_IO_WRITE,
		                   .flags = (uint8_t)(flags & OX_IO_DSYNC),
		                   .offset = offset,
		                   .iov = iov};
		int ret;

		while (io.iovcnt < ZERO_PIECES && io.length < length) {
			size_t piece = (size_t)ox_min(length - io.length, (uint64_t)OX_ZEROES_SIZE);

			iov[io.iovcnt].iov_base = zeroes;
			iov[io.iovcnt++].iov_len = piece;
			io.length += piece;
		}
		ret = ox_store_dispatch_co(channel, &io);
		if (ret < 0)
			return ret;
		offset += io.length;
		length -= io.length;
	}
	return 0;
}

/* --- control ---------------------------------------------------------------------------- */

int ox_store_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes)
{
	uint64_t size = ox_store_size_now(store);
	size_t inside;

	if (offset >= size) {
		memset(buf, 0, bytes);
		return 0;
	}
	inside = (size_t)ox_min((uint64_t)bytes, size - offset);
	memset((uint8_t *)buf + inside, 0, bytes - inside);
	return inside ? store->ops->pread(store, offset, buf, inside) : 0;
}

int ox_store_refresh_size(struct ox_store *store, uint64_t *size)
{
	uint64_t now;
	int ret = store->ops->size(store, &now);

	if (ret < 0)
		return ret;
	__atomic_store_n(&store->size, now, __ATOMIC_RELAXED);
	if (size)
		*size = now;
	return 0;
}

int ox_store_status(struct ox_store *store, uint64_t offset, uint64_t *length,
                    enum ox_block_status *status)
{
	uint64_t size = ox_store_size_now(store);
	uint64_t asked;
	int ret;

	if (offset >= size || *length == 0)
		return -EINVAL;
	*length = ox_min(*length, size - offset);
	*status = OX_STATUS_DATA;
	if (!store->ops->status)
		return 0;
	asked = *length;
	ret = store->ops->status(store, offset, length, status);
	if (ret < 0)
		return ret;
	*length = ox_min(*length, asked);
	assert(*length > 0);
	return 0;
}

int ox_store_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                      void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                      struct ox_error *err)
{
	int ret;

	if (store->options.read_only)
		return ox_error_set(err, EROFS, "%s: open read-only, it cannot be resized",
		                    store->path);
	if (size > INT64_MAX)
		return ox_error_set(err, EFBIG, "%s: a size above 2^63 bytes is not possible",
		                    store->path);
	if (!store->ops->truncate)
		return ox_error_set(err, ENOTSUP, "%s: a %s store cannot be resized", store->path,
		                    store->ops->name);
	ret = store->ops->truncate(store, size, prealloc, progress, arg, err);
	if (ret < 0)
		return ret;
	ret = ox_store_refresh_size(store, NULL);
	if (ret < 0)
		return ox_error_set(err, -ret, "%s: cannot ask for its size: %s", store->path,
		                    strerror(-ret));
	return 0;
}

int ox_store_lock(struct ox_store *store, enum ox_lock_mode mode, struct ox_error *err)
{
	int ret = 0;

	if ((mode == OX_LOCK_WRITE || mode == OX_LOCK_SHARED_WRITE) && store->options.read_only)
		return ox_error_set(err, EROFS, "%s: open read-only, it cannot be locked to write",
		                    store->path);
	if (store->ops->lock)
		ret = store->ops->lock(store, mode, err);
	if (ret == 0)
		store->options.lock = mode;
	return ret;
}
