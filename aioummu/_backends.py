"""The choice between the driver and the embedded backend."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal, TypeAlias

from aioummu._device import ALL_FEATURES, DEFAULT_PATH, Device
from aioummu._embedded import EmbeddedDevice
from aioummu._errors import DeviceError, NoBackendError

if TYPE_CHECKING:
    import os

    from aioummu._records import Feature

Backend: TypeAlias = Literal["auto", "driver", "embedded"]


def open_device(
    backend: Backend = "auto",
    path: str | os.PathLike[str] | None = None,
    *,
    features: Feature = ALL_FEATURES,
) -> Device | EmbeddedDevice:
    """Open a device of the wanted backend.

    :param backend: ``"auto"`` prefers the driver, and takes the embedded backend
        where the driver cannot be used
    :param path: the driver's device, if not the usual one; never embedded then
    :param features: what to ask the driver for, see :class:`Device`
    :raises NoBackendError: if neither can be used
    :raises DeviceError: if the wanted one cannot be used
    :raises SubinterpreterError: if that is because this is not the main interpreter
    """
    match backend:
        case "auto" if path is None:
            return _open_any(features)
        case "auto" | "driver":
            return Device(DEFAULT_PATH if path is None else path, features=features)
        case "embedded" if path is None:
            return EmbeddedDevice()
        case "embedded":
            raise ValueError("path is the driver's: leave it out, or backend")
        case _:
            raise ValueError(
                f"backend is 'auto', 'driver' or 'embedded', not {backend!r}"
            )


def _open_any(features: Feature) -> Device | EmbeddedDevice:
    try:
        return Device(features=features)
    except DeviceError as error:
        driver_error = error
    try:
        return EmbeddedDevice()
    except DeviceError as error:
        raise NoBackendError(
            error.errno or errno.ENODEV,
            f"no backend can be used. The driver: {driver_error.strerror}. The "
            f"embedded one: {error.strerror}. See 'python -m aioummu doctor'",
        ) from error
