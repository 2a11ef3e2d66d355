/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fibers.
 *
 * A fiber's stack is one mapping: a guard page, the stack, and at its top the struct ox_fiber
 * itself, so that starting a fiber from the pool costs no allocation.
 *
 *      mapping                                                        mapping + MAPPING
 *      | guard page | <- stack grows down ------------ | struct ox_fiber |
 *
 * Invariants, all per thread:
 *   1. `current` is the fiber that runs, NULL on the thread's own stack.
 *   2. A fiber is RUNNING (current, or an ancestor of current by `caller`: it started or resumed
 *      the next one and waits for it) or SUSPENDED (caller == NULL).
 *   3. Control leaves a fiber only towards its caller.  A fiber that ended leaves itself in
 *      `ended`; whoever runs next takes the stack back, since nobody can free the stack that
 *      he stands on.
 *
 * Everything is thread-local; there are no locks.  The sanitizers must be told whose stack is
 * in use: switch_to() does that, and the fiber's entry, which is where a new fiber arrives.
 */
#include "base/fiber.h"
#include "base/base.h"
#include "oxbow-config.h"
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#ifdef OX_FIBER_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FIBER_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define FIBER_TSAN 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define FIBER_ASAN 1
#endif
#ifdef __SANITIZE_THREAD__
#define FIBER_TSAN 1
#endif
#ifdef FIBER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/lsan_interface.h>
#endif
#ifdef FIBER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

/* ThreadSanitizer keeps a stack of calls for each fiber, and making one is slow, so it stays
 * with its pooled stack.  The calls that never return, at a fiber's end, must then not be
 * counted: they pass through functions with this attribute only. */
#ifndef FIBER_TSAN
#define NOT_COUNTED
#elif defined(__clang__)
#define NOT_COUNTED __attribute__((disable_sanitizer_instrumentation))
#else
#define NOT_COUNTED __attribute__((no_sanitize("thread")))
#endif

/* Stacks that a thread keeps for later. */
#define POOL_MAX 64u

/* Where a stack of execution stands while it does not run: a fiber's, or the thread's own. */
struct context {
#ifdef OX_FIBER_UCONTEXT
	ucontext_t uc;
#else
	void *sp; /* everything else is on the stack */
#endif
#ifdef FIBER_ASAN
	void *fake_stack;
	const void *bottom;
	size_t size;
#endif
#ifdef FIBER_TSAN
	void *tsan;
#endif
};

struct ox_fiber {
	struct context context;
	struct ox_fiber *caller; /* NULL: suspended, or called from the thread's own stack */
	bool running;            /* invariant 2 */
	void (*fn)(void *arg);
	void *arg;
	void *mapping;
	struct thread *thread;
	struct ox_fiber *next; /* in the pool */
} __attribute__((aligned(64)));

struct thread {
	struct context context; /* the thread's own stack */
	struct ox_fiber *current;
	struct ox_fiber *ended;
	struct ox_fiber *pool;
	unsigned pooled;
	size_t count;
	bool at_exit; /* the thread frees its pool when it ends */
#ifdef FIBER_ASAN
	struct context *left; /* who made the last switch */
#endif
};

static _Thread_local struct thread this_thread;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static pthread_key_t key;
static bool key_made;
static size_t page_size;

static void pool_free_at_exit(void *arg)
{
	ox_fiber_pool_free();
}

static void make_key(void)
{
	page_size = (size_t)sysconf(_SC_PAGESIZE);
	/* Without a key the stacks of a thread that forgot ox_fiber_pool_free() are lost. */
	key_made = pthread_key_create(&key, pool_free_at_exit) == 0;
}

/* --- the switch ---------------------------------------------------------------------------- */

__attribute__((noreturn, used)) void ox_fiber_entry(struct ox_fiber *fiber);

#ifdef OX_FIBER_UCONTEXT

static void entry_ucontext(unsigned high, unsigned low)
{
	/* makecontext() passes ints. */
	ox_fiber_entry((struct ox_fiber *)((uintptr_t)high << 16 << 16 | low));
}

static int prepare(struct ox_fiber *fiber, char *stack, size_t size)
{
	uintptr_t p = (uintptr_t)fiber;

	if (getcontext(&fiber->context.uc) < 0)
		return -errno;
	fiber->context.uc.uc_stack.ss_sp = stack;
	fiber->context.uc.uc_stack.ss_size = size;
	fiber->context.uc.uc_link = NULL;
	makecontext(&fiber->context.uc, (void (*)(void))entry_ucontext, 2,
	            (unsigned)((uint64_t)p >> 32), (unsigned)p);
	return 0;
}

NOT_COUNTED static inline void swap(struct context *from, struct context *to)
{
	if (swapcontext(&from->uc, &to->uc) < 0)
		abort(); /* no valid context fails */
}

#else

/* fiber-*.S.  Saves the registers that a called function must keep on the stack and the stack
 * pointer in *from, then takes both from `to`. */
void ox_fiber_switch(void **from, void *to);
/* Where a new stack starts: calls ox_fiber_entry() with what ox_fiber_frame() left. */
void ox_fiber_trampoline(void);

static int prepare(struct ox_fiber *fiber, char *stack, size_t size)
{
	uintptr_t *top = (uintptr_t *)(void *)(stack + size);

	/* Lay out what ox_fiber_switch() is going to pop; the numbers are those of the .S file. */
#if defined(__x86_64__)
	/* rsp -> mxcsr and x87 control word, r15, r14, r13, r12, rbx, rbp, return address.
	 * Behind that the trampoline finds rsp at a multiple of 16. */
	top -= 2;
	*--top = (uintptr_t)ox_fiber_trampoline;
	*--top = 0;                                /* rbp: the chain of frames ends here */
	*--top = 0;                                /* rbx */
	*--top = (uintptr_t)fiber;                 /* r12 */
	*--top = 0;                                /* r13 */
	*--top = 0;                                /* r14 */
	*--top = 0;                                /* r15 */
	*--top = (uintptr_t)0x037f << 32 | 0x1f80; /* the ABI's values at a program's start */
#elif defined(__aarch64__)
	/* x19 to x28, x29, x30, d8 to d15. */
	top -= 20;
	for (int i = 0; i < 20; i++)
		top[i] = 0;
	top[0] = (uintptr_t)fiber;                /* x19 */
	top[11] = (uintptr_t)ox_fiber_trampoline; /* x30 */
#else
#error "no assembly for this CPU: configure with -Dfiber=ucontext"
#endif
	fiber->context.sp = top;
	return 0;
}

NOT_COUNTED static inline void swap(struct context *from, struct context *to)
{
	ox_fiber_switch(&from->sp, to->sp);
}

#endif

/* What an arrival must do first, on the new stack. */
NOT_COUNTED static inline void arrived(struct thread *t, struct context *here)
{
#ifdef FIBER_ASAN
	/* The bounds of the stack that was left: this is how we learn the thread's own. */
	__sanitizer_finish_switch_fiber(here->fake_stack, &t->left->bottom, &t->left->size);
#endif
}

/* Leaves `from` (for good, if `last`) and goes on in `to`; returns when somebody comes back. */
NOT_COUNTED static void switch_to(struct thread *t, struct context *from, struct context *to,
                                  bool last)
{
#ifdef FIBER_ASAN
	t->left = from;
	__sanitizer_start_switch_fiber(last ? NULL : &from->fake_stack, to->bottom, to->size);
#endif
#ifdef FIBER_TSAN
	from->tsan = __tsan_get_current_fiber();
	__tsan_switch_to_fiber(to->tsan, 0);
#endif
	swap(from, to);
	arrived(t, from);
}

/* --- stacks -------------------------------------------------------------------------------- */

static size_t mapping_size(void)
{
	return page_size + OX_FIBER_STACK;
}

static char *stack_of(struct ox_fiber *fiber)
{
	return (char *)fiber->mapping + page_size;
}

static struct ox_fiber *stack_get(struct thread *t)
{
	struct ox_fiber *fiber = t->pool;
	char *mapping;

	if (fiber) {
		t->pool = fiber->next;
		t->pooled--;
		return fiber;
	}
	pthread_once(&key_once, make_key);
	mapping = mmap(NULL, mapping_size(), PROT_READ | PROT_WRITE,
	               MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
	if (mapping == MAP_FAILED)
		return NULL;
	if (mprotect(mapping, page_size, PROT_NONE) < 0) {
		munmap(mapping, mapping_size());
		return NULL;
	}
	fiber = (struct ox_fiber *)(void *)(mapping + mapping_size() - sizeof(*fiber));
	fiber->mapping = mapping;
	fiber->thread = t;
#ifdef FIBER_ASAN
	/* Pointers that only a suspended fiber holds are no leaks. */
	__lsan_register_root_region(stack_of(fiber), OX_FIBER_STACK);
#endif
#ifdef FIBER_TSAN
	fiber->context.tsan = __tsan_create_fiber(0);
#endif
	return fiber;
}

static void stack_free(struct ox_fiber *fiber)
{
#ifdef FIBER_ASAN
	__lsan_unregister_root_region(stack_of(fiber), OX_FIBER_STACK);
#endif
#ifdef FIBER_TSAN
	__tsan_destroy_fiber(fiber->context.tsan);
#endif
	munmap(fiber->mapping, mapping_size());
}

static void stack_put(struct thread *t, struct ox_fiber *fiber)
{
#ifdef FIBER_ASAN
	/* The frames that never returned left their red zones behind. */
	__asan_unpoison_memory_region(stack_of(fiber), OX_FIBER_STACK - sizeof(*fiber));
#endif
	if (t->pooled >= POOL_MAX) {
		stack_free(fiber);
		return;
	}
	fiber->next = t->pool;
	t->pool = fiber;
	t->pooled++;
	if (!t->at_exit && key_made)
		t->at_exit = pthread_setspecific(key, t) == 0;
}

void ox_fiber_pool_free(void)
{
	struct thread *t = &this_thread;

	while (t->pool) {
		struct ox_fiber *fiber = t->pool;

		t->pool = fiber->next;
		stack_free(fiber);
	}
	t->pooled = 0;
}

/* --- the life of a fiber ------------------------------------------------------------------- */

NOT_COUNTED static struct context *caller_context(struct thread *t, struct ox_fiber *fiber)
{
	return fiber->caller ? &fiber->caller->context : &t->context;
}

/* Gives control back to the caller. */
NOT_COUNTED static void leave(struct thread *t, struct ox_fiber *fiber, bool last)
{
	struct context *to = caller_context(t, fiber);

	t->current = fiber->caller;
	fiber->caller = NULL;
	fiber->running = false;
	switch_to(t, &fiber->context, to, last);
}

/* Runs a fiber until it suspends or ends. */
static void enter(struct thread *t, struct ox_fiber *fiber)
{
	struct ox_fiber *ended;

	fiber->caller = t->current;
	fiber->running = true;
	t->current = fiber;
	switch_to(t, caller_context(t, fiber), &fiber->context, false);
	ended = t->ended;
	if (ended) {
		t->ended = NULL;
		stack_put(t, ended);
	}
}

NOT_COUNTED void ox_fiber_entry(struct ox_fiber *fiber)
{
	struct thread *t = fiber->thread;

	arrived(t, &fiber->context);
	fiber->fn(fiber->arg);
	t->count--;
	t->ended = fiber;
	leave(t, fiber, true);
	abort(); /* nobody resumes a fiber that ended */
}

int ox_fiber_start(void (*fn)(void *arg), void *arg)
{
	struct thread *t = &this_thread;
	struct ox_fiber *fiber = stack_get(t);
	size_t size = OX_FIBER_STACK - sizeof(*fiber);
	int ret;

	if (!fiber)
		return -ENOMEM;
	fiber->fn = fn;
	fiber->arg = arg;
#ifdef FIBER_ASAN
	fiber->context.fake_stack = NULL;
	fiber->context.bottom = stack_of(fiber);
	fiber->context.size = size;
#endif
	ret = prepare(fiber, stack_of(fiber), size);
	if (ret < 0) {
		stack_free(fiber);
		return ret;
	}
	t->count++;
	enter(t, fiber);
	return 0;
}

struct ox_fiber *ox_fiber_self(void)
{
	return this_thread.current;
}

void ox_fiber_suspend(void)
{
	struct thread *t = &this_thread;

	assert(t->current);
	leave(t, t->current, false);
}

void ox_fiber_resume(struct ox_fiber *fiber)
{
	struct thread *t = &this_thread;

	assert(fiber->thread == t);
	assert(!fiber->running);
	enter(t, fiber);
}

size_t ox_fiber_count(void)
{
	return this_thread.count;
}
