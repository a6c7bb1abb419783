"""The command line: ``python -m aioummu``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from aioummu import _doctor

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aioummu",
        description="Know when memory that you remember an address of changes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"aioummu {_doctor.version()}"
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    doctor = commands.add_parser(
        "doctor",
        help="tell which backends work here, why not, and what to do",
        description="Try each backend on this machine. Tells which work, why not, "
        "and what to do about it.",
        epilog="Exit status: 0 if aioummu.open_notifier() works here, 1 if it does "
        "not, 2 for wrong usage.",
        allow_abbrev=False,
    )
    doctor.add_argument(
        "--json", action="store_true", help="for programs, with all facts"
    )
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    report = _doctor.diagnose(_doctor.collect())
    show = _doctor.as_json if options.json else _doctor.as_text
    sys.stdout.write(show(report))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
