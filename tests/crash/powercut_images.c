/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Power cuts on growing images: qcow2 and qed.
 *
 * An image runs over the faulty store, which writes down every write, flush and truncation with
 * its data and order, and delays them so that many overlap.  The workload: random writes into
 * fresh space, over a backing image, over shared clusters and in place, zeroes, discards and
 * flushes, from several fibers on two threads, and then a clean close; each sector carries the
 * number of the request that wrote it.  For cuts after random events of the record, states are
 * built that the file may be in: what a completed flush or a durable write covers is there, of the
 * rest any subset of sectors, and a file's end that was moved may be there or not.  In each state
 *
 *   - the image opens, and every sector holds what the guest may see (as in powercut.c: never
 *     older than what was promised, never what was not written to this sector before the cut);
 *   - the check finds no corruption; leaks only while the header says that a session was open;
 *   - opened for writing it shows the same, takes a write, and after a clean close the check finds
 *     nothing at all.
 *
 * A replayed state is in a memory store, so no record of a killed process (which would hide what
 * the disk lost) is there for it.  The workload runs both with such a record (on a file) and
 * without (on memory).
 *
 * Two controls must fail: a promise that is too strong, and a disk that ignores flushes.
 */
#include "tests/crash/history.h"
#include "base/byteorder.h"
#include "image/format.h"
#include "store/faulty.h"
#include "store/memory.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define SECTORS  1537u /* of the disk: not whole clusters */
#define REQUESTS 360u
#define CHURN    1200u /* requests when much is freed */
#define FIBERS   8u

struct scenario {
	const char *name, *format, *options;
	bool overlay, snapshot, memory;
	bool churn;      /* much is freed and used again */
	bool too_strong; /* a completed write is taken for promised */
	bool no_flush;   /* the disk ignores flushes */
};

static const struct scenario scenarios[] = {
        {"qcow2, 4 KiB clusters", "qcow2", "cluster_size=4k"},
        {"qcow2, 4 KiB clusters, no record", "qcow2", "cluster_size=4k", .memory = true},
        {"qcow2, 4 KiB clusters, much is freed", "qcow2", "cluster_size=4k", .churn = true},
        {"qcow2, overlay, much is freed", "qcow2", "extended_l2=off,cluster_size=4k",
         .overlay = true, .churn = true},
        {"qcow2, 64 KiB clusters", "qcow2", "cluster_size=64k"},
        {"qcow2, 512 B clusters", "qcow2", "cluster_size=512"},
        {"qcow2, version 2", "qcow2", "compat=0.10,cluster_size=4k"},
        {"qcow2, lazy refcounts", "qcow2", "lazy_refcounts=on,cluster_size=4k"},
        {"qcow2, overlay", "qcow2", "extended_l2=off,cluster_size=4k", .overlay = true},
        {"qcow2, overlay, no record", "qcow2", "extended_l2=off,cluster_size=64k", .overlay = true,
         .memory = true},
        {"qcow2, subclusters, overlay", "qcow2", "extended_l2=on,cluster_size=64k",
         .overlay = true},
        {"qcow2, subclusters of 512 B, overlay", "qcow2", "extended_l2=on,cluster_size=16k",
         .overlay = true, .memory = true},
        {"qcow2, snapshot", "qcow2", "cluster_size=4k", .snapshot = true},
        {"qcow2, snapshot, subclusters, overlay", "qcow2", "extended_l2=on,cluster_size=64k",
         .overlay = true, .snapshot = true},
        {"qed", "qed", "cluster_size=4k,table_size=2", .memory = true},
        {"qed, overlay", "qed", "cluster_size=64k", .overlay = true},
        {"control: a completed write is not durable", "qcow2", "cluster_size=4k",
         .too_strong = true},
        {"control: a disk that ignores flushes", "qcow2", "cluster_size=4k", .overlay = true,
         .no_flush = true},
};

struct tally {
	unsigned long states, lost, stale, corrupt, failed;
};

static struct cut {
	const struct scenario *scenario;
	struct kit kit;
	struct ox_store *store; /* the faulty one */
	char file[96], base[96];
	uint8_t *initial; /* the file before the workload */
	uint64_t initial_bytes;
	uint32_t first_id[SECTORS], below_id[SECTORS];
	uint64_t sequence; /* atomic */
	uint32_t count;    /* atomic: actions begun */
	uint64_t seed;
	struct action action[CHURN];
	unsigned requests;
	struct ox_faulty_log log;
	uint8_t *state; /* a file as the cut left it */
	uint64_t state_bytes, state_room;
} cut;

static char dir[64];

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

static const char *in_dir(const char *name)
{
	static char path[2][96];
	static unsigned turn;

	turn ^= 1;
	snprintf(path[turn], sizeof(path[turn]), "%s/%s", dir, name);
	return path[turn];
}

static struct ox_image_options image_options(bool write)
{
	return (struct ox_image_options){.format = cut.scenario->format,
	                                 .store = {.aio = OX_AIO_THREADS,
	                                           .read_only = !write,
	                                           .lock = write ? OX_LOCK_WRITE : OX_LOCK_NONE},
	                                 .allow.anything = true};
}

static void open_kit(const char *path, bool write)
{
	struct ox_image_options options = image_options(write);
	struct ox_error err = {0};

	if (kit_open(&cut.kit, path, &options, &err) < 0)
		bail("%s", err.text);
}

static void close_kit(bool finish)
{
	int ret = kit_close(&cut.kit, finish);

	if (ret < 0)
		bail("closing: %s", strerror(-ret));
}

static void on_thread(unsigned thread, void (*fn_co)(struct ox_image_channel *, void *), void *arg)
{
	struct kit_work work = {thread, fn_co, arg};

	kit_run(&cut.kit, &work, 1);
}

/* --- the workload ----------------------------------------------------------------------------- */

static void guest_co(struct ox_image_channel *channel, void *arg)
{
	uint64_t seed = *(uint64_t *)arg;
	uint8_t *buf = aligned_alloc(4096, ox_align_up(HISTORY_MOST * 512, 4096));

	for (;;) {
		uint32_t index = __atomic_fetch_add(&cut.count, 1, __ATOMIC_SEQ_CST);
		struct action *action;
		bool writes;
		int ret;

		if (index >= cut.requests)
			break;
		action = &cut.action[index];
		action->number = index + 1;
		history_choose(action, SECTORS, cut.scenario->churn, &seed);
		writes = action->op == OX_IO_WRITE;
		if (writes)
			history_stamp(buf, action->first, action->count, action->number);
		action->clock_began = ox_faulty_clock(cut.store);
		action->began = __atomic_add_fetch(&cut.sequence, 1, __ATOMIC_SEQ_CST);
		ret = kit_request_co(channel, action->op, (uint64_t)action->first * 512,
		                     writes ? buf : NULL, (size_t)action->count * 512, 0,
		                     action->flags);
		action->ended = __atomic_add_fetch(&cut.sequence, 1, __ATOMIC_SEQ_CST);
		action->clock_ended = ox_faulty_clock(cut.store);
		if (ret < 0)
			bail("request %u failed: %s", action->number, strerror(-ret));
	}
	free(buf);
}

static void finish_co(struct ox_image_channel *channel, void *arg)
{
	*(int *)arg = ox_image_finish_co(channel);
}

/* Parts of the file with speeds of their own: requests overtake each other. */
static void slow_down(struct ox_store *store, uint64_t *seed)
{
	struct ox_fault_rule rule = {
	        .op = OX_IO_FLUSH, .kind = OX_FAULT_DELAY, .always = true, .delay_ns = 400000};

	ox_faulty_add_rule(store, &rule);
	for (unsigned i = 0; i < 40; i++) {
		rule.op = OX_IO_WRITE;
		rule.offset = kit_random(seed, 2048) * 1024;
		rule.length = 4096 + kit_random(seed, 16) * 4096;
		rule.delay_ns = 100000 + kit_random(seed, 20) * 100000;
		ox_faulty_add_rule(store, &rule);
	}
}

static void run_workload(void)
{
	OX_FREE char *path =
	        ox_xasprintf("faulty::%s", cut.scenario->memory ? "memory:cut:0" : cut.file);
	struct kit_work work[FIBERS];
	uint64_t seeds[FIBERS];
	int ret = 0;

	open_kit(path, true);
	cut.store = cut.kit.image->store;
	slow_down(cut.store, &cut.seed);
	ox_faulty_record(cut.store, true);
	cut.count = 0;
	cut.requests = cut.scenario->churn ? CHURN : REQUESTS;
	cut.sequence = 0;
	memset(cut.action, 0, sizeof(cut.action));
	for (unsigned i = 0; i < FIBERS; i++) {
		seeds[i] = kit_random(&cut.seed, INT64_MAX) + 1;
		work[i] = (struct kit_work){i % cut.kit.threads, guest_co, &seeds[i]};
	}
	kit_run(&cut.kit, work, FIBERS);
	on_thread(0, finish_co, &ret);
	if (ret < 0)
		bail("finish: %s", strerror(-ret));
	ox_faulty_record(cut.store, false);
	ox_faulty_take_log(cut.store, &cut.log);
	close_kit(false);
}

/* --- the image before it -------------------------------------------------------------------------
 */

struct load {
	struct ox_loop *loop;
	struct ox_store *store;
	const uint8_t *bytes;
	uint64_t count;
};

static void load_co(struct ox_image_channel *none, void *arg)
{
	struct load *load = arg;
	struct ox_channel *channel;
	struct ox_error err = {0};

	if (ox_store_attach(load->store, load->loop, &channel, &err) < 0 ||
	    ox_store_write_co(channel, 0, load->bytes, load->count, 0) < 0)
		bail("a memory store cannot be filled");
	ox_store_detach(channel);
}

/* memory:NAME:COUNT holds these bytes. */
static void load_memory(struct kit *kit, const char *name, const uint8_t *bytes, uint64_t count)
{
	OX_FREE char *path = ox_xasprintf("memory:%s:%llu", name, (unsigned long long)count);
	struct ox_store_options options = {.lock = OX_LOCK_NONE};
	struct load load = {
	        .loop = ox_iothread_loop(kit->thread[0]), .bytes = bytes, .count = count};
	struct kit_work work = {0, load_co, &load};
	struct ox_error err = {0};

	ox_memory_forget(name);
	if (ox_store_open(path, &options, &load.store, &err) < 0)
		bail("%s", err.text);
	kit_run(kit, &work, 1);
	ox_store_close(load.store);
}

static void fill_co(struct ox_image_channel *channel, void *arg)
{
	uint8_t *buf = aligned_alloc(4096, 64 * 512);

	for (unsigned s = 0; s < SECTORS; s += 64) {
		unsigned count = ox_min(64u, SECTORS - s);

		if (s / 64 % 3 != 0)
			continue;
		history_stamp(buf, s, count, HISTORY_FIRST);
		for (unsigned i = s; i < s + count; i++)
			cut.first_id[i] = HISTORY_FIRST;
		if (ox_image_write_co(channel, (uint64_t)s * 512, buf, (size_t)count * 512, 0) < 0)
			bail("the first write failed");
	}
	free(buf);
}

static void make_base(void)
{
	unsigned end = SECTORS - 200;
	int fd = open(cut.base, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	uint8_t sector[512];

	for (unsigned s = 0; s < end; s++) {
		memset(sector, 0, 512);
		if (s / 48 % 4 != 3) {
			history_stamp(sector, s, 1, HISTORY_BASE);
			cut.below_id[s] = HISTORY_BASE;
		}
		if (pwrite(fd, sector, 512, (off_t)s * 512) != 512)
			bail("%s: %s", cut.base, strerror(errno));
	}
	close(fd);
}

static void read_initial(void)
{
	int fd = open(cut.file, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		bail("%s: %s", cut.file, strerror(errno));
	free(cut.initial);
	cut.initial_bytes = (uint64_t)st.st_size;
	cut.initial = ox_xcalloc(1, cut.initial_bytes);
	if (pread(fd, cut.initial, cut.initial_bytes, 0) != (ssize_t)cut.initial_bytes)
		bail("%s: %s", cut.file, strerror(errno));
	close(fd);
}

static void make_image(void)
{
	const struct scenario *scenario = cut.scenario;
	OX_FREE char *text = ox_xstrdup(scenario->options);
	struct ox_create_option words[8];
	struct ox_image_create_options options = {.path = cut.file,
	                                          .format = scenario->format,
	                                          .size = SECTORS * 512,
	                                          .has_size = true,
	                                          .options = words};
	struct ox_error err = {0};
	char *save = NULL;

	for (char *word = strtok_r(text, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
		char *equals = strchr(word, '=');

		*equals = '\0';
		words[options.option_count].name = word;
		words[options.option_count++].value = equals + 1;
	}
	memset(cut.below_id, 0, sizeof(cut.below_id));
	if (scenario->overlay) {
		make_base();
		options.backing_file = cut.base;
		options.backing_format = "raw";
	}
	memcpy(cut.first_id, cut.below_id, sizeof(cut.first_id));
	if (ox_image_create(&options, &err) < 0)
		bail("%s", err.text);
	ox_image_create_options_free(&options);
	open_kit(cut.file, true);
	on_thread(0, fill_co, NULL);
	close_kit(true);
	if (scenario->snapshot &&
	    kit_spawn((const char *const[]){"qemu-img", "snapshot", "-c", "s", cut.file, NULL},
	              NULL, 0) != 0)
		bail("qemu-img snapshot failed");
	read_initial();
	if (scenario->memory)
		load_memory(&cut.kit, "cut", cut.initial, cut.initial_bytes);
}

/* --- the states of the file
 * ------------------------------------------------------------------------ */

static bool is_durable(const struct ox_faulty_log *log, const struct ox_faulty_record *record,
                       uint64_t at)
{
	if (!record->completed || record->completed > at || record->result)
		return false;
	if (record->flags & OX_IO_DSYNC)
		return true;
	for (size_t i = 0; i < log->count && !cut.scenario->no_flush; i++) {
		const struct ox_faulty_record *flush = &log->records[i];

		if (flush->op == OX_IO_FLUSH && !flush->truncate && !flush->result &&
		    flush->completed && flush->completed <= at &&
		    record->completed < flush->submitted)
			return true;
	}
	return false;
}

static void set_state_size(uint64_t bytes)
{
	if (bytes > cut.state_room) {
		cut.state_room = bytes * 2;
		cut.state = realloc(cut.state, cut.state_room);
		if (!cut.state)
			bail("no memory");
	}
	if (bytes > cut.state_bytes)
		memset(cut.state + cut.state_bytes, 0, bytes - cut.state_bytes);
	cut.state_bytes = bytes;
}

enum pick { PICK_NONE, PICK_ALL, PICK_RANDOM, PICK_RECORDS, PICK_FEW, PICKS };

/* Bytes that are taken beyond the file's end move it; or else (`strict`) they are lost with it. */
static void apply(const struct ox_faulty_record *record, uint64_t at, uint64_t bytes, bool strict,
                  bool durable)
{
	uint64_t offset = record->offset + at;

	if (offset + bytes > cut.state_bytes) {
		if (strict && !durable)
			return;
		if (record->op != OX_IO_WRITE)
			bytes = offset < cut.state_bytes ? cut.state_bytes - offset : 0;
		else
			set_state_size(offset + bytes);
	}
	if (record->op == OX_IO_WRITE)
		memcpy(cut.state + offset, record->data + at, bytes);
	else
		memset(cut.state + offset, 0, bytes);
}

static void build_state(uint64_t at, enum pick pick, uint64_t *seed)
{
	bool strict = kit_random(seed, 2);

	cut.state_bytes = 0;
	set_state_size(cut.initial_bytes);
	memcpy(cut.state, cut.initial, cut.initial_bytes);
	for (size_t i = 0; i < cut.log.count; i++) {
		const struct ox_faulty_record *record = &cut.log.records[i];
		bool durable, all;

		if ((record->op == OX_IO_FLUSH && !record->truncate) || record->submitted > at)
			continue;
		durable = is_durable(&cut.log, record, at);
		all = durable || pick == PICK_ALL ||
		      (pick == PICK_RECORDS && kit_random(seed, 2)) ||
		      (pick == PICK_FEW && kit_random(seed, 12) == 0);
		if (record->truncate) {
			if (all || (pick == PICK_RANDOM && kit_random(seed, 2)))
				set_state_size(record->length);
			continue;
		}
		for (uint64_t part = 0; part < record->length;) {
			uint64_t bytes =
			        ox_min(record->length - part, 512 - (record->offset + part) % 512);

			if (all || (pick == PICK_RANDOM && kit_random(seed, 2)))
				apply(record, part, bytes, strict, durable);
			part += bytes;
		}
	}
}

/* --- what the guest may see
 * ------------------------------------------------------------------------ */

/* Which requests must not be lost when power fails at `at`. */
static void set_promises(uint64_t at)
{
	uint64_t flushed = 0; /* what ended before this began is covered by a flush */

	for (unsigned i = 0; i < cut.requests; i++) {
		const struct action *action = &cut.action[i];

		if (action->op == OX_IO_FLUSH && action->clock_ended <= at)
			flushed = ox_max(flushed, action->began);
	}
	for (unsigned i = 0; i < cut.requests; i++) {
		struct action *action = &cut.action[i];

		action->promised = action->clock_ended <= at && action->op != OX_IO_DISCARD &&
		                   action->op != OX_IO_FLUSH &&
		                   ((action->flags & OX_IO_DSYNC) || cut.scenario->too_strong ||
		                    action->ended < flushed);
	}
}

static void judge(uint64_t at, const uint8_t *disk, struct tally *tally)
{
	struct history history = {cut.action, cut.requests, cut.first_id, cut.below_id};
	bool quiet = cut.scenario->too_strong || cut.scenario->no_flush;

	for (unsigned sector = 0; sector < SECTORS; sector++) {
		uint32_t id = history_identify(disk + (size_t)sector * 512, sector);
		enum verdict verdict = history_judge(&history, sector, id, at);

		if (verdict == VERDICT_FINE)
			continue;
		if (!quiet && tally->lost + tally->stale < 4)
			history_explain(&history, sector, id, at, verdict);
		if (verdict == VERDICT_LOST)
			tally->lost++;
		else
			tally->stale++;
	}
}

/* --- opening a state
 * ---------------------------------------------------------------------------------- */

struct look {
	uint8_t *disk;
	struct ox_image_check check;
	bool write;
	int read_result, check_result, write_result;
};

static void look_co(struct ox_image_channel *channel, void *arg)
{
	struct look *look = arg;
	struct ox_error err = {0};
	uint8_t sector[512];

	look->read_result = ox_image_read_co(channel, 0, look->disk, SECTORS * 512);
	if (look->write) {
		history_stamp(sector, 700, 1, 1);
		look->write_result = ox_image_write_co(channel, 700 * 512, sector, 512, 0);
		if (look->write_result == 0)
			look->write_result = ox_image_finish_co(channel);
	}
	look->check_result = ox_image_check_co(channel, &look->check, &err);
	if (look->check_result < 0)
		printf("# check: %s\n", err.text);
}

/* Its findings, to be printed if they are bad. */
struct findings {
	unsigned count;
	char line[6][120];
};

static void say(void *arg, const char *line)
{
	struct findings *findings = arg;

	if (findings->count < OX_ARRAY_SIZE(findings->line))
		snprintf(findings->line[findings->count++], sizeof(findings->line[0]), "%s", line);
}

/* What the header says of how it was left. */
static bool is_marked(bool *dirty)
{
	const uint8_t *head = cut.state;
	uint32_t version = ox_get_be32(head + 4);

	if (!strcmp(cut.scenario->format, "qed")) {
		*dirty = ox_get_le64(head + 16) & 2;
		return *dirty;
	}
	*dirty = version >= 3 && (ox_get_be64(head + 72) & 1);
	/* Version 2 has no place for a mark: leaks may stay there. */
	return version < 3 || *dirty ||
	       memmem(head, ox_min(cut.state_bytes, UINT64_C(4096)), "\x4f\x78\x62\x77", 4);
}

static bool open_state(struct kit *kit, bool write, struct tally *tally)
{
	OX_FREE char *path = ox_xasprintf("memory:state:%llu", (unsigned long long)cut.state_bytes);
	struct ox_image_options options = image_options(write);
	struct ox_error err = {0};

	if (kit_open(kit, path, &options, &err) == 0)
		return true;
	if (!cut.scenario->no_flush)
		printf("# %s\n", err.text);
	tally->failed++;
	return false;
}

static void look_at_state(struct kit *kit, uint64_t at, struct look *look, struct tally *tally)
{
	struct kit_work work = {0, look_co, look};
	bool dirty = false, marked = is_marked(&dirty), quiet = cut.scenario->no_flush;
	struct findings findings = {0};

	memset(look->disk, 0xee, SECTORS * 512);
	look->read_result = look->write_result = look->check_result = 0;
	look->check = (struct ox_image_check){.say = say, .arg = &findings};
	if (!open_state(kit, look->write, tally))
		return;
	kit_run(kit, &work, 1);
	if (kit_close(kit, false) < 0 || look->read_result < 0 || look->write_result < 0 ||
	    look->check_result < 0) {
		if (!quiet)
			printf("# cut %llu: read %d, write %d, check %d\n", (unsigned long long)at,
			       look->read_result, look->write_result, look->check_result);
		tally->failed++;
		return;
	}
	judge(at, look->disk, tally);
	if (!strcmp(cut.scenario->format, "qed"))
		look->check.leaks = 0; /* it has nothing to find them by but a check */
	if (look->check.check_errors || (look->check.corruptions && (look->write || !dirty)) ||
	    (look->check.leaks && (look->write || !marked))) {
		if (!quiet)
			printf("# cut %llu%s: %llu corruptions, %llu leaks%s\n",
			       (unsigned long long)at, look->write ? ", after a write" : "",
			       (unsigned long long)look->check.corruptions,
			       (unsigned long long)look->check.leaks,
			       marked ? "" : " without a mark");
		for (unsigned i = 0; i < findings.count && !quiet; i++)
			printf("#   %s\n", findings.line[i]);
		tally->corrupt++;
	}
}

/* QEMU's opinion of a state: exit status 3 is leaks. */
static void ask_qemu(uint64_t at, struct tally *tally)
{
	int fd = open(in_dir("state"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	char said[500] = "";
	bool dirty = false;
	int status;

	(void)is_marked(&dirty);
	if (fd < 0 || pwrite(fd, cut.state, cut.state_bytes, 0) != (ssize_t)cut.state_bytes)
		bail("%s: %s", dir, strerror(errno));
	close(fd);
	status = kit_spawn((const char *const[]){"qemu-img", "check", "-f", cut.scenario->format,
	                                         in_dir("state"), NULL},
	                   said, sizeof(said));
	if (status != 0 && status != 3 && !dirty) {
		if (!cut.scenario->no_flush)
			printf("# cut %llu: qemu-img check: %d %.300s\n", (unsigned long long)at,
			       status, said);
		tally->corrupt++;
	}
}

static void check_cuts(unsigned states, bool have_qemu, struct tally *tally)
{
	struct look look = {.disk = aligned_alloc(4096, ox_align_up(SECTORS * 512, 4096))};
	uint64_t last = 1;
	struct kit kit;

	for (size_t i = 0; i < cut.log.count; i++) {
		last = ox_max(last, cut.log.records[i].submitted);
		last = ox_max(last, cut.log.records[i].completed);
	}
	kit_start(&kit, 1);
	for (unsigned n = 0; n < states; n++) {
		/* The end is the clean close: looked at more closely. */
		uint64_t end = kit_random(&cut.seed, 6) ? last : ox_min(last, UINT64_C(80));
		uint64_t at = n == 0 ? last : last - kit_random(&cut.seed, end);

		set_promises(at);
		build_state(at, n == 0 ? PICK_ALL : (enum pick)(n % PICKS), &cut.seed);
		for (unsigned write = 0; write < 1 + (n % 3 == 0); write++) {
			load_memory(&kit, "state", cut.state, cut.state_bytes);
			look.write = write;
			look_at_state(&kit, at, &look, tally);
			ox_memory_forget("state");
		}
		if (have_qemu && n % 64 == 5)
			ask_qemu(at, tally);
		tally->states++;
		if (tally->lost + tally->stale + tally->corrupt + tally->failed > 20)
			break;
	}
	kit_stop(&kit);
	free(look.disk);
}

static void run_scenario(const struct scenario *scenario, uint64_t seed, unsigned states,
                         bool have_qemu, struct tally *tally)
{
	cut.scenario = scenario;
	cut.seed = seed;
	kit_start(&cut.kit, 2);
	make_image();
	run_workload();
	kit_stop(&cut.kit);
	check_cuts(states, have_qemu, tally);
	ox_faulty_free_log(&cut.log);
	ox_memory_forget("cut");
	unlink(cut.file);
	unlink(cut.base);
	unlink(in_dir("state"));
}

int main(int argc, char **argv)
{
	bool is_long = getenv("OXBOW_LONG") != NULL, have_qemu;
	unsigned rounds = is_long ? 12 : 2, states = is_long ? 1500 : 200;
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : ox_clock_ns() | 1;
	const char *only = getenv("OXBOW_ONLY");
	int failures = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	setenv("OXBOW_LOG", "error", 0);
	if (!kit_make_dir(dir, sizeof(dir), "powercut") || mkdir(in_dir("run"), 0700) < 0)
		bail("%s: %s", dir, strerror(errno));
	setenv("OXBOW_RUN_DIR", in_dir("run"), 1);
	snprintf(cut.file, sizeof(cut.file), "%s/disk", dir);
	snprintf(cut.base, sizeof(cut.base), "%s/base", dir);
	have_qemu = kit_spawn((const char *const[]){"qemu-img", "--version", NULL}, NULL, 0) == 0;
	printf("1..%zu\n# seed %#llx (give it as the argument to repeat)\n",
	       OX_ARRAY_SIZE(scenarios), (unsigned long long)seed);
	for (unsigned i = 0; i < OX_ARRAY_SIZE(scenarios); i++) {
		const struct scenario *scenario = &scenarios[i];
		bool control = scenario->too_strong || scenario->no_flush;
		struct tally tally = {0};
		unsigned long bad;

		if ((scenario->snapshot && !have_qemu) || (only && !strstr(scenario->name, only))) {
			printf("ok %u - power cut, %s # SKIP %s\n", i + 1, scenario->name,
			       only ? "OXBOW_ONLY" : "qemu-img is not installed");
			continue;
		}
		for (unsigned round = 0; round < rounds; round++)
			run_scenario(scenario, seed + i * 7919 + round * 2654435761u, states,
			             have_qemu, &tally);
		bad = tally.lost + tally.stale + tally.corrupt + tally.failed;
		failures += (bad > 0) != control;
		printf("%sok %u - power cut, %s\n# %lu states, %lu lost, %lu stale, %lu corrupt, "
		       "%lu not opened\n",
		       (bad > 0) != control ? "not " : "", i + 1, scenario->name, tally.states,
		       tally.lost, tally.stale, tally.corrupt, tally.failed);
	}
	kit_spawn((const char *const[]){"rm", "-rf", dir, NULL}, NULL, 0);
	free(cut.initial);
	free(cut.state);
	return failures > 0;
}
