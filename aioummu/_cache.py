"""A cache of what is registered by address, that never hands out what has changed."""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

import attrs
from anyio import CancelScope, Event, sleep
from anyio.lowlevel import checkpoint

from aioummu._errors import (
    ClosedError,
    RangeBusyError,
    TooManyRegionsError,
    UnstableMemoryError,
    UnwatchableRangeError,
)
from aioummu._notifier import Waiter
from aioummu._regions import address_range, checked_range

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self

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


class _Entry(Generic[R]):
    """A registration, and the region that tells whether it is still true.

    Also the context manager of each use of just this range: one for all of them, as
    nothing has to be remembered for a single use.
    """

    __slots__ = (
        "cache",
        "end",
        "hits",
        "is_cached",
        "is_discarded",
        "is_simple",
        "region",
        "registration",
        "start",
        "substitutes",
        "users",
    )

    def __init__(
        self,
        cache: RegistrationCache[R],
        start: int,
        end: int,
        registration: R,
        region: Region | None,
    ) -> None:
        self.cache = cache
        self.start = start
        self.end = end
        self.registration = registration
        self.region = region
        self.users = 0
        self.hits = 0
        #: In the index; otherwise, the last user deregisters it.
        self.is_cached = False
        self.is_discarded = False
        #: In the index of a cache that has nothing more to do about its use.
        self.is_simple = False
        #: Used in place of this one by some who have entered it when it was not true
        #: any more; until all of its users have left, since nobody knows who is who.
        self.substitutes: list[_Entry[R]] = []

    async def __aenter__(self) -> R:
        region = self.region
        try:
            # What region.valid does, in half the time.
            if self.is_simple and region._page[region._index] == region._settled:  # type: ignore[union-attr] # it has one
                self.users += 1
                self.hits += 1
                return self.registration
        except (IndexError, ValueError):
            pass  # unregistered, closed
        entry = await self.cache._enter(self.start, self.end)
        if entry is not self:
            self.users += 1
            self.is_simple = False
            self.substitutes.append(entry)
        return entry.registration

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.users -= 1
        if not self.is_simple:
            await self.cache._left(self)


class _Making:
    """A registration that a task is about to make."""

    __slots__ = ("done", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done = Event()


class RegistrationCache(Generic[R]):
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
        function, which is not cancelled. What it raises comes out of the call that
        made it necessary: the end of a use, get(), flush(), aclose()
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
        self._is_limited = max_count is not None or max_bytes is not None
        self._fence = notifier.fence if fence else None
        self._closed = False
        # The index. No entry lies within another, so both starts and ends ascend, and
        # the one that covers a range, if any, is the last that starts at or before it.
        self._by_start: dict[int, _Entry[R]] = {}
        self._starts: list[int] = []
        self._entries: list[_Entry[R]] = []
        # Those that nobody uses, the least recently used first; kept if limited.
        self._idle: dict[_Entry[R], None] = {}
        self._by_region: dict[Region, _Entry[R]] = {}
        self._making: list[_Making] = []
        # To be deregistered as soon as somebody can await that.
        self._waste: list[_Entry[R]] = []
        self._runners: set[Waiter] = set()
        self._bytes = 0
        self._hits = 0
        self._misses = 0
        self._registrations = 0
        self._discarded = 0
        self._uncached = 0
        self._invalidations = 0
        self._evictions = 0

    @overload
    def get(self, buffer: BufferLike, /) -> AbstractAsyncContextManager[R]: ...

    @overload
    def get(self, start: int, end: int, /) -> AbstractAsyncContextManager[R]: ...

    def get(
        self, buffer_or_start: BufferLike | int, end: int | None = None, /
    ) -> AbstractAsyncContextManager[R]:
        """Return an asynchronous context manager for one use of a registration.

        Entering it returns the registration, which covers the buffer, or the
        addresses from start to end, and is not deregistered before it is left. Many
        tasks that enter at once get the same one. If making it fails, that is raised
        in the task that made it; others try by themselves.

        Entering raises:

        :raises InvalidBufferError: if the buffer is empty or not contiguous (here)
        :raises InvalidRangeError: unless 0 <= start < end < 2**64
        :raises UnstableMemoryError: if the memory changed each time it was registered
        :raises ProcessGoneError: if the watched process has ended
        :raises ClosedError: if the cache or the notifier is closed
        :raises ForkedError: in a forked child
        """
        if end is None:
            buffer_or_start, end = address_range(cast("BufferLike", buffer_or_start))
        entry = self._by_start.get(buffer_or_start)  # type: ignore[arg-type]
        if entry is not None and entry.end == end:
            return entry
        return _Use(self, cast("int", buffer_or_start), end)

    @property
    def statistics(self) -> CacheStatistics:
        """What was done so far, and what there is now."""
        return CacheStatistics(
            hits=self._hits + sum(entry.hits for entry in self._entries),
            misses=self._misses,
            registrations=self._registrations,
            discarded=self._discarded,
            uncached=self._uncached,
            invalidations=self._invalidations,
            evictions=self._evictions,
            count=len(self._entries),
            bytes=self._bytes,
        )

    async def run(self) -> None:
        """Give up registrations as soon as their memory changes, until cancelled.

        Without a task that runs this, or one that receives the notifier's events, they
        are given up when the cache is used the next time: memory that nobody asks for
        again may stay registered, and pinned, until then.

        :raises ProcessGoneError: if the watched process has ended
        :raises ClosedError: if the cache or the notifier is closed
        """
        self._check_open()
        while not self._closed:
            await self._clean_up()
            runner = Waiter(None)
            self._runners.add(runner)
            try:
                if not self._waste:
                    await self._notifier._read_until_stopped(runner)
            finally:
                self._runners.discard(runner)
        self._check_open()

    async def flush(self) -> None:
        """Give up all registrations; those in use when their last user leaves."""
        for entry in list(self._entries):
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
        state = "closed" if self._closed else f"{len(self._entries)} registrations"
        return f"<{type(self).__name__} of {self._notifier!r}, {state}>"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the registration cache was closed")

    # The index.

    def _covering(self, start: int, end: int) -> _Entry[R] | None:
        """Return the entry that covers the range, whether it is valid or not."""
        entry = self._by_start.get(start)
        if entry is None:
            place = bisect_right(self._starts, start) - 1
            if place < 0:
                return None
            entry = self._entries[place]
        return entry if entry.end >= end else None

    def _add(self, entry: _Entry[R]) -> None:
        # Those within it are of no use any more: a contiguous run, as ends ascend.
        first = bisect_left(self._starts, entry.start)
        behind = first
        while behind < len(self._entries) and self._entries[behind].end <= entry.end:
            behind += 1
        for inner in self._entries[first:behind]:
            self._retire(inner)
            self._evictions += 1
        self._starts.insert(first, entry.start)
        self._entries.insert(first, entry)
        self._by_start[entry.start] = entry
        entry.is_cached = True
        entry.is_simple = not self._is_limited and self._fence is None
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
        place = bisect_left(self._starts, entry.start)
        del self._starts[place], self._entries[place], self._by_start[entry.start]
        self._idle.pop(entry, None)
        self._bytes -= entry.end - entry.start
        if entry.region is not None:
            del self._by_region[entry.region]
            if not self._notifier.closed:
                entry.region.unregister()
        if not entry.users:
            self._discard(entry)

    def _discard(self, entry: _Entry[R]) -> None:
        """Have it deregistered, once."""
        if not entry.is_discarded:
            entry.is_discarded = True
            self._waste.append(entry)
            self._stop_runners()

    def _stop_runners(self) -> None:
        for runner in self._runners:
            self._notifier._stop(runner)

    def _reported(self, region: Region) -> None:
        """Take note that the notifier has read a report for the region."""
        entry = self._by_region.get(region)
        if entry is not None and not region.valid:
            self._invalidations += 1
            self._retire(entry)

    def _valid(self, start: int, end: int) -> _Entry[R] | None:
        """Return an entry that covers the range and is true, if there is one."""
        while (entry := self._covering(start, end)) is not None:
            if self._fence is not None and not self._fence():
                return None
            # No entry without a region is in the index.
            region = cast("Region", entry.region)
            if region.valid:
                return entry
            if self._notifier._has_stateless:
                # What is unread is most likely about others.
                self._notifier._read_for_others()
                if self._is_true(region):
                    return entry
            if entry.is_cached:
                self._invalidations += 1
                self._retire(entry)
        return None

    def _evict(self) -> None:
        """Give up what is too much, as far as nobody uses it."""
        while self._idle and (
            (self._max_count is not None and len(self._entries) > self._max_count)
            or (self._max_bytes is not None and self._bytes > self._max_bytes)
        ):
            self._evictions += 1
            self._retire(next(iter(self._idle)))

    async def _clean_up(self) -> None:
        """Deregister what nobody can get any more."""
        errors: list[Exception] = []
        while self._waste:
            entry = self._waste.pop()
            try:
                await self._undo(entry.registration)
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
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

    async def _enter(self, start: int, end: int) -> _Entry[R]:
        """Return an entry that covers the range, with one more user."""
        entry = self._valid(start, end)
        if entry is None:
            entry = await self._obtain(start, end)
        else:
            entry.hits += 1
        entry.users += 1
        if self._is_limited and entry.is_cached:
            self._idle.pop(entry, None)
            self._evict()
        return entry

    async def _left(self, entry: _Entry[R]) -> None:
        """Do what is to be done when a user has left."""
        if not entry.users:
            if not entry.is_cached:
                self._discard(entry)
            elif self._is_limited:
                self._idle[entry] = None
                self._evict()
            substitutes, entry.substitutes = entry.substitutes, []
            for substitute in substitutes:
                substitute.users -= 1
                await self._left(substitute)
        if self._waste:
            await self._clean_up()

    async def _obtain(self, start: int, end: int) -> _Entry[R]:
        """Return an entry for one more user, made if there is none."""
        start, end = checked_range(start, end)
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
            f"the memory at {start:#x}-{end:#x} was changed each of the {_ATTEMPTS} "
            "times that it was registered: do not change it at the same time"
        )

    async def _make_unwatched(self, start: int, end: int) -> _Entry[R] | None:
        """Return an entry for one use; None: it was made in vain."""
        registration = await self._call(start, end)
        try:
            # Perhaps there was no memory yet, or it was just being replaced.
            self._watch(start, end).unregister()
        except (UnwatchableRangeError, RangeBusyError, TooManyRegionsError):
            self._uncached += 1
            return _Entry(self, start, end, registration, None)
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
            ):
                entry = _Entry(self, start, end, registration, region)
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
                if not self._entries:
                    raise
                victim = next(
                    iter(self._idle or (e for e in self._entries if not e.users)), None
                )
                if victim is None:
                    raise
                self._evictions += 1
                self._retire(victim)

    def _is_true(self, region: Region) -> bool:
        if self._fence is not None and not self._fence():
            return False
        return region.valid

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
            except (UnwatchableRangeError, RangeBusyError):
                # Not what was there when it was registered.
                return False
        return region.valid

    async def _call(self, start: int, end: int) -> R:
        self._registrations += 1
        result = self._register(start, end)
        if inspect.isawaitable(result):
            return cast("R", await result)
        return result


class _Use(Generic[R]):
    """One use of a registration, of a part of it or of one that is not there yet."""

    __slots__ = ("_cache", "_end", "_entry", "_start")

    def __init__(self, cache: RegistrationCache[R], start: int, end: int) -> None:
        self._cache = cache
        self._start = start
        self._end = end

    async def __aenter__(self) -> R:
        self._entry = await self._cache._enter(self._start, self._end)
        return self._entry.registration

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entry.users -= 1
        await self._cache._left(self._entry)
