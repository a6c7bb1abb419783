"""Threads for what can take as long as somebody else likes.

Closing a descriptor that a stranger has sent is such a thing: a socket can linger, a
file system can be his own. So is asking who a user is, of a server somewhere.

The threads are daemonic: whatever hangs in there, the process can end.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import queue
import threading
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

#: Threads that close.
THREADS = 4
#: Things to be closed; beyond that, nobody is let in any more.
BACKLOG = 1000
#: Hundredths of a second that a client waits for the name of its user.
PATIENCE = 20


class Closer:
    """Closes descriptors and connections, elsewhere.

    Synchronization: any thread may call anything; nothing waits.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for number in range(THREADS):
            name = f"closer {number}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def is_stuck(self) -> bool:
        """Whether so much waits to be closed that no more can be taken."""
        return self._queue.qsize() > BACKLOG

    def close(self, descriptors: Iterable[int]) -> None:
        """Close descriptors, some time."""
        for fd in descriptors:
            self._queue.put(lambda fd=fd: os.close(fd))  # type: ignore[misc]

    def hang_up(self, connection: socket.socket) -> None:
        """Close a connection, some time, with what is unread in it."""
        # The other side sees the end at once.
        with contextlib.suppress(OSError):
            connection.shutdown(2)
        self._queue.put(connection.close)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._queue.get()()


class UserNames:
    """What users are called.

    Synchronization: for the event loop's thread only; nothing waits.
    """

    def __init__(self) -> None:
        self._names: dict[int, str | None] = {}
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="users", daemon=True).start()

    async def name_of(self, uid: int) -> str:
        """Return the name; or the number, if it does not become known soon."""
        if uid not in self._names:
            if len(self._names) > BACKLOG:
                self._names.clear()
            self._names[uid] = None
            self._queue.put(uid)
        for _ in range(PATIENCE):
            if name := self._names.get(uid):
                return name
            await anyio.sleep(0.01)
        return str(uid)

    def _run(self) -> None:
        while True:
            uid = self._queue.get()
            name = str(uid)
            with contextlib.suppress(KeyError, OSError):
                name = printable(pwd.getpwuid(uid).pw_name)
            self._names[uid] = name


def printable(text: str) -> str:
    """Return text that terminals and logs can take."""
    return "".join(c if c.isprintable() else "?" for c in text)
