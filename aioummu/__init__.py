"""Know when memory that you remember an address of changes its meaning.

Asynchronous notifications of munmap, mremap, madvise and the like, from the
ummunotify driver or, where that is not loaded, from an embedded backend::

    async with aioummu.open_notifier() as notifier:
        with notifier.register(buffer) as region:
            async for event in notifier:
                match event:
                    case aioummu.Inval(region=hit, start=start, end=end): ...
                    case aioummu.Last(generation=generation): ...

Addresses and sizes are in bytes, ends are exclusive. Runs on asyncio, uvloop and
trio. :class:`Device` and :class:`EmbeddedDevice` are the same without an event
loop.
"""

from aioummu._backends import Backend, open_device
from aioummu._cache import CacheStatistics, RegistrationCache
from aioummu._device import DEFAULT_PATH, Device, DeviceLike, Page
from aioummu._embedded import EmbeddedDevice
from aioummu._errors import (
    BusyError,
    ClosedError,
    DeviceError,
    DevicePermissionError,
    DuplicateCookieError,
    ForeignDeviceError,
    ForkedError,
    InvalidBufferError,
    InvalidCauseError,
    InvalidRangeError,
    NoBackendError,
    NoDeviceError,
    ProcessGoneError,
    RangeBusyError,
    SubinterpreterError,
    TooManyRegionsError,
    UmmunotifyError,
    UnknownCookieError,
    UnstableMemoryError,
    UnsupportedFeatureError,
    UnsupportedKernelError,
    UnwatchableRangeError,
)
from aioummu._notifier import Notifier, open_notifier
from aioummu._readiness import ReadinessKind
from aioummu._records import (
    HINT,
    INVAL,
    LAST,
    RECORD_SIZE,
    Cause,
    Event,
    Feature,
    Inval,
    Last,
    Record,
    cause_of,
    decode,
    unpack,
)
from aioummu._regions import Region, address_range

__all__ = [
    "DEFAULT_PATH",
    "HINT",
    "INVAL",
    "LAST",
    "RECORD_SIZE",
    "Backend",
    "BusyError",
    "CacheStatistics",
    "Cause",
    "ClosedError",
    "Device",
    "DeviceError",
    "DeviceLike",
    "DevicePermissionError",
    "DuplicateCookieError",
    "EmbeddedDevice",
    "Event",
    "Feature",
    "ForeignDeviceError",
    "ForkedError",
    "Inval",
    "InvalidBufferError",
    "InvalidCauseError",
    "InvalidRangeError",
    "Last",
    "NoBackendError",
    "NoDeviceError",
    "Notifier",
    "Page",
    "ProcessGoneError",
    "RangeBusyError",
    "ReadinessKind",
    "Record",
    "Region",
    "RegistrationCache",
    "SubinterpreterError",
    "TooManyRegionsError",
    "UmmunotifyError",
    "UnknownCookieError",
    "UnstableMemoryError",
    "UnsupportedFeatureError",
    "UnsupportedKernelError",
    "UnwatchableRangeError",
    "address_range",
    "cause_of",
    "decode",
    "open_device",
    "open_notifier",
    "unpack",
]
