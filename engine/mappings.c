// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "mappings.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* As of Linux 6.11, linux/fs.h, which older systems lack. */
struct procmap_query_v1 {
	uint64_t	size;
	uint64_t	query_flags;
	uint64_t	query_addr;
	uint64_t	vma_start;
	uint64_t	vma_end;
	uint64_t	vma_flags;
	uint64_t	vma_page_size;
	uint64_t	vma_offset;
	uint64_t	inode;
	uint32_t	dev_major;
	uint32_t	dev_minor;
	uint32_t	vma_name_size;
	uint32_t	build_id_size;
	uint64_t	vma_name_addr;
	uint64_t	build_id_addr;
};

#define PROCMAP_QUERY_V1	_IOWR('f', 17, struct procmap_query_v1)
#define COVERING_OR_NEXT	0x10

static int query(int fd, uint64_t address, struct mapping *mapping)
{
	struct procmap_query_v1 query = {
		.size = sizeof(query),
		.query_flags = COVERING_OR_NEXT,
		.query_addr = address,
	};

	if (ioctl(fd, PROCMAP_QUERY_V1, &query))
		return -errno;
	mapping->start = query.vma_start;
	mapping->end = query.vma_end;
	return 0;
}

/**
 * struct text - /proc/self/maps, as far as it has been read
 * @fd:		where it comes from
 * @length:	of what is in @bytes
 * @at:		next byte to take
 * @error:	a negative errno, once reading has failed
 * @bytes:	a piece of it
 */
struct text {
	int	fd;
	size_t	length;
	size_t	at;
	int	error;
	char	bytes[4096];
};

/* The next character, 0 at the end. */
static char next(struct text *text)
{
	ssize_t length;

	if (text->at == text->length) {
		do
			length = read(text->fd, text->bytes, sizeof(text->bytes));
		while (length < 0 && errno == EINTR);
		if (length < 0)
			text->error = -errno;
		if (length <= 0)
			return 0;
		text->length = length;
		text->at = 0;
	}
	return text->bytes[text->at++];
}

/* A hexadecimal number, and the character behind it. */
static uint64_t number(struct text *text, char *behind)
{
	uint64_t value = 0;
	char c;

	for (;;) {
		c = next(text);
		if (c >= '0' && c <= '9')
			value = value << 4 | (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			value = value << 4 | (uint64_t)(c - 'a' + 10);
		else
			break;
	}
	*behind = c;
	return value;
}

/* A line begins with "start-end ", see proc_pid_maps(5). */
static bool parse_line(struct text *text, struct mapping *mapping)
{
	char c;

	mapping->start = number(text, &c);
	if (c != '-')
		return false;
	mapping->end = number(text, &c);
	while (c && c != '\n')
		c = next(text);
	return c == '\n';
}

static int scan(int fd, uint64_t address, struct mapping *mapping)
{
	struct text text = { .fd = fd };

	if (lseek(fd, 0, SEEK_SET) < 0)
		return -errno;
	while (parse_line(&text, mapping))
		if (mapping->end > address)
			return 0;
	return text.error ? text.error : -ENOENT;
}

int mappings_open(struct mappings *mappings)
{
	struct mapping any;

	mappings->fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (mappings->fd < 0)
		return -errno;
	mappings->indexed = !query(mappings->fd, 0, &any);
	return 0;
}

int mapping_at_or_behind(const struct mappings *mappings, uint64_t address,
			 struct mapping *mapping)
{
	if (mappings->indexed)
		return query(mappings->fd, address, mapping);
	return scan(mappings->fd, address, mapping);
}
