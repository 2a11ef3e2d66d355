/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * See device.h.
 */
#include "device.h"

#include "base/fiber.h"
#include "disk/disk_private.h"
#include "store/memory.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* --- the device -------------------------------------------------------------------------- */

static struct ox_iothread *start_thread(const char *name)
{
	const struct ox_loop_options options = {.name = name};
	struct ox_error err = {0};
	struct ox_iothread *thread = ox_iothread_start(&options, &err);

	if (!thread)
		fail_msg("%s", err.text);
	return thread;
}

struct loop_call {
	struct ox_post post;
	void (*fn_co)(void *arg);
	void *arg;
	sem_t done;
};

static void loop_call_body(void *arg)
{
	struct loop_call *call = arg;

	call->fn_co(call->arg);
	sem_post(&call->done);
}

static void loop_call_arrived(struct ox_post *post)
{
	if (ox_fiber_start(loop_call_body, ox_container_of(post, struct loop_call, post)) < 0)
		abort();
}

/* Runs fn_co(arg) in a fiber of a loop that runs on another thread. */
static void call_on_loop(struct ox_loop *loop, void (*fn_co)(void *arg), void *arg)
{
	struct loop_call call = {.post.fn = loop_call_arrived, .fn_co = fn_co, .arg = arg};

	sem_init(&call.done, 0, 0);
	ox_loop_post(loop, &call.post);
	while (sem_wait(&call.done) < 0)
		;
	sem_destroy(&call.done);
}

void device_call(struct device *d, void (*fn_co)(void *arg), void *arg)
{
	call_on_loop(ox_iothread_loop(d->main), fn_co, arg);
}

struct up {
	struct device *d;
	void (*adjust)(struct ox_disk_options *options);
	struct ox_error err;
};

static void up_co(void *arg)
{
	struct up *up = arg;
	struct device *d = up->d;
	struct ox_disk_options options;
	struct ox_vhost_user_blk_options export = {
	        .socket_path = d->socket,
	        .fd = -1,
	        .main = ox_iothread_loop(d->main),
	        .loops = d->loops,
	        .loop_count = 2,
	};

	ox_disk_options_init(&options);
	options.path = "memory:device:16M";
	options.name = "device";
	options.format = "raw";
	options.cache = OX_CACHE_WRITEBACK;
	options.main = ox_iothread_loop(d->main);
	options.loops = d->loops;
	options.loop_count = 2;
	options.opener = &ox_opener_direct;
	if (up->adjust)
		up->adjust(&options);
	if (ox_disk_open(&options, &d->disk, &up->err) < 0)
		return;
	export.disk = d->disk;
	if (ox_vhost_user_blk_new(&export, &d->export, &up->err) < 0)
		ox_disk_close(d->disk);
}

void device_up(struct device *d, void (*adjust)(struct ox_disk_options *options))
{
	struct up up = {.d = d, .adjust = adjust};

	memset(d, 0, sizeof(*d));
	strcpy(d->directory, "/tmp/oxbow-export-XXXXXX");
	assert_non_null(mkdtemp(d->directory));
	snprintf(d->socket, sizeof(d->socket), "%s/s", d->directory);
	d->main = start_thread("main");
	for (unsigned i = 0; i < 2; i++) {
		d->io[i] = start_thread(i ? "io1" : "io0");
		d->loops[i] = ox_iothread_loop(d->io[i]);
	}
	device_call(d, up_co, &up);
	if (!d->export)
		fail_msg("%s", up.err.text);
}

static void down_co(void *arg)
{
	struct device *d = arg;

	ox_export_stop_co(d->export);
	ox_export_free(d->export);
	ox_disk_close(d->disk);
}

void device_down(struct device *d)
{
	device_call(d, down_co, d);
	for (unsigned i = 0; i < 2; i++)
		ox_iothread_stop(d->io[i]);
	ox_iothread_stop(d->main);
	ox_memory_forget("device");
	/* The export took its socket away. */
	assert_int_equal(rmdir(d->directory), 0);
}

struct info_call {
	struct device *d;
	struct ox_export_info export;
	struct ox_disk_info disk;
};

static void info_co(void *arg)
{
	struct info_call *call = arg;

	ox_export_get_info(call->d->export, &call->export);
	ox_disk_get_info(call->d->disk, &call->disk);
}

struct ox_export_info device_info(struct device *d)
{
	struct info_call call = {.d = d};

	device_call(d, info_co, &call);
	return call.export;
}

struct ox_disk_info device_disk_info(struct device *d)
{
	struct info_call call = {.d = d};

	device_call(d, info_co, &call);
	return call.disk;
}

void device_wait_idle(struct device *d)
{
	while (device_info(d).connected)
		usleep(1000);
}

void fe_ok(struct fe *fe, int rc)
{
	if (rc)
		fail_msg("%s (%d)", fe->error[0] ? fe->error : strerror(-rc), rc);
}

struct fe *device_front_end(struct device *d, void (*adjust)(struct fe_options *options))
{
	struct fe_options options;
	struct fe *fe;

	fe_options_init(&options, d->socket);
	if (adjust)
		adjust(&options);
	fe = fe_new(&options);
	fe_ok(fe, fe_start(fe));
	return fe;
}

/* --- the spy ------------------------------------------------------------------------------ */

#define SPY_PARKED_MAX 256u

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	const struct ox_store_ops *real;
	struct ox_store_ops ops;
	bool park;
	struct ox_io *parked[SPY_PARKED_MAX];
	unsigned parked_count, writes;
	int fail_writes;
} spy = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void spy_pass(struct ox_channel *channel, struct ox_io *io)
{
	if (io->op == OX_IO_READ)
		spy.real->read(channel, io);
	else
		spy.real->write(channel, io);
}

static void spy_take(struct ox_channel *channel, struct ox_io *io)
{
	int fail = 0;
	bool parked = false;

	pthread_mutex_lock(&spy.lock);
	if (io->op == OX_IO_WRITE) {
		spy.writes++;
		fail = spy.fail_writes;
	}
	if (spy.park && spy.parked_count < SPY_PARKED_MAX) {
		spy.parked[spy.parked_count++] = io;
		parked = true;
	}
	pthread_cond_broadcast(&spy.changed);
	pthread_mutex_unlock(&spy.lock);
	if (parked)
		return;
	if (fail)
		ox_io_finish(io, -fail);
	else
		spy_pass(channel, io);
}

static void install_co(void *arg)
{
	struct device *d = arg;
	struct ox_store *store = d->disk->image->store;

	spy.park = false;
	spy.parked_count = spy.writes = 0;
	spy.fail_writes = 0;
	spy.real = store->ops;
	spy.ops = *spy.real;
	spy.ops.read = spy_take;
	spy.ops.write = spy_take;
	store->ops = &spy.ops;
}

static void nothing_co(void *arg)
{
}

void spy_install(struct device *d)
{
	device_call(d, install_co, d);
	/* The I/O threads see it from their next turn on. */
	for (unsigned i = 0; i < 2; i++)
		call_on_loop(d->loops[i], nothing_co, NULL);
}

void spy_park(bool on)
{
	pthread_mutex_lock(&spy.lock);
	spy.park = on;
	pthread_mutex_unlock(&spy.lock);
}

void spy_fail_writes(int code)
{
	pthread_mutex_lock(&spy.lock);
	spy.fail_writes = code;
	pthread_mutex_unlock(&spy.lock);
}

unsigned spy_writes(void)
{
	unsigned writes;

	pthread_mutex_lock(&spy.lock);
	writes = spy.writes;
	pthread_mutex_unlock(&spy.lock);
	return writes;
}

void spy_wait_parked(unsigned count)
{
	pthread_mutex_lock(&spy.lock);
	while (spy.parked_count < count)
		pthread_cond_wait(&spy.changed, &spy.lock);
	pthread_mutex_unlock(&spy.lock);
}

static void release_co(void *arg)
{
	struct ox_io *io = arg;

	spy_pass(io->channel, io);
}

void spy_release(void)
{
	struct ox_io *parked[SPY_PARKED_MAX];
	unsigned count;

	pthread_mutex_lock(&spy.lock);
	spy.park = false;
	count = spy.parked_count;
	memcpy(parked, spy.parked, sizeof(parked));
	spy.parked_count = 0;
	pthread_mutex_unlock(&spy.lock);
	for (unsigned i = 0; i < count; i++)
		call_on_loop(parked[i]->channel->loop, release_co, parked[i]);
}
