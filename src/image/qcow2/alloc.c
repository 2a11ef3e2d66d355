/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Clusters to give out: the reserve.
 *
 * The reserve holds clusters whose refcount of 1 is durable and that nobody has (R1), so giving one
 * out is a few instructions under the lock.  Each channel takes from a slice of its own, so that
 * what two queues write does not interleave in the file.
 *
 *     free space or frontier -> counted in memory -> durable (settled) -> reserve -> slice -> taken
 *
 * Invariants:
 *   - data_left = the clusters of `data` and of all slices; tables_left = those of `tables`.
 *   - whatever is in the reserve has refcount 1 in memory and in the file, durably.
 *
 * Locking: q->lock.  What take starts in the background (batch.c) begins at the end of the loop's
 * turn, because it must not begin under the lock.
 */
#include "image/qcow2/alloc.h"
#include <assert.h>
#include <errno.h>
#include <string.h>

#define SLICE (UINT64_C(4) << 20)

/* --- lists of space ------------------------------------------------------------------------- */

static struct qcow2_space *new_space(struct qcow2_allocator *a)
{
	struct qcow2_space *space = TAILQ_FIRST(&a->spare);

	if (!space)
		return malloc(sizeof(*space));
	TAILQ_REMOVE(&a->spare, space, link);
	return space;
}

bool qcow2_space_add(struct qcow2_allocator *a, struct qcow2_space_list *list, uint64_t first,
                     uint64_t count, bool zeroed)
{
	struct qcow2_space *last = TAILQ_LAST(list, qcow2_space_list);
	struct qcow2_space *space;

	if (count == 0)
		return true;
	if (last && last->first + last->count == first && last->zeroed == zeroed) {
		last->count += count;
		return true;
	}
	space = new_space(a);
	if (!space)
		return false;
	*space = (struct qcow2_space){.first = first, .count = count, .zeroed = zeroed};
	TAILQ_INSERT_TAIL(list, space, link);
	return true;
}

uint64_t qcow2_space_take(struct qcow2_allocator *a, struct qcow2_space_list *list, uint64_t want,
                          uint64_t *first, bool *zeroed)
{
	struct qcow2_space *space = TAILQ_FIRST(list);
	uint64_t count;

	if (!space)
		return 0;
	count = ox_min(space->count, want);
	*first = space->first;
	*zeroed = space->zeroed;
	space->first += count;
	space->count -= count;
	if (space->count == 0) {
		TAILQ_REMOVE(list, space, link);
		TAILQ_INSERT_HEAD(&a->spare, space, link);
	}
	return count;
}

static void free_spaces(struct qcow2_space_list *list)
{
	struct qcow2_space *space;

	while ((space = TAILQ_FIRST(list))) {
		TAILQ_REMOVE(list, space, link);
		free(space);
	}
}

/* --- life ------------------------------------------------------------------------------------ */

static unsigned log2_of(uint64_t power)
{
	return (unsigned)__builtin_ctzll(power);
}

int qcow2_alloc_init_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct qcow2 *q = qcow2_of(channel);
	struct ox_store *store = q->image->store;
	struct qcow2_allocator *a = ox_xcalloc(1, sizeof(*a));
	int rc;

	a->part_shift = log2_of(q->block_bytes) + 3 - log2_of(q->refcount_bits);
	a->block_shift = q->cluster_bits + 3 - log2_of(q->refcount_bits);
	/* A device has a number and no inode; a store that cannot be resized is like one. */
	a->fixed = !store->ops->truncate || (store->dev != 0 && store->ino == 0);
	ox_ranges_init(&a->gate);
	ox_ranges_init(&a->background);
	qcow2_parts_init(a);
	qcow2_metadata_init(a);
	qcow2_free_init(a);
	TAILQ_INIT(&a->data);
	TAILQ_INIT(&a->tables);
	TAILQ_INIT(&a->spare);
	TAILQ_INIT(&a->slices);
	a->tables_batch = QCOW2_FIRST_TABLES;
	q->alloc = a;
	rc = qcow2_reftable_init_co(channel, err);
	if (rc < 0)
		qcow2_alloc_free(q);
	return rc;
}

void qcow2_alloc_free(struct qcow2 *q)
{
	struct qcow2_allocator *a = q->alloc;

	if (!a)
		return;
	assert(TAILQ_EMPTY(&a->slices));
	qcow2_parts_free(a);
	qcow2_metadata_free(a);
	qcow2_free_end(a);
	free_spaces(&a->data);
	free_spaces(&a->tables);
	free_spaces(&a->spare);
	ox_ranges_destroy(&a->gate);
	ox_ranges_destroy(&a->background);
	free(a->table);
	free(a);
	q->alloc = NULL;
}

int qcow2_alloc_attach(struct ox_image_channel *channel, struct ox_error *err)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_slice *slice = ox_xcalloc(1, sizeof(*slice));

	slice->channel = channel;
	slice->deferred.fn = qcow2_slice_run_deferred;
	channel->priv = slice;
	pthread_mutex_lock(&q->lock);
	TAILQ_INSERT_TAIL(&q->alloc->slices, slice, link);
	pthread_mutex_unlock(&q->lock);
	return 0;
}

void qcow2_alloc_detach(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_slice *slice = channel->priv;

	if (!slice)
		return;
	ox_deferred_cancel(channel->loop, &slice->deferred);
	pthread_mutex_lock(&q->lock);
	if (slice->start_refill)
		a->refilling = false;
	if (slice->start_release)
		a->releasing = false;
	/* Without memory for it the rest stays counted, for the next check to find. */
	if (!qcow2_space_add(a, &a->data, slice->first, slice->count, slice->zeroed))
		a->data_left -= slice->count;
	TAILQ_REMOVE(&a->slices, slice, link);
	pthread_mutex_unlock(&q->lock);
	channel->priv = NULL;
	free(slice);
}

/* --- taking ---------------------------------------------------------------------------------- */

void qcow2_slice_kick(struct qcow2_slice *slice)
{
	ox_loop_defer(slice->channel->loop, &slice->deferred);
}

bool qcow2_wants_refill(const struct qcow2 *q)
{
	const struct qcow2_allocator *a = q->alloc;

	return (!q->data_file && a->data_left * 2 <= a->data_batch) ||
	       a->tables_left * 2 <= a->tables_batch;
}

/* Starts the next batch if it is time. */
static void look_ahead(struct ox_image_channel *channel)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_slice *slice = channel->priv;

	if (a->refilling || a->failed || a->finishing || !qcow2_wants_refill(q))
		return;
	a->refilling = true;
	slice->start_refill = true;
	qcow2_slice_kick(slice);
}

/* The reserve is used up and cannot be filled: what the other channels' slices have serves all. */
static bool steal(struct qcow2_allocator *a, struct qcow2_slice *slice)
{
	struct qcow2_slice *other;

	TAILQ_FOREACH (other, &a->slices, link) {
		if (other->count == 0)
			continue;
		slice->first = other->first;
		slice->count = other->count;
		slice->zeroed = other->zeroed;
		other->count = 0;
		return true;
	}
	/* A table takes any place, and so may data. */
	slice->count = qcow2_space_take(a, &a->tables, 1, &slice->first, &slice->zeroed);
	a->tables_left -= slice->count;
	a->data_left += slice->count;
	return slice->count > 0;
}

bool qcow2_slice_fill(struct qcow2 *q, struct qcow2_slice *slice, uint64_t want)
{
	struct qcow2_allocator *a = q->alloc;
	uint64_t most = ox_max(want, SLICE >> q->cluster_bits);
	struct qcow2_space *next = TAILQ_FIRST(&a->data);

	if (slice->count == 0) {
		slice->count = qcow2_space_take(a, &a->data, ox_max(most, (uint64_t)1),
		                                &slice->first, &slice->zeroed);
		return slice->count > 0 || (a->failed && steal(a, slice));
	}
	/* The slice's end goes on in the reserve. */
	if (slice->count < want && next && next->first == slice->first + slice->count &&
	    next->zeroed == slice->zeroed) {
		uint64_t first;
		bool zeroed;

		slice->count += qcow2_space_take(a, &a->data, most, &first, &zeroed);
	}
	return true;
}

int qcow2_alloc_take(struct ox_image_channel *channel, unsigned want, uint64_t *host, unsigned *got,
                     bool *zeroed)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	struct qcow2_slice *slice = channel->priv;

	if (slice->count < want && !qcow2_slice_fill(q, slice, want))
		return -EAGAIN;
	*got = (unsigned)ox_min((uint64_t)want, slice->count);
	*host = slice->first << q->cluster_bits;
	*zeroed = slice->zeroed;
	slice->first += *got;
	slice->count -= *got;
	a->data_left -= *got;
	look_ahead(channel);
	return 0;
}

int qcow2_alloc_take_table(struct ox_image_channel *channel, uint64_t *host, bool *zeroed)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t first;

	if (qcow2_space_take(a, &a->tables, 1, &first, zeroed) == 0)
		return -EAGAIN;
	*host = first << q->cluster_bits;
	a->tables_left--;
	look_ahead(channel);
	return 0;
}

void qcow2_alloc_untake(struct ox_image_channel *channel, uint64_t host, unsigned count)
{
	struct qcow2 *q = qcow2_of(channel);
	struct qcow2_allocator *a = q->alloc;
	uint64_t first = host >> q->cluster_bits;

	/* Something may have been written there.  Without memory for the note the clusters stay
	 * counted, for the next check to find. */
	if (qcow2_space_add(a, &a->data, first, count, false))
		a->data_left += count;
}
