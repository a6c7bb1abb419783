// SPDX-License-Identifier: MIT
/*
 * What cannot be seen from outside, or only in rare moments: the ring when it is
 * full, coverage when there is no room for it, and the parts that the engine is
 * made of against simpler ones.
 */
#define AIOUMMU_RING_SIZE	8
#include "engine.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define PAGE	4096ul

static unsigned int failures;

#define CHECK(condition) \
	check((condition), __func__, __LINE__, #condition)

static void check(bool good, const char *function, int line, const char *what)
{
	if (good)
		return;
	failures++;
	printf("# %s, line %d: %s\n", function, line, what);
}

/* A mapping of its own, which does not merge with any other. */
static char *map_pages(size_t count)
{
	char *pages = mmap(NULL, (count + 2) * PAGE, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(pages != MAP_FAILED);
	pages += PAGE;
	CHECK(!mprotect(pages, count * PAGE, PROT_READ | PROT_WRITE));
	memset(pages, 1, count * PAGE);
	return pages;
}

static void watch_pages(int notifier, char *start, size_t count, uint64_t cookie)
{
	struct aioummu_refusal refusal;

	CHECK(!aioummu_register(notifier, (uintptr_t)start,
				(uintptr_t)start + count * PAGE, cookie,
				&refusal));
}

static int open_notifier(void)
{
	int doorbell[2], notifier = aioummu_open(doorbell);

	CHECK(notifier > 0);
	return notifier;
}

/* Mappings that a userfaultfd is registered for. */
static unsigned int registered_mappings(void)
{
	FILE *file = fopen("/proc/self/smaps", "r");
	unsigned int count = 0;
	char line[4096];

	while (fgets(line, sizeof(line), file))
		if (!strncmp(line, "VmFlags:", 8) && strstr(line, " uw"))
			count++;
	fclose(file);
	return count;
}

/*
 * A child that keeps copies of the descriptors, so that closing them ends nothing.
 * Fork handlers would close them.
 */
static pid_t start_copy(void)
{
	pid_t child = syscall(SYS_fork);

	CHECK(child >= 0);
	if (!child)
		for (;;)
			pause();
	return child;
}

static void end_copy(pid_t child)
{
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

/* ---------------------------------------------------------------- the ring --- */

#define BURST	100

static void *unmap_one_by_one(void *pages)
{
	for (int i = 0; i < BURST; i++)
		munmap((char *)pages + 2 * i * PAGE, PAGE);
	return NULL;
}

/* The thread goes on reading while the holder of the lock does not run. */
static void test_a_full_ring_invalidates_everything(void)
{
	struct ummunotify_event events[2 * BURST];
	char *pages = map_pages(2 * BURST), *other = map_pages(1);
	int notifier = open_notifier(), bystander = open_notifier();
	unsigned int before = registered_mappings();
	pthread_t thread;
	ssize_t size;

	for (int i = 0; i < BURST; i++)
		watch_pages(notifier, pages + 2 * i * PAGE, 1, i);
	watch_pages(bystander, other, 1, 7);
	pthread_mutex_lock(&engine.lock);
	pthread_create(&thread, NULL, unmap_one_by_one, pages);
	pthread_join(thread, NULL);
	CHECK(atomic_load(&engine.overrun));
	let_go();

	size = aioummu_read(notifier, events, sizeof(events));
	CHECK(size == (BURST + 1) * (ssize_t)sizeof(*events));
	for (int i = 0; i < BURST; i++) {
		CHECK(events[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL);
		CHECK(aioummu_spent(notifier, i) == 1);
	}
	size = aioummu_read(bystander, events, sizeof(events));
	CHECK(size == 2 * (ssize_t)sizeof(*events));
	CHECK(events[0].user_cookie_counter == 7 && !events[0].flags);
	CHECK(aioummu_spent(bystander, 7) == 1);
	/* What is there is still registered, but nobody knows where. */
	CHECK(registered_mappings() > before);
	aioummu_close(notifier);
	aioummu_close(bystander);
	CHECK(registered_mappings() == 0);
	munmap(pages, 2 * BURST * PAGE);
	munmap(other, PAGE);
}

static void *unmap_page(void *page)
{
	munmap(page, PAGE);
	return NULL;
}

static char *handler_page;

static void drop_page(int signal)
{
	(void)signal;
	madvise(handler_page, PAGE, MADV_DONTNEED);
}

static void test_a_signal_handler_that_changes_mappings(void)
{
	int notifier = open_notifier();
	uint64_t generation;
	sigset_t usr1;

	handler_page = map_pages(1);
	watch_pages(notifier, handler_page, 1, 1);
	signal(SIGUSR1, drop_page);
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, NULL);
	/* It waits for this thread, as the engine's has it blocked as well. */
	kill(getpid(), SIGUSR1);
	usleep(20000);
	CHECK(!aioummu_generation(notifier, &generation) && generation == 0);
	sigprocmask(SIG_UNBLOCK, &usr1, NULL);
	CHECK(!aioummu_generation(notifier, &generation) && generation == 1);
	signal(SIGUSR1, SIG_DFL);
	aioummu_close(notifier);
}

static void test_changes_wait_in_the_ring_for_who_lets_go(void)
{
	char *page = map_pages(1);
	int notifier = open_notifier();
	struct ummunotify_event event;
	pthread_t thread;

	watch_pages(notifier, page, 1, 1);
	pthread_mutex_lock(&engine.lock);
	pthread_create(&thread, NULL, unmap_page, page);
	while (ring_is_empty())
		sched_yield();
	let_go();
	/* Nobody else came by to take it out. */
	pthread_mutex_lock(&engine.lock);
	CHECK(ring_is_empty());
	CHECK(!TAILQ_EMPTY(&find_notifier(notifier)->reports));
	pthread_mutex_unlock(&engine.lock);
	pthread_join(thread, NULL);
	CHECK(aioummu_read(notifier, &event, sizeof(event)) == sizeof(event));
	CHECK(event.type == UMMUNOTIFY_EVENT_TYPE_INVAL);
	aioummu_close(notifier);
}

/* ---------------------------------------------------------------- coverage --- */

/* As after a long burst in which nobody could get memory. */
static void test_forgotten_coverage_is_released_at_the_end(void)
{
	char *pages = map_pages(64);
	int notifier = open_notifier();
	struct free_object *unused;
	pid_t copy;

	watch_pages(notifier, pages, 64, 1);
	copy = start_copy();
	pthread_mutex_lock(&engine.lock);
	unused = engine.cover_pool.free;
	engine.cover_pool.free = NULL;
	pthread_mutex_unlock(&engine.lock);
	for (int i = 1; i < 64; i += 2)
		munmap(pages + i * PAGE, PAGE);
	pthread_mutex_lock(&engine.lock);
	empty_ring();
	CHECK(engine.forgotten_start < engine.forgotten_end);
	if (!engine.cover_pool.free)
		engine.cover_pool.free = unused;
	pthread_mutex_unlock(&engine.lock);
	CHECK(registered_mappings() == 32);
	aioummu_close(notifier);
	CHECK(registered_mappings() == 0);
	end_copy(copy);
	munmap(pages, 64 * PAGE);
}

static void test_nothing_stays_registered_though_a_child_has_copies(void)
{
	char *pages = map_pages(4), *moved = map_pages(4), *target = map_pages(4);
	char *kept = map_pages(4), *other = map_pages(4);
	int notifier = open_notifier();
	pid_t copy;

	watch_pages(notifier, pages, 4, 1);
	watch_pages(notifier, moved, 4, 2);
	watch_pages(notifier, kept, 4, 3);
	copy = start_copy();
	CHECK(mremap(moved, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		     target) == target);
	CHECK(mremap(kept, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED |
		     MREMAP_DONTUNMAP, other) == other);
	CHECK(registered_mappings() == 4);
	aioummu_close(notifier);
	/* Else, nobody would read the events of what is unmapped now. */
	CHECK(registered_mappings() == 0);
	munmap(pages, 4 * PAGE);
	munmap(target, 4 * PAGE);
	munmap(kept, 4 * PAGE);
	munmap(other, 4 * PAGE);
	end_copy(copy);
}

static void test_coverage_never_overlaps(void)
{
	int notifier = open_notifier();
	uint64_t start, end = 0;
	struct range *range;

	srand(1);
	pthread_mutex_lock(&engine.lock);
	for (int i = 0; i < 20000; i++) {
		start = rand() % 1000;
		remove_cover(start, start + 1 + rand() % 50);
		if (i % 3)
			continue;
		pool_reserve(&engine.cover_pool, 4);
		start = rand() % 1000;
		remove_cover(start, start + 20);
		add_cover(start, start + 20, true, rand() % 2);
	}
	start = 0;
	while ((range = ranges_overlapping(engine.coverage, start, UINT64_MAX))) {
		CHECK(range->start >= end && range->start < range->end);
		start = end = range->end;
	}
	remove_cover(0, UINT64_MAX);
	CHECK(!engine.idle_count && TAILQ_EMPTY(&engine.idle));
	pthread_mutex_unlock(&engine.lock);
	aioummu_close(notifier);
}

/* ------------------------------------------------------------------ records --- */

static void test_last_is_due_when_the_last_report_was_dropped(void)
{
	char *pages = map_pages(2);
	int notifier = open_notifier();
	struct ummunotify_event events[4];

	watch_pages(notifier, pages, 1, 1);
	watch_pages(notifier, pages + PAGE, 1, 2);
	munmap(pages, 2 * PAGE);
	CHECK(aioummu_read(notifier, events, 40) == 32);
	CHECK(!aioummu_unregister(notifier, 2));
	CHECK(aioummu_read(notifier, events, sizeof(events)) == 32);
	CHECK(events[0].type == UMMUNOTIFY_EVENT_TYPE_LAST);
	CHECK(events[0].user_cookie_counter == 1);
	CHECK(aioummu_read(notifier, events, sizeof(events)) == 0);
	CHECK(aioummu_read(notifier, events, 31) == -EINVAL);
	aioummu_close(notifier);
}

static void test_one_change_rises_the_generation_once(void)
{
	char *pages = map_pages(4);
	int notifier = open_notifier();
	struct ummunotify_event event;
	uint64_t generation;

	for (int i = 0; i < 4; i++)
		watch_pages(notifier, pages + i * PAGE, 1, i);
	madvise(pages, 4 * PAGE, MADV_DONTNEED);
	CHECK(!aioummu_generation(notifier, &generation) && generation == 1);
	madvise(pages, PAGE, MADV_DONTNEED);
	CHECK(!aioummu_generation(notifier, &generation) && generation == 2);
	CHECK(aioummu_read(notifier, &event, sizeof(event)) == 32);
	CHECK(!event.flags && event.hint_start == (uintptr_t)pages);
	CHECK(aioummu_read(notifier, &event, sizeof(event)) == 32);
	CHECK(event.flags == UMMUNOTIFY_EVENT_FLAG_HINT);
	aioummu_close(notifier);
	munmap(pages, 4 * PAGE);
}

/* -------------------------------------------------------------- other limits --- */

static int run_in_child(void (*run)(int notifier, char *page), bool behind_libc)
{
	int notifier = open_notifier(), status;
	char *page = map_pages(1);
	pid_t child;

	watch_pages(notifier, page, 1, 1);
	child = behind_libc ? syscall(SYS_fork) : fork();
	if (!child) {
		alarm(10);
		failures = 0;
		run(notifier, page);
		_exit(failures);
	}
	waitpid(child, &status, 0);
	aioummu_close(notifier);
	munmap(page, PAGE);
	return status;
}

static void use_a_copy(int notifier, char *page)
{
	uint64_t generation;
	int doorbell[2];

	CHECK(aioummu_open(doorbell) == -EOWNERDEAD);
	CHECK(aioummu_generation(notifier, &generation) == -EOWNERDEAD);
	CHECK(aioummu_fence() == -EOWNERDEAD);
	aioummu_close(notifier);
	munmap(page, PAGE);
}

static void test_a_child_that_nobody_told_about_is_a_copy(void)
{
	CHECK(run_in_child(use_a_copy, true) == 0);
}

static void begin_anew(int notifier, char *page)
{
	struct ummunotify_event event;
	uint64_t generation;
	int own;

	CHECK(aioummu_generation(notifier, &generation) == -EBADF);
	own = open_notifier();
	watch_pages(own, page, 1, 1);
	munmap(page, PAGE);
	CHECK(aioummu_read(own, &event, sizeof(event)) == 32);
	aioummu_close(own);
}

static void test_a_child_begins_anew(void)
{
	CHECK(run_in_child(begin_anew, false) == 0);
}

static void forbid_descriptors(int notifier, char *page)
{
	const struct rlimit none = { 0, 0 };
	struct ummunotify_event event;

	(void)notifier;
	notifier = open_notifier();
	watch_pages(notifier, page, 1, 1);
	CHECK(!setrlimit(RLIMIT_NOFILE, &none));
	munmap(page, PAGE);
	CHECK(aioummu_read(notifier, &event, sizeof(event)) == 32);
	aioummu_close(notifier);
}

static void test_a_process_that_forbids_itself_poll(void)
{
	CHECK(run_in_child(forbid_descriptors, false) == 0);
}

static void close_everything(int notifier, char *page)
{
	int innocent[2];

	(void)notifier;
	notifier = open_notifier();
	watch_pages(notifier, page, 1, 1);
	for (int fd = 3; fd < 100; fd++)
		close(fd);
	munmap(page, PAGE);
	for (int i = 0; i < 20; i++)
		CHECK(!pipe2(innocent, O_NONBLOCK));
	while (aioummu_spent(notifier, 1) == 0)
		sched_yield();
	aioummu_close(notifier);
	/* Their numbers were the engine's: nothing was written, nothing closed. */
	for (int fd = 3; fd < 43; fd++) {
		char byte;

		CHECK(fcntl(fd, F_GETFD) >= 0);
		CHECK(read(fd, &byte, 1) < 0);
	}
}

static void test_who_closes_everything_loses_no_file_of_his_own(void)
{
	CHECK(run_in_child(close_everything, false) == 0);
}

/* -------------------------------------------------------------------- parts --- */

#define MODEL	300

static void visit_one(struct range *range, void *context)
{
	struct range ***next = context;

	*(*next)++ = range;
}

static void test_ranges_against_a_list(void)
{
	static struct range ranges[MODEL];
	struct range *root = NULL, *found[MODEL], **end;
	bool used[MODEL] = { false };

	srand(2);
	for (int round = 0; round < 50000; round++) {
		int i = rand() % MODEL, expected = 0;
		uint64_t from = rand() % 500, to = from + 1 + rand() % 20;
		struct range *first;

		if (used[i]) {
			ranges_remove(&root, &ranges[i]);
		} else {
			ranges[i].start = rand() % 500;
			ranges[i].end = ranges[i].start + 1 + rand() % 40;
			if (rand() % 50 == 0)
				ranges[i].end = UINT64_MAX;
			ranges[i].priority = rand();
			ranges_insert(&root, &ranges[i]);
		}
		used[i] = !used[i];
		end = found;
		ranges_visit(root, from, to, visit_one, &end);
		first = ranges_overlapping(root, from, to);
		for (int k = 0; k < MODEL; k++)
			expected += used[k] && ranges[k].start < to &&
				    ranges[k].end > from;
		CHECK(end - found == expected);
		CHECK(first == (expected ? found[0] : NULL));
		for (int k = 1; k < expected; k++)
			CHECK(found[k - 1]->start <= found[k]->start);
		first = ranges_starting_at(root, from);
		CHECK(!first || first->start == from);
		for (int k = 0; k < MODEL; k++)
			CHECK(first || !used[k] || ranges[k].start != from);
	}
}

static unsigned int depth(const struct range *root)
{
	unsigned int left, right;

	if (!root)
		return 0;
	left = depth(root->left);
	right = depth(root->right);
	return 1 + (left > right ? left : right);
}

static void test_ranges_stay_flat(void)
{
	const size_t count = 1000000;
	struct range *ranges = calloc(count, sizeof(*ranges)), *root = NULL;

	engine.random = 2463534242;
	for (size_t i = 0; i < count; i++) {
		ranges[i].start = i;
		ranges[i].end = i + 1;
		ranges[i].priority = random_priority();
		ranges_insert(&root, &ranges[i]);
	}
	/* Expected are about 50; a list would have a million. */
	CHECK(depth(root) < 100);
	free(ranges);
}

static void test_mappings_are_the_same_by_index_and_as_text(void)
{
	struct mappings indexed, text;
	struct mapping a, b;
	uint64_t address = 0;
	unsigned int count = 0;
	int by_index, by_text;

	CHECK(!mappings_open(&indexed));
	if (!indexed.indexed)
		printf("# no PROCMAP_QUERY before Linux 6.11\n");
	text = indexed;
	text.indexed = false;
	for (;;) {
		by_index = mapping_at_or_behind(&indexed, address, &a);
		by_text = mapping_at_or_behind(&text, address, &b);
		/* Only the text has this page of the kernel. */
		if (by_text == 0 && b.start == 0xffffffffff600000)
			break;
		CHECK(by_index == by_text);
		if (by_text)
			break;
		CHECK(a.start == b.start && a.end == b.end);
		CHECK(a.start >= address || a.end > address);
		address = b.end;
		count++;
	}
	CHECK(count > 10);
	close(indexed.fd);
}

#define TEST(name)	{ #name, test_##name }

static const struct {
	const char	*name;
	void		(*run)(void);
} tests[] = {
	TEST(a_full_ring_invalidates_everything),
	TEST(a_signal_handler_that_changes_mappings),
	TEST(changes_wait_in_the_ring_for_who_lets_go),
	TEST(forgotten_coverage_is_released_at_the_end),
	TEST(nothing_stays_registered_though_a_child_has_copies),
	TEST(coverage_never_overlaps),
	TEST(last_is_due_when_the_last_report_was_dropped),
	TEST(one_change_rises_the_generation_once),
	TEST(a_child_that_nobody_told_about_is_a_copy),
	TEST(a_child_begins_anew),
	TEST(a_process_that_forbids_itself_poll),
	TEST(who_closes_everything_loses_no_file_of_his_own),
	TEST(ranges_against_a_list),
	TEST(ranges_stay_flat),
	TEST(mappings_are_the_same_by_index_and_as_text),
};

#define TESTS	(sizeof(tests) / sizeof(*tests))

int main(void)
{
	unsigned int failed = 0;

	setvbuf(stdout, NULL, _IONBF, 0);
	for (size_t i = 0; i < TESTS; i++) {
		alarm(60);
		failures = 0;
		tests[i].run();
		failed += !!failures;
		printf("%sok %zu - %s\n", failures ? "not " : "", i + 1,
		       tests[i].name);
	}
	printf("1..%zu\n", TESTS);
	return !!failed;
}
