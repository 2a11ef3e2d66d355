/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Host errors under a guest, by the faulty store's rules: the error policies, and requests that
 * are held: across a ring's stop and start, a kill, and without an inflight region.
 */
#include "vhost_user.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DISK  (16 * MIB)
#define RULES "rules"

/* Replaced by renaming, so that it is never read half. */
static void set_rules(const char *text)
{
	FILE *file = fopen(RULES ".new", "we");

	assert_non_null(file);
	assert_true(fputs(text, file) >= 0);
	assert_int_equal(fclose(file), 0);
	assert_int_equal(rename(RULES ".new", RULES), 0);
}

static void serve(struct daemon *daemon, const char *werror, const char *rerror)
{
	vu_serve(daemon, "-f", "raw", "--werror", werror, "--rerror", rerror,
	         "image=faulty:" RULES ":" VU_IMAGE, NULL);
}

static struct fe *start_front_end(bool packed, bool inflight)
{
	struct fe_options o;

	fe_options_init(&o, VU_SOCK);
	if (packed)
		o.features |= FE_F_PACKED;
	if (!inflight)
		o.protocol_features &= ~FE_P_INFLIGHT_SHMFD;
	return vu_front_end(&o);
}

static void qmp(const char *command, const char *expect)
{
	int fd = qmp_open(VU_CONTROL);
	char *reply;

	assert_true(fd >= 0);
	reply = qmp_run(fd, command);
	assert_non_null(reply);
	if (!strstr(reply, expect))
		fail_msg("%s: %s", command, reply);
	free(reply);
	close(fd);
}

static void test_report(void **state)
{
	struct daemon daemon;
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	set_rules("write range=64k+4k always error=EIO\nread range=128k+4k always error=EIO\n"
	          "flush nth=1 error=EIO\n");
	serve(&daemon, "report", "report");
	fe = start_front_end(false, true);
	assert_int_equal(fe_blk_write(&fe->vq[0], 65536, fe->data_gpa, 4096), VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_read(&fe->vq[0], 131072, fe->data_gpa, 4096), VIRTIO_BLK_S_IOERR);
	assert_int_equal(fe_blk_write(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	assert_int_equal(fe_blk_read(&fe->vq[0], 0, fe->data_gpa, 4096), 0);
	assert_int_equal(fe_blk_flush(&fe->vq[0]), VIRTIO_BLK_S_IOERR);
	fe_free(fe);
	vu_end(&daemon);
}

static void test_ignore(void **state)
{
	struct daemon daemon;
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	set_rules("write range=64k+4k always error=EIO\n");
	serve(&daemon, "ignore", "report");
	fe = start_front_end(false, true);
	assert_int_equal(fe_blk_write(&fe->vq[0], 65536, fe->data_gpa, 4096), 0);
	fe_free(fe);
	vu_end(&daemon);
}

/* A write that finds no space, published and not completed. */
static void hold_one(struct fe *fe, uint8_t *status)
{
	struct fe_vq *vq = &fe->vq[0];

	*status = 0xff;
	assert_true(fe_blk_add(vq, VIRTIO_BLK_T_OUT, 65536 / 512,
	                       &(struct fe_buf){fe->data_gpa, 4096}, 1, status) >= 0);
	fe_vq_submit(vq);
	/* Held once it is said so; the rest goes on. */
	for (unsigned i = 0;; i++) {
		int fd = qmp_open(VU_CONTROL);
		char *reply = qmp_run(fd, "{\"execute\": \"query-block\"}");
		bool held = reply && strstr(reply, "nospace");

		free(reply);
		close(fd);
		if (held)
			break;
		assert_true(i < 400);
		usleep(50000);
	}
	assert_int_equal(fe_vq_pop(vq, NULL, NULL), -EAGAIN);
}

static void start_queue(struct fe *fe)
{
	vu_check(fe, fe_queue_start(fe, 0, fe->vq[0].start_base));
	vu_check(fe, fe_queue_enable(fe, 0, true));
}

static void held(bool packed)
{
	struct daemon daemon;
	uint8_t status, pattern[4096], got[4096];
	struct fe *fe;

	vu_make_image(VU_IMAGE, DISK);
	set_rules("write range=64k+4k always error=ENOSPC\n");
	serve(&daemon, "enospc", "report");
	fe = start_front_end(packed, true);
	fe_pattern(pattern, sizeof(pattern), 99);
	fe_mem_write(fe, fe->data_gpa, pattern, sizeof(pattern));
	hold_one(fe, &status);
	/* The ring stops although a request is held, and starts again with it. */
	for (unsigned i = 0; i < 3; i++) {
		vu_check(fe, fe_queue_stop(fe, 0, &fe->vq[0].start_base));
		assert_int_equal(fe_vq_pop(&fe->vq[0], NULL, NULL), -EAGAIN);
		start_queue(fe);
	}
	/* It survives a kill. */
	daemon_stop(&daemon, SIGKILL);
	serve(&daemon, "enospc", "report");
	vu_check(fe, fe_restart(fe));
	usleep(100000);
	assert_int_equal(fe_vq_pop(&fe->vq[0], NULL, NULL), -EAGAIN);
	/* There is space again, and the operator says so. */
	set_rules("");
	qmp("{\"execute\": \"cont\"}", "\"return\"");
	assert_int_equal(fe_blk_drain(&fe->vq[0], 20000), 1);
	assert_int_equal(status, 0);
	assert_int_equal(fe->vq[0].bogus, 0);
	assert_int_equal(fe_blk_flush(&fe->vq[0]), 0);
	fe_free(fe);
	vu_end(&daemon);
	vu_read_image(VU_IMAGE, 65536, got, sizeof(got));
	assert_memory_equal(got, pattern, sizeof(got));
}

static void test_held(void **state)
{
	held(false);
}

static void test_held_packed(void **state)
{
	held(true);
}

/* No `cont`: it is tried again from time to time. */
static void test_held_retries(void **state)
{
	struct daemon daemon;
	struct fe *fe;
	uint8_t status;

	vu_make_image(VU_IMAGE, DISK);
	set_rules("write range=64k+4k always error=ENOSPC\n");
	serve(&daemon, "enospc", "report");
	fe = start_front_end(false, true);
	hold_one(fe, &status);
	set_rules("");
	assert_int_equal(fe_blk_drain(&fe->vq[0], 60000), 1);
	assert_int_equal(status, 0);
	fe_free(fe);
	vu_end(&daemon);
}

/* Without an inflight region the driver gets an error at the stop: nothing may be lost. */
static void test_held_without_inflight(void **state)
{
	struct daemon daemon;
	struct fe *fe;
	uint8_t status;

	for (unsigned packed = 0; packed < 2; packed++) {
		vu_make_image(VU_IMAGE, DISK);
		set_rules("write range=64k+4k always error=ENOSPC\n");
		serve(&daemon, "enospc", "report");
		fe = start_front_end(packed, false);
		hold_one(fe, &status);
		vu_check(fe, fe_queue_stop(fe, 0, &fe->vq[0].start_base));
		assert_int_equal(fe_blk_drain(&fe->vq[0], 20000), 1);
		assert_int_equal(status, VIRTIO_BLK_S_IOERR);
		set_rules("");
		start_queue(fe);
		assert_int_equal(fe_blk_write(&fe->vq[0], 65536, fe->data_gpa, 4096), 0);
		fe_free(fe);
		vu_end(&daemon);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test_teardown(test_report, vu_kill_strays),
	        cmocka_unit_test_teardown(test_ignore, vu_kill_strays),
	        cmocka_unit_test_teardown(test_held, vu_kill_strays),
	        cmocka_unit_test_teardown(test_held_packed, vu_kill_strays),
	        cmocka_unit_test_teardown(test_held_retries, vu_kill_strays),
	        cmocka_unit_test_teardown(test_held_without_inflight, vu_kill_strays),
	};

	return cmocka_run_group_tests(tests, vu_enter_directory, vu_leave_directory);
}
