"""Notifiers whose records another process reads, on both backends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import aioummu
from aioummu import (
    HINT,
    INVAL,
    LAST,
    RECORD_SIZE,
    Cause,
    Device,
    EmbeddedDevice,
    SharedDevice,
    open_shared,
)
from tests.memory import MADV_DONTNEED, Pages
from tests.pipe_device import LIMIT, RECORD, PipeDevice, inval, last

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioummu import DeviceLike, Record

BACKENDS: dict[str, Callable[[], Device | EmbeddedDevice]] = {
    "driver": Device,
    "embedded": EmbeddedDevice,
}


@pytest.fixture(
    params=[
        pytest.param("driver", marks=pytest.mark.device),
        pytest.param("embedded", marks=pytest.mark.embedded),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device | EmbeddedDevice]:
    with BACKENDS[request.param]() as device:
        yield device


@pytest.fixture
def embedded() -> Iterator[EmbeddedDevice]:
    with EmbeddedDevice() as device:
        yield device


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(4) as pages:
        yield pages


class Reader:
    """Reads what was shared."""

    def __init__(self, device: DeviceLike) -> None:
        self.device = device
        self.buffer = memoryview(bytearray(1024 * RECORD_SIZE))

    def read(self) -> list[Record] | None:
        """Return what one read gives; None: the end."""
        self.wait()
        size = self.device.readinto(self.buffer)
        return None if size == 0 else aioummu.unpack(self.buffer[: size or 0])

    def read_until(self, generation: int) -> list[Record]:
        """Return the reports up to the LAST with this generation."""
        reports: list[Record] = []
        while True:
            records = self.read()
            assert records is not None, reports
            for record in records:
                if record[0] == INVAL:
                    reports.append(record)
                elif record[4] == generation:
                    return reports

    def read_to_the_end(self) -> None:
        while self.read() is not None:
            pass

    def wait(self) -> None:
        assert select.select([self.device], [], [], LIMIT)[0]


@contextlib.contextmanager
def shared(device: Device | EmbeddedDevice) -> Iterator[Reader]:
    """Read a device of this process as if it were another's."""
    receiver = open_shared(device.share())
    try:
        yield Reader(receiver)
    finally:
        receiver.close()


def numbers_of(records: list[Record]) -> set[int]:
    return {cookie for *_, cookie in records}


# What the other process reads.

READ_IN_ANOTHER_PROCESS = """
import socket, sys, anyio, aioummu

async def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    _, [fd], _, _ = socket.recv_fds(connection, 1, 1)
    device = aioummu.open_shared(fd)
    async with aioummu.open_notifier(device=device) as notifier:
        print("ready", flush=True)
        async for records in notifier.raw_batches():
            for kind, flags, start, end, number in records:
                print(kind, flags, start, end, number, notifier.generation, flush=True)
    print("end", notifier.backend, flush=True)

anyio.run(main)
"""


def test_another_process_reads_what_happens_here(
    device: Device | EmbeddedDevice, pages: Pages
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pages:
        device.register(*pages.page(1), 7)
        command = [sys.executable, "-c", READ_IN_ANOTHER_PROCESS, str(theirs.fileno())]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()]
        ) as process:
            fd = device.share()
            socket.send_fds(ours, [b"\0"], [fd])
            os.close(fd)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            pages.madvise(MADV_DONTNEED, pages.part(0, 4))
            start, end = pages.page(1)
            flags = HINT | Cause.CLEAR.value
            assert process.stdout.readline().split()[:5] == [
                str(n) for n in (INVAL, flags, start, end, 7)
            ]
            assert process.stdout.readline() == f"{LAST} 0 0 0 1 1\n"
            if device.backend == "embedded":
                # The driver's file lives on there, and so does this process.
                device.close()
                assert process.stdout.readline() == "end embedded\n"
            process.kill()


def test_a_reader_that_does_not_read_holds_up_nobody(
    device: Device | EmbeddedDevice,
) -> None:
    changes = 20_000
    with Pages(400) as pages, shared(device) as reader:
        for number in range(400):
            device.register(*pages.page(number), number)
        for change in range(changes):
            pages.madvise(MADV_DONTNEED, pages.part(change % 400, change % 400 + 1))
        assert device.generation == changes
        # They have coalesced, and none is lost.
        reports = reader.read_until(changes)
        assert numbers_of(reports) == set(range(400))
        assert len(reports) < changes / 2
        pages.madvise(MADV_DONTNEED, pages.part(3, 4))
        [(_, flags, *_, number)] = reader.read_until(changes + 1)
        assert (flags & HINT, number) == (HINT, 3)


def test_a_reader_that_is_gone_holds_up_nobody_and_another_can_come(
    device: Device | EmbeddedDevice, pages: Pages
) -> None:
    device.register(pages.start, pages.end, 7)
    with shared(device):
        pages.madvise(MADV_DONTNEED, pages.part(0, 1))
    for _ in range(1000):
        pages.madvise(MADV_DONTNEED, pages.part(1, 2))
    assert device.generation == 1001
    # The embedded backend learns of it a moment later.
    for _ in range(1000):
        with contextlib.suppress(aioummu.DeviceError), shared(device) as reader:
            pages.madvise(MADV_DONTNEED, pages.part(2, 3))
            assert numbers_of(reader.read_until(1002)) == {7}
            return
        select.select([], [], [], 0.01)
    pytest.fail("it cannot be shared again")


def test_unregistered_regions_are_not_reported_any_more(
    device: Device | EmbeddedDevice, pages: Pages
) -> None:
    device.register(*pages.page(0), 1)
    device.register(*pages.page(1), 2)
    with shared(device) as reader:
        device.unregister(1)
        pages.madvise(MADV_DONTNEED, pages.part(0, 2))
        assert numbers_of(reader.read_until(1)) == {2}


@pytest.mark.embedded
def test_closing_is_the_end_for_the_reader(embedded: EmbeddedDevice) -> None:
    with shared(embedded) as reader:
        embedded.close()
        reader.read_to_the_end()


@pytest.mark.embedded
def test_a_forked_child_does_not_keep_the_reader_waiting(
    embedded: EmbeddedDevice,
) -> None:
    with shared(embedded) as reader:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        try:
            embedded.close()
            reader.read_to_the_end()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.embedded
def test_one_reader_at_a_time(embedded: EmbeddedDevice) -> None:
    with shared(embedded), pytest.raises(aioummu.DeviceError) as caught:
        embedded.share()
    assert caught.value.errno == errno.EBUSY


def test_a_closed_device_is_not_shared(device: Device | EmbeddedDevice) -> None:
    device.close()
    with pytest.raises(aioummu.ClosedError):
        device.share()


def test_what_is_shared_is_not_inherited(device: Device | EmbeddedDevice) -> None:
    fd = device.share()
    assert not os.get_inheritable(fd)
    os.close(fd)


# What the other process cannot do to the reader.


def test_blocking_mode_set_by_the_other_does_not_block(
    device: Device | EmbeddedDevice, pages: Pages
) -> None:
    device.register(pages.start, pages.end, 7)
    fd = device.share()
    with contextlib.closing(open_shared(os.dup(fd))) as receiver:
        # The same open file, for both.
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        assert receiver.readinto(bytearray(64 * RECORD_SIZE)) is None
        pages.madvise(MADV_DONTNEED, pages.part(0, 1))
        assert numbers_of(Reader(receiver).read_until(1)) == {7}
        assert receiver.readinto(bytearray(64 * RECORD_SIZE)) is None
    os.close(fd)


def foreign_descriptors() -> dict[str, Callable[[], int]]:
    def listener() -> int:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("")
        listener.listen()
        return listener.detach()

    def pair(kind: int) -> Callable[[], int]:
        def make() -> int:
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            theirs.close()
            return ours.detach()

        return make

    def pipe() -> int:
        receiver, sender = os.pipe()
        os.close(sender)
        return receiver

    return {
        "a file": lambda: os.open(__file__, os.O_RDONLY),
        "a directory": lambda: os.open("/", os.O_RDONLY),
        "a path": lambda: os.open(__file__, os.O_PATH),
        "/dev/null": lambda: os.open("/dev/null", os.O_RDONLY),
        "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
        "a pipe": pipe,
        "memory": lambda: os.memfd_create("memory"),
        "TCP": lambda: socket.socket().detach(),
        "a stream": pair(socket.SOCK_STREAM),
        "datagrams": pair(socket.SOCK_DGRAM),
        "a listener": listener,
    }


@pytest.mark.parametrize("kind", [*foreign_descriptors()])
def test_what_is_no_notifier_is_refused_and_closed(kind: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    fd = foreign_descriptors()[kind]()
    with pytest.raises(aioummu.ForeignDeviceError, match="no notifier's"):
        open_shared(fd)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_closed_descriptor_is_an_error() -> None:
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        open_shared(fd)


@pytest.fixture
def forged() -> Iterator[tuple[SharedDevice, socket.socket]]:
    """What somebody sends who writes the records by hand."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device = open_shared(ours.detach())
    assert isinstance(device, SharedDevice)
    with device, theirs:
        yield device, theirs


def test_the_generation_is_that_of_the_latest_last(
    forged: tuple[SharedDevice, socket.socket],
) -> None:
    device, sender = forged
    assert device.generation == device.page[0] == 0
    sender.send(inval(1, 2, 3) + last(5))
    assert len(Reader(device).read() or []) == 2
    assert device.generation == device.page[0] == 5


@pytest.mark.parametrize("size", [1, 31, 33, 65 * 32 * 64])
def test_what_are_no_records_is_an_error(
    forged: tuple[SharedDevice, socket.socket], size: int
) -> None:
    device, sender = forged
    sender.send(bytes(size))
    with pytest.raises(aioummu.ForeignDeviceError, match="no records"):
        Reader(device).read()


def test_descriptors_among_the_records_are_not_received(
    forged: tuple[SharedDevice, socket.socket],
) -> None:
    device, sender = forged
    before = len(list(Path("/proc/self/fd").iterdir()))
    socket.send_fds(sender, [last(1)], [0, 1, 2])
    with pytest.raises(aioummu.ForeignDeviceError, match="no records"):
        Reader(device).read()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_buffer_smaller_than_a_packet_loses_nothing(
    forged: tuple[SharedDevice, socket.socket],
) -> None:
    device, sender = forged
    sender.send(last(1))
    with pytest.raises(aioummu.InvalidBufferError):
        device.readinto(bytearray(63 * RECORD_SIZE))
    assert device.readinto(bytearray(64 * RECORD_SIZE)) == RECORD.size


def test_only_the_other_process_can_register_its_memory(
    forged: tuple[SharedDevice, socket.socket],
) -> None:
    device, _ = forged
    with pytest.raises(aioummu.UnwatchableRangeError, match="another process"):
        device.register(1, 2, 3)
    for call in (device.unregister, device.spent, device.rearm):
        with pytest.raises(aioummu.DeviceError, match="other process"):
            call(3)
    assert not device.fence()


def test_a_closed_shared_device_is_an_error_of_its_own() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        device = open_shared(ours.detach())
        device.close()
        device.close()
        with pytest.raises(aioummu.ClosedError):
            device.fileno()
        with pytest.raises(aioummu.ClosedError):
            device.readinto(bytearray(64 * RECORD_SIZE))


@pytest.mark.anyio
async def test_a_descriptor_that_is_readable_in_vain_does_not_busy_the_loop() -> None:
    device = PipeDevice()
    async with aioummu.open_notifier(device=device) as notifier:
        region = notifier.register(1, 2)
        device.hiccups = 1 << 30
        device.send(inval(region.cookie, 1, 2) + last(1))
        with anyio.move_on_after(0.5):
            await anext(notifier)
        # Without a pause between them it would be tens of thousands.
        assert device.empty_reads < 500
        device.hiccups = 0
        with anyio.fail_after(LIMIT):
            event = await anext(notifier)
        assert isinstance(event, aioummu.Inval)
