// SPDX-License-Identifier: GPL-2.0
/*
 * "How does the code handle the non-atomicity of u64 writes on 32-bit CPUs?"
 *
 * The driver stores the counter's high word, then its low word; a reader loads
 * low, then high, and compares with the generation of the latest LAST.  Here all
 * interleavings of the two are enumerated, for that order and for the three
 * others, to see when an equality is an accident: when the generation had
 * already moved on before the reader began.
 *
 * A wrong order errs only after as many invalidations as a word has values, too
 * many to enumerate with words of 32 bits.  Words of 1 to 3 bits have the same
 * interleavings, and are enumerated to the very end, where the whole counter
 * has gone round: the right order must never err, each wrong one must be caught.
 * Around 0xffffffff -> 0x100000000 the real width is enumerated as well.
 */
#include <stdbool.h>
#include <stddef.h>

#include "harness.h"

/**
 * struct order - in which order the halves are stored and loaded
 * @store_high_first:	the driver
 * @load_low_first:	the reader
 */
struct order {
	const char	*name;
	bool		store_high_first;
	bool		load_low_first;
};

static const struct order right_order = {
	"store high, low; load low, high", true, true
};

static const struct order wrong_orders[] = {
	{ "store high, low; load high, low", true, false },
	{ "store low, high; load low, high", false, true },
	{ "store low, high; load high, low", false, false },
};

/**
 * struct outcome - what an enumeration has found
 * @interleavings:	how many there were
 * @torn:		the reader got a value that the counter never had
 * @accidents:		it got LAST's, though the generation had moved on
 * @first_accident:	invalidations begun since LAST, in the earliest of them
 */
struct outcome {
	unsigned long	interleavings;
	unsigned long	torn;
	unsigned long	accidents;
	u64		first_accident;
};

struct memory {
	u64	high;
	u64	low;
};

/* The counter after @stores stores, two for each generation from @first on. */
static struct memory after_stores(u64 first, u64 stores, unsigned int bits,
				  const struct order *order)
{
	u64 mask = (1ull << bits) - 1;
	u64 done = first + stores / 2;
	struct memory memory = {
		.high	= done >> bits & mask,
		.low	= done & mask,
	};

	if (stores % 2 && order->store_high_first)
		memory.high = (done + 1) >> bits & mask;
	else if (stores % 2)
		memory.low = (done + 1) & mask;
	return memory;
}

/*
 * LAST told @last.  @raises invalidations follow, and a check of the counter is
 * in the middle of them: its first load behind each number of stores, and its
 * second behind each that is no less.
 */
static void enumerate(u64 last, u64 raises, unsigned int bits,
		      const struct order *order, struct outcome *outcome)
{
	for (u64 first = 0; first <= 2 * raises; first++) {
		struct memory one = after_stores(last, first, bits, order);

		for (u64 second = first; second <= 2 * raises; second++) {
			struct memory two = after_stores(last, second, bits,
							 order);
			u64 low = order->load_low_first ? one.low : two.low;
			u64 high = order->load_low_first ? two.high : one.high;
			u64 value = high << bits | low;
			/* Begun, the check may take place before it. */
			bool moved_on = first >= 2;
			u64 begun = (second + 1) / 2;

			outcome->interleavings++;
			if (value < last + first / 2 ||
			    value > last + (second + 1) / 2)
				outcome->torn++;
			if (value != last || !moved_on)
				continue;
			if (!outcome->accidents || begun < outcome->first_accident)
				outcome->first_accident = begun;
			outcome->accidents++;
		}
	}
}

/* Every LAST, up to one raise before the whole counter would repeat itself. */
static struct outcome enumerate_narrow(unsigned int bits,
				       const struct order *order)
{
	u64 values = 1ull << 2 * bits;
	struct outcome outcome = {};

	for (u64 last = 0; last < values; last++)
		enumerate(last, values - last - 1, bits, order, &outcome);
	return outcome;
}

static void report(const struct order *order, unsigned int bits,
		   const struct outcome *outcome)
{
	note("%s, %u bits a word: %lu interleavings, %lu torn, %lu accidents",
	     order->name, bits, outcome->interleavings, outcome->torn,
	     outcome->accidents);
}

static void the_right_order_never_equals_last_by_accident(const void *unused)
{
	for (unsigned int bits = 1; bits <= 3; bits++) {
		struct outcome outcome = enumerate_narrow(bits, &right_order);

		report(&right_order, bits, &outcome);
		CHECK_EQ(outcome.accidents, 0);
		/* There was something to get wrong. */
		CHECK(outcome.torn > 0);
	}
}

static void each_wrong_order_errs_and_is_caught(const void *unused)
{
	for (size_t i = 0; i < ARRAY_SIZE(wrong_orders); i++) {
		for (unsigned int bits = 1; bits <= 3; bits++) {
			struct outcome outcome =
				enumerate_narrow(bits, &wrong_orders[i]);

			report(&wrong_orders[i], bits, &outcome);
			CHECK(outcome.accidents > 0);
			/* But not before a word has gone round: 2^32, in life. */
			CHECK_EQ(outcome.first_accident, 1ull << bits);
		}
	}
}

static void the_carry_into_the_high_word_is_seen(const void *unused)
{
	enum { AROUND = 8 };
	const u64 carry = 0x100000000;
	struct outcome outcome = {};

	for (u64 last = carry - AROUND; last <= carry + AROUND; last++)
		enumerate(last, AROUND, 32, &right_order, &outcome);
	report(&right_order, 32, &outcome);
	CHECK_EQ(outcome.accidents, 0);
	CHECK(outcome.torn > 0);
}

/* The value of the review: both halves of the carry, seen apart. */
static void a_torn_value_is_not_that_of_last(const void *unused)
{
	const u64 last = 0xffffffff;
	struct memory before = after_stores(last, 0, 32, &right_order);
	struct memory between = after_stores(last, 1, 32, &right_order);
	struct memory behind = after_stores(last, 2, 32, &right_order);

	CHECK_EQ(before.high << 32 | before.low, 0xffffffff);
	CHECK_EQ(between.high << 32 | between.low, 0x1ffffffff);
	CHECK_EQ(behind.high << 32 | behind.low, 0x100000000);
	/* Low from before, high from behind: an equality would be right still. */
	CHECK(((behind.high << 32) | before.low) != last);
	CHECK(((before.high << 32) | behind.low) != last);
}

static const struct test tests[] = {
	TEST(the_right_order_never_equals_last_by_accident),
	TEST(each_wrong_order_errs_and_is_caught),
	TEST(the_carry_into_the_high_word_is_seen),
	TEST(a_torn_value_is_not_that_of_last),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
