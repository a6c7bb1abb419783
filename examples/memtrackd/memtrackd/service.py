"""The daemon: everything together, from start to end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import ipaddress
import os
import signal
import socket
import stat
import time
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING

import anyio

import aioummu
from memtrackd import canary, web
from memtrackd.config import ConfigError, load_config
from memtrackd.intake import Intake
from memtrackd.logs import LineWriter, LogOutput
from memtrackd.metrics import Metrics
from memtrackd.systemd import Supervisor, activated_sockets
from memtrackd.tracking import Tracking
from memtrackd.view import View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from memtrackd.config import Config, HttpAddress

#: Clients that wait to be accepted.
BACKLOG = 128


class StartError(Exception):
    """The daemon cannot start."""


async def run(config: Config, reload: Callable[[], Config] = load_config) -> None:
    """Be the daemon, until SIGTERM or SIGINT.

    :param reload: gives the configuration again, at SIGHUP
    :raises StartError: if a socket or file cannot be opened
    """
    supervisor = Supervisor()
    _give_way(config.nice)
    async with AsyncExitStack() as stack:
        # First: from here on, a signal is an orderly end.
        signals = stack.enter_context(
            anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        )
        sockets = stack.enter_context(_listening(config))
        writer = _open_writer(config)
        stack.callback(writer.close)
        # Not two of them on one terminal.
        is_drawn_over = config.view and writer.is_terminal
        log = LogOutput(writer, "off" if is_drawn_over else config.log)
        log.causes = config.causes
        tracking = Tracking(
            keep_ended=config.keep_ended,
            region_limit=config.max_regions,
            total_limit=config.max_all_regions,
            broken=lambda listener, error: log.trouble(
                f"{type(listener).__name__} is not told any more: {error!r}"
            ),
        )
        feed = web.Feed(tracking)
        intake = Intake(tracking, log, config.max_clients)
        metrics = Metrics(
            tracking,
            intake.refused,
            {"log": lambda: writer.dropped, "web": lambda: feed.dropped},
        )
        intake.delivered = metrics.delivered
        tracking.listen(log)
        tracking.listen(feed)
        if sockets.http:
            app = web.make_app(
                tracking,
                feed,
                metrics.render,
                loopback_only=all(map(_is_loopback, sockets.http)),
            )
            await stack.enter_async_context(web.serve(app, sockets.http))

        view = View(tracking) if config.view else None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(intake.serve, sockets.clients)
            if config.canary:
                tasks.start_soon(_sing, config.canary, metrics, log)
            if view:
                view.causes = config.causes
                tracking.listen(view)
                tasks.start_soon(_draw, view, log)
            if supervisor.watchdog:
                tasks.start_soon(_keep_alive, supervisor, supervisor.watchdog)
            log.started(socket=str(sockets.path), http=sockets.http_address)
            status = f"STATUS=listening at {sockets.path}"
            supervisor.notify("READY=1", status, patience=1.0)
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                supervisor.notify("RELOADING=1", _monotonic())
                if (news := _reload(reload, log, writer, tracking, intake)) and view:
                    view.causes = news.causes
                supervisor.notify("READY=1", patience=1.0)
            supervisor.notify("STOPPING=1")
            log.ending(signal.Signals(number).name)
            intake.drain()
            tasks.cancel_scope.cancel()


def _give_way(nice: int) -> None:
    """Leave it to clients to use the CPUs first, see nice(7).

    Before there are threads, which take it over. Reports coalesce until they are
    read, so that nothing is missed when the daemon gets to run later.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) < nice:
        # A sandbox may refuse that. Its unit has a Nice= for it.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)


def _monotonic() -> str:
    """Return when that was, as systemd.service(5) wants it of Type=notify-reload."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return f"MONOTONIC_USEC={now // 1000}"


async def _keep_alive(supervisor: Supervisor, within: float) -> None:
    """Tell the service manager that the event loop still turns."""
    while True:
        supervisor.notify("WATCHDOG=1")
        await anyio.sleep(within / 3)


async def _sing(every: float, metrics: Metrics, log: LogOutput) -> None:
    try:
        await canary.sing(every, metrics.canary_sang)
    except (aioummu.UmmunotifyError, OSError, RuntimeError) as error:
        log.trouble(f"no latency is measured: {error}")


async def _draw(view: View, log: LogOutput) -> None:
    try:
        await view.run()
    except Exception as error:  # noqa: BLE001 - the service goes on without
        log.trouble(f"nothing is drawn any more: {error!r}")


def _reload(
    reload: Callable[[], Config],
    log: LogOutput,
    writer: LineWriter,
    tracking: Tracking,
    intake: Intake,
) -> Config | None:
    """Take on what can change without a new start; return it."""
    writer.reopen()
    try:
        config = reload()
    except ConfigError as error:
        log.trouble(f"the old configuration stays: {error}")
        return None
    log.set_style(config.log)
    log.causes = config.causes
    intake.max_clients = config.max_clients
    tracking.region_limit = config.max_regions
    tracking.total_limit = config.max_all_regions
    tracking.keep_ended = config.keep_ended
    tracking.forget_some()
    log.reloaded(
        log=config.log,
        max_clients=config.max_clients,
        max_regions=config.max_regions,
        keep_ended=config.keep_ended,
    )
    return config


def _open_writer(config: Config) -> LineWriter:
    try:
        return LineWriter(config.log_file)
    except OSError as error:
        raise StartError(
            f"the log file {config.log_file} cannot be opened: {error.strerror}"
        ) from error


# Sockets.


class _Sockets:
    """Where the daemon listens."""

    def __init__(
        self,
        clients: socket.socket,
        http: list[socket.socket],
    ) -> None:
        self.clients = clients
        self.http = http
        self.path = clients.getsockname()
        self.http_address = (
            "http://{}:{}".format(*_bracketed(http[0])) if http else None
        )


def _is_loopback(listener: socket.socket) -> bool:
    host, _ = _bracketed(listener)
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return True


def _bracketed(listener: socket.socket) -> tuple[str, int]:
    if listener.family == socket.AF_UNIX:
        return "unix", 0
    host, port, *_ = listener.getsockname()
    return (f"[{host}]" if ":" in host else host), port


@contextlib.contextmanager
def _listening(config: Config) -> Iterator[_Sockets]:
    """Open the sockets, or take those of the service manager."""
    with ExitStack() as stack:
        activated = activated_sockets()
        for listener in (s for sockets in activated.values() for s in sockets):
            stack.enter_context(listener)
        if given := activated.get("clients"):
            if len(given) > 1:
                raise StartError("the service manager has several sockets 'clients'")
            clients = _checked(given[0])
        else:
            clients = stack.enter_context(_listen_for_clients(config))
        http = activated.get("http", [])
        if not http and config.http is not None:
            http = [stack.enter_context(_listen_for_http(config.http))]
        yield _Sockets(clients, http)


def _checked(listener: socket.socket) -> socket.socket:
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise StartError(
            "the socket 'clients' of the service manager is no sequential-packet "
            "socket: its unit says ListenSequentialPacket="
        )
    return listener


@contextlib.contextmanager
def _listen_for_clients(config: Config) -> Iterator[socket.socket]:
    path = config.socket
    group = None if config.socket_group is None else _group(config.socket_group)
    with ExitStack() as stack:
        try:
            _make_directory(path.parent)
            stack.enter_context(_locked(path))
            _remove_dead(path)
            listener = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            )
            # Nobody may connect before the permissions are what they shall be.
            before = os.umask(0o777)
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(before)
            stack.callback(_remove_own, path, path.lstat())
            if group is not None:
                os.chown(path, -1, group)
            path.chmod(config.socket_mode)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _socket_error(path, error) from error
        yield listener


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only daemon for this socket; the file is left for the next one."""
    lock = path.with_name(path.name + ".lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(lock, flags, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path) from None
        yield
    finally:
        os.close(fd)


def _make_directory(directory: Path) -> None:
    """Make the directory of the socket, if it is missing, and see whose it is."""
    if not directory.exists():
        # Who may use the socket has to get to it.
        directory.mkdir(mode=0o755, parents=True)
    status = directory.stat()
    is_shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_ours = status.st_uid in {0, os.geteuid()}
    if not is_ours or (is_shared and not status.st_mode & stat.S_ISVTX):
        raise StartError(
            f"others may write to {directory}, and so put a socket of their own "
            "there: choose another directory"
        )


def _remove_dead(path: Path) -> None:
    """Remove the socket of a daemon that did not end properly."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StartError(f"{path} is there already, and no socket: remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, PermissionError):
            # Nobody, or one that was left before it got its permissions.
            path.unlink()
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EPROTOTYPE}:
                raise
            raise _in_use(path) from error
        else:
            raise _in_use(path)


def _remove_own(path: Path, bound: os.stat_result) -> None:
    with contextlib.suppress(OSError):
        found = path.lstat()
        # It may be another daemon's by now.
        if (found.st_dev, found.st_ino) == (bound.st_dev, bound.st_ino):
            path.unlink()


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StartError(f"there is no group {name!r}: groupadd {name}") from None


def _in_use(path: Path) -> StartError:
    return StartError(
        f"another daemon listens at {path}: end it, or choose another --socket"
    )


def _socket_error(path: Path, error: OSError) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return _in_use(path)
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return StartError(
            f"no permission to make the socket {path}, or to give it that group: "
            "choose another --socket, or start it as root or by systemd"
        )
    return StartError(f"the socket {path} cannot be made: {error.strerror or error}")


def _listen_for_http(address: HttpAddress) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server(
            (address.host, address.port), family=family, backlog=BACKLOG
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = "something else listens there: end it"
        elif error.errno == errno.EACCES:
            what = "no permission: ports below 1024 are root's"
        else:
            what = error.strerror or str(error)
        raise StartError(
            f"cannot listen at {address.host}:{address.port}: {what}, or choose "
            "another --http"
        ) from error
