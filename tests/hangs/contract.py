"""What every user can rely on, in short."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Loaded by name otherwise, when that user may not read it any more.
import anyio._backends._asyncio  # noqa: F401

import aioummu
from tests.hangs.child import kinds, say
from tests.memory import MADV_DONTNEED, Pages

if TYPE_CHECKING:
    from aioummu import Notifier, Region

_KNOB = Path("/proc/sys/vm/unprivileged_userfaultfd")


def in_short() -> dict[str, Any]:
    """Register, drop, unmap, rearm; and tell who did."""
    status = Path("/proc/self/status").read_text("utf-8")
    capabilities = dict(line.split(":\t") for line in status.splitlines())["CapEff"]
    say(
        root=0 in os.getresuid(),
        privileged=int(capabilities, 16) != 0,
        unprivileged_userfaultfd=int(_KNOB.read_text("utf-8")),
    )
    return asyncio.run(_use())


async def _use() -> dict[str, Any]:
    async with aioummu.open_notifier(backend="embedded") as notifier:
        pages = Pages(4)
        region = notifier.register(pages.start, pages.end)
        pages.madvise(MADV_DONTNEED)
        dropped = await _received(notifier, region)
        pages.map_over()
        mapped_over = await _received(notifier, region)
        region.rearm()
        pages.munmap()
        return {
            "dropped": dropped,
            "mapped over": mapped_over,
            "unmapped": await _received(notifier, region),
            "generation": notifier.generation,
            "changed": notifier.changed,
        }


async def _received(notifier: Notifier, region: Region) -> tuple[list[str], bool]:
    return kinds([await anext(notifier), await anext(notifier)]), region.spent
