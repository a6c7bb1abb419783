// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "smaps.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned int count(uint64_t start, uint64_t end, char *lines, size_t size)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	char line[512], head[512] = "";
	uint64_t from = 0, to = 0, first, second;
	unsigned int found = 0;

	if (!file)
		abort();
	while (fgets(line, sizeof(line), file)) {
		/* Other lines begin with a word, which can begin with digits. */
		if (sscanf(line, "%" SCNx64 "-%" SCNx64, &first, &second) == 2) {
			from = first;
			to = second;
			strcpy(head, line);
			continue;
		}
		if (strncmp(line, "VmFlags:", 8) || !strstr(line, " uw") ||
		    from >= end || to <= start)
			continue;
		found++;
		head[strcspn(head, "\n")] = 0;
		if (strlen(head) + 3 < size) {
			strcpy(lines, head);
			strcat(lines, "; ");
			size -= strlen(lines);
			lines += strlen(lines);
		}
	}
	fclose(file);
	return found;
}

unsigned int count_registered(char *lines, size_t size)
{
	if (size)
		*lines = 0;
	return count(0, UINT64_MAX, lines, size);
}

unsigned int count_registered_in(uint64_t start, uint64_t end)
{
	return count(start, end, NULL, 0);
}
