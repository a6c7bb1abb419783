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

from anyio import CancelScope, sleep
from anyio import Event as Flag
from anyio.lowlevel import checkpoint, current_token

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
    HINT,
    LAST,
    RECORD_SIZE,
    Event,
    Feature,
    Inval,
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
    from typing import Any, Self

    from aioummu._backends import Backend
    from aioummu._device import DeviceLike
    from aioummu._readiness import ReadinessKind
    from aioummu._records import Cause
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


class Waiter:
    """A task that waits until another one has read for it."""

    __slots__ = ("event", "flag", "is_stopped", "region")

    def __init__(self, region: Region | None) -> None:
        self.region = region
        self.is_stopped = False
        #: What was reported for the region since the task began to wait.
        self.event: Inval | None = None
        #: Set to wake it, while another one reads.
        self.flag: Flag | None = None

    def is_done(self) -> bool:
        region = self.region
        return (
            self.is_stopped
            or self.event is not None
            or (region is not None and not region.registered)
        )

    def wake(self) -> None:
        if self.flag is not None:
            self.flag.set()


class Notifier:
    """An open device, whose events tasks receive.

    Made by :func:`open_notifier`. It is an asynchronous iterator of its events::

        async for event in notifier:
            match event:
                case aioummu.Inval(region=region, start=start, end=end): ...
                case aioummu.Last(generation=generation): ...

    The iteration ends when the watched process has ended. An event is received
    once: iterators and :meth:`read_nowait` share them. A cancelled task
    loses none. A report for a region that was unregistered meanwhile is dropped.

    Beside that, any number of tasks can wait for single regions, see
    ``Region.invalidated()``. They read for each other and for the iterator; what the
    iterator has not received yet is kept for it, the reports of a region as one.

    Synchronization: belongs to the event loop that it was opened in, where one
    task at a time receives all events; others get :exc:`BusyError`. Any thread may
    register and unregister, look at :attr:`regions`, :attr:`generation` and
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
        # What others have read since: of each region one event. Comes after that.
        self._kept: dict[Region, Inval] = {}
        self._kept_last: Last | None = None
        # Somebody receives all events, or did.
        self._is_consumed = False

        # Of all tasks that wait, one waits for the device, and reads for all.
        self._consumer = Waiter(None)
        self._leader: Waiter | None = None
        self._leader_scope: CancelScope | None = None
        self._followers: dict[Waiter, None] = {}
        self._token: Any = None

        # Whether events are looked at when they are read: since somebody has waited
        # for a region, a region has no state, or ends with its report.
        self._is_attentive = False
        self._is_recording = False
        self._has_listeners = False
        self._has_stateless = Feature.STATE not in device.features
        self._once_count = 0
        self._has_once = False
        # Of regions without a state: those with a report since they were valid, and
        # the generation of the last LAST that was read.
        self._stale: set[Region] = set()
        self._drained = 0
        self._pay_attention()
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
    def features(self) -> Feature:
        """What the backend can do beyond reporting that something has changed."""
        return self._device.features

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
        try:
            if self._page[0] == self._settled:
                return self._reported
        except ValueError:
            raise self._gone() from None
        return self._device.generation if self.changed else self._reported

    @property
    def changed(self) -> bool:
        """Whether there were invalidations since the last :class:`Last` event.

        While it is false, all that was ever reported has been received, and no
        region has changed since. (Received by the iterator or its like; as long as
        none was ever used, by those who wait for regions.) A load from memory, no
        system call; only the first look after a change takes longer.

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
        self,
        buffer: BufferLike,
        /,
        *,
        cookie: int | None = None,
        causes: Cause | None = None,
        once: bool = False,
    ) -> Region: ...

    @overload
    def register(
        self,
        start: int,
        end: int,
        /,
        *,
        cookie: int | None = None,
        causes: Cause | None = None,
        once: bool = False,
    ) -> Region: ...

    def register(
        self,
        buffer_or_start: BufferLike | int,
        end: int | None = None,
        /,
        *,
        cookie: int | None = None,
        causes: Cause | None = None,
        once: bool = False,
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
        :param causes: what to report; None is everything. Other changes do not raise
            the generation, nor end :attr:`Region.valid`. Who asks for UNMAP or MOVE
            gets both; the end of the process is reported in any case
        :param once: the region ends with its first event: it is unregistered when
            that was received
        :returns: the region, a context manager that unregisters it
        :raises InvalidBufferError: if the buffer is empty or not contiguous
        :raises InvalidRangeError: unless 0 <= start < end < 2**64, or if the
            cookie does not fit 64 bits
        :raises DuplicateCookieError: if the cookie names a region already
        :raises TooManyRegionsError: if the backend's limit is reached
        :raises InvalidCauseError: if *causes* are none, or have FOREIGN in them
        :raises UnsupportedFeatureError: if the device cannot do that
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
            region = Region(cookie, start, end, self, causes=causes, once=once)
            region._is_recorded = self._is_recording
            if once:
                # Before its report can be read.
                self._once_count += 1
                self._has_once = True
                self._pay_attention()
            try:
                self._device.register(start, end, cookie, causes=causes, once=once)
            except BaseException:
                self._once_count -= once
                raise
            self._regions[cookie] = region
            region._page, region._index = self._device.watch_word(cookie)
            self._take_baseline(region)
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
                if self._has_kept:
                    self._restore_kept()
                else:
                    self._backlog.extend(await self._receive(self._decode))
                continue
            if isinstance(event, Last):
                self._reported = event.generation
                return event
            # It may have been unregistered while the event lay here.
            region = event.region
            if not region._withdrawn:
                if region._once:
                    region._registered = False
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
        self._is_consumed = True
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
        self._drop_events()
        for waiter in self._followers:
            waiter.wake()
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
        self._drop_events()
        self._lock = threading.RLock()

    def _drop_events(self) -> None:
        self._backlog.clear()
        self._kept.clear()
        self._kept_last = None

    def _withdraw(self, region: Region, /) -> None:
        """Unregister a region of this notifier, if it is registered still."""
        with self._lock:
            # One that has ended with its report is not there any more.
            if not self._closed and self._regions.get(region.cookie) is region:
                self._device.unregister(region.cookie)
                del self._regions[region.cookie]
                self._once_count -= region.once
            region._withdrawn = True
            region._registered = False
            region._page, region._unseen = (), None
            self._kept.pop(region, None)
            self._stale.discard(region)
            if region._listener is not None:
                region._listener(region)
            if region._waiters and not self._closed:
                self._call_soon(self._wake_waiters, region)

    def _is_valid(self, region: Region, /) -> bool:
        with self._lock:
            if self._forked:
                raise self._gone()
            if not region.registered or self._regions.get(region.cookie) is not region:
                return False
            # Loaded first, it can only be outdated.
            word = region._page[region._index]
            state = self._device.state(region.cookie)
            if state is None:
                valid = (
                    region not in self._stale
                    and self._device.generation == self._drained
                )
            else:
                valid = state == region._baseline
            if valid:
                region._settled = word
            return valid

    def _take_baseline(self, region: Region) -> None:
        """Call the region valid from now on, if nothing is being done to it."""
        word = region._page[region._index]
        state = self._device.state(region.cookie)
        if state is None:
            self._has_stateless = True
            self._pay_attention()
            self._stale.discard(region)
            return
        if state % 2:
            region._baseline, region._settled = None, -1
        else:
            region._baseline, region._settled = state, word

    def _spent(self, region: Region, /) -> bool:
        with self._lock:
            if self._forked:
                raise self._gone()
            return region.registered and self._device.spent(region.cookie)

    def _rearm(self, region: Region, /) -> None:
        with self._lock:
            self._check_open()
            if self._regions.get(region.cookie) is not region:
                raise UnknownCookieError(f"{region!r}: register it anew")
            if region._listener is not None:
                # What it was is over: whoever relies on that gives it up.
                region._listener(region)
                if self._regions.get(region.cookie) is not region:
                    return
            # If the device refuses, it is as invalid as before.
            self._device.rearm(region.cookie)
            self._take_baseline(region)
            region._unseen = None

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
            events = await self._receive(self._decode) or self._take_backlog()
        return self._hand_out(events)

    async def _next_raw_batch(self) -> list[Record]:
        # What was read by another way of receiving comes first.
        records: list[Record] = []
        while not records:
            records = [as_record(event) for event in self._take_backlog()]
            records = records or await self._receive(unpack)
        kind, _, _, _, value = records[-1]
        if kind == LAST:
            self._reported = value
        return records

    def _take_backlog(self) -> list[Event]:
        self._restore_kept()
        events = [
            e for e in self._backlog if isinstance(e, Last) or not e.region._withdrawn
        ]
        self._backlog.clear()
        return events

    def _hand_out(self, events: list[Event]) -> list[Event]:
        if self._has_once:
            for event in events:
                if isinstance(event, Inval):
                    self._received(event)
        if events and isinstance(last := events[-1], Last):
            self._reported = last.generation
        return events

    def _received(self, event: Inval) -> Inval:
        if event.region.once:
            event.region._registered = False
        return event

    # What is read for others.

    @property
    def _has_kept(self) -> bool:
        return bool(self._kept) or self._kept_last is not None

    def _keep(self, events: list[Event]) -> None:
        """Keep for the iterator what somebody else has read."""
        for event in events:
            if isinstance(event, Inval):
                # It may have been unregistered by who was told of it.
                if not event.region._withdrawn:
                    old = self._kept.get(event.region)
                    self._kept[event.region] = _merged(old, event)
            else:
                self._kept_last = event
                if not self._is_consumed:
                    self._reported = event.generation

    def _restore_kept(self) -> None:
        if self._has_kept:
            self._backlog.extend(self._kept.values())
            self._kept.clear()
            if self._kept_last is not None:
                self._backlog.append(self._kept_last)
                self._kept_last = None

    def _pay_attention(self) -> None:
        self._is_attentive = (
            self._is_recording
            or self._has_listeners
            or self._has_stateless
            or self._once_count > 0
        )

    def _attend(self, events: list[Event]) -> None:
        """Note what was read, and tell those who wait for a region."""
        for event in events:
            if isinstance(event, Last):
                self._drained = event.generation
                continue
            region = event.region
            if region.once and self._regions.get(region.cookie) is region:
                # The device has unregistered it.
                del self._regions[region.cookie]
                self._once_count -= 1
            if self._has_stateless:
                self._stale.add(region)
            if self._is_recording:
                region._unseen = _merged(region._unseen, event)
                for waiter in cast("list[Waiter]", region._waiters):
                    waiter.event = _merged(waiter.event, event)
                    self._wake(waiter)
            if region._listener is not None:
                region._listener(region)
        self._pay_attention()

    # For the registration cache.

    def _listen(self, region: Region, listener: Callable[[Region], object]) -> None:
        """Have it called whenever somebody has read a report for the region.

        Also, in any thread, when it is unregistered.
        """
        region._listener = listener
        self._has_listeners = self._is_attentive = True

    def _read_for_others(self) -> None:
        """Read what there is, and keep it for those who receive events."""
        while events := self._read(self._decode):
            self._keep(events)
            self._wake(self._consumer)
            if isinstance(events[-1], Last):
                break

    async def _read_until_stopped(self, waiter: Waiter) -> None:
        """Read for all others, until stop() is called with the waiter."""
        try:
            while not waiter.is_done():
                self._check_open()
                if self._leader is None:
                    await self._lead(waiter)
                else:
                    await self._follow(waiter)
        finally:
            self._appoint()

    def _stop(self, waiter: Waiter) -> None:
        waiter.is_stopped = True
        self._wake(waiter)

    # Tasks that wait for regions.

    async def _next_report(self, region: Region, /) -> Inval:
        """Wait for a report of the region, reading for all others meanwhile."""
        self._check_open()
        if not self._is_recording:
            self._token = current_token()
            self._is_recording = self._is_attentive = True
        waiter = Waiter(region)
        waiters = cast("list[Waiter]", region._waiters)
        waiters.append(waiter)
        try:
            await checkpoint()
            if not region._is_recorded:
                self._look_back(region)
            while True:
                self._check_open()
                event = waiter.event or region._unseen
                if event is not None:
                    break
                if not region.registered:
                    raise UnknownCookieError(
                        f"{region!r}: there is nothing to wait for"
                    )
                if self._leader is None:
                    await self._lead(waiter)
                else:
                    await self._follow(waiter)
        finally:
            waiters.remove(waiter)
            self._appoint()
        region._unseen = None
        return self._received(event)

    def _look_back(self, region: Region) -> None:
        """Find out what the iterator has received before anybody waited."""
        region._is_recorded = True
        if self._leader is None:
            self._keep(self._read(self._decode) or [])
            self._wake(self._consumer)
        if region._unseen is None and region.registered and not region.valid:
            region._unseen = Inval(region, region.start, region.end, exact=False)

    async def _lead(self, waiter: Waiter) -> None:
        """Wait for the device, and read for everybody, until woken."""
        self._leader = waiter
        try:
            in_vain = 0
            while not waiter.is_done():
                events = self._read(self._decode)
                if events is None:
                    await self._wait_as_leader(in_vain)
                    in_vain += 1
                    continue
                in_vain = 0
                self._keep(events)
                if self._has_kept:
                    self._wake(self._consumer)
                # Others may have to go on with what they got.
                await checkpoint()
        finally:
            self._leader = self._leader_scope = None

    async def _wait_as_leader(self, in_vain: int) -> None:
        """Wait until there seems to be something to read, or until woken."""
        with CancelScope() as self._leader_scope:
            if in_vain > _VAIN_WAKE_UPS:
                await sleep(_VAIN_PAUSE)
                self._check_open()
            await self._readiness.wait()
        self._leader_scope = None

    async def _follow(self, waiter: Waiter) -> None:
        """Wait until woken by the one who reads."""
        waiter.flag = Flag()
        self._followers[waiter] = None
        try:
            await waiter.flag.wait()
        finally:
            self._followers.pop(waiter, None)
            waiter.flag = None

    def _wake(self, waiter: Waiter) -> None:
        if waiter is not self._leader:
            waiter.wake()
        elif self._leader_scope is not None:
            self._leader_scope.cancel()

    def _wake_waiters(self, region: Region) -> None:
        for waiter in cast("list[Waiter]", region._waiters):
            self._wake(waiter)

    def _appoint(self) -> None:
        """Have somebody else read, if nobody does."""
        if self._leader is None and self._followers:
            next(iter(self._followers)).wake()

    def _call_soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Call it in the event loop, from whichever thread."""
        loop = self._token.native_token
        # That of asyncio, or trio's token.
        soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
        soon(call, *arguments)

    async def _receive(self, decode: Callable[[memoryview], list[T]]) -> list[T]:
        """Wait for something to read, and return it.

        Empty if something was kept that others have read.
        """
        self._check_open()
        if self._receiving:
            raise BusyError
        self._receiving = self._is_consumed = True
        try:
            # Before the read: an await behind it could lose what was read.
            await checkpoint()
            in_vain = 0
            while not self._has_kept:
                self._check_open()
                if self._leader not in {None, self._consumer}:
                    await self._follow(self._consumer)
                    continue
                self._leader = self._consumer
                items = self._read(decode)
                if items is not None:
                    return items
                # Others may read meanwhile, and then there is no need to.
                await self._wait_as_leader(in_vain)
                in_vain += 1
        except ProcessGoneError:
            raise StopAsyncIteration from None
        finally:
            self._receiving = False
            if self._leader is self._consumer:
                self._leader = self._leader_scope = None
            self._appoint()
        return []

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
            data = self._buffer[:size]
            if self._is_attentive:
                events = self._decode(data)
                self._attend(events)
                if decode is self._decode:
                    return cast("list[T]", events)
            return decode(data)


def _merged(old: Inval | None, new: Inval) -> Inval:
    """Return one event for both."""
    if old is None:
        return new
    region = new.region
    flags = (old.flags | new.flags) & ~HINT
    return Inval(region, region.start, region.end, exact=False, flags=flags)


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
