/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Errors on the control path: one sentence for a person.
 *
 * The sentence says what failed, on which file, why, and what to do, e.g.
 *     disk.raw: in use by qemu-system-x86 (pid 4711); stop it, or open with --read-only -U
 * It has no trailing newline, no full stop at the end and no "oxbow:" in front (the program
 * adds that).  Data paths do not use this: they answer 0 or -errno.
 */
#ifndef OXBOW_ERROR_H
#define OXBOW_ERROR_H

#define OX_ERROR_TEXT 1024

struct ox_error {
	int code; /* a positive errno value, 0: no error was set */
	char text[OX_ERROR_TEXT];
};

/* Sets *err (err may be NULL) unless it holds an earlier error; returns -code, so that
 * `return ox_error_set(err, EINVAL, ...)` is the usual last line.  code > 0. */
int ox_error_set(struct ox_error *err, int code, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));

/* Forgets what *err holds. */
void ox_error_clear(struct ox_error *err);

#endif
