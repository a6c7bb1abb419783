"""Tell what is open that this process is now a forked child.

A child's copy of the device still watches the memory of its parent, and shares
the parent's queue of reports and file status flags.  So in the child, everything
is made unusable before any other code runs; checking costs nothing elsewhere.
"""

import os
from typing import Protocol
from weakref import WeakSet


class _Tracked(Protocol):
    def _after_fork_in_child(self) -> None: ...


_tracked: WeakSet[_Tracked] = WeakSet()


def track(thing: _Tracked) -> None:
    """Call ``thing._after_fork_in_child()`` in each child forked from now on."""
    _tracked.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_tracked):
        thing._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
