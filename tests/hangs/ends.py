"""The process ends, or becomes another, or has more than one interpreter."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import sys
import threading
from contextlib import closing
from importlib import import_module
from typing import Any

import aioummu
from tests.hangs.child import (
    Changing,
    exit_status,
    native,
    open_notifier,
    reports,
    say,
    until,
)
from tests.memory import Pages


def at_work() -> aioummu.Notifier:
    """Return a notifier with events pending, of which there will be more.

    Threads that end with the process keep changing what it watches, some of them
    without ever running Python.
    """
    notifier = open_notifier()
    rounds = [0, 0]

    def keep_changing(number: int) -> None:
        memory = Changing()
        while True:
            memory.watch_and_change(notifier)
            rounds[number] += 1

    def keep_dropping() -> None:
        pages = Pages(4)
        notifier.register(pages.start, pages.end)
        while True:
            native().drop_pages(pages.start, pages.size, 1000)

    for number in range(len(rounds)):
        threading.Thread(target=keep_changing, args=[number], daemon=True).start()
    threading.Thread(target=keep_dropping, daemon=True).start()
    until(lambda: min(rounds) > 10 and notifier.generation > 1000)
    return notifier


def end(how: str) -> dict[str, Any]:
    """End in one of many ways."""
    notifier = at_work()
    say(pending=notifier.changed)
    match how:
        case "exec":
            facts = json.dumps({"replaced": True})
            os.execv("/bin/echo", ["echo", facts])
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(4)
        case "os.abort":
            os.abort()
        case "exit in a loop":
            asyncio.run(_exit_in_a_loop())
        case "exit in a child":
            # In a child, Python would wait for the thread of this for ever.
            faulthandler.cancel_dump_traceback_later()
            child = os.fork()
            if not child:
                sys.exit(6)
            say(child=exit_status(child))
    # At the end of the interpreter, it is still open.
    return {"returned": bool(notifier)}


async def _exit_in_a_loop() -> None:
    async with (
        aioummu.open_notifier(backend="embedded") as notifier,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(_wait_for(notifier))
        await asyncio.sleep(0)
        sys.exit(5)


async def _wait_for(notifier: aioummu.Notifier) -> None:
    await anext(notifier)


_IN_A_SUBINTERPRETER = """
import json, os

def open():
    import aioummu
    aioummu.open_device("embedded")

try:
    open()
    outcome = "opened"
except Exception as error:
    outcome = type(error).__name__
os.write(1, (json.dumps({"outcome": outcome}) + "\\n").encode())
"""


def subinterpreters() -> dict[str, Any]:
    """Try to open the backend in other interpreters of the process."""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    interpreters = import_module(name)
    with closing(open_notifier()) as notifier:
        before = reports(notifier)
        for _ in range(3):
            interpreter = interpreters.create()
            interpreters.run_string(interpreter, _IN_A_SUBINTERPRETER)
            interpreters.destroy(interpreter)
        return {"before": before, "after": reports(notifier)}
