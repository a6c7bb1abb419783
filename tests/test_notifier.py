"""What a notifier does with the records of a device, on every loop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio
import pytest

import aioummu
from aioummu import Inval, Last, Notifier
from tests.pipe_device import LIMIT, PipeDevice, drain, inval, last

if TYPE_CHECKING:
    from aioummu import ReadinessKind

pytestmark = pytest.mark.anyio


async def test_events_come_one_by_one(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        first = notifier.register(0x1000, 0x2000)
        second = notifier.register(0x4000, 0x6000)
        device.send(
            inval(first.cookie, 0x1000, 0x2000),
            inval(second.cookie, 0x4000, 0x6000, exact=False),
            last(2),
        )
        device.end()
        assert [event async for event in notifier] == [
            Inval(first, 0x1000, 0x2000, exact=True),
            Inval(second, 0x4000, 0x6000, exact=False),
            Last(2),
        ]


async def test_batches_are_what_one_read_returned(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        region = notifier.register(0x1000, 0x2000)
        hit = Inval(region, 0x1000, 0x2000, exact=True)
        device.send(inval(region.cookie, 0x1000, 0x2000), last(1))
        batches = notifier.batches()
        assert await anext(batches) == [hit, Last(1)]
        device.send(inval(region.cookie, 0x1000, 0x2000))
        device.end()
        assert [batch async for batch in batches] == [[hit]]


async def test_raw_batches_are_tuples_of_integers(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        device.send(inval(7, 0x1000, 0x2000), last(1))
        device.end()
        assert [batch async for batch in notifier.raw_batches()] == [
            [
                (aioummu.INVAL, aioummu.HINT, 0x1000, 0x2000, 7),
                (aioummu.LAST, 0, 0, 0, 1),
            ]
        ]


async def test_waiting_ends_when_something_comes(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        received = []

        async def consume() -> None:
            async for event in notifier:
                received.append(event)  # noqa: PERF401 - looked at meanwhile

        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consume)
                for generation in range(1, 20):
                    await device.until_waited_for()
                    assert received == [Last(g) for g in range(1, generation)]
                    device.send(last(generation))
                await device.until_waited_for()
                device.end()
        assert received == [Last(g) for g in range(1, 20)]


async def test_iteration_ends_with_the_watched_process(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:

                async def consume() -> None:
                    assert [event async for event in notifier] == []
                    tasks.cancel_scope.cancel()

                tasks.start_soon(consume)
                await device.until_waited_for()
                device.end()
                await anyio.sleep_forever()
        for iterator in (notifier, notifier.batches(), notifier.raw_batches()):
            with pytest.raises(StopAsyncIteration):
                await anext(iterator)
        with pytest.raises(aioummu.ProcessGoneError, match="has ended"):
            notifier.read_nowait()


async def test_read_nowait_returns_what_there_is(
    notifier: Notifier, device: PipeDevice
) -> None:
    assert notifier.read_nowait() == []
    region = notifier.register(0x1000, 0x2000)
    device.send(inval(region.cookie, 0x1000, 0x2000), last(1))
    assert notifier.read_nowait() == [
        Inval(region, 0x1000, 0x2000, exact=True),
        Last(1),
    ]
    assert notifier.read_nowait() == []


async def test_more_than_one_read_takes_comes_in_order(
    notifier: Notifier, device: PipeDevice
) -> None:
    device.send(*(last(generation) for generation in range(1, 1501)))
    device.end()
    assert [event async for event in notifier] == [Last(g) for g in range(1, 1501)]


async def test_ways_of_receiving_can_be_mixed(
    notifier: Notifier, device: PipeDevice
) -> None:
    device.send(*(last(generation) for generation in range(1, 6)))
    assert await anext(notifier) == Last(1)
    assert await anext(notifier) == Last(2)
    assert await anext(notifier.batches()) == [Last(3), Last(4), Last(5)]
    device.send(*(last(generation) for generation in range(6, 9)))
    assert await anext(notifier) == Last(6)
    assert notifier.read_nowait() == [Last(7), Last(8)]
    assert notifier.read_nowait() == []


async def test_raw_batches_begin_with_what_was_received_before(
    notifier: Notifier, device: PipeDevice
) -> None:
    region = notifier.register(0x1000, 0x2000, cookie=7)
    records = [(1, 0, 0, 0, 1), (0, 1, 0x1000, 0x2000, 7), (0, 0, 0x1000, 0x2000, 7)]
    device.send(
        last(1), inval(7, 0x1000, 0x2000), inval(7, 0x1000, 0x2000, exact=False)
    )
    assert await anext(notifier) == Last(1)
    device.send(last(2))
    batches = notifier.raw_batches()
    assert await anext(batches) == records[1:]
    assert await anext(batches) == [(1, 0, 0, 0, 2)]
    assert region.registered


# Unregistered regions never surface.


async def test_unread_report_of_an_unregistered_region_never_surfaces(
    notifier: Notifier, device: PipeDevice
) -> None:
    gone = notifier.register(0x1000, 0x2000)
    stays = notifier.register(0x3000, 0x4000)
    device.send(
        inval(gone.cookie, 0x1000, 0x2000), inval(stays.cookie, 0x3000, 0x4000), last(2)
    )
    gone.unregister()
    device.end()
    assert [event async for event in notifier] == [
        Inval(stays, 0x3000, 0x4000, exact=True),
        Last(2),
    ]


async def test_received_report_of_an_unregistered_region_never_surfaces(
    notifier: Notifier, device: PipeDevice
) -> None:
    gone = notifier.register(0x1000, 0x2000)
    device.send(last(1), inval(gone.cookie, 0x1000, 0x2000), last(2))
    assert await anext(notifier) == Last(1)
    gone.unregister()
    assert await anext(notifier) == Last(2)


@pytest.mark.parametrize("how", ["batch", "nowait"])
async def test_received_report_of_an_unregistered_region_is_in_no_batch(
    notifier: Notifier, device: PipeDevice, how: str
) -> None:
    gone = notifier.register(0x1000, 0x2000)
    device.send(last(1), inval(gone.cookie, 0x1000, 0x2000), last(2))
    assert await anext(notifier) == Last(1)
    gone.unregister()
    if how == "batch":
        assert await anext(notifier.batches()) == [Last(2)]
    else:
        assert notifier.read_nowait() == [Last(2)]


async def test_no_batch_is_empty_because_everything_in_it_was_dropped(
    notifier: Notifier, device: PipeDevice
) -> None:
    gone = notifier.register(0x1000, 0x2000)
    device.send(last(1), inval(gone.cookie, 0x1000, 0x2000))
    assert await anext(notifier) == Last(1)
    gone.unregister()
    device.send(inval(gone.cookie, 0x1000, 0x2000))
    batches = notifier.batches()
    with anyio.move_on_after(0.01):
        pytest.fail(f"received {await anext(batches)}")
    device.send(last(2))
    assert await anext(batches) == [Last(2)]


async def test_received_report_never_surfaces_for_a_successor_with_the_same_cookie(
    notifier: Notifier, device: PipeDevice
) -> None:
    former = notifier.register(0x1000, 0x2000, cookie=5)
    device.send(last(1), inval(5, 0x1000, 0x2000), last(2))
    assert await anext(notifier) == Last(1)
    former.unregister()
    successor = notifier.register(0x1000, 0x2000, cookie=5)
    assert await anext(notifier) == Last(2)
    device.send(inval(5, 0x1000, 0x2000))
    assert await anext(notifier) == Inval(successor, 0x1000, 0x2000, exact=True)


# Generation.


async def test_generation_is_read_from_the_page(
    notifier: Notifier, device: PipeDevice
) -> None:
    for generation in (0, 1, 2**32, 2**64 - 1):
        device.set_generation(generation)
        assert notifier.generation == generation
    assert device.reads == 0


@pytest.mark.parametrize("how", ["single", "batch", "raw", "nowait"])
async def test_changed_until_the_last_is_handed_out(
    notifier: Notifier, device: PipeDevice, how: str
) -> None:
    history = [notifier.changed]
    region = notifier.register(0x1000, 0x2000)
    device.set_generation(1)
    history.append(notifier.changed)
    device.send(inval(region.cookie, 0x1000, 0x2000), last(1))
    match how:
        case "single":
            assert await anext(notifier) == Inval(region, 0x1000, 0x2000, exact=True)
            assert notifier.changed
            assert await anext(notifier) == Last(1)
        case "batch":
            await anext(notifier.batches())
        case "raw":
            await anext(notifier.raw_batches())
        case "nowait":
            drain(notifier)
    history.append(notifier.changed)
    device.set_generation(2)
    history.append(notifier.changed)
    assert history == [False, True, False, True]


async def test_changed_stays_when_the_last_is_of_an_older_generation(
    notifier: Notifier, device: PipeDevice
) -> None:
    device.set_generation(2)
    device.send(last(1))
    assert await anext(notifier) == Last(1)
    assert notifier.changed is True


# Life.


async def test_what_may_be_a_change_is_none_if_the_generation_says_so(
    device: PipeDevice, notifier: Notifier
) -> None:
    notifier.register(0x1000, 0x2000)
    history = []
    for generation in range(1, 4):
        device.stir()  # a change that hits no region
        history.append(notifier.changed)
        device.set_generation(generation)
        device.stir()
        history.append(notifier.changed)
        device.send(last(generation))
        assert drain(notifier) == [Last(generation)]
        history.append(notifier.changed)
    assert history == [False, True, False] * 3


async def test_while_nothing_stirs_nothing_is_asked() -> None:
    class Unasked(PipeDevice):
        asked = 0

        @property
        def generation(self) -> int:
            self.asked += 1
            return 0

        @generation.setter
        def generation(self, _: int) -> None: ...

    device = Unasked()
    with contextlib.closing(Notifier(device)) as notifier:
        device.stir()
        assert [notifier.changed for _ in range(10)] == [False] * 10
        assert [notifier.generation for _ in range(10)] == [0] * 10
    device.end()
    assert device.asked == 1


async def test_a_fence_is_that_of_the_device(
    device: PipeDevice, notifier: Notifier
) -> None:
    assert [notifier.fence(), notifier.fence()] == [True, False]
    assert device.fences == 2
    notifier.close()
    with pytest.raises(aioummu.ClosedError):
        notifier.fence()
    assert device.fences == 2


async def test_open_notifier_closes_what_it_was_given(device: PipeDevice) -> None:
    async with aioummu.open_notifier(device=device):
        assert device.readinto(bytearray(32)) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        device.readinto(bytearray(32))


async def test_everything_is_an_error_after_closing(
    notifier: Notifier, device: PipeDevice
) -> None:
    device.send(last(1), last(2))
    assert await anext(notifier) == Last(1)
    notifier.close()
    for iterator in (notifier, notifier.batches(), notifier.raw_batches()):
        with pytest.raises(aioummu.ClosedError):
            await anext(iterator)
    with pytest.raises(aioummu.ClosedError):
        notifier.read_nowait()
    with pytest.raises(aioummu.ClosedError):
        notifier.register(0x1000, 0x2000)
    with pytest.raises(aioummu.ClosedError):
        notifier.unregister(1)
    with pytest.raises(aioummu.ClosedError):
        _ = notifier.generation
    with pytest.raises(aioummu.ClosedError):
        _ = notifier.changed
    notifier.close()
    await notifier.aclose()


async def test_an_unknown_readiness_is_refused_and_the_device_closed(
    device: PipeDevice,
) -> None:
    with pytest.raises(ValueError, match="'poll' or 'sigio', not 'epoll'"):
        async with aioummu.open_notifier(device=device, readiness="epoll"):  # type: ignore[arg-type]
            pytest.fail("opened")
    with pytest.raises(OSError, match="Bad file descriptor"):
        device.readinto(bytearray(32))


async def test_repr_tells_the_state(notifier: Notifier) -> None:
    notifier.register(0x1000, 0x2000)
    assert repr(notifier).endswith(", 1 regions>")
    notifier.close()
    assert repr(notifier).endswith(", closed>")
