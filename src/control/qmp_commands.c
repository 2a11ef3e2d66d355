/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The commands of the control socket.  Where QEMU has a command of the same name, arguments and
 * answers have its shape; what is Oxbow's own stands in a member "oxbow".
 */
#include "control/qmp_internal.h"
#include "oxbow-config.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

json_t *ox_qmp_version(void)
{
	int major = 0, minor = 0, micro = 0;

	if (sscanf(OX_VERSION, "%d.%d.%d", &major, &minor, &micro) < 1)
		major = 0;
	return json_pack("{s:{s:i, s:i, s:i}, s:s}", "qemu", "major", major, "minor", minor,
	                 "micro", micro, "package", "oxbow " OX_VERSION);
}

/* --- query-block ----------------------------------------------------------------------------- */

/* Room that a file takes, asked on a thread that may block: it may be on a network. */
struct allocation {
	const char *path;
	uint64_t dev, ino;
	uint64_t bytes;
};

static int ask_allocation(void *arg)
{
	struct allocation *allocation = arg;
	struct stat st;

	if (stat(allocation->path, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode) || st.st_dev != allocation->dev || st.st_ino != allocation->ino)
		return -ENOENT;
	allocation->bytes = (uint64_t)st.st_blocks * 512;
	return 0;
}

static json_t *operation_stats(const struct ox_disk_op_stats *op)
{
	return json_pack("{s:I, s:I, s:I, s:I, s:{s:I, s:I, s:I}}", "operations",
	                 (json_int_t)op->operations, "bytes", (json_int_t)op->bytes, "failed",
	                 (json_int_t)op->failed, "merged", (json_int_t)op->merged, "latency-ns",
	                 "p50", (json_int_t)ox_histogram_percentile(&op->latency, 50), "p99",
	                 (json_int_t)ox_histogram_percentile(&op->latency, 99), "max",
	                 (json_int_t)op->latency.max);
}

static json_t *disk_stats(struct ox_disk *disk)
{
	static const char *const names[OX_DISK_STATS_OPS] = {
	        [OX_IO_READ] = "read",       [OX_IO_WRITE] = "write",
	        [OX_IO_FLUSH] = "flush",     [OX_IO_ZERO] = "write-zeroes",
	        [OX_IO_DISCARD] = "discard", [OX_IO_SECURE_ERASE] = "secure-erase",
	};
	struct ox_disk_stats *stats = ox_xcalloc(1, sizeof(*stats));
	json_t *object;

	ox_disk_get_stats(disk, stats);
	object = json_pack("{s:I, s:I, s:I}", "in-flight", (json_int_t)stats->in_flight, "held",
	                   (json_int_t)stats->held, "invalid", (json_int_t)stats->invalid);
	for (unsigned i = 0; object && i < OX_DISK_STATS_OPS; i++)
		json_object_set_new(object, names[i], operation_stats(&stats->op[i]));
	free(stats);
	return object;
}

static const char *io_status(const struct ox_disk_info *info)
{
	if (!info->stopped)
		return "ok";
	return info->stop_error == ENOSPC ? "nospace" : "failed";
}

/* What QEMU does not have. */
static json_t *own_object(struct ox_disk *disk, struct ox_export *export,
                          const struct ox_disk_info *info)
{
	struct ox_export_info out;
	json_t *object;

	ox_export_get_info(export, &out);
	object = json_pack("{s:s, s:s, s:s, s:s, s:b, s:b, s:I, s:I, s:I}", "cache",
	                   ox_cache_name(info->cache), "aio", ox_aio_name(info->aio), "aio-reason",
	                   info->aio_reason ? info->aio_reason : "", "serial", info->serial,
	                   "active", info->active, "stopped", info->stopped, "dev",
	                   (json_int_t)info->dev, "ino", (json_int_t)info->ino, "size",
	                   (json_int_t)info->size);
	if (!object)
		return NULL;
	if (info->stopped)
		json_object_set_new(object, "stop-reason", json_string(strerror(info->stop_error)));
	json_object_set_new(object, "logical-block-size", json_integer(info->logical_block_size));
	json_object_set_new(object, "physical-block-size", json_integer(info->physical_block_size));
	json_object_set_new(object, "export",
	                    json_pack("{s:s, s:o*, s:b, s:i}", "type", out.kind, "path",
	                              out.path ? ox_qmp_text(out.path) : NULL, "connected",
	                              out.connected, "queues-running", (int)out.queues_running));
	json_object_set_new(object, "stats", disk_stats(disk));
	return object;
}

/* An image and, within it, what lies below: QEMU's ImageInfo. */
static json_t *image_object(const struct ox_disk_info *info, unsigned index)
{
	const struct ox_disk_layer *layer = &info->layers[index];
	bool has_below = index + 1 < info->layer_count;
	json_t *image = json_pack("{s:o, s:s, s:I, s:b}", "filename", ox_qmp_text(layer->path),
	                          "format", layer->format, "virtual-size",
	                          (json_int_t)(index ? layer->size : info->size), "dirty-flag", 0);

	if (!image)
		return NULL;
	if (layer->cluster_size > 1)
		json_object_set_new(image, "cluster-size",
		                    json_integer((json_int_t)layer->cluster_size));
	if (layer->encrypted)
		json_object_set_new(image, "encrypted", json_true());
	if (layer->backing_file)
		json_object_set_new(image, "backing-filename", ox_qmp_text(layer->backing_file));
	if (layer->backing_format)
		json_object_set_new(image, "backing-filename-format",
		                    ox_qmp_text(layer->backing_format));
	if (has_below) {
		json_object_set_new(image, "full-backing-filename",
		                    ox_qmp_text(info->layers[index + 1].path));
		json_object_set_new(image, "backing-image", image_object(info, index + 1));
	}
	return image;
}

static json_t *inserted_object(const struct ox_disk_info *info, const struct allocation *allocation)
{
	json_t *image = image_object(info, 0);
	json_t *object;

	if (image && allocation)
		json_object_set_new(image, "actual-size",
		                    json_integer((json_int_t)allocation->bytes));
	object = json_pack(
	        "{s:o, s:o, s:b, s:s, s:b, s:i, s:s, s:i, s:{s:b, s:b, s:b}, s:o}", "file",
	        ox_qmp_text(info->path), "node-name", ox_qmp_text(info->name), "ro",
	        info->read_only, "drv", info->format, "encrypted", info->layers[0].encrypted,
	        "backing_file_depth", (int)info->layer_count - 1, "detect_zeroes",
	        ox_detect_zeroes_name(info->detect_zeroes), "write_threshold", 0, "cache",
	        "writeback", info->writeback, "direct", ox_cache_is_direct(info->cache), "no-flush",
	        info->cache == OX_CACHE_UNSAFE, "image", image);
	if (object && info->layers[0].backing_file)
		json_object_set_new(object, "backing_file",
		                    ox_qmp_text(info->layers[0].backing_file));
	for (unsigned i = 0; object && i < 6; i++) {
		static const char *const limits[] = {"bps",  "bps_rd",  "bps_wr",
		                                     "iops", "iops_rd", "iops_wr"};

		json_object_set_new(object, limits[i], json_integer(0));
	}
	return object;
}

static void query_block_co(struct qmp_call *call)
{
	json_t *list = json_array();

	for (unsigned i = 0; i < call->qmp->options.count; i++) {
		struct ox_disk *disk = call->qmp->options.disks[i];
		struct allocation allocation;
		struct ox_disk_info info;
		bool known;

		ox_disk_get_info(disk, &info);
		allocation = (struct allocation){info.path, info.dev, info.ino, 0};
		known = ox_worker_call_co(ask_allocation, &allocation) == 0;
		ox_disk_get_info(disk, &info);
		json_array_append_new(
		        list,
		        json_pack("{s:o, s:s, s:s, s:b, s:b, s:s, s:o, s:o}", "device",
		                  ox_qmp_text(info.name), "qdev", "", "type", "unknown",
		                  "removable", 0, "locked", 0, "io-status", io_status(&info),
		                  "inserted", inserted_object(&info, known ? &allocation : NULL),
		                  "oxbow", own_object(disk, call->qmp->options.exports[i], &info)));
	}
	call->result = list;
}

/* --- block_resize ---------------------------------------------------------------------------- */

static struct ox_disk *find_disk(struct qmp_call *call)
{
	const json_t *device = json_object_get(call->arguments, "device");
	const json_t *node = json_object_get(call->arguments, "node-name");
	const char *name = json_string_value(device ? device : node);

	if (!device == !node) {
		ox_error_set(&call->err, EINVAL, "either 'device' or 'node-name' must be given");
		return NULL;
	}
	for (unsigned i = 0; i < call->qmp->options.count; i++) {
		struct ox_disk_info info;

		ox_disk_get_info(call->qmp->options.disks[i], &info);
		if (!strcmp(info.name, name))
			return call->qmp->options.disks[i];
	}
	call->error_class = device ? "DeviceNotFound" : NULL;
	ox_error_set(&call->err, ENODEV, "Device '%s' not found", name);
	return NULL;
}

static void block_resize_co(struct qmp_call *call)
{
	json_int_t size = json_integer_value(json_object_get(call->arguments, "size"));
	bool shrink = json_is_true(json_object_get(call->arguments, "shrink"));
	struct ox_disk *disk = find_disk(call);

	if (!disk)
		return;
	if (size < 0) {
		ox_error_set(&call->err, EINVAL,
		             "Parameter 'size' expects a size that is not negative");
		return;
	}
	if (ox_disk_resize_co(disk, (uint64_t)size, shrink, &call->err) < 0 && !call->err.code)
		ox_error_set(&call->err, EIO, "the disk could not be resized");
}

/* --- the rest -------------------------------------------------------------------------------- */

static void cont_co(struct qmp_call *call)
{
	for (unsigned i = 0; i < call->qmp->options.count; i++)
		ox_disk_continue(call->qmp->options.disks[i]);
}

static void quit_co(struct qmp_call *call)
{
	call->quit = true;
}

static void query_status_co(struct qmp_call *call)
{
	bool stopped = false;

	for (unsigned i = 0; i < call->qmp->options.count; i++) {
		struct ox_disk_info info;

		ox_disk_get_info(call->qmp->options.disks[i], &info);
		stopped |= info.stopped;
	}
	call->result = json_pack("{s:b, s:b, s:s}", "running", !stopped, "singlestep", 0, "status",
	                         stopped ? "io-error" : "running");
}

static void query_version_co(struct qmp_call *call)
{
	call->result = ox_qmp_version();
}

static void query_name_co(struct qmp_call *call)
{
	struct ox_disk_info info;

	if (call->qmp->options.count != 1)
		return;
	ox_disk_get_info(call->qmp->options.disks[0], &info);
	call->result = json_pack("{s:o}", "name", ox_qmp_text(info.name));
}

static void query_commands_co(struct qmp_call *call)
{
	json_t *list = json_array();

	json_array_append_new(list, json_pack("{s:s}", "name", "qmp_capabilities"));
	for (const struct qmp_command *command = ox_qmp_commands; command->name; command++)
		json_array_append_new(list, json_pack("{s:s}", "name", command->name));
	call->result = list;
}

static const struct qmp_parameter resize_parameters[] = {
        {"device", 's', true}, {"node-name", 's', true}, {"size", 'i', false},
        {"shrink", 'b', true}, {NULL, 0, false},
};

const struct qmp_command ox_qmp_commands[] = {
        {"query-block", NULL, query_block_co},
        {"block_resize", resize_parameters, block_resize_co},
        {"cont", NULL, cont_co},
        {"quit", NULL, quit_co},
        {"query-status", NULL, query_status_co},
        {"query-version", NULL, query_version_co},
        {"query-name", NULL, query_name_co},
        {"query-commands", NULL, query_commands_co},
        {NULL, NULL, NULL},
};
