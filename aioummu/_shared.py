"""Notifiers of other processes, whose records are read here."""

from __future__ import annotations

import errno
import os
import socket
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from aioummu._abi import EVENT
from aioummu._device import DEFAULT_PATH, Device
from aioummu._errors import (
    ClosedError,
    DeviceError,
    ForeignDeviceError,
    InvalidBufferError,
    UnwatchableRangeError,
)
from aioummu._records import LAST, unpack

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from _typeshed import WriteableBuffer

    from aioummu._device import DeviceLike, Page

# A reader of a packet with less room would lose the rest of it: see engine/share.c.
_PACKET_SIZE = 64 * EVENT.size


def open_shared(fd: int) -> DeviceLike:
    """Return a device for a descriptor that another process has shared.

    That process called :meth:`Device.share` or :meth:`EmbeddedDevice.share`, and has
    sent the descriptor through a Unix socket. What is read are the reports for the
    regions that it registers. It is the other process that is watched: addresses are
    its own. The device owns the descriptor from then on.

    The other process is not trusted: nothing that it does makes a read wait. It can
    make reports up about itself, and take reports away.

    ::

        device = aioummu.open_shared(fd)
        async with aioummu.open_notifier(device=device) as notifier:
            async for records in notifier.raw_batches(): ...

    :raises ForeignDeviceError: if it is something else; it is closed then, which can
        wait where the sender has prepared it so (a socket that lingers, a file system
        of its own): on Linux, who takes descriptors from strangers closes them in a
        thread
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and _is_driver(status.st_rdev):
            return Device.from_fd(fd)
        if stat.S_ISSOCK(status.st_mode) and _is_packet_socket(fd):
            return SharedDevice(fd)
    except BaseException:
        _close(fd)
        raise
    _close(fd)
    raise ForeignDeviceError(
        errno.ENOTTY,
        "this descriptor is no notifier's: send what Device.share() or "
        "EmbeddedDevice.share() returns",
    )


class SharedDevice:
    """The embedded device of another process, from here; see :func:`open_shared`.

    Regions are registered by that process. The generation is that of the latest
    LAST that was read.

    Synchronization: for one thread at a time.
    """

    def __init__(self, fd: int) -> None:
        self._socket: socket.socket | None = socket.socket(fileno=fd)
        self._page = [0]

    @property
    def backend(self) -> str:
        """The string "embedded"."""
        return "embedded"

    @property
    def closed(self) -> bool:
        """Whether the device was closed."""
        return self._socket is None

    @property
    def page(self) -> Page:
        """Item 0 is the generation."""
        return self._page

    @property
    def generation(self) -> int:
        """The generation of the latest LAST that was read."""
        return self._page[0]

    def fileno(self) -> int:
        """Return the descriptor, readable when there is something to read.

        :raises ClosedError: if the device is closed
        """
        return self._open_socket().fileno()

    def register(self, start: int, end: int, cookie: int) -> None:
        """Refuse: only the process that is watched can register its memory.

        :raises UnwatchableRangeError: always
        """
        raise UnwatchableRangeError(
            errno.EPERM,
            f"{start:#x}-{end:#x} (cookie {cookie}) is memory of another process, "
            "which registers it by itself: the embedded backend cannot from here",
        )

    def unregister(self, cookie: int) -> None:
        """Refuse: only the process that is watched can.

        :raises DeviceError: always
        """
        raise DeviceError(
            errno.EPERM,
            f"cookie {cookie} is a region of another process, which unregisters it "
            "by itself",
        )

    def spent(self, cookie: int) -> bool:
        """Refuse: only the process that is watched knows.

        :raises DeviceError: always
        """
        raise DeviceError(
            errno.EPERM, f"only the other process knows about its cookie {cookie}"
        )

    def rearm(self, cookie: int) -> None:
        """Refuse: only the process that is watched can.

        :raises DeviceError: always
        """
        self.spent(cookie)

    def fence(self) -> bool:
        """Return False: what is under way in another process is not known here."""
        return False

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """Read records into a buffer of at least 2,048 bytes.

        :returns: the number of bytes, a multiple of 32; None if there is nothing to
            read now; 0 if the other process has closed its device or has ended
        :raises InvalidBufferError: if the buffer is too small for a packet
        :raises ForeignDeviceError: if what comes are no records
        :raises ClosedError: if the device is closed
        """
        with memoryview(buffer) as view, view.cast("B") as data:
            if len(data) < _PACKET_SIZE:
                raise InvalidBufferError(
                    f"a packet has up to {_PACKET_SIZE} bytes, the buffer has less"
                )
            try:
                # Whatever O_NONBLOCK says, which the sender can change.
                size, _, flags, _ = self._open_socket().recvmsg_into(
                    (data,), 0, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return None
            except OSError as error:
                raise _not_records(error.strerror) from error
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or size % EVENT.size:
                raise _not_records(f"a packet of {size} bytes")
            for kind, *_, generation in unpack(data[max(size - EVENT.size, 0) : size]):
                if kind == LAST:
                    self._page[0] = generation
            return size

    def close(self) -> None:
        """Release the descriptor; harmless if repeated."""
        shared, self._socket = self._socket, None
        if shared is not None:
            shared.close()

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
        if getattr(self, "_socket", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, 2, self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._socket is None else f"fd={self._socket.fileno()}"
        return f"<{type(self).__name__} {state}>"

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise ClosedError("the device was closed")
        return self._socket


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def _is_driver(device: int) -> bool:
    """Ask before any ioctl, which could mean something else elsewhere."""
    number = f"{os.major(device)}:{os.minor(device)}"
    subsystem = Path("/sys/dev/char", number, "subsystem")
    try:
        if subsystem.exists():
            return subsystem.resolve().name == "ummunotify"
        # No sysfs here.
        return Path(DEFAULT_PATH).stat().st_rdev == device
    except OSError:
        return False


def _is_packet_socket(fd: int) -> bool:
    # A duplicate object for the question only: it must not close the descriptor.
    asked = socket.socket(fileno=fd)
    try:
        return (asked.family, asked.type) == (
            socket.AF_UNIX,
            socket.SOCK_SEQPACKET,
        ) and not asked.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    finally:
        asked.detach()


def _not_records(fact: str | None) -> ForeignDeviceError:
    return ForeignDeviceError(
        errno.EPROTO, f"what the other process sends are no records: {fact}"
    )
