"""Structured lines: what happens to clients and their memory, as JSON or text.

A thread writes them, because writing to a file, terminal or pipe can wait. Lines
that come faster than they can be written are dropped, and counted.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import structlog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from memtrackd.tracking import Change, Client, Credentials, TrackedRegion

LogFormat: TypeAlias = Literal["text", "json", "off"]

#: Lines that wait to be written.
LINES = 10_000
#: Regions that come or go at once and have a line each.
APART = 100
#: Seconds that the end waits for the last lines.
PATIENCE = 2.0


class LineWriter:
    """Writes lines to a file or standard error, from a thread of its own.

    Synchronization: any thread may call anything.

    :param path: the file, appended to; None: standard error
    :raises OSError: if the file cannot be opened
    """

    def __init__(self, path: Path | None) -> None:
        self.dropped = 0
        """Lines that were not written."""
        self.lost = False
        """Whether some of them are not mentioned yet."""
        self._path = path
        self._fd = self._open()
        self._lines: queue.Queue[str | None] = queue.Queue(LINES)
        self._reopen = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def is_terminal(self) -> bool:
        """Whether people read it right away."""
        return os.isatty(self._fd)

    def write(self, line: str) -> None:
        """Have a line written; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1
            self.lost = True

    def reopen(self) -> None:
        """Open the file again, after somebody has moved it away (logrotate)."""
        self._reopen.set()

    def close(self) -> None:
        """Write what is there, for at most :data:`PATIENCE` seconds."""
        self._closing.set()
        try:
            self._lines.put(None, timeout=PATIENCE)
        except queue.Full:
            return
        self._thread.join(PATIENCE)

    def _open(self) -> int:
        if self._path is None:
            return sys.stderr.fileno()
        # Who reads a FIFO is not waited for, nor while it is full.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self._path, flags, 0o640)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            lines = [line]
            last = False
            while not self._lines.empty() and len(lines) < 256:  # noqa: PLR2004
                line = self._lines.get()
                if line is None:
                    last = True
                    break
                lines.append(line)
            if self._reopen.is_set():
                self._reopen.clear()
                self._open_again()
            self._write_all(("\n".join(lines) + "\n").encode(), len(lines))
            if last:
                return

    def _open_again(self) -> None:
        try:
            fd = self._open()
        except OSError:
            # The old one is better than none.
            return
        if self._path is not None:
            os.close(self._fd)
        self._fd = fd

    def _write_all(self, data: bytes, lines: int) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            # The disk is full, or the reader of a pipe is gone.
            self.dropped += lines
            self.lost = True


class LogOutput:
    """A listener that writes a line for everything that happens.

    :param writer: where to
    :param style: ``"json"`` or ``"text"``; ``"off"``: only what concerns the daemon
    """

    def __init__(self, writer: LineWriter, style: LogFormat) -> None:
        self._writer = writer
        self.style: LogFormat = style
        #: Of the changes that get a line; None is all.
        self.causes: frozenset[str] | None = None
        self.set_style(style)

    def set_style(self, style: LogFormat) -> None:
        """Write lines of another kind from now on."""
        self.style = style
        render: Any = (
            structlog.processors.JSONRenderer()
            if style == "json"
            else structlog.dev.ConsoleRenderer(
                colors=self._writer.is_terminal, pad_event_to=10
            )
        )
        self._log: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            _Sink(self._writer),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                render,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            cache_logger_on_first_use=True,
        ).bind()

    # About the daemon.

    def started(self, **facts: object) -> None:
        """Say that the daemon is ready."""
        self._log.info("started", **facts)

    def ending(self, reason: str) -> None:
        """Say that it ends."""
        self._log.info("ending", reason=reason)

    def reloaded(self, **facts: object) -> None:
        """Say that it has another configuration now."""
        self._log.info("reloaded", **facts)

    def refused(self, credentials: Credentials, reason: str) -> None:
        """Say that a client was sent away."""
        self._log.warning(
            "refused",
            pid=credentials.pid,
            user=credentials.user,
            program=credentials.program,
            reason=reason,
        )

    def trouble(self, what: str) -> None:
        """Say that the daemon cannot do something."""
        self._log.error("trouble", what=what)

    # About clients.

    def attached(self, client: Client) -> None:
        """Say that there is a new client."""
        if self.style != "off":
            self._log.info(
                "attached",
                client=client.id,
                name=client.name,
                backend=client.backend,
                pid=client.credentials.pid,
                user=client.credentials.user,
                program=client.credentials.program,
            )

    def updated(
        self,
        client: Client,
        added: Sequence[TrackedRegion],
        ended: Sequence[TrackedRegion],
    ) -> None:
        """Say that regions came and went."""
        if self.style != "off":
            for what, regions in (("unregistered", ended), ("registered", added)):
                if len(regions) > APART:
                    self._log.info(
                        what,
                        client=client.id,
                        name=client.name,
                        regions=len(regions),
                    )
                    continue
                for region in regions:
                    self._log.info(
                        what,
                        client=client.id,
                        name=client.name,
                        region=region.name,
                        cookie=region.cookie,
                        start=f"{region.start:#x}",
                        end=f"{region.end:#x}",
                    )

    def changed(self, client: Client, changes: Sequence[Change]) -> None:
        """Say what happened to memory."""
        if self._writer.lost:
            self._writer.lost = False
            self._log.warning("dropped", lines=self._writer.dropped)
        if self.style != "off":
            for change in changes:
                if not change.is_among(self.causes):
                    continue
                region = client.region(change.cookie)
                self._log.info(
                    "changed",
                    client=client.id,
                    name=client.name,
                    region=None if region is None else region.name,
                    cookie=change.cookie,
                    start=f"{change.start:#x}",
                    end=f"{change.end:#x}",
                    exact=change.exact,
                    cause="+".join(change.causes) or None,
                )

    def ended(self, client: Client) -> None:
        """Say that a client is not attached any more."""
        if self.style != "off":
            self._log.info(
                "ended",
                client=client.id,
                name=client.name,
                reason=client.reason,
                changes=client.changes,
                generation=client.generation,
            )

    def forgotten(self, client: Client) -> None:
        """Nobody needs to know."""


class _Sink:
    """What structlog hands its lines to, whatever their level."""

    def __init__(self, writer: LineWriter) -> None:
        self.info = self.warning = self.error = writer.write
