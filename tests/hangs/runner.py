"""The test's side: starts scenarios, and kills those that hang."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parent.parent.parent
SOURCE = Path(__file__).parent / "native.c"

#: Seconds after which a scenario hangs; none takes that long unless it does.
LIMIT = 60

_COMPILER_OPTIONS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]

# Scenarios fork while other threads run. What the children do is known to be safe.
_PYTHON_OPTIONS = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]


def build(folder: Path) -> Path:
    """Compile what is not Python, and return the library."""
    library = folder / "native.so"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    command = [*compiler, *_COMPILER_OPTIONS, "-shared", "-fPIC", str(SOURCE)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


@attrs.frozen
class Outcome:
    """How a scenario ended."""

    facts: dict[str, Any]
    """What it has said."""
    status: int | None
    """As of subprocess; None if it was killed because it hung."""
    errors: str
    """The standard error: warnings, and where Python's threads were when it hung."""
    waits: str
    """What all threads were doing in the kernel when it hung."""

    def __str__(self) -> str:
        how = "hung" if self.status is None else f"ended with status {self.status}"
        return f"{how}, having said {self.facts}\n{self.errors}\n{self.waits}"


class Child:
    """A scenario, running in a session of its own.

    It writes to files, not pipes: what it has forked may outlive it.
    """

    def __init__(
        self, library: Path, name: str, *arguments: str, limit: float, nobody: bool
    ) -> None:
        self._limit = limit
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        options = ["--stacks-after", str(0.8 * limit), *(["--nobody"] * nobody)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, *_PYTHON_OPTIONS, "-m", "tests.hangs"),
                *(*options, name, *arguments),
            ],
            cwd=PROJECT,
            env=os.environ | {"HANGS_NATIVE": str(library)},
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
        )
        self._number = os.pidfd_open(self._process.pid)

    def says(self, fact: str) -> bool:
        """Wait until it has said something, and return whether it has."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and not self._ends(0.02):
            if fact in self._facts():
                return True
        return fact in self._facts()

    def wait(self) -> Outcome:
        """Return how it ended; kills it if it hangs, and what is left of it."""
        ended = self._ends(self._limit)
        waits = "" if ended else "\n".join(_threads(self._process.pid))
        # Not reaped yet: the number is nobody else's.
        os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        os.close(self._number)
        with self._stdout, self._stderr:
            return Outcome(
                self._facts(), status if ended else None, _text(self._stderr), waits
            )

    def _ends(self, limit: float) -> bool:
        poll = select.poll()
        poll.register(self._number, select.POLLIN)
        return bool(poll.poll(1000 * limit))

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for line in _text(self._stdout).splitlines(keepends=True):
            if line.endswith("\n"):
                facts |= json.loads(line)
        return facts


def _text(file: Any) -> str:  # noqa: ANN401 - its type is private to tempfile
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")


def _threads(session: int) -> Iterator[str]:
    """Describe all threads of a session's processes."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _, _, facts = (process / "stat").read_text().rpartition(")")
            if int(facts.split()[3]) == session:
                for task in (process / "task").iterdir():
                    yield _thread(task)


def _thread(task: Path) -> str:
    facts = [(task / name).read_text().strip() for name in ("comm", "wchan", "syscall")]
    return " ".join((task.parent.parent.name, task.name, *facts))
