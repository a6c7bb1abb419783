// SPDX-License-Identifier: MIT
/*
 * stress [--seconds N] [--threads N] [--seed S] [--patience N]
 *
 * Threads change memory in every way that the engine sees, while others read what
 * is reported, give addresses from one to another, fork, send signals, open and
 * close notifiers; oracle.h says what is checked.  A round takes some seconds.
 * After each, everything must have been reported, and nothing be left registered.
 *
 * Exit status 1: something was missed, stale or wrong; 2: it could not go on, or
 * hung.  The seed makes the same choices, not the same schedule.
 *
 * A registration made between the report that a madvise() gives and its return is
 * never told; that its state is busy then, or changes, is checked.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "engine.h"
#include "oracle.h"
#include "smaps.h"

#define MAX_THREADS	64
#define SHARED_WATCHERS	3
#define SLOTS		6
#define SLOT_WATCHES	3
#define SLOT_UNITS	32
#define EXPECTATIONS	16
#define LEFTOVERS	16
#define NOISE_PAGES	100
#define ROUND_SECONDS	3
#define PAGE		UINT64_C(4096)
#define LARGE_UNIT	(16 * PAGE)

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED	1
#else
#define SANITIZED	0
#endif

/**
 * struct actor - a thread, for the one that looks for hangs
 * @name:	what it is
 * @doing:	what it does now
 * @steps:	how often it has begun something
 * @active:	it is running
 * @random:	the last random number
 */
struct actor {
	const char		*name;
	const char *_Atomic	doing;
	_Atomic uint64_t	steps;
	atomic_bool		active;
	uint64_t		random;
};

enum kind {
	ANONYMOUS,
	LARGE,
	SHARED,
	PRIVATE_FILE,
	KINDS,
};

/**
 * struct slot - memory of a worker
 * @base:	first byte, 0 if there is none
 * @unit:	bytes in a unit
 * @count:	units
 * @mapped:	those that are mapped, a bit each
 * @whole:	it is one mapping, or would be if the engine did not split it
 * @kind:	of what kind
 * @fd:		its file, or -1
 * @watches:	regions, or NULL
 */
struct slot {
	uint64_t	base;
	uint64_t	unit;
	unsigned int	count;
	uint64_t	mapped;
	bool		whole;
	enum kind	kind;
	int		fd;
	struct watch	*watches[SLOT_WATCHES];
};

/**
 * struct leftover - a mapping that nobody watches any more
 * @start:	first byte
 * @size:	in bytes
 */
struct leftover {
	uint64_t	start;
	uint64_t	size;
};

/**
 * struct worker - a thread that changes its memory
 * @actor:	the thread
 * @thread:	its handle
 * @slots:	its memory
 * @own:	a notifier that it reads itself
 * @expected:	changes that it has made
 * @trap:	a watched page that its signal handler unmaps
 * @trapped:	what is to be reported of that
 * @trap_watch:	the region
 * @leftovers:	what stays mapped until the round is over
 * @leftover_count:	how many
 */
struct worker {
	struct actor		actor;
	pthread_t		thread;
	struct slot		slots[SLOTS];
	struct watcher		own;
	struct expectation	expected[EXPECTATIONS];
	_Atomic uint64_t	trap;
	struct expectation	trapped;
	struct watch		*trap_watch;
	struct leftover		leftovers[LEFTOVERS];
	unsigned int		leftover_count;
};

static struct worker workers[MAX_THREADS];
static unsigned int worker_count = 4;
/* Seconds after which a thread that does not get on is taken to hang. */
static unsigned int patience;
static struct watcher shared[SHARED_WATCHERS];
static struct actor consumer, giver, heir, dropper, looker, noise, forker, director;
static struct actor *const helpers[] = {
	&consumer, &giver, &heir, &dropper, &looker, &noise, &forker, &director,
};

#define HELPERS		(sizeof(helpers) / sizeof(helpers[0]))

static atomic_bool round_over, consumers_over, noise_over;
static _Atomic uint64_t forks, unfenced, fence_timeouts, gave_up, fenced, moves;
static _Atomic uint64_t looks, looks_when_busy;
static void *family_page;
static int pagemap = -1;
static bool files;
static __thread struct worker *self;

/* ------------------------------------------------------------------- tools --- */

static void step(struct actor *actor, const char *doing)
{
	doing_now = doing;
	atomic_store_explicit(&actor->doing, doing, memory_order_relaxed);
	atomic_fetch_add_explicit(&actor->steps, 1, memory_order_relaxed);
}

static uint64_t any(struct actor *actor)
{
	actor->random ^= actor->random << 13;
	actor->random ^= actor->random >> 7;
	actor->random ^= actor->random << 17;
	return actor->random * UINT64_C(2685821657736338717) >> 16;
}

static uint64_t below(struct actor *actor, uint64_t limit)
{
	return any(actor) % limit;
}

static bool one_in(struct actor *actor, unsigned int n)
{
	return !below(actor, n);
}

static void *pointer(uint64_t address)
{
	return (void *)(uintptr_t)address;
}

static uint64_t address_of(const void *memory)
{
	return (uintptr_t)memory;
}

static uint64_t bits(unsigned int first, unsigned int count)
{
	return ((UINT64_C(1) << count) - 1) << first;
}

static void pause_for(long microseconds)
{
	struct timespec time = { .tv_nsec = microseconds * 1000 };

	nanosleep(&time, NULL);
}

/* If it is not unmapped, nothing can be reported. */
static void must_unmap(uint64_t start, uint64_t size)
{
	if (munmap(pointer(start), size))
		complain(&tally.wrong, "munmap: %s", strerror(errno));
}

/* ----------------------------------------------------------- expectations --- */

static void let_others_read(struct watcher *watcher)
{
	if (watcher == &self->own)
		watcher_drain(watcher);
	else
		pause_for(20);
}

/* Waits for the report of a change that has been made. */
static void settle(struct expectation *expectation)
{
	while (atomic_load(&expectation->state) == RETURNED)
		let_others_read(expectation->watch->watcher);
}

static void settle_all(struct worker *worker)
{
	for (unsigned int i = 0; i < EXPECTATIONS; i++)
		settle(&worker->expected[i]);
}

static struct expectation *unused_expectation(struct worker *worker)
{
	for (unsigned int i = 0; i < EXPECTATIONS; i++)
		if (atomic_load(&worker->expected[i].state) == NOTHING_EXPECTED)
			return &worker->expected[i];
	settle_all(worker);
	return unused_expectation(worker);
}

/**
 * struct change - one change of a slot
 * @slot:	the slot
 * @units:	what changes
 * @expected:	what is expected of it
 * @count:	how much
 */
struct change {
	struct slot		*slot;
	uint64_t		units;
	struct expectation	*expected[SLOT_WATCHES];
	unsigned int		count;
};

static struct change begin(struct worker *worker, struct slot *slot,
			   uint64_t units)
{
	struct change change = { .slot = slot, .units = units };

	/* So that no older report can stand for this one. */
	if (one_in(&worker->actor, 2))
		settle_all(worker);
	for (unsigned int i = 0; i < SLOT_WATCHES; i++) {
		struct watch *watch = slot->watches[i];

		if (!watch || !(watch->watched & units))
			continue;
		change.expected[change.count] = unused_expectation(worker);
		expect(change.expected[change.count], watch, units);
		change.count++;
	}
	return change;
}

static void cancel(struct change *change)
{
	while (change->count)
		withdraw(change->expected[--change->count]);
}

static void end(struct change *change)
{
	for (unsigned int i = 0; i < change->count; i++)
		returned(change->expected[i]);
}

/* The mapping of these units is gone, and with it the watch. */
static void end_gone(struct change *change)
{
	end(change);
	for (unsigned int i = 0; i < SLOT_WATCHES; i++) {
		struct watch *watch = change->slot->watches[i];

		if (!watch || !(watch->watched & change->units))
			continue;
		if (aioummu_spent(watch->watcher->number, watch->cookie) != 1)
			complain(&tally.wrong, "unmapped, but not spent");
		watch->watched &= ~change->units;
	}
}

/* ------------------------------------------------------------------- slots --- */

static void touch(struct slot *slot, uint64_t units)
{
	uint64_t memory = slot->base;

	for (unsigned int i = 0; i < slot->count; i++, memory += slot->unit)
		if (units & bits(i, 1))
			*(volatile char *)pointer(memory) = (char)i;
}

static void *map_units(struct slot *slot, unsigned int first,
		       unsigned int count, int flags)
{
	void *memory;

	flags |= slot->kind == SHARED ? MAP_SHARED : MAP_PRIVATE;
	flags |= slot->fd < 0 ? MAP_ANONYMOUS : 0;
	memory = mmap(slot->base ? pointer(slot->base + first * slot->unit) : NULL,
		      count * slot->unit, PROT_READ | PROT_WRITE, flags, slot->fd,
		      slot->fd < 0 ? 0 : first * slot->unit);
	if (memory != MAP_FAILED && slot->kind == LARGE)
		madvise(memory, count * slot->unit, MADV_HUGEPAGE);
	return memory;
}

static int open_file(enum kind kind)
{
	int fd = -1;

	if (kind == SHARED)
		fd = memfd_create("stress", MFD_CLOEXEC);
	else if (kind == PRIVATE_FILE)
		fd = open(P_tmpdir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd >= 0 && ftruncate(fd, UNITS * LARGE_UNIT)) {
		close(fd);
		return -1;
	}
	return fd;
}

static bool is_allowed(int error)
{
	/* Others keep changing mappings that have grown together with it. */
	if (error == -EAGAIN)
		atomic_fetch_add(&gave_up, 1);
	return error == -EAGAIN;
}

static void add_watch(struct worker *worker, struct slot *slot, unsigned int i)
{
	struct actor *actor = &worker->actor;
	uint64_t size = slot->count * slot->unit, start, end;
	struct watcher *watcher;
	int error;

	if (slot->watches[i] || slot->mapped != bits(0, slot->count))
		return;
	watcher = one_in(actor, 2) ? &worker->own :
				     &shared[below(actor, SHARED_WATCHERS)];
	start = one_in(actor, 2) ? 0 : below(actor, size);
	end = one_in(actor, 2) ? size : start + 1 + below(actor, size - start);
	slot->watches[i] = watch_add(watcher, slot->base, slot->unit,
				     slot->base + start, slot->base + end, &error);
	if (!slot->watches[i] && !is_allowed(error))
		complain(&tally.wrong, "aioummu_register: %s", strerror(-error));
}

/* Whatever is expected of it, unless that was reported before, is dropped. */
static void drop_watch(struct worker *worker, struct slot *slot, unsigned int i)
{
	struct watch *watch = slot->watches[i];

	if (!watch)
		return;
	if (one_in(&worker->actor, 2))
		settle_all(worker);
	for (unsigned int j = 0; j < EXPECTATIONS; j++)
		if (worker->expected[j].watch == watch)
			withdraw(&worker->expected[j]);
	watch_remove(watch);
	slot->watches[i] = NULL;
}

static void drop_watches(struct worker *worker, struct slot *slot)
{
	for (unsigned int i = 0; i < SLOT_WATCHES; i++)
		drop_watch(worker, slot, i);
}

static void add_watches(struct worker *worker, struct slot *slot)
{
	for (unsigned int i = 0; i < SLOT_WATCHES; i++)
		if (!one_in(&worker->actor, 3))
			add_watch(worker, slot, i);
}

static void make_slot(struct worker *worker, struct slot *slot)
{
	void *memory;

	memset(slot, 0, sizeof(*slot));
	slot->kind = below(&worker->actor, KINDS);
	if (slot->kind == PRIVATE_FILE && !files)
		slot->kind = ANONYMOUS;
	slot->fd = open_file(slot->kind);
	if (slot->fd < 0 && slot->kind != LARGE)
		slot->kind = ANONYMOUS;
	slot->unit = slot->kind == LARGE ? LARGE_UNIT : PAGE;
	slot->count = 1 + below(&worker->actor, SLOT_UNITS);
	memory = map_units(slot, 0, slot->count, 0);
	if (memory == MAP_FAILED) {
		complain(&tally.wrong, "mmap: %s", strerror(errno));
		_exit(2);
	}
	slot->base = address_of(memory);
	slot->mapped = bits(0, slot->count);
	slot->whole = true;
	touch(slot, slot->mapped);
	add_watches(worker, slot);
}

/* The longest run of mapped units that starts at a random place, or nothing. */
static unsigned int choose(struct worker *worker, struct slot *slot,
			   uint64_t among, unsigned int *first)
{
	unsigned int count = 0;

	*first = below(&worker->actor, slot->count);
	while (*first + count < slot->count && among & bits(*first + count, 1))
		count++;
	return count ? 1 + below(&worker->actor, count) : 0;
}

/* --------------------------------------------------------------- operations --- */

static void unmap_units(struct worker *worker, struct slot *slot,
			unsigned int first, unsigned int count)
{
	struct change change = begin(worker, slot, bits(first, count));

	must_unmap(slot->base + first * slot->unit, count * slot->unit);
	slot->mapped &= ~bits(first, count);
	slot->whole = false;
	end_gone(&change);
}

static void destroy_slot(struct worker *worker, struct slot *slot)
{
	/* Unmapping a hole could hit what others have mapped there. */
	for (unsigned int i = 0; i < slot->count; i++) {
		unsigned int count = 0;

		while (i + count < slot->count && slot->mapped & bits(i + count, 1))
			count++;
		if (count)
			unmap_units(worker, slot, i, count);
		i += count;
	}
	drop_watches(worker, slot);
	if (slot->fd >= 0)
		close(slot->fd);
	slot->base = 0;
}

static void do_unmap(struct worker *worker, struct slot *slot)
{
	unsigned int first, count = choose(worker, slot, slot->mapped, &first);

	if (count)
		unmap_units(worker, slot, first, count);
}

static void do_map_over(struct worker *worker, struct slot *slot)
{
	unsigned int first, count = choose(worker, slot, slot->mapped, &first);
	struct change change;

	if (!count)
		return;
	change = begin(worker, slot, bits(first, count));
	if (map_units(slot, first, count, MAP_FIXED) == MAP_FAILED)
		complain(&tally.wrong, "mmap over: %s", strerror(errno));
	slot->whole = slot->whole && count == slot->count;
	end_gone(&change);
	touch(slot, change.units);
}

static void do_refill(struct worker *worker, struct slot *slot)
{
	uint64_t holes = bits(0, slot->count) & ~slot->mapped;
	unsigned int first, count = choose(worker, slot, holes, &first);

	if (!count)
		return;
	if (map_units(slot, first, count, MAP_FIXED_NOREPLACE) == MAP_FAILED)
		return;
	slot->mapped |= bits(first, count);
	touch(slot, bits(first, count));
}

static void do_rearm(struct worker *worker, struct slot *slot)
{
	(void)worker;
	for (unsigned int i = 0; i < SLOT_WATCHES; i++) {
		struct watch *watch = slot->watches[i];
		struct aioummu_refusal refusal;
		int error;

		if (!watch)
			continue;
		error = aioummu_rearm(watch->watcher->number, watch->cookie, &refusal);
		if (!error)
			watch->watched = watch->units & slot->mapped;
		else if (!is_allowed(error) && !(watch->units & ~slot->mapped))
			complain(&tally.wrong, "aioummu_rearm: %s", strerror(-error));
	}
}

static void do_shrink(struct worker *worker, struct slot *slot)
{
	unsigned int left = 1 + below(&worker->actor, slot->count);
	struct change change;

	if (!slot->whole || left == slot->count)
		return;
	change = begin(worker, slot, bits(left, slot->count - left));
	if (mremap(pointer(slot->base), slot->count * slot->unit,
		   left * slot->unit, 0) == MAP_FAILED) {
		complain(&tally.wrong, "mremap to shrink: %s", strerror(errno));
		cancel(&change);
		return;
	}
	slot->mapped = bits(0, left);
	end_gone(&change);
	slot->count = left;
	drop_watches(worker, slot);
	add_watches(worker, slot);
}

/* What is not watched any more must not stay registered for ever. */
static void leave_behind(struct worker *worker, struct slot *slot)
{
	if (!slot->whole || worker->leftover_count == LEFTOVERS)
		return;
	drop_watches(worker, slot);
	if (slot->fd >= 0)
		close(slot->fd);
	worker->leftovers[worker->leftover_count++] = (struct leftover) {
		slot->base, slot->count * slot->unit,
	};
	slot->base = 0;
}

/* The slot lies elsewhere now. */
static void moved(struct worker *worker, struct slot *slot, uint64_t base)
{
	atomic_fetch_add(&moves, 1);
	drop_watches(worker, slot);
	slot->base = base;
	if (one_in(&worker->actor, 8))
		leave_behind(worker, slot);
	else
		add_watches(worker, slot);
}

static void do_grow(struct worker *worker, struct slot *slot)
{
	unsigned int count = slot->count + 1 + below(&worker->actor, 4);
	struct change change;
	void *memory;

	if (!slot->whole || count > SLOT_UNITS)
		return;
	change = begin(worker, slot, slot->mapped);
	memory = mremap(pointer(slot->base), slot->count * slot->unit,
			count * slot->unit, MREMAP_MAYMOVE);
	if (memory == MAP_FAILED) {
		complain(&tally.wrong, "mremap to grow: %s", strerror(errno));
		cancel(&change);
		return;
	}
	slot->count = count;
	slot->mapped = bits(0, count);
	if (address_of(memory) == slot->base) {
		cancel(&change);
		touch(slot, slot->mapped);
	} else {
		end_gone(&change);
		moved(worker, slot, address_of(memory));
	}
}

static void do_move(struct worker *worker, struct slot *slot)
{
	uint64_t size = slot->count * slot->unit;
	struct change change;
	void *target;

	if (!slot->whole)
		return;
	target = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (target == MAP_FAILED)
		return;
	change = begin(worker, slot, slot->mapped);
	if (mremap(pointer(slot->base), size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
		   target) == MAP_FAILED) {
		complain(&tally.wrong, "mremap to move: %s", strerror(errno));
		cancel(&change);
		munmap(target, size);
		return;
	}
	end_gone(&change);
	moved(worker, slot, address_of(target));
}

/* Two changes in one call: what the other slot had there is gone as well. */
static void do_move_over(struct worker *worker, struct slot *slot)
{
	struct slot *other = &worker->slots[below(&worker->actor, SLOTS)];
	uint64_t size = slot->count * slot->unit, target = other->base;
	struct change change, gone;

	if (other == slot || !target || other->unit != slot->unit ||
	    !slot->whole || other->mapped != bits(0, other->count) ||
	    other->count < slot->count)
		return;
	gone = begin(worker, other, slot->mapped);
	change = begin(worker, slot, slot->mapped);
	if (mremap(pointer(slot->base), size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
		   pointer(target)) == MAP_FAILED) {
		complain(&tally.wrong, "mremap over: %s", strerror(errno));
		cancel(&change);
		cancel(&gone);
		return;
	}
	other->mapped &= ~slot->mapped;
	end_gone(&gone);
	end_gone(&change);
	moved(worker, slot, target);
	destroy_slot(worker, other);
}

/* The pages go elsewhere, the mapping stays. */
static void do_move_pages(struct worker *worker, struct slot *slot)
{
	uint64_t size = slot->count * slot->unit;
	struct change change;
	void *target;

	if (!slot->whole || slot->kind == PRIVATE_FILE)
		return;
	change = begin(worker, slot, slot->mapped);
	target = mremap(pointer(slot->base), size, size,
			MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	if (target == MAP_FAILED) {
		complain(&tally.wrong, "mremap DONTUNMAP: %s", strerror(errno));
		cancel(&change);
		return;
	}
	end_gone(&change);
	atomic_fetch_add(&moves, 1);
	if (one_in(&worker->actor, 2)) {
		munmap(target, size);
		touch(slot, slot->mapped);
		return;
	}
	drop_watches(worker, slot);
	munmap(pointer(slot->base), size);
	slot->base = address_of(target);
	add_watches(worker, slot);
}

static void do_advise(struct worker *worker, struct slot *slot)
{
	unsigned int first, count = choose(worker, slot, slot->mapped, &first);
	int advice = MADV_DONTNEED;
	struct change change;

	if (!count)
		return;
	if (slot->kind == SHARED && one_in(&worker->actor, 2))
		advice = MADV_REMOVE;
	if (slot->fd < 0 && one_in(&worker->actor, 2))
		advice = MADV_FREE;
	change = begin(worker, slot, bits(first, count));
	if (madvise(pointer(slot->base + first * slot->unit), count * slot->unit,
		    advice))
		complain(&tally.wrong, "madvise: %s", strerror(errno));
	end(&change);
	touch(slot, change.units);
}

/* Splits the mapping, and joins it again: no change, and nothing is lost. */
static void do_protect(struct worker *worker, struct slot *slot)
{
	unsigned int first, count = choose(worker, slot, slot->mapped, &first);
	void *memory = pointer(slot->base + first * slot->unit);

	if (!count)
		return;
	mprotect(memory, count * slot->unit, PROT_READ);
	if (one_in(&worker->actor, 3)) {
		unmap_units(worker, slot, first, count);
		return;
	}
	mprotect(memory, count * slot->unit, PROT_READ | PROT_WRITE);
	/* Pages that were shared with a child may keep the parts apart. */
	slot->whole = false;
}

static void do_watch(struct worker *worker, struct slot *slot)
{
	unsigned int i = below(&worker->actor, SLOT_WATCHES);

	if (slot->watches[i])
		drop_watch(worker, slot, i);
	else
		add_watch(worker, slot, i);
}

static void do_renew(struct worker *worker, struct slot *slot)
{
	destroy_slot(worker, slot);
}

/* Which of up to 64 pages nothing is behind. */
static uint64_t absent_pages(uint64_t start, unsigned int count)
{
	uint64_t entries[UNITS], absent = 0;

	if (pread(pagemap, entries, count * sizeof(entries[0]),
		  (off_t)(start / PAGE * sizeof(entries[0]))) !=
	    (ssize_t)(count * sizeof(entries[0])))
		return 0;
	for (unsigned int i = 0; i < count; i++)
		if (!(entries[i] >> 62))
			absent |= bits(i, 1);
	return absent;
}

/*
 * What the allocator does with a block that it gets back is its own business, and
 * other threads may do it: what has gone from memory must have been reported.
 */
static void do_heap(struct worker *worker, struct slot *unused)
{
	struct actor *actor = &worker->actor;
	/* A few times beyond M_MMAP_THRESHOLD, so that it is a mapping. */
	size_t size = PAGE + below(actor, 48 * PAGE);
	struct watcher *watcher = one_in(actor, 2) ? &worker->own : &shared[0];
	char *block = malloc(size), *keep = malloc(3000);
	struct expectation *expectation;
	uint64_t start = address_of(block), first = (start + PAGE - 1) / PAGE * PAGE;
	struct watch *watch;
	int error;

	(void)unused;
	memset(block, 1, size);
	watch = watch_add(watcher, start / PAGE * PAGE, PAGE, start, start + size,
			  &error);
	if (!watch) {
		if (!is_allowed(error))
			complain(&tally.wrong, "aioummu_register: %s of heap",
				 strerror(-error));
		free(block);
		free(keep);
		return;
	}
	expectation = unused_expectation(worker);
	expect(expectation, watch, units_of(watch->origin, PAGE, first,
					    (start + size) / PAGE * PAGE));
	free(block);
	if (one_in(actor, 4))
		malloc_trim(0);
	narrow(expectation, absent_pages(watch->origin, UNITS - 1));
	/* Another thread may be in the middle of giving it to the kernel. */
	error = aioummu_fence();
	if (error == -ETIMEDOUT) {
		atomic_fetch_add(&fence_timeouts, 1);
		withdraw(expectation);
	} else {
		returned(expectation);
		settle(expectation);
	}
	watch_remove(watch);
	free(keep);
}

static void do_read(struct worker *worker, struct slot *unused)
{
	(void)unused;
	watcher_read(&worker->own, 1 + below(&worker->actor, 4));
}

/* In the middle of anything, also while this thread holds the engine's lock. */
static void unmap_in_handler(int signal)
{
	int error = errno;
	uint64_t trap;

	(void)signal;
	trap = self ? atomic_exchange(&self->trap, 0) : 0;
	if (trap)
		must_unmap(trap, PAGE);
	errno = error;
}

static void do_trap(struct worker *worker, struct slot *unused)
{
	void *page;
	int error;

	(void)unused;
	if (worker->trap_watch) {
		if (atomic_load(&worker->trap))
			return;
		returned(&worker->trapped);
		settle(&worker->trapped);
		watch_remove(worker->trap_watch);
		worker->trap_watch = NULL;
		return;
	}
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		return;
	worker->trap_watch = watch_add(&worker->own, address_of(page), PAGE,
				       address_of(page), address_of(page) + PAGE,
				       &error);
	if (!worker->trap_watch) {
		is_allowed(error);
		munmap(page, PAGE);
		return;
	}
	expect(&worker->trapped, worker->trap_watch, 1);
	atomic_store(&worker->trap, address_of(page));
}

static void spring_trap(struct worker *worker)
{
	if (!worker->trap_watch)
		return;
	raise(SIGUSR1);
	do_trap(worker, NULL);
}

/**
 * struct operation - something that a worker does
 * @name:	what
 * @run:	how
 * @weight:	how often, relative to the others
 */
static const struct operation {
	const char	*name;
	void		(*run)(struct worker *worker, struct slot *slot);
	unsigned int	weight;
} operations[] = {
	{ "munmap", do_unmap, 6 },
	{ "mmap over", do_map_over, 4 },
	{ "mmap into a hole", do_refill, 8 },
	{ "rearm", do_rearm, 8 },
	{ "mremap to shrink", do_shrink, 2 },
	{ "mremap to grow", do_grow, 3 },
	{ "mremap to move", do_move, 3 },
	{ "mremap over another", do_move_over, 2 },
	{ "mremap DONTUNMAP", do_move_pages, 2 },
	{ "madvise", do_advise, 6 },
	{ "mprotect", do_protect, 2 },
	{ "register and unregister", do_watch, 6 },
	{ "a new mapping", do_renew, 4 },
	{ "leaving a mapping", leave_behind, 1 },
	{ "malloc and free", do_heap, 3 },
	{ "read", do_read, 6 },
	{ "a page for the signal handler", do_trap, 3 },
};

#define OPERATIONS	(sizeof(operations) / sizeof(operations[0]))

static const struct operation *any_operation(struct actor *actor)
{
	unsigned int sum = 0, at;

	for (unsigned int i = 0; i < OPERATIONS; i++)
		sum += operations[i].weight;
	at = below(actor, sum);
	for (unsigned int i = 0;; i++) {
		if (at < operations[i].weight)
			return &operations[i];
		at -= operations[i].weight;
	}
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct actor *actor = &worker->actor;

	self = worker;
	while (!atomic_load(&round_over)) {
		const struct operation *operation = any_operation(actor);
		struct slot *slot = &worker->slots[below(actor, SLOTS)];

		step(actor, operation->name);
		if (!slot->base)
			make_slot(worker, slot);
		operation->run(worker, slot);
	}
	step(actor, "the end of the round");
	spring_trap(worker);
	for (unsigned int i = 0; i < SLOTS; i++)
		if (worker->slots[i].base)
			destroy_slot(worker, &worker->slots[i]);
	settle_all(worker);
	watcher_drain(&worker->own);
	atomic_store(&actor->active, false);
	return NULL;
}

/* ---------------------------------------------------- the same address again --- */

/**
 * struct handover - an address that one thread gives up and another gets
 * @baton:	the address, while the heir is to try for it
 * @trying:	the heir tries
 * @given:	the giver's call has returned
 * @ended:	the heir is through with it
 * @expectation:	what the giver's notifier must know
 */
static struct {
	_Atomic uint64_t	baton;
	atomic_bool		trying;
	atomic_bool		given;
	atomic_bool		ended;
	struct expectation	expectation;
} handover;

static struct watcher giver_watcher, heir_watcher;

static void wait_until(atomic_bool *flag)
{
	while (!atomic_load(flag))
		sched_yield();
}

static void *map_there(uint64_t address)
{
	return mmap(pointer(address), PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
}

/* Low in a large gap: the kernel gives others the highest place that fits. */
static uint64_t find_lonely_place(void)
{
	const size_t size = UINT64_C(1) << 32;
	void *gap = mmap(NULL, size, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (gap == MAP_FAILED)
		return 0;
	munmap(gap, size);
	return address_of(gap) + size / 4;
}

/* While the memory is there no more, for the one who has just got the address. */
static void look_as_heir(void)
{
	struct expectation *expectation = &handover.expectation;
	struct watcher *watcher = expectation->watch->watcher;
	int error;

	if (!watcher_changed(watcher) && !is_covered(expectation))
		atomic_fetch_add(&unfenced, 1);
	error = aioummu_fence();
	if (error == -ETIMEDOUT) {
		atomic_fetch_add(&fence_timeouts, 1);
		return;
	}
	if (error)
		complain(&tally.wrong, "aioummu_fence: %s", strerror(-error));
	atomic_fetch_add(&fenced, 1);
	check_stale(expectation, "the next owner of the address, behind a fence,");
}

/*
 * The event of the unmapping before may be read only now.  Returns whether the
 * page is still mapped.
 */
static bool watch_as_heir(struct actor *actor, uint64_t page)
{
	bool mapped = true;
	struct expectation expectation;
	struct watch *watch;
	int error;

	watch = watch_add(&heir_watcher, page, PAGE, page, page + PAGE, &error);
	if (!watch) {
		is_allowed(error);
		return mapped;
	}
	if (one_in(actor, 2)) {
		mapped = one_in(actor, 2);
		expect(&expectation, watch, 1);
		if (!mapped)
			must_unmap(page, PAGE);
		else if (madvise(pointer(page), PAGE, MADV_DONTNEED))
			complain(&tally.wrong, "madvise of a page: %s",
				 strerror(errno));
		returned(&expectation);
		watcher_drain(&heir_watcher);
		if (atomic_load(&expectation.state) != NOTHING_EXPECTED)
			complain(&tally.missed, "no LAST after everything was read");
	}
	watch_remove(watch);
	return mapped;
}

static void *inherit(void *unused)
{
	(void)unused;
	/* Not just until the round is over: the giver waits for an heir. */
	while (atomic_load(&giver.active)) {
		uint64_t page = atomic_load(&handover.baton);
		void *memory;
		bool given;

		if (!page) {
			step(&heir, "waiting");
			pause_for(50);
			continue;
		}
		step(&heir, "getting an address");
		atomic_store(&handover.baton, 0);
		atomic_store(&handover.trying, true);
		do {
			given = atomic_load(&handover.given);
			memory = map_there(page);
		} while (memory == MAP_FAILED && !given);
		if (memory != MAP_FAILED) {
			look_as_heir();
			if (watch_as_heir(&heir, page))
				munmap(memory, PAGE);
		}
		atomic_store(&handover.ended, true);
	}
	atomic_store(&heir.active, false);
	return NULL;
}

/* Returns where it has moved the page, or NULL if it has unmapped it. */
static void *give_away(uint64_t page)
{
	void *target = NULL;

	if (one_in(&giver, 4))
		target = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
			      -1, 0);
	if (target && target != MAP_FAILED) {
		if (mremap(pointer(page), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			   target) == MAP_FAILED)
			complain(&tally.wrong, "mremap of a page: %s",
				 strerror(errno));
		return target;
	}
	must_unmap(page, PAGE);
	return NULL;
}

static void give(uint64_t page)
{
	struct expectation *expectation = &handover.expectation;
	struct watch *watch;
	void *target;
	int error;

	if (map_there(page) == MAP_FAILED)
		return;
	*(volatile char *)pointer(page) = 1;
	watch = watch_add(&giver_watcher, page, PAGE, page, page + PAGE, &error);
	if (!watch) {
		is_allowed(error);
		munmap(pointer(page), PAGE);
		return;
	}
	watcher_drain(&giver_watcher);
	expect(expectation, watch, 1);
	atomic_store(&handover.trying, false);
	atomic_store(&handover.given, false);
	atomic_store(&handover.ended, false);
	atomic_store(&handover.baton, page);
	wait_until(&handover.trying);
	target = give_away(page);
	returned(expectation);
	atomic_store(&handover.given, true);
	wait_until(&handover.ended);
	if (target)
		munmap(target, PAGE);
	watcher_drain(&giver_watcher);
	if (atomic_load(&expectation->state) != NOTHING_EXPECTED)
		complain(&tally.missed, "no LAST after everything was read");
	watch_remove(watch);
}

static void *give_up(void *argument)
{
	uint64_t place = find_lonely_place();

	(void)argument;
	while (place && !atomic_load(&round_over)) {
		step(&giver, "giving an address away");
		for (unsigned int i = 0; i < 20; i++)
			give(place + below(&giver, 64) * 2 * PAGE);
		pause_for(2000);
	}
	atomic_store(&giver.active, false);
	return NULL;
}

/* ------------------------------------------------- pages of which a drop goes on --- */

#define DROPPED_PAGES	256

/**
 * struct drops - memory that one thread fills and drops, over and over
 * @memory:	first byte
 * @last:	the last page's first word: the number of the next drop, or 0
 * @returned:	number of the last drop whose call has returned
 */
static struct {
	uint64_t		memory;
	_Atomic uint64_t	*last;
	_Atomic uint64_t	returned;
} drops;

static struct watcher looker_watcher;

static void map_what_is_dropped(void)
{
	void *memory = mmap(NULL, DROPPED_PAGES * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		_exit(2);
	drops.memory = address_of(memory);
	drops.last = pointer(drops.memory + (DROPPED_PAGES - 1) * PAGE);
}

static void *drop_pages(void *unused)
{
	uint64_t number = atomic_load(&drops.returned);

	(void)unused;
	while (!atomic_load(&round_over)) {
		step(&dropper, "dropping pages");
		for (uint64_t i = 0; i + 1 < DROPPED_PAGES; i++)
			*(volatile char *)pointer(drops.memory + i * PAGE) = 1;
		atomic_store(drops.last, ++number);
		/* Long enough for the drop before to be known to be over. */
		pause_for(one_in(&dropper, 4) ? 20000 : 100);
		madvise(pointer(drops.memory), DROPPED_PAGES * PAGE, MADV_DONTNEED);
		atomic_store(&drops.returned, number);
	}
	atomic_store(&dropper.active, false);
	return NULL;
}

/* Who has seen the page between two equal states must have it still. */
static void look_at_the_page(struct watch *watch)
{
	uint64_t state = state_of(watch), number = atomic_load(drops.last);

	if (state & UMMUNOTIFY_STATE_BUSY)
		atomic_fetch_add(&looks_when_busy, 1);
	if (state & UMMUNOTIFY_STATE_BUSY || !number)
		return;
	atomic_fetch_add(&looks, 1);
	while (atomic_load(&drops.returned) < number)
		sched_yield();
	if (state_of(watch) == state)
		complain(&tally.stale, "stale: pages have gone, and their state is %"
			 PRIu64 " as before", state);
}

static void *look_at_pages(void *unused)
{
	uint64_t page = address_of(drops.last);

	(void)unused;
	while (atomic_load(&dropper.active)) {
		struct aioummu_refusal refusal;
		struct watch *watch;
		int error;

		step(&looker, "looking at pages that are dropped");
		watch = watch_add(&looker_watcher, page, PAGE, page, page + PAGE,
				  &error);
		if (!watch) {
			is_allowed(error);
			continue;
		}
		for (unsigned int i = below(&looker, 4); i; i--) {
			look_at_the_page(watch);
			aioummu_rearm(looker_watcher.number, watch->cookie, &refusal);
		}
		look_at_the_page(watch);
		watch_remove(watch);
		if (one_in(&looker, 10)) {
			watcher_drain(&looker_watcher);
			pause_for(1000);
		}
	}
	watcher_drain(&looker_watcher);
	atomic_store(&looker.active, false);
	return NULL;
}

/* ---------------------------------------------------------------- the others --- */

/* Reads the shared notifiers; more slowly at times, so that reports coalesce. */
static void *consume(void *unused)
{
	struct pollfd polled[SHARED_WATCHERS];

	(void)unused;
	for (unsigned int i = 0; i < SHARED_WATCHERS; i++)
		polled[i] = (struct pollfd) {
			.fd = shared[i].doorbell[0], .events = POLLIN,
		};
	while (!atomic_load(&consumers_over)) {
		step(&consumer, "reading");
		if (poll(polled, SHARED_WATCHERS, 20) <= 0)
			continue;
		for (unsigned int i = 0; i < SHARED_WATCHERS; i++) {
			size_t room = one_in(&consumer, 4) ? 1 : 200;

			if (polled[i].revents && !watcher_read(&shared[i], room))
				complain(&tally.wrong,
					 "the doorbell rings, but nothing is there");
		}
		if (one_in(&consumer, 50))
			pause_for(1000);
	}
	for (unsigned int i = 0; i < SHARED_WATCHERS; i++)
		watcher_drain(&shared[i]);
	atomic_store(&consumer.active, false);
	return NULL;
}

/*
 * Opens, registers whatever there is, changes it, closes in the middle.  Some of
 * these are refused: this is about what it does to the others.
 */
static void make_noise(int number)
{
	struct aioummu_refusal refusal;
	unsigned int count = 1 + below(&noise, NOISE_PAGES), hole;
	char records[32 * 8], *block = malloc(100 * PAGE);
	uint64_t memory;

	memory = address_of(mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	/* This function's own code, stack and heap, and data of the program. */
	aioummu_register(number, address_of(make_noise),
			 address_of(make_noise) + 100, 1, 0, false, &refusal);
	aioummu_register(number, address_of(&count), address_of(&count) + 1, 2,
			 0, false, &refusal);
	aioummu_register(number, address_of(block), address_of(block) + 99 * PAGE,
			 3, 0, false, &refusal);
	aioummu_register(number, address_of(workers), address_of(workers + 1), 4,
			 0, false, &refusal);
	for (unsigned int i = 0; i < count; i++)
		aioummu_register(number, memory + i * PAGE, memory + i * PAGE + 1,
				 10 + i, 0, false, &refusal);
	/* Holes, so that there are many mappings; others may move in there. */
	hole = below(&noise, count);
	munmap(pointer(memory + hole * PAGE), PAGE);
	free(block);
	aioummu_read(number, records, sizeof(records));
	if (one_in(&noise, 2))
		aioummu_close(number);
	for (unsigned int i = 0; i < count; i += 1 + below(&noise, 10))
		if (i != hole)
			madvise(pointer(memory + i * PAGE), PAGE, MADV_DONTNEED);
	for (unsigned int i = 0; i < count; i += 2)
		if (i != hole)
			munmap(pointer(memory + i * PAGE), PAGE);
	for (unsigned int i = 1; i < count; i += 2)
		if (i != hole)
			munmap(pointer(memory + i * PAGE), PAGE);
	aioummu_close(number);
}

static void *be_noisy(void *unused)
{
	int doorbell[2];

	(void)unused;
	while (!atomic_load(&noise_over)) {
		int number = aioummu_open(doorbell);

		step(&noise, "opening and closing a notifier");
		if (number > 0)
			make_noise(number);
		else
			complain(&tally.wrong, "aioummu_open: %s", strerror(-number));
		pause_for(500);
	}
	atomic_store(&noise.active, false);
	return NULL;
}

/* A child has no watch: its changes are nobody's business, and never wait. */
static void be_child(bool linger)
{
	uint64_t generation;
	int error = aioummu_generation(shared[0].number, &generation);

	if (error != -EBADF && error != -EOWNERDEAD)
		_exit(3);
	munmap(family_page, PAGE);
	free(malloc(300 * PAGE));
	if (linger)
		pause_for(30000);
	_exit(0);
}

/* Without what the C library does at fork(), so with a copy of the userfaultfd. */
static void be_raw_child(void)
{
	struct timespec time = { .tv_nsec = 30000000 };

	if (!SANITIZED && aioummu_fence() != -EOWNERDEAD)
		syscall(SYS_exit_group, 3);
	syscall(SYS_nanosleep, &time, NULL);
	syscall(SYS_exit_group, 0);
}

static void reap(pid_t child)
{
	int status;

	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	if (status)
		complain(&tally.wrong, "a child ended with status %#x", status);
}

static pid_t make_child(void)
{
	pid_t child;

	switch (below(&forker, 4)) {
	case 0:
		step(&forker, "vfork");
		child = vfork();
		if (!child) {
			execl("/bin/true", "true", NULL);
			_exit(4);
		}
		return child;
	case 1:
		step(&forker, "clone");
		child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
		if (!child)
			be_raw_child();
		return child;
	default:
		step(&forker, "fork");
		child = fork();
		if (!child)
			be_child(one_in(&forker, 2));
		return child;
	}
}

/* Also sends the workers signals. */
static void *make_children(void *unused)
{
	pid_t children[3] = { 0 };

	(void)unused;
	while (!atomic_load(&round_over)) {
		pid_t *child = &children[below(&forker, 3)];

		step(&forker, "sending signals");
		for (unsigned int i = 0; i < worker_count; i++)
			if (atomic_load(&workers[i].actor.active))
				pthread_kill(workers[i].thread, SIGUSR1);
		step(&forker, "waiting for a child");
		if (*child)
			reap(*child);
		*child = make_child();
		if (*child < 0)
			*child = 0;
		else
			atomic_fetch_add(&forks, 1);
		pause_for(SANITIZED ? 50000 : 10000);
	}
	for (unsigned int i = 0; i < 3; i++)
		if (children[i])
			reap(children[i]);
	atomic_store(&forker.active, false);
	return NULL;
}

/* ------------------------------------------------------------------- hangs --- */

static void check_progress(struct actor *actor, uint64_t *seen,
			   unsigned int *since)
{
	uint64_t steps = atomic_load(&actor->steps);

	if (!atomic_load(&actor->active) || steps != *seen) {
		*seen = steps;
		*since = 0;
		return;
	}
	if (++*since < patience)
		return;
	say("FAIL hang: %s has been at \"%s\" for %u seconds", actor->name,
	    atomic_load(&actor->doing), patience);
	_exit(2);
}

/* Waits for nobody, and changes no mapping. */
static void *look_for_hangs(void *unused)
{
	static uint64_t seen[MAX_THREADS + HELPERS];
	static unsigned int since[MAX_THREADS + HELPERS];

	(void)unused;
	for (;;) {
		struct timespec second = { .tv_sec = 1 };

		nanosleep(&second, NULL);
		for (unsigned int i = 0; i < MAX_THREADS; i++)
			check_progress(&workers[i].actor, &seen[i], &since[i]);
		for (unsigned int i = 0; i < HELPERS; i++)
			check_progress(helpers[i], &seen[MAX_THREADS + i],
				       &since[MAX_THREADS + i]);
	}
	return NULL;
}

/* -------------------------------------------------------------------- rounds --- */

static pthread_t start(struct actor *actor, void *(*run)(void *), void *argument)
{
	pthread_t thread;

	atomic_store(&actor->active, true);
	step(actor, "starting");
	if (pthread_create(&thread, NULL, run, argument)) {
		say("pthread_create failed");
		_exit(2);
	}
	return thread;
}

/* A copy of the userfaultfd, with which nothing is unregistered by closing it. */
static int copy_userfaultfd(void)
{
	DIR *directory = opendir("/proc/self/fd");
	struct dirent *entry;
	int copy = -1;

	while (copy < 0 && (entry = readdir(directory))) {
		char target[64];
		ssize_t length = readlinkat(dirfd(directory), entry->d_name, target,
					    sizeof(target) - 1);

		target[length < 0 ? 0 : length] = 0;
		if (!strcmp(target, "anon_inode:[userfaultfd]"))
			copy = fcntl(atoi(entry->d_name), F_DUPFD_CLOEXEC, 0);
	}
	closedir(directory);
	if (copy < 0)
		complain(&tally.wrong, "no userfaultfd is open");
	return copy;
}

static void drop_leftovers(struct worker *worker)
{
	while (worker->leftover_count) {
		const struct leftover *leftover =
			&worker->leftovers[--worker->leftover_count];

		munmap(pointer(leftover->start), leftover->size);
	}
}

static void check_watchers(void)
{
	for (unsigned int i = 0; i < SHARED_WATCHERS; i++)
		watcher_check_end(&shared[i]);
	for (unsigned int i = 0; i < worker_count; i++)
		watcher_check_end(&workers[i].own);
}

static bool has_failed(void)
{
	return tally.missed || tally.stale || tally.wrong;
}

static void run_round(unsigned int seconds)
{
	pthread_t consumer_thread, giver_thread, heir_thread, noise_thread;
	pthread_t dropper_thread, looker_thread, forker_thread;
	struct aioummu_refusal refusal;
	char left[200];
	int copy;

	atomic_store(&round_over, false);
	atomic_store(&consumers_over, false);
	atomic_store(&noise_over, false);
	atomic_store(&handover.baton, 0);
	for (unsigned int i = 0; i < SHARED_WATCHERS; i++)
		watcher_open(&shared[i]);
	watcher_open(&giver_watcher);
	watcher_open(&heir_watcher);
	watcher_open(&looker_watcher);
	aioummu_register(shared[0].number, address_of(family_page),
			 address_of(family_page) + PAGE, UINT64_MAX, 0, false,
			 &refusal);
	copy = copy_userfaultfd();
	for (unsigned int i = 0; i < worker_count; i++) {
		watcher_open(&workers[i].own);
		workers[i].thread = start(&workers[i].actor, work, &workers[i]);
	}
	consumer_thread = start(&consumer, consume, NULL);
	giver_thread = start(&giver, give_up, NULL);
	heir_thread = start(&heir, inherit, NULL);
	dropper_thread = start(&dropper, drop_pages, NULL);
	looker_thread = start(&looker, look_at_pages, NULL);
	noise_thread = start(&noise, be_noisy, NULL);
	forker_thread = start(&forker, make_children, NULL);

	step(&director, "letting the others work");
	for (unsigned int i = 0; i < 10 * seconds && !has_failed(); i++)
		nanosleep(&(struct timespec) { .tv_nsec = 100000000 }, NULL);

	step(&director, "waiting for the workers");
	atomic_store(&round_over, true);
	pthread_join(forker_thread, NULL);
	for (unsigned int i = 0; i < worker_count; i++)
		pthread_join(workers[i].thread, NULL);
	pthread_join(giver_thread, NULL);
	pthread_join(heir_thread, NULL);
	pthread_join(dropper_thread, NULL);
	pthread_join(looker_thread, NULL);
	atomic_store(&consumers_over, true);
	pthread_join(consumer_thread, NULL);
	check_watchers();

	step(&director, "closing, while one still changes mappings");
	for (unsigned int i = 0; i < SHARED_WATCHERS; i++)
		watcher_close(&shared[i]);
	for (unsigned int i = 0; i < worker_count; i++)
		watcher_close(&workers[i].own);
	watcher_close(&giver_watcher);
	watcher_close(&heir_watcher);
	watcher_close(&looker_watcher);
	atomic_store(&noise_over, true);
	pthread_join(noise_thread, NULL);
	step(&director, "looking for what is still registered");
	if (count_registered(left, sizeof(left)))
		complain(&tally.wrong, "still registered after close: %s", left);
	close(copy);
	for (unsigned int i = 0; i < worker_count; i++)
		drop_leftovers(&workers[i]);
}

static void seed(struct actor *actor, const char *name, uint64_t value)
{
	actor->name = name;
	actor->random = value * UINT64_C(0x9E3779B97F4A7C15) | 1;
}

static void prepare(uint64_t value)
{
	struct sigaction action = { .sa_handler = unmap_in_handler };
	struct aioummu_support support;
	sigset_t signals;
	pthread_t watchdog;

	aioummu_probe(&support);
	if (support.error) {
		say("# skipped: the engine cannot run here: %s",
		    strerror(-support.error));
		_exit(77);
	}
	files = support.files;
	family_page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	map_what_is_dropped();
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	/* Small enough that free() gives memory back, brk and mappings both. */
	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	mallopt(M_TRIM_THRESHOLD, 64 << 10);
	mallopt(M_ARENA_MAX, 2);
	for (unsigned int i = 0; i < MAX_THREADS; i++)
		seed(&workers[i].actor, "a worker", value + i);
	seed(&consumer, "the consumer", value + 1001);
	seed(&giver, "the giver", value + 1002);
	seed(&heir, "the heir", value + 1003);
	seed(&noise, "the noise", value + 1004);
	seed(&forker, "the forker", value + 1005);
	seed(&director, "the director", value + 1006);
	seed(&dropper, "the dropper", value + 1007);
	seed(&looker, "the looker", value + 1008);
	sigaction(SIGUSR1, &action, NULL);
	sigfillset(&signals);
	sigdelset(&signals, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	if (pthread_create(&watchdog, NULL, look_for_hangs, NULL))
		_exit(2);
	pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
}

static uint64_t option(int count, char **arguments, const char *name,
		       uint64_t otherwise)
{
	for (int i = 1; i + 1 < count; i++)
		if (!strcmp(arguments[i], name))
			return strtoull(arguments[i + 1], NULL, 0);
	return otherwise;
}

int main(int count, char **arguments)
{
	uint64_t seconds = option(count, arguments, "--seconds", 60);
	uint64_t value = option(count, arguments, "--seed", time(NULL));

	patience = option(count, arguments, "--patience", 40);
	worker_count = option(count, arguments, "--threads", 4);
	if (!worker_count || worker_count > MAX_THREADS || !(count % 2)) {
		say("usage: stress [--seconds N] [--threads 1..%d] [--seed S] "
		    "[--patience N]", MAX_THREADS);
		return 2;
	}
	say("# seed %" PRIu64, value);
	prepare(value);
	/* In case that the thread which looks for hangs hangs itself. */
	alarm(seconds * 2 + 3 * patience);
	atomic_store(&director.active, true);
	for (uint64_t left = seconds; left && !has_failed(); ) {
		uint64_t now = left < ROUND_SECONDS ? left : ROUND_SECONDS;

		run_round(now);
		left -= now;
	}
	say("# looks=%" PRIu64 " when_busy=%" PRIu64, looks, looks_when_busy);
	say("# moves=%" PRIu64 " fenced=%" PRIu64 " fence_timeouts=%" PRIu64
	    " gave_up=%" PRIu64 " wrong=%" PRIu64, moves, fenced, fence_timeouts,
	    gave_up, tally.wrong);
	say("stress: seconds=%" PRIu64 " threads=%u changes=%" PRIu64
	    " events=%" PRIu64 " forks=%" PRIu64 " unfenced=%" PRIu64
	    " missed=%" PRIu64 " stale=%" PRIu64, seconds, worker_count,
	    tally.changes, tally.events, forks, unfenced, tally.missed,
	    tally.stale);
	return has_failed();
}
