"""Watch real buffers while their memory is dropped, moved, unmapped and used again.

A program that remembers things about memory by its address (checksums, pointers,
registrations with a network card) is wrong as soon as that memory changes under
it. Each scene does that to a buffer, and shows what the program is told, and what
it would have got wrong without. Needs numpy and rich: pip install 'aioummu[demo]'.

Ends by itself with one line, and with status 1 if a change was missed:

    demo: backend=embedded events=8 missed=0

Events are the invalidations that were received. Missed is a change whose pages
were not all reported, or that could not be noticed yet when it had just been made.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import platform
import sys
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio
import anyio.to_thread
import attrs
import numpy as np
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import aioummu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self, TypeAlias

    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]

PAGE = mmap.PAGESIZE
#: So large that malloc() maps it, instead of carving it out of the heap.
LARGE = 40 << 20
#: Seconds after which a report counts as missed. None takes a thousandth of that.
PATIENCE = 10.0

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
LIBC.mmap.argtypes += [ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# The buffers, and what happens to them. Each change returns what a program that had
# not been told would have got wrong.


class Mapped:
    """Memory straight from the kernel."""

    def __init__(self, pages: int = 64) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, pages * PAGE, flags=flags)
        self.memory[:] = b"data" * (len(self.memory) // 4)

    def write(self) -> str:
        """Use it as any memory is used."""
        self.memory[: 16 * PAGE] = bytes(16 * PAGE)
        return (
            "All is as the program knows it, and it learns that from one load, without "
            "a system call."
        )

    def drop(self) -> str:
        """Tell the kernel that some contents are not needed any more."""
        before = self.memory[16 * PAGE :][:4]
        self.memory.madvise(mmap.MADV_DONTNEED, 16 * PAGE, 8 * PAGE)
        after = self.memory[16 * PAGE :][:4]
        return (
            f"the program has cached that page 16 begins with {before!r}. It reads "
            f"{after!r} now, and a network card would still send the old page."
        )

    def halve(self) -> str:
        """Give the end of it back."""
        self.memory.resize(len(self.memory) // 2)
        return (
            "a pointer into the second half would crash the program, or hit whatever "
            "is mapped there next."
        )

    def close(self) -> str:
        """Give all of it back."""
        self.memory.close()
        return (
            "a network card that was given these addresses would write into pages "
            "that nobody reads any more."
        )

    def protect(self) -> str:
        """Let nobody write to some pages, as garbage collectors and debuggers do."""
        start = start_of(self.memory) + 8 * PAGE
        if LIBC.mprotect(start, 16 * PAGE, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
        return "a device goes on writing to pages that the program may only read."


class Enclosed(Mapped):
    """Memory that cannot grow where it is."""

    def __init__(self) -> None:
        super().__init__()
        enclose(self.memory)

    def grow(self) -> str:
        """Have the kernel find another place for it."""
        before = start_of(self.memory)
        self.memory.resize(2 * len(self.memory))
        return moved(before, start_of(self.memory))


class Bytes:
    """The most ordinary buffer of Python, but large."""

    def __init__(self) -> None:
        self.memory = bytearray(b"data") * (LARGE // 4)
        enclose(self.memory)

    def grow(self) -> str:
        """Append as much again: realloc() has the kernel move it."""
        before = start_of(self.memory)
        self.memory += bytes(LARGE)
        return moved(before, start_of(self.memory))

    def free(self) -> str:
        """Let go of it, so that the C library gives it back to the kernel."""
        self.memory = bytearray()
        return (
            "a task that has kept the address learns nothing of what another thread "
            "frees. It held Python's lock while the memory went: no Python code could "
            "have come in between."
        )


class Array:
    """A numpy array, whose address the next one gets."""

    def __init__(self) -> None:
        self.arrays = [np.ones(LARGE // 8)]

    @property
    def memory(self) -> Floats:
        """The array that is there now."""
        return self.arrays[0]

    def replace(self) -> str:
        """Free it, and make another one, as any loop over batches does."""
        start, cached = start_of(self.memory), zlib.crc32(self.memory.data)
        self.arrays.clear()
        self.arrays.append(array_at(start))
        return (
            f"the new array lies at {start:#x} as well. A cache that asks by address "
            f"would answer {cached:#010x} for its checksum, which is "
            f"{zlib.crc32(self.memory.data):#010x}."
        )

    def free(self) -> str:
        """Free the second one as well."""
        self.arrays.clear()
        return "the same again: an address has many lives, and each one ends."


def start_of(buffer: mmap.mmap | bytearray | Floats) -> int:
    """Return the address of the first byte, without keeping the buffer alive."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def array_at(start: int) -> Floats:
    """Return the first array that gets this address, which is free."""
    others: list[Floats] = []
    for _ in range(100):
        # The first one, unless another thread is faster.
        array = np.empty(LARGE // 8)
        if start_of(array) == start:
            array.fill(2)
            return array
        others.append(array)
    raise RuntimeError(f"no array gets the address {start:#x} again")


def moved(before: int, after: int) -> str:
    """Say what the move of a buffer spoils."""
    return (
        f"the data is at {after:#x} now. The pointer that the program has kept, "
        f"{before:#x}, leads to nothing."
    )


def enclose(buffer: mmap.mmap | bytearray) -> None:
    """Have something mapped right behind a buffer, if there is nothing yet."""
    # An address that is taken is no error: then the page is put elsewhere.
    behind = -(-(start_of(buffer) + len(buffer)) // PAGE) * PAGE
    LIBC.mmap(behind, PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


# The scenes.


class Buffer(Protocol):
    """Something with memory to watch."""

    @property
    def memory(self) -> mmap.mmap | bytearray | Floats:
        """What has the memory now."""
        ...


B = TypeVar("B", bound=Buffer)


@attrs.frozen
class Report:
    """What is to be reported of a change."""

    first: int = 0
    """The first page of the buffer that changes."""
    behind: int | None = None
    """The first page behind; without, the buffer's end."""
    exact: bool = True
    """Whether it is one invalidation, whose addresses the report then has."""


@attrs.frozen
class Step(Generic[B]):
    """One change of a buffer."""

    what: str
    change: Callable[[B], str]
    driver: Report | None
    """What the driver reports; None: nothing."""
    embedded: Report | None
    rearm: bool = False
    """Watch anew what is mapped there by now."""
    in_thread: bool = False

    def expected(self, backend: str) -> Report | None:
        """Return what this backend reports, as docs/backends.md has it."""
        return {"driver": self.driver, "embedded": self.embedded}[backend]


@attrs.frozen
class Scene(Generic[B]):
    """A buffer, and all that happens to it while it is watched."""

    name: str
    make: Callable[[], B]
    steps: Sequence[Step[B]]


def both(
    what: str,
    change: Callable[[B], str],
    report: Report | None,
    *,
    rearm: bool = False,
    in_thread: bool = False,
) -> Step[B]:
    """Make a step that both backends report alike."""
    return Step(what, change, report, report, rearm, in_thread)


SCENES: Sequence[Scene[Any]] = [
    Scene(
        "mmap",
        Mapped,
        [
            both("is written to", Mapped.write, None),
            both(
                "drops its pages 16 to 23: madvise(MADV_DONTNEED)",
                Mapped.drop,
                Report(16, 24),
            ),
            both("is halved: mmap.resize()", Mapped.halve, Report(32)),
            both("is closed: mmap.close()", Mapped.close, Report(0, 32)),
        ],
    ),
    Scene(
        "growing mmap",
        Enclosed,
        [
            both(
                "has to move to grow: mmap.resize(), mremap()",
                Enclosed.grow,
                Report(exact=False),
            )
        ],
    ),
    Scene(
        "bytearray",
        Bytes,
        [both("grows: bytearray +=, realloc()", Bytes.grow, Report(exact=False))],
    ),
    Scene(
        "shared bytearray",
        Bytes,
        [
            both(
                "is freed by another thread",
                Bytes.free,
                Report(),
                in_thread=True,
            )
        ],
    ),
    Scene(
        "numpy array",
        Array,
        [
            both("is freed, and its address is used again", Array.replace, Report()),
            both("is freed after region.rearm()", Array.free, Report(), rearm=True),
        ],
    ),
    Scene(
        "read-only mmap",
        Mapped,
        [
            Step(
                "loses the right to be written, pages 8 to 23: mprotect()",
                Mapped.protect,
                driver=Report(8, 24),
                embedded=None,
            )
        ],
    ),
]


# The program that is told.


#: What is known of a page, in the order in which it matters.
UNCHANGED, DOUBTFUL, CHANGED = b"\0", b"\1", b"\2"


class Watched:
    """What the program knows about the pages of a buffer."""

    def __init__(self, name: str, region: aioummu.Region) -> None:
        self.name = name
        self.region = region
        self.first_page = region.start // PAGE
        self.pages = (region.end - 1) // PAGE + 1 - self.first_page
        #: All events, and those of this step.
        self.events = 0
        self.step: list[aioummu.Inval] = []
        #: Of each page.
        self.states = bytearray(self.pages)
        self.spent = False

    def numbers(self, start: int, end: int) -> range:
        """Return the numbers of the pages that have these addresses."""
        return range(start // PAGE - self.first_page, -(-end // PAGE) - self.first_page)

    def take(self, event: aioummu.Inval) -> None:
        """Note what an event says."""
        self.events += 1
        self.step.append(event)
        pages = self.numbers(event.start, event.end)
        part = slice(pages.start, pages.stop)
        if event.exact:
            self.states[part] = CHANGED * len(pages)
        else:
            self.states[part] = self.states[part].replace(UNCHANGED, DOUBTFUL)
        self.spent = self.region.spent

    def rearm(self) -> None:
        """Watch anew, and so forget."""
        self.region.rearm()
        self.states = bytearray(self.pages)
        self.spent = False

    def addresses(self, report: Report) -> tuple[int, int]:
        """Return what a report is about."""
        behind = self.pages if report.behind is None else report.behind
        start = (self.first_page + report.first) * PAGE
        end = (self.first_page + behind) * PAGE
        return max(start, self.region.start), min(end, self.region.end)

    def reported(self, report: Report) -> bool:
        """Whether every page of it was, in this step."""
        told: set[int] = set()
        for event in self.step:
            told.update(self.numbers(event.start, event.end))
        return told.issuperset(self.numbers(*self.addresses(report)))

    def reported_exactly(self, report: Report) -> bool:
        """Whether the one event of this step has its addresses."""
        return [(e.exact, e.start, e.end) for e in self.step] == [
            (True, *self.addresses(report))
        ]


class Program:
    """Plays the scenes in one task, and is told in another."""

    def __init__(self, notifier: aioummu.Notifier, view: View) -> None:
        self.notifier = notifier
        self.view = view
        self.watched: dict[aioummu.Region, Watched] = {}
        self.events = 0
        self.missed = 0
        self._told = anyio.Event()

    async def run(self) -> None:
        """Play all scenes."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.receive)
            for scene in SCENES:
                await self.play(scene)
            tasks.cancel_scope.cancel()

    async def receive(self) -> None:
        """Take the events as they come: the only consumer."""
        async for event in self.notifier:
            match event:
                case aioummu.Inval(region=region):
                    self.events += 1
                    self.watched[region].take(event)
                    self.view.show_event(event, self.watched[region])
                case aioummu.Last(generation=generation):
                    self.view.show_last(generation)
                    self._told.set()

    async def settled(self) -> bool:
        """Return when all that was reported has been received, or false if not."""
        with anyio.move_on_after(PATIENCE):
            while self.notifier.changed:
                self._told = anyio.Event()
                await self._told.wait()
            return True
        return False

    async def play(self, scene: Scene[Any]) -> None:
        """Have everything happen to the buffer of a scene."""
        buffer = scene.make()
        with self.notifier.register(buffer.memory) as region:
            watched = self.watched[region] = Watched(scene.name, region)
            self.view.show_scene(watched)
            for step in scene.steps:
                await self.change(watched, step, buffer)

    async def change(self, watched: Watched, step: Step[B], buffer: B) -> None:
        """Have one thing happen, and see whether it was reported."""
        watched.step.clear()
        if step.rearm:
            watched.rearm()
        self.view.show_step(watched, step.what)
        await self.view.pause(0.4)
        before = self.notifier.generation
        if step.in_thread:
            lesson = await anyio.to_thread.run_sync(step.change, buffer)
        else:
            lesson = step.change(buffer)
        # What a cache asks before it answers: must be true as soon as it is done.
        noticed = self.notifier.generation > before
        complete = await self.settled()
        report = step.expected(self.notifier.backend)
        if report and not (noticed and complete and watched.reported(report)):
            self.missed += 1
            self.view.show_missed(noticed=noticed, complete=complete)
        else:
            self.view.show_verdict(self.verdict(watched, step))
        self.view.show_lesson(lesson, untold=step.driver is not None)
        await self.view.pause(0.8)

    def verdict(self, watched: Watched, step: Step[B]) -> str:
        """Compare a report that was not missed with what was to be expected."""
        backend = self.notifier.backend
        report = step.expected(backend)
        if report is None and watched.step:
            return "reported, though it need not be"
        if report is None and step.driver is None:
            return "nothing reported, and rightly so"
        if report is None:
            return f"not reported by the {backend} backend (see docs/backends.md)"
        if report.exact and not watched.reported_exactly(report):
            return "reported, with other changes of the same memory"
        return "reported"


# What people see.


@attrs.frozen
class Glyphs:
    """What there is to draw with."""

    pages: str
    """A page that is unchanged, doubtful, changed."""
    step: str
    """Draws attention to what happens next."""


UNICODE = Glyphs("█▒░", "▸")
ASCII = Glyphs("#?.", ">")
STYLES = ("green", "yellow", "red")
LEGEND = ("unchanged", "perhaps", "changed")

#: From this width on, there is a column for the addresses.
WIDE = 95


class View:
    """A log of what happens; in a terminal, with the buffers below, live."""

    def __init__(self, console: Console, *, live: bool, pace: float) -> None:
        self.console = console
        self.pace = pace
        self.glyphs = ASCII if console.options.ascii_only else UNICODE
        self.rows: list[Watched] = []
        # Drawn when something happens: no need for a thread that does it.
        self._live = Live(self, console=console, auto_refresh=False) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        elif exc_type is None:
            self.console.print(self)

    async def pause(self, share: float) -> None:
        """Let people read."""
        await anyio.sleep(share * self.pace)

    def show_title(self, backend: str) -> None:
        """Say what this is about."""
        title = f"aioummu, {backend} backend, Linux {platform.release()}"
        self._say(title, "bold")
        self._say(
            "A program remembers things by the address of memory. Here is what it is "
            "told when that memory changes, and what it would get wrong without."
        )

    def show_scene(self, watched: Watched) -> None:
        """Begin with a buffer."""
        self.rows.append(watched)

    def show_step(self, watched: Watched, what: str) -> None:
        """Say what happens next."""
        self.console.print()
        self._say(f"{self.glyphs.step} {watched.name} {what}", "bold cyan")

    def show_event(self, event: aioummu.Inval, watched: Watched) -> None:
        """Log an event."""
        pages = watched.numbers(event.start, event.end)
        self._say(
            f"Inval  {event.start:#x}-{event.end:#x}, "
            + (
                f"exact: pages {pages[0]} to {pages[-1]} of {watched.pages:,}"
                if event.exact
                else f"several changes within its {watched.pages:,} pages"
            ),
            "red" if event.exact else "yellow",
            indent=2,
        )

    def show_last(self, generation: int) -> None:
        """Log that there is no more."""
        self._say(f"Last   generation {generation}: that was all", "dim", indent=2)

    def show_verdict(self, verdict: str) -> None:
        """Say whether it was reported."""
        self._say(f"= {verdict}", "green", indent=2)

    def show_missed(self, *, noticed: bool, complete: bool) -> None:
        """Say that it should have been reported."""
        why = "" if noticed else ", and not noticed at once"
        why += "" if complete else ", and the end of the reports never came"
        self._say(f"= MISSED{why}", "bold white on red", indent=2)

    def show_lesson(self, lesson: str, *, untold: bool) -> None:
        """Say what goes wrong if nobody tells."""
        self._say(f"Untold: {lesson}" if untold else lesson, indent=2)

    def _say(self, text: str, style: str = "", indent: int = 0) -> None:
        width = self.console.width - indent
        for line in Text(text, style).wrap(self.console, width):
            line.rstrip()
            self.console.print(" " * indent, line, sep="")

    def __rich__(self) -> Table:
        wide = self.console.width >= WIDE
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=self._legend())
        # Wide enough from the start, so that nothing jumps later.
        names = max(len(scene.name) for scene in SCENES)
        table.add_column("buffer", min_width=min(names, self.console.width // 4))
        if wide:
            table.add_column("addresses")
        table.add_column("its pages", no_wrap=True)
        table.add_column("events" if wide else "ev.", justify="right")
        table.add_column("region")
        for watched in self.rows:
            region = watched.region
            table.add_row(
                watched.name,
                *([f"{region.start:#x}-{region.end:#x}"] if wide else []),
                self._map(watched),
                str(watched.events),
                self._state(watched),
                style="" if region.registered else "dim",
            )
        return table

    def _state(self, watched: Watched) -> str:
        if watched.spent:
            return "spent"
        return "watched" if watched.region.registered else "released"

    def _map(self, watched: Watched) -> Text:
        """Draw the pages; a block has the worst that is known of its own."""
        others = 75 if self.console.width >= WIDE else 42
        blocks = max(8, min(32, self.console.width - others))
        text = Text()
        for block in range(blocks):
            first = block * watched.pages // blocks
            behind = (block + 1) * watched.pages // blocks
            state = max(watched.states[first:behind])
            text.append(self.glyphs.pages[state], STYLES[state])
        return text

    def _legend(self) -> Text:
        words = zip(self.glyphs.pages, STYLES, LEGEND, strict=True)
        return Text("   ").join(
            Text.assemble((glyph, style), f" {word}") for glyph, style, word in words
        )


async def demonstrate(
    view: View,
    *,
    backend: aioummu.Backend = "auto",
    device: aioummu.DeviceLike | None = None,
) -> int:
    """Play the scenes, on a device that is open already if there is one.

    :returns: the number of changes that were missed
    """
    async with aioummu.open_notifier(backend=backend, device=device) as notifier:
        program = Program(notifier, view)
        view.show_title(notifier.backend)
        with view:
            await program.run()
        print(
            f"demo: backend={notifier.backend} "
            f"events={program.events} missed={program.missed}"
        )
    return program.missed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "driver", "embedded"],
        default="auto",
        help="what to watch with (default: the driver where it is loaded)",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="draw as for a terminal, wherever the output goes",
    )
    parser.add_argument("--fast", action="store_true", help="no pauses for reading")
    return parser.parse_args()


def main(device: aioummu.DeviceLike | None = None) -> int:
    arguments = parse_arguments()
    console = Console(
        force_terminal=arguments.live or None, highlight=False, emoji=False
    )
    live = console.is_terminal and not console.is_dumb_terminal
    view = View(console, live=live, pace=1 if live and not arguments.fast else 0)
    run = partial(demonstrate, view, backend=arguments.backend, device=device)
    try:
        missed = anyio.run(run)
    except aioummu.UmmunotifyError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
