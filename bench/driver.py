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

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "bench"
GUEST = [sys.executable, str(PROJECT / "tools" / "guest.py")]
KERNEL = "6.12"
REGIONS = (1, 1_000, 64_000, 1_000_000)

Costs = dict[int, float]
Figures = dict[tuple[int, str], int]
"""By number of regions and name, as driver_cost prints them."""

KDREG2: dict[str, Costs] = {
    "register": dict(zip(REGIONS, (543, 977, 1_237, 1_397), strict=True)),
    "unregister": dict(zip(REGIONS, (387, 626, 698, 745), strict=True)),
    "hit": dict(zip(REGIONS, (1_088, 1_418, 1_819, 2_059), strict=True)),
    "read": dict.fromkeys(REGIONS, 369),
}
"""Excess at each number of regions, in guest instructions."""

FEW, MANY = 1_000, 1_000_000
GROWTH_LIMIT = 2.0
"""The most that a call may cost with MANY regions, in units of that with FEW."""
BYTES_LIMIT = 128
"""Slab memory per region."""

WITHOUT_FEATURES: dict[str, Costs] = {
    "register, anywhere": dict(zip(REGIONS, (234, 480, 610, 694), strict=True)),
    "unregister, oldest first": dict(zip(REGIONS, (174, 420, 422, 458), strict=True)),
    "hit (MADV_DONTNEED)": dict(zip(REGIONS, (390, 538, 593, 676), strict=True)),
    # As measured then, plus 42 that read_iter() takes above read().
    "read of it, with LAST": dict.fromkeys(REGIONS, 213),
    "miss (munmap), above empty": dict.fromkeys(REGIONS, 27),
}
"""The excess of this driver before it had filters, states and one-shot regions."""
UNMEASURABLE = 1.05
"""The most that a whole call may take since, for those who negotiate nothing."""

FEATURES = {
    "cause": "causes",
    "filtered": "filter, left out",
    "once": "one-shot",
    "state": "state words",
}
"""As driver_cost names them, and for the table."""


@dataclass(frozen=True, kw_only=True)
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

    def costs(self, figures: Figures) -> Costs:
        """Return the excess at each number of regions."""
        return {
            n: figures[n, self.measured] - figures[n, self.above]
            for n in REGIONS
            if n >= self.smallest
        }

    def target(self) -> str:
        """Return the target as it is printed."""
        if self.share is not None:
            return f"<= {self.share:.2f}"
        return "" if self.limit is None else f"<= {self.limit:.0f}"

    def reached(self, costs: Costs) -> bool:
        """Tell whether the targets are met; those that have none always are."""
        if self.share is not None and self.against is not None:
            anchors = KDREG2[self.against]
            good = all(cost <= self.share * anchors[n] for n, cost in costs.items())
        elif self.limit is not None:
            good = all(cost <= self.limit for cost in costs.values())
        else:
            return True
        return good and costs[MANY] <= GROWTH_LIMIT * costs[FEW]

    def line(self, costs: Costs) -> str:
        """Return the line without the target."""
        line = f"{self.title:<26}"
        for n in REGIONS:
            cell = f"{costs[n]:,.0f}" if n in costs else "-"
            if n in costs and self.against is not None:
                cell += f" ({costs[n] / KDREG2[self.against][n]:.2f})"
            line += f"{cell:>14}"
        return line


ROWS = (
    Row(
        title="register, anywhere",
        measured="register-scattered",
        above="null-ioctl",
        against="register",
        share=0.9,
    ),
    Row(
        title="  ascending",
        measured="register-appended",
        above="null-ioctl",
        against="register",
        share=0.9,
        smallest=FEW,
    ),
    Row(
        title="unregister, oldest first",
        measured="unregister-oldest",
        above="null-ioctl",
        against="unregister",
        share=0.8,
    ),
    Row(
        title="  anywhere",
        measured="unregister-scattered",
        above="null-ioctl",
        against="unregister",
    ),
    Row(
        title="  newest first",
        measured="unregister-appended",
        above="null-ioctl",
        against="unregister",
        smallest=FEW,
    ),
    Row(
        title="hit (MADV_DONTNEED)",
        measured="hit-watched",
        above="hit-bare",
        against="hit",
        share=0.5,
    ),
    Row(
        title="read of it, with LAST",
        measured="read-with-last",
        above="empty-read",
        against="read",
        share=0.7,
    ),
    Row(
        title="miss (munmap), above empty",
        measured="miss-outside-watched",
        above="miss-outside-empty",
        limit=150,
    ),
    Row(
        title="  between two regions",
        measured="miss-between-watched",
        above="miss-between-empty",
    ),
    Row(
        title="an empty callback",
        measured="miss-outside-empty",
        above="miss-outside-bare",
    ),
)


def run(*command: str | Path, stdout: int | IO[str] = subprocess.PIPE) -> str:
    """Run a command that has to succeed; return what it printed."""
    environment = dict(os.environ)
    for name in ("MAKEFLAGS", "MAKELEVEL"):
        environment.pop(name, None)
    finished = subprocess.run(
        command, stdout=stdout, text=True, check=False, env=environment
    )
    if finished.returncode:
        sys.stdout.write(finished.stdout or "")
        raise SystemExit(finished.returncode)
    return finished.stdout or ""


def build() -> tuple[Path, Path]:
    """Compile the program and the empty notifier; return both."""
    CACHE.mkdir(parents=True, exist_ok=True)
    program = CACHE / "driver_cost"
    include = PROJECT / "kmod" / "include" / "uapi"
    source = PROJECT / "bench" / "driver_cost.c"
    flags = ("-O2", "-Wall", "-Wextra", "-Werror")
    run("gcc", *flags, f"-I{include}", "-o", program, source)

    run(*GUEST, "fetch", KERNEL, stdout=sys.stderr)
    kdir = run(*GUEST, "kdir", KERNEL).strip()
    copy = CACHE / "empty_notifier"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(PROJECT / "bench" / "empty_notifier", copy)
    run("make", "-C", copy, f"KDIR={kdir}", stdout=sys.stderr)
    return program, copy / "empty_notifier.ko"


def measure() -> Figures:
    """Run driver_cost in the guest; return its figures."""
    program, empty = (shlex.quote(str(path)) for path in build())
    regions = " ".join(map(str, REGIONS))
    options = ("--module", "--icount", "--memory", "3G", "--timeout", "1200")
    script = f"insmod {empty} && {program} {regions} && rmmod empty_notifier"
    printed = run(*GUEST, "run", KERNEL, *options, "--", "sh", "-c", script)
    figures = re.findall(r"^(\d+) (\S+) (\d+)$", printed, re.MULTILINE)
    return {(int(n), name): int(value) for n, name, value in figures}


def report(figures: Figures) -> bool:
    """Print the table; return whether all targets are met."""
    verdicts = []

    def judge(good: bool) -> str:
        verdicts.append(good)
        return "reached" if good else "MISSED"

    print(f"Guest instructions above the floor on Linux {KERNEL},")
    print("median of 500 single calls (in brackets: share of kdreg2)\n")
    print(f"{'regions':<26}" + "".join(f"{n:>14,}" for n in REGIONS) + "  target")
    for row in ROWS:
        costs = row.costs(figures)
        target = row.target()
        verdict = f"  {target:<8} {judge(row.reached(costs))}" if target else ""
        print(row.line(costs) + verdict)

    print()
    for n in REGIONS:
        if n >= FEW:
            total = figures[n, "close-total"] - figures[n, "close-without-regions"]
            print(f"close with {n:>9,} regions: {total / n:4.0f} for each")
    size = max(figures[n, "slab-bytes-per-region"] for n in REGIONS)
    verdict = f"<= {BYTES_LIMIT} {judge(size <= BYTES_LIMIT)}"
    print(f"slab memory: {size} bytes per region  {verdict}")
    return all(verdicts)


def report_features(figures: Figures) -> bool:
    """Print what features cost those who ask, and those who do not."""
    print("\nFeatures, for who negotiates them: above the same change with no driver")
    print(f"{'regions':<26}" + "".join(f"{n:>14,}" for n in REGIONS))
    for title, call, floor in (
        ("hit", "hit", "hit-bare"),
        ("miss, outside", "miss-outside", "miss-outside-bare"),
        ("register, anywhere", "register", "null-ioctl"),
    ):
        plain = "scattered" if call == "register" else "watched"
        for name, words in {plain: "none", **FEATURES}.items():
            cells = (figures[n, f"{call}-{name}"] - figures[n, floor] for n in REGIONS)
            print(f"{title + ': ' + words:<26}" + "".join(f"{c:>14,}" for c in cells))

    print("\nFor who negotiates nothing: whole calls, since there are features")
    good = True
    for row in ROWS:
        if row.title not in WITHOUT_FEATURES:
            continue
        before = WITHOUT_FEATURES[row.title]
        line = f"{row.title:<26}"
        for n in REGIONS:
            cost, base = figures[n, row.measured], figures[n, row.above]
            share = cost / (base + before[n])
            line += f"{f'{cost:,} ({share:.3f})':>16}"
            good &= share <= UNMEASURABLE
        print(line)
    print(f"<= {UNMEASURABLE}: {'reached' if good else 'MISSED'}")
    return good


def main() -> int:
    """Measure and print; exit status 1 if a target is missed."""
    figures = measure()
    good = report(figures)
    return 0 if report_features(figures) and good else 1


if __name__ == "__main__":
    sys.exit(main())
