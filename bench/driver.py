#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the driver costs, in executed guest instructions, against its targets.

Boots Linux 6.12 with one CPU whose clock counts instructions (tools/guest.py run
--icount), lets driver_cost.c measure there, and prints each call's *excess*: above
a null ioctl, an empty read(), or the same change to a mapping without a driver.
Two runs agree within 1 %, whatever else the machine does.

The targets are shares of what kdreg2, HPE's driver for the same purpose, costs by
the same measure (taken once on Linux 6.12).  Rows without a target are there for
what they say: the same call in a pattern that was not part of that comparison.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "bench"
GUEST = [sys.executable, str(PROJECT / "tools" / "guest.py")]
KERNEL = "6.12"
REGIONS = (1, 1_000, 64_000, 1_000_000)

Costs = dict[int, float]

KDREG2: dict[str, Costs] = {
    "register": dict(zip(REGIONS, (543, 977, 1_237, 1_397), strict=True)),
    "unregister": dict(zip(REGIONS, (387, 626, 698, 745), strict=True)),
    "hit": dict(zip(REGIONS, (1_088, 1_418, 1_819, 2_059), strict=True)),
    "read": dict.fromkeys(REGIONS, 369),
}
"""Excess at each number of regions, in guest instructions."""

MISS_LIMIT = 150
"""Instructions above a notifier with empty callbacks."""
GROWTH_LIMIT = 2.0
"""From 1,000 to 1,000,000 regions."""
BYTES_LIMIT = 128


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    measured: str
    """As driver_cost names it."""
    above: str
    """The floor that is subtracted."""
    against: str | None = None
    """What of kdreg2 it is compared with."""
    share: float | None = None
    """The most that it may cost of that."""
    limit: float | None = None
    """The most that it may cost in instructions."""
    smallest: int = 1
    """With fewer regions the 500 samples themselves would be the regions."""

    def verdict(self, costs: Costs) -> bool | None:
        """Whether the targets are met, or None if the row has none."""
        if self.against is not None and self.share is not None:
            anchors = KDREG2[self.against]
            return all(cost <= self.share * anchors[n] for n, cost in costs.items())
        if self.limit is not None:
            return all(cost <= self.limit for cost in costs.values())
        return None


ROWS = (
    Row("register, anywhere", "register-scattered", "null-ioctl", "register", 0.9),
    Row(
        "register, ascending",
        "register-appended",
        "null-ioctl",
        "register",
        0.9,
        None,
        1_000,
    ),
    Row(
        "unregister, oldest first", "unregister-oldest", "null-ioctl", "unregister", 0.8
    ),
    Row("  anywhere", "unregister-scattered", "null-ioctl", "unregister"),
    Row(
        "  newest first",
        "unregister-appended",
        "null-ioctl",
        "unregister",
        None,
        None,
        1_000,
    ),
    Row("hit (MADV_DONTNEED)", "hit-watched", "hit-bare", "hit", 0.5),
    Row("read of it, with LAST", "read-with-last", "empty-read", "read", 0.7),
    Row(
        "miss (munmap) above empty",
        "miss-outside-watched",
        "miss-outside-empty",
        None,
        None,
        MISS_LIMIT,
    ),
    Row("  between two regions", "miss-between-watched", "miss-between-empty"),
    Row("an empty callback", "miss-outside-empty", "miss-outside-bare"),
)


def build() -> tuple[Path, Path]:
    """Compile the program and the empty notifier; return both."""
    CACHE.mkdir(parents=True, exist_ok=True)
    program = CACHE / "driver_cost"
    include = PROJECT / "kmod" / "include" / "uapi"
    source = PROJECT / "bench" / "driver_cost.c"
    subprocess.run(
        [
            "gcc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{include}",
            "-o",
            program,
            source,
        ],
        check=True,
    )
    subprocess.run([*GUEST, "fetch", KERNEL], check=True, stdout=sys.stderr)
    kdir = subprocess.run(
        [*GUEST, "kdir", KERNEL], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    copy = CACHE / "empty_notifier"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(PROJECT / "bench" / "empty_notifier", copy)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")
    }
    subprocess.run(
        ["make", "-C", copy, f"KDIR={kdir}"],
        check=True,
        stdout=sys.stderr,
        env=environment,
    )
    return program, copy / "empty_notifier.ko"


def measure(regions: tuple[int, ...]) -> dict[tuple[int, str], int]:
    """Run driver_cost in the guest; return its figures by (regions, name)."""
    program, empty = build()
    script = (
        f"insmod {shlex.quote(str(empty))} && "
        f"{shlex.quote(str(program))} {' '.join(map(str, regions))} && rmmod empty_notifier"
    )
    finished = subprocess.run(
        [*GUEST, "run", KERNEL, "--module", "--icount", "--memory", "3G"]
        + ["--timeout", "1200", "--", "sh", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    figures = re.findall(r"^(\d+) (\S+) (\d+)$", finished.stdout, re.MULTILINE)
    if finished.returncode or not figures:
        sys.stdout.write(finished.stdout)
        raise SystemExit(finished.returncode or 1)
    return {(int(n), name): int(value) for n, name, value in figures}


def report(figures: dict[tuple[int, str], int], regions: tuple[int, ...]) -> bool:
    """Print the table; return whether all targets are met."""
    good = True

    def judge(verdict: bool | None) -> str:
        nonlocal good
        good = good and verdict is not False
        return {True: "reached", False: "MISSED", None: ""}[verdict]

    print(
        f"Guest instructions above the floor, Linux {KERNEL}, median of 500 single calls"
    )
    print("(in brackets: share of kdreg2)\n")
    print(f"{'regions':<26}" + "".join(f"{n:>16,}" for n in regions) + "  target")
    for row in ROWS:
        costs: Costs = {
            n: figures[n, row.measured] - figures[n, row.above]
            for n in regions
            if n >= row.smallest
        }
        line = f"{row.title:<26}"
        for n in regions:
            cell = "-"
            if n in costs:
                cell = f"{costs[n]:,.0f}"
                if row.against:
                    cell += f" ({costs[n] / KDREG2[row.against][n]:.2f})"
            line += f"{cell:>16}"
        target = ""
        if row.share is not None:
            target = f"<= {row.share:.2f}"
        elif row.limit is not None:
            target = f"<= {row.limit:.0f}"
        print(f"{line}  {target:<8} {judge(row.verdict(costs))}".rstrip())
        if 1_000 in costs and 1_000_000 in costs and (row.share or row.limit):
            growth = costs[1_000_000] / costs[1_000]
            if growth > GROWTH_LIMIT:
                good = False
                print(f"  MISSED: {growth:.2f} times its cost at 1,000 regions")

    print()
    for n in regions:
        if n >= 1_000:
            closing = figures[n, "close-total"] - figures[n, "close-without-regions"]
            print(f"close with {n:>9,} regions: {closing / n:6.0f} for each")
    sizes = {figures[n, "slab-bytes-per-region"] for n in regions}
    size = max(sizes)
    print(
        f"memory: {size} bytes of slab per region  <= {BYTES_LIMIT}  {judge(size <= BYTES_LIMIT)}"
    )
    return good


def main() -> int:
    """Measure and print; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.parse_args()
    return 0 if report(measure(REGIONS), REGIONS) else 1


if __name__ == "__main__":
    sys.exit(main())
