/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * From a chain of guest buffers to a disk request (virtio 1.3, 5.2.6).
 *
 * The chain's list holds host addresses that were checked; what is *in* the buffers belongs to
 * the guest and may change at any moment, so header and ranges are copied once, then looked at.
 * Neither allocates nor copies data.
 */
#include "base/byteorder.h"
#include "base/iov.h"
#include "export/blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>

#define HEADER_BYTES 16u
#define RANGE_BYTES  16u

#ifndef VIRTIO_BLK_T_SECURE_ERASE
#define VIRTIO_BLK_T_SECURE_ERASE 14
#endif

uint8_t ox_blk_status(int result)
{
	if (ox_likely(result == 0))
		return VIRTIO_BLK_S_OK;
	return result == -ENOTSUP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

/* Cuts the header off the front of the device-readable part; it may be spread over entries. */
static void take_header(struct iovec **iov, unsigned *count, uint8_t header[HEADER_BYTES])
{
	size_t got = 0;

	while (got < HEADER_BYTES) {
		size_t part = ox_min((*iov)->iov_len, HEADER_BYTES - got);

		memcpy(header + got, (*iov)->iov_base, part);
		got += part;
		if (part < (*iov)->iov_len) {
			(*iov)->iov_base = (char *)(*iov)->iov_base + part;
			(*iov)->iov_len -= part;
			return;
		}
		(*iov)++;
		(*count)--;
	}
}

static enum ox_blk_verdict answer(struct ox_blk_command *command, uint8_t status)
{
	command->answer = status;
	return OX_BLK_ANSWER;
}

/* The disk checks the range against its size; here only what must not overflow. */
static enum ox_blk_verdict parse_transfer(struct ox_blk_command *command, uint64_t sector,
                                          uint64_t length)
{
	if (length % 512 || sector > INT64_MAX >> 9)
		return answer(command, VIRTIO_BLK_S_IOERR);
	command->offset = sector << 9;
	command->length = length;
	return length ? OX_BLK_SUBMIT : answer(command, VIRTIO_BLK_S_OK);
}

static enum ox_blk_verdict parse_ranges(struct ox_blk_command *command,
                                        const struct ox_blk_limits *limits, uint64_t bytes)
{
	if (!bytes || bytes % RANGE_BYTES || bytes / RANGE_BYTES > OX_BLK_RANGES_MAX)
		return answer(command, VIRTIO_BLK_S_IOERR);
	command->ranges = (uint8_t)(bytes / RANGE_BYTES);
	/* Nothing is done if one of them is wrong. */
	for (unsigned i = command->ranges; i-- > 0;) {
		uint8_t status = ox_blk_range(command, limits, i);

		if (status != VIRTIO_BLK_S_OK)
			return answer(command, status);
	}
	return OX_BLK_SUBMIT;
}

uint8_t ox_blk_range(struct ox_blk_command *command, const struct ox_blk_limits *limits,
                     unsigned index)
{
	uint8_t bytes[RANGE_BYTES];
	uint64_t sector;
	uint32_t sectors, flags, max;

	ox_iov_to_buf(command->iov, command->iovcnt, (size_t)index * RANGE_BYTES, bytes,
	              RANGE_BYTES);
	sector = ox_get_le64(bytes);
	sectors = ox_get_le32(bytes + 8);
	flags = ox_get_le32(bytes + 12);
	/* 5.2.6.2: unknown flags, and unmap where it has no meaning, are unsupported. */
	if (flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP || (flags && command->op != OX_IO_ZERO))
		return VIRTIO_BLK_S_UNSUPP;
	max = command->op == OX_IO_ZERO ? limits->max_zero_sectors : limits->max_discard_sectors;
	if (sectors > max || sector > INT64_MAX >> 9)
		return VIRTIO_BLK_S_IOERR;
	command->offset = sector << 9;
	command->length = (uint64_t)sectors << 9;
	command->flags = flags ? OX_IO_MAY_UNMAP : 0;
	return VIRTIO_BLK_S_OK;
}

enum ox_blk_verdict ox_blk_parse(struct ox_vq_chain *chain, const struct ox_blk_limits *limits,
                                 struct ox_blk_command *command)
{
	struct iovec *out = chain->iov;
	struct iovec *in = chain->iov + chain->out_count;
	unsigned outs = chain->out_count, ins = chain->in_count;
	uint8_t header[HEADER_BYTES];
	uint64_t sector;

	while (ins && !in[ins - 1].iov_len)
		ins--;
	if (ox_unlikely(!ins || chain->out_bytes < HEADER_BYTES))
		return OX_BLK_MALFORMED;
	command->flags = 0;
	command->ranges = 0;

	/* The status is the last byte that the device may write. */
	in[ins - 1].iov_len--;
	command->status = (uint8_t *)in[ins - 1].iov_base + in[ins - 1].iov_len;
	command->status_entry = chain->out_count + ins - 1;
	if (!in[ins - 1].iov_len)
		ins--;

	if (ox_likely(out->iov_len == HEADER_BYTES)) {
		memcpy(header, out->iov_base, HEADER_BYTES);
		out++;
		outs--;
	} else {
		take_header(&out, &outs, header);
	}
	sector = ox_get_le64(header + 8);

	switch (ox_get_le32(header)) {
	case VIRTIO_BLK_T_IN:
		command->op = OX_IO_READ;
		command->iov = in;
		command->iovcnt = ins;
		return parse_transfer(command, sector, chain->in_bytes - 1);
	case VIRTIO_BLK_T_OUT:
		command->op = OX_IO_WRITE;
		command->iov = out;
		command->iovcnt = outs;
		if (limits->read_only)
			return answer(command, VIRTIO_BLK_S_IOERR);
		return parse_transfer(command, sector, chain->out_bytes - HEADER_BYTES);
	case VIRTIO_BLK_T_FLUSH:
		command->op = OX_IO_FLUSH;
		command->iov = NULL;
		command->iovcnt = 0;
		command->offset = command->length = 0;
		return OX_BLK_SUBMIT;
	case VIRTIO_BLK_T_GET_ID:
		ox_iov_from_buf(in, ins, 0, limits->serial, OX_DISK_SERIAL);
		return answer(command, VIRTIO_BLK_S_OK);
	case VIRTIO_BLK_T_DISCARD:
		command->op = OX_IO_DISCARD;
		if (!limits->discard)
			return answer(command, VIRTIO_BLK_S_UNSUPP);
		break;
	case VIRTIO_BLK_T_WRITE_ZEROES:
		command->op = OX_IO_ZERO;
		if (!limits->write_zeroes)
			return answer(command, VIRTIO_BLK_S_UNSUPP);
		break;
	case VIRTIO_BLK_T_SECURE_ERASE:
		command->op = OX_IO_SECURE_ERASE;
		if (!limits->secure_erase)
			return answer(command, VIRTIO_BLK_S_UNSUPP);
		break;
	default:
		return answer(command, VIRTIO_BLK_S_UNSUPP);
	}
	command->iov = out;
	command->iovcnt = outs;
	return parse_ranges(command, limits, chain->out_bytes - HEADER_BYTES);
}
