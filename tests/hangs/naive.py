"""The controls: readers without the engine's care, each of which hangs.

They watch memory as the engine does, and show first that they work: a harmless change
goes through. Then they say "hangs", and do what they cannot stand.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING

from tests.hangs import gil, heap
from tests.hangs.child import fork, native, say, until
from tests.memory import PAGE, Pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hangs.gil import Watch

_MESSAGE_SIZE = 32

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.free.argtypes = [ctypes.c_void_p]


class NaiveReader:
    """A userfaultfd and its reader, who does something else before each read."""

    def __init__(self, before_read: Callable[[], object] = lambda: None) -> None:
        self.fd = native().open_userfaultfd()
        assert self.fd >= 0, os.strerror(-self.fd)
        self.events = 0
        self.before_read = before_read
        self.thread = threading.Thread(target=self._run, daemon=True)

    def watch(self, start: int, end: int) -> None:
        start -= start % PAGE
        end += -end % PAGE
        error = native().watch(self.fd, start, end - start)
        assert not error, os.strerror(-error)

    def read(self) -> None:
        self.before_read()
        os.read(self.fd, _MESSAGE_SIZE)
        self.events += 1

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            poll.poll()
            self.read()


def unmap(watch: Watch) -> None:
    """Unmap memory, without the GIL."""
    pages = Pages(4)
    watch(pages.start, pages.end)
    pages.munmap()


def _started(before_read: Callable[[], object] = lambda: None) -> NaiveReader:
    """Return a reader in a thread, which has proved that it works."""
    reader = NaiveReader(before_read)
    reader.thread.start()
    unmap(reader.watch)
    until(lambda: reader.events)
    say(events=reader.events, hangs=True)
    return reader


def unmapping_with_the_gil() -> dict[str, bool]:
    gil.unmap(_started().watch)
    return {"survived": True}


def freeing_with_the_gil() -> dict[str, bool]:
    gil.map_large_blocks()
    gil.free_bytearray(_started().watch)
    return {"survived": True}


def unmapping_in_the_loop_that_reads() -> dict[str, bool]:
    async def main() -> None:
        reader = NaiveReader()
        asyncio.get_running_loop().add_reader(reader.fd, reader.read)
        await asyncio.to_thread(unmap, reader.watch)
        say(events=reader.events, hangs=True)
        unmap(reader.watch)

    asyncio.run(main())
    return {"survived": True}


def allocating_before_reading() -> dict[str, bool]:
    heap.share_one()
    reader = _started(lambda: _libc.free(_libc.malloc(heap.BLOCK)))
    blocks = heap.blocks_with_holes()
    reader.watch(*heap.span(blocks))
    heap.trim()
    return {"survived": True}


def locking_before_reading() -> dict[str, bool]:
    lock = threading.Lock()

    def take_and_release() -> None:
        with lock:
            pass

    reader = _started(take_and_release)
    with lock:
        unmap(reader.watch)
    return {"survived": True}


def handling_signals_in_the_reader() -> dict[str, bool]:
    reader = _started()
    pages = Pages(2)
    reader.watch(pages.start, pages.end)
    native().change_memory_on_signals(pages.start, pages.start + PAGE, PAGE, 1, 0)
    assert reader.thread.ident
    signal.pthread_kill(reader.thread.ident, signal.SIGALRM)
    until(native().signals_handled)
    return {"survived": True}


def closing_while_a_child_has_a_copy() -> dict[str, bool]:
    reader = _started()
    pages = Pages(1)
    reader.watch(pages.start, pages.end)
    fork(signal.pause, behind_the_back=True)
    os.close(reader.fd)
    pages.munmap()
    return {"survived": True}


def reading_no_more() -> dict[str, bool]:
    reader = _started()
    reader.before_read = sys.exit
    unmap(reader.watch)
    return {"survived": True}
