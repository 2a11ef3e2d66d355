/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The directory of running servers: what is cleaned, what is trusted.
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

static void test_run_dir(void **state)
{
	char file[128], own[128];
	struct ox_unix_listener dead, mine;
	const char *run;
	pid_t pid = 2147483646; /* far above the highest pid that a kernel gives */

	setenv("OXBOW_RUN_DIR", dir, 1);
	run = ox_run_dir();
	assert_non_null(run);
	assert_string_equal(run, dir);
	snprintf(file, sizeof(file), "%s/%d.qmp", dir, (int)pid);
	snprintf(own, sizeof(own), "%s/%d.qmp", dir, (int)getpid());
	assert_int_equal(ox_unix_listen(file, 0600, &dead, NULL), 0);
	assert_int_equal(ox_unix_listen(own, 0600, &mine, NULL), 0);
	/* Somebody listens: in another PID namespace, perhaps. */
	ox_run_dir_clean();
	assert_int_equal(access(file, F_OK), 0);
	close(dead.fd);
	close(mine.fd);
	/* Nobody listens, but a process of that number lives. */
	ox_run_dir_clean();
	assert_int_equal(access(file, F_OK), -1);
	assert_int_equal(access(own, F_OK), 0);
	unlink(own);
	free(dead.path);
	free(mine.path);
	/* A directory that everybody may write to is not trusted. */
	assert_int_equal(chmod(dir, 0777), 0);
	assert_null(ox_run_dir());
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test_setup_teardown(test_run_dir, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
