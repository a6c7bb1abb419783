// SPDX-License-Identifier: MIT
/* Readers in other processes: slow ones, dead ones, and too many. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "engine.h"
#include "harness.h"

#define PAGE	4096ul
#define RECORDS	64

static int open_notifier(void)
{
	int ends[2], number = aioummu_open(ends);

	if (number == -ENOSYS || number == -EPERM || number == -EOPNOTSUPP)
		skip("no userfaultfd of the kind that the engine needs here");
	CHECK(number > 0);
	return number;
}

static char *map(size_t pages)
{
	char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	memset(memory, 1, pages * PAGE);
	return memory;
}

/* A region for each page, whose cookie is its number. */
static void watch_pages(int number, char *memory, size_t pages)
{
	struct aioummu_refusal refusal;

	for (size_t i = 0; i < pages; i++)
		CHECK_EQUAL(aioummu_register(number, (uintptr_t)memory + i * PAGE,
					     (uintptr_t)memory + (i + 1) * PAGE, i,
					     0, false, &refusal), 0);
}

/* Returns the other end of the connection, or a negative errno. */
static int try_forward(int number)
{
	int ends[2], error;

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends));
	error = aioummu_forward(number, ends[0]);
	close(ends[0]);
	if (!error)
		return ends[1];
	close(ends[1]);
	return error;
}

static int forward(int number)
{
	int reader = try_forward(number);

	CHECK(reader >= 0);
	return reader;
}

static void drop(char *memory, size_t page)
{
	CHECK(!madvise(memory + page * PAGE, PAGE, MADV_DONTNEED));
}

/* Returns the number of records; 0: the end. */
static size_t receive(int reader, struct ummunotify_event *events)
{
	struct pollfd polled = { .fd = reader, .events = POLLIN };
	ssize_t size;

	CHECK_EQUAL(poll(&polled, 1, -1), 1);
	size = recv(reader, events, RECORDS * sizeof(*events), MSG_DONTWAIT);
	CHECK(size >= 0);
	CHECK_EQUAL(size % sizeof(*events), 0);
	return (size_t)size / sizeof(*events);
}

/* Reads up to the LAST of a generation, and notes who was reported. */
static size_t receive_until(int reader, uint64_t generation, bool *reported)
{
	struct ummunotify_event events[RECORDS];
	size_t reports = 0;

	for (;;) {
		size_t count = receive(reader, events);

		CHECK(count);
		for (size_t i = 0; i < count; i++) {
			uint64_t number = events[i].user_cookie_counter;

			if (events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL) {
				reported[number] = true;
				reports++;
			} else if (number == generation) {
				CHECK_EQUAL(i, count - 1);
				return reports;
			}
		}
	}
}

static void must_end(int reader)
{
	struct ummunotify_event events[RECORDS];

	while (receive(reader, events))
		;
	close(reader);
}

static void who_does_not_read_holds_up_nobody(void)
{
	enum { PAGES = 1000, CHANGES = 30000 };
	int number = open_notifier(), reader = forward(number);
	bool reported[PAGES] = { false };
	char *memory = map(PAGES);

	watch_pages(number, memory, PAGES);
	for (size_t i = 0; i < CHANGES; i++)
		drop(memory, i % PAGES);
	/* Fewer than there were changes: what did not fit has coalesced. */
	CHECK(receive_until(reader, CHANGES, reported) < CHANGES / 2);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(reported[i]);
	aioummu_close(number);
	must_end(reader);
}

static void flushing_without_room_loses_nothing(void)
{
	enum { PAGES = 2000 };
	int number = open_notifier(), reader = forward(number);
	bool reported[PAGES] = { false };
	char *memory = map(PAGES);

	watch_pages(number, memory, PAGES);
	for (size_t i = 0; i < PAGES; i++) {
		drop(memory, i);
		aioummu_flush(number);
	}
	CHECK_EQUAL(aioummu_flush(number), -EAGAIN);
	receive_until(reader, PAGES, reported);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(reported[i]);
	CHECK_EQUAL(aioummu_flush(number), 0);
	aioummu_close(number);
	must_end(reader);
	/* Also harmless when there is nobody any more. */
	aioummu_flush(number);
}

static void a_region_for_once_ends_when_its_report_is_sent(void)
{
	int number = open_notifier(), reader = forward(number);
	struct ummunotify_event events[RECORDS];
	struct aioummu_refusal refusal;
	bool reported[1] = { false };
	char *memory = map(1);

	CHECK_EQUAL(aioummu_register(number, (uintptr_t)memory,
				     (uintptr_t)memory + PAGE, 0, 0, true,
				     &refusal), 0);
	drop(memory, 0);
	CHECK_EQUAL(receive_until(reader, 1, reported), 1);
	CHECK(reported[0]);
	CHECK_EQUAL(aioummu_unregister(number, 0), -ENOENT);
	drop(memory, 0);
	CHECK_EQUAL(aioummu_flush(number), 0);
	CHECK_EQUAL(recv(reader, events, sizeof(events), MSG_DONTWAIT), -1);
	aioummu_close(number);
	close(reader);
}

static void who_is_gone_holds_up_nobody(void)
{
	int number = open_notifier();
	char *memory = map(2);
	bool reported[2];
	int reader;

	watch_pages(number, memory, 2);
	close(forward(number));
	for (size_t i = 0; i < 1000; i++)
		drop(memory, i % 2);
	/* Once the thread has noticed, there can be another. */
	while ((reader = try_forward(number)) == -EBUSY)
		poll(NULL, 0, 1);
	CHECK(reader >= 0);
	drop(memory, 0);
	receive_until(reader, 1001, reported);
	aioummu_close(number);
	must_end(reader);
}

static void there_is_one_reader_at_a_time(void)
{
	int number = open_notifier(), other = open_notifier();
	int reader = forward(number);

	CHECK_EQUAL(try_forward(number), -EBUSY);
	close(forward(other));
	aioummu_close(number);
	must_end(reader);
	CHECK_EQUAL(try_forward(number), -EBADF);
	aioummu_close(other);
	CHECK_EQUAL(try_forward(other), -EBADF);
}

static void other_sockets_are_refused(void)
{
	int number = open_notifier(), ends[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	CHECK_EQUAL(aioummu_forward(number, ends[0]), -EPROTOTYPE);
	CHECK_EQUAL(aioummu_forward(number, -1), -EPROTOTYPE);
	CHECK(!pipe(ends));
	CHECK_EQUAL(aioummu_forward(number, ends[1]), -EPROTOTYPE);
	aioummu_close(number);
}

static void a_forked_child_does_not_hide_the_end(void)
{
	int number = open_notifier(), reader = forward(number);
	pid_t child = fork();

	if (!child) {
		pause();
		_exit(0);
	}
	aioummu_close(number);
	must_end(reader);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

static void a_forked_child_can_forward_its_own(void)
{
	int number = open_notifier(), reader = forward(number), status;
	pid_t child = fork();

	if (!child) {
		char *memory = map(1);
		bool reported[1];

		CHECK_EQUAL(try_forward(number), -EBADF);
		number = open_notifier();
		reader = forward(number);
		watch_pages(number, memory, 1);
		drop(memory, 0);
		receive_until(reader, 1, reported);
		aioummu_close(number);
		must_end(reader);
		_exit(0);
	}
#ifdef __SANITIZE_THREAD__
	note("the thread sanitizer allows no threads in children like this");
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
#else
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK_EQUAL(status, 0);
#endif
	aioummu_close(number);
	must_end(reader);
}

static atomic_bool done;

static void *fork_and_change(void *memory)
{
	for (size_t i = 0; !atomic_load(&done); i++) {
		drop(memory, i % 8);
		if (i % 64 == 0) {
			pid_t child = fork();

			if (!child)
				_exit(0);
			CHECK(child > 0);
			CHECK_EQUAL(waitpid(child, NULL, 0), child);
		}
	}
	return NULL;
}

static void forwarding_and_closing_while_others_change_and_fork(void)
{
	char *memory = map(8);
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, fork_and_change, memory));
	for (unsigned int i = 0; i < 300; i++) {
		struct ummunotify_event events[RECORDS];
		int number = open_notifier(), reader = forward(number);

		watch_pages(number, memory, 8);
		switch (i % 3) {
		case 0:
			CHECK(receive(reader, events));
			break;
		case 1:
			/* Gone before the notifier, or after it. */
			close(reader);
			reader = -1;
			break;
		}
		aioummu_close(number);
		if (reader >= 0)
			must_end(reader);
	}
	atomic_store(&done, true);
	pthread_join(thread, NULL);
}

static const struct test tests[] = {
	TEST(who_does_not_read_holds_up_nobody),
	TEST(flushing_without_room_loses_nothing),
	TEST(a_region_for_once_ends_when_its_report_is_sent),
	TEST(who_is_gone_holds_up_nobody),
	TEST(there_is_one_reader_at_a_time),
	TEST(other_sockets_are_refused),
	TEST(a_forked_child_does_not_hide_the_end),
	TEST(a_forked_child_can_forward_its_own),
	TEST(forwarding_and_closing_while_others_change_and_fork),
};

int main(int count, char **arguments)
{
	return run_tests(tests, sizeof(tests) / sizeof(tests[0]), count - 1,
			 arguments + 1);
}
