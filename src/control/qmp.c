/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The control socket: listening, the list of clients, events, and the end.  A client is in
 * qmp_session.c, what can be asked in qmp_commands.c.
 *
 * Everything here runs on the main loop's thread.  Accepting stops while there are
 * MAX_SESSIONS clients, and for a second when the process is out of descriptors: a listening
 * socket that cannot be served must not turn the loop.
 */
#include "control/qmp_internal.h"
#include <errno.h>
#include <oxbow/log.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>

#define MAX_SESSIONS    64
#define ACCEPT_AGAIN_NS 1000000000u
#define END_WAIT_NS     1000000000u /* for answers that a client has not read */

static void on_connection(struct ox_watch *watch, uint32_t revents)
{
	struct ox_qmp *qmp = ox_container_of(watch, struct ox_qmp, listener);

	while (qmp->session_count < MAX_SESSIONS) {
		int fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			ox_qmp_session_new(qmp, fd);
			continue;
		}
		if (errno == EINTR || errno == ECONNABORTED)
			continue;
		if (errno != EAGAIN && errno != EWOULDBLOCK) {
			ox_log(OX_LOG_WARNING, "%s: cannot accept a client: %s", qmp->path,
			       strerror(errno));
			ox_watch_modify(watch, 0);
			ox_timer_arm(qmp->options.main, &qmp->accept_again, ACCEPT_AGAIN_NS);
		}
		return;
	}
	ox_watch_modify(watch, 0);
}

static void accept_again(struct ox_timer *timer)
{
	struct ox_qmp *qmp = ox_container_of(timer, struct ox_qmp, accept_again);

	if (qmp->listener.loop)
		ox_watch_modify(&qmp->listener, EPOLLIN);
}

void ox_qmp_session_freed(struct ox_qmp *qmp)
{
	if (qmp->session_count == MAX_SESSIONS - 1 && qmp->listener.loop)
		ox_watch_modify(&qmp->listener, EPOLLIN);
}

void ox_qmp_event(struct ox_qmp *qmp, const char *name, json_t *data)
{
	struct qmp_session *session, *next;
	struct timeval now;
	json_t *event;

	gettimeofday(&now, NULL);
	event = json_pack("{s:{s:I, s:I}, s:s, s:o*}", "timestamp", "seconds",
	                  (json_int_t)now.tv_sec, "microseconds", (json_int_t)now.tv_usec, "event",
	                  name, "data", data);
	if (!event)
		return;
	for (session = ox_qmp_session_next(qmp, NULL); session; session = next) {
		next = ox_qmp_session_next(qmp, session);
		if (ox_qmp_session_is_ready(session))
			ox_qmp_session_send(session, event);
	}
	json_decref(event);
}

/* --- what happens to the disks ----------------------------------------------------------- */

static void count_failed(struct ox_disk *disk, uint64_t *reads, uint64_t *others)
{
	struct ox_disk_stats *stats = ox_xcalloc(1, sizeof(*stats));

	ox_disk_get_stats(disk, stats);
	*reads = stats->op[OX_IO_READ].failed;
	*others = 0;
	for (unsigned i = 0; i < OX_DISK_STATS_OPS; i++)
		*others += i == OX_IO_READ ? 0 : stats->op[i].failed;
	free(stats);
}

/* QEMU's BLOCK_IO_ERROR. `stop_error`: 0, or why requests are held. */
static void send_io_error(struct qmp_disk *watched, const struct ox_disk_info *info,
                          const char *operation, int stop_error)
{
	json_t *data =
	        json_pack("{s:o, s:o, s:s, s:s, s:b}", "device", ox_qmp_text(info->name),
	                  "node-name", ox_qmp_text(info->name), "operation", operation, "action",
	                  stop_error ? "stop" : "report", "nospace", stop_error == ENOSPC);

	if (data && stop_error)
		json_object_set_new(data, "reason", json_string(strerror(stop_error)));
	ox_qmp_event(watched->qmp, "BLOCK_IO_ERROR", data);
}

/* The disk tells that something failed; the counters show what.  Requests that are held are not
 * counted as failed: of these the disk tells by an event of their own. */
static void send_failures(struct qmp_disk *watched, const struct ox_disk_info *info)
{
	uint64_t reads, others;

	count_failed(watched->qmp->options.disks[watched->index], &reads, &others);
	if (reads != watched->failed_reads)
		send_io_error(watched, info, "read", 0);
	if (others != watched->failed_others)
		send_io_error(watched, info, "write", 0);
	watched->failed_reads = reads;
	watched->failed_others = others;
}

static void on_disk_event(struct ox_disk_listener *listener, enum ox_disk_event event)
{
	struct qmp_disk *watched = ox_container_of(listener, struct qmp_disk, listener);
	struct ox_disk_info info;

	ox_disk_get_info(watched->qmp->options.disks[watched->index], &info);
	switch (event) {
	case OX_DISK_STOPPED:
		send_io_error(watched, &info, info.stop_op == OX_IO_READ ? "read" : "write",
		              info.stop_error ? info.stop_error : EIO);
		break;
	case OX_DISK_IO_ERROR:
		send_failures(watched, &info);
		break;
	case OX_DISK_CONTINUED:
		ox_qmp_event(watched->qmp, "RESUME",
		             json_pack("{s:o}", "device", ox_qmp_text(info.name)));
		break;
	case OX_DISK_RESIZED:
		ox_qmp_event(watched->qmp, "OXBOW_DISK_RESIZED",
		             json_pack("{s:o, s:I}", "device", ox_qmp_text(info.name), "size",
		                       (json_int_t)info.size));
		break;
	}
}

void ox_qmp_listen_to_disks(struct ox_qmp *qmp)
{
	qmp->disks = ox_xcalloc(qmp->options.count, sizeof(*qmp->disks));
	for (unsigned i = 0; i < qmp->options.count; i++) {
		qmp->disks[i].listener.fn = on_disk_event;
		qmp->disks[i].qmp = qmp;
		qmp->disks[i].index = i;
		count_failed(qmp->options.disks[i], &qmp->disks[i].failed_reads,
		             &qmp->disks[i].failed_others);
		ox_disk_add_listener(qmp->options.disks[i], &qmp->disks[i].listener);
	}
}

void ox_qmp_unlisten_to_disks(struct ox_qmp *qmp)
{
	for (unsigned i = 0; i < qmp->options.count; i++)
		ox_disk_remove_listener(qmp->options.disks[i], &qmp->disks[i].listener);
	free(qmp->disks);
	qmp->disks = NULL;
}

/* --- beginning and end ------------------------------------------------------------------- */

int ox_qmp_new(const struct ox_qmp_options *options, struct ox_qmp **out, struct ox_error *err)
{
	struct ox_qmp *qmp = ox_xcalloc(1, sizeof(*qmp));
	int ret;

	qmp->options = *options;
	qmp->path = ox_xstrdup(options->socket_path);
	qmp->options.socket_path = qmp->path;
	TAILQ_INIT(&qmp->sessions);
	qmp->accept_again.fn = accept_again;
	ret = ox_unix_listen(qmp->path, 0600, &qmp->socket, err);
	if (ret < 0)
		goto fail;
	qmp->listener.fd = qmp->socket.fd;
	qmp->listener.events = EPOLLIN;
	qmp->listener.fn = on_connection;
	ret = ox_watch_add(options->main, &qmp->listener);
	if (ret < 0) {
		ox_error_set(err, -ret, "%s: cannot watch the socket: %s", qmp->path,
		             strerror(-ret));
		ox_unix_listener_close(&qmp->socket);
		goto fail;
	}
	ox_qmp_listen_to_disks(qmp);
	*out = qmp;
	return 0;
fail:
	free(qmp->path);
	free(qmp);
	return ret;
}

void ox_qmp_free_co(struct ox_qmp *qmp)
{
	struct qmp_session *session;
	uint64_t deadline;

	qmp->stopping = true;
	ox_timer_cancel(&qmp->accept_again);
	ox_watch_remove(&qmp->listener);
	ox_unix_listener_close(&qmp->socket);
	ox_qmp_unlisten_to_disks(qmp);
	ox_qmp_event(qmp, "SHUTDOWN",
	             json_pack("{s:b, s:s}", "guest", 0, "reason",
	                       qmp->quit ? "host-qmp-quit" : "host-signal"));
	while (qmp->running) {
		qmp->waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	/* One moment for all clients together: disks wait to be flushed. */
	deadline = ox_clock_ns() + END_WAIT_NS;
	while ((session = ox_qmp_session_next(qmp, NULL)))
		ox_qmp_session_end_co(session, deadline);
	free(qmp->path);
	free(qmp);
}
