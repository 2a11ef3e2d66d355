/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Encryption of an image's data: sectors of 512 bytes, each with an IV made of its number.
 * Ciphers and hashes are GnuTLS's, which uses the processor's AES instructions.
 *
 * LUKS version 1 (on-disk format specification 1.2.3): a header of 592 bytes with eight key slots,
 * and key material.  Legacy AES (qcow2's crypt_method 1): AES-128-CBC with plain64 IVs and a
 * password of at most 16 bytes as the key.
 */
#ifndef OX_IMAGE_CRYPTO_H
#define OX_IMAGE_CRYPTO_H

#include "base/base.h"
#include <oxbow/error.h>

struct ox_crypto;

#define OX_CRYPTO_SECTOR     512u
#define OX_LUKS_HEADER_BYTES 592u
#define OX_LUKS_KEY_SLOTS    8u

/* `offset` (bytes, a multiple of 512) decides the IV of the first sector; `bytes` is a multiple of
 * 512; in and out may be the same.  Any thread, several at once.  0 or -EIO. */
int ox_crypto_encrypt(struct ox_crypto *crypto, uint64_t offset, const void *in, void *out,
                      size_t bytes) OX_MUST_CHECK;
int ox_crypto_decrypt(struct ox_crypto *crypto, uint64_t offset, const void *in, void *out,
                      size_t bytes) OX_MUST_CHECK;
/* Wipes the keys. NULL is allowed. */
void ox_crypto_free(struct ox_crypto *crypto);

int ox_crypto_open_aes(const uint8_t *password, size_t bytes, struct ox_crypto **crypto,
                       struct ox_error *err) OX_MUST_CHECK;

/* A LUKS header, parsed and checked. */
struct ox_luks_slot {
	bool active;
	uint32_t iterations, stripes;
	uint8_t salt[32];
	uint32_t key_offset; /* of the key material, in sectors from the header's start */
};
struct ox_luks {
	char cipher[33], mode[33], hash[33]; /* "aes", "xts-plain64", "sha256" */
	uint32_t payload_offset;             /* sectors */
	uint32_t key_bytes;                  /* of the master key */
	uint8_t digest[20], digest_salt[32];
	uint32_t digest_iterations;
	char uuid[41];
	struct ox_luks_slot slots[OX_LUKS_KEY_SLOTS];
};
/* Pure.  `area`: bytes that header and key material may take (key material beyond is refused).
 * `what` names the image in messages. */
int ox_luks_parse(const uint8_t *header, size_t bytes, uint64_t area, const char *what,
                  struct ox_luks *luks, struct ox_error *err) OX_MUST_CHECK;

/* Finds the slot that the pass phrase opens.  read(arg, offset, buf, bytes) reads from the header's
 * start on.  Blocks for seconds (key derivation): on a worker. -EACCES: no slot opens. */
int ox_luks_unlock(const struct ox_luks *luks, const uint8_t *phrase, size_t phrase_bytes,
                   int (*read)(void *arg, uint64_t offset, void *buf, size_t bytes), void *arg,
                   const char *what, struct ox_crypto **crypto, struct ox_error *err) OX_MUST_CHECK;

struct ox_luks_create {
	/* QEMU's words and defaults: aes-256, xts, plain64, sha256, sha256, 2000 ms. */
	const char *cipher_alg, *cipher_mode, *ivgen_alg, *ivgen_hash_alg, *hash_alg;
	uint32_t iter_time_ms;
	uint64_t alignment; /* of the payload, bytes: luks 1 MiB; inside qcow2 it is the caller's */
};
/* How many bytes header and key material take (payload_offset * 512): pure; refuses what is not
 * supported. */
int ox_luks_area(const struct ox_luks_create *options, uint64_t *bytes, struct ox_error *err)
        OX_MUST_CHECK;
/* Makes a header with a new random master key in slot 0: `area` bytes at `out`.  Blocks for
 * seconds.  *crypto (may be NULL) encrypts with it. */
int ox_luks_format(const struct ox_luks_create *options, const uint8_t *phrase, size_t phrase_bytes,
                   uint8_t *out, uint64_t area, struct ox_crypto **crypto, struct ox_error *err)
        OX_MUST_CHECK;

struct ox_image_create_options;
struct json_t;
/* The words encrypt.* (prefix "encrypt."; encrypt.format must be luks) or those of -f luks (prefix
 * ""), with QEMU's defaults and checked.  The strings are `options`' own or constant. `key_secret`:
 * the secret's id. */
int ox_luks_create_options(const struct ox_image_create_options *options, const char *prefix,
                           struct ox_luks_create *out, const char **key_secret,
                           struct ox_error *err) OX_MUST_CHECK;
/* The members of "data" (for luks) or "encrypt" (for qcow2) as qemu-img info prints them. */
struct json_t *ox_luks_info(const struct ox_luks *luks);

#endif
