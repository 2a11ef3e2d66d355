/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Mapping a client's file, and living on when the client takes it away.
 *
 * Whoever shares memory with us can truncate the file: our next access raises SIGBUS.  The
 * handler looks the address up in a static table of our mappings, puts anonymous zero pages over
 * the whole mapping and sets its flag; the interrupted instruction then runs again and succeeds,
 * on zeroes.  Whoever uses the mapping checks the flag and breaks that client only.
 *
 * Async-signal-safety: the handler reads atomics, calls mmap(2) and sigaction(2),
 * nothing else.
 * A slot's `base` is published last (release) and withdrawn first, so that a handler on another
 * thread sees either no mapping or a whole one; nobody may access a mapping while it is being
 * unmapped, so a slot that is found stays valid for the handler's duration.
 */
#include "virtio/vring.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define SLOTS 8192u

static struct slot {
	uintptr_t base; /* atomic; 0: free, 1: being filled */
	uint64_t size;
	bool broken;
} slots[SLOTS];

/* No slot at or above was ever used: bounds the handler's search. */
static unsigned slots_used;
/* Mappings that are broken now: while 0, nobody needs to look at flags. */
unsigned ox_sigbus_broken_mappings;

static void sigbus_default(void)
{
	struct sigaction action = {.sa_handler = SIG_DFL};

	/* Returning runs the access again; it faults again and the process ends as if there had
	 * never been a handler. */
	sigaction(SIGBUS, &action, NULL);
}

static void sigbus_handle(int signal, siginfo_t *info, void *context)
{
	uintptr_t address = (uintptr_t)info->si_addr;
	unsigned used = __atomic_load_n(&slots_used, __ATOMIC_ACQUIRE);
	int saved = errno;

	/* Sent by kill(2) and friends: not a fault. */
	if (info->si_code <= 0) {
		sigbus_default();
		raise(SIGBUS);
		errno = saved;
		return;
	}
	for (unsigned i = 0; i < used; i++) {
		uintptr_t base = __atomic_load_n(&slots[i].base, __ATOMIC_ACQUIRE);

		if (base <= 1 || address - base >= slots[i].size)
			continue;
		/* The bare call: a sanitizer's mmap is neither async-signal-safe nor meant here. */
		if (syscall(SYS_mmap, base, slots[i].size, PROT_READ | PROT_WRITE,
		            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == -1)
			break;
		/* Two threads may fault at once: counted once. */
		if (!__atomic_exchange_n(&slots[i].broken, true, __ATOMIC_ACQ_REL))
			__atomic_fetch_add(&ox_sigbus_broken_mappings, 1, __ATOMIC_RELEASE);
		errno = saved;
		return;
	}
	sigbus_default();
	errno = saved;
}

void ox_memory_install_sigbus(void)
{
	struct sigaction action = {.sa_sigaction = sigbus_handle, .sa_flags = SA_SIGINFO};

	sigemptyset(&action.sa_mask);
	sigaction(SIGBUS, &action, NULL);
}

static int slot_take(void)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		uintptr_t none = 0;
		unsigned used = __atomic_load_n(&slots_used, __ATOMIC_RELAXED);

		if (!__atomic_compare_exchange_n(&slots[i].base, &none, 1, false, __ATOMIC_ACQ_REL,
		                                 __ATOMIC_RELAXED))
			continue;
		while (used < i + 1 &&
		       !__atomic_compare_exchange_n(&slots_used, &used, i + 1, false,
		                                    __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
			;
		return (int)i;
	}
	return -1;
}

/* What mmap's offset and length must be multiples of for this file: huge pages have their own. */
static uint64_t mapping_alignment(const struct stat *st)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t block = (uint64_t)st->st_blksize;

	/* hugetlbfs tells its page size here; a larger alignment than needed does no harm to
	 * others. */
	if (block > page && ox_is_power_of_2(block) && block <= (1ull << 30))
		return block;
	return page;
}

int ox_mapping_map(int fd, uint64_t size, uint64_t offset, struct ox_mapping *mapping,
                   struct ox_error *err)
{
	uint64_t end, start, align, length;
	struct stat st;
	void *base;
	int slot;

	memset(mapping, 0, sizeof(*mapping));
	if (!size || __builtin_add_overflow(offset, size, &end) || end > INT64_MAX)
		return ox_error_set(err, EINVAL,
		                    "shared memory: impossible size %llu at file offset %llu",
		                    (unsigned long long)size, (unsigned long long)offset);
	if (fstat(fd, &st) < 0)
		return ox_error_set(err, errno, "shared memory: cannot stat the descriptor: %s",
		                    strerror(errno));
	if (S_ISREG(st.st_mode) && (uint64_t)st.st_size < end)
		return ox_error_set(
		        err, EINVAL,
		        "shared memory: the file has %lld bytes, the client's range ends at %llu",
		        (long long)st.st_size, (unsigned long long)end);
	align = mapping_alignment(&st);
	start = ox_align_down(offset, align);
	length = ox_align_up(end - start, align);
	slot = slot_take();
	if (slot < 0)
		return ox_error_set(err, ENOSPC, "shared memory: more than %u mappings", SLOTS);
	base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
	            (off_t)start);
	if (base == MAP_FAILED && start) {
		/* A device with an alignment that it does not tell: everything likes offset 0. */
		start = 0;
		length = ox_align_up(end, align);
		base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
		            0);
	}
	if (base == MAP_FAILED) {
		int saved = errno;

		__atomic_store_n(&slots[slot].base, 0, __ATOMIC_RELEASE);
		return ox_error_set(err, saved, "shared memory: cannot map %llu bytes: %s",
		                    (unsigned long long)length, strerror(saved));
	}
	/* A core dump of ours need not hold the guest. */
	madvise(base, length, MADV_DONTDUMP);
	slots[slot].size = length;
	slots[slot].broken = false;
	__atomic_store_n(&slots[slot].base, (uintptr_t)base, __ATOMIC_RELEASE);
	*mapping = (struct ox_mapping){
	        .host = (char *)base + (offset - start),
	        .size = size,
	        .broken = &slots[slot].broken,
	        .base = base,
	        .base_size = length,
	        .slot = slot,
	};
	return 0;
}

void ox_mapping_unmap(struct ox_mapping *mapping)
{
	if (!mapping->base)
		return;
	__atomic_store_n(&slots[mapping->slot].base, 1, __ATOMIC_RELEASE);
	if (__atomic_load_n(&slots[mapping->slot].broken, __ATOMIC_ACQUIRE))
		__atomic_fetch_sub(&ox_sigbus_broken_mappings, 1, __ATOMIC_RELEASE);
	munmap(mapping->base, mapping->base_size);
	__atomic_store_n(&slots[mapping->slot].base, 0, __ATOMIC_RELEASE);
	memset(mapping, 0, sizeof(*mapping));
}
