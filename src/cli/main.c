/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The program `oxbow`: finds the subcommand, answers `help`, `--help` and `--version`, and makes
 * sure that what was printed has arrived: standard output is closed and checked before the exit
 * status is chosen, so that a full disk or a closed pipe is never taken for success.
 *
 * Called by the name oxbow-vhost-user-blk (a link) it is `oxbow serve`, as the conventions for
 * vhost-user back-end programs want a program of its own (QEMU's docs/interop/vhost-user.rst,
 * "Backend program conventions").
 */
#include "cli/cli.h"
#include "base/base.h"
#include "base/text.h"
#include "oxbow-config.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

static const struct ox_command *const commands[] = {
        &ox_command_check, &ox_command_create, &ox_command_info,
        &ox_command_map,   &ox_command_resize, &ox_command_serve,
};

static const char back_end_name[] = "oxbow-vhost-user-blk";

static const struct ox_command *find_command(const char *name)
{
	for (unsigned i = 0; i < OX_ARRAY_SIZE(commands); i++) {
		if (!strcmp(commands[i]->name, name))
			return commands[i];
	}
	return NULL;
}

static int unknown_command(const char *name)
{
	const char *names[OX_ARRAY_SIZE(commands) + 2];
	const char *nearest;
	unsigned count = 0;

	for (unsigned i = 0; i < OX_ARRAY_SIZE(commands); i++)
		names[count++] = commands[i]->name;
	names[count++] = "help";
	names[count] = NULL;
	nearest = ox_nearest_word(name, names);
	if (nearest)
		return ox_cli_failf("there is no subcommand '%s'; did you mean '%s'?", name,
		                    nearest);
	return ox_cli_failf("there is no subcommand '%s'; 'oxbow help' lists them", name);
}

static void print_overview(void)
{
	fputs("Usage: oxbow SUBCOMMAND [OPTION]... [ARGUMENT]...\n"
	      "Virtual disks for KVM guests.\n"
	      "\n"
	      "Subcommands:\n",
	      stdout);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(commands); i++)
		printf("  %-8s  %s\n", commands[i]->name, commands[i]->summary);
	fputs("  help      show this, or a subcommand's help (oxbow help SUBCOMMAND)\n"
	      "\n"
	      "Other forms:\n"
	      "  oxbow SUBCOMMAND --help   the same as 'oxbow help SUBCOMMAND'\n"
	      "  oxbow --help              show this\n"
	      "  oxbow --version           show the version\n"
	      "\n"
	      "The exit status is 0 when all went well and 1 when not ('check' has more of them);\n"
	      "messages go to standard error. OXBOW_LOG=error|warning|info|debug in the environment\n"
	      "says how many.\n",
	      stdout);
}

static int command_help(int argc, char **argv)
{
	const struct ox_command *command;

	if (argc > 2)
		return ox_cli_failf("help takes one subcommand, not %d words", argc - 1);
	if (argc < 2 || !strcmp(argv[1], "help")) {
		print_overview();
		return 0;
	}
	command = find_command(argv[1]);
	if (!command)
		return unknown_command(argv[1]);
	fputs(command->help, stdout);
	return 0;
}

static void print_version(void)
{
	puts("oxbow " OX_VERSION);
}

/* Asked for help or the version anywhere before a "--"?  'h', 'V' or 0. */
static int wants_help(int argc, char **argv)
{
	for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
		if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
			return 'h';
		if (!strcmp(argv[i], "--version"))
			return 'V';
	}
	return 0;
}

static int run_command(const struct ox_command *command, int argc, char **argv)
{
	switch (wants_help(argc, argv)) {
	case 'h':
		fputs(command->help, stdout);
		return 0;
	case 'V':
		print_version();
		return 0;
	default:
		return command->run(argc, argv);
	}
}

static int run(int argc, char **argv)
{
	const struct ox_command *command;

	if (argc > 0 && !strcmp(basename(argv[0]), back_end_name))
		return run_command(&ox_command_serve, argc, argv);
	if (argc < 2)
		return ox_cli_failf("a subcommand is missing; 'oxbow help' lists them");
	if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
		print_overview();
		return 0;
	}
	if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "-V")) {
		print_version();
		return 0;
	}
	if (!strcmp(argv[1], "help"))
		return command_help(argc - 1, argv + 1);
	if (argv[1][0] == '-')
		return ox_cli_failf("option '%s' must follow a subcommand; 'oxbow help' lists them",
		                    argv[1]);
	command = find_command(argv[1]);
	if (!command)
		return unknown_command(argv[1]);
	return run_command(command, argc - 1, argv + 1);
}

/* A program started without one of the three standard descriptors would give its number to the
 * first file or socket that it opens, and print into it.  What stands in fails when it is used. */
static void occupy_standard_descriptors(void)
{
	int fd;

	do
		fd = open("/dev/null", O_RDONLY);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	static char buffer[64 * 1024];
	int status, broken;

	occupy_standard_descriptors();
	/* Held together, so that what fails is the closing, which tells why. */
	if (!isatty(STDOUT_FILENO))
		setvbuf(stdout, buffer, _IOFBF, sizeof(buffer));

	/* A reader that went away is an error of the write, which is checked. */
	signal(SIGPIPE, SIG_IGN);
	status = run(argc, argv);
	broken = ferror(stdout);
	errno = 0;
	broken |= fclose(stdout);
	/* A failure has been told already, perhaps this very one. */
	if (broken && status == 0)
		return ox_cli_failf("cannot write to standard output%s%s", errno ? ": " : "",
		                    errno ? strerror(errno) : "");
	return status;
}
