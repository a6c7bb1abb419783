"""memtrackd as a service: how it starts, is told things, and ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from memtrackd import config

from tests.memtrackd_process import (
    LIMIT,
    Daemon,
    Program,
    Raw,
    environment,
    until,
)
from tests.sandbox import NOBODY

if TYPE_CHECKING:
    from pathlib import Path

# Somewhere in region 1, something happened.
RECORD = struct.pack("=II3Q", 0, 0, 0x1000, 0x2000, 1)


def refused(
    *options: str, variables: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> str:
    """Start a daemon that cannot, and return what it says."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "memtrackd", "--http", "off", *options],
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


# How it does not start.


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        error = refused("--socket", str(daemon.socket))
        assert error.startswith("memtrackd: another daemon listens at")
        assert str(daemon.socket) in error
        assert "choose another --socket" in error
        daemon.is_served()


def test_the_socket_of_a_dead_daemon_is_taken_over(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        daemon.kill()
        assert daemon.socket.is_socket()
        daemon.start_again()
        daemon.is_served()
        assert daemon.terminate() == 0
        assert not daemon.socket.exists()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    error = refused("--socket", str(path))
    assert "is there already, and no socket" in error
    assert path.read_text() == "data"


def test_a_directory_in_which_others_write_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o777)
    error = refused("--socket", str(directory / "socket"))
    assert "others may write to" in error
    assert list(directory.iterdir()) == []


def test_a_place_without_permission_is_named(tmp_path: Path) -> None:
    # Not even root may write there.
    error = refused("--socket", "/sys/memtrackd.sock")
    assert "/sys/memtrackd.sock" in error
    assert "--socket" in error
    file = tmp_path / "file"
    file.touch()
    error = refused("--socket", str(file / "socket"))
    assert str(file) in error


def test_a_group_that_is_none_leaves_no_socket_behind(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    error = refused("--socket", str(path), "--socket-group", "no-such-group")
    assert "no group 'no-such-group'" in error
    assert not path.exists()


def test_a_log_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    error = refused("--socket", str(path), "--log-file", str(tmp_path))
    assert f"the log file {tmp_path} cannot be opened" in error
    assert not path.exists()


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        path = tmp_path / "socket"
        error = refused("--socket", str(path), "--http", address)
    assert address in error
    assert "--http" in error
    assert not path.exists()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("max-clients", "0", "a number from 1 on"),
        ("max-clients", "many", "a number from 1 on"),
        ("max-regions", "-1", "a number from 1 on"),
        ("keep-ended", "1.5", "a number from 0 on"),
        ("socket-mode", "0999", "an octal mode"),
        ("http", "localhost", "HOST:PORT"),
        ("http", "127.0.0.1:65536", "HOST:PORT"),
        ("log", "xml", "text, json or off"),
        ("canary", "nan", "a number of seconds"),
        ("canary", "-1", "a number of seconds"),
        ("nice", "20", "a number from 0 to 19"),
        ("causes", "unmap,sunspots", "'all', or some of unmap,clear,"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_wherever_it_stands(
    tmp_path: Path, option: str, value: str, expected: str
) -> None:
    variable = "MEMTRACKD_" + option.upper().replace("-", "_")
    file = tmp_path / "config.toml"
    file.write_text(f'{option} = "{value}"\n')
    for given, where in [
        ({"arguments": [f"--{option}={value}"]}, f"--{option}"),
        ({"arguments": [], "environment": {variable: value}}, variable),
        ({"arguments": ["--config", str(file)], "environment": {}}, str(file)),
    ]:
        assert value in (text := _complaint(**given))  # type: ignore[arg-type]
        assert expected in text
        assert where in text


def _complaint(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        written: list[str] = []
        patch.setattr(sys.stderr, "write", written.append, raising=False)
        stack.enter_context(pytest.raises((config.ConfigError, SystemExit)))
        try:
            config.load_config(arguments, environment or {})
        except config.ConfigError as error:
            written.append(str(error))
            raise
    return "".join(written)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max-clients = ", "is not TOML"),
        ("max_clients = 1", "there is no 'max_clients', only"),
        ("colour = 'red'", "there is no 'colour', only"),
        ("max-clients = true", "max-clients is a number from 1 on, not True"),
        ("max-clients = [1]", "max-clients is a number from 1 on"),
        ("[log]\nfile = 'x'", "log is text, json or off"),
        (b"\xff = 1", "is not TOML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_makes_no_sense_is_told(
    tmp_path: Path, content: str | bytes | None, expected: str
) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(config.ConfigError, match=re.escape(expected)) as raised:
        config.load_config(["--config", str(path)], {})
    assert str(path) in str(raised.value)


def test_a_bad_start_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    [line] = refused(
        "--socket", path, variables={"MEMTRACKD_MAX_CLIENTS": "x"}
    ).splitlines()
    assert line == "memtrackd: MEMTRACKD_MAX_CLIENTS is a number from 1 on, not 'x'"
    assert "usage:" in refused("--max-clients", "x")
    assert "usage:" in refused("--no-such-option")


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.toml"
    path.write_text("max-clients = 1\nmax-regions = 1\nkeep-ended = 1\nview = true\n")
    variables = {
        "MEMTRACKD_CONFIG": str(path),
        "MEMTRACKD_MAX_REGIONS": "2",
        "MEMTRACKD_KEEP_ENDED": "2",
    }
    found = config.load_config(["--keep-ended", "3"], variables)
    assert (found.max_clients, found.max_regions, found.keep_ended) == (1, 2, 3)
    assert found.view is True


def test_help_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memtrackd", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    for name in [*config._READERS, "config"]:
        assert f"--{name.replace('_', '-')}" in done.stdout
    for word in ("SIGTERM", "SIGHUP", "MEMTRACKD_MAX_CLIENTS", "never contents"):
        assert word in done.stdout


# Permissions.


def test_the_socket_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--socket-mode", "0606") as daemon:
        assert daemon.socket.stat().st_mode & 0o777 == 0o606


@pytest.mark.skipif(not NOBODY, reason="only root can be somebody else")
def test_who_is_named_as_the_user_is_who_attached(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with Daemon(tmp_path, "--socket-mode", "0666") as daemon, Program() as program:
        # Its directory belongs to root alone, so it goes there before.
        program.run(f"import socket; os.chdir({str(tmp_path)!r})")
        program.run("os.setgroups([]); os.setgid(65534); os.setuid(65534)")
        code = (
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "s.connect('memtrackd.sock')\n"
            's.send(b\'{"memtrackd":1,"name":"n","backend":"embedded"}\')\n'
            "s.recv(1000); s.close()"
        )
        for _ in range(2):
            # The name is looked up meanwhile.
            assert program.run(code) is None
            until(lambda: len(daemon.lines("attached")) > 0)
        until(lambda: len(daemon.lines("attached")) == 2)
        users = {line["user"] for line in daemon.lines("attached")}
        assert users <= {"nobody", "65534"}
        assert {line["pid"] for line in daemon.lines("attached")} == {program.pid}


# How it ends.


def test_what_was_sent_before_the_end_is_in_the_log(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, Raw(daemon.socket) as client:
        number = client.hello()
        daemon.stop()
        # As many as surely fit its socket.
        for i in range(40):
            client.register(i, 0x1000, 0x2000, f"region {i}")
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.go_on()
        assert daemon.process.wait(LIMIT) == 0
        names = {line["region"] for line in daemon.lines("registered", client=number)}
        assert names == {f"region {i}" for i in range(40)}
        [ended] = daemon.lines("ended")
        assert ended["reason"] == "the daemon ends"
        assert [line["reason"] for line in daemon.lines("ending")] == ["SIGTERM"]
        assert client.answer() == {}
        assert not daemon.socket.exists()
        assert daemon.errors.read_text() == ""


def test_changes_before_the_end_are_in_the_log(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, Program(daemon) as program:
        assert program.run("tracker = memtrackd.attach(backend='embedded')") is None
        program.run("pages = Pages(100)")
        code = "[tracker.register(*pages.page(i), f'r{i}').name for i in range(100)]"
        assert len(program.run(code)) == 100
        until(lambda: len(daemon.lines("registered")) == 100)
        daemon.stop()
        program.run("for i in range(100): pages.munmap(pages.page(i))")
        # They go to the connection by themselves, in a thread without Python.
        until(lambda: program.run("tracker.device.generation") == 100)
        os.kill(daemon.pid, signal.SIGTERM)
        time.sleep(0.1)
        daemon.go_on()
        assert daemon.process.wait(LIMIT) == 0
        assert len(daemon.lines("changed")) == 100


def test_changes_that_nobody_asked_to_see_are_counted_and_not_logged(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.toml"
    path.write_text('causes = "unmap, move"\n')
    with (
        Daemon(tmp_path, "--config", str(path)) as daemon,
        Program(daemon) as program,
    ):
        program.run("tracker = memtrackd.attach(backend='embedded')")
        program.run("pages = Pages(3)")
        for i in range(3):
            program.run(f"tracker.register(*pages.page({i}), 'r{i}')")
        program.run("pages.madvise(4, pages.page(0))")
        program.run("pages.munmap(pages.page(1))")
        line = daemon.wait("changed")
        assert (line["region"], line["cause"]) == ("r1", "unmap")
        path.write_text('causes = "clear"\n')
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait("reloaded")
        program.run("pages.madvise(4, pages.page(2))")
        until(lambda: len(daemon.lines("changed")) == 2)
        program.run("tracker.close()")
        assert daemon.wait("ended")["changes"] == 3
        assert [line["region"] for line in daemon.lines("changed")] == ["r1", "r2"]


def test_an_interrupt_ends_it_as_well(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        os.kill(daemon.pid, signal.SIGINT)
        assert daemon.process.wait(LIMIT) == 0
        assert [line["reason"] for line in daemon.lines("ending")] == ["SIGINT"]


# What it is told while it runs.


def test_a_hangup_reloads_the_file_and_opens_the_log_again(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("max-clients = 10\n")
    with Daemon(tmp_path, "--config", str(path)) as daemon, ExitStack() as stack:
        clients = [stack.enter_context(Raw(daemon.socket)) for _ in range(3)]
        for client in clients:
            client.hello()
        daemon.wait("attached")
        moved = daemon.log.with_name("moved")
        daemon.log.rename(moved)
        daemon._read = 0
        path.write_text("max-clients = 3\nmax-regions = 7\nkeep-ended = 1\n")
        os.kill(daemon.pid, signal.SIGHUP)
        reloaded = daemon.wait("reloaded")
        assert reloaded["max_clients"] == 3
        assert reloaded["max_regions"] == 7
        assert reloaded["keep_ended"] == 1
        assert "reloaded" not in moved.read_text("utf-8")
        with Raw(daemon.socket) as another:
            assert "at most 3 clients" in another.refusal()
        clients[0].send({"register": [[i, 1, 2, "x"] for i in range(8)]})
        assert "at most 7 regions" in clients[0].refusal()

        path.write_text("max-clients = none\n")
        os.kill(daemon.pid, signal.SIGHUP)
        trouble = daemon.wait("trouble")
        assert "the old configuration stays" in trouble["what"]
        assert str(path) in trouble["what"]
        path.unlink()
        os.kill(daemon.pid, signal.SIGHUP)
        until(lambda: len(daemon.lines("trouble")) == 2)
        clients[1].register(1, 1, 2, "still here")
        daemon.wait("registered", region="still here")
        assert daemon.terminate() == 0


# The service manager.


def test_the_service_manager_hears_all(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(tmp_path / "notify"))
        manager.settimeout(LIMIT)
        variables = {
            "NOTIFY_SOCKET": os.fspath(tmp_path / "notify"),
            "WATCHDOG_USEC": "300000",
        }

        def hear(word: str) -> str:
            while word not in (text := manager.recv(4096).decode()).splitlines():
                assert set(text.splitlines()) <= {"WATCHDOG=1", "READY=1"}, text
            return text

        daemon = Daemon(tmp_path, variables=variables)
        daemon.start()
        try:
            assert str(daemon.socket) in hear("READY=1")
            # READY means that it can be used.
            daemon.is_served()
            for _ in range(3):
                hear("WATCHDOG=1")
            os.kill(daemon.pid, signal.SIGHUP)
            assert re.search(r"^MONOTONIC_USEC=\d+$", hear("RELOADING=1"), re.MULTILINE)
            hear("READY=1")
            daemon.process.terminate()
            hear("STOPPING=1")
            assert daemon.process.wait(LIMIT) == 0
        finally:
            daemon.kill()


_MOVE = """
import os, sys
end = sys.argv.index("--")
for number, fd in enumerate(sys.argv[1:end], 3):
    os.dup2(int(fd), number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[end + 1], sys.argv[end + 1:])
"""


def activation(
    sockets: dict[str, socket.socket], stack: ExitStack
) -> tuple[tuple[str, ...], dict[str, str], tuple[int, ...]]:
    """Return a command, variables and descriptors, as systemd gives them."""
    fds = []
    for listener in sockets.values():
        fds.append(fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD_CLOEXEC, 20))
        stack.callback(os.close, fds[-1])
    prefix = sys.executable, "-c", _MOVE, *map(str, fds), "--"
    variables = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(sockets)}
    return prefix, variables, tuple(fds)


def test_sockets_of_the_service_manager_are_used(tmp_path: Path) -> None:
    with ExitStack() as stack:
        clients = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        clients.bind(os.fspath(tmp_path / "memtrackd.sock"))
        clients.listen()
        http = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sockets = {"http": http, "clients": clients}
        prefix, variables, fds = activation(sockets, stack)
        # It comes before the daemon.
        early = stack.enter_context(Raw(tmp_path / "memtrackd.sock"))
        early.send({"memtrackd": 1, "name": "early", "backend": "embedded"})
        with Daemon(
            tmp_path, prefix=prefix, variables=variables, pass_fds=fds
        ) as daemon:
            daemon.wait("attached", name="early")
            daemon.address = "http://127.0.0.1:{1}".format(*http.getsockname())
            assert "memtrackd_clients 1.0" in daemon.get("/metrics")
            assert daemon.terminate() == 0
        # It is the service manager's, who starts another daemon behind it.
        assert (tmp_path / "memtrackd.sock").is_socket()


def test_a_socket_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        stream = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        stream.bind(os.fspath(tmp_path / "stream"))
        stream.listen()
        prefix, variables, fds = activation({"clients": stream}, stack)
        daemon = Daemon(tmp_path, prefix=prefix, variables=variables, pass_fds=fds)
        daemon.start()
        assert daemon.process.wait(LIMIT) == 2
        assert "ListenSequentialPacket=" in daemon.errors.read_text()


# Its outputs.


def test_a_log_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = "127.0.0.1:{1}".format(*server.getsockname())
        daemon = Daemon(tmp_path, "--log-file", "/dev/stderr", "--http", address)
        daemon._how["stderr"] = writer
        daemon.start()
        stack.callback(daemon.kill)
        os.close(writer)
        until(daemon.socket.is_socket)
        daemon.address = f"http://{address}"
        with Raw(daemon.socket) as client:
            client.hello()
            # More than the pipe and the queue take.
            for _ in range(400):
                client.send(64 * RECORD)
            with Raw(daemon.socket) as another:
                another.hello()
            until(lambda: dropped(daemon) > 0, "lines to be dropped")
        assert daemon.terminate() == 0


def dropped(daemon: Daemon) -> float:
    found = re.search(
        r'^memtrackd_dropped_total{output="log"} (\S+)$',
        daemon.get("/metrics"),
        re.MULTILINE,
    )
    assert found
    return float(found[1])


def test_the_view_draws_and_gives_the_terminal_back(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with ExitStack() as stack:
        stack.callback(os.close, ours)
        stack.callback(os.close, theirs)
        termios.tcsetwinsize(theirs, (30, 150))
        before = termios.tcgetattr(theirs)
        daemon = Daemon(
            tmp_path,
            "--view",
            variables={"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "30"},
            stdout=theirs,
            stdin=theirs,
        )
        seen = b""

        def see(*what: bytes) -> None:
            nonlocal seen
            deadline = time.monotonic() + LIMIT
            while not all(part in seen for part in what):
                assert time.monotonic() < deadline, seen[-2000:]
                if select.select([ours], [], [], 0.1)[0]:
                    seen += os.read(ours, 1 << 16)

        with daemon, Raw(daemon.socket) as client:
            see(b"\x1b[?1049h", b"\x1b[?25l", b"0 clients")
            client.hello("[/x] [red]client")
            client.register(1, 0x1000, 0x3000, "[/y] :smile:")
            client.send(RECORD)
            see(b"[/x] [red]client", b"[/y] :smile:", b"1 clients")
            assert daemon.terminate() == 0
            see(b"\x1b[?1049l", b"\x1b[?25h")
        assert termios.tcgetattr(theirs) == before
        assert daemon.errors.read_text() == ""


def test_lines_of_text_are_lines_whatever_clients_are_called(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, Raw(daemon.socket) as client:
        client.hello('"} {"event": "fake"')
        [line] = [daemon.wait("attached")]
        assert line["name"] == '"} {"event": "fake"'
        for row in daemon.log.read_text("utf-8").splitlines():
            json.loads(row)
