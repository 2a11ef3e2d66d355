/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Scatter-gather lists.
 */
#ifndef OX_BASE_IOV_H
#define OX_BASE_IOV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Sum of the lengths. */
size_t ox_iov_size(const struct iovec *iov, unsigned count);
/* Copies up to `bytes` from/to a list, starting `offset` bytes into it; returns bytes copied. */
size_t ox_iov_to_buf(const struct iovec *iov, unsigned count, size_t offset, void *buf,
                     size_t bytes);
size_t ox_iov_from_buf(const struct iovec *iov, unsigned count, size_t offset, const void *buf,
                       size_t bytes);
/* Fills `bytes` from `offset` with a byte value. */
size_t ox_iov_memset(const struct iovec *iov, unsigned count, size_t offset, int value,
                     size_t bytes);
/* Writes to `out` (room for `count` entries) the part [offset, offset + bytes) of a list;
 * returns how many entries that took. */
unsigned ox_iov_slice(const struct iovec *iov, unsigned count, size_t offset, size_t bytes,
                      struct iovec *out);
/* Every base and length is a multiple of align (a power of two). */
bool ox_iov_is_aligned(const struct iovec *iov, unsigned count, size_t align);
/* All `bytes` are zero (vectorised by the compiler; false for an empty range is not asked). */
bool ox_buffer_is_zero(const void *buf, size_t bytes);
bool ox_iov_is_zero(const struct iovec *iov, unsigned count);

#endif
