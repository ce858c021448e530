"""The watch over the group: each rule of SWIM and Lifeguard by itself, then groups that fail."""

from __future__ import annotations

import math
from random import Random
from typing import TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemoa.core import limits, swim
from edgemoa.core.envelope import decode_hop, encode, short_id
from edgemoa.core.membership import Membership, Presence
from edgemoa.core.messages import (
    Ack,
    Alive,
    BoardId,
    Gossip,
    Leave,
    Message,
    Nack,
    News,
    Ping,
    PingReq,
    Sync,
    View,
)
from edgemoa.core.swim import IS_ALIVE, IS_GONE, IS_SUSPECT, Swim, differs

ME, B, C, D, E = (BoardId(x) for x in ("me", "bb", "cc", "dd", "ee"))
T = TypeVar("T")
IDLE = Alive(1, 0, "me", True, "tiny", 0, 0, 0, 1_000, 2_000, 0)


def news(of: BoardId, state: int, incarnation: int = 0, by: BoardId = C, boot: int = 1) -> News:
    return News(short_id(of), state, boot, incarnation, short_id(by))


class Rig:
    """One board's watch, and what it says."""

    def __init__(self, *peers: BoardId, linked: bool = True) -> None:
        self.now = 1_000
        self.load = IDLE
        self.sequence = 0
        self.members = Membership()
        self.swim = Swim(ME, 1, self.members, rng=Random(1), report=self.report, now_ms=self.now)
        self.sent: list[tuple[BoardId, Message]] = []
        self.lost: list[tuple[BoardId, str]] = []
        for peer in peers:
            self.members.pair(peer, peer)
            self.swim.pair(peer)
            if linked:
                self.swim.linked(peer, 1, self.now)
        self.take()
        if linked:
            self.wait(3_000, *peers)
            for peer in peers:
                self.hear(peer, Gossip(()))
        self.sent.clear()

    def report(self, _: int) -> Alive:
        self.sequence += 1
        return msgspec.structs.replace(self.load, sequence=self.sequence)

    def take(self) -> list[tuple[BoardId, Message]]:
        said, self.swim.out = self.swim.out, []
        self.sent += said
        self.lost += self.swim.lost
        self.swim.lost = []
        return said

    def hear(self, sender: BoardId, message: Message) -> bool:
        listen = self.swim.receive(sender, message, self.now)
        self.take()
        return listen

    def tick(self, later_ms: int = 0) -> None:
        self.now += later_ms
        self.swim.tick(self.now)
        self.take()

    def wait(self, ms: int, *answering: BoardId) -> None:
        """Let time pass; some boards answer what they are asked, the others say nothing."""
        until = self.now + ms
        while (due := self.swim.due_ms()) <= until:
            self.now = max(due, self.now)
            self.swim.tick(self.now)
            for to, message in self.take():
                if to in answering and isinstance(message, Ping):
                    self.hear(to, Ack(message.number, 0))
        self.now = until

    def messages(self, kind: type[T], to: BoardId | None = None) -> list[T]:
        return [m for at, m in self.sent if isinstance(m, kind) and to in (None, at)]

    def is_(self, board: BoardId) -> Presence:
        return self.members.peers[board].presence

    def asked(self, board: BoardId) -> Ping:
        """The first ping of a board that does not answer from now on."""
        self.sent.clear()
        others = [each for each in self.members.peers if each != board]
        for _ in range(100):
            self.wait(max(self.swim.due_ms() - self.now, 0), *others)
            pings = self.messages(Ping, board)
            if pings:
                return pings[0]
        raise AssertionError(f"{board} is never asked")

    def spread(self) -> set[tuple[bytes, int, int]]:
        """News that goes along with what is said next."""
        self.sent.clear()
        self.wait(swim.GOSSIP_MS)
        told = [each for message in self.messages(Gossip) for each in message.news]
        return {(each.board, each.state, each.incarnation) for each in told}


# --- asking


def test_every_second_one_board_is_asked_whoever_was_silent_longest() -> None:
    rig = Rig(B, C, D)
    for quiet in (B, D, C):
        rig.sent.clear()
        others = [each for each in (B, C, D) if each != quiet]
        for each in others:
            rig.now += 1
            rig.hear(each, Gossip(()))
        rig.wait(swim.PROBE_MS, B, C, D)
        assert rig.messages(Ping, quiet)
        assert len(rig.messages(Ping)) == 1
    rig.sent.clear()
    rig.wait(60_000, B, C, D)
    counts = [len(rig.messages(Ping, board)) for board in (B, C, D)]
    assert sum(counts) == 60
    assert min(counts) >= 19


def test_a_ping_is_answered_at_once_the_way_it_came() -> None:
    rig = Rig(B)
    for sure in (False, True):
        rig.sent.clear()
        rig.hear(B, Ping(77, 0, sure=sure))
        assert [(m.number, m.incarnation, m.sure) for m in rig.messages(Ack, B)] == [(77, 0, sure)]


def test_one_that_does_not_answer_is_asked_for_by_others_and_over_the_connection() -> None:
    rig = Rig(B, C, D, E)
    ping = rig.asked(B)
    rig.sent.clear()
    rig.wait(swim.TIMEOUT_MS, C, D, E)
    helped = {to: m for to, m in rig.sent if isinstance(m, PingReq)}
    assert set(helped) == {C, D, E}
    assert {(m.number, m.board) for m in helped.values()} == {(ping.number, short_id(B))}
    assert [(m.number, m.sure) for m in rig.messages(Ping, B)] == [(ping.number, True)]
    rig.hear(B, Ack(ping.number, 0))
    rig.wait(swim.TIMEOUT_MS, B, C, D, E)
    assert rig.is_(B) is Presence.ALIVE


def test_a_helper_asks_and_says_what_came_of_it() -> None:
    rig = Rig(B, C)
    rig.hear(B, PingReq(9, short_id(C)))
    (ping,) = rig.messages(Ping, C)
    assert not rig.messages(Nack)
    rig.hear(C, Ack(ping.number, 0))
    assert [m.number for m in rig.messages(Ack, B)] == [9]
    rig.sent.clear()
    rig.hear(B, PingReq(10, short_id(C)))
    rig.wait(swim.HELP_MS, B)
    assert rig.messages(Nack, B) == [Nack(10)]
    rig.sent.clear()
    (late,) = [rig.swim._number]
    rig.hear(C, Ack(late, 0))
    assert not rig.messages(Ack)
    rig.swim.unlinked(C, rig.now)
    rig.take()
    rig.sent.clear()
    rig.hear(B, PingReq(11, short_id(C)))
    assert rig.messages(Nack, B) == [Nack(11)]  # at once: it has no way to ask


def test_a_helper_is_not_used_against_itself_or_without_end() -> None:
    rig = Rig(B, C)
    rig.hear(B, PingReq(9, short_id(B)))
    rig.hear(B, PingReq(9, short_id(BoardId("unknown"))))
    assert rig.sent == []
    for number in range(2 * swim.MAX_HELPED):
        rig.hear(B, PingReq(number, short_id(C)))
    assert len(rig.messages(Ping, C)) == swim.MAX_HELPED


def test_whom_a_third_board_reaches_is_there_but_not_asked_for_work() -> None:
    rig = Rig(B, C, D)
    rig.members.report(B, msgspec.structs.replace(IDLE, name="bb"), rig.now)
    assert rig.members.usable() == [B]
    ping = rig.asked(B)
    rig.wait(swim.TIMEOUT_MS, C, D)
    rig.hear(C, Ack(ping.number, 0))
    rig.wait(swim.PROBE_MS, C, D)
    assert rig.is_(B) is Presence.ALIVE
    assert rig.members.usable() == []
    rig.hear(B, Gossip(()))  # what it says arrives, as where only one direction is cut
    assert rig.members.usable() == []
    rig.hear(B, Ack(rig.asked(B).number, 0))
    assert rig.members.usable() == [B]


# --- links


def test_a_link_brings_a_report_and_a_comparison() -> None:
    rig = Rig(B, linked=False)
    assert rig.is_(B) is Presence.UNHEARD
    rig.swim.linked(B, 1, rig.now)
    rig.take()
    assert [type(m) for m in rig.messages(object, B)] == [Alive, Sync]
    assert rig.is_(B) is Presence.ALIVE


def test_a_link_that_ends_is_no_death_but_a_reason_to_ask() -> None:
    rig = Rig(B, C, D)
    rig.swim.unlinked(B, rig.now)
    rig.take()
    asked = {to: m.number for to, m in rig.sent if isinstance(m, PingReq)}
    assert set(asked) == {C, D}
    assert rig.is_(B) is Presence.ALIVE
    rig.hear(C, Ack(asked[C], 0))
    rig.wait(swim.PROBE_MS, C, D)
    assert (rig.is_(B), rig.lost) == (Presence.ALIVE, [])
    rig.wait(30_000, C, D)  # and now nobody reaches it
    assert rig.lost == [(B, "fell silent")]


def test_with_nobody_to_ask_a_board_whose_link_ended_is_gone_within_seconds() -> None:
    rig = Rig(B)
    rig.swim.unlinked(B, rig.now)
    rig.wait(swim.PROBE_MS + swim.SUSPICION_MS)
    assert rig.lost == [(B, "fell silent")]


def test_another_boot_is_another_life() -> None:
    rig = Rig(B, C)
    rig.swim.linked(B, 2, rig.now)
    rig.take()
    assert rig.lost == [(B, "restarted")]
    assert rig.is_(B) is Presence.ALIVE
    rig.hear(C, Gossip((news(B, IS_GONE, 0, boot=1), news(B, IS_SUSPECT, 5, boot=1))))
    assert not rig.swim._suspicions
    rig.hear(B, msgspec.structs.replace(IDLE, boot=3, sequence=1))
    assert rig.lost[1:] == [(B, "restarted")]
