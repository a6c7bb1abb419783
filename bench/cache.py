#!/usr/bin/env python3
"""What a hit of the registration cache costs, in look-ups in a dict.

The dict is what a program would have that trusts addresses: registrations by the
start and the end of their range. The cache is used as it is meant to be, with ``async
with cache.get(start, end)``: for ranges that were registered, for parts of these,
in a cache with limits, and with a system call for each (``fence=True``); and where a
cache is full, so that one is registered and another one given up. All of them take
turns within one run, on the same random choice of ranges, so that they meet the same
machine and the same misses of its caches; printed are the medians. Measured is CPU
time, as nothing ever waits here.

The last lines compare the look at a single region with that at the whole notifier.
Runs on the embedded backend, or on the driver if asked for.

Usage: python bench/cache.py [--rounds N] [--backend embedded|driver]

Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import mmap
import random
import statistics
import sys
from time import thread_time_ns
from typing import TYPE_CHECKING, TypeAlias

import anyio

import aioummu
from aioummu import Notifier, RegistrationCache

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioummu import Backend

Ranges: TypeAlias = list[tuple[int, int]]
Cache: TypeAlias = "RegistrationCache[tuple[int, int]]"

COUNTS = (10, 1_000, 100_000)
#: Bytes that are registered at once. Small, so that 100,000 fit.
SIZE = 256
LOOKUPS = 20_000
FENCED = 2_000
#: In each round.
MISSES = 200
CHECKS = 20_000

#: The most look-ups in a dict that a hit may cost.
TARGET = 6


def expect(condition: bool, failure: str) -> None:
    """Make sure that it is measured what was meant."""
    if not condition:
        raise SystemExit(f"{failure}: nothing was measured")


def register(start: int, end: int) -> tuple[int, int]:
    return start, end


def deregister(registration: tuple[int, int]) -> None:
    pass


def nothing(ranges: Ranges) -> None:
    """Do what the others do besides."""
    for _start, _end in ranges:
        pass


def in_dict(ranges: Ranges, table: dict[tuple[int, int], object]) -> None:
    for start, end in ranges:
        table[start, end]


def in_dict_by_start(ranges: Ranges, table: dict[int, object]) -> None:
    for start, _end in ranges:
        table[start]


async def in_cache(ranges: Ranges, cache: Cache) -> None:
    for start, end in ranges:
        async with cache.get(start, end):
            pass


async def fill(cache: Cache, ranges: Ranges) -> None:
    """Register everything, and look at it once more, as after a change elsewhere."""
    for _ in range(2):
        await in_cache(ranges, cache)
    expect(cache.statistics.count == len(ranges), "not all were registered")


def plain_cost(run: Callable[[], None]) -> int:
    begin = thread_time_ns()
    run()
    return thread_time_ns() - begin


async def cost(run: Awaitable[None]) -> int:
    begin = thread_time_ns()
    await run
    return thread_time_ns() - begin


async def costs_of(
    notifier: Notifier, ranges: Ranges, others: list[Ranges]
) -> dict[str, float]:
    """Return the ns of one look-up by each way, in as many rounds as there are others.

    :param others: what is registered in none of the caches
    """
    caches: dict[str, Cache] = {
        "hit": RegistrationCache(notifier, register, deregister),
        "hit, with limits": RegistrationCache(
            notifier, register, deregister, max_count=2 * len(ranges), max_bytes=1 << 40
        ),
        "hit, fence=True": RegistrationCache(
            notifier, register, deregister, fence=True
        ),
    }
    full = RegistrationCache(notifier, register, deregister, max_count=len(ranges))
    for cache in (*caches.values(), full):
        await fill(cache, ranges)
    choice = random.Random(1).choices(ranges, k=LOOKUPS)  # noqa: S311 - repeatable
    parts = [(start + 8, end - 8) for start, end in choice]
    by_range: dict[tuple[int, int], object] = {each: each for each in ranges}
    by_start: dict[int, object] = {start: (start, end) for start, end in ranges}
    times: dict[str, list[float]] = {}

    def note(name: str, spent: int, loop: int, count: int = LOOKUPS) -> None:
        times.setdefault(name, []).append((spent - loop) / count)

    for new in others:
        loop = plain_cost(lambda: nothing(choice))
        note("dict", plain_cost(lambda: in_dict(choice, by_range)), loop)
        note(
            "dict by start",
            plain_cost(lambda: in_dict_by_start(choice, by_start)),
            loop,
        )
        note("hit", await cost(in_cache(choice, caches["hit"])), loop)
        note("hit of a part", await cost(in_cache(parts, caches["hit"])), loop)
        limited = caches["hit, with limits"]
        note("hit, with limits", await cost(in_cache(choice, limited)), loop)
        fenced = await cost(in_cache(choice[:FENCED], caches["hit, fence=True"]))
        note("hit, fence=True", fenced, loop * FENCED // LOOKUPS, FENCED)
        note("miss", await cost(in_cache(new, full)), 0, MISSES)
    expect(full.statistics.evictions == len(others) * MISSES, "some were no misses")
    await full.aclose()
    for cache in caches.values():
        made = cache.statistics.registrations
        expect(made == len(ranges), "some were no hits")
        await cache.aclose()
    return {name: statistics.median(each) for name, each in times.items()}


def check_costs(notifier: Notifier, address: int, rounds: int) -> dict[str, float]:
    """Return the ns of looking whether anything has changed."""
    times: dict[str, list[float]] = {}
    numbers = range(CHECKS)
    with notifier.register(address, address + mmap.PAGESIZE) as region:

        def nothing() -> None:
            for _ in numbers:
                pass

        def changed() -> None:
            for _ in numbers:
                notifier.changed  # noqa: B018 - this is what is measured

        def valid() -> None:
            for _ in numbers:
                region.valid  # noqa: B018 - this is what is measured

        expect(region.valid, "the region was changed")
        for _ in range(rounds):
            loop = plain_cost(nothing)
            for name, check in (("notifier.changed", changed), ("region.valid", valid)):
                each = (plain_cost(check) - loop) / CHECKS
                times.setdefault(name, []).append(each)
        expect(region.valid, "the region was changed")
    return {name: statistics.median(each) for name, each in times.items()}


def print_costs(count: int, costs: dict[str, float]) -> int:
    """Print the table of one number of registrations; return how many were missed."""
    missed = 0
    print(f"{count:,} registrations: ns per look-up (times the dict)")
    for name, each in costs.items():
        times = each / costs["dict"]
        verdict = ""
        if name in {"hit", "hit of a part", "hit, with limits"}:
            missed += times > TARGET
            verdict = f"  {'MISS' if times > TARGET else 'PASS'} (target {TARGET})"
        print(f"    {name:22} {each:8.0f} ({times:5.2f}){verdict}")
    return missed


async def bench(backend: Backend, rounds: int) -> int:
    missed = 0
    memory = mmap.mmap(-1, (max(COUNTS) + rounds * MISSES) * SIZE)
    address, end = aioummu.address_range(memory)
    ranges = [(start, start + SIZE) for start in range(address, end, SIZE)]
    # Between the others, since a cache is seldom used from below to above.
    random.Random(2).shuffle(ranges)  # noqa: S311 - repeatable
    others = [ranges[n * MISSES : (n + 1) * MISSES] for n in range(rounds)]
    ranges = ranges[rounds * MISSES :]
    async with aioummu.open_notifier(backend=backend) as notifier:
        for count in COUNTS:
            costs = await costs_of(notifier, ranges[:count], others)
            missed += print_costs(count, costs)
        costs = check_costs(notifier, address, rounds)
        print("ns per look (times notifier.changed)")
        for name, each in costs.items():
            times = each / costs["notifier.changed"]
            print(f"    {name:22} {each:8.0f} ({times:5.2f})")
    memory.close()
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", choices=("embedded", "driver"), default="embedded")
    arguments = parser.parse_args()
    print(
        f"Python {sys.version.split()[0]}, {arguments.backend} backend, "
        f"medians of {arguments.rounds} rounds"
    )
    return 1 if anyio.run(bench, arguments.backend, arguments.rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
