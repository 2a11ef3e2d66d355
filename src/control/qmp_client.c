/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The client's side of the control socket, for tools: blocking, one command at a time.
 */
#include "control/qmp_internal.h"
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#define ANSWER_SECONDS 60 /* a server that says nothing for so long is taken for stuck */

struct ox_qmp_client {
	int fd;
	char *path;
	struct ox_qmp_splitter splitter;
	char buffer[4096];
	const char *data; /* in buffer, not looked at yet */
	size_t length;
};

/* The next message, NULL on an error. */
static json_t *receive(struct ox_qmp_client *client, struct ox_error *err)
{
	for (;;) {
		struct ox_qmp_splitter *splitter = &client->splitter;
		enum ox_qmp_split found =
		        ox_qmp_splitter_feed(splitter, &client->data, &client->length);
		json_error_t why;
		json_t *message;
		ssize_t got;

		if (found == OX_QMP_MESSAGE) {
			message = json_loadb(splitter->text, splitter->length, 0, &why);
			if (!message)
				ox_error_set(err, EPROTO, "%s: the answer is not JSON: %s",
				             client->path, why.text);
			return message;
		}
		if (found != OX_QMP_MORE) {
			ox_error_set(err, EPROTO, "%s: the answer is not QMP", client->path);
			return NULL;
		}
		got = recv(client->fd, client->buffer, sizeof(client->buffer), 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			ox_error_set(err, got ? errno : ECONNRESET, "%s: %s", client->path,
			             got == 0          ? "the server closed the connection"
			             : errno == EAGAIN ? "the server does not answer"
			                               : strerror(errno));
			return NULL;
		}
		client->data = client->buffer;
		client->length = (size_t)got;
	}
}

static int send_all(struct ox_qmp_client *client, const char *text, size_t length,
                    struct ox_error *err)
{
	while (length) {
		ssize_t sent = send(client->fd, text, length, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return ox_error_set(err, errno, "%s: %s", client->path, strerror(errno));
		text += sent;
		length -= (size_t)sent;
	}
	return 0;
}

int ox_qmp_execute(struct ox_qmp_client *client, const char *command, const char *arguments,
                   char **result, struct ox_error *err)
{
	OX_FREE char *text = ox_xasprintf("{\"execute\": \"%s\", \"arguments\": %s}\n", command,
	                                  arguments ? arguments : "{}");
	const json_t *value;
	json_t *message;
	int ret = send_all(client, text, strlen(text), err);

	if (ret < 0)
		return ret;
	for (;;) {
		message = receive(client, err);
		if (!message)
			return -EPROTO;
		if (!json_object_get(message, "event"))
			break;
		json_decref(message);
	}
	value = json_object_get(message, "return");
	if (value) {
		if (result)
			*result = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
	} else {
		const char *why = json_string_value(
		        json_object_get(json_object_get(message, "error"), "desc"));

		ret = ox_error_set(err, EIO, "%s", why ? why : "the server refused");
	}
	json_decref(message);
	return ret;
}

int ox_qmp_connect(const char *socket_path, struct ox_qmp_client **out, struct ox_error *err)
{
	const struct timeval limit = {.tv_sec = ANSWER_SECONDS};
	struct ox_qmp_client *client = ox_xcalloc(1, sizeof(*client));
	json_t *greeting = NULL;
	int ret;

	client->fd = -1;
	client->path = ox_xstrdup(socket_path);
	ret = ox_unix_connect(socket_path, &client->fd, err);
	if (ret < 0)
		goto fail;
	if (setsockopt(client->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0 ||
	    setsockopt(client->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) < 0) {
		ret = ox_error_set(err, errno, "%s: %s", socket_path, strerror(errno));
		goto fail;
	}
	greeting = receive(client, err);
	ret = -EPROTO;
	if (!greeting)
		goto fail;
	if (!json_object_get(greeting, "QMP")) {
		ox_error_set(err, EPROTO, "%s: this is not a control socket", socket_path);
		goto fail;
	}
	json_decref(ox_steal_ptr(greeting));
	ret = ox_qmp_execute(client, "qmp_capabilities", NULL, NULL, err);
	if (ret < 0)
		goto fail;
	*out = client;
	return 0;
fail:
	json_decref(greeting);
	ox_qmp_disconnect(client);
	return ret;
}

char *ox_qmp_resize_arguments(const char *device, uint64_t size, bool shrink)
{
	json_t *object = json_pack("{s:o, s:I, s:b}", "device", ox_qmp_text(device), "size",
	                           (json_int_t)size, "shrink", shrink);
	char *text = json_dumps(object, JSON_COMPACT);

	json_decref(object);
	return text;
}

void ox_qmp_disconnect(struct ox_qmp_client *client)
{
	if (client->fd >= 0)
		close(client->fd);
	ox_qmp_splitter_free(&client->splitter);
	free(client->path);
	free(client);
}
