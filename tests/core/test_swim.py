"""The watch over the group: each rule of SWIM and Lifeguard by itself, then groups that fail."""

from __future__ import annotations

import math
from random import Random
from typing import Any, TypeVar

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
        for _ in range(1_000):
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
    rig.wait(swim.PROBE_MS, B, C)
    rig.sent.clear()
    rig.hear(B, PingReq(10, short_id(C)))
    rig.wait(swim.HELP_MS, B)
    assert rig.messages(Nack, B) == [Nack(10)]
    late = rig.messages(Ping, C)[0]
    rig.sent.clear()
    rig.hear(C, Ack(late.number, 0))
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


# --- suspecting


def silent(rig: Rig, board: BoardId) -> int:
    """Ask a board that says nothing until it is suspected; returns when that began."""
    others = [each for each in rig.members.peers if each != board]
    ping = rig.asked(board)
    rig.wait(swim.TIMEOUT_MS, *others)
    for helper in {to for to, m in rig.sent if isinstance(m, PingReq)}:
        rig.hear(helper, Nack(ping.number))
    rig.wait(swim.PROBE_MS - swim.TIMEOUT_MS, *others)
    assert rig.is_(board) is Presence.SUSPECT
    return rig.now


def test_a_suspicion_is_told_to_the_others_and_to_the_board_itself() -> None:
    rig = Rig(B, C, D)
    silent(rig, B)
    assert (short_id(B), IS_SUSPECT, 0) in rig.spread()
    rig.sent.clear()
    rig.wait(swim.AGAIN_MS, C, D)
    told = [each for ping in rig.messages(Ping, B) for each in ping.news]
    assert news(B, IS_SUSPECT, 0, by=ME) in told


def test_whoever_hears_of_a_suspicion_asks_the_board_at_once() -> None:
    rig = Rig(B, C, D)
    rig.hear(C, Gossip((news(B, IS_SUSPECT),)))
    assert rig.is_(B) is Presence.ALIVE  # that is what C says
    rig.tick()
    (ping,) = rig.messages(Ping, B)
    rig.hear(B, Ack(ping.number, 0))
    rig.wait(60_000, B, C, D)
    assert rig.lost == []


def test_a_suspicion_ends_the_sooner_the_more_boards_found_the_same() -> None:
    took = []
    for confirming in ((), (C,), (C, D), (C, D, E)):
        rig = Rig(B, C, D, E, BoardId("ff"))
        began = silent(rig, B)
        others = [each for each in rig.members.peers if each != B]
        for by in confirming:
            for _ in range(3):  # who says it again does not count again
                rig.hear(by, Gossip((news(B, IS_SUSPECT, by=by),)))
        while not rig.lost:
            rig.wait(1, *others)
        took.append(rig.now - began)
    least, most = swim.SUSPICION_MS, swim.SUSPICION_MS * swim.SUSPICION_STRETCH
    shares = [math.log(n + 1) / math.log(swim.CONFIRMATIONS + 1) for n in range(4)]
    assert took == [pytest.approx(most - share * (most - least), abs=2) for share in shares]


def test_the_least_suspicion_grows_with_the_group() -> None:
    rig = Rig(*(BoardId(f"board-{i:02}") for i in range(63)))
    board = BoardId("board-00")
    began = silent(rig, board)
    for i in range(1, 4):
        by = BoardId(f"board-{i:02}")
        rig.hear(by, Gossip((news(board, IS_SUSPECT, by=by),)))
    others = [each for each in rig.members.peers if each != board]
    while not rig.lost:
        rig.wait(1, *others)
    assert rig.now - began == pytest.approx(swim.SUSPICION_MS * math.log10(64), abs=2)


def test_nobodys_word_makes_a_board_gone_that_answers() -> None:
    rig = Rig(B, C, D)
    for i in range(100):
        state = IS_GONE if i % 2 else IS_SUSPECT
        by = (C, D, E)[i % 3]
        rig.hear(C, Gossip((news(B, state, 0, by=by),)))
        rig.wait(200, B, C, D)
    assert rig.lost == []
    assert rig.is_(B) is Presence.ALIVE


def test_without_a_link_others_are_believed() -> None:
    rig = Rig(B, C, D)
    rig.swim.unlinked(B, rig.now)
    rig.take()
    rig.hear(C, Gossip((news(B, IS_GONE),)))
    assert rig.lost == [(B, "fell silent")]
    rig.hear(C, Gossip((news(B, IS_GONE),)))
    assert len(rig.lost) == 1  # no news
    rig.hear(C, Gossip((news(B, IS_ALIVE, 0),)))
    assert rig.is_(B) is Presence.GONE  # that was before
    rig.hear(C, Gossip((news(B, IS_ALIVE, 1),)))
    assert rig.is_(B) is Presence.ALIVE
    assert rig.members.usable() == []
    rig.hear(C, Gossip((news(B, IS_ALIVE, 0, boot=4),)))
    assert rig.lost[1:] == [(B, "restarted")]


@pytest.mark.parametrize("sign", [Gossip(()), Ping(5, 0), Sync(b"12345678"), IDLE])
def test_any_sign_of_life_ends_a_suspicion(sign: Message) -> None:
    rig = Rig(B, C)
    silent(rig, B)
    rig.hear(B, sign)
    assert rig.is_(B) is Presence.ALIVE
    assert (short_id(B), IS_SUSPECT, 0) not in rig.spread()


def test_a_board_that_was_given_up_is_told_and_called_while_its_link_stands() -> None:
    rig = Rig(B, C)
    silent(rig, B)
    rig.wait(30_000, C)
    assert rig.lost == [(B, "fell silent")]
    assert (short_id(B), IS_GONE, 0) not in rig.spread()  # said often enough by then
    rig.sent.clear()
    rig.wait(20_000, C)
    calls = rig.messages(Ping, B)
    assert calls
    assert all(ping.sure for ping in calls)
    rig.sent.clear()
    rig.hear(B, Ack(calls[0].number, 0))
    assert rig.is_(B) is Presence.ALIVE
    assert Gossip((news(B, IS_GONE, 0, by=ME),)) in rig.messages(Gossip, B)


def test_a_board_contradicts_what_is_said_of_it() -> None:
    rig = Rig(B, C)
    rig.hear(B, Gossip((news(ME, IS_SUSPECT, 0),)))
    assert rig.swim.incarnation == 1
    (told,) = rig.messages(Gossip, B)
    assert told.news == (news(ME, IS_ALIVE, 1, by=ME),)
    assert (short_id(ME), IS_ALIVE, 1) in rig.spread()
    for nothing in (
        news(ME, IS_SUSPECT, 0),  # contradicted already
        news(ME, IS_ALIVE, 7),
        news(ME, IS_SUSPECT, 1, boot=9),  # of another life
        news(ME, IS_SUSPECT, 2 + swim.LEAP),
    ):
        rig.hear(B, Gossip((nothing,)))
        assert rig.swim.incarnation == 1
    rig.hear(B, Gossip((news(ME, IS_GONE, 4),)))
    assert rig.swim.incarnation == 5


# --- Lifeguard


def test_missing_answers_of_helpers_and_late_waking_make_a_board_patient() -> None:
    rig = Rig(B, C, D, E)
    assert rig.swim.health == 0
    ping = rig.asked(B)
    rig.wait(swim.TIMEOUT_MS, C, D, E)
    rig.hear(C, Nack(ping.number))  # of three; this board may be the deaf one
    rig.wait(swim.PROBE_MS, C, D, E)
    assert rig.swim.health >= 1
    rig.wait(120_000, B, C, D, E)
    assert rig.swim.health == 0
    rig.tick(10_000)
    assert rig.swim.health == 1


def test_a_patient_board_asks_less_often_and_waits_longer() -> None:
    rig = Rig(B, C)
    rig.swim.health = 3
    ping = rig.asked(B)
    stretch = rig.swim.health + 1
    assert stretch > 1
    rig.sent.clear()
    rig.wait(swim.TIMEOUT_MS * stretch - 1, C)
    assert not rig.messages(PingReq)
    rig.wait(1, C)
    assert [m.number for m in rig.messages(PingReq, C)] == [ping.number]


def test_a_board_that_slept_judges_nobody_by_what_it_has_not_read() -> None:
    rig = Rig(B, C, D)
    silent(rig, B)
    rig.hear(C, Gossip((news(B, IS_SUSPECT, by=C), news(B, IS_SUSPECT, by=D))))
    rig.now += 20_000
    rig.hear(D, Gossip((news(B, IS_GONE, by=D),)))  # the first that it reads
    assert rig.lost == []
    rig.tick()
    assert rig.lost == []
    rig.hear(B, Gossip(()))
    rig.wait(30_000, B, C, D)
    assert rig.lost == []


def test_health_is_bounded() -> None:
    rig = Rig(B, C)
    for _ in range(50):
        rig.tick(30_000)
    assert rig.swim.health == swim.MAX_HEALTH
    rig.wait(100_000, B, C)
    assert rig.swim.health == 0


# --- news and views


def test_news_go_along_and_are_told_as_often_as_the_group_needs() -> None:
    rig = Rig(B, C, D)
    rig.hear(B, Ping(1, 0, news=(news(E, IS_ALIVE, 3),)))  # of nobody
    assert rig.spread() == set()
    rig.sent.clear()
    rig.hear(B, Ping(1, 0, news=(news(C, IS_ALIVE, 3),)))
    rig.wait(60_000, B, C, D)
    carried = [m for _, m in rig.sent if isinstance(m, Ping | Ack | Gossip | PingReq)]
    told = [each for m in carried for each in m.news if each == news(C, IS_ALIVE, 3)]
    assert len(told) == swim.RETRANSMIT  # times the logarithm of up to ten boards
    assert not rig.swim._rumours
    to_c = [each for m in rig.messages(Gossip, C) for each in m.news]
    assert to_c == []  # it knows that best itself


def test_a_contradiction_replaces_what_it_contradicts() -> None:
    rig = Rig(B, C, D)
    rig.hear(C, Gossip((news(B, IS_SUSPECT, by=C),)))
    rig.hear(B, Gossip((news(B, IS_ALIVE, 1, by=B),)))  # of itself it says that by its own number
    rig.hear(B, Ack(123, 1))
    assert rig.spread() == {(short_id(B), IS_ALIVE, 1)}


@pytest.mark.parametrize("state", [IS_SUSPECT, IS_GONE])
def test_news_of_the_past_or_from_far_ahead_change_nothing(state: int) -> None:
    rig = Rig(B, C)
    rig.hear(B, Ping(1, 10))
    for incarnation in (9, 11 + swim.LEAP):
        rig.hear(C, Gossip((news(B, state, incarnation),)))
        assert not rig.swim._suspicions
    rig.hear(C, Gossip((news(B, 200, 11),)))  # of a state that a newer version has
    assert rig.members.peers[B].incarnation == 10
    rig.hear(C, Gossip((news(B, state, 10),)))
    assert rig.swim._suspicions


def test_a_packet_of_news_fits_in_a_datagram() -> None:
    far = 2**53 - 1
    full = tuple(
        News(bytes([i] * 8), IS_GONE, far, far, bytes([i] * 8)) for i in range(limits.MAX_NEWS)
    )
    report = Alive(far, far, "n" * 30, True, "m" * 40, 9, 9, 99_999, 9_999, 9_999, 999)
    data = encode(Ping(far, far, full, report, True))[1]
    assert len(data) < limits.MAX_DATAGRAM_BYTES - 40
    assert decode_hop(data) == Ping(far, far, full, report, True)


def test_views_are_compared_and_only_what_differs_is_told() -> None:
    rig = Rig(B, C, D)
    rig.hear(B, Sync(rig.swim.digest()))
    assert not rig.messages(View)
    rig.hear(B, Sync(b"otherwise"[:8]))
    (view,) = rig.messages(View, B)
    assert view.ask
    assert {(each.board, each.state) for each in view.news} == {
        (short_id(board), IS_ALIVE) for board in (ME, B, C, D)
    }
    rig.sent.clear()
    theirs = tuple(e for e in view.news if e.board != short_id(C))
    rig.hear(B, View((*theirs, news(C, IS_ALIVE, 6)), ask=True))
    assert rig.members.peers[C].incarnation == 6
    assert rig.messages(View) == []  # now they are the same
    rig.hear(B, View((), ask=True))
    (answer,) = rig.messages(View, B)
    assert len(answer.news) == 4
    assert not answer.ask
    rig.sent.clear()
    rig.wait(60_000, B, C, D)
    assert 5 <= len(rig.messages(Sync)) <= 7


# --- coming and going


def test_good_bye_is_news_and_what_comes_after_it_is_not_listened_to() -> None:
    rig = Rig(B, C)
    assert not rig.hear(B, Leave(1))
    assert rig.lost == [(B, "left the group")]
    assert not rig.hear(B, Leave(1))
    assert not rig.hear(B, Ping(4, 0))
    assert not rig.messages(Ack)
    assert rig.is_(B) is Presence.GONE
    assert (short_id(B), IS_GONE, 0) in rig.spread()
    rig.sent.clear()
    rig.wait(30_000, C)
    assert not rig.messages(Ping, B)
    rig.swim.linked(B, 2, rig.now)
    rig.take()
    assert rig.hear(B, Ping(4, 0))
    assert rig.is_(B) is Presence.ALIVE


def test_last_words_go_to_whoever_hears_them() -> None:
    rig = Rig(B, C)
    rig.swim.unlinked(C, rig.now)
    rig.take()
    rig.sent.clear()
    rig.swim.last_words()
    assert rig.take() == [(B, Leave(1))]


def test_nothing_is_left_of_a_board_that_is_forgotten() -> None:
    rig = Rig(B, C, D)
    silent(rig, B)
    rig.hear(D, PingReq(5, short_id(B)))
    rig.hear(B, PingReq(6, short_id(C)))
    rig.swim.forget(B)
    rig.swim.forget(B)
    rig.members.unpair(B)
    rig.sent.clear()
    rig.hear(C, Gossip((news(B, IS_SUSPECT),)))
    rig.wait(30_000, C, D)
    assert not [to for to, _ in rig.sent if to == B]
    assert rig.lost == []


# --- reports


def test_an_idle_board_is_quiet() -> None:
    rig = Rig(B, C, D)
    rig.wait(60_000, B, C, D)
    rig.sent.clear()
    rig.wait(60_000, B, C, D)
    assert not rig.messages(Alive)
    assert not any(ping.report for ping in rig.messages(Ping))
    assert len(rig.sent) <= 60 + 7  # a ping a second, a comparison in ten


def test_a_change_is_told_to_all_at_once_and_again_against_loss() -> None:
    rig = Rig(B, C)
    rig.wait(60_000, B, C)
    rig.sent.clear()
    rig.load = msgspec.structs.replace(IDLE, expected_wait_ms=800)
    rig.wait(5_000, B, C)
    for board in (B, C):
        assert len(rig.messages(Alive, board)) == 1 + swim.REPORT_REPEATS
    for _ in range(10):
        rig.load = msgspec.structs.replace(rig.load, expected_wait_ms=2 * rig.load.expected_wait_ms)
        rig.sent.clear()
        rig.wait(swim.REPORT_MS, B, C)
        assert len(rig.messages(Alive, B)) == 1  # a second at most
    rig.sent.clear()
    rig.swim.announce(rig.now)
    rig.take()
    assert {to for to, _ in rig.sent} == {B, C}


def test_a_small_change_rides_along_and_a_board_that_works_says_so_again() -> None:
    rig = Rig(B, C)
    rig.wait(60_000, B, C)
    rig.sent.clear()
    rig.load = msgspec.structs.replace(IDLE, expected_wait_ms=50)
    rig.wait(10_000, B, C)
    assert not rig.messages(Alive)
    rode = [ping.report for ping in rig.messages(Ping) if ping.report]
    assert len(rode) == 2 * swim.REPORT_RIDES
    assert {report.expected_wait_ms for report in rode} == {50}
    rig.load = msgspec.structs.replace(IDLE, running=1)
    rig.wait(10_000, B, C)
    rig.sent.clear()
    rig.wait(20_000, B, C)
    assert len(rig.messages(Alive, B)) == 20_000 / swim.REFRESH_MS


def test_what_is_worth_telling() -> None:
    old = msgspec.structs.replace(IDLE, expected_wait_ms=1_000, waiting=10)
    for change, worth in (
        ({"sequence": 99}, False),
        ({"expected_wait_ms": 1_199}, False),
        ({"expected_wait_ms": 800}, True),
        ({"waiting": 11}, False),
        ({"waiting": 12}, True),
        ({"accepting": False}, True),
        ({"model": "other"}, True),
        ({"utilisation_permille": 49}, False),
        ({"utilisation_permille": 50}, True),
        ({"proposal_ms": 1_200}, True),
    ):
        assert differs(old, msgspec.structs.replace(old, **change)) is worth, change


# --- whatever comes

_numbers = st.integers(0, 20) | st.integers(0, 2**53 - 1)
_boards = st.sampled_from([ME, B, C, D, E])
_ids = _boards.map(short_id)
_news = st.builds(News, _ids, st.integers(0, 255), _numbers, _numbers, _ids | st.just(b"somebody"))
_some = st.lists(_news, max_size=5).map(tuple)
_messages = st.one_of(
    st.builds(Ping, _numbers, _numbers, _some, st.none() | st.just(IDLE), st.booleans()),
    st.builds(Ack, _numbers, _numbers, _some, st.none(), st.booleans()),
    st.builds(PingReq, _numbers, _boards.map(short_id), _some),
    st.builds(Nack, _numbers),
    st.builds(Gossip, _some),
    st.builds(Sync, st.binary(min_size=8, max_size=8)),
    st.builds(View, _some, st.booleans()),
    st.builds(Leave, st.integers(0, 3)),
    st.builds(Alive, st.integers(0, 3), st.integers(0, 9), st.just("x"), st.booleans(),
              st.just("m"), *[st.integers(0, 9)] * 3),
)  # fmt: skip
_happenings = st.lists(
    st.one_of(
        st.tuples(st.just("hear"), st.sampled_from([B, C, D]), _messages),
        st.tuples(st.just("wait"), st.integers(0, 5_000), st.none()),
        st.tuples(st.just("sleep"), st.integers(0, 20_000), st.none()),
        st.tuples(st.sampled_from(["link", "unlink", "forget", "pair"]),
                  st.sampled_from([B, C, D]), st.integers(0, 3)),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_happenings)
def test_whatever_comes_in_whatever_order_nothing_breaks_or_grows(
    happenings: list[tuple[str, Any, Any]],
) -> None:
    rig = Rig(B, C, D)
    peers = rig.members.peers
    for what, whom, detail in happenings:
        match what:
            case "wait":
                rig.wait(whom, B)
            case "sleep":
                rig.tick(whom)
            case "pair":
                rig.members.pair(whom, whom)
                rig.swim.pair(whom)
            case _ if whom not in peers:
                continue
            case "hear":
                rig.hear(whom, detail)
            case "link":
                rig.swim.linked(whom, detail, rig.now)
            case "unlink":
                rig.swim.unlinked(whom, rig.now)
            case "forget":
                rig.swim.forget(whom)
                rig.members.unpair(whom)
        said = len(rig.take())
        assert said <= 40
        if what in ("hear", "link"):
            assert [b for b, why in rig.lost if why == "fell silent" and peers[b].linked] == []
        rig.lost.clear()
        watch = rig.swim
        assert watch.due_ms() <= rig.now + swim.PROBE_MS
        assert len(watch._rumours) <= 4 * (2 + swim.CONFIRMATIONS)
        assert watch._suspicions.keys() <= peers.keys()
        assert watch._probes.keys() <= peers.keys()
        assert all(peers[board].there for board in watch._suspicions)
    for board in peers:
        rig.swim.linked(board, 3, rig.now)
    rig.take()
    rig.wait(30_000, *peers)
    assert all(peer.presence is Presence.ALIVE for peer in peers.values())
