// SPDX-License-Identifier: MIT
#include "ranges.h"

#include <stddef.h>

static uint64_t last_end(const struct range *root)
{
	return root ? root->last_end : 0;
}

static void update(struct range *root)
{
	uint64_t left = last_end(root->left), right = last_end(root->right);
	uint64_t below = left > right ? left : right;

	root->last_end = root->end > below ? root->end : below;
}

/* Of ranges with the same start, the address decides. */
static bool is_before(const struct range *a, const struct range *b)
{
	if (a->start != b->start)
		return a->start < b->start;
	return (uintptr_t)a < (uintptr_t)b;
}

/* Cuts a tree in two: what is before a range, and what is behind it. */
static void split(struct range *root, const struct range *at,
		  struct range **before, struct range **behind)
{
	if (!root) {
		*before = NULL;
		*behind = NULL;
	} else if (is_before(root, at)) {
		split(root->right, at, &root->right, behind);
		*before = root;
		update(root);
	} else {
		split(root->left, at, before, &root->left);
		*behind = root;
		update(root);
	}
}

/* The inverse: everything in the one tree is before everything in the other. */
static struct range *join(struct range *before, struct range *behind)
{
	if (!before)
		return behind;
	if (!behind)
		return before;
	if (before->priority > behind->priority) {
		before->right = join(before->right, behind);
		update(before);
		return before;
	}
	behind->left = join(before, behind->left);
	update(behind);
	return behind;
}

void ranges_insert(struct range **root, struct range *range)
{
	struct range *node = *root;

	if (!node || node->priority < range->priority) {
		split(node, range, &range->left, &range->right);
		update(range);
		*root = range;
		return;
	}
	ranges_insert(is_before(range, node) ? &node->left : &node->right, range);
	update(node);
}

void ranges_remove(struct range **root, struct range *range)
{
	struct range *node = *root;

	if (node == range) {
		*root = join(range->left, range->right);
		return;
	}
	ranges_remove(is_before(range, node) ? &node->left : &node->right, range);
	update(node);
}

struct range *ranges_starting_at(struct range *root, uint64_t start)
{
	struct range *found = NULL;

	while (root) {
		if (root->start == start)
			found = root;
		root = root->start < start ? root->right : root->left;
	}
	return found;
}

struct range *ranges_overlapping(struct range *root, uint64_t start,
				 uint64_t end)
{
	while (root) {
		if (last_end(root->left) > start) {
			/* If none overlaps there, none does to the right either. */
			root = root->left;
		} else if (root->start >= end) {
			return NULL;
		} else if (root->end > start) {
			return root;
		} else {
			root = root->right;
		}
	}
	return NULL;
}

struct range *ranges_before(struct range *root, uint64_t start)
{
	struct range *found = NULL;

	while (root) {
		if (root->start < start)
			found = root;
		root = root->start < start ? root->right : root->left;
	}
	return found;
}

void ranges_visit(struct range *root, uint64_t start, uint64_t end,
		  void (*visit)(struct range *range, void *context),
		  void *context)
{
	while (root && root->last_end > start) {
		ranges_visit(root->left, start, end, visit, context);
		if (root->start >= end)
			return;
		if (root->end > start)
			visit(root, context);
		root = root->right;
	}
}
