/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * New LUKS headers: what -o says, the layout, and the keys.
 *
 * The layout is that of QEMU and cryptsetup: header, then at 4096 the material of eight key slots,
 * each of 4000 stripes and rounded up to 4096 bytes, then the payload, aligned as the caller says.
 * Only slot 0 is used.  How often PBKDF2 iterates is measured on the thread's own CPU time, so that
 * a busy host does not make a weaker key.
 */
#include "image/crypto_private.h"
#include "base/text.h"
#include "image/format.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define ITERATIONS_MIN 1000u
#define ITER_TIME_MS   2000u
#define ALIGNMENT_MAX  (UINT64_C(1) << 30)
/* For a measurement; QEMU and cryptsetup take longer. */
#define MEASURE_NS UINT64_C(50000000)

/* --- options ---------------------------------------------------------------------------------- */

static const char *given(const struct ox_image_create_options *options, const char *prefix,
                         const char *word, const char *otherwise)
{
	OX_FREE char *name = ox_xasprintf("%s%s", prefix, word);
	const char *value = ox_create_option(options, name);

	return value ? value : otherwise;
}

/* encrypt.format; for -f luks there is no such word. */
static int check_format(const struct ox_image_create_options *options, const char *prefix,
                        struct ox_error *err)
{
	const char *format = given(options, prefix, "format", NULL);

	if (!*prefix || (format && strcmp(format, "luks") == 0))
		return 0;
	if (!format)
		return ox_error_set(err, EINVAL, "%s: %sformat=luks is missing", options->path,
		                    prefix);
	if (strcmp(format, "aes") == 0)
		return ox_error_set(err, ENOTSUP,
		                    "%s: %sformat=aes is not created any more, because it is not "
		                    "safe; use %sformat=luks",
		                    options->path, prefix, prefix);
	return ox_error_set(err, EINVAL, "%s: there is no %sformat '%s'; there is luks",
	                    options->path, prefix, format);
}

static int layout(const struct ox_luks_create *options, const char *what, struct ox_luks *luks,
                  struct ox_error *err);

int ox_luks_create_options(const struct ox_image_create_options *options, const char *prefix,
                           struct ox_luks_create *out, const char **key_secret,
                           struct ox_error *err)
{
	const char *iter_time = given(options, prefix, "iter-time", NULL);
	struct ox_luks luks;
	uint64_t ms = ITER_TIME_MS;
	int rc = check_format(options, prefix, err);

	if (rc < 0)
		return rc;
	*key_secret = given(options, prefix, "key-secret", NULL);
	if (!*key_secret)
		return ox_error_set(err, EINVAL,
		                    "%s: which pass phrase? give --object "
		                    "secret,id=sec0,file=PATH and -o %skey-secret=sec0",
		                    options->path, prefix);
	if (iter_time && !ox_parse_uint(iter_time, 0, UINT32_MAX, &ms))
		return ox_error_set(err, EINVAL, "%siter-time is in milliseconds, not '%s'", prefix,
		                    iter_time);
	*out = (struct ox_luks_create){
	        .cipher_alg = given(options, prefix, "cipher-alg", "aes-256"),
	        .cipher_mode = given(options, prefix, "cipher-mode", "xts"),
	        .ivgen_alg = given(options, prefix, "ivgen-alg", "plain64"),
	        .ivgen_hash_alg = given(options, prefix, "ivgen-hash-alg", NULL),
	        .hash_alg = given(options, prefix, "hash-alg", "sha256"),
	        .iter_time_ms = (uint32_t)ms,
	};
	return layout(out, options->path, &luks, err);
}

/* --- the layout ------------------------------------------------------------------------------- */

static int no_cipher(const char *name, const char *what, struct ox_error *err)
{
	static const char *const known[] = {"aes-128", "aes-192", "aes-256", NULL};
	const char *near;

	if (strncmp(name, "serpent-", 8) == 0 || strncmp(name, "twofish-", 8) == 0 ||
	    strcmp(name, "cast5-128") == 0 || strcmp(name, "3des") == 0 || strcmp(name, "des") == 0)
		return ox_error_set(err, ENOTSUP,
		                    "%s: cipher %s is not supported: GnuTLS does not have it for "
		                    "disks; use aes-256 or aes-128",
		                    what, name);
	near = ox_nearest_word(name, known);
	return ox_error_set(err, EINVAL, "%s: there is no cipher '%s'%s%s", what, name,
	                    near ? "; did you mean " : "; use aes-256 or aes-128",
	                    near ? near : "");
}

/* The master key's size. */
static int find_key_bytes(const struct ox_luks_create *options, const char *what,
                          uint32_t *key_bytes, struct ox_error *err)
{
	bool xts = strcmp(options->cipher_mode, "xts") == 0;
	const char *name = options->cipher_alg;

	if (!xts && strcmp(options->cipher_mode, "cbc") != 0)
		return ox_error_set(err, ENOTSUP,
		                    "%s: cipher mode '%s' is not supported; use xts or cbc", what,
		                    options->cipher_mode);
	if (strcmp(name, "aes-128") == 0)
		*key_bytes = xts ? 32 : 16;
	else if (strcmp(name, "aes-256") == 0)
		*key_bytes = xts ? 64 : 32;
	else if (strcmp(name, "aes-192") == 0)
		return ox_error_set(err, ENOTSUP,
		                    xts ? "%s: mode xts does not go with aes-192; use aes-256"
		                        : "%s: a LUKS image with aes-192 is not created, because "
		                          "QEMU cannot open it; use aes-256",
		                    what);
	else
		return no_cipher(name, what, err);
	return 0;
}

/* "cbc-essiv:sha256"; the words were checked against short tables or are cut, and then fail. */
static int make_mode(const struct ox_luks_create *options, const char *what, struct ox_luks *luks,
                     struct ox_error *err)
{
	const char *iv_hash = options->ivgen_hash_alg;
	int length;

	if (!iv_hash && strcmp(options->ivgen_alg, "essiv") == 0)
		iv_hash = "sha256";
	length = snprintf(luks->mode, sizeof(luks->mode), "%s-%s%s%s", options->cipher_mode,
	                  options->ivgen_alg, iv_hash ? ":" : "", iv_hash ? iv_hash : "");
	if (length >= 32 || (iv_hash && ox_crypto_hash(iv_hash) == GNUTLS_MAC_UNKNOWN))
		return ox_error_set(err, ENOTSUP,
		                    "%s: IV generator '%s' with hash '%s' is not supported; use "
		                    "plain64, or essiv with sha256",
		                    what, options->ivgen_alg, iv_hash ? iv_hash : "");
	return 0;
}

/* All of the header but keys, digests and numbers of iterations. */
static int layout(const struct ox_luks_create *options, const char *what, struct ox_luks *luks,
                  struct ox_error *err)
{
	uint64_t align = ox_max(options->alignment, (uint64_t)OX_LUKS_SLOT_ALIGN);
	uint64_t material;
	int rc;

	memset(luks, 0, sizeof(*luks));
	rc = find_key_bytes(options, what, &luks->key_bytes, err);
	if (rc == 0)
		rc = make_mode(options, what, luks, err);
	if (rc < 0)
		return rc;
	snprintf(luks->cipher, sizeof(luks->cipher), "aes");
	if (ox_crypto_hash(options->hash_alg) == GNUTLS_MAC_UNKNOWN)
		return ox_crypto_no_hash(options->hash_alg, what, err);
	snprintf(luks->hash, sizeof(luks->hash), "%s", options->hash_alg);
	rc = ox_crypto_check(luks->cipher, luks->mode, luks->key_bytes, what, err);
	if (rc < 0)
		return rc;
	if (!ox_is_power_of_2(align) || align > ALIGNMENT_MAX)
		return ox_error_set(err, EINVAL, "%s: data cannot be aligned to %llu bytes", what,
		                    (unsigned long long)align);
	material = ox_align_up(ox_luks_material_bytes(luks->key_bytes, OX_LUKS_STRIPES),
	                       OX_LUKS_SLOT_ALIGN);
	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
		luks->slots[i].stripes = OX_LUKS_STRIPES;
		luks->slots[i].key_offset =
		        (uint32_t)((OX_LUKS_SLOT_ALIGN + i * material) / OX_CRYPTO_SECTOR);
	}
	luks->payload_offset =
	        (uint32_t)(ox_align_up(OX_LUKS_SLOT_ALIGN + OX_LUKS_KEY_SLOTS * material, align) /
	                   OX_CRYPTO_SECTOR);
	return 0;
}

int ox_luks_area(const struct ox_luks_create *options, uint64_t *bytes, struct ox_error *err)
{
	struct ox_luks luks;
	int rc = layout(options, "LUKS header", &luks, err);

	*bytes = (uint64_t)luks.payload_offset * OX_CRYPTO_SECTOR;
	return rc;
}

/* --- keys ------------------------------------------------------------------------------------- */

static uint64_t cpu_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* How many iterations take `ms` milliseconds here. */
static int count_iterations(gnutls_mac_algorithm_t hash, size_t key_bytes, uint64_t ms,
                            uint32_t *iterations)
{
	static const uint8_t phrase[8] = "measure", salt[32];
	uint64_t want = ox_min(MEASURE_NS, ms * 1000000u);
	uint8_t key[OX_CRYPTO_KEY_MAX];
	uint32_t count = ITERATIONS_MIN;
	uint64_t spent;

	for (;;) {
		uint64_t start = cpu_ns();
		int rc = ox_luks_derive(hash, phrase, sizeof(phrase), salt, count, key, key_bytes);

		if (rc < 0)
			return rc;
		spent = ox_max(cpu_ns() - start, UINT64_C(1));
		if (spent >= want || count >= OX_LUKS_ITERATIONS_MAX / 2)
			break;
		count *= 2;
	}
	/* In floating point: no product can overflow. */
	*iterations = (uint32_t)ox_max(ox_min((double)count * 1e6 * (double)ms / (double)spent,
	                                      (double)OX_LUKS_ITERATIONS_MAX),
	                               (double)ITERATIONS_MIN);
	return 0;
}

/* Version 4, random. */
static int make_uuid(char text[41])
{
	uint8_t b[16];

	if (gnutls_rnd(GNUTLS_RND_NONCE, b, sizeof(b)) < 0)
		return -EIO;
	b[6] = (b[6] & 0x0f) | 0x40;
	b[8] = (b[8] & 0x3f) | 0x80;
	snprintf(text, 41, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
	         b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12],
	         b[13], b[14], b[15]);
	return 0;
}

/* Makes the master key and what the header says of it. */
static int make_master_key(gnutls_mac_algorithm_t hash, uint32_t iter_time_ms, struct ox_luks *luks,
                           uint8_t *key)
{
	int rc;

	if (gnutls_rnd(GNUTLS_RND_KEY, key, luks->key_bytes) < 0 ||
	    gnutls_rnd(GNUTLS_RND_RANDOM, luks->digest_salt, sizeof(luks->digest_salt)) < 0)
		return -EIO;
	rc = make_uuid(luks->uuid);
	/* The key is random: its digest need not be as slow as a phrase's (nor is it elsewhere). */
	if (rc == 0)
		rc = count_iterations(hash, sizeof(luks->digest), iter_time_ms / 8,
		                      &luks->digest_iterations);
	if (rc == 0)
		rc = ox_luks_derive(hash, key, luks->key_bytes, luks->digest_salt,
		                    luks->digest_iterations, luks->digest, sizeof(luks->digest));
	return rc;
}

/* Puts the master key, encrypted with the phrase, to the slot's place in `out`. */
static int fill_slot(gnutls_mac_algorithm_t hash, uint32_t iter_time_ms, const uint8_t *phrase,
                     size_t phrase_bytes, const uint8_t *master_key, struct ox_luks *luks,
                     uint8_t *out)
{
	struct ox_luks_slot *slot = &luks->slots[0];
	uint8_t *place = out + (uint64_t)slot->key_offset * OX_CRYPTO_SECTOR;
	size_t bytes = ox_luks_material_bytes(luks->key_bytes, slot->stripes);
	uint8_t *material = ox_key_alloc(bytes), *key = ox_key_alloc(OX_CRYPTO_KEY_MAX);
	struct ox_crypto *crypto = NULL;
	int rc = material && key ? 0 : -ENOMEM;

	slot->active = true;
	if (rc == 0 && gnutls_rnd(GNUTLS_RND_RANDOM, slot->salt, sizeof(slot->salt)) < 0)
		rc = -EIO;
	if (rc == 0)
		rc = count_iterations(hash, luks->key_bytes, iter_time_ms, &slot->iterations);
	if (rc == 0)
		rc = ox_luks_derive(hash, phrase, phrase_bytes, slot->salt, slot->iterations, key,
		                    luks->key_bytes);
	if (rc == 0)
		rc = ox_luks_split(hash, master_key, luks->key_bytes, slot->stripes, material);
	if (rc == 0)
		rc = ox_crypto_open(luks->cipher, luks->mode, key, luks->key_bytes, "LUKS header",
		                    &crypto, NULL);
	if (rc == 0)
		rc = ox_crypto_encrypt(crypto, 0, material, place, bytes);
	ox_crypto_free(crypto);
	ox_key_free(material, bytes);
	ox_key_free(key, OX_CRYPTO_KEY_MAX);
	return rc;
}

int ox_luks_format(const struct ox_luks_create *options, const uint8_t *phrase, size_t phrase_bytes,
                   uint8_t *out, uint64_t area, struct ox_crypto **crypto, struct ox_error *err)
{
	gnutls_mac_algorithm_t hash;
	struct ox_luks luks;
	uint8_t *master_key;
	int rc = layout(options, "LUKS header", &luks, err);

	if (rc < 0)
		return rc;
	if (area < (uint64_t)luks.payload_offset * OX_CRYPTO_SECTOR)
		return ox_error_set(err, EINVAL, "a LUKS header needs %llu bytes, there are %llu",
		                    (unsigned long long)luks.payload_offset * OX_CRYPTO_SECTOR,
		                    (unsigned long long)area);
	hash = ox_crypto_hash(luks.hash);
	master_key = ox_key_alloc(OX_CRYPTO_KEY_MAX);
	if (!master_key)
		return ox_error_set(err, ENOMEM, "no memory for a master key");
	memset(out, 0, area);
	rc = make_master_key(hash, options->iter_time_ms, &luks, master_key);
	if (rc == 0)
		rc = fill_slot(hash, options->iter_time_ms, phrase, phrase_bytes, master_key, &luks,
		               out);
	if (rc == 0 && crypto)
		rc = ox_crypto_open(luks.cipher, luks.mode, master_key, luks.key_bytes,
		                    "LUKS header", crypto, NULL);
	ox_key_free(master_key, OX_CRYPTO_KEY_MAX);
	if (rc < 0)
		return ox_error_set(err, -rc, "GnuTLS failed to make a LUKS header: %s",
		                    strerror(-rc));
	ox_luks_write_header(&luks, out);
	return 0;
}
