/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a qcow2 header with its extensions.  Input: the file's first bytes.
 *
 * What is checked: what was understood is written and understood the same.
 */
#include "image/qcow2/qcow2.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(x)                 \
	do {                     \
		if (!(x))        \
			abort(); \
	} while (0)

static void check_same(const char *a, const char *b)
{
	CHECK(!a == !b);
	CHECK(!a || !strcmp(a, b));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct qcow2_header header = {0}, again = {0};
	struct ox_error err = {0};
	uint8_t *exact = malloc(size ? size : 1), *out;
	size_t cluster;

	CHECK(exact);
	if (size)
		memcpy(exact, data, size);
	if (qcow2_header_parse(exact, size, "disk.qcow2", &header, &err) < 0) {
		CHECK(err.code > 0 && err.text[0]);
		free(exact);
		return 0;
	}
	free(exact);
	CHECK(header.cluster_bits >= QCOW2_MIN_CLUSTER_BITS &&
	      header.cluster_bits <= QCOW2_MAX_CLUSTER_BITS);
	cluster = (size_t)1 << header.cluster_bits;
	out = calloc(1, cluster);
	CHECK(out);
	if (qcow2_header_encode(&header, out, cluster) == 0) {
		memset(&err, 0, sizeof(err));
		CHECK(qcow2_header_parse(out, cluster, "disk.qcow2", &again, &err) == 0);
		CHECK(header.size == again.size && header.l1_offset == again.l1_offset &&
		      header.l1_entries == again.l1_entries &&
		      header.incompatible == again.incompatible &&
		      header.compatible == again.compatible &&
		      header.autoclear == again.autoclear &&
		      header.refcount_order == again.refcount_order &&
		      header.snapshot_count == again.snapshot_count &&
		      header.bitmap_count == again.bitmap_count &&
		      header.luks_offset == again.luks_offset &&
		      header.has_session == again.has_session &&
		      header.extension_count == again.extension_count);
		check_same(header.backing_file, again.backing_file);
		check_same(header.backing_format, again.backing_format);
		check_same(header.data_file, again.data_file);
		qcow2_header_free(&again);
	}
	free(out);
	qcow2_header_free(&header);
	return 0;
}
