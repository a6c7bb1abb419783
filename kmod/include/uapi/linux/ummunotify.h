/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-2-Clause) */
/*
 * User-space interface of /dev/ummunotify: MMU notifications for user space.
 *
 * Binary compatible with the ummunotify driver proposed in 2010.
 * ummunotify.rst describes the behaviour behind these numbers.
 */
#ifndef _UAPI_LINUX_UMMUNOTIFY_H
#define _UAPI_LINUX_UMMUNOTIFY_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * struct ummunotify_register_ioctl - argument of UMMUNOTIFY_REGISTER_REGION
 * @start:	first byte of the watched range of virtual addresses
 * @end:	first byte behind the range; an empty range never reports
 * @user_cookie:	caller's name for the region, unique within the fd
 * @flags:	0, or what UMMUNOTIFY_FEATURE_FILTER and _ONCE define; ignored
 *		unless one of them was negotiated
 * @reserved:	0, or the slot of the region's state word; ignored unless
 *		UMMUNOTIFY_FEATURE_STATE was negotiated
 */
struct ummunotify_register_ioctl {
	__u64	start;
	__u64	end;
	__u64	user_cookie;
	__u32	flags;
	__u32	reserved;
};

#define UMMUNOTIFY_MAGIC		'U'

/*
 * Takes a mask of wanted features (UMMUNOTIFY_FEATURE_*) and returns those that
 * are granted.  Accepted once, before the first read() or registration.
 */
#define UMMUNOTIFY_EXCHANGE_FEATURES	_IOWR(UMMUNOTIFY_MAGIC, 1, __u32)
/* Start to watch a range of addresses. */
#define UMMUNOTIFY_REGISTER_REGION	_IOW(UMMUNOTIFY_MAGIC, 2, \
					     struct ummunotify_register_ioctl)
/* Stop to watch the region with this cookie; a pending report is dropped. */
#define UMMUNOTIFY_UNREGISTER_REGION	_IOW(UMMUNOTIFY_MAGIC, 3, __u64)

/* Records tell the causes of invalidations: UMMUNOTIFY_EVENT_CAUSE_*. */
#define UMMUNOTIFY_FEATURE_CAUSE	(1U << 0)
/*
 * A registration's flags may name causes (UMMUNOTIFY_REGION_CAUSE_MASK): others
 * are not reported for this region.
 */
#define UMMUNOTIFY_FEATURE_FILTER	(1U << 1)
/* A registration may name the slot of a state word in the mapped area. */
#define UMMUNOTIFY_FEATURE_STATE	(1U << 2)
/* A registration's flags may have UMMUNOTIFY_REGION_FLAG_ONCE. */
#define UMMUNOTIFY_FEATURE_ONCE		(1U << 3)

/* The region is unregistered when a read() delivers its report. */
#define UMMUNOTIFY_REGION_FLAG_ONCE	(1U << 0)

enum {
	/* Something in a region's range was invalidated. */
	UMMUNOTIFY_EVENT_TYPE_INVAL	= 0,
	/* No report is left; carries the generation of that moment. */
	UMMUNOTIFY_EVENT_TYPE_LAST	= 1
};

enum {
	/*
	 * hint_start and hint_end are the one range that was invalidated;
	 * otherwise they are the whole region.
	 */
	UMMUNOTIFY_EVENT_FLAG_HINT	= 1 << 0,

	/*
	 * Why, with UMMUNOTIFY_FEATURE_CAUSE; of all invalidations that the
	 * record reports.  None: it is not known.
	 */
	/* Unmapped, or moved elsewhere. */
	UMMUNOTIFY_EVENT_CAUSE_UNMAP		= 1 << 16,
	/* Pages were taken away or exchanged; the mapping is still there. */
	UMMUNOTIFY_EVENT_CAUSE_CLEAR		= 1 << 17,
	/* The protection of a mapping changed, or of pages for NUMA balancing. */
	UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING	= 1 << 18,
	/* The protection of pages changed: fork, copy on write, write-back. */
	UMMUNOTIFY_EVENT_CAUSE_PROTECT_PAGE	= 1 << 19,
	/* Somebody watches which pages are written to. */
	UMMUNOTIFY_EVENT_CAUSE_SOFT_DIRTY	= 1 << 20,
	/* Pages move to or from the memory of a device. */
	UMMUNOTIFY_EVENT_CAUSE_MIGRATE		= 1 << 21,
	/* A device gets pages for its exclusive use. */
	UMMUNOTIFY_EVENT_CAUSE_EXCLUSIVE	= 1 << 22,
	/* The process ends, or calls exec. */
	UMMUNOTIFY_EVENT_CAUSE_END		= 1 << 23,
	/* Moved elsewhere; the driver cannot tell that from UNMAP. */
	UMMUNOTIFY_EVENT_CAUSE_MOVE		= 1 << 24,
	/* By another process, or in reclaim: not by what the process itself did. */
	UMMUNOTIFY_EVENT_CAUSE_FOREIGN		= 1 << 25
};

#define UMMUNOTIFY_EVENT_CAUSE_MASK	0x03ff0000

/*
 * The causes that a registration may ask for, by the same bits; none: for all.
 * MOVE means UNMAP.  What has no known cause, and the end of the process, is
 * reported in any case.
 */
#define UMMUNOTIFY_REGION_CAUSE_MASK	0x01ff0000

/**
 * struct ummunotify_event - one record that read() returns
 * @type:	UMMUNOTIFY_EVENT_TYPE_INVAL or UMMUNOTIFY_EVENT_TYPE_LAST
 * @flags:	INVAL: UMMUNOTIFY_EVENT_FLAG_HINT or 0, and causes; LAST: 0
 * @hint_start:	INVAL: first invalidated byte; LAST: 0
 * @hint_end:	INVAL: first byte behind them; LAST: 0
 * @user_cookie_counter:	INVAL: the region's cookie; LAST: the generation
 */
struct ummunotify_event {
	__u32	type;
	__u32	flags;
	__u64	hint_start;
	__u64	hint_end;
	__u64	user_cookie_counter;
};

/*
 * mmap(NULL, UMMUNOTIFY_GENERATION_SIZE, PROT_READ, MAP_SHARED, fd,
 *      UMMUNOTIFY_GENERATION_OFFSET) maps the generation counter, a __u64.
 */
#define UMMUNOTIFY_GENERATION_OFFSET	0
#define UMMUNOTIFY_GENERATION_SIZE	8

/*
 * mmap(NULL, size, PROT_READ, MAP_SHARED, fd, UMMUNOTIFY_STATE_OFFSET) maps state
 * words, a __u64 for each slot, with UMMUNOTIFY_FEATURE_STATE.  The first call
 * says how many.  Slot 0 is that of regions without a state word.
 */
#define UMMUNOTIFY_STATE_OFFSET		0x100000

/*
 * Something is being done to the region at this moment, or may be, or no region
 * has this slot.  The other bits count.
 */
#define UMMUNOTIFY_STATE_BUSY		1

#if !defined(__KERNEL__) && (defined(__GNUC__) || defined(__clang__))
/**
 * ummunotify_load_word() - read a mapped word: the generation, or a state
 * @word64: where it is mapped
 *
 * No system call.  Also right on 32-bit CPUs, where the two halves are loaded
 * in the order (low, then high) in which no equality with an earlier value can
 * be an accident; ummunotify.rst has the proof.
 *
 * Return: the word, to be compared for equality with an earlier value.
 */
static __inline__ __u64 ummunotify_load_word(const void *word64)
{
#if __SIZEOF_POINTER__ >= 8
	return __atomic_load_n((const __u64 *)word64, __ATOMIC_ACQUIRE);
#else
	const __u32 *word = (const __u32 *)word64;
	const int low = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
	__u32 low_word, high_word;

	low_word = __atomic_load_n(&word[low], __ATOMIC_ACQUIRE);
	high_word = __atomic_load_n(&word[!low], __ATOMIC_ACQUIRE);
	return (__u64)high_word << 32 | low_word;
#endif
}

/**
 * ummunotify_load_generation() - read the mapped generation counter
 * @counter: the mapped page
 *
 * Return: the generation, to be compared for equality with that of a LAST.
 */
static __inline__ __u64 ummunotify_load_generation(const void *counter)
{
	return ummunotify_load_word(counter);
}

/**
 * ummunotify_load_state() - read the state word of a slot
 * @states: the mapped area
 * @slot: as given at the region's registration
 *
 * A value without UMMUNOTIFY_STATE_BUSY, loaded after the registration and
 * before the memory is looked at (pinned, say), and still the same later, proves
 * that nothing that the region asks for has been done to it in between.
 *
 * Return: the state.
 */
static __inline__ __u64 ummunotify_load_state(const void *states, __u32 slot)
{
	return ummunotify_load_word((const __u64 *)states + slot);
}
#endif

#endif /* _UAPI_LINUX_UMMUNOTIFY_H */
