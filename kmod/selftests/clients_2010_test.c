// SPDX-License-Identifier: GPL-2.0
/*
 * What clients of the 2010 driver do, from declarations of their own: nothing
 * here comes from our header.  Also built for 32 bits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/epoll.h>
#include <unistd.h>
#include <pthread.h>

#include "harness.h"

#define EXCHANGE_FEATURES	0xc0045501
#define REGISTER_REGION		0x40205502
#define UNREGISTER_REGION	0x40085503

#define INVAL		0
#define LAST		1
#define FLAG_HINT	1

struct region_2010 {
	u64	start;
	u64	end;
	u64	user_cookie;
	u32	flags;
	u32	reserved;
};

struct event_2010 {
	u32	type;
	u32	flags;
	u64	hint_start;
	u64	hint_end;
	u64	user_cookie_counter;
};

static size_t page_size;

static char *allocate(size_t pages)
{
	char *area;

	page_size = sysconf(_SC_PAGESIZE);
	/* Guards on both sides: neighbours would become one mapping with it. */
	area = mmap(NULL, (pages + 2) * page_size, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(area != MAP_FAILED);
	area += page_size;
	CHECK_EQ(mprotect(area, pages * page_size, PROT_READ | PROT_WRITE), 0);
	memset(area, 1, pages * page_size);
	return area;
}

static const void *map_counter(int fd)
{
	const void *counter = mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);

	CHECK(counter != MAP_FAILED);
	return counter;
}

/* With 32 bits, low word (little-endian) first: the driver writes high first. */
static u64 load_counter(const void *counter)
{
#if __SIZEOF_POINTER__ >= 8
	return __atomic_load_n((const u64 *)counter, __ATOMIC_ACQUIRE);
#else
	const u32 *words = counter;
	u32 low = __atomic_load_n(&words[0], __ATOMIC_ACQUIRE);

	return (u64)__atomic_load_n(&words[1], __ATOMIC_ACQUIRE) << 32 | low;
#endif
}

/*
 * Open MPI 1.5 to 1.10: never calls EXCHANGE, leaves flags uninitialised, and
 * reads into an array of 128 events as long as the counter is not that of the
 * latest LAST.
 */
struct open_mpi {
	int			fd;
	const void		*counter;
	u64			current;
	struct event_2010	events[128];
	uintptr_t		invalidated[256];
	size_t			nr_invalidated;
};

static void open_mpi_open(struct open_mpi *mpi)
{
	mpi->fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
	CHECK(mpi->fd >= 0);
	mpi->counter = map_counter(mpi->fd);
	mpi->current = 0;
	mpi->nr_invalidated = 0;
}

static void open_mpi_monitor(struct open_mpi *mpi, char *base, size_t length)
{
	struct region_2010 region;

	memset(&region, 0xa5, sizeof(region));
	region.start = (uintptr_t)base;
	region.end = (uintptr_t)base + length;
	region.user_cookie = (uintptr_t)base;
	region.reserved = 0;
	CHECK_EQ(ioctl(mpi->fd, REGISTER_REGION, &region), 0);
}

static void open_mpi_check(struct open_mpi *mpi)
{
	while (load_counter(mpi->counter) != mpi->current) {
		ssize_t n = read(mpi->fd, mpi->events, sizeof(mpi->events));

		CHECK(n > 0);
		CHECK_EQ(n % sizeof(mpi->events[0]), 0);
		n /= sizeof(mpi->events[0]);
		for (ssize_t i = 0; i < n; i++) {
			struct event_2010 *event = &mpi->events[i];

			if (event->type == LAST) {
				mpi->current = event->user_cookie_counter;
				continue;
			}
			CHECK_EQ(event->type, INVAL);
			CHECK(mpi->nr_invalidated < 256);
			mpi->invalidated[mpi->nr_invalidated++] =
				event->user_cookie_counter;
		}
	}
}

static void open_mpi_never_exchanges_and_leaves_flags_alone(const void *unused)
{
	enum { BUFFERS = 200 };
	static struct open_mpi mpi;
	char *pages = allocate(BUFFERS);

	open_mpi_open(&mpi);
	for (int i = 0; i < BUFFERS; i++)
		open_mpi_monitor(&mpi, pages + i * page_size, page_size);
	open_mpi_check(&mpi);
	CHECK_EQ(mpi.nr_invalidated, 0);

	/* More than fits into one read(). */
	CHECK_EQ(munmap(pages, BUFFERS * page_size), 0);
	open_mpi_check(&mpi);
	CHECK_EQ(mpi.nr_invalidated, BUFFERS);
	CHECK_EQ(mpi.current, 1);
	for (int i = 0; i < BUFFERS; i++) {
		u64 cookie = mpi.invalidated[i];

		CHECK_EQ(ioctl(mpi.fd, UNREGISTER_REGION, &cookie), 0);
	}
	open_mpi_check(&mpi);
	CHECK_EQ(mpi.nr_invalidated, BUFFERS);
	CHECK_EQ(read(mpi.fd, mpi.events, sizeof(mpi.events)), -1);
	CHECK_EQ(errno, EAGAIN);
}

/* A cache evicts: it unregisters what is pending, and must not spin then. */
static void open_mpi_evicts_what_was_invalidated(const void *unused)
{
	static struct open_mpi mpi;
	char *pages = allocate(2);
	u64 cookie = (uintptr_t)pages;

	open_mpi_open(&mpi);
	open_mpi_monitor(&mpi, pages, page_size);
	CHECK_EQ(munmap(pages, page_size), 0);
	CHECK_EQ(load_counter(mpi.counter), 1);
	CHECK_EQ(ioctl(mpi.fd, UNREGISTER_REGION, &cookie), 0);
	open_mpi_check(&mpi);
	CHECK_EQ(mpi.nr_invalidated, 0);
	CHECK_EQ(mpi.current, 1);
}

/*
 * The test program that came with the patch: passes an uninitialised mask, and
 * expects the exact page of one munmap.
 */
static void the_test_program_passes_an_uninitialised_mask(const void *unused)
{
	static const u32 masks[] = { 0xdeadbeef, 0xffffffff, 0x7fff, 1 };

	for (size_t i = 0; i < ARRAY_SIZE(masks); i++) {
		int fd = open("/dev/ummunotify", O_RDONLY);
		struct event_2010 events[2];
		struct region_2010 region = {};
		const void *counter;
		u32 mask = masks[i];
		char *pages = allocate(3);

		CHECK(fd >= 0);
		CHECK_EQ(ioctl(fd, EXCHANGE_FEATURES, &mask), 0);
		counter = map_counter(fd);
		CHECK_EQ(load_counter(counter), 0);

		region.start = (uintptr_t)pages;
		region.end = (uintptr_t)pages + 3 * page_size;
		region.user_cookie = 0x123456789abcdef0;
		CHECK_EQ(ioctl(fd, REGISTER_REGION, &region), 0);
		CHECK_EQ(load_counter(counter), 0);

		CHECK_EQ(munmap(pages + page_size, page_size), 0);
		CHECK_EQ(load_counter(counter), 1);
		memset(events, 0xff, sizeof(events));
		CHECK_EQ(read(fd, events, sizeof(events)), sizeof(events));
		CHECK_EQ(events[0].type, INVAL);
		CHECK_EQ(events[0].flags & FLAG_HINT, FLAG_HINT);
		CHECK_EQ(events[0].hint_start, (uintptr_t)pages + page_size);
		CHECK_EQ(events[0].hint_end, (uintptr_t)pages + 2 * page_size);
		CHECK_EQ(events[0].user_cookie_counter, 0x123456789abcdef0);
		CHECK_EQ(events[1].type, LAST);
		CHECK_EQ(events[1].user_cookie_counter, 1);

		region.start = 0x2000;
		region.end = 0x3000;
		CHECK_EQ(ioctl(fd, REGISTER_REGION, &region), -1);
		CHECK_EQ(errno, EINVAL);
		CHECK_EQ(ioctl(fd, UNREGISTER_REGION, &region.user_cookie), 0);
		CHECK_EQ(close(fd), 0);
	}
}

/*
 * Portals4: a thread reads one event per wake-up until LAST, and publishes its
 * generation; others spin until the counter is what was published.
 */
struct portals {
	int		fd;
	const void	*counter;
	u64		published;
	unsigned int	reports;
	bool		stop;
};

static void *portals_read_one_by_one(void *arg)
{
	struct portals *portals = arg;
	struct epoll_event wakeup = { .events = EPOLLIN };
	int epoll = epoll_create1(0);

	CHECK(epoll >= 0);
	CHECK_EQ(epoll_ctl(epoll, EPOLL_CTL_ADD, portals->fd, &wakeup), 0);
	while (!__atomic_load_n(&portals->stop, __ATOMIC_ACQUIRE)) {
		struct event_2010 event;

		if (epoll_wait(epoll, &wakeup, 1, 10) <= 0)
			continue;
		CHECK_EQ(read(portals->fd, &event, sizeof(event)),
			 sizeof(event));
		if (event.type == LAST) {
			__atomic_store_n(&portals->published,
					 event.user_cookie_counter,
					 __ATOMIC_RELEASE);
			continue;
		}
		CHECK_EQ(event.type, INVAL);
		CHECK(event.user_cookie_counter < 32);
		portals->reports++;
	}
	return NULL;
}

static void portals4_reads_one_event_until_last(const void *unused)
{
	enum { ROUNDS = 300, PAGES = 32 };
	struct portals portals = {
		.fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK),
	};
	char *pages = allocate(PAGES);
	pthread_t thread;

	CHECK(portals.fd >= 0);
	portals.counter = map_counter(portals.fd);
	for (int i = 0; i < PAGES; i++) {
		struct region_2010 region = {
			.start		= (uintptr_t)pages + i * page_size,
			.end		= (uintptr_t)pages + (i + 1) * page_size,
			.user_cookie	= i,
		};

		CHECK_EQ(ioctl(portals.fd, REGISTER_REGION, &region), 0);
	}
	CHECK_EQ(pthread_create(&thread, NULL, portals_read_one_by_one,
				&portals), 0);
	for (int round = 0; round < ROUNDS; round++) {
		CHECK_EQ(madvise(pages, (1 + round % PAGES) * page_size,
				 MADV_DONTNEED), 0);
		/* A missing LAST, or a wrong one, hangs here. */
		while (load_counter(portals.counter) !=
		       __atomic_load_n(&portals.published, __ATOMIC_ACQUIRE))
			sched_yield();
	}
	__atomic_store_n(&portals.stop, true, __ATOMIC_RELEASE);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK(portals.reports >= ROUNDS);
	CHECK(load_counter(portals.counter) >= ROUNDS);
}

/*
 * zhpe: the end of a region is the address of its last byte, which makes one
 * byte an empty range; single reads until EAGAIN.
 */
static void zhpe_passes_the_last_byte_as_the_end(const void *unused)
{
	int fd = open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
	char *pages = allocate(4);
	unsigned int seen = 0, lasts = 0;
	struct event_2010 event;
	ssize_t ret;

	CHECK(fd >= 0);
	for (u64 i = 0; i < 4; i++) {
		/* The fourth is of one byte. */
		u64 length = i < 3 ? page_size : 1;
		struct region_2010 region = {
			.start		= (uintptr_t)pages + i * page_size,
			.end		= (uintptr_t)pages + i * page_size +
					  length - 1,
			.user_cookie	= i,
		};

		CHECK_EQ(ioctl(fd, REGISTER_REGION, &region), 0);
	}
	CHECK_EQ(munmap(pages, 4 * page_size), 0);
	while ((ret = read(fd, &event, sizeof(event))) > 0) {
		CHECK_EQ(ret, sizeof(event));
		if (event.type == LAST) {
			lasts++;
			continue;
		}
		CHECK_EQ(lasts, 0);
		CHECK(event.user_cookie_counter < 3);
		seen |= 1u << event.user_cookie_counter;
	}
	CHECK_EQ(ret, -1);
	CHECK_EQ(errno, EAGAIN);
	CHECK_EQ(seen, 7);
	CHECK_EQ(lasts, 1);
	for (u64 i = 0; i < 4; i++)
		CHECK_EQ(ioctl(fd, UNREGISTER_REGION, &i), 0);
}

static const struct test tests[] = {
	TEST(open_mpi_never_exchanges_and_leaves_flags_alone),
	TEST(open_mpi_evicts_what_was_invalidated),
	TEST(the_test_program_passes_an_uninitialised_mask),
	TEST(portals4_reads_one_event_until_last),
	TEST(zhpe_passes_the_last_byte_as_the_end),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
