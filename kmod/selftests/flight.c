// SPDX-License-Identifier: GPL-2.0
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "device.h"
#include "flight.h"
#include "hold/ummunotify_hold.h"

static int hold = -1;

static void wait_for(sem_t *semaphore)
{
	while (sem_wait(semaphore))
		CHECK_EQ(errno, EINTR);
}

static void *fly(void *arg)
{
	struct flight *flight = arg;

	for (;;) {
		wait_for(&flight->begin);
		CHECK_EQ(ioctl(hold, HOLD_NEXT, flight->number), 0);
		zap(flight->start, flight->pages);
		CHECK_EQ(sem_post(&flight->over), 0);
	}
	return NULL;
}

void prepare_flights(struct flight *flights, int number)
{
	hold = open("/dev/ummunotify_hold", O_RDONLY | O_CLOEXEC);
	if (hold < 0)
		skip("/dev/ummunotify_hold, which holds up changes: %s",
		     strerror(errno));
	for (int i = 0; i < number; i++) {
		flights[i].number = i;
		CHECK_EQ(sem_init(&flights[i].begin, 0, 0), 0);
		CHECK_EQ(sem_init(&flights[i].over, 0, 0), 0);
		start_thread(fly, &flights[i]);
	}
}

void begin_flight(struct flight *flight, char *start, size_t pages)
{
	flight->start = start;
	flight->pages = pages;
	CHECK_EQ(sem_post(&flight->begin), 0);
	CHECK_EQ(ioctl(hold, HOLD_WAIT, flight->number), 0);
}

void release_flight(const struct flight *flight)
{
	CHECK_EQ(ioctl(hold, HOLD_RELEASE, flight->number), 0);
}

void wait_for_flight(struct flight *flight)
{
	wait_for(&flight->over);
}

void end_flight(struct flight *flight)
{
	release_flight(flight);
	wait_for_flight(flight);
}
