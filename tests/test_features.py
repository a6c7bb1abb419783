"""What a region can ask for, and what it knows about itself, on every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import aioummu
from aioummu import Cause, Feature, Inval, Last, Notifier
from aioummu.testing import FakeDevice
from tests.memory import MADV_DONTNEED, PAGE, Pages
from tests.pipe_device import LIMIT, PipeDevice, drain, inval, last
from tests.test_contract import backend, notifier, open_device, pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioummu import Region

__all__ = ["backend", "notifier", "open_device", "pages"]

ALL = Feature.CAUSE | Feature.FILTER | Feature.STATE | Feature.ONCE


def rearm(region: Region) -> None:
    """Until nothing is being done to the memory: in the embedded backend's view,
    pages can be on their way for a moment longer.
    """
    for _ in range(100 * LIMIT):
        region.rearm()
        if region.valid:
            return
    raise AssertionError(f"{region!r} stays busy")


def test_all_features_are_there(notifier: Notifier) -> None:
    assert notifier.features == ALL


def test_what_a_region_does_not_ask_for_is_no_change(
    notifier: Notifier, pages: Pages
) -> None:
    region = notifier.register(pages.start, pages.end, causes=Cause.UNMAP)
    assert region.causes == Cause.UNMAP
    pages.madvise(MADV_DONTNEED)
    assert drain(notifier) == []
    assert notifier.generation == 0
    assert region.valid
    pages.munmap(pages.page(1))
    event, end = drain(notifier)
    assert event == Inval(region, *pages.page(1), exact=True)
    assert isinstance(event, Inval)
    assert event.cause == Cause.UNMAP
    assert end == Last(1)
    assert not region.valid


def test_each_region_has_causes_of_its_own(notifier: Notifier, pages: Pages) -> None:
    unmap = notifier.register(pages.start, pages.end, causes=Cause.UNMAP | Cause.MOVE)
    clear = notifier.register(pages.start, pages.end, causes=Cause.CLEAR)
    both = notifier.register(pages.start, pages.end)
    pages.madvise(MADV_DONTNEED)
    hits = [e.region for e in drain(notifier) if isinstance(e, Inval)]
    assert set(hits) == {clear, both}
    assert [region.valid for region in (unmap, clear, both)] == [True, False, False]


@pytest.mark.parametrize(
    "causes", [Cause(0), Cause.FOREIGN, Cause.UNMAP | Cause.FOREIGN]
)
def test_causes_that_nobody_can_ask_for_are_refused(
    notifier: Notifier, pages: Pages, causes: Cause
) -> None:
    with pytest.raises(aioummu.InvalidCauseError, match="at least one"):
        notifier.register(pages.start, pages.end, causes=causes)
    assert not notifier.regions


def test_a_one_shot_region_ends_with_its_event(
    notifier: Notifier, pages: Pages
) -> None:
    for generation in range(1, 4):
        region = notifier.register(*pages.page(0), cookie=7, once=True)
        assert region.once
        assert region.valid
        pages.madvise(MADV_DONTNEED)
        assert drain(notifier) == [
            Inval(region, *pages.page(0), exact=True),
            Last(generation),
        ]
        assert [region.registered, region.valid] == [False, False]
        assert not notifier.regions
        pages.madvise(MADV_DONTNEED)
        assert drain(notifier) == []
        region.unregister()


def test_a_one_shot_region_beside_others(notifier: Notifier, pages: Pages) -> None:
    lasting = notifier.register(*pages.page(0))
    once = [notifier.register(*pages.page(1), once=True) for _ in range(20)]
    for _ in range(2):
        pages.madvise(MADV_DONTNEED)
        *hits, _ = drain(notifier)
        regions = {e.region for e in hits if isinstance(e, Inval)}
        assert regions == {lasting, *once}
        once = []
    assert set(notifier.regions.values()) == {lasting}


def test_a_one_shot_region_that_is_unregistered_reports_nothing(
    notifier: Notifier, pages: Pages
) -> None:
    with notifier.register(*pages.page(0), once=True):
        pages.madvise(MADV_DONTNEED)
    assert [e for e in drain(notifier) if isinstance(e, Inval)] == []


def test_a_region_is_valid_until_something_is_done_to_it(
    notifier: Notifier, pages: Pages
) -> None:
    changed = notifier.register(*pages.page(0))
    other = notifier.register(*pages.page(2))
    for _ in range(3):
        assert [changed.valid, other.valid] == [True, True]
        pages.madvise(MADV_DONTNEED, pages.page(0))
        # Before anybody has read the report, and afterwards.
        assert [changed.valid, other.valid] == [False, True]
        drain(notifier)
        assert [changed.valid, other.valid] == [False, True]
        rearm(changed)
    pages.munmap(pages.page(2))
    assert [changed.valid, other.valid] == [True, False]


def test_an_unregistered_region_is_not_valid(notifier: Notifier, pages: Pages) -> None:
    region = notifier.register(*pages.page(0))
    region.unregister()
    assert not region.valid
    again = notifier.register(*pages.page(0))
    assert again.valid
    assert not region.valid
    notifier.close()
    assert not again.valid


def test_many_regions_have_a_state_each(notifier: Notifier, pages: Pages) -> None:
    size = PAGE // 512
    regions = [
        notifier.register(start, start + size)
        for start in range(pages.start, pages.end, size)
    ]
    pages.madvise(MADV_DONTNEED, pages.page(1))
    for region in regions:
        is_hit = pages.page(1)[0] <= region.start < pages.page(1)[1]
        assert region.valid != is_hit
    for region in regions:
        region.unregister()
    assert not any(region.valid for region in regions)


# What a fake can hold up.


@pytest.fixture
def fake() -> Iterator[tuple[FakeDevice, Notifier]]:
    device = FakeDevice()
    notifier = Notifier(device)
    yield device, notifier
    notifier.close()


def test_a_region_is_not_valid_while_it_changes(
    fake: tuple[FakeDevice, Notifier],
) -> None:
    device, notifier = fake
    region = notifier.register(0x1000, 0x3000)
    with device.invalidating(0x1000, 0x2000):
        late = notifier.register(0x1000, 0x2000)
        elsewhere = notifier.register(0x2000, 0x3000)
        region.rearm()
        assert [r.valid for r in (region, late, elsewhere)] == [False, False, True]
    # Nobody knows what they looked at meanwhile.
    assert [r.valid for r in (region, late, elsewhere)] == [False, False, True]
    region.rearm()
    late.rearm()
    assert [r.valid for r in (region, late, elsewhere)] == [True, True, True]


def test_the_end_of_the_process_is_the_end_of_validity(
    fake: tuple[FakeDevice, Notifier],
) -> None:
    device, notifier = fake
    region = notifier.register(0x1000, 0x3000, causes=Cause.MIGRATE)
    device.end_process()
    assert not region.valid
    event, _ = drain_to_end(notifier)
    assert isinstance(event, Inval)
    assert event.cause == Cause.END
    region.rearm()
    assert not region.valid
    with pytest.raises(aioummu.ProcessGoneError):
        notifier.register(0x5000, 0x6000)


def drain_to_end(notifier: Notifier) -> list[aioummu.Event]:
    events = notifier.read_nowait()
    with pytest.raises(aioummu.ProcessGoneError):
        notifier.read_nowait()
    return events


# Devices that have no such features.


def test_without_states_validity_follows_from_what_was_reported() -> None:
    device = PipeDevice()
    notifier = Notifier(device)
    region = notifier.register(0x1000, 0x2000, cookie=1)
    other = notifier.register(0x4000, 0x5000, cookie=2)
    assert [region.valid, other.valid] == [True, True]
    device.set_generation(1)
    # It is not known which of them.
    assert [region.valid, other.valid] == [False, False]
    device.send(inval(1, 0x1000, 0x2000), last(1))
    drain(notifier)
    assert [region.valid, other.valid] == [False, True]
    region.rearm()
    assert [region.valid, other.valid] == [True, True]
    device.set_generation(2)
    device.send(inval(2, 0x4000, 0x5000))
    drain(notifier)
    # There may be more to come.
    assert [region.valid, other.valid] == [False, False]
    device.send(last(2))
    drain(notifier)
    assert [region.valid, other.valid] == [True, False]
    notifier.close()
    device.end()


def test_what_a_device_cannot_do_is_refused() -> None:
    notifier = Notifier(FakeDevice(features=Feature.CAUSE))
    assert notifier.features == Feature.CAUSE
    with pytest.raises(aioummu.UnsupportedFeatureError):
        notifier.register(0x1000, 0x2000, causes=Cause.UNMAP)
    with pytest.raises(aioummu.UnsupportedFeatureError):
        notifier.register(0x1000, 0x2000, once=True)
    assert not notifier.regions
    notifier.close()
