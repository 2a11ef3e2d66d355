/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Exports: ways into a guest.
 */
#ifndef OX_EXPORT_EXPORT_H
#define OX_EXPORT_EXPORT_H

#include "disk/disk.h"

struct ox_export;

struct ox_vhost_user_blk_options {
	struct ox_disk *disk;
	/* Where to listen; or -1 with socket_path.  `fd`: a listening socket, or a connected one
	 * (then the export ends when the client goes: back-end program convention). */
	const char *socket_path;
	int fd;
	unsigned queues;         /* offered to the front end; 0: as many as it wants, up to 64 */
	uint16_t queue_size_max; /* entries; 0: 1024 */
	struct ox_loop *main;
	struct ox_loop **loops; /* rings are spread over them */
	unsigned loop_count;
	/* A given connected fd was closed by its client. main's thread; may be NULL. */
	void (*ended)(void *arg);
	void *arg;
};

/* Listens; clients may connect when it returns.  In a fiber of main, which ox_loop_run_fiber()
 * gives before it runs.  A stale socket file of a dead process is replaced; a live one is an
 * error. */
int ox_vhost_user_blk_new(const struct ox_vhost_user_blk_options *options,
                          struct ox_export **export, struct ox_error *err) OX_MUST_CHECK;
/* Stops listening and disconnects: rings stop, requests in flight are waited for (held ones
 * stay in the inflight region), the disk is deactivated.  main's thread. */
void ox_export_stop_co(struct ox_export *export);
/* After stop. */
void ox_export_free(struct ox_export *export);

struct ox_export_info {
	const char *kind; /* "vhost-user-blk" */
	const char *path;
	bool connected;
	unsigned queues_running;
};
void ox_export_get_info(struct ox_export *export, struct ox_export_info *info);

#endif
