// SPDX-License-Identifier: MIT
/*
 * The engine from within: its source is included here, with a short ring, so that
 * what hardly ever happens can be made to happen.
 *
 * Many tests hold a copy of the userfaultfd while the engine stops.  Without one,
 * closing it unregisters everything, and nobody sees what was forgotten; with one,
 * in a forked child for example, whoever unmaps that sleeps for ever.
 */
#define _GNU_SOURCE
#include "mappings.h"

/* So that mappings can change between two looks of the engine at them. */
static int look_up(const struct mappings *mappings, uint64_t address,
		   struct mapping *mapping);
#define mapping_at_or_behind	look_up
#include "engine.c"
#undef mapping_at_or_behind

#include <inttypes.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/wait.h>

#include "harness.h"
#include "smaps.h"

#define PAGE		UINT64_C(4096)
#define RECORDS		2048
#define INVAL		UMMUNOTIFY_EVENT_TYPE_INVAL
#define LAST		UMMUNOTIFY_EVENT_TYPE_LAST
#define HINT		UMMUNOTIFY_EVENT_FLAG_HINT

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED	1
#else
#define SANITIZED	0
#endif

static struct ummunotify_event records[RECORDS];
static struct aioummu_refusal refusal;

/* ------------------------------------------------------------------- tools --- */

/* Runs once, before the look-up of an address that is no less than this. */
static void (*change_behind)(void);
static uint64_t change_at;

static int look_up(const struct mappings *mappings, uint64_t address,
		   struct mapping *mapping)
{
	void (*change)(void) = change_behind;

	if (change && address >= change_at) {
		change_behind = NULL;
		change();
	}
	return mapping_at_or_behind(mappings, address, mapping);
}

static int open_notifier(int *doorbell)
{
	int ends[2], number = aioummu_open(ends);

	if (number == -ENOSYS || number == -EPERM || number == -EOPNOTSUPP)
		skip("no userfaultfd of the kind that the engine needs here");
	CHECK(number > 0);
	if (doorbell)
		*doorbell = ends[0];
	return number;
}

/* Not merged with others: it lies between two mappings that cannot be watched. */
static char *map(size_t pages)
{
	size_t size = (pages + 2) * PAGE;
	char *memory = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);

	CHECK(memory != MAP_FAILED);
	CHECK(!mprotect(memory + PAGE, pages * PAGE, PROT_READ | PROT_WRITE));
	memset(memory + PAGE, 1, pages * PAGE);
	return memory + PAGE;
}

/*
 * Nothing around it, and low: no allocator, be it a sanitizer's, comes to where
 * it was once it is unmapped.
 */
static char *map_alone(size_t pages)
{
	static char *next = (char *)0x40000000;
	char *memory;

	do {
		memory = mmap(next, pages * PAGE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			      -1, 0);
		next += (pages + 16) * PAGE;
	} while (memory == MAP_FAILED && errno == EEXIST);
	CHECK(memory != MAP_FAILED);
	memset(memory, 1, pages * PAGE);
	return memory;
}

static char *map_at(char *at, size_t pages)
{
	char *memory = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	CHECK(memory == at);
	memset(memory, 1, pages * PAGE);
	return memory;
}

static int watch(int number, const void *memory, size_t size, uint64_t cookie)
{
	uint64_t start = (uintptr_t)memory;

	return aioummu_register(number, start, start + size, cookie, 0, false,
				&refusal);
}

static void must_watch(int number, const void *memory, size_t pages,
		       uint64_t cookie)
{
	CHECK_EQUAL(watch(number, memory, pages * PAGE, cookie), 0);
}

static size_t read_records(int number, size_t room)
{
	ssize_t size = aioummu_read(number, records, room * sizeof(records[0]));

	CHECK(size >= 0);
	return (size_t)size / sizeof(records[0]);
}

static uint64_t generation(int number)
{
	uint64_t value = 0;

	CHECK_EQUAL(aioummu_generation(number, &value), 0);
	return value;
}

/* Reads one report, which must be this one. */
static void must_report(int number, uint64_t cookie, const void *start,
			size_t pages, uint32_t flags)
{
	CHECK_EQUAL(read_records(number, 1), 1);
	CHECK_EQUAL(records[0].type, INVAL);
	CHECK_EQUAL(records[0].user_cookie_counter, cookie);
	CHECK_EQUAL(records[0].flags & ~UMMUNOTIFY_EVENT_CAUSE_MASK, flags);
	CHECK_EQUAL(records[0].hint_start, (uintptr_t)start);
	CHECK_EQUAL(records[0].hint_end, (uintptr_t)start + pages * PAGE);
}

static void must_end(int number, uint64_t at_generation)
{
	CHECK_EQUAL(read_records(number, 1), 1);
	CHECK_EQUAL(records[0].type, LAST);
	CHECK_EQUAL(records[0].user_cookie_counter, at_generation);
	CHECK_EQUAL(records[0].flags & ~UMMUNOTIFY_EVENT_CAUSE_MASK, 0);
	CHECK_EQUAL(records[0].hint_start, 0);
	CHECK_EQUAL(records[0].hint_end, 0);
	CHECK_EQUAL(read_records(number, 1), 0);
}

static void must_be_silent(int number)
{
	CHECK_EQUAL(read_records(number, RECORDS), 0);
}

/* Whether it does after what was asked of the engine last. */
static bool rings(int doorbell)
{
	struct pollfd polled = { .fd = doorbell, .events = POLLIN };

	return poll(&polled, 1, 0) == 1;
}

static unsigned int registered_in(const void *memory, size_t pages)
{
	return count_registered_in((uintptr_t)memory,
				   (uintptr_t)memory + pages * PAGE);
}

/* Closes the last notifier, while there is a copy of the userfaultfd. */
static void close_with_a_copy(int number)
{
	int copy = fcntl(engine.userfaultfd.fd, F_DUPFD_CLOEXEC, 0);
	unsigned int left;
	char lines[300];

	CHECK(copy >= 0);
	aioummu_close(number);
	CHECK(!engine.running);
	left = count_registered(lines, sizeof(lines));
	if (left)
		note("still registered: %s", lines);
	CHECK_EQUAL(left, 0);
	close(copy);
}

static pthread_t start_helper(void *(*run)(void *), void *argument)
{
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, run, argument));
	return thread;
}

/* ---------------------------------------------------------------- the contract --- */

static void an_unmapping_is_reported_exactly(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(8);

	must_watch(number, memory + 2 * PAGE, 4, 7);
	CHECK(!rings(doorbell));
	CHECK_EQUAL(generation(number), 0);
	must_be_silent(number);
	munmap(memory, 4 * PAGE);
	CHECK_EQUAL(generation(number), 1);
	CHECK(rings(doorbell));
	/* Clipped to the region. */
	must_report(number, 7, memory + 2 * PAGE, 2, HINT);
	CHECK(rings(doorbell));
	must_end(number, 1);
	CHECK(!rings(doorbell));
	aioummu_close(number);
}

static void wait_for_doorbell(int doorbell)
{
	struct pollfd polled = { .fd = doorbell, .events = POLLIN };

	CHECK_EQUAL(poll(&polled, 1, -1), 1);
}

static void the_doorbell_rings_without_being_asked(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(100);

	must_watch(number, memory, 100, 1);
	for (uint64_t i = 0; i < 100; i++) {
		munmap(memory + i * PAGE, PAGE);
		wait_for_doorbell(doorbell);
		must_report(number, 1, memory + i * PAGE, 1, HINT);
		must_end(number, i + 1);
		CHECK(!rings(doorbell));
	}
	aioummu_close(number);
}

static void what_is_beside_a_region_is_not_reported(void)
{
	int number = open_notifier(NULL);
	char *memory = map(8);

	must_watch(number, memory + 2 * PAGE, 4, 1);
	munmap(memory, 2 * PAGE);
	munmap(memory + 6 * PAGE, 2 * PAGE);
	must_be_silent(number);
	CHECK_EQUAL(generation(number), 0);
	CHECK_EQUAL(aioummu_spent(number, 1), 0);
	aioummu_close(number);
}

static void a_second_hit_before_the_read_takes_the_hint_away(void)
{
	int number = open_notifier(NULL);
	char *memory = map(8);

	must_watch(number, memory, 8, 1);
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	madvise(memory + 5 * PAGE, PAGE, MADV_DONTNEED);
	CHECK_EQUAL(generation(number), 2);
	must_report(number, 1, memory, 8, 0);
	must_end(number, 2);
	/* The next one is exact again, and the region still there. */
	madvise(memory + 5 * PAGE, PAGE, MADV_DONTNEED);
	must_report(number, 1, memory + 5 * PAGE, 1, HINT);
	must_end(number, 3);
	aioummu_close(number);
}

static void a_change_counts_once_however_many_regions_it_hits(void)
{
	int number = open_notifier(NULL), other = open_notifier(NULL);
	char *memory = map(8), *elsewhere = map(1);

	for (uint64_t i = 0; i < 8; i++)
		must_watch(number, memory + i * PAGE, 1, i);
	must_watch(number, memory, 8, 8);
	must_watch(other, elsewhere, 1, 0);
	munmap(memory, 4 * PAGE);
	CHECK_EQUAL(generation(number), 1);
	CHECK_EQUAL(generation(other), 0);
	must_be_silent(other);
	CHECK_EQUAL(read_records(number, RECORDS), 6);
	CHECK_EQUAL(records[5].type, LAST);
	CHECK_EQUAL(records[5].user_cookie_counter, 1);
	aioummu_close(number);
	aioummu_close(other);
}

static void reports_come_in_the_order_of_the_first_hit(void)
{
	int number = open_notifier(NULL);
	char *memory = map(8);

	for (uint64_t i = 0; i < 8; i++)
		must_watch(number, memory + i * PAGE, 1, i);
	madvise(memory + 5 * PAGE, PAGE, MADV_DONTNEED);
	madvise(memory + 1 * PAGE, PAGE, MADV_DONTNEED);
	madvise(memory + 5 * PAGE, PAGE, MADV_DONTNEED);
	must_report(number, 5, memory + 5 * PAGE, 1, 0);
	must_report(number, 1, memory + 1 * PAGE, 1, HINT);
	must_end(number, 3);
	aioummu_close(number);
}

static void last_waits_for_room(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(4);

	for (uint64_t i = 0; i < 4; i++)
		must_watch(number, memory + i * PAGE, 1, i);
	munmap(memory, 4 * PAGE);
	/* Exactly as much room as there are reports. */
	CHECK_EQUAL(read_records(number, 4), 4);
	for (unsigned int i = 0; i < 4; i++)
		CHECK_EQUAL(records[i].type, INVAL);
	CHECK(rings(doorbell));
	must_end(number, 1);
	CHECK(!rings(doorbell));
	aioummu_close(number);
}

static void last_says_the_generation_of_its_moment(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	must_watch(number, memory, 4, 1);
	madvise(memory, PAGE, MADV_DONTNEED);
	must_report(number, 1, memory, 1, HINT);
	/* Before LAST is read, there is something new: that comes first. */
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	must_report(number, 1, memory + PAGE, 1, HINT);
	must_end(number, 2);
	aioummu_close(number);
}

static void last_comes_after_unregister_of_the_last_pending(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(2);

	must_watch(number, memory, 1, 1);
	must_watch(number, memory + PAGE, 1, 2);
	munmap(memory, 2 * PAGE);
	CHECK_EQUAL(aioummu_unregister(number, 1), 0);
	CHECK_EQUAL(aioummu_unregister(number, 2), 0);
	CHECK(rings(doorbell));
	must_end(number, 1);
	CHECK(!rings(doorbell));
	aioummu_close(number);
}

static void an_unregistered_region_is_not_reported(void)
{
	int number = open_notifier(NULL);
	char *memory = map(2);

	must_watch(number, memory, 1, 1);
	must_watch(number, memory + PAGE, 1, 2);
	munmap(memory, 2 * PAGE);
	CHECK_EQUAL(aioummu_unregister(number, 1), 0);
	must_report(number, 2, memory + PAGE, 1, HINT);
	must_end(number, 1);
	/* The cookie is free again. */
	map_at(memory, 2);
	must_watch(number, memory, 2, 1);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	aioummu_close(number);
}

static void a_buffer_without_room_for_a_record_loses_nothing(void)
{
	int number = open_notifier(NULL);
	char *memory = map(1);

	must_watch(number, memory, 1, 1);
	munmap(memory, PAGE);
	CHECK_EQUAL(aioummu_read(number, records, 31), -EINVAL);
	CHECK_EQUAL(aioummu_read(number, records, 0), -EINVAL);
	/* Whole records only. */
	CHECK_EQUAL(aioummu_read(number, records, 63), 32);
	CHECK_EQUAL(records[0].type, INVAL);
	must_end(number, 1);
	aioummu_close(number);
}

static void the_activity_word_says_when_to_look(void)
{
	int number = open_notifier(NULL);
	const uint64_t *word = aioummu_activity();
	char *memory = map(64);
	uint64_t before;

	must_watch(number, memory, 64, 1);
	before = __atomic_load_n(word, __ATOMIC_ACQUIRE);
	CHECK_EQUAL(generation(number), 0);
	CHECK_EQUAL(__atomic_load_n(word, __ATOMIC_ACQUIRE), before);
	for (uint64_t i = 0; i < 64; i++) {
		uint64_t now;

		munmap(memory + i * PAGE, PAGE);
		now = __atomic_load_n(word, __ATOMIC_ACQUIRE);
		CHECK(now > before);
		before = now;
		CHECK_EQUAL(generation(number), i + 1);
	}
	aioummu_close(number);
}

static void many_notifiers_are_told_of_one_change(void)
{
	int numbers[200], doorbells[200];
	char *memory = map(1);

	for (int i = 0; i < 200; i++) {
		numbers[i] = open_notifier(&doorbells[i]);
		/* The cookies are each notifier's own. */
		must_watch(numbers[i], memory, 1, 1);
	}
	munmap(memory, PAGE);
	for (int i = 0; i < 200; i++) {
		CHECK_EQUAL(generation(numbers[i]), 1);
		CHECK(rings(doorbells[i]));
		must_report(numbers[i], 1, memory, 1, HINT);
		must_end(numbers[i], 1);
		CHECK(!rings(doorbells[i]));
	}
	for (int i = 0; i < 200; i++)
		aioummu_close(numbers[i]);
	CHECK(!engine.running);
}

/* ---------------------------------------------------------------- refusals --- */

static void cookies_name_one_region_each(void)
{
	int number = open_notifier(NULL), other = open_notifier(NULL);
	const uint64_t cookies[] = { 0, 1, UINT64_MAX, UINT64_C(1) << 63 };
	char *memory = map(2);

	for (size_t i = 0; i < 4; i++) {
		must_watch(number, memory, 1, cookies[i]);
		CHECK_EQUAL(watch(number, memory + PAGE, PAGE, cookies[i]), -EEXIST);
		must_watch(other, memory, 1, cookies[i]);
	}
	for (size_t i = 0; i < 4; i++) {
		CHECK_EQUAL(aioummu_unregister(number, cookies[i]), 0);
		CHECK_EQUAL(aioummu_unregister(number, cookies[i]), -ENOENT);
		CHECK_EQUAL(aioummu_spent(number, cookies[i]), -ENOENT);
		CHECK_EQUAL(aioummu_rearm(number, cookies[i], &refusal), -ENOENT);
		CHECK_EQUAL(aioummu_spent(other, cookies[i]), 0);
	}
	aioummu_close(number);
	aioummu_close(other);
}

static void numbers_of_closed_notifiers_are_refused(void)
{
	int number, other;
	uint64_t value;
	char *memory = map(1);

	CHECK_EQUAL(aioummu_generation(1, &value), -EBADF);
	CHECK_EQUAL(aioummu_fence(), -EBADF);
	aioummu_close(1);
	number = open_notifier(NULL);
	other = open_notifier(NULL);
	aioummu_close(number);
	aioummu_close(number);
	CHECK_EQUAL(aioummu_generation(number, &value), -EBADF);
	CHECK_EQUAL(watch(number, memory, PAGE, 1), -EBADF);
	CHECK_EQUAL(aioummu_unregister(number, 1), -EBADF);
	CHECK_EQUAL(aioummu_read(number, records, 32), -EBADF);
	CHECK_EQUAL(aioummu_spent(number, 1), -EBADF);
	CHECK_EQUAL(aioummu_fence(), 0);
	aioummu_close(other);
	CHECK_EQUAL(aioummu_fence(), -EBADF);
	CHECK_EQUAL(aioummu_generation(other, &value), -EBADF);
	/* A number is not used again. */
	CHECK(open_notifier(NULL) > other);
}

static void empty_and_inverted_ranges_are_refused(void)
{
	int number = open_notifier(NULL);

	CHECK_EQUAL(aioummu_register(number, PAGE, PAGE, 1, 0, false, &refusal),
		    -EINVAL);
	CHECK_EQUAL(aioummu_register(number, 2 * PAGE, PAGE, 1, 0, false, &refusal),
		    -EINVAL);
	CHECK_EQUAL(aioummu_unregister(number, 1), -ENOENT);
	aioummu_close(number);
}

static void must_refuse(int number, const char *memory, size_t pages, int error,
			const char *start, const char *end)
{
	CHECK_EQUAL(watch(number, memory, pages * PAGE, 1), error);
	CHECK_EQUAL(refusal.start, (uintptr_t)start);
	CHECK_EQUAL(refusal.end, (uintptr_t)end);
	CHECK_EQUAL(aioummu_unregister(number, 1), -ENOENT);
}

static void holes_are_refused_and_named(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(8), *hole = memory + 3 * PAGE;

	munmap(hole, 2 * PAGE);
	must_refuse(number, memory, 8, -EFAULT, hole, hole + 2 * PAGE);
	/* It ends in the hole, starts there, is within. */
	must_refuse(number, memory, 4, -EFAULT, hole, hole + PAGE);
	must_refuse(number, hole + PAGE, 3, -EFAULT, hole + PAGE, hole + 2 * PAGE);
	must_refuse(number, hole, 1, -EFAULT, hole, hole + PAGE);
	/* Beyond everything. */
	CHECK_EQUAL(aioummu_register(number, UINT64_MAX - 5, UINT64_MAX, 1,
				     0, false, &refusal), -EFAULT);
	CHECK_EQUAL(refusal.start, UINT64_MAX - 5);
	CHECK_EQUAL(refusal.end, UINT64_MAX);
	must_watch(number, memory, 3, 1);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	close_with_a_copy(number);
}

/* The mappings before the refused one were registered already. */
static void a_refusal_leaves_nothing_behind(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(4);

	CHECK(!mprotect(memory, PAGE, PROT_READ));
	munmap(memory + 3 * PAGE, PAGE);
	CHECK_EQUAL(watch(number, memory, 4 * PAGE, 1), -EFAULT);
	munmap(memory, 3 * PAGE);
	must_be_silent(number);
	CHECK_EQUAL(generation(number), 0);
	close_with_a_copy(number);
}

static void shared_memory_that_cannot_be_written_is_eperm(void)
{
	char name[] = P_tmpdir "/engine_test.XXXXXX";
	int number = open_notifier(NULL), writable = mkstemp(name), fd, error;
	char *memory;

	CHECK(writable >= 0);
	CHECK(!ftruncate(writable, 4 * PAGE));
	fd = open(name, O_RDONLY | O_CLOEXEC);
	unlink(name);
	memory = mmap(NULL, 4 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED);
	error = watch(number, memory + PAGE, PAGE, 1);
	if (!error)
		skip("this kernel watches a read-only file");
	/* Before Linux 6.7, files cannot be watched at all. */
	CHECK(error == -EPERM || error == -EINVAL);
	CHECK_EQUAL(refusal.start, (uintptr_t)memory);
	CHECK_EQUAL(refusal.end, (uintptr_t)memory + 4 * PAGE);
	close_with_a_copy(number);
}

static void the_vdso_is_einval(void)
{
	int number = open_notifier(NULL);
	FILE *file = fopen("/proc/self/maps", "re");
	uint64_t start = 0, end = 0;
	char line[500];

	while (fgets(line, sizeof(line), file))
		if (strstr(line, "[vdso]"))
			CHECK_EQUAL(sscanf(line, "%" SCNx64 "-%" SCNx64, &start,
					   &end), 2);
	fclose(file);
	if (!start)
		skip("no vdso here");
	CHECK_EQUAL(aioummu_register(number, start, start + 1, 1, 0, false, &refusal),
		    -EINVAL);
	CHECK_EQUAL(refusal.start, start);
	CHECK_EQUAL(refusal.end, end);
	close_with_a_copy(number);
}

/* Another userfaultfd of this process, with this memory registered. */
static int take_away(char *memory, size_t pages, uint64_t mode)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register argument = {
		.range = { (uintptr_t)memory, pages * PAGE }, .mode = mode,
	};
	bool through_device;
	int fd = open_userfaultfd(&through_device);

	CHECK(fd >= 0);
	CHECK(!ioctl(fd, UFFDIO_API, &api));
	CHECK(!ioctl(fd, UFFDIO_REGISTER, &argument));
	return fd;
}

static void memory_of_another_userfaultfd_is_busy_and_stays_so(void)
{
	int number = open_notifier(NULL), other;
	char *memory = map_alone(6);

	other = take_away(memory + 2 * PAGE, 2, UFFDIO_REGISTER_MODE_WP);
	must_refuse(number, memory, 6, -EBUSY, memory + 2 * PAGE, memory + 4 * PAGE);
	must_refuse(number, memory + 3 * PAGE, 1, -EBUSY, memory + 2 * PAGE,
		    memory + 4 * PAGE);
	must_watch(number, memory, 1, 1);
	must_watch(number, memory + 5 * PAGE, 1, 2);
	/* Both sides are forgotten, and so released as a whole. */
	pthread_mutex_lock(&engine.lock);
	remove_cover((uintptr_t)memory, (uintptr_t)memory + 6 * PAGE);
	forget((uintptr_t)memory, (uintptr_t)memory + 6 * PAGE);
	pthread_mutex_unlock(&engine.lock);
	aioummu_close(number);
	CHECK_EQUAL(count_registered(NULL, 0), 1);
	CHECK_EQUAL(registered_in(memory + 2 * PAGE, 2), 1);
	close(other);
}

static void the_limit_of_regions_is_enospc(void)
{
	const unsigned int limit = AIOUMMU_MAX_REGIONS;
	int number = open_notifier(NULL), other = open_notifier(NULL);
	char *memory = map(1);

	/* Registering a million takes a while. */
	find_notifier(number)->regions = limit - 1;
	must_watch(number, memory, 1, 0);
	CHECK_EQUAL(watch(number, memory, PAGE, 1), -ENOSPC);
	must_watch(other, memory, 1, limit);
	CHECK_EQUAL(aioummu_unregister(number, 0), 0);
	must_watch(number, memory, 1, 1);
	CHECK_EQUAL(watch(number, memory, PAGE, 2), -ENOSPC);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	must_end(number, 1);
	aioummu_close(number);
	must_report(other, limit, memory, 1, HINT);
	aioummu_close(other);
}

/* -------------------------------------------------------- mappings as a whole --- */

static unsigned int mappings_in(const char *memory, size_t pages)
{
	uint64_t at = (uintptr_t)memory, end = at + pages * PAGE;
	unsigned int count = 0;
	struct mapping mapping;

	while (!mapping_at_or_behind(&engine.mappings, at, &mapping) &&
	       mapping.start < end) {
		count++;
		at = mapping.end;
	}
	return count;
}

static void watching_a_part_leaves_the_mapping_whole(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(16);

	CHECK_EQUAL(watch(number, memory + 5 * PAGE + 100, 1, 1), 0);
	CHECK_EQUAL(mappings_in(memory, 16), 1);
	CHECK_EQUAL(registered_in(memory, 16), 1);
	close_with_a_copy(number);
	CHECK_EQUAL(registered_in(memory, 16), 0);
}

static void a_mapping_that_is_watched_in_part_can_grow(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(16), *larger;

	must_watch(number, memory + 4 * PAGE, 2, 1);
	larger = mremap(memory, 16 * PAGE, 17 * PAGE, 0);
	if (larger == MAP_FAILED) {
		CHECK_EQUAL(errno, ENOMEM);
		skip("somebody else has mapped what is behind");
	}
	CHECK_EQUAL(generation(number), 0);
	munmap(memory + 16 * PAGE, PAGE);
	CHECK_EQUAL(generation(number), 0);
	munmap(memory, 5 * PAGE);
	must_report(number, 1, memory + 4 * PAGE, 1, HINT);
	must_end(number, 1);
	close_with_a_copy(number);
}

static void a_mapping_that_is_watched_in_part_can_move(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(16), *target = map_alone(16);

	must_watch(number, memory + 4 * PAGE, 2, 1);
	CHECK(mremap(memory, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		     target) == target);
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	/* Moving, then unmapping what was there: two changes of the region. */
	CHECK(generation(number) >= 1);
	CHECK_EQUAL(read_records(number, 1), 1);
	CHECK_EQUAL(records[0].user_cookie_counter, 1);
	/* Registered with its new addresses, and released with them. */
	CHECK_EQUAL(registered_in(target, 16), 1);
	close_with_a_copy(number);
}

static void what_was_moved_can_be_watched_where_it_is(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(4), *target = map_alone(4);

	must_watch(number, memory, 4, 1);
	/* The target is watched as well: it goes away. */
	must_watch(number, target, 4, 2);
	CHECK(mremap(memory, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		     target) == target);
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	CHECK_EQUAL(aioummu_spent(number, 2), 1);
	CHECK_EQUAL(read_records(number, RECORDS), 3);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), -EFAULT);
	CHECK_EQUAL(aioummu_rearm(number, 2, &refusal), 0);
	CHECK_EQUAL(aioummu_spent(number, 2), 0);
	munmap(target + PAGE, PAGE);
	must_report(number, 2, target + PAGE, 1, HINT);
	close_with_a_copy(number);
}

static void a_source_that_stays_mapped_is_released(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(4), *target;

	must_watch(number, memory, 4, 1);
	target = mremap(memory, 4 * PAGE, 4 * PAGE,
			MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	if (target == MAP_FAILED)
		skip("no MREMAP_DONTUNMAP here");
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	must_report(number, 1, memory, 4, HINT);
	must_end(number, 1);
	close_with_a_copy(number);
}

/* mremap() of length 0 maps the same pages a second time. */
static void a_second_mapping_of_shared_memory_is_no_change(void)
{
	int number = open_notifier(NULL);
	char *memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0), *second;

	must_watch(number, memory, 4, 1);
	second = mremap(memory, 0, 4 * PAGE, MREMAP_MAYMOVE);
	CHECK(second != MAP_FAILED);
	must_be_silent(number);
	CHECK_EQUAL(generation(number), 0);
	CHECK_EQUAL(aioummu_spent(number, 1), 0);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	close_with_a_copy(number);
}

static void neighbours_that_merge_stay_watched(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(6);

	/* Three mappings: the middle one is different. */
	CHECK(!mprotect(memory + 2 * PAGE, 2 * PAGE, PROT_READ));
	must_watch(number, memory, 1, 1);
	must_watch(number, memory + 2 * PAGE, 1, 2);
	must_watch(number, memory + 4 * PAGE, 1, 3);
	CHECK_EQUAL(mappings_in(memory, 6), 3);
	CHECK(!mprotect(memory + 2 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE));
	CHECK_EQUAL(mappings_in(memory, 6), 1);
	/* What they have become is released when nobody needs any of it. */
	CHECK_EQUAL(aioummu_unregister(number, 1), 0);
	CHECK_EQUAL(aioummu_unregister(number, 2), 0);
	munmap(memory + 4 * PAGE, PAGE);
	must_report(number, 3, memory + 4 * PAGE, 1, HINT);
	must_end(number, 1);
	CHECK_EQUAL(aioummu_unregister(number, 3), 0);
	close_with_a_copy(number);
}

static void a_mapping_that_was_split_is_watched_in_all_parts(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(9);

	must_watch(number, memory, 9, 1);
	CHECK(!mprotect(memory + 3 * PAGE, 3 * PAGE, PROT_READ));
	CHECK_EQUAL(mappings_in(memory, 9), 3);
	must_watch(number, memory + 4 * PAGE, 1, 2);
	CHECK_EQUAL(mappings_in(memory, 9), 3);
	munmap(memory + 4 * PAGE, PAGE);
	must_report(number, 1, memory + 4 * PAGE, 1, HINT);
	must_report(number, 2, memory + 4 * PAGE, 1, HINT);
	must_end(number, 1);
	munmap(memory + 7 * PAGE, PAGE);
	must_report(number, 1, memory + 7 * PAGE, 1, HINT);
	must_end(number, 2);
	close_with_a_copy(number);
}

static void heap_that_grew_is_watched_once_registered(void)
{
	int number = open_notifier(NULL);
	char *old, *new;

	old = sbrk(0);
	CHECK(sbrk((PAGE - (uintptr_t)old % PAGE) % PAGE) == old);
	old = sbrk(8 * PAGE);
	CHECK(old != (char *)-1);
	must_watch(number, old + 2 * PAGE, 6, 1);
	new = sbrk(8 * PAGE);
	CHECK(new == old + 8 * PAGE);
	must_watch(number, new, 8, 2);
	sbrk(-(intptr_t)(4 * PAGE));
	must_report(number, 2, new + 4 * PAGE, 4, HINT);
	must_end(number, 1);
	sbrk(-(intptr_t)(10 * PAGE));
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	CHECK_EQUAL(read_records(number, RECORDS), 3);
	close_with_a_copy(number);
}

static void memory_mapped_again_is_watched_once_registered(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	must_watch(number, memory, 4, 1);
	for (uint64_t i = 0; i < 4 * IDLE_LIMIT; i++) {
		CHECK_EQUAL(aioummu_spent(number, 1), 0);
		munmap(memory, 4 * PAGE);
		CHECK_EQUAL(aioummu_spent(number, 1), 1);
		must_report(number, 1, memory, 4, HINT);
		must_end(number, i + 1);
		CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), -EFAULT);
		CHECK_EQUAL(refusal.start, (uintptr_t)memory);
		map_at(memory, 4);
		if (i % 2) {
			CHECK_EQUAL(aioummu_unregister(number, 1), 0);
			must_watch(number, memory, 4, 1);
		} else {
			CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), 0);
		}
	}
	close_with_a_copy(number);
}

static void a_spent_region_stays_so_until_it_is_rearmed(void)
{
	int number = open_notifier(NULL);
	char *memory = map(2);

	must_watch(number, memory, 2, 1);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	must_end(number, 1);
	map_at(memory, 1);
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	/* The other page never went. */
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	must_report(number, 1, memory + PAGE, 1, HINT);
	must_end(number, 2);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), 0);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), 0);
	CHECK_EQUAL(aioummu_spent(number, 1), 0);
	madvise(memory, PAGE, MADV_DONTNEED);
	must_report(number, 1, memory, 1, HINT);
	/* Its pages went, not its mapping. */
	CHECK_EQUAL(aioummu_spent(number, 1), 0);
	close_with_a_copy(number);
}

static int make_segment(void)
{
	int id = shmget(IPC_PRIVATE, 4 * PAGE, IPC_CREAT | 0600);

	if (id < 0)
		skip("no System V shared memory here");
	return id;
}

static char *attach(int id, void *at)
{
	char *memory = shmat(id, at, at ? SHM_REMAP : 0);

	CHECK(memory != (char *)-1);
	memset(memory, 1, 4 * PAGE);
	return memory;
}

/* The kernel sends no event for shmdt(), so the engine cannot know. */
static void what_follows_a_detached_segment_is_watched(void)
{
	int number = open_notifier(NULL), id = make_segment();
	char *memory = attach(id, NULL);
	int error = watch(number, memory, 4 * PAGE, 1);

	if (error) {
		shmctl(id, IPC_RMID, NULL);
		skip("segments cannot be watched here (Linux 6.7 can)");
	}
	shmdt(memory);
	map_at(memory, 4);
	must_watch(number, memory, 4, 2);
	munmap(memory + PAGE, PAGE);
	must_report(number, 1, memory + PAGE, 1, HINT);
	must_report(number, 2, memory + PAGE, 1, HINT);
	must_end(number, 1);
	shmctl(id, IPC_RMID, NULL);
	close_with_a_copy(number);
}

/* Of the same size, with the same segment: the mapping looks the same. */
static void a_segment_attached_again_is_watched_once_registered(void)
{
	int number = open_notifier(NULL), id = make_segment();
	char *memory = map_alone(4);

	must_watch(number, memory, 4, 1);
	CHECK_EQUAL(aioummu_unregister(number, 1), 0);
	for (unsigned int i = 0; i < 2; i++) {
		attach(id, memory);
		if (watch(number, memory, 4 * PAGE, 2 + i))
			skip("segments cannot be watched here (Linux 6.7 can)");
		munmap(memory, PAGE);
		must_report(number, 2 + i, memory, 1, HINT);
		must_end(number, i + 1);
		CHECK_EQUAL(aioummu_unregister(number, 2 + i), 0);
		map_at(memory, 4);
	}
	shmctl(id, IPC_RMID, NULL);
	close_with_a_copy(number);
}

/* ------------------------------------------------------------ lazy releasing --- */

static void idle_mappings_are_released_beyond_the_limit(void)
{
	int number = open_notifier(NULL);
	char *first = map(1), *last = NULL;

	must_watch(number, first, 1, 0);
	for (uint64_t i = 1; i <= 3 * IDLE_LIMIT; i++) {
		last = map(1);
		must_watch(number, last, 1, i);
		CHECK_EQUAL(registered_in(last, 1), 1);
		CHECK_EQUAL(aioummu_unregister(number, i), 0);
	}
	/* One is in use. */
	CHECK_EQUAL(count_registered(NULL, 0), IDLE_LIMIT + 1);
	CHECK_EQUAL(registered_in(first, 1), 1);
	CHECK_EQUAL(registered_in(last, 1), 1);
	munmap(first, PAGE);
	must_report(number, 0, first, 1, HINT);
	close_with_a_copy(number);
}

static char *growing;

static void grow(void)
{
	CHECK(mremap(growing, PAGE, 2 * PAGE, 0) == growing);
}

/*
 * Its first mapping is the one that has been idle for longest, and the second one
 * has to be registered again, which releases idle ones.
 */
static void what_is_being_registered_is_not_idle(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(4), *others = map(2 * IDLE_LIMIT);

	munmap(memory + 3 * PAGE, PAGE);
	CHECK(!mprotect(memory, PAGE, PROT_READ));
	munmap(memory + 2 * PAGE, PAGE);
	must_watch(number, memory, 1, 0);
	CHECK_EQUAL(aioummu_unregister(number, 0), 0);
	/* As many as there may be, each in a mapping of its own. */
	for (uint64_t i = 1; i < IDLE_LIMIT; i++) {
		CHECK(!mprotect(others + 2 * i * PAGE, PAGE, PROT_READ));
		must_watch(number, others + 2 * i * PAGE, 1, i);
	}
	for (uint64_t i = 1; i < IDLE_LIMIT; i++)
		CHECK_EQUAL(aioummu_unregister(number, i), 0);
	CHECK_EQUAL(engine.idle_count, IDLE_LIMIT);
	growing = memory + PAGE;
	/* Just before it is seen whether the second one has grown meanwhile. */
	change_at = (uintptr_t)growing + PAGE;
	change_behind = grow;
	must_watch(number, memory, 2, 1);
	CHECK(!change_behind);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	must_end(number, 1);
	close_with_a_copy(number);
}

static void an_idle_mapping_that_is_wanted_again_is_kept(void)
{
	int number = open_notifier(NULL);
	char *kept = map(2);

	must_watch(number, kept, 1, 0);
	CHECK_EQUAL(aioummu_unregister(number, 0), 0);
	must_watch(number, kept + PAGE, 1, 0);
	for (uint64_t i = 1; i <= 2 * IDLE_LIMIT; i++) {
		must_watch(number, map(1), 1, i);
		CHECK_EQUAL(aioummu_unregister(number, i), 0);
	}
	munmap(kept + PAGE, PAGE);
	must_report(number, 0, kept + PAGE, 1, HINT);
	close_with_a_copy(number);
}

static void another_notifier_keeps_a_mapping_registered(void)
{
	int number = open_notifier(NULL), other = open_notifier(NULL);
	char *memory = map(2);

	must_watch(number, memory, 1, 1);
	must_watch(other, memory + PAGE, 1, 1);
	aioummu_close(number);
	for (uint64_t i = 2; i <= 2 * IDLE_LIMIT; i++) {
		must_watch(other, map(1), 1, i);
		CHECK_EQUAL(aioummu_unregister(other, i), 0);
	}
	munmap(memory + PAGE, PAGE);
	must_report(other, 1, memory + PAGE, 1, HINT);
	close_with_a_copy(other);
}

static char *lonely_place(void)
{
	const size_t size = UINT64_C(1) << 32;
	char *gap = mmap(NULL, size, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	CHECK(gap != MAP_FAILED);
	munmap(gap, size);
	/* The kernel gives others the highest place that fits. */
	return gap + size / 4;
}

static _Atomic(char *) unwanted;

static void *unmap_unwanted(void *unused)
{
	char *memory;

	(void)unused;
	while (!(memory = atomic_load(&unwanted)))
		;
	munmap(memory, PAGE);
	return NULL;
}

#define LATE_ROUNDS	400

/* The event of an unmapping may be older than what is registered there by now. */
static void a_late_event_does_not_make_a_registration_forgotten(void)
{
	int number = open_notifier(NULL);
	char *memory = lonely_place();
	unsigned int known = 0;

	for (unsigned int i = 0; i < LATE_ROUNDS; i++) {
		pthread_t thread;
		int copy, other = open_notifier(NULL);

		map_at(memory, 1);
		must_watch(number, memory, 1, 1);
		atomic_store(&unwanted, NULL);
		thread = start_helper(unmap_unwanted, NULL);
		atomic_store(&unwanted, memory);
		while (mmap(memory, PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
			    0) == MAP_FAILED)
			;
		must_watch(other, memory, 1, 1);
		pthread_join(thread, NULL);
		CHECK_EQUAL(aioummu_spent(number, 1), 1);
		CHECK_EQUAL(aioummu_unregister(number, 1), 0);
		if (i % 2) {
			/* Whatever is thought of it, it is watched. */
			uint64_t before = generation(other);

			munmap(memory, PAGE);
			CHECK_EQUAL(generation(other), before + 1);
			aioummu_close(other);
			known++;
			continue;
		}
		aioummu_close(other);
		copy = fcntl(engine.userfaultfd.fd, F_DUPFD_CLOEXEC, 0);
		aioummu_close(number);
		CHECK_EQUAL(count_registered(NULL, 0), 0);
		close(copy);
		munmap(memory, PAGE);
		number = open_notifier(NULL);
	}
	CHECK_EQUAL(known, LATE_ROUNDS / 2);
	aioummu_close(number);
}

/* ------------------------------------------------------------ rare conditions --- */

#define PAGES_TO_OVERRUN	(4 * AIOUMMU_RING_SIZE)

/**
 * struct unmapping - pages that a thread unmaps, one by one
 * @memory:	the first
 * @count:	how many
 */
struct unmapping {
	char	*memory;
	size_t	count;
};

static void *unmap_pages(void *argument)
{
	const struct unmapping *unmapping = argument;

	for (size_t i = 0; i < unmapping->count; i++)
		munmap(unmapping->memory + i * PAGE, PAGE);
	return NULL;
}

/* While the lock is held: the engine's thread must go on reading all the same. */
static void unmap_behind_the_lock(char *memory, size_t count)
{
	struct unmapping unmapping = { memory, count };
	pthread_t thread;

	pthread_mutex_lock(&engine.lock);
	thread = start_helper(unmap_pages, &unmapping);
	pthread_join(thread, NULL);
	pthread_mutex_unlock(&engine.lock);
}

static void whoever_has_the_lock_reports_what_came_meanwhile(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(1);
	struct unmapping unmapping = { memory, 1 };

	must_watch(number, memory, 1, 1);
	pthread_mutex_lock(&engine.lock);
	pthread_join(start_helper(unmap_pages, &unmapping), NULL);
	/* The thread has been here, and could do no more. */
	while (ring_is_empty() || !atomic_load(&engine.finished))
		sched_yield();
	nanosleep(&(struct timespec) { .tv_nsec = 1000000 }, NULL);
	CHECK(!rings(doorbell));
	let_go();
	/* If it was the thread that got the lock, then it has done so, too. */
	pthread_mutex_lock(&engine.lock);
	CHECK(ring_is_empty());
	pthread_mutex_unlock(&engine.lock);
	CHECK(rings(doorbell));
	must_report(number, 1, memory, 1, HINT);
	close_with_a_copy(number);
}

static void a_full_ring_loses_nothing(void)
{
	int number = open_notifier(NULL);
	char *memory = map(AIOUMMU_RING_SIZE);

	for (uint64_t i = 0; i < AIOUMMU_RING_SIZE; i++)
		must_watch(number, memory + i * PAGE, 1, i);
	unmap_behind_the_lock(memory, AIOUMMU_RING_SIZE);
	CHECK(!atomic_load(&engine.overrun));
	for (uint64_t i = 0; i < AIOUMMU_RING_SIZE; i++)
		must_report(number, i, memory + i * PAGE, 1, HINT);
	must_end(number, AIOUMMU_RING_SIZE);
	close_with_a_copy(number);
}

static void an_overrun_reports_everything(void)
{
	int doorbell, number = open_notifier(NULL), other = open_notifier(&doorbell);
	char *memory = map(PAGES_TO_OVERRUN), *elsewhere = map(1);

	for (uint64_t i = 0; i < PAGES_TO_OVERRUN; i++)
		must_watch(number, memory + i * PAGE, 1, i);
	must_watch(other, elsewhere, 1, 1);
	unmap_behind_the_lock(memory, PAGES_TO_OVERRUN);
	CHECK(atomic_load(&engine.overrun));
	CHECK(generation(number) > AIOUMMU_RING_SIZE);
	for (uint64_t i = 0; i < PAGES_TO_OVERRUN; i++) {
		/* What was lost is not exact, and neither is anything else. */
		must_report(number, i, memory + i * PAGE, 1, 0);
		CHECK_EQUAL(aioummu_spent(number, i), 1);
	}
	CHECK_EQUAL(read_records(number, RECORDS), 1);
	CHECK_EQUAL(records[0].user_cookie_counter, generation(number));
	/* Nobody knows that nothing has happened here. */
	CHECK(rings(doorbell));
	CHECK_EQUAL(aioummu_spent(other, 1), 1);
	must_report(other, 1, elsewhere, 1, 0);
	must_end(other, generation(other));
	aioummu_close(number);
	close_with_a_copy(other);
}

static void after_an_overrun_everything_can_be_watched_again(void)
{
	int number = open_notifier(NULL);
	char *memory = map(PAGES_TO_OVERRUN), *elsewhere = map(2);

	must_watch(number, memory, PAGES_TO_OVERRUN, 1);
	must_watch(number, elsewhere, 1, 2);
	unmap_behind_the_lock(memory, PAGES_TO_OVERRUN);
	CHECK(atomic_load(&engine.overrun));
	CHECK_EQUAL(read_records(number, RECORDS), 3);
	/* It never went: even without rearming, nothing is lost. */
	madvise(elsewhere, PAGE, MADV_DONTNEED);
	must_report(number, 2, elsewhere, 1, HINT);
	CHECK_EQUAL(aioummu_rearm(number, 2, &refusal), 0);
	CHECK_EQUAL(aioummu_spent(number, 2), 0);
	munmap(elsewhere, PAGE);
	must_report(number, 2, elsewhere, 1, HINT);
	CHECK_EQUAL(aioummu_spent(number, 2), 1);
	close_with_a_copy(number);
}

static void after_an_overrun_what_was_moved_is_released(void)
{
	int number = open_notifier(NULL);
	char *memory = map(PAGES_TO_OVERRUN), *moved = map(2), *target = map_alone(2);
	struct unmapping unmapping = { memory, PAGES_TO_OVERRUN };
	pthread_t thread;

	must_watch(number, memory, PAGES_TO_OVERRUN, 1);
	must_watch(number, moved, 2, 2);
	pthread_mutex_lock(&engine.lock);
	thread = start_helper(unmap_pages, &unmapping);
	pthread_join(thread, NULL);
	/* Its event does not find room any more. */
	CHECK(mremap(moved, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		     target) == target);
	CHECK(atomic_load(&engine.overrun));
	pthread_mutex_unlock(&engine.lock);
	CHECK_EQUAL(aioummu_spent(number, 2), 1);
	CHECK_EQUAL(registered_in(target, 2), 1);
	close_with_a_copy(number);
	CHECK_EQUAL(registered_in(target, 2), 0);
}

/* Takes everything out of a pool, and memory for more cannot be had. */
static void exhaust(struct pool *pool)
{
	struct rlimit limit = { 0, RLIM_INFINITY };

	pthread_mutex_lock(&engine.lock);
	while (pool_take(pool))
		;
	pthread_mutex_unlock(&engine.lock);
	CHECK(!setrlimit(RLIMIT_AS, &limit));
}

static void lift_limit(void)
{
	struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };

	CHECK(!setrlimit(RLIMIT_AS, &limit));
}

static void mappings_that_cannot_be_remembered_are_released(void)
{
	int number = open_notifier(NULL);
	char *memory = map(9);

	if (SANITIZED)
		skip("a sanitizer needs more address space");
	must_watch(number, memory, 9, 1);
	exhaust(&engine.cover_pool);
	/* Each cuts a mapping in two, but there is no room for one more. */
	munmap(memory + 2 * PAGE, PAGE);
	munmap(memory + 4 * PAGE, PAGE);
	munmap(memory + 6 * PAGE, PAGE);
	CHECK_EQUAL(generation(number), 3);
	CHECK(engine.forgotten_start < engine.forgotten_end);
	lift_limit();
	must_report(number, 1, memory, 9, 0);
	must_end(number, 3);
	/* Forgotten, but watched. */
	munmap(memory + 8 * PAGE, PAGE);
	must_report(number, 1, memory + 8 * PAGE, 1, HINT);
	close_with_a_copy(number);
}

static void without_memory_registering_is_refused(void)
{
	int number = open_notifier(NULL);
	char *memory = map(2), *more = map(1);

	if (SANITIZED)
		skip("a sanitizer needs more address space");
	must_watch(number, memory, 1, 1);
	exhaust(&engine.region_pool);
	CHECK_EQUAL(watch(number, memory, PAGE, 2), -ENOMEM);
	lift_limit();
	must_watch(number, memory, 1, 2);
	exhaust(&engine.cover_pool);
	CHECK_EQUAL(watch(number, more, PAGE, 3), -ENOMEM);
	lift_limit();
	must_watch(number, more, 1, 3);
	munmap(memory, PAGE);
	CHECK_EQUAL(read_records(number, RECORDS), 3);
	close_with_a_copy(number);
}

static void regions_far_beyond_a_batch_are_closed(void)
{
	int number = open_notifier(NULL), other = open_notifier(NULL);
	char *memory = map(1);

	for (uint64_t i = 0; i < 10 * CLOSE_BATCH + 1; i++)
		must_watch(number, memory, 1, i);
	must_watch(other, memory, 1, 1);
	munmap(memory, PAGE);
	CHECK_EQUAL(read_records(number, 10), 10);
	aioummu_close(number);
	must_report(other, 1, memory, 1, HINT);
	must_end(other, 1);
	CHECK(!engine.regions->left && !engine.regions->right);
	close_with_a_copy(other);
}

static size_t open_descriptors_now(void)
{
	size_t count = 0;

	for (int fd = 0; fd < 256; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void starting_and_stopping_leaks_nothing(void)
{
	int number = open_notifier(NULL);
	size_t descriptors, rounds = SANITIZED ? 50 : 300;
	unsigned int mappings_before = 0, mappings_after;
	char *memory = map(1);
	struct mappings own;

	CHECK_EQUAL(mappings_open(&own), 0);
	aioummu_close(number);
	descriptors = open_descriptors_now();
	for (size_t i = 0; i < rounds; i++) {
		number = open_notifier(NULL);
		must_watch(number, memory, 1, 1);
		madvise(memory, PAGE, MADV_DONTNEED);
		must_report(number, 1, memory, 1, HINT);
		aioummu_close(number);
		/* The first round may have made a few for good. */
		if (i == 1 || i == rounds - 1) {
			uint64_t at = 0;
			struct mapping mapping;

			mappings_after = 0;
			while (!mapping_at_or_behind(&own, at, &mapping) &&
			       mapping.end > at) {
				at = mapping.end;
				mappings_after++;
			}
			if (i == 1)
				mappings_before = mappings_after;
		}
	}
	CHECK_EQUAL(open_descriptors_now(), descriptors);
	/* The sanitizers' own come and go. */
	if (!SANITIZED)
		CHECK_EQUAL(mappings_after, mappings_before);
}

/* The engine's random numbers are good enough for balanced trees. */
static unsigned int depth_of(const struct range *range)
{
	unsigned int left, right;

	if (!range)
		return 0;
	left = depth_of(range->left);
	right = depth_of(range->right);
	return 1 + (left > right ? left : right);
}

static void the_trees_stay_shallow(void)
{
	const uint64_t count = SANITIZED ? 2000 : 100000;
	int number = open_notifier(NULL);
	char *memory = map(1);
	unsigned int by_address, by_cookie;

	for (uint64_t i = 0; i < count; i++)
		CHECK_EQUAL(watch(number, memory + i % PAGE, PAGE - i % PAGE, i), 0);
	by_address = depth_of(engine.regions);
	by_cookie = depth_of(find_notifier(number)->cookies);
	note("%" PRIu64 " regions: depth %u by address, %u by cookie", count,
	     by_address, by_cookie);
	CHECK(by_address < 90);
	CHECK(by_cookie < 90);
	aioummu_close(number);
}

/* ------------------------------------------------------------------- hangs --- */

static char *for_the_handler;

static void unmap_in_handler(int signal)
{
	(void)signal;
	munmap(for_the_handler, PAGE);
}

/* Nobody else takes it, so the engine's thread would, if it took any. */
static void the_engines_thread_takes_no_signals(void)
{
	int number = open_notifier(NULL);
	struct sigaction action = { .sa_handler = unmap_in_handler };
	sigset_t signals, pending;
	char *memory;

	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	sigaction(SIGUSR1, &action, NULL);
	aioummu_close(number);
	pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
	/* Its thread is made by one that blocks nothing. */
	number = open_notifier(NULL);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	for_the_handler = map(1);
	memory = map(1);
	must_watch(number, for_the_handler, 1, 1);
	must_watch(number, memory, 1, 2);
	kill(getpid(), SIGUSR1);
	/* It has read this one, so it has run since. */
	munmap(memory, PAGE);
	sigpending(&pending);
	CHECK(sigismember(&pending, SIGUSR1));
	CHECK_EQUAL(generation(number), 1);
	pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
	CHECK_EQUAL(generation(number), 2);
	close_with_a_copy(number);
}

static atomic_bool enough;

/* Does not look at the engine at all. */
static void *change_mappings(void *unused)
{
	(void)unused;
	while (!atomic_load(&enough)) {
		char *memory = map(4);

		madvise(memory, 2 * PAGE, MADV_DONTNEED);
		mremap(memory, 4 * PAGE, 3 * PAGE, 0);
		/* Not what lies between: that can be somebody else's by now. */
		munmap(memory - PAGE, 4 * PAGE);
		munmap(memory + 4 * PAGE, PAGE);
	}
	return NULL;
}

static void *change_one_mapping(void *argument)
{
	while (!atomic_load(&enough))
		madvise(argument, PAGE, MADV_DONTNEED);
	return NULL;
}

#ifdef __SANITIZE_THREAD__
/* Each takes half a second there. */
#define CLOSING_ROUNDS	40
#else
#define CLOSING_ROUNDS	200
#endif

static void closing_while_others_change_mappings_ends(void)
{
	char *memory = map(2);
	pthread_t threads[4];

	for (unsigned int i = 0; i < 4; i++)
		threads[i] = i % 2 ? start_helper(change_mappings, NULL) :
				     start_helper(change_one_mapping, memory);
	for (uint64_t i = 0; i < CLOSING_ROUNDS; i++) {
		int number = open_notifier(NULL);

		must_watch(number, memory, 1 + i % 2, i);
		generation(number);
		/* Its answer does not matter here, only that there is one. */
		aioummu_fence();
		close_with_a_copy(number);
	}
	atomic_store(&enough, true);
	for (unsigned int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
}

/* Like fork(), but the C library does not know, nor do handlers of pthread_atfork. */
static pid_t make_raw_child(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

static void must_exit(pid_t child, int wanted)
{
	int status;

	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status));
	CHECK_EQUAL(WEXITSTATUS(status), wanted);
}

static void a_child_with_a_copy_does_not_keep_anything_registered(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);
	pid_t child;

	must_watch(number, memory, 2, 1);
	must_watch(number, memory + 2 * PAGE, 2, 2);
	munmap(memory, PAGE);
	child = make_raw_child();
	CHECK(child >= 0);
	if (!child) {
		syscall(SYS_pause);
		syscall(SYS_exit_group, 0);
	}
	aioummu_close(number);
	CHECK_EQUAL(count_registered(NULL, 0), 0);
	/* Would sleep for ever. */
	munmap(memory, 4 * PAGE);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

static void a_raw_child_is_told_that_it_is_a_copy(void)
{
	int number = open_notifier(NULL), doorbell[2];
	pid_t child = make_raw_child();
	uint64_t value;

	if (SANITIZED)
		skip("a sanitizer does not survive this");
	if (!child) {
		int result = 1;

		if (aioummu_generation(number, &value) == -EOWNERDEAD &&
		    aioummu_fence() == -EOWNERDEAD &&
		    aioummu_open(doorbell) == -EOWNERDEAD &&
		    aioummu_read(number, records, 32) == -EOWNERDEAD &&
		    aioummu_register(number, 0, 1, 1, 0, false,
				     &refusal) == -EOWNERDEAD &&
		    aioummu_unregister(number, 1) == -EOWNERDEAD &&
		    !*aioummu_activity())
			result = 42;
		aioummu_close(number);
		syscall(SYS_exit_group, result);
	}
	must_exit(child, 42);
	CHECK_EQUAL(generation(number), 0);
	aioummu_close(number);
}

static void run_child_of_a_watched_process(int number, char *memory)
{
	uint64_t value;
	int own;

	CHECK_EQUAL(aioummu_generation(number, &value), -EBADF);
	CHECK_EQUAL(*aioummu_activity(), 1);
	munmap(memory, PAGE);
#ifdef __SANITIZE_THREAD__
	note("the thread sanitizer allows no threads in children like this");
	return;
#endif
	/* It can watch its own memory, which is nobody else's business. */
	own = open_notifier(NULL);
	must_watch(own, memory + PAGE, 1, 1);
	munmap(memory + PAGE, PAGE);
	must_report(own, 1, memory + PAGE, 1, HINT);
	must_end(own, 1);
	close_with_a_copy(own);
}

static void a_forked_child_has_no_watch_and_can_make_one(void)
{
	int number = open_notifier(NULL);
	char *memory = map(3);
	pid_t child;

	must_watch(number, memory, 3, 1);
	madvise(memory, PAGE, MADV_DONTNEED);
	child = fork();
	if (!child) {
		run_child_of_a_watched_process(number, memory);
		_exit(42);
	}
	must_exit(child, 42);
	must_report(number, 1, memory, 1, HINT);
	must_end(number, 1);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	close_with_a_copy(number);
}

static void descriptors_closed_behind_its_back_hang_nobody(void)
{
	int number = open_notifier(NULL), innocent[64];
	char *memory = map(4);

	must_watch(number, memory, 4, 1);
	/* Behind a sanitizer's back as well: this is a race, on purpose. */
	for (int fd = 3; fd < 256; fd++)
		syscall(SYS_close, fd);
	/* Files that get the numbers. */
	for (unsigned int i = 0; i < 64; i++) {
		innocent[i] = memfd_create("innocent", MFD_CLOEXEC);
		CHECK(innocent[i] >= 0);
	}
	munmap(memory, PAGE);
	/* The kernel lets the others go on before the thread can notice. */
	while (!atomic_load(&engine.dead))
		sched_yield();
	CHECK(generation(number) >= 1);
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	must_report(number, 1, memory, 4, 0);
	CHECK_EQUAL(watch(number, memory + PAGE, PAGE, 2), -ENOTRECOVERABLE);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), -ENOTRECOVERABLE);
	aioummu_close(number);
	for (unsigned int i = 0; i < 64; i++) {
		struct stat status;

		CHECK(!fstat(innocent[i], &status));
		CHECK_EQUAL(status.st_size, 0);
	}
	munmap(memory + PAGE, PAGE);
	number = open_notifier(NULL);
	must_watch(number, memory + 2 * PAGE, 1, 1);
	munmap(memory + 2 * PAGE, PAGE);
	must_report(number, 1, memory + 2 * PAGE, 1, HINT);
	close_with_a_copy(number);
}

static void a_limit_of_no_descriptors_hangs_nobody(void)
{
	int number = open_notifier(NULL);
	struct rlimit limit, none;
	char *memory = map(3);

	must_watch(number, memory, 3, 1);
	CHECK(!getrlimit(RLIMIT_NOFILE, &limit));
	none = limit;
	none.rlim_cur = 0;
	CHECK(!setrlimit(RLIMIT_NOFILE, &none));
	for (uint64_t i = 0; i < 3; i++) {
		munmap(memory + i * PAGE, PAGE);
		must_report(number, 1, memory + i * PAGE, 1, HINT);
		must_end(number, i + 1);
	}
	aioummu_close(number);
	/* A search for leaks opens files. */
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
}

/* -------------------------------------------------- filters and one-shot regions --- */

#define UNMAP	UMMUNOTIFY_EVENT_CAUSE_UNMAP
#define MOVE	UMMUNOTIFY_EVENT_CAUSE_MOVE
#define CLEAR	UMMUNOTIFY_EVENT_CAUSE_CLEAR
#define BUSY	UMMUNOTIFY_STATE_BUSY

static int watch_for(int number, const void *memory, size_t pages,
		     uint64_t cookie, uint32_t wanted)
{
	uint64_t start = (uintptr_t)memory;

	return aioummu_register(number, start, start + pages * PAGE, cookie, wanted,
				false, &refusal);
}

static void watch_once(int number, const void *memory, size_t pages,
		       uint64_t cookie)
{
	uint64_t start = (uintptr_t)memory;

	CHECK_EQUAL(aioummu_register(number, start, start + pages * PAGE, cookie, 0,
				     true, &refusal), 0);
}

static uint64_t state(int number, uint64_t cookie)
{
	uint64_t value = 0;

	CHECK_EQUAL(aioummu_state(number, cookie, &value), 0);
	return value;
}

/* Other threads, be they a sanitizer's, may be looked at in a bad moment. */
static uint64_t calm_state(int number, uint64_t cookie)
{
	uint64_t value;

	while ((value = state(number, cookie)) & BUSY)
		sched_yield();
	return value;
}

static void drop(char *memory, size_t pages)
{
	CHECK(!madvise(memory, pages * PAGE, MADV_DONTNEED));
}

static void what_was_not_asked_for_is_not_reported(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(4);

	CHECK_EQUAL(watch_for(number, memory, 4, 1, UNMAP), 0);
	drop(memory, 4);
	CHECK_EQUAL(generation(number), 0);
	CHECK(!rings(doorbell));
	must_be_silent(number);
	CHECK_EQUAL(state(number, 1), 0);
	munmap(memory, PAGE);
	CHECK_EQUAL(generation(number), 1);
	must_report(number, 1, memory, 1, HINT);
	CHECK_EQUAL(records[0].flags, HINT | UNMAP);
	must_end(number, 1);
	aioummu_close(number);
}

static void what_asks_for_nothing_special_is_told_everything(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	CHECK_EQUAL(watch_for(number, memory, 4, 1, 0), 0);
	CHECK_EQUAL(watch_for(number, memory, 4, 2, UMMUNOTIFY_REGION_CAUSE_MASK), 0);
	drop(memory, 1);
	must_report(number, 1, memory, 1, HINT);
	must_report(number, 2, memory, 1, HINT);
	munmap(memory, PAGE);
	must_report(number, 1, memory, 1, HINT);
	must_report(number, 2, memory, 1, HINT);
	must_end(number, 2);
	aioummu_close(number);
}

/* The driver cannot tell the one from the other. */
static void who_asks_for_moves_is_told_of_unmapping_and_the_reverse(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(4), *target = map_alone(4), *other = map(4);

	CHECK_EQUAL(watch_for(number, memory, 4, 1, UNMAP), 0);
	CHECK_EQUAL(watch_for(number, other, 4, 2, MOVE), 0);
	munmap(other, PAGE);
	must_report(number, 2, other, 1, HINT);
	must_end(number, 1);
	CHECK(mremap(memory, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		     target) == target);
	CHECK_EQUAL(read_records(number, 1), 1);
	CHECK_EQUAL(records[0].user_cookie_counter, 1);
	CHECK(records[0].flags & MOVE);
	close_with_a_copy(number);
}

static void a_filter_hides_a_change_from_its_own_region_only(void)
{
	int number = open_notifier(NULL), other = open_notifier(NULL);
	char *memory = map(2);

	CHECK_EQUAL(watch_for(number, memory, 2, 1, UNMAP), 0);
	CHECK_EQUAL(watch_for(number, memory, 2, 2, CLEAR), 0);
	CHECK_EQUAL(watch_for(other, memory, 2, 1, UNMAP), 0);
	drop(memory, 1);
	CHECK_EQUAL(generation(number), 1);
	CHECK_EQUAL(generation(other), 0);
	must_report(number, 2, memory, 1, HINT);
	must_end(number, 1);
	/* What it did not ask for does not blur its report either. */
	munmap(memory, PAGE);
	drop(memory + PAGE, 1);
	must_report(number, 1, memory, 1, HINT);
	CHECK_EQUAL(records[0].flags, HINT | UNMAP);
	must_report(number, 2, memory + PAGE, 1, HINT);
	CHECK_EQUAL(records[0].flags, HINT | CLEAR);
	aioummu_close(number);
	aioummu_close(other);
}

static void causes_that_nobody_can_ask_for_are_refused(void)
{
	int number = open_notifier(NULL);
	char *memory = map(1);

	CHECK_EQUAL(watch_for(number, memory, 1, 1,
			      CLEAR | UMMUNOTIFY_EVENT_CAUSE_FOREIGN), -ERANGE);
	CHECK_EQUAL(watch_for(number, memory, 1, 1, HINT), -ERANGE);
	CHECK_EQUAL(aioummu_unregister(number, 1), -ENOENT);
	aioummu_close(number);
}

static void an_unmapping_that_nobody_asked_for_spends_the_region(void)
{
	int doorbell, number = open_notifier(&doorbell);
	char *memory = map(4);

	CHECK_EQUAL(watch_for(number, memory, 4, 1, CLEAR), 0);
	munmap(memory, PAGE);
	CHECK_EQUAL(aioummu_spent(number, 1), 1);
	CHECK_EQUAL(generation(number), 0);
	CHECK(!rings(doorbell));
	must_be_silent(number);
	/* What is mapped there now is not watched, which the state has to say. */
	CHECK_EQUAL(state(number, 1), 2 | BUSY);
	map_at(memory, 1);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), 0);
	CHECK_EQUAL(state(number, 1), 2);
	drop(memory, 1);
	must_report(number, 1, memory, 1, HINT);
	must_end(number, 1);
	aioummu_close(number);
}

static void a_region_for_once_ends_with_its_report(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(4);

	watch_once(number, memory, 4, 1);
	must_be_silent(number);
	/* Until then it coalesces. */
	drop(memory, 1);
	drop(memory + 2 * PAGE, 1);
	CHECK_EQUAL(aioummu_spent(number, 1), 0);
	must_report(number, 1, memory, 4, 0);
	CHECK_EQUAL(aioummu_unregister(number, 1), -ENOENT);
	must_end(number, 2);
	drop(memory, 1);
	must_be_silent(number);
	CHECK_EQUAL(generation(number), 2);
	/* The cookie is free. */
	must_watch(number, memory, 4, 1);
	drop(memory, 1);
	must_report(number, 1, memory, 1, HINT);
	must_end(number, 3);
	CHECK_EQUAL(aioummu_unregister(number, 1), 0);
	close_with_a_copy(number);
}

static void what_was_not_read_is_still_registered(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	for (uint64_t i = 0; i < 4; i++)
		watch_once(number, memory + i * PAGE, 1, i);
	drop(memory, 3);
	CHECK_EQUAL(read_records(number, 2), 2);
	CHECK_EQUAL(aioummu_spent(number, 0), -ENOENT);
	CHECK_EQUAL(aioummu_spent(number, 1), -ENOENT);
	CHECK_EQUAL(aioummu_spent(number, 2), 0);
	CHECK_EQUAL(aioummu_spent(number, 3), 0);
	/* Unregistering drops the report, for once or not. */
	CHECK_EQUAL(aioummu_unregister(number, 2), 0);
	must_end(number, 1);
	drop(memory + 3 * PAGE, 1);
	must_report(number, 3, memory + 3 * PAGE, 1, HINT);
	must_end(number, 2);
	CHECK_EQUAL(find_notifier(number)->regions, 0);
	aioummu_close(number);
}

/* ---------------------------------------------------------------------- states --- */

static void a_state_counts_what_is_done_to_its_region(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	must_watch(number, memory, 2, 1);
	must_watch(number, memory + 2 * PAGE, 2, 2);
	CHECK_EQUAL(state(number, 1), 0);
	drop(memory, 1);
	CHECK_EQUAL(calm_state(number, 1), 2);
	drop(memory + PAGE, 2);
	CHECK_EQUAL(calm_state(number, 1), 4);
	CHECK_EQUAL(calm_state(number, 2), 2);
	/* Reading and arming take nothing back. */
	CHECK_EQUAL(read_records(number, RECORDS), 3);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), 0);
	CHECK_EQUAL(calm_state(number, 1), 4);
	CHECK_EQUAL(aioummu_state(number, 3, &(uint64_t){ 0 }), -ENOENT);
	CHECK_EQUAL(aioummu_state(number + 1, 1, &(uint64_t){ 0 }), -EBADF);
	aioummu_close(number);
}

static void a_spent_region_is_busy_until_it_is_rearmed(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	must_watch(number, memory, 4, 1);
	munmap(memory, PAGE);
	CHECK_EQUAL(state(number, 1), 2 | BUSY);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), -EFAULT);
	CHECK_EQUAL(state(number, 1), 2 | BUSY);
	map_at(memory, 1);
	CHECK_EQUAL(state(number, 1), 2 | BUSY);
	CHECK_EQUAL(aioummu_rearm(number, 1, &refusal), 0);
	/* Not what it was before: nobody knows what was there meanwhile. */
	CHECK_EQUAL(state(number, 1), 2);
	aioummu_close(number);
}

static void a_drop_of_the_callers_own_is_over_at_once(void)
{
	int number = open_notifier(NULL);
	char *memory = map(4);

	if (SANITIZED)
		skip("there may be another thread");
	must_watch(number, memory, 4, 1);
	for (uint64_t i = 1; i <= 100; i++) {
		drop(memory, 4);
		CHECK_EQUAL(state(number, 1), 2 * i);
		CHECK(!engine.drops);
	}
	aioummu_close(number);
}

static void *spin(void *stop)
{
	while (!atomic_load((atomic_bool *)stop))
		;
	return NULL;
}

static void a_thread_that_never_sleeps_does_not_keep_it_busy(void)
{
	int number = open_notifier(NULL);
	char *memory = map(1);
	atomic_bool stop = false;
	pthread_t thread;

#if !defined(__x86_64__) && !defined(__i386__) && !defined(__aarch64__)
	skip("how long a thread was in user mode is not known exactly here");
#endif
	thread = start_helper(spin, &stop);
	must_watch(number, memory, 1, 1);
	for (uint64_t i = 1; i <= 3; i++) {
		drop(memory, 1);
		CHECK_EQUAL(calm_state(number, 1), 2 * i);
	}
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	aioummu_close(number);
}

#define LONG_DROP	32768

static void *drop_for_long(void *memory)
{
	drop(memory, LONG_DROP);
	return NULL;
}

/* The time that it runs in the kernel says nothing. */
static void a_drop_that_never_sleeps_is_not_over(void)
{
	int number = open_notifier(NULL);
	char *memory = map_alone(LONG_DROP), *last = memory + (LONG_DROP - 1) * PAGE;
	bool was_there = false;
	uint64_t before = 0;
	pthread_t thread;

	CHECK(!madvise(memory, LONG_DROP * PAGE, MADV_NOHUGEPAGE));
	drop(memory, LONG_DROP);
	memset(memory, 1, LONG_DROP * PAGE);
	must_watch(number, last, 1, 1);
	thread = start_helper(drop_for_long, memory);
	while (!generation(number))
		;
	while (!was_there && *(volatile char *)last) {
		before = state(number, 1);
		was_there = !(before & BUSY) && *(volatile char *)last;
	}
	pthread_join(thread, NULL);
	CHECK_EQUAL(*last, 0);
	CHECK(!was_there || state(number, 1) != before);
	CHECK_EQUAL(calm_state(number, 1), 2);
	aioummu_close(number);
}

/**
 * struct stuck - a thread that has told of a drop, and cannot go on with it
 * @number:	a notifier; region 0 has the memory
 * @memory:	of a file, two pages
 * @file:	that file, which a writer holds
 * @faults:	a userfaultfd, for which the writer waits
 * @page:	where it waits
 * @writer:	its thread
 * @dropper:	the thread that drops the memory
 * @returned:	that has returned
 */
struct stuck {
	int		number;
	char		*memory;
	int		file;
	int		faults;
	char		*page;
	pthread_t	writer;
	pthread_t	dropper;
	atomic_bool	returned;
};

static void *write_what_is_not_there(void *argument)
{
	struct stuck *stuck = argument;

	CHECK_EQUAL(write(stuck->file, stuck->page, 1), 1);
	return NULL;
}

static void *punch(void *argument)
{
	struct stuck *stuck = argument;

	CHECK(!madvise(stuck->memory, 2 * PAGE, MADV_REMOVE));
	atomic_store(&stuck->returned, true);
	return NULL;
}

/* The write() holds the file's lock, which the drop of its pages wants then. */
static void hold_file(struct stuck *stuck)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register argument = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct pollfd polled = { .events = POLLIN };

	stuck->faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (stuck->faults < 0)
		skip("faults in the kernel cannot be held here");
	CHECK(!ioctl(stuck->faults, UFFDIO_API, &api));
	stuck->page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	argument.range.start = (uintptr_t)stuck->page;
	argument.range.len = PAGE;
	CHECK(!ioctl(stuck->faults, UFFDIO_REGISTER, &argument));
	stuck->writer = start_helper(write_what_is_not_there, stuck);
	polled.fd = stuck->faults;
	CHECK_EQUAL(poll(&polled, 1, -1), 1);
}

static void get_stuck(struct stuck *stuck, void *(*run)(void *))
{
	stuck->number = open_notifier(NULL);
	stuck->file = memfd_create("stuck", MFD_CLOEXEC);
	CHECK(!ftruncate(stuck->file, 2 * PAGE));
	stuck->memory = map_alone(2);
	CHECK(mmap(stuck->memory, 2 * PAGE, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_FIXED, stuck->file, 0) == stuck->memory);
	memset(stuck->memory, 1, 2 * PAGE);
	must_watch(stuck->number, stuck->memory, 2, 0);
	atomic_store(&stuck->returned, false);
	hold_file(stuck);
	stuck->dropper = start_helper(run, stuck);
	while (!generation(stuck->number))
		sched_yield();
	must_report(stuck->number, 0, stuck->memory, 2, HINT);
	must_end(stuck->number, 1);
}

static void get_loose(struct stuck *stuck)
{
	struct uffdio_zeropage nothing = {
		.range = { (uintptr_t)stuck->page, PAGE },
	};

	CHECK(!atomic_load(&stuck->returned));
	CHECK(!ioctl(stuck->faults, UFFDIO_ZEROPAGE, &nothing));
	pthread_join(stuck->writer, NULL);
	pthread_join(stuck->dropper, NULL);
	close(stuck->faults);
	close(stuck->file);
}

/* For long enough that everybody else is looked at more than once. */
static void must_stay_busy(int number, uint64_t cookie)
{
	struct timespec delay = { .tv_nsec = 1000000 };

	for (unsigned int i = 0; i < 50; i++) {
		CHECK(state(number, cookie) & BUSY);
		nanosleep(&delay, NULL);
	}
}

static void a_region_registered_in_a_drop_is_busy_until_that_is_over(void)
{
	struct stuck stuck;

	get_stuck(&stuck, punch);
	must_watch(stuck.number, stuck.memory + PAGE, 1, 1);
	CHECK_EQUAL(watch_for(stuck.number, stuck.memory, 2, 2, UNMAP), 0);
	must_stay_busy(stuck.number, 1);
	/* No page of which goes. */
	CHECK_EQUAL(state(stuck.number, 2), 0);
	CHECK_EQUAL(stuck.memory[PAGE], 1);
	get_loose(&stuck);
	CHECK_EQUAL(calm_state(stuck.number, 1), 0);
	CHECK_EQUAL(stuck.memory[PAGE], 0);
	CHECK_EQUAL(generation(stuck.number), 1);
	close_with_a_copy(stuck.number);
}

static void rearming_in_a_drop_does_not_end_it(void)
{
	struct stuck stuck;

	get_stuck(&stuck, punch);
	must_stay_busy(stuck.number, 0);
	CHECK_EQUAL(aioummu_rearm(stuck.number, 0, &refusal), 0);
	must_stay_busy(stuck.number, 0);
	get_loose(&stuck);
	CHECK_EQUAL(calm_state(stuck.number, 0), 2);
	close_with_a_copy(stuck.number);
}

/* Who drops pages drops those that are at these addresses when he comes to it. */
static void what_is_mapped_anew_in_a_drop_is_busy(void)
{
	struct stuck stuck;

	get_stuck(&stuck, punch);
	munmap(stuck.memory, 2 * PAGE);
	map_at(stuck.memory, 2);
	must_watch(stuck.number, stuck.memory, 1, 1);
	must_stay_busy(stuck.number, 1);
	get_loose(&stuck);
	CHECK_EQUAL(calm_state(stuck.number, 1), 0);
	close_with_a_copy(stuck.number);
}

/* The hole is made in the file, wherever that is mapped then. */
static void what_is_moved_in_a_drop_is_busy_where_it_is(void)
{
	char *target = map_alone(2);
	struct stuck stuck;

	get_stuck(&stuck, punch);
	CHECK(mremap(stuck.memory, 2 * PAGE, 2 * PAGE,
		     MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
	must_watch(stuck.number, target, 2, 1);
	must_stay_busy(stuck.number, 1);
	CHECK_EQUAL(target[0], 1);
	get_loose(&stuck);
	CHECK_EQUAL(target[0], 0);
	CHECK_EQUAL(calm_state(stuck.number, 1), 0);
	close_with_a_copy(stuck.number);
}

static void a_drop_that_is_over_leaves_one_under_way_alone(void)
{
	struct stuck stuck;
	char *memory = map(1);

	get_stuck(&stuck, punch);
	must_watch(stuck.number, memory, 1, 1);
	for (unsigned int i = 0; i < 5; i++) {
		drop(memory, 1);
		state(stuck.number, 1);
		must_stay_busy(stuck.number, 0);
	}
	get_loose(&stuck);
	CHECK_EQUAL(calm_state(stuck.number, 0), 2);
	CHECK_EQUAL(calm_state(stuck.number, 1), 10);
	close_with_a_copy(stuck.number);
}

static void *punch_in_a_child(void *argument)
{
	struct stuck *stuck = argument;
	pid_t child = vfork();

	if (!child) {
		syscall(SYS_madvise, stuck->memory, 2 * PAGE, MADV_REMOVE);
		_exit(0);
	}
	atomic_store(&stuck->returned, true);
	CHECK(waitpid(child, NULL, 0) == child);
	return NULL;
}

static void a_child_of_vfork_is_thought_of(void)
{
	struct stuck stuck;

	if (SANITIZED)
		skip("a sanitizer's vfork() may be another");
	get_stuck(&stuck, punch_in_a_child);
	must_watch(stuck.number, stuck.memory, 1, 1);
	must_stay_busy(stuck.number, 1);
	get_loose(&stuck);
	CHECK_EQUAL(calm_state(stuck.number, 1), 0);
	close_with_a_copy(stuck.number);
}

/* Submits IORING_OP_MADVISE, and waits for its end. */
static void *punch_by_io_uring(void *argument)
{
	struct stuck *stuck = argument;
	struct io_uring_params setup = { 0 };
	struct io_uring_sqe *entries;
	unsigned int *tail, *array;
	int ring = (int)syscall(SYS_io_uring_setup, 1, &setup);
	char *submissions;

	CHECK(ring >= 0);
	submissions = mmap(NULL, setup.sq_off.array + sizeof(*array),
			   PROT_READ | PROT_WRITE, MAP_SHARED, ring,
			   IORING_OFF_SQ_RING);
	entries = mmap(NULL, sizeof(*entries), PROT_READ | PROT_WRITE, MAP_SHARED,
		       ring, IORING_OFF_SQES);
	CHECK(submissions != MAP_FAILED && entries != MAP_FAILED);
	*entries = (struct io_uring_sqe) {
		.opcode = IORING_OP_MADVISE,
		.addr = (uintptr_t)stuck->memory,
		.len = 2 * PAGE,
		.fadvise_advice = MADV_REMOVE,
	};
	array = (unsigned int *)(submissions + setup.sq_off.array);
	tail = (unsigned int *)(submissions + setup.sq_off.tail);
	*array = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	CHECK_EQUAL(syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0), 1);
	/* It sleeps elsewhere: a worker of the kernel does it. */
	while (!atomic_load(&stuck->returned))
		usleep(1000);
	CHECK_EQUAL(syscall(SYS_io_uring_enter, ring, 0, 1, IORING_ENTER_GETEVENTS,
			    NULL, 0), 0);
	close(ring);
	return NULL;
}

static void a_drop_by_io_uring_is_not_taken_to_be_over(void)
{
	struct io_uring_params setup = { 0 };
	int ring = (int)syscall(SYS_io_uring_setup, 1, &setup);
	struct uffdio_zeropage nothing = { .range.len = PAGE };
	struct stuck stuck;

	if (ring < 0)
		skip("no io_uring here");
	close(ring);
	get_stuck(&stuck, punch_by_io_uring);
	must_watch(stuck.number, stuck.memory, 1, 1);
	must_stay_busy(stuck.number, 1);
	nothing.range.start = (uintptr_t)stuck.page;
	CHECK_EQUAL(stuck.memory[0], 1);
	CHECK(!ioctl(stuck.faults, UFFDIO_ZEROPAGE, &nothing));
	atomic_store(&stuck.returned, true);
	pthread_join(stuck.writer, NULL);
	pthread_join(stuck.dropper, NULL);
	CHECK_EQUAL(stuck.memory[0], 0);
	close(stuck.faults);
	close(stuck.file);
	close_with_a_copy(stuck.number);
}

static void *do_nothing(void *unused)
{
	return unused;
}

static void *come_and_go(void *stop)
{
	while (!atomic_load((atomic_bool *)stop)) {
		pthread_t threads[8];

		for (int i = 0; i < 8; i++)
			threads[i] = start_helper(do_nothing, NULL);
		for (int i = 0; i < 8; i++)
			pthread_join(threads[i], NULL);
	}
	return NULL;
}

/* The kernel leaves threads out of a list while others end. */
static void threads_that_come_and_go_hide_nobody(void)
{
	atomic_bool stop = false;
	struct stuck stuck;
	pthread_t threads[2];

	for (int i = 0; i < 2; i++)
		threads[i] = start_helper(come_and_go, &stop);
	get_stuck(&stuck, punch);
	for (unsigned int i = 0; i < 20; i++)
		must_stay_busy(stuck.number, 0);
	atomic_store(&stop, true);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	get_loose(&stuck);
	CHECK_EQUAL(calm_state(stuck.number, 0), 2);
	close_with_a_copy(stuck.number);
}

static void who_cannot_be_looked_at_is_not_taken_to_be_outside(void)
{
	int number = open_notifier(NULL), nothing = open("/dev/null", O_RDONLY);
	char *memory = map(1);

	must_watch(number, memory, 1, 1);
	CHECK(nothing >= 0);
	/* As somebody who closes all descriptors, and opens others. */
	CHECK(dup2(nothing, engine.threads.directory.fd) >= 0);
	drop(memory, 1);
	must_stay_busy(number, 1);
	aioummu_close(number);
	/* It was not closed either, being somebody else's now. */
	number = open_notifier(NULL);
	must_watch(number, memory, 1, 1);
	CHECK_EQUAL(state(number, 1), 0);
	aioummu_close(number);
}

static void after_an_overrun_drops_may_be_under_way_anywhere(void)
{
	int number = open_notifier(NULL);
	char *memory = map(PAGES_TO_OVERRUN), *elsewhere = map(1);

	must_watch(number, memory, PAGES_TO_OVERRUN, 1);
	CHECK_EQUAL(watch_for(number, elsewhere, 1, 2, UNMAP), 0);
	unmap_behind_the_lock(memory, PAGES_TO_OVERRUN);
	CHECK(atomic_load(&engine.overrun));
	/* Whatever it asked for. */
	CHECK_EQUAL(aioummu_spent(number, 2), 1);
	CHECK(read_records(number, RECORDS) == 3);
	must_watch(number, elsewhere, 1, 3);
	pthread_mutex_lock(&engine.lock);
	CHECK(find_drop((uintptr_t)elsewhere, (uintptr_t)elsewhere + 1));
	CHECK(find_drop(0, 1));
	let_go();
	CHECK_EQUAL(calm_state(number, 3), 0);
	aioummu_close(number);
}

static bool is_in_a_drop(uint64_t start, uint64_t end)
{
	struct drop *drop = find_drop(start, end);

	return drop && drop->range.start <= start && drop->range.end >= end;
}

static void drops_beyond_the_limit_make_the_nearest_wider(void)
{
	static uint64_t starts[1000], ends[1000];
	int number = open_notifier(NULL);
	uint64_t random = seed(), last = 0;
	struct drop *drop;
	size_t count = 0;

	pthread_mutex_lock(&engine.lock);
	for (size_t i = 0; i < 1000; i++) {
		starts[i] = next_random(&random) % 1000000;
		ends[i] = starts[i] + 1 + next_random(&random) % 100;
		remember_drop(starts[i], ends[i]);
		for (size_t j = 0; j <= i; j++)
			CHECK(is_in_a_drop(starts[j], ends[j]));
	}
	while ((drop = find_drop(last, UINT64_MAX))) {
		last = drop->range.end;
		count++;
	}
	CHECK(count && count <= AIOUMMU_DROPS);
	end_drops(engine.drop_number - 1);
	drop = find_drop(0, UINT64_MAX);
	CHECK(drop && drop->number == engine.drop_number);
	end_drops(engine.drop_number);
	CHECK(!engine.drops);
	/* From full on: the nearest, and no other. */
	for (uint64_t i = 0; i < AIOUMMU_DROPS; i++)
		remember_drop(1000 * i, 1000 * i + 100);
	remember_drop(1950, 1960);
	CHECK(is_in_a_drop(1950, 2100));
	CHECK(!find_drop(1100, 1950));
	remember_drop(3110, 3120);
	CHECK(is_in_a_drop(3000, 3120));
	CHECK(!find_drop(3120, 4000));
	remember_drop(1000 * AIOUMMU_DROPS, 1000 * AIOUMMU_DROPS + 1);
	CHECK(is_in_a_drop(1000 * AIOUMMU_DROPS - 1000, 1000 * AIOUMMU_DROPS + 1));
	CHECK(!find_drop(2100, 3000));
	end_drops(engine.drop_number);
	CHECK(!engine.drops);
	let_go();
	aioummu_close(number);
}

/* ------------------------------------------------------ documented, and shown --- */

#define WINDOW_PAGES	512
#define WINDOW_TRIES	40

static void *drop_pages_slowly(void *argument)
{
	struct sched_param lowest = { 0 };

	/* Runs only while nobody else has anything to do. */
	sched_setscheduler(0, SCHED_IDLE, &lowest);
	while (!atomic_load(&unwanted))
		sched_yield();
	madvise(argument, WINDOW_PAGES * PAGE, MADV_DONTNEED);
	return NULL;
}

static void stay_on_one_cpu(void)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	sched_setaffinity(0, sizeof(one), &one);
}

/* Whether what was registered went stale without a report. */
static bool register_in_the_window(int number, int doorbell)
{
	char *memory = map(WINDOW_PAGES), *last = memory + (WINDOW_PAGES - 1) * PAGE;
	int other = open_notifier(NULL);
	bool was_there, is_there, told;
	uint64_t before;
	pthread_t thread;

	must_watch(number, memory, WINDOW_PAGES, 1);
	atomic_store(&unwanted, NULL);
	thread = start_helper(drop_pages_slowly, memory);
	atomic_store(&unwanted, memory);
	while (!rings(doorbell))
		sched_yield();
	/* The pages are said to go, and have not gone yet. */
	CHECK_EQUAL(watch(other, last, PAGE, 1), 0);
	before = state(other, 1);
	was_there = *(volatile char *)last;
	pthread_join(thread, NULL);
	is_there = *(volatile char *)last;
	told = generation(other);
	/* No report, but who asks for the state knows. */
	CHECK(!was_there || before & BUSY || state(other, 1) != before);
	must_report(number, 1, memory, WINDOW_PAGES, HINT);
	CHECK_EQUAL(read_records(number, 1), 1);
	CHECK_EQUAL(aioummu_unregister(number, 1), 0);
	aioummu_close(other);
	munmap(memory, WINDOW_PAGES * PAGE);
	/* Whoever reads there at least never sees other than this or that. */
	CHECK(!is_there);
	return was_there && !told;
}

/*
 * MADV_DONTNEED and its like are reported before the pages go, and not a second
 * time.  Who registers in between is never told.  That is what the kernel does;
 * it is documented, so this fails if it is not so any more.
 * Its state says it.
 */
static void a_registration_in_the_middle_of_a_madvise_may_be_stale(void)
{
	int doorbell, number = open_notifier(&doorbell);
	unsigned int stale = 0;

	stay_on_one_cpu();
	for (unsigned int i = 0; i < WINDOW_TRIES; i++)
		stale += register_in_the_window(number, doorbell);
	note("stale without a report: %u of %u", stale, WINDOW_TRIES);
	if (!stale)
		skip("the window could not be hit here");
	close_with_a_copy(number);
}

static const struct test tests[] = {
	TEST(an_unmapping_is_reported_exactly),
	TEST(the_doorbell_rings_without_being_asked),
	TEST(what_is_beside_a_region_is_not_reported),
	TEST(a_second_hit_before_the_read_takes_the_hint_away),
	TEST(a_change_counts_once_however_many_regions_it_hits),
	TEST(reports_come_in_the_order_of_the_first_hit),
	TEST(last_waits_for_room),
	TEST(last_says_the_generation_of_its_moment),
	TEST(last_comes_after_unregister_of_the_last_pending),
	TEST(an_unregistered_region_is_not_reported),
	TEST(a_buffer_without_room_for_a_record_loses_nothing),
	TEST(the_activity_word_says_when_to_look),
	TEST(many_notifiers_are_told_of_one_change),
	TEST(cookies_name_one_region_each),
	TEST(numbers_of_closed_notifiers_are_refused),
	TEST(empty_and_inverted_ranges_are_refused),
	TEST(holes_are_refused_and_named),
	TEST(a_refusal_leaves_nothing_behind),
	TEST(shared_memory_that_cannot_be_written_is_eperm),
	TEST(the_vdso_is_einval),
	TEST(memory_of_another_userfaultfd_is_busy_and_stays_so),
	TEST(the_limit_of_regions_is_enospc),
	TEST(watching_a_part_leaves_the_mapping_whole),
	TEST(a_mapping_that_is_watched_in_part_can_grow),
	TEST(a_mapping_that_is_watched_in_part_can_move),
	TEST(what_was_moved_can_be_watched_where_it_is),
	TEST(a_source_that_stays_mapped_is_released),
	TEST(a_second_mapping_of_shared_memory_is_no_change),
	TEST(neighbours_that_merge_stay_watched),
	TEST(a_mapping_that_was_split_is_watched_in_all_parts),
	TEST(heap_that_grew_is_watched_once_registered),
	TEST(memory_mapped_again_is_watched_once_registered),
	TEST(a_spent_region_stays_so_until_it_is_rearmed),
	TEST(what_follows_a_detached_segment_is_watched),
	TEST(a_segment_attached_again_is_watched_once_registered),
	TEST(idle_mappings_are_released_beyond_the_limit),
	TEST(what_is_being_registered_is_not_idle),
	TEST(an_idle_mapping_that_is_wanted_again_is_kept),
	TEST(another_notifier_keeps_a_mapping_registered),
	TEST(a_late_event_does_not_make_a_registration_forgotten),
	TEST(whoever_has_the_lock_reports_what_came_meanwhile),
	TEST(a_full_ring_loses_nothing),
	TEST(an_overrun_reports_everything),
	TEST(after_an_overrun_everything_can_be_watched_again),
	TEST(after_an_overrun_what_was_moved_is_released),
	TEST(mappings_that_cannot_be_remembered_are_released),
	TEST(without_memory_registering_is_refused),
	TEST(regions_far_beyond_a_batch_are_closed),
	TEST(starting_and_stopping_leaks_nothing),
	TEST(the_trees_stay_shallow),
	TEST(the_engines_thread_takes_no_signals),
	TEST(closing_while_others_change_mappings_ends),
	TEST(a_child_with_a_copy_does_not_keep_anything_registered),
	TEST(a_raw_child_is_told_that_it_is_a_copy),
	TEST(a_forked_child_has_no_watch_and_can_make_one),
	TEST(descriptors_closed_behind_its_back_hang_nobody),
	TEST(a_limit_of_no_descriptors_hangs_nobody),
	TEST(what_was_not_asked_for_is_not_reported),
	TEST(what_asks_for_nothing_special_is_told_everything),
	TEST(who_asks_for_moves_is_told_of_unmapping_and_the_reverse),
	TEST(a_filter_hides_a_change_from_its_own_region_only),
	TEST(causes_that_nobody_can_ask_for_are_refused),
	TEST(an_unmapping_that_nobody_asked_for_spends_the_region),
	TEST(a_region_for_once_ends_with_its_report),
	TEST(what_was_not_read_is_still_registered),
	TEST(a_state_counts_what_is_done_to_its_region),
	TEST(a_spent_region_is_busy_until_it_is_rearmed),
	TEST(a_drop_of_the_callers_own_is_over_at_once),
	TEST(a_thread_that_never_sleeps_does_not_keep_it_busy),
	TEST(a_drop_that_never_sleeps_is_not_over),
	TEST(a_region_registered_in_a_drop_is_busy_until_that_is_over),
	TEST(rearming_in_a_drop_does_not_end_it),
	TEST(what_is_mapped_anew_in_a_drop_is_busy),
	TEST(what_is_moved_in_a_drop_is_busy_where_it_is),
	TEST(a_drop_that_is_over_leaves_one_under_way_alone),
	TEST(a_child_of_vfork_is_thought_of),
	TEST(a_drop_by_io_uring_is_not_taken_to_be_over),
	TEST(threads_that_come_and_go_hide_nobody),
	TEST(who_cannot_be_looked_at_is_not_taken_to_be_outside),
	TEST(after_an_overrun_drops_may_be_under_way_anywhere),
	TEST(drops_beyond_the_limit_make_the_nearest_wider),
	TEST(a_registration_in_the_middle_of_a_madvise_may_be_stale),
};

int main(int count, char **arguments)
{
	return run_tests(tests, sizeof(tests) / sizeof(tests[0]), count - 1,
			 arguments + 1);
}
