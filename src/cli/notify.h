/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Telling systemd, sd_notify(3): a datagram to $NOTIFY_SOCKET.
 */
#ifndef OX_CLI_NOTIFY_H
#define OX_CLI_NOTIFY_H

/* Sends "READY=1" and the like; nothing happens without a service manager.  A failure is logged
 * as a warning: the manager will notice by itself. */
void ox_notify(const char *state);

#endif
