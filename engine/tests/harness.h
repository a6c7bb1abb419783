/* SPDX-License-Identifier: MIT */
/*
 * Runs tests and prints TAP: each in a child process, under a time limit that only
 * turns a hang into a failure.  A check that fails ends the process, whichever
 * thread fails it.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stddef.h>
#include <stdint.h>

struct test {
	const char	*name;
	void		(*run)(void);
};

#define TEST(function)	{ #function, function }

/* Runs those that are named, or all.  Returns the exit status of the program. */
int run_tests(const struct test *tests, size_t count, int names, char **name);

/* The test is impossible here. */
__attribute__((noreturn, format(printf, 1, 2)))
void skip(const char *format, ...);

/* A line that says more. */
__attribute__((format(printf, 1, 2)))
void note(const char *format, ...);

__attribute__((noreturn, format(printf, 3, 4)))
void fail_at(const char *file, int line, const char *format, ...);

#define CHECK(condition) \
	((condition) ? (void)0 : \
		       fail_at(__FILE__, __LINE__, "not true: %s", #condition))

#define CHECK_EQUAL(got, wanted) \
	check_equal_at(__FILE__, __LINE__, #got, (uint64_t)(got), (uint64_t)(wanted))

void check_equal_at(const char *file, int line, const char *text, uint64_t got,
		    uint64_t wanted);

/* The seed in $SEED, or one of its own; prints it. */
uint64_t seed(void);

/* The next random number. */
uint64_t next_random(uint64_t *state);

#endif
