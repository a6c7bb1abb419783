// SPDX-License-Identifier: GPL-2.0
/*
 * io_uring: a read that finds nothing waits without a worker thread, and completes
 * with the report.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/io_uring.h>

#include "device.h"

struct ring {
	int			fd;
	struct io_uring_params	parms;
	char			*rings;
	struct io_uring_sqe	*sqes;
};

static u32 *ring_word(struct ring *ring, u32 offset)
{
	return (u32 *)(ring->rings + offset);
}

static void open_ring(struct ring *ring)
{
	memset(ring, 0, sizeof(*ring));
	ring->fd = syscall(SYS_io_uring_setup, 8, &ring->parms);
	if (ring->fd < 0)
		skip("no io_uring: %s", strerror(errno));
	CHECK(ring->parms.features & IORING_FEAT_SINGLE_MMAP);
	/* Both rings are in it, and more than enough is mapped. */
	ring->rings = mmap(NULL, page_size(), PROT_READ | PROT_WRITE,
			   MAP_SHARED, ring->fd, IORING_OFF_SQ_RING);
	CHECK(ring->rings != MAP_FAILED);
	ring->sqes = mmap(NULL, page_size(), PROT_READ | PROT_WRITE, MAP_SHARED,
			  ring->fd, IORING_OFF_SQES);
	CHECK(ring->sqes != MAP_FAILED);
}

static void submit_read(struct ring *ring, int fd,
			struct ummunotify_event *events, size_t room)
{
	u32 *tail = ring_word(ring, ring->parms.sq_off.tail);
	u32 index = *tail & *ring_word(ring, ring->parms.sq_off.ring_mask);

	ring->sqes[index] = (struct io_uring_sqe) {
		.opcode		= IORING_OP_READ,
		.fd		= fd,
		.off		= -1,
		.addr		= address(events),
		.len		= room * sizeof(*events),
		.user_data	= address(events),
	};
	ring_word(ring, ring->parms.sq_off.array)[index] = index;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	CHECK_EQ(syscall(SYS_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0), 1);
}

static bool has_completed(struct ring *ring)
{
	return __atomic_load_n(ring_word(ring, ring->parms.cq_off.tail),
			       __ATOMIC_ACQUIRE) !=
	       *ring_word(ring, ring->parms.cq_off.head);
}

static long wait_for_result(struct ring *ring,
			    const struct ummunotify_event *events)
{
	u32 *head = ring_word(ring, ring->parms.cq_off.head);
	struct io_uring_cqe *cqes, *cqe;

	while (!has_completed(ring))
		CHECK(syscall(SYS_io_uring_enter, ring->fd, 0, 1,
			      IORING_ENTER_GETEVENTS, NULL, 0) >= 0 ||
		      errno == EINTR);
	cqes = (struct io_uring_cqe *)(ring->rings + ring->parms.cq_off.cqes);
	cqe = &cqes[*head & *ring_word(ring, ring->parms.cq_off.ring_mask)];
	CHECK_EQ(cqe->user_data, address(events));
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return cqe->res;
}

/* Threads of io_uring belong to the process, but for those of old kernels. */
static unsigned int count_threads(void)
{
	unsigned int count = 0;
	DIR *tasks = opendir("/proc/self/task");

	CHECK(tasks);
	while (readdir(tasks))
		count++;
	closedir(tasks);
	return count;
}

static void a_read_by_io_uring_waits_without_a_thread(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[4];
	char *page = map_pages(1);
	unsigned int threads;
	struct ring ring;

	open_ring(&ring);
	register_region(&device, page, page_size(), 1);
	threads = count_threads();
	for (u64 round = 1; round <= 3; round++) {
		submit_read(&ring, device.fd, events, ARRAY_SIZE(events));
		CHECK(!has_completed(&ring));
		CHECK_EQ(count_threads(), threads);
		zap(page, 1);
		CHECK_EQ(wait_for_result(&ring, events), 2 * sizeof(events[0]));
		CHECK_EQ(count_threads(), threads);
		check_inval(&events[0], 1, page, page_size(), HINT);
		check_last(&events[1], round);
	}
}

static void a_read_by_io_uring_completes_at_once(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event events[4];
	char *page = map_pages(1);
	struct ring ring;

	open_ring(&ring);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	submit_read(&ring, device.fd, events, ARRAY_SIZE(events));
	CHECK(has_completed(&ring));
	CHECK_EQ(wait_for_result(&ring, events), 2 * sizeof(events[0]));
	check_inval(&events[0], 1, page, page_size(), HINT);
	check_last(&events[1], 1);
}

static void what_io_uring_cannot_do_is_an_error(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_event *nowhere, event[2];
	char *page = map_pages(1);
	struct ring ring;

	open_ring(&ring);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	submit_read(&ring, device.fd, event, 0);
	CHECK_EQ(wait_for_result(&ring, event), -EINVAL);
	nowhere = (void *)map_untouched(1, PROT_NONE,
					MAP_PRIVATE | MAP_ANONYMOUS, -1);
	submit_read(&ring, device.fd, nowhere, 2);
	CHECK_EQ(wait_for_result(&ring, nowhere), -EFAULT);
	/* Neither has taken anything. */
	CHECK_EQ(read_records(device.fd, event, 2), 2);
	check_inval(&event[0], 1, page, page_size(), HINT);
	check_last(&event[1], 1);
}

static const struct test tests[] = {
	TEST(a_read_by_io_uring_waits_without_a_thread),
	TEST(a_read_by_io_uring_completes_at_once),
	TEST(what_io_uring_cannot_do_is_an_error),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
