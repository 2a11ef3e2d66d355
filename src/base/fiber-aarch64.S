/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The switch between stacks on arm64 (AAPCS64).
 *
 * A called function keeps x19 to x28, the frame pointer x29, and the low halves of v8 to v15;
 * x30 is where it returns to.  fiber.c prepare() lays out a new stack with the same offsets.
 */
	.text

/* void ox_fiber_switch(void **from, void *to) */
	.globl	ox_fiber_switch
	.hidden	ox_fiber_switch
	.type	ox_fiber_switch, %function
	.p2align 4
ox_fiber_switch:
	.cfi_startproc
	hint	#34			/* bti c */
	sub	sp, sp, #160
	.cfi_adjust_cfa_offset 160
	stp	x19, x20, [sp, #0]
	.cfi_rel_offset x19, 0
	.cfi_rel_offset x20, 8
	stp	x21, x22, [sp, #16]
	.cfi_rel_offset x21, 16
	.cfi_rel_offset x22, 24
	stp	x23, x24, [sp, #32]
	.cfi_rel_offset x23, 32
	.cfi_rel_offset x24, 40
	stp	x25, x26, [sp, #48]
	.cfi_rel_offset x25, 48
	.cfi_rel_offset x26, 56
	stp	x27, x28, [sp, #64]
	.cfi_rel_offset x27, 64
	.cfi_rel_offset x28, 72
	stp	x29, x30, [sp, #80]
	.cfi_rel_offset x29, 80
	.cfi_rel_offset x30, 88
	stp	d8, d9, [sp, #96]
	stp	d10, d11, [sp, #112]
	stp	d12, d13, [sp, #128]
	stp	d14, d15, [sp, #144]

	/* From here on the same layout on the other stack: the unwind rules stay true. */
	mov	x9, sp
	str	x9, [x0]
	mov	sp, x1

	ldp	d14, d15, [sp, #144]
	ldp	d12, d13, [sp, #128]
	ldp	d10, d11, [sp, #112]
	ldp	d8, d9, [sp, #96]
	ldp	x29, x30, [sp, #80]
	ldp	x27, x28, [sp, #64]
	ldp	x25, x26, [sp, #48]
	ldp	x23, x24, [sp, #32]
	ldp	x21, x22, [sp, #16]
	ldp	x19, x20, [sp, #0]
	add	sp, sp, #160
	.cfi_def_cfa_offset 0
	.cfi_restore x19
	.cfi_restore x20
	.cfi_restore x21
	.cfi_restore x22
	.cfi_restore x23
	.cfi_restore x24
	.cfi_restore x25
	.cfi_restore x26
	.cfi_restore x27
	.cfi_restore x28
	.cfi_restore x29
	.cfi_restore x30
	ret
	.cfi_endproc
	.size	ox_fiber_switch, . - ox_fiber_switch

/* The first thing on a new stack: x19 holds the fiber.  A backtrace ends here. */
	.globl	ox_fiber_trampoline
	.hidden	ox_fiber_trampoline
	.type	ox_fiber_trampoline, %function
	.p2align 4
ox_fiber_trampoline:
	.cfi_startproc
	.cfi_undefined x30
	mov	x0, x19
	bl	ox_fiber_entry
	brk	#0
	.cfi_endproc
	.size	ox_fiber_trampoline, . - ox_fiber_trampoline

	.section .note.GNU-stack, "", %progbits
