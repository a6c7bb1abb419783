"""The scenes of the demo: real buffers, and what happens to their memory."""

from __future__ import annotations

import ctypes
import mmap
import zlib
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import attrs
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]

PAGE = mmap.PAGESIZE
#: So large that malloc() maps it, instead of carving it out of the heap.
LARGE = 40 << 20

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
LIBC.mmap.argtypes += [ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# The buffers. Each change of one returns what a program that had not been told would
# have got wrong.


class Mapped:
    """Memory straight from the kernel."""

    def __init__(self, pages: int = 64) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, pages * PAGE, flags=flags)
        self.memory[:] = b"data" * (len(self.memory) // 4)

    def write(self) -> str:
        """Use it as any memory is used."""
        self.memory[: 16 * PAGE] = bytes(16 * PAGE)
        return (
            "All is as the program knows it, and it learns that from one load, without "
            "a system call."
        )

    def drop(self) -> str:
        """Tell the kernel that some contents are not needed any more."""
        before = self.memory[16 * PAGE :][:4]
        self.memory.madvise(mmap.MADV_DONTNEED, 16 * PAGE, 8 * PAGE)
        after = self.memory[16 * PAGE :][:4]
        return (
            f"the program has cached that page 16 begins with {before!r}. It reads "
            f"{after!r} now, and a network card would still send the old page."
        )

    def halve(self) -> str:
        """Give the end of it back."""
        self.memory.resize(len(self.memory) // 2)
        return (
            "a pointer into the second half would crash the program, or hit whatever "
            "is mapped there next."
        )

    def close(self) -> str:
        """Give all of it back."""
        self.memory.close()
        return (
            "a network card that was given these addresses would write into pages "
            "that nobody reads any more."
        )

    def protect(self) -> str:
        """Let nobody write to some pages, as garbage collectors and debuggers do."""
        start = start_of(self.memory) + 8 * PAGE
        if LIBC.mprotect(start, 16 * PAGE, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
        return "a device goes on writing to pages that the program may only read."


class Enclosed(Mapped):
    """Memory that cannot grow where it is."""

    def __init__(self) -> None:
        super().__init__()
        enclose(self.memory)

    def grow(self) -> str:
        """Have the kernel find another place for it."""
        before = start_of(self.memory)
        self.memory.resize(2 * len(self.memory))
        return moved(before, start_of(self.memory))


class Bytes:
    """The most ordinary buffer of Python, but large."""

    def __init__(self) -> None:
        self.memory = bytearray(b"data") * (LARGE // 4)
        enclose(self.memory)

    def grow(self) -> str:
        """Append as much again: realloc() has the kernel move it."""
        before = start_of(self.memory)
        self.memory += bytes(LARGE)
        return moved(before, start_of(self.memory))

    def free(self) -> str:
        """Let go of it, so that the C library gives it back to the kernel."""
        self.memory = bytearray()
        return (
            "a task that has kept the address learns nothing of what another thread "
            "frees. It held Python's lock while the memory went: no Python code could "
            "have come in between."
        )


class Array:
    """A numpy array, whose address the next one gets."""

    def __init__(self) -> None:
        self.arrays = [np.ones(LARGE // 8)]

    @property
    def memory(self) -> Floats:
        """The array that is there now."""
        return self.arrays[0]

    def replace(self) -> str:
        """Free it, and make another one, as any loop over batches does."""
        start, cached = start_of(self.memory), zlib.crc32(self.memory.data)
        self.arrays.clear()
        self.arrays.append(array_at(start))
        return (
            f"the new array lies at {start:#x} as well. A cache that asks by address "
            f"would answer {cached:#010x} for its checksum, which is "
            f"{zlib.crc32(self.memory.data):#010x}."
        )

    def free(self) -> str:
        """Free the second one as well."""
        self.arrays.clear()
        return "the same again: an address has many lives, and each one ends."


def start_of(buffer: mmap.mmap | bytearray | Floats) -> int:
    """Return the address of the first byte, without keeping the buffer alive."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def array_at(start: int) -> Floats:
    """Return the first array that gets this address, which is free."""
    others: list[Floats] = []
    for _ in range(100):
        # The first one, unless another thread is faster.
        array = np.empty(LARGE // 8)
        if start_of(array) == start:
            array.fill(2)
            return array
        others.append(array)
    raise RuntimeError(f"no array gets the address {start:#x} again")


def moved(before: int, after: int) -> str:
    """Say what the move of a buffer spoils."""
    return (
        f"the data is at {after:#x} now. The pointer that the program has kept, "
        f"{before:#x}, leads to nothing."
    )


def enclose(buffer: mmap.mmap | bytearray) -> None:
    """Have something mapped right behind a buffer, if there is nothing yet."""
    # An address that is taken is no error: then the page is put elsewhere.
    behind = -(-(start_of(buffer) + len(buffer)) // PAGE) * PAGE
    LIBC.mmap(behind, PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


# The scenes.


class Buffer(Protocol):
    """Something with memory to watch."""

    @property
    def memory(self) -> mmap.mmap | bytearray | Floats:
        """What has the memory now."""
        ...


B = TypeVar("B", bound=Buffer)


@attrs.frozen
class Report:
    """What is to be reported of a change."""

    first: int = 0
    """The first page of the buffer that changes."""
    behind: int | None = None
    """The first page behind; without, the buffer's end."""
    exact: bool = True
    """Whether it is one invalidation, whose addresses the report then has."""


@attrs.frozen
class Step(Generic[B]):
    """One thing that happens to a buffer."""

    what: str
    change: Callable[[B], str]
    report: Report | None
    """What is reported; None: nothing, because addresses mean what they meant."""
    not_by: str = ""
    """The backend that reports nothing all the same, see docs/backends.md."""
    rearm: bool = False
    """Watch anew what is mapped there by now."""
    in_thread: bool = False

    def expected(self, backend: str) -> Report | None:
        """Return what this backend reports."""
        return None if backend == self.not_by else self.report


@attrs.frozen
class Scene(Generic[B]):
    """A buffer, and all that happens to it while it is watched."""

    name: str
    make: Callable[[], B]
    steps: Sequence[Step[B]]


SCENES: Sequence[Scene[Any]] = [
    Scene(
        "mmap",
        Mapped,
        [
            Step("is written to", Mapped.write, None),
            Step("drops pages 16 to 23: MADV_DONTNEED", Mapped.drop, Report(16, 24)),
            Step("is halved: mmap.resize()", Mapped.halve, Report(32)),
            Step("is closed: mmap.close()", Mapped.close, Report(0, 32)),
        ],
    ),
    Scene(
        "growing mmap",
        Enclosed,
        [
            Step(
                "has to move to grow: mmap.resize(), mremap()",
                Enclosed.grow,
                Report(exact=False),
            )
        ],
    ),
    Scene(
        "bytearray",
        Bytes,
        [Step("grows: bytearray +=, realloc()", Bytes.grow, Report(exact=False))],
    ),
    Scene(
        "shared bytearray",
        Bytes,
        [Step("is freed by another thread", Bytes.free, Report(), in_thread=True)],
    ),
    Scene(
        "numpy array",
        Array,
        [
            Step("is freed, and its address is used again", Array.replace, Report()),
            Step("is freed after region.rearm()", Array.free, Report(), rearm=True),
        ],
    ),
    Scene(
        "read-only mmap",
        Mapped,
        [
            Step(
                "may not be written to, pages 8 to 23: mprotect()",
                Mapped.protect,
                Report(8, 24),
                not_by="embedded",
            )
        ],
    ),
]
