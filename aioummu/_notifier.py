"""The asynchronous notifier: events of a device, for one task."""

from __future__ import annotations

import errno
import threading
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

from anyio import sleep
from anyio.lowlevel import checkpoint

from aioummu._backends import open_device
from aioummu._errors import (
    BusyError,
    ClosedError,
    DuplicateCookieError,
    ForkedError,
    ProcessGoneError,
    UnknownCookieError,
)
from aioummu._forks import track
from aioummu._readiness import open_readiness
from aioummu._records import (
    LAST,
    RECORD_SIZE,
    Event,
    Last,
    Record,
    as_record,
    decode,
    unpack,
)
from aioummu._regions import Region, address_range, checked_cookie, checked_range

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from typing import Self

    from aioummu._backends import Backend
    from aioummu._device import DeviceLike
    from aioummu._readiness import ReadinessKind
    from aioummu._regions import BufferLike

T = TypeVar("T")

# Enough to make the price of a read(2) and a checkpoint small beside that of the
# decoding; and decoding so many takes less than a millisecond of the event loop.
_RECORDS_PER_READ = 1024

# Readable, and then there is nothing, again and again: another process that has the
# same open file is faster, or keeps others from reading. It shall not keep the event
# loop busy. Seconds.
_VAIN_WAKE_UPS = 8
_VAIN_PAUSE = 0.01


@asynccontextmanager
async def open_notifier(
    *,
    backend: Backend = "auto",
    path: str | os.PathLike[str] | None = None,
    device: DeviceLike | None = None,
    readiness: ReadinessKind = "poll",
) -> AsyncIterator[Notifier]:
    """Watch this process's memory; closes the notifier at the end of the block.

    ::

        async with aioummu.open_notifier() as notifier:
            with notifier.register(buffer):
                async for event in notifier:
                    ...

    :param backend: ``"driver"``, ``"embedded"``, or ``"auto"``: the driver where
        it can be used, else the embedded backend, see ``docs/backends.md``
    :param path: the driver's device, if it is not the usual one; then, only the
        driver is used
    :param device: a device that is open already, or a stand-in for it, instead
        of the others; the notifier closes it
    :param readiness: how to wait: ``"poll"`` has the event loop poll the device,
        ``"sigio"`` has the kernel send a signal. That is SIGIO in the main
        thread, where it replaces a handler of the program for that time; and
        SIGRTMIN, blocked, in other threads.
    :raises NoBackendError: if neither backend can be used
    :raises NoDeviceError: if there is no such device
    :raises DevicePermissionError: if the caller may not use the wanted backend
    :raises ForeignDeviceError: if it is something else than an ummunotify device
    :raises UnsupportedKernelError: if the kernel is too old for the embedded one
    :raises SubinterpreterError: if that is wanted in a sub-interpreter
    :raises DeviceError: if it cannot be opened for another reason
    """
    if device is None:
        device = open_device(backend, path)
    elif backend != "auto" or path is not None:
        raise ValueError("device takes the place of backend and path")
    notifier = Notifier(device, readiness)
    try:
        yield notifier
    finally:
        notifier.close()


class Notifier:
    """An open device whose events one task receives.

    Made by :func:`open_notifier`. It is an asynchronous iterator of its events::

        async for event in notifier:
            match event:
                case aioummu.Inval(region=region, start=start, end=end): ...
                case aioummu.Last(generation=generation): ...

    The iteration ends when the watched process has ended. An event is received
    once: iterators and :meth:`read_nowait` share them. A cancelled task
    loses none. A report for a region that was unregistered meanwhile is dropped.

    Synchronization: belongs to the event loop that it was opened in, where one
    task at a time receives; others get :exc:`BusyError`. Any thread may register
    and unregister, look at :attr:`regions`, :attr:`generation` and
    :attr:`changed`. Unusable in forked children.
    """

    def __init__(self, device: DeviceLike, readiness: ReadinessKind = "poll") -> None:
        self._closed = False
        self._forked = False
        self._device = device
        try:
            self._readiness = open_readiness(readiness, device.fileno())
        except BaseException:
            device.close()
            raise
        self._page = device.page
        # The generation of the last LAST that was handed out.
        self._reported = 0
        # What the page says while the generation is surely that one. At first
        # nothing that it ever says: it may be wiped in children, and read 0.
        self._settled = -1
        self._regions: dict[int, Region] = {}
        self._cookies = count(1)
        # Held from the read to the look-up of the regions, so that a record
        # cannot be taken for one of a region that got its cookie in between.
        # Reentrant: a finalizer that unregisters can run anywhere.
        self._lock = threading.RLock()
        self._buffer = memoryview(bytearray(_RECORDS_PER_READ * RECORD_SIZE))
        self._decode = partial(decode, regions=self._regions)
        # What was read and not handed out yet; whoever gets cancelled, it stays.
        self._backlog: deque[Event] = deque()
        self._receiving = False
        track(self)

    @property
    def closed(self) -> bool:
        """Whether the notifier was closed."""
        return self._closed

    @property
    def backend(self) -> str:
        """The backend in use: ``"driver"`` or ``"embedded"``."""
        return self._device.backend

    @property
    def regions(self) -> Mapping[int, Region]:
        """The registered regions by cookie; a live view, not a copy."""
        return MappingProxyType(self._regions)

    @property
    def generation(self) -> int:
        """The number of invalidations of any region since the device was opened.

        No system call; if nothing has changed, a load from memory.

        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        return self._device.generation if self.changed else self._reported

    @property
    def changed(self) -> bool:
        """Whether there were invalidations since the last :class:`Last` event.

        While it is false, all that was ever reported has been received, and no
        region has changed since. A load from memory, no system call; only the
        first look after a change takes longer.

        On the embedded backend that is true of changes whose call has returned;
        see :meth:`fence`.

        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        try:
            word = self._page[0]
            if word == self._settled:
                return False
            reported = self._reported
            if self._device.generation != reported:
                return True
        except (ValueError, ClosedError):
            raise self._gone() from None
        # The word is older than the generation, so it can only be outdated.
        self._settled = word
        return False

    @overload
    def register(
        self, buffer: BufferLike, /, *, cookie: int | None = None
    ) -> Region: ...

    @overload
    def register(
        self, start: int, end: int, /, *, cookie: int | None = None
    ) -> Region: ...

    def register(
        self,
        buffer_or_start: BufferLike | int,
        end: int | None = None,
        /,
        *,
        cookie: int | None = None,
    ) -> Region:
        """Watch a buffer's memory, or the addresses from start to end.

        Takes anything with the buffer protocol (bytearray, memoryview, mmap,
        array, ctypes, numpy) and keeps no export of it: the buffer can be closed,
        resized and freed, which is what will be reported. Reports are precise to
        what the kernel was asked to change, mostly whole pages: neighbours of a
        small buffer in its page count as well.

        :param buffer_or_start: the buffer, or the address of the first byte
        :param end: address behind the last byte
        :param cookie: a number of 64 bits to name the region, unique within the
            notifier; chosen if left out
        :returns: the region, a context manager that unregisters it
        :raises InvalidBufferError: if the buffer is empty or not contiguous
        :raises InvalidRangeError: unless 0 <= start < end < 2**64, or if the
            cookie does not fit 64 bits
        :raises DuplicateCookieError: if the cookie names a region already
        :raises TooManyRegionsError: if the backend's limit is reached
        :raises UnwatchableRangeError: if the embedded backend cannot watch what
            is mapped there, or if nothing is
        :raises RangeBusyError: if another userfaultfd owns what is mapped there
        :raises ProcessGoneError: if the watched process has ended
        :raises DeviceError: if the backend refuses for another reason
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        if end is None:
            start, end = address_range(cast("BufferLike", buffer_or_start))
        else:
            start, end = checked_range(cast("int", buffer_or_start), end)
        with self._lock:
            self._check_open()
            if cookie is None:
                cookie = next(c for c in self._cookies if c not in self._regions)
            else:
                cookie = checked_cookie(cookie)
                if cookie in self._regions:
                    raise DuplicateCookieError(
                        f"cookie {cookie} names {self._regions[cookie]!r} already: "
                        "unregister that one first, or choose another"
                    )
            self._device.register(start, end, cookie)
            region = self._regions[cookie] = Region(cookie, start, end, self)
        return region

    def unregister(self, cookie: int) -> None:
        """Stop watching the region with this cookie, see Region.unregister().

        :raises UnknownCookieError: if the cookie names no region
        :raises DeviceError: if the driver refuses
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        with self._lock:
            self._check_open()
            region = self._regions.get(cookie)
            if region is None:
                raise UnknownCookieError(f"cookie {cookie} names no region")
            self._withdraw(region)

    def fence(self) -> bool:
        """Wait until every change that is under way has been counted.

        The driver counts a change before the first page goes, so this does
        nothing there. The embedded backend counts an unmapping before the call
        that makes it returns, but after the memory has gone. So a thread that
        may have been given an address which another is just giving back asks::

            if notifier.fence() and not notifier.changed: ...  # still true

        That is one system call, unless somebody is changing watched mappings at
        this moment.

        :returns: False if others changed watched mappings for 50 ms without a
            pause, so that nobody can tell: anything may have changed then
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        self._check_open()
        return self._device.fence()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            try:
                event = self._backlog.popleft()
            except IndexError:
                self._backlog.extend(await self._receive(self._decode))
                continue
            if isinstance(event, Last):
                self._reported = event.generation
                return event
            # It may have been unregistered while the event lay here.
            if event.region._registered:
                return event

    def batches(self) -> AsyncIterator[list[Event]]:
        """Iterate over lists of events: all that one system call returned.

        No list is empty. Raises what iterating over the notifier does.
        """
        return _Batches(self._next_batch)

    def raw_batches(self) -> AsyncIterator[list[Record]]:
        """Iterate over lists of undecoded records, for speed.

        A record is a tuple of the integers type, flags, hint_start, hint_end and
        user_cookie_counter, see the driver's ``linux/ummunotify.h``. Reports for
        regions that another thread unregisters meanwhile are not dropped.
        Raises what iterating over the notifier does.
        """
        return _Batches(self._next_raw_batch)

    def read_nowait(self) -> list[Event]:
        """Return what there is to receive now, without waiting.

        :returns: the events; the list ends with :class:`Last` unless there are
            more; empty if there are none now
        :raises ProcessGoneError: if the watched process has ended and everything
            was received
        :raises BusyError: if a task is waiting for events
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        self._check_open()
        if self._receiving:
            raise BusyError
        return self._hand_out(self._take_backlog() or self._read(self._decode) or [])

    def close(self) -> None:
        """Unregister everything and release the device; harmless if repeated.

        A task that is waiting for events gets :exc:`ClosedError`. To be called
        in the notifier's event loop.
        """
        if self._closed:
            return
        self._closed = True
        self._page = _RELEASED
        self._backlog.clear()
        try:
            # First: nobody may keep waiting for a number that another file gets.
            self._readiness.close()
        finally:
            with self._lock:
                self._device.close()
                self._regions.clear()

    async def aclose(self) -> None:
        """Do as close() does, then let other tasks run."""
        self.close()
        await checkpoint()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._regions)} regions"
        return f"<{type(self).__name__} of {self._device!r}, {state}>"

    def _after_fork_in_child(self) -> None:
        # Nothing else: readiness and device share the parent's open file.
        self._forked = not self._closed
        self._closed = True
        self._page = _RELEASED
        self._backlog.clear()
        self._lock = threading.RLock()

    def _withdraw(self, region: Region, /) -> None:
        """Unregister a region of this notifier, if it is registered still."""
        with self._lock:
            if region.registered:
                self._device.unregister(region.cookie)
                del self._regions[region.cookie]
            region._registered = False

    def _spent(self, region: Region, /) -> bool:
        with self._lock:
            if self._forked:
                raise self._gone()
            return region.registered and self._device.spent(region.cookie)

    def _rearm(self, region: Region, /) -> None:
        with self._lock:
            self._check_open()
            if not region.registered:
                raise UnknownCookieError(f"{region!r}: register it anew")
            self._device.rearm(region.cookie)

    def _gone(self) -> ClosedError | ForkedError:
        if self._forked:
            return ForkedError(
                "the notifier was opened before this process was forked, so it "
                "watches the parent's memory: open one in the child"
            )
        return ClosedError("the notifier was closed")

    def _check_open(self) -> None:
        if self._closed:
            raise self._gone()

    async def _next_batch(self) -> list[Event]:
        events = self._take_backlog()
        while not events:
            events = await self._receive(self._decode)
        return self._hand_out(events)

    async def _next_raw_batch(self) -> list[Record]:
        # What was read by another way of receiving comes first.
        records = [as_record(event) for event in self._take_backlog()]
        if not records:
            records = await self._receive(unpack)
        kind, _, _, _, value = records[-1]
        if kind == LAST:
            self._reported = value
        return records

    def _take_backlog(self) -> list[Event]:
        events = [
            e for e in self._backlog if isinstance(e, Last) or e.region.registered
        ]
        self._backlog.clear()
        return events

    def _hand_out(self, events: list[Event]) -> list[Event]:
        if events and isinstance(last := events[-1], Last):
            self._reported = last.generation
        return events

    async def _receive(self, decode: Callable[[memoryview], list[T]]) -> list[T]:
        """Wait for something to read, and return it."""
        self._check_open()
        if self._receiving:
            raise BusyError
        self._receiving = True
        try:
            # Before the read: an await behind it could lose what was read.
            await checkpoint()
            in_vain = 0
            while (items := self._read(decode)) is None:
                if in_vain > _VAIN_WAKE_UPS:
                    await sleep(_VAIN_PAUSE)
                await self._readiness.wait()
                in_vain += 1
        except ProcessGoneError:
            raise StopAsyncIteration from None
        finally:
            self._receiving = False
        return items

    def _read(self, decode: Callable[[memoryview], list[T]]) -> list[T] | None:
        """Return what one read gave; None: nothing yet."""
        with self._lock:
            self._check_open()
            size = self._device.readinto(self._buffer)
            if size is None:
                return None
            if size == 0:
                raise ProcessGoneError(
                    errno.ESRCH,
                    "the watched process has ended or called exec, "
                    "and everything that was reported about it was received",
                )
            return decode(self._buffer[:size])


class _Batches(Generic[T]):
    """An iterator that holds nothing itself: it can be left at any point."""

    def __init__(self, fetch: Callable[[], Awaitable[list[T]]]) -> None:
        self._fetch = fetch

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[T]:
        return await self._fetch()


# In place of the page of a notifier that cannot be used any more.
_RELEASED = memoryview(b"")
_RELEASED.release()
