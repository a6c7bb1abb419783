"""Where clients come in: the Unix socket, who they are, and their notifiers."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import pwd
import socket
import struct
import time
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio
import attrs
from anyio import to_thread

import aioummu
from memtrackd import protocol
from memtrackd.tracking import Credentials, TooManyRegionsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from memtrackd.tracking import Client, Tracking

#: Seconds that a client has for its first message.
HELLO_TIMEOUT = 5.0
#: Seconds for finding out what a user is called.
USER_TIMEOUT = 1.0
#: Seconds without a descriptor to accept the next client with.
ACCEPT_PAUSE = 0.1
#: Reads of a notifier that are made for the reports still in it when the daemon
#: ends: whoever goes on changing memory does not keep it from ending.
FINAL_READS = 64

# Descriptors that a message may bring. One is wanted; of more than these the kernel
# closes the rest.
_MOST_DESCRIPTORS = 8
_CREDENTIALS = struct.Struct("3i")
_DESCRIPTOR_SIZE = array.array("i").itemsize


class Log(Protocol):
    """Where what happened to the intake itself is written."""

    def refused(self, credentials: Credentials, reason: str) -> None:
        """Say that a client was not taken, or sent away."""
        ...

    def trouble(self, what: str) -> None:
        """Say that the daemon itself cannot do something."""
        ...


class _RefusedError(Exception):
    """A client that is to be sent away.

    :param kind: one of few words, for the metrics
    :param reason: for the client
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@attrs.define(eq=False)
class Intake:
    """Lets clients attach, and reads what their notifiers report.

    Synchronization: for the event loop's thread only.
    """

    tracking: Tracking
    log: Log
    max_clients: int = 256
    delivered: Callable[[float], None] = lambda _seconds: None
    """Told how long the outputs took for what one read gave."""
    refused: Counter[str] = attrs.field(factory=Counter)
    """How many clients were sent away, by the kind of reason."""
    _connections: int = 0

    async def serve(self, listener: socket.socket) -> None:
        """Take clients in until cancelled; then, each is read a last time."""
        listener.setblocking(False)
        async with anyio.create_task_group() as tasks:
            while True:
                connection = await self._accept(listener)
                tasks.start_soon(self._attend, connection)

    async def _accept(self, listener: socket.socket) -> socket.socket:
        while True:
            await anyio.wait_readable(listener)
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS}:
                    self.log.trouble(f"no client can be accepted: {error.strerror}")
                    await anyio.sleep(ACCEPT_PAUSE)
                # Else it is gone already, or another process was faster.
                continue
            connection.setblocking(False)
            return connection

    async def _attend(self, connection: socket.socket) -> None:
        """Do everything for one client."""
        self._connections += 1
        with connection:
            credentials = await _credentials(connection)
            try:
                await self._attend_to(connection, credentials)
            except _RefusedError as error:
                self.refused[error.kind] += 1
                self.log.refused(credentials, str(error))
                _answer(connection, protocol.Refusal(str(error)))
            finally:
                self._connections -= 1

    async def _attend_to(
        self, connection: socket.socket, credentials: Credentials
    ) -> None:
        # Those who have not said hello yet count as well, and have a time limit.
        if self._connections > self.max_clients:
            raise _RefusedError(
                "too many clients", f"at most {self.max_clients} clients at a time"
            )
        with anyio.move_on_after(HELLO_TIMEOUT) as limit:
            hello, device = await _receive_hello(connection)
        if limit.cancelled_caught:
            raise _RefusedError("no hello", f"no message within {HELLO_TIMEOUT:g} s")
        async with aioummu.open_notifier(device=device) as notifier:
            client = self.tracking.attach(
                hello.name, hello.backend, credentials, time.time()
            )
            reason = "the daemon ends"
            try:
                _answer(connection, protocol.Welcome(client.id))
                reason = await self._track(client, connection, notifier)
            except (_RefusedError, aioummu.DeviceError) as error:
                reason = str(error)
                if isinstance(error, aioummu.DeviceError):
                    raise _RefusedError("bad records", reason) from error
                raise
            finally:
                self._read_the_rest(client, device)
                self.tracking.end(client, reason, time.time())

    async def _track(
        self,
        client: Client,
        connection: socket.socket,
        notifier: aioummu.Notifier,
    ) -> str:
        """Read both of a client's descriptors; return why that has ended."""
        reasons: list[str] = []

        async def until(ended: Callable[[], Awaitable[None]], reason: str) -> None:
            await ended()
            reasons.append(reason)
            tasks.cancel_scope.cancel()

        updates = partial(self._receive_updates, client, connection)
        records = partial(self._receive_records, client, notifier)
        errors: list[Exception] = []
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(until, updates, "it has left")
                tasks.start_soon(until, records, "its memory is gone")
        except* (_RefusedError, aioummu.DeviceError) as group:
            errors += group.exceptions
        if errors:
            raise errors[0]
        return reasons[0]

    async def _receive_records(
        self, client: Client, notifier: aioummu.Notifier
    ) -> None:
        async for records in notifier.raw_batches():
            self._report(client, records)

    async def _receive_updates(self, client: Client, connection: socket.socket) -> None:
        while True:
            await anyio.wait_readable(connection)
            packet = await _receive(connection)
            if packet is None:
                continue
            if not packet.data:
                return
            if packet.descriptors:
                await _discard(packet.descriptors)
                raise _RefusedError(
                    "descriptor", "a descriptor comes with the first message only"
                )
            try:
                update = protocol.decode_update(packet.data)
                self.tracking.update(client, update, time.time())
            except protocol.MessageError as error:
                raise _RefusedError("malformed message", str(error)) from error
            except TooManyRegionsError as error:
                raise _RefusedError("too many regions", str(error)) from error

    def _read_the_rest(self, client: Client, device: aioummu.DeviceLike) -> None:
        buffer = memoryview(bytearray(1024 * aioummu.RECORD_SIZE))
        with contextlib.suppress(aioummu.UmmunotifyError):
            for _ in range(FINAL_READS):
                size = device.readinto(buffer)
                if not size:
                    break
                self._report(client, aioummu.unpack(buffer[:size]))

    def _report(self, client: Client, records: Sequence[aioummu.Record]) -> None:
        begun = time.perf_counter()
        self.tracking.report(client, records, time.time())
        self.delivered(time.perf_counter() - begun)


@attrs.frozen
class _Packet:
    data: bytes
    descriptors: list[int]


async def _receive_hello(
    connection: socket.socket,
) -> tuple[protocol.Hello, aioummu.DeviceLike]:
    packet = None
    while packet is None:
        await anyio.wait_readable(connection)
        packet = await _receive(connection)
    descriptors = packet.descriptors
    try:
        if not packet.data:
            raise _RefusedError("no hello", "the first message is a hello")
        try:
            hello = protocol.decode_hello(packet.data)
        except protocol.MessageError as error:
            raise _RefusedError("malformed message", str(error)) from error
        if len(descriptors) != 1:
            raise _RefusedError(
                "descriptor",
                f"a hello brings one descriptor, of a notifier, not {len(descriptors)}",
            )
        return hello, await _open(descriptors, hello.backend)
    finally:
        await _discard(descriptors)


async def _open(descriptors: list[int], backend: str) -> aioummu.DeviceLike:
    """Take the one descriptor out of the list if it is what it should be."""
    try:
        device = aioummu.open_shared(os.dup(descriptors[0]))
    except OSError as error:  # DeviceError is one
        raise _RefusedError("descriptor", error.strerror or str(error)) from error
    if device.backend != backend:
        device.close()
        raise _RefusedError(
            "descriptor",
            f"the hello says {backend!r}, the descriptor is of {device.backend!r}",
        )
    return device


async def _receive(connection: socket.socket) -> _Packet | None:
    """Receive a message with all that it brings; None: there is none now."""
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR_SIZE)
    try:
        data, ancillary, flags, _ = connection.recvmsg(
            protocol.PACKET_SIZE,
            room,
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )
    except BlockingIOError:
        return None
    except OSError:
        return _Packet(b"", [])
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % _DESCRIPTOR_SIZE
            descriptors.frombytes(content[:whole])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        await _discard(descriptors.tolist())
        raise _RefusedError(
            "malformed message",
            f"a message has at most {protocol.PACKET_SIZE} bytes and one descriptor",
        )
    return _Packet(data, descriptors.tolist())


async def _discard(descriptors: Sequence[int]) -> None:
    """Close what a client has sent.

    In a thread: that may wait, for as long as the client likes, if it is a file of
    a file system of its own, or a socket that lingers.
    """

    def close() -> None:
        for fd in descriptors:
            with contextlib.suppress(OSError):
                os.close(fd)

    if descriptors:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(close, limiter=_DISCARDS)


#: Threads that may hang in that at a time.
_DISCARDS = anyio.CapacityLimiter(16)


def _answer(
    connection: socket.socket, answer: protocol.Welcome | protocol.Refusal
) -> None:
    # Who does not listen gets no answer.
    with contextlib.suppress(OSError):
        connection.send(protocol.encode_answer(answer), socket.MSG_DONTWAIT)


async def _credentials(connection: socket.socket) -> Credentials:
    packed = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    pid, uid, gid = _CREDENTIALS.unpack(packed)
    user = str(uid)
    # It may be asked of a server somewhere.
    with anyio.move_on_after(USER_TIMEOUT):
        user = await to_thread.run_sync(_user_name, uid, abandon_on_cancel=True)
    return Credentials(pid, uid, gid, user, _program_name(pid))


def _program_name(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
    except OSError:
        return "?"
    return _printable(name) or "?"


@lru_cache(maxsize=1024)
def _user_name(uid: int) -> str:
    try:
        return _printable(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
