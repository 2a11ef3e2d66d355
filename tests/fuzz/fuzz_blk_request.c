/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: a chain of buffers becomes a block request.  Input: flags, number of buffers that
 * the device reads and that it writes, their lengths (two bytes each), then their content.
 */
#include "export/blk.h"
#include "base/iov.h"

#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(x)                 \
	do {                     \
		if (!(x))        \
			abort(); \
	} while (0)
#define BUFFERS 24u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct iovec iov[BUFFERS] = {0};
	void *base[BUFFERS] = {0};
	uint64_t guest_addr[BUFFERS] = {0};
	struct ox_vq_chain chain = {.iov = iov, .guest_addr = guest_addr, .capacity = BUFFERS};
	struct ox_blk_limits limits = {0};
	struct ox_blk_command command = {0};
	unsigned total;

	if (size < 3)
		return 0;
	limits.read_only = data[0] & 1;
	limits.discard = data[0] & 2;
	limits.write_zeroes = data[0] & 4;
	limits.secure_erase = data[0] & 8;
	limits.max_discard_sectors = limits.max_zero_sectors = data[0] & 16 ? 1u << 22 : 64;
	chain.out_count = data[1] % (BUFFERS / 2);
	chain.in_count = data[2] % (BUFFERS / 2);
	total = chain.out_count + chain.in_count;
	data += 3;
	size -= 3;
	if (size < 2 * total)
		return 0;
	for (unsigned i = 0; i < total; i++) {
		/* In blocks of their own: every access beyond one is seen. */
		iov[i].iov_len = (size_t)data[2 * i] | (size_t)data[2 * i + 1] << 8;
		iov[i].iov_base = base[i] = calloc(1, iov[i].iov_len + !iov[i].iov_len);
		CHECK(base[i]);
		if (i < chain.out_count)
			chain.out_bytes += iov[i].iov_len;
		else
			chain.in_bytes += iov[i].iov_len;
	}
	data += 2 * total;
	size -= 2 * total;
	ox_iov_from_buf(iov, chain.out_count, 0, data, size);
	if (ox_blk_parse(&chain, &limits, &command) == OX_BLK_SUBMIT) {
		CHECK(command.status);
		*command.status = VIRTIO_BLK_S_OK;
		for (unsigned i = 0; i < command.ranges; i++)
			if (ox_blk_range(&command, &limits, i) == VIRTIO_BLK_S_OK)
				CHECK(command.offset + command.length >= command.offset);
		if (command.op == OX_IO_READ || command.op == OX_IO_WRITE) {
			CHECK(ox_iov_size(command.iov, command.iovcnt) == command.length);
			if (command.op == OX_IO_READ)
				ox_iov_memset(command.iov, command.iovcnt, 0, 1, command.length);
		}
	}
	for (unsigned i = 0; i < total; i++)
		free(base[i]);
	return 0;
}
