// SPDX-License-Identifier: GPL-2.0
/*
 * What the calls of /dev/ummunotify cost, at many numbers of regions.
 *
 * Prints one line per figure, "regions name value", each value the median of
 * single calls between two clock_gettime() calls.  In a guest whose clock counts
 * executed instructions (QEMU -icount shift=0) a nanosecond is an instruction.
 *
 * The driver's share of a change to a mapping is found by making the very same
 * changes where no notifier was ever registered ("bare"), where one with empty
 * callbacks is ("empty"; /dev/empty_notifier), and where ours is ("watched"),
 * each in a process of its own.
 *
 * usage: driver_cost REGIONS...
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#define SAMPLES	500
#define PAGE	4096UL
/* Nothing is watched in the middle of the area, for misses between regions. */
#define HOLE	(64UL << 20)

/**
 * struct feature - what is measured apart
 * @name:	in what is printed
 * @mask:	what is negotiated
 * @flags:	of all registrations
 * @slots:	they have state words
 * @events:	records that a hit gives
 */
struct feature {
	const char	*name;
	__u32		mask;
	__u32		flags;
	int		slots;
	size_t		events;
};

static const struct feature none = { .name = "watched", .events = 2 };

static const struct feature features[] = {
	{ "cause", UMMUNOTIFY_FEATURE_CAUSE, 0, 0, 2 },
	/* MADV_DONTNEED is another one. */
	{ "filtered", UMMUNOTIFY_FEATURE_FILTER, UMMUNOTIFY_EVENT_CAUSE_UNMAP,
	  0, 0 },
	{ "once", UMMUNOTIFY_FEATURE_ONCE, UMMUNOTIFY_REGION_FLAG_ONCE, 0, 2 },
	{ "state", UMMUNOTIFY_FEATURE_STATE, 0, 1, 2 },
};

static uint64_t samples[SAMPLES];
static char *area;
static unsigned long nr_regions;
static const struct feature *feature = &none;

static void die(const char *what)
{
	fprintf(stderr, "driver_cost: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void print(const char *name, uint64_t value)
{
	printf("%lu %s %llu\n", nr_regions, name, (unsigned long long)value);
	fflush(stdout);
}

static void print_median(const char *name)
{
	qsort(samples, SAMPLES, sizeof(*samples), by_value);
	print(name, samples[SAMPLES / 2]);
}

/* A fixed sequence: each run picks the same regions. */
static unsigned long scattered(unsigned long below)
{
	static uint64_t state = 88172645463325252ULL;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

/* Regions are one page each, two pages apart, with a hole in the middle. */
static char *region_page(unsigned long index)
{
	char *page = area + index * 2 * PAGE;

	return index < nr_regions / 2 ? page : page + HOLE;
}

static char *hole(void)
{
	return area + nr_regions / 2 * 2 * PAGE + HOLE / 2;
}

static size_t area_size(void)
{
	return (nr_regions + SAMPLES) * 2 * PAGE + HOLE;
}

static void map_area(void)
{
	area = mmap(NULL, area_size(), PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		die("mmap");
	if (madvise(area, area_size(), MADV_NOHUGEPAGE))
		die("MADV_NOHUGEPAGE");
	/* A mapping below 2 MB of its own: to unmap it splits nothing. */
	if (munmap(hole() - (8UL << 20), 16UL << 20))
		die("munmap");
}

static void register_region(int fd, unsigned long index)
{
	struct ummunotify_register_ioctl region = {
		.start = (uintptr_t)region_page(index),
		.end = (uintptr_t)region_page(index) + PAGE,
		.user_cookie = index + 1,
		.flags = feature->flags,
		.reserved = feature->slots ? (__u32)index + 1 : 0,
	};

	if (ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &region))
		die("REGISTER_REGION");
}

static void unregister_region(int fd, unsigned long index)
{
	uint64_t cookie = index + 1;

	if (ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie))
		die("UNREGISTER_REGION");
}

static size_t drain(int fd)
{
	struct ummunotify_event events[8];
	size_t n = 0;
	ssize_t len;

	while ((len = read(fd, events, sizeof(events))) > 0)
		n += (size_t)len / sizeof(*events);
	return n;
}

/* fd is -1 where nobody watches. */
static void measure_miss(const char *name, int fd, char *address)
{
	int i;

	for (i = 0; i < SAMPLES; i++) {
		uint64_t start;
		char *page = mmap(address, PAGE, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS |
				  MAP_FIXED_NOREPLACE, -1, 0);

		if (page == MAP_FAILED)
			die("mmap of one page");
		*page = 1;
		start = now();
		munmap(page, PAGE);
		samples[i] = now() - start;
	}
	if (fd >= 0 && drain(fd)) {
		fprintf(stderr, "driver_cost: a miss was reported\n");
		exit(1);
	}
	print_median(name);
}

static void measure_hit(const char *name, int fd)
{
	int i;

	for (i = 0; i < SAMPLES; i++) {
		unsigned long index = scattered(nr_regions);
		char *page = region_page(index);
		uint64_t start;

		*page = 1;
		start = now();
		madvise(page, PAGE, MADV_DONTNEED);
		samples[i] = now() - start;
		if (fd >= 0 && drain(fd) != feature->events) {
			fprintf(stderr, "driver_cost: not one report\n");
			exit(1);
		}
		if (fd >= 0 && feature->flags & UMMUNOTIFY_REGION_FLAG_ONCE)
			register_region(fd, index);
	}
	print_median(name);
}

static void measure_changes(const char *who, int fd)
{
	char name[64];

	snprintf(name, sizeof(name), "miss-between-%s", who);
	measure_miss(name, fd, hole());
	/* Above everything watched: under the end of the area. */
	snprintf(name, sizeof(name), "miss-outside-%s", who);
	measure_miss(name, fd, area + area_size() + (16UL << 20));
	snprintf(name, sizeof(name), "hit-%s", who);
	measure_hit(name, fd);
}

static int open_device(const char *path)
{
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0)
		die(path);
	return fd;
}

static void measure_calls(int fd)
{
	struct ummunotify_event events[128];
	unsigned long indexes[SAMPLES];
	uint64_t start;
	int i;

	for (i = 0; i < SAMPLES; i++) {
		start = now();
		ioctl(fd, 0, NULL);
		samples[i] = now() - start;
	}
	print_median("null-ioctl");

	for (i = 0; i < SAMPLES; i++) {
		start = now();
		if (read(fd, events, sizeof(events)) >= 0)
			die("read of nothing");
		samples[i] = now() - start;
	}
	print_median("empty-read");

	for (i = 0; i < SAMPLES; i++) {
		start = now();
		register_region(fd, nr_regions + (unsigned long)i);
		samples[i] = now() - start;
	}
	print_median("register-appended");

	for (i = SAMPLES - 1; i >= 0; i--) {
		start = now();
		unregister_region(fd, nr_regions + (unsigned long)i);
		samples[i] = now() - start;
	}
	print_median("unregister-appended");

	/* In the order in which they came, as a cache evicts. */
	for (i = 0; i < SAMPLES; i++) {
		unsigned long index = (unsigned long)i % nr_regions;

		start = now();
		unregister_region(fd, index);
		samples[i] = now() - start;
		if (nr_regions < SAMPLES)
			register_region(fd, index);
	}
	print_median("unregister-oldest");
	for (i = 0; i < SAMPLES && nr_regions >= SAMPLES; i++)
		register_region(fd, (unsigned long)i);

	for (i = 0; i < SAMPLES; i++) {
		indexes[i] = scattered(nr_regions);
		start = now();
		unregister_region(fd, indexes[i]);
		samples[i] = now() - start;
		register_region(fd, indexes[i]);
	}
	print_median("unregister-scattered");

	for (i = 0; i < SAMPLES; i++) {
		unregister_region(fd, indexes[i]);
		start = now();
		register_region(fd, indexes[i]);
		samples[i] = now() - start;
	}
	print_median("register-scattered");

	for (i = 0; i < SAMPLES; i++) {
		char *page = region_page(scattered(nr_regions));
		ssize_t len;

		*page = 1;
		madvise(page, PAGE, MADV_DONTNEED);
		start = now();
		len = read(fd, events, sizeof(events));
		samples[i] = now() - start;
		if (len != 2 * sizeof(*events) ||
		    events[1].type != UMMUNOTIFY_EVENT_TYPE_LAST) {
			fprintf(stderr, "driver_cost: no INVAL with LAST\n");
			exit(1);
		}
	}
	print_median("read-with-last");
}

static uint64_t timed_close(int fd)
{
	uint64_t start = now();

	if (close(fd))
		die("close");
	return now() - start;
}

static void print_slab(void)
{
	char line[512];
	FILE *file = fopen("/proc/slabinfo", "r");

	while (file && fgets(line, sizeof(line), file)) {
		unsigned long active, total, size;

		if (sscanf(line, "ummunotify_region %lu %lu %lu", &active,
			   &total, &size) == 3)
			print("slab-bytes-per-region", size);
	}
	if (file)
		fclose(file);
}

static void measure_bare(void)
{
	measure_changes("bare", -1);
}

static void measure_empty(void)
{
	int fd = open_device("/dev/empty_notifier");

	measure_changes("empty", -1);
	close(fd);
}

static void measure_watched(void)
{
	int fd = open_device("/dev/ummunotify");
	unsigned long index;

	print("close-without-regions", timed_close(fd));

	fd = open_device("/dev/ummunotify");
	for (index = 0; index < nr_regions; index++)
		register_region(fd, index);
	measure_calls(fd);
	measure_changes("watched", fd);
	print_slab();
	print("close-total", timed_close(fd));
}

static void measure_feature(void)
{
	int fd = open_device("/dev/ummunotify");
	__u32 mask = feature->mask;
	char name[64];
	unsigned long index;
	int i;

	if (ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask) ||
	    mask != feature->mask)
		die("EXCHANGE_FEATURES");
	/* Not where misses are to be measured. */
	if (feature->slots &&
	    mmap(area - (64UL << 20), 8UL << 20, PROT_READ, MAP_SHARED, fd,
		 UMMUNOTIFY_STATE_OFFSET) == MAP_FAILED)
		die("mmap of the states");
	for (index = 0; index < nr_regions; index++)
		register_region(fd, index);
	measure_changes(feature->name, fd);

	for (i = 0; i < SAMPLES; i++) {
		uint64_t start;

		index = scattered(nr_regions);
		unregister_region(fd, index);
		start = now();
		register_region(fd, index);
		samples[i] = now() - start;
	}
	snprintf(name, sizeof(name), "register-%s", feature->name);
	print_median(name);
	close(fd);
}

/* An address space that had a notifier once pays for the next one in advance. */
static void in_a_process_of_its_own(void (*measure)(void))
{
	pid_t child = fork();
	int status;

	if (child < 0)
		die("fork");
	if (!child) {
		map_area();
		measure();
		exit(0);
	}
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	if (status)
		exit(1);
}

int main(int argc, char **argv)
{
	size_t j;
	int i;

	for (i = 1; i < argc; i++) {
		nr_regions = strtoul(argv[i], NULL, 0);
		in_a_process_of_its_own(measure_bare);
		in_a_process_of_its_own(measure_empty);
		in_a_process_of_its_own(measure_watched);
		for (j = 0; j < sizeof(features) / sizeof(*features); j++) {
			feature = &features[j];
			in_a_process_of_its_own(measure_feature);
		}
		feature = &none;
	}
	return 0;
}
