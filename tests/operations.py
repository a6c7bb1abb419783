"""Every operation of the table in docs/backends.md, done for real.

Each function maps some memory, has a part of it watched, and changes it. What it
has mapped stays mapped, as unmapping would be reported as well.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import attrs

from aioummu import Cause
from aioummu._regions import address_range
from tests.memory import (
    MADV_DONTNEED,
    MADV_FREE,
    PAGE,
    PROT_NONE,
    PROT_READ_WRITE,
    Pages,
    SharedPages,
    brk,
    sbrk,
    shmat,
    shmdt,
)

Range: TypeAlias = tuple[int, int]
#: To be called once, after which everything counts.
Watch: TypeAlias = Callable[[int, int], object]
#: Returns what it has changed, if that is not all that is watched.
Operation: TypeAlias = Callable[[Watch], Range | None]

#: The table, which is the only place that says what is to be reported.
DOCUMENTATION = Path(__file__).parent.parent / "docs" / "backends.md"

OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Let the function stand for a row of the table."""

    def add(function: Operation) -> Operation:
        assert name not in OPERATIONS
        OPERATIONS[name] = function
        return function

    return add


class NotHereError(Exception):
    """This kernel or user cannot do the operation."""


@attrs.frozen
class Documented:
    """A cell of the table: what is reported."""

    range: str
    """``exact range``, ``whole region``, ``nothing`` or ``refused``."""
    generation: int
    """By how much it rises."""
    cause: Cause
    """Why, says the event."""
    cause_maybe: Cause
    """What it may say besides."""
    spent: bool
    """Whether the region is not watched any more."""
    since: tuple[int, int]
    """The first kernel of which that is true."""


_CELL = re.compile(
    r"(?P<range>exact range|whole region|nothing|refused)(?: \((?P<cause>[a-z, ]+)\))?"
    r"(?:, \+(?P<generation>\d+))?"
    r"(?P<spent>; spent)?(?:; since (?P<since>\d+\.\d+))?"
)


def _documented(cell: str) -> Documented:
    match = _CELL.fullmatch(cell)
    assert match, f"{DOCUMENTATION.name}: {cell!r} is not understood"
    silent = match["range"] in {"nothing", "refused"}
    major, _, minor = (match["since"] or "0.0").partition(".")
    return Documented(
        match["range"],
        int(match["generation"] or not silent),
        _cause(match["cause"], certain=True),
        _cause(match["cause"], certain=False),
        match["spent"] is not None,
        (int(major), int(minor)),
    )


def _cause(names: str | None, *, certain: bool) -> Cause:
    cause = Cause(0)
    for name in names.split(", ") if names else ():
        is_certain = not name.startswith("maybe ")
        if is_certain == certain:
            word = name.removeprefix("maybe ").replace(" ", "_")
            cause |= Cause[word.upper()]
    return cause


def documented(backend: str) -> dict[str, Documented]:
    """Read the column of a backend."""
    text = DOCUMENTATION.read_text()
    table = text.partition("<!-- operations -->")[2].partition("<!-- end -->")[0]
    head, _, *rows = (_cells(line) for line in table.strip().splitlines())
    column = head.index({"driver": "Driver", "embedded": "Embedded"}[backend])
    return {row[0]: _documented(row[column]) for row in rows}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def kernel() -> tuple[int, int]:
    """Return the version of the running kernel."""
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)


# Unmapping.


@operation("munmap")
def _(watch: Watch) -> Range:
    pages = _watched(watch)
    pages.munmap(pages.part(1, 3))
    return pages.part(1, 3)


@operation("munmap of untouched pages")
def _(watch: Watch) -> Range:
    pages = _watched(watch, touched=False)
    pages.munmap(pages.part(1, 3))
    return pages.part(1, 3)


@operation("mmap with MAP_FIXED over it")
def _(watch: Watch) -> Range:
    pages = _watched(watch)
    pages.map_over(pages.part(1, 3))
    return pages.part(1, 3)


@operation("mremap, shrinking")
def _(watch: Watch) -> Range:
    pages = _watched(watch)
    pages.shrink(1)
    return pages.part(1, 4)


@operation("brk, shrinking")
def _(watch: Watch) -> Range:
    before = sbrk(0)
    start = sbrk(-before % PAGE + 4 * PAGE) + -before % PAGE
    ctypes.memset(start, 1, 4 * PAGE)
    watch(start, start + 4 * PAGE)
    if sbrk(0) != start + 4 * PAGE:
        raise NotHereError("malloc() took the heap's end meanwhile")
    brk(start + PAGE)
    return start + PAGE, start + 4 * PAGE


@operation("free of a large block")
def _(watch: Watch) -> None:
    # From this size on, malloc() maps a block of its own, whatever was freed before.
    block = bytearray(40 << 20)
    watch(*address_range(block))
    del block


@operation("shmdt")
def _(watch: Watch) -> None:
    start = shmat(4)
    watch(start, start + 4 * PAGE)
    shmdt(start)


@operation("shmat with SHM_REMAP over it")
def _(watch: Watch) -> None:
    pages = _watched(watch)
    assert shmat(4, over=pages.start) == pages.start


@operation("unmapped, mapped again, unmapped")
def _(watch: Watch) -> None:
    pages = _watched(watch)
    pages.munmap()
    pages.map_over()
    pages.munmap()


# Moving.


@operation("mremap, growing in place")
def _(watch: Watch) -> None:
    pages = Pages(4)
    pages.munmap(pages.page(3))
    watch(*pages.part(0, 3))
    pages.grow(3, 4)


@operation("mremap, moving")
def _(watch: Watch) -> None:
    _watched(watch).move_to(Pages(4))


@operation("mremap with MREMAP_DONTUNMAP")
def _(watch: Watch) -> None:
    _watched(watch).move_to(Pages(4), keep=True)


# Advice.


def _advice(
    name: str, *, since: tuple[int, int] = (0, 0), touched: bool = True
) -> None:
    def advise(watch: Watch) -> Range:
        if kernel() < since:
            raise NotHereError
        pages = _watched(watch, touched=touched)
        pages.madvise(ADVICE[name], pages.part(1, 3))
        return pages.part(1, 3)

    operation(f"{name}{'' if touched else ' of untouched pages'}")(advise)


#: Not all of them are in the mmap module.
ADVICE = {
    "MADV_DONTNEED": MADV_DONTNEED,
    "MADV_FREE": MADV_FREE,
    "MADV_COLD": 20,
    "MADV_WILLNEED": mmap.MADV_WILLNEED,
    "MADV_DONTFORK": mmap.MADV_DONTFORK,
    "MADV_POPULATE_WRITE": 23,
    "MADV_COLLAPSE": 25,
    "MADV_GUARD_INSTALL": 102,
}
_advice("MADV_DONTNEED")
_advice("MADV_DONTNEED", touched=False)
_advice("MADV_FREE")
_advice("MADV_GUARD_INSTALL", since=(6, 13))
_advice("MADV_COLD")
_advice("MADV_WILLNEED")
_advice("MADV_DONTFORK")
_advice("MADV_POPULATE_WRITE", since=(5, 14), touched=False)


@operation("MADV_REMOVE")
def _(watch: Watch) -> Range:
    pages = SharedPages(4)
    watch(pages.start, pages.end)
    pages.madvise(mmap.MADV_REMOVE, pages.part(1, 3))
    return pages.part(1, 3)


@operation("MADV_COLLAPSE")
def _(watch: Watch) -> None:
    if kernel() < (6, 1):
        raise NotHereError
    huge = 2 << 20
    pages = Pages(3 * huge // PAGE, touched=False)
    start = -(-pages.start // huge) * huge
    area = start, start + huge
    pages.madvise(mmap.MADV_NOHUGEPAGE, area)
    pages.write(area)
    pages.madvise(mmap.MADV_HUGEPAGE, area)
    watch(*area)
    pages.madvise(ADVICE["MADV_COLLAPSE"], area)


# Protection.


@operation("mprotect")
def _(watch: Watch) -> Range:
    pages = _watched(watch)
    pages.mprotect(mmap.PROT_READ, pages.part(1, 3))
    return pages.part(1, 3)


@operation("mprotect to nothing")
def _(watch: Watch) -> Range:
    pages = _watched(watch)
    pages.mprotect(PROT_NONE, pages.part(1, 3))
    return pages.part(1, 3)


@operation("mprotect that changes nothing")
def _(watch: Watch) -> None:
    pages = _watched(watch)
    pages.mprotect(PROT_READ_WRITE)


@operation("mlock and munlock")
def _(watch: Watch) -> None:
    pages = _watched(watch)
    pages.lock_and_unlock()


# Reading and writing.


@operation("first touch")
def _(watch: Watch) -> None:
    _watched(watch, touched=False).write()


@operation("plain reads and writes")
def _(watch: Watch) -> None:
    pages = _watched(watch)
    pages.read()
    pages.write()


@operation("first write to a page only read so far")
def _(watch: Watch) -> Range:
    pages = Pages(4, touched=False)
    pages.read()
    watch(pages.start, pages.end)
    pages.write(pages.page(1))
    return pages.page(1)


@operation("fork")
def _(watch: Watch) -> None:
    _watched(watch)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@operation("vfork, posix_spawn")
def _(watch: Watch) -> None:
    _watched(watch)
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


@operation("registering where nothing is mapped")
def _(watch: Watch) -> None:
    # The kernel puts nothing that low of its own accord.
    watch(16 * PAGE, 20 * PAGE)


# Files.


@operation("write to a mapped file")
def _(watch: Watch) -> None:
    pages = SharedPages(4)
    watch(pages.start, pages.end)
    os.pwrite(pages.fd, b"x" * PAGE, PAGE)


@operation("ftruncate by another process")
def _(watch: Watch) -> None:
    pages = SharedPages(4)
    watch(pages.start, pages.end)
    _run("truncate", "--size=0", f"/proc/{os.getpid()}/fd/{pages.fd}")


@operation("hole punched by another process")
def _(watch: Watch) -> Range:
    pages = SharedPages(4)
    watch(pages.start, pages.end)
    where = [f"--offset={PAGE}", f"--length={2 * PAGE}"]
    _run("fallocate", "--punch-hole", *where, f"/proc/{os.getpid()}/fd/{pages.fd}")
    return pages.part(1, 3)


def _watched(watch: Watch, *, touched: bool = True) -> Pages:
    pages = Pages(4, touched=touched)
    watch(pages.start, pages.end)
    return pages


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
