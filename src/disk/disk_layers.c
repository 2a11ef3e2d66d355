/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What an image and its backing images are called and hold, for query-block: kept while the disk
 * is inactive and the images are closed.
 *
 * Locking: main's thread only.
 */
#include "disk/disk_private.h"
#include "image/format.h"

static char *copy(const char *text)
{
	return text ? ox_xstrdup(text) : NULL;
}

void ox_disk_forget_layers(struct ox_disk *disk)
{
	for (unsigned i = 0; i < disk->layer_count; i++) {
		struct ox_disk_layer *layer = &disk->layers[i];

		free(layer->path);
		free(layer->backing_file);
		free(layer->backing_format);
	}
	free(disk->layers);
	disk->layers = NULL;
	disk->layer_count = 0;
}

void ox_disk_learn_layers(struct ox_disk *disk, const struct ox_image *image)
{
	unsigned count = 0;

	ox_disk_forget_layers(disk);
	for (const struct ox_image *i = image; i; i = i->backing)
		count++;
	disk->layers = ox_xcalloc(count, sizeof(*disk->layers));
	for (const struct ox_image *i = image; i; i = i->backing) {
		disk->layers[disk->layer_count++] = (struct ox_disk_layer){
		        .path = ox_xstrdup(i->store->path),
		        .format = i->ops->name,
		        .size = __atomic_load_n(&i->size, __ATOMIC_RELAXED),
		        .cluster_size = i->cluster_size,
		        .encrypted = i->crypto != NULL,
		        .backing_file = copy(i->backing_file),
		        .backing_format = copy(i->backing_format),
		};
	}
}
