/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Finds the messages in a stream of bytes.  Pure: no I/O, no JSON library.
 */
#ifndef OX_CONTROL_QMP_SPLITTER_H
#define OX_CONTROL_QMP_SPLITTER_H

#include <stdbool.h>
#include <stddef.h>

#define OX_QMP_MAX_MESSAGE (1024u * 1024u) /* bytes */
#define OX_QMP_MAX_DEPTH   128u            /* nested objects and arrays */

enum ox_qmp_split {
	OX_QMP_MORE,    /* all bytes were taken, no message is complete */
	OX_QMP_MESSAGE, /* splitter->text holds one, `length` bytes */
	OX_QMP_GARBAGE, /* bytes that cannot begin or continue a message were passed over */
	OX_QMP_TOO_BIG, /* a message was passed over: too long, or nested too deeply */
};

struct ox_qmp_splitter {
	char *text; /* grows up to OX_QMP_MAX_MESSAGE */
	size_t length, capacity;
	unsigned depth;
	bool in_string, escaped, too_big;
	bool garbage; /* passing over bytes up to the line's end */
	bool done;    /* text holds a message that was handed out */
};

/* Takes bytes from *data until something is to be told; *data and *length move on.  A message is
 * an object or array with balanced brackets: whether it is JSON is the parser's business.  A
 * control character inside a string, and the byte 0xff anywhere, begin anew: a client can always
 * get out of a message that it broke off. */
enum ox_qmp_split ox_qmp_splitter_feed(struct ox_qmp_splitter *splitter, const char **data,
                                       size_t *length);
void ox_qmp_splitter_free(struct ox_qmp_splitter *splitter);

#endif
