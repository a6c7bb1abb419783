"""The example that runs on MPI: the result is right with and without a daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parent.parent
RANKS = 4
ROUNDS = 4
# What each rank allocates in each round.
NAMES = [
    "change",
    "halo above",
    "halo below",
    "plate",
    "send buffer down",
    "send buffer up",
]
# Seconds after which something has hung: the ranks share few processors.
LIMIT = 180

pytestmark = [
    pytest.mark.skipif(
        shutil.which("mpirun") is None,
        reason="there is no mpirun: it is in Debian's openmpi-bin",
    ),
    pytest.mark.skipif(find_spec("mpi4py") is None, reason="there is no mpi4py"),
    pytest.mark.skipif(find_spec("memtrackd") is None, reason="there is no memtrackd"),
]


def run_ranks(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "--oversubscribe", "-n", str(RANKS)]
    # More ranks than processors: those that wait let others run.
    command += ["--mca", "mpi_yield_when_idle", "1"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    # Not what lies beside the script: examples/memtrackd is a folder, no package.
    command += [sys.executable, "-P", "examples/mpi_tracking.py"]
    command += ["--rows", "32", "--columns", "128", "--steps", "40"]
    command += ["--renew", str(40 // ROUNDS)]
    # Open MPI's own sockets have paths that must not be long.
    environment = {**os.environ, "MEMTRACKD_SOCKET": str(path), "TMPDIR": "/tmp"}  # noqa: S108
    return subprocess.run(
        command,
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


class Daemon:
    """The real one; what it saw is in its log."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self.log = directory / "log"
        command = [sys.executable, "-m", "memtrackd", "--http", "off"]
        command += ["--socket", str(self.path), "--canary", "0"]
        command += ["--log", "json", "--log-file", str(self.log)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + LIMIT
        while not self.path.is_socket():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> list[dict[str, Any]]:
        """Let it end, and return the lines of its log."""
        self.process.terminate()
        assert self.process.wait(LIMIT) == 0
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    pytest.importorskip("memtrackd.service")
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.close()


def test_daemon_sees_each_buffer_of_each_rank_come_and_go(daemon: Daemon) -> None:
    finished = run_ranks(daemon.path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == RANKS + 1
    assert lines[-1].endswith(": result verified")
    pids = set()
    for rank, line in enumerate(lines[:-1]):
        assert line.startswith(f"rank {rank} on ")
        assert line.endswith(f": {ROUNDS * len(NAMES)} regions registered")
        pids.add(int(line.split("pid ")[1].split(":")[0]))
    assert len(pids) == RANKS

    log = daemon.end()
    attached = [entry for entry in log if entry["event"] == "attached"]
    assert {entry["pid"] for entry in attached} == pids
    assert {entry["name"] for entry in attached} == {
        f"mpi_tracking.py rank {rank}" for rank in range(RANKS)
    }
    for entry in attached:
        ours = [e for e in log if e.get("client") == entry["client"]]
        registered = sorted(e["region"] for e in ours if e["event"] == "registered")
        assert registered == sorted(NAMES * ROUNDS)
        (ended,) = (e for e in ours if e["event"] == "ended")
        # All rounds but the last end while the region is still registered.
        assert ended["generation"] >= (ROUNDS - 1) * len(NAMES)
        unmapped = {e["region"] for e in ours if "unmap" in str(e.get("cause"))}
        assert unmapped <= set(NAMES)
        assert unmapped


def test_result_is_right_without_a_daemon(tmp_path: Path) -> None:
    finished = run_ranks(tmp_path / "nobody")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == RANKS + 1
    for line in lines[:-1]:
        assert f": not tracked: no daemon listens at {tmp_path}/nobody" in line
    assert lines[-1].endswith(": result verified")


def test_wrong_result_is_noticed(tmp_path: Path) -> None:
    """A halo that is one step late changes the result."""
    program = PROJECT / "examples" / "mpi_tracking.py"
    text = program.read_text()
    broken = text.replace("self.send_up[:] = plate[0]", "self.send_up[:] = plate[1]")
    assert broken != text
    copy = tmp_path / program.name
    copy.write_text(broken)
    command = ["mpirun", "--oversubscribe", "-n", "2"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    command += [sys.executable, str(copy), "--rows", "8", "--columns", "16"]
    finished = subprocess.run(
        command,
        env={**os.environ, "MEMTRACKD_SOCKET": "/nowhere", "TMPDIR": "/tmp"},  # noqa: S108
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert finished.returncode != 0
    assert "result WRONG" in finished.stdout
