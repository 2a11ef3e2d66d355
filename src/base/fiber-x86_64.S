/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The switch between stacks on x86-64 (System V ABI).
 *
 * The ABI makes a called function keep rbx, rbp, r12 to r15 and the control bits of MXCSR and
 * of the x87 control word; everything else is the caller's to lose.  fiber.c prepare() lays out
 * a new stack in the order in which the registers are popped here.
 *
 * There is no .note.gnu.property: this object does not support shadow stacks, and the linker
 * then does not ask the kernel for them.
 */
	.text

/* void ox_fiber_switch(void **from, void *to) */
	.globl	ox_fiber_switch
	.hidden	ox_fiber_switch
	.type	ox_fiber_switch, @function
	.p2align 4
ox_fiber_switch:
	.cfi_startproc
	pushq	%rbp
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset %rbp, 0
	pushq	%rbx
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset %rbx, 0
	pushq	%r12
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset %r12, 0
	pushq	%r13
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset %r13, 0
	pushq	%r14
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset %r14, 0
	pushq	%r15
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset %r15, 0
	subq	$8, %rsp
	.cfi_adjust_cfa_offset 8
	stmxcsr	(%rsp)
	fnstcw	4(%rsp)

	/* From here on the same layout on the other stack: the unwind rules stay true. */
	movq	%rsp, (%rdi)
	movq	%rsi, %rsp

	ldmxcsr	(%rsp)
	fldcw	4(%rsp)
	addq	$8, %rsp
	.cfi_adjust_cfa_offset -8
	popq	%r15
	.cfi_adjust_cfa_offset -8
	.cfi_restore %r15
	popq	%r14
	.cfi_adjust_cfa_offset -8
	.cfi_restore %r14
	popq	%r13
	.cfi_adjust_cfa_offset -8
	.cfi_restore %r13
	popq	%r12
	.cfi_adjust_cfa_offset -8
	.cfi_restore %r12
	popq	%rbx
	.cfi_adjust_cfa_offset -8
	.cfi_restore %rbx
	popq	%rbp
	.cfi_adjust_cfa_offset -8
	.cfi_restore %rbp
	ret
	.cfi_endproc
	.size	ox_fiber_switch, . - ox_fiber_switch

/* The first thing on a new stack: r12 holds the fiber.  A backtrace ends here. */
	.globl	ox_fiber_trampoline
	.hidden	ox_fiber_trampoline
	.type	ox_fiber_trampoline, @function
	.p2align 4
ox_fiber_trampoline:
	.cfi_startproc
	.cfi_undefined %rip
	/* An unwinder looks up the address before the return address: keep that inside. */
	nop
	movq	%r12, %rdi
	call	ox_fiber_entry@PLT
	ud2
	.cfi_endproc
	.size	ox_fiber_trampoline, . - ox_fiber_trampoline

	.section .note.GNU-stack, "", @progbits
