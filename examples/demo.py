"""Watch real buffers while their memory is dropped, moved, unmapped and used again.

A program that remembers things about memory by its address (checksums, pointers,
registrations with a network card) is wrong as soon as that memory changes under
it. Each scene does that to a buffer, and shows what the program is told, and what
it would have got wrong without. Needs numpy and rich: pip install 'aioummu[demo]'.

Ends by itself with one line, and with status 1 if a change was missed:

    demo: backend=embedded events=8 missed=0

Events are the invalidations that were received. Missed is a change of which not
every page was reported, or of which the notifier did not know when it was done.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from demo_scenes import PAGE, SCENES
from demo_view import View
from rich.console import Console

import aioummu

if TYPE_CHECKING:
    from demo_scenes import B, Report, Scene, Step

#: Seconds after which a report counts as missed. None takes a thousandth of that.
PATIENCE = 10.0

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
            # As a cache asks before it answers: true as soon as something has changed,
            # so if it is not, then nothing is waited for.
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
        if step.in_thread:
            lesson = await anyio.to_thread.run_sync(step.change, buffer)
        else:
            lesson = step.change(buffer)
        complete = await self.settled()
        report = step.expected(self.notifier.backend)
        if report and not (complete and watched.reported(report)):
            self.missed += 1
            self.view.show_missed(complete=complete)
        else:
            self.view.show_verdict(self.verdict(watched, step))
        self.view.show_lesson(lesson, untold=step.report is not None)
        await self.view.pause(0.8)

    def verdict(self, watched: Watched, step: Step[B]) -> str:
        """Compare a report that was not missed with what was to be expected."""
        backend = self.notifier.backend
        report = step.expected(backend)
        if report is None and watched.step:
            return "reported, though it need not be"
        if report is None and step.report is None:
            return "nothing reported, and rightly so"
        if report is None:
            return f"not reported by the {backend} backend (see docs/backends.md)"
        if report.exact and not watched.reported_exactly(report):
            return "reported, with other changes of the same memory"
        return "reported"


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
