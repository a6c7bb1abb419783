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
import resource
import socket
import threading
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Threads that close what strangers have sent, at most: that many can hang.
THREADS = 64
#: Users whose names are remembered.
USERS = 1000
#: Descriptors that the daemon keeps for itself.
RESERVE = 128
#: Hundredths of a second that a client waits for the name of its user.
PATIENCE = 20


class Closer:
    """Closes descriptors, elsewhere.

    Synchronization: any thread may call anything; nothing waits.
    """

    def __init__(self) -> None:
        self._limit = _raise_limit()
        self._lock = threading.Lock()
        self._asked = 0
        self._closed = 0
        self._of_strangers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._of_ours: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads = 0
        self._start(self._of_ours)

    def has_room_for(self, descriptors: int, in_use: int) -> bool:
        """Tell whether so many could be received now.

        Of those for which there is no room the kernel closes what was sent, in the
        thread that receives.

        :param in_use: descriptors that the caller has
        """
        waiting = self._asked - self._closed
        return waiting + in_use + descriptors + RESERVE <= self._limit

    def close(self, descriptors: Iterable[int]) -> None:
        """Close what a stranger has sent, some time."""
        for fd in descriptors:
            self._put(self._of_strangers, fd)
            if self._threads < min(self._asked - self._closed, THREADS):
                self._threads += 1
                self._start(self._of_strangers)

    def hang_up(self, connection: socket.socket) -> None:
        """Close a connection in which something unread of a stranger may be."""
        # The other side sees the end at once, and sends no more.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        try:
            is_empty = not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            is_empty = True
        if is_empty:
            connection.close()
        else:
            self.close([connection.detach()])

    def close_own(self, fd: int) -> None:
        """Close something that takes long, but not as long as others like."""
        self._put(self._of_ours, fd)

    def _put(self, descriptors: queue.SimpleQueue[int], fd: int) -> None:
        with self._lock:
            self._asked += 1
        descriptors.put(fd)

    def _start(self, descriptors: queue.SimpleQueue[int]) -> None:
        threading.Thread(
            target=self._run, args=(descriptors,), name="closer", daemon=True
        ).start()

    def _run(self, descriptors: queue.SimpleQueue[int]) -> None:
        while True:
            with contextlib.suppress(OSError):
                os.close(descriptors.get())
            with self._lock:
                self._closed += 1


def _raise_limit() -> int:
    """Take as many descriptors as this process may have, and return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


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
            if len(self._names) > USERS:
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
