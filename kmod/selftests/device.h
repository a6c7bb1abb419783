/* SPDX-License-Identifier: GPL-2.0 */
/*
 * /dev/ummunotify, memory to watch, threads and processes, for the tests.
 *
 * What cannot fail in a right test is checked here.  Functions called try_*()
 * and read_*() return a negative error number instead.
 */
#ifndef DEVICE_H
#define DEVICE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <linux/ummunotify.h>

#include "harness.h"

#define DEVICE_PATH	"/dev/ummunotify"

/**
 * struct device - an open fd, and its counter
 * @fd:		of /dev/ummunotify
 * @counter:	the mapped page
 */
struct device {
	int		fd;
	const void	*counter;
};

#define HINT	UMMUNOTIFY_EVENT_FLAG_HINT

static inline u64 address(const void *pointer)
{
	return (uintptr_t)pointer;
}

/*
 * Open it read-only, with more flags, and map the counter.  With
 * UMMUNOTIFY_TEST_FEATURES=1 in the environment it has all features, none of
 * which changes anything for who makes no use of it.
 */
struct device open_device(int flags);
/* Without, whatever the environment says. */
struct device open_device_plain(int flags);
/* With these features, and no others. */
struct device open_device_with(u32 features, int flags);
/* With UMMUNOTIFY_FEATURE_CAUSE. */
struct device open_device_with_causes(int flags);
void close_device(struct device *device);
u64 generation(const struct device *device);

int try_exchange(int fd, u32 *features);
int try_register(int fd, u64 start, u64 end, u64 cookie);
/* With what the negotiated features define. */
int try_register_with(int fd, u64 start, u64 end, u64 cookie, u32 flags,
		      u32 slot);
int try_unregister(int fd, u64 cookie);
void register_region(const struct device *device, const void *start,
		     size_t length, u64 cookie);
void unregister_region(const struct device *device, u64 cookie);

/* Return: number of records, or a negative error number. */
long read_records(int fd, struct ummunotify_event *events, size_t room);
/* With RWF_NOWAIT. */
long read_nowait(const struct device *device, struct ummunotify_event *events,
		 size_t room);

void check_inval(const struct ummunotify_event *event, u64 cookie,
		 const void *start, size_t length, u32 flags);
void check_last(const struct ummunotify_event *event, u64 generation);

/* The next record is this; they read one. */
void expect_inval(const struct device *device, u64 cookie,
		  const void *start, size_t length, u32 flags);
void expect_last(const struct device *device, u64 generation);
/* poll() and a read() that does not wait find nothing. */
void expect_nothing(const struct device *device);

/* Read up to LAST.  Return: number of reports. */
size_t drain(const struct device *device);

/* poll() without waiting.  Return: revents. */
short poll_now(int fd);

size_t page_size(void);

/*
 * Private anonymous memory, written to, in a VMA of its own: neighbours may not
 * be accessed, so that nothing merges with it, and there is no huge page, which
 * would make the kernel tell of more than was changed.
 */
char *map_pages(size_t pages);
/* The same, never touched, with these protection and mapping flags, and fd. */
char *map_untouched(size_t pages, int protection, int flags, int fd);
void touch(char *start, size_t pages);

/* Drop pages: one invalidation of just this range. */
void zap(void *start, size_t pages);

/* A file of the tmpfs, with pages of data. */
int make_shared_file(size_t pages);

pthread_t start_thread(void *(*run)(void *arg), void *arg);
void join_thread(pthread_t thread);

/* A thread that zaps the same pages again and again. */
struct zapper {
	char		*start;
	size_t		pages;
	bool		stop;
	pthread_t	thread;
};

void start_zapper(struct zapper *zapper, char *start, size_t pages);
void stop_zapper(struct zapper *zapper);

/* Wait until a thread sleeps in a system call. */
void wait_until_in_syscall(pid_t tid, long number);

/* Another process.  Its socket leads here. */
struct peer {
	pid_t	pid;
	int	socket;
};

struct peer start_peer(void (*run)(int socket, void *arg), void *arg);
/* Wait for its end, which must be a success. */
void join_peer(struct peer *peer);

void send_word(int socket, u64 word);
u64 receive_word(int socket);
void send_fd(int socket, int fd);
int receive_fd(int socket);

#endif /* DEVICE_H */
