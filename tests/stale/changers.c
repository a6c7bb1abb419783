// SPDX-License-Identifier: MIT
/*
 * Threads that change what lies behind addresses, without the interpreter.
 *
 * The arena is a row of slots, each of a few pages. A changer takes a slot, makes its
 * sequence number odd, replaces some or all of its pages, and makes the number even
 * again. So whoever reads the same even number before and after it has looked at a slot
 * knows that nothing was done to it in between, and nothing was under way. All
 * changers stop between two changes while somebody holds them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_SLOTS	256
#define MAX_THREADS	8
#define MAX_PAGES	64

#define PRIVATE		(MAP_PRIVATE | MAP_ANONYMOUS)

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

struct slot {
	_Atomic uint64_t sequence;
	pthread_mutex_t lock;
};

struct thread {
	pthread_t handle;
	char *spare;
	uint64_t random;
};

static struct {
	char *start;
	size_t page_size;
	size_t slot_size;
	unsigned int slots;
	/* From this slot on, they are pages of the file. */
	unsigned int first_shared;
	int file;
	unsigned int pause_us;
	unsigned int threads;
	struct slot slot[MAX_SLOTS];
	struct thread thread[MAX_THREADS];
	pthread_rwlock_t hold;
	atomic_bool stop;
	atomic_ulong changes;
} arena;

/* A changer that fails leaves a hole in the arena: no test can go on. */
static void die(const char *what)
{
	perror(what);
	abort();
}

static unsigned int choose(struct thread *thread, unsigned int below)
{
	/* xorshift64 */
	thread->random ^= thread->random << 13;
	thread->random ^= thread->random >> 7;
	thread->random ^= thread->random << 17;
	return (thread->random >> 16) % below;
}

static char *address(unsigned int slot)
{
	return arena.start + slot * arena.slot_size;
}

static void map(unsigned int slot)
{
	const int protection = PROT_READ | PROT_WRITE;
	void *result;

	if (slot < arena.first_shared)
		result = mmap(address(slot), arena.slot_size, protection,
			      PRIVATE | MAP_FIXED, -1, 0);
	else
		result = mmap(address(slot), arena.slot_size, protection,
			      MAP_SHARED | MAP_FIXED, arena.file,
			      slot * arena.slot_size);
	if (result == MAP_FAILED)
		die("mmap");
}

static void unmap_and_map(struct thread *thread, unsigned int slot)
{
	if (munmap(address(slot), arena.slot_size))
		die("munmap");
	if (choose(thread, 2))
		sched_yield();
	map(slot);
}

static void drop(struct thread *thread, unsigned int slot)
{
	const size_t pages = arena.slot_size / arena.page_size;
	const size_t first = choose(thread, pages);
	const size_t count = 1 + choose(thread, pages - first);

	if (madvise(address(slot) + first * arena.page_size, count * arena.page_size,
		    slot < arena.first_shared ? MADV_DONTNEED : MADV_REMOVE))
		die("madvise");
}

static void move(char *from, char *to, int flags)
{
	unsigned int tries = 1000;

	/* The embedded backend may be about to register a part of it: EFAULT. */
	while (mremap(from, arena.slot_size, arena.slot_size,
		      MREMAP_MAYMOVE | MREMAP_FIXED | flags, to) == MAP_FAILED)
		if (errno != EFAULT || !--tries)
			die("mremap");
}

static void move_away(struct thread *thread, unsigned int slot)
{
	if (choose(thread, 2)) {
		move(address(slot), thread->spare, 0);
		map(slot);
	} else {
		/* The address stays mapped, without the pages. */
		move(address(slot), thread->spare, MREMAP_DONTUNMAP);
	}
}

static void swap(struct thread *thread, unsigned int slot, unsigned int other)
{
	move(address(slot), thread->spare, 0);
	move(address(other), address(slot), 0);
	move(thread->spare, address(other), 0);
}

static void begin(unsigned int slot)
{
	pthread_mutex_lock(&arena.slot[slot].lock);
	arena.slot[slot].sequence++;
}

static void end(unsigned int slot)
{
	arena.slot[slot].sequence++;
	pthread_mutex_unlock(&arena.slot[slot].lock);
	arena.changes++;
}

static void change_two(struct thread *thread, unsigned int slot, unsigned int other)
{
	begin(slot < other ? slot : other);
	begin(slot < other ? other : slot);
	swap(thread, slot, other);
	end(slot);
	end(other);
}

static void change(struct thread *thread)
{
	const unsigned int slot = choose(thread, arena.slots);
	const unsigned int other = choose(thread, arena.first_shared);
	const int is_shared = slot >= arena.first_shared;
	const unsigned int how = choose(thread, is_shared ? 3 : 5);

	if (how == 4 && slot != other) {
		change_two(thread, slot, other);
		return;
	}
	begin(slot);
	switch (how) {
	case 0:
		unmap_and_map(thread, slot);
		break;
	case 1:
		map(slot);
		break;
	case 3:
		move_away(thread, slot);
		break;
	default:
		drop(thread, slot);
	}
	/* Otherwise it is whoever reads or pins them who brings the new pages. */
	if (choose(thread, 2))
		memset(address(slot), 1, arena.slot_size);
	end(slot);
}

static void *run(void *argument)
{
	struct thread *thread = argument;

	while (!arena.stop) {
		struct timespec pause = {
			.tv_nsec = 1000L * choose(thread, arena.pause_us + 1),
		};

		pthread_rwlock_rdlock(&arena.hold);
		change(thread);
		pthread_rwlock_unlock(&arena.hold);
		nanosleep(&pause, NULL);
	}
	return NULL;
}

/* Map the arena; the spare places of the threads lie behind it. */
int changers_map(uintptr_t start, size_t slot_size, unsigned int slots,
		 unsigned int shared, unsigned int threads)
{
	pthread_rwlockattr_t attributes;
	unsigned int i;

	if (slots > MAX_SLOTS || threads > MAX_THREADS || shared >= slots)
		return -EINVAL;
	arena.start = (char *)start;
	arena.page_size = sysconf(_SC_PAGESIZE);
	arena.slot_size = slot_size;
	arena.slots = slots;
	arena.first_shared = slots - shared;
	arena.threads = threads;
	arena.stop = 0;
	arena.changes = 0;
	arena.file = memfd_create("changers", MFD_CLOEXEC);
	if (arena.file < 0 || ftruncate(arena.file, slots * slot_size))
		return -errno;
	/* Two pages more than all: nothing is merged with a neighbour of ours. */
	if (mmap(arena.start, (slots + threads + 2) * slot_size, PROT_NONE,
		 PRIVATE | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) != arena.start)
		return -EEXIST;
	/* Readers come all the time: they must not keep out who wants to hold them. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes,
				      PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&arena.hold, &attributes);
	for (i = 0; i < slots; i++) {
		arena.slot[i].sequence = 0;
		pthread_mutex_init(&arena.slot[i].lock, NULL);
		map(i);
	}
	return 0;
}

int changers_start(uint64_t seed, unsigned int pause_us)
{
	unsigned int i;

	arena.pause_us = pause_us;
	for (i = 0; i < arena.threads; i++) {
		struct thread *thread = &arena.thread[i];

		thread->spare = address(arena.slots + 1 + i);
		thread->random = (seed + i + 1) * 0x9E3779B97F4A7C15;
		if (pthread_create(&thread->handle, NULL, run, thread))
			return -EAGAIN;
	}
	return 0;
}

unsigned long changers_stop(void)
{
	unsigned int i;

	arena.stop = 1;
	for (i = 0; i < arena.threads; i++)
		pthread_join(arena.thread[i].handle, NULL);
	return arena.changes;
}

void changers_unmap(void)
{
	munmap(arena.start, (arena.slots + arena.threads + 2) * arena.slot_size);
	close(arena.file);
	pthread_rwlock_destroy(&arena.hold);
}

void changers_hold(void)
{
	pthread_rwlock_wrlock(&arena.hold);
}

void changers_go(void)
{
	pthread_rwlock_unlock(&arena.hold);
}

unsigned long changers_changes(void)
{
	return arena.changes;
}

uint64_t changers_sequence(unsigned int slot)
{
	return arena.slot[slot].sequence;
}

/* The numbers of the physical pages, 0: there is none. */
static int read_frames(int pagemap, uintptr_t start, size_t count, uint64_t *frames)
{
	const size_t size = count * sizeof(*frames);
	size_t i;

	if (pread(pagemap, frames, size, start / arena.page_size * sizeof(*frames)) !=
	    (ssize_t)size)
		return -EIO;
	for (i = 0; i < count; i++)
		frames[i] = frames[i] >> 63 ? frames[i] & ((1ULL << 55) - 1) : 0;
	return 0;
}

int frames_of(int pagemap, uintptr_t start, size_t count, uint64_t *frames)
{
	return read_frames(pagemap, start, count, frames);
}

/*
 * Register memory as an adapter does: bring its pages for writing, take a reference on
 * each, so that none is given to anybody else, and remember which they are.
 *
 * The pipe holds the references. The frames are 0 if they changed meanwhile.
 */
int pin(int pagemap, int pipe, uintptr_t start, size_t count, uint64_t *frames)
{
	uint64_t after[MAX_PAGES];
	struct iovec pages = {
		.iov_base = (void *)start,
		.iov_len = count * arena.page_size,
	};
	size_t i;

	if (count > MAX_PAGES)
		return -EINVAL;
	if (madvise(pages.iov_base, pages.iov_len, MADV_POPULATE_WRITE))
		return -errno;
	if (read_frames(pagemap, start, count, frames))
		return -EIO;
	if (vmsplice(pipe, &pages, 1, SPLICE_F_NONBLOCK) != (ssize_t)pages.iov_len)
		return errno ? -errno : -EAGAIN;
	if (read_frames(pagemap, start, count, after))
		return -EIO;
	for (i = 0; i < count; i++)
		if (frames[i] != after[i])
			frames[i] = 0;
	return 0;
}
