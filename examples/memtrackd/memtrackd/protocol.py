"""What clients and the daemon say to each other: a socket of packets, JSON in them.

A client connects to the daemon's SOCK_SEQPACKET Unix socket and sends::

    {"memtrackd": 1, "name": "train.py", "backend": "driver"}

and, if its backend is the driver, with the descriptor of its device as SCM_RIGHTS. The
daemon answers ``{"client": 17}``, or ``{"error": "..."}`` and hangs up. After that
the client only says what its regions are called, whenever it likes::

    {"register": [[cookie, start, end, "name"], ...], "unregister": [cookie, ...]}

What is in ``unregister`` goes first. A cookie that is registered again replaces the
region; it stands only once in a message. A client announces a region before it
registers it, so that no report comes earlier than its name.

The records of an embedded client come through the same socket
(``aioummu.EmbeddedDevice.forward()``), as packets of up to 64 records of 32 bytes;
their first byte is no brace. The daemon says nothing more, unless it hangs up with an
``error``. Either side leaves by closing the socket.

Nothing here does any input or output.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import attrs

VERSION = 1
#: Bytes of a packet; within the smallest buffer that a system has by default.
PACKET_SIZE = 1 << 16
#: UTF-8 bytes of the name of a client or a region.
NAME_SIZE = 128
#: Regions of a client.
REGION_LIMIT = 1 << 16
BACKENDS = ("driver", "embedded")

#: What a packet of JSON begins with, and a packet of records never does.
BRACE = ord("{")

_ADDRESS_LIMIT = 1 << 64
# Three numbers of 20 digits, a name of which every byte may be escaped, and
# punctuation.
_ENTRY_SIZE = 3 * 22 + 6 * NAME_SIZE + 8
#: As many regions as surely fit a packet.
ENTRIES = (PACKET_SIZE - 64) // _ENTRY_SIZE
#: As many cookies as surely fit a packet.
COOKIES = (PACKET_SIZE - 64) // 22

Json: TypeAlias = dict[str, Any]


class MessageError(Exception):
    """A message that says something else than the protocol allows."""


@attrs.frozen
class RegionEntry:
    """A region, as a client announces it."""

    cookie: int
    """What the notifier's reports carry; unique within the client."""
    start: int
    """Address of the first byte."""
    end: int
    """Address behind the last byte."""
    name: str


@attrs.frozen
class Hello:
    """The first message of a client."""

    name: str
    backend: str


@attrs.frozen
class Update:
    """What changed in the region table of a client."""

    register: tuple[RegionEntry, ...] = ()
    unregister: tuple[int, ...] = ()


@attrs.frozen
class Welcome:
    """The daemon's answer to a hello."""

    client: int
    """The number that the daemon shows for this client."""


@attrs.frozen
class Refusal:
    """The daemon hangs up, and says why."""

    error: str


def encode_hello(hello: Hello) -> bytes:
    """Return the packet.

    :raises MessageError: if the daemon would refuse it
    """
    packet = {"memtrackd": VERSION, "name": hello.name, "backend": hello.backend}
    _hello(packet)
    return _encode(packet)


def encode_update(update: Update) -> bytes:
    """Return the packet, of at most :data:`ENTRIES` or :data:`COOKIES`."""
    message: Json = {}
    if update.unregister:
        message["unregister"] = update.unregister
    if update.register:
        message["register"] = [
            [e.cookie, e.start, e.end, e.name] for e in update.register
        ]
    return _encode(message)


def encode_answer(answer: Welcome | Refusal) -> bytes:
    """Return the packet."""
    return _encode(attrs.asdict(answer))


def decode_hello(packet: bytes) -> Hello:
    """Read the first message of a client.

    :raises MessageError: if it is none
    """
    return _hello(_decode(packet))


def decode_update(packet: bytes) -> Update:
    """Read a later message of a client.

    :raises MessageError: if it is none
    """
    message = _decode(packet)
    if not message or message.keys() - {"register", "unregister"}:
        raise MessageError("an update has 'register' or 'unregister', and nothing else")
    update = Update(
        tuple(map(_entry, _list(message, "register"))),
        tuple(_number(cookie, "a cookie") for cookie in _list(message, "unregister")),
    )
    if len({entry.cookie for entry in update.register}) < len(update.register):
        raise MessageError("a cookie stands only once in a message")
    return update


def decode_answer(packet: bytes) -> Welcome | Refusal:
    """Read what the daemon says.

    :raises MessageError: if it is no answer
    """
    match _decode(packet):
        case {"client": client}:
            return Welcome(_number(client, "a client"))
        case {"error": str(error)}:
            return Refusal(error)
    raise MessageError("the daemon answers with 'client' or 'error'")


def checked_entry(entry: RegionEntry) -> RegionEntry:
    """Return the entry if the daemon would take it.

    :raises MessageError: if not
    """
    _number(entry.cookie, "a cookie")
    _name(entry.name, "a region's name")
    if not 0 <= entry.start < entry.end <= _ADDRESS_LIMIT - 1:
        raise MessageError(
            "a region has 0 <= start < end < 2**64, not "
            f"{entry.start:#x}-{entry.end:#x}"
        )
    return entry


def _hello(message: Json) -> Hello:
    version = message.get("memtrackd")
    # JSON's true and 1.0 are not 1.
    if type(version) is not int or version != VERSION:
        raise MessageError(f"this daemon speaks version {VERSION}, not {version!r:.40}")
    backend = message.get("backend")
    if backend not in BACKENDS:
        raise MessageError(f"a backend is 'driver' or 'embedded', not {backend!r:.40}")
    return Hello(_name(message.get("name"), "a client's name"), backend)


def _entry(row: object) -> RegionEntry:
    match row:
        case [cookie, start, end, name]:
            return checked_entry(
                RegionEntry(
                    _number(cookie, "a cookie"),
                    _number(start, "an address"),
                    _number(end, "an address"),
                    _name(name, "a region's name"),
                )
            )
    raise MessageError(f"a region is [cookie, start, end, name], not {row!r:.80}")


def _list(message: Json, key: str) -> list[object]:
    value = message.get(key, [])
    if not isinstance(value, list):
        raise MessageError(f"'{key}' is a list, not {value!r:.40}")
    return value


def _number(value: object, what: str) -> int:
    # JSON's true is not 1.
    if type(value) is not int or not 0 <= value < _ADDRESS_LIMIT:
        raise MessageError(f"{what} is a number of 64 bits, not {value!r:.40}")
    return value


def _name(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise MessageError(f"{what} is text, not {value!r:.40}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise MessageError(f"{what} is Unicode without surrogates") from None
    if size > NAME_SIZE:
        raise MessageError(f"{what} has at most {NAME_SIZE} bytes, not {size}")
    # It goes to terminals and logs.
    if not value.isprintable():
        raise MessageError(f"{what} has printable characters only, not {value!r:.80}")
    return value


def _encode(message: Json) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def _decode(packet: bytes) -> Json:
    try:
        message = json.loads(packet)
    # Nested too deeply, or a number of too many digits.
    except (ValueError, RecursionError):
        raise MessageError(f"a message is JSON, not {packet[:40]!r}") from None
    if not isinstance(message, dict):
        raise MessageError(f"a message is a JSON object, not {packet[:40]!r}")
    return message
