"""What people see of the demo: a log, and the buffers with a map of their pages."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import anyio
import attrs
from demo_scenes import SCENES
from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from demo import Watched
    from rich.console import Console

    import aioummu


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
        # Drawn anew with each line of the log: no thread is needed for that.
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

    def show_missed(self, *, complete: bool) -> None:
        """Say that it should have been reported."""
        why = "" if complete else ": the end of the reports never came"
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
