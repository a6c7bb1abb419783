"""The embedded backend: the driver's interface on userfaultfd(2), in user space.

Linux 5.19 and later; from 6.7 on memory of files can be watched as well. The engine
is C, see ``engine/engine.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from aioummu import _abi
from aioummu._device import OrderedPage
from aioummu._engine import ffi, lib
from aioummu._errors import (
    ClosedError,
    DeviceError,
    DevicePermissionError,
    DuplicateCookieError,
    ForkedError,
    InvalidBufferError,
    RangeBusyError,
    SubinterpreterError,
    TooManyRegionsError,
    UnknownCookieError,
    UnsupportedKernelError,
    UnwatchableRangeError,
)
from aioummu._forks import track
from aioummu._records import Feature, wanted_causes
from aioummu._regions import checked_cookie, checked_range
from aioummu._ummunotify_abi import lib as abi

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol, Self

    from _typeshed import WriteableBuffer

    from aioummu._device import Page
    from aioummu._records import Cause

    class _Refusal(Protocol):
        start: int
        end: int


class EmbeddedDevice:
    """A device without a driver, for this process's own memory.

    The first one that is open starts the engine of the process, a thread that
    never runs Python; the last one that closes stops it. What is reported, and
    what is not, is a table in ``docs/backends.md``.

    Synchronization: all methods may be called by any thread at any time. Unusable
    in forked children, where it is closed.

    :raises UnsupportedKernelError: if the kernel is too old for it
    :raises DevicePermissionError: if this process may not use userfaultfd
    :raises SubinterpreterError: outside of the main interpreter
    :raises DeviceError: if the engine cannot start for another reason
    """

    def __init__(self) -> None:
        self._number = 0
        self._forked = False
        _check_interpreter()
        doorbell = ffi.new("int[2]")
        number = lib.aioummu_open(doorbell)
        if number < 0:
            raise _start_error(-number)
        self._doorbell: tuple[int, int] = tuple(doorbell)
        self._number = number
        self._view = memoryview(ffi.buffer(lib.aioummu_activity(), 8)).cast("Q")
        self._page: memoryview | OrderedPage = (
            self._view if abi.AIOUMMU_PLAIN_LOAD_IS_ACQUIRE else OrderedPage(self._view)
        )
        track(self)

    @property
    def backend(self) -> str:
        """The string "embedded"."""
        return "embedded"

    @property
    def features(self) -> Feature:
        """All of them; ``docs/backends.md`` says what each means here."""
        return Feature.CAUSE | Feature.FILTER | Feature.STATE | Feature.ONCE

    @property
    def closed(self) -> bool:
        """Whether the device was closed."""
        return not self._number

    @property
    def page(self) -> Page:
        """A page whose item 0 rises with whatever may be a change of anything.

        It is the same for all embedded devices of a process, and no generation:
        while it stays what it was before a look at :attr:`generation`, so does
        the generation. ValueError once closed.
        """
        return self._page

    @property
    def generation(self) -> int:
        """The number of invalidations of any region since the device was opened.

        Includes every change whose call has returned. No system call, unless
        another thread is changing mappings at this moment.

        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        generation = ffi.new("uint64_t *")
        self._check(lib.aioummu_generation(self._number, generation))
        value: int = generation[0]
        return value

    def fileno(self) -> int:
        """Return the descriptor, readable when there is something to read.

        For waiting only: read with :meth:`readinto`.

        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        if not self._number:
            raise self._gone()
        return self._doorbell[0]

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: Cause | None = None,
        once: bool = False,
    ) -> None:
        """Watch what is mapped from *start* up to but without *end*.

        Reports carry the *cookie*.

        :param causes: what to report; None: everything. Who asks for UNMAP or MOVE
            gets both. Once a part of it was unmapped or moved, the region is spent,
            whatever it asks for
        :param once: the read that takes its report unregisters it
        :raises InvalidCauseError: if *causes* are none, or have FOREIGN in them
        :raises InvalidRangeError: unless 0 <= start < end < 2**64, or if the
            cookie does not fit 64 bits
        :raises DuplicateCookieError: if the cookie names a region already
        :raises TooManyRegionsError: if there are 1,048,576 regions
        :raises UnwatchableRangeError: if not everything there is mapped and of a
            kind that the kernel watches
        :raises RangeBusyError: if another userfaultfd owns what is mapped there
        :raises DeviceError: if the kernel refuses for another reason
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        start, end = checked_range(start, end)
        cookie = checked_cookie(cookie)
        wanted = wanted_causes(causes)
        refusal = ffi.new("struct aioummu_refusal *")
        self._check(
            lib.aioummu_register(
                self._number, start, end, cookie, wanted, once, refusal
            ),
            cookie,
            refusal,
        )

    def unregister(self, cookie: int) -> None:
        """Stop watching the region: no read that starts afterwards reports it.

        :raises UnknownCookieError: if the cookie names no region
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        cookie = checked_cookie(cookie)
        self._check(lib.aioummu_unregister(self._number, cookie), cookie)

    def spent(self, cookie: int) -> bool:
        """Tell whether memory of the region was unmapped or moved since then.

        What is mapped there now is not watched, until :meth:`rearm`.

        :raises UnknownCookieError: if the cookie names no region
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        cookie = checked_cookie(cookie)
        return bool(self._check(lib.aioummu_spent(self._number, cookie), cookie))

    def rearm(self, cookie: int) -> None:
        """Watch what is mapped in the region now, if it is spent.

        :raises UnknownCookieError: if the cookie names no region
        :raises UnwatchableRangeError: as for register(); still spent then
        :raises RangeBusyError: as for register(); still spent then
        :raises DeviceError: if the kernel refuses for another reason
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        cookie = checked_cookie(cookie)
        refusal = ffi.new("struct aioummu_refusal *")
        self._check(lib.aioummu_rearm(self._number, cookie, refusal), cookie, refusal)

    def state(self, cookie: int) -> int:
        """Return what was done to the region, as a number.

        It rises by 2 with every change that the region asks for, and when it is
        spent; :meth:`rearm` takes nothing back. An even number, taken before the
        memory is looked at and still the same later, proves that nothing that the
        region asks for was done to it in between. Includes every change whose call
        has returned.

        It is odd as long as pages of the region may be on their way (MADV_DONTNEED
        and its like are reported before they go), and while the region is spent.
        The former ends by itself, but it takes a call of this method to notice that:
        :attr:`page` does not say so.

        No system call, unless another thread is changing mappings at this moment, or
        the region is odd: then some for each thread of the process, in at most a
        tenth of the time.

        :raises UnknownCookieError: if the cookie names no region
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        cookie = checked_cookie(cookie)
        state = ffi.new("uint64_t *")
        self._check(lib.aioummu_state(self._number, cookie, state), cookie)
        value: int = state[0]
        return value

    def watch_word(self, cookie: int) -> tuple[Page, int]:  # noqa: ARG002
        """Return :attr:`page` and 0, the same for all regions.

        While ``page[0]`` is what it was before :meth:`state` returned an even
        number, so is the state.
        """
        return self._page, 0

    def fence(self) -> bool:
        """Wait until every unmapping and move that is under way was counted.

        The generation counts a change before the call that made it returns, but
        not before the memory is gone. Whoever may have been given an address
        that another thread is just giving back calls this first. One system
        call, unless somebody is changing watched mappings at this moment.

        :returns: False if others changed watched mappings for 50 ms without a
            pause, so that nobody can tell: anything may have changed then
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        if not self._number:
            raise self._gone()
        result = lib.aioummu_fence()
        return result != -errno.ETIMEDOUT and not self._check(result)

    def forward(self, fd: int) -> None:
        """Send all records to another process from now on.

        They go through a connected SOCK_SEQPACKET socket of the AF_UNIX family, in
        packets of up to 64 whole records, which :func:`unpack` takes apart. A thread
        of the engine does that, without the interpreter. Nothing else in this process
        ever waits for the receiver: as long as that one does not read, reports
        coalesce here. It ends with the connection or the device, and if the receiver
        is gone, reports are kept for the next call of this method. So do not read
        here meanwhile. close() sends what is left, as far as there is room.

        A receiver that does not trust this process reads from a socket of which
        nobody else has its end: one that it has accepted or connected.

        :param fd: the socket; it is duplicated, and can be used and closed
        :raises DeviceError: if the records go to another process already (EBUSY), if
            it is another kind of socket, or if there are no descriptors, no memory or
            no thread left
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        if not self._number:
            raise self._gone()
        code = -lib.aioummu_forward(self._number, fd)
        if code in {0, errno.EBADF, errno.EOWNERDEAD}:
            self._check(-code)
            return
        if code == errno.EBUSY:
            raise DeviceError(
                code,
                "another process reads the records of this device already: close "
                "that connection first, or open another device",
            )
        if code == errno.EPROTOTYPE:
            raise DeviceError(
                code,
                f"records go through a Unix socket of type SOCK_SEQPACKET, which "
                f"descriptor {fd} is not",
            )
        raise DeviceError(code, f"no records can be forwarded: {os.strerror(code)}")

    def flush(self) -> bool:
        """Send what there is to be forwarded now, as far as there is room for it.

        Unregistering a region drops its report; who wants that to be read by the
        other process calls this before, until it is true.

        :returns: False if there was no room for some of it; True if all was sent, or
            if there is nobody to send to
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        if not self._number:
            raise self._gone()
        result: int = lib.aioummu_flush(self._number)
        return result != -errno.EAGAIN

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """Read records into a buffer of at least 32 bytes.

        :returns: the number of bytes, a multiple of 32; None if there is nothing
            to read now
        :raises InvalidBufferError: if the buffer is too small for a record
        :raises ClosedError: if the device is closed
        :raises ForkedError: in a forked child
        """
        memory = ffi.from_buffer(buffer, require_writable=True)
        size = lib.aioummu_read(self._number, memory, len(memory))
        if size == -errno.EINVAL:
            raise InvalidBufferError(
                f"a record takes {_abi.EVENT.size} bytes, the buffer has less"
            )
        return self._check(size) or None

    def close(self) -> None:
        """Unregister everything and release the device; harmless if repeated."""
        number, self._number = self._number, 0
        if number:
            self._release_page()
            lib.aioummu_flush(number)
            lib.aioummu_close(number)

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
        if self._number:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, 2, self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._doorbell[0]}"
        return f"<{type(self).__name__} {state}>"

    def _release_page(self) -> None:
        self._page.release()
        self._view.release()

    def _after_fork_in_child(self) -> None:
        # The engine did not come along, and has forgotten everything.
        if self._number:
            self._number = 0
            self._forked = True
            self._release_page()
            for fd in self._doorbell:
                os.close(fd)

    def _gone(self) -> ClosedError | ForkedError:
        if self._forked:
            return ForkedError(
                "the device was opened before this process was forked, so it "
                "watches the parent's memory: open one in the child"
            )
        return ClosedError("the device was closed")

    def _check(
        self, result: int, cookie: int = 0, refusal: _Refusal | None = None
    ) -> int:
        """Return what the engine returned, unless it is an error."""
        if result >= 0:
            return result
        code = -result
        if code in {errno.EBADF, errno.EOWNERDEAD}:
            self._forked |= code == errno.EOWNERDEAD
            raise self._gone()
        if code == errno.EEXIST:
            raise DuplicateCookieError(
                f"cookie {cookie} names a region of this device already: "
                "unregister that one first, or choose another"
            )
        if code == errno.ENOENT:
            raise UnknownCookieError(f"cookie {cookie} names no region of this device")
        if code == errno.ENOSPC:
            raise TooManyRegionsError(
                code,
                f"no more than {lib.AIOUMMU_MAX_REGIONS:,} regions for a device: "
                "unregister some, or open another",
            )
        if code == errno.ENOTRECOVERABLE or refusal is None:
            raise DeviceError(
                code,
                "something in this process has closed the userfaultfd behind "
                "the embedded backend: close all notifiers and open new ones",
            )
        raise _refused(code, refusal.start, refusal.end)


def _refused(code: int, start: int, end: int) -> DeviceError:
    """Return the error for a mapping that could not be registered."""
    where = f"{start:#x}-{end:#x}"
    if code == errno.EFAULT:
        return UnwatchableRangeError(
            code,
            f"nothing is mapped at {where}: the embedded backend watches mappings, "
            "not addresses, so map the memory first",
        )
    if code == errno.EBUSY:
        return RangeBusyError(
            code,
            f"another userfaultfd of this process owns {_mapping_at(start, where)}, "
            "and a mapping can have only one: use the driver, or other memory",
        )
    if code == errno.EAGAIN:
        return UnwatchableRangeError(
            code,
            f"other threads keep changing the mapping at {where}: "
            "try again when they do not",
        )
    if code == errno.ENOMEM:
        return DeviceError(code, f"no memory for watching {where}")
    hint = "" if probe().files else " (memory of files: from Linux 6.7 on)"
    return UnwatchableRangeError(
        code,
        f"the kernel does not let the embedded backend watch "
        f"{_mapping_at(start, where)}{hint}: {os.strerror(code)}",
    )


def _mapping_at(address: int, otherwise: str) -> str:
    """Return what proc_pid_maps(5) says about the mapping of an address."""
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        bounds, *facts = line.split(maxsplit=5)
        start, _, end = bounds.partition("-")
        if int(start, 16) <= address < int(end, 16):
            name = facts[4] if len(facts) > 4 else "anonymous memory"  # noqa: PLR2004
            return f"0x{start}-0x{end} ({facts[0]} {name})"
    return otherwise


def _check_interpreter() -> None:
    python = ctypes.pythonapi
    python.PyInterpreterState_Get.restype = ctypes.c_void_p
    python.PyInterpreterState_GetID.argtypes = [ctypes.c_void_p]
    python.PyInterpreterState_GetID.restype = ctypes.c_int64
    if python.PyInterpreterState_GetID(python.PyInterpreterState_Get()):
        raise SubinterpreterError(
            "the embedded backend serves the main interpreter only: open the "
            "notifier there, or use the driver"
        )


def _start_error(code: int) -> DeviceError:
    refused = probe().error
    if not refused:
        return DeviceError(
            code, f"the embedded backend cannot start: {os.strerror(code)}"
        )
    code = refused
    release = os.uname().release
    # A filter can say so as well, but this exists only where the kernel has it.
    built_in = Path("/proc/sys/vm/unprivileged_userfaultfd").exists()
    if code == errno.ENOSYS and not built_in:
        return UnsupportedKernelError(
            code,
            f"this kernel ({release}) has no userfaultfd: the embedded backend needs "
            "Linux 5.19 or later, built with CONFIG_USERFAULTFD",
        )
    if code in {errno.EPERM, errno.EACCES, errno.ENOSYS}:
        return DevicePermissionError(
            code,
            "this process may not use userfaultfd: probably a container's seccomp "
            "profile refuses the system call; allow it there, or pass the device "
            "/dev/userfaultfd into the container, readable and writable",
        )
    if code in {errno.EOPNOTSUPP, errno.EINVAL}:
        return UnsupportedKernelError(
            errno.EOPNOTSUPP,
            f"the userfaultfd of this kernel ({release}) lacks the events or the "
            "write-protect mode that the embedded backend needs: Linux 5.19 or later, "
            "built with CONFIG_PTE_MARKER_UFFD_WP, has them",
        )
    if code == errno.ENOENT:
        return DeviceError(
            code,
            "the embedded backend needs /proc: mount it (mount -t proc proc /proc)",
        )
    return DeviceError(code, f"the embedded backend cannot start: {os.strerror(code)}")


@attrs.frozen
class Support:
    """What the kernel offers for the embedded backend."""

    error: int
    """0, or the errno that says why it cannot be used."""
    features: int
    """UFFD_FEATURE_ flags of linux/userfaultfd.h."""
    through_device: bool
    """The system call is refused, but /dev/userfaultfd can be opened."""
    files: bool
    """Memory of files can be watched."""


def probe() -> Support:
    """Ask the kernel what it offers, without starting anything."""
    support = ffi.new("struct aioummu_support *")
    lib.aioummu_probe(support)
    return Support(
        -support.error,
        support.features,
        through_device=bool(support.through_device),
        files=bool(support.files),
    )
