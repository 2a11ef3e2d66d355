/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Scatter-gather lists.  Entries of length 0 are legal everywhere.
 */
#include "base/iov.h"
#include "base/base.h"
#include <string.h>

size_t ox_iov_size(const struct iovec *iov, unsigned count)
{
	size_t total = 0;

	for (unsigned i = 0; i < count; i++)
		total += iov[i].iov_len;
	return total;
}

/* A place in a list, and what is left to do from there. */
struct cursor {
	const struct iovec *iov;
	unsigned count;
	size_t skip; /* bytes of the first entry that lie before the place */
	size_t left;
};

/* The next contiguous piece; false at the end of the list or of what was asked. */
static bool next_piece(struct cursor *c, char **base, size_t *length)
{
	while (c->count && c->left) {
		const struct iovec *v = c->iov;
		size_t skip = c->skip;

		c->iov++;
		c->count--;
		if (skip >= v->iov_len) {
			c->skip -= v->iov_len;
			continue;
		}
		c->skip = 0;
		*base = (char *)v->iov_base + skip;
		*length = ox_min(v->iov_len - skip, c->left);
		c->left -= *length;
		return true;
	}
	return false;
}

size_t ox_iov_to_buf(const struct iovec *iov, unsigned count, size_t offset, void *buf,
                     size_t bytes)
{
	struct cursor c = {iov, count, offset, bytes};
	size_t done = 0, length;
	char *base;

	while (next_piece(&c, &base, &length)) {
		memcpy((char *)buf + done, base, length);
		done += length;
	}
	return done;
}

size_t ox_iov_from_buf(const struct iovec *iov, unsigned count, size_t offset, const void *buf,
                       size_t bytes)
{
	struct cursor c = {iov, count, offset, bytes};
	size_t done = 0, length;
	char *base;

	while (next_piece(&c, &base, &length)) {
		memcpy(base, (const char *)buf + done, length);
		done += length;
	}
	return done;
}

size_t ox_iov_memset(const struct iovec *iov, unsigned count, size_t offset, int value,
                     size_t bytes)
{
	struct cursor c = {iov, count, offset, bytes};
	size_t done = 0, length;
	char *base;

	while (next_piece(&c, &base, &length)) {
		memset(base, value, length);
		done += length;
	}
	return done;
}

unsigned ox_iov_slice(const struct iovec *iov, unsigned count, size_t offset, size_t bytes,
                      struct iovec *out)
{
	struct cursor c = {iov, count, offset, bytes};
	unsigned used = 0;
	size_t length;
	char *base;

	while (next_piece(&c, &base, &length)) {
		out[used].iov_base = base;
		out[used].iov_len = length;
		used++;
	}
	return used;
}

bool ox_iov_is_aligned(const struct iovec *iov, unsigned count, size_t align)
{
	uintptr_t bits = 0;

	for (unsigned i = 0; i < count; i++)
		bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
	return (bits & (align - 1)) == 0;
}

/* 32 bytes at any address: one or two vector loads on every CPU we know. */
typedef uint64_t zero_vector __attribute__((vector_size(32), aligned(1), may_alias));

bool ox_buffer_is_zero(const void *buf, size_t bytes)
{
	const unsigned char *p = buf;
	const unsigned char *end = p + bytes;
	unsigned char tail = 0;

	if (!bytes)
		return true;
	/* Data mostly shows itself at once. */
	if (p[0] | p[bytes / 2] | p[bytes - 1])
		return false;
	for (; (size_t)(end - p) >= 4 * sizeof(zero_vector); p += 4 * sizeof(zero_vector)) {
		const zero_vector *v = (const zero_vector *)(const void *)p;
		zero_vector any = (v[0] | v[1]) | (v[2] | v[3]);

		if (any[0] | any[1] | any[2] | any[3])
			return false;
	}
	while (p < end)
		tail |= *p++;
	return tail == 0;
}

bool ox_iov_is_zero(const struct iovec *iov, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		if (!ox_buffer_is_zero(iov[i].iov_base, iov[i].iov_len))
			return false;
	return true;
}
