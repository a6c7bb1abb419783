"""What only the embedded backend does: mappings, userfaultfd, one engine for all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

import pytest

import aioummu
from aioummu import (
    Cause,
    EmbeddedDevice,
    Feature,
    Inval,
    InvalidCauseError,
    Last,
    Notifier,
    cause_of,
)
from aioummu._regions import address_range
from tests.memory import MADV_DONTNEED, PAGE, Pages, shmat, shmdt
from tests.operations import kernel
from tests.pipe_device import LIMIT, drain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.embedded


@pytest.fixture
def notifier() -> Iterator[Notifier]:
    notifier = Notifier(EmbeddedDevice())
    yield notifier
    notifier.close()


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(4) as pages:
        yield pages


def registered_mappings() -> list[tuple[int, int]]:
    """Return the mappings that some userfaultfd is registered for."""
    mappings = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in match.groups())
        elif line.startswith("VmFlags:") and {"um", "uw"} & set(line.split()):
            mappings.append((start, end))
    return mappings


def expect_one_report(notifier: Notifier, region: aioummu.Region) -> None:
    [event, end] = drain(notifier)
    assert event == Inval(region, region.start, region.end, exact=True)
    assert end == Last(notifier.generation)


# Mappings.


def test_a_whole_mapping_is_watched_so_that_it_can_grow_and_move(
    notifier: Notifier,
) -> None:
    buffer = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer[:] = b"x" * len(buffer)
    start, _ = address_range(buffer)
    notifier.register(start + 4 * PAGE, start + 5 * PAGE)
    # With a part of it registered, these would fail with EFAULT.
    for count in (8, 4096, 6):
        buffer.resize(count * PAGE)
        assert buffer[: 6 * PAGE] == b"x" * 6 * PAGE
    buffer.close()


def test_a_mapping_that_grows_is_still_watched_to_its_old_end(
    notifier: Notifier, pages: Pages
) -> None:
    pages.munmap(pages.page(3))
    region = notifier.register(*pages.part(0, 3))
    pages.grow(3, 4)
    assert drain(notifier) == []
    tail = notifier.register(*pages.page(3))
    pages.madvise(MADV_DONTNEED)
    hits = {e.region for e in drain(notifier) if isinstance(e, Inval)}
    assert hits == {region, tail}


def test_a_mapping_is_released_after_its_last_region(notifier: Notifier) -> None:
    before = registered_mappings()
    with ExitStack() as stack:
        areas = [stack.enter_context(Pages(1)) for _ in range(200)]
        for area in areas:
            notifier.register(area.start, area.end)
        assert len(registered_mappings()) == len(before) + 200
        for region in list(notifier.regions.values()):
            region.unregister()
        # Some stay, since the next region is likely to be there.
        assert len(registered_mappings()) <= len(before) + 64


def test_nothing_is_registered_any_more_after_the_last_notifier() -> None:
    before = registered_mappings()
    heap = [bytearray(600) for _ in range(100)]
    with ExitStack() as stack:
        areas = [stack.enter_context(Pages(4)) for _ in range(100)]
        notifiers = [Notifier(EmbeddedDevice()) for _ in range(3)]
        for number, area in enumerate(areas):
            notifiers[number % 3].register(area.start, area.end)
            notifiers[number % 3].register(heap[number])
        areas[0].move_to(areas[1], keep=True)
        areas[2].move_to(areas[3])
        areas[2].map_over()
        areas[4].mprotect(mmap.PROT_READ, areas[4].page(1))
        for notifier in notifiers:
            assert len(registered_mappings()) > len(before)
            notifier.close()
        assert registered_mappings() == before


def test_a_mapping_that_was_split_and_changed_is_watched_anew(
    notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end)
    pages.mprotect(mmap.PROT_READ, pages.page(1))
    pages.map_over(pages.page(2))
    drain(notifier)
    assert region.spent
    region.rearm()
    for number in range(4):
        pages.madvise(MADV_DONTNEED, pages.page(number))
        assert drain(notifier)[0] == Inval(region, *pages.page(number), exact=True)


def test_a_region_over_several_mappings_is_watched_in_all(
    notifier: Notifier, pages: Pages
) -> None:
    pages.mprotect(mmap.PROT_READ, pages.page(1))
    region = notifier.register(pages.start, pages.end)
    pages.munmap(pages.page(0))
    pages.munmap(pages.page(1))
    pages.munmap(pages.part(2, 4))
    assert drain(notifier) == [
        Inval(region, region.start, region.end, exact=False),
        Last(3),
    ]


def test_what_lost_its_watch_without_a_word_is_watched_when_registered(
    notifier: Notifier, pages: Pages
) -> None:
    if kernel() < (6, 7):
        pytest.skip("System V shared memory can be watched from Linux 6.7 on")
    # It sends no event, and what is mapped then looks like what was there before.
    notifier.register(pages.start, pages.end).unregister()
    assert shmat(4, over=pages.start) == pages.start
    shmdt(pages.start)
    pages.map_over()
    region = notifier.register(pages.start, pages.end)
    pages.munmap()
    expect_one_report(notifier, region)


def test_mremap_of_length_zero_takes_nothing_away(notifier: Notifier) -> None:
    buffer = mmap.mmap(-1, 4 * PAGE)
    start, end = address_range(buffer)
    region = notifier.register(start, end)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    size, flags = ctypes.c_size_t, ctypes.c_int
    second = libc.mremap(ctypes.c_void_p(start), size(0), size(4 * PAGE), flags(1))
    assert second
    assert second != ctypes.c_void_p(-1).value
    assert drain(notifier) == []
    assert not region.spent
    libc.munmap(ctypes.c_void_p(second), size(4 * PAGE))
    buffer.close()
    expect_one_report(notifier, region)


# What cannot be watched.


def test_a_hole_is_refused_and_named(notifier: Notifier, pages: Pages) -> None:
    pages.munmap(pages.part(1, 3))
    start, end = pages.part(1, 3)
    with pytest.raises(aioummu.UnwatchableRangeError, match=f"{start:#x}-{end:#x}"):
        notifier.register(pages.start, pages.end)
    assert not notifier.regions


def test_memory_of_the_kernel_is_refused_and_named(notifier: Notifier) -> None:
    [line] = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("[vdso]")
    ]
    start, end = (int(number, 16) for number in line.split()[0].split("-"))
    with pytest.raises(aioummu.UnwatchableRangeError, match=r"r-xp \[vdso\]") as caught:
        notifier.register(start, end)
    assert caught.value.errno == errno.EINVAL


def test_a_file_that_may_not_be_written_is_refused(
    notifier: Notifier, tmp_path: Path
) -> None:
    if kernel() < (6, 7):
        pytest.skip("memory of files can be watched from Linux 6.7 on")
    path = tmp_path / "read only"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ)
    with pytest.raises(aioummu.UnwatchableRangeError, match="read only") as caught:
        notifier.register(buffer)
    buffer.close()
    assert caught.value.errno == errno.EPERM


def test_a_file_is_watched_from_6_7_on_and_refused_clearly_before(
    notifier: Notifier,
) -> None:
    # One that surely is in no memory: where tests may write is often tmpfs, which
    # can be watched earlier, or an overlay on it, which looks like something else.
    with Path(sys.executable).open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 4 * PAGE, access=mmap.ACCESS_COPY)
    if kernel() < (6, 7):
        with pytest.raises(aioummu.UnwatchableRangeError, match=r"from Linux 6\.7 on"):
            notifier.register(buffer)
        buffer.close()
        return
    region = notifier.register(buffer)
    buffer.close()
    expect_one_report(notifier, region)


class ForeignUserfaultfd:
    """Somebody else's, for missing pages."""

    API = Struct("=QQQ")
    REGISTER = Struct("=QQQQ")

    def __init__(self, pages: Pages) -> None:
        self.fd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
        assert self.fd >= 0
        fcntl.ioctl(self.fd, 0xC018AA3F, self.API.pack(0xAA, 0, 0))
        argument = self.REGISTER.pack(pages.start, pages.size, 1, 0)
        fcntl.ioctl(self.fd, 0xC020AA00, argument)

    def close(self) -> None:
        os.close(self.fd)


x86_64 = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="numbers of system calls"
)


@x86_64
def test_what_another_userfaultfd_owns_is_refused(
    notifier: Notifier, pages: Pages
) -> None:
    with closing(ForeignUserfaultfd(pages)):
        with pytest.raises(
            aioummu.RangeBusyError, match="another userfaultfd"
        ) as error:
            notifier.register(pages.start, pages.end)
        assert error.value.errno == errno.EBUSY
    region = notifier.register(pages.start, pages.end)
    pages.munmap()
    expect_one_report(notifier, region)


@x86_64
def test_another_userfaultfd_keeps_what_it_owns() -> None:
    before = registered_mappings()
    with (
        Pages(4) as left,
        Pages(4) as theirs,
        Pages(4) as right,
        closing(ForeignUserfaultfd(theirs)),
    ):
        notifier = Notifier(EmbeddedDevice())
        notifier.register(left.start, left.end)
        notifier.register(right.start, right.end)
        notifier.close()
        after = [mapping for mapping in registered_mappings() if mapping not in before]
        assert after == [(theirs.start, theirs.end)]


def test_an_engine_whose_userfaultfd_was_closed_says_so(pages: Pages) -> None:
    with closing(Notifier(EmbeddedDevice())) as notifier:
        region = notifier.register(pages.start, pages.end)
        [fd] = [fd for fd, target in descriptors().items() if "userfaultfd" in target]
        os.close(fd)
        pages.madvise(MADV_DONTNEED)
        while not notifier.changed:
            time.sleep(0.01)
        events = drain(notifier)
        assert events[0] == Inval(region, region.start, region.end, exact=False)
        assert region.spent
        with pytest.raises(aioummu.DeviceError, match="open new ones"):
            notifier.register(pages.start, pages.end)
        with pytest.raises(aioummu.DeviceError, match="open new ones"):
            region.rearm()
    with closing(Notifier(EmbeddedDevice())) as notifier:
        region = notifier.register(pages.start, pages.end)
        pages.madvise(MADV_DONTNEED)
        expect_one_report(notifier, region)


# Filters, one-shot regions, states.


@pytest.fixture
def device() -> Iterator[EmbeddedDevice]:
    with closing(EmbeddedDevice()) as device:
        yield device


def read_all(device: EmbeddedDevice) -> list[aioummu.Record]:
    """Return all records but LAST, which has to be there if any is."""
    buffer = bytearray(64 * aioummu.RECORD_SIZE)
    size = device.readinto(buffer)
    if size is None:
        return []
    *reports, last = aioummu.unpack(memoryview(buffer)[:size])
    assert last == (aioummu.LAST, 0, 0, 0, device.generation)
    return reports


def calm_state(device: EmbeddedDevice, cookie: int) -> int:
    """Return the state once nothing may be being done to the region any more."""
    deadline = time.monotonic() + LIMIT
    while (state := device.state(cookie)) & 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return state


def test_it_can_do_everything_that_features_name(device: EmbeddedDevice) -> None:
    assert device.features == ~Feature(0)


@pytest.mark.parametrize("cause", [Cause.UNMAP, Cause.MOVE])
def test_a_filter_hides_dropped_pages(
    device: EmbeddedDevice, pages: Pages, cause: Cause
) -> None:
    device.register(pages.start, pages.end, 1, causes=cause)
    pages.madvise(MADV_DONTNEED)
    assert read_all(device) == []
    assert device.generation == 0
    assert device.state(1) == 0
    pages.munmap(pages.page(0))
    [(_, flags, start, end, cookie)] = read_all(device)
    assert (cause_of(flags), start, end, cookie) == (Cause.UNMAP, *pages.page(0), 1)


def test_an_unmapping_that_a_filter_hides_is_seen_in_spent_and_state(
    device: EmbeddedDevice, pages: Pages
) -> None:
    device.register(pages.start, pages.end, 1, causes=Cause.CLEAR)
    pages.map_over(pages.page(0))
    assert read_all(device) == []
    assert device.generation == 0
    assert device.spent(1)
    assert device.state(1) == 3
    device.rearm(1)
    assert device.state(1) == 2
    pages.madvise(MADV_DONTNEED, pages.page(0))
    [(_, flags, *_)] = read_all(device)
    assert cause_of(flags) == Cause.CLEAR


@pytest.mark.parametrize(
    "causes", [Cause(0), Cause.FOREIGN, Cause.CLEAR | Cause.FOREIGN]
)
def test_causes_that_nobody_can_ask_for_are_refused(
    device: EmbeddedDevice, pages: Pages, causes: Cause
) -> None:
    with pytest.raises(InvalidCauseError, match="None is for all"):
        device.register(pages.start, pages.end, 1, causes=causes)
    device.register(pages.start, pages.end, 1, causes=~Cause.FOREIGN)


def test_a_region_for_once_ends_with_the_read_of_its_report(
    device: EmbeddedDevice, pages: Pages
) -> None:
    device.register(pages.start, pages.end, 1, once=True)
    device.register(pages.start, pages.end, 2, once=True)
    pages.madvise(MADV_DONTNEED, pages.page(0))
    pages.madvise(MADV_DONTNEED, pages.page(2))
    # Until it is read, it is there, and has one report.
    assert not device.spent(1)
    room = bytearray(aioummu.RECORD_SIZE)
    assert device.readinto(room) == len(room)
    [(_, flags, start, end, cookie)] = aioummu.unpack(room)
    assert (flags & aioummu.HINT, start, end) == (0, pages.start, pages.end)
    assert cookie == 1
    with pytest.raises(aioummu.UnknownCookieError):
        device.unregister(1)
    device.unregister(2)
    assert read_all(device) == []
    device.register(pages.start, pages.end, 1)


def test_a_state_rises_with_every_change_and_never_falls(
    device: EmbeddedDevice, pages: Pages
) -> None:
    device.register(*pages.part(0, 2), 1)
    device.register(*pages.part(2, 4), 2)
    assert device.state(1) == 0
    pages.madvise(MADV_DONTNEED, pages.page(0))
    assert calm_state(device, 1) == 2
    assert len(read_all(device)) == 1
    device.rearm(1)
    assert calm_state(device, 1) == 2
    pages.madvise(MADV_DONTNEED)
    assert calm_state(device, 1) == 4
    pages.map_over(pages.page(0))
    # Nobody watches what is there now.
    assert device.state(1) == 7
    device.rearm(1)
    assert device.state(1) == 6
    assert device.state(2) == 2


def test_the_word_to_watch_moves_with_every_state(
    device: EmbeddedDevice, pages: Pages
) -> None:
    device.register(pages.start, pages.end, 1)
    page, index = device.watch_word(1)
    for number in range(4):
        word, state = page[index], calm_state(device, 1)
        assert page[index] == word
        pages.madvise(MADV_DONTNEED, pages.page(number))
        assert page[index] != word
        assert device.state(1) > state


def test_a_state_of_nothing_is_an_error(device: EmbeddedDevice, pages: Pages) -> None:
    with pytest.raises(aioummu.UnknownCookieError):
        device.state(1)
    device.register(pages.start, pages.end, 1)
    device.close()
    with pytest.raises(aioummu.ClosedError):
        device.state(1)


# One engine for all notifiers.


def descriptors() -> dict[int, str]:
    """Return what is open, but for the folder that is read here."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(path.name)] = str(path.readlink())
    return found


def threads() -> int:
    """Count those of the engine."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(path.read_text().strip())
    return names.count("aioummu")


def expect_threads(number: int) -> None:
    """Wait until there are so many: they name themselves, and linger when joined."""
    until = time.monotonic() + LIMIT
    while threads() != number:
        assert time.monotonic() < until, threads()
        time.sleep(0.001)


def test_there_is_one_thread_while_any_notifier_is_open() -> None:
    before = descriptors()
    expect_threads(0)
    notifiers = [Notifier(EmbeddedDevice()) for _ in range(20)]
    expect_threads(1)
    for notifier in notifiers[1:]:
        notifier.close()
    expect_threads(1)
    notifiers[0].close()
    expect_threads(0)
    assert descriptors() == before


def test_opening_and_closing_leaks_nothing(pages: Pages) -> None:
    def use() -> None:
        notifier = Notifier(EmbeddedDevice())
        notifier.register(pages.start, pages.end)
        pages.madvise(MADV_DONTNEED)
        notifier.close()

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    use()
    before = descriptors(), mappings()
    for _ in range(200):
        use()
    assert descriptors() == before[0]
    assert mappings() <= before[1] + 5


def test_regions_of_many_notifiers_are_hit_by_one_change(pages: Pages) -> None:
    with ExitStack() as stack:
        notifiers = [
            stack.enter_context(closing(Notifier(EmbeddedDevice()))) for _ in range(50)
        ]
        for notifier in notifiers:
            notifier.register(pages.start, pages.end, cookie=7)
        pages.munmap()
        for notifier in notifiers:
            [event, end] = drain(notifier)
            assert isinstance(event, Inval)
            assert event.region is notifier.regions[7]
            assert end == Last(1)


def test_many_regions_are_kept_apart(notifier: Notifier) -> None:
    with Pages(5000) as pages:
        regions = [notifier.register(*pages.page(number)) for number in range(5000)]
        for number in range(0, 5000, 7):
            pages.madvise(MADV_DONTNEED, pages.page(number))
        for region in regions[::5]:
            region.unregister()
        hits = {e.region for e in drain(notifier) if isinstance(e, Inval)}
    assert hits == set(regions[::7]) - set(regions[::5])


def test_too_many_regions_are_refused(pages: Pages) -> None:
    limit = 1 << 20
    with EmbeddedDevice() as device:
        for cookie in range(limit):
            device.register(pages.start, pages.end, cookie)
        with pytest.raises(aioummu.TooManyRegionsError, match="1,048,576") as caught:
            device.register(pages.start, pages.end, limit)
        assert caught.value.errno == errno.ENOSPC


def test_records_are_read_one_by_one_if_the_buffer_is_small(pages: Pages) -> None:
    buffer = bytearray(32)
    with EmbeddedDevice() as device:
        with pytest.raises(aioummu.InvalidBufferError, match="32 bytes"):
            device.readinto(bytearray(31))
        device.register(pages.start, pages.end, 7)
        pages.munmap()
        assert device.readinto(buffer) == 32
        [(kind, flags, *range_, cookie)] = aioummu.unpack(buffer)
        assert (kind, range_, cookie) == (0, [pages.start, pages.end], 7)
        assert flags == aioummu.HINT | aioummu.Cause.UNMAP.value
        assert device.readinto(buffer) == 32
        assert aioummu.unpack(buffer) == [(1, 0, 0, 0, 1)]
        assert device.readinto(buffer) is None


def test_closed_device_says_so(pages: Pages) -> None:
    device = EmbeddedDevice()
    assert repr(device) == f"<EmbeddedDevice fd={device.fileno()}>"
    page = device.page
    device.close()
    device.close()
    assert device.closed
    assert repr(device) == "<EmbeddedDevice closed>"
    uses: list[Callable[[], object]] = [
        device.fileno,
        device.fence,
        lambda: device.generation,
        lambda: device.register(pages.start, pages.end, 1),
        lambda: device.unregister(1),
        lambda: device.spent(1),
        lambda: device.rearm(1),
        lambda: device.readinto(bytearray(32)),
    ]
    for use in uses:
        with pytest.raises(aioummu.ClosedError):
            use()
    with pytest.raises(ValueError, match="released"):
        page[0]


def test_an_unclosed_device_is_closed_with_a_warning() -> None:
    with pytest.warns(ResourceWarning, match="unclosed <EmbeddedDevice"):
        EmbeddedDevice()
    expect_threads(0)
