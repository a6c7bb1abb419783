// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECONDS		120
#define SKIPPED		77

static void print(const char *format, va_list arguments)
{
	char line[1024];

	vsnprintf(line, sizeof(line), format, arguments);
	/* In one piece, as other threads may print, too. */
	printf("# %s\n", line);
	fflush(stdout);
}

void note(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	print(format, arguments);
	va_end(arguments);
}

void skip(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	print(format, arguments);
	va_end(arguments);
	_exit(SKIPPED);
}

void fail_at(const char *file, int line, const char *format, ...)
{
	va_list arguments;

	printf("# %s:%d:\n", file, line);
	va_start(arguments, format);
	print(format, arguments);
	va_end(arguments);
	_exit(1);
}

void check_equal_at(const char *file, int line, const char *text, uint64_t got,
		    uint64_t wanted)
{
	if (got != wanted)
		fail_at(file, line, "%s: got %" PRIu64 " (%#" PRIx64
			"), not %" PRIu64 " (%#" PRIx64 ")",
			text, got, got, wanted, wanted);
}

uint64_t seed(void)
{
	const char *given = getenv("SEED");
	uint64_t value = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL);

	note("SEED=%" PRIu64, value);
	return value * UINT64_C(0x9E3779B97F4A7C15) | 1;
}

uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * UINT64_C(2685821657736338717) >> 8;
}

static unsigned int limit(void)
{
	const char *given = getenv("TEST_LIMIT");

	return given ? (unsigned int)atoi(given) : SECONDS;
}

/* A thread in a userfaultfd wait ends by SIGKILL only. */
static int wait_for(pid_t child, bool *late)
{
	const struct timespec pause = { .tv_nsec = 2000000 };
	time_t end = time(NULL) + limit() + 1;
	int status;

	*late = false;
	while (!waitpid(child, &status, WNOHANG)) {
		if (time(NULL) > end && !*late) {
			*late = true;
			kill(child, SIGKILL);
		}
		nanosleep(&pause, NULL);
	}
	/* What it has left behind. */
	kill(-child, SIGKILL);
	return status;
}

/* Returns whether it passed. */
static bool run_test(const struct test *test, size_t number)
{
	pid_t child;
	bool late;
	int status;

	fflush(stdout);
	child = fork();
	if (!child) {
		setpgid(0, 0);
		test->run();
		fflush(stdout);
		/* With what sanitizers have to say at the end. */
		exit(0);
	}
	status = wait_for(child, &late);
	if (WIFEXITED(status) && WEXITSTATUS(status) == SKIPPED) {
		printf("ok %zu %s # SKIP see above\n", number, test->name);
		return true;
	}
	if (late)
		printf("# it hangs: not done after %u seconds\n", limit());
	else if (WIFSIGNALED(status))
		printf("# killed by signal %d\n", WTERMSIG(status));
	printf("%sok %zu %s\n", status ? "not " : "", number, test->name);
	fflush(stdout);
	return !status;
}

static bool is_named(const struct test *test, int names, char **name)
{
	for (int i = 0; i < names; i++)
		if (!strcmp(test->name, name[i]))
			return true;
	return !names;
}

int run_tests(const struct test *tests, size_t count, int names, char **name)
{
	size_t number = 0, failed = 0, planned = 0;

	for (size_t i = 0; i < count; i++)
		planned += is_named(&tests[i], names, name);
	printf("TAP version 13\n1..%zu\n", planned);
	for (size_t i = 0; i < count; i++)
		if (is_named(&tests[i], names, name))
			failed += !run_test(&tests[i], ++number);
	printf("# Totals: pass:%zu fail:%zu\n", number - failed, failed);
	return failed || !number;
}
