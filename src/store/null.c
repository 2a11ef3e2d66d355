/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * "null:SIZE": a store that keeps nothing.  Every request completes at once, on the way down;
 * reads leave their buffers alone.  For benchmarks of everything above a store.
 */
#include "store/store.h"
#include "base/text.h"
#include <errno.h>
#include <string.h>
#include <stdio.h>

struct null_store {
	uint64_t size;
};

static int null_open(struct ox_store *store, const char *path, struct ox_error *err)
{
	struct null_store *null;
	uint64_t size;

	if (!ox_parse_size(path, 1, &size))
		return ox_error_set(err, EINVAL,
		                    "%s: '%s' is not a size; a null store is null:SIZE, e.g. "
		                    "null:10G",
		                    store->path, path);
	null = ox_xcalloc(1, sizeof(*null));
	null->size = size;
	store->priv = null;
	snprintf(store->aio_reason, sizeof(store->aio_reason), "a null store does no I/O");
	store->aio = OX_AIO_SYNC;
	return 0;
}

static void null_close(struct ox_store *store)
{
	free(store->priv);
}

static int null_size(struct ox_store *store, uint64_t *size)
{
	const struct null_store *null = store->priv;

	*size = null->size;
	return 0;
}

static void null_limits(struct ox_store *store, struct ox_store_limits *limits)
{
	*limits = (struct ox_store_limits){
	        .request_alignment = 1,
	        .memory_alignment = 1,
	        .max_iov = UINT32_MAX,
	        .logical_block_size = 512,
	        .physical_block_size = 512,
	        .can_discard = true,
	        .zero_is_fast = true,
	};
}

static int null_attach(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
                       struct ox_error *err)
{
	*channel = ox_xcalloc(1, sizeof(**channel));
	return 0;
}

static void null_detach(struct ox_channel *channel)
{
	free(channel);
}

static void null_io(struct ox_channel *channel, struct ox_io *io)
{
	ox_io_finish(io, 0);
}

static int null_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes)
{
	memset(buf, 0, bytes);
	return 0;
}

static int null_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                         void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                         struct ox_error *err)
{
	struct null_store *null = store->priv;

	null->size = size;
	return 0;
}

const struct ox_store_ops ox_store_null = {
        .name = "null",
        .open = null_open,
        .close = null_close,
        .size = null_size,
        .limits = null_limits,
        .attach = null_attach,
        .detach = null_detach,
        .read = null_io,
        .write = null_io,
        .flush = null_io,
        .zero = null_io,
        .discard = null_io,
        .pread = null_pread,
        .truncate = null_truncate,
};
