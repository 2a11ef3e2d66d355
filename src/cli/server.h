/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A running server: threads, disks, exports, control sockets, from a checked configuration.
 */
#ifndef OX_CLI_SERVER_H
#define OX_CLI_SERVER_H

#include "cli/options.h"

/* Serves until a signal, `quit`, or the end of a client on a given descriptor; 0, or -errno with
 * a sentence when it could not start (everything it made is gone again). */
int ox_server_run(const struct ox_serve_config *config, struct ox_error *err) OX_MUST_CHECK;

#endif
