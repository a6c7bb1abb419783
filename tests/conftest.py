from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aioummu
from tests.pipe_device import PipeDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        action="store_true",
        help=f"also run the tests that need {aioummu.DEFAULT_PATH}",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") and not Path(aioummu.DEFAULT_PATH).exists():
        raise pytest.UsageError(
            f"--device: there is no {aioummu.DEFAULT_PATH}; load the driver"
        )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("--device"):
        return
    deselected = [item for item in items if item.get_closest_marker("device")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("device")]


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--device"):
        return f"device: {aioummu.DEFAULT_PATH}"
    return "device: none, tests that need one are deselected (see --device)"


@pytest.fixture(params=list(LOOPS.values()), ids=list(LOOPS), scope="module")
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """All loops, for every test marked anyio."""
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


@pytest.fixture(params=["poll", "sigio"])
def readiness(request: pytest.FixtureRequest) -> aioummu.ReadinessKind:
    kind: aioummu.ReadinessKind = request.param
    return kind


@pytest.fixture
def device() -> Iterator[PipeDevice]:
    device = PipeDevice()
    yield device
    device.close()
    device.end()


@pytest.fixture
def notifier(device: PipeDevice) -> Iterator[aioummu.Notifier]:
    """A notifier outside of any event loop, for all that does not wait."""
    notifier = aioummu.Notifier(device)
    yield notifier
    notifier.close()
