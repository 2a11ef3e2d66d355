/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fibers: straight-line code that may wait, on stacks of their own.
 *
 * A fiber is started, suspended and resumed on one thread; it never moves.  Stacks come from a
 * pool of the thread (mmap, a guard page below, OX_FIBER_STACK bytes) and go back when the
 * fiber's function returns.  The switch is assembly on x86-64 and arm64, else ucontext
 * (meson -Dfiber=ucontext forces that); AddressSanitizer and ThreadSanitizer are told of each
 * switch in fiber.c and nowhere else.
 *
 * A function that may suspend has a name that ends in _co and is called inside a fiber only.
 * After it returns, whatever was read before may have changed.
 */
#ifndef OX_BASE_FIBER_H
#define OX_BASE_FIBER_H

#include <stdbool.h>
#include <stddef.h>

#define OX_FIBER_STACK (256u * 1024u)

struct ox_fiber;

/* Runs fn(arg) in a new fiber at once, until it returns or first suspends.  May be called
 * inside a fiber.  -ENOMEM when no stack can be had (fn was not called), else 0. */
int ox_fiber_start(void (*fn)(void *arg), void *arg) __attribute__((warn_unused_result));

/* The running fiber; NULL on the thread's own stack. */
struct ox_fiber *ox_fiber_self(void);

/* Gives control back to whoever started or resumed this fiber; returns when it is resumed. */
void ox_fiber_suspend(void);

/* Continues a suspended fiber of this thread; returns when it suspends again or ends. */
void ox_fiber_resume(struct ox_fiber *fiber);

/* Frees the pooled stacks of this thread (before it ends). */
void ox_fiber_pool_free(void);

/* Fibers of this thread that were started and have not ended: for tests and asserts. */
size_t ox_fiber_count(void);

#endif
