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
 * struct forward - a notifier and its reader
 * @link:	in forwards
 * @notifier:	its number
 * @doorbell:	readable when there are records; hung up when it is closed
 * @socket:	where they go
 */
struct forward {
	LIST_ENTRY(forward)	link;
	int			notifier;
	struct descriptor	doorbell;
	struct descriptor	socket;
};

/* What forked children have to close.  Nobody waits while holding the lock. */
static pthread_mutex_t forwards_lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, forward) forwards = LIST_HEAD_INITIALIZER(forwards);

static void close_forward(struct forward *forward)
{
	close_owned(&forward->doorbell);
	close_owned(&forward->socket);
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

/* Waits until one of them has what is asked for; false: one is gone. */
static bool wait_for(const struct forward *forward, short of_doorbell,
		     short of_socket)
{
	const short broken = POLLERR | POLLHUP | POLLNVAL;
	struct pollfd polled[] = {
		{ .fd = forward->doorbell.fd, .events = of_doorbell },
		{ .fd = forward->socket.fd, .events = of_socket },
	};
	uint64_t generation;
	int count;

	do {
		count = poll(polled, 2, POLL_TIMEOUT);
		if (count < 0 && errno != EINTR)
			return false;
		/* If not, it would write to somebody else's file. */
		if (!is_owned(&forward->doorbell) || !is_owned(&forward->socket))
			return false;
		/* A child may have a copy of the doorbell, which never ends then. */
		if (!count && aioummu_generation(forward->notifier, &generation))
			return false;
	} while (count <= 0);
	return !((polled[0].revents | polled[1].revents) & broken);
}

static ssize_t try_to_send(const struct forward *forward, const void *packet,
			   size_t size)
{
	return send(forward->socket.fd, packet, size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Returns whether there is still somebody to send to. */
static bool send_packet(const struct forward *forward, const void *packet, size_t size)
{
	const struct timespec delay = { .tv_nsec = 1000000 };

	while (try_to_send(forward, packet, size) < 0) {
		if (errno == ENOMEM || errno == ENOBUFS)
			nanosleep(&delay, NULL);
		else if (errno != EAGAIN && errno != EINTR)
			return false;
		if (!wait_for(forward, 0, POLLOUT))
			return false;
	}
	return true;
}

static bool deliver(const struct forward *forward)
{
	struct ummunotify_event packet[PACKET_RECORDS];
	ssize_t size;

	/* Room first: until it is read, a report can take in others. */
	if (!wait_for(forward, POLLIN, 0) || !wait_for(forward, 0, POLLOUT))
		return false;
	size = aioummu_read(forward->notifier, packet, sizeof(packet));
	return size >= 0 && (!size || send_packet(forward, packet, size));
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

void aioummu_flush(int notifier)
{
	struct ummunotify_event packet[PACKET_RECORDS];
	struct forward *forward;
	ssize_t size;

	pthread_mutex_lock(&forwards_lock);
	forward = find_forward(notifier);
	while (forward && is_owned(&forward->socket)) {
		size = aioummu_read(notifier, packet, sizeof(packet));
		if (size <= 0 || try_to_send(forward, packet, (size_t)size) < 0)
			break;
	}
	pthread_mutex_unlock(&forwards_lock);
}
