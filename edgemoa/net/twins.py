"""Two boards with one key: somebody copied a storage card.

A board has one boot epoch at a time, and never comes back to an earlier one. So a link of another
boot while the old link still answers is a second board's: it is refused. And if a boot comes back
that another one had taken the place of, nobody can tell which of the two is meant: both are
refused, until they have not both been seen for a while.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from edgemoa.net import wire
from edgemoa.net.link import Link

SECOND: Final = "another board with its key is linked: was its storage copied?"
BOTH: Final = "two boards use its key: was its storage copied? give one of them a new identity"
_REMEMBERED: Final = 8  # boots


class Twins:
    """What is known of one peer's boots."""

    def __init__(self, timings: wire.Timings) -> None:
        self._timings = timings
        self._boot: int | None = None  # the one that was linked last
        self._former: deque[int] = deque(maxlen=_REMEMBERED)
        self._refused_boot: int | None = None
        self._until = 0.0
        self._note: tuple[str, float] = ("", 0.0)

    @property
    def note(self) -> str:
        """What people should know; "" if nothing was noticed for a while."""
        what, until = self._note
        return what if asyncio.get_running_loop().time() < until else ""

    async def refusal(self, new: Link, current: Link | None) -> str:
        """Why a link is refused; "" if it is the board's, whose link it is from now on."""
        boot = new.hello.boot
        now = asyncio.get_running_loop().time()
        if self._until and now >= self._until:  # one of them is gone: whoever calls may come in
            self._until = 0.0
            self._former.clear()
        if now < self._until or boot in self._former:
            if now >= self._until or boot != self._refused_boot:
                self._until = now + self._timings.quarantine
                self._refused_boot = boot
                self._tell(BOTH)
            if current is not None:
                current.part(BOTH)
            return BOTH
        other = current is not None and current.hello.boot != boot
        if other and current is not None and await current.is_alive(self._timings.alive):
            self._tell(SECOND)
            return SECOND
        if self._boot not in (None, boot):
            self._former.append(self._boot)
        self._boot = boot
        return ""

    def _tell(self, what: str) -> None:
        self._note = (what, asyncio.get_running_loop().time() + self._timings.quarantine)
