/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Secrets: the pass phrases of encrypted images.  They come from a file, a descriptor or a systemd
 * credential, never from the command line in clear (everybody on the host can read that).
 */
#ifndef OX_IMAGE_SECRET_H
#define OX_IMAGE_SECRET_H

#include "base/base.h"
#include <oxbow/error.h>

struct ox_secrets;

/* The process's list; empty at first. */
struct ox_secrets *ox_secrets_new(void);
/* Wipes and frees. NULL is allowed. */
void ox_secrets_free(struct ox_secrets *secrets);

/* `text` is what follows --object: "secret,id=ID,file=PATH[,format=raw|base64]", "...,fd=N",
 * "...,credential=NAME" (a file of that name in $CREDENTIALS_DIRECTORY).  Read at once; at most
 * 64 KiB; a file's last newline is part of the secret, as in QEMU.  "data=" is refused with what to
 * do instead. */
int ox_secrets_add(struct ox_secrets *secrets, const char *text, struct ox_error *err)
        OX_MUST_CHECK;

/* The bytes of a secret; they live as long as the list.  NULL list or unknown id: -ENOENT, with a
 * sentence. */
int ox_secrets_find(const struct ox_secrets *secrets, const char *id, const uint8_t **bytes,
                    size_t *count, struct ox_error *err) OX_MUST_CHECK;

#endif
