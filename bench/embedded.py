#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the embedded backend costs, beside the least that userfaultfd(2) costs.

Everybody who watches memory is a process of its own: nobody at all, the engine, a
bare reader (one C thread, a blocking read(2) in a loop and nothing else, with the
same mappings registered in the same way), and the same loop as a Python thread.
They take turns within one run, in an order that rotates, so that all of them meet
the same machine. Printed are medians in nanoseconds, of more than 2,000 changes;
only what takes milliseconds each time has fewer. A ratio is the median of the
rounds' own ratios.

Who unmaps watched memory sleeps until another thread has read the event, so that
the scheduler makes most of the price. Everything is measured with all threads on
one CPU, with the thread that changes mappings on one and all others on another, and
wherever the scheduler puts them. The first two decide whether a target is met. On
one CPU, the thread goes on when the reader sleeps again (it is SCHED_BATCH), so that
the time has everything in it that the reader does. On two CPUs most of it is the
wake-up of the other one, which takes a virtual machine ten times as long as all the
rest. What the scheduler chooses is one of these by chance.

By the number of regions: any of so many pages is changed, so that neither the
engine nor the kernel has it at hand. That is dearer than to change the same page
over and over, whoever watches. What the engine owes to the number of regions is how
much more it grows than the bare reader, who knows of none.

Usage: python bench/embedded.py [--rounds N] [--only SECTION,...]

Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import enum
import functools
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import anyio

import aioummu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from multiprocessing.connection import Connection
    from typing import Self

    from aioummu import Notifier

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "bench"
LIBRARY = CACHE / "embedded_cost.so"
PAGE = 4096

REGIONS = (1, 10, 100, 1_000, 10_000, 100_000)
ROUNDS = 41
#: Samples that a process takes when it is its turn.
TURN = 50
#: Fewer rounds are enough where each sample is made of many changes.
THROUGHPUT_ROUNDS = 7
THROUGHPUT_CHANGES = 2_000
THROUGHPUT_REGIONS = 1_000
CHECKS = 1_000

#: The most that a watched munmap may cost, in units of the bare reader's.
BARE_LIMIT = 1.5
#: The most that it may cost with many regions, in units of that with one.
GROWTH_LIMIT = 1.5
#: The most that memory which is not watched may cost, in units of the plain price.
ELSEWHERE_LIMIT = 1.2
#: How many times cheaper than a non-blocking read a check for changes is to be.
CHECK_TARGET = 10

LOOPS: dict[str, tuple[str, dict[str, object]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

Samples: TypeAlias = dict[str, list[float]]
"""What a process has measured in its turn, by what it is."""


class Watcher(enum.IntEnum):
    """Who watches, as embedded_cost.c numbers it."""

    NOBODY = 0
    ENGINE_ELSEWHERE = 1
    ENGINE = 2
    BARE = 3
    PYTHON_THREAD = 4


class Arrangement(enum.IntEnum):
    """Where the pages lie that are changed, as embedded_cost.c numbers it."""

    ALONE = 0
    ONE_MAPPING = 1
    MANY_MAPPINGS = 2


@dataclass(frozen=True)
class Placement:
    """Which CPUs the thread that changes mappings may use, and which the others."""

    title: str
    changer: frozenset[int]
    others: frozenset[int]
    decides: bool

    def apply(self, changer: int) -> None:
        """Move all threads of this process."""
        for task in (int(path.name) for path in Path("/proc/self/task").iterdir()):
            os.sched_setaffinity(task, self.changer if task == changer else self.others)


def placements() -> list[Placement]:
    allowed = frozenset(os.sched_getaffinity(0))
    one, other = frozenset({min(allowed)}), frozenset({max(allowed)})
    found = [Placement("one CPU", one, one, decides=True)]
    if one != other:
        found += [
            Placement("two CPUs", one, other, decides=True),
            Placement("free", allowed, allowed, decides=False),
        ]
    return found


# ------------------------------------------------------- what is measured ---


class Cost(ctypes.CDLL):
    """What embedded_cost.c offers. No call of it holds the GIL."""

    def __init__(self) -> None:
        super().__init__(str(LIBRARY))
        number, long = ctypes.c_uint, ctypes.c_ulong
        numbers = ctypes.POINTER(ctypes.c_uint64)
        self.cost_start.argtypes = [ctypes.c_int, ctypes.c_int, long, long]
        self.cost_slot.argtypes = [long, ctypes.c_int]
        self.cost_slot.restype = ctypes.c_void_p
        self.cost_munmap.argtypes = [numbers, number]
        self.cost_madvise.argtypes = [numbers, number]
        self.cost_munmap_in_a_row.argtypes = [numbers, numbers, number]
        self.cost_register.argtypes = [numbers, numbers, number]
        self.cost_drop.argtypes = [long, long]
        self.cost_drop.restype = ctypes.c_uint64
        self.cost_obey.argtypes = [long, ctypes.c_int]
        self.cost_changed_at.restype = ctypes.c_uint64

    def start(
        self, watcher: Watcher, arrangement: Arrangement, regions: int = 0
    ) -> int:
        """Map everything; returns the userfaultfd if it is for us to read."""
        limit = int(Path("/proc/sys/vm/max_map_count").read_text("ascii"))
        mappings = min(REGIONS[-1], limit * 9 // 10)
        descriptor: int = self.cost_start(watcher, arrangement, mappings, regions)
        return descriptor

    def slot(self, index: int, *, is_mapped: bool = True) -> int:
        """Return the address of a page, after it has been mapped again if need be."""
        address: int = self.cost_slot(index, is_mapped)
        return address


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


numbers = itertools.count()


def room() -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * TURN)()


def take_munmap(cost: Cost) -> Samples:
    samples = room()
    cost.cost_munmap(samples, 5)
    cost.cost_munmap(samples, TURN)
    return {"munmap": list(samples)}


def take_madvise(cost: Cost) -> Samples:
    samples = room()
    cost.cost_madvise(samples, 5)
    cost.cost_madvise(samples, TURN)
    return {"MADV_DONTNEED": list(samples)}


def take_munmap_in_a_row(cost: Cost) -> Samples:
    samples = room()
    cpu = ctypes.c_uint64()
    cost.cost_munmap_in_a_row(samples, ctypes.byref(cpu), 5)
    cost.cost_munmap_in_a_row(samples, ctypes.byref(cpu), TURN)
    return {
        "munmap, in a row": list(samples),
        "CPU time of all threads": [cpu.value],
    }


def take_registering(cost: Cost) -> Samples:
    registering, unregistering = room(), room()
    cost.cost_register(registering, unregistering, 5)
    cost.cost_register(registering, unregistering, TURN)
    return {"register": list(registering), "unregister": list(unregistering)}


def take_drops(cost: Cost) -> Samples:
    cost.cost_tell()
    length = cost.cost_drop(THROUGHPUT_REGIONS, THROUGHPUT_CHANGES)
    return {"changes": [length / THROUGHPUT_CHANGES]}


IN_C: dict[str, Callable[[Cost], Samples]] = {
    "munmap": take_munmap,
    "madvise": take_madvise,
    "in a row": take_munmap_in_a_row,
    "register": take_registering,
    "drops": take_drops,
}


async def take_latencies(
    notifier: Notifier, cost: Cost, placement: Placement
) -> Samples:
    """Measure from an unmapping to its event, and from a byte in a pipe to it."""
    receiver, sender = os.pipe()
    samples: Samples = {"event": [], "byte": []}
    thread = threading.Thread(target=cost.cost_obey, args=(2 * TURN, sender))
    thread.start()
    placement.apply(thread.native_id or 0)

    def watch_and_tell(index: int) -> aioummu.Region:
        start = cost.slot(index)
        ctypes.memset(start, 1, 1)
        region = notifier.register(start, start + PAGE)
        cost.cost_tell()
        return region

    region = watch_and_tell(0)
    async for event in notifier:
        if isinstance(event, aioummu.Inval):
            samples["event"].append(now() - cost.cost_changed_at())
            continue
        region.unregister()
        cost.cost_tell()
        await anyio.wait_readable(receiver)
        samples["byte"].append(now() - cost.cost_changed_at())
        os.read(receiver, 1)
        done = len(samples["byte"])
        cost.slot(done - 1, is_mapped=False)
        if done == TURN:
            break
        region = watch_and_tell(done)
    thread.join()
    os.close(receiver)
    os.close(sender)
    return samples


async def receive_events(notifier: Notifier, until: int) -> int:
    received = 0
    async for event in notifier:
        if isinstance(event, aioummu.Inval):
            received += 1
        elif event.generation >= until:
            break
    return received


async def receive_batches(notifier: Notifier, until: int) -> int:
    received = 0
    async for batch in notifier.batches():
        received += len(batch)
        last = batch[-1]
        if isinstance(last, aioummu.Last):
            received -= 1
            if last.generation >= until:
                break
    return received


async def take_throughput(
    receive: Callable[[Notifier, int], Awaitable[int]],
    notifier: Notifier,
    cost: Cost,
    placement: Placement,
) -> Samples:
    """Measure ns per event received, and what share of the changes they are."""
    regions = []
    for index in range(THROUGHPUT_REGIONS):
        start = cost.slot(index)
        regions.append(notifier.register(start, start + PAGE))
    until = notifier.generation + THROUGHPUT_CHANGES
    thread = threading.Thread(
        target=cost.cost_drop, args=(THROUGHPUT_REGIONS, THROUGHPUT_CHANGES)
    )
    thread.start()
    placement.apply(thread.native_id or 0)
    begin = now()
    cost.cost_tell()
    received = await receive(notifier, until)
    length = now() - begin
    thread.join()
    for region in regions:
        region.unregister()
    return {
        "events": [length / received],
        "share": [received / THROUGHPUT_CHANGES],
    }


async def take_python_registering(
    notifier: Notifier, cost: Cost, placement: Placement
) -> Samples:
    placement.apply(os.getpid())
    samples: Samples = {"register": [], "unregister": []}
    for _ in range(TURN):
        # Far from the one before, as a cache would have it.
        start = cost.slot(next(numbers) * 997)
        begin = now()
        region = notifier.register(start, start + PAGE)
        middle = now()
        region.unregister()
        samples["unregister"].append(now() - middle)
        samples["register"].append(middle - begin)
    return samples


async def take_checks(notifier: Notifier, _cost: Cost, placement: Placement) -> Samples:
    """Measure the checks for changes while nothing has changed."""
    placement.apply(os.getpid())
    receiver, sender = os.pipe()
    os.set_blocking(receiver, False)
    samples: Samples = {}

    def take(name: str, begin: int) -> None:
        samples[name] = [(time.thread_time_ns() - begin) / CHECKS]

    begin = time.thread_time_ns()
    for _ in range(CHECKS):
        notifier.changed  # noqa: B018 - this is what is measured
    take("notifier.changed", begin)
    begin = time.thread_time_ns()
    for _ in range(CHECKS):
        notifier.generation  # noqa: B018 - this is what is measured
    take("notifier.generation", begin)
    begin = time.thread_time_ns()
    for _ in range(CHECKS):
        notifier.fence()
    take("notifier.fence()", begin)
    begin = time.thread_time_ns()
    for _ in range(CHECKS):
        try:  # noqa: SIM105 - suppress() would be measured too
            os.read(receiver, 32)
        except BlockingIOError:
            pass
    take("os.read(), nothing there", begin)
    os.close(receiver)
    os.close(sender)
    return samples


IN_PYTHON: dict[str, Callable[[Notifier, Cost, Placement], Awaitable[Samples]]] = {
    "latency": take_latencies,
    "events": functools.partial(take_throughput, receive_events),
    "batches": functools.partial(take_throughput, receive_batches),
    "register": take_python_registering,
    "checks": take_checks,
}


# ----------------------------------------------------------- the processes ---


def read_for_ever(descriptor: int) -> None:
    while os.read(descriptor, 32):
        pass


def compute_for_ever() -> None:
    while True:
        pass


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who is measured, in a process that does nothing else."""

    title: str
    watcher: Watcher = Watcher.ENGINE
    arrangement: Arrangement = Arrangement.ALONE
    regions: int = 100
    """Those that are changed, or as many pages that nobody watches."""
    loop: str | None = None
    """The event loop, where it is the library and not the engine that is measured."""
    busy: bool = False
    """Another thread computes in Python all the time."""

    def serve(self, connection: Connection[object, tuple[str, Placement]]) -> None:
        cost = Cost()
        if self.busy:
            threading.Thread(target=compute_for_ever, daemon=True).start()
        if self.loop is not None:
            cost.start(Watcher.NOBODY, self.arrangement)
            backend, options = LOOPS[self.loop]
            anyio.run(
                self._serve_notifier,
                connection,
                cost,
                backend=backend,
                backend_options=options,
            )
            return
        descriptor = cost.start(self.watcher, self.arrangement, self.regions)
        if self.watcher is Watcher.PYTHON_THREAD:
            threading.Thread(
                target=read_for_ever, args=(descriptor,), daemon=True
            ).start()
        if not self.busy:
            cost.cost_be_patient()
        connection.send("ready")
        while True:
            name, placement = connection.recv()
            placement.apply(os.getpid())
            connection.send(IN_C[name](cost))

    async def _serve_notifier(
        self, connection: Connection[object, tuple[str, Placement]], cost: Cost
    ) -> None:
        async with aioummu.open_notifier(backend="embedded") as notifier:
            for number in range(self.regions):
                start = cost.slot(number)
                notifier.register(start, start + PAGE)
            connection.send("ready")
            while True:
                name, placement = connection.recv()
                connection.send(await IN_PYTHON[name](notifier, cost, placement))


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


class Figures:
    """What some contenders have measured, turn by turn."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], list[list[float]]] = {}

    def add(self, title: str, samples: Samples) -> None:
        for what, values in samples.items():
            self._turns.setdefault((title, what), []).append(values)

    def all(self, title: str, what: str) -> list[float]:
        return [value for turn in self._turns[title, what] for value in turn]

    def median(self, title: str, what: str) -> float:
        return statistics.median(self.all(title, what))

    def ratio(self, title: str, what: str, base: str, base_what: str = "") -> float:
        """Return what it is in units of another's, which was measured beside it."""
        mine, others = (
            map(statistics.median, self._turns[key])
            for key in ((title, what), (base, base_what or what))
        )
        return statistics.median(m / o for m, o in zip(mine, others, strict=True))


class Arena:
    """The processes of some contenders, which take turns."""

    def __init__(self, contenders: Iterable[Contender]) -> None:
        self._connections: dict[str, Connection[object, object]] = {}
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._contenders = list(contenders)

    def __enter__(self) -> Self:
        # All of them are forked before anything here has a thread.
        context = multiprocessing.get_context("fork")
        for contender in self._contenders:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=contender.serve, args=(theirs,), daemon=True
            )
            process.start()
            theirs.close()
            self._connections[contender.title] = ours
            self._processes.append(process)
        for title in self._connections:
            self._answer(title)
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def measure(
        self,
        name: str,
        placement: Placement,
        rounds: int,
        titles: Sequence[str] | None = None,
    ) -> Figures:
        figures = Figures()
        order = list(titles or self._connections)
        for _ in range(rounds):
            for title in order:
                self._connections[title].send((name, placement))
                figures.add(title, self._answer(title))
            order.append(order.pop(0))
        return figures

    def _answer(self, title: str) -> Samples:
        try:
            return self._connections[title].recv()  # type: ignore[return-value]
        except EOFError:
            raise SystemExit(f"the process that measures {title!r} has died") from None


# ------------------------------------------------------------- the sections ---


class Report:
    """Prints tables, and remembers whether a target was missed."""

    def __init__(self) -> None:
        self.missed = False

    def head(self, title: str, columns: Iterable[str]) -> None:
        print(f"\n{title:<48}{_cells(columns)}")

    def row(self, title: str, cells: Iterable[str], verdict: str = "") -> None:
        line = f"  {title:<46}{_cells(cells)}  {verdict}"
        print(line.rstrip(), flush=True)

    def judge(self, values: Iterable[float], most: float) -> str:
        """Return what to print behind values that should not be greater."""
        reached = max(values) <= most
        self.missed |= not reached
        return f"<= {most:g} {'reached' if reached else 'MISSED'}"


def _cells(cells: Iterable[str]) -> str:
    cells = list(cells)
    width = 16 if len(cells) <= 3 else 10
    return "".join(f"{cell:>{width}}" for cell in cells)


PLAIN = "not watched, no engine"
ELSEWHERE = "not watched, while the engine runs"
BARE = "a bare reader"
PYTHON_READER = "a Python thread reads"
AIOUMMU = "aioummu"


def judged(report: Report, ratios: dict[Placement, float], most: float | None) -> str:
    if most is None:
        return ""
    return report.judge((r for p, r in ratios.items() if p.decides), most)


def print_changes(
    report: Report, what: str, figures: dict[Placement, Figures], *, limited: bool
) -> None:
    """Print a block: who watches, and where the threads run."""
    report.head(f"{what} (times the bare reader)", (p.title for p in figures))
    rows = (
        (PLAIN, BARE, None),
        (ELSEWHERE, PLAIN, ELSEWHERE_LIMIT if limited else None),
        (BARE, BARE, None),
        (PYTHON_READER, BARE, None),
        (AIOUMMU, BARE, BARE_LIMIT if limited else None),
    )
    for title, base, most in rows:
        cells = (
            f"{f.median(title, what):,.0f} ({f.ratio(title, what, BARE):.2f})"
            for f in figures.values()
        )
        ratios = {p: f.ratio(title, what, base) for p, f in figures.items()}
        verdict = judged(report, ratios, most)
        if most and base != BARE:
            verdict += f" (times the line above: {max(ratios.values()):.2f})"
        report.row(title, cells, verdict)


def changes(report: Report, rounds: int) -> None:
    """One page in a mapping of its own, by who watches."""
    contenders = (
        Contender(title=PLAIN, watcher=Watcher.NOBODY),
        Contender(title=ELSEWHERE, watcher=Watcher.ENGINE_ELSEWHERE),
        Contender(title=BARE, watcher=Watcher.BARE),
        Contender(title=PYTHON_READER, watcher=Watcher.PYTHON_THREAD),
        Contender(title=AIOUMMU),
    )
    with Arena(contenders) as arena:
        for name, whats in (
            ("munmap", ("munmap",)),
            ("in a row", ("munmap, in a row", "CPU time of all threads")),
            ("madvise", ("MADV_DONTNEED",)),
        ):
            figures = {p: arena.measure(name, p, rounds) for p in placements()}
            for what in whats:
                limited = what.startswith("munmap")
                print_changes(report, what, figures, limited=limited)


def busy(report: Report, rounds: int) -> None:
    """Print the same while Python computes: a Python reader waits for the GIL."""
    contenders = (
        Contender(title=PLAIN, watcher=Watcher.NOBODY, busy=True),
        Contender(title=BARE, watcher=Watcher.BARE, busy=True),
        Contender(title=PYTHON_READER, watcher=Watcher.PYTHON_THREAD, busy=True),
        Contender(title=AIOUMMU, busy=True),
    )
    what, placement = "munmap", placements()[-1]
    with Arena(contenders) as arena:
        # A wait for the GIL takes milliseconds.
        figures = arena.measure(what, placement, -(-rounds // 4))
    columns = (f"{placement.title}, median", "99 of 100", "mean")
    report.head("munmap while a Python thread computes", columns)
    for contender in contenders:
        values = figures.all(contender.title, what)
        ratio = figures.ratio(contender.title, what, BARE)
        cells = (
            f"{statistics.median(values):,.0f} ({ratio:.2f})",
            f"{percentile(values, 99):,.0f}",
            f"{statistics.mean(values):,.0f}",
        )
        report.row(contender.title, cells)


def growth(report: Report, rounds: int) -> None:
    """Print what a change of one of many regions costs; the mappings are the same."""
    for arrangement, place in (
        (Arrangement.ONE_MAPPING, "one mapping"),
        (Arrangement.MANY_MAPPINGS, "many mappings"),
    ):
        contenders = (
            Contender(
                title=f"{watcher.name}, {n}",
                watcher=watcher,
                regions=n,
                arrangement=arrangement,
            )
            for watcher in (Watcher.NOBODY, Watcher.BARE, Watcher.ENGINE)
            for n in REGIONS
        )
        report.head(f"regions in {place} (times one)", (f"{n:,}" for n in REGIONS))
        with Arena(contenders) as arena:
            for name, what in (("munmap", "munmap"), ("madvise", "MADV_DONTNEED")):
                for placement in placements():
                    if placement.decides:
                        figures = arena.measure(name, placement, rounds)
                        title = f"{what}, {placement.title}"
                        print_growth(report, title, what, figures)


def print_growth(report: Report, title: str, what: str, figures: Figures) -> None:
    one, *more = REGIONS
    for watcher, name in (
        (Watcher.NOBODY, "not watched"),
        (Watcher.BARE, BARE),
        (Watcher.ENGINE, AIOUMMU),
    ):
        base = f"{watcher.name}, {one}"
        ratios = (figures.ratio(f"{watcher.name}, {n}", what, base) for n in more)
        cells = [f"{figures.median(base, what):,.0f}", *(f"{r:.2f}" for r in ratios)]
        report.row(f"{title}: {name}", cells)
    bare = [
        figures.ratio(f"{Watcher.ENGINE.name}, {n}", what, f"{Watcher.BARE.name}, {n}")
        for n in REGIONS
    ]
    cells = [f"{ratio:.2f}" for ratio in bare]
    verdict = report.judge((ratio / bare[0] for ratio in bare), GROWTH_LIMIT)
    report.row("  times the bare reader", cells, f"the first times {verdict}")


def registering(report: Report, rounds: int) -> None:
    """Print what regions cost, through C and through Python."""
    place = Arrangement.ONE_MAPPING
    in_c = [Contender(title=f"C, {n}", regions=n, arrangement=place) for n in REGIONS]
    in_python = [
        Contender(title=f"Python, {n}", regions=n, arrangement=place, loop="asyncio")
        for n in REGIONS
    ]
    uncovered = [
        Contender(title="bare ioctl", watcher=Watcher.BARE, regions=0),
        Contender(title="in C", regions=0),
        Contender(title="Notifier", regions=0, loop="asyncio"),
    ]
    with Arena([*in_c, *in_python, *uncovered]) as arena:
        figures = arena.measure("register", placements()[0], rounds)
    report.head("in a mapping covered already", (f"{n:,}" for n in REGIONS))
    for title, contenders in (("in C", in_c), ("Notifier", in_python)):
        for what in ("register", "unregister"):
            cells = (f"{figures.median(c.title, what):,.0f}" for c in contenders)
            report.row(f"{what}, {title}", cells)
    report.head("in a mapping not covered yet", (c.title for c in uncovered))
    for what in ("register", "unregister"):
        cells = (f"{figures.median(c.title, what):,.0f}" for c in uncovered)
        report.row(what, cells)


def checks(report: Report, rounds: int) -> None:
    """Has anything changed? Nothing has."""
    read = "os.read(), nothing there"
    contender = Contender(
        title=AIOUMMU,
        regions=1_000,
        arrangement=Arrangement.ONE_MAPPING,
        loop="asyncio",
    )
    with Arena([contender]) as arena:
        figures = arena.measure("checks", placements()[0], rounds)
    report.head("nothing has changed", ["one CPU", "of os.read()"])
    for what, most in (
        (read, None),
        ("notifier.fence()", None),
        ("notifier.generation", None),
        ("notifier.changed", 1 / CHECK_TARGET),
    ):
        share = figures.ratio(AIOUMMU, what, AIOUMMU, read)
        cells = (f"{figures.median(AIOUMMU, what):,.0f}", f"{share:.3f}")
        report.row(what, cells, report.judge([share], most) if most else "")


def latency(report: Report, rounds: int) -> None:
    """From munmap to the event, beside the time that a byte in a pipe takes."""
    contenders = [Contender(title=loop, regions=0, loop=loop) for loop in LOOPS]
    with Arena(contenders) as arena:
        figures = {p: arena.measure("latency", p, rounds) for p in placements()}
    report.head("munmap to event, us: p50 p99", (p.title for p in figures))
    for loop in LOOPS:
        for what in ("byte", "event"):
            name = "a byte in a pipe" if what == "byte" else "event in async for"
            values = (figures[p].all(loop, what) for p in figures)
            cells = (
                f"{percentile(v, 50) / 1000:.1f}  {percentile(v, 99) / 1000:.1f}"
                for v in values
            )
            report.row(f"{loop}, {name}", cells)


def throughput(report: Report, _rounds: int) -> None:
    """Print how many events arrive while a C thread does nothing but change."""
    place = Arrangement.ONE_MAPPING
    contenders = [
        Contender(
            title=BARE,
            watcher=Watcher.BARE,
            regions=THROUGHPUT_REGIONS,
            arrangement=place,
        ),
        *(
            Contender(title=loop, regions=0, arrangement=place, loop=loop)
            for loop in LOOPS
        ),
    ]
    found: dict[str, list[str]] = {}
    with Arena(contenders) as arena:
        for placement in placements():
            figures = arena.measure("drops", placement, THROUGHPUT_ROUNDS, [BARE])
            cell = f"{1e9 / figures.median(BARE, 'changes'):,.0f}"
            found.setdefault(f"{BARE}, changes", []).append(cell)
            for name in ("events", "batches"):
                figures = arena.measure(name, placement, THROUGHPUT_ROUNDS, list(LOOPS))
                for loop in LOOPS:
                    rate = 1e9 / figures.median(loop, "events")
                    share = figures.median(loop, "share")
                    found.setdefault(f"{loop}, {name}", []).append(
                        f"{rate:,.0f} ({share:.2f})"
                    )
    report.head("per second (events of changes)", (p.title for p in placements()))
    for title, cells in found.items():
        report.row(title, cells)


SECTIONS: dict[str, Callable[[Report, int], None]] = {
    "changes": changes,
    "busy": busy,
    "growth": growth,
    "register": registering,
    "checks": checks,
    "latency": latency,
    "throughput": throughput,
}


def build() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    engine = PROJECT / "engine"
    sources = [PROJECT / "bench" / "embedded_cost.c", *sorted(engine.glob("*.c"))]
    # As the extension module is built.
    flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-Wl,-z,now")
    include = PROJECT / "kmod" / "include" / "uapi"
    subprocess.run(
        [
            "cc",
            *flags,
            f"-I{engine}",
            f"-I{include}",
            "-o",
            LIBRARY,
            *sources,
            "-pthread",
        ],
        check=True,
    )


def main() -> int:
    """Measure and print; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default=",".join(SECTIONS))
    arguments = parser.parse_args()
    build()
    report = Report()
    print(f"Embedded backend, ns, medians of {arguments.rounds} rounds of {TURN}")
    for name in arguments.only.split(","):
        SECTIONS[name](report, arguments.rounds)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
