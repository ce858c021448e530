"""The roster: what is believed, what spreads, and what a thief cannot do with a key."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence

import msgpack
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoa.core import envelope, limits, roster
from edgemoa.core.messages import BoardId
from edgemoa.core.roster import ADMIT, REPLACE, REVOKE, Roster
from edgemoa.errors import PairingError, ProtocolError
from edgemoa.net.identity import make_certificate, read_certificate


class Board:
    """A board with its key and its roster."""

    def __init__(self, name: str) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
        self.public_key = self.key.public_key().public_bytes_raw()
        self.id = envelope.board_id(self.public_key)
        certificate = make_certificate(self.key)
        self.certificate = certificate.public_bytes(serialization.Encoding.DER)
        self.roster = self.fresh()

    def fresh(self) -> Roster:
        return Roster(self.id, self.public_key, self.key.sign, read_certificate)

    def pair(self, other: Board) -> None:
        self.roster = self.roster.admitted(other.certificate)
        other.roster = other.roster.admitted(self.certificate)

    def revoke(self, other: Board) -> None:
        self.roster = self.roster.revoked(other.id)

    def hear(self, *others: Board) -> None:
        """As over links: everything, then what is still missing."""
        for other in others:
            self.roster = self.roster.merged(other.roster.records)
            if self.id in other.trusts and other.trusts - self.trusts - {self.id}:
                other.roster = other.roster.vouched(self.roster.known)
                self.roster = self.roster.merged(other.roster.records)

    def says(self, kind: str, *payload: object, key: Board | None = None) -> bytes:
        """A record by hand, as a thief of this board's key writes it."""
        data = msgpack.packb(list(payload))
        signed = b"edgemoa/roster/v1/" + kind.encode() + b"\0" + data
        signatures = [self.key.sign(signed)] + ([key.key.sign(signed)] if key else [])
        return bytes(msgpack.packb([kind, data, *signatures]))

    @property
    def trusts(self) -> set[BoardId]:
        return set(self.roster.trusted)


def boards(count: int, prefix: str = "board") -> list[Board]:
    return [Board(f"{prefix}{n}") for n in range(count)]


def gossip(members: Sequence[Board], chance: random.Random | None = None) -> None:
    """Everybody tells everybody, until nobody has news for anybody."""
    while True:
        before = [m.roster.digest for m in members]
        pairs = list(itertools.permutations(members, 2))
        if chance is not None:
            chance.shuffle(pairs)
        for a, b in pairs:
            a.hear(b)
        if before == [m.roster.digest for m in members]:
            return


def group(count: int) -> list[Board]:
    """A chain of pairings: each board with the one before it."""
    members = boards(count)
    for a, b in itertools.pairwise(members):
        a.pair(b)
    gossip(members)
    return members


def agree(members: Sequence[Board]) -> bool:
    return len({m.roster.digest for m in members}) == 1


def test_one_pairing_makes_a_board_known_to_all() -> None:
    a, b, c = group(3)
    d = Board("newcomer")
    c.pair(d)
    gossip([a, b, c, d])
    assert agree([a, b, c, d])
    for one in (a, b, c, d):
        assert one.trusts == {x.id for x in (a, b, c, d)} - {one.id}
    assert a.roster.entries[d.id].by == c.id
    assert a.roster.direct == {b.id}


def test_two_groups_become_one() -> None:
    left, right = boards(4, "left"), boards(3, "right")
    for members in (left, right):
        for a, b in itertools.pairwise(members):
            a.pair(b)
        gossip(members)
    left[0].pair(right[2])
    gossip([*left, *right])
    assert agree([*left, *right])
    assert all(len(m.trusts) == 6 for m in (*left, *right))


def test_a_stranger_is_not_believed() -> None:
    a, b = group(2)
    stranger, accomplice = boards(2, "stranger")
    stranger.pair(accomplice)
    stranger.revoke(b)
    before = a.roster
    a.hear(stranger, accomplice)
    assert a.roster is before


def test_a_revocation_reaches_all_and_one_that_was_off() -> None:
    a, b, c, d = group(4)
    c.revoke(b)
    for member in (a, b):  # "d" is off
        member.hear(c)
    assert a.roster.why_not(b.id) is not None
    assert b.trusts == {a.id, c.id, d.id}  # it knows; nobody talks to it any more
    gossip([a, c])
    a.revoke(c)  # the revoker is revoked in its turn, before "d" is back
    d.hear(a)
    assert d.trusts == {a.id}
    for gone in (b, c):
        why = d.roster.why_not(gone.id)
        assert why is not None
        assert why.by == a.id or gone is b


def test_whom_only_the_revoked_one_vouched_for_is_out() -> None:
    a, b, c = group(3)
    evil = Board("evil")
    b.pair(evil)  # a thief of b's key lets a friend in; "c", who revokes, has not heard of it
    a.hear(b)
    assert evil.id in a.trusts
    c.revoke(b)
    gossip([a, c])
    assert agree([a, c])
    assert a.trusts == {c.id}
    assert c.trusts == {a.id}


def test_who_revokes_stays_though_the_revoked_one_let_it_in() -> None:
    a, x, v = boards(3)
    a.pair(x)
    x.pair(v)
    gossip([a, x, v])
    assert a.roster.entries[v.id].by == x.id
    v.revoke(x)
    gossip([a, v])
    assert agree([a, v])
    assert (a.trusts, v.trusts) == ({v.id}, {a.id})
    later = Board("later")
    a.pair(later)
    gossip([a, v, later])
    assert later.trusts == {a.id, v.id}


def test_a_revoked_board_says_nothing_more() -> None:
    a, b, c = group(3)
    a.revoke(b)
    before = a.roster
    friend = Board("friend")
    for record in (
        b.says(ADMIT, 2**50, b.id, friend.certificate, ""),
        b.says(REVOKE, 2**50, b.id, c.id),
        b.says(REPLACE, 2, b.id, friend.certificate, key=friend),
    ):
        a.roster = a.roster.merged([record])
    assert a.roster is before


def test_readmitted_everywhere_by_one_act() -> None:
    a, b, c = group(3)
    a.revoke(c)
    b.hear(a)
    assert b.trusts == {a.id}
    b.pair(c)
    gossip([a, b, c])
    assert agree([a, b, c])
    assert a.trusts == {b.id, c.id}


def test_a_name_given_spreads_and_the_later_one_counts() -> None:
    a, b, c = group(3)
    a.roster = a.roster.renamed(c.id, "kitchen")
    gossip([a, b, c])
    b.roster = b.roster.renamed(c.id, "attic")
    gossip([a, b, c])
    assert {x.roster.trusted[c.id].name for x in (a, b)} == {"attic"}
    # A rename that was not heard of does not undo a revocation.
    a.roster = a.roster.renamed(c.id, "one").renamed(c.id, "two")
    b.revoke(c)
    gossip([a, b])
    assert c.id not in a.trusts


def replaced(old: Board, new: Board) -> bytes:
    version = old.roster.entries[old.id].version + 1
    return roster.write_replace(old.id, old.key.sign, new.certificate, new.key.sign, version)


def test_a_new_key_needs_no_new_pairing() -> None:
    a, b, c = group(3)
    new = Board("b's new key")
    record = replaced(b, new)
    new.roster = Roster(
        new.id,
        new.public_key,
        new.key.sign,
        read_certificate,
        [*b.roster.records, record],
        b.roster.direct,
    )
    assert new.trusts == {a.id, c.id}
    a.roster = a.roster.merged([record])
    assert a.trusts == {new.id, c.id}
    assert a.roster.direct == {new.id}
    gossip([a, c, new])
    assert agree([a, c, new])
    later = Board("later")
    c.pair(later)
    gossip([a, c, new, later])
    assert later.trusts == {a.id, c.id, new.id}
    # Under its old key it is nobody: a storage image was rolled back, or the key was stolen.
    before = a.roster
    a.roster = a.roster.merged([b.says(REVOKE, 5000, b.id, c.id)])
    assert a.roster is before


def test_a_thief_does_not_outrun_the_revocation_with_new_keys() -> None:
    a, b, c, d = group(4)
    first, second = Board("first"), Board("second")
    version = b.roster.entries[b.id].version
    rotation = b.says(REPLACE, version + 1, b.id, first.certificate, key=first)
    again = first.says(REPLACE, version + 2, first.id, second.certificate, key=second)
    a.roster = a.roster.merged([rotation, again])
    assert second.id in a.trusts
    far = b.says(REPLACE, version + roster.REPLACE_STEP + 1, b.id, first.certificate, key=first)
    assert c.roster.merged([far]) is c.roster
    c.revoke(b)  # it has not heard of the new keys
    gossip([a, c, d])
    for member in (a, c, d):
        assert not member.trusts & {b.id, first.id, second.id}


def test_a_new_key_is_signed_by_both() -> None:
    a, b, _ = group(3)
    new, other = Board("new"), Board("other")
    version = b.roster.entries[b.id].version + 1
    with pytest.raises(ProtocolError, match="wrong signature"):
        a.roster.merged([b.says(REPLACE, version, b.id, new.certificate, key=other)])
    with pytest.raises(ProtocolError, match="not a valid roster record"):
        a.roster.merged([b.says(REPLACE, version, b.id, new.certificate)])


def test_a_storage_image_rolled_back_catches_up() -> None:
    a, b, c = group(3)
    image = a.roster.records, a.roster.direct
    a.revoke(c)
    b.hear(a)
    a.roster = Roster(a.id, a.public_key, a.key.sign, read_certificate, *image)
    assert c.id in a.trusts
    a.hear(b)  # its own word comes back
    assert a.trusts == {b.id}


def test_malformed_records() -> None:
    a, b, c = group(3)
    good = b.says(ADMIT, 9, b.id, c.certificate, "n")
    assert a.roster.merged([good]).trusted[c.id].name == "n"
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        b.says(ADMIT, 0, b.id, c.certificate, ""),
        b.says(ADMIT, 2**53, b.id, c.certificate, ""),
        b.says(ADMIT, True, b.id, c.certificate, ""),
        b.says(ADMIT, 9, b.id, b"x", ""),
        b.says(ADMIT, 9, b.id, c.certificate, "x" * 65),
        b.says(ADMIT, 9, b.id[:-1], c.certificate, ""),
        b.says(ADMIT, 9, b.id, c.certificate, "", key=a),
        b.says(ADMIT, 9, c.id, c.certificate, ""),  # by itself
        b.says(REVOKE, 9, b.id, "x" * 56),
        b.says(REVOKE, 9, b.id),
        b.says(REPLACE, 9, b.id, b.certificate, key=b),
        c.says(ADMIT, 9, b.id, c.certificate, ""),  # under another's name
        bytes(limits.MAX_RECORD_BYTES + 1),
    ):
        with pytest.raises(ProtocolError):
            a.roster.merged([bad])
    before = a.roster
    assert a.roster.merged([b.says("later", 1, 2, 3)]) is before


def test_a_group_has_a_bound() -> None:
    a = Board("a")
    others = boards(limits.MAX_GROUP_BOARDS - 1, "o")
    for other in others:
        a.pair(other)
    with pytest.raises(PairingError, match="full"):
        a.roster.admitted(Board("one more").certificate)
    with pytest.raises(PairingError, match="itself"):
        a.roster.admitted(a.certificate)
    one = others[0]
    more = [one.says(ADMIT, 1, one.id, b.certificate, "") for b in boards(3, "m")]
    assert a.roster.merged(more) is a.roster


def test_made_up_revocations_do_not_push_out_true_ones() -> None:
    a, b, c = group(3)
    a.revoke(c)
    made_up = [envelope.board_id(n.to_bytes(32)) for n in range(limits.MAX_GONE_BOARDS + 50)]
    a.roster = a.roster.merged([b.says(REVOKE, 9, b.id, board) for board in made_up])
    assert len(a.roster.entries) <= limits.MAX_GONE_BOARDS + 2
    assert a.roster.why_not(c.id) is not None
    a.revoke(b)
    assert a.trusts == set()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14), st.randoms())
def test_whoever_hears_the_same_comes_to_the_same(
    acts: list[tuple[int, int]], chance: random.Random
) -> None:
    """Whatever order they hear it in, as long as no two revoke each other unheard."""
    members = group(6)
    for a, b in acts:
        actor, other = members[a], members[b]
        if a == b or actor.roster.why_not(actor.id) is not None:
            continue
        actor.revoke(other) if other.id in actor.trusts else actor.pair(other)
        gossip([m for m in members if m.roster.why_not(m.id) is None or m is other], chance)
    inside = [m for m in members if m.roster.why_not(m.id) is None]
    gossip(inside)
    assert agree(inside)
    for member in inside:
        assert member.trusts == {m.id for m in inside} - {member.id}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_raise(data: bytes) -> None:
    try:
        read = roster.read(data, read_certificate)
    except ProtocolError:
        return
    assert read is None
