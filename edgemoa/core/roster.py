"""Whom the group trusts: signed records that spread from board to board.

Pure: records in, a new roster out. A record says one thing about one board, under the signature of
a board that says so: *admit* it (with its certificate), *revoke* it, or *replace* its key by a new
one, which both keys sign. Of each board the record of the highest version counts; of two of the
same version the one that takes trust away; else the one with the larger bytes. So boards that have
heard the same come to the same roster, in whatever order they heard it.

A record is believed if its signer is trusted when it arrives, and stays believed while that is so.
When a signer is revoked, what it said is settled anew. A board that the revoker itself knows, or
that this one has proved itself to directly, is admitted again under another signature; who was
only vouched for by the revoked one is trusted no longer. Revocations stay, whoever
made them. Of two boards that revoke each other unheard, everybody believes the first one heard.

A :class:`Roster` is never changed in place: whoever keeps it writes the new one down, and only then
uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgpack
import msgspec

from edgemoa.core import envelope, limits
from edgemoa.core.messages import BoardId, printable
from edgemoa.errors import PairingError, ProtocolError

ADMIT: Final = "admit"
REVOKE: Final = "revoke"
REPLACE: Final = "replace"

REVOKE_STEP: Final = 1000  # by how much a revocation's version is above what it revokes
REPLACE_STEP: Final = 100  # a new key's at most; a thief of the old one could outrun a revocation
_MAX_VERSION: Final = 2**53 - 1

_SIGNED_PREFIX: Final = b"edgemoa/roster/v1/"

Version = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
_Id = Annotated[
    str,
    msgspec.Meta(min_length=envelope.BOARD_ID_CHARACTERS, max_length=envelope.BOARD_ID_CHARACTERS),
]
_Certificate = Annotated[bytes, msgspec.Meta(max_length=limits.MAX_CERTIFICATE_BYTES)]
_Signature = Annotated[
    bytes,
    msgspec.Meta(min_length=envelope.SIGNATURE_BYTES, max_length=envelope.SIGNATURE_BYTES),
]

Signer = Callable[[bytes], bytes]
"""Ed25519 signature, 64 bytes, of what it is given."""

ReadCertificate = Callable[[bytes], bytes]
"""The raw public key in a certificate that may be pinned; raises ProtocolError if it is none."""


class _Record(msgspec.Struct, array_like=True, frozen=True):
    kind: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    payload: bytes
    signature: _Signature
    new_signature: Annotated[bytes, msgspec.Meta(max_length=envelope.SIGNATURE_BYTES)] = b""


class _Admit(msgspec.Struct, array_like=True, frozen=True):
    version: Version
    by: _Id
    certificate: _Certificate
    name: Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_BYTES)]


class _Revoke(msgspec.Struct, array_like=True, frozen=True):
    version: Version
    by: _Id
    board: _Id


class _Replace(msgspec.Struct, array_like=True, frozen=True):
    version: Version
    by: _Id
    certificate: _Certificate


_records = msgspec.msgpack.Decoder(_Record)
_admits = msgspec.msgpack.Decoder(_Admit)
_revokes = msgspec.msgpack.Decoder(_Revoke)
_replaces = msgspec.msgpack.Decoder(_Replace)


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it was read. Its signature has not been checked.

    :param by: who says so; with REPLACE the board whose key is replaced.
    :param board: about whom; with REPLACE the same as ``by``.
    :param successor: with REPLACE the identity that follows from the new key, else "".
    :param public_key: of the board that is trusted by it; empty with REVOKE.
    :param name: what people want it to be called; "" leaves that to the board.
    :param data: the record, as it is kept and passed on.
    """

    kind: str
    version: int
    by: BoardId
    board: BoardId
    successor: BoardId
    certificate: bytes
    public_key: bytes
    name: str
    data: bytes
    payload: bytes
    signature: bytes
    new_signature: bytes

    @property
    def rank(self) -> tuple[int, bool, bytes]:
        """Of two records about a board the one of the higher rank counts."""
        return self.version, self.kind != ADMIT, self.data

    def trusts(self, board: BoardId) -> bool:
        """Whether ``board`` is to be trusted, if this record is the one about it that counts."""
        return board == (self.successor if self.kind == REPLACE else self.board) and (
            self.kind != REVOKE
        )

    def signed_by(self, public_key: bytes) -> bool:
        """Whether that key signed it, and with REPLACE the new key, too."""
        signed = _to_sign(self.kind, self.payload)
        if not envelope.Author.from_key(public_key).signed(self.signature, signed):
            return False
        return self.kind != REPLACE or envelope.Author.from_key(self.public_key).signed(
            self.new_signature, signed
        )


def read(data: bytes, read_certificate: ReadCertificate) -> Record | None:
    """The record in ``data``; None if it is of a kind that a newer board added.

    :raises ProtocolError: if it is malformed.
    """
    if len(data) > limits.MAX_RECORD_BYTES:
        raise ProtocolError("roster record over the size limit")
    record = envelope.decode(_records, data, "roster record")
    certificate, public_key, name, successor = b"", b"", "", BoardId("")
    what: _Admit | _Revoke | _Replace
    match record.kind:
        case "admit":
            what = envelope.decode(_admits, record.payload, "roster record")
            certificate, name = what.certificate, printable(what.name)
            public_key = read_certificate(certificate)
            board = envelope.board_id(public_key)
        case "revoke":
            what = envelope.decode(_revokes, record.payload, "roster record")
            board = envelope.check_board_id(what.board)
        case "replace":
            what = envelope.decode(_replaces, record.payload, "roster record")
            certificate = what.certificate
            public_key = read_certificate(certificate)
            board, successor = envelope.check_board_id(what.by), envelope.board_id(public_key)
            if board == successor:
                raise ProtocolError("not a valid roster record")
        case _:
            return None
    by = envelope.check_board_id(what.by)
    sizes = {0} if record.kind != REPLACE else {envelope.SIGNATURE_BYTES}
    # A board that spoke for itself could put itself beyond any revocation.
    if len(record.new_signature) not in sizes or (record.kind == ADMIT and board == by):
        raise ProtocolError("not a valid roster record")
    return Record(
        record.kind,
        what.version,
        by,
        board,
        successor,
        certificate,
        public_key,
        name,
        data,
        record.payload,
        record.signature,
        record.new_signature,
    )


def write_replace(
    old: BoardId, old_signer: Signer, certificate: bytes, new_signer: Signer, version: int
) -> bytes:
    """A record that replaces a board's key by the one in ``certificate``."""
    payload: bytes = msgpack.packb([version, old, certificate])
    signed = _to_sign(REPLACE, payload)
    data: bytes = msgpack.packb([REPLACE, payload, old_signer(signed), new_signer(signed)])
    return data


class Roster:
    """See the module.

    :param own: this board, ``public_key`` its key, and ``signer`` what signs with it.
    :param records: what was kept of an earlier roster of this board's: believed as it is.
    :param direct: boards that proved themselves to this one, without anybody's word for it.
    """

    def __init__(  # noqa: PLR0917
        self,
        own: BoardId,
        public_key: bytes,
        signer: Signer,
        read_certificate: ReadCertificate,
        records: Iterable[bytes] = (),
        direct: Iterable[BoardId] = (),
    ) -> None:
        self._own = own
        self._public_key = public_key
        self._signer = signer
        self._read_certificate = read_certificate
        self._entries: dict[BoardId, Record] = {}
        self._direct = frozenset(direct)
        self._remember(records)

    # --- what it says

    @property
    def entries(self) -> Mapping[BoardId, Record]:
        """The record that counts, by board. One that replaces a key stands under both."""
        return self._entries

    @property
    def direct(self) -> frozenset[BoardId]:
        """Boards that proved themselves to this one."""
        return self._direct

    def trusts(self, board: BoardId) -> bool:
        """Whether that other board is trusted."""
        record = self._entries.get(board)
        return record is not None and board != self._own and record.trusts(board)

    @property
    def trusted(self) -> dict[BoardId, Record]:
        """Every other board that is trusted, with the record that says so."""
        return {b: r for b, r in self._entries.items() if b != self._own and r.trusts(b)}

    @property
    def gone(self) -> dict[BoardId, Record]:
        """Every other board that must not be trusted, with the record that says so."""
        return {b: r for b, r in self._entries.items() if b != self._own and not r.trusts(b)}

    def why_not(self, board: BoardId) -> Record | None:
        """The record by which a board must not be trusted; None if there is none."""
        record = self._entries.get(board)
        return None if record is None or record.trusts(board) else record

    @property
    def known(self) -> list[bytes]:
        """The :func:`envelope.key_id` of every board that is trusted, and this one's."""
        keys = [self._public_key, *(r.public_key for r in self.trusted.values())]
        return sorted(envelope.key_id(key) for key in keys)

    @property
    def records(self) -> list[bytes]:
        """All of it, to be kept or told, in an order that is always the same."""
        return sorted({r.data for r in self._entries.values()})

    @property
    def digest(self) -> bytes:
        """Two rosters with the same records have the same, and no others: 32 bytes."""
        hashed = hashlib.sha256()
        for data in self.records:
            hashed.update(hashlib.sha256(data).digest())
        return hashed.digest()

    # --- what this board says itself

    def admitted(self, certificate: bytes) -> Roster:
        """With a board that proved itself to this one. It is trusted even if it was revoked.

        :raises PairingError: if the group is full, or it is this board itself.
        """
        board = envelope.board_id(self._read_certificate(certificate))
        if board == self._own:
            raise PairingError("a board does not pair with itself")
        new = self._copy()
        if not self.trusts(board):
            if not self._has_place():
                raise PairingError(f"the group is full ({limits.MAX_GROUP_BOARDS} boards)")
            new._admit(certificate, "", self._version(board) + 1)
        new._direct |= {board}
        return new

    def revoked(self, board: BoardId) -> Roster:
        """Without that board, here and for everybody who hears of it."""
        new = self._copy()
        new._revoke(board)
        new._settle()
        return new

    def renamed(self, board: BoardId, name: str) -> Roster:
        """With another name for a trusted board; "" has it called as it calls itself."""
        new = self._copy()
        certificate = self._entries[board].certificate
        new._admit(certificate, name, self._version(board) + 1)
        return new

    def vouched(self, known: Iterable[bytes]) -> Roster:
        """With admissions signed by this board, of boards that it trusts and another does not.

        The other one trusts this one, has heard everything, and yet cannot believe some of it: of
        each board only one record counts, and its signer may be one that it does not trust.

        :param known: the :func:`envelope.key_id` of those that it trusts, and its own.
        """
        known = set(known)
        new = self._copy()
        for board, record in self.trusted.items():
            if envelope.key_id(record.public_key) not in known:
                new._admit(record.certificate, record.name, self._version(board) + 1)
        return new

    def remembered(self, records: Iterable[bytes]) -> Roster:
        """With records that this board kept elsewhere, and believes as they are."""
        new = self._copy()
        new._remember(records)
        return new

    # --- what others say

    def merged(self, heard: Iterable[bytes]) -> Roster:
        """With whatever is new and to be believed in what was heard; itself if nothing is.

        :raises ProtocolError: if a record is malformed, or its signature is wrong: no board that
            keeps to the protocol passes such a one on.
        """
        known = {r.data for r in self._entries.values()}
        pending = [
            record
            for data in dict.fromkeys(heard)
            if data not in known and (record := read(data, self._read_certificate)) is not None
        ]
        pending.sort(key=lambda r: r.rank)
        new = self._copy()
        while True:
            more = new._believe([r for r in pending if r.kind != REVOKE])
            # Who revokes is judged before any of these revocations counts: the order in which
            # boards were revoked is not the order in which one hears of it.
            revocations = [r for r in pending if r.kind == REVOKE and new._may_say(r)]
            for record in revocations:
                more |= new._take(record)
            new._settle()
            if not more:
                return self if new._entries == self._entries else new

    def _believe(self, records: Iterable[Record]) -> bool:
        """Take what trusted boards say, and what those say who become trusted by that; returns
        whether there was any news."""
        taken, any_taken = True, False
        while taken:
            taken = False
            for record in records:
                if self._may_say(record):
                    taken |= self._take(record)
            any_taken |= taken
        return any_taken

    def _may_say(self, record: Record) -> bool:
        return record.by == self._own or self.trusts(record.by)

    def _take(self, record: Record) -> bool:
        """Let a record of a trusted signer count, if it is news; returns whether it is."""
        known = self._entries.get(record.board)
        if known is not None and known.rank >= record.rank:
            return False
        if record.kind == REPLACE and record.version > self._version(record.by) + REPLACE_STEP:
            return False
        if not self._has_room(record):
            return False
        own = record.by == self._own
        key = self._public_key if own else self._entries[record.by].public_key
        if not record.signed_by(key):
            raise ProtocolError("roster record with a wrong signature")
        self._put(record)
        return True

    # --- inside

    def _copy(self) -> Roster:
        new = Roster(self._own, self._public_key, self._signer, self._read_certificate)
        new._entries = dict(self._entries)
        new._direct = self._direct
        return new

    def _remember(self, records: Iterable[bytes]) -> None:
        for data in records:
            record = read(data, self._read_certificate)
            if record is not None:
                self._put(record)

    def _version(self, board: BoardId) -> int:
        known = self._entries.get(board)
        return 0 if known is None else known.version

    def _has_place(self) -> bool:
        return len(self.trusted) < limits.MAX_GROUP_BOARDS - 1

    def _has_room(self, record: Record) -> bool:
        """Whether the tables take one more; who is trusted can always be revoked."""
        if record.board == self._own:
            return True
        if record.kind == ADMIT:
            return self.trusts(record.board) or self._has_place()
        gone = self.gone
        if record.board in gone or len(gone) < limits.MAX_GONE_BOARDS:
            return True
        if not self.trusts(record.board):  # anybody trusted can make up boards to revoke
            return False
        del self._entries[min(gone, key=lambda b: self._entries[b].rank)]
        return True

    def _put(self, record: Record) -> None:
        """Have a record count, if none of a higher rank does."""
        known = self._entries.get(record.board)
        if known is not None and known.rank >= record.rank:
            return
        self._entries[record.board] = record
        if record.kind == REVOKE:
            self._direct -= {record.board}
            # It has changed its key, and whoever revoked it had not heard: the board is meant.
            at = record.board
            while known is not None and known.kind == REPLACE and known.board == at:
                at = known.successor
                known = self._entries.get(at)
            if at != record.board and self.trusts(at):
                self._revoke(at)
        elif record.kind == REPLACE:
            heir = self._entries.get(record.successor)
            if heir is None or heir.rank < record.rank:
                self._entries[record.successor] = record
            if record.board in self._direct:
                self._direct = self._direct - {record.board} | {record.successor}

    def _admit(self, certificate: bytes, name: str, version: int) -> None:
        self._say(ADMIT, [version, self._own, certificate, name])

    def _revoke(self, board: BoardId) -> None:
        """Versions of admissions grow by one. So this one counts, too, where somebody says a few
        things about the board before he hears of it."""
        version = min(self._version(board) + REVOKE_STEP, _MAX_VERSION)
        self._say(REVOKE, [version, self._own, board])

    def _say(self, kind: str, payload: list[Any]) -> None:
        data: bytes = msgpack.packb(payload)
        packed: bytes = msgpack.packb([kind, data, self._signer(_to_sign(kind, data))])
        record = read(packed, self._read_certificate)
        assert record is not None  # noqa: S101 - of a kind that is known
        self._put(record)

    def _settle(self) -> None:
        """See to what was said by boards that are trusted no longer."""
        changed = True
        while changed:
            changed = False
            for board, record in list(self._entries.items()):
                if board == self._own or self._may_say(record):
                    continue
                signer = self._entries.get(record.by)
                if signer is not None and signer.kind == REPLACE:
                    continue  # it was trusted when it said that
                revoker = signer.by if signer is not None else None
                if record.kind == REVOKE:
                    if revoker == self._own:
                        self._revoke(board)
                elif board in self._direct or revoker in (self._own, board):
                    self._admit(record.certificate, record.name, record.version + 1)
                    changed = True
                else:
                    del self._entries[board]
                    changed = True


def _to_sign(kind: str, payload: bytes) -> bytes:
    return _SIGNED_PREFIX + kind.encode() + b"\0" + payload
