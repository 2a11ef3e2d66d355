/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the stores share among themselves and nobody above uses.
 */
#ifndef OX_STORE_INTERNAL_H
#define OX_STORE_INTERNAL_H

#include "store/store.h"

/* Zeroes to write from; page aligned, never written to (its pages stay the kernel's zero page,
 * so it costs no memory). */
#define OX_ZEROES_SIZE (256u * 1024u)
extern const uint8_t *const ox_zeroes;

/* Writes zeroes over a checked range through ops->write, in bounded pieces.  Suspends. */
int ox_store_write_zeroes_co(struct ox_channel *channel, uint64_t offset, uint64_t length,
                             unsigned flags);

/* Hands a request that needs no more checks to ops (counts it in channel->in_flight); for
 * stores that make requests of their own. */
void ox_store_dispatch(struct ox_channel *channel, struct ox_io *io);
/* The same, suspending; io->result.  io is left as it was but for result. */
int ox_store_dispatch_co(struct ox_channel *channel, struct ox_io *io);

/* The file store's: what was buffered is lost; from now on flushes fail.  Any thread. */
void ox_store_fail_flushes(struct ox_store *store);

static inline uint64_t ox_store_size_now(const struct ox_store *store)
{
	return __atomic_load_n(&store->size, __ATOMIC_RELAXED);
}

#endif
