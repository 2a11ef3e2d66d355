/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Small things that every part uses: attributes, arithmetic, cleanup, the clock.
 */
#ifndef OX_BASE_BASE_H
#define OX_BASE_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define OX_MUST_CHECK                      __attribute__((warn_unused_result))
#define ox_likely(x)                       __builtin_expect(!!(x), 1)
#define ox_unlikely(x)                     __builtin_expect(!!(x), 0)
#define ox_container_of(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))
#define OX_ARRAY_SIZE(a)                   (sizeof(a) / sizeof((a)[0]))
#define OX_CACHELINE                       64

#define ox_min(a, b)                           \
	({                                     \
		__typeof__(a) ox_a_ = (a);     \
		__typeof__(b) ox_b_ = (b);     \
		ox_a_ < ox_b_ ? ox_a_ : ox_b_; \
	})
#define ox_max(a, b)                               \
	({                                         \
		__typeof__(a) ox_ma_ = (a);        \
		__typeof__(b) ox_mb_ = (b);        \
		ox_ma_ > ox_mb_ ? ox_ma_ : ox_mb_; \
	})

/* align is a power of two. */
static inline uint64_t ox_align_down(uint64_t value, uint64_t align)
{
	return value & ~(align - 1);
}
static inline uint64_t ox_align_up(uint64_t value, uint64_t align)
{
	return (value + align - 1) & ~(align - 1);
}
static inline bool ox_is_aligned(uint64_t value, uint64_t align)
{
	return (value & (align - 1)) == 0;
}
static inline bool ox_is_power_of_2(uint64_t value)
{
	return value && !(value & (value - 1));
}

/* True if [offset, offset + length) lies within [0, size); no overflow whatever the values. */
static inline bool ox_range_within(uint64_t offset, uint64_t length, uint64_t size)
{
	return offset <= size && length <= size - offset;
}

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t ox_clock_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void ox_cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("isb" ::: "memory");
#endif
}

static inline void ox_cleanup_free_(void *p)
{
	free(*(void **)p);
}
static inline void ox_cleanup_close_(const int *fd)
{
	if (*fd >= 0)
		close(*fd);
}
/* `OX_FREE char *s = ...;` frees at the scope's end; `OX_CLOSE int fd = ...;` closes. */
#define OX_FREE  __attribute__((cleanup(ox_cleanup_free_)))
#define OX_CLOSE __attribute__((cleanup(ox_cleanup_close_)))
/* Gives the value away, so that the cleanup finds nothing to do. */
#define ox_steal_ptr(p)                    \
	({                                 \
		__typeof__(p) ox_p_ = (p); \
		(p) = NULL;                \
		ox_p_;                     \
	})
static inline int ox_steal_fd(int *fd)
{
	int value = *fd;

	*fd = -1;
	return value;
}

/* Allocations that end the process when there is no memory: control path and start-up only
 * (Linux overcommits; a data path that allocates handles NULL). */
void *ox_xcalloc(size_t count, size_t size);
char *ox_xstrdup(const char *s);
char *ox_xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
