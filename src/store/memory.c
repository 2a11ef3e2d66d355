/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * "memory:SIZE" and "memory:NAME:SIZE": a store in this process's memory, for tests.  A named
 * one keeps its content from one opening to the next; openings at the same time share it.
 *
 * The bytes are one mapping without reserved memory, within a larger reserved range of addresses,
 * so that it grows in place while others use it.  `present` has a bit for each chunk that may
 * hold something else than zeroes.
 *
 * Locking: requests copy without a lock: callers on several threads do not touch the same bytes
 * at the same time (or get what a disk would give them, either content).  A chunk's bit is set
 * after its bytes were copied in and cleared before its memory is given back, so that a chunk
 * with content never counts as a hole.  The list of names has a mutex.
 */
#include "store/memory.h"
#include "store/store.h"
#include "base/iov.h"
#include "base/text.h"
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/queue.h>

#define CHUNK_SHIFT 16
#define CHUNK_SIZE  (UINT64_C(1) << CHUNK_SHIFT)
#define WORD_BITS   64u

struct memory_content {
	LIST_ENTRY(memory_content) link;
	char *name; /* NULL: not shared */
	unsigned references;
	uint8_t *bytes;
	uint64_t reserved; /* addresses, bytes */
	uint64_t size;     /* atomic */
	uint64_t *present; /* atomic words */
	size_t present_bytes;
};

static pthread_mutex_t names_lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, memory_content) names = LIST_HEAD_INITIALIZER(names);

static void content_free(struct memory_content *content)
{
	if (content->bytes)
		munmap(content->bytes, content->reserved);
	if (content->present)
		munmap(content->present, content->present_bytes);
	free(content->name);
	free(content);
}

/* names_lock is held if the content has a name. */
static void content_put(struct memory_content *content)
{
	if (--content->references == 0)
		content_free(content);
}

static struct memory_content *content_new(uint64_t size)
{
	struct memory_content *content = ox_xcalloc(1, sizeof(*content));
	uint64_t room = ox_max(size, UINT64_C(4) << 30);
	void *map;

	if (room > UINT64_C(1) << 46)
		goto fail;
	content->references = 1;
	content->reserved = ox_align_up(room * 2, CHUNK_SIZE);
	content->size = size;
	map = mmap(NULL, content->reserved, PROT_READ | PROT_WRITE,
	           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		goto fail;
	content->bytes = map;
	content->present_bytes =
	        (content->reserved / CHUNK_SIZE + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t);
	map = mmap(NULL, content->present_bytes, PROT_READ | PROT_WRITE,
	           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map == MAP_FAILED)
		goto fail;
	content->present = map;
	return content;
fail:
	content_free(content);
	return NULL;
}

static struct memory_content *content_find(const char *name)
{
	struct memory_content *content;

	LIST_FOREACH (content, &names, link) {
		if (!strcmp(content->name, name))
			return content;
	}
	return NULL;
}

void ox_memory_forget(const char *name)
{
	struct memory_content *content;

	pthread_mutex_lock(&names_lock);
	content = content_find(name);
	if (content) {
		LIST_REMOVE(content, link);
		content_put(content);
	}
	pthread_mutex_unlock(&names_lock);
}

static bool chunk_present(const struct memory_content *content, uint64_t chunk)
{
	uint64_t word = __atomic_load_n(&content->present[chunk / WORD_BITS], __ATOMIC_ACQUIRE);

	return word >> (chunk % WORD_BITS) & 1;
}

static void mark_present(struct memory_content *content, uint64_t offset, uint64_t length)
{
	uint64_t last = (offset + length - 1) >> CHUNK_SHIFT;

	for (uint64_t chunk = offset >> CHUNK_SHIFT; chunk <= last; chunk++) {
		if (!chunk_present(content, chunk))
			__atomic_fetch_or(&content->present[chunk / WORD_BITS],
			                  UINT64_C(1) << (chunk % WORD_BITS), __ATOMIC_RELEASE);
	}
}

/* Makes a range zero, and gives whole chunks back. */
static void clear_range(struct memory_content *content, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length;

	while (offset < end) {
		uint64_t chunk = offset >> CHUNK_SHIFT;
		uint64_t step = ox_min(end, (chunk + 1) << CHUNK_SHIFT) - offset;

		if (step == CHUNK_SIZE) {
			__atomic_fetch_and(&content->present[chunk / WORD_BITS],
			                   ~(UINT64_C(1) << (chunk % WORD_BITS)), __ATOMIC_ACQ_REL);
			madvise(content->bytes + offset, step, MADV_DONTNEED);
		} else if (chunk_present(content, chunk)) {
			memset(content->bytes + offset, 0, step);
		}
		offset += step;
	}
}

/* --- the table -------------------------------------------------------------------------- */

static int memory_open(struct ox_store *store, const char *path, struct ox_error *err)
{
	const char *colon = strrchr(path, ':');
	const char *digits = colon ? colon + 1 : path;
	struct memory_content *content = NULL;
	OX_FREE char *name = NULL;
	uint64_t size;

	if (!ox_parse_size(digits, 1, &size) || colon == path)
		return ox_error_set(err, EINVAL,
		                    "%s: a memory store is memory:SIZE or memory:NAME:SIZE, e.g. "
		                    "memory:64M",
		                    store->path);
	if (!colon) {
		content = content_new(size);
	} else {
		name = ox_xstrdup(path);
		name[colon - path] = '\0';
		pthread_mutex_lock(&names_lock);
		content = content_find(name);
		if (!content) {
			content = content_new(size);
			if (content) {
				content->name = ox_steal_ptr(name);
				LIST_INSERT_HEAD(&names, content, link);
			}
		}
		if (content)
			content->references++;
		pthread_mutex_unlock(&names_lock);
	}
	if (!content)
		return ox_error_set(err, ENOMEM, "%s: too large for this process's memory",
		                    store->path);
	store->priv = content;
	store->aio = OX_AIO_SYNC;
	snprintf(store->aio_reason, sizeof(store->aio_reason), "a memory store does no I/O");
	return 0;
}

static void memory_close(struct ox_store *store)
{
	pthread_mutex_lock(&names_lock);
	content_put(store->priv);
	pthread_mutex_unlock(&names_lock);
}

static int memory_size(struct ox_store *store, uint64_t *size)
{
	struct memory_content *content = store->priv;

	*size = __atomic_load_n(&content->size, __ATOMIC_RELAXED);
	return 0;
}

static void memory_limits(struct ox_store *store, struct ox_store_limits *limits)
{
	*limits = (struct ox_store_limits){
	        .request_alignment = 1,
	        .memory_alignment = 1,
	        .max_iov = UINT32_MAX,
	        .logical_block_size = 512,
	        .physical_block_size = 4096,
	        .discard_granularity = CHUNK_SIZE,
	        .can_discard = !store->options.read_only,
	        .zero_is_fast = true,
	};
}

static int memory_attach(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
                         struct ox_error *err)
{
	*channel = ox_xcalloc(1, sizeof(**channel));
	return 0;
}

static void memory_detach(struct ox_channel *channel)
{
	free(channel);
}

static void memory_read(struct ox_channel *channel, struct ox_io *io)
{
	struct memory_content *content = channel->store->priv;

	ox_iov_from_buf(io->iov, io->iovcnt, 0, content->bytes + io->offset, io->length);
	ox_io_finish(io, 0);
}

static void memory_write(struct ox_channel *channel, struct ox_io *io)
{
	struct memory_content *content = channel->store->priv;

	ox_iov_to_buf(io->iov, io->iovcnt, 0, content->bytes + io->offset, io->length);
	mark_present(content, io->offset, io->length);
	ox_io_finish(io, 0);
}

static void memory_flush(struct ox_channel *channel, struct ox_io *io)
{
	ox_io_finish(io, 0);
}

static void memory_zero(struct ox_channel *channel, struct ox_io *io)
{
	struct memory_content *content = channel->store->priv;

	clear_range(content, io->offset, io->length);
	if (!(io->flags & OX_IO_MAY_UNMAP))
		mark_present(content, io->offset, io->length);
	ox_io_finish(io, 0);
}

/* Whole chunks are given back, the rest stays as it is: a discard is a hint. */
static void memory_discard(struct ox_channel *channel, struct ox_io *io)
{
	struct memory_content *content = channel->store->priv;
	uint64_t start = ox_align_up(io->offset, CHUNK_SIZE);
	uint64_t end = ox_align_down(io->offset + io->length, CHUNK_SIZE);

	if (io->op == OX_IO_SECURE_ERASE) {
		ox_io_finish(io, -ENOTSUP);
		return;
	}
	if (start < end)
		clear_range(content, start, end - start);
	ox_io_finish(io, 0);
}

static int memory_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes)
{
	struct memory_content *content = store->priv;

	memcpy(buf, content->bytes + offset, bytes);
	return 0;
}

static int memory_status(struct ox_store *store, uint64_t offset, uint64_t *length,
                         enum ox_block_status *status)
{
	struct memory_content *content = store->priv;
	uint64_t end = offset + *length;
	uint64_t at = offset;
	bool present = chunk_present(content, offset >> CHUNK_SHIFT);

	while (at < end && chunk_present(content, at >> CHUNK_SHIFT) == present)
		at = ((at >> CHUNK_SHIFT) + 1) << CHUNK_SHIFT;
	*status = present ? OX_STATUS_DATA : OX_STATUS_ZERO;
	*length = ox_min(at, end) - offset;
	return 0;
}

static int memory_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                           void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                           struct ox_error *err)
{
	struct memory_content *content = store->priv;
	uint64_t old = __atomic_load_n(&content->size, __ATOMIC_RELAXED);

	if (size > content->reserved)
		return ox_error_set(err, EFBIG,
		                    "%s: a memory store of this size cannot grow so far",
		                    store->path);
	if (size < old)
		clear_range(content, size, ox_align_up(old, CHUNK_SIZE) - size);
	else if (size > old && prealloc != OX_PREALLOC_OFF)
		mark_present(content, old, size - old);
	__atomic_store_n(&content->size, size, __ATOMIC_RELAXED);
	if (progress)
		progress(arg, size, size);
	return 0;
}

const struct ox_store_ops ox_store_memory = {
        .name = "memory",
        .open = memory_open,
        .close = memory_close,
        .size = memory_size,
        .limits = memory_limits,
        .attach = memory_attach,
        .detach = memory_detach,
        .read = memory_read,
        .write = memory_write,
        .flush = memory_flush,
        .zero = memory_zero,
        .discard = memory_discard,
        .pread = memory_pread,
        .status = memory_status,
        .truncate = memory_truncate,
};
