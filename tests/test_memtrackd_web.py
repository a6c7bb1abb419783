"""What memtrackd serves, without a browser: routes, events, viewers that are slow."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import attrs
import pytest
from prometheus_client import CONTENT_TYPE_LATEST

import aioummu

pytest.importorskip("memtrackd")
from memtrackd import web
from memtrackd.metrics import Metrics
from memtrackd.protocol import RegionEntry, Update
from memtrackd.tracking import Client, Credentials, Tracking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

# The tracking and the feed have no events to wait for, so tests look again.
# ruff: noqa: ASYNC110

# Seconds after which something has hung.
LIMIT = 20
PAGE = 4096
BASE = 0x7F3A_4000_0000
WHO = Credentials(4242, 1000, 1000, "ada", "python3")


@pytest.fixture(
    params=[{"use_uvloop": False}, {"use_uvloop": True}], ids=["asyncio", "uvloop"]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The daemon runs on asyncio."""
    return "asyncio", request.param


@attrs.define
class Site:
    """The application, served here."""

    tracking: Tracking
    feed: web.Feed
    origin: str
    port: int
    session: aiohttp.ClientSession

    def attach(self, name: str = "train.py") -> Client:
        return self.tracking.attach(name, "driver", WHO, time.time())

    def register(self, client: Client, *cookies: int, name: str = "weights") -> None:
        entries = tuple(
            RegionEntry(n, BASE + n * PAGE, BASE + (n + 1) * PAGE, name)
            for n in cookies
        )
        self.tracking.update(client, Update(register=entries), time.time())

    def invalidate(self, client: Client, *cookies: int) -> None:
        flags = aioummu.HINT | aioummu.Cause.UNMAP.value
        records = [
            (aioummu.INVAL, flags, BASE + n * PAGE, BASE + (n + 1) * PAGE, n)
            for n in cookies
        ]
        last = (aioummu.LAST, 0, 0, 0, client.generation + len(cookies))
        self.tracking.report(client, [*records, last], time.time())


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[Site]:  # noqa: ANN401
    tracking = Tracking(keep_ended=1)
    feed = web.Feed(tracking)
    tracking.listen(feed)
    metrics = Metrics(tracking, {}, {"web": lambda: feed.dropped})
    app = web.make_app(tracking, feed, metrics.render, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with (
        asyncio.timeout(LIMIT),
        web.serve(app, [listener]),
        aiohttp.ClientSession() as session,
    ):
        yield Site(tracking, feed, f"http://127.0.0.1:{port}", port, session)


class Events:
    """What a viewer gets."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self) -> tuple[str, Any]:
        name, data = "", ""
        while True:
            line = (await self._response.content.readuntil(b"\n")).decode().rstrip("\n")
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data += value + "\n"
            elif not line and name:
                return name, json.loads(data)

    async def skip_to(self, wanted: str) -> Any:  # noqa: ANN401
        while True:
            name, message = await self.next()
            if name == wanted:
                return message


@asynccontextmanager
async def viewer(site: Site) -> AsyncIterator[Events]:
    async with site.session.get(
        site.origin + "/events", timeout=aiohttp.ClientTimeout(), read_bufsize=1 << 24
    ) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        yield Events(response)


async def until_nobody_looks(site: Site) -> None:
    while site.feed.viewers:
        await asyncio.sleep(0.01)


# Routes.


async def test_pages_have_their_types_and_strict_headers() -> None:
    async with served() as site:
        types = {
            "/": "text/html; charset=utf-8",
            "/static/style.css": "text/css; charset=utf-8",
            "/static/app.js": "text/javascript; charset=utf-8",
            "/api/clients": "application/json",
            "/metrics": CONTENT_TYPE_LATEST,
            "/healthz": "text/plain; charset=utf-8",
            "/nowhere": "text/plain; charset=utf-8",
            "/static/no.js": "text/plain; charset=utf-8",
        }
        for path, content_type in types.items():
            async with site.session.get(site.origin + path) as response:
                await response.read()
                missing = path in {"/nowhere", "/static/no.js"}
                assert (path, response.status) == (path, 404 if missing else 200)
                assert response.headers["Content-Type"] == content_type
                policy = response.headers["Content-Security-Policy"].split("; ")
                assert {
                    "default-src 'none'",
                    "script-src 'self'",
                    "style-src 'self'",
                    "connect-src 'self'",
                    "img-src 'self' data:",
                    "frame-ancestors 'none'",
                } <= set(policy)
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                assert response.headers["Referrer-Policy"] == "no-referrer"
                assert "Set-Cookie" not in response.headers
                assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
async def test_only_reading_is_allowed(method: str) -> None:
    async with served() as site:
        for path in ("/", "/events", "/metrics", "/static/app.js"):
            async with site.session.request(method, site.origin + path) as response:
                assert response.status == 405


@pytest.mark.parametrize(
    "path",
    ["/static/..%2fweb.py", "/static/%2e%2e/web.py", "/static//etc/passwd", "/static/"],
)
async def test_nothing_but_the_page_s_files_is_served(path: str) -> None:
    async with served() as site:
        status, _ = await raw(site, path, f"127.0.0.1:{site.port}")
        assert status == 404


async def raw(site: Site, path: str, *hosts: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    lines = [f"GET {path} HTTP/1.1", "Connection: close"]
    lines += [f"Host: {host}" for host in hosts]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:9412", "[::1]:9412", "localhost", "LOCALHOST:80", "node7"],
)
async def test_addresses_and_chosen_names_are_answered(host: str) -> None:
    async with served(hosts=["Node7"]) as site:
        status, _ = await raw(site, "/healthz", host)
        assert status == 200


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example"],
        ["evil.example:9412"],
        ["localhost.evil.example"],
        ["127.0.0.1.evil.example"],
        ["[evil.example]"],
        [""],
        [],
        ["localhost", "evil.example"],
    ],
)
async def test_name_of_a_page_elsewhere_is_refused(hosts: list[str]) -> None:
    async with served() as site:
        for path in ("/", "/events", "/api/clients", "/metrics", "/nowhere"):
            status, answer = await raw(site, path, *hosts)
            # The parser itself refuses some of these.
            assert status in ({421} if len(hosts) == 1 else {400, 421})
            if status == 421:
                assert "by an IP address or 'localhost'" in answer


async def test_any_name_is_good_where_others_can_connect_anyway() -> None:
    async with served(loopback_only=False) as site:
        status, _ = await raw(site, "/healthz", "node7.example:9412")
        assert status == 200


async def test_metrics_tell_what_viewers_lost() -> None:
    async with served() as site:
        site.feed.dropped = 17
        async with site.session.get(site.origin + "/metrics") as response:
            text = await response.text()
        assert 'memtrackd_dropped_total{output="web"} 17.0' in text


async def test_json_has_everything_that_is_known() -> None:
    async with served() as site:
        client = site.attach()
        site.register(client, 1, 2, 3)
        site.invalidate(client, 1, 1, 9)
        site.tracking.update(client, Update(unregister=(2,)), time.time())
        async with site.session.get(site.origin + "/api/clients") as response:
            snapshot = await response.json()
        (entry,) = snapshot["clients"]
        regions, history = entry.pop("regions"), entry.pop("history")
        assert entry == {
            "id": client.id,
            "name": "train.py",
            "backend": "driver",
            "pid": 4242,
            "uid": 1000,
            "gid": 1000,
            "user": "ada",
            "program": "python3",
            "since": client.since,
            "ended": None,
            "reason": "",
            "generation": 3,
            "changes": 3,
            "unattributed": 0,
        }
        assert [(r["cookie"], r["ended"] is None) for r in regions] == [
            (2, False),
            (1, True),
            (3, True),
        ]
        assert regions[1] == {
            "cookie": 1,
            "name": "weights",
            "start": hex(BASE + PAGE),
            "end": hex(BASE + 2 * PAGE),
            "since": client.regions[1].since,
            "ended": None,
            "changes": 2,
            "causes": {"unmap": 2},
        }
        start, end = hex(BASE + PAGE), hex(BASE + 2 * PAGE)
        assert history[0][1:] == [1, start, end, True, ["unmap"]]
        assert len(history) == 3


# Events.


async def test_events_tell_a_client_s_life_in_its_order() -> None:
    async with served() as site, viewer(site) as events:
        name, snapshot = await events.next()
        assert (name, snapshot["clients"]) == ("snapshot", [])
        client = site.attach()
        site.register(client, 1, 2)
        site.invalidate(client, 1)
        site.invalidate(client, 2)
        site.tracking.update(client, Update(unregister=(1,)), time.time())
        site.tracking.end(client, "gone", time.time())
        other = site.attach("other")
        site.tracking.end(other, "gone", time.time())

        name, message = await events.next()
        assert (name, message["client"]["name"]) == ("attached", "train.py")
        name, message = await events.next()
        assert (name, message["client"]) == ("regions", client.id)
        assert [region["cookie"] for region in message["added"]] == [1, 2]
        name, message = await events.next()
        # Both reads in one message.
        assert (name, [row[0] for row in message["changes"]]) == ("changes", [1, 2])
        assert message["generation"] == 2
        name, message = await events.next()
        assert (name, message["added"], message["ended"]) == ("regions", [], [1])
        name, message = await events.next()
        assert (name, message["reason"]) == ("ended", "gone")
        assert (await events.next())[0] == "attached"
        assert (await events.next())[0] == "ended"
        # Only one is kept.
        assert await events.next() == ("forgotten", {"client": client.id})


async def test_region_that_came_and_went_in_a_tick_is_told() -> None:
    async with served() as site, viewer(site) as events:
        await events.skip_to("snapshot")
        client = site.attach()
        site.register(client, 1, name="first")
        # The cookie is used again: the first region ends.
        site.register(client, 1, name="second")
        site.tracking.update(client, Update(unregister=(1,)), time.time())
        told = []
        for _ in range(3):
            message = await events.skip_to("regions")
            told.append((message["ended"], [r["name"] for r in message["added"]]))
        assert told == [([], ["first"]), ([1], ["second"]), ([1], [])]


async def test_message_of_a_generation_alone() -> None:
    async with served() as site, viewer(site) as events:
        await events.skip_to("snapshot")
        client = site.attach()
        site.tracking.report(client, [(aioummu.LAST, 0, 0, 0, 7)], time.time())
        message = await events.skip_to("changes")
        assert (message["generation"], message["changes"]) == (7, [])


async def test_nothing_is_told_twice_or_not_at_all_around_a_snapshot() -> None:
    """A snapshot takes a while, in which things go on happening."""
    async with served() as site:
        clients = [site.attach(f"client {n}") for n in range(8)]
        for client in clients:
            site.register(client, *range(5000))

        enough = asyncio.Event()

        async def change() -> None:
            n = 0
            while not enough.is_set():
                for client in clients:
                    site.invalidate(client, n % 5000)
                n += 1
                await asyncio.sleep(0.001)

        task = asyncio.create_task(change())
        async with viewer(site) as events:
            snapshot = await events.skip_to("snapshot")
            seen = {entry["id"]: entry["changes"] for entry in snapshot["clients"]}
            first = dict(seen)
            enough.set()
            await task
            marker = site.attach("marker")
            # Other clients' messages can come after it.
            site.feed._tick()
            site.tracking.end(marker, "that is all", time.time())
            while True:
                name, message = await events.next()
                assert name != "lost"
                if name == "changes":
                    seen[message["client"]] += len(message["changes"])
                elif name == "ended":
                    break
        # They were not all seen at the same moment, or this shows nothing.
        assert len(set(first.values())) > 1
        assert seen == {client.id: client.changes for client in clients}


async def test_clients_that_come_and_go_during_a_snapshot_leave_no_ghosts() -> None:
    async with served() as site:
        for n in range(20):
            site.register(site.attach(f"client {n}"), *range(2000))

        async def churn() -> None:
            for client in list(site.tracking.clients.values())[::-1]:
                site.tracking.end(client, "gone", time.time())
                site.attach("new")
                await asyncio.sleep(0)

        task = asyncio.create_task(churn())
        async with viewer(site) as events:
            snapshot = await events.skip_to("snapshot")
            await task
            site.attach("marker")
            known = {c["id"]: c["ended"] for c in snapshot["clients"]}
            while True:
                name, message = await events.next()
                if name == "attached":
                    known[message["client"]["id"]] = None
                    if message["client"]["name"] == "marker":
                        break
                elif name == "ended":
                    known[message["client"]] = message["time"]
                elif name == "forgotten":
                    known.pop(message["client"], None)
        assert known == {c.id: c.ended for c in site.tracking.clients.values()}


async def test_a_feed_that_nobody_looks_at_keeps_nothing() -> None:
    async with served() as site:
        client = site.attach()
        site.register(client, *range(100))
        site.invalidate(client, *range(100))
        assert (site.feed._pending, site.feed._timer) == ({}, None)
        async with viewer(site) as events:
            await events.skip_to("snapshot")
            site.invalidate(client, 1)
            assert site.feed._pending
        await until_nobody_looks(site)
        site.invalidate(client, 1)
        assert site.feed._pending == {}


# Viewers that are slow, or many, or gone.


@asynccontextmanager
async def stalled(site: Site) -> AsyncIterator[socket.socket]:
    """A viewer that asks for events, and then takes only what is read from it."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", site.port))
        # Version 1.0 has no chunks.
        request = f"GET /events HTTP/1.0\r\nHost: 127.0.0.1:{site.port}\r\n\r\n"
        await loop.sock_sendall(connection, request.encode())
        yield connection


async def flood(site: Site, client: Client) -> None:
    """Change all of the client's 500 regions a few times."""
    for _ in range(20):
        site.invalidate(client, *range(500))
    await asyncio.sleep(0.01)


async def test_slow_viewer_loses_its_queue_and_starts_again() -> None:
    async with served() as site, stalled(site) as connection, viewer(site) as quick:
        client = site.attach()
        site.register(client, *range(500))
        seen = 0
        snapshot = await quick.skip_to("snapshot")
        seen = sum(entry["changes"] for entry in snapshot["clients"])

        async def watch() -> None:
            nonlocal seen
            while seen < client.changes or not site.feed.dropped:
                seen += len((await quick.skip_to("changes"))["changes"])

        while site.feed.viewers < 2:
            await asyncio.sleep(0.01)
        task = asyncio.create_task(watch())
        largest = 0
        while not site.feed.dropped:
            await flood(site, client)
            largest = max(largest, *(v._size for v in site.feed._viewers))
        # What is lost by one is lost by one: the other one saw everything.
        await task
        assert seen == client.changes
        assert 0 < largest <= web.QUEUE_BYTES
        (slow,) = [v for v in site.feed._viewers if v.lost]
        assert (slow._size, len(slow._queue)) == (0, 0)

        # It reads again, and gets the present, not what it has missed.
        loop = asyncio.get_running_loop()
        text = b""
        while not (text.endswith(b"]}\n\n") and b"event: lost" in text):
            text += await loop.sock_recv(connection, 1 << 16)
            text = text[text.find(b"event: lost") :] if b"event: lost" in text else text
        lines = [line for line in text.decode().splitlines() if line]
        assert lines[0] == "event: lost"
        assert json.loads(lines[1].removeprefix("data: "))["messages"] > 0
        assert lines[2] == "event: snapshot"
        again = "".join(line.removeprefix("data: ") for line in lines[3:])
        assert json.loads(again)["clients"][0]["changes"] == client.changes


async def test_viewers_that_leave_are_forgotten() -> None:
    async with served() as site:
        for _ in range(20):
            async with viewer(site) as events:
                await events.next()
        await until_nobody_looks(site)


async def test_too_many_viewers_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "VIEWERS", 2)
    async with served() as site, viewer(site) as one, viewer(site) as two:
        await one.next()
        await two.next()
        async with site.session.get(site.origin + "/events") as response:
            assert response.status == 503
            assert "2 viewers already" in await response.text()


async def test_viewer_that_takes_nothing_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web, "PATIENCE", 0.2)
    async with served() as site, stalled(site):
        client = site.attach()
        site.register(client, *range(500))
        while not site.feed.viewers:
            await asyncio.sleep(0.01)
        while site.feed.viewers:
            await flood(site, client)


async def test_signs_of_life_while_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web, "HEARTBEAT", 0.05)
    async with served() as site:
        response = await site.session.get(site.origin + "/events")
        await response.content.readuntil(b"]}\n\n")
        for _ in range(3):
            assert await response.content.readuntil(b"\n\n") == b":\n\n"
        response.close()


@pytest.mark.parametrize("stuck", ["blocked", "buffered"])
async def test_end_does_not_wait_for_viewers(stuck: str) -> None:
    async with AsyncExitStack() as viewers:
        async with served() as site:
            client = site.attach()
            site.register(client, *range(500))
            await viewers.enter_async_context(stalled(site))
            session = await viewers.enter_async_context(aiohttp.ClientSession())
            idle = await session.get(site.origin + "/events")
            await idle.content.readuntil(b"]}\n\n")
            while not site.feed.dropped:
                await flood(site, client)
                if stuck == "buffered" and site.feed._number > 20:
                    break
            before = time.monotonic()
        # Far less than a viewer's patience.
        assert time.monotonic() - before < 10
        assert site.feed.viewers == 0
        idle.close()
