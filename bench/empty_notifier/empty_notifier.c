// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/empty_notifier: an MMU notifier that does nothing, for as long as the
 * file is open.  The price of being called at all, which the benchmark of
 * ummunotify subtracts.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/slab.h>

static int empty_start(struct mmu_notifier *notifier,
		       const struct mmu_notifier_range *range)
{
	return 0;
}

static void empty_end(struct mmu_notifier *notifier,
		      const struct mmu_notifier_range *range)
{
}

static const struct mmu_notifier_ops empty_ops = {
	.invalidate_range_start	= empty_start,
	.invalidate_range_end	= empty_end,
};

static int empty_open(struct inode *inode, struct file *file)
{
	struct mmu_notifier *notifier = kzalloc(sizeof(*notifier), GFP_KERNEL);
	int ret;

	if (!notifier)
		return -ENOMEM;
	notifier->ops = &empty_ops;
	ret = mmu_notifier_register(notifier, current->mm);
	if (ret) {
		kfree(notifier);
		return ret;
	}
	file->private_data = notifier;
	return 0;
}

static int empty_release(struct inode *inode, struct file *file)
{
	struct mmu_notifier *notifier = file->private_data;

	mmu_notifier_unregister(notifier, notifier->mm);
	kfree(notifier);
	return 0;
}

static const struct file_operations empty_fops = {
	.owner		= THIS_MODULE,
	.open		= empty_open,
	.release	= empty_release,
};

static struct miscdevice empty_misc = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "empty_notifier",
	.fops	= &empty_fops,
};

module_misc_device(empty_misc);

MODULE_AUTHOR("The aioummu authors");
MODULE_DESCRIPTION("An MMU notifier that does nothing");
MODULE_LICENSE("GPL");
