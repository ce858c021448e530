"""What systemd and a service say to each other: readiness, the watchdog, sockets handed over.

The protocols of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3): a datagram, and
variables of the environment. Without systemd all of it does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Mapping
from typing import Final

from edgemoa.errors import StateError

log = logging.getLogger(__name__)

_FIRST_FD: Final = 3


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell systemd how this service is doing."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(lines).encode(), address.replace("@", "\0", 1))
        except OSError as error:
            log.warning("systemd was not reached", extra={"reason": error.strerror})


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """How often systemd wants to hear ``WATCHDOG=1``, at the latest; None if it does not watch."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6 or None


def listening_socket(environ: Mapping[str, str] = os.environ) -> socket.socket | None:
    """The Unix socket that systemd listens on for this service; None if there is none.

    :raises StateError: what was handed over is something else.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    given = environ.get("LISTEN_FDS", "")
    if given != "1" or not stat.S_ISSOCK(os.fstat(_FIRST_FD).st_mode):
        raise _wrong()
    found = socket.socket(fileno=_FIRST_FD)
    if found.family != socket.AF_UNIX or found.type != socket.SOCK_STREAM:
        found.detach()
        raise _wrong()
    found.set_inheritable(False)  # the model's process has no use for it
    found.setblocking(False)
    return found


def _wrong() -> StateError:
    return StateError(
        "systemd handed over something else than one listening Unix socket",
        hint="compare edgemoa.socket with the one that was installed",
    )
