"""The command ``memtrackd``."""

from __future__ import annotations

import sys
from functools import partial

import anyio

from memtrackd.config import ConfigError, load_config
from memtrackd.service import StartError, run

#: Seconds after which a thread lets another one have the GIL.
SWITCH_INTERVAL = 0.0005


def main() -> int:
    """Run the daemon.

    :returns: 0, or 2 if it cannot start
    """
    # Events do not wait for the thread that writes the metrics down.
    sys.setswitchinterval(SWITCH_INTERVAL)
    errors: list[BaseException] = []
    try:
        config = load_config()
        anyio.run(partial(run, config), backend_options={"use_uvloop": _has_uvloop()})
    except* (ConfigError, StartError) as group:
        errors += group.exceptions
    for error in errors:
        print(f"memtrackd: {error}", file=sys.stderr)
    return 2 if errors else 0


def _has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401, PLC0415 - if it is there
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
