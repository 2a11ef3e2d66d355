/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Back-end programs as children of a test, and a QMP client of a few lines.
 *
 * A child dies with the test (PR_SET_PDEATHSIG).  Its standard error goes to a file, which
 * daemon_stderr() reads.  Functions answer 0 or -errno.
 */
#ifndef OX_TESTS_DAEMON_H
#define OX_TESTS_DAEMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct daemon {
	pid_t pid;
	int out;          /* the child's standard output */
	char ready[1024]; /* its line that starts with "ready" */
	char log[128];    /* the file of its standard error */
};

/* Runs argv (ends with NULL; argv[0] is a path or looked up) and waits up to 20 s for a line on
 * stdout that starts with "ready", or, if `socket` is given, until that can be connected to.
 * -ECHILD: it ended before. `log`: the file for its standard error. */
int daemon_start(struct daemon *daemon, const char *const *argv, const char *socket,
                 const char *log);
/* Sends the signal and waits: the exit status as wait(2) gives it. */
int daemon_stop(struct daemon *daemon, int sig);
/* Waits up to timeout_ms for the end of a child: true, and *status. */
bool daemon_wait(struct daemon *daemon, int timeout_ms, int *status);
bool daemon_alive(struct daemon *daemon);
/* All that it wrote to standard error so far; to free. */
char *daemon_stderr(const struct daemon *daemon);

/* CPU time of all threads (clock ticks) and sums of context switches; false if pid is gone. */
struct daemon_usage {
	uint64_t user_ticks, system_ticks;
	uint64_t runtime_ns; /* schedstat: time on a CPU, finer than ticks */
	uint64_t voluntary_switches;
	uint64_t resident_bytes;
	unsigned threads;
};
bool daemon_usage(pid_t pid, struct daemon_usage *usage);

/* Connects and negotiates; a descriptor. */
int qmp_open(const char *path);
/* Sends a command line and returns the response ("return" or "error") as text to free; events in
 * between are dropped.  NULL: the connection ended or nothing came within 20 s. */
char *qmp_run(int fd, const char *line);

#endif
