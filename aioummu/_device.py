"""The device, synchronously: usable without any event loop."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aioummu import _abi
from aioummu._errors import (
    ClosedError,
    DeviceError,
    DevicePermissionError,
    DuplicateCookieError,
    ForeignDeviceError,
    ForkedError,
    InvalidBufferError,
    NoDeviceError,
    ProcessGoneError,
    TooManyRegionsError,
    UnknownCookieError,
)
from aioummu._forks import track
from aioummu._regions import checked_cookie, checked_range
from aioummu._ummunotify_abi import ffi, lib

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from _typeshed import WriteableBuffer

DEFAULT_PATH = "/dev/ummunotify"


class Page(Protocol):
    """A mapped page with a number that changes."""

    def __getitem__(self, index: int, /) -> int:
        """Load the number; :raises ValueError: if the page was released."""
        ...


class DeviceLike(Protocol):
    """What a notifier needs of a device: a backend's, or a stand-in for it."""

    @property
    def backend(self) -> str:
        """The name of what is behind it."""
        ...

    @property
    def page(self) -> Page:
        """A page whose item 0 never returns to a value that it had.

        While it stays what it was before a look at :attr:`generation`, so does
        the generation.
        """
        ...

    @property
    def generation(self) -> int:
        """The number of invalidations of any region."""
        ...

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there are records."""
        ...

    def register(self, start: int, end: int, cookie: int) -> None:
        """Watch the addresses from *start* up to but without *end*."""
        ...

    def unregister(self, cookie: int) -> None:
        """Stop watching the region; no later readinto() reports it."""
        ...

    def spent(self, cookie: int) -> bool:
        """Tell whether a part of the region is not watched any more."""
        ...

    def rearm(self, cookie: int) -> None:
        """Watch all of the region again, if it is spent."""
        ...

    def fence(self) -> bool:
        """Wait until all changes under way are counted; False: in vain."""
        ...

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """Read whole records; None: there are none now, 0: nor will there be."""
        ...

    def close(self) -> None:
        """Release everything, also if called again."""
        ...


class OrderedPage:
    """A page for CPUs where a plain load could be torn or taken out of order."""

    __slots__ = ("_counter", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._counter = ffi.from_buffer(view)

    def __getitem__(self, index: int, /) -> int:
        if self._counter is None:
            raise ValueError("operation forbidden on released page")
        return lib.ummunotify_load_generation(self._counter)

    def release(self) -> None:
        if self._counter is not None:
            ffi.release(self._counter)
            self._counter = None
            self._view.release()


class Device:
    """An open ``/dev/ummunotify``, without an event loop.

    Opening it binds it to the memory of the calling process for good. It never
    blocks: wait for :meth:`fileno` to become readable with select, poll or
    epoll. May be used as a context manager, which closes it.

    Interface as of the driver's ``linux/ummunotify.h``.

    Synchronization: all methods may be called by any thread at any time, except
    that nothing else may be running when close() is called. Unusable in forked
    children, where it is closed.

    :param path: the device
    :raises NoDeviceError: if there is no such device
    :raises DevicePermissionError: if the caller may not open it
    :raises ForeignDeviceError: if it is something else than an ummunotify device
    :raises DeviceError: if it cannot be opened for another reason
    """

    _nowait = False

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_PATH) -> None:
        self._fd = -1
        self._forked = False
        try:
            # Without O_NONBLOCK, uvloop would set it behind our back.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _open_error(error) from error
        try:
            self._setup(fd, fresh=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Return a device for a descriptor that is open already.

        Typically one that another process has opened and sent here, as SCM_RIGHTS
        through a Unix socket: that process is then the watched one, whose addresses
        the regions mean, whoever registers them. Reports go to whoever reads first.

        The sender is not trusted: what it sent is not touched before it is known to
        be an ummunotify device, and nothing that it does makes readinto() wait. The
        device owns the descriptor from then on.

        :raises ForeignDeviceError: if it is something else; the descriptor is left
            to the caller then. To close it can take as long as the sender likes (a
            socket that lingers, a file system of its own): do so in a thread.
        """
        _check_kind(fd)
        device = cls.__new__(cls)
        device._fd = -1
        device._forked = False
        device._setup(fd, fresh=False)
        os.set_blocking(fd, False)
        # The other holders of the file can change that.
        device._nowait = True
        return device

    def _setup(self, fd: int, *, fresh: bool) -> None:
        self._map, self._page = _recognise(fd, fresh=fresh)
        self._fd = fd
        track(self)

    @property
    def closed(self) -> bool:
        """Whether the device was closed."""
        return self._fd < 0

    @property
    def backend(self) -> str:
        """The string "driver"."""
        return "driver"

    @property
    def page(self) -> Page:
        """The mapped page: item 0 is the generation, ValueError once closed."""
        return self._page

    @property
    def generation(self) -> int:
        """The number of invalidations of any region since the device was opened.

        A load from memory, no system call.

        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        try:
            return self._page[0]
        except ValueError:
            raise self._gone() from None

    def fileno(self) -> int:
        """Return the descriptor, readable when there is something to read.

        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        if self._fd < 0:
            raise self._gone()
        return self._fd

    def register(self, start: int, end: int, cookie: int) -> None:
        """Watch the addresses from *start* up to but without *end*.

        Nothing needs to be mapped there. Reports carry the *cookie*.

        :raises InvalidRangeError: unless 0 <= start < end < 2**64, or if the
            cookie does not fit 64 bits
        :raises DuplicateCookieError: if the cookie names a region already
        :raises TooManyRegionsError: if the driver's limit is reached
        :raises ProcessGoneError: if the watched process has ended
        :raises DeviceError: if the driver refuses for another reason
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        start, end = checked_range(start, end)
        cookie = checked_cookie(cookie)
        try:
            self._ioctl(
                _abi.REGISTER_REGION, _abi.REGISTER.pack(start, end, cookie, 0, 0)
            )
        except OSError as error:
            if error.errno == errno.EINVAL:  # the range was checked above
                raise DuplicateCookieError(
                    f"cookie {cookie} names a region of this device already: "
                    "unregister that one first, or choose another"
                ) from error
            raise self._error(error) from error

    def unregister(self, cookie: int) -> None:
        """Stop watching the region: no read that starts afterwards reports it.

        :raises UnknownCookieError: if the cookie names no region
        :raises DeviceError: if the driver refuses for another reason
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        cookie = checked_cookie(cookie)
        try:
            self._ioctl(_abi.UNREGISTER_REGION, _abi.COOKIE.pack(cookie))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise UnknownCookieError(
                    f"cookie {cookie} names no region of this device"
                ) from error
            raise self._error(error) from error

    def spent(self, cookie: int) -> bool:  # noqa: ARG002 - DeviceLike
        """Return False: the driver watches addresses, whatever is mapped there."""
        return False

    def rearm(self, cookie: int) -> None:
        """Do nothing: the driver watches addresses, whatever is mapped there."""

    def fence(self) -> bool:
        """Return True: the driver counts a change before the first page goes."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """Read records into a buffer of at least 32 bytes.

        :returns: the number of bytes, a multiple of 32; None if there is nothing
            to read now; 0 if the watched process has ended and everything that
            was reported about it has been read
        :raises InvalidBufferError: if the buffer is too small for a record
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        try:
            if self._nowait:
                return _read_nowait(self._fd, buffer)
            return os.readv(self._fd, (buffer,))
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise InvalidBufferError(
                    f"a record takes {_abi.EVENT.size} bytes, the buffer has less"
                ) from error
            raise self._error(error) from error

    def close(self) -> None:
        """Unregister everything and release the device; harmless if repeated."""
        # Gone before it is closed: nobody may find a number in self._fd that
        # another file could have by then.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # The view holds the map, and the map holds a duplicate of fd.
            self._page.release()
            self._map.close()
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, 2, self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._fd}"
        return f"<{type(self).__name__} {state}>"

    def _after_fork_in_child(self) -> None:
        if self._fd >= 0:
            self._forked = True
            self.close()

    def _ioctl(self, request: int, argument: bytes) -> bytes:
        while True:
            try:
                return fcntl.ioctl(self.fileno(), request, argument)
            except InterruptedError:  # not among the calls that PEP 475 covers
                continue

    def _gone(self) -> ClosedError | ForkedError:
        if self._forked:
            return ForkedError(
                "the device was opened before this process was forked, so it "
                "watches the parent's memory: open one in the child"
            )
        return ClosedError("the device was closed")

    def _error(self, error: OSError) -> DeviceError | ClosedError | ForkedError:
        if self._fd < 0:
            return self._gone()
        code = error.errno
        if code == errno.ENOSPC:
            return TooManyRegionsError(
                code,
                "no more regions for this device: unregister some, open another, "
                "or raise the limit, a parameter of the module",
            )
        if code == errno.ESRCH:
            return ProcessGoneError(
                code,
                "the watched process has ended or called exec: "
                "there is no memory to watch any more",
            )
        if code == errno.ENOTTY:
            return _foreign(error)
        return DeviceError(code, f"the device refused: {error.strerror}")


def _read_nowait(fd: int, buffer: WriteableBuffer) -> int:
    """Read as readv() does, but with RWF_NOWAIT, see readv(2)."""
    with memoryview(buffer) as view, view.cast("B") as data:
        size = lib.aioummu_read_nowait(fd, ffi.from_buffer(data), len(data))
    if size < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    return size


def _check_kind(fd: int) -> None:
    """Ask the kernel only, not the file: it could take its time."""
    try:
        # Only files have a path; some of the others wait even here (epoll).
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path it may be
        if not path.startswith("/"):
            raise ForeignDeviceError(
                errno.ENOTTY, f"this descriptor is not of an ummunotify device: {path}"
            )
        facts = Path(f"/proc/self/fdinfo/{fd}").read_text("utf-8", "replace")
    except ForeignDeviceError:
        raise
    except OSError as error:
        raise _foreign(error) from error
    if "\nummunotify-generation:" not in facts:
        raise ForeignDeviceError(
            errno.ENOTTY, "this descriptor is not of an ummunotify device"
        )


def _recognise(fd: int, *, fresh: bool) -> tuple[mmap.mmap, memoryview | OrderedPage]:
    """Make sure that it is an ummunotify device, and map its page."""
    try:
        fcntl.ioctl(fd, _abi.EXCHANGE_FEATURES, _abi.FEATURES.pack(_abi.FEATURE_CAUSE))
    except OSError as error:
        # EINVAL: this comes too late, after the first registration or read.
        if fresh or error.errno != errno.EINVAL:
            raise _foreign(error) from error
    try:
        mapped = mmap.mmap(
            fd,
            _abi.GENERATION_SIZE,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ,
            offset=_abi.GENERATION_OFFSET,
        )
    except (OSError, ValueError) as error:  # ValueError: a file, and too short
        raise _foreign(error) from error
    view = memoryview(mapped).cast("Q")
    return mapped, (view if lib.AIOUMMU_PLAIN_LOAD_IS_ACQUIRE else OrderedPage(view))


def _open_error(error: OSError) -> DeviceError:
    code, path = error.errno, error.filename
    if code in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
        return NoDeviceError(
            code,
            "no ummunotify device here: load the driver (modprobe ummunotify; "
            "'make -C kmod' in the sources of aioummu builds it)",
            path,
        )
    if code in {errno.EACCES, errno.EPERM}:
        return DevicePermissionError(
            code,
            "this user may not open the device: install the driver's udev rule "
            "('make -C kmod install'), or ask for read permission",
            path,
        )
    return DeviceError(code, f"the device cannot be opened: {error.strerror}", path)


def _foreign(error: OSError | ValueError) -> ForeignDeviceError:
    code = (error.errno if isinstance(error, OSError) else None) or errno.ENOTTY
    return ForeignDeviceError(
        code, f"not an ummunotify device, or its driver is too old ({error})"
    )
