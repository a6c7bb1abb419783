// SPDX-License-Identifier: MIT
/* What the hang tests cannot do in Python, or not without its interpreter. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------ a userfaultfd, plainly --- */

/* A descriptor that reports changes of what is registered, or a negative errno. */
int open_userfaultfd(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |
			    UFFD_FEATURE_EVENT_REMOVE,
	};
	int fd;

	/* It can be polled only if it does not block. */
	fd = (int)syscall(SYS_userfaultfd,
			  O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		return -errno;
	return fd;
}

int watch(int fd, void *start, size_t size)
{
	struct uffdio_register argument = {
		.range = { .start = (unsigned long)start, .len = size },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};

	return ioctl(fd, UFFDIO_REGISTER, &argument) ? -errno : 0;
}

/* -------------------------------------------------- a handler that unmaps --- */

static struct {
	char		*remapped;
	char		*dropped;
	size_t		size;
	struct itimerval delay;
	atomic_ulong	left;
	atomic_ulong	done;
} handler;

/* All of these are plain system calls. */
static void change_memory(int signum)
{
	int before = errno;

	(void)signum;
	munmap(handler.remapped, handler.size);
	mmap(handler.remapped, handler.size, PROT_READ | PROT_WRITE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	madvise(handler.dropped, handler.size, MADV_DONTNEED);
	atomic_fetch_add(&handler.done, 1);
	/* From here, so that what is interrupted gets on in between. */
	if (atomic_fetch_sub(&handler.left, 1) > 1)
		setitimer(ITIMER_REAL, &handler.delay, NULL);
	errno = before;
}

/*
 * Has SIGALRM, so many times, unmap and map again one block of memory, and drop
 * the pages of another.  A timer sends it, unless @microseconds is 0; any thread
 * that does not block it may get it then.
 */
int change_memory_on_signals(char *remapped, char *dropped, size_t size,
			     unsigned long times, long microseconds)
{
	struct sigaction action = {
		.sa_handler = change_memory,
		.sa_flags = SA_RESTART,
	};

	handler.remapped = remapped;
	handler.dropped = dropped;
	handler.size = size;
	handler.delay.it_value.tv_usec = microseconds;
	atomic_store(&handler.left, times);
	atomic_store(&handler.done, 0);
	if (sigaction(SIGALRM, &action, NULL) ||
	    setitimer(ITIMER_REAL, &handler.delay, NULL))
		return -errno;
	return 0;
}

unsigned long signals_left(void)
{
	return atomic_load(&handler.left);
}

unsigned long signals_handled(void)
{
	return atomic_load(&handler.done);
}

/* ---------------------------------------------------------------- changes --- */

/* Returns how many times the pages were dropped. */
unsigned long drop_pages(char *start, size_t size, unsigned long times)
{
	unsigned long done = 0;

	for (unsigned long i = 0; i < times; i++)
		done += !madvise(start, size, MADV_DONTNEED);
	return done;
}

/* -------------------------------------------------------------- processes --- */

/* As fork(), but without the handlers of pthread_atfork() and of Python. */
pid_t fork_behind_the_back(void)
{
#ifdef __s390__
	return (pid_t)syscall(SYS_clone, 0L, (long)SIGCHLD, 0L, 0L, 0L);
#else
	return (pid_t)syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L);
#endif
}

static atomic_bool child_is_there, child_may_go_on;

/*
 * The child shares the memory, and stays until it is told to become another
 * program; the caller sleeps until then.  Returns the program's status.
 */
int vfork_and_wait(const char *program)
{
	const struct timespec delay = { .tv_nsec = 1000000 };
	int status;
	pid_t child;

	child = vfork();
	if (!child) {
		atomic_store(&child_is_there, true);
		while (!atomic_load(&child_may_go_on))
			nanosleep(&delay, NULL);
		execl(program, program, (char *)NULL);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) < 0)
		return -errno;
	return status;
}

bool is_vforked_child_there(void)
{
	return atomic_load(&child_is_there);
}

void let_vforked_child_go_on(void)
{
	atomic_store(&child_may_go_on, true);
}
