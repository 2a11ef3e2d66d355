/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The front end's guest memory: regions in memfds, told as a table or slot by slot, and the
 * dirty bitmap over them.
 */
#include "frontend.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int fe_region_new(struct fe *fe, uint64_t gpa, uint64_t size, int fd, uint64_t offset)
{
	struct fe_region *r;

	if (fe->region_count == FE_MAX_REGIONS)
		return -ENOSPC;
	r = &fe->region[fe->region_count];
	*r = (struct fe_region){.gpa = gpa, .size = size, .offset = offset};
	r->fd = fd >= 0 ? dup(fd) : memfd_create("guest memory", MFD_CLOEXEC);
	if (r->fd < 0)
		return -errno;
	if (fd < 0 && ftruncate(r->fd, (off_t)(offset + size)) < 0)
		goto fail;
	r->host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, (off_t)offset);
	if (r->host == MAP_FAILED)
		goto fail;
	r->uva = (uintptr_t)r->host;
	return (int)fe->region_count++;
fail:
	close(r->fd);
	return -errno;
}

static void fill_wire(struct fe_wire_region *wire, const struct fe_region *r)
{
	*wire = (struct fe_wire_region){r->gpa, r->size, r->uva, r->offset};
}

int fe_add_slot(struct fe *fe, unsigned region)
{
	struct fe_region *r = &fe->region[region];
	struct {
		uint64_t padding;
		struct fe_wire_region region;
	} payload = {0};
	int rc;

	fill_wire(&payload.region, r);
	rc = fe_send_ack(fe, FE_ADD_MEM_REG, &payload, sizeof(payload), &r->fd, 1);
	r->known = rc == 0;
	return rc;
}

static void drop_region(struct fe *fe, unsigned index)
{
	struct fe_region *r = &fe->region[index];

	munmap(r->host, r->size);
	close(r->fd);
	memmove(r, r + 1, (fe->region_count - index - 1) * sizeof(*r));
	fe->region_count--;
}

int fe_remove_slot(struct fe *fe, unsigned region)
{
	struct {
		uint64_t padding;
		struct fe_wire_region region;
	} payload = {0};
	int rc;

	fill_wire(&payload.region, &fe->region[region]);
	payload.region.offset = 0; /* as QEMU sends it */
	rc = fe_send_ack(fe, FE_REM_MEM_REG, &payload, sizeof(payload), NULL, 0);
	drop_region(fe, region);
	return rc;
}

int fe_send_memory(struct fe *fe)
{
	struct {
		uint32_t count, padding;
		struct fe_wire_region region[8];
	} table = {0};
	int fds[8];
	int rc;

	if ((fe->protocol_features & FE_P_CONFIGURE_MEM_SLOTS) && !fe->options.keep_table_mode) {
		for (unsigned i = 0; i < fe->region_count; i++) {
			rc = fe_add_slot(fe, i);
			if (rc)
				return rc;
		}
		return 0;
	}
	if (fe->region_count > 8) {
		snprintf(fe->error, sizeof(fe->error), "%u regions, a table has 8",
		         fe->region_count);
		return -ENOSPC;
	}
	table.count = fe->region_count;
	for (unsigned i = 0; i < fe->region_count; i++) {
		fill_wire(&table.region[i], &fe->region[i]);
		fds[i] = fe->region[i].fd;
	}
	rc = fe_send_ack(fe, FE_SET_MEM_TABLE, &table,
	                 8 + table.count * (uint32_t)sizeof(table.region[0]), fds, table.count);
	for (unsigned i = 0; rc == 0 && i < fe->region_count; i++)
		fe->region[i].known = true;
	return rc;
}

void *fe_host(struct fe *fe, uint64_t gpa, uint64_t len)
{
	for (unsigned i = 0; i < fe->region_count; i++) {
		struct fe_region *r = &fe->region[i];

		if (gpa >= r->gpa && gpa - r->gpa <= r->size && len <= r->size - (gpa - r->gpa))
			return r->host + (gpa - r->gpa);
	}
	return NULL;
}

/* Bytes from gpa to its region's end; 0: in no region. */
static uint64_t contiguous(struct fe *fe, uint64_t gpa)
{
	for (unsigned i = 0; i < fe->region_count; i++) {
		struct fe_region *r = &fe->region[i];

		if (gpa >= r->gpa && gpa - r->gpa < r->size)
			return r->size - (gpa - r->gpa);
	}
	return 0;
}

static bool mem_copy(struct fe *fe, uint64_t gpa, char *buf, size_t bytes, bool write)
{
	while (bytes) {
		uint64_t n = contiguous(fe, gpa);
		void *host;

		if (n == 0)
			return false;
		if (n > bytes)
			n = bytes;
		host = fe_host(fe, gpa, n);
		if (write)
			memcpy(host, buf, n);
		else
			memcpy(buf, host, n);
		gpa += n;
		buf += n;
		bytes -= n;
	}
	return true;
}

bool fe_mem_read(struct fe *fe, uint64_t gpa, void *buf, size_t bytes)
{
	return mem_copy(fe, gpa, buf, bytes, false);
}

bool fe_mem_write(struct fe *fe, uint64_t gpa, const void *buf, size_t bytes)
{
	return mem_copy(fe, gpa, (char *)(uintptr_t)buf, bytes, true);
}

int fe_set_log(struct fe *fe)
{
	struct {
		uint64_t size, offset;
	} payload;
	struct fe_msg reply;
	uint64_t end = 0;
	int rc;

	for (unsigned i = 0; i < fe->region_count; i++)
		if (fe->region[i].gpa + fe->region[i].size > end)
			end = fe->region[i].gpa + fe->region[i].size;
	if (fe->log_fd < 0) {
		/* A bit for each 4096 bytes, in whole 64-bit words. */
		fe->log_size = (end / 4096 + 63) / 64 * 8;
		fe->log_fd = memfd_create("dirty log", MFD_CLOEXEC);
		if (fe->log_fd < 0 || ftruncate(fe->log_fd, (off_t)fe->log_size) < 0)
			return -errno;
		fe->log =
		        mmap(NULL, fe->log_size, PROT_READ | PROT_WRITE, MAP_SHARED, fe->log_fd, 0);
		if (fe->log == MAP_FAILED) {
			fe->log = NULL;
			return -errno;
		}
	}
	payload.size = fe->log_size;
	payload.offset = 0;
	/* With LOG_SHMFD the message has a reply; what is in it differs between back ends. */
	rc = fe_call(fe, FE_SET_LOG_BASE, &payload, sizeof(payload), &fe->log_fd, 1, &reply, NULL);
	return rc;
}
