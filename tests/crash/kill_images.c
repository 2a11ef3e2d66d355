/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Killed processes: what completed is there for the next one, flushed or not.
 *
 * A child writes to an image on a file, with a run directory, from several fibers on two threads,
 * and notes in shared memory what it began and what completed.  It is killed at a random moment:
 * while it opens, works or closes.  Then either the next child takes the image over and goes on,
 * or the test itself opens it, compares, checks, and closes it clean.  Every completed request
 * must be seen; one that had begun may be or not, sector by sector.
 *
 * The child is this program anew: one that forks has no worker threads any more.
 *
 * The control takes the run directory away before the next opening: then completed writes must be
 * missing somewhere, or this test could not tell.
 */
#include "tests/crash/history.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define SECTORS  2049u
#define REQUESTS 4000u /* from one comparison to the next */
#define FIBERS   6u

struct scenario {
	const char *name, *format, *options;
	bool overlay, snapshot, data_file, secret, churn;
	bool forget; /* the run directory is emptied: completed writes may be lost */
};

static const struct scenario scenarios[] = {
        {"qcow2, 4 KiB clusters", "qcow2", "cluster_size=4k"},
        {"qcow2, 64 KiB clusters", "qcow2", "cluster_size=64k"},
        {"qcow2, 512 B clusters", "qcow2", "cluster_size=512"},
        {"qcow2, 4 KiB clusters, much is freed", "qcow2", "cluster_size=4k", .churn = true},
        {"qcow2, version 2", "qcow2", "compat=0.10,cluster_size=4k"},
        {"qcow2, lazy refcounts", "qcow2", "lazy_refcounts=on,cluster_size=4k"},
        {"qcow2, overlay", "qcow2", "extended_l2=off,cluster_size=4k", .overlay = true},
        {"qcow2, subclusters, overlay", "qcow2", "extended_l2=on,cluster_size=64k",
         .overlay = true},
        {"qcow2, snapshot", "qcow2", "cluster_size=4k", .snapshot = true},
        {"qcow2, data file", "qcow2", "cluster_size=4k", .data_file = true},
        {"qcow2, encrypted", "qcow2",
         "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10",
         .secret = true},
        {"qed", "qed", "cluster_size=4k,table_size=2"},
        {"qed, overlay", "qed", "cluster_size=64k", .overlay = true},
        {"control: without the run directory", "qcow2", "cluster_size=4k", .forget = true},
};

/* Shared with the child. */
struct shared {
	uint32_t number_base; /* what earlier rounds used up */
	uint32_t count;       /* atomic: actions begun */
	uint64_t sequence;    /* atomic */
	bool ready;           /* atomic: the child has the image open */
	bool looked;          /* atomic: and `disk` is what it found before its first request */
	bool ended;           /* atomic: closed clean */
	char failure[600];    /* the child could not go on */
	struct action action[REQUESTS];
	uint8_t disk[SECTORS * 512];
};

static struct shared *shared;
static const struct scenario *scenario;
static struct ox_secrets *secrets;
static uint32_t first_id[SECTORS], below_id[SECTORS];
static int shared_fd = -1;
static char dir[64], file[96], base[96], data_file[96];

static __attribute__((format(printf, 1, 2), noreturn)) void bail(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("Bail out! ");
	vprintf(fmt, ap); /* NOLINT: the callers' formats are literals */
	putchar('\n');
	va_end(ap);
	exit(1);
}

static struct ox_image_options image_options(void)
{
	return (struct ox_image_options){
	        .format = scenario->format,
	        .store = {.aio = OX_AIO_THREADS,
	                  .lock = OX_LOCK_WRITE,
	                  .lock_timeout_ns = UINT64_C(10) * 1000 * 1000 * 1000},
	        .allow.anything = true,
	        .secrets = scenario->secret ? secrets : NULL,
	        .key_secret = scenario->secret ? "sec0" : NULL};
}

/* --- the child ------------------------------------------------------------------------------- */

static __attribute__((format(printf, 1, 2), noreturn)) void give_up(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(shared->failure, sizeof(shared->failure), fmt, ap); /* NOLINT */
	va_end(ap);
	_exit(1);
}

static void read_co(struct ox_image_channel *channel, void *arg)
{
	*(int *)arg = ox_image_read_co(channel, 0, shared->disk, sizeof(shared->disk));
}

static void guest_co(struct ox_image_channel *channel, void *arg)
{
	uint64_t seed = *(uint64_t *)arg;
	uint8_t *buf = aligned_alloc(4096, ox_align_up(HISTORY_MOST * 512, 4096));

	for (;;) {
		uint32_t index = __atomic_fetch_add(&shared->count, 1, __ATOMIC_SEQ_CST);
		struct action *action;
		bool writes;
		int ret;

		if (index >= REQUESTS)
			break;
		action = &shared->action[index];
		action->number = shared->number_base + index + 1;
		history_choose(action, SECTORS, scenario->churn, &seed);
		writes = action->op == OX_IO_WRITE;
		if (writes)
			history_stamp(buf, action->first, action->count, action->number);
		__atomic_store_n(&action->began,
		                 __atomic_add_fetch(&shared->sequence, 1, __ATOMIC_SEQ_CST),
		                 __ATOMIC_SEQ_CST);
		ret = kit_request_co(channel, action->op, (uint64_t)action->first * 512,
		                     writes ? buf : NULL, (size_t)action->count * 512, 0,
		                     action->flags);
		if (ret < 0)
			give_up("request %u failed: %s", action->number, strerror(-ret));
		__atomic_store_n(&action->ended,
		                 __atomic_add_fetch(&shared->sequence, 1, __ATOMIC_SEQ_CST),
		                 __ATOMIC_SEQ_CST);
	}
	free(buf);
}

static void run_child(uint64_t seed, unsigned requests)
{
	struct ox_image_options options = image_options();
	struct kit_work work[FIBERS], look = {0, read_co, NULL};
	struct ox_error err = {0};
	uint64_t seeds[FIBERS];
	struct kit kit;
	int ret = 0;

	kit_start(&kit, 2);
	if (kit_open(&kit, file, &options, &err) < 0)
		give_up("%s", err.text);
	__atomic_store_n(&shared->ready, true, __ATOMIC_SEQ_CST);
	look.arg = &ret;
	kit_run(&kit, &look, 1);
	if (ret < 0)
		give_up("reading: %s", strerror(-ret));
	__atomic_store_n(&shared->looked, true, __ATOMIC_SEQ_CST);
	/* The parent compares, takes the history back, and says go on. */
	while (__atomic_load_n(&shared->looked, __ATOMIC_SEQ_CST))
		usleep(200);
	__atomic_store_n(&shared->count, REQUESTS - requests, __ATOMIC_SEQ_CST);
	for (unsigned i = 0; i < FIBERS; i++) {
		seeds[i] = kit_random(&seed, INT64_MAX) + 1;
		work[i] = (struct kit_work){i % 2, guest_co, &seeds[i]};
	}
	kit_run(&kit, work, FIBERS);
	ret = kit_close(&kit, true);
	if (ret < 0)
		give_up("closing: %s", strerror(-ret));
	__atomic_store_n(&shared->ended, true, __ATOMIC_SEQ_CST);
	kit_stop(&kit);
	_exit(0);
}

/* --- the parent ---------------------------------------------------------------------------------
 */

/* Compares, and begins a new history with what was found.  How many sectors are wrong. */
static unsigned compare(const uint8_t *disk, bool say)
{
	struct history history = {shared->action, REQUESTS, first_id, below_id};
	uint32_t *found = ox_xcalloc(SECTORS, sizeof(*found));
	unsigned wrong = 0;

	for (unsigned i = 0; i < REQUESTS; i++) {
		struct action *action = &shared->action[i];

		if (action->began == 0) /* never */
			action->op = OX_IO_FLUSH;
		if (action->ended == 0)
			action->ended = HISTORY_NONE;
		action->clock_began = action->began;
		action->clock_ended = action->ended;
		action->promised = action->ended != HISTORY_NONE && action->op != OX_IO_DISCARD;
	}
	for (unsigned s = 0; s < SECTORS; s++) {
		enum verdict verdict;

		found[s] = history_identify(disk + (size_t)s * 512, s);
		verdict = history_judge(&history, s, found[s], HISTORY_NONE);
		if (verdict != VERDICT_FINE && wrong++ < 3 && say)
			history_explain(&history, s, found[s], HISTORY_NONE, verdict);
	}
	memcpy(first_id, found, sizeof(first_id));
	free(found);
	memset(shared->action, 0, sizeof(shared->action));
	shared->sequence = 0;
	shared->number_base += REQUESTS;
	return wrong;
}

static void check_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_image_check *check = arg;
	struct ox_error err = {0};

	if (ox_image_check_co(channel, check, &err) < 0)
		bail("check: %s", err.text);
}

static void say(void *arg, const char *line)
{
	printf("#   %s\n", line);
}

/* Opens, compares, closes clean, checks; how much is wrong. */
static unsigned look(void)
{
	struct ox_image_options options = image_options();
	struct ox_image_check check = {.say = strcmp(scenario->format, "qed") ? say : NULL};
	struct ox_error err = {0};
	struct kit_work work;
	unsigned wrong = 0;
	struct kit kit;
	int ret = 0;

	kit_start(&kit, 1);
	if (kit_open(&kit, file, &options, &err) < 0) {
		printf("# %s\n", err.text);
		kit_stop(&kit);
		return 1;
	}
	work = (struct kit_work){0, read_co, &ret};
	kit_run(&kit, &work, 1);
	if (ret < 0)
		printf("# reading: %s\n", strerror(-ret));
	else
		wrong = compare(shared->disk, !scenario->forget);
	if (kit_close(&kit, true) < 0 || ret < 0)
		wrong++;
	if (kit_open(&kit, file, &options, &err) < 0) {
		printf("# after a clean close: %s\n", err.text);
		kit_stop(&kit);
		return wrong + 1;
	}
	work = (struct kit_work){0, check_co, &check};
	kit_run(&kit, &work, 1);
	/* qed has nothing to find them by but a check. */
	if (!strcmp(scenario->format, "qed"))
		check.leaks = 0;
	if (check.corruptions || check.leaks || check.check_errors) {
		printf("# the check found %llu corruptions, %llu leaks, %llu errors\n",
		       (unsigned long long)check.corruptions, (unsigned long long)check.leaks,
		       (unsigned long long)check.check_errors);
		wrong++;
	}
	if (kit_close(&kit, true) < 0)
		wrong++;
	kit_stop(&kit);
	return wrong;
}

static void empty_run_dir(void)
{
	OX_FREE char *run = ox_xasprintf("%s/run", dir);

	kit_spawn((const char *const[]){"rm", "-rf", run, NULL}, NULL, 0);
	mkdir(run, 0700);
}

static pid_t start_child(uint64_t seed, unsigned requests)
{
	OX_FREE char *fd = ox_xasprintf("%d", shared_fd);
	OX_FREE char *which = ox_xasprintf("%zu", (size_t)(scenario - scenarios));
	OX_FREE char *seed_text = ox_xasprintf("%llu", (unsigned long long)seed);
	OX_FREE char *count = ox_xasprintf("%u", requests);
	const char *argv[] = {"kill-images", "--child", fd, dir, which, seed_text, count, NULL};
	pid_t pid;

	if (posix_spawn(&pid, "/proc/self/exe", NULL, NULL, (char *const *)argv, environ) != 0)
		bail("/proc/self/exe: %s", strerror(errno));
	return pid;
}

/* One life of a child, killed at some moment; how much is wrong. */
static unsigned live_and_die(uint64_t *seed, bool opens, unsigned long *killed)
{
	/* Sometimes so few that it closes before it is killed. */
	unsigned requests = kit_random(seed, 4) ? REQUESTS : 20 + kit_random(seed, 150);
	uint64_t child_seed = kit_random(seed, INT64_MAX) + 1;
	unsigned delay = (unsigned)kit_random(seed, kit_random(seed, 2) ? 4000 : 40000);
	unsigned wrong = 0;
	pid_t pid;

	shared->ready = shared->looked = shared->ended = false;
	shared->failure[0] = '\0';
	pid = start_child(child_seed, requests);
	if (opens && kit_random(seed, 4) == 0) {
		/* While it opens. */
		usleep(delay / 4);
	} else {
		while (!__atomic_load_n(&shared->looked, __ATOMIC_SEQ_CST) &&
		       waitpid(pid, NULL, WNOHANG) == 0)
			usleep(200);
		if (__atomic_load_n(&shared->looked, __ATOMIC_SEQ_CST)) {
			wrong = compare(shared->disk, !scenario->forget);
			/* Takes up its work. */
			__atomic_store_n(&shared->looked, false, __ATOMIC_SEQ_CST);
			usleep(delay);
		}
	}
	kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	if (shared->failure[0]) {
		printf("# %s\n", shared->failure);
		wrong++;
	}
	*killed += !shared->ended;
	return wrong;
}

static void make_base(void)
{
	int fd = open(base, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	uint8_t sector[512];

	for (unsigned s = 0; s < SECTORS - 200; s++) {
		memset(sector, 0, 512);
		if (s / 48 % 4 != 3) {
			history_stamp(sector, s, 1, HISTORY_BASE);
			below_id[s] = first_id[s] = HISTORY_BASE;
		}
		if (pwrite(fd, sector, 512, (off_t)s * 512) != 512)
			bail("%s: %s", base, strerror(errno));
	}
	close(fd);
}

static void make_image(void)
{
	OX_FREE char *text =
	        ox_xasprintf("%s%s%s", scenario->options, scenario->data_file ? ",data_file=" : "",
	                     scenario->data_file ? data_file : "");
	struct ox_create_option words[8];
	struct ox_image_create_options options = {.path = file,
	                                          .format = scenario->format,
	                                          .size = SECTORS * 512,
	                                          .has_size = true,
	                                          .options = words,
	                                          .secrets = secrets};
	struct ox_error err = {0};
	char *save = NULL;

	for (char *word = strtok_r(text, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
		char *equals = strchr(word, '=');

		*equals = '\0';
		words[options.option_count].name = word;
		words[options.option_count++].value = equals + 1;
	}
	memset(below_id, 0, sizeof(below_id));
	memset(first_id, 0, sizeof(first_id));
	memset(shared, 0, sizeof(*shared));
	if (scenario->overlay) {
		make_base();
		options.backing_file = base;
		options.backing_format = "raw";
	}
	if (ox_image_create(&options, &err) < 0)
		bail("%s", err.text);
	ox_image_create_options_free(&options);
}

static unsigned run_scenario(uint64_t seed, unsigned lives, unsigned long *killed)
{
	unsigned wrong = 0;

	make_image();
	for (unsigned i = 0; i < lives && wrong == 0; i++) {
		wrong = live_and_die(&seed, i > 0, killed);
		if (scenario->forget)
			empty_run_dir();
		if (wrong == 0 && kit_random(&seed, 3) == 0)
			wrong = look();
		if (i == 2 && scenario->snapshot && wrong == 0 &&
		    ((wrong = look()) > 0 ||
		     kit_spawn((const char *const[]){"qemu-img", "snapshot", "-c", "s", file, NULL},
		               NULL, 0) != 0))
			bail("the snapshot could not be taken");
	}
	if (wrong == 0)
		wrong = look();
	if (wrong == 0 && !scenario->secret) {
		char said[500];
		int status = kit_spawn((const char *const[]){"qemu-img", "check", "-f",
		                                             scenario->format, file, NULL},
		                       said, sizeof(said));

		if (status > 0 && (status != 3 || strcmp(scenario->format, "qed"))) {
			printf("# qemu-img check: %s\n", said);
			wrong++;
		}
	}
	unlink(file);
	unlink(base);
	unlink(data_file);
	return wrong;
}

/* The same for parent and child. */
static void set_names(void)
{
	OX_FREE char *run = ox_xasprintf("%s/run", dir);
	OX_FREE char *secret = ox_xasprintf("secret,id=sec0,file=%s/phrase", dir);
	struct ox_error err = {0};

	snprintf(file, sizeof(file), "%s/disk", dir);
	snprintf(base, sizeof(base), "%s/base", dir);
	snprintf(data_file, sizeof(data_file), "%s/data", dir);
	setenv("OXBOW_RUN_DIR", run, 1);
	setenv("OXBOW_LOG", "error", 0);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	secrets = ox_secrets_new();
	if (shared == MAP_FAILED || ox_secrets_add(secrets, secret, &err) < 0)
		bail("%s: %s", dir, err.code ? err.text : strerror(errno));
}

static void make_dir(void)
{
	OX_FREE char *run = NULL, *phrase = NULL;
	int fd;

	if (!kit_make_dir(dir, sizeof(dir), "kill"))
		bail("%s: %s", dir, strerror(errno));
	run = ox_xasprintf("%s/run", dir);
	phrase = ox_xasprintf("%s/phrase", dir);
	fd = open(phrase, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	shared_fd = memfd_create("history", 0); /* for the child too */
	if (fd < 0 || write(fd, "open sesame", 11) != 11 || mkdir(run, 0700) < 0 || shared_fd < 0 ||
	    ftruncate(shared_fd, sizeof(*shared)) < 0)
		bail("%s: %s", dir, strerror(errno));
	close(fd);
}

int main(int argc, char **argv)
{
	unsigned lives = getenv("OXBOW_LONG") ? 400 : 30, failures = 0;
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : ox_clock_ns() | 1;
	const char *only = getenv("OXBOW_ONLY");
	bool have_qemu;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 7 && !strcmp(argv[1], "--child")) {
		shared_fd = atoi(argv[2]);
		snprintf(dir, sizeof(dir), "%s", argv[3]);
		set_names();
		scenario = &scenarios[strtoul(argv[4], NULL, 10)];
		run_child(strtoull(argv[5], NULL, 10), (unsigned)strtoul(argv[6], NULL, 10));
	}
	make_dir();
	set_names();
	have_qemu = kit_spawn((const char *const[]){"qemu-img", "--version", NULL}, NULL, 0) == 0;
	printf("1..%zu\n# seed %#llx (give it as the argument to repeat)\n",
	       OX_ARRAY_SIZE(scenarios), (unsigned long long)seed);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(scenarios); i++) {
		unsigned long killed = 0;
		unsigned wrong;

		scenario = &scenarios[i];
		if ((scenario->snapshot && !have_qemu) || (only && !strstr(scenario->name, only))) {
			printf("ok %u - kill, %s # SKIP %s\n", i + 1, scenario->name,
			       only ? "OXBOW_ONLY" : "qemu-img is not installed");
			continue;
		}
		wrong = run_scenario(seed + i * 7919, lives, &killed);
		failures += (wrong > 0) != scenario->forget;
		printf("%sok %u - kill, %s\n# killed %lu times, %u wrong\n",
		       (wrong > 0) != scenario->forget ? "not " : "", i + 1, scenario->name, killed,
		       wrong);
	}
	kit_spawn((const char *const[]){"rm", "-rf", dir, NULL}, NULL, 0);
	ox_secrets_free(secrets);
	return failures > 0;
}
