/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Queues whatever their kind, and virtio-blk requests (virtio 1.3, 5.2.6).
 *
 * An id's header slot: the request header at 0, the range of a range command at 16, the status
 * byte at 48.
 */
#include "frontend.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define STATUS_AT 48u
#define RANGE_AT  16u

/* --- queues -------------------------------------------------------------------------------- */

void fe_vq_reset(struct fe_vq *vq)
{
	vq->free_head = 0;
	vq->free_count = vq->size;
	vq->in_flight = vq->next_avail = vq->last_used = vq->published = vq->kicked = 0;
	for (unsigned i = 0; i < vq->size; i++)
		vq->slot[i] = (struct fe_slot){.next = (uint16_t)(i + 1)};
	if (vq->packed)
		fe_packed_reset(vq);
	else
		fe_split_reset(vq);
}

int fe_vq_add(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in, void *cookie)
{
	return vq->packed ? fe_packed_add(vq, bufs, out, in, cookie)
	                  : fe_split_add(vq, bufs, out, in, cookie);
}

int fe_vq_next_id(const struct fe_vq *vq)
{
	return vq->free_count ? vq->free_head : -ENOSPC;
}

bool fe_vq_publish(struct fe_vq *vq)
{
	return vq->packed ? fe_packed_publish(vq) : fe_split_publish(vq);
}

void fe_vq_kick(struct fe_vq *vq)
{
	uint64_t one = 1;
	ssize_t n = write(vq->kick_fd, &one, sizeof(one));

	(void)n; /* EAGAIN: the counter is full, which is a kick too */
	vq->kicks++;
}

void fe_vq_submit(struct fe_vq *vq)
{
	if (fe_vq_publish(vq))
		fe_vq_kick(vq);
}

int fe_vq_pop(struct fe_vq *vq, void **cookie, uint32_t *len)
{
	return vq->packed ? fe_packed_pop(vq, cookie, len) : fe_split_pop(vq, cookie, len);
}

bool fe_vq_enable_call(struct fe_vq *vq)
{
	return vq->packed ? fe_packed_enable_call(vq) : fe_split_enable_call(vq);
}

void fe_vq_disable_call(struct fe_vq *vq)
{
	if (vq->packed)
		fe_packed_disable_call(vq);
	else
		fe_split_disable_call(vq);
}

int fe_vq_wait(struct fe_vq *vq, int timeout_ms)
{
	struct pollfd pfd = {.fd = vq->call_fd, .events = POLLIN};
	uint64_t count;
	ssize_t n;

	if (poll(&pfd, 1, timeout_ms) == 0)
		return -ETIMEDOUT;
	n = read(vq->call_fd, &count, sizeof(count));
	return n == sizeof(count) || errno == EAGAIN ? 0 : -errno;
}

uint32_t fe_vq_restart_base(const struct fe_vq *vq)
{
	return vq->packed ? vq->start_base : __atomic_load_n(&vq->used->idx, __ATOMIC_ACQUIRE);
}

/* --- requests ------------------------------------------------------------------------------- */

uint64_t fe_blk_header_gpa(const struct fe_vq *vq, unsigned id)
{
	return vq->header_gpa + (uint64_t)id * FE_HEADER_STRIDE;
}

uint64_t fe_blk_status_gpa(const struct fe_vq *vq, unsigned id)
{
	return fe_blk_header_gpa(vq, id) + STATUS_AT;
}

volatile uint8_t *fe_blk_status(const struct fe_vq *vq, unsigned id)
{
	return (volatile uint8_t *)vq->header + (size_t)id * FE_HEADER_STRIDE + STATUS_AT;
}

static bool device_writes_data(uint32_t type)
{
	return type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
}

int fe_blk_add(struct fe_vq *vq, uint32_t type, uint64_t sector, const struct fe_buf *data,
               unsigned count, void *cookie)
{
	struct fe_buf bufs[FE_MAX_CHAIN];
	int id = fe_vq_next_id(vq);
	struct virtio_blk_outhdr *header;
	bool in = device_writes_data(type);

	if (id < 0)
		return id;
	if (count + 2 > FE_MAX_CHAIN)
		return -EINVAL;
	header = (void *)(vq->header + (size_t)id * FE_HEADER_STRIDE);
	*header = (struct virtio_blk_outhdr){.type = type, .sector = sector};
	*fe_blk_status(vq, (unsigned)id) = 0xff;
	bufs[0] = (struct fe_buf){fe_blk_header_gpa(vq, (unsigned)id), sizeof(*header)};
	for (unsigned i = 0; i < count; i++)
		bufs[i + 1] = data[i];
	bufs[count + 1] = (struct fe_buf){fe_blk_status_gpa(vq, (unsigned)id), 1};
	return fe_vq_add(vq, bufs, in ? 1 : count + 1, in ? count + 1 : 1, cookie);
}

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

int fe_blk_drain(struct fe_vq *vq, int timeout_ms)
{
	uint64_t end = now_ms() + (uint64_t)timeout_ms;
	int count = 0;

	while (vq->in_flight) {
		void *cookie;
		int id = fe_vq_pop(vq, &cookie, NULL);

		if (id == -EAGAIN) {
			if (now_ms() > end)
				return -ETIMEDOUT;
			sched_yield();
			continue;
		}
		if (id < 0)
			return id;
		if (cookie)
			*(uint8_t *)cookie = *fe_blk_status(vq, (unsigned)id);
		count++;
	}
	return count;
}

int fe_blk_do(struct fe_vq *vq, uint32_t type, uint64_t sector, const struct fe_buf *data,
              unsigned count)
{
	uint8_t status = 0xff;
	int rc = fe_blk_add(vq, type, sector, data, count, &status);

	if (rc < 0)
		return rc;
	fe_vq_submit(vq);
	rc = fe_blk_drain(vq, vq->fe->options.timeout_ms);
	return rc < 0 ? rc : status;
}

int fe_blk_read(struct fe_vq *vq, uint64_t offset, uint64_t gpa, uint32_t len)
{
	return fe_blk_do(vq, VIRTIO_BLK_T_IN, offset / 512, &(struct fe_buf){gpa, len}, 1);
}

int fe_blk_write(struct fe_vq *vq, uint64_t offset, uint64_t gpa, uint32_t len)
{
	return fe_blk_do(vq, VIRTIO_BLK_T_OUT, offset / 512, &(struct fe_buf){gpa, len}, 1);
}

int fe_blk_flush(struct fe_vq *vq)
{
	return fe_blk_do(vq, VIRTIO_BLK_T_FLUSH, 0, NULL, 0);
}

int fe_blk_range(struct fe_vq *vq, uint32_t type, uint64_t offset, uint64_t len, uint32_t flags)
{
	int id = fe_vq_next_id(vq);
	struct virtio_blk_discard_write_zeroes *range;

	if (id < 0)
		return id;
	range = (void *)(vq->header + (size_t)id * FE_HEADER_STRIDE + RANGE_AT);
	range->sector = offset / 512;
	range->num_sectors = (uint32_t)(len / 512);
	range->flags = flags;
	return fe_blk_do(
	        vq, type, 0,
	        &(struct fe_buf){fe_blk_header_gpa(vq, (unsigned)id) + RANGE_AT, sizeof(*range)},
	        1);
}

void fe_pattern(void *buf, size_t bytes, uint64_t seed)
{
	unsigned char *p = buf;
	uint64_t x = seed * 0x9e3779b97f4a7c15ull + 0x1234567;

	for (size_t i = 0; i < bytes; i += 8) {
		size_t n = bytes - i < 8 ? bytes - i : 8;
		uint64_t z;

		/* splitmix64 */
		x += 0x9e3779b97f4a7c15ull;
		z = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
		z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
		z ^= z >> 31;
		memcpy(p + i, &z, n);
	}
}
