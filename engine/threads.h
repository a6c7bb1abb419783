/* SPDX-License-Identifier: MIT */
/*
 * Which threads of this process have been out of madvise() since a moment.
 *
 * Each thread needs to be seen outside only once: a madvise() that was under way at
 * that moment is over when every thread has been.  There are two proofs.  A thread
 * that sleeps says in /proc in which system call; and the time that it has spent in
 * user mode rises only while it is there.  Threads that are created later are none
 * of those, and those that have ended are out.
 *
 * Not known to be outside: who sleeps in a call that may do it (process_madvise(),
 * io_uring_enter()) or in which somebody else may act with this memory (vfork() and
 * its like); the kernel's workers, which io_uring has do it; whoever cannot be
 * looked at.  Allocates nothing.
 */
#ifndef AIOUMMU_THREADS_H
#define AIOUMMU_THREADS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "descriptor.h"

/* With more threads, nothing is known. */
#define THREADS_LIMIT	2048

/**
 * struct thread_seen - a thread that was not seen outside yet
 * @tid:	its number
 * @user_time:	nanoseconds in user mode at the first look; 0: unknown
 */
struct thread_seen {
	pid_t		tid;
	uint64_t	user_time;
};

/**
 * struct threads - where to look, and whom to wait for
 * @directory:	/proc/self/task
 * @same_numbers:	threads have the numbers there that gettid() gives
 * @count:	of @left
 * @left:	threads that were not seen outside yet
 */
struct threads {
	struct descriptor	directory;
	bool			same_numbers;
	unsigned int		count;
	struct thread_seen	left[THREADS_LIMIT];
};

/* Returns 0 or a negative errno. */
int threads_open(struct threads *threads);
void threads_close(struct threads *threads);

/*
 * Notes all threads but @innocent (0: none), which never is in madvise().  Returns
 * false if that cannot be done now; nothing is noted then.
 */
bool threads_list(struct threads *threads, pid_t innocent);

/* Whether all that were noted have been seen outside since then. */
bool threads_were_outside(struct threads *threads);

#endif
