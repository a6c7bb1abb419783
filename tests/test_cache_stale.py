"""Is anything stale handed out, while threads change what lies behind the addresses?

The changers are threads of C that never hold the interpreter's lock, see
``stale/changers.c``. Whatever is registered is pinned, and its physical pages are
written down; a pinned page is nobody else's. What the cache hands out is compared
with what lies behind the addresses at that time, as far as nothing was done to them
from before get() until after the comparison: half of the time all changers are held
still, half of the time it is seen from their sequence numbers.

A cache that trusts nothing but addresses runs through the same, and has to be caught.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

import aioummu
from aioummu import Device, EmbeddedDevice, Feature, RegistrationCache
from aioummu.testing import FakeDevice
from tests.memory import PAGE
from tests.operations import kernel
from tests.pipe_device import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioummu import DeviceLike

#: Where no allocator comes: holes in it stay holes.
ARENA = 0x10_0000_0000
SLOTS = 24
SHARED = 6
PAGES_PER_SLOT = 4
SLOT = PAGES_PER_SLOT * PAGE
CHANGERS = 3
#: Microseconds that a changer sleeps after a change, at most. Short: everything has
#: changed when it is asked for again. Long: most has not.
PAUSES = {"quick": 100, "slow": 2_000}
#: Tasks that use the cache at the same time.
TASKS = 4
#: Comparisons of what was in the cache, after which the test is over.
ENOUGH = 400


@pytest.fixture(scope="module")
def changers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if os.geteuid():
        pytest.skip("only root may see which physical pages there are")
    if kernel() < (5, 14):
        pytest.skip("no MADV_POPULATE_WRITE before Linux 5.14")
    library = tmp_path_factory.mktemp("stale") / "changers.so"
    source = Path(__file__).parent / "stale" / "changers.c"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-pthread", "-o", library, source], check=True)
    changers = ctypes.CDLL(str(library))
    size, address = ctypes.c_size_t, ctypes.c_void_p
    changers.changers_map.argtypes = [address, size, *[ctypes.c_uint] * 3]
    changers.changers_start.argtypes = [ctypes.c_uint64, ctypes.c_uint]
    changers.changers_stop.restype = ctypes.c_ulong
    changers.changers_changes.restype = ctypes.c_ulong
    changers.changers_sequence.restype = ctypes.c_uint64
    changers.frames_of.argtypes = [ctypes.c_int, address, size, address]
    changers.pin.argtypes = [ctypes.c_int, ctypes.c_int, address, size, address]
    return changers


@attrs.define(eq=False)
class Pinned:
    """What stands for a registration with an adapter."""

    number: int
    start: int
    frames: array[int]
    pipe: tuple[int, int]
    is_registered: bool = True

    def frames_from(self, start: int, end: int) -> array[int]:
        first = (start - self.start) // PAGE
        return self.frames[first : first + (end - start) // PAGE]


class Adapter:
    """Registers memory: pins its pages, and remembers which they are."""

    def __init__(self, changers: ctypes.CDLL, chance: random.Random) -> None:
        self._changers = changers
        self._chance = chance
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        #: How many there are, and how many were begun.
        self.count = 0
        self.made = 0

    def close(self) -> None:
        os.close(self._pagemap)

    def frames(self, start: int, end: int) -> array[int]:
        frames = array("Q", bytes((end - start) // PAGE * 8))
        place = frames.buffer_info()[0]
        assert not self._changers.frames_of(self._pagemap, start, len(frames), place)
        return frames

    def register(self, start: int, end: int) -> Pinned:
        self.made = number = self.made + 1
        frames = array("Q", bytes((end - start) // PAGE * 8))
        pipe = os.pipe()
        error = self._changers.pin(
            self._pagemap, pipe[1], start, len(frames), frames.buffer_info()[0]
        )
        if error:
            for fd in pipe:
                os.close(fd)
            raise OSError(-error, os.strerror(-error))
        self.count += 1
        return Pinned(number, start, frames, pipe)

    async def register_slowly(self, start: int, end: int) -> Pinned:
        """Leave time for changes before and after it."""
        if self._chance.randrange(2):
            await anyio.sleep(self._chance.choice((0, 0.0002, 0.001)))
        pinned = self.register(start, end)
        if self._chance.randrange(2):
            await anyio.sleep(self._chance.choice((0, 0.0002, 0.001)))
        return pinned

    def deregister(self, pinned: Pinned) -> None:
        assert pinned.is_registered
        pinned.is_registered = False
        self.count -= 1
        for fd in pinned.pipe:
            os.close(fd)

    async def deregister_slowly(self, pinned: Pinned) -> None:
        await checkpoint()
        self.deregister(pinned)


def stateless_device() -> Device:
    """Return a driver's device that has to do with generations and reports."""
    return Device(features=Feature.CAUSE)


Open: TypeAlias = "Callable[[], DeviceLike]"

DEVICES = [
    pytest.param(Device, id="driver", marks=pytest.mark.device),
    pytest.param(stateless_device, id="driver-stateless", marks=pytest.mark.device),
    pytest.param(EmbeddedDevice, id="embedded", marks=pytest.mark.embedded),
]


@attrs.define
class Run:
    """What happened."""

    uses: int = 0
    compared: int = 0
    """Registrations that were in the cache, handed out in quiet, and compared."""
    stale: int = 0
    """Those of them that were of other pages than there are."""
    refused: int = 0
    """How often the memory changed too often, or was just not there."""
    changes: int = 0
    statistics: aioummu.CacheStatistics | None = None


class Checker:
    """Tasks that use a cache under the changers, and compare."""

    def __init__(
        self,
        changers: ctypes.CDLL,
        adapter: Adapter,
        cache: RegistrationCache[Pinned],
        chance: random.Random,
        shared: int,
    ) -> None:
        self._changers = changers
        self._chance = chance
        self._adapter = adapter
        self._cache = cache
        self._slots = SLOTS if shared else SLOTS - SHARED
        self.run = Run()

    def _choose(self) -> tuple[int, int]:
        """Return some pages: of one slot mostly, of several, or a part."""
        pages = self._slots * PAGES_PER_SLOT
        first = self._chance.randrange(self._slots) * PAGES_PER_SLOT
        count = PAGES_PER_SLOT
        match self._chance.randrange(4):
            case 0:
                first += self._chance.randrange(PAGES_PER_SLOT)
                count = 1
            case 1:
                first += self._chance.randrange(PAGES_PER_SLOT)
                count = self._chance.randrange(1, 2 * PAGES_PER_SLOT)
        behind = min(first + count, pages)
        return ARENA + first * PAGE, ARENA + behind * PAGE

    def _sequences(self, start: int, end: int) -> list[int]:
        slots = range((start - ARENA) // SLOT, (end - ARENA - 1) // SLOT + 1)
        return [self._changers.changers_sequence(slot) for slot in slots]

    async def _use(self, start: int, end: int) -> None:
        number = self._adapter.made
        before = self._sequences(start, end)
        async with self._cache.get(start, end) as pinned:
            assert pinned.is_registered
            now = self._adapter.frames(start, end)
            is_quiet = before == self._sequences(start, end) and not any(
                sequence % 2 for sequence in before
            )
            # What was made for this use, in quiet, could hardly be wrong.
            if is_quiet and pinned.number <= number:
                recorded = pinned.frames_from(start, end)
                self.run.compared += 1
                self.run.stale += recorded != now or 0 in recorded
            await checkpoint()
            # Not deregistered under its user, whatever has happened to the memory.
            assert pinned.is_registered
        self.run.uses += 1

    async def _use_until(self, is_over: Callable[[Run], bool]) -> None:
        while not is_over(self.run):
            try:
                await self._use(*self._choose())
            except (aioummu.UnstableMemoryError, OSError):
                self.run.refused += 1
            await checkpoint()

    async def _hold_the_changers_now_and_then(self) -> None:
        while True:
            await anyio.sleep(0.002)
            self._changers.changers_hold()
            try:
                enough = self.run.uses + 3 * TASKS
                await until(partial(self._has_used, enough))
            finally:
                self._changers.changers_go()

    def _has_used(self, enough: int) -> bool:
        return self.run.uses >= enough

    async def until(self, is_over: Callable[[Run], bool]) -> Run:
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._hold_the_changers_now_and_then)
                async with anyio.create_task_group() as users:
                    for _ in range(TASKS):
                        users.start_soon(self._use_until, is_over)
                tasks.cancel_scope.cancel()
        return self.run


@pytest.fixture
def chance() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - shown with a failure
    return random.Random(seed)  # noqa: S311 - so that it can be repeated


@pytest.fixture
def adapter(changers: ctypes.CDLL, chance: random.Random) -> Iterator[Adapter]:
    adapter = Adapter(changers, chance)
    yield adapter
    adapter.close()


def check(
    changers: ctypes.CDLL,
    adapter: Adapter,
    device: DeviceLike,
    chance: random.Random,
    pause: str,
    is_over: Callable[[Run], bool],
    shared: int = 0,
) -> Run:
    """Use a cache under the changers until it is over."""

    async def check() -> Run:
        async with aioummu.open_notifier(device=device) as notifier:
            cache = RegistrationCache(
                notifier,
                adapter.register_slowly,
                adapter.deregister_slowly,
                max_count=SLOTS,
            )
            async with cache:
                checker = Checker(changers, adapter, cache, chance, shared)
                run = await checker.until(is_over)
            run.statistics = cache.statistics
            assert not notifier.regions
        return run

    assert not changers.changers_map(ARENA, SLOT, SLOTS, SHARED, CHANGERS)
    try:
        assert not changers.changers_start(chance.getrandbits(64), PAUSES[pause])
        try:
            run = anyio.run(check)
        finally:
            changes = changers.changers_stop()
    finally:
        changers.changers_unmap()
    run.changes = changes
    # Nothing was lost.
    assert adapter.count == 0
    print(run)  # noqa: T201 - shown with a failure
    return run


@pytest.mark.parametrize("pause", PAUSES)
@pytest.mark.parametrize("open_device", DEVICES)
def test_nothing_stale_is_handed_out(
    open_device: Open,
    pause: str,
    changers: ctypes.CDLL,
    adapter: Adapter,
    chance: random.Random,
) -> None:
    # The embedded backend watches files from Linux 6.7 on; unwatched memory is
    # registered for single uses, which has nothing to do with what is tested here.
    shared = 0 if open_device is EmbeddedDevice and kernel() < (6, 7) else SHARED
    run = check(
        changers,
        adapter,
        open_device(),
        chance,
        pause,
        lambda run: run.compared >= ENOUGH and changers.changers_changes() >= ENOUGH,
        shared,
    )
    assert run.stale == 0
    assert run.compared >= ENOUGH
    assert run.changes >= ENOUGH


@pytest.mark.parametrize("pause", PAUSES)
def test_a_cache_that_trusts_addresses_is_caught(
    pause: str, changers: ctypes.CDLL, adapter: Adapter, chance: random.Random
) -> None:
    """Or the other tests are worth nothing."""
    run = check(
        changers,
        adapter,
        # It is told of nothing.
        FakeDevice(),
        chance,
        pause,
        lambda run: run.stale >= 10,
        SHARED,
    )
    assert run.stale >= 10
