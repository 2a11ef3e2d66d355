/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Changed entries to the file.
 *
 * A change is a range of entries and their new values.  It is put on its block's list, a round
 * writes the pieces of the block that any change on the list touches (as the file shall have them:
 * the entries in memory, and over them all changes on the list), and when the round has ended the
 * change becomes visible in memory and leaves the list.  So
 *   - nobody uses an entry in memory that the file does not have: a killed process loses nothing;
 *   - a piece that is written while another change comes is written again, by the next round;
 *   - a change that fails leaves memory as it was.  The file may have it all the same; that is
 *     harmless, because its clusters are never given to anybody else, and the mark "need check"
 *     stays until an open has looked.
 *
 * Locking: the lists and rounds are under q->lock; a round itself runs without it.
 */
#include "image/qed/qed.h"
#include "base/byteorder.h"
#include <errno.h>

/* --- rounds ----------------------------------------------------------------------------------- */

void qed_rounds_init(struct qed_rounds *rounds)
{
	rounds->begun = 0;
	rounds->running = false;
	TAILQ_INIT(&rounds->waiters);
}

static void resume_waiter(struct ox_post *post)
{
	ox_fiber_resume(ox_container_of(post, struct qed_waiter, post)->fiber);
}

static void wake_waiter(struct qed_rounds *rounds, struct qed_waiter *waiter)
{
	TAILQ_REMOVE(&rounds->waiters, waiter, link);
	ox_loop_post(waiter->loop, &waiter->post);
}

/* Round `number` ended: who waited for it is told, and one of those who wait for the next one does
 * it.  Lock held. */
static void end_round(struct qed_rounds *rounds, uint64_t number, int result)
{
	struct qed_waiter *waiter;

	while ((waiter = TAILQ_FIRST(&rounds->waiters)) && waiter->round <= number) {
		waiter->result = result;
		wake_waiter(rounds, waiter);
	}
	if (waiter) {
		waiter->leads = true;
		wake_waiter(rounds, waiter);
	} else {
		rounds->running = false;
	}
}

int qed_round_co(struct ox_image_channel *channel, struct qed_rounds *rounds,
                 int (*fn_co)(struct ox_image_channel *channel, void *arg), void *arg)
{
	struct qed *q = qed_of(channel);
	struct qed_waiter waiter = {.post.fn = resume_waiter};
	uint64_t number;
	int rc;

	pthread_mutex_lock(&q->lock);
	if (rounds->running) {
		waiter.loop = ox_loop_current();
		waiter.fiber = ox_fiber_self();
		waiter.round = rounds->begun + 1;
		TAILQ_INSERT_TAIL(&rounds->waiters, &waiter, link);
		pthread_mutex_unlock(&q->lock);
		ox_fiber_suspend();
		if (!waiter.leads)
			return waiter.result;
		pthread_mutex_lock(&q->lock);
	}
	rounds->running = true;
	number = ++rounds->begun;
	pthread_mutex_unlock(&q->lock);
	rc = fn_co(channel, arg);
	pthread_mutex_lock(&q->lock);
	end_round(rounds, number, rc);
	pthread_mutex_unlock(&q->lock);
	return rc;
}

static int flush_round_co(struct ox_image_channel *channel, void *arg)
{
	return ox_store_flush_co(channel->store);
}

int qed_flush_co(struct ox_image_channel *channel)
{
	return qed_round_co(channel, &qed_of(channel)->flushing, flush_round_co, NULL);
}

/* --- entries ---------------------------------------------------------------------------------- */

#define PIECE_ENTRIES (QED_PIECE / sizeof(uint64_t))

/* Which pieces of the block its changes touch, a bit each.  Lock held. */
static uint32_t touched_pieces(const struct qed_block *block)
{
	struct qed_change *change;
	uint32_t pieces = 0;

	TAILQ_FOREACH (change, &block->changes, link) {
		uint32_t first = change->first / PIECE_ENTRIES;
		uint32_t last = (change->first + change->count - 1) / PIECE_ENTRIES;

		for (uint32_t i = first; i <= last; i++)
			pieces |= UINT32_C(1) << i;
	}
	return pieces;
}

/* Those pieces as the file shall have them.  Lock held.  -EIO: they have entries that are not
 * valid; those stay as they are, and so does the rest. */
static int encode_pieces(const struct qed *q, const struct qed_block *block, uint32_t pieces,
                         uint8_t *out)
{
	struct qed_change *change;

	for (uint32_t i = 0; i < q->block_entries; i++) {
		uint64_t entry = qed_entry(block, i);

		if (!(pieces >> (i / PIECE_ENTRIES) & 1)) {
			i += PIECE_ENTRIES - 1;
			continue;
		}
		if (entry == QED_INVALID)
			return -EIO;
		ox_put_le64(out + i * sizeof(uint64_t), entry);
	}
	TAILQ_FOREACH (change, &block->changes, link) {
		for (uint32_t i = 0; i < change->count; i++)
			ox_put_le64(out + (change->first + i) * sizeof(uint64_t),
			            change->base + i * change->step);
	}
	return 0;
}

static int write_block_co(struct ox_image_channel *channel, void *arg)
{
	struct qed *q = qed_of(channel);
	struct qed_block *block = arg;
	OX_FREE uint8_t *bytes = aligned_alloc(QED_PIECE, q->block_bytes);
	uint32_t count = q->block_bytes / QED_PIECE, pieces;
	int rc;

	if (!bytes)
		return -ENOMEM;
	pthread_mutex_lock(&q->lock);
	pieces = touched_pieces(block);
	rc = encode_pieces(q, block, pieces, bytes);
	pthread_mutex_unlock(&q->lock);
	for (uint32_t i = 0; i < count && rc == 0; i++) {
		uint32_t from = i;

		while (i < count && (pieces >> i & 1))
			i++;
		if (i > from)
			rc = ox_store_write_co(channel->store,
			                       block->store_offset + (uint64_t)from * QED_PIECE,
			                       bytes + (size_t)from * QED_PIECE,
			                       (size_t)(i - from) * QED_PIECE, 0);
	}
	return rc;
}

int qed_update_co(struct ox_image_channel *channel, struct qed_block *block,
                  struct qed_change *change)
{
	struct qed *q = qed_of(channel);
	int rc;

	if (qed_is_damaged(q))
		return -EIO;
	pthread_mutex_lock(&q->lock);
	TAILQ_INSERT_TAIL(&block->changes, change, link);
	pthread_mutex_unlock(&q->lock);
	rc = qed_round_co(channel, &block->writes, write_block_co, block);
	pthread_mutex_lock(&q->lock);
	TAILQ_REMOVE(&block->changes, change, link);
	for (uint32_t i = 0; i < change->count && rc == 0; i++)
		__atomic_store_n(&block->entries[change->first + i],
		                 change->base + i * change->step, __ATOMIC_RELEASE);
	/* In the file, but not durable: whoever needs that asks commit_co. */
	q->published++;
	__atomic_store_n(&q->image->metadata_dirty, true, __ATOMIC_RELEASE);
	q->table_unsure |= rc < 0;
	pthread_mutex_unlock(&q->lock);
	return rc;
}

int qed_link_table_co(struct ox_image_channel *channel, uint64_t index, uint64_t table)
{
	struct qed *q = qed_of(channel);
	struct qed_change change = {
	        .first = (uint32_t)index & (q->block_entries - 1), .count = 1, .base = table};
	struct qed_new_table *made, *next;
	int rc;

	if (qed_l1_entry(q, index) == table)
		return 0;
	rc = qed_update_co(channel, qed_l1_block(q, index), &change);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&q->lock);
	for (made = LIST_FIRST(&q->new_tables); made; made = next) {
		next = LIST_NEXT(made, link);
		if (made->index == index) {
			LIST_REMOVE(made, link);
			free(made);
		}
	}
	pthread_mutex_unlock(&q->lock);
	return 0;
}
