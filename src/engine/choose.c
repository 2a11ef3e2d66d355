/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Which engine for which file, and what this machine allows.
 */
#include "engine/loop_private.h"
#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <liburing.h>
#include <oxbow/log.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

struct probe {
	int rc; /* 0 or -errno */
	char text[160];
};

static struct probe probes[OX_AIO_IO_URING + 1];
static pthread_once_t probed = PTHREAD_ONCE_INIT;

static int read_number(const char *path)
{
	char buf[32] = "";
	OX_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, buf, sizeof(buf) - 1) <= 0)
		return -1;
	return atoi(buf);
}

static void probe_io_uring(struct probe *probe)
{
	struct io_uring ring;
	int disabled = read_number("/proc/sys/kernel/io_uring_disabled");

	probe->rc = io_uring_queue_init(2, &ring, 0);
	if (probe->rc == 0) {
		io_uring_queue_exit(&ring);
		return;
	}
	if (probe->rc == -ENOSYS)
		snprintf(probe->text, sizeof(probe->text),
		         "aio=io_uring: this kernel (or a seccomp filter) has no io_uring");
	else if (probe->rc == -EPERM && disabled > 0)
		snprintf(probe->text, sizeof(probe->text),
		         "aio=io_uring: forbidden by the sysctl kernel.io_uring_disabled=%d",
		         disabled);
	else if (probe->rc == -EPERM)
		snprintf(probe->text, sizeof(probe->text),
		         "aio=io_uring: forbidden by this system's policy");
	else if (probe->rc == -ENOMEM)
		snprintf(probe->text, sizeof(probe->text),
		         "aio=io_uring: not enough locked memory (raise RLIMIT_MEMLOCK)");
	else
		snprintf(probe->text, sizeof(probe->text), "aio=io_uring: %s",
		         strerror(-probe->rc));
}

static void probe_native(struct probe *probe)
{
	io_context_t context = NULL;

	probe->rc = io_setup(1, &context);
	if (probe->rc == 0)
		io_destroy(context);
	else if (probe->rc == -EAGAIN)
		snprintf(probe->text, sizeof(probe->text),
		         "aio=native: the host is out of AIO contexts (raise the sysctl "
		         "fs.aio-max-nr)");
	else
		snprintf(probe->text, sizeof(probe->text), "aio=native: io_setup: %s",
		         strerror(-probe->rc));
}

static void probe_all(void)
{
	probe_io_uring(&probes[OX_AIO_IO_URING]);
	probe_native(&probes[OX_AIO_NATIVE]);
}

int ox_aio_available(enum ox_aio kind, struct ox_error *err)
{
	pthread_once(&probed, probe_all);
	if (probes[kind].rc < 0)
		return ox_error_set(err, -probes[kind].rc, "%s", probes[kind].text);
	return 0;
}

enum ox_aio ox_aio_choose(enum ox_aio asked, const struct ox_aio_facts *facts, char *reason,
                          size_t size)
{
	struct ox_error err = {0};
	static bool said[OX_AIO_IO_URING + 1];

	if (asked != OX_AIO_AUTO) {
		if (ox_aio_available(asked, &err) == 0) {
			snprintf(reason, size, "as asked");
			return asked;
		}
		if (!__atomic_exchange_n(&said[asked], true, __ATOMIC_RELAXED))
			ox_log(OX_LOG_WARNING, "%s; using threads instead", err.text);
		snprintf(reason, size, "%s", err.text);
		return OX_AIO_THREADS;
	}
	if (ox_aio_available(OX_AIO_IO_URING, &err) == 0) {
		snprintf(reason, size, "io_uring is allowed here");
		return OX_AIO_IO_URING;
	}
	if (!facts->direct) {
		snprintf(reason, size, "%s; native would block without O_DIRECT",
		         err.text + strlen("aio="));
		return OX_AIO_THREADS;
	}
	if (!facts->block_device && !facts->fully_allocated) {
		snprintf(reason, size, "%s; native would block while a sparse file grows",
		         err.text + strlen("aio="));
		return OX_AIO_THREADS;
	}
	if (ox_aio_available(OX_AIO_NATIVE, NULL) < 0) {
		snprintf(reason, size, "%s; native is not available either",
		         err.text + strlen("aio="));
		return OX_AIO_THREADS;
	}
	snprintf(reason, size, "%s; the %s never blocks in submission", err.text + strlen("aio="),
	         facts->block_device ? "block device" : "fully allocated file");
	return OX_AIO_NATIVE;
}
