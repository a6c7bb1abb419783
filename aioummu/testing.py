"""A device that tests of programs script, in place of the kernel.

::

    import aioummu.testing

    device = aioummu.testing.FakeDevice()
    async with aioummu.open_notifier(device=device) as notifier:
        region = notifier.register(0x1000, 0x3000)
        device.invalidate(0x2000, 0x3000, aioummu.Cause.UNMAP)
        event = await region.invalidated()

It watches no memory: what it is told happens to addresses. For the rest it behaves as
the driver does: reports coalesce, LAST follows, the generation counts, regions have
states, filters and single shots, and the process can end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING

import attrs

from aioummu import _abi
from aioummu._errors import (
    ClosedError,
    DuplicateCookieError,
    InvalidBufferError,
    ProcessGoneError,
    UnknownCookieError,
    UnsupportedFeatureError,
)
from aioummu._records import Cause, Feature, wanted_causes
from aioummu._regions import checked_cookie, checked_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import WriteableBuffer

    from aioummu._device import Page

_ALL = Feature.CAUSE | Feature.FILTER | Feature.STATE | Feature.ONCE


@attrs.define(eq=False)
class _Watched:
    """A region, and its report."""

    start: int
    end: int
    wanted: int
    once: bool
    word: int
    hint: tuple[int, int] | None = None
    """The one range that was invalidated; None: several, or none."""
    flags: int = 0
    """Causes of what is pending."""


class FakeDevice:
    """A device in which happens what a test says.

    To be given to ``open_notifier(device=...)``, or used by itself as a
    :class:`~aioummu.Device` is.

    Synchronization: all methods may be called by any thread at any time, except that
    nothing else may be running when close() is called.

    :param features: what it can do; without STATE, ``Region.valid`` follows from what
        was reported
    """

    def __init__(self, *, features: Feature = _ALL) -> None:
        self._features = features
        self._receiver, self._sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rings = False
        self._lock = threading.RLock()
        self._page = memoryview(bytearray(8)).cast("Q")
        # A state word for each region that ever was.
        self._words: list[int] = []
        self._watched: dict[int, _Watched] = {}
        # Cookies of regions with a report, in the order in which they will be read.
        self._pending: dict[int, None] = {}
        self._under_way: list[tuple[int, int, int]] = []
        self._last_due = False
        self._ended = False

    # What a test does.

    def invalidate(
        self, start: int, end: int, cause: Cause | None = Cause.UNMAP
    ) -> None:
        """Let something happen to the addresses from start up to but without end.

        :param cause: why; None: it is not known
        :raises InvalidRangeError: unless 0 <= start < end < 2**64
        :raises ClosedError: if the device is closed
        """
        with self.invalidating(start, end, cause):
            pass

    @contextlib.contextmanager
    def invalidating(
        self, start: int, end: int, cause: Cause | None = Cause.UNMAP
    ) -> Iterator[None]:
        """Let it begin, and be over at the end of the block.

        Inside, pages are on their way: regions are busy, and not valid. Blocks may
        overlap in any way.

        Raises what :meth:`invalidate` does.
        """
        start, end = checked_range(start, end)
        flags = 0 if cause is None else cause.value
        flight = (start, end, flags)
        with self._lock:
            self._check_open()
            self._under_way.append(flight)
            self._report(start, end, flags, at_end=False)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.remove(flight)
                if self._receiver >= 0:
                    self._report(start, end, flags, at_end=True)

    def end_process(self) -> None:
        """Let the watched process end: all regions report once more, then all is over.

        :raises ClosedError: if the device is closed
        """
        with self._lock:
            self._check_open()
            if not self._ended:
                self._report(0, 2**64, Cause.END.value, at_end=False)
                for region in self._watched.values():
                    self._words[region.word] |= 1
                self._ended = True
                self._ring()

    # What a notifier needs.

    @property
    def backend(self) -> str:
        """The string "fake"."""
        return "fake"

    @property
    def features(self) -> Feature:
        """What it can do."""
        return self._features

    @property
    def page(self) -> Page:
        """Item 0 is the generation, ValueError once closed."""
        return self._page

    @property
    def generation(self) -> int:
        """The number of invalidations of any region.

        :raises ClosedError: if the device is closed
        """
        try:
            return self._page[0]
        except ValueError:
            raise ClosedError("the device was closed") from None

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to read.

        :raises ClosedError: if the device is closed
        """
        self._check_open()
        return self._receiver

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: Cause | None = None,
        once: bool = False,
    ) -> None:
        """Watch the addresses, as ``Device.register()`` does, and raise what that does.

        :raises UnsupportedFeatureError: if the features do not allow it
        """
        start, end = checked_range(start, end)
        cookie = checked_cookie(cookie)
        wanted = wanted_causes(causes)
        both = Cause.UNMAP.value | Cause.MOVE.value
        if wanted & both:
            wanted |= both
        with self._lock:
            self._check_open()
            if (wanted and Feature.FILTER not in self._features) or (
                once and Feature.ONCE not in self._features
            ):
                raise UnsupportedFeatureError(
                    errno.EOPNOTSUPP, f"this device has {self._features!r} only"
                )
            if self._ended:
                raise ProcessGoneError(errno.ESRCH, "the watched process has ended")
            if cookie in self._watched:
                raise DuplicateCookieError(
                    f"cookie {cookie} names a region of this device already: "
                    "unregister that one first, or choose another"
                )
            region = _Watched(start, end, wanted, once, len(self._words))
            self._words.append(0)
            self._watched[cookie] = region
            self._settle(region)

    def unregister(self, cookie: int) -> None:
        """Stop watching, as ``Device.unregister()`` does, and raise what that does."""
        with self._lock:
            self._check_open()
            self._find(cookie)
            self._remove(cookie)
            if cookie in self._pending:
                del self._pending[cookie]
                # The generation has risen, and only LAST is left to explain it.
                self._last_due |= not self._pending
                self._ring()

    def spent(self, cookie: int) -> bool:
        """Return False: addresses are watched, whatever is mapped there."""
        with self._lock:
            self._check_open()
            self._find(cookie)
        return False

    def rearm(self, cookie: int) -> None:
        """Do nothing: addresses are watched, whatever is mapped there."""
        self.spent(cookie)

    def state(self, cookie: int) -> int | None:
        """Return the region's state; None without STATE.

        :raises UnknownCookieError: if the cookie names no region
        :raises ClosedError: if the device is closed
        """
        with self._lock:
            self._check_open()
            word = self._words[self._find(cookie).word]
        return word if Feature.STATE in self._features else None

    def watch_word(self, cookie: int) -> tuple[Page, int]:
        """Return where the state can be seen, or else the page and 0."""
        with self._lock:
            if Feature.STATE in self._features:
                return self._words, self._find(cookie).word
        return self._page, 0

    def fence(self) -> bool:
        """Return True: changes are counted before the first page goes."""
        self._check_open()
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """Read records, as ``Device.readinto()`` does, and raise what that does."""
        with self._lock, memoryview(buffer) as view, view.cast("B") as data:
            self._check_open()
            room = len(data) // _abi.EVENT.size
            if not room:
                raise InvalidBufferError(
                    f"a record takes {_abi.EVENT.size} bytes, the buffer has less"
                )
            records = [self._take(cookie) for cookie in list(self._pending)[:room]]
            self._last_due |= bool(records)
            if self._last_due and not self._pending and len(records) < room:
                records.append(_abi.EVENT.pack(_abi.LAST, 0, 0, 0, self._page[0]))
                self._last_due = False
            self._ring()
            if not records:
                return 0 if self._ended else None
            size = len(records) * _abi.EVENT.size
            data[:size] = b"".join(records)
            return size

    def close(self) -> None:
        """Release everything; harmless if repeated."""
        with self._lock:
            receiver, self._receiver = self._receiver, -1
            if receiver >= 0:
                self._page.release()
                self._words[:] = [word | 1 for word in self._words]
                os.close(receiver)
                os.close(self._sender)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with {len(self._watched)} regions>"

    def _check_open(self) -> None:
        if self._receiver < 0:
            raise ClosedError("the device was closed")

    def _find(self, cookie: int) -> _Watched:
        try:
            return self._watched[cookie]
        except KeyError:
            raise UnknownCookieError(
                f"cookie {cookie} names no region of this device"
            ) from None

    def _remove(self, cookie: int) -> None:
        region = self._watched.pop(cookie)
        self._words[region.word] = (self._words[region.word] | 1) + 2

    def _is_hit(self, region: _Watched, start: int, end: int, flags: int) -> bool:
        known = flags & ~Cause.FOREIGN.value & ~Cause.END.value
        return (
            region.start < end
            and start < region.end
            and (not region.wanted or not known or bool(region.wanted & known))
        )

    def _settle(self, region: _Watched) -> None:
        """Say whether something is being done to the region now."""
        busy = any(self._is_hit(region, *flight) for flight in self._under_way)
        word = self._words[region.word]
        self._words[region.word] = word | 1 if busy else word & ~1

    def _report(self, start: int, end: int, flags: int, *, at_end: bool) -> None:
        counts = False
        for cookie, region in self._watched.items():
            if not self._is_hit(region, start, end, flags):
                continue
            if not at_end:
                self._words[region.word] = (self._words[region.word] | 1) + 2
            self._settle(region)
            hint = max(start, region.start), min(end, region.end)
            if cookie not in self._pending:
                self._pending[cookie] = None
                region.hint, region.flags, counts = hint, flags, True
            elif not at_end:
                region.hint, counts = None, True
                region.flags |= flags
            elif region.hint is not None and not (
                region.hint[0] <= hint[0] and hint[1] <= region.hint[1]
            ):
                region.hint = None
                region.flags |= flags
        if counts:
            self._page[0] += 1
            self._ring()

    def _take(self, cookie: int) -> bytes:
        """Return the record of a pending report, which is read by that."""
        region = self._watched[cookie]
        del self._pending[cookie]
        flags = region.flags if Feature.CAUSE in self._features else 0
        start, end = region.hint or (region.start, region.end)
        if region.hint is not None:
            flags |= _abi.HINT
        if region.once:
            self._remove(cookie)
        return _abi.EVENT.pack(_abi.INVAL, flags, start, end, cookie)

    def _ring(self) -> None:
        """Have the descriptor be readable while there is something to read."""
        wanted = bool(self._pending) or self._last_due or self._ended
        if wanted and not self._rings:
            os.write(self._sender, b"\0")
        elif self._rings and not wanted:
            os.read(self._receiver, 1)
        self._rings = wanted
