/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The vhost-user-blk export: a socket, and one client at a time on it.
 *
 * A client that comes while another is connected is turned away with a line in the log; one that
 * comes while its predecessor's requests still end (a front end that reconnects, a guest that was
 * restarted) waits for that, and those behind it stay in the socket's backlog.
 *
 * States:   listening ──accept──> serving ──client gone──> ending ──requests back──> listening
 *                                    └── stop ──> ending ──> stopped
 * An export that was given a connected socket starts in `serving` and ends with its client.
 */
#include "base/fiber.h"
#include "export/export_private.h"
#include "base/unix_socket.h"
#include "export/vhost_user_session.h"
#include "virtio/vq.h"

#include <oxbow/log.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define QUEUES_DEFAULT     64u
#define QUEUES_MAX         256u /* the protocol's queue index is a byte */
#define QUEUE_SIZE_DEFAULT 1024u
/* After a failed accept() (no descriptors left), how long to leave the backlog alone. */
#define ACCEPT_RETRY_NS 1000000000ull

struct blk_export {
	struct ox_export export;
	struct ox_vu_device device;
	struct ox_unix_listener listener;
	struct ox_watch watch;
	struct ox_timer retry;
	struct ox_disk_listener disk_listener;
	struct ox_vu_session *session;
	int next_fd; /* a client that waits for the last one's end, or -1 */
	char *path;
	bool given; /* the socket was connected when we got it */
	bool stopping;
	struct ox_fiber *stopper;
	void (*ended)(void *arg);
	void *arg;
};

static void session_ended(void *arg);

static void serve(struct blk_export *blk, int fd)
{
	if (ox_vu_session_start(&blk->device, fd, session_ended, blk, &blk->session) < 0) {
		ox_log(OX_LOG_WARNING, "%s: no memory to serve a client", blk->device.name);
		blk->session = NULL;
	}
}

static void watch_listener(struct blk_export *blk)
{
	int rc;

	if (blk->watch.loop || blk->listener.fd < 0)
		return;
	rc = ox_watch_add(blk->device.main, &blk->watch);
	if (rc < 0) {
		ox_log(OX_LOG_WARNING, "%s: cannot watch the socket: %s", blk->device.name,
		       strerror(-rc));
		ox_timer_arm(blk->device.main, &blk->retry, ACCEPT_RETRY_NS);
	}
}

static void retry_accept(struct ox_timer *timer)
{
	watch_listener(ox_container_of(timer, struct blk_export, retry));
}

static void session_ended(void *arg)
{
	struct blk_export *blk = arg;

	blk->session = NULL;
	if (blk->next_fd >= 0 && !blk->stopping) {
		watch_listener(blk);
		serve(blk, ox_steal_fd(&blk->next_fd));
		return;
	}
	if (blk->stopper) {
		struct ox_fiber *stopper = blk->stopper;

		blk->stopper = NULL;
		ox_fiber_resume(stopper);
	} else if (blk->given && !blk->stopping && blk->ended) {
		blk->ended(blk->arg);
	}
}

static void accepted(struct blk_export *blk, int fd)
{
	if (!blk->session) {
		serve(blk, fd);
		return;
	}
	if (ox_vu_session_is_ending(blk->session)) {
		blk->next_fd = fd;
		ox_watch_remove(&blk->watch);
		return;
	}
	ox_log(OX_LOG_WARNING, "%s: a second client was turned away: one is connected already",
	       blk->device.name);
	close(fd);
}

static void listener_ready(struct ox_watch *watch, uint32_t revents)
{
	struct blk_export *blk = ox_container_of(watch, struct blk_export, watch);
	int fd = accept4(blk->listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd >= 0) {
		accepted(blk, fd);
		return;
	}
	if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED)
		return;
	ox_log(OX_LOG_WARNING, "%s: cannot accept a client: %s; trying again in a second",
	       blk->device.name, strerror(errno));
	ox_watch_remove(&blk->watch);
	ox_timer_arm(blk->device.main, &blk->retry, ACCEPT_RETRY_NS);
}

static void disk_event(struct ox_disk_listener *listener, enum ox_disk_event event)
{
	struct blk_export *blk = ox_container_of(listener, struct blk_export, disk_listener);

	if (event == OX_DISK_RESIZED && blk->session)
		ox_vu_session_config_changed(blk->session);
}

/* --- the table --------------------------------------------------------------------------- */

static void blk_stop_co(struct ox_export *export)
{
	struct blk_export *blk = ox_container_of(export, struct blk_export, export);

	blk->stopping = true;
	ox_timer_cancel(&blk->retry);
	ox_watch_remove(&blk->watch);
	ox_unix_listener_close(&blk->listener);
	if (blk->next_fd >= 0)
		close(ox_steal_fd(&blk->next_fd));
	if (blk->session) {
		ox_vu_session_hang_up(blk->session);
		blk->stopper = ox_fiber_self();
		ox_fiber_suspend();
	}
	ox_disk_remove_listener(blk->device.disk, &blk->disk_listener);
	/* Another export of the disk starts with its own client's switch. */
	ox_disk_reset_writeback(blk->device.disk);
}

static void blk_free(struct ox_export *export)
{
	struct blk_export *blk = ox_container_of(export, struct blk_export, export);

	free(blk->device.loops);
	free(blk->path);
	free(blk);
}

static void blk_get_info(struct ox_export *export, struct ox_export_info *info)
{
	struct blk_export *blk = ox_container_of(export, struct blk_export, export);

	info->path = blk->path;
	info->connected = blk->session != NULL;
	info->queues_running = blk->session ? ox_vu_session_queues_running(blk->session) : 0;
}

static const struct ox_export_ops blk_ops = {
        .kind = "vhost-user-blk",
        .stop_co = blk_stop_co,
        .free = blk_free,
        .get_info = blk_get_info,
};

/* A client may give the write end of a pipe as its call descriptor, and close the read end. */
static void ignore_sigpipe(void)
{
	struct sigaction action;

	if (sigaction(SIGPIPE, NULL, &action) == 0 && action.sa_handler == SIG_DFL) {
		action.sa_handler = SIG_IGN;
		sigaction(SIGPIPE, &action, NULL);
	}
}

static int check_options(const struct ox_vhost_user_blk_options *options, struct ox_error *err)
{
	if (options->queues > QUEUES_MAX)
		return ox_error_set(err, EINVAL, "vhost-user has at most %u queues, not %u",
		                    QUEUES_MAX, options->queues);
	if (options->queue_size_max > OX_VQ_MAX_SIZE)
		return ox_error_set(err, EINVAL, "a queue has at most %u entries, not %u",
		                    OX_VQ_MAX_SIZE, options->queue_size_max);
	if (!options->socket_path && options->fd < 0)
		return ox_error_set(err, EINVAL, "vhost-user-blk needs a socket to listen on");
	if (!options->loop_count)
		return ox_error_set(err, EINVAL, "vhost-user-blk needs an I/O thread");
	return 0;
}

/* Opens the way in; *connected: the descriptor of a client that is there already, or -1. */
static int open_socket(struct blk_export *blk, const struct ox_vhost_user_blk_options *options,
                       int *connected, struct ox_error *err)
{
	int rc;

	*connected = -1;
	if (options->socket_path) {
		blk->path = ox_xstrdup(options->socket_path);
		return ox_unix_listen(options->socket_path, 0660, &blk->listener, err);
	}
	blk->path = ox_xasprintf("fd %d", options->fd);
	rc = ox_unix_socket_is_listening(options->fd, err);
	if (rc < 0)
		return rc;
	if (rc == 1)
		return ox_unix_listen_fd(options->fd, &blk->listener, err);
	if (fcntl(options->fd, F_SETFD, FD_CLOEXEC) < 0)
		return ox_error_set(err, errno, "descriptor %d: %s", options->fd, strerror(errno));
	blk->given = true;
	*connected = options->fd;
	return 0;
}

int ox_vhost_user_blk_new(const struct ox_vhost_user_blk_options *options,
                          struct ox_export **export, struct ox_error *err)
{
	struct blk_export *blk;
	struct ox_disk_info info;
	int connected, rc;

	*export = NULL;
	rc = check_options(options, err);
	if (rc < 0)
		return rc;
	ignore_sigpipe();
	ox_memory_install_sigbus();
	ox_disk_get_info(options->disk, &info);
	blk = ox_xcalloc(1, sizeof(*blk));
	blk->export.ops = &blk_ops;
	blk->next_fd = -1;
	blk->listener.fd = -1;
	blk->ended = options->ended;
	blk->arg = options->arg;
	blk->watch.fn = listener_ready;
	blk->watch.events = EPOLLIN;
	blk->retry.fn = retry_accept;
	blk->disk_listener.fn = disk_event;
	blk->device = (struct ox_vu_device){
	        .disk = options->disk,
	        .name = info.name,
	        .queues = options->queues ? options->queues : QUEUES_DEFAULT,
	        .queue_size_max =
	                options->queue_size_max ? options->queue_size_max : QUEUE_SIZE_DEFAULT,
	        .main = options->main,
	        .loops = ox_xcalloc(options->loop_count, sizeof(*options->loops)),
	        .loop_count = options->loop_count,
	};
	memcpy(blk->device.loops, options->loops, options->loop_count * sizeof(*options->loops));

	rc = open_socket(blk, options, &connected, err);
	if (rc == 0 && connected < 0) {
		blk->watch.fd = blk->listener.fd;
		rc = ox_watch_add(options->main, &blk->watch);
		if (rc < 0)
			ox_error_set(err, -rc, "%s: %s", blk->path, strerror(-rc));
	}
	if (rc < 0) {
		ox_unix_listener_close(&blk->listener);
		blk_free(&blk->export);
		return rc;
	}
	ox_disk_add_listener(options->disk, &blk->disk_listener);
	if (connected >= 0)
		serve(blk, connected);
	*export = &blk->export;
	return 0;
}
