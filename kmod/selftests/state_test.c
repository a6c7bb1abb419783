// SPDX-License-Identifier: GPL-2.0
/*
 * State words: whether one region is what it was, by one load.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "device.h"
#include "flight.h"

#define BUSY	UMMUNOTIFY_STATE_BUSY
#define ALL	(UMMUNOTIFY_FEATURE_CAUSE | UMMUNOTIFY_FEATURE_FILTER |	\
		 UMMUNOTIFY_FEATURE_STATE | UMMUNOTIFY_FEATURE_ONCE)
#define UNMAP	UMMUNOTIFY_EVENT_CAUSE_UNMAP
#define CLEAR	UMMUNOTIFY_EVENT_CAUSE_CLEAR
#define PROTECT	UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING

static const void *try_map_states(const struct device *device, size_t pages,
				  int protection)
{
	void *states = mmap(NULL, pages * page_size(), protection, MAP_SHARED,
			    device->fd, UMMUNOTIFY_STATE_OFFSET);

	return states == MAP_FAILED ? NULL : states;
}

static const void *map_states(const struct device *device, size_t pages)
{
	const void *states = try_map_states(device, pages, PROT_READ);

	CHECK(states);
	return states;
}

static struct device open_with_states(const void **states)
{
	struct device device = open_device_with(ALL, O_NONBLOCK);

	*states = map_states(&device, 1);
	return device;
}

static void watch(const struct device *device, const char *start, size_t pages,
		  u64 cookie, u32 flags, u32 slot)
{
	CHECK_EQ(try_register_with(device->fd, address(start),
				   address(start) + pages * page_size(),
				   cookie, flags, slot), 0);
}

static u64 state(const void *states, u32 slot)
{
	return ummunotify_load_state(states, slot);
}

/* Return: the state, which is an idle one. */
static u64 idle(const void *states, u32 slot)
{
	u64 value = state(states, slot);

	if (value & BUSY)
		FAIL("slot %u is busy: %llx", slot, value);
	return value;
}

static void each_change_of_the_region_changes_its_state(const void *unused)
{
	const void *states;
	struct device device = open_with_states(&states);
	char *pages = map_pages(4);
	u64 first, second;

	watch(&device, pages, 2, 1, 0, 1);
	watch(&device, pages + 2 * page_size(), 2, 2, 0, 2);
	first = idle(states, 1);
	second = idle(states, 2);
	for (int change = 0; change < 5; change++) {
		u64 before = first;

		/* Whether its report was read or not. */
		zap(pages, 1);
		first = idle(states, 1);
		CHECK(first > before);
		CHECK_EQ(state(states, 2), second);
		if (change % 2)
			drain(&device);
	}
	CHECK_EQ(munmap(pages + 3 * page_size(), page_size()), 0);
	CHECK(idle(states, 2) > second);
	CHECK_EQ(state(states, 1), first);
}

static void what_is_filtered_out_does_not_change_the_state(const void *unused)
{
	const void *states;
	struct device device = open_with_states(&states);
	char *page = map_pages(1);
	u64 before;

	watch(&device, page, 1, 1, UNMAP, 1);
	/* Somebody asks for all of it. */
	watch(&device, page, 1, 2, 0, 0);
	before = idle(states, 1);
	zap(page, 1);
	CHECK_EQ(mprotect(page, page_size(), PROT_READ), 0);
	CHECK_EQ(state(states, 1), before);
	CHECK_EQ(munmap(page, page_size()), 0);
	CHECK(idle(states, 1) > before);
}

static void the_state_is_busy_while_a_change_is_under_way(const void *unused)
{
	struct flight flight;
	struct device device;
	const void *states;
	char *pages = map_pages(3);
	u64 hit, other, filtered;

	prepare_flights(&flight, 1);
	device = open_with_states(&states);
	watch(&device, pages, 2, 1, 0, 1);
	watch(&device, pages + 2 * page_size(), 1, 2, 0, 2);
	watch(&device, pages, 2, 3, UNMAP | PROTECT, 3);
	hit = idle(states, 1);
	other = idle(states, 2);
	filtered = idle(states, 3);
	begin_flight(&flight, pages + page_size(), 1);
	CHECK(state(states, 1) & BUSY);
	CHECK(state(states, 1) > hit);
	CHECK_EQ(state(states, 2), other);
	CHECK_EQ(state(states, 3), filtered);
	/* To read its report does not end it. */
	CHECK_EQ(drain(&device), 1);
	CHECK(state(states, 1) & BUSY);
	end_flight(&flight);
	CHECK(idle(states, 1) > hit);
	CHECK_EQ(state(states, 2), other);
	CHECK_EQ(state(states, 3), filtered);
}

static void a_region_registered_meanwhile_is_busy_until_the_end(const void *unused)
{
	struct flight flight;
	struct device device;
	const void *states;
	char *pages = map_pages(3);

	prepare_flights(&flight, 1);
	device = open_with_states(&states);
	begin_flight(&flight, pages, 2);
	watch(&device, pages + page_size(), 2, 1, 0, 1);
	watch(&device, pages + 2 * page_size(), 1, 2, 0, 2);
	watch(&device, pages, 2, 3, UNMAP, 3);
	watch(&device, pages, 2, 4, CLEAR, 4);
	CHECK(state(states, 1) & BUSY);
	idle(states, 2);
	idle(states, 3);
	CHECK(state(states, 4) & BUSY);
	/* One that comes and goes is not the end of the other. */
	zap(pages + page_size(), 1);
	CHECK(state(states, 1) & BUSY);
	CHECK(state(states, 4) & BUSY);
	end_flight(&flight);
	idle(states, 1);
	idle(states, 4);
	/* And nothing is left over. */
	for (int i = 0; i < 3; i++) {
		begin_flight(&flight, pages, 2);
		CHECK(state(states, 1) & BUSY);
		end_flight(&flight);
		idle(states, 1);
		unregister_region(&device, 1);
		watch(&device, pages + page_size(), 2, 1, 0, 1);
		idle(states, 1);
	}
}

static void overlapping_changes_are_over_with_the_last_of_them(const void *unused)
{
	enum { FLIGHTS = 4 };
	struct flight flight[FLIGHTS];
	struct device device;
	const void *states;
	char *pages = map_pages(4);

	prepare_flights(flight, FLIGHTS);
	device = open_with_states(&states);
	watch(&device, pages, 4, 1, 0, 1);
	begin_flight(&flight[0], pages, 2);
	watch(&device, pages, 4, 2, 0, 2);
	begin_flight(&flight[1], pages + page_size(), 2);
	/* Two with the same range. */
	begin_flight(&flight[2], pages + page_size(), 2);
	watch(&device, pages, 4, 3, 0, 3);
	begin_flight(&flight[3], pages + 3 * page_size(), 1);
	for (int i = 0; i < FLIGHTS; i++) {
		for (u32 slot = 1; slot <= 3; slot++)
			CHECK(state(states, slot) & BUSY);
		/* In another order than they began. */
		end_flight(&flight[(i + 2) % FLIGHTS]);
	}
	for (u32 slot = 1; slot <= 3; slot++)
		idle(states, slot);
}

/* More than the driver can remember. */
static void a_crowd_of_changes_never_looks_idle(const void *unused)
{
	enum { FLIGHTS = 80 };
	static struct flight flight[FLIGHTS];
	struct device device;
	const void *states;
	char *pages = map_pages(FLIGHTS);

	prepare_flights(flight, FLIGHTS);
	device = open_with_states(&states);
	watch(&device, pages, FLIGHTS, 1, 0, 1);
	for (int i = 0; i < FLIGHTS; i++)
		begin_flight(&flight[i], pages + i * page_size(), 1);
	watch(&device, pages, FLIGHTS, 2, 0, 2);
	for (int i = 0; i < FLIGHTS; i++) {
		CHECK(state(states, 1) & BUSY);
		CHECK(state(states, 2) & BUSY);
		/* Those of which only the number is known come in the middle. */
		end_flight(&flight[(i + FLIGHTS / 2) % FLIGHTS]);
	}
	idle(states, 1);
	/* It is not known any more what was going on when it was registered. */
	CHECK(state(states, 2) & BUSY);
	zap(pages, 1);
	CHECK(state(states, 2) & BUSY);
	unregister_region(&device, 2);
	watch(&device, pages, FLIGHTS, 2, 0, 2);
	idle(states, 2);
}

static void wait_for_flag(bool *flag)
{
	while (!__atomic_load_n(flag, __ATOMIC_ACQUIRE))
		sched_yield();
}

static void set_flag(bool *flag)
{
	__atomic_store_n(flag, true, __ATOMIC_RELEASE);
}

struct negotiation {
	struct device	device;
	bool		go;
	pid_t		tid;
};

static void *negotiate(void *arg)
{
	struct negotiation *negotiation = arg;
	u32 features = UMMUNOTIFY_FEATURE_STATE;

	wait_for_flag(&negotiation->go);
	__atomic_store_n(&negotiation->tid, gettid(), __ATOMIC_RELEASE);
	CHECK_EQ(try_exchange(negotiation->device.fd, &features), 0);
	CHECK_EQ(features, UMMUNOTIFY_FEATURE_STATE);
	return NULL;
}

static void release_when_it_waits(int socket, void *arg)
{
	/* So that its sender has sent one before, and needs no page for that. */
	receive_word(socket);
	wait_until_in_syscall(receive_word(socket), SYS_ioctl);
	release_flight(arg);
}

/*
 * Or nothing would be known of it.  While the negotiation waits, and others for it,
 * this process might wait for its own memory: another one ends the change.
 */
static void states_begin_when_nothing_is_under_way(const void *unused)
{
	struct negotiation negotiation = { .go = false };
	char *page = map_pages(1);
	struct flight flight;
	const void *states;
	pthread_t thread;
	struct peer peer;
	pid_t tid;

	prepare_flights(&flight, 1);
	negotiation.device = open_device_plain(O_NONBLOCK);
	thread = start_thread(negotiate, &negotiation);
	peer = start_peer(release_when_it_waits, &flight);
	send_word(peer.socket, 0);
	begin_flight(&flight, page, 1);
	set_flag(&negotiation.go);
	while (!(tid = __atomic_load_n(&negotiation.tid, __ATOMIC_ACQUIRE)))
		continue;
	send_word(peer.socket, tid);
	wait_for_flight(&flight);
	join_thread(thread);
	join_peer(&peer);
	states = map_states(&negotiation.device, 1);
	watch(&negotiation.device, page, 1, 1, 0, 1);
	idle(states, 1);
	zap(page, 1);
	idle(states, 1);
}

/*
 * A change of many regions, which lets others in between: regions that are
 * registered meanwhile are counted once, and settle.
 */

struct crowded {
	char		*page;
	unsigned int	wanted;
	unsigned int	done;
};

static void *zap_when_told(void *arg)
{
	struct crowded *crowded = arg;
	unsigned int done = 0;

	for (;;) {
		while (__atomic_load_n(&crowded->wanted, __ATOMIC_ACQUIRE) == done)
			continue;
		zap(crowded->page, 1);
		__atomic_store_n(&crowded->done, ++done, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void newcomers_in_the_middle_of_a_change_settle(const void *unused)
{
	enum { ROUNDS = 200, MOST_ROUNDS = 2000, CROWD = 4000, NEWCOMERS = 400 };
	static struct crowded crowded;
	struct device device = open_device_with(ALL, O_NONBLOCK);
	const void *states = map_states(&device, 2);
	unsigned int in_the_middle = 0;

	crowded.page = map_pages(1);
	for (u64 i = 0; i < CROWD; i++)
		watch(&device, crowded.page, 1, NEWCOMERS + 1 + i, 0, 0);
	start_thread(zap_when_told, &crowded);
	for (unsigned int round = 1;
	     round <= (in_the_middle ? ROUNDS : MOST_ROUNDS); round++) {
		const u64 before = generation(&device);
		unsigned int busy = 0;

		__atomic_store_n(&crowded.wanted, round, __ATOMIC_RELEASE);
		/* The first one of the crowd was reported, and the others not yet. */
		while (generation(&device) == before)
			continue;
		for (u32 i = 1; i <= NEWCOMERS; i++) {
			watch(&device, crowded.page, 1,
			      (i % 2) ? i : CROWD + NEWCOMERS + i, 0, i);
			busy += state(states, i) & BUSY;
		}
		while (__atomic_load_n(&crowded.done, __ATOMIC_ACQUIRE) != round)
			sched_yield();
		in_the_middle += busy;
		for (u32 i = 1; i <= NEWCOMERS; i++) {
			idle(states, i);
			unregister_region(&device, (i % 2) ? i :
					  CROWD + NEWCOMERS + i);
		}
	}
	note("%u were registered in the middle", in_the_middle);
	CHECK(in_the_middle);
}

static void a_free_slot_is_busy(const void *unused)
{
	const void *states;
	struct device device = open_with_states(&states);
	char *page = map_pages(1);
	u64 value = 0;

	CHECK(state(states, 1) & BUSY);
	for (u64 cookie = 1; cookie < 5; cookie++) {
		u64 former = value;

		watch(&device, page, 1, cookie, 0, 1);
		value = idle(states, 1);
		/* Also for who has missed that it was another region's. */
		CHECK(value > former);
		unregister_region(&device, cookie);
		CHECK(state(states, 1) & BUSY);
		CHECK(state(states, 1) > value);
	}
	watch(&device, page, 1, 1, UMMUNOTIFY_REGION_FLAG_ONCE, 1);
	value = idle(states, 1);
	zap(page, 1);
	CHECK_EQ(drain(&device), 1);
	CHECK(state(states, 1) & BUSY);
	CHECK(state(states, 1) > value);
}

/* Whatever is done around it while it is registered. */
static void an_empty_region_is_idle(const void *unused)
{
	enum { REGIONS = 500, TIMES = 20 };
	const void *states;
	struct device device = open_with_states(&states);
	char *pages = map_pages(2);
	struct zapper zapper;

	start_zapper(&zapper, pages, 2);
	for (unsigned int i = 0; i < TIMES; i++) {
		for (u32 slot = 1; slot < REGIONS; slot++)
			watch(&device, pages + page_size(), 0, slot, 0, slot);
		for (u32 slot = 1; slot < REGIONS; slot++) {
			CHECK(!(state(states, slot) & BUSY));
			unregister_region(&device, slot);
		}
	}
	stop_zapper(&zapper);
	expect_nothing(&device);
}

static void a_slot_has_one_region(const void *unused)
{
	const void *states;
	struct device device = open_with_states(&states);
	u64 page = address(map_pages(1));
	u32 slots = page_size() / sizeof(u64);

	CHECK_EQ(try_register_with(device.fd, page, page + 1, 1, 0, 7), 0);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 2, 0, 7), -EBUSY);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 1, 0, 8), -EINVAL);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 2, 0, 8), 0);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 3, 0, slots - 1),
		 0);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 4, 0, slots),
		 -EINVAL);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 4, 0, -1), -EINVAL);
	/* Those without a slot are as many as one likes. */
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 4, 0, 0), 0);
	CHECK_EQ(try_register_with(device.fd, page, page + 1, 5, 0, 0), 0);
}

static void states_are_for_those_who_asked(const void *unused)
{
	struct device with = open_device_with(UMMUNOTIFY_FEATURE_STATE, 0);
	struct device without = open_device_with(UMMUNOTIFY_FEATURE_CAUSE, 0);
	u64 page = address(map_pages(1));

	CHECK(!try_map_states(&without, 1, PROT_READ));
	CHECK_EQ(errno, EINVAL);
	CHECK_EQ(try_register_with(without.fd, page, page + 1, 1, 0, 7), 0);
	/* There is no area yet. */
	CHECK_EQ(try_register_with(with.fd, page, page + 1, 1, 0, 7), -EINVAL);
}

static void the_area_is_as_large_as_first_mapped(const void *unused)
{
	struct device device = open_device_with(UMMUNOTIFY_FEATURE_STATE, 0);
	u32 slots = page_size() / sizeof(u64);
	char *page = map_pages(1);
	const void *states, *again;

	/* 8 MB are the limit. */
	CHECK(!try_map_states(&device, (8 << 20) / page_size() + 1, PROT_READ));
	CHECK_EQ(errno, EINVAL);
	CHECK(!try_map_states(&device, 3, PROT_READ | PROT_WRITE));
	CHECK_EQ(errno, EACCES);
	states = map_states(&device, 3);
	CHECK(!try_map_states(&device, 4, PROT_READ));
	CHECK_EQ(errno, EINVAL);
	CHECK_EQ(mprotect((void *)states, page_size(), PROT_READ | PROT_WRITE),
		 -1);
	watch(&device, page, 1, 1, 0, 3 * slots - 1);
	idle(states, 3 * slots - 1);
	again = map_states(&device, 3);
	zap(page, 1);
	CHECK_EQ(state(again, 3 * slots - 1), idle(states, 3 * slots - 1));
	/* A part of it, a kept one. */
	CHECK_EQ(state(map_states(&device, 1), 0), BUSY);
	CHECK_EQ(munmap((void *)states, 2 * page_size()), 0);
	zap(page, 1);
	CHECK_EQ(state(again, 3 * slots - 1), idle(states, 3 * slots - 1));
}

static void a_kept_area_is_busy_after_close(const void *unused)
{
	const void *states;
	struct device device = open_with_states(&states);
	char *page = map_pages(1);
	u64 before;

	watch(&device, page, 1, 1, 0, 1);
	watch(&device, page, 1, 2, 0, 2);
	before = idle(states, 1);
	close_device(&device);
	CHECK(state(states, 1) & BUSY);
	CHECK(state(states, 1) > before);
	CHECK(state(states, 2) & BUSY);
	zap(page, 1);
	CHECK(state(states, 1) & BUSY);
	CHECK_EQ(munmap((void *)states, page_size()), 0);
}

struct closing {
	struct device	device;
	bool		go;
};

static void *close_it(void *arg)
{
	struct closing *closing = arg;

	wait_for_flag(&closing->go);
	CHECK_EQ(close(closing->device.fd), 0);
	return NULL;
}

static void close_in_the_middle_of_a_change(const void *unused)
{
	char *page = map_pages(1);
	struct flight flight;
	struct closing closing = { .go = false };
	const void *states;
	pthread_t thread;
	u64 before;

	prepare_flights(&flight, 1);
	closing.device = open_with_states(&states);
	watch(&closing.device, page, 1, 1, 0, 1);
	thread = start_thread(close_it, &closing);
	begin_flight(&flight, page, 1);
	before = state(states, 1);
	set_flag(&closing.go);
	/* The last word, and the end of the change does not take it back. */
	while (state(states, 1) == before)
		sched_yield();
	end_flight(&flight);
	CHECK(state(states, 1) & BUSY);
	join_thread(thread);
	CHECK(state(states, 1) & BUSY);
}

/* The peer opens it, and tells by its fd. */
static void watch_and_leave(int socket, void *arg)
{
	struct device device = open_device_with(UMMUNOTIFY_FEATURE_STATE, 0);
	const void *states = map_states(&device, 1);
	char *page = map_pages(1);

	watch(&device, page, 1, 1, 0, 1);
	idle(states, 1);
	send_fd(socket, device.fd);
	receive_word(socket);
}

static void the_end_of_the_process_is_a_change_for_ever(const void *unused)
{
	struct peer peer = start_peer(watch_and_leave, NULL);
	struct device device = { .fd = receive_fd(peer.socket) };
	const void *states = map_states(&device, 1);
	u64 before = idle(states, 1);

	send_word(peer.socket, 0);
	join_peer(&peer);
	CHECK(state(states, 1) > before);
	CHECK(state(states, 1) & BUSY);
}

/*
 * Threads that change memory, and one that registers anew and looks: what it finds
 * while the state is idle must be there as long as the state stays the same.
 */

struct reused {
	char	*pages;
	u64	changes[2];
	bool	stop;
};

static void *change_one(void *arg, int which)
{
	struct reused *reused = arg;
	char *page = reused->pages + which * page_size();

	while (!__atomic_load_n(&reused->stop, __ATOMIC_ACQUIRE)) {
		*page = 1;
		zap(page, 1);
		__atomic_add_fetch(&reused->changes[which], 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void *change_first(void *arg)
{
	return change_one(arg, 0);
}

static void *change_second(void *arg)
{
	return change_one(arg, 1);
}

static void an_idle_state_proves_that_no_change_came_in_between(const void *unused)
{
	enum { ENOUGH = 20000 };
	static struct reused reused;
	const void *states;
	struct device device = open_with_states(&states);
	unsigned int proofs = 0, changed = 0;
	pthread_t threads[2];

	reused.pages = map_pages(2);
	threads[0] = start_thread(change_first, &reused);
	threads[1] = start_thread(change_second, &reused);
	for (int i = 0; i < ENOUGH; i++) {
		u64 before, after, changes;

		watch(&device, reused.pages, 2, i, 0, 1);
		before = state(states, 1);
		changes = __atomic_load_n(&reused.changes[0], __ATOMIC_ACQUIRE);
		changes += __atomic_load_n(&reused.changes[1], __ATOMIC_ACQUIRE);
		sched_yield();
		after = __atomic_load_n(&reused.changes[0], __ATOMIC_ACQUIRE) +
			__atomic_load_n(&reused.changes[1], __ATOMIC_ACQUIRE);
		/*
		 * Each counts after its change: two more of one are a whole
		 * change in between, and the sum of both tells that from three.
		 */
		if (before == state(states, 1) && !(before & BUSY)) {
			proofs++;
			CHECK(after - changes <= 2);
		} else {
			changed++;
		}
		unregister_region(&device, i);
	}
	set_flag(&reused.stop);
	join_thread(threads[0]);
	join_thread(threads[1]);
	note("%u times idle and the same, %u times not", proofs, changed);
	CHECK(proofs);
	CHECK(changed);
	/* All is over: no change was counted that did not end. */
	watch(&device, reused.pages, 2, ENOUGH, 0, 1);
	idle(states, 1);
}

static const struct test tests[] = {
	TEST(each_change_of_the_region_changes_its_state),
	TEST(what_is_filtered_out_does_not_change_the_state),
	TEST(the_state_is_busy_while_a_change_is_under_way),
	TEST(a_region_registered_meanwhile_is_busy_until_the_end),
	TEST(overlapping_changes_are_over_with_the_last_of_them),
	TEST(a_crowd_of_changes_never_looks_idle),
	TEST(states_begin_when_nothing_is_under_way),
	TEST(newcomers_in_the_middle_of_a_change_settle),
	TEST(a_free_slot_is_busy),
	TEST(an_empty_region_is_idle),
	TEST(a_slot_has_one_region),
	TEST(states_are_for_those_who_asked),
	TEST(the_area_is_as_large_as_first_mapped),
	TEST(a_kept_area_is_busy_after_close),
	TEST(close_in_the_middle_of_a_change),
	TEST(the_end_of_the_process_is_a_change_for_ever),
	TEST(an_idle_state_proves_that_no_change_came_in_between),
};

int main(int argc, char **argv)
{
	const struct suite suite = {
		.tests		= tests,
		.nr_tests	= ARRAY_SIZE(tests),
	};

	return run_suite(&suite, argc - 1, argv + 1);
}
