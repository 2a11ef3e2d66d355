/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The virtio block device without a transport: what it offers, its configuration space, and
 * how a chain of buffers becomes a request (virtio 1.3, 5.2).
 *
 * Everything here is a pure function of its arguments and of guest memory.
 */
#ifndef OX_EXPORT_BLK_H
#define OX_EXPORT_BLK_H

#include "disk/disk.h"
#include "virtio/vq.h"

/* Data buffers of one request, as QEMU's own back end says. */
#define OX_BLK_SEG_MAX 126u
/* Ranges in one discard, write-zeroes or secure-erase request. */
#define OX_BLK_RANGES_MAX 16u
/* Bytes of the configuration space that have a meaning (through the zoned members). */
#define OX_BLK_CONFIG_BYTES 96u
/* Of the write-cache byte. */
#define OX_BLK_CONFIG_WCE_OFFSET 32u

/* What a disk can do, as far as requests are concerned. */
struct ox_blk_limits {
	bool read_only, discard, write_zeroes, secure_erase;
	uint32_t max_discard_sectors, max_zero_sectors; /* 512-byte sectors of one range */
	char serial[OX_DISK_SERIAL];                    /* padded with zeroes */
};
void ox_blk_limits_init(struct ox_blk_limits *limits, const struct ox_disk_info *info);

/* VIRTIO_BLK_F_* bits. */
uint64_t ox_blk_features(const struct ox_disk_info *info);

/* `writeback`: the write-cache byte. */
void ox_blk_config_fill(const struct ox_disk_info *info, uint16_t queues, bool writeback,
                        uint8_t config[OX_BLK_CONFIG_BYTES]);
/* Where in the space a front end means.  0x100 and above counts from there: front ends made after
 * virtio-mmio put the device's configuration there (Cloud Hypervisor). */
static inline uint32_t ox_blk_config_offset(uint32_t offset)
{
	return offset >= 0x100 ? offset - 0x100 : offset;
}
/* A front end's access to `size` bytes at `offset`: what lies outside reads as zero. */
void ox_blk_config_read(const uint8_t config[OX_BLK_CONFIG_BYTES], uint32_t offset, uint32_t size,
                        uint8_t *out);

struct ox_blk_command {
	uint8_t op;     /* enum ox_io_op */
	uint8_t flags;  /* OX_IO_* */
	uint8_t ranges; /* > 0: the list holds that many ranges; see ox_blk_range() */
	uint8_t answer; /* OX_BLK_ANSWER: VIRTIO_BLK_S_* */
	uint32_t iovcnt;
	uint64_t offset, length; /* bytes */
	struct iovec *iov;       /* the data, a part of the chain's list */
	uint8_t *status;         /* where the status byte goes, */
	unsigned status_entry;   /* the entry of the chain's list that it ends */
};

enum ox_blk_verdict {
	OX_BLK_SUBMIT,    /* hand it to the disk (ranges: one after the other) */
	OX_BLK_ANSWER,    /* complete it now with command->answer */
	OX_BLK_MALFORMED, /* not a block request at all, or no room for a status */
};
/* Takes a chain apart.  Changes the chain's list: header and status byte are cut off.  GET_ID is
 * carried out here. */
enum ox_blk_verdict ox_blk_parse(struct ox_vq_chain *chain, const struct ox_blk_limits *limits,
                                 struct ox_blk_command *command);
/* The range number `index` of a command with ranges: sets offset, length and flags.  The guest
 * may have changed it since it was parsed, so it is checked anew: VIRTIO_BLK_S_OK or what to
 * answer. */
uint8_t ox_blk_range(struct ox_blk_command *command, const struct ox_blk_limits *limits,
                     unsigned index);
/* VIRTIO_BLK_S_* for a disk's result. */
uint8_t ox_blk_status(int result);

#endif
