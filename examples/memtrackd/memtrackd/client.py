"""For programs that want to be tracked.

::

    with memtrackd.attach("train.py") as tracker:
        tracker.register(weights, "weights")     # anything with the buffer protocol
        tracker.register(start, end, "arena")    # or addresses, end exclusive

Consent is explicit: only what is registered here is seen by the daemon, and only
addresses, names and times, never contents. No event loop is needed.

Nothing here ever waits for the daemon, but for its answer to :func:`attach`, which
has a time limit. If it is slow, stopped or dead, the program goes on as if nobody
had asked; what could not be said is said with a later call (:meth:`Tracker.flush`, if
there is no other), also to a daemon that was started again.

On the driver, the daemon gets the device itself. So it is trusted that far: it could
register addresses, or unregister them. Contents it can never see.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import select
import socket
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, overload

import aioummu
from memtrackd import protocol

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

#: Seconds between attempts to find the daemon again.
RETRY = 1.0
#: The same after it has refused again and again.
LONGEST_RETRY = 60.0
#: Seconds that close() waits, at most, for a daemon that is behind.
PATIENCE = 0.1
#: Seconds between two looks whether it has caught up.
PAUSE = 0.002
#: The same for one that takes long.
LONGEST_PAUSE = 0.1
#: Unregistered regions that wait until their reports were sent.
RETIRING = 4096
#: Bytes that can be on their way to the daemon, if the system allows it.
SEND_BUFFER = 1 << 20

_LATER = {errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ENOMEM}


class AttachError(Exception):
    """The daemon cannot be reached, or does not want this program."""


def default_socket() -> Path:
    """Return where the daemon is looked for.

    That is ``$MEMTRACKD_SOCKET``; or where a daemon of the system listens, if there
    is one or this is root; or below ``$XDG_RUNTIME_DIR`` or the home directory.
    """
    if path := os.environ.get("MEMTRACKD_SOCKET"):
        return Path(path)
    system = Path("/run/memtrackd/memtrackd.sock")
    if os.geteuid() == 0 or os.access(system, os.F_OK):
        return system
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(directory, "memtrackd.sock")
    return Path.home() / ".memtrackd" / "memtrackd.sock"


def attach(
    name: str | None = None,
    *,
    socket: str | os.PathLike[str] | None = None,
    backend: aioummu.Backend = "auto",
    timeout: float = 2.0,
    required: bool = True,
) -> Tracker:
    """Let the daemon track memory of this process.

    :param name: what to call this program; its own name if left out
    :param socket: where the daemon listens, if not at :func:`default_socket`
    :param backend: as for :func:`aioummu.open_notifier`
    :param timeout: seconds to wait for the daemon's answer
    :param required: whether it is an error that there is no daemon; otherwise it is
        looked for again with later calls
    :raises AttachError: if there is no daemon, it does not answer in time, or refuses
    :raises aioummu.DeviceError: if memory cannot be watched on this machine
    :raises MessageError: if the name is no name
    """
    name = name or Path(sys.argv[0] or "python").name or "python"
    path = default_socket() if socket is None else Path(socket)
    # States are of no use here, and cost something with each change.
    device = aioummu.open_device(backend, features=aioummu.Feature.CAUSE)
    tracker = Tracker(device, path, name)
    try:
        tracker._attach(timeout)  # noqa: SLF001 - the same module
    except AttachError:
        if required:
            tracker.close()
            raise
    except BaseException:
        tracker.close()
        raise
    return tracker


class Region:
    """A tracked region, made by :meth:`Tracker.register`; also a context manager."""

    __slots__ = ("_entry", "_tracker")

    def __init__(self, tracker: Tracker, entry: protocol.RegionEntry) -> None:
        self._tracker = tracker
        self._entry = entry

    @property
    def name(self) -> str:
        """What it is called."""
        return self._entry.name

    @property
    def cookie(self) -> int:
        """Its number, unique within the tracker."""
        return self._entry.cookie

    @property
    def start(self) -> int:
        """Address of the first byte."""
        return self._entry.start

    @property
    def end(self) -> int:
        """Address behind the last byte."""
        return self._entry.end

    def rearm(self) -> None:
        """Watch what is mapped there now, see :meth:`aioummu.Region.rearm`."""
        self._tracker.device.rearm(self.cookie)

    def close(self) -> None:
        """Stop tracking it; harmless if repeated, or if the tracker is closed."""
        self._tracker.unregister(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.start:#x}-{self.end:#x}>"


class Tracker:
    """What the daemon tracks of this process; a context manager.

    Synchronization: any thread may call anything, finalizers included. In a forked
    child it is closed, and what is registered there is not tracked: attach there.
    """

    def __init__(
        self, device: aioummu.Device | aioummu.EmbeddedDevice, path: Path, name: str
    ) -> None:
        self.device = device
        """The device, whose records go to the daemon."""
        self._path = path
        self._name = name
        # Reentrant: a finalizer that unregisters can run anywhere.
        self._lock = threading.RLock()
        self._cookies = itertools.count(1)
        self._regions: dict[int, protocol.RegionEntry] = {}
        # What the daemon was told of, and has to be told of.
        self._told: set[int] = set()
        self._new: dict[int, protocol.RegionEntry] = {}
        self._gone: set[int] = set()
        # Not wanted any more, and still registered: their reports are to be sent.
        self._retiring: dict[int, None] = {}
        # On the driver: all reports up to this one were read.
        self._read_generation = 0
        self._telling = False
        # There is a thread that says what did not fit.
        self._is_behind = False
        self._socket: socket.socket | None = None
        self._forwards = False
        self._error: str | None = None
        self._closed = False
        self._forked = False
        self._retry_at = 0.0
        self._retry_after = RETRY
        self._connected_at = 0.0
        _trackers.add(self)

    @property
    def attached(self) -> bool:
        """Whether the daemon is there, as far as is known."""
        with self._lock:
            self._listen()
            return self._socket is not None

    @property
    def error(self) -> str | None:
        """Why the daemon has hung up, if it has."""
        with self._lock:
            self._listen()
            return self._error

    @overload
    def register(self, buffer: Buffer, name: str, /) -> Region: ...

    @overload
    def register(self, start: int, end: int, name: str, /) -> Region: ...

    def register(self, *arguments: object) -> Region:
        """Track a buffer's memory, or the addresses from *start* up to *end*.

        No export of the buffer is kept: it can be freed, which is what the daemon
        will tell.

        :raises MessageError: if the name is no name
        :raises aioummu.ClosedError: if the tracker is closed
        :raises aioummu.UmmunotifyError: as :meth:`aioummu.Notifier.register`
        """
        match arguments:
            case (int(start), int(end), str(name)):
                pass
            case (buffer, str(name)):
                start, end = aioummu.address_range(buffer)  # type: ignore[arg-type]
            case _:
                raise TypeError("register(buffer, name) or register(start, end, name)")
        with self._lock:
            entry = protocol.checked_entry(
                protocol.RegionEntry(next(self._cookies), start, end, name)
            )
            region = Region(self, entry)
            if self._forked:
                return region
            if self._closed:
                raise aioummu.ClosedError("the tracker was closed")
            # Announced first: no report may come earlier than its name.
            self._regions[entry.cookie] = self._new[entry.cookie] = entry
            self._tell()
            try:
                self.device.register(start, end, entry.cookie)
            except BaseException:
                self._forget(entry.cookie)
                self._tell()
                raise
        return region

    def unregister(self, region: Region) -> None:
        """Stop tracking a region; harmless if repeated.

        It stays registered until the daemon has what was reported of it by then.
        """
        with self._lock:
            if not self._closed and region.cookie in self._regions:
                self._retiring[region.cookie] = None
                self._forget(region.cookie)
                self._tell()

    def flush(self) -> bool:
        """Say what could not be said before; return whether the daemon knows all.

        A program that registers at its start and then computes for hours calls this
        now and then: it is also what finds a daemon that was started again.
        """
        with self._lock:
            if not self._closed:
                self._tell()
            return self._socket is not None and not self._has_more()

    def close(self) -> None:
        """Stop watching, and let the daemon see the end; harmless if repeated.

        If it is busy, it gets a tenth of a second for what it has not heard of yet.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                until = time.monotonic() + PATIENCE
                while self._say_more() and time.monotonic() < until:
                    time.sleep(PAUSE)
            finally:
                # Sends what is to be reported yet, so it goes first.
                self.device.close()
                self._disconnect()

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
        if not self._closed:
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name!r} at {str(self._path)!r}>"

    def _attach(self, timeout: float) -> None:
        """Connect, and wait for the answer."""
        with self._lock:
            try:
                self._connect()
            except aioummu.DeviceError:
                raise
            except OSError as error:
                raise _attach_error(self._path, error) from error
            connection = self._socket
        # Nobody else knows the tracker yet.
        if connection is None or not _is_readable(connection, timeout):
            self._hang_up("it did not answer")
            raise AttachError(
                f"the daemon at {self._path} does not answer within {timeout:g} s: "
                "is it stopped, or overloaded?"
            )
        if not self.attached:
            raise AttachError(f"the daemon at {self._path} refuses: {self._error}")

    # Under the lock.

    def _forget(self, cookie: int) -> None:
        del self._regions[cookie]
        self._new.pop(cookie, None)
        if cookie in self._told:
            self._told.discard(cookie)
            self._gone.add(cookie)

    def _connect(self) -> None:
        """Say hello, without waiting for an answer."""
        device = self.device
        hello = protocol.encode_hello(protocol.Hello(self._name, device.backend))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            connection.connect(os.fspath(self._path))
            if isinstance(device, aioummu.EmbeddedDevice):
                connection.send(hello)
                # A daemon that was started again is told the names before.
                if not self._regions:
                    device.forward(connection.fileno())
            else:
                socket.send_fds(connection, [hello], [device.fileno()])
        except BaseException:
            connection.close()
            raise
        self._socket = connection
        self._forwards = not self._regions
        self._connected_at = time.monotonic()
        self._error = None
        self._new = dict(self._regions)
        self._told = set()
        self._gone = set()

    def _reconnect(self) -> None:
        now = time.monotonic()
        if now >= self._retry_at:
            self._retry_at = now + self._retry_after
            with contextlib.suppress(OSError):
                self._connect()

    def _listen(self) -> None:
        """Hear why the daemon hangs up, if it does."""
        while (connection := self._socket) is not None:
            try:
                try:
                    packet = connection.recv(protocol.PACKET_SIZE)
                except ConnectionResetError:
                    # It has not read all of ours; what it said comes after that.
                    packet = connection.recv(protocol.PACKET_SIZE)
                answer = protocol.decode_answer(packet) if packet else None
            except BlockingIOError:
                return
            except (OSError, protocol.MessageError) as error:
                self._hang_up(str(error))
                return
            if answer is None:
                self._hang_up("it is gone")
            elif isinstance(answer, protocol.Refusal):
                self._hang_up(answer.error)
                # It would mostly refuse again.
                stayed = time.monotonic() - self._connected_at
                longer = min(2 * self._retry_after, LONGEST_RETRY)
                self._retry_after = longer if stayed < LONGEST_RETRY else RETRY

    def _tell(self) -> None:
        """Send what there is to say, as far as there is room."""
        if self._telling:
            # A finalizer came in between: what it leaves is seen there.
            return
        self._telling = True
        try:
            self._listen()
            if self._socket is None:
                self._reconnect()
            if self._say_more() and not self._is_behind:
                self._is_behind = True
                threading.Thread(
                    target=self._catch_up, name="memtrackd", daemon=True
                ).start()
        finally:
            self._telling = False

    def _catch_up(self) -> None:
        """Say the rest as the daemon reads, though the program makes no more calls."""
        pause = PAUSE
        while True:
            with self._lock:
                if self._closed or self.flush() or self._socket is None:
                    self._is_behind = False
                    return
                fd = self._socket.fileno()
            # If another file has that number by now, it is polled in vain, no more.
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll(1000)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _say_more(self) -> bool:
        """Return whether there is more to say, and somebody to say it to."""
        while self._new:
            if not self._send(self._next_update()):
                break
        self._forward()
        self._retire()
        while self._gone and not self._retiring:
            if not self._send(self._next_update()):
                break
        return self._socket is not None and self._has_more()

    def _has_more(self) -> bool:
        return bool(self._new or self._gone or self._retiring or not self._forwards)

    def _forward(self) -> None:
        """Let reports go to a daemon that was started again, once it has the names."""
        if self._forwards or self._new or self._socket is None:
            return
        if isinstance(self.device, aioummu.EmbeddedDevice):
            try:
                self.device.forward(self._socket.fileno())
            except aioummu.DeviceError:
                # The thread for the earlier connection has not noticed its end yet.
                return
        self._forwards = True

    def _retire(self) -> None:
        """Unregister what is not wanted any more, once its reports were sent."""
        if not self._retiring:
            return
        is_sent = self._is_all_sent()
        while self._retiring and (is_sent or len(self._retiring) > RETIRING):
            cookie = next(iter(self._retiring))
            del self._retiring[cookie]
            # The daemon has the driver's file as well, and may have done so.
            with contextlib.suppress(aioummu.UnknownCookieError):
                self.device.unregister(cookie)

    def _is_all_sent(self) -> bool:
        """Tell whether no report would be dropped by unregistering."""
        if self._socket is None:
            return True
        if isinstance(self.device, aioummu.EmbeddedDevice):
            return self.device.flush()
        generation = self.device.generation
        if generation != self._read_generation:
            facts = Path(f"/proc/self/fdinfo/{self.device.fileno()}").read_text("ascii")
            if "\nummunotify-pending:\t0\n" not in facts:
                return False
            self._read_generation = generation
        return True

    def _next_update(self) -> protocol.Update:
        if not self._new:
            gone = itertools.islice(self._gone, protocol.COOKIES)
            return protocol.Update(unregister=tuple(gone))
        new = itertools.islice(self._new.values(), protocol.ENTRIES)
        return protocol.Update(register=tuple(new))

    def _send(self, update: protocol.Update) -> bool:
        packet = protocol.encode_update(update)
        if self._socket is None:
            return False
        try:
            self._socket.send(packet)
        except OSError as error:
            if error.errno not in _LATER:
                self._listen()
                self._hang_up(error.strerror)
            return False
        self._gone.difference_update(update.unregister)
        for entry in update.register:
            if self._new.pop(entry.cookie, None) is None:
                # Unregistered meanwhile.
                self._gone.add(entry.cookie)
            else:
                self._told.add(entry.cookie)
        return True

    def _hang_up(self, reason: str | None) -> None:
        if self._error is None:
            self._error = reason
        if self._socket is not None:
            # The thread that forwards has a duplicate.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._disconnect()

    def _disconnect(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._telling = False
        self._closed = self._forked = True
        self._disconnect()


# Finalizers and fork handlers can come at any time: no lock.
_trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for tracker in list(_trackers):
        tracker._after_fork_in_child()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _close_all() -> None:
    """Report what happened last, though the program did not close its tracker."""
    for tracker in list(_trackers):
        with contextlib.suppress(Exception):
            tracker.close()


def _is_readable(connection: socket.socket, timeout: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _attach_error(path: Path, error: OSError) -> AttachError:
    if error.errno in {errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR}:
        return AttachError(
            f"no daemon listens at {path}: start memtrackd, or say where it listens "
            "(MEMTRACKD_SOCKET)"
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return AttachError(
            f"this user may not attach to the daemon at {path}: ask for membership in "
            "the group of the socket"
        )
    if error.errno == errno.EAGAIN:
        return AttachError(f"the daemon at {path} is stopped or overloaded")
    return AttachError(f"the daemon at {path} cannot be reached: {error.strerror}")
