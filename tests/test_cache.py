"""The registration cache: who gets which registration, and when it ends.

On a scripted device, so that changes come exactly where they hurt; with states of
regions, and with generations and reports alone. What happens under threads that really
change memory is in test_cache_stale.py.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import weakref
from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import anyio
import pytest
from anyio import Event, create_task_group, fail_after, to_thread
from anyio.lowlevel import checkpoint

import aioummu
from aioummu import (
    ClosedError,
    Device,
    EmbeddedDevice,
    Feature,
    ForkedError,
    InvalidBufferError,
    InvalidRangeError,
    Notifier,
    RegistrationCache,
    TooManyRegionsError,
    UnstableMemoryError,
    UnwatchableRangeError,
)
from aioummu.testing import FakeDevice
from tests.memory import Pages
from tests.pipe_device import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager

    from _typeshed import WriteableBuffer

    from aioummu import Cause, DeviceLike

    Cache: TypeAlias = "RegistrationCache[Registration]"

pytestmark = pytest.mark.anyio

A = 0x10000
B = 0x20000
SIZE = 0x1000


class ScriptedDevice(FakeDevice):
    """As the driver does it: with states, or with generations and reports only."""

    def __init__(self, features: Feature) -> None:
        super().__init__(features=features)
        self.regions: dict[int, tuple[int, int]] = {}
        self._changes: dict[tuple[int, int], AbstractContextManager[None]] = {}
        #: Raised by register(), in turn.
        self.refusals: list[Exception] = []
        self.is_fenced = True
        self.fences = 0
        #: How often readinto() found nothing, after which its caller waits.
        self._empty_reads = 0

    def begin(self, start: int, end: int) -> None:
        """Begin a change."""
        change = self._changes[start, end] = self.invalidating(start, end)
        change.__enter__()

    def end_change(self, start: int, end: int) -> None:
        self._changes.pop((start, end)).__exit__(None, None, None)

    def change(self, start: int, end: int) -> None:
        self.invalidate(start, end)

    async def until_waited_for(self) -> None:
        """Let other tasks run until one of them waits for a report."""
        seen = self._empty_reads
        await until(lambda: self._empty_reads > seen)

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: Cause | None = None,
        once: bool = False,
    ) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        super().register(start, end, cookie, causes=causes, once=once)
        self.regions[cookie] = start, end

    def unregister(self, cookie: int) -> None:
        super().unregister(cookie)
        del self.regions[cookie]

    def fence(self) -> bool:
        self.fences += 1
        return self.is_fenced

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        size = super().readinto(buffer)
        self._empty_reads += size is None
        return size


class Registration:
    """What the user's function returns."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.is_there = True


class User:
    """Registers and deregisters, and remembers that."""

    def __init__(self) -> None:
        self.all: list[Registration] = []
        #: Called by register(), with the number of the registration.
        self.meanwhile: Callable[[int], object] = lambda _: None
        #: Awaited by register_slowly(), likewise.
        self.wait: Callable[[int], Awaitable[object]] = lambda _: checkpoint()
        self.begun = 0

    @property
    def there(self) -> list[Registration]:
        return [each for each in self.all if each.is_there]

    def register(self, start: int, end: int) -> Registration:
        self.begun += 1
        self.meanwhile(self.begun)
        registration = Registration(start, end)
        self.all.append(registration)
        return registration

    async def register_slowly(self, start: int, end: int) -> Registration:
        self.begun += 1
        await self.wait(self.begun)
        registration = Registration(start, end)
        self.all.append(registration)
        return registration

    def deregister(self, registration: Registration) -> None:
        assert registration.is_there, "deregistered twice"
        registration.is_there = False

    async def deregister_slowly(self, registration: Registration) -> None:
        await checkpoint()
        self.deregister(registration)


@pytest.fixture(params=["states", "generations"])
def device(request: pytest.FixtureRequest) -> Iterator[ScriptedDevice]:
    features = {"states": Feature.STATE, "generations": Feature(0)}
    device = ScriptedDevice(features[request.param])
    yield device
    device.close()


@pytest.fixture
def user() -> User:
    return User()


@pytest.fixture
async def notifier(device: ScriptedDevice) -> Notifier:
    # The fixture of the device closes it.
    return Notifier(device)


@pytest.fixture
async def cache(notifier: Notifier, user: User) -> Cache:
    return RegistrationCache(notifier, user.register, user.deregister)


@pytest.fixture
async def slow(notifier: Notifier, user: User) -> Cache:
    return RegistrationCache(notifier, user.register_slowly, user.deregister_slowly)


async def use(cache: Cache, start: int = A, end: int = A + SIZE) -> Registration:
    with fail_after(LIMIT):
        async with cache.get(start, end) as registration:
            assert registration.start <= start
            assert registration.end >= end
            assert registration.is_there
            return registration


# What is found.


async def test_it_is_made_once(cache: Cache, user: User) -> None:
    first = await use(cache)
    assert await use(cache) is first
    assert user.all == [first]
    statistics = cache.statistics
    assert (statistics.hits, statistics.misses, statistics.registrations) == (1, 1, 1)
    assert (statistics.count, statistics.bytes) == (1, SIZE)


async def test_a_part_of_it_is_a_hit(cache: Cache, user: User) -> None:
    whole = await use(cache)
    assert await use(cache, A + 1, A + SIZE) is whole
    assert await use(cache, A, A + SIZE - 1) is whole
    assert await use(cache, A + 100, A + 101) is whole
    assert len(user.all) == 1


@pytest.mark.parametrize(("start", "end"), [(A - 1, A + 1), (A + 1, A + SIZE + 1)])
async def test_what_is_not_covered_is_made(cache: Cache, start: int, end: int) -> None:
    first = await use(cache)
    assert await use(cache, start, end) is not first
    # Neither is in the way of the other.
    assert await use(cache) is first
    assert cache.statistics.count == 2


async def test_a_larger_one_takes_the_place_of_those_within(
    cache: Cache, user: User
) -> None:
    inner = [await use(cache, A + 16 * n, A + 16 * n + 8) for n in range(4)]
    outer = await use(cache, A, A + 16 * 3 + 8)
    assert await use(cache, A + 16, A + 24) is outer
    await cache.flush()
    assert not any(each.is_there for each in inner)
    assert not user.there


async def test_the_index_finds_what_a_list_of_all_finds(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    chance = random.Random(5)  # noqa: S311 - the same each time
    for _ in range(3000):
        start = A + chance.randrange(200)
        end = start + chance.randrange(1, 40)
        if chance.randrange(4) == 0:
            device.change(start, end)
            # Somebody reads: then they are given up at once.
            await use(cache, B, B + 1)
            await use(cache, B + 8, B + 9)
            device.change(B + 8, B + 9)
        await cache._clean_up()
        regions = device.regions.values()
        covering = [each for each in regions if each[0] <= start and end <= each[1]]
        hits = cache.statistics.hits
        await use(cache, start, end)
        if not covering:
            assert cache.statistics.hits == hits
        entries = cache._within()
        assert entries == sorted(entries, key=lambda entry: entry.start)
        for left, right in pairwise(entries):
            assert left.start < right.start
            assert left.end < right.end
    statistics = cache.statistics
    assert statistics.bytes == sum(e.end - e.start for e in cache._within())
    await cache.aclose()
    assert not user.there
    assert not device.regions


async def test_thousands_are_found_after_others_went(
    cache: Cache, device: ScriptedDevice, notifier: Notifier, user: User
) -> None:
    chance = random.Random(9)  # noqa: S311 - the same each time
    numbers = list(range(2_000))
    known: dict[int, Registration] = {}
    for share in (1.0, 0.1, 0.5, 0.0):
        chance.shuffle(numbers)
        wanted = set(numbers[: int(share * len(numbers))])
        for number in numbers:
            start = A + 16 * number
            if number in wanted:
                registration = await use(cache, start, start + 12)
                assert known.setdefault(number, registration) is registration
            elif number in known:
                device.change(start, start + 1)
                notifier.read_nowait()
                del known[number]
        assert cache.statistics.count == len(known)
        # One for all, then, takes the place of those.
        for first in chance.sample(range(1_900), 5):
            within = [n for n in known if first <= n < first + 100]
            await use(cache, A + 16 * first, A + 16 * (first + 100))
            for number in within:
                del known[number]
            assert cache.statistics.count == len(known) + 1
            device.change(A + 16 * first, A + 16 * (first + 100))
            notifier.read_nowait()
            assert cache.statistics.count == len(known)
    await cache.flush()
    assert not user.there


async def test_a_buffer(cache: Cache) -> None:
    buffer = bytearray(SIZE)
    start, end = aioummu.address_range(buffer)
    async with cache.get(buffer) as registration:
        assert (registration.start, registration.end) == (start, end)
    async with cache.get(memoryview(buffer)[8:16]) as same:
        assert same is registration


async def test_what_is_no_range(cache: Cache, user: User) -> None:
    with pytest.raises(InvalidBufferError):
        cache.get(b"")
    with pytest.raises(TypeError):
        cache.get(A)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        cache.get()  # type: ignore[call-overload]
    for start, end in ((A, A), (A + 1, A), (-1, A), (A, 2**64), (2**64, 2**64 + 1)):
        with pytest.raises(InvalidRangeError):
            await use(cache, start, end)
    with pytest.raises(TypeError):
        await use(cache, A, "end")  # type: ignore[arg-type]
    assert not user.all


async def test_a_use_is_entered_once_at_a_time(cache: Cache) -> None:
    await use(cache)
    a_use = cache.get(A, A + SIZE)
    with pytest.raises(RuntimeError, match="not entered"):
        await a_use.__aexit__(None, None, None)
    async with a_use:
        with pytest.raises(RuntimeError, match="already"):
            await a_use.__aenter__()
        assert cache.statistics.in_use == 1
    async with a_use:
        assert cache.statistics.in_use == 1
    assert cache.statistics.in_use == 0


# Changes.


async def test_after_a_change_it_is_made_anew(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    first = await use(cache)
    device.change(A, A + 1)
    second = await use(cache)
    assert second is not first
    assert user.there == [second]
    assert cache.statistics.invalidations == 1
    assert len(device.regions) == 1


async def test_a_change_of_something_else_ends_nothing(
    cache: Cache, device: ScriptedDevice, notifier: Notifier
) -> None:
    first = await use(cache)
    other = await use(cache, B, B + SIZE)
    with notifier.register(0x50000, 0x51000):
        device.change(B, B + 1)
        device.change(0x50000, 0x51000)
        assert await use(cache) is first
        assert await use(cache, B, B + SIZE) is not other


@pytest.mark.parametrize("is_thread", [False, True])
async def test_a_region_that_somebody_else_unregisters(
    cache: Cache,
    device: ScriptedDevice,
    notifier: Notifier,
    user: User,
    is_thread: bool,
) -> None:
    """Of what nobody watches, nothing is known."""
    first = await use(cache)
    assert await use(cache) is first
    [cookie] = notifier.regions
    if is_thread:
        await to_thread.run_sync(notifier.unregister, cookie)
    else:
        notifier.unregister(cookie)
    assert not device.regions
    second = await use(cache)
    assert second is not first
    assert user.there == [second]
    assert len(device.regions) == 1


async def test_a_region_that_somebody_else_rearms(
    cache: Cache, device: ScriptedDevice, notifier: Notifier, user: User
) -> None:
    """It is watched again, but what was registered is of former memory."""
    first = await use(cache)
    [region] = notifier.regions.values()
    device.change(A, A + 1)
    region.rearm()
    second = await use(cache)
    assert second is not first
    assert user.there == [second]


async def test_others_change_while_it_is_made(
    cache: Cache, device: ScriptedDevice, notifier: Notifier, user: User
) -> None:
    with notifier.register(B, B + 1):
        user.meanwhile = lambda _: device.change(B, B + 1)
        registration = await use(cache)
    assert user.all == [registration]


async def test_while_a_change_is_under_way_nothing_is_found(
    cache: Cache, device: ScriptedDevice
) -> None:
    first = await use(cache)
    device.begin(A, A + 1)
    seen: list[Registration] = []

    async def ask() -> None:
        seen.append(await use(cache))

    async with create_task_group() as tasks:
        tasks.start_soon(ask)
        for _ in range(50):
            await checkpoint()
        device.end_change(A, A + 1)
    # Without states it may have been handed out before the end, not after it.
    seen.append(await use(cache))
    assert first not in seen
    assert seen[1].is_there
    if device.features:
        assert seen[0] is seen[1]


async def test_a_change_that_had_begun_before_ends_what_was_made_during_it(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    device.begin(A, A + 1)
    seen: list[Registration] = []

    async def ask() -> None:
        seen.append(await use(cache))

    async with create_task_group() as tasks:
        tasks.start_soon(ask)
        for _ in range(20):
            await checkpoint()
        if device.features:
            assert not user.begun
        device.end_change(A, A + 1)
    again = await use(cache)
    assert (again is seen[0]) == bool(device.features)
    assert user.there == [again]


@pytest.mark.parametrize("times", [1, 5])
async def test_a_change_while_it_is_made(
    cache: Cache, device: ScriptedDevice, user: User, times: int
) -> None:
    def meanwhile(number: int) -> None:
        if number <= times:
            device.change(A, A + 1)

    user.meanwhile = meanwhile
    registration = await use(cache)
    assert len(user.all) == times + 1
    assert user.there == [registration] == user.all[-1:]
    assert cache.statistics.discarded == times
    assert len(device.regions) == 1


@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize("is_read", [False, True])
async def test_a_change_at_any_moment_of_a_slow_registration(
    slow: Cache,
    device: ScriptedDevice,
    notifier: Notifier,
    user: User,
    moment: int,
    is_read: bool,
) -> None:
    """Also if somebody else reads the report before the registration is done."""
    moments = 0

    async def wait(number: int) -> None:
        nonlocal moments
        for _ in range(3):
            for _ in range(2):
                if moments == moment and number == 1:
                    device.change(A, A + 1)
                    if is_read:
                        notifier._read_for_others()
                moments += 1
            await checkpoint()

    user.wait = wait
    registration = await use(slow)
    assert len(user.all) == 2
    assert user.there == [registration]


async def test_a_change_that_begins_while_it_is_made_and_ends_later(
    slow: Cache, device: ScriptedDevice, user: User
) -> None:
    async def wait(number: int) -> None:
        if number == 1:
            device.begin(A, A + 1)
        await checkpoint()

    user.wait = wait
    seen: list[Registration] = []

    async def ask() -> None:
        seen.append(await use(slow))

    async with create_task_group() as tasks:
        tasks.start_soon(ask)
        await until(lambda: user.all)
        for _ in range(20):
            await checkpoint()
        device.end_change(A, A + 1)
    assert user.all[0] not in seen
    again = await use(slow)
    assert user.there == [again]


async def test_a_change_before_the_function_is_called(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    """Between the watch and the registration: it must not count as before."""
    device.begin(A, A + 1)
    async with create_task_group() as tasks:
        tasks.start_soon(use, cache)
        await checkpoint()
        device.end_change(A, A + 1)
    device.change(A, A + 1)
    registration = await use(cache)
    assert user.there == [registration]


async def test_memory_that_never_rests(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    user.meanwhile = lambda _: device.change(A, A + 1)
    with pytest.raises(UnstableMemoryError, match="each of the 20 times"):
        await use(cache)
    assert user.all
    assert not user.there
    assert not device.regions
    # What was left is nothing that could be in the way.
    user.meanwhile = lambda _: None
    await use(cache)


async def test_what_is_in_use_stays_until_the_last_user_leaves(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    async with cache.get(A, A + SIZE) as first:
        async with cache.get(A, A + SIZE) as same:
            assert same is first
            device.change(A, A + 1)
            second = await use(cache)
            assert second is not first
            assert user.there == [first, second]
            assert cache.statistics.in_use == 2
        assert user.there == [first, second]
    assert user.there == [second]
    assert cache.statistics.in_use == 0


# Tasks.


async def test_a_thousand_tasks_get_one(slow: Cache, user: User) -> None:
    go = Event()
    user.wait = lambda _: go.wait()
    seen: list[Registration] = []

    async def ask() -> None:
        async with slow.get(A, A + SIZE) as registration:
            seen.append(registration)

    async with create_task_group() as tasks:
        for _ in range(1000):
            tasks.start_soon(ask)
        await until(lambda: user.begun)
        for _ in range(10):
            await checkpoint()
        go.set()
    assert seen == user.all * 1000
    assert slow.statistics.in_use == 0


async def test_a_part_of_what_is_being_made_is_waited_for(
    slow: Cache, user: User
) -> None:
    go = Event()
    user.wait = lambda _: go.wait()
    async with create_task_group() as tasks:
        tasks.start_soon(use, slow, A, A + SIZE)
        await until(lambda: user.begun)
        tasks.start_soon(use, slow, A + 8, A + 16)
        for _ in range(10):
            await checkpoint()
        go.set()
    assert len(user.all) == 1


async def test_a_larger_one_that_is_made_faster(
    slow: Cache, device: ScriptedDevice, user: User
) -> None:
    """The index would have one within another, and give up the wrong one."""
    go = Event()

    async def wait(number: int) -> None:
        if number == 1:
            await go.wait()

    user.wait = wait
    async with create_task_group() as tasks:
        tasks.start_soon(use, slow, A, A + 1)
        await until(lambda: user.begun)
        larger = await use(slow, A, A + SIZE)
        go.set()
    assert user.there == [larger]
    assert slow.statistics.count == 1
    device.change(A + 8, A + 9)
    again = await use(slow, A, A + SIZE)
    await use(slow, A, A + 1)
    assert user.there == [again]


async def test_the_task_that_makes_it_is_cancelled(
    slow: Cache, device: ScriptedDevice, user: User
) -> None:
    async def wait(number: int) -> None:
        if number == 1:
            await anyio.sleep_forever()

    user.wait = wait
    with fail_after(LIMIT):
        async with create_task_group() as others, create_task_group() as tasks:
            tasks.start_soon(use, slow)
            await until(lambda: user.begun)
            for _ in range(3):
                others.start_soon(use, slow)
            for _ in range(10):
                await checkpoint()
            assert user.begun == 1
            tasks.cancel_scope.cancel()
    assert user.begun == 2
    assert len(user.there) == 1
    assert len(device.regions) == 1


@pytest.mark.parametrize("steps", range(12))
async def test_cancelled_at_any_step_nothing_is_left(
    slow: Cache, device: ScriptedDevice, user: User, steps: int
) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(use, slow)
        for _ in range(steps):
            await checkpoint()
        tasks.cancel_scope.cancel()
    assert slow.statistics.in_use == 0
    assert len(device.regions) == len(user.there) == slow.statistics.count
    await slow.aclose()
    assert not user.there
    assert not device.regions


async def test_if_it_cannot_be_made_others_try_themselves(
    slow: Cache, device: ScriptedDevice, user: User
) -> None:
    go = Event()
    failures = []

    async def wait(number: int) -> None:
        await go.wait()
        if number <= 2:
            raise OSError(number)

    user.wait = wait

    async def ask() -> None:
        try:
            await use(slow)
        except OSError as error:
            failures.append(error.args)

    async with create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(ask)
        await until(lambda: user.begun)
        for _ in range(10):
            await checkpoint()
        go.set()
    assert failures == [(1,), (2,)]
    assert len(user.there) == 1
    assert len(device.regions) == 1


# Limits.


async def test_the_least_recently_used_goes(notifier: Notifier, user: User) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister, max_count=2)
    first = await use(cache, A, A + 1)
    second = await use(cache, A + 8, A + 9)
    assert await use(cache, A, A + 1) is first
    third = await use(cache, A + 16, A + 17)
    assert not second.is_there
    assert user.there == [first, third]
    assert cache.statistics.evictions == 1


async def test_the_limit_of_bytes(notifier: Notifier, user: User) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister, max_bytes=10)
    for start in (0, 4, 8):
        await use(cache, A + start, A + start + 4)
    assert [each.start - A for each in user.there] == [4, 8]
    await use(cache, B, B + 10)
    assert [each.start for each in user.there] == [B]
    large = await use(cache, A, A + 11)
    assert not large.is_there
    assert cache.statistics.bytes == 0


async def test_a_limit_of_none_keeps_what_is_in_use(
    notifier: Notifier, user: User
) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister, max_count=0)
    async with cache.get(A, A + 1) as first:
        assert await use(cache, A, A + 1) is first
        assert first.is_there
    assert not first.is_there


async def test_what_is_in_use_is_not_evicted(notifier: Notifier, user: User) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister, max_count=1)
    async with cache.get(A, A + 1) as first:
        async with cache.get(B, B + 1) as second:
            assert cache.statistics.count == 2
        assert first.is_there
        assert not second.is_there
    assert first.is_there


async def test_the_order_of_eviction_is_that_of_use(
    notifier: Notifier, user: User
) -> None:
    chance = random.Random(7)  # noqa: S311 - the same each time
    cache = RegistrationCache(notifier, user.register, user.deregister, max_count=8)
    model: OrderedDict[int, None] = OrderedDict()
    for _ in range(2000):
        start = A + 8 * min(chance.randrange(20), chance.randrange(20))
        await use(cache, start, start + 8)
        model[start] = None
        model.move_to_end(start)
        if len(model) > 8:
            model.popitem(last=False)
        assert sorted(model) == sorted(each.start for each in user.there)


@pytest.mark.parametrize("limit", ["max_count", "max_bytes"])
async def test_a_limit_below_nothing(
    notifier: Notifier, user: User, limit: str
) -> None:
    with pytest.raises(ValueError, match=limit):
        RegistrationCache(
            notifier,
            user.register,
            user.deregister,
            **{limit: -1},  # type: ignore[arg-type]
        )


# The end.


async def test_flush(cache: Cache, user: User, device: ScriptedDevice) -> None:
    idle = await use(cache, B, B + 1)
    async with cache.get(A, A + 1) as used:
        await cache.flush()
        assert idle not in user.there
        assert user.there == [used]
        assert not device.regions
        again = await use(cache, A, A + 1)
        assert again is not used
    assert user.there == [again]


async def test_aclose(notifier: Notifier, user: User, device: ScriptedDevice) -> None:
    async with RegistrationCache(notifier, user.register, user.deregister) as cache:
        await use(cache, B, B + 1)
        used = cache.get(A, A + 1)
        registration = await used.__aenter__()
    await cache.aclose()
    assert user.there == [registration]
    with pytest.raises(ClosedError, match="cache"):
        await use(cache)
    with pytest.raises(ClosedError, match="cache"):
        await cache.run()
    await used.__aexit__(None, None, None)
    assert not user.there
    assert not device.regions


async def test_closed_while_it_is_made(
    slow: Cache, user: User, device: ScriptedDevice
) -> None:
    async def wait(number: int) -> None:  # noqa: ARG001
        await slow.aclose()

    user.wait = wait
    with pytest.raises(ClosedError):
        await use(slow)
    assert user.all
    assert not user.there
    assert not device.regions


async def test_the_notifier_is_closed_first(
    cache: Cache, notifier: Notifier, user: User
) -> None:
    await use(cache, B, B + 1)
    async with cache.get(A, A + 1):
        notifier.close()
        with pytest.raises(ClosedError):
            await use(cache, A, A + 1)
    await cache.aclose()
    assert not user.there


async def test_what_deregistering_raises_is_raised(
    notifier: Notifier, user: User, device: ScriptedDevice
) -> None:
    failures = 2

    def deregister(registration: Registration) -> None:
        nonlocal failures
        user.deregister(registration)
        if failures:
            failures -= 1
            raise OSError("busy")

    cache = RegistrationCache(notifier, user.register, deregister)
    for number in range(4):
        await use(cache, A + 8 * number, A + 8 * number + 8)
    with pytest.raises(ExceptionGroup) as group:
        await cache.flush()
    assert len(group.value.exceptions) == 2
    # The others as well.
    assert not user.there
    failures = 1
    await use(cache)
    device.change(A, A + 1)
    with pytest.raises(OSError, match="busy"):
        await use(cache)
    assert not user.there


async def test_deregistering_is_not_cancelled(slow: Cache, user: User) -> None:
    await use(slow)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await slow.flush()
    assert scope.cancelled_caught
    assert not user.there


# Who reads the reports.


async def test_run_gives_up_what_nobody_asks_for(
    slow: Cache, device: ScriptedDevice, notifier: Notifier
) -> None:
    registrations = [await use(slow, A + 8 * n, A + 8 * n + 8) for n in range(3)]
    async with create_task_group() as tasks:
        tasks.start_soon(slow.run)
        await device.until_waited_for()
        device.change(A, A + 1)
        await until(lambda: not registrations[0].is_there)
        device.change(A + 8, A + 9)
        await until(lambda: not registrations[1].is_there)
        assert registrations[2].is_there
        tasks.cancel_scope.cancel()
    assert not notifier._has_kept or notifier._kept_last
    assert slow.statistics.invalidations == 2


async def test_run_ends_when_the_cache_is_closed(
    slow: Cache, device: ScriptedDevice
) -> None:
    async def run() -> None:
        with pytest.raises(ClosedError):
            await slow.run()

    with fail_after(LIMIT):
        async with create_task_group() as tasks:
            tasks.start_soon(run)
            await device.until_waited_for()
            await slow.aclose()


async def test_run_ends_if_closed_while_it_deregisters(
    notifier: Notifier, user: User, device: ScriptedDevice
) -> None:
    go, begun = Event(), Event()

    async def deregister(registration: Registration) -> None:
        begun.set()
        await go.wait()
        user.deregister(registration)

    cache = RegistrationCache(notifier, user.register, deregister)

    async def run() -> None:
        with pytest.raises(ClosedError):
            await cache.run()

    await use(cache)
    with fail_after(LIMIT):
        async with create_task_group() as tasks:
            tasks.start_soon(run)
            await device.until_waited_for()
            device.change(A, A + 1)
            await begun.wait()
            await cache.aclose()
            go.set()
    assert not user.there


async def test_another_miss_gives_up_what_has_changed(
    cache: Cache, device: ScriptedDevice
) -> None:
    first = await use(cache)
    device.change(A, A + 1)
    await use(cache, B, B + 1)
    assert not first.is_there


async def test_the_consumer_of_events_gets_its_own(
    cache: Cache, device: ScriptedDevice, notifier: Notifier
) -> None:
    """What the cache reads is not lost for others; and its own is not theirs."""
    region = notifier.register(0x50000, 0x51000)
    await use(cache)
    device.change(A, A + 1)
    device.change(0x50000, 0x50001)
    await use(cache)
    events = notifier.read_nowait()
    assert [e.region for e in events if isinstance(e, aioummu.Inval)] == [region]
    assert isinstance(events[-1], aioummu.Last)
    assert not notifier.changed


async def test_a_task_that_iterates_is_not_in_the_way(
    cache: Cache, device: ScriptedDevice, notifier: Notifier
) -> None:
    region = notifier.register(0x50000, 0x51000)
    seen: list[aioummu.Event] = []

    async def consume() -> None:
        async for event in notifier:
            seen.append(event)  # noqa: PERF401 - it never ends

    async with create_task_group() as tasks:
        tasks.start_soon(consume)
        await device.until_waited_for()
        first = await use(cache)
        device.change(A, A + 1)
        device.change(0x50000, 0x50001)
        assert await use(cache) is not first
        await until(lambda: len(seen) >= 2)
        tasks.cancel_scope.cancel()
    assert any(isinstance(e, aioummu.Inval) and e.region is region for e in seen)


async def test_nothing_piles_up_if_nobody_receives_events(
    cache: Cache, device: ScriptedDevice, notifier: Notifier
) -> None:
    for _ in range(100):
        await use(cache)
        device.change(A, A + 1)
    await use(cache)
    assert not notifier._kept
    assert not notifier._backlog
    assert len(notifier.regions) == 1
    assert len(notifier._stale) <= 1


# What cannot be watched.


async def test_unwatchable_memory_is_registered_for_each_use(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    device.refusals = [UnwatchableRangeError(22, "no") for _ in range(4)]
    async with cache.get(A, A + 1) as first:
        assert first.is_there
        second = await use(cache, A, A + 1)
        assert second is not first
        assert cache.statistics.in_use == 1
    assert not user.there
    assert cache.statistics.uncached == 2
    assert cache.statistics.count == 0


async def test_memory_that_was_just_being_replaced_is_watched(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    device.refusals = [UnwatchableRangeError(22, "no")]
    registration = await use(cache)
    assert cache.statistics.uncached == 0
    assert user.there == [registration]
    assert await use(cache) is registration


async def test_there_are_too_many_regions(
    cache: Cache, device: ScriptedDevice, user: User
) -> None:
    first = await use(cache)
    device.refusals = [TooManyRegionsError(28, "too many")]
    second = await use(cache, B, B + 1)
    assert not first.is_there
    assert user.there == [second]


async def test_the_fence(
    notifier: Notifier, device: ScriptedDevice, user: User
) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister, fence=True)
    registration = await use(cache)
    fences = device.fences
    assert await use(cache) is registration
    assert device.fences == fences + 1
    device.is_fenced = False
    with pytest.raises(UnstableMemoryError):
        await use(cache)
    device.is_fenced = True
    await use(cache)
    await cache.aclose()
    assert not user.there


async def test_none_is_kept_within_another_if_the_fence_is_in_vain(
    notifier: Notifier, device: ScriptedDevice, user: User
) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister, fence=True)
    outer = await use(cache)
    fences = iter([False, False, True, False])
    device.fence = lambda: next(fences, True)  # type: ignore[method-assign]
    inner = await use(cache, A, A + 1)
    assert inner is outer or not inner.is_there
    assert cache.statistics.count == 1
    device.change(A, A + 1)
    notifier.read_nowait()
    assert not cache.statistics.count
    await cache.aclose()
    assert not user.there


# The extension.


async def test_hits_hold_no_references(cache: Cache) -> None:
    registration = await use(cache)
    [entry] = cache._within()
    count = sys.getrefcount(registration), sys.getrefcount(entry)
    for _ in range(1000):
        async with cache.get(A, A + SIZE):
            pass
        cache.get(A, A + SIZE)
    assert (sys.getrefcount(registration), sys.getrefcount(entry)) == count


async def test_a_forgotten_cache_is_collected(notifier: Notifier, user: User) -> None:
    cache = RegistrationCache(notifier, user.register, user.deregister)
    registration = await use(cache)
    # A circle through everything that the extension has.
    registration.cache = cache  # type: ignore[attr-defined]
    registration.use = cache.get(A, A + SIZE)  # type: ignore[attr-defined]
    for entry in cache._within():
        # The notifier knows the cache by its regions.
        cache._retire(entry)
        cache._waste.clear()
    reference = weakref.ref(registration)
    user.all.clear()
    del cache, registration, entry
    gc.collect()
    assert reference() is None


async def test_a_hit_does_not_let_others_run(cache: Cache) -> None:
    await use(cache)
    ran = False

    async def other() -> None:
        nonlocal ran
        ran = True
        await checkpoint()

    async with create_task_group() as tasks:
        tasks.start_soon(other)
        for _ in range(100):
            async with cache.get(A, A + SIZE):
                assert not ran


# On real memory.


Open: TypeAlias = "Callable[[], DeviceLike]"

REAL = pytest.mark.parametrize(
    "open_device",
    [
        pytest.param(Device, id="driver", marks=pytest.mark.device),
        pytest.param(EmbeddedDevice, id="embedded", marks=pytest.mark.embedded),
    ],
)


@REAL
@pytest.mark.parametrize("fence", [False, True])
async def test_the_same_address_with_other_memory(
    open_device: Open, user: User, fence: bool
) -> None:
    with Pages(2) as pages, Pages(2) as others:
        async with (
            aioummu.open_notifier(device=open_device()) as notifier,
            RegistrationCache(
                notifier, user.register, user.deregister, fence=fence
            ) as cache,
        ):
            first = await use(cache, pages.start, pages.end)
            other = await use(cache, others.start, others.end)
            assert await use(cache, *pages.page(1)) is first
            pages.map_over(pages.page(0))
            second = await use(cache, *pages.page(1))
            assert second is not first
            assert await use(cache, others.start, others.end) is other
            # And it is watched again.
            pages.map_over(pages.page(1))
            assert await use(cache, *pages.page(1)) is not second
            assert cache.statistics.uncached == 0
    assert not user.there


@REAL
async def test_a_forked_child_gets_nothing(open_device: Open, user: User) -> None:
    with Pages(1) as pages:
        async with aioummu.open_notifier(device=open_device()) as notifier:
            cache = RegistrationCache(notifier, user.register, user.deregister)
            await use(cache, pages.start, pages.end)
            child = os.fork()
            if not child:
                try:
                    cache.get(pages.start, pages.end).__aenter__().send(None)
                except ForkedError:
                    os._exit(0)
                finally:
                    os._exit(1)
            _, status = await to_thread.run_sync(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await cache.aclose()
