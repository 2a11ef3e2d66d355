/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Finds the messages in a stream of bytes: QMP clients need not end a message with a newline, so
 * brackets are counted outside strings.  One pass, each byte is looked at once, so that a client
 * that sends a byte at a time costs no more than one that sends all at once.
 *
 * Invariants: outside a message depth is 0 and in_string false; text holds the bytes of the
 * message so far unless too_big, when only the brackets are followed to find its end.
 */
#include "control/qmp_splitter.h"
#include "base/base.h"
#include <string.h>

static void begin_anew(struct ox_qmp_splitter *s)
{
	s->length = 0;
	s->depth = 0;
	s->in_string = s->escaped = s->too_big = s->done = false;
}

static void keep(struct ox_qmp_splitter *s, char byte)
{
	if (s->too_big)
		return;
	if (s->length == OX_QMP_MAX_MESSAGE) {
		s->too_big = true;
		return;
	}
	if (s->length == s->capacity) {
		size_t capacity = s->capacity ? 2 * s->capacity : 1024;
		char *text = ox_xcalloc(1, capacity);

		if (s->length)
			memcpy(text, s->text, s->length);
		free(s->text);
		s->text = text;
		s->capacity = capacity;
	}
	s->text[s->length++] = byte;
}

static bool is_space(char byte)
{
	return byte == ' ' || byte == '\t' || byte == '\r' || byte == '\n';
}

/* One byte outside of messages. */
static enum ox_qmp_split between(struct ox_qmp_splitter *s, char byte)
{
	if (s->garbage && (byte == '\n' || (unsigned char)byte == 0xff)) {
		s->garbage = false;
		return OX_QMP_GARBAGE;
	}
	if (s->garbage || is_space(byte))
		return OX_QMP_MORE;
	if ((unsigned char)byte == 0xff)
		return OX_QMP_MORE;
	if (byte == '{' || byte == '[') {
		s->depth = 1;
		keep(s, byte);
	} else {
		s->garbage = true;
	}
	return OX_QMP_MORE;
}

/* One byte of a message. */
static enum ox_qmp_split within(struct ox_qmp_splitter *s, char byte)
{
	if ((unsigned char)byte == 0xff || (s->in_string && (unsigned char)byte < 0x20)) {
		begin_anew(s);
		return OX_QMP_GARBAGE;
	}
	keep(s, byte);
	if (s->in_string) {
		if (s->escaped)
			s->escaped = false;
		else if (byte == '\\')
			s->escaped = true;
		else if (byte == '"')
			s->in_string = false;
		return OX_QMP_MORE;
	}
	if (byte == '"') {
		s->in_string = true;
	} else if (byte == '{' || byte == '[') {
		if (++s->depth > OX_QMP_MAX_DEPTH)
			s->too_big = true;
	} else if ((byte == '}' || byte == ']') && --s->depth == 0) {
		bool too_big = s->too_big;

		if (too_big)
			begin_anew(s);
		else
			s->done = true;
		return too_big ? OX_QMP_TOO_BIG : OX_QMP_MESSAGE;
	}
	return OX_QMP_MORE;
}

enum ox_qmp_split ox_qmp_splitter_feed(struct ox_qmp_splitter *s, const char **data, size_t *length)
{
	if (s->done)
		begin_anew(s);
	while (*length) {
		char byte = *(*data)++;
		enum ox_qmp_split found;

		(*length)--;
		found = s->depth ? within(s, byte) : between(s, byte);
		if (found != OX_QMP_MORE)
			return found;
	}
	return OX_QMP_MORE;
}

void ox_qmp_splitter_free(struct ox_qmp_splitter *s)
{
	free(s->text);
	s->text = NULL;
	s->length = s->capacity = 0;
}
