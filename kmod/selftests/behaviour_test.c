// SPDX-License-Identifier: GPL-2.0
/*
 * What a read() returns, and when the counter rises.  Also built for 32 bits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "device.h"

/* More than the driver handles in one hold of its lock. */
#define MANY	1000

static void the_counter_starts_at_zero(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	CHECK_EQ(generation(&device), 0);
	register_region(&device, page, page_size(), 1);
	CHECK_EQ(generation(&device), 0);
	unregister_region(&device, 1);
	CHECK_EQ(generation(&device), 0);
	expect_nothing(&device);
}

static void one_hit_is_one_report_and_last(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[8];
	char *page = map_pages(1);

	register_region(&device, page, page_size(), 42);
	CHECK_EQ(munmap(page, page_size()), 0);
	CHECK_EQ(generation(&device), 1);
	CHECK_EQ(poll_now(device.fd), POLLIN);
	CHECK_EQ(read_records(device.fd, events, 8), 2);
	check_inval(&events[0], 42, page, page_size(), HINT);
	check_last(&events[1], 1);
	expect_nothing(&device);
	CHECK_EQ(generation(&device), 1);
}

static void a_hit_next_to_a_region_is_none(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(3);
	char *middle = pages + page_size();

	register_region(&device, middle, page_size(), 1);
	zap(pages, 1);
	zap(middle + page_size(), 1);
	CHECK_EQ(generation(&device), 0);
	expect_nothing(&device);

	/* The first and the last byte count. */
	register_region(&device, middle - 1, 1, 2);
	register_region(&device, middle + page_size(), 1, 3);
	zap(pages, 1);
	expect_inval(&device, 2, middle - 1, 1, HINT);
	expect_last(&device, 1);
	zap(middle + page_size(), 1);
	expect_inval(&device, 3, middle + page_size(), 1, HINT);
	expect_last(&device, 2);
	zap(middle, 1);
	expect_inval(&device, 1, middle, page_size(), HINT);
	expect_last(&device, 3);
}

static void the_hint_is_clipped_to_the_region(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(6);
	size_t page = page_size();

	/* In pages: a region of [2, 4), hit from all sides. */
	register_region(&device, pages + 2 * page, 2 * page, 1);
	zap(pages, 6);
	expect_inval(&device, 1, pages + 2 * page, 2 * page, HINT);
	expect_last(&device, 1);
	zap(pages, 3);
	expect_inval(&device, 1, pages + 2 * page, page, HINT);
	expect_last(&device, 2);
	zap(pages + 3 * page, 3);
	expect_inval(&device, 1, pages + 3 * page, page, HINT);
	expect_last(&device, 3);

	/* To the byte, where the region is not of whole pages. */
	unregister_region(&device, 1);
	register_region(&device, pages + page + 100, 2 * page + 23, 2);
	zap(pages + page, 1);
	expect_inval(&device, 2, pages + page + 100, page - 100, HINT);
	expect_last(&device, 4);
	zap(pages + 3 * page, 1);
	expect_inval(&device, 2, pages + 3 * page, 123, HINT);
	expect_last(&device, 5);
	zap(pages + 2 * page, 1);
	expect_inval(&device, 2, pages + 2 * page, page, HINT);
	expect_last(&device, 6);
}

/* What coalescing keeps: that something happened, no longer where. */
static void a_second_hit_clears_the_hint(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(4);
	size_t page = page_size();

	/* Disjoint, then the same range twice, then many times. */
	register_region(&device, pages, 4 * page, 1);
	zap(pages, 1);
	zap(pages + 2 * page, 1);
	CHECK_EQ(generation(&device), 2);
	expect_inval(&device, 1, pages, 4 * page, 0);
	expect_last(&device, 2);

	zap(pages + page, 1);
	zap(pages + page, 1);
	CHECK_EQ(generation(&device), 4);
	expect_inval(&device, 1, pages, 4 * page, 0);
	expect_last(&device, 4);

	for (int i = 0; i < 100; i++)
		zap(pages + i % 4 * page, 1);
	CHECK_EQ(generation(&device), 104);
	expect_inval(&device, 1, pages, 4 * page, 0);
	expect_last(&device, 104);

	/* The next report starts afresh. */
	zap(pages + 3 * page, 1);
	expect_inval(&device, 1, pages + 3 * page, page, HINT);
	expect_last(&device, 105);
}

static void a_region_stays_registered_after_its_report(const void *unused)
{
	struct device device = open_device(0);
	size_t page = page_size();
	char *pages = map_pages(2);

	register_region(&device, pages, 2 * page, 1);
	for (unsigned int i = 1; i <= 50; i++) {
		zap(pages + i % 2 * page, 1);
		expect_inval(&device, 1, pages + i % 2 * page, page, HINT);
		expect_last(&device, i);
	}
	/* It does not shrink: what is mapped there again is watched again. */
	CHECK_EQ(munmap(pages, page), 0);
	expect_inval(&device, 1, pages, page, HINT);
	expect_last(&device, 51);
	CHECK(mmap(pages, page, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == pages);
	CHECK_EQ(generation(&device), 51);
	zap(pages, 1);
	expect_inval(&device, 1, pages, page, HINT);
	expect_last(&device, 52);
}

static void a_hit_on_many_regions_raises_the_counter_once(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[4];
	char *pages = map_pages(4);
	size_t page = page_size();

	/* Disjoint, the same range twice, and nested. */
	register_region(&device, pages, page, 1);
	register_region(&device, pages, page, 2);
	register_region(&device, pages, 4 * page, 3);
	register_region(&device, pages + 3 * page, page, 4);
	zap(pages, 3);
	CHECK_EQ(generation(&device), 1);
	CHECK_EQ(read_records(device.fd, events, 4), 4);
	check_last(&events[3], 1);
	zap(pages, 4);
	CHECK_EQ(generation(&device), 2);
	CHECK_EQ(drain(&device), 4);
}

static void check_each_cookie_once(const struct ummunotify_event *events,
				   size_t n)
{
	bool *seen = calloc(n, sizeof(*seen));

	CHECK(seen);
	for (size_t i = 0; i < n; i++) {
		CHECK_EQ(events[i].type, UMMUNOTIFY_EVENT_TYPE_INVAL);
		CHECK(events[i].user_cookie_counter < n);
		CHECK(!seen[events[i].user_cookie_counter]);
		seen[events[i].user_cookie_counter] = true;
	}
	free(seen);
}

/* An invalidation drops the lock between batches of hits. */
static void many_overlapping_regions_all_report_for_one(const void *unused)
{
	struct ummunotify_event *events = calloc(MANY + 1, sizeof(*events));
	struct device device = open_device(0);
	char *pages = map_pages(4);
	size_t page = page_size();

	CHECK(events);
	for (size_t i = 0; i < MANY; i++)
		register_region(&device, pages, 4 * page, i);
	zap(pages + page, 1);
	CHECK_EQ(generation(&device), 1);
	CHECK_EQ(read_records(device.fd, events, MANY + 1), MANY + 1);
	check_each_cookie_once(events, MANY);
	for (size_t i = 0; i < MANY; i++)
		check_inval(&events[i], events[i].user_cookie_counter,
			    pages + page, page, HINT);
	check_last(&events[MANY], 1);

	zap(pages, 1);
	zap(pages + 2 * page, 2);
	CHECK_EQ(generation(&device), 3);
	CHECK_EQ(read_records(device.fd, events, MANY + 1), MANY + 1);
	check_each_cookie_once(events, MANY);
	for (size_t i = 0; i < MANY; i++)
		check_inval(&events[i], events[i].user_cookie_counter,
			    pages, 4 * page, 0);
	check_last(&events[MANY], 3);
}

/* Every region that overlaps, and no other, whatever the tree looks like. */
static void random_regions_report_exactly_if_they_overlap(const void *unused)
{
	enum { REGIONS = 300, PAGES = 64, ROUNDS = 200 };
	static struct { size_t start, length; bool registered; } regions[REGIONS];
	static struct ummunotify_event events[REGIONS + 1];
	struct device device = open_device(O_NONBLOCK);
	char *pages = map_pages(PAGES);
	size_t page = page_size();
	u64 raised = 0;

	srandom(2010);
	for (int round = 0; round < ROUNDS; round++) {
		size_t first, length, hits = 0;
		long n;

		/* Some come, some go. */
		for (int i = 0; i < 30; i++) {
			size_t cookie = random() % REGIONS;

			if (regions[cookie].registered) {
				unregister_region(&device, cookie);
				regions[cookie].registered = false;
				continue;
			}
			regions[cookie].registered = true;
			regions[cookie].start = random() % (PAGES * page);
			regions[cookie].length =
				random() % (random() % 2 ? 3 * page :
					    PAGES * page - regions[cookie].start);
			register_region(&device, pages + regions[cookie].start,
					regions[cookie].length, cookie);
		}

		first = random() % PAGES;
		length = 1 + random() % (PAGES - first);
		zap(pages + first * page, length);
		for (size_t i = 0; i < REGIONS; i++)
			hits += regions[i].registered && regions[i].length &&
				regions[i].start < (first + length) * page &&
				regions[i].start + regions[i].length >
				first * page;
		raised += hits > 0;
		CHECK_EQ(generation(&device), raised);
		n = read_records(device.fd, events, REGIONS + 1);
		if (!hits) {
			CHECK_EQ(n, -EAGAIN);
			continue;
		}
		CHECK_EQ(n, hits + 1);
		for (size_t i = 0; i < hits; i++) {
			size_t cookie = events[i].user_cookie_counter;
			size_t from, to;

			CHECK(cookie < REGIONS && regions[cookie].registered);
			from = regions[cookie].start;
			to = from + regions[cookie].length;
			if (from < first * page)
				from = first * page;
			if (to > (first + length) * page)
				to = (first + length) * page;
			CHECK(from < to);
			check_inval(&events[i], cookie, pages + from, to - from,
				    HINT);
		}
		check_last(&events[hits], raised);
	}
}

static void last_comes_alone_if_there_was_no_room(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[3];
	char *page = map_pages(1);

	for (unsigned int i = 0; i < 3; i++)
		register_region(&device, page, page_size(), i);
	zap(page, 1);
	CHECK_EQ(read_records(device.fd, events, 3), 3);
	check_each_cookie_once(events, 3);
	CHECK_EQ(poll_now(device.fd), POLLIN);
	CHECK_EQ(read_records(device.fd, events, 3), 1);
	check_last(&events[0], 1);
	expect_nothing(&device);
}

static void last_waits_for_reports_queued_meanwhile(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(2);

	register_region(&device, pages, page_size(), 0);
	register_region(&device, pages + page_size(), page_size(), 1);
	zap(pages, 1);
	expect_inval(&device, 0, pages, page_size(), HINT);
	/* LAST is due: something comes in between. */
	zap(pages + page_size(), 1);
	expect_inval(&device, 1, pages + page_size(), page_size(), HINT);
	expect_last(&device, 2);
	expect_nothing(&device);
}

static void last_tells_the_generation_of_its_moment(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(2);

	register_region(&device, pages, page_size(), 0);
	for (unsigned int i = 1; i <= 10; i++)
		zap(pages, 1);
	CHECK_EQ(drain(&device), 1);
	CHECK_EQ(generation(&device), 10);
	zap(pages, 1);
	zap(pages, 1);
	expect_inval(&device, 0, pages, page_size(), 0);
	expect_last(&device, 12);
	CHECK_EQ(generation(&device), 12);
}

static void last_comes_though_the_region_was_unregistered(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	unregister_region(&device, 1);
	expect_last(&device, 1);
	expect_nothing(&device);
}

static void unregister_drops_the_report(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	for (unsigned int i = 0; i < 3; i++)
		register_region(&device, page, page_size(), i);
	zap(page, 1);
	unregister_region(&device, 1);
	CHECK_EQ(poll_now(device.fd), POLLIN);
	expect_inval(&device, 0, page, page_size(), HINT);
	expect_inval(&device, 2, page, page_size(), HINT);
	expect_last(&device, 1);
	expect_nothing(&device);

	/* The cookie's next region knows nothing of it. */
	zap(page, 1);
	unregister_region(&device, 0);
	register_region(&device, page, page_size(), 0);
	expect_inval(&device, 2, page, page_size(), HINT);
	expect_last(&device, 2);
	expect_nothing(&device);
}

/* Else the counter would differ from the latest LAST for ever. */
static void last_comes_after_unregister_of_the_last_pending(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	unregister_region(&device, 1);
	expect_last(&device, 1);
	expect_nothing(&device);

	/* With regions left, and with two reports dropped. */
	register_region(&device, page, page_size(), 1);
	register_region(&device, page, page_size(), 2);
	register_region(&device, page + page_size(), page_size(), 3);
	zap(page, 1);
	unregister_region(&device, 2);
	unregister_region(&device, 1);
	expect_last(&device, 2);
	expect_nothing(&device);

	/* Without a report there is nothing to explain. */
	unregister_region(&device, 3);
	expect_nothing(&device);
}

static void no_last_without_a_report(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	expect_nothing(&device);
	register_region(&device, page, page_size(), 1);
	expect_nothing(&device);
	zap(page, 1);
	CHECK_EQ(drain(&device), 1);
	expect_nothing(&device);
	unregister_region(&device, 1);
	expect_nothing(&device);
	zap(page, 1);
	expect_nothing(&device);
}

/* "What happens if I try to read() three bytes from that fd?" */
static void a_read_of_three_bytes_is_einval(const void *unused)
{
	static const size_t lengths[] = { 3, 0, 1, 8, 24, 31 };
	struct device device = open_device(0);
	char *page = map_pages(1);
	char buffer[32];

	/* Whether there is something to read, or not: it never waits. */
	for (int readable = 0; readable <= 1; readable++) {
		for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
			CHECK_EQ(read(device.fd, buffer, lengths[i]), -1);
			CHECK_EQ(errno, EINVAL);
		}
		if (!readable) {
			register_region(&device, page, page_size(), 1);
			zap(page, 1);
		}
	}
	/* And has taken nothing. */
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void a_read_is_rounded_down_to_records(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	char buffer[160];

	for (unsigned int i = 0; i < 4; i++)
		register_region(&device, page, page_size(), i);
	zap(page, 1);
	memset(buffer, 0x5a, sizeof(buffer));
	CHECK_EQ(read(device.fd, buffer, 63), 32);
	for (size_t i = 32; i < sizeof(buffer); i++)
		CHECK_EQ(buffer[i], 0x5a);
	CHECK_EQ(read(device.fd, buffer, 33), 32);
	CHECK_EQ(read(device.fd, buffer, 95), 64);
	CHECK_EQ(read(device.fd, buffer, 159), 32);
	expect_nothing(&device);
}

/* Around the number of records that the driver copies at a time. */
static void reads_of_any_size_deliver_everything_once(const void *unused)
{
	enum { REGIONS = 100 };
	struct ummunotify_event events[2 * REGIONS];
	struct device device = open_device(0);
	char *page = map_pages(1);
	unsigned int zapped = 0;

	for (unsigned int i = 0; i < REGIONS; i++)
		register_region(&device, page, page_size(), i);
	for (size_t room = 1; room <= REGIONS + 2; room++) {
		size_t got = 0;

		zap(page, 1);
		zapped++;
		while (got < REGIONS + 1) {
			size_t left = REGIONS + 1 - got;
			long n = read_records(device.fd, &events[got], room);

			/* As many as there are, up to LAST. */
			CHECK_EQ(n, left < room ? left : room);
			got += n;
		}
		check_each_cookie_once(events, REGIONS);
		check_last(&events[REGIONS], zapped);
		expect_nothing(&device);
	}
}

static void a_read_that_faults_loses_nothing(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1), *read_only = map_pages(1);
	struct ummunotify_event events[4];
	char *nowhere = page + page_size();

	CHECK_EQ(mprotect(read_only, page_size(), PROT_READ), 0);
	for (unsigned int i = 0; i < 3; i++)
		register_region(&device, page, page_size(), i);
	zap(page, 1);
	for (int i = 0; i < 3; i++) {
		/* Where nothing may be accessed, and nothing be written. */
		CHECK_EQ(read(device.fd, nowhere, 4096), -1);
		CHECK_EQ(errno, EFAULT);
		CHECK_EQ(read(device.fd, read_only, 4096), -1);
		CHECK_EQ(errno, EFAULT);
		CHECK_EQ(poll_now(device.fd), POLLIN);
	}
	CHECK_EQ(read_records(device.fd, events, 4), 4);
	check_each_cookie_once(events, 3);
	for (int i = 0; i < 3; i++)
		check_inval(&events[i], events[i].user_cookie_counter, page,
			    page_size(), HINT);
	check_last(&events[3], 1);
	expect_nothing(&device);
}

static void a_fault_does_not_lose_last(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	CHECK_EQ(read(device.fd, page + page_size(), 32), -1);
	CHECK_EQ(errno, EFAULT);
	expect_last(&device, 1);
	expect_nothing(&device);
}

/* A hit between the failed read() and the next one coalesces as always. */
static void a_fault_does_not_confuse_the_next_hit(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(read(device.fd, page + page_size(), 32), -1);
	zap(page, 1);
	CHECK_EQ(generation(&device), 2);
	expect_inval(&device, 1, page, page_size(), 0);
	expect_last(&device, 2);
	expect_nothing(&device);
}

/* Wherever in the buffer the hole begins, even inside a record. */
static void a_half_mapped_buffer_loses_nothing(const void *unused)
{
	enum { REGIONS = 50 };
	struct ummunotify_event events[2 * REGIONS];
	struct device device = open_device(0);
	char *page = map_pages(1), *end = map_pages(1) + page_size();
	unsigned int zapped = 0;

	for (unsigned int i = 0; i < REGIONS; i++)
		register_region(&device, page, page_size(), i);
	for (size_t mapped = 0; mapped <= 32 * (REGIONS + 2); mapped += 24) {
		size_t got = 0;
		ssize_t ret;

		zap(page, 1);
		zapped++;
		ret = read(device.fd, end - mapped, 4096);
		if (ret < 0) {
			CHECK_EQ(errno, EFAULT);
		} else {
			CHECK_EQ(ret % 32, 0);
			CHECK((size_t)ret <= mapped);
			got = ret / 32;
			memcpy(events, end - mapped, ret);
		}
		if (got < REGIONS + 1)
			got += read_records(device.fd, &events[got], REGIONS);
		if (got < REGIONS + 1)
			got += read_records(device.fd, &events[got], REGIONS);
		CHECK_EQ(got, REGIONS + 1);
		check_each_cookie_once(events, REGIONS);
		check_last(&events[REGIONS], zapped);
		expect_nothing(&device);
	}
}

/* A read() into watched memory must neither hang nor lose what it causes. */
static void a_read_into_the_watched_page_itself(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event *events;
	char *page = map_pages(1);
	int fd = make_shared_file(1);
	u64 told = 0;

	/* A private mapping of a file: the first write copies the page. */
	CHECK_EQ(pwrite(fd, "x", 1, 0), 1);
	events = (void *)map_untouched(1, PROT_READ | PROT_WRITE, MAP_PRIVATE,
				       fd);
	CHECK_EQ(*(char *)events, 'x');
	register_region(&device, page, page_size(), 1);
	register_region(&device, events, page_size(), 2);
	zap(page, 1);
	CHECK_EQ(generation(&device), 1);

	/* This one reports the copy of the page that it writes to. */
	for (int reports = 0; reports < 2;) {
		CHECK(poll_now(device.fd) & POLLIN);
		CHECK_EQ(read_records(device.fd, events, 1), 1);
		if (events->type == UMMUNOTIFY_EVENT_TYPE_LAST) {
			told = events->user_cookie_counter;
			continue;
		}
		CHECK_EQ(events->user_cookie_counter, reports ? 2 : 1);
		reports++;
	}
	while (told != generation(&device)) {
		CHECK_EQ(read_records(device.fd, events, 1), 1);
		told = events->user_cookie_counter;
	}
	expect_nothing(&device);
}

/* The report is on its way to user space when its region is hit again. */
static void a_hit_while_a_reader_copies_is_reported_again(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event *events;
	int fd = make_shared_file(2);
	char *pages;

	/* The read() is the first write to the second page, and copies it. */
	CHECK_EQ(pwrite(fd, "x", 1, page_size()), 1);
	pages = map_untouched(2, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	CHECK_EQ(pages[page_size()], 'x');
	events = (void *)(pages + page_size());
	register_region(&device, pages, 2 * page_size(), 1);
	zap(pages, 1);
	CHECK_EQ(generation(&device), 1);
	CHECK_EQ(read_records(device.fd, events, 1), 1);
	check_inval(&events[0], 1, pages, page_size(), HINT);
	CHECK_EQ(generation(&device), 2);
	CHECK_EQ(read_records(device.fd, events, 2), 2);
	check_inval(&events[0], 1, pages, 2 * page_size(), 0);
	check_last(&events[1], 2);
	expect_nothing(&device);
}

static void readv_fills_whole_records(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct ummunotify_event events[2];
	struct iovec iov[] = {
		{ .iov_base = &events[0], .iov_len = sizeof(events[0]) },
		{ .iov_base = &events[1], .iov_len = sizeof(events[1]) },
	};

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(readv(device.fd, iov, 2), sizeof(events));
	check_inval(&events[0], 1, page, page_size(), HINT);
	check_last(&events[1], 1);
}

static void a_blocking_readv_does_not_wait_to_fill_its_parts(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct ummunotify_event events[4];
	struct iovec iov[ARRAY_SIZE(events)];

	for (unsigned int i = 0; i < ARRAY_SIZE(events); i++) {
		iov[i].iov_base = &events[i];
		iov[i].iov_len = sizeof(events[i]);
	}
	CHECK_EQ(fcntl(device.fd, F_SETFL, 0), 0);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(readv(device.fd, iov, ARRAY_SIZE(iov)), 2 * sizeof(events[0]));
	check_inval(&events[0], 1, page, page_size(), HINT);
	check_last(&events[1], 1);
}

/* A record lies across two parts, one of which cannot be written. */
static void a_readv_that_faults_loses_nothing(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *page = map_pages(1);
	char *read_only = map_untouched(1, PROT_READ,
					MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char part[8];
	struct iovec iov[] = {
		{ .iov_base = part, .iov_len = sizeof(part) },
		{ .iov_base = read_only, .iov_len = page_size() },
	};

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(readv(device.fd, iov, ARRAY_SIZE(iov)), -1);
	CHECK_EQ(errno, EFAULT);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

#define UNMAP	UMMUNOTIFY_EVENT_CAUSE_UNMAP
#define CLEAR	UMMUNOTIFY_EVENT_CAUSE_CLEAR
#define PROTECT	UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING

static void a_report_has_the_causes_of_all_it_reports(const void *unused)
{
	struct device device = open_device_with_causes(0);
	char *pages = map_pages(2);
	char *second = pages + page_size();

	register_region(&device, pages, 2 * page_size(), 1);
	CHECK_EQ(madvise(pages, page_size(), MADV_DONTNEED), 0);
	CHECK_EQ(mprotect(second, page_size(), PROT_READ), 0);
	expect_inval(&device, 1, pages, 2 * page_size(), CLEAR | PROTECT);
	expect_last(&device, 2);
	/* And no more than that. */
	CHECK_EQ(munmap(second, page_size()), 0);
	expect_inval(&device, 1, second, page_size(), HINT | UNMAP);
	expect_last(&device, 3);
}

static void causes_belong_to_the_fd_that_asked(const void *unused)
{
	struct device with = open_device_with_causes(0), without = open_device(0);
	char *page = map_pages(1);

	register_region(&with, page, page_size(), 1);
	register_region(&without, page, page_size(), 1);
	CHECK_EQ(munmap(page, page_size()), 0);
	expect_inval(&with, 1, page, page_size(), HINT | UNMAP);
	expect_inval(&without, 1, page, page_size(), HINT);
}

static void truncate_when_told(int socket, void *arg)
{
	receive_word(socket);
	CHECK_EQ(ftruncate(*(int *)arg, 0), 0);
}

static void what_others_do_is_foreign(const void *unused)
{
	struct device device = open_device_with_causes(0);
	int fd = memfd_create("shared", MFD_CLOEXEC);
	struct peer peer;
	char *page;

	CHECK_EQ(ftruncate(fd, page_size()), 0);
	page = map_untouched(1, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	touch(page, 1);
	peer = start_peer(truncate_when_told, &fd);
	register_region(&device, page, page_size(), 1);
	send_word(peer.socket, 0);
	join_peer(&peer);
	/* A kernel can do that in one step or two. */
	expect_inval(&device, 1, page, page_size(), CLEAR |
		     UMMUNOTIFY_EVENT_CAUSE_FOREIGN |
		     (generation(&device) == 1 ? HINT : 0));
	expect_last(&device, generation(&device));
	close(fd);
}

static void expect_fdinfo(const struct device *device, const char *expected)
{
	char path[64], text[1024] = "";
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", device->fd);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	CHECK(read(fd, text, sizeof(text) - 1) > 0);
	close(fd);
	if (!strstr(text, expected))
		FAIL("no %s in %s", expected, text);
}

static void fdinfo_tells_regions_pending_and_generation(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(3);

	expect_fdinfo(&device, "ummunotify-regions:\t0\n"
			       "ummunotify-pending:\t0\n"
			       "ummunotify-generation:\t0\n");
	for (unsigned int i = 0; i < 3; i++)
		register_region(&device, pages + i * page_size(), page_size(),
				i);
	zap(pages, 2);
	zap(pages, 1);
	expect_fdinfo(&device, "ummunotify-regions:\t3\n"
			       "ummunotify-pending:\t2\n"
			       "ummunotify-generation:\t2\n");
	unregister_region(&device, 1);
	expect_fdinfo(&device, "ummunotify-regions:\t2\n"
			       "ummunotify-pending:\t1\n"
			       "ummunotify-generation:\t2\n");
	drain(&device);
	expect_fdinfo(&device, "ummunotify-regions:\t2\n"
			       "ummunotify-pending:\t0\n"
			       "ummunotify-generation:\t2\n");
}

static void two_fds_tell_the_same_independently(const void *unused)
{
	struct device first = open_device(0), second = open_device(0);
	char *page = map_pages(1);

	register_region(&first, page, page_size(), 1);
	register_region(&second, page, page_size(), 2);
	zap(page, 1);
	expect_inval(&first, 1, page, page_size(), HINT);
	zap(page, 1);
	expect_inval(&second, 2, page, page_size(), 0);
	expect_last(&second, 2);
	expect_inval(&first, 1, page, page_size(), HINT);
	expect_last(&first, 2);
	close_device(&first);
	zap(page, 1);
	expect_inval(&second, 2, page, page_size(), HINT);
	expect_last(&second, 3);
}

static const struct test tests[] = {
	TEST(the_counter_starts_at_zero),
	TEST(one_hit_is_one_report_and_last),
	TEST(a_hit_next_to_a_region_is_none),
	TEST(the_hint_is_clipped_to_the_region),
	TEST(a_second_hit_clears_the_hint),
	TEST(a_region_stays_registered_after_its_report),
	TEST(a_hit_on_many_regions_raises_the_counter_once),
	TEST(many_overlapping_regions_all_report_for_one),
	TEST(random_regions_report_exactly_if_they_overlap),
	TEST(last_comes_alone_if_there_was_no_room),
	TEST(last_waits_for_reports_queued_meanwhile),
	TEST(last_tells_the_generation_of_its_moment),
	TEST(last_comes_though_the_region_was_unregistered),
	TEST(unregister_drops_the_report),
	TEST(last_comes_after_unregister_of_the_last_pending),
	TEST(no_last_without_a_report),
	TEST(a_read_of_three_bytes_is_einval),
	TEST(a_read_is_rounded_down_to_records),
	TEST(reads_of_any_size_deliver_everything_once),
	TEST(a_read_that_faults_loses_nothing),
	TEST(a_fault_does_not_lose_last),
	TEST(a_fault_does_not_confuse_the_next_hit),
	TEST(a_half_mapped_buffer_loses_nothing),
	TEST(a_read_into_the_watched_page_itself),
	TEST(a_hit_while_a_reader_copies_is_reported_again),
	TEST(readv_fills_whole_records),
	TEST(a_blocking_readv_does_not_wait_to_fill_its_parts),
	TEST(a_readv_that_faults_loses_nothing),
	TEST(a_report_has_the_causes_of_all_it_reports),
	TEST(causes_belong_to_the_fd_that_asked),
	TEST(what_others_do_is_foreign),
	TEST(fdinfo_tells_regions_pending_and_generation),
	TEST(two_fds_tell_the_same_independently),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
