/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The dirty log of a migration: a client's bitmap, a bit for each 4096 bytes of guest-physical
 * address (vhost-user, "Migration").
 *
 * Any thread.  The bytes are written first, then the bit; the or is sequentially consistent, so
 * that a front end that finds and clears the bit sees the bytes.  A bit that is set already is
 * set again: a look before would be a load that may pass the store of the bytes.
 */
#include "virtio/memory.h"

#include <errno.h>

#define PAGE_SHIFT 12

int ox_dirty_log_map(int fd, uint64_t size, uint64_t offset, struct ox_dirty_log **log,
                     struct ox_error *err)
{
	OX_FREE struct ox_dirty_log *new = calloc(1, sizeof(*new));
	int rc;

	*log = NULL;
	if (!new)
		return ox_error_set(err, ENOMEM, "dirty log: out of memory");
	rc = ox_mapping_map(fd, size, offset, &new->mapping, err);
	if (rc < 0)
		return rc;
	new->references = 1;
	new->bits = (uint8_t *)new->mapping.host;
	new->size = size;
	*log = ox_steal_ptr(new);
	return 0;
}

struct ox_dirty_log *ox_dirty_log_get(struct ox_dirty_log *log)
{
	if (log)
		__atomic_add_fetch(&log->references, 1, __ATOMIC_RELAXED);
	return log;
}

void ox_dirty_log_put(struct ox_dirty_log *log)
{
	if (!log || __atomic_sub_fetch(&log->references, 1, __ATOMIC_ACQ_REL))
		return;
	ox_mapping_unmap(&log->mapping);
	free(log);
}

void ox_dirty_log_mark(struct ox_dirty_log *log, uint64_t guest_addr, uint64_t length)
{
	uint64_t page, last, end;

	if (!length)
		return;
	if (__builtin_add_overflow(guest_addr, length - 1, &end))
		end = UINT64_MAX;
	page = guest_addr >> PAGE_SHIFT;
	last = end >> PAGE_SHIFT;
	/* The client promised a log that covers its memory; what lies beyond has no bit. */
	if (page / 8 >= log->size)
		return;
	if (last / 8 >= log->size)
		last = log->size * 8 - 1;
	while (page <= last) {
		unsigned from = page % 8;
		unsigned to = last - page >= 7 - from ? 7 : from + (unsigned)(last - page);
		uint8_t bits = (uint8_t)((0xffu << from) & (0xffu >> (7 - to)));

		__atomic_fetch_or(&log->bits[page / 8], bits, __ATOMIC_SEQ_CST);
		page += to - from + 1;
	}
}
