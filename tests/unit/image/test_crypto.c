/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Ciphers of sectors: published and independently made vectors, what is refused, and several
 * threads at once.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "image/crypto_private.h"

#define SECTOR OX_CRYPTO_SECTOR

static void from_hex(const char *hex, uint8_t *out, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++) {
		char two[3] = {hex[2 * i], hex[2 * i + 1], '\0'};

		out[i] = (uint8_t)strtoul(two, NULL, 16);
	}
}

static struct ox_crypto *open_crypto(const char *mode, const uint8_t *key, size_t key_bytes)
{
	struct ox_crypto *crypto = NULL;
	struct ox_error err = {0};

	if (ox_crypto_open("aes", mode, key, key_bytes, "test", &crypto, &err) < 0)
		fail_msg("%s", err.text);
	return crypto;
}

static void fill(uint8_t *buf, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		buf[i] = (uint8_t)i;
}

/* A sector of the bytes 0, 1, 2, ...: the first and the last 16 of what it becomes, and back. */
static void try_vector(struct ox_crypto *crypto, uint64_t sector, const char *first,
                       const char *last)
{
	uint8_t plain[SECTOR], out[SECTOR], want[16];

	fill(plain, SECTOR);
	assert_int_equal(ox_crypto_encrypt(crypto, sector * SECTOR, plain, out, SECTOR), 0);
	from_hex(first, want, 16);
	assert_memory_equal(out, want, 16);
	from_hex(last, want, 16);
	assert_memory_equal(out + SECTOR - 16, want, 16);
	/* In place. */
	assert_int_equal(ox_crypto_decrypt(crypto, sector * SECTOR, out, out, SECTOR), 0);
	assert_memory_equal(out, plain, SECTOR);
	assert_int_equal(ox_crypto_encrypt(crypto, sector * SECTOR, plain, plain, SECTOR), 0);
	from_hex(first, want, 16);
	assert_memory_equal(plain, want, 16);
}

/* IEEE 1619-2007, vectors 4 and 10, and a large number (made with nettle). */
static void test_xts(void **state)
{
	uint8_t key[64];
	struct ox_crypto *crypto;

	from_hex("2718281828459045235360287471352631415926535897932384626433832795", key, 32);
	crypto = open_crypto("xts-plain64", key, 32);
	try_vector(crypto, 0, "27a7479befa1d476489f308cd4cfa6e2",
	           "0a282df920147beabe421ee5319d0568");
	ox_crypto_free(crypto);

	from_hex("2718281828459045235360287471352662497757247093699959574966967627"
	         "3141592653589793238462643383279502884197169399375105820974944592",
	         key, 64);
	crypto = open_crypto("xts-plain64", key, 64);
	try_vector(crypto, 0xff, "1c3b3a102f770386e4836c99e370cf9b",
	           "c4f36ffda9fcea70b9c6e693e148c151");
	try_vector(crypto, 0x123456789a, "50ea7b0e72da7912892bcd0c7496baa4",
	           "a9551a82318463bf68ba7865c0ed31ec");
	ox_crypto_free(crypto);
}

/* Made with openssl enc, the IV by hand. */
static void test_cbc(void **state)
{
	static const struct {
		const char *mode;
		size_t key_bytes;
		const char *first, *last;
	} vectors[] = {
	        {"cbc-plain64", 16, "d6891b3b8f1bdb9b523d68fe490fb9c6",
	         "d07568ef198044c611072d145b4c221a"},
	        {"cbc-plain64", 24, "3c28c807b07f41db7497ede421817e5b",
	         "4eb5ec28fd521b7efacb60fb6f931539"},
	        {"cbc-plain64", 32, "e836cb47c79aa0a6550ea8d2121fc728",
	         "1117bad3ba8125fac2bae890112db3d6"},
	        {"cbc-plain", 16, "9be631a3d96bc2919b2932eb6a5514f8",
	         "1deb7c6bbd6de0496d3eef059bde623b"},
	        {"cbc-plain", 32, "86d24c1e594acb6c64d57ae7f4a9d638",
	         "ae0db067514789fb05b957e3e5b16efd"},
	        {"cbc-essiv:sha256", 16, "4de3d086e5539829ba7386b9b1750ad9",
	         "2d0a0a83dd2212f73ced7e2de96f7250"},
	        {"cbc-essiv:sha256", 24, "4f679df51c47af7417b37843967b2c89",
	         "f479962ad098b322670622fa49940ac4"},
	        {"cbc-essiv:sha256", 32, "97be7e93b5e5a78d4148c8997838ac2c",
	         "243096f9a5da121acf470359a4a7f996"},
	        /* What QEMU writes when it is given a hash that means nothing. */
	        {"cbc-plain64:sha256", 16, "d6891b3b8f1bdb9b523d68fe490fb9c6",
	         "d07568ef198044c611072d145b4c221a"},
	};
	uint8_t key[32];

	fill(key, sizeof(key));
	for (size_t i = 0; i < OX_ARRAY_SIZE(vectors); i++) {
		struct ox_crypto *crypto = open_crypto(vectors[i].mode, key, vectors[i].key_bytes);

		try_vector(crypto, 0x123456789a, vectors[i].first, vectors[i].last);
		ox_crypto_free(crypto);
	}
}

/* qcow2's first encryption: the password is the key. */
static void test_legacy(void **state)
{
	static const struct {
		const char *password;
		size_t bytes;
		uint8_t key[16];
	} cases[] = {
	        {"0123456789abcdef", 16, "0123456789abcdef"},
	        {"0123456789abcdefXY", 18, "0123456789abcdef"},
	        {"short", 5, "short"},
	        {"cut\0off", 7, "cut"},
	        {"", 0, ""},
	};

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_crypto *legacy, *same = open_crypto("cbc-plain64", cases[i].key, 16);
		uint8_t plain[SECTOR], a[SECTOR], b[SECTOR];

		fill(plain, SECTOR);
		assert_int_equal(ox_crypto_open_aes((const uint8_t *)cases[i].password,
		                                    cases[i].bytes, &legacy, NULL),
		                 0);
		assert_int_equal(ox_crypto_encrypt(legacy, 7 * SECTOR, plain, a, SECTOR), 0);
		assert_int_equal(ox_crypto_encrypt(same, 7 * SECTOR, plain, b, SECTOR), 0);
		assert_memory_equal(a, b, SECTOR);
		ox_crypto_free(legacy);
		ox_crypto_free(same);
	}
}

/* Several sectors at once are what they are one by one; what is no sector is refused. */
static void test_sectors(void **state)
{
	static const char *const modes[] = {"xts-plain64", "cbc-essiv:sha256"};
	static uint8_t plain[40 * SECTOR], all[40 * SECTOR], one[SECTOR];
	uint8_t key[32];

	fill(key, sizeof(key));
	fill(plain, sizeof(plain));
	for (size_t m = 0; m < OX_ARRAY_SIZE(modes); m++) {
		struct ox_crypto *crypto = open_crypto(modes[m], key, 32);

		assert_int_equal(ox_crypto_encrypt(crypto, 3 * SECTOR, plain, all, sizeof(all)), 0);
		for (size_t i = 0; i < 40; i++) {
			assert_int_equal(ox_crypto_encrypt(crypto, (3 + i) * SECTOR,
			                                   plain + i * SECTOR, one, SECTOR),
			                 0);
			assert_memory_equal(one, all + i * SECTOR, SECTOR);
			if (i > 0)
				assert_memory_not_equal(one, all, SECTOR);
		}
		assert_int_equal(ox_crypto_decrypt(crypto, 3 * SECTOR, all, all, sizeof(all)), 0);
		assert_memory_equal(all, plain, sizeof(all));
		assert_int_equal(ox_crypto_decrypt(crypto, 0, all, all, 0), 0);
		assert_int_equal(ox_crypto_encrypt(crypto, 1, plain, all, SECTOR), -EIO);
		assert_int_equal(ox_crypto_encrypt(crypto, 0, plain, all, SECTOR + 16), -EIO);
		ox_crypto_free(crypto);
	}
	ox_crypto_free(NULL);
}

static void test_refused(void **state)
{
	static const struct {
		const char *cipher, *mode;
		size_t key_bytes;
		int error;
		const char *says;
	} cases[] = {
	        {"serpent", "xts-plain64", 32, ENOTSUP, "cipher serpent is not supported"},
	        {"twofish", "cbc-essiv:sha256", 32, ENOTSUP, "cipher twofish"},
	        {"cast5", "cbc-plain64", 16, ENOTSUP, "cipher cast5"},
	        {"aes", "ecb-plain64", 32, ENOTSUP, "does not hide"},
	        {"aes", "ctr-plain64", 32, ENOTSUP, "does not hide"},
	        {"aes", "lrw-benbi", 32, ENOTSUP, "mode lrw-benbi"},
	        {"aes", "xts-plain64", 48, EINVAL, "384 bits does not fit"},
	        {"aes", "xts-plain64", 16, EINVAL, "128 bits"},
	        {"aes", "cbc-plain64", 64, EINVAL, "512 bits"},
	        {"aes", "cbc-plain64", 0, EINVAL, "0 bits"},
	        {"aes", "cbc-benbi", 32, ENOTSUP, "generator benbi"},
	        {"aes", "cbc-plain6", 32, ENOTSUP, "generator plain6"},
	        {"aes", "cbc-essiv", 32, ENOTSUP, "generator essiv"},
	        {"aes", "cbc-essiv:whirlpool", 32, ENOTSUP, "hash whirlpool"},
	        {"aes", "cbc-essiv:sha1", 32, ENOTSUP, "no key that AES takes"},
	};
	uint8_t key[64] = {0};

	for (size_t i = 0; i < OX_ARRAY_SIZE(cases); i++) {
		struct ox_crypto *crypto = NULL;
		struct ox_error err = {0};

		assert_int_equal(ox_crypto_open(cases[i].cipher, cases[i].mode, key,
		                                cases[i].key_bytes, "disk.img", &crypto, &err),
		                 -cases[i].error);
		assert_null(crypto);
		if (!strstr(err.text, cases[i].says) || strncmp(err.text, "disk.img: ", 10) != 0)
			fail_msg("'%s' does not say '%s'", err.text, cases[i].says);
	}
}

/* --- threads ---------------------------------------------------------------------------------- */

#define ROUNDS 200u

struct worker {
	pthread_t thread;
	struct ox_crypto *crypto;
	const uint8_t *plain, *secret; /* 16 sectors from number 5 on */
	bool wrong;
};

static void *work(void *arg)
{
	struct worker *worker = arg;
	uint8_t buf[16 * SECTOR];

	for (unsigned i = 0; i < ROUNDS; i++) {
		if (ox_crypto_encrypt(worker->crypto, 5 * SECTOR, worker->plain, buf, sizeof(buf)) <
		            0 ||
		    memcmp(buf, worker->secret, sizeof(buf)) != 0 ||
		    ox_crypto_decrypt(worker->crypto, 5 * SECTOR, buf, buf, sizeof(buf)) < 0 ||
		    memcmp(buf, worker->plain, sizeof(buf)) != 0)
			worker->wrong = true;
	}
	return NULL;
}

static void test_threads(void **state)
{
	static const char *const modes[] = {"xts-plain64", "cbc-essiv:sha256"};
	static uint8_t plain[16 * SECTOR], secret[16 * SECTOR];
	struct worker workers[4];
	uint8_t key[32];

	fill(key, sizeof(key));
	fill(plain, sizeof(plain));
	for (size_t m = 0; m < OX_ARRAY_SIZE(modes); m++) {
		struct ox_crypto *crypto = open_crypto(modes[m], key, 32);

		assert_int_equal(
		        ox_crypto_encrypt(crypto, 5 * SECTOR, plain, secret, sizeof(secret)), 0);
		for (size_t i = 0; i < OX_ARRAY_SIZE(workers); i++) {
			workers[i] =
			        (struct worker){.crypto = crypto, .plain = plain, .secret = secret};
			assert_int_equal(
			        pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
		}
		for (size_t i = 0; i < OX_ARRAY_SIZE(workers); i++) {
			pthread_join(workers[i].thread, NULL);
			assert_false(workers[i].wrong);
		}
		ox_crypto_free(crypto);
	}
}

static void test_key_memory(void **state)
{
	uint8_t *memory = ox_key_alloc(5000);

	assert_non_null(memory);
	for (size_t i = 0; i < 5000; i++)
		assert_int_equal(memory[i], 0);
	memset(memory, 1, 5000);
	ox_key_free(memory, 5000);
	ox_key_free(NULL, 5000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_xts),        cmocka_unit_test(test_cbc),
	        cmocka_unit_test(test_legacy),     cmocka_unit_test(test_sectors),
	        cmocka_unit_test(test_refused),    cmocka_unit_test(test_threads),
	        cmocka_unit_test(test_key_memory),
	};

	return cmocka_run_group_tests_name("image-crypto", tests, NULL, NULL);
}
