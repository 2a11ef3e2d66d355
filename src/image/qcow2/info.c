/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What qcow2 images are, as `qemu-img info --output=json` says it: the same keys, in the order in
 * which it prints them.
 *
 * Control path: may block.  Texts of the image are anybody's: what is no UTF-8 is shown with
 * question marks.
 */
#include "image/qcow2/qcow2.h"
#include "image/crypto.h"
#include <errno.h>
#include <jansson.h>
#include <string.h>

static json_t *text(const char *s)
{
	json_t *value = json_string(s);
	OX_FREE char *copy = NULL;

	if (value)
		return value;
	copy = ox_xstrdup(s);
	for (char *c = copy; *c; c++) {
		if (*c & 0x80)
			*c = '?';
	}
	return json_string(copy);
}

static void put(json_t *object, const char *key, json_t *value)
{
	json_object_set_new(object, key, value);
}

static void put_number(json_t *object, const char *key, uint64_t value)
{
	put(object, key, json_integer((json_int_t)value));
}

static json_t *snapshots_info(const struct qcow2 *q)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < q->header.snapshot_count; i++) {
		const struct qcow2_snapshot *s = &q->snapshots[i];
		json_t *o = json_object();

		if (s->icount != UINT64_MAX)
			put_number(o, "icount", s->icount);
		put_number(o, "vm-clock-nsec", s->vm_clock_ns % 1000000000u);
		put(o, "name", text(s->name));
		put_number(o, "date-sec", s->date_seconds);
		put_number(o, "date-nsec", s->date_ns);
		put_number(o, "vm-clock-sec", s->vm_clock_ns / 1000000000u);
		put(o, "id", text(s->id));
		put_number(o, "vm-state-size", s->vm_state_bytes);
		json_array_append_new(list, o);
	}
	return list;
}

static json_t *bitmaps_info(const struct qcow2 *q)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < q->header.bitmap_count; i++) {
		const struct qcow2_bitmap *b = &q->bitmaps[i];
		json_t *flags = json_array(), *o = json_object();

		if (b->flags & 1)
			json_array_append_new(flags, json_string("in-use"));
		if (b->flags & 2)
			json_array_append_new(flags, json_string("auto"));
		put(o, "flags", flags);
		put(o, "name", text(b->name));
		put_number(o, "granularity", UINT64_C(1) << b->granularity_bits);
		json_array_append_new(list, o);
	}
	return list;
}

static int encryption_info(const struct ox_image *image, json_t **out, struct ox_error *err)
{
	const struct qcow2 *q = image->priv;
	uint8_t head[OX_LUKS_HEADER_BYTES];
	struct ox_luks luks;
	int rc;

	if (q->header.crypt_method == QCOW2_CRYPT_AES) {
		*out = json_pack("{s:s}", "format", "aes");
		return 0;
	}
	rc = ox_store_pread(image->store, q->header.luks_offset, head, sizeof(head));
	if (rc < 0)
		return ox_error_set(err, -rc, "%s: cannot read its LUKS header: %s",
		                    image->store->path, strerror(-rc));
	rc = ox_luks_parse(head, sizeof(head), q->header.luks_bytes, image->store->path, &luks,
	                   err);
	if (rc < 0)
		return rc;
	*out = ox_luks_info(&luks);
	put(*out, "format", json_string("luks"));
	return 0;
}

int qcow2_info(struct ox_image *image, struct ox_image_info *info, struct ox_error *err)
{
	const struct qcow2 *q = image->priv;
	const struct qcow2_header *h = &q->header;
	bool v3 = h->version >= 3;
	json_t *data = json_object(), *encrypt = NULL;

	info->cluster_size = q->cluster_size;
	info->dirty = h->incompatible & QCOW2_INCOMPAT_DIRTY;
	info->encrypted = h->crypt_method != QCOW2_CRYPT_NONE;
	if (info->encrypted) {
		int rc = encryption_info(image, &encrypt, err);

		if (rc < 0) {
			json_decref(data);
			return rc;
		}
	}
	put(data, "compat", json_string(v3 ? "1.1" : "0.10"));
	put(data, "compression-type",
	    json_string(h->compression_type == QCOW2_COMPRESSION_ZSTD ? "zstd" : "zlib"));
	if (v3)
		put(data, "lazy-refcounts",
		    json_boolean(h->compatible & QCOW2_COMPAT_LAZY_REFCOUNTS));
	if (v3 && h->bitmap_count && q->bitmaps)
		put(data, "bitmaps", bitmaps_info(q));
	put_number(data, "refcount-bits", q->refcount_bits);
	if (q->data_file) {
		put(data, "data-file", text(h->data_file ? h->data_file : ""));
		put(data, "data-file-raw", json_boolean(h->autoclear & QCOW2_AUTOCLEAR_DATA_RAW));
	}
	if (encrypt)
		put(data, "encrypt", encrypt);
	if (v3) {
		put(data, "corrupt", json_boolean(h->incompatible & QCOW2_INCOMPAT_CORRUPT));
		put(data, "extended-l2",
		    json_boolean(h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2));
	}
	info->format_specific = json_pack("{s:s, s:o}", "type", "qcow2", "data", data);
	if (h->snapshot_count && q->snapshots)
		info->snapshots = snapshots_info(q);
	return 0;
}
