/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Guest memory: mapping, tables, translation, the dirty log, and files that shrink.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "virtio/memory.h"
#include "virtio/vring.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define USER 0x10000000000ull

static int file_of(uint64_t size)
{
	int fd = memfd_create("memory", MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	return fd;
}

static struct ox_region *region_at(uint64_t guest, uint64_t size, uint64_t offset, int fd)
{
	struct ox_region *region;
	struct ox_error err = {0};

	if (ox_region_map(guest, size, USER + guest, offset, fd, &region, &err) < 0)
		fail_msg("%s", err.text);
	return region;
}

static struct ox_memory *add(struct ox_memory *memory, struct ox_region *region)
{
	struct ox_memory *next;
	struct ox_error err = {0};

	if (ox_memory_with(memory, region, &next, &err) < 0)
		fail_msg("%s", err.text);
	ox_memory_put(memory);
	return next;
}

static bool is_mapped(const void *p)
{
	unsigned char vec;

	return mincore((void *)ox_align_down((uintptr_t)p, 4096), 1, &vec) == 0;
}

static void test_map_errors(void **state)
{
	static const struct {
		uint64_t guest, size, user, offset;
	} bad[] = {
	        {0, 0, 0, 0},
	        {UINT64_MAX, 4096, 0, 0},
	        {0, 4096, UINT64_MAX - 100, 0},
	        {0, 8193, 0, 0},
	        {0, 4096, 0, 4097},
	        {0, 4096, 0, UINT64_MAX - 100},
	        {0, UINT64_MAX, 0, 0},
	        {0, 4096, 0, INT64_MAX - 4095},
	};

	for (unsigned i = 0; i < OX_ARRAY_SIZE(bad); i++) {
		struct ox_region *region = NULL;
		struct ox_error err = {0};
		int fd = file_of(8192);

		assert_int_equal(ox_region_map(bad[i].guest, bad[i].size, bad[i].user,
		                               bad[i].offset, fd, &region, &err),
		                 -EINVAL);
		assert_true(err.text[0]);
		assert_null(region);
		/* Taken over all the same. */
		assert_int_equal(fcntl(fd, F_GETFD), -1);
	}
	/* A file that may not be written cannot be guest memory. */
	struct ox_region *region;
	struct ox_error err = {0};
	char path[] = "/tmp/oxbow-memory-XXXXXX";
	int fd = mkstemp(path);

	assert_int_equal(ftruncate(fd, 4096), 0);
	close(fd);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	assert_int_equal(ox_region_map(0, 4096, 0, 0, fd, &region, &err), -EACCES);
	unlink(path);
}

static void test_map(void **state)
{
	int fd = file_of(65536), copy = dup(fd);
	struct ox_memory *memory = ox_memory_new();
	struct ox_region *region = region_at(0x1000, 5000, 4096 + 100, fd);
	char byte = 0;

	/* Any offset; our view and the file are the same bytes. */
	assert_int_equal(fcntl(fd, F_GETFD), -1);
	region->host[0] = 'a';
	region->host[4999] = 'z';
	assert_int_equal(pread(copy, &byte, 1, 4196), 1);
	assert_int_equal(byte, 'a');
	assert_int_equal(pread(copy, &byte, 1, 4196 + 4999), 1);
	assert_int_equal(byte, 'z');
	close(copy);
	memory = add(memory, region);
	char *host = region->host;
	assert_true(is_mapped(host));
	ox_memory_put(memory);
	assert_false(is_mapped(host));
}

static void test_table(void **state)
{
	struct ox_memory *memory = ox_memory_new(), *next = NULL;
	struct ox_error err = {0};
	static const uint64_t order[] = {0x5000, 0x1000, 0x9000, 0x3000, 0x7000};
	static const struct {
		uint64_t guest, size;
	} overlap[] = {{0x1000, 1},  {0x0, 0x1001}, {0x2fff, 2},   {0x5fff, 1},
	               {0, 0x10000}, {0x1800, 16},  {0x9fff, 4096}};

	for (unsigned i = 0; i < 5; i++)
		memory = add(memory, region_at(order[i], 0x1000, 0, file_of(0x1000)));
	assert_int_equal(memory->count, 5);
	for (unsigned i = 0; i < 5; i++)
		assert_int_equal(memory->region[i]->guest_addr, 0x1000 + i * 0x2000);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(overlap); i++) {
		ox_error_clear(&err);
		assert_int_equal(ox_memory_with(memory,
		                                region_at(overlap[i].guest, overlap[i].size, 0,
		                                          file_of(0x20000)),
		                                &next, &err),
		                 -EEXIST);
		assert_true(err.text[0]);
		assert_null(next);
	}
	/* Exactly in a gap. */
	memory = add(memory, region_at(0x2000, 0x1000, 0, file_of(0x1000)));
	assert_int_equal(memory->region[1]->guest_addr, 0x2000);

	assert_int_equal(ox_memory_without(memory, 0x2000, 0xfff, USER + 0x2000, &next, NULL),
	                 -ENOENT);
	assert_int_equal(ox_memory_without(memory, 0x2000, 0x1000, USER, &next, NULL), -ENOENT);
	assert_int_equal(ox_memory_without(memory, 0x2001, 0x1000, USER + 0x2000, &next, NULL),
	                 -ENOENT);
	char *gone = memory->region[1]->host, *stays = memory->region[2]->host;
	assert_int_equal(ox_memory_without(memory, 0x2000, 0x1000, USER + 0x2000, &next, &err), 0);
	assert_int_equal(next->count, 5);
	/* A reader of the old table still has it. */
	struct ox_memory *reader = ox_memory_get(memory);
	ox_memory_put(memory);
	assert_true(is_mapped(gone));
	ox_memory_put(reader);
	assert_false(is_mapped(gone));
	assert_true(is_mapped(stays));
	ox_memory_put(next);
	assert_false(is_mapped(stays));
	ox_memory_put(NULL);
}

static void test_many(void **state)
{
	struct ox_memory *memory = ox_memory_new(), *next;
	struct ox_error err = {0};
	const struct ox_region *hint = NULL;
	int fd = file_of(4096);

	for (unsigned i = 0; i < OX_MEMORY_MAX_REGIONS; i++)
		memory = add(memory, region_at(i * 3ull * 4096, 4096, 0, dup(fd)));
	assert_int_equal(
	        ox_memory_with(memory, region_at(1ull << 40, 4096, 0, dup(fd)), &next, &err),
	        -ENOSPC);
	for (unsigned i = 0; i < OX_MEMORY_MAX_REGIONS; i++) {
		uint64_t base = i * 3ull * 4096;

		assert_ptr_equal(ox_memory_find(memory, base, 4096, &hint), memory->region[i]);
		assert_ptr_equal(hint, memory->region[i]);
		assert_null(ox_memory_find(memory, base, 4097, &hint));
		assert_null(ox_memory_find(memory, base + 4096, 1, &hint));
		assert_null(ox_memory_find(memory, base - 1, 1, &hint));
		assert_ptr_equal(ox_memory_find(memory, base + 4095, 1, &hint), memory->region[i]);
	}
	ox_memory_put(memory);
	close(fd);
}

static void test_translate(void **state)
{
	struct ox_memory *memory = ox_memory_new();
	const struct ox_region *hint = NULL;
	uint64_t part = 0, guest = 0;

	assert_null(ox_memory_translate(memory, 0, 1, &part, &hint));
	memory = add(memory, region_at(0x10000, 0x3000, 0, file_of(0x3000)));
	memory = add(memory, region_at(0x13000, 0x2000, 0, file_of(0x2000)));
	memory = add(memory, region_at(0ull - 0x1000, 0x1000, 0, file_of(0x1000)));
	char *low = memory->region[0]->host, *high = memory->region[1]->host;

	assert_ptr_equal(ox_memory_translate(memory, 0x10000, 1, &part, &hint), low);
	assert_int_equal(part, 1);
	/* Over the border: the first part, then the rest elsewhere. */
	assert_ptr_equal(ox_memory_translate(memory, 0x12ff0, 0x40, &part, &hint), low + 0x2ff0);
	assert_int_equal(part, 0x10);
	assert_ptr_equal(ox_memory_translate(memory, 0x13000, 0x30, &part, &hint), high);
	assert_int_equal(part, 0x30);
	assert_ptr_equal(ox_memory_translate(memory, 0x14fff, UINT64_MAX, &part, &hint),
	                 high + 0x1fff);
	assert_int_equal(part, 1);
	assert_null(ox_memory_translate(memory, 0x15000, 1, &part, &hint));
	assert_null(ox_memory_translate(memory, 0xffff, 1, &part, &hint));
	/* The top of the address space. */
	assert_ptr_equal(ox_memory_translate(memory, UINT64_MAX, 2, &part, &hint),
	                 memory->region[2]->host + 0xfff);
	assert_int_equal(part, 1);

	assert_ptr_equal(ox_memory_translate_user(memory, USER + 0x10010, 0x2ff0, &guest),
	                 low + 0x10);
	assert_int_equal(guest, 0x10010);
	assert_null(ox_memory_translate_user(memory, USER + 0x10010, 0x2ff1, &guest));
	assert_null(ox_memory_translate_user(memory, USER + 0x15000, 0, &guest));
	assert_null(ox_memory_translate_user(memory, 0x10000, 1, &guest));
	assert_null(ox_memory_translate_user(memory, USER + 0x10000, UINT64_MAX, NULL));
	assert_ptr_equal(ox_memory_translate_user(memory, USER + 0x13000, 1, NULL), high);
	ox_memory_put(memory);
}

static void test_dirty_log(void **state)
{
	struct ox_dirty_log *log;
	struct ox_error err = {0};
	unsigned seed = 7;
	int fd = file_of(8192);
	uint8_t *expected;

	/* At an offset, as the protocol allows. */
	assert_int_equal(ox_dirty_log_map(fd, 100, 4096 + 8, &log, &err), 0);
	expected = calloc(1, log->size);
	for (unsigned round = 0; round < 20000; round++) {
		uint64_t addr = (uint64_t)rand_r(&seed) % (100 * 8 * 4096ull + 40960);
		uint64_t length = (uint64_t)rand_r(&seed) % (round % 3 ? 3 * 4096 : 200 * 4096);

		if (round % 50 == 0) {
			memset(log->bits, 0, log->size);
			memset(expected, 0, log->size);
		}
		for (uint64_t page = addr >> 12; length && page <= (addr + length - 1) >> 12;
		     page++)
			if (page < 800)
				expected[page / 8] |= (uint8_t)(1 << page % 8);
		ox_dirty_log_mark(log, addr, length);
		assert_memory_equal(log->bits, expected, 100);
	}
	/* All of the address space and beyond. */
	ox_dirty_log_mark(log, UINT64_MAX - 5, 100);
	ox_dirty_log_mark(log, 0, UINT64_MAX);
	for (unsigned i = 0; i < 100; i++)
		assert_int_equal(log->bits[i], 0xff);
	/* Nothing behind the part that was given. */
	assert_int_equal(log->bits[100], 0);
	ox_dirty_log_put(ox_dirty_log_get(log));
	ox_dirty_log_put(log);
	ox_dirty_log_put(NULL);
	assert_int_equal(ox_dirty_log_map(fd, 8192, 8, &log, &err), -EINVAL);
	assert_int_equal(ox_dirty_log_map(-1, 8192, 8, &log, NULL), -EBADF);
	free(expected);
	close(fd);
}

static void test_sigbus(void **state)
{
	struct ox_memory *memory = ox_memory_new();
	int fd = file_of(0x4000), copy = dup(fd);

	ox_memory_install_sigbus();
	memory = add(memory, region_at(0, 0x4000, 0, fd));
	memory = add(memory, region_at(0x10000, 0x1000, 0, file_of(0x1000)));
	volatile char *first = memory->region[0]->host, *second = memory->region[1]->host;

	first[0x100] = 1;
	first[0x3000] = 1;
	second[5] = 7;
	assert_int_equal(ftruncate(copy, 0x1000), 0);
	assert_false(ox_memory_is_broken(memory));
	assert_int_equal(ox_sigbus_broken_count(), 0);
	/* Now the byte is gone: zeroes from here on, all over the region. */
	assert_int_equal(first[0x3000], 0);
	assert_int_equal(first[0x100], 0);
	first[0x2000] = 3;
	assert_int_equal(first[0x2000], 3);
	assert_true(*memory->region[0]->broken);
	assert_false(*memory->region[1]->broken);
	assert_int_equal(second[5], 7);
	assert_true(ox_memory_is_broken(memory));
	assert_int_equal(ox_sigbus_broken_count(), 1);
	ox_memory_put(memory);
	assert_int_equal(ox_sigbus_broken_count(), 0);
	/* The next mapping in its place is whole. */
	memory = add(ox_memory_new(), region_at(0, 0x1000, 0, file_of(0x1000)));
	assert_false(*memory->region[0]->broken);
	assert_false(ox_memory_is_broken(memory));
	ox_memory_put(memory);
	close(copy);
}

static void *touch(void *arg)
{
	volatile char *bytes = arg;
	int sum = 0;

	for (unsigned i = 0; i < 64; i++)
		sum += bytes[i * 4096u];
	return (void *)(intptr_t)sum;
}

static void test_sigbus_threads(void **state)
{
	/* cmocka puts a handler of its own in front of each test. */
	ox_memory_install_sigbus();
	for (unsigned round = 0; round < 50; round++) {
		int fd = file_of(64 * 4096), copy = dup(fd);
		struct ox_memory *memory = add(ox_memory_new(), region_at(0, 64 * 4096, 0, fd));
		pthread_t thread[4];

		assert_int_equal(ftruncate(copy, 0), 0);
		for (unsigned i = 0; i < 4; i++)
			pthread_create(&thread[i], NULL, touch, memory->region[0]->host);
		for (unsigned i = 0; i < 4; i++) {
			void *sum;

			pthread_join(thread[i], &sum);
			assert_null(sum);
		}
		assert_int_equal(ox_sigbus_broken_count(), 1);
		ox_memory_put(memory);
		assert_int_equal(ox_sigbus_broken_count(), 0);
		close(copy);
	}
}

/* A fault that is not ours ends the process by SIGBUS, as without a handler. */
static void test_sigbus_other(void **state)
{
	for (unsigned how = 0; how < 2; how++) {
		int status = 0;
		pid_t pid = fork();

		if (!pid) {
			struct rlimit no_core = {0, 0};
			int fd = memfd_create("other", MFD_CLOEXEC);
			volatile char *page;

			setrlimit(RLIMIT_CORE, &no_core);
			/* A sanitizer has a handler of its own: it does not matter, ours replaces
			 * it. */
			ox_memory_install_sigbus();
			if (how)
				kill(getpid(), SIGBUS);
			page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
			_exit(page[0] ? 1 : 2);
		}
		assert_int_equal(waitpid(pid, &status, 0), pid);
		assert_true(WIFSIGNALED(status));
		assert_int_equal(WTERMSIG(status), SIGBUS);
	}
}

static void test_huge_pages(void **state)
{
	int fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
	struct ox_region *region;
	struct ox_error err = {0};
	int rc;

	if (fd < 0 || ftruncate(fd, 4 << 20) < 0) {
		print_message("# no huge pages: skipped\n");
		if (fd >= 0)
			close(fd);
		skip();
	}
	rc = ox_region_map(0, 1 << 20, 0, 3 << 20, fd, &region, &err);
	if (rc == -ENOMEM) {
		print_message("# no free huge page: skipped\n");
		skip();
	}
	assert_int_equal(rc, 0);
	/* Whole huge pages, or munmap and the SIGBUS handler's mmap would fail. */
	assert_int_equal(region->mapping.base_size % (2 << 20), 0);
	assert_int_equal(region->mapping.host - (char *)region->mapping.base, 1 << 20);
	ox_memory_put(add(ox_memory_new(), region));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_map_errors),   cmocka_unit_test(test_map),
	        cmocka_unit_test(test_table),        cmocka_unit_test(test_many),
	        cmocka_unit_test(test_translate),    cmocka_unit_test(test_dirty_log),
	        cmocka_unit_test(test_sigbus),       cmocka_unit_test(test_sigbus_threads),
	        cmocka_unit_test(test_sigbus_other), cmocka_unit_test(test_huge_pages),
	};

	return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
