/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What every export has: the table behind ox_export_*().
 */
#ifndef OX_EXPORT_EXPORT_PRIVATE_H
#define OX_EXPORT_EXPORT_PRIVATE_H

#include "export/export.h"

/* All members are required and called on the main loop's thread. */
struct ox_export_ops {
	const char *kind;
	/* Ends all clients and everything that they started; may suspend. */
	void (*stop_co)(struct ox_export *export);
	/* After stop_co. */
	void (*free)(struct ox_export *export);
	/* Fills in all but `kind`. */
	void (*get_info)(struct ox_export *export, struct ox_export_info *info);
};

/* An implementation embeds it first. */
struct ox_export {
	const struct ox_export_ops *ops;
	bool stopped;
};

#endif
