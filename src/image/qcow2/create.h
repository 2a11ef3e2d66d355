/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Making qcow2 images: what create_options.c (words) and create.c (layout, writing) share.
 */
#ifndef OX_IMAGE_QCOW2_CREATE_H
#define OX_IMAGE_QCOW2_CREATE_H

#include "image/crypto.h"
#include "image/qcow2/qcow2.h"

enum qcow2_preallocation {
	QCOW2_PREALLOC_OFF,
	QCOW2_PREALLOC_METADATA,
	QCOW2_PREALLOC_FALLOC,
	QCOW2_PREALLOC_FULL,
};

/* What -o said, checked. Strings are the caller's. */
struct qcow2_create {
	uint64_t size; /* rounded up to sectors */
	uint32_t version, cluster_bits, refcount_order;
	bool extended, lazy, data_raw, nocow, backing;
	uint8_t compression;
	enum qcow2_preallocation prealloc;
	const char *data_file; /* NULL: none */
	bool encrypted;
	struct ox_luks_create luks;
	const char *key_secret;
};

/* Where everything goes, in clusters, in the file's order: header, refcount table, refcount blocks,
 * LUKS header, L1 table, L2 tables, data. */
struct qcow2_plan {
	uint32_t cluster, entry_bytes;
	uint32_t l1_entries;
	uint64_t reftable, reftable_count;
	uint64_t blocks, block_count, refcounts_per_block;
	uint64_t luks, luks_count, luks_bytes;
	uint64_t l1, l1_count;
	uint64_t tables, table_count;
	uint64_t data, data_count; /* preallocated in this file */
	uint64_t guest_clusters;
};

/* Pure. */
int qcow2_create_parse(const struct ox_image_create_options *options, struct qcow2_create *create,
                       struct ox_error *err) OX_MUST_CHECK;
/* Pure.  *header (freed by the caller, also after an error) is what will be written. */
int qcow2_create_plan(const struct ox_image_create_options *options,
                      const struct qcow2_create *create, struct qcow2_plan *plan,
                      struct qcow2_header *header, struct ox_error *err) OX_MUST_CHECK;

#endif
