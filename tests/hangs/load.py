"""Nobody reads what is reported, while a lot is; or the process is stopped."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from contextlib import ExitStack, closing
from typing import Any

import aioummu
from aioummu import Inval
from tests.hangs.child import (
    Changing,
    Meanwhile,
    native,
    open_files,
    open_notifier,
    reports,
    resident_size,
)
from tests.hangs.closing import SLACK, everything_is_given_back
from tests.memory import Pages
from tests.pipe_device import drain


def _described(events: list[aioummu.Event]) -> list[object]:
    """Return whether a report is exact, and the generation of a LAST."""
    return [e.exact if isinstance(e, Inval) else e.generation for e in events]


def blocked_loop() -> dict[str, Any]:
    """Block the event loop that is to iterate, during 100,000 changes."""
    return asyncio.run(_block_the_loop())


async def _block_the_loop() -> dict[str, Any]:
    async with aioummu.open_notifier(backend="embedded") as notifier:
        pages = Pages(4)
        notifier.register(pages.start, pages.end)
        drop = threading.Thread(
            target=native().drop_pages, args=[pages.start, pages.size, 50_000]
        )
        files, size = open_files(), resident_size()
        drop.start()
        assert native().drop_pages(pages.start, pages.size, 50_000) == 50_000
        while drop.is_alive():
            time.sleep(0.01)  # noqa: ASYNC251 - that is what it is about
        return {
            "files": open_files() - files,
            "grown": resident_size() - size > SLACK,
            "events": _described([await anext(notifier), await anext(notifier)]),
            "left": len(notifier.read_nowait()),
        }


def many_notifiers() -> dict[str, Any]:
    """Let 200 notifiers fall behind, then read them."""
    with everything_is_given_back(), ExitStack() as stack:
        notifiers = [stack.enter_context(closing(open_notifier())) for _ in range(200)]
        pages = Pages(4)
        for notifier in notifiers:
            notifier.register(pages.start, pages.end)
        native().drop_pages(pages.start, pages.size, 1000)
        events = {tuple(_described(drain(notifier))) for notifier in notifiers}
        return {"events": sorted(events)}


def stopped() -> dict[str, Any]:
    """Stop the process and let it go on, while its threads change memory."""
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do kill -STOP $1; kill -CONT $1; done"
    command = ["/bin/sh", "-c", script, "sh", str(os.getpid())]
    with closing(open_notifier()) as notifier:
        changing = [Changing() for _ in range(2)]

        def change(memory: Changing) -> None:
            memory.watch_and_change(notifier)

        with Meanwhile(*(lambda m=m: change(m) for m in changing)) as others:
            for _ in range(5):
                assert subprocess.run(command, check=False).returncode == 0
            while not others.each_has_done(100):
                notifier.read_nowait()
        return {"reported": reports(notifier)}
