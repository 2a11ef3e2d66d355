/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A running server.
 *
 * The main thread runs a loop of its own for the control path (listening, QMP, signals); N I/O
 * threads move the data of all disks.
 *
 * Order of starting: signals blocked (so that no thread takes them), threads, disks (opened for a
 * moment without a lock, and closed again: they are inactive), then all sockets, and only when
 * every one of them listens the `ready` lines and the service manager's READY=1.
 *
 * Order of ending, in one fiber of the main loop: control sockets close (running commands end
 * first), all exports stop at the same time (each drains, flushes and releases its image), the
 * main loop stops; then exports and disks are freed and the threads joined.  From the first signal
 * on a second one has its own handler, outside the loop, so that it works whatever the loop is
 * waiting for.
 */
#include "cli/server.h"
#include "base/fiber.h"
#include "base/text.h"
#include "cli/notify.h"
#include "control/qmp.h"
#include "export/export.h"
#include <errno.h>
#include <oxbow/log.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>

struct server {
	const struct ox_serve_config *config;
	struct ox_loop *main;
	struct ox_iothread **threads;
	struct ox_loop **loops;
	unsigned thread_count;
	struct ox_disk **disks;
	struct ox_export **exports;
	unsigned disk_count, export_count;
	struct ox_qmp *control, *run_control; /* NULL: none */
	struct ox_watch signals;
	bool stopping;
	struct ox_post stop_post;
	unsigned exports_stopping;
	struct ox_fiber *stopper; /* waits for exports_stopping to fall to 0 */
};

/* An export that one fiber stops. */
struct stop_one {
	struct server *server;
	struct ox_export *export;
};

static void stop_export_co(void *arg)
{
	struct stop_one *one = arg;
	struct server *server = one->server;

	ox_export_stop_co(one->export);
	free(one);
	if (--server->exports_stopping == 0 && server->stopper)
		ox_fiber_resume(ox_steal_ptr(server->stopper));
}

static void stop_co(void *arg)
{
	struct server *server = arg;

	ox_notify("STOPPING=1");
	if (server->control)
		ox_qmp_free_co(ox_steal_ptr(server->control));
	if (server->run_control)
		ox_qmp_free_co(ox_steal_ptr(server->run_control));
	server->exports_stopping = server->export_count;
	for (unsigned i = 0; i < server->export_count; i++) {
		struct stop_one *one = ox_xcalloc(1, sizeof(*one));

		*one = (struct stop_one){server, server->exports[i]};
		if (ox_fiber_start(stop_export_co, one) < 0)
			stop_export_co(one);
	}
	while (server->exports_stopping) {
		server->stopper = ox_fiber_self();
		ox_fiber_suspend();
	}
	ox_loop_stop(server->main);
}

/* The second signal: nothing is waited for any more. Async-signal-safe. */
static void end_at_once(int signal_number)
{
	static const char text[] =
	        "oxbow: second signal: ending at once, without waiting for requests or flushing\n";

	if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
		_exit(1);
	_exit(1);
}

static void stop_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGINT);
}

static void begin_stop(struct ox_post *post)
{
	struct server *server = ox_container_of(post, struct server, stop_post);

	if (ox_fiber_start(stop_co, server) < 0) {
		ox_log(OX_LOG_ERROR, "no memory to stop with; a second signal ends at once");
		server->stopping = false;
	}
}

/* From the next turn of the main loop on: who asks may be a part of what is taken down. */
static void request_stop(void *arg)
{
	struct server *server = arg;

	if (server->stopping)
		return;
	server->stopping = true;
	server->stop_post.fn = begin_stop;
	ox_loop_post(server->main, &server->stop_post);
}

static void on_signal(struct ox_watch *watch, uint32_t revents)
{
	struct server *server = ox_container_of(watch, struct server, signals);
	struct sigaction action = {.sa_handler = end_at_once};
	struct signalfd_siginfo info;
	sigset_t set;

	if (read(watch->fd, &info, sizeof(info)) != sizeof(info))
		return;
	ox_watch_remove(watch);
	ox_log(OX_LOG_INFO, "%s: stopping%s",
	       info.ssi_signo == SIGINT ? "interrupted" : "terminated",
	       server->stopping ? " already" : "");
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	stop_signals(&set);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	request_stop(server);
}

static int watch_signals(struct server *server, struct ox_error *err)
{
	sigset_t set;
	int ret;

	stop_signals(&set);
	server->signals.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (server->signals.fd < 0)
		return ox_error_set(err, errno, "cannot watch for signals: %s", strerror(errno));
	server->signals.events = EPOLLIN;
	server->signals.fn = on_signal;
	ret = ox_watch_add(server->main, &server->signals);
	if (ret < 0)
		return ox_error_set(err, -ret, "cannot watch for signals: %s", strerror(-ret));
	return 0;
}

/* Many disks with many queues have many descriptors; select() is not used here. */
static void raise_descriptor_limit(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur == limit.rlim_max)
		return;
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
		ox_log(OX_LOG_WARNING, "cannot raise the limit of open files: %s", strerror(errno));
}

static int start_threads(struct server *server, struct ox_error *err)
{
	const struct ox_serve_config *config = server->config;
	struct ox_loop_options options = {.name = "oxbow"};
	char name[32];

	server->main = ox_loop_new(&options, err);
	if (!server->main)
		return -ENOMEM;
	server->threads = ox_xcalloc(config->iothreads, sizeof(struct ox_iothread *));
	server->loops = ox_xcalloc(config->iothreads, sizeof(struct ox_loop *));
	options.name = name;
	options.poll_max_ns = config->poll_max_ns;
	for (unsigned i = 0; i < config->iothreads; i++) {
		snprintf(name, sizeof(name), "oxbow-io%u", i);
		server->threads[i] = ox_iothread_start(&options, err);
		if (!server->threads[i])
			return -EAGAIN;
		server->loops[i] = ox_iothread_loop(server->threads[i]);
		server->thread_count++;
	}
	return 0;
}

/* Two disks on one image would overwrite each other: the lock would tell only at the second
 * one's first ring. */
static int check_shared_image(const struct server *server, unsigned index, struct ox_error *err)
{
	const struct ox_serve_disk *disk = &server->config->disks[index];
	struct ox_disk_info info;

	ox_disk_get_info(server->disks[index], &info);
	if (!info.dev && !info.ino)
		return 0;
	for (unsigned i = 0; i < index; i++) {
		const struct ox_serve_disk *other = &server->config->disks[i];
		struct ox_disk_info other_info;

		ox_disk_get_info(server->disks[i], &other_info);
		if (other_info.dev != info.dev || other_info.ino != info.ino)
			continue;
		if ((disk->disk.read_only && other->disk.read_only) ||
		    (disk->disk.share_rw && other->disk.share_rw) || disk->disk.no_lock ||
		    other->disk.no_lock)
			continue;
		return ox_error_set(err, EBUSY,
		                    "%simage: %s is the image of disk '%s' too, and not both are "
		                    "read-only or share-rw",
		                    disk->where, disk->image, other_info.name);
	}
	return 0;
}

static int open_disks(struct server *server, struct ox_error *err)
{
	const struct ox_serve_config *config = server->config;

	server->disks = ox_xcalloc(config->count, sizeof(struct ox_disk *));
	for (unsigned i = 0; i < config->count; i++) {
		struct ox_disk_options options = config->disks[i].disk;
		struct ox_error why = {0};
		int ret;

		options.main = server->main;
		options.loops = server->loops;
		options.loop_count = server->thread_count;
		options.opener = &ox_opener_direct;
		ret = ox_disk_open(&options, &server->disks[i], &why);
		if (ret < 0)
			return ox_error_set(err, -ret, "%s%s", config->disks[i].where, why.text);
		server->disk_count++;
		ret = check_shared_image(server, i, err);
		if (ret < 0)
			return ret;
	}
	return 0;
}

static int open_exports(struct server *server, struct ox_error *err)
{
	const struct ox_serve_config *config = server->config;

	server->exports = ox_xcalloc(config->count, sizeof(struct ox_export *));
	for (unsigned i = 0; i < config->count; i++) {
		const struct ox_vhost_user_blk_options options = {
		        .disk = server->disks[i],
		        .socket_path = config->disks[i].socket_path,
		        .fd = config->disks[i].fd,
		        .queues = config->disks[i].queues,
		        .main = server->main,
		        .loops = server->loops,
		        .loop_count = server->thread_count,
		        .ended = request_stop,
		        .arg = server,
		};
		struct ox_error why = {0};
		int ret = ox_vhost_user_blk_new(&options, &server->exports[i], &why);

		if (ret < 0)
			return ox_error_set(err, -ret, "%s%s", config->disks[i].where, why.text);
		server->export_count++;
	}
	return 0;
}

/* The socket that was asked for, and the one in the run directory by which tools find a server
 * from the process that holds an image's lock.  The latter is a convenience: without a run
 * directory the server does without. */
static int open_control(struct server *server, struct ox_error *err)
{
	struct ox_qmp_options options = {
	        .socket_path = server->config->control,
	        .main = server->main,
	        .disks = server->disks,
	        .exports = server->exports,
	        .count = server->disk_count,
	        .quit = request_stop,
	        .arg = server,
	};
	OX_FREE char *path = NULL;
	struct ox_error why = {0};
	const char *dir;
	int ret;

	if (options.socket_path) {
		ret = ox_qmp_new(&options, &server->control, err);
		if (ret < 0)
			return ret;
	}
	dir = ox_run_dir();
	if (!dir)
		return 0;
	ox_run_dir_clean();
	path = ox_xasprintf("%s/%d.qmp", dir, (int)getpid());
	options.socket_path = path;
	if (ox_qmp_new(&options, &server->run_control, &why) < 0)
		ox_log(OX_LOG_WARNING, "no control socket for 'oxbow resize': %s", why.text);
	return 0;
}

static void print_ready(const struct server *server, unsigned index)
{
	const struct ox_serve_disk *disk = &server->config->disks[index];
	struct ox_disk_info info;
	char size[32], fd[24];

	ox_disk_get_info(server->disks[index], &info);
	snprintf(fd, sizeof(fd), "fd:%d", disk->fd);
	printf("ready vhost-user-blk %s %s %s cache=%s aio=%s iothreads=%u",
	       disk->socket_path ? disk->socket_path : fd,
	       ox_format_size(info.size, size, sizeof(size)), info.format,
	       ox_cache_name(info.cache), ox_aio_name(info.aio), server->thread_count);
	if (disk->queues)
		printf(" queues=%u", disk->queues);
	if (info.read_only)
		fputs(" read-only", stdout);
	if (disk->name)
		printf(" name=%s", disk->name);
	printf(" (aio: %s", info.aio_reason && *info.aio_reason ? info.aio_reason : "as asked for");
	if (!disk->format && !info.read_only && !strcmp(info.format, "raw"))
		fputs("; format guessed: writes that would turn the first sector into another "
		      "format's are refused, give -f raw to allow them",
		      stdout);
	puts(")");
}

static int say_ready(const struct server *server, struct ox_error *err)
{
	for (unsigned i = 0; i < server->disk_count; i++)
		print_ready(server, i);
	if (fflush(stdout) != 0)
		return ox_error_set(err, errno, "cannot write to standard output: %s",
		                    strerror(errno));
	ox_notify("READY=1");
	return 0;
}

/* What has sessions needs the loop around it. */
struct open_sockets {
	struct server *server;
	struct ox_error *err;
	int ret;
};

static void open_sockets_co(void *arg)
{
	struct open_sockets *open = arg;

	open->ret = open_exports(open->server, open->err);
	if (open->ret == 0)
		open->ret = open_control(open->server, open->err);
}

static int start(struct server *server, struct ox_error *err)
{
	struct open_sockets open = {server, err, 0};
	int ret = start_threads(server, err);

	if (ret == 0)
		ret = open_disks(server, err);
	if (ret == 0) {
		ox_loop_run_fiber(server->main, open_sockets_co, &open);
		ret = open.ret;
	}
	if (ret == 0)
		ret = watch_signals(server, err);
	if (ret == 0)
		ret = say_ready(server, err);
	return ret;
}

int ox_server_run(const struct ox_serve_config *config, struct ox_error *err)
{
	struct server server = {.config = config, .signals.fd = -1};
	sigset_t set, old;
	int ret;

	raise_descriptor_limit();
	/* A terminal that goes away is no reason to take disks from guests. */
	signal(SIGHUP, SIG_IGN);
	stop_signals(&set);
	pthread_sigmask(SIG_BLOCK, &set, &old);

	ret = start(&server, err);
	if (ret == 0)
		ox_loop_run(server.main);
	server.stopping = true;
	if (ret < 0 && server.main)
		ox_loop_run_fiber(server.main, stop_co, &server);

	for (unsigned i = 0; i < server.export_count; i++)
		ox_export_free(server.exports[i]);
	for (unsigned i = 0; i < server.disk_count; i++)
		ox_disk_close(server.disks[i]);
	for (unsigned i = 0; i < server.thread_count; i++)
		ox_iothread_stop(server.threads[i]);
	ox_watch_remove(&server.signals);
	if (server.signals.fd >= 0)
		close(server.signals.fd);
	if (server.main)
		ox_loop_free(server.main);
	ox_fiber_pool_free();
	free(server.exports);
	free(server.disks);
	free(server.threads);
	free(server.loops);
	return ret;
}
