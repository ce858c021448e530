"""A group's view of itself without messages: one table that all simulated boards share.

A real board keeps a :class:`~edgemoa.core.membership.Peer` for each other one, told by a report a
second while its work changes: a million messages a second for a thousand boards. Here a board's
report is looked up when another needs it: the one that it gave when its last whole interval ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, overload

from edgemoa.core.membership import Membership, Peer, Presence
from edgemoa.core.messages import Alive, BoardId, Message
from edgemoa.core.swim import Swim

_NOW: Final = 2**62  # for reports that are never old
_NEVER_MS: Final = 2**62

Report: TypeAlias = Callable[[int], Alive | None]
"""The last report of the board in that place."""


class Table:
    """All boards of a group, in order. ``report`` is asked whenever a board's entry is read."""

    def __init__(self, boards: Sequence[BoardId], report: Report) -> None:
        self.boards = tuple(boards)
        self.place = {board: i for i, board in enumerate(self.boards)}
        self.peers = [Peer(board, board, Presence.ALIVE, report_ms=_NOW) for board in self.boards]
        self.report = report


class _Others(Mapping[BoardId, Peer]):
    """The table as one of its boards sees it: without itself."""

    def __init__(self, table: Table, own: int) -> None:
        self._table = table
        self._own = own

    def __getitem__(self, board: BoardId) -> Peer:
        place = self._table.place[board]
        if place == self._own:
            raise KeyError(board)
        peer = self._table.peers[place]
        peer.report = self._table.report(place)
        return peer

    def __contains__(self, board: object) -> bool:
        place = self._table.place.get(board)  # type: ignore[call-overload]
        return place is not None and place != self._own

    def __iter__(self) -> Iterator[BoardId]:
        return iter(_AllBut(self._table.boards, self._own))

    def __len__(self) -> int:
        return len(self._table.boards) - 1


class _AllBut(Sequence[BoardId]):
    """A sequence without one of its items, and without a copy."""

    def __init__(self, boards: tuple[BoardId, ...], but: int) -> None:
        self._boards = boards
        self._but = but

    @overload
    def __getitem__(self, i: int) -> BoardId: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[BoardId]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[each] for each in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self._boards[i + (i >= self._but)]

    def __len__(self) -> int:
        return len(self._boards) - 1


class TableMembership(Membership):
    """The membership of one board of a table. Who is there is known and does not change."""

    def __init__(self, table: Table, own: int) -> None:
        super().__init__()
        self.peers = _Others(table, own)
        self._usable = _AllBut(table.boards, own)

    def usable(self) -> Sequence[BoardId]:
        """Everybody else."""
        return self._usable

    def name(self, board: BoardId) -> str:
        """Boards of a table are called by their ids."""
        return board


class TableSwim(Swim):
    """What a board of a table does to find out who is there: nothing."""

    def receive(self, sender: BoardId, message: Message, now_ms: int) -> bool:
        """Presence is known without."""
        return True

    def tick(self, now_ms: int) -> None:
        """Nobody falls silent."""

    def due_ms(self) -> int:
        """Never."""
        return _NEVER_MS

    def announce(self, now_ms: int) -> None:
        """The table says it."""

    def last_words(self) -> None:
        """Nobody leaves."""
