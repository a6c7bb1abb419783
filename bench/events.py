"""What receiving events costs, as shares of what is possible in plain Python.

Recorded bytes come out of a pipe: once for a plain loop of os.read() and
struct.iter_unpack(), and through a Notifier in each of its ways. All of them
take turns within one run, so that they meet the same machine; printed are the
medians. Measured is CPU time, since nothing ever waits here, and a busy machine
would interrupt the slower ways more often. The last lines compare the check for
changes with a system call.

Usage: python bench/events.py [--rounds N] [--loops asyncio,uvloop,trio]

Exit status 1 if the asyncio column misses a target.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import statistics
import sys
from struct import Struct
from time import thread_time_ns
from typing import TYPE_CHECKING

import anyio

import aioummu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _typeshed import WriteableBuffer

    from aioummu import Notifier

EVENTS = 16_000
REGIONS = 1_000
READ_SIZE = 1024 * aioummu.RECORD_SIZE
CHECKS = 20_000

#: Shares of the plain loop that are to be reached.
TARGETS = {"raw batches": 0.8, "typed batches": 0.2, "typed single events": 0.15}
#: How many times cheaper than a non-blocking read the check is to be.
CHECK_TARGET = 10

LOOPS: dict[str, tuple[str, dict[str, object]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

RECORD = Struct("=IIQQQ")


class PipeDevice:
    """Records out of a pipe, in place of the driver."""

    def __init__(self) -> None:
        self.receiver, self.sender = os.pipe()
        os.set_blocking(self.receiver, False)
        fcntl.fcntl(self.sender, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.page = memoryview(bytearray(8)).cast("Q")
        self.backend = "pipe"
        # As on both backends: nothing is to be found out from the events.
        self.features = aioummu.Feature.STATE
        self.generation = 0

    def fileno(self) -> int:
        return self.receiver

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: aioummu.Cause | None = None,
        once: bool = False,
    ) -> None:
        pass

    def state(self, cookie: int) -> int | None:  # noqa: ARG002 - DeviceLike
        return 0

    def watch_word(self, cookie: int) -> tuple[aioummu.Page, int]:  # noqa: ARG002
        return self.page, 0

    def unregister(self, cookie: int) -> None:
        pass

    def spent(self, cookie: int) -> bool:
        raise NotImplementedError

    def rearm(self, cookie: int) -> None:
        raise NotImplementedError

    def fence(self) -> bool:
        raise NotImplementedError

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        try:
            return os.readv(self.receiver, (buffer,))
        except BlockingIOError:
            return None

    def close(self) -> None:
        os.close(self.receiver)
        os.close(self.sender)


def recorded() -> bytes:
    """Return the records of EVENTS events: bursts of INVALs, each with its LAST."""
    records = []
    for number in range(1, EVENTS + 1):
        if number % 1000 == 0:
            records.append(RECORD.pack(aioummu.LAST, 0, 0, 0, number))
        else:
            start = 0x7F00_0000_0000 + number * 8192
            cookie = number * 7 % REGIONS + 1
            records.append(
                RECORD.pack(aioummu.INVAL, aioummu.HINT, start, start + 4096, cookie)
            )
    return b"".join(records)


def plain(receiver: int) -> None:
    """Receive EVENTS events as the ceiling does: nothing but read and unpack."""
    left = EVENTS
    while left:
        for _kind, _flags, _start, _end, _value in RECORD.iter_unpack(
            os.read(receiver, READ_SIZE)
        ):
            left -= 1


async def raw_batches(notifier: Notifier) -> None:
    left = EVENTS
    async for batch in notifier.raw_batches():
        for _kind, _flags, _start, _end, _value in batch:
            left -= 1
        if not left:
            return


async def typed_batches(notifier: Notifier) -> None:
    left = EVENTS
    async for batch in notifier.batches():
        for _event in batch:
            left -= 1
        if not left:
            return


async def single_events(notifier: Notifier) -> None:
    left = EVENTS
    async for _event in notifier:
        left -= 1
        if not left:
            return


WAYS: dict[str, Callable[[Notifier], Awaitable[None]]] = {
    "raw batches": raw_batches,
    "typed batches": typed_batches,
    "typed single events": single_events,
}


async def drain_shares(rounds: int) -> dict[str, tuple[float, float]]:
    """Return for each way its ns per event and its share of the plain loop."""
    data = recorded()
    device = PipeDevice()
    times: dict[str, list[int]] = {name: [] for name in ("plain", *WAYS)}
    async with aioummu.open_notifier(device=device) as notifier:
        for number in range(REGIONS):
            start = 0x7F00_0000_0000 + number * 8192
            notifier.register(start, start + 4096)
        for _ in range(rounds):
            os.write(device.sender, data)
            begin = thread_time_ns()
            plain(device.receiver)
            times["plain"].append(thread_time_ns() - begin)
            for name, receive in WAYS.items():
                os.write(device.sender, data)
                begin = thread_time_ns()
                await receive(notifier)
                times[name].append(thread_time_ns() - begin)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        name: (median / EVENTS, medians["plain"] / median)
        for name, median in medians.items()
    }


async def check_costs(rounds: int) -> tuple[float, float, float]:
    """Return ns of: notifier.changed, notifier.generation, an empty os.read()."""
    device = PipeDevice()
    times: tuple[list[float], ...] = ([], [], [])
    async with aioummu.open_notifier(device=device) as notifier:
        for _ in range(rounds):
            begin = thread_time_ns()
            for _ in range(CHECKS):
                notifier.changed  # noqa: B018 - this is what is measured
            times[0].append((thread_time_ns() - begin) / CHECKS)
            begin = thread_time_ns()
            for _ in range(CHECKS):
                notifier.generation  # noqa: B018 - this is what is measured
            times[1].append((thread_time_ns() - begin) / CHECKS)
            begin = thread_time_ns()
            for _ in range(CHECKS):
                try:  # noqa: SIM105 - suppress() would be measured too
                    os.read(device.receiver, 32)
                except BlockingIOError:
                    pass
            times[2].append((thread_time_ns() - begin) / CHECKS)
    changed, generation, read = (statistics.median(each) for each in times)
    return changed, generation, read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--loops", default="asyncio,uvloop,trio")
    arguments = parser.parse_args()
    loops = arguments.loops.split(",")

    shares = {}
    for name in loops:
        backend, options = LOOPS[name]
        shares[name] = anyio.run(
            drain_shares, arguments.rounds, backend=backend, backend_options=options
        )
    missed = 0
    print(f"Python {sys.version.split()[0]}, medians of {arguments.rounds} rounds")
    print(f"{'ns per event (share of plain)':32}", *(f"{n:>16}" for n in loops))
    for way in ("plain", *WAYS):
        cells = (
            f"{ns:8.0f} ({share:5.2f})" for ns, share in (shares[n][way] for n in loops)
        )
        verdict = ""
        if way in TARGETS:
            reached = shares[loops[0]][way][1] >= TARGETS[way]
            missed += not reached
            verdict = f"  {'PASS' if reached else 'MISS'} (target {TARGETS[way]})"
        print(f"{way:32}", *(f"{c:>16}" for c in cells), verdict)

    changed, generation, read = anyio.run(check_costs, arguments.rounds)
    print(f"{'ns per check (times cheaper)':32}")
    print(f"{'os.read(), nothing there':32} {read:7.0f}")
    for label, cost in (
        ("notifier.changed", changed),
        ("notifier.generation", generation),
    ):
        reached = read / cost >= CHECK_TARGET
        missed += not reached
        print(
            f"{label:32} {cost:7.0f} ({read / cost:4.1f})  "
            f"{'PASS' if reached else 'MISS'} (target {CHECK_TARGET})"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
