// SPDX-License-Identifier: GPL-2.0
/*
 * Who may open it, and how much memory it costs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device.h"

#define MAX_REGIONS	"/sys/module/ummunotify/parameters/max_regions"

#define NOBODY		65534

static unsigned int default_limit;

static unsigned int get_limit(void)
{
	FILE *file = fopen(MAX_REGIONS, "r");
	unsigned int limit;

	if (!file)
		return 0;
	CHECK_EQ(fscanf(file, "%u", &limit), 1);
	fclose(file);
	return limit;
}

static bool put_limit(unsigned int limit)
{
	FILE *file = fopen(MAX_REGIONS, "w");

	if (!file)
		return false;
	fprintf(file, "%u", limit);
	return fclose(file) == 0;
}

static void set_limit(unsigned int limit)
{
	if (geteuid() != 0)
		skip("only root may change " MAX_REGIONS);
	CHECK(put_limit(limit));
	CHECK_EQ(get_limit(), limit);
}

/* Also after a test that crashed: the module outlives it. */
static void restore_limit(void)
{
	if (default_limit && get_limit() != default_limit &&
	    !put_limit(default_limit))
		note("cannot restore " MAX_REGIONS);
}

static void the_default_limit_is_there_to_be_read(const void *unused)
{
	CHECK(get_limit() > 0);
}

static void past_max_regions_is_enospc(const void *unused)
{
	struct device device, other;
	char *page = map_pages(1);

	set_limit(5);
	device = open_device(0);
	for (unsigned int i = 0; i < 5; i++)
		register_region(&device, page, page_size(), i);
	CHECK_EQ(try_register(device.fd, 0, 1, 5), -ENOSPC);
	CHECK_EQ(try_register(device.fd, 0, 0, 5), -ENOSPC);
	CHECK_EQ(try_unregister(device.fd, 5), -EINVAL);

	/* It is a limit of each fd. */
	other = open_device(0);
	register_region(&other, page, page_size(), 5);

	/* The refusal has changed nothing, and room is room. */
	zap(page, 1);
	CHECK_EQ(drain(&device), 5);
	unregister_region(&device, 3);
	register_region(&device, page, page_size(), 5);
	CHECK_EQ(try_register(device.fd, 0, 1, 3), -ENOSPC);
}

static void a_lower_limit_takes_nothing_away(const void *unused)
{
	struct device device;
	char *page = map_pages(1);

	set_limit(5);
	device = open_device(0);
	for (unsigned int i = 0; i < 5; i++)
		register_region(&device, page, page_size(), i);
	set_limit(2);
	CHECK_EQ(try_register(device.fd, 0, 1, 5), -ENOSPC);
	zap(page, 1);
	CHECK_EQ(drain(&device), 5);
	for (unsigned int i = 0; i < 3; i++) {
		CHECK_EQ(try_register(device.fd, 0, 1, 5), -ENOSPC);
		unregister_region(&device, i);
	}
	CHECK_EQ(try_register(device.fd, 0, 1, 5), -ENOSPC);
	unregister_region(&device, 3);
	register_region(&device, page, page_size(), 5);
	set_limit(0);
	CHECK_EQ(try_register(device.fd, 0, 1, 6), -ENOSPC);
}

static bool write_text(const char *directory, const char *name,
		       const char *text)
{
	char path[256];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	length = write(fd, text, strlen(text));
	close(fd);
	return length == (ssize_t)strlen(text);
}

/*
 * Move to a memory cgroup of our own, in a mount namespace of our own.
 *
 * Return: its folder.
 */
static const char *enter_cgroup(void)
{
	static char mount_point[64], group[96];
	char pid[16];

	if (geteuid() != 0)
		skip("only root may make a cgroup");
	snprintf(mount_point, sizeof(mount_point),
		 "/tmp/ummunotify-cgroup-XXXXXX");
	CHECK(mkdtemp(mount_point));
	CHECK_EQ(unshare(CLONE_NEWNS), 0);
	CHECK_EQ(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), 0);
	if (mount("cgroup2", mount_point, "cgroup2", 0, NULL))
		skip("no cgroup2: %s", strerror(errno));
	if (!write_text(mount_point, "cgroup.subtree_control", "+memory"))
		skip("no memory controller in cgroup2: %s", strerror(errno));
	snprintf(group, sizeof(group), "%s/ummunotify-%d", mount_point,
		 getpid());
	CHECK_EQ(mkdir(group, 0700), 0);
	snprintf(pid, sizeof(pid), "%d", getpid());
	CHECK(write_text(group, "cgroup.procs", pid));
	return group;
}

static void leave_cgroup(const char *group)
{
	char pid[16], *slash, parent[256];

	snprintf(pid, sizeof(pid), "%d", getpid());
	snprintf(parent, sizeof(parent), "%s", group);
	slash = strrchr(parent, '/');
	*slash = '\0';
	CHECK(write_text(parent, "cgroup.procs", pid));
	CHECK_EQ(rmdir(group), 0);
	CHECK_EQ(umount2(parent, MNT_DETACH), 0);
	CHECK_EQ(rmdir(parent), 0);
}

static long charged(const char *group)
{
	char path[256];
	FILE *file;
	long bytes;

	snprintf(path, sizeof(path), "%s/memory.current", group);
	file = fopen(path, "r");
	CHECK(file);
	CHECK_EQ(fscanf(file, "%ld", &bytes), 1);
	fclose(file);
	return bytes;
}

static void regions_are_charged_to_the_memory_cgroup(const void *unused)
{
	enum { REGIONS = 50000, BYTES_EACH = 96 };
	const char *group = enter_cgroup();
	struct device device = open_device(0);
	long before = charged(group), after;

	for (unsigned int i = 0; i < REGIONS; i++)
		register_region(&device, NULL, page_size(), i);
	after = charged(group);
	note("%ld bytes for each region", (after - before) / REGIONS);
	close_device(&device);
	leave_cgroup(group);
	CHECK(after - before >= (long)REGIONS * BYTES_EACH);
}

/* "What prevents the obvious DoS which occurs when I just let them queue up?" */
static void never_reading_costs_no_memory(const void *unused)
{
	enum { REGIONS = 100, ZAPS = 20000, SLACK = 256 << 10 };
	const char *group = enter_cgroup();
	struct device device = open_device(0);
	char *page = map_pages(1);
	long before, after;

	for (unsigned int i = 0; i < REGIONS; i++)
		register_region(&device, page, page_size(), i);
	zap(page, 1);
	before = charged(group);
	for (int i = 0; i < ZAPS; i++)
		zap(page, 1);
	after = charged(group);
	CHECK_EQ(generation(&device), ZAPS + 1);
	CHECK_EQ(drain(&device), REGIONS);
	leave_cgroup(group);
	/* A list entry of 16 bytes per report would be 32 MB. */
	CHECK(after - before <= SLACK);
}

static void an_unprivileged_user_can_use_it(const void *unused)
{
	struct stat status;
	struct device device;
	char *page;

	CHECK_EQ(stat(DEVICE_PATH, &status), 0);
	if (!(status.st_mode & 0004)) {
		if (getenv("UMMUNOTIFY_RULE_INSTALLED"))
			FAIL("the udev rule has not made it readable");
		skip("no udev rule here: " DEVICE_PATH " is for root only");
	}
	CHECK_EQ(status.st_mode & 0222, 0);
	if (geteuid() == 0) {
		CHECK_EQ(setgroups(0, NULL), 0);
		CHECK_EQ(setgid(NOBODY), 0);
		CHECK_EQ(setuid(NOBODY), 0);
	}
	CHECK(geteuid() != 0);
	device = open_device(0);
	page = map_pages(1);
	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
	CHECK_EQ(generation(&device), 1);
}

static const struct test tests[] = {
	TEST(the_default_limit_is_there_to_be_read),
	TEST(past_max_regions_is_enospc),
	TEST(a_lower_limit_takes_nothing_away),
	TEST(regions_are_charged_to_the_memory_cgroup),
	TEST(never_reading_costs_no_memory),
	TEST(an_unprivileged_user_can_use_it),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
		.clean_up	= restore_limit,
	};

	default_limit = get_limit();
	return run_suite(&suite, argc - 1, argv + 1);
}
