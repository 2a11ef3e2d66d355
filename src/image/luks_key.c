/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * From a pass phrase to a volume's master key (LUKS on-disk format specification 1.2.3, sections
 * 2.2 to 2.4 and figure 4): for each slot in use PBKDF2 makes a key of the phrase, which decrypts
 * the slot's material, which the anti-forensic splitter merges to a candidate, which is the master
 * key if PBKDF2 of it is the digest in the header.
 *
 * What is secret on the way lives in memory of ox_key_alloc(), and comparing takes the same time
 * whatever differs.
 */
#include "image/crypto_private.h"
#include "base/byteorder.h"
#include <errno.h>
#include <string.h>

#define DIGEST_MAX 64u

int ox_luks_derive(gnutls_mac_algorithm_t hash, const uint8_t *phrase, size_t phrase_bytes,
                   const uint8_t salt[32], uint32_t iterations, uint8_t *out, size_t bytes)
{
	uint8_t salted[32];
	gnutls_datum_t key = {.data = (unsigned char *)(uintptr_t)phrase,
	                      .size = (unsigned)phrase_bytes};
	gnutls_datum_t salt_data = {.data = salted, .size = sizeof(salted)};

	memcpy(salted, salt, sizeof(salted));
	return gnutls_pbkdf2(hash, &key, &salt_data, iterations, out, bytes) < 0 ? -EIO : 0;
}

/* --- the anti-forensic splitter --------------------------------------------------------------- */

/* H1 of the specification: each piece of a digest's size becomes the hash of its number and
 * itself. */
static int diffuse(gnutls_mac_algorithm_t hash, uint8_t *block, size_t bytes)
{
	gnutls_digest_algorithm_t alg = (gnutls_digest_algorithm_t)hash;
	size_t digest_bytes = gnutls_hash_get_len(alg);
	uint8_t input[4 + DIGEST_MAX], digest[DIGEST_MAX];
	int rc = 0;

	if (digest_bytes == 0 || digest_bytes > DIGEST_MAX)
		return -EIO;
	for (size_t at = 0, number = 0; at < bytes && rc == 0; at += digest_bytes, number++) {
		size_t part = ox_min(digest_bytes, bytes - at);

		ox_put_be32(input, (uint32_t)number);
		memcpy(input + 4, block + at, part);
		if (gnutls_hash_fast(alg, input, 4 + part, digest) < 0)
			rc = -EIO;
		else
			memcpy(block + at, digest, part);
	}
	gnutls_memset(input, 0, sizeof(input));
	gnutls_memset(digest, 0, sizeof(digest));
	return rc;
}

static void mix(uint8_t *into, const uint8_t *from, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		into[i] ^= from[i];
}

/* What all stripes but the last come to. */
static int fold(gnutls_mac_algorithm_t hash, const uint8_t *in, size_t key_bytes, uint32_t stripes,
                uint8_t *key)
{
	memset(key, 0, key_bytes);
	for (uint32_t i = 0; i + 1 < stripes; i++) {
		int rc;

		mix(key, in + i * key_bytes, key_bytes);
		rc = diffuse(hash, key, key_bytes);
		if (rc < 0)
			return rc;
	}
	return 0;
}

int ox_luks_merge(gnutls_mac_algorithm_t hash, const uint8_t *in, size_t key_bytes,
                  uint32_t stripes, uint8_t *key)
{
	int rc = fold(hash, in, key_bytes, stripes, key);

	if (rc == 0)
		mix(key, in + (stripes - 1) * key_bytes, key_bytes);
	return rc;
}

int ox_luks_split(gnutls_mac_algorithm_t hash, const uint8_t *key, size_t key_bytes,
                  uint32_t stripes, uint8_t *out)
{
	uint8_t *last = out + (stripes - 1) * key_bytes;
	int rc;

	if (gnutls_rnd(GNUTLS_RND_RANDOM, out, (stripes - 1) * key_bytes) < 0)
		return -EIO;
	rc = fold(hash, out, key_bytes, stripes, last);
	if (rc == 0)
		mix(last, key, key_bytes);
	return rc;
}

/* --- unlocking -------------------------------------------------------------------------------- */

struct unlock {
	const struct ox_luks *luks;
	const uint8_t *phrase;
	size_t phrase_bytes;
	int (*read)(void *arg, uint64_t offset, void *buf, size_t bytes);
	void *arg;
	const char *what;
	gnutls_mac_algorithm_t hash;
	/* From ox_key_alloc(). */
	uint8_t *slot_key, *master_key, *material;
};

/* The slot's material, decrypted, to u->material. */
static int read_material(struct unlock *u, unsigned number, struct ox_error *err)
{
	const struct ox_luks *luks = u->luks;
	const struct ox_luks_slot *slot = &luks->slots[number];
	size_t bytes = ox_luks_material_bytes(luks->key_bytes, slot->stripes);
	struct ox_crypto *crypto = NULL;
	int rc = u->read(u->arg, (uint64_t)slot->key_offset * OX_CRYPTO_SECTOR, u->material, bytes);

	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read the key material of slot %u: %s",
		                    u->what, number, strerror(-rc));
	rc = ox_crypto_open(luks->cipher, luks->mode, u->slot_key, luks->key_bytes, u->what,
	                    &crypto, err);
	if (rc < 0)
		return rc;
	rc = ox_crypto_decrypt(crypto, 0, u->material, u->material, bytes);
	ox_crypto_free(crypto);
	return rc < 0 ? ox_error_set(err, -rc, "%s: GnuTLS failed to decrypt key slot %u", u->what,
	                             number)
	              : 0;
}

/* *opened: the master key is in u->master_key. */
static int try_slot(struct unlock *u, unsigned number, bool *opened, struct ox_error *err)
{
	const struct ox_luks *luks = u->luks;
	const struct ox_luks_slot *slot = &luks->slots[number];
	uint8_t digest[sizeof(luks->digest)];
	int rc = ox_luks_derive(u->hash, u->phrase, u->phrase_bytes, slot->salt, slot->iterations,
	                        u->slot_key, luks->key_bytes);

	if (rc == 0) {
		rc = read_material(u, number, err);
		if (rc < 0)
			return rc;
		rc = ox_luks_merge(u->hash, u->material, luks->key_bytes, slot->stripes,
		                   u->master_key);
	}
	if (rc == 0)
		rc = ox_luks_derive(u->hash, u->master_key, luks->key_bytes, luks->digest_salt,
		                    luks->digest_iterations, digest, sizeof(digest));
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: GnuTLS failed to derive a key with hash %s",
		                    u->what, luks->hash);
	*opened = gnutls_memcmp(digest, luks->digest, sizeof(digest)) == 0;
	return 0;
}

static int try_slots(struct unlock *u, struct ox_error *err)
{
	unsigned active = 0;

	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
		bool opened = false;
		int rc;

		if (!u->luks->slots[i].active)
			continue;
		active++;
		rc = try_slot(u, i, &opened, err);
		if (rc < 0 || opened)
			return rc;
	}
	if (active == 0)
		return ox_error_set(err, EACCES,
		                    "%s: no key slot is in use: nobody can decrypt it any more",
		                    u->what);
	return ox_error_set(err, EACCES, "%s: wrong pass phrase: it opens none of %u key slot%s",
	                    u->what, active, active == 1 ? "" : "s");
}

int ox_luks_unlock(const struct ox_luks *luks, const uint8_t *phrase, size_t phrase_bytes,
                   int (*read)(void *arg, uint64_t offset, void *buf, size_t bytes), void *arg,
                   const char *what, struct ox_crypto **crypto, struct ox_error *err)
{
	struct unlock u = {.luks = luks,
	                   .phrase = phrase,
	                   .phrase_bytes = phrase_bytes,
	                   .read = read,
	                   .arg = arg,
	                   .what = what,
	                   .hash = ox_crypto_hash(luks->hash)};
	size_t material_bytes = 0;
	int rc;

	/* Before seconds are spent. */
	rc = ox_crypto_check(luks->cipher, luks->mode, luks->key_bytes, what, err);
	if (rc < 0)
		return rc;
	if (u.hash == GNUTLS_MAC_UNKNOWN)
		return ox_crypto_no_hash(luks->hash, what, err);
	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++)
		material_bytes =
		        ox_max(material_bytes,
		               ox_luks_material_bytes(luks->key_bytes, luks->slots[i].stripes));
	u.slot_key = ox_key_alloc(OX_CRYPTO_KEY_MAX);
	u.master_key = ox_key_alloc(OX_CRYPTO_KEY_MAX);
	u.material = ox_key_alloc(material_bytes);
	if (!u.slot_key || !u.master_key || !u.material)
		rc = ox_error_set(err, ENOMEM, "%s: no memory to unlock it", what);
	else
		rc = try_slots(&u, err);
	if (rc == 0)
		rc = ox_crypto_open(luks->cipher, luks->mode, u.master_key, luks->key_bytes, what,
		                    crypto, err);
	ox_key_free(u.slot_key, OX_CRYPTO_KEY_MAX);
	ox_key_free(u.master_key, OX_CRYPTO_KEY_MAX);
	ox_key_free(u.material, material_bytes);
	return rc;
}
