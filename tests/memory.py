"""Real changes of real mappings, through the C library."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import TYPE_CHECKING

from aioummu import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

PAGE = mmap.PAGESIZE

MAP_FIXED = 0x10
MAP_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4
MADV_DONTNEED = mmap.MADV_DONTNEED
MADV_FREE = mmap.MADV_FREE
PROT_NONE = 0
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
IPC_PRIVATE = IPC_RMID = 0
IPC_CREAT = 0o1000
SHM_REMAP = 0o40000

_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_address, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc.mmap.argtypes = [_address, _size, _int, _int, _int, ctypes.c_long]
_libc.mmap.restype = _address
_libc.munmap.argtypes = [_address, _size]
_libc.mprotect.argtypes = [_address, _size, _int]
_libc.madvise.argtypes = [_address, _size, _int]
_libc.mlock.argtypes = [_address, _size]
_libc.munlock.argtypes = [_address, _size]
_libc.mremap.argtypes = [_address, _size, _size, _int, _address]
_libc.mremap.restype = _address
_libc.sbrk.argtypes = [ctypes.c_ssize_t]
_libc.sbrk.restype = _address
_libc.brk.argtypes = [_address]
_libc.shmget.argtypes = [_int, _size, _int]
_libc.shmat.argtypes = [_int, _address, _int]
_libc.shmat.restype = _address
_libc.shmdt.argtypes = [_address]
_libc.shmctl.argtypes = [_int, _int, _address]


#: Called around a change with what a kernel would tell: for devices that are none.
LISTENERS: list[Callable[[int, int, Cause], AbstractContextManager[None]]] = []


@contextlib.contextmanager
def _told(start: int, size: int, cause: Cause) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for listener in LISTENERS:
            stack.enter_context(listener(start, start + size, cause))
        yield


def _checked(result: int | None) -> int:
    if result in {-1, _FAILED} or result is None:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def sbrk(increment: int) -> int:
    """Grow the heap, and return where it ended before."""
    return _checked(_libc.sbrk(increment))


def brk(end: int) -> None:
    """End the heap here."""
    _checked(_libc.brk(end))


def shmat(count: int, *, over: int = 0) -> int:
    """Map some pages of System V shared memory, which go away with it."""
    number = _checked(_libc.shmget(IPC_PRIVATE, count * PAGE, IPC_CREAT | 0o600))
    try:
        start = _checked(_libc.shmat(number, over, SHM_REMAP if over else 0))
    finally:
        _checked(_libc.shmctl(number, IPC_RMID, None))
    ctypes.memset(start, 1, count * PAGE)
    return start


def shmdt(start: int) -> None:
    """Unmap System V shared memory."""
    _checked(_libc.shmdt(start))


class Pages:
    """Some pages of anonymous memory, written to, in a mapping of their own.

    Inaccessible neighbours keep the kernel from merging the mapping with another
    one, of which a change would then be a part. It is smaller than a huge page,
    whose splitting would invalidate everything around.
    """

    def __init__(self, count: int, *, touched: bool = True) -> None:
        self.size = count * PAGE
        self._reserved = self.size + 2 * PAGE
        self._base = _checked(
            _libc.mmap(0, self._reserved, PROT_NONE, MAP_PRIVATE_ANONYMOUS, -1, 0)
        )
        self.start = self._base + PAGE
        self.end = self.start + self.size
        self._map()
        if touched:
            self.write()

    def _map(self) -> None:
        self.mprotect(PROT_READ_WRITE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _checked(_libc.munmap(self._base, self._reserved))

    def page(self, number: int) -> tuple[int, int]:
        """Return the start and the end of one page."""
        return self.part(number, number + 1)

    def part(self, first: int, behind: int) -> tuple[int, int]:
        """Return the start and the end of some pages."""
        return self.start + first * PAGE, self.start + behind * PAGE

    def _range(self, part: tuple[int, int] | None) -> tuple[int, int]:
        start, end = part or (self.start, self.end)
        return start, end - start

    def read(self, part: tuple[int, int] | None = None) -> bytes:
        return ctypes.string_at(*self._range(part))

    def write(self, part: tuple[int, int] | None = None) -> None:
        ctypes.memset(*self._range(part)[:1], 1, self._range(part)[1])

    def munmap(self, part: tuple[int, int] | None = None) -> None:
        with _told(*self._range(part), Cause.UNMAP):
            _checked(_libc.munmap(*self._range(part)))

    def mprotect(self, protection: int, part: tuple[int, int] | None = None) -> None:
        with _told(*self._range(part), Cause.PROTECT_MAPPING):
            _checked(_libc.mprotect(*self._range(part), protection))

    def madvise(self, advice: int, part: tuple[int, int] | None = None) -> None:
        drops = advice in {MADV_DONTNEED, MADV_FREE}
        with contextlib.ExitStack() as stack:
            if drops:
                stack.enter_context(_told(*self._range(part), Cause.CLEAR))
            _checked(_libc.madvise(*self._range(part), advice))

    def map_over(self, part: tuple[int, int] | None = None) -> None:
        """Map new memory over the old."""
        flags = MAP_PRIVATE_ANONYMOUS | MAP_FIXED
        _checked(_libc.mmap(*self._range(part), PROT_READ_WRITE, flags, -1, 0))

    def shrink(self, count: int) -> None:
        _checked(_libc.mremap(self.start, self.size, count * PAGE, 0, 0))

    def grow(self, before: int, count: int) -> None:
        """Let the mapping of the first pages grow in place."""
        _checked(_libc.mremap(self.start, before * PAGE, count * PAGE, 0, 0))

    def move_to(self, other: Pages, *, keep: bool = False) -> None:
        """Move the pages over those of another, of the same size."""
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if keep else 0)
        _checked(_libc.mremap(self.start, self.size, self.size, flags, other.start))

    def lock_and_unlock(self) -> None:
        _checked(_libc.mlock(self.start, self.size))
        _checked(_libc.munlock(self.start, self.size))


class SharedPages(Pages):
    """Pages of a file in memory."""

    def _map(self) -> None:
        self.fd = os.memfd_create("pages")
        os.truncate(self.fd, self.size)
        flags = mmap.MAP_SHARED | MAP_FIXED
        _checked(_libc.mmap(*self._range(None), PROT_READ_WRITE, flags, self.fd, 0))
