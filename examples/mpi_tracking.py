"""A parallel computation whose ranks are tracked by their node's memtrackd.

::

    memtrackd &
    mpirun -n 4 python examples/mpi_tracking.py

The ranks share a plate that is warm at its upper edge, and compute how the warmth
spreads (Jacobi's method): each has some rows, and asks its neighbours for the rows
beside its own ("halo") in each step. Buffers for messages are what a network adapter
would have registered, and what MPI libraries cache the registration of. Here they are
freed and allocated again now and then, as programs do; the daemon shows each of them
by name, and when it was unmapped. The computation does not depend on the daemon.

Needs mpi4py, an MPI library, numpy, and memtrackd.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import memtrackd
import numpy as np
from mpi4py import MPI

import aioummu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float64]

UP, DOWN = 1, 2


@attrs.define
class Arrays:
    """Arrays with a mapping of their own each, tracked by name."""

    tracker: memtrackd.Tracker | None
    registered: int = 0
    _regions: list[memtrackd.Region] = attrs.field(factory=list)
    _retired: list[memtrackd.Region] = attrs.field(factory=list)

    def zeros(self, name: str, *shape: int) -> Array:
        """Return a new array, which is unmapped when nobody has it any more."""
        size = int(np.prod(shape)) * np.float64().itemsize
        array = np.frombuffer(mmap.mmap(-1, size), np.float64).reshape(shape)
        if self.tracker is not None:
            self._regions.append(self.tracker.register(array.data, name))
            self.registered += 1
        return array

    def retire(self) -> None:
        """Note that all arrays were freed.

        A report that the daemon has not read yet would go with its region. So the
        regions are kept for a step.
        """
        self._retired += self._regions
        self._regions = []

    def forget_retired(self) -> None:
        """Have those tracked no more that were freed before."""
        while self._retired:
            self._retired.pop().close()


@attrs.define
class Messages:
    """What one rank sends to its neighbours, and gets from them."""

    send_up: Array
    send_down: Array
    halo_above: Array
    halo_below: Array

    @classmethod
    def allocate(cls, arrays: Arrays, columns: int) -> Messages:
        """Return buffers for rows of so many columns."""
        return cls(
            arrays.zeros("send buffer up", columns),
            arrays.zeros("send buffer down", columns),
            arrays.zeros("halo above", columns),
            arrays.zeros("halo below", columns),
        )

    def exchange(self, plate: Array, communicator: MPI.Intracomm) -> None:
        """Send the outer rows of this rank; at an edge of the plate, nowhere."""
        rank, size = communicator.rank, communicator.size
        above = rank - 1 if rank else MPI.PROC_NULL
        below = rank + 1 if rank + 1 < size else MPI.PROC_NULL
        self.send_up[:] = plate[0]
        self.send_down[:] = plate[-1]
        MPI.Request.Waitall(
            [
                communicator.Irecv(self.halo_above, above, DOWN),
                communicator.Irecv(self.halo_below, below, UP),
                communicator.Isend(self.send_up, above, UP),
                communicator.Isend(self.send_down, below, DOWN),
            ]
        )


def step(plate: Array, above: Array, below: Array) -> Array:
    """Return the plate after one step; its left and right edges stay cold."""
    around = np.vstack([above, plate, below])
    after = np.zeros_like(plate)
    after[:, 1:-1] = 0.25 * (
        around[:-2, 1:-1] + around[2:, 1:-1] + plate[:, :-2] + plate[:, 2:]
    )
    return after


def warm(columns: int) -> Array:
    """Return what is beyond the upper edge."""
    return np.linspace(0.0, 100.0, columns)


def compute(
    communicator: MPI.Intracomm, arrays: Arrays, options: argparse.Namespace
) -> tuple[Array, float]:
    """Return this rank's rows, and how much they changed last on any rank."""
    columns = options.columns
    plate = arrays.zeros("plate", options.rows, columns)
    messages = Messages.allocate(arrays, columns)
    change = arrays.zeros("change", 1)
    for number in range(options.steps):
        if number and number % options.renew == 0:
            # As programs that balance their load: everything somewhere else.
            rows = plate.copy()
            del plate, messages, change
            arrays.retire()
            plate = arrays.zeros("plate", options.rows, columns)
            plate[:] = rows
            messages = Messages.allocate(arrays, columns)
            change = arrays.zeros("change", 1)
        messages.exchange(plate, communicator)
        arrays.forget_retired()
        if communicator.rank == 0:
            messages.halo_above[:] = warm(columns)
        after = step(plate, messages.halo_above, messages.halo_below)
        change[0] = np.abs(after - plate).max()
        communicator.Allreduce(MPI.IN_PLACE, change, MPI.MAX)
        plate[:] = after
    return plate.copy(), float(change[0])


def compute_alone(rows: int, options: argparse.Namespace) -> Array:
    """Return the whole plate, without neighbours."""
    plate = np.zeros((rows, options.columns))
    for _ in range(options.steps):
        plate = step(plate, warm(options.columns), np.zeros(options.columns))
    return plate


def attach(rank: int) -> tuple[memtrackd.Tracker | None, str]:
    """Return the tracker, or None and why."""
    try:
        tracker = memtrackd.attach(f"{Path(__file__).name} rank {rank}")
    except (memtrackd.AttachError, aioummu.UmmunotifyError) as error:
        return None, str(error)
    return tracker, ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A computation that is tracked.")
    parser.add_argument("--rows", type=int, default=256, help="of each rank")
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--renew", type=int, default=20, metavar="STEPS")
    return parser.parse_args()


def verify(communicator: MPI.Intracomm, rows: Array, options: Any) -> bool:  # noqa: ANN401
    """Compare with what one process computes; on the first rank, to the last bit."""
    whole = np.empty((communicator.size * options.rows, options.columns))
    communicator.Gather(rows, whole if communicator.rank == 0 else None)
    right = communicator.rank != 0 or np.array_equal(
        whole, compute_alone(len(whole), options)
    )
    return bool(communicator.bcast(right))


def main() -> int:
    options = parse()
    communicator = MPI.COMM_WORLD
    rank = communicator.rank
    with ExitStack() as stack:
        tracker, why = attach(rank)
        if tracker is not None:
            stack.enter_context(tracker)
        arrays = Arrays(tracker)
        rows, change = compute(communicator, arrays, options)
        right = verify(communicator, rows, options)
        attached = tracker is not None and tracker.attached
        state = f"{arrays.registered} regions registered" if attached else "not tracked"
        lines = communicator.gather(
            f"rank {rank} on {MPI.Get_processor_name()}, pid {os.getpid()}: {state}"
            + (f": {why}" if why else "")
        )
    if lines is not None:
        print(*lines, sep="\n")
        print(
            f"{communicator.size} ranks, {options.steps} steps, last change "
            f"{change:.6f}: result {'verified' if right else 'WRONG'}"
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
