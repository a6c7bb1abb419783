"""malloc() gives memory of watched heaps back, and holds its lock meanwhile."""

from __future__ import annotations

import ctypes
from contextlib import closing
from typing import Any

from aioummu._regions import address_range
from tests.hangs.child import Meanwhile, open_notifier
from tests.pipe_device import drain

# Too large for Python's own allocator and for malloc()'s cache of a thread, too
# small for a mapping of its own.
BLOCK = 8 << 10

_M_ARENA_MAX = -8

_libc = ctypes.CDLL(None)


def trim() -> None:
    """Give back what is free in all heaps."""
    _libc.malloc_trim(0)


def blocks_with_holes() -> list[bytearray]:
    """Allocate blocks, and free those between them."""
    return [bytearray(BLOCK) for _ in range(40)][::2]


def span(blocks: list[bytearray]) -> tuple[int, int]:
    """Return from where to where they are, with the holes."""
    ranges = [address_range(block) for block in blocks]
    return min(ranges)[0], max(ranges)[1]


def share_one() -> None:
    """Let all threads use the same heap, and its lock; as if there were many."""
    assert _libc.mallopt(_M_ARENA_MAX, 1)


def trimming(heaps: str) -> dict[str, Any]:
    """Trim heaps while other threads use them and watch them."""
    if heaps == "one":
        share_one()
    lost = 0
    with closing(open_notifier()) as notifier, closing(open_notifier()) as other:

        def watch_small_blocks() -> None:
            blocks = blocks_with_holes()
            regions = [other.register(block) for block in blocks]
            other.read_nowait()
            del blocks
            for region in regions:
                region.unregister()

        def read() -> None:
            other.read_nowait()
            _ = other.changed, other.generation
            other.fence()

        with Meanwhile(trim, watch_small_blocks, watch_small_blocks, read) as others:
            while not others.each_has_done(100):
                blocks = blocks_with_holes()
                region = notifier.register(*span(blocks))
                trim()
                lost += not drain(notifier)
                region.unregister()
                drain(notifier)
    return {"lost": lost}
