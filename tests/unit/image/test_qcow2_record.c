/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The record of map changes, with a double of what applies them: what a killed process leaves, in
 * which order it comes back, and what is refused.
 *
 * The source is included, because damage is done to the file's private form.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "image/qcow2/record.c" /* NOLINT: see above */
#include <signal.h>
#include <sys/wait.h>

#define NOTES_MAX 70000u

static struct {
	unsigned level;
	uint64_t index, entry, bitmap;
} applied[NOTES_MAX];
static unsigned applied_count;
static int apply_result;

int qcow2_apply_co(struct ox_image_channel *channel, unsigned level, uint64_t index, uint64_t entry,
                   uint64_t bitmap)
{
	if (apply_result < 0)
		return apply_result;
	assert_true(applied_count < NOTES_MAX);
	applied[applied_count].level = level;
	applied[applied_count].index = index;
	applied[applied_count].entry = entry;
	applied[applied_count++].bitmap = bitmap;
	return 0;
}

static char dir[] = "/tmp/oxbow-record-XXXXXX";
static char image_path[64];

/* As much of an open image as the record looks at. */
struct world {
	struct ox_store *store;
	struct ox_image image;
	struct qcow2 q;
	struct ox_image_channel channel;
};

static void open_world(struct world *w)
{
	const struct ox_store_options options = {
	        .aio = OX_AIO_SYNC, .lock = OX_LOCK_WRITE, .write_granularity = 1};
	struct ox_error err = {0};

	memset(w, 0, sizeof(*w));
	if (ox_store_open(image_path, &options, &w->store, &err) < 0)
		fail_msg("%s", err.text);
	w->image.store = w->store;
	w->image.priv = &w->q;
	w->channel.image = &w->image;
	w->q.image = &w->image;
	w->q.cluster_bits = 16;
	w->q.cluster_size = 65536;
	w->q.entry_bytes = 8;
	w->q.l1_entries = 16;
	w->q.header.version = 3;
	w->q.header.has_session = true;
	w->q.header.autoclear = QCOW2_AUTOCLEAR_SESSION;
	memcpy(w->q.header.session, "0123456789abcdef", 16);
	pthread_mutex_init(&w->q.lock, NULL);
	applied_count = 0;
	apply_result = 0;
}

static void close_world(struct world *w)
{
	qcow2_record_free(&w->q);
	pthread_mutex_destroy(&w->q.lock);
	ox_store_close(w->store);
}

static bool note(struct world *w, uint64_t index, uint64_t entry)
{
	return qcow2_record_note(&w->q, 2, index, entry, entry * 2);
}

static void path_of(struct world *w, char *path)
{
	assert_int_equal(find_path(&w->q, path, false), 0);
}

/* In a process of its own, which is killed; fn leaves what it likes. */
static void be_killed(void (*fn)(struct world *w))
{
	pid_t pid = fork();
	int status;

	assert_true(pid >= 0);
	if (pid == 0) {
		struct world w;

		open_world(&w);
		if (qcow2_record_begin(&w.q) == 0 && w.q.record && !w.image.eager)
			fn(&w);
		raise(SIGKILL);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static int adopt(struct world *w, struct ox_error *err)
{
	*err = (struct ox_error){0};
	applied_count = 0;
	return qcow2_record_adopt_co(&w->channel, err);
}

static void expect_refusal(struct world *w, const char *sentence)
{
	char path[PATH_BYTES];
	struct ox_error err;

	path_of(w, path);
	assert_true(adopt(w, &err) < 0);
	if (!strstr(err.text, sentence) || !strstr(err.text, path))
		fail_msg("'%s' or '%s' is not in '%s'", sentence, path, err.text);
	assert_int_equal(access(path, F_OK), 0);
}

/* --- tests ------------------------------------------------------------------------------------ */

static void leave_three(struct world *w)
{
	note(w, 1, 100);
	qcow2_record_note(&w->q, 1, 15, 500, 0);
	note(w, 2, 200);
}

static void test_killed(void **state)
{
	struct ox_error err;
	struct world w;
	char path[PATH_BYTES];

	be_killed(leave_three);
	open_world(&w);
	/* As often as one likes, until it is removed. */
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(adopt(&w, &err), 0);
		assert_int_equal(applied_count, 3);
		assert_true(applied[0].level == 2 && applied[0].index == 1 &&
		            applied[0].entry == 100 && applied[0].bitmap == 200);
		assert_true(applied[1].level == 1 && applied[1].index == 15 &&
		            applied[1].entry == 500);
		assert_true(applied[2].level == 2 && applied[2].index == 2);
	}
	path_of(&w, path);
	qcow2_record_end(&w.q);
	assert_int_equal(access(path, F_OK), -1);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 0);
	close_world(&w);
}

static void leave_two_halves(struct world *w)
{
	note(w, 1, 100);
	qcow2_record_seal(&w->q);
	note(w, 1, 101);
}
static void leave_after_commit(struct world *w)
{
	leave_two_halves(w);
	qcow2_record_sealed(&w->q, true);
}
/* The other half is the newer one now. */
static void leave_after_two(struct world *w)
{
	leave_after_commit(w);
	note(w, 2, 201);
	qcow2_record_seal(&w->q);
	note(w, 1, 102);
}
static void leave_committed(struct world *w)
{
	leave_after_commit(w);
	qcow2_record_seal(&w->q);
	qcow2_record_sealed(&w->q, true);
}

static void test_halves(void **state)
{
	struct ox_error err;
	struct world w;

	be_killed(leave_two_halves);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 2);
	assert_true(applied[0].entry == 100 && applied[1].entry == 101);
	close_world(&w);

	be_killed(leave_after_commit);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 1);
	assert_int_equal(applied[0].entry, 101);
	close_world(&w);

	be_killed(leave_after_two);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 3);
	assert_true(applied[0].entry == 101 && applied[1].entry == 201 && applied[2].entry == 102);
	close_world(&w);

	be_killed(leave_committed);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 0);
	/* Nothing to lose, whatever the header says. */
	w.q.header.has_session = false;
	assert_int_equal(adopt(&w, &err), 0);
	close_world(&w);
}

/* Commits that fail: both halves are kept, then nothing more is taken. */
static void leave_failures(struct world *w)
{
	note(w, 1, 100);
	qcow2_record_seal(&w->q);
	qcow2_record_sealed(&w->q, false);
	note(w, 2, 200);
	qcow2_record_seal(&w->q);
	if (note(w, 3, 300) || qcow2_record_has_room(&w->q, 1))
		_exit(1);
	qcow2_record_sealed(&w->q, false);
	if (note(w, 3, 300))
		_exit(1);
}
static void leave_recovery(struct world *w)
{
	leave_failures(w);
	qcow2_record_seal(&w->q);
	qcow2_record_sealed(&w->q, true);
	if (!qcow2_record_has_room(&w->q, HALF_NOTES))
		_exit(1);
	note(w, 3, 300);
	qcow2_record_seal(&w->q);
	note(w, 4, 400);
}

static void test_failed_commits(void **state)
{
	struct ox_error err;
	struct world w;

	be_killed(leave_failures);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 2);
	assert_true(applied[0].entry == 100 && applied[1].entry == 200);
	close_world(&w);

	be_killed(leave_recovery);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 2);
	assert_true(applied[0].entry == 300 && applied[1].entry == 400);
	close_world(&w);
}

static void fill(struct world *w)
{
	for (unsigned i = 0; i < HALF_NOTES; i++) {
		if (!qcow2_record_has_room(&w->q, HALF_NOTES - i) || !note(w, i, i + 1))
			_exit(1);
	}
	if (note(w, 1, 1) || qcow2_record_has_room(&w->q, 1) || !qcow2_record_has_room(&w->q, 0))
		_exit(1);
	qcow2_record_seal(&w->q);
	for (unsigned i = 0; i < HALF_NOTES; i++) {
		if (!note(w, i, i + 2))
			_exit(1);
	}
	if (note(w, 1, 1))
		_exit(1);
}

static void test_full(void **state)
{
	struct ox_error err;
	struct world w;

	be_killed(fill);
	open_world(&w);
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 2 * HALF_NOTES);
	for (unsigned i = 0; i < HALF_NOTES; i++)
		assert_true(applied[i].entry == i + 1 && applied[HALF_NOTES + i].entry == i + 2);
	close_world(&w);
}

static void test_foreign(void **state)
{
	struct ox_error err;
	struct world w;

	be_killed(leave_three);
	open_world(&w);
	w.q.header.session[3] ^= 1;
	expect_refusal(&w, "another program has written");
	w.q.header.session[3] ^= 1;
	w.q.header.autoclear = 0;
	expect_refusal(&w, "another program has written");
	w.q.header.autoclear = QCOW2_AUTOCLEAR_SESSION;
	w.q.header.has_session = false;
	expect_refusal(&w, "another program has written");
	/* Who only reads is warned. */
	w.image.read_only = true;
	w.store->options.lock = OX_LOCK_READ;
	assert_int_equal(adopt(&w, &err), 0);
	w.q.header.has_session = true;
	assert_int_equal(applied_count, 0);
	close_world(&w);
}

static void test_readers(void **state)
{
	struct ox_error err;
	struct world w;
	char path[PATH_BYTES];

	be_killed(leave_three);
	open_world(&w);
	path_of(&w, path);
	/* Opened to be looked at: the process may be alive. */
	w.store->options.lock = OX_LOCK_NONE;
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 0);
	w.image.read_only = true;
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 0);
	/* Nobody writes: what was completed is read. */
	w.store->options.lock = OX_LOCK_READ;
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 3);
	/* A check looks at the file. */
	w.image.options.for_check = true;
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 0);
	assert_int_equal(access(path, F_OK), 0);
	close_world(&w);
}

static struct record_file damaged;

static void save_damaged(const char *path, size_t bytes)
{
	int fd = open(path, O_WRONLY | O_TRUNC | O_CREAT, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, &damaged, bytes), (ssize_t)bytes);
	close(fd);
}

static void load_damaged(const char *path)
{
	int fd = open(path, O_RDONLY);

	assert_true(fd >= 0);
	assert_int_equal(read(fd, &damaged, sizeof(damaged)), (ssize_t)sizeof(damaged));
	close(fd);
}

static void test_damaged(void **state)
{
	static struct record_file good;
	char path[PATH_BYTES];
	struct ox_error err;
	struct world w;

	be_killed(leave_three);
	open_world(&w);
	path_of(&w, path);
	load_damaged(path);
	good = damaged;

	save_damaged(path, 0);
	expect_refusal(&w, "is not one that this version writes");
	save_damaged(path, sizeof(damaged) - 1);
	expect_refusal(&w, "is not one that this version writes");
	damaged.magic[7] = '\0';
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is not one that this version writes");
	damaged = good;
	damaged.version++;
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is not one that this version writes");
	damaged = good;
	damaged.half_notes = 1;
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is not one that this version writes");
	damaged = good;
	damaged.ino++;
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is of another file");
	damaged = good;
	damaged.half[1].count = HALF_NOTES + 1;
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is damaged");
	damaged = good;
	damaged.half[1].count = 1;
	damaged.half[1].sequence = damaged.half[0].sequence;
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is damaged");
	for (unsigned level = 0; level < 16; level++) {
		if (level == 1 || level == 2)
			continue;
		damaged = good;
		damaged.notes[0][1].where = (uint64_t)level << LEVEL_SHIFT;
		save_damaged(path, sizeof(damaged));
		expect_refusal(&w, "is damaged");
	}
	damaged = good;
	damaged.notes[0][1].where = UINT64_C(1) << LEVEL_SHIFT | 16;
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is damaged");
	damaged.notes[0][1].where = UINT64_C(2) << LEVEL_SHIFT | (16 * 8192);
	save_damaged(path, sizeof(damaged));
	expect_refusal(&w, "is damaged");
	damaged.notes[0][1].where = UINT64_C(2) << LEVEL_SHIFT | (16 * 8192 - 1);
	save_damaged(path, sizeof(damaged));
	assert_int_equal(adopt(&w, &err), 0);
	apply_result = -EINVAL;
	expect_refusal(&w, "cannot be taken over");
	apply_result = 0;
	/* Readers are not kept from an image by its record. */
	save_damaged(path, 100);
	w.image.read_only = true;
	w.store->options.lock = OX_LOCK_READ;
	assert_int_equal(adopt(&w, &err), 0);
	w.image.read_only = false;
	w.store->options.lock = OX_LOCK_WRITE;
	/* Not a file at all. */
	unlink(path);
	assert_int_equal(symlink("/dev/zero", path), 0);
	expect_refusal(&w, "cannot be opened");
	unlink(path);
	assert_int_equal(mkfifo(path, 0600), 0);
	expect_refusal(&w, "is not one that this version writes");
	unlink(path);
	close_world(&w);
}

/* The inode of a file that was removed may be another's. */
static void test_another_birth(void **state)
{
	char path[PATH_BYTES];
	struct ox_error err;
	struct world w;

	be_killed(leave_three);
	open_world(&w);
	path_of(&w, path);
	load_damaged(path);
	if (!damaged.birth_ns) {
		print_message("this file system does not say when a file was made\n");
		close_world(&w);
		skip();
	}
	damaged.birth_ns++;
	save_damaged(path, sizeof(damaged));
	w.q.header.has_session = false;
	assert_int_equal(adopt(&w, &err), 0);
	assert_int_equal(applied_count, 0);
	qcow2_record_end(&w.q);
	close_world(&w);
}

static void test_without_record(void **state)
{
	const char *run = getenv("OXBOW_RUN_DIR");
	OX_FREE char *saved = ox_xstrdup(run ? run : "");
	struct ox_error err;
	struct world w;

	/* Version 2 has no autoclear bits. */
	open_world(&w);
	w.q.header.version = 2;
	assert_int_equal(qcow2_record_begin(&w.q), 0);
	assert_true(w.image.eager && !w.q.record);
	assert_true(note(&w, 1, 1) && qcow2_record_has_room(&w.q, UINT32_MAX));
	qcow2_record_seal(&w.q);
	qcow2_record_sealed(&w.q, true);
	qcow2_record_end(&w.q);
	/* The run directory cannot be made. */
	w.q.header.version = 3;
	setenv("OXBOW_RUN_DIR", image_path, 1);
	assert_true(qcow2_record_begin(&w.q) < 0);
	assert_true(w.image.eager && !w.q.record);
	assert_int_equal(adopt(&w, &err), 0);
	setenv("OXBOW_RUN_DIR", saved, 1);
	assert_int_equal(qcow2_record_begin(&w.q), 0);
	assert_true(!w.image.eager && w.q.record);
	qcow2_record_end(&w.q);
	close_world(&w);
}

static int set_up(void **state)
{
	OX_FREE char *run = NULL;
	int fd;

	if (!mkdtemp(dir))
		return -1;
	run = ox_xasprintf("%s/run", dir);
	setenv("OXBOW_RUN_DIR", run, 1);
	snprintf(image_path, sizeof(image_path), "%s/image", dir);
	fd = open(image_path, O_RDWR | O_CREAT, 0600);
	if (fd < 0 || ftruncate(fd, 1 << 20) < 0)
		return -1;
	close(fd);
	return 0;
}

static int tear_down(void **state)
{
	OX_FREE char *command = ox_xasprintf("rm -r %s", dir);

	return system(command);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_killed),         cmocka_unit_test(test_halves),
	        cmocka_unit_test(test_failed_commits), cmocka_unit_test(test_full),
	        cmocka_unit_test(test_foreign),        cmocka_unit_test(test_readers),
	        cmocka_unit_test(test_damaged),        cmocka_unit_test(test_another_birth),
	        cmocka_unit_test(test_without_record),
	};

	return cmocka_run_group_tests(tests, set_up, tear_down);
}
