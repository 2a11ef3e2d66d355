/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * LUKS volumes: headers that are refused, keys that open and keys that do not, creation's words,
 * and images: what a guest reads back, what lies on the store, other sizes.
 *
 * Derivation takes its 1000 iterations at least (iter-time 0), so that this stays quick.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "base/byteorder.h"
#include "base/iov.h"
#include "image/crypto_private.h"
#include "image/format.h"
#include <jansson.h>

#define PHRASE ((const uint8_t *)"correct horse")
#define MIB    (UINT64_C(1) << 20)

static struct ox_luks_create options_of(const char *cipher, const char *mode, const char *iv,
                                        const char *iv_hash, const char *hash)
{
	return (struct ox_luks_create){.cipher_alg = cipher,
	                               .cipher_mode = mode,
	                               .ivgen_alg = iv,
	                               .ivgen_hash_alg = iv_hash,
	                               .hash_alg = hash};
}

/* A whole header area; malloc'd. */
static uint8_t *make_area(const struct ox_luks_create *options, uint64_t *bytes,
                          struct ox_crypto **crypto)
{
	struct ox_error err = {0};
	uint8_t *area;

	if (ox_luks_area(options, bytes, &err) < 0)
		fail_msg("%s", err.text);
	area = malloc(*bytes);
	assert_non_null(area);
	if (ox_luks_format(options, PHRASE, 13, area, *bytes, crypto, &err) < 0)
		fail_msg("%s", err.text);
	return area;
}

/* --- parsing ---------------------------------------------------------------------------------- */

/* What the tests change, by its offset in the header. */
#define CIPHER       8u
#define MODE         40u
#define HASH         72u
#define PAYLOAD      104u
#define KEY_BYTES    108u
#define DIGEST_ITER  164u
#define UUID         168u
#define SLOT(i)      (208u + 48u * (i))
#define SLOT_ITER    4u
#define SLOT_OFFSET  40u
#define SLOT_STRIPES 44u

static uint8_t good[OX_LUKS_HEADER_BYTES];
static uint64_t good_area;

static void make_good(void)
{
	struct ox_luks_create options = options_of("aes-256", "xts", "plain64", NULL, "sha256");
	uint8_t *area = make_area(&options, &good_area, NULL);

	memcpy(good, area, sizeof(good));
	free(area);
}

static void refuse_bytes(const uint8_t *header, size_t bytes, uint64_t area, int error,
                         const char *says)
{
	struct ox_error err = {0};
	struct ox_luks luks;

	assert_int_equal(ox_luks_parse(header, bytes, area, "x.img", &luks, &err), -error);
	if (!strstr(err.text, says) || strncmp(err.text, "x.img: ", 7) != 0)
		fail_msg("'%s' does not say '%s'", err.text, says);
}

static void refuse_number(unsigned at, uint32_t value, const char *says)
{
	uint8_t bad[OX_LUKS_HEADER_BYTES];

	memcpy(bad, good, sizeof(bad));
	ox_put_be32(bad + at, value);
	refuse_bytes(bad, sizeof(bad), good_area, EINVAL, says);
}

static void refuse_text(unsigned at, const char *text, size_t bytes, const char *says)
{
	uint8_t bad[OX_LUKS_HEADER_BYTES];

	memcpy(bad, good, sizeof(bad));
	memcpy(bad + at, text, bytes);
	refuse_bytes(bad, sizeof(bad), good_area, EINVAL, says);
}

static void test_parse(void **state)
{
	uint8_t again[OX_LUKS_HEADER_BYTES];
	struct ox_luks luks;

	make_good();
	assert_int_equal(ox_luks_parse(good, sizeof(good), good_area, "x", &luks, NULL), 0);
	assert_string_equal(luks.cipher, "aes");
	assert_string_equal(luks.mode, "xts-plain64");
	assert_string_equal(luks.hash, "sha256");
	assert_int_equal(luks.key_bytes, 64);
	assert_int_equal(strlen(luks.uuid), 36);
	/* QEMU's layout. */
	assert_int_equal(luks.payload_offset * 512u, 2068480);
	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
		assert_int_equal(luks.slots[i].active, i == 0);
		assert_int_equal(luks.slots[i].key_offset * 512u, 4096 + i * 258048);
		assert_int_equal(luks.slots[i].stripes, 4000);
	}
	ox_luks_write_header(&luks, again);
	assert_memory_equal(again, good, sizeof(good));
}

static void test_parse_refuses(void **state)
{
	uint8_t bad[OX_LUKS_HEADER_BYTES];

	make_good();
	memcpy(bad, good, sizeof(bad));
	bad[0] = 'S';
	refuse_bytes(bad, sizeof(bad), good_area, EINVAL, "no LUKS header");
	bad[0] = 'L';
	bad[7] = 2;
	refuse_bytes(bad, sizeof(bad), good_area, ENOTSUP, "version 2 is not supported");
	refuse_bytes(good, 591, good_area, EINVAL, "cut off");
	refuse_bytes(good, 3, good_area, EINVAL, "no LUKS header");
	refuse_bytes(good, 0, good_area, EINVAL, "no LUKS header");
	refuse_bytes(good, sizeof(good), 591, EINVAL, "cut off");
	/* The last slot's material ends behind the area. */
	refuse_bytes(good, sizeof(good), good_area - 4096, EINVAL, "slot 7");

	refuse_text(CIPHER, "0123456789abcdef0123456789abcdef", 32, "not text");
	refuse_text(CIPHER, "\n", 2, "not text");
	refuse_text(CIPHER, "", 1, "cipher ''");
	refuse_text(MODE, "xts", 4, "not MODE-IV");
	refuse_text(MODE, "-plain64", 9, "not MODE-IV");
	refuse_text(MODE, "xts-", 5, "not MODE-IV");
	refuse_text(HASH, "", 1, "hash ''");
	refuse_text(UUID, "\xff", 2, "not text");

	refuse_number(KEY_BYTES, 0, "key of 0 bytes");
	refuse_number(KEY_BYTES, 16, "does not fit");
	refuse_number(KEY_BYTES, 48, "does not fit");
	refuse_number(KEY_BYTES, 0xffffffff, "key of 4294967295 bytes");
	refuse_number(PAYLOAD, 0, "within the header");
	refuse_number(PAYLOAD, 1, "within the header");
	refuse_number(PAYLOAD, 8, "slot 0");
	refuse_number(DIGEST_ITER, 0, "0 iterations for the master key");
	refuse_number(DIGEST_ITER, 0x80000000, "iterations for the master key");
	refuse_number(SLOT(0), 1, "key slot 0 is neither");
	refuse_number(SLOT(0) + SLOT_ITER, 0, "0 iterations for key slot 0");
	refuse_number(SLOT(0) + SLOT_ITER, 0xffffffff, "iterations for key slot 0");
	refuse_number(SLOT(3) + SLOT_STRIPES, 0, "0 stripes in key slot 3");
	refuse_number(SLOT(3) + SLOT_STRIPES, 0xffffffff, "stripes in key slot 3");
	refuse_number(SLOT(0) + SLOT_OFFSET, 1, "slot 0 is at sector 1,");
	refuse_number(SLOT(0) + SLOT_OFFSET, 0xffffffff, "slot 0");
	refuse_number(SLOT(7) + SLOT_OFFSET, 4040 - 499, "slot 7");
	refuse_number(SLOT(2) + SLOT_OFFSET, 8, "slots 0 and 2 overlap");
	refuse_number(SLOT(5) + SLOT_STRIPES, 4100, "slots 5 and 6 overlap");
}

/* What only cannot be decrypted here is told about all the same. */
static void test_parse_foreign(void **state)
{
	uint8_t header[OX_LUKS_HEADER_BYTES];
	struct ox_error err = {0};
	struct ox_crypto *crypto = NULL;
	struct ox_luks luks;
	json_t *info;

	make_good();
	memcpy(header, good, sizeof(header));
	memcpy(header + CIPHER, "serpent", 8);
	assert_int_equal(ox_luks_parse(header, sizeof(header), good_area, "x", &luks, NULL), 0);
	info = ox_luks_info(&luks);
	assert_string_equal(json_string_value(json_object_get(info, "cipher-alg")), "serpent-256");
	json_decref(info);
	assert_int_equal(ox_luks_unlock(&luks, PHRASE, 13, NULL, NULL, "x", &crypto, &err),
	                 -ENOTSUP);
	assert_non_null(strstr(err.text, "cipher serpent is not supported"));

	memcpy(header, good, sizeof(header));
	memcpy(header + HASH, "whirlpool", 10);
	assert_int_equal(ox_luks_parse(header, sizeof(header), good_area, "x", &luks, NULL), 0);
	ox_error_clear(&err);
	assert_int_equal(ox_luks_unlock(&luks, PHRASE, 13, NULL, NULL, "x", &crypto, &err),
	                 -ENOTSUP);
	assert_non_null(strstr(err.text, "hash whirlpool is not supported"));
}

static void test_info(void **state)
{
	struct ox_luks_create options = options_of("aes-128", "cbc", "essiv", NULL, "sha1");
	uint64_t bytes;
	uint8_t *area = make_area(&options, &bytes, NULL);
	struct ox_luks luks;
	json_t *info, *slots;

	assert_int_equal(ox_luks_parse(area, bytes, bytes, "x", &luks, NULL), 0);
	info = ox_luks_info(&luks);
	assert_string_equal(json_string_value(json_object_get(info, "ivgen-alg")), "essiv");
	assert_string_equal(json_string_value(json_object_get(info, "ivgen-hash-alg")), "sha256");
	assert_string_equal(json_string_value(json_object_get(info, "cipher-alg")), "aes-128");
	assert_string_equal(json_string_value(json_object_get(info, "cipher-mode")), "cbc");
	assert_string_equal(json_string_value(json_object_get(info, "hash-alg")), "sha1");
	assert_string_equal(json_string_value(json_object_get(info, "uuid")), luks.uuid);
	assert_int_equal(json_integer_value(json_object_get(info, "payload-offset")), 528384);
	assert_int_equal(json_integer_value(json_object_get(info, "master-key-iters")), 1000);
	slots = json_object_get(info, "slots");
	assert_int_equal(json_array_size(slots), 8);
	assert_int_equal(json_object_size(json_array_get(slots, 0)), 4);
	assert_int_equal(json_object_size(json_array_get(slots, 1)), 2);
	json_decref(info);
	free(area);
}

/* --- keys ------------------------------------------------------------------------------------- */

struct area {
	const uint8_t *data;
	uint64_t bytes;
	int fail;
	unsigned reads;
};

static int read_area(void *arg, uint64_t offset, void *buf, size_t bytes)
{
	struct area *area = arg;

	area->reads++;
	if (area->fail)
		return area->fail;
	assert_true(ox_range_within(offset, bytes, area->bytes));
	memcpy(buf, area->data + offset, bytes);
	return 0;
}

static void expect_same(struct ox_crypto *a, struct ox_crypto *b)
{
	uint8_t plain[512], one[512], two[512];

	memset(plain, 7, sizeof(plain));
	assert_int_equal(ox_crypto_encrypt(a, 512, plain, one, 512), 0);
	assert_int_equal(ox_crypto_encrypt(b, 512, plain, two, 512), 0);
	assert_memory_equal(one, two, 512);
	assert_memory_not_equal(one, plain, 512);
}

static void test_unlock(void **state)
{
	static const char *const cases[][5] = {
	        {"aes-256", "xts", "plain64", NULL, "sha256"},
	        {"aes-128", "xts", "plain64", NULL, "sha1"},
	        {"aes-128", "xts", "plain", "sha1", "sha512"},
	        {"aes-256", "cbc", "essiv", "sha256", "sha384"},
	        {"aes-128", "cbc", "plain64", NULL, "sha224"},
	        {"aes-256", "xts", "essiv", NULL, "sha256"},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_luks_create options =
		        options_of(cases[i][0], cases[i][1], cases[i][2], cases[i][3], cases[i][4]);
		struct ox_crypto *made = NULL, *opened = NULL;
		struct ox_error err = {0};
		struct area area = {0};
		struct ox_luks luks;
		uint8_t *data = make_area(&options, &area.bytes, &made);

		area.data = data;
		assert_int_equal(ox_luks_parse(data, area.bytes, area.bytes, "x", &luks, &err), 0);
		if (ox_luks_unlock(&luks, PHRASE, 13, read_area, &area, "x", &opened, &err) < 0)
			fail_msg("%s", err.text);
		expect_same(made, opened);
		ox_crypto_free(opened);
		ox_crypto_free(made);
		free(data);
	}
}

static void expect_locked(const struct ox_luks *luks, const char *phrase, struct area *area,
                          int error, const char *says)
{
	struct ox_crypto *crypto = NULL;
	struct ox_error err = {0};

	assert_int_equal(ox_luks_unlock(luks, (const uint8_t *)phrase, strlen(phrase), read_area,
	                                area, "x.img", &crypto, &err),
	                 -error);
	assert_null(crypto);
	if (!strstr(err.text, says))
		fail_msg("'%s' does not say '%s'", err.text, says);
}

static void test_locked(void **state)
{
	struct ox_luks_create options = options_of("aes-256", "xts", "plain64", NULL, "sha256");
	struct area area = {0};
	struct ox_luks luks;
	uint8_t *data = make_area(&options, &area.bytes, NULL);

	area.data = data;
	assert_int_equal(ox_luks_parse(data, area.bytes, area.bytes, "x", &luks, NULL), 0);
	expect_locked(&luks, "wrong horse", &area, EACCES, "x.img: wrong pass phrase");
	expect_locked(&luks, "correct horse ", &area, EACCES, "wrong pass phrase");
	expect_locked(&luks, "", &area, EACCES, "wrong pass phrase");
	/* One bit of the material. */
	data[4096 + 100000] ^= 1;
	expect_locked(&luks, "correct horse", &area, EACCES, "none of 1 key slot");
	data[4096 + 100000] ^= 1;
	/* Not a wrong phrase: the reason is told, whatever it is. */
	area.fail = -EACCES;
	expect_locked(&luks, "correct horse", &area, EACCES, "cannot read the key material");
	area.fail = -EIO;
	expect_locked(&luks, "correct horse", &area, EIO, "cannot read the key material");
	area.fail = 0;
	luks.slots[0].active = false;
	area.reads = 0;
	expect_locked(&luks, "correct horse", &area, EACCES, "no key slot is in use");
	assert_int_equal(area.reads, 0);
	free(data);
}

/* The phrase may be in any slot; the ones before it are tried in vain. */
static void test_other_slot(void **state)
{
	struct ox_luks_create options = options_of("aes-128", "cbc", "plain64", NULL, "sha1");
	struct ox_crypto *made = NULL, *opened = NULL;
	struct area area = {0};
	struct ox_luks luks;
	struct ox_luks_slot slot;
	uint8_t *data = make_area(&options, &area.bytes, &made);

	area.data = data;
	assert_int_equal(ox_luks_parse(data, area.bytes, area.bytes, "x", &luks, NULL), 0);
	memmove(data + luks.slots[5].key_offset * 512u, data + luks.slots[0].key_offset * 512u,
	        64000);
	memset(data + luks.slots[0].key_offset * 512u, 0x5a, 64000);
	slot = luks.slots[0];
	slot.key_offset = luks.slots[5].key_offset;
	luks.slots[5] = slot;
	ox_luks_write_header(&luks, data);
	assert_int_equal(ox_luks_parse(data, area.bytes, area.bytes, "x", &luks, NULL), 0);
	assert_int_equal(ox_luks_unlock(&luks, PHRASE, 13, read_area, &area, "x", &opened, NULL),
	                 0);
	assert_int_equal(area.reads, 2);
	expect_same(made, opened);
	ox_crypto_free(made);
	ox_crypto_free(opened);
	expect_locked(&luks, "x", &area, EACCES, "none of 2 key slots");
	free(data);
}

/* A key comes back whole from its stripes, and from nothing less. */
static void test_stripes(void **state)
{
	static const gnutls_mac_algorithm_t hashes[] = {GNUTLS_MAC_SHA1, GNUTLS_MAC_SHA256,
	                                                GNUTLS_MAC_SHA512};
	static const size_t sizes[] = {16, 20, 24, 32, 64};
	static const uint32_t counts[] = {1, 2, 100};
	uint8_t key[64], back[64], stripes[64 * 100];

	for (size_t i = 0; i < sizeof(key); i++)
		key[i] = (uint8_t)(i * 3 + 1);
	for (size_t h = 0; h < OX_ARRAY_SIZE(hashes); h++) {
		for (size_t s = 0; s < OX_ARRAY_SIZE(sizes); s++) {
			for (size_t c = 0; c < OX_ARRAY_SIZE(counts); c++) {
				assert_int_equal(
				        ox_luks_split(hashes[h], key, sizes[s], counts[c], stripes),
				        0);
				assert_int_equal(ox_luks_merge(hashes[h], stripes, sizes[s],
				                               counts[c], back),
				                 0);
				assert_memory_equal(back, key, sizes[s]);
				stripes[0] ^= 1;
				assert_int_equal(ox_luks_merge(hashes[h], stripes, sizes[s],
				                               counts[c], back),
				                 0);
				assert_memory_not_equal(back, key, sizes[s]);
			}
		}
	}
}

/* --- creation's words ------------------------------------------------------------------------- */

static void test_alignment(void **state)
{
	struct ox_luks_create options = options_of("aes-256", "xts", "plain64", NULL, "sha256");
	uint64_t bytes;

	options.alignment = MIB;
	assert_int_equal(ox_luks_area(&options, &bytes, NULL), 0);
	assert_int_equal(bytes, 2 * MIB);
	options.alignment = 512;
	assert_int_equal(ox_luks_area(&options, &bytes, NULL), 0);
	assert_int_equal(bytes, 2068480);
	options.alignment = 5000;
	assert_int_equal(ox_luks_area(&options, &bytes, NULL), -EINVAL);
	options.alignment = 0;
	options.cipher_mode = "ecb";
	assert_int_equal(ox_luks_area(&options, &bytes, NULL), -ENOTSUP);
}

static int words(const char *prefix, const char *text, struct ox_luks_create *out,
                 const char **key_secret, struct ox_error *err)
{
	static char copy[256];
	static struct ox_create_option list[8];
	struct ox_image_create_options options = {.path = "x.img", .options = list};
	char *save = NULL;

	snprintf(copy, sizeof(copy), "%s", text);
	for (char *word = strtok_r(copy, ", ", &save); word; word = strtok_r(NULL, ", ", &save)) {
		char *equals = strchr(word, '=');

		*equals = '\0';
		list[options.option_count++] =
		        (struct ox_create_option){.name = word, .value = equals + 1};
	}
	ox_error_clear(err);
	return ox_luks_create_options(&options, prefix, out, key_secret, err);
}

static void test_words(void **state)
{
	struct ox_luks_create out;
	struct ox_error err;
	const char *secret;

	assert_int_equal(words("", "key-secret=sec0", &out, &secret, &err), 0);
	assert_string_equal(secret, "sec0");
	assert_string_equal(out.cipher_alg, "aes-256");
	assert_string_equal(out.cipher_mode, "xts");
	assert_string_equal(out.ivgen_alg, "plain64");
	assert_string_equal(out.hash_alg, "sha256");
	assert_int_equal(out.iter_time_ms, 2000);
	assert_int_equal(
	        words("encrypt.",
	              "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=aes-128,"
	              "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.hash-alg="
	              "sha1,encrypt.iter-time=10",
	              &out, &secret, &err),
	        0);
	assert_string_equal(out.cipher_alg, "aes-128");
	assert_string_equal(out.ivgen_alg, "essiv");
	assert_string_equal(out.hash_alg, "sha1");
	assert_int_equal(out.iter_time_ms, 10);
}

static void test_words_refused(void **state)
{
	static const struct {
		const char *prefix, *text;
		int error;
		const char *says;
	} cases[] = {
	        {"", "iter-time=5", EINVAL, "--object secret,id=sec0,file=PATH"},
	        {"encrypt.", "encrypt.key-secret=s", EINVAL, "encrypt.format=luks is missing"},
	        {"encrypt.", "encrypt.format=aes,encrypt.key-secret=s", ENOTSUP, "not safe"},
	        {"encrypt.", "encrypt.format=rot13,encrypt.key-secret=s", EINVAL, "'rot13'"},
	        {"encrypt.", "encrypt.format=luks", EINVAL, "-o encrypt.key-secret=sec0"},
	        {"", "key-secret=s,iter-time=fast", EINVAL, "milliseconds"},
	        {"", "key-secret=s,iter-time=99999999999", EINVAL, "milliseconds"},
	        {"", "key-secret=s,cipher-alg=aes-265", EINVAL, "did you mean aes-256"},
	        {"", "key-secret=s,cipher-alg=serpent-256", ENOTSUP, "serpent-256"},
	        {"", "key-secret=s,cipher-alg=aes-192", ENOTSUP, "xts does not go with aes-192"},
	        {"", "key-secret=s,cipher-alg=aes-192,cipher-mode=cbc", ENOTSUP, "aes-192"},
	        {"", "key-secret=s,cipher-mode=ecb", ENOTSUP, "'ecb'"},
	        {"", "key-secret=s,cipher-mode=ctr", ENOTSUP, "'ctr'"},
	        {"", "key-secret=s,ivgen-alg=null", ENOTSUP, "null"},
	        {"", "key-secret=s,ivgen-alg=essiv,ivgen-hash-alg=sha1", ENOTSUP, "essiv:sha1"},
	        {"", "key-secret=s,ivgen-alg=a-very-long-name-of-a-generator", ENOTSUP, "a-very"},
	        {"", "key-secret=s,hash-alg=crc32", ENOTSUP, "hash crc32"},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_luks_create out;
		struct ox_error err;
		const char *secret;

		assert_int_equal(words(cases[i].prefix, cases[i].text, &out, &secret, &err),
		                 -cases[i].error);
		if (!strstr(err.text, cases[i].says))
			fail_msg("'%s': '%s' does not say '%s'", cases[i].text, err.text,
			         cases[i].says);
	}
}

/* --- images ----------------------------------------------------------------------------------- */

static char dir[] = "/tmp/ox-luks-XXXXXX";
static char image_path[64], secret_path[64], wrong_path[64];
static struct ox_secrets *secrets;

static void write_file(const char *path, const void *bytes, size_t count)
{
	FILE *file = fopen(path, "we");

	assert_non_null(file);
	assert_int_equal(fwrite(bytes, 1, count, file), count);
	fclose(file);
}

static int make_dir(void **state)
{
	char text[128];

	if (!mkdtemp(dir))
		return -1;
	snprintf(image_path, sizeof(image_path), "%s/x.luks", dir);
	snprintf(secret_path, sizeof(secret_path), "%s/secret", dir);
	snprintf(wrong_path, sizeof(wrong_path), "%s/wrong", dir);
	write_file(secret_path, "correct horse", 13);
	write_file(wrong_path, "wrong horse", 11);
	secrets = ox_secrets_new();
	snprintf(text, sizeof(text), "secret,id=sec0,file=%s", secret_path);
	if (ox_secrets_add(secrets, text, NULL) < 0)
		return -1;
	snprintf(text, sizeof(text), "secret,id=wrong,file=%s", wrong_path);
	return ox_secrets_add(secrets, text, NULL);
}

static int remove_dir(void **state)
{
	ox_secrets_free(secrets);
	unlink(image_path);
	unlink(secret_path);
	unlink(wrong_path);
	return rmdir(dir);
}

/* Options are NAME=VALUE, the last is NULL. */
static int create(uint64_t size, const char *const *values, struct ox_error *err)
{
	struct ox_create_option list[8];
	char copies[8][64];
	struct ox_image_create_options options = {.path = image_path,
	                                          .format = "luks",
	                                          .size = size,
	                                          .has_size = true,
	                                          .options = list,
	                                          .secrets = secrets};
	int rc;

	for (; *values; values++) {
		char *copy = copies[options.option_count], *equals;

		snprintf(copy, 64, "%s", *values);
		equals = strchr(copy, '=');
		*equals = '\0';
		list[options.option_count++] =
		        (struct ox_create_option){.name = copy, .value = equals + 1};
	}
	unlink(image_path);
	rc = ox_image_create(&options, err);
	ox_image_create_options_free(&options);
	return rc;
}

static void create_good(uint64_t size)
{
	static const char *const values[] = {"key-secret=sec0", "iter-time=0", NULL};
	struct ox_error err = {0};

	if (create(size, values, &err) < 0)
		fail_msg("%s", err.text);
}

static uint64_t file_size(void)
{
	struct stat st;

	assert_int_equal(stat(image_path, &st), 0);
	return (uint64_t)st.st_size;
}

static void read_raw(uint64_t offset, void *buf, size_t bytes)
{
	FILE *file = fopen(image_path, "re");

	assert_non_null(file);
	assert_int_equal(fseek(file, (long)offset, SEEK_SET), 0);
	assert_int_equal(fread(buf, 1, bytes, file), bytes);
	fclose(file);
}

static struct ox_image_options open_options(const char *key_secret)
{
	return (struct ox_image_options){
	        .store = {.aio = OX_AIO_THREADS, .lock = OX_LOCK_WRITE, .write_granularity = 512},
	        .secrets = secrets,
	        .key_secret = key_secret};
}

static void with(int (*fn_co)(struct ox_image_channel *channel, void *arg, struct ox_error *err))
{
	struct ox_image_options options = open_options("sec0");
	struct ox_error err = {0};

	if (ox_image_with(image_path, &options, fn_co, NULL, &err) < 0)
		fail_msg("%s", err.text);
}

static uint8_t buffer[2 << 20];

static void expect_byte(const uint8_t *data, size_t bytes, uint8_t value)
{
	for (size_t i = 0; i < bytes; i++) {
		if (data[i] != value)
			fail_msg("at %zu is %u, and %u should be", i, data[i], value);
	}
}

static int write_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_int_equal(channel->image->size, 4 * MIB);
	memset(buffer, 0x11, sizeof(buffer));
	assert_int_equal(ox_image_write_co(channel, 0, buffer, 4096, 0), 0);
	/* No multiple of anything. */
	memset(buffer, 0x22, sizeof(buffer));
	assert_int_equal(ox_image_write_co(channel, 1000, buffer, 700, 0), 0);
	/* More than one piece. */
	memset(buffer, 0x33, sizeof(buffer));
	assert_int_equal(ox_image_write_co(channel, MIB + 512, buffer, MIB + 1024, 0), 0);
	/* The last sector. */
	assert_int_equal(ox_image_write_co(channel, 4 * MIB - 512, buffer, 512, OX_IO_DSYNC), 0);
	assert_int_equal(ox_image_request_co(channel, OX_IO_FLUSH, 0, 0, 0), 0);
	return 0;
}

static int read_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_int_equal(ox_image_read_co(channel, 0, buffer, 4096), 0);
	expect_byte(buffer, 1000, 0x11);
	expect_byte(buffer + 1000, 700, 0x22);
	expect_byte(buffer + 1700, 4096 - 1700, 0x11);
	assert_int_equal(ox_image_read_co(channel, MIB + 512, buffer, MIB + 1024), 0);
	expect_byte(buffer, MIB + 1024, 0x33);
	assert_int_equal(ox_image_read_co(channel, 4 * MIB - 512, buffer, 512), 0);
	expect_byte(buffer, 512, 0x33);
	assert_int_equal(ox_image_read_co(channel, 4 * MIB, buffer, 512), -EIO);
	return 0;
}

/* Zeroes read as zeroes and do not lie on the store as such; a discard changes nothing. */
static int zero_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_int_equal(ox_image_request_co(channel, OX_IO_ZERO, MIB, 512 * 1024, OX_IO_MAY_UNMAP),
	                 0);
	assert_int_equal(ox_image_request_co(channel, OX_IO_ZERO, 1200, 100, 0), 0);
	assert_int_equal(ox_image_read_co(channel, MIB, buffer, MIB), 0);
	expect_byte(buffer, 512 * 1024, 0);
	expect_byte(buffer + 512 * 1024, 512 * 1024, 0x33);
	assert_int_equal(ox_image_read_co(channel, 1000, buffer, 700), 0);
	expect_byte(buffer, 200, 0x22);
	expect_byte(buffer + 200, 100, 0);
	expect_byte(buffer + 300, 400, 0x22);
	assert_int_equal(ox_image_request_co(channel, OX_IO_DISCARD, 2 * MIB, 512, 0), 0);
	assert_int_equal(ox_image_read_co(channel, 2 * MIB, buffer, 512), 0);
	expect_byte(buffer, 512, 0x33);
	assert_int_equal(ox_image_request_co(channel, OX_IO_ZERO, 3 * MIB, 512, OX_IO_NO_FALLBACK),
	                 -ENOTSUP);
	return 0;
}

static void test_image(void **state)
{
	uint8_t raw[512], other[512];

	create_good(4 * MIB);
	assert_int_equal(file_size(), 6 * MIB);
	with(write_co);
	with(read_co);
	read_raw(2 * MIB, raw, 512);
	/* Not what the guest wrote, and not the same for two sectors. */
	assert_memory_not_equal(raw, raw + 16, 16);
	read_raw(2 * MIB + 512, other, 512);
	assert_memory_not_equal(raw, other, 512);
	with(zero_co);
	read_raw(3 * MIB + 4096, raw, 512);
	assert_false(ox_buffer_is_zero(raw, 512));
}

static void expect_refused(const char *key_secret, int error, const char *says)
{
	struct ox_image_options options = open_options(key_secret);
	struct ox_image *image = NULL;
	struct ox_error err = {0};

	assert_int_equal(ox_image_open(image_path, &options, &image, &err), -error);
	assert_null(image);
	if (!strstr(err.text, says))
		fail_msg("'%s' does not say '%s'", err.text, says);
}

static int locked_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_int_equal(ox_image_read_co(channel, 0, buffer, 512), -EACCES);
	assert_int_equal(ox_image_write_co(channel, 0, buffer, 512, 0), -EACCES);
	return 0;
}

static void test_open(void **state)
{
	struct ox_image_options options = open_options(NULL);
	struct ox_image_info info;
	struct ox_image *image;
	uint8_t header[2] = {0};

	create_good(MIB);
	expect_refused(NULL, EACCES, "--object secret,id=sec0,file=PATH");
	expect_refused("nobody", ENOENT, "there is no secret 'nobody'");
	expect_refused("wrong", EACCES, "wrong pass phrase");
	/* For info no secret is needed, and nothing can be read or written. */
	options.allow.nothing = true;
	assert_int_equal(ox_image_open(image_path, &options, &image, NULL), 0);
	assert_int_equal(ox_image_get_info(image, &info, NULL), 0);
	assert_string_equal(info.format, "luks");
	assert_int_equal(info.virtual_size, MIB);
	assert_int_equal(info.cluster_size, 0);
	assert_true(info.encrypted);
	assert_string_equal(json_string_value(json_object_get(info.format_specific, "type")),
	                    "luks");
	assert_int_equal(json_object_size(json_object_get(info.format_specific, "data")), 8);
	ox_image_info_free(&info);
	ox_image_close(image);
	assert_int_equal(ox_image_with(image_path, &options, locked_co, NULL, NULL), 0);
	/* Cut off within the payload's front, and within the header. */
	assert_int_equal(truncate(image_path, MIB), 0);
	expect_refused("sec0", EINVAL, "slot 4");
	assert_int_equal(truncate(image_path, 2068480 + 4096), 0);
	expect_refused("sec0", EINVAL, "the data begins at 2097152");
	assert_int_equal(truncate(image_path, 100), 0);
	expect_refused("sec0", EINVAL, "cut off");
	assert_int_equal(truncate(image_path, 0), 0);
	options = open_options("sec0");
	options.format = "luks";
	assert_int_equal(ox_image_open(image_path, &options, &image, NULL), -EINVAL);
	write_file(image_path, header, sizeof(header));
	assert_int_equal(ox_image_open(image_path, &options, &image, NULL), -EINVAL);
}

static int grow_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	int rc;

	memset(buffer, 0x44, 1024);
	assert_int_equal(ox_image_write_co(channel, MIB - 512, buffer, 512, 0), 0);
	rc = ox_image_resize_co(channel, 2 * MIB, OX_PREALLOC_FALLOC, err);
	if (rc < 0)
		return rc;
	assert_int_equal(ox_image_write_co(channel, MIB, buffer, 512, 0), 0);
	return ox_image_resize_co(channel, MIB + 512, OX_PREALLOC_OFF, err);
}

static int grown_co(struct ox_image_channel *channel, void *arg, struct ox_error *err)
{
	assert_int_equal(channel->image->size, MIB + 512);
	assert_int_equal(ox_image_read_co(channel, MIB - 512, buffer, 1024), 0);
	expect_byte(buffer, 1024, 0x44);
	assert_int_equal(ox_image_resize_co(channel, INT64_MAX - 511, OX_PREALLOC_OFF, err),
	                 -EFBIG);
	return 0;
}

static void test_resize(void **state)
{
	create_good(MIB);
	with(grow_co);
	assert_int_equal(file_size(), 3 * MIB + 512);
	with(grown_co);
}

static void refuse_create(const char *const *values, uint64_t size, int error, const char *says)
{
	struct ox_error err = {0};

	assert_int_equal(create(size, values, &err), -error);
	if (!strstr(err.text, says))
		fail_msg("'%s' does not say '%s'", err.text, says);
	/* Nothing is left behind. */
	assert_int_equal(access(image_path, F_OK), -1);
}

static void test_create_refused(void **state)
{
	static const char *const none[] = {NULL};
	static const char *const unknown[] = {"key-secret=nobody", NULL};
	static const char *const word[] = {"key-secret=sec0", "cipher-algo=aes-128", NULL};
	static const char *const prealloc[] = {"key-secret=sec0", "preallocation=metadata", NULL};
	static const char *const good_one[] = {"key-secret=sec0", "iter-time=0", NULL};

	refuse_create(none, MIB, EINVAL, "-o key-secret=sec0");
	refuse_create(unknown, MIB, ENOENT, "there is no secret 'nobody'");
	refuse_create(word, MIB, EINVAL, "did you mean cipher-alg");
	refuse_create(prealloc, MIB, EINVAL, "'metadata'");
	refuse_create(good_one, INT64_MAX - 1023, EFBIG, "too large");
}

static void test_preallocation(void **state)
{
	static const char *const full[] = {"key-secret=sec0", "iter-time=0", "preallocation=full",
	                                   NULL};
	static const char *const falloc[] = {"key-secret=sec0", "iter-time=0",
	                                     "preallocation=falloc", "cipher-alg=aes-128", NULL};
	struct ox_error err = {0};
	struct stat st;

	/* A sparse one takes no more than what is in use of the header. */
	create_good(8 * MIB);
	assert_int_equal(stat(image_path, &st), 0);
	assert_true((uint64_t)st.st_blocks * 512 < MIB);
	assert_int_equal(create(8 * MIB + 1, full, &err), 0);
	assert_int_equal(stat(image_path, &st), 0);
	assert_int_equal(st.st_size, 10 * MIB + 512);
	assert_true((uint64_t)st.st_blocks * 512 >= 8 * MIB);
	assert_int_equal(create(8 * MIB, falloc, &err), 0);
	assert_int_equal(file_size(), 10 * MIB);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_parse),          cmocka_unit_test(test_parse_refuses),
	        cmocka_unit_test(test_parse_foreign),  cmocka_unit_test(test_info),
	        cmocka_unit_test(test_unlock),         cmocka_unit_test(test_locked),
	        cmocka_unit_test(test_other_slot),     cmocka_unit_test(test_stripes),
	        cmocka_unit_test(test_alignment),      cmocka_unit_test(test_words),
	        cmocka_unit_test(test_words_refused),  cmocka_unit_test(test_image),
	        cmocka_unit_test(test_open),           cmocka_unit_test(test_resize),
	        cmocka_unit_test(test_create_refused), cmocka_unit_test(test_preallocation),
	};

	return cmocka_run_group_tests_name("image-luks", tests, make_dir, remove_dir);
}
