"""Many tasks on one notifier, each waiting for a region of its own."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

import aioummu
from aioummu import Inval, Last
from tests.pipe_device import LIMIT, PipeDevice, drain, inval, last, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

PAGE = 0x1000


def place(cookie: int) -> tuple[int, int]:
    return cookie * 16 * PAGE, (cookie * 16 + 8) * PAGE


def report(cookie: int, *, first: int = 0, pages: int = 1) -> bytes:
    start, _ = place(cookie)
    return inval(cookie, start + first * PAGE, start + (first + pages) * PAGE)


@asynccontextmanager
async def opened(
    readiness: aioummu.ReadinessKind = "poll", count: int = 3
) -> AsyncIterator[tuple[PipeDevice, aioummu.Notifier, list[aioummu.Region]]]:
    device = PipeDevice()
    with anyio.fail_after(LIMIT):
        async with aioummu.open_notifier(
            device=device, readiness=readiness
        ) as notifier:
            regions = [notifier.register(*place(i), cookie=i) for i in range(count)]
            yield device, notifier, regions
    device.end()


async def test_each_waiter_gets_the_events_of_its_region(
    readiness: aioummu.ReadinessKind,
) -> None:
    got: dict[int, Inval] = {}
    async with (
        opened(readiness, 50) as (device, _, regions),
        anyio.create_task_group() as tasks,
    ):

        async def wait(region: aioummu.Region) -> None:
            got[region.cookie] = await region.invalidated()

        for region in regions:
            tasks.start_soon(wait, region)
        await device.until_waited_for()
        for cookie in reversed(range(50)):
            device.send(report(cookie, first=cookie % 8), last(50 - cookie))
            await until(partial(got.__contains__, cookie))
    for cookie, event in got.items():
        start = place(cookie)[0] + cookie % 8 * PAGE
        assert event == Inval(regions[cookie], start, start + PAGE, exact=True)


async def test_all_waiters_of_a_region_get_its_event() -> None:
    got: list[Inval] = []
    async with opened() as (device, _, regions), anyio.create_task_group() as tasks:

        async def wait() -> None:
            got.append(await regions[1].invalidated())

        for _ in range(5):
            tasks.start_soon(wait)
        await device.until_waited_for()
        device.send(report(0), report(1), last(1))
    assert len(got) == 5
    assert {event.region for event in got} == {regions[1]}


async def test_the_iterator_gets_what_others_have_read() -> None:
    async with opened() as (device, notifier, regions):
        device.send(report(1), report(2), last(1))
        event = await regions[2].invalidated()
        assert event.region is regions[2]
        device.send(report(1, first=3), last(2))
        device.send(report(0), last(3))
        await regions[0].invalidated()
        # Of each region one event, and the last word.
        first, second, third, final = [
            await anext(notifier) for _ in range(4)
        ]  # region 2 is among them
        start, end = place(1)
        assert first == Inval(regions[1], start, end, exact=False)
        assert isinstance(second, Inval)
        assert second.region is regions[2]
        assert isinstance(third, Inval)
        assert third.region is regions[0]
        assert final == Last(3)


async def test_waiters_and_the_iterator_wait_at_the_same_time(
    readiness: aioummu.ReadinessKind,
) -> None:
    events: list[aioummu.Event] = []
    waited: list[Inval] = []
    async with (
        opened(readiness) as (device, notifier, regions),
        anyio.create_task_group() as tasks,
    ):

        async def iterate() -> None:
            async for event in notifier:
                events.extend([event])

        async def wait() -> None:
            async for event in regions[1]:
                waited.extend([event])

        tasks.start_soon(iterate)
        tasks.start_soon(wait)
        await device.until_waited_for()
        for number in range(1, 6):
            device.send(report(number % 3), last(number))
            await until(partial(events.__contains__, Last(number)))
        hits = [e.region.cookie for e in events if isinstance(e, Inval)]
        assert hits == [1, 2, 0, 1, 2]
        await until(lambda: len(waited) == 2)
        tasks.cancel_scope.cancel()


async def test_a_cancelled_reader_hands_over(
    readiness: aioummu.ReadinessKind,
) -> None:
    got: list[Inval] = []
    scopes: list[anyio.CancelScope] = []
    async with opened(readiness) as (device, _, regions):
        async with anyio.create_task_group() as tasks:

            async def wait(region: aioummu.Region) -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    got.append(await region.invalidated())

            # The first one reads for all.
            tasks.start_soon(wait, regions[0])
            await device.until_waited_for()
            for region in regions[1:]:
                tasks.start_soon(wait, region)
                await until(partial(region._waiters.__len__))
            for scope in scopes[:2]:
                scope.cancel()
                await until(lambda: sum(len(r._waiters) for r in regions) < 3)
            await until(lambda: sum(len(r._waiters) for r in regions) == 1)
            device.send(report(0), report(1), report(2), last(1))
        assert [event.region for event in got] == [regions[2]]
        # What the others have missed by that is there for them.
        assert (await regions[0].invalidated()).region is regions[0]
        assert (await regions[1].invalidated()).region is regions[1]


async def test_a_waiter_that_is_cancelled_with_its_event_loses_nothing() -> None:
    got: list[aioummu.Region] = []
    async with opened() as (device, notifier, regions):
        async with anyio.create_task_group() as tasks:

            async def wait(region: aioummu.Region) -> None:
                got.append((await region.invalidated()).region)

            tasks.start_soon(wait, regions[1])
            tasks.start_soon(wait, regions[2])
            await device.until_waited_for()
            device.send(report(1), report(2), last(1))
            # Both are told by this, and neither goes on before it is cancelled. An
            # event loop may let it finish all the same.
            assert len(drain(notifier)) == 3
            tasks.cancel_scope.cancel()
        for region in regions[1:]:
            if region not in got:
                assert (await region.invalidated()).region is region


async def test_what_came_while_nobody_waited_is_one_event() -> None:
    async with opened() as (device, notifier, regions):
        device.send(report(1), last(1))
        assert (await regions[1].invalidated()).exact
        device.send(report(1, first=1), last(2), report(1, first=5), last(3))
        drain(notifier)
        start, end = place(1)
        assert await regions[1].invalidated() == Inval(
            regions[1], start, end, exact=False
        )
        # And no more than that.
        with anyio.move_on_after(0.01) as scope:
            await regions[1].invalidated()
        assert scope.cancelled_caught


async def test_what_the_iterator_received_before_anybody_waited_is_told() -> None:
    async with opened() as (device, notifier, regions):
        device.send(report(1), last(1))
        device.set_generation(1)
        assert len(drain(notifier)) == 2
        start, end = place(1)
        assert await regions[1].invalidated() == Inval(
            regions[1], start, end, exact=False
        )


async def test_a_region_that_goes_wakes_its_waiters(
    readiness: aioummu.ReadinessKind,
) -> None:
    errors: list[BaseException] = []
    ended: list[int] = []
    async with opened(readiness) as (device, _, regions):
        async with anyio.create_task_group() as tasks:

            async def wait(region: aioummu.Region) -> None:
                try:
                    await region.invalidated()
                except aioummu.UnknownCookieError as error:
                    errors.append(error)

            async def iterate(region: aioummu.Region) -> None:
                async for _ in region:
                    pass
                ended.append(region.cookie)

            for region in regions:
                tasks.start_soon(wait, region)
                tasks.start_soon(iterate, region)
            await device.until_waited_for()
            regions[0].unregister()
            await until(lambda: len(errors) == 1)
            # From another thread.
            thread = threading.Thread(target=regions[1].unregister)
            thread.start()
            await until(lambda: len(errors) == 2)
            thread.join()
            regions[2].unregister()
        assert len(errors) == 3
        assert sorted(ended) == [0, 1, 2]
        with pytest.raises(aioummu.UnknownCookieError):
            await regions[0].invalidated()


async def test_the_end_of_the_process_ends_all_waiting(
    readiness: aioummu.ReadinessKind,
) -> None:
    ended: list[str] = []
    async with opened(readiness) as (device, notifier, regions):
        async with anyio.create_task_group() as tasks:

            async def wait(region: aioummu.Region) -> None:
                with pytest.raises(aioummu.ProcessGoneError):
                    await region.invalidated()
                ended.append("waiter")

            async def iterate(things: AsyncIterator[object], what: str) -> None:
                async for _ in things:
                    pass
                ended.append(what)

            for region in regions:
                tasks.start_soon(wait, region)
            tasks.start_soon(iterate, regions[0], "region")
            tasks.start_soon(iterate, notifier, "notifier")
            await device.until_waited_for()
            device.end()
        assert sorted(ended) == ["notifier", "region", "waiter", "waiter", "waiter"]


async def test_closing_ends_all_waiting(readiness: aioummu.ReadinessKind) -> None:
    ended = 0
    async with opened(readiness) as (device, notifier, regions):
        async with anyio.create_task_group() as tasks:

            async def wait(region: aioummu.Region) -> None:
                nonlocal ended
                with pytest.raises(aioummu.ClosedError):
                    await region.invalidated()
                ended += 1

            for region in regions:
                tasks.start_soon(wait, region)
            await device.until_waited_for()
            notifier.close()
        assert ended == 3


async def test_unchanged_again_for_programs_that_only_wait_for_regions() -> None:
    async with opened() as (device, notifier, regions):
        device.set_generation(1)
        device.send(report(1), last(1))
        seen = [notifier.changed]
        await regions[1].invalidated()
        seen.append(notifier.changed)
        assert seen == [True, False]
        # For others, it is the iterator that has to have received everything.
        device.set_generation(2)
        device.send(report(2), last(2))
        assert len(drain(notifier)) == 4
        device.set_generation(3)
        device.send(report(1), last(3))
        await regions[1].invalidated()
        seen = [notifier.changed]
        drain(notifier)
        seen.append(notifier.changed)
        assert seen == [True, False]


async def test_two_may_not_iterate_though_many_may_wait() -> None:
    async with (
        opened() as (device, notifier, regions),
        anyio.create_task_group() as tasks,
    ):
        for region in regions:
            tasks.start_soon(region.invalidated)
        await device.until_waited_for()
        tasks.start_soon(anext, notifier)
        await anyio.lowlevel.checkpoint()
        await until(lambda: notifier._receiving)
        with pytest.raises(aioummu.BusyError):
            await anext(notifier)
        tasks.cancel_scope.cancel()


async def test_raw_batches_tell_waiters_as_well() -> None:
    async with opened() as (device, notifier, regions):
        async with anyio.create_task_group() as tasks:
            got: list[Inval] = []

            async def wait() -> None:
                got.append(await regions[1].invalidated())

            async def iterate() -> None:
                async for records in notifier.raw_batches():
                    assert records[-1][0] == aioummu.LAST
                    break

            tasks.start_soon(iterate)
            await device.until_waited_for()
            tasks.start_soon(wait)
            await until(lambda: regions[1]._waiters)
            device.send(report(1), last(1))
        assert [event.region for event in got] == [regions[1]]


async def test_a_thousand_waiters_are_not_woken_for_each_other() -> None:
    got: set[int] = set()
    async with opened(count=1000) as (device, _, regions):
        async with anyio.create_task_group() as tasks:

            async def wait(region: aioummu.Region) -> None:
                await region.invalidated()
                got.add(region.cookie)

            for region in regions:
                tasks.start_soon(wait, region)
            await device.until_waited_for()
            reads = device.reads
            for cookie in range(1, 1000):
                device.send(report(cookie), last(cookie))
                await until(partial(got.__contains__, cookie))
            # One who reads, once for each event and once in vain.
            assert device.reads - reads <= 3 * 1000
            device.send(report(0), last(1000))
        assert len(got) == 1000
