/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Errors for a person.  The first one wins: what failed first is the cause, what fails while
 * cleaning up is noise.
 */
#include <oxbow/error.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int ox_error_set(struct ox_error *err, int code, const char *fmt, ...)
{
	int saved = errno; /* callers often go on to use errno */
	va_list args;

	if (err && err->code == 0) {
		err->code = code;
		va_start(args, fmt);
		/* A sentence that does not fit is cut; it is for reading only. */
		if (vsnprintf(err->text, sizeof(err->text), fmt, args) < 0)
			err->text[0] = '\0';
		va_end(args);
	}
	errno = saved;
	return -code;
}

void ox_error_clear(struct ox_error *err)
{
	if (err) {
		err->code = 0;
		err->text[0] = '\0';
	}
}
