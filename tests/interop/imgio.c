/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * imgio: reads and writes an image as a guest would, without a guest.  What qemu-io is to QEMU.
 *
 *     imgio [OPTION...] FILE COMMAND...        each command is one argument
 *
 *     -f FMT          the format (guessed)            -r   read-only
 *     -d              O_DIRECT                         -A   header may name any file
 *     --secret FILE   the pass phrase                  --dir DIR  ... a file below it too
 *     -n THREADS      I/O threads (1)                  --discard-no-unref
 *     -p BYTES        a command's range is cut in pieces of that size, which the threads share
 *                     (whole)                          --no-finish  the image is left as it is
 *     --no-lock       no lock (with -r)                --cache BYTES  of metadata
 *
 *     write [-P BYTE] OFFSET LENGTH    BYTE 1 to 255 (0xcd)
 *     read [-P BYTE] OFFSET LENGTH     with -P: fails if something else is there
 *     zero [-u] OFFSET LENGTH          -u: its space may go
 *     discard OFFSET LENGTH
 *     flush
 *     resize SIZE
 *     map                              a line an extent
 *     size                             prints the size
 *     compare-raw FILE                 is the whole disk this file's content (then zeroes)?
 *     export FILE                      writes the whole disk there
 *     import FILE OFFSET LENGTH        writes that part of the file to the same place
 *     check                            prints what is wrong, fails if anything is
 *     reopen                           leaves it clean, and opens it again
 *     kill                             ends at once, as SIGKILL does
 *
 * Exit status 0: all went well; 1: the image says otherwise; 2: what was asked makes no sense.
 */
#include "tests/lib/image_kit.h"
#include "base/text.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define CHUNK (1u << 20)

static struct kit kit;
static const char *image_path;
static struct ox_image_options options = {
        .store = {.aio = OX_AIO_THREADS,
                  .lock = OX_LOCK_WRITE,
                  .lock_timeout_ns = UINT64_C(5) * 1000 * 1000 * 1000}};
static uint64_t piece_bytes;

static __attribute__((format(printf, 2, 3), noreturn)) void die(int status, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("imgio: ", stderr);
	vfprintf(stderr, fmt, ap); /* NOLINT: the callers' formats are literals */
	fputc('\n', stderr);
	va_end(ap);
	exit(status);
}

static uint64_t number(const char *text)
{
	uint64_t value;

	if (!text || !ox_parse_size(text, 1, &value))
		die(2, "'%s' is not a number of bytes", text ? text : "");
	return value;
}

/* --- a command's work in pieces --------------------------------------------------------------- */

enum what { READ, CHECK_BYTE, WRITE_BYTE, ZERO, DISCARD, COMPARE_FILE, EXPORT, IMPORT };

struct task {
	enum what what;
	uint8_t byte;
	unsigned flags;
	int fd;
	uint64_t end, step;
	uint64_t next;  /* atomic: the first offset that nobody has taken */
	bool different; /* atomic */
	int result;     /* atomic; the first error */
	uint64_t bad_offset;
};

static void fail_task(struct task *task, uint64_t offset, int error)
{
	int none = 0;

	if (__atomic_compare_exchange_n(&task->result, &none, error, false, __ATOMIC_RELAXED,
	                                __ATOMIC_RELAXED))
		__atomic_store_n(&task->bad_offset, offset, __ATOMIC_RELAXED);
}

static void read_file(int fd, uint64_t offset, uint8_t *buf, size_t bytes)
{
	size_t done = 0;

	while (done < bytes) {
		ssize_t got = pread(fd, buf + done, bytes - done, (off_t)(offset + done));

		if (got < 0)
			die(2, "reading a file: %s", strerror(errno));
		if (got == 0)
			break;
		done += (size_t)got;
	}
	memset(buf + done, 0, bytes - done);
}

static void compare(struct task *task, uint64_t offset, const uint8_t *found, const uint8_t *wanted,
                    size_t bytes)
{
	for (size_t i = 0; i < bytes; i++) {
		unsigned long long at = offset;

		if (found[i] == wanted[i])
			continue;
		at += i;
		if (!__atomic_exchange_n(&task->different, true, __ATOMIC_RELAXED))
			fprintf(stderr, "imgio: at %llu is 0x%02x, and 0x%02x should be\n", at,
			        found[i], wanted[i]);
		return;
	}
}

static int do_piece_co(struct ox_image_channel *channel, struct task *task, uint64_t offset,
                       size_t bytes, uint8_t *buf, uint8_t *other)
{
	int ret;

	switch (task->what) {
	case WRITE_BYTE:
		memset(buf, task->byte, bytes);
		return ox_image_write_co(channel, offset, buf, bytes, 0);
	case IMPORT:
		read_file(task->fd, offset, buf, bytes);
		return ox_image_write_co(channel, offset, buf, bytes, 0);
	case ZERO:
		return ox_image_request_co(channel, OX_IO_ZERO, offset, bytes, task->flags);
	case DISCARD:
		return ox_image_request_co(channel, OX_IO_DISCARD, offset, bytes, 0);
	default:
		break;
	}
	memset(buf, 0xee, bytes);
	ret = ox_image_read_co(channel, offset, buf, bytes);
	if (ret < 0)
		return ret;
	if (task->what == CHECK_BYTE) {
		memset(other, task->byte, bytes);
		compare(task, offset, buf, other, bytes);
	} else if (task->what == COMPARE_FILE) {
		read_file(task->fd, offset, other, bytes);
		compare(task, offset, buf, other, bytes);
	} else if (task->what == EXPORT &&
	           pwrite(task->fd, buf, bytes, (off_t)offset) != (ssize_t)bytes) {
		die(2, "writing a file: %s", strerror(errno));
	}
	return 0;
}

static void task_co(struct ox_image_channel *channel, void *arg)
{
	struct task *task = arg;
	bool moves = task->what != ZERO && task->what != DISCARD;
	uint8_t *buf = aligned_alloc(4096, CHUNK), *other = aligned_alloc(4096, CHUNK);

	if (!buf || !other)
		die(2, "no memory");
	while (!__atomic_load_n(&task->result, __ATOMIC_RELAXED)) {
		uint64_t offset = __atomic_fetch_add(&task->next, task->step, __ATOMIC_RELAXED);
		uint64_t end = ox_min(offset + task->step, task->end);

		while (offset < end) {
			uint64_t bytes =
			        moves ? ox_min(end - offset, (uint64_t)CHUNK) : end - offset;
			int ret = do_piece_co(channel, task, offset, bytes, buf, other);

			if (ret < 0) {
				fail_task(task, offset, ret);
				break;
			}
			offset += bytes;
		}
		if (end == task->end)
			break;
	}
	free(buf);
	free(other);
}

static void run_task(struct task *task, uint64_t offset, uint64_t length)
{
	struct kit_work work[KIT_THREADS * 2];
	unsigned count = kit.threads > 1 ? kit.threads * 2 : 1;

	if (length == 0)
		return;
	task->next = offset;
	task->end = offset + length;
	task->step = piece_bytes ? piece_bytes : length;
	if (!piece_bytes && kit.threads > 1)
		task->step = ox_max(ox_align_up(length / 4 / kit.threads, 512), UINT64_C(512));
	for (unsigned i = 0; i < count; i++)
		work[i] = (struct kit_work){i % kit.threads, task_co, task};
	kit_run(&kit, work, count);
	if (task->result)
		die(1, "at %llu: %s", (unsigned long long)task->bad_offset,
		    strerror(-task->result));
	if (task->different)
		exit(1);
}

/* --- commands that are one call ----------------------------------------------------------------
 */

struct single {
	uint64_t size;
	int result;
	struct ox_error err;
};

static void flush_co(struct ox_image_channel *channel, void *arg)
{
	struct single *single = arg;

	single->result = ox_image_request_co(channel, OX_IO_FLUSH, 0, 0, 0);
}

static void resize_co(struct ox_image_channel *channel, void *arg)
{
	struct single *single = arg;

	single->result = ox_image_resize_co(channel, single->size, OX_PREALLOC_OFF, &single->err);
}

static void map_co(struct ox_image_channel *channel, void *arg)
{
	struct single *single = arg;
	uint64_t offset = 0;

	while (offset < kit.image->size && single->result == 0) {
		struct ox_map_entry entry = {0};

		single->result = ox_image_map_co(channel, offset, kit.image->size - offset, &entry);
		if (single->result < 0)
			break;
		printf("%llu %llu depth %u%s%s%s%s", (unsigned long long)entry.offset,
		       (unsigned long long)entry.length, entry.depth,
		       entry.present ? " present" : "", entry.zero ? " zero" : "",
		       entry.data ? " data" : "", entry.compressed ? " compressed" : "");
		if (entry.has_offset)
			printf(" at %llu", (unsigned long long)entry.store_offset);
		putchar('\n');
		if (entry.offset != offset || entry.length == 0)
			die(1, "the map does not go on at %llu", (unsigned long long)offset);
		offset += entry.length;
	}
}

static void say(void *arg, const char *line)
{
	puts(line);
}

static void check_co(struct ox_image_channel *channel, void *arg)
{
	struct ox_image_check check = {.say = say};
	struct single *single = arg;

	single->result = ox_image_check_co(channel, &check, &single->err);
	if (single->result == 0 && (check.corruptions || check.leaks || check.check_errors)) {
		printf("%llu corruptions, %llu leaks, %llu errors\n",
		       (unsigned long long)check.corruptions, (unsigned long long)check.leaks,
		       (unsigned long long)check.check_errors);
		single->result = ox_error_set(&single->err, EUCLEAN, "the check found something");
	}
}

static void run_single(void (*fn_co)(struct ox_image_channel *channel, void *arg), uint64_t size)
{
	struct single single = {.size = size};
	struct kit_work work = {0, fn_co, &single};

	kit_run(&kit, &work, 1);
	if (single.result < 0)
		die(1, "%s", single.err.code ? single.err.text : strerror(-single.result));
}

/* --- the command line ---------------------------------------------------------------------------
 */

static void open_image(void)
{
	struct ox_error err = {0};

	if (kit_open(&kit, image_path, &options, &err) < 0)
		die(1, "%s", err.text);
}

static void close_image(bool finish)
{
	int ret = kit_close(&kit, finish);

	if (ret < 0)
		die(1, "closing: %s", strerror(-ret));
}

static void run_on_file(struct task *task, const char *name, int flags, uint64_t offset,
                        uint64_t length)
{
	task->fd = name ? open(name, flags | O_CLOEXEC, 0644) : -1;
	if (task->fd < 0)
		die(2, "%s: %s", name ? name : "FILE is missing", strerror(errno));
	if (task->what == EXPORT && ftruncate(task->fd, (off_t)length) < 0)
		die(2, "%s: %s", name, strerror(errno));
	run_task(task, offset, length);
	close(task->fd);
}

static void run_command(const char *text)
{
	OX_FREE char *copy = ox_xstrdup(text);
	char *word[5] = {0}, *save = NULL, *name;
	struct task task = {.fd = -1, .byte = 0xcd};
	bool patterned = false;
	unsigned words = 0;

	for (char *w = strtok_r(copy, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
		if (!strcmp(w, "-P")) {
			w = strtok_r(NULL, " ", &save);
			task.byte = w ? (uint8_t)strtoul(w, NULL, 0) : 0;
			patterned = true;
		} else if (!strcmp(w, "-u")) {
			task.flags = OX_IO_MAY_UNMAP;
		} else if (words < 4) {
			word[words++] = w;
		}
	}
	name = words ? word[0] : copy;
	if (!strcmp(name, "write")) {
		task.what = WRITE_BYTE;
		run_task(&task, number(word[1]), number(word[2]));
	} else if (!strcmp(name, "read")) {
		task.what = patterned ? CHECK_BYTE : READ;
		run_task(&task, number(word[1]), number(word[2]));
	} else if (!strcmp(name, "zero") || !strcmp(name, "discard")) {
		task.what = name[0] == 'z' ? ZERO : DISCARD;
		run_task(&task, number(word[1]), number(word[2]));
	} else if (!strcmp(name, "compare-raw")) {
		task.what = COMPARE_FILE;
		run_on_file(&task, word[1], O_RDONLY, 0, kit.image->size);
	} else if (!strcmp(name, "export")) {
		task.what = EXPORT;
		run_on_file(&task, word[1], O_RDWR | O_CREAT | O_TRUNC, 0, kit.image->size);
	} else if (!strcmp(name, "import")) {
		task.what = IMPORT;
		run_on_file(&task, word[1], O_RDONLY, number(word[2]), number(word[3]));
	} else if (!strcmp(name, "flush")) {
		run_single(flush_co, 0);
	} else if (!strcmp(name, "resize")) {
		run_single(resize_co, number(word[1]));
	} else if (!strcmp(name, "map")) {
		run_single(map_co, 0);
	} else if (!strcmp(name, "check")) {
		run_single(check_co, 0);
	} else if (!strcmp(name, "size")) {
		printf("%llu\n", (unsigned long long)kit.image->size);
	} else if (!strcmp(name, "reopen")) {
		close_image(!options.store.read_only);
		open_image();
	} else if (!strcmp(name, "kill")) {
		raise(SIGKILL);
	} else {
		die(2, "there is no command '%s'", name);
	}
}

static const char *next_arg(int argc, char **argv, int *i)
{
	if (*i + 1 >= argc)
		die(2, "%s needs a value", argv[*i]);
	return argv[++*i];
}

int main(int argc, char **argv)
{
	struct ox_secrets *secrets = NULL;
	const char *dirs[2] = {0};
	struct ox_error err = {0};
	unsigned threads = 1;
	bool finish = true;
	int i = 1;

	for (; i < argc && argv[i][0] == '-'; i++) {
		const char *name = argv[i];

		if (!strcmp(name, "-f")) {
			options.format = next_arg(argc, argv, &i);
		} else if (!strcmp(name, "-r")) {
			options.store.read_only = true;
			options.store.lock = OX_LOCK_READ;
		} else if (!strcmp(name, "-d")) {
			options.store.direct = true;
		} else if (!strcmp(name, "-A")) {
			options.allow.anything = true;
		} else if (!strcmp(name, "-n")) {
			threads = (unsigned)ox_min(number(next_arg(argc, argv, &i)),
			                           (uint64_t)KIT_THREADS);
		} else if (!strcmp(name, "-p")) {
			piece_bytes = number(next_arg(argc, argv, &i));
		} else if (!strcmp(name, "--cache")) {
			options.metadata_cache = number(next_arg(argc, argv, &i));
		} else if (!strcmp(name, "--dir")) {
			dirs[0] = next_arg(argc, argv, &i);
			options.allow.dirs = dirs;
		} else if (!strcmp(name, "--discard-no-unref")) {
			options.discard_no_unref = true;
		} else if (!strcmp(name, "--no-finish")) {
			finish = false;
		} else if (!strcmp(name, "--no-lock")) {
			options.store.lock = OX_LOCK_NONE;
		} else if (!strcmp(name, "--secret")) {
			OX_FREE char *text =
			        ox_xasprintf("secret,id=sec0,file=%s", next_arg(argc, argv, &i));

			secrets = secrets ? secrets : ox_secrets_new();
			if (ox_secrets_add(secrets, text, &err) < 0)
				die(2, "%s", err.text);
			options.secrets = secrets;
			options.key_secret = "sec0";
		} else {
			die(2, "there is no option '%s'", name);
		}
	}
	if (i >= argc || threads == 0)
		die(2, "FILE is missing");
	image_path = argv[i++];
	kit_start(&kit, threads);
	open_image();
	for (; i < argc; i++)
		run_command(argv[i]);
	close_image(finish && !options.store.read_only);
	kit_stop(&kit);
	ox_secrets_free(secrets);
	fflush(stdout);
	return 0;
}
