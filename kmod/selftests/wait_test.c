// SPDX-License-Identifier: GPL-2.0
/*
 * All ways to learn that there is something to read: a blocking read(), poll(),
 * select(), epoll, and SIGIO.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"

/* A thread that waits in one system call. */
struct waiter {
	int				fd;
	pid_t				tid;
	long				result;
	short				revents;
	struct ummunotify_event		events[8];
};

static void announce(struct waiter *waiter)
{
	__atomic_store_n(&waiter->tid, gettid(), __ATOMIC_RELEASE);
}

static pthread_t start_waiter(void *(*run)(void *arg), struct waiter *waiter,
			      const struct device *device, long syscall_number)
{
	pthread_t thread;
	pid_t tid;

	memset(waiter, 0, sizeof(*waiter));
	waiter->fd = device->fd;
	thread = start_thread(run, waiter);
	while (!(tid = __atomic_load_n(&waiter->tid, __ATOMIC_ACQUIRE)))
		sched_yield();
	wait_until_in_syscall(tid, syscall_number);
	return thread;
}

static void *wait_in_read(void *arg)
{
	struct waiter *waiter = arg;
	long result;

	announce(waiter);
	result = read_records(waiter->fd, waiter->events,
			      ARRAY_SIZE(waiter->events));
	__atomic_store_n(&waiter->result, result, __ATOMIC_RELEASE);
	return NULL;
}

static void *wait_in_poll(void *arg)
{
	struct waiter *waiter = arg;
	struct pollfd pollfd = { .fd = waiter->fd, .events = POLLIN };

	announce(waiter);
	waiter->result = ppoll(&pollfd, 1, NULL, NULL);
	waiter->revents = pollfd.revents;
	return NULL;
}

static void *wait_in_select(void *arg)
{
	struct waiter *waiter = arg;
	fd_set set;

	FD_ZERO(&set);
	FD_SET(waiter->fd, &set);
	announce(waiter);
	waiter->result = pselect(waiter->fd + 1, &set, NULL, NULL, NULL, NULL);
	waiter->revents = FD_ISSET(waiter->fd, &set) ? POLLIN : 0;
	return NULL;
}

static int make_epoll(int fd, u32 events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	CHECK(epoll >= 0);
	CHECK_EQ(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), 0);
	return epoll;
}

static void *wait_in_epoll(void *arg)
{
	struct waiter *waiter = arg;
	struct epoll_event event = {};
	int epoll = make_epoll(waiter->fd, EPOLLIN);

	announce(waiter);
	waiter->result = epoll_pwait(epoll, &event, 1, -1, NULL);
	waiter->revents = event.events;
	close(epoll);
	return NULL;
}

static void a_blocking_read_waits_for_a_report(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct waiter waiter;
	pthread_t thread;

	register_region(&device, page, page_size(), 1);
	thread = start_waiter(wait_in_read, &waiter, &device, SYS_read);
	zap(page, 1);
	join_thread(thread);
	CHECK_EQ(waiter.result, 2);
	check_inval(&waiter.events[0], 1, page, page_size(), HINT);
	check_last(&waiter.events[1], 1);
}

static void a_blocking_read_ignores_hits_beside_the_regions(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(2);
	struct waiter waiter;
	pthread_t thread;

	register_region(&device, pages, page_size(), 1);
	thread = start_waiter(wait_in_read, &waiter, &device, SYS_read);
	zap(pages + page_size(), 1);
	wait_until_in_syscall(waiter.tid, SYS_read);
	zap(pages, 2);
	join_thread(thread);
	CHECK_EQ(waiter.result, 2);
	check_inval(&waiter.events[0], 1, pages, page_size(), HINT);
	check_last(&waiter.events[1], 1);
}

static int signals_handled;

static void count_signal(int number)
{
	__atomic_add_fetch(&signals_handled, 1, __ATOMIC_RELEASE);
}

static void handle_signal(int number, int flags)
{
	struct sigaction action = {
		.sa_handler	= count_signal,
		.sa_flags	= flags,
	};

	CHECK_EQ(sigaction(number, &action, NULL), 0);
}

static void a_signal_ends_a_blocked_read(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct waiter waiter;
	pthread_t thread;

	handle_signal(SIGUSR1, 0);
	register_region(&device, page, page_size(), 1);
	thread = start_waiter(wait_in_read, &waiter, &device, SYS_read);
	CHECK_EQ(pthread_kill(thread, SIGUSR1), 0);
	join_thread(thread);
	CHECK_EQ(waiter.result, -EINTR);
	CHECK_EQ(signals_handled, 1);

	/* That read() has lost nothing, and broken nothing. */
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void a_read_restarts_if_the_handler_says_so(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct waiter waiter;
	pthread_t thread;

	handle_signal(SIGUSR1, SA_RESTART);
	register_region(&device, page, page_size(), 1);
	thread = start_waiter(wait_in_read, &waiter, &device, SYS_read);
	CHECK_EQ(pthread_kill(thread, SIGUSR1), 0);
	while (!__atomic_load_n(&signals_handled, __ATOMIC_ACQUIRE))
		sched_yield();
	wait_until_in_syscall(waiter.tid, SYS_read);
	zap(page, 1);
	join_thread(thread);
	CHECK_EQ(waiter.result, 2);
}

static void o_nonblock_is_obeyed_as_it_changes(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event event;
	char *page = map_pages(1);
	struct waiter waiter;
	pthread_t thread;

	CHECK_EQ(fcntl(device.fd, F_SETFL, O_NONBLOCK), 0);
	CHECK_EQ(read_records(device.fd, &event, 1), -EAGAIN);
	register_region(&device, page, page_size(), 1);
	CHECK_EQ(read_records(device.fd, &event, 1), -EAGAIN);
	CHECK_EQ(fcntl(device.fd, F_SETFL, 0), 0);
	thread = start_waiter(wait_in_read, &waiter, &device, SYS_read);
	zap(page, 1);
	join_thread(thread);
	CHECK_EQ(waiter.result, 2);
}

/* Whoever wakes and finds that another has read it all sleeps on. */
/* O_NONBLOCK belongs to everybody who has the file; RWF_NOWAIT to this call. */
static void rwf_nowait_never_waits_whatever_others_set(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[2];
	char *page = map_pages(1);

	CHECK_EQ(fcntl(device.fd, F_SETFL, 0), 0);
	CHECK_EQ(read_nowait(&device, events, ARRAY_SIZE(events)), -EAGAIN);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(read_nowait(&device, events, ARRAY_SIZE(events)), 2);
	check_inval(&events[0], 1, page, page_size(), HINT);
	check_last(&events[1], 1);
	CHECK_EQ(read_nowait(&device, events, ARRAY_SIZE(events)), -EAGAIN);
}

static void several_blocked_readers_share_the_reports(const void *unused)
{
	enum { READERS = 3 };
	struct device device = open_device(0);
	struct waiter waiters[READERS];
	pthread_t threads[READERS];
	char *page = map_pages(1);
	int reading = READERS;
	u64 lasts[READERS];
	int told = 0;

	register_region(&device, page, page_size(), 1);
	for (int i = 0; i < READERS; i++)
		threads[i] = start_waiter(wait_in_read, &waiters[i], &device,
					  SYS_read);
	while (reading) {
		zap(page, 1);
		sched_yield();
		reading = READERS;
		for (int i = 0; i < READERS; i++)
			reading -= __atomic_load_n(&waiters[i].result,
						   __ATOMIC_ACQUIRE) != 0;
	}
	for (int i = 0; i < READERS; i++) {
		join_thread(threads[i]);
		CHECK(waiters[i].result >= 1);
		/* Several reports, and no LAST, if zaps came while it read. */
		for (long n = 0; n < waiters[i].result; n++) {
			const struct ummunotify_event *event =
				&waiters[i].events[n];

			if (event->type == UMMUNOTIFY_EVENT_TYPE_INVAL) {
				CHECK_EQ(event->user_cookie_counter, 1);
				continue;
			}
			CHECK_EQ(n, waiters[i].result - 1);
			/* Two of them never shared one LAST. */
			for (int j = 0; j < told; j++)
				CHECK(lasts[j] != event->user_cookie_counter);
			lasts[told++] = event->user_cookie_counter;
		}
	}
}

enum { SHARED_REGIONS = 500, SHARED_ROUNDS = 20, STOP = SHARED_REGIONS };

struct sharing {
	struct device	device;
	bool		done;
	unsigned int	readers;
	unsigned int	seen[SHARED_REGIONS];
	unsigned int	total;
};

struct shared_reader {
	struct sharing	*sharing;
	size_t		room;
};

static void *read_until_stop(void *arg)
{
	struct shared_reader *reader = arg;
	struct sharing *sharing = reader->sharing;
	struct ummunotify_event events[64];
	bool stopped = false;

	while (!stopped) {
		long n = read_records(sharing->device.fd, events, reader->room);

		CHECK(n > 0);
		for (long i = 0; i < n; i++) {
			u64 cookie = events[i].user_cookie_counter;

			if (events[i].type == UMMUNOTIFY_EVENT_TYPE_LAST) {
				CHECK_EQ(i, n - 1);
			} else if (cookie == STOP) {
				stopped = __atomic_load_n(&sharing->done,
							  __ATOMIC_ACQUIRE);
			} else {
				CHECK(cookie < SHARED_REGIONS);
				__atomic_add_fetch(&sharing->seen[cookie], 1,
						   __ATOMIC_RELAXED);
				__atomic_add_fetch(&sharing->total, 1,
						   __ATOMIC_RELEASE);
			}
		}
	}
	__atomic_sub_fetch(&sharing->readers, 1, __ATOMIC_RELEASE);
	return NULL;
}

/* Each report is delivered to exactly one of several readers. */
static void several_readers_get_each_report_once(const void *unused)
{
	static const size_t rooms[] = { 1, 2, 17, 64 };
	static struct sharing sharing;
	struct shared_reader readers[ARRAY_SIZE(rooms)];
	pthread_t threads[ARRAY_SIZE(rooms)];
	char *page = map_pages(1), *stop_page = map_pages(1);

	sharing.device = open_device(0);
	sharing.readers = ARRAY_SIZE(rooms);
	register_region(&sharing.device, stop_page, page_size(), STOP);
	for (unsigned int i = 0; i < SHARED_REGIONS; i++)
		register_region(&sharing.device, page, page_size(), i);
	for (size_t i = 0; i < ARRAY_SIZE(rooms); i++) {
		readers[i].sharing = &sharing;
		readers[i].room = rooms[i];
		threads[i] = start_thread(read_until_stop, &readers[i]);
	}

	/*
	 * What was read before the zap has come to its end is told once more,
	 * then: so at least once, and at most twice.
	 */
	for (unsigned int round = 1; round <= SHARED_ROUNDS; round++) {
		zap(page, 1);
		for (unsigned int i = 0; i < SHARED_REGIONS; i++) {
			while (__atomic_load_n(&sharing.seen[i],
					       __ATOMIC_ACQUIRE) < round)
				sched_yield();
		}
		while (poll_now(sharing.device.fd))
			sched_yield();
		for (unsigned int i = 0; i < SHARED_REGIONS; i++)
			CHECK(sharing.seen[i] <= 2 * round);
	}

	/* Queued while nobody reads, each of them is told exactly once. */
	__atomic_store_n(&sharing.done, true, __ATOMIC_RELEASE);
	while (__atomic_load_n(&sharing.readers, __ATOMIC_ACQUIRE)) {
		zap(stop_page, 1);
		sched_yield();
	}
	for (size_t i = 0; i < ARRAY_SIZE(rooms); i++)
		join_thread(threads[i]);
	while (poll_now(sharing.device.fd))
		drain(&sharing.device);

	memset(sharing.seen, 0, sizeof(sharing.seen));
	sharing.done = false;
	sharing.readers = ARRAY_SIZE(rooms);
	zap(page, 1);
	for (size_t i = 0; i < ARRAY_SIZE(rooms); i++)
		threads[i] = start_thread(read_until_stop, &readers[i]);
	while (poll_now(sharing.device.fd))
		sched_yield();
	__atomic_store_n(&sharing.done, true, __ATOMIC_RELEASE);
	while (__atomic_load_n(&sharing.readers, __ATOMIC_ACQUIRE)) {
		zap(stop_page, 1);
		sched_yield();
	}
	for (size_t i = 0; i < ARRAY_SIZE(rooms); i++)
		join_thread(threads[i]);
	for (unsigned int i = 0; i < SHARED_REGIONS; i++)
		CHECK_EQ(sharing.seen[i], 1);
}

static void poll_says_in_and_rdnorm(const void *unused)
{
	struct device device = open_device(0);
	struct pollfd pollfd = {
		.fd = device.fd,
		.events = POLLIN | POLLRDNORM | POLLPRI | POLLOUT | POLLRDBAND |
			  POLLWRNORM | POLLRDHUP,
	};
	char *page = map_pages(1);

	CHECK_EQ(poll(&pollfd, 1, 0), 0);
	register_region(&device, page, page_size(), 1);
	CHECK_EQ(poll(&pollfd, 1, 0), 0);
	zap(page, 1);
	CHECK_EQ(poll(&pollfd, 1, 0), 1);
	CHECK_EQ(pollfd.revents, POLLIN | POLLRDNORM);
	expect_inval(&device, 1, page, page_size(), HINT);
	/* Also for a LAST alone. */
	CHECK_EQ(poll(&pollfd, 1, 0), 1);
	CHECK_EQ(pollfd.revents, POLLIN | POLLRDNORM);
	expect_last(&device, 1);
	CHECK_EQ(poll(&pollfd, 1, 0), 0);
}

static void one_report_wakes_all_kinds_of_pollers(const void *unused)
{
	static const struct {
		void	*(*run)(void *arg);
		long	syscall_number;
	} kinds[] = {
		{ wait_in_poll,		SYS_ppoll },
		{ wait_in_select,	SYS_pselect6 },
		{ wait_in_epoll,	SYS_epoll_pwait },
	};
	struct waiter waiters[2 * ARRAY_SIZE(kinds)];
	pthread_t threads[2 * ARRAY_SIZE(kinds)];
	struct device device = open_device(O_NONBLOCK);
	char *page = map_pages(1);

	register_region(&device, page, page_size(), 1);
	for (int round = 0; round < 3; round++) {
		for (size_t i = 0; i < ARRAY_SIZE(waiters); i++)
			threads[i] = start_waiter(kinds[i / 2].run, &waiters[i],
						  &device,
						  kinds[i / 2].syscall_number);
		zap(page, 1);
		for (size_t i = 0; i < ARRAY_SIZE(waiters); i++) {
			join_thread(threads[i]);
			CHECK_EQ(waiters[i].result, 1);
			CHECK_EQ(waiters[i].revents, POLLIN);
		}
		CHECK_EQ(drain(&device), 1);
	}
}

static int wait_no_time(int epoll)
{
	struct epoll_event event;

	return epoll_wait(epoll, &event, 1, 0);
}

static void epoll_by_level_stays_until_last_is_read(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *page = map_pages(1);
	int epoll = make_epoll(device.fd, EPOLLIN);

	CHECK_EQ(wait_no_time(epoll), 0);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(wait_no_time(epoll), 1);
	CHECK_EQ(wait_no_time(epoll), 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	CHECK_EQ(wait_no_time(epoll), 1);
	expect_last(&device, 1);
	CHECK_EQ(wait_no_time(epoll), 0);
}

static void epoll_by_edge_comes_once_per_report(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *pages = map_pages(2);
	int epoll = make_epoll(device.fd, EPOLLIN | EPOLLET);

	register_region(&device, pages, page_size(), 1);
	register_region(&device, pages + page_size(), page_size(), 2);
	CHECK_EQ(wait_no_time(epoll), 0);
	for (int round = 0; round < 10; round++) {
		zap(pages, 1);
		CHECK_EQ(wait_no_time(epoll), 1);
		CHECK_EQ(wait_no_time(epoll), 0);
		/* One more report, though the first was not read. */
		zap(pages + page_size(), 1);
		CHECK_EQ(wait_no_time(epoll), 1);
		CHECK_EQ(wait_no_time(epoll), 0);
		CHECK_EQ(drain(&device), 2);
		CHECK_EQ(wait_no_time(epoll), 0);
	}
}

/* Two programs with an epoll each both learn of the same report. */
static void each_epoll_sees_each_edge(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *page = map_pages(1);
	int first = make_epoll(device.fd, EPOLLIN | EPOLLET);
	int second = make_epoll(device.fd, EPOLLIN | EPOLLET);

	register_region(&device, page, page_size(), 1);
	for (int round = 0; round < 10; round++) {
		zap(page, 1);
		CHECK_EQ(wait_no_time(first), 1);
		CHECK_EQ(wait_no_time(second), 1);
		CHECK_EQ(drain(&device), 1);
		CHECK_EQ(wait_no_time(first), 0);
		CHECK_EQ(wait_no_time(second), 0);
	}
}

/*
 * Signals are sent from within the system call that changes the memory: no
 * waiting in these tests, a signal is pending or it is not.
 */
static int take_signal(const sigset_t *set, siginfo_t *info)
{
	static const struct timespec no_time;

	return sigtimedwait(set, info, &no_time);
}

static sigset_t block_signal(int number)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, number);
	CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, NULL), 0);
	return set;
}

static void sigio_goes_to_the_owner(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	sigset_t set = block_signal(SIGIO);
	char *page = map_pages(1);
	siginfo_t info;

	register_region(&device, page, page_size(), 1);
	CHECK_EQ(fcntl(device.fd, F_SETOWN, getpid()), 0);
	CHECK_EQ(fcntl(device.fd, F_GETOWN), getpid());
	zap(page, 1);
	CHECK_EQ(take_signal(&set, &info), -1);
	CHECK_EQ(drain(&device), 1);

	CHECK_EQ(fcntl(device.fd, F_SETFL, O_ASYNC | O_NONBLOCK), 0);
	for (int round = 0; round < 5; round++) {
		CHECK_EQ(take_signal(&set, &info), -1);
		zap(page, 1);
		CHECK_EQ(take_signal(&set, &info), SIGIO);
		CHECK_EQ(drain(&device), 1);
	}

	CHECK_EQ(fcntl(device.fd, F_SETFL, O_NONBLOCK), 0);
	zap(page, 1);
	CHECK_EQ(take_signal(&set, &info), -1);
}

static void f_setsig_tells_fd_and_band(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	sigset_t set = block_signal(SIGRTMIN + 3);
	char *pages = map_pages(2);
	siginfo_t info;

	register_region(&device, pages, page_size(), 1);
	register_region(&device, pages + page_size(), page_size(), 2);
	CHECK_EQ(fcntl(device.fd, F_SETOWN, getpid()), 0);
	CHECK_EQ(fcntl(device.fd, F_SETSIG, SIGRTMIN + 3), 0);
	CHECK_EQ(fcntl(device.fd, F_SETFL, O_ASYNC | O_NONBLOCK), 0);

	/* Two reports: real-time signals queue, and both tell the same. */
	zap(pages, 1);
	zap(pages + page_size(), 1);
	for (int i = 0; i < 2; i++) {
		memset(&info, 0, sizeof(info));
		CHECK_EQ(take_signal(&set, &info), SIGRTMIN + 3);
		CHECK_EQ(info.si_code, POLL_IN);
		CHECK_EQ(info.si_fd, device.fd);
		CHECK_EQ(info.si_band, POLLIN | POLLRDNORM);
	}
	CHECK_EQ(take_signal(&set, &info), -1);
	CHECK_EQ(drain(&device), 2);
	CHECK_EQ(take_signal(&set, &info), -1);
}

static void a_closed_fd_sends_no_signal(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	sigset_t set = block_signal(SIGIO);
	char *page = map_pages(1);
	siginfo_t info;

	register_region(&device, page, page_size(), 1);
	CHECK_EQ(fcntl(device.fd, F_SETOWN, getpid()), 0);
	CHECK_EQ(fcntl(device.fd, F_SETFL, O_ASYNC | O_NONBLOCK), 0);
	close_device(&device);
	zap(page, 1);
	CHECK_EQ(take_signal(&set, &info), -1);
}

struct signal_thread {
	struct waiter	waiter;
	sigset_t	set;
	siginfo_t	info;
};

static void *wait_for_signal(void *arg)
{
	struct signal_thread *thread = arg;

	announce(&thread->waiter);
	thread->waiter.result = sigtimedwait(&thread->set, &thread->info, NULL);
	return NULL;
}

/* As an event loop in a worker thread uses it. */
static void sigio_aims_at_a_thread(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	struct signal_thread other = {
		.set = block_signal(SIGRTMIN + 4),
	};
	struct f_owner_ex owner = { .type = F_OWNER_TID };
	char *page = map_pages(1);
	pthread_t thread;
	siginfo_t info;

	thread = start_thread(wait_for_signal, &other);
	while (!__atomic_load_n(&other.waiter.tid, __ATOMIC_ACQUIRE))
		sched_yield();
	owner.pid = other.waiter.tid;
	CHECK_EQ(fcntl(device.fd, F_SETOWN_EX, &owner), 0);
	CHECK_EQ(fcntl(device.fd, F_SETSIG, SIGRTMIN + 4), 0);
	CHECK_EQ(fcntl(device.fd, F_SETFL, O_ASYNC | O_NONBLOCK), 0);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(take_signal(&other.set, &info), -1);
	join_thread(thread);
	CHECK_EQ(other.waiter.result, SIGRTMIN + 4);
	CHECK_EQ(other.info.si_fd, device.fd);
}

static const struct test tests[] = {
	TEST(a_blocking_read_waits_for_a_report),
	TEST(a_blocking_read_ignores_hits_beside_the_regions),
	TEST(a_signal_ends_a_blocked_read),
	TEST(a_read_restarts_if_the_handler_says_so),
	TEST(o_nonblock_is_obeyed_as_it_changes),
	TEST(rwf_nowait_never_waits_whatever_others_set),
	TEST(several_blocked_readers_share_the_reports),
	TEST(several_readers_get_each_report_once),
	TEST(poll_says_in_and_rdnorm),
	TEST(one_report_wakes_all_kinds_of_pollers),
	TEST(epoll_by_level_stays_until_last_is_read),
	TEST(epoll_by_edge_comes_once_per_report),
	TEST(each_epoll_sees_each_edge),
	TEST(sigio_goes_to_the_owner),
	TEST(f_setsig_tells_fd_and_band),
	TEST(a_closed_fd_sends_no_signal),
	TEST(sigio_aims_at_a_thread),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
