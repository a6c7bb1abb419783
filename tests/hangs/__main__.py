"""Runs one scenario in this process."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import resource
import signal
from importlib import import_module

from tests.hangs.child import native, native_with_the_gil, say

NOBODY = 65534

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4


def main() -> None:
    """Run the scenario that the command line names, and say what it returns."""
    parser = argparse.ArgumentParser(prog="python -m tests.hangs")
    parser.add_argument("--stacks-after", type=float, metavar="SECONDS", default=48)
    parser.add_argument("--nobody", action="store_true", help="drop all privileges")
    parser.add_argument("name", help="of a module here, and of a function in it")
    parser.add_argument("arguments", nargs="*")
    arguments = parser.parse_args()

    # A thread of its own, which needs no GIL. Those who wait for an event to be
    # read run no signal handlers, so they cannot be asked.
    faulthandler.dump_traceback_later(arguments.stacks_after)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, function = arguments.name.partition(".")
    scenario = getattr(import_module(f"tests.hangs.{module}"), function)
    if arguments.nobody and os.geteuid() == 0:
        _become_nobody()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    say(**scenario(*arguments.arguments))


def _become_nobody() -> None:
    # That user may not read what is loaded only when it is needed.
    native()
    native_with_the_gil()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.environ.pop("HOME", None)
    # As if a program had been started by that user: /proc/self is its own again.
    _prctl(_PR_SET_DUMPABLE, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    main()
