"""Processes that have copies of the descriptors, or share the memory."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from aioummu import EmbeddedDevice
from tests.hangs import heap
from tests.hangs.child import (
    Changing,
    Meanwhile,
    attempt,
    exit_status,
    fork,
    native,
    open_notifier,
    reports,
    say,
    until,
    uses,
)
from tests.memory import Pages

_TRUE = "/bin/true"


def storm(how: str) -> dict[str, Any]:
    """Make children in two threads, while others change watched memory."""
    statuses: list[int] = []
    with closing(open_notifier()) as notifier:

        def use() -> None:
            assert attempt(lambda: notifier.generation) == "ForkedError"
            with closing(open_notifier()) as own:
                assert reports(own) == ["Inval", "Last"]

        def make_child() -> None:
            match how:
                case "fork":
                    # Some end before they have done anything.
                    child = fork(use if len(statuses) % 3 else lambda: None)
                    status = exit_status(child)
                case "posix_spawn":
                    status = exit_status(os.posix_spawn(_TRUE, [_TRUE], os.environ))
                case _:
                    status = subprocess.run([_TRUE], check=False).returncode
            statuses.append(status)

        for _ in range(3):
            fork(signal.pause)
        changes = [partial(Changing().watch_and_change, notifier) for _ in range(2)]
        with Meanwhile(make_child, *changes) as others:
            while not others.each_has_done(30):
                make_child()
        return {"statuses": sorted(set(statuses)), "reported": reports(notifier)}


def use_in_a_child(how: str) -> dict[str, Any]:
    """Do in a child what can be done with a notifier, and without."""
    with (
        closing(open_notifier()) as notifier,
        closing(open_notifier()) as fresh,
        Pages(1) as pages,
    ):
        region = notifier.register(pages.start, pages.end)
        # What is known from now on, the child must not rely on.
        assert not notifier.changed

        def use() -> None:
            for name, use in uses(notifier, region).items():
                say(**{name: attempt(use)})
            say(fresh=attempt(lambda: fresh.changed))
            notifier.close()
            say(opened=attempt(lambda: EmbeddedDevice().close()))

        child = fork(use, behind_the_back=how == "behind the back")
        return {"status": exit_status(child), "reported": reports(notifier)}


def copy_that_outlives_the_notifier(how: str) -> dict[str, Any]:
    """Close while a child has copies of all descriptors, then change memory."""
    blocks, others = heap.blocks_with_holes(), [Pages(4) for _ in range(100)]
    with closing(open_notifier()) as notifier:
        notifier.register(*heap.span(blocks))
        for pages in others:
            notifier.register(pages.start, pages.end)
        others.pop().munmap()
        is_there, says_so = os.pipe()

        def stay() -> None:
            os.close(says_so)
            signal.pause()

        child = fork(stay, behind_the_back=how == "behind the back")
        os.close(says_so)
        os.read(is_there, 1)
        say(copies=_userfaultfds_of(child))
        others.pop().move_to(others[0])
    for pages in others:
        pages.munmap()
    heap.trim()
    with closing(open_notifier()) as notifier:
        reported = reports(notifier)
    return {"reported": reported, "ended": os.waitpid(child, os.WNOHANG)[0]}


def _userfaultfds_of(process: int) -> int:
    files = Path(f"/proc/{process}/fd").iterdir()
    return sum("userfaultfd" in str(file.readlink()) for file in files)


def vfork() -> dict[str, Any]:
    """Change memory while a child shares it, which ends only afterwards."""
    with closing(open_notifier()) as notifier:
        thread = threading.Thread(
            target=lambda: say(status=native().vfork_and_wait(_TRUE.encode()))
        )
        thread.start()
        until(native().is_vforked_child_there)
        missed = sum(reports(notifier) != ["Inval", "Last"] for _ in range(1000))
        native().let_vforked_child_go_on()
        thread.join()
    return {"missed": missed}
