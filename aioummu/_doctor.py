"""What works on this machine, why not, and what to do about it.

:func:`collect` looks at the machine and tries the backends; :func:`diagnose` turns
such facts into findings, without looking at anything else; :func:`as_text` and
:func:`as_json` show them. For ``python -m aioummu doctor``.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import importlib.metadata
import json
import mmap
import os
import platform
import pwd
import re
import select
import signal
import stat
import struct
import textwrap
import traceback
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import attrs

from aioummu import _engine
from aioummu._device import DEFAULT_PATH, Device
from aioummu._embedded import EmbeddedDevice, Support, probe
from aioummu._errors import DeviceError
from aioummu._records import INVAL, LAST, RECORD_SIZE, unpack
from aioummu._regions import address_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aioummu._device import DeviceLike

# --------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------

Step: TypeAlias = Literal["open", "register", "report", "lost", "done"]


@attrs.frozen
class Trial:
    """How far a backend came when a page was watched with it."""

    step: Step
    """What failed. "done": nothing, it works; "lost": nobody knows, as the process
    that tried it did not answer.
    """
    error: str = ""
    """The name of the exception."""
    code: int = 0
    """Its errno; the signal that ended the process."""
    message: str = ""
    """What the exception says."""

    @property
    def works(self) -> bool:
        """Whether a change was reported as it should be."""
        return self.step == "done"


@attrs.frozen
class Node:
    """A file in /dev, if it is there."""

    path: str
    kind: str = ""
    """Empty if there is none."""
    mode: str = ""
    owner: str = ""
    group: str = ""
    readable: bool = False
    """As far as the mode says."""
    writable: bool = False

    def __str__(self) -> str:
        return f"{self.path} ({self.mode} {self.owner} {self.group})"


@attrs.frozen
class Facts:
    """All that the findings depend on."""

    version: str
    """Of this library."""
    python: str
    release: str
    """Of the kernel."""
    machine: str
    user: str
    container: str
    """What makes this look like a container, empty if nothing does."""
    seccomp: int | None
    """2: a filter is installed; None: /proc does not tell."""

    driver: Trial
    device: Node
    driver_loaded: bool
    driver_installed: bool
    """modprobe would find it for this kernel."""
    driver_in_dkms: bool
    headers: bool
    """Those of this kernel are installed."""
    loadable_modules: bool | None
    """None: /proc does not tell."""
    modules_disabled: bool
    """No module can be loaded until the next boot."""
    lockdown: str
    """"none", "integrity", "confidentiality", or empty without it."""
    secure_boot: bool
    signatures_enforced: bool

    embedded: Trial
    files: Trial | None
    """The same with memory of a file; None: not tried."""
    support: Support | None
    """None: asking for it ended the process."""
    userfaultfd: Node
    unprivileged_userfaultfd: int | None
    """The sysctl, which is there if the kernel was built with userfaultfd."""
    procmap_query: bool

    @property
    def kernel(self) -> tuple[int, int]:
        """The version of the kernel, as far as it can be compared."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)


# --------------------------------------------------------------------------
# Findings
# --------------------------------------------------------------------------


@attrs.frozen
class Advice:
    """Something to do."""

    text: str
    command: str = ""


@attrs.frozen
class Finding:
    """What there is to say about a backend."""

    backend: str
    works: bool
    summary: str
    because: tuple[str, ...] = ()
    """The reasons; if it works, what is worth knowing."""
    to_do: tuple[Advice, ...] = ()


@attrs.frozen
class Report:
    """What the doctor says."""

    facts: Facts
    findings: tuple[Finding, ...]
    choice: str | None
    """What open_notifier() takes, whether it works or not."""

    @property
    def status(self) -> int:
        """The exit status: 0 if open_notifier() works here."""
        return (
            0 if any(f.works for f in self.findings if self.choice == f.backend) else 1
        )


#: Reasons and advice, in any order.
_Explanation: TypeAlias = "Iterable[str | Advice]"

_REPORT_BUG = Advice(
    "look into the kernel's log, and report it as a bug of aioummu, with all of this:",
    "python -m aioummu doctor --json; sudo dmesg | tail -n 50",
)
_LOAD = "sudo modprobe ummunotify"


def diagnose(facts: Facts) -> Report:
    """Turn facts into findings."""
    trials = {"driver": facts.driver, "embedded": facts.embedded}
    # A backend that is refused is passed over; one that breaks later is not.
    choice = next((name for name, t in trials.items() if t.step != "open"), None)
    return Report(facts, (_driver(facts), _embedded(facts)), choice)


def _finding(
    backend: str, summary: str, explanation: _Explanation = (), *, works: bool = False
) -> Finding:
    parts = list(explanation)
    return Finding(
        backend,
        works,
        summary,
        tuple(part for part in parts if isinstance(part, str)),
        tuple(part for part in parts if isinstance(part, Advice)),
    )


def _broken(backend: str, trial: Trial, explanation: _Explanation = ()) -> Finding:
    happened = {
        "register": "it opens, but refuses to watch a page",
        "report": "it opens, but does not report as it should",
    }.get(trial.step, "trying it failed")
    summary = f"does not work: {happened}: {trial.message}"
    if not explanation:
        explanation = _what_is_short(trial) if trial.error else [_REPORT_BUG]
    return _finding(backend, summary, explanation)


# The driver.


def _driver(facts: Facts) -> Finding:
    trial = facts.driver
    if trial.works:
        return _finding("driver", "works (munmap of a page reported)", works=True)
    if trial.step != "open":
        return _broken("driver", trial)
    match trial.error:
        case "NoDeviceError":
            there = "driver behind" if facts.device.kind else "such device"
            reason, explanation = f"no {there} {DEFAULT_PATH}", _why_no_device(facts)
        case "DevicePermissionError":
            reason, explanation = trial.message, _why_not_permitted(facts)
        case "ForeignDeviceError":
            reason, explanation = trial.message, _why_foreign(facts)
        case _:
            reason, explanation = trial.message, _what_is_short(trial)
    return _finding("driver", f"not usable: {reason}", explanation)


def _why_no_device(facts: Facts) -> _Explanation:
    if facts.kernel < (5, 10):
        yield f"the driver needs Linux 5.10 or later, and this is {facts.release}"
        yield Advice("boot a newer kernel")
    elif facts.loadable_modules is False:
        yield f"this kernel ({facts.release}) was built without loadable modules"
        yield Advice("boot a kernel that has them (CONFIG_MODULES)")
    elif facts.driver_loaded:
        yield from _why_no_node(facts)
    elif facts.container:
        yield (
            "the driver is not loaded, and a container cannot load it; this looks "
            f"like one: {facts.container}"
        )
        yield Advice("load the driver on the host:", _LOAD)
        yield _pass_in(DEFAULT_PATH)
    elif facts.modules_disabled:
        yield "the driver is not loaded, and kernel.modules_disabled forbids that now"
        yield Advice("have it loaded before that is set, and boot")
    else:
        yield from _why_not_loadable(facts)
        yield from _why_not_loaded(facts)


def _why_no_node(facts: Facts) -> _Explanation:
    if facts.container:
        yield (
            "the driver is loaded, but its device is not in this container (it looks "
            f"like one: {facts.container})"
        )
        yield _pass_in(DEFAULT_PATH)
    else:
        yield "the driver is loaded, but nobody has made its device"
        numbers = "$(tr : ' ' </sys/class/ummunotify/ummunotify/dev)"
        yield Advice("make it:", f"sudo mknod -m 0444 {DEFAULT_PATH} c {numbers}")


def _why_not_loadable(facts: Facts) -> _Explanation:
    reasons = []
    if facts.lockdown not in {"", "none"}:
        reasons.append(f"kernel lockdown is at {facts.lockdown!r}")
    if facts.signatures_enforced:
        reasons.append("module.sig_enforce is set")
    verb = "refuses" if reasons else "may refuse"
    if facts.secure_boot:
        reasons.append("Secure Boot is on")
    if not reasons:
        return
    yield f"this kernel {verb} modules that are not signed: {', '.join(reasons)}"
    yield Advice(
        "have the driver signed: install it with DKMS (see the README), enroll the "
        "key of DKMS, and boot:",
        "sudo mokutil --import /var/lib/dkms/mok.pub",
    )


def _why_not_loaded(facts: Facts) -> _Explanation:
    release = facts.release
    if facts.driver_installed:
        yield "the driver is installed, but not loaded"
        yield Advice("load it:", _LOAD)
    elif facts.driver_in_dkms:
        yield f"DKMS has the driver, but not for this kernel ({release})"
        build = f"sudo dkms autoinstall -k {release}"
        yield Advice("build and load it:", f"{build} && {_LOAD}")
    else:
        yield f"the driver is not installed for this kernel ({release})"
        if not facts.headers:
            yield Advice(
                "install the headers of this kernel; on Debian and Ubuntu:",
                f"sudo apt install linux-headers-{release}",
            )
        yield Advice(
            "build, install and load it, in the sources of aioummu:",
            f"make -C kmod && sudo make -C kmod install && {_LOAD}",
        )


def _why_not_permitted(facts: Facts) -> _Explanation:
    device = facts.device
    if device.readable:
        yield (
            f"the mode of {device} allows it, so something else does not: the list "
            "of devices of a container or a systemd unit, for example"
        )
        if facts.container:
            yield f"this looks like a container: {facts.container}"
            yield _pass_in(DEFAULT_PATH)
        else:
            yield Advice(f"allow it there (systemd: DeviceAllow={DEFAULT_PATH} r)")
    else:
        yield f"{device} is not readable for user {facts.user}"
        yield Advice(
            "open it to every user, for now:", f"sudo chmod 0444 {DEFAULT_PATH}"
        )
        yield Advice(
            "for good: install its udev rule, in the sources of aioummu:",
            "sudo make -C kmod install",
        )


def _why_foreign(facts: Facts) -> _Explanation:
    kind = facts.device.kind
    if kind == "character device":
        yield "the driver behind it is another one, or of another version"
        yield Advice(
            "build, install and load it anew, in the sources of aioummu:",
            "make -C kmod && sudo make -C kmod install && "
            f"sudo modprobe -r ummunotify && {_LOAD}",
        )
    else:
        yield f"{DEFAULT_PATH} is a {kind}"
        yield Advice(
            "remove it, and load the driver:", f"sudo rm -r {DEFAULT_PATH}; {_LOAD}"
        )


def _pass_in(path: str) -> Advice:
    return Advice(
        "pass the device into the container; docker and podman:",
        f"docker run --device {path} ...",
    )


def _what_is_short(trial: Trial) -> _Explanation:
    resources = {
        errno.EMFILE: "allow the process more open files (ulimit -n)",
        errno.ENFILE: "allow the machine more open files (sysctl fs.file-max)",
        errno.EAGAIN: "allow more threads (ulimit -u, or pids.max of the cgroup)",
        errno.ENOMEM: "allow more memory (ulimit -v, or memory.max of the cgroup)",
    }
    advice = resources.get(trial.code)
    yield Advice(advice) if advice else _REPORT_BUG


# The embedded backend.


def _embedded(facts: Facts) -> Finding:
    trial, support = facts.embedded, facts.support
    if trial.works:
        return _working_embedded(facts)
    if trial.step == "lost" and trial.code == signal.SIGSYS:
        return _finding(
            "embedded",
            "does not work: a seccomp filter kills whoever calls userfaultfd, so it "
            "will kill the program that opens a notifier",
            _why_refused(facts),
        )
    if trial.step != "open":
        busy = trial.error == "RangeBusyError"
        return _broken("embedded", trial, _why_busy() if busy else ())
    reason, explanation = trial.message, _why_not_started(facts)
    if trial.code == errno.ENOSYS and facts.unprivileged_userfaultfd is not None:
        # The kernel has it, whatever it says.
        reason = "this process may not use userfaultfd: the system call is refused"
        explanation = _why_refused(facts)
    elif support and support.error in _REFUSED and support.features:
        # Userfaultfd is not what was refused.
        reason = "it needs to read /proc/self/maps, and may not"
        explanation = [Advice("allow that, in the security module's profile")]
    return _finding("embedded", f"not usable: {reason}", explanation)


_REFUSED = {errno.EPERM, errno.EACCES}
_SECCOMP_FILTER = 2


def _working_embedded(facts: Facts) -> Finding:
    notes = []
    if facts.files and facts.files.works:
        files = "files too, Linux 6.7"
    elif facts.files and facts.support and facts.support.files:
        files = "but not memory of files"
        notes.append(f"a page of a file: {facts.files.message}")
    else:
        files = "not memory of files, which needs Linux 6.7"
        notes.append(
            "registering memory of files raises UnwatchableRangeError, other than of "
            "files in memory (tmpfs, memfd)"
        )
    if facts.support and facts.support.through_device:
        notes.append(
            "the system call userfaultfd is refused, so it is opened through "
            f"{facts.userfaultfd}"
        )
    if not facts.procmap_query:
        notes.append(
            "this kernel has no PROCMAP_QUERY (Linux 6.11): registering takes longer "
            "in a process with many mappings"
        )
    summary = f"works (munmap of a page reported; {files})"
    return _finding("embedded", summary, notes, works=True)


def _why_busy() -> _Explanation:
    yield (
        "something that was loaded into this very process has a userfaultfd of its "
        "own, for all mappings. Usually another userfaultfd is no obstacle: it "
        "only owns the mappings that were registered with it"
    )
    yield Advice("use the driver, or do without the other user of userfaultfd")


def _why_not_started(facts: Facts) -> _Explanation:
    code = facts.embedded.code
    if code in _REFUSED:
        yield from _why_refused(facts)
    elif code == errno.ENOSYS:
        yield _boot((5, 19))
    elif code == errno.EOPNOTSUPP:
        yield from _why_unsupported(facts)
    elif code == errno.ENOENT:
        yield Advice("mount it:", "sudo mount -t proc proc /proc")
    else:
        yield from _what_is_short(facts.embedded)


# The features that the engine cannot do without, see linux/userfaultfd.h.
_FEATURES = {
    0: "UFFD_FEATURE_PAGEFAULT_FLAG_WP",
    2: "UFFD_FEATURE_EVENT_REMAP",
    3: "UFFD_FEATURE_EVENT_REMOVE",
    6: "UFFD_FEATURE_EVENT_UNMAP",
    12: "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
}
# Where userfaultfd can write-protect, and the first kernel that has it all.
_WRITE_PROTECT = {"x86_64": (5, 19), "aarch64": (6, 10)}


def _why_unsupported(facts: Facts) -> _Explanation:
    features = facts.support.features if facts.support else 0
    lacks = [name for bit, name in _FEATURES.items() if not features >> bit & 1]
    if features and lacks:
        yield f"the kernel lacks {', '.join(lacks)}"
    since = _WRITE_PROTECT.get(facts.machine)
    if not since:
        yield (
            f"on {facts.machine}, userfaultfd may have no write-protect mode at all: "
            "it has it on x86_64, and from Linux 6.10 on aarch64"
        )
        yield Advice("use the driver")
    elif facts.kernel < since:
        yield f"this is Linux {facts.release} on {facts.machine}"
        yield _boot(since)
    else:
        yield f"Linux {facts.release} is new enough, so it was built without"
        yield Advice("boot a kernel with CONFIG_PTE_MARKER_UFFD_WP, or use the driver")


def _boot(since: tuple[int, int]) -> Advice:
    major, minor = since
    return Advice(
        f"boot Linux {major}.{minor} or later (6.7 for memory of files too), or use "
        "the driver, from 5.10 on"
    )


def _why_refused(facts: Facts) -> _Explanation:
    """Explain a refusal of the system call, which is never the kernel's own."""
    if facts.seccomp is not None:
        is_on = facts.seccomp == _SECCOMP_FILTER
        article = "a" if is_on else "no"
        yield f"{article} seccomp filter is on this process (Seccomp: {facts.seccomp})"
    if facts.container:
        yield f"this looks like a container: {facts.container}"
    if facts.unprivileged_userfaultfd == 0 and facts.seccomp == 0:
        yield (
            "vm.unprivileged_userfaultfd=0 is not the reason: no privilege is needed "
            "here, as it is opened for faults in user mode only"
        )
    yield _how_to_allow(facts)
    # Whoever is killed does not come to try the device.
    if facts.embedded.step != "lost":
        yield from _why_not_through_device(facts)


def _how_to_allow(facts: Facts) -> Advice:
    if facts.container:
        return Advice(
            "allow userfaultfd in the container's seccomp profile (Kubernetes: "
            "securityContext.seccompProfile); docker and podman:",
            "docker run --security-opt seccomp=profile.json ...",
        )
    if facts.seccomp == _SECCOMP_FILTER:
        return Advice(
            "allow userfaultfd in the filter that this process was started with; "
            "that of a systemd unit: SystemCallFilter=userfaultfd"
        )
    return Advice(
        "see whether a security module (SELinux, AppArmor) refuses it, and allow it:",
        "sudo dmesg | grep -i -e denied -e avc",
    )


def _why_not_through_device(facts: Facts) -> _Explanation:
    node = facts.userfaultfd
    if not node.kind:
        yield f"there is no {node.path} (Linux 6.1) to use instead of the system call"
    elif node.readable and node.writable:
        yield f"{node} could be used instead, but fails as well"
        return
    else:
        yield (
            f"{node} could be used instead, but is not readable and writable for "
            f"user {facts.user}"
        )
    if facts.container:
        yield Advice(
            "or pass the device into the container, readable and writable for its "
            "user; docker and podman:",
            f"docker run --device {node.path} ...",
        )
    elif node.kind:
        yield Advice(
            "or let this user open the device (until the next boot; a udev rule does "
            "so for good):",
            f"sudo setfacl -m u:{facts.user}:rw {node.path}",
        )


# --------------------------------------------------------------------------
# Showing
# --------------------------------------------------------------------------

_WIDTH = 80
_INDENT = 10


def as_text(report: Report) -> str:
    """Return the report for people."""
    facts = report.facts
    here = f"Linux {facts.release} ({facts.machine}), user {facts.user}"
    lines = [f"aioummu {facts.version}, Python {facts.python}, {here}", ""]
    for finding in report.findings:
        lines += _wrapped(f"{finding.backend:{_INDENT}}", finding.summary)
        label = "note" if finding.works else "because"
        for reason in finding.because:
            lines += _wrapped(" " * _INDENT, f"{label}: {reason}")
        for advice in finding.to_do:
            lines += _wrapped(" " * _INDENT, f"to do: {advice.text}")
            if advice.command:
                # In one line, to be copied.
                lines.append(f"{'':{_INDENT + 4}}{advice.command}")
        lines.append("")
    return "\n".join([*lines, *_conclusion(report), ""])


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * (_INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _conclusion(report: Report) -> list[str]:
    if report.choice is None:
        return ["open_notifier() will raise NoBackendError"]
    will = f"open_notifier() will use: {report.choice}"
    if not report.status:
        more = "The driver would report more (docs/backends.md)"
        return [will, more] if report.choice == "embedded" else [will]
    others = [f.backend for f in report.findings if f.works]
    return [
        f"{will}, which does not work",
        *(f'open_notifier(backend="{name}") works' for name in others),
    ]


def as_json(report: Report) -> str:
    """Return the report for programs."""
    data = {
        "works": report.status == 0,
        "choice": report.choice,
        "findings": [attrs.asdict(finding) for finding in report.findings],
        "facts": attrs.asdict(report.facts),
    }
    return json.dumps(data, indent=2) + "\n"


# --------------------------------------------------------------------------
# Looking
# --------------------------------------------------------------------------


def version() -> str:
    """Return the version of the library."""
    try:
        return importlib.metadata.version("aioummu")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def collect(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> Facts:
    """Look at the machine, and try both backends.

    :param root: where its files are
    :param environment: of the process
    """
    names = os.uname()
    modules = root / "lib/modules" / names.release
    proc, sys = root / "proc", root / "sys"
    driver = _ask(try_driver)
    embedded = _ask(try_embedded)
    return Facts(
        version=version(),
        python=platform.python_version(),
        release=names.release,
        machine=names.machine,
        user=_user(os.geteuid()),
        container=_container(root, environment),
        seccomp=_number(r"(?m)^Seccomp:\s*(\d+)", _text(proc / "self/status")),
        driver=driver.trial,
        device=_node(root, DEFAULT_PATH),
        driver_loaded=_exists(sys / "module/ummunotify"),
        driver_installed=any(
            re.search(r"(?m)^(.*/)?ummunotify\.ko\b", _text(modules / name))
            for name in ("modules.dep", "modules.builtin")
        ),
        driver_in_dkms=_exists(root / "var/lib/dkms/ummunotify"),
        headers=_exists(modules / "build/Makefile"),
        loadable_modules=(
            _exists(proc / "modules") if _exists(proc / "self") else None
        ),
        modules_disabled=_text(proc / "sys/kernel/modules_disabled").strip() == "1",
        lockdown="".join(
            re.findall(r"\[(\w+)\]", _text(sys / "kernel/security/lockdown"))
        ),
        secure_boot=_secure_boot(sys / _SECURE_BOOT),
        signatures_enforced=(
            _text(sys / "module/module/parameters/sig_enforce").strip() == "Y"
        ),
        embedded=embedded.trial,
        files=embedded.files,
        support=embedded.support,
        userfaultfd=_node(root, "/dev/userfaultfd"),
        unprivileged_userfaultfd=_number(
            r"(\d+)", _text(proc / "sys/vm/unprivileged_userfaultfd")
        ),
        procmap_query=_has_procmap_query(proc / "self/maps"),
    )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return int(match[1]) if match else None


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


_KINDS = {
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFDIR: "directory",
    stat.S_IFREG: "regular file",
}


def _node(root: Path, path: str) -> Node:
    file = root / path.lstrip("/")
    try:
        status = file.stat()
    except OSError:
        return Node(path)
    return Node(
        path,
        _KINDS.get(stat.S_IFMT(status.st_mode), "file of another kind"),
        stat.filemode(status.st_mode),
        _user(status.st_uid),
        _group(status.st_gid),
        readable=os.access(file, os.R_OK, effective_ids=True),
        writable=os.access(file, os.W_OK, effective_ids=True),
    )


def _container(root: Path, environment: Mapping[str, str]) -> str:
    for path in ("run/.containerenv", ".dockerenv"):
        if _exists(root / path):
            return f"/{path} exists"
    manager = _text(root / "run/systemd/container").strip()
    if manager:
        return f"/run/systemd/container says {manager}"
    for name in ("container", "KUBERNETES_SERVICE_HOST"):
        if name in environment:
            return f"${name} is set"
    names = "docker|kubepods|containerd|libpod|lxc|crio"
    match = re.search(rf"\b({names})\b", _text(root / "proc/self/cgroup"))
    return f"/proc/self/cgroup has {match[1]}" if match else ""


# Named after the EFI_GLOBAL_VARIABLE of the UEFI specification.
_SECURE_BOOT = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def _secure_boot(path: Path) -> bool:
    try:
        # Four bytes of attributes, then the value.
        return path.read_bytes()[4:] == b"\1"
    except OSError:
        return False


# PROCMAP_QUERY of linux/fs.h: for the first mapping or one behind address 0.
_PROCMAP_QUERY = 0xC0686611
_PROCMAP_QUERY_ARGUMENT = struct.pack("=3Q80x", 104, 0x10, 0)


def _has_procmap_query(maps: Path) -> bool:
    try:
        with maps.open("rb") as file:
            fcntl.ioctl(file, _PROCMAP_QUERY, _PROCMAP_QUERY_ARGUMENT)
    except OSError:
        return False
    return True


# --------------------------------------------------------------------------
# Trying
# --------------------------------------------------------------------------

_COOKIE = 0x646F63746F72
# Seconds until a trial counts as hung.  Nothing takes that long, even emulated.
_PATIENCE = 30


@attrs.frozen
class Trials:
    """What was tried with a backend."""

    trial: Trial
    files: Trial | None = None
    support: Support | None = None


def try_driver() -> Trials:
    """Watch a page with the driver."""
    return Trials(try_device(Device, _page()))


def try_embedded() -> Trials:
    """Watch a page, and one of a file, with the embedded backend."""
    support = probe()
    trial = try_device(EmbeddedDevice, _page())
    files = try_device(EmbeddedDevice, _page_of_file()) if trial.works else None
    return Trials(trial, files, support)


def try_device(open_device: Callable[[], DeviceLike], memory: mmap.mmap) -> Trial:
    """Unmap watched memory, and look whether that is reported."""
    step: Step = "open"
    try:
        with closing(open_device()) as device:
            start, end = address_range(memory)
            step = "register"
            device.register(start, end, _COOKIE)
            step = "report"
            memory.close()
            wrong = _wrong_with_report(device, start, end)
    except DeviceError as error:
        return Trial(step, type(error).__name__, error.errno or 0, error.strerror or "")
    finally:
        memory.close()
    return Trial("report", message=wrong) if wrong else Trial("done")


def _wrong_with_report(device: DeviceLike, start: int, end: int) -> str:
    """Return what is wrong, empty if nothing is."""
    poll = select.poll()
    poll.register(device.fileno(), select.POLLIN)
    if not poll.poll(1000 * _PATIENCE // 3):
        return "munmap is not reported"
    buffer = bytearray(16 * RECORD_SIZE)
    size = device.readinto(buffer) or 0
    records = unpack(buffer[:size])
    # The kernel may have moved the page before: more than one change is right.
    match records:
        case [(kind, _, first, behind, cookie), (last, _, _, _, generation)] if (
            (kind, first, behind, cookie) == (INVAL, start, end, _COOKIE)
            and last == LAST
            and 0 < generation <= device.generation
        ):
            return ""
    return f"munmap of {start:#x}-{end:#x} is reported as {records}"


def _page() -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=flags)
    memory[0] = 1
    return memory


def _page_of_file() -> mmap.mmap:
    # The one file of which it is sure that it is one.
    with Path(_engine.__file__).open("rb") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_COPY)


def _ask(function: Callable[[], Trials], patience: float = _PATIENCE) -> Trials:
    """Have a child do it, which may hang or be killed."""
    receiver, sender = os.pipe()
    with os.fdopen(receiver, "rb") as pipe:
        try:
            child = os.fork()
        except OSError:
            # Out of processes: let the trial itself say so, if it matters to it.
            os.close(sender)
            return function()
        if not child:
            _answer(function, sender)
        os.close(sender)
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        if not poll.poll(1000 * patience):
            # Not waited for, as nobody knows whether it can be killed.
            os.kill(child, signal.SIGKILL)
            return _lost(f"it hangs, after {patience:g} seconds still")
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return _trials(json.loads(answer))
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        return _lost(f"the process was killed ({name})", -code)
    return _lost("the process failed, its traceback is above")


def _answer(function: Callable[[], Trials], sender: int) -> NoReturn:
    try:
        os.write(sender, json.dumps(attrs.asdict(function())).encode())
    except BaseException:  # noqa: BLE001 - a child must never return from here
        traceback.print_exc()
    finally:
        os._exit(0)


def _trials(answer: dict[str, Any]) -> Trials:
    trial, files, support = answer["trial"], answer["files"], answer["support"]
    return Trials(
        Trial(**trial), files and Trial(**files), support and Support(**support)
    )


def _lost(message: str, code: int = 0) -> Trials:
    return Trials(Trial("lost", "", code, message))
