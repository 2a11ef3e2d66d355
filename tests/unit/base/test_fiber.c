/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fibers: order of control, nesting, reuse of stacks, what survives a switch, the guard page.
 */
#include "base/fiber.h"
#include "base/base.h"
#include <fenv.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <cmocka.h>

/* --- order --------------------------------------------------------------------------------- */

static char trace[64];

static void note(char c)
{
	size_t n = strlen(trace);

	assert_true(n + 1 < sizeof(trace));
	trace[n] = c;
	trace[n + 1] = '\0';
}

static struct ox_fiber *self_seen;

static void two_waits(void *arg)
{
	self_seen = ox_fiber_self();
	note('a');
	ox_fiber_suspend();
	note('b');
	ox_fiber_suspend();
	note('c');
	assert_ptr_equal(ox_fiber_self(), self_seen);
}

static void test_order(void **state)
{
	trace[0] = '\0';
	assert_null(ox_fiber_self());
	note('1');
	assert_int_equal(ox_fiber_start(two_waits, NULL), 0);
	assert_null(ox_fiber_self());
	assert_int_equal(ox_fiber_count(), 1);
	note('2');
	ox_fiber_resume(self_seen);
	note('3');
	ox_fiber_resume(self_seen);
	note('4');
	assert_string_equal(trace, "1a2b3c4");
	assert_int_equal(ox_fiber_count(), 0);
}

static void set_flag(void *arg)
{
	*(bool *)arg = true;
}

static void test_argument_without_wait(void **state)
{
	bool flag = false;

	assert_int_equal(ox_fiber_start(set_flag, &flag), 0);
	assert_true(flag);
	assert_int_equal(ox_fiber_count(), 0);
}

/* --- nesting ------------------------------------------------------------------------------- */

static struct ox_fiber *inner_fiber, *outer_fiber;

static void inner(void *arg)
{
	inner_fiber = ox_fiber_self();
	note('i');
	ox_fiber_suspend(); /* to outer, which started it */
	note('j');
	ox_fiber_suspend(); /* to the main stack, which resumed it */
	note('k');
}

static void outer(void *arg)
{
	outer_fiber = ox_fiber_self();
	note('o');
	assert_int_equal(ox_fiber_start(inner, NULL), 0);
	assert_ptr_equal(ox_fiber_self(), outer_fiber);
	note('p');
	ox_fiber_suspend();
	note('q');
	ox_fiber_resume(inner_fiber); /* ends while outer waits */
	note('r');
}

static void test_nesting(void **state)
{
	trace[0] = '\0';
	assert_int_equal(ox_fiber_start(outer, NULL), 0);
	note('1');
	ox_fiber_resume(inner_fiber);
	note('2');
	ox_fiber_resume(outer_fiber);
	assert_string_equal(trace, "oip1j2qkr");
	assert_int_equal(ox_fiber_count(), 0);
}

struct depth {
	unsigned level, reached;
};

static void go_deeper(void *arg)
{
	struct depth *depth = arg;
	unsigned level = depth->level;

	depth->reached = ox_max(depth->reached, level);
	if (level == 200)
		return;
	depth->level = level + 1;
	assert_int_equal(ox_fiber_start(go_deeper, depth), 0);
	assert_int_equal(depth->level, level + 1);
	depth->level = level;
}

static void test_deep_chain(void **state)
{
	struct depth depth = {0, 0};

	assert_int_equal(ox_fiber_start(go_deeper, &depth), 0);
	assert_int_equal(depth.reached, 200);
	assert_int_equal(ox_fiber_count(), 0);
}

/* --- many ---------------------------------------------------------------------------------- */

/* ThreadSanitizer has room for 8000 threads and fibers in all, and they are slow to make. */
#ifdef __SANITIZE_THREAD__
#define MANY 400
#else
#define MANY 4000
#endif

struct many {
	struct ox_fiber *fiber;
	unsigned steps;
};
static struct many many[MANY];

static void count_steps(void *arg)
{
	struct many *m = arg;
	volatile unsigned local = (unsigned)(m - many);

	m->fiber = ox_fiber_self();
	for (unsigned i = 0; i < 3; i++) {
		m->steps++;
		ox_fiber_suspend();
		assert_int_equal(local, (unsigned)(m - many));
	}
}

static void test_many(void **state)
{
	memset(many, 0, sizeof(many));
	for (unsigned i = 0; i < MANY; i++)
		assert_int_equal(ox_fiber_start(count_steps, &many[i]), 0);
	assert_int_equal(ox_fiber_count(), MANY);
	/* In an order that is nobody's stack order. */
	for (unsigned round = 0; round < 3; round++)
		for (unsigned i = 0; i < MANY; i++)
			ox_fiber_resume(many[i * 1237u % MANY].fiber);
	assert_int_equal(ox_fiber_count(), 0);
	for (unsigned i = 0; i < MANY; i++)
		assert_int_equal(many[i].steps, 3);
	ox_fiber_pool_free();
}

/* A stack goes back to the pool and is the next one's. */
static void test_stack_reuse(void **state)
{
	struct ox_fiber *first;

	ox_fiber_pool_free();
	for (unsigned i = 0; i < 2; i++) {
		trace[0] = '\0';
		assert_int_equal(ox_fiber_start(two_waits, NULL), 0);
		ox_fiber_resume(self_seen);
		ox_fiber_resume(self_seen);
		if (i)
			assert_ptr_equal(self_seen, first);
		first = self_seen;
	}
	/* Freed stacks are really given back. */
	ox_fiber_pool_free();
	ox_fiber_pool_free();
	assert_int_equal(ox_fiber_start(two_waits, NULL), 0);
	ox_fiber_resume(self_seen);
	ox_fiber_resume(self_seen);
}

/* --- what survives ------------------------------------------------------------------------- */

#if defined(__x86_64__) || defined(__aarch64__)

/* Puts known values into the registers that a called function keeps, calls fn, and says whether
 * they are still there.  Each use has values of its own (seed). */
__attribute__((noinline)) static bool keeps_registers(void (*fn)(void), uintptr_t seed)
{
	uintptr_t in[6], out[6];

	for (unsigned i = 0; i < 6; i++)
		in[i] = seed * 1000003u + i;
#if defined(__x86_64__)
	/* rbp may be the frame pointer here: it is saved around by hand.  The call must find the
	 * stack aligned and the red zone left alone. */
	uintptr_t *rsi = in, *rdi = out;

	__asm__ volatile("mov %%rsp, %%r15\n\t"
	                 "sub $256, %%rsp\n\t"
	                 "and $-16, %%rsp\n\t"
	                 "push %%rbp\n\t"
	                 "push %[out]\n\t"
	                 "mov 0(%[in]), %%rbx\n\t"
	                 "mov 8(%[in]), %%r12\n\t"
	                 "mov 16(%[in]), %%r13\n\t"
	                 "mov 24(%[in]), %%r14\n\t"
	                 "mov 32(%[in]), %%rbp\n\t"
	                 "call *%[fn]\n\t"
	                 "pop %%rax\n\t"
	                 "mov %%rbx, 0(%%rax)\n\t"
	                 "mov %%r12, 8(%%rax)\n\t"
	                 "mov %%r13, 16(%%rax)\n\t"
	                 "mov %%r14, 24(%%rax)\n\t"
	                 "mov %%rbp, 32(%%rax)\n\t"
	                 "pop %%rbp\n\t"
	                 "mov %%r15, %%rsp\n\t"
	                 : [in] "+S"(rsi), [out] "+D"(rdi), [fn] "+a"(fn)
	                 :
	                 : "rbx", "r12", "r13", "r14", "r15", "rcx", "rdx", "r8", "r9", "r10",
	                   "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5",
	                   "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
	                   "xmm14", "xmm15");
	out[5] = in[5]; /* five are enough here */
#else
	double din[4], dout[4];

	for (unsigned i = 0; i < 4; i++)
		din[i] = (double)seed + i;
	__asm__ volatile(
	        "stp %[out], %[dout], [sp, #-16]!\n\t"
	        "ldp x19, x20, [%[in]]\n\t"
	        "ldp x21, x22, [%[in], #16]\n\t"
	        "ldp x27, x28, [%[in], #32]\n\t"
	        "ldp d8, d9, [%[din]]\n\t"
	        "ldp d14, d15, [%[din], #16]\n\t"
	        "blr %[fn]\n\t"
	        "ldp x0, x1, [sp], #16\n\t"
	        "stp x19, x20, [x0]\n\t"
	        "stp x21, x22, [x0, #16]\n\t"
	        "stp x27, x28, [x0, #32]\n\t"
	        "stp d8, d9, [x1]\n\t"
	        "stp d14, d15, [x1, #16]\n\t"
	        :
	        : [in] "r"(in), [out] "r"(out), [din] "r"(din), [dout] "r"(dout), [fn] "r"(fn)
	        : "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12",
	          "x13", "x14", "x15", "x16", "x17", "x19", "x20", "x21", "x22", "x27", "x28",
	          "x30", "d8", "d9", "d14", "d15", "memory", "cc");
	if (memcmp(din, dout, sizeof(din)))
		return false;
#endif
	return !memcmp(in, out, sizeof(in));
}

static struct ox_fiber *register_fiber;
static bool register_result[2];

static void suspend_self(void)
{
	ox_fiber_suspend();
}

static void register_main(void *arg)
{
	register_fiber = ox_fiber_self();
	register_result[0] = keeps_registers(suspend_self, 3);
	register_result[1] = keeps_registers(suspend_self, 4);
}

static void resume_register_fiber(void)
{
	ox_fiber_resume(register_fiber);
}

static void test_registers(void **state)
{
	memset(register_result, 0, sizeof(register_result));
	assert_int_equal(ox_fiber_start(register_main, NULL), 0);
	assert_true(keeps_registers(resume_register_fiber, 1));
	assert_true(keeps_registers(resume_register_fiber, 2));
	assert_true(register_result[0]);
	assert_true(register_result[1]);
	assert_int_equal(ox_fiber_count(), 0);
}
#endif

#if defined(__x86_64__)
/* The control words of both floating-point units belong to the fiber. */
static unsigned rounding_of(void)
{
	unsigned mxcsr;
	uint16_t x87;

	__asm__ volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr), "=m"(x87));
	return (mxcsr >> 13 & 3) << 4 | (x87 >> 10 & 3);
}

static struct ox_fiber *rounding_fiber;
static unsigned rounding_seen[3];

static void rounding_main(void *arg)
{
	rounding_fiber = ox_fiber_self();
	rounding_seen[0] = rounding_of();
	fesetround(FE_UPWARD);
	rounding_seen[1] = rounding_of();
	ox_fiber_suspend();
	rounding_seen[2] = rounding_of();
}

static void test_rounding(void **state)
{
	unsigned ours;

	fesetround(FE_DOWNWARD);
	ours = rounding_of();
	assert_int_equal(ox_fiber_start(rounding_main, NULL), 0);
	assert_int_equal(rounding_of(), ours);
	ox_fiber_resume(rounding_fiber);
	assert_int_equal(rounding_of(), ours);
	fesetround(FE_TONEAREST);
	assert_int_equal(rounding_seen[1], rounding_seen[2]);
	assert_int_not_equal(rounding_seen[1], ours);
}
#endif

/* Doubles and vectors on the stack, with an aligned access that faults when the stack is not
 * aligned as the ABI says. */
typedef double wide __attribute__((vector_size(16)));

static struct ox_fiber *float_fiber[2];
static double float_sum[2];

__attribute__((noinline)) static wide step_up(wide v)
{
	wide one = {1.0, 0.5};
	volatile wide kept = v + one;

	ox_fiber_suspend();
	return kept;
}

static void float_main(void *arg)
{
	unsigned n = *(unsigned *)arg;
	wide v = {n * 100.0, 0.0};

	float_fiber[n] = ox_fiber_self();
	for (unsigned i = 0; i < 10; i++)
		v = step_up(v);
	float_sum[n] = v[0] + v[1];
}

static void test_floating_point(void **state)
{
	unsigned zero = 0, one = 1;

	assert_int_equal(ox_fiber_start(float_main, &zero), 0);
	assert_int_equal(ox_fiber_start(float_main, &one), 0);
	for (unsigned i = 0; i < 10; i++) {
		ox_fiber_resume(float_fiber[0]);
		ox_fiber_resume(float_fiber[1]);
	}
	assert_true(float_sum[0] == 15.0);
	assert_true(float_sum[1] == 115.0);
}

/* --- the stack's size and its end ---------------------------------------------------------- */

/* Touches `bytes` of stack from the top down. */
__attribute__((noinline)) static unsigned eat_stack(size_t bytes)
{
	volatile char page[1024];

	memset((char *)page, 1, sizeof(page));
	if (bytes <= sizeof(page))
		return (unsigned)page[0];
	return eat_stack(bytes - sizeof(page)) + (unsigned)page[1];
}

static void eat(void *arg)
{
	size_t *bytes = arg;

	*bytes = eat_stack(*bytes);
}

static void test_stack_is_large(void **state)
{
	size_t bytes = OX_FIBER_STACK / 2;

	assert_int_equal(ox_fiber_start(eat, &bytes), 0);
	assert_int_equal(bytes, OX_FIBER_STACK / 2 / 1024);
}

/* A runaway recursion hits the guard page: SIGSEGV there, and nobody else's memory. */
static void overflow_handler(int signal, siginfo_t *info, void *context)
{
	char *fiber = (char *)self_seen;
	char *end = fiber - OX_FIBER_STACK; /* below the lowest byte by less than the struct */
	char *fault = info->si_addr;

	_exit(fault < end + 8192 && fault > end - 2 * sysconf(_SC_PAGESIZE) ? 42 : 43);
}

static void overflow(void *arg)
{
	size_t bytes = (size_t)1 << 30;

	self_seen = ox_fiber_self();
	eat(&bytes);
}

static void test_guard_page(void **state)
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		static char alternate[65536];
		stack_t stack = {.ss_sp = alternate, .ss_size = sizeof(alternate)};
		struct sigaction sa = {.sa_sigaction = overflow_handler,
		                       .sa_flags = SA_SIGINFO | SA_ONSTACK};

		sigaltstack(&stack, NULL);
		sigaction(SIGSEGV, &sa, NULL);
		sigaction(SIGBUS, &sa, NULL);
		if (ox_fiber_start(overflow, NULL))
			_exit(44);
		_exit(45);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 42);
}

/* --- threads ------------------------------------------------------------------------------- */

static void *thread_main(void *arg)
{
	static _Thread_local struct many mine[50];
	unsigned *total = arg;

	for (unsigned round = 0; round < 20; round++) {
		struct ox_fiber *fibers[50];

		for (unsigned i = 0; i < 50; i++) {
			bool flag = false;

			if (ox_fiber_start(set_flag, &flag) || !flag)
				return NULL;
			if (ox_fiber_start(count_steps, memset(&mine[i], 0, sizeof(mine[i]))))
				return NULL;
			fibers[i] = mine[i].fiber;
		}
		for (unsigned i = 0; i < 150; i++)
			ox_fiber_resume(fibers[i % 50]);
		for (unsigned i = 0; i < 50; i++)
			*total += mine[i].steps;
	}
	/* No ox_fiber_pool_free(): the thread's end does it. */
	return ox_fiber_count() ? NULL : arg;
}

/* Mappings of this process that have the size of a fiber's stack. */
static unsigned stacks_mapped(void)
{
	FILE *f = fopen("/proc/self/maps", "r");
	unsigned long start, end;
	unsigned count = 0;
	char line[512];

	assert_non_null(f);
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && end - start == OX_FIBER_STACK)
			count++;
	fclose(f);
	return count;
}

static void test_threads(void **state)
{
	unsigned before, after;
	void *result;

	before = stacks_mapped();
	for (unsigned round = 0; round < 2; round++) {
		pthread_t thread[4];
		unsigned total[4] = {0};

		for (unsigned i = 0; i < 4; i++)
			assert_int_equal(pthread_create(&thread[i], NULL, thread_main, &total[i]),
			                 0);
		for (unsigned i = 0; i < 4; i++) {
			assert_int_equal(pthread_join(thread[i], &result), 0);
			assert_ptr_equal(result, &total[i]);
			assert_int_equal(total[i], 20 * 50 * 3);
		}
	}
	after = stacks_mapped();
	/* Had they been kept: 8 threads with 50 and more. */
	assert_true(after < before + 50);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_order),
		cmocka_unit_test(test_argument_without_wait),
		cmocka_unit_test(test_nesting),
		cmocka_unit_test(test_deep_chain),
		cmocka_unit_test(test_many),
		cmocka_unit_test(test_stack_reuse),
#if defined(__x86_64__) || defined(__aarch64__)
		cmocka_unit_test(test_registers),
#endif
#if defined(__x86_64__)
		cmocka_unit_test(test_rounding),
#endif
		cmocka_unit_test(test_floating_point),
		cmocka_unit_test(test_stack_is_large),
		cmocka_unit_test(test_guard_page),
		cmocka_unit_test(test_threads),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
