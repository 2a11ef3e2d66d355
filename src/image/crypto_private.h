/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The encryption parts among themselves:
 *
 *   crypto.c        ciphers, IVs, pools of cipher handles; memory for keys
 *   secret.c        pass phrases
 *   luks_header.c   the header's layout: parsing, writing, describing
 *   luks_key.c      key derivation, the anti-forensic splitter, unlocking
 *   luks_create.c   options, a new header
 *   luks.c          the format driver
 */
#ifndef OX_IMAGE_CRYPTO_PRIVATE_H
#define OX_IMAGE_CRYPTO_PRIVATE_H

#include "image/crypto.h"
#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>

/* The longest key of a cipher that is supported: two of AES-256, for XTS. */
#define OX_CRYPTO_KEY_MAX 64u

/* --- crypto.c --------------------------------------------------------------------------------- */

/* Memory for keys: zero-filled, not in core dumps, not swapped as far as the limit on locked
 * memory allows.  NULL: no memory.  `bytes` > 0. */
void *ox_key_alloc(size_t bytes);
/* Wipes it.  The same `bytes`; NULL is allowed. */
void ox_key_free(void *memory, size_t bytes);

/* Can data be encrypted so?  "aes", "xts-plain64", 64.  Pure.  `what` names the image. */
int ox_crypto_check(const char *cipher, const char *mode, size_t key_bytes, const char *what,
                    struct ox_error *err) OX_MUST_CHECK;
int ox_crypto_open(const char *cipher, const char *mode, const uint8_t *key, size_t key_bytes,
                   const char *what, struct ox_crypto **crypto, struct ox_error *err) OX_MUST_CHECK;

/* The MAC that a hash's name ("sha256") stands for; the values are those of the digest too.
 * GNUTLS_MAC_UNKNOWN: there is none in GnuTLS. */
gnutls_mac_algorithm_t ox_crypto_hash(const char *name);
/* The error for that. */
int ox_crypto_no_hash(const char *name, const char *what, struct ox_error *err);

/* --- luks_header.c ---------------------------------------------------------------------------- */

#define OX_LUKS_STRIPES 4000u
/* Key material begins on multiples of this. */
#define OX_LUKS_SLOT_ALIGN 4096u
/* Some minutes of key derivation: beyond, a header is damaged or means harm. */
#define OX_LUKS_ITERATIONS_MAX (1u << 28)

/* Of one slot's key material, rounded up to sectors: bytes. */
static inline uint64_t ox_luks_material_bytes(uint32_t key_bytes, uint32_t stripes)
{
	return ox_align_up((uint64_t)key_bytes * stripes, OX_CRYPTO_SECTOR);
}

/* The header as it stands on disk.  Pure. */
void ox_luks_write_header(const struct ox_luks *luks, uint8_t out[OX_LUKS_HEADER_BYTES]);

/* --- luks_key.c ------------------------------------------------------------------------------- */

/* PBKDF2 with HMAC; 0 or -EIO. */
int ox_luks_derive(gnutls_mac_algorithm_t hash, const uint8_t *phrase, size_t phrase_bytes,
                   const uint8_t salt[32], uint32_t iterations, uint8_t *out, size_t bytes)
        OX_MUST_CHECK;
/* Spreads a key over `stripes` pieces of its size at `out`, so that losing any of them loses the
 * key; and back.  0 or -EIO. */
int ox_luks_split(gnutls_mac_algorithm_t hash, const uint8_t *key, size_t key_bytes,
                  uint32_t stripes, uint8_t *out) OX_MUST_CHECK;
int ox_luks_merge(gnutls_mac_algorithm_t hash, const uint8_t *in, size_t key_bytes,
                  uint32_t stripes, uint8_t *key) OX_MUST_CHECK;

#endif
