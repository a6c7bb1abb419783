// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "threads.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Links of a directory without any in it; each thread is one more. */
#define OWN_LINKS	2
/* Listings that threads which end meanwhile may spoil. */
#define ATTEMPTS	5

/* Not in the headers of older systems; the same everywhere. */
#ifndef SYS_io_uring_enter
#define SYS_io_uring_enter	426
#endif
#ifndef SYS_clone3
#define SYS_clone3		435
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise	440
#endif

/* Those that may be madvise(), or let somebody else use this memory meanwhile. */
static const long suspects[] = {
	SYS_madvise,
	SYS_process_madvise,
	SYS_io_uring_enter,
	SYS_clone,
	SYS_clone3,
#ifdef SYS_vfork
	SYS_vfork,
#endif
#ifdef __x86_64__
	/* madvise(), vfork() and clone() by int $0x80, whose numbers these are. */
	219, 190, 120,
#endif
};

enum whereabouts {
	GONE,
	OUTSIDE,
	/* It is there. */
	UNKNOWN,
	/* Perhaps not even that. */
	UNREADABLE,
};

/* What a file about a thread says; the length, or a negative errno. */
static ssize_t read_about(const struct threads *threads, pid_t tid,
			  const char *what, char *text, size_t size)
{
	char path[40];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "%d/%s", (int)tid, what);
	fd = openat(threads->directory.fd, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	do
		length = read(fd, text, size - 1);
	while (length < 0 && errno == EINTR);
	if (length < 0)
		length = -errno;
	close(fd);
	text[length < 0 ? 0 : length] = 0;
	return length;
}

/* Only the first thread of a process stays there when it has ended. */
static bool has_ended(const struct threads *threads, pid_t tid)
{
	const char *behind_name;
	char text[512];

	if (read_about(threads, tid, "stat", text, sizeof(text)) <= 0)
		return false;
	behind_name = strrchr(text, ')');
	return behind_name && (!strncmp(behind_name, ") Z", 3) ||
			       !strncmp(behind_name, ") X", 3));
}

static bool is_suspect(long call)
{
#ifdef __x86_64__
	/* The x32 ABI's have this bit. */
	if (call & 0x40000000)
		return true;
#endif
	for (size_t i = 0; i < sizeof(suspects) / sizeof(suspects[0]); i++)
		if (call == suspects[i])
			return true;
	return false;
}

/*
 * "running", "-1 SP PC" if it sleeps in no call (but in a page fault), or the number
 * of the call, six arguments, SP and PC.
 */
static enum whereabouts sleeps_where(const struct threads *threads, pid_t tid)
{
	char text[256], *behind;
	ssize_t length;
	uint64_t pc;
	long call;

	length = read_about(threads, tid, "syscall", text, sizeof(text));
	if (length == -ENOENT || length == -ESRCH)
		return GONE;
	if (length == -EACCES || length == -EPERM)
		return UNKNOWN;
	if (length <= 0)
		return UNREADABLE;
	call = strtol(text, &behind, 10);
	if (behind == text)
		return UNKNOWN;
	pc = strtoull(strrchr(text, ' '), NULL, 16);
	/* It was never in user mode: a worker of the kernel. */
	if (!pc)
		return call == -1 && has_ended(threads, tid) ? OUTSIDE : UNKNOWN;
	return is_suspect(call) ? UNKNOWN : OUTSIDE;
}

/*
 * Nanoseconds that the thread has spent in user mode, 0 if that is unknown.  Not
 * the scaled number that /proc has: this one is raised by a tick that finds the
 * thread in user mode, or measured at its borders, and by nothing else.  That is so
 * on these machines; others may be late with it.
 */
static uint64_t user_time(const struct threads *threads, pid_t tid)
{
#if defined(__x86_64__) || defined(__i386__) || defined(__aarch64__)
	/* CPUCLOCK_VIRT of one thread. */
	const clockid_t clock = (clockid_t)(~(unsigned int)tid << 3 | 4 | 1);
	struct timespec time;

	if (threads->same_numbers && !clock_gettime(clock, &time))
		return time.tv_sec * UINT64_C(1000000000) + time.tv_nsec;
#else
	(void)threads;
	(void)tid;
#endif
	return 0;
}

static bool has_same_numbers(void)
{
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	char text[4096], *numbers;
	ssize_t length;

	if (fd < 0)
		return false;
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[length < 0 ? 0 : length] = 0;
	/* One for each PID namespace from that of /proc to its own. */
	numbers = strstr(text, "\nNSpid:\t");
	if (!numbers)
		return false;
	strtol(numbers + strlen("\nNSpid:\t"), &numbers, 10);
	return *numbers == '\n';
}

int threads_open(struct threads *threads)
{
	int fd = open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	threads->count = 0;
	threads->directory.fd = -1;
	if (fd < 0)
		return -errno;
	own(&threads->directory, fd);
	threads->same_numbers = has_same_numbers();
	return 0;
}

void threads_close(struct threads *threads)
{
	close_owned(&threads->directory);
	threads->count = 0;
}

static int count_threads(const struct threads *threads)
{
	struct stat status;

	if (fstat(threads->directory.fd, &status))
		return -1;
	return (int)status.st_nlink - OWN_LINKS;
}

/* Those that end while this goes on can make the kernel skip others. */
static bool list_once(struct threads *threads)
{
	char buffer[8192] __attribute__((aligned(8)));
	long length, at;

	threads->count = 0;
	if (lseek(threads->directory.fd, 0, SEEK_SET))
		return false;
	for (;;) {
		length = syscall(SYS_getdents64, threads->directory.fd, buffer,
				 sizeof(buffer));
		if (length <= 0)
			return !length;
		for (at = 0; at < length; ) {
			const struct dirent64 *entry = (void *)(buffer + at);

			at += entry->d_reclen;
			if (entry->d_name[0] == '.')
				continue;
			if (threads->count == THREADS_LIMIT)
				return false;
			threads->left[threads->count++] = (struct thread_seen) {
				.tid = atoi(entry->d_name),
			};
		}
	}
}

/*
 * Takes away those that have ended or are outside; returns how many are there, be
 * it outside or not.
 */
static unsigned int look(struct threads *threads, pid_t innocent)
{
	unsigned int left = 0, alive = 0;

	for (unsigned int i = 0; i < threads->count; i++) {
		struct thread_seen thread = threads->left[i];
		enum whereabouts where = sleeps_where(threads, thread.tid);
		uint64_t time;

		if (where == GONE)
			continue;
		alive += where != UNREADABLE;
		if (where == OUTSIDE ||
		    (threads->same_numbers && thread.tid == innocent))
			continue;
		time = user_time(threads, thread.tid);
		if (thread.user_time && time > thread.user_time)
			continue;
		if (!thread.user_time)
			thread.user_time = time;
		threads->left[left++] = thread;
	}
	threads->count = left;
	return alive;
}

bool threads_list(struct threads *threads, pid_t innocent)
{
	for (unsigned int i = 0; i < ATTEMPTS; i++) {
		int there;

		if (!is_owned(&threads->directory) || !list_once(threads))
			break;
		there = count_threads(threads);
		/*
		 * So many were there, and so many that were listed before are
		 * there afterwards: these are all of those.
		 */
		if ((int)look(threads, innocent) == there)
			return true;
	}
	threads->count = 0;
	return false;
}

bool threads_were_outside(struct threads *threads)
{
	if (threads->count && is_owned(&threads->directory))
		look(threads, 0);
	return !threads->count;
}
