from collections.abc import Awaitable
from typing import Any

class Entry:
    start: int
    end: int
    registration: Any
    page: Any
    index: int
    settled: int
    users: int
    hits: int
    stamp: int
    is_simple: bool

class Index:
    _is_pending: bool
    @property
    def _count(self) -> int: ...
    def _covering(self, start: int, end: int, /) -> Any: ...  # an Entry, or None
    def _within(self, start: int = ..., end: int = ..., /) -> list[Any]: ...
    def _insert(self, entry: Entry, /) -> None: ...
    def _remove(self, entry: Entry, /) -> None: ...

class Use:
    def __aenter__(self) -> Awaitable[Any]: ...
    def __aexit__(self, *arguments: object) -> Awaitable[None]: ...
    def _take(self, entry: Entry, /) -> None: ...
