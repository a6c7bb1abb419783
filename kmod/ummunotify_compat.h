/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that ummunotify is built for, 5.10 and
 * later.  The driver itself knows no kernel version.
 */
#ifndef _UMMUNOTIFY_COMPAT_H
#define _UMMUNOTIFY_COMPAT_H

#include <linux/device.h>
#include <linux/file.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/sizes.h>
#include <linux/uio.h>
#include <linux/version.h>

#include <uapi/linux/ummunotify.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 10, 0)
#error "ummunotify needs Linux 5.10 or later"
#endif

#ifndef CONFIG_MMU_NOTIFIER
#error "ummunotify needs a kernel with CONFIG_MMU_NOTIFIER (which KVM, among others, selects)"
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 11, 0)
static inline void vma_set_file(struct vm_area_struct *vma, struct file *file)
{
	get_file(file);
	swap(vma->vm_file, file);
	fput(file);
}
#endif

/*
 * A page that user space maps.  Charged to a cgroup as memory of the kernel, it
 * used to bear a page type, in the place of its map count: "Bad page map".
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 11, 0)
#define UMMUNOTIFY_GFP_MAPPED	GFP_KERNEL
/* So there must be little of it. */
#define UMMUNOTIFY_STATE_SIZE_MAX	SZ_64K
#else
#define UMMUNOTIFY_GFP_MAPPED	GFP_KERNEL_ACCOUNT
#define UMMUNOTIFY_STATE_SIZE_MAX	SZ_8M
#endif

/* Kernels know different reasons. */
static inline u32 ummunotify_cause_of(enum mmu_notifier_event event)
{
	switch (event) {
	case MMU_NOTIFY_UNMAP:
		return UMMUNOTIFY_EVENT_CAUSE_UNMAP;
	case MMU_NOTIFY_CLEAR:
		return UMMUNOTIFY_EVENT_CAUSE_CLEAR;
	case MMU_NOTIFY_PROTECTION_VMA:
		return UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING;
	case MMU_NOTIFY_PROTECTION_PAGE:
		return UMMUNOTIFY_EVENT_CAUSE_PROTECT_PAGE;
	case MMU_NOTIFY_SOFT_DIRTY:
		return UMMUNOTIFY_EVENT_CAUSE_SOFT_DIRTY;
	case MMU_NOTIFY_RELEASE:
		return UMMUNOTIFY_EVENT_CAUSE_END;
	case MMU_NOTIFY_MIGRATE:
		return UMMUNOTIFY_EVENT_CAUSE_MIGRATE;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 14, 0)
	case MMU_NOTIFY_EXCLUSIVE:
		return UMMUNOTIFY_EVENT_CAUSE_EXCLUSIVE;
#endif
	default:
		return 0;
	}
}

/*
 * Where the next bytes go, if they go into one buffer of user space, else NULL.
 * What a plain read() has is an iovec, later a kind of its own.
 */
static inline void __user *ummunotify_iter_buffer(const struct iov_iter *to,
						  size_t size)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 0, 0)
	if (iter_is_ubuf(to))
		return iov_iter_count(to) >= size ? to->ubuf + to->iov_offset :
						    NULL;
#else
	if (iter_is_iovec(to)) {
		struct iovec part = iov_iter_iovec(to);

		return part.iov_len >= size ? part.iov_base : NULL;
	}
#endif
	return NULL;
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
/* A distribution may have these two already: hence names of our own. */
static inline void ummunotify_vm_flags_mod(struct vm_area_struct *vma,
					   unsigned long set,
					   unsigned long clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}
#else
static inline void ummunotify_vm_flags_mod(struct vm_area_struct *vma,
					   vm_flags_t set, vm_flags_t clear)
{
	vm_flags_mod(vma, set, clear);
}
#endif

static inline struct class *ummunotify_class_create(const char *name)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
	return class_create(THIS_MODULE, name);
#else
	return class_create(name);
#endif
}

#endif /* _UMMUNOTIFY_COMPAT_H */
