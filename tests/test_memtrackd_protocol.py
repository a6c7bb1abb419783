"""What the daemon says to clients that do something else than it takes."""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import socket
from typing import TYPE_CHECKING, Any

import pytest
from memtrackd import protocol
from memtrackd.protocol import Hello, MessageError, RegionEntry, Update

import aioummu
from tests.memtrackd_process import Daemon, Raw, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import TypeAlias

    from _pytest.mark import ParameterSet

MAX_REGIONS = 100
HELLO = {"memtrackd": 1, "name": "somebody", "backend": "embedded"}
DRIVER = {**HELLO, "backend": "driver"}
DEEP = b'{"register":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
HUGE = b'{"unregister":[' + b"9" * 5_000 + b"]}"
# A name in the terminal would do what it says.
NASTY = ["\x1b[2J", "two\nlines", "\x00", "a\u202eb", "\u2028", "\ud800", "\x85"]


class Service:
    """A daemon, and a client that nothing may disturb."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.bystander = Raw(daemon.socket)
        self.number = self.bystander.hello("bystander")
        # It never says anything.
        self.silent = Raw(daemon.socket)
        self.cookie = 0

    def close(self) -> None:
        self.bystander.socket.close()
        self.silent.socket.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("daemon")
    with Daemon(directory, "--max-regions", str(MAX_REGIONS)) as daemon:
        service = Service(daemon)
        with contextlib.closing(service):
            yield service
        assert daemon.terminate() == 0


@pytest.fixture
def daemon(service: Service) -> Iterator[Daemon]:
    """The daemon; after the test, it serves others as if nothing had been."""
    yield service.daemon
    service.cookie += 1
    name = f"region {service.cookie}"
    service.bystander.register(service.cookie % MAX_REGIONS, 1, 2, name)
    service.daemon.wait("registered", client=service.number, region=name)


Packet: TypeAlias = "bytes | object"


def case(packet: Packet, reason: str, name: str) -> ParameterSet:
    return pytest.param(packet, reason, id=name)


NO_HELLOS = [
    case(b"hello", "is JSON, not b'hello'", "no JSON"),
    case(b"\xff\xfe{}", "is JSON", "no UTF-8"),
    case(b"{", "is JSON", "cut off"),
    case([1], "is a JSON object", "a list"),
    case(b"1" * 5_000, "is JSON", "a number of too many digits"),
    case(b"[" * 60_000, "is JSON", "nested deeply"),
    case({}, "speaks version 1, not None", "nothing"),
    case({**HELLO, "memtrackd": 2}, "speaks version 1, not 2", "the future"),
    case({**HELLO, "memtrackd": True}, "version 1, not True", "a bool as version"),
    case({**HELLO, "memtrackd": 1.0}, "version 1, not 1.0", "a float as version"),
    case({**HELLO, "backend": "none"}, "'driver' or 'embedded'", "no backend"),
    case({**HELLO, "backend": ["driver"]}, "'driver' or 'embedded'", "backends"),
    case({**HELLO, "name": ""}, "name is text, not ''", "no name"),
    case({**HELLO, "name": 7}, "name is text, not 7", "a number as name"),
    case({**HELLO, "name": "x" * 129}, "at most 128 bytes, not 129", "long name"),
    case({**HELLO, "name": "\u20ac" * 43}, "128 bytes, not 129", "long in UTF-8"),
    *(case({**HELLO, "name": n}, "printable|surrogates", repr(n)) for n in NASTY),
    case(bytes(32), "is JSON", "records first"),
    case({"unregister": [1]}, "version", "an update first"),
    case(b"{" + b" " * protocol.PACKET_SIZE, "at most 65536 bytes", "over-long"),
    case(b" " * 150_000, "at most 65536 bytes", "much too long"),
    case(b"", "the first message is a hello", "no bytes"),
]


@pytest.mark.parametrize(("packet", "reason"), NO_HELLOS)
def test_who_says_no_hello_is_told_so(
    daemon: Daemon, packet: Packet, reason: str
) -> None:
    with Raw(daemon.socket) as client:
        client.send(packet)
        refusal = client.refusal()
    assert re.search(reason, refusal)
    assert refusal.isprintable()
    assert len(refusal) < 300
    daemon.wait("refused", reason=refusal)


def row(**changes: object) -> dict[str, Any]:
    entry = {"cookie": 1, "start": 0x1000, "end": 0x2000, "name": "x", **changes}
    return {"register": [list(entry.values())]}


NO_UPDATES = [
    case(b'{"register":', "is JSON", "no JSON"),
    case(b"{" + b"\xff" * 9, "is JSON", "no UTF-8"),
    case(DEEP, "is JSON|is \\[cookie", "nested deeply"),
    case(HUGE, "is JSON", "a number of too many digits"),
    case({}, "'register' or 'unregister'", "nothing"),
    case({"attach": []}, "'register' or 'unregister'", "another word"),
    case(HELLO, "'register' or 'unregister'", "a second hello"),
    case({"register": {}}, "'register' is a list", "an object of regions"),
    case({"unregister": None}, "'unregister' is a list", "no cookies"),
    case({"unregister": [True]}, "a cookie is a number of 64 bits", "true"),
    case({"unregister": [1.0]}, "a cookie is a number of 64 bits", "a float"),
    case({"unregister": [-1]}, "a cookie is a number of 64 bits", "negative"),
    case({"unregister": [1 << 64]}, "a cookie is a number of 64 bits", "65 bits"),
    case({"unregister": ["1"]}, "a cookie is a number of 64 bits", "text"),
    case(b'{"unregister":[NaN]}', "64 bits|JSON", "not a number"),
    case(b'{"unregister":[1e999]}', "64 bits|JSON", "infinity"),
    case({"register": [[1, 2, 3]]}, r"\[cookie, start, end, name\]", "no name"),
    case({"register": ["four"]}, r"\[cookie, start, end, name\]", "four letters"),
    case(row(cookie=True), "a cookie is a number", "a cookie that is true"),
    case(row(start=False), "an address is a number", "an address that is false"),
    case(row(end=1 << 64), "an address is a number", "an end of 65 bits"),
    case(row(start=0x2000), "start < end", "empty"),
    case(row(start=0x3000), "start < end", "ends before it begins"),
    case(row(name="x" * 129), "at most 128 bytes", "long name"),
    case(row(name=None), "name is text", "null"),
    *(case(row(name=n), "printable|surrogates", repr(n)) for n in NASTY),
    case({"register": [[1, 1, 2, "a"], [1, 1, 2, "b"]]}, "only once", "a cookie twice"),
    case(
        {"register": [[i, 1, 2, "x"] for i in range(MAX_REGIONS + 1)]},
        f"at most {MAX_REGIONS} regions",
        "too many regions",
    ),
    case(b"{" + b" " * protocol.PACKET_SIZE, "at most 65536 bytes", "over-long"),
    case(b" " * 150_000, "at most 65536 bytes", "much too long"),
    case(bytes(31), "neither JSON nor records", "a record cut off"),
    case(bytes(33), "neither JSON nor records", "a record and a byte"),
    case(b"\x01", "neither JSON nor records", "a byte"),
    case(b"[]", "neither JSON nor records", "a list"),
]


@pytest.mark.parametrize(("packet", "reason"), NO_UPDATES)
def test_who_says_no_update_is_told_so(
    daemon: Daemon, packet: Packet, reason: str
) -> None:
    with Raw(daemon.socket) as client:
        number = client.hello()
        client.register(7, 0x7000, 0x8000, "before")
        client.send(packet)
        refusal = client.refusal()
    assert re.search(reason, refusal)
    assert refusal.isprintable()
    assert len(refusal) < 300
    daemon.wait("registered", client=number, region="before")
    assert daemon.wait("ended", client=number)["reason"] == refusal
    daemon.wait("refused", reason=refusal)


def test_regions_may_be_as_many_as_allowed_again_and_again(daemon: Daemon) -> None:
    with Raw(daemon.socket) as client:
        number = client.hello()
        for turn in range(3):
            rows = [[i, 1, 2, f"{turn}.{i}"] for i in range(MAX_REGIONS)]
            client.send({"register": rows})
            daemon.wait("registered", client=number, region=f"{turn}.{MAX_REGIONS - 1}")
        everything = list(range(MAX_REGIONS))
        client.send({"register": rows, "unregister": everything})
        client.register(MAX_REGIONS, 1, 2, "one more")
        assert f"at most {MAX_REGIONS}" in client.refusal()


def test_records_of_unknown_regions_and_types_hurt_nobody(daemon: Daemon) -> None:
    with Raw(daemon.socket) as client:
        number = client.hello()
        client.register(5, 0x5000, 0x6000, "five")
        most = (1 << 64) - 1
        for record in [
            (0, 0, 0x5000, 0x6000, 99),
            (77, most >> 32, most, 0, most),
            (0, most >> 32, 0, most, 5),
            (1, 0, 0, 0, most),
        ]:
            client.send(_pack(*record))
        client.register(6, 0x6000, 0x7000, "six")
        daemon.wait("registered", client=number, region="six")
        assert daemon.lines("changed", client=number, region="five")
    ended = daemon.wait("ended", client=number)
    assert ended["reason"] == "it has left"


def _pack(kind: int, flags: int, start: int, end: int, number: int) -> bytes:
    halves = array.array("I", [kind, flags]).tobytes()
    return halves + array.array("Q", [start, end, number]).tobytes()


# Descriptors.


@contextlib.contextmanager
def descriptors(what: str, tmp_path: Path) -> Iterator[Sequence[int]]:
    """Open something that is no notifier's."""
    with contextlib.ExitStack() as stack:
        if what == "pipe":
            fds = os.pipe()
            stack.callback(os.close, fds[1])
            stack.callback(os.close, fds[0])
            yield fds[:1]
        elif what == "socket":
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            yield [stack.enter_context(s).fileno() for s in pair][:1]
        elif what == "tcp":
            yield [stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()]
        elif what == "listener":
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(listener).bind(os.fspath(tmp_path / "listener"))
            listener.listen()
            yield [listener.fileno()]
        elif what == "embedded":
            yield [stack.enter_context(aioummu.EmbeddedDevice()).fileno()]
        else:
            path = {"null": "/dev/null", "directory": "/"}.get(what)
            if path is None:
                path = os.fspath(tmp_path / "file")
                (tmp_path / "file").write_bytes(b"x" * 4096)
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            yield [fd]


FOREIGN = ["file", "null", "directory", "pipe", "socket", "tcp", "listener", "embedded"]


@pytest.mark.parametrize("what", FOREIGN)
def test_a_descriptor_that_is_no_device_is_refused(
    daemon: Daemon, what: str, tmp_path: Path
) -> None:
    before = daemon.fds
    with Raw(daemon.socket) as client, descriptors(what, tmp_path) as fds:
        client.send(DRIVER, fds)
        refusal = client.refusal()
    assert "ummunotify" in refusal
    _until_fds(daemon, before)


@pytest.mark.parametrize(
    ("hello", "count"), [(DRIVER, 0), (DRIVER, 3), (DRIVER, 253), (HELLO, 1), (b"", 9)]
)
def test_the_wrong_number_of_descriptors_is_refused(
    daemon: Daemon, hello: Packet, count: int
) -> None:
    before = daemon.fds
    with Raw(daemon.socket) as client, open(os.devnull, "rb") as null:  # noqa: PTH123
        client.send(hello, [null.fileno()] * count)
        refusal = client.refusal()
    assert f"not {count}" in refusal or "the first message is a hello" in refusal
    _until_fds(daemon, before)


@pytest.mark.parametrize("packet", [{"unregister": [1]}, bytes(32), b""])
def test_a_descriptor_that_comes_later_is_refused(
    daemon: Daemon, packet: Packet
) -> None:
    before = daemon.fds
    with Raw(daemon.socket) as client, open(os.devnull, "rb") as null:  # noqa: PTH123
        number = client.hello()
        try:
            client.send(packet, [null.fileno()])
        except PermissionError:
            # The kernel itself sees to it: SO_PASSRIGHTS, from 6.16 on.
            client.socket.close()
            reason = "it has left"
        else:
            reason = client.refusal()
            assert "with the first message only" in reason
        assert daemon.wait("ended", client=number)["reason"] == reason
    _until_fds(daemon, before)


def _until_fds(daemon: Daemon, count: int) -> None:
    until(lambda: daemon.fds <= count, f"{count} descriptors")


# How many, and how long.


def test_clients_beyond_the_limit_are_told_so_and_let_in_later(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--max-clients", "2") as daemon:
        with Raw(daemon.socket) as first, Raw(daemon.socket) as second:
            number = first.hello()
            second.hello()
            for _ in range(3):
                with Raw(daemon.socket) as third:
                    assert "at most 2 clients" in third.refusal()
            first.register(1, 1, 2, "still here")
            daemon.wait("registered", client=number)
        daemon.wait("ended", client=number)
        until_served(daemon)


def until_served(daemon: Daemon) -> None:
    # The place is free a moment after the line.
    for _ in range(1000):
        with Raw(daemon.socket) as client:
            client.send(HELLO)
            if "client" in client.answer():
                return
    raise AssertionError("no place becomes free")


def test_who_says_nothing_does_not_keep_a_place(service: Service) -> None:
    """It began with the module's daemon, so that the tests take less time."""
    assert "no message within 5 s" in service.silent.refusal()


# Messages, without a daemon.


def test_messages_come_out_as_they_went_in() -> None:
    hello = Hello('quoted "\u20ac\U0001f600', "driver")
    assert protocol.decode_hello(protocol.encode_hello(hello)) == hello
    update = Update((RegionEntry(0, 0, (1 << 64) - 1, "all"),), ((1 << 64) - 1, 0))
    assert protocol.decode_update(protocol.encode_update(update)) == update
    for answer in (protocol.Welcome(7), protocol.Refusal("no\n\u20ac")):
        assert protocol.decode_answer(protocol.encode_answer(answer)) == answer


@pytest.mark.parametrize(
    "name", ["x" * 128, '"' * 128, "\u00e9" * 64, "\U0001f600" * 32]
)
def test_the_fullest_packets_fit(name: str) -> None:
    top = (1 << 64) - 1
    entries = tuple(
        RegionEntry(top - i, top - 1, top, name) for i in range(protocol.ENTRIES)
    )
    cookies = tuple(top - i for i in range(protocol.COOKIES))
    for update in (Update(register=entries), Update(unregister=cookies)):
        packet = protocol.encode_update(update)
        assert len(packet) <= protocol.PACKET_SIZE
        assert protocol.decode_update(packet) == update


@pytest.mark.parametrize("packet", [{"client": True}, {"client": -1}, {"error": 1}, {}])
def test_an_answer_that_is_none_is_refused(packet: object) -> None:
    with pytest.raises(MessageError):
        protocol.decode_answer(json.dumps(packet).encode())
