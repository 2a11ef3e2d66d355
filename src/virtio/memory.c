/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Tables of guest memory.
 *
 * A table never changes after it was made: adding and removing give a new one that shares the
 * regions.  Regions are counted by the tables that hold them, tables by their users; both counts
 * are atomic because an I/O thread may drop the last reference to an old table.
 */
#include "virtio/memory.h"

#include "virtio/vring.h"

#include <errno.h>
#include <string.h>

int ox_region_map(uint64_t guest_addr, uint64_t size, uint64_t user_addr, uint64_t mmap_offset,
                  int fd, struct ox_region **region, struct ox_error *err)
{
	OX_CLOSE int owned = fd;
	OX_FREE struct ox_region *new = NULL;
	uint64_t end;
	int rc;

	*region = NULL;
	if (!size || __builtin_add_overflow(guest_addr, size - 1, &end) ||
	    __builtin_add_overflow(user_addr, size - 1, &end))
		return ox_error_set(err, EINVAL,
		                    "guest memory: region of %#llx bytes at %#llx (user %#llx) "
		                    "wraps around",
		                    (unsigned long long)size, (unsigned long long)guest_addr,
		                    (unsigned long long)user_addr);
	new = calloc(1, sizeof(*new));
	if (!new)
		return ox_error_set(err, ENOMEM, "guest memory: out of memory");
	rc = ox_mapping_map(owned, size, mmap_offset, &new->mapping, err);
	if (rc < 0)
		return rc;
	new->guest_addr = guest_addr;
	new->size = size;
	new->user_addr = user_addr;
	new->mmap_offset = mmap_offset;
	new->host = new->mapping.host;
	new->broken = new->mapping.broken;
	new->references = 1;
	*region = ox_steal_ptr(new);
	return 0;
}

static void region_put(struct ox_region *region)
{
	if (__atomic_sub_fetch(&region->references, 1, __ATOMIC_ACQ_REL))
		return;
	ox_mapping_unmap(&region->mapping);
	free(region);
}

static struct ox_memory *memory_alloc(unsigned count)
{
	struct ox_memory *memory = ox_xcalloc(1, offsetof(struct ox_memory, region[count]));

	memory->references = 1;
	memory->count = count;
	return memory;
}

struct ox_memory *ox_memory_new(void)
{
	return memory_alloc(0);
}

struct ox_memory *ox_memory_get(struct ox_memory *memory)
{
	if (memory)
		__atomic_add_fetch(&memory->references, 1, __ATOMIC_RELAXED);
	return memory;
}

void ox_memory_put(struct ox_memory *memory)
{
	if (!memory || __atomic_sub_fetch(&memory->references, 1, __ATOMIC_ACQ_REL))
		return;
	for (unsigned i = 0; i < memory->count; i++)
		region_put(memory->region[i]);
	free(memory);
}

static bool regions_overlap(const struct ox_region *a, const struct ox_region *b)
{
	/* Last bytes, not ends: a region may end at 2^64. */
	return a->guest_addr <= b->guest_addr + (b->size - 1) &&
	       b->guest_addr <= a->guest_addr + (a->size - 1);
}

int ox_memory_with(const struct ox_memory *old, struct ox_region *add, struct ox_memory **out,
                   struct ox_error *err)
{
	struct ox_memory *memory;
	unsigned at = 0;

	*out = NULL;
	if (old->count >= OX_MEMORY_MAX_REGIONS) {
		region_put(add);
		return ox_error_set(err, ENOSPC, "guest memory: more than %u regions",
		                    OX_MEMORY_MAX_REGIONS);
	}
	for (unsigned i = 0; i < old->count; i++) {
		const struct ox_region *other = old->region[i];

		if (regions_overlap(other, add)) {
			ox_error_set(err, EEXIST,
			             "guest memory: region %#llx+%#llx overlaps %#llx+%#llx",
			             (unsigned long long)add->guest_addr,
			             (unsigned long long)add->size,
			             (unsigned long long)other->guest_addr,
			             (unsigned long long)other->size);
			region_put(add);
			return -EEXIST;
		}
		if (other->guest_addr < add->guest_addr)
			at = i + 1;
	}
	memory = memory_alloc(old->count + 1);
	for (unsigned i = 0; i < memory->count; i++) {
		if (i == at) {
			memory->region[i] = add;
			continue;
		}
		memory->region[i] = old->region[i < at ? i : i - 1];
		__atomic_add_fetch(&memory->region[i]->references, 1, __ATOMIC_RELAXED);
	}
	*out = memory;
	return 0;
}

int ox_memory_without(const struct ox_memory *old, uint64_t guest_addr, uint64_t size,
                      uint64_t user_addr, struct ox_memory **out, struct ox_error *err)
{
	struct ox_memory *memory;
	unsigned at;

	*out = NULL;
	for (at = 0; at < old->count; at++)
		if (old->region[at]->guest_addr == guest_addr && old->region[at]->size == size &&
		    old->region[at]->user_addr == user_addr)
			break;
	if (at == old->count)
		return ox_error_set(err, ENOENT,
		                    "guest memory: no region %#llx+%#llx (user %#llx) to remove",
		                    (unsigned long long)guest_addr, (unsigned long long)size,
		                    (unsigned long long)user_addr);
	memory = memory_alloc(old->count - 1);
	for (unsigned i = 0; i < memory->count; i++) {
		memory->region[i] = old->region[i < at ? i : i + 1];
		__atomic_add_fetch(&memory->region[i]->references, 1, __ATOMIC_RELAXED);
	}
	*out = memory;
	return 0;
}

/* The region that holds the byte at addr, or NULL. */
static const struct ox_region *memory_search(const struct ox_memory *memory, uint64_t addr)
{
	unsigned low = 0, high = memory->count;

	while (low < high) {
		unsigned middle = low + (high - low) / 2;
		const struct ox_region *region = memory->region[middle];

		if (addr < region->guest_addr)
			high = middle;
		else if (addr - region->guest_addr < region->size)
			return region;
		else
			low = middle + 1;
	}
	return NULL;
}

const struct ox_region *ox_memory_find(const struct ox_memory *memory, uint64_t addr,
                                       uint64_t length, const struct ox_region **hint)
{
	const struct ox_region *region = *hint;

	if (ox_likely(region && ox_region_holds(region, addr, length)))
		return region;
	region = memory_search(memory, addr);
	if (!region || !ox_region_holds(region, addr, length))
		return NULL;
	*hint = region;
	return region;
}

void *ox_memory_translate(const struct ox_memory *memory, uint64_t addr, uint64_t length,
                          uint64_t *contiguous, const struct ox_region **hint)
{
	const struct ox_region *region = *hint;
	uint64_t offset;

	if (!region || addr - region->guest_addr >= region->size) {
		region = memory_search(memory, addr);
		if (!region)
			return NULL;
		*hint = region;
	}
	offset = addr - region->guest_addr;
	*contiguous = ox_min(length, region->size - offset);
	return region->host + offset;
}

void *ox_memory_translate_user(const struct ox_memory *memory, uint64_t user_addr, uint64_t length,
                               uint64_t *guest_addr)
{
	for (unsigned i = 0; i < memory->count; i++) {
		const struct ox_region *region = memory->region[i];
		uint64_t offset = user_addr - region->user_addr;

		if (user_addr < region->user_addr || offset >= region->size ||
		    length > region->size - offset)
			continue;
		if (guest_addr)
			*guest_addr = region->guest_addr + offset;
		return region->host + offset;
	}
	return NULL;
}

bool ox_memory_is_broken(const struct ox_memory *memory)
{
	if (ox_likely(!ox_sigbus_broken_count()))
		return false;
	for (unsigned i = 0; i < memory->count; i++)
		if (__atomic_load_n(memory->region[i]->broken, __ATOMIC_ACQUIRE))
			return true;
	return false;
}
