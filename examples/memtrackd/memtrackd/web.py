"""The web page with its live events, and what Prometheus reads.

A viewer never costs more than its bounded queue: who is too slow loses the queue, is
told so, and starts again from a snapshot.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections import deque
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import attrs
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    import socket
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterable,
        Sequence,
    )

    from memtrackd.tracking import Change, Client, TrackedRegion, Tracking

#: Seconds in which what happens to a client is joined.
TICK = 0.05
#: Rows that are enough for a message, even if the tick is not over; of a snapshot,
#: those that are encoded at a time.
ROWS = 2048
#: What waits for one viewer.
QUEUE_MESSAGES = 1000
QUEUE_BYTES = 4 << 20
#: Viewers at a time.
VIEWERS = 64
#: Seconds after which a viewer that takes nothing at all is hung up on.
PATIENCE = 60.0
#: Seconds between two signs of life, through proxies and to notice who has left.
HEARTBEAT = 15.0
#: Seconds that the end waits for requests that are being answered.
GRACE = 0.5

_STATIC = Path(__file__).parent / "static"
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Json: TypeAlias = dict[str, Any]
T = TypeVar("T")


class _Message(NamedTuple):
    """What every viewer gets, encoded once."""

    number: int
    client: int
    data: bytes


class _Counted(NamedTuple):
    """A region, with its counters as they were at a moment."""

    region: TrackedRegion
    changes: int
    causes: Json


@attrs.define
class _Regions:
    """Regions of one client that came and went, the latter first."""

    added: dict[int, Json] = attrs.field(factory=dict)
    ended: dict[int, None] = attrs.field(factory=dict)


@attrs.define
class _Changes:
    """Reports of one client that followed each other."""

    rows: list[list[Any]] = attrs.field(factory=list)
    time: float = 0.0


@attrs.define
class _Pending:
    """What happened to a client in this tick, in its order."""

    client: Client
    parts: list[_Regions | _Changes] = attrs.field(factory=list)
    rows: int = 0


class _Viewer:
    """The queue of somebody who looks."""

    def __init__(self) -> None:
        self.lost = 0
        """Messages that it did not get; above 0 it needs a snapshot."""
        self.marks: dict[int, int] = {}
        """By client: the last message that its snapshot already had."""
        self.wakeup = asyncio.Event()
        self._queue: deque[_Message] = deque()
        self._size = 0

    def put(self, message: _Message) -> int:
        """Queue it; return how many messages the viewer lost by it."""
        if self.lost:
            lost = 1
        elif (
            len(self._queue) < QUEUE_MESSAGES
            and self._size + len(message.data) <= QUEUE_BYTES
        ):
            self._queue.append(message)
            self._size += len(message.data)
            lost = 0
        else:
            lost = len(self._queue) + 1
            self._queue.clear()
            self._size = 0
        self.lost += lost
        self.wakeup.set()
        return lost

    def take(self) -> bytes:
        """Return what is queued and not yet known to the viewer."""
        self.wakeup.clear()
        data = b"".join(
            message.data
            for message in self._queue
            if message.number > self.marks.get(message.client, 0)
        )
        self._queue.clear()
        self._size = 0
        # What the snapshot had came before what was queued just now.
        self.marks.clear()
        return data


class Feed:
    """A listener that tells viewers what happens.

    Costs nothing while nobody looks. Synchronization: for the event loop's thread
    only.
    """

    def __init__(self, tracking: Tracking) -> None:
        self.dropped = 0
        """Messages that viewers did not get because they were too slow."""
        self._tracking = tracking
        self._viewers: set[_Viewer] = set()
        self._pending: dict[int, _Pending] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0
        self._closed = False

    @property
    def viewers(self) -> int:
        """How many look."""
        return len(self._viewers)

    def close(self) -> None:
        """Say goodbye to all viewers."""
        self._closed = True
        for viewer in self._viewers:
            viewer.wakeup.set()

    async def follow(self) -> AsyncIterator[bytes]:
        """Return what to send to a viewer, as text/event-stream; at first a snapshot.

        Whoever takes too long to ask for more loses messages.
        """
        viewer = _Viewer()
        self._viewers.add(viewer)
        try:
            yield b"retry: 2000\n\n"
            async for piece in self._snapshot_event(viewer):
                yield piece
            while not self._closed:
                if viewer.lost:
                    yield _event("lost", {"messages": viewer.lost})
                    viewer.lost = 0
                    async for piece in self._snapshot_event(viewer):
                        yield piece
                elif data := viewer.take():
                    yield data
                else:
                    try:
                        async with asyncio.timeout(HEARTBEAT):
                            await viewer.wakeup.wait()
                    except TimeoutError:
                        yield b":\n\n"
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._pending.clear()

    async def snapshot(self, marks: dict[int, int] | None = None) -> AsyncIterator[str]:
        """Return JSON with all clients, in pieces between which others may run.

        :param marks: gets, by client, the number of the last message that is in it
        """
        yield f'{{"time":{time.time()},"clients":['
        comma = ""
        for client in list(self._tracking.clients.values()):
            if client.id not in self._tracking.clients:
                # Forgotten meanwhile.
                continue
            # What the queues get from now on is not in the snapshot.
            self._flush(client.id)
            if marks is not None:
                marks[client.id] = self._number
            head, regions, history = _rows(client)
            yield f'{comma}{_dump(head)[:-1]},"regions":['
            for piece in _pieces(regions, _counted_region):
                yield piece
                await asyncio.sleep(0)
            yield '],"history":['
            for piece in _pieces(history, _past_change):
                yield piece
            yield "]}"
            comma = ","
            await asyncio.sleep(0)
        yield "]}"

    async def _snapshot_event(self, viewer: _Viewer) -> AsyncIterator[bytes]:
        yield b"event: snapshot\n"
        async for piece in self.snapshot(viewer.marks):
            # Lines of data are joined with line ends, which JSON allows.
            yield b"data: " + piece.encode() + b"\n"
        yield b"\n"

    # What the tracking tells.

    def attached(self, client: Client) -> None:
        """Say that there is a new client."""
        if self._viewers:
            head, regions, history = _rows(client)
            everything = {
                **head,
                "regions": [_counted_region(region) for region in regions],
                "history": [_past_change(change) for change in history],
            }
            self._send(client, "attached", {"time": time.time(), "client": everything})

    def updated(
        self,
        client: Client,
        added: Sequence[TrackedRegion],
        ended: Sequence[TrackedRegion],
    ) -> None:
        """Say that regions came and went."""
        if not self._viewers:
            return
        pending = self._pending_of(client)
        part = pending.parts[-1] if pending.parts else None
        # A region that came and went within a tick was there all the same.
        if not isinstance(part, _Regions) or any(r.cookie in part.added for r in ended):
            part = _Regions()
            pending.parts.append(part)
        part.ended.update(dict.fromkeys(r.cookie for r in ended))
        part.added.update((r.cookie, _region(r)) for r in added)
        self._added(pending, len(added) + len(ended))

    def changed(self, client: Client, changes: Sequence[Change]) -> None:
        """Say what happened to memory."""
        if not self._viewers:
            return
        pending = self._pending_of(client)
        part = pending.parts[-1] if pending.parts else None
        if not isinstance(part, _Changes):
            part = _Changes()
            pending.parts.append(part)
        part.time = changes[-1].time if changes else time.time()
        part.rows += (_change(change) for change in changes)
        self._added(pending, len(changes))

    def ended(self, client: Client) -> None:
        """Say that a client is not attached any more."""
        if self._viewers:
            self._flush(client.id)
            self._send(client, "ended", {"time": client.ended, "reason": client.reason})

    def forgotten(self, client: Client) -> None:
        """Say that nobody will hear of this client again."""
        if self._viewers:
            self._flush(client.id)
            self._send(client, "forgotten", {})

    def _pending_of(self, client: Client) -> _Pending:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(TICK, self._tick)
        return self._pending.setdefault(client.id, _Pending(client))

    def _added(self, pending: _Pending, rows: int) -> None:
        """Note that there is more, and send it if it is much."""
        pending.rows += rows
        if pending.rows >= ROWS:
            self._flush(pending.client.id)

    def _tick(self) -> None:
        self._timer = None
        for number in list(self._pending):
            self._flush(number)

    def _flush(self, number: int) -> None:
        """Send what is pending of this client."""
        pending = self._pending.pop(number, None)
        if pending is None:
            return
        client = pending.client
        for part in pending.parts:
            if isinstance(part, _Regions):
                self._send(
                    client,
                    "regions",
                    {
                        "time": time.time(),
                        "added": list(part.added.values()),
                        "ended": list(part.ended),
                    },
                )
            else:
                self._send(
                    client,
                    "changes",
                    {
                        "time": part.time,
                        "generation": client.generation,
                        "changes": part.rows,
                    },
                )

    def _send(self, client: Client, name: str, content: Json) -> None:
        if name != "attached":
            content = {"client": client.id, **content}
        self._number += 1
        message = _Message(self._number, client.id, _event(name, content))
        for viewer in self._viewers:
            self.dropped += viewer.put(message)


def make_app(
    tracking: Tracking,  # noqa: ARG001 - the feed knows it
    feed: Feed,
    metrics: Callable[[], Awaitable[bytes]],
    *,
    loopback_only: bool = True,
    hosts: Collection[str] = (),
) -> web.Application:
    """Return the application.

    :param metrics: makes what Prometheus reads
    :param loopback_only: refuse requests for a host that is no address and not
        localhost: a page from elsewhere could give its own name our address, and
        then read what it likes (DNS rebinding)
    :param hosts: names that are good besides
    """
    app = web.Application(middlewares=[_host_check(hosts)] if loopback_only else [])
    app.on_response_prepare.append(_add_headers)
    app.on_shutdown.append(_closer(feed))

    async def page(request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "index.html")
        if name not in _FILES:
            raise web.HTTPNotFound
        return web.FileResponse(_STATIC / name, headers={"Content-Type": _FILES[name]})

    async def events(request: web.Request) -> web.StreamResponse:
        if feed.viewers >= VIEWERS:
            raise web.HTTPServiceUnavailable(
                text=f"There are {VIEWERS} viewers already.\n"
            )
        response = await _stream(request, "text/event-stream", feed.follow())
        # We end. Who has not taken what was sent would hold up the connection.
        transport = request.transport
        if transport is not None and transport.get_write_buffer_size():
            transport.abort()
        return response

    async def clients(request: web.Request) -> web.StreamResponse:
        pieces = (piece.encode() async for piece in feed.snapshot())
        return await _stream(request, "application/json", pieces)

    async def read_metrics(_: web.Request) -> web.Response:
        body = await metrics()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    for path, handler in (
        ("/", page),
        ("/static/{name}", page),
        ("/events", events),
        ("/api/clients", clients),
        ("/metrics", read_metrics),
        ("/healthz", health),
    ):
        app.router.add_get(path, handler, allow_head=False)
    return app


@asynccontextmanager
async def serve(
    app: web.Application, sockets: Iterable[socket.socket]
) -> AsyncIterator[None]:
    """Serve at listening sockets, until the end of the block."""
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=GRACE
    )
    await runner.setup()
    try:
        for listener in sockets:
            await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()


async def _stream(
    request: web.Request, content_type: str, pieces: AsyncIterator[bytes]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    try:
        await response.prepare(request)
        async for piece in pieces:
            async with asyncio.timeout(PATIENCE):
                await response.write(piece)
        async with asyncio.timeout(PATIENCE):
            await response.write_eof()
    except ConnectionError:
        # The viewer has left.
        pass
    except BaseException:
        # It takes nothing, or we end: what waits to be sent is not worth waiting.
        if request.transport is not None:
            request.transport.abort()
        raise
    finally:
        # At once, not when somebody collects the garbage.
        await pieces.aclose()  # type: ignore[attr-defined]
    return response


def _closer(feed: Feed) -> Callable[[web.Application], Awaitable[None]]:
    async def close(_: web.Application) -> None:
        feed.close()

    return close


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def _host_check(hosts: Collection[str]) -> Any:  # noqa: ANN401 - aiohttp has no type
    good = {"localhost", *(host.lower() for host in hosts)}

    @web.middleware
    async def check(
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        given = request.headers.getall("Host", [])
        if len(given) != 1 or not _is_good(given[0], good):
            raise web.HTTPMisdirectedRequest(
                text="memtrackd is asked for by an IP address or 'localhost' here, "
                f"not as {', '.join(given)[:80]!r}: so no page from elsewhere can "
                "read it.\n"
            )
        return await handler(request)

    return check


def _is_good(host: str, names: Collection[str]) -> bool:
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.partition(":")[0].lower()
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# JSON.


def _rows(client: Client) -> tuple[Json, list[_Counted], list[Change]]:
    """Return a client as it is now: all but its lists, its regions, its history."""
    who = client.credentials
    head = {
        "id": client.id,
        "name": client.name,
        "backend": client.backend,
        "pid": who.pid,
        "uid": who.uid,
        "gid": who.gid,
        "user": who.user,
        "program": who.program,
        "since": client.since,
        "ended": client.ended,
        "reason": client.reason,
        "generation": client.generation,
        "changes": client.changes,
        "unattributed": client.unattributed,
    }
    # Those that are there last, so that a cookie that was used again means them.
    regions = [
        _Counted(region, region.changes, dict(region.causes))
        for table in (client.ended_regions, client.regions)
        for region in table.values()
    ]
    return head, regions, list(client.history)


def _counted_region(counted: _Counted) -> Json:
    region = _region(counted.region)
    region["changes"], region["causes"] = counted.changes, counted.causes
    return region


def _region(region: TrackedRegion) -> Json:
    return {
        "cookie": region.cookie,
        "name": region.name,
        "start": hex(region.start),
        "end": hex(region.end),
        "since": region.since,
        "ended": region.ended,
        "changes": region.changes,
        "causes": dict(region.causes),
    }


def _past_change(change: Change) -> list[Any]:
    return [change.time, *_change(change)]


def _change(change: Change) -> list[Any]:
    # Numbers of JavaScript cannot hold addresses.
    return [
        change.cookie,
        hex(change.start),
        hex(change.end),
        change.exact,
        change.causes,
    ]


def _pieces(rows: list[T], render: Callable[[T], object]) -> Iterable[str]:
    """Return the rows as JSON, a few at a time, with commas."""
    for first in range(0, len(rows), ROWS):
        yield ("," if first else "") + _dump(
            [render(row) for row in rows[first : first + ROWS]]
        )[1:-1]


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(name: str, content: Json) -> bytes:
    return f"event: {name}\ndata: {_dump(content)}\n\n".encode()
