"""A cache of what is registered by address, that never hands out what has changed."""

from __future__ import annotations

import inspect
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

import attrs
from anyio import CancelScope, Event, sleep
from anyio.lowlevel import checkpoint

from aioummu import _hits
from aioummu._errors import (
    ClosedError,
    RangeBusyError,
    TooManyRegionsError,
    UnknownCookieError,
    UnstableMemoryError,
    UnwatchableRangeError,
)
from aioummu._notifier import Waiter
from aioummu._regions import address_range, checked_range

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Any, Self

    from aioummu._notifier import Notifier
    from aioummu._regions import BufferLike, Region

R = TypeVar("R")

# How often a registration is made whose memory changes meanwhile.
_ATTEMPTS = 20
# How often is looked whether a change is over, before the range is watched anew;
# and how long to sleep in between, at most. Seconds.
_LOOKS = 8
_LONGEST_PAUSE = 0.02


@attrs.frozen
class CacheStatistics:
    """What a cache has done, and what it has.

    Synchronization: immutable, may be shared by threads and tasks.
    """

    hits: int
    """How often a registration was there, and as good as new."""
    misses: int
    """How often there was none."""
    registrations: int
    """How many were made."""
    discarded: int
    """How many of those were of no use: the memory changed while they were made."""
    uncached: int
    """How many were made for one use, since the memory cannot be watched."""
    invalidations: int
    """How many were given up since their memory changed."""
    evictions: int
    """How many were given up for the limits, or for one that covers them."""
    count: int
    """How many are cached now."""
    bytes: int
    """How many bytes those cover."""
    in_use: int
    """How many uses of registrations there are at this moment."""


class _Entry(_hits.Entry, Generic[R]):
    """A registration, and the region that tells whether it is still true."""

    __slots__ = ("is_cached", "region")

    registration: R

    def __init__(
        self, start: int, end: int, registration: R, region: Region | None
    ) -> None:
        self.start = start
        self.end = end
        self.registration = registration
        self.region = region
        #: In the index; otherwise, the last user deregisters it.
        self.is_cached = False

    def settle(self) -> None:
        """Remember where one load tells that it is true; to be called while it is."""
        region = self.region
        if region is not None:
            self.page, self.index = region._page, region._index
            self.settled = region._settled


class _Making:
    """A registration that a task is about to make."""

    __slots__ = ("done", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done = Event()


class RegistrationCache(_hits.Index, Generic[R]):
    """Remembers what is registered by address, for as long as that is true.

    ::

        async with aioummu.open_notifier() as notifier:
            cache = aioummu.RegistrationCache(notifier, register, deregister)
            async with cache:
                async with cache.get(buffer) as registration:
                    ...     # send from it, say

    A registration - of memory with an RDMA adapter, a GPU, an io_uring - is expensive
    to make, and wrong as soon as its addresses mean other memory. The cache makes one
    when it is first asked for, shares it among tasks, and hands it out again while
    nothing has been done to the memory. Whoever asks for a part of what is registered
    gets that registration.

    What was changed is never handed out, also if it changed while the registration
    was being made. "Changed" is what the notifier's backend can tell:

    driver
        Everything, from before the first page goes.
    embedded
        Unmapping and moving: when the call that does it has returned. While it runs
        in one thread, another one may be given the same addresses by mmap(2), and get
        what was registered before: *fence* closes that gap. MADV_DONTNEED and the
        like: from before the pages go.

    A registration in use stays as it is: whoever frees memory that is just being sent
    has a problem that no cache can solve. It is deregistered when its last user
    leaves, and nobody else gets it.

    A look-up is a memory load and a search in O(log n), with no system call.

    :param notifier: tells what has changed. It can be used for other things as well
    :param register: called with the address of the first byte and that behind the
        last one, returns the registration; may be a coroutine function. If it raises
        or is cancelled, it must have cleaned up
    :param deregister: called with a registration that nobody uses; may be a coroutine
        function, which no cancel scope of anyio or trio cancels (``Task.cancel()`` of
        asyncio does, and so ``asyncio.timeout()``: it has to finish by itself then).
        What it raises comes out of the call that made it necessary: the end of a use,
        get(), flush(), aclose(), run()
    :param max_count: the most registrations to keep; those in use come on top. The
        least recently used go first
    :param max_bytes: the most bytes that the registrations may cover, likewise
    :param fence: ask ``Notifier.fence()`` before a registration is handed out, see
        above: a system call, which only the embedded backend needs

    Memory that cannot be watched is registered for each single use, see
    :attr:`CacheStatistics.uncached`; of that, nobody knows whether it changes while it
    is being registered.

    Synchronization: belongs to the notifier's event loop; any number of tasks.
    """

    def __init__(  # noqa: PLR0913 - limits have names
        self,
        notifier: Notifier,
        register: Callable[[int, int], R | Awaitable[R]],
        deregister: Callable[[R], object],
        *,
        max_count: int | None = None,
        max_bytes: int | None = None,
        fence: bool = False,
    ) -> None:
        for name, limit in (("max_count", max_count), ("max_bytes", max_bytes)):
            if limit is not None and limit < 0:
                raise ValueError(f"{name} is the most to keep, not {limit}")
        self._notifier = notifier
        self._register = register
        self._deregister = deregister
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._fence = notifier.fence if fence else None
        self._closed = False
        self._by_region: dict[Region, _Entry[R]] = {}
        self._making: list[_Making] = []
        # Of those that nobody used when it was made: when they were used, ascending.
        self._oldest: deque[tuple[int, _Entry[R]]] = deque()
        # Given up, and in use; and to be deregistered as soon as somebody can.
        self._leaving: set[_Entry[R]] = set()
        self._waste: deque[_Entry[R]] = deque()
        self._runners: set[Waiter] = set()
        self._bytes = 0
        self._hits = 0
        self._misses = 0
        self._registrations = 0
        self._discarded = 0
        self._uncached = 0
        self._invalidations = 0
        self._evictions = 0

    if TYPE_CHECKING:  # it is a method of the index

        @overload
        def get(self, buffer: BufferLike, /) -> AbstractAsyncContextManager[R]: ...

        @overload
        def get(self, start: int, end: int, /) -> AbstractAsyncContextManager[R]: ...

        def get(self, *arguments: Any) -> AbstractAsyncContextManager[R]:
            """Return an asynchronous context manager for one use of a registration.

            Entering it returns the registration, which covers the buffer, or the
            addresses from start to end, and is not deregistered before it is left.
            If it is there, nothing is waited for, and other tasks do not run.

            Many tasks that enter at once get the same one. If making it fails, that
            is raised in the task that made it; others try by themselves.

            :raises InvalidBufferError: if the buffer is empty or not contiguous; the
                following are raised by entering

            :raises InvalidRangeError: unless 0 <= start < end < 2**64
            :raises UnstableMemoryError: if something was done to the memory each time
                that it was to be registered
            :raises ProcessGoneError: if the watched process has ended
            :raises ClosedError: if the cache or the notifier is closed
            :raises ForkedError: in a forked child
            """

    @property
    def statistics(self) -> CacheStatistics:
        """What was done so far, and what there is now."""
        entries: list[_Entry[R]] = self._within()
        return CacheStatistics(
            hits=self._hits + sum(entry.hits for entry in entries),
            misses=self._misses,
            registrations=self._registrations,
            discarded=self._discarded,
            uncached=self._uncached,
            invalidations=self._invalidations,
            evictions=self._evictions,
            count=self._count,
            bytes=self._bytes,
            in_use=sum(entry.users for entry in (*entries, *self._leaving)),
        )

    async def run(self) -> None:
        """Give up registrations as soon as their memory changes, until cancelled.

        Without a task that runs this, or one that receives the notifier's events, they
        are given up when the cache is used the next time: memory that nobody asks for
        again may stay registered, and pinned, until then.

        Raises what *deregister* does.

        :raises ProcessGoneError: if the watched process has ended
        :raises ClosedError: if the cache or the notifier is closed
        """
        self._check_open()
        while not self._closed:
            await self._clean_up()
            runner = Waiter(None)
            self._runners.add(runner)
            try:
                # It may have been closed meanwhile.
                if not self._waste and not self._closed:
                    await self._notifier._read_until_stopped(runner)
            finally:
                self._runners.discard(runner)
        self._check_open()

    async def flush(self) -> None:
        """Give up all registrations; those in use when their last user leaves."""
        for entry in self._within():
            self._retire(entry)
        await self._clean_up()
        await checkpoint()

    async def aclose(self) -> None:
        """Give up all registrations, and make no more; harmless if repeated.

        Does not wait for those in use: their last users deregister them.
        """
        self._closed = True
        self._stop_runners()
        await self.flush()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._count} registrations"
        return f"<{type(self).__name__} of {self._notifier!r}, {state}>"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the registration cache was closed")

    # The index.

    def _add(self, entry: _Entry[R]) -> None:
        # Those within it are of no use any more.
        for inner in self._within(entry.start, entry.end):
            self._retire(inner)
            self._evictions += 1
        self._insert(entry)
        entry.settle()
        entry.is_cached = True
        entry.is_simple = self._fence is None
        self._bytes += entry.end - entry.start
        if entry.region is not None:
            self._by_region[entry.region] = entry
            self._notifier._listen(entry.region, self._reported)

    def _retire(self, entry: _Entry[R]) -> None:
        """Hand it out no more; deregister it when nobody uses it."""
        if not entry.is_cached:
            return
        entry.is_cached = entry.is_simple = False
        self._hits += entry.hits
        self._remove(entry)
        self._bytes -= entry.end - entry.start
        if entry.users:
            self._leaving.add(entry)
        else:
            self._discard(entry)
        if entry.region is not None:
            del self._by_region[entry.region]
            if not self._notifier.closed:
                entry.region.unregister()

    def _discard(self, entry: _Entry[R]) -> None:
        """Have it deregistered, since nobody can get it any more."""
        self._waste.append(entry)
        self._is_pending = True
        self._stop_runners()

    def _stop_runners(self) -> None:
        for runner in self._runners:
            self._notifier._stop(runner)

    def _reported(self, region: Region) -> None:
        """Take note that a report was read for the region, or that it is gone."""
        entry = self._by_region.get(region)
        if entry is None:
            return
        if not region.registered:
            # By somebody else, in any thread: it is given up by who asks for it.
            entry.is_simple = False
        elif not region.valid:
            self._invalidations += 1
            self._retire(entry)

    def _is_valid(self, region: Region) -> bool:
        if not region.valid and self._notifier._has_stateless:
            # What is unread is most likely about others.
            self._notifier._read_for_others()
        return region.valid

    def _valid(self, start: int, end: int) -> _Entry[R] | None:
        """Return an entry that covers the range and is true, if there is one."""
        while True:
            entry: _Entry[R] | None = self._covering(start, end)
            if entry is None or (self._fence is not None and not self._fence()):
                return None
            # No entry without a region is in the index.
            region = cast("Region", entry.region)
            if self._is_valid(region):
                entry.settle()
                return entry
            if entry.is_cached:
                self._invalidations += 1
                self._retire(entry)

    def _is_too_much(self) -> bool:
        return (self._max_count is not None and self._count > self._max_count) or (
            self._max_bytes is not None and self._bytes > self._max_bytes
        )

    def _evict(self) -> None:
        """Give up what is too much, as far as nobody uses it."""
        while self._is_too_much() and self._evict_one():
            pass
        self._set_pending()

    def _evict_one(self) -> bool:
        """Give up what nobody uses and was used least recently, if there is one."""
        for _ in range(2):
            while self._oldest:
                stamp, entry = self._oldest.popleft()
                # What was used since is newer than all the others here.
                if entry.is_cached and not entry.users and entry.stamp == stamp:
                    self._evictions += 1
                    self._retire(entry)
                    return True
            idle = [(e.stamp, e) for e in self._within() if not e.users]
            self._oldest.extend(sorted(idle, key=itemgetter(0)))
        return False

    def _set_pending(self) -> None:
        self._is_pending = bool(self._waste) or self._is_too_much()

    async def _clean_up(self) -> None:
        """Deregister what nobody can get any more."""
        errors: list[Exception] = []
        while self._waste:
            entry = self._waste.popleft()
            try:
                await self._undo(entry.registration)
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        self._set_pending()
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("registrations could not be undone", errors)

    async def _undo(self, registration: R) -> None:
        # Not half of it, whoever is cancelled.
        with CancelScope(shield=True):
            result = self._deregister(registration)
            if inspect.isawaitable(result):
                await result

    # One use.

    def _get_buffer(self, buffer: BufferLike) -> AbstractAsyncContextManager[R]:
        return self.get(*address_range(buffer))

    async def _enter(self, use: _hits.Use, start: int, end: int) -> R:
        """Do what entering a use takes if it is not a hit, or not a simple one."""
        start, end = checked_range(start, end)
        entry = self._valid(start, end)
        if entry is None:
            entry = await self._obtain(start, end)
            use._take(entry)
            if not entry.is_cached:
                self._leaving.add(entry)
            self._evict()
        else:
            entry.hits += 1
            use._take(entry)
        return entry.registration

    async def _left(self, entry: _Entry[R]) -> None:
        """Do what is to be done when a user has left."""
        if not entry.users and entry in self._leaving:
            self._leaving.discard(entry)
            self._discard(entry)
        self._evict()
        if self._waste:
            await self._clean_up()

    async def _obtain(self, start: int, end: int) -> _Entry[R]:
        """Return an entry for one more user, made if there is none."""
        self._check_open()
        self._misses += 1
        # Also tells, by _reported(), what else is not true any more.
        self._notifier._read_for_others()
        await self._clean_up()
        while True:
            self._check_open()
            entry = self._valid(start, end)
            if entry is not None:
                return entry
            for making in self._making:
                if making.start <= start and end <= making.end:
                    break
            else:
                return await self._make_for_all(start, end)
            await making.done.wait()

    async def _make_for_all(self, start: int, end: int) -> _Entry[R]:
        making = _Making(start, end)
        self._making.append(making)
        try:
            return await self._make(start, end)
        finally:
            self._making.remove(making)
            making.done.set()

    async def _make(self, start: int, end: int) -> _Entry[R]:
        for _ in range(_ATTEMPTS):
            try:
                region = self._watch(start, end)
            except (UnwatchableRangeError, RangeBusyError, TooManyRegionsError):
                entry = await self._make_unwatched(start, end)
            else:
                entry = await self._make_watched(region)
            if entry is not None:
                return entry
            self._check_open()
            await checkpoint()
            # One that covers it may have been made meanwhile.
            entry = self._valid(start, end)
            if entry is not None:
                return entry
        raise UnstableMemoryError(
            f"something was being done to the memory at {start:#x}-{end:#x} each of "
            f"the {_ATTEMPTS} times that it was to be registered: do not change it at "
            "the same time, and see docs/registration-cache.md if nothing does"
        )

    async def _make_unwatched(self, start: int, end: int) -> _Entry[R] | None:
        """Return an entry for one use; None: it was made in vain."""
        registration = await self._call(start, end)
        try:
            self._check_open()
            # Perhaps there was no memory yet, or it was just being replaced.
            self._watch(start, end).unregister()
        except (UnwatchableRangeError, RangeBusyError, TooManyRegionsError):
            self._uncached += 1
            return _Entry(start, end, registration, None)
        except BaseException:
            await self._undo(registration)
            raise
        self._discarded += 1
        await self._undo(registration)
        return None

    async def _make_watched(self, region: Region) -> _Entry[R] | None:
        """Return a new entry that is in the index; None: it was made in vain."""
        start, end = region.start, region.end
        try:
            if not await self._until_quiet(region):
                region.unregister()
                return None
            registration = await self._call(start, end)
        except BaseException:
            region.unregister()
            raise
        try:
            # No entry is to lie within another.
            if (
                self._is_true(region)
                and not self._closed
                and self._valid(start, end) is None
                # Of those, there may be one if the fence was of no use.
                and self._covering(start, end) is None
            ):
                entry = _Entry(start, end, registration, region)
                self._add(entry)
                return entry
        except BaseException:
            region.unregister()
            await self._undo(registration)
            raise
        region.unregister()
        self._discarded += 1
        await self._undo(registration)
        return None

    def _watch(self, start: int, end: int) -> Region:
        while True:
            try:
                return self._notifier.register(start, end)
            except TooManyRegionsError:
                if not self._evict_one():
                    raise

    def _is_true(self, region: Region) -> bool:
        if self._fence is not None and not self._fence():
            return False
        return self._is_valid(region)

    async def _until_quiet(self, region: Region) -> bool:
        """Wait until nothing is being done to the memory; False: it goes on."""
        pause = 0.0
        for _ in range(_LOOKS):
            # Where regions have no states, what is unread may be about this one.
            self._notifier._read_for_others()
            if region.valid:
                return True
            await sleep(pause)
            pause = min(2 * pause + 0.0005, _LONGEST_PAUSE)
            try:
                region.rearm()
            except (UnwatchableRangeError, RangeBusyError, UnknownCookieError):
                # Not what was there when it was registered.
                return False
        return region.valid

    async def _call(self, start: int, end: int) -> R:
        self._registrations += 1
        result = self._register(start, end)
        if inspect.isawaitable(result):
            return cast("R", await result)
        return result
