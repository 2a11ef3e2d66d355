/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The wrappers' checks, names, and the null, memory and faulty stores.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "co.h"
#include "store/faulty.h"
#include "store/memory.h"
#include "targets.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

static void expect_no_open(const char *name, const char *text)
{
	struct ox_store_options options = {.aio = OX_AIO_SYNC};
	struct ox_error err = {0};
	struct ox_store *store;

	assert_true(ox_store_open(name, &options, &store, &err) < 0);
	assert_null(store);
	if (!strstr(err.text, text))
		fail_msg("'%s' does not say '%s'", err.text, text);
}

static void test_names(void **state)
{
	struct ox_store_options options = {.aio = OX_AIO_SYNC};
	struct ox_store *store;
	char path[300], relative[310];
	FILE *file;

	expect_no_open("nosuch:thing", "./nosuch:thing");
	expect_no_open("null:much", "not a size");
	expect_no_open("memory::4k", "memory:NAME:SIZE");
	expect_no_open("memory:x", "memory:SIZE");
	expect_no_open("faulty:x", "faulty:RULEFILE:NAME");
	expect_no_open("/nonexistent/a:b", "No such file");
	expect_no_open("file:/nonexistent", "No such file");
	expect_no_open(targets_dir(), "s a directory");
	expect_no_open("/dev/null", "neither a regular file nor a block device");

	/* A colon in a file's name. */
	snprintf(path, sizeof(path), "%s/a:b", targets_dir());
	file = fopen(path, "w");
	assert_non_null(file);
	fclose(file);
	assert_int_equal(ox_store_open(path, &options, &store, NULL), 0);
	assert_string_equal(store->path, path);
	ox_store_close(store);
	snprintf(relative, sizeof(relative), "file:%s", path);
	assert_int_equal(ox_store_open(relative, &options, &store, NULL), 0);
	ox_store_close(store);
	remove(path);
}

static void test_checks(void **state)
{
	struct ox_store_options options = {.read_only = true};
	uint8_t buf[64] = {0};
	struct iovec iov = {buf, sizeof(buf)};
	struct ox_io io = {.op = OX_IO_READ, .length = 65, .iov = &iov, .iovcnt = 1};
	struct user u;

	user_open(&u, "memory:1k", NULL);
	assert_int_equal(user_io(&u, &io), -EINVAL);
	assert_int_equal(user_read(&u, 1024 - 64, buf, 64), 0);
	assert_int_equal(user_read(&u, 1024 - 63, buf, 64), -EIO);
	assert_int_equal(user_read(&u, UINT64_MAX - 10, buf, 64), -EIO);
	assert_int_equal(user_write(&u, 1024, buf, 1, 0), -EIO);
	assert_int_equal(user_write(&u, 1024, buf, 0, 0), 0);
	assert_int_equal(user_write(&u, 0, buf, 1, OX_IO_MAY_UNMAP), -EINVAL);
	assert_int_equal(user_op(&u, OX_IO_ZERO, 0, UINT64_MAX, 0), -EIO);
	assert_int_equal(user_op(&u, (enum ox_io_op)9, 0, 0, 0), -EINVAL);
	assert_int_equal(user_op(&u, OX_IO_SECURE_ERASE, 0, 512, 0), -ENOTSUP);
	assert_int_equal(u.channel->in_flight, 0);
	user_close(&u);

	user_open(&u, "memory:1k", &options);
	assert_int_equal(user_write(&u, 0, buf, 1, 0), -EROFS);
	assert_int_equal(user_op(&u, OX_IO_ZERO, 0, 1, 0), -EROFS);
	assert_int_equal(user_op(&u, OX_IO_DISCARD, 0, 1, 0), -EROFS);
	assert_int_equal(user_read(&u, 0, buf, 1), 0);
	assert_int_equal(user_flush(&u), 0);
	assert_int_equal(ox_store_truncate(u.store, 5, OX_PREALLOC_OFF, NULL, NULL, NULL), -EROFS);
	assert_int_equal(ox_store_lock(u.store, OX_LOCK_WRITE, NULL), -EROFS);
	user_close(&u);
}

static unsigned left;

static void count_down(struct ox_io *io)
{
	left--;
}

static void test_null(void **state)
{
	uint8_t buf[512], before[512];
	struct iovec iov = {buf, sizeof(buf)};
	struct ox_io io = {
	        .op = OX_IO_READ, .length = 512, .iov = &iov, .iovcnt = 1, .done = count_down};
	struct user u;

	left = 1;
	memset(buf, 7, sizeof(buf));
	memcpy(before, buf, sizeof(buf));
	user_open(&u, "null:1.5M", NULL);
	assert_int_equal(u.store->size, 3 << 19);
	/* At once, on the way down. */
	ox_store_submit(u.channel, &io);
	assert_int_equal(left, 0);
	assert_int_equal(io.result, 0);
	assert_memory_equal(buf, before, sizeof(buf));
	assert_int_equal(user_write(&u, 0, buf, 512, OX_IO_DSYNC), 0);
	assert_int_equal(user_op(&u, OX_IO_ZERO, 0, 512, OX_IO_MAY_UNMAP), 0);
	assert_int_equal(user_flush(&u), 0);
	assert_int_equal(ox_store_pread(u.store, 0, buf, 512), 0);
	assert_int_equal(buf[3], 0);
	user_close(&u);
}

static void expect_status(struct ox_store *store, uint64_t offset, uint64_t length,
                          enum ox_block_status status)
{
	enum ox_block_status now;
	uint64_t got = store->size - offset;

	assert_int_equal(ox_store_status(store, offset, &got, &now), 0);
	assert_int_equal(now, status);
	assert_int_equal(got, length);
}

static void test_memory(void **state)
{
	uint8_t buf[100], zero[100] = {0}, data[100];
	struct user u, v;

	memset(data, 0x42, sizeof(data));
	user_open(&u, "memory:shared:1M", NULL);
	user_open(&v, "memory:shared:1M", NULL);
	expect_status(u.store, 0, 1 << 20, OX_STATUS_ZERO);
	assert_int_equal(user_write(&u, 200000, data, 100, 0), 0);
	assert_int_equal(user_read(&v, 200000, buf, 100), 0);
	assert_memory_equal(buf, data, 100);
	expect_status(u.store, 0, 3 << 16, OX_STATUS_ZERO);
	expect_status(u.store, 200000, (4 << 16) - 200000, OX_STATUS_DATA);
	assert_int_equal(user_op(&u, OX_IO_ZERO, 200050, 10, 0), 0);
	assert_int_equal(user_read(&v, 200045, buf, 10), 0);
	assert_memory_equal(buf, "\x42\x42\x42\x42\x42\0\0\0\0\0", 10);
	assert_int_equal(user_op(&u, OX_IO_DISCARD, 0, 1 << 20, 0), 0);
	assert_int_equal(user_read(&v, 200000, buf, 100), 0);
	assert_memory_equal(buf, zero, 100);
	expect_status(u.store, 0, 1 << 20, OX_STATUS_ZERO);

	/* Its size, for everybody; what comes back is zero. */
	assert_int_equal(user_write(&u, (1 << 20) - 100, data, 100, 0), 0);
	assert_int_equal(
	        ox_store_truncate(u.store, (1 << 20) - 50, OX_PREALLOC_OFF, NULL, NULL, NULL), 0);
	assert_int_equal(ox_store_truncate(u.store, 2 << 20, OX_PREALLOC_OFF, NULL, NULL, NULL), 0);
	assert_int_equal(ox_store_refresh_size(v.store, NULL), 0);
	assert_int_equal(user_read(&v, (1 << 20) - 100, buf, 100), 0);
	assert_memory_equal(buf, data, 50);
	assert_memory_equal(buf + 50, zero, 50);
	user_close(&u);
	user_close(&v);

	/* The content stays until it is forgotten. */
	user_open(&u, "memory:shared:1M", NULL);
	assert_int_equal(u.store->size, 2 << 20);
	user_close(&u);
	ox_memory_forget("shared");
	ox_memory_forget("shared");
	user_open(&u, "memory:shared:1M", NULL);
	assert_int_equal(u.store->size, 1 << 20);
	user_close(&u);
	ox_memory_forget("shared");
}

static void test_rule_lines(void **state)
{
	static const char *const bad[] = {
	        "write",
	        "write error=EWHAT",
	        "scribble error=EIO",
	        "write error=EIO never",
	        "write nth=0 never",
	        "write range=5 never",
	        "write range=5+0 never",
	        "read what=3",
	        "flush always",
	};
	struct ox_fault_rule rule;

	assert_int_equal(ox_faulty_parse_rule("", &rule), 0);
	assert_int_equal(ox_faulty_parse_rule("  # nothing\n", &rule), 0);
	assert_int_equal(
	        ox_faulty_parse_rule("write nth=3 range=4k+512 always error=ENOSPC # so\n", &rule),
	        1);
	assert_int_equal(rule.op, OX_IO_WRITE);
	assert_int_equal(rule.nth, 3);
	assert_int_equal(rule.offset, 4096);
	assert_int_equal(rule.length, 512);
	assert_true(rule.always);
	assert_int_equal(rule.kind, OX_FAULT_ERROR);
	assert_int_equal(rule.error, ENOSPC);
	assert_int_equal(ox_faulty_parse_rule("any delay=20", &rule), 1);
	assert_int_equal(rule.op, OX_FAULT_ANY_OP);
	assert_int_equal(rule.delay_ns, 20000000);
	assert_int_equal(ox_faulty_parse_rule("read short=1k", &rule), 1);
	assert_int_equal(rule.bytes, 1024);
	for (size_t i = 0; i < OX_ARRAY_SIZE(bad); i++) {
		if (ox_faulty_parse_rule(bad[i], &rule) != -EINVAL)
			fail_msg("'%s' was taken for a rule", bad[i]);
	}
}

static void write_rules(const char *path, const char *text)
{
	char tmp[400];
	FILE *file;

	snprintf(tmp, sizeof(tmp), "%s.new", path);
	file = fopen(tmp, "w");
	assert_non_null(file);
	fputs(text, file);
	fclose(file);
	assert_int_equal(rename(tmp, path), 0);
}

static void test_faults(void **state)
{
	uint8_t data[1024], buf[1024];
	char rules[300], name[400];
	struct user u;

	memset(data, 9, sizeof(data));
	snprintf(rules, sizeof(rules), "%s/rules", targets_dir());
	write_rules(rules, "write nth=2 error=ENOSPC\nflush always error=EIO\n"
	                   "read range=64k+1 error=EIO always\n");
	snprintf(name, sizeof(name), "faulty:%s:memory:1M", rules);
	user_open(&u, name, NULL);
	assert_int_equal(user_write(&u, 0, data, 512, 0), 0);
	assert_int_equal(user_write(&u, 512, data, 512, 0), -ENOSPC);
	assert_int_equal(user_write(&u, 512, data, 512, 0), 0);
	assert_int_equal(user_flush(&u), -EIO);
	assert_int_equal(user_flush(&u), -EIO);
	assert_int_equal(user_read(&u, 65536 - 512, buf, 512), 0);
	assert_int_equal(user_read(&u, 65536 - 512, buf, 513), -EIO);
	assert_int_equal(ox_faulty_count(u.store), 4);

	/* Other rules, read while it is open: part of a write. */
	write_rules(rules, "write short=100\nread delay=1\n");
	assert_int_equal(user_flush(&u), 0);
	assert_int_equal(user_write(&u, 4096, data, 1024, 0), -EIO);
	assert_int_equal(user_read(&u, 4096, buf, 1024), 0);
	assert_memory_equal(buf, data, 100);
	assert_int_equal(buf[100], 0);

	/* A bad line leaves the rules as they are. */
	write_rules(rules, "flush always error=EIO\n");
	assert_int_equal(user_flush(&u), -EIO);
	write_rules(rules, "nonsense, longer than before\n");
	assert_int_equal(user_flush(&u), -EIO);
	user_close(&u);
	expect_no_open(name, "rules:1: not a rule");
	remove(rules);
	expect_no_open(name, "No such file");
}

static void released(struct ox_io *io)
{
	*(bool *)io->iov[1].iov_base = true;
}

static void test_never(void **state)
{
	struct ox_fault_rule rule = {.op = OX_IO_WRITE, .kind = OX_FAULT_NEVER};
	uint8_t data[512] = {1}, buf[512];
	bool done = false;
	struct iovec iov[2] = {{data, 512}, {&done, 0}};
	struct ox_io io = {
	        .op = OX_IO_WRITE, .length = 512, .iov = iov, .iovcnt = 2, .done = released};
	struct user u;

	user_open(&u, "faulty::memory:1M", NULL);
	ox_faulty_add_rule(u.store, &rule);
	ox_store_submit(u.channel, &io);
	assert_int_equal(user_flush(&u), 0);
	assert_false(done);
	assert_int_equal(user_read(&u, 0, buf, 512), 0);
	assert_int_equal(buf[0], 0);
	ox_faulty_clear_rules(u.store);
	ox_loop_run_until(u.loop, &done);
	assert_int_equal(io.result, 0);
	assert_int_equal(user_read(&u, 0, buf, 512), 0);
	assert_int_equal(buf[0], 1);
	user_close(&u);
}

static void test_log(void **state)
{
	uint8_t data[512];
	struct ox_faulty_log log;
	struct user u;

	memset(data, 5, sizeof(data));
	user_open(&u, "faulty::memory:1M", NULL);
	assert_int_equal(user_write(&u, 0, data, 512, 0), 0);
	ox_faulty_record(u.store, true);
	assert_int_equal(user_write(&u, 512, data, 512, OX_IO_DSYNC), 0);
	assert_int_equal(user_read(&u, 512, data, 512), 0);
	assert_int_equal(user_flush(&u), 0);
	assert_int_equal(user_op(&u, OX_IO_ZERO, 4096, 8192, 0), 0);
	assert_int_equal(ox_store_truncate(u.store, 4 << 20, OX_PREALLOC_OFF, NULL, NULL, NULL), 0);
	ox_faulty_take_log(u.store, &log);
	assert_int_equal(log.count, 4);
	assert_int_equal(log.records[0].op, OX_IO_WRITE);
	assert_int_equal(log.records[0].flags, OX_IO_DSYNC);
	assert_int_equal(log.records[0].offset, 512);
	assert_memory_equal(log.records[0].data, data, 512);
	assert_int_equal(log.records[1].op, OX_IO_FLUSH);
	assert_true(log.records[0].completed < log.records[1].submitted);
	assert_int_equal(log.records[2].op, OX_IO_ZERO);
	assert_int_equal(log.records[2].length, 8192);
	assert_true(log.records[3].truncate);
	assert_int_equal(log.records[3].length, 4 << 20);
	assert_true(log.records[3].completed > log.records[3].submitted);
	ox_faulty_free_log(&log);
	assert_int_equal(user_flush(&u), 0);
	ox_faulty_take_log(u.store, &log);
	assert_int_equal(log.count, 1);
	assert_true(log.records[0].completed > 0);
	ox_faulty_free_log(&log);
	user_close(&u);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_names),      cmocka_unit_test(test_checks),
	        cmocka_unit_test(test_null),       cmocka_unit_test(test_memory),
	        cmocka_unit_test(test_rule_lines), cmocka_unit_test(test_faults),
	        cmocka_unit_test(test_never),      cmocka_unit_test(test_log),
	};
	int failed;

	targets_begin();
	failed = cmocka_run_group_tests_name("stores", tests, NULL, NULL);
	targets_end();
	return failed;
}
