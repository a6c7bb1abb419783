"""The synchronous device, with a file in place of the driver.

What only the driver can answer is in test_contract.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aioummu
from aioummu import Device
from aioummu._device import OrderedPage
from tests.pipe_device import last

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXCHANGE = 0xC0045501
REGISTER = 0x40205502
UNREGISTER = 0x40085503


class Driver:
    """Answers ioctl() in place of the kernel, on a memory file."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("driver")
        os.truncate(self.fd, 4096)
        self.path = f"/proc/self/fd/{self.fd}"
        self.fd_target = str(Path(self.path).readlink())
        self.calls: list[tuple[int, bytes]] = []
        self.errors: list[int] = []

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        assert os.fstat(fd).st_ino == os.fstat(self.fd).st_ino
        self.calls.append((request, argument))
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        return argument


def open_files() -> list[str]:
    files = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            files.append(str(link.readlink()))
    return files


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(fcntl, "ioctl", driver.ioctl)
    yield driver
    os.close(driver.fd)


# Opening.


def test_opened_for_reading_without_blocking_and_not_for_other_programs(
    driver: Driver,
) -> None:
    with Device(driver.path) as device:
        flags = fcntl.fcntl(device.fileno(), fcntl.F_GETFL)
        assert flags & (os.O_ACCMODE | os.O_NONBLOCK) == os.O_RDONLY | os.O_NONBLOCK
        assert not os.get_inheritable(device.fileno())


def test_features_are_exchanged_before_anything_else(driver: Driver) -> None:
    with Device(driver.path) as device:
        device.register(1, 2, 3)
    assert driver.calls[0] == (EXCHANGE, struct.pack("=I", 0xF))


def test_no_device_tells_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "ummunotify"
    with pytest.raises(aioummu.NoDeviceError, match="load the driver") as caught:
        Device(path)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)


def test_no_permission_tells_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: str, _flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)  # root may open everything
    with pytest.raises(aioummu.DevicePermissionError, match="udev rule") as caught:
        Device(tmp_path)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", __file__, os.curdir])
def test_something_else_is_no_ummunotify_device(path: str) -> None:
    with pytest.raises(aioummu.ForeignDeviceError, match="not an ummunotify device"):
        Device(path)


def test_a_device_that_refuses_the_handshake_is_foreign(driver: Driver) -> None:
    driver.errors = [errno.EINVAL]
    with pytest.raises(aioummu.ForeignDeviceError, match="too old"):
        Device(driver.path)


def test_a_device_without_a_page_is_foreign(driver: Driver) -> None:
    os.truncate(driver.fd, 0)
    with pytest.raises(aioummu.ForeignDeviceError, match="not an ummunotify device"):
        Device(driver.path)


def test_a_failed_opening_leaves_no_descriptor(driver: Driver) -> None:
    before = open_files()
    driver.errors = [errno.ENOTTY]
    with pytest.raises(aioummu.ForeignDeviceError):
        Device(driver.path)
    os.truncate(driver.fd, 0)
    with pytest.raises(aioummu.ForeignDeviceError):
        Device(driver.path)
    assert open_files() == before


def foreign_descriptor(kind: str) -> int:
    match kind:
        case "a socket":
            return socket.socket().detach()
        case "a pipe":
            receiver, sender = os.pipe()
            os.close(sender)
            return receiver
        case path:
            return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize("kind", [__file__, "/", "/dev/zero", "a pipe", "a socket"])
def test_a_foreign_descriptor_is_not_touched(kind: str) -> None:
    fd = foreign_descriptor(kind)
    with pytest.raises(aioummu.ForeignDeviceError, match="not of an ummunotify"):
        Device.from_fd(fd)
    assert os.get_blocking(fd)
    os.close(fd)


def test_a_closed_descriptor_is_refused() -> None:
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(aioummu.ForeignDeviceError):
        Device.from_fd(fd)


# Using.


def test_register_and_unregister_pass_the_numbers_on(driver: Driver) -> None:
    with Device(driver.path) as device:
        device.register(0x1000, 2**64 - 1, 7)
        device.unregister(7)
    words = [0x1000, 2**64 - 1, 7, 0]
    packed = b"".join(word.to_bytes(8, "little") for word in words)
    assert driver.calls[1:] == [
        (REGISTER, packed),
        (UNREGISTER, (7).to_bytes(8, "little")),
    ]


@pytest.mark.parametrize(
    ("code", "expected", "message"),
    [
        (errno.EINVAL, aioummu.DuplicateCookieError, "cookie 7 names a region"),
        (errno.ENOSPC, aioummu.TooManyRegionsError, "unregister some"),
        (errno.ESRCH, aioummu.ProcessGoneError, "has ended"),
        (errno.ENOTTY, aioummu.ForeignDeviceError, "not an ummunotify device"),
        (errno.ENOMEM, aioummu.DeviceError, "Cannot allocate memory"),
    ],
)
def test_refused_registrations_say_why(
    driver: Driver, code: int, expected: type[Exception], message: str
) -> None:
    with Device(driver.path) as device:
        driver.errors = [code]
        with pytest.raises(expected, match=message) as caught:
            device.register(1, 2, 7)
        if isinstance(caught.value, OSError):
            assert caught.value.errno == code


def test_unregistering_an_unknown_cookie_says_so(driver: Driver) -> None:
    with Device(driver.path) as device:
        driver.errors = [errno.EINVAL]
        with pytest.raises(
            aioummu.UnknownCookieError, match="cookie 7 names no region"
        ):
            device.unregister(7)


def test_an_interrupted_call_is_repeated(driver: Driver) -> None:
    with Device(driver.path) as device:
        driver.errors = [errno.EINTR, errno.EINTR]
        device.register(1, 2, 7)
    assert [request for request, _ in driver.calls] == [EXCHANGE] + 3 * [REGISTER]


def test_readinto_returns_the_size(driver: Driver) -> None:
    os.pwrite(driver.fd, last(3), 0)
    os.truncate(driver.fd, 32)
    buffer = bytearray(64)
    with Device(driver.path) as device:
        assert device.readinto(buffer) == 32
        assert aioummu.unpack(memoryview(buffer)[:32]) == [(1, 0, 0, 0, 3)]
        assert device.readinto(buffer) == 0


def test_readinto_without_anything_there_is_none(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_fd: int, _buffers: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "nothing")

    with Device(driver.path) as device:
        monkeypatch.setattr(os, "readv", nothing)
        assert device.readinto(bytearray(32)) is None


@pytest.mark.parametrize("page", ["plain", "ordered"])
def test_generation_is_what_the_page_says(driver: Driver, page: str) -> None:
    with Device(driver.path) as device:
        if page == "ordered":  # what other CPUs than x86-64 use
            assert isinstance(device._page, memoryview)
            device._page = OrderedPage(device._page)
        for generation in (0, 1, 2**32, 2**64 - 1):
            os.pwrite(driver.fd, generation.to_bytes(8, "little"), 0)
            assert device.generation == device.page[0] == generation
        device.close()
        with pytest.raises(aioummu.ClosedError):
            _ = device.generation


# Closing.


def test_closing_releases_the_page_then_the_map_then_the_descriptor(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In another order, mmap.close() raises BufferError.
    device = Device(driver.path)
    page, (mapped, *_) = device.page, device._maps
    order = []
    os_close = os.close

    def close(fd: int) -> None:
        with pytest.raises(ValueError, match="released"):
            page[0]
        order.append((mapped.closed, device._fd))
        os_close(fd)

    monkeypatch.setattr(os, "close", close)
    device.close()
    assert order == [(True, -1)]
    assert open_files().count(driver.fd_target) == 1


def test_a_closed_device_leaves_the_next_file_with_its_number_alone(
    driver: Driver,
) -> None:
    device = Device(driver.path)
    number = device.fileno()
    device.close()
    successor = os.dup(driver.fd)
    try:
        assert successor == number
        device.close()
        for use in uses(device):
            with pytest.raises(aioummu.ClosedError, match="was closed"):
                use()
        assert stat.S_ISREG(os.fstat(successor).st_mode)
    finally:
        os.close(successor)


def uses(device: Device) -> list[Callable[[], object]]:
    return [
        device.fileno,
        lambda: device.register(1, 2, 3),
        lambda: device.unregister(3),
        lambda: device.readinto(bytearray(32)),
        lambda: device.generation,
    ]


def test_a_forgotten_device_warns_and_is_closed(driver: Driver) -> None:
    devices = [Device(driver.path)]
    fd = devices[0].fileno()
    with pytest.warns(ResourceWarning, match=rf"unclosed <Device fd={fd}>"):
        devices.clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_repr_tells_the_state(driver: Driver) -> None:
    device = Device(driver.path)
    assert repr(device) == f"<Device fd={device.fileno()}>"
    device.close()
    assert repr(device) == "<Device closed>"


def test_a_forked_child_finds_the_device_closed(driver: Driver) -> None:
    with Device(driver.path) as device:
        fd = device.fileno()
        child = os.fork()
        if child == 0:
            os._exit(0 if _refused_in_child(device, fd) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert device.generation == 0
        assert device.fileno() == fd


def _refused_in_child(device: Device, fd: int) -> bool:
    refused = 0
    for use in uses(device):
        try:
            use()
        except aioummu.ForkedError:
            refused += 1
    device.close()
    try:
        os.fstat(fd)
    except OSError:
        return refused == len(uses(device))
    return False


# Errors.


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (aioummu.NoDeviceError, FileNotFoundError),
        (aioummu.DevicePermissionError, PermissionError),
        (aioummu.ForeignDeviceError, OSError),
        (aioummu.TooManyRegionsError, OSError),
        (aioummu.ProcessGoneError, ProcessLookupError),
        (aioummu.InvalidBufferError, BufferError),
        (aioummu.InvalidRangeError, ValueError),
        (aioummu.DuplicateCookieError, ValueError),
        (aioummu.UnknownCookieError, KeyError),
        (aioummu.ForkedError, RuntimeError),
    ],
)
def test_every_error_is_the_librarys_and_the_builtin_one(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, aioummu.UmmunotifyError)
    assert issubclass(error, builtin)


def test_the_message_of_an_unknown_cookie_is_not_quoted() -> None:
    assert str(aioummu.UnknownCookieError("as it is")) == "as it is"
    assert re.fullmatch(r"[a-z].*", str(aioummu.BusyError()))
