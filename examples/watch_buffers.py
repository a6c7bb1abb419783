"""Watch a few buffers while their memory is dropped, moved and unmapped.

Needs the driver. Ends by itself; the last line counts the events, and the
changes for which none came.
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

import anyio

import aioummu

try:
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = mmap.PAGESIZE
#: So large that malloc() maps it instead of carving it out of the heap.
LARGE = 40 << 20


class Watch:
    """Prints the events, and compares them with what was done."""

    def __init__(self, notifier: aioummu.Notifier) -> None:
        self.notifier = notifier
        self.names: dict[aioummu.Region, str] = {}
        self.events = 0
        self.missed = 0
        self._reported: set[aioummu.Region] = set()
        self._all_told = anyio.Event()

    def register(
        self, name: str, buffer: mmap.mmap | bytearray | np.ndarray
    ) -> aioummu.Region:
        """Watch a buffer under a name."""
        region = self.notifier.register(buffer)
        self.names[region] = name
        print(f"watching {name}: {region}")
        return region

    async def print_events(self) -> None:
        """Print what comes, until cancelled."""
        async for event in self.notifier:
            self.events += 1
            match event:
                case aioummu.Inval(region=region, start=start, end=end, exact=exact):
                    self._reported.add(region)
                    pages = -(-(end - start) // PAGE)
                    what = f"{pages} pages" if exact else "several changes within"
                    print(f"    {self.names[region]}: {what} {start:#x}-{end:#x}")
                case aioummu.Last(generation=generation):
                    print(f"    that was all until generation {generation}")
                    self._all_told.set()
                    self._all_told = anyio.Event()

    async def expect(
        self, what: str, region: aioummu.Region, change: Callable[[], object]
    ) -> None:
        """Do something to the memory of a region, and wait for the report."""
        print(f"{what} ...")
        self._reported.clear()
        change()
        # Without a report, the generation has not changed, and nothing is awaited.
        while self.notifier.changed:
            await self._all_told.wait()
        if region not in self._reported:
            self.missed += 1
            print("    NOT REPORTED")


async def change_buffers(watch: Watch) -> None:
    mapped = mmap.mmap(-1, 16 * PAGE)
    mapped[:] = b"x" * len(mapped)
    with watch.register("mmap", mapped) as region:
        await watch.expect(
            "mmap.madvise(MADV_DONTNEED) of its pages 4 to 7",
            region,
            lambda: mapped.madvise(mmap.MADV_DONTNEED, 4 * PAGE, 4 * PAGE),
        )
        await watch.expect(
            "mmap.resize() to its half", region, lambda: mapped.resize(8 * PAGE)
        )
        # The kernel had put it right below another mapping: it has to move.
        await watch.expect(
            "mmap.resize() to 64 times that", region, lambda: mapped.resize(512 * PAGE)
        )
    with watch.register("moved mmap", mapped) as region:
        await watch.expect("mmap.close()", region, mapped.close)

    buffer = bytearray(LARGE)
    with watch.register("bytearray", buffer) as region:
        await watch.expect("bytearray.clear()", region, buffer.clear)

    if np is not None:
        arrays = [np.empty(LARGE, np.uint8)]
        with watch.register("numpy array", arrays[0]) as region:
            await watch.expect("freeing the numpy array", region, arrays.clear)


async def main() -> int:
    async with aioummu.open_notifier() as notifier, anyio.create_task_group() as tasks:
        watch = Watch(notifier)
        tasks.start_soon(watch.print_events)
        await change_buffers(watch)
        tasks.cancel_scope.cancel()
    print(f"watch_buffers: events={watch.events} missed={watch.missed}")
    return 1 if watch.missed else 0


if __name__ == "__main__":
    try:
        sys.exit(anyio.run(main))
    except aioummu.UmmunotifyError as error:
        sys.exit(f"watch_buffers: {error}")
