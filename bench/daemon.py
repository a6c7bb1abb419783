#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What it costs to be tracked by memtrackd, and what the daemon itself costs.

slowdown: three crowds of the same clients with the same regions take turns within one
run. Nobody reads the reports of the first, so that they just coalesce; the second is
attached to a live daemon, with all its outputs; the third to a daemon that is stopped
(SIGSTOP). A ratio is the median of the rounds' own ratios, so that whatever else the
machine does meets all three. Measured are

- single calls of madvise(MADV_DONTNEED) and munmap(): the time that they take, and the
  CPU time of the thread;
- a client as a whole: a loop that computes, uses memory, and drops it.

The target is the driver's, which is measured with --guest: on Linux 6.12, with one
CPU whose clock counts instructions (see driver.py). There the time of a whole client
has in it what the daemon does on the same CPU meanwhile; its CPU time decides. A call
"one by one" finds the daemon asleep, each time, and wakes it up: that is dear for one
call, and nothing for a client, because the daemon takes much longer to go to sleep.

With the embedded backend, who changes memory waits for a thread of its own process, so
that the scheduler has most of the say. It is printed, and has no target.

load: all clients change their memory, at a given rate and then as fast as they can.
The daemon writes a JSON log, is scraped every second, has two viewers and a canary.
Then every change is accounted for.

memory: what the daemon grows by for a region.

Usage: python bench/daemon.py [--only SECTION,...] [--guest]

Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import datetime as dt
import functools
import http.client
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memtrackd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from typing import Self

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "bench"
LIBRARY = CACHE / "daemon_changes.so"
KERNEL = "6.12"
DAEMON = [sys.executable, "-m", "memtrackd"]
PAGE = 4096

CLIENTS = 50
REGIONS = 10_000
#: Changes that a client makes when it is its turn.
TURN = 50
ROUNDS = 50
PAUSE = 1_000_000
"""Nanoseconds before a change that finds the daemon asleep."""
#: Turns after which the socket of a daemon that is stopped is full.
FILLING_TURNS = 20
#: Microseconds that a client computes between two changes.
PAUSES = (0, 10, 100)
#: Seconds that a load lasts.
LOAD = 8.0
#: Changes that are looked for on /metrics.
PROBES = 50
#: Seconds without.
REST = 4.0
#: Changes per second and client, where they are not made as fast as possible.
RATE = 20.0
#: Who look at the live page.
VIEWERS = 2

#: The most that a change may cost a client, in units of that without a daemon.
SLOWDOWN_LIMIT = 1.2
#: Seconds after which something hangs.
PATIENCE = 120.0


def now() -> float:
    """Return seconds that all processes agree on."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def until(done: Callable[[], bool], what: str, pause: float = 0.02) -> None:
    """Wait until it is so.

    :raises SystemExit: if it never is
    """
    end = now() + PATIENCE
    while not done():
        if now() > end:
            raise SystemExit(f"after {PATIENCE:g} s still not: {what}")
        time.sleep(pause)


# ------------------------------------------------------------- the clients ---


class Changes(ctypes.CDLL):
    """What daemon_changes.c offers."""

    def __init__(self, slots: int) -> None:
        super().__init__(str(LIBRARY))
        long, numbers = ctypes.c_ulong, ctypes.POINTER(ctypes.c_uint64)
        self.changes_map.argtypes = [long]
        self.changes_slot.argtypes = [long]
        self.changes_slot.restype = ctypes.c_void_p
        for function in (self.changes_make, self.changes_undo):
            function.argtypes = [long, ctypes.c_bool]
        self.changes_measure.argtypes = [
            long,
            long,
            ctypes.c_bool,
            ctypes.c_uint64,
            numbers,
            numbers,
        ]
        self.changes_compute.argtypes = [ctypes.c_uint64]
        self.changes_work.argtypes = [long, ctypes.c_uint64, numbers, numbers]
        check(self.changes_map(slots))


def check(result: int) -> None:
    if result:
        raise SystemExit("memory cannot be mapped or changed as it should")


@dataclass
class Done:
    """What a client has done to its regions, by their numbers."""

    count: Counter[int] = field(default_factory=Counter)
    last: dict[int, float] = field(default_factory=dict)
    """When the latest change began, in seconds since 1970."""
    paced: list[tuple[float, int]] = field(default_factory=list)
    """When the changes of a slow load began, see now()."""
    generation: int = 0


class Client:
    """A process that changes its memory as it is told."""

    def __init__(self, name: str, path: Path | None, slots: int) -> None:
        self._changes = Changes(slots)
        self._tracker = memtrackd.attach(
            name,
            # Where nobody listens.
            socket=path or Path(os.devnull, "none"),
            required=path is not None,
            timeout=30,
        )
        self._regions: list[memtrackd.Region] = []
        self._done = Done()
        self._next = 0

    def register(self, count: int) -> None:
        """Track so many more slots."""
        have = len(self._regions)
        for index in range(have, have + count):
            start = self._changes.changes_slot(index)
            region = self._tracker.register(start, start + PAGE, f"slot {index}")
            self._regions.append(region)
        if self._tracker.attached:
            until(self._tracker.flush, "the daemon has taken all regions")

    def backend(self) -> str:
        return self._tracker.device.backend

    def measure(self, unmap: bool, pause: int) -> tuple[list[int], list[int]]:
        """Make a turn of changes; return ns and ns of CPU time."""
        count = min(TURN, len(self._regions))
        times, cpu_times = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
        if self._next + count > len(self._regions):
            self._next = 0
        first, self._next = self._next, self._next + count
        check(
            self._changes.changes_measure(first, count, unmap, pause, times, cpu_times)
        )
        if unmap:
            for region in self._regions[first : first + count]:
                region.rearm()
        return list(times), list(cpu_times)

    def work(self, rounds: int) -> tuple[list[int], list[int]]:
        """Use and drop the regions, computing between; return ns and CPU ns."""
        time_, cpu_time = ctypes.c_uint64(), ctypes.c_uint64()
        check(
            self._changes.changes_work(
                len(self._regions), rounds, ctypes.byref(time_), ctypes.byref(cpu_time)
            )
        )
        return [time_.value], [cpu_time.value]

    def load(self, seconds: float, rate: float | None) -> tuple[int, float]:
        """Change one region after the other; return how many times, and how long."""
        if rate is not None:
            # Not all of them at the same moment.
            time.sleep(random.random() / rate)  # noqa: S311
        begun = now()
        count = 0
        while now() < begun + seconds:
            if rate is not None:
                time.sleep(max(0.0, begun + (count + 1) / rate - now()))
            self.change(self._next % len(self._regions), count % 2 == 1, rate)
            self._next += 1
            count += 1
        return count, now() - begun

    @staticmethod
    def rest(seconds: float) -> None:
        """Change nothing."""
        time.sleep(seconds)

    def change_each(self) -> None:
        """Change every region once."""
        for index in range(len(self._regions)):
            self.change(index, index % 2 == 1)

    def change(self, index: int, unmap: bool, rate: float | None = None) -> float:
        """Change a region, and map it again; return when that began."""
        self._done.count[index] += 1
        self._done.last[index] = time.time()
        begun = now()
        if rate is not None:
            self._done.paced.append((begun, index))
        check(self._changes.changes_make(index, unmap))
        check(self._changes.changes_undo(index, unmap))
        if unmap:
            self._regions[index].rearm()
        return begun

    def done(self) -> Done:
        self._done.generation = self._tracker.device.generation
        return self._done


class Crowd:
    """Some clients of one daemon, or of none."""

    def __init__(
        self,
        title: str,
        clients: int,
        regions: int,
        path: Path | None = None,
        room: int = 0,
    ) -> None:
        self._title = title
        self._path = path
        self._sizes = [regions // clients] * clients
        self._slots = max(regions, room) // clients
        self._connections: list[Connection[Any, Any]] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("fork")
        for number, size in enumerate(self._sizes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=self._serve, args=(theirs, number, size), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for number in range(len(self)):
            self._answer(number)
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def __len__(self) -> int:
        return len(self._sizes)

    def name(self, number: int) -> str:
        return f"{self._title} {number}"

    def one(self, number: int, method: str, *arguments: object) -> Any:  # noqa: ANN401
        """Have one client do something; return what it returns."""
        self._connections[number].send((method, arguments))
        return self._answer(number)

    def all(self, method: str, *arguments: object) -> list[Any]:
        """Have all of them do something at the same time."""
        for connection in self._connections:
            connection.send((method, arguments))
        return [self._answer(number) for number in range(len(self))]

    def _answer(self, number: int) -> Any:  # noqa: ANN401
        try:
            return self._connections[number].recv()
        except EOFError:
            raise SystemExit(f"{self.name(number)!r} has died") from None

    def _serve(self, connection: Connection[Any, Any], number: int, size: int) -> None:
        client = Client(self.name(number), self._path, self._slots)
        client.register(size)
        connection.send("ready")
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(client, method)(*arguments))


# ------------------------------------------------------------- the daemon ---


class Daemon:
    """memtrackd with all its outputs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "memtrackd.sock"
        self.log = folder / "log"
        self._errors = folder / "errors"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        options: list[str | Path] = [
            "--socket",
            self.path,
            "--http",
            "127.0.0.1:0",
            "--log",
            "json",
        ]
        options += ["--log-file", self.log, "--canary", "0.5"]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen([*DAEMON, *options], stderr=errors)
        until(self._has_started, "the daemon has started")
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        sys.stderr.write(self._errors.read_text("utf-8"))

    @property
    def pid(self) -> int:
        return self._started().pid

    def lines(self) -> list[dict[str, Any]]:
        """Return the whole log."""
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

    def wait_for_regions(self, count: int) -> None:
        """Wait until the daemon knows so many."""

        def known() -> bool:
            return self.log.read_bytes().count(b'"event": "registered"') >= count

        until(known, f"the daemon knows {count} regions", 0.2)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def cpu_time(self) -> float:
        """Return seconds, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text("ascii").rpartition(")")[2]
        ticks = sum(map(int, fields.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Return bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def scrape(self) -> str:
        """Return the metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        with connection.getresponse() as answer:
            text = answer.read().decode()
            if answer.status != http.HTTPStatus.OK:
                raise SystemExit(f"/metrics: {answer.status} {text}")
        connection.close()
        return text

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the daemon was not started yet")
        return self._process

    def _has_started(self) -> bool:
        if self._started().poll() is not None:
            raise SystemExit(
                "the daemon cannot start: " + self._errors.read_text("utf-8")
            )
        if not self.log.exists():
            return False
        for line in self.log.read_text("utf-8").splitlines():
            if match := re.search(r'"http": "http://127.0.0.1:(\d+)', line):
                self.port = int(match[1])
                return True
        return False


# ----------------------------------------------------- who looks at outputs ---


Slot = tuple[int, int]
"""A client and a region of it, by their numbers."""


class Seen:
    """What an output has told about changes."""

    def __init__(self) -> None:
        self.counts: Counter[Slot] = Counter()
        self.arrivals: dict[Slot, list[float]] = {}
        """When it was there to be read, see now()."""
        self.read_at: dict[Slot, float] = {}
        """When the daemon says it has read the latest, in seconds since 1970."""
        self.others = 0
        """Other things that it told."""
        self.lost = 0
        """Messages that it says it had to leave out."""

    def add(self, slot: Slot, arrival: float, read_at: float) -> None:
        self.counts[slot] += 1
        self.arrivals.setdefault(slot, []).append(arrival)
        self.read_at[slot] = read_at

    def latencies(self, clients: Sequence[Done]) -> list[float]:
        """Return the seconds until the first sign of each change of a slow load."""
        found = []
        for number, client in enumerate(clients):
            for begun, region in client.paced:
                arrivals = self.arrivals.get((number, region), [])
                place = bisect.bisect_left(arrivals, begun)
                found += [at - begun for at in arrivals[place : place + 1]]
        return found


Scrape = tuple[float, int]
"""The seconds that it took, and its bytes."""


@dataclass
class Observations:
    """All that an observer has seen."""

    log: Seen
    viewers: list[Seen]
    scrapes: list[Scrape]


class Observer:
    """A process that follows the log, has two viewers, and scrapes every second.

    What it gets it only stores, with the time: it is read when all is over.
    """

    def __init__(self, running: Daemon) -> None:
        self._daemon = running
        self._scrapes: list[Scrape] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.join()

    def finish(self) -> Observations:
        """Return what was seen; there is nothing more to see."""
        self._connection.send("finish")
        seen: Observations = self._connection.recv()
        return seen

    def _serve(self, connection: Connection[Any, Any]) -> None:
        chunks: list[list[tuple[float, bytes]]] = [[] for _ in range(1 + VIEWERS)]
        targets: list[Callable[[], None]] = [
            functools.partial(self._follow_log, chunks[0]),
            *(functools.partial(self._view, c) for c in chunks[1:]),
            self._scrape,
        ]
        for target in targets:
            threading.Thread(target=target, daemon=True).start()
        until(lambda: all(map(len, chunks)), "all outputs say something")
        connection.send("ready")
        connection.recv()
        # What was sent before has come by then.
        time.sleep(1)
        log, *streams = chunks
        connection.send(
            Observations(
                read_log(log), [read_stream(s) for s in streams], self._scrapes
            )
        )

    def _follow_log(self, chunks: list[tuple[float, bytes]]) -> None:
        with self._daemon.log.open("rb", buffering=0) as log:
            while True:
                while data := log.read(1 << 20):
                    chunks.append((now(), data))
                time.sleep(0.001)

    def _view(self, chunks: list[tuple[float, bytes]]) -> None:
        address = "127.0.0.1", self._daemon.port
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
        connection.request("GET", "/events")
        with connection.getresponse() as answer:
            while data := answer.read1(1 << 20):
                chunks.append((now(), data))

    def _scrape(self) -> None:
        while True:
            begun = now()
            text = self._daemon.scrape()
            self._scrapes.append((now() - begun, len(text)))
            time.sleep(max(0.0, begun + 1 - now()))


def messages(
    chunks: Iterable[tuple[float, bytes]], end: bytes
) -> Iterator[tuple[float, bytes]]:
    """Return what ends so, and when the end was there."""
    rest = b""
    for arrival, data in chunks:
        *whole, rest = (rest + data).split(end)
        for message in whole:
            yield arrival, message


def numbered(name: str) -> int:
    return int(name.rpartition(" ")[2])


def read_log(chunks: Iterable[tuple[float, bytes]]) -> Seen:
    seen = Seen()
    for arrival, line in messages(chunks, b"\n"):
        said = json.loads(line)
        if said["event"] != "changed" or said["region"] is None:
            seen.others += said["event"] in {"attached", "registered"}
            continue
        slot = numbered(said["name"]), numbered(said["region"])
        written = dt.datetime.fromisoformat(said["timestamp"])
        seen.add(slot, arrival, written.timestamp())
    return seen


def read_stream(chunks: Iterable[tuple[float, bytes]]) -> Seen:
    seen = Seen()
    clients: dict[int, int] = {}
    for arrival, message in messages(chunks, b"\n\n"):
        event, data = "", ""
        for line in message.decode().split("\n"):
            name, _, value = line.partition(": ")
            event = value if name == "event" else event
            data += value if name == "data" else ""
        said = json.loads(data or "null")
        match event:
            case "snapshot":
                seen.counts.clear()
                for client in said["clients"]:
                    number = clients[client["id"]] = numbered(client["name"])
                    for region in client["regions"]:
                        slot = number, numbered(region["name"])
                        seen.counts[slot] = region["changes"]
            case "attached":
                clients[said["client"]["id"]] = numbered(said["client"]["name"])
            case "changes":
                number = clients[said["client"]]
                for cookie, *_ in said["changes"]:
                    # Cookies count from 1.
                    seen.add((number, cookie - 1), arrival, said["time"])
            case "lost":
                seen.lost += said["messages"]
    return seen


class Metrics:
    """A text of /metrics, read."""

    def __init__(self, text: str) -> None:
        self.changes: Counter[tuple[int, int]] = Counter()
        self.generations: dict[int, int] = {}
        self.dropped: dict[str, int] = {}
        self.unattributed = 0
        self.is_driver = 'backend="driver"' in text
        self.canary: list[tuple[str, int]] = []
        """Upper limits in seconds, and how many took at most as long."""
        for line in text.splitlines():
            match = re.fullmatch(r"memtrackd_(\w+?)(?:_total)?\{(.*)\} (\S+)", line)
            if match is not None:
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                self._read(match[1], labels, int(float(match[3])))

    def _read(self, name: str, labels: dict[str, str], value: int) -> None:
        match name:
            case "changes":
                client, region = labels["client"], labels["region"]
                self.changes[numbered(client), numbered(region)] = value
            case "generation":
                self.generations[numbered(labels["client"])] = value
            case "unattributed_changes":
                self.unattributed += value
            case "dropped":
                self.dropped[labels["output"]] = value
            case "canary_seconds_bucket":
                self.canary.append((labels["le"], value))


# ------------------------------------------------------------ the sections ---


class Report:
    """Prints, and remembers whether a target was missed."""

    def __init__(self) -> None:
        self.missed = False

    def line(self, title: str, *cells: str, verdict: str = "") -> None:
        text = f"  {title:<38}" + "".join(f"{cell:>18}" for cell in cells)
        print(f"{text}  {verdict}".rstrip(), flush=True)

    def judge(self, reached: bool, target: str) -> str:
        """Return what to print behind a figure."""
        self.missed |= not reached
        return f"{target} {'reached' if reached else 'MISSED'}"


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


@contextmanager
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as folder, Daemon(Path(folder)) as running:
        yield running


NOBODY = "no daemon"
LIVE = "live daemon"
STOPPED = "stopped daemon"


def slowdown(report: Report, options: argparse.Namespace) -> None:
    """Print what a change costs, by who is attached."""
    size = options.clients, options.regions
    with ExitStack() as stack:
        live, stopped = (stack.enter_context(daemon()) for _ in range(2))
        crowds = {
            NOBODY: stack.enter_context(Crowd("alone", *size)),
            LIVE: stack.enter_context(Crowd("tracked", *size, live.path)),
            STOPPED: stack.enter_context(Crowd("held up", *size, stopped.path)),
        }
        for running in (live, stopped):
            running.wait_for_regions(options.regions)
        stopped.signal(signal.SIGSTOP)
        # Where nobody reads, everything was reported once, and no socket has room.
        for crowd in crowds.values():
            crowd.all("change_each")
            for _ in range(FILLING_TURNS):
                crowd.all("measure", False, PAUSE)
        time.sleep(1)
        backend = crowds[NOBODY].one(0, "backend")
        print(f"\nBackend {backend!r}: what a change costs")
        report.line("ns, median (times no daemon)", *crowds)
        limited = backend == "driver"
        for unmap, what in ((False, "MADV_DONTNEED"), (True, "munmap")):
            for pause, how in ((PAUSE, "one by one"), (0, "in a row")):
                figures = take_turns(crowds, options.rounds, "measure", unmap, pause)
                judged = ["time", "CPU time"] if limited and not pause else []
                print_slowdown(report, f"{what}, {how}", figures, judged)
        per_us = computing_speed()
        for pause in PAUSES:
            figures = take_turns(crowds, options.rounds, "work", int(pause * per_us))
            judged = ["CPU time"] if limited else []
            print_slowdown(report, f"client, {pause} us between", figures, judged)


Turns = dict[str, list[tuple[float, float]]]
"""Medians of each turn, time and CPU time, by crowd."""


def computing_speed() -> float:
    """Return how much a program computes in a microsecond."""
    changes, rounds = Changes(1), 1_000_000
    begun = time.thread_time_ns()
    changes.changes_compute(rounds)
    return rounds / (time.thread_time_ns() - begun) * 1000


def take_turns(
    crowds: dict[str, Crowd], rounds: int, method: str, *arguments: object
) -> Turns:
    figures: Turns = {title: [] for title in crowds}
    order = list(crowds)
    for number in range(rounds):
        for title in order:
            crowd = crowds[title]
            times, cpu_times = crowd.one(number % len(crowd), method, *arguments)
            figures[title].append(
                (statistics.median(times), statistics.median(cpu_times))
            )
            # The daemon still has to write it all down.
            time.sleep(0.01)
        order.append(order.pop(0))
    return figures


def print_slowdown(
    report: Report, title: str, figures: Turns, judged: Sequence[str]
) -> None:
    for index, what in enumerate(("time", "CPU time")):
        medians = {
            who: [turn[index] for turn in turns] for who, turns in figures.items()
        }
        ratios = {
            who: statistics.median(
                mine / max(alone, 1)
                for mine, alone in zip(values, medians[NOBODY], strict=True)
            )
            for who, values in medians.items()
        }
        cells = (
            f"{statistics.median(values):,.0f} ({ratios[who]:.2f})"
            for who, values in medians.items()
        )
        verdict = ""
        if what in judged:
            reached = max(ratios.values()) <= SLOWDOWN_LIMIT
            verdict = report.judge(reached, f"<= {SLOWDOWN_LIMIT}")
        report.line(f"{title}: {what}", *cells, verdict=verdict)


@dataclass
class Phase:
    """What happened while all clients did something."""

    changes: int
    reports: int
    seconds: float
    cpu: float
    """Seconds, of the daemon."""
    cpu_seconds: float
    """In so many seconds, which are a few more."""

    def cells(self) -> tuple[str, ...]:
        """Return what is printed."""
        return (
            f"{self.changes / self.seconds:,.0f}",
            f"{self.reports / self.seconds:,.0f}",
            f"{self.cpu / self.cpu_seconds:.0%}",
            f"{self.cpu / self.reports * 1e6:,.0f}" if self.reports else "",
        )


class Load:
    """The clients of one daemon at work."""

    def __init__(self, running: Daemon, crowd: Crowd) -> None:
        self._daemon = running
        self._crowd = crowd

    def done(self) -> list[Done]:
        """Return what each client has done so far."""
        return self._crowd.all("done")

    def settle(self) -> Metrics:
        """Wait until the daemon shows the generations that the clients know of."""
        shown: list[Metrics] = []

        def settled() -> bool:
            shown[:] = [Metrics(self._daemon.scrape())]
            return all(
                shown[0].generations.get(number) == client.generation
                for number, client in enumerate(self.done())
            )

        until(settled, "the daemon shows the generation of each client", 0.1)
        return shown[0]

    def run(self, method: str, *arguments: object) -> Phase:
        """Have all clients do something, and the daemon tell about it."""
        made = self._changes()
        told = self.settle().changes.total()
        cpu, begun = self._daemon.cpu_time(), now()
        self._crowd.all(method, *arguments)
        seconds = now() - begun
        self._wait_for_calm()
        cpu, cpu_seconds = self._daemon.cpu_time() - cpu, now() - begun
        reports = self.settle().changes.total() - told
        return Phase(self._changes() - made, reports, seconds, cpu, cpu_seconds)

    def _wait_for_calm(self) -> None:
        """Wait until what was on its way was read and told."""

        def calm() -> bool:
            before = self._daemon.cpu_time()
            time.sleep(0.25)
            return self._daemon.cpu_time() - before <= 0.02

        until(calm, "the daemon has nothing to do")

    def probe(self, count: int) -> list[float]:
        """Return seconds from an unmapping until /metrics shows it, polled."""
        latencies = []
        for number in range(count):
            client = number % len(self._crowd)
            before = self.settle().changes[client, 0]
            begun = self._crowd.one(client, "change", 0, True)
            while Metrics(self._daemon.scrape()).changes[client, 0] == before:
                pass
            latencies.append(now() - begun)
        return latencies

    def _changes(self) -> int:
        return sum(client.count.total() for client in self.done())


def load(report: Report, options: argparse.Namespace) -> None:
    """Print what the daemon does, and account for every change."""
    with ExitStack() as stack:
        running = stack.enter_context(daemon())
        observer = stack.enter_context(Observer(running))
        crowd = stack.enter_context(
            Crowd("client", options.clients, options.regions, running.path)
        )
        running.wait_for_regions(options.regions)
        clients = Load(running, crowd)
        print(f"\n{options.clients} clients, {options.regions:,} regions")
        columns = "changes/s", "reports/s", "daemon's CPU", "us per report"
        report.line("", *columns)
        for title, method, *arguments in (
            ("nothing at all", "rest", REST),
            ("every region once", "change_each"),
            (f"{RATE:g} changes/s each", "load", LOAD, RATE),
            ("as fast as they can", "load", LOAD, None),
        ):
            phase = clients.run(method, *arguments)
            report.line(title, *phase.cells())
        before = clients.settle()
        clients.run("change_each")
        after = clients.settle()
        probes = clients.probe(options.probes)
        final, done = clients.settle(), clients.done()
        seen = observer.finish()
    print_latencies(report, done, seen, probes, final)
    print("\nEvery change is accounted for")
    rows = [*accounts(options, done, final, seen), *once_more(before, after)]
    for title, figure, target, good in rows:
        verdict = report.judge(good, target) if target else ""
        report.line(title, f"{figure:,}", verdict=verdict)


def print_latencies(
    report: Report,
    done: Sequence[Done],
    seen: Observations,
    probes: Sequence[float],
    final: Metrics,
) -> None:
    print("\nFrom a change to where it is shown")
    report.line("us", "p50", "p99")
    rows = {
        "line of the log": seen.log.latencies(done),
        **{
            f"event at viewer {number}": viewer.latencies(done)
            for number, viewer in enumerate(seen.viewers, 1)
        },
        "value on /metrics, polled": probes,
    }
    for title, latencies in rows.items():
        cells = (f"{percentile(latencies, p) * 1e6:,.0f}" for p in (50, 99))
        report.line(title, *cells)
    seconds = [scrape[0] for scrape in seen.scrapes]
    report.line(
        f"a scrape of {seen.scrapes[-1][1]:,} bytes",
        *(f"{percentile(seconds, p) * 1e6:,.0f}" for p in (50, 99)),
    )
    below = 0
    for limit, count in final.canary:
        if count > below:
            report.line(f"the canary, up to {limit} s", f"{count - below:,}")
        below = count


Account = tuple[str, int, str, bool]
"""What it is, how many, what is to be reached, and whether it is."""


def accounts(
    options: argparse.Namespace,
    done: Sequence[Done],
    final: Metrics,
    seen: Observations,
) -> Iterator[Account]:
    """Compare what the clients did with what the outputs said."""
    made = sum(client.count.total() for client in done)
    counted = sum(client.generation for client in done)
    yield "changes made", made, f">= {options.regions:,}", made >= options.regions
    # The driver may count the start and the end of a change.
    good = counted == made or (final.is_driver and made < counted <= 2 * made)
    target = f">= {made:,}" if final.is_driver else f"= {made:,}"
    yield "counted by the clients' devices", counted, target, good
    different = sum(
        final.generations.get(number) != client.generation
        for number, client in enumerate(done)
    )
    yield "clients shown with another generation", different, "= 0", different == 0
    reports = final.changes.total()
    yield "reports", reports, f"<= {counted:,}", reports <= counted
    dropped = final.dropped["log"]
    # Viewers are told the time of the latest of many reports only.
    witnesses = [seen.log, *seen.viewers] if dropped else [seen.log]
    unseen = sum(
        max(w.read_at.get((number, region), 0.0) for w in witnesses) < begun
        for number, client in enumerate(done)
        for region, begun in client.last.items()
    )
    yield "regions changed, and no report since", unseen, "= 0", unseen == 0
    unknown = final.unattributed
    yield "reports of no region", unknown, "= 0", unknown == 0
    lines = seen.log.counts.total() + seen.log.others
    missing = reports + options.regions + options.clients - lines
    yield "lines counted as dropped", dropped, "", True
    yield "lines missing in the log", missing, f"= {dropped:,}", missing == dropped
    for number, viewer in enumerate(seen.viewers, 1):
        wrong = sum(
            viewer.counts[slot] != count for slot, count in final.changes.items()
        )
        yield f"regions wrong at viewer {number}", wrong, "= 0", wrong == 0
    lost, dropped = sum(v.lost for v in seen.viewers), final.dropped["web"]
    yield "messages counted as dropped", dropped, "", True
    yield "messages that viewers have lost", lost, f"= {dropped:,}", lost == dropped


def once_more(before: Metrics, after: Metrics) -> Iterator[Account]:
    """Tell what was reported when each region was changed once."""
    risen = [count - before.changes[slot] for slot, count in after.changes.items()]
    least, most = min(risen), max(risen)
    yield "all regions changed once: fewest reports", least, "= 1", least == 1
    # The driver can report again when the pages are gone.
    limit = 2 if after.is_driver else 1
    yield "  most reports of one", most, f"<= {limit}", most <= limit


def memory(report: Report, options: argparse.Namespace) -> None:
    """Print what the daemon grows by, for each region that it is told of."""
    few = options.regions // 10
    with ExitStack() as stack:
        running = stack.enter_context(daemon())
        crowd = stack.enter_context(
            Crowd("client", options.clients, few, running.path, options.regions)
        )
        print("\nMemory of the daemon")
        report.line("", "resident KiB", "bytes per region")
        sizes: list[int] = []
        for count in (few, options.regions):
            if sizes:
                crowd.all("register", (options.regions - few) // options.clients)
            running.wait_for_regions(count)
            crowd.all("change_each")
            time.sleep(1)
            running.scrape()
            sizes.append(running.resident())
            each = (sizes[-1] - sizes[0]) / (options.regions - few)
            cell = f"{each:,.0f}" if each else ""
            report.line(f"{count:,} regions", f"{sizes[-1] / 1024:,.0f}", cell)


SECTIONS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "slowdown": slowdown,
    "load": load,
    "memory": memory,
}


def build() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    source = PROJECT / "bench" / "daemon_changes.c"
    flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-Wl,-z,now")
    subprocess.run(["cc", *flags, "-o", LIBRARY, source], check=True)


def in_guest() -> int:
    """Measure the slowdown on the driver; return the exit status."""
    command: list[str | Path] = [sys.executable, PROJECT / "tools" / "guest.py"]
    command += ["run", KERNEL]
    command += ["--module", "--icount", "--memory", "3G", "--timeout", "1500", "--"]
    command += [sys.executable, Path(__file__).resolve(), "--only", "slowdown,load"]
    # As many regions for each client as elsewhere.
    clients = CLIENTS // 5
    command += ["--clients", str(clients), "--regions", str(REGIONS // 5)]
    command += ["--rounds", "15", "--probes", "10"]
    print(f"Linux {KERNEL}; a nanosecond is an instruction", flush=True)
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Measure and print; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--regions", type=int, default=REGIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--probes", type=int, default=PROBES)
    parser.add_argument("--guest", action="store_true")
    options = parser.parse_args()
    if options.guest:
        return in_guest()
    build()
    report = Report()
    for name in options.only.split(","):
        SECTIONS[name](report, options)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
