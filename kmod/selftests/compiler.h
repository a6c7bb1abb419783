/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the kernel's own headers would provide.
 */
#ifndef COMPILER_H
#define COMPILER_H

#include <linux/types.h>

typedef __u32	u32;
typedef __u64	u64;

#define __aligned(n)		__attribute__((aligned(n)))
#define __noreturn		__attribute__((noreturn))
#define __printf(text, first)	__attribute__((format(printf, text, first)))

#define ARRAY_SIZE(array)	(sizeof(array) / sizeof((array)[0]))

#endif /* COMPILER_H */
