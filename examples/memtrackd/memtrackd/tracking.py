"""What the daemon knows: clients, their regions, and what happened to these.

Nothing here does any input or output, or waits. Everything is bounded: what is kept
of the past per client, and the clients that have ended.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import attrs

import aioummu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from memtrackd.protocol import Update

#: Changes of a client that are remembered for who comes later to look.
HISTORY = 512
#: Regions of a client that are remembered after they were unregistered, so that a
#: report that was on its way then still finds them: more than one message can end.
ENDED_REGIONS = 4096
#: Changes of a client that wait for their region to be announced: what does not fit
#: the socket comes later than it should.
UNKNOWN = 4096
#: Regions that are remembered of a client that has ended: some that have changed.
KEPT_REGIONS = 1000
#: Names of regions that are counted apart for a client; all others are one.
NAMES = 1000
OTHER_NAMES = "(other)"


@lru_cache(maxsize=1024)
def causes_of(flags: int) -> tuple[str, ...]:
    """Return the names of the causes in a record's flags."""
    return tuple(cause.name.lower() for cause in aioummu.cause_of(flags) if cause.name)


class Change(NamedTuple):
    """One report: something happened to a part of a region."""

    time: float
    """When the daemon read it, in seconds since 1970."""
    cookie: int
    start: int
    """Address of the first byte that changed."""
    end: int
    """Address behind the last one."""
    exact: bool
    """One change of these bytes; else several, somewhere in the region."""
    causes: tuple[str, ...]
    """Why, where the backend tells it."""

    def is_among(self, causes: frozenset[str] | None) -> bool:
        """Tell whether it has one of these causes, or none that is known.

        :param causes: None is all
        """
        return causes is None or not self.causes or not causes.isdisjoint(self.causes)


@attrs.define(eq=False)
class TrackedRegion:
    """A range of a client's memory."""

    cookie: int
    name: str
    start: int
    end: int
    since: float
    """When it was announced, in seconds since 1970."""
    ended: float | None = None
    """When it was unregistered, or its client ended."""
    changes: int = 0
    causes: Counter[str] = attrs.field(factory=Counter)
    """How many of the changes had which cause, where the backend tells."""


@attrs.frozen
class Credentials:
    """Who a client is, says the kernel (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int
    user: str
    """The name of the user, or its number."""
    program: str
    """The process's name, proc_pid_comm(5), when it attached; "?" if unknown."""


@attrs.define(eq=False)
class Client:
    """A process that has handed over its notifier."""

    id: int
    name: str
    backend: str
    credentials: Credentials
    since: float
    """When it attached, in seconds since 1970."""
    ended: float | None = None
    """When it left or died."""
    reason: str = ""
    """Why it is not attached any more."""
    generation: int = 0
    """Invalidations of its regions, as it last said."""
    changes: int = 0
    """Reports that were read."""
    unattributed: int = 0
    """Those of them that belong to no region that the daemon ever heard of."""
    unknown: list[tuple[int, tuple[str, ...]]] = attrs.field(factory=list)
    """Cookies and causes of those of which it may yet hear."""
    bytes: int = 0
    """In the regions that are registered now."""
    changes_by_name: Counter[str] = attrs.field(factory=Counter)
    """Reports by the name of the region; they never become less."""
    causes_by_name: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    """Reports by name and cause."""
    regions: dict[int, TrackedRegion] = attrs.field(factory=dict)
    """By cookie."""
    ended_regions: OrderedDict[int, TrackedRegion] = attrs.field(factory=OrderedDict)
    """By cookie; the latest :data:`ENDED_REGIONS`."""
    history: deque[Change] = attrs.field(factory=lambda: deque(maxlen=HISTORY))
    """The latest changes, oldest first."""

    def count(self, region: TrackedRegion, causes: tuple[str, ...]) -> None:
        """Count a change of a region."""
        region.changes += 1
        name = self.counted_name(region)
        self.changes_by_name[name] += 1
        for cause in causes:
            region.causes[cause] += 1
            self.causes_by_name[name, cause] += 1

    def attribute(self) -> None:
        """Count the changes of regions that have become known since."""
        unknown, self.unknown = self.unknown, []
        for cookie, causes in unknown:
            region = self.region(cookie)
            if region is None:
                self.unknown.append((cookie, causes))
            else:
                self.count(region, causes)

    def counted_name(self, region: TrackedRegion) -> str:
        """Return the name under which changes of the region are counted."""
        name = region.name
        if name not in self.changes_by_name and len(self.changes_by_name) >= NAMES:
            return OTHER_NAMES
        return name

    def region(self, cookie: int) -> TrackedRegion | None:
        """Return the region, also if it was unregistered a short while ago."""
        return self.regions.get(cookie) or self.ended_regions.get(cookie)


class Listener(Protocol):
    """Somebody who wants to know; called from the event loop, and must not wait."""

    def attached(self, client: Client) -> None:
        """Say that there is a new client."""
        ...

    def updated(
        self,
        client: Client,
        added: Sequence[TrackedRegion],
        ended: Sequence[TrackedRegion],
    ) -> None:
        """Say that regions came and went."""
        ...

    def changed(self, client: Client, changes: Sequence[Change]) -> None:
        """Say what was read at once; if there is nothing, the generation is news."""
        ...

    def ended(self, client: Client) -> None:
        """Say that a client is not attached any more."""
        ...

    def forgotten(self, client: Client) -> None:
        """Say that nobody will hear of this client again."""
        ...


class TooManyRegionsError(Exception):
    """A client has announced more regions than the daemon keeps for one."""


class Tracking:
    """All clients, those that are attached and those that ended a while ago.

    Synchronization: for the event loop's thread only.

    :param keep_ended: how many clients are remembered after they have ended
    :param region_limit: the most regions of a client
    :param total_limit: the most regions of all clients
    :param broken: told of a listener that raised something; it is not told any more
    """

    def __init__(
        self,
        *,
        keep_ended: int = 100,
        region_limit: int = 1 << 16,
        total_limit: int = 1 << 20,
        broken: Callable[[Listener, Exception], None] | None = None,
    ) -> None:
        self.keep_ended = keep_ended
        self.region_limit = region_limit
        self.total_limit = total_limit
        self.broken = broken
        self.regions = 0
        """Regions of all attached clients."""
        self.clients: dict[int, Client] = {}
        """By number: the attached ones, and the latest that ended."""
        self.attached_total = 0
        """Clients that ever attached."""
        self.changes_total = 0
        """Reports that were read, of all clients that there ever were."""
        self._ids = itertools.count(1)
        self._ended: deque[Client] = deque()
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Tell this listener about everything from now on."""
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Tell it no more."""
        self._listeners.remove(listener)

    @property
    def attached(self) -> Iterator[Client]:
        """The clients that are attached."""
        return (c for c in self.clients.values() if c.ended is None)

    @property
    def attached_count(self) -> int:
        """How many clients are attached."""
        return len(self.clients) - len(self._ended)

    def attach(
        self, name: str, backend: str, credentials: Credentials, time: float
    ) -> Client:
        """Take in a new client."""
        client = Client(next(self._ids), name, backend, credentials, time)
        self.clients[client.id] = client
        self.attached_total += 1
        self._tell(lambda listener: listener.attached(client))
        return client

    def update(self, client: Client, update: Update, time: float) -> None:
        """Change the region table of a client.

        :raises TooManyRegionsError: if it has too many; the table is unchanged then
        """
        known = client.regions
        gone = {cookie for cookie in update.unregister if cookie in known}
        new = sum(e.cookie not in known or e.cookie in gone for e in update.register)
        more = new - len(gone)
        if len(known) + more > self.region_limit:
            raise TooManyRegionsError(
                f"at most {self.region_limit:,} regions for a client"
            )
        if self.regions + more > self.total_limit:
            raise TooManyRegionsError(
                f"at most {self.total_limit:,} regions for all clients together"
            )
        ended = [self._end_region(client, cookie, time) for cookie in gone]
        added: list[TrackedRegion] = []
        for entry in update.register:
            if entry.cookie in known:
                ended.append(self._end_region(client, entry.cookie, time))
            region = TrackedRegion(
                entry.cookie, entry.name, entry.start, entry.end, time
            )
            known[entry.cookie] = region
            client.bytes += region.end - region.start
            added.append(region)
        self.regions += len(added)
        if client.unknown and added:
            client.attribute()
        self._tell(lambda listener: listener.updated(client, added, ended))

    def report(
        self, client: Client, records: Iterable[aioummu.Record], time: float
    ) -> None:
        """Take in what one read of the client's notifier gave."""
        changes: list[Change] = []
        for kind, flags, start, end, number in records:
            if kind == aioummu.LAST:
                client.generation = number
                continue
            causes = causes_of(flags)
            changes.append(
                Change(time, number, start, end, bool(flags & aioummu.HINT), causes)
            )
            region = client.region(number)
            if region is not None:
                client.count(region, causes)
            elif len(client.unknown) < UNKNOWN:
                client.unknown.append((number, causes))
            else:
                client.unattributed += 1
        client.changes += len(changes)
        self.changes_total += len(changes)
        client.history.extend(changes)
        self._tell(lambda listener: listener.changed(client, changes))

    def end(self, client: Client, reason: str, time: float) -> None:
        """Note that a client has left; harmless if repeated."""
        if client.ended is not None:
            return
        client.ended, client.reason = time, reason
        client.unattributed += len(client.unknown)
        client.unknown.clear()
        self.regions -= len(client.regions)
        for region in client.regions.values():
            region.ended = time
        # What is of interest yet; a hundred clients can have millions.
        changed = (r for r in client.regions.values() if r.changes)
        kept = itertools.islice(changed, KEPT_REGIONS)
        client.regions = {region.cookie: region for region in kept}
        client.ended_regions.clear()
        self._tell(lambda listener: listener.ended(client))
        self._ended.append(client)
        self.forget_some()

    def forget_some(self) -> None:
        """Forget the clients beyond :attr:`keep_ended` that ended longest ago."""
        while len(self._ended) > self.keep_ended:
            client = self._ended.popleft()
            del self.clients[client.id]
            self._forget(client)

    def _forget(self, client: Client) -> None:
        self._tell(lambda listener: listener.forgotten(client))

    def _tell(self, what: Callable[[Listener], None]) -> None:
        """Tell every listener; one that fails does not disturb the others."""
        for listener in list(self._listeners):
            try:
                what(listener)
            except Exception as error:
                if self.broken is None:
                    raise
                self._listeners.remove(listener)
                self.broken(listener, error)

    def _end_region(self, client: Client, cookie: int, time: float) -> TrackedRegion:
        region = client.regions.pop(cookie)
        region.ended = time
        self.regions -= 1
        client.bytes -= region.end - region.start
        client.ended_regions.pop(cookie, None)
        client.ended_regions[cookie] = region
        if len(client.ended_regions) > ENDED_REGIONS:
            client.ended_regions.popitem(last=False)
        return region
