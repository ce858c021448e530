"""Whom this board trusts, on the disk and in memory: the roster, and what is known of its boards.

The roster decides; the store keeps it. A change is planned first, which touches nothing, then
written down, and only then does it hold: after a power cut the board trusts whom it trusted before
or after, never something in between, and never acted on what it does not remember.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from edgemoa.core import limits
from edgemoa.core.messages import BoardId
from edgemoa.core.roster import REPLACE, REVOKE, Record, Roster
from edgemoa.net.identity import Identity, read_certificate
from edgemoa.store import FormerBoard, PairedBoard, Store, Trust

Update = Callable[[Roster], Roster]


@dataclass(frozen=True, slots=True)
class Plan:
    """A change that nobody has acted on yet.

    :param added: boards that are trusted by it, and were not.
    :param removed: boards that are not any more, with the record that says so, if one does.
    :param heirs: boards whose key is a removed one's new key, with the identity of that.
    :param said: records that are new.
    :param pinned: the certificates that count then; ``told`` those of former boards.
    """

    roster: Roster
    added: tuple[PairedBoard, ...]
    removed: tuple[tuple[BoardId, Record | None], ...]
    heirs: dict[BoardId, BoardId]
    said: tuple[bytes, ...]
    pinned: tuple[bytes, ...]
    told: tuple[bytes, ...]
    written: Trust
    former: dict[BoardId, FormerBoard]


class TrustKeeper:
    """See the module. Whoever changes something holds a lock meanwhile; :meth:`load` before
    anything else. Every method but the properties may block."""

    def __init__(self, identity: Identity, store: Store) -> None:
        self._identity = identity
        self._store = store
        self._roster = Roster(
            identity.board_id, identity.public_key, identity.sign, read_certificate
        )
        self._boards: dict[BoardId, PairedBoard] = {}
        self._former: dict[BoardId, FormerBoard] = {}

    @property
    def roster(self) -> Roster:
        """As it is now."""
        return self._roster

    @property
    def boards(self) -> list[PairedBoard]:
        """Everybody who is trusted, in the order of pairing."""
        return list(self._boards.values())

    @property
    def former(self) -> dict[BoardId, FormerBoard]:
        """Boards that were trusted once, as far as they were known here."""
        return self._former

    def load(self) -> None:
        """Read what was kept.

        Boards that were paired or revoked before there was a roster get their records now.

        :raises StateError, DiskFullError: if that cannot be done.
        """
        kept = self._store.trust()
        self._boards = {b.id: b for b in kept.boards}
        self._former = {b.id: b for b in kept.former}
        own = self._identity
        # Its certificate is checked once for each record that it comes in, and again in others.
        reader = functools.lru_cache(4 * limits.MAX_GROUP_BOARDS)(read_certificate)
        self._roster = Roster(
            own.board_id,
            own.public_key,
            own.sign,
            reader,
            kept.records,
            (b.id for b in kept.boards if b.direct),
        )

        def complete(roster: Roster) -> Roster:
            roster = roster.remembered(own.succession)
            for board in kept.boards:
                if board.id not in roster.entries:
                    roster = roster.admitted(board.certificate)
            for former in kept.former:
                if former.id not in roster.entries:
                    roster = roster.revoked(former.id)
            return roster

        self.keep(self.plan(complete))

    def plan(self, update: Update, known: Iterable[PairedBoard] = ()) -> Plan:
        """What would change.

        :param known: name and addresses of boards, in case that they are trusted then.
        :raises PairingError, ProtocolError: as ``update`` does.
        """
        before, after = self._roster, update(self._roster)
        hints = {board.id: board for board in known}
        trusted = after.trusted
        added, heirs, better = [], {}, []
        for board, record in trusted.items():
            old = self._boards.get(board)
            direct = board in after.direct
            if old is not None:
                if old.direct != direct:
                    better.append(replace(old, direct=direct))
                continue
            heard = hints.get(board)
            if record.kind == REPLACE and record.board in self._boards:
                heirs[board] = record.board
                heard = self._boards[record.board]
            name, addresses = (heard.name, heard.addresses) if heard else ("", ())
            added.append(
                PairedBoard(board, record.public_key, record.certificate, name, addresses, direct)
            )
        removed = tuple(
            (board, after.why_not(board)) for board in self._boards if board not in trusted
        )
        former = {
            board: FormerBoard(board, self._boards[board].certificate, self._boards[board].name)
            for board, _ in removed
        }
        for board, record in after.entries.items():  # revoked elsewhere, and never known here
            if record.kind == REVOKE and board != self._identity.board_id:
                former.setdefault(board, self._former.get(board) or FormerBoard(board))
        had, has = set(before.records), set(after.records)
        kept = {b: f for b, f in (self._former | former).items() if b not in trusted}
        while len(kept) > limits.MAX_GONE_BOARDS + limits.MAX_GROUP_BOARDS:
            del kept[next(iter(kept))]
        return Plan(
            after,
            tuple(added),
            removed,
            heirs,
            tuple(sorted(has - had)),
            tuple(r.certificate for r in trusted.values()),
            tuple(f.certificate for f in kept.values() if f.certificate),
            Trust(
                (*added, *better),
                tuple(f for f in former.values() if self._former.get(f.id) != f),
                tuple(has - had),
                tuple(had - has),
            ),
            kept,
        )

    def keep(self, plan: Plan) -> None:
        """Write the change down. It holds when this returns.

        :raises StateError, DiskFullError: if that cannot be done; then nothing has changed.
        """
        if plan.written != _NOTHING:
            self._store.change(plan.written)
        for board, _ in plan.removed:
            del self._boards[board]
        for known in plan.written.boards:
            self._boards[known.id] = known
        self._former = plan.former
        self._roster = plan.roster

    def seen(self, board: PairedBoard) -> None:
        """Remember what a board calls itself and where it was; a power cut may undo it."""
        if board.id in self._boards:
            self._boards[board.id] = replace(
                self._boards[board.id], name=board.name, addresses=board.addresses
            )
            self._store.seen(board.id, board.name, board.addresses)


_NOTHING: Final = Trust()
