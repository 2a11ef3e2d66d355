/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What `oxbow serve` can be told, by options or by a configuration file: one table for both.
 */
#ifndef OX_CLI_OPTIONS_H
#define OX_CLI_OPTIONS_H

#include "disk/disk.h"

/* One disk and its export, as asked for.  The strings that `disk` points to are owned here. */
struct ox_serve_disk {
	struct ox_disk_options disk;
	char *name, *image, *format, *key_secret;
	char **allow_dirs; /* NULL-terminated; NULL: none */
	unsigned allow_count;
	char *socket_path; /* NULL: fd */
	int fd;            /* -1: socket_path */
	unsigned queues;   /* 0: automatic */
	char *where;       /* in front of messages: "" or "FILE:LINE: [SECTION] " */
	uint64_t given;    /* a bit for each key of the table that was set */
};

struct ox_serve_config {
	struct ox_serve_disk *disks;
	unsigned count;
	char *control;
	struct ox_secrets *secrets; /* NULL: none */
	unsigned iothreads;
	uint64_t poll_max_ns;
	uint64_t given;
};

enum ox_serve_scope {
	OX_SERVE_DISK,   /* of one disk: option, or key of a disk's section */
	OX_SERVE_GLOBAL, /* of the process: option, or key of [global] */
};
enum {
	OX_SERVE_FLAG = 1 << 0,      /* option without a value; yes or no in a file */
	OX_SERVE_CLI_ONLY = 1 << 1,  /* not in a file */
	OX_SERVE_FILE_ONLY = 1 << 2, /* not an option */
	OX_SERVE_ONCE = 1 << 3,      /* an option that cannot be given twice */
	OX_SERVE_MANY = 1 << 4,      /* each one counts, in a file too; other options: the last */
};

struct ox_serve_key {
	const char *name;
	char letter; /* short option, or 0 */
	uint8_t scope, flags;
	/* 0, or -errno with a sentence that does not name the key. `disk` is NULL for GLOBAL. */
	int (*set)(struct ox_serve_config *config, struct ox_serve_disk *disk, const char *value,
	           struct ox_error *err);
};
extern const struct ox_serve_key ox_serve_keys[];
extern const unsigned ox_serve_key_count; /* at most 64 */

void ox_serve_config_init(struct ox_serve_config *config);
void ox_serve_config_free(struct ox_serve_config *config);
/* A new disk at the end; `where` is taken over.  Earlier pointers to disks become invalid. */
struct ox_serve_disk *ox_serve_config_add(struct ox_serve_config *config, char *where);

/* Is each disk complete and free of contradictions, and are the sockets different ones?  The
 * strings are put into the disk options.  Nothing is opened. */
int ox_serve_config_check(struct ox_serve_config *config, struct ox_error *err) OX_MUST_CHECK;

/* Reads a configuration file in INI form into an initialised config.  The first mistake stops
 * it: "FILE:LINE: [SECTION] KEY: what is wrong".  `skip`: bits of global keys that an option has
 * set already (of OX_SERVE_MANY keys those of the file count too). */
int ox_serve_config_read(struct ox_serve_config *config, const char *path, uint64_t skip,
                         struct ox_error *err) OX_MUST_CHECK;

/* yes, no, true, false, on, off, 1, 0. */
bool ox_serve_parse_bool(const char *word, bool *out);

#endif
