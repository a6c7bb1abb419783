"""The C client of memtrackd: what it says, and that it never hurts its program.

The client runs in processes of its own, with time limits: what hangs fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import aioummu

protocol = pytest.importorskip("memtrackd.protocol")

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parent.parent
SOURCES = PROJECT / "examples" / "memtrackd" / "c"
# Seconds after which something has hung, also in a guest without KVM.
LIMIT = 240

# What the client does not find, so that it takes the embedded engine.
NO_DRIVER = """CFLAGS=-O2 -g -DDRIVER='"/nowhere"'"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(build: Path, *targets: str) -> Path:
    subprocess.run(
        ["make", "-C", SOURCES, f"BUILD={build}", *targets],  # noqa: S607
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    return build


#: For what depends on the kernel; the guests run nothing else.
both = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("embedded", marks=pytest.mark.embedded),
        pytest.param("driver", marks=pytest.mark.device),
    ],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    backend: str = getattr(request, "param", "embedded")
    return backend


@pytest.fixture(scope="module")
def build(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = [NO_DRIVER] if backend == "embedded" else []
    return make(tmp_path_factory.mktemp("c"), *flags)


@attrs.define(eq=False)
class Connection:
    """A client, as a daemon sees it."""

    socket: socket.socket
    hello: Any
    device: aioummu.Device | None
    """The driver, if the client has sent it; else it sends its records."""
    table: dict[int, Any] = attrs.field(factory=dict)
    """What it has registered, by cookie."""
    seen: dict[int, Any] = attrs.field(factory=dict)
    """What it has ever registered."""
    changes: list[tuple[int, aioummu.Cause, int, int]] = attrs.field(factory=list)
    """Cookies, causes and ranges of what was reported."""
    early: int = 0
    """Reports of regions that were not announced yet."""

    def receive(self) -> bool:
        """Take in one message; False: the client has left."""
        packet = self.socket.recv(protocol.PACKET_SIZE)
        if not packet:
            return False
        if packet[:1] != b"{":
            self.report(packet)
            return True
        update = protocol.decode_update(packet)
        for cookie in update.unregister:
            del self.table[cookie]
        for entry in update.register:
            self.table[entry.cookie] = self.seen[entry.cookie] = entry
        return True

    def receive_until(self, names: list[str]) -> None:
        while sorted(entry.name for entry in self.table.values()) != sorted(names):
            assert self.receive()

    def receive_until_told(self, cookie: int, cause: aioummu.Cause) -> None:
        buffer = bytearray(1 << 14)
        deadline = time.monotonic() + LIMIT
        while not any(c[0] == cookie and cause in c[1] for c in self.changes):
            assert time.monotonic() < deadline
            if self.device is None:
                assert self.receive()
            elif size := self.device.readinto(buffer):
                self.report(buffer[:size])

    def report(self, records: bytes | bytearray) -> None:
        for kind, flags, start, end, number in aioummu.unpack(records):
            if kind != aioummu.LAST:
                self.early += number not in self.seen
                self.changes.append((number, aioummu.cause_of(flags), start, end))

    def close(self) -> None:
        self.socket.close()
        if self.device is not None:
            self.device.close()


class Daemon:
    """A daemon of which a test decides what it does, and when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.settimeout(LIMIT)
        self.listener.bind(str(path))
        self.listener.listen()
        self.connections: list[Connection] = []

    def accept(self, answer: bytes = b'{"client": 17}') -> Connection:
        connection, _ = self.listener.accept()
        connection.settimeout(LIMIT)
        packet, descriptors, *_ = socket.recv_fds(connection, protocol.PACKET_SIZE, 8)
        hello = protocol.decode_hello(packet)
        assert len(descriptors) == (hello.backend == "driver")
        device = aioummu.Device.from_fd(descriptors[0]) if descriptors else None
        attached = Connection(connection, hello, device)
        self.connections.append(attached)
        connection.send(answer)
        return attached

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "socket")
    yield daemon
    daemon.close()


class Program:
    """A process that is told what to do, line by line."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.timer = threading.Timer(LIMIT, self.process.kill)
        self.timer.start()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def tell(self, line: str) -> str:
        """Return what it says to that."""
        self.send(line)
        return self.hear()

    def obey(self, line: str) -> None:
        assert self.tell(line) == "ok"

    def end(self) -> int:
        """Let it end by itself, and return its status."""
        assert self.process.stdin
        self.process.stdin.close()
        status = self.process.wait(LIMIT)
        self.close()
        return status

    def close(self) -> None:
        self.timer.cancel()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    programs: list[Program] = []
    yield programs
    for program in programs:
        program.close()


PRELUDE = """
import ctypes, errno, mmap, os, sys, threading, time

lib = ctypes.CDLL({library!r})
lib.memtrack_attach.restype = ctypes.c_void_p
lib.memtrack_attach.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_size_t]
lib.memtrack_register.restype = ctypes.c_int64
lib.memtrack_register.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_char_p]
lib.memtrack_unregister.argtypes = [ctypes.c_void_p, ctypes.c_int64]
lib.memtrack_flush.restype = ctypes.c_size_t
lib.memtrack_flush.argtypes = [ctypes.c_void_p]
lib.memtrack_attached.restype = ctypes.c_bool
lib.memtrack_attached.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
lib.memtrack_detach.argtypes = [ctypes.c_void_p]

error = ctypes.create_string_buffer(512)
page = mmap.mmap(-1, mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(page))

def attach(path={path!r}):
    return lib.memtrack_attach(path.encode(), b"program", error, len(error))

def register(name, size=mmap.PAGESIZE):
    return lib.memtrack_register(tracker, start, start + size, name)

def attached():
    return lib.memtrack_attached(tracker, error, len(error))

def descriptors():
    return sorted(os.listdir("/proc/self/fd"))

def say(what):
    print(what, flush=True)

def wait_for_word():
    return sys.stdin.readline()
"""


@attrs.frozen
class Scripts:
    """Starts Python programs that call the client."""

    build: Path
    path: Path
    programs: list[Program]

    def start(self, code: str) -> Program:
        prelude = PRELUDE.format(
            library=str(self.build / "libmemtrack.so"), path=str(self.path)
        )
        program = Program(sys.executable, "-c", prelude + textwrap.dedent(code))
        self.programs.append(program)
        return program


@pytest.fixture
def scripts(build: Path, tmp_path: Path, programs: list[Program]) -> Scripts:
    return Scripts(build, tmp_path / "socket", programs)


def example(build: Path, path: Path, programs: list[Program]) -> Program:
    program = Program(build / "example", "--socket", path, "--name", "a program")
    programs.append(program)
    return program


@both
def test_daemon_learns_what_happens_to_each_buffer(
    backend: str, build: Path, daemon: Daemon, programs: list[Program]
) -> None:
    program = example(build, daemon.path, programs)
    client = daemon.accept()
    assert program.hear() == "tracked"
    assert (client.hello.name, client.hello.backend) == ("a program", backend)
    program.obey("map first 4")
    program.obey("map second 2")
    client.receive_until(["first", "second"])
    first, second = client.table.values()
    assert (first.end - first.start, second.end - second.start) == (4 << 12, 2 << 12)

    program.obey("drop first")
    program.obey("unmap second")
    client.receive_until_told(first.cookie, aioummu.Cause.CLEAR)
    client.receive_until_told(second.cookie, aioummu.Cause.UNMAP)
    assert {cookie for cookie, *_ in client.changes} == {first.cookie, second.cookie}
    if backend == "embedded":
        assert client.changes == [
            (first.cookie, aioummu.Cause.CLEAR, first.start, first.end),
            (second.cookie, aioummu.Cause.UNMAP, second.start, second.end),
        ]
    assert program.tell("status") == "attached, 0 to say"
    assert program.hear() == "ok"
    client.receive_until(["first"])
    assert program.end() == 0
    assert not client.receive()


@both
def test_buffer_that_moves_is_a_new_region_elsewhere(
    backend: str, build: Path, daemon: Daemon, programs: list[Program]
) -> None:
    program = example(build, daemon.path, programs)
    client = daemon.accept()
    program.hear()
    program.obey("map wanderer 4")
    client.receive_until(["wanderer"])
    (before,) = client.table.values()
    program.obey("move wanderer")
    # The driver cannot tell that from unmapping.
    cause = aioummu.Cause.MOVE if backend == "embedded" else aioummu.Cause.UNMAP
    client.receive_until_told(before.cookie, cause)
    while len(client.seen) < 2:
        assert client.receive()
    _, after = client.seen.values()
    assert before.name == after.name == "wanderer"
    assert before.cookie != after.cookie
    assert before.start != after.start
    program.obey("forget wanderer")
    client.receive_until([])
    assert program.end() == 0


def test_program_runs_without_a_daemon(
    build: Path, tmp_path: Path, programs: list[Program]
) -> None:
    program = example(build, tmp_path / "nobody", programs)
    assert program.hear() == (
        f"not tracked: no daemon listens at {tmp_path}/nobody: start memtrackd, or say "
        "where it listens (MEMTRACKD_SOCKET)"
    )
    program.obey("map buffer 4")
    program.obey("move buffer")
    program.obey("unmap buffer")
    assert program.end() == 0


def test_daemon_that_never_answers_is_not_waited_for(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        begun = time.monotonic()
        assert not attach()
        say(f"{time.monotonic() - begun < 30} {error.value.decode()}")
        """
    )
    assert program.hear() == (
        f"True the daemon at {daemon.path} does not answer within 2 s: is it stopped, "
        "or overloaded?"
    )
    assert program.end() == 0


def test_stopped_daemon_with_a_full_queue_is_not_waited_for(
    daemon: Daemon, scripts: Scripts
) -> None:
    daemon.listener.listen(0)
    others = []
    for _ in range(3):
        other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.setblocking(False)
        others.append(other)
        if other.connect_ex(str(daemon.path)):
            break
    program = scripts.start("assert not attach(); say(error.value.decode())")
    assert program.hear() == f"the daemon at {daemon.path} is stopped or overloaded"
    assert program.end() == 0
    for other in others:
        other.close()


def test_refusal_is_told_and_final(daemon: Daemon, scripts: Scripts) -> None:
    program = scripts.start(
        """
        assert not attach(), "taken"
        say(error.value.decode())
        tracker = attach()
        assert register(b"never read") > 0
        say(attached())
        wait_for_word()
        say(f"{attached()} {error.value.decode()}")
        for _ in range(3):
            assert register(b"more") > 0
            time.sleep(1)
        say(attached())
        """
    )
    refusal = json.dumps({"error": 'not "you", \\o/'}).encode()
    daemon.accept(refusal)
    assert program.hear() == 'not "you", \\o/'
    client = daemon.accept()
    assert program.hear() == "True"
    client.socket.send(b'{"error":"too many regions"}')
    client.close()
    assert program.tell("go on") == "False too many regions"
    assert program.hear() == "False"  # three attempts later
    daemon.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        daemon.listener.accept()
    assert program.end() == 0


def test_what_is_no_daemon_is_left_alone(daemon: Daemon, scripts: Scripts) -> None:
    program = scripts.start("assert not attach(); say(error.value.decode())")
    daemon.accept(b"HTTP/1.0 400 Bad Request")
    assert program.hear() == "this is no memtrackd: it speaks differently"
    assert program.end() == 0


@both
def test_slow_daemon_is_told_everything_later(daemon: Daemon, scripts: Scripts) -> None:
    program = scripts.start(
        """
        tracker = attach()
        cookies = [register(b"region %d" % i) for i in range(20_000)]
        assert min(cookies) > 0 and len(set(cookies)) == 20_000
        for cookie in cookies[::2]:
            assert lib.memtrack_unregister(tracker, cookie) == 0
        assert attached()
        say(lib.memtrack_flush(tracker) > 0)
        while lib.memtrack_flush(tracker):
            time.sleep(0.001)
        say("all said")
        wait_for_word()
        """
    )
    client = daemon.accept()
    assert program.hear() == "True"
    client.receive_until([f"region {i}" for i in range(1, 20_000, 2)])
    assert program.hear() == "all said"
    assert program.end() == 0


def test_cookies_that_a_stopped_daemon_keeps_do_not_use_up_the_table(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        tracker = attach()
        cookies = []
        for i in range(65536):
            cookies.append(register(b"first"))
            if i % 4096 == 0:
                lib.memtrack_flush(tracker)
        assert min(cookies) > 0
        assert register(b"too many") == -errno.ENOSPC
        while lib.memtrack_flush(tracker):
            time.sleep(0.001)
        say("full")
        wait_for_word()
        for cookie in cookies:
            assert lib.memtrack_unregister(tracker, cookie) == 0
        assert lib.memtrack_unregister(tracker, cookies[0]) == -errno.ENOENT
        for _ in range(65536):
            assert register(b"second") > 0
        say(attached())
        say(error.value.decode())
        """
    )
    client = daemon.accept()
    while len(client.table) < 65536:
        assert client.receive()
    assert program.hear() == "full"
    program.send("go on")
    assert program.hear() == "False"
    assert program.hear() == "the daemon is too slow"
    assert program.end() == 0


@both
def test_daemon_that_was_started_again_is_told_all_regions(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        tracker = attach()
        kept, dropped = register(b"kept"), register(b"dropped")
        lib.memtrack_flush(tracker)
        wait_for_word()
        say(f"{attached()} {error.value.decode()}")
        assert lib.memtrack_unregister(tracker, dropped) == 0
        assert register(b"new") > 0
        say("goes on")
        while not attached():
            lib.memtrack_flush(tracker)
            time.sleep(0.01)
        say("attached")
        wait_for_word()
        page.madvise(mmap.MADV_DONTNEED)
        wait_for_word()
        """
    )
    client = daemon.accept()
    client.receive_until(["kept", "dropped"])
    daemon.close()
    assert program.tell("look") == "False the daemon is gone"
    assert program.hear() == "goes on"
    again = Daemon(daemon.path)
    try:
        client = again.accept()
        assert program.hear() == "attached"
        client.receive_until(["kept", "new"])
        program.send("drop")
        for cookie in client.table:
            client.receive_until_told(cookie, aioummu.Cause.CLEAR)
        assert program.end() == 0
    finally:
        again.close()


# Of the embedded engine: the driver drops reports that nobody has read.
def test_report_is_not_lost_with_a_region_that_is_unregistered_at_once(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        tracker = attach()
        for _ in range(200):
            start = libc.mmap(None, 4096, 3, 0x22, -1, 0)
            cookie = register(b"short-lived", 4096)
            assert libc.munmap(start, 4096) == 0
            assert lib.memtrack_unregister(tracker, cookie) == 0
        start = libc.mmap(None, 4096, 3, 0x22, -1, 0)
        register(b"the last", 4096)
        libc.munmap(start, 4096)
        lib.memtrack_detach(tracker)
        """
    )
    client = daemon.accept()
    while client.receive():
        pass
    assert [change[0] for change in client.changes] == list(client.seen)
    assert len(client.changes) == 201
    assert not client.early
    assert program.end() == 0


def test_every_name_that_can_be_shown_arrives_as_it_is(
    daemon: Daemon, scripts: Scripts
) -> None:
    # Unassigned ones are left out: what is assigned depends on the Unicode version.
    shown = [c for c in map(chr, range(1, 0x110000)) if c.isprintable()]
    names = ["".join(shown[i : i + 32]) for i in range(0, len(shown), 32)]
    names += ['"', "\\", '\\"' * 64, "a/b", "\\u0041", " ", "\U0001f600" * 32]
    program = scripts.start(
        f"""
        tracker = attach()
        shown = [c for c in map(chr, range(1, 0x110000)) if c.isprintable()]
        names = ["".join(shown[i : i + 32]) for i in range(0, len(shown), 32)]
        names += {names[-7:]!r}
        for name in names:
            assert register(name.encode()) > 0, name
        while lib.memtrack_flush(tracker):
            time.sleep(0.001)
        say(len(names))
        """
    )
    client = daemon.accept()
    client.receive_until(names)
    assert program.hear() == str(len(names))
    assert program.end() == 0


def test_names_that_the_daemon_would_refuse_are_refused_at_once(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        import unicodedata

        tracker = attach()
        for point in range(1, 0x110000):
            char = chr(point)
            kind = unicodedata.category(char)
            if char.isprintable() or kind in ("Cn", "Cs"):
                continue
            result = register(b"a" + char.encode())
            assert result == -errno.EINVAL, hex(point)
        broken = [
            b"\\x80", b"a\\xc3", b"\\xc0\\x80", b"\\xc1\\xbf", b"\\xe0\\x80\\x80",
            b"\\xed\\xa0\\x80", b"\\xf0\\x80\\x80\\x80", b"\\xf4\\x90\\x80\\x80",
            b"\\xf8\\x88\\x80\\x80\\x80", b"\\xff", b"\\xe2\\x82", b"\\xc3(",
        ]
        for name in broken:
            assert register(name) == -errno.EILSEQ, name
        assert register(b"") == register(None) == -errno.EINVAL
        assert register(b"a" * 129) == -errno.ENAMETOOLONG
        assert register(b"a" * 128) > 0
        assert register(b"empty", 0) == register(b"backward", -1) == -errno.EINVAL
        assert attached()
        say("all refused")
        wait_for_word()
        """
    )
    client = daemon.accept()
    assert program.hear() == "all refused"
    client.receive_until(["a" * 128])
    assert program.end() == 0


# Of the embedded engine: the driver watches addresses, whatever is mapped there.
def test_unmapped_memory_is_refused_and_taken_back(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        tracker = attach()
        say(-lib.memtrack_register(tracker, 4096, 8192, b"nothing") == errno.EFAULT)
        register(b"something")
        wait_for_word()
        """
    )
    client = daemon.accept()
    assert program.hear() == "True"
    client.receive_until(["nothing"])
    client.receive_until(["something"])
    assert program.end() == 0


@both
def test_child_of_a_fork_keeps_nothing_of_it_open(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        before = descriptors()
        tracker = attach()
        cookie = register(b"the parent's")
        child = os.fork()
        if not child:
            # As before, but for what reads the directory.
            same = descriptors() == before
            quiet = register(b"the child's") == 0
            quiet &= lib.memtrack_unregister(tracker, cookie) == 0
            quiet &= lib.memtrack_flush(tracker) == 0 and not attached()
            say(f"{same} {quiet} {error.value.decode()}")
            lib.memtrack_detach(tracker)
            tracker = attach()
            say(f"{tracker is not None and register(b'own') > 0}")
            wait_for_word()
            time.sleep(60)
        wait_for_word()
        os._exit(0)
        """
    )
    client = daemon.accept()
    assert program.hear() == (
        "True True this process was forked: it can attach by itself"
    )
    child = daemon.accept()
    assert program.hear() == "True"
    client.receive_until(["the parent's"])
    child.receive_until(["own"])
    # The parent ends, the child lives: the daemon sees the end at once.
    credentials = child.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, _, _ = struct.unpack("3i", credentials)
    program.process.kill()
    assert not client.receive()
    os.kill(pid, signal.SIGKILL)
    assert not child.receive()


@both
def test_forks_while_threads_register_find_everything_complete(
    build: Path, daemon: Daemon, programs: list[Program]
) -> None:
    program = Program(build / "stress", daemon.path, "4", "500")
    programs.append(program)
    client = daemon.accept()
    assert program.hear() == "attached"
    reader = threading.Thread(target=lambda: all(iter(client.receive, False)))
    reader.start()
    assert program.hear().endswith("left=0 attached=1")
    assert program.end() == 0
    reader.join(LIMIT)
    assert not client.table
    assert len(client.seen) > 0


@both
@pytest.mark.parametrize("death", ["killed", "stopped"])
def test_daemon_that_dies_or_stops_does_not_disturb_threads(
    build: Path, daemon: Daemon, programs: list[Program], death: str
) -> None:
    program = Program(build / "stress", daemon.path, "4", "1500")
    programs.append(program)
    client = daemon.accept()
    assert program.hear() == "attached"
    for _ in range(10):
        client.receive()
    if death == "killed":
        daemon.close()
    # Else nothing is read any more, neither regions nor reports.
    line = program.hear()
    assert line.endswith(f"attached={int(death == 'stopped')}")
    assert program.end() == 0


def test_no_descriptor_thread_or_child_is_left_behind(
    daemon: Daemon, scripts: Scripts, tmp_path: Path
) -> None:
    program = scripts.start(
        f"""
        def threads():
            return len(os.listdir("/proc/self/task"))

        def once():
            global tracker
            tracker = attach()
            assert tracker, error.value
            assert register(b"a region") > 0
            lib.memtrack_detach(tracker)

        # The threads that feed the daemon end by themselves.
        def wait_for_threads():
            deadline = time.monotonic() + 30
            while threads() > 1 and time.monotonic() < deadline:
                time.sleep(0.01)

        once()
        wait_for_threads()
        before = descriptors()
        for _ in range(100):
            once()
            assert not attach({str(tmp_path / "nobody")!r})
        wait_for_threads()
        say(f"{{descriptors() == before}} {{threads()}}")
        """
    )
    for _ in range(101):
        client = daemon.accept()
        while client.receive():
            pass
        client.close()
    assert program.hear() == "True 1"
    assert program.end() == 0


def test_nothing_is_inherited_by_other_programs(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        tracker = attach()
        assert register(b"a region") > 0
        import fcntl
        kept = [
            fd for fd in map(int, descriptors())
            if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}")
            and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        ]
        say(kept)
        """
    )
    daemon.accept()
    assert program.hear() == "[]"
    assert program.end() == 0


def test_descriptor_that_the_program_took_over_is_not_written_to(
    daemon: Daemon, scripts: Scripts
) -> None:
    program = scripts.start(
        """
        before = set(descriptors())
        tracker = attach()
        ours, theirs = __import__("socket").socketpair()
        for fd in map(int, set(descriptors()) - before):
            # The connection only: the engine has tests of its own.
            if fd in (ours.fileno(), theirs.fileno()):
                continue
            try:
                name = os.readlink(f"/proc/self/fd/{fd}")
            except FileNotFoundError:
                continue
            if name.startswith("socket:"):
                os.dup2(theirs.fileno(), fd)
        ours.setblocking(False)
        assert register(b"a region") > 0
        lib.memtrack_flush(tracker)
        say(f"{attached()} {error.value.decode()}")
        lib.memtrack_detach(tracker)
        try:
            say(ours.recv(100))
        except BlockingIOError:
            say("nothing")
        """
    )
    daemon.accept()
    assert program.hear() == "False the program has closed the connection"
    assert program.hear() == "nothing"
    assert program.end() == 0


def test_tracker_of_nothing_takes_every_call(scripts: Scripts) -> None:
    program = scripts.start(
        """
        tracker = None
        assert register(b"a region") == 0
        assert lib.memtrack_unregister(tracker, 0) == 0
        assert lib.memtrack_unregister(tracker, 65536) == 0
        assert lib.memtrack_flush(tracker) == 0
        assert not attached()
        lib.memtrack_detach(tracker)
        # Neither does anybody have to want the error.
        assert not lib.memtrack_attach(b"/nowhere", b"x", None, 0)
        assert not lib.memtrack_attach(b"/" + b"x" * 200, b"x", error, 512)
        assert not lib.memtrack_attach(b"/nowhere", b"two\\nlines", error, 512)
        assert not lib.memtrack_attach(b"/nowhere", b"x", error, 8)
        say(error.value)
        """
    )
    assert program.hear() == "b'no daem'"
    assert program.end() == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_header_is_cpp_as_well(build: Path, tmp_path: Path) -> None:
    source = tmp_path / "program.cc"
    source.write_text(
        '#include "memtrack.h"\n'
        "int main() { return !!memtrack_attach(nullptr, nullptr, nullptr, 0); }\n"
    )
    command: list[str | Path] = [
        "g++",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-I",
        SOURCES,
    ]
    command += [source, build / "libmemtrack.a", "-o", tmp_path / "program"]
    subprocess.run(command, check=True, timeout=LIMIT)
    environment = {"MEMTRACKD_SOCKET": str(tmp_path / "nobody")}
    subprocess.run([tmp_path / "program"], check=True, timeout=LIMIT, env=environment)


@pytest.mark.skipif(
    Path(aioummu.DEFAULT_PATH).exists(), reason="it would take the driver"
)
@pytest.mark.parametrize("sanitizer", ["tsan", "asan"])
def test_sanitizers_find_nothing(
    sanitizer: str, tmp_path: Path, daemon: Daemon, programs: list[Program]
) -> None:
    build = make(tmp_path, sanitizer) / sanitizer
    program = Program(build / "stress", daemon.path, "3", "300")
    programs.append(program)
    client = daemon.accept()
    assert program.hear() == "attached"
    reader = threading.Thread(target=lambda: all(iter(client.receive, False)))
    reader.start()
    assert program.hear().endswith("left=0 attached=1")
    # Leaks are found at the end.
    assert program.end() == 0
    reader.join(LIMIT)


@both
def test_real_daemon_takes_it(
    build: Path, tmp_path: Path, programs: list[Program]
) -> None:
    path = tmp_path / "socket"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "memtrackd", "--socket", path, "--log", "json"]
    daemon = subprocess.Popen(
        [*map(str, command), "--http", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + LIMIT
        while not path.is_socket():
            assert daemon.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program = example(build, path, programs)
        assert program.hear() == "tracked"
        program.obey("map buffer 4")
        program.obey("drop buffer")
        while True:
            assert time.monotonic() < deadline
            url = f"http://127.0.0.1:{port}/api/clients"
            with urllib.request.urlopen(url, timeout=LIMIT) as answer:
                shown = json.load(answer)
            clients = shown["clients"] if isinstance(shown, dict) else shown
            (client,) = clients
            if client["changes"]:
                break
            time.sleep(0.02)
        assert client["name"] == "a program"
        assert client["pid"] == program.process.pid
        assert client["program"] == "example"
        (region,) = client["regions"]
        assert region["name"] == "buffer"
        assert "clear" in region["causes"]
        assert client["unattributed"] == 0
        assert program.end() == 0
    finally:
        daemon.terminate()
        assert daemon.wait(LIMIT) == 0
