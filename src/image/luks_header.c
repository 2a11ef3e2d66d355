/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The header of a LUKS volume, version 1 (on-disk format specification 1.2.3, section 4.1): 592
 * bytes, big endian, at the volume's start.
 *
 *     0  magic "LUKS" ba be    6  version (16 bits)
 *     8  cipher  40  mode  72  hash, each 32 bytes of text that a NUL ends
 *   104  payload offset (sectors)        108  bytes of the master key
 *   112  digest of the master key (20)   132  its salt (32)   164  its iterations
 *   168  UUID (40 bytes of text)         208  eight key slots of 48 bytes:
 *     0  active (00ac71f3) or not (0000dead)   4  iterations   8  salt (32)
 *    40  offset of its key material (sectors)  44  stripes
 *
 * Parsing is pure and refuses whatever a later step could stumble over: what it accepts has its key
 * material, of slots in use or not, behind the header, before the payload, within `area` and apart
 * from one another.  Ciphers and hashes that are not supported pass, so that they can be told.
 */
#include "image/crypto_private.h"
#include "base/byteorder.h"
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#define SLOT_ACTIVE   0x00ac71f3u
#define SLOT_DISABLED 0x0000deadu
#define SLOTS_AT      208u
#define SLOT_BYTES    48u
#define KEY_BYTES_MAX 512u
/* What others write is 4000; more would only cost memory. */
#define STRIPES_MAX 16384u

static const uint8_t magic[6] = {'L', 'U', 'K', 'S', 0xba, 0xbe};

/* A field of printable text that a NUL ends; false: it is something else. */
static bool get_text(const uint8_t *field, size_t bytes, char *out)
{
	size_t length = strnlen((const char *)field, bytes);

	if (length == bytes)
		return false;
	for (size_t i = 0; i < length; i++) {
		if (field[i] <= ' ' || field[i] > '~')
			return false;
	}
	memcpy(out, field, length);
	out[length] = '\0';
	return true;
}

static int parse_names(const uint8_t *header, const char *what, struct ox_luks *luks,
                       struct ox_error *err)
{
	const char *dash;

	if (!get_text(header + 8, 32, luks->cipher) || !get_text(header + 40, 32, luks->mode) ||
	    !get_text(header + 72, 32, luks->hash) || !get_text(header + 168, 40, luks->uuid))
		return ox_error_set(err, EINVAL,
		                    "%s: the LUKS header is damaged: a name in it is not text",
		                    what);
	dash = strchr(luks->mode, '-');
	if (!luks->cipher[0] || !luks->hash[0] || !dash || dash == luks->mode || !dash[1])
		return ox_error_set(err, EINVAL,
		                    "%s: LUKS header says cipher '%s' in mode '%s' with hash '%s', "
		                    "which is not MODE-IV",
		                    what, luks->cipher, luks->mode, luks->hash);
	return 0;
}

static int check_iterations(uint32_t iterations, const char *what, const char *of,
                            struct ox_error *err)
{
	if (iterations == 0 || iterations > OX_LUKS_ITERATIONS_MAX)
		return ox_error_set(
		        err, EINVAL,
		        "%s: LUKS header says %u iterations for %s; allowed are 1 to %u", what,
		        iterations, of, OX_LUKS_ITERATIONS_MAX);
	return 0;
}

static int parse_key(const uint8_t *header, const char *what, struct ox_luks *luks,
                     struct ox_error *err)
{
	luks->payload_offset = ox_get_be32(header + 104);
	luks->key_bytes = ox_get_be32(header + 108);
	memcpy(luks->digest, header + 112, sizeof(luks->digest));
	memcpy(luks->digest_salt, header + 132, sizeof(luks->digest_salt));
	luks->digest_iterations = ox_get_be32(header + 164);
	if (luks->key_bytes == 0 || luks->key_bytes > KEY_BYTES_MAX)
		return ox_error_set(err, EINVAL,
		                    "%s: LUKS header says a key of %u bytes; allowed are 1 to %u",
		                    what, luks->key_bytes, KEY_BYTES_MAX);
	if (strcmp(luks->cipher, "aes") == 0 &&
	    !(strncmp(luks->mode, "xts-", 4) == 0
	              ? luks->key_bytes == 32 || luks->key_bytes == 64
	              : luks->key_bytes == 16 || luks->key_bytes == 24 || luks->key_bytes == 32))
		return ox_error_set(err, EINVAL,
		                    "%s: LUKS header says a key of %u bytes, which does not fit "
		                    "cipher aes in mode %s",
		                    what, luks->key_bytes, luks->mode);
	if ((uint64_t)luks->payload_offset * OX_CRYPTO_SECTOR < OX_LUKS_HEADER_BYTES)
		return ox_error_set(
		        err, EINVAL,
		        "%s: LUKS header says that the data begins at sector %u, within "
		        "the header (headers apart from their data are not supported)",
		        what, luks->payload_offset);
	return check_iterations(luks->digest_iterations, what, "the master key", err);
}

static uint64_t slot_begin(const struct ox_luks_slot *slot)
{
	return (uint64_t)slot->key_offset * OX_CRYPTO_SECTOR;
}

static uint64_t slot_end(const struct ox_luks *luks, const struct ox_luks_slot *slot)
{
	return slot_begin(slot) + ox_luks_material_bytes(luks->key_bytes, slot->stripes);
}

static int parse_slot(const uint8_t *data, unsigned number, uint64_t area, const char *what,
                      struct ox_luks *luks, struct ox_error *err)
{
	struct ox_luks_slot *slot = &luks->slots[number];
	uint32_t state = ox_get_be32(data);
	char name[16];

	if (state != SLOT_ACTIVE && state != SLOT_DISABLED)
		return ox_error_set(err, EINVAL,
		                    "%s: the LUKS header is damaged: key slot %u is neither in use "
		                    "nor free",
		                    what, number);
	slot->active = state == SLOT_ACTIVE;
	slot->iterations = ox_get_be32(data + 4);
	memcpy(slot->salt, data + 8, sizeof(slot->salt));
	slot->key_offset = ox_get_be32(data + 40);
	slot->stripes = ox_get_be32(data + 44);
	if (slot->stripes == 0 || slot->stripes > STRIPES_MAX)
		return ox_error_set(
		        err, EINVAL,
		        "%s: LUKS header says %u stripes in key slot %u; allowed are 1 to "
		        "%u",
		        what, slot->stripes, number, STRIPES_MAX);
	if (slot_begin(slot) < OX_LUKS_HEADER_BYTES || slot_end(luks, slot) > area ||
	    slot_end(luks, slot) > (uint64_t)luks->payload_offset * OX_CRYPTO_SECTOR)
		return ox_error_set(err, EINVAL,
		                    "%s: LUKS header says that the key material of slot %u is at "
		                    "sector %u, which is not between the header and the data",
		                    what, number, slot->key_offset);
	if (!slot->active)
		return 0;
	snprintf(name, sizeof(name), "key slot %u", number);
	return check_iterations(slot->iterations, what, name, err);
}

static int check_overlap(const struct ox_luks *luks, const char *what, struct ox_error *err)
{
	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
		const struct ox_luks_slot *a = &luks->slots[i];

		for (unsigned j = 0; j < i; j++) {
			const struct ox_luks_slot *b = &luks->slots[j];

			if (slot_begin(a) < slot_end(luks, b) && slot_begin(b) < slot_end(luks, a))
				return ox_error_set(err, EINVAL,
				                    "%s: the LUKS header is damaged: the key "
				                    "material of slots %u and %u overlaps",
				                    what, j, i);
		}
	}
	return 0;
}

int ox_luks_parse(const uint8_t *header, size_t bytes, uint64_t area, const char *what,
                  struct ox_luks *luks, struct ox_error *err)
{
	unsigned version;
	int rc;

	memset(luks, 0, sizeof(*luks));
	if (bytes < sizeof(magic) || memcmp(header, magic, sizeof(magic)) != 0)
		return ox_error_set(err, EINVAL, "%s: there is no LUKS header", what);
	if (bytes < OX_LUKS_HEADER_BYTES || area < OX_LUKS_HEADER_BYTES)
		return ox_error_set(err, EINVAL, "%s: the LUKS header is cut off", what);
	version = ox_get_be16(header + 6);
	if (version != 1)
		return ox_error_set(err, ENOTSUP,
		                    "%s: LUKS version %u is not supported; version 1 is", what,
		                    version);
	rc = parse_names(header, what, luks, err);
	if (rc == 0)
		rc = parse_key(header, what, luks, err);
	for (unsigned i = 0; rc == 0 && i < OX_LUKS_KEY_SLOTS; i++)
		rc = parse_slot(header + SLOTS_AT + i * SLOT_BYTES, i, area, what, luks, err);
	return rc < 0 ? rc : check_overlap(luks, what, err);
}

void ox_luks_write_header(const struct ox_luks *luks, uint8_t out[OX_LUKS_HEADER_BYTES])
{
	memset(out, 0, OX_LUKS_HEADER_BYTES);
	memcpy(out, magic, sizeof(magic));
	ox_put_be16(out + 6, 1);
	/* NULs end the names: they are shorter than their fields. */
	memcpy(out + 8, luks->cipher, strnlen(luks->cipher, 31));
	memcpy(out + 40, luks->mode, strnlen(luks->mode, 31));
	memcpy(out + 72, luks->hash, strnlen(luks->hash, 31));
	ox_put_be32(out + 104, luks->payload_offset);
	ox_put_be32(out + 108, luks->key_bytes);
	memcpy(out + 112, luks->digest, sizeof(luks->digest));
	memcpy(out + 132, luks->digest_salt, sizeof(luks->digest_salt));
	ox_put_be32(out + 164, luks->digest_iterations);
	memcpy(out + 168, luks->uuid, strnlen(luks->uuid, 39));
	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
		const struct ox_luks_slot *slot = &luks->slots[i];
		uint8_t *data = out + SLOTS_AT + i * SLOT_BYTES;

		ox_put_be32(data, slot->active ? SLOT_ACTIVE : SLOT_DISABLED);
		ox_put_be32(data + 4, slot->iterations);
		memcpy(data + 8, slot->salt, sizeof(slot->salt));
		ox_put_be32(data + 40, slot->key_offset);
		ox_put_be32(data + 44, slot->stripes);
	}
}

/* --- for info --------------------------------------------------------------------------------- */

static json_t *slots_info(const struct ox_luks *luks)
{
	json_t *array = json_array();

	for (unsigned i = 0; i < OX_LUKS_KEY_SLOTS; i++) {
		const struct ox_luks_slot *slot = &luks->slots[i];
		json_t *object = json_object();

		json_object_set_new(object, "active", json_boolean(slot->active));
		if (slot->active)
			json_object_set_new(object, "iters", json_integer(slot->iterations));
		json_object_set_new(object, "key-offset",
		                    json_integer((json_int_t)slot_begin(slot)));
		if (slot->active)
			json_object_set_new(object, "stripes", json_integer(slot->stripes));
		json_array_append_new(array, object);
	}
	return array;
}

json_t *ox_luks_info(const struct ox_luks *luks)
{
	json_t *data = json_object();
	size_t mode_length = strcspn(luks->mode, "-");
	const char *iv = luks->mode + mode_length + (luks->mode[mode_length] == '-');
	size_t iv_length = strcspn(iv, ":");
	char cipher[64];
	/* XTS takes two keys; the name tells the size of one. */
	unsigned bits = luks->key_bytes * 8 / (strncmp(luks->mode, "xts-", 4) == 0 ? 2 : 1);

	snprintf(cipher, sizeof(cipher), "%s-%u", luks->cipher, bits);
	json_object_set_new(data, "ivgen-alg", json_stringn(iv, iv_length));
	json_object_set_new(data, "hash-alg", json_string(luks->hash));
	json_object_set_new(data, "cipher-alg", json_string(cipher));
	json_object_set_new(data, "uuid", json_string(luks->uuid));
	/* With other generators a hash means nothing, and qemu-img does not tell it. */
	if (iv_length == 5 && strncmp(iv, "essiv:", 6) == 0)
		json_object_set_new(data, "ivgen-hash-alg", json_string(iv + iv_length + 1));
	json_object_set_new(data, "cipher-mode", json_stringn(luks->mode, mode_length));
	json_object_set_new(data, "slots", slots_info(luks));
	json_object_set_new(data, "payload-offset",
	                    json_integer((json_int_t)luks->payload_offset * OX_CRYPTO_SECTOR));
	json_object_set_new(data, "master-key-iters", json_integer(luks->digest_iterations));
	return data;
}
