/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The control socket: QEMU's machine protocol (docs/interop/qmp-spec: greeting, capabilities
 * negotiation, commands with "id", events).
 */
#ifndef OX_CONTROL_QMP_H
#define OX_CONTROL_QMP_H

#include "export/export.h"

struct ox_qmp;

struct ox_qmp_options {
	const char *socket_path;
	struct ox_loop *main;
	/* The disks and their exports, arrays of `count`; they outlive the server. */
	struct ox_disk **disks;
	struct ox_export **exports;
	unsigned count;
	/* "quit" was asked for. */
	void (*quit)(void *arg);
	void *arg;
};
int ox_qmp_new(const struct ox_qmp_options *options, struct ox_qmp **qmp, struct ox_error *err)
        OX_MUST_CHECK;
/* Closes the socket and all connections; removes the socket file. main's thread, in a fiber. */
void ox_qmp_free_co(struct ox_qmp *qmp);

/* --- the other side, for tools: blocking ------------------------------------------------- */

struct ox_qmp_client;
int ox_qmp_connect(const char *socket_path, struct ox_qmp_client **client, struct ox_error *err)
        OX_MUST_CHECK;
/* Runs a command; `arguments` is a JSON object or NULL; *result (may be NULL) is a JSON text to
 * free.  The server's error becomes *err. */
int ox_qmp_execute(struct ox_qmp_client *client, const char *command, const char *arguments,
                   char **result, struct ox_error *err) OX_MUST_CHECK;
void ox_qmp_disconnect(struct ox_qmp_client *client);

/* The directory for sockets and records of running servers: $OXBOW_RUN_DIR, else /run/oxbow for
 * root, else $XDG_RUNTIME_DIR/oxbow; NULL if none can be made.  A server also listens on
 * DIR/PID.qmp, where `oxbow resize` finds it from the pid that holds an image's lock. */
const char *ox_run_dir(void);

#endif
