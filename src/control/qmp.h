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
	/* "quit" was asked for: called on main's thread, once the answer is on its way.  It may not
	 * end the server before it has returned to the loop. */
	void (*quit)(void *arg);
	void *arg;
};
/* Listens; the socket file has mode 0600.  A stale one of a dead process is replaced.  main's
 * thread, before it runs or while. */
int ox_qmp_new(const struct ox_qmp_options *options, struct ox_qmp **qmp, struct ox_error *err)
        OX_MUST_CHECK;
/* Removes the socket file, tells the clients (SHUTDOWN), lets running commands end, and closes all
 * connections. main's thread, in a fiber. */
void ox_qmp_free_co(struct ox_qmp *qmp);

/* --- the other side, for tools: blocking ------------------------------------------------- */

struct ox_qmp_client;
/* Connects and negotiates.  -ECONNREFUSED and -ENOENT: nobody is there. */
int ox_qmp_connect(const char *socket_path, struct ox_qmp_client **client, struct ox_error *err)
        OX_MUST_CHECK;
/* Runs a command; `arguments` is a JSON object or NULL; *result (may be NULL) is a JSON text to
 * free.  The server's error becomes *err. */
int ox_qmp_execute(struct ox_qmp_client *client, const char *command, const char *arguments,
                   char **result, struct ox_error *err) OX_MUST_CHECK;
void ox_qmp_disconnect(struct ox_qmp_client *client);
/* The arguments of block_resize, to free. */
char *ox_qmp_resize_arguments(const char *device, uint64_t size, bool shrink);

/* --- where servers are found --------------------------------------------------------------- */

/* The directory for sockets and records of running servers: $OXBOW_RUN_DIR, else /run/oxbow for
 * root, else $XDG_RUNTIME_DIR/oxbow; NULL if none can be made.  A server also listens on
 * DIR/PID.qmp, where `oxbow resize` finds it by the image that it serves. */
const char *ox_run_dir(void);
/* Removes the sockets that dead servers left in it. */
void ox_run_dir_clean(void);

/* The server that holds the image with this device and inode number open (an active disk), among
 * those with a socket in the run directory. */
struct ox_run_server {
	struct ox_qmp_client *client; /* the caller's */
	long pid;
	char *device;  /* the disk's name, to free */
	uint64_t size; /* the disk's, bytes */
};
/* 0, -ENOENT: none of them has it. Blocks. */
int ox_run_dir_find_image(uint64_t dev, uint64_t ino, struct ox_run_server *server) OX_MUST_CHECK;

#endif
