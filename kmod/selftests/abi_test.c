// SPDX-License-Identifier: GPL-2.0
/*
 * The interface: numbers, and what each call accepts and refuses.  Also built
 * for 32 bits, where every ioctl goes through the compat entry.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __aarch64__
#include <sys/prctl.h>
#endif
#ifdef __x86_64__
#include <sys/syscall.h>
#endif

#include "device.h"

static void numbers_are_those_of_2010(const void *unused)
{
	CHECK_EQ((u32)UMMUNOTIFY_EXCHANGE_FEATURES, 0xc0045501u);
	CHECK_EQ((u32)UMMUNOTIFY_REGISTER_REGION, 0x40205502u);
	CHECK_EQ((u32)UMMUNOTIFY_UNREGISTER_REGION, 0x40085503u);
	CHECK_EQ(UMMUNOTIFY_EVENT_TYPE_INVAL, 0);
	CHECK_EQ(UMMUNOTIFY_EVENT_TYPE_LAST, 1);
	CHECK_EQ(UMMUNOTIFY_EVENT_FLAG_HINT, 1);
	CHECK_EQ(UMMUNOTIFY_GENERATION_OFFSET, 0);
	CHECK_EQ(UMMUNOTIFY_GENERATION_SIZE, 8);
}

static void layouts_are_those_of_2010(const void *unused)
{
	CHECK_EQ(sizeof(struct ummunotify_register_ioctl), 32);
	CHECK_EQ(offsetof(struct ummunotify_register_ioctl, start), 0);
	CHECK_EQ(offsetof(struct ummunotify_register_ioctl, end), 8);
	CHECK_EQ(offsetof(struct ummunotify_register_ioctl, user_cookie), 16);
	CHECK_EQ(offsetof(struct ummunotify_register_ioctl, flags), 24);
	CHECK_EQ(offsetof(struct ummunotify_register_ioctl, reserved), 28);
	CHECK_EQ(sizeof(((struct ummunotify_register_ioctl *)0)->start), 8);
	CHECK_EQ(sizeof(((struct ummunotify_register_ioctl *)0)->flags), 4);

	CHECK_EQ(sizeof(struct ummunotify_event), 32);
	CHECK_EQ(offsetof(struct ummunotify_event, type), 0);
	CHECK_EQ(offsetof(struct ummunotify_event, flags), 4);
	CHECK_EQ(offsetof(struct ummunotify_event, hint_start), 8);
	CHECK_EQ(offsetof(struct ummunotify_event, hint_end), 16);
	CHECK_EQ(offsetof(struct ummunotify_event, user_cookie_counter), 24);
	CHECK_EQ(sizeof(((struct ummunotify_event *)0)->type), 4);
	CHECK_EQ(sizeof(((struct ummunotify_event *)0)->hint_start), 8);
}

/*
 * Not a misc device, as in 2010: who opens one has the mutex of them all, and
 * here waits for the memory map of a process that may not let go of it.
 */
static void its_open_holds_up_no_misc_device(const void *unused)
{
	struct stat status;

	CHECK_EQ(stat(DEVICE_PATH, &status), 0);
	CHECK(S_ISCHR(status.st_mode));
	CHECK(major(status.st_rdev) != 10);
}

static void open_for_writing_is_refused(const void *unused)
{
	static const int modes[] = { O_WRONLY, O_RDWR, O_RDWR | O_NONBLOCK };

	for (size_t i = 0; i < ARRAY_SIZE(modes); i++) {
		errno = 0;
		CHECK_EQ(open(DEVICE_PATH, modes[i]), -1);
		CHECK_EQ(errno, EINVAL);
	}
}

static void a_read_only_fd_cannot_be_written(const void *unused)
{
	struct device device = open_device(0);

	CHECK_EQ(write(device.fd, "", 1), -1);
	CHECK_EQ(errno, EBADF);
}

static void there_is_no_position(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	struct ummunotify_event event;
	struct iovec iov = { .iov_base = &event, .iov_len = sizeof(event) };
	char *page = map_pages(1);

	CHECK_EQ(lseek(device.fd, 0, SEEK_SET), -1);
	CHECK_EQ(errno, ESPIPE);
	CHECK_EQ(lseek(device.fd, 0, SEEK_CUR), -1);
	CHECK_EQ(errno, ESPIPE);
	CHECK_EQ(lseek(device.fd, 32, SEEK_END), -1);
	CHECK_EQ(errno, ESPIPE);

	register_region(&device, page, page_size(), 1);
	zap(page, 1);
	CHECK_EQ(pread(device.fd, &event, sizeof(event), 0), -1);
	CHECK_EQ(errno, ESPIPE);
	CHECK_EQ(preadv(device.fd, &iov, 1, 0), -1);
	CHECK_EQ(errno, ESPIPE);
	/* Neither has taken the report away. */
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void an_unknown_ioctl_is_enotty(const void *unused)
{
	struct device device = open_device(0);
	char argument[64] = "";
	const unsigned int unknown[] = {
		_IO(UMMUNOTIFY_MAGIC, 0),
		_IO(UMMUNOTIFY_MAGIC, 2),
		_IO(UMMUNOTIFY_MAGIC, 4),
		_IOR(UMMUNOTIFY_MAGIC, 1, __u32),
		_IOWR(UMMUNOTIFY_MAGIC, 1, __u64),
		_IOW(UMMUNOTIFY_MAGIC, 2, char[40]),
		_IOR(UMMUNOTIFY_MAGIC, 2, struct ummunotify_register_ioctl),
		_IOW(UMMUNOTIFY_MAGIC, 3, __u32),
		_IOW('u', 3, __u64),
		0x5401, /* TCGETS */
	};

	for (size_t i = 0; i < ARRAY_SIZE(unknown); i++) {
		CHECK_EQ(ioctl(device.fd, unknown[i], argument), -1);
		CHECK_EQ(errno, ENOTTY);
	}
	/* None of them has registered or read anything. */
	CHECK_EQ(try_exchange(device.fd, (u32 *)argument), 0);
}

static void exchange_grants_what_is_defined(const void *unused)
{
	static const u32 masks[] = { 0, 1, 2, 4, 8, 0x80000000, 0xffffffff };

	for (size_t i = 0; i < ARRAY_SIZE(masks); i++) {
		struct device device = open_device(0);
		u32 features = masks[i];

		CHECK_EQ(try_exchange(device.fd, &features), 0);
		CHECK_EQ(features, masks[i] & 0xf);
		close_device(&device);
	}
}

static void exchange_is_accepted_once(const void *unused)
{
	struct device device = open_device(0);
	u32 features = 0;

	CHECK_EQ(try_exchange(device.fd, &features), 0);
	CHECK_EQ(try_exchange(device.fd, &features), -EINVAL);
	CHECK_EQ(try_exchange(device.fd, &features), -EINVAL);
}

static void exchange_after_a_registration_is_refused(const void *unused)
{
	struct device device = open_device(0);
	u32 features = 5;

	register_region(&device, NULL, page_size(), 1);
	CHECK_EQ(try_exchange(device.fd, &features), -EINVAL);
	CHECK_EQ(features, 5);
	unregister_region(&device, 1);
	CHECK_EQ(try_exchange(device.fd, &features), -EINVAL);
}

static void exchange_after_a_read_is_refused(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	struct ummunotify_event event;
	u32 features = 0;

	CHECK_EQ(read_records(device.fd, &event, 1), -EAGAIN);
	CHECK_EQ(try_exchange(device.fd, &features), -EINVAL);
}

static void exchange_belongs_to_the_fd(const void *unused)
{
	struct device first = open_device(0), second = open_device(0);
	u32 features = 0;

	CHECK_EQ(try_exchange(first.fd, &features), 0);
	CHECK_EQ(try_exchange(second.fd, &features), 0);
	/* A duplicate is the same open file. */
	CHECK_EQ(try_exchange(dup(first.fd), &features), -EINVAL);
}

static void a_bad_pointer_is_efault(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *page = map_pages(1);
	u32 features = 0;
	/* The page behind cannot be accessed. */
	char *end = page + page_size();

	CHECK_EQ(try_exchange(device.fd, NULL), -EFAULT);
	CHECK_EQ(try_exchange(device.fd, (void *)(end - 2)), -EFAULT);
	/* That was no exchange. */
	CHECK_EQ(try_exchange(device.fd, &features), 0);

	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_REGISTER_REGION, NULL), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_REGISTER_REGION, end - 31), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_UNREGISTER_REGION, NULL), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_UNREGISTER_REGION, end - 7), -1);
	CHECK_EQ(errno, EFAULT);

	/* Neither a pointer at the very end, nor unaligned, is bad. */
	memset(page, 0, page_size());
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_REGISTER_REGION, end - 32), 0);
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_UNREGISTER_REGION, page + 1), 0);
}

static void exchange_into_read_only_memory_is_efault(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);

	CHECK_EQ(mprotect(page, page_size(), PROT_READ), 0);
	CHECK_EQ(try_exchange(device.fd, (void *)page), -EFAULT);
}

static void arguments_may_be_read_only(const void *unused)
{
	struct device device = open_device(0);
	struct ummunotify_register_ioctl *page = (void *)map_pages(1);

	page->start = 0;
	page->end = page_size();
	page->user_cookie = 7;
	CHECK_EQ(mprotect(page, page_size(), PROT_READ), 0);
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_REGISTER_REGION, page), 0);
	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_UNREGISTER_REGION,
		       &page->user_cookie), 0);
}

static void garbage_in_flags_is_ignored(const void *unused)
{
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct ummunotify_register_ioctl region = {
		.start		= address(page),
		.end		= address(page) + page_size(),
		.user_cookie	= 3,
		.flags		= 0xffffffff,
		.reserved	= 0xdeadbeef,
	};

	CHECK_EQ(ioctl(device.fd, UMMUNOTIFY_REGISTER_REGION, &region), 0);
	zap(page, 1);
	CHECK_EQ(generation(&device), 1);
	expect_inval(&device, 3, page, page_size(), HINT);
	expect_last(&device, 1);
}

static void an_inverted_range_is_einval(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	const u64 top = ~0ull;

	CHECK_EQ(try_register(device.fd, 1, 0, 1), -EINVAL);
	CHECK_EQ(try_register(device.fd, 0x2000, 0x1fff, 1), -EINVAL);
	CHECK_EQ(try_register(device.fd, top, 0, 1), -EINVAL);
	/* None of them is registered. */
	CHECK_EQ(try_unregister(device.fd, 1), -EINVAL);
}

static void any_upright_range_is_accepted(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	const u64 top = ~0ul;
	char *page = map_pages(1);

	/* Whatever else this process does meets it as well. */
	CHECK_EQ(try_register(device.fd, 0, top, 1), 0);
	zap(page, 1);
	CHECK(generation(&device) >= 1);
	CHECK(drain(&device) >= 1);
	close_device(&device);

	device = open_device(O_NONBLOCK);
	CHECK_EQ(try_register(device.fd, 0, 1, 2), 0);
	CHECK_EQ(try_register(device.fd, top - 1, top, 3), 0);
	CHECK_EQ(try_register(device.fd, address(page) + 1,
			      address(page) + 2, 4), 0);
	zap(page, 1);
	CHECK_EQ(generation(&device), 1);
	expect_inval(&device, 4, page + 1, 1, HINT);
	expect_last(&device, 1);
}

static void an_empty_range_never_reports(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	char *pages = map_pages(3);
	char *middle = pages + page_size();

	CHECK_EQ(try_register(device.fd, 0, 0, 0), 0);
	CHECK_EQ(try_register(device.fd, address(middle), address(middle), 1),
		 0);
	CHECK_EQ(try_register(device.fd, address(middle) + 5,
			      address(middle) + 5, 2), 0);
	CHECK_EQ(try_register(device.fd, ~0ul, ~0ul, 3), 0);
	zap(pages, 3);
	zap(middle, 1);
	CHECK_EQ(munmap(pages, 3 * page_size()), 0);
	CHECK_EQ(generation(&device), 0);
	expect_nothing(&device);

	/* It is a region like any other. */
	CHECK_EQ(try_register(device.fd, 0, 0, 2), -EINVAL);
	unregister_region(&device, 0);
	unregister_region(&device, 1);
	unregister_region(&device, 2);
	unregister_region(&device, 3);
	expect_nothing(&device);
}

static void the_same_cookie_twice_is_einval(const void *unused)
{
	struct device device = open_device(O_NONBLOCK);
	struct device other = open_device(O_NONBLOCK);
	char *pages = map_pages(2);

	register_region(&device, pages, page_size(), 5);
	CHECK_EQ(try_register(device.fd, address(pages),
			      address(pages) + page_size(), 5), -EINVAL);
	CHECK_EQ(try_register(device.fd, 0, 1, 5), -EINVAL);
	/* Cookies belong to the fd. */
	register_region(&other, pages, page_size(), 5);

	/* The refused ones have changed nothing. */
	zap(pages, 1);
	CHECK_EQ(generation(&device), 1);
	expect_inval(&device, 5, pages, page_size(), HINT);
	expect_last(&device, 1);
	unregister_region(&device, 5);
	CHECK_EQ(try_unregister(device.fd, 5), -EINVAL);

	/* Once free, the cookie may name another region. */
	register_region(&device, pages + page_size(), page_size(), 5);
	zap(pages, 2);
	expect_inval(&device, 5, pages + page_size(), page_size(), HINT);
	expect_last(&device, 2);
}

static void an_unknown_cookie_is_einval(const void *unused)
{
	struct device device = open_device(0);

	CHECK_EQ(try_unregister(device.fd, 0), -EINVAL);
	register_region(&device, NULL, page_size(), 2);
	CHECK_EQ(try_unregister(device.fd, 1), -EINVAL);
	CHECK_EQ(try_unregister(device.fd, 3), -EINVAL);
	unregister_region(&device, 2);
	CHECK_EQ(try_unregister(device.fd, 2), -EINVAL);
}

static void a_cookie_is_any_64_bits(const void *unused)
{
	/* Neither ascending, nor distinct in either half. */
	static const u64 cookies[] = {
		0, ~0ull, 0x100000000, 1, 0x8000000000000000, 0xffffffff,
		0xffffffff00000000, 0x7fffffffffffffff, 0x100000001,
	};
	struct device device = open_device(0);
	char *page = map_pages(1);
	struct ummunotify_event events[ARRAY_SIZE(cookies) + 1];
	bool seen[ARRAY_SIZE(cookies)] = {};

	for (size_t i = 0; i < ARRAY_SIZE(cookies); i++)
		register_region(&device, page, page_size(), cookies[i]);
	for (size_t i = 0; i < ARRAY_SIZE(cookies); i++)
		CHECK_EQ(try_register(device.fd, 0, 1, cookies[i]), -EINVAL);
	zap(page, 1);
	CHECK_EQ(generation(&device), 1);
	CHECK_EQ(read_records(device.fd, events, ARRAY_SIZE(events)),
		 ARRAY_SIZE(events));
	for (size_t i = 0; i < ARRAY_SIZE(cookies); i++) {
		for (size_t j = 0; j < ARRAY_SIZE(cookies); j++) {
			if (events[j].user_cookie_counter == cookies[i])
				seen[i] = true;
		}
	}
	for (size_t i = ARRAY_SIZE(cookies); i-- > 0;) {
		CHECK(seen[i]);
		unregister_region(&device, cookies[i]);
	}
}

static void mmap_of_one_page_at_offset_0_only(const void *unused)
{
	struct device device = open_device(0);
	size_t page = page_size();
	void *map;

	for (size_t length = page + 1; length <= 4 * page; length += page) {
		map = mmap(NULL, length, PROT_READ, MAP_SHARED, device.fd, 0);
		CHECK(map == MAP_FAILED);
		CHECK_EQ(errno, EINVAL);
	}
	for (size_t offset = page; offset <= 4 * page; offset += page) {
		map = mmap(NULL, page, PROT_READ, MAP_SHARED, device.fd,
			   offset);
		CHECK(map == MAP_FAILED);
		CHECK_EQ(errno, EINVAL);
	}
	map = mmap(NULL, page, PROT_READ, MAP_SHARED, device.fd, 0);
	CHECK(map != MAP_FAILED);
	CHECK_EQ(munmap(map, page), 0);
	map = mmap(NULL, 1, PROT_READ, MAP_SHARED | MAP_POPULATE, device.fd, 0);
	CHECK(map != MAP_FAILED);
}

static void the_counter_cannot_be_written(const void *unused)
{
	struct device device = open_device(0);
	size_t page = page_size();
	void *map;

	map = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, device.fd,
		   0);
	CHECK(map == MAP_FAILED);
	CHECK_EQ(errno, EACCES);
	map = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE, device.fd,
		   0);
	CHECK(map == MAP_FAILED);
	CHECK_EQ(errno, EACCES);

	map = (void *)device.counter;
	CHECK_EQ(mprotect(map, page, PROT_READ | PROT_WRITE), -1);
	CHECK_EQ(errno, EACCES);
	map = mmap(NULL, page, PROT_READ, MAP_PRIVATE, device.fd, 0);
	CHECK(map != MAP_FAILED);
	CHECK_EQ(mprotect(map, page, PROT_WRITE), -1);
	CHECK_EQ(errno, EACCES);
	/* Neither may the kernel write there for us. */
	CHECK_EQ(try_exchange(device.fd, map), -EFAULT);
}

static void the_counter_mapping_does_not_grow(const void *unused)
{
	struct device device = open_device(0);
	void *map;

	map = mremap((void *)device.counter, page_size(), 2 * page_size(),
		     MREMAP_MAYMOVE);
	CHECK(map == MAP_FAILED);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(generation(&device), 0);
}

static void the_counter_page_leaks_no_memory(const void *unused)
{
	for (int i = 0; i < 64; i++) {
		struct device device = open_device(0);
		const unsigned char *bytes = device.counter;

		for (size_t j = 0; j < page_size(); j++)
			CHECK_EQ(bytes[j], 0);
		close_device(&device);
	}
}

static void all_mappings_show_one_counter(const void *unused)
{
	struct device device = open_device(0);
	struct device other = open_device(0);
	char *page = map_pages(1);
	const void *shared, *private;

	shared = mmap(NULL, 8, PROT_READ, MAP_SHARED, dup(device.fd), 0);
	private = mmap(NULL, 8, PROT_READ, MAP_PRIVATE, device.fd, 0);
	CHECK(shared != MAP_FAILED && private != MAP_FAILED);
	register_region(&device, page, page_size(), 1);
	for (unsigned int i = 1; i <= 3; i++) {
		zap(page, 1);
		CHECK_EQ(generation(&device), i);
		CHECK_EQ(ummunotify_load_generation(shared), i);
		CHECK_EQ(ummunotify_load_generation(private), i);
	}
	/* Another open file has its own. */
	CHECK_EQ(generation(&other), 0);
}

static void the_header_loads_both_halves(const void *unused)
{
	static const u64 values[] = {
		0, 1, 0xffffffff, 0x100000000, 0x0123456789abcdef, ~0ull,
	};

	for (size_t i = 0; i < ARRAY_SIZE(values); i++)
		CHECK_EQ(ummunotify_load_generation(&values[i]), values[i]);
}

/* Tagged addresses: pointers whose top bits the hardware ignores. */
#if defined(__aarch64__)
#define TAG	0x0100000000000000
static bool enable_tags(void)
{
	return !prctl(55 /* PR_SET_TAGGED_ADDR_CTRL */, 1, 0, 0, 0);
}
#elif defined(__x86_64__)
#define TAG	0x0200000000000000
static bool enable_tags(void)
{
	return !syscall(SYS_arch_prctl, 0x4002 /* ARCH_ENABLE_TAGGED_ADDR */,
			6);
}
#else
#define TAG	0
static bool enable_tags(void)
{
	return false;
}
#endif

static void a_tagged_address_is_untagged(const void *unused)
{
	struct device device;
	char *page;

	if (!enable_tags())
		skip("neither this processor nor kernel has tagged addresses");
	device = open_device(0);
	page = map_pages(1);
	CHECK_EQ(try_register(device.fd, address(page) | TAG,
			      (address(page) | TAG) + page_size(), 1), 0);
	zap(page, 1);
	expect_inval(&device, 1, page, page_size(), HINT);
	expect_last(&device, 1);
}

static const struct test tests[] = {
	TEST(numbers_are_those_of_2010),
	TEST(layouts_are_those_of_2010),
	TEST(its_open_holds_up_no_misc_device),
	TEST(open_for_writing_is_refused),
	TEST(a_read_only_fd_cannot_be_written),
	TEST(there_is_no_position),
	TEST(an_unknown_ioctl_is_enotty),
	TEST(exchange_grants_what_is_defined),
	TEST(exchange_is_accepted_once),
	TEST(exchange_after_a_registration_is_refused),
	TEST(exchange_after_a_read_is_refused),
	TEST(exchange_belongs_to_the_fd),
	TEST(a_bad_pointer_is_efault),
	TEST(exchange_into_read_only_memory_is_efault),
	TEST(arguments_may_be_read_only),
	TEST(garbage_in_flags_is_ignored),
	TEST(an_inverted_range_is_einval),
	TEST(any_upright_range_is_accepted),
	TEST(an_empty_range_never_reports),
	TEST(the_same_cookie_twice_is_einval),
	TEST(an_unknown_cookie_is_einval),
	TEST(a_cookie_is_any_64_bits),
	TEST(mmap_of_one_page_at_offset_0_only),
	TEST(the_counter_cannot_be_written),
	TEST(the_counter_mapping_does_not_grow),
	TEST(the_counter_page_leaks_no_memory),
	TEST(all_mappings_show_one_counter),
	TEST(the_header_loads_both_halves),
	TEST(a_tagged_address_is_untagged),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
