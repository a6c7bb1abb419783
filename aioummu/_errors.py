"""Everything that this library raises by itself.

::

    UmmunotifyError
    +-- DeviceError (OSError)               the system refused; errno says why
    |   +-- NoDeviceError (FileNotFoundError)
    |   +-- DevicePermissionError (PermissionError)
    |   +-- ForeignDeviceError
    |   +-- UnsupportedKernelError
    |   +-- UnsupportedFeatureError
    |   +-- NoBackendError
    |   +-- TooManyRegionsError
    |   +-- UnwatchableRangeError
    |   +-- RangeBusyError
    |   +-- ProcessGoneError (ProcessLookupError)
    +-- ClosedError (anyio.ClosedResourceError)
    +-- BusyError (anyio.BusyResourceError)
    +-- ForkedError (RuntimeError)
    +-- SubinterpreterError (RuntimeError)
    +-- InvalidBufferError (BufferError)
    +-- InvalidRangeError (ValueError)
    +-- InvalidCauseError (ValueError)
    +-- UnstableMemoryError (RuntimeError)
    +-- DuplicateCookieError (ValueError)
    +-- UnknownCookieError (KeyError)

Each message says what is wrong and what to do about it.
"""

import anyio


class UmmunotifyError(Exception):
    """Base class of every error that the library raises by itself."""


class DeviceError(UmmunotifyError, OSError):
    """The device refused; ``errno`` says why."""


class NoDeviceError(DeviceError, FileNotFoundError):
    """There is no such device: the driver is not loaded."""


class DevicePermissionError(DeviceError, PermissionError):
    """The device or system call is there, but this user may not use it."""


class ForeignDeviceError(DeviceError):
    """The device does not speak the ummunotify interface."""


class UnsupportedKernelError(DeviceError):
    """The kernel is too old or lacks what the embedded backend is made of."""


class UnsupportedFeatureError(DeviceError):
    """The device cannot do what was asked for; its ``features`` say what it can."""


class NoBackendError(DeviceError):
    """Neither the driver nor the embedded backend can be used here."""


class TooManyRegionsError(DeviceError):
    """The limit of regions per open device is reached (ENOSPC)."""


class UnwatchableRangeError(DeviceError):
    """The embedded backend cannot watch what is mapped there, if anything is."""


class RangeBusyError(DeviceError):
    """Another userfaultfd owns the mapping, so the embedded backend can't (EBUSY)."""


class ProcessGoneError(DeviceError, ProcessLookupError):
    """The watched process has ended or called exec (ESRCH)."""


class ClosedError(UmmunotifyError, anyio.ClosedResourceError):
    """The device or notifier was closed, possibly while a task waited on it."""


class BusyError(UmmunotifyError, anyio.BusyResourceError):
    """Another task is waiting for the same notifier's events."""

    def __init__(self) -> None:
        Exception.__init__(
            self,
            "another task is already waiting for events of this notifier; "
            "let one task receive and hand out, or open a notifier for each",
        )


class ForkedError(UmmunotifyError, RuntimeError):
    """A forked child used what its parent opened.

    The parent's memory is watched, also through the child's copy.
    """


class SubinterpreterError(UmmunotifyError, RuntimeError):
    """The embedded backend serves the main interpreter of a process only."""


class InvalidBufferError(UmmunotifyError, BufferError):
    """The buffer is empty or is not one contiguous block of memory."""


class InvalidRangeError(UmmunotifyError, ValueError):
    """The range of addresses is empty, inverted or outside of 64 bits."""


class InvalidCauseError(UmmunotifyError, ValueError):
    """The causes are none that a region can ask for."""


class UnstableMemoryError(UmmunotifyError, RuntimeError):
    """The memory changed whenever it was about to be registered."""


class DuplicateCookieError(UmmunotifyError, ValueError):
    """The cookie names another region already."""


class UnknownCookieError(UmmunotifyError, KeyError):
    """The cookie names no region."""

    def __str__(self) -> str:
        # KeyError shows the repr() of its argument, which suits keys only.
        return Exception.__str__(self)
