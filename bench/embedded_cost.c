// SPDX-License-Identifier: MIT
/*
 * What changes of mappings cost while they are watched: by the embedded engine, by
 * the simplest program that reads a userfaultfd, by the caller, or by nobody.
 *
 * A library for embedded.py, which calls it without holding the GIL.  A process
 * that has loaded it calls cost_start() once, and then measures.  A sample is the
 * nanoseconds of one call.  What else it takes, such as to map and watch a page
 * that was unmapped again, is not part of that.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "engine.h"

/* Not in the headers of older systems. */
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC	(1 << 15)
#endif

#define PAGE		4096UL
#define MOST_SAMPLES	256
#define MOST_REGIONS	100000UL
/* More than the engine keeps registered without a region. */
#define SLOTS_ALONE	256UL
/* In ns: for the readers to fall asleep, and for an event loop to do so. */
#define PAUSE		20000
#define LONG_PAUSE	100000

enum watcher {
	NOBODY,
	/* The engine runs, but watches other memory. */
	ENGINE_ELSEWHERE,
	ENGINE,
	BARE,
	/* It gets the userfaultfd from cost_start(). */
	CALLER,
};

/*
 * Where the pages lie that are changed, the slots: each in a mapping of its own;
 * all in one mapping, with pages that stay in between; or one at the end of each
 * of many mappings, again behind pages that stay.
 */
enum arrangement {
	ALONE,
	ONE_MAPPING,
	MANY_MAPPINGS,
};

static enum watcher watcher;
static enum arrangement arrangement;
static char *area;
static unsigned long slots;
/* Bytes from one slot to the next. */
static unsigned long stride;
/* Bytes that stay in front of a slot. */
static unsigned long in_front;
/* How many of the slots are changed, and the distance between them, in slots. */
static unsigned long changed;
static unsigned long spacing;
static int userfaultfd = -1;
static int notifier;
static sem_t told;
static _Atomic uint64_t changed_at;

static void die(const char *what, int error)
{
	fprintf(stderr, "embedded_cost: %s: %s\n", what, strerror(error));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC_RAW, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static uint64_t cpu_time(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* A fixed sequence: everybody changes the same slots. */
static unsigned long scattered(unsigned long below)
{
	static uint64_t state = 88172645463325252ULL;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

/* For the readers to sleep, on this CPU or another, while this one stays awake. */
static void let_readers_sleep(void)
{
	uint64_t until = now() + PAUSE;

	while (now() < until)
		sched_yield();
}

/* ----------------------------------------------------------- the mappings --- */

static char *slot(unsigned long index)
{
	return area + index * stride + in_front;
}

/* That of a region.  If there are more than slots, others take pages that stay. */
static char *region_page(unsigned long number)
{
	if (number < slots)
		return slot(number * spacing);
	return area + number % slots * stride;
}

/* Never over something else; to change a page is not to split a huge one. */
static void map(char *start, size_t size)
{
	if (mmap(start, size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
		 MAP_FIXED_NOREPLACE, -1, 0) != start)
		die("mmap", errno);
	/* Fails where the kernel has no huge pages. */
	madvise(start, size, MADV_NOHUGEPAGE);
}

/* A page that nobody changes. */
static char *bystander(void)
{
	char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		die("mmap", errno);
	return page;
}

static void map_area(unsigned long mappings)
{
	size_t size;

	slots = arrangement == ALONE ? SLOTS_ALONE :
		arrangement == ONE_MAPPING ? MOST_REGIONS : mappings;
	in_front = arrangement == ALONE ? 0 :
		   arrangement == ONE_MAPPING ? PAGE :
		   (MOST_REGIONS / slots + 1) * PAGE;
	/* Holes keep mappings from being merged. */
	stride = in_front + (arrangement == ONE_MAPPING ? 1 : 2) * PAGE;
	size = slots * stride;
	area = mmap(NULL, size + PAGE, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED || munmap(area, size + PAGE))
		die("mmap", errno);
	if (arrangement == ONE_MAPPING) {
		map(area, size);
		return;
	}
	for (unsigned long i = 0; i < slots; i++)
		map(area + i * stride, in_front + PAGE);
}

/* ------------------------------------------------------------ the watchers --- */

/* With what the engine asks for, and of a kind that read() waits for. */
static int open_userfaultfd(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |
			    UFFD_FEATURE_EVENT_REMOVE |
			    UFFD_FEATURE_PAGEFAULT_FLAG_WP |
			    UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	};
	struct aioummu_support support;
	int fd;

	aioummu_probe(&support);
	api.features |= support.features & UFFD_FEATURE_WP_ASYNC;
	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		die("userfaultfd", errno);
	return fd;
}

static void *read_events(void *unused)
{
	struct uffd_msg message;

	while (read(userfaultfd, &message, sizeof(message)) > 0)
		;
	return unused;
}

static void start_bare_reader(void)
{
	pthread_t thread;
	int error = pthread_create(&thread, NULL, read_events, NULL);

	if (error)
		die("pthread_create", error);
}

static void start_engine(void)
{
	int doorbell[2];

	notifier = aioummu_open(doorbell);
	if (notifier < 0)
		die("aioummu_open", -notifier);
}

static void register_range(char *start, size_t size)
{
	struct uffdio_register argument = {
		.range.start = (uintptr_t)start,
		.range.len = size,
		.mode = UFFDIO_REGISTER_MODE_WP,
	};

	if (ioctl(userfaultfd, UFFDIO_REGISTER, &argument))
		die("UFFDIO_REGISTER", errno);
}

static void unregister_range(char *start, size_t size)
{
	struct uffdio_range range = { (uintptr_t)start, size };

	if (ioctl(userfaultfd, UFFDIO_UNREGISTER, &range))
		die("UFFDIO_UNREGISTER", errno);
}

static void register_region(char *page, uint64_t cookie)
{
	struct aioummu_refusal refusal;
	int error = aioummu_register(notifier, (uintptr_t)page,
				     (uintptr_t)page + PAGE, cookie, 0, false,
				     &refusal);

	if (error)
		die("aioummu_register", -error);
}

static void unregister_region(uint64_t cookie)
{
	int error = aioummu_unregister(notifier, cookie);

	if (error)
		die("aioummu_unregister", -error);
}

static void watch(char *page, uint64_t cookie)
{
	switch (watcher) {
	case NOBODY:
	case ENGINE_ELSEWHERE:
		break;
	case ENGINE:
		register_region(page, cookie);
		break;
	case BARE:
	case CALLER:
		register_range(page, PAGE);
		break;
	}
}

static void unwatch(char *page, uint64_t cookie)
{
	switch (watcher) {
	case NOBODY:
	case ENGINE_ELSEWHERE:
		break;
	case ENGINE:
		unregister_region(cookie);
		break;
	case BARE:
	case CALLER:
		unregister_range(page, PAGE);
		break;
	}
}

/*
 * After an unmapping.  What is mapped anew has to be watched before it is written
 * to: then it becomes a part of the mapping beside it again.
 */
static void restore(unsigned long number)
{
	struct aioummu_refusal refusal;
	int error;

	map(region_page(number), PAGE);
	if (watcher == ENGINE) {
		error = aioummu_rearm(notifier, number, &refusal);
		if (error)
			die("aioummu_rearm", -error);
	} else {
		watch(region_page(number), number);
	}
}

/* The engine has to have reported each change, and nothing else. */
static void check_reports(unsigned int changes)
{
	struct ummunotify_event events[MOST_SAMPLES + 1];
	ssize_t size, expected = 0;

	if (watcher != ENGINE && watcher != ENGINE_ELSEWHERE)
		return;
	if (watcher == ENGINE)
		expected = (changes + 1) * sizeof(*events);
	size = aioummu_read(notifier, events, sizeof(events));
	if (size == expected)
		return;
	fprintf(stderr, "embedded_cost: %zd bytes of reports, expected %zd\n",
		size, expected);
	exit(1);
}

/* ------------------------------------------------------------- for Python --- */

/*
 * Maps the slots, and lets somebody watch so many of them; those are changed then.
 * Returns a userfaultfd for the caller to read, if that is who watches.
 */
int cost_start(int who, int where, unsigned long mappings,
	       unsigned long regions)
{
	watcher = who;
	arrangement = where;
	/* With its parent. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		die("PR_SET_PDEATHSIG", errno);
	sem_init(&told, 0, 0);
	map_area(mappings);
	changed = regions < slots ? regions : slots;
	spacing = changed ? slots / changed : 1;
	switch (watcher) {
	case NOBODY:
		break;
	case ENGINE_ELSEWHERE:
		start_engine();
		register_region(bystander(), 0);
		break;
	case ENGINE:
		start_engine();
		for (unsigned long i = 0; i < regions; i++)
			register_region(region_page(i), i);
		break;
	case BARE:
	case CALLER:
		userfaultfd = open_userfaultfd();
		/* Whole mappings, as the engine does; holes are skipped. */
		if (regions)
			register_range(area, slots * stride);
		if (watcher == BARE)
			start_bare_reader();
		break;
	}
	return userfaultfd;
}

/* Where a slot is, after it has been mapped again, if need be. */
void *cost_slot(unsigned long index, int is_mapped)
{
	char *page = slot(index % slots);

	if (!is_mapped)
		map(page, PAGE);
	return page;
}

static void measure_changes(uint64_t *samples, unsigned int count, bool unmap)
{
	for (unsigned int i = 0; i < count; i++) {
		unsigned long number = scattered(changed);
		char *page = region_page(number);
		uint64_t start;

		*page = 1;
		let_readers_sleep();
		start = now();
		if (unmap)
			munmap(page, PAGE);
		else
			madvise(page, PAGE, MADV_DONTNEED);
		samples[i] = now() - start;
		check_reports(1);
		if (unmap)
			restore(number);
	}
}

/*
 * When it is woken on the reader's CPU, this thread could go on at once, or when
 * the reader has done everything and sleeps again.  That is chance; so, always the
 * latter, which is the full price.
 */
void cost_be_patient(void)
{
	const struct sched_param none = { 0 };

	if (sched_setscheduler(0, SCHED_BATCH, &none))
		die("SCHED_BATCH", errno);
}

/* One at a time, with the reader asleep. */
void cost_munmap(uint64_t *samples, unsigned int count)
{
	measure_changes(samples, count, true);
}

void cost_madvise(uint64_t *samples, unsigned int count)
{
	measure_changes(samples, count, false);
}

/* One after the other, none twice.  Gives the CPU time of all threads for one, too. */
void cost_munmap_in_a_row(uint64_t *samples, uint64_t *cpu, unsigned int count)
{
	unsigned long step = changed / count, first = scattered(step);

	for (unsigned int i = 0; i < count; i++)
		*region_page(first + i * step) = 1;
	let_readers_sleep();
	*cpu = cpu_time();
	for (unsigned int i = 0; i < count; i++) {
		uint64_t start = now();

		munmap(region_page(first + i * step), PAGE);
		samples[i] = now() - start;
	}
	*cpu = (cpu_time() - *cpu) / count;
	check_reports(count);
	for (unsigned int i = 0; i < count; i++)
		restore(first + i * step);
}

/*
 * Watches one more slot: alone in its mapping, which the engine has forgotten by
 * then, and so the engine pays for giving up an older one, too; or else anywhere
 * in a mapping that is watched.
 */
void cost_register(uint64_t *registering, uint64_t *unregistering,
		   unsigned int count)
{
	static unsigned long next;

	for (unsigned int i = 0; i < count; i++) {
		unsigned long index = arrangement == ALONE ? next++ % slots :
							     scattered(slots);
		uint64_t start, middle;

		start = now();
		watch(slot(index), MOST_REGIONS);
		middle = now();
		unwatch(slot(index), MOST_REGIONS);
		unregistering[i] = now() - middle;
		registering[i] = middle - start;
	}
}

static void wait_until_told(void)
{
	while (sem_wait(&told))
		;
}

/* What cost_obey() and cost_drop() wait for. */
void cost_tell(void)
{
	sem_post(&told);
}

/* Drops the pages of so many slots, over and over; returns how long it took. */
uint64_t cost_drop(unsigned long different, unsigned long count)
{
	uint64_t start;

	wait_until_told();
	start = now();
	for (unsigned long i = 0; i < count; i++)
		madvise(slot(i % different), PAGE, MADV_DONTNEED);
	return now() - start;
}

/*
 * Each time that it is told to, and has let an event loop fall asleep: by turns
 * unmaps a slot, and writes a byte into a pipe.
 */
void cost_obey(unsigned long count, int pipe)
{
	const struct timespec pause = { .tv_nsec = LONG_PAUSE };

	for (unsigned long i = 0; i < count; i++) {
		wait_until_told();
		nanosleep(&pause, NULL);
		atomic_store(&changed_at, now());
		if (i % 2 == 0)
			munmap(slot(i / 2), PAGE);
		else if (write(pipe, "", 1) != 1)
			die("write", errno);
	}
}

uint64_t cost_changed_at(void)
{
	return atomic_load(&changed_at);
}
