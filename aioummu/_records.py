"""Decoding of what the driver writes: bytes in, events out, no input or output.

A record is 32 bytes: type and flags (32 bits each), the start and the end of
the invalidated range, and the region's cookie or the generation (64 bits each),
in the byte order of the machine.
"""

from __future__ import annotations

import enum
import errno
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, cast

import attrs

from aioummu import _abi
from aioummu._errors import ForeignDeviceError, InvalidCauseError
from aioummu._ummunotify_abi import lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import Buffer

    from aioummu._regions import Region

RECORD_SIZE = _abi.EVENT.size
INVAL = _abi.INVAL
LAST = _abi.LAST
HINT = _abi.HINT

#: type, flags, hint_start, hint_end, user_cookie_counter
Record: TypeAlias = tuple[int, int, int, int, int]


class Feature(enum.Flag):
    """What a device can do beyond reporting that something has changed."""

    CAUSE = lib.UMMUNOTIFY_FEATURE_CAUSE
    """Events say why."""
    FILTER = lib.UMMUNOTIFY_FEATURE_FILTER
    """A region can ask for some causes only."""
    STATE = lib.UMMUNOTIFY_FEATURE_STATE
    """Each region has a state, which says whether it is still what it was."""
    ONCE = lib.UMMUNOTIFY_FEATURE_ONCE
    """A region can end with its first event."""


class Cause(enum.Flag):
    """Why memory was invalidated; the causes of all that one event reports.

    Which system call has which cause on which backend: ``docs/backends.md``.
    """

    UNMAP = lib.UMMUNOTIFY_EVENT_CAUSE_UNMAP
    """Unmapped; on the driver, also moved elsewhere."""
    CLEAR = lib.UMMUNOTIFY_EVENT_CAUSE_CLEAR
    """Pages were taken away or exchanged; the mapping is still there."""
    PROTECT_MAPPING = lib.UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING
    """The protection of a mapping changed, or of pages for NUMA balancing."""
    PROTECT_PAGE = lib.UMMUNOTIFY_EVENT_CAUSE_PROTECT_PAGE
    """The protection of pages changed: fork, copy on write, write-back."""
    SOFT_DIRTY = lib.UMMUNOTIFY_EVENT_CAUSE_SOFT_DIRTY
    """Somebody watches which pages are written to."""
    MIGRATE = lib.UMMUNOTIFY_EVENT_CAUSE_MIGRATE
    """Pages move to or from the memory of a device."""
    EXCLUSIVE = lib.UMMUNOTIFY_EVENT_CAUSE_EXCLUSIVE
    """A device gets pages for its exclusive use."""
    END = lib.UMMUNOTIFY_EVENT_CAUSE_END
    """The process ends, or calls exec."""
    MOVE = lib.UMMUNOTIFY_EVENT_CAUSE_MOVE
    """Moved elsewhere; told by the embedded backend only."""
    FOREIGN = lib.UMMUNOTIFY_EVENT_CAUSE_FOREIGN
    """By another process, or in reclaim; told by the driver only."""


_CAUSES = 0
for _cause in Cause:
    _CAUSES |= _cause.value


@lru_cache(maxsize=1024)
def cause_of(flags: int) -> Cause:
    """Return the causes in a record's flags; none where none is told."""
    return Cause(flags & _CAUSES)


def wanted_causes(causes: Cause | None) -> int:
    """Return the flags of the causes that a region asks for; 0: all.

    :raises InvalidCauseError: if there are none, or one that nobody can ask for
    """
    if causes is None:
        return 0
    if not causes or causes.value & ~lib.UMMUNOTIFY_REGION_CAUSE_MASK:
        raise InvalidCauseError(
            f"a region cannot ask for {causes!r}: name at least one cause and not "
            "FOREIGN, which says by whom and not why; None is for all"
        )
    return causes.value


# No weak references to events: with them, each would be a fifth larger.
@attrs.frozen(weakref_slot=False)
class Inval:
    """Memory of a region was invalidated: unmapped, moved, dropped or protected.

    The region stays registered and reports again.  Several invalidations
    between two reads make one event. Which system call raises it on which kernel
    is a table in the driver's documentation, operations.rst; from Linux 5.10 on.

    Synchronization: immutable, may be shared by threads and tasks.
    """

    region: Region
    """The region that was hit."""
    start: int
    """Address of the first invalidated byte."""
    end: int
    """Address behind the last invalidated byte."""
    exact: bool
    """Whether start and end are the one range that was invalidated (clipped to
    the region); otherwise there were several, and they are the whole region.
    """
    flags: int = attrs.field(default=0, eq=False, repr=False)
    """Those of the record, as in the driver's header."""

    @property
    def cause(self) -> Cause:
        """Why, where the backend tells; of all invalidations since the last read."""
        return cause_of(self.flags)


@attrs.frozen(weakref_slot=False)
class Last:
    """Every invalidation until now has been reported.

    Follows the last pending :class:`Inval`.

    Synchronization: immutable, may be shared by threads and tasks.
    """

    generation: int
    """The number of invalidations at this moment; as long as the device's
    generation equals it, nothing that is registered has changed since.
    """


Event: TypeAlias = Inval | Last


class _Draft:
    """An Inval that is still being filled in.

    Assigning four slots and then the class costs a third of running the
    __init__ of a frozen class, which assigns through object.__setattr__().
    """

    __slots__ = ("end", "exact", "flags", "region", "start")  # those of Inval

    region: Region
    start: int
    end: int
    exact: bool
    flags: int


def unpack(data: Buffer) -> list[Record]:
    """Return the records in *data* as tuples of integers.

    :raises ForeignDeviceError: if *data* does not hold whole records
    """
    return list(_iter_unpack(data))


def decode(data: Buffer, regions: Mapping[int, Region]) -> list[Event]:
    """Return the events in *data*, looking up their regions by cookie.

    A report whose cookie is not in *regions* was overtaken by the region's
    unregistration, and is left out.

    :raises ForeignDeviceError: if *data* does not hold whole, known records
    """
    events: list[Event] = []
    append = events.append
    lookup = regions.get
    for kind, flags, start, end, value in _iter_unpack(data):
        if kind == INVAL:
            region = lookup(value)
            if region is not None:
                draft = _Draft()
                draft.region = region
                draft.start = start
                draft.end = end
                draft.exact = flags & HINT != 0
                draft.flags = flags
                draft.__class__ = Inval  # type: ignore[assignment]
                append(draft)  # type: ignore[arg-type]
        elif kind == LAST:
            append(Last(value))
        else:
            raise _foreign(f"its read() returned a record of unknown type {kind}")
    return events


def as_record(event: Event) -> Record:
    """Return the record that says what the event does."""
    if isinstance(event, Last):
        return LAST, 0, 0, 0, event.generation
    return INVAL, event.flags, event.start, event.end, event.region.cookie


def _iter_unpack(data: Buffer) -> Iterator[Record]:
    try:
        return cast("Iterator[Record]", _abi.EVENT.iter_unpack(data))
    except struct.error:
        raise _foreign("its read() returned a part of a record") from None


def _foreign(fact: str) -> ForeignDeviceError:
    return ForeignDeviceError(
        errno.EPROTO, f"this is not an ummunotify device, or a newer one: {fact}"
    )
