/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Secrets, as --object secret,... describes them.
 *
 * The text is QEMU's: members separated by commas, a comma in a value doubled.  A secret is read
 * when it is added, in memory of ox_key_alloc(), so that nothing of it stays in buffers that are
 * not wiped.  The list is filled before anything uses it and not changed then: no lock.
 */
#include "image/crypto_private.h"
#include "image/secret.h"
#include "base/opener.h"
#include "base/text.h"
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#define SECRET_MAX 65536u

struct secret {
	char *id;
	uint8_t *bytes; /* from ox_key_alloc(SECRET_MAX + 1) */
	size_t count;
	struct secret *next;
};

struct ox_secrets {
	struct secret *first;
};

/* What the text says; the strings are malloc'd. */
struct words {
	char *id, *file, *fd, *credential, *format, *type;
};

struct ox_secrets *ox_secrets_new(void)
{
	return ox_xcalloc(1, sizeof(struct ox_secrets));
}

static void free_secret(struct secret *secret)
{
	ox_key_free(secret->bytes, SECRET_MAX + 1);
	free(secret->id);
	free(secret);
}

void ox_secrets_free(struct ox_secrets *secrets)
{
	if (!secrets)
		return;
	while (secrets->first) {
		struct secret *secret = secrets->first;

		secrets->first = secret->next;
		free_secret(secret);
	}
	free(secrets);
}

static const struct secret *find(const struct ox_secrets *secrets, const char *id)
{
	for (const struct secret *s = secrets->first; s; s = s->next) {
		if (strcmp(s->id, id) == 0)
			return s;
	}
	return NULL;
}

int ox_secrets_find(const struct ox_secrets *secrets, const char *id, const uint8_t **bytes,
                    size_t *count, struct ox_error *err)
{
	const struct secret *secret = secrets ? find(secrets, id) : NULL;

	if (!secret)
		return ox_error_set(err, ENOENT,
		                    "there is no secret '%s'; give it with --object "
		                    "secret,id=%s,file=PATH",
		                    id, id);
	*bytes = secret->bytes;
	*count = secret->count;
	return 0;
}

/* --- the text --------------------------------------------------------------------------------- */

static void free_words(struct words *words)
{
	free(words->id);
	free(words->file);
	free(words->fd);
	free(words->credential);
	free(words->format);
	free(words->type);
}

/* Up to the next single comma, which is skipped; malloc'd. */
static char *next_member(const char **text)
{
	const char *from = *text;
	char *member = ox_xcalloc(1, strlen(from) + 1);
	size_t length = 0;

	while (*from && !(from[0] == ',' && from[1] != ',')) {
		from += from[0] == ',';
		member[length++] = *from++;
	}
	*text = *from ? from + 1 : from;
	return member;
}

static int take_member(struct words *words, char *member, struct ox_error *err)
{
	static const char *const names[] = {"id", "file", "fd", "credential", "format", NULL};
	const struct {
		const char *name;
		char **value;
	} known[] = {
	        {"id", &words->id},         {"file", &words->file},
	        {"fd", &words->fd},         {"credential", &words->credential},
	        {"format", &words->format}, {"qom-type", &words->type},
	};
	char *equals = strchr(member, '=');
	const char *near;

	/* Before anything that repeats it. */
	if (strncmp(member, "data=", 5) == 0)
		return ox_error_set(err, EINVAL,
		                    "a secret on the command line can be read by everybody on this "
		                    "host; give file=, fd= or credential=");
	if (!equals)
		return ox_error_set(err, EINVAL, "--object secret: '%s' is not NAME=VALUE", member);
	*equals = '\0';
	if (strcmp(member, "keyid") == 0 || strcmp(member, "iv") == 0)
		return ox_error_set(err, ENOTSUP,
		                    "--object secret: encrypted secrets (%s=) are not supported; "
		                    "protect the file by its permissions, or use credential=",
		                    member);
	for (size_t i = 0; i < OX_ARRAY_SIZE(known); i++) {
		if (strcmp(member, known[i].name) != 0)
			continue;
		if (*known[i].value)
			return ox_error_set(err, EINVAL, "--object secret: %s= is given twice",
			                    member);
		*known[i].value = ox_xstrdup(equals + 1);
		return 0;
	}
	near = ox_nearest_word(member, names);
	return ox_error_set(err, EINVAL, "--object secret has no member '%s'%s%s", member,
	                    near ? "; did you mean " : "", near ? near : "");
}

static int check_words(const struct words *words, struct ox_error *err)
{
	unsigned sources = !!words->file + !!words->fd + !!words->credential;

	if (!words->type || strcmp(words->type, "secret") != 0)
		return ox_error_set(err, EINVAL,
		                    "--object: there is no kind of object '%s'; there is secret",
		                    words->type ? words->type : "");
	if (!words->id)
		return ox_error_set(err, EINVAL, "--object secret: it needs an id=");
	if (!((*words->id | 32) >= 'a' && (*words->id | 32) <= 'z') ||
	    words->id[strspn(words->id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	                                "0123456789-._")])
		return ox_error_set(err, EINVAL,
		                    "--object secret: id '%s' is not a letter and then letters, "
		                    "digits, '-', '.' or '_'",
		                    words->id);
	if (sources != 1)
		return ox_error_set(
		        err, EINVAL,
		        "--object secret,id=%s: give one of file=, fd= and credential=%s",
		        words->id, sources ? ", not several" : "");
	if (words->format && strcmp(words->format, "raw") != 0 &&
	    strcmp(words->format, "base64") != 0)
		return ox_error_set(err, EINVAL,
		                    "--object secret,id=%s: format '%s' is neither raw nor base64",
		                    words->id, words->format);
	return 0;
}

static int parse(const char *text, struct words *words, struct ox_error *err)
{
	OX_FREE char *first = next_member(&text);
	int rc = 0;

	/* QEMU lets the first member's name be left out. */
	if (strchr(first, '='))
		rc = take_member(words, first, err);
	else
		words->type = ox_steal_ptr(first);
	while (rc == 0 && *text) {
		OX_FREE char *member = next_member(&text);

		rc = take_member(words, member, err);
	}
	return rc < 0 ? rc : check_words(words, err);
}

/* --- reading ---------------------------------------------------------------------------------- */

/* To the end, at most SECRET_MAX bytes. */
static int read_all(int fd, struct secret *secret, const char *name, struct ox_error *err)
{
	for (;;) {
		ssize_t n = read(fd, secret->bytes + secret->count, SECRET_MAX + 1 - secret->count);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return ox_error_set(err, errno, "secret '%s': cannot read %s: %s",
			                    secret->id, name, strerror(errno));
		if (n == 0)
			return 0;
		secret->count += (size_t)n;
		if (secret->count > SECRET_MAX)
			return ox_error_set(err, EFBIG,
			                    "secret '%s': %s holds more than %u bytes; that is no "
			                    "pass phrase",
			                    secret->id, name, SECRET_MAX);
	}
}

static int read_file(const char *path, struct secret *secret, struct ox_error *err)
{
	OX_CLOSE int fd = ox_open(&ox_opener_direct, path, O_RDONLY | O_NOCTTY, 0);

	if (fd < 0)
		return ox_error_set(err, -fd, "secret '%s': cannot open %s: %s", secret->id, path,
		                    strerror(-fd));
	return read_all(fd, secret, path, err);
}

static int read_fd(const char *text, struct secret *secret, struct ox_error *err)
{
	uint64_t number;
	char name[32];
	int rc;

	if (!ox_parse_uint(text, 0, INT_MAX, &number))
		return ox_error_set(err, EINVAL, "secret '%s': '%s' is not a descriptor's number",
		                    secret->id, text);
	snprintf(name, sizeof(name), "descriptor %d", (int)number);
	rc = read_all((int)number, secret, name, err);
	/* It was given for this; who comes after in the process need not find it. */
	if (rc == 0 && number > STDERR_FILENO)
		close((int)number);
	return rc;
}

static int read_credential(const char *name, struct secret *secret, struct ox_error *err)
{
	const char *dir = getenv("CREDENTIALS_DIRECTORY");
	OX_FREE char *path = NULL;

	if (!*name || strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
		return ox_error_set(err, EINVAL,
		                    "secret '%s': '%s' is not the name of a credential", secret->id,
		                    name);
	if (!dir || !*dir)
		return ox_error_set(err, ENOENT,
		                    "secret '%s': systemd passed no credentials here "
		                    "(CREDENTIALS_DIRECTORY is not set); add "
		                    "LoadCredential=%s:PATH to the unit",
		                    secret->id, name);
	path = ox_xasprintf("%s/%s", dir, name);
	return read_file(path, secret, err);
}

static int decode(struct secret *secret, struct ox_error *err)
{
	gnutls_datum_t in = {.data = secret->bytes, .size = (unsigned)secret->count};
	gnutls_datum_t out = {0};

	if (secret->count == 0)
		return 0;
	if (gnutls_base64_decode2(&in, &out) < 0)
		return ox_error_set(err, EINVAL, "secret '%s': its content is not base64",
		                    secret->id);
	gnutls_memset(secret->bytes, 0, secret->count);
	/* Never longer than its encoding. */
	memcpy(secret->bytes, out.data, out.size);
	secret->count = out.size;
	gnutls_memset(out.data, 0, out.size);
	gnutls_free(out.data);
	return 0;
}

static int add(struct ox_secrets *secrets, struct words *words, struct ox_error *err)
{
	struct secret *secret;
	int rc;

	/* check_words() saw to that. */
	assert(words->id && (words->file || words->fd || words->credential));
	if (find(secrets, words->id))
		return ox_error_set(err, EEXIST, "there are two secrets with the id '%s'",
		                    words->id);
	secret = ox_xcalloc(1, sizeof(*secret));
	secret->id = ox_steal_ptr(words->id);
	secret->bytes = ox_key_alloc(SECRET_MAX + 1);
	if (!secret->bytes) {
		rc = ox_error_set(err, ENOMEM, "secret '%s': no memory for it", secret->id);
		free_secret(secret);
		return rc;
	}
	if (words->file)
		rc = read_file(words->file, secret, err);
	else if (words->fd)
		rc = read_fd(words->fd, secret, err);
	else
		rc = read_credential(words->credential, secret, err);
	if (rc == 0 && words->format && strcmp(words->format, "base64") == 0)
		rc = decode(secret, err);
	if (rc < 0) {
		free_secret(secret);
		return rc;
	}
	secret->next = secrets->first;
	secrets->first = secret;
	return 0;
}

int ox_secrets_add(struct ox_secrets *secrets, const char *text, struct ox_error *err)
{
	struct words words = {0};
	int rc = parse(text, &words, err);

	if (rc == 0)
		rc = add(secrets, &words, err);
	free_words(&words);
	return rc;
}
