"""What the scenarios share."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aioummu
from aioummu import EmbeddedDevice, Notifier
from tests.memory import MADV_DONTNEED, Pages
from tests.pipe_device import drain

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from aioummu import Event, Region


def say(**facts: Any) -> None:  # noqa: ANN401 - whatever JSON can say
    """Tell the test, at once and from any process."""
    os.write(1, (json.dumps(facts) + "\n").encode())


def open_notifier() -> Notifier:
    """Open one outside of any event loop: what was reported is there at once."""
    return Notifier(EmbeddedDevice())


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def reports(notifier: Notifier) -> list[str]:
    """Unmap what the notifier watches, and return what it reports."""
    with Pages(1) as pages:
        region = notifier.register(pages.start, pages.end)
        drain(notifier)
    events = drain(notifier)
    region.unregister()
    return kinds(events)


def attempt(function: Callable[[], object]) -> str:
    """Name what the function does: an error, or "fine"."""
    try:
        function()
    except (aioummu.UmmunotifyError, ImportError) as error:
        return type(error).__name__
    return "fine"


def until(condition: Callable[[], object]) -> None:
    """Wait for something that happens by itself; for ever, if it does not."""
    while not condition():
        time.sleep(0.001)


def open_files() -> int:
    # Without the one that lists them.
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1


def running_threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def resident_size() -> int:
    """Return how much memory the process has, in bytes."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def uses(notifier: Notifier, region: Region) -> dict[str, Callable[[], object]]:
    """Return all that can be done with a notifier and its region."""
    return {
        "register": lambda: notifier.register(region.start, region.end),
        "unregister": lambda: notifier.unregister(region.cookie),
        "read": notifier.read_nowait,
        "generation": lambda: notifier.generation,
        "changed": lambda: notifier.changed,
        "fence": notifier.fence,
        "spent": lambda: region.spent,
        "rearm": region.rearm,
    }


class Changing:
    """Pages that one thread keeps changing, in every way that is reported.

    What is unmapped is left alone: other threads may map something there.
    """

    def __init__(self) -> None:
        self.pages = Pages(4)

    def change(self) -> None:
        self.pages.madvise(MADV_DONTNEED, self.pages.page(0))
        with self.pages as pages:
            self.pages = Pages(4)
            pages.move_to(self.pages, keep=True)
        self.pages.map_over(self.pages.page(0))
        self.pages.map_over()

    def watch_and_change(self, notifier: Notifier) -> None:
        with notifier.register(self.pages.start, self.pages.end):
            self.change()


class Meanwhile:
    """Threads that each repeat a function while the block runs.

    An error in one of them ends it, and is raised at the end of the block.
    """

    def __init__(self, *functions: Callable[[], object]) -> None:
        self.rounds = [0] * len(functions)
        self._functions = functions
        self._over = False
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._repeat, args=(number,))
            for number in range(len(functions))
        ]

    def _repeat(self, number: int) -> None:
        try:
            while not self._over:
                self._functions[number]()
                self.rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - raised where it is seen
            self._errors.append(error)

    def each_has_done(self, rounds: int) -> bool:
        """Whether all have done so many rounds, or one has failed."""
        return min(self.rounds) >= rounds or bool(self._errors)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


def fork(body: Callable[[], object], *, behind_the_back: bool = False) -> int:
    """Return the number of a child that runs the function, and nothing else.

    :param behind_the_back: without telling Python and the C library
    """
    # With the GIL, as the child needs one.
    how = native_with_the_gil().fork_behind_the_back if behind_the_back else os.fork
    child: int = how()
    if not child:
        status = 1
        try:
            body()
            status = 0
        except BaseException:  # noqa: BLE001 - there is nobody to see it
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What native.c has been compiled to.
_LIBRARY = "HANGS_NATIVE"


@cache
def native() -> ctypes.CDLL:
    """Return what ``native.c`` has; its functions run without the GIL."""
    library = ctypes.CDLL(os.environ[_LIBRARY])
    address, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulong
    library.watch.argtypes = [ctypes.c_int, address, size]
    library.change_memory_on_signals.argtypes = [
        *(address, address, size),
        *(count, ctypes.c_long),
    ]
    library.signals_left.restype = library.signals_handled.restype = count
    library.drop_pages.argtypes = [address, size, count]
    library.drop_pages.restype = count
    library.is_vforked_child_there.restype = ctypes.c_bool
    return library


@cache
def native_with_the_gil() -> ctypes.PyDLL:
    return ctypes.PyDLL(os.environ[_LIBRARY])
