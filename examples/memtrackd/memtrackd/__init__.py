"""A daemon that tracks, live, what happens to the memory of programs that ask for it.

Programs use :func:`attach`; administrators run ``memtrackd``, see ``--help``.
"""

from memtrackd.client import AttachError, Region, Tracker, attach, default_socket
from memtrackd.protocol import MessageError

__all__ = [
    "AttachError",
    "MessageError",
    "Region",
    "Tracker",
    "attach",
    "default_socket",
]
