// SPDX-License-Identifier: GPL-2.0
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device.h"

struct device open_device_plain(int flags)
{
	struct device device;

	device.fd = open(DEVICE_PATH, O_RDONLY | O_CLOEXEC | flags);
	if (device.fd < 0)
		FAIL("cannot open " DEVICE_PATH);
	device.counter = mmap(NULL, UMMUNOTIFY_GENERATION_SIZE, PROT_READ,
			      MAP_SHARED, device.fd,
			      UMMUNOTIFY_GENERATION_OFFSET);
	CHECK(device.counter != MAP_FAILED);
	return device;
}

struct device open_device_with(u32 features, int flags)
{
	struct device device = open_device_plain(flags);
	u32 granted = features;

	CHECK_EQ(try_exchange(device.fd, &granted), 0);
	CHECK_EQ(granted, features);
	return device;
}

struct device open_device(int flags)
{
	if (!getenv("UMMUNOTIFY_TEST_FEATURES"))
		return open_device_plain(flags);
	/* But for causes, since tests look at all flags. */
	return open_device_with(UMMUNOTIFY_FEATURE_FILTER |
				UMMUNOTIFY_FEATURE_STATE |
				UMMUNOTIFY_FEATURE_ONCE, flags);
}

struct device open_device_with_causes(int flags)
{
	return open_device_with(UMMUNOTIFY_FEATURE_CAUSE, flags);
}

void close_device(struct device *device)
{
	CHECK_EQ(munmap((void *)device->counter, page_size()), 0);
	CHECK_EQ(close(device->fd), 0);
	device->counter = NULL;
	device->fd = -1;
}

u64 generation(const struct device *device)
{
	return ummunotify_load_generation(device->counter);
}

int try_exchange(int fd, u32 *features)
{
	int ret = ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, features);

	return ret < 0 ? -errno : ret;
}

int try_register_with(int fd, u64 start, u64 end, u64 cookie, u32 flags,
		      u32 slot)
{
	struct ummunotify_register_ioctl region = {
		.start		= start,
		.end		= end,
		.user_cookie	= cookie,
		.flags		= flags,
		.reserved	= slot,
	};
	int ret = ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &region);

	return ret < 0 ? -errno : ret;
}

int try_register(int fd, u64 start, u64 end, u64 cookie)
{
	return try_register_with(fd, start, end, cookie, 0, 0);
}

int try_unregister(int fd, u64 cookie)
{
	int ret = ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie);

	return ret < 0 ? -errno : ret;
}

void register_region(const struct device *device, const void *start,
		     size_t length, u64 cookie)
{
	CHECK_EQ(try_register(device->fd, address(start),
			      address(start) + length, cookie), 0);
}

void unregister_region(const struct device *device, u64 cookie)
{
	CHECK_EQ(try_unregister(device->fd, cookie), 0);
}

static long in_records(ssize_t size)
{
	if (size < 0)
		return -errno;
	CHECK_EQ(size % sizeof(struct ummunotify_event), 0);
	return size / sizeof(struct ummunotify_event);
}

long read_records(int fd, struct ummunotify_event *events, size_t room)
{
	return in_records(read(fd, events, room * sizeof(*events)));
}

long read_nowait(const struct device *device, struct ummunotify_event *events,
		 size_t room)
{
	struct iovec iov = {
		.iov_base	= events,
		.iov_len	= room * sizeof(*events),
	};

	return in_records(preadv2(device->fd, &iov, 1, -1, RWF_NOWAIT));
}

void check_inval(const struct ummunotify_event *event, u64 cookie,
		 const void *start, size_t length, u32 flags)
{
	CHECK_EQ(event->type, UMMUNOTIFY_EVENT_TYPE_INVAL);
	CHECK_EQ(event->user_cookie_counter, cookie);
	CHECK_EQ(event->flags, flags);
	CHECK_EQ(event->hint_start, address(start));
	CHECK_EQ(event->hint_end, address(start) + length);
}

void check_last(const struct ummunotify_event *event, u64 generation)
{
	CHECK_EQ(event->type, UMMUNOTIFY_EVENT_TYPE_LAST);
	CHECK_EQ(event->user_cookie_counter, generation);
	CHECK_EQ(event->flags, 0);
	CHECK_EQ(event->hint_start, 0);
	CHECK_EQ(event->hint_end, 0);
}

void expect_inval(const struct device *device, u64 cookie,
		  const void *start, size_t length, u32 flags)
{
	struct ummunotify_event event;

	CHECK(poll_now(device->fd) & POLLIN);
	CHECK_EQ(read_records(device->fd, &event, 1), 1);
	check_inval(&event, cookie, start, length, flags);
}

void expect_last(const struct device *device, u64 generation)
{
	struct ummunotify_event event;

	CHECK(poll_now(device->fd) & POLLIN);
	CHECK_EQ(read_records(device->fd, &event, 1), 1);
	check_last(&event, generation);
}

void expect_nothing(const struct device *device)
{
	int flags = fcntl(device->fd, F_GETFL);
	struct ummunotify_event event;

	CHECK_EQ(poll_now(device->fd), 0);
	CHECK_EQ(fcntl(device->fd, F_SETFL, flags | O_NONBLOCK), 0);
	CHECK_EQ(read_records(device->fd, &event, 1), -EAGAIN);
	CHECK_EQ(fcntl(device->fd, F_SETFL, flags), 0);
}

size_t drain(const struct device *device)
{
	struct ummunotify_event events[64];
	size_t reports = 0;

	for (;;) {
		long n = read_records(device->fd, events, ARRAY_SIZE(events));

		CHECK(n > 0);
		reports += n;
		if (events[n - 1].type == UMMUNOTIFY_EVENT_TYPE_LAST)
			return reports - 1;
	}
}

short poll_now(int fd)
{
	struct pollfd pollfd = { .fd = fd, .events = POLLIN };

	CHECK(poll(&pollfd, 1, 0) >= 0);
	return pollfd.revents;
}

size_t page_size(void)
{
	return sysconf(_SC_PAGESIZE);
}

char *map_untouched(size_t pages, int protection, int flags, int fd)
{
	size_t length = pages * page_size();
	char *area, *start;

	area = mmap(NULL, length + 2 * page_size(), PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(area != MAP_FAILED);
	start = mmap(area + page_size(), length, protection,
		     flags | MAP_FIXED, fd, 0);
	CHECK(start == area + page_size());
	/* Fails where the kernel has no huge pages. */
	madvise(start, length, MADV_NOHUGEPAGE);
	return start;
}

void touch(char *start, size_t pages)
{
	for (size_t i = 0; i < pages; i++)
		__atomic_store_n(start + i * page_size(), 1, __ATOMIC_RELAXED);
}

char *map_pages(size_t pages)
{
	char *start = map_untouched(pages, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1);

	touch(start, pages);
	return start;
}

void zap(void *start, size_t pages)
{
	CHECK_EQ(madvise(start, pages * page_size(), MADV_DONTNEED), 0);
}

int make_shared_file(size_t pages)
{
	int fd = memfd_create("ummunotify-test", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK_EQ(ftruncate(fd, pages * page_size()), 0);
	return fd;
}

pthread_t start_thread(void *(*run)(void *arg), void *arg)
{
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, run, arg), 0);
	return thread;
}

void join_thread(pthread_t thread)
{
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

static void *zap_until_stopped(void *arg)
{
	struct zapper *zapper = arg;

	while (!__atomic_load_n(&zapper->stop, __ATOMIC_ACQUIRE))
		zap(zapper->start, zapper->pages);
	return NULL;
}

void start_zapper(struct zapper *zapper, char *start, size_t pages)
{
	*zapper = (struct zapper){ .start = start, .pages = pages };
	zapper->thread = start_thread(zap_until_stopped, zapper);
}

void stop_zapper(struct zapper *zapper)
{
	__atomic_store_n(&zapper->stop, true, __ATOMIC_RELEASE);
	join_thread(zapper->thread);
}

void wait_until_in_syscall(pid_t tid, long number)
{
	char path[64], text[128];

	/* Also of another process. */
	snprintf(path, sizeof(path), "/proc/%d/syscall", tid);
	for (;;) {
		int fd = open(path, O_RDONLY);
		ssize_t length;

		CHECK(fd >= 0);
		length = read(fd, text, sizeof(text) - 1);
		CHECK(length > 0);
		close(fd);
		text[length] = '\0';
		/* "running", or the number of the call that it sleeps in. */
		if (*text != 'r' && strtol(text, NULL, 10) == number)
			return;
		usleep(1000);
	}
}

struct peer start_peer(void (*run)(int socket, void *arg), void *arg)
{
	struct peer peer;
	int sockets[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets),
		 0);
	peer.pid = fork();
	CHECK(peer.pid >= 0);
	if (peer.pid == 0) {
		close(sockets[0]);
		run(sockets[1], arg);
		_exit(0);
	}
	close(sockets[1]);
	peer.socket = sockets[0];
	return peer;
}

void join_peer(struct peer *peer)
{
	int status;

	CHECK_EQ(waitpid(peer->pid, &status, 0), peer->pid);
	CHECK_EQ(status, 0);
	close(peer->socket);
}

void send_word(int socket, u64 word)
{
	CHECK_EQ(send(socket, &word, sizeof(word), MSG_NOSIGNAL), sizeof(word));
}

u64 receive_word(int socket)
{
	u64 word;

	CHECK_EQ(recv(socket, &word, sizeof(word), 0), sizeof(word));
	return word;
}

void send_fd(int socket, int fd)
{
	char control[CMSG_SPACE(sizeof(fd))]
		__aligned(sizeof(size_t)) = "";
	char byte = 0;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = {
		.msg_iov	= &iov,
		.msg_iovlen	= 1,
		.msg_control	= control,
		.msg_controllen	= sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	CHECK_EQ(sendmsg(socket, &message, MSG_NOSIGNAL), 1);
}

int receive_fd(int socket)
{
	char control[CMSG_SPACE(sizeof(int))]
		__aligned(sizeof(size_t));
	char byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = {
		.msg_iov	= &iov,
		.msg_iovlen	= 1,
		.msg_control	= control,
		.msg_controllen	= sizeof(control),
	};
	struct cmsghdr *header;
	int fd;

	CHECK_EQ(recvmsg(socket, &message, MSG_CMSG_CLOEXEC), 1);
	header = CMSG_FIRSTHDR(&message);
	CHECK(header && header->cmsg_type == SCM_RIGHTS);
	memcpy(&fd, CMSG_DATA(header), sizeof(fd));
	return fd;
}
