/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fuzz target: the configuration file of `oxbow serve`.  Input: the file.
 */
#include "cli/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ox_serve_config config;
	struct ox_error err = {0};
	char path[32];
	int fd = memfd_create("config", MFD_CLOEXEC);
	int rc;

	if (fd < 0 || write(fd, data, size) != (ssize_t)size)
		abort();
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	ox_serve_config_init(&config);
	rc = ox_serve_config_read(&config, path, 0, &err);
	if ((rc < 0) != (err.code != 0))
		abort();
	if (rc == 0) {
		rc = ox_serve_config_check(&config, &err);
		if ((rc < 0) != (err.code != 0))
			abort();
	}
	ox_serve_config_free(&config);
	close(fd);
	return 0;
}
