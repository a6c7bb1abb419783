"""Real changes of real mappings, through the C library."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PAGE = mmap.PAGESIZE

MAP_FIXED = 0x10
MAP_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MADV_DONTNEED = mmap.MADV_DONTNEED
MADV_FREE = mmap.MADV_FREE
PROT_NONE = 0
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_address, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc.mmap.argtypes = [_address, _size, _int, _int, _int, ctypes.c_long]
_libc.mmap.restype = _address
_libc.munmap.argtypes = [_address, _size]
_libc.mprotect.argtypes = [_address, _size, _int]
_libc.madvise.argtypes = [_address, _size, _int]
_libc.mremap.argtypes = [_address, _size, _size, _int, _address]
_libc.mremap.restype = _address


def _checked(result: int | None) -> int:
    if result in {-1, _FAILED} or result is None:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Pages:
    """Some pages of anonymous memory, written to, in a mapping of their own.

    Inaccessible neighbours keep the kernel from merging the mapping with another
    one, of which a change would then be a part. It is smaller than a huge page,
    whose splitting would invalidate everything around.
    """

    def __init__(self, count: int) -> None:
        self.size = count * PAGE
        self._reserved = self.size + 2 * PAGE
        self._base = _checked(
            _libc.mmap(0, self._reserved, PROT_NONE, MAP_PRIVATE_ANONYMOUS, -1, 0)
        )
        self.start = self._base + PAGE
        self.end = self.start + self.size
        self.mprotect(PROT_READ_WRITE)
        self.write()

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
        start = self.start + number * PAGE
        return start, start + PAGE

    def _range(self, part: tuple[int, int] | None) -> tuple[int, int]:
        start, end = part or (self.start, self.end)
        return start, end - start

    def write(self, part: tuple[int, int] | None = None) -> None:
        ctypes.memset(*self._range(part)[:1], 1, self._range(part)[1])

    def munmap(self, part: tuple[int, int] | None = None) -> None:
        _checked(_libc.munmap(*self._range(part)))

    def mprotect(self, protection: int, part: tuple[int, int] | None = None) -> None:
        _checked(_libc.mprotect(*self._range(part), protection))

    def madvise(self, advice: int, part: tuple[int, int] | None = None) -> None:
        _checked(_libc.madvise(*self._range(part), advice))

    def map_over(self, part: tuple[int, int] | None = None) -> None:
        """Map new memory over the old."""
        flags = MAP_PRIVATE_ANONYMOUS | MAP_FIXED
        _checked(_libc.mmap(*self._range(part), PROT_READ_WRITE, flags, -1, 0))

    def shrink(self, count: int) -> None:
        _checked(_libc.mremap(self.start, self.size, count * PAGE, 0, 0))

    def move_to(self, other: Pages) -> None:
        """Move the pages over those of another, of the same size."""
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        _checked(_libc.mremap(self.start, self.size, self.size, flags, other.start))
