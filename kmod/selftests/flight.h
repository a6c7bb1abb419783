/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Invalidations that stay under way for as long as a test wants, by the module in
 * hold/.  Without it, tests that need them are skipped.
 */
#ifndef FLIGHT_H
#define FLIGHT_H

#include <semaphore.h>
#include <stddef.h>

/**
 * struct flight - an invalidation under way
 * @number:	names it
 * @start:	first byte that is dropped
 * @pages:	number of pages
 * @begin:	posted to the thread that drops them, and is held
 * @over:	posted by it
 */
struct flight {
	int	number;
	char	*start;
	size_t	pages;
	sem_t	begin;
	sem_t	over;
};

/*
 * To be called before the device is opened whose regions are invalidated.  While
 * something is under way, the mappings of the process cannot change (so that no
 * thread can be started), and no fd of the device can be closed.
 */
void prepare_flights(struct flight *flights, int number);

/* Drop pages.  Returns when that has begun. */
void begin_flight(struct flight *flight, char *start, size_t pages);

/* By another process, if need be. */
void release_flight(const struct flight *flight);

/* Returns when it is over. */
void wait_for_flight(struct flight *flight);

/* Both. */
void end_flight(struct flight *flight);

#endif /* FLIGHT_H */
