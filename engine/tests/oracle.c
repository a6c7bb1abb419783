// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "oracle.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "engine.h"

#define RECORDS		256
/* More would only hide the first ones. */
#define COMPLAINTS	20

struct tally tally;
__thread const char *doing_now = "";

static void print(const char *prefix, const char *format, va_list arguments)
{
	char line[512];
	size_t length;

	strcpy(line, prefix);
	length = strlen(line);
	vsnprintf(line + length, sizeof(line) - length - 1, format, arguments);
	strcat(line, "\n");
	if (write(STDOUT_FILENO, line, strlen(line)) < 0)
		_exit(2);
}

void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	print("", format, arguments);
	va_end(arguments);
}

void complain(_Atomic uint64_t *count, const char *format, ...)
{
	static _Atomic uint64_t complaints;
	va_list arguments;

	atomic_fetch_add(count, 1);
	if (atomic_fetch_add(&complaints, 1) >= COMPLAINTS)
		return;
	va_start(arguments, format);
	print("FAIL ", format, arguments);
	va_end(arguments);
}

void watcher_open(struct watcher *watcher)
{
	memset(watcher, 0, sizeof(*watcher));
	pthread_mutex_init(&watcher->mutex, NULL);
	TAILQ_INIT(&watcher->expected);
	watcher->number = aioummu_open(watcher->doorbell);
	if (watcher->number <= 0) {
		say("aioummu_open: %s", strerror(-watcher->number));
		_exit(2);
	}
}

void watcher_close(struct watcher *watcher)
{
	aioummu_close(watcher->number);
	pthread_mutex_destroy(&watcher->mutex);
}

uint64_t units_of(uint64_t origin, uint64_t unit, uint64_t start, uint64_t end)
{
	uint64_t units = 0;

	for (unsigned int i = 0; i < UNITS; i++)
		if (start < origin + (i + 1) * unit && end > origin + i * unit)
			units |= UINT64_C(1) << i;
	return units;
}

/* Units of a region all of whose bytes are in a range. */
static uint64_t units_within(const struct watch *watch, uint64_t start,
			     uint64_t end)
{
	uint64_t missing = 0;

	if (start > watch->start)
		missing |= units_of(watch->origin, watch->unit, watch->start, start);
	if (end < watch->end)
		missing |= units_of(watch->origin, watch->unit, end, watch->end);
	return watch->units & ~missing;
}

/* Under the mutex. */
static void take_inval(struct watcher *watcher,
		       const struct ummunotify_event *event, uint64_t this_read)
{
	uint64_t cookie = event->user_cookie_counter, covered;
	uint64_t start = event->hint_start, end = event->hint_end;
	struct watch *watch = &watcher->watches[cookie % WATCHES_PER_NOTIFIER];
	struct expectation *expectation;

	/* It was unregistered, and another took its place. */
	if (watch->cookie != cookie)
		return;
	if (!watch->registered && this_read > watch->last_read)
		complain(&tally.wrong, "a report of a region unregistered before the read");
	if (start < watch->start || end > watch->end || start >= end)
		complain(&tally.wrong,
			 "a hint outside the region: %" PRIx64 "-%" PRIx64
			 " of %" PRIx64 "-%" PRIx64, start, end, watch->start,
			 watch->end);
	covered = units_within(watch, start, end);
	if (!(event->flags & UMMUNOTIFY_EVENT_FLAG_HINT) && covered != watch->units)
		complain(&tally.wrong, "without a hint, not the whole region");
	TAILQ_FOREACH(expectation, &watcher->expected, link)
		if (expectation->watch == watch)
			expectation->covered |= covered;
}

/* Under the mutex: the LAST that includes the change has been read. */
static void judge(struct expectation *expectation)
{
	struct watch *watch = expectation->watch;
	uint64_t missing = expectation->needed & ~expectation->covered;

	if (missing)
		complain(&tally.missed,
			 "missed: units %" PRIx64 " of %" PRIx64
			 " changed in region %" PRIx64 "-%" PRIx64
			 ", generation %" PRIu64 ", %s, state %" PRIu64
			 " before and %" PRIu64 " now, spent: %d", missing,
			 expectation->needed, watch->start, watch->end,
			 expectation->generation, expectation->made_by,
			 expectation->region_state, state_of(watch),
			 aioummu_spent(watch->watcher->number, watch->cookie));
	TAILQ_REMOVE(&watch->watcher->expected, expectation, link);
	atomic_store(&expectation->state, NOTHING_EXPECTED);
}

/* Under the mutex. */
static void take_last(struct watcher *watcher, uint64_t generation)
{
	struct expectation *expectation, *next;

	if (generation < atomic_load(&watcher->reported))
		complain(&tally.wrong, "the generation has fallen");
	for (expectation = TAILQ_FIRST(&watcher->expected); expectation;
	     expectation = next) {
		next = TAILQ_NEXT(expectation, link);
		if (atomic_load(&expectation->state) == RETURNED &&
		    expectation->generation <= generation)
			judge(expectation);
	}
	atomic_store(&watcher->reported, generation);
}

size_t watcher_read(struct watcher *watcher, size_t room)
{
	struct ummunotify_event events[RECORDS];
	uint64_t this_read = atomic_fetch_add(&watcher->reads, 1) + 1;
	size_t count;
	ssize_t size;

	if (room > RECORDS)
		room = RECORDS;
	size = aioummu_read(watcher->number, events, room * sizeof(events[0]));
	if (size < 0) {
		complain(&tally.wrong, "aioummu_read: %s", strerror((int)-size));
		return 0;
	}
	count = (size_t)size / sizeof(events[0]);
	pthread_mutex_lock(&watcher->mutex);
	for (size_t i = 0; i < count; i++) {
		if (events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL)
			take_inval(watcher, &events[i], this_read);
		else if (i + 1 == count)
			take_last(watcher, events[i].user_cookie_counter);
		else
			complain(&tally.wrong, "records behind LAST");
	}
	pthread_mutex_unlock(&watcher->mutex);
	atomic_fetch_add(&tally.events, count);
	return count;
}

void watcher_drain(struct watcher *watcher)
{
	while (watcher_read(watcher, RECORDS))
		;
}

static uint64_t generation_of(struct watcher *watcher)
{
	uint64_t generation = 0;
	int error = aioummu_generation(watcher->number, &generation);

	if (error)
		complain(&tally.wrong, "aioummu_generation: %s", strerror(-error));
	return generation;
}

uint64_t state_of(struct watch *watch)
{
	uint64_t state = 0;
	int error = aioummu_state(watch->watcher->number, watch->cookie, &state);

	if (error)
		complain(&tally.wrong, "aioummu_state: %s", strerror(-error));
	return state;
}

bool watcher_changed(struct watcher *watcher)
{
	uint64_t word = __atomic_load_n(aioummu_activity(), __ATOMIC_ACQUIRE);
	uint64_t reported;

	if (word == atomic_load(&watcher->settled))
		return false;
	reported = atomic_load(&watcher->reported);
	if (generation_of(watcher) != reported)
		return true;
	/* The word is older than the generation, so it can only be outdated. */
	atomic_store(&watcher->settled, word);
	return false;
}

void watcher_check_end(struct watcher *watcher)
{
	struct pollfd polled = { .fd = watcher->doorbell[0], .events = POLLIN };
	uint64_t generation = generation_of(watcher);

	if (!TAILQ_EMPTY(&watcher->expected))
		complain(&tally.missed, "a change that no LAST includes");
	if (generation != watcher->reported)
		complain(&tally.missed,
			 "generation %" PRIu64 ", but the last LAST said %" PRIu64,
			 generation, atomic_load(&watcher->reported));
	if (poll(&polled, 1, 0))
		complain(&tally.wrong, "nothing to read, but the doorbell rings");
}

struct watch *watch_add(struct watcher *watcher, uint64_t origin, uint64_t unit,
			uint64_t start, uint64_t end, int *error)
{
	struct aioummu_refusal refusal;
	struct watch *watch = NULL;

	pthread_mutex_lock(&watcher->mutex);
	for (unsigned int i = 0; i < WATCHES_PER_NOTIFIER; i++) {
		uint64_t cookie = ++watcher->last_cookie;

		watch = &watcher->watches[cookie % WATCHES_PER_NOTIFIER];
		if (!watch->registered) {
			*watch = (struct watch) {
				.watcher = watcher, .cookie = cookie,
				.start = start, .end = end, .origin = origin,
				.unit = unit, .registered = true,
				.units = units_of(origin, unit, start, end),
			};
			break;
		}
		watch = NULL;
	}
	pthread_mutex_unlock(&watcher->mutex);
	if (!watch) {
		*error = -ENOSPC;
		return NULL;
	}
	*error = aioummu_register(watcher->number, start, end, watch->cookie,
				  0, false, &refusal);
	if (!*error) {
		watch->watched = watch->units;
		return watch;
	}
	pthread_mutex_lock(&watcher->mutex);
	watch->registered = false;
	pthread_mutex_unlock(&watcher->mutex);
	return NULL;
}

void watch_remove(struct watch *watch)
{
	struct watcher *watcher = watch->watcher;
	int error = aioummu_unregister(watcher->number, watch->cookie);

	if (error)
		complain(&tally.wrong, "aioummu_unregister: %s", strerror(-error));
	pthread_mutex_lock(&watcher->mutex);
	watch->last_read = atomic_load(&watcher->reads);
	watch->registered = false;
	pthread_mutex_unlock(&watcher->mutex);
}

void expect(struct expectation *expectation, struct watch *watch,
	    uint64_t units)
{
	struct watcher *watcher = watch->watcher;

	expectation->watch = watch;
	expectation->needed = units & watch->watched;
	expectation->covered = 0;
	expectation->generation = 0;
	expectation->region_state = state_of(watch);
	expectation->made_by = doing_now;
	pthread_mutex_lock(&watcher->mutex);
	atomic_store(&expectation->state, UNDER_WAY);
	TAILQ_INSERT_TAIL(&watcher->expected, expectation, link);
	pthread_mutex_unlock(&watcher->mutex);
}

void withdraw(struct expectation *expectation)
{
	struct watcher *watcher = expectation->watch->watcher;

	pthread_mutex_lock(&watcher->mutex);
	if (atomic_load(&expectation->state) != NOTHING_EXPECTED) {
		TAILQ_REMOVE(&watcher->expected, expectation, link);
		atomic_store(&expectation->state, NOTHING_EXPECTED);
	}
	pthread_mutex_unlock(&watcher->mutex);
}

void narrow(struct expectation *expectation, uint64_t units)
{
	struct watcher *watcher = expectation->watch->watcher;

	pthread_mutex_lock(&watcher->mutex);
	expectation->needed &= units;
	pthread_mutex_unlock(&watcher->mutex);
}

bool is_covered(struct expectation *expectation)
{
	struct watcher *watcher = expectation->watch->watcher;
	bool covered;

	pthread_mutex_lock(&watcher->mutex);
	covered = !(expectation->needed & ~expectation->covered);
	pthread_mutex_unlock(&watcher->mutex);
	return covered;
}

bool check_stale(struct expectation *expectation, const char *who)
{
	struct watch *watch = expectation->watch;

	if (watcher_changed(watch->watcher) || is_covered(expectation))
		return false;
	complain(&tally.stale,
		 "stale: %s sees units %" PRIx64 " of region %" PRIx64 "-%" PRIx64
		 " as unchanged", who, expectation->needed, watch->start, watch->end);
	return true;
}

/* Whatever was reported meanwhile: this is about the region alone. */
static void check_state(struct expectation *expectation)
{
	struct watch *watch = expectation->watch;
	uint64_t state = state_of(watch);

	if (state < (expectation->region_state & ~UMMUNOTIFY_STATE_BUSY))
		complain(&tally.wrong, "a state has fallen");
	if (!expectation->needed || state != expectation->region_state ||
	    state & UMMUNOTIFY_STATE_BUSY)
		return;
	complain(&tally.stale, "stale: units %" PRIx64 " of region %" PRIx64 "-%" PRIx64
		 " changed, and its state is %" PRIu64 " as before",
		 expectation->needed, watch->start, watch->end, state);
}

void returned(struct expectation *expectation)
{
	struct watcher *watcher = expectation->watch->watcher;
	uint64_t generation;

	check_stale(expectation, "the thread that made the change");
	check_state(expectation);
	generation = generation_of(watcher);
	if (expectation->needed)
		atomic_fetch_add(&tally.changes, 1);
	pthread_mutex_lock(&watcher->mutex);
	expectation->generation = generation;
	atomic_store(&expectation->state, RETURNED);
	if (generation <= atomic_load(&watcher->reported))
		judge(expectation);
	pthread_mutex_unlock(&watcher->mutex);
}
