/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the block device offers: feature bits and the configuration space (virtio 1.3, 5.2.3 and
 * 5.2.4).
 *
 * Invariant: a number that a feature bit guards is filled in whether or not the guest will
 * negotiate the bit; front ends cache the space before features are known.
 */
#include "base/byteorder.h"
#include "export/blk.h"

#include <linux/virtio_blk.h>
#include <string.h>

/* 2 GiB: what the largest request to a host's block layer or file system may be. */
#define RANGE_SECTORS_MAX (1u << 22)

/* Offsets in the configuration space. */
enum {
	CFG_CAPACITY = 0,
	CFG_SEG_MAX = 12,
	CFG_BLK_SIZE = 20,
	CFG_PHYSICAL_BLOCK_EXP = 24,
	CFG_ALIGNMENT_OFFSET = 25,
	CFG_MIN_IO_SIZE = 26,
	CFG_OPT_IO_SIZE = 28,
	CFG_WCE = OX_BLK_CONFIG_WCE_OFFSET,
	CFG_NUM_QUEUES = 34,
	CFG_MAX_DISCARD_SECTORS = 36,
	CFG_MAX_DISCARD_SEG = 40,
	CFG_DISCARD_ALIGNMENT = 44,
	CFG_MAX_ZEROES_SECTORS = 48,
	CFG_MAX_ZEROES_SEG = 52,
	CFG_ZEROES_MAY_UNMAP = 56,
	CFG_MAX_ERASE_SECTORS = 60,
	CFG_MAX_ERASE_SEG = 64,
	CFG_ERASE_ALIGNMENT = 68,
};

static uint32_t range_sectors(const struct ox_disk_info *info, uint64_t max_bytes)
{
	uint64_t max = RANGE_SECTORS_MAX;

	if (max_bytes && max_bytes >> 9 < max)
		max = ox_align_down(max_bytes, info->logical_block_size) >> 9;
	return (uint32_t)ox_max(max, (uint64_t)info->logical_block_size >> 9);
}

void ox_blk_limits_init(struct ox_blk_limits *limits, const struct ox_disk_info *info)
{
	memset(limits, 0, sizeof(*limits));
	limits->read_only = info->read_only;
	limits->discard = info->discard && !info->read_only;
	limits->write_zeroes = info->write_zeroes && !info->read_only;
	limits->secure_erase = info->secure_erase && !info->read_only;
	limits->max_discard_sectors = range_sectors(info, info->max_discard);
	limits->max_zero_sectors = range_sectors(info, info->max_zero);
	if (info->serial)
		memcpy(limits->serial, info->serial, strnlen(info->serial, OX_DISK_SERIAL));
}

uint64_t ox_blk_features(const struct ox_disk_info *info)
{
	uint64_t features = 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE |
	                    1ull << VIRTIO_BLK_F_TOPOLOGY | 1ull << VIRTIO_BLK_F_FLUSH |
	                    1ull << VIRTIO_BLK_F_CONFIG_WCE | 1ull << VIRTIO_BLK_F_MQ;

	if (info->read_only)
		return features | 1ull << VIRTIO_BLK_F_RO;
	if (info->discard)
		features |= 1ull << VIRTIO_BLK_F_DISCARD;
	if (info->write_zeroes)
		features |= 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
	if (info->secure_erase)
		features |= 1ull << VIRTIO_BLK_F_SECURE_ERASE;
	return features;
}

static uint16_t saturate16(uint32_t value)
{
	return (uint16_t)ox_min(value, UINT16_MAX);
}

void ox_blk_config_fill(const struct ox_disk_info *info, uint16_t queues, bool writeback,
                        uint8_t config[OX_BLK_CONFIG_BYTES])
{
	uint32_t logical = info->logical_block_size;
	uint32_t physical = ox_max(info->physical_block_size, logical);
	uint32_t granularity = ox_max(info->discard_granularity, logical);
	struct ox_blk_limits limits;

	ox_blk_limits_init(&limits, info);
	memset(config, 0, OX_BLK_CONFIG_BYTES);
	ox_put_le64(config + CFG_CAPACITY, info->size >> 9);
	ox_put_le32(config + CFG_SEG_MAX, OX_BLK_SEG_MAX);
	ox_put_le32(config + CFG_BLK_SIZE, logical);
	config[CFG_PHYSICAL_BLOCK_EXP] = (uint8_t)__builtin_ctz(physical / logical);
	config[CFG_ALIGNMENT_OFFSET] = 0;
	ox_put_le16(config + CFG_MIN_IO_SIZE, saturate16(physical / logical));
	ox_put_le32(config + CFG_OPT_IO_SIZE, info->optimal_io_size / logical);
	config[CFG_WCE] = writeback;
	ox_put_le16(config + CFG_NUM_QUEUES, queues);
	if (limits.discard) {
		ox_put_le32(config + CFG_MAX_DISCARD_SECTORS, limits.max_discard_sectors);
		ox_put_le32(config + CFG_MAX_DISCARD_SEG, OX_BLK_RANGES_MAX);
		ox_put_le32(config + CFG_DISCARD_ALIGNMENT, granularity >> 9);
	}
	if (limits.write_zeroes) {
		ox_put_le32(config + CFG_MAX_ZEROES_SECTORS, limits.max_zero_sectors);
		ox_put_le32(config + CFG_MAX_ZEROES_SEG, OX_BLK_RANGES_MAX);
		config[CFG_ZEROES_MAY_UNMAP] = info->zero_unmaps;
	}
	if (limits.secure_erase) {
		ox_put_le32(config + CFG_MAX_ERASE_SECTORS, limits.max_discard_sectors);
		ox_put_le32(config + CFG_MAX_ERASE_SEG, OX_BLK_RANGES_MAX);
		ox_put_le32(config + CFG_ERASE_ALIGNMENT, granularity >> 9);
	}
}

void ox_blk_config_read(const uint8_t config[OX_BLK_CONFIG_BYTES], uint32_t offset, uint32_t size,
                        uint8_t *out)
{
	offset = ox_blk_config_offset(offset);
	memset(out, 0, size);
	if (offset < OX_BLK_CONFIG_BYTES)
		memcpy(out, config + offset, ox_min(size, OX_BLK_CONFIG_BYTES - offset));
}
