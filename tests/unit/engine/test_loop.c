/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The event loop: posts, timers, descriptors, pollers, calls between loops, sleeping.
 */
#include "base/fiber.h"
#include "engine/engine.h"
#include "engine/loop.h"
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <sys/eventfd.h>

static struct ox_loop *new_loop(uint64_t poll)
{
	struct ox_loop_options options = {.name = "test", .poll_max_ns = poll};
	struct ox_error err = {0};
	struct ox_loop *loop = ox_loop_new(&options, &err);

	assert_non_null(loop);
	return loop;
}

/* Runs each case on a loop that sleeps in epoll and on one that sleeps in io_uring. */
static void for_both(void (*fn)(struct ox_loop *loop))
{
	struct ox_loop *loop = new_loop(0);

	fn(loop);
	ox_loop_free(loop);
	loop = new_loop(OX_LOOP_POLL_MAX_NS);
	ox_loop_engine(loop, OX_AIO_IO_URING);
	fn(loop);
	ox_loop_free(loop);
}

struct posted {
	struct ox_post post;
	int *log;
	int *count;
	int value;
	bool *done;
};

static void posted(struct ox_post *post)
{
	struct posted *p = ox_container_of(post, struct posted, post);

	p->log[(*p->count)++] = p->value;
	if (p->done)
		*p->done = true;
}

static void posts_in_order(struct ox_loop *loop)
{
	int log[3], count = 0;
	bool done = false;
	struct posted p[3] = {
	        {{.fn = posted}, log, &count, 1, NULL},
	        {{.fn = posted}, log, &count, 2, NULL},
	        {{.fn = posted}, log, &count, 3, &done},
	};

	for (int i = 0; i < 3; i++)
		ox_loop_post(loop, &p[i].post);
	ox_loop_run_until(loop, &done);
	assert_int_equal(count, 3);
	for (int i = 0; i < 3; i++)
		assert_int_equal(log[i], i + 1);
}

static void test_posts(void **state)
{
	for_both(posts_in_order);
}

#define POSTERS 4
#define POSTS   20000

struct poster {
	pthread_t thread;
	struct ox_loop *loop;
	struct counted {
		struct ox_post post;
		struct poster *poster;
	} * items;
	int seen;
	int *total;
	bool *done;
};

static void counted(struct ox_post *post)
{
	struct counted *c = ox_container_of(post, struct counted, post);

	/* In order for one poster. */
	assert_ptr_equal(c, &c->poster->items[c->poster->seen]);
	c->poster->seen++;
	if (++*c->poster->total == POSTERS * POSTS)
		*c->poster->done = true;
}

static void *poster_main(void *arg)
{
	struct poster *poster = arg;

	for (int i = 0; i < POSTS; i++) {
		poster->items[i].post.fn = counted;
		poster->items[i].poster = poster;
		ox_loop_post(poster->loop, &poster->items[i].post);
		if (i % 1000 == 0)
			usleep(100); /* so that the loop falls asleep now and then */
	}
	return NULL;
}

static void posts_from_threads(struct ox_loop *loop)
{
	struct poster poster[POSTERS] = {0};
	int total = 0;
	bool done = false;

	for (int i = 0; i < POSTERS; i++) {
		poster[i].loop = loop;
		poster[i].total = &total;
		poster[i].done = &done;
		poster[i].items = ox_xcalloc(POSTS, sizeof(*poster[i].items));
		pthread_create(&poster[i].thread, NULL, poster_main, &poster[i]);
	}
	ox_loop_run_until(loop, &done);
	for (int i = 0; i < POSTERS; i++) {
		pthread_join(poster[i].thread, NULL);
		free(poster[i].items);
	}
	assert_int_equal(total, POSTERS * POSTS);
}

static void test_posts_from_threads(void **state)
{
	for_both(posts_from_threads);
}

struct order {
	struct ox_timer timer;
	int value, *log, *count;
	bool *done;
};

static void fired(struct ox_timer *timer)
{
	struct order *o = ox_container_of(timer, struct order, timer);

	o->log[(*o->count)++] = o->value;
	if (o->done)
		*o->done = true;
}

static void timers_in_order(struct ox_loop *loop)
{
	enum { N = 40 };
	struct order o[N];
	int log[N], count = 0;
	bool done = false;

	for (int i = 0; i < N; i++) {
		o[i] = (struct order){{.fn = fired}, i, log, &count, i == N - 1 ? &done : NULL};
		/* Armed from the latest to the earliest. */
	}
	for (int i = N - 1; i >= 0; i--)
		ox_timer_arm(loop, &o[i].timer, 1000000u + (uint64_t)i * 500000u);
	for (int i = 1; i < N - 1; i += 3)
		ox_timer_cancel(&o[i].timer);
	ox_loop_run_until(loop, &done);
	for (int i = 0, k = 0; i < N; i++)
		if (i % 3 != 1 || i >= N - 1)
			assert_int_equal(log[k++], i);
}

static void test_timers(void **state)
{
	for_both(timers_in_order);
}

struct reader {
	struct ox_watch watch;
	int seen;
	bool done;
};

static void readable(struct ox_watch *watch, uint32_t revents)
{
	struct reader *r = ox_container_of(watch, struct reader, watch);
	uint64_t value;

	assert_int_equal(read(watch->fd, &value, sizeof(value)), sizeof(value));
	if (++r->seen == 3)
		r->done = true; /* semaphore eventfd: two events are left unread */
}

static void *delayed_write(void *arg)
{
	uint64_t five = 5;

	usleep(20000);
	assert_int_equal(write(*(int *)arg, &five, sizeof(five)), sizeof(five));
	return NULL;
}

/* Level triggered: what a callback leaves unread comes again, also when the loop slept. */
static void descriptors(struct ox_loop *loop)
{
	struct reader r = {.watch = {.events = EPOLLIN, .fn = readable}};
	pthread_t thread;

	r.watch.fd = eventfd(0, EFD_SEMAPHORE);
	assert_int_equal(ox_watch_add(loop, &r.watch), 0);
	pthread_create(&thread, NULL, delayed_write, &r.watch.fd);
	ox_loop_run_until(loop, &r.done);
	pthread_join(thread, NULL);
	assert_int_equal(r.seen, 3);
	ox_watch_remove(&r.watch);
	ox_watch_remove(&r.watch);
	close(r.watch.fd);
}

static void test_descriptors(void **state)
{
	for_both(descriptors);
}

struct source {
	struct ox_poller poller;
	int work; /* atomic */
	bool asleep;
	int done_work, slept;
	bool done;
};

static bool source_poll(struct ox_poller *poller)
{
	struct source *s = ox_container_of(poller, struct source, poller);

	if (!__atomic_load_n(&s->work, __ATOMIC_ACQUIRE))
		return false;
	__atomic_fetch_sub(&s->work, 1, __ATOMIC_ACQ_REL);
	if (++s->done_work == 100)
		s->done = true;
	return true;
}

static bool source_sleep(struct ox_poller *poller)
{
	struct source *s = ox_container_of(poller, struct source, poller);

	s->asleep = true;
	/* Work comes in at the last moment, once: the loop must not sleep on it. */
	if (s->slept++ == 0)
		__atomic_store_n(&s->work, 100, __ATOMIC_RELEASE);
	return __atomic_load_n(&s->work, __ATOMIC_ACQUIRE) > 0;
}

static void source_wake(struct ox_poller *poller)
{
	ox_container_of(poller, struct source, poller)->asleep = false;
}

static void pollers(struct ox_loop *loop)
{
	struct source s = {.poller = {source_poll, source_sleep, source_wake, {0}, NULL}};

	ox_poller_add(loop, &s.poller);
	ox_loop_run_until(loop, &s.done);
	assert_int_equal(s.done_work, 100);
	assert_int_equal(s.slept, 1);
	assert_false(s.asleep);
	ox_poller_remove(&s.poller);
	ox_poller_remove(&s.poller);
}

static void test_pollers(void **state)
{
	for_both(pollers);
}

struct trip {
	struct ox_loop *home, *away;
	int value;
};

static void on_away(void *arg)
{
	struct trip *trip = arg;

	assert_ptr_equal(ox_loop_current(), trip->away);
	assert_null(ox_fiber_self());
	trip->value++;
}

static void on_away_co(void *arg)
{
	struct trip *trip = arg;

	assert_ptr_equal(ox_loop_current(), trip->away);
	ox_sleep_co(1000000);
	assert_ptr_equal(ox_loop_current(), trip->away);
	trip->value += 10;
}

static int blocking(void *arg)
{
	assert_null(ox_loop_current());
	usleep(1000);
	return 4711;
}

static void journey(void *arg)
{
	struct trip *trip = arg;

	for (int i = 0; i < 100; i++)
		ox_loop_call_co(trip->away, on_away, trip);
	ox_loop_call_fiber_co(trip->away, on_away_co, trip);
	assert_ptr_equal(ox_loop_current(), trip->home);
	assert_int_equal(ox_worker_call_co(blocking, NULL), 4711);
	assert_int_equal(trip->value, 110);
}

static void calls(struct ox_loop *loop)
{
	struct ox_loop_options options = {.name = "away", .poll_max_ns = 0};
	struct ox_iothread *thread = ox_iothread_start(&options, NULL);
	struct trip trip = {loop, ox_iothread_loop(thread), 0};

	assert_non_null(thread);
	ox_loop_run_fiber(loop, journey, &trip);
	assert_int_equal(trip.value, 110);
	ox_iothread_stop(thread);
}

static void test_calls(void **state)
{
	for_both(calls);
}

static void wait_fd(void *arg)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	uint64_t one = 1;

	assert_int_equal(ox_wait_fd_co(fd, EPOLLIN, 2000000), -ETIMEDOUT);
	assert_int_equal(write(fd, &one, sizeof(one)), sizeof(one));
	assert_int_equal(ox_wait_fd_co(fd, EPOLLIN, -1), 0);
	close(fd);
}

static void waits(struct ox_loop *loop)
{
	ox_loop_run_fiber(loop, wait_fd, NULL);
}

static void test_waits(void **state)
{
	for_both(waits);
}

static void deferred_fn(struct ox_deferred *deferred);
struct later {
	struct ox_deferred deferred;
	struct ox_loop *loop;
	int runs;
};

static void deferred_fn(struct ox_deferred *deferred)
{
	struct later *later = ox_container_of(deferred, struct later, deferred);

	if (++later->runs < 3)
		ox_loop_defer(later->loop, deferred);
}

static void deferred_work(struct ox_loop *loop)
{
	struct later later = {.deferred = {.fn = deferred_fn}, .loop = loop};
	struct later never = {.deferred = {.fn = deferred_fn}, .loop = loop};
	bool done = false;
	int log[1], count = 0;
	struct posted p = {{.fn = posted}, log, &count, 1, &done};

	ox_loop_defer(loop, &later.deferred);
	ox_loop_defer(loop, &later.deferred);
	ox_loop_defer(loop, &never.deferred);
	ox_deferred_cancel(loop, &never.deferred);
	ox_deferred_cancel(loop, &never.deferred);
	ox_loop_post(loop, &p.post);
	ox_loop_run_until(loop, &done);
	assert_int_equal(later.runs, 3);
	assert_int_equal(never.runs, 0);
}

static void test_deferred(void **state)
{
	for_both(deferred_work);
}

/* An idle loop sleeps once and takes no turns: counted, not timed. */
static void *look_twice(void *arg)
{
	struct ox_loop *loop = arg;
	struct ox_loop_stats before, after;

	usleep(300000);
	ox_loop_get_stats(loop, &before);
	usleep(300000);
	ox_loop_get_stats(loop, &after);
	assert_int_equal(before.turns, after.turns);
	assert_int_equal(before.sleeps, after.sleeps);
	ox_loop_stop(loop);
	return NULL;
}

static void idle(struct ox_loop *loop)
{
	pthread_t thread;

	pthread_create(&thread, NULL, look_twice, loop);
	ox_loop_run(loop);
	pthread_join(thread, NULL);
}

static void test_idle(void **state)
{
	for_both(idle);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_posts),   cmocka_unit_test(test_posts_from_threads),
	        cmocka_unit_test(test_timers),  cmocka_unit_test(test_descriptors),
	        cmocka_unit_test(test_pollers), cmocka_unit_test(test_calls),
	        cmocka_unit_test(test_waits),   cmocka_unit_test(test_deferred),
	        cmocka_unit_test(test_idle),
	};

	return cmocka_run_group_tests_name("loop", tests, NULL, NULL);
}
