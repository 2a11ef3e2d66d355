/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The qcow2 header and its extensions: bytes <-> struct qcow2_header (specification, "Header" and
 * "Header extensions").
 *
 * Pure: no I/O, no locking.  The bytes are anybody's.  Every number is checked against the format's
 * and QEMU's limits before it is used; no sum can overflow, because counts are bounded first.  What
 * we do not know (extensions, header bytes behind ours, names of features) comes out of encode() as
 * it went into parse().
 */
#include "image/qcow2/qcow2.h"
#include "base/byteorder.h"
#include <errno.h>
#include <stdio.h>

#define V2_BYTES          72u
#define V3_BYTES          104u /* the least */
#define V3_KNOWN          105u /* compression_type is the last field that we know */
#define V3_FULL           112u /* with its padding */
#define EXTENSION_HEAD    8u
#define BACKING_MAX       1023u
#define FORMAT_MAX        15u
#define DATA_FILE_MAX     4095u
#define REFCOUNT_ORDER_V2 4u

#define FEATURE_BYTES      48u
#define FEATURE_NAME_BYTES 46u

static const struct {
	uint8_t type, bit; /* type 0: incompatible, 1: compatible, 2: autoclear */
	const char *name;
} features[] = {
        {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
        {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
        {2, 0, "bitmaps"},          {2, 1, "raw external data"},   {2, 62, "Oxbow session"},
};

struct parse {
	const uint8_t *data;
	size_t bytes;
	const char *what;
	struct qcow2_header *header;
	uint64_t cluster;
	uint64_t end; /* of the extensions */
	uint64_t backing_offset;
	uint32_t backing_bytes;
	struct ox_error *err;
};

static struct qcow2_extension *find_extension(const struct qcow2_header *header, uint32_t type)
{
	for (unsigned i = 0; i < header->extension_count; i++) {
		if (header->extensions[i].type == type)
			return &header->extensions[i];
	}
	return NULL;
}

/* At least one byte: a pointer to nothing is not NULL. */
static void *copy_bytes(const void *data, size_t bytes)
{
	uint8_t *copy = ox_xcalloc(1, bytes ? bytes : 1);

	if (bytes)
		memcpy(copy, data, bytes);
	return copy;
}

/* Up to the first NUL: names are C strings for everybody who has ever read them. */
static char *copy_name(const uint8_t *data, size_t bytes)
{
	char *name = ox_xcalloc(1, bytes + 1);

	memcpy(name, data, bytes);
	return name;
}

/* --- the fields ------------------------------------------------------------------------------ */

static int parse_version(struct parse *p)
{
	struct qcow2_header *h = p->header;

	if (p->bytes < V2_BYTES)
		return ox_error_set(p->err, EINVAL,
		                    "%s: %zu bytes are too few for a qcow2 header; the file was "
		                    "cut off",
		                    p->what, p->bytes);
	if (ox_get_be32(p->data) != QCOW2_MAGIC)
		return ox_error_set(p->err, EINVAL, "%s: is not a qcow2 image", p->what);
	h->version = ox_get_be32(p->data + 4);
	if (h->version != 2 && h->version != 3)
		return ox_error_set(p->err, ENOTSUP,
		                    "%s: qcow2 version %u is not supported; known are 2 and 3",
		                    p->what, h->version);
	if (h->version == 3 && p->bytes < V3_BYTES)
		return ox_error_set(p->err, EINVAL,
		                    "%s: %zu bytes are too few for a qcow2 header of version 3; "
		                    "the file was cut off",
		                    p->what, p->bytes);
	return 0;
}

static void read_fields(struct parse *p)
{
	struct qcow2_header *h = p->header;

	p->backing_offset = ox_get_be64(p->data + 8);
	p->backing_bytes = ox_get_be32(p->data + 16);
	h->cluster_bits = ox_get_be32(p->data + 20);
	h->size = ox_get_be64(p->data + 24);
	h->crypt_method = ox_get_be32(p->data + 32);
	h->l1_entries = ox_get_be32(p->data + 36);
	h->l1_offset = ox_get_be64(p->data + 40);
	h->refcount_table_offset = ox_get_be64(p->data + 48);
	h->refcount_table_clusters = ox_get_be32(p->data + 56);
	h->snapshot_count = ox_get_be32(p->data + 60);
	h->snapshots_offset = ox_get_be64(p->data + 64);
	h->refcount_order = REFCOUNT_ORDER_V2;
	h->header_bytes = V2_BYTES;
	if (h->version < 3)
		return;
	h->incompatible = ox_get_be64(p->data + 72);
	h->compatible = ox_get_be64(p->data + 80);
	h->autoclear = ox_get_be64(p->data + 88);
	h->refcount_order = ox_get_be32(p->data + 96);
	h->header_bytes = ox_get_be32(p->data + 100);
}

static int parse_shape(struct parse *p)
{
	struct qcow2_header *h = p->header;

	if (h->cluster_bits < QCOW2_MIN_CLUSTER_BITS || h->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says cluster size 2^%u; allowed are 2^%u to "
		                    "2^%u",
		                    p->what, h->cluster_bits, QCOW2_MIN_CLUSTER_BITS,
		                    QCOW2_MAX_CLUSTER_BITS);
	p->cluster = UINT64_C(1) << h->cluster_bits;
	if (h->version == 2)
		return 0;
	if (h->header_bytes < V3_BYTES || h->header_bytes > p->cluster ||
	    !ox_is_aligned(h->header_bytes, 8))
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says that it is %u bytes long; allowed are "
		                    "%u to the cluster's %llu, in steps of 8",
		                    p->what, h->header_bytes, V3_BYTES,
		                    (unsigned long long)p->cluster);
	if (h->header_bytes > p->bytes)
		return ox_error_set(p->err, EINVAL,
		                    "%s: the file ends within the qcow2 header of %u bytes",
		                    p->what, h->header_bytes);
	if (h->header_bytes > V3_KNOWN - 1)
		h->compression_type = p->data[V3_KNOWN - 1];
	if (h->header_bytes > V3_KNOWN) {
		h->unknown_bytes = h->header_bytes - V3_KNOWN;
		h->unknown = copy_bytes(p->data + V3_KNOWN, h->unknown_bytes);
	}
	if (h->refcount_order > 6)
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says refcounts of 2^%u bits; allowed are 1 "
		                    "to 64 bits",
		                    p->what, h->refcount_order);
	return 0;
}

/* Where the table of `entries` things lies, if there are any. */
static int check_table(struct parse *p, const char *table, uint64_t offset, uint64_t bytes,
                       uint64_t max_bytes)
{
	if (bytes > max_bytes)
		return ox_error_set(p->err, EFBIG,
		                    "%s: qcow2 header says that the %s takes %llu bytes; at most "
		                    "%llu are allowed",
		                    p->what, table, (unsigned long long)bytes,
		                    (unsigned long long)max_bytes);
	if (bytes == 0)
		return 0;
	if (offset == 0 || !ox_is_aligned(offset, p->cluster) ||
	    !ox_range_within(offset, bytes, INT64_MAX))
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says that the %s is at offset %llu, which "
		                    "is not where a cluster of %llu bytes can begin",
		                    p->what, table, (unsigned long long)offset,
		                    (unsigned long long)p->cluster);
	return 0;
}

static int parse_size(struct parse *p)
{
	struct qcow2_header *h = p->header;
	unsigned entry_shift = h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2 ? 4 : 3;
	/* Guest bytes that one L1 entry maps: at most 2^(2 * 21 - 3). */
	unsigned shift = 2 * h->cluster_bits - entry_shift;
	uint64_t needed;

	if (h->size > INT64_MAX)
		return ox_error_set(p->err, EFBIG,
		                    "%s: qcow2 header says a disk of %llu bytes; at most 2^63 - 1 "
		                    "are possible",
		                    p->what, (unsigned long long)h->size);
	needed = (h->size >> shift) + ((h->size & ((UINT64_C(1) << shift) - 1)) != 0);
	if (needed > QCOW2_MAX_L1_BYTES / 8)
		return ox_error_set(p->err, EFBIG,
		                    "%s: a disk of %llu bytes is too large for clusters of %llu "
		                    "bytes",
		                    p->what, (unsigned long long)h->size,
		                    (unsigned long long)p->cluster);
	if (h->l1_entries < needed)
		return ox_error_set(p->err, EINVAL,
		                    "%s: the L1 table of %u entries is too small for a disk of "
		                    "%llu bytes; %llu are needed",
		                    p->what, h->l1_entries, (unsigned long long)h->size,
		                    (unsigned long long)needed);
	return 0;
}

static int parse_tables(struct parse *p)
{
	struct qcow2_header *h = p->header;
	int rc = check_table(p, "L1 table", h->l1_offset, (uint64_t)h->l1_entries * 8,
	                     QCOW2_MAX_L1_BYTES);

	if (rc == 0)
		rc = check_table(p, "refcount table", h->refcount_table_offset,
		                 (uint64_t)h->refcount_table_clusters << h->cluster_bits,
		                 QCOW2_MAX_REFTABLE_BYTES);
	if (rc == 0 && h->snapshot_count > QCOW2_MAX_SNAPSHOTS)
		return ox_error_set(p->err, EFBIG,
		                    "%s: qcow2 header says %u snapshots; at most %u are allowed",
		                    p->what, h->snapshot_count, QCOW2_MAX_SNAPSHOTS);
	/* An entry has at least 40 bytes. */
	if (rc == 0)
		rc = check_table(p, "snapshot table", h->snapshots_offset,
		                 (uint64_t)h->snapshot_count * 40,
		                 (uint64_t)QCOW2_MAX_SNAPSHOTS * 40);
	if (rc == 0)
		rc = parse_size(p);
	return rc;
}

/* --- features -------------------------------------------------------------------------------- */

/* What the file's own table calls this feature: printable ASCII in `out` of FEATURE_NAME_BYTES + 1
 * bytes; false: it has no name. */
static bool feature_name(const struct qcow2_header *header, unsigned type, unsigned bit, char *out)
{
	const struct qcow2_extension *names = find_extension(header, QCOW2_EXT_FEATURE_NAMES);

	if (!names)
		return false;
	for (uint32_t at = 0; names->bytes - at >= FEATURE_BYTES; at += FEATURE_BYTES) {
		const uint8_t *entry = names->data + at;
		size_t length;

		if (entry[0] != type || entry[1] != bit)
			continue;
		length = strnlen((const char *)entry + 2, FEATURE_NAME_BYTES);
		for (size_t i = 0; i < length; i++)
			out[i] = entry[2 + i] >= 0x20 && entry[2 + i] < 0x7f ? (char)entry[2 + i]
			                                                     : '?';
		out[length] = '\0';
		return length > 0;
	}
	return false;
}

static int refuse_features(struct parse *p, uint64_t unknown)
{
	char list[512] = "", name[FEATURE_NAME_BYTES + 1];
	size_t at = 0;

	for (unsigned bit = 0; bit < 64 && at < sizeof(list) - 80; bit++) {
		if (!(unknown & (UINT64_C(1) << bit)))
			continue;
		if (feature_name(p->header, 0, bit, name))
			at += (size_t)snprintf(list + at, sizeof(list) - at, "%s'%s' (bit %u)",
			                       at ? ", " : "", name, bit);
		else
			at += (size_t)snprintf(list + at, sizeof(list) - at, "%sbit %u",
			                       at ? ", " : "", bit);
	}
	return ox_error_set(p->err, ENOTSUP,
	                    "%s: the image uses qcow2 features that this version does not know: %s",
	                    p->what, list);
}

static int check_features(struct parse *p)
{
	const struct qcow2_header *h = p->header;
	bool compression = h->incompatible & QCOW2_INCOMPAT_COMPRESSION;

	if (h->incompatible & ~QCOW2_INCOMPAT_KNOWN)
		return refuse_features(p, h->incompatible & ~QCOW2_INCOMPAT_KNOWN);
	if ((h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2) && h->cluster_bits < 14)
		return ox_error_set(p->err, EINVAL,
		                    "%s: extended L2 entries need clusters of at least 16 KiB, the "
		                    "qcow2 header says %llu bytes",
		                    p->what, (unsigned long long)p->cluster);
	if (compression != (h->compression_type != QCOW2_COMPRESSION_DEFLATE))
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says compression type %u, and its feature "
		                    "bit says the %s",
		                    p->what, h->compression_type,
		                    compression ? "default is not used" : "default (0) is used");
	if (h->compression_type > QCOW2_COMPRESSION_ZSTD)
		return ox_error_set(p->err, ENOTSUP,
		                    "%s: compression type %u is not known; known are 0 (zlib) and "
		                    "1 (zstd)",
		                    p->what, h->compression_type);
	if ((h->autoclear & QCOW2_AUTOCLEAR_DATA_RAW) &&
	    !(h->incompatible & QCOW2_INCOMPAT_DATA_FILE))
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says that its external data file is raw, but "
		                    "there is no external data file",
		                    p->what);
	return 0;
}

static int check_crypt(struct parse *p)
{
	const struct qcow2_header *h = p->header;

	if (h->crypt_method > QCOW2_CRYPT_LUKS)
		return ox_error_set(p->err, ENOTSUP,
		                    "%s: encryption method %u is not known; known are 1 (aes) and "
		                    "2 (luks)",
		                    p->what, h->crypt_method);
	if (h->crypt_method == QCOW2_CRYPT_LUKS && h->luks_bytes == 0)
		return ox_error_set(
		        p->err, EINVAL,
		        "%s: the image is encrypted with LUKS, but the header extension "
		        "that says where its LUKS header is is missing",
		        p->what);
	if (h->crypt_method != QCOW2_CRYPT_LUKS && h->luks_bytes != 0)
		return ox_error_set(p->err, EINVAL,
		                    "%s: there is a LUKS header extension, but the image is not "
		                    "encrypted with LUKS",
		                    p->what);
	return 0;
}

/* --- extensions ------------------------------------------------------------------------------ */

static int bad_extension(struct parse *p, const char *name, uint32_t bytes, const char *expected)
{
	return ox_error_set(p->err, EINVAL,
	                    "%s: the qcow2 header extension '%s' is %u bytes long; %s", p->what,
	                    name, bytes, expected);
}

static int parse_string(struct parse *p, const char *name, char **out, const uint8_t *data,
                        uint32_t bytes, uint32_t max)
{
	char expected[48];

	if (bytes > max) {
		snprintf(expected, sizeof(expected), "at most %u are allowed", max);
		return bad_extension(p, name, bytes, expected);
	}
	*out = copy_name(data, bytes);
	if (**out == '\0') {
		free(*out);
		*out = NULL;
	}
	return 0;
}

static int parse_luks(struct parse *p, const uint8_t *data, uint32_t bytes)
{
	struct qcow2_header *h = p->header;
	uint64_t offset, length;

	if (bytes != 16)
		return bad_extension(p, "full disk encryption", bytes, "16 are expected");
	offset = ox_get_be64(data);
	length = ox_get_be64(data + 8);
	if (offset == 0 || length == 0 || !ox_is_aligned(offset, p->cluster) ||
	    !ox_range_within(offset, length, INT64_MAX))
		return ox_error_set(
		        p->err, EINVAL,
		        "%s: qcow2 header says that the LUKS header takes %llu bytes at "
		        "offset %llu, which cannot be",
		        p->what, (unsigned long long)length, (unsigned long long)offset);
	h->luks_offset = offset;
	h->luks_bytes = length;
	return 0;
}

/* Only with its autoclear bit do the bitmaps mean anything (a program that does not know them may
 * have written meanwhile); without it the extension is kept as it is and not looked at. */
static int parse_bitmaps(struct parse *p, const uint8_t *data, uint32_t bytes)
{
	struct qcow2_header *h = p->header;
	uint64_t max = (uint64_t)QCOW2_MAX_BITMAPS * 1024;
	uint32_t count;
	uint64_t size;

	if (bytes != 24)
		return bad_extension(p, "bitmaps", bytes, "24 are expected");
	if (!(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS))
		return 0;
	count = ox_get_be32(data);
	size = ox_get_be64(data + 8);
	if (count == 0 || count > QCOW2_MAX_BITMAPS || ox_get_be32(data + 4) != 0)
		return ox_error_set(p->err, EINVAL,
		                    "%s: qcow2 header says %u bitmaps; allowed are 1 to %u",
		                    p->what, count, QCOW2_MAX_BITMAPS);
	/* An entry has 24 bytes and a name. */
	if (size < (uint64_t)count * 24)
		return ox_error_set(
		        p->err, EINVAL,
		        "%s: a bitmap directory of %llu bytes is too small for %u bitmaps", p->what,
		        (unsigned long long)size, count);
	h->bitmap_count = count;
	h->bitmap_directory_bytes = size;
	h->bitmap_directory_offset = ox_get_be64(data + 16);
	return check_table(p, "bitmap directory", h->bitmap_directory_offset, size, max);
}

static int parse_extension(struct parse *p, uint32_t type, const uint8_t *data, uint32_t bytes)
{
	struct qcow2_header *h = p->header;

	switch (type) {
	case QCOW2_EXT_BACKING_FORMAT:
		return parse_string(p, "backing format", &h->backing_format, data, bytes,
		                    FORMAT_MAX);
	case QCOW2_EXT_DATA_FILE:
		return parse_string(p, "external data file", &h->data_file, data, bytes,
		                    DATA_FILE_MAX);
	case QCOW2_EXT_LUKS:
		return parse_luks(p, data, bytes);
	case QCOW2_EXT_BITMAPS:
		return parse_bitmaps(p, data, bytes);
	case QCOW2_EXT_SESSION:
		/* Ours, but of a length that we never wrote: as if it were not there. */
		h->has_session = bytes == sizeof(h->session);
		if (h->has_session)
			memcpy(h->session, data, sizeof(h->session));
		return 0;
	default:
		return 0;
	}
}

static bool is_known(uint32_t type)
{
	return type == QCOW2_EXT_BACKING_FORMAT || type == QCOW2_EXT_DATA_FILE ||
	       type == QCOW2_EXT_LUKS || type == QCOW2_EXT_BITMAPS || type == QCOW2_EXT_SESSION ||
	       type == QCOW2_EXT_FEATURE_NAMES;
}

static void add_extension(struct qcow2_header *h, uint32_t type, const void *data, uint32_t bytes)
{
	struct qcow2_extension *grown = ox_xcalloc(h->extension_count + 1, sizeof(*grown));

	if (h->extension_count)
		memcpy(grown, h->extensions, h->extension_count * sizeof(*grown));
	free(h->extensions);
	h->extensions = grown;
	grown[h->extension_count].type = type;
	grown[h->extension_count].bytes = bytes;
	grown[h->extension_count].data = copy_bytes(data, bytes);
	h->extension_count++;
}

/* How many parse_extensions() will find, at most: a cluster full of empty ones shall cost no square
 * of them. */
static unsigned count_extensions(const struct parse *p)
{
	uint64_t at = p->header->header_bytes;
	unsigned count = 0;

	while (p->end - at >= EXTENSION_HEAD && ox_get_be32(p->data + at) != QCOW2_EXT_END) {
		uint64_t padded = ox_align_up(ox_get_be32(p->data + at + 4), 8);

		count++;
		at += EXTENSION_HEAD;
		if (padded >= p->end - at)
			break;
		at += padded;
	}
	return count;
}

/* One after the other up to the end mark, the backing file's name or the end of the cluster. */
static int parse_extensions(struct parse *p)
{
	struct qcow2_header *h = p->header;
	uint64_t at = h->header_bytes;
	uint32_t seen[8] = {0};
	unsigned seen_count = 0, total = count_extensions(p);

	h->extensions = ox_xcalloc(total ? total : 1, sizeof(*h->extensions));
	while (p->end - at >= EXTENSION_HEAD) {
		uint32_t type = ox_get_be32(p->data + at), bytes = ox_get_be32(p->data + at + 4);
		const uint8_t *data = p->data + at + EXTENSION_HEAD;
		struct qcow2_extension *extension;
		int rc;

		at += EXTENSION_HEAD;
		if (type == QCOW2_EXT_END)
			break;
		if (bytes > p->end - at)
			return ox_error_set(
			        p->err, EINVAL,
			        "%s: a qcow2 header extension (type 0x%08x) is %u bytes "
			        "long, more than there is room for",
			        p->what, type, bytes);
		for (unsigned i = 0; i < seen_count; i++) {
			if (seen[i] == type)
				return ox_error_set(p->err, EINVAL,
				                    "%s: the qcow2 header extension of type 0x%08x "
				                    "is there twice",
				                    p->what, type);
		}
		if (is_known(type))
			seen[seen_count++] = type;
		rc = parse_extension(p, type, data, bytes);
		if (rc < 0)
			return rc;
		if (type != QCOW2_EXT_BACKING_FORMAT && type != QCOW2_EXT_DATA_FILE) {
			extension = &h->extensions[h->extension_count++];
			extension->type = type;
			extension->bytes = bytes;
			extension->data = copy_bytes(data, bytes);
		}
		at += ox_min(ox_align_up(bytes, 8), p->end - at);
	}
	return 0;
}

/* Where the name may lie; the extensions end before it. */
static int check_backing(struct parse *p)
{
	struct qcow2_header *h = p->header;

	p->end = ox_min(p->cluster, (uint64_t)p->bytes);
	if (p->backing_offset == 0)
		return 0;
	if (p->backing_bytes > BACKING_MAX)
		return ox_error_set(p->err, EINVAL,
		                    "%s: the backing file's name is %u bytes long; at most %u are "
		                    "allowed",
		                    p->what, p->backing_bytes, BACKING_MAX);
	if (p->backing_offset < h->header_bytes ||
	    !ox_range_within(p->backing_offset, p->backing_bytes, p->cluster))
		return ox_error_set(p->err, EINVAL,
		                    "%s: the backing file's name (%u bytes at offset %llu) is not "
		                    "between the header and the end of the first cluster",
		                    p->what, p->backing_bytes,
		                    (unsigned long long)p->backing_offset);
	if (!ox_range_within(p->backing_offset, p->backing_bytes, p->bytes))
		return ox_error_set(p->err, EINVAL,
		                    "%s: the file ends within the backing file's name", p->what);
	p->end = ox_min(p->end, p->backing_offset);
	h->backing_offset = p->backing_offset;
	if (p->backing_bytes)
		h->backing_file = copy_name(p->data + p->backing_offset, p->backing_bytes);
	if (h->backing_file && !h->backing_file[0]) {
		free(h->backing_file);
		h->backing_file = NULL;
	}
	if (!h->backing_file)
		h->backing_offset = 0;
	return 0;
}

static int check_together(struct parse *p)
{
	const struct qcow2_header *h = p->header;

	if ((h->autoclear & QCOW2_AUTOCLEAR_DATA_RAW) && h->backing_file)
		return ox_error_set(p->err, EINVAL,
		                    "%s: an image with a raw external data file cannot have a "
		                    "backing file",
		                    p->what);
	if ((h->incompatible & QCOW2_INCOMPAT_DATA_FILE) && h->snapshot_count)
		return ox_error_set(p->err, EINVAL,
		                    "%s: an image with an external data file cannot have internal "
		                    "snapshots",
		                    p->what);
	return 0;
}

int qcow2_header_parse(const uint8_t *data, size_t bytes, const char *what,
                       struct qcow2_header *header, struct ox_error *err)
{
	struct parse p = {.data = data, .bytes = bytes, .what = what, .header = header, .err = err};
	int (*const steps[])(struct parse *) = {
	        parse_shape, check_backing, parse_extensions, check_features,
	        check_crypt, parse_tables,  check_together,
	};
	int rc;

	*header = (struct qcow2_header){0};
	rc = parse_version(&p);
	if (rc == 0)
		read_fields(&p);
	for (size_t i = 0; i < OX_ARRAY_SIZE(steps) && rc == 0; i++)
		rc = steps[i](&p);
	if (rc < 0)
		qcow2_header_free(header);
	return rc;
}

/* --- encoding -------------------------------------------------------------------------------- */

struct encode {
	uint8_t *out;
	size_t at, room;
};

static bool put_extension(struct encode *e, uint32_t type, const void *data, uint32_t bytes)
{
	uint64_t padded = ox_align_up(bytes, 8);

	if (e->room - e->at < EXTENSION_HEAD || e->room - e->at - EXTENSION_HEAD < padded)
		return false;
	ox_put_be32(e->out + e->at, type);
	ox_put_be32(e->out + e->at + 4, bytes);
	if (bytes)
		memcpy(e->out + e->at + EXTENSION_HEAD, data, bytes);
	e->at += EXTENSION_HEAD + padded;
	return true;
}

static void put_fields(const struct qcow2_header *h, uint32_t header_bytes, uint8_t *out)
{
	ox_put_be32(out, QCOW2_MAGIC);
	ox_put_be32(out + 4, h->version);
	ox_put_be32(out + 20, h->cluster_bits);
	ox_put_be64(out + 24, h->size);
	ox_put_be32(out + 32, h->crypt_method);
	ox_put_be32(out + 36, h->l1_entries);
	ox_put_be64(out + 40, h->l1_offset);
	ox_put_be64(out + 48, h->refcount_table_offset);
	ox_put_be32(out + 56, h->refcount_table_clusters);
	ox_put_be32(out + 60, h->snapshot_count);
	ox_put_be64(out + 64, h->snapshots_offset);
	if (h->version < 3)
		return;
	ox_put_be64(out + 72, h->incompatible);
	ox_put_be64(out + 80, h->compatible);
	ox_put_be64(out + 88, h->autoclear);
	ox_put_be32(out + 96, h->refcount_order);
	ox_put_be32(out + 100, header_bytes);
	if (header_bytes >= V3_KNOWN)
		out[V3_KNOWN - 1] = h->compression_type;
	if (h->unknown_bytes)
		memcpy(out + V3_KNOWN, h->unknown, h->unknown_bytes);
}

/* Where the backing file's name goes; 0: nowhere.  It stays where it was as long as it can, and a
 * new one leaves room for the session, because a header is safe against a power cut in the middle
 * of its being written only as long as nothing in it moves (open.c). */
static size_t place_name(const struct qcow2_header *h, const struct encode *e, size_t bytes)
{
	size_t slack = h->has_session ? 0 : EXTENSION_HEAD + sizeof(h->session);
	size_t at = e->at + slack;

	if (h->backing_offset >= e->at && ox_range_within(h->backing_offset, bytes, e->room))
		return h->backing_offset;
	/* Moved: not over the old one. */
	if (h->backing_offset < e->room)
		at = ox_max(at, (size_t)ox_align_up(h->backing_offset + bytes, 8));
	if (ox_range_within(at, bytes, e->room))
		return at;
	return ox_range_within(e->at, bytes, e->room) ? e->at : 0;
}

int qcow2_header_encode(const struct qcow2_header *h, uint8_t *out, size_t cluster)
{
	struct encode e = {.out = out, .room = cluster};
	size_t backing_bytes = h->backing_file ? strlen(h->backing_file) : 0;
	uint32_t header_bytes = h->version < 3 ? V2_BYTES : ox_max(h->header_bytes, V3_BYTES);

	if (h->version >= 3 && h->compression_type)
		header_bytes = ox_max(header_bytes, V3_FULL);
	if (header_bytes > cluster || backing_bytes > BACKING_MAX)
		return -ENOSPC;
	memset(out, 0, cluster);
	put_fields(h, header_bytes, out);
	e.at = header_bytes;
	if (h->backing_format && !put_extension(&e, QCOW2_EXT_BACKING_FORMAT, h->backing_format,
	                                        (uint32_t)strlen(h->backing_format)))
		return -ENOSPC;
	if (h->data_file &&
	    !put_extension(&e, QCOW2_EXT_DATA_FILE, h->data_file, (uint32_t)strlen(h->data_file)))
		return -ENOSPC;
	for (unsigned i = 0; i < h->extension_count; i++) {
		const struct qcow2_extension *x = &h->extensions[i];

		if (!put_extension(&e, x->type, x->data, x->bytes))
			return -ENOSPC;
	}
	if (e.room - e.at < EXTENSION_HEAD)
		return -ENOSPC;
	e.at += EXTENSION_HEAD; /* the end mark is zeroes */
	if (backing_bytes) {
		size_t at = place_name(h, &e, backing_bytes);

		if (at == 0)
			return -ENOSPC;
		ox_put_be64(out + 8, at);
		ox_put_be32(out + 16, (uint32_t)backing_bytes);
		memcpy(out + at, h->backing_file, backing_bytes);
	}
	return 0;
}

/* --- changing -------------------------------------------------------------------------------- */

void qcow2_header_free(struct qcow2_header *header)
{
	for (unsigned i = 0; i < header->extension_count; i++)
		free(header->extensions[i].data);
	free(header->extensions);
	free(header->unknown);
	free(header->backing_file);
	free(header->backing_format);
	free(header->data_file);
	*header = (struct qcow2_header){0};
}

/* What was parsed from the extension follows it. */
static void follow_extension(struct qcow2_header *h, uint32_t type, const uint8_t *data,
                             uint32_t bytes)
{
	switch (type) {
	case QCOW2_EXT_SESSION:
		h->has_session = data && bytes == sizeof(h->session);
		if (h->has_session)
			memcpy(h->session, data, sizeof(h->session));
		break;
	case QCOW2_EXT_LUKS:
		h->luks_offset = data && bytes == 16 ? ox_get_be64(data) : 0;
		h->luks_bytes = data && bytes == 16 ? ox_get_be64(data + 8) : 0;
		break;
	case QCOW2_EXT_BITMAPS:
		h->bitmap_count = data && bytes == 24 ? ox_get_be32(data) : 0;
		h->bitmap_directory_bytes = data && bytes == 24 ? ox_get_be64(data + 8) : 0;
		h->bitmap_directory_offset = data && bytes == 24 ? ox_get_be64(data + 16) : 0;
		break;
	default:
		break;
	}
}

void qcow2_header_set_extension(struct qcow2_header *header, uint32_t type, const void *data,
                                uint32_t bytes)
{
	struct qcow2_extension *extension = find_extension(header, type);

	if (!extension && data) {
		add_extension(header, type, data, bytes);
	} else if (extension && data) {
		uint8_t *copy = copy_bytes(data, bytes);

		free(extension->data);
		extension->data = copy;
		extension->bytes = bytes;
	} else if (extension) {
		unsigned index = (unsigned)(extension - header->extensions);

		free(extension->data);
		memmove(extension, extension + 1,
		        (header->extension_count - index - 1) * sizeof(*extension));
		header->extension_count--;
	}
	follow_extension(header, type, data, bytes);
}

void qcow2_header_add_feature_names(struct qcow2_header *header)
{
	uint8_t table[OX_ARRAY_SIZE(features) * FEATURE_BYTES] = {0};

	for (size_t i = 0; i < OX_ARRAY_SIZE(features); i++) {
		uint8_t *entry = table + i * FEATURE_BYTES;

		entry[0] = features[i].type;
		entry[1] = features[i].bit;
		memcpy(entry + 2, features[i].name, strlen(features[i].name));
	}
	qcow2_header_set_extension(header, QCOW2_EXT_FEATURE_NAMES, table, sizeof(table));
}
