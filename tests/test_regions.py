from __future__ import annotations

import array
import ctypes
import gc
import mmap
import weakref
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

import aioummu
from aioummu._regions import address_range

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pipe_device import PipeDevice

PAGE = mmap.PAGESIZE


def numpy_address(array: np.ndarray) -> tuple[int, int]:
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def ctypes_address(buffer: bytearray | mmap.mmap) -> tuple[int, int]:
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return start, start + len(buffer)


def test_address_of_numpy_array() -> None:
    array = np.zeros((3, 4), np.int32)
    assert address_range(array) == numpy_address(array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_order_of_dimensions_does_not_matter(order: Literal["C", "F"]) -> None:
    array = np.zeros((3, 4, 5), np.float32, order=order)
    assert address_range(array) == numpy_address(array)
    assert address_range(array.T) == numpy_address(array)


def test_address_of_a_slice_is_where_the_slice_lies() -> None:
    array = np.zeros(100, np.uint8)
    start, _ = numpy_address(array)
    assert address_range(array[10:30]) == (start + 10, start + 30)
    view: memoryview = array.data
    assert address_range(view[10:30]) == (start + 10, start + 30)


def test_address_of_bytearray() -> None:
    buffer = bytearray(PAGE)
    assert address_range(buffer) == ctypes_address(buffer)


def test_address_of_mmap() -> None:
    with mmap.mmap(-1, 2 * PAGE) as buffer:
        assert address_range(buffer) == ctypes_address(buffer)


def test_address_of_array() -> None:
    buffer = array.array("d", [1, 2, 3])
    address, length = buffer.buffer_info()
    assert address_range(buffer) == (address, address + 8 * length)


def test_address_of_ctypes_array() -> None:
    buffer = (ctypes.c_int * 5)()
    address = ctypes.addressof(buffer)
    assert address_range(buffer) == (address, address + 20)


def test_address_of_read_only_memory() -> None:
    with mmap.mmap(-1, PAGE, prot=mmap.PROT_READ) as buffer:
        start, end = address_range(buffer)
        assert start % PAGE == 0
        assert end - start == PAGE
    assert len(range(*address_range(b"constant"))) == 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros(10)[::2],
        lambda: np.zeros((3, 4))[:, 1:3],
        lambda: memoryview(b"abcdef")[::2],
    ],
    ids=["strided array", "columns of an array", "strided memoryview"],
)
def test_a_buffer_that_is_not_contiguous_is_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(aioummu.InvalidBufferError, match="one contiguous block"):
        address_range(make())


@pytest.mark.parametrize("buffer", [b"", bytearray(), np.zeros(0)], ids=type)
def test_an_empty_buffer_is_refused(buffer: bytes) -> None:
    with pytest.raises(aioummu.InvalidBufferError, match="empty"):
        address_range(buffer)


def test_a_closed_buffer_is_refused() -> None:
    buffer = mmap.mmap(-1, PAGE)
    buffer.close()
    with pytest.raises(aioummu.InvalidBufferError, match="closed"):
        address_range(buffer)


@pytest.mark.parametrize("thing", ["text", 5, None])
def test_what_is_no_buffer_is_a_type_error(thing: bytes) -> None:
    with pytest.raises(TypeError):
        address_range(thing)


# Registering keeps no export.


def test_a_registered_mmap_can_be_closed(notifier: aioummu.Notifier) -> None:
    buffer = mmap.mmap(-1, PAGE)
    notifier.register(buffer)
    buffer.close()
    assert buffer.closed


def test_a_registered_mmap_can_be_resized(notifier: aioummu.Notifier) -> None:
    with mmap.mmap(-1, PAGE) as buffer:
        notifier.register(buffer)
        buffer.resize(4 * PAGE)
        assert len(buffer) == 4 * PAGE


def test_a_registered_bytearray_can_be_resized(notifier: aioummu.Notifier) -> None:
    buffer = bytearray(PAGE)
    notifier.register(buffer)
    buffer.extend(bytes(PAGE))
    buffer.clear()


def test_a_registered_numpy_array_is_freed_as_usual(notifier: aioummu.Notifier) -> None:
    array = np.zeros(PAGE)
    notifier.register(array)
    array.resize(2 * PAGE)  # refuses if something else refers to the array
    freed = weakref.ref(array)
    del array
    gc.collect()
    assert freed() is None


# The handle.


def test_region_knows_its_range(notifier: aioummu.Notifier, device: PipeDevice) -> None:
    region = notifier.register(0x1000, 0x3000, cookie=5)
    assert (region.cookie, region.start, region.end) == (5, 0x1000, 0x3000)
    assert device.regions == {5: (0x1000, 0x3000)}
    assert dict(notifier.regions) == {5: region}


def test_leaving_the_block_unregisters(
    notifier: aioummu.Notifier, device: PipeDevice
) -> None:
    with notifier.register(0x1000, 0x3000, cookie=5) as region:
        assert region.registered
        inside = repr(region)
    assert not notifier.regions
    assert not device.regions
    assert inside == "<Region cookie=5 0x1000-0x3000 (8192 bytes), registered>"
    assert repr(region) == "<Region cookie=5 0x1000-0x3000 (8192 bytes), unregistered>"


def test_unregistering_twice_does_nothing_to_its_successor(
    notifier: aioummu.Notifier,
) -> None:
    former = notifier.register(0x1000, 0x2000, cookie=5)
    former.unregister()
    successor = notifier.register(0x1000, 0x2000, cookie=5)
    former.unregister()
    assert successor.registered
    assert notifier.regions[5] is successor


def test_region_ends_with_its_notifier(notifier: aioummu.Notifier) -> None:
    with notifier.register(0x1000, 0x2000) as region:
        notifier.close()
        assert not region.registered
    assert not notifier.regions


def test_region_attributes_are_read_only(notifier: aioummu.Notifier) -> None:
    region = notifier.register(0x1000, 0x2000)
    for name in ("cookie", "start", "end", "registered"):
        with pytest.raises(AttributeError):
            setattr(region, name, 0)


def test_chosen_cookies_avoid_those_of_the_caller(notifier: aioummu.Notifier) -> None:
    mine = [notifier.register(0x1000, 0x2000, cookie=c) for c in (2, 3)]
    others = [notifier.register(0x1000, 0x2000) for _ in range(3)]
    assert len({region.cookie for region in mine + others}) == 5


@pytest.mark.parametrize(
    ("start", "end"),
    [(2, 1), (5, 5), (-1, 5), (0, 2**64), (2**64, 2**64 + 1)],
)
def test_a_bad_range_is_refused(
    notifier: aioummu.Notifier, start: int, end: int
) -> None:
    with pytest.raises(aioummu.InvalidRangeError, match="end is exclusive"):
        notifier.register(start, end)
    assert not notifier.regions


@pytest.mark.parametrize("cookie", [-1, 2**64])
def test_a_bad_cookie_is_refused(notifier: aioummu.Notifier, cookie: int) -> None:
    with pytest.raises(aioummu.InvalidRangeError, match="64 bits"):
        notifier.register(0, 1, cookie=cookie)


@pytest.mark.parametrize("cookie", [0, 2**64 - 1])
def test_extreme_cookies_are_good(notifier: aioummu.Notifier, cookie: int) -> None:
    assert notifier.register(0, 2**64 - 1, cookie=cookie).cookie == cookie


def test_addresses_may_be_numpy_integers(notifier: aioummu.Notifier) -> None:
    region = notifier.register(np.uint64(0x1000), np.uint64(0x2000))  # type: ignore[call-overload]
    assert type(region.start) is type(region.end) is int


def test_a_cookie_in_use_is_refused_and_its_region_stays(
    notifier: aioummu.Notifier, device: PipeDevice
) -> None:
    region = notifier.register(0x1000, 0x2000, cookie=5)
    with pytest.raises(aioummu.DuplicateCookieError, match="cookie 5 names"):
        notifier.register(0x3000, 0x4000, cookie=5)
    assert dict(notifier.regions) == {5: region}
    assert device.regions == {5: (0x1000, 0x2000)}


def test_a_spent_region_is_watched_again_by_rearm(
    notifier: aioummu.Notifier, device: PipeDevice
) -> None:
    first, second = notifier.register(0x1000, 0x2000), notifier.register(0x1000, 0x2000)
    device.spent_cookies.add(second.cookie)
    assert [first.spent, second.spent] == [False, True]
    second.rearm()
    assert [first.spent, second.spent] == [False, False]


def test_a_region_that_is_not_registered_cannot_be_rearmed(
    notifier: aioummu.Notifier, device: PipeDevice
) -> None:
    region = notifier.register(0x1000, 0x2000)
    device.spent_cookies.add(region.cookie)
    region.unregister()
    assert not region.spent
    with pytest.raises(aioummu.UnknownCookieError, match="register it anew"):
        region.rearm()
    notifier.close()
    with pytest.raises(aioummu.ClosedError):
        region.rearm()


def test_unregister_by_cookie(notifier: aioummu.Notifier) -> None:
    region = notifier.register(0x1000, 0x2000, cookie=5)
    notifier.unregister(5)
    assert not region.registered
    with pytest.raises(aioummu.UnknownCookieError, match=r"^cookie 5 names no region$"):
        notifier.unregister(5)


def test_what_the_driver_refuses_is_not_registered(
    notifier: aioummu.Notifier, device: PipeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int, **__: object) -> None:
        raise aioummu.TooManyRegionsError

    monkeypatch.setattr(device, "register", refuse)
    with pytest.raises(aioummu.TooManyRegionsError):
        notifier.register(0x1000, 0x2000)
    assert not notifier.regions
