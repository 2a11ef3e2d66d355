/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Subcommands: one file each.
 */
#ifndef OX_CLI_CLI_H
#define OX_CLI_CLI_H

#include <oxbow/error.h>

struct ox_command {
	const char *name;
	const char *summary; /* one line for `oxbow help` */
	const char *help;    /* what `oxbow NAME --help` prints */
	/* argv[0] is the subcommand's name.  The process's exit status. */
	int (*run)(int argc, char **argv);
};

extern const struct ox_command ox_command_check;
extern const struct ox_command ox_command_create;
extern const struct ox_command ox_command_info;
extern const struct ox_command ox_command_map;
extern const struct ox_command ox_command_resize;
extern const struct ox_command ox_command_serve;

/* Prints "oxbow: TEXT" on stderr and answers 1. */
int ox_cli_fail(const struct ox_error *err);
int ox_cli_failf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* getopt_long() said '?' or ':': names the option and the nearest right one; answers 1. */
struct option;
int ox_cli_bad_option(const char *command, char **argv, const struct option *longopts);

#endif
