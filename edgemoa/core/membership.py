"""Which paired boards are there, told by what is heard from them.

Any authenticated message is proof of presence; heartbeats make sure that there is one. A silent
board is first not picked (``suspect``), then not waited for (``gone``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from edgemoa.core.messages import Alive, BoardId, printable

HEARTBEAT_MS: Final = 1_000
SUSPECT_AFTER_MS: Final = 3_500  # three heartbeats lost
GONE_AFTER_MS: Final = 8_000
assert HEARTBEAT_MS * 3 < SUSPECT_AFTER_MS < GONE_AFTER_MS  # noqa: S101


class Presence(StrEnum):
    """What is believed of a paired board."""

    UNHEARD = "unheard"  # since this board started
    ALIVE = "alive"
    SUSPECT = "suspect"
    GONE = "gone"


_HEARD, _SILENT, _VERY_SILENT, _LEFT = "heard", "silent", "very silent", "left"

TRANSITIONS: Final[dict[tuple[Presence, str], Presence]] = {
    (Presence.UNHEARD, _HEARD): Presence.ALIVE,
    (Presence.ALIVE, _HEARD): Presence.ALIVE,
    (Presence.SUSPECT, _HEARD): Presence.ALIVE,
    (Presence.GONE, _HEARD): Presence.ALIVE,
    (Presence.ALIVE, _SILENT): Presence.SUSPECT,
    (Presence.SUSPECT, _SILENT): Presence.SUSPECT,
    (Presence.ALIVE, _VERY_SILENT): Presence.GONE,
    (Presence.SUSPECT, _VERY_SILENT): Presence.GONE,
    (Presence.ALIVE, _LEFT): Presence.GONE,
    (Presence.SUSPECT, _LEFT): Presence.GONE,
    (Presence.UNHEARD, _LEFT): Presence.GONE,
    (Presence.GONE, _LEFT): Presence.GONE,
}


@dataclass(slots=True)
class Peer:
    """A paired board as this one sees it."""

    board: BoardId
    name: str
    presence: Presence = Presence.UNHEARD
    heard_ms: int = 0
    report: Alive | None = None

    @property
    def usable(self) -> bool:
        """Whether it makes sense to ask it for a proposal."""
        return self.presence is Presence.ALIVE and self.report is not None and self.report.accepting


class Membership:
    """The table of paired boards."""

    def __init__(self) -> None:
        self._peers: dict[BoardId, Peer] = {}
        self.peers: Mapping[BoardId, Peer] = self._peers

    def pair(self, board: BoardId, name: str) -> None:
        """Know a board from now on."""
        self._peers.setdefault(board, Peer(board, name)).name = name

    def silence(self, board: BoardId) -> None:
        """Do not pick ``board`` any more, whatever was heard from it."""
        self.peers[board].report = None
        self._move(self.peers[board], _LEFT)

    def unpair(self, board: BoardId) -> None:
        """Forget a board."""
        self._peers.pop(board, None)

    def heard(self, board: BoardId, now_ms: int) -> None:
        """Something authentic came from ``board``."""
        peer = self.peers[board]
        peer.heard_ms = now_ms
        self._move(peer, _HEARD)

    def report(self, board: BoardId, report: Alive) -> bool:
        """Take a heartbeat; returns whether the board has restarted since the one before.

        An older report of the same boot, as a late datagram brings it, changes nothing. One of
        another boot is believed whatever its number (a storage image may have been rolled back):
        it came over a link, and links do not outlive the boot at their other end.
        """
        peer = self.peers[board]
        last = peer.report
        restarted = last is not None and report.boot != last.boot
        if last is not None and not restarted and report.sequence <= last.sequence:
            return False
        peer.report = report
        peer.name = printable(report.name) or peer.name
        return restarted

    def left(self, board: BoardId, boot: int) -> bool:
        """The board said good-bye; returns whether that was news (not a late one of last time)."""
        peer = self.peers[board]
        if peer.report is not None and boot != peer.report.boot:
            return False
        peer.report = None  # what else it said before it left does not make it usable again
        self._move(peer, _LEFT)
        return True

    def sweep(self, now_ms: int) -> list[BoardId]:
        """Believe the silence; returns the boards that are gone from now on."""
        gone = []
        for peer in self.peers.values():
            if peer.presence not in (Presence.ALIVE, Presence.SUSPECT):
                continue
            silent_ms = now_ms - peer.heard_ms
            if silent_ms >= GONE_AFTER_MS:
                self._move(peer, _VERY_SILENT)
                gone.append(peer.board)
            elif silent_ms >= SUSPECT_AFTER_MS:
                self._move(peer, _SILENT)
        return gone

    def usable(self) -> Sequence[BoardId]:
        """Boards to pick proposers from, in an order that does not depend on arrival."""
        return sorted(board for board, peer in self.peers.items() if peer.usable)

    def name(self, board: BoardId) -> str:
        """The board's name for people."""
        peer = self.peers.get(board)
        return (peer.name if peer else "") or board[:7]

    @staticmethod
    def _move(peer: Peer, event: str) -> None:
        peer.presence = TRANSITIONS[peer.presence, event]
