/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What format do these bytes belong to?
 *
 * Pure functions over the first bytes of an image: no allocation, no I/O, any thread.  The table
 * also holds formats without a driver, for two reasons: an image of theirs must not be served as
 * raw by accident, and a guest on a guessed raw image must not be able to write their magic
 * (image.c).  For the second use a false "yes" costs a guest one refused write of a sector that
 * no file system has, a false "no" costs the host a file of the guest's choice: in doubt, yes.
 *
 * A format whose mark lies elsewhere is not seen here, on purpose: a fixed VHD has its
 * "conectix" footer in the last sector only, a UDIF image its "koly" block.  QEMU and libvirt do
 * not look there either, so a guest gains nothing by writing it.
 */
#include "image/image.h"
#include "base/byteorder.h"
#include <strings.h>

struct head {
	const uint8_t *data;
	size_t bytes;
	const char *path;
};

static bool head_has(const struct head *head, size_t offset, const void *magic, size_t bytes)
{
	return ox_range_within(offset, bytes, head->bytes) &&
	       memcmp(head->data + offset, magic, bytes) == 0;
}

static const char qfi_magic[4] = {'Q', 'F', 'I', (char)0xfb};

static bool is_qcow(const struct head *head)
{
	return head->bytes >= 8 && head_has(head, 0, qfi_magic, 4) &&
	       ox_get_be32(head->data + 4) == 1;
}

/* Versions to come are qcow2's too: an image of version 4 is not a raw one. */
static bool is_qcow2(const struct head *head)
{
	return head->bytes >= 8 && head_has(head, 0, qfi_magic, 4) &&
	       ox_get_be32(head->data + 4) >= 2;
}

static bool is_qed(const struct head *head)
{
	return head_has(head, 0, "QED", 4);
}

static bool text_is_blank(uint8_t c)
{
	return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

/* The text form: comments and blank lines, then "version=".  The comment that VMware's own tools
 * put first is enough alone, since the first sector may end within it. */
static bool is_vmdk_descriptor(const struct head *head)
{
	static const char title[] = "# Disk DescriptorFile";
	static const char version[] = "version";
	size_t at = 0;

	if (head->bytes >= sizeof(title) - 1 &&
	    strncasecmp((const char *)head->data, title, sizeof(title) - 1) == 0)
		return true;
	for (;;) {
		while (at < head->bytes && text_is_blank(head->data[at]))
			at++;
		if (at == head->bytes || head->data[at] != '#')
			break;
		while (at < head->bytes && head->data[at] != '\n')
			at++;
	}
	if (!ox_range_within(at, sizeof(version) - 1, head->bytes) ||
	    strncasecmp((const char *)head->data + at, version, sizeof(version) - 1) != 0)
		return false;
	at += sizeof(version) - 1;
	while (at < head->bytes && (head->data[at] == ' ' || head->data[at] == '\t'))
		at++;
	return at < head->bytes && head->data[at] == '=';
}

/* Sparse extents of hosted products ("KDMV"), of ESX ("COWD") and its newer space-efficient ones
 * (a 64-bit magic, little endian), and descriptors. */
static bool is_vmdk(const struct head *head)
{
	static const uint8_t sesparse[8] = {0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0};

	return head_has(head, 0, "KDMV", 4) || head_has(head, 0, "COWD", 4) ||
	       head_has(head, 0, sesparse, sizeof(sesparse)) || is_vmdk_descriptor(head);
}

/* 64 bytes of free text come before the signature. */
static bool is_vdi(const struct head *head)
{
	return ox_range_within(0x40, 4, head->bytes) &&
	       ox_get_le32(head->data + 0x40) == 0xbeda107fu;
}

static bool is_vhdx(const struct head *head)
{
	return head_has(head, 0, "vhdxfile", 8);
}

static bool is_vpc(const struct head *head)
{
	return head_has(head, 0, "conectix", 8);
}

/* Both versions, and the second header of version 2 (it too stands at a fixed place, but a file
 * that begins with it is a damaged LUKS volume, not a raw disk). */
static bool is_luks(const struct head *head)
{
	static const uint8_t first[6] = {'L', 'U', 'K', 'S', 0xba, 0xbe};
	static const uint8_t second[6] = {'S', 'K', 'U', 'L', 0xba, 0xbe};

	return head_has(head, 0, first, 6) || head_has(head, 0, second, 6);
}

static bool is_parallels(const struct head *head)
{
	return head_has(head, 0, "WithoutFreeSpace", 16) ||
	       head_has(head, 0, "WithouFreSpacExt", 16);
}

static bool is_bochs(const struct head *head)
{
	return head_has(head, 0, "Bochs Virtual HD Image", 22);
}

static bool is_cloop(const struct head *head)
{
	static const char script[] = "#!/bin/sh\n#V2.0 Format\n";

	return head_has(head, 0, script, sizeof(script) - 1);
}

/* By its name, as QEMU does: the head of such an image is its compressed data. */
static bool is_dmg(const struct head *head)
{
	size_t length = head->path ? strlen(head->path) : 0;

	return length > 4 && strcmp(head->path + length - 4, ".dmg") == 0;
}

/* In the order in which they are asked; the weakest evidence last. */
static const struct {
	const char *name;
	bool (*is)(const struct head *head);
} formats[] = {
        {"qcow2", is_qcow2}, {"qcow", is_qcow},   {"qed", is_qed},
        {"vmdk", is_vmdk},   {"vdi", is_vdi},     {"vhdx", is_vhdx},
        {"vpc", is_vpc},     {"luks", is_luks},   {"parallels", is_parallels},
        {"bochs", is_bochs}, {"cloop", is_cloop}, {"dmg", is_dmg},
};

const char *ox_image_guess_format(const void *data, size_t bytes, const char *path)
{
	const struct head head = {.data = data, .bytes = bytes, .path = path};

	for (size_t i = 0; i < OX_ARRAY_SIZE(formats); i++) {
		if (formats[i].is(&head))
			return formats[i].name;
	}
	return "raw";
}

bool ox_image_first_sector_is_dangerous(const void *sector, size_t bytes)
{
	return strcmp(ox_image_guess_format(sector, bytes, NULL), "raw") != 0;
}

const char *const *ox_format_names(void)
{
	static const char *const names[] = {
	        "raw", "qcow2", "qcow",      "qed",   "vmdk",  "vdi", "vhdx",
	        "vpc", "luks",  "parallels", "bochs", "cloop", "dmg", NULL,
	};

	_Static_assert(OX_ARRAY_SIZE(names) == OX_ARRAY_SIZE(formats) + 2, "raw, the table, NULL");
	return names;
}
