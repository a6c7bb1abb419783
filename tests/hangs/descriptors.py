"""Something in the process closes all descriptors, the engine's among them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from aioummu import Inval
from tests.hangs.child import attempt, open_files, open_notifier, reports, until
from tests.memory import MADV_DONTNEED, Pages
from tests.pipe_device import drain

if TYPE_CHECKING:
    from aioummu import Notifier


def _watched() -> tuple[Notifier, Pages]:
    notifier, pages = open_notifier(), Pages(4)
    notifier.register(pages.start, pages.end)
    return notifier, pages


def _close_all() -> None:
    os.closerange(3, 1000)


def _close_and_open_another(notifier: Notifier) -> dict[str, Any]:
    notifier.close()
    another = open_notifier()
    reported = reports(another)
    another.close()
    return {"another": reported}


def changing_memory() -> dict[str, Any]:
    """Change watched memory afterwards: then, all of it may have changed."""
    notifier, pages = _watched()
    others = [Pages(1) for _ in range(9)]
    for other in others:
        notifier.register(other.start, other.end)
    _close_all()
    pages.madvise(MADV_DONTNEED)
    for other in others:
        other.munmap()
    until(lambda: notifier.changed)
    hits = {e.region for e in drain(notifier) if isinstance(e, Inval)}
    return {
        "reported": len(hits),
        "register": attempt(lambda: notifier.register(pages.start, pages.end)),
        **_close_and_open_another(notifier),
    }


def registering() -> dict[str, Any]:
    """Register afterwards, before anything has changed."""
    notifier, pages = _watched()
    _close_all()
    return {
        "register": attempt(lambda: notifier.register(pages.start, pages.end)),
        **_close_and_open_another(notifier),
    }


def closing() -> dict[str, Any]:
    """Close the notifier afterwards, before anything has changed."""
    notifier, pages = _watched()
    _close_all()
    facts = _close_and_open_another(notifier)
    pages.munmap()
    return facts


def opening_others() -> dict[str, Any]:
    """Open other files afterwards, which get the numbers, and change memory."""
    notifier, pages = _watched()
    before = open_files()
    _close_all()
    pipes = [os.pipe() for _ in range(before)]
    for end in sum(pipes, ()):
        os.set_blocking(end, False)
    pages.madvise(MADV_DONTNEED)
    pages.munmap()
    until(lambda: notifier.changed)
    notifier.read_nowait()
    facts = _close_and_open_another(notifier)
    return {"others untouched": all(map(_is_open_and_empty, pipes)), **facts}


def _is_open_and_empty(pipe: tuple[int, int]) -> bool:
    out, into = pipe
    try:
        return not os.read(out, 1)
    except BlockingIOError:
        return os.write(into, b"x") == 1 and os.read(out, 2) == b"x"
