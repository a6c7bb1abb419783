"""A signal handler changes watched memory, wherever it interrupts the program."""

from __future__ import annotations

import contextlib
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import aioummu
from tests.hangs.child import native, open_notifier
from tests.memory import MADV_DONTNEED, Pages

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

# In total: it may take longer to run the handler than until the next signal.
SIGNALS = 2000
_DELAY = 200e-6


def handler_in_c() -> dict[str, Any]:
    """It interrupts the engine as well, and holders of its lock."""
    return _interrupt_in_c()


def handler_in_c_in_a_thread() -> dict[str, Any]:
    """The same where the main thread does not take the signals upon itself.

    So any other thread may get them that does not block them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])

    def run() -> dict[str, Any]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        return _interrupt_in_c()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def _interrupt_in_c() -> dict[str, Any]:
    remapped, dropped = Pages(1), Pages(1)

    def start() -> None:
        error = native().change_memory_on_signals(
            remapped.start, dropped.start, dropped.size, SIGNALS, int(_DELAY * 1e6)
        )
        assert not error

    return _use_everything(
        remapped,
        dropped,
        start=start,
        ended=lambda: not native().signals_left(),
        handled=lambda: int(native().signals_handled()),
    )


def handler_in_python() -> dict[str, Any]:
    """It interrupts the library, and holders of a notifier's lock."""
    remapped, dropped = Pages(1), Pages(1)
    handled = 0

    def change_memory(_signum: int, _frame: FrameType | None) -> None:
        nonlocal handled
        remapped.munmap()
        remapped.map_over()
        dropped.madvise(MADV_DONTNEED)
        handled += 1
        if handled < SIGNALS:
            signal.setitimer(signal.ITIMER_REAL, _DELAY)

    signal.signal(signal.SIGALRM, change_memory)
    return _use_everything(
        remapped,
        dropped,
        start=lambda: signal.setitimer(signal.ITIMER_REAL, _DELAY),
        ended=lambda: handled == SIGNALS,
        handled=lambda: handled,
    )


def _use_everything(
    remapped: Pages,
    dropped: Pages,
    *,
    start: Callable[[], object],
    ended: Callable[[], bool],
    handled: Callable[[], int],
) -> dict[str, Any]:
    """Use the library until there are no more signals; count what was reported."""
    rounds = 0
    with closing(open_notifier()) as counter:
        counter.register(dropped.start, dropped.end)
        start()
        while not ended():
            with closing(open_notifier()) as notifier:
                # The handler may have unmapped it, and not mapped it again.
                with contextlib.suppress(aioummu.UnwatchableRangeError):
                    region = notifier.register(remapped.start, remapped.end)
                    notifier.read_nowait()
                    _ = notifier.generation, notifier.changed, region.spent
                    notifier.fence()
                    region.rearm()
                    region.unregister()
                notifier.register(dropped.start, dropped.end)
            counter.read_nowait()
            rounds += 1
        return {
            "interrupted": rounds > 0,
            "handled": handled(),
            "generation": counter.generation,
        }
