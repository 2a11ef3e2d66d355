/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * sd_notify(3) without libsystemd: one datagram, to a path or (with '@') an abstract name.
 */
#include "cli/notify.h"
#include "base/base.h"
#include <errno.h>
#include <oxbow/log.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

void ox_notify(const char *state)
{
	const char *name = getenv("NOTIFY_SOCKET");
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	OX_CLOSE int fd = -1;
	socklen_t length;

	if (!name || !*name)
		return;
	if ((name[0] != '/' && name[0] != '@') || strlen(name) >= sizeof(address.sun_path)) {
		ox_log(OX_LOG_WARNING, "NOTIFY_SOCKET=%s is not a socket that can be notified",
		       name);
		return;
	}
	memcpy(address.sun_path, name, strlen(name));
	length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name));
	if (name[0] == '@')
		address.sun_path[0] = '\0';
	else
		length++;
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || sendto(fd, state, strlen(state), MSG_NOSIGNAL,
	                     (const struct sockaddr *)&address, length) < 0)
		ox_log(OX_LOG_WARNING, "cannot notify the service manager at %s: %s", name,
		       strerror(errno));
}
