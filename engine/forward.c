// SPDX-License-Identifier: MIT
/*
 * Sends the records of a notifier to another process, which is not trusted.
 *
 * A thread for each notifier moves them to a socket.  It may wait for the reader as
 * long as that likes: it holds nothing then that anybody else could wait for, and
 * what was not read yet stays with its region, where reports coalesce.  Sockets,
 * not pipes: the reader of a pipe holds a mutex that writers need, and can stay
 * there for as long as it takes to handle a page fault of its own.  For the same
 * reason the reader wants a socket of which nobody else has his end: one that he
 * accepted, not one that was sent to him.
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
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "descriptor.h"

/* Records of a packet. */
#define PACKET_RECORDS	64
/* Packets that are sent before others get their turn. */
#define PACKETS_AT_ONCE	64
/* Milliseconds after which the thread looks whether its descriptors are its own. */
#define POLL_TIMEOUT	1000

/**
 * struct forward - a notifier and its reader
 * @link:	in forwards
 * @notifier:	its number
 * @doorbell:	readable when there are records; hung up when it is closed
 * @socket:	where they go
 * @wake:	an eventfd: there is something in @packet
 * @packet:	records that were read
 * @size:	of them in bytes, 0 once they are sent
 */
struct forward {
	LIST_ENTRY(forward)	link;
	int			notifier;
	struct descriptor	doorbell;
	struct descriptor	socket;
	struct descriptor	wake;
	struct ummunotify_event	packet[PACKET_RECORDS];
	ssize_t			size;
};

/* What forked children have to close.  Nobody waits while holding the lock. */
static pthread_mutex_t forwards_lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, forward) forwards = LIST_HEAD_INITIALIZER(forwards);

static void close_forward(struct forward *forward)
{
	close_owned(&forward->doorbell);
	close_owned(&forward->socket);
	close_owned(&forward->wake);
}

static void before_fork(void)
{
	pthread_mutex_lock(&forwards_lock);
}

static void after_fork_in_parent(void)
{
	pthread_mutex_unlock(&forwards_lock);
}

/* Otherwise the reader would not see the end of the parent. */
static void after_fork_in_child(void)
{
	struct forward *forward;

	LIST_FOREACH(forward, &forwards, link)
		close_forward(forward);
	LIST_INIT(&forwards);
	pthread_mutex_unlock(&forwards_lock);
}

static int fork_handler_error;

__attribute__((constructor)) static void handle_forks(void)
{
	fork_handler_error = pthread_atfork(before_fork, after_fork_in_parent,
					    after_fork_in_child);
}

/* Waits for an event of one of them; false: the connection or the notifier is gone. */
static bool wait_for(const struct forward *forward, struct pollfd *polled,
		     nfds_t count)
{
	const short broken = POLLERR | POLLHUP | POLLNVAL;
	uint64_t generation;
	short events = 0;
	int ready;

	do {
		ready = poll(polled, count, POLL_TIMEOUT);
		if (ready < 0 && errno != EINTR)
			return false;
		/* If not, it would write to somebody else's file. */
		if (!is_owned(&forward->doorbell) || !is_owned(&forward->socket) ||
		    !is_owned(&forward->wake))
			return false;
		/* A child may have a copy of the doorbell, which never ends then. */
		if (!ready && aioummu_generation(forward->notifier, &generation))
			return false;
	} while (ready <= 0);
	for (nfds_t i = 0; i < count; i++)
		events |= polled[i].revents;
	return !(events & broken);
}

static bool wait_for_records(const struct forward *forward)
{
	struct pollfd polled[] = {
		{ .fd = forward->doorbell.fd, .events = POLLIN },
		{ .fd = forward->socket.fd },
		{ .fd = forward->wake.fd, .events = POLLIN },
	};

	return wait_for(forward, polled, 3);
}

/* The notifier may be closed: what was read from it is sent all the same. */
static bool wait_for_room(const struct forward *forward)
{
	struct pollfd polled = { .fd = forward->socket.fd, .events = POLLOUT };

	return wait_for(forward, &polled, 1);
}

/*
 * Sends what is to be sent, until there is no more or no room for it.  What was
 * read and could not be sent stays here, for the next time.  Under forwards_lock,
 * and so in order.  Returns -EAGAIN if there is no room, or another negative errno
 * if there is nobody to send to, or nothing to be read any more.
 */
static int send_all(struct forward *forward)
{
	int error;

	for (unsigned int i = 0; i < PACKETS_AT_ONCE; i++) {
		if (!forward->size)
			forward->size = aioummu_read(forward->notifier,
						     forward->packet,
						     sizeof(forward->packet));
		if (forward->size <= 0) {
			error = (int)forward->size;
			forward->size = 0;
			return error;
		}
		if (!is_owned(&forward->socket))
			return -EBADF;
		if (send(forward->socket.fd, forward->packet,
			 (size_t)forward->size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
			return errno == EINTR ? -EAGAIN : -errno;
		forward->size = 0;
	}
	return 0;
}

static bool has_unsent(const struct forward *forward)
{
	bool result;

	pthread_mutex_lock(&forwards_lock);
	result = forward->size > 0;
	pthread_mutex_unlock(&forwards_lock);
	return result;
}

static bool deliver(struct forward *forward)
{
	const struct timespec delay = { .tv_nsec = 1000000 };
	uint64_t count;
	int error;

	/* Room first: until it is read, a report can take in others. */
	if (!has_unsent(forward) && !wait_for_records(forward))
		return false;
	while (read(forward->wake.fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
	if (!wait_for_room(forward))
		return false;
	pthread_mutex_lock(&forwards_lock);
	error = send_all(forward);
	pthread_mutex_unlock(&forwards_lock);
	if (error == -ENOMEM || error == -ENOBUFS) {
		nanosleep(&delay, NULL);
		return true;
	}
	return !error || error == -EAGAIN;
}

static void *run(void *argument)
{
	struct forward *forward = argument;

	pthread_setname_np(pthread_self(), "aioummu-forward");
	while (deliver(forward))
		;
	pthread_mutex_lock(&forwards_lock);
	LIST_REMOVE(forward, link);
	close_forward(forward);
	pthread_mutex_unlock(&forwards_lock);
	free(forward);
	return NULL;
}

/* No handler of the program runs there. */
static int start_thread(struct forward *forward)
{
	sigset_t all, before;
	pthread_t thread;
	int error;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, NULL, run, forward);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error)
		pthread_detach(thread);
	return -error;
}

static struct forward *find_forward(int notifier)
{
	struct forward *forward;

	LIST_FOREACH(forward, &forwards, link)
		if (forward->notifier == notifier)
			break;
	return forward;
}

static bool is_packet_socket(int socket)
{
	int domain, type;
	socklen_t size = sizeof(int);

	return !getsockopt(socket, SOL_SOCKET, SO_DOMAIN, &domain, &size) &&
	       !getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size) &&
	       domain == AF_UNIX && type == SOCK_SEQPACKET;
}

static int duplicate(int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

	return copy < 0 ? -errno : copy;
}

/* Under forwards_lock. */
static int open_forward(struct forward *forward, int notifier, int socket)
{
	int fd;

	if (fork_handler_error)
		return -fork_handler_error;
	if (!is_packet_socket(socket))
		return -EPROTOTYPE;
	forward->notifier = notifier;
	fd = aioummu_doorbell(notifier);
	if (fd < 0)
		return fd;
	own(&forward->doorbell, fd);
	if (find_forward(notifier))
		return -EBUSY;
	fd = duplicate(socket);
	if (fd < 0)
		return fd;
	own(&forward->socket, fd);
	fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (fd < 0)
		return -errno;
	own(&forward->wake, fd);
	return 0;
}

int aioummu_forward(int notifier, int socket)
{
	struct forward *forward;
	int error;

	forward = malloc(sizeof(*forward));
	if (!forward)
		return -ENOMEM;
	forward->doorbell.fd = -1;
	forward->socket.fd = -1;
	forward->wake.fd = -1;
	forward->size = 0;
	pthread_mutex_lock(&forwards_lock);
	error = open_forward(forward, notifier, socket);
	if (!error)
		error = start_thread(forward);
	if (!error)
		LIST_INSERT_HEAD(&forwards, forward, link);
	else
		close_forward(forward);
	pthread_mutex_unlock(&forwards_lock);
	if (error)
		free(forward);
	return error;
}

int aioummu_flush(int notifier)
{
	const uint64_t one = 1;
	struct forward *forward;
	int error = -ENOTCONN;

	pthread_mutex_lock(&forwards_lock);
	forward = find_forward(notifier);
	if (forward)
		error = send_all(forward);
	if (error == -EAGAIN && is_owned(&forward->wake))
		while (write(forward->wake.fd, &one, sizeof(one)) < 0 &&
		       errno == EINTR)
			;
	pthread_mutex_unlock(&forwards_lock);
	return error;
}
