/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the subcommands share: how an error is said.
 */
#include "cli/cli.h"
#include "base/base.h"
#include "base/text.h"
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* One line, whatever the names in it are: those in an image's header are a stranger's, and a
 * terminal obeys control characters. */
static int say(char *text)
{
	for (char *c = text; *c; c++) {
		if ((unsigned char)*c < 0x20 || *c == 0x7f)
			*c = '?';
	}
	/* What went to standard output comes first, also when both are one file. */
	fflush(stdout);
	fprintf(stderr, "oxbow: %s\n", text);
	return 1;
}

int ox_cli_fail(const struct ox_error *err)
{
	OX_FREE char *text = ox_xstrdup(err->text);

	return say(text);
}

int ox_cli_failf(const char *fmt, ...)
{
	char text[OX_ERROR_TEXT];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	return say(text);
}

/* The option's own part of "--name=value". */
static size_t option_length(const char *word)
{
	return strcspn(word, "=");
}

static const struct option *option_by_value(const struct option *longopts, int value)
{
	for (; longopts->name; longopts++) {
		if (longopts->val == value)
			return longopts;
	}
	return NULL;
}

int ox_cli_bad_option(const char *command, char **argv, const struct option *longopts)
{
	/* getopt_long() went past the word already, unless it is in the middle of "-abc". */
	const char *word = optind > 0 ? argv[optind - 1] : "";
	const struct option *known = optopt ? option_by_value(longopts, optopt) : NULL;
	OX_FREE const char **names = NULL;
	OX_FREE char *given = NULL;
	const char *nearest;
	unsigned matches = 0, count = 0;
	size_t length;

	if (optopt && strncmp(word, "--", 2) != 0) {
		/* A short option: its letter is in optopt. */
		if (known)
			return ox_cli_failf("option '-%c' needs a value; see 'oxbow %s --help'",
			                    optopt, command);
		return ox_cli_failf("%s has no option '-%c'; see 'oxbow %s --help'", command,
		                    optopt, command);
	}
	if (known && known->has_arg == no_argument)
		return ox_cli_failf("option '--%s' takes no value", known->name);
	if (known)
		return ox_cli_failf("option '--%s' needs a value; see 'oxbow %s --help'",
		                    known->name, command);

	if (!strncmp(word, "--", 2))
		word += 2;
	length = option_length(word);
	given = ox_xasprintf("%.*s", (int)length, word);
	while (longopts[count].name)
		count++;
	names = ox_xcalloc(count + 1, sizeof(*names));
	for (unsigned i = 0; i < count; i++) {
		names[i] = longopts[i].name;
		matches += !strncmp(names[i], given, length);
	}
	if (matches > 1)
		return ox_cli_failf("option '--%s' is not clear: %u options begin so; see "
		                    "'oxbow %s --help'",
		                    given, matches, command);
	nearest = ox_nearest_word(given, (const char *const *)names);
	if (nearest)
		return ox_cli_failf("%s has no option '--%s'; did you mean '--%s'?", command, given,
		                    nearest);
	return ox_cli_failf("%s has no option '--%s'; see 'oxbow %s --help'", command, given,
	                    command);
}
