"""Watched ranges of addresses, and where a buffer lies in memory."""

from __future__ import annotations

import ctypes
from operator import index
from typing import TYPE_CHECKING, Protocol

from aioummu._errors import (
    InvalidBufferError,
    InvalidRangeError,
    ProcessGoneError,
    UnknownCookieError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableSequence
    from types import TracebackType
    from typing import Any, Self, TypeAlias

    from typing_extensions import Buffer

    class SupportsArrayInterface(Protocol):
        """A numpy array: its stubs call it a Buffer from Python 3.12 on only."""

        @property
        def __array_interface__(self) -> Mapping[str, Any]: ...

    from aioummu._device import Page
    from aioummu._records import Cause, Inval

    BufferLike: TypeAlias = Buffer | SupportsArrayInterface

UINT64_MAX = 2**64 - 1


class RegionOwner(Protocol):
    """What a region needs of its notifier."""

    @property
    def closed(self) -> bool:
        """Whether it was closed, and with it all of its regions."""
        ...

    def _withdraw(self, region: Region, /) -> None: ...

    def _spent(self, region: Region, /) -> bool: ...

    def _rearm(self, region: Region, /) -> None: ...

    def _is_valid(self, region: Region, /) -> bool: ...

    async def _next_report(self, region: Region, /) -> Inval: ...


class Region:
    """A watched range of addresses, as returned by ``Notifier.register()``.

    Leaving its ``with`` block unregisters it::

        with notifier.register(buffer) as region:
            ...

    It holds addresses only: the memory may be freed or resized while it is
    watched, which is what gets reported. Iterating over a region waits for its own
    events, whatever else is waited for::

        async for event in region:
            ...

    Synchronization: may be used by any thread; waiting for events belongs to the
    notifier's event loop, where any number of tasks may do so at the same time.
    """

    __slots__ = (
        "__weakref__",
        "_baseline",
        "_causes",
        "_cookie",
        "_end",
        "_index",
        "_is_recorded",
        "_listener",
        "_once",
        "_owner",
        "_page",
        "_registered",
        "_settled",
        "_start",
        "_unseen",
        "_waiters",
        "_withdrawn",
    )

    def __init__(  # noqa: PLR0913 - made by the notifier only
        self,
        cookie: int,
        start: int,
        end: int,
        owner: RegionOwner,
        *,
        causes: Cause | None = None,
        once: bool = False,
    ) -> None:
        self._cookie = cookie
        self._start = start
        self._end = end
        self._owner = owner
        self._causes = causes
        self._once = once
        self._registered = True
        # Unregistered by the program: what is reported yet is dropped.
        self._withdrawn = False
        # Where its validity can be seen by a load: while page[index] is settled, the
        # region is valid. Not set: never, since there is no such index.
        self._page: Page | tuple[()] = ()
        self._index = 0
        self._settled = -1
        # The state at which it is valid; None: it has no state, or is not valid.
        self._baseline: int | None = None
        # What was reported since a waiter received something, if that is recorded.
        self._is_recorded = False
        self._unseen: Inval | None = None
        # Called when a report for it was read.
        self._listener: Callable[[Region], object] | None = None
        self._waiters: MutableSequence[object] = []

    @property
    def cookie(self) -> int:
        """The number that names the region within its notifier."""
        return self._cookie

    @property
    def start(self) -> int:
        """Address of the first watched byte."""
        return self._start

    @property
    def end(self) -> int:
        """Address behind the last watched byte."""
        return self._end

    @property
    def registered(self) -> bool:
        """Whether the region is being watched."""
        return self._registered and not self._owner.closed

    @property
    def causes(self) -> Cause | None:
        """The causes that it asks for; None is all."""
        return self._causes

    @property
    def once(self) -> bool:
        """Whether it ends with its first event."""
        return self._once

    @property
    def valid(self) -> bool:
        """Whether the memory is surely what it was at register() or :meth:`rearm`.

        It becomes false with the first change that the region asks for, and does not
        become true again by itself, until :meth:`rearm`. Also false while something
        is being done to the memory, when a part is :attr:`spent`, and when the region
        is not registered. So::

            region = notifier.register(buffer)
            ...                     # pin it, or register it with the hardware
            if region.valid: ...    # still as good

        where a false value proves nothing, and a true one everything.

        A load from memory, no system call, while nothing has happened. On the driver
        that is a word of this region alone. On the embedded backend it is one for
        all, and a look after a change of anything else takes longer, once; changes
        are included whose call has returned, see ``Notifier.fence()``. A device
        without Feature.STATE knows about regions only what was reported: valid then
        means that the notifier has received all reports, none of them for this region.

        :raises ForkedError: in a forked child
        """
        try:
            if self._page[self._index] == self._settled:
                return True
        except (IndexError, ValueError):
            pass
        return self._owner._is_valid(self)

    @property
    def spent(self) -> bool:
        """Whether a part of it is not watched any more, until :meth:`rearm`.

        Becomes true on the embedded backend when memory of the region is
        unmapped or moved, which is also reported; what is mapped there later is
        not watched. Always false on the driver, which watches addresses, and
        for a region that is not registered.

        :raises ForkedError: in a forked child
        """
        return self._registered and self._owner._spent(self)

    def rearm(self) -> None:
        """Watch what is mapped at the region's addresses now, and call it valid.

        What happened before this call returned may not be reported: read, pin or
        register the memory elsewhere after it, not before. :attr:`valid` is true
        then, unless something is being done to the memory at this moment: try again
        later, or register it anew.

        :raises UnknownCookieError: if the region is not registered any more
        :raises UnwatchableRangeError: if there is something that cannot be
            watched, or nothing; the region is still spent then
        :raises RangeBusyError: if another userfaultfd owns what is mapped there
        :raises DeviceError: if it is refused for another reason
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        self._owner._rearm(self)

    async def invalidated(self) -> Inval:
        """Wait for an event of this region, and return it.

        Returns at once if there was one since this method last returned, or else
        since register() or :meth:`rearm`; several make one, whose range is the whole
        region. Any number of tasks may wait, and all receive the event. So does the
        notifier's iterator, if there is one: none takes anything from another. A
        cancelled task loses nothing for the others, nor for a later call.

        :raises UnknownCookieError: if the region is not registered, or any more
        :raises ProcessGoneError: if the watched process has ended, and everything
            was received
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        return await self._owner._next_report(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Inval:
        try:
            return await self._owner._next_report(self)
        except (UnknownCookieError, ProcessGoneError):
            raise StopAsyncIteration from None

    def unregister(self) -> None:
        """Stop watching; reports that nobody has received yet are dropped.

        Does nothing if the region is not registered any more.

        :raises DeviceError: if the driver refuses
        """
        if not self._withdrawn:
            self._owner._withdraw(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unregister()

    def __repr__(self) -> str:
        state = "registered" if self.registered else "unregistered"
        return (
            f"<{type(self).__name__} cookie={self._cookie} "
            f"{self._start:#x}-{self._end:#x} "
            f"({self._end - self._start} bytes), {state}>"
        )


class _PyBuffer(ctypes.Structure):
    """Py_buffer, as of the stable ABI of Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


# Either order of dimensions: ffi.from_buffer() would refuse Fortran's.
_PyBUF_ANY_CONTIGUOUS = 0x98


def address_range(buffer: BufferLike) -> tuple[int, int]:
    """Return the addresses of a buffer's first byte and of the byte behind it.

    No export of the buffer is kept: it can be closed, resized and freed as if
    nobody had asked.

    :raises InvalidBufferError: if the buffer is empty or not contiguous
    :raises TypeError: if the object is not a buffer
    """
    exported = _PyBuffer()
    try:
        ctypes.pythonapi.PyObject_GetBuffer(
            ctypes.py_object(buffer), ctypes.byref(exported), _PyBUF_ANY_CONTIGUOUS
        )
    except (BufferError, ValueError) as error:
        raise InvalidBufferError(
            f"the buffer has no address to watch ({error}): it must be open and one "
            "contiguous block of memory; else register its start and end"
        ) from error
    start, size = exported.buf, exported.len
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(exported))
    if not start or not size:
        raise InvalidBufferError("the buffer is empty: there is nothing to watch")
    return start, start + size


def checked_range(start: int, end: int) -> tuple[int, int]:
    """Return both addresses as plain integers.

    :raises InvalidRangeError: unless 0 <= start < end < 2**64
    """
    start, end = index(start), index(end)
    if not 0 <= start < end <= UINT64_MAX:
        raise InvalidRangeError(
            f"no range of addresses: start {start:#x}, end {end:#x}; "
            "end is exclusive, so it must be above start, and both fit 64 bits"
        )
    return start, end


def checked_cookie(cookie: int) -> int:
    """Return the cookie as a plain integer.

    :raises InvalidRangeError: unless 0 <= cookie < 2**64
    """
    cookie = index(cookie)
    if not 0 <= cookie <= UINT64_MAX:
        raise InvalidRangeError(f"a cookie is a number of 64 bits, not {cookie}")
    return cookie
