/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Allocations that end the process when there is no memory: start-up and control path only.
 */
#include "base/base.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void *checked(void *p)
{
	static const char text[] = "oxbow: error: out of memory\n";

	if (!p) {
		/* No stdio: it may allocate. */
		ssize_t ignored = write(STDERR_FILENO, text, sizeof(text) - 1);
		(void)ignored;
		abort();
	}
	return p;
}

void *ox_xcalloc(size_t count, size_t size)
{
	/* calloc(0) may answer NULL, which is not a failure: ask for a byte. */
	return checked(calloc(count ? count : 1, size ? size : 1));
}

char *ox_xstrdup(const char *s)
{
	return checked(strdup(s));
}

char *ox_xasprintf(const char *fmt, ...)
{
	char *text = NULL;
	va_list args;
	int length;

	va_start(args, fmt);
	length = vasprintf(&text, fmt, args);
	va_end(args);
	return checked(length < 0 ? NULL : text);
}
