/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the subcommands share: the order in which qemu-img prints an object's members.
 */
#include "cli/tool.h"
#include "base/base.h"
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* As qemu-img 7.2 printed them. */
static const char *const orders[][16] = {
        {"snapshots", "virtual-size", "filename", "cluster-size", "format", "actual-size",
         "format-specific", "dirty-flag"},
        {"backing-filename-format", "virtual-size", "filename", "cluster-size", "format",
         "actual-size", "format-specific", "full-backing-filename", "backing-filename",
         "dirty-flag"},
        {"virtual-size", "filename", "format", "actual-size", "format-specific", "encrypted",
         "dirty-flag"},
        {"type", "data"},
        {"compat", "compression-type", "lazy-refcounts", "bitmaps", "refcount-bits", "encrypt",
         "corrupt", "extended-l2"},
        {"compat", "refcount-bits", "data-file", "data-file-raw", "corrupt"},
        {"ivgen-alg", "hash-alg", "cipher-alg", "uuid", "format", "cipher-mode", "slots",
         "payload-offset", "master-key-iters"},
        {"active", "iters", "key-offset", "stripes"},
        {"icount", "vm-clock-nsec", "name", "date-sec", "date-nsec", "vm-clock-sec", "id",
         "vm-state-size"},
        {"flags", "name", "granularity"},
        {"image-end-offset", "total-clusters", "corruptions", "check-errors", "leaks",
         "allocated-clusters", "filename", "format", "fragmented-clusters"},
        {"check-errors", "leaks-fixed", "allocated-clusters"},
};

static void test_order(void **state)
{
	for (size_t i = 0; i < OX_ARRAY_SIZE(orders); i++) {
		json_t *object = json_object();
		size_t count = 0, got;
		const char **keys;

		while (count < 16 && orders[i][count])
			count++;
		/* Put in back to front. */
		for (size_t j = count; j > 0; j--)
			assert_int_equal(json_object_set_new(object, orders[i][j - 1], json_null()),
			                 0);
		keys = ox_qemu_order(object, &got);
		assert_int_equal(got, count);
		for (size_t j = 0; j < count; j++)
			assert_string_equal(keys[j], orders[i][j]);
		free(keys);
		json_decref(object);
	}
}

static void test_file_name(void **state)
{
	json_t *name = ox_json_file_name("gr\xc3\xbc\xc3\x9f"
	                                 "e");

	assert_string_equal(json_string_value(name), "gr\xc3\xbc\xc3\x9f"
	                                             "e");
	json_decref(name);
	name = ox_json_file_name("a\xff"
	                         "b");
	assert_string_equal(json_string_value(name), "a\xef\xbf\xbd"
	                                             "b");
	json_decref(name);
}

static void test_options(void **state)
{
	struct ox_tool tool = {0};
	struct ox_error err = {0};

	assert_int_equal(ox_tool_option(&tool, 'f', "raw", &err), 1);
	assert_int_equal(ox_tool_option(&tool, 'U', NULL, &err), 1);
	assert_int_equal(ox_tool_option(&tool, OX_TOOL_OUTPUT, "json", &err), 1);
	assert_int_equal(ox_tool_option(&tool, OX_TOOL_ALLOW_DIR, "/a", &err), 1);
	assert_int_equal(ox_tool_option(&tool, OX_TOOL_ALLOW_DIR, "/b", &err), 1);
	assert_int_equal(ox_tool_option(&tool, 'x', NULL, &err), 0);
	assert_string_equal(tool.format, "raw");
	assert_true(tool.force_share && tool.json);
	assert_string_equal(tool.allow_dirs[0], "/a");
	assert_string_equal(tool.allow_dirs[1], "/b");
	assert_null(tool.allow_dirs[2]);
	assert_int_equal(err.code, 0);
	assert_int_equal(ox_tool_option(&tool, OX_TOOL_OUTPUT, "xml", &err), -EINVAL);
	assert_string_equal(err.text, "--output is human or json, not 'xml'");
	ox_error_clear(&err);
	assert_int_equal(ox_tool_option(&tool, OX_TOOL_ALLOW_DIR, "", &err), -EINVAL);
	ox_error_clear(&err);
	assert_true(ox_tool_option(&tool, OX_TOOL_OBJECT, "secret,id=s,data=x", &err) < 0);
	ox_tool_free(&tool);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_order),
	        cmocka_unit_test(test_file_name),
	        cmocka_unit_test(test_options),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
