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
from typing import TYPE_CHECKING

import anyio
import pytest

import aioummu
from aioummu import HINT, INVAL, LAST, RECORD_SIZE, Cause, Device, EmbeddedDevice
from tests.memory import MADV_DONTNEED, Pages
from tests.pipe_device import LIMIT, PipeDevice, inval, last

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from aioummu import Record

PACKET = 64 * RECORD_SIZE


@pytest.fixture
def embedded() -> Iterator[EmbeddedDevice]:
    with EmbeddedDevice() as device:
        yield device


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(4) as pages:
        yield pages


class Reader:
    """The other end of a connection to which a device forwards its records."""

    def __init__(self, device: EmbeddedDevice) -> None:
        self.socket, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                device.forward(ours.fileno())
            except BaseException:
                self.socket.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def read(self) -> list[Record]:
        """Return the records of a packet; none: it is the end."""
        assert select.select([self.socket], [], [], LIMIT)[0]
        return aioummu.unpack(self.socket.recv(PACKET + 1))

    def read_until(self, generation: int) -> list[Record]:
        """Return the reports up to the LAST with this generation."""
        reports: list[Record] = []
        while True:
            records = self.read()
            assert records, reports
            for record in records:
                if record[0] == INVAL:
                    reports.append(record)
                elif record[4] == generation:
                    return reports

    def read_to_the_end(self) -> list[Record]:
        records: list[Record] = []
        while more := self.read():
            records += more
        return records


def numbers_of(records: list[Record]) -> set[int]:
    return {cookie for *_, cookie in records}


# The embedded backend: records go through a socket.


@pytest.mark.embedded
def test_another_process_reads_what_happens_here(
    embedded: EmbeddedDevice, pages: Pages
) -> None:
    embedded.register(*pages.page(1), 7)
    with Reader(embedded) as reader:
        pages.madvise(MADV_DONTNEED)
        flags = HINT | Cause.CLEAR.value
        first, last = reader.read()
        assert first == (INVAL, flags, *pages.page(1), 7)
        assert last == (LAST, 0, 0, 0, 1)


@pytest.mark.embedded
def test_a_reader_that_does_not_read_holds_up_nobody(embedded: EmbeddedDevice) -> None:
    changes = 20_000
    with Pages(400) as pages, Reader(embedded) as reader:
        for number in range(400):
            embedded.register(*pages.page(number), number)
        for change in range(changes):
            pages.madvise(MADV_DONTNEED, pages.page(change % 400))
        assert embedded.generation == changes
        # They have coalesced, and none is lost.
        reports = reader.read_until(changes)
        assert numbers_of(reports) == set(range(400))
        assert len(reports) < changes / 2
        pages.madvise(MADV_DONTNEED, pages.page(3))
        [(_, flags, *_, number)] = reader.read_until(changes + 1)
        assert (flags & HINT, number) == (HINT, 3)


@pytest.mark.embedded
def test_a_reader_that_is_gone_holds_up_nobody_and_another_can_come(
    embedded: EmbeddedDevice, pages: Pages
) -> None:
    embedded.register(pages.start, pages.end, 7)
    with Reader(embedded):
        pages.madvise(MADV_DONTNEED)
    for _ in range(1000):
        pages.madvise(MADV_DONTNEED)
    assert embedded.generation == 1001
    # The thread learns of it a moment later.
    for _ in range(1000):
        with contextlib.suppress(aioummu.DeviceError), Reader(embedded) as reader:
            pages.madvise(MADV_DONTNEED)
            assert numbers_of(reader.read_until(1002)) == {7}
            return
        select.select([], [], [], 0.01)
    pytest.fail("nobody can read it any more")


@pytest.mark.embedded
def test_unregistered_regions_are_not_reported_any_more(
    embedded: EmbeddedDevice, pages: Pages
) -> None:
    embedded.register(*pages.page(0), 1)
    embedded.register(*pages.page(1), 2)
    with Reader(embedded) as reader:
        embedded.unregister(1)
        pages.madvise(MADV_DONTNEED)
        assert numbers_of(reader.read_until(1)) == {2}


@pytest.mark.embedded
@pytest.mark.parametrize("regions", [1, 64, 300])
def test_closing_sends_what_is_left_and_ends(regions: int) -> None:
    for _ in range(20):
        with EmbeddedDevice() as device, Pages(regions) as pages:
            for number in range(regions):
                device.register(*pages.page(number), number)
            with Reader(device) as reader:
                for number in range(regions):
                    pages.madvise(MADV_DONTNEED, pages.page(number))
                device.close()
                records = reader.read_to_the_end()
            assert numbers_of(records[:-1]) >= set(range(regions))
            assert records[-1] == (LAST, 0, 0, 0, regions)


@pytest.mark.embedded
def test_a_forked_child_does_not_hide_the_end(embedded: EmbeddedDevice) -> None:
    with Reader(embedded) as reader:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        try:
            embedded.close()
            assert reader.read_to_the_end() == []
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.embedded
def test_one_reader_at_a_time(embedded: EmbeddedDevice) -> None:
    with Reader(embedded), pytest.raises(aioummu.DeviceError) as caught:
        Reader(embedded)
    assert caught.value.errno == errno.EBUSY


@pytest.mark.embedded
def test_records_are_not_written_to_anything_else(embedded: EmbeddedDevice) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(aioummu.DeviceError, match="SOCK_SEQPACKET"):
        embedded.forward(ours.fileno())
    with pytest.raises(aioummu.DeviceError, match="SOCK_SEQPACKET"):
        embedded.forward(1)


@pytest.mark.embedded
def test_a_closed_device_forwards_nothing(embedded: EmbeddedDevice) -> None:
    embedded.close()
    with pytest.raises(aioummu.ClosedError):
        Reader(embedded)


# The driver: the descriptor itself is sent.

READ_IN_ANOTHER_PROCESS = """
import socket, sys, anyio, aioummu

async def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    _, [fd], _, _ = socket.recv_fds(connection, 1, 1)
    device = aioummu.Device.from_fd(fd)
    async with aioummu.open_notifier(device=device) as notifier:
        print("ready", flush=True)
        async for records in notifier.raw_batches():
            for record in records:
                print(*record, notifier.generation, flush=True)
                if record[0]:
                    return

anyio.run(main)
"""


@pytest.mark.device
def test_another_process_reads_the_drivers_descriptor(pages: Pages) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", READ_IN_ANOTHER_PROCESS, str(theirs.fileno())]
    with (
        ours,
        theirs,
        Device() as device,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()]
        ) as process,
    ):
        device.register(*pages.page(1), 7)
        socket.send_fds(ours, [b"\0"], [device.fileno()])
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        pages.madvise(MADV_DONTNEED)
        start, end = pages.page(1)
        expected = INVAL, HINT | Cause.CLEAR.value, start, end, 7
        assert process.stdout.readline().split()[:5] == [str(n) for n in expected]
        assert process.stdout.readline() == f"{LAST} 0 0 0 1 1\n"


@pytest.mark.device
def test_blocking_mode_set_by_the_sender_does_not_block(pages: Pages) -> None:
    with Device() as device, Device.from_fd(os.dup(device.fileno())) as receiver:
        device.register(pages.start, pages.end, 7)
        # The same open file, for both.
        flags = fcntl.fcntl(device.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(device.fileno(), fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        buffer = bytearray(PACKET)
        assert receiver.readinto(buffer) is None
        pages.madvise(MADV_DONTNEED)
        assert receiver.readinto(buffer) == 2 * RECORD_SIZE
        assert receiver.readinto(buffer) is None


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
