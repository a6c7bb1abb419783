"""Bytes that nobody has thought of, for the protocol of memtrackd and its daemon."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memtrackd import protocol
from memtrackd.protocol import Hello, MessageError, RegionEntry, Update

from tests.memtrackd_process import Daemon, Raw, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DECODERS: list[Callable[[bytes], object]] = [
    protocol.decode_hello,
    protocol.decode_update,
    protocol.decode_answer,
]
TOP = (1 << 64) - 1

numbers = st.integers(0, TOP)
names = st.text(
    st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=128
).filter(lambda name: len(name.encode()) <= protocol.NAME_SIZE and name.isprintable())
ranges = st.tuples(numbers, numbers).filter(lambda r: r[0] != r[1]).map(sorted)
entries = st.builds(
    lambda cookie, where, name: RegionEntry(cookie, where[0], where[1], name),
    numbers,
    ranges,
    names,
)
hellos = st.builds(Hello, names, st.sampled_from(protocol.BACKENDS))
updates = st.builds(
    Update,
    st.lists(entries, max_size=protocol.ENTRIES, unique_by=lambda e: e.cookie).map(
        tuple
    ),
    st.lists(numbers, max_size=200).map(tuple),
).filter(lambda update: bool(update.register or update.unregister))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
# Those words lead further in.
words = st.sampled_from(
    ["memtrackd", "name", "backend", "register", "unregister", "client", "error"]
)
nearly = st.dictionaries(
    words,
    anything
    | st.sampled_from([1, "driver", "embedded"])
    | st.lists(st.lists(anything | numbers | names, min_size=3, max_size=5)),
)


@given(st.sampled_from(DECODERS), st.binary(max_size=200))
def test_bytes_are_a_message_or_an_error(
    decode: Callable[[bytes], object], packet: bytes
) -> None:
    with contextlib.suppress(MessageError):
        decode(packet)


@given(st.sampled_from(DECODERS), anything | nearly)
def test_json_is_a_message_or_an_error(
    decode: Callable[[bytes], object], message: object
) -> None:
    with contextlib.suppress(MessageError):
        decode(json.dumps(message).encode())


@given(
    st.sampled_from(DECODERS),
    st.builds(protocol.encode_hello, hellos)
    | st.builds(protocol.encode_update, updates),
    st.data(),
)
def test_a_damaged_message_is_a_message_or_an_error(
    decode: Callable[[bytes], object], packet: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(packet)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged)))
        behind = data.draw(st.integers(place, len(damaged)))
        damaged[place:behind] = data.draw(st.binary(max_size=6))
    with contextlib.suppress(MessageError):
        decode(bytes(damaged))


@given(st.sampled_from(DECODERS), st.integers(0, 60_000), st.sampled_from("[{9-"))
@settings(max_examples=20, deadline=None)
def test_depth_and_length_are_an_error(
    decode: Callable[[bytes], object], count: int, what: str
) -> None:
    opened = {"[": "[", "{": '{"a":', "9": "9", "-": "-"}[what] * count
    closed = {"[": "]", "{": "}"}.get(what, "") * count
    for packet in (f"{opened}1{closed}", f'{{"register":{opened}1{closed}}}', opened):
        with contextlib.suppress(MessageError):
            decode(packet[: protocol.PACKET_SIZE].encode())


@given(hellos)
def test_a_hello_comes_out_as_it_went_in(hello: Hello) -> None:
    packet = protocol.encode_hello(hello)
    assert len(packet) <= protocol.PACKET_SIZE
    assert packet[0] == protocol.BRACE
    assert protocol.decode_hello(packet) == hello


@given(updates)
@settings(deadline=None)
def test_an_update_comes_out_as_it_went_in(update: Update) -> None:
    packet = protocol.encode_update(update)
    assert len(packet) <= protocol.PACKET_SIZE
    assert packet[0] == protocol.BRACE
    assert protocol.decode_update(packet) == update


# Against a daemon.

HELLO = protocol.encode_hello(Hello("fuzz", "embedded"))
DRIVER = protocol.encode_hello(Hello("fuzz", "driver"))
UPDATE = protocol.encode_update(
    Update((RegionEntry(1, 0x1000, 0x2000, "one"), RegionEntry(2, 1, 2, "two")), (7, 8))
)
CLIENTS, PACKETS = 500, 8


def damaged(chance: random.Random, packet: bytes) -> bytes:
    """Return a packet that is mostly a wrong one."""
    data = bytearray(packet)
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(len(data) + 1)
        data[place : place + chance.choice([0, 0, 1, 5])] = chance.randbytes(
            chance.choice([0, 1, 1, 4])
        )
    return bytes(data)


def record(chance: random.Random) -> bytes:
    """Return a record that may be no record."""
    interesting = [0, 1, 2, 0x1000, 0x2000, 1 << 32, 1 << 63, TOP]
    numbers = [chance.choice(interesting) for _ in range(3)]
    kind = chance.choice([0, 0, 0, 1, 1, 2, 99, 0xFFFF_FFFF])
    return struct.pack("=II3Q", kind & 0xFFFF_FFFF, chance.getrandbits(32), *numbers)


def packet_of(chance: random.Random) -> bytes:
    """Return something that a client may send, or not."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.choice([0, 1, 31, 32, 33, 64, 1000, 65_000]))
    if kind == 1:
        return damaged(chance, chance.choice([HELLO, DRIVER]))
    if kind == 2:
        return UPDATE
    if kind == 3:
        return bytes(chance.choice([150_000, 65_537, 65_536]))
    if kind == 4:
        return damaged(chance, UPDATE)
    records = b"".join(
        record(chance) for _ in range(chance.choice([1, 2, 64, 65, 500]))
    )
    return records + b"x" * (kind == 5 and chance.randrange(3))


def fuzz(chance: random.Random, path: Path, fds: list[int]) -> int:
    """Be a client, and return how many packets the daemon has let through."""
    sent = 0
    with (
        Raw(path) as client,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        # Most get in: there is more to try there.
        if chance.random() < 0.8:
            client.hello("fuzz")
        for _ in range(PACKETS):
            some = chance.sample(fds, chance.choice([0, 0, 0, 1, 3]))
            with contextlib.suppress(PermissionError):
                client.send(packet_of(chance), some)
            sent += 1
            if chance.random() < 0.1:
                how = chance.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
                client.socket.shutdown(how)
    return sent


@pytest.mark.parametrize("seed", [1, 2])
def test_a_daemon_outlives_thousands_of_wrong_packets(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - the same each time
    with Daemon(tmp_path) as daemon, contextlib.ExitStack() as stack:
        bystander = stack.enter_context(Raw(daemon.socket))
        number = bystander.hello("bystander")
        daemon.is_served()
        before = daemon.fds
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        pair = [stack.enter_context(s).fileno() for s in socket.socketpair()]
        null = stack.enter_context((tmp_path / "stderr").open("rb")).fileno()
        sent = sum(
            fuzz(chance, daemon.socket, [reader, writer, *pair, null])
            for _ in range(CLIENTS)
        )
        assert sent > 2 * CLIENTS, sent
        bystander.register(1, 0x1000, 0x2000, "undisturbed")
        daemon.wait("registered", client=number, region="undisturbed")
        daemon.is_served()
        until(lambda: daemon.fds == before, "descriptors to be closed")
        troubles: list[Any] = daemon.lines("trouble")
        assert not troubles
        assert len(daemon.lines("refused")) > CLIENTS / 4
        assert daemon.terminate() == 0
        assert daemon.errors.read_text("utf-8") == ""
