/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The faulty store: see faulty.h.
 *
 * A request is copied into one of our own and goes to the wrapped store's channel of the same
 * loop, unless a rule says otherwise.  A request that a rule holds waits on its channel's list;
 * a timer looks every 50 ms whether the rules still hold it, also for other processes' changes
 * of the rule file.
 *
 * Locking: `lock` guards the rules and the log; it is held for no I/O but the reading of a
 * changed rule file.  Channels' lists belong to their loops.
 */
#include "store/faulty.h"
#include "store/internal.h"
#include "base/iov.h"
#include <oxbow/log.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/stat.h>

#define MAX_RULES 64
#define LOOK_NS   50000000u

struct faulty {
	struct ox_store *inner;
	char *rule_file; /* NULL: none */
	pthread_mutex_t lock;
	struct stat rules_stat; /* of the file as it was read */
	struct ox_fault_rule rules[MAX_RULES];
	unsigned rule_count;
	uint64_t generation; /* of the rules: what was held under an older one is let go */
	uint64_t injected;
	bool recording;
	uint64_t events;
	struct ox_faulty_log log;
	size_t log_room;
	uint64_t log_taken; /* records that were taken away before log.records[0] */
};

struct faulty_io {
	struct ox_io inner;
	struct ox_io *outer;
	struct ox_timer timer; /* DELAY */
	uint64_t record;       /* index over all times + 1; 0: not recorded */
	uint64_t generation;   /* NEVER: of the rules that hold it */
	int fail;              /* what it ends with although it was carried out */
	struct iovec *list;    /* SHORT: a shortened list */
	TAILQ_ENTRY(faulty_io) link;
};

struct faulty_channel {
	struct ox_channel base;
	struct ox_channel *inner;
	struct ox_timer look;
	TAILQ_HEAD(, faulty_io) held;
};

static struct faulty_channel *faulty_channel(struct ox_channel *channel)
{
	return ox_container_of(channel, struct faulty_channel, base);
}

/* --- rules ------------------------------------------------------------------------------ */

/* Reads the rule file into rules[]; the number of rules or -EINVAL with the line's number. */
static int read_rules(const char *path, struct ox_fault_rule *rules, unsigned *bad_line)
{
	FILE *file = fopen(path, "re");
	unsigned number = 0;
	char line[512];
	int count = 0;

	*bad_line = 0;
	if (!file)
		return -errno;
	while (fgets(line, sizeof(line), file)) {
		struct ox_fault_rule rule;
		int ret = ox_faulty_parse_rule(line, &rule);

		number++;
		if (ret < 0 || (ret == 1 && count == MAX_RULES)) {
			*bad_line = number;
			fclose(file);
			return -EINVAL;
		}
		if (ret == 1)
			rules[count++] = rule;
	}
	fclose(file);
	return count;
}

/* lock is held (or nobody else is there yet). */
static int load_rules(struct ox_store *store, struct ox_error *err)
{
	struct faulty *faulty = store->priv;
	struct ox_fault_rule rules[MAX_RULES];
	unsigned bad_line;
	int count;

	if (stat(faulty->rule_file, &faulty->rules_stat) < 0)
		memset(&faulty->rules_stat, 0, sizeof(faulty->rules_stat));
	count = read_rules(faulty->rule_file, rules, &bad_line);
	if (bad_line)
		return ox_error_set(err, EINVAL, "%s:%u: not a rule of the faulty store",
		                    faulty->rule_file, bad_line);
	if (count < 0)
		return ox_error_set(err, -count, "%s: %s", faulty->rule_file, strerror(-count));
	memcpy(faulty->rules, rules, (size_t)count * sizeof(rules[0]));
	faulty->rule_count = (unsigned)count;
	faulty->generation++;
	return 0;
}

/* lock is held. */
static void reload_if_changed(struct ox_store *store)
{
	struct faulty *faulty = store->priv;
	const struct stat *old = &faulty->rules_stat;
	struct ox_error err = {0};
	struct stat now;

	if (!faulty->rule_file || stat(faulty->rule_file, &now) < 0)
		return;
	if (now.st_ino == old->st_ino && now.st_size == old->st_size &&
	    now.st_mtim.tv_sec == old->st_mtim.tv_sec &&
	    now.st_mtim.tv_nsec == old->st_mtim.tv_nsec)
		return;
	if (load_rules(store, &err) < 0)
		ox_log(OX_LOG_WARNING, "%s; the former rules stay", err.text);
}

static bool rule_matches(const struct ox_fault_rule *rule, const struct ox_io *io)
{
	uint8_t op = io->op == OX_IO_SECURE_ERASE ? OX_IO_DISCARD : io->op;

	if (rule->op != OX_FAULT_ANY_OP && rule->op != op)
		return false;
	return rule->length == 0 ||
	       (op != OX_IO_FLUSH && io->offset < rule->offset + rule->length &&
	        rule->offset < io->offset + io->length);
}

/* lock is held.  The first rule whose turn this request is; all that match count it. */
static bool pick_rule(struct faulty *faulty, const struct ox_io *io, struct ox_fault_rule *picked)
{
	bool found = false;

	for (unsigned i = 0; i < faulty->rule_count; i++) {
		struct ox_fault_rule *rule = &faulty->rules[i];
		uint64_t nth = rule->nth ? rule->nth : 1;

		if (!rule_matches(rule, io))
			continue;
		rule->seen++;
		if (!found && (rule->seen == nth || (rule->always && rule->seen > nth))) {
			*picked = *rule;
			found = true;
		}
	}
	faulty->injected += found;
	return found;
}

void ox_faulty_add_rule(struct ox_store *store, const struct ox_fault_rule *rule)
{
	struct faulty *faulty = store->priv;

	pthread_mutex_lock(&faulty->lock);
	if (faulty->rule_count < MAX_RULES) {
		faulty->rules[faulty->rule_count] = *rule;
		faulty->rules[faulty->rule_count++].seen = 0;
	}
	pthread_mutex_unlock(&faulty->lock);
}

void ox_faulty_clear_rules(struct ox_store *store)
{
	struct faulty *faulty = store->priv;

	pthread_mutex_lock(&faulty->lock);
	faulty->rule_count = 0;
	faulty->generation++;
	pthread_mutex_unlock(&faulty->lock);
}

uint64_t ox_faulty_count(struct ox_store *store)
{
	struct faulty *faulty = store->priv;
	uint64_t count;

	pthread_mutex_lock(&faulty->lock);
	count = faulty->injected;
	pthread_mutex_unlock(&faulty->lock);
	return count;
}

/* --- the log ---------------------------------------------------------------------------- */

/* lock is held.  The new record, or NULL without memory. */
static struct ox_faulty_record *new_record(struct faulty *faulty)
{
	struct ox_faulty_log *log = &faulty->log;

	if (log->count == faulty->log_room) {
		size_t room = ox_max(faulty->log_room * 2, (size_t)64);
		void *grown = realloc(log->records, room * sizeof(*log->records));

		if (!grown)
			return NULL;
		log->records = grown;
		faulty->log_room = room;
	}
	memset(&log->records[log->count], 0, sizeof(*log->records));
	log->records[log->count].submitted = ++faulty->events;
	return &log->records[log->count++];
}

/* lock is held.  `bytes`: how many of the request are carried out. */
static uint64_t record_io(struct faulty *faulty, const struct ox_io *io, uint64_t bytes)
{
	struct ox_faulty_record *record;

	if (!faulty->recording || io->op == OX_IO_READ)
		return 0;
	record = new_record(faulty);
	if (!record)
		return 0;
	record->op = io->op;
	record->flags = io->flags;
	record->offset = io->offset;
	record->length = io->op == OX_IO_FLUSH ? 0 : bytes;
	if (io->op == OX_IO_WRITE) {
		record->data = ox_xcalloc(1, bytes + 1);
		ox_iov_to_buf(io->iov, io->iovcnt, 0, record->data, bytes);
	}
	return faulty->log_taken + faulty->log.count;
}

static void record_completion(struct faulty *faulty, uint64_t index, int result)
{
	if (index == 0)
		return;
	pthread_mutex_lock(&faulty->lock);
	faulty->events++;
	if (index > faulty->log_taken) {
		struct ox_faulty_record *record =
		        &faulty->log.records[index - 1 - faulty->log_taken];

		record->completed = faulty->events;
		record->result = result;
	}
	pthread_mutex_unlock(&faulty->lock);
}

uint64_t ox_faulty_clock(struct ox_store *store)
{
	struct faulty *faulty = store->priv;
	uint64_t events;

	pthread_mutex_lock(&faulty->lock);
	events = faulty->events;
	pthread_mutex_unlock(&faulty->lock);
	return events;
}

void ox_faulty_record(struct ox_store *store, bool on)
{
	struct faulty *faulty = store->priv;

	pthread_mutex_lock(&faulty->lock);
	faulty->recording = on;
	pthread_mutex_unlock(&faulty->lock);
}

void ox_faulty_take_log(struct ox_store *store, struct ox_faulty_log *log)
{
	struct faulty *faulty = store->priv;

	pthread_mutex_lock(&faulty->lock);
	*log = faulty->log;
	faulty->log_taken += faulty->log.count;
	faulty->log = (struct ox_faulty_log){0};
	faulty->log_room = 0;
	pthread_mutex_unlock(&faulty->lock);
}

void ox_faulty_free_log(struct ox_faulty_log *log)
{
	for (size_t i = 0; i < log->count; i++)
		free(log->records[i].data);
	free(log->records);
	*log = (struct ox_faulty_log){0};
}

/* --- requests --------------------------------------------------------------------------- */

static void end_io(struct faulty_io *fio, int result)
{
	struct ox_io *outer = fio->outer;
	struct faulty *faulty = outer->channel->store->priv;

	record_completion(faulty, fio->record, result);
	free(fio->list);
	free(fio);
	ox_io_finish(outer, result);
}

static void inner_done(struct ox_io *io)
{
	struct faulty_io *fio = ox_container_of(io, struct faulty_io, inner);

	end_io(fio, fio->fail && io->result == 0 ? fio->fail : io->result);
}

static void carry_out(struct faulty_io *fio)
{
	struct faulty_channel *ch = faulty_channel(fio->outer->channel);

	ox_store_submit(ch->inner, &fio->inner);
}

static void delay_over(struct ox_timer *timer)
{
	carry_out(ox_container_of(timer, struct faulty_io, timer));
}

/* Lets go what is held under rules that are no more. */
static void look(struct ox_timer *timer)
{
	struct faulty_channel *ch = ox_container_of(timer, struct faulty_channel, look);
	struct faulty *faulty = ch->base.store->priv;
	TAILQ_HEAD(, faulty_io) freed = TAILQ_HEAD_INITIALIZER(freed);
	struct faulty_io *fio, *next;

	pthread_mutex_lock(&faulty->lock);
	reload_if_changed(ch->base.store);
	for (fio = TAILQ_FIRST(&ch->held); fio; fio = next) {
		next = TAILQ_NEXT(fio, link);
		if (fio->generation == faulty->generation)
			continue;
		TAILQ_REMOVE(&ch->held, fio, link);
		TAILQ_INSERT_TAIL(&freed, fio, link);
	}
	pthread_mutex_unlock(&faulty->lock);
	if (!TAILQ_EMPTY(&ch->held))
		ox_timer_arm(ch->base.loop, &ch->look, LOOK_NS);
	while ((fio = TAILQ_FIRST(&freed))) {
		TAILQ_REMOVE(&freed, fio, link);
		carry_out(fio);
	}
}

static void shorten(struct faulty_io *fio, uint64_t bytes)
{
	struct ox_io *io = &fio->inner;

	fio->fail = -EIO;
	if (io->op == OX_IO_FLUSH || bytes >= io->length)
		return;
	io->length = bytes;
	if (io->op != OX_IO_READ && io->op != OX_IO_WRITE)
		return;
	fio->list = ox_xcalloc(io->iovcnt, sizeof(*fio->list));
	io->iovcnt = ox_iov_slice(io->iov, io->iovcnt, 0, bytes, fio->list);
	io->iov = fio->list;
}

static void faulty_io(struct ox_channel *channel, struct ox_io *io)
{
	struct faulty_channel *ch = faulty_channel(channel);
	struct ox_store *store = channel->store;
	struct faulty *faulty = store->priv;
	struct ox_fault_rule rule = {0};
	struct faulty_io *fio;
	bool fault;

	fio = calloc(1, sizeof(*fio));
	if (!fio) {
		ox_io_finish(io, -ENOMEM);
		return;
	}
	fio->outer = io;
	fio->inner.op = io->op;
	fio->inner.flags = io->flags;
	fio->inner.iovcnt = io->iovcnt;
	fio->inner.offset = io->offset;
	fio->inner.length = io->length;
	fio->inner.iov = io->iov;
	fio->inner.done = inner_done;

	pthread_mutex_lock(&faulty->lock);
	reload_if_changed(store);
	fault = pick_rule(faulty, io, &rule);
	fio->generation = faulty->generation;
	if (!fault || rule.kind != OX_FAULT_ERROR)
		fio->record = record_io(faulty, io,
		                        fault && rule.kind == OX_FAULT_SHORT
		                                ? ox_min(rule.bytes, io->length)
		                                : io->length);
	pthread_mutex_unlock(&faulty->lock);

	if (!fault) {
		carry_out(fio);
		return;
	}
	switch (rule.kind) {
	case OX_FAULT_ERROR:
		end_io(fio, -rule.error);
		break;
	case OX_FAULT_SHORT:
		shorten(fio, rule.bytes);
		carry_out(fio);
		break;
	case OX_FAULT_DELAY:
		fio->timer.fn = delay_over;
		ox_timer_arm(channel->loop, &fio->timer, rule.delay_ns);
		break;
	case OX_FAULT_NEVER:
		TAILQ_INSERT_TAIL(&ch->held, fio, link);
		if (!ch->look.loop)
			ox_timer_arm(channel->loop, &ch->look, LOOK_NS);
		break;
	}
}

/* --- the rest is the wrapped store's ------------------------------------------------------ */

static void faulty_close(struct ox_store *store)
{
	struct faulty *faulty = store->priv;

	ox_store_close(faulty->inner);
	ox_faulty_free_log(&faulty->log);
	pthread_mutex_destroy(&faulty->lock);
	free(faulty->rule_file);
	free(faulty);
}

static int faulty_open(struct ox_store *store, const char *path, struct ox_error *err)
{
	const char *colon = strchr(path, ':');
	struct faulty *faulty;
	int ret = 0;

	if (!colon || !colon[1])
		return ox_error_set(err, EINVAL, "%s: a faulty store is faulty:RULEFILE:NAME",
		                    store->path);
	faulty = ox_xcalloc(1, sizeof(*faulty));
	store->priv = faulty;
	pthread_mutex_init(&faulty->lock, NULL);
	if (colon > path) {
		faulty->rule_file = ox_xstrdup(path);
		faulty->rule_file[colon - path] = '\0';
		ret = load_rules(store, err);
	}
	if (ret == 0)
		ret = ox_store_open(colon + 1, &store->options, &faulty->inner, err);
	if (ret < 0) {
		faulty_close(store);
		return ret;
	}
	store->aio = faulty->inner->aio;
	memcpy(store->aio_reason, faulty->inner->aio_reason, sizeof(store->aio_reason));
	store->dev = faulty->inner->dev;
	store->ino = faulty->inner->ino;
	return 0;
}

static int faulty_size(struct ox_store *store, uint64_t *size)
{
	struct faulty *faulty = store->priv;

	return ox_store_refresh_size(faulty->inner, size);
}

static void faulty_limits(struct ox_store *store, struct ox_store_limits *limits)
{
	const struct faulty *faulty = store->priv;

	*limits = faulty->inner->limits;
}

static int faulty_attach(struct ox_store *store, struct ox_loop *loop, struct ox_channel **channel,
                         struct ox_error *err)
{
	struct faulty *faulty = store->priv;
	struct faulty_channel *ch = ox_xcalloc(1, sizeof(*ch));
	int ret = ox_store_attach(faulty->inner, loop, &ch->inner, err);

	if (ret < 0) {
		free(ch);
		return ret;
	}
	TAILQ_INIT(&ch->held);
	ch->look.fn = look;
	*channel = &ch->base;
	return 0;
}

static void faulty_detach(struct ox_channel *channel)
{
	struct faulty_channel *ch = faulty_channel(channel);

	ox_timer_cancel(&ch->look);
	ox_store_detach(ch->inner);
	free(ch);
}

static int faulty_pread(struct ox_store *store, uint64_t offset, void *buf, size_t bytes)
{
	const struct faulty *faulty = store->priv;

	return ox_store_pread(faulty->inner, offset, buf, bytes);
}

static int faulty_status(struct ox_store *store, uint64_t offset, uint64_t *length,
                         enum ox_block_status *status)
{
	const struct faulty *faulty = store->priv;

	return ox_store_status(faulty->inner, offset, length, status);
}

static int faulty_truncate(struct ox_store *store, uint64_t size, enum ox_preallocation prealloc,
                           void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                           struct ox_error *err)
{
	struct faulty *faulty = store->priv;
	uint64_t index = 0;
	int ret;

	pthread_mutex_lock(&faulty->lock);
	if (faulty->recording) {
		struct ox_faulty_record *record = new_record(faulty);

		if (record) {
			record->truncate = true;
			record->length = size;
			index = faulty->log_taken + faulty->log.count;
		}
	}
	pthread_mutex_unlock(&faulty->lock);
	ret = ox_store_truncate(faulty->inner, size, prealloc, progress, arg, err);
	record_completion(faulty, index, ret);
	return ret;
}

static int faulty_lock(struct ox_store *store, enum ox_lock_mode mode, struct ox_error *err)
{
	const struct faulty *faulty = store->priv;

	return ox_store_lock(faulty->inner, mode, err);
}

const struct ox_store_ops ox_store_faulty = {
        .name = "faulty",
        .open = faulty_open,
        .close = faulty_close,
        .size = faulty_size,
        .limits = faulty_limits,
        .attach = faulty_attach,
        .detach = faulty_detach,
        .read = faulty_io,
        .write = faulty_io,
        .flush = faulty_io,
        .zero = faulty_io,
        .discard = faulty_io,
        .pread = faulty_pread,
        .status = faulty_status,
        .truncate = faulty_truncate,
        .lock = faulty_lock,
};
