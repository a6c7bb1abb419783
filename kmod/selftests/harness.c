// SPDX-License-Identifier: GPL-2.0
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"

#define STATUS_PASS	0
#define STATUS_FAIL	1
#define STATUS_SKIP	4

/* Seconds; UMMUNOTIFY_TEST_LIMIT sets another. */
#define DEFAULT_LIMIT	300
/* Seconds that a killed test may take to die. */
#define DEATH_LIMIT	30

/* One write() each: lines of several processes do not mix. */
static void print_line(const char *prefix, const char *format, va_list args)
{
	char line[1024];
	int length;

	length = snprintf(line, sizeof(line), "%s", prefix);
	length += vsnprintf(line + length, sizeof(line) - length, format, args);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	if (write(STDOUT_FILENO, line, length) != length)
		_exit(STATUS_FAIL);
}

__printf(1, 2)
static void print(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print_line("", format, args);
	va_end(args);
}

void note(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print_line("# ", format, args);
	va_end(args);
}

void skip(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print_line("# skipped: ", format, args);
	va_end(args);
	_exit(STATUS_SKIP);
}

void fail_at(const char *file, int line, const char *format, ...)
{
	int error = errno;
	char prefix[128];
	va_list args;

	snprintf(prefix, sizeof(prefix), "# %s:%d: ", file, line);
	va_start(args, format);
	print_line(prefix, format, args);
	va_end(args);
	note("errno was %d (%s)", error, strerror(error));
	_exit(STATUS_FAIL);
}

void check_eq_at(const char *file, int line, const char *got_text,
		 long long got, const char *want_text, long long want)
{
	if (got != want)
		fail_at(file, line, "%s is %lld (%#llx), not %s: %lld (%#llx)",
			got_text, got, got, want_text, want, want);
}

static unsigned int time_limit(void)
{
	const char *limit = getenv("UMMUNOTIFY_TEST_LIMIT");

	return limit ? strtoul(limit, NULL, 10) : DEFAULT_LIMIT;
}

/*
 * Wait for a child with SIGCHLD blocked.
 *
 * Return: false if it has not ended after that time.
 */
static bool wait_for_child(pid_t pid, unsigned int seconds, int *status)
{
	struct timespec now, end;
	sigset_t sigchld;

	sigemptyset(&sigchld);
	sigaddset(&sigchld, SIGCHLD);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += seconds;

	for (;;) {
		struct timespec second = { .tv_sec = 1 };

		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec > end.tv_sec)
			return false;
		sigtimedwait(&sigchld, NULL, &second);
	}
}

static int run_test(const struct test *test, char *why, size_t room)
{
	unsigned int limit = time_limit();
	int status;
	bool hung;
	pid_t pid;

	pid = fork();
	if (pid < 0) {
		snprintf(why, room, "fork: %s", strerror(errno));
		return STATUS_FAIL;
	}
	if (pid == 0) {
		sigset_t none;

		setpgid(0, 0);
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		test->run(test->arg);
		_exit(STATUS_PASS);
	}
	setpgid(pid, pid);

	hung = !wait_for_child(pid, limit, &status);
	/* Also what it has left behind. */
	kill(-pid, SIGKILL);
	if (hung && !wait_for_child(pid, DEATH_LIMIT, &status)) {
		snprintf(why, room, "hung for %u s, and cannot be killed",
			 limit);
		return STATUS_FAIL;
	}
	if (hung) {
		snprintf(why, room, "hung: killed after %u s", limit);
		return STATUS_FAIL;
	}
	if (WIFSIGNALED(status)) {
		snprintf(why, room, "killed by signal %d (%s)",
			 WTERMSIG(status), strsignal(WTERMSIG(status)));
		return STATUS_FAIL;
	}
	return WEXITSTATUS(status);
}

static bool is_wanted(const struct test *test, int nr_names, char **names)
{
	for (int i = 0; i < nr_names; i++)
		if (!strcmp(test->name, names[i]))
			return true;
	return nr_names == 0;
}

int run_suite(const struct suite *suite, int nr_names, char **names)
{
	unsigned int number = 0, passed = 0, failed = 0, skipped = 0;
	sigset_t sigchld;

	for (size_t i = 0; i < suite->nr_tests; i++)
		number += is_wanted(&suite->tests[i], nr_names, names);
	if (number == 0 || (nr_names && number < (unsigned int)nr_names)) {
		print("Bail out! a test of that name does not exist");
		return STATUS_FAIL;
	}
	print("TAP version 13");
	print("1..%u", number);

	sigemptyset(&sigchld);
	sigaddset(&sigchld, SIGCHLD);
	sigprocmask(SIG_BLOCK, &sigchld, NULL);

	number = 0;
	for (size_t i = 0; i < suite->nr_tests; i++) {
		const struct test *test = &suite->tests[i];
		char why[128] = "";

		if (!is_wanted(test, nr_names, names))
			continue;
		switch (run_test(test, why, sizeof(why))) {
		case STATUS_PASS:
			passed++;
			print("ok %u %s", ++number, test->name);
			break;
		case STATUS_SKIP:
			skipped++;
			print("ok %u %s # SKIP", ++number, test->name);
			break;
		default:
			failed++;
			if (*why)
				note("%s", why);
			print("not ok %u %s", ++number, test->name);
		}
		if (suite->clean_up)
			suite->clean_up();
	}

	note("Totals: pass:%u fail:%u skip:%u", passed, failed, skipped);
	return failed ? STATUS_FAIL : STATUS_PASS;
}
