"""Readiness through signals: who is woken, and what is left behind."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import pytest

import aioummu
from aioummu import Last
from tests.conftest import LOOPS
from tests.pipe_device import LIMIT, PipeDevice, last, until

if TYPE_CHECKING:
    from types import FrameType

Run: TypeAlias = Callable[[Callable[[], Awaitable[None]]], None]


def run_loop(loop: str, function: Callable[[], Awaitable[None]]) -> None:
    backend, options = LOOPS[loop]

    async def limited() -> None:
        with anyio.fail_after(LIMIT):
            await function()

    anyio.run(limited, backend=backend, backend_options=options)


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["main", "worker"])
def thread(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def run(loop: str, thread: str) -> Run:
    """Run a function in a loop, in the main thread or in another."""
    if thread == "main":
        return lambda function: run_loop(loop, function)

    def run(function: Callable[[], Awaitable[None]]) -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(run_loop, loop, function).result()

    return run


@pytest.fixture
def run_in_worker(loop: str) -> Run:
    def run(function: Callable[[], Awaitable[None]]) -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(run_loop, loop, function).result()

    return run


def has_o_async(device: PipeDevice) -> bool:
    return bool(fcntl.fcntl(device.fileno(), fcntl.F_GETFL) & os.O_ASYNC)


def test_a_signal_wakes_the_waiter(run: Run, device: PipeDevice) -> None:
    async def main() -> None:
        async with aioummu.open_notifier(device=device, readiness="sigio") as notifier:
            for generation in range(1, 20):
                # From another thread, so that the loop may be asleep by then.
                sender = threading.Timer(0.01, device.send, [last(generation)])
                sender.start()
                assert await anext(notifier) == Last(generation)
                sender.join()

    run(main)


def test_o_async_is_set_only_while_a_task_waits(run: Run, device: PipeDevice) -> None:
    async def main() -> None:
        async with aioummu.open_notifier(device=device, readiness="sigio") as notifier:
            history = [has_o_async(device)]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anext, notifier)
                await device.until_waited_for()
                history.append(has_o_async(device))
                device.send(last(1))
            history.append(has_o_async(device))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anext, notifier)
                await device.until_waited_for()
                tasks.cancel_scope.cancel()
            history.append(has_o_async(device))
            assert history == [False, True, False, False]

    run(main)


def test_notifiers_of_one_loop_share_the_signals(run: Run) -> None:
    async def main() -> None:
        devices = [PipeDevice() for _ in range(4)]
        received: list[list[aioummu.Event]] = [[] for _ in devices]

        async def consume(number: int) -> None:
            async with aioummu.open_notifier(
                device=devices[number], readiness="sigio"
            ) as notifier:
                async for event in notifier:
                    received[number].append(event)

        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(consume, number)
            # In an order in which those that receive for all leave first.
            for generation in range(1, 5):
                for number in range(generation - 1, 4):
                    devices[number].send(last(generation))
                waiting = received[generation - 1 :]
                for events in waiting:
                    await until(partial(events.__contains__, Last(generation)))
                devices[generation - 1].end()
        assert received == [[Last(g) for g in range(1, n + 1)] for n in range(1, 5)]

    run(main)


def test_when_the_receiving_waiter_is_cancelled_another_takes_over(run: Run) -> None:
    async def main() -> None:
        first, second = PipeDevice(), PipeDevice()
        scope = anyio.CancelScope()

        async def receive(notifier: aioummu.Notifier) -> None:
            with scope:
                await anext(notifier)

        async with (
            aioummu.open_notifier(device=first, readiness="sigio") as receiving,
            aioummu.open_notifier(device=second, readiness="sigio") as following,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(receive, receiving)
            await first.until_waited_for()
            tasks.start_soon(anext, following)
            await second.until_waited_for()
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            second.send(last(1))
        first.end()
        second.end()

    run(main)


def test_closing_one_notifier_leaves_the_signals_to_the_others(run: Run) -> None:
    async def main() -> None:
        first, second = PipeDevice(), PipeDevice()

        async def wait_until_closed(notifier: aioummu.Notifier) -> None:
            with pytest.raises(aioummu.ClosedError):
                await anext(notifier)

        async with (
            aioummu.open_notifier(device=first, readiness="sigio") as closed,
            aioummu.open_notifier(device=second, readiness="sigio") as stays,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(wait_until_closed, closed)
            await first.until_waited_for()
            tasks.start_soon(anext, stays)
            await second.until_waited_for()
            closed.close()
            await anyio.wait_all_tasks_blocked()
            second.send(last(1))
        first.end()
        second.end()

    run(main)


def test_a_full_queue_of_signals_does_not_lose_the_wake_up(
    run_in_worker: Run, device: PipeDevice
) -> None:
    async def main() -> None:
        async with aioummu.open_notifier(device=device, readiness="sigio") as notifier:
            for generation in range(1, 4):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anext, notifier)
                    await device.until_waited_for()
                    # No real-time signal can be queued: the kernel sends SIGIO.
                    device.send(last(generation))

    limits = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, limits[1]))
    try:
        run_in_worker(main)
    finally:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, limits)


def test_the_handler_of_the_program_is_put_back(loop: str, device: PipeDevice) -> None:
    def handler(_signum: int, _frame: FrameType | None) -> None: ...

    async def main() -> None:
        async with aioummu.open_notifier(device=device, readiness="sigio"):
            assert signal.getsignal(signal.SIGIO) is not handler

    before = signal.signal(signal.SIGIO, handler)
    try:
        run_loop(loop, main)
        assert signal.getsignal(signal.SIGIO) is handler
    finally:
        signal.signal(signal.SIGIO, before)


def test_the_signal_mask_of_the_thread_is_put_back(
    run_in_worker: Run, device: PipeDevice
) -> None:
    def mask() -> set[Any]:
        return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    async def main() -> None:
        before = mask()
        async with aioummu.open_notifier(device=device, readiness="sigio"):
            assert mask() == before | {signal.SIGIO, signal.SIGRTMIN}
        assert mask() == before

    run_in_worker(main)


# O_ASYNC without a handler kills the process.

TEAR_DOWN = """
    import os
    from concurrent.futures import ThreadPoolExecutor

    import anyio
    from anyio.lowlevel import checkpoint

    import aioummu
    from tests.pipe_device import PipeDevice, last
    from tests.test_readiness import run_loop

    async def main():
        device = PipeDevice()
        kept_open = os.dup(device.fileno())
        async with aioummu.open_notifier(device=device, readiness="sigio") as notifier:
            async with anyio.create_task_group() as tasks:
                async def consume():
                    try:
                        await anext(notifier)
                    except aioummu.ClosedError:
                        pass
                tasks.start_soon(consume)
                await device.until_waited_for()
                # The signal is raised, and nobody gets to receive it.
                device.send(last(1))
                if {how!r} == "close":
                    notifier.close()
                else:
                    tasks.cancel_scope.cancel()
        for _ in range(5):
            os.read(kept_open, 32) if {how!r} == "close" else None
            device.send(last(1))
            await checkpoint()

    if {thread!r} == "main":
        run_loop({loop!r}, main)
    else:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(run_loop, {loop!r}, main).result()
    print("alive")
"""


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_tear_down_leaves_no_signal_that_kills_the_process(
    loop: str, thread: str, how: str
) -> None:
    script = textwrap.dedent(TEAR_DOWN).format(loop=loop, thread=thread, how=how)
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (finished.returncode, finished.stdout) == (0, "alive\n"), finished.stderr
