/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The record of map changes: what a killed process leaves for the next one.
 *
 * A guest's write is complete when its data is in the store and the map in memory shows it; the map
 * in the file follows with the next flush.  That is all that a power cut demands, but when only the
 * process dies, the guest lives on and must read back what it wrote.  So every change of the map is
 * also noted in a file in the run directory (a file system in memory; its name holds device, inode
 * and boot), mapped into the process: a note is a few stores, and they survive the process.
 *
 *   head    who and what: session (it is in the image's header too), device, inode
 *   2 x     sequence number, count, and as many notes: level and index of an entry, its new value
 *
 * Notes go to one half until a commit begins (seal); then to the other, while the first one's come
 * into the file; when they are there (sealed) it is emptied.  If a commit fails both halves stay
 * full of what is only in memory, and the one after it finds nowhere to seal to: then no more notes
 * are taken until it succeeded.  Emptying goes from the older to the newer, and adoption applies
 * the older first, so whatever is left at any instant leads to the newest value of every entry.
 *
 * A note counts from the release store of its half's count on; what is behind the count is nothing.
 *
 * The file is ours (mode 0600, in our own directory), but it is checked like anybody's.  Whether it
 * still describes the image is decided by the header: the session must be the same, and the
 * autoclear bit beside it, which falls when any other program writes, must still be set.
 *
 * Who only reads applies it too, to memory, if a lock tells that nobody writes; the file stays.
 *
 * Locking: under q->lock, but for adoption and making, when nobody else has the image.
 */
#include "image/qcow2/qcow2.h"
#include "store/record.h"
#include <errno.h>
#include <fcntl.h>
#include <oxbow/log.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define RECORD_VERSION 1u
#define HALF_NOTES     32768u
#define PATH_BYTES     4096u
#define LEVEL_SHIFT    60

static const char record_magic[8] = {'O', 'X', 'B', 'O', 'W', 'M', 'A', 'P'};

struct note {
	uint64_t where; /* level << 60 | index */
	uint64_t entry, bitmap;
};

struct half {
	uint64_t sequence; /* the higher one is the newer */
	uint32_t count;    /* atomic */
	uint32_t padding;
};

struct record_file {
	char magic[8];
	uint32_t version, half_notes;
	uint8_t session[16];
	uint64_t dev, ino;
	int64_t birth_ns; /* of the image's file; 0: unknown */
	uint32_t cluster_bits, entry_bytes;
	struct half half[2];
	struct note notes[2][HALF_NOTES] __attribute__((aligned(4096)));
};

struct qcow2_record {
	struct record_file *file; /* mapped, shared */
	char path[PATH_BYTES];
	unsigned current;
	bool stuck; /* both halves are sealed */
};

/* A store without a file dies with the process. */
static bool outlives_us(const struct qcow2 *q)
{
	return q->image->store->dev != 0 || q->image->store->ino != 0;
}

static int find_path(const struct qcow2 *q, char *path, bool make_dir)
{
	const struct ox_store *store = q->image->store;

	if (!outlives_us(q))
		return -ENOENT;
	return ox_record_path("qcow2-map", store->dev, store->ino, path, PATH_BYTES, make_dir);
}

/* When the image's file was made: a new one may get the inode of one that was removed. */
static int64_t find_birth(const struct qcow2 *q)
{
	const struct ox_store *store = q->image->store;
	const char *path = store->path;
	struct statx stx;

	if (strncmp(path, "file:", 5) == 0)
		path += 5;
	if (statx(AT_FDCWD, path, 0, STATX_BTIME | STATX_INO, &stx) < 0 ||
	    !(stx.stx_mask & STATX_BTIME) || stx.stx_ino != store->ino)
		return 0;
	return stx.stx_btime.tv_sec * INT64_C(1000000000) + stx.stx_btime.tv_nsec;
}

/* --- writing --------------------------------------------------------------------------------- */

/* Under another name until it is whole. */
static int make_file(const struct qcow2 *q, const char *path, struct record_file **out)
{
	OX_FREE char *new_path = ox_xasprintf("%s.new", path);
	OX_CLOSE int fd = -1;
	struct record_file *file;
	int rc;

	unlink(new_path);
	fd = open(new_path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	/* With its space: a store into a mapped hole of a full file system would end the process.
	 */
	rc = -posix_fallocate(fd, 0, sizeof(*file));
	if (rc < 0)
		goto fail;
	file = mmap(NULL, sizeof(*file), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED) {
		rc = -errno;
		goto fail;
	}
	memcpy(file->magic, record_magic, sizeof(file->magic));
	file->version = RECORD_VERSION;
	file->half_notes = HALF_NOTES;
	memcpy(file->session, q->header.session, sizeof(file->session));
	file->dev = q->image->store->dev;
	file->ino = q->image->store->ino;
	file->birth_ns = find_birth(q);
	file->cluster_bits = q->cluster_bits;
	file->entry_bytes = q->entry_bytes;
	file->half[0].sequence = 1;
	if (rename(new_path, path) < 0) {
		rc = -errno;
		munmap(file, sizeof(*file));
		goto fail;
	}
	*out = file;
	return 0;
fail:
	unlink(new_path);
	return rc;
}

int qcow2_record_begin(struct qcow2 *q)
{
	struct qcow2_record *record;
	int rc;

	q->image->eager = outlives_us(q);
	/* Version 2 has no bit that would fall when somebody else writes. */
	if (q->header.version < 3 || !outlives_us(q))
		return 0;
	record = ox_xcalloc(1, sizeof(*record));
	rc = find_path(q, record->path, true);
	if (rc == 0)
		rc = make_file(q, record->path, &record->file);
	if (rc < 0) {
		free(record);
		return rc;
	}
	pthread_mutex_lock(&q->lock);
	q->record = record;
	q->image->eager = false;
	pthread_mutex_unlock(&q->lock);
	return 0;
}

static uint32_t count_of(const struct qcow2_record *record, unsigned half)
{
	return __atomic_load_n(&record->file->half[half].count, __ATOMIC_RELAXED);
}

static void set_count(struct qcow2_record *record, unsigned half, uint32_t count)
{
	__atomic_store_n(&record->file->half[half].count, count, __ATOMIC_RELEASE);
}

bool qcow2_record_note(struct qcow2 *q, unsigned level, uint64_t index, uint64_t entry,
                       uint64_t bitmap)
{
	struct qcow2_record *record = q->record;
	uint32_t count;

	if (!record)
		return true;
	count = count_of(record, record->current);
	if (record->stuck || count == HALF_NOTES)
		return false;
	record->file->notes[record->current][count] = (struct note){
	        .where = (uint64_t)level << LEVEL_SHIFT | index, .entry = entry, .bitmap = bitmap};
	set_count(record, record->current, count + 1);
	return true;
}

bool qcow2_record_has_room(const struct qcow2 *q, unsigned count)
{
	const struct qcow2_record *record = q->record;

	if (!record)
		return true;
	return !record->stuck && count <= HALF_NOTES - count_of(record, record->current);
}

void qcow2_record_seal(struct qcow2 *q)
{
	struct qcow2_record *record = q->record;
	unsigned other;

	if (!record)
		return;
	other = 1 - record->current;
	if (count_of(record, other) > 0) {
		record->stuck = true;
		return;
	}
	record->file->half[other].sequence = record->file->half[record->current].sequence + 1;
	record->current = other;
}

void qcow2_record_sealed(struct qcow2 *q, bool ok)
{
	struct qcow2_record *record = q->record;

	if (!record || !ok)
		return;
	set_count(record, 1 - record->current, 0);
	if (record->stuck)
		set_count(record, record->current, 0);
	record->stuck = false;
}

void qcow2_record_free(struct qcow2 *q)
{
	if (!q->record)
		return;
	munmap(q->record->file, sizeof(*q->record->file));
	free(q->record);
	q->record = NULL;
}

void qcow2_record_end(struct qcow2 *q)
{
	char path[PATH_BYTES];

	pthread_mutex_lock(&q->lock);
	qcow2_record_free(q);
	pthread_mutex_unlock(&q->lock);
	/* Also one that was adopted. */
	if (find_path(q, path, false) == 0)
		unlink(path);
}

/* --- adopting -------------------------------------------------------------------------------- */

static int refuse_file(const struct qcow2 *q, const char *path, const char *why,
                       struct ox_error *err)
{
	return ox_error_set(err, EINVAL,
	                    "%s: the record of a process that did not close it, %s, %s; what that "
	                    "process had not yet written to the image may be lost; remove the "
	                    "record to go on without it",
	                    q->image->store->path, path, why);
}

static const char *what_is_wrong(const struct qcow2 *q, const struct record_file *file)
{
	const struct ox_store *store = q->image->store;

	if (memcmp(file->magic, record_magic, sizeof(record_magic)) != 0 ||
	    file->version != RECORD_VERSION || file->half_notes != HALF_NOTES)
		return "is not one that this version writes";
	if (file->dev != store->dev || file->ino != store->ino)
		return "is of another file";
	if (file->half[0].count > HALF_NOTES || file->half[1].count > HALF_NOTES)
		return "is damaged";
	if (file->half[0].count && file->half[1].count &&
	    file->half[0].sequence == file->half[1].sequence)
		return "is damaged";
	return NULL;
}

/* Left behind by a file that is no more. */
static bool is_of_another_birth(const struct qcow2 *q, const struct record_file *file)
{
	int64_t birth = find_birth(q);

	return file->birth_ns && birth && file->birth_ns != birth;
}

/* 1: read, *out is malloc'd; 0: there is none. */
static int read_file(const struct qcow2 *q, const char *path, struct record_file **out,
                     struct ox_error *err)
{
	OX_CLOSE int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
	struct record_file *file;
	const char *wrong;
	struct stat st;
	size_t at = 0;

	if (fd < 0 && (errno == ENOENT || errno == ENOTDIR))
		return 0;
	if (fd < 0 || fstat(fd, &st) < 0)
		return refuse_file(q, path, "cannot be opened", err);
	if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || st.st_size != sizeof(*file))
		return refuse_file(q, path, "is not one that this version writes", err);
	file = aligned_alloc(4096, sizeof(*file));
	if (!file)
		return ox_error_set(err, ENOMEM, "%s: no memory to read %s", q->image->store->path,
		                    path);
	while (at < sizeof(*file)) {
		ssize_t got = pread(fd, (char *)file + at, sizeof(*file) - at, (off_t)at);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			free(file);
			return refuse_file(q, path, "cannot be read", err);
		}
		at += (size_t)got;
	}
	wrong = what_is_wrong(q, file);
	if (wrong || is_of_another_birth(q, file)) {
		free(file);
		return wrong ? refuse_file(q, path, wrong, err) : 0;
	}
	*out = file;
	return 1;
}

static bool is_current(const struct qcow2 *q, const struct record_file *file)
{
	const struct qcow2_header *h = &q->header;

	return h->version >= 3 && h->has_session && (h->autoclear & QCOW2_AUTOCLEAR_SESSION) &&
	       memcmp(h->session, file->session, sizeof(file->session)) == 0 &&
	       file->cluster_bits == q->cluster_bits && file->entry_bytes == q->entry_bytes;
}

static int apply_half_co(struct ox_image_channel *channel, const struct record_file *file,
                         unsigned half, const char *path, struct ox_error *err)
{
	struct qcow2 *q = channel->image->priv;
	uint64_t l2_entries = q->cluster_size / q->entry_bytes;

	for (uint32_t i = 0; i < file->half[half].count; i++) {
		const struct note *note = &file->notes[half][i];
		unsigned level = (unsigned)(note->where >> LEVEL_SHIFT);
		uint64_t index = note->where & ((UINT64_C(1) << LEVEL_SHIFT) - 1);
		uint64_t limit = q->l1_entries * (level == 1 ? 1 : l2_entries);
		int rc;

		if (level < 1 || level > 2 || index >= limit)
			return refuse_file(q, path, "is damaged", err);
		rc = qcow2_apply_co(channel, level, index, note->entry, note->bitmap);
		if (rc < 0)
			return ox_error_set(err, -rc,
			                    "%s: what a process that did not close it left in %s "
			                    "cannot be taken over: %s; remove that record to go on "
			                    "without it, and check the image",
			                    q->image->store->path, path, strerror(-rc));
	}
	return 0;
}

static void warn_of(const struct qcow2 *q, const char *path, const char *why)
{
	ox_log(OX_LOG_WARNING, "%s: a process that did not close it left changes in %s; %s",
	       q->image->store->path, path, why);
}

/* What a record with notes means for who opens the image in this way. */
static int adopt_co(struct ox_image_channel *channel, const struct record_file *file,
                    const char *path, bool writer, struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = image->priv;
	unsigned older = file->half[0].sequence < file->half[1].sequence ? 0 : 1;
	int rc;

	if (!writer && image->options.for_check) {
		warn_of(q, path, "what they refer to looks like leaks");
		return 0;
	}
	if (!is_current(q, file)) {
		const char *why = "no longer belongs to it, because another program has written to "
		                  "the image since";

		if (writer)
			return refuse_file(q, path, why, err);
		warn_of(q, path, "they are lost, because another program has written to it since");
		return 0;
	}
	rc = apply_half_co(channel, file, older, path, err);
	if (rc == 0)
		rc = apply_half_co(channel, file, 1 - older, path, err);
	if (rc == 0)
		ox_log(OX_LOG_INFO,
		       "%s: took over %u changes of its map from a process that did not close it",
		       image->store->path, file->half[0].count + file->half[1].count);
	return rc;
}

int qcow2_record_adopt_co(struct ox_image_channel *channel, struct ox_error *err)
{
	struct ox_image *image = channel->image;
	struct qcow2 *q = image->priv;
	enum ox_lock_mode lock = image->store->options.lock;
	bool writer = !image->read_only && lock == OX_LOCK_WRITE;
	struct record_file *file = NULL;
	struct ox_error found = {0};
	char path[PATH_BYTES];
	int rc = find_path(q, path, false);

	/* Without a lock, the process whose record it is may be alive. */
	if (rc < 0 || (!writer && !(image->read_only && lock == OX_LOCK_READ)))
		return 0;
	/* Whoever does not write need not understand it. */
	rc = read_file(q, path, &file, writer ? err : &found);
	if (rc <= 0 || !file)
		return writer ? rc : 0;
	if (file->half[0].count || file->half[1].count)
		rc = adopt_co(channel, file, path, writer, err);
	else
		rc = 0;
	free(file);
	return rc;
}
