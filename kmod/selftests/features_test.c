// SPDX-License-Identifier: GPL-2.0
/*
 * What a registration may ask for: some causes only, one report only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

#define CAUSE	UMMUNOTIFY_FEATURE_CAUSE
#define FILTER	UMMUNOTIFY_FEATURE_FILTER
#define ONCE	UMMUNOTIFY_FEATURE_ONCE
#define ALL	(CAUSE | FILTER | ONCE | UMMUNOTIFY_FEATURE_STATE)

#define UNMAP	UMMUNOTIFY_EVENT_CAUSE_UNMAP
#define CLEAR	UMMUNOTIFY_EVENT_CAUSE_CLEAR
#define PROTECT	UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING
#define END	UMMUNOTIFY_EVENT_CAUSE_END
#define MOVE	UMMUNOTIFY_EVENT_CAUSE_MOVE
#define FOREIGN	UMMUNOTIFY_EVENT_CAUSE_FOREIGN

#define FLAG_ONCE	UMMUNOTIFY_REGION_FLAG_ONCE

static int try_watch(const struct device *device, const char *start,
		     size_t pages, u64 cookie, u32 flags)
{
	return try_register_with(device->fd, address(start),
				 address(start) + pages * page_size(), cookie,
				 flags, 0);
}

static void watch(const struct device *device, const char *start, size_t pages,
		  u64 cookie, u32 flags)
{
	CHECK_EQ(try_watch(device, start, pages, cookie, flags), 0);
}

static void what_a_region_does_not_ask_for_is_not_reported(const void *unused)
{
	struct device device = open_device_with(FILTER | CAUSE, O_NONBLOCK);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, UNMAP);
	zap(page, 1);
	CHECK_EQ(mprotect(page, page_size(), PROT_READ), 0);
	expect_nothing(&device);
	CHECK_EQ(generation(&device), 0);
	CHECK_EQ(munmap(page, page_size()), 0);
	expect_inval(&device, 1, page, page_size(), HINT | UNMAP);
	expect_last(&device, 1);
}

static void each_region_has_its_own_causes(const void *unused)
{
	struct device device = open_device_with(FILTER | CAUSE, O_NONBLOCK);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, UNMAP);
	watch(&device, page, 1, 2, CLEAR | PROTECT);
	watch(&device, page, 1, 3, PROTECT);
	watch(&device, page, 1, 4, 0);
	zap(page, 1);
	expect_inval(&device, 2, page, page_size(), HINT | CLEAR);
	expect_inval(&device, 4, page, page_size(), HINT | CLEAR);
	expect_last(&device, 1);
	CHECK_EQ(mprotect(page, page_size(), PROT_READ), 0);
	zap(page, 1);
	expect_inval(&device, 2, page, page_size(), CLEAR | PROTECT);
	expect_inval(&device, 3, page, page_size(), HINT | PROTECT);
	expect_inval(&device, 4, page, page_size(), CLEAR | PROTECT);
	expect_last(&device, 3);
	CHECK_EQ(munmap(page, page_size()), 0);
	expect_inval(&device, 1, page, page_size(), HINT | UNMAP);
	expect_inval(&device, 4, page, page_size(), HINT | UNMAP);
	expect_last(&device, 4);
}

/* Nor when those that asked for it are gone, or come later. */
static void filters_come_and_go_with_their_regions(const void *unused)
{
	struct device device = open_device_with(FILTER, O_NONBLOCK);
	char *page = map_pages(1);

	for (int round = 0; round < 3; round++) {
		watch(&device, page, 1, 1, UNMAP);
		zap(page, 1);
		expect_nothing(&device);
		watch(&device, page, 1, 2, CLEAR);
		zap(page, 1);
		expect_inval(&device, 2, page, page_size(), HINT);
		expect_last(&device, round + 1);
		unregister_region(&device, 2);
		zap(page, 1);
		expect_nothing(&device);
		unregister_region(&device, 1);
	}
}

static void a_filter_without_causes_tells_none(const void *unused)
{
	struct device device = open_device_with(FILTER, O_NONBLOCK);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, CLEAR);
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void who_asks_for_moves_is_told_of_unmapping(const void *unused)
{
	struct device device = open_device_with(FILTER | CAUSE, O_NONBLOCK);
	char *page = map_pages(1);
	char *target = map_untouched(1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
				     -1);

	watch(&device, page, 1, 1, MOVE);
	CHECK(mremap(page, page_size(), page_size(),
		     MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
	CHECK_EQ(drain(&device), 1);
	CHECK(generation(&device) > 0);
}

static void watch_for_a_device(int socket, void *arg)
{
	struct device device = open_device_with(FILTER | CAUSE, 0);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, UMMUNOTIFY_EVENT_CAUSE_EXCLUSIVE);
	watch(&device, page, 1, 2, END);
	send_word(socket, address(page));
	send_fd(socket, device.fd);
	receive_word(socket);
}

static void the_end_is_told_to_all(const void *unused)
{
	struct peer peer = start_peer(watch_for_a_device, NULL);
	const char *page = (const char *)(uintptr_t)receive_word(peer.socket);
	struct device device = { .fd = receive_fd(peer.socket) };
	struct ummunotify_event events[4];

	send_word(peer.socket, 0);
	join_peer(&peer);
	CHECK_EQ(read_records(device.fd, events, ARRAY_SIZE(events)), 3);
	check_inval(&events[0], 1, page, page_size(), HINT | END);
	check_inval(&events[1], 2, page, page_size(), HINT | END);
	check_last(&events[2], 1);
	CHECK_EQ(read_records(device.fd, events, ARRAY_SIZE(events)), 0);
}

static void what_was_not_negotiated_is_einval(const void *unused)
{
	static const struct {
		u32	features;
		u32	flags;
		int	result;
	} rows[] = {
		{ FILTER, FLAG_ONCE, -EINVAL },
		{ FILTER, UNMAP, 0 },
		{ FILTER, UNMAP | FOREIGN, -EINVAL },
		{ FILTER, FOREIGN, -EINVAL },
		{ FILTER, 0x04000000, -EINVAL },
		{ FILTER, 0x80000000, -EINVAL },
		{ FILTER, HINT << 1, -EINVAL },
		{ ONCE, FLAG_ONCE, 0 },
		{ ONCE, UNMAP, -EINVAL },
		{ ONCE, 2, -EINVAL },
		{ ALL, FLAG_ONCE | UMMUNOTIFY_REGION_CAUSE_MASK, 0 },
		{ ALL, 0, 0 },
		/* Garbage of those who asked for neither. */
		{ CAUSE, 0xdeadbeef, 0 },
		{ UMMUNOTIFY_FEATURE_STATE, 0xdeadbeef, 0 },
		{ 0, 0xdeadbeef, 0 },
	};
	char *page = map_pages(1);

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		struct device device = open_device_with(rows[i].features,
							O_NONBLOCK);

		CHECK_EQ(try_watch(&device, page, 1, 1, rows[i].flags),
			 rows[i].result);
		/* Nothing is left of it. */
		CHECK_EQ(try_unregister(device.fd, 1),
			 rows[i].result ? -EINVAL : 0);
		close_device(&device);
	}
}

static void garbage_without_filters_filters_nothing(const void *unused)
{
	struct device device = open_device_with(CAUSE, O_NONBLOCK);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, FLAG_ONCE | UNMAP);
	for (int i = 0; i < 2; i++) {
		zap(page, 1);
		expect_inval(&device, 1, page, page_size(), HINT | CLEAR);
		expect_last(&device, i + 1);
	}
}

static void a_one_shot_region_reports_once_and_is_gone(const void *unused)
{
	struct device device = open_device_with(ONCE, O_NONBLOCK);
	char *page = map_pages(1);

	for (int round = 0; round < 3; round++) {
		/* Its cookie is free again. */
		watch(&device, page, 1, 1, FLAG_ONCE);
		zap(page, 1);
		expect_inval(&device, 1, page, page_size(), HINT);
		expect_last(&device, round + 1);
		CHECK_EQ(try_unregister(device.fd, 1), -EINVAL);
		zap(page, 1);
		expect_nothing(&device);
		CHECK_EQ(generation(&device), round + 1);
	}
}

/* The read is what ends it, not the invalidation. */
static void a_one_shot_region_coalesces_until_it_is_read(const void *unused)
{
	struct device device = open_device_with(ONCE | CAUSE, O_NONBLOCK);
	char *pages = map_pages(2);

	watch(&device, pages, 2, 1, FLAG_ONCE);
	zap(pages, 1);
	CHECK_EQ(mprotect(pages + page_size(), page_size(), PROT_READ), 0);
	CHECK_EQ(try_watch(&device, pages, 1, 1, 0), -EINVAL);
	expect_inval(&device, 1, pages, 2 * page_size(), CLEAR | PROTECT);
	expect_last(&device, 2);
	expect_nothing(&device);
}

static void a_failed_read_ends_no_one_shot_region(const void *unused)
{
	struct device device = open_device_with(ONCE, O_NONBLOCK);
	char *page = map_pages(1);
	void *nowhere = map_untouched(1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
				      -1);

	watch(&device, page, 1, 1, FLAG_ONCE);
	zap(page, 1);
	CHECK_EQ(read_records(device.fd, nowhere, 4), -EFAULT);
	CHECK_EQ(try_watch(&device, page, 1, 1, 0), -EINVAL);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void a_one_shot_region_can_be_unregistered(const void *unused)
{
	struct device device = open_device_with(ONCE, O_NONBLOCK);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, FLAG_ONCE);
	unregister_region(&device, 1);
	watch(&device, page, 1, 1, FLAG_ONCE);
	zap(page, 1);
	unregister_region(&device, 1);
	expect_last(&device, 1);
	expect_nothing(&device);
}

/* Also if it changes again while its report is being copied. */
static void a_one_shot_region_ends_with_its_report(const void *unused)
{
	struct device device = open_device_with(ONCE, O_NONBLOCK);
	struct ummunotify_event *event = (void *)map_pages(1);
	char *page = map_pages(1);
	struct zapper zapper;

	start_zapper(&zapper, page, 1);
	for (unsigned int round = 0; round < 3000; round++) {
		watch(&device, page, 1, 1, FLAG_ONCE);
		do {
			/* Not there: the copy takes its time. */
			zap((char *)event, 1);
		} while (read_records(device.fd, event, 1) < 0 ||
			 event->type != UMMUNOTIFY_EVENT_TYPE_INVAL);
		CHECK_EQ(event->user_cookie_counter, 1);
	}
	stop_zapper(&zapper);
}

/* More than are kept for later registrations, in more than one batch. */
static void many_one_shot_regions_go_with_one_read(const void *unused)
{
	enum { REGIONS = 3000 };
	static struct ummunotify_event events[REGIONS + 1];
	struct device device = open_device_with(ONCE, O_NONBLOCK);
	char *page = map_pages(1);

	for (int round = 0; round < 2; round++) {
		for (unsigned int i = 0; i < REGIONS; i++)
			watch(&device, page, 1, i, (i % 2) ? FLAG_ONCE : 0);
		zap(page, 1);
		CHECK_EQ(read_records(device.fd, events, REGIONS + 1),
			 REGIONS + 1);
		check_last(&events[REGIONS], round + 1);
		for (unsigned int i = 0; i < REGIONS; i++)
			CHECK_EQ(try_unregister(device.fd, i),
				 -EINVAL * (int)(i % 2));
	}
}

static const struct test tests[] = {
	TEST(what_a_region_does_not_ask_for_is_not_reported),
	TEST(each_region_has_its_own_causes),
	TEST(filters_come_and_go_with_their_regions),
	TEST(a_filter_without_causes_tells_none),
	TEST(who_asks_for_moves_is_told_of_unmapping),
	TEST(the_end_is_told_to_all),
	TEST(what_was_not_negotiated_is_einval),
	TEST(garbage_without_filters_filters_nothing),
	TEST(a_one_shot_region_reports_once_and_is_gone),
	TEST(a_one_shot_region_coalesces_until_it_is_read),
	TEST(a_failed_read_ends_no_one_shot_region),
	TEST(a_one_shot_region_can_be_unregistered),
	TEST(a_one_shot_region_ends_with_its_report),
	TEST(many_one_shot_regions_go_with_one_read),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
