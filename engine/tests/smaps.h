/* SPDX-License-Identifier: MIT */
/* Which mappings of this process are registered with a userfaultfd. */
#ifndef SMAPS_H
#define SMAPS_H

#include <stddef.h>
#include <stdint.h>

/*
 * How many mappings in any write-protect mode there are, by the flag "uw" in
 * /proc/self/smaps; the first lines of some go to @lines.
 */
unsigned int count_registered(char *lines, size_t size);

/* As above, with a part in this range. */
unsigned int count_registered_in(uint64_t start, uint64_t end);

#endif
