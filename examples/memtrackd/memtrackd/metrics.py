"""Metrics for Prometheus, made when somebody asks for them.

Counting costs the event path nothing: the state of the tracking is the counters.
Regions of a client with the same name are one series.

The series of regions, of which there can be tens of thousands, are written here, in
the format of generate_latest(): that takes eight times as long for them, and holds
the GIL while there are events to be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from anyio import lowlevel, to_thread
from prometheus_client import (
    CollectorRegistry,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from memtrackd.tracking import Client, Tracking

_MICROSECONDS = 1_000_000
_DELIVERY_BUCKETS = tuple(
    n / _MICROSECONDS
    for n in (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 100_000)
)
_CANARY_BUCKETS = tuple(
    n / _MICROSECONDS
    for n in (50, 100, 250, 500, 1000, 2500, 5000, 10_000, 100_000, 1_000_000)
)


class _ClientRow(NamedTuple):
    """What the series of one client are made of."""

    labels: tuple[str, str, str, str]
    regions: int
    generation: int
    unattributed: int
    changes: Counter[str]
    causes: Counter[tuple[str, str]]


class Metrics:
    """All metrics of the daemon.

    :param tracking: whose state they show
    :param refused: clients that were sent away, by reason
    :param dropped: what outputs have lost, by output
    """

    def __init__(
        self,
        tracking: Tracking,
        refused: Mapping[str, int],
        dropped: Mapping[str, Callable[[], int]],
    ) -> None:
        self._tracking = tracking
        self._refused = refused
        self._dropped = dropped
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        delivery = Histogram(
            "memtrackd_delivery_seconds",
            "From the read of a notifier until all outputs have what it gave",
            buckets=_DELIVERY_BUCKETS,
            registry=self._registry,
        )
        self.delivered = delivery.observe
        """To be told how long the outputs took, in seconds."""
        self._canary = Histogram(
            "memtrackd_canary_seconds",
            "From munmap() of a page of the daemon's own to its event",
            ["backend"],
            buckets=_CANARY_BUCKETS,
            registry=self._registry,
        )

    def canary_sang(self, backend: str, seconds: float) -> None:
        """Note how long the daemon's own event took."""
        self._canary.labels(backend).observe(seconds)

    async def render(self) -> bytes:
        """Return the text that Prometheus reads.

        The text of tens of thousands of regions takes a while: a thread makes it,
        of what is the state now.
        """
        families = list(self._summary())
        rows = []
        # Those that have ended as well: somebody may not have asked since then.
        for client in list(self._tracking.clients.values()):
            rows.append(_row(client))
            # Events of others come in between.
            await lowlevel.checkpoint()
        return await to_thread.run_sync(self._encode, families, rows)

    def _encode(self, families: list[Metric], rows: list[_ClientRow]) -> bytes:
        collected = [*self._registry.collect(), *families, *_of_clients(rows)]
        lines = "".join(_of_regions(rows))
        return generate_latest(_Collected(collected)) + lines.encode()

    def _summary(self) -> Iterator[Metric]:
        tracking = self._tracking
        yield GaugeMetricFamily(
            "memtrackd_clients", "Attached clients", tracking.attached_count
        )
        yield CounterMetricFamily(
            "memtrackd_clients_attached",
            "Clients that ever attached",
            tracking.attached_total,
        )
        yield CounterMetricFamily(
            "memtrackd_all_changes",
            "Reports that were read, also of clients that have ended since",
            tracking.changes_total,
        )
        refused = CounterMetricFamily(
            "memtrackd_refused", "Clients that were sent away", labels=["reason"]
        )
        for reason, count in self._refused.items():
            refused.add_metric([reason], count)
        yield refused
        dropped = CounterMetricFamily(
            "memtrackd_dropped",
            "Lines or messages that came faster than they could be written",
            labels=["output"],
        )
        for output, lost in self._dropped.items():
            dropped.add_metric([output], lost())
        yield dropped


class _Collected(CollectorRegistry):
    """Metrics that were collected already."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _row(client: Client) -> _ClientRow:
    """Copy what a thread may read."""
    labels = (
        client.name,
        str(client.credentials.pid),
        str(client.id),
        client.backend,
    )
    return _ClientRow(
        labels,
        0 if client.ended else len(client.regions),
        client.generation,
        client.unattributed,
        client.changes_by_name.copy(),
        client.causes_by_name.copy(),
    )


_OF_CLIENT = ("client", "pid", "id", "backend")


def _of_clients(rows: list[_ClientRow]) -> Iterator[Metric]:
    regions = GaugeMetricFamily(
        "memtrackd_regions", "Registered regions", labels=_OF_CLIENT
    )
    generation = GaugeMetricFamily(
        "memtrackd_generation", "Invalidations, as last told", labels=_OF_CLIENT
    )
    unattributed = CounterMetricFamily(
        "memtrackd_unattributed_changes",
        "Reports that belong to no region that the daemon was told of",
        labels=_OF_CLIENT,
    )
    for row in rows:
        regions.add_metric(row.labels, row.regions)
        generation.add_metric(row.labels, row.generation)
        unattributed.add_metric(row.labels, row.unattributed)
    yield from (regions, generation, unattributed)


def _of_regions(rows: list[_ClientRow]) -> Iterator[str]:
    """Return text, see at the top."""
    labels = [
        ",".join(
            f'{label}="{_escaped(value)}"'
            for label, value in zip(_OF_CLIENT, row.labels, strict=True)
        )
        for row in rows
    ]
    name = "memtrackd_changes_total"
    yield f"# HELP {name} Reports, by region\n# TYPE {name} counter\n"
    for row, client in zip(rows, labels, strict=True):
        for region, count in row.changes.items():
            yield f'{name}{{{client},region="{_escaped(region)}"}} {count}\n'
    name = "memtrackd_changes_by_cause_total"
    yield (
        f"# HELP {name} Reports by cause, where that is told; one report can have "
        f"several\n# TYPE {name} counter\n"
    )
    for row, client in zip(rows, labels, strict=True):
        for (region, cause), count in row.causes.items():
            yield (
                f'{name}{{{client},region="{_escaped(region)}",cause="{cause}"}} '
                f"{count}\n"
            )


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
