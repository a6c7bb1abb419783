from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import prerequisites

if TYPE_CHECKING:
    from collections.abc import Callable

    Program = Callable[[str, str], Path]

ALL = ["python3-venv", "gcc", "libc6-dev", "libpython3-dev"]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A machine with no programs but those that the test makes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CC", str(folder / "cc"))

    def make(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    make("env", 'exec /usr/bin/env "$@"')
    return make


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Python without what Debian has in packages of its own."""
    monkeypatch.setattr(prerequisites, "find_spec", lambda _name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path / "include"))


def test_a_machine_that_builds_this_very_library_lacks_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert prerequisites.main() == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("program", "without_packages")
def test_all_that_is_missing_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert prerequisites.main() == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    names = " ".join(ALL)
    assert f"missing on this machine: {names}; as root: apt-get install" in err


def test_a_compiler_without_headers_is_not_enough(program: Program) -> None:
    program("cc", "exit 1")
    assert prerequisites.lacking() == ["gcc", "libc6-dev"]
    program("cc", "exit 0")
    assert prerequisites.lacking() == []


@pytest.mark.parametrize("user", [0, 1000])
def test_what_is_missing_is_installed_if_that_takes_no_password(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    user: int,
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(os, "geteuid", lambda: user)
    program("sudo", f'echo sudo "$1" >>{log}; shift; exec "$@"')
    compiler = program("cc.installed", "exit 0")
    program(
        "apt-get",
        f'echo "$*" >>{log}; case "$*" in *install*)'
        f" /bin/mv {compiler} {compiler.with_name('cc')};; esac",
    )
    program("true", "exit 0")
    assert prerequisites.main() == 0
    assert "installing gcc libc6-dev ..." in capfd.readouterr().err
    calls = log.read_text().splitlines()
    assert ("sudo -n" in calls) == (user != 0)
    assert [call.split()[-1] for call in calls if "sudo" not in call] == [
        "update",
        "libc6-dev",
    ]


def test_a_sudo_that_wants_a_password_is_not_used(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    program("sudo", "exit 1")
    program("apt-get", f"echo called >{tmp_path / 'called'}")
    assert prerequisites.main() == 1
    assert capfd.readouterr().err.startswith("missing on this machine: gcc libc6-dev")
    assert not (tmp_path / "called").exists()


def test_what_apt_complains_of_is_passed_on(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    program("apt-get", "echo 'E: no network' >&2; exit 100")
    assert prerequisites.main() == 1
    lines = capfd.readouterr().err.splitlines()
    assert "E: no network" in lines
    assert lines[-1].startswith("missing on this machine: gcc libc6-dev")


def test_an_older_python_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    assert prerequisites.main() == 1
    err = capfd.readouterr().err
    assert err.startswith(f"missing: Python 3.11 or later; {sys.executable} is ")
    assert err.count("\n") == 1
