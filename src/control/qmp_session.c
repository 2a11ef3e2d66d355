/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * One client of the control socket.
 *
 * A session reads, splits and answers one message at a time.  Its states:
 *
 *     READING -- a command was started --> BUSY (its input waits) -- answered --> READING
 *     READING or BUSY -- the client left, or does not read --> GONE -- no command runs --> freed
 *
 * Invariants: a session that is gone has no descriptor and no watch; it is freed by its deferred
 * call at the end of a turn, never inside a function that got it as an argument.  What is waiting
 * to be sent is bounded by MAX_OUTPUT; a client that lets more than PAUSE_OUTPUT wait is not read
 * from until it has caught up.
 */
#include "control/qmp_internal.h"
#include <errno.h>
#include <oxbow/log.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#define MAX_OUTPUT   (4u * 1024 * 1024) /* bytes */
#define PAUSE_OUTPUT (64u * 1024)

struct qmp_session {
	struct ox_qmp *qmp;
	struct ox_watch watch;
	struct ox_deferred later; /* goes on with the input, or frees a session that is gone */
	struct ox_qmp_splitter splitter;
	char input[4096];
	const char *data; /* in input, not looked at yet */
	size_t data_length;
	char *output;
	size_t output_start, output_end, output_capacity;
	bool negotiated;
	bool busy; /* a command runs */
	bool gone;
	bool eof; /* the client will send nothing more; it may still read */
	TAILQ_ENTRY(qmp_session) link;
};

/* A command of a session that runs. */
struct running_call {
	struct qmp_session *session;
	const struct qmp_command *command;
	json_t *message;
	struct qmp_call call;
};

static void process(struct qmp_session *session);

bool ox_qmp_session_is_ready(const struct qmp_session *session)
{
	return session->negotiated && !session->gone;
}

struct qmp_session *ox_qmp_session_next(struct ox_qmp *qmp, struct qmp_session *session)
{
	return session ? TAILQ_NEXT(session, link) : TAILQ_FIRST(&qmp->sessions);
}

static void free_session(struct qmp_session *session)
{
	struct ox_qmp *qmp = session->qmp;

	ox_deferred_cancel(qmp->options.main, &session->later);
	ox_watch_remove(&session->watch);
	if (session->watch.fd >= 0)
		close(session->watch.fd);
	TAILQ_REMOVE(&qmp->sessions, session, link);
	qmp->session_count--;
	ox_qmp_splitter_free(&session->splitter);
	free(session->output);
	free(session);
	ox_qmp_session_freed(qmp);
}

/* The client is lost; the session is freed soon, once no command of its own runs. */
static void lose(struct qmp_session *session)
{
	if (session->gone)
		return;
	session->gone = true;
	ox_watch_remove(&session->watch);
	close(session->watch.fd);
	session->watch.fd = -1;
	if (!session->busy)
		ox_loop_defer(session->qmp->options.main, &session->later);
}

static size_t output_waiting(const struct qmp_session *session)
{
	return session->output_end - session->output_start;
}

static void update_events(struct qmp_session *session)
{
	uint32_t events = 0;

	if (session->gone || !session->watch.loop)
		return;
	if (!session->busy && !session->eof && output_waiting(session) <= PAUSE_OUTPUT)
		events |= EPOLLIN;
	if (output_waiting(session))
		events |= EPOLLOUT;
	if (events != session->watch.events)
		ox_watch_modify(&session->watch, events);
}

/* Sends what the socket takes now. */
static void flush_output(struct qmp_session *session)
{
	while (!session->gone && output_waiting(session)) {
		ssize_t sent = send(session->watch.fd, session->output + session->output_start,
		                    output_waiting(session), MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			break;
		if (sent < 0) {
			lose(session);
			return;
		}
		session->output_start += (size_t)sent;
	}
	if (!output_waiting(session))
		session->output_start = session->output_end = 0;
}

/* Puts bytes behind what is waiting; false: there is no room. */
static bool append_output(struct qmp_session *session, const char *text, size_t length)
{
	size_t waiting = output_waiting(session);

	if (length > MAX_OUTPUT || waiting > MAX_OUTPUT - length)
		return false;
	if (session->output_end + length > session->output_capacity) {
		size_t capacity = ox_max(2 * (waiting + length), (size_t)4096);
		char *output = malloc(capacity);

		if (!output)
			return false;
		if (waiting)
			memcpy(output, session->output + session->output_start, waiting);
		free(session->output);
		session->output = output;
		session->output_capacity = capacity;
		session->output_start = 0;
		session->output_end = waiting;
	}
	memcpy(session->output + session->output_end, text, length);
	session->output_end += length;
	return true;
}

void ox_qmp_session_send(struct qmp_session *session, const json_t *message)
{
	char *text;

	if (session->gone)
		return;
	text = json_dumps(message, JSON_COMPACT);
	if (!text || !append_output(session, text, strlen(text)) ||
	    !append_output(session, "\r\n", 2)) {
		ox_log(OX_LOG_WARNING, "%s: a client does not read its answers; disconnected",
		       session->qmp->path);
		lose(session);
	}
	free(text);
	flush_output(session);
	update_events(session);
}

/* `id` may be NULL. */
static void send_error(struct qmp_session *session, const char *class, const char *text,
                       const json_t *id)
{
	json_t *answer = json_pack("{s:{s:s, s:s}}", "error", "class", class, "desc", text);

	/* The text may quote bytes of the client's that are not UTF-8. */
	if (!answer)
		answer = json_pack("{s:{s:s, s:s}}", "error", "class", class, "desc",
		                   "the request holds text that is not UTF-8");
	if (!answer)
		return;
	if (id)
		json_object_set(answer, "id", (json_t *)id);
	ox_qmp_session_send(session, answer);
	json_decref(answer);
}

static void send_errorf(struct qmp_session *session, const char *class, const json_t *id,
                        const char *fmt, ...) __attribute__((format(printf, 4, 5)));
static void send_errorf(struct qmp_session *session, const char *class, const json_t *id,
                        const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	send_error(session, class, text, id);
}

/* --- running a command --------------------------------------------------------------------- */

static void send_answer(struct qmp_session *session, struct qmp_call *call, const json_t *id)
{
	json_t *answer;

	if (call->err.code) {
		json_decref(call->result);
		send_error(session, call->error_class ? call->error_class : "GenericError",
		           call->err.text, id);
		return;
	}
	answer = json_pack("{s:o}", "return", call->result ? call->result : json_object());
	if (!answer)
		return;
	if (id)
		json_object_set(answer, "id", (json_t *)id);
	ox_qmp_session_send(session, answer);
	json_decref(answer);
}

/* The fiber of one command. */
static void run_call_co(void *arg)
{
	struct running_call *running = arg;
	struct qmp_session *session = running->session;
	struct ox_qmp *qmp = session->qmp;
	bool quit;

	running->command->run_co(&running->call);
	session->busy = false;
	send_answer(session, &running->call, json_object_get(running->message, "id"));
	quit = running->call.quit;
	json_decref(running->call.arguments);
	json_decref(running->message);
	free(running);
	/* Goes on with what the client sent meanwhile, or frees it. */
	ox_loop_defer(qmp->options.main, &session->later);
	qmp->quit |= quit;
	if (quit)
		qmp->options.quit(qmp->options.arg);
	if (--qmp->running == 0 && qmp->waiter)
		ox_fiber_resume(ox_steal_ptr(qmp->waiter));
}

static void start_call(struct qmp_session *session, const struct qmp_command *command,
                       json_t *message, json_t *arguments)
{
	struct running_call *running = ox_xcalloc(1, sizeof(*running));

	running->session = session;
	running->command = command;
	running->message = json_incref(message);
	running->call.qmp = session->qmp;
	running->call.arguments = arguments ? json_incref(arguments) : json_object();
	session->busy = true;
	session->qmp->running++;
	if (ox_fiber_start(run_call_co, running) < 0) {
		session->busy = false;
		session->qmp->running--;
		send_error(session, "GenericError", "out of memory",
		           json_object_get(message, "id"));
		json_decref(running->call.arguments);
		json_decref(running->message);
		free(running);
	}
}

static const char *type_word(char type)
{
	return type == 's' ? "string" : type == 'i' ? "integer" : "boolean";
}

static bool has_type(const json_t *value, char type)
{
	return type == 's'   ? json_is_string(value)
	       : type == 'i' ? json_is_integer(value)
	                     : json_is_boolean(value);
}

static const struct qmp_parameter *find_parameter(const struct qmp_command *command,
                                                  const char *name)
{
	for (const struct qmp_parameter *p = command->parameters; p && p->name; p++) {
		if (!strcmp(p->name, name))
			return p;
	}
	return NULL;
}

/* Are the arguments what the command takes?  Answers the client if not. */
static bool check_arguments(struct qmp_session *session, const struct qmp_command *command,
                            json_t *arguments, const json_t *id)
{
	const char *name;
	json_t *value;

	json_object_foreach(arguments, name, value)
	{
		const struct qmp_parameter *parameter = find_parameter(command, name);

		if (!parameter) {
			send_errorf(session, "GenericError", id, "Parameter '%s' is unexpected",
			            name);
			return false;
		}
		if (!has_type(value, parameter->type)) {
			send_errorf(session, "GenericError", id,
			            "Invalid parameter type for '%s', expected: %s", name,
			            type_word(parameter->type));
			return false;
		}
	}
	for (const struct qmp_parameter *p = command->parameters; p && p->name; p++) {
		if (!p->optional && !json_object_get(arguments, p->name)) {
			send_errorf(session, "GenericError", id, "Parameter '%s' is missing",
			            p->name);
			return false;
		}
	}
	return true;
}

static const struct qmp_command *find_command(const char *name)
{
	for (const struct qmp_command *command = ox_qmp_commands; command->name; command++) {
		if (!strcmp(command->name, name))
			return command;
	}
	return NULL;
}

/* Before the handshake only qmp_capabilities is there, afterwards everything else is. */
static void dispatch(struct qmp_session *session, json_t *message, const char *name,
                     json_t *arguments, const json_t *id)
{
	bool handshake = !strcmp(name, "qmp_capabilities");
	const struct qmp_command *command;

	if (!session->negotiated) {
		json_t *answer;

		if (!handshake) {
			send_error(session, "CommandNotFound",
			           "Expecting capabilities negotiation with 'qmp_capabilities'",
			           id);
			return;
		}
		if (json_array_size(json_object_get(arguments, "enable"))) {
			send_error(session, "GenericError", "there are no capabilities to enable",
			           id);
			return;
		}
		session->negotiated = true;
		answer = json_pack("{s:{}, s:O*}", "return", "id", id);
		if (answer)
			ox_qmp_session_send(session, answer);
		json_decref(answer);
		return;
	}
	if (handshake) {
		send_error(session, "CommandNotFound",
		           "Capabilities negotiation is already complete, command ignored", id);
		return;
	}
	command = find_command(name);
	if (!command) {
		send_errorf(session, "CommandNotFound", id, "The command %s has not been found",
		            name);
		return;
	}
	if (check_arguments(session, command, arguments, id))
		start_call(session, command, message, arguments);
}

static void handle_message(struct qmp_session *session)
{
	json_error_t why;
	json_t *message = json_loadb(session->splitter.text, session->splitter.length,
	                             JSON_REJECT_DUPLICATES, &why);
	json_t *execute, *arguments, *value;
	const json_t *id;
	const char *name;

	if (!message) {
		send_errorf(session, "GenericError", NULL, "JSON parse error, %s", why.text);
		return;
	}
	if (!json_is_object(message)) {
		send_error(session, "GenericError", "QMP input must be a JSON object", NULL);
		json_decref(message);
		return;
	}
	execute = json_object_get(message, "execute");
	arguments = json_object_get(message, "arguments");
	id = json_object_get(message, "id");
	json_object_foreach(message, name, value)
	{
		if (value != execute && value != arguments && value != id) {
			send_errorf(session, "GenericError", id,
			            "QMP input member '%s' is unexpected", name);
			json_decref(message);
			return;
		}
	}
	if (!json_is_string(execute))
		send_error(session, "GenericError",
		           execute ? "QMP input member 'execute' must be a string"
		                   : "QMP input lacks member 'execute'",
		           id);
	else if (arguments && !json_is_object(arguments))
		send_error(session, "GenericError",
		           "QMP input member 'arguments' must be an object", id);
	else
		dispatch(session, message, json_string_value(execute), arguments, id);
	json_decref(message);
}

/* --- input --------------------------------------------------------------------------------- */

static void process(struct qmp_session *session)
{
	while (!session->gone && !session->busy && !session->qmp->stopping &&
	       session->data_length) {
		switch (ox_qmp_splitter_feed(&session->splitter, &session->data,
		                             &session->data_length)) {
		case OX_QMP_MORE:
			break;
		case OX_QMP_MESSAGE:
			handle_message(session);
			break;
		case OX_QMP_GARBAGE:
			send_error(session, "GenericError", "JSON parse error, invalid input",
			           NULL);
			break;
		case OX_QMP_TOO_BIG:
			send_error(session, "GenericError",
			           "the message is too long (more than 1 MiB) or nested too deeply",
			           NULL);
			break;
		}
	}
	/* A client that closed its sending side gets its answers first. */
	if (session->eof && !session->busy && !session->data_length && !output_waiting(session))
		lose(session);
}

static void read_input(struct qmp_session *session)
{
	ssize_t got;

	if (session->data_length)
		return;
	got = recv(session->watch.fd, session->input, sizeof(session->input), MSG_DONTWAIT);
	if (got < 0) {
		if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
			lose(session);
		return;
	}
	session->eof = got == 0;
	session->data = session->input;
	session->data_length = (size_t)got;
}

static void on_ready(struct ox_watch *watch, uint32_t revents)
{
	struct qmp_session *session = ox_container_of(watch, struct qmp_session, watch);

	if (revents & EPOLLOUT)
		flush_output(session);
	if (!session->gone && (watch->events & EPOLLIN) && (revents & ~(uint32_t)EPOLLOUT))
		read_input(session);
	else if (!session->gone && (revents & (EPOLLHUP | EPOLLERR)))
		lose(session); /* nobody reads the answer of the command that runs */
	process(session);
	update_events(session);
}

static void go_on(struct ox_deferred *deferred)
{
	struct qmp_session *session = ox_container_of(deferred, struct qmp_session, later);

	if (!session->gone) {
		process(session);
		update_events(session);
	}
	if (session->gone && !session->busy)
		free_session(session);
}

void ox_qmp_session_new(struct ox_qmp *qmp, int fd)
{
	struct qmp_session *session = ox_xcalloc(1, sizeof(*session));
	json_t *greeting;

	session->qmp = qmp;
	session->watch.fd = fd;
	session->watch.events = EPOLLIN;
	session->watch.fn = on_ready;
	session->later.fn = go_on;
	TAILQ_INSERT_TAIL(&qmp->sessions, session, link);
	qmp->session_count++;
	if (ox_watch_add(qmp->options.main, &session->watch) < 0) {
		lose(session);
		return;
	}
	greeting = json_pack("{s:{s:o, s:[]}}", "QMP", "version", ox_qmp_version(), "capabilities");
	if (greeting)
		ox_qmp_session_send(session, greeting);
	json_decref(greeting);
}

void ox_qmp_session_end_co(struct qmp_session *session, uint64_t deadline)
{
	ox_watch_remove(&session->watch);
	flush_output(session);
	while (!session->gone && output_waiting(session)) {
		uint64_t now = ox_clock_ns();

		if (now >= deadline ||
		    ox_wait_fd_co(session->watch.fd, EPOLLOUT, (int64_t)(deadline - now)) < 0)
			break;
		flush_output(session);
	}
	free_session(session);
}
