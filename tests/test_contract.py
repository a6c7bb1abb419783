"""What a backend promises: real changes of mappings, and the exact events.

Run on the embedded backend here, and on the driver in a guest
(``tools/guest.py pytest 6.12 -- --device ...``).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import anyio
import numpy as np
import pytest

import aioummu
from aioummu import Cause, Device, EmbeddedDevice, Inval, Last, Notifier
from aioummu.testing import FakeDevice
from tests import memory
from tests.conftest import LOOPS
from tests.memory import MADV_DONTNEED, PAGE, Pages
from tests.operations import OPERATIONS, NotHereError, documented, kernel
from tests.pipe_device import LIMIT, drain, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from _pytest.mark import ParameterSet

    from aioummu import DeviceLike, Event, ReadinessKind, Region
    from tests.operations import Documented, Range

Open: TypeAlias = Callable[[], "DeviceLike"]


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    return {
        "driver": [pytest.mark.device],
        "embedded": [pytest.mark.embedded],
        "fake": [],
    }[backend]


class ToldDevice(FakeDevice):
    """A fake that tests/memory.py tells what it does."""

    def __init__(self) -> None:
        super().__init__()
        memory.LISTENERS.append(self.invalidating)

    def close(self) -> None:
        with contextlib.suppress(ValueError):
            memory.LISTENERS.remove(self.invalidating)
        super().close()


KERNELS: dict[str, Open] = {"driver": Device, "embedded": EmbeddedDevice}
BACKENDS: dict[str, Open] = {**KERNELS, "fake": ToldDevice}
#: What tests/memory.py tells, or would tell if it were anything.
TOLD = {
    "munmap",
    "munmap of untouched pages",
    "unmapped, mapped again, unmapped",
    "MADV_DONTNEED",
    "MADV_DONTNEED of untouched pages",
    "MADV_FREE",
    "MADV_COLD",
    "MADV_WILLNEED",
    "mprotect",
    "mprotect to nothing",
    "mlock and munlock",
    "first touch",
    "plain reads and writes",
}
real_memory = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=_marks(name)) for name in KERNELS]
)


@pytest.fixture(params=[pytest.param(name, marks=_marks(name)) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def open_device(backend: str) -> Open:
    return BACKENDS[backend]


@pytest.fixture
def notifier(open_device: Open) -> Iterator[Notifier]:
    """A notifier outside of any loop: what was reported is there at once."""
    notifier = Notifier(open_device())
    yield notifier
    notifier.close()


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(4) as pages:
        yield pages


# One operation, and what the documentation says of it.


def test_the_documentation_has_the_operations_that_are_tested() -> None:
    for backend in KERNELS:
        assert list(documented(backend)) == sorted(
            OPERATIONS, key=list(documented(backend)).index
        )


def _rows(*ranges: str) -> list[ParameterSet]:
    """Every operation on every backend, if that is what is documented for it."""
    return [
        pytest.param(backend, name, marks=_marks(backend), id=f"{backend}-{name}")
        for backend in BACKENDS
        for name, cell in _documented(backend).items()
        if cell.range in ranges
    ]


def _documented(backend: str) -> dict[str, Documented]:
    """What the fake is told it does as the driver."""
    if backend != "fake":
        return documented(backend)
    cells = documented("driver").items()
    return {name: cell for name, cell in cells if name in TOLD}


class Done:
    """An operation that was done while a part of its memory was watched."""

    def __init__(
        self, backend: str, name: str, select: Callable[[int, int], list[Range]]
    ) -> None:
        self.documented = _documented(backend)[name]
        if kernel() < self.documented.since:
            pytest.skip(f"from Linux {'.'.join(map(str, self.documented.since))} on")
        self.regions: list[Region] = []
        with contextlib.closing(Notifier(BACKENDS[backend]())) as notifier:

            def watch(start: int, end: int) -> None:
                self.changed = start, end
                self.regions += [notifier.register(*r) for r in select(start, end)]

            try:
                self.changed = OPERATIONS[name](watch) or self.changed
            except NotHereError as error:
                pytest.skip(str(error) or "not on this kernel")
            self.events = drain(notifier)
            self.generation = notifier.generation
            self.spent = [region.spent for region in self.regions]


def _causes(done: Done) -> list[Cause]:
    maybe = done.documented.cause_maybe
    return [event.cause & ~maybe for event in done.events if isinstance(event, Inval)]


@pytest.mark.parametrize(("backend", "name"), _rows("exact range"))
def test_a_change_is_reported_exactly(backend: str, name: str) -> None:
    done = Done(backend, name, lambda start, end: [(start, end)])
    [region] = done.regions
    assert done.events == [Inval(region, *done.changed, exact=True), Last(1)]
    assert done.documented.generation == done.generation == 1
    assert _causes(done) == [done.documented.cause]
    assert done.spent == [done.documented.spent]


@pytest.mark.parametrize(("backend", "name"), _rows("whole region"))
def test_several_changes_are_reported_as_the_whole_region(
    backend: str, name: str
) -> None:
    done = Done(backend, name, lambda start, end: [(start, end)])
    rise = done.documented.generation
    [region] = done.regions
    assert done.events == [
        Inval(region, region.start, region.end, exact=False),
        Last(rise),
    ]
    assert done.generation == rise
    assert _causes(done) == [done.documented.cause]
    assert done.spent == [done.documented.spent]


@pytest.mark.parametrize(("backend", "name"), _rows("nothing"))
def test_what_is_no_change_is_not_reported(backend: str, name: str) -> None:
    done = Done(backend, name, lambda start, end: [(start, end)])
    assert done.events == []
    assert done.generation == 0
    assert done.spent == [False]


@pytest.mark.parametrize(("backend", "name"), _rows("refused"))
def test_what_cannot_be_watched_is_refused(backend: str, name: str) -> None:
    with pytest.raises(aioummu.UnwatchableRangeError, match="map the memory first"):
        Done(backend, name, lambda start, end: [(start, end)])


@pytest.mark.parametrize(("backend", "name"), _rows("exact range"))
def test_a_change_is_clipped_to_the_region(backend: str, name: str) -> None:
    # All of these operations change the second page.
    done = Done(
        backend, name, lambda start, _: [(start + PAGE + 16, start + PAGE + 32)]
    )
    [region] = done.regions
    assert done.events == [
        Inval(region, region.start, region.end, exact=True),
        Last(1),
    ]


@pytest.mark.parametrize(("backend", "name"), _rows("exact range"))
def test_a_change_elsewhere_is_not_reported(backend: str, name: str) -> None:
    done = Done(
        backend,
        name,
        lambda start, end: [(s, s + PAGE) for s in range(start, end, PAGE)],
    )
    start, end = done.changed
    within = {
        region for region in done.regions if start < region.end and region.start < end
    }
    assert {e.region for e in done.events if isinstance(e, Inval)} == within
    assert done.generation == 1
    assert [r for r, spent in zip(done.regions, done.spent, strict=True) if spent] == [
        region for region in done.regions if region in within and done.documented.spent
    ]


@pytest.mark.device
def test_a_fork_and_the_copying_of_a_page_are_reported(pages: Pages) -> None:
    notifier = Notifier(Device())
    region = notifier.register(pages.start, pages.end)
    child, let_it_end = _fork_that_waits()
    assert drain(notifier) == [
        Inval(region, pages.start, pages.end, exact=True),
        Last(1),
    ]
    pages.write(pages.page(2))
    assert drain(notifier) == [Inval(region, *pages.page(2), exact=True), Last(2)]
    let_it_end()
    os.waitpid(child, 0)
    notifier.close()


def _fork_that_waits() -> tuple[int, Callable[[], None]]:
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(sender)
        os.read(receiver, 1)
        os._exit(0)
    os.close(receiver)
    return child, lambda: os.close(sender)


def test_two_changes_make_one_report_of_the_whole_region(
    notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end)
    pages.madvise(MADV_DONTNEED, pages.page(0))
    pages.madvise(MADV_DONTNEED, pages.page(1))
    assert drain(notifier) == [
        Inval(region, pages.start, pages.end, exact=False),
        Last(2),
    ]


def test_one_change_that_hits_two_regions_counts_once(
    notifier: Notifier, pages: Pages
) -> None:
    first = notifier.register(*pages.page(0))
    second = notifier.register(*pages.page(1))
    pages.munmap()
    *hits, end = drain(notifier)
    assert end == Last(1)
    assert sorted(hits, key=_start) == [
        Inval(first, *pages.page(0), exact=True),
        Inval(second, *pages.page(1), exact=True),
    ]


def _start(event: Event) -> int:
    assert isinstance(event, Inval)
    return event.start


def test_a_region_stays_registered_after_a_report(
    notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end)
    for generation in range(1, 4):
        pages.madvise(MADV_DONTNEED)
        assert drain(notifier) == [
            Inval(region, pages.start, pages.end, exact=True),
            Last(generation),
        ]
        assert region.registered


def test_an_address_that_is_mapped_again_is_watched_from_rearm_on(
    notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end)
    for generation in range(1, 4):
        pages.munmap()
        assert drain(notifier) == [
            Inval(region, pages.start, pages.end, exact=True),
            Last(generation),
        ]
        pages.map_over()
        region.rearm()
        assert not region.spent
        assert drain(notifier) == []


def test_a_region_with_nothing_there_stays_spent(
    backend: str, notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end)
    pages.munmap(pages.page(2))
    if backend != "embedded":
        region.rearm()
        assert not region.spent
    else:
        with pytest.raises(aioummu.UnwatchableRangeError, match="nothing is mapped"):
            region.rearm()
        assert region.spent
    region.unregister()
    assert not region.spent
    with pytest.raises(aioummu.UnknownCookieError, match="register it anew"):
        region.rearm()


def test_a_fence_lets_pass_when_nobody_changes_anything(notifier: Notifier) -> None:
    assert notifier.fence()
    assert not notifier.changed


# Real buffers: what Python itself does to memory.


@real_memory
def test_closing_an_mmap_is_reported(notifier: Notifier) -> None:
    buffer = mmap.mmap(-1, 4 * PAGE)
    buffer[:] = b"x" * len(buffer)
    region = notifier.register(buffer)
    buffer.close()
    assert drain(notifier) == [
        Inval(region, region.start, region.end, exact=True),
        Last(notifier.generation),
    ]


# From this size on, malloc() maps a block of its own, whatever was freed before.
LARGE = 40 << 20


@real_memory
def test_freeing_a_numpy_array_is_reported(notifier: Notifier) -> None:
    array = np.empty(LARGE, np.uint8)
    region = notifier.register(array)
    del array
    assert drain(notifier) == [
        Inval(region, region.start, region.end, exact=True),
        Last(notifier.generation),
    ]


@real_memory
def test_growing_a_bytearray_is_reported_when_it_moves(notifier: Notifier) -> None:
    buffer = bytearray(LARGE)
    region = notifier.register(buffer)
    buffer.extend(bytes(LARGE))
    with notifier.register(buffer) as grown:
        moved = grown.start != region.start
    hits = {e.region for e in drain(notifier) if isinstance(e, Inval)}
    assert hits == ({region} if moved else set())


# Cookies and regions.


def test_unregistering_drops_the_pending_report(
    notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end)
    pages.munmap()
    region.unregister()
    # Nobody may wait for ever on a counter that nothing explains.
    assert drain(notifier) == [Last(1)]


def test_a_cookie_is_free_again_and_carries_no_old_report(
    notifier: Notifier, pages: Pages
) -> None:
    former = notifier.register(pages.start, pages.end, cookie=5)
    pages.madvise(MADV_DONTNEED)
    former.unregister()
    successor = notifier.register(pages.start, pages.end, cookie=5)
    assert drain(notifier) == [Last(1)]
    pages.madvise(MADV_DONTNEED)
    assert drain(notifier) == [
        Inval(successor, pages.start, pages.end, exact=True),
        Last(2),
    ]


def test_the_same_range_can_be_registered_twice(
    notifier: Notifier, pages: Pages
) -> None:
    regions = {notifier.register(pages.start, pages.end) for _ in range(2)}
    pages.munmap()
    events = drain(notifier)
    assert {e.region for e in events if isinstance(e, Inval)} == regions
    assert events[-1] == Last(1)


def test_a_cookie_in_use_is_refused(open_device: Open, pages: Pages) -> None:
    device = open_device()
    device.register(*pages.page(0), 2**64 - 1)
    with pytest.raises(aioummu.DuplicateCookieError, match="unregister that one first"):
        device.register(*pages.page(1), 2**64 - 1)
    device.unregister(2**64 - 1)
    device.register(*pages.page(0), 2**64 - 1)
    device.close()


def test_an_unknown_cookie_is_refused(open_device: Open) -> None:
    device = open_device()
    with pytest.raises(aioummu.UnknownCookieError, match="names no region"):
        device.unregister(7)
    device.close()


def test_many_regions_report_in_several_reads(notifier: Notifier) -> None:
    with Pages(300) as pages:
        regions = {
            notifier.register(start, start + PAGE // 8)
            for start in range(pages.start, pages.end, PAGE // 8)
        }
        assert len(regions) == 2400
        pages.munmap()
        events = drain(notifier)
    assert len(events) == 2401
    assert {e.region for e in events if isinstance(e, Inval)} == regions
    assert events[-1] == Last(1)


# Generation.


def test_generation_and_changed_follow_the_reports(
    notifier: Notifier, pages: Pages
) -> None:
    notifier.register(pages.start, pages.end)
    history = [(notifier.generation, notifier.changed)]
    for _ in range(2):
        pages.madvise(MADV_DONTNEED)
        history.append((notifier.generation, notifier.changed))
    drain(notifier)
    history.append((notifier.generation, notifier.changed))
    assert history == [(0, False), (1, True), (2, True), (2, False)]


def test_devices_are_independent(open_device: Open, pages: Pages) -> None:
    first, second = Notifier(open_device()), Notifier(open_device())
    region = first.register(pages.start, pages.end, cookie=5)
    other = second.register(*pages.page(3), cookie=5)
    pages.madvise(MADV_DONTNEED, pages.page(0))
    assert drain(first) == [Inval(region, *pages.page(0), exact=True), Last(1)]
    assert drain(second) == []
    first.close()
    pages.madvise(MADV_DONTNEED, pages.page(3))
    assert drain(second) == [Inval(other, *pages.page(3), exact=True), Last(1)]
    second.close()


# Waiting: each loop, both ways, in the main thread and in another.


@pytest.fixture(params=["main", "worker"])
def run(
    request: pytest.FixtureRequest, loop: str
) -> Callable[[Callable[[], Awaitable[None]]], None]:
    backend, options = LOOPS[loop]

    def run(function: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT):
                await function()

        anyio.run(limited, backend=backend, backend_options=options)

    def run_in_worker(function: Callable[[], Awaitable[None]]) -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(run, function).result()

    return run if request.param == "main" else run_in_worker


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


Run: TypeAlias = "Callable[[Callable[[], Awaitable[None]]], None]"


def test_a_change_by_another_thread_wakes_the_waiter(
    open_device: Open, run: Run, readiness: ReadinessKind, pages: Pages
) -> None:
    async def main() -> None:
        async with aioummu.open_notifier(
            device=open_device(), readiness=readiness
        ) as notifier:
            region = notifier.register(pages.start, pages.end)
            for generation in range(1, 6):
                # Some time later, so that the loop may be asleep by then.
                thread = threading.Timer(0.02, pages.madvise, [MADV_DONTNEED])
                thread.start()
                assert [await anext(notifier), await anext(notifier)] == [
                    Inval(region, pages.start, pages.end, exact=True),
                    Last(generation),
                ]
                thread.join()

    run(main)


def test_a_change_by_another_task_wakes_the_waiter(
    open_device: Open, run: Run, readiness: ReadinessKind, pages: Pages
) -> None:
    async def main() -> None:
        received: list[list[Event]] = []
        async with aioummu.open_notifier(
            device=open_device(), readiness=readiness
        ) as notifier:
            region = notifier.register(pages.start, pages.end)

            async def consume() -> None:
                async for batch in notifier.batches():
                    received.append(batch)
                    if len(received) == 3:
                        return

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                for count in range(3):
                    await anyio.wait_all_tasks_blocked()
                    pages.madvise(MADV_DONTNEED, pages.page(count))
                    await until(partial(received.__getitem__, slice(count, None)))
        assert received == [
            [Inval(region, *pages.page(count), exact=True), Last(count + 1)]
            for count in range(3)
        ]

    run(main)


def test_closing_wakes_the_waiter(
    open_device: Open, run: Run, readiness: ReadinessKind
) -> None:
    async def main() -> None:
        async def wait(notifier: Notifier) -> None:
            with pytest.raises(aioummu.ClosedError):
                await anext(notifier)

        async with (
            aioummu.open_notifier(
                device=open_device(), readiness=readiness
            ) as notifier,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(wait, notifier)
            await anyio.wait_all_tasks_blocked()
            notifier.close()

    run(main)


def test_cancelling_the_waiter_loses_nothing(
    open_device: Open, run: Run, readiness: ReadinessKind, pages: Pages
) -> None:
    async def main() -> None:
        received: list[Event] = []

        async def consume(notifier: Notifier) -> None:
            async for event in notifier:
                received.append(event)

        async with aioummu.open_notifier(
            device=open_device(), readiness=readiness
        ) as notifier:
            region = notifier.register(pages.start, pages.end)
            for steps in range(8):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(consume, notifier)
                    await anyio.wait_all_tasks_blocked()
                    pages.madvise(MADV_DONTNEED)
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
                received += drain(notifier)
            hit = Inval(region, pages.start, pages.end, exact=True)
            expected = [e for count in range(1, 9) for e in (hit, Last(count))]
        assert received == expected

    run(main)


# The driver alone.


@pytest.mark.device
def test_the_device_refuses_to_be_opened_for_writing() -> None:
    for mode in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(OSError, match="Invalid argument") as caught:
            os.open(aioummu.DEFAULT_PATH, mode)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.device
def test_the_device_is_opened_as_the_library_says() -> None:
    with Device() as device:
        fd = device.fileno()
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        assert device.readinto(bytearray(32)) is None
        with pytest.raises(aioummu.InvalidBufferError, match="32 bytes"):
            device.readinto(bytearray(31))
    assert device.closed


@pytest.mark.device
def test_records_are_read_one_by_one_if_the_buffer_is_small(pages: Pages) -> None:
    buffer = bytearray(32)
    with Device() as device:
        device.register(pages.start, pages.end, 7)
        pages.munmap()
        assert device.readinto(buffer) == 32
        flags = aioummu.HINT | Cause.UNMAP.value
        assert aioummu.unpack(buffer) == [(0, flags, pages.start, pages.end, 7)]
        assert device.readinto(buffer) == 32
        assert aioummu.unpack(buffer) == [(1, 0, 0, 0, 1)]
        assert device.readinto(buffer) is None


@pytest.mark.device
def test_too_many_regions_are_refused(notifier_on_driver: Notifier) -> None:
    limit = Path("/sys/module/ummunotify/parameters/max_regions")
    before = limit.read_text()
    limit.write_text("10")
    try:
        regions = [notifier_on_driver.register(PAGE, 2 * PAGE) for _ in range(10)]
        with pytest.raises(aioummu.TooManyRegionsError) as caught:
            notifier_on_driver.register(PAGE, 2 * PAGE)
        assert caught.value.errno == errno.ENOSPC
        regions[0].unregister()
        notifier_on_driver.register(PAGE, 2 * PAGE)
    finally:
        limit.write_text(before)


@pytest.fixture
def notifier_on_driver() -> Iterator[Notifier]:
    notifier = Notifier(Device())
    yield notifier
    notifier.close()


# Another process, which opens the device and sends it here.


class Watched:
    """A process whose memory is watched from here."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._process = os.fork()
        if self._process == 0:
            self._channel.close()
            try:
                self._run(theirs)
            finally:
                os._exit(1)
        theirs.close()
        data, (fd,), _, _ = socket.recv_fds(self._channel, 8, 1)
        self.start = int.from_bytes(data, sys.byteorder)
        self.end = self.start + PAGE
        self.device = Device.from_fd(fd)

    @staticmethod
    def _run(channel: socket.socket) -> None:
        device, pages = Device(), Pages(1)
        address = pages.start.to_bytes(8, sys.byteorder)
        socket.send_fds(channel, [address], [device.fileno()])
        while command := channel.recv(1):
            match command:
                case b"d":
                    pages.madvise(MADV_DONTNEED)
                case b"e":
                    os.execv("/bin/sleep", ["sleep", "1000"])
            channel.send(command)
        os._exit(0)

    def drop_the_page(self) -> None:
        self._channel.send(b"d")
        assert self._channel.recv(1) == b"d"

    def end_by(self, how: str) -> None:
        match how:
            case "exit":
                self._channel.shutdown(socket.SHUT_WR)
            case "exec":
                self._channel.send(b"e")
            case "kill":
                os.kill(self._process, signal.SIGKILL)

    def close(self) -> None:
        self._channel.close()
        self.device.close()
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


@pytest.fixture
def watched() -> Iterator[Watched]:
    with contextlib.closing(Watched()) as watched:
        yield watched


@pytest.mark.device
@pytest.mark.parametrize("how", ["exit", "exec", "kill"])
def test_iteration_ends_with_the_watched_process(
    run: Run, readiness: ReadinessKind, watched: Watched, how: str
) -> None:
    async def main() -> None:
        async with aioummu.open_notifier(
            device=watched.device, readiness=readiness
        ) as notifier:
            region = notifier.register(watched.start, watched.end)
            hit = Inval(region, watched.start, watched.end, exact=True)
            watched.drop_the_page()
            assert drain(notifier) == [hit, Last(1)]
            async with anyio.create_task_group() as tasks:

                async def consume() -> None:
                    events = [event async for event in notifier]
                    assert region in {e.region for e in events if isinstance(e, Inval)}
                    assert events[-1] == Last(notifier.generation)

                tasks.start_soon(consume)
                await anyio.wait_all_tasks_blocked()
                watched.end_by(how)
            with pytest.raises(aioummu.ProcessGoneError):
                notifier.register(watched.start, watched.end)
            with pytest.raises(aioummu.ProcessGoneError):
                notifier.read_nowait()

    run(main)
