/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * News of a disk: from its queues' threads to main, and from there to the listeners.
 *
 * Queues set a bit and post once; main takes all bits at a time.  A listener may remove itself or
 * any other listener while it is called.
 */
#include "disk/disk_private.h"

void ox_disk_post_event(struct ox_disk *disk, unsigned event)
{
	__atomic_fetch_or(&disk->events, event, __ATOMIC_SEQ_CST);
	if (!__atomic_exchange_n(&disk->event_posted, true, __ATOMIC_SEQ_CST))
		ox_loop_post(disk->options.main, &disk->event_post);
}

static void events_posted(struct ox_post *post)
{
	struct ox_disk *disk = ox_container_of(post, struct ox_disk, event_post);
	unsigned events;

	/* First the flag: an event that comes now posts again rather than being missed. */
	__atomic_store_n(&disk->event_posted, false, __ATOMIC_SEQ_CST);
	events = __atomic_exchange_n(&disk->events, 0, __ATOMIC_SEQ_CST);
	if (events & OX_EVENT_IO_ERROR)
		ox_disk_notify(disk, OX_DISK_IO_ERROR);
	if (events & OX_EVENT_STOPPED)
		ox_disk_was_stopped(disk);
}

void ox_disk_notify(struct ox_disk *disk, enum ox_disk_event event)
{
	struct ox_disk_listener *listener = TAILQ_FIRST(&disk->listeners);

	while (listener) {
		disk->notify_next = TAILQ_NEXT(listener, link);
		listener->fn(listener, event);
		listener = disk->notify_next;
	}
}

void ox_disk_add_listener(struct ox_disk *disk, struct ox_disk_listener *listener)
{
	TAILQ_INSERT_TAIL(&disk->listeners, listener, link);
}

void ox_disk_remove_listener(struct ox_disk *disk, struct ox_disk_listener *listener)
{
	if (disk->notify_next == listener)
		disk->notify_next = TAILQ_NEXT(listener, link);
	TAILQ_REMOVE(&disk->listeners, listener, link);
}

void ox_disk_events_init(struct ox_disk *disk)
{
	TAILQ_INIT(&disk->listeners);
	disk->event_post.fn = events_posted;
}
