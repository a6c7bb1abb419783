"""memtrackd from end to end: programs attach, and what they do is in its log.

The daemon and the programs are processes of their own, with time limits: what hangs
fails. Nothing is measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.memory import PAGE
from tests.memtrackd_process import LIMIT, Daemon, Program, environment, until
from tests.operations import kernel
from tests.sandbox import NOBODY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.memtrackd_process import Line

# Regions of one program, in mappings of less than a huge page.
MAPPINGS, PAGES = 4, 250
REGIONS = MAPPINGS * PAGES
# Which of them is seen first, nobody knows.
REASONS = {"it has left", "its memory is gone", "its process has ended"}


@pytest.fixture(
    params=[
        pytest.param("driver", marks=pytest.mark.device),
        # Not marked: the guests, which are slow, need not run it again.
        "embedded",
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def program(daemon: Daemon, backend: str) -> Iterator[Program]:
    with Program(daemon) as program:
        attach(program, backend)
        yield program


def attach(program: Program, backend: str, name: str = "tested", **how: object) -> None:
    """Let a program attach, and have eight pages."""
    arguments = "".join(f", {key}={value!r}" for key, value in how.items())
    for line in (
        f"tracker = memtrackd.attach({name!r}, backend={backend!r}{arguments})",
        "pages = Pages(8)",
    ):
        assert program.run(line) is None


def bounds(program: Program, number: int) -> Line:
    """Return where a page of the program is, as the log writes it."""
    start, end = program.run(f"pages.page({number})")
    return {"start": f"{start:#x}", "end": f"{end:#x}"}


def register(program: Program, number: int, name: str) -> None:
    code = f"regions[{name!r}] = tracker.register(*pages.page({number}), {name!r})"
    assert program.run("regions = globals().get('regions', {})") is None
    assert program.run(code) is None


# What is seen.


def test_what_a_program_does_is_in_the_log(
    daemon: Daemon, program: Program, backend: str
) -> None:
    attached = daemon.wait("attached")
    assert attached["name"] == "tested"
    assert attached["backend"] == backend
    assert attached["pid"] == program.pid
    number = attached["client"]
    for page, name in enumerate(["weights", 'a "name"', "\u20ac\U0001f600"]):
        register(program, page, name)
        where = bounds(program, page)
        daemon.wait("registered", client=number, region=name, **where)
    assert not daemon.lines("changed")

    program.run("pages.munmap(pages.page(0))")
    changed = daemon.wait("changed", region="weights")
    assert {"start": changed["start"], "end": changed["end"]} == bounds(program, 0)
    assert changed["client"] == number
    assert changed["exact"] is True
    assert changed["cause"] == "unmap"
    program.run("pages.madvise(MADV_DONTNEED, pages.page(1))")
    assert daemon.wait("changed", region='a "name"')["cause"] == "clear"

    program.run("regions['\u20ac\U0001f600'].close()")
    daemon.wait("unregistered", client=number, region="\u20ac\U0001f600")
    program.run("pages.munmap(pages.page(2))")
    program.run("tracker.close()")
    ended = daemon.wait("ended", client=number)
    assert ended["reason"] == "it has left"
    assert ended["changes"] == ended["generation"] == 2
    assert len(daemon.lines("changed")) == 2


def test_buffers_are_tracked_by_their_names(daemon: Daemon, program: Program) -> None:
    program.run("import mmap; buffer = mmap.mmap(-1, 4 * PAGE)")
    program.run("region = tracker.register(buffer, 'buffer')")
    start, end = program.run("[region.start, region.end]")
    assert end - start == 4 * PAGE
    daemon.wait("registered", region="buffer", start=f"{start:#x}", end=f"{end:#x}")
    program.run("buffer.close()")
    daemon.wait("changed", region="buffer", start=f"{start:#x}", end=f"{end:#x}")


def test_a_region_that_nobody_can_watch_is_not_kept(
    daemon: Daemon, program: Program
) -> None:
    program.run("pages.munmap(pages.page(0))")
    if "Unwatchable" not in str(program.run("tracker.register(0, PAGE, 'nothing')")):
        # The driver watches addresses, whatever is there.
        return
    register(program, 1, "after it")
    daemon.wait("registered", region="after it")
    until(lambda: bool(daemon.lines("unregistered", region="nothing")))
    program.run("tracker.close()")
    daemon.wait("ended")


@pytest.mark.parametrize("end", ["close", "exit", "kill", "exec", "crash"])
def test_each_end_of_a_program_is_seen(
    daemon: Daemon, program: Program, backend: str, end: str
) -> None:
    register(program, 0, "changes last")
    daemon.wait("registered", region="changes last")
    last = "pages.munmap(pages.page(0))"
    if end == "close":
        program.run(f"{last}; tracker.close()")
    elif end == "exit":
        program.run(last)
        assert program.end() == 0
    elif end == "kill":
        program.kill()
    elif end == "exec":
        program.start("os.execv('/bin/sleep', ['sleep', '60'])")
    else:
        program.start("os.abort()")
    ended = daemon.wait("ended")
    assert ended["reason"] in REASONS
    if end in {"close", "exit"}:
        # Nothing that happened before the end is lost.
        [changed] = daemon.lines("changed", region="changes last")
        assert "unmap" in changed["cause"]
        assert ended["changes"] == ended["generation"] >= 1
    assert daemon.lines("attached", backend=backend)


@pytest.mark.parametrize("how", ["os.fork", "multiprocessing", "fork of a library"])
def test_a_forked_child_does_not_keep_its_parent_alive(
    daemon: Daemon, program: Program, how: str
) -> None:
    if how == "fork of a library" and kernel() < (6, 5):
        pytest.skip("SO_PEERPIDFD comes with Linux 6.5")
    register(program, 0, "the parent's")
    fork = {
        "os.fork": "child = os.fork()\nif not child:\n    time.sleep(600)\n",
        "multiprocessing": "import multiprocessing\n"
        "context = multiprocessing.get_context('fork')\n"
        "process = context.Process(target=time.sleep, args=[600])\n"
        "process.start(); child = process.pid\n",
        # Python does not know of it, so that its hooks do not run.
        "fork of a library": "import ctypes\n"
        "libc = ctypes.PyDLL(None)\n"
        "child = libc.fork()\n"
        "if not child: libc.pause()\n",
    }[how]
    assert program.run(fork) is None
    child = program.run("child")
    try:
        register(program, 1, "after the fork")
        daemon.wait("registered", region="after the fork")
        program.run("pages.munmap(pages.page(1))")
        daemon.wait("changed", region="after the fork")
        program.kill()
        assert daemon.wait("ended")["name"] == "tested"
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_attaches_anew(daemon: Daemon, program: Program) -> None:
    backend = program.run("tracker.device.backend")
    code = (
        "if not os.fork():\n"
        "    tracker.register(*pages.page(0), 'not tracked').close()\n"
        f"    with memtrackd.attach('child', backend={backend!r}) as own:\n"
        "        own.register(*pages.page(1), 'of the child')\n"
        "        pages.munmap(pages.page(1))\n"
        "    os._exit(0)\n"
        "os.wait()"
    )
    assert program.run(code) is None
    assert daemon.wait("ended", name="child")["changes"] >= 1
    changed = daemon.lines("changed", name="child")
    assert {line["region"] for line in changed} == {"of the child"}
    # On the driver, together with what a fork does to the pages.
    assert any("unmap" in line["cause"].split("+") for line in changed), changed
    assert not daemon.lines("registered", region="not tracked")
    assert not daemon.lines("ended", name="tested")
    assert program.run("tracker.attached") is True


def test_each_of_several_programs_reports_its_own_only(
    daemon: Daemon, backend: str
) -> None:
    names = [f"program {i}" for i in range(5)]
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(daemon)) for _ in names]
        for name, program in zip(names, programs, strict=True):
            attach(program, backend, name)
            for page in range(8):
                register(program, page, f"{name}, page {page}")
        changes = "for i in range(8): pages.munmap(pages.page(i))"
        for program in programs:
            program.start(changes)
        for program in programs:
            assert program.result() is None
            program.run("tracker.close()")
    for name in names:
        ended = daemon.wait("ended", name=name)
        changed = daemon.lines("changed", name=name)
        assert ended["changes"] == len(changed)
        # The driver also reports the end of a process that the daemon had not let go.
        regions = [line["region"] for line in changed if line["cause"] != "end"]
        assert sorted(regions) == [f"{name}, page {page}" for page in range(8)]


def test_a_change_right_after_its_registration_is_its_own(
    tmp_path: Path, backend: str
) -> None:
    with (
        Daemon(tmp_path, "--http", "127.0.0.1:0") as daemon,
        Program(daemon) as program,
    ):
        attach(program, backend)
        code = (
            "for i in range(300):\n"
            "    own = Pages(1)\n"
            "    with tracker.register(*own.page(0), f'turn {i}'):\n"
            "        own.munmap()\n"
            "tracker.close()"
        )
        assert program.run(code) is None
        ended = daemon.wait("ended")
        # One more for each later use of the same addresses, on the driver.
        assert ended["changes"] >= 300
        assert ended["changes"] == len(daemon.lines("changed"))
        # A line can come before its region, where the socket was full; no count does.
        [client] = json.loads(daemon.get("/api/clients"))["clients"]
        assert client["unattributed"] == 0
        assert client["changes"] == ended["changes"]


# A daemon that is slow, stopped, dead, or started again.

MAPPED = f"""
mappings = [Pages({PAGES}) for _ in range({MAPPINGS})]
where = [pages.page(i) for pages in mappings for i in range({PAGES})]
done = 0
def register_all(name):
    global done
    for i, (start, end) in enumerate(where):
        tracker.register(start, end, f"{{name}} {{i}}")
        done += 1
def register_and_not():
    global done
    for start, end in where:
        with tracker.register(start, end, "short-lived"):
            done += 1
def change_all():
    global done
    for pages in mappings:
        for i in range({PAGES}):
            pages.madvise(MADV_DONTNEED, pages.page(i))
            done += 1
"""


def regions_of(lines: list[Line], name: str) -> set[str]:
    return {
        line["region"] for line in lines if str(line["region"]).startswith(f"{name} ")
    }


def all_of(name: str) -> set[str]:
    return {f"{name} {i}" for i in range(REGIONS)}


def test_a_stopped_daemon_holds_up_nobody_and_misses_nothing(
    daemon: Daemon, program: Program
) -> None:
    assert program.run(MAPPED) is None
    assert program.run("register_all('early')") is None
    until(lambda: program.run("tracker.flush()") is True)
    until(lambda: regions_of(daemon.lines("registered"), "early") == all_of("early"))
    daemon.stop()
    try:
        for code in ("change_all()", "register_all('late')", "register_and_not()"):
            assert program.run(code) is None
        for _ in range(5):
            assert program.run("change_all()") is None
        assert program.run("done") == 9 * REGIONS
        assert program.run("tracker.attached") is True
    finally:
        daemon.go_on()
    # What did not fit is sent with a later call.
    until(lambda: program.run("tracker.flush()") is True, "the daemon to take it")
    for name in ("early", "late"):
        everything = all_of(name)
        until(lambda: regions_of(daemon.lines("changed"), name) == everything)  # noqa: B023
    assert regions_of(daemon.lines("registered"), "late") == all_of("late")
    # They coalesce: there are not six reports of each.
    program.run("tracker.close()")
    ended = daemon.wait("ended")
    assert 2 * REGIONS <= ended["changes"] <= 11 * REGIONS


def test_a_dead_daemon_holds_up_nobody_and_the_next_one_is_told(
    daemon: Daemon, program: Program
) -> None:
    assert program.run(MAPPED) is None
    assert program.run("register_all('early')") is None
    daemon.kill()
    assert program.run("tracker.attached") is False
    assert program.run("register_all('late')") is None
    for _ in range(3):
        assert program.run("change_all()") is None
    assert program.run("done") == 5 * REGIONS
    assert program.run("tracker.flush()") is False

    daemon.start_again()
    until(lambda: program.run("tracker.flush()") is True, "the program to come back")
    number = daemon.lines("attached")[-1]["client"]
    assert daemon.lines("attached")[-1]["pid"] == program.pid
    until(lambda: len(daemon.lines("changed")) >= 2 * REGIONS)
    assert not daemon.lines("changed", region=None)
    for name in ("early", "late"):
        assert regions_of(daemon.lines("registered"), name) == all_of(name)
        assert regions_of(daemon.lines("changed"), name) == all_of(name)
    assert {line["client"] for line in daemon.lines("changed")} == {number}


def test_a_daemon_may_end_and_come_again_and_again(
    daemon: Daemon, program: Program
) -> None:
    register(program, 0, "constant")
    for turn in range(2):
        assert daemon.terminate() == 0
        assert program.run("tracker.attached") is False
        assert "gone" in program.run("tracker.error")
        daemon.start_again()
        until(lambda: program.run("tracker.flush()") is True)
        register(program, 1 + turn, f"turn {turn}")
        daemon.wait("registered", region=f"turn {turn}")
        count = turn + 2
        until(lambda: len(daemon.lines("registered", region="constant")) == count)  # noqa: B023


def test_a_program_may_be_there_before_its_daemon(tmp_path: Path, backend: str) -> None:
    daemon = Daemon(tmp_path)
    with Program(daemon) as program:
        missing = program.run(f"memtrackd.attach('eager', backend={backend!r})")
        assert missing.startswith("AttachError: no daemon listens at")
        attach(program, backend, "patient", required=False)
        register(program, 0, "early")
        program.run("pages.munmap(pages.page(0))")
        with daemon:
            until(lambda: program.run("tracker.flush()") is True)
            daemon.wait("registered", name="patient", region="early")
            daemon.wait("changed", name="patient", region="early", cause="unmap")


def test_attaching_to_a_stopped_daemon_fails_in_time(
    daemon: Daemon, backend: str
) -> None:
    daemon.stop()
    try:
        with Program(daemon) as program:
            code = f"memtrackd.attach('late', backend={backend!r}, timeout=0.2)"
            for _ in range(3):
                result = program.run(code)
                assert result.startswith("AttachError")
                assert "does not answer within 0.2 s: is it stopped" in result
            # No more than these wait in the queue of the kernel.
            full = program.run(
                "import socket; waiting = []\n"
                "for _ in range(1000):\n"
                "    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
                "    s.setblocking(False); waiting.append(s)\n"
                "    s.connect(os.environ['MEMTRACKD_SOCKET'])\n"
            )
            assert full.startswith("BlockingIOError")
            result = program.run(code)
            assert result.startswith("AttachError")
            assert "is stopped or overloaded" in result
            program.run("for s in waiting: s.close()")
    finally:
        daemon.go_on()
    daemon.is_served()


def test_a_refused_program_goes_on_and_knows_why(tmp_path: Path, backend: str) -> None:
    with Daemon(tmp_path, "--max-regions", "10") as daemon, Program(daemon) as program:
        attach(program, backend)
        assert program.run(MAPPED) is None
        assert program.run("register_all('too many')") is None
        until(lambda: program.run("tracker.attached") is False)
        assert "at most 10 regions" in program.run("tracker.error")
        assert program.run("change_all()") is None
        assert program.run("done") == 2 * REGIONS
        assert "at most 10" in daemon.wait("ended", name="tested")["reason"]
        daemon.is_served()


@pytest.mark.skipif(not NOBODY, reason="only root can be somebody else")
def test_who_may_not_attach_is_told_what_to_do(daemon: Daemon, backend: str) -> None:
    daemon.socket.parent.chmod(0o755)
    with Program(daemon) as program:
        # Only now: nobody may not even be allowed to start this Python.
        program.run("os.setgroups([]); os.setgid(65534); os.setuid(65534)")
        result = program.run(f"memtrackd.attach('x', backend={backend!r})")
        if "AttachError" not in result:
            pytest.skip(f"nobody cannot watch memory here: {result}")
        assert "this user may not attach" in result
        assert "membership in the group" in result


# What is left of many.


def test_a_thousand_clients_leave_nothing_behind(tmp_path: Path, backend: str) -> None:
    # A guest without KVM takes ten times as long.
    rounds, processes, each = 2, 4, 125 if backend == "embedded" else 15
    code = (
        "pages = Pages(1)\n"
        f"for i in range({each}):\n"
        f"    tracker = memtrackd.attach(f'one {{i}}', backend={backend!r})\n"
        "    region = tracker.register(*pages.page(0), 'page')\n"
        "    pages.madvise(MADV_DONTNEED, pages.page(0))\n"
        "    if i % 2: tracker.close()\n"
        "    del tracker, region\n"
    )
    fds, memory = [], []
    with Daemon(tmp_path, "--keep-ended", "20") as daemon, ExitStack() as stack:
        daemon.is_served()
        fds.append(daemon.fds)
        programs = [stack.enter_context(Program(daemon)) for _ in range(processes)]
        for turn in range(rounds):
            for program in programs:
                program.start(code)
            for program in programs:
                assert program.result() is None
            count = (turn + 1) * processes * each + 1
            until(lambda: len(daemon.lines("ended")) == count)  # noqa: B023
            until(lambda: daemon.fds == fds[0], "descriptors to be closed")
            memory.append(daemon.memory)
        mine = {program.run("len(os.listdir('/proc/self/fd'))") for program in programs}
        assert max(mine) < 20
    first, second = memory
    assert second - first < 2 << 20


# Clients that mean harm.

FLOOD = """
import fcntl, json, socket, struct, threading
from memtrackd import protocol
path = os.environ["MEMTRACKD_SOCKET"]
rows = [[i, 1, 2, "x" * 60] for i in range(500)]
update = json.dumps({"register": rows, "unregister": list(range(500))}).encode()
record = struct.pack("=IIQQQ", 0, 0, 1, 2, 7)

def connect(device=None):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    backend = "embedded" if device is None else "driver"
    hello = protocol.encode_hello(protocol.Hello("hostile", backend))
    if device is None:
        connection.send(hello)
    else:
        socket.send_fds(connection, [hello], [device.fileno()])
    connection.recv(1000)
    return connection

def flood(packet):
    connection = connect()
    while True:
        connection.send(packet)

def read_away():
    device = aioummu.Device()
    connection = connect(device)
    flags = fcntl.fcntl(device.fileno(), fcntl.F_GETFL)
    pages = Pages(64)
    for i in range(64):
        device.register(*pages.page(i), i)
    def change():
        while True:
            for i in range(64):
                pages.madvise(MADV_DONTNEED, pages.page(i))
    threading.Thread(target=change, daemon=True).start()
    while True:
        # The daemon has the same file, and sets it (uvloop does) now and then.
        fcntl.fcntl(device.fileno(), fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        try:
            os.read(device.fileno(), 32)
        except BlockingIOError:
            pass

def attack(*target):
    threading.Thread(target=target[0], args=target[1:], daemon=True).start()

for _ in range(2):
    attack(flood, update)
    attack(flood, record * 64)
attack(flood, record)
"""


def test_hostile_clients_hold_up_nobody_else(tmp_path: Path, backend: str) -> None:
    # Its log drops lines in such a storm, so it is asked.
    options = "--http", "127.0.0.1:0"
    with Daemon(tmp_path, *options) as daemon, Program(daemon) as hostile:

        def clients(name: str) -> list[Line]:
            found: list[Line] = json.loads(daemon.get("/api/clients"))["clients"]
            return [client for client in found if client["name"] == name]

        assert hostile.run(FLOOD) is None
        if backend == "driver":
            assert hostile.run("attack(read_away)") is None
        count = 5 + (backend == "driver")
        until(lambda: len(clients("hostile")) == count)
        with Program(daemon) as program:
            attach(program, backend, "good")
            for page in range(8):
                register(program, page, f"good {page}")
                program.run(f"pages.munmap(pages.page({page}))")
            until(lambda: program.run("tracker.flush()") is True)
            until(lambda: clients("good")[0]["changes"] == 8, "reports of a good one")
            [good] = clients("good")
            assert [region["changes"] for region in good["regions"]] == [1] * 8
            assert good["unattributed"] == 0
            assert program.run("tracker.attached") is True
        assert [client["ended"] for client in clients("hostile")] == [None] * count
        # It ends all the same, though they go on.
        assert daemon.terminate() == 0


# Nobody has to be there to clean up.


def test_a_program_that_says_nothing_more_ends_properly(
    daemon: Daemon, backend: str
) -> None:
    """Finalizers at the end of the interpreter, with a region and a tracker alive."""
    code = (
        "import memtrackd\nfrom tests.memory import Pages\npages = Pages(2)\n"
        f"tracker = memtrackd.attach('short', backend={backend!r})\n"
        "region = tracker.register(*pages.page(0), 'one')\n"
        "pages.munmap(pages.page(0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(MEMTRACKD_SOCKET=str(daemon.socket)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon.wait("ended", name="short")["changes"] == 1
    assert daemon.lines("changed", region="one")
