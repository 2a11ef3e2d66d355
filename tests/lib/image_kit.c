/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * See image_kit.h.
 */
#include "tests/lib/image_kit.h"
#include "base/fiber.h"
#include "base/iov.h"
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

struct run {
	pthread_mutex_t lock;
	pthread_cond_t all_ended;
	unsigned left;
};

struct job {
	struct ox_post post;
	struct run *run;
	struct kit *kit;
	struct kit_work work;
};

static void job_co(void *arg)
{
	struct job *job = arg;
	struct run *run = job->run;

	job->work.fn_co(job->kit->channel[job->work.thread], job->work.arg);
	pthread_mutex_lock(&run->lock);
	if (--run->left == 0)
		pthread_cond_signal(&run->all_ended);
	pthread_mutex_unlock(&run->lock);
}

static void job_post(struct ox_post *post)
{
	struct job *job = ox_container_of(post, struct job, post);

	if (ox_fiber_start(job_co, job) < 0)
		abort();
}

void kit_run(struct kit *kit, const struct kit_work *work, unsigned count)
{
	struct run run = {.left = count};
	struct job *jobs = ox_xcalloc(count, sizeof(*jobs));

	pthread_mutex_init(&run.lock, NULL);
	pthread_cond_init(&run.all_ended, NULL);
	for (unsigned i = 0; i < count; i++) {
		jobs[i].post.fn = job_post;
		jobs[i].run = &run;
		jobs[i].kit = kit;
		jobs[i].work = work[i];
		ox_loop_post(ox_iothread_loop(kit->thread[work[i].thread]), &jobs[i].post);
	}
	pthread_mutex_lock(&run.lock);
	while (run.left > 0)
		pthread_cond_wait(&run.all_ended, &run.lock);
	pthread_mutex_unlock(&run.lock);
	pthread_cond_destroy(&run.all_ended);
	pthread_mutex_destroy(&run.lock);
	free(jobs);
}

void kit_start(struct kit *kit, unsigned threads)
{
	struct ox_error err = {0};

	memset(kit, 0, sizeof(*kit));
	for (kit->threads = 0; kit->threads < threads; kit->threads++) {
		char name[16];
		struct ox_loop_options options = {.name = name};

		snprintf(name, sizeof(name), "kit%u", kit->threads);
		kit->thread[kit->threads] = ox_iothread_start(&options, &err);
		if (!kit->thread[kit->threads]) {
			fprintf(stderr, "%s\n", err.text);
			abort();
		}
	}
}

void kit_stop(struct kit *kit)
{
	for (unsigned i = 0; i < kit->threads; i++)
		ox_iothread_stop(kit->thread[i]);
	kit->threads = 0;
}

struct attach {
	struct kit *kit;
	unsigned index;
	struct ox_error *err;
	int result;
};

static void attach_co(struct ox_image_channel *none, void *arg)
{
	struct attach *attach = arg;
	struct kit *kit = attach->kit;
	unsigned i = attach->index;

	attach->result = ox_image_attach(kit->image, ox_iothread_loop(kit->thread[i]),
	                                 &kit->channel[i], attach->err);
}

static void detach_co(struct ox_image_channel *channel, void *arg)
{
	ox_image_detach_co(channel);
}

static void detach_all(struct kit *kit)
{
	for (unsigned i = kit->threads; i-- > 0;) {
		struct kit_work work = {.thread = i, .fn_co = detach_co};

		if (kit->channel[i])
			kit_run(kit, &work, 1);
		kit->channel[i] = NULL;
	}
	ox_image_close(kit->image);
	kit->image = NULL;
}

int kit_open(struct kit *kit, const char *path, const struct ox_image_options *options,
             struct ox_error *err)
{
	int ret = ox_image_open(path, options, &kit->image, err);

	if (ret < 0)
		return ret;
	for (unsigned i = 0; i < kit->threads; i++) {
		struct attach attach = {.kit = kit, .index = i, .err = err};
		struct kit_work work = {.thread = i, .fn_co = attach_co, .arg = &attach};

		kit_run(kit, &work, 1);
		if (attach.result < 0) {
			detach_all(kit);
			return attach.result;
		}
	}
	return 0;
}

static void finish_co(struct ox_image_channel *channel, void *arg)
{
	*(int *)arg = ox_image_finish_co(channel);
}

int kit_close(struct kit *kit, bool finish)
{
	int ret = 0;
	struct kit_work work = {.thread = 0, .fn_co = finish_co, .arg = &ret};

	if (finish)
		kit_run(kit, &work, 1);
	detach_all(kit);
	return ret;
}

/* --- requests ------------------------------------------------------------------------------- */

struct call {
	struct ox_request request;
	struct ox_fiber *waiter;
	bool done;
};

static void call_done(struct ox_request *request)
{
	struct call *call = ox_container_of(request, struct call, request);

	call->done = true;
	if (call->waiter)
		ox_fiber_resume(call->waiter);
}

int kit_request_co(struct ox_image_channel *channel, enum ox_io_op op, uint64_t offset, void *buf,
                   size_t bytes, size_t cut, unsigned flags)
{
	struct iovec iov[2] = {{.iov_base = buf, .iov_len = bytes}};
	struct call call = {.request = {.op = (uint8_t)op,
	                                .flags = (uint8_t)flags,
	                                .offset = offset,
	                                .length = bytes,
	                                .iov = iov,
	                                .iovcnt = 1,
	                                .image_done = call_done}};

	if (buf && cut > 0 && cut < bytes) {
		iov[0].iov_len = cut;
		iov[1] = (struct iovec){.iov_base = (char *)buf + cut, .iov_len = bytes - cut};
		call.request.iovcnt = 2;
	}
	if (op != OX_IO_READ && op != OX_IO_WRITE) {
		call.request.iov = NULL;
		call.request.iovcnt = 0;
	}
	ox_image_submit(channel, &call.request);
	if (!call.done) {
		call.waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	return call.request.result;
}

uint64_t kit_random(uint64_t *seed, uint64_t below)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return (*seed >> 11) % below;
}

bool kit_make_dir(char *path, size_t size, const char *name)
{
	const char *given = getenv("OXBOW_TEST_DIR");

	if (!given)
		given = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
	if (snprintf(path, size, "%s/ox-%s-XXXXXX", given, name) >= (int)size)
		return false;
	return mkdtemp(path) != NULL;
}

int kit_spawn(const char *const *argv, char *output, size_t size)
{
	char name[] = "/tmp/ox-kit-XXXXXX";
	OX_CLOSE int fd = mkostemp(name, O_CLOEXEC);
	posix_spawn_file_actions_t actions;
	int status = -1;
	ssize_t got;
	pid_t pid;

	if (fd < 0)
		return -1;
	unlink(name);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_adddup2(&actions, fd, 1);
	posix_spawn_file_actions_adddup2(&actions, fd, 2);
	if (posix_spawnp(&pid, argv[0], &actions, NULL, (char *const *)argv, environ) != 0 ||
	    waitpid(pid, &status, 0) != pid)
		status = -1;
	posix_spawn_file_actions_destroy(&actions);
	if (output && size > 0) {
		got = pread(fd, output, size - 1, 0);
		output[got > 0 ? got : 0] = '\0';
	}
	return status != -1 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
