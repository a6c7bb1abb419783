/* SPDX-License-Identifier: MIT */
/*
 * Ranges of 64-bit numbers in a search tree that knows, below each node, the
 * greatest end: what overlaps a given range is found in O(log n) and one step per
 * overlap.  A treap: balanced by random priorities, so expected, not worst, case.
 *
 * The nodes are the caller's.  Nothing here allocates, locks or fails.
 */
#ifndef AIOUMMU_RANGES_H
#define AIOUMMU_RANGES_H

#include <stdbool.h>
#include <stdint.h>

/**
 * struct range - a node, to be embedded
 * @start:	first number; also the key, of which there may be several
 * @end:	first number behind the range
 * @priority:	random, set by the caller; parents have greater ones
 * @last_end:	greatest end in this subtree
 * @left:	ranges that start earlier
 * @right:	ranges that start later
 */
struct range {
	uint64_t	start;
	uint64_t	end;
	uint64_t	last_end;
	struct range	*left;
	struct range	*right;
	uint32_t	priority;
};

void ranges_insert(struct range **root, struct range *range);
void ranges_remove(struct range **root, struct range *range);

/* The first range with this very start, or NULL. */
struct range *ranges_starting_at(struct range *root, uint64_t start);

/* The first range that overlaps, or NULL. */
struct range *ranges_overlapping(struct range *root, uint64_t start,
				 uint64_t end);

/* The last range that starts before this, or NULL. */
struct range *ranges_before(struct range *root, uint64_t start);

/* Calls visit() for each range that overlaps; visit() must not change the tree. */
void ranges_visit(struct range *root, uint64_t start, uint64_t end,
		  void (*visit)(struct range *range, void *context),
		  void *context);

#endif
