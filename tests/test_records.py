from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aioummu
from aioummu import Inval, Last, Region
from tests.pipe_device import RECORD, inval, last

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


class Owner:
    closed = False

    def _withdraw(self, region: Region, /) -> None:
        raise NotImplementedError

    def _spent(self, region: Region, /) -> bool:
        raise NotImplementedError

    def _rearm(self, region: Region, /) -> None:
        raise NotImplementedError

    def _is_valid(self, region: Region, /) -> bool:
        raise NotImplementedError

    async def _next_report(self, region: Region, /) -> Inval:
        raise NotImplementedError


def region(cookie: int) -> Region:
    return Region(cookie, 0x1000, 0x2000, Owner())


def test_numbers_are_those_of_the_interface() -> None:
    assert aioummu.RECORD_SIZE == 32
    assert (aioummu.INVAL, aioummu.LAST, aioummu.HINT) == (0, 1, 1)


@given(st.lists(st.tuples(u32, u32, u64, u64, u64)))
def test_unpack_returns_what_was_packed(records: list[aioummu.Record]) -> None:
    data = b"".join(RECORD.pack(*record) for record in records)
    assert aioummu.unpack(data) == records


@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), u32, u64, u64, st.integers(0, 9))),
    st.sets(st.integers(0, 9)),
)
def test_decode_keeps_order_and_drops_only_unknown_cookies(
    records: list[aioummu.Record], cookies: set[int]
) -> None:
    regions = {cookie: region(cookie) for cookie in cookies}
    expected = [
        Last(value) if kind else Inval(regions[value], start, end, bool(flags & 1))
        for kind, flags, start, end, value in records
        if kind or value in regions
    ]
    data = b"".join(RECORD.pack(*record) for record in records)
    assert aioummu.decode(data, regions) == expected


def test_decode_ignores_flags_that_it_does_not_know() -> None:
    (event,) = aioummu.decode(RECORD.pack(0, 0xFFFFFFFE, 1, 2, 7), {7: region(7)})
    assert isinstance(event, Inval)
    assert event.exact is False


def test_decoded_events_are_ordinary_frozen_attrs_objects() -> None:
    watched = region(7)
    events = aioummu.decode(inval(7, 1, 2) + last(3), {7: watched})
    assert events == [Inval(watched, 1, 2, exact=True), Last(3)]
    assert hash(events[0]) == hash(Inval(watched, 1, 2, exact=True))
    assert [type(event) for event in events] == [Inval, Last]
    assert attrs.astuple(events[0], recurse=False) == (
        watched,
        1,
        2,
        True,
        aioummu.HINT,
    )
    for event in events:
        for field in attrs.fields(type(event)):
            with pytest.raises(attrs.exceptions.FrozenInstanceError):
                setattr(event, field.name, 0)
        with pytest.raises(AttributeError):
            event.novel = 0  # type: ignore[union-attr]


def test_events_match_by_keyword_and_position() -> None:
    watched = region(7)
    match aioummu.decode(inval(7, 1, 2, exact=False) + last(3), {7: watched}):
        case [Inval(region=hit, start=1, end=2, exact=False), Last(generation)]:
            assert hit is watched
            assert generation == 3
        case other:
            pytest.fail(f"did not match: {other}")


@pytest.mark.parametrize("size", [1, 31, 33])
def test_a_part_of_a_record_is_an_error(size: int) -> None:
    data = bytes(size)
    with pytest.raises(aioummu.ForeignDeviceError, match="part of a record"):
        aioummu.unpack(data)
    with pytest.raises(aioummu.ForeignDeviceError, match="part of a record"):
        aioummu.decode(data, {})


def test_an_unknown_type_of_record_is_an_error() -> None:
    with pytest.raises(aioummu.ForeignDeviceError, match="unknown type 2"):
        aioummu.decode(RECORD.pack(2, 0, 0, 0, 0), {})
