"""A live view for terminals."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import anyio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from memtrackd.tracking import Change, Client, TrackedRegion, Tracking

#: Seconds between two drawings.
PERIOD = 0.25
#: Seconds that the end waits for the terminal.
PATIENCE = 1.0
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_STEP = 1024


class View:
    """A listener that draws clients and the latest changes.

    Draws nothing while nothing happens, and never more often than it can: a
    terminal that is stopped (Ctrl-S) holds up a thread, and nobody else.
    """

    def __init__(self, tracking: Tracking, console: Console | None = None) -> None:
        #: Of the changes that are drawn; None is all.
        self.causes: frozenset[str] | None = None
        self._tracking = tracking
        self._console = console or Console()
        self._latest: deque[Text] = deque(maxlen=64)
        self._rates: dict[int, tuple[float, int, float]] = {}
        self._dirty = True

    async def run(self) -> None:
        """Draw until cancelled."""
        painter = _Painter(self._console)
        try:
            while painter.is_alive():
                if self._dirty and painter.is_idle:
                    # The rates fall to 0 when nothing happens any more.
                    self._dirty = any(rate for *_, rate in self._rates.values())
                    painter.paint(self.draw(time.time()))
                await anyio.sleep(PERIOD)
        finally:
            painter.finish()

    def draw(self, now: float) -> Group:
        """Return what is to be seen now."""
        height = max(self._console.height, 12)
        clients = list(self._tracking.clients.values())
        # Those that are attached first, and of each the newest.
        clients.sort(key=lambda c: (c.ended is not None, -c.id))
        shown = clients[: max(3, height // 2 - 4)]
        self._rates = {c.id: self._rates[c.id] for c in shown if c.id in self._rates}
        table = Table(expand=True, pad_edge=False, box=None)
        for heading in ("client", "program", "pid", "user", "backend"):
            table.add_column(heading, overflow="ellipsis", no_wrap=True)
        for heading in ("regions", "memory", "changes", "per second"):
            table.add_column(heading, justify="right", no_wrap=True)
        for client in shown:
            # Names of strangers: no markup in them.
            cells = (Text(cell) for cell in self._row(client, now))
            table.add_row(*cells, style="dim" * bool(client.ended))
        parts: list[RenderableType] = [self._title(), table]
        if len(clients) > len(shown):
            parts.append(Text(f"and {len(clients) - len(shown)} more", style="dim"))
        parts.append(Text())
        room = height - len(shown) - 6
        parts += list(self._latest)[-max(room, 3) :]
        return Group(*parts)

    def _title(self) -> Text:
        tracking = self._tracking
        return Text.assemble(
            ("memtrackd  ", "bold"),
            f"{tracking.attached_count} clients, {tracking.changes_total:,} changes",
        )

    def _row(self, client: Client, now: float) -> list[str]:
        who = client.credentials
        state = client.backend if client.ended is None else f"({client.reason})"
        return [
            client.name,
            who.program,
            str(who.pid),
            who.user,
            state,
            f"{len(client.regions):,}",
            size_of(client.bytes),
            f"{client.changes:,}",
            f"{self._rate(client, now):,.0f}",
        ]

    def _rate(self, client: Client, now: float) -> float:
        then, changes, rate = self._rates.get(client.id, (now, client.changes, 0.0))
        if now - then >= 1:
            rate = (client.changes - changes) / (now - then)
            then, changes = now, client.changes
        self._rates[client.id] = then, changes, rate
        return rate

    # What the tracking tells.

    def attached(self, client: Client) -> None:  # noqa: ARG002 - a listener
        """Draw it."""
        self._dirty = True

    def updated(
        self,
        client: Client,  # noqa: ARG002 - a listener
        added: Sequence[TrackedRegion],  # noqa: ARG002
        ended: Sequence[TrackedRegion],  # noqa: ARG002
    ) -> None:
        """Draw it."""
        self._dirty = True

    def changed(self, client: Client, changes: Sequence[Change]) -> None:
        """Draw it."""
        self._latest.extend(
            _line(client, change)
            for change in changes[-64:]
            if change.is_among(self.causes)
        )
        self._dirty = True

    def ended(self, client: Client) -> None:  # noqa: ARG002 - a listener
        """Draw it."""
        self._dirty = True

    def forgotten(self, client: Client) -> None:
        """Let go of it."""
        self._rates.pop(client.id, None)
        self._dirty = True


class _Painter(threading.Thread):
    """Draws on a terminal, which can take as long as that likes."""

    def __init__(self, console: Console) -> None:
        super().__init__(name="painter", daemon=True)
        self._console = console
        self._pictures: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self.is_idle = True
        self.start()

    def paint(self, picture: Group) -> None:
        """Draw this, some time."""
        self.is_idle = False
        self._pictures.put(picture)

    def finish(self) -> None:
        """Give the terminal back, if that does not take long."""
        self._pictures.put(None)
        self.join(PATIENCE)

    def run(self) -> None:
        """Draw what comes; ends early if the terminal is gone."""
        with (
            contextlib.suppress(OSError),
            Live(
                console=self._console,
                screen=self._console.is_terminal,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live,
        ):
            while (picture := self._pictures.get()) is not None:
                live.update(picture, refresh=True)
                self.is_idle = True


def _line(client: Client, change: Change) -> Text:
    region = client.region(change.cookie)
    clock = time.strftime("%H:%M:%S", time.localtime(change.time))
    size = size_of(change.end - change.start)
    return Text.assemble(
        (clock, "dim"),
        f"  {client.name}",
        ("  " + (region.name if region else f"cookie {change.cookie}"), "bold"),
        f"  {'+'.join(change.causes) or 'changed'}",
        f"  {change.start:#x}-{change.end:#x}",
        f"  {size}" if change.exact else f"  somewhere in {size}",
        no_wrap=True,
        overflow="ellipsis",
    )


def size_of(number: int) -> str:
    """Write a number of bytes for people."""
    exponent = min(max(number.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{number / _STEP**exponent:.4g} {_UNITS[exponent]}"
