/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the files of the control socket share.
 */
#ifndef OX_CONTROL_QMP_INTERNAL_H
#define OX_CONTROL_QMP_INTERNAL_H

#include "base/unix_socket.h"
#include "base/fiber.h"
#include "control/qmp.h"
#include "control/qmp_splitter.h"
#include <jansson.h>

struct qmp_session;

/* A disk whose events are passed on. */
struct qmp_disk {
	struct ox_disk_listener listener;
	struct ox_qmp *qmp;
	unsigned index;
	uint64_t failed_reads, failed_others; /* as counted at the last event */
};

struct ox_qmp {
	struct ox_qmp_options options;
	char *path;
	struct ox_unix_listener socket;
	struct ox_watch listener;
	struct ox_timer accept_again;
	TAILQ_HEAD(qmp_sessions, qmp_session) sessions;
	unsigned session_count;
	struct qmp_disk *disks;
	bool stopping;
	bool quit;               /* a client asked for the end */
	unsigned running;        /* commands */
	struct ox_fiber *waiter; /* ox_qmp_free_co, until running is 0 */
};

/* A command that runs, in a fiber. */
struct qmp_call {
	struct ox_qmp *qmp;
	json_t *arguments; /* an object that was checked against the command's parameters */
	json_t *result;    /* to be set, given away; NULL: an empty object */
	struct ox_error err;
	const char *error_class; /* NULL: GenericError */
	bool quit;               /* call options.quit when the answer is sent */
};

struct qmp_parameter {
	const char *name;
	char type; /* 's' string, 'i' integer, 'b' boolean */
	bool optional;
};

struct qmp_command {
	const char *name;
	const struct qmp_parameter *parameters; /* ends with a NULL name; NULL: none */
	/* Sets call->result or call->err. May suspend. */
	void (*run_co)(struct qmp_call *call);
};

/* Ends with a NULL name. */
extern const struct qmp_command ox_qmp_commands[];
/* A JSON string; file names that are not UTF-8 get question marks. */
json_t *ox_qmp_text(const char *text);
/* {"qemu": {...}, "package": ...} */
json_t *ox_qmp_version(void);
/* Sends an event to every session that has negotiated; `data` is taken over and may be NULL. */
void ox_qmp_event(struct ox_qmp *qmp, const char *name, json_t *data);
/* Passes the disks' events on. */
void ox_qmp_listen_to_disks(struct ox_qmp *qmp);
void ox_qmp_unlisten_to_disks(struct ox_qmp *qmp);

/* qmp_session.c: one client. */
void ox_qmp_session_new(struct ox_qmp *qmp, int fd);
/* `message` is borrowed. */
void ox_qmp_session_send(struct qmp_session *session, const json_t *message);
bool ox_qmp_session_is_ready(const struct qmp_session *session);
struct qmp_session *ox_qmp_session_next(struct ox_qmp *qmp, struct qmp_session *session);
/* Sends what is left, until CLOCK_MONOTONIC is `deadline`, and frees it.  No command runs. */
void ox_qmp_session_end_co(struct qmp_session *session, uint64_t deadline);
/* A session was freed: there is room for another. */
void ox_qmp_session_freed(struct ox_qmp *qmp);

#endif
