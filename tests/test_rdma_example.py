"""The example on RDMA: with real registrations, of an adapter made in the guests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import pytest

from tests.memory import PAGE, Pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioummu import Backend

# A module without types is seen from here.
Example: TypeAlias = Any

PROJECT = Path(__file__).parent.parent
PROGRAM = PROJECT / "examples" / "rdma_registration_cache.py"
ADAPTERS = Path("/sys/class/infiniband")
SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
# Seconds after which something has hung.
LIMIT = 240

backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("driver", marks=pytest.mark.device),
        pytest.param("embedded", marks=pytest.mark.embedded),
    ],
)


def command(text: str) -> None:
    finished = subprocess.run(
        text.split(), capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert finished.returncode == 0, f"{text}: {finished.stderr}"


@pytest.fixture(scope="module")
def adapter() -> Iterator[str]:
    """Soft-RoCE in a guest; elsewhere the adapter that is there, if any."""
    if "AIOUMMU_GUEST" not in os.environ:
        names = sorted(path.name for path in ADAPTERS.glob("*"))
        if not names:
            pytest.skip("no RDMA adapter; the tests make one in guests only")
        yield names[0]
        return
    if os.geteuid() != 0:
        pytest.skip("to make an RDMA adapter takes root")
    # Debian's kernels have all of it: that it fails is no reason to skip.
    command("modprobe dummy numdummies=0")
    command("modprobe rdma_rxe")
    command("ip link add rdma-test type dummy")
    try:
        # Packets of 4,096 bytes and their headers.
        command("ip link set rdma-test mtu 9000 up")
        command("rdma link add rxe-test type rxe netdev rdma-test")
        # udev's rules may rename it.
        (name,) = (path.name for path in ADAPTERS.glob("*"))
        yield name
        command(f"rdma link delete {name}")
    finally:
        command("ip link delete rdma-test")


def run(*arguments: str, program: Path = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


def changed(folder: Path, old: str, new: str) -> Path:
    """Return a copy of the program with other text in it."""
    text = PROGRAM.read_text()
    assert text.count(old) == 1, old
    copy = folder / PROGRAM.name
    copy.write_text(text.replace(old, new))
    return copy


def table(output: str) -> dict[str, tuple[int, int]]:
    """Return registrations and wrong bytes of each way."""
    found = {}
    for line in output.splitlines():
        name, numbers = line[:14].rstrip(), line[14:].replace(",", "").split()
        if name in {"every time", "cache", "address only"}:
            assert float(numbers[0]) > 0
            found[name] = (int(numbers[1]), int(numbers[2]))
    return found


@backends
def test_memory_freed_and_allocated_again_is_never_sent_as_it_was(
    adapter: str, backend: Backend
) -> None:
    finished = run("--device", adapter, "--backend", backend)
    output = finished.stdout + finished.stderr
    figures = table(finished.stdout)
    assert figures["every time"] == (2000, 0), output
    registrations, wrong = figures["cache"]
    assert wrong == 0, output
    # 8 tasks have 4 buffers each, and free some.
    assert 32 < registrations <= 200, output
    # And it might have been: else the test is worthless.
    assert figures["address only"][1] > 0, output
    assert f"adapter {adapter}, {backend} backend\n" in output
    # How fast it is depends on what else the machine does, and decides nothing here.
    missed = [line for line in output.splitlines() if line.startswith("NOT reached")]
    assert missed in ([], ["NOT reached: the cache was not faster"]), output
    assert finished.returncode == len(missed), output


@pytest.mark.device
def test_cache_that_trusts_addresses_is_caught(adapter: str, tmp_path: Path) -> None:
    broken = changed(tmp_path, "cached, Cached(cache)", "cached, AddressOnly(cached)")
    finished = run("--device", adapter, program=broken)
    assert finished.returncode == 1, finished.stderr
    assert table(finished.stdout)["cache"][1] > 0
    assert "NOT reached: wrong bytes arrived from memory of the cache" in (
        finished.stdout
    )


@pytest.mark.device
def test_few_transfers_miss_the_target(adapter: str) -> None:
    """Each of four buffers has to be registered once."""
    finished = run("--device", adapter, "--transfers", "16")
    assert finished.returncode == 1, finished.stderr
    assert "NOT reached: the cache registered less than 10 times fewer" in (
        finished.stdout
    )


@pytest.mark.device
def test_unknown_adapter_is_named(adapter: str) -> None:
    finished = run("--device", "nonesuch")
    assert finished.returncode == 2
    assert finished.stderr == (
        f"{PROGRAM.name}: there is no RDMA adapter 'nonesuch'; there is: {adapter}\n"
    )


@pytest.mark.device
def test_interface_that_is_down_is_noticed(adapter: str) -> None:
    if adapter != "rxe-test":
        pytest.skip("nobody takes down an interface that others use")
    command("ip link set rdma-test down")
    try:
        finished = run("--device", adapter)
    finally:
        command("ip link set rdma-test up")
    assert finished.returncode == 2
    assert f"port 1 of the adapter {adapter} is not active" in finished.stderr


# --------------------------------------------------------------------------
# Transfers
# --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Example:
    spec = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PROGRAM.stem] = module
    spec.loader.exec_module(module)
    return module


def descriptors() -> set[str]:
    """Return the names of open descriptors, with one that reads the folder."""
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages(4) as pages:
        yield pages


@pytest.mark.device
@pytest.mark.anyio
async def test_transfers_under_way_at_once_do_not_mix(
    adapter: str, example: Example, pages: Pages
) -> None:
    places = 32
    size = pages.size // places
    verbs = example.load_verbs()
    messages = [bytes([place + 1]) * size for place in range(places)]
    async with example.open_link(verbs, adapter, places, size) as link:
        with memoryview(b"".join(messages)) as data:
            start, end = example.aioummu.address_range(data)
            registration = link.register(start, end)
            async with anyio.create_task_group() as tasks:
                for place in range(places):
                    message = start + place * size
                    tasks.start_soon(link.write, registration, message, size, place)
            registration.close()
        assert [link.received(size, place) for place in range(places)] == messages


@pytest.mark.device
@pytest.mark.anyio
async def test_cancelled_transfer_returns_when_the_adapter_is_done_with_the_memory(
    adapter: str, example: Example, pages: Pages
) -> None:
    verbs = example.load_verbs()
    async with example.open_link(verbs, adapter, 1, pages.size) as link:
        registration = link.register(pages.start, pages.end)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await link.write(registration, pages.start, pages.size, 0)
        assert link.received(pages.size, 0) == pages.read()
        registration.close()


@pytest.mark.device
@pytest.mark.anyio
async def test_transfer_beyond_the_registration_fails(
    adapter: str, example: Example, pages: Pages
) -> None:
    verbs = example.load_verbs()
    async with example.open_link(verbs, adapter, 1, PAGE) as link:
        registration = link.register(*pages.page(0))
        with pytest.raises(example.TransferError, match="work completion"):
            await link.write(registration, pages.start + 1, PAGE, 0)
        assert link.received(PAGE, 0) == bytes(PAGE)
        registration.close()


@pytest.mark.device
@pytest.mark.anyio
async def test_registration_holds_on_to_pages_that_are_freed(
    adapter: str, example: Example, pages: Pages
) -> None:
    """What the cache is for: without it nothing fails, and old bytes are sent."""
    verbs = example.load_verbs()
    async with example.open_link(verbs, adapter, 1, pages.size) as link:
        registration = link.register(pages.start, pages.end)
        before = pages.read()
        pages.map_over()
        assert pages.read() != before
        await link.write(registration, pages.start, pages.size, 0)
        assert link.received(pages.size, 0) == before
        registration.close()


@pytest.mark.device
@pytest.mark.anyio
async def test_unmapped_memory_cannot_be_registered(
    adapter: str, example: Example, pages: Pages
) -> None:
    verbs = example.load_verbs()
    pages.munmap()
    async with example.open_link(verbs, adapter, 1, PAGE) as link:
        with pytest.raises(example.UnusableError, match="cannot be registered"):
            link.register(pages.start, pages.end)


@pytest.mark.device
@pytest.mark.anyio
async def test_link_leaves_no_descriptor_behind(
    adapter: str, example: Example, pages: Pages
) -> None:
    verbs = example.load_verbs()

    async def fail() -> None:
        async with example.open_link(verbs, adapter, 1, pages.size) as link:
            registration = link.register(pages.start, pages.end)
            await link.write(registration, pages.start, pages.size, 0)
            registration.close()
            raise ZeroDivisionError

    before = descriptors()
    for _ in range(2):
        with pytest.raises(BaseExceptionGroup) as caught:
            await fail()
        assert caught.group_contains(ZeroDivisionError)
    assert descriptors() == before


# --------------------------------------------------------------------------
# Without any of it
# --------------------------------------------------------------------------


def test_missing_pyverbs_is_said_with_what_to_do(tmp_path: Path) -> None:
    program = changed(tmp_path, SYSTEM_PACKAGES, str(tmp_path))
    finished = run(program=program)
    assert finished.returncode == 2
    assert finished.stdout == ""
    first, *others = finished.stderr.splitlines()
    assert first.startswith(f"{PROGRAM.name}: pyverbs, the verbs API for Python, ")
    assert "sudo apt install python3-pyverbs" in others[0]


def test_pyverbs_of_another_python_is_said(tmp_path: Path) -> None:
    """Its package is there, and none of its modules can be loaded."""
    (tmp_path / "pyverbs").mkdir()
    (tmp_path / "pyverbs" / "__init__.py").touch()
    (tmp_path / "pyverbs" / "enums.cpython-27-x86_64-linux-gnu.so").touch()
    finished = run(program=changed(tmp_path, SYSTEM_PACKAGES, str(tmp_path)))
    assert finished.returncode == 2
    assert "No module named 'pyverbs.enums'" in finished.stderr
    running = ".".join(map(str, sys.version_info[:2]))
    assert f"the system's version of Python; this is {running}" in finished.stderr


@pytest.mark.skipif(
    not Path(SYSTEM_PACKAGES, "pyverbs").exists(),
    reason="there is no pyverbs: it is in Debian's python3-pyverbs",
)
def test_machine_without_an_adapter_is_told_how_to_make_one() -> None:
    if any(ADAPTERS.glob("*")):
        pytest.skip("there is an RDMA adapter on this machine")
    finished = run()
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith(f"{PROGRAM.name}: there is no RDMA adapter.\n")
    assert "sudo modprobe rdma_rxe\n" in finished.stderr
    assert "sudo rdma link add rxe0 type rxe netdev eth0\n" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--message", "4096", "--size", "8192"], "--message: must fit"),
        (["--transfers", "0"], "0: must be at least 1"),
        (["--backend", "other"], "invalid choice: 'other'"),
    ],
)
def test_senseless_arguments_are_refused(arguments: list[str], text: str) -> None:
    finished = run(*arguments)
    assert finished.returncode == 2
    assert text in finished.stderr


def test_help_says_what_the_three_ways_are() -> None:
    finished = run("--help")
    assert finished.returncode == 0
    for text in ("every time", "aioummu.RegistrationCache", "rdma link add", "--seed"):
        assert text in finished.stdout
