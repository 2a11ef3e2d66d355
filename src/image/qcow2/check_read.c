/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Metadata from the store for a check: tables lie apart from each other, a data region between
 * each, so that reading them one after the other would wait for the disk most of the time.
 * Several reads are in flight; they are used in the order in which they were asked for.
 *
 * One fiber of the channel's thread; completions come on the same thread.
 */
#include "image/qcow2/check.h"
#include "base/byteorder.h"
#include "base/fiber.h"
#include <errno.h>
#include <string.h>

#define READ_BUFFERS (4u << 20) /* bytes for all reads that are in flight */
#define READ_SLOTS   16u

struct slot {
	struct check_piece piece;
	struct ox_io io;
	struct iovec iov;
	uint8_t *buf;
	bool done;
	struct reader *reader;
};

struct reader {
	struct qcow2_check *c;
	struct slot slots[READ_SLOTS];
	unsigned slot_count;
	uint32_t piece_bytes;
	unsigned head, busy; /* the oldest; how many are in use */
	struct slot *waiting_for;
	struct ox_fiber *fiber;
};

/* How many of the bytes are in the file. */
static uint64_t bytes_in_file(const struct qcow2_check *c, uint64_t offset, uint64_t bytes)
{
	return offset >= c->file_bytes ? 0 : ox_min(bytes, c->file_bytes - offset);
}

int check_read_co(struct qcow2_check *c, uint64_t offset, void *buf, size_t bytes)
{
	uint64_t there = bytes_in_file(c, offset, bytes);

	memset((uint8_t *)buf + there, 0, bytes - there);
	return there ? ox_store_read_co(c->channel->store, offset, buf, there) : 0;
}

int check_read_table_co(struct qcow2_check *c, uint64_t offset, uint32_t entries, uint64_t **table)
{
	size_t bytes = (size_t)entries * 8;
	uint64_t *t;
	int rc;

	*table = NULL;
	if (!entries)
		return 0;
	if (posix_memalign((void **)&t, 4096, ox_align_up(bytes, 4096)))
		return -ENOMEM;
	rc = check_read_co(c, offset, t, bytes);
	if (rc < 0) {
		free(t);
		return rc;
	}
	for (uint32_t i = 0; i < entries; i++)
		t[i] = be64toh(t[i]);
	*table = t;
	return 0;
}

static void slot_done(struct ox_io *io)
{
	struct slot *slot = ox_container_of(io, struct slot, io);
	struct reader *r = slot->reader;

	slot->done = true;
	if (r->waiting_for == slot) {
		r->waiting_for = NULL;
		ox_fiber_resume(r->fiber);
	}
}

static void slot_start(struct reader *r, struct slot *slot)
{
	struct qcow2_check *c = r->c;
	uint64_t there = bytes_in_file(c, slot->piece.offset, slot->piece.bytes);

	memset(slot->buf + there, 0, slot->piece.bytes - there);
	slot->done = there == 0;
	slot->io = (struct ox_io){.op = OX_IO_READ, .offset = slot->piece.offset, .length = there};
	if (slot->done)
		return;
	slot->iov = (struct iovec){.iov_base = slot->buf, .iov_len = there};
	slot->io.iov = &slot->iov;
	slot->io.iovcnt = 1;
	slot->io.done = slot_done;
	ox_store_submit(c->channel->store, &slot->io);
}

static void slot_wait_co(struct reader *r, struct slot *slot)
{
	while (!slot->done) {
		r->waiting_for = slot;
		ox_fiber_suspend();
	}
}

static struct reader *reader_new(struct qcow2_check *c)
{
	struct reader *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	r->c = c;
	r->fiber = ox_fiber_self();
	r->piece_bytes = ox_max((uint32_t)CHECK_PIECE, c->cluster_size);
	r->slot_count = ox_max(2u, ox_min(READ_SLOTS, READ_BUFFERS / r->piece_bytes));
	if (c->one_by_one)
		r->slot_count = 1;
	for (unsigned i = 0; i < r->slot_count; i++) {
		r->slots[i].reader = r;
		if (posix_memalign((void **)&r->slots[i].buf, 4096, r->piece_bytes)) {
			r->slots[i].buf = NULL;
			r->slot_count = i;
			break;
		}
	}
	if (r->slot_count == 0) {
		free(r);
		return NULL;
	}
	return r;
}

static void reader_free(struct reader *r)
{
	for (unsigned i = 0; i < r->slot_count; i++)
		free(r->slots[i].buf);
	free(r);
}

int check_read_all_co(struct qcow2_check *c, bool (*next)(void *arg, struct check_piece *piece),
                      int (*use_co)(void *arg, const struct check_piece *piece, uint8_t *data,
                                    int rc),
                      void *arg)
{
	struct reader *r = reader_new(c);
	bool more = true;
	int rc = 0;

	if (!r)
		return -ENOMEM;
	while (rc == 0) {
		struct slot *slot;

		while (more && r->busy < r->slot_count) {
			slot = &r->slots[(r->head + r->busy) % r->slot_count];
			more = next(arg, &slot->piece);
			if (!more)
				break;
			r->busy++;
			slot_start(r, slot);
		}
		if (!r->busy)
			break;
		slot = &r->slots[r->head];
		slot_wait_co(r, slot);
		rc = use_co(arg, &slot->piece, slot->buf, slot->io.result);
		check_progress(c, slot->piece.bytes);
		r->head = (r->head + 1) % r->slot_count;
		r->busy--;
	}
	/* After an error reads may still be in flight, into our buffers. */
	for (; r->busy > 0; r->busy--) {
		slot_wait_co(r, &r->slots[r->head]);
		r->head = (r->head + 1) % r->slot_count;
	}
	reader_free(r);
	return rc;
}
