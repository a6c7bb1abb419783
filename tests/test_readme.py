from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    [code, *_] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert isinstance(code, str)
    return code


def assert_it_tells(code: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.stderr == ""
    assert "is gone" in finished.stdout
    assert finished.returncode == 0


def test_the_example_of_the_readme_runs_as_printed() -> None:
    assert_it_tells(example())


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("driver", marks=pytest.mark.device),
        pytest.param("embedded", marks=pytest.mark.embedded),
    ],
)
def test_the_example_of_the_readme_runs_on_each_backend(backend: str) -> None:
    code = example()
    assert code.count("open_notifier()") == 1
    assert_it_tells(code.replace("open_notifier()", f"open_notifier({backend=})"))
