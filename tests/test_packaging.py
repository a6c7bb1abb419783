"""The source distribution builds, and the wheel that it makes works."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import aioummu

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made from that."""
    source = tmp_path_factory.mktemp("source")
    folders = ["aioummu", "engine", "kmod/include", "tests", "tools", "examples"]
    for name in (*folders, "bench"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(PROJECT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, source)
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_source_distribution_has_the_header(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "kmod/include/uapi/linux/ummunotify.h" in names
    assert "engine/engine.h" in names
    assert "tests/test_packaging.py" in names
    assert "LICENSE" in names


def test_wheel_is_for_all_later_versions_of_python_and_typed(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name.startswith("aioummu-0.1.0-cp311-abi3-linux_")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {
        "aioummu",
        "aioummu-0.1.0.dist-info",
    }
    assert {
        "aioummu/py.typed",
        "aioummu/_engine.abi3.so",
        "aioummu/_hits.abi3.so",
        "aioummu/_ummunotify_abi.abi3.so",
    } <= names


def test_wheel_works_where_it_is_unpacked(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import aioummu; print(aioummu.__file__, aioummu.RECORD_SIZE)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = tmp_path / "aioummu" / "__init__.py"
    assert finished.stdout.split() == [str(expected), str(aioummu.RECORD_SIZE)]
