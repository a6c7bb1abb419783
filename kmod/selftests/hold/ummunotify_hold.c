// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/ummunotify_hold: invalidations that stay under way for as long as a test
 * wants.
 *
 * An MMU notifier that sleeps.  Notifiers are called latest first, so those that
 * were registered after this file was opened have been told of the start when it
 * sleeps, and are told of the end when it has slept.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "ummunotify_hold.h"

enum hold_state { HOLD_FREE, HOLD_ARMED, HOLD_HELD };

/**
 * struct hold_place - where one thread can be held
 * @task:	who, only to be compared
 * @state:	is it?
 */
struct hold_place {
	struct task_struct	*task;
	enum hold_state		state;
};

/**
 * struct hold - an open file
 * @notifier:	of the address space
 * @lock:	guards @places
 * @wait:	waiters for any change of them
 * @places:	by number
 */
struct hold {
	struct mmu_notifier	notifier;
	spinlock_t		lock; /* guards the places */
	wait_queue_head_t	wait;
	struct hold_place	places[HOLD_PLACES];
};

static struct hold_place *hold_find_armed(struct hold *hold)
{
	unsigned int i;

	for (i = 0; i < HOLD_PLACES; i++)
		if (hold->places[i].state == HOLD_ARMED &&
		    hold->places[i].task == current)
			return &hold->places[i];
	return NULL;
}

static int hold_start(struct mmu_notifier *notifier,
		      const struct mmu_notifier_range *range)
{
	struct hold *hold = container_of(notifier, struct hold, notifier);
	struct hold_place *place;

	spin_lock(&hold->lock);
	place = hold_find_armed(hold);
	if (place)
		place->state = HOLD_HELD;
	spin_unlock(&hold->lock);
	if (!place)
		return 0;

	wake_up_all(&hold->wait);
	/* A test that was killed lets go. */
	if (wait_event_killable(hold->wait,
				READ_ONCE(place->state) != HOLD_HELD))
		WRITE_ONCE(place->state, HOLD_FREE);
	return 0;
}

static const struct mmu_notifier_ops hold_ops = {
	.invalidate_range_start	= hold_start,
};

static int hold_open(struct inode *inode, struct file *file)
{
	struct hold *hold = kzalloc(sizeof(*hold), GFP_KERNEL);
	int ret;

	if (!hold)
		return -ENOMEM;
	spin_lock_init(&hold->lock);
	init_waitqueue_head(&hold->wait);
	hold->notifier.ops = &hold_ops;
	ret = mmu_notifier_register(&hold->notifier, current->mm);
	if (ret) {
		kfree(hold);
		return ret;
	}
	file->private_data = hold;
	return 0;
}

static int hold_release(struct inode *inode, struct file *file)
{
	struct hold *hold = file->private_data;

	mmu_notifier_unregister(&hold->notifier, hold->notifier.mm);
	kfree(hold);
	return 0;
}

static long hold_ioctl(struct file *file, unsigned int cmd, unsigned long number)
{
	struct hold *hold = file->private_data;
	struct hold_place *place;

	if (number >= HOLD_PLACES)
		return -EINVAL;
	place = &hold->places[number];

	switch (cmd) {
	case HOLD_NEXT:
		spin_lock(&hold->lock);
		place->task = current;
		place->state = HOLD_ARMED;
		spin_unlock(&hold->lock);
		return 0;
	case HOLD_WAIT:
		return wait_event_interruptible(hold->wait,
						READ_ONCE(place->state) == HOLD_HELD);
	case HOLD_RELEASE:
		WRITE_ONCE(place->state, HOLD_FREE);
		wake_up_all(&hold->wait);
		return 0;
	default:
		return -ENOTTY;
	}
}

static const struct file_operations hold_fops = {
	.owner		= THIS_MODULE,
	.open		= hold_open,
	.release	= hold_release,
	.unlocked_ioctl	= hold_ioctl,
	.compat_ioctl	= hold_ioctl,
};

static struct miscdevice hold_misc = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "ummunotify_hold",
	.fops	= &hold_fops,
};

module_misc_device(hold_misc);

MODULE_AUTHOR("The aioummu authors");
MODULE_DESCRIPTION("Invalidations that last as long as a test wants");
MODULE_LICENSE("GPL");
