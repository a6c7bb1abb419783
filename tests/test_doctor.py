"""``python -m aioummu doctor``: every failure, made up, and as many for real."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.metadata
import json
import mmap
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import pytest

import aioummu
from aioummu import _doctor, _embedded
from aioummu.__main__ import main
from aioummu._doctor import Facts, Node, Trial, Trials, as_json, as_text, diagnose
from aioummu._embedded import Support
from aioummu._regions import address_range
from tests.operations import kernel
from tests.pipe_device import PipeDevice, inval, last
from tests.sandbox import NOBODY, PROJECT, SYSTEM_CALL, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

no_driver = pytest.mark.skipif(
    Path(aioummu.DEFAULT_PATH).exists(), reason="the driver is loaded"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
seccomp = pytest.mark.skipif(not SYSTEM_CALL, reason="unknown architecture")

# Made-up facts.

WORKS = Trial("done")
NO_DEVICE = Trial("open", "NoDeviceError", errno.ENOENT, "no ummunotify device here")
ALL_FEATURES = 0x1FFFF
ABSENT = Node("/dev/ummunotify")
DEVICE = Node(
    "/dev/ummunotify", "character device", "cr--r--r--", "root", "root", readable=True
)
CLOSED_DEVICE = attrs.evolve(DEVICE, mode="crw-------", readable=False)
USERFAULTFD = Node("/dev/userfaultfd", "character device", "crw-------", "root", "root")
OPEN_USERFAULTFD = attrs.evolve(USERFAULTFD, readable=True, writable=True)

#: A machine as most are: without the driver, and all that it takes to build it.
USUAL = Facts(
    version="1.2.3",
    python="3.14.0",
    release="6.12.9-amd64",
    machine="x86_64",
    user="jane",
    container="",
    seccomp=0,
    driver=NO_DEVICE,
    device=ABSENT,
    driver_loaded=False,
    driver_installed=False,
    driver_in_dkms=False,
    headers=True,
    loadable_modules=True,
    modules_disabled=False,
    lockdown="none",
    secure_boot=False,
    signatures_enforced=False,
    embedded=WORKS,
    files=WORKS,
    support=Support(0, ALL_FEATURES, through_device=False, files=True),
    userfaultfd=USERFAULTFD,
    unprivileged_userfaultfd=0,
    procmap_query=True,
)


def refused(code: int, error: str = "DeviceError", features: int = 0) -> dict[str, Any]:
    """Return the facts that go with an engine that cannot start."""
    return {
        "embedded": Trial("open", error, code, f"the library on {os.strerror(code)}"),
        "files": None,
        "support": Support(code, features, through_device=False, files=False),
    }


not_permitted = partial(refused, errno.EPERM, "DevicePermissionError")
CONTAINER = {"container": "/.dockerenv exists", "seccomp": 2}


def told(changes: dict[str, Any]) -> str:
    """Return what is said about a machine that differs in this."""
    report = diagnose(attrs.evolve(USUAL, **changes))
    json.loads(as_json(report))
    text = as_text(report)
    assert max(map(len, text.splitlines())) < 120
    return " ".join(text.split())


def about(backend: str, changes: dict[str, Any]) -> str:
    """Return what is said about one backend of such a machine."""
    text = told(changes)
    driver, _, rest = text.partition(" embedded ")
    embedded, _, _ = rest.partition(" open_notifier() will ")
    return driver.partition(" driver ")[2] if backend == "driver" else embedded


def outcome(driver: Trial, embedded: Trial) -> tuple[int, str]:
    """Return the exit status, and the text from the line of the choice on."""
    report = diagnose(attrs.evolve(USUAL, driver=driver, embedded=embedded))
    _, _, conclusion = as_text(report).rpartition("\nopen_notifier() will ")
    return report.status, conclusion.strip()


def test_a_usual_machine() -> None:
    assert as_text(diagnose(USUAL)) == (
        "aioummu 1.2.3, Python 3.14.0, Linux 6.12.9-amd64 (x86_64), user jane\n"
        "\n"
        "driver    not usable: no such device /dev/ummunotify\n"
        "          because: the driver is not installed for this kernel "
        "(6.12.9-amd64)\n"
        "          to do: build, install and load it, in the sources of aioummu:\n"
        "              make -C kmod && sudo make -C kmod install && "
        "sudo modprobe ummunotify\n"
        "\n"
        "embedded  works (munmap of a page reported; files too, Linux 6.7)\n"
        "\n"
        "open_notifier() will use: embedded\n"
        "The driver would report more (docs/backends.md)\n"
    )


BROKEN = Trial("report", message="munmap is not reported")
KILLED = Trial("lost", "", signal.SIGSEGV, "the process was killed (SIGSEGV)")


@pytest.mark.parametrize(
    ("driver", "embedded", "status", "conclusion"),
    [
        (WORKS, WORKS, 0, "use: driver"),
        (WORKS, refused(errno.ENOSYS)["embedded"], 0, "use: driver"),
        (WORKS, KILLED, 0, "use: driver"),
        (
            NO_DEVICE,
            WORKS,
            0,
            "use: embedded\nThe driver would report more (docs/backends.md)",
        ),
        (NO_DEVICE, refused(errno.ENOSYS)["embedded"], 1, "raise NoBackendError"),
        (NO_DEVICE, BROKEN, 1, "use: embedded, which does not work"),
        (NO_DEVICE, KILLED, 1, "use: embedded, which does not work"),
        # It opens, so nobody looks for another one.
        (
            BROKEN,
            WORKS,
            1,
            'use: driver, which does not work\nopen_notifier(backend="embedded") works',
        ),
        (KILLED, BROKEN, 1, "use: driver, which does not work"),
    ],
)
def test_the_choice_and_the_exit_status(
    driver: Trial, embedded: Trial, status: int, conclusion: str
) -> None:
    assert outcome(driver, embedded) == (status, conclusion)


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        pytest.param(
            {"driver": WORKS, "device": DEVICE, "driver_loaded": True},
            ["works (munmap of a page reported)"],
            ["to do"],
            id="works",
        ),
        pytest.param(
            {"release": "5.9.16-generic"},
            ["needs Linux 5.10 or later, and this is 5.9.16-generic", "newer kernel"],
            ["modprobe"],
            id="old kernel",
        ),
        pytest.param(
            {"release": "5.10.0-generic"},
            ["not installed for this kernel (5.10.0-generic)", "modprobe"],
            ["newer kernel"],
            id="first kernel",
        ),
        pytest.param(
            {"loadable_modules": False},
            ["built without loadable modules", "CONFIG_MODULES"],
            ["modprobe"],
            id="no loadable modules",
        ),
        pytest.param(
            {"driver_installed": True},
            ["installed, but not loaded", "sudo modprobe ummunotify"],
            ["make"],
            id="installed",
        ),
        pytest.param(
            {"driver_in_dkms": True},
            ["DKMS has the driver, but not for", "dkms autoinstall -k 6.12.9-amd64"],
            ["make"],
            id="in DKMS",
        ),
        pytest.param(
            {"headers": False},
            ["sudo apt install linux-headers-6.12.9-amd64", "make -C kmod"],
            [],
            id="no headers",
        ),
        pytest.param(
            {"loadable_modules": None},
            ["not installed", "make -C kmod"],
            ["without loadable modules"],
            id="nobody knows about modules",
        ),
        pytest.param(
            {"modules_disabled": True},
            ["kernel.modules_disabled forbids", "before that is set"],
            ["modprobe"],
            id="modules disabled",
        ),
        pytest.param(
            {"lockdown": "integrity", "secure_boot": True, "driver_installed": True},
            [
                "refuses modules that are not signed",
                "kernel lockdown is at 'integrity', Secure Boot is on",
                "mokutil --import",
                "sudo modprobe ummunotify",
            ],
            ["may refuse"],
            id="lockdown",
        ),
        pytest.param(
            {"secure_boot": True},
            ["may refuse modules that are not signed: Secure Boot is on", "mokutil"],
            ["lockdown"],
            id="Secure Boot",
        ),
        pytest.param(
            {"signatures_enforced": True},
            ["refuses modules that are not signed: module.sig_enforce is set"],
            ["may refuse", "Secure Boot"],
            id="signatures enforced",
        ),
        pytest.param(
            CONTAINER,
            [
                "a container cannot load it; this looks like one: /.dockerenv exists",
                "on the host: sudo modprobe ummunotify",
                "docker run --device /dev/ummunotify",
            ],
            ["make"],
            id="container",
        ),
        pytest.param(
            {**CONTAINER, "driver_loaded": True},
            ["its device is not in this container", "run --device /dev/ummunotify"],
            ["modprobe"],
            id="container, loaded on its host",
        ),
        pytest.param(
            {"driver_loaded": True},
            ["nobody has made its device", "sudo mknod -m 0444 /dev/ummunotify c"],
            ["modprobe"],
            id="loaded without a node",
        ),
        pytest.param(
            {
                "driver": attrs.evolve(NO_DEVICE, code=errno.ENXIO),
                "device": DEVICE,
                "driver_installed": True,
            },
            ["no driver behind /dev/ummunotify", "not loaded", "sudo modprobe"],
            ["no such device"],
            id="a node that was left over",
        ),
        pytest.param(
            {
                "driver": Trial(
                    "open", "DevicePermissionError", errno.EACCES, "not you"
                ),
                "device": CLOSED_DEVICE,
            },
            [
                "not usable: not you",
                "/dev/ummunotify (crw------- root root) is not readable for user jane",
                "sudo chmod 0444 /dev/ummunotify",
                "sudo make -C kmod install",
            ],
            ["docker"],
            id="closed to this user",
        ),
        pytest.param(
            {
                "driver": Trial(
                    "open", "DevicePermissionError", errno.EPERM, "not you"
                ),
                "device": DEVICE,
                **CONTAINER,
            },
            [
                "the mode of /dev/ummunotify (cr--r--r-- root root) allows it",
                "--device",
            ],
            ["chmod"],
            id="not on the container's list",
        ),
        pytest.param(
            {
                "driver": Trial(
                    "open", "DevicePermissionError", errno.EPERM, "not you"
                ),
                "device": DEVICE,
            },
            ["list of devices", "DeviceAllow=/dev/ummunotify r"],
            ["docker"],
            id="not on the unit's list",
        ),
        pytest.param(
            {
                "driver": Trial("open", "ForeignDeviceError", errno.ENOTTY, "not one"),
                "device": attrs.evolve(DEVICE, kind="regular file"),
            },
            ["not one", "/dev/ummunotify is a regular file", "sudo rm"],
            ["make"],
            id="a file in its place",
        ),
        pytest.param(
            {
                "driver": Trial("open", "ForeignDeviceError", errno.ENOTTY, "not one"),
                "device": DEVICE,
            },
            ["of another version", "make -C kmod", "modprobe -r ummunotify"],
            ["sudo rm"],
            id="another driver",
        ),
        pytest.param(
            {"driver": Trial("open", "DeviceError", errno.EMFILE, "too many")},
            ["not usable: too many", "ulimit -n"],
            [],
            id="no more descriptors",
        ),
        pytest.param(
            {"driver": Trial("open", "DeviceError", errno.EIO, "strange")},
            ["not usable: strange", "report it as a bug"],
            [],
            id="unheard of",
        ),
        pytest.param(
            {"driver": Trial("register", "DeviceError", errno.EIO, "strange")},
            ["it opens, but refuses to watch a page: strange", "as a bug", "dmesg"],
            [],
            id="refuses to register",
        ),
        pytest.param(
            {"driver": BROKEN},
            ["opens, but does not report as it should: munmap is not", "as a bug"],
            [],
            id="does not report",
        ),
        pytest.param(
            {"driver": KILLED},
            ["trying it failed: the process was killed (SIGSEGV)", "as a bug"],
            ["ulimit"],
            id="kills",
        ),
    ],
)
def test_what_is_said_about_the_driver(
    changes: dict[str, Any], said: list[str], unsaid: list[str]
) -> None:
    text = about("driver", changes)
    assert [part for part in said if part not in text] == []
    assert [part for part in unsaid if part in text] == []


NO_WRITE_PROTECT = ALL_FEATURES & ~(1 << 0 | 1 << 12)


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        pytest.param(
            {},
            ["works (munmap of a page reported; files too, Linux 6.7)"],
            ["note", "to do", "unprivileged"],
            id="works",
        ),
        pytest.param(
            {
                "release": "6.1.0-amd64",
                "files": Trial("register", "UnwatchableRangeError", errno.EINVAL, "no"),
                "support": Support(0, 0x1FFF, through_device=False, files=False),
                "procmap_query": False,
            },
            [
                "works (munmap of a page reported; not memory of files, which needs",
                "note: registering memory of files raises UnwatchableRangeError",
                "note: this kernel has no PROCMAP_QUERY (Linux 6.11)",
            ],
            ["to do"],
            id="no files",
        ),
        pytest.param(
            {"files": Trial("register", "UnwatchableRangeError", errno.EPERM, "odd")},
            ["works", "but not memory of files", "note: a page of a file: odd"],
            ["needs Linux 6.7"],
            id="no files though there should be",
        ),
        pytest.param(
            {
                **CONTAINER,
                "support": Support(0, ALL_FEATURES, through_device=True, files=True),
            },
            ["works", "refused, so it is opened through /dev/userfaultfd (crw"],
            ["to do"],
            id="through the device",
        ),
        pytest.param(
            {**not_permitted(), **CONTAINER},
            [
                "not usable: the library on Operation not permitted",
                "a seccomp filter is on this process (Seccomp: 2)",
                "this looks like a container: /.dockerenv exists",
                "/dev/userfaultfd (crw------- root root) could be used instead, but",
                "is not readable and writable for user jane",
                "docker run --security-opt seccomp=profile.json",
                "or pass the device into the container",
                "docker run --device /dev/userfaultfd",
            ],
            ["unprivileged", "setfacl"],
            id="container",
        ),
        pytest.param(
            {**not_permitted(), **CONTAINER, "userfaultfd": Node("/dev/userfaultfd")},
            [
                "there is no /dev/userfaultfd (Linux 6.1) to use instead",
                "docker run --device /dev/userfaultfd",
            ],
            [],
            id="container without the device",
        ),
        pytest.param(
            {
                **not_permitted(),
                **CONTAINER,
                "userfaultfd": attrs.evolve(USERFAULTFD, readable=True),
            },
            [
                "is not readable and writable for user jane",
                "docker run --device /dev/userfaultfd",
            ],
            [],
            id="container whose device is read-only",
        ),
        pytest.param(
            {**not_permitted(), **CONTAINER, "userfaultfd": OPEN_USERFAULTFD},
            ["could be used instead, but fails as well", "--security-opt"],
            ["docker run --device"],
            id="container whose device fails",
        ),
        pytest.param(
            {**not_permitted(), "seccomp": 2},
            [
                "a seccomp filter is on this process",
                "SystemCallFilter=userfaultfd",
                "sudo setfacl -m u:jane:rw /dev/userfaultfd",
            ],
            ["docker", "unprivileged"],
            id="a filter without a container",
        ),
        pytest.param(
            not_permitted(),
            [
                "no seccomp filter is on this process (Seccomp: 0)",
                "vm.unprivileged_userfaultfd=0 is not the reason",
                "SELinux",
            ],
            ["docker", "SystemCallFilter"],
            id="a security module",
        ),
        pytest.param(
            {**not_permitted(), "seccomp": None, "unprivileged_userfaultfd": 1},
            ["not usable", "SELinux"],
            ["Seccomp:", "unprivileged"],
            id="nobody knows about seccomp",
        ),
        pytest.param(
            refused(errno.EACCES, "DevicePermissionError", ALL_FEATURES),
            ["it needs to read /proc/self/maps, and may not", "security module"],
            ["seccomp"],
            id="maps are closed",
        ),
        pytest.param(
            {**refused(errno.ENOSYS), **CONTAINER},
            [
                "not usable: this process may not use userfaultfd: the system call is",
                "a seccomp filter is on",
                "--security-opt",
            ],
            ["the library on", "boot"],
            id="a filter that denies the system call",
        ),
        pytest.param(
            {
                **refused(errno.ENOSYS, "UnsupportedKernelError"),
                "unprivileged_userfaultfd": None,
            },
            [
                "not usable: the library on Function not implemented",
                "boot Linux 5.19 or later (6.7 for",
            ],
            ["seccomp"],
            id="a kernel without it",
        ),
        pytest.param(
            {
                **refused(errno.EOPNOTSUPP, "UnsupportedKernelError", 0x1FF),
                "release": "5.10.0-46-amd64",
            },
            [
                "the library on Operation not supported",
                "the kernel lacks UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
                "this is Linux 5.10.0-46-amd64 on x86_64",
                "boot Linux 5.19 or later (6.7 for memory of files too)",
                "or use the driver, from 5.10 on",
            ],
            ["EVENT", "CONFIG"],
            id="an old kernel",
        ),
        pytest.param(
            {
                **refused(errno.EOPNOTSUPP, "UnsupportedKernelError", NO_WRITE_PROTECT),
                "release": "6.6.1",
                "machine": "aarch64",
            },
            [
                "lacks UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
                "Linux 6.6.1 on aarch64",
                "boot Linux 6.10",
            ],
            ["5.19"],
            id="an old kernel of another architecture",
        ),
        pytest.param(
            {
                **refused(errno.EOPNOTSUPP, "UnsupportedKernelError", NO_WRITE_PROTECT),
                "machine": "ppc64le",
            },
            [
                "on ppc64le, userfaultfd may have no write-protect mode at all",
                "use the driver",
            ],
            ["boot"],
            id="an architecture without it",
        ),
        pytest.param(
            refused(errno.EOPNOTSUPP, "UnsupportedKernelError", NO_WRITE_PROTECT),
            ["new enough, so it was built without", "CONFIG_PTE_MARKER_UFFD_WP"],
            ["5.19"],
            id="a kernel built without it",
        ),
        pytest.param(
            refused(errno.ENOENT),
            [
                "the library on No such file or directory",
                "sudo mount -t proc proc /proc",
            ],
            ["seccomp"],
            id="no proc",
        ),
        *(
            pytest.param(refused(code), ["the library on", hint], ["bug"], id=name)
            for name, code, hint in [
                ("EMFILE", errno.EMFILE, "ulimit -n"),
                ("ENFILE", errno.ENFILE, "fs.file-max"),
                ("EAGAIN", errno.EAGAIN, "pids.max"),
                ("ENOMEM", errno.ENOMEM, "memory.max"),
            ]
        ),
        pytest.param(
            refused(errno.EIO),
            ["the library on Input/output error", "report it as a bug"],
            ["allow"],
            id="unheard of",
        ),
        pytest.param(
            {
                "embedded": Trial(
                    "register", "RangeBusyError", errno.EBUSY, "it is owned"
                )
            },
            [
                "refuses to watch a page: it is owned",
                "only owns the mappings that were registered with it",
                "use the driver",
            ],
            ["bug"],
            id="busy",
        ),
        pytest.param(
            {"embedded": BROKEN},
            ["opens, but does not report as it should: munmap is not", "as a bug"],
            [],
            id="does not report",
        ),
        pytest.param(
            {"embedded": KILLED},
            ["trying it failed: the process was killed (SIGSEGV)", "as a bug"],
            ["ulimit", "seccomp"],
            id="crashes",
        ),
        pytest.param(
            {
                "embedded": attrs.evolve(KILLED, code=signal.SIGSYS),
                "files": None,
                "support": None,
                "seccomp": 2,
            },
            ["a seccomp filter kills", "SystemCallFilter=userfaultfd"],
            ["/dev/userfaultfd", "bug"],
            id="a filter that kills",
        ),
    ],
)
def test_what_is_said_about_the_embedded_backend(
    changes: dict[str, Any], said: list[str], unsaid: list[str]
) -> None:
    text = about("embedded", changes)
    assert [part for part in said if part not in text] == []
    assert [part for part in unsaid if part in text] == []


def test_commands_can_be_copied() -> None:
    changes = {**not_permitted(), "user": "a" * 90, "seccomp": 2}
    text = as_text(diagnose(attrs.evolve(USUAL, **changes)))
    assert f"\n              sudo setfacl -m u:{'a' * 90}:rw /dev/userfaultfd\n" in text


def test_json_has_all_that_the_text_says() -> None:
    data = json.loads(as_json(diagnose(USUAL)))
    assert (data["works"], data["choice"]) == (True, "embedded")
    driver, embedded = data["findings"]
    assert driver == {
        "backend": "driver",
        "works": False,
        "summary": "not usable: no such device /dev/ummunotify",
        "because": ["the driver is not installed for this kernel (6.12.9-amd64)"],
        "to_do": [
            {
                "text": "build, install and load it, in the sources of aioummu:",
                "command": "make -C kmod && sudo make -C kmod install && "
                "sudo modprobe ummunotify",
            }
        ],
    }
    assert embedded["works"]
    assert data["facts"]["release"] == USUAL.release
    assert data["facts"]["support"]["features"] == ALL_FEATURES


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.9-amd64", (6, 12)), ("5.10", (5, 10)), ("rolling", (0, 0))],
)
def test_kernel_versions_are_numbers(release: str, version: tuple[int, int]) -> None:
    assert attrs.evolve(USUAL, release=release).kernel == version


# Looking, at a made-up machine.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine without anything."""
    return tmp_path


@pytest.fixture(autouse=True)
def no_trials(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "root" in request.fixturenames:
        monkeypatch.setattr(_doctor, "_ask", lambda _: Trials(WORKS))


def put(root: Path, path: str, content: str | bytes = "") -> None:
    file = root / path.format(release=os.uname().release)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def collect(root: Path, **environment: str) -> Facts:
    return _doctor.collect(root, environment)


def test_a_machine_without_anything(root: Path) -> None:
    facts = collect(root)
    uname = os.uname()
    assert (facts.release, facts.machine) == (uname.release, uname.machine)
    assert facts.version == importlib.metadata.version("aioummu")
    assert facts.python.startswith("3.")
    assert facts == attrs.evolve(
        facts,
        container="",
        seccomp=None,
        device=ABSENT,
        driver_loaded=False,
        driver_installed=False,
        driver_in_dkms=False,
        headers=False,
        loadable_modules=None,
        modules_disabled=False,
        lockdown="",
        secure_boot=False,
        signatures_enforced=False,
        userfaultfd=Node("/dev/userfaultfd"),
        unprivileged_userfaultfd=None,
        procmap_query=False,
    )


SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


@pytest.mark.parametrize(
    ("path", "content", "fact", "value"),
    [
        ("run/.containerenv", "", "container", "/run/.containerenv exists"),
        (".dockerenv", "", "container", "/.dockerenv exists"),
        (
            "run/systemd/container",
            "systemd-nspawn\n",
            "container",
            "/run/systemd/container says systemd-nspawn",
        ),
        (
            "proc/self/cgroup",
            "0::/kubepods/besteffort/pod1\n",
            "container",
            "/proc/self/cgroup has kubepods",
        ),
        ("proc/self/cgroup", "0::/user.slice/relxc\n", "container", ""),
        ("proc/self/status", "Name:\tx\nSeccomp:\t2\n", "seccomp", 2),
        ("proc/self/status", "Name:\tSeccomp: 7\nSeccomp:\t0\n", "seccomp", 0),
        ("sys/module/ummunotify/refcnt", "0\n", "driver_loaded", True),
        (
            "lib/modules/{release}/modules.dep",
            "kernel/a.ko.xz:\nupdates/dkms/ummunotify.ko.xz: kernel/a.ko.xz\n",
            "driver_installed",
            True,
        ),
        (
            "lib/modules/{release}/modules.dep",
            "updates/ummunotify.ko:\n",
            "driver_installed",
            True,
        ),
        (
            "lib/modules/{release}/modules.builtin",
            "kernel/drivers/misc/ummunotify.ko\n",
            "driver_installed",
            True,
        ),
        (
            "lib/modules/{release}/modules.dep",
            "updates/notummunotify.ko:\nupdates/ummunotify_test.ko:\n",
            "driver_installed",
            False,
        ),
        (
            "lib/modules/0.0.1/modules.dep",
            "updates/ummunotify.ko:\n",
            "driver_installed",
            False,
        ),
        ("var/lib/dkms/ummunotify/0.1.0/source", "", "driver_in_dkms", True),
        ("lib/modules/{release}/build/Makefile", "", "headers", True),
        ("proc/self/status", "", "loadable_modules", False),
        ("proc/sys/kernel/modules_disabled", "1\n", "modules_disabled", True),
        ("proc/sys/kernel/modules_disabled", "0\n", "modules_disabled", False),
        (
            "sys/kernel/security/lockdown",
            "none [integrity] confidentiality\n",
            "lockdown",
            "integrity",
        ),
        (
            "sys/kernel/security/lockdown",
            "[none] integrity confidentiality\n",
            "lockdown",
            "none",
        ),
        (SECURE_BOOT, b"\6\0\0\0\1", "secure_boot", True),
        (SECURE_BOOT, b"\6\0\0\0\0", "secure_boot", False),
        (
            "sys/module/module/parameters/sig_enforce",
            "Y\n",
            "signatures_enforced",
            True,
        ),
        (
            "sys/module/module/parameters/sig_enforce",
            "N\n",
            "signatures_enforced",
            False,
        ),
        ("proc/sys/vm/unprivileged_userfaultfd", "0\n", "unprivileged_userfaultfd", 0),
        ("proc/sys/vm/unprivileged_userfaultfd", "1\n", "unprivileged_userfaultfd", 1),
    ],
)
def test_a_file_is_a_fact(
    root: Path, path: str, content: str | bytes, fact: str, value: object
) -> None:
    put(root, path, content)
    assert getattr(collect(root), fact) == value


def test_a_kernel_with_loadable_modules_says_so(root: Path) -> None:
    put(root, "proc/self/status")
    put(root, "proc/modules")
    assert collect(root).loadable_modules is True


@pytest.mark.parametrize("name", ["container", "KUBERNETES_SERVICE_HOST"])
def test_a_container_says_so_in_the_environment(root: Path, name: str) -> None:
    assert collect(root, **{name: "x"}).container == f"${name} is set"


@as_root
def test_what_is_closed_to_this_user_is_not_there(root: Path) -> None:
    put(root, "var/lib/dkms/ummunotify/0.1.0/source")
    assert collect(root).driver_in_dkms
    root.chmod(0o700)
    facts = Sandbox(user=NOBODY).run(
        "from pathlib import Path\n"
        "from aioummu import _doctor\n"
        "_doctor.version()\n"
        "enter()\n"
        f"facts = _doctor.collect(Path({str(root)!r}), {{}})\n"
        "print(facts.driver_in_dkms, facts.embedded.works)\n"
    )
    assert (facts.stdout, facts.stderr) == ("False True\n", "")


def test_a_node_is_described(root: Path) -> None:
    put(root, "dev/ummunotify")
    (root / "dev/ummunotify").chmod(0o640)
    (root / "dev/userfaultfd").mkdir()
    facts = collect(root)
    assert facts.device.kind == "regular file"
    assert facts.device.mode == "-rw-r-----"
    assert facts.device.readable
    assert facts.device.writable
    assert facts.userfaultfd.kind == "directory"
    assert facts.user in {facts.device.owner, str(os.geteuid())}


def test_a_users_number_stands_for_a_name_that_it_lacks() -> None:
    assert _doctor._user(54321) == "54321"
    assert _doctor._group(54321) == "54321"
    assert _doctor._user(0) == _doctor._group(0) == "root"


def test_the_machine_itself_is_looked_at() -> None:
    facts = _doctor.collect()
    assert facts.userfaultfd.kind in {"", "character device"}
    if facts.userfaultfd.kind:
        mode = Path("/dev/userfaultfd").stat().st_mode
        assert facts.userfaultfd.mode == stat.filemode(mode)
    assert facts.procmap_query == (kernel() >= (6, 11))
    assert facts.kernel == kernel()
    assert facts.seccomp in {0, 2}


# Trying.


def private_page() -> mmap.mmap:
    return mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class OddDevice(PipeDevice):
    """Reports what it is told to, when a page is registered."""

    def __init__(
        self, *, shift: int = 0, records: int = 2, generation: int = 1
    ) -> None:
        super().__init__()
        self.odd = shift, records
        self.generation = generation

    def register(
        self,
        start: int,
        end: int,
        cookie: int,
        *,
        causes: aioummu.Cause | None = None,
        once: bool = False,
    ) -> None:
        assert not causes
        assert not once
        shift, records = self.odd
        self.send(*[inval(cookie, start + shift, end), last(1)][:records])


def tried(device: PipeDevice) -> Trial:
    try:
        return _doctor.try_device(lambda: device, private_page())
    finally:
        device.end()


def test_a_right_report_is_right() -> None:
    assert tried(OddDevice()) == WORKS


@pytest.mark.parametrize(
    "device",
    [
        partial(OddDevice, shift=8),
        partial(OddDevice, records=1),
        partial(OddDevice, generation=0),
    ],
    ids=["range", "no last", "generation"],
)
def test_a_wrong_report_is_noticed(device: partial[OddDevice]) -> None:
    trial = tried(device())
    assert trial.step == "report"
    assert "is reported as [(0, 1, " in trial.message


def test_a_missing_report_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "_PATIENCE", 0)
    trial = tried(OddDevice(records=0))
    assert trial == Trial("report", message="munmap is not reported")


@pytest.fixture
def owned_page() -> Iterator[mmap.mmap]:
    """A page that another userfaultfd owns."""
    assert SYSTEM_CALL
    number, _ = SYSTEM_CALL
    user_mode_only = 1
    fd = ctypes.CDLL(None).syscall(number, user_mode_only | os.O_CLOEXEC)
    assert fd >= 0
    page = private_page()
    start, end = address_range(page)
    uffdio_api, uffdio_register, missing = 0xC018AA3F, 0xC020AA00, 1
    fcntl.ioctl(fd, uffdio_api, struct.pack("=3Q", 0xAA, 0, 0))
    fcntl.ioctl(fd, uffdio_register, struct.pack("=4Q", start, end - start, missing, 0))
    yield page
    os.close(fd)


@pytest.mark.embedded
@seccomp
def test_a_page_of_another_userfaultfd_is_refused(owned_page: mmap.mmap) -> None:
    trial = _doctor.try_device(aioummu.EmbeddedDevice, owned_page)
    assert (trial.step, trial.error, trial.code) == (
        "register",
        "RangeBusyError",
        errno.EBUSY,
    )
    text = about("embedded", {"embedded": trial})
    assert "another userfaultfd of this process owns" in text
    assert "only owns the mappings that were registered with it" in text


def test_a_trial_is_handed_over() -> None:
    trials = Trials(
        WORKS, NO_DEVICE, Support(1, 2**63, through_device=True, files=False)
    )
    assert _doctor._ask(lambda: trials) == trials
    assert _doctor._ask(lambda: Trials(BROKEN)) == Trials(BROKEN)


def test_a_trial_that_hangs_is_told_and_killed(tmp_path: Path) -> None:
    file = tmp_path / "child"

    def hang() -> Trials:
        file.symlink_to(str(os.getpid()))
        signal.pause()
        return Trials(WORKS)

    # Until the child was seen, that is as good as any number of seconds.
    patience = 0.1
    while True:
        trial = _doctor._ask(hang, patience).trial
        if file.is_symlink():
            break
        patience *= 2
    assert trial == Trial("lost", message=f"it hangs, after {patience:g} seconds still")
    _, status = os.waitpid(int(file.readlink().name), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_a_trial_that_is_killed_is_told() -> None:
    def die() -> Trials:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSYS)
        return Trials(WORKS)

    trial = _doctor._ask(die).trial
    assert trial == Trial("lost", "", signal.SIGSYS, "the process was killed (SIGSYS)")


def test_a_trial_that_fails_shows_where(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> Trials:
        raise ZeroDivisionError

    assert "its traceback is above" in _doctor._ask(fail).trial.message
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_without_processes_it_is_tried_in_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", fork)
    assert _doctor._ask(lambda: Trials(Trial("open", code=os.getpid()))) == Trials(
        Trial("open", code=os.getpid())
    )


def test_the_features_that_are_named_are_those_that_are_needed() -> None:
    source = Path(__file__).parent.parent / "engine" / "engine.c"
    _, _, rest = source.read_text().partition("#define NEEDED_FEATURES")
    needed, _, _ = rest.partition("/*")
    assert all(name in needed for name in _doctor._FEATURES.values())
    assert needed.count("UFFD_FEATURE_") == len(_doctor._FEATURES)


# The command line.


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aioummu", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_alone_it_prints_help() -> None:
    finished = doctor()
    assert finished.returncode == 0
    assert finished.stdout.startswith("usage: python -m aioummu ")
    assert "doctor" in finished.stdout


def test_it_prints_its_version() -> None:
    finished = doctor("--version")
    version = importlib.metadata.version("aioummu")
    assert (finished.returncode, finished.stdout) == (0, f"aioummu {version}\n")


@pytest.mark.parametrize(
    "arguments",
    [["nurse"], ["doctor", "--jso"], ["doctor", "now"], ["--doctor"]],
    ids=" ".join,
)
def test_wrong_usage_has_a_status_of_its_own(arguments: list[str]) -> None:
    finished = doctor(*arguments)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("usage: python -m aioummu ")


def test_the_help_tells_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--help"])
    assert raised.value.code == 0
    assert "2 for wrong usage" in " ".join(capsys.readouterr().out.split())


def test_without_metadata_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _doctor.version() == "(not installed)"


# For real.


@no_driver
def test_here_the_embedded_backend_works() -> None:
    finished = doctor("doctor")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    text = finished.stdout
    assert "\ndriver    not usable: no such device /dev/ummunotify\n" in text
    assert "\nembedded  works (munmap of a page reported; " in text
    assert "\nopen_notifier() will use: embedded\n" in text
    assert finished.stderr == ""


def findings(text: str) -> dict[str, Any]:
    return {each["backend"]: each for each in json.loads(text)["findings"]}


@pytest.mark.embedded
def test_what_this_kernel_lacks_is_noted() -> None:
    finished = doctor("doctor", "--json")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    embedded = findings(finished.stdout)["embedded"]
    assert embedded["works"]
    files = "files too" if kernel() >= (6, 7) else "not memory of files, which needs"
    assert f"reported; {files}" in embedded["summary"]
    notes = " ".join(embedded["because"])
    assert ("UnwatchableRangeError" in notes) == (kernel() < (6, 7))
    assert ("PROCMAP_QUERY" in notes) == (kernel() < (6, 11))


@pytest.mark.device
def test_where_it_is_loaded_the_driver_works() -> None:
    finished = doctor("doctor")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "\ndriver    works (munmap of a page reported)\n" in finished.stdout
    assert finished.stdout.endswith("\nopen_notifier() will use: driver\n")


@pytest.mark.device
@pytest.mark.skipif(kernel() >= (5, 19), reason="the kernel is not that old")
def test_before_519_there_is_no_embedded_backend() -> None:
    finished = doctor("doctor")
    text = " ".join(finished.stdout.split())
    assert "embedded not usable: the userfaultfd of this kernel" in text
    assert "boot Linux 5.19 or later (6.7 for memory of files too)" in text


# For real, where less is allowed. Kernels do not differ in that: nothing of it is
# marked for the guests, where a test of another process takes seconds.

_DOCTOR = """
import sys
from aioummu import __main__, _doctor
_doctor.version()  # for what it imports only then
enter()
sys.exit(__main__.main(["doctor"]))
"""


def doctor_in(sandbox: Sandbox) -> tuple[int, str]:
    finished = sandbox.run(_DOCTOR)
    assert finished.stderr == ""
    return finished.returncode, " ".join(finished.stdout.split())


@seccomp
@no_driver
@pytest.mark.parametrize("code", ["EPERM", "EACCES", "ENOSYS"])
def test_a_filter_that_refuses_is_found(code: str) -> None:
    status, text = doctor_in(Sandbox(refuse=code, user=NOBODY))
    assert status == 1
    assert "embedded not usable: this process may not use userfaultfd" in text
    assert "because: a seccomp filter is on this process (Seccomp: 2)" in text
    device = Path("/dev/userfaultfd")
    instead = "could be used instead" if device.exists() else "to use instead"
    assert "/dev/userfaultfd (" in text
    assert instead in text
    assert text.endswith("open_notifier() will raise NoBackendError")


@seccomp
@no_driver
def test_a_filter_that_kills_is_found() -> None:
    status, text = doctor_in(Sandbox(refuse="kill"))
    assert status == 1
    assert "embedded does not work: a seccomp filter kills whoever calls" in text
    assert text.endswith("will use: embedded, which does not work")


@seccomp
@as_root
@pytest.mark.skipif(
    not Path("/dev/userfaultfd").exists(), reason="there is no /dev/userfaultfd"
)
def test_where_the_system_call_is_refused_the_device_serves() -> None:
    status, text = doctor_in(Sandbox(refuse="EPERM"))
    assert status == 0
    assert "embedded works (munmap of a page reported; " in text
    assert "refused, so it is opened through /dev/userfaultfd (c" in text


@as_root
def test_nobody_needs_privileges() -> None:
    status, text = doctor_in(Sandbox(user=NOBODY))
    assert status == 0
    assert "user nobody" in text
    assert "embedded works (munmap of a page reported; " in text


@as_root
@no_driver
def test_a_missing_proc_is_found() -> None:
    status, text = doctor_in(Sandbox(proc=False))
    assert status == 1
    assert "embedded not usable: the embedded backend needs /proc: mount it" in text
    assert "sudo mount -t proc proc /proc" in text


@as_root
@no_driver
@pytest.mark.parametrize("processes", [1, 2], ids=["no child", "no thread"])
def test_a_missing_thread_is_found(processes: int) -> None:
    # Nobody else is that user.
    status, text = doctor_in(Sandbox(user="54321", processes=processes))
    assert status == 1
    assert "embedded not usable: the embedded backend cannot start: Resource" in text
    assert "allow more threads" in text


@as_root
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("file", "not an ummunotify device, or its driver is too old"),
        ("file", "because: /dev/ummunotify is a regular file"),
        ("other", "because: the driver behind it is another one"),
        ("dead", "driver not usable: no driver behind /dev/ummunotify"),
        ("closed", "/dev/ummunotify (-rw------- root root) is not readable for user"),
        ("none", "driver not usable: no such device /dev/ummunotify"),
    ],
)
def test_what_is_not_the_driver_is_told(
    device: Literal["file", "other", "dead", "closed", "none"], said: str
) -> None:
    status, text = doctor_in(Sandbox(device=device, user=NOBODY))
    assert status == 0
    assert said in text
    assert "open_notifier() will use: embedded" in text


def test_the_library_does_not_depend_on_the_doctor() -> None:
    code = "import sys, aioummu; sys.exit('aioummu._doctor' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert finished.returncode == 0


def test_the_support_that_is_reported_is_that_of_the_library() -> None:
    assert _doctor._ask(_doctor.try_embedded).support == _embedded.probe()
