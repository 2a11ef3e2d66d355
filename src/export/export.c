/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Exports of all kinds: the checked way into the table.
 */
#include "export/export_private.h"

#include <assert.h>

void ox_export_stop_co(struct ox_export *export)
{
	if (export->stopped)
		return;
	export->ops->stop_co(export);
	export->stopped = true;
}

void ox_export_free(struct ox_export *export)
{
	if (!export)
		return;
	assert(export->stopped);
	export->ops->free(export);
}

void ox_export_get_info(struct ox_export *export, struct ox_export_info *info)
{
	*info = (struct ox_export_info){.kind = export->ops->kind};
	export->ops->get_info(export, info);
}
