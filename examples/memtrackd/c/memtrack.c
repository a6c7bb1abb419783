// SPDX-License-Identifier: MIT
/*
 * The lock of a tracker is never held while anybody waits for the daemon: everything
 * that is said is said without blocking, or stays in the table.  Each region is in
 * one list, which tells what the daemon knows of it.
 *
 * A fork() waits for the locks, so that the child finds everything complete; and a
 * thread is never cancelled with one.
 */
#define _GNU_SOURCE
#include "memtrack.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#include "descriptor.h"
#include "engine.h"

#ifndef DRIVER
#define DRIVER		"/dev/ummunotify"
#endif
/* Milliseconds for the daemon's answer, and between attempts to find it again. */
#define ANSWER_TIMEOUT	2000
#define RETRY_DELAY	1000
/* Bytes; the protocol allows for more. */
#define PACKET_SIZE	16384
/* What a region takes there: three numbers, a name of escapes only, punctuation. */
#define ENTRY_SIZE	(3 * 22 + 6 * MEMTRACK_NAME_SIZE + 8)
/* Regions that are allocated at once, and never move. */
#define CHUNK_REGIONS	256
#define CHUNKS		(MEMTRACK_MAX_REGIONS / CHUNK_REGIONS)

enum state {
	/* In use for nothing. */
	REGION_FREE,
	/* The daemon has to be told that there is this region. */
	REGION_NEW,
	/* It knows. */
	REGION_TOLD,
	/* It has to be told that there is this region no more. */
	REGION_GONE,
	REGION_STATES,
};

/**
 * struct region - what the daemon knows, or has to know, of a range
 * @link:	in the tracker's list of the regions in this state
 * @state:	which list that is
 * @cookie:	its place in the table, and above that how often that was used
 * @start:	first byte
 * @end:	first byte behind it
 * @name:	for the daemon
 */
struct region {
	TAILQ_ENTRY(region)	link;
	enum state		state;
	int64_t			cookie;
	uint64_t		start;
	uint64_t		end;
	char			name[MEMTRACK_NAME_SIZE + 1];
};

TAILQ_HEAD(regions, region);

/**
 * struct memtrack - a tracker
 * @link:	in trackers
 * @lock:	guards everything below
 * @cancel_state:	that the holder of the lock had before
 * @usable:	false in forked children, which do not touch the engine either
 * @engine:	the notifier of the embedded engine, or 0
 * @driver:	else the open driver
 * @doorbell:	what the engine's notifier has open
 * @daemon:	the connection
 * @welcome:	the daemon has said that it takes us
 * @forwarding:	the engine sends its reports through the connection
 * @refused:	it has said that it does not: no further attempts
 * @retry_at:	milliseconds; no attempt to find it again before
 * @address:	where it listens
 * @name:	of the program, for the daemon
 * @error:	why there is no connection
 * @lists:	the regions, by their states
 * @used:	places of the table that were ever used
 * @chunks:	the table
 * @packet:	what is being said or heard
 * @length:	bytes of it
 */
struct memtrack {
	LIST_ENTRY(memtrack)	link;
	pthread_mutex_t		lock;
	int			cancel_state;
	bool			usable;
	int			engine;
	struct descriptor	driver;
	struct descriptor	doorbell[2];
	struct descriptor	daemon;
	bool			welcome;
	bool			forwarding;
	bool			refused;
	int64_t			retry_at;
	struct sockaddr_un	address;
	char			name[MEMTRACK_NAME_SIZE + 1];
	char			error[MEMTRACK_ERROR_SIZE];
	struct regions		lists[REGION_STATES];
	uint32_t		used;
	struct region		*chunks[CHUNKS];
	size_t			length;
	char			packet[PACKET_SIZE];
};

/* What forked children have to close; locked before any tracker is. */
static LIST_HEAD(, memtrack) trackers = LIST_HEAD_INITIALIZER(trackers);
static pthread_mutex_t trackers_lock = PTHREAD_MUTEX_INITIALIZER;
static int trackers_cancel_state;

static void lock_trackers(void)
{
	int cancel_state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
	pthread_mutex_lock(&trackers_lock);
	trackers_cancel_state = cancel_state;
}

static void unlock_trackers(void)
{
	int cancel_state = trackers_cancel_state;

	pthread_mutex_unlock(&trackers_lock);
	pthread_setcancelstate(cancel_state, &cancel_state);
}

static void lock(struct memtrack *tracker)
{
	int cancel_state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
	pthread_mutex_lock(&tracker->lock);
	tracker->cancel_state = cancel_state;
}

static void unlock(struct memtrack *tracker)
{
	int cancel_state = tracker->cancel_state;

	pthread_mutex_unlock(&tracker->lock);
	pthread_setcancelstate(cancel_state, &cancel_state);
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

__attribute__((format(printf, 2, 3)))
static void set_error(struct memtrack *tracker, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(tracker->error, sizeof(tracker->error), format, arguments);
	va_end(arguments);
}

static void copy_error(const struct memtrack *tracker, char *error, size_t size)
{
	if (error && size)
		snprintf(error, size, "%s", tracker->error);
}

/* Names */

/*
 * What the daemon refuses, because it is not to be printed: controls, formats, spaces
 * but the one, surrogates, private use.
 */
static const struct {
	uint32_t first;
	uint32_t last;
} hidden[] = {
	{ 0x0, 0x1f },		{ 0x7f, 0xa0 },		{ 0xad, 0xad },
	{ 0x600, 0x605 },	{ 0x61c, 0x61c },	{ 0x6dd, 0x6dd },
	{ 0x70f, 0x70f },	{ 0x890, 0x891 },	{ 0x8e2, 0x8e2 },
	{ 0x1680, 0x1680 },	{ 0x180e, 0x180e },	{ 0x2000, 0x200f },
	{ 0x2028, 0x202f },	{ 0x205f, 0x206f },	{ 0x3000, 0x3000 },
	{ 0xd800, 0xf8ff },	{ 0xfdd0, 0xfdef },	{ 0xfeff, 0xfeff },
	{ 0xfff9, 0xfffb },	{ 0x110bd, 0x110bd },	{ 0x110cd, 0x110cd },
	{ 0x13430, 0x13438 },	{ 0x1bca0, 0x1bca3 },	{ 0x1d173, 0x1d17a },
	{ 0xe0001, 0xe0001 },	{ 0xe0020, 0xe007f },	{ 0xf0000, 0x10ffff },
};

static bool is_shown(uint32_t point)
{
	size_t i;

	for (i = 0; i < sizeof(hidden) / sizeof(hidden[0]); i++)
		if (hidden[i].first <= point && point <= hidden[i].last)
			return false;
	/* The last two of each plane are no characters. */
	return (point & 0xfffe) != 0xfffe;
}

/* Returns the bytes of the code point that @text begins with, or 0: not UTF-8. */
static size_t decode(const char *text, uint32_t *point)
{
	/* The smallest that needs so many bytes. */
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	const unsigned char *bytes = (const unsigned char *)text;
	size_t size, i;

	if (bytes[0] < 0x80) {
		*point = bytes[0];
		return 1;
	}
	if (bytes[0] < 0xc0 || bytes[0] > 0xf7)
		return 0;
	size = bytes[0] < 0xe0 ? 2 : bytes[0] < 0xf0 ? 3 : 4;
	*point = bytes[0] & (0x7f >> size);
	for (i = 1; i < size; i++) {
		if ((bytes[i] & 0xc0) != 0x80)
			return 0;
		*point = *point << 6 | (bytes[i] & 0x3f);
	}
	if (*point < least[size] || *point > 0x10ffff || (*point & ~0x7ffu) == 0xd800)
		return 0;
	return size;
}

static int check_name(const char *name)
{
	size_t length, size, i;
	uint32_t point;

	if (!name || !*name)
		return -EINVAL;
	length = strnlen(name, MEMTRACK_NAME_SIZE + 1);
	if (length > MEMTRACK_NAME_SIZE)
		return -ENAMETOOLONG;
	for (i = 0; i < length; i += size) {
		size = decode(name + i, &point);
		if (!size)
			return -EILSEQ;
		if (!is_shown(point))
			return -EINVAL;
	}
	return 0;
}

/* Packets */

/* The caller knows that there is room. */
__attribute__((format(printf, 2, 3)))
static void put(struct memtrack *tracker, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	tracker->length += vsnprintf(tracker->packet + tracker->length,
				     PACKET_SIZE - tracker->length, format, arguments);
	va_end(arguments);
}

/* A string of JSON; which is UTF-8 itself. */
static void put_string(struct memtrack *tracker, const char *text)
{
	put(tracker, "\"");
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			put(tracker, "\\%c", *text);
		else if ((unsigned char)*text < 0x20)
			put(tracker, "\\u%04x", *text);
		else
			tracker->packet[tracker->length++] = *text;
	}
	put(tracker, "\"");
}

static bool has_room(const struct memtrack *tracker)
{
	/* And for what closes the lists. */
	return tracker->length + ENTRY_SIZE + 32 < PACKET_SIZE;
}

/* How many bytes went; 0: not now; a negative errno: never again. */
static ssize_t send_packet(struct memtrack *tracker, int descriptor)
{
	char control[CMSG_SPACE(sizeof(descriptor))] = { 0 };
	struct iovec part = { tracker->packet, tracker->length };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	struct cmsghdr *header;
	ssize_t sent;

	if (descriptor >= 0) {
		message.msg_control = control;
		message.msg_controllen = sizeof(control);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(descriptor));
		memcpy(CMSG_DATA(header), &descriptor, sizeof(descriptor));
	}
	sent = sendmsg(tracker->daemon.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent >= 0)
		return sent;
	switch (errno) {
	case EAGAIN:
	case EINTR:
	case ENOBUFS:
	case ENOMEM:
		return 0;
	default:
		return -errno;
	}
}

/* The table of regions */

static void set_state(struct memtrack *tracker, struct region *region,
		      enum state state)
{
	TAILQ_REMOVE(&tracker->lists[region->state], region, link);
	region->state = state;
	TAILQ_INSERT_TAIL(&tracker->lists[state], region, link);
}

static void set_state_of_all(struct memtrack *tracker, enum state from, enum state to)
{
	struct region *region;

	while ((region = TAILQ_FIRST(&tracker->lists[from])))
		set_state(tracker, region, to);
}

static struct region *region_at(const struct memtrack *tracker, uint32_t place)
{
	return &tracker->chunks[place / CHUNK_REGIONS][place % CHUNK_REGIONS];
}

static struct region *find_region(const struct memtrack *tracker, int64_t cookie)
{
	uint32_t place = cookie % MEMTRACK_MAX_REGIONS;
	struct region *region;

	if (cookie < 0 || place >= tracker->used)
		return NULL;
	region = region_at(tracker, place);
	if (region->cookie != cookie)
		return NULL;
	if (region->state != REGION_NEW && region->state != REGION_TOLD)
		return NULL;
	return region;
}

/* Adds a free region. */
static int enlarge(struct memtrack *tracker)
{
	struct region **chunk = &tracker->chunks[tracker->used / CHUNK_REGIONS];
	struct region *region;

	if (!*chunk) {
		*chunk = (struct region *)calloc(CHUNK_REGIONS, sizeof(**chunk));
		if (!*chunk)
			return -ENOMEM;
	}
	region = region_at(tracker, tracker->used);
	region->cookie = tracker->used++;
	TAILQ_INSERT_TAIL(&tracker->lists[REGION_FREE], region, link);
	return 0;
}

/* The connection */

static bool is_connected(const struct memtrack *tracker)
{
	return tracker->daemon.fd >= 0;
}

/*
 * The next daemon knows nothing, so that there is nothing to take back.  The engine has
 * a duplicate of the descriptor, and learns that it is the end.
 */
static void disconnect(struct memtrack *tracker)
{
	if (is_owned(&tracker->daemon))
		shutdown(tracker->daemon.fd, SHUT_RDWR);
	close_owned(&tracker->daemon);
	tracker->welcome = false;
	tracker->forwarding = false;
	set_state_of_all(tracker, REGION_TOLD, REGION_NEW);
	set_state_of_all(tracker, REGION_GONE, REGION_FREE);
}

/* What the daemon says is for people; escapes of JSON stay where they are safer. */
static void hear_refusal(struct memtrack *tracker, const char *text)
{
	size_t length = 0;

	for (; *text && *text != '"' && length + 1 < sizeof(tracker->error); text++) {
		if (text[0] == '\\' && (text[1] == '"' || text[1] == '\\'))
			text++;
		tracker->error[length++] = *text;
	}
	tracker->error[length] = 0;
	tracker->refused = true;
	disconnect(tracker);
}

/* Returns what follows the key that an object begins with. */
static const char *value_of(const char *json, const char *key)
{
	char name[16];
	int length = 0;

	if (sscanf(json, " { \"%15[a-z]\" : %n", name, &length) != 1 || !length)
		return NULL;
	return strcmp(name, key) ? NULL : json + length;
}

static ssize_t receive(struct memtrack *tracker)
{
	return recv(tracker->daemon.fd, tracker->packet, PACKET_SIZE - 1, MSG_DONTWAIT);
}

/* Returns whether there was something, if only the end. */
static bool hear(struct memtrack *tracker)
{
	const char *refusal;
	ssize_t size;

	size = receive(tracker);
	/* It has not read all of ours; what it said comes after that. */
	if (size < 0 && errno == ECONNRESET)
		size = receive(tracker);
	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (size <= 0) {
		set_error(tracker, "the daemon is gone");
		disconnect(tracker);
		return true;
	}
	tracker->packet[size] = 0;
	refusal = value_of(tracker->packet, "error");
	if (value_of(tracker->packet, "client")) {
		tracker->welcome = true;
	} else if (refusal && *refusal == '"') {
		hear_refusal(tracker, refusal + 1);
	} else {
		set_error(tracker, "this is no memtrackd: it speaks differently");
		tracker->refused = true;
		disconnect(tracker);
	}
	return true;
}

/* Hears what there is; returns whether something can be said now. */
static bool look(struct memtrack *tracker)
{
	struct pollfd polled = { .events = POLLIN | POLLOUT };

	while (is_connected(tracker)) {
		/* If not, it would write to somebody else's file. */
		if (!is_owned(&tracker->daemon)) {
			set_error(tracker, "the program has closed the connection");
			disconnect(tracker);
			break;
		}
		polled.fd = tracker->daemon.fd;
		if (poll(&polled, 1, 0) <= 0)
			break;
		if (!(polled.revents & ~POLLOUT))
			return true;
		hear(tracker);
	}
	return false;
}

/* The driver goes along. */
static int say_hello(struct memtrack *tracker)
{
	ssize_t sent;

	tracker->length = 0;
	put(tracker, "{\"memtrackd\":1,\"name\":");
	put_string(tracker, tracker->name);
	put(tracker, ",\"backend\":\"%s\"}", tracker->engine ? "embedded" : "driver");
	if (!tracker->engine && !is_owned(&tracker->driver))
		return -EBADF;
	sent = send_packet(tracker, tracker->engine ? -1 : tracker->driver.fd);
	if (sent < 0)
		return sent;
	return sent ? 0 : -EAGAIN;
}

/* Says hello, and does not wait for the answer. */
static int connect_daemon(struct memtrack *tracker)
{
	const struct sockaddr *address = (const struct sockaddr *)&tracker->address;
	int fd, error = 0;

	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	own(&tracker->daemon, fd);
	if (connect(fd, address, sizeof(tracker->address)))
		error = -errno;
	if (!error)
		error = say_hello(tracker);
	if (error)
		disconnect(tracker);
	return error;
}

static void reconnect(struct memtrack *tracker)
{
	int64_t time = now();

	if (tracker->refused || time < tracker->retry_at)
		return;
	tracker->retry_at = time + RETRY_DELAY;
	connect_daemon(tracker);
}

/* Puts as much as there is room for of one list; returns the first left out. */
static struct region *put_list(struct memtrack *tracker, enum state state)
{
	const char *between = "";
	struct region *region;

	put(tracker, state == REGION_GONE ? "\"unregister\":[" : "\"register\":[");
	TAILQ_FOREACH(region, &tracker->lists[state], link) {
		if (!has_room(tracker))
			break;
		put(tracker, "%s", between);
		between = ",";
		if (state == REGION_GONE) {
			put(tracker, "%" PRId64, region->cookie);
			continue;
		}
		put(tracker, "[%" PRId64 ",%" PRIu64 ",%" PRIu64 ",", region->cookie,
		    region->start, region->end);
		put_string(tracker, region->name);
		put(tracker, "]");
	}
	put(tracker, "]");
	return region;
}

/* Says all of one list that fits a packet; returns whether it went. */
static bool say_list(struct memtrack *tracker, enum state from, enum state to)
{
	struct region *region, *left;
	ssize_t sent;

	tracker->length = 0;
	put(tracker, "{");
	left = put_list(tracker, from);
	put(tracker, "}");
	sent = send_packet(tracker, -1);
	if (!sent)
		return false;
	if (sent < 0) {
		set_error(tracker, "the daemon is gone");
		/* Or has it said why? */
		while (is_connected(tracker) && hear(tracker))
			;
		disconnect(tracker);
		return false;
	}
	while ((region = TAILQ_FIRST(&tracker->lists[from])) != left)
		set_state(tracker, region, to);
	return true;
}

/* Says of regions what there is to say, as far as that can be said now. */
static void say_lists(struct memtrack *tracker)
{
	while (look(tracker)) {
		if (!TAILQ_EMPTY(&tracker->lists[REGION_GONE])) {
			if (!say_list(tracker, REGION_GONE, REGION_FREE))
				break;
		} else if (!TAILQ_EMPTY(&tracker->lists[REGION_NEW])) {
			if (!say_list(tracker, REGION_NEW, REGION_TOLD))
				break;
		} else {
			break;
		}
	}
}

/* After the regions that the reports are of. */
static void forward(struct memtrack *tracker)
{
	int error;

	if (!tracker->engine || !is_connected(tracker) || tracker->forwarding)
		return;
	error = aioummu_forward(tracker->engine, tracker->daemon.fd);
	tracker->forwarding = !error;
	/* Busy: what served the last connection has not noticed yet that it is over. */
	if (!error || error == -EBUSY)
		return;
	set_error(tracker, "no reports can be sent: %s", strerror(-error));
	disconnect(tracker);
}

static void say(struct memtrack *tracker)
{
	if (!is_connected(tracker))
		reconnect(tracker);
	say_lists(tracker);
	forward(tracker);
}

/* Sets the error and returns whether the daemon takes us. */
static bool wait_for_welcome(struct memtrack *tracker)
{
	int64_t deadline = now() + ANSWER_TIMEOUT;
	struct pollfd polled = { .events = POLLIN };
	int64_t left;
	bool waiting;

	do {
		lock(tracker);
		look(tracker);
		polled.fd = tracker->daemon.fd;
		waiting = is_connected(tracker) && !tracker->welcome;
		unlock(tracker);
		left = deadline - now();
		if (waiting && left > 0)
			poll(&polled, 1, left);
	} while (waiting && left > 0);
	if (waiting)
		set_error(tracker, "the daemon at %s does not answer within %d s: "
			  "is it stopped, or overloaded?",
			  tracker->address.sun_path, ANSWER_TIMEOUT / 1000);
	return tracker->welcome;
}

/* What is watched */

static int open_driver(struct memtrack *tracker)
{
	uint32_t features = UMMUNOTIFY_FEATURE_CAUSE;
	int fd;

	fd = open(DRIVER, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return -errno;
	/* Something else does not even know the question. */
	if (ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &features)) {
		close(fd);
		return -ENOTTY;
	}
	own(&tracker->driver, fd);
	return 0;
}

static int open_engine(struct memtrack *tracker)
{
	int doorbell[2], number;

	number = aioummu_open(doorbell);
	if (number < 0)
		return number;
	tracker->engine = number;
	own(&tracker->doorbell[0], doorbell[0]);
	own(&tracker->doorbell[1], doorbell[1]);
	return 0;
}

static int watch(const struct memtrack *tracker, const struct region *region)
{
	struct ummunotify_register_ioctl range = {
		.start		= region->start,
		.end		= region->end,
		.user_cookie	= (uint64_t)region->cookie,
	};
	struct aioummu_refusal refusal;

	if (tracker->engine)
		return aioummu_register(tracker->engine, range.start, range.end,
					range.user_cookie, 0, false, &refusal);
	if (!is_owned(&tracker->driver))
		return -EBADF;
	return ioctl(tracker->driver.fd, UMMUNOTIFY_REGISTER_REGION, &range) ? -errno : 0;
}

/* A report goes with its region, so what can be said of it is said before. */
static void unwatch(const struct memtrack *tracker, const struct region *region)
{
	uint64_t cookie = region->cookie;

	if (tracker->engine) {
		aioummu_flush(tracker->engine);
		aioummu_unregister(tracker->engine, cookie);
		return;
	}
	if (is_owned(&tracker->driver))
		ioctl(tracker->driver.fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie);
}

/* Forks */

static void before_fork(void)
{
	struct memtrack *tracker;

	lock_trackers();
	LIST_FOREACH(tracker, &trackers, link)
		pthread_mutex_lock(&tracker->lock);
}

static void after_fork_in_parent(void)
{
	struct memtrack *tracker;

	LIST_FOREACH(tracker, &trackers, link)
		pthread_mutex_unlock(&tracker->lock);
	unlock_trackers();
}

/* Otherwise the daemon would not see the end of the parent. */
static void after_fork_in_child(void)
{
	struct memtrack *tracker;

	LIST_FOREACH(tracker, &trackers, link) {
		tracker->usable = false;
		close_owned(&tracker->daemon);
		close_owned(&tracker->driver);
		close_owned(&tracker->doorbell[0]);
		close_owned(&tracker->doorbell[1]);
		set_error(tracker, "this process was forked: it can attach by itself");
		pthread_mutex_unlock(&tracker->lock);
	}
	LIST_INIT(&trackers);
	unlock_trackers();
}

static int fork_handler_error;

/* Handlers that come later run earlier before a fork: ours before the engine's. */
static void handle_forks(void)
{
	fork_handler_error = -pthread_atfork(before_fork, after_fork_in_parent,
					     after_fork_in_child);
}

/* Attaching */

static const char *default_socket(char *room, size_t size)
{
	const char *system = "/run/memtrackd/memtrackd.sock";
	const char *path = secure_getenv("MEMTRACKD_SOCKET");
	const char *directory = secure_getenv("XDG_RUNTIME_DIR");

	if (path && *path)
		return path;
	if (!geteuid() || !access(system, F_OK))
		return system;
	if (directory && *directory)
		snprintf(room, size, "%s/memtrackd.sock", directory);
	else
		snprintf(room, size, "/tmp/memtrackd-%u/memtrackd.sock", getuid());
	return room;
}

static void explain(struct memtrack *tracker, int error)
{
	const char *path = tracker->address.sun_path;

	switch (-error) {
	case ENOENT:
	case ENOTDIR:
	case ECONNREFUSED:
		set_error(tracker, "no daemon listens at %s: start memtrackd, or say where "
			  "it listens (MEMTRACKD_SOCKET)", path);
		break;
	case EACCES:
	case EPERM:
		set_error(tracker, "this user may not attach to the daemon at %s: ask for "
			  "membership in the group of the socket", path);
		break;
	case EAGAIN:
		set_error(tracker, "the daemon at %s is stopped or overloaded", path);
		break;
	default:
		set_error(tracker, "the daemon at %s cannot be reached: %s", path,
			  strerror(-error));
	}
}

static int set_address(struct memtrack *tracker, const char *socket)
{
	char room[sizeof(tracker->address.sun_path) + 1];

	if (!socket)
		socket = default_socket(room, sizeof(room));
	if (strlen(socket) >= sizeof(tracker->address.sun_path)) {
		set_error(tracker, "the path of the daemon's socket is too long: %s",
			  socket);
		return -ENAMETOOLONG;
	}
	tracker->address.sun_family = AF_UNIX;
	strcpy(tracker->address.sun_path, socket);
	return 0;
}

static int set_name(struct memtrack *tracker, const char *name)
{
	int error;

	if (!name)
		name = program_invocation_short_name;
	error = check_name(name);
	if (error)
		set_error(tracker, "the program's name is 1 to %d bytes of UTF-8 without "
			  "control characters", MEMTRACK_NAME_SIZE);
	else
		strcpy(tracker->name, name);
	return error;
}

/* Under the lock. */
static int open_all(struct memtrack *tracker)
{
	int error;

	if (open_driver(tracker)) {
		error = open_engine(tracker);
		if (error) {
			set_error(tracker, "there is no driver, and the embedded engine "
				  "cannot run here: %s", strerror(-error));
			return error;
		}
	}
	error = connect_daemon(tracker);
	if (error)
		explain(tracker, error);
	else
		forward(tracker);
	return error;
}

static bool attach(struct memtrack *tracker, const char *socket, const char *name)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	int error;

	pthread_once(&once, handle_forks);
	if (fork_handler_error) {
		set_error(tracker, "%s", strerror(-fork_handler_error));
		return false;
	}
	if (set_address(tracker, socket) || set_name(tracker, name))
		return false;
	lock(tracker);
	error = open_all(tracker);
	unlock(tracker);
	return !error && wait_for_welcome(tracker);
}

static struct memtrack *create(void)
{
	struct memtrack *tracker;
	int i;

	tracker = (struct memtrack *)calloc(1, sizeof(*tracker));
	if (!tracker)
		return NULL;
	pthread_mutex_init(&tracker->lock, NULL);
	tracker->usable = true;
	tracker->driver.fd = -1;
	tracker->doorbell[0].fd = -1;
	tracker->doorbell[1].fd = -1;
	tracker->daemon.fd = -1;
	for (i = 0; i < REGION_STATES; i++)
		TAILQ_INIT(&tracker->lists[i]);
	lock_trackers();
	LIST_INSERT_HEAD(&trackers, tracker, link);
	unlock_trackers();
	return tracker;
}

struct memtrack *memtrack_attach(const char *socket, const char *name, char *error,
				 size_t size)
{
	struct memtrack *tracker;
	int cancel_state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
	tracker = create();
	if (!tracker && error && size)
		snprintf(error, size, "%s", strerror(ENOMEM));
	if (tracker && !attach(tracker, socket, name)) {
		copy_error(tracker, error, size);
		memtrack_detach(tracker);
		tracker = NULL;
	}
	pthread_setcancelstate(cancel_state, &cancel_state);
	return tracker;
}

/* Using it */

/* Under the lock.  Returns a region without a purpose, still in the list of those. */
static struct region *get_region(struct memtrack *tracker, int *error)
{
	struct regions *list = &tracker->lists[REGION_FREE];

	*error = 0;
	if (TAILQ_EMPTY(list) && tracker->used < MEMTRACK_MAX_REGIONS)
		*error = enlarge(tracker);
	/* Those that the daemon would have to be told of are free without it. */
	if (TAILQ_EMPTY(list) && !TAILQ_EMPTY(&tracker->lists[REGION_GONE])) {
		set_error(tracker, "the daemon is too slow");
		disconnect(tracker);
	}
	if (!TAILQ_EMPTY(list))
		return TAILQ_FIRST(list);
	if (!*error)
		*error = -ENOSPC;
	return NULL;
}

/* Under the lock. */
static void end_region(struct memtrack *tracker, struct region *region)
{
	bool known = region->state == REGION_TOLD && is_connected(tracker);

	set_state(tracker, region, known ? REGION_GONE : REGION_FREE);
}

/* Under the lock. */
static int64_t add(struct memtrack *tracker, const void *start, const void *end,
		   const char *name)
{
	struct region *region;
	int error;

	region = get_region(tracker, &error);
	if (!region)
		return error;
	region->cookie += MEMTRACK_MAX_REGIONS;
	region->start = (uintptr_t)start;
	region->end = (uintptr_t)end;
	strcpy(region->name, name);
	/* Said before, so that no report comes earlier, if there is room for it. */
	set_state(tracker, region, REGION_NEW);
	say(tracker);
	error = watch(tracker, region);
	if (!error)
		return region->cookie;
	end_region(tracker, region);
	say(tracker);
	return error;
}

int64_t memtrack_register(struct memtrack *tracker, const void *start, const void *end,
			  const char *name)
{
	int64_t result = check_name(name);

	if (result)
		return result;
	if ((uintptr_t)start >= (uintptr_t)end)
		return -EINVAL;
	if (!tracker)
		return 0;
	lock(tracker);
	if (tracker->usable)
		result = add(tracker, start, end, name);
	unlock(tracker);
	return result;
}

int memtrack_unregister(struct memtrack *tracker, int64_t cookie)
{
	struct region *region;
	int error = 0;

	if (!tracker || !cookie)
		return 0;
	lock(tracker);
	region = find_region(tracker, cookie);
	if (!tracker->usable) {
		;
	} else if (!region) {
		error = -ENOENT;
	} else {
		unwatch(tracker, region);
		end_region(tracker, region);
		say(tracker);
	}
	unlock(tracker);
	return error;
}

size_t memtrack_flush(struct memtrack *tracker)
{
	struct region *region;
	size_t count = 0;

	if (!tracker)
		return 0;
	lock(tracker);
	if (tracker->usable) {
		say(tracker);
		TAILQ_FOREACH(region, &tracker->lists[REGION_NEW], link)
			count++;
		TAILQ_FOREACH(region, &tracker->lists[REGION_GONE], link)
			count++;
	}
	unlock(tracker);
	return count;
}

bool memtrack_attached(struct memtrack *tracker, char *error, size_t size)
{
	bool attached;

	if (!tracker) {
		if (error && size)
			snprintf(error, size, "it was never attached");
		return false;
	}
	lock(tracker);
	if (tracker->usable)
		look(tracker);
	attached = tracker->usable && is_connected(tracker) && tracker->welcome;
	if (!attached)
		copy_error(tracker, error, size);
	unlock(tracker);
	return attached;
}

/* Together, so that no fork() comes between. */
static void close_all(struct memtrack *tracker)
{
	lock_trackers();
	lock(tracker);
	LIST_REMOVE(tracker, link);
	if (tracker->welcome)
		say(tracker);
	if (tracker->engine) {
		aioummu_flush(tracker->engine);
		aioummu_close(tracker->engine);
	}
	disconnect(tracker);
	close_owned(&tracker->driver);
	unlock(tracker);
	unlock_trackers();
}

void memtrack_detach(struct memtrack *tracker)
{
	int i;

	if (!tracker)
		return;
	/* In a child, it is in no list, and closed. */
	if (tracker->usable)
		close_all(tracker);
	pthread_mutex_destroy(&tracker->lock);
	for (i = 0; i < CHUNKS; i++)
		free(tracker->chunks[i]);
	free(tracker);
}
