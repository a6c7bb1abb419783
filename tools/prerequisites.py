#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""See to it that this machine can build the library's extension.

Installs the few Debian packages that are missing, if that takes nobody's consent:
as root, or through sudo if it asks for no password. Otherwise says in one line
what is missing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 11)


def compiles() -> bool:
    """Whether there is a C compiler, with the headers of the C library."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    try:
        finished = subprocess.run(
            [*shlex.split(compiler), "-fsyntax-only", "-xc", "-"],
            input=b"#include <stdlib.h>\n#include <linux/userfaultfd.h>\n",
            capture_output=True,
            check=False,
        )
    except OSError:
        return False
    return finished.returncode == 0


def lacking() -> list[str]:
    """Name the packages that have what is missing."""
    packages = []
    if find_spec("ensurepip") is None:
        packages.append("python3-venv")
    if not compiles():
        packages += ["gcc", "libc6-dev"]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        packages.append("libpython3-dev")
    return packages


def as_root() -> list[str] | None:
    """Give the start of a command that is to run as root; None: impossible."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo is None:
        return None
    asked = subprocess.run([sudo, "-n", "true"], capture_output=True, check=False)
    return None if asked.returncode else [sudo, "-n"]


def install(packages: list[str]) -> str:
    """Install packages; returns what apt-get complained of, if they are missing."""
    root = as_root()
    if root is None or shutil.which("apt-get") is None:
        return ""
    print(f"installing {' '.join(packages)} ...", file=sys.stderr, flush=True)
    apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    apt.append("-oDPkg::Lock::Timeout=300")
    complaints = ""
    for arguments in (["update"], ["install", "--no-install-recommends", *packages]):
        finished = subprocess.run(
            [*apt, *arguments], capture_output=True, text=True, check=False
        )
        if finished.returncode:
            complaints += finished.stderr
    return complaints


def main() -> int:
    """Install what is missing, or name it; returns the exit status."""
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        here = f"{sys.executable} is {sys.version.split()[0]}"
        print(f"missing: Python {wanted} or later; {here}", file=sys.stderr)
        return 1
    packages = lacking()
    if not packages:
        return 0
    complaints = install(packages)
    packages = lacking()
    if not packages:
        return 0
    names = " ".join(packages)
    print(
        f"{complaints}missing on this machine: {names}; as root: "
        f"apt-get install --no-install-recommends {names}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
