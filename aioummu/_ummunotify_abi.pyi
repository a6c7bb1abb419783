# What the compiled extension offers; built by _abi_build.py.

from typing import Any

class _Lib:
    UMMUNOTIFY_EXCHANGE_FEATURES: int
    UMMUNOTIFY_REGISTER_REGION: int
    UMMUNOTIFY_UNREGISTER_REGION: int
    UMMUNOTIFY_GENERATION_OFFSET: int
    UMMUNOTIFY_GENERATION_SIZE: int
    UMMUNOTIFY_EVENT_TYPE_INVAL: int
    UMMUNOTIFY_EVENT_TYPE_LAST: int
    UMMUNOTIFY_FEATURE_CAUSE: int
    UMMUNOTIFY_FEATURE_FILTER: int
    UMMUNOTIFY_FEATURE_STATE: int
    UMMUNOTIFY_FEATURE_ONCE: int
    UMMUNOTIFY_REGION_CAUSE_MASK: int
    UMMUNOTIFY_REGION_FLAG_ONCE: int
    UMMUNOTIFY_STATE_OFFSET: int
    UMMUNOTIFY_EVENT_FLAG_HINT: int
    UMMUNOTIFY_EVENT_CAUSE_UNMAP: int
    UMMUNOTIFY_EVENT_CAUSE_CLEAR: int
    UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING: int
    UMMUNOTIFY_EVENT_CAUSE_PROTECT_PAGE: int
    UMMUNOTIFY_EVENT_CAUSE_SOFT_DIRTY: int
    UMMUNOTIFY_EVENT_CAUSE_MIGRATE: int
    UMMUNOTIFY_EVENT_CAUSE_EXCLUSIVE: int
    UMMUNOTIFY_EVENT_CAUSE_END: int
    UMMUNOTIFY_EVENT_CAUSE_MOVE: int
    UMMUNOTIFY_EVENT_CAUSE_FOREIGN: int
    AIOUMMU_PLAIN_LOAD_IS_ACQUIRE: int
    F_SETOWN_EX: int
    F_OWNER_TID: int
    def ummunotify_load_state(self, states: object, slot: int, /) -> int: ...
    def aioummu_read_nowait(self, fd: int, buffer: object, size: int, /) -> int: ...
    def aioummu_signalfd(self, signals: object, count: int, /) -> int: ...

class _FFI:
    errno: int
    def cast(self, ctype: str, source: object, /) -> Any: ...
    def from_buffer(self, source: object, /) -> Any: ...
    def new(self, ctype: str, init: object = ..., /) -> Any: ...
    def release(self, cdata: object, /) -> None: ...
    def sizeof(self, ctype: str, /) -> int: ...
    def typeof(self, ctype: str, /) -> Any: ...

ffi: _FFI
lib: _Lib
