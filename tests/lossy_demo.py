"""Runs the demo on a device that loses something: python -m tests.lossy_demo WHAT."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aioummu
from tests.memory import PAGE
from tests.pipe_device import RECORD

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from _typeshed import WriteableBuffer

    from aioummu import Record

    Loss: TypeAlias = Callable[[int, Record], Record | None]

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_demo() -> Any:  # noqa: ANN401  (a module that only the interpreter finds)
    """Import what is a script, and no part of a package."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("demo")
    finally:
        sys.path.remove(str(EXAMPLES))


def nothing(_number: int, record: Record) -> Record:
    return record


def a_report(number: int, record: Record) -> Record | None:
    """Lose the third report."""
    return None if record[0] == aioummu.INVAL and number == 2 else record


def all_reports(_number: int, record: Record) -> Record | None:
    return None if record[0] == aioummu.INVAL else record


def a_page(number: int, record: Record) -> Record:
    """Lose the last page of the second report."""
    kind, flags, start, end, value = record
    if kind == aioummu.INVAL and number == 1:
        return kind, flags, start, end - PAGE, value
    return record


def an_end(number: int, record: Record) -> Record | None:
    """Lose the first LAST, the record behind the first report."""
    return None if record[0] == aioummu.LAST and number == 1 else record


LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (nothing, a_report, all_reports, a_page, an_end)
}


class LossyDevice(aioummu.EmbeddedDevice):
    """An embedded device between whose reading and its reader something is lost.

    The loss is asked about each record, with the number of reports before it.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self._loss = loss
        self._reports = 0

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        size = super().readinto(buffer)
        if size is None:
            return None
        view = memoryview(buffer).cast("B")
        kept = b"".join(map(self._kept, aioummu.unpack(view[:size])))
        view[: len(kept)] = kept
        return len(kept) or None

    def _kept(self, record: Record) -> bytes:
        kept = self._loss(self._reports, record)
        self._reports += record[0] == aioummu.INVAL
        return RECORD.pack(*kept) if kept else b""


class BlindDevice(aioummu.EmbeddedDevice):
    """An embedded device by which nothing ever changes."""

    @property
    def page(self) -> memoryview:
        return memoryview(bytes(8)).cast("Q")

    @property
    def generation(self) -> int:
        return 0


if __name__ == "__main__":
    what = sys.argv.pop()
    demo = load_demo()
    if what == "an_end":
        # So long does it wait.
        demo.PATIENCE = 0.5
    sys.exit(
        demo.main(BlindDevice() if what == "any_change" else LossyDevice(LOSSES[what]))
    )
