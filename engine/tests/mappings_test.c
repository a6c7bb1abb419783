// SPDX-License-Identifier: MIT
/* Both ways of asking for a mapping, against each other and /proc/self/maps. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"
#include "mappings.h"

#define PAGE		UINT64_C(4096)
#define MANY		6000
#define LONGEST		20000

static struct mappings by_query, by_text;

static void open_both(void)
{
	CHECK_EQUAL(mappings_open(&by_query), 0);
	CHECK_EQUAL(mappings_open(&by_text), 0);
	if (!by_query.indexed)
		note("no PROCMAP_QUERY here (Linux 6.11 has it): one way only");
	by_text.indexed = false;
}

static uint64_t address_of(const void *memory)
{
	return (uintptr_t)memory;
}

static void *map(void *hint, size_t size, int flags)
{
	void *memory = mmap(hint, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	CHECK(memory != MAP_FAILED);
	return memory;
}

/* Both must give the same; returns what. */
static int ask(uint64_t address, struct mapping *mapping)
{
	struct mapping other = { 0 };
	int result = mapping_at_or_behind(&by_query, address, mapping);
	int other_result = mapping_at_or_behind(&by_text, address, &other);

	/* The kernel's own page, which a query cannot name. */
	if (result == -ENOENT && !other_result && other.start > LONG_MAX)
		return result;
	CHECK_EQUAL(other_result, result);
	if (!result) {
		CHECK_EQUAL(other.start, mapping->start);
		CHECK_EQUAL(other.end, mapping->end);
	}
	return result;
}

/* At both ends, in the middle, and just before and behind. */
static void ask_around(uint64_t start, uint64_t end)
{
	struct mapping mapping;

	for (unsigned int i = 0; i < 3; i++) {
		uint64_t inside[] = { start, start + (end - start) / 2, end - 1 };

		CHECK_EQUAL(ask(inside[i], &mapping), 0);
		CHECK_EQUAL(mapping.start, start);
		CHECK_EQUAL(mapping.end, end);
	}
	CHECK_EQUAL(ask(start - 1, &mapping), 0);
	CHECK(mapping.end >= start);
	CHECK(mapping.start <= start);
	ask(end, &mapping);
}

struct span {
	uint64_t	start;
	uint64_t	end;
};

static struct span spans[LONGEST];

static char text[8 << 20];

/* By a third way.  Allocates nothing, which could change what it reads. */
static size_t read_spans(void)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	size_t length = 0, count = 0;
	ssize_t size;
	char *line;

	CHECK(fd >= 0);
	while ((size = read(fd, text + length, sizeof(text) - 1 - length)) > 0)
		length += (size_t)size;
	close(fd);
	CHECK(length < sizeof(text) - 1);
	text[length] = 0;
	for (line = text; *line; line = strchr(line, '\n') + 1) {
		struct span *span = &spans[count++];

		CHECK(count < LONGEST);
		span->start = strtoull(line, &line, 16);
		span->end = strtoull(line + 1, &line, 16);
	}
	return count;
}

static void ask_for_everything(void)
{
	size_t count = read_spans();

	CHECK(count > 10);
	/* The last is the kernel's, in another half of the addresses. */
	for (size_t i = 0; i < count && spans[i].end < LONG_MAX; i++)
		ask_around(spans[i].start, spans[i].end);
}

static void every_mapping_of_this_process_is_found(void)
{
	open_both();
	ask_for_everything();
}

static void a_gap_gives_the_next_mapping(void)
{
	char *memory;
	struct mapping mapping;

	open_both();
	memory = map(NULL, 5 * PAGE, 0);
	mprotect(memory + 4 * PAGE, PAGE, PROT_NONE);
	munmap(memory + PAGE, 2 * PAGE);
	for (uint64_t i = 0; i < 3 * PAGE; i += PAGE - 1) {
		CHECK_EQUAL(ask(address_of(memory + PAGE) + i, &mapping), 0);
		CHECK_EQUAL(mapping.start, address_of(memory + 3 * PAGE));
		CHECK_EQUAL(mapping.end, address_of(memory + 4 * PAGE));
	}
}

static void address_0_gives_the_first_mapping(void)
{
	struct mapping mapping;

	open_both();
	read_spans();
	CHECK_EQUAL(ask(0, &mapping), 0);
	CHECK_EQUAL(mapping.start, spans[0].start);
}

static void beyond_the_last_mapping_there_is_none(void)
{
	struct mapping mapping;

	open_both();
	CHECK_EQUAL(ask(LONG_MAX, &mapping), -ENOENT);
	CHECK_EQUAL(mapping_at_or_behind(&by_text, UINT64_MAX, &mapping), -ENOENT);
	CHECK_EQUAL(mapping_at_or_behind(&by_query, UINT64_MAX, &mapping), -ENOENT);
}

static void thousands_of_mappings_are_all_found(void)
{
	char *memory;

	memory = map(NULL, MANY * PAGE, MAP_NORESERVE);
	/* Every second one differs, so they do not merge. */
	for (size_t i = 0; i < MANY; i += 2)
		CHECK(!mprotect(memory + i * PAGE, PAGE, PROT_READ));
	for (size_t i = 0; i < MANY; i += 100)
		munmap(memory + i * PAGE, PAGE);
	open_both();
	/* The text is read in pieces of 4,096: lines lie across their ends. */
	for (size_t i = 1; i < MANY; i += 37) {
		struct mapping mapping;

		CHECK_EQUAL(ask(address_of(memory + i * PAGE), &mapping), 0);
		if (i % 100) {
			CHECK_EQUAL(mapping.start, address_of(memory + i * PAGE));
			CHECK_EQUAL(mapping.end, mapping.start + PAGE);
		} else {
			CHECK_EQUAL(mapping.start,
				    address_of(memory + (i + 1) * PAGE));
		}
	}
}

/* Maps a page of a file with this name, and removes the file. */
static void *map_file(const char *folder, const char *name)
{
	char path[PATH_MAX];
	void *memory;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fd >= 0);
	CHECK(!ftruncate(fd, PAGE));
	memory = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED);
	close(fd);
	unlink(path);
	return memory;
}

static void hostile_file_names_confuse_nobody(void)
{
	char folder[] = P_tmpdir "/mappings_test.XXXXXX", longest[256];
	static const char *const names[] = {
		"with\nnewline", "\n00400000-00401000 r-xp 00000000 00:00 0",
		"\n", "trailing\n", "back\\slash", "dash-0000-ffff", " spaces  ",
	};
	struct mapping mapping;

	CHECK(mkdtemp(folder));
	open_both();
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		uint64_t at = address_of(map_file(folder, names[i]));

		CHECK_EQUAL(ask(at, &mapping), 0);
		CHECK_EQUAL(mapping.start, at);
		ask_for_everything();
	}
	/* Each newline is four characters there: longer than a piece of the text. */
	memset(longest, '\n', 255);
	longest[255] = 0;
	for (unsigned int i = 0; i < 40; i++) {
		longest[i] = 'x';
		map_file(folder, longest);
	}
	ask_for_everything();
	rmdir(folder);
}

/* A path of almost 4,096 bytes, so that one line is longer than a piece. */
static void a_line_longer_than_a_page_is_read(void)
{
	char folder[] = P_tmpdir "/mappings_test.XXXXXX", name[201];
	struct mapping mapping;
	uint64_t at;
	int depth;

	CHECK(mkdtemp(folder));
	CHECK(!chdir(folder));
	memset(name, '\n', 200);
	name[200] = 0;
	for (depth = 0; depth < 18; depth++) {
		CHECK(!mkdir(name, 0700));
		CHECK(!chdir(name));
	}
	at = address_of(map_file(".", "file"));
	open_both();
	CHECK_EQUAL(ask(at, &mapping), 0);
	CHECK_EQUAL(mapping.start, at);
	ask_for_everything();
	while (depth--) {
		CHECK(!chdir(".."));
		CHECK(!rmdir(name));
	}
	CHECK(!rmdir(folder));
}

static void a_closed_descriptor_is_an_error(void)
{
	struct mapping mapping;

	open_both();
	close(by_text.fd);
	CHECK_EQUAL(mapping_at_or_behind(&by_text, 0, &mapping), -EBADF);
	close(by_query.fd);
	CHECK_EQUAL(mapping_at_or_behind(&by_query, 0, &mapping), -EBADF);
}

static const struct test tests[] = {
	TEST(every_mapping_of_this_process_is_found),
	TEST(a_gap_gives_the_next_mapping),
	TEST(address_0_gives_the_first_mapping),
	TEST(beyond_the_last_mapping_there_is_none),
	TEST(thousands_of_mappings_are_all_found),
	TEST(hostile_file_names_confuse_nobody),
	TEST(a_line_longer_than_a_page_is_read),
	TEST(a_closed_descriptor_is_an_error),
};

int main(int count, char **arguments)
{
	return run_tests(tests, sizeof(tests) / sizeof(tests[0]), count - 1,
			 arguments + 1);
}
