/* SPDX-License-Identifier: MIT */
/*
 * Programs close descriptors that are not theirs (closefrom()), and the numbers
 * become those of other files, which must not be written or closed.
 */
#ifndef AIOUMMU_DESCRIPTOR_H
#define AIOUMMU_DESCRIPTOR_H

#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

/**
 * struct descriptor - a file, and how to recognise it
 * @fd:		its number, or -1
 * @device:	st_dev of stat(2)
 * @inode:	st_ino
 */
struct descriptor {
	int	fd;
	dev_t	device;
	ino_t	inode;
};

static inline void own(struct descriptor *descriptor, int fd)
{
	struct stat status = { 0 };

	fstat(fd, &status);
	*descriptor = (struct descriptor) { fd, status.st_dev, status.st_ino };
}

static inline bool is_owned(const struct descriptor *descriptor)
{
	struct stat status;

	return descriptor->fd >= 0 && !fstat(descriptor->fd, &status) &&
	       status.st_dev == descriptor->device &&
	       status.st_ino == descriptor->inode;
}

static inline void close_owned(struct descriptor *descriptor)
{
	if (is_owned(descriptor))
		close(descriptor->fd);
	descriptor->fd = -1;
}

#endif
