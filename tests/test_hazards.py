"""What asyncinotify, python-evdev or watchfiles got wrong; a test for each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

import aioummu
from aioummu import Inval, Last, Notifier
from tests.pipe_device import LIMIT, PipeDevice, drain, inval, last, until

if TYPE_CHECKING:
    from aioummu import Event, ReadinessKind

on_all_loops = pytest.mark.anyio


# A cancellation that lands after the readiness callback loses the event.


@on_all_loops
@pytest.mark.parametrize("how", ["single", "batch"])
@pytest.mark.parametrize("steps", range(12))
async def test_cancellation_at_any_moment_loses_nothing(
    device: PipeDevice, readiness: ReadinessKind, how: str, steps: int
) -> None:
    received: list[Event] = []
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:

        async def consume() -> None:
            if how == "single":
                async for event in notifier:
                    received.append(event)  # noqa: PERF401 - kept when cancelled
            else:
                async for batch in notifier.batches():
                    received.extend(batch)

        with anyio.fail_after(LIMIT):
            for generation in range(1, 10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(consume)
                    await device.until_waited_for()
                    device.send(last(2 * generation - 1), last(2 * generation))
                    for _ in range(steps):
                        await checkpoint()
                    tasks.cancel_scope.cancel()
        assert received + drain(notifier) == [Last(g) for g in range(1, 19)]


@pytest.mark.asyncio
async def test_cancellation_between_the_readiness_callback_and_the_task_loses_nothing(
    notifier: Notifier, device: PipeDevice
) -> None:
    async def receive() -> Event:
        return await anext(notifier)

    loop = asyncio.get_running_loop()
    task = loop.create_task(receive())
    await device.until_waited_for()
    device.send(last(1))
    # The loop polls, and calls the callback: the task is due, and did not run.
    await until(task._fut_waiter.done)  # type: ignore[attr-defined]
    assert device.reads == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert drain(notifier) == [Last(1)]


@pytest.mark.asyncio
async def test_wait_for_with_a_timeout_loses_nothing(
    notifier: Notifier, device: PipeDevice
) -> None:
    received: list[Event] = []
    sent: list[Event] = []

    def send() -> None:
        sent.append(Last(len(sent)))
        device.send(last(len(sent) - 1))

    for _ in range(200):
        # Both are due at about the same moment, so that either may come first.
        asyncio.get_running_loop().call_later(0.0005, send)
        with contextlib.suppress(TimeoutError):
            received.append(await asyncio.wait_for(anext(notifier), 0.0005))
    assert received + drain(notifier) == sent
    assert sent


# close() while another task iterates hangs that task for ever, and a new fd with
# the same number then never fires.


@on_all_loops
@pytest.mark.parametrize("how", ["single", "batch", "raw"])
async def test_close_wakes_the_waiter_with_the_own_error(
    device: PipeDevice, readiness: ReadinessKind, how: str
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        outcome = None

        async def wait() -> None:
            nonlocal outcome
            try:
                match how:
                    case "single":
                        await anext(notifier)
                    case "batch":
                        await anext(notifier.batches())
                    case _:
                        await anext(notifier.raw_batches())
            except aioummu.ClosedError as error:
                outcome = error

        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await device.until_waited_for()
                notifier.close()
        assert isinstance(outcome, aioummu.ClosedError)


@on_all_loops
async def test_a_new_fd_with_the_number_of_a_closed_one_fires(
    readiness: ReadinessKind,
) -> None:
    with anyio.fail_after(LIMIT):
        numbers = []
        for _ in range(3):
            device = PipeDevice()
            numbers.append(device.fileno())
            async with (
                aioummu.open_notifier(device=device, readiness=readiness) as notifier,
                anyio.create_task_group() as tasks,
            ):

                async def wait(notifier: Notifier = notifier) -> None:
                    assert await anext(notifier) == Last(1)
                    with pytest.raises(aioummu.ClosedError):
                        await anext(notifier)

                tasks.start_soon(wait)
                await device.until_waited_for()
                device.send(last(1))
                await device.until_waited_for()
                notifier.close()
                device.end()
        assert len(set(numbers)) == 1, "the test did not reuse the number"


# A second consumer hangs the first instead of getting an error.


@on_all_loops
async def test_a_second_consumer_gets_an_error_and_the_first_goes_on(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:

                async def first() -> None:
                    assert await anext(notifier) == Last(1)

                tasks.start_soon(first)
                await device.until_waited_for()
                for iterator in (notifier, notifier.batches(), notifier.raw_batches()):
                    with pytest.raises(aioummu.BusyError, match="another task"):
                        await anext(iterator)
                with pytest.raises(aioummu.BusyError):
                    notifier.read_nowait()
                device.send(last(1))


@on_all_loops
async def test_after_a_cancelled_consumer_the_next_is_not_a_second_one(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        with anyio.move_on_after(0.01):
            await anext(notifier)
        device.send(last(1))
        assert await anext(notifier) == Last(1)


# os.read inside a loop callback; a reader added and removed for every batch.


@on_all_loops
async def test_reads_happen_in_the_consumers_task(
    notifier: Notifier, device: PipeDevice
) -> None:
    readers = []
    device.after_read = lambda: readers.append(anyio.get_current_task().id)
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:

            async def consume() -> None:
                assert await anext(notifier) == Last(1)
                assert set(readers) == {anyio.get_current_task().id}

            tasks.start_soon(consume)
            await device.until_waited_for()
            device.send(last(1))


@on_all_loops
async def test_nothing_waits_for_readiness_while_there_is_something_to_read(
    notifier: Notifier, device: PipeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait() -> None:
        pytest.fail("waited")

    monkeypatch.setattr(notifier._readiness, "wait", wait)
    device.send(*(last(generation) for generation in range(2000)))
    device.end()
    assert [event async for event in notifier] == [Last(g) for g in range(2000)]


# One checkpoint for each read: other tasks run, and a full device is not starved.


@on_all_loops
async def test_other_tasks_run_while_there_is_always_something_to_read(
    notifier: Notifier, device: PipeDevice
) -> None:
    device.after_read = lambda: device.send(last(1))
    device.send(last(1))
    ticks = 0
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:

            async def consume() -> None:
                async for _ in notifier:
                    pass

            tasks.start_soon(consume)
            while ticks < 10:
                await checkpoint()
                ticks += 1
            tasks.cancel_scope.cancel()
    assert device.reads <= 2 * ticks + 2


# asyncio is level-triggered and wakes spuriously; trio allows spurious wake-ups.


@on_all_loops
async def test_a_spurious_wake_up_does_no_harm(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    device.hiccups = 5
    device.send(last(1))
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        with anyio.fail_after(LIMIT):
            assert await anext(notifier) == Last(1)
    assert device.reads == 6


# epoll refuses a device without .poll with EPERM.


@on_all_loops
async def test_a_descriptor_that_epoll_refuses_is_a_clear_error(
    device: PipeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryFile() as file:
        monkeypatch.setattr(device, "fileno", file.fileno)
        async with aioummu.open_notifier(device=device) as notifier:
            with pytest.raises(aioummu.ForeignDeviceError, match="cannot be polled"):
                await anext(notifier)


# A record must be looked up among the regions of the moment when it was read.


@on_all_loops
async def test_a_thread_that_reuses_a_cookie_gets_no_report_of_its_predecessor(
    notifier: Notifier, device: PipeDevice
) -> None:
    former = notifier.register(0x1000, 0x2000, cookie=5)

    def reuse() -> None:
        former.unregister()
        notifier.register(0x1000, 0x2000, cookie=5)

    thread = threading.Thread(target=reuse)

    def after_read() -> None:
        # Without a lock, the thread gets through before the records are decoded.
        thread.start()
        thread.join(0.2)

    device.after_read = after_read
    device.send(inval(5, 0x1000, 0x2000), last(1))
    with anyio.fail_after(LIMIT):
        events = [await anext(notifier)]
        thread.join()
        if events != [Last(1)]:
            events.append(await anext(notifier))
    assert events in ([Inval(former, 0x1000, 0x2000, exact=True), Last(1)], [Last(1)])


@on_all_loops
async def test_a_finalizer_that_unregisters_does_not_deadlock(
    notifier: Notifier, device: PipeDevice
) -> None:
    region = notifier.register(0x1000, 0x2000)
    device.after_read = region.unregister
    device.send(inval(region.cookie, 0x1000, 0x2000), last(1))
    assert await anext(notifier) == Last(1)


# Use after fork: the child's copy watches the parent's memory.


@on_all_loops
async def test_a_forked_child_gets_errors_and_does_the_parent_no_harm(
    device: PipeDevice, readiness: ReadinessKind
) -> None:
    async with aioummu.open_notifier(device=device, readiness=readiness) as notifier:
        region = notifier.register(0x1000, 0x2000)
        device.send(last(1), last(2))
        assert await anext(notifier) == Last(1)
        # Now one is read ahead and none is left in the device.
        child = os.fork()
        if child == 0:
            os._exit(0 if _all_refused(notifier, region) else 1)
        _, status = os.waitpid(child, 0)  # noqa: ASYNC222 - it ends at once
        assert os.waitstatus_to_exitcode(status) == 0
        assert region.registered
        assert await anext(notifier) == Last(2)
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:

                async def wait() -> None:
                    assert await anext(notifier) == Last(3)

                tasks.start_soon(wait)
                await device.until_waited_for()
                device.send(last(3))


def _all_refused(notifier: Notifier, region: aioummu.Region) -> bool:
    refused = 0
    for use in (
        notifier.read_nowait,
        lambda: notifier.register(0x1000, 0x2000),
        lambda: notifier.unregister(region.cookie),
        lambda: notifier.generation,
        lambda: notifier.changed,
        lambda: anext(notifier).__await__().__next__(),
        lambda: anext(notifier.batches()).__await__().__next__(),
    ):
        try:
            use()
        except aioummu.ForkedError:
            refused += 1
    was_registered = region.registered
    # What leaving the blocks of the parent does must be harmless.
    region.unregister()
    notifier.close()
    return refused == 7 and not was_registered
