// SPDX-License-Identifier: MIT
/*
 * Threads that map, register, unmap and unregister, and forks in between, on one
 * tracker: for the sanitizers, and for daemons that are slow, stopped or killed.
 *
 *	stress SOCKET THREADS ROUNDS
 *
 * Prints the longest time that a call took, and what is left to say.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "memtrack.h"

#define KEPT	32
#define SIZE	(4 * 4096)

static struct memtrack *tracker;
static _Atomic int64_t longest;
static long rounds;

static void fail(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(1);
}

static int64_t nanoseconds(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void took(int64_t begun)
{
	int64_t time = nanoseconds() - begun, before = atomic_load(&longest);

	while (time > before && !atomic_compare_exchange_weak(&longest, &before, time))
		;
}

static int64_t track(char *start)
{
	int64_t begun = nanoseconds(), cookie;

	cookie = memtrack_register(tracker, start, start + SIZE, "a \"buffer\"");
	took(begun);
	if (cookie <= 0)
		fail("memtrack_register", -cookie);
	return cookie;
}

static void untrack(int64_t cookie)
{
	int64_t begun = nanoseconds();
	int error;

	error = memtrack_unregister(tracker, cookie);
	took(begun);
	if (error)
		fail("memtrack_unregister", -error);
}

static void *churn(void *seed)
{
	int64_t cookies[KEPT] = { 0 };
	char *starts[KEPT] = { NULL };
	unsigned int random = (uintptr_t)seed;
	long i;
	int at;

	for (i = 0; i < rounds; i++) {
		at = rand_r(&random) % KEPT;
		if (starts[at]) {
			munmap(starts[at], SIZE);
			untrack(cookies[at]);
		}
		starts[at] = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (starts[at] == MAP_FAILED)
			fail("mmap", errno);
		*starts[at] = 1;
		cookies[at] = track(starts[at]);
	}
	for (at = 0; at < KEPT; at++)
		if (starts[at])
			untrack(cookies[at]);
	return NULL;
}

/* Its copy of the tracker is of no use, but of no harm either. */
static void in_child(void)
{
	char page;
	int64_t cookie = memtrack_register(tracker, &page, &page + 1, "child");

	memtrack_unregister(tracker, cookie);
	if (cookie || memtrack_attached(tracker, NULL, 0))
		_exit(1);
	memtrack_detach(tracker);
	_exit(0);
}

static void fork_once(void)
{
	pid_t child = fork();
	int status;

	if (!child)
		in_child();
	if (child < 0 || waitpid(child, &status, 0) < 0)
		fail("fork", errno);
	if (status)
		fail("the child", EPROTO);
}

/* Gives the daemon two seconds to read it all. */
static size_t flush(void)
{
	int64_t deadline = nanoseconds() + 2000000000ll;
	size_t left;

	while ((left = memtrack_flush(tracker)) && nanoseconds() < deadline)
		usleep(1000);
	return left;
}

int main(int argc, char **argv)
{
	char error[MEMTRACK_ERROR_SIZE];
	pthread_t threads[64];
	long i, count;
	size_t left;

	if (argc != 4)
		return 2;
	count = atol(argv[2]);
	rounds = atol(argv[3]);
	tracker = memtrack_attach(argv[1], "stress", error, sizeof(error));
	if (!tracker) {
		fprintf(stderr, "%s\n", error);
		return 1;
	}
	printf("attached\n");
	fflush(stdout);
	for (i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, churn, (void *)(i + 1)))
			return 1;
	for (i = 0; i < 20; i++) {
		fork_once();
		usleep(1000);
	}
	for (i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	left = flush();
	printf("longest=%.3f ms left=%zu attached=%d\n", longest / 1e6, left,
	       memtrack_attached(tracker, NULL, 0));
	memtrack_detach(tracker);
	return 0;
}
