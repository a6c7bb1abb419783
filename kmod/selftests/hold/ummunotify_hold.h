/* SPDX-License-Identifier: GPL-2.0 */
/* /dev/ummunotify_hold: see ummunotify_hold.c. */
#ifndef UMMUNOTIFY_HOLD_H
#define UMMUNOTIFY_HOLD_H

#include <linux/ioctl.h>

#define HOLD_PLACES	128

/* Hold the next invalidation by this thread, at that place. */
#define HOLD_NEXT	_IO('H', 1)
/* Wait until somebody is held there. */
#define HOLD_WAIT	_IO('H', 2)
/* Let it go. */
#define HOLD_RELEASE	_IO('H', 3)

#endif /* UMMUNOTIFY_HOLD_H */
