/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Messages for the operator.
 *
 * A message is put together in a buffer on the stack and leaves by one write(2), so that lines
 * of several threads never mix.  What a guest or a client sent may be part of a text: control
 * characters are replaced, so that nobody forges a second line or plays with the terminal.
 */
#include <oxbow/log.h>
#include "base/base.h"
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* -1: not yet known.  Two threads that both find it so read the same environment. */
static atomic_int log_level = -1;

static int level_from_environment(void)
{
	static const struct {
		const char *word;
		enum ox_log_level level;
	} words[] = {
	        {"error", OX_LOG_ERROR},
	        {"warning", OX_LOG_WARNING},
	        {"info", OX_LOG_INFO},
	        {"debug", OX_LOG_DEBUG},
	};
	const char *word = getenv("OXBOW_LOG");

	for (size_t i = 0; word && i < OX_ARRAY_SIZE(words); i++)
		if (!strcmp(words[i].word, word))
			return (int)words[i].level;
	return OX_LOG_INFO;
}

static int current_level(void)
{
	int level = atomic_load_explicit(&log_level, memory_order_relaxed);
	int unknown = -1;

	if (level >= 0)
		return level;
	level = level_from_environment();
	/* ox_log_set_level() by another thread meanwhile wins. */
	if (!atomic_compare_exchange_strong(&log_level, &unknown, level))
		level = unknown;
	return level;
}

void ox_log_set_level(enum ox_log_level level)
{
	atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
}

bool ox_log_enabled(enum ox_log_level level)
{
	return (int)level <= current_level();
}

/* Is stderr the journal's?  JOURNAL_STREAM names device and inode of the stream it gave us
 * (systemd.exec(5)); a shell in between may have sent stderr elsewhere since. */
static bool stderr_is_journal(void)
{
	const char *stream = getenv("JOURNAL_STREAM");
	uintmax_t device, inode;
	struct stat st;
	char end;

	if (!stream || sscanf(stream, "%ju:%ju%c", &device, &inode, &end) != 2)
		return false;
	return fstat(STDERR_FILENO, &st) == 0 && st.st_dev == device && st.st_ino == inode;
}

static const char *prefix(enum ox_log_level level, bool journal)
{
	switch (level) {
	case OX_LOG_ERROR:
		return journal ? "<3>" : "oxbow: error: ";
	case OX_LOG_WARNING:
		return journal ? "<4>" : "oxbow: warning: ";
	case OX_LOG_INFO:
		return journal ? "<6>" : "oxbow: ";
	case OX_LOG_DEBUG:
		return journal ? "<7>" : "oxbow: debug: ";
	}
	return "";
}

void ox_log(enum ox_log_level level, const char *fmt, ...)
{
	int saved = errno;
	char line[OX_LOG_LINE];
	size_t start, length;
	va_list args;
	int n;

	if (!ox_log_enabled(level))
		return;
	start = (size_t)snprintf(line, sizeof(line), "%s", prefix(level, stderr_is_journal()));
	va_start(args, fmt);
	n = vsnprintf(line + start, sizeof(line) - start, fmt, args);
	va_end(args);
	if (n < 0)
		goto out;
	length = ox_min(start + (size_t)n, sizeof(line) - 1);
	for (size_t i = start; i < length; i++)
		if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
			line[i] = line[i] == '\n' || line[i] == '\t' ? ' ' : '?';
	line[length++] = '\n'; /* over the terminating NUL */
	while (write(STDERR_FILENO, line, length) < 0 && errno == EINTR)
		;
out:
	errno = saved;
}
