/* SPDX-License-Identifier: GPL-2.0 */
/* Tracepoints of ummunotify: events/ummunotify of the tracefs. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM ummunotify

#if !defined(_UMMUNOTIFY_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _UMMUNOTIFY_TRACE_H

#include <linux/tracepoint.h>

#include <uapi/linux/ummunotify.h>

/* The open file is told by a number that tells no address. */

TRACE_EVENT(ummunotify_register,
	TP_PROTO(const void *ctx, const struct ummunotify_register_ioctl *parm,
		 int ret),
	TP_ARGS(ctx, parm, ret),
	TP_STRUCT__entry(
		__field(const void *, ctx)
		__field(u64, start)
		__field(u64, end)
		__field(u64, cookie)
		__field(u32, flags)
		__field(u32, slot)
		__field(int, ret)
	),
	TP_fast_assign(
		__entry->ctx = ctx;
		__entry->start = parm->start;
		__entry->end = parm->end;
		__entry->cookie = parm->user_cookie;
		__entry->flags = parm->flags;
		__entry->slot = parm->reserved;
		__entry->ret = ret;
	),
	TP_printk("ctx=%p start=0x%llx end=0x%llx cookie=%llu flags=0x%x slot=%u ret=%d",
		  __entry->ctx, __entry->start, __entry->end, __entry->cookie,
		  __entry->flags, __entry->slot, __entry->ret)
);

TRACE_EVENT(ummunotify_unregister,
	TP_PROTO(const void *ctx, u64 cookie, int ret),
	TP_ARGS(ctx, cookie, ret),
	TP_STRUCT__entry(
		__field(const void *, ctx)
		__field(u64, cookie)
		__field(int, ret)
	),
	TP_fast_assign(
		__entry->ctx = ctx;
		__entry->cookie = cookie;
		__entry->ret = ret;
	),
	TP_printk("ctx=%p cookie=%llu ret=%d",
		  __entry->ctx, __entry->cookie, __entry->ret)
);

/* An invalidation within reach of a region, at its start and at its end. */
TRACE_EVENT(ummunotify_invalidate,
	TP_PROTO(const void *ctx, unsigned long start, unsigned long last,
		 u32 causes, int phase, unsigned int hits),
	TP_ARGS(ctx, start, last, causes, phase, hits),
	TP_STRUCT__entry(
		__field(const void *, ctx)
		__field(unsigned long, start)
		__field(unsigned long, last)
		__field(u32, causes)
		__field(int, phase)
		__field(unsigned int, hits)
	),
	TP_fast_assign(
		__entry->ctx = ctx;
		__entry->start = start;
		__entry->last = last;
		__entry->causes = causes;
		__entry->phase = phase;
		__entry->hits = hits;
	),
	TP_printk("ctx=%p start=0x%lx last=0x%lx causes=0x%x phase=%s hits=%u",
		  __entry->ctx, __entry->start, __entry->last, __entry->causes,
		  __print_symbolic(__entry->phase, { 0, "start" }, { 1, "end" },
				   { 2, "final" }),
		  __entry->hits)
);

TRACE_EVENT(ummunotify_read,
	TP_PROTO(const void *ctx, ssize_t ret),
	TP_ARGS(ctx, ret),
	TP_STRUCT__entry(
		__field(const void *, ctx)
		__field(ssize_t, ret)
	),
	TP_fast_assign(
		__entry->ctx = ctx;
		__entry->ret = ret;
	),
	TP_printk("ctx=%p records=%zd", __entry->ctx, __entry->ret)
);

#endif /* _UMMUNOTIFY_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE ummunotify_trace
#include <trace/define_trace.h>
