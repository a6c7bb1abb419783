"""The daemon memtrackd, and programs that it tracks, as processes with time limits."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtrackd import protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self, TypeAlias

PROJECT = Path(__file__).parent.parent
# Seconds after which something has hung.
LIMIT = 120
PERIOD = 0.01

Line: TypeAlias = "dict[str, Any]"


def until(condition: Callable[[], bool], what: str = "that") -> None:
    """Wait for something that surely comes."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(PERIOD)


def environment(**more: str) -> dict[str, str]:
    """Return variables for a process, without those that are meant for another."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("MEMTRACKD_")}
    # What is not closed, not awaited or not caught is told.
    path = os.pathsep.join(
        [os.fspath(PROJECT), *filter(None, [ours.get("PYTHONPATH")])]
    )
    return {**ours, "PYTHONPATH": path, "PYTHONWARNINGS": "error", **more}


class Daemon:
    """The daemon, with a log that a test can read.

    :param directory: for the socket and the log
    :param options: of the command line
    :param variables: of the environment
    :param prefix: a command that starts the daemon's own
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        variables: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        **how: Any,  # noqa: ANN401 - those of Popen
    ) -> None:
        self.socket = directory / "memtrackd.sock"
        self.log = directory / "log"
        self.errors = directory / "stderr"
        self._options = options
        self._variables = dict(variables or {})
        self._prefix = prefix
        self._how = how
        self._read = 0
        self._lines: list[Line] = []
        self._rest = b""
        self.process: subprocess.Popen[bytes]
        self.address: str | None = None

    def __enter__(self) -> Self:
        self.start()
        self.address = self.wait("started")["http"]
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and don't wait until it is ready."""
        command = [
            *self._prefix,
            *(sys.executable, "-m", "memtrackd", "--socket", os.fspath(self.socket)),
            *("--http", "off", "--canary", "0", "--log", "json"),
            *("--log-file", os.fspath(self.log)),
            *self._options,
        ]
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": errors,
                    "stderr": errors,
                    "env": environment(**self._variables),
                    **self._how,
                },
            )

    def start_again(self) -> None:
        """Start it after its end, and wait until it is ready."""
        count = len(self.lines("started"))
        self.start()
        until(lambda: len(self.lines("started")) > count, "the daemon")

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait(LIMIT)

    def stop(self) -> None:
        """Halt it, until it is continued."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: _state(self.pid) == "T", "the daemon to stop")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self) -> int:
        """End it properly, and return its status."""
        self.process.terminate()
        return self.process.wait(LIMIT)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def fds(self) -> int:
        """How many descriptors it has open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    @property
    def memory(self) -> int:
        """Bytes of memory that it uses."""
        statm = Path(f"/proc/{self.pid}/statm").read_text("ascii")
        return int(statm.split()[1]) * os.sysconf("SC_PAGESIZE")

    def lines(self, event: str | None = None, **facts: object) -> list[Line]:
        """Return the lines of the log about this."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._read)
            data = log.read()
            self._read += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines += map(json.loads, lines)
        return [
            line
            for line in self._lines
            if event in {None, line["event"]}
            and all(line.get(key) == value for key, value in facts.items())
        ]

    def wait(self, event: str, **facts: object) -> Line:
        """Wait for a line of the log about this, and return the first."""
        deadline = time.monotonic() + LIMIT
        while not (found := self.lines(event, **facts)):
            if time.monotonic() > deadline or self.process.poll() is not None:
                last = "\n".join(map(str, self._lines[-20:]))
                errors = self.errors.read_text("utf-8", "replace")
                raise AssertionError(f"no {event} {facts} in\n{last}\n{errors}")
            time.sleep(PERIOD)
        return found[0]

    def get(self, path: str) -> str:
        """Return what it shows, if it was started with an address."""
        url = f"{self.address}{path}"
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:  # noqa: S310
            text: str = answer.read().decode()
        return text

    def is_served(self) -> None:
        """Make sure that it takes in a client, and tells of it."""
        with Raw(self.socket) as client:
            number = client.hello("is it there")
            client.register(1, 0x1000, 0x2000, "a region of it")
            self.wait("registered", client=number)
        self.wait("ended", client=number)


class Raw:
    """A client that says what a test likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Waits for room in the queue, which a socket with a time limit does not.
        limit = struct.pack("ll", LIMIT, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.socket.connect(os.fspath(path))
        self.socket.settimeout(LIMIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: bytes | object, fds: Sequence[int] = ()) -> None:
        packet = message if isinstance(message, bytes) else json.dumps(message).encode()
        if fds:
            socket.send_fds(self.socket, [packet], fds)
        else:
            self.socket.send(packet)

    def hello(self, name: str = "raw") -> int:
        """Attach, without sending records, and return the client's number."""
        self.send(protocol.encode_hello(protocol.Hello(name, "embedded")))
        number = self.answer().get("client")
        assert isinstance(number, int)
        return number

    def register(self, cookie: int, start: int, end: int, name: str) -> None:
        self.send({"register": [[cookie, start, end, name]]})

    def answer(self) -> Line:
        """Return what the daemon says; nothing: it has hung up."""
        try:
            packet = self.socket.recv(protocol.PACKET_SIZE)
        except ConnectionResetError:
            # Something that it has not read; what it said comes after that.
            packet = self.socket.recv(protocol.PACKET_SIZE)
        answer: Line = json.loads(packet) if packet else {}
        return answer

    def refusal(self) -> str:
        """Return why the daemon hangs up."""
        answer = self.answer()
        assert "error" in answer, answer
        assert self.answer() == {}
        return str(answer["error"])


class Program:
    """A process of Python that does what a test says, bit by bit."""

    def __init__(self, daemon: Daemon | None = None, **how: Any) -> None:  # noqa: ANN401
        variables = {} if daemon is None else {"MEMTRACKD_SOCKET": str(daemon.socket)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(**variables),
            **how,
        )
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)

    def end(self) -> int:
        """Let it end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(LIMIT)

    def start(self, code: str) -> None:
        """Have it begin with this."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def result(self) -> Any:  # noqa: ANN401 - JSON
        """Return the value of what was begun; its exceptions come as text."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while b"\n" not in self._rest:
            assert select.select([fd], [], [], LIMIT)[0], "it hangs"
            data = os.read(fd, 1 << 16)
            assert data, f"it has ended: {self.process.wait(LIMIT)}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def run(self, code: str) -> Any:  # noqa: ANN401 - JSON
        """Have it do this, an expression or statements, and return the value."""
        self.start(code)
        return self.result()


_PROGRAM = """
import json, os, sys, time
import aioummu, memtrackd
from tests.memory import MADV_DONTNEED, PAGE, PROT_NONE, Pages

space = dict(globals())
for line in sys.stdin:
    code, value = json.loads(line), None
    try:
        try:
            code = compile(code, "<test>", "eval")
        except SyntaxError:
            exec(code, space)
        else:
            value = eval(code, space)
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
    print(json.dumps(value, default=str), flush=True)
"""


def _state(pid: int) -> str:
    stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    return stat.rpartition(")")[2].split()[0]
