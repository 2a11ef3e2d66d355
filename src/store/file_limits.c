/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What a file or block device needs and can do: alignment for O_DIRECT, block sizes, discard.
 *
 * Alignment: the device's ioctl; for a regular file statx(STATX_DIOALIGN) (Linux 6.1), else by
 * trying reads with growing alignment, as the kernel refuses unaligned ones with EINVAL.
 * The rest: sysfs, best effort; what is not known is 0.  A partition's queue is its disk's.
 *
 * Called at open with the lock held; nothing here writes.
 */
#include "store/file.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define ALIGN_MIN 512u
#define ALIGN_MAX 65536u

/* --- sysfs ------------------------------------------------------------------------------ */

/* A number from /sys/dev/block/MAJOR:MINOR/[../]queue/NAME; false if there is none. */
static bool queue_number(dev_t dev, const char *name, uint64_t *value)
{
	static const char *const dirs[] = {"queue", "../queue"};

	for (size_t i = 0; i < OX_ARRAY_SIZE(dirs); i++) {
		char path[128], text[32];
		OX_CLOSE int fd = -1;
		ssize_t got;
		char *end;

		snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s/%s", major(dev), minor(dev),
		         dirs[i], name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		got = read(fd, text, sizeof(text) - 1);
		if (got <= 0)
			return false;
		text[got] = '\0';
		errno = 0;
		*value = strtoull(text, &end, 10);
		return end != text && errno == 0;
	}
	return false;
}

static uint32_t queue_u32(dev_t dev, const char *name, uint32_t otherwise)
{
	uint64_t value;

	return queue_number(dev, name, &value) && value <= UINT32_MAX ? (uint32_t)value : otherwise;
}

/* --- alignment -------------------------------------------------------------------------- */

/* Would a direct read of `length` bytes into a buffer `skew` bytes off a page be accepted? */
static bool read_accepted(int fd, uint8_t *page, size_t skew, size_t length)
{
	ssize_t got;

	do
		got = pread(fd, page + skew, length, 0);
	while (got < 0 && errno == EINTR);
	return got >= 0 || errno != EINVAL;
}

static int probe_alignment(const struct ox_file *file, uint32_t *offset_align,
                           uint32_t *memory_align, struct ox_error *err)
{
	OX_FREE void *buf = NULL;
	uint32_t align;

	if (posix_memalign(&buf, ALIGN_MAX, 2 * (size_t)ALIGN_MAX))
		return ox_error_set(err, ENOMEM, "%s: out of memory", file->store->path);
	for (align = ALIGN_MIN; align <= ALIGN_MAX; align *= 2) {
		if (read_accepted(file->fd, buf, 0, align))
			break;
	}
	if (align > ALIGN_MAX)
		return ox_error_set(err, EINVAL,
		                    "%s: O_DIRECT reads are refused whatever their alignment; use "
		                    "--cache=writeback",
		                    file->store->path);
	*offset_align = align;
	for (align = ALIGN_MIN; align < ALIGN_MAX; align *= 2) {
		if (read_accepted(file->fd, buf, align, ALIGN_MAX))
			break;
	}
	*memory_align = align;
	return 0;
}

/* False: the kernel does not say.  Zeroes: O_DIRECT is not possible. */
static bool ask_alignment(int fd, uint32_t *offset_align, uint32_t *memory_align)
{
#ifdef STATX_DIOALIGN
	struct statx stx;

	if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 &&
	    (stx.stx_mask & STATX_DIOALIGN)) {
		*offset_align = stx.stx_dio_offset_align;
		*memory_align = stx.stx_dio_mem_align;
		return true;
	}
#endif
	return false;
}

static int say_no_direct(const struct ox_file *file, struct ox_error *err)
{
	return ox_error_set(err, EINVAL,
	                    "%s: its file system cannot bypass the page cache for this file "
	                    "(O_DIRECT, cache modes none and directsync); use --cache=writeback",
	                    file->store->path);
}

static int find_alignment(struct ox_file *file, const struct stat *st, struct ox_error *err)
{
	struct ox_store_limits *limits = &file->limits;
	uint32_t offset_align = 1, memory_align = 1;
	int ret;

	if (!file->direct) {
		limits->request_alignment = 1;
		limits->memory_alignment = 1;
		return 0;
	}
	if (ask_alignment(file->fd, &offset_align, &memory_align)) {
		if (offset_align == 0 || memory_align == 0)
			return say_no_direct(file, err);
	} else if (file->block) {
		offset_align = limits->logical_block_size;
		memory_align = queue_u32(st->st_rdev, "dma_alignment", offset_align - 1) + 1;
	} else {
		ret = probe_alignment(file, &offset_align, &memory_align, err);
		if (ret < 0)
			return ret;
		/* An empty file accepts everything. */
		if (st->st_size == 0)
			offset_align = ox_max(offset_align, 4096u);
	}
	if (!ox_is_power_of_2(offset_align) || !ox_is_power_of_2(memory_align) ||
	    offset_align > ALIGN_MAX || memory_align > ALIGN_MAX)
		return ox_error_set(
		        err, EINVAL,
		        "%s: O_DIRECT needs an alignment of %u bytes (memory: %u), more "
		        "than Oxbow handles; use --cache=writeback",
		        file->store->path, offset_align, memory_align);
	limits->request_alignment = offset_align;
	limits->memory_alignment = memory_align;
	return 0;
}

/* --- the rest --------------------------------------------------------------------------- */

static bool can_secure_erase(int fd)
{
	/* A range that is not even sector aligned is never carried out: a device that can erase
	 * answers EINVAL, one that cannot EOPNOTSUPP. */
	uint64_t range[2] = {1, 1};

	return ioctl(fd, BLKSECDISCARD, range) < 0 && errno == EINVAL;
}

static void find_device_facts(struct ox_file *file, const struct stat *st)
{
	struct ox_store_limits *limits = &file->limits;
	dev_t dev = st->st_rdev;
	unsigned physical = 0, optimal = 0;
	int logical = 0;
	uint64_t value;

	if (ioctl(file->fd, BLKSSZGET, &logical) < 0 || logical < 512 ||
	    !ox_is_power_of_2((uint64_t)logical) || logical > (int)ALIGN_MAX)
		logical = 512;
	if (ioctl(file->fd, BLKPBSZGET, &physical) < 0 || !ox_is_power_of_2(physical) ||
	    (int)physical < logical)
		physical = (unsigned)logical;
	if (ioctl(file->fd, BLKIOOPT, &optimal) < 0)
		optimal = 0;
	limits->logical_block_size = (uint32_t)logical;
	limits->physical_block_size = physical;
	limits->optimal_io_size = optimal;
	limits->rotational = queue_u32(dev, "rotational", 0) != 0;
	limits->zero_is_fast = queue_number(dev, "write_zeroes_max_bytes", &value) && value > 0;
	if (!file->store->options.read_only) {
		limits->can_discard = queue_number(dev, "discard_max_bytes", &value) && value > 0;
		limits->can_secure_erase = can_secure_erase(file->fd);
	}
	if (limits->can_discard)
		limits->discard_granularity =
		        ox_max(queue_u32(dev, "discard_granularity", 0), (uint32_t)logical);
	file->zero_align = (uint64_t)logical;
}

static void find_file_facts(struct ox_file *file, const struct stat *st)
{
	struct ox_store_limits *limits = &file->limits;
	uint32_t block = 512;

	/* The file system's block, in which holes are made. Network file systems answer a transfer
	 * size instead. */
	if (st->st_blksize >= 512 && st->st_blksize <= (blksize_t)ALIGN_MAX &&
	    ox_is_power_of_2((uint64_t)st->st_blksize))
		block = (uint32_t)st->st_blksize;
	else if (st->st_blksize > (blksize_t)ALIGN_MAX)
		block = 4096;
	limits->logical_block_size = ox_max(limits->request_alignment, 512u);
	limits->physical_block_size = ox_max(limits->logical_block_size, ox_min(block, 4096u));
	limits->rotational = queue_u32(st->st_dev, "rotational", 0) != 0;
	limits->can_discard = !file->store->options.read_only;
	limits->discard_granularity = limits->can_discard ? block : 0;
	limits->zero_is_fast = true;
	file->zero_align = ox_max((uint64_t)block, (uint64_t)limits->request_alignment);
}

int ox_file_find_limits(struct ox_file *file, struct ox_error *err)
{
	struct ox_store_limits *limits = &file->limits;
	struct stat st;
	int ret;

	if (fstat(file->fd, &st) < 0)
		return ox_error_set(err, errno, "%s: %s", file->store->path, strerror(errno));
	*limits = (struct ox_store_limits){
	        .max_iov = IOV_MAX,
	        .logical_block_size = 512,
	        .physical_block_size = 512,
	        .volatile_cache = true,
	};
	if (file->block)
		find_device_facts(file, &st);
	ret = find_alignment(file, &st, err);
	if (ret < 0)
		return ret;
	if (!file->block)
		find_file_facts(file, &st);
	file->align_mask = limits->request_alignment - 1;
	file->memory_mask = limits->memory_alignment - 1;
	file->tracked = !file->store->options.read_only && file->direct &&
	                file->store->options.write_granularity < limits->request_alignment;
	return 0;
}

bool ox_file_is_fully_allocated(int fd, uint64_t size)
{
	struct stat st;

	return fstat(fd, &st) == 0 && (uint64_t)st.st_blocks * 512 >= size &&
	       (size == 0 || lseek(fd, 0, SEEK_HOLE) >= (off_t)size);
}
