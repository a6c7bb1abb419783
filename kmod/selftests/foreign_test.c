// SPDX-License-Identifier: GPL-2.0
/*
 * What others do to the memory of a process, with and without report_foreign:
 * a page merged with another one by the kernel's KSM thread; a file truncated by
 * another process.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

#define KSM		"/sys/kernel/mm/ksm/"
#define PARAMETER	"/sys/module/ummunotify/parameters/report_foreign"

#define CLEAR	UMMUNOTIFY_EVENT_CAUSE_CLEAR
#define FOREIGN	UMMUNOTIFY_EVENT_CAUSE_FOREIGN

static bool put_number(const char *path, long value)
{
	FILE *file = fopen(path, "w");

	if (!file)
		return false;
	fprintf(file, "%ld", value);
	return fclose(file) == 0;
}

static long get_number(const char *path)
{
	FILE *file = fopen(path, "r");
	long value;

	CHECK(file);
	CHECK_EQ(fscanf(file, "%ld", &value), 1);
	fclose(file);
	return value;
}

static bool foreign_is_reported(void)
{
	FILE *file = fopen(PARAMETER, "r");
	int answer;

	CHECK(file);
	answer = fgetc(file);
	fclose(file);
	return answer == 'Y';
}

static void stop_ksm(void)
{
	put_number(KSM "run", 2);
}

/* Until it has merged pages, and for some more scans. */
static void let_ksm_merge(void)
{
	long scans;

	while (get_number(KSM "pages_sharing") < 1)
		poll(NULL, 0, 10);
	scans = get_number(KSM "full_scans");
	while (get_number(KSM "full_scans") < scans + 3)
		poll(NULL, 0, 10);
}

static void a_merged_page_is_reported_unless_hidden(const void *unused)
{
	struct device device = open_device_with_causes(O_NONBLOCK);
	struct ummunotify_event event;
	char *pages = map_pages(2);

	if (geteuid() != 0 || !put_number(KSM "run", 2))
		skip("no KSM, or not for this user");
	CHECK(put_number(KSM "pages_to_scan", 1000));
	CHECK(put_number(KSM "sleep_millisecs", 1));
	/* As nobody else's. */
	memset(pages, 0xa7, 2 * page_size());
	CHECK_EQ(madvise(pages, 2 * page_size(), MADV_MERGEABLE), 0);
	register_region(&device, pages, 2 * page_size(), 1);
	CHECK(put_number(KSM "run", 1));
	let_ksm_merge();
	if (foreign_is_reported()) {
		CHECK(generation(&device) > 0);
		CHECK_EQ(read_records(device.fd, &event, 1), 1);
		CHECK_EQ(event.type, UMMUNOTIFY_EVENT_TYPE_INVAL);
		CHECK(event.flags & FOREIGN);
		CHECK(event.flags & CLEAR);
		return;
	}
	/* But not what the process itself does about it: copy on write. */
	CHECK_EQ(generation(&device), 0);
	expect_nothing(&device);
	pages[0] = 1;
	CHECK_EQ(read_records(device.fd, &event, 1), 1);
	check_inval(&event, 1, pages, page_size(), HINT | CLEAR);
}

static void truncate_when_told(int socket, void *arg)
{
	receive_word(socket);
	CHECK_EQ(ftruncate(*(int *)arg, 0), 0);
}

static void another_process_is_never_hidden(const void *unused)
{
	struct device device = open_device_with_causes(O_NONBLOCK);
	struct ummunotify_event event;
	int fd = make_shared_file(1);
	struct peer peer;
	char *page;

	page = map_untouched(1, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	touch(page, 1);
	peer = start_peer(truncate_when_told, &fd);
	register_region(&device, page, page_size(), 1);
	send_word(peer.socket, 0);
	join_peer(&peer);
	CHECK_EQ(read_records(device.fd, &event, 1), 1);
	CHECK_EQ(event.type, UMMUNOTIFY_EVENT_TYPE_INVAL);
	CHECK_EQ(event.flags & ~HINT,
		 CLEAR | (foreign_is_reported() ? FOREIGN : 0));
}

static const struct test tests[] = {
	TEST(a_merged_page_is_reported_unless_hidden),
	TEST(another_process_is_never_hidden),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
		.clean_up	= stop_ksm,
	};

	note("report_foreign is %s", foreign_is_reported() ? "Y" : "N");
	return run_suite(&suite, argc - 1, argv + 1);
}
