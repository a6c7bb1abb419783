// SPDX-License-Identifier: MIT
/*
 * Hands the records of a notifier to another process, which nobody trusts.
 *
 * A thread for each notifier moves them to a socket.  It may wait for the reader as
 * long as that likes: it holds nothing then that anybody else could wait for, and
 * what was not read yet stays with its region, where reports coalesce.  Sockets,
 * not pipes: the reader of a pipe holds a mutex that writers need, and can stay
 * there for as long as it takes to handle a page fault of its own.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "descriptor.h"

/* Records of a packet. */
#define PACKET_RECORDS	64
/* Milliseconds after which the thread looks whether its descriptors are its own. */
#define POLL_TIMEOUT	1000

/**
 * struct share - a notifier and its reader
 * @link:	in shares
 * @notifier:	its number
 * @doorbell:	readable when there are records; hung up when it is closed
 * @socket:	where they go
 */
struct share {
	LIST_ENTRY(share)	link;
	int			notifier;
	struct descriptor	doorbell;
	struct descriptor	socket;
};

/* What forked children have to close.  Nobody waits while holding the lock. */
static pthread_mutex_t shares_lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, share) shares = LIST_HEAD_INITIALIZER(shares);

static void close_share(struct share *share)
{
	close_owned(&share->doorbell);
	close_owned(&share->socket);
}

static void before_fork(void)
{
	pthread_mutex_lock(&shares_lock);
}

static void after_fork_in_parent(void)
{
	pthread_mutex_unlock(&shares_lock);
}

/* Otherwise the reader would not see the end of the parent. */
static void after_fork_in_child(void)
{
	struct share *share;

	LIST_FOREACH(share, &shares, link)
		close_share(share);
	LIST_INIT(&shares);
	pthread_mutex_unlock(&shares_lock);
}

static int fork_handler_error;

__attribute__((constructor)) static void handle_forks(void)
{
	fork_handler_error = pthread_atfork(before_fork, after_fork_in_parent,
					    after_fork_in_child);
}

/* Waits until one of them has what is asked for; false: one is gone. */
static bool wait_for(const struct share *share, short of_doorbell, short of_socket)
{
	const short broken = POLLERR | POLLHUP | POLLNVAL;
	struct pollfd polled[] = {
		{ .fd = share->doorbell.fd, .events = of_doorbell },
		{ .fd = share->socket.fd, .events = of_socket },
	};
	int count;

	do {
		count = poll(polled, 2, POLL_TIMEOUT);
		if (count < 0 && errno != EINTR)
			return false;
		/* If not, it would write to somebody else's file. */
		if (!is_owned(&share->doorbell) || !is_owned(&share->socket))
			return false;
	} while (count <= 0);
	return !((polled[0].revents | polled[1].revents) & broken);
}

/* Returns whether there is still somebody to send to. */
static bool send_packet(const struct share *share, const void *packet, size_t size)
{
	const struct timespec delay = { .tv_nsec = 1000000 };

	while (send(share->socket.fd, packet, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
		if (errno == ENOMEM || errno == ENOBUFS)
			nanosleep(&delay, NULL);
		else if (errno != EAGAIN && errno != EINTR)
			return false;
		if (!wait_for(share, 0, POLLOUT))
			return false;
	}
	return true;
}

static bool deliver(const struct share *share)
{
	struct ummunotify_event packet[PACKET_RECORDS];
	ssize_t size;

	/* Room first: until it is read, a report can take in others. */
	if (!wait_for(share, POLLIN, 0) || !wait_for(share, 0, POLLOUT))
		return false;
	size = aioummu_read(share->notifier, packet, sizeof(packet));
	return size >= 0 && (!size || send_packet(share, packet, size));
}

static void *run(void *argument)
{
	struct share *share = argument;

	pthread_setname_np(pthread_self(), "aioummu-share");
	while (deliver(share))
		;
	pthread_mutex_lock(&shares_lock);
	LIST_REMOVE(share, link);
	close_share(share);
	pthread_mutex_unlock(&shares_lock);
	free(share);
	return NULL;
}

/* No handler of the program runs there. */
static int start_thread(struct share *share)
{
	sigset_t all, before;
	pthread_t thread;
	int error;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, NULL, run, share);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		pthread_detach(thread);
	return -error;
}

static struct share *find_share(int notifier)
{
	struct share *share;

	LIST_FOREACH(share, &shares, link)
		if (share->notifier == notifier)
			break;
	return share;
}

/* Under shares_lock. */
static int open_share(struct share *share, int notifier, int *reader)
{
	int ends[2], doorbell;

	if (fork_handler_error)
		return -fork_handler_error;
	if (find_share(notifier))
		return -EBUSY;
	doorbell = aioummu_doorbell(notifier);
	if (doorbell < 0)
		return doorbell;
	share->notifier = notifier;
	own(&share->doorbell, doorbell);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0,
		       ends))
		return -errno;
	own(&share->socket, ends[0]);
	*reader = ends[1];
	/* Nobody would ever read it. */
	shutdown(ends[0], SHUT_RD);
	return 0;
}

int aioummu_share(int notifier)
{
	struct share *share;
	int error, reader = -1;

	share = malloc(sizeof(*share));
	if (!share)
		return -ENOMEM;
	share->doorbell.fd = -1;
	share->socket.fd = -1;
	pthread_mutex_lock(&shares_lock);
	error = open_share(share, notifier, &reader);
	if (!error)
		error = start_thread(share);
	if (!error)
		LIST_INSERT_HEAD(&shares, share, link);
	else
		close_share(share);
	pthread_mutex_unlock(&shares_lock);
	if (!error)
		return reader;
	if (reader >= 0)
		close(reader);
	free(share);
	return error;
}
