"""What a service says to systemd, and gets from it: sd_notify(3), sd_listen_fds(3)."""

from __future__ import annotations

import contextlib
import os
import socket


class Supervisor:
    """The service manager, if the process has one.

    Takes its variables out of the environment, so that no child takes itself for
    the service.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        is_for_us = not pid or pid == str(os.getpid())
        self.watchdog: float | None = (
            int(watchdog) / 1e6 if watchdog.isdigit() and is_for_us else None
        )
        """Seconds within which it wants to hear of us, if it does."""

    def notify(self, *lines: str, patience: float = 0.0) -> None:
        """Tell it, ``READY=1`` for example; never fails.

        :param patience: seconds to wait while it is busy
        """
        if not self._address:
            return
        # A name in the abstract namespace is written with a "@" there.
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_UNIX, kind) as connection:
            try:
                connection.settimeout(patience)
                connection.sendto("\n".join(lines).encode(), address)
            except OSError:
                pass


def activated_sockets() -> dict[str, list[socket.socket]]:
    """Return the sockets that the service manager has opened, by their names.

    They are taken out of the environment, and not inherited by children.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    sockets: dict[str, list[socket.socket]] = {}
    if pid != str(os.getpid()) or not count.isdigit():
        return sockets
    for i in range(int(count)):
        fd = 3 + i
        os.set_inheritable(fd, False)
        name = names[i] if i < len(names) else "unknown"
        with contextlib.suppress(OSError):  # it is something else
            sockets.setdefault(name, []).append(socket.socket(fileno=fd))
    return sockets
