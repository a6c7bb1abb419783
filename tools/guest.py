#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Boot a real Debian kernel, run a command in it, and bring back what happened.

The driver can't be tested on the machine that develops it: a bug takes the
machine down, and four kernel series are to be tested.  So each kernel is unpacked
from Debian's own packages into ``.cache/guest/`` (nothing is installed, nothing
touches /boot), the module is built against its headers, and virtme-ng boots it on
a copy-on-write view of this very file system: the project, its virtual environment
and the compiler's output are all there, at the same paths.  What a command writes
is gone with the guest, but for the folder $AIOUMMU_GUEST_SCRATCH and its output.

    guest.py setup                          what this machine lacks (apt, as root)
    guest.py fetch 6.1 6.12                 kernels into the cache
    guest.py build 6.12                     the module, against that kernel
    guest.py run 6.12 --module -- CMD ...   boot, insmod, CMD, rmmod, read the log
    guest.py pytest 6.1 6.12 -- ARGS        the same with pytest and its junit.xml

The exit status of ``run`` and ``pytest`` is that of the command, or

    96  something that the harness needs is missing (the message names it)
    97  the module did not build, load or unload
    98  the guest died or was killed at its time limit
    99  the kernel's log has a complaint, whatever the command said
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROJECT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("AIOUMMU_GUEST_CACHE", PROJECT / ".cache" / "guest"))
INIT = Path(__file__).resolve().parent / "guest-init.sh"
SESSION = Path(__file__).resolve().parent / "guest-session.sh"

EXIT_MISSING = 96
EXIT_MODULE = 97
EXIT_DIED = 98
EXIT_LOG = 99

# --------------------------------------------------------------------------
# What can be missing, and how to say it
# --------------------------------------------------------------------------


class HarnessError(Exception):
    """The run can't go on.  The message is all that the user gets to see."""

    status = 1


class MissingError(HarnessError):
    """Something has to be installed, freed or connected first."""

    status = EXIT_MISSING


class ModuleError(HarnessError):
    """The module did not build."""

    status = EXIT_MODULE


@dataclass(frozen=True)
class Tool:
    """A program that the harness starts, and the package that brings it."""

    program: str
    package: str
    task: str


TOOLS = (
    Tool("apt-get", "apt", "fetch"),
    Tool("dpkg", "dpkg", "fetch"),
    Tool("depmod", "kmod", "fetch"),
    Tool("make", "make", "build"),
    Tool("gcc", "gcc", "build"),
    # Debian's kernels have modules carry type information.
    Tool("pahole", "pahole", "build"),
    Tool("qemu-system-x86_64", "qemu-system-x86", "run"),
    Tool("modprobe", "kmod", "run"),
    # virtme-ng packs it into its little initramfs, and asks `file` if it is static.
    Tool("busybox", "busybox-static", "run"),
    Tool("file", "file", "run"),
    Tool("setpriv", "util-linux", "run"),
)

# Without a program to look for: objtool of the kernel's build needs the library,
# and udevd applies our udev rule in the guest.
SETUP_ALSO = ("libelf1", "libc6-dev", "udev", "xz-utils")


def find_program(name: str) -> str | None:
    """Find a program, also in the system's folders that a user's PATH leaves out."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=f"{path}:/usr/sbin:/sbin")


def missing_message(packages: Sequence[str], others: Sequence[str] = ()) -> str:
    """One message for everything that is missing, with the commands that bring it."""
    lines = []
    if packages:
        names = " ".join(sorted(set(packages)))
        lines.append(f"missing Debian packages: {names}")
        lines.append(f"  run: sudo apt-get install --no-install-recommends {names}")
        lines.append(f"  or:  sudo {sys.executable} tools/guest.py setup")
    lines.extend(others)
    return "\n".join(lines)


def require(task: str) -> None:
    """Refuse to start a task that would fail for want of a program."""
    lacking = [
        t.package for t in TOOLS if t.task == task and find_program(t.program) is None
    ]
    others = []
    if task == "run" and find_virtme() is None:
        others.append(
            "missing virtme-ng, which boots the guest\n"
            f"  run: {sys.executable} -m pip install virtme-ng"
        )
    if lacking or others:
        raise MissingError(missing_message(lacking, others))


def require_space(folder: Path, megabytes: int) -> None:
    """Refuse to start filling a disk that has no room for the result."""
    free = shutil.disk_usage(folder).free // 2**20
    if free < megabytes:
        raise MissingError(
            f"not enough disk space below {folder}: "
            f"{megabytes} MB wanted, {free} MB free"
        )


# --------------------------------------------------------------------------
# Small things
# --------------------------------------------------------------------------


class Progress:
    """Lines for whoever waits: what happens now, and how long it took."""

    def __init__(self, label: str) -> None:
        self._prefix = f"[guest {label}]"
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print one line at once."""
        print(f"{self._prefix} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep a second harness on this project from writing the same folder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_tree(path: Path) -> None:
    """Remove a folder that may be absent."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def give_back(path: Path) -> None:
    """Hand files made as root to whoever owns the project.

    ``sudo make test`` is how a fresh machine is tested; what it leaves in the
    project must not need root to be removed.
    """
    owner = PROJECT.stat()
    if os.geteuid() != 0 or owner.st_uid == 0 or not path.exists():
        return
    os.lchown(path, owner.st_uid, owner.st_gid)
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            os.lchown(Path(folder, name), owner.st_uid, owner.st_gid)


# --------------------------------------------------------------------------
# Kernels: which there are, and where Debian keeps them
# --------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A kernel series that is tested, and the Debian release that carries it."""

    name: str
    release: str
    security: bool
    image: str
    headers: str
    sandbox: bool = False
    """Build in an unpacked toolchain of that release: ours is too old for it."""


SERIES = {
    series.name: series
    for series in (
        Series("5.10", "bullseye", True, "linux-image-amd64", "linux-headers-amd64"),
        Series("6.1", "bookworm", True, "linux-image-amd64", "linux-headers-amd64"),
        Series(
            "6.12",
            "bookworm",
            True,
            "linux-image-6.12-amd64",
            "linux-headers-6.12-amd64",
        ),
        Series(
            "newest",
            "sid",
            False,
            "linux-image-amd64",
            "linux-headers-amd64",
            sandbox=True,
        ),
    )
}

# What `make` and gcc of a sandbox need besides what the header package depends on.
SANDBOX_PACKAGES = (
    *("base-files", "bash", "binutils", "coreutils", "dash", "diffutils", "findutils"),
    *("gawk", "gcc", "grep", "libc-bin", "make", "sed"),
)

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel.  Paths are relative to its folder, which can be moved."""

    series: str
    release: str
    version: str
    image: str
    kdir: str
    sandbox: str

    @property
    def home(self) -> Path:
        """The folder of this kernel in the cache."""
        return CACHE / "kernels" / self.series


def series_named(name: str) -> Series:
    """Look a series up, with a message that names those there are."""
    try:
        return SERIES[name]
    except KeyError:
        raise HarnessError(
            f"no kernel {name!r}: there are {', '.join(SERIES)}"
        ) from None


def parse_targets(text: str, codename: str) -> tuple[str, str]:
    """Find the archive and the security archive in `apt-get indextargets` output.

    The mirror is whichever this machine was told to use; so no address needs to be
    written in any file of the project.
    """
    targets = dict(
        reversed([line.split("|", 1) for line in text.splitlines() if "|" in line])
    )
    main = targets.get(codename)
    if main is None:
        raise MissingError(
            f"this machine's apt sources have no Debian archive for {codename!r}:\n"
            "the kernels to test on are Debian's; add it to /etc/apt/sources.list.d"
        )
    security = targets.get(f"{codename}-security")
    if security is None:
        security = re.sub(r"/debian/?$", "/debian-security/", main)
    return main, security


def apt_sources(series: Series, main: str, security: str) -> str:
    """Give the one-line sources of one Debian release."""
    options = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    lines = [f"deb {options}{main} {series.release} main"]
    if series.security:
        lines.append(f"deb {options}{security} {series.release}-security main")
    return "\n".join(lines) + "\n"


def linux_dependencies(field: str, kinds: str) -> list[str]:
    """Pick the kernel's own packages from a Depends field, first alternatives only.

    The rest (initramfs-tools, compilers, linux-base) serves an installation, and
    nothing is installed.
    """
    names = []
    for entry in field.split(","):
        name = entry.split("|")[0].split("(")[0].strip()
        if re.match(rf"linux-(?:{kinds})-\d", name):
            names.append(name)
    return names


class Apt:
    """apt with a configuration of its own: another release, no root, no traces."""

    def __init__(self, series: Series) -> None:
        self.folder = CACHE / "apt" / series.release
        self.series = series

    def options(self) -> list[str]:
        """Give the options that turn apt away from the machine's own state."""
        settings = {
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self.folder / "state",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            # Old releases and frozen mirrors are past their date, and signed still.
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        }
        return [f"-o{name}={value}" for name, value in settings.items()]

    def call(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        """Run an apt program; what it complains of ends the run."""
        result = subprocess.run(
            [program, *self.options(), *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
        if result.returncode != 0:
            raise MissingError(
                f"{program} {arguments[0]} for Debian {self.series.release} failed: "
                "no network, or this machine's mirror does not carry that release\n"
                + result.stderr.strip()
            )
        return result.stdout

    def update(self) -> None:
        """Fetch the package lists of the release."""
        os_release = Path("/etc/os-release").read_text(encoding="utf-8")
        codename = re.search(r"^VERSION_CODENAME=\"?([a-z]+)", os_release, re.MULTILINE)
        targets = subprocess.run(
            [
                "apt-get",
                "indextargets",
                "--format=$(RELEASE)|$(REPO_URI)",
                "Created-By: Packages",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        main, security = parse_targets(
            targets.stdout, codename.group(1) if codename else ""
        )
        (self.folder / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self.folder / "cache" / "archives" / "partial").mkdir(
            parents=True, exist_ok=True
        )
        (self.folder / "status").touch()
        sources = apt_sources(self.series, main, security)
        (self.folder / "sources.list").write_text(sources, encoding="utf-8")
        self.call("apt-get", "update", "-oAPT::Update::Error-Mode=any")

    def show(self, package: str) -> tuple[str, str]:
        """Look up the version and the dependencies of the candidate of a package."""
        text = self.call("apt-cache", "show", "--no-all-versions", package)
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", text, re.MULTILINE))
        return fields["Version"], fields.get("Depends", "")

    def closure(self, package: str, kinds: str) -> list[str]:
        """List the kernel packages that a metapackage stands for."""
        found: list[str] = []
        queue = [package]
        while queue:
            _, depends = self.show(queue.pop())
            for name in linux_dependencies(depends, kinds):
                if name not in found:
                    found.append(name)
                    queue.append(name)
        if not found:
            raise HarnessError(
                f"{package} of Debian {self.series.release} names no kernel package"
            )
        return found

    def download(self, packages: Sequence[str], folder: Path) -> list[Path]:
        """Download these packages, and only these."""
        folder.mkdir(parents=True)
        self.call("apt-get", "download", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def download_with_dependencies(
        self, packages: Sequence[str], folder: Path
    ) -> list[Path]:
        """Download packages and everything that they depend on."""
        (folder / "partial").mkdir(parents=True)
        self.call(
            "apt-get",
            "install",
            "--yes",
            "--no-install-recommends",
            "--download-only",
            f"-oDir::Cache::archives={folder}",
            *packages,
        )
        return sorted(folder.glob("*.deb"))


def unpack(packages: Sequence[Path], root: Path) -> None:
    """Unpack packages without installing them: no root, no maintainer scripts."""
    root.mkdir(exist_ok=True)
    # base-files first: it has /bin, /lib and their like as links into /usr.
    for package in sorted(
        packages, key=lambda path: not path.name.startswith("base-files_")
    ):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)


def make_relocatable(root: Path, release: str) -> Path:
    """Let Debian's headers build modules from where they were unpacked.

    They expect to be at /usr/src: the Makefile of the flavour includes the common
    one by its absolute path, and so do the links beside the modules.  Returns the
    KDIR.
    """
    source = root / "usr" / "src"
    kdir = source / f"linux-headers-{release}"
    makefile = kdir / "Makefile"
    text = makefile.read_text(encoding="utf-8")
    here = "$(dir $(realpath $(lastword $(MAKEFILE_LIST))))../"
    makefile.write_text(
        re.sub(r"(?m)^include /usr/src/", f"include {here}", text), encoding="utf-8"
    )
    for folder in source.iterdir():
        for entry in (
            folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ()
        ):
            if entry.is_symlink() and str(entry.readlink()).startswith("/usr/"):
                target = root / str(entry.readlink()).lstrip("/")
                entry.unlink()
                entry.symlink_to(os.path.relpath(target, folder))
    return kdir


def load_kernel(name: str) -> Kernel | None:
    """Look up the unpacked kernel of a series, if there is one."""
    series_named(name)
    try:
        text = (CACHE / "kernels" / name / "kernel.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Kernel(**json.loads(text))


def fetch(name: str, refresh: bool = False) -> Kernel:
    """Unpack a kernel into the cache, unless it is there already."""
    series = series_named(name)
    kernel = load_kernel(name)
    if kernel is not None and not refresh:
        return kernel
    require("fetch")
    progress = Progress(name)
    with locked("fetch"):
        kernel = load_kernel(name)
        if kernel is not None and not refresh:
            return kernel
        require_space(CACHE, 2500 if series.sandbox else 1200)
        kernels = CACHE / "kernels"
        kernels.mkdir(exist_ok=True)
        # What an interrupted run left behind; nobody else can be here.
        for leftover in kernels.glob(".*"):
            remove_tree(leftover)
        folder = kernels / f".{name}"
        folder.mkdir()
        try:
            kernel = unpack_kernel(series, folder, progress)
            (folder / "kernel.json").write_text(
                json.dumps(asdict(kernel)), encoding="utf-8"
            )
            remove_tree(kernels / name)
            folder.rename(kernels / name)
        finally:
            remove_tree(folder)
        give_back(CACHE / "apt")
        give_back(kernel.home)
    progress.say(
        f"Linux {kernel.release} ({kernel.version}) unpacked "
        f"in {progress.elapsed:.0f} s"
    )
    return kernel


def unpack_kernel(series: Series, folder: Path, progress: Progress) -> Kernel:
    """Download and unpack one kernel into a folder that is renamed afterwards."""
    apt = Apt(series)
    progress.say(f"package lists of Debian {series.release} ...")
    apt.update()
    images = apt.closure(series.image, "image|binary|modules|base")
    headers = apt.closure(series.headers, "headers|kbuild")
    version, _ = apt.show(images[0])
    progress.say(f"downloading {images[0]} ({version}) and its headers ...")
    root = folder / "root"
    debs = folder / "debs"
    unpack(apt.download(images if series.sandbox else images + headers, debs), root)
    remove_tree(debs)
    if series.sandbox:
        progress.say(f"downloading the compiler of Debian {series.release} ...")
        toolchain = [*headers, *SANDBOX_PACKAGES]
        unpack(apt.download_with_dependencies(toolchain, debs), folder / "sandbox")
        remove_tree(debs)
        prepare_sandbox(folder / "sandbox")
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")
    (release,) = (path.name for path in (root / "lib" / "modules").iterdir())
    for link in ("build", "source"):
        (root / "lib" / "modules" / release / link).unlink(missing_ok=True)
    kdir = make_relocatable(folder / "sandbox" if series.sandbox else root, release)
    depmod = find_program("depmod") or "depmod"
    subprocess.run([depmod, "-b", str(root), release], check=True)
    image = root / "boot" / f"vmlinuz-{release}"
    if not image.exists():
        image = root / "lib" / "modules" / release / "vmlinuz"
    return Kernel(
        series=series.name,
        release=release,
        version=version,
        image=str(image.relative_to(folder)),
        kdir=str(kdir.relative_to(folder)),
        sandbox="sandbox" if series.sandbox else "",
    )


def prepare_sandbox(root: Path) -> None:
    """Do the little that maintainer scripts would have done for a compiler."""
    for name in ("dev", "build", "tmp", "proc"):
        (root / name).mkdir(exist_ok=True)
    for link, target in (("awk", "gawk"), ("sh", "dash")):
        if not (root / "usr" / "bin" / link).exists():
            (root / "usr" / "bin" / link).symlink_to(target)


# --------------------------------------------------------------------------
# Building the module
# --------------------------------------------------------------------------


def source_digest(source: Path, arguments: Sequence[str]) -> str:
    """Digest everything that a build depends on, to know a fresh module."""
    digest = hashlib.sha256(json.dumps([str(a) for a in arguments]).encode())
    for path in sorted(source.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(source)).encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()


def ignore_outputs(_folder: str, names: list[str]) -> set[str]:
    """Leave out what somebody's own build made: a copy is always built from scratch."""
    endings = (".o", ".ko", ".mod", ".mod.c", ".cmd", ".o.d")
    others = ("Module.symvers", "modules.order", "__pycache__", ".tmp_versions")
    return {name for name in names if name.endswith(endings) or name in others}


def compiler_arguments(kernel: Kernel) -> list[str]:
    """CC=gcc where this machine has not the very compiler that built the kernel."""
    if kernel.sandbox:
        return []
    variables = (kernel.home / kernel.kdir / ".kernelvariables").read_text(
        encoding="utf-8"
    )
    wanted = re.search(r"^CC\s*=.*?(gcc-\d+)\s*$", variables, re.MULTILINE)
    if wanted and find_program(wanted.group(1)):
        return []
    return ["CC=gcc"]


def build_command(kernel: Kernel, copy: Path, arguments: Sequence[str]) -> list[str]:
    """Give the command that builds the module in its copy."""
    if not kernel.sandbox:
        kdir = kernel.home / kernel.kdir
        make = ["make", "-C", str(copy), f"KDIR={kdir}"]
        return [*make, *compiler_arguments(kernel), *arguments]
    # A mount namespace of its own: nothing of it is seen outside, and without root
    # a user namespace gives the right to make it.
    root = kernel.home / kernel.sandbox
    kdir_inside = "/" + str(Path(kernel.kdir).relative_to(kernel.sandbox))
    inside = ["make", "-C", "/build", f"KDIR={kdir_inside}", *arguments]
    script = (
        'mount --rbind /dev "$1/dev" && mount --rbind /proc "$1/proc" && '
        'mount --bind "$2" "$1/build" && '
        'root=$1 && shift 2 && exec chroot "$root" /usr/bin/env -i '
        'PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C "$@"'
    )
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    head = ["unshare", *user, "--mount", "--propagation=private", "sh", "-c", script]
    return [*head, "sandbox", str(root), str(copy), *inside]


def build_folder(name: str, source: Path) -> Path:
    """Give the folder for building some sources against a kernel.

    Sources other than the project's, a mutant of the driver say, have one of their
    own: a guest of the real one may be about to start.
    """
    if source == PROJECT / "kmod":
        return CACHE / "build" / name
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    return CACHE / "build" / f"{name}-{source.name}-{digest}"


def build(
    name: str,
    source: Path = PROJECT / "kmod",
    arguments: Sequence[str] = (),
    strict: bool = False,
) -> Path:
    """Build the module against a kernel, in a copy of its own, and return the .ko.

    Kernels would step on each other's objects in kmod/ itself.  Nothing is done if
    the module of just these sources is there.
    """
    kernel = fetch(name)
    require("build")
    if not (source / "Makefile").exists():
        raise ModuleError(f"no module source in {source}")
    progress = Progress(name)
    folder = build_folder(name, source)
    with locked(f"build-{name}"):
        copy = folder / "kmod"
        stamp = folder / "stamp"
        fresh = folder / "fresh"
        folder.mkdir(parents=True, exist_ok=True)
        remove_tree(fresh)
        shutil.copytree(source, fresh, ignore=ignore_outputs)
        digest = source_digest(fresh, [kernel.version, str(kernel.home), *arguments])
        known = stamp.read_text(encoding="utf-8").split() if stamp.exists() else []
        if known[:1] == [digest] and (strict is False or known[1:] == ["0"]):
            remove_tree(fresh)
            return only_module(copy)
        stamp.unlink(missing_ok=True)
        remove_tree(copy)
        fresh.rename(copy)
        warnings = 0
        environment = {
            k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")
        }
        with subprocess.Popen(
            build_command(kernel, copy, arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "LC_ALL": "C"},
        ) as process:
            for line in process.stdout or ():
                warnings += bool(
                    re.search(r"\bwarning:|^WARNING: ", line, re.IGNORECASE)
                )
                sys.stderr.write(line)
        give_back(folder)
        if process.returncode != 0:
            raise ModuleError(
                f"the module does not build against Linux {kernel.release}"
            )
        module = only_module(copy)
        stamp.write_text(f"{digest} {warnings}\n", encoding="utf-8")
        give_back(folder)
    progress.say(
        f"module built against {kernel.release} in {progress.elapsed:.0f} s, "
        f"{warnings} warnings"
    )
    if strict and warnings:
        raise ModuleError(
            f"{warnings} warnings in the build against Linux {kernel.release}"
        )
    return module


def only_module(folder: Path) -> Path:
    """Find the one .ko of a build."""
    modules = sorted(folder.glob("*.ko"))
    if len(modules) != 1:
        raise ModuleError(f"expected one module in {folder}, found {len(modules)}")
    return modules[0]


# --------------------------------------------------------------------------
# Reading the guest's kernel log
# --------------------------------------------------------------------------

# Under TCG on a busy machine a virtual CPU may not run for tens of seconds, and the
# kernel's watchdogs would report the machine, not the driver.  Rather than overlook
# their reports, which would hide a real lock-up, their limits are raised (below, in
# kernel_options) until only a lock-up can reach them.
COMPLAINTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bBUG[: ]",  # also slab's "BUG name (Tainted): Objects remaining"
        r"\bWARNING: ",
        r"-+\[ cut here \]-+",
        r"\bOops\b",
        r"\b(KASAN|KCSAN|KFENCE|KMSAN|UBSAN)\b.*:",
        r"\bgeneral protection fault\b",
        r"\bblocked for more than \d+ seconds",
        r"\bKernel panic\b",
        r"\bsoft lockup\b|\b[Hh]ard LOCKUP\b",
        r"\brcu\w*:? .*\bstall(s|ed)?\b",
        r"Objects remaining (in|on) |Slab cache still has objects",
        r"\bkmem_cache_destroy\b.*\bobjects\b",
        r"possible (circular|recursive) locking|inconsistent lock state",
        r"suspicious RCU usage",
        r"\brefcount_t: ",
        r"\bunreferenced object\b",
        r"\bunable to handle\b.*\b(page fault|NULL pointer)",
        r"\bbad page\b.*\bstate|\bBad (page state|rss-counter)",
    )
)

# What other programs write into the log, and KFENCE's line at boot.
HARMLESS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b(virtme-ng-init|virtme-init|virtme initramfs|aioummu-guest|aioummu-init): ",
        r"\bkfence: initialized\b",
        r"Command line: ",
        r"Unknown kernel command line parameters ",
    )
)


def scan_log(text: str, allow: Sequence[str] = ()) -> list[str]:
    """Pick the lines of a kernel log that fail a run."""
    allowed = [re.compile(pattern) for pattern in allow]
    found = []
    for line in map(str.rstrip, text.splitlines()):
        if not any(pattern.search(line) for pattern in COMPLAINTS):
            continue
        if not any(pattern.search(line) for pattern in (*HARMLESS, *allowed)):
            found.append(line)
    return found


# QEMU before 8.1 has a race in its multi-threaded emulation: while one CPU patches
# the kernel's own code (static keys are switched all the time during boot), another
# can run into the breakpoint that has just been taken away.  On a busy machine it
# was met in two of nine boots of Linux 7.2, before the driver was even loaded, and in
# none of some forty of the others.  Such a run says nothing and is repeated; a driver
# that jumps into the void would do it again.
EMULATOR_BUG = re.compile(r"\bint3: 0000 \[#1\]")
ATTEMPTS = 5


def hit_emulator_bug(complaints: Sequence[str]) -> bool:
    """Tell whether the first thing that went wrong is QEMU's own fault."""
    return bool(complaints) and EMULATOR_BUG.search(complaints[0]) is not None


# --------------------------------------------------------------------------
# Running a guest
# --------------------------------------------------------------------------


def find_virtme() -> str | None:
    """Find virtme-run: beside this interpreter, in the project's .venv, on PATH."""
    for folder in (Path(sys.executable).parent, PROJECT / ".venv" / "bin"):
        if (folder / "virtme-run").exists():
            return str(folder / "virtme-run")
    return shutil.which("virtme-run")


def project_python() -> Path:
    """Find the interpreter of the project's environment, or else this one."""
    python = PROJECT / ".venv" / "bin" / "python"
    return python if python.exists() else Path(sys.executable)


@dataclass(frozen=True)
class Options:
    """How a guest is to be run."""

    module: bool = False
    """Build the driver, load it before the command, and unload it afterwards."""
    source: Path = PROJECT / "kmod"
    bring: tuple[str, ...] = ()
    """Files of the scratch folder that are kept with the results."""
    cpus: int = min(2, os.cpu_count() or 1)
    memory: str = "2G"
    timeout: float = 900.0
    icount: bool = False
    user: str = ""
    environment: Mapping[str, str] | None = None
    allow: tuple[str, ...] = ()
    kopts: tuple[str, ...] = ()
    results: Path | None = None


def kernel_options(kvm: bool) -> list[str]:
    """Give the command line of the guest: every failure ends it, and is seen."""
    patience = 60 if kvm else 120
    return [
        "loglevel=8",
        "panic_on_warn=1",
        "oops=panic",
        "panic=-1",
        "sysctl.kernel.hung_task_panic=1",
        f"sysctl.kernel.hung_task_timeout_secs={patience}",
        f"sysctl.kernel.watchdog_thresh={patience // 2}",
        f"rcupdate.rcu_cpu_stall_timeout={patience}",
        # A merged cache outlives its module: nobody would see what it leaked.
        "slab_nomerge",
    ]


# What the guest needs before it sees the host's file system.
INITRAMFS_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")


def module_order(dependencies: str, wanted: Sequence[str]) -> list[str]:
    """List the files to load, in order, for some modules, from a modules.dep.

    A module that is not there is built into the kernel.
    """
    table = {}
    for line in dependencies.splitlines():
        path, _, needs = line.partition(":")
        table[path] = needs.split()
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in table}
    order: list[str] = []
    for name in wanted:
        if name in by_name:
            # modules.dep lists what a module needs with the deepest last.
            needed = (*reversed(table[by_name[name]]), by_name[name])
            order += [path for path in needed if path not in order]
    return order


def cpio_entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """Pack one member of an initramfs (the "newc" format)."""
    raw = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    entry = header + raw
    entry += bytes(-len(entry) % 4)
    return entry + data + bytes(-len(data) % 4)


def initramfs(kernel: Kernel) -> bytes:
    """Pack a guest's initramfs: busybox, our init, the modules to see the host."""
    program = Path(find_program("busybox") or "busybox").read_bytes()
    if b"/ld-linux" in program[:4096]:
        raise MissingError(missing_message(["busybox-static"]))
    folder = kernel.home / "root" / "lib" / "modules" / kernel.release
    dependencies = (folder / "modules.dep").read_text(encoding="utf-8")
    archive = [
        cpio_entry("bin", 0o040755),
        cpio_entry("bin/busybox", 0o100755, program),
        cpio_entry("init", 0o100755, INIT.read_bytes()),
        cpio_entry("modules", 0o040755),
    ]
    names = []
    for path in module_order(dependencies, INITRAMFS_MODULES):
        data = (folder / path).read_bytes()
        names.append(Path(path).name.split(".")[0] + ".ko")
        data = lzma.decompress(data) if path.endswith(".xz") else data
        archive.append(cpio_entry(f"modules/{names[-1]}", 0o100644, data))
    order = "".join(f"{name}\n" for name in names)
    archive.append(cpio_entry("modules/order", 0o100644, order.encode()))
    archive.append(cpio_entry("TRAILER!!!", 0))
    return b"".join(archive)


@dataclass(frozen=True)
class Guest:
    """One run: a kernel, how to run it, and the folder that both sides write to."""

    kernel: Kernel
    options: Options
    scratch: Path
    kvm: bool


def virtme_command(guest: Guest, stderr_port: int) -> list[str]:
    """Give the command that boots the guest."""
    kernel, options, scratch = guest.kernel, guest.options, guest.scratch
    virtme = find_virtme() or "virtme-run"
    command = [virtme, "--kimg", str(kernel.home / kernel.image), "--mods=none"]
    command += ["--disable-monitor", "--show-boot-console", "--force-9p"]
    command += ["--cpus", "1" if options.icount else str(options.cpus)]
    command += ["--memory", options.memory]
    command += [f"--rwdir={scratch}"]
    # One machine for all, with PCI for our modules and little to probe for.
    command += ["--disable-microvm", "-q=-machine", "-q=q35,sata=off,smbus=off"]
    command += ["-q=-nodefaults"]
    if not guest.kvm:
        command += ["--disable-kvm"]
    command += ["-q=-chardev", f"-q=file,id=aioummu,path=/proc/self/fd/{stderr_port}"]
    command += ["-q=-device", "-q=virtserialport,name=aioummu.stderr,chardev=aioummu"]
    if options.icount:
        command += ["-q=-icount", "-q=shift=0,sleep=off"]
    # Of two -initrd QEMU takes the last.
    command += ["-q=-initrd", f"-q={scratch / 'initramfs'}"]
    modules = kernel.home / "root" / "lib" / "modules" / kernel.release
    session = [f"aioummu_scratch={scratch}", f"aioummu_session={SESSION}"]
    session += [f"aioummu_modules={modules}"]
    for option in (*kernel_options(guest.kvm), *session, *options.kopts):
        command += ["--kopt", option]
    # Not to be run: our init does not look at it.  It makes virtme-ng set up the
    # machine for a command rather than for a terminal.
    return [*command, "--script-sh", "true"]


def kvm_works(kernel: Kernel) -> bool:
    """Whether KVM boots a guest here; /dev/kvm can open and be useless.

    In a nested machine a guest may die in its first instructions, and QEMU then
    sits there forever.  So a kernel without a root file system is booted, which
    panics and ends within two seconds where KVM works.  The answer is kept until
    this machine boots again.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    memory = CACHE / "kvm.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["boot"] == boot:
            return bool(known["works"])
    qemu = find_program("qemu-system-x86_64") or "qemu-system-x86_64"
    command = [
        qemu,
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "256M",
        "-nodefaults",
        "-no-reboot",
    ]
    command += [
        "-display",
        "none",
        "-serial",
        "stdio",
        "-kernel",
        str(kernel.home / kernel.image),
    ]
    command += ["-append", "console=ttyS0 panic=-1"]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
            check=False,
        )
        works = b"Linux version" in result.stdout and b"Kernel panic" in result.stdout
    except subprocess.TimeoutExpired:
        works = False
    memory.write_text(json.dumps({"boot": boot, "works": works}), encoding="utf-8")
    give_back(memory)
    return works


def parse_phases(text: str) -> dict[str, str]:
    """Read what the guest got done: a name and a value a line, the last may be torn."""
    phases = {}
    for line in text.splitlines(keepends=True):
        name, _, value = line.partition(" ")
        if line.endswith("\n") and value:
            phases[name] = value.strip()
    return phases


@dataclass(frozen=True)
class Outcome:
    """What came of a run, and why."""

    status: int
    reasons: tuple[str, ...] = ()
    emulator_bug: bool = False


def judge(
    phases: Mapping[str, str],
    module: bool,
    complaints: Sequence[str],
    timed_out: float | None = None,
) -> Outcome:
    """Turn what is known of a run into its exit status.

    A complaint of the kernel outweighs everything: that the command failed as well,
    or that the guest went down with a panic, follows from it.
    """
    reasons = []
    status = int(phases.get("exit", EXIT_DIED))
    if timed_out is not None:
        status = EXIT_DIED
        reasons.append(
            f"no end within {timed_out:.0f} s: the guest was killed (see --timeout)"
        )
    elif "up" not in phases:
        status = EXIT_DIED
        reasons.append("the guest did not come up")
    elif module and phases.get("insmod") != "0":
        status = EXIT_MODULE
        reasons.append("the module did not load")
    elif "exit" not in phases:
        reasons.append("the guest died while the command ran")
    elif module and "rmmod" not in phases:
        status = EXIT_DIED
        reasons.append("the guest died while the module was unloaded")
    elif module and phases["rmmod"] != "0":
        status = status or EXIT_MODULE
        reasons.append("the module could not be unloaded cleanly")
    if complaints:
        status = EXIT_LOG
        reasons.append("the kernel's log has complaints:")
        reasons.extend(f"    {line}" for line in complaints)
    return Outcome(status, tuple(reasons), hit_emulator_bug(complaints))


def copy_stream(source: IO[bytes] | None, sink: IO[bytes]) -> None:
    """Pass on what arrives, as it arrives."""
    while source is not None and (data := os.read(source.fileno(), 65536)):
        sink.write(data)
        sink.flush()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the guest and what was started with it: its own process group only."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def session_variables(user: str, module: Path | None, rule: Path | None) -> str:
    """Quote the variables that the session in the guest reads."""
    variables = {
        "cwd": str(Path.cwd()),
        "user": user,
        "module": str(module or ""),
        "rule": str(rule or ""),
    }
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables.items()]
    private = closed_folders([project_python().resolve(), PROJECT])
    return "".join([*lines, f"private=({shlex.join(private)})\n"])


def closed_folders(paths: Sequence[Path]) -> list[str]:
    """Find the folders above some paths that only their owner can pass through."""
    parents = {str(parent) for path in paths for parent in path.parents}
    return sorted(name for name in parents if not Path(name).stat().st_mode & 0o001)


def command_script(guest: Guest, command: Sequence[str]) -> str:
    """Quote the command with its environment, for bash in the guest."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "VIRTUAL_ENV", "CI")
        or name.startswith(("AIOUMMU_", "PYTEST_"))
    }
    series, options = guest.kernel.series, guest.options
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["AIOUMMU_GUEST"] = series
    environment["AIOUMMU_GUEST_SCRATCH"] = str(guest.scratch)
    if options.module:
        kmod = build_folder(series, options.source) / "kmod"
        environment["AIOUMMU_GUEST_KMOD"] = str(kmod)
    environment.update(options.environment or {})
    lines = [
        f"export {name}={shlex.quote(value)}" for name, value in environment.items()
    ]
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


def prepare(guest: Guest, command: Sequence[str]) -> None:
    """Write into the scratch folder what the guest reads from it."""
    scratch, options = guest.scratch, guest.options
    # Whoever the command runs as, it may write there.
    scratch.chmod(0o777)
    (scratch / "host").mkdir()
    module = rule = None
    if options.module:
        built = build(guest.kernel.series, options.source)
        module = Path(shutil.copy(built, scratch))
        for path in sorted(options.source.glob("*.rules"))[:1]:
            rule = Path(shutil.copy(path, scratch))
    variables = session_variables(options.user, module, rule)
    (scratch / "session.env").write_text(variables, encoding="utf-8")
    text = command_script(guest, command)
    (scratch / "command.sh").write_text(text, encoding="utf-8")
    (scratch / "initramfs").write_bytes(initramfs(guest.kernel))


def bring_back(guest: Guest, results: Path) -> None:
    """Keep the wanted files of the scratch folder, and none of an earlier run."""
    for file in guest.options.bring:
        remove_tree(results / file)
        if (guest.scratch / file).is_dir():
            shutil.copytree(guest.scratch / file, results / file)
        elif (guest.scratch / file).exists():
            shutil.copy(guest.scratch / file, results / file)


def run(name: str, command: Sequence[str], options: Options) -> int:
    """Boot a kernel, run a command in it, and judge the outcome."""
    require("run")
    kernel = fetch(name)
    kvm = not options.icount and kvm_works(kernel)
    threaded = not kvm and not options.icount and options.cpus > 1
    results = options.results or CACHE / "results" / name
    results.mkdir(parents=True, exist_ok=True)
    (CACHE / "run").mkdir(exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE / "run"))
        guest = Guest(kernel, options, scratch, kvm)
        try:
            prepare(guest, command)
            outcome = run_once(guest, results)
        finally:
            give_back(results)
            shutil.rmtree(scratch, ignore_errors=True)
        if not threaded or not outcome.emulator_bug or attempt == ATTEMPTS:
            break
        (results / "console.log").rename(results / f"console.int3-{attempt}.log")
        Progress(name).say("QEMU's own bug, a lost int3 (see EMULATOR_BUG): once more")
    return outcome.status


def run_once(guest: Guest, results: Path) -> Outcome:
    """Boot a prepared guest and say what came of it."""
    progress = Progress(guest.kernel.series)
    options, log = guest.options, results / "console.log"
    how = "KVM" if guest.kvm else "TCG, counting" if options.icount else "TCG"
    progress.say(f"booting Linux {guest.kernel.release} ({how}) ...")
    ended = boot(guest, log, progress)
    phases = {}
    if (guest.scratch / "phases").exists():
        phases = parse_phases((guest.scratch / "phases").read_text(errors="replace"))
    bring_back(guest, results)
    text = log.read_text(encoding="utf-8", errors="replace")
    complaints = scan_log(text, options.allow)
    timed_out = None if ended else options.timeout
    outcome = judge(phases, options.module, complaints, timed_out)
    for reason in outcome.reasons:
        progress.say(reason)
    if outcome.status == EXIT_DIED and not phases:
        progress.say("its last words:\n" + "\n".join(text.splitlines()[-15:]))
    if outcome.reasons:
        progress.say(f"the whole log is in {log}")
    progress.say(f"exit status {outcome.status} after {progress.elapsed:.0f} s")
    return outcome


def boot(guest: Guest, log: Path, progress: Progress) -> bool:
    """Run the guest to its end; false if it had to be killed at its time limit."""
    reader, writer = os.pipe()
    # What virtme-ng leaves behind when it is killed goes with the scratch folder.
    environment = dict(os.environ, TMPDIR=str(guest.scratch / "host"))
    environment["PATH"] = f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    process = subprocess.Popen(
        virtme_command(guest, writer),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(writer,),
        env=environment,
        start_new_session=True,
    )
    os.close(writer)
    with log.open("wb") as log_file, os.fdopen(reader, "rb") as errors:
        threads = [
            threading.Thread(target=copy_stream, args=(source, sink), daemon=True)
            for source, sink in (
                (process.stdout, sys.stdout.buffer),
                (process.stderr, log_file),
                (errors, sys.stderr.buffer),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            return wait_for(process, guest, progress)
        finally:
            if process.poll() is None:
                kill_group(process)
            for thread in threads:
                thread.join(10)


def wait_for(
    process: subprocess.Popen[bytes], guest: Guest, progress: Progress
) -> bool:
    """Wait for the end of the guest, telling when it is up; false at the time limit."""
    deadline = time.monotonic() + guest.options.timeout
    up = False
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return True
        if not up and (guest.scratch / "phases").exists():
            up = True
            progress.say(f"up after {progress.elapsed:.0f} s")
    return False


# --------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------


def setup(more: Sequence[str] = ()) -> None:
    """Install what the harness needs from Debian, as little as will do, and more."""
    packages = sorted({tool.package for tool in TOOLS} | {*SETUP_ALSO, *more})
    query = subprocess.run(
        ["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    there = {
        line.split()[0]
        for line in query.stdout.splitlines()
        if line.endswith(" installed")
    }
    lacking = [name for name in packages if name not in there]
    if not lacking:
        return
    Progress("setup").say("installing " + " ".join(lacking))
    sudo: list[str] = []
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            raise MissingError(missing_message(lacking))
        sudo = ["sudo"]
    apt = [
        *sudo,
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "-oDPkg::Lock::Timeout=300",
    ]
    for arguments in (
        ["update", "-q"],
        ["install", "-qy", "--no-install-recommends", *lacking],
    ):
        if (
            subprocess.run(
                [*apt, *arguments], stdout=sys.stderr, check=False
            ).returncode
            != 0
        ):
            raise MissingError(
                missing_message(lacking, ["apt-get failed: no network?"])
            )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what follows ``--`` is the guest's."""
    head = list(arguments)
    tail: list[str] = []
    if "--" in head:
        cut = head.index("--")
        head, tail = head[:cut], head[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="guest.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="action", required=True)
    kernels = argparse.ArgumentParser(add_help=False)
    kernels.add_argument("kernels", nargs="+", metavar="KERNEL", help=", ".join(SERIES))
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--source", type=Path, default=PROJECT / "kmod", help="the module's folder"
    )
    guest = argparse.ArgumentParser(add_help=False)
    guest.add_argument("--cpus", type=int, default=Options.cpus)
    guest.add_argument(
        "--memory", default=Options.memory, help="as QEMU's -m (default %(default)s)"
    )
    guest.add_argument(
        "--timeout",
        type=float,
        default=Options.timeout,
        help="seconds (default %(default)s)",
    )
    guest.add_argument(
        "--icount",
        action="store_true",
        help="deterministic: one CPU whose clock counts instructions (1 ns each)",
    )
    guest.add_argument(
        "--user", default="", help="run the command as this user of the guest"
    )
    guest.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the command",
    )
    guest.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="REGEX",
        help="log lines to overlook",
    )
    guest.add_argument(
        "--kopt",
        action="append",
        default=[],
        metavar="OPTION",
        help="for the kernel's command line",
    )
    guest.add_argument(
        "--results", type=Path, help="a folder for the log and what is brought back"
    )

    action = commands.add_parser(
        "setup", help="install the Debian packages that the harness needs"
    )
    action.add_argument(
        "packages", nargs="*", metavar="PACKAGE", help="install these as well"
    )
    action = commands.add_parser(
        "fetch", parents=[kernels], help="unpack kernels into the cache"
    )
    action.add_argument("--refresh", action="store_true", help="even if they are there")
    commands.add_parser(
        "kdir", parents=[kernels], help="print the KDIR for building modules"
    )
    action = commands.add_parser(
        "build", parents=[kernels, source], help="build the module"
    )
    action.add_argument("--strict", action="store_true", help="fail on any warning")
    action = commands.add_parser(
        "run", parents=[kernels, source, guest], help="run a command"
    )
    action.add_argument(
        "--module", action="store_true", help="insmod before, rmmod after"
    )
    action.add_argument(
        "--bring",
        action="append",
        default=[],
        metavar="FILE",
        help="keep it from the scratch folder",
    )
    commands.add_parser("pytest", parents=[kernels, source, guest], help="run pytest")
    namespace = parser.parse_args(head)
    namespace.tail = tail
    if namespace.action == "run" and not tail:
        parser.error("run wants a command after --")
    return namespace


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; the worst status of several kernels wins."""
    args = parse_arguments(arguments)
    if args.action == "setup":
        setup(args.packages)
        return 0
    status = 0
    for name in args.kernels:
        series_named(name)
    for name in args.kernels:
        if args.action == "fetch":
            fetch(name, args.refresh)
        elif args.action == "kdir":
            kernel = fetch(name)
            print(kernel.home / kernel.kdir)
        elif args.action == "build":
            print(build(name, args.source.resolve(), args.tail, args.strict))
        else:
            status = max(status, run_action(name, args))
    return status


def run_action(name: str, args: argparse.Namespace) -> int:
    """Do the sub-commands `run` and `pytest`, for one kernel."""
    pytest = args.action == "pytest"
    options = Options(
        module=pytest or args.module,
        source=args.source.resolve(),
        bring=("junit.xml",) if pytest else tuple(args.bring),
        cpus=args.cpus,
        memory=args.memory,
        timeout=args.timeout,
        icount=args.icount,
        user=args.user,
        environment=dict(pair.partition("=")[::2] for pair in args.env),
        allow=tuple(args.allow),
        kopts=tuple(args.kopt),
        results=args.results.resolve() / name if args.results else None,
    )
    if not pytest:
        return run(name, args.tail, options)
    # Only the guest knows the name of its scratch folder.
    command = (
        f'exec {shlex.quote(str(project_python()))} -m pytest -p no:cacheprovider "$@" '
        '--junitxml="$AIOUMMU_GUEST_SCRATCH/junit.xml"'
    )
    return run(name, ["bash", "-c", command, "pytest", *args.tail], options)


def terminate(_number: int, _frame: object) -> None:
    """Leave through the clean-up that an exception starts."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(main(sys.argv[1:]))
    except HarnessError as error:
        print(f"guest.py: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("guest.py: interrupted", file=sys.stderr)
        sys.exit(130)
