/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest's memory: regions that a client gave, mapped here, touched only by checked
 * translation.
 *
 * A table of regions is immutable once published and counted; a queue holds a reference to the
 * table that it uses, so that removing a region is: publish a new table, let the queues take
 * it, wait for the I/O that touches the old one, drop it (the mapping goes with the last table
 * that has the region).
 *
 * SIGBUS (a client truncated its file): the handler maps zero pages over the faulting page's
 * region and sets the region's `broken` flag; queues that see it break.  Registered regions only,
 * any other SIGBUS keeps its default action.
 *
 * The dirty log (VHOST_USER_SET_LOG_BASE) is a bitmap with a bit for each 4096 bytes of
 * guest-physical address; bits are set with atomic or after the bytes were written.
 */
#ifndef OX_VIRTIO_MEMORY_H
#define OX_VIRTIO_MEMORY_H

#include "base/base.h"
#include <oxbow/error.h>
#include <sys/uio.h>

#define OX_MEMORY_MAX_REGIONS 509

/* A part of a client's file, mapped shared and guarded against SIGBUS (also used for the inflight
 * region).  main's thread. */
struct ox_mapping {
	char *host;    /* the byte at `offset` */
	uint64_t size; /* bytes from host on */
	bool *broken;  /* set by the SIGBUS handler; valid until unmapped */
	void *base;    /* what mmap gave */
	uint64_t base_size;
	int slot;
};
/* The descriptor stays the caller's.  -EINVAL: the file is shorter, or offset + size overflows. */
int ox_mapping_map(int fd, uint64_t size, uint64_t offset, struct ox_mapping *mapping,
                   struct ox_error *err) OX_MUST_CHECK;
/* Also for a zeroed struct. */
void ox_mapping_unmap(struct ox_mapping *mapping);

struct ox_region {
	uint64_t guest_addr; /* guest-physical */
	uint64_t size;       /* bytes */
	uint64_t user_addr;  /* the front end's virtual address: vring addresses use it */
	uint64_t mmap_offset;
	char *host;          /* our address of guest_addr */
	unsigned references; /* tables that hold it; atomic */
	bool *broken;        /* set by the SIGBUS handler */
	struct ox_mapping mapping;
};

struct ox_memory {
	unsigned references; /* atomic */
	unsigned count;
	struct ox_region *region[]; /* sorted by guest_addr, not overlapping */
};

/* Maps a descriptor (taken over, also on failure) as a region. */
int ox_region_map(uint64_t guest_addr, uint64_t size, uint64_t user_addr, uint64_t mmap_offset,
                  int fd, struct ox_region **region, struct ox_error *err) OX_MUST_CHECK;

struct ox_memory *ox_memory_new(void);
/* A copy with one more region (the region's reference is taken over, also on failure) / without
 * the one at guest_addr, size and user_addr. -EEXIST overlap, -ENOSPC too many, -ENOENT.  The old
 * table is left alone and stays the caller's. */
int ox_memory_with(const struct ox_memory *old, struct ox_region *add, struct ox_memory **out,
                   struct ox_error *err) OX_MUST_CHECK;
int ox_memory_without(const struct ox_memory *old, uint64_t guest_addr, uint64_t size,
                      uint64_t user_addr, struct ox_memory **out, struct ox_error *err)
        OX_MUST_CHECK;
struct ox_memory *ox_memory_get(struct ox_memory *memory);
void ox_memory_put(struct ox_memory *memory);

/* The region that holds all of [addr, addr + length), or NULL.  *hint: a cache of the last
 * answer, one per queue. */
const struct ox_region *ox_memory_find(const struct ox_memory *memory, uint64_t addr,
                                       uint64_t length, const struct ox_region **hint);
/* Host pointer for bytes at guest-physical addr, and how many of `length` are contiguous there
 * (a range may continue in the next region, elsewhere in our address space); NULL: outside. */
void *ox_memory_translate(const struct ox_memory *memory, uint64_t addr, uint64_t length,
                          uint64_t *contiguous, const struct ox_region **hint);
/* For vring addresses: the whole range in one region, or NULL; *guest_addr for logging. */
void *ox_memory_translate_user(const struct ox_memory *memory, uint64_t user_addr, uint64_t length,
                               uint64_t *guest_addr);
/* Did the client take bytes away from under us? */
bool ox_memory_is_broken(const struct ox_memory *memory);

struct ox_dirty_log {
	unsigned references;
	uint8_t *bits;
	uint64_t size; /* bytes of bitmap */
	struct ox_mapping mapping;
};
/* The descriptor stays the caller's. */
int ox_dirty_log_map(int fd, uint64_t size, uint64_t offset, struct ox_dirty_log **log,
                     struct ox_error *err) OX_MUST_CHECK;
struct ox_dirty_log *ox_dirty_log_get(struct ox_dirty_log *log);
void ox_dirty_log_put(struct ox_dirty_log *log);
void ox_dirty_log_mark(struct ox_dirty_log *log, uint64_t guest_addr, uint64_t length);

/* Installs the SIGBUS handler; any number of times, before the first mapping. */
void ox_memory_install_sigbus(void);

#endif
