"""Which backend is taken, and what is said where none can be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import anyio
import pytest

import aioummu
from aioummu import Device, EmbeddedDevice, Inval, Last, open_device, open_notifier
from tests.memory import PAGE, Pages
from tests.operations import kernel
from tests.pipe_device import LIMIT, PipeDevice
from tests.sandbox import NOBODY, SYSTEM_CALL, Sandbox

if TYPE_CHECKING:
    from aioummu import Backend

no_driver = pytest.mark.skipif(
    Path(aioummu.DEFAULT_PATH).exists(), reason="the driver is loaded"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
seccomp = pytest.mark.skipif(not SYSTEM_CALL, reason="unknown architecture")
since_519 = pytest.mark.skipif(kernel() < (5, 19), reason="from Linux 5.19 on")


async def backend_of(notifier: aioummu.Notifier) -> str:
    """Return the backend's name, after it has reported something."""
    with Pages(2) as pages, anyio.fail_after(LIMIT):
        region = notifier.register(*pages.part(0, 2))
        pages.munmap(pages.page(1))
        batch = await anext(notifier.batches())
        start, end = pages.page(1)
        assert batch == [Inval(region, start, end, exact=True), Last(1)]
        region.unregister()
    return notifier.backend


# What can be had.


@pytest.mark.anyio
@no_driver
async def test_auto_takes_the_embedded_one_where_no_driver_is() -> None:
    async with open_notifier() as notifier:
        assert await backend_of(notifier) == "embedded"


@pytest.mark.anyio
@pytest.mark.device
async def test_auto_takes_the_driver_where_it_is() -> None:
    async with open_notifier() as notifier:
        assert await backend_of(notifier) == "driver"


@pytest.mark.anyio
@pytest.mark.device
async def test_the_driver_can_be_asked_for() -> None:
    async with open_notifier(backend="driver") as notifier:
        assert await backend_of(notifier) == "driver"


@pytest.mark.anyio
@pytest.mark.embedded
async def test_the_embedded_one_can_be_asked_for() -> None:
    async with open_notifier(backend="embedded") as notifier:
        assert await backend_of(notifier) == "embedded"


@pytest.mark.anyio
@pytest.mark.device
@since_519
async def test_both_can_be_open_at_the_same_time() -> None:
    async with (
        open_notifier(backend="driver") as driver,
        open_notifier(backend="embedded") as embedded,
    ):
        assert await backend_of(driver) == "driver"
        assert await backend_of(embedded) == "embedded"


@pytest.mark.anyio
@pytest.mark.device
async def test_a_path_means_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.symlink_to(aioummu.DEFAULT_PATH)
    async with open_notifier(path=path) as notifier:
        assert await backend_of(notifier) == "driver"
    async with open_notifier(backend="driver", path=str(path)) as notifier:
        assert notifier.backend == "driver"


@pytest.mark.anyio
async def test_a_device_takes_the_place_of_a_backend(device: PipeDevice) -> None:
    async with open_notifier(device=device) as notifier:
        assert notifier.backend == "pipe"


@pytest.mark.embedded
def test_devices_name_their_backend() -> None:
    with EmbeddedDevice() as device:
        assert device.backend == "embedded"
    opened = open_device("embedded")
    assert isinstance(opened, EmbeddedDevice)
    opened.close()


@pytest.mark.device
def test_the_drivers_device_names_its_backend() -> None:
    with Device() as device:
        assert device.backend == "driver"
    opened = open_device()
    assert isinstance(opened, Device)
    opened.close()


# What makes no sense.


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["drivers", "", None, "AUTO"])
async def test_an_unknown_backend_is_refused(backend: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'embedded', not {backend!r}")):
        async with open_notifier(backend=cast("Backend", backend)):
            pass
    with pytest.raises(ValueError, match="backend is 'auto', 'driver' or"):
        open_device(cast("Backend", backend))


@pytest.mark.anyio
async def test_the_embedded_backend_has_no_path() -> None:
    with pytest.raises(ValueError, match="path is the driver's"):
        async with open_notifier(backend="embedded", path=aioummu.DEFAULT_PATH):
            pass


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["driver", "embedded"])
async def test_a_device_has_no_backend(backend: Backend, device: PipeDevice) -> None:
    with pytest.raises(ValueError, match="takes the place of backend and path"):
        async with open_notifier(device=device, backend=backend):
            pass
    assert device.fileno() >= 0, "it is still the caller's"


@pytest.mark.anyio
async def test_a_device_has_no_path(device: PipeDevice) -> None:
    with pytest.raises(ValueError, match="takes the place of backend and path"):
        async with open_notifier(device=device, path=aioummu.DEFAULT_PATH):
            pass
    assert device.fileno() >= 0, "it is still the caller's"


# A path is never given up for the embedded backend.


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["auto", "driver"])
async def test_a_path_where_nothing_is(backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    with pytest.raises(aioummu.NoDeviceError, match="load the driver") as raised:
        async with open_notifier(backend=backend, path=path):
            pass
    assert raised.value.filename == str(path)


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["auto", "driver"])
async def test_a_path_of_another_device(backend: Backend) -> None:
    with pytest.raises(aioummu.ForeignDeviceError, match="not an ummunotify device"):
        async with open_notifier(backend=backend, path="/dev/null"):
            pass


@pytest.mark.anyio
@pytest.mark.parametrize("size", [0, 2 * PAGE], ids=["empty", "large"])
async def test_a_path_of_a_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with pytest.raises(aioummu.ForeignDeviceError, match="not an ummunotify device"):
        async with open_notifier(path=path):
            pass


@pytest.mark.anyio
@no_driver
async def test_the_driver_is_not_given_up_for_the_other() -> None:
    with pytest.raises(aioummu.NoDeviceError, match="load the driver"):
        async with open_notifier(backend="driver"):
            pass


# Where less is allowed.

#: Prints what comes of each choice: the backend, or the error, its errno, its text.
_CHOICES = """
import anyio
import anyio._backends._asyncio
import aioummu
import mmap

async def choose(**options):
    buffer = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    async with aioummu.open_notifier(**options) as notifier:
        region = notifier.register(buffer)
        buffer.close()
        inval, last = notifier.read_nowait()
        assert (inval.region, inval.start, inval.end) == (
            region, region.start, region.end
        )
        return notifier.backend

async def main():
    enter()
    for choice in {}, {"backend": "embedded"}, {"backend": "driver"}:
        try:
            print(await choose(**choice))
        except aioummu.DeviceError as error:
            print(type(error).__name__, error.errno, error.strerror)

anyio.run(main)
"""


def choices_in(sandbox: Sandbox) -> list[str]:
    """Return the outcome of auto, embedded and driver in there."""
    finished = sandbox.run(_CHOICES)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout.splitlines()


NO_DEVICE = "NoDeviceError 2 no ummunotify device here: load the driver"
NOT_PERMITTED = "this process may not use userfaultfd"


@seccomp
@no_driver
@pytest.mark.parametrize(
    ("refuse", "error", "reason"),
    [
        ("EPERM", "DevicePermissionError 1", NOT_PERMITTED),
        ("EACCES", "DevicePermissionError 13", NOT_PERMITTED),
        ("ENOSYS", "DevicePermissionError 38", NOT_PERMITTED),
    ],
)
def test_where_neither_can_be_had_both_reasons_are_told(
    refuse: str, error: str, reason: str
) -> None:
    either, embedded, driver = choices_in(Sandbox(refuse=refuse, user=NOBODY))
    code = error.split()[1]
    assert either.startswith(f"NoBackendError {code} no backend can be used.")
    assert "The driver: no ummunotify device here: load the driver" in either
    assert reason in either.partition("The embedded one: ")[2]
    assert either.endswith("See 'python -m aioummu doctor'")
    assert embedded.startswith(error)
    assert reason in embedded
    assert driver.startswith(NO_DEVICE)


@seccomp
@as_root
@pytest.mark.embedded
@pytest.mark.skipif(
    not Path("/dev/userfaultfd").exists(), reason="there is no /dev/userfaultfd"
)
@pytest.mark.parametrize("refuse", ["EPERM", "ENOSYS"])
def test_where_the_system_call_is_refused_the_device_serves(refuse: str) -> None:
    either, embedded, driver = choices_in(Sandbox(refuse=refuse, device="none"))
    assert (either, embedded) == ("embedded", "embedded")
    assert driver.startswith(NO_DEVICE)


@as_root
@no_driver
def test_without_proc_that_is_the_reason() -> None:
    either, embedded, _ = choices_in(Sandbox(proc=False))
    assert "NoBackendError" in either
    assert embedded.startswith("DeviceError 2 the embedded backend needs /proc: mount")


@as_root
@no_driver
def test_without_another_thread_that_is_the_reason() -> None:
    # Nobody else is that user.
    either, embedded, _ = choices_in(Sandbox(user="54321", processes=1))
    assert "The embedded one: the embedded backend cannot start: Resource" in either
    assert embedded.startswith("DeviceError 11 the embedded backend cannot start: ")


@as_root
@pytest.mark.embedded
def test_nobody_needs_privileges() -> None:
    _, embedded, _ = choices_in(Sandbox(user=NOBODY))
    assert embedded == "embedded"


@as_root
@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("file", "ForeignDeviceError 25 not an ummunotify device"),
        ("other", "ForeignDeviceError 25 not an ummunotify device"),
        ("dead", "NoDeviceError 6 no ummunotify device here"),
        ("closed", "DevicePermissionError 13 this user may not open the device"),
        ("none", "NoDeviceError 2 no ummunotify device here"),
    ],
)
def test_a_driver_that_cannot_be_used_is_passed_over(
    device: Literal["file", "other", "dead", "closed", "none"], error: str
) -> None:
    either, embedded, driver = choices_in(Sandbox(device=device, user=NOBODY))
    assert (either, embedded) == ("embedded", "embedded")
    assert driver.startswith(error)


def test_a_probe_leaves_nothing_open() -> None:
    code = (
        "import os, aioummu._embedded as e; before = os.listdir('/proc/self/fd');"
        "e.probe(); assert os.listdir('/proc/self/fd') == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)
