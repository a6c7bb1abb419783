"""Watched ranges of addresses, and where a buffer lies in memory."""

from __future__ import annotations

import ctypes
from operator import index
from typing import TYPE_CHECKING, Protocol

from aioummu._errors import InvalidBufferError, InvalidRangeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any, Self, TypeAlias

    from typing_extensions import Buffer

    class SupportsArrayInterface(Protocol):
        """A numpy array: its stubs call it a Buffer from Python 3.12 on only."""

        @property
        def __array_interface__(self) -> Mapping[str, Any]: ...

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


class Region:
    """A watched range of addresses, as returned by ``Notifier.register()``.

    Leaving its ``with`` block unregisters it::

        with notifier.register(buffer) as region:
            ...

    It holds addresses only: the memory may be freed or resized while it is
    watched, which is what gets reported.

    Synchronization: may be used by any thread.
    """

    __slots__ = ("__weakref__", "_cookie", "_end", "_owner", "_registered", "_start")

    def __init__(self, cookie: int, start: int, end: int, owner: RegionOwner) -> None:
        self._cookie = cookie
        self._start = start
        self._end = end
        self._owner = owner
        self._registered = True

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
        """Watch what is mapped at the region's addresses now.

        Does nothing unless the region is :attr:`spent`. What happened before
        this call returned may not be reported: read, pin or register the memory
        elsewhere after it, not before.

        :raises UnknownCookieError: if the region is not registered any more
        :raises UnwatchableRangeError: if there is something that cannot be
            watched, or nothing; the region is still spent then
        :raises RangeBusyError: if another userfaultfd owns what is mapped there
        :raises DeviceError: if it is refused for another reason
        :raises ClosedError: if the notifier is closed
        :raises ForkedError: in a forked child
        """
        self._owner._rearm(self)

    def unregister(self) -> None:
        """Stop watching; reports that nobody has received yet are dropped.

        Does nothing if the region is not registered any more.

        :raises DeviceError: if the driver refuses
        """
        if self._registered:
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
