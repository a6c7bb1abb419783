// SPDX-License-Identifier: GPL-2.0
/*
 * Whose memory is watched, and until when: fork, passed fds, the end of the
 * watched process, close().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

enum {
	MANY = 20000,
	/* Reporting these takes longer than a timer without high resolution. */
	REPORTED_SLOWLY = 100000,
};

static void wait_for_the_end(int fd)
{
	struct pollfd pollfd = { .fd = fd, .events = 0 };

	CHECK_EQ(poll(&pollfd, 1, -1), 1);
	CHECK_EQ(pollfd.revents, POLLHUP);
}

/* The counter of a fd that another process has opened. */
static struct device adopt_device(int fd)
{
	struct device device = { .fd = fd };

	device.counter = mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(device.counter != MAP_FAILED);
	return device;
}

static void register_many(const struct device *device, const char *page,
			  unsigned int regions)
{
	for (unsigned int i = 0; i < regions; i++)
		register_region(device, page, page_size(), i);
}

/* close() */

/* "What happens if I close() the fd when there are outstanding events?" */
static void close_with_pending_reports(const void *unused)
{
	char *page = map_pages(1);

	for (int round = 0; round < 10; round++) {
		struct device device = open_device(0);

		for (unsigned int i = 0; i < 10; i++)
			register_region(&device, page, page_size(), i);
		zap(page, 1);
		if (round % 2)
			expect_inval(&device, 0, page, page_size(), HINT);
		close_device(&device);
		zap(page, 1);
	}
}

/* "... when there are still-registered regions?" */
static void close_with_many_regions(const void *unused)
{
	struct device device = open_device(0);
	char *pages = map_pages(2);

	/* Half of them pending, some unregistered and taken again. */
	for (unsigned int i = 0; i < MANY; i++)
		register_region(&device, pages + i % 2 * page_size(),
				page_size(), i);
	zap(pages, 1);
	for (unsigned int i = 0; i < MANY; i += 7)
		unregister_region(&device, i);
	for (unsigned int i = 0; i < MANY; i += 14)
		register_region(&device, pages, 2 * page_size(), i);
	close_device(&device);
	zap(pages, 2);
	CHECK_EQ(munmap(pages, 2 * page_size()), 0);
}

static void a_kept_counter_reads_changed_after_close(const void *unused)
{
	struct device device = open_device(0);
	struct device silent = open_device(0);
	char *page = map_pages(1);
	int copy;

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(drain(&device), 1);

	/* A duplicate keeps the file open. */
	copy = dup(device.fd);
	CHECK_EQ(close(device.fd), 0);
	zap(page, 1);
	CHECK_EQ(generation(&device), 2);
	CHECK_EQ(close(copy), 0);
	CHECK(generation(&device) > 2);

	/* Also with no region, and no report ever. */
	CHECK_EQ(close(silent.fd), 0);
	CHECK(generation(&silent) != 0);

	/* The page stays, and stays as it is. */
	zap(page, 1);
	CHECK_EQ(generation(&device), 3);
	CHECK_EQ(munmap((void *)device.counter, page_size()), 0);
}

static unsigned long module_references(void)
{
	FILE *file = fopen("/sys/module/ummunotify/refcnt", "r");
	unsigned long references;

	if (!file)
		skip("the driver is not a module here");
	CHECK_EQ(fscanf(file, "%lu", &references), 1);
	fclose(file);
	return references;
}

/* It handles the page faults there. */
static void a_kept_counter_keeps_the_module(const void *unused)
{
	unsigned long before = module_references();
	struct device device = open_device(0);

	CHECK(module_references() > before);
	CHECK_EQ(close(device.fd), 0);
	CHECK(module_references() > before);
	CHECK(generation(&device) != 0);
	CHECK_EQ(munmap((void *)device.counter, page_size()), 0);
	/* The last fput() of a mapping may be a moment behind. */
	while (module_references() != before)
		usleep(1000);
}

/* fork */

static void in_child(void (*run)(int socket, void *arg), void *arg)
{
	struct peer peer = start_peer(run, arg);

	join_peer(&peer);
}

struct forked {
	struct device	device;
	char		*page;
	u64		generation;
};

static void change_own_memory(int socket, void *arg)
{
	struct forked *forked = arg;
	u64 before;

	/* The fork itself has write-protected the parent's page: wait for it. */
	receive_word(socket);
	before = generation(&forked->device);
	touch(forked->page, 1);
	zap(forked->page, 1);
	touch(forked->page, 1);
	CHECK_EQ(mprotect(forked->page, page_size(), PROT_READ), 0);
	CHECK_EQ(munmap(forked->page, page_size()), 0);
	CHECK_EQ(generation(&forked->device), before);
}

static void the_memory_of_a_forked_child_is_not_watched(const void *unused)
{
	struct forked forked = {
		.device	= open_device(0),
		.page	= map_pages(1),
	};
	struct peer peer;
	u64 before;

	register_region(&forked.device, forked.page, page_size(), 1);
	peer = start_peer(change_own_memory, &forked);
	drain(&forked.device);
	before = generation(&forked.device);
	send_word(peer.socket, 0);
	join_peer(&peer);
	CHECK_EQ(generation(&forked.device), before);
	expect_nothing(&forked.device);
}

static void register_for_the_parent(int socket, void *arg)
{
	struct forked *forked = arg;
	struct ummunotify_event events[2];

	register_region(&forked->device, forked->page, page_size(), 7);
	send_word(socket, 0);
	/* The parent zaps.  The child reads it. */
	receive_word(socket);
	CHECK_EQ(read_records(forked->device.fd, events, 2), 2);
	check_inval(&events[0], 7, forked->page, page_size(), HINT);
	check_last(&events[1], generation(&forked->device));
}

static void a_child_uses_the_fd_for_its_parent(const void *unused)
{
	struct forked forked = { .device = open_device(0) };
	struct peer peer;

	/* Shared: neither fork() nor a write afterwards changes it. */
	forked.page = map_untouched(1, PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_ANONYMOUS, -1);
	touch(forked.page, 1);
	peer = start_peer(register_for_the_parent, &forked);
	receive_word(peer.socket);
	CHECK_EQ(generation(&forked.device), 0);
	zap(forked.page, 1);
	send_word(peer.socket, 0);
	join_peer(&peer);
	CHECK_EQ(generation(&forked.device), 1);
	expect_nothing(&forked.device);
}

static void close_in_child(int socket, void *arg)
{
	struct forked *forked = arg;

	close_device(&forked->device);
}

static void the_end_of_a_child_is_not_the_end(const void *unused)
{
	struct forked forked = { .device = open_device(0) };

	forked.page = map_untouched(1, PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_ANONYMOUS, -1);
	register_region(&forked.device, forked.page, page_size(), 1);
	in_child(close_in_child, &forked);
	CHECK_EQ(generation(&forked.device), 0);
	expect_nothing(&forked.device);
	zap(forked.page, 1);
	expect_inval(&forked.device, 1, forked.page, page_size(), HINT);
	expect_last(&forked.device, 1);
}

static void open_own(int socket, void *arg)
{
	struct forked *forked = arg;
	struct device own = open_device(0);
	u64 before = generation(&forked->device);

	register_region(&own, forked->page, page_size(), 9);
	zap(forked->page, 1);
	CHECK_EQ(generation(&own), 1);
	expect_inval(&own, 9, forked->page, page_size(), HINT);
	expect_last(&own, 1);
	CHECK_EQ(generation(&forked->device), before);
}

static void a_child_that_opens_watches_itself(const void *unused)
{
	struct forked forked = {
		.device	= open_device(0),
		.page	= map_pages(1),
	};

	register_region(&forked.device, forked.page, page_size(), 1);
	in_child(open_own, &forked);
}

static void *return_at_once(void *unused)
{
	return NULL;
}

static void *open_in_thread(void *arg)
{
	*(struct device *)arg = open_device(0);
	return NULL;
}

static void the_end_of_a_thread_is_not_the_end(const void *unused)
{
	struct device device;
	char *page = map_pages(1);

	join_thread(start_thread(open_in_thread, &device));
	register_region(&device, page, page_size(), 1);
	join_thread(start_thread(return_at_once, NULL));
	expect_nothing(&device);
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void a_spawned_program_is_not_the_end(const void *unused)
{
	static char *const arguments[] = { "true", NULL };
	struct device device = open_device(0);
	char *page = map_pages(1);
	pid_t pid;
	int status;

	register_region(&device, page, page_size(), 1);
	/* vfork() and exec: the child runs in this address space for a while. */
	CHECK_EQ(posix_spawnp(&pid, "true", NULL, NULL, arguments, environ), 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(generation(&device), 0);
	expect_nothing(&device);
}

/* A watched process, and its fd here */

/* What the watched process tells about itself, over shared memory. */
struct watched {
	char	*page;
	void	*shared;
	char	*program;
};

/* Regions of @watched->page: 1 untouched, 2 pending, 3 was read, 4 is empty. */
static struct device open_and_pass(int socket, struct watched *watched)
{
	struct device device = open_device(0);
	char *pages = map_pages(3);
	size_t page = page_size();

	*(char **)watched->shared = pages;
	register_region(&device, pages, page, 1);
	register_region(&device, pages + page, page, 2);
	register_region(&device, pages + 2 * page, page, 3);
	CHECK_EQ(try_register(device.fd, address(pages), address(pages), 4), 0);
	zap(pages + 2 * page, 1);
	CHECK_EQ(drain(&device), 1);
	zap(pages + page, 1);
	send_fd(socket, device.fd);
	return device;
}

/* The watched process has ended: everything that is to be seen of that. */
static void check_the_end(struct device *device, char *pages)
{
	struct ummunotify_event events[8];
	unsigned int seen = 0;
	size_t page = page_size();
	u64 last;

	wait_for_the_end(device->fd);
	CHECK_EQ(poll_now(device->fd), POLLIN | POLLHUP);
	CHECK_EQ(generation(device), 3);
	CHECK_EQ(read_records(device->fd, events, 8), 4);
	for (int i = 0; i < 3; i++) {
		u64 cookie = events[i].user_cookie_counter;

		CHECK_EQ(events[i].type, UMMUNOTIFY_EVENT_TYPE_INVAL);
		CHECK(cookie >= 1 && cookie <= 3);
		seen |= 1u << cookie;
		/* The whole region, and the second hit to number two. */
		CHECK_EQ(events[i].hint_start,
			 address(pages) + (cookie - 1) * page);
		CHECK_EQ(events[i].hint_end, address(pages) + cookie * page);
		if (cookie == 2)
			CHECK_EQ(events[i].flags, 0);
	}
	CHECK_EQ(seen, 2 + 4 + 8);
	last = generation(device);
	check_last(&events[3], last);

	/* End of file, as often as one asks. */
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(read_records(device->fd, events, 8), 0);
		CHECK_EQ(poll_now(device->fd), POLLIN | POLLHUP);
	}
	CHECK_EQ(read(device->fd, events, 3), -1);
	CHECK_EQ(errno, EINVAL);

	/* Nothing can be registered any more; everything else goes on. */
	CHECK_EQ(try_register(device->fd, 0, page, 5), -ESRCH);
	CHECK_EQ(try_register(device->fd, 0, page, 1), -ESRCH);
	CHECK_EQ(try_unregister(device->fd, 5), -EINVAL);
	for (u64 cookie = 1; cookie <= 4; cookie++)
		unregister_region(device, cookie);
	CHECK_EQ(read_records(device->fd, events, 8), 0);
	CHECK_EQ(generation(device), last);
	close_device(device);
}

static void start_watched(void (*run)(int socket, void *arg),
			  struct watched *watched, struct peer *peer,
			  struct device *device)
{
	watched->shared = map_untouched(1, PROT_READ | PROT_WRITE,
					MAP_SHARED | MAP_ANONYMOUS, -1);
	*peer = start_peer(run, watched);
	*device = adopt_device(receive_fd(peer->socket));
	watched->page = *(char **)watched->shared;
	CHECK_EQ(poll_now(device->fd), POLLIN);
	CHECK_EQ(generation(device), 2);
}

static void exit_when_told(int socket, void *arg)
{
	open_and_pass(socket, arg);
	receive_word(socket);
}

/* "What happens when the target process exits?" */
static void exit_of_the_target(const void *unused)
{
	struct watched watched;
	struct device device;
	struct peer peer;

	start_watched(exit_when_told, &watched, &peer, &device);
	send_word(peer.socket, 0);
	check_the_end(&device, watched.page);
	join_peer(&peer);
}

static void be_killed(int socket, void *arg)
{
	open_and_pass(socket, arg);
	pause();
}

static void kill_of_the_target(const void *unused)
{
	struct watched watched;
	struct device device;
	struct peer peer;
	int status;

	start_watched(be_killed, &watched, &peer, &device);
	CHECK_EQ(kill(peer.pid, SIGKILL), 0);
	check_the_end(&device, watched.page);
	CHECK_EQ(waitpid(peer.pid, &status, 0), peer.pid);
	CHECK_EQ(WTERMSIG(status), SIGKILL);
}

static void exec_when_told(int socket, void *arg)
{
	open_and_pass(socket, arg);
	receive_word(socket);
	/* cat waits for the socket's other end to be closed. */
	CHECK_EQ(dup2(socket, STDIN_FILENO), STDIN_FILENO);
	execlp("cat", "cat", NULL);
	FAIL("cannot execute cat");
}

static void exec_of_the_target(const void *unused)
{
	struct watched watched;
	struct device device;
	struct peer peer;
	int status;

	start_watched(exec_when_told, &watched, &peer, &device);
	send_word(peer.socket, 0);
	check_the_end(&device, watched.page);
	/* That was the exec: the process is there. */
	CHECK_EQ(waitpid(peer.pid, &status, WNOHANG), 0);
	CHECK_EQ(close(peer.socket), 0);
	CHECK_EQ(waitpid(peer.pid, &status, 0), peer.pid);
	CHECK_EQ(status, 0);
}

static int share_memory(void *arg)
{
	int socket = *(int *)arg;
	int parent_is_gone = receive_word(socket);

	CHECK(parent_is_gone);
	/* The watch works on, in the address space that is left. */
	zap((char *)receive_word(socket), 1);
	send_word(socket, 0);
	receive_word(socket);
	return 0;
}

static void exit_before_sharer(int socket, void *arg)
{
	static char stack[65536] __aligned(16);
	struct watched *watched = arg;
	static int sharers_socket;

	open_and_pass(socket, watched);
	sharers_socket = socket;
	CHECK(clone(share_memory, stack + sizeof(stack), CLONE_VM | CLONE_FILES,
		    &sharers_socket) > 0);
	/* Without atexit handlers and the like. */
	syscall(SYS_exit_group, 0);
}

static void the_end_waits_for_processes_that_share_memory(const void *unused)
{
	struct watched watched;
	struct device device;
	struct peer peer;
	int status;

	start_watched(exit_before_sharer, &watched, &peer, &device);
	CHECK_EQ(waitpid(peer.pid, &status, 0), peer.pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(poll_now(device.fd), POLLIN);
	CHECK_EQ(drain(&device), 1);
	send_word(peer.socket, 1);
	send_word(peer.socket, address(watched.page));
	receive_word(peer.socket);
	expect_inval(&device, 1, watched.page, page_size(), HINT);
	expect_last(&device, 3);
	CHECK_EQ(poll_now(device.fd), 0);
	CHECK_EQ(try_register(device.fd, 0, 1, 5), 0);
	send_word(peer.socket, 0);
	wait_for_the_end(device.fd);
	CHECK_EQ(drain(&device), 4);
}

static void open_and_exit_when_told(int socket, void *arg)
{
	struct device device = open_device(0);

	send_fd(socket, device.fd);
	receive_word(socket);
}

static void the_end_without_regions_is_end_of_file(const void *unused)
{
	struct peer peer = start_peer(open_and_exit_when_told, NULL);
	struct device device = adopt_device(receive_fd(peer.socket));
	struct ummunotify_event event;

	expect_nothing(&device);
	send_word(peer.socket, 0);
	wait_for_the_end(device.fd);
	CHECK_EQ(read_records(device.fd, &event, 1), 0);
	join_peer(&peer);
}

static void the_end_is_a_cause(const void *unused)
{
	struct peer peer = start_peer(open_and_exit_when_told, NULL);
	struct device device = adopt_device(receive_fd(peer.socket));
	u32 features = UMMUNOTIFY_FEATURE_CAUSE;

	if (getenv("UMMUNOTIFY_TEST_FEATURES"))
		skip("features are negotiated already");
	CHECK_EQ(try_exchange(device.fd, &features), 0);
	/* Nothing is ever mapped at the address 0. */
	register_region(&device, NULL, page_size(), 1);
	send_word(peer.socket, 0);
	wait_for_the_end(device.fd);
	expect_inval(&device, 1, NULL, page_size(),
		     HINT | UMMUNOTIFY_EVENT_CAUSE_END);
	expect_last(&device, 1);
	join_peer(&peer);
}

static void an_empty_region_does_not_report_the_end(const void *unused)
{
	struct peer peer = start_peer(open_and_exit_when_told, NULL);
	struct device device = adopt_device(receive_fd(peer.socket));
	struct ummunotify_event event;

	CHECK_EQ(try_register(device.fd, 4096, 4096, 1), 0);
	send_word(peer.socket, 0);
	wait_for_the_end(device.fd);
	CHECK_EQ(read_records(device.fd, &event, 1), 0);
	CHECK_EQ(generation(&device), 0);
	join_peer(&peer);
}

struct end_reader {
	struct device	device;
	pid_t		tid;
	size_t		reports;
};

static void *read_until_end_of_file(void *arg)
{
	struct end_reader *reader = arg;
	struct ummunotify_event events[8];
	long n;

	__atomic_store_n(&reader->tid, gettid(), __ATOMIC_RELEASE);
	while ((n = read_records(reader->device.fd, events, 8))) {
		CHECK(n > 0);
		for (long i = 0; i < n; i++)
			reader->reports +=
				events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL;
	}
	return NULL;
}

static void a_blocked_reader_learns_of_the_end(const void *unused)
{
	for (unsigned int regions = 0; regions < 3; regions++) {
		struct peer peer = start_peer(open_and_exit_when_told, NULL);
		struct end_reader reader = {
			.device = adopt_device(receive_fd(peer.socket)),
		};
		pthread_t thread;
		pid_t tid;

		for (unsigned int i = 0; i < regions; i++)
			register_region(&reader.device, NULL, page_size(), i);
		thread = start_thread(read_until_end_of_file, &reader);
		while (!(tid = __atomic_load_n(&reader.tid, __ATOMIC_ACQUIRE)))
			sched_yield();
		wait_until_in_syscall(tid, SYS_read);
		send_word(peer.socket, 0);
		join_thread(thread);
		CHECK_EQ(reader.reports, regions);
		join_peer(&peer);
	}
}

/*
 * A reader that finds nothing more to read while the end is still being reported
 * must not see the end of file, or POLLHUP.
 *
 * It is a real-time process on the CPU of the process that ends, and wakes by a
 * timer: it preempts that one where the driver drops its lock.
 *
 * Return: how often it found nothing more in the middle of the reports.
 */
static unsigned int read_to_the_end(bool by_poll)
{
	static const struct timespec moment = { .tv_nsec = 200000 };
	struct peer peer = start_peer(open_and_exit_when_told, NULL);
	struct device device = adopt_device(receive_fd(peer.socket));
	struct sched_param priority = { .sched_priority = 1 };
	struct sched_param none = { .sched_priority = 0 };
	struct ummunotify_event events[64];
	unsigned int in_the_middle = 0;
	size_t reports = 0;
	bool ended = false;

	CHECK_EQ(fcntl(device.fd, F_SETFL, O_NONBLOCK), 0);
	register_many(&device, NULL, REPORTED_SLOWLY);
	send_word(peer.socket, 0);
	if (sched_setscheduler(0, SCHED_FIFO, &priority))
		skip("only root has real-time processes");
	while (!ended) {
		bool hung_up = by_poll && (poll_now(device.fd) & POLLHUP);
		long n;

		/* Behind POLLHUP, only what was queued before it is left. */
		do {
			n = read_records(device.fd, events, ARRAY_SIZE(events));
			if (n > 0)
				reports += n - (events[n - 1].type ==
						UMMUNOTIFY_EVENT_TYPE_LAST);
		} while (n > 0 && hung_up);
		if (n == -EAGAIN) {
			CHECK(!hung_up);
			in_the_middle += reports && reports < REPORTED_SLOWLY;
			clock_nanosleep(CLOCK_MONOTONIC, 0, &moment, NULL);
		} else {
			CHECK(n >= 0);
			ended = n == 0;
		}
	}
	CHECK_EQ(sched_setscheduler(0, SCHED_OTHER, &none), 0);
	CHECK_EQ(reports, REPORTED_SLOWLY);
	close_device(&device);
	join_peer(&peer);
	return in_the_middle;
}

static void the_end_follows_all_reports(const void *by_poll)
{
	enum { ENOUGH = 3, MAX_ROUNDS = 50 };
	unsigned int in_the_middle = 0;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(sched_getcpu(), &cpus);
	CHECK_EQ(sched_setaffinity(0, sizeof(cpus), &cpus), 0);
	for (int i = 0; i < MAX_ROUNDS && in_the_middle < ENOUGH; i++)
		in_the_middle += read_to_the_end(by_poll);
	note("%u times nothing to read in the middle of the reports",
	     in_the_middle);
	/* All that could be checked was; a scheduler decides how much that is. */
	if (!in_the_middle)
		skip("the end was never preempted in the middle of its reports");
}

static void epoll_and_sigio_tell_the_end(const void *unused)
{
	struct peer peer = start_peer(open_and_exit_when_told, NULL);
	struct device device = adopt_device(receive_fd(peer.socket));
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	int epoll = epoll_create1(0);
	bool told = false;
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 5);
	CHECK_EQ(sigprocmask(SIG_BLOCK, &set, NULL), 0);
	CHECK_EQ(fcntl(device.fd, F_SETOWN, getpid()), 0);
	CHECK_EQ(fcntl(device.fd, F_SETSIG, SIGRTMIN + 5), 0);
	CHECK_EQ(fcntl(device.fd, F_SETFL, O_ASYNC | O_NONBLOCK), 0);
	CHECK_EQ(epoll_ctl(epoll, EPOLL_CTL_ADD, device.fd, &event), 0);
	register_region(&device, NULL, page_size(), 1);
	send_word(peer.socket, 0);

	while (!(event.events & EPOLLHUP))
		CHECK_EQ(epoll_wait(epoll, &event, 1, -1), 1);
	CHECK(event.events & EPOLLIN);
	while (!told) {
		CHECK_EQ(sigwaitinfo(&set, &info), SIGRTMIN + 5);
		CHECK_EQ(info.si_fd, device.fd);
		told = info.si_code == POLL_HUP;
		CHECK(told || info.si_code == POLL_IN);
	}
	CHECK(info.si_band & POLLHUP);
	CHECK_EQ(drain(&device), 1);
	join_peer(&peer);
}

/* Process and fds end together, in the order that the kernel likes. */
static void exit_with_everything_open(const void *unused)
{
	for (int round = 0; round < 6; round++) {
		pid_t pid = fork();
		int status;

		CHECK(pid >= 0);
		if (pid == 0) {
			struct device device = open_device(0);
			char *page = map_pages(1);

			open_device(0);
			register_many(&device, page, MANY);
			if (round % 3 == 1)
				zap(page, 1);
			if (round % 3 == 2)
				CHECK_EQ(close(device.fd), 0);
			if (round % 2)
				kill(getpid(), SIGKILL);
			_exit(0);
		}
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK_EQ(status, round % 2 ? SIGKILL : 0);
	}
}

static void map_and_exit_when_told(int socket, void *arg)
{
	int fd = receive_fd(socket);
	struct device device = open_device(0);

	CHECK(mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		   0) != MAP_FAILED);
	close(fd);
	send_fd(socket, device.fd);
	receive_word(socket);
}

/*
 * The fd keeps no memory of a process that has ended: a file that it had mapped
 * can be sealed, which is refused for as long as a writable mapping exists.
 */
static void the_fd_does_not_pin_the_address_space(const void *unused)
{
	struct peer peer = start_peer(map_and_exit_when_told, NULL);
	int file = memfd_create("ummunotify-test",
				MFD_CLOEXEC | MFD_ALLOW_SEALING);
	struct device device;

	CHECK(file >= 0);
	CHECK_EQ(ftruncate(file, page_size()), 0);
	send_fd(peer.socket, file);
	device = adopt_device(receive_fd(peer.socket));
	CHECK_EQ(fcntl(file, F_ADD_SEALS, F_SEAL_WRITE), -1);
	CHECK_EQ(errno, EBUSY);
	send_word(peer.socket, 0);
	join_peer(&peer);
	wait_for_the_end(device.fd);
	CHECK_EQ(fcntl(file, F_ADD_SEALS, F_SEAL_WRITE), 0);
}

/* A fd passed to a process that is no relative of it */

static void read_passed_fd(int socket, void *arg)
{
	struct device device = adopt_device(receive_fd(socket));
	char *target = (char *)receive_word(socket);
	char *own = map_pages(1);
	struct ummunotify_event events[3];

	/* Registered for the opener, not for the process that asks. */
	register_region(&device, target, page_size(), 1);
	register_region(&device, own, page_size(), 2);
	zap(own, 1);
	CHECK_EQ(munmap(own, page_size()), 0);
	CHECK_EQ(generation(&device), 0);
	expect_nothing(&device);

	send_word(socket, 0);
	receive_word(socket);
	CHECK_EQ(generation(&device), 1);
	CHECK_EQ(read_records(device.fd, events, 3), 2);
	check_inval(&events[0], 1, target, page_size(), HINT);
	check_last(&events[1], 1);
	unregister_region(&device, 1);
	close_device(&device);
}

static void a_passed_fd_watches_its_opener(const void *unused)
{
	/* Mapped in both: memory of the other's own has other addresses. */
	char *page = map_pages(1);
	struct peer peer = start_peer(read_passed_fd, NULL);
	struct device device = open_device(0);

	send_fd(peer.socket, device.fd);
	send_word(peer.socket, address(page));
	receive_word(peer.socket);
	zap(page, 1);
	send_word(peer.socket, 0);
	join_peer(&peer);
	/* The other process has read it, and unregistered the region. */
	zap(page, 1);
	CHECK_EQ(generation(&device), 1);
	expect_nothing(&device);
	CHECK_EQ(try_unregister(device.fd, 1), -EINVAL);
	unregister_region(&device, 2);
}

static void many_fds_of_one_process(const void *unused)
{
	enum { FDS = 50 };
	struct device devices[FDS];
	char *page = map_pages(1);

	for (unsigned int i = 0; i < FDS; i++) {
		devices[i] = open_device(0);
		register_region(&devices[i], page, page_size(), i);
	}
	zap(page, 1);
	for (unsigned int i = 0; i < FDS; i += 2)
		close_device(&devices[i]);
	zap(page, 1);
	for (unsigned int i = 1; i < FDS; i += 2) {
		CHECK_EQ(generation(&devices[i]), 2);
		expect_inval(&devices[i], i, page, page_size(), 0);
		expect_last(&devices[i], 2);
	}
}

static const struct test tests[] = {
	TEST(close_with_pending_reports),
	TEST(close_with_many_regions),
	TEST(a_kept_counter_reads_changed_after_close),
	TEST(a_kept_counter_keeps_the_module),
	TEST(the_memory_of_a_forked_child_is_not_watched),
	TEST(a_child_uses_the_fd_for_its_parent),
	TEST(the_end_of_a_child_is_not_the_end),
	TEST(a_child_that_opens_watches_itself),
	TEST(the_end_of_a_thread_is_not_the_end),
	TEST(a_spawned_program_is_not_the_end),
	TEST(exit_of_the_target),
	TEST(kill_of_the_target),
	TEST(exec_of_the_target),
	TEST(the_end_waits_for_processes_that_share_memory),
	TEST(the_end_without_regions_is_end_of_file),
	TEST(the_end_is_a_cause),
	TEST(an_empty_region_does_not_report_the_end),
	TEST(a_blocked_reader_learns_of_the_end),
	{ "the_end_of_file_follows_all_reports", the_end_follows_all_reports },
	{ "pollhup_follows_all_reports", the_end_follows_all_reports, "poll" },
	TEST(epoll_and_sigio_tell_the_end),
	TEST(exit_with_everything_open),
	TEST(the_fd_does_not_pin_the_address_space),
	TEST(a_passed_fd_watches_its_opener),
	TEST(many_fds_of_one_process),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
