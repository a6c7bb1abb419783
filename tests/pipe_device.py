"""A device made of a pipe, whose other end the test holds."""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

import aioummu

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer


# By hand, not from the library: it is what the tests compare with.
RECORD = Struct("=IIQQQ")

#: Seconds after which a test gives up; no test waits that long unless it fails.
LIMIT = 60


def inval(cookie: int, start: int, end: int, *, exact: bool = True) -> bytes:
    return RECORD.pack(0, int(exact), start, end, cookie)


def last(generation: int) -> bytes:
    return RECORD.pack(1, 0, 0, 0, generation)


class PipeDevice:
    """Reports what the test sends.

    What is in the pipe stays there: unlike the driver, it forgets no report when
    a region is unregistered.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._receiver, False)
        self._memory = bytearray(8)
        self.page = memoryview(self._memory).cast("Q")
        self.backend = "pipe"
        self.features = aioummu.Feature(0)
        self.generation = 0
        self.regions: dict[int, tuple[int, int]] = {}
        self.spent_cookies: set[int] = set()
        self.fences = 0
        #: How often readinto() finds nothing, whatever is there.
        self.hiccups = 0
        #: Called by readinto() after it has read.
        self.after_read: Callable[[], object] = lambda: None
        self.reads = 0
        #: How often readinto() found nothing, after which its caller waits.
        self.empty_reads = 0

    # What a test does.

    def send(self, *records: bytes) -> None:
        os.write(self._sender, b"".join(records))

    def set_generation(self, generation: int) -> None:
        self.generation = generation
        self.stir()

    def stir(self) -> None:
        """Something may have changed."""
        self.page[0] += 1

    def end(self) -> None:
        """Let the watched process end."""
        if self._sender >= 0:
            os.close(self._sender)
            self._sender = -1

    async def until_waited_for(self) -> None:
        """Let other tasks run until one of them waits for a report."""
        seen = self.empty_reads
        await until(lambda: self.empty_reads > seen)

    # What a notifier needs.

    def fileno(self) -> int:
        return self._receiver

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: aioummu.Cause | None = None,
        once: bool = False,
    ) -> None:
        assert cookie not in self.regions
        assert causes is None
        assert not once
        self.regions[cookie] = start, end

    def state(self, cookie: int) -> None:
        assert cookie in self.regions

    def watch_word(self, cookie: int) -> tuple[aioummu.Page, int]:
        assert cookie in self.regions
        return self.page, 0

    def unregister(self, cookie: int) -> None:
        del self.regions[cookie]

    def spent(self, cookie: int) -> bool:
        return cookie in self.spent_cookies

    def rearm(self, cookie: int) -> None:
        self.spent_cookies.discard(cookie)

    def fence(self) -> bool:
        self.fences += 1
        return self.fences < 2

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        self.reads += 1
        if self.hiccups:
            self.hiccups -= 1
            self.empty_reads += 1
            return None
        try:
            size = os.readv(self._receiver, (buffer,))
        except BlockingIOError:
            self.empty_reads += 1
            return None
        self.after_read()
        return size

    def close(self) -> None:
        if self._receiver >= 0:
            os.close(self._receiver)
            self._receiver = -1


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks run until the condition holds."""
    with anyio.fail_after(LIMIT):
        while not condition():
            await checkpoint()


def drain(notifier: aioummu.Notifier) -> list[aioummu.Event]:
    """Return everything that there is to receive now."""
    events = []
    while batch := notifier.read_nowait():
        events += batch
    return events
