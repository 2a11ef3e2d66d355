/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The lines of the faulty store's rule files: see faulty.h.  A pure function over a string.
 */
#include "store/faulty.h"
#include "base/text.h"
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define LINE_MAX_BYTES 256

static const struct {
	const char *name;
	int value;
} errnos[] = {
        {"EIO", EIO},         {"ENOSPC", ENOSPC}, {"EAGAIN", EAGAIN},
        {"EINVAL", EINVAL},   {"ENOMEM", ENOMEM}, {"EDQUOT", EDQUOT},
        {"EROFS", EROFS},     {"EFBIG", EFBIG},   {"ETIMEDOUT", ETIMEDOUT},
        {"ENOTSUP", ENOTSUP}, {"EPERM", EPERM},   {"EREMOTEIO", EREMOTEIO},
};

static bool parse_errno(const char *word, int *out)
{
	uint64_t number;

	for (size_t i = 0; i < OX_ARRAY_SIZE(errnos); i++) {
		if (!strcmp(word, errnos[i].name)) {
			*out = errnos[i].value;
			return true;
		}
	}
	if (!ox_parse_uint(word, 1, 4095, &number))
		return false;
	*out = (int)number;
	return true;
}

static bool parse_op(const char *word, uint8_t *out)
{
	static const struct {
		const char *name;
		uint8_t op;
	} ops[] = {
	        {"read", OX_IO_READ}, {"write", OX_IO_WRITE},     {"flush", OX_IO_FLUSH},
	        {"zero", OX_IO_ZERO}, {"discard", OX_IO_DISCARD}, {"any", OX_FAULT_ANY_OP},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(ops); i++) {
		if (!strcmp(word, ops[i].name)) {
			*out = ops[i].op;
			return true;
		}
	}
	return false;
}

/* "4k+512" */
static bool parse_range(char *word, struct ox_fault_rule *rule)
{
	char *plus = strchr(word, '+');

	if (!plus)
		return false;
	*plus = '\0';
	return ox_parse_size(word, 1, &rule->offset) && ox_parse_size(plus + 1, 1, &rule->length) &&
	       rule->length > 0;
}

/* A word after the operation; *faults counts those that are the fault. */
static bool parse_word(char *word, struct ox_fault_rule *rule, unsigned *faults)
{
	char *value = strchr(word, '=');
	uint64_t ms;

	if (!strcmp(word, "always")) {
		rule->always = true;
		return true;
	}
	if (!strcmp(word, "never")) {
		rule->kind = OX_FAULT_NEVER;
		++*faults;
		return true;
	}
	if (!value)
		return false;
	*value++ = '\0';
	if (!strcmp(word, "nth"))
		return ox_parse_uint(value, 1, UINT64_MAX, &rule->nth);
	if (!strcmp(word, "range"))
		return parse_range(value, rule);
	++*faults;
	if (!strcmp(word, "error")) {
		rule->kind = OX_FAULT_ERROR;
		return parse_errno(value, &rule->error);
	}
	if (!strcmp(word, "short")) {
		rule->kind = OX_FAULT_SHORT;
		return ox_parse_size(value, 1, &rule->bytes);
	}
	if (!strcmp(word, "delay")) {
		rule->kind = OX_FAULT_DELAY;
		if (!ox_parse_uint(value, 0, 3600000, &ms))
			return false;
		rule->delay_ns = ms * 1000000;
		return true;
	}
	return false;
}

int ox_faulty_parse_rule(const char *line, struct ox_fault_rule *rule)
{
	char copy[LINE_MAX_BYTES];
	unsigned faults = 0;
	char *word, *rest = NULL;

	*rule = (struct ox_fault_rule){.nth = 1};
	if (snprintf(copy, sizeof(copy), "%s", line) >= (int)sizeof(copy))
		return -EINVAL;
	copy[strcspn(copy, "#\n")] = '\0';
	word = strtok_r(copy, " \t\r", &rest);
	if (!word)
		return 0;
	if (!parse_op(word, &rule->op))
		return -EINVAL;
	while ((word = strtok_r(NULL, " \t\r", &rest))) {
		if (!parse_word(word, rule, &faults))
			return -EINVAL;
	}
	return faults == 1 ? 1 : -EINVAL;
}
