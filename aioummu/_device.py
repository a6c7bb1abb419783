"""The device, synchronously: usable without any event loop."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
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
    UnsupportedFeatureError,
)
from aioummu._forks import track
from aioummu._records import Cause, Feature, wanted_causes
from aioummu._regions import checked_cookie, checked_range
from aioummu._ummunotify_abi import ffi, lib

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from _typeshed import WriteableBuffer

DEFAULT_PATH = "/dev/ummunotify"

ALL_FEATURES = Feature.CAUSE | Feature.FILTER | Feature.STATE | Feature.ONCE

# What is tried for the area of state words; pages of it come when they are used. The
# driver of Linux 5.10 allows the latter only. Bytes.
_STATE_SIZES = (8 << 20, 64 << 10)
_STATE_SIZE = 8


class Page(Protocol):
    """Mapped memory with numbers that change."""

    def __getitem__(self, index: int, /) -> int:
        """Load a number; :raises ValueError: if the memory was released."""
        ...


class DeviceLike(Protocol):
    """What a notifier needs of a device: a backend's, or a stand-in for it."""

    @property
    def backend(self) -> str:
        """The name of what is behind it."""
        ...

    @property
    def features(self) -> Feature:
        """What the device can do beyond reporting that something has changed."""
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

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: Cause | None = None,
        once: bool = False,
    ) -> None:
        """Watch the addresses from *start* up to but without *end*.

        *causes*: report only these, and None is all; needs FILTER. *once*: the
        readinto() that gives its report unregisters it; needs ONCE.
        """
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

    def state(self, cookie: int) -> int | None:
        """Return a number that only rises, or None if the region has no state.

        Odd: something is being done to the region, or may be. Even, taken before
        the memory is looked at, and the same later: nothing that the region asks for
        was done to it in between.
        """
        ...

    def watch_word(self, cookie: int) -> tuple[Page, int]:
        """Return memory and an index of it.

        While that number is what it was before state() returned an even one, so is
        the state. Once closed, it is another one, or cannot be loaded: ValueError.
        """
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
    """Memory, for CPUs where a plain load could be torn or taken out of order."""

    __slots__ = ("_counter", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._counter = ffi.from_buffer(view)

    def __getitem__(self, index: int, /) -> int:
        if self._counter is None:
            raise ValueError("operation forbidden on released page")
        return lib.ummunotify_load_state(self._counter, index)

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
    :param features: what to ask the driver for; by default, everything. STATE costs
        some hundred instructions with each change of any mapping of the process, the
        others nothing worth mentioning. An older driver does not have them.
    :raises NoDeviceError: if there is no such device
    :raises DevicePermissionError: if the caller may not open it
    :raises ForeignDeviceError: if it is something else than an ummunotify device
    :raises DeviceError: if it cannot be opened for another reason
    """

    _nowait = False

    def __init__(
        self,
        path: str | os.PathLike[str] = DEFAULT_PATH,
        *,
        features: Feature = ALL_FEATURES,
    ) -> None:
        self._fd = -1
        self._forked = False
        try:
            # Without O_NONBLOCK, uvloop would set it behind our back.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _open_error(error) from error
        try:
            self._setup(fd, features, fresh=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int, *, features: Feature = ALL_FEATURES) -> Self:
        """Return a device for a descriptor that is open already.

        Typically one that another process has opened and sent here, as SCM_RIGHTS
        through a Unix socket: that process is then the watched one, whose addresses
        the regions mean, whoever registers them. Reports go to whoever reads first.

        The sender is not trusted: what it sent is not touched before it is known to
        be an ummunotify device, and nothing that it does makes readinto() wait. The
        device owns the descriptor from then on.

        :param features: what to ask the driver for; if the descriptor was in use
            already, what it has of these, without STATE
        :raises ForeignDeviceError: if it is something else; the descriptor is left
            to the caller then. To close it can take as long as the sender likes (a
            socket that lingers, a file system of its own): do so in a thread.
        """
        _check_kind(fd)
        device = cls.__new__(cls)
        device._fd = -1
        device._forked = False
        device._setup(fd, features, fresh=False)
        os.set_blocking(fd, False)
        # The other holders of the file can change that.
        device._nowait = True
        return device

    def _setup(self, fd: int, features: Feature, *, fresh: bool) -> None:
        self._features = _negotiate(fd, features, fresh=fresh)
        try:
            generation = _map(fd, _abi.GENERATION_SIZE, _abi.GENERATION_OFFSET)
        except (OSError, ValueError) as error:  # ValueError: a file, and too short
            raise _foreign(error) from error
        self._maps = [generation]
        self._page = _words(generation)
        self._states: memoryview | OrderedPage | None = None
        self._slot_count = 0
        if Feature.STATE in self._features:
            self._map_states(fd)
        # Reentrant: a finalizer that unregisters can run anywhere.
        self._lock = threading.RLock()
        # Slots by cookie, and those that are free again. Slot 0 is none.
        self._slots: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._next_slot = 1
        # Of regions that end with their report: the slots to give back, oldest first.
        self._once: dict[int, list[int]] = {}
        self._fd = fd
        track(self)

    def _map_states(self, fd: int) -> None:
        for size in _STATE_SIZES:
            try:
                area = _map(fd, size, _abi.STATE_OFFSET)
            except (OSError, ValueError):  # ValueError: a file, and too short
                continue
            self._maps.append(area)
            self._states = _words(area)
            self._slot_count = size // _STATE_SIZE
            return
        self._features &= ~Feature.STATE

    @property
    def closed(self) -> bool:
        """Whether the device was closed."""
        return self._fd < 0

    @property
    def backend(self) -> str:
        """The string "driver"."""
        return "driver"

    @property
    def features(self) -> Feature:
        """What this device has of what it was asked for."""
        return self._features

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

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: Cause | None = None,
        once: bool = False,
    ) -> None:
        """Watch the addresses from *start* up to but without *end*.

        Nothing needs to be mapped there. Reports carry the *cookie*.

        :param causes: what to report; None: everything. The end of the process is
            reported in any case. The kernel does not tell MOVE from UNMAP, so who
            asks for one of them gets both
        :param once: the read that delivers its report unregisters it
        :raises InvalidCauseError: if *causes* are none, or have FOREIGN in them
        :raises UnsupportedFeatureError: if the driver has no such feature, or was
            not asked for it
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
        flags = wanted_causes(causes)
        if flags:
            self._need(Feature.FILTER, "filter causes")
        if once:
            self._need(Feature.ONCE, "end a region with its report")
            flags |= _abi.FLAG_ONCE
        with self._lock:
            slot = self._take_slot()
            if once:
                # Before another thread can read its report.
                self._once.setdefault(cookie, []).append(slot)
            try:
                self._ioctl(
                    _abi.REGISTER_REGION,
                    _abi.REGISTER.pack(start, end, cookie, flags, slot),
                )
            except BaseException as error:
                if once:
                    self._forget_once(cookie, -1)
                self._give_back(slot)
                if isinstance(error, OSError):
                    raise self._register_error(error, cookie) from error
                raise
            if slot:
                self._slots[cookie] = slot

    def unregister(self, cookie: int) -> None:
        """Stop watching the region: no read that starts afterwards reports it.

        :raises UnknownCookieError: if the cookie names no region
        :raises DeviceError: if the driver refuses for another reason
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        cookie = checked_cookie(cookie)
        with self._lock:
            try:
                self._ioctl(_abi.UNREGISTER_REGION, _abi.COOKIE.pack(cookie))
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise _unknown(cookie) from error
                raise self._error(error) from error
            if cookie in self._once:
                self._forget_once(cookie, -1)
            self._give_back(self._slots.pop(cookie, 0))

    def _need(self, feature: Feature, what: str) -> None:
        if feature not in self._features and self._fd >= 0:
            raise UnsupportedFeatureError(
                errno.EOPNOTSUPP,
                f"this device cannot {what}: its driver is too old, or it was opened "
                f"without {feature}",
            )

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        if self._next_slot >= self._slot_count:
            return 0
        self._next_slot += 1
        return self._next_slot - 1

    def _give_back(self, slot: int) -> None:
        if slot:
            self._free_slots.append(slot)

    def _forget_once(self, cookie: int, which: int) -> int:
        slots = self._once[cookie]
        slot = slots.pop(which)
        if not slots:
            del self._once[cookie]
        return slot

    def _end_reported(self, records: memoryview) -> None:
        """Give back the slots of those that ended with their report."""
        with self._lock:
            for kind, _, _, _, cookie in _abi.EVENT.iter_unpack(records):
                if kind == _abi.INVAL and cookie in self._once:
                    slot = self._forget_once(cookie, 0)
                    # Unless it names another region by now.
                    if self._slots.get(cookie) == slot:
                        del self._slots[cookie]
                    self._give_back(slot)

    def _register_error(
        self, error: OSError, cookie: int
    ) -> DeviceError | DuplicateCookieError | ClosedError | ForkedError:
        if error.errno == errno.EINVAL:  # everything else was checked above
            return DuplicateCookieError(
                f"cookie {cookie} names a region of this device already: "
                "unregister that one first, or choose another"
            )
        return self._error(error)

    def spent(self, cookie: int) -> bool:  # noqa: ARG002 - DeviceLike
        """Return False: the driver watches addresses, whatever is mapped there."""
        return False

    def rearm(self, cookie: int) -> None:
        """Do nothing: the driver watches addresses, whatever is mapped there."""

    def state(self, cookie: int) -> int | None:
        """Return the region's state word; None if it has none.

        Odd while anything is being done to the region, see "State words" in the
        driver's documentation. A load from memory, no system call.

        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        slot = self._slots.get(cookie)
        if slot is None or self._states is None:
            self.fileno()
            return None
        try:
            return self._states[slot]
        except ValueError:
            raise self._gone() from None

    def watch_word(self, cookie: int) -> tuple[Page, int]:
        """Return the state words and the region's slot, or else the page and 0."""
        slot = self._slots.get(cookie)
        if slot is None or self._states is None:
            return self._page, 0
        return self._states, slot

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
                size = _read_nowait(self._fd, buffer)
            else:
                size = os.readv(self._fd, (buffer,))
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise InvalidBufferError(
                    f"a record takes {_abi.EVENT.size} bytes, the buffer has less"
                ) from error
            raise self._error(error) from error
        if self._once and size:
            with memoryview(buffer) as view, view.cast("B") as data:
                self._end_reported(data[:size])
        return size

    def close(self) -> None:
        """Unregister everything and release the device; harmless if repeated."""
        # Gone before it is closed: nobody may find a number in self._fd that
        # another file could have by then.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A view holds its map, and a map holds a duplicate of fd.
            self._page.release()
            if self._states is not None:
                self._states.release()
            for area in self._maps:
                area.close()
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
            self._lock = threading.RLock()
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


def _negotiate(fd: int, wanted: Feature, *, fresh: bool) -> Feature:
    """Make sure that it is an ummunotify device; return what it can do."""
    try:
        mask = _abi.FEATURES.pack(wanted.value)
        while True:
            try:
                answer = fcntl.ioctl(fd, _abi.EXCHANGE_FEATURES, mask)
                break
            except InterruptedError:  # not among the calls that PEP 475 covers
                continue
    except OSError as error:
        # EINVAL: this comes too late, after the first registration or read.
        if fresh or error.errno != errno.EINVAL:
            raise _foreign(error) from error
        # Slots of state words are those of whoever was there before.
        return _negotiated(fd) & wanted & ~Feature.STATE
    (granted,) = _abi.FEATURES.unpack(answer)
    return Feature(granted & wanted.value)


def _negotiated(fd: int) -> Feature:
    """Return what somebody else has negotiated, as far as the driver tells."""
    facts = Path(f"/proc/self/fdinfo/{fd}").read_text("utf-8", "replace")
    for line in facts.splitlines():
        name, _, value = line.partition(":")
        if name == "ummunotify-features":
            return Feature(int(value, 16) & ALL_FEATURES.value)
    return Feature(0)


def _map(fd: int, size: int, offset: int) -> mmap.mmap:
    return mmap.mmap(
        fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=offset
    )


def _words(area: mmap.mmap) -> memoryview | OrderedPage:
    view = memoryview(area).cast("Q")
    return view if lib.AIOUMMU_PLAIN_LOAD_IS_ACQUIRE else OrderedPage(view)


def _unknown(cookie: int) -> UnknownCookieError:
    return UnknownCookieError(f"cookie {cookie} names no region of this device")


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
