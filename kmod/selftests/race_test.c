// SPDX-License-Identifier: GPL-2.0
/*
 * Several threads at once: changes, readers, registrations, closes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

static bool load_flag(const bool *flag)
{
	return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

static void set_flag(bool *flag)
{
	__atomic_store_n(flag, true, __ATOMIC_RELEASE);
}

/* Nobody reads: the counter is exact, whoever changes memory. */

enum { ZAPPERS = 4, ZAPS = 2000 };

static void *zap_again_and_again(void *page)
{
	for (int i = 0; i < ZAPS; i++)
		zap(page, 1);
	return NULL;
}

static void concurrent_changes_count_exactly(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[ZAPPERS + 1];
	pthread_t threads[ZAPPERS];
	char *pages[ZAPPERS];

	for (int i = 0; i < ZAPPERS; i++) {
		pages[i] = map_pages(1);
		register_region(&device, pages[i], page_size(), i);
	}
	for (int i = 0; i < ZAPPERS; i++)
		threads[i] = start_thread(zap_again_and_again, pages[i]);
	for (int i = 0; i < ZAPPERS; i++)
		join_thread(threads[i]);
	CHECK_EQ(generation(&device), ZAPPERS * ZAPS);
	CHECK_EQ(read_records(device.fd, events, ZAPPERS + 1), ZAPPERS + 1);
	check_last(&events[ZAPPERS], ZAPPERS * ZAPS);
}

/* Lost wake-ups: the zapper goes on only when the reader has seen it all. */

enum waiting { IN_READ, IN_POLL, IN_EPOLL_BY_EDGE };

struct ping_pong {
	struct device	device;
	enum waiting	waiting;
	u64		told;
	bool		stop;
};

static void *tell_what_was_read(void *arg)
{
	struct ping_pong *game = arg;
	struct pollfd pollfd = { .fd = game->device.fd, .events = POLLIN };
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	struct ummunotify_event records[2];
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	CHECK(epoll >= 0);
	CHECK_EQ(epoll_ctl(epoll, EPOLL_CTL_ADD, game->device.fd, &event), 0);
	while (!load_flag(&game->stop)) {
		long n;

		if (game->waiting == IN_POLL)
			CHECK_EQ(poll(&pollfd, 1, -1), 1);
		if (game->waiting == IN_EPOLL_BY_EDGE)
			CHECK_EQ(epoll_wait(epoll, &event, 1, -1), 1);
		/* By edge: until there is nothing more. */
		do {
			n = read_records(game->device.fd, records, 2);
			if (n == -EAGAIN)
				break;
			CHECK(n > 0);
			if (records[n - 1].type == UMMUNOTIFY_EVENT_TYPE_LAST)
				__atomic_store_n(&game->told,
						 records[n - 1].user_cookie_counter,
						 __ATOMIC_RELEASE);
		} while (game->waiting == IN_EPOLL_BY_EDGE);
	}
	return NULL;
}

static void no_wake_up_is_lost(const void *arg)
{
	enum { ROUNDS = 4000 };
	const enum waiting *waiting = arg;
	struct ping_pong game = {
		.device		= open_device(*waiting == IN_READ ? 0 :
					      O_NONBLOCK),
		.waiting	= *waiting,
	};
	char *page = map_pages(1);
	pthread_t reader;

	register_region(&game.device, page, page_size(), 1);
	reader = start_thread(tell_what_was_read, &game);
	for (int i = 0; i < ROUNDS; i++) {
		zap(page, 1);
		while (__atomic_load_n(&game.told, __ATOMIC_ACQUIRE) !=
		       generation(&game.device))
			sched_yield();
	}
	/* One more, for the reader to see that it is over. */
	set_flag(&game.stop);
	zap(page, 1);
	join_thread(reader);
	CHECK(generation(&game.device) > ROUNDS);
}

/*
 * Every region that is changed after its latest report has one again, while
 * readers, registrations and other changes go on around it.
 */

enum { OWNERS = 4, READERS = 2, OWNER_ROUNDS = 1500, COOKIES = 8192 };

struct crowd {
	struct device	device;
	/* By cookie: how often it was reported; when it was unregistered. */
	u64		reported[COOKIES];
	u64		unregistered[COOKIES];
	u64		next_cookie;
	u64		clock;
	bool		stop;
};

struct owner {
	struct crowd	*crowd;
	char		*page;
	unsigned int	seed;
	unsigned int	unregistered_pending;
};

static u64 take_cookie(struct crowd *crowd)
{
	u64 cookie = __atomic_fetch_add(&crowd->next_cookie, 1,
					__ATOMIC_RELAXED);

	CHECK(cookie < COOKIES);
	return cookie;
}

static void *own_a_region(void *arg)
{
	struct owner *owner = arg;
	struct crowd *crowd = owner->crowd;
	u64 cookie = take_cookie(crowd);

	register_region(&crowd->device, owner->page, page_size(), cookie);
	for (int round = 0; round < OWNER_ROUNDS; round++) {
		u64 before = __atomic_load_n(&crowd->reported[cookie],
					     __ATOMIC_ACQUIRE);

		zap(owner->page, 1);
		if (rand_r(&owner->seed) % 4) {
			while (__atomic_load_n(&crowd->reported[cookie],
					       __ATOMIC_ACQUIRE) == before)
				sched_yield();
			continue;
		}
		/* With its report pending, or not. */
		unregister_region(&crowd->device, cookie);
		__atomic_store_n(&crowd->unregistered[cookie],
				 __atomic_add_fetch(&crowd->clock, 1,
						    __ATOMIC_SEQ_CST),
				 __ATOMIC_SEQ_CST);
		owner->unregistered_pending +=
			__atomic_load_n(&crowd->reported[cookie],
					__ATOMIC_ACQUIRE) == before;
		cookie = take_cookie(crowd);
		register_region(&crowd->device, owner->page, page_size(),
				cookie);
	}
	return NULL;
}

static void *read_for_the_crowd(void *arg)
{
	struct crowd *crowd = arg;
	struct pollfd pollfd = { .fd = crowd->device.fd, .events = POLLIN };
	struct ummunotify_event events[3];

	while (!load_flag(&crowd->stop)) {
		u64 began;
		long n;

		poll(&pollfd, 1, 10);
		began = __atomic_load_n(&crowd->clock, __ATOMIC_SEQ_CST);
		n = read_records(crowd->device.fd, events, ARRAY_SIZE(events));
		if (n == -EAGAIN)
			continue;
		CHECK(n > 0);
		for (long i = 0; i < n; i++) {
			u64 cookie = events[i].user_cookie_counter;
			u64 gone;

			if (events[i].type == UMMUNOTIFY_EVENT_TYPE_LAST)
				continue;
			CHECK(cookie < COOKIES);
			/* No read() that begins after it delivers its report. */
			gone = __atomic_load_n(&crowd->unregistered[cookie],
					       __ATOMIC_SEQ_CST);
			CHECK(!gone || gone > began);
			__atomic_add_fetch(&crowd->reported[cookie], 1,
					   __ATOMIC_RELEASE);
		}
	}
	return NULL;
}

static void every_change_is_reported_in_a_crowd(const void *unused)
{
	static struct crowd crowd;
	struct owner owners[OWNERS];
	pthread_t owner_threads[OWNERS], readers[READERS];
	unsigned int unregistered_pending = 0;

	crowd.device = open_device(O_NONBLOCK);
	for (int i = 0; i < READERS; i++)
		readers[i] = start_thread(read_for_the_crowd, &crowd);
	for (unsigned int i = 0; i < OWNERS; i++) {
		owners[i] = (struct owner) {
			.crowd	= &crowd,
			.page	= map_pages(1),
			.seed	= i,
		};
		owner_threads[i] = start_thread(own_a_region, &owners[i]);
	}
	for (int i = 0; i < OWNERS; i++) {
		join_thread(owner_threads[i]);
		unregistered_pending += owners[i].unregistered_pending;
	}
	set_flag(&crowd.stop);
	for (int i = 0; i < READERS; i++)
		join_thread(readers[i]);
	note("%u regions were unregistered with their report unread",
	     unregistered_pending);
	CHECK(unregistered_pending > 0);
}

/*
 * One change of many regions, which the driver reports in batches, with a
 * reader, and others that register and unregister, in between.
 */

enum { STABLE = 1000, CHANGES = 200, TOUCHING = 2 };

struct crossing {
	struct device	device;
	char		*pages;
	unsigned int	reported[STABLE];
	bool		stop;
};

static void *register_and_unregister(void *arg)
{
	struct crossing *crossing = arg;
	static u64 next = STABLE;
	u64 base = __atomic_fetch_add(&next, 100, __ATOMIC_RELAXED);
	unsigned int seed = base;

	while (!load_flag(&crossing->stop)) {
		u64 cookie = base + rand_r(&seed) % 100;
		size_t start = rand_r(&seed) % 4 * page_size();

		if (try_register(crossing->device.fd,
				 address(crossing->pages) + start,
				 address(crossing->pages) + 4 * page_size(),
				 cookie) == -EINVAL)
			unregister_region(&crossing->device, cookie);
	}
	return NULL;
}

static void *read_across(void *arg)
{
	struct crossing *crossing = arg;
	struct ummunotify_event events[32];
	bool reports_since_last = false;
	u64 told = 0;

	while (!load_flag(&crossing->stop)) {
		long n = read_records(crossing->device.fd, events,
				      ARRAY_SIZE(events));

		if (n == -EAGAIN) {
			sched_yield();
			continue;
		}
		CHECK(n > 0);
		for (long i = 0; i < n; i++) {
			u64 counter = events[i].user_cookie_counter;

			if (events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL) {
				reports_since_last = true;
				if (counter < STABLE)
					__atomic_add_fetch(&crossing->reported[counter],
							   1, __ATOMIC_RELEASE);
				continue;
			}
			/* Reports behind a LAST have raised the counter again. */
			if (reports_since_last)
				CHECK(counter > told);
			CHECK(counter >= told);
			reports_since_last = false;
			told = counter;
		}
	}
	return NULL;
}

static void a_change_of_many_regions_with_a_reader_in_between(const void *unused)
{
	static struct crossing crossing;
	static unsigned int before[STABLE];
	pthread_t reader, touching[TOUCHING];

	crossing.device = open_device(O_NONBLOCK);
	crossing.pages = map_pages(4);
	for (unsigned int i = 0; i < STABLE; i++)
		register_region(&crossing.device, crossing.pages,
				4 * page_size(), i);
	reader = start_thread(read_across, &crossing);
	for (int i = 0; i < TOUCHING; i++)
		touching[i] = start_thread(register_and_unregister, &crossing);

	for (int change = 0; change < CHANGES; change++) {
		for (int i = 0; i < STABLE; i++)
			before[i] = __atomic_load_n(&crossing.reported[i],
						    __ATOMIC_ACQUIRE);
		zap(crossing.pages, 4);
		for (int i = 0; i < STABLE; i++)
			while (__atomic_load_n(&crossing.reported[i],
					       __ATOMIC_ACQUIRE) == before[i])
				sched_yield();
	}
	set_flag(&crossing.stop);
	join_thread(reader);
	for (int i = 0; i < TOUCHING; i++)
		join_thread(touching[i]);
}

/*
 * A LAST in the middle of one change, between two batches: the reports that come
 * behind it must raise the counter again, or the client would trust their regions
 * at the generation of that LAST.
 *
 * The reader is a real-time thread on the CPU of the thread that changes memory,
 * and wakes by a timer: it preempts that one where its lock is dropped, and has
 * read everything, LAST included, before the change goes on.
 */

/* Enough to take longer than a timer without high resolution. */
enum { WALKED = 100000 };

struct preempting {
	struct device	device;
	unsigned int	change;
	u64		told;
	unsigned int	lasts_in_the_middle;
	bool		stop;
};

static void *read_by_timer(void *arg)
{
	static const struct timespec moment = { .tv_nsec = 200000 };
	struct preempting *preempting = arg;
	struct ummunotify_event events[64];
	unsigned int change = 0, latest, reports = 0;
	bool behind_last = false;
	u64 told = 0;

	while (!load_flag(&preempting->stop)) {
		long n = read_records(preempting->device.fd, events,
				      ARRAY_SIZE(events));

		if (n == -EAGAIN) {
			clock_nanosleep(CLOCK_MONOTONIC, 0, &moment, NULL);
			continue;
		}
		CHECK(n > 0);
		latest = __atomic_load_n(&preempting->change, __ATOMIC_ACQUIRE);
		if (change != latest) {
			change = latest;
			reports = 0;
		}
		for (long i = 0; i < n; i++) {
			if (events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL) {
				reports++;
				behind_last = true;
				continue;
			}
			if (behind_last)
				CHECK(events[i].user_cookie_counter > told);
			behind_last = false;
			told = events[i].user_cookie_counter;
			if (reports < WALKED)
				preempting->lasts_in_the_middle++;
			__atomic_store_n(&preempting->told, told,
					 __ATOMIC_RELEASE);
		}
	}
	return NULL;
}

static void a_last_in_the_middle_of_a_change_is_not_its_last(const void *unused)
{
	enum { ENOUGH = 5, MAX = 500 };
	struct preempting preempting = { .device = open_device(O_NONBLOCK) };
	struct sched_param priority = { .sched_priority = 1 };
	char *page = map_pages(1);
	pthread_t reader;
	cpu_set_t cpus;
	int cpu = sched_getcpu();

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	CHECK_EQ(sched_setaffinity(0, sizeof(cpus), &cpus), 0);
	for (unsigned int i = 0; i < WALKED; i++)
		register_region(&preempting.device, page, page_size(), i);
	reader = start_thread(read_by_timer, &preempting);
	if (pthread_setschedparam(reader, SCHED_FIFO, &priority))
		skip("only root has real-time threads");
	for (unsigned int change = 1; change <= MAX; change++) {
		__atomic_store_n(&preempting.change, change, __ATOMIC_RELEASE);
		zap(page, 1);
		while (__atomic_load_n(&preempting.told, __ATOMIC_ACQUIRE) !=
		       generation(&preempting.device))
			sched_yield();
		if (preempting.lasts_in_the_middle >= ENOUGH)
			break;
	}
	set_flag(&preempting.stop);
	join_thread(reader);
	note("%u LASTs in the middle of a change",
	     preempting.lasts_in_the_middle);
	CHECK(preempting.lasts_in_the_middle > 0);
}

/*
 * A reader that sleeps in the middle of copying, since its buffer is not there:
 * no change of memory, no registration and no poll() waits for it.
 */

struct stuck_reader {
	struct device			device;
	struct ummunotify_event		*events;
	long				result;
};

static void *read_and_get_stuck(void *arg)
{
	struct stuck_reader *reader = arg;

	reader->result = read_records(reader->device.fd, reader->events, 8);
	return NULL;
}

static int make_stuck_page(void *page)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range	= { .start = address(page), .len = page_size() },
		.mode	= UFFDIO_REGISTER_MODE_MISSING,
	};
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC);

	if (uffd < 0)
		skip("no userfaultfd: %s", strerror(errno));
	CHECK_EQ(ioctl(uffd, UFFDIO_API, &api), 0);
	CHECK_EQ(ioctl(uffd, UFFDIO_REGISTER, &range), 0);
	return uffd;
}

static void a_reader_stuck_in_a_fault_delays_nobody(const void *unused)
{
	struct stuck_reader reader = { .device = open_device(0) };
	struct device *device = &reader.device;
	char *pages = map_pages(3);
	struct uffdio_zeropage zero = { .range.len = page_size() };
	struct pollfd pollfd = { .events = POLLIN };
	struct ummunotify_event other[2];
	struct uffd_msg message;
	pthread_t thread;

	reader.events = (void *)map_untouched(1, PROT_READ | PROT_WRITE,
					      MAP_PRIVATE | MAP_ANONYMOUS, -1);
	pollfd.fd = make_stuck_page(reader.events);
	for (unsigned int i = 0; i < 3; i++)
		register_region(device, pages + i * page_size(), page_size(),
				i);
	zap(pages, 2);
	CHECK_EQ(generation(device), 1);
	thread = start_thread(read_and_get_stuck, &reader);
	CHECK_EQ(poll(&pollfd, 1, -1), 1);
	CHECK_EQ(read(pollfd.fd, &message, sizeof(message)), sizeof(message));

	/* Others that may wait would do so for this reader. */
	CHECK_EQ(read_nowait(device, other, ARRAY_SIZE(other)), -EAGAIN);
	/* Hit what is being copied, what is not; come and go. */
	zap(pages, 1);
	zap(pages + 2 * page_size(), 1);
	CHECK_EQ(generation(device), 3);
	CHECK(poll_now(device->fd) & POLLIN);
	register_region(device, pages, page_size(), 7);
	unregister_region(device, 7);
	unregister_region(device, 1);

	zero.range.start = address(reader.events);
	CHECK_EQ(ioctl(pollfd.fd, UFFDIO_ZEROPAGE, &zero), 0);
	join_thread(thread);
	/* Region 1 went when its report was on the way already. */
	CHECK_EQ(reader.result, 5);
	check_inval(&reader.events[0], 0, pages, page_size(), HINT);
	check_inval(&reader.events[1], 1, pages + page_size(), page_size(),
		    HINT);
	check_inval(&reader.events[2], 0, pages, page_size(), 0);
	check_inval(&reader.events[3], 2, pages + 2 * page_size(), page_size(),
		    HINT);
	check_last(&reader.events[4], 3);
	expect_nothing(device);
}

/* close() while others change the memory, and while it ends */

static void close_while_memory_changes(const void *unused)
{
	char *page = map_pages(1);
	struct zapper zappers[2];

	for (int i = 0; i < 2; i++)
		start_zapper(&zappers[i], page, 1);
	for (int round = 0; round < 200; round++) {
		struct device device = open_device(0);

		for (unsigned int i = 0; i < 100; i++)
			register_region(&device, page, page_size(), i);
		close_device(&device);
	}
	for (int i = 0; i < 2; i++)
		stop_zapper(&zappers[i]);
}

static void open_and_pass(int socket, void *unused)
{
	struct device device = open_device(0);

	send_fd(socket, device.fd);
	close_device(&device);
	receive_word(socket);
}

static void close_while_the_target_ends(const void *unused)
{
	for (unsigned int round = 0; round < 100; round++) {
		struct peer peer = start_peer(open_and_pass, NULL);
		int fd = receive_fd(peer.socket);

		for (unsigned int i = 0; i < 300; i++)
			CHECK_EQ(try_register(fd, 0, page_size(), i), 0);
		send_word(peer.socket, 0);
		for (unsigned int i = 0; i < round * 50; i++)
			__atomic_signal_fence(__ATOMIC_SEQ_CST);
		CHECK_EQ(close(fd), 0);
		join_peer(&peer);
	}
}

static const enum waiting in_read = IN_READ;
static const enum waiting in_poll = IN_POLL;
static const enum waiting in_epoll = IN_EPOLL_BY_EDGE;

static const struct test tests[] = {
	TEST(concurrent_changes_count_exactly),
	{ "no_wake_up_is_lost_in_read", no_wake_up_is_lost, &in_read },
	{ "no_wake_up_is_lost_in_poll", no_wake_up_is_lost, &in_poll },
	{ "no_wake_up_is_lost_in_epoll_by_edge", no_wake_up_is_lost,
	  &in_epoll },
	TEST(every_change_is_reported_in_a_crowd),
	TEST(a_change_of_many_regions_with_a_reader_in_between),
	TEST(a_last_in_the_middle_of_a_change_is_not_its_last),
	TEST(a_reader_stuck_in_a_fault_delays_nobody),
	TEST(close_while_memory_changes),
	TEST(close_while_the_target_ends),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
