/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A store with a loop and a channel of the test's own thread, and requests one at a time.
 */
#ifndef OX_TESTS_STORE_CO_H
#define OX_TESTS_STORE_CO_H

#include "store/store.h"

struct user {
	struct ox_store *store;
	struct ox_loop *loop;
	struct ox_channel *channel;
};

/* Fails the test when the store cannot be opened. options may be NULL. */
void user_open(struct user *user, const char *name, const struct ox_store_options *options);
void user_close(struct user *user);
/* Runs a request to its end; its result. */
int user_io(struct user *user, struct ox_io *io);
int user_read(struct user *user, uint64_t offset, void *buf, size_t bytes);
int user_write(struct user *user, uint64_t offset, const void *buf, size_t bytes, unsigned flags);
int user_op(struct user *user, enum ox_io_op op, uint64_t offset, uint64_t bytes, unsigned flags);
int user_flush(struct user *user);

#endif
