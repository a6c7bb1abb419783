// SPDX-License-Identifier: GPL-2.0
/*
 * The stale window: a report is queued when an invalidation starts, and another
 * thread can read it, look at its memory again, and trust what it finds, before
 * the pages are really gone.  If nothing is reported after that, it trusts
 * memory that is gone for ever.
 *
 * A zapper writes a magic word to the last page of a large range and drops the
 * range.  A reader drains the reports of that page, which goes last, and after
 * each LAST with generation L looks at the page.  If it finds magic, it caches that as valid
 * at generation L.  When the change is complete, a cache that says "magic",
 * with the counter still at L and nothing to read, is stale: never.
 *
 * The reader looks as a cache of pinned memory does, through the page tables,
 * by process_vm_readv() on itself.  A plain load may go through a translation
 * that its processor still remembers: the kernel ends an invalidation when the
 * page tables have changed, and tells the processors to forget after that.
 *
 * The other way round, nothing may be gone while the counter says that nothing
 * has happened: a reader looks at the first page, which goes first.
 *
 * The window must really have been hit, or the test proves nothing: it runs
 * until it was, often.  With the driver's callback for the end of an
 * invalidation compiled out each of those hits is stale (mutants.sh).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "device.h"

#define MAGIC		0x6d61676963212121

/*
 * Of the range that is dropped: enough for a reader to get in between.  It is a
 * private mapping of a file, since those pages come back many at a time.
 */
#define RANGE_PAGES	8192
/* Rounds in which the window was hit, to go for; and where to give up. */
#define ENOUGH_HITS	50
#define TOO_FEW_HITS	10
#define MAX_ROUNDS	2000

enum phase { IDLE, FILLED, READY, CHANGED };

struct window {
	struct device	device;
	/* Another fd, which nobody reads: rises when the change starts. */
	struct device	witness;
	u64		before;
	u64		*page;
	char		*range;
	enum phase	phase;
	bool		stop;
	/* What the reader believes: magic is there, at that generation. */
	bool		cached_magic;
	u64		cached_generation;
	/* It has found magic behind the start and before the end. */
	bool		in_between;
	/* Rounds in which it has. */
	unsigned int	hits;
	unsigned int	rounds;
	unsigned int	stale;
};

/**
 * struct variant - a kind of reader
 * @first_page:	watch the page that goes first, instead of last
 * @reader:	one pass of the reader, while the change goes on
 * @is_stale:	does it trust, in the end, what is gone?
 */
struct variant {
	bool	first_page;
	void	(*reader)(struct window *window);
	bool	(*is_stale)(struct window *window);
};

static enum phase phase(struct window *window)
{
	return __atomic_load_n(&window->phase, __ATOMIC_ACQUIRE);
}

static void set_phase(struct window *window, enum phase phase)
{
	__atomic_store_n(&window->phase, phase, __ATOMIC_RELEASE);
}

static void wait_for_phase(struct window *window, enum phase wanted)
{
	while (phase(window) != wanted)
		sched_yield();
}

/* What somebody who pins the page would get. */
static bool find_magic(struct window *window)
{
	u64 word = 0;
	struct iovec to = { .iov_base = &word, .iov_len = sizeof(word) };
	struct iovec from = {
		.iov_base = window->page,
		.iov_len = sizeof(word),
	};
	ssize_t ret = process_vm_readv(getpid(), &to, 1, &from, 1, 0);

	CHECK_EQ(ret, sizeof(word));
	return word == MAGIC;
}

static bool has_started(struct window *window)
{
	return generation(&window->witness) != window->before;
}

static void look(struct window *window, u64 valid_at)
{
	bool started = has_started(window);

	window->cached_generation = valid_at;
	window->cached_magic = find_magic(window);
	if (window->cached_magic && started && phase(window) == READY)
		window->in_between = true;
}

static void drain_and_look(struct window *window)
{
	struct ummunotify_event events[4];
	long n = read_records(window->device.fd, events, ARRAY_SIZE(events));

	if (n == -EAGAIN)
		return;
	CHECK(n > 0);
	if (events[n - 1].type == UMMUNOTIFY_EVENT_TYPE_LAST)
		look(window, events[n - 1].user_cookie_counter);
	else
		window->cached_magic = false;
}

/*
 * As a cache that evicts what was reported, and registers what is used: reports
 * are drained by unregistering the region.
 */
static void register_and_look(struct window *window)
{
	struct ummunotify_event event;

	unregister_region(&window->device, 1);
	register_region(&window->device, window->page, page_size(), 1);
	while (read_records(window->device.fd, &event, 1) > 0)
		continue;
	look(window, generation(&window->device));
}

static void register_once_and_look(struct window *window)
{
	if (has_started(window) && !window->in_between)
		register_and_look(window);
}

/*
 * The report of another region stays unread: what comes later, when it is read,
 * must tell of the new region too.
 */
static void register_second_and_look(struct window *window)
{
	if (!has_started(window) || window->in_between)
		return;
	register_region(&window->device, window->page, page_size(), 2);
	look(window, generation(&window->device));
	if (!window->in_between)
		unregister_region(&window->device, 2);
}

static bool is_stale(struct window *window)
{
	return window->cached_magic &&
	       generation(&window->device) == window->cached_generation &&
	       !poll_now(window->device.fd);
}

static bool second_is_stale(struct window *window)
{
	struct ummunotify_event events[4];
	bool told = false;
	long n;

	while ((n = read_records(window->device.fd, events, 4)) > 0) {
		for (long i = 0; i < n; i++)
			told |= events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL &&
				events[i].user_cookie_counter == 2;
	}
	CHECK_EQ(n, -EAGAIN);
	if (!window->in_between)
		return false;
	unregister_region(&window->device, 2);
	return !told;
}

/* The look first, then the counter, as close together as can be. */
static void look_at_what_goes_first(struct window *window)
{
	bool gone = !find_magic(window);
	bool risen = generation(&window->device) != window->cached_generation;

	if (gone && !risen)
		window->stale++;
	if (gone && phase(window) == READY)
		window->in_between = true;
}

struct run {
	struct window		*window;
	const struct variant	*variant;
};

static void *read_reports(void *arg)
{
	struct run *run = arg;
	struct window *window = run->window;

	for (;;) {
		bool changed;

		while (phase(window) != FILLED) {
			if (__atomic_load_n(&window->stop, __ATOMIC_ACQUIRE))
				return NULL;
			sched_yield();
		}
		if (poll_now(window->device.fd))
			drain(&window->device);
		if (poll_now(window->witness.fd))
			drain(&window->witness);
		window->before = generation(&window->witness);
		window->cached_generation = generation(&window->device);
		window->cached_magic = find_magic(window);
		window->in_between = false;
		CHECK(window->cached_magic);
		CHECK(!poll_now(window->device.fd));
		set_phase(window, READY);

		/* The last look begins before the change has ended. */
		do {
			changed = phase(window) == CHANGED;
			if (!changed)
				run->variant->reader(window);
		} while (!changed);

		window->rounds++;
		window->hits += window->in_between;
		window->stale += run->variant->is_stale(window);
		set_phase(window, IDLE);
	}
}

static char *map_range(void)
{
	int fd = make_shared_file(RANGE_PAGES);
	char *pages = map_untouched(RANGE_PAGES, PROT_READ | PROT_WRITE,
				    MAP_SHARED, fd);

	touch(pages, RANGE_PAGES);
	CHECK_EQ(munmap(pages, RANGE_PAGES * page_size()), 0);
	pages = map_untouched(RANGE_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE,
			      fd);
	close(fd);
	return pages;
}

static void fill(struct window *window)
{
	for (size_t i = 0; i < RANGE_PAGES; i++)
		__atomic_load_n(window->range + i * page_size(),
				__ATOMIC_RELAXED);
	*window->page = MAGIC;
}

static void run_window(const void *arg)
{
	const struct variant *variant = arg;
	struct window window = { .range = map_range() };
	struct run run = { .window = &window, .variant = variant };
	pthread_t reader;

	/* Opened first, told last: does not rise before the other. */
	window.witness = open_device(O_NONBLOCK);
	window.device = open_device(O_NONBLOCK);
	window.page = (u64 *)window.range;
	if (!variant->first_page)
		window.page += (RANGE_PAGES - 1) * page_size() / sizeof(u64);
	register_region(&window.witness, window.page, page_size(), 1);
	register_region(&window.device, window.page, page_size(), 1);
	reader = start_thread(read_reports, &run);

	while (window.hits < ENOUGH_HITS && window.rounds < MAX_ROUNDS) {
		fill(&window);
		set_phase(&window, FILLED);
		wait_for_phase(&window, READY);
		zap(window.range, RANGE_PAGES);
		set_phase(&window, CHANGED);
		wait_for_phase(&window, IDLE);
	}
	__atomic_store_n(&window.stop, true, __ATOMIC_RELEASE);
	join_thread(reader);

	note("%u rounds, window hit %u times, %u times stale", window.rounds,
	     window.hits, window.stale);
	CHECK_EQ(window.stale, 0);
	CHECK(window.hits >= TOO_FEW_HITS);
}

static const struct variant drain_reader = {
	.reader		= drain_and_look,
	.is_stale	= is_stale,
};

static const struct variant register_once_reader = {
	.reader		= register_once_and_look,
	.is_stale	= is_stale,
};

static const struct variant register_second_reader = {
	.reader		= register_second_and_look,
	.is_stale	= second_is_stale,
};

static const struct variant register_reader = {
	.reader		= register_and_look,
	.is_stale	= is_stale,
};

static const struct variant first_page_reader = {
	.first_page	= true,
	.reader		= look_at_what_goes_first,
	.is_stale	= is_stale,
};

static const struct test tests[] = {
	{ "a_drained_report_leaves_no_stale_window", run_window,
	  &drain_reader },
	{ "a_registration_in_between_is_never_stale", run_window,
	  &register_once_reader },
	{ "a_second_registration_in_between_is_told_of_the_end", run_window,
	  &register_second_reader },
	{ "registrations_all_the_time_are_never_stale", run_window,
	  &register_reader },
	{ "nothing_is_gone_before_the_counter_rises", run_window,
	  &first_page_reader },
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
