"""Where clients come in: the Unix socket, who they are, and what they report.

Clients are not trusted. None of them can hold up the event loop: what could wait for
one is done by :mod:`memtrackd.chores`, and who sends a lot rests in between.
"""

from __future__ import annotations

import array
import contextlib
import errno
import math
import os
import socket
import struct
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.lowlevel
import attrs

import aioummu
from memtrackd import protocol
from memtrackd.chores import Closer, UserNames, printable
from memtrackd.tracking import Credentials, TooManyRegionsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from memtrackd.tracking import Client, Tracking

#: Seconds that a client has for its first message.
HELLO_TIMEOUT = 5.0
#: Seconds without a descriptor to accept the next client with.
ACCEPT_PAUSE = 0.1
#: Seconds between two lines about that.
COMPLAIN_EVERY = 60.0
#: Seconds for what clients have sent before the daemon was told to end.
DRAIN_TIME = 2.0
#: Descriptors for each client.
DESCRIPTORS = 4
#: Packets of a client that are taken in at once.
PACKETS_AT_ONCE = 16
#: Seconds that a client rests for each region that it announces, or change.
REST = 10e-6
#: Seconds of that which are worth a timer.
LEAST_REST = 0.005
#: Seconds until a notifier is read again that was readable in vain.
VAIN_REST = 0.01

# As many descriptors as the kernel lets a message bring (SCM_MAX_FD, unix(7)). With
# less room it would close the rest, in this thread.
_MOST_DESCRIPTORS = 253
_DESCRIPTOR_SIZE = array.array("i").itemsize
_ROOM = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR_SIZE)
_CREDENTIALS = struct.Struct("iII")
# From Linux 6.16 on: messages may not bring descriptors.
_SO_PASSRIGHTS = 83
# From Linux 6.5 on: the process that has connected, whatever its number means here.
_SO_PEERPIDFD = 77
_RECORDS_AT_ONCE = 256


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


class _LeftError(Exception):
    """A client that has left, or whose memory is gone."""


@attrs.define(eq=False)
class Intake:
    """Lets clients attach, and reads what they report.

    Synchronization: for the event loop's thread only.
    """

    tracking: Tracking
    log: Log
    max_clients: int = 256
    delivered: Callable[[float], None] = lambda _seconds: None
    """Told how long the outputs took for what one read gave."""
    refused: Counter[str] = attrs.field(factory=Counter)
    """How many clients were sent away, by the kind of reason."""
    rests: anyio.Lock = attrs.field(factory=anyio.Lock)
    """Held by the client that rests."""
    _connections: int = 0
    _closer: Closer = attrs.field(factory=Closer)
    _users: UserNames = attrs.field(factory=UserNames)
    _drain_until: float | None = None
    _complain_at: float = 0.0

    async def serve(self, listener: socket.socket) -> None:
        """Take clients in until cancelled; then, each is read a last time."""
        listener.setblocking(False)
        async with anyio.create_task_group() as tasks:
            while True:
                connection = await self._accept(listener)
                tasks.start_soon(self._attend, connection)
                # What is readable all the time cannot be cancelled otherwise.
                await anyio.lowlevel.checkpoint()

    async def _accept(self, listener: socket.socket) -> socket.socket:
        while True:
            await anyio.wait_readable(listener)
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    # Somebody else who has it has shut it down.
                    raise
                if error.errno not in {errno.EAGAIN, errno.ECONNABORTED}:
                    self._complain(f"no client can be accepted: {error.strerror}")
                    await anyio.sleep(ACCEPT_PAUSE)
                await anyio.lowlevel.checkpoint()
                continue
            connection.setblocking(False)
            return connection

    async def _attend(self, connection: socket.socket) -> None:
        """Do everything for one client; what goes wrong does so for this one."""
        self._connections += 1
        try:
            credentials = await self._credentials(connection)
            try:
                await self._attend_to(connection, credentials)
            except _RefusedError as error:
                self.refused[error.kind] += 1
                self.log.refused(credentials, str(error))
                _answer(connection, protocol.Refusal(str(error)))
        except Exception as error:  # noqa: BLE001 - a bug is not an outage for others
            self.refused["internal error"] += 1
            self.log.trouble(f"a client was dropped: {error!r}")
        finally:
            self._connections -= 1
            self._closer.hang_up(connection)

    async def _attend_to(
        self, connection: socket.socket, credentials: Credentials
    ) -> None:
        # Those who have not said hello yet count as well, and have a time limit.
        if self._connections > self.max_clients:
            raise _RefusedError(
                "too many clients", f"at most {self.max_clients} clients at a time"
            )
        visit = _Visit(self, connection)
        with anyio.move_on_after(HELLO_TIMEOUT) as limit:
            hello, device = await visit.receive_hello()
        if limit.cancelled_caught:
            raise _RefusedError("no hello", f"no message within {HELLO_TIMEOUT:g} s")
        client = self.tracking.attach(
            hello.name, hello.backend, credentials, time.time()
        )
        reason = "the daemon ends"
        is_refused = False
        try:
            _answer(connection, protocol.Welcome(client.id))
            reason = await visit.follow(client, device)
        except _RefusedError as error:
            reason, is_refused = str(error), True
            raise
        except Exception as error:
            reason = f"internal error: {error!r}"
            raise
        finally:
            try:
                # What was said after something wrong does not count.
                if not is_refused:
                    await visit.read_the_rest(client, device)
            finally:
                self.tracking.end(client, reason, time.time())
                if device is not None:
                    # Its last close unregisters everything, which takes a while.
                    last = -1
                    with contextlib.suppress(OSError):
                        last = os.dup(device.fileno())
                    device.close()
                    if last >= 0:
                        self._closer.close_own(last)

    def report(self, client: Client, records: Sequence[aioummu.Record]) -> None:
        """Take in what one read of a client's notifier gave."""
        begun = time.perf_counter()
        self.tracking.report(client, records, time.time())
        self.delivered(time.perf_counter() - begun)

    def has_room(self) -> bool:
        """Tell whether all that a message can bring could be received."""
        in_use = DESCRIPTORS * self._connections
        return self._closer.has_room_for(_MOST_DESCRIPTORS, in_use)

    def discard(self, descriptors: Sequence[int]) -> None:
        """Get rid of what a client has sent."""
        self._closer.close(descriptors)

    def drain(self) -> None:
        """Prepare for the end: from now on, reading has a time limit for all."""
        self._drain_until = self.drain_until

    @property
    def drain_until(self) -> float:
        """When to stop reading what a client that ends has left."""
        if self._drain_until is not None:
            return self._drain_until
        return anyio.current_time() + DRAIN_TIME

    def _complain(self, what: str) -> None:
        """Write a line, but not all the time."""
        now = anyio.current_time()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_EVERY
            self.log.trouble(what)

    async def _credentials(self, connection: socket.socket) -> Credentials:
        packed = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        pid, uid, gid = _CREDENTIALS.unpack(packed)
        return Credentials(
            pid, uid, gid, await self._users.name_of(uid), _program_name(pid)
        )


@attrs.define
class _Visit:
    """One connection, and what comes through it."""

    intake: Intake
    connection: socket.socket
    debt: float = 0.0
    buffer: memoryview = attrs.field(
        factory=lambda: memoryview(bytearray(_RECORDS_AT_ONCE * aioummu.RECORD_SIZE))
    )

    async def receive_hello(self) -> tuple[protocol.Hello, aioummu.Device | None]:
        """Return the first message, and what came with it."""
        packet = None
        while packet is None:
            await anyio.wait_readable(self.connection)
            packet = self._receive()
        data, descriptors = packet
        device: aioummu.Device | None = None
        try:
            if not data:
                raise _RefusedError("no hello", "the first message is a hello")
            try:
                hello = protocol.decode_hello(data)
            except protocol.MessageError as error:
                raise _RefusedError("malformed message", str(error)) from error
            wanted = int(hello.backend == "driver")
            if len(descriptors) != wanted:
                raise _RefusedError(
                    "descriptor",
                    f"the hello of a client on the {hello.backend} brings {wanted} "
                    f"descriptors, not {len(descriptors)}",
                )
            if wanted:
                device = _open(descriptors[0])
                descriptors.clear()
        except BaseException:
            self.intake.discard(descriptors)
            raise
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        return hello, device

    async def follow(self, client: Client, device: aioummu.Device | None) -> str:
        """Read all that comes; return why there is no more."""
        errors: list[Exception] = []
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._forever, partial(self._read_packets, client))
                if device is not None:
                    tasks.start_soon(self._read_device, client, device)
                tasks.start_soon(self._see_its_end)
        except* (_LeftError, _RefusedError) as group:
            errors += group.exceptions
        [error, *_] = errors
        if isinstance(error, _RefusedError):
            raise error
        return str(error)

    async def read_the_rest(
        self, client: Client, device: aioummu.Device | None
    ) -> None:
        """Read what was sent before the end, as long as there is time for that."""
        until = self.intake.drain_until
        gone = _LeftError, _RefusedError, aioummu.UmmunotifyError, OSError
        with anyio.CancelScope(shield=True):
            with contextlib.suppress(*gone):
                while await self._read_packets(client, until):
                    pass
            with contextlib.suppress(*gone):
                while anyio.current_time() < until and device is not None:
                    if not self._read_records(client, device):
                        break
                    await anyio.lowlevel.checkpoint()

    def _read_records(self, client: Client, device: aioummu.Device) -> int | None:
        """Take in what one read gives; None: there is nothing, 0: nor will there be."""
        size = device.readinto(self.buffer)
        if size:
            self.intake.report(client, aioummu.unpack(self.buffer[:size]))
        return size

    async def _forever(self, read: Callable[[], Awaitable[int]]) -> None:
        while True:
            await anyio.wait_readable(self.connection)
            await read()
            await anyio.lowlevel.checkpoint()

    async def _see_its_end(self) -> None:
        """See the end of a process whose child keeps the connection open."""
        try:
            fd = self.connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            # An older kernel. Such a child is rare: it was forked without Python.
            return
        try:
            await anyio.wait_readable(fd)
        finally:
            os.close(fd)
        raise _LeftError("its process has ended")

    async def _read_device(self, client: Client, device: aioummu.Device) -> None:
        """Read the reports of the driver."""
        while True:
            await anyio.wait_readable(device)
            # A region is announced before it is registered, and so before this.
            while await self._read_packets(client) == PACKETS_AT_ONCE:
                pass
            size = self._read_records(client, device)
            if size == 0:
                raise _LeftError("its memory is gone")
            # Nothing: somebody else was faster, or lets nobody read.
            rest = VAIN_REST if size is None else REST * size / aioummu.RECORD_SIZE
            await self._rest(rest)

    async def _read_packets(self, client: Client, until: float = math.inf) -> int:
        """Take in what there is, and return how many packets that were."""
        for count in range(PACKETS_AT_ONCE):
            if anyio.current_time() >= until:
                return 0
            packet = self._receive()
            if packet is None:
                return count
            data, descriptors = packet
            if descriptors:
                self.intake.discard(descriptors)
                raise _RefusedError(
                    "descriptor", "a descriptor comes with the first message only"
                )
            if not data:
                raise _LeftError("it has left")
            await self._rest(REST * self._take(client, data))
        return PACKETS_AT_ONCE

    async def _rest(self, seconds: float) -> None:
        """Let others go first; in pieces that a timer can measure."""
        self.debt += seconds
        if self.debt < LEAST_REST:
            await anyio.lowlevel.checkpoint()
        else:
            # One after another: all that send much have half of the time together.
            async with self.intake.rests:
                debt, self.debt = self.debt, 0.0
                await anyio.sleep(debt)

    def _take(self, client: Client, data: bytes) -> int:
        """Take in a packet, and return of how many things it tells."""
        if data[0] != protocol.BRACE:
            if client.backend != "embedded" or len(data) % aioummu.RECORD_SIZE:
                raise _RefusedError(
                    "malformed message", f"neither JSON nor records: {data[:40]!r}"
                )
            records = aioummu.unpack(data)
            self.intake.report(client, records)
            return len(records)
        try:
            update = protocol.decode_update(data)
            self.intake.tracking.update(client, update, time.time())
        except protocol.MessageError as error:
            raise _RefusedError("malformed message", str(error)) from error
        except TooManyRegionsError as error:
            raise _RefusedError("too many regions", str(error)) from error
        return len(update.register) + len(update.unregister)

    def _receive(self) -> tuple[bytes, list[int]] | None:
        """Receive a message with the descriptors it brings; None: there is none now.

        Empty at the end.
        """
        if not self.intake.has_room():
            raise _RefusedError(
                "too many descriptors",
                "clients have sent too many descriptors that cannot be closed, or the "
                "daemon may not have enough of them (LimitNOFILE=)",
            )
        try:
            data, ancillary, flags, _ = self.connection.recvmsg(
                protocol.PACKET_SIZE,
                _ROOM,
                socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return None
        except OSError:
            return b"", []
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % _DESCRIPTOR_SIZE
                descriptors.frombytes(content[:whole])
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            self.intake.discard(descriptors)
            raise _RefusedError(
                "malformed message",
                f"a message has at most {protocol.PACKET_SIZE} bytes",
            )
        return data, descriptors.tolist()


def _open(fd: int) -> aioummu.Device:
    """Return the device; the descriptor is left to the caller if it is none."""
    try:
        return aioummu.Device.from_fd(fd, features=aioummu.Feature.CAUSE)
    except aioummu.DeviceError as error:
        raise _RefusedError("descriptor", error.strerror or str(error)) from error


def _answer(
    connection: socket.socket, answer: protocol.Welcome | protocol.Refusal
) -> None:
    # Who does not listen gets no answer.
    with contextlib.suppress(OSError):
        connection.send(protocol.encode_answer(answer), socket.MSG_DONTWAIT)


def _program_name(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
    except OSError:
        return "?"
    return printable(name) or "?"
