/* SPDX-License-Identifier: MIT */
/*
 * For programs that want to be tracked by memtrackd:
 *
 *	char error[MEMTRACK_ERROR_SIZE];
 *	struct memtrack *tracker;
 *
 *	tracker = memtrack_attach(NULL, "solver", error, sizeof(error));
 *	if (!tracker)
 *		fprintf(stderr, "not tracked: %s\n", error);
 *	cookie = memtrack_register(tracker, buffer, buffer + size, "matrix");
 *	...
 *	memtrack_unregister(tracker, cookie);
 *	memtrack_detach(tracker);
 *
 * The daemon sees nothing but what is registered here, and of that only addresses,
 * names and times, never contents.
 *
 * Nothing here waits for the daemon, but memtrack_attach() for its answer, for two
 * seconds at most.  If the daemon is slow, stopped or dead, the program goes on as
 * if it had never asked: what cannot be said now waits here, and is said with a later
 * call, also to a daemon that was started again.  Nothing waits for longer, or takes
 * more memory, than for MEMTRACK_MAX_REGIONS regions.
 *
 * Every function but memtrack_detach() may be called by any thread at any time, but
 * not by signal handlers.  Every function takes NULL for a tracker that tracks
 * nothing, so that a program need not care whether there is a daemon.
 *
 * fork(): the child has no part in it.  Its copies of the descriptors are closed
 * before fork() returns there, and its copy of a tracker tracks nothing: the child
 * may attach for itself.  What does not run the handlers of pthread_atfork(3) -
 * vfork(), posix_spawn(), _Fork(), clone() - must call exec, which closes them.
 */
#ifndef MEMTRACK_H
#define MEMTRACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Enough for any error. */
#define MEMTRACK_ERROR_SIZE	512
/* Bytes of a name, in UTF-8, without the 0 behind it. */
#define MEMTRACK_NAME_SIZE	128
/* At a time. */
#define MEMTRACK_MAX_REGIONS	65536

struct memtrack;

/*
 * Attaches to the daemon that listens at @socket; NULL: at $MEMTRACKD_SOCKET, or where
 * it does by default.  @name is what the program is called there; NULL: its own name.
 * Uses the driver /dev/ummunotify if it is there, else the embedded engine.
 *
 * Returns NULL if there is no such daemon, it does not answer, it refuses, or memory
 * cannot be watched on this machine; @error then has @size bytes of text that say so,
 * unless it is NULL.
 */
struct memtrack *memtrack_attach(const char *socket, const char *name, char *error,
				 size_t size);

/*
 * Tracks what is mapped from @start up to but without @end.  Names are UTF-8, and
 * need not be unique.
 *
 * Returns a cookie greater than 0 for memtrack_unregister(); 0 if the tracker tracks
 * nothing; or a negative errno: -EINVAL if the range or the name is empty or if the
 * name has control characters or others that are not shown, -EILSEQ if it is not
 * UTF-8, -ENAMETOOLONG, -ENOSPC beyond MEMTRACK_MAX_REGIONS, -ENOMEM, or what
 * engine.h or the driver says: -EFAULT for what is not mapped, -EBUSY if another
 * userfaultfd owns it.
 */
int64_t memtrack_register(struct memtrack *tracker, const void *start, const void *end,
			  const char *name);

/* Returns 0, also for the cookie 0; or -ENOENT if the cookie names no region. */
int memtrack_unregister(struct memtrack *tracker, int64_t cookie);

/*
 * Says what could not be said before.  Returns how many regions there are that the
 * daemon still has to be told of: 0 if it knows all.
 */
size_t memtrack_flush(struct memtrack *tracker);

/*
 * Returns whether the daemon is there, as far as is known.  If not, @error has @size
 * bytes of text that say why, unless it is NULL.
 */
bool memtrack_attached(struct memtrack *tracker, char *error, size_t size);

/* No other thread may be using it, or do so later. */
void memtrack_detach(struct memtrack *tracker);

#ifdef __cplusplus
}
#endif

#endif
