"""Memory is unmapped by a thread that holds the GIL, so that no Python can run."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import anyio
import numpy as np

import aioummu
from aioummu import Inval, Notifier, Region
from aioummu._regions import address_range
from tests.conftest import LOOPS
from tests.hangs.child import open_notifier
from tests.memory import PAGE, Pages
from tests.pipe_device import drain, until

if TYPE_CHECKING:
    from aioummu import ReadinessKind

#: To be called with the start and the end of what will go away.
Watch: TypeAlias = Callable[[int, int], object]

# Above mallopt()'s threshold, and below the size of a huge page.
LARGE = 1 << 20
_M_MMAP_THRESHOLD = -3

# Unlike CDLL, this one keeps the GIL.
_libc = ctypes.PyDLL(None)
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def unmap(watch: Watch) -> None:
    pages = Pages(4)
    watch(pages.start, pages.end)
    _libc.munmap(pages.start, pages.size)


def close_mmap(watch: Watch) -> None:
    mapping = mmap.mmap(-1, 4 * PAGE)
    watch(*address_range(mapping))
    mapping.close()


def free_bytearray(watch: Watch) -> None:
    buffer = bytearray(LARGE)
    watch(*address_range(buffer))
    del buffer


def free_array(watch: Watch) -> None:
    array = np.ones(LARGE, np.uint8)
    watch(*address_range(array))
    del array


CHANGES = (unmap, close_mmap, free_bytearray, free_array)


def map_large_blocks() -> None:
    """Let malloc() map each large block, whatever was freed before."""
    assert _libc.mallopt(_M_MMAP_THRESHOLD, LARGE // 8)


def in_a_loop(loop: str, readiness: str) -> dict[str, Any]:
    """Change memory in the thread that iterates notifiers, and in another."""
    map_large_blocks()
    backend, options = LOOPS[loop]
    return anyio.run(
        _iterate_and_change,
        cast("ReadinessKind", readiness),
        backend=backend,
        backend_options=options,
    )


async def _iterate_and_change(readiness: ReadinessKind) -> dict[str, Any]:
    watched: list[Region] = []
    reported: set[Region] = set()

    async def iterate(notifier: Notifier) -> None:
        async for event in notifier:
            if isinstance(event, Inval):
                reported.add(event.region)

    async with AsyncExitStack() as stack:
        notifiers = [
            await stack.enter_async_context(
                aioummu.open_notifier(backend="embedded", readiness=readiness)
            )
            for _ in range(8)
        ]

        def watch(start: int, end: int) -> None:
            watched.extend(notifier.register(start, end) for notifier in notifiers)

        async with anyio.create_task_group() as tasks:
            for notifier in notifiers:
                tasks.start_soon(iterate, notifier)
            for _ in range(10):
                for change in CHANGES:
                    change(watch)
                    await until(lambda: reported.issuperset(watched))
                    await anyio.to_thread.run_sync(change, watch)
                    await until(lambda: reported.issuperset(watched))
            tasks.cancel_scope.cancel()
    return {"watched": len(watched), "reported": len(reported)}


def in_threads() -> dict[str, int]:
    """Free all kinds of buffers in several threads, each with its own notifier."""
    map_large_blocks()
    with ThreadPoolExecutor(4) as executor:
        missed = [
            executor.submit(_count_missed, [*CHANGES[i:], *CHANGES[:i]] * 50)
            for i in range(4)
        ]
    return {"missed": sum(result.result() for result in missed)}


def _count_missed(changes: list[Callable[[Watch], None]]) -> int:
    missed = 0
    with closing(open_notifier()) as notifier:

        def watch(start: int, end: int) -> None:
            notifier.register(start, end)

        for change in changes:
            change(watch)
            (region,) = notifier.regions.values()
            hits = {e.region for e in drain(notifier) if isinstance(e, Inval)}
            missed += region not in hits
            region.unregister()
    return missed
