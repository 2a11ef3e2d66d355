/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The I/O engines: the same operations through each; what happens when the kernel refuses one.
 */
#include "base/fiber.h"
#include "engine/engine.h"
#include "engine/loop.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static const enum ox_aio kinds[] = {OX_AIO_SYNC, OX_AIO_THREADS, OX_AIO_NATIVE, OX_AIO_IO_URING};

#define BLOCK  4096
#define BLOCKS 600 /* more than any engine's queue holds */

struct job {
	struct ox_engine_op op;
	struct iovec iov[2];
	char *buf;
	struct batch *batch;
};

struct batch {
	struct job job[BLOCKS];
	int left;
	bool done, failed;
};

static void job_done(struct ox_engine_op *op)
{
	struct job *job = ox_container_of(op, struct job, op);
	struct batch *batch = job->batch;

	if (op->result != BLOCK)
		batch->failed = true;
	if (--batch->left == 0)
		batch->done = true;
}

static int temp_file(void)
{
	char path[] = "/var/tmp/oxbow-test-XXXXXX";
	int fd = mkstemp(path);

	assert_true(fd >= 0);
	unlink(path);
	return fd;
}

static void run_batch(struct ox_loop *loop, struct ox_engine *engine, int fd, int file,
                      struct batch *batch, uint8_t opcode, uint8_t flags)
{
	batch->left = BLOCKS;
	batch->done = false;
	for (int i = 0; i < BLOCKS; i++) {
		struct job *job = &batch->job[i];

		job->batch = batch;
		job->iov[0] = (struct iovec){job->buf, i % 2 ? BLOCK : BLOCK / 2};
		job->iov[1] = (struct iovec){job->buf + BLOCK / 2, BLOCK / 2};
		job->op = (struct ox_engine_op){
		        .opcode = opcode,
		        .flags = flags,
		        .iovcnt = i % 2 ? 1 : 2,
		        .fd = fd,
		        .file = file,
		        .offset = (uint64_t)i * BLOCK,
		        .length = BLOCK,
		        .iov = job->iov,
		        .done = job_done,
		};
		ox_engine_submit(engine, &job->op);
	}
	ox_loop_run_until(loop, &batch->done);
	assert_false(batch->failed);
}

static struct ox_loop *new_loop(void)
{
	struct ox_loop_options options = {.name = "test", .poll_max_ns = OX_LOOP_POLL_MAX_NS};
	struct ox_loop *loop = ox_loop_new(&options, NULL);

	assert_non_null(loop);
	return loop;
}

struct others {
	struct ox_engine *engine;
	int fd, file;
};

static int64_t called(struct ox_engine_op *op)
{
	return (int64_t)op->offset + 1;
}

static void other_ops(void *arg)
{
	struct others *o = arg;
	struct ox_engine_op op = {.opcode = OX_ENGINE_FDATASYNC, .fd = o->fd, .file = o->file};
	char buf[BLOCK];
	struct iovec iov = {buf, sizeof(buf)};

	assert_int_equal(ox_engine_run_co(o->engine, &op), 0);
	op = (struct ox_engine_op){
	        .opcode = OX_ENGINE_CALL, .fd = -1, .file = -1, .offset = 41, .call = called};
	assert_int_equal(ox_engine_run_co(o->engine, &op), 42);
	op = (struct ox_engine_op){.opcode = OX_ENGINE_FALLOCATE,
	                           .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
	                           .fd = o->fd,
	                           .file = o->file,
	                           .offset = BLOCK,
	                           .length = BLOCK};
	assert_int_equal(ox_engine_run_co(o->engine, &op), 0);
	op = (struct ox_engine_op){.opcode = OX_ENGINE_READ,
	                           .fd = o->fd,
	                           .file = o->file,
	                           .offset = BLOCK,
	                           .length = BLOCK,
	                           .iov = &iov,
	                           .iovcnt = 1};
	memset(buf, 1, sizeof(buf));
	assert_int_equal(ox_engine_run_co(o->engine, &op), BLOCK);
	for (int i = 0; i < BLOCK; i++)
		assert_int_equal(buf[i], 0);
	/* At the end: short, not an error. */
	op.offset = (uint64_t)BLOCKS * BLOCK - 512;
	assert_int_equal(ox_engine_run_co(o->engine, &op), 512);
	op.offset = (uint64_t)BLOCKS * BLOCK;
	assert_int_equal(ox_engine_run_co(o->engine, &op), 0);
	/* Errors come back as they are. */
	op.fd = 9999;
	op.file = -1;
	assert_int_equal(ox_engine_run_co(o->engine, &op), -EBADF);
}

static void exercise(enum ox_aio kind, int register_it)
{
	struct batch *out = ox_xcalloc(1, sizeof(*out)), *in = ox_xcalloc(1, sizeof(*in));
	struct ox_loop *loop = new_loop();
	struct ox_engine *engine = ox_loop_engine(loop, kind);
	int fd = temp_file(), file = register_it ? ox_engine_register_file(engine, fd) : -1;
	struct others others = {engine, fd, file};

	for (int i = 0; i < BLOCKS; i++) {
		out->job[i].buf = malloc(BLOCK);
		in->job[i].buf = calloc(1, BLOCK);
		memset(out->job[i].buf, i * 7 + 1, BLOCK);
	}
	run_batch(loop, engine, fd, file, out, OX_ENGINE_WRITE, 0);
	run_batch(loop, engine, fd, file, out, OX_ENGINE_WRITE, OX_ENGINE_DSYNC);
	run_batch(loop, engine, fd, file, in, OX_ENGINE_READ, 0);
	for (int i = 0; i < BLOCKS; i++)
		assert_memory_equal(out->job[i].buf, in->job[i].buf, BLOCK);
	ox_loop_run_fiber(loop, other_ops, &others);
	for (int i = 0; i < BLOCKS; i++) {
		free(out->job[i].buf);
		free(in->job[i].buf);
	}
	ox_engine_unregister_file(engine, file);
	close(fd);
	ox_loop_free(loop);
	free(out);
	free(in);
}

static void test_operations(void **state)
{
	for (unsigned i = 0; i < OX_ARRAY_SIZE(kinds); i++)
		exercise(kinds[i], 0);
}

static void test_registered_file(void **state)
{
	exercise(OX_AIO_IO_URING, 1);
}

static void test_all_engines_on_one_loop(void **state)
{
	struct ox_loop *loop = new_loop();
	struct batch *batch = ox_xcalloc(1, sizeof(*batch));
	char *buf = calloc(1, BLOCK);
	int fd = temp_file();

	for (int i = 0; i < BLOCKS; i++)
		batch->job[i].buf = buf;
	for (unsigned round = 0; round < 3; round++)
		for (unsigned i = 0; i < OX_ARRAY_SIZE(kinds); i++)
			run_batch(loop, ox_loop_engine(loop, kinds[i]), fd, -1, batch,
			          OX_ENGINE_WRITE, 0);
	close(fd);
	ox_loop_free(loop);
	free(buf);
	free(batch);
}

/* --- a completion that arrives while the loop falls asleep -------------------------------- */

struct late {
	struct ox_poller poller;
	struct ox_engine *engine;
	struct ox_engine_op op;
	bool called;
};

static int64_t nothing(struct ox_engine_op *op)
{
	return 0;
}

static bool late_poll(struct ox_poller *poller)
{
	return false;
}

/* The loop asks its pollers first, then reaps once more: by then the worker is done. */
static bool late_sleep(struct ox_poller *poller)
{
	struct late *late = ox_container_of(poller, struct late, poller);

	while (late->engine->in_flight &&
	       !__atomic_load_n(&late->engine->finished, __ATOMIC_SEQ_CST))
		usleep(100);
	return false;
}

static void late_wake(struct ox_poller *poller)
{
}

static void late_done(struct ox_engine_op *op)
{
	ox_container_of(op, struct late, op)->called = true;
}

static void test_done_while_falling_asleep(void **state)
{
	struct ox_loop_options options = {.name = "test", .poll_max_ns = 0};
	struct ox_loop *loop = ox_loop_new(&options, NULL);
	struct late late = {
	        .poller = {late_poll, late_sleep, late_wake, {0}, NULL},
	        .engine = ox_loop_engine(loop, OX_AIO_THREADS),
	        .op = {.opcode = OX_ENGINE_CALL, .call = nothing, .done = late_done},
	};

	ox_poller_add(loop, &late.poller);
	ox_engine_submit(late.engine, &late.op);
	ox_loop_run_until(loop, &late.called); /* hung before the completion was called */
	ox_poller_remove(&late.poller);
	ox_loop_free(loop);
}

/* --- refusals: in a child, a seccomp filter answers a system call with an error ------------- */

static int refuse(long number, int error)
{
	struct sock_filter filter[] = {
	        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
	        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ((unsigned)error & 0xffff)),
	        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {OX_ARRAY_SIZE(filter), filter};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return -errno;
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0 ? -errno : 0;
}

/* Runs fn in a child whose stderr goes to `text`; its exit status. */
static int in_child(void (*fn)(void), char *text, size_t size)
{
	int pipe_fd[2], status;
	size_t length = 0;
	ssize_t n;
	pid_t pid;

	assert_int_equal(pipe(pipe_fd), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		dup2(pipe_fd[1], 2);
		close(pipe_fd[0]);
		close(pipe_fd[1]);
		unsetenv("JOURNAL_STREAM");
		fn();
		_exit(0);
	}
	close(pipe_fd[1]);
	while ((n = read(pipe_fd[0], text + length, size - 1 - length)) > 0)
		length += (size_t)n;
	text[length] = 0;
	close(pipe_fd[0]);
	waitpid(pid, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* A condition of a child: cmocka's asserts would unwind into the parent's test. */
#define child_assert(condition)                                     \
	do {                                                        \
		if (!(condition)) {                                 \
			fprintf(stderr, "child: %s\n", #condition); \
			_exit(1);                                   \
		}                                                   \
	} while (0)

static void write_through(enum ox_aio kind, const struct ox_engine_ops *expected)
{
	struct ox_loop *loop = new_loop();
	struct batch *batch = ox_xcalloc(1, sizeof(*batch));
	char *buf = calloc(1, BLOCK);
	int fd = temp_file();

	child_assert(ox_loop_engine(loop, kind)->ops == expected);
	child_assert(ox_loop_engine(loop, kind)->ops == expected); /* says it once only */
	for (int i = 0; i < BLOCKS; i++)
		batch->job[i].buf = buf;
	run_batch(loop, ox_loop_engine(loop, kind), fd, -1, batch, OX_ENGINE_WRITE, 0);
	child_assert(lseek(fd, 0, SEEK_END) == (off_t)BLOCKS * BLOCK);
}

static void uring_setup_enosys(void)
{
	child_assert(refuse(SYS_io_uring_setup, ENOSYS) == 0);
	write_through(OX_AIO_IO_URING, &ox_engine_threads);
}

static void uring_setup_eperm(void)
{
	child_assert(refuse(SYS_io_uring_setup, EPERM) == 0);
	write_through(OX_AIO_IO_URING, &ox_engine_threads);
}

static void native_setup_eagain(void)
{
	child_assert(refuse(SYS_io_setup, EAGAIN) == 0);
	write_through(OX_AIO_NATIVE, &ox_engine_threads);
}

static unsigned count_lines(const char *text)
{
	unsigned lines = 0;

	for (; *text; text++)
		lines += *text == '\n';
	return lines;
}

static void expect_one_warning(void (*fn)(void), const char *words)
{
	char text[2048];
	int status = in_child(fn, text, sizeof(text));

	if (status || !strstr(text, words) || count_lines(text) != 1)
		fail_msg("status %d, stderr: %s", status, text);
}

static void test_setup_refused(void **state)
{
	expect_one_warning(uring_setup_enosys, "no io_uring");
	expect_one_warning(uring_setup_eperm, "forbidden by this system's policy");
	expect_one_warning(native_setup_eagain, "fs.aio-max-nr");
}

static void lose_at_run_time(enum ox_aio kind, long number, int error)
{
	struct ox_loop *loop = new_loop();
	struct ox_engine *engine = ox_loop_engine(loop, kind);
	struct batch *batch = ox_xcalloc(1, sizeof(*batch));
	char *buf = calloc(1, BLOCK);
	int fd = temp_file();

	child_assert(engine->ops->kind == kind);
	for (int i = 0; i < BLOCKS; i++)
		batch->job[i].buf = buf;
	run_batch(loop, engine, fd, -1, batch, OX_ENGINE_WRITE, 0);
	child_assert(ftruncate(fd, 0) == 0);
	child_assert(refuse(number, error) == 0);
	run_batch(loop, engine, fd, -1, batch, OX_ENGINE_WRITE, 0);
	child_assert(lseek(fd, 0, SEEK_END) == (off_t)BLOCKS * BLOCK);
	child_assert(ox_loop_engine(loop, kind)->ops == &ox_engine_threads);
	run_batch(loop, ox_loop_engine(loop, kind), fd, -1, batch, OX_ENGINE_READ, 0);
}

static void uring_lost_eperm(void)
{
	lose_at_run_time(OX_AIO_IO_URING, SYS_io_uring_enter, EPERM);
}

static void uring_lost_enosys(void)
{
	lose_at_run_time(OX_AIO_IO_URING, SYS_io_uring_enter, ENOSYS);
}

static void native_lost(void)
{
	lose_at_run_time(OX_AIO_NATIVE, SYS_io_submit, ENOSYS);
}

static void test_lost_at_run_time(void **state)
{
	expect_one_warning(uring_lost_eperm, "taken away at run time");
	expect_one_warning(uring_lost_enosys, "taken away at run time");
	expect_one_warning(native_lost, "taken away at run time");
}

static void choose_without_uring(void)
{
	struct ox_aio_facts facts = {0};
	char reason[128];

	child_assert(refuse(SYS_io_uring_setup, EPERM) == 0);
	child_assert(ox_aio_choose(OX_AIO_AUTO, &facts, reason, sizeof(reason)) == OX_AIO_THREADS);
	child_assert(strstr(reason, "without O_DIRECT"));
	facts.direct = true;
	child_assert(ox_aio_choose(OX_AIO_AUTO, &facts, reason, sizeof(reason)) == OX_AIO_THREADS);
	child_assert(strstr(reason, "sparse"));
	facts.fully_allocated = true;
	child_assert(ox_aio_choose(OX_AIO_AUTO, &facts, reason, sizeof(reason)) == OX_AIO_NATIVE);
	facts.fully_allocated = false;
	facts.block_device = true;
	child_assert(ox_aio_choose(OX_AIO_AUTO, &facts, reason, sizeof(reason)) == OX_AIO_NATIVE);
	child_assert(strstr(reason, "forbidden"));
}

static void test_choose(void **state)
{
	struct ox_aio_facts facts = {.direct = true};
	char reason[128], text[1024];

	/* Before this process has asked what is available, which it does only once. */
	if (in_child(choose_without_uring, text, sizeof(text)))
		fail_msg("%s", text);
	assert_int_equal(ox_aio_choose(OX_AIO_SYNC, &facts, reason, sizeof(reason)), OX_AIO_SYNC);
	assert_string_equal(reason, "as asked");
	if (ox_aio_available(OX_AIO_IO_URING, NULL) == 0) {
		assert_int_equal(ox_aio_choose(OX_AIO_AUTO, &facts, reason, sizeof(reason)),
		                 OX_AIO_IO_URING);
		assert_string_equal(reason, "io_uring is allowed here");
	}
}

int main(int argc, char **argv)
{
	/* Children probe afresh, so the tests with refusals come before anything else asks. */
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_setup_refused),
	        cmocka_unit_test(test_lost_at_run_time),
	        cmocka_unit_test(test_choose),
	        cmocka_unit_test(test_operations),
	        cmocka_unit_test(test_registered_file),
	        cmocka_unit_test(test_all_engines_on_one_loop),
	        cmocka_unit_test(test_done_while_falling_asleep),
	};

	return cmocka_run_group_tests_name("engine", tests, NULL, NULL);
}
