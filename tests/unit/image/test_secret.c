/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Secrets: what --object says, and where they come from.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "image/secret.h"

static char dir[] = "/tmp/ox-secret-XXXXXX";
static char path[64];

static int make_dir(void **state)
{
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/sec,ret", dir);
	return 0;
}

static int remove_dir(void **state)
{
	unlink(path);
	return rmdir(dir);
}

static void write_file(const char *bytes, size_t count)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, bytes, count), count);
	close(fd);
}

static void add(struct ox_secrets *secrets, const char *text)
{
	struct ox_error err = {0};

	if (ox_secrets_add(secrets, text, &err) < 0)
		fail_msg("%s: %s", text, err.text);
}

static void expect(const struct ox_secrets *secrets, const char *id, const char *bytes,
                   size_t count)
{
	const uint8_t *found;
	size_t length;

	assert_int_equal(ox_secrets_find(secrets, id, &found, &length, NULL), 0);
	assert_int_equal(length, count);
	assert_memory_equal(found, bytes, count);
}

static void refuse(struct ox_secrets *secrets, const char *text, int error, const char *says)
{
	struct ox_error err = {0};

	assert_int_equal(ox_secrets_add(secrets, text, &err), -error);
	if (!strstr(err.text, says))
		fail_msg("'%s': '%s' does not say '%s'", text, err.text, says);
}

static void test_file(void **state)
{
	struct ox_secrets *secrets = ox_secrets_new();
	char text[256];

	/* All bytes count, the newline too. */
	write_file("top secret\n", 11);
	snprintf(text, sizeof(text), "secret,id=sec0,file=%s/sec,,ret", dir);
	add(secrets, text);
	write_file("a\0b", 3);
	snprintf(text, sizeof(text), "qom-type=secret,file=%s/sec,,ret,format=raw,id=s-1._x", dir);
	add(secrets, text);
	write_file("", 0);
	snprintf(text, sizeof(text), "secret,id=empty,file=%s/sec,,ret", dir);
	add(secrets, text);
	/* Read when it was added. */
	unlink(path);
	expect(secrets, "sec0", "top secret\n", 11);
	expect(secrets, "s-1._x", "a\0b", 3);
	expect(secrets, "empty", "", 0);
	refuse(secrets, "secret,id=other,file=/nowhere/at/all", ENOENT, "/nowhere/at/all");
	snprintf(text, sizeof(text), "secret,id=other,file=%s", dir);
	refuse(secrets, text, EISDIR, dir);
	ox_secrets_free(secrets);
	ox_secrets_free(NULL);
}

static void test_base64(void **state)
{
	struct ox_secrets *secrets = ox_secrets_new();
	char text[256];

	snprintf(text, sizeof(text), "secret,id=b,file=%s/sec,,ret,format=base64", dir);
	write_file("aGVsbG8gd29ybGQ=\n", 17);
	add(secrets, text);
	expect(secrets, "b", "hello world", 11);
	write_file("this is not it!", 15);
	text[10] = 'c';
	refuse(secrets, text, EINVAL, "not base64");
	write_file("", 0);
	add(secrets, text);
	expect(secrets, "c", "", 0);
	ox_secrets_free(secrets);
}

static void test_limit(void **state)
{
	struct ox_secrets *secrets = ox_secrets_new();
	char *big = calloc(1, 65537);
	char text[256];

	assert_non_null(big);
	memset(big, 'x', 65537);
	snprintf(text, sizeof(text), "secret,id=big,file=%s/sec,,ret", dir);
	write_file(big, 65537);
	refuse(secrets, text, EFBIG, "65536");
	write_file(big, 65536);
	add(secrets, text);
	expect(secrets, "big", big, 65536);
	free(big);
	ox_secrets_free(secrets);
}

static void test_fd(void **state)
{
	struct ox_secrets *secrets = ox_secrets_new();
	char text[64];
	int pipes[2];

	assert_int_equal(pipe(pipes), 0);
	assert_int_equal(write(pipes[1], "from ", 5), 5);
	assert_int_equal(write(pipes[1], "a pipe", 6), 6);
	close(pipes[1]);
	snprintf(text, sizeof(text), "secret,id=p,fd=%d", pipes[0]);
	add(secrets, text);
	expect(secrets, "p", "from a pipe", 11);
	/* It is not left open. */
	assert_int_equal(fcntl(pipes[0], F_GETFD), -1);
	refuse(secrets, "secret,id=q,fd=99999", EBADF, "descriptor 99999");
	refuse(secrets, "secret,id=q,fd=-1", EINVAL, "'-1'");
	refuse(secrets, "secret,id=q,fd=three", EINVAL, "'three'");
	ox_secrets_free(secrets);
}

static void test_credential(void **state)
{
	struct ox_secrets *secrets = ox_secrets_new();

	unsetenv("CREDENTIALS_DIRECTORY");
	refuse(secrets, "secret,id=c,credential=disk", ENOENT, "LoadCredential=disk:PATH");
	setenv("CREDENTIALS_DIRECTORY", dir, 1);
	write_file("passed on", 9);
	add(secrets, "secret,id=c,credential=sec,,ret");
	expect(secrets, "c", "passed on", 9);
	refuse(secrets, "secret,id=d,credential=disk", ENOENT, "disk");
	refuse(secrets, "secret,id=d,credential=../etc/passwd", EINVAL, "not the name");
	refuse(secrets, "secret,id=d,credential=..", EINVAL, "not the name");
	refuse(secrets, "secret,id=d,credential=", EINVAL, "not the name");
	unsetenv("CREDENTIALS_DIRECTORY");
	ox_secrets_free(secrets);
}

static void test_refused(void **state)
{
	struct ox_secrets *secrets = ox_secrets_new();
	struct ox_error err = {0};
	const uint8_t *bytes;
	size_t count;

	refuse(secrets, "secret,id=a,data=123", EINVAL, "read by everybody on this host");
	refuse(secrets, "secret,data=123,id=a", EINVAL, "give file=, fd= or credential=");
	assert_int_equal(ox_secrets_add(secrets, "secret,id=a,data=letmein", &err), -EINVAL);
	assert_null(strstr(err.text, "letmein"));
	refuse(secrets, "", EINVAL, "no kind of object");
	refuse(secrets, "tls-creds-x509,id=a", EINVAL, "tls-creds-x509");
	refuse(secrets, "id=a,file=x", EINVAL, "no kind of object");
	refuse(secrets, "secret,file=x", EINVAL, "needs an id");
	refuse(secrets, "secret,id=0a,file=x", EINVAL, "'0a'");
	refuse(secrets, "secret,id=,file=x", EINVAL, "''");
	refuse(secrets, "secret,id=a b,file=x", EINVAL, "'a b'");
	refuse(secrets, "secret,id=a", EINVAL, "give one of");
	refuse(secrets, "secret,id=a,file=x,fd=3", EINVAL, "not several");
	refuse(secrets, "secret,id=a,id=b,file=x", EINVAL, "twice");
	refuse(secrets, "secret,id=a,file", EINVAL, "NAME=VALUE");
	refuse(secrets, "secret,id=a,fil=x", EINVAL, "did you mean file");
	refuse(secrets, "secret,id=a,file=x,format=hex", EINVAL, "'hex'");
	refuse(secrets, "secret,id=a,file=x,keyid=m,iv=n", ENOTSUP, "keyid");
	write_file("x", 1);
	setenv("CREDENTIALS_DIRECTORY", dir, 1);
	add(secrets, "secret,id=a,credential=sec,,ret");
	refuse(secrets, "secret,id=a,credential=sec,,ret", EEXIST, "two secrets");
	unsetenv("CREDENTIALS_DIRECTORY");

	ox_error_clear(&err);
	assert_int_equal(ox_secrets_find(secrets, "b", &bytes, &count, &err), -ENOENT);
	assert_non_null(strstr(err.text, "--object secret,id=b,file=PATH"));
	assert_int_equal(ox_secrets_find(NULL, "a", &bytes, &count, NULL), -ENOENT);
	ox_secrets_free(secrets);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_file),       cmocka_unit_test(test_base64),
	        cmocka_unit_test(test_limit),      cmocka_unit_test(test_fd),
	        cmocka_unit_test(test_credential), cmocka_unit_test(test_refused),
	};

	return cmocka_run_group_tests_name("image-secret", tests, make_dir, remove_dir);
}
