"""A process to which less is allowed, or other things are there, than here.

None of it can be undone, so it happens in a process of its own. That changes itself,
after it has imported everything: another user may not be able to reach Python.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import pwd
import resource
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Literal

import attrs

PROJECT = Path(__file__).parent.parent

#: A user without privileges; None: that is who we are.
NOBODY = "nobody" if os.geteuid() == 0 else None

#: Seconds after which a program has hung.
_LIMIT = 120

#: The number of the system call userfaultfd, and the architecture as seccomp calls
#: it, see linux/audit.h.
SYSTEM_CALL = {
    "x86_64": (323, 0xC000003E),
    "aarch64": (282, 0xC00000B7),
}.get(platform.machine())

_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_SECCOMP_RET_KILL_PROCESS = 0x80000000
_SECCOMP_RET_ERRNO = 0x00050000
_SECCOMP_RET_ALLOW = 0x7FFF0000
_LOAD_WORD = 0x20
_JUMP_IF_EQUAL = 0x15
_RETURN = 0x06

_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = 0x4000 | 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


@attrs.frozen
class Sandbox:
    """What is different in there."""

    refuse: str | None = None
    """The errno that userfaultfd returns; "kill": the process."""
    proc: bool = True
    """Whether there is a /proc."""
    device: Literal["file", "closed", "other", "dead", "none"] | None = None
    """What is in the place of /dev/ummunotify."""
    user: str | None = None
    """A name or number."""
    processes: int | None = None
    """The most that the user may have."""

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run a program, which goes in here by calling ``enter()``."""
        head = f"from tests.sandbox import Sandbox\nenter = {self!r}.enter\n"
        return subprocess.run(
            [sys.executable, "-c", head + code],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT,
        )

    def enter(self) -> None:
        """Change this process for good."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not self.proc or self.device:
            _checked(_libc.unshare(_CLONE_NEWNS))
            _mount(None, b"/", _MS_REC_PRIVATE)
        if not self.proc:
            _mount(b"tmpfs", b"/proc")
        if self.device:
            _replace_device(self.device)
        if self.user:
            _become(self.user)
        if self.processes:
            resource.setrlimit(resource.RLIMIT_NPROC, (self.processes,) * 2)
        if self.refuse:
            _refuse_userfaultfd(self.refuse)


def _checked(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class _Program(ctypes.Structure):
    """A struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _refuse_userfaultfd(how: str) -> None:
    assert SYSTEM_CALL
    number, architecture = SYSTEM_CALL
    refuse = (
        _SECCOMP_RET_KILL_PROCESS
        if how == "kill"
        else _SECCOMP_RET_ERRNO | int(getattr(errno, how))
    )
    # Each: code, how many to skip if it is true, if it is false, operand.
    instructions = (
        (_LOAD_WORD, 0, 0, 4),
        (_JUMP_IF_EQUAL, 0, 3, architecture),
        (_LOAD_WORD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
    )
    code = b"".join(struct.pack("=HBBI", *each) for each in instructions)
    program = _Program(len(instructions), code)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _checked(_libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(program), 0, 0))


def _mount(kind: bytes | None, where: bytes, flags: int = 0) -> None:
    _checked(_libc.mount(b"none", where, kind, ctypes.c_ulong(flags), None))


def _replace_device(kind: str) -> None:
    """Put something else into the place of /dev/ummunotify."""
    names = ("null", "zero", "random", "urandom", "userfaultfd")
    kept = [
        (path, path.stat())
        for path in (Path("/dev") / name for name in names)
        if path.exists()
    ]
    _mount(b"tmpfs", b"/dev")
    os.umask(0)
    for path, status in kept:
        os.mknod(path, status.st_mode, status.st_rdev)
    path = Path("/dev/ummunotify")
    match kind:
        case "file":
            path.touch()
        case "closed":
            path.touch(0o600)
        case "other":
            os.mknod(path, stat.S_IFCHR | 0o666, Path("/dev/zero").stat().st_rdev)
        case "dead":
            # No driver has this number.
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(511, 0))


def _become(name: str) -> None:
    number = int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)
    # As if it had been started so: to its user, /proc/self is readable again.
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))
