/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The faulty store: another store with errors on demand and a memory of what was written.  For
 * tests: "faulty:RULEFILE:NAME" wraps the store that NAME opens.
 *
 * A rule file has one rule a line, `#` begins a comment:
 *
 *     OPERATION [nth=N] [range=OFFSET+LENGTH] [always] FAULT
 *
 *     OPERATION  read, write, flush, zero, discard or any
 *     nth=N      the N-th matching request from when the rule was read on (default 1)
 *     always     and every one after it; otherwise the rule is spent then
 *     range=     only requests that touch these bytes; sizes as 4k, 1M
 *     FAULT      error=EIO      fails, untouched (an errno's name or number)
 *                short=BYTES    carries out this many bytes, then fails with EIO
 *                delay=MS       is carried out that much later
 *                never          stays pending until the rules change, then is carried out
 *
 * The file is read again when it changes: replace it by renaming another over it.  An empty
 * RULEFILE ("faulty::disk.img") means no file.  A line that cannot be understood makes open
 * fail, and later leaves the old rules in force with a warning.
 */
#ifndef OX_STORE_FAULTY_H
#define OX_STORE_FAULTY_H

#include "store/store.h"

enum ox_fault_kind { OX_FAULT_ERROR, OX_FAULT_SHORT, OX_FAULT_DELAY, OX_FAULT_NEVER };

#define OX_FAULT_ANY_OP UINT8_MAX

struct ox_fault_rule {
	uint8_t op; /* enum ox_io_op or OX_FAULT_ANY_OP; DISCARD matches SECURE_ERASE too */
	enum ox_fault_kind kind;
	uint64_t nth; /* 0 is 1 */
	bool always;
	uint64_t offset, length; /* length 0: anywhere */
	int error;               /* ERROR: a positive errno */
	uint64_t bytes;          /* SHORT */
	uint64_t delay_ns;       /* DELAY */
	uint64_t seen;           /* matching requests so far; the store's */
};

/* On a store that ox_store_open("faulty:...") gave.  Any thread. */
void ox_faulty_add_rule(struct ox_store *store, const struct ox_fault_rule *rule);
/* Forgets all rules, and lets go of what they hold. */
void ox_faulty_clear_rules(struct ox_store *store);
/* How often a fault was injected so far. */
uint64_t ox_faulty_count(struct ox_store *store);

/* What went through a store, in order of submission.  `submitted` and `completed` count events
 * of both kinds: request A was complete before B was submitted if and only if
 * A.completed < B.submitted. */
struct ox_faulty_record {
	uint8_t op; /* WRITE, FLUSH, ZERO, DISCARD, SECURE_ERASE */
	uint8_t flags;
	bool truncate; /* then length is the new size */
	uint64_t offset, length;
	uint8_t *data;                 /* WRITE: what was written, as it was at submission */
	uint64_t submitted, completed; /* completed 0: not yet */
	int result;
};
struct ox_faulty_log {
	struct ox_faulty_record *records;
	size_t count;
};

/* How many events there were so far: to order what a caller sees among the records.  What the
 * caller did when this was C came after event C and before event C + 1. */
uint64_t ox_faulty_clock(struct ox_store *store);

/* Recording is off at open. */
void ox_faulty_record(struct ox_store *store, bool on);
/* Moves what was recorded so far to *log; requests still in flight stay "not yet". */
void ox_faulty_take_log(struct ox_store *store, struct ox_faulty_log *log);
void ox_faulty_free_log(struct ox_faulty_log *log);

/* For the store, and for tests of it: one line of a rule file.  1: a rule, 0: an empty line,
 * -EINVAL. */
int ox_faulty_parse_rule(const char *line, struct ox_fault_rule *rule);

#endif
