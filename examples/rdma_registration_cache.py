"""RDMA from buffers that come and go: what a registration cache saves, and risks.

A network adapter reads memory by itself. So memory has to be registered with it
before: the kernel pins the pages, and the adapter notes which they are. That takes a
system call and more, for each transfer if nobody remembers. Who remembers by address
is wrong as soon as the program frees the memory: what is allocated at the same
address later has other pages, while the adapter still sends the old ones. Nothing
fails then; the bytes are wrong.

This program sends messages from buffers that it frees and allocates again, to itself,
over two connected queue pairs, and compares every byte that arrives. It does that
three times, with the same buffers and messages, taking turns:

    every time     registers each message before, and deregisters it afterwards
    cache          aioummu.RegistrationCache: remembers, and is told what is freed
    address only   remembers by address, and trusts it: what not to do

It prints for each how fast it was, how often memory was registered, and how many
bytes were wrong. To be reached: the cache registers 10 times less often than "every
time" and is faster, neither gets a byte wrong, and "address only" does (else this
would show nothing).

Needs an RDMA adapter and pyverbs. Soft-RoCE, in every Linux, makes an adapter of any
network interface (as root; Debian's packages are rdma-core, iproute2 and
python3-pyverbs)::

    modprobe rdma_rxe
    rdma link add rxe0 type rxe netdev eth0
    python examples/rdma_registration_cache.py

Exit status 1 if that is not reached, 2 if something is missing or fails.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.machinery
import importlib.util
import mmap
import os
import random
import statistics
import sys
import time
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    nullcontext,
)
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import anyio
import attrs

import aioummu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

# Nothing that comes from pyverbs has a type.
Verbs: TypeAlias = Any
MemoryRegion: TypeAlias = Any

PORT = 1
TIMES_FEWER = 10
# The three take turns, so that whatever else the machine does meets all of them.
ROUNDS = 50
# Of each task. How many transfers a buffer lives for, on average.
BUFFERS = 4
TRANSFERS_OF_A_BUFFER = 30
# What freed memory leaves behind in the heap stays registered until it is needed for
# others: pinned memory is to be limited.
MOST_REGISTRATIONS = 256


class UnusableError(Exception):
    """RDMA can't be used here. The message says what to do."""


# --------------------------------------------------------------------------
# pyverbs
# --------------------------------------------------------------------------

# Debian's packages of Python modules are here, seen by the system's Python only.
SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"

MODULES = {
    "addr": ("AHAttr", "GlobalRoute"),
    "cq": ("CQ", "CompChannel"),
    "device": ("Context", "get_device_list"),
    "mr": ("MR",),
    "pd": ("PD",),
    "pyverbs_error": ("PyverbsError", "PyverbsRDMAError"),
    "qp": ("QP", "QPAttr", "QPCap", "QPInitAttr"),
    "wr": ("SGE", "SendWR"),
}


def load_verbs() -> Verbs:
    """Import pyverbs, and return what is used of it.

    :raises UnusableError: if it isn't there, or is one for another Python
    """
    try:
        if importlib.util.find_spec("pyverbs") is None:
            import_system_package("pyverbs")
        verbs = SimpleNamespace(enums=importlib.import_module("pyverbs.enums"))
        for module, names in MODULES.items():
            loaded = importlib.import_module(f"pyverbs.{module}")
            vars(verbs).update({name: getattr(loaded, name) for name in names})
    except ImportError as error:
        running = ".".join(map(str, sys.version_info[:2]))
        raise UnusableError(
            f"pyverbs, the verbs API for Python, cannot be imported ({error}).\n"
            "  On Debian: sudo apt install python3-pyverbs\n"
            f"  It works with the system's version of Python; this is {running}."
        ) from error
    return verbs


def import_system_package(name: str) -> None:
    """Import a package of the system's Python in a virtual environment.

    That package and no other: nothing is added to the path.
    """
    spec = importlib.machinery.PathFinder.find_spec(name, [SYSTEM_PACKAGES])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no module {name}, nor in {SYSTEM_PACKAGES}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def choose_device(verbs: Verbs, wanted: str | None) -> str:
    """Return the name of the wanted adapter, or of the first one.

    :raises UnusableError: if there is none
    """
    try:
        names = [device.name.decode() for device in verbs.get_device_list()]
    except verbs.PyverbsRDMAError:
        # So says libibverbs where the kernel has no RDMA at all.
        names = []
    if not names:
        raise UnusableError(
            "there is no RDMA adapter.\n"
            "  Soft-RoCE makes one of a network interface, eth0 for instance:\n"
            "    sudo modprobe rdma_rxe\n"
            "    sudo rdma link add rxe0 type rxe netdev eth0"
        )
    if wanted is not None and wanted not in names:
        raise UnusableError(
            f"there is no RDMA adapter {wanted!r}; there is: {', '.join(names)}"
        )
    return wanted or names[0]


def open_context(verbs: Verbs, name: str) -> Any:  # noqa: ANN401
    """Open an adapter whose port is up.

    :raises UnusableError: if that isn't so
    """
    try:
        context = verbs.Context(name=name)
    except verbs.PyverbsRDMAError as error:
        raise UnusableError(
            f"the adapter {name} cannot be opened: {error}\n"
            "  Whoever uses it needs to read and write /dev/infiniband/uverbs*."
        ) from error
    if context.query_port(PORT).state != verbs.enums.IBV_PORT_ACTIVE:
        context.close()
        raise UnusableError(
            f"port {PORT} of the adapter {name} is not active: is its network "
            "interface up?\n  rdma link show; sudo ip link set eth0 up"
        )
    return context


# --------------------------------------------------------------------------
# Transfers
# --------------------------------------------------------------------------


class TransferError(Exception):
    """The adapter did not do what it was asked for."""


class Link:
    """Two connected queue pairs of this process, and the memory to write to.

    What one of them sends, the other writes into the target memory. The adapter
    tells of what it has done by a file descriptor, so that any number of transfers
    can be under way while one event loop waits for all of them.
    """

    def __init__(self, verbs: Verbs, name: str, places: int, size: int) -> None:
        """Connect.

        :param places: how many transfers can be under way, each to its own place
        :param size: how large each place is
        """
        self._verbs = verbs
        self._places, self._size = places, size
        self._numbers = count(1)
        self._waiting: dict[int, anyio.Event] = {}
        self._failed: dict[int, str] = {}
        self._listening = anyio.CancelScope(shield=True)
        with ExitStack() as stack:
            self._context = stack.enter_context(open_context(verbs, name))
            self._pd = stack.enter_context(verbs.PD(self._context))
            self._channel, self._fd = self._open_channel()
            stack.enter_context(self._channel)
            self._cq = stack.enter_context(
                verbs.CQ(self._context, places, None, self._channel, 0)
            )
            # Events are for completions that come after they were asked for.
            self._cq.req_notify()
            self._sender, receiver = (
                stack.enter_context(self._new_queue_pair()) for _ in range(2)
            )
            self._connect(self._sender, receiver)
            self._connect(receiver, self._sender)
            enums = verbs.enums
            access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            self._target = stack.enter_context(
                verbs.MR(self._pd, places * size, access)
            )
            # All of it is closed in reverse order.
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close everything; registrations of others must have gone before."""
        self._stack.close()

    def _open_channel(self) -> tuple[Any, int]:
        """Open the completion channel, and find its file descriptor.

        pyverbs has it and doesn't show it.
        """
        before = event_descriptors()
        channel = self._verbs.CompChannel(self._context)
        (fd,) = event_descriptors() - before
        os.set_blocking(fd, False)
        return channel, fd

    def _new_queue_pair(self) -> Any:  # noqa: ANN401
        verbs = self._verbs
        wanted = verbs.QPInitAttr(
            qp_type=verbs.enums.IBV_QPT_RC,
            scq=self._cq,
            rcq=self._cq,
            cap=verbs.QPCap(max_send_wr=self._places, max_recv_wr=1),
            sq_sig_all=1,
        )
        state = verbs.QPAttr(port_num=PORT)
        state.qp_access_flags = verbs.enums.IBV_ACCESS_REMOTE_WRITE
        return verbs.QP(self._pd, wanted, state)

    def _connect(self, pair: Any, other: Any) -> None:  # noqa: ANN401
        verbs, port = self._verbs, self._context.query_port(PORT)
        route = verbs.GlobalRoute(
            dgid=self._context.query_gid(PORT, 0), sgid_index=0, hop_limit=1
        )
        state = verbs.QPAttr(port_num=PORT)
        state.qp_access_flags = verbs.enums.IBV_ACCESS_REMOTE_WRITE
        state.ah_attr = verbs.AHAttr(
            port_num=PORT, is_global=1, gr=route, dlid=port.lid
        )
        state.path_mtu = port.active_mtu
        state.dest_qp_num = other.qp_num
        state.max_rd_atomic = state.max_dest_rd_atomic = 1
        # Numbers of packets; any will do. Times are codes: 14 is 67 ms, and 7 of
        # them may pass without an answer.
        state.rq_psn = state.sq_psn = 0
        state.timeout, state.retry_cnt = 14, 7
        state.min_rnr_timer, state.rnr_retry = 12, 7
        pair.to_rts(state)

    def register(self, start: int, end: int) -> MemoryRegion:
        """Register memory to send from."""
        try:
            # 0: the adapter may only read it.
            return self._verbs.MR(self._pd, end - start, 0, address=start)
        except self._verbs.PyverbsRDMAError as error:
            raise UnusableError(
                f"{end - start:,} bytes cannot be registered: {error}\n"
                "  Pinned memory is limited by `ulimit -l`, and by the adapter."
            ) from error

    async def write(
        self, source: MemoryRegion, start: int, size: int, place: int
    ) -> None:
        """Write a message of registered memory into a place of the target.

        The adapter may read the memory until this has returned; cancelling it does
        not end that, and so waits for it.

        :raises TransferError: if it could not be written
        """
        verbs = self._verbs
        number = next(self._numbers)
        part = verbs.SGE(start, size, source.lkey)
        request = verbs.SendWR(
            wr_id=number,
            num_sge=1,
            sg=[part],
            opcode=verbs.enums.IBV_WR_RDMA_WRITE,
        )
        request.set_wr_rdma(self._target.rkey, self._target.buf + place * self._size)
        done = self._waiting[number] = anyio.Event()
        self._sender.post_send(request)
        with anyio.CancelScope(shield=True):
            await done.wait()
        if number in self._failed:
            raise TransferError(f"a transfer failed: {self._failed.pop(number)}")

    def received(self, size: int, place: int) -> bytes:
        """Return what is in a place of the target."""
        data: bytes = self._target.read(size, place * self._size)
        return data

    async def listen(self) -> None:
        """Wake up those whose transfers are done, until stop() is called."""
        try:
            with self._listening:
                while True:
                    await anyio.wait_readable(self._fd)
                    if self._take_event():
                        # Asked for before the look: what is done after it makes a
                        # new event.
                        self._cq.req_notify()
                        self._take_completions()
        finally:
            # Whoever waits still would wait for ever.
            for number in list(self._waiting):
                self._end(number, "nobody listens any more")

    def stop(self) -> None:
        """End listen()."""
        self._listening.cancel()

    def _take_event(self) -> bool:
        try:
            self._channel.get_cq_event(self._cq)
        except self._verbs.PyverbsRDMAError as error:
            if error.error_code != errno.EAGAIN:
                raise
            return False
        self._cq.ack_events(1)
        return True

    def _take_completions(self) -> None:
        _, completions = self._cq.poll(self._places)
        for completion in completions:
            failed = completion.status != self._verbs.enums.IBV_WC_SUCCESS
            reason = f"work completion status {completion.status}" if failed else None
            self._end(completion.wr_id, reason)

    def _end(self, number: int, failed: str | None) -> None:
        if failed is not None:
            self._failed[number] = failed
        self._waiting.pop(number).set()


def event_descriptors() -> set[int]:
    """Return the file descriptors by which adapters tell of events."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()) == "anon_inode:[infinibandevent]":
                found.add(int(entry.name))
        except FileNotFoundError:
            # The one that read the folder.
            continue
    return found


@asynccontextmanager
async def open_link(
    verbs: Verbs, name: str, places: int, size: int
) -> AsyncIterator[Link]:
    """Connect two queue pairs; at the end of the block they are closed."""
    with ExitStack() as stack:
        link = Link(verbs, name, places, size)
        stack.callback(link.close)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.listen)
            try:
                yield link
            finally:
                link.stop()


# --------------------------------------------------------------------------
# The program's buffers
# --------------------------------------------------------------------------


@attrs.frozen
class Buffer:
    """Memory that the program has allocated, and will free."""

    memory: mmap.mmap | bytearray
    start: int
    end: int

    @classmethod
    def allocate(cls, size: int, *, mapped: bool) -> Buffer:
        """Allocate a buffer: a mapping of its own, or memory of the C heap.

        The kernel hears of a mapping that is freed, and gives its address to the
        next one that fits. The heap keeps small blocks that are freed, and gives the
        same pages out again: those stay registered, and may.
        """
        memory = mmap.mmap(-1, size) if mapped else bytearray(size)
        # Written to, so that all its pages are there. A page that came later, or in
        # place of the common page of zeros, would be a change of the mapping, while
        # it is registered at that: the cache would have to begin again.
        memory[:] = b"\xff" * size
        return cls(memory, *aioummu.address_range(memory))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    def write(self, offset: int, data: bytes) -> None:
        """Put a message into the buffer."""
        self.memory[offset : offset + len(data)] = data

    def free(self) -> None:
        """Unmap a mapping at once; the heap's are freed with the last reference."""
        if isinstance(self.memory, mmap.mmap):
            self.memory.close()


# --------------------------------------------------------------------------
# Three ways to come by a registration
# --------------------------------------------------------------------------


class Registrations(Protocol):
    """Gives out registrations for the time of a transfer."""

    def get(
        self, buffer: Buffer, start: int, end: int
    ) -> AbstractAsyncContextManager[MemoryRegion]:
        """Return a registration that has this part of a buffer in it."""
        ...


@attrs.define
class Registrar:
    """Registers memory with the adapter, and counts."""

    link: Link
    made: int = 0

    def register(self, start: int, end: int) -> MemoryRegion:
        """Register memory."""
        registration = self.link.register(start, end)
        self.made += 1
        return registration

    def deregister(self, registration: MemoryRegion) -> None:
        """Unpin memory."""
        registration.close()


@attrs.frozen
class EveryTime:
    """Registers what is sent, each time it is sent."""

    registrar: Registrar

    def get(self, _buffer: Buffer, start: int, end: int) -> SingleUse:
        """Register the message, and nothing else of the buffer."""
        return SingleUse(self.registrar, start, end)


@attrs.define
class SingleUse:
    """A registration for one transfer."""

    registrar: Registrar
    start: int
    end: int
    _registration: MemoryRegion = None

    async def __aenter__(self) -> MemoryRegion:
        self._registration = self.registrar.register(self.start, self.end)
        return self._registration

    async def __aexit__(self, *_error: object) -> None:
        self.registrar.deregister(self._registration)


@attrs.frozen
class Cached:
    """Has aioummu remember the registrations, of whole buffers."""

    cache: aioummu.RegistrationCache[MemoryRegion]

    def get(
        self, buffer: Buffer, _start: int, _end: int
    ) -> AbstractAsyncContextManager[MemoryRegion]:
        """Return the buffer's registration, made now unless it is known and true."""
        return self.cache.get(buffer.start, buffer.end)


@attrs.define
class AddressOnly:
    """Remembers registrations of whole buffers by address: wrong, see above."""

    registrar: Registrar
    _known: dict[int, MemoryRegion] = attrs.field(factory=dict)
    _all: list[MemoryRegion] = attrs.field(factory=list)

    def get(
        self, buffer: Buffer, _start: int, _end: int
    ) -> AbstractAsyncContextManager[MemoryRegion]:
        """Return what was registered at that address once, if it is large enough."""
        registration = self._known.get(buffer.start)
        if registration is None or registration.length < buffer.size:
            registration = self.registrar.register(buffer.start, buffer.end)
            self._known[buffer.start] = registration
            self._all.append(registration)
        return nullcontext(registration)

    def close(self) -> None:
        """Deregister all that was ever registered."""
        for registration in self._all:
            self.registrar.deregister(registration)


# --------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------


@attrs.frozen
class Options:
    """What the command line says."""

    transfers: int = 2000
    size: int = 65536
    message: int = 1024
    tasks: int = 8
    seed: int = 1
    backend: aioummu.Backend = "auto"
    device: str | None = None


@attrs.define
class Worker:
    """A task that sends messages from buffers of its own.

    Which buffer, when it is renewed and what is sent depends on the seed and the
    number of the worker only.
    """

    number: int
    options: Options
    link: Link
    registrations: Registrations
    wrong: int = 0
    _random: random.Random = attrs.field(init=False)
    _noise: bytes = attrs.field(init=False)
    _buffers: list[Buffer] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(f"{self.options.seed} {self.number}")  # noqa: S311
        self._noise = self._random.randbytes(2 * self.options.message)
        self._buffers = [self._allocate() for _ in range(BUFFERS)]

    async def send(self, transfers: int) -> None:
        """Send messages, and compare what arrived."""
        for _ in range(transfers):
            await self._send_one()

    async def _send_one(self) -> None:
        choice = self._random.randrange(BUFFERS)
        if self._random.random() < 1 / TRANSFERS_OF_A_BUFFER:
            self._renew(choice)
        buffer = self._buffers[choice]
        message = self._compose()
        offset = self._random.randrange(buffer.size - len(message) + 1)
        buffer.write(offset, message)
        start = buffer.start + offset
        end = start + len(message)
        async with self.registrations.get(buffer, start, end) as registration:
            await self.link.write(registration, start, len(message), self.number)
        received = self.link.received(len(message), self.number)
        if received != message:
            difference = int.from_bytes(received) ^ int.from_bytes(message)
            equal = difference.to_bytes(len(message)).count(0)
            self.wrong += len(message) - equal

    def _compose(self) -> bytes:
        """Return a message like no other."""
        size = self.options.message
        head = self._random.randbytes(8)[:size]
        offset = self._random.randrange(size)
        return head + self._noise[offset : offset + size - len(head)]

    def _allocate(self) -> Buffer:
        size = self.options.size >> self._random.randrange(3)
        return Buffer.allocate(size, mapped=self._random.random() < 0.5)  # noqa: PLR2004

    def _renew(self, choice: int) -> None:
        """Free a buffer, and allocate another."""
        self._buffers.pop(choice).free()
        self._buffers.insert(choice, self._allocate())


@attrs.define
class Run:
    """One of the three, and how it fared."""

    name: str
    registrar: Registrar
    workers: list[Worker]
    transfers: int = 0
    seconds: list[float] = attrs.field(factory=list)

    @property
    def wrong(self) -> int:
        """How many bytes arrived that were not sent."""
        return sum(worker.wrong for worker in self.workers)

    @property
    def rate(self) -> float:
        """Transfers per second, with all that belongs to them."""
        return self.transfers / sum(self.seconds)

    def times_as_fast(self, other: Run) -> float:
        """Compare round by round; what disturbed a few of them is left out."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    async def send(self, transfers: int) -> None:
        """Send so many messages more."""
        began = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for worker, share in zip(
                self.workers, shares(transfers, len(self.workers)), strict=True
            ):
                tasks.start_soon(worker.send, share)
        self.seconds.append(time.perf_counter() - began)
        self.transfers += transfers


def shares(whole: int, parts: int) -> Iterator[int]:
    """Divide a number into parts that differ by one at most."""
    return (
        whole * (part + 1) // parts - whole * part // parts for part in range(parts)
    )


def make_run(
    name: str, options: Options, registrar: Registrar, registrations: Registrations
) -> Run:
    workers = [
        Worker(number, options, registrar.link, registrations)
        for number in range(options.tasks)
    ]
    return Run(name, registrar, workers)


@attrs.frozen
class Outcome:
    """How the three fared."""

    device: str
    backend: str
    every_time: Run
    cached: Run
    address_only: Run
    statistics: aioummu.CacheStatistics


async def compare(verbs: Verbs, options: Options) -> Outcome:
    """Do all three, in turns."""
    device = choose_device(verbs, options.device)
    async with AsyncExitStack() as stack:
        notifier = await stack.enter_async_context(
            aioummu.open_notifier(backend=options.backend)
        )
        link = await stack.enter_async_context(
            open_link(verbs, device, options.tasks, options.message)
        )
        every_time, cached, address_only = (Registrar(link) for _ in range(3))
        cache = await stack.enter_async_context(
            aioummu.RegistrationCache(
                notifier,
                cached.register,
                cached.deregister,
                max_count=MOST_REGISTRATIONS,
            )
        )
        by_address = AddressOnly(address_only)
        stack.callback(by_address.close)
        runs = [
            make_run("every time", options, every_time, EveryTime(every_time)),
            make_run("cache", options, cached, Cached(cache)),
            make_run("address only", options, address_only, by_address),
        ]
        rounds = min(ROUNDS, options.transfers)
        for number, transfers in enumerate(shares(options.transfers, rounds)):
            turn = number % len(runs)
            for run in runs[turn:] + runs[:turn]:
                await run.send(transfers)
        first, second, third = runs
        return Outcome(device, notifier.backend, first, second, third, cache.statistics)


# --------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------


def failures(outcome: Outcome) -> list[str]:
    """Return what was to be reached, and was not."""
    every_time, cached = outcome.every_time, outcome.cached
    checks = {
        f"the cache registered less than {TIMES_FEWER} times fewer": (
            cached.registrar.made * TIMES_FEWER > every_time.registrar.made
        ),
        "the cache was not faster": cached.times_as_fast(every_time) <= 1,
        "wrong bytes arrived from memory registered every time": every_time.wrong > 0,
        "wrong bytes arrived from memory of the cache": cached.wrong > 0,
        "no wrong byte arrived with addresses only: this run shows nothing": (
            outcome.address_only.wrong == 0
        ),
    }
    return [text for text, failed in checks.items() if failed]


def report(options: Options, outcome: Outcome) -> list[str]:
    """Print the table; return what was not reached."""
    every_time, cached = outcome.every_time, outcome.cached
    print(
        f"{options.transfers:,} messages of {options.message:,} bytes by "
        f"{options.tasks} tasks, buffers up to {options.size:,} bytes,\n"
        f"seed {options.seed}, adapter {outcome.device}, {outcome.backend} backend\n\n"
        f"{'':14}{'transfers/s':>12}{'registrations':>15}{'wrong bytes':>13}"
    )
    for run in (every_time, cached, outcome.address_only):
        print(f"{run.name:14}{run.rate:12,.0f}{run.registrar.made:15,}{run.wrong:13,}")
    counts = outcome.statistics
    fewer = every_time.registrar.made / cached.registrar.made
    faster = cached.times_as_fast(every_time)
    print(
        f"\ncache: {counts.hits:,} hits, {counts.misses:,} misses, "
        f"{counts.invalidations:,} invalidations, {counts.discarded:,} discarded\n"
        f"cache: {fewer:.1f} times fewer registrations, {faster:.2f} times as fast"
    )
    failed = failures(outcome)
    print("\n".join(f"NOT reached: {text}" for text in failed) or "reached")
    return failed


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    defaults = Options()
    head, _, tail = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head,
        epilog=tail,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, least: int, text: str) -> None:
        def number(value: str) -> int:
            if int(value) < least:
                raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
            return int(value)

        default = getattr(defaults, name)
        text += " (default: %(default)s)"
        parser.add_argument(
            f"--{name}", type=number, metavar="N", default=default, help=text
        )

    add("transfers", 1, "how many messages each of the three sends")
    add("size", 4, "bytes of the largest buffers; others have half or a quarter")
    add("message", 1, "bytes of a message, which comes from anywhere in a buffer")
    add("tasks", 1, "how many tasks send at once")
    add("seed", 0, "which buffers and messages; a number for each sequence")
    parser.add_argument(
        "--backend",
        choices=("auto", "driver", "embedded"),
        default=defaults.backend,
        help="who tells the cache what is freed (default: %(default)s)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="the RDMA adapter (default: the first one)"
    )
    options = Options(**vars(parser.parse_args(arguments)))
    if options.message > options.size >> 2:
        parser.error("--message: must fit the smallest buffers, a quarter of --size")
    return options


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Return the errors in groups of errors of tasks."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    program = Path(__file__).name
    errors: list[BaseException] = []
    try:
        outcome = anyio.run(compare, load_verbs(), options)
    except* (UnusableError, TransferError, aioummu.UmmunotifyError) as group:
        errors = list(leaves(group))
    if errors:
        print(f"{program}: {errors[0]}", file=sys.stderr)
        return 2
    return 1 if report(options, outcome) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
