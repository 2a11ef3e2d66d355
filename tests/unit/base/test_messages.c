/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Errors, messages, the words of settings, allocation, opening.
 */
#include "base/base.h"
#include "base/opener.h"
#include <oxbow/error.h>
#include <oxbow/log.h>
#include <oxbow/types.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <cmocka.h>

static void test_error_keeps_first(void **state)
{
	struct ox_error err = {0};

	errno = EXDEV;
	assert_int_equal(ox_error_set(&err, ENOENT, "%s: not there", "disk.raw"), -ENOENT);
	assert_int_equal(errno, EXDEV);
	assert_int_equal(ox_error_set(&err, EIO, "later"), -EIO);
	assert_int_equal(err.code, ENOENT);
	assert_string_equal(err.text, "disk.raw: not there");
	ox_error_clear(&err);
	assert_int_equal(err.code, 0);
	assert_string_equal(err.text, "");
	assert_int_equal(ox_error_set(&err, EIO, "later"), -EIO);
	assert_string_equal(err.text, "later");
	/* Nobody has to listen. */
	assert_int_equal(ox_error_set(NULL, EPERM, "nothing"), -EPERM);
	ox_error_clear(NULL);
}

static void test_error_is_cut(void **state)
{
	struct {
		struct ox_error err;
		char fence[8];
	} box = {.fence = "unhurt"};

	assert_int_equal(ox_error_set(&box.err, EINVAL, "%04000d", 1), -EINVAL);
	assert_int_equal(strlen(box.err.text), OX_ERROR_TEXT - 1);
	assert_string_equal(box.fence, "unhurt");
}

/* --- messages: what a child process writes to stderr --------------------------------------- */

enum journal { NO_JOURNAL, JOURNAL, OTHER_JOURNAL };

static char said[8192];

/* Runs fn in a child with stderr a pipe, JOURNAL_STREAM and OXBOW_LOG set so; what it wrote. */
static const char *listen_to(void (*fn)(void), enum journal journal, const char *level)
{
	char stream[64];
	size_t length = 0;
	struct stat st;
	int fds[2], status;
	ssize_t n;
	pid_t pid;

	assert_int_equal(pipe(fds), 0);
	fflush(NULL);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		dup2(fds[1], STDERR_FILENO);
		fstat(STDERR_FILENO, &st);
		snprintf(stream, sizeof(stream), "%ju:%ju", (uintmax_t)st.st_dev,
		         (uintmax_t)st.st_ino + (journal == OTHER_JOURNAL));
		unsetenv("JOURNAL_STREAM");
		unsetenv("OXBOW_LOG");
		if (journal != NO_JOURNAL)
			setenv("JOURNAL_STREAM", stream, 1);
		if (level)
			setenv("OXBOW_LOG", level, 1);
		fn();
		_exit(0);
	}
	close(fds[1]);
	while ((n = read(fds[0], said + length, sizeof(said) - 1 - length)) > 0)
		length += (size_t)n;
	close(fds[0]);
	said[length] = '\0';
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	return said;
}

static void say_all(void)
{
	errno = EXDEV;
	ox_log(OX_LOG_ERROR, "e%d", 1);
	ox_log(OX_LOG_WARNING, "w%d", 2);
	ox_log(OX_LOG_INFO, "i%d", 3);
	ox_log(OX_LOG_DEBUG, "d%d", 4);
	if (errno != EXDEV)
		ox_log(OX_LOG_ERROR, "errno was lost");
}

static void say_all_after_set_level(void)
{
	ox_log_set_level(OX_LOG_DEBUG);
	say_all();
}

static void say_bad_bytes(void)
{
	ox_log(OX_LOG_ERROR, "a\nb\tc\033[1md\x7f");
}

static void say_much(void)
{
	ox_log(OX_LOG_ERROR, "%05000d", 1);
	ox_log(OX_LOG_ERROR, "next");
}

static void say_once(void)
{
	for (int i = 0; i < 5; i++)
		ox_log_once(OX_LOG_ERROR, "only %d", i);
	ox_log_once(OX_LOG_ERROR, "another");
}

static void test_log_lines(void **state)
{
	assert_string_equal(listen_to(say_all, NO_JOURNAL, NULL),
	                    "oxbow: error: e1\noxbow: warning: w2\noxbow: i3\n");
	assert_string_equal(listen_to(say_all, JOURNAL, NULL), "<3>e1\n<4>w2\n<6>i3\n");
	/* The environment of a service, but stderr sent elsewhere. */
	assert_string_equal(listen_to(say_all, OTHER_JOURNAL, NULL),
	                    "oxbow: error: e1\noxbow: warning: w2\noxbow: i3\n");
	assert_string_equal(listen_to(say_once, JOURNAL, NULL), "<3>only 0\n<3>another\n");
}

static void test_log_levels(void **state)
{
	assert_string_equal(listen_to(say_all, JOURNAL, "error"), "<3>e1\n");
	assert_string_equal(listen_to(say_all, JOURNAL, "warning"), "<3>e1\n<4>w2\n");
	assert_string_equal(listen_to(say_all, JOURNAL, "debug"), "<3>e1\n<4>w2\n<6>i3\n<7>d4\n");
	assert_string_equal(listen_to(say_all, JOURNAL, "nonsense"), "<3>e1\n<4>w2\n<6>i3\n");
	assert_string_equal(listen_to(say_all_after_set_level, JOURNAL, "error"),
	                    "<3>e1\n<4>w2\n<6>i3\n<7>d4\n");
}

static void test_log_is_one_clean_line(void **state)
{
	assert_string_equal(listen_to(say_bad_bytes, JOURNAL, NULL), "<3>a b c?[1md?\n");
	listen_to(say_much, JOURNAL, NULL);
	assert_true(strlen(said) < OX_LOG_LINE + 16);
	assert_non_null(strstr(said, "0\n<3>next\n"));
}

/* --- words --------------------------------------------------------------------------------- */

#define CHECK_WORDS(what, last)                                                   \
	do {                                                                      \
		for (int i = 0; i <= (int)(last); i++) {                          \
			enum ox_##what out = (enum ox_##what) - 1;                \
			const char *name = ox_##what##_name((enum ox_##what)i);   \
                                                                                  \
			assert_non_null(name);                                    \
			assert_true(ox_##what##_parse(name, &out));               \
			assert_int_equal(out, i);                                 \
			assert_false(ox_##what##_parse("", &out));                \
			assert_false(ox_##what##_parse("nonsense", &out));        \
			assert_int_equal(out, i);                                 \
		}                                                                 \
		assert_null(ox_##what##_name((enum ox_##what)((int)(last) + 1))); \
	} while (0)

static void test_words(void **state)
{
	enum ox_discard discard;

	CHECK_WORDS(cache, OX_CACHE_UNSAFE);
	CHECK_WORDS(aio, OX_AIO_IO_URING);
	CHECK_WORDS(on_error, OX_ON_ERROR_ENOSPC);
	CHECK_WORDS(discard, OX_DISCARD_IGNORE);
	CHECK_WORDS(detect_zeroes, OX_DETECT_ZEROES_UNMAP);
	CHECK_WORDS(preallocation, OX_PREALLOC_FULL);
	assert_string_equal(ox_cache_name(OX_CACHE_NONE), "none");
	assert_string_equal(ox_aio_name(OX_AIO_IO_URING), "io_uring");
	assert_string_equal(ox_discard_name(OX_DISCARD_UNMAP), "unmap");
	assert_true(ox_discard_parse("on", &discard));
	assert_int_equal(discard, OX_DISCARD_UNMAP);
	assert_true(ox_discard_parse("off", &discard));
	assert_int_equal(discard, OX_DISCARD_IGNORE);
	assert_true(ox_cache_is_direct(OX_CACHE_NONE));
	assert_true(ox_cache_is_direct(OX_CACHE_DIRECTSYNC));
	assert_false(ox_cache_is_direct(OX_CACHE_UNSAFE));
	assert_true(ox_cache_is_writethrough(OX_CACHE_WRITETHROUGH));
	assert_false(ox_cache_is_writethrough(OX_CACHE_WRITEBACK));
}

/* --- allocation, cleanup, opening ---------------------------------------------------------- */

static void test_allocation(void **state)
{
	OX_FREE char *text = ox_xasprintf("%d-%s", 7, "x");
	OX_FREE char *copy = ox_xstrdup(text);
	OX_FREE unsigned char *zero = ox_xcalloc(10, 3);
	OX_FREE void *nothing = ox_xcalloc(0, 8);
	char *stolen;

	assert_string_equal(copy, "7-x");
	for (unsigned i = 0; i < 30; i++)
		assert_int_equal(zero[i], 0);
	assert_non_null(nothing);
	stolen = ox_steal_ptr(copy);
	assert_null(copy);
	free(stolen);
}

static void run_out_of_memory(void)
{
	void *p;

	signal(SIGABRT, SIG_DFL);
	p = ox_xcalloc(SIZE_MAX / 2, 16);
	free(p);
}

static void test_out_of_memory(void **state)
{
	int status;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		int null = open("/dev/null", O_WRONLY);

		dup2(null, STDERR_FILENO);
		run_out_of_memory();
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_not_equal(status, 0);
}

static void test_opener(void **state)
{
	char path[] = "/tmp/oxbow-test-XXXXXX";
	int made = mkstemp(path), fd, kept;

	assert_true(made >= 0);
	close(made);
	fd = ox_open(&ox_opener_direct, path, O_RDWR, 0);
	assert_true(fd >= 0);
	assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	kept = fd;
	{
		OX_CLOSE int scoped = ox_steal_fd(&fd);

		assert_int_equal(scoped, kept);
		assert_int_equal(fd, -1);
	}
	assert_int_equal(fcntl(kept, F_GETFD), -1);
	unlink(path);
	assert_int_equal(ox_open(&ox_opener_direct, path, O_RDWR, 0), -ENOENT);
	fd = ox_open(&ox_opener_direct, path, O_RDWR | O_CREAT | O_EXCL, 0600);
	assert_true(fd >= 0);
	close(fd);
	assert_int_equal(ox_open(&ox_opener_direct, path, O_RDWR | O_CREAT | O_EXCL, 0600),
	                 -EEXIST);
	unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_error_keeps_first),
	        cmocka_unit_test(test_error_is_cut),
	        cmocka_unit_test(test_log_lines),
	        cmocka_unit_test(test_log_levels),
	        cmocka_unit_test(test_log_is_one_clean_line),
	        cmocka_unit_test(test_words),
	        cmocka_unit_test(test_allocation),
	        cmocka_unit_test(test_out_of_memory),
	        cmocka_unit_test(test_opener),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
