/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The hit path between a virtqueue and the disk: pop, parse, submit; complete, push, notify.
 *
 * Slots.  A request lives in a slot, one for each entry of the ring, in memory that is mapped
 * at the start and touched only as far as requests were ever in flight at once (an idle disk
 * stays small).  Free slots are a stack, so a shallow queue uses the same few again and again.
 * A chain of more than INLINE_IOV buffers borrows a wide list from the ring's pool; nothing else
 * on this path allocates.
 *
 * Invariants (on the loop's thread):
 *  1. A slot is busy from the pop to the push; ring->in_flight counts them.
 *  2. `taking` false: nothing is popped.  It never becomes true again: a ring that has to go on
 *     elsewhere (other memory, other log) is stopped and started anew.
 *  3. What was pushed is published at once; a notification that the driver wants follows at once
 *     or by the deferred call of the same turn.
 *  4. The status byte and the dirty bits are written before the push.
 *  5. A broken ring pops nothing; what is in flight ends as usual.
 *
 * Crash ordering is the virtqueue's: a chain is in the inflight region before it is submitted
 * and leaves it after its used element is visible, so a killed process repeats what the driver
 * has not seen complete.
 */
#include "export/vhost_user_ring.h"

#include "base/fiber.h"
#include "base/iov.h"

#include <oxbow/log.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Header, status and a 16 KiB transfer of scattered pages. */
#define INLINE_IOV 6u
/* Chains taken in one go before other sources of the loop get their turn. */
#define POLL_BUDGET 64u
/* While waiting for the end of requests: how often to look for newly held ones, and when to
 * tell the operator. */
#define DRAIN_LOOK_NS 100000000ull
#define DRAIN_TELL_NS 20000000000ull

struct wide_list {
	struct wide_list *next;
	struct iovec iov[OX_VQ_MAX_CHAIN];
	uint64_t guest_addr[OX_VQ_MAX_CHAIN];
};

struct slot {
	struct ox_request request;
	struct ox_vq_chain chain;
	struct ox_blk_command command;
	struct ox_vu_ring *ring;
	struct slot *next_free;
	struct wide_list *wide;
	uint8_t range; /* the one being carried out */
	bool busy;
	struct iovec iov[INLINE_IOV];
	uint64_t guest_addr[INLINE_IOV];
};

struct ox_vu_ring {
	struct ox_poller poller;
	struct ox_vq vq;
	struct ox_disk_queue *queue;
	struct slot *free;
	struct slot *slots;
	uint32_t fresh; /* slots from here on were never used */
	uint32_t in_flight;
	bool taking;
	bool broken;
	bool last_was_wide;
	struct wide_list *wide_free;
	struct ox_dirty_log *log;
	struct ox_deferred publish;
	int call_fd, err_fd;
	bool call_may_block;

	struct ox_blk_limits limits;
	struct ox_inflight inflight;
	struct ox_watch kick;
	struct ox_loop *loop;
	size_t slots_bytes;
	struct ox_fiber *waiter; /* suspended until nothing is in flight */
	struct ox_timer drain_timer;
	unsigned index;
	const char *name;
};

/* --- descriptors of the client ----------------------------------------------------------- */

int ox_vu_ring_check_fd(int fd, bool reading, struct ox_error *err)
{
	struct stat st;
	int flags;

	if (fstat(fd, &st) < 0)
		return ox_error_set(err, errno, "event descriptor: %s", strerror(errno));
	/* An eventfd has an anonymous inode, whose mode names no type. */
	if ((st.st_mode & S_IFMT) != 0 && !S_ISFIFO(st.st_mode))
		return ox_error_set(err, EINVAL,
		                    "event descriptor is neither an eventfd nor a pipe");
	flags = fcntl(fd, F_GETFL);
	if (flags < 0)
		return ox_error_set(err, errno, "event descriptor: %s", strerror(errno));
	/* The client shares an eventfd's flags with us, and may wait for a call in a blocking
	 * read; so a call eventfd keeps its flags.  Nobody waits in a write of a kick. */
	if (!(flags & O_NONBLOCK) && (reading || S_ISFIFO(st.st_mode)) &&
	    fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return ox_error_set(err, errno, "event descriptor: %s", strerror(errno));
	return 0;
}

static bool may_block(int fd)
{
	int flags = fd < 0 ? 0 : fcntl(fd, F_GETFL);

	return fd >= 0 && (flags < 0 || !(flags & O_NONBLOCK));
}

/* A full pipe or counter has told the client enough: whatever write answers is right. */
static void signal_fd(int fd, bool blocking)
{
	static const uint64_t one = 1;

	if (fd < 0)
		return;
	if (ox_unlikely(blocking)) {
		struct pollfd room = {.fd = fd, .events = POLLOUT};

		if (poll(&room, 1, 0) != 1 || !(room.revents & POLLOUT))
			return;
	}
	if (write(fd, &one, sizeof(one)) < 0)
		return;
}

static void kick_ready(struct ox_watch *watch, uint32_t revents)
{
	uint64_t buf[64]; /* a pipe may hold several */
	struct iovec iov = {buf, sizeof(buf)};
	struct ox_vu_ring *ring = ox_container_of(watch, struct ox_vu_ring, kick);
	ssize_t n;

	/* The client may have made it blocking again, and read it empty: do not wait here. */
	n = preadv2(watch->fd, &iov, 1, -1, RWF_NOWAIT);
	if (n < 0 && (errno == EOPNOTSUPP || errno == EINVAL))
		n = read(watch->fd, buf, sizeof(buf));
	if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
		return;
	/* The pipe's other end is closed, or it is nothing that kicks: no busy loop for that. */
	ox_log(OX_LOG_WARNING,
	       "%s: queue %u: the kick descriptor broke; the ring is polled no more", ring->name,
	       ring->index);
	ox_watch_remove(watch);
}

/* --- slots ------------------------------------------------------------------------------- */

static struct slot *slot_take(struct ox_vu_ring *ring)
{
	struct slot *slot = ring->free;

	if (ox_likely(slot)) {
		ring->free = slot->next_free;
		return slot;
	}
	if (ring->fresh == ring->vq.config.size)
		return NULL;
	slot = &ring->slots[ring->fresh++];
	slot->ring = ring;
	return slot;
}

static void slot_put(struct ox_vu_ring *ring, struct slot *slot)
{
	if (ox_unlikely(slot->wide)) {
		slot->wide->next = ring->wide_free;
		ring->wide_free = slot->wide;
		slot->wide = NULL;
	}
	slot->busy = false;
	slot->next_free = ring->free;
	ring->free = slot;
}

static bool slot_widen(struct ox_vu_ring *ring, struct slot *slot)
{
	struct wide_list *wide = ring->wide_free;

	if (wide)
		ring->wide_free = wide->next;
	else
		wide = malloc(sizeof(*wide));
	if (!wide)
		return false;
	slot->wide = wide;
	slot->chain.iov = wide->iov;
	slot->chain.guest_addr = ring->log ? wide->guest_addr : NULL;
	slot->chain.capacity = OX_VQ_MAX_CHAIN;
	return true;
}

static void slot_prepare(struct ox_vu_ring *ring, struct slot *slot)
{
	/* Large requests come in rows: spare them the look that finds the small list too small. */
	if (ring->last_was_wide && ring->wide_free && slot_widen(ring, slot))
		return;
	slot->chain.iov = slot->iov;
	slot->chain.guest_addr = ring->log ? slot->guest_addr : NULL;
	slot->chain.capacity = INLINE_IOV;
}

/* --- completion -------------------------------------------------------------------------- */

static void break_ring(struct ox_vu_ring *ring, const char *why)
{
	ring->taking = false;
	if (ring->broken)
		return;
	ring->broken = true;
	ox_log(OX_LOG_WARNING,
	       "%s: queue %u is broken until the guest resets the device: %s; other queues go on",
	       ring->name, ring->index, why);
	signal_fd(ring->err_fd, may_block(ring->err_fd));
	ox_loop_defer(ring->loop, &ring->publish);
}

static void log_buffers(struct ox_vu_ring *ring, const struct slot *slot)
{
	const struct ox_vq_chain *chain = &slot->chain;
	unsigned status = slot->command.status_entry;

	/* The list lost its status byte when it was parsed. */
	for (unsigned i = chain->out_count; i < chain->out_count + chain->in_count; i++)
		ox_dirty_log_mark(ring->log, chain->guest_addr[i],
		                  chain->iov[i].iov_len + (i == status));
}

static void complete(struct ox_vu_ring *ring, struct slot *slot, uint8_t status)
{
	*(volatile uint8_t *)slot->command.status = status;
	if (ox_unlikely(ring->log))
		log_buffers(ring, slot);
	ox_vq_push(&ring->vq, &slot->chain, (uint32_t)slot->chain.in_bytes);
	/* Visible at once, and the first completion of a turn wakes a sleeping driver at once: it
	 * works on while this turn completes the rest.  More notifications only follow, at the
	 * turn's end, if the driver has asked for them again by then. */
	if (ox_likely(!ring->broken)) {
		if (ring->publish.scheduled)
			ox_vq_flush(&ring->vq);
		else if (ox_vq_should_notify(&ring->vq))
			signal_fd(ring->call_fd, ring->call_may_block);
	}
	ring->in_flight--;
	slot_put(ring, slot);
	ox_loop_defer(ring->loop, &ring->publish);
}

static void publish(struct ox_deferred *deferred)
{
	struct ox_vu_ring *ring = ox_container_of(deferred, struct ox_vu_ring, publish);
	struct ox_fiber *waiter = ring->waiter;

	if (ox_unlikely(ring->broken))
		ox_watch_remove(&ring->kick);
	if (ox_vq_should_notify(&ring->vq))
		signal_fd(ring->call_fd, ring->call_may_block);
	if (ox_unlikely(waiter && !ring->in_flight)) {
		ring->waiter = NULL;
		ox_fiber_resume(waiter); /* the ring may be gone now */
	}
}

static void submit(struct ox_vu_ring *ring, struct slot *slot)
{
	struct ox_request *request = &slot->request;
	const struct ox_blk_command *command = &slot->command;

	request->op = command->op;
	request->flags = command->flags;
	request->offset = command->offset;
	request->length = command->length;
	request->iov = command->iov;
	request->iovcnt = command->iovcnt;
	if (ox_unlikely(command->ranges)) {
		request->iov = NULL;
		request->iovcnt = 0;
	}
	ox_disk_submit(ring->queue, request);
}

/* Goes on with a command of several ranges, skipping empty ones. */
static void submit_range(struct ox_vu_ring *ring, struct slot *slot)
{
	for (; slot->range < slot->command.ranges; slot->range++) {
		uint8_t status = ox_blk_range(&slot->command, &ring->limits, slot->range);

		if (status != VIRTIO_BLK_S_OK) {
			complete(ring, slot, status);
			return;
		}
		if (slot->command.length) {
			submit(ring, slot);
			return;
		}
	}
	complete(ring, slot, VIRTIO_BLK_S_OK);
}

static void request_done(struct ox_request *request)
{
	struct slot *slot = ox_container_of(request, struct slot, request);
	struct ox_vu_ring *ring = slot->ring;

	if (ox_unlikely(slot->command.ranges) && request->result == 0) {
		slot->range++;
		submit_range(ring, slot);
		return;
	}
	complete(ring, slot, ox_blk_status(request->result));
}

/* --- taking ------------------------------------------------------------------------------ */

static void start_request(struct ox_vu_ring *ring, struct slot *slot)
{
	ring->in_flight++;
	slot->busy = true;
	slot->request.done = request_done;
	switch (ox_blk_parse(&slot->chain, &ring->limits, &slot->command)) {
	case OX_BLK_SUBMIT:
		if (ox_unlikely(slot->command.ranges)) {
			slot->range = 0;
			submit_range(ring, slot);
		} else {
			submit(ring, slot);
		}
		break;
	case OX_BLK_ANSWER:
		complete(ring, slot, slot->command.answer);
		break;
	case OX_BLK_MALFORMED:
		/* There is no place for an answer. */
		ring->in_flight--;
		slot_put(ring, slot);
		break_ring(ring, "a request without a header or without room for its status");
		break;
	}
}

/* 1: a request was started; 0: nothing there, or no room for it now; < 0: broken. */
static int take_one(struct ox_vu_ring *ring)
{
	struct slot *slot = slot_take(ring);
	int rc;

	if (ox_unlikely(!slot))
		return 0;
	slot_prepare(ring, slot);
	rc = ox_vq_pop(&ring->vq, &slot->chain);
	if (ox_unlikely(rc == -ENOBUFS))
		rc = slot_widen(ring, slot) ? ox_vq_pop(&ring->vq, &slot->chain) : -ENOMEM;
	if (ox_likely(rc == 1)) {
		ring->last_was_wide = slot->chain.out_count + slot->chain.in_count > INLINE_IOV;
		start_request(ring, slot);
		return 1;
	}
	slot_put(ring, slot);
	if (rc == -EPROTO)
		break_ring(ring, ring->vq.error);
	else if (rc == -ENOMEM && !ring->in_flight)
		break_ring(ring, "no memory for a request"); /* nothing would wake it up */
	else if (rc < 0 && rc != -ENOMEM)
		break_ring(ring, "a chain that is too long");
	return ring->broken ? -EPROTO : 0;
}

static bool ring_poll(struct ox_poller *poller)
{
	struct ox_vu_ring *ring = ox_container_of(poller, struct ox_vu_ring, poller);
	unsigned taken = 0;

	while (taken < POLL_BUDGET && ring->taking && take_one(ring) == 1)
		taken++;
	if (taken && ox_unlikely(ox_memory_is_broken(ring->vq.config.memory)))
		break_ring(ring, "the client took guest memory away");
	return taken;
}

static bool ring_sleep(struct ox_poller *poller)
{
	struct ox_vu_ring *ring = ox_container_of(poller, struct ox_vu_ring, poller);

	if (!ring->taking)
		return false;
	/* All slots are in use: a completion will wake the loop, a kick could change nothing. */
	if (!ring->free && ring->fresh == ring->vq.config.size)
		return false;
	if (ring->kick.fd < 0)
		return true;
	return ox_vq_enable_notify(&ring->vq);
}

static void ring_wake(struct ox_poller *poller)
{
	struct ox_vu_ring *ring = ox_container_of(poller, struct ox_vu_ring, poller);

	if (ring->taking)
		ox_vq_disable_notify(&ring->vq);
}

/* --- start ------------------------------------------------------------------------------- */

/* What an earlier run took and did not finish comes before anything new. */
static int resume_inflight(struct ox_vu_ring *ring)
{
	OX_FREE uint16_t *index = calloc(ring->vq.config.size, sizeof(*index));
	unsigned count;

	if (!index)
		return -ENOMEM;
	count = ox_vq_resume(&ring->vq, index);
	if (count)
		ox_log(OX_LOG_INFO, "%s: queue %u: taking up %u unfinished requests", ring->name,
		       ring->index, count);
	for (unsigned i = 0; i < count && !ring->broken; i++) {
		struct slot *slot = slot_take(ring);
		int rc = -ENOBUFS;

		if (slot) {
			slot_prepare(ring, slot);
			rc = ox_vq_pop_inflight(&ring->vq, index[i], &slot->chain);
			if (rc == -ENOBUFS && slot_widen(ring, slot))
				rc = ox_vq_pop_inflight(&ring->vq, index[i], &slot->chain);
		}
		if (rc == 1) {
			start_request(ring, slot);
			continue;
		}
		if (slot)
			slot_put(ring, slot);
		break_ring(ring, rc == -EPROTO ? ring->vq.error : "no room to resume a request");
	}
	return (int)count;
}

static void free_ring_memory(struct ox_vu_ring *ring)
{
	while (ring->wide_free) {
		struct wide_list *wide = ring->wide_free;

		ring->wide_free = wide->next;
		free(wide);
	}
	if (ring->slots)
		munmap(ring->slots, ring->slots_bytes);
	ring->slots = NULL;
	ox_dirty_log_put(ring->log);
	ring->log = NULL;
}

struct start_call {
	struct ox_vu_ring *ring;
	struct ox_vq_config config;
	struct ox_error err;
	int rc;
};

static void start_on_loop(void *arg)
{
	struct start_call *call = arg;
	struct ox_vu_ring *ring = call->ring;
	int resumed;

	call->rc = ox_vq_init(&ring->vq, &call->config, &call->err);
	if (call->rc < 0)
		return;
	if (ring->kick.fd >= 0) {
		call->rc = ox_watch_add(ring->loop, &ring->kick);
		if (call->rc < 0) {
			ox_error_set(&call->err, -call->rc, "kick descriptor: %s",
			             strerror(-call->rc));
			ox_vq_destroy(&ring->vq);
			return;
		}
	}
	ring->taking = true;
	ox_poller_add(ring->loop, &ring->poller);
	resumed = resume_inflight(ring);
	if (resumed < 0)
		break_ring(ring, "no memory to resume requests");
	/* A process that was killed may have published and not notified. */
	if (resumed > 0 || ring->vq.last_used)
		signal_fd(ring->call_fd, ring->call_may_block);
}

int ox_vu_ring_start_co(const struct ox_vu_ring_setup *setup, struct ox_vu_ring **out,
                        struct ox_error *err)
{
	struct ox_vu_ring *ring = ox_xcalloc(1, sizeof(*ring));
	struct start_call call = {.ring = ring, .config = setup->config};

	*out = NULL;
	ring->poller.poll = ring_poll;
	ring->poller.sleep = ring_sleep;
	ring->poller.wake = ring_wake;
	ring->publish.fn = publish;
	ring->kick.fn = kick_ready;
	ring->kick.events = EPOLLIN;
	ring->kick.fd = setup->kick_fd;
	ring->call_fd = setup->call_fd;
	ring->call_may_block = may_block(setup->call_fd);
	ring->err_fd = setup->err_fd;
	ring->queue = setup->queue;
	ring->limits = setup->limits;
	ring->loop = setup->loop;
	ring->index = setup->index;
	ring->name = setup->name;
	ring->log = ox_dirty_log_get(setup->log);
	if (setup->inflight_area) {
		ox_inflight_attach(&ring->inflight, setup->inflight_area, setup->config.packed,
		                   setup->inflight_size, setup->inflight_broken);
		call.config.inflight = &ring->inflight;
	}
	ring->slots_bytes = (size_t)setup->config.size * sizeof(struct slot);
	ring->slots = mmap(NULL, ring->slots_bytes, PROT_READ | PROT_WRITE,
	                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ring->slots == MAP_FAILED) {
		ring->slots = NULL;
		call.rc = ox_error_set(err, ENOMEM, "queue %u: no memory for its requests",
		                       setup->index);
	} else {
		ox_loop_call_co(ring->loop, start_on_loop, &call);
		if (call.rc < 0)
			ox_error_set(err, -call.rc, "queue %u: %s", setup->index, call.err.text);
	}
	if (call.rc < 0) {
		free_ring_memory(ring);
		free(ring);
		return call.rc;
	}
	*out = ring;
	return 0;
}

/* --- stop -------------------------------------------------------------------------------- */

static void quiesce_on_loop(void *arg)
{
	struct ox_vu_ring *ring = arg;

	if (!ring->poller.poll)
		return; /* done before */
	ring->taking = false;
	ox_poller_remove(&ring->poller);
	ring->poller.poll = NULL;
	ox_watch_remove(&ring->kick);
}

void ox_vu_ring_quiesce_co(struct ox_vu_ring *ring)
{
	ox_loop_call_co(ring->loop, quiesce_on_loop, ring);
}

/* Requests that the error policy holds would keep the guest's stop waiting for the operator. */
static void take_back_held(struct ox_vu_ring *ring)
{
	for (uint32_t i = 0; i < ring->fresh; i++) {
		struct slot *slot = &ring->slots[i];

		if (!slot->busy || !ox_disk_take_held(ring->queue, &slot->request))
			continue;
		if (ring->inflight.area) {
			/* The region still has it: the next start submits it again. */
			ring->in_flight--;
			slot_put(ring, slot);
		} else {
			complete(ring, slot, VIRTIO_BLK_S_IOERR);
		}
	}
}

static void drain_look(struct ox_timer *timer)
{
	struct ox_vu_ring *ring = ox_container_of(timer, struct ox_vu_ring, drain_timer);
	struct ox_fiber *waiter = ring->waiter;

	ring->waiter = NULL;
	if (waiter)
		ox_fiber_resume(waiter);
}

/* The end is not bounded: a request that is in the kernel may still write to guest memory, so
 * neither the memory nor the ring can be given up before it ends. */
static void drain_co(struct ox_vu_ring *ring)
{
	uint64_t began = ox_clock_ns();
	bool told = false;

	ring->drain_timer.fn = drain_look;
	for (;;) {
		take_back_held(ring);
		if (!ring->in_flight)
			return;
		ring->waiter = ox_fiber_self();
		ox_timer_arm(ring->loop, &ring->drain_timer, DRAIN_LOOK_NS);
		ox_fiber_suspend();
		ox_timer_cancel(&ring->drain_timer);
		if (!told && ring->in_flight && ox_clock_ns() - began > DRAIN_TELL_NS) {
			told = true;
			ox_log(OX_LOG_WARNING,
			       "%s: queue %u cannot stop: %u requests have not come back from "
			       "the host's storage for %u s; waiting on",
			       ring->name, ring->index, ring->in_flight,
			       (unsigned)(DRAIN_TELL_NS / 1000000000u));
		}
	}
}

struct stop_call {
	struct ox_vu_ring *ring;
	uint32_t base;
};

static void stop_on_loop_co(void *arg)
{
	struct stop_call *call = arg;
	struct ox_vu_ring *ring = call->ring;

	quiesce_on_loop(ring);
	drain_co(ring);
	ox_deferred_cancel(ring->loop, &ring->publish);
	if (ox_vq_should_notify(&ring->vq))
		signal_fd(ring->call_fd, ring->call_may_block);
	call->base = ox_vq_stop(&ring->vq);
	ox_vq_destroy(&ring->vq);
	free_ring_memory(ring);
}

uint32_t ox_vu_ring_stop_co(struct ox_vu_ring *ring)
{
	struct stop_call call = {.ring = ring};

	ox_loop_call_fiber_co(ring->loop, stop_on_loop_co, &call);
	free(ring);
	return call.base;
}

/* --- changes while it runs --------------------------------------------------------------- */

struct fd_call {
	struct ox_vu_ring *ring;
	enum ox_vu_ring_fd which;
	int fd;
	int rc;
};

static void set_fd_on_loop(void *arg)
{
	struct fd_call *call = arg;
	struct ox_vu_ring *ring = call->ring;

	switch (call->which) {
	case OX_VU_RING_KICK:
		ox_watch_remove(&ring->kick);
		ring->kick.fd = call->fd;
		if (call->fd >= 0 && ring->taking)
			call->rc = ox_watch_add(ring->loop, &ring->kick);
		break;
	case OX_VU_RING_CALL:
		ring->call_fd = call->fd;
		ring->call_may_block = may_block(call->fd);
		/* The front end may have missed what the old descriptor was told. */
		signal_fd(ring->call_fd, ring->call_may_block);
		break;
	case OX_VU_RING_ERR:
		ring->err_fd = call->fd;
		if (ring->broken)
			signal_fd(ring->err_fd, may_block(ring->err_fd));
		break;
	}
}

int ox_vu_ring_set_fd_co(struct ox_vu_ring *ring, enum ox_vu_ring_fd which, int fd,
                         struct ox_error *err)
{
	struct fd_call call = {.ring = ring, .which = which, .fd = fd};

	ox_loop_call_co(ring->loop, set_fd_on_loop, &call);
	if (call.rc < 0)
		return ox_error_set(err, -call.rc, "queue %u: kick descriptor: %s", ring->index,
		                    strerror(-call.rc));
	return 0;
}

struct memory_call {
	struct ox_vu_ring *ring;
	struct ox_memory *memory;
	void *desc, *driver, *device;
};

static void set_memory_on_loop(void *arg)
{
	struct memory_call *call = arg;

	if (!call->ring->broken)
		ox_vq_set_memory(&call->ring->vq, call->memory, call->desc, call->driver,
		                 call->device);
}

void ox_vu_ring_set_memory_co(struct ox_vu_ring *ring, struct ox_memory *memory, void *desc,
                              void *driver, void *device)
{
	struct memory_call call = {ring, memory, desc, driver, device};

	ox_loop_call_co(ring->loop, set_memory_on_loop, &call);
}
