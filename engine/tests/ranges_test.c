// SPDX-License-Identifier: MIT
/* The tree of ranges against an array of them that is searched from end to end. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "ranges.h"

#define MODEL_SIZE	300
#define OPERATIONS	200000
#define MANY		1000000

static struct range nodes[MODEL_SIZE];
static bool present[MODEL_SIZE];
static struct range *root;
static uint64_t state;
static size_t steps;

/* ranges.c is compiled with -fsanitize-coverage=trace-pc: once per basic block. */
void __sanitizer_cov_trace_pc(void);

void __sanitizer_cov_trace_pc(void)
{
	steps++;
}

/* Small numbers, so that they meet; and both ends of what there is. */
static uint64_t any_number(void)
{
	switch (next_random(&state) % 16) {
	case 0:
		return 0;
	case 1:
		return UINT64_MAX;
	case 2:
		return UINT64_MAX - next_random(&state) % 20;
	case 3:
		return next_random(&state) << 20;
	default:
		return next_random(&state) % 200;
	}
}

static void any_range(uint64_t *start, uint64_t *end)
{
	do {
		*start = any_number();
		*end = any_number();
	} while (*start >= *end);
}

/* Of ranges with the same start, the address decides. */
static bool is_before(const struct range *a, const struct range *b)
{
	return a->start != b->start ? a->start < b->start :
				      (uintptr_t)a < (uintptr_t)b;
}

static bool overlaps(const struct range *range, uint64_t start, uint64_t end)
{
	return range->start < end && range->end > start;
}

/* Returns how many nodes there are; checks what must be true of each. */
static size_t check_subtree(const struct range *node, const struct range **before)
{
	uint64_t greatest;
	size_t count;

	if (!node)
		return 0;
	greatest = node->end;
	count = 1 + check_subtree(node->left, before);
	if (*before)
		CHECK(is_before(*before, node));
	*before = node;
	count += check_subtree(node->right, before);
	for (int i = 0; i < 2; i++) {
		const struct range *child = i ? node->left : node->right;

		if (!child)
			continue;
		CHECK(child->priority <= node->priority);
		if (child->last_end > greatest)
			greatest = child->last_end;
	}
	CHECK_EQUAL(node->last_end, greatest);
	return count;
}

static void check_tree(void)
{
	const struct range *before = NULL;
	size_t count = 0;

	for (size_t i = 0; i < MODEL_SIZE; i++)
		count += present[i];
	CHECK_EQUAL(check_subtree(root, &before), count);
}

static void change(void)
{
	size_t i = next_random(&state) % MODEL_SIZE;

	if (present[i]) {
		ranges_remove(&root, &nodes[i]);
	} else {
		any_range(&nodes[i].start, &nodes[i].end);
		/* Few, so that there are equal ones. */
		nodes[i].priority = (uint32_t)(next_random(&state) % 1000);
		/* Whatever was there before does not matter. */
		nodes[i].left = nodes[i].right = &nodes[i];
		nodes[i].last_end = next_random(&state);
		ranges_insert(&root, &nodes[i]);
	}
	present[i] = !present[i];
}

/* The present one that is first in the tree's order, of those that are wanted. */
static struct range *first_of(bool (*is_wanted)(const struct range *range,
						uint64_t start, uint64_t end),
			      uint64_t start, uint64_t end)
{
	struct range *first = NULL;

	for (size_t i = 0; i < MODEL_SIZE; i++)
		if (present[i] && is_wanted(&nodes[i], start, end) &&
		    (!first || is_before(&nodes[i], first)))
			first = &nodes[i];
	return first;
}

static bool starts_at(const struct range *range, uint64_t start, uint64_t end)
{
	(void)end;
	return range->start == start;
}

/* The last in the tree's order that starts before this. */
static struct range *last_before(uint64_t start)
{
	struct range *last = NULL;

	for (size_t i = 0; i < MODEL_SIZE; i++)
		if (present[i] && nodes[i].start < start &&
		    (!last || is_before(last, &nodes[i])))
			last = &nodes[i];
	return last;
}

static void look_up(void)
{
	uint64_t start, end;

	any_range(&start, &end);
	CHECK(ranges_starting_at(root, start) == first_of(starts_at, start, end));
	CHECK(ranges_overlapping(root, start, end) ==
	      first_of(overlaps, start, end));
	CHECK(ranges_before(root, start) == last_before(start));
}

struct visits {
	uint64_t		start;
	uint64_t		end;
	const struct range	*before;
	size_t			count;
};

static void note_visit(struct range *range, void *context)
{
	struct visits *visits = context;

	CHECK(overlaps(range, visits->start, visits->end));
	if (visits->before)
		CHECK(is_before(visits->before, range));
	visits->before = range;
	visits->count++;
}

static void visit(void)
{
	struct visits visits = { 0 };
	size_t count = 0;

	any_range(&visits.start, &visits.end);
	ranges_visit(root, visits.start, visits.end, note_visit, &visits);
	for (size_t i = 0; i < MODEL_SIZE; i++)
		count += present[i] && overlaps(&nodes[i], visits.start, visits.end);
	CHECK_EQUAL(visits.count, count);
}

static void the_tree_does_what_an_array_does(void)
{
	state = seed();
	for (unsigned int i = 0; i < OPERATIONS; i++) {
		switch (next_random(&state) % 4) {
		case 0:
			look_up();
			break;
		case 1:
			visit();
			break;
		default:
			change();
		}
		if (!(i % 16))
			check_tree();
	}
	check_tree();
}

static void ranges_with_the_same_start_are_all_found(void)
{
	struct visits visits = { .start = 5, .end = 6 };

	for (size_t i = 0; i < MODEL_SIZE; i++) {
		nodes[i] = (struct range) {
			.start = 5, .end = 6 + i, .priority = (uint32_t)(i * 7919),
		};
		ranges_insert(&root, &nodes[i]);
		present[i] = true;
	}
	check_tree();
	ranges_visit(root, 5, 6, note_visit, &visits);
	CHECK_EQUAL(visits.count, MODEL_SIZE);
	for (size_t i = MODEL_SIZE; i-- > 0; ) {
		CHECK(ranges_starting_at(root, 5) == &nodes[0]);
		ranges_remove(&root, &nodes[i]);
		present[i] = false;
		check_tree();
	}
	CHECK(!root);
}

static void both_ends_of_the_numbers_are_ranges_too(void)
{
	struct range low = { .start = 0, .end = 1, .priority = 1 };
	struct range high = { .start = UINT64_MAX - 1, .end = UINT64_MAX,
			      .priority = 2 };
	struct range all = { .start = 0, .end = UINT64_MAX, .priority = 3 };

	ranges_insert(&root, &low);
	ranges_insert(&root, &high);
	CHECK(ranges_overlapping(root, 0, 1) == &low);
	CHECK(!ranges_overlapping(root, 1, UINT64_MAX - 1));
	CHECK(ranges_overlapping(root, UINT64_MAX - 1, UINT64_MAX) == &high);
	CHECK(ranges_overlapping(root, 1, UINT64_MAX) == &high);
	ranges_insert(&root, &all);
	CHECK(ranges_overlapping(root, 1, 2) == &all);
	CHECK(ranges_starting_at(root, UINT64_MAX - 1) == &high);
	CHECK(!ranges_starting_at(root, UINT64_MAX));
}

static unsigned int depth_of(const struct range *node)
{
	unsigned int left, right;

	if (!node)
		return 0;
	left = depth_of(node->left);
	right = depth_of(node->right);
	return 1 + (left > right ? left : right);
}

static void count_visit(struct range *range, void *context)
{
	(void)range;
	++*(size_t *)context;
}

/* The steps of finding and visiting what overlaps; checks what is found. */
static size_t steps_for(uint64_t start, uint64_t end, const struct range *only)
{
	size_t found = 0, before = steps;

	ranges_visit(root, start, end, count_visit, &found);
	CHECK_EQUAL(found, !!only);
	CHECK(ranges_overlapping(root, start, end) == only);
	return steps - before;
}

static struct range *many_ranges(uint64_t length, uint64_t length_of_first)
{
	struct range *many = calloc(MANY, sizeof(*many));

	CHECK(many);
	state = seed();
	for (size_t i = 0; i < MANY; i++) {
		many[i].start = 10 * i;
		many[i].end = 10 * i + (i ? length : length_of_first);
		many[i].priority = (uint32_t)next_random(&state);
		ranges_insert(&root, &many[i]);
	}
	return many;
}

/*
 * In ascending order, the worst for a tree that does not balance.  A random tree
 * of a million has a depth of about 50; the bounds are far beyond what chance
 * gives, and far below what a search without a tree takes.
 */
static void a_million_ranges_stay_shallow(void)
{
	struct range *many = many_ranges(10, 10);
	unsigned int depth = depth_of(root);
	size_t most = 0, before;

	for (unsigned int i = 0; i < 20000; i++) {
		uint64_t at = next_random(&state) % (10 * MANY);
		size_t count = steps_for(at, at + 1, &many[at / 10]);

		most = count > most ? count : most;
		CHECK(most < 1500);
	}
	note("%d ranges: depth %u, at most %zu steps to find and visit one", MANY,
	     depth, most);
	CHECK(depth < 100);
	for (size_t i = 0; i < 20000; i++) {
		size_t at = next_random(&state) % MANY;

		before = steps;
		ranges_remove(&root, &many[at]);
		ranges_insert(&root, &many[at]);
		most = steps - before > most ? steps - before : most;
	}
	note("at most %zu steps to remove or insert one", most);
	CHECK(most < 3000);
	for (size_t i = 0; i < MANY; i++)
		ranges_remove(&root, &many[i]);
	CHECK(!root);
	free(many);
}

static void one_long_range_does_not_make_others_slow(void)
{
	struct range *many = many_ranges(1, UINT64_MAX);
	size_t most = 0;

	/* Between two: only the long one overlaps. */
	for (uint64_t at = 5; at < 10 * MANY; at += 9990) {
		size_t count = steps_for(at, at + 1, &many[0]);

		most = count > most ? count : most;
	}
	note("a gap below a long range: at most %zu steps", most);
	CHECK(most < 1500);
	free(many);
}

static const struct test tests[] = {
	TEST(the_tree_does_what_an_array_does),
	TEST(ranges_with_the_same_start_are_all_found),
	TEST(both_ends_of_the_numbers_are_ranges_too),
	TEST(a_million_ranges_stay_shallow),
	TEST(one_long_range_does_not_make_others_slow),
};

int main(int count, char **arguments)
{
	return run_tests(tests, sizeof(tests) / sizeof(tests[0]), count - 1,
			 arguments + 1);
}
