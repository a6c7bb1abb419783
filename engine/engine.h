/* SPDX-License-Identifier: MIT */
/*
 * The embedded engine: /dev/ummunotify in user space, on userfaultfd(2).
 *
 * There is one engine in a process; it runs while a notifier is open.  Functions
 * return a negative errno on failure.  All of them may be called by any thread,
 * but not by signal handlers.  They may wait for each other, never for anybody
 * who changes mappings: it does not matter what locks their callers hold.  A thread
 * must not be cancelled in here: it could hold the lock.
 *
 * engine.c says how it works and why it cannot hang the threads that it watches.
 */
#ifndef AIOUMMU_ENGINE_H
#define AIOUMMU_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The most regions that one notifier may have, as the driver's default. */
#define AIOUMMU_MAX_REGIONS	(1u << 20)

/**
 * struct aioummu_support - what this machine offers
 * @error:	0 if the engine can run, else a negative errno: -ENOSYS without
 *		userfaultfd, -EPERM if this process may not use it, -EOPNOTSUPP
 *		if it lacks what is needed (Linux 5.19 has it), -ENOENT
 *		without /proc, or what opening gave
 * @through_device:	the system call is refused, /dev/userfaultfd is not
 * @files:	memory of files can be watched as well (Linux 6.7)
 * @features:	the kernel's UFFD_FEATURE_ flags
 */
struct aioummu_support {
	int		error;
	int		through_device;
	int		files;
	uint64_t	features;
};

void aioummu_probe(struct aioummu_support *support);

/**
 * struct aioummu_refusal - the mapping that could not be watched
 * @start:	its first byte
 * @end:	the first byte behind it
 */
struct aioummu_refusal {
	uint64_t	start;
	uint64_t	end;
};

/*
 * A number that rises whenever the engine may have learnt of a change, before the
 * thread that made it goes on.  While it stays what it was before a call of
 * aioummu_generation(), so does that generation.  The page stays mapped for ever,
 * and reads 0 in forked children.
 */
const uint64_t *aioummu_activity(void);

/*
 * Returns the number of a new notifier, greater than 0, and both ends of a pipe:
 * the first is readable while there are records.  They are for polling only, and
 * for closing in forked children.
 */
int aioummu_open(int doorbell[2]);

/*
 * Watches a range: -EEXIST if the cookie is in use, -ENOSPC beyond the limit,
 * -EFAULT if nothing is mapped there, -EBUSY if another userfaultfd owns it,
 * -EPERM or -EINVAL if the mapping is of a kind that the kernel does not watch,
 * -EAGAIN if it kept changing.  From -EFAULT on, @refusal says where.
 *
 * @wanted is a mask of UMMUNOTIFY_EVENT_CAUSE_ bits out of those of
 * UMMUNOTIFY_REGION_CAUSE_MASK (-ERANGE if there are others): what else is done to
 * the region is not reported, and does not raise the generation by itself.  MOVE and
 * UNMAP mean each other; 0 means all.  Whatever it asks for, a region is spent once
 * a part of it was unmapped or moved; who did not ask for that has to ask whether
 * it is.  With @once, the read that takes its report unregisters it.
 */
int aioummu_register(int notifier, uint64_t start, uint64_t end,
		     uint64_t cookie, uint32_t wanted, bool once,
		     struct aioummu_refusal *refusal);

/* -ENOENT if the cookie names no region. */
int aioummu_unregister(int notifier, uint64_t cookie);

/* Whether a part of the region was unmapped or moved: 1, 0 or -ENOENT. */
int aioummu_spent(int notifier, uint64_t cookie);

/* Watches what is mapped there now, if the region is spent.  As register. */
int aioummu_rearm(int notifier, uint64_t cookie,
		  struct aioummu_refusal *refusal);

/*
 * What has been done to a region: UMMUNOTIFY_STATE_BUSY, and above it a number that
 * rises with every change that the region asks for, and when it becomes spent; it
 * never falls, and begins with 0.  Includes every change whose call has returned.
 * A state that is not busy, was taken before the memory was looked at, and is still
 * the same, says that nothing of that was done in between.
 *
 * Busy: pages of the region are being dropped (MADV_DONTNEED and its like), or
 * nobody knows whether that is over; or the region is spent, so that nobody watches.
 * The former ends by itself, but is only noticed here, and moves no activity word:
 * a busy region asks the kernel what the other threads do, as often as that takes
 * no more than a tenth of the time.  It goes on for ever while a thread cannot be
 * looked at, or is a worker of the kernel (io_uring).
 */
int aioummu_state(int notifier, uint64_t cookie, uint64_t *state);

/*
 * Fills a buffer with struct ummunotify_event, as read() of the driver does.
 * Returns the number of bytes; 0 if there is nothing to report.
 */
ssize_t aioummu_read(int notifier, void *buffer, size_t size);

/* The number of invalidations of any of its regions; returned in @generation. */
int aioummu_generation(int notifier, uint64_t *generation);

/*
 * Returns when every change that is under way now has been counted, or -ETIMEDOUT
 * if others changed something without a pause for 50 milliseconds.
 */
int aioummu_fence(void);

/*
 * Sends the records of this notifier through a connected SOCK_SEQPACKET socket of
 * the AF_UNIX family from now on, so that another process can read them, as packets
 * of up to 64 whole records.  A thread of its own does so, and nobody else ever
 * waits for the reader: while that one is slow, reports coalesce.  It ends with the
 * notifier or the connection.  It has a duplicate of the socket; the caller may go
 * on using his, or close it.  Do not read the notifier meanwhile.  -EPROTOTYPE if
 * it is another socket, -EBUSY if there is such a thread.  What was sent to a reader
 * that is gone is lost; what was not is kept for the next one.
 */
int aioummu_forward(int notifier, int socket);

/*
 * Sends what there is to be sent, as far as the reader has left room, from the
 * calling thread: before a region is unregistered or the notifier closed, so that
 * their reports are not dropped.  Returns 0 if everything was sent, -EAGAIN if there
 * was no room for some of it, or another negative errno if there is nobody to send
 * to.
 */
int aioummu_flush(int notifier);

/* Returns a duplicate of the notifier's doorbell. */
int aioummu_doorbell(int notifier);

/* Also harmless for a number that is closed already. */
void aioummu_close(int notifier);

#endif
