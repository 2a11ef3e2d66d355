/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Ciphers for an image's sectors, by GnuTLS.
 *
 * Each sector of 512 bytes is encrypted on its own, with an IV that is made of its number: as it is
 * (plain: 32 bits of it, plain64: all), or encrypted with a hash of the key (essiv).
 *
 * A GnuTLS handle keeps the IV, so one thread uses it at a time: an ox_crypto has a list of free
 * ones, and makes another when a caller finds it empty.  They are never fewer than one and never
 * more than the threads that were here at once.  The list is under `lock`, which is held to take
 * and to give back, not while encrypting.
 *
 * Setting the IV costs less than a tenth of a sector's time (AES-256-XTS on an EPYC with AES-NI:
 * 4.3 GB/s a core by sectors, 6.8 GB/s if 64 KiB were one), so nothing cleverer is needed.
 * CBC encrypts at 1 GB/s: each of its blocks waits for the one before.
 */
#include "image/crypto_private.h"
#include "base/byteorder.h"
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

enum iv_kind { IV_PLAIN, IV_PLAIN64, IV_ESSIV };

/* What a cipher's and a mode's name mean. */
struct spec {
	gnutls_cipher_algorithm_t cipher;
	enum iv_kind iv;
	gnutls_mac_algorithm_t essiv_hash;
	gnutls_cipher_algorithm_t essiv_cipher; /* CBC, used for one block with an IV of zeroes */
};

struct handle {
	gnutls_cipher_hd_t cipher, essiv;
	struct handle *next;
};

struct ox_crypto {
	struct spec spec;
	uint8_t *key; /* from ox_key_alloc(): the key, and that of essiv behind it */
	size_t key_bytes, essiv_bytes;
	pthread_mutex_t lock;
	struct handle *free; /* under lock */
};

#define KEY_MEMORY (2u * OX_CRYPTO_KEY_MAX)
#define IV_BYTES   16u

/* --- memory ----------------------------------------------------------------------------------- */

void *ox_key_alloc(size_t bytes)
{
	size_t mapped = ox_align_up(bytes, (uint64_t)sysconf(_SC_PAGESIZE));
	void *memory =
	        mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	/* Both are the best that can be done, not a condition. */
	(void)!mlock(memory, mapped);
	(void)!madvise(memory, mapped, MADV_DONTDUMP);
	return memory;
}

void ox_key_free(void *memory, size_t bytes)
{
	if (!memory)
		return;
	gnutls_memset(memory, 0, bytes);
	munmap(memory, ox_align_up(bytes, (uint64_t)sysconf(_SC_PAGESIZE)));
}

/* --- names ------------------------------------------------------------------------------------ */

gnutls_mac_algorithm_t ox_crypto_hash(const char *name)
{
	static const struct {
		const char *name;
		gnutls_mac_algorithm_t mac;
	} hashes[] = {
	        {"sha1", GNUTLS_MAC_SHA1},     {"sha224", GNUTLS_MAC_SHA224},
	        {"sha256", GNUTLS_MAC_SHA256}, {"sha384", GNUTLS_MAC_SHA384},
	        {"sha512", GNUTLS_MAC_SHA512}, {"ripemd160", GNUTLS_MAC_RMD160},
	        {"md5", GNUTLS_MAC_MD5},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(hashes); i++) {
		if (strcmp(name, hashes[i].name) == 0) {
			/* GnuTLS names RIPEMD-160 without having it in most builds. */
			uint8_t digest[64];

			return gnutls_hash_fast((gnutls_digest_algorithm_t)hashes[i].mac, "", 0,
			                        digest) == 0
			               ? hashes[i].mac
			               : GNUTLS_MAC_UNKNOWN;
		}
	}
	return GNUTLS_MAC_UNKNOWN;
}

int ox_crypto_no_hash(const char *name, const char *what, struct ox_error *err)
{
	return ox_error_set(err, ENOTSUP,
	                    "%s: hash %s is not supported (GnuTLS has sha1, sha224, sha256, sha384 "
	                    "and sha512)",
	                    what, name);
}

/* The key's size of one AES in bytes: in CBC, or one half of XTS. */
static gnutls_cipher_algorithm_t aes_cbc(size_t key_bytes)
{
	switch (key_bytes) {
	case 16:
		return GNUTLS_CIPHER_AES_128_CBC;
	case 24:
		return GNUTLS_CIPHER_AES_192_CBC;
	case 32:
		return GNUTLS_CIPHER_AES_256_CBC;
	default:
		return GNUTLS_CIPHER_UNKNOWN;
	}
}

static gnutls_cipher_algorithm_t aes_xts(size_t key_bytes)
{
	switch (key_bytes) {
	case 32:
		return GNUTLS_CIPHER_AES_128_XTS;
	case 64:
		return GNUTLS_CIPHER_AES_256_XTS;
	default:
		return GNUTLS_CIPHER_UNKNOWN;
	}
}

static int find_iv(const char *iv, const char *what, struct spec *spec, struct ox_error *err)
{
	size_t length = strcspn(iv, ":");

	/* A hash behind these two means nothing; QEMU writes one when it is told to. */
	if (length == 7 && strncmp(iv, "plain64", 7) == 0) {
		spec->iv = IV_PLAIN64;
		return 0;
	}
	if (length == 5 && strncmp(iv, "plain", 5) == 0) {
		spec->iv = IV_PLAIN;
		return 0;
	}
	if (strncmp(iv, "essiv:", 6) != 0)
		return ox_error_set(err, ENOTSUP,
		                    "%s: IV generator %s is not supported (plain64, plain and "
		                    "essiv:HASH are)",
		                    what, iv);
	spec->iv = IV_ESSIV;
	spec->essiv_hash = ox_crypto_hash(iv + 6);
	if (spec->essiv_hash == GNUTLS_MAC_UNKNOWN)
		return ox_crypto_no_hash(iv + 6, what, err);
	/* The digest is the key of the cipher that makes the IVs. */
	spec->essiv_cipher =
	        aes_cbc(gnutls_hash_get_len((gnutls_digest_algorithm_t)spec->essiv_hash));
	if (spec->essiv_cipher == GNUTLS_CIPHER_UNKNOWN)
		return ox_error_set(err, ENOTSUP,
		                    "%s: essiv:%s makes no key that AES takes; essiv:sha256 does",
		                    what, iv + 6);
	return 0;
}

static int find_spec(const char *cipher, const char *mode, size_t key_bytes, const char *what,
                     struct spec *spec, struct ox_error *err)
{
	*spec = (struct spec){0};
	if (strcmp(cipher, "aes") != 0)
		return ox_error_set(err, ENOTSUP,
		                    "%s: cipher %s is not supported: GnuTLS does not have it; only "
		                    "aes can be used here",
		                    what, cipher);
	if (strncmp(mode, "xts-", 4) == 0) {
		spec->cipher = aes_xts(key_bytes);
		mode += 4;
	} else if (strncmp(mode, "cbc-", 4) == 0) {
		spec->cipher = aes_cbc(key_bytes);
		mode += 4;
	} else {
		return ox_error_set(err, ENOTSUP,
		                    "%s: cipher mode %s is not supported%s; xts and cbc are", what,
		                    mode,
		                    strncmp(mode, "ecb", 3) == 0 || strncmp(mode, "ctr", 3) == 0
		                            ? ", because it does not hide what a disk holds"
		                            : "");
	}
	if (spec->cipher == GNUTLS_CIPHER_UNKNOWN)
		return ox_error_set(err, EINVAL,
		                    "%s: a key of %zu bits does not fit cipher aes in mode %s",
		                    what, key_bytes * 8, mode - 4);
	return find_iv(mode, what, spec, err);
}

int ox_crypto_check(const char *cipher, const char *mode, size_t key_bytes, const char *what,
                    struct ox_error *err)
{
	struct spec spec;

	return find_spec(cipher, mode, key_bytes, what, &spec, err);
}

/* --- handles ---------------------------------------------------------------------------------- */

static void free_handle(struct handle *handle)
{
	if (handle->cipher)
		gnutls_cipher_deinit(handle->cipher);
	if (handle->essiv)
		gnutls_cipher_deinit(handle->essiv);
	free(handle);
}

/* NULL: no memory, or GnuTLS refuses (its FIPS mode). */
static struct handle *new_handle(const struct ox_crypto *crypto)
{
	gnutls_datum_t key = {.data = crypto->key, .size = (unsigned)crypto->key_bytes};
	gnutls_datum_t essiv = {.data = crypto->key + OX_CRYPTO_KEY_MAX,
	                        .size = (unsigned)crypto->essiv_bytes};
	struct handle *handle = calloc(1, sizeof(*handle));

	if (!handle)
		return NULL;
	if (gnutls_cipher_init(&handle->cipher, crypto->spec.cipher, &key, NULL) < 0) {
		handle->cipher = NULL;
		goto fail;
	}
	if (crypto->spec.iv == IV_ESSIV &&
	    gnutls_cipher_init(&handle->essiv, crypto->spec.essiv_cipher, &essiv, NULL) < 0) {
		handle->essiv = NULL;
		goto fail;
	}
	return handle;
fail:
	free_handle(handle);
	return NULL;
}

static struct handle *take_handle(struct ox_crypto *crypto)
{
	struct handle *handle;

	pthread_mutex_lock(&crypto->lock);
	handle = crypto->free;
	if (handle)
		crypto->free = handle->next;
	pthread_mutex_unlock(&crypto->lock);
	return handle ? handle : new_handle(crypto);
}

static void give_handle(struct ox_crypto *crypto, struct handle *handle)
{
	pthread_mutex_lock(&crypto->lock);
	handle->next = crypto->free;
	crypto->free = handle;
	pthread_mutex_unlock(&crypto->lock);
}

int ox_crypto_open(const char *cipher, const char *mode, const uint8_t *key, size_t key_bytes,
                   const char *what, struct ox_crypto **out, struct ox_error *err)
{
	struct ox_crypto *crypto;
	struct spec spec;
	int rc = find_spec(cipher, mode, key_bytes, what, &spec, err);

	if (rc < 0)
		return rc;
	crypto = ox_xcalloc(1, sizeof(*crypto));
	crypto->spec = spec;
	crypto->key_bytes = key_bytes;
	pthread_mutex_init(&crypto->lock, NULL);
	crypto->key = ox_key_alloc(KEY_MEMORY);
	if (!crypto->key) {
		rc = ox_error_set(err, ENOMEM, "%s: no memory for its key", what);
		goto fail;
	}
	memcpy(crypto->key, key, key_bytes);
	if (spec.iv == IV_ESSIV) {
		gnutls_digest_algorithm_t hash = (gnutls_digest_algorithm_t)spec.essiv_hash;

		crypto->essiv_bytes = gnutls_hash_get_len(hash);
		rc = gnutls_hash_fast(hash, key, key_bytes, crypto->key + OX_CRYPTO_KEY_MAX);
	}
	if (rc == 0)
		crypto->free = new_handle(crypto);
	if (!crypto->free) {
		rc = ox_error_set(err, EIO, "%s: GnuTLS refuses cipher %s in mode %s%s%s", what,
		                  cipher, mode, rc < 0 ? ": " : "",
		                  rc < 0 ? gnutls_strerror(rc) : "");
		goto fail;
	}
	*out = crypto;
	return 0;
fail:
	ox_crypto_free(crypto);
	return rc;
}

void ox_crypto_free(struct ox_crypto *crypto)
{
	struct handle *handle;

	if (!crypto)
		return;
	while ((handle = crypto->free)) {
		crypto->free = handle->next;
		free_handle(handle);
	}
	pthread_mutex_destroy(&crypto->lock);
	ox_key_free(crypto->key, KEY_MEMORY);
	free(crypto);
}

/* As QEMU makes the key: the password up to a NUL, cut or filled up with zeroes. */
int ox_crypto_open_aes(const uint8_t *password, size_t bytes, struct ox_crypto **crypto,
                       struct ox_error *err)
{
	uint8_t key[16] = {0};
	int rc;

	memcpy(key, password, strnlen((const char *)password, ox_min(bytes, sizeof(key))));
	rc = ox_crypto_open("aes", "cbc-plain64", key, sizeof(key), "legacy AES encryption", crypto,
	                    err);
	gnutls_memset(key, 0, sizeof(key));
	return rc;
}

/* --- sectors ---------------------------------------------------------------------------------- */

static int make_iv(const struct ox_crypto *crypto, const struct handle *handle, uint64_t sector,
                   uint8_t iv[IV_BYTES])
{
	uint8_t zero[IV_BYTES] = {0};

	ox_put_le64(iv, crypto->spec.iv == IV_PLAIN ? (uint32_t)sector : sector);
	memset(iv + 8, 0, IV_BYTES - 8);
	if (crypto->spec.iv != IV_ESSIV)
		return 0;
	gnutls_cipher_set_iv(handle->essiv, zero, IV_BYTES);
	return gnutls_cipher_encrypt(handle->essiv, iv, IV_BYTES);
}

static int run_sectors(const struct ox_crypto *crypto, const struct handle *handle, uint64_t sector,
                       const uint8_t *in, uint8_t *out, size_t bytes, bool encrypt)
{
	uint8_t iv[IV_BYTES];

	for (size_t at = 0; at < bytes; at += OX_CRYPTO_SECTOR, sector++) {
		int rc = make_iv(crypto, handle, sector, iv);

		if (rc < 0)
			return -EIO;
		gnutls_cipher_set_iv(handle->cipher, iv, IV_BYTES);
		if (encrypt)
			rc = gnutls_cipher_encrypt2(handle->cipher, in + at, OX_CRYPTO_SECTOR,
			                            out + at, OX_CRYPTO_SECTOR);
		else
			rc = gnutls_cipher_decrypt2(handle->cipher, in + at, OX_CRYPTO_SECTOR,
			                            out + at, OX_CRYPTO_SECTOR);
		if (rc < 0)
			return -EIO;
	}
	return 0;
}

static int run(struct ox_crypto *crypto, uint64_t offset, const void *in, void *out, size_t bytes,
               bool encrypt)
{
	struct handle *handle;
	int rc;

	if (!ox_is_aligned(offset | bytes, OX_CRYPTO_SECTOR))
		return -EIO;
	handle = take_handle(crypto);
	if (!handle)
		return -EIO;
	rc = run_sectors(crypto, handle, offset / OX_CRYPTO_SECTOR, in, out, bytes, encrypt);
	give_handle(crypto, handle);
	return rc;
}

int ox_crypto_encrypt(struct ox_crypto *crypto, uint64_t offset, const void *in, void *out,
                      size_t bytes)
{
	return run(crypto, offset, in, out, bytes, true);
}

int ox_crypto_decrypt(struct ox_crypto *crypto, uint64_t offset, const void *in, void *out,
                      size_t bytes)
{
	return run(crypto, offset, in, out, bytes, false);
}
