"""What the daemon can be told: on the command line, in the environment, in a file."""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import attrs

import aioummu
from memtrackd import protocol
from memtrackd.client import default_socket
from memtrackd.logs import LogFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PREFIX = "MEMTRACKD_"
_EPILOG = """\
Each option can also be set in the environment (--max-clients is
MEMTRACKD_MAX_CLIENTS) or in the file (max-clients = 100). The command line goes
before the environment, and that before the file.

Programs attach through the socket, with memtrackd.attach() in Python or memtrack.h in
C; $MEMTRACKD_SOCKET tells both where it is. Only what they register is tracked, and
only addresses, sizes and times are seen, never contents. Who may attach is decided by
the permissions of the socket; who may look, by the address of --http, which is the
local host unless you choose another.

SIGTERM and SIGINT read what is still to be read, and end with status 0. SIGHUP reads
the file again (log, causes, max-clients, max-regions, max-all-regions, keep-ended), and
opens the log file again.
"""


class ConfigError(Exception):
    """The daemon was told something that makes no sense."""


@attrs.frozen
class HttpAddress:
    """Where to listen for browsers and Prometheus."""

    host: str
    port: int


@attrs.frozen
class Config:
    """All of it; see ``memtrackd --help``."""

    socket: Path
    socket_mode: int
    socket_group: str | None
    http: HttpAddress | None
    max_clients: int
    max_regions: int
    max_all_regions: int
    keep_ended: int
    log: LogFormat
    log_file: Path | None
    causes: frozenset[str] | None
    """Of the changes in the log and the view; None is all."""
    view: bool
    canary: float
    nice: int


def load_config(
    arguments: Sequence[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """Return what the daemon is told.

    :param arguments: those of the command line, without the program's name
    :raises ConfigError: if a value makes no sense, or the file cannot be read
    :raises SystemExit: if the command line makes no sense, or asks for help
    """
    given = vars(_parser().parse_args(arguments))
    file = given.pop("config", None) or environment.get(_PREFIX + "CONFIG")
    settings: dict[str, Any] = {}
    settings.update(_from_file(Path(file)) if file else {})
    settings.update(_from_environment(environment))
    settings.update(given)
    if "socket" not in settings:
        settings["socket"] = default_socket()
    return Config(**{**_DEFAULTS, **settings})


_DEFAULTS: dict[str, Any] = {
    "socket_mode": 0o660,
    "socket_group": None,
    "http": HttpAddress("127.0.0.1", 9412),
    "max_clients": 256,
    "max_regions": protocol.REGION_LIMIT,
    "max_all_regions": 1 << 20,
    "keep_ended": 100,
    "log": "text",
    "log_file": None,
    "causes": None,
    "view": False,
    "canary": 5.0,
    "nice": 10,
}


# How to read each setting; what raises ValueError says what is expected.


def _path(text: str) -> Path:
    if not text:
        raise ValueError("a path")
    return Path(text)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:  # noqa: PLR2004
        raise ValueError("an octal mode like 0660")
    return mode


def _name(text: str) -> str:
    if not text:
        raise ValueError("a name")
    return text


def _http(text: str) -> HttpAddress | None:
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 1 << 16):
        raise ValueError("HOST:PORT like 127.0.0.1:9412 or [::1]:9412, or 'off'")
    return HttpAddress(host.removeprefix("[").removesuffix("]"), int(port))


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ValueError("a number from 1 on")
    return int(text)


def _count_or_none(text: str) -> int:
    if not text.isdigit():
        raise ValueError("a number from 0 on")
    return int(text)


def _niceness(text: str) -> int:
    if not text.isdigit() or int(text) > 19:  # noqa: PLR2004
        raise ValueError("a number from 0 to 19")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ValueError("a number of seconds from 0 on")
    return seconds


def _log(text: str) -> str:
    if text not in get_args(LogFormat):
        raise ValueError("text, json or off")
    return text


_CAUSES = tuple(cause.name.lower() for cause in aioummu.Cause if cause.name)


def _causes(text: str) -> frozenset[str] | None:
    if text == "all":
        return None
    causes = frozenset(word.strip() for word in text.split(","))
    if not causes <= set(_CAUSES):
        raise ValueError(f"'all', or some of {','.join(_CAUSES)}")
    return causes


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "": False, "0": False}
    try:
        return {**words, "false": False, "no": False}[text.lower()]
    except KeyError:
        raise ValueError("1 or 0") from None


_READERS: dict[str, Callable[[str], Any]] = {
    "socket": _path,
    "socket_mode": _mode,
    "socket_group": _name,
    "http": _http,
    "max_clients": _count,
    "max_regions": _count,
    "max_all_regions": _count,
    "keep_ended": _count_or_none,
    "log": _log,
    "log_file": _path,
    "causes": _causes,
    "view": _switch,
    "canary": _seconds,
    "nice": _niceness,
}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    settings = {}
    for name, reader in _READERS.items():
        variable = _PREFIX + name.upper()
        if variable in environment:
            try:
                settings[name] = reader(environment[variable])
            except ValueError as error:
                raise ConfigError(
                    f"{variable} is {error}, not {environment[variable]!r}"
                ) from None
    return settings


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    settings = {}
    for key, value in content.items():
        reader = _READERS.get(key.replace("-", "_"))
        if reader is None or "_" in key:
            known = ", ".join(name.replace("_", "-") for name in _READERS)
            raise ConfigError(f"{path}: there is no {key!r}, only {known}")
        text = value if isinstance(value, str) else str(value).lower()
        try:
            settings[key.replace("-", "_")] = reader(text)
        except ValueError as error:
            raise ConfigError(f"{path}: {key} is {error}, not {value!r}") from None
    return settings


def _option(name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:  # noqa: ANN401 - as argparse wants it
        try:
            return _READERS[name](text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, not {text!r}") from None

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtrackd",
        description="Track, live, what happens to the memory of programs that ask "
        "for it: what was unmapped, moved, dropped or protected, and when.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Only what is given counts; the rest is for the environment and the file.
        argument_default=argparse.SUPPRESS,
    )

    def add(name: str, metavar: str, text: str) -> None:
        parser.add_argument(
            f"--{name}",
            metavar=metavar,
            help=text,
            type=_option(name.replace("-", "_")),
        )

    parser.add_argument("--config", metavar="FILE", help="read this file (TOML)")
    add(
        "socket",
        "PATH",
        "where programs attach (default: /run/memtrackd/memtrackd.sock for root, "
        "else below $XDG_RUNTIME_DIR)",
    )
    add("socket-mode", "MODE", "its permissions (default: 0660)")
    add("socket-group", "GROUP", "its group (default: that of the process)")
    add(
        "http",
        "HOST:PORT",
        "where to serve the page and /metrics (default: 127.0.0.1:9412), or 'off'",
    )
    add("max-clients", "N", "clients at a time (default: 256)")
    add("max-regions", "N", f"regions of a client (default: {protocol.REGION_LIMIT})")
    add("max-all-regions", "N", "regions of all clients (default: 1048576)")
    add("keep-ended", "N", "clients to remember after they ended (default: 100)")
    add("log", "FORMAT", "lines on standard error: text, json or off (default: text)")
    add("log-file", "FILE", "append the lines to a file instead")
    add(
        "causes",
        "LIST",
        "of the changes, log and draw only those with one of these causes, like "
        "unmap,move, or with none that is known (default: all); counted is all",
    )
    parser.add_argument(
        "--view", action="store_true", help="draw a live view in this terminal"
    )
    add(
        "canary",
        "SECONDS",
        "how often to unmap a page of the daemon's own to measure latency "
        "(default: 5), or 0",
    )
    add("nice", "N", "let clients go first where CPUs are short (default: 10), or 0")
    return parser
