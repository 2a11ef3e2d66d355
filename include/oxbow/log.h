/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Messages for the operator, on stderr.
 *
 * On a terminal a line is "oxbow: warning: TEXT"; when stderr is not a terminal and
 * JOURNAL_STREAM is set, it carries the journal's priority prefix "<4>" (sd-daemon(3)).
 * Any thread; one write(2) a line.  Never on the hit path.
 */
#ifndef OXBOW_LOG_H
#define OXBOW_LOG_H

#include <stdbool.h>

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
