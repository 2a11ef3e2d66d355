/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Socket files: modes, stale ones, ones that are in use, what is no socket.
 */
#include "base/unix_socket.h"
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

static char dir[64];
static char path[96];

static int setup(void **state)
{
	snprintf(dir, sizeof(dir), "/tmp/oxbow-test.XXXXXX");
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/s", dir);
	return 0;
}

static int teardown(void **state)
{
	unlink(path);
	return rmdir(dir);
}

static void test_mode(void **state)
{
	mode_t mask = umask(0);
	struct stat st;
	struct ox_unix_listener listener;

	assert_int_equal(ox_unix_listen(path, 0600, &listener, NULL), 0);
	umask(mask);
	assert_int_equal(stat(path, &st), 0);
	assert_true(S_ISSOCK(st.st_mode));
	assert_int_equal(st.st_mode & 07777, 0600);
	ox_unix_listener_close(&listener);
	assert_int_equal(access(path, F_OK), -1);
}

static void test_stale(void **state)
{
	struct ox_unix_listener first, second;
	int client;

	assert_int_equal(ox_unix_listen(path, 0600, &first, NULL), 0);
	close(first.fd); /* and its file stays, as after a kill */
	assert_int_equal(ox_unix_connect(path, &client, NULL), -ECONNREFUSED);
	assert_int_equal(ox_unix_listen(path, 0600, &second, NULL), 0);
	assert_int_equal(ox_unix_connect(path, &client, NULL), 0);
	close(client);
	free(first.path);
	ox_unix_listener_close(&second);
	assert_int_equal(access(path, F_OK), -1);
}

static void test_in_use(void **state)
{
	struct ox_error err = {0};
	struct ox_unix_listener first, second;
	int client;

	assert_int_equal(ox_unix_listen(path, 0600, &first, NULL), 0);
	assert_int_equal(ox_unix_listen(path, 0600, &second, &err), -EADDRINUSE);
	assert_non_null(strstr(err.text, path));
	/* And it still works. */
	assert_int_equal(ox_unix_connect(path, &client, NULL), 0);
	close(client);
	ox_unix_listener_close(&first);
}

static void test_not_a_socket(void **state)
{
	struct ox_error err = {0};
	struct stat st;
	struct ox_unix_listener listener;
	int fd = open(path, O_CREAT | O_WRONLY, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, "precious", 8), 8);
	close(fd);
	assert_int_equal(ox_unix_listen(path, 0600, &listener, &err), -EEXIST);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 8);
}

static void test_bad_paths(void **state)
{
	struct ox_error err = {0};
	struct ox_unix_listener listener;
	char longest[200];

	memset(longest, 'x', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = '\0';
	assert_int_equal(ox_unix_listen(longest, 0600, &listener, &err), -ENAMETOOLONG);
	assert_non_null(strstr(err.text, "107"));
	ox_error_clear(&err);
	assert_int_equal(ox_unix_listen("", 0600, &listener, &err), -ENAMETOOLONG);
	ox_error_clear(&err);
	assert_int_equal(ox_unix_listen("/nowhere/at/all", 0600, &listener, &err), -ENOENT);
	assert_non_null(strstr(err.text, "/nowhere/at/all"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test_setup_teardown(test_mode, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_stale, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_in_use, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_not_a_socket, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_bad_paths, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
