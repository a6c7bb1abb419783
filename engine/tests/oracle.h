/* SPDX-License-Identifier: MIT */
/*
 * What the engine must report, against what it reports.
 *
 * Whoever is going to change memory says so (expect()), makes the change, and says
 * that the call has returned (returned()).  From then on a notifier that claims
 * that nothing has changed is *stale*, unless it has reported this very change;
 * and if it has not by the time of the LAST record whose generation includes the
 * change, it has *missed* it.  So is a region whose state was not busy before the
 * change, and is the same afterwards.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#define WATCHES_PER_NOTIFIER	512
#define UNITS			64

/**
 * struct watch - a region of a notifier, divided into units as its memory is
 * @watcher:	the notifier
 * @cookie:	its cookie, 0 if there never was one
 * @start:	first byte
 * @end:	first byte behind
 * @origin:	first byte of unit 0
 * @unit:	bytes in a unit
 * @units:	those that the region has a part of, a bit each
 * @watched:	those of which every change must be reported; for the owner
 * @registered:	it is there
 * @last_read:	the last read that may report it after unregistering
 */
struct watch {
	struct watcher	*watcher;
	uint64_t	cookie;
	uint64_t	start;
	uint64_t	end;
	uint64_t	origin;
	uint64_t	unit;
	uint64_t	units;
	uint64_t	watched;
	bool		registered;
	uint64_t	last_read;
};

enum expectation_state {
	NOTHING_EXPECTED,
	UNDER_WAY,
	RETURNED,
};

/**
 * struct expectation - a change, and what a region has been told of it
 * @watch:	the region
 * @needed:	units that change
 * @covered:	units that reports since then cover
 * @generation:	that of the notifier once the change had returned
 * @region_state:	that of the region before the change
 * @made_by:	what the thread was doing that made it
 * @state:	how far it is
 * @link:	in watcher.expected
 */
struct expectation {
	struct watch				*watch;
	uint64_t				needed;
	uint64_t				covered;
	uint64_t				generation;
	uint64_t				region_state;
	const char				*made_by;
	_Atomic(enum expectation_state)		state;
	TAILQ_ENTRY(expectation)		link;
};

/**
 * struct watcher - a notifier, and what was read from it
 * @number:	its number
 * @doorbell:	readable while there are records
 * @reported:	generation of the last LAST record
 * @settled:	value of the activity word at which the generation is that
 * @reads:	calls of aioummu_read() so far
 * @mutex:	protects what follows
 * @watches:	regions, by their cookie modulo the size
 * @used:	where the newest is
 * @last_cookie:	the newest's cookie
 * @expected:	changes that it has to report
 */
struct watcher {
	int			number;
	int			doorbell[2];
	_Atomic uint64_t	reported;
	_Atomic uint64_t	settled;
	_Atomic uint64_t	reads;
	pthread_mutex_t		mutex;
	struct watch		watches[WATCHES_PER_NOTIFIER];
	uint64_t		last_cookie;
	TAILQ_HEAD(, expectation) expected;
};

/**
 * struct tally - what the run has come to
 * @changes:	changes that a region had to be told of
 * @events:	records
 * @missed:	changes that were not reported
 * @stale:	times that nothing was said to have changed, wrongly
 * @wrong:	whatever else should not be
 */
struct tally {
	_Atomic uint64_t	changes;
	_Atomic uint64_t	events;
	_Atomic uint64_t	missed;
	_Atomic uint64_t	stale;
	_Atomic uint64_t	wrong;
};

extern struct tally tally;

/* For messages: what this thread is doing. */
extern __thread const char *doing_now;

/* Prints a line.  Allocates nothing, and takes no lock. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

/* As say(), for the first few; counts. */
__attribute__((format(printf, 2, 3)))
void complain(_Atomic uint64_t *count, const char *format, ...);

/* Ends the program if it fails. */
void watcher_open(struct watcher *watcher);
void watcher_close(struct watcher *watcher);

/* Reads up to so many records, and notes what they say; returns how many. */
size_t watcher_read(struct watcher *watcher, size_t room);

/* Reads until nothing is left. */
void watcher_drain(struct watcher *watcher);

/* What the engine says of a region. */
uint64_t state_of(struct watch *watch);

/* "Has anything changed?", as the library asks it. */
bool watcher_changed(struct watcher *watcher);

/* Nothing is left to report, and the engine agrees. */
void watcher_check_end(struct watcher *watcher);

/* Which units have a part in a range. */
uint64_t units_of(uint64_t origin, uint64_t unit, uint64_t start, uint64_t end);

/* NULL, with a negative errno in @error, if the engine refuses. */
struct watch *watch_add(struct watcher *watcher, uint64_t origin, uint64_t unit,
			uint64_t start, uint64_t end, int *error);

/* There must be no expectation of it. */
void watch_remove(struct watch *watch);

/* A change of these units is going to be made. */
void expect(struct expectation *expectation, struct watch *watch,
	    uint64_t units);

/* It was not made, or nobody cares any more. */
void withdraw(struct expectation *expectation);

/* It has been made, and the call has returned. */
void returned(struct expectation *expectation);

/* It turns out that fewer units changed; before returned(). */
void narrow(struct expectation *expectation, uint64_t units);

/* Whether everything that is expected was reported. */
bool is_covered(struct expectation *expectation);

/* Stale if the notifier says now that nothing has changed; returns whether. */
bool check_stale(struct expectation *expectation, const char *who);

#endif
