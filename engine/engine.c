// SPDX-License-Identifier: MIT
/*
 * A thread that changes a watched mapping sleeps in the kernel until the event
 * that says so was read.  So whoever reads must never wait for that thread,
 * directly or not.  The engine's thread reads, and nothing else: it runs no signal
 * handler, allocates nothing, changes no mapping, and takes the lock only if it
 * is free.  What it has read it hands over through a ring.  Whoever holds the lock
 * looks into the ring before letting go for good, so that nothing stays there.
 *
 * Under the lock, nobody allocates either (other than by mmap), because malloc()
 * and free() change mappings; and nobody waits for events.
 *
 * "Has anything changed?" must be answered rightly as soon as the changing call
 * has returned, so before anybody can know what has changed.  The thread counts
 * each read in begun before and in finished after; a reader of begun who finds
 * the number that he knows can rely on everything being as it was.  Otherwise he
 * waits for that read to finish, and takes what it gave out of the ring.
 *
 * Whole mappings are registered with the userfaultfd: half a mapping would be
 * split, and mremap() would refuse to move or grow it.  The engine remembers what
 * it has registered ("coverage") and forgets it as events tell that it went away.
 *
 * What a region's state says is right for these reasons:
 *
 * - An unmapping or a move is reported when the memory has gone, and its call goes
 *   on after that.  Whoever asks later has it counted, as above.
 * - A region that was unmapped or moved in part is spent, and busy until it is
 *   armed again, because what is mapped there then is not watched.  Its number has
 *   risen, so that no state from before that time comes back.
 * - A drop of pages (MADV_DONTNEED, MADV_FREE, MADV_REMOVE) is reported *before* the
 *   pages go, and nothing says when they have gone.  So its range is remembered as
 *   a drop that may go on, and each region in it is busy.  A region that is looked
 *   at after that is not busy any more, or it was there before, and has it counted.
 * - To unmap the range does not end a drop: the thread comes back and drops what is
 *   mapped at its addresses by then.  Moved pages of a file are dropped where they
 *   have come to, if that is MADV_REMOVE, so a drop is remembered there as well.
 * - A drop has ended once each thread was seen outside of madvise() after the event
 *   was read: the thread that made it was inside then.  All threads are listed at
 *   one moment after it (a *round*), and each is looked at until it was outside
 *   (threads.h).  Drops are numbered; a round ends those that are older than it.
 * - There is room for so many drops.  What does not fit makes one of them wider.
 *
 * Unknown are processes that use this memory without being threads of it, except
 * for children of vfork(), whose parent waits.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/queue.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "descriptor.h"
#include "mappings.h"
#include "ranges.h"
#include "threads.h"

/* Not in the headers of older systems. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW		_IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY		1
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM	(1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC		(1 << 15)
#endif

#define NEEDED_FEATURES	(UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | \
			 UFFD_FEATURE_EVENT_REMOVE | \
			 UFFD_FEATURE_PAGEFAULT_FLAG_WP | \
			 UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
/* Without it, memory of files cannot be watched. */
#define WANTED_FEATURES	UFFD_FEATURE_WP_ASYNC

/* Enough for what happens while a holder of the lock is not running. */
#ifndef AIOUMMU_RING_SIZE
#define AIOUMMU_RING_SIZE	8192
#endif
/* The most mappings without a region that stay registered. */
#define IDLE_LIMIT	64
/* Room for what events split while nobody can get more. */
#define COVER_RESERVE	256
/* Regions that close() takes away before it lets others have the lock. */
#define CLOSE_BATCH	256
/* How often to try what others' changes of the same mappings can spoil. */
#define ATTEMPTS	100
/* Milliseconds after which the thread looks whether its descriptors are its own. */
#define POLL_TIMEOUT	1000
/* Drops of pages that may go on, before the next one makes one of them wider. */
#ifndef AIOUMMU_DROPS
#define AIOUMMU_DROPS		256
#endif
/* What looking for the end of drops leaves to others, in times that it takes. */
#define LOOK_REST		9
/* Nanoseconds for which a fence waits for a moment without any change. */
#define FENCE_PATIENCE	50000000
#define FIRST_CHUNK	(64u << 10)
#define CHUNKS		32
/* Of the thread's stack, in which its thread-local storage lies as well. */
#define SMALLEST_STACK	(1u << 20)
#define LARGEST_STACK	(1u << 30)

enum change_kind {
	CHANGE_DROPS_PAGES,
	CHANGE_UNMAPS,
	CHANGE_MOVES,
	/* Nobody knows what. */
	CHANGE_OF_ANY_KIND,
};

static const uint32_t causes[] = {
	[CHANGE_DROPS_PAGES]	= UMMUNOTIFY_EVENT_CAUSE_CLEAR,
	[CHANGE_UNMAPS]		= UMMUNOTIFY_EVENT_CAUSE_UNMAP,
	[CHANGE_MOVES]		= UMMUNOTIFY_EVENT_CAUSE_MOVE,
	[CHANGE_OF_ANY_KIND]	= 0,
};

/**
 * struct change - what an event says
 * @kind:	what happened to the range
 * @start:	first byte
 * @end:	first byte behind
 * @target:	first byte of where it was moved
 */
struct change {
	enum change_kind	kind;
	uint64_t		start;
	uint64_t		end;
	uint64_t		target;
};

/**
 * struct region - a range that a notifier watches
 * @range:	in engine.regions
 * @cookie:	in the notifier's cookies, where start is the number
 * @notifier:	whose it is
 * @reported:	in the notifier's reports, if pending
 * @hint_start:	first byte of what is to be reported
 * @hint_end:	first byte behind
 * @causes:	UMMUNOTIFY_EVENT_CAUSE_ flags of all that is to be reported
 * @wanted:	those that it asks for
 * @changes:	what was done to it of that, and how often it became spent
 * @once:	the read that takes its report unregisters it
 * @pending:	there is a report that nobody has read
 * @exact:	there was one invalidation since the last read
 * @spent:	a part of it is not watched any more
 */
struct region {
	struct range		range;
	struct range		cookie;
	struct notifier		*notifier;
	TAILQ_ENTRY(region)	reported;
	uint64_t		hint_start;
	uint64_t		hint_end;
	uint32_t		causes;
	uint32_t		wanted;
	uint64_t		changes;
	bool			once;
	bool			pending;
	bool			exact;
	bool			spent;
};

/**
 * struct bell - a pipe, of which only matters whether it is empty
 * @out:	readable if not
 * @in:		the other end
 */
struct bell {
	struct descriptor	out;
	struct descriptor	in;
};

/**
 * struct notifier - what an open device is to the driver
 * @number:	in engine.notifiers, where start is the number
 * @cookies:	its regions by cookie
 * @regions:	how many
 * @reports:	regions with a report pending
 * @generation:	invalidations so far
 * @last_change:	the one that raised the generation last
 * @last_due:	a LAST record is due behind the reports; whenever it is, and
 *		only then, the doorbell has been rung
 * @doorbell:	readable while there is something to read
 */
struct notifier {
	struct range		number;
	struct range		*cookies;
	uint32_t		regions;
	TAILQ_HEAD(, region)	reports;
	uint64_t		generation;
	uint64_t		last_change;
	bool			last_due;
	struct bell		doorbell;
};

/**
 * struct cover - a mapping that was registered with the userfaultfd
 * @range:	in engine.coverage
 * @certain:	it was a whole mapping, of which no event has taken a part; it can
 *		have changed without one, and before its event
 * @idle:	it is among engine.idle
 * @link:	there
 */
struct cover {
	struct range		range;
	bool			certain;
	bool			idle;
	TAILQ_ENTRY(cover)	link;
};

/**
 * struct drop - pages that may still be being dropped
 * @range:	in engine.drops; they do not overlap
 * @number:	of the latest event in it, 0 if this one is not in use
 */
struct drop {
	struct range		range;
	uint64_t		number;
};

struct free_object {
	struct free_object	*next;
};

/**
 * struct pool - objects of one size; memory comes from mmap() and stays
 * @size:	of an object in bytes
 * @free:	unused ones
 * @available:	how many of them
 * @chunks:	where they lie
 * @chunk_sizes:	in bytes
 * @chunk_count:	how many
 */
struct pool {
	size_t			size;
	struct free_object	*free;
	size_t			available;
	void			*chunks[CHUNKS];
	size_t			chunk_sizes[CHUNKS];
	unsigned int		chunk_count;
};

/**
 * struct page - read by everybody, mapped for ever, wiped in forked children
 * @begun:	reads of the userfaultfd that may have begun
 * @owned:	1; in a child that fork() handlers do not know about: 0
 */
struct page {
	_Atomic uint64_t	begun;
	_Atomic uint32_t	owned;
};

/**
 * struct engine - all there is
 * @lifecycle:	held while the engine starts or stops
 * @running:	there is a thread; changes under both locks
 * @lock:	protects what follows, up to the part of the thread
 * @userfaultfd:	where the events come from
 * @maps:	/proc/self/maps
 * @mappings:	where to look mappings up
 * @regions:	of all notifiers, by address
 * @notifiers:	by number
 * @coverage:	registered mappings, by address; they do not overlap
 * @idle:	those that nobody may need any more, oldest first
 * @idle_count:	how many
 * @forgotten_start:	registered mappings that there was no room to remember
 * @forgotten_end:	lie in here
 * @region_pool:	where regions come from
 * @notifier_pool:	where notifiers come from
 * @cover_pool:	where coverage comes from
 * @drops:	ranges whose pages may still be being dropped, by address
 * @unused_drops:	of the table, linked by @right
 * @drop_table:	where they all lie
 * @drop_number:	of the latest event that says so; never falls
 * @change_number:	of the change being applied
 * @last_number:	of the newest notifier; numbers are not used again
 * @random:	the last random number
 * @looking:	held while somebody looks what threads do, before @lock if both are;
 *		protects the next two
 * @threads:	those that the round waits for
 * @round:	number of the last drop that it ends, 0 if there is none
 * @looked:	number of the last drop that was looked for
 * @next_look:	when the next look for the same drops may be
 * @wake:	has the thread look around
 * @thread:	the thread
 * @thread_number:	its number
 * @stack:	its stack, between two inaccessible pages
 * @stack_size:	in bytes, with them
 * @page:	see there
 * @finished:	reads of the userfaultfd that are over and in the ring
 * @stopping:	the thread is to end
 * @ended:	the thread does not use the userfaultfd any more
 * @dead:	the thread has ended because the userfaultfd broke
 * @ring:	changes from the thread to the holder of the lock
 * @ring_in:	changes put there so far
 * @ring_out:	changes taken from there so far
 * @overrun:	changes were lost because the ring was full
 * @handover:	orders letting go of the lock and looking into the ring with
 *		putting something there and trying the lock
 */
static struct engine {
	pthread_mutex_t		lifecycle;
	bool			running;

	pthread_mutex_t		lock;
	struct descriptor	userfaultfd;
	struct descriptor	maps;
	struct mappings		mappings;
	struct range		*regions;
	struct range		*notifiers;
	struct range		*coverage;
	TAILQ_HEAD(, cover)	idle;
	unsigned int		idle_count;
	uint64_t		forgotten_start;
	uint64_t		forgotten_end;
	struct pool		region_pool;
	struct pool		notifier_pool;
	struct pool		cover_pool;
	struct range		*drops;
	struct range		*unused_drops;
	struct drop		drop_table[AIOUMMU_DROPS];
	uint64_t		drop_number;
	uint64_t		change_number;
	int			last_number;
	uint32_t		random;

	pthread_mutex_t		looking;
	struct threads		threads;
	uint64_t		round;
	_Atomic uint64_t	looked;
	_Atomic uint64_t	next_look;

	struct bell		wake;
	pthread_t		thread;
	_Atomic pid_t		thread_number;
	void			*stack;
	size_t			stack_size;
	struct page *_Atomic	page;
	_Atomic uint64_t	finished;
	atomic_bool		stopping;
	atomic_bool		ended;
	atomic_bool		dead;
	struct change		ring[AIOUMMU_RING_SIZE];
	_Atomic uint32_t	ring_in;
	_Atomic uint32_t	ring_out;
	atomic_bool		overrun;
	_Atomic uint32_t	handover;
} engine = {
	.lifecycle = PTHREAD_MUTEX_INITIALIZER,
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.userfaultfd = { .fd = -1 },
	.maps = { .fd = -1 },
	.looking = PTHREAD_MUTEX_INITIALIZER,
	.threads = { .directory = { .fd = -1 } },
	.wake = { .out = { .fd = -1 }, .in = { .fd = -1 } },
};

#define container_of(pointer, type, member) \
	((type *)((char *)(pointer) - offsetof(type, member)))

/* ---------------------------------------------------------------- memory --- */

/*
 * Not part of any mapping that others have: the kernel merges mappings only if
 * they are alike, and no other is wiped in children.
 */
static void *map_memory(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	if (madvise(memory, size, MADV_WIPEONFORK)) {
		munmap(memory, size);
		return NULL;
	}
	return memory;
}

static void *pool_take(struct pool *pool)
{
	struct free_object *object = pool->free;

	if (!object)
		return NULL;
	pool->free = object->next;
	pool->available--;
	memset(object, 0, pool->size);
	return object;
}

static void pool_give(struct pool *pool, void *memory)
{
	struct free_object *object = memory;

	object->next = pool->free;
	pool->free = object;
	pool->available++;
}

/* Makes sure that so many objects can be taken. */
static int pool_reserve(struct pool *pool, size_t count)
{
	while (pool->available < count) {
		unsigned int n = pool->chunk_count;
		size_t size;
		char *chunk, *object;

		if (n == CHUNKS)
			return -ENOMEM;
		size = n ? 2 * pool->chunk_sizes[n - 1] : FIRST_CHUNK;
		chunk = map_memory(size);
		if (!chunk)
			return -ENOMEM;
		pool->chunks[n] = chunk;
		pool->chunk_sizes[n] = size;
		pool->chunk_count = n + 1;
		/* From behind, so that they are taken in order. */
		object = chunk + size / pool->size * pool->size;
		while (object > chunk)
			pool_give(pool, object -= pool->size);
	}
	return 0;
}

static void pool_release(struct pool *pool, size_t object_size)
{
	while (pool->chunk_count) {
		unsigned int n = --pool->chunk_count;

		munmap(pool->chunks[n], pool->chunk_sizes[n]);
	}
	*pool = (struct pool) { .size = object_size };
}

static void reset_pools(void)
{
	pool_release(&engine.region_pool, sizeof(struct region));
	pool_release(&engine.notifier_pool, sizeof(struct notifier));
	pool_release(&engine.cover_pool, sizeof(struct cover));
}

/* Xorshift, which need not be better than random enough for a treap. */
static uint32_t random_priority(void)
{
	engine.random ^= engine.random << 13;
	engine.random ^= engine.random >> 17;
	engine.random ^= engine.random << 5;
	return engine.random;
}

/* ------------------------------------------------------------------ bells --- */

static int bell_open(struct bell *bell)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
		return -errno;
	own(&bell->out, ends[0]);
	own(&bell->in, ends[1]);
	return 0;
}

static void bell_close(struct bell *bell)
{
	close_owned(&bell->out);
	close_owned(&bell->in);
}

/* Neither call can wait; if the pipe is full, that is fine as well. */
static void ring(const struct bell *bell)
{
	/* As long as the engine works, nobody has closed anything. */
	if (atomic_load(&engine.dead) && !is_owned(&bell->in))
		return;
	while (write(bell->in.fd, "", 1) < 0 && errno == EINTR)
		;
}

static void quiet(const struct bell *bell)
{
	char bytes[16];

	if (atomic_load(&engine.dead) && !is_owned(&bell->out))
		return;
	while (read(bell->out.fd, bytes, sizeof(bytes)) < 0 && errno == EINTR)
		;
}

/* -------------------------------------------------------------- reporting --- */

/* Something became readable. */
static void ring_doorbell(struct notifier *notifier)
{
	notifier->last_due = true;
	ring(&notifier->doorbell);
}

static void quiet_doorbell(struct notifier *notifier)
{
	notifier->last_due = false;
	quiet(&notifier->doorbell);
}

static void drop_report(struct region *region)
{
	region->pending = false;
	TAILQ_REMOVE(&region->notifier->reports, region, reported);
}

/* Nobody can do without what may be anything. */
static bool asks_for(const struct region *region, enum change_kind kind)
{
	return !causes[kind] || region->wanted & causes[kind];
}

static void hit(struct range *range, void *context)
{
	struct region *region = container_of(range, struct region, range);
	struct notifier *notifier = region->notifier;
	const struct change *change = context;
	bool asked = asks_for(region, change->kind);

	if (change->kind != CHANGE_DROPS_PAGES)
		region->spent = true;
	else if (!asked)
		return;
	region->changes++;
	if (!asked)
		return;
	if (notifier->last_change != engine.change_number) {
		notifier->last_change = engine.change_number;
		notifier->generation++;
	}
	if (region->pending) {
		region->exact = false;
		region->causes |= causes[change->kind];
		return;
	}
	region->pending = true;
	region->exact = true;
	region->causes = causes[change->kind];
	region->hint_start = change->start > range->start ? change->start :
							    range->start;
	region->hint_end = change->end < range->end ? change->end : range->end;
	TAILQ_INSERT_TAIL(&notifier->reports, region, reported);
	if (!notifier->last_due)
		ring_doorbell(notifier);
}

/* ---------------------------------------------------------------- waiting --- */

/* Nanoseconds. */
static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * UINT64_C(1000000000) + time.tv_nsec;
}

/* Waits, for longer with each call. */
static void back_off(unsigned int attempt)
{
	struct timespec delay = { .tv_nsec = 50000 };

	if (attempt < 20)
		sched_yield();
	else
		/* The other may have a lower priority. */
		nanosleep(&delay, NULL);
}

/* Waits until everything that was read before this call is in the ring. */
static void settle(void)
{
	struct page *page = atomic_load(&engine.page);
	uint64_t begun = atomic_load(&page->begun);

	for (unsigned int i = 0; atomic_load(&engine.finished) < begun; i++) {
		if (i >= 100)
			back_off(i - 100);
#if defined(__x86_64__) || defined(__i386__)
		__builtin_ia32_pause();
#endif
	}
}

/*
 * Whether anybody who changes a registered mapping has not been told yet that his
 * event was read.  Then this gives EAGAIN, and otherwise EINVAL, as it protects
 * nothing.
 */
static bool is_anything_under_way(void)
{
	struct uffdio_writeprotect nothing = { .mode = 0 };

	return ioctl(engine.userfaultfd.fd, UFFDIO_WRITEPROTECT, &nothing) &&
	       errno == EAGAIN;
}

/* --------------------------------------------------------------- coverage --- */

/* Grows engine.forgotten so that it has this range in it. */
static void forget(uint64_t start, uint64_t end)
{
	if (engine.forgotten_start == engine.forgotten_end) {
		engine.forgotten_start = start;
		engine.forgotten_end = end;
		return;
	}
	if (start < engine.forgotten_start)
		engine.forgotten_start = start;
	if (end > engine.forgotten_end)
		engine.forgotten_end = end;
}

static void leave_idle(struct cover *cover)
{
	if (cover->idle) {
		cover->idle = false;
		TAILQ_REMOVE(&engine.idle, cover, link);
		engine.idle_count--;
	}
}

static void enter_idle(struct cover *cover)
{
	if (!cover->idle) {
		cover->idle = true;
		TAILQ_INSERT_TAIL(&engine.idle, cover, link);
		engine.idle_count++;
	}
}

/* Nothing overlaps it.  If there is no room, it is forgotten. */
static void add_cover(uint64_t start, uint64_t end, bool certain, bool idle)
{
	struct cover *cover = pool_take(&engine.cover_pool);

	if (!cover) {
		forget(start, end);
		return;
	}
	cover->range.start = start;
	cover->range.end = end;
	cover->range.priority = random_priority();
	cover->certain = certain;
	ranges_insert(&engine.coverage, &cover->range);
	if (idle)
		enter_idle(cover);
}

static struct cover *find_cover(uint64_t start, uint64_t end)
{
	struct range *range = ranges_overlapping(engine.coverage, start, end);

	return range ? container_of(range, struct cover, range) : NULL;
}

/* What is in this range is not registered any more. */
static void remove_cover(uint64_t start, uint64_t end)
{
	struct cover *cover;

	while ((cover = find_cover(start, end))) {
		struct cover old = *cover;

		ranges_remove(&engine.coverage, &cover->range);
		leave_idle(cover);
		pool_give(&engine.cover_pool, cover);
		if (old.range.start < start)
			add_cover(old.range.start, start, old.certain, old.idle);
		if (old.range.end > end)
			add_cover(end, old.range.end, old.certain, old.idle);
	}
}

/*
 * What was mapped in this range has gone, and nobody knows whether what is mapped
 * there now is registered: the event may be older than that.  So it is released in
 * its turn, and not relied on.
 */
static void doubt_cover(uint64_t start, uint64_t end)
{
	struct mapping mapping;

	if (!find_cover(start, end))
		return;
	remove_cover(start, end);
	if (engine.mappings.indexed &&
	    (mapping_at_or_behind(&engine.mappings, start, &mapping) ||
	     mapping.start >= end))
		return;
	add_cover(start, end, false, true);
}

/* ------------------------------------------------------------------ drops --- */

static struct drop *find_drop(uint64_t start, uint64_t end)
{
	struct range *range = ranges_overlapping(engine.drops, start, end);

	return range ? container_of(range, struct drop, range) : NULL;
}

static void free_drop(struct drop *drop)
{
	drop->number = 0;
	drop->range.right = engine.unused_drops;
	engine.unused_drops = &drop->range;
}

static void remove_drop(struct drop *drop)
{
	ranges_remove(&engine.drops, &drop->range);
	free_drop(drop);
}

/* The one to be made wider if there is no room for this range: the nearest. */
static struct drop *nearest_drop(uint64_t start, uint64_t end)
{
	struct range *before = ranges_before(engine.drops, start);
	struct drop *behind = find_drop(end, UINT64_MAX);

	if (behind && (!before || behind->range.start - end < start - before->end))
		return behind;
	return container_of(before, struct drop, range);
}

/* Takes a drop away; the range is then one that has both in it. */
static void absorb(struct drop *drop, uint64_t *start, uint64_t *end)
{
	if (drop->range.start < *start)
		*start = drop->range.start;
	if (drop->range.end > *end)
		*end = drop->range.end;
	remove_drop(drop);
}

/* The pages in this range are about to go, and nothing will tell when they have. */
static void remember_drop(uint64_t start, uint64_t end)
{
	struct drop *drop;

	while ((drop = find_drop(start, end)))
		absorb(drop, &start, &end);
	if (!engine.unused_drops)
		absorb(nearest_drop(start, end), &start, &end);
	drop = container_of(engine.unused_drops, struct drop, range);
	engine.unused_drops = drop->range.right;
	*drop = (struct drop) {
		.range = {
			.start = start, .end = end, .priority = random_priority(),
		},
		.number = ++engine.drop_number,
	};
	ranges_insert(&engine.drops, &drop->range);
}

/* Those up to this number have ended. */
static void end_drops(uint64_t number)
{
	for (unsigned int i = 0; i < AIOUMMU_DROPS; i++) {
		struct drop *drop = &engine.drop_table[i];

		if (drop->number && drop->number <= number)
			remove_drop(drop);
	}
}

static void forget_drops(void)
{
	engine.drops = NULL;
	engine.unused_drops = NULL;
	for (unsigned int i = 0; i < AIOUMMU_DROPS; i++)
		free_drop(&engine.drop_table[i]);
}

/* ---------------------------------------------------------------- changes --- */

static void apply(struct change *change)
{
	uint64_t length = change->end - change->start;

	/* mremap() of length 0 takes nothing away, it maps the same pages twice. */
	if (length) {
		engine.change_number++;
		ranges_visit(engine.regions, change->start, change->end, hit,
			     change);
	}
	if (change->kind == CHANGE_DROPS_PAGES) {
		remember_drop(change->start, change->end);
	} else if (change->kind == CHANGE_UNMAPS) {
		doubt_cover(change->start, change->end);
	} else if (change->kind == CHANGE_MOVES) {
		/*
		 * Which may be longer now; it is looked up when it is released.
		 * An unmapping of the source follows, unless it is kept.
		 */
		uint64_t end = change->target + (length ? length : 1);

		if (find_drop(change->start, change->end))
			remember_drop(change->target, end);
		remove_cover(change->target, end);
		add_cover(change->target, end, false, true);
	}
}

/* Nobody knows what has changed, so everything has. */
static void invalidate_everything(void)
{
	struct change change = { CHANGE_OF_ANY_KIND, 0, UINT64_MAX, 0 };

	remove_cover(0, UINT64_MAX);
	apply(&change);
	/* It was not one change, which each report now says it was. */
	ranges_visit(engine.regions, 0, UINT64_MAX, hit, &change);
	remember_drop(0, UINT64_MAX);
	/* Still registered, mostly, and moved to who knows where. */
	forget(0, UINT64_MAX);
}

/*
 * Applies what the thread has put into the ring until now, and no more: others
 * may change mappings faster than this is done.
 */
static void empty_ring(void)
{
	uint32_t out = atomic_load_explicit(&engine.ring_out,
					    memory_order_relaxed);
	uint32_t in = atomic_load_explicit(&engine.ring_in,
					   memory_order_acquire);

	while (out != in) {
		struct change change = engine.ring[out % AIOUMMU_RING_SIZE];

		atomic_store_explicit(&engine.ring_out, ++out,
				      memory_order_release);
		apply(&change);
	}
	if (atomic_exchange(&engine.overrun, false))
		invalidate_everything();
}

/* ---------------------------------------------------- watching mappings --- */

static bool is_wanted(uint64_t start, uint64_t end)
{
	return ranges_overlapping(engine.regions, start, end);
}

/* Makes the kernel send events; harmless for what is registered already. */
static int register_range(uint64_t start, uint64_t end)
{
	struct uffdio_register argument = {
		.range.start = start,
		.range.len = end - start,
		.mode = UFFDIO_REGISTER_MODE_WP,
	};

	return ioctl(engine.userfaultfd.fd, UFFDIO_REGISTER, &argument) ? -errno : 0;
}

/* Whether a mapping starts right at this address. */
static bool starts_mapping(uint64_t address)
{
	struct mapping mapping;

	return !mapping_at_or_behind(&engine.mappings, address, &mapping) &&
	       mapping.start == address;
}

/*
 * Unregisters mappings in which nobody has a region.  Always whole ones, whatever
 * they have become since they were registered.
 */
static void unregister_mappings(uint64_t start, uint64_t end)
{
	struct mapping mapping;
	bool had_neighbour;

	while (start < end) {
		struct uffdio_range range;

		if (mapping_at_or_behind(&engine.mappings, start, &mapping) ||
		    mapping.start >= end)
			break;
		start = mapping.end;
		remove_cover(mapping.start, mapping.end);
		if (is_wanted(mapping.start, mapping.end)) {
			/* It has become one with a mapping that stays. */
			add_cover(mapping.start, mapping.end, true, false);
			continue;
		}
		/*
		 * Fails for what is another userfaultfd's: that has to stay, and
		 * before Linux 6.15 unregistering did not look whose it is.
		 */
		if (register_range(mapping.start, mapping.end))
			continue;
		range.start = mapping.start;
		range.len = mapping.end - mapping.start;
		had_neighbour = starts_mapping(mapping.end);
		ioctl(engine.userfaultfd.fd, UFFDIO_UNREGISTER, &range);
		/* If it grew meanwhile, then the rest is still registered. */
		if (!had_neighbour && end == mapping.end && starts_mapping(end))
			end++;
	}
}

static void release_cover(const struct cover *cover)
{
	uint64_t start = cover->range.start, end = cover->range.end;

	/* It may be in no mapping at all any more. */
	remove_cover(start, end);
	unregister_mappings(start, end);
}

/* What a region leaves behind: a mapping that the next one is likely to be in. */
static void find_idle(uint64_t start, uint64_t end)
{
	struct cover *cover;

	while ((cover = find_cover(start, end))) {
		if (!is_wanted(cover->range.start, cover->range.end))
			enter_idle(cover);
		start = cover->range.end;
		if (start >= end)
			break;
	}
	while (engine.idle_count > IDLE_LIMIT) {
		cover = TAILQ_FIRST(&engine.idle);
		leave_idle(cover);
		if (!is_wanted(cover->range.start, cover->range.end))
			release_cover(cover);
	}
}

/*
 * Registers a whole mapping.  -EAGAIN if it has changed since it was looked up, so
 * that something else may have been registered.
 */
static int register_mapping(const struct mapping *mapping)
{
	bool had_neighbour = starts_mapping(mapping->end);
	struct mapping now;
	int error;

	remove_cover(mapping->start, mapping->end);
	add_cover(mapping->start, mapping->end, true, false);
	error = register_range(mapping->start, mapping->end);
	if (!had_neighbour &&
	    !mapping_at_or_behind(&engine.mappings, mapping->end, &now) &&
	    now.start == mapping->end) {
		/* If it grew meanwhile, it was split; this makes it one again. */
		remove_cover(now.start, now.end);
		add_cover(now.start, now.end, true, true);
		register_range(now.start, now.end);
		return -EAGAIN;
	}
	/*
	 * If it went away and another like it came, then after it had been
	 * registered: an event is on its way.
	 */
	if (mapping_at_or_behind(&engine.mappings, mapping->start, &now) ||
	    now.start != mapping->start || now.end != mapping->end)
		return -EAGAIN;
	return error;
}

static int refuse(struct aioummu_refusal *refusal, uint64_t start, uint64_t end,
		  int error)
{
	refusal->start = start;
	refusal->end = end;
	/* Somebody has closed the descriptors, and the thread does not know yet. */
	return error == -EBADF || error == -ENOTTY ? -ENOTRECOVERABLE : error;
}

/*
 * Has the mappings in a range registered, which are then watched.
 *
 * What is known to be covered is registered again: it may have gone without an
 * event (shmdt() sends none), or before its event, when the addresses can be
 * somebody else's already, the caller's for one.
 */
static int cover(uint64_t start, uint64_t end, struct aioummu_refusal *refusal)
{
	unsigned int attempts = 0;

	while (start < end) {
		struct cover *known = find_cover(start, start + 1);
		struct mapping mapping;
		int error;

		/* Without an index, looking it up would cost far more than this. */
		if (known && known->certain && !engine.mappings.indexed &&
		    !is_anything_under_way() &&
		    !register_range(known->range.start, known->range.end)) {
			start = known->range.end;
			continue;
		}
		error = mapping_at_or_behind(&engine.mappings, start, &mapping);
		if (error && error != -ENOENT)
			return refuse(refusal, start, end, error);
		if (error || mapping.start > start)
			return refuse(refusal, start,
				      error || mapping.start > end ?
				      end : mapping.start, -EFAULT);
		if (known && known->range.start == mapping.start &&
		    known->range.end == mapping.end &&
		    !register_range(mapping.start, mapping.end)) {
			start = mapping.end;
			continue;
		}
		if (pool_reserve(&engine.cover_pool, COVER_RESERVE))
			return refuse(refusal, start, end, -ENOMEM);
		error = register_mapping(&mapping);
		if (!error) {
			start = mapping.end;
			continue;
		}
		find_idle(mapping.start, mapping.end);
		if (error != -EAGAIN || ++attempts == ATTEMPTS)
			return refuse(refusal, mapping.start, mapping.end, error);
	}
	return 0;
}

/* --------------------------------------------------------------- the lock --- */

static bool ring_is_empty(void)
{
	return atomic_load(&engine.ring_in) == atomic_load(&engine.ring_out) &&
	       !atomic_load(&engine.overrun);
}

static void wake_thread(void)
{
	ring(&engine.wake);
}

/* Gives up the lock, but leaves nothing in the ring that nobody looks after. */
static void let_go(void)
{
	for (unsigned int pass = 0; pass < 2; pass++) {
		pthread_mutex_unlock(&engine.lock);
		/*
		 * Either the thread sees that the lock is free, or it is seen
		 * here what it has put into the ring.
		 */
		atomic_fetch_add(&engine.handover, 1);
		if (ring_is_empty() || pthread_mutex_trylock(&engine.lock))
			return;
		empty_ring();
	}
	pthread_mutex_unlock(&engine.lock);
	/* It applies everything before it reads more, and so slows the others. */
	wake_thread();
}

/* A child that was forked behind the C library's back has a copy of everything. */
static bool is_copy(void)
{
	struct page *page = atomic_load(&engine.page);

	return page && !atomic_load(&page->owned);
}

/*
 * Takes the lock, with every change applied whose call has returned.  Fails with
 * -EBADF if no notifier is open, with -EOWNERDEAD in a copy.
 */
static int enter(void)
{
	if (!atomic_load(&engine.page))
		return -EBADF;
	if (is_copy())
		return -EOWNERDEAD;
	settle();
	pthread_mutex_lock(&engine.lock);
	if (!engine.running) {
		pthread_mutex_unlock(&engine.lock);
		return -EBADF;
	}
	/* If that fails, some coverage may be forgotten. */
	pool_reserve(&engine.cover_pool, COVER_RESERVE);
	empty_ring();
	return 0;
}

static struct notifier *find_notifier(int number)
{
	struct range *range = ranges_starting_at(engine.notifiers, number);

	return range ? container_of(range, struct notifier, number) : NULL;
}

static struct region *find_region(struct notifier *notifier, uint64_t cookie)
{
	struct range *range = ranges_starting_at(notifier->cookies, cookie);

	return range ? container_of(range, struct region, cookie) : NULL;
}

/* As enter(), and returns the notifier, or NULL and the error. */
static struct notifier *enter_notifier(int number, int *error)
{
	struct notifier *notifier;

	*error = enter();
	if (*error)
		return NULL;
	notifier = find_notifier(number);
	if (!notifier) {
		*error = -EBADF;
		let_go();
	}
	return notifier;
}

/* As enter_notifier(), and returns a region. */
static struct region *enter_region(int number, uint64_t cookie, int *error)
{
	struct notifier *notifier = enter_notifier(number, error);
	struct region *region;

	if (!notifier)
		return NULL;
	region = find_region(notifier, cookie);
	if (!region) {
		*error = -ENOENT;
		let_go();
	}
	return region;
}

/* ------------------------------------------------------------- the thread --- */

/* For the holder of the lock; nothing is lost if the ring is full. */
static void put(const struct change *change)
{
	uint32_t in = atomic_load_explicit(&engine.ring_in, memory_order_relaxed);

	if (in - atomic_load(&engine.ring_out) == AIOUMMU_RING_SIZE) {
		atomic_store(&engine.overrun, true);
		return;
	}
	engine.ring[in % AIOUMMU_RING_SIZE] = *change;
	atomic_store(&engine.ring_in, in + 1);
}

static void put_event(const struct uffd_msg *message)
{
	struct change change;

	switch (message->event) {
	case UFFD_EVENT_REMOVE:
		change.kind = CHANGE_DROPS_PAGES;
		break;
	case UFFD_EVENT_UNMAP:
		change.kind = CHANGE_UNMAPS;
		break;
	case UFFD_EVENT_REMAP:
		change.kind = CHANGE_MOVES;
		change.start = message->arg.remap.from;
		change.end = change.start + message->arg.remap.len;
		change.target = message->arg.remap.to;
		put(&change);
		return;
	default:
		/* Page faults: there are none as long as nothing is protected. */
		return;
	}
	change.start = message->arg.remove.start;
	change.end = message->arg.remove.end;
	change.target = 0;
	put(&change);
}

/* Reads one event, if there is one; returns false if there never will be. */
static bool read_event(void)
{
	struct page *page = atomic_load(&engine.page);
	struct uffd_msg message;
	uint64_t number;
	ssize_t length;
	int error;

	number = atomic_load_explicit(&page->begun, memory_order_relaxed);
	atomic_store(&page->begun, number + 1);
	/* From here on the thread that made the change may go on. */
	length = read(engine.userfaultfd.fd, &message, sizeof(message));
	error = length < 0 ? errno : 0;
	if (length == sizeof(message))
		put_event(&message);
	atomic_store(&engine.finished, number + 1);
	return length == sizeof(message) || error == EAGAIN || error == EINTR;
}

/* Returns false if the descriptors are no good any more. */
static bool wait_for_event(void)
{
	const struct timespec delay = { .tv_nsec = 1000000 };
	const short broken = POLLERR | POLLHUP | POLLNVAL;
	struct pollfd polled[] = {
		{ .fd = engine.userfaultfd.fd, .events = POLLIN },
		{ .fd = engine.wake.out.fd, .events = POLLIN },
	};

	switch (poll(polled, 2, POLL_TIMEOUT)) {
	case -1:
		/* A process can forbid it to itself: RLIMIT_NOFILE, seccomp. */
		nanosleep(&delay, NULL);
		return true;
	case 0:
		/* If not, then nothing would ever wake it. */
		return is_owned(&engine.userfaultfd) && is_owned(&engine.wake.out);
	default:
		if (polled[1].revents & POLLIN)
			quiet(&engine.wake);
		/* If not, it would read what is meant for somebody else. */
		return !((polled[0].revents | polled[1].revents) & broken) &&
		       is_owned(&engine.userfaultfd);
	}
}

/* Somebody has closed the descriptors, for example: nothing is known any more. */
static void give_up(void)
{
	struct page *page = atomic_load(&engine.page);

	atomic_store(&engine.dead, true);
	atomic_store(&engine.overrun, true);
	atomic_store(&engine.finished, atomic_fetch_add(&page->begun, 1) + 1);
}

static void *run(void *unused)
{
	bool works = true;

	(void)unused;
	pthread_setname_np(pthread_self(), "aioummu");
	atomic_store(&engine.thread_number, (pid_t)syscall(SYS_gettid));
	while (works && !atomic_load(&engine.stopping)) {
		works = wait_for_event() && read_event();
		if (!works)
			give_up();
		atomic_fetch_add(&engine.handover, 1);
		if (!ring_is_empty() && !pthread_mutex_trylock(&engine.lock)) {
			empty_ring();
			let_go();
		}
	}
	atomic_store(&engine.ended, true);
	return NULL;
}

/* ------------------------------------------------------ starting, stopping --- */

/* A negative errno, or a descriptor that has not said yet what it wants. */
static int open_userfaultfd(bool *through_device)
{
	const int flags = O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY;
	int fd, device, error;

	fd = (int)syscall(SYS_userfaultfd, flags);
	if (fd >= 0)
		return fd;
	error = -errno;
	/* A container's profile may refuse the call, and still have this. */
	device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device < 0)
		return error;
	fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
	close(device);
	*through_device = fd >= 0;
	return fd < 0 ? error : fd;
}

/* Asks for features; returns those that there are. */
static int negotiate(int fd, uint64_t *features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = *features };

	if (ioctl(fd, UFFDIO_API, &api))
		return -errno;
	*features = api.features;
	return 0;
}

void aioummu_probe(struct aioummu_support *support)
{
	struct mappings mappings;
	bool through_device = false;
	int fd;

	*support = (struct aioummu_support) { 0 };
	/* A throw-away descriptor: each can be asked only once. */
	fd = open_userfaultfd(&through_device);
	if (fd < 0) {
		support->error = fd;
		return;
	}
	support->error = negotiate(fd, &support->features);
	close(fd);
	support->through_device = through_device;
	if (support->error)
		return;
	support->files = !!(support->features & WANTED_FEATURES);
	if ((support->features & NEEDED_FEATURES) != NEEDED_FEATURES) {
		support->error = -EOPNOTSUPP;
		return;
	}
	support->error = mappings_open(&mappings);
	if (!support->error)
		close(mappings.fd);
}

static int open_threads(void)
{
	int error;

	pthread_mutex_lock(&engine.looking);
	engine.round = 0;
	error = threads_open(&engine.threads);
	pthread_mutex_unlock(&engine.looking);
	return error;
}

static void close_threads(void)
{
	pthread_mutex_lock(&engine.looking);
	engine.round = 0;
	threads_close(&engine.threads);
	pthread_mutex_unlock(&engine.looking);
}

static void close_descriptors(void)
{
	close_threads();
	close_owned(&engine.userfaultfd);
	close_owned(&engine.maps);
	bell_close(&engine.wake);
}

static void free_stack(void)
{
	if (engine.stack)
		munmap(engine.stack, engine.stack_size);
	engine.stack = NULL;
}

/*
 * The inaccessible pages at its ends keep it apart from mappings that others have
 * watched.  It is not wiped in children: fork() of glibc looks into it there.
 */
static int map_stack(size_t size)
{
	const size_t page = sysconf(_SC_PAGESIZE);
	void *stack;

	stack = mmap(NULL, size + 2 * page, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (stack == MAP_FAILED)
		return -ENOMEM;
	engine.stack = stack;
	engine.stack_size = size + 2 * page;
	if (mprotect((char *)stack + page, size, PROT_READ | PROT_WRITE))
		return -errno;
	return 0;
}

static void release_resources(void)
{
	close_descriptors();
	reset_pools();
	free_stack();
}

/* From 1 on: in a copy it is wiped, and 0 is no number that anybody knows. */
static void take_page(struct page *page)
{
	atomic_store(&engine.finished, 1);
	atomic_store(&page->begun, 1);
	atomic_store(&page->owned, 1);
}

/* All of it belongs to the parent.  No other thread is here. */
static void after_fork_in_child(void)
{
	struct page *page = atomic_load(&engine.page);

	engine.lifecycle = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	engine.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	engine.looking = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	if (!page)
		return;
	release_resources();
	engine.running = false;
	engine.regions = NULL;
	engine.notifiers = NULL;
	engine.coverage = NULL;
	take_page(page);
}

static int fork_handler_error;

/* Before anybody can fork in here. */
__attribute__((constructor)) static void handle_forks(void)
{
	fork_handler_error = pthread_atfork(NULL, NULL, after_fork_in_child);
}

static int open_descriptors(void)
{
	struct aioummu_support support;
	bool through_device;
	uint64_t features;
	int fd, error;

	aioummu_probe(&support);
	if (support.error)
		return support.error;
	fd = open_userfaultfd(&through_device);
	if (fd < 0)
		return fd;
	own(&engine.userfaultfd, fd);
	features = NEEDED_FEATURES | (support.features & WANTED_FEATURES);
	error = negotiate(engine.userfaultfd.fd, &features);
	if (error)
		return error;
	error = mappings_open(&engine.mappings);
	if (error)
		return error;
	own(&engine.maps, engine.mappings.fd);
	error = open_threads();
	if (error)
		return error;
	return bell_open(&engine.wake);
}

/* With every signal blocked: a handler could unmap what the thread watches. */
static int start_thread_on(size_t stack_size)
{
	sigset_t all, before;
	pthread_attr_t attributes;
	int error;

	/* Glibc gives memory of its own stacks back when a thread ends. */
	error = map_stack(stack_size);
	if (error)
		return error;
	error = pthread_attr_init(&attributes);
	if (error)
		return -error;
	error = pthread_attr_setstack(&attributes,
				      (char *)engine.stack + sysconf(_SC_PAGESIZE),
				      stack_size);
	if (!error) {
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		error = pthread_create(&engine.thread, &attributes, run, NULL);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attributes);
	return -error;
}

static int start_thread(void)
{
	size_t stack_size = SMALLEST_STACK;
	int error;

	/* EINVAL: the thread-local storage of all libraries does not fit. */
	while ((error = start_thread_on(stack_size)) == -EINVAL &&
	       stack_size < LARGEST_STACK) {
		free_stack();
		stack_size *= 2;
	}
	return error;
}

static int prepare_once(void)
{
	struct page *page;

	if (atomic_load(&engine.page))
		return 0;
	if (fork_handler_error)
		return -fork_handler_error;
	page = map_memory(sizeof(*page));
	if (!page)
		return -ENOMEM;
	take_page(page);
	atomic_store(&engine.page, page);
	return 0;
}

/* Under engine.lifecycle. */
static int start(void)
{
	int error;

	engine.regions = NULL;
	engine.notifiers = NULL;
	engine.coverage = NULL;
	forget_drops();
	TAILQ_INIT(&engine.idle);
	engine.idle_count = 0;
	engine.forgotten_start = 0;
	engine.forgotten_end = 0;
	engine.random = 2463534242;
	atomic_store(&engine.thread_number, 0);
	atomic_store(&engine.stopping, false);
	atomic_store(&engine.ended, false);
	atomic_store(&engine.dead, false);
	atomic_store(&engine.overrun, false);
	atomic_store(&engine.ring_out, atomic_load(&engine.ring_in));
	reset_pools();
	error = open_descriptors();
	if (!error)
		error = start_thread();
	if (error) {
		release_resources();
		return error;
	}
	pthread_mutex_lock(&engine.lock);
	engine.running = true;
	pthread_mutex_unlock(&engine.lock);
	return 0;
}

/*
 * Under engine.lifecycle, without a notifier.  A child that was forked may hold
 * a copy of the userfaultfd, so that closing it would not end anything: whoever
 * changed a mapping that is registered then would sleep for ever.
 */
static void stop(void)
{
	bool done = false;

	for (unsigned int i = 0; i < ATTEMPTS && !done; i++) {
		if (i)
			back_off(i);
		pthread_mutex_lock(&engine.lock);
		empty_ring();
		unregister_mappings(engine.forgotten_start, engine.forgotten_end);
		engine.forgotten_start = engine.forgotten_end;
		while (engine.coverage)
			release_cover(find_cover(0, UINT64_MAX));
		let_go();
		/* Then, a mapping may have been moved at that very moment. */
		aioummu_fence();
		pthread_mutex_lock(&engine.lock);
		empty_ring();
		done = !engine.coverage &&
		       engine.forgotten_start == engine.forgotten_end;
		let_go();
	}
	pthread_mutex_lock(&engine.lock);
	engine.running = false;
	pthread_mutex_unlock(&engine.lock);
	atomic_store(&engine.stopping, true);
	wake_thread();
	for (unsigned int i = 0; !atomic_load(&engine.ended); i++)
		back_off(i);
	/* First: who joins a thread frees memory, and nobody reads any more. */
	close_owned(&engine.userfaultfd);
	pthread_join(engine.thread, NULL);
	release_resources();
}

/* -------------------------------------------------------------- interface --- */

const uint64_t *aioummu_activity(void)
{
	return (const uint64_t *)&atomic_load(&engine.page)->begun;
}

/* Under both locks. */
static int add_notifier(int doorbell[2])
{
	struct notifier *notifier;
	int error;

	error = pool_reserve(&engine.notifier_pool, 1);
	if (error)
		return error;
	notifier = pool_take(&engine.notifier_pool);
	error = bell_open(&notifier->doorbell);
	if (error) {
		pool_give(&engine.notifier_pool, notifier);
		return error;
	}
	doorbell[0] = notifier->doorbell.out.fd;
	doorbell[1] = notifier->doorbell.in.fd;
	TAILQ_INIT(&notifier->reports);
	notifier->number.start = ++engine.last_number;
	notifier->number.priority = random_priority();
	ranges_insert(&engine.notifiers, &notifier->number);
	return engine.last_number;
}

int aioummu_open(int doorbell[2])
{
	int result;

	if (is_copy())
		return -EOWNERDEAD;
	pthread_mutex_lock(&engine.lifecycle);
	result = prepare_once();
	if (!result && !engine.running)
		result = start();
	if (!result)
		result = enter();
	if (!result) {
		result = add_notifier(doorbell);
		let_go();
		if (result < 0 && !engine.notifiers)
			stop();
	}
	pthread_mutex_unlock(&engine.lifecycle);
	return result;
}

int aioummu_doorbell(int number)
{
	struct notifier *notifier;
	int result;

	notifier = enter_notifier(number, &result);
	if (!notifier)
		return result;
	result = fcntl(notifier->doorbell.out.fd, F_DUPFD_CLOEXEC, 0);
	if (result < 0)
		result = -errno;
	let_go();
	return result;
}

static uint32_t complete(uint32_t wanted)
{
	const uint32_t gone = UMMUNOTIFY_EVENT_CAUSE_UNMAP |
			      UMMUNOTIFY_EVENT_CAUSE_MOVE;

	if (!wanted)
		return UMMUNOTIFY_REGION_CAUSE_MASK;
	return wanted & gone ? wanted | gone : wanted;
}

/* Under the lock. */
static void remove_region(struct region *region)
{
	uint64_t start = region->range.start, end = region->range.end;

	if (region->pending)
		drop_report(region);
	ranges_remove(&engine.regions, &region->range);
	ranges_remove(&region->notifier->cookies, &region->cookie);
	region->notifier->regions--;
	pool_give(&engine.region_pool, region);
	find_idle(start, end);
}

/* Under the lock. */
static int add_region(struct notifier *notifier, uint64_t start, uint64_t end,
		      uint64_t cookie, uint32_t wanted, bool once,
		      struct aioummu_refusal *refusal)
{
	struct region *region;
	int error;

	if (atomic_load(&engine.dead))
		return -ENOTRECOVERABLE;
	if (find_region(notifier, cookie))
		return -EEXIST;
	if (notifier->regions == AIOUMMU_MAX_REGIONS)
		return -ENOSPC;
	error = pool_reserve(&engine.region_pool, 1);
	if (error)
		return refuse(refusal, start, end, error);
	region = pool_take(&engine.region_pool);
	region->range.start = start;
	region->range.end = end;
	region->range.priority = random_priority();
	region->cookie.start = cookie;
	region->cookie.priority = random_priority();
	region->notifier = notifier;
	region->wanted = complete(wanted);
	region->once = once;
	ranges_insert(&engine.regions, &region->range);
	ranges_insert(&notifier->cookies, &region->cookie);
	notifier->regions++;
	/* It is there already, so that what is covered is not released again. */
	error = cover(start, end, refusal);
	if (error)
		remove_region(region);
	return error;
}

int aioummu_register(int number, uint64_t start, uint64_t end, uint64_t cookie,
		     uint32_t wanted, bool once, struct aioummu_refusal *refusal)
{
	struct notifier *notifier;
	int error;

	if (start >= end)
		return -EINVAL;
	if (wanted & ~UMMUNOTIFY_REGION_CAUSE_MASK)
		return -ERANGE;
	notifier = enter_notifier(number, &error);
	if (notifier) {
		error = add_region(notifier, start, end, cookie, wanted, once,
				   refusal);
		let_go();
	}
	return error;
}

int aioummu_unregister(int number, uint64_t cookie)
{
	struct region *region;
	int error;

	region = enter_region(number, cookie, &error);
	if (region) {
		remove_region(region);
		let_go();
	}
	return error;
}

int aioummu_spent(int number, uint64_t cookie)
{
	struct region *region;
	int result;

	region = enter_region(number, cookie, &result);
	if (region) {
		result = region->spent;
		let_go();
	}
	return result;
}

int aioummu_rearm(int number, uint64_t cookie, struct aioummu_refusal *refusal)
{
	struct region *region;
	int error;

	region = enter_region(number, cookie, &error);
	if (!region)
		return error;
	if (atomic_load(&engine.dead))
		error = -ENOTRECOVERABLE;
	else if (region->spent)
		error = cover(region->range.start, region->range.end, refusal);
	if (!error)
		region->spent = false;
	let_go();
	return error;
}

/* Under the lock. */
static const struct drop *drop_in(const struct region *region)
{
	if (!asks_for(region, CHANGE_DROPS_PAGES))
		return NULL;
	return find_drop(region->range.start, region->range.end);
}

static uint64_t state_of(const struct region *region)
{
	bool busy = region->spent || drop_in(region);

	return 2 * region->changes + (busy ? UMMUNOTIFY_STATE_BUSY : 0);
}

/* New drops at once; old ones as often as can be afforded. */
static bool is_look_due(const struct region *region)
{
	const struct drop *drop = region->spent ? NULL : drop_in(region);

	return drop && (drop->number > atomic_load(&engine.looked) ||
			now() >= atomic_load(&engine.next_look));
}

/*
 * Returns the number of a drop that has ended, with all before it; 0: none.  The
 * event of drop @newest must have been read.  Not under the lock: this takes some
 * system calls for each thread.
 */
static uint64_t look_for_ends(uint64_t newest)
{
	uint64_t ended = 0, begun = now(), over;

	/* Whoever is looking now sees what there is to be seen. */
	if (pthread_mutex_trylock(&engine.looking))
		return 0;
	/* What an older round does not end, the next one may. */
	while (ended < newest) {
		if (!engine.round &&
		    threads_list(&engine.threads,
				 atomic_load(&engine.thread_number)))
			engine.round = newest;
		if (!engine.round || !threads_were_outside(&engine.threads))
			break;
		ended = engine.round;
		engine.round = 0;
	}
	over = now();
	atomic_store(&engine.looked, newest);
	atomic_store(&engine.next_look, over + LOOK_REST * (over - begun));
	pthread_mutex_unlock(&engine.looking);
	return ended;
}

int aioummu_state(int number, uint64_t cookie, uint64_t *state)
{
	uint64_t newest = 0, ended;
	struct region *region;
	int error;

	region = enter_region(number, cookie, &error);
	if (!region)
		return error;
	*state = state_of(region);
	if (is_look_due(region))
		newest = engine.drop_number;
	let_go();
	ended = newest ? look_for_ends(newest) : 0;
	if (!ended)
		return 0;
	region = enter_region(number, cookie, &error);
	if (region) {
		end_drops(ended);
		*state = state_of(region);
		let_go();
	}
	return error;
}

static void fill_report(struct ummunotify_event *event,
			const struct region *region)
{
	*event = (struct ummunotify_event) {
		.type = UMMUNOTIFY_EVENT_TYPE_INVAL,
		.flags = (region->exact ? UMMUNOTIFY_EVENT_FLAG_HINT : 0) |
			 region->causes,
		.hint_start = region->exact ? region->hint_start :
					      region->range.start,
		.hint_end = region->exact ? region->hint_end : region->range.end,
		.user_cookie_counter = region->cookie.start,
	};
}

/* Under the lock. */
static size_t take_reports(struct notifier *notifier,
			   struct ummunotify_event *events, size_t room)
{
	struct region *region;
	size_t count = 0;

	while (count < room && (region = TAILQ_FIRST(&notifier->reports))) {
		fill_report(&events[count++], region);
		if (region->once)
			remove_region(region);
		else
			drop_report(region);
	}
	if (count < room && notifier->last_due) {
		events[count++] = (struct ummunotify_event) {
			.type = UMMUNOTIFY_EVENT_TYPE_LAST,
			.user_cookie_counter = notifier->generation,
		};
		quiet_doorbell(notifier);
	}
	return count;
}

ssize_t aioummu_read(int number, void *buffer, size_t size)
{
	size_t room = size / sizeof(struct ummunotify_event), count;
	struct notifier *notifier;
	int error;

	notifier = enter_notifier(number, &error);
	if (!notifier)
		return error;
	count = take_reports(notifier, buffer, room);
	let_go();
	return room ? (ssize_t)(count * sizeof(struct ummunotify_event)) : -EINVAL;
}

int aioummu_generation(int number, uint64_t *generation)
{
	struct notifier *notifier;
	int error;

	notifier = enter_notifier(number, &error);
	if (notifier) {
		*generation = notifier->generation;
		let_go();
	}
	return error;
}

int aioummu_fence(void)
{
	uint64_t deadline = now() + FENCE_PATIENCE;
	bool is_busy;
	int error;

	for (unsigned int i = 0;; i++) {
		error = enter();
		if (error)
			return error;
		is_busy = is_anything_under_way();
		let_go();
		if (!is_busy)
			return 0;
		if (now() > deadline)
			return -ETIMEDOUT;
		back_off(i);
	}
}

/* Takes some regions away; returns whether there are more. */
static bool remove_some_regions(struct notifier *notifier)
{
	for (unsigned int i = 0; i < CLOSE_BATCH && notifier->cookies; i++)
		remove_region(container_of(notifier->cookies, struct region, cookie));
	return notifier->cookies;
}

void aioummu_close(int number)
{
	struct notifier *notifier;
	int error;

	if (is_copy())
		return;
	pthread_mutex_lock(&engine.lifecycle);
	do {
		notifier = enter_notifier(number, &error);
		if (!notifier)
			break;
		if (!remove_some_regions(notifier)) {
			ranges_remove(&engine.notifiers, &notifier->number);
			/* Who has a duplicate learns that it is the end. */
			ring(&notifier->doorbell);
			bell_close(&notifier->doorbell);
			pool_give(&engine.notifier_pool, notifier);
			notifier = NULL;
		}
		let_go();
	} while (notifier);
	if (engine.running && !engine.notifiers)
		stop();
	pthread_mutex_unlock(&engine.lifecycle);
}
