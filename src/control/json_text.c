/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Names of files as JSON text: paths are bytes, JSON is UTF-8.
 */
#include "control/qmp_internal.h"

json_t *ox_qmp_text(const char *text)
{
	json_t *string = json_string(text);
	OX_FREE char *copy = NULL;

	if (string)
		return string;
	copy = ox_xstrdup(text);
	for (char *p = copy; *p; p++) {
		if ((unsigned char)*p >= 0x80)
			*p = '?';
	}
	return json_string(copy);
}
