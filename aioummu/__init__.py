"""Know when memory that you remember an address of changes its meaning.

Asynchronous notifications of munmap, mremap, madvise and the like, from the
ummunotify driver::

    async with aioummu.open_notifier() as notifier:
        with notifier.register(buffer) as region:
            async for event in notifier:
                match event:
                    case aioummu.Inval(region=hit, start=start, end=end): ...
                    case aioummu.Last(generation=generation): ...

Addresses and sizes are in bytes, ends are exclusive. Runs on asyncio, uvloop and
trio. :class:`Device` is the same without an event loop.
"""

from aioummu._device import DEFAULT_PATH, Device, DeviceLike, Page
from aioummu._errors import (
    BusyError,
    ClosedError,
    DeviceError,
    DevicePermissionError,
    DuplicateCookieError,
    ForeignDeviceError,
    ForkedError,
    InvalidBufferError,
    InvalidRangeError,
    NoDeviceError,
    ProcessGoneError,
    TooManyRegionsError,
    UmmunotifyError,
    UnknownCookieError,
)
from aioummu._notifier import Notifier, open_notifier
from aioummu._readiness import ReadinessKind
from aioummu._records import (
    HINT,
    INVAL,
    LAST,
    RECORD_SIZE,
    Event,
    Inval,
    Last,
    Record,
    decode,
    unpack,
)
from aioummu._regions import Region

__all__ = [
    "DEFAULT_PATH",
    "HINT",
    "INVAL",
    "LAST",
    "RECORD_SIZE",
    "BusyError",
    "ClosedError",
    "Device",
    "DeviceError",
    "DeviceLike",
    "DevicePermissionError",
    "DuplicateCookieError",
    "Event",
    "ForeignDeviceError",
    "ForkedError",
    "Inval",
    "InvalidBufferError",
    "InvalidRangeError",
    "Last",
    "NoDeviceError",
    "Notifier",
    "Page",
    "ProcessGoneError",
    "ReadinessKind",
    "Record",
    "Region",
    "TooManyRegionsError",
    "UmmunotifyError",
    "UnknownCookieError",
    "decode",
    "open_notifier",
    "unpack",
]
