/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What an idle disk costs: no CPU time, no wake-ups, and little memory.
 *
 * Nothing here depends on how fast the machine is: a daemon that sleeps is not scheduled, so its
 * context switches do not move, however long one looks.
 */
#include "vhost_user.h"

#include <linux/virtio_blk.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DISKS 20
#define DISK  (16 * MIB)

/* After a second without I/O the daemon does not run, over the next two. */
static void expect_silence(struct daemon *daemon)
{
	struct daemon_usage before, after;

	usleep(1000000);
	assert_true(daemon_usage(daemon->pid, &before));
	usleep(2000000);
	assert_true(daemon_usage(daemon->pid, &after));
	assert_int_equal(after.voluntary_switches, before.voluntary_switches);
	assert_true(after.user_ticks + after.system_ticks <=
	            before.user_ticks + before.system_ticks + 1);
}

static void some_io(struct fe *fe)
{
	for (unsigned q = 0; q < fe->options.queues; q++)
		for (unsigned i = 0; i < 200; i++)
			assert_int_equal(fe_blk_read(&fe->vq[q], i * 4096, fe->data_gpa, 4096), 0);
}

static void quiet(const char *aio)
{
	struct daemon daemon;
	struct fe_options o;
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	vu_serve(&daemon, "-f", "raw", "--aio", aio, "--iothreads", "2", NULL);
	/* Before any client, with one, after its I/O, and when it has gone. */
	expect_silence(&daemon);
	fe_options_init(&o, VU_SOCK);
	o.queues = 4;
	fe = vu_front_end(&o);
	expect_silence(&daemon);
	some_io(fe);
	assert_int_equal(fe_blk_write(&fe->vq[0], 0, fe->data_gpa, 65536), 0);
	expect_silence(&daemon);
	fe_free(fe);
	expect_silence(&daemon);
	vu_end(&daemon);
}

static void test_quiet_io_uring(void **state)
{
	quiet("io_uring");
}

static void test_quiet_native(void **state)
{
	quiet("native");
}

static void test_quiet_threads(void **state)
{
	quiet("threads");
}

static void test_memory(void **state)
{
	struct daemon_usage usage;
	struct daemon daemon;
	struct fe *fe[DISKS];
	char socket[DISKS][32];
	FILE *file = fopen("many.ini", "we");
	uint64_t per_disk;

	assert_non_null(file);
	for (unsigned i = 0; i < DISKS; i++) {
		char image[32];

		snprintf(image, sizeof(image), "idle%u.raw", i);
		snprintf(socket[i], sizeof(socket[i]), "idle%u.sock", i);
		vu_make_image(image, DISK);
		fprintf(file, "[disk%u]\nimage = %s\nformat = raw\nvhost-user-blk = %s\n", i, image,
		        socket[i]);
	}
	assert_int_equal(fclose(file), 0);
	vu_serve(&daemon, "--config", "many.ini", "image=", NULL);
	for (unsigned i = 0; i < DISKS; i++) {
		struct fe_options o;

		fe_options_init(&o, socket[i]);
		o.queues = 2;
		fe[i] = vu_front_end(&o);
		some_io(fe[i]);
	}
	expect_silence(&daemon);
	assert_true(daemon_usage(daemon.pid, &usage));
	per_disk = usage.resident_bytes / DISKS;
	print_message("# %llu KiB resident for each of %d disks\n",
	              (unsigned long long)per_disk / 1024, DISKS);
	assert_true(per_disk <= 4 * MIB);
	for (unsigned i = 0; i < DISKS; i++)
		fe_free(fe[i]);
	vu_end(&daemon);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test_teardown(test_quiet_io_uring, vu_kill_strays),
	        cmocka_unit_test_teardown(test_quiet_native, vu_kill_strays),
	        cmocka_unit_test_teardown(test_quiet_threads, vu_kill_strays),
	        cmocka_unit_test_teardown(test_memory, vu_kill_strays),
	};

	return cmocka_run_group_tests(tests, vu_enter_directory, vu_leave_directory);
}
