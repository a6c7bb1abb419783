// SPDX-License-Identifier: GPL-2.0
/*
 * Tracepoints, as an administrator sees them through the tracefs.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

#define TRACEFS	"/sys/kernel/tracing"
#define ENABLE	TRACEFS "/events/ummunotify/enable"

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	bool done;

	if (fd < 0)
		return false;
	done = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return done;
}

static void start_tracing(void)
{
	if (access(TRACEFS "/trace", W_OK))
		skip("no tracefs, or not for this user");
	CHECK(put(ENABLE, "1"));
	CHECK(put(TRACEFS "/trace", "\n"));
}

static void stop_tracing(void)
{
	put(ENABLE, "0");
}

/* The next line of the trace about this process and tracepoint, from behind ": ". */
static const char *next_event(FILE *trace, const char *name, char *line,
			      int size)
{
	char task[32], tag[64];
	const char *text;

	snprintf(task, sizeof(task), "-%d ", getpid());
	snprintf(tag, sizeof(tag), ": %s: ", name);
	while (fgets(line, size, trace)) {
		text = strstr(line, tag);
		if (line[0] != '#' && text && strstr(line, task))
			return text + strlen(tag);
	}
	FAIL("no event %s", name);
}

static void expect_event(FILE *trace, const char *name, const char *format, ...)
{
	char line[512], expected[256];
	const char *got = next_event(trace, name, line, sizeof(line));
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(expected, sizeof(expected), format, arguments);
	va_end(arguments);
	/* Behind the number of the open file. */
	CHECK(!strncmp(got, "ctx=", 4));
	got = strchr(got, ' ');
	CHECK(got);
	if (strncmp(got + 1, expected, strlen(expected)) ||
	    got[1 + strlen(expected)] != '\n')
		FAIL("%s: %s instead of %s", name, got, expected);
}

static void each_step_has_its_tracepoint(const void *unused)
{
	struct device device = open_device_with(UMMUNOTIFY_FEATURE_CAUSE |
						UMMUNOTIFY_FEATURE_ONCE,
						O_NONBLOCK);
	unsigned long start = address(map_pages(2));
	unsigned long end = start + 2 * page_size();
	struct ummunotify_event events[4];
	FILE *trace;

	start_tracing();
	CHECK_EQ(try_register_with(device.fd, start, end, 17,
				   UMMUNOTIFY_REGION_FLAG_ONCE, 0), 0);
	CHECK(try_register(device.fd, start, end, 17) < 0);
	zap((void *)start, 1);
	CHECK_EQ(read_records(device.fd, events, ARRAY_SIZE(events)), 2);
	CHECK(read_records(device.fd, events, ARRAY_SIZE(events)) < 0);
	CHECK_EQ(try_register(device.fd, start, end, 18), 0);
	unregister_region(&device, 18);
	CHECK(try_unregister(device.fd, 19) < 0);
	stop_tracing();

	trace = fopen(TRACEFS "/trace", "r");
	CHECK(trace);
	expect_event(trace, "ummunotify_register",
		     "start=0x%lx end=0x%lx cookie=17 flags=0x1 slot=0 ret=0",
		     start, end);
	expect_event(trace, "ummunotify_register",
		     "start=0x%lx end=0x%lx cookie=17 flags=0x0 slot=0 ret=-22",
		     start, end);
	expect_event(trace, "ummunotify_invalidate",
		     "start=0x%lx last=0x%lx causes=0x%x phase=start hits=1",
		     start, start + page_size() - 1,
		     UMMUNOTIFY_EVENT_CAUSE_CLEAR);
	expect_event(trace, "ummunotify_read", "records=2");
	expect_event(trace, "ummunotify_read", "records=0");
	expect_event(trace, "ummunotify_register",
		     "start=0x%lx end=0x%lx cookie=18 flags=0x0 slot=0 ret=0",
		     start, end);
	expect_event(trace, "ummunotify_unregister", "cookie=18 ret=0");
	expect_event(trace, "ummunotify_unregister", "cookie=19 ret=-22");
	fclose(trace);
}

static void nothing_is_traced_unless_wanted(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *page = map_pages(1);
	char line[512];
	FILE *trace;

	start_tracing();
	stop_tracing();
	CHECK(put(TRACEFS "/trace", "\n"));
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(drain(&device), 1);
	trace = fopen(TRACEFS "/trace", "r");
	CHECK(trace);
	while (fgets(line, sizeof(line), trace))
		CHECK(!strstr(line, ": ummunotify_"));
	fclose(trace);
}

static const struct test tests[] = {
	TEST(each_step_has_its_tracepoint),
	TEST(nothing_is_traced_unless_wanted),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
		.clean_up	= stop_tracing,
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
