// SPDX-License-Identifier: GPL-2.0
/*
 * What "invalidate" means: every row of the table in the documentation, which is
 * read from the file named on the command line.  A row that this program does
 * not know is a failure, as is an operation that the table lacks.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device.h"

/* Not in the headers of older systems. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE	23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE	101
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL	102
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP	4
#endif

#define HUGE_PAGE	(2ul << 20)

/**
 * struct scene - one operation, on its way
 * @device:	watches the region
 * @start:	of the region
 * @length:	of the region
 * @before:	the counter before the operation
 * @changed:	first byte that the operation changes
 * @changed_length:	and how many
 * @unit:	what the counter rises for, or NULL
 * @units:	how many of that there were
 */
struct scene {
	struct device	device;
	char		*start;
	size_t		length;
	u64		before;
	char		*changed;
	size_t		changed_length;
	const char	*unit;
	unsigned int	units;
};

/* From here on it counts. */
static void watch(struct scene *scene, char *start, size_t pages)
{
	if (!scene->device.counter)
		scene->device = open_device_with_causes(O_NONBLOCK);
	scene->start = start;
	scene->length = pages * page_size();
	register_region(&scene->device, start, scene->length, 1);
	scene->before = generation(&scene->device);
	scene->changed = start;
	scene->changed_length = scene->length;
}

static void changes(struct scene *scene, char *start, size_t pages)
{
	scene->changed = start;
	scene->changed_length = pages * page_size();
}

/* A region of four pages, of which two in the middle will change. */
static char *watch_four_pages(struct scene *scene)
{
	char *pages = map_pages(4);

	watch(scene, pages, 4);
	changes(scene, pages + page_size(), 2);
	return scene->changed;
}

static char *watch_four_untouched_pages(struct scene *scene)
{
	char *pages = map_untouched(4, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1);

	watch(scene, pages, 4);
	changes(scene, pages + page_size(), 2);
	return scene->changed;
}

static void advise_two_of_four_pages(struct scene *scene, int advice)
{
	char *start = watch_four_pages(scene);

	CHECK_EQ(madvise(start, 2 * page_size(), advice), 0);
}

static void do_munmap(struct scene *scene)
{
	char *start = watch_four_pages(scene);

	CHECK_EQ(munmap(start, 2 * page_size()), 0);
}

static void do_munmap_untouched(struct scene *scene)
{
	char *start = watch_four_untouched_pages(scene);

	CHECK_EQ(munmap(start, 2 * page_size()), 0);
}

static void do_map_fixed(struct scene *scene)
{
	char *start = watch_four_pages(scene);

	CHECK(mmap(start, 2 * page_size(), PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == start);
}

static void do_mremap_shrink(struct scene *scene)
{
	char *pages = map_pages(4);

	watch(scene, pages, 4);
	changes(scene, pages + 3 * page_size(), 1);
	CHECK(mremap(pages, 4 * page_size(), 3 * page_size(), 0) == pages);
}

static void do_mremap_grow(struct scene *scene)
{
	char *pages = map_pages(4);

	/* Room to grow into, that nothing else takes. */
	scene->device = open_device_with_causes(O_NONBLOCK);
	CHECK_EQ(munmap(pages + 3 * page_size(), page_size()), 0);
	watch(scene, pages, 4);
	CHECK(mremap(pages, 3 * page_size(), 4 * page_size(), 0) == pages);
}

static void move(struct scene *scene, int flags)
{
	char *pages = map_pages(4), *target = map_pages(4);

	watch(scene, pages, 4);
	CHECK(mremap(pages, 4 * page_size(), 4 * page_size(),
		     MREMAP_MAYMOVE | MREMAP_FIXED | flags, target) == target);
}

static void do_mremap_move(struct scene *scene)
{
	move(scene, 0);
}

static void do_mremap_dontunmap(struct scene *scene)
{
	move(scene, MREMAP_DONTUNMAP);
}

static void do_brk(struct scene *scene)
{
	size_t misaligned = (uintptr_t)sbrk(0) % page_size();
	char *pages;

	if (misaligned)
		sbrk(page_size() - misaligned);
	pages = sbrk(4 * page_size());
	CHECK(pages != (void *)-1);
	touch(pages, 4);
	watch(scene, pages, 4);
	changes(scene, pages + page_size(), 3);
	CHECK_EQ(brk(pages + page_size()), 0);
}

static char *attach(int flags, void *where)
{
	int id = shmget(IPC_PRIVATE, 4 * page_size(), IPC_CREAT | 0600);
	char *pages;

	CHECK(id >= 0);
	pages = shmat(id, where, flags);
	CHECK(pages != (void *)-1);
	CHECK_EQ(shmctl(id, IPC_RMID, NULL), 0);
	return pages;
}

static void do_shmdt(struct scene *scene)
{
	char *pages = attach(0, NULL);

	touch(pages, 4);
	watch(scene, pages, 4);
	CHECK_EQ(shmdt(pages), 0);
}

static void do_shm_remap(struct scene *scene)
{
	char *pages = map_pages(4);

	watch(scene, pages, 4);
	CHECK(attach(SHM_REMAP, pages) == pages);
}

static void do_dontneed(struct scene *scene)
{
	advise_two_of_four_pages(scene, MADV_DONTNEED);
}

static void do_dontneed_untouched(struct scene *scene)
{
	char *start = watch_four_untouched_pages(scene);

	CHECK_EQ(madvise(start, 2 * page_size(), MADV_DONTNEED), 0);
}

static void do_free(struct scene *scene)
{
	advise_two_of_four_pages(scene, MADV_FREE);
}

static char *watch_shared_pages(struct scene *scene, int fd)
{
	char *pages = map_untouched(4, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	touch(pages, 4);
	watch(scene, pages, 4);
	return pages;
}

static void do_remove(struct scene *scene)
{
	char *pages = watch_shared_pages(scene, make_shared_file(4));

	changes(scene, pages + page_size(), 2);
	CHECK_EQ(madvise(pages + page_size(), 2 * page_size(), MADV_REMOVE), 0);
}

static void do_guard_install(struct scene *scene)
{
	advise_two_of_four_pages(scene, MADV_GUARD_INSTALL);
}

/* The first pages of an aligned piece of memory with nothing else in it. */
static char *map_aligned(size_t alignment, size_t pages)
{
	char *area = mmap(NULL, 3 * alignment, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uintptr_t aligned;

	CHECK(area != MAP_FAILED);
	aligned = ((uintptr_t)area + alignment) & ~(alignment - 1);
	CHECK_EQ(mprotect((void *)aligned, pages * page_size(),
			  PROT_READ | PROT_WRITE), 0);
	return (void *)aligned;
}

static void do_collapse(struct scene *scene)
{
	char *pages = map_aligned(HUGE_PAGE, HUGE_PAGE / page_size());

	CHECK_EQ(madvise(pages, HUGE_PAGE, MADV_NOHUGEPAGE), 0);
	touch(pages, HUGE_PAGE / page_size());
	CHECK_EQ(madvise(pages, HUGE_PAGE, MADV_HUGEPAGE), 0);
	watch(scene, pages + 8 * page_size(), 4);
	CHECK_EQ(madvise(pages, HUGE_PAGE, MADV_COLLAPSE), 0);
}

static void do_soft_offline(struct scene *scene)
{
	char *pages = map_pages(4);

	if (geteuid() != 0)
		skip("only root may take memory offline");
	watch(scene, pages, 4);
	changes(scene, pages + page_size(), 1);
	if (madvise(scene->changed, page_size(), MADV_SOFT_OFFLINE)) {
		CHECK_EQ(errno, EINVAL);
		skip("this kernel cannot take memory offline");
	}
}

static void do_cold(struct scene *scene)
{
	advise_two_of_four_pages(scene, MADV_COLD);
}

static void do_willneed(struct scene *scene)
{
	advise_two_of_four_pages(scene, MADV_WILLNEED);
}

static void do_dontfork(struct scene *scene)
{
	advise_two_of_four_pages(scene, MADV_DONTFORK);
}

static void do_populate_write(struct scene *scene)
{
	char *start = watch_four_untouched_pages(scene);

	CHECK_EQ(madvise(start, 2 * page_size(), MADV_POPULATE_WRITE), 0);
}

static void do_mprotect(struct scene *scene)
{
	char *start = watch_four_pages(scene);

	CHECK_EQ(mprotect(start, 2 * page_size(), PROT_READ), 0);
}

static void do_mprotect_no_change(struct scene *scene)
{
	char *start = watch_four_pages(scene);

	CHECK_EQ(mprotect(start, 2 * page_size(), PROT_READ | PROT_WRITE), 0);
}

/*
 * Neither a page table nor a table of page tables is there for these.  From 6.10
 * on the latter, for 1 GB, is enough for the kernel to go and look.
 */
static void do_mprotect_untouched(struct scene *scene)
{
	char *pages = map_aligned(1ul << 30, 4);

	watch(scene, pages, 4);
	CHECK_EQ(mprotect(pages, 4 * page_size(), PROT_READ), 0);
}

static void do_mprotect_beside_touched(struct scene *scene)
{
	char *pages = map_aligned(HUGE_PAGE, 4);
	char *beside = pages + 8 * page_size();

	CHECK_EQ(mprotect(beside, page_size(), PROT_READ | PROT_WRITE), 0);
	touch(beside, 1);
	watch(scene, pages, 4);
	CHECK_EQ(mprotect(pages, 4 * page_size(), PROT_READ), 0);
}

static void do_mlock(struct scene *scene)
{
	char *start = watch_four_pages(scene);

	CHECK_EQ(mlock(start, 2 * page_size()), 0);
	CHECK_EQ(munlock(start, 2 * page_size()), 0);
}

static void do_first_touch(struct scene *scene)
{
	touch(watch_four_untouched_pages(scene), 2);
}

static void read_pages(const char *start, size_t pages)
{
	for (size_t i = 0; i < pages; i++)
		__atomic_load_n(start + i * page_size(), __ATOMIC_RELAXED);
}

static void do_reads_and_writes(struct scene *scene)
{
	char *start = watch_four_pages(scene);

	read_pages(start, 2);
	touch(start, 2);
	memset(start, 3, 2 * page_size());
}

static void do_write_after_read(struct scene *scene)
{
	char *pages = map_untouched(4, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1);

	read_pages(pages, 4);
	watch(scene, pages, 4);
	changes(scene, pages + page_size(), 1);
	scene->unit = "page";
	scene->units = 1;
	touch(pages + page_size(), 1);
}

static void do_write_private_file(struct scene *scene)
{
	int fd = make_shared_file(4);
	char *pages;

	pages = map_untouched(4, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(pwrite(fd, "x", 1, i * page_size()), 1);
	read_pages(pages, 4);
	watch(scene, pages, 4);
	changes(scene, pages + page_size(), 1);
	scene->unit = "page";
	scene->units = 1;
	touch(pages + page_size(), 1);
}

static void run_nothing(int socket, void *unused)
{
}

static void fork_and_wait(void (*run)(int socket, void *arg), void *arg)
{
	struct peer peer = start_peer(run, arg);

	join_peer(&peer);
}

/* Three private mappings that were written to, one that was not, one shared. */
static void do_fork(struct scene *scene)
{
	size_t page = page_size();
	char *area = map_untouched(10, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
				   -1);

	for (int i = 0; i < 10; i += 2) {
		CHECK(mmap(area + i * page, page, PROT_READ | PROT_WRITE,
			   MAP_ANONYMOUS | MAP_FIXED |
			   (i == 8 ? MAP_SHARED : MAP_PRIVATE), -1, 0) ==
		      area + i * page);
		if (i != 6)
			touch(area + i * page, 1);
	}
	watch(scene, area, 10);
	scene->unit = "VMA";
	scene->units = 3;
	fork_and_wait(run_nothing, NULL);
}

static void watch_after_fork(struct scene *scene, struct peer *peer,
			     void (*run)(int socket, void *arg))
{
	char *pages = map_pages(4);

	*peer = start_peer(run, pages);
	watch(scene, pages, 4);
}

static void wait_for_word(int socket, void *unused)
{
	receive_word(socket);
}

static void do_write_after_fork(struct scene *scene)
{
	struct peer peer;

	/* The child is there: the pages are shared with it. */
	watch_after_fork(scene, &peer, wait_for_word);
	scene->unit = "page";
	scene->units = 2;
	touch(scene->start + page_size(), 2);
	send_word(peer.socket, 0);
	join_peer(&peer);
}

static void write_on_word(int socket, void *pages)
{
	receive_word(socket);
	touch(pages, 4);
}

static void do_write_in_child(struct scene *scene)
{
	struct peer peer;

	watch_after_fork(scene, &peer, write_on_word);
	send_word(peer.socket, 0);
	join_peer(&peer);
}

static void do_fork_dontfork(struct scene *scene)
{
	char *pages = map_pages(4);

	CHECK_EQ(madvise(pages, 4 * page_size(), MADV_DONTFORK), 0);
	watch(scene, pages, 4);
	fork_and_wait(run_nothing, NULL);
}

static void do_vfork(struct scene *scene)
{
	char *pages = map_pages(4);
	int status;
	pid_t pid;

	watch(scene, pages, 4);
	pid = vfork();
	if (pid == 0)
		_exit(0);
	CHECK(pid > 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
}

static void truncate_file(int socket, void *fd)
{
	CHECK_EQ(ftruncate(*(int *)fd, page_size()), 0);
}

static void do_ftruncate(struct scene *scene)
{
	int fd = make_shared_file(4);
	char *pages = watch_shared_pages(scene, fd);

	changes(scene, pages + page_size(), 3);
	fork_and_wait(truncate_file, &fd);
}

static void punch_hole(int socket, void *fd)
{
	CHECK_EQ(fallocate(*(int *)fd,
			   FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			   page_size(), 2 * page_size()), 0);
}

static void do_punch_hole(struct scene *scene)
{
	int fd = make_shared_file(4);
	char *pages = watch_shared_pages(scene, fd);

	changes(scene, pages + page_size(), 2);
	fork_and_wait(punch_hole, &fd);
}

static void do_write_file(struct scene *scene)
{
	int fd = make_shared_file(4);

	watch_shared_pages(scene, fd);
	CHECK_EQ(pwrite(fd, "y", 1, 0), 1);
}

struct target {
	pid_t	pid;
	char	*start;
};

static void write_to_parent(int socket, void *arg)
{
	struct target *target = arg;
	char word[] = "word";
	struct iovec from = { .iov_base = word, .iov_len = sizeof(word) };
	struct iovec to = {
		.iov_base	= target->start,
		.iov_len	= sizeof(word),
	};

	CHECK_EQ(process_vm_writev(target->pid, &from, 1, &to, 1, 0),
		 sizeof(word));
}

static void do_write_from_another(struct scene *scene)
{
	char *pages = watch_shared_pages(scene, make_shared_file(4));
	struct target target = { .pid = getpid(), .start = pages };

	fork_and_wait(write_to_parent, &target);
}

static void do_clear_refs(struct scene *scene)
{
	char *pages = map_pages(4);
	int fd = open("/proc/self/clear_refs", O_WRONLY);

	if (fd < 0)
		skip("this kernel has no soft-dirty bits");
	watch(scene, pages, 4);
	CHECK_EQ(write(fd, "4", 1), 1);
}

static const struct operation {
	const char	*name;
	void		(*run)(struct scene *scene);
} operations[] = {
	{ "munmap", do_munmap },
	{ "munmap of untouched pages", do_munmap_untouched },
	{ "mmap with MAP_FIXED over it", do_map_fixed },
	{ "mremap, shrinking", do_mremap_shrink },
	{ "mremap, growing in place", do_mremap_grow },
	{ "mremap, moving", do_mremap_move },
	{ "mremap with MREMAP_DONTUNMAP", do_mremap_dontunmap },
	{ "brk, shrinking", do_brk },
	{ "shmdt", do_shmdt },
	{ "shmat with SHM_REMAP over it", do_shm_remap },
	{ "MADV_DONTNEED", do_dontneed },
	{ "MADV_DONTNEED of untouched pages", do_dontneed_untouched },
	{ "MADV_FREE", do_free },
	{ "MADV_REMOVE", do_remove },
	{ "MADV_GUARD_INSTALL", do_guard_install },
	{ "MADV_COLLAPSE", do_collapse },
	{ "MADV_SOFT_OFFLINE", do_soft_offline },
	{ "MADV_COLD", do_cold },
	{ "MADV_WILLNEED", do_willneed },
	{ "MADV_DONTFORK", do_dontfork },
	{ "MADV_POPULATE_WRITE", do_populate_write },
	{ "mprotect", do_mprotect },
	{ "mprotect that changes nothing", do_mprotect_no_change },
	{ "mprotect of untouched pages", do_mprotect_untouched },
	{ "mprotect of untouched beside touched", do_mprotect_beside_touched },
	{ "mlock and munlock", do_mlock },
	{ "first touch", do_first_touch },
	{ "plain reads and writes", do_reads_and_writes },
	{ "first write to a page only read so far", do_write_after_read },
	{ "first write to a private file mapping", do_write_private_file },
	{ "fork", do_fork },
	{ "write after fork", do_write_after_fork },
	{ "write in the child after fork", do_write_in_child },
	{ "fork of MADV_DONTFORK memory", do_fork_dontfork },
	{ "vfork", do_vfork },
	{ "ftruncate by another process", do_ftruncate },
	{ "hole punched by another process", do_punch_hole },
	{ "write to a mapped file", do_write_file },
	{ "write from another process", do_write_from_another },
	{ "soft-dirty bits cleared", do_clear_refs },
};

/* The table */

#define COLUMNS		4
#define MAX_ROWS	100

struct row {
	char	column[COLUMNS][128];
};

static struct row rows[MAX_ROWS];
static struct test tests[MAX_ROWS + 1];
static size_t nr_rows;

static __noreturn __printf(1, 2) void refuse(const char *format, ...)
{
	va_list args;

	printf("Bail out! ");
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
	exit(1);
}

/* A simple table of RST: the columns are where its rulers' signs are. */
static void read_row(const char *line, const char *ruler, struct row *row)
{
	for (int i = 0; i < COLUMNS; i++) {
		size_t start = strspn(ruler, " "), width;

		width = strspn(ruler + start, "=");
		/* The last column may be longer than its ruler. */
		if (i == COLUMNS - 1)
			width = sizeof(row->column[i]) - 1;
		snprintf(row->column[i], sizeof(row->column[i]), "%.*s",
			 (int)width, strlen(line) > start ? line + start : "");
		for (size_t end = strlen(row->column[i]);
		     end && isspace((unsigned char)row->column[i][end - 1]);)
			row->column[i][--end] = '\0';
		line += strlen(line) > start + width ? start + width :
			strlen(line);
		ruler += start + width > strlen(ruler) ? strlen(ruler) :
			 start + width;
	}
}

static void read_table(const char *path)
{
	char line[512], ruler[512] = "";
	unsigned int rulers = 0;
	bool inside = false, ended = false;
	FILE *file = fopen(path, "r");

	if (!file)
		refuse("cannot read %s: %s", path, strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		if (!strcmp(line, ".. operations-begin\n")) {
			inside = true;
		} else if (!strcmp(line, ".. operations-end\n")) {
			ended = inside;
			inside = false;
		} else if (inside && *line == '=') {
			if (rulers++ && strcmp(ruler, line))
				refuse("rulers differ: %s", line);
			memcpy(ruler, line, sizeof(ruler));
		} else if (inside && rulers == 2) {
			struct row row;

			if (nr_rows == MAX_ROWS)
				refuse("more than %d rows", MAX_ROWS);
			read_row(line, ruler, &row);
			/* Else it is a remark that goes on. */
			if (*row.column[0])
				rows[nr_rows++] = row;
		}
	}
	fclose(file);
	if (!ended || rulers != 3 || !nr_rows)
		refuse("no table of operations in %s", path);
}

static unsigned long version_of(const char *text)
{
	unsigned long major, minor;
	char *dot, *end;

	major = strtoul(text, &dot, 10);
	CHECK(dot > text && *dot == '.');
	minor = strtoul(dot + 1, &end, 10);
	CHECK(end > dot + 1 && minor < 1000);
	return major * 1000 + minor;
}

static bool kernel_is_older(const char *remark)
{
	const char *since = strstr(remark, "since ");
	struct utsname name;

	if (!since)
		return false;
	CHECK_EQ(uname(&name), 0);
	return version_of(name.release) < version_of(since + strlen("since "));
}

static bool starts_with(const char *text, const char *start)
{
	return !strncmp(text, start, strlen(start));
}

static void check_count(const char *text, const struct scene *scene)
{
	u64 raised = generation(&scene->device) - scene->before;
	unsigned int count = 0;
	char unit[16] = "";

	if (strcmp(text, "0"))
		CHECK(sscanf(text, "+%u per %15s", &count, unit) >= 1);
	if (*unit) {
		CHECK(scene->unit && !strcmp(unit, scene->unit));
		count *= scene->units;
	} else {
		CHECK(!scene->unit);
	}
	CHECK_EQ(raised, count);
}

static u32 causes_of(const char *text)
{
	static const struct {
		const char	*name;
		u32		flag;
	} causes[] = {
		{ "unmap", UMMUNOTIFY_EVENT_CAUSE_UNMAP },
		{ "clear", UMMUNOTIFY_EVENT_CAUSE_CLEAR },
		{ "protect mapping", UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING },
		{ "protect page", UMMUNOTIFY_EVENT_CAUSE_PROTECT_PAGE },
		{ "soft dirty", UMMUNOTIFY_EVENT_CAUSE_SOFT_DIRTY },
		{ "foreign", UMMUNOTIFY_EVENT_CAUSE_FOREIGN },
	};
	u32 flags = 0;

	for (size_t i = 0; i < ARRAY_SIZE(causes); i++)
		if (strstr(text, causes[i].name))
			flags |= causes[i].flag;
	return flags;
}

static void check_report(const struct row *row, const struct scene *scene)
{
	const struct device *device = &scene->device;
	const char *text = row->column[3];
	u32 causes = causes_of(row->column[2]);
	struct ummunotify_event event;

	if (starts_with(text, "nothing")) {
		expect_nothing(device);
		CHECK_EQ(causes, 0);
		return;
	}
	CHECK_EQ(read_records(device->fd, &event, 1), 1);
	if (strchr(row->column[2], '['))
		event.flags |= causes & UMMUNOTIFY_EVENT_CAUSE_FOREIGN;
	if (starts_with(text, "exact range"))
		check_inval(&event, 1, scene->changed, scene->changed_length,
			    HINT | causes);
	else if (starts_with(text, "whole region"))
		check_inval(&event, 1, scene->start, scene->length, causes);
	else
		FAIL("what is \"%s\"?", text);
	expect_last(device, generation(device));
	expect_nothing(device);
}

static void run_row(const void *arg)
{
	const struct row *row = arg;
	struct scene scene = {};

	if (kernel_is_older(row->column[3]))
		skip("this kernel is older");
	for (size_t i = 0; i < ARRAY_SIZE(operations); i++) {
		if (strcmp(operations[i].name, row->column[0]))
			continue;
		operations[i].run(&scene);
		check_count(row->column[1], &scene);
		check_report(row, &scene);
		return;
	}
	FAIL("an operation of that name is not known here");
}

static void the_table_has_every_operation_once(const void *unused)
{
	for (size_t i = 0; i < ARRAY_SIZE(operations); i++) {
		unsigned int found = 0;

		for (size_t j = 0; j < nr_rows; j++)
			found += !strcmp(rows[j].column[0], operations[i].name);
		if (found != 1)
			FAIL("%s: %u times", operations[i].name, found);
	}
}

int main(int argc, char **argv)
{
	struct suite suite = { .tests = tests };

	if (argc < 2)
		refuse("usage: %s operations.rst [OPERATION...]", argv[0]);
	read_table(argv[1]);
	tests[0] = (struct test)TEST(the_table_has_every_operation_once);
	for (size_t i = 0; i < nr_rows; i++) {
		tests[i + 1] = (struct test) {
			.name	= rows[i].column[0],
			.run	= run_row,
			.arg	= &rows[i],
		};
	}
	suite.nr_tests = nr_rows + 1;
	return run_suite(&suite, argc - 2, argv + 2);
}
