/* SPDX-License-Identifier: MIT */
/*
 * What the kernel tells about the mappings (VMAs) of this process: through
 * PROCMAP_QUERY from Linux 6.11 on, else by reading /proc/self/maps.  Allocates
 * nothing.
 */
#ifndef AIOUMMU_MAPPINGS_H
#define AIOUMMU_MAPPINGS_H

#include <stdbool.h>
#include <stdint.h>

/**
 * struct mapping - a VMA
 * @start:	first byte
 * @end:	first byte behind it
 */
struct mapping {
	uint64_t	start;
	uint64_t	end;
};

/**
 * struct mappings - where to ask
 * @fd:		/proc/self/maps
 * @indexed:	whether asking takes the same short time for any address
 */
struct mappings {
	int	fd;
	bool	indexed;
};

/* Returns 0 or a negative errno. */
int mappings_open(struct mappings *mappings);

/*
 * Finds the mapping of an address or, if it has none, the next one.  Returns 0,
 * -ENOENT if there is none behind it either, or another negative errno.
 */
int mapping_at_or_behind(const struct mappings *mappings, uint64_t address,
			 struct mapping *mapping);

#endif
