# SPDX-License-Identifier: MIT
"""The pure parts of tools/guest.py: nothing here boots a guest."""

from __future__ import annotations

import importlib.util
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

GUEST_PY = Path(__file__).resolve().parent.parent / "tools" / "guest.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guest", GUEST_PY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guest"] = module
    spec.loader.exec_module(module)
    return module


guest: Any = load()

NORMAL_LOG = """\
[    0.000000] Linux version 6.12.117+deb12-amd64 (debian-kernel@lists.debian.org)
[    0.000000] Command line: console=ttyS0 panic_on_warn=1 oops=panic panic=-1 init=/x
[    0.000000] Kernel command line: console=ttyS0 panic_on_warn=1 oops=panic panic=-1
[    0.000000] Unknown kernel command line parameters "aioummu_scratch=/BUG: /WARNING: "
[    0.000000] rcu: Hierarchical RCU implementation.
[    0.000000] \tRCU CPU stall warnings timeout set to 120 (rcu_cpu_stall_timeout).
[    0.040000] tsc: Unable to calibrate against PIT
[    0.103000] mtrr: your CPUs had inconsistent fixed MTRR settings
[    0.250000] kfence: initialized - using 2097152 bytes for 255 objects at 0xf
[    0.420000] NMI watchdog: Perf NMI watchdog permanently disabled
[    1.493411] x86/mm: Checked W+X mappings: passed, no W+X pages found.
[    2.106000] [Firmware Bug]: the BIOS has corrupted hw-PMU resources
[    3.518188] clocksource: Watchdog remote CPU 1 read timed out
[    3.600000] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as \
unstable because the skew is too large:
[    4.244337] evm: overlay not supported
[    5.158058] virtme-ng-init: WARNING: failed to restore symlink
[   11.929205] ummunotify: loading out-of-tree module taints kernel.
[   11.929467] ummunotify: module verification failed: signature and/or required key \
missing - tainting kernel
[   12.038209] aioummu-guest: insmod 0
[   13.073357] reboot: Power down
"""


def test_a_normal_log_of_an_out_of_tree_module_passes() -> None:
    assert guest.scan_log(NORMAL_LOG) == []


@pytest.mark.parametrize(
    "line",
    [
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "BUG: KASAN: slab-use-after-free in ummunotify_release+0x1c/0x90",
        "BUG: sleeping function called from invalid context at kernel/locking/mutex.c",
        "BUG: scheduling while atomic: python/215/0x00000002",
        "kernel BUG at mm/mmu_notifier.c:264!",
        "BUG: unable to handle page fault for address: ffffc90000a3d000",
        "WARNING: CPU: 0 PID: 215 at drivers/ummunotify.c:15 h_init+0x15/0xff0",
        "WARNING: mm/slub.c:1152 at __kmem_cache_shutdown+0x246/0x320, CPU#1: rmmod/219",
        "WARNING: possible circular locking dependency detected",
        "------------[ cut here ]------------",
        "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "Oops: general protection fault, probably for non-canonical address 0xdead",
        "general protection fault: 0000 [#1] SMP PTI",
        "INFO: task python:215 blocked for more than 120 seconds.",
        "Kernel panic - not syncing: kernel: panic_on_warn set ...",
        "watchdog: BUG: soft lockup - CPU#0 stuck for 120s! [python:215]",
        "watchdog: Watchdog detected hard LOCKUP on cpu 1",
        "rcu: INFO: rcu_preempt self-detected stall on CPU",
        "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
        "INFO: rcu_tasks detected stalls on tasks:",
        "BUG region (Tainted: G OE): Objects remaining on __kmem_cache_shutdown()",
        "BUG region (Tainted: G OE): Objects remaining in region on shutdown()",
        "kmem_cache_destroy region: Slab cache still has objects when called from exit",
        "refcount_t: underflow; use-after-free.",
        "UBSAN: array-index-out-of-bounds in ummunotify.c:77:9",
        "INFO: possible recursive locking detected",
        "BUG: Bad page state in process python  pfn:1a2b3",
    ],
)
def test_a_complaint_of_the_kernel_is_found(line: str) -> None:
    found = guest.scan_log(f"{NORMAL_LOG}[   12.000000] {line}\r\n[   13.0] more\n")
    assert found == [f"[   12.000000] {line}"]


def test_a_complaint_can_be_allowed_by_name() -> None:
    log = "[1.0] WARNING: here\n[1.1] WARNING: there\n"
    assert guest.scan_log(log, ["there$"]) == ["[1.0] WARNING: here"]


def test_the_exit_status_is_the_commands_own() -> None:
    for status in (0, 1, 5, 139, 255):
        phases = {"up": "4.1", "exit": str(status), "done": "0"}
        assert guest.judge(phases, module=False, complaints=[]).status == status


LOADED = {"up": "4.1", "insmod": "0", "exit": "0", "rmmod": "0", "done": "0"}


@pytest.mark.parametrize(
    ("phases", "complaints", "timed_out", "status", "reason"),
    [
        (LOADED, [], None, 0, ""),
        (LOADED, ["WARNING: x"], None, 99, "WARNING: x"),
        ({**LOADED, "exit": "3"}, ["BUG: x"], None, 99, "BUG: x"),
        ({**LOADED, "rmmod": "1"}, [], None, 97, "unloaded"),
        ({**LOADED, "rmmod": "1", "exit": "3"}, [], None, 3, "unloaded"),
        ({"up": "4.1", "insmod": "1"}, [], None, 97, "load"),
        ({"up": "4.1", "insmod": "0"}, [], None, 98, "died while the command"),
        ({"up": "4.1", "insmod": "0", "exit": "0"}, [], None, 98, "was unloaded"),
        ({}, [], None, 98, "did not come up"),
        ({"up": "4.1", "insmod": "0"}, [], 30.0, 98, "30 s"),
        ({"up": "4.1", "insmod": "0"}, ["Oops"], 30.0, 99, "Oops"),
    ],
)
def test_what_is_wrong_with_a_run_decides_its_status(
    phases: dict[str, str],
    complaints: list[str],
    timed_out: float | None,
    status: int,
    reason: str,
) -> None:
    outcome = guest.judge(phases, True, complaints, timed_out)
    assert outcome.status == status
    assert reason in "\n".join(outcome.reasons)
    assert bool(outcome.reasons) == bool(reason)


def test_only_an_oops_that_begins_with_int3_is_the_emulators() -> None:
    first = "[    2.965550] Oops: int3: 0000 [#1] SMP NOPTI"
    panic = "[    2.976973] Kernel panic - not syncing: Fatal exception in interrupt"
    assert guest.judge({}, True, [first, panic]).emulator_bug
    assert guest.judge(LOADED, True, ["int3: 0000 [#1] PREEMPT SMP NOPTI"]).emulator_bug
    assert not guest.judge({}, True, []).emulator_bug
    assert not guest.judge({}, True, ["WARNING: x", first]).emulator_bug
    assert not guest.judge({}, True, ["Oops: int3: 0000 [#2] SMP"]).emulator_bug


@pytest.mark.parametrize(
    ("cpus", "outcomes", "runs", "status"),
    [
        (2, [(99, True), (0, False)], 2, 0),
        (2, [(99, True)] * 9, 5, 99),
        (2, [(99, False)], 1, 99),
        (1, [(99, True)], 1, 99),
    ],
)
def test_a_run_that_the_emulator_spoilt_is_repeated(
    cpus: int,
    outcomes: list[tuple[int, bool]],
    runs: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = list(outcomes)

    def run_once(_guest: object, results: Path) -> object:
        (results / "console.log").write_text("the log")
        number, bug = left.pop(0)
        return guest.Outcome(number, (), bug)

    monkeypatch.setattr(guest, "CACHE", tmp_path)
    monkeypatch.setattr(guest, "require", lambda _task: None)
    monkeypatch.setattr(guest, "fetch", lambda _name: None)
    monkeypatch.setattr(guest, "kvm_works", lambda _kernel: False)
    monkeypatch.setattr(guest, "prepare", lambda _guest, _command: None)
    monkeypatch.setattr(guest, "run_once", run_once)
    assert guest.run("6.1", ["true"], guest.Options(cpus=cpus)) == status
    assert len(outcomes) - len(left) == runs
    kept = sorted(path.name for path in (tmp_path / "results" / "6.1").iterdir())
    assert len(kept) == runs
    assert list((tmp_path / "run").iterdir()) == []


def test_a_line_that_a_dying_guest_tore_is_no_phase() -> None:
    assert guest.parse_phases("up 4.1\ninsmod 0\nexit 1") == {
        "up": "4.1",
        "insmod": "0",
    }
    assert guest.parse_phases("") == {}


def test_what_is_missing_is_named_in_one_message_with_the_command() -> None:
    message = guest.missing_message(["qemu-system-x86", "kmod", "kmod"])
    assert "missing Debian packages: kmod qemu-system-x86\n" in message
    assert "apt-get install --no-install-recommends kmod qemu-system-x86" in message


def test_a_machine_without_tools_is_told_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest, "find_program", lambda _name: None)
    monkeypatch.setattr(guest, "find_virtme", lambda: None)
    with pytest.raises(guest.MissingError) as caught:
        guest.require("run")
    assert caught.value.status == 96
    for name in ("qemu-system-x86", "busybox-static", "kmod", "pip install virtme-ng"):
        assert name in str(caught.value)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    guest.require_space(tmp_path, 0)
    with pytest.raises(guest.MissingError, match="not enough disk space"):
        guest.require_space(tmp_path, 2**40)


def test_an_unknown_kernel_is_refused_with_those_there_are() -> None:
    with pytest.raises(guest.HarnessError, match=r"5\.10, 6\.1, 6\.12, newest"):
        guest.series_named("4.19")


def test_a_command_line_is_split_at_the_first_double_dash() -> None:
    args = guest.parse_arguments(
        ["run", "6.1", "6.12", "--module", "--", "a", "--", "b"]
    )
    assert args.kernels == ["6.1", "6.12"]
    assert args.module
    assert args.tail == ["a", "--", "b"]
    with pytest.raises(SystemExit):
        guest.parse_arguments(["run", "6.1"])


def test_the_mirror_is_the_machines_own() -> None:
    targets = "bookworm|http://a.test/debian/\nbookworm-security|http://b.test/sec/\n"
    main, security = guest.parse_targets(targets, "bookworm")
    assert (main, security) == ("http://a.test/debian/", "http://b.test/sec/")
    main, security = guest.parse_targets("bookworm|http://a.test/debian/\n", "bookworm")
    assert security == "http://a.test/debian-security/"
    with pytest.raises(guest.MissingError, match="trixie"):
        guest.parse_targets(targets, "trixie")


def test_only_the_kernels_own_packages_are_fetched() -> None:
    depends = (
        "kmod, linux-base (>= 4.3~), linux-image-6.12.1-amd64 (= 1) | linux-image-6.12.1-"
        "amd64-unsigned (= 1), linux-kbuild-6.12, linux-compiler-gcc-12-x86, gcc-12, "
        "linux-headers-6.12.1-common (= 1)"
    )
    assert guest.linux_dependencies(depends, "headers|kbuild") == [
        "linux-kbuild-6.12",
        "linux-headers-6.12.1-common",
    ]
    assert guest.linux_dependencies(depends, "image") == ["linux-image-6.12.1-amd64"]


def test_modules_are_loaded_after_what_they_need() -> None:
    dependencies = (
        "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n"
        "kernel/net/9p/9pnet.ko.xz:\n"
        "kernel/fs/netfs/netfs.ko.xz:\n"
        "kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz\n"
    )
    order = guest.module_order(dependencies, ["virtio_pci", "9pnet_virtio", "9p"])
    assert [Path(path).name for path in order] == [
        "9pnet.ko.xz",
        "9pnet_virtio.ko.xz",
        "netfs.ko.xz",
        "9p.ko.xz",
    ]


def test_headers_build_from_where_they_were_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "usr" / "src"
    flavour = source / "linux-headers-6.1-amd64"
    common = source / "linux-headers-6.1-common"
    for folder in (flavour, common, tmp_path / "usr" / "lib" / "linux-kbuild-6.1"):
        folder.mkdir(parents=True)
    (flavour / "Makefile").write_text(
        "include /usr/src/linux-headers-6.1-common/Makefile"
    )
    (common / "Makefile").write_text("all:\n\t@echo built\n")
    (flavour / "scripts").symlink_to("/usr/lib/linux-kbuild-6.1")
    kdir = guest.make_relocatable(tmp_path, "6.1-amd64")
    assert (kdir / "scripts").readlink() == Path("../../lib/linux-kbuild-6.1")
    result = subprocess.run(
        ["/usr/bin/make", "-s", "-C", str(kdir)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.defpath},
    )
    assert result.stdout == "built\n"


def test_an_initramfs_is_an_archive_that_cpio_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "kernels" / "6.1" / "root" / "lib" / "modules" / "6.1-amd64"
    modules.mkdir(parents=True)
    (modules / "9p.ko.xz").write_bytes(lzma.compress(b"the module"))
    (modules / "modules.dep").write_text("9p.ko.xz:\n")
    (tmp_path / "busybox").write_bytes(b"\x7fELF static")
    monkeypatch.setattr(guest, "CACHE", tmp_path)
    monkeypatch.setattr(guest, "find_program", lambda name: str(tmp_path / name))
    kernel = guest.Kernel("6.1", "6.1-amd64", "1", "vmlinuz", "kdir", "")
    archive = guest.initramfs(kernel)
    assert archive.startswith(b"070701")
    assert b"modules/9p.ko\0" in archive
    assert b"the module" in archive
    assert archive.count(b"070701") == 7
    assert len(archive) % 4 == 0
    (tmp_path / "busybox").write_bytes(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    with pytest.raises(guest.MissingError, match="busybox-static"):
        guest.initramfs(kernel)


def test_a_module_is_fresh_until_its_sources_or_arguments_change(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.c").write_text("int a;")
    first = guest.source_digest(tmp_path, [])
    assert guest.source_digest(tmp_path, []) == first
    assert guest.source_digest(tmp_path, ["W=1"]) != first
    (tmp_path / "a.c").write_text("int b;")
    assert guest.source_digest(tmp_path, []) != first


def test_variants_of_the_driver_do_not_share_a_build() -> None:
    real = guest.build_folder("6.1", guest.PROJECT / "kmod")
    first = guest.build_folder("6.1", Path("/a/kmod"))
    second = guest.build_folder("6.1", Path("/b/kmod"))
    assert real.name == "6.1"
    assert len({real, first, second}) == 3


def test_the_command_reaches_the_guest_unchanged(tmp_path: Path) -> None:
    kernel = guest.Kernel("6.1", "6.1-amd64", "1", "vmlinuz", "kdir", "")
    options = guest.Options(environment={"WITH": "a 'quoted' $value"})
    run = guest.Guest(kernel, options, tmp_path, False)
    script = guest.command_script(run, ["printf", "%s|", "$HOME", "two words", "'"])
    result = subprocess.run(
        ["/bin/bash", "-c", script], capture_output=True, check=True
    )
    assert result.stdout == b"$HOME|two words|'|"
    script = guest.command_script(run, ["sh", "-c", 'printf %s "$WITH"; exit 7'])
    result = subprocess.run(
        ["/bin/bash", "-c", script], capture_output=True, check=False
    )
    assert result.stdout == b"a 'quoted' $value"
    assert result.returncode == 7


def test_an_instruction_counting_guest_has_one_cpu(tmp_path: Path) -> None:
    kernel = guest.Kernel("6.1", "6.1-amd64", "1", "vmlinuz", "kdir", "")
    options = guest.Options(icount=True, cpus=4)
    command = guest.virtme_command(guest.Guest(kernel, options, tmp_path, False), 9)
    assert command[command.index("--cpus") + 1] == "1"
    assert "-q=shift=0,sleep=off" in command
    assert "--disable-kvm" in command
    assert "panic_on_warn=1" in command


def test_a_guest_is_killed_with_all_that_it_started() -> None:
    process = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' TERM; sleep 100 & echo $!; wait; wait"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        child = int(process.stdout.readline())
    guest.kill_group(process)
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}/exe").exists():
        time.sleep(0.01)
    assert not Path(f"/proc/{child}/exe").exists()
