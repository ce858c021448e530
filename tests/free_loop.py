"""Fails what would block an event loop: opening files, databases, sleeping, looking up names."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BLOCKING = frozenset(
    {"open", "sqlite3.connect", "time.sleep", "socket.getaddrinfo", "os.listdir", "os.scandir",
     "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"}
)  # fmt: skip
UNAVOIDABLE = ("importlib", "linecache", "traceback")  # imports put off, and showing an error
_watching = 0


class BlockedError(BaseException):
    """Not an Exception, so that no handler of the code under test takes it."""


def _ours(frame: FrameType | None) -> bool:
    """Whether edgemoa is to blame."""
    found = False
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if any(part in name or part in frame.f_code.co_filename for part in UNAVOIDABLE):
            return False
        found = found or name.startswith("edgemoa.")
        frame = frame.f_back
    return found


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching or event not in BLOCKING or asyncio._get_running_loop() is None:
        return
    if _ours(sys._getframe(1)):
        raise BlockedError(f"{event}{arguments!r:.200} in the event loop")


@contextmanager
def free_loop() -> Iterator[None]:
    """Within it, edgemoa's code in an event loop's thread must not block."""
    global _watching  # noqa: PLW0603 - an audit hook cannot be taken away again, only be told
    if not hasattr(sys, "_edgemoa_free_loop"):
        sys.addaudithook(_hook)
        sys._edgemoa_free_loop = True  # type: ignore[attr-defined]
    _watching += 1
    try:
        yield
    finally:
        _watching -= 1
