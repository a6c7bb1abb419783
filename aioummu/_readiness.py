"""Two ways to wait until a device may be readable.

Both only say "look again": a wait may end without anything to read, and whoever
waits reads afterwards, so that a cancelled wait loses nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import threading
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import anyio
import anyio.lowlevel

from aioummu._errors import ForeignDeviceError
from aioummu._ummunotify_abi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractContextManager
    from types import FrameType

ReadinessKind: TypeAlias = Literal["poll", "sigio"]


class Readiness(Protocol):
    """A way to wait, for one task at a time."""

    async def wait(self) -> None:
        """Return when the descriptor may be readable, or after close()."""
        ...

    def close(self) -> None:
        """End the wait in progress; to be called before the descriptor closes."""
        ...


def open_readiness(kind: ReadinessKind, fd: int) -> Readiness:
    """Return the named way to wait for *fd*, to be used in the running loop."""
    match kind:
        case "poll":
            return PollReadiness(fd)
        case "sigio":
            return SigioReadiness(fd)
        case _:
            raise ValueError(f"readiness is 'poll' or 'sigio', not {kind!r}")


class PollReadiness:
    """Let the event loop poll the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting = False

    async def wait(self) -> None:
        """Return when the descriptor is readable, or after close().

        :raises ForeignDeviceError: if the descriptor cannot be polled
        """
        self._waiting = True
        try:
            await anyio.wait_readable(self._fd)
        except anyio.ClosedResourceError:
            pass
        except PermissionError as error:
            # epoll refuses descriptors whose driver has no poll operation.
            raise ForeignDeviceError(
                errno.EPERM, "the device cannot be polled: not an ummunotify device"
            ) from error
        finally:
            self._waiting = False

    def close(self) -> None:
        """End the wait in progress."""
        if self._waiting:
            anyio.notify_closing(self._fd)


class SigioReadiness:
    """Let the kernel send a signal when the descriptor becomes readable.

    The signal is asked for (O_ASYNC) only while a task waits. So a busy process
    is not interrupted, and a signal never comes when nobody receives it, which
    would kill the process.

    See fcntl(2), F_SETOWN and F_SETSIG.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._wait_scope: anyio.CancelScope | None = None
        self._signals = _SharedSignals.acquire()
        try:
            self._signals.direct_here(fd)
        except BaseException:
            self._signals.release()
            raise

    async def wait(self) -> None:
        """Return when a signal came, for any descriptor, or after close()."""
        with anyio.CancelScope() as self._wait_scope:
            try:
                _set_async(self._fd, True)
                # Whatever came before O_ASYNC raised no signal.
                if self._poll.poll(0):
                    await anyio.lowlevel.checkpoint()
                else:
                    await self._signals.wait()
            finally:
                # close() has done so, and the number may be another file's now.
                if self._wait_scope is not None:
                    self._stop_signals()

    def close(self) -> None:
        """End the wait in progress, and leave no signal on its way."""
        if self._wait_scope is not None:
            self._wait_scope.cancel()
            self._stop_signals()
        self._signals.release()

    def _stop_signals(self) -> None:
        self._wait_scope = None
        _set_async(self._fd, False)


def _set_async(fd: int, on: bool) -> None:
    # Once this returns, the kernel is not sending any signal for fd any more:
    # turning O_ASYNC off takes the lock that is held while sending.
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    flags = flags | os.O_ASYNC if on else flags & ~os.O_ASYNC
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


class _SignalSource(Protocol):
    """Where the signals of one event loop arrive."""

    signum: int
    """The signal to ask for; 0 means SIGIO, see F_SETSIG in fcntl(2)."""

    async def receive(self) -> None:
        """Wait for one or more signals, and take them."""
        ...

    def close(self) -> None:
        """Stop receiving; no descriptor sends signals any more."""
        ...


class _SharedSignals:
    """The signals of one event loop, for all that wait for them in it.

    A signal does not tell reliably whose it is: equal ones merge while they are
    pending. So each wakes every waiter. One of the waiters receives for all; if
    it is cancelled, another takes over, and nobody needs a task for it.
    """

    def __init__(self) -> None:
        self._source: _SignalSource = (
            _LoopSignals()
            if threading.current_thread() is threading.main_thread()
            else _ThreadSignals()
        )
        self._users = 0
        self._received = 0
        self._receiving = False
        self._changed = anyio.Event()

    @classmethod
    def acquire(cls) -> _SharedSignals:
        signals = _shared_signals.get(None)
        if signals is None:
            signals = cls()
            _shared_signals.set(signals)
        signals._users += 1
        return signals

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            _shared_signals.set(None)
            self._source.close()

    def direct_here(self, fd: int) -> None:
        """Have the signals of *fd* sent to this thread."""
        fcntl.fcntl(fd, fcntl.F_SETSIG, self._source.signum)
        # Not F_SETOWN: that would interrupt other threads' system calls.
        owner = struct.pack("ii", lib.F_OWNER_TID, threading.get_native_id())
        fcntl.fcntl(fd, lib.F_SETOWN_EX, owner)

    async def wait(self) -> None:
        """Return after a signal that was received after this call."""
        before = self._received
        while self._received == before:
            if self._receiving:
                await self._changed.wait()
                continue
            self._receiving = True
            try:
                await self._source.receive()
                self._received += 1
            finally:
                self._receiving = False
                self._changed.set()
                self._changed = anyio.Event()


_shared_signals: anyio.lowlevel.RunVar[_SharedSignals | None] = anyio.lowlevel.RunVar(
    "aioummu._readiness._shared_signals"
)


class _LoopSignals:
    """SIGIO, handled by the event loop of the main thread.

    A handler of the program for SIGIO is put back at the end.
    """

    signum = 0

    def __init__(self) -> None:
        self._before = signal.getsignal(signal.SIGIO)
        # Trio raises again, after the handler is gone, what was not received.
        if self._before is signal.SIG_DFL:
            self._before = _ignore
            signal.signal(signal.SIGIO, _ignore)
        self._context: AbstractContextManager[AsyncIterator[signal.Signals]] = (
            anyio.open_signal_receiver(signal.SIGIO)
        )
        self._signals = self._context.__enter__()

    async def receive(self) -> None:
        await anext(self._signals)

    def close(self) -> None:
        self._context.__exit__(None, None, None)
        if self._before is not None:  # None: a handler that is not Python's
            signal.signal(signal.SIGIO, self._before)


def _ignore(_signum: int, _frame: FrameType | None) -> None:
    """Handle SIGIO; unlike SIG_IGN, it is not inherited by other programs."""


class _ThreadSignals:
    """A real-time signal for another thread, which blocks it and reads a signalfd.

    Python runs its signal handlers in the main thread only. See signalfd(2).
    """

    signum = int(signal.SIGRTMIN)
    # If the queue of real-time signals is full, the kernel sends SIGIO instead.
    _SIGNALS = (signal.SIGRTMIN, signal.SIGIO)
    _SIGINFO_SIZE = 128

    def __init__(self) -> None:
        self._fd = lib.aioummu_signalfd(
            ffi.new("int[]", self._SIGNALS), len(self._SIGNALS)
        )
        if self._fd < 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._SIGNALS)
        self._newly_blocked = set(self._SIGNALS) - before

    async def receive(self) -> None:
        with contextlib.suppress(anyio.ClosedResourceError):
            await anyio.wait_readable(self._fd)
            self._take()

    def close(self) -> None:
        # One that is still pending would kill the process when unblocked.
        self._take()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._newly_blocked)
        # The waiter's cancellation may be under way, and the loop polling still.
        fd, self._fd = self._fd, -1
        anyio.notify_closing(fd)
        os.close(fd)

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 64 * self._SIGINFO_SIZE):
                pass
