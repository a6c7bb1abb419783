// SPDX-License-Identifier: MIT
/*
 * What the clients of daemon.py do to their memory, and what it costs them.
 *
 * A slot is a page with a mapping of its own.  None is next to another, so that they
 * are never merged, and every change is one of exactly one slot.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE	4096UL
/* Empty measurements, of which the median is what the clock itself costs. */
#define EMPTY	101

static char *area;
static uint64_t clock_cost;

static uint64_t read_clock(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* The CPU time of a thread is read by a system call, which is part of it. */
static uint64_t measure_clock(void)
{
	uint64_t empty[EMPTY];

	for (unsigned int i = 0; i < EMPTY; i++) {
		empty[i] = read_clock(CLOCK_THREAD_CPUTIME_ID);
		empty[i] = read_clock(CLOCK_THREAD_CPUTIME_ID) - empty[i];
	}
	qsort(empty, EMPTY, sizeof(*empty), by_value);
	return empty[EMPTY / 2];
}

void *changes_slot(unsigned long index)
{
	return area + index * 2 * PAGE;
}

/* Returns 0, or -1 if there is no memory. */
int changes_map(unsigned long count)
{
	area = mmap(NULL, count * 2 * PAGE, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		return -1;
	for (unsigned long i = 0; i < count; i++) {
		char *slot = changes_slot(i);

		if (mprotect(slot, PAGE, PROT_READ | PROT_WRITE))
			return -1;
		*slot = 1;
	}
	clock_cost = measure_clock();
	return 0;
}

int changes_make(unsigned long index, bool unmap)
{
	return unmap ? munmap(changes_slot(index), PAGE) :
		       madvise(changes_slot(index), PAGE, MADV_DONTNEED);
}

/* Puts a page there again.  Nobody else may have taken the place. */
int changes_undo(unsigned long index, bool unmap)
{
	char *slot = changes_slot(index);

	if (unmap && mmap(slot, PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
			  0) != slot)
		return -1;
	*slot = 1;
	return 0;
}

/*
 * Changes some slots with a pause before each, and undoes it afterwards.  Gives the
 * time and the CPU time of the thread for each, in ns.
 */
int changes_measure(unsigned long first, unsigned long count, bool unmap,
		    uint64_t pause, uint64_t *times, uint64_t *cpu_times)
{
	const struct timespec delay = {
		.tv_sec = (time_t)(pause / 1000000000),
		.tv_nsec = (long)(pause % 1000000000),
	};
	int error = 0;

	for (unsigned long i = 0; i < count; i++) {
		uint64_t start, cpu_start;

		if (pause)
			nanosleep(&delay, NULL);
		cpu_start = read_clock(CLOCK_THREAD_CPUTIME_ID);
		start = read_clock(CLOCK_MONOTONIC_RAW);
		error |= changes_make(first + i, unmap);
		times[i] = read_clock(CLOCK_MONOTONIC_RAW) - start;
		cpu_times[i] = read_clock(CLOCK_THREAD_CPUTIME_ID) - cpu_start;
		cpu_times[i] -= cpu_times[i] < clock_cost ? cpu_times[i] : clock_cost;
	}
	for (unsigned long i = 0; i < count; i++)
		error |= changes_undo(first + i, unmap);
	return error;
}

/* What a program does between two changes. */
void changes_compute(uint64_t rounds)
{
	uint64_t number = 1;

	while (rounds--) {
		number = number * 6364136223846793005u + 1442695040888963407u;
		/* Is needed, for all that the compiler knows. */
		__asm__ volatile("" : "+r"(number));
	}
}

/*
 * Uses some slots, one after the other, and drops each when it has computed for a
 * while.  Gives the time and the CPU time of all of it, in ns.
 */
int changes_work(unsigned long count, uint64_t rounds, uint64_t *length,
		 uint64_t *cpu_length)
{
	int error = 0;

	*cpu_length = read_clock(CLOCK_THREAD_CPUTIME_ID);
	*length = read_clock(CLOCK_MONOTONIC_RAW);
	for (unsigned long i = 0; i < count; i++) {
		changes_compute(rounds);
		error |= changes_make(i, false);
		error |= changes_undo(i, false);
	}
	*length = read_clock(CLOCK_MONOTONIC_RAW) - *length;
	*cpu_length = read_clock(CLOCK_THREAD_CPUTIME_ID) - *cpu_length;
	return error;
}
