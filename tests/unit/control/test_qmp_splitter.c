/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Messages in a stream of bytes: however it is cut, the same messages come out.
 */
#include "base/base.h"
#include "control/qmp_splitter.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* Feeds `text` in pieces of `step` bytes; what was found, as "M<text>|", "G|", "B|". */
static char *split(const char *text, size_t length, size_t step)
{
	struct ox_qmp_splitter splitter = {0};
	char *found = ox_xstrdup("");

	for (size_t at = 0; at < length; at += step) {
		const char *data = text + at;
		size_t left = ox_min(step, length - at);
		enum ox_qmp_split kind;

		while ((kind = ox_qmp_splitter_feed(&splitter, &data, &left)) != OX_QMP_MORE) {
			char *longer;

			if (kind == OX_QMP_MESSAGE)
				longer = ox_xasprintf("%sM%.*s|", found, (int)splitter.length,
				                      splitter.text);
			else
				longer = ox_xasprintf("%s%s|", found,
				                      kind == OX_QMP_GARBAGE ? "G" : "B");
			free(found);
			found = longer;
		}
		assert_int_equal(left, 0);
	}
	ox_qmp_splitter_free(&splitter);
	return found;
}

static void check(const char *text, const char *expected)
{
	static const size_t steps[] = {1, 2, 3, 7, 4096};

	for (unsigned i = 0; i < OX_ARRAY_SIZE(steps); i++) {
		char *found = split(text, strlen(text), steps[i]);

		assert_string_equal(found, expected);
		free(found);
	}
}

static void test_messages(void **state)
{
	check("", "");
	check(" \r\n\t ", "");
	check("{\"execute\":\"x\"}", "M{\"execute\":\"x\"}|");
	check("{}{}\n[1,[2]] {\"a\":{}}", "M{}|M{}|M[1,[2]]|M{\"a\":{}}|");
	check("{\"unfinished\": [", "");
}

static void test_strings(void **state)
{
	check("{\"a\":\"}\"}{}", "M{\"a\":\"}\"}|M{}|");
	check("{\"a\":\"\\\"}{\"}{}", "M{\"a\":\"\\\"}{\"}|M{}|");
	check("{\"a\":\"\\\\\"}{}", "M{\"a\":\"\\\\\"}|M{}|");
	check("{\"a\":\"\xc3\xa4\"}", "M{\"a\":\"\xc3\xa4\"}|");
}

static void test_garbage(void **state)
{
	check("hello world\n{}", "G|M{}|");
	check("}}}\n\n{}", "G|M{}|");
	check("GET / HTTP/1.0\r\n\r\n{}", "G|M{}|");
	/* A line's end inside a string cannot be JSON. */
	check("{\"execute\": \"que\n{}", "G|M{}|");
}

static void test_begin_anew(void **state)
{
	check("\xff{}", "M{}|");
	check("{\"a\": [\xff{}", "G|M{}|");
	check("{\"a\": \"\xff{}", "G|M{}|");
	check("noise\xff{}", "G|M{}|");
}

static void test_too_deep(void **state)
{
	char text[2 * (OX_QMP_MAX_DEPTH + 1) + 3];
	size_t length = 0;
	char *found;

	for (unsigned i = 0; i <= OX_QMP_MAX_DEPTH; i++)
		text[length++] = '[';
	for (unsigned i = 0; i <= OX_QMP_MAX_DEPTH; i++)
		text[length++] = ']';
	text[length++] = '{';
	text[length++] = '}';
	found = split(text, length, 5);
	assert_string_equal(found, "B|M{}|");
	free(found);
}

/* Without the zero at the end. */
static void put(char *to, const char *text)
{
	while (*text)
		*to++ = *text++;
}

static void test_too_long(void **state)
{
	size_t length = 2 * OX_QMP_MAX_MESSAGE;
	char *text = malloc(length + 3);
	char *found;

	assert_non_null(text);
	memset(text, 'x', length);
	put(text, "{\"");
	put(text + length - 2, "\"}");
	put(text + length, "{}");
	found = split(text, length + 2, 4096);
	assert_string_equal(found, "B|M{}|");
	free(found);

	/* Exactly the limit is allowed, a byte more is not. */
	memset(text + 2, 'x', OX_QMP_MAX_MESSAGE);
	put(text + OX_QMP_MAX_MESSAGE - 2, "\"}");
	found = split(text, OX_QMP_MAX_MESSAGE, 4096);
	assert_int_equal(found[0], 'M');
	free(found);
	put(text + OX_QMP_MAX_MESSAGE - 2, "x\"}");
	found = split(text, OX_QMP_MAX_MESSAGE + 1, 4096);
	assert_string_equal(found, "B|");
	free(found);
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_messages), cmocka_unit_test(test_strings),
	        cmocka_unit_test(test_garbage),  cmocka_unit_test(test_begin_anew),
	        cmocka_unit_test(test_too_deep), cmocka_unit_test(test_too_long),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
