"""Notifiers end: while memory changes, in finalizers, by the thousand."""

from __future__ import annotations

import contextlib
import gc
import warnings
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import aioummu
from tests.hangs.child import (
    Changing,
    Meanwhile,
    open_files,
    open_notifier,
    resident_size,
    running_threads,
    until,
)
from tests.memory import Pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioummu import Notifier


# Bytes that a process may have more afterwards: malloc() and Python keep some.
SLACK = 4 << 20


@contextlib.contextmanager
def everything_is_given_back() -> Iterator[None]:
    """Check that there are as many descriptors and threads as before."""
    before = open_files(), running_threads()
    yield
    # A thread that was joined can be seen for a moment.
    until(lambda: (open_files(), running_threads()) <= before)
    assert (open_files(), running_threads()) == before


def while_memory_changes() -> dict[str, Any]:
    """Open notifiers of memory that other threads keep changing, and close them.

    Each time, one is the last, and the engine stops.
    """
    changing = [Changing() for _ in range(3)]
    watched = 0
    with (
        everything_is_given_back(),
        Meanwhile(*(memory.change for memory in changing)) as others,
    ):
        while watched < 300 or not others.each_has_done(100):
            with ExitStack() as stack:
                for memory in changing:
                    notifier = stack.enter_context(closing(open_notifier()))
                    # There may be nothing just now.
                    with contextlib.suppress(aioummu.UnwatchableRangeError):
                        notifier.register(memory.pages.start, memory.pages.end)
                        watched += 1
    return {"watched": True}


def by_the_thousand() -> dict[str, Any]:
    """Open and close, with and without an engine that runs already."""
    memory = Pages(4)

    def open_and_close() -> None:
        with closing(open_notifier()) as notifier:
            notifier.register(memory.start, memory.end)

    with everything_is_given_back():
        open_and_close()
        before = resident_size()
        for _ in range(1000):
            open_and_close()
        with closing(open_notifier()):
            for _ in range(1000):
                open_and_close()
        return {"grown": resident_size() - before > SLACK}


class _Garbage:
    """Calls a function when the garbage collector finds it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._cycle = self

    def __del__(self) -> None:
        self._function()


def in_a_cycle() -> dict[str, Any]:
    """Leave notifiers, and what they watch, to the garbage collector."""
    changing = [Changing() for _ in range(2)]
    with (
        everything_is_given_back(),
        warnings.catch_warnings(record=True) as caught,
        Meanwhile(*(memory.change for memory in changing)) as others,
    ):
        warnings.simplefilter("always")
        for _ in range(50):
            notifier = open_notifier()
            for memory in changing:
                with contextlib.suppress(aioummu.UnwatchableRangeError):
                    notifier.register(memory.pages.start, memory.pages.end)
            cycle: list[object] = [notifier]
            cycle.append(cycle)
        del notifier, cycle
        gc.collect()
        until(lambda: others.each_has_done(100))
    return {"warnings": len(caught)}


def in_finalizers() -> dict[str, Any]:
    """Unregister and close in finalizers, whatever is being done when they run."""
    others: list[Notifier] = []
    with everything_is_given_back(), closing(open_notifier()) as notifier:

        def leave_garbage() -> None:
            memory = Pages(1)
            region = notifier.register(memory.start, memory.end)
            others.append(open_notifier())
            _Garbage(region.unregister)
            _Garbage(lambda: others.pop().close())
            memory.munmap()
            notifier.read_nowait()
            _ = notifier.changed, notifier.generation

        # Almost every allocation collects.
        gc.set_threshold(1)
        with Meanwhile(leave_garbage, leave_garbage) as threads:
            while not threads.each_has_done(100):
                leave_garbage()
        gc.collect()
        return {"left": len(notifier.regions) + len(others)}
