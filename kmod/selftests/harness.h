/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A small harness for tests that print TAP version 13.
 *
 * Each test runs in a child process, in a process group of its own and under a
 * time limit: one that crashes or hangs is one "not ok".  The limit is a
 * fail-safe, far above what the slowest emulated machine needs; no test is
 * decided by time.
 *
 * A check that fails ends the process that it fails in, whichever thread that
 * is.  Helpers that wait for a process check its status, so that a failure
 * comes back to the test.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stddef.h>
#include <stdint.h>

#include "compiler.h"

/**
 * struct test - one line of TAP
 * @name:	what is tested
 * @run:	the test: passes if it returns
 * @arg:	for @run
 */
struct test {
	const char	*name;
	void		(*run)(const void *arg);
	const void	*arg;
};

/* A test without an argument: static void name(const void *unused) */
#define TEST(function)	{ .name = #function, .run = function }

/**
 * struct suite - the tests of a program
 * @tests:	in order
 * @nr_tests:	how many
 * @clean_up:	called after each test, also after one that crashed, or NULL
 */
struct suite {
	const struct test	*tests;
	size_t			nr_tests;
	void			(*clean_up)(void);
};

/*
 * Run the tests named in @names, or all if there is no name.
 *
 * Return: the program's exit status.
 */
int run_suite(const struct suite *suite, int nr_names, char **names);

/* End the test: skipped, since it is impossible here. */
__noreturn __printf(1, 2) void skip(const char *format, ...);

/* A line of diagnostics. */
__printf(1, 2) void note(const char *format, ...);

__noreturn __printf(3, 4)
void fail_at(const char *file, int line, const char *format, ...);
void check_eq_at(const char *file, int line, const char *got_text,
		 long long got, const char *want_text, long long want);

/* End the test: failed. */
#define FAIL(...)	fail_at(__FILE__, __LINE__, __VA_ARGS__)

#define CHECK(condition)						\
	do {								\
		if (!(condition))					\
			FAIL("not true: %s", #condition);		\
	} while (0)

#define CHECK_EQ(got, want)						\
	check_eq_at(__FILE__, __LINE__, #got, (long long)(got), #want,	\
		    (long long)(want))

#endif /* HARNESS_H */
