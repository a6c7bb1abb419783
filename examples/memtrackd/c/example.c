// SPDX-License-Identifier: MIT
/*
 * A program with buffers that come and go, tracked by memtrackd.
 *
 *	example [--socket PATH] [--name NAME] [--loop COUNT]
 *
 * Does what it reads line by line from its standard input:
 *
 *	map NAME PAGES	map a buffer and have it tracked
 *	drop NAME	give its pages back to the kernel, keep the mapping
 *	move NAME	move it elsewhere, and have it tracked there
 *	unmap NAME	unmap it
 *	forget NAME	have it tracked no more
 *	list		print the buffers
 *	status		is the daemon there, does it know everything?
 *	quit
 *
 * or, with --loop, does such things by itself, ten times a second.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memtrack.h"

#define BUFFERS	64

struct buffer {
	char	name[MEMTRACK_NAME_SIZE + 1];
	char	*start;
	size_t	size;
	int64_t	cookie;
};

static struct memtrack *tracker;
static struct buffer buffers[BUFFERS];
/* The cookie of what is unmapped already. */
static int64_t retired;

static struct buffer *find(const char *name)
{
	int i;

	for (i = 0; i < BUFFERS; i++)
		if (!strcmp(buffers[i].name, name))
			return &buffers[i];
	return NULL;
}

/* The program does not depend on being tracked. */
static void track(struct buffer *buffer)
{
	char *end = buffer->start + buffer->size;

	buffer->cookie = memtrack_register(tracker, buffer->start, end, buffer->name);
	if (buffer->cookie < 0)
		printf("%s is not tracked: %s\n", buffer->name, strerror(-buffer->cookie));
}

static void forget(struct buffer *buffer)
{
	if (buffer->cookie > 0)
		memtrack_unregister(tracker, buffer->cookie);
	buffer->cookie = 0;
}

/*
 * A report that the daemon has not read yet goes with its region.  So the region of a
 * buffer that is not there any more stays until the next command.
 */
static void retire(struct buffer *buffer)
{
	memtrack_unregister(tracker, retired);
	retired = buffer->cookie > 0 ? buffer->cookie : 0;
	buffer->cookie = 0;
}

static int map(const char *name, size_t pages)
{
	struct buffer *buffer = find("");
	size_t size = pages * sysconf(_SC_PAGESIZE);
	void *start;

	if (!buffer || find(name) || !pages)
		return -EINVAL;
	start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		     -1, 0);
	if (start == MAP_FAILED)
		return -errno;
	memset(start, 1, size);
	snprintf(buffer->name, sizeof(buffer->name), "%s", name);
	buffer->start = (char *)start;
	buffer->size = size;
	track(buffer);
	return 0;
}

static int drop(struct buffer *buffer)
{
	return madvise(buffer->start, buffer->size, MADV_DONTNEED) ? -errno : 0;
}

static int move(struct buffer *buffer)
{
	void *place, *moved;

	place = mmap(NULL, buffer->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (place == MAP_FAILED)
		return -errno;
	moved = mremap(buffer->start, buffer->size, buffer->size,
		       MREMAP_MAYMOVE | MREMAP_FIXED, place);
	if (moved == MAP_FAILED)
		return -errno;
	retire(buffer);
	buffer->start = (char *)moved;
	track(buffer);
	return 0;
}

static int unmap(struct buffer *buffer)
{
	int error = munmap(buffer->start, buffer->size) ? -errno : 0;

	retire(buffer);
	memset(buffer, 0, sizeof(*buffer));
	return error;
}

static void list(void)
{
	int i;

	for (i = 0; i < BUFFERS; i++)
		if (*buffers[i].name)
			printf("%s %p-%p %" PRId64 "\n", buffers[i].name,
			       buffers[i].start, buffers[i].start + buffers[i].size,
			       buffers[i].cookie);
}

static void status(void)
{
	char error[MEMTRACK_ERROR_SIZE];
	size_t waiting = memtrack_flush(tracker);

	if (memtrack_attached(tracker, error, sizeof(error)))
		printf("attached, %zu to say\n", waiting);
	else
		printf("not attached: %s\n", error);
}

/* Returns 0, a negative errno, or 1: the end. */
static int obey(const char *line)
{
	char word[16] = "", name[MEMTRACK_NAME_SIZE + 1] = "";
	struct buffer *buffer;
	size_t pages = 1;

	memtrack_unregister(tracker, retired);
	retired = 0;
	if (sscanf(line, "%15s %128s %zu", word, name, &pages) < 1)
		return 0;
	if (!strcmp(word, "quit"))
		return 1;
	if (!strcmp(word, "list") || !strcmp(word, "status")) {
		*word == 'l' ? list() : status();
		return 0;
	}
	if (!*name)
		return -EINVAL;
	if (!strcmp(word, "map"))
		return map(name, pages);
	buffer = find(name);
	if (!buffer)
		return -ENOENT;
	if (!strcmp(word, "drop"))
		return drop(buffer);
	if (!strcmp(word, "move"))
		return move(buffer);
	if (!strcmp(word, "unmap"))
		return unmap(buffer);
	if (!strcmp(word, "forget")) {
		forget(buffer);
		return 0;
	}
	return -EINVAL;
}

static void converse(void)
{
	char line[256];
	int result = 0;

	while (result <= 0 && fgets(line, sizeof(line), stdin)) {
		result = obey(line);
		if (result < 0)
			printf("error: %s\n", strerror(-result));
		else
			printf("ok\n");
		fflush(stdout);
	}
}

static void loop(long count)
{
	static const char * const script[] = {
		"map input 16", "map output 64", "drop input", "move output",
		"drop output", "unmap input", "map scratch 4", "unmap scratch",
		"unmap output", "status",
	};
	size_t i;

	while (count--) {
		for (i = 0; i < sizeof(script) / sizeof(script[0]); i++) {
			if (obey(script[i]) < 0)
				printf("error: %s\n", script[i]);
			fflush(stdout);
			usleep(100000);
		}
	}
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "socket", required_argument, NULL, 's' },
		{ "name", required_argument, NULL, 'n' },
		{ "loop", required_argument, NULL, 'l' },
		{ NULL, 0, NULL, 0 },
	};
	const char *socket = NULL, *name = NULL;
	char error[MEMTRACK_ERROR_SIZE];
	long count = 0;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 's')
			socket = optarg;
		else if (option == 'n')
			name = optarg;
		else if (option == 'l')
			count = atol(optarg);
		else
			return 2;
	}
	tracker = memtrack_attach(socket, name, error, sizeof(error));
	if (!tracker)
		printf("not tracked: %s\n", error);
	else
		printf("tracked\n");
	fflush(stdout);
	if (count > 0)
		loop(count);
	else
		converse();
	memtrack_detach(tracker);
	return 0;
}
