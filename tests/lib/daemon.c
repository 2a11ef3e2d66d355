/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Children and their accounting: see daemon.h.
 */
#include "daemon.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define START_TIMEOUT_MS 20000

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static int connect_path(const char *path)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || strlen(path) >= sizeof(addr.sun_path))
		return -EINVAL;
	strcpy(addr.sun_path, path);
	if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
		int code = errno;

		close(fd);
		return -code;
	}
	return fd;
}

/* Reads lines until one starts with "ready": true. */
static bool read_ready(struct daemon *daemon, char *text, size_t *have, size_t size)
{
	ssize_t n = read(daemon->out, text + *have, size - 1 - *have);
	char *line, *end;

	if (n <= 0)
		return false;
	*have += (size_t)n;
	text[*have] = '\0';
	for (line = text; (end = strchr(line, '\n')); line = end + 1) {
		if (strncmp(line, "ready", 5))
			continue;
		*end = '\0';
		line[sizeof(daemon->ready) - 1] = '\0';
		strcpy(daemon->ready, line);
		return true;
	}
	return false;
}

static void run_child(const char *const *argv, int out, const char *log)
{
	int err = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	dup2(out, STDOUT_FILENO);
	if (err >= 0)
		dup2(err, STDERR_FILENO);
	signal(SIGPIPE, SIG_DFL);
	execvp(argv[0], (char *const *)(uintptr_t)argv);
	perror(argv[0]);
	_exit(127);
}

int daemon_start(struct daemon *daemon, const char *const *argv, const char *socket,
                 const char *log)
{
	uint64_t end = now_ms() + START_TIMEOUT_MS;
	char text[8192];
	size_t have = 0;
	int pipe_fds[2];

	memset(daemon, 0, sizeof(*daemon));
	snprintf(daemon->log, sizeof(daemon->log), "%s", log);
	if (pipe2(pipe_fds, O_CLOEXEC) < 0)
		return -errno;
	daemon->out = pipe_fds[0];
	daemon->pid = fork();
	if (daemon->pid < 0) {
		int code = errno;

		close(pipe_fds[0]);
		close(pipe_fds[1]);
		return -code;
	}
	if (daemon->pid == 0)
		run_child(argv, pipe_fds[1], log);
	close(pipe_fds[1]);
	while (now_ms() < end) {
		struct pollfd pfd = {.fd = daemon->out, .events = POLLIN};

		poll(&pfd, 1, 20);
		if (pfd.revents & POLLIN && read_ready(daemon, text, &have, sizeof(text)))
			return 0;
		if (socket) {
			int fd = connect_path(socket);

			if (fd >= 0) {
				close(fd);
				return 0;
			}
		}
		if (!daemon_alive(daemon))
			return -ECHILD;
	}
	daemon_stop(daemon, SIGKILL);
	return -ETIMEDOUT;
}

bool daemon_wait(struct daemon *daemon, int timeout_ms, int *status)
{
	uint64_t end = now_ms() + (uint64_t)timeout_ms;

	while (daemon->pid > 0) {
		pid_t pid = waitpid(daemon->pid, status, WNOHANG);

		if (pid == daemon->pid) {
			daemon->pid = 0;
			close(daemon->out);
			daemon->out = -1;
			return true;
		}
		if (now_ms() >= end)
			return false;
		usleep(2000);
	}
	return true;
}

int daemon_stop(struct daemon *daemon, int sig)
{
	int status = -1;

	if (daemon->pid <= 0)
		return -1;
	kill(daemon->pid, sig);
	if (!daemon_wait(daemon, 30000, &status)) {
		kill(daemon->pid, SIGKILL);
		daemon_wait(daemon, 10000, &status);
		return -1;
	}
	return status;
}

bool daemon_alive(struct daemon *daemon)
{
	int status;

	return daemon->pid > 0 && !daemon_wait(daemon, 0, &status);
}

static char *read_all(const char *path)
{
	FILE *file = fopen(path, "re");
	char *text = calloc(1, 1u << 20);

	if (file && text) {
		size_t n = fread(text, 1, (1u << 20) - 1, file);

		text[n] = '\0';
	}
	if (file)
		fclose(file);
	return text;
}

char *daemon_stderr(const struct daemon *daemon)
{
	return read_all(daemon->log);
}

static uint64_t field_after(const char *text, const char *name)
{
	const char *at = strstr(text, name);

	return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* Clock ticks of a process, its ended threads included. */
static bool read_ticks(pid_t pid, struct daemon_usage *usage)
{
	unsigned long long user, system;
	char path[64], *text, *p;
	bool ok;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	text = read_all(path);
	p = text ? strrchr(text, ')') : NULL;
	ok = p && sscanf(p + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user,
	                 &system) == 2;
	if (ok) {
		usage->user_ticks = user;
		usage->system_ticks = system;
	}
	free(text);
	return ok;
}

static void add_thread(pid_t pid, int tid, struct daemon_usage *usage)
{
	unsigned long long runtime;
	char path[64], *text;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/schedstat", pid, tid);
	text = read_all(path);
	if (text && sscanf(text, "%llu", &runtime) == 1)
		usage->runtime_ns += runtime;
	free(text);
	snprintf(path, sizeof(path), "/proc/%d/task/%d/status", pid, tid);
	text = read_all(path);
	if (text)
		usage->voluntary_switches += field_after(text, "\nvoluntary_ctxt_switches:");
	free(text);
	usage->threads++;
}

bool daemon_usage(pid_t pid, struct daemon_usage *usage)
{
	char path[64], *text;
	struct dirent *entry;
	DIR *dir;

	memset(usage, 0, sizeof(*usage));
	if (!read_ticks(pid, usage))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.')
			add_thread(pid, atoi(entry->d_name), usage);
	closedir(dir);
	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	text = read_all(path);
	if (text)
		usage->resident_bytes = field_after(text, "\nVmRSS:") * 1024;
	free(text);
	return usage->threads > 0;
}

/* --- QMP -------------------------------------------------------------------------------------- */

/* One line, without its end, into `line`; false: nothing came. */
static bool read_line(int fd, char *line, size_t size)
{
	size_t n = 0;

	while (n + 1 < size) {
		struct pollfd pfd = {.fd = fd, .events = POLLIN};

		if (poll(&pfd, 1, 20000) <= 0 || read(fd, line + n, 1) != 1)
			return false;
		if (line[n] == '\n') {
			line[n] = '\0';
			return true;
		}
		n++;
	}
	return false;
}

char *qmp_run(int fd, const char *command)
{
	size_t size = 1u << 18, n = strlen(command);
	char *line = calloc(1, size);

	if (!line || write(fd, command, n) != (ssize_t)n || write(fd, "\n", 1) != 1)
		goto fail;
	while (read_line(fd, line, size))
		if (strstr(line, "\"return\"") || strstr(line, "\"error\""))
			return line;
fail:
	free(line);
	return NULL;
}

int qmp_open(const char *path)
{
	char greeting[4096], *reply;
	int fd = connect_path(path);

	if (fd < 0)
		return fd;
	if (!read_line(fd, greeting, sizeof(greeting)) || !strstr(greeting, "\"QMP\"") ||
	    !(reply = qmp_run(fd, "{\"execute\": \"qmp_capabilities\"}"))) {
		close(fd);
		return -EPROTO;
	}
	free(reply);
	return fd;
}
