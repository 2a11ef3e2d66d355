/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Dirty metadata to the file, in order.
 *
 * One commit runs at a time.  Who comes while one runs waits for the next, which then serves all
 * who wait: many guests' flushes share one sync of the host.
 *
 *   1  gather   under the lock: every dirty piece is copied as it is now, and is clean; the record
 * of a killed process is sealed; removals noted so far get this commit's number 2  flush    if one
 * of the pieces shows data that must be durable first (R2) 3  write    all pieces, many at a time
 *   4  flush    now what was gathered is durable, and so is all data that completed before
 *   5  publish  under the lock: the record's sealed half is dropped, removed clusters are handed
 * over
 *
 * What changes after 1 is dirty again and the next commit's.  The copies matter: a piece that
 * is changed while 2 runs would otherwise show data that 2 does not cover.
 *
 * When a step fails, the pieces are dirty again, with everything they must wait for, and
 * everybody who waited hears of it.
 *
 * Writing ahead: the first change after a flush goes to the file at once, beside the data that it
 * maps, if it may (not `after_data`).  Who writes and flushes in turn then has both in the file
 * when the flush comes, which is one sync and nothing else; who does not, pays for one small write
 * a flush.
 *
 * Locking: `running` is the commit's lock; struct qcow2_commit is under q->lock.
 */
#include "base/fiber.h"
#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <string.h>

/* So many dirty pieces start a commit in the background: bounds what a gathering copies. */
#define TOO_MANY_PIECES 1024u
#define WRITES_AT_ONCE  32u

struct waiter {
	struct ox_post post;
	struct ox_fiber *fiber;
	struct ox_loop *loop;
	uint64_t ticket; /* 0: wants only its turn */
	bool served;
	int result;
	TAILQ_ENTRY(waiter) link;
};

struct qcow2_commit {
	bool running;
	bool background;  /* a commit in the background was started */
	bool ahead;       /* a write ahead of the next flush was started */
	uint64_t flushes; /* the image's, when one was started last */
	uint64_t tickets; /* given out */
	uint64_t number;  /* commits begun */
	unsigned dirty_pieces;
	TAILQ_HEAD(, waiter) waiters;
};

/* One write: adjacent dirty pieces of one block. */
struct piece {
	struct qcow2_block *block;
	uint16_t bits;
	uint32_t offset, bytes; /* in the block */
	size_t at;              /* in the buffer */
	bool after_data;
};

struct gathered {
	struct piece *pieces;
	size_t count, capacity;
	uint8_t *buffer;
	size_t bytes, buffer_size;
	bool after_data;
};

void qcow2_commit_init(struct qcow2 *q)
{
	q->commit = ox_xcalloc(1, sizeof(*q->commit));
	TAILQ_INIT(&q->commit->waiters);
	TAILQ_INIT(&q->dirty_blocks);
}

void qcow2_commit_free(struct qcow2 *q)
{
	free(q->commit);
	q->commit = NULL;
}

uint64_t qcow2_commit_number(const struct qcow2 *q)
{
	return q->commit->number;
}

/* --- what is dirty --------------------------------------------------------------------------- */

static uint32_t piece_bytes(const struct qcow2_block *block)
{
	return ox_min(block->bytes, QCOW2_PIECE);
}

void qcow2_dirty(struct qcow2 *q, struct qcow2_block *block, uint32_t offset, uint32_t bytes,
                 bool after_data)
{
	uint32_t size = piece_bytes(block);
	uint32_t first = offset / size, last = (offset + bytes - 1) / size;
	uint16_t bits = (uint16_t)((2u << last) - (1u << first));
	uint16_t fresh = bits & ~block->dirty;

	if (fresh) {
		q->commit->dirty_pieces += (unsigned)__builtin_popcount(fresh);
		__atomic_store_n(&block->dirty, block->dirty | bits, __ATOMIC_RELAXED);
	}
	block->after_data |= after_data;
	if (!block->listed) {
		block->listed = true;
		TAILQ_INSERT_TAIL(&q->dirty_blocks, block, link);
	}
	if (!q->image->metadata_dirty)
		__atomic_store_n(&q->image->metadata_dirty, true, __ATOMIC_SEQ_CST);
}

static int reserve(struct gathered *g, unsigned pieces, size_t bytes)
{
	if (g->count + pieces > g->capacity) {
		size_t capacity = ox_max(g->capacity * 2, g->count + pieces);
		struct piece *more = realloc(g->pieces, capacity * sizeof(*more));

		if (!more)
			return -ENOMEM;
		g->pieces = more;
		g->capacity = capacity;
	}
	if (g->bytes + bytes > g->buffer_size) {
		size_t size = ox_align_up(ox_max(g->buffer_size * 2, g->bytes + bytes), 4096);
		uint8_t *more = aligned_alloc(4096, size);

		if (!more)
			return -ENOMEM;
		if (g->bytes)
			memcpy(more, g->buffer, g->bytes);
		free(g->buffer);
		g->buffer = more;
		g->buffer_size = size;
	}
	return 0;
}

/* Copies what is dirty of one block; it is clean then, and being written.  Lock held. */
static int gather_block(struct qcow2 *q, struct gathered *g, struct qcow2_block *block)
{
	uint32_t size = piece_bytes(block), dirty = block->dirty;
	int rc = reserve(g, 16, block->bytes);

	if (rc < 0)
		return rc;
	while (dirty) {
		uint32_t first = (uint32_t)__builtin_ctz(dirty);
		uint32_t count = (uint32_t)__builtin_ctz(~(dirty >> first));
		struct piece *piece = &g->pieces[g->count++];

		*piece = (struct piece){
		        .block = block,
		        .bits = (uint16_t)(((1u << count) - 1) << first),
		        .offset = first * size,
		        .bytes = count * size,
		        .at = g->bytes,
		        .after_data = block->after_data,
		};
		block->encode(block, piece->offset, piece->bytes, g->buffer + g->bytes);
		g->bytes += piece->bytes;
		dirty &= ~(uint32_t)piece->bits;
	}
	q->commit->dirty_pieces -= (unsigned)__builtin_popcount(block->dirty);
	g->after_data |= block->after_data;
	block->writing |= block->dirty;
	__atomic_store_n(&block->dirty, 0, __ATOMIC_RELAXED);
	block->after_data = false;
	if (block->listed) {
		block->listed = false;
		TAILQ_REMOVE(&q->dirty_blocks, block, link);
	}
	return 0;
}

/* The pieces are in the file, or dirty again.  Lock held. */
static void ungather(struct qcow2 *q, struct gathered *g, int result)
{
	for (size_t i = 0; i < g->count; i++) {
		struct piece *piece = &g->pieces[i];

		piece->block->writing &= (uint16_t)~piece->bits;
		if (result < 0)
			qcow2_dirty(q, piece->block, piece->offset, piece->bytes,
			            piece->after_data);
	}
}

/* --- writing --------------------------------------------------------------------------------- */

struct writes {
	struct ox_fiber *fiber;
	unsigned in_flight;
	bool waiting;
	int result;
};

struct one_write {
	struct ox_io io;
	struct iovec iov;
	struct writes *writes;
	bool busy;
};

static void write_done(struct ox_io *io)
{
	struct one_write *write = ox_container_of(io, struct one_write, io);
	struct writes *writes = write->writes;

	if (io->result < 0)
		writes->result = io->result;
	write->busy = false;
	writes->in_flight--;
	if (writes->waiting) {
		writes->waiting = false;
		ox_fiber_resume(writes->fiber);
	}
}

static int write_all_co(struct ox_channel *store, const struct gathered *g)
{
	struct one_write *slots;
	struct writes writes = {.fiber = ox_fiber_self()};
	unsigned slot_count = (unsigned)ox_min(g->count, (size_t)WRITES_AT_ONCE), slot = 0;

	if (g->count == 0)
		return 0;
	if (g->count == 1)
		return ox_store_write_co(store,
		                         g->pieces[0].block->store_offset + g->pieces[0].offset,
		                         g->buffer, g->pieces[0].bytes, 0);
	slots = calloc(slot_count, sizeof(*slots));
	if (!slots)
		return -ENOMEM;
	for (size_t i = 0; i < g->count && writes.result == 0; i++) {
		const struct piece *piece = &g->pieces[i];
		struct one_write *write;

		while (writes.in_flight == slot_count) {
			writes.waiting = true;
			ox_fiber_suspend();
		}
		while (slots[slot].busy)
			slot = (slot + 1) % slot_count;
		write = &slots[slot];
		write->writes = &writes;
		write->busy = true;
		write->iov = (struct iovec){g->buffer + piece->at, piece->bytes};
		write->io = (struct ox_io){
		        .op = OX_IO_WRITE,
		        .offset = piece->block->store_offset + piece->offset,
		        .length = piece->bytes,
		        .iov = &write->iov,
		        .iovcnt = 1,
		        .done = write_done,
		};
		writes.in_flight++;
		ox_store_submit(store, &write->io);
	}
	while (writes.in_flight > 0) {
		writes.waiting = true;
		ox_fiber_suspend();
	}
	free(slots);
	return writes.result;
}

/* --- one at a time ---------------------------------------------------------------------------- */

static void wake(struct ox_post *post)
{
	ox_fiber_resume(ox_container_of(post, struct waiter, post)->fiber);
}

/* Lock held; not on return. */
static void wait_co(struct qcow2 *q, struct waiter *waiter, struct ox_image_channel *channel)
{
	waiter->fiber = ox_fiber_self();
	waiter->loop = channel->loop;
	waiter->post.fn = wake;
	TAILQ_INSERT_TAIL(&q->commit->waiters, waiter, link);
	pthread_mutex_unlock(&q->lock);
	/* The post comes to this thread: it cannot run before the fiber is suspended. */
	ox_fiber_suspend();
}

/* Ends the turn: those with a ticket up to `upto` are served, the first of the others is next.
 * Lock held. */
static void end_turn(struct qcow2 *q, uint64_t upto, int result)
{
	struct waiter *waiter, *following, *next = NULL;

	for (waiter = TAILQ_FIRST(&q->commit->waiters); waiter; waiter = following) {
		following = TAILQ_NEXT(waiter, link);
		waiter->served = waiter->ticket != 0 && waiter->ticket <= upto;
		if (!waiter->served && next)
			continue;
		if (!waiter->served)
			next = waiter;
		TAILQ_REMOVE(&q->commit->waiters, waiter, link);
		waiter->result = result;
		ox_loop_post(waiter->loop, &waiter->post);
	}
	/* The turn is handed over: nobody comes between. */
	q->commit->running = next != NULL;
}

/* Waits for the turn.  True: it is this fiber's, and the lock is held; false: another commit did
 * what `ticket` asked for (0: nothing can), *result. */
static bool begin_turn_co(struct ox_image_channel *channel, uint64_t ticket, int *result)
{
	struct qcow2 *q = channel->image->priv;
	struct waiter waiter = {.ticket = ticket};

	if (!q->commit->running) {
		q->commit->running = true;
		return true;
	}
	wait_co(q, &waiter, channel);
	if (waiter.served) {
		*result = waiter.result;
		return false;
	}
	pthread_mutex_lock(&q->lock);
	return true;
}

static int flush_data_co(struct ox_image_channel *channel)
{
	return ox_store_flush_co(channel->data ? channel->data : channel->store);
}

/* Steps 2 to 4. */
static int carry_out_co(struct ox_image_channel *channel, const struct gathered *g)
{
	bool other_store = channel->data && channel->data != channel->store;
	int rc = 0;

	if (g->after_data || other_store)
		rc = flush_data_co(channel);
	if (rc == 0)
		rc = write_all_co(channel->store, g);
	if (rc == 0)
		rc = ox_store_flush_co(channel->store);
	return rc;
}

static int gather_all(struct qcow2 *q, struct gathered *g)
{
	struct qcow2_block *block;
	int rc = 0;

	while (rc == 0 && (block = TAILQ_FIRST(&q->dirty_blocks)))
		rc = gather_block(q, g, block);
	return rc;
}

int qcow2_commit_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	struct gathered g = {.count = 0};
	uint64_t upto, number;
	int rc;

	if (channel->image->read_only)
		return 0;
	pthread_mutex_lock(&q->lock);
	if (!begin_turn_co(channel, ++q->commit->tickets, &rc))
		return rc;
	upto = q->commit->tickets;
	number = ++q->commit->number;
	rc = gather_all(q, &g);
	qcow2_record_seal(q);
	pthread_mutex_unlock(&q->lock);

	if (rc == 0)
		rc = carry_out_co(channel, &g);

	pthread_mutex_lock(&q->lock);
	ungather(q, &g, rc);
	qcow2_record_sealed(q, rc == 0);
	if (rc == 0 && TAILQ_EMPTY(&q->dirty_blocks)) {
		__atomic_store_n(&q->image->metadata_dirty, false, __ATOMIC_SEQ_CST);
		__atomic_store_n(&q->image->metadata_unsynced, false, __ATOMIC_SEQ_CST);
	}
	if (rc == 0)
		qcow2_freed_durable(channel, number);
	end_turn(q, upto, rc);
	pthread_mutex_unlock(&q->lock);
	free(g.pieces);
	free(g.buffer);
	return rc;
}

int qcow2_write_blocks_co(struct ox_image_channel *channel, struct qcow2_block *const *blocks,
                          unsigned count)
{
	struct qcow2 *q = channel->image->priv;
	struct gathered g = {.count = 0};
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	/* Without a ticket the answer is always the turn. */
	(void)begin_turn_co(channel, 0, &rc);
	for (unsigned i = 0; i < count && rc == 0; i++) {
		if (blocks[i]->dirty)
			rc = gather_block(q, &g, blocks[i]);
	}
	pthread_mutex_unlock(&q->lock);
	if (rc == 0)
		rc = write_all_co(channel->store, &g);
	pthread_mutex_lock(&q->lock);
	ungather(q, &g, rc);
	end_turn(q, 0, rc);
	pthread_mutex_unlock(&q->lock);
	free(g.pieces);
	free(g.buffer);
	return rc;
}

void qcow2_commit_pause_co(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	int rc;

	pthread_mutex_lock(&q->lock);
	(void)begin_turn_co(channel, 0, &rc);
	pthread_mutex_unlock(&q->lock);
}

void qcow2_commit_resume(struct qcow2 *q)
{
	pthread_mutex_lock(&q->lock);
	end_turn(q, 0, 0);
	pthread_mutex_unlock(&q->lock);
}

static void commit_in_background_co(struct ox_image_channel *channel, void *arg)
{
	struct qcow2 *q = channel->image->priv;

	/* A failure leaves everything dirty, for whoever flushes to hear of. */
	(void)!qcow2_commit_co(channel);
	pthread_mutex_lock(&q->lock);
	q->commit->background = false;
	pthread_mutex_unlock(&q->lock);
}

/* Everything dirty, if nothing of it must wait.  Lock held. */
static int gather_ahead(struct qcow2 *q, struct gathered *g)
{
	struct qcow2_block *block;

	TAILQ_FOREACH (block, &q->dirty_blocks, link) {
		if (block->after_data)
			return 0;
	}
	return gather_all(q, g);
}

static void write_ahead_co(struct ox_image_channel *channel, void *arg)
{
	struct qcow2 *q = channel->image->priv;
	struct gathered g = {.count = 0};
	int rc = 0;

	pthread_mutex_lock(&q->lock);
	(void)begin_turn_co(channel, 0, &rc);
	rc = gather_ahead(q, &g);
	pthread_mutex_unlock(&q->lock);
	if (rc == 0)
		rc = write_all_co(channel->store, &g);
	pthread_mutex_lock(&q->lock);
	ungather(q, &g, rc);
	/* What is in the file is durable with the store's next flush, like data. */
	if (rc == 0 && TAILQ_EMPTY(&q->dirty_blocks) && !qcow2_frees_wait(q)) {
		__atomic_store_n(&q->image->metadata_unsynced, true, __ATOMIC_SEQ_CST);
		__atomic_store_n(&q->image->metadata_dirty, false, __ATOMIC_SEQ_CST);
	}
	q->commit->ahead = false;
	end_turn(q, 0, rc);
	pthread_mutex_unlock(&q->lock);
	free(g.pieces);
	free(g.buffer);
}

void qcow2_write_ahead(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t flushes = __atomic_load_n(&channel->image->flushes, __ATOMIC_RELAXED);
	bool start;

	pthread_mutex_lock(&q->lock);
	start = q->commit->flushes != flushes && !q->commit->ahead && !q->commit->running;
	if (start) {
		q->commit->flushes = flushes;
		q->commit->ahead = true;
	}
	pthread_mutex_unlock(&q->lock);
	if (!start || ox_image_background(channel, write_ahead_co, NULL) == 0)
		return;
	pthread_mutex_lock(&q->lock);
	q->commit->ahead = false;
	pthread_mutex_unlock(&q->lock);
}

void qcow2_commit_soon(struct ox_image_channel *channel)
{
	struct qcow2 *q = channel->image->priv;
	bool start;

	pthread_mutex_lock(&q->lock);
	start = !q->commit->background && (q->commit->dirty_pieces > TOO_MANY_PIECES ||
	                                   !qcow2_record_has_room(q, QCOW2_RECORD_LOW));
	q->commit->background |= start;
	pthread_mutex_unlock(&q->lock);
	if (!start || ox_image_background(channel, commit_in_background_co, NULL) == 0)
		return;
	pthread_mutex_lock(&q->lock);
	q->commit->background = false;
	pthread_mutex_unlock(&q->lock);
}
