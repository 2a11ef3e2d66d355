/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * See util.h.
 */
#include "util.h"

struct spy spy;

static void spy_take(struct ox_channel *channel, struct ox_io *io)
{
	struct record *record = &spy.log[spy.count++ % OX_ARRAY_SIZE(spy.log)];

	*record = (struct record){
	        .op = io->op, .flags = io->flags, .offset = io->offset, .length = io->length};
	if (spy.fail_times[io->op] > 0) {
		spy.fail_times[io->op]--;
		ox_io_finish(io, -spy.fail[io->op]);
		return;
	}
	if (spy.park) {
		assert_true(spy.parked_count < OX_ARRAY_SIZE(spy.parked));
		spy.parked[spy.parked_count++] = io;
		return;
	}
	switch (io->op) {
	case OX_IO_READ:
		spy.real->read(channel, io);
		break;
	case OX_IO_WRITE:
		spy.real->write(channel, io);
		break;
	case OX_IO_FLUSH:
		spy.real->flush(channel, io);
		break;
	case OX_IO_ZERO:
		spy.real->zero(channel, io);
		break;
	default:
		spy.real->discard(channel, io);
		break;
	}
}

void spy_install(struct fixture *f)
{
	memset(&spy, 0, sizeof(spy));
	spy.store = f->disk->image->store;
	spy.real = spy.store->ops;
	spy.ops = *spy.real;
	spy.ops.read = spy_take;
	spy.ops.write = spy_take;
	spy.ops.flush = spy_take;
	spy.ops.zero = spy_take;
	spy.ops.discard = spy_take;
	spy.store->ops = &spy.ops;
}

void spy_clear(void)
{
	spy.count = 0;
}

void spy_release(void)
{
	struct ox_io *parked[OX_ARRAY_SIZE(spy.parked)];
	unsigned count = spy.parked_count;

	memcpy(parked, spy.parked, sizeof(parked));
	spy.park = false;
	spy.parked_count = 0;
	for (unsigned i = 0; i < count; i++) {
		spy.count--; /* it was written down when it came */
		spy_take(parked[i]->channel, parked[i]);
	}
}

unsigned spy_count(uint8_t op)
{
	unsigned found = 0;

	for (unsigned i = 0; i < spy.count; i++)
		found += spy.log[i].op == op;
	return found;
}

static void call_done(struct ox_request *request)
{
	struct call *call = ox_container_of(request, struct call, request);

	assert_false(call->done);
	call->done = true;
	if (call->waiter)
		ox_fiber_resume(call->waiter);
}

void call_start_flags(struct fixture *f, struct call *call, uint8_t op, uint8_t flags,
                      uint64_t offset, void *buf, uint64_t length)
{
	*call = (struct call){.iov = {.iov_base = buf, .iov_len = length}};
	call->request.op = op;
	call->request.flags = flags;
	call->request.offset = offset;
	call->request.length = length;
	call->request.iov = &call->iov;
	call->request.iovcnt = op == OX_IO_READ || op == OX_IO_WRITE;
	call->request.done = call_done;
	ox_disk_submit(f->queue, &call->request);
}

void call_start(struct fixture *f, struct call *call, uint8_t op, uint64_t offset, void *buf,
                uint64_t length)
{
	call_start_flags(f, call, op, 0, offset, buf, length);
}

int call_wait_co(struct call *call)
{
	if (!call->done) {
		call->waiter = ox_fiber_self();
		ox_fiber_suspend();
	}
	assert_true(call->done);
	return call->request.result;
}

int run_co(struct fixture *f, uint8_t op, uint64_t offset, void *buf, uint64_t length)
{
	struct call call;

	call_start(f, &call, op, offset, buf, length);
	return call_wait_co(&call);
}

void fixture_activate_co(struct fixture *f)
{
	struct ox_error err = {0};

	if (ox_disk_activate_co(f->disk, &err) < 0)
		fail_msg("activate: %s", err.text);
	f->queue = ox_disk_get_queue(f->disk, f->loop);
	assert_non_null(f->queue);
	spy_install(f);
}

void fixture_deactivate_co(struct fixture *f)
{
	ox_disk_deactivate_co(f->disk);
	f->queue = NULL;
}

struct body {
	struct fixture *fixture;
	void (*fn_co)(struct fixture *f);
};

static void body_co(void *arg)
{
	struct body *body = arg;

	fixture_activate_co(body->fixture);
	body->fn_co(body->fixture);
	if (body->fixture->queue)
		fixture_deactivate_co(body->fixture);
}

void fixture_run(void (*fn_co)(struct fixture *f), void (*change)(struct ox_disk_options *o))
{
	struct ox_loop_options loop_options = {.name = "test"};
	struct ox_error err = {0};
	struct fixture f = {0};
	struct body body = {.fixture = &f, .fn_co = fn_co};

	f.loop = ox_loop_new(&loop_options, &err);
	assert_non_null(f.loop);
	f.loops[0] = f.loop;
	ox_disk_options_init(&f.options);
	f.options.path = "memory:disk-test:1M";
	f.options.format = "raw";
	f.options.cache = OX_CACHE_WRITEBACK;
	f.options.main = f.loop;
	f.options.loops = f.loops;
	f.options.loop_count = 1;
	if (change)
		change(&f.options);
	if (ox_disk_open(&f.options, &f.disk, &err) < 0)
		fail_msg("open: %s", err.text);
	ox_loop_run_fiber(f.loop, body_co, &body);
	ox_disk_close(f.disk);
	ox_loop_free(f.loop);
	ox_fiber_pool_free();
	ox_memory_forget("disk-test");
}
