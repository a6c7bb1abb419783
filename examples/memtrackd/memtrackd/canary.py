"""How long it takes from a change of memory to its event, right here and now."""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING

import anyio

import aioummu

if TYPE_CHECKING:
    from collections.abc import Callable


async def sing(every: float, heard: Callable[[str, float], None]) -> None:
    """Unmap a page of this process now and then, and time its event.

    :param every: seconds between
    :param heard: told the backend, and the seconds that it took
    :raises aioummu.DeviceError: if memory cannot be watched on this machine
    """
    async with aioummu.open_notifier() as notifier:
        while True:
            heard(notifier.backend, await _sing_once(notifier))
            await anyio.sleep(every)


async def _sing_once(notifier: aioummu.Notifier) -> float:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    with notifier.register(page) as region:
        begun = time.perf_counter()
        page.close()
        async for event in notifier:
            match event:
                case aioummu.Inval(region=hit) if hit is region:
                    return time.perf_counter() - begun
    raise RuntimeError("the notifier of this process has ended")
