// SPDX-License-Identifier: GPL-2.0
/*
 * ummunotify - MMU notifications for user space
 *
 * A process opens /dev/ummunotify, registers ranges of its address space by
 * cookie, and read()s which of them were invalidated: unmapped, moved,
 * dropped, reclaimed, protected.  A generation counter in a page that it maps
 * tells without a system call that nothing happened.
 *
 * The interface is that of the driver proposed in 2010; the code is new.
 * ummunotify.rst is the documentation.
 *
 * How it works
 * ------------
 * A fd (struct ummunotify_ctx) is bound to the address space of its opener by
 * one MMU notifier.  Regions hang in two trees: by range, to find what an
 * invalidation hits, and by cookie.  Each region carries the memory of its one
 * report, so an invalidation allocates nothing.
 *
 * ctx->lock guards all of that.  It is a raw spinlock, since the notifier may
 * be called where nothing may sleep (the OOM reaper), on PREEMPT_RT too.  It is
 * held for a bounded number of steps, never while user memory is touched, and
 * never while memory is allocated or freed or anybody is woken.
 *
 * A reader copies reports out first and takes them off the list afterwards
 * (ummunotify_peek(), ummunotify_commit()), so a read() that fails loses
 * nothing.  ctx->read_lock keeps readers apart; no notifier takes it.
 *
 * An invalidation reports at its start, before the first page goes away, and at
 * its end to those regions that are not pending (any more), which nobody could
 * know to be stale.  See ummunotify_invalidate_range_end().
 *
 * State words (UMMUNOTIFY_FEATURE_STATE) say whether anything is being done to a
 * region.  So for fds with them, and for no others, a second MMU notifier notes
 * every invalidation under way: see struct ummunotify_tracker.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/anon_inodes.h>
#include <linux/bitmap.h>
#include <linux/cache.h>
#include <linux/cdev.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/init.h>
#include <linux/irq_work.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/rbtree_augmented.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/wait.h>

#include <uapi/linux/ummunotify.h>

#include "ummunotify_compat.h"

#define CREATE_TRACE_POINTS
#include "ummunotify_trace.h"

/* Records that a read() moves per hold of the lock. */
#define UMMUNOTIFY_READ_BATCH	16

/* Regions that an invalidation reports per hold of the lock. */
#define UMMUNOTIFY_WALK_BATCH	64

/*
 * Unregistered regions are kept for the next registrations, up to this number
 * and a share of what is registered: a cache that evicts and registers in turn
 * never calls the allocator, whose price for a free at random is high.
 */
#define UMMUNOTIFY_SPARES	512
#define UMMUNOTIFY_SPARES_SHARE	8

static unsigned int max_regions = 1U << 20;
module_param(max_regions, uint, 0644);
MODULE_PARM_DESC(max_regions,
		 "Regions that one file descriptor may register (default 1048576)");

/* Not to be changed later: an invalidation has a start and an end. */
static bool report_foreign = true;
module_param(report_foreign, bool, 0444);
MODULE_PARM_DESC(report_foreign,
		 "Report what kernel threads do to pages, KSM among them (default Y)");

/* Invalidations under way that are known by their ranges; of more, the number. */
#define UMMUNOTIFY_FLIGHTS	64

/* State words in a page. */
#define UMMUNOTIFY_PAGE_SLOTS	(PAGE_SIZE / sizeof(u64))

#define UMMUNOTIFY_FEATURES	(UMMUNOTIFY_FEATURE_CAUSE |	\
				 UMMUNOTIFY_FEATURE_FILTER |	\
				 UMMUNOTIFY_FEATURE_STATE |	\
				 UMMUNOTIFY_FEATURE_ONCE)

static struct kmem_cache *ummunotify_region_cache;

/*
 * State of a region's report: none of these bits, or PENDING and some others.
 *
 * PENDING: the region is on the ctx's list of pending reports.
 * HINT:    hint_start and hint_last are the one range that was invalidated.
 * PEEKED:  a reader copies the report out at this moment.
 * CHANGED: the report has changed since it was PEEKED: it stays pending.
 *
 * The causes are among them, as in the record.
 */
#define REPORT_PENDING	BIT(0)
#define REPORT_HINT	BIT(1)
#define REPORT_PEEKED	BIT(2)
#define REPORT_CHANGED	BIT(3)
#define REPORT_CAUSES	UMMUNOTIFY_EVENT_CAUSE_MASK

/*
 * Causes to be compared with what a region asks for, in 16 bits.  An invalidation
 * whose cause is not known has all of them, and so has a region that asks for all.
 */
#define REASONS(causes)	((u16)((causes) / UMMUNOTIFY_EVENT_CAUSE_UNMAP))
#define REASONS_ALL	U16_MAX

/* It was not known what was going on when the region was registered. */
#define BUSY_FOREVER	U16_MAX

/**
 * struct ummunotify_region - a registered range, and its report
 * @range_node:	node in the ctx's ranges; clear if the range is empty
 * @start:	first byte
 * @last:	last byte; start - 1 if the range is empty
 * @subtree_last:	highest @last in the subtree below @range_node
 * @cookie_node:	node in the ctx's cookies
 * @cookie:	user space's name of the region
 * @pending:	entry in the ctx's list of pending reports, or of spares
 * @hint_start:	first invalidated byte, within the region
 * @hint_last:	last invalidated byte, within the region
 * @report:	REPORT_* bits
 * @reasons:	the causes that it asks for
 * @busy:	invalidations under way that touch it, if it has a state word
 * @slot:	of its state word, or 0
 * @once:	it is unregistered when its report is read
 */
struct ummunotify_region {
	struct rb_node		range_node;
	unsigned long		start;
	unsigned long		last;
	unsigned long		subtree_last;
	struct rb_node		cookie_node;
	u64			cookie;
	struct list_head	pending;
	unsigned long		hint_start;
	unsigned long		hint_last;
	unsigned int		report;
	u16			reasons;
	u16			busy;
	u32			slot : 31;
	u32			once : 1;
};

/**
 * struct ummunotify_state_page - a page of state words
 * @page:	the page, which user space maps
 * @serials:	of the regions that have these slots: how many registrations with
 *		a slot came before, see struct ummunotify_walk; as @used
 * @used:	slots of registered regions; guarded by the ctx's lock
 */
struct ummunotify_state_page {
	struct page		*page;
	u64			*serials;
	DECLARE_BITMAP(used, UMMUNOTIFY_PAGE_SLOTS);
};

/**
 * struct ummunotify_states - the state words of a fd
 * @refs:	held by the fd and by each mapping
 * @nr_pages:	number of @pages
 * @pages:	allocated when first used
 */
struct ummunotify_states {
	struct kref			refs;
	unsigned long			nr_pages;
	struct ummunotify_state_page	*pages[];
};

/**
 * struct ummunotify_flight - an invalidation that has begun and not ended
 * @start:	first byte
 * @last:	last byte
 * @reasons:	its causes
 */
struct ummunotify_flight {
	unsigned long		start;
	unsigned long		last;
	u16			reasons;
};

/**
 * struct ummunotify_tracker - all invalidations under way
 * @notifier:	a subscription of its own: when it begins, nothing is under way
 * @ctx:	the fd
 * @nr_flights:	number of @flights
 * @nr_unknown:	how many more there are
 * @flights:	their ranges, in no order
 *
 * A region registered meanwhile finds here how many of them touch it.  Two with the
 * same range and reasons are as good as each other: when one of them ends, it does
 * not matter which.
 *
 * While there are more than fit, a region that is registered stays busy forever.
 */
struct ummunotify_tracker {
	struct mmu_notifier		notifier;
	struct ummunotify_ctx		*ctx;
	unsigned int			nr_flights;
	unsigned int			nr_unknown;
	struct ummunotify_flight	flights[UMMUNOTIFY_FLIGHTS];
};

/**
 * struct ummunotify_ctx - an open file
 * @first:	lowest watched byte; read without the lock
 * @last:	highest watched byte; read without the lock
 * @notifier:	the subscription to the opener's address space
 * @lock:	guards everything down to @last_due
 * @ranges:	regions by (start, cookie), augmented to find overlaps
 * @cookies:	regions by cookie, downwards: the cached node is the highest
 * @nr_regions:	number of regions
 * @nr_pending:	number of regions in @pending
 * @nr_spares:	number of regions in @spares
 * @spares:	unregistered regions, for the next registrations
 * @pending:	regions with a report that was not read
 * @settled_start:	see ummunotify_settle()
 * @settled_last:	see ummunotify_settle()
 * @settled_causes:	see ummunotify_settle()
 * @features:	what was negotiated
 * @serial:	number of registrations with a slot so far
 * @reasons:	the causes that any region asks for; read without the lock
 * @generation:	the generation counter; the mapped page repeats it
 * @told_generation:	the generation that the latest LAST told
 * @used:	read() or a registration was tried: too late for features
 * @exchanged:	features are negotiated, or being so
 * @ended:	the address space is gone: nothing can be registered
 * @final:	the reports of that are queued: none will follow
 * @closing:	nobody will read any more
 * @last_due:	LAST follows as soon as @pending is empty
 * @counter:	the mapped page
 * @states:	the mapped area of state words, or NULL
 * @tracker:	of what is under way, if there may be state words, or NULL
 * @read_lock:	one reader at a time; guards @batch
 * @batch:	records on their way to user space
 * @wait:	sleeping readers and pollers
 * @fasync:	receivers of SIGIO
 * @wake_work:	wakes where the notifier itself must not
 */
struct ummunotify_ctx {
	unsigned long		first;
	unsigned long		last;
	struct mmu_notifier	notifier;

	raw_spinlock_t		lock ____cacheline_aligned_in_smp;
	struct rb_root_cached	ranges;
	struct rb_root_cached	cookies;
	unsigned int		nr_regions;
	unsigned int		nr_pending;
	unsigned int		nr_spares;
	struct list_head	spares;
	struct list_head	pending;
	unsigned long		settled_start;
	unsigned long		settled_last;
	u32			settled_causes;
	u32			features;
	u64			serial;
	u16			reasons;
	u64			generation;
	u64			told_generation;
	bool			used;
	bool			exchanged;
	bool			ended;
	bool			final;
	bool			closing;
	bool			last_due;

	struct page		*counter;
	struct ummunotify_states	*states;
	struct ummunotify_tracker	*tracker;
	struct mutex		read_lock; /* one reader at a time */
	struct ummunotify_event	batch[UMMUNOTIFY_READ_BATCH];
	wait_queue_head_t	wait;
	struct fasync_struct	*fasync;
	struct irq_work		wake_work;
};

/* Regions by range */

#define range_entry(node) \
	rb_entry(node, struct ummunotify_region, range_node)

static inline unsigned long
ummunotify_region_last(const struct ummunotify_region *region)
{
	return region->last;
}

RB_DECLARE_CALLBACKS_MAX(static, ummunotify_ranges_augment,
			 struct ummunotify_region, range_node,
			 unsigned long, subtree_last, ummunotify_region_last)

/* The cookie makes the order total: a walk can go on behind any region. */
static inline bool ummunotify_orders_before(unsigned long start, u64 cookie,
					    const struct ummunotify_region *than)
{
	return start < than->start ||
	       (start == than->start && cookie < than->cookie);
}

static void ummunotify_ranges_insert(struct ummunotify_ctx *ctx,
				     struct ummunotify_region *region)
{
	struct rb_node **link = &ctx->ranges.rb_root.rb_node;
	struct rb_node *parent = NULL;
	bool leftmost = true;

	while (*link) {
		struct ummunotify_region *above = range_entry(*link);

		parent = *link;
		if (above->subtree_last < region->last)
			above->subtree_last = region->last;
		if (ummunotify_orders_before(region->start, region->cookie,
					     above)) {
			link = &parent->rb_left;
		} else {
			link = &parent->rb_right;
			leftmost = false;
		}
	}

	region->subtree_last = region->last;
	rb_link_node(&region->range_node, parent, link);
	rb_insert_augmented_cached(&region->range_node, &ctx->ranges, leftmost,
				   &ummunotify_ranges_augment);
}

static inline bool ummunotify_reaches(const struct rb_node *subtree,
				      unsigned long start)
{
	return subtree && range_entry(subtree)->subtree_last >= start;
}

/* The first overlap in a subtree that reaches @start. */
static struct ummunotify_region *
ummunotify_subtree_overlap(struct rb_node *subtree, unsigned long start,
			   unsigned long last)
{
	for (;;) {
		struct ummunotify_region *region = range_entry(subtree);

		/*
		 * Whatever on the left reaches @start lies at or below it: if
		 * its lowest such region does not overlap, none does.
		 */
		if (ummunotify_reaches(subtree->rb_left, start)) {
			subtree = subtree->rb_left;
			continue;
		}
		if (region->start > last)
			return NULL;
		if (region->last >= start)
			return region;
		subtree = subtree->rb_right;
		if (!ummunotify_reaches(subtree, start))
			return NULL;
	}
}

static struct ummunotify_region *
ummunotify_first_overlap(struct ummunotify_ctx *ctx, unsigned long start,
			 unsigned long last)
{
	struct rb_node *root = ctx->ranges.rb_root.rb_node;

	if (!ummunotify_reaches(root, start))
		return NULL;
	return ummunotify_subtree_overlap(root, start, last);
}

/* The first overlap that orders behind @region, which need not overlap. */
static struct ummunotify_region *
ummunotify_next_overlap(struct ummunotify_region *region, unsigned long start,
			unsigned long last)
{
	struct rb_node *node = &region->range_node;

	for (;;) {
		struct rb_node *child;

		if (ummunotify_reaches(node->rb_right, start))
			return ummunotify_subtree_overlap(node->rb_right, start,
							  last);
		do {
			child = node;
			node = rb_parent(node);
			if (!node)
				return NULL;
		} while (child == node->rb_right);

		region = range_entry(node);
		if (region->start > last)
			return NULL;
		if (region->last >= start)
			return region;
	}
}

/* The first overlap that orders behind a place in the tree. */
static struct ummunotify_region *
ummunotify_overlap_behind(struct ummunotify_ctx *ctx, unsigned long place_start,
			  u64 place_cookie, unsigned long start,
			  unsigned long last)
{
	struct rb_node *node = ctx->ranges.rb_root.rb_node;
	struct ummunotify_region *behind = NULL;

	while (node) {
		struct ummunotify_region *region = range_entry(node);

		if (ummunotify_orders_before(place_start, place_cookie,
					     region)) {
			behind = region;
			node = node->rb_left;
		} else {
			node = node->rb_right;
		}
	}

	if (!behind || behind->start > last)
		return NULL;
	if (behind->last >= start)
		return behind;
	return ummunotify_next_overlap(behind, start, last);
}

/*
 * Any pair of values that ummunotify_misses() may see covers each region that
 * stayed registered meanwhile, whichever of the two is the older.
 */
static void ummunotify_update_bounds(struct ummunotify_ctx *ctx)
{
	struct rb_node *leftmost = rb_first_cached(&ctx->ranges);
	struct rb_node *root = ctx->ranges.rb_root.rb_node;
	unsigned long first = leftmost ? range_entry(leftmost)->start : ULONG_MAX;
	unsigned long last = root ? range_entry(root)->subtree_last : 0;

	/* The tracker looks at everything, and the other notifier at nothing. */
	if (ctx->tracker) {
		first = ULONG_MAX;
		last = 0;
	}
	/* All CPUs read these two all the time: write only what is new. */
	if (ctx->first != first)
		WRITE_ONCE(ctx->first, first);
	if (ctx->last != last)
		WRITE_ONCE(ctx->last, last);
}

static bool ummunotify_misses(const struct ummunotify_ctx *ctx,
			      const struct mmu_notifier_range *range)
{
	return range->start > READ_ONCE(ctx->last) ||
	       range->end <= READ_ONCE(ctx->first);
}

/* Regions by cookie */

#define cookie_entry(node) \
	rb_entry(node, struct ummunotify_region, cookie_node)

static struct ummunotify_region *
ummunotify_cookies_find(struct ummunotify_ctx *ctx, u64 cookie)
{
	struct rb_node *node = ctx->cookies.rb_root.rb_node;

	while (node) {
		struct ummunotify_region *region = cookie_entry(node);

		if (cookie > region->cookie)
			node = node->rb_left;
		else if (cookie < region->cookie)
			node = node->rb_right;
		else
			return region;
	}
	return NULL;
}

/* Return: false if the cookie is in use. */
static bool ummunotify_cookies_insert(struct ummunotify_ctx *ctx,
				      struct ummunotify_region *region)
{
	struct rb_node *highest = rb_first_cached(&ctx->cookies);
	struct rb_node **link = &ctx->cookies.rb_root.rb_node;
	struct rb_node *parent = NULL;
	bool leftmost = true;

	/* Most clients count their cookies up: no search for those. */
	if (highest && region->cookie > cookie_entry(highest)->cookie) {
		parent = highest;
		link = &highest->rb_left;
	}

	while (*link) {
		struct ummunotify_region *above = cookie_entry(*link);

		parent = *link;
		if (region->cookie > above->cookie) {
			link = &parent->rb_left;
		} else if (region->cookie < above->cookie) {
			link = &parent->rb_right;
			leftmost = false;
		} else {
			return false;
		}
	}

	rb_link_node(&region->cookie_node, parent, link);
	rb_insert_color_cached(&region->cookie_node, &ctx->cookies, leftmost);
	return true;
}

/* Reports */

static void ummunotify_store_word(u64 *where, u64 value)
{
#ifdef CONFIG_64BIT
	/* Pairs with the acquire of ummunotify_load_word(). */
	smp_store_release(where, value);
#else
	u32 *word = (u32 *)where;
	const int low = IS_ENABLED(CONFIG_CPU_BIG_ENDIAN);

	WRITE_ONCE(word[!low], upper_32_bits(value));
	/*
	 * High word first: whoever loads low, then high, cannot put an earlier
	 * value together from two later ones.  ummunotify.rst proves it.
	 */
	smp_wmb();
	WRITE_ONCE(word[low], lower_32_bits(value));
#endif
}

static void ummunotify_raise_generation(struct ummunotify_ctx *ctx)
{
	ctx->generation++;
	ummunotify_store_word(page_address(ctx->counter), ctx->generation);
}

static bool ummunotify_readable(struct ummunotify_ctx *ctx)
{
	lockdep_assert_held(&ctx->lock);

	return !list_empty(&ctx->pending) || ctx->last_due;
}

/*
 * Waiters test for readability under the lock, and queue up before they do: if
 * one tested too early to see what was queued under the lock, it is seen here.
 */
static void ummunotify_wake(struct ummunotify_ctx *ctx)
{
	/* No barrier: the lock orders this, as said. */
	if (waitqueue_active(&ctx->wait))
		wake_up_interruptible_poll(&ctx->wait, EPOLLIN | EPOLLRDNORM);
	if (READ_ONCE(ctx->fasync))
		kill_fasync(&ctx->fasync, SIGIO, POLL_IN);
}

static void ummunotify_wake_work(struct irq_work *work)
{
	ummunotify_wake(container_of(work, struct ummunotify_ctx, wake_work));
}

enum ummunotify_phase {
	UMMUNOTIFY_PHASE_START,	/* of an invalidation: nothing has changed yet */
	UMMUNOTIFY_PHASE_END,	/* the page tables have changed */
	UMMUNOTIFY_PHASE_FINAL	/* of the address space */
};

/**
 * struct ummunotify_walk - an invalidation, or its end, on its way
 * @ctx:	where to report
 * @tracker:	the tracker's, if it is the one that calls
 * @phase:	at its end, report only what nobody can know
 * @start:	first invalidated byte
 * @last:	last invalidated byte
 * @causes:	why, if anybody asks
 * @reasons:	the same, to be compared with what regions ask for
 * @serial:	regions from this one on have found it in the tracker, or not any
 *		more, and count it accordingly: they are not counted again
 * @hits:	number of regions
 * @may_sleep:	the caller may sleep
 * @raised:	this walk has raised the generation
 * @wake:	a report was queued that readers may not know of
 */
struct ummunotify_walk {
	struct ummunotify_ctx		*ctx;
	struct ummunotify_tracker	*tracker;
	enum ummunotify_phase		phase;
	unsigned long			start;
	unsigned long			last;
	u32				causes;
	u16				reasons;
	u64				serial;
	unsigned int			hits;
	bool				may_sleep;
	bool				raised;
	bool				wake;
};

/* State words */

static struct ummunotify_state_page *
ummunotify_state_page(struct ummunotify_ctx *ctx, u32 slot)
{
	return ctx->states->pages[slot / UMMUNOTIFY_PAGE_SLOTS];
}

static u64 *ummunotify_state_word(struct ummunotify_ctx *ctx, u32 slot)
{
	u64 *words = page_address(ummunotify_state_page(ctx, slot)->page);

	return &words[slot % UMMUNOTIFY_PAGE_SLOTS];
}

static u64 *ummunotify_serial(struct ummunotify_ctx *ctx, u32 slot)
{
	u64 *serials = ummunotify_state_page(ctx, slot)->serials;

	return &serials[slot % UMMUNOTIFY_PAGE_SLOTS];
}

/* Count, and say whether the region is busy from now on. */
static void ummunotify_count_state(struct ummunotify_ctx *ctx, u32 slot,
				   bool busy)
{
	u64 *word = ummunotify_state_word(ctx, slot);

	/* The next even number above, or the odd one behind that. */
	ummunotify_store_word(word, (*word | UMMUNOTIFY_STATE_BUSY) + 1 + busy);
}

static void ummunotify_settle_state(struct ummunotify_ctx *ctx, u32 slot)
{
	u64 *word = ummunotify_state_word(ctx, slot);

	ummunotify_store_word(word, *word & ~(u64)UMMUNOTIFY_STATE_BUSY);
}

static bool ummunotify_flight_is(const struct ummunotify_flight *flight,
				 const struct ummunotify_walk *walk)
{
	return flight->start == walk->start && flight->last == walk->last &&
	       flight->reasons == walk->reasons;
}

static void ummunotify_take_off(struct ummunotify_tracker *tracker,
				const struct ummunotify_walk *walk)
{
	if (tracker->nr_flights == UMMUNOTIFY_FLIGHTS) {
		tracker->nr_unknown++;
		return;
	}
	tracker->flights[tracker->nr_flights++] = (struct ummunotify_flight) {
		.start		= walk->start,
		.last		= walk->last,
		.reasons	= walk->reasons,
	};
}

static void ummunotify_land(struct ummunotify_tracker *tracker,
			    const struct ummunotify_walk *walk)
{
	struct ummunotify_flight *flight = tracker->flights;
	struct ummunotify_flight *end = flight + tracker->nr_flights;

	while (flight < end && !ummunotify_flight_is(flight, walk))
		flight++;
	if (flight < end) {
		*flight = end[-1];
		tracker->nr_flights--;
	} else if (tracker->nr_unknown) {
		tracker->nr_unknown--;
	}
}

/* How many invalidations under way touch a region that is being registered? */
static u16 ummunotify_busy(const struct ummunotify_tracker *tracker,
			   const struct ummunotify_region *region)
{
	const struct ummunotify_flight *flight = tracker->flights;
	const struct ummunotify_flight *end = flight + tracker->nr_flights;
	u16 busy = 0;

	/* Nothing is done to an empty one, and nobody would tell when it is over. */
	if (region->last + 1 == region->start)
		return 0;
	if (tracker->nr_unknown)
		return BUSY_FOREVER;
	for (; flight < end; flight++)
		if (flight->start <= region->last &&
		    flight->last >= region->start &&
		    flight->reasons & region->reasons)
			busy++;
	return busy;
}

static void ummunotify_update_state(struct ummunotify_walk *walk,
				    struct ummunotify_region *region)
{
	struct ummunotify_ctx *ctx = walk->ctx;

	/* close() has said the last word on all of them. */
	if (ctx->closing || region->busy == BUSY_FOREVER)
		return;
	if (walk->phase == UMMUNOTIFY_PHASE_FINAL) {
		region->busy = BUSY_FOREVER;
		ummunotify_count_state(ctx, region->slot, true);
		return;
	}
	if (*ummunotify_serial(ctx, region->slot) >= walk->serial)
		return;
	if (walk->phase == UMMUNOTIFY_PHASE_START) {
		region->busy++;
		ummunotify_count_state(ctx, region->slot, true);
	} else if (!region->busy) {
		/* An end without a start, as of 6.7's PAGEMAP_SCAN: never trust it. */
		region->busy = BUSY_FOREVER;
		ummunotify_count_state(ctx, region->slot, true);
	} else if (!--region->busy) {
		ummunotify_settle_state(ctx, region->slot);
	}
}

/* Reports of a walk */

/*
 * A walk raises the generation once, with its first hit.  Only if somebody read
 * LAST while the walk was between two batches must it rise again, for the
 * reports queued behind that LAST.
 */
static void ummunotify_hit(struct ummunotify_walk *walk)
{
	struct ummunotify_ctx *ctx = walk->ctx;

	if (walk->raised && ctx->generation != ctx->told_generation)
		return;
	ummunotify_raise_generation(ctx);
	walk->raised = true;
}

static void ummunotify_report(struct ummunotify_walk *walk,
			      struct ummunotify_region *region)
{
	unsigned long start = max(walk->start, region->start);
	unsigned long last = min(walk->last, region->last);

	if (!(region->report & REPORT_PENDING)) {
		region->hint_start = start;
		region->hint_last = last;
		region->report = REPORT_PENDING | REPORT_HINT | walk->causes;
		list_add_tail(&region->pending, &walk->ctx->pending);
		walk->ctx->nr_pending++;
		walk->wake = true;
		ummunotify_hit(walk);
		return;
	}

	if (walk->phase == UMMUNOTIFY_PHASE_END) {
		/* Normally the start has said it, and nobody has read it. */
		if (region->hint_start <= start && last <= region->hint_last &&
		    !(walk->causes & ~region->report))
			return;
	} else {
		ummunotify_hit(walk);
	}

	region->hint_start = region->start;
	region->hint_last = region->last;
	region->report &= ~REPORT_HINT;
	region->report |= walk->causes;
	if (region->report & REPORT_PEEKED) {
		region->report |= REPORT_CHANGED;
		walk->wake = true;
	}
}

static void ummunotify_visit(struct ummunotify_walk *walk,
			     struct ummunotify_region *region)
{
	if (!(region->reasons & walk->reasons))
		return;
	walk->hits++;
	if (region->slot)
		ummunotify_update_state(walk, region);
	ummunotify_report(walk, region);
}

/*
 * A range is settled while all regions that overlap it, and ask for its causes,
 * are pending with reports that cover it and them: from the walk that made them
 * so until one of them is read, or a region registered.  The end of an
 * invalidation has nothing to do then, which is the normal case, and need not
 * search.  The latest range is remembered.
 */
static void ummunotify_settle(struct ummunotify_ctx *ctx, unsigned long start,
			      unsigned long last, u32 causes)
{
	ctx->settled_start = start;
	ctx->settled_last = last;
	ctx->settled_causes = causes;
}

static void ummunotify_unsettle(struct ummunotify_ctx *ctx)
{
	/* No invalidation has this range. */
	ummunotify_settle(ctx, ULONG_MAX, 0, 0);
}

static bool ummunotify_settled(struct ummunotify_ctx *ctx, unsigned long start,
			       unsigned long last, u32 causes)
{
	bool settled;

	raw_spin_lock(&ctx->lock);
	settled = ctx->settled_start == start && ctx->settled_last == last &&
		  ctx->settled_causes == causes;
	raw_spin_unlock(&ctx->lock);
	return settled;
}

/*
 * Report to all regions that overlap, a bounded number per hold of the lock,
 * since the caller may be anybody: reclaim, khugepaged, another process that
 * truncates a shared file.
 *
 * In practice the walk ends even if others register regions in front of it as
 * fast as they can: whoever takes the lock in between adds one region, while
 * this one reports a batch.
 */
static void ummunotify_walk(struct ummunotify_walk *walk)
{
	struct ummunotify_ctx *ctx = walk->ctx;
	struct ummunotify_region *region = NULL;
	unsigned int visits = 0;
	bool settled = true;

	raw_spin_lock(&ctx->lock);
	if (walk->tracker && walk->phase == UMMUNOTIFY_PHASE_START)
		ummunotify_take_off(walk->tracker, walk);
	else if (walk->tracker)
		ummunotify_land(walk->tracker, walk);
	walk->serial = ctx->serial;
	/* Behind the end there is only what was running before it: told already. */
	if (!ctx->final && ctx->reasons & walk->reasons)
		region = ummunotify_first_overlap(ctx, walk->start, walk->last);
	while (region) {
		ummunotify_visit(walk, region);
		if (likely(++visits < UMMUNOTIFY_WALK_BATCH)) {
			region = ummunotify_next_overlap(region, walk->start,
							 walk->last);
		} else {
			unsigned long place_start = region->start;
			u64 place_cookie = region->cookie;

			raw_spin_unlock(&ctx->lock);
			if (walk->may_sleep)
				cond_resched();
			visits = 0;
			settled = false;
			raw_spin_lock(&ctx->lock);
			if (ctx->final)
				break;
			region = ummunotify_overlap_behind(ctx, place_start,
							   place_cookie,
							   walk->start,
							   walk->last);
		}
	}
	if (settled)
		ummunotify_settle(ctx, walk->start, walk->last, walk->causes);
	raw_spin_unlock(&ctx->lock);
	trace_ummunotify_invalidate(ctx, walk->start, walk->last, walk->causes,
				    walk->phase, walk->hits);

	if (!walk->wake)
		return;
	/* On PREEMPT_RT to wake is to sleep. */
	if (IS_ENABLED(CONFIG_PREEMPT_RT) && !walk->may_sleep)
		irq_work_queue(&ctx->wake_work);
	else
		ummunotify_wake(ctx);
}

/* The MMU notifier */

static struct ummunotify_ctx *notifier_ctx(struct mmu_notifier *notifier)
{
	return container_of(notifier, struct ummunotify_ctx, notifier);
}

/* By other processes, or in reclaim, whoever is made to reclaim. */
static bool ummunotify_is_foreign(const struct mmu_notifier_range *range)
{
	return current->mm != range->mm || current->flags & PF_MEMALLOC;
}

/*
 * Unless report_foreign: what kernel threads exchange, with the same content.  They
 * unmap nothing but what the OOM killer has condemned.
 */
static bool ummunotify_is_hidden(const struct mmu_notifier_range *range)
{
	return unlikely(!report_foreign) && current->flags & PF_KTHREAD &&
	       current->mm != range->mm && range->event != MMU_NOTIFY_UNMAP;
}

static u32 ummunotify_causes(const struct mmu_notifier_range *range)
{
	u32 causes;

	causes = ummunotify_cause_of(range->event);
	if (report_foreign && ummunotify_is_foreign(range))
		causes |= UMMUNOTIFY_EVENT_CAUSE_FOREIGN;
	return causes;
}

/* With constants for the last two arguments: most of it goes away. */
static __always_inline void
ummunotify_invalidate(struct ummunotify_ctx *ctx,
		      const struct mmu_notifier_range *range,
		      enum ummunotify_phase phase,
		      struct ummunotify_tracker *tracker)
{
	u16 reasons = REASONS_ALL;
	u32 causes = 0;

	if (ummunotify_is_hidden(range))
		return;
	if (tracker || READ_ONCE(ctx->features) & (UMMUNOTIFY_FEATURE_CAUSE |
						   UMMUNOTIFY_FEATURE_FILTER)) {
		causes = ummunotify_causes(range);
		if (causes & UMMUNOTIFY_REGION_CAUSE_MASK)
			reasons = REASONS(causes & UMMUNOTIFY_REGION_CAUSE_MASK);
	}

	/* What is under way is tracked in any case. */
	if (!tracker) {
		if (phase == UMMUNOTIFY_PHASE_END &&
		    ummunotify_settled(ctx, range->start, range->end - 1,
				       causes))
			return;
		if (!(reasons & READ_ONCE(ctx->reasons)))
			return;
	}
	ummunotify_walk(&(struct ummunotify_walk) {
		.ctx		= ctx,
		.tracker	= tracker,
		.phase		= phase,
		.start		= range->start,
		.last		= range->end - 1,
		.causes		= causes,
		.reasons	= reasons,
		.may_sleep	= mmu_notifier_range_blockable(range),
	});
}

/* Apart, so that a miss does not pay for them. */
static noinline void
ummunotify_start_within_bounds(struct ummunotify_ctx *ctx,
			       const struct mmu_notifier_range *range)
{
	ummunotify_invalidate(ctx, range, UMMUNOTIFY_PHASE_START, NULL);
}

static noinline void
ummunotify_end_within_bounds(struct ummunotify_ctx *ctx,
			     const struct mmu_notifier_range *range)
{
	ummunotify_invalidate(ctx, range, UMMUNOTIFY_PHASE_END, NULL);
}

/* Before the first page goes away, the counter rises and reports are queued. */
static int
ummunotify_invalidate_range_start(struct mmu_notifier *notifier,
				  const struct mmu_notifier_range *range)
{
	struct ummunotify_ctx *ctx = notifier_ctx(notifier);

	if (!ummunotify_misses(ctx, range))
		ummunotify_start_within_bounds(ctx, range);
	return 0;
}

/*
 * While pages went away, a report may have been read and its range been looked
 * at again, or a region been registered, too early to see the change: report
 * once more, now that the page tables have changed.
 */
static void
ummunotify_invalidate_range_end(struct mmu_notifier *notifier,
				const struct mmu_notifier_range *range)
{
	struct ummunotify_ctx *ctx = notifier_ctx(notifier);

	/*
	 * Pairs with the one in ummunotify_register(): either the region just
	 * registered is seen here, or its owner sees the new page tables.
	 */
	smp_mb();
	if (!ummunotify_misses(ctx, range))
		ummunotify_end_within_bounds(ctx, range);
}

/* The last user of the address space is gone, or the fd is being closed. */
static void ummunotify_mm_release(struct mmu_notifier *notifier,
				  struct mm_struct *mm)
{
	struct ummunotify_walk walk = {
		.ctx		= notifier_ctx(notifier),
		.phase		= UMMUNOTIFY_PHASE_FINAL,
		.start		= 0,
		.last		= ULONG_MAX,
		.causes		= UMMUNOTIFY_EVENT_CAUSE_END,
		.reasons	= REASONS_ALL,
		.may_sleep	= true,
	};
	struct ummunotify_ctx *ctx = walk.ctx;
	bool ignore;

	raw_spin_lock(&ctx->lock);
	ignore = ctx->closing || ctx->ended;
	ctx->ended = true;
	raw_spin_unlock(&ctx->lock);
	if (ignore)
		return;

	ummunotify_walk(&walk);
	raw_spin_lock(&ctx->lock);
	/* Pairs with the acquire in ummunotify_read_iter(). */
	smp_store_release(&ctx->final, true);
	raw_spin_unlock(&ctx->lock);
	wake_up_interruptible_poll(&ctx->wait, EPOLLIN | EPOLLRDNORM | EPOLLHUP);
	kill_fasync(&ctx->fasync, SIGIO, POLL_HUP);
}

static const struct mmu_notifier_ops ummunotify_mmu_notifier_ops = {
	.invalidate_range_start	= ummunotify_invalidate_range_start,
	.invalidate_range_end	= ummunotify_invalidate_range_end,
	.release		= ummunotify_mm_release,
};

/* The tracker sees everything, and is the only one to report. */

static int
ummunotify_tracked_range_start(struct mmu_notifier *notifier,
			       const struct mmu_notifier_range *range)
{
	struct ummunotify_tracker *tracker =
		container_of(notifier, struct ummunotify_tracker, notifier);

	ummunotify_invalidate(tracker->ctx, range, UMMUNOTIFY_PHASE_START,
			      tracker);
	return 0;
}

static void
ummunotify_tracked_range_end(struct mmu_notifier *notifier,
			     const struct mmu_notifier_range *range)
{
	struct ummunotify_tracker *tracker =
		container_of(notifier, struct ummunotify_tracker, notifier);

	ummunotify_invalidate(tracker->ctx, range, UMMUNOTIFY_PHASE_END, tracker);
}

static const struct mmu_notifier_ops ummunotify_tracker_ops = {
	.invalidate_range_start	= ummunotify_tracked_range_start,
	.invalidate_range_end	= ummunotify_tracked_range_end,
};

/* The mapped area of state words */

#define UMMUNOTIFY_STATE_PGOFF	(UMMUNOTIFY_STATE_OFFSET >> PAGE_SHIFT)

static void ummunotify_free_state_page(struct ummunotify_state_page *page)
{
	put_page(page->page);
	kfree(page->serials);
	kfree(page);
}

static struct ummunotify_state_page *ummunotify_alloc_state_page(void)
{
	struct ummunotify_state_page *page;
	u64 *words;
	size_t i;

	page = kzalloc(sizeof(*page), GFP_KERNEL_ACCOUNT);
	if (!page)
		return NULL;
	page->serials = kmalloc_array(UMMUNOTIFY_PAGE_SLOTS, sizeof(*page->serials),
				      GFP_KERNEL_ACCOUNT);
	page->page = alloc_page(UMMUNOTIFY_GFP_MAPPED);
	if (!page->serials || !page->page) {
		if (page->page)
			put_page(page->page);
		kfree(page->serials);
		kfree(page);
		return NULL;
	}
	words = page_address(page->page);
	for (i = 0; i < UMMUNOTIFY_PAGE_SLOTS; i++)
		words[i] = UMMUNOTIFY_STATE_BUSY;
	return page;
}

/* Return: NULL if there is no memory. */
static struct ummunotify_state_page *
ummunotify_provide_state_page(struct ummunotify_states *states,
			      unsigned long index)
{
	struct ummunotify_state_page *page, *other;

	/* Pairs with the cmpxchg() of who has allocated it. */
	page = smp_load_acquire(&states->pages[index]);
	if (page)
		return page;
	page = ummunotify_alloc_state_page();
	if (!page)
		return NULL;
	other = cmpxchg(&states->pages[index], NULL, page);
	if (!other)
		return page;
	ummunotify_free_state_page(page);
	return other;
}

static void ummunotify_free_states(struct kref *refs)
{
	struct ummunotify_states *states =
		container_of(refs, struct ummunotify_states, refs);
	unsigned long i;

	for (i = 0; i < states->nr_pages; i++)
		if (states->pages[i])
			ummunotify_free_state_page(states->pages[i]);
	kvfree(states);
}

/* The first mapping says how many there are; later ones may be smaller. */
static struct ummunotify_states *
ummunotify_provide_states(struct ummunotify_ctx *ctx, unsigned long nr_pages)
{
	struct ummunotify_states *states, *other;

	/* Pairs with the cmpxchg() of who has allocated them. */
	states = smp_load_acquire(&ctx->states);
	if (!states) {
		if (nr_pages > UMMUNOTIFY_STATE_SIZE_MAX >> PAGE_SHIFT)
			return ERR_PTR(-EINVAL);
		states = kvzalloc(struct_size(states, pages, nr_pages),
				  GFP_KERNEL_ACCOUNT);
		if (!states)
			return ERR_PTR(-ENOMEM);
		kref_init(&states->refs);
		states->nr_pages = nr_pages;
		other = cmpxchg(&ctx->states, NULL, states);
		if (other) {
			kref_put(&states->refs, ummunotify_free_states);
			states = other;
		}
	}
	return nr_pages <= states->nr_pages ? states : ERR_PTR(-EINVAL);
}

/* Before the lock is taken: it may allocate. */
static int ummunotify_prepare_slot(struct ummunotify_ctx *ctx, u32 slot)
{
	unsigned long index = slot / UMMUNOTIFY_PAGE_SLOTS;
	struct ummunotify_states *states;

	/* Pairs with the cmpxchg() of who has allocated them. */
	states = smp_load_acquire(&ctx->states);
	if (!states || index >= states->nr_pages)
		return -EINVAL;
	return ummunotify_provide_state_page(states, index) ? 0 : -ENOMEM;
}

/* close(): nobody watches any more. */
static void ummunotify_finish_states(struct ummunotify_ctx *ctx)
{
	unsigned long i, slot;

	for (i = 0; ctx->states && i < ctx->states->nr_pages; i++) {
		if (!ctx->states->pages[i])
			continue;
		slot = i * UMMUNOTIFY_PAGE_SLOTS;
		raw_spin_lock(&ctx->lock);
		do
			ummunotify_count_state(ctx, slot, true);
		while (++slot % UMMUNOTIFY_PAGE_SLOTS);
		raw_spin_unlock(&ctx->lock);
		cond_resched();
	}
}

/* Registering and unregistering */

static bool ummunotify_slot_is_used(struct ummunotify_ctx *ctx, u32 slot)
{
	return test_bit(slot % UMMUNOTIFY_PAGE_SLOTS,
			ummunotify_state_page(ctx, slot)->used);
}

static void ummunotify_take_slot(struct ummunotify_ctx *ctx,
				 struct ummunotify_region *region)
{
	__set_bit(region->slot % UMMUNOTIFY_PAGE_SLOTS,
		  ummunotify_state_page(ctx, region->slot)->used);
	*ummunotify_serial(ctx, region->slot) = ctx->serial++;
	region->busy = ummunotify_busy(ctx->tracker, region);
	ummunotify_count_state(ctx, region->slot, region->busy);
}

static void ummunotify_leave_slot(struct ummunotify_ctx *ctx, u32 slot)
{
	__clear_bit(slot % UMMUNOTIFY_PAGE_SLOTS,
		    ummunotify_state_page(ctx, slot)->used);
	ummunotify_count_state(ctx, slot, true);
}

/* Takes over @region if it succeeds. */
static int ummunotify_insert(struct ummunotify_ctx *ctx,
			     struct ummunotify_region *region)
{
	lockdep_assert_held(&ctx->lock);

	if (ctx->ended)
		return -ESRCH;
	if (ctx->nr_regions >= READ_ONCE(max_regions))
		return -ENOSPC;
	if (region->slot && ummunotify_slot_is_used(ctx, region->slot))
		return -EBUSY;
	if (!ummunotify_cookies_insert(ctx, region))
		return -EINVAL;

	ctx->nr_regions++;
	if ((ctx->reasons | region->reasons) != ctx->reasons)
		WRITE_ONCE(ctx->reasons, ctx->reasons | region->reasons);
	if (region->slot)
		ummunotify_take_slot(ctx, region);
	if (region->last + 1 != region->start) {
		ummunotify_ranges_insert(ctx, region);
		ummunotify_update_bounds(ctx);
		ummunotify_unsettle(ctx);
	} else {
		RB_CLEAR_NODE(&region->range_node);
	}
	return 0;
}

/* Take a region out of everything; its memory remains. */
static void ummunotify_remove(struct ummunotify_ctx *ctx,
			      struct ummunotify_region *region)
{
	lockdep_assert_held(&ctx->lock);

	rb_erase_cached(&region->cookie_node, &ctx->cookies);
	if (!RB_EMPTY_NODE(&region->range_node)) {
		rb_erase_augmented_cached(&region->range_node, &ctx->ranges,
					  &ummunotify_ranges_augment);
		ummunotify_update_bounds(ctx);
	}
	if (!--ctx->nr_regions)
		WRITE_ONCE(ctx->reasons, 0);
	if (region->slot)
		ummunotify_leave_slot(ctx, region->slot);
}

/* Keep an unregistered region, or leave it to the caller to free. */
static bool ummunotify_spare(struct ummunotify_ctx *ctx,
			     struct ummunotify_region *region)
{
	lockdep_assert_held(&ctx->lock);

	if (ctx->nr_spares >= UMMUNOTIFY_SPARES +
			      ctx->nr_regions / UMMUNOTIFY_SPARES_SHARE)
		return false;
	ctx->nr_spares++;
	list_add(&region->pending, &ctx->spares);
	return true;
}

static struct ummunotify_region *
ummunotify_take_spare(struct ummunotify_ctx *ctx)
{
	struct ummunotify_region *region;

	lockdep_assert_held(&ctx->lock);

	region = list_first_entry_or_null(&ctx->spares,
					  struct ummunotify_region, pending);
	if (region) {
		ctx->nr_spares--;
		list_del(&region->pending);
	}
	return region;
}

/* read() and poll() */

/*
 * Copy up to @room reports to the batch, and LAST if the list has no more,
 * without taking them off the list.
 *
 * Return: number of records.
 */
static size_t ummunotify_peek(struct ummunotify_ctx *ctx, size_t room)
{
	struct ummunotify_event *event = ctx->batch;
	struct ummunotify_event *end = event + room;
	struct ummunotify_region *region;
	u32 told = ctx->features & UMMUNOTIFY_FEATURE_CAUSE ? REPORT_CAUSES : 0;

	raw_spin_lock(&ctx->lock);
	list_for_each_entry(region, &ctx->pending, pending) {
		if (event == end)
			goto out;
		event->type = UMMUNOTIFY_EVENT_TYPE_INVAL;
		event->flags = region->report & told;
		if (region->report & REPORT_HINT)
			event->flags |= UMMUNOTIFY_EVENT_FLAG_HINT;
		event->hint_start = region->hint_start;
		event->hint_end = (u64)region->hint_last + 1;
		event->user_cookie_counter = region->cookie;
		event++;
		region->report |= REPORT_PEEKED;
	}
	if (event < end && (event > ctx->batch || ctx->last_due)) {
		event->type = UMMUNOTIFY_EVENT_TYPE_LAST;
		event->flags = 0;
		event->hint_start = 0;
		event->hint_end = 0;
		event->user_cookie_counter = ctx->generation;
		event++;
	}
out:
	raw_spin_unlock(&ctx->lock);
	return event - ctx->batch;
}

/* Nothing was delivered: the reports stay where they are. */
static void ummunotify_unpeek(struct ummunotify_ctx *ctx)
{
	struct ummunotify_region *region;

	raw_spin_lock(&ctx->lock);
	list_for_each_entry(region, &ctx->pending, pending) {
		if (!(region->report & REPORT_PEEKED))
			break;
		region->report &= ~(REPORT_PEEKED | REPORT_CHANGED);
	}
	raw_spin_unlock(&ctx->lock);
}

/*
 * Take what was delivered off the list.  The reports peeked at are still at its
 * head, but for those of regions that were unregistered meanwhile.
 *
 * Return: number of the @n records that count as delivered: without LAST, if it
 * is not true any more.
 */
static size_t ummunotify_commit(struct ummunotify_ctx *ctx, size_t n)
{
	const struct ummunotify_event *final = &ctx->batch[n - 1];
	struct ummunotify_region *region, *next;
	LIST_HEAD(surplus);

	raw_spin_lock(&ctx->lock);
	list_for_each_entry_safe(region, next, &ctx->pending, pending) {
		if (!(region->report & REPORT_PEEKED))
			break;
		/* A one-shot region ends with what is delivered, whatever came since. */
		if (region->report & REPORT_CHANGED && !region->once) {
			region->report &= ~(REPORT_PEEKED | REPORT_CHANGED);
		} else {
			region->report = 0;
			list_del(&region->pending);
			ctx->nr_pending--;
			if (region->once) {
				ummunotify_remove(ctx, region);
				if (ummunotify_spare(ctx, region))
					continue;
				/* One too many, and one more with each less. */
				list_add(&region->pending, &surplus);
				region = ummunotify_take_spare(ctx);
				if (region)
					list_add(&region->pending, &surplus);
			}
		}
	}
	ummunotify_unsettle(ctx);

	ctx->last_due = true;
	if (final->type == UMMUNOTIFY_EVENT_TYPE_LAST) {
		if (list_empty(&ctx->pending) &&
		    ctx->generation == final->user_cookie_counter) {
			ctx->told_generation = ctx->generation;
			ctx->last_due = false;
		} else {
			n--;
		}
	}
	raw_spin_unlock(&ctx->lock);

	list_for_each_entry_safe(region, next, &surplus, pending)
		kmem_cache_free(ummunotify_region_cache, region);
	return n;
}

/* A few stores: less than a string copy takes to start. */
static bool ummunotify_store_batch(const struct ummunotify_ctx *ctx,
				   struct ummunotify_event __user *to, size_t n)
{
	const struct ummunotify_event *event = ctx->batch;
	const struct ummunotify_event *end = event + n;

	if (!user_write_access_begin(to, n * sizeof(*to)))
		return false;
	for (; event < end; event++, to++) {
		unsafe_put_user(event->type, &to->type, efault);
		unsafe_put_user(event->flags, &to->flags, efault);
		unsafe_put_user(event->hint_start, &to->hint_start, efault);
		unsafe_put_user(event->hint_end, &to->hint_end, efault);
		unsafe_put_user(event->user_cookie_counter,
				&to->user_cookie_counter, efault);
	}
	user_write_access_end();
	return true;

efault:
	user_write_access_end();
	return false;
}

/* All of it or nothing: half a record is of no use. */
static bool ummunotify_put_batch(const struct ummunotify_ctx *ctx,
				 struct iov_iter *to, size_t n)
{
	size_t size = n * sizeof(*ctx->batch);
	void __user *buffer = ummunotify_iter_buffer(to, size);
	size_t copied;

	if (buffer) {
		if (!ummunotify_store_batch(ctx, buffer, n))
			return false;
		iov_iter_advance(to, size);
		return true;
	}

	copied = copy_to_iter(ctx->batch, size, to);
	if (copied == size)
		return true;
	iov_iter_revert(to, copied);
	return false;
}

/* Return: number of records delivered, 0 if there are none, or an error. */
static ssize_t ummunotify_deliver(struct ummunotify_ctx *ctx,
				  struct iov_iter *to)
{
	size_t room = iov_iter_count(to) / sizeof(struct ummunotify_event);
	size_t delivered = 0;

	while (delivered < room) {
		size_t n = ummunotify_peek(ctx, min_t(size_t, room - delivered,
						      UMMUNOTIFY_READ_BATCH));
		size_t counted;

		if (!n)
			break;
		if (!ummunotify_put_batch(ctx, to, n)) {
			ummunotify_unpeek(ctx);
			if (!delivered)
				return -EFAULT;
			break;
		}
		counted = ummunotify_commit(ctx, n);
		/* What does not count is written over. */
		if (unlikely(counted < n))
			iov_iter_revert(to, (n - counted) * sizeof(*ctx->batch));
		n = counted;
		delivered += n;
		if (n && ctx->batch[n - 1].type == UMMUNOTIFY_EVENT_TYPE_LAST)
			break;
		if (delivered && signal_pending(current))
			break;
		cond_resched();
	}
	return delivered;
}

/* Is there something that read() need not wait for: records, or the end? */
static bool ummunotify_ready(struct ummunotify_ctx *ctx)
{
	bool ready;

	raw_spin_lock(&ctx->lock);
	ready = ummunotify_readable(ctx) || READ_ONCE(ctx->final);
	raw_spin_unlock(&ctx->lock);
	return ready;
}

/* The holder may be waiting for a page of another process that reads. */
static int ummunotify_lock_reads(struct ummunotify_ctx *ctx, bool nowait)
{
	if (nowait)
		return mutex_trylock(&ctx->read_lock) ? 0 : -EAGAIN;
	return mutex_lock_interruptible(&ctx->read_lock) ? -ERESTARTSYS : 0;
}

/*
 * IOCB_NOWAIT never waits: neither for reports, whatever others have made of
 * O_NONBLOCK, which all holders of the file share; nor for other readers.
 */
static ssize_t ummunotify_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct ummunotify_ctx *ctx = iocb->ki_filp->private_data;
	bool nowait = iocb->ki_flags & IOCB_NOWAIT;
	ssize_t ret;
	bool final;

	if (iov_iter_count(to) < sizeof(struct ummunotify_event))
		return -EINVAL;
	WRITE_ONCE(ctx->used, true);

	for (;;) {
		ret = ummunotify_lock_reads(ctx, nowait);
		if (ret)
			return ret;
		/* If no report follows, those queued are seen below. */
		final = smp_load_acquire(&ctx->final);
		ret = ummunotify_deliver(ctx, to);
		mutex_unlock(&ctx->read_lock);
		trace_ummunotify_read(ctx, ret);
		if (ret > 0)
			return ret * sizeof(struct ummunotify_event);
		if (ret || final)
			return ret;

		if (nowait || iocb->ki_filp->f_flags & O_NONBLOCK)
			return -EAGAIN;
		if (wait_event_interruptible(ctx->wait, ummunotify_ready(ctx)))
			return -ERESTARTSYS;
	}
}

static __poll_t ummunotify_poll(struct file *file, poll_table *wait)
{
	struct ummunotify_ctx *ctx = file->private_data;
	__poll_t mask = 0;

	poll_wait(file, &ctx->wait, wait);

	raw_spin_lock(&ctx->lock);
	if (ummunotify_readable(ctx))
		mask |= EPOLLIN | EPOLLRDNORM;
	/* End of file does not block either. */
	if (READ_ONCE(ctx->final))
		mask |= EPOLLIN | EPOLLRDNORM | EPOLLHUP;
	raw_spin_unlock(&ctx->lock);
	return mask;
}

static int ummunotify_fasync(int fd, struct file *file, int on)
{
	struct ummunotify_ctx *ctx = file->private_data;

	return fasync_helper(fd, file, on, &ctx->fasync);
}

/* ioctl() */

/*
 * Have the tracker take over.  To register a notifier takes all locks that an
 * invalidation runs under: none is under way then, and of all that come later the
 * tracker sees the start and the end.
 */
static int ummunotify_start_tracking(struct ummunotify_ctx *ctx)
{
	struct mm_struct *mm = ctx->notifier.mm;
	struct ummunotify_tracker *tracker;
	int ret = -ESRCH;

	tracker = kzalloc(sizeof(*tracker), GFP_KERNEL_ACCOUNT);
	if (!tracker)
		return -ENOMEM;
	tracker->notifier.ops = &ummunotify_tracker_ops;
	tracker->ctx = ctx;
	if (mmget_not_zero(mm)) {
		ret = mmu_notifier_register(&tracker->notifier, mm);
		mmput(mm);
	}
	if (ret) {
		kfree(tracker);
		/* A signal stopped the wait for the address space's locks. */
		return ret == -EINTR ? -ERESTARTSYS : ret;
	}

	raw_spin_lock(&ctx->lock);
	ctx->tracker = tracker;
	ummunotify_update_bounds(ctx);
	raw_spin_unlock(&ctx->lock);
	return 0;
}

static long ummunotify_exchange_features(struct ummunotify_ctx *ctx,
					 u32 __user *arg)
{
	u32 features;
	bool late;
	int ret;

	if (get_user(features, arg))
		return -EFAULT;
	features &= UMMUNOTIFY_FEATURES;

	raw_spin_lock(&ctx->lock);
	late = READ_ONCE(ctx->used) || ctx->exchanged;
	ctx->exchanged = true;
	raw_spin_unlock(&ctx->lock);
	if (late)
		return -EINVAL;

	if (features & UMMUNOTIFY_FEATURE_STATE) {
		ret = ummunotify_start_tracking(ctx);
		if (ret) {
			raw_spin_lock(&ctx->lock);
			ctx->exchanged = false;
			raw_spin_unlock(&ctx->lock);
			return ret;
		}
	}
	raw_spin_lock(&ctx->lock);
	WRITE_ONCE(ctx->features, features);
	raw_spin_unlock(&ctx->lock);
	return put_user(features, arg);
}

static u16 ummunotify_wanted(u32 flags)
{
	u32 causes = flags & UMMUNOTIFY_REGION_CAUSE_MASK;

	if (!causes)
		return REASONS_ALL;
	/* The kernel does not tell them apart. */
	if (causes & UMMUNOTIFY_EVENT_CAUSE_MOVE)
		causes |= UMMUNOTIFY_EVENT_CAUSE_UNMAP;
	return REASONS(causes);
}

/**
 * struct ummunotify_options - what features add to a registration
 * @reasons:	the causes that are asked for
 * @once:	to be unregistered when the report is read
 * @slot:	of the state word, or 0
 */
struct ummunotify_options {
	u16	reasons;
	bool	once;
	u32	slot;
};

/* What was not negotiated is not looked at: it is garbage in clients of 2010. */
static noinline int
ummunotify_check_options(struct ummunotify_ctx *ctx, u32 features,
			 const struct ummunotify_register_ioctl *parm,
			 struct ummunotify_options *options)
{
	u32 known = 0;

	if (features & UMMUNOTIFY_FEATURE_FILTER)
		known |= UMMUNOTIFY_REGION_CAUSE_MASK;
	if (features & UMMUNOTIFY_FEATURE_ONCE)
		known |= UMMUNOTIFY_REGION_FLAG_ONCE;
	if (known) {
		if (parm->flags & ~known)
			return -EINVAL;
		options->reasons = ummunotify_wanted(parm->flags);
		options->once = parm->flags & UMMUNOTIFY_REGION_FLAG_ONCE;
	}

	if (!(features & UMMUNOTIFY_FEATURE_STATE) || !parm->reserved)
		return 0;
	options->slot = parm->reserved;
	return ummunotify_prepare_slot(ctx, options->slot);
}

static long ummunotify_register(struct ummunotify_ctx *ctx,
				struct ummunotify_register_ioctl __user *arg)
{
	struct ummunotify_options options = { .reasons = REASONS_ALL };
	struct ummunotify_register_ioctl parm;
	struct ummunotify_region *region;
	u64 start, end;
	u32 features;
	bool kept;
	int ret;

	if (copy_from_user(&parm, arg, sizeof(parm)))
		return -EFAULT;
	WRITE_ONCE(ctx->used, true);

	start = untagged_addr(parm.start);
	end = untagged_addr(parm.end);
	if (start > end || end > ULONG_MAX)
		return -EINVAL;
	features = READ_ONCE(ctx->features);
	if (features) {
		ret = ummunotify_check_options(ctx, features, &parm, &options);
		if (ret)
			return ret;
	}

	raw_spin_lock(&ctx->lock);
	region = ummunotify_take_spare(ctx);
	if (!region) {
		raw_spin_unlock(&ctx->lock);
		region = kmem_cache_alloc(ummunotify_region_cache, GFP_KERNEL);
		if (!region)
			return -ENOMEM;
		raw_spin_lock(&ctx->lock);
	}
	region->start = start;
	region->last = end - 1;
	region->cookie = parm.user_cookie;
	region->report = 0;
	region->reasons = options.reasons;
	region->slot = options.slot;
	region->once = options.once;
	ret = ummunotify_insert(ctx, region);
	kept = !ret || ummunotify_spare(ctx, region);
	raw_spin_unlock(&ctx->lock);
	if (!kept)
		kmem_cache_free(ummunotify_region_cache, region);
	trace_ummunotify_register(ctx, &parm, ret);

	/*
	 * Pairs with the one in ummunotify_invalidate_range_end(): whatever the
	 * caller does with the range now comes behind the bounds that cover it.
	 */
	smp_mb();
	return ret;
}

static long ummunotify_unregister(struct ummunotify_ctx *ctx,
				  u64 __user *arg)
{
	struct ummunotify_region *region, *surplus = NULL;
	bool wake = false;
	bool kept;
	u64 cookie;

	if (get_user(cookie, arg))
		return -EFAULT;

	raw_spin_lock(&ctx->lock);
	region = ummunotify_cookies_find(ctx, cookie);
	if (!region) {
		raw_spin_unlock(&ctx->lock);
		trace_ummunotify_unregister(ctx, cookie, -EINVAL);
		return -EINVAL;
	}
	ummunotify_remove(ctx, region);
	if (region->report & REPORT_PENDING) {
		list_del(&region->pending);
		ctx->nr_pending--;
		/* The counter has risen, and only LAST is left to explain it. */
		if (list_empty(&ctx->pending)) {
			ctx->last_due = true;
			wake = true;
		}
	}
	/* Where there are enough, there are more with every region less. */
	kept = ummunotify_spare(ctx, region);
	if (!kept)
		surplus = ummunotify_take_spare(ctx);
	raw_spin_unlock(&ctx->lock);

	if (!kept)
		kmem_cache_free(ummunotify_region_cache, region);
	if (surplus)
		kmem_cache_free(ummunotify_region_cache, surplus);
	if (wake)
		ummunotify_wake(ctx);
	trace_ummunotify_unregister(ctx, cookie, 0);
	return 0;
}

static long ummunotify_ioctl(struct file *file, unsigned int cmd,
			     unsigned long arg)
{
	struct ummunotify_ctx *ctx = file->private_data;
	void __user *argp = (void __user *)arg;

	switch (cmd) {
	case UMMUNOTIFY_EXCHANGE_FEATURES:
		return ummunotify_exchange_features(ctx, argp);
	case UMMUNOTIFY_REGISTER_REGION:
		return ummunotify_register(ctx, argp);
	case UMMUNOTIFY_UNREGISTER_REGION:
		return ummunotify_unregister(ctx, argp);
	default:
		return -ENOTTY;
	}
}

/* mmap() */

static vm_fault_t ummunotify_counter_fault(struct vm_fault *vmf)
{
	struct page *counter = vmf->vma->vm_private_data;

	get_page(counter);
	vmf->page = counter;
	return 0;
}

static const struct vm_operations_struct ummunotify_counter_vm_ops = {
	.fault	= ummunotify_counter_fault,
};

static int ummunotify_counter_release(struct inode *inode, struct file *file)
{
	put_page(file->private_data);
	return 0;
}

static const struct file_operations ummunotify_counter_fops = {
	.owner		= THIS_MODULE,
	.release	= ummunotify_counter_release,
};

static vm_fault_t ummunotify_states_fault(struct vm_fault *vmf)
{
	struct ummunotify_states *states = vmf->vma->vm_private_data;
	unsigned long index = vmf->pgoff - UMMUNOTIFY_STATE_PGOFF;
	struct ummunotify_state_page *page;

	if (index >= states->nr_pages)
		return VM_FAULT_SIGBUS;
	page = ummunotify_provide_state_page(states, index);
	if (!page)
		return VM_FAULT_OOM;
	get_page(page->page);
	vmf->page = page->page;
	return 0;
}

static const struct vm_operations_struct ummunotify_states_vm_ops = {
	.fault	= ummunotify_states_fault,
};

static int ummunotify_states_release(struct inode *inode, struct file *file)
{
	struct ummunotify_states *states = file->private_data;

	kref_put(&states->refs, ummunotify_free_states);
	return 0;
}

static const struct file_operations ummunotify_states_fops = {
	.owner		= THIS_MODULE,
	.release	= ummunotify_states_release,
};

/*
 * The mapping holds a file of its own, which holds what is mapped.  Did it hold the
 * device's file, close() would leave everything running behind it, instead of
 * saying for the last time that something has changed.
 *
 * With success, takes over the caller's reference to @what.
 */
static int ummunotify_map(struct vm_area_struct *vma, void *what,
			  const struct file_operations *fops,
			  const struct vm_operations_struct *vm_ops)
{
	struct file *file;

	file = anon_inode_getfile("[ummunotify]", fops, what, O_RDONLY);
	if (IS_ERR(file))
		return PTR_ERR(file);

	vma_set_file(vma, file);
	fput(file);
	ummunotify_vm_flags_mod(vma, VM_DONTEXPAND | VM_DONTDUMP, VM_MAYWRITE);
	vma->vm_private_data = what;
	vma->vm_ops = vm_ops;
	return 0;
}

static int ummunotify_map_counter(struct ummunotify_ctx *ctx,
				  struct vm_area_struct *vma)
{
	int ret;

	get_page(ctx->counter);
	ret = ummunotify_map(vma, ctx->counter, &ummunotify_counter_fops,
			     &ummunotify_counter_vm_ops);
	if (ret)
		put_page(ctx->counter);
	return ret;
}

static int ummunotify_map_states(struct ummunotify_ctx *ctx,
				 struct vm_area_struct *vma)
{
	struct ummunotify_states *states;
	int ret;

	states = ummunotify_provide_states(ctx, vma_pages(vma));
	if (IS_ERR(states))
		return PTR_ERR(states);

	kref_get(&states->refs);
	ret = ummunotify_map(vma, states, &ummunotify_states_fops,
			     &ummunotify_states_vm_ops);
	if (ret)
		kref_put(&states->refs, ummunotify_free_states);
	return ret;
}

static int ummunotify_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct ummunotify_ctx *ctx = file->private_data;
	bool counter = vma->vm_pgoff == 0 && vma_pages(vma) == 1;
	bool states = vma->vm_pgoff == UMMUNOTIFY_STATE_PGOFF &&
		      READ_ONCE(ctx->features) & UMMUNOTIFY_FEATURE_STATE;

	if (!counter && !states)
		return -EINVAL;
	if (vma->vm_flags & VM_WRITE)
		return -EACCES;
	return counter ? ummunotify_map_counter(ctx, vma) :
			 ummunotify_map_states(ctx, vma);
}

/* open() and close() */

static int ummunotify_open(struct inode *inode, struct file *file)
{
	struct ummunotify_ctx *ctx;
	int ret = -ENOMEM;

	if (file->f_mode & FMODE_WRITE || !current->mm)
		return -EINVAL;

	ctx = kzalloc(sizeof(*ctx), GFP_KERNEL_ACCOUNT);
	if (!ctx)
		return -ENOMEM;
	ctx->counter = alloc_page(UMMUNOTIFY_GFP_MAPPED | __GFP_ZERO);
	if (!ctx->counter)
		goto err_free;

	raw_spin_lock_init(&ctx->lock);
	ctx->ranges = RB_ROOT_CACHED;
	ctx->cookies = RB_ROOT_CACHED;
	ummunotify_update_bounds(ctx);
	INIT_LIST_HEAD(&ctx->spares);
	INIT_LIST_HEAD(&ctx->pending);
	ummunotify_unsettle(ctx);
	ctx->told_generation = U64_MAX;
	mutex_init(&ctx->read_lock);
	init_waitqueue_head(&ctx->wait);
	init_irq_work(&ctx->wake_work, ummunotify_wake_work);

	ctx->notifier.ops = &ummunotify_mmu_notifier_ops;
	ret = mmu_notifier_register(&ctx->notifier, current->mm);
	if (ret)
		goto err_put_page;

	file->private_data = ctx;
	file->f_mode |= FMODE_NOWAIT;
	return stream_open(inode, file);

err_put_page:
	put_page(ctx->counter);
err_free:
	kfree(ctx);
	/* A signal stopped the wait for the address space's locks. */
	return ret == -EINTR ? -ERESTARTSYS : ret;
}

static int ummunotify_release(struct inode *inode, struct file *file)
{
	struct ummunotify_ctx *ctx = file->private_data;
	struct ummunotify_region *region, *next;
	unsigned int freed = 0;

	/* A mapping of the page reads "changed" before nobody watches any more. */
	raw_spin_lock(&ctx->lock);
	ctx->closing = true;
	ummunotify_raise_generation(ctx);
	raw_spin_unlock(&ctx->lock);
	ummunotify_finish_states(ctx);
	if (ctx->tracker)
		mmu_notifier_unregister(&ctx->tracker->notifier,
					ctx->tracker->notifier.mm);
	mmu_notifier_unregister(&ctx->notifier, ctx->notifier.mm);
	irq_work_sync(&ctx->wake_work);

	/* Nobody else is left. */
	rbtree_postorder_for_each_entry_safe(region, next,
					     &ctx->cookies.rb_root,
					     cookie_node) {
		kmem_cache_free(ummunotify_region_cache, region);
		if (++freed % 1024 == 0)
			cond_resched();
	}
	list_for_each_entry_safe(region, next, &ctx->spares, pending) {
		kmem_cache_free(ummunotify_region_cache, region);
		if (++freed % 1024 == 0)
			cond_resched();
	}
	if (ctx->states)
		kref_put(&ctx->states->refs, ummunotify_free_states);
	kfree(ctx->tracker);
	put_page(ctx->counter);
	kfree(ctx);
	return 0;
}

/* By these lines, who was sent a descriptor recognises it without any risk. */
static void ummunotify_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct ummunotify_ctx *ctx = file->private_data;
	unsigned int regions, pending;
	u64 generation;

	raw_spin_lock(&ctx->lock);
	regions = ctx->nr_regions;
	pending = ctx->nr_pending;
	generation = ctx->generation;
	raw_spin_unlock(&ctx->lock);
	seq_printf(m, "ummunotify-regions:\t%u\n", regions);
	seq_printf(m, "ummunotify-pending:\t%u\n", pending);
	seq_printf(m, "ummunotify-generation:\t%llu\n", generation);
	seq_printf(m, "ummunotify-features:\t0x%x\n", READ_ONCE(ctx->features));
}

static const struct file_operations ummunotify_fops = {
	.owner		= THIS_MODULE,
	.open		= ummunotify_open,
	.release	= ummunotify_release,
	.read_iter	= ummunotify_read_iter,
	.poll		= ummunotify_poll,
	.fasync		= ummunotify_fasync,
	.unlocked_ioctl	= ummunotify_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.mmap		= ummunotify_mmap,
	.show_fdinfo	= ummunotify_show_fdinfo,
};

/*
 * Not a misc device: misc_open() holds the mutex of all misc devices while it
 * calls open(), which waits for the caller's mmap_lock here.  Who can hold that
 * for long, with a file system of his own say, would keep /dev/kvm and
 * /dev/fuse from being opened by everybody.
 */
static dev_t ummunotify_devt;
static struct cdev ummunotify_cdev;
static struct class *ummunotify_class;

static int __init ummunotify_init(void)
{
	struct device *device;
	int ret;

	ummunotify_region_cache = KMEM_CACHE(ummunotify_region, SLAB_ACCOUNT);
	if (!ummunotify_region_cache)
		return -ENOMEM;

	ret = alloc_chrdev_region(&ummunotify_devt, 0, 1, KBUILD_MODNAME);
	if (ret)
		goto err_cache;

	ummunotify_class = ummunotify_class_create(KBUILD_MODNAME);
	if (IS_ERR(ummunotify_class)) {
		ret = PTR_ERR(ummunotify_class);
		goto err_chrdev;
	}

	cdev_init(&ummunotify_cdev, &ummunotify_fops);
	ummunotify_cdev.owner = THIS_MODULE;
	ret = cdev_add(&ummunotify_cdev, ummunotify_devt, 1);
	if (ret)
		goto err_class;

	device = device_create(ummunotify_class, NULL, ummunotify_devt, NULL,
			       KBUILD_MODNAME);
	if (IS_ERR(device)) {
		ret = PTR_ERR(device);
		goto err_cdev;
	}
	return 0;

err_cdev:
	cdev_del(&ummunotify_cdev);
err_class:
	class_destroy(ummunotify_class);
err_chrdev:
	unregister_chrdev_region(ummunotify_devt, 1);
err_cache:
	kmem_cache_destroy(ummunotify_region_cache);
	return ret;
}

static void __exit ummunotify_exit(void)
{
	device_destroy(ummunotify_class, ummunotify_devt);
	cdev_del(&ummunotify_cdev);
	class_destroy(ummunotify_class);
	unregister_chrdev_region(ummunotify_devt, 1);
	kmem_cache_destroy(ummunotify_region_cache);
}

module_init(ummunotify_init);
module_exit(ummunotify_exit);

MODULE_AUTHOR("The aioummu authors");
MODULE_DESCRIPTION("MMU notifications for user space");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
