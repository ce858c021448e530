"""Which paired boards are there: the table, and what moves a board from one state to another.

:mod:`edgemoa.core.swim` finds out and keeps this up to date; whatever authentic comes from a board
is proof of presence besides. A board that does not answer is first not picked (``suspect``), then
not waited for (``gone``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from edgemoa.core.messages import Alive, BoardId, printable


class Presence(StrEnum):
    """What is believed of a paired board."""

    UNHEARD = "unheard"  # since this board started
    ALIVE = "alive"
    SUSPECT = "suspect"
    GONE = "gone"


HEARD, SILENT, LOST = "heard", "silent", "lost"

TRANSITIONS: Final[dict[tuple[Presence, str], Presence]] = {
    **{(presence, HEARD): Presence.ALIVE for presence in Presence},
    **{(presence, LOST): Presence.GONE for presence in Presence},
    (Presence.ALIVE, SILENT): Presence.SUSPECT,
    (Presence.SUSPECT, SILENT): Presence.SUSPECT,
}


@dataclass(slots=True)
class Peer:
    """A paired board as this one sees it."""

    board: BoardId
    name: str
    presence: Presence = Presence.UNHEARD
    heard_ms: int = 0
    asked_ms: int = 0  # when this board last asked it whether it is there
    report: Alive | None = None
    report_ms: int = 0  # when that came: it stands until the next
    linked: bool = False  # whether messages can reach it
    mute: bool = False  # others reach it; it does not answer this board, link or no link
    left: bool = False  # it said good-bye, and has not been linked since
    boot: int = -1  # of its life that is known here; -1 for none
    incarnation: int = 0  # within that boot: how often it has contradicted a suspicion

    @property
    def there(self) -> bool:
        """Whether it is believed to run, by this board or for what others say."""
        return self.presence is Presence.ALIVE or self.presence is Presence.SUSPECT

    @property
    def usable(self) -> bool:
        """Whether it makes sense to ask it for a proposal."""
        return (
            self.presence is Presence.ALIVE
            and self.linked
            and not self.mute
            and self.report is not None
            and self.report.accepting
        )


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
        self.move(board, LOST)

    def unpair(self, board: BoardId) -> None:
        """Forget a board."""
        self._peers.pop(board, None)

    def linked(self, board: BoardId, boot: int) -> bool:
        """There is a link to ``board``, which proved which boot of it is at the other end.
        Returns whether it has restarted since it was known."""
        peer = self.peers[board]
        restarted = self.is_boot(board, boot)
        peer.linked, peer.left, peer.mute = True, False, False
        return restarted

    def unlinked(self, board: BoardId) -> None:
        """There is no link any more. That alone says nothing of the board."""
        self.peers[board].linked = False

    def heard(self, board: BoardId, now_ms: int) -> bool:
        """Something authentic came from ``board``, and so over a link. Returns False for what a
        board said before its good-bye and comes after it: that is not to be listened to."""
        peer = self.peers[board]
        if peer.left:
            return False
        peer.heard_ms = now_ms
        peer.linked = True
        self.move(board, HEARD)
        return True

    def vouched(self, board: BoardId) -> None:
        """Others say that ``board`` is there."""
        self.move(board, HEARD)

    def report(self, board: BoardId, report: Alive, now_ms: int) -> bool:
        """Take what a board says of itself; returns whether it has restarted since it was known.

        An older report of the same boot, as a late datagram brings it, changes nothing. One of
        another boot is believed whatever its number (a storage image may have been rolled back):
        it came over a link, and links do not outlive the boot at their other end.
        """
        peer = self.peers[board]
        restarted = self.is_boot(board, report.boot)
        last = peer.report
        if peer.left or (last is not None and report.sequence <= last.sequence):
            return restarted
        peer.report, peer.report_ms = report, now_ms
        peer.name = printable(report.name) or peer.name
        return restarted

    def left(self, board: BoardId, boot: int) -> bool:
        """The board said good-bye; returns whether that was news (not a late one of last time)."""
        peer = self.peers[board]
        if peer.left or peer.boot not in (-1, boot):
            return False
        peer.boot = boot
        peer.left = True
        peer.report = None  # what else it said before it left does not make it usable again
        self.move(board, LOST)
        return True

    def is_boot(self, board: BoardId, boot: int) -> bool:
        """It is this boot of ``board`` that is there now; returns whether that is a restart."""
        peer = self.peers[board]
        if peer.boot == boot:
            return False
        restarted = peer.boot >= 0
        peer.boot, peer.incarnation = boot, 0
        peer.report, peer.left = None, False
        return restarted

    def usable(self) -> Sequence[BoardId]:
        """Boards to pick proposers from, in an order that does not depend on arrival."""
        return sorted(board for board, peer in self.peers.items() if peer.usable)

    def name(self, board: BoardId) -> str:
        """The board's name for people."""
        peer = self.peers.get(board)
        return (peer.name if peer else "") or board[:7]

    def move(self, board: BoardId, event: str) -> None:
        """The board's next state; see :data:`TRANSITIONS`."""
        peer = self.peers[board]
        peer.presence = TRANSITIONS[peer.presence, event]
