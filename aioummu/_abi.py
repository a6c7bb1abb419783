"""The numbers and structures of the driver's interface, as Python objects.

Everything comes from the UAPI header, through the compiled extension.
"""

from struct import Struct

from aioummu._ummunotify_abi import ffi, lib

EXCHANGE_FEATURES = lib.UMMUNOTIFY_EXCHANGE_FEATURES
REGISTER_REGION = lib.UMMUNOTIFY_REGISTER_REGION
UNREGISTER_REGION = lib.UMMUNOTIFY_UNREGISTER_REGION

FLAG_ONCE = lib.UMMUNOTIFY_REGION_FLAG_ONCE
STATE_OFFSET = lib.UMMUNOTIFY_STATE_OFFSET

GENERATION_OFFSET = lib.UMMUNOTIFY_GENERATION_OFFSET
GENERATION_SIZE = lib.UMMUNOTIFY_GENERATION_SIZE

INVAL = lib.UMMUNOTIFY_EVENT_TYPE_INVAL
LAST = lib.UMMUNOTIFY_EVENT_TYPE_LAST
HINT = lib.UMMUNOTIFY_EVENT_FLAG_HINT


def struct_of(ctype: str) -> Struct:
    """Return the Struct that packs and unpacks a C structure without padding."""
    fields = [field for _, field in ffi.typeof(ctype).fields]
    codes = {4: "I", 8: "Q"}
    layout = Struct("=" + "".join(codes[ffi.sizeof(f.type.cname)] for f in fields))
    if layout.size != ffi.sizeof(ctype):  # pragma: no cover - a header with padding
        raise AssertionError(f"{ctype} is padded")
    return layout


#: What REGISTER_REGION takes: start, end, user_cookie, flags, reserved.
REGISTER = struct_of("struct ummunotify_register_ioctl")
#: What EXCHANGE_FEATURES takes and returns: a mask.
FEATURES = Struct("=I")
#: What UNREGISTER_REGION takes: a cookie.
COOKIE = Struct("=Q")
#: What read() returns: type, flags, hint_start, hint_end, user_cookie_counter.
EVENT = struct_of("struct ummunotify_event")
