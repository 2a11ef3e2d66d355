/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The settings of `oxbow serve` from a file: what is understood, and what each mistake is told.
 */
#include "base/base.h"
#include "cli/options.h"
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static char file[64];
static struct ox_serve_config config;
static struct ox_error err;

static int setup(void **state)
{
	int fd;

	snprintf(file, sizeof(file), "/tmp/oxbow-test.XXXXXX");
	fd = mkstemp(file);
	if (fd < 0)
		return -1;
	close(fd);
	ox_serve_config_init(&config);
	memset(&err, 0, sizeof(err));
	return 0;
}

static int teardown(void **state)
{
	ox_serve_config_free(&config);
	return unlink(file);
}

/* Reads and checks a file of this content. */
static int load(const char *content, size_t length)
{
	FILE *f = fopen(file, "w");
	int ret;

	assert_non_null(f);
	assert_int_equal(fwrite(content, 1, length, f), length);
	assert_int_equal(fclose(f), 0);
	ox_serve_config_free(&config);
	ox_serve_config_init(&config);
	memset(&err, 0, sizeof(err));
	ret = ox_serve_config_read(&config, file, 0, &err);
	if (ret == 0)
		ret = ox_serve_config_check(&config, &err);
	return ret;
}

/* The content is refused, and the message is FILE followed by `message`. */
static void refuse(const char *content, const char *message)
{
	char expected[512];

	assert_true(load(content, strlen(content)) < 0);
	snprintf(expected, sizeof(expected), "%s%s", file, message);
	assert_string_equal(err.text, expected);
}

static void accept(const char *content)
{
	if (load(content, strlen(content)) < 0)
		fail_msg("refused: %s", err.text);
}

#define DISK "[web01]\nimage = /a.raw\nvhost-user-blk = /run/a.sock\n"

static void test_two_disks(void **state)
{
	accept("\xef\xbb\xbf# comment\n"
	       "[global]\n"
	       "iothreads = 2\n"
	       "poll-max-us=0\n"
	       "control: /run/c.sock\n"
	       "\n"
	       "[web01]\n"
	       "image = /srv/web 01.raw ; a comment\n"
	       "format = raw\r\n"
	       "vhost-user-blk = /run/web01.sock\n"
	       "cache = directsync\n"
	       "aio = threads\n"
	       "queues = 4\n"
	       "serial = S 1\n"
	       "logical-block-size = 4k\n"
	       "physical-block-size = auto\n"
	       "discard = ignore\n"
	       "detect-zeroes = on\n"
	       "rerror = stop\n"
	       "werror = report\n"
	       "share-rw = yes\n"
	       "; another\n"
	       "  [db]\n"
	       "image = b.raw\n"
	       "vhost-user-blk = b.sock\n"
	       "read-only = On\n"
	       "force-share = 1");
	assert_int_equal(config.iothreads, 2);
	assert_int_equal(config.poll_max_ns, 0);
	assert_string_equal(config.control, "/run/c.sock");
	assert_int_equal(config.count, 2);
	assert_string_equal(config.disks[0].disk.name, "web01");
	assert_string_equal(config.disks[0].disk.path, "/srv/web 01.raw");
	assert_string_equal(config.disks[0].disk.format, "raw");
	assert_string_equal(config.disks[0].socket_path, "/run/web01.sock");
	assert_int_equal(config.disks[0].disk.cache, OX_CACHE_DIRECTSYNC);
	assert_int_equal(config.disks[0].disk.aio, OX_AIO_THREADS);
	assert_int_equal(config.disks[0].queues, 4);
	assert_string_equal(config.disks[0].disk.serial, "S 1");
	assert_int_equal(config.disks[0].disk.logical_block_size, 4096);
	assert_int_equal(config.disks[0].disk.physical_block_size, 0);
	assert_int_equal(config.disks[0].disk.discard, OX_DISCARD_IGNORE);
	assert_int_equal(config.disks[0].disk.detect_zeroes, OX_DETECT_ZEROES_ON);
	assert_int_equal(config.disks[0].disk.rerror, OX_ON_ERROR_STOP);
	assert_int_equal(config.disks[0].disk.werror, OX_ON_ERROR_REPORT);
	assert_true(config.disks[0].disk.share_rw);
	assert_false(config.disks[0].disk.read_only);
	assert_string_equal(config.disks[1].disk.name, "db");
	assert_true(config.disks[1].disk.read_only);
	assert_true(config.disks[1].disk.no_lock);
	assert_null(config.disks[1].disk.format);
	assert_int_equal(config.disks[1].disk.rerror, OX_ON_ERROR_REPORT);
	assert_int_equal(config.disks[1].disk.werror, OX_ON_ERROR_ENOSPC);
}

static void test_long_line(void **state)
{
	char content[1200] = "[a]\nvhost-user-blk = /s\nimage = ";
	size_t at = strlen(content);

	memset(content + at, 'x', 1000);
	snprintf(content + at + 1000, 60, "end \t ; and a comment\ncache=unsafe\n");
	accept(content);
	assert_int_equal(strlen(config.disks[0].disk.path), 1003);
	assert_string_equal(config.disks[0].disk.path + 1000, "end");
	assert_int_equal(config.disks[0].disk.cache, OX_CACHE_UNSAFE);
}

static void test_unknown_words(void **state)
{
	refuse(DISK "cahce = none\n",
	       ":4: [web01] cahce: there is no such key; did you mean 'cache'?");
	refuse(DISK "cache = writback\n",
	       ":4: [web01] cache: there is no cache mode 'writback'; did you mean 'writeback'?");
	refuse(DISK "\n\naio = io_urign\n",
	       ":6: [web01] aio: there is no I/O engine 'io_urign'; did you mean 'io_uring'?");
	refuse(DISK "werror = zzzzzzzz\n",
	       ":4: [web01] werror: there is no error policy 'zzzzzzzz'; choose one of report, "
	       "ignore, stop, enospc");
	refuse(DISK "format = rwa\n",
	       ":4: [web01] format: there is no image format 'rwa'; did you mean 'raw'?");
	refuse(DISK "format = vmdk\n",
	       ":4: [web01] format: format vmdk is known and not supported by this version");
	refuse(DISK "qqqqqqqqqqqqqqq = 1\n",
	       ":4: [web01] qqqqqqqqqqqqqqq: there is no such key; 'oxbow serve --help' lists "
	       "them");
}

static void test_bad_values(void **state)
{
	refuse(DISK "read-only = maybe\n", ":4: [web01] read-only: 'maybe' is neither yes nor no");
	refuse(DISK "queues = 0\n",
	       ":4: [web01] queues: '0' is neither auto nor a number from 1 to 64");
	refuse(DISK "queues = 65\n",
	       ":4: [web01] queues: '65' is neither auto nor a number from 1 to 64");
	refuse(DISK "logical-block-size = 513\n",
	       ":4: [web01] logical-block-size: '513' is neither auto nor a power of two from 512 "
	       "to 32768");
	refuse(DISK "serial = 123456789012345678901\n",
	       ":4: [web01] serial: a serial number has 1 to 20 characters, "
	       "'123456789012345678901' 21");
	refuse(DISK "cache =\n",
	       ":4: [web01] cache: there is no cache mode ''; choose one of none, "
	       "writeback, writethrough, directsync, unsafe");
	refuse("[global]\niothreads = many\n" DISK,
	       ":2: [global] iothreads: 'many' is not a number from 1 to 64");
	refuse("[global]\ncontrol =\n" DISK, ":2: [global] control: the value is empty");
}

static void test_chain(void **state)
{
	char secret[] = "/tmp/oxbow-test-secret.XXXXXX", text[300];
	const uint8_t *bytes;
	size_t count;
	int fd = mkstemp(secret);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, "phrase", 6), 6);
	close(fd);
	snprintf(text, sizeof(text),
	         "[global]\nobject = secret,id=a,file=%s\nobject = secret,id=b,file=%s\n" DISK
	         "allow-dir = /tmp\nallow-dir = /usr\n   /etc\nmetadata-cache = 1M\n"
	         "discard-no-unref = on\nkey-secret = b\n",
	         secret, secret);
	accept(text);
	assert_string_equal(config.disks[0].disk.allow_dirs[0], "/tmp");
	assert_string_equal(config.disks[0].disk.allow_dirs[1], "/usr");
	assert_string_equal(config.disks[0].disk.allow_dirs[2], "/etc");
	assert_null(config.disks[0].disk.allow_dirs[3]);
	assert_int_equal(config.disks[0].disk.metadata_cache, 1 << 20);
	assert_true(config.disks[0].disk.discard_no_unref);
	assert_string_equal(config.disks[0].disk.key_secret, "b");
	assert_int_equal(ox_secrets_find(config.disks[0].disk.secrets, "b", &bytes, &count, &err),
	                 0);
	assert_int_equal(count, 6);
	assert_memory_equal(bytes, "phrase", 6);
	assert_int_equal(unlink(secret), 0);
	accept(DISK);
	assert_null(config.disks[0].disk.allow_dirs);
	assert_int_equal(config.disks[0].disk.metadata_cache, 0);
	refuse(DISK "allow-dir = /nowhere\n",
	       ":4: [web01] allow-dir: /nowhere: No such file or directory");
	refuse(DISK "allow-dir = /etc/passwd\n",
	       ":4: [web01] allow-dir: /etc/passwd is not a directory");
	refuse(DISK "metadata-cache = 1k\n",
	       ":4: [web01] metadata-cache: '1k' is not a size from 64k to 1T");
	refuse(DISK "discard-no-unref = maybe\n",
	       ":4: [web01] discard-no-unref: 'maybe' is neither yes nor no");
	refuse(DISK "key-secret = x\n",
	       ":1: [web01] key-secret: there is no secret 'x'; give it with --object "
	       "secret,id=x,file=PATH");
	refuse(DISK "object = secret,id=a,file=/x\n",
	       ":4: [web01] object: this belongs into [global]");
}

static void test_places(void **state)
{
	refuse("cache = none\n" DISK,
	       ":1: cache: this stands before the first section, e.g. [global]");
	refuse("[global]\ncache = none\n" DISK,
	       ":2: [global] cache: this belongs into the section of a disk");
	refuse(DISK "iothreads = 2\n", ":4: [web01] iothreads: this belongs into [global]");
	refuse(DISK "socket-path = /x\n",
	       ":4: [web01] socket-path: there is no such key; 'oxbow serve --help' lists them");
	refuse(DISK "image = /b.raw\n", ":4: [web01] image: this is given twice (an indented line "
	                                "continues the one above it)");
	refuse(DISK "   more\n",
	       ":4: [web01] vhost-user-blk: this is given twice (an indented line "
	       "continues the one above it)");
	refuse(DISK "[web01]\n", ":4: [web01] there is a section of this name already");
	refuse("", ": there is no disk: a section for each is needed, e.g. [web01] with image and "
	           "vhost-user-blk");
	refuse("[global]\n", ": there is no disk: a section for each is needed, e.g. [web01] with "
	                     "image and vhost-user-blk");
}

static void test_syntax(void **state)
{
	static const char zero[] = DISK "cache\0 = none\n";

	refuse(DISK "what is this\n", ":4: [web01] this line is neither [section] nor key = value");
	refuse(DISK "what is this", ":4: [web01] this line is neither [section] nor key = value");
	refuse("[web01\n", ":1: ']' is missing at the end of the section's name");
	refuse("[]\n", ":1: a section's name has 1 to 49 characters");
	refuse("[12345678901234567890123456789012345678901234567890]\n",
	       ":1: a section's name has 1 to 49 characters");
	refuse(DISK "12345678901234567890123456789012345678901234567890 = 1\n",
	       ":4: [web01] a key has at most 49 characters");
	refuse(DISK "= 1\n", ":4: [web01] there is no key in front of '='");
	assert_true(load(zero, sizeof(zero) - 1) < 0);
	assert_non_null(strstr(err.text, ":4: there is a zero byte in this line"));
}

static void test_incomplete(void **state)
{
	refuse("\n[web01]\nvhost-user-blk = /a\n", ":2: [web01] image is missing");
	refuse("[web01]\nimage = /a\n", ":1: [web01] vhost-user-blk (a socket's path) is missing");
	refuse(DISK "force-share = yes\n",
	       ":1: [web01] force-share does without locks, which only read-only disks may");
	refuse(DISK "share-rw = yes\nread-only = yes\n",
	       ":1: [web01] share-rw and read-only exclude each other");
	refuse(DISK "logical-block-size = 4096\nphysical-block-size = 512\n",
	       ":1: [web01] physical-block-size 512 is smaller than logical-block-size 4096");
	refuse(DISK "detect-zeroes = unmap\ndiscard = ignore\n",
	       ":1: [web01] detect-zeroes=unmap needs discard=unmap");
	accept(DISK "detect-zeroes = unmap\n");
}

static void test_same_socket(void **state)
{
	refuse("[a]\nimage = /a\nvhost-user-blk = /tmp/s\n"
	       "[b]\nimage = /b\nvhost-user-blk = /tmp/../tmp/s\n",
	       ":4: [b] vhost-user-blk: /tmp/../tmp/s is the socket of disk 'a' too");
	refuse("[global]\ncontrol = /tmp/s\n[b]\nimage = /b\nvhost-user-blk = /tmp/s\n",
	       ":3: [b] vhost-user-blk: /tmp/s is the control socket too");
	accept("[a]\nimage = /a\nvhost-user-blk = /tmp/s\n"
	       "[b]\nimage = /b\nvhost-user-blk = /usr/s\n");
}

static void test_no_file(void **state)
{
	assert_true(ox_serve_config_read(&config, "/nowhere/x.ini", 0, &err) < 0);
	assert_string_equal(err.text,
	                    "/nowhere/x.ini: cannot read the configuration: No such file or "
	                    "directory");
	memset(&err, 0, sizeof(err));
	assert_true(ox_serve_config_read(&config, "/tmp", 0, &err) < 0);
	assert_non_null(strstr(err.text, "Is a directory"));
}

static void test_skip(void **state)
{
	FILE *f = fopen(file, "w");
	uint64_t skip = 0;

	assert_non_null(f);
	fputs("[global]\niothreads = 8\npoll-max-us = 7\n" DISK, f);
	assert_int_equal(fclose(f), 0);
	for (unsigned i = 0; i < ox_serve_key_count; i++) {
		if (!strcmp(ox_serve_keys[i].name, "iothreads"))
			skip = 1ull << i;
	}
	config.iothreads = 3;
	assert_int_equal(ox_serve_config_read(&config, file, skip, &err), 0);
	assert_int_equal(config.iothreads, 3);
	assert_int_equal(config.poll_max_ns, 7000);
}

#define TEST(name) cmocka_unit_test_setup_teardown(test_##name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
	        TEST(two_disks), TEST(long_line), TEST(unknown_words), TEST(bad_values),
	        TEST(places),    TEST(syntax),    TEST(incomplete),    TEST(same_socket),
	        TEST(chain),     TEST(no_file),   TEST(skip),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
