/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * lock_store MODE PATH: opens a store with a lock, says "locked" or why not, and holds it until
 * its input ends.  The other side of locks.py.
 */
#include "store/store.h"
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		enum ox_lock_mode mode;
	} modes[] = {
	        {"none", OX_LOCK_NONE},
	        {"read", OX_LOCK_READ},
	        {"write", OX_LOCK_WRITE},
	        {"shared-write", OX_LOCK_SHARED_WRITE},
	};
	struct ox_store_options options = {.aio = OX_AIO_SYNC};
	struct ox_error err = {0};
	struct ox_store *store;
	bool known = false;

	for (size_t i = 0; argc == 3 && i < OX_ARRAY_SIZE(modes); i++) {
		if (!strcmp(argv[1], modes[i].name)) {
			options.lock = modes[i].mode;
			options.read_only = modes[i].mode <= OX_LOCK_READ;
			known = true;
		}
	}
	if (!known) {
		fprintf(stderr, "usage: lock_store none|read|write|shared-write PATH\n");
		return 2;
	}
	if (ox_store_open(argv[2], &options, &store, &err) < 0) {
		puts(err.text);
		return 1;
	}
	puts("locked");
	fflush(stdout);
	while (getchar() != EOF)
		;
	ox_store_close(store);
	return 0;
}
