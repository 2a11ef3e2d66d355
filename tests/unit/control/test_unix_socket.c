/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Control sockets' files: modes, stale ones, ones that are in use, what is no socket.
 */
#include "control/qmp_internal.h"
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
	int fd;

	assert_int_equal(ox_control_listen(path, &fd, NULL), 0);
	umask(mask);
	assert_int_equal(stat(path, &st), 0);
	assert_true(S_ISSOCK(st.st_mode));
	assert_int_equal(st.st_mode & 07777, 0600);
	close(fd);
}

static void test_stale(void **state)
{
	int first, second, client;

	assert_int_equal(ox_control_listen(path, &first, NULL), 0);
	close(first);
	assert_int_equal(ox_control_connect(path, &client, NULL), -ECONNREFUSED);
	assert_int_equal(ox_control_listen(path, &second, NULL), 0);
	assert_int_equal(ox_control_connect(path, &client, NULL), 0);
	close(client);
	close(second);
}

static void test_in_use(void **state)
{
	struct ox_error err = {0};
	int first, second = -1, client;

	assert_int_equal(ox_control_listen(path, &first, NULL), 0);
	assert_int_equal(ox_control_listen(path, &second, &err), -EADDRINUSE);
	assert_non_null(strstr(err.text, path));
	/* And it still works. */
	assert_int_equal(ox_control_connect(path, &client, NULL), 0);
	close(client);
	close(first);
}

static void test_not_a_socket(void **state)
{
	struct ox_error err = {0};
	struct stat st;
	int fd = open(path, O_CREAT | O_WRONLY, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, "precious", 8), 8);
	close(fd);
	assert_int_equal(ox_control_listen(path, &fd, &err), -EEXIST);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 8);
}

static void test_bad_paths(void **state)
{
	struct ox_error err = {0};
	char longest[200];
	int fd;

	memset(longest, 'x', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = '\0';
	assert_int_equal(ox_control_listen(longest, &fd, &err), -ENAMETOOLONG);
	assert_non_null(strstr(err.text, "107"));
	ox_error_clear(&err);
	assert_int_equal(ox_control_listen("", &fd, &err), -EINVAL);
	ox_error_clear(&err);
	assert_int_equal(ox_control_listen("/nowhere/at/all", &fd, &err), -ENOENT);
	assert_non_null(strstr(err.text, "/nowhere/at/all"));
}

static void test_run_dir(void **state)
{
	char file[128], own[128];
	int dead, mine;
	const char *run;
	pid_t pid = 2147483646; /* far above the highest pid that a kernel gives */

	setenv("OXBOW_RUN_DIR", dir, 1);
	run = ox_run_dir();
	assert_non_null(run);
	assert_string_equal(run, dir);
	snprintf(file, sizeof(file), "%s/%d.qmp", dir, (int)pid);
	snprintf(own, sizeof(own), "%s/%d.qmp", dir, (int)getpid());
	assert_int_equal(ox_control_listen(file, &dead, NULL), 0);
	assert_int_equal(ox_control_listen(own, &mine, NULL), 0);
	/* Somebody listens: in another PID namespace, perhaps. */
	ox_run_dir_clean();
	assert_int_equal(access(file, F_OK), 0);
	close(dead);
	close(mine);
	/* Nobody listens, but a process of that number lives. */
	ox_run_dir_clean();
	assert_int_equal(access(file, F_OK), -1);
	assert_int_equal(access(own, F_OK), 0);
	unlink(own);
	/* A directory that everybody may write to is not trusted. */
	assert_int_equal(chmod(dir, 0777), 0);
	assert_null(ox_run_dir());
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test_setup_teardown(test_mode, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_stale, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_in_use, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_not_a_socket, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_bad_paths, setup, teardown),
	        cmocka_unit_test_setup_teardown(test_run_dir, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
