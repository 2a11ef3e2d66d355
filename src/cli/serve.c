/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * oxbow serve: from the command line to a checked configuration; server.c does the rest.
 *
 * Also the back-end program conventions of vhost-user: --socket-path, --fd,
 * --print-capabilities, --blk-file, --read-only.
 */
#include "cli/cli.h"
#include "cli/options.h"
#include "cli/server.h"
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>

static const char help[] =
        "Usage: oxbow serve [OPTION]... --vhost-user-blk PATH IMAGE\n"
        "       oxbow serve [OPTION]... --config FILE\n"
        "Gives a guest the disk in IMAGE, over the vhost-user socket PATH, until SIGTERM,\n"
        "SIGINT or the control command 'quit'.\n"
        "\n"
        "A line that begins with 'ready' is printed for each disk when guests may connect: the\n"
        "socket, the size, the format, and what was chosen and why. Options stand in any order;\n"
        "sizes may have a suffix (k, M, G, T). The first word of a choice is the default.\n"
        "\n"
        "The image:\n"
        "  -f, --format FMT       its format; default: found out by looking at it. A guest may\n"
        "                         not turn an image that was guessed to be raw into another\n"
        "                         format, so give -f raw for disks without a partition table\n"
        "      --cache MODE       none: the host's page cache is bypassed (O_DIRECT)\n"
        "                         writeback: the page cache is used\n"
        "                         writethrough: the page cache is used, but a write is complete\n"
        "                         only when it is durable\n"
        "                         directsync: bypassed, and durable when complete\n"
        "                         unsafe: flushes are ignored; a power cut loses data\n"
        "      --aio ENGINE       auto, io_uring, native, threads or sync\n"
        "      --read-only        the guest may not write\n"
        "  -U, --force-share      take no lock, with --read-only: others may write meanwhile,\n"
        "                         and the guest may see anything then\n"
        "      --share-rw         let others write too (file systems made for clusters)\n"
        "      --allow-dir DIR    backing and data files that an image names are opened only\n"
        "                         below its own directory, and below DIR (may be given several\n"
        "                         times)\n"
        "      --key-secret ID    the pass phrase of an encrypted image: see --object\n"
        "      --metadata-cache SIZE\n"
        "                         memory for the tables of qcow2 and qed images; default 32M\n"
        "      --discard-no-unref off|on\n"
        "                         on: a discarded cluster keeps its place in the file, which so\n"
        "                         does not get fragmented\n"
        "\n"
        "The disk that the guest sees:\n"
        "      --name NAME        for messages and the control socket; default: the image's\n"
        "                         file name\n"
        "      --serial TEXT      its serial number, up to 20 characters\n"
        "      --logical-block-size auto|N\n"
        "      --physical-block-size auto|N\n"
        "                         512 to 32768 bytes; auto: as the host's device has them\n"
        "      --queues auto|N    at most N queues, 1 to 64; auto: as many as the guest wants\n"
        "      --discard unmap|ignore\n"
        "                         what the guest gives up is given back to the host, or kept\n"
        "      --detect-zeroes off|on|unmap\n"
        "                         look for zeroes in writes, and store them without the bytes\n"
        "                         (unmap: give their space back too)\n"
        "      --rerror report|ignore|stop|enospc\n"
        "      --werror enospc|report|ignore|stop\n"
        "                         when a read or write fails on the host: report it to the\n"
        "                         guest, ignore it, or stop: hold the request, and try again\n"
        "                         later or at the control command 'cont'; enospc: stop when\n"
        "                         the host is out of space, report everything else\n"
        "\n"
        "The process:\n"
        "      --iothreads N      threads that move data, 1 to 64; default 1\n"
        "      --poll-max-us N    how long a thread may look for new requests before it sleeps,\n"
        "                         in microseconds; 0: never; default 32\n"
        "      --object secret,id=ID,file=PATH\n"
        "                         a pass phrase; also fd=N, credential=NAME (of systemd) instead\n"
        "                         of file=PATH; may be given several times\n"
        "      --control PATH     a control socket (QMP: query-block, block_resize, cont,\n"
        "                         quit; see docs/control.md)\n"
        "      --config FILE      several disks: an INI file with a section for each, named\n"
        "                         after the disk, whose keys are the options above without\n"
        "                         their dashes, image=PATH and vhost-user-blk=PATH; and\n"
        "                         [global] with iothreads, poll-max-us, object and control\n"
        "\n"
        "As other vhost-user back ends (also by the program name oxbow-vhost-user-blk):\n"
        "      --socket-path PATH the same as --vhost-user-blk PATH\n"
        "      --fd N             the socket is open as file descriptor N: listening, or\n"
        "                         connected already (the program ends when that client goes)\n"
        "      --blk-file IMAGE   the same as IMAGE\n"
        "      --print-capabilities\n"
        "                         print what this back end can do, as JSON, and end\n"
        "\n"
        "The first SIGTERM or SIGINT lets running requests finish, makes everything durable and\n"
        "ends with exit status 0; a second one ends at once.\n";

enum {
	OPTION_CONFIG = 0x1000,
	OPTION_PRINT_CAPABILITIES,
	OPTION_KEYS = 0x2000, /* + index in ox_serve_keys */
};

static bool is_option(const struct ox_serve_key *key)
{
	return !(key->flags & OX_SERVE_FILE_ONLY);
}

/* An option's value for getopt: its letter, or a number behind all letters. */
static int option_value(unsigned index)
{
	return ox_serve_keys[index].letter ? ox_serve_keys[index].letter : OPTION_KEYS + (int)index;
}

/* getopt's tables from ours; to free.  Its own short options are put into `letters`. */
static struct option *make_options(char *letters, size_t size)
{
	struct option *options = ox_xcalloc(ox_serve_key_count + 3, sizeof(*options));
	unsigned count = 0;
	size_t used = 1;

	snprintf(letters, size, ":");
	for (unsigned i = 0; i < ox_serve_key_count; i++) {
		const struct ox_serve_key *key = &ox_serve_keys[i];
		bool flag = key->flags & OX_SERVE_FLAG;

		if (!is_option(key))
			continue;
		options[count++] = (struct option){
		        key->name, flag ? no_argument : required_argument, NULL, option_value(i)};
		if (key->letter && used + 2 < size)
			used += (size_t)snprintf(letters + used, size - used, "%c%s", key->letter,
			                         flag ? "" : ":");
	}
	options[count++] = (struct option){"config", required_argument, NULL, OPTION_CONFIG};
	options[count++] =
	        (struct option){"print-capabilities", no_argument, NULL, OPTION_PRINT_CAPABILITIES};
	return options;
}

/* "Other options and arguments should be ignored": also wrong ones, so this is looked for before
 * getopt complains. */
static bool wants_capabilities(int argc, char **argv)
{
	for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
		if (!strcmp(argv[i], "--print-capabilities"))
			return true;
	}
	return false;
}

static void print_capabilities(void)
{
	fputs("{\n"
	      "  \"type\": \"block\",\n"
	      "  \"features\": [\n"
	      "    \"read-only\",\n"
	      "    \"blk-file\"\n"
	      "  ]\n"
	      "}\n",
	      stdout);
}

struct command_line {
	struct ox_serve_config *config;
	const char *config_file;
	const char *disk_option; /* the first one that describes a disk */
};

static int set_option(struct command_line *line, unsigned index, const char *value,
                      struct ox_error *err)
{
	const struct ox_serve_key *key = &ox_serve_keys[index];
	struct ox_serve_disk *disk = NULL;
	struct ox_error why = {0};
	uint64_t *given = &line->config->given;
	int ret;

	if (key->scope == OX_SERVE_DISK) {
		disk = &line->config->disks[0];
		given = &disk->given;
		if (!line->disk_option)
			line->disk_option = key->name;
	}
	if ((key->flags & OX_SERVE_ONCE) && (*given & (1ull << index)))
		return ox_error_set(err, EINVAL,
		                    "--%s is given twice; several disks in one process need "
		                    "--config FILE",
		                    key->name);
	*given |= 1ull << index;
	ret = key->set(line->config, disk, value ? value : "yes", &why);
	if (ret < 0)
		return ox_error_set(err, -ret, "--%s: %s", key->name, why.text);
	return 0;
}

static unsigned index_of_option(int value)
{
	unsigned index = 0;

	while (index < ox_serve_key_count &&
	       (!is_option(&ox_serve_keys[index]) || option_value(index) != value))
		index++;
	return index;
}

static bool is_given(const struct ox_serve_disk *disk, const char *name)
{
	for (unsigned i = 0; i < ox_serve_key_count; i++) {
		if (!strcmp(ox_serve_keys[i].name, name))
			return disk->given & (1ull << i);
	}
	return false;
}

/* The words behind the options: the image. */
static int take_image(struct command_line *line, int argc, char **argv, struct ox_error *err)
{
	struct ox_serve_disk *disk = &line->config->disks[0];

	if (line->config_file && line->disk_option)
		return ox_error_set(err, EINVAL,
		                    "--%s describes a disk: with --config it belongs into a "
		                    "section of %s",
		                    line->disk_option, line->config_file);
	if (line->config_file && optind < argc)
		return ox_error_set(err, EINVAL,
		                    "'%s': with --config the images stand in %s, not on the "
		                    "command line",
		                    argv[optind], line->config_file);
	if (argc - optind + !!disk->image > 1)
		return ox_error_set(err, EINVAL,
		                    "'%s' is a second image; several disks in one process need "
		                    "--config FILE",
		                    argv[argc - 1]);
	if (is_given(disk, "vhost-user-blk") && is_given(disk, "socket-path"))
		return ox_error_set(err, EINVAL,
		                    "--vhost-user-blk and --socket-path are the same; give one");
	if (optind < argc)
		disk->image = ox_xstrdup(argv[optind]);
	return 0;
}

static int parse(struct command_line *line, int argc, char **argv, struct ox_error *err)
{
	struct ox_serve_config *config = line->config;
	char letters[2 * 64 + 2];
	OX_FREE struct option *options = make_options(letters, sizeof(letters));
	int value, ret;

	ox_serve_config_add(config, ox_xstrdup(""));
	opterr = 0;
	optind = 0;
	while ((value = getopt_long(argc, argv, letters, options, NULL)) != -1) {
		if (value == '?' || value == ':') {
			/* Said already: an empty text tells the caller so. */
			ox_cli_bad_option("serve", argv, options);
			return -EINVAL;
		}
		if (value == OPTION_CONFIG && line->config_file)
			return ox_error_set(err, EINVAL, "--config is given twice");
		if (value == OPTION_CONFIG) {
			line->config_file = optarg;
			continue;
		}
		ret = set_option(line, index_of_option(value), optarg, err);
		if (ret < 0)
			return ret;
	}
	ret = take_image(line, argc, argv, err);
	if (ret < 0 || !line->config_file)
		return ret;
	config->count = 0; /* the disk of the command line holds only its `where` */
	free(config->disks[0].where);
	return ox_serve_config_read(config, line->config_file, config->given, err);
}

static int run(int argc, char **argv)
{
	struct ox_serve_config config;
	struct command_line line = {.config = &config};
	struct ox_error err = {0};
	int ret;

	if (wants_capabilities(argc, argv)) {
		print_capabilities();
		return 0;
	}
	ox_serve_config_init(&config);
	ret = parse(&line, argc, argv, &err);
	if (ret == 0)
		ret = ox_serve_config_check(&config, &err);
	if (ret == 0)
		ret = ox_server_run(&config, &err);
	ox_serve_config_free(&config);
	if (ret < 0 && err.code)
		ox_cli_fail(&err);
	return ret < 0 ? 1 : 0;
}

const struct ox_command ox_command_serve = {
        .name = "serve",
        .summary = "give a guest a disk, over a vhost-user socket",
        .help = help,
        .run = run,
};
