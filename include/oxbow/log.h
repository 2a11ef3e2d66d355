/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Messages for the operator, on stderr.
 *
 * A line is "oxbow: warning: TEXT" ("oxbow: TEXT" for OX_LOG_INFO); when stderr is the stream
 * that JOURNAL_STREAM names, it is "<4>TEXT", the journal's priority prefix (sd-daemon(3)).
 * Any thread; one write(2) a line.  Control characters in TEXT are replaced, a line longer than
 * OX_LOG_LINE is cut.  errno is left alone.  Never on the hit path.
 */
#ifndef OXBOW_LOG_H
#define OXBOW_LOG_H

#include <stdbool.h>

#define OX_LOG_LINE 2048

/* The values are syslog's, as the journal expects them. */
enum ox_log_level {
	OX_LOG_ERROR = 3,
	OX_LOG_WARNING = 4,
	OX_LOG_INFO = 6,
	OX_LOG_DEBUG = 7,
};

/* What is printed: this level and the graver ones.  Default OX_LOG_INFO; the environment's
 * OXBOW_LOG (error, warning, info, debug) is read once, at the first message. */
void ox_log_set_level(enum ox_log_level level);
bool ox_log_enabled(enum ox_log_level level);

void ox_log(enum ox_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The same, but only the first time that this line of the source is reached. */
#define ox_log_once(level, ...)                                              \
	do {                                                                 \
		static bool ox_said_;                                        \
		if (!__atomic_exchange_n(&ox_said_, true, __ATOMIC_RELAXED)) \
			ox_log(level, __VA_ARGS__);                          \
	} while (0)

#endif
