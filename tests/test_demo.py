"""The demo, as a program of its own: what it shows, and what it must not overlook."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from select import select
from typing import TYPE_CHECKING, Any

import pytest

import aioummu
from tests.lossy_demo import EXAMPLES, load_demo

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEMO = [sys.executable, str(EXAMPLES / "demo.py")]
LOSSY_DEMO = [sys.executable, "-m", "tests.lossy_demo"]
SUMMARY = re.compile(r"demo: backend=(\w+) events=(\d+) missed=(\d+)")
#: Seconds after which it hangs, also in an emulated guest.
LIMIT = 200

#: Below each drawing, and nowhere else.
LEGEND = "perhaps"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"

SCENES = load_demo().SCENES


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it without a terminal."""
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        cwd=EXAMPLES.parent,
        env={**inherited, "COLUMNS": "200", **environment},
    )


def steps() -> Iterator[tuple[str, Any]]:
    """Every change that there is, under the heading that it has."""
    for scene in SCENES:
        for step in scene.steps:
            yield f"{scene.name} {step.what}", step


def told(output: str) -> dict[str, list[str]]:
    """What is told below each heading."""
    parts: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n *\n", output):
        heading, *lines = paragraph.splitlines()
        if heading.startswith(("▸ ", "> ")):
            parts[heading[2:]] = [line.strip() for line in lines]
    return parts


def counts(output: str) -> tuple[str, int, int]:
    """Return the backend, events and missed of the last line."""
    match = SUMMARY.fullmatch(output.splitlines()[-1])
    assert match, output
    return match[1], int(match[2]), int(match[3])


def reported_by(backend: str) -> int:
    return sum(step.expected(backend) is not None for _, step in steps())


# What it tells.


def lines_on_embedded(step: Any) -> list[str]:  # noqa: ANN401
    """Patterns of what is told of a change."""
    report = step.expected("embedded")
    if step.report is None:
        return ["= nothing reported, and rightly so", ".*"]
    if report is None:
        return ["= not reported by the embedded backend .*", "Untold: .*"]
    what = "several changes within .*"
    if report.exact:
        last = r"\d+" if report.behind is None else report.behind - 1
        what = f"exact: pages {report.first} to {last} of .*"
    return [
        rf"Inval  0x\w+-0x\w+, {what}",
        r"Last   generation \d+: that was all",
        "= reported",
        "Untold: .*",
    ]


@pytest.mark.embedded
def test_every_change_is_told_exactly_on_the_embedded_backend() -> None:
    finished = run([*DEMO, "--backend", "embedded"])
    assert finished.stderr == ""
    parts = told(finished.stdout)
    assert list(parts) == [heading for heading, _ in steps()]
    for heading, step in steps():
        patterns = lines_on_embedded(step)
        for pattern, line in zip(patterns, parts[heading], strict=True):
            assert re.fullmatch(pattern, line), heading
    assert counts(finished.stdout) == ("embedded", reported_by("embedded"), 0)
    assert finished.returncode == 0


@pytest.mark.device
def test_every_change_is_told_on_the_driver() -> None:
    finished = run([*DEMO, "--backend", "driver"])
    assert finished.stderr == ""
    parts = told(finished.stdout)
    for heading, step in steps():
        # The kernel may do more to the memory than it was asked to.
        if step.report is not None:
            assert any(line.startswith("= reported") for line in parts[heading])
    backend, events, missed = counts(finished.stdout)
    assert (backend, missed) == ("driver", 0)
    assert events >= reported_by("driver")
    assert finished.returncode == 0


def test_what_would_have_gone_wrong_was_there_to_see() -> None:
    output = run([*DEMO, "--backend", "embedded"]).stdout
    lessons = {heading: lines[-1] for heading, lines in told(output).items()}
    [dropped] = (text for name, text in lessons.items() if "MADV_DONTNEED" in name)
    assert r"begins with b'data'. It reads b'\x00\x00\x00\x00' now" in dropped
    [used_again] = (text for name, text in lessons.items() if "used again" in name)
    cached, real = re.findall(r"\b0x[0-9a-f]{8}\b", used_again)
    assert cached != real
    moved = [text for text in lessons.values() if "the data is at" in text]
    assert len(moved) == 2
    for text in moved:
        after, before = re.findall(r"0x[0-9a-f]+", text)
        assert after != before


# What it must not overlook.


@pytest.mark.parametrize(
    ("lost", "missed"),
    [
        ("nothing", 0),
        ("a_report", 1),
        ("a_page", 1),
        ("an_end", 1),
        ("all_reports", reported_by("embedded")),
        ("any_change", reported_by("embedded")),
    ],
)
def test_what_a_device_loses_is_missed(lost: str, missed: int) -> None:
    finished = run([*LOSSY_DEMO, lost])
    assert finished.stderr == ""
    backend, _, count = counts(finished.stdout)
    assert (backend, count) == ("embedded", missed)
    assert finished.stdout.count("= MISSED") == missed
    assert finished.returncode == (1 if missed else 0)


@pytest.mark.skipif(
    Path(aioummu.DEFAULT_PATH).exists(), reason="the driver is loaded here"
)
def test_a_missing_backend_is_one_line_and_another_status() -> None:
    finished = run([*DEMO, "--backend", "driver"])
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("demo: ")
    assert finished.stderr.count("\n") == 1


# Where it is shown.


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_line_is_wider_than_it_may_be(columns: int) -> None:
    finished = run(DEMO, COLUMNS=str(columns))
    *lines, _ = finished.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert counts(finished.stdout)[2] == 0
    assert "shared" in finished.stdout.rpartition("its pages")[2]
    assert finished.returncode == 0


def test_without_a_terminal_there_are_no_control_codes() -> None:
    assert "\x1b" not in run(DEMO).stdout
    assert "\x1b" not in run(DEMO, TERM="xterm-256color").stdout


def test_an_output_that_knows_ascii_only_gets_ascii() -> None:
    finished = run(DEMO, PYTHONIOENCODING="ascii", COLUMNS="80")
    assert finished.stdout.isascii()
    assert finished.stderr == ""
    assert counts(finished.stdout)[2] == 0
    assert "########" in finished.stdout
    assert finished.returncode == 0


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: Sequence[str], columns: int, **variables: str) -> None:
        self._leader, follower = pty.openpty()
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
        removed = {"COLUMNS", "LINES", "NO_COLOR"}
        environment = {k: v for k, v in os.environ.items() if k not in removed}
        self.process = subprocess.Popen(
            # As from a shell's prompt: what runs in the background ignores it.
            ["/usr/bin/env", "--default-signal=INT", *command],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=EXAMPLES.parent,
            env={**environment, "TERM": "xterm-256color", **variables},
            start_new_session=True,
        )
        os.close(follower)
        self.output = ""
        self._undecoded = b""

    def read_until(self, text: str | None) -> None:
        """Read up to a text, or to the end."""
        with suppress(OSError):
            while text is None or text not in self.output:
                if not select([self._leader], [], [], LIMIT)[0]:
                    raise TimeoutError(self.output)
                data = os.read(self._leader, 1 << 16)
                if not data:
                    break
                self._undecoded += data
                self.output = self._undecoded.decode(errors="replace")

    def finish(self) -> int:
        """Read everything, and return the exit status."""
        self.read_until(None)
        status = self.process.wait(LIMIT)
        self.close()
        return status

    def close(self) -> None:
        """End what did not end by itself."""
        if self._leader >= 0:
            os.close(self._leader)
            self._leader = -1
        self.process.kill()
        self.process.wait()


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize("columns", [40, 100])
def test_in_a_terminal_the_pages_are_drawn_live(
    terminals: list[Terminal], columns: int
) -> None:
    terminal = Terminal([*DEMO, "--fast"], columns)
    terminals.append(terminal)
    assert terminal.finish() == 0
    # Drawn again and again, each time with the pages as they were then.
    drawings = plain(terminal.output).split(LEGEND)[:-1]
    assert len(drawings) > len(list(steps()))
    assert "░░" not in drawings[0]
    assert "░░" in drawings[-1]
    assert terminal.output.rindex(HIDE_CURSOR) < terminal.output.rindex(SHOW_CURSOR)
    *lines, _ = plain(terminal.output).splitlines()
    assert max(len(line.rpartition("\r")[2]) for line in lines) <= columns
    assert counts(plain(terminal.output)) == (
        "embedded",
        reported_by("embedded"),
        0,
    )


def plain(text: str) -> str:
    """Leave out the control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_that_can_only_print_gets_no_control_codes(
    terminals: list[Terminal],
) -> None:
    terminal = Terminal([*DEMO, "--fast"], 80, TERM="dumb")
    terminals.append(terminal)
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.output
    assert terminal.output.count(LEGEND) == 1


def test_an_interrupt_leaves_a_usable_terminal(terminals: list[Terminal]) -> None:
    terminal = Terminal(DEMO, 80)
    terminals.append(terminal)
    terminal.read_until("MADV_DONTNEED")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.output
    assert terminal.output.rindex(HIDE_CURSOR) < terminal.output.rindex(SHOW_CURSOR)


COUNT_PAUSES = """
import anyio
from tests.lossy_demo import load_demo

pauses = []
async def sleep(seconds):
    pauses.append(seconds)

demo = load_demo()
demo.anyio.sleep = sleep
demo.main()
print("pauses", sum(pauses))
"""


def test_only_people_are_waited_for(terminals: list[Terminal]) -> None:
    command = [sys.executable, "-c", COUNT_PAUSES]
    assert run(command).stdout.splitlines()[-1] == "pauses 0.0"
    terminal = Terminal(command, 80)
    terminals.append(terminal)
    assert terminal.finish() == 0
    [seconds] = re.findall(r"pauses ([\d.]+)", terminal.output)
    assert 10 <= float(seconds) <= 15
