/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The marks by which formats are told, and what is not one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/byteorder.h"
#include "image/format.h"

static uint8_t sector[512];

static void put(size_t offset, const char *text)
{
	memset(sector, 0, sizeof(sector));
	memcpy(sector + offset, text, strlen(text));
}

static void expect(const char *format)
{
	assert_string_equal(ox_image_guess_format(sector, sizeof(sector), "disk"), format);
	assert_int_equal(ox_image_first_sector_is_dangerous(sector, sizeof(sector)),
	                 strcmp(format, "raw") != 0);
}

static void test_marks(void **state)
{
	put(0, "QFI\xfb");
	expect("raw"); /* version 0 is nobody's */
	sector[7] = 1;
	expect("qcow");
	for (uint8_t version = 2; version < 6; version++) {
		sector[7] = version;
		expect("qcow2");
	}
	put(0, "QED");
	expect("qed");
	put(0, "KDMV");
	expect("vmdk");
	put(0, "COWD");
	expect("vmdk");
	memset(sector, 0, sizeof(sector));
	ox_put_le64(sector, 0xcafebabe);
	expect("vmdk");
	memset(sector, 0, sizeof(sector));
	ox_put_le32(sector + 64, 0xbeda107f);
	expect("vdi");
	put(0, "vhdxfile");
	expect("vhdx");
	put(0, "conectix");
	expect("vpc");
	put(0, "LUKS\xba\xbe");
	sector[7] = 1;
	expect("luks");
	sector[7] = 2;
	expect("luks");
	put(0, "WithoutFreeSpace");
	expect("parallels");
	put(0, "WithouFreSpacExt");
	expect("parallels");
	put(0, "Bochs Virtual HD Image");
	expect("bochs");
	put(0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop");
	expect("cloop");
}

static void test_descriptor(void **state)
{
	put(0, "# Disk DescriptorFile\nversion=1\n");
	expect("vmdk");
	put(0, "# disk descriptorfile");
	expect("vmdk");
	put(0, "version=1\nCID=fffffffe\n");
	expect("vmdk");
	put(0, "# a comment\n\n  # another\r\n \tversion = 3\r\n");
	expect("vmdk");
	put(0, "# a comment without an end, version=1");
	expect("raw");
	put(0, "CID=1\nversion=1\n");
	expect("raw");
	put(0, "versions=1\n");
	expect("raw");
	/* It ends where the sector ends. */
	memset(sector, ' ', sizeof(sector));
	expect("raw");
	memcpy(sector + 505, "version", 7);
	expect("raw");
	memcpy(sector + 504, "version=", 8);
	expect("vmdk");
	memset(sector, '#', sizeof(sector));
	expect("raw");
}

static void test_ordinary(void **state)
{
	memset(sector, 0, sizeof(sector));
	expect("raw");
	sector[510] = 0x55; /* a boot record */
	sector[511] = 0xaa;
	expect("raw");
	put(0, "#!/bin/sh\necho hello\n");
	expect("raw");
	put(1, "QFI\xfb");
	expect("raw");
}

static void test_short(void **state)
{
	/* Each prefix of a mark is nothing, and nothing behind the end is read. */
	put(0, "vhdxfile");
	for (size_t bytes = 0; bytes < 8; bytes++)
		assert_string_equal(ox_image_guess_format(sector, bytes, NULL), "raw");
	assert_string_equal(ox_image_guess_format(sector, 8, NULL), "vhdx");
	put(0, "QFI\xfb");
	sector[7] = 2;
	assert_string_equal(ox_image_guess_format(sector, 7, NULL), "raw");
}

static void test_name(void **state)
{
	memset(sector, 0, sizeof(sector));
	assert_string_equal(ox_image_guess_format(sector, 512, "a.dmg"), "dmg");
	assert_string_equal(ox_image_guess_format(sector, 512, ".dmg"), "raw");
	assert_string_equal(ox_image_guess_format(sector, 512, "dmg"), "raw");
}

static void test_find(void **state)
{
	assert_ptr_equal(ox_format_find("raw"), &ox_format_raw);
	assert_ptr_equal(ox_format_find("qcow2"), &ox_format_qcow2);
	assert_null(ox_format_find("vhdx"));
	assert_null(ox_format_find(""));
	assert_string_equal(ox_format_names()[0], "raw");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_marks),    cmocka_unit_test(test_descriptor),
	        cmocka_unit_test(test_ordinary), cmocka_unit_test(test_short),
	        cmocka_unit_test(test_name),     cmocka_unit_test(test_find),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
